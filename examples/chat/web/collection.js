// The items of one partition key, put together from snapshots and live changes, which arrive in any order. Positions
// say which of two is newer.

/** Whether position a, `<partition>-<generation>-<ms>-<seq>`, comes after b of the same partition. */
function newer(a, b) {
  const [left, right] = [a.split("-").map(Number), b.split("-").map(Number)];
  const differs = left.findIndex((number, index) => number !== right[index]);
  return differs >= 0 && left[differs] > right[differs];
}

export class Collection {
  #records = new Map(); // key → {item, position}; a removed item stays as null, so that nothing old brings it back
  #position = null; // of the last snapshot: it contains every change up to there

  /** A change as it comes in; `item` is null for one that is gone. False: what is held is as new. */
  apply(key, item, position) {
    const held = this.#records.get(key)?.position ?? this.#position;
    if (held && !newer(position, held)) return false;
    this.#records.set(key, { item, position });
    return true;
  }

  /** A snapshot takes the place of all that is not newer. `rows`: [key, item] pairs. */
  replace(rows, position) {
    if (this.#position && newer(this.#position, position)) return;
    for (const [key, held] of this.#records) {
      if (!newer(held.position, position)) this.#records.delete(key);
    }
    this.#position = position;
    this.add(rows, position);
  }

  /** A further page of a snapshot. */
  add(rows, position) {
    for (const [key, item] of rows) {
      const held = this.#records.get(key);
      if (!held || newer(position, held.position)) this.#records.set(key, { item, position });
    }
  }

  /** What turned out not to be there, without a position to say since when. */
  forget(key) {
    this.#records.delete(key);
  }

  get(key) {
    return this.#records.get(key)?.item ?? null;
  }

  /** [key, item] pairs, by key. */
  entries() {
    const live = [...this.#records].filter(([, held]) => held.item !== null);
    return live.map(([key, held]) => [key, held.item]).sort(([a], [b]) => (a < b ? -1 : 1));
  }
}
