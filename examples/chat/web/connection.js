// One websocket that comes back: with its cursors, so that nothing is missed, and with the requests that were open.

const comesBack = (code) => code !== 1008 && code !== 1009 && !(code >= 4400 && code <= 4499);

const unique = () => [...crypto.getRandomValues(new Uint8Array(12))].map((b) => b.toString(16).padStart(2, "0")).join("");

export class Connection {
  #url; #key; #ws = null; #cursor = null; #topics = {}; #open = new Map(); #lastId = 0;
  #pauseMs = 200; #timer = null; #welcomed = false; #ended = false;

  // Told of what happens: onState(text, kind), onWelcome(frame), onFrame(frame), onRefused(reason).
  constructor(url, key, handlers) {
    this.#url = url;
    this.#key = key;
    Object.assign(this, handlers);
    addEventListener("online", () => this.#now());
    document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && this.#now());
    this.#connect();
  }

  // The result of an action. A write is safe to repeat by its request id, so it is sent again after a reconnect.
  request(action, fields) {
    const id = ++this.#lastId;
    const frame = { id, action, ...fields };
    if (["put", "update", "delete"].includes(action)) frame.request = unique();
    return new Promise((resolve, reject) => {
      this.#open.set(id, { frame, resolve, reject });
      if (this.#welcomed) this.#ws.send(JSON.stringify(frame));
    });
  }

  #connect() {
    const address = new URL(this.#url);
    address.searchParams.set("auth_key", this.#key);
    if (this.#cursor) address.searchParams.set("cursor", this.#cursor);
    if (Object.keys(this.#topics).length) address.searchParams.set("topics", JSON.stringify(this.#topics));
    const ws = (this.#ws = new WebSocket(address));
    ws.onmessage = (event) => this.#received(JSON.parse(event.data));
    ws.onclose = (event) => this.#closed(event);
  }

  #received(frame) {
    if (frame.type === "reply" || frame.type === "error") return this.#answered(frame);
    if (frame.type === "reconnect") { this.#pauseMs = frame.after_ms; return; }
    if (frame.type === "welcome") return this.#welcome(frame);
    if (frame.cursor) {
      if (frame.topic) this.#topics[frame.topic] = frame.cursor;
      else this.#cursor = frame.cursor;
    }
    this.onFrame(frame);
  }

  #welcome(frame) {
    this.#welcomed = true;
    this.#pauseMs = 200;
    this.#cursor = frame.cursor;
    this.#topics = { ...frame.topics };
    const missed = frame.replayed;
    this.onState(frame.resumed ? `Connected. Resumed, ${missed} missed ${missed === 1 ? "event" : "events"}` : "Connected", "good");
    this.onWelcome(frame);
    for (const { frame: request } of this.#open.values()) this.#ws.send(JSON.stringify(request));
  }

  #answered(frame) {
    const waiting = this.#open.get(frame.id);
    if (!waiting) return;
    this.#open.delete(frame.id);
    if (frame.type === "reply") waiting.resolve(frame.result);
    else waiting.reject(Object.assign(new Error(frame.message), { code: frame.code, retry: frame.retry }));
  }

  #closed({ code, reason }) {
    this.#welcomed = false;
    if (this.#ended) return;
    if (!comesBack(code)) {
      this.#ended = true;
      this.onRefused(reason || `The server closed the connection (${code}).`);
      return;
    }
    this.onState("Reconnecting…", "waiting");
    this.#timer = setTimeout(() => this.#again(), this.#pauseMs * (0.5 + Math.random() / 2));
    this.#pauseMs = Math.min(Math.max(2 * this.#pauseMs, 200), 5000);
  }

  #again() {
    this.#timer = null;
    this.#connect();
  }

  // The network is back, or the person is: no reason to wait on.
  #now() {
    if (!this.#timer) return;
    clearTimeout(this.#timer);
    this.#again();
  }
}
