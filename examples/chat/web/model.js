// The items this page holds, by table and key. What is newer wins, whether it came as a change or with a query.

const nameOf = (table, key) => JSON.stringify([table, ...Object.values(key)]);

export class Model {
  #items = new Map();

  // True when this was news. A removed item stays as a tombstone, so that an older write does not bring it back.
  apply(table, key, version, item) {
    const name = nameOf(table, key);
    const held = this.#items.get(name);
    if (held && held.version >= version) return false;
    this.#items.set(name, { table, key, version, item });
    return true;
  }

  change(frame) {
    const gone = frame.event === "REMOVE" || frame.event === "LEAVE";
    return this.apply(frame.table, frame.key, frame.version, gone ? null : frame.new);
  }

  all(table, attribute, value) {
    return [...this.#items.values()]
      .filter((held) => held.item && held.table === table && held.key[attribute] === value)
      .map((held) => held.item);
  }

  // Before everything is queried again: what is gone by now would not be in the answer.
  forget(table, attribute, value) {
    for (const [name, held] of this.#items) {
      if (held.table === table && held.key[attribute] === value) this.#items.delete(name);
    }
  }
}
