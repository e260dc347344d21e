// One websocket that comes back: with its cursors, so that nothing is missed and nothing is seen twice, and with the
// requests that were open. Each write carries a request id of its own: sent again, it is still done once.

const FIRST_PAUSE_MS = 200;
const LONGEST_PAUSE_MS = 5_000;
const PROBE_MS = 20_000;
const SILENCE_MS = 5_000;
const MAX_TRIES = 6;
const WRITES = new Set(["put", "update", "delete"]);

/** What the server answered instead of a result; `code` as on the wire. */
export class Refused extends Error {
  constructor(code, message, details = {}) {
    super(message);
    this.code = code;
    this.details = details;
  }
}

/** Random and unique; `crypto.randomUUID` is missing where the page does not come from https or this machine. */
export function uniqueId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** Whether to reconnect after this close code. */
function comesBack(code) {
  return code !== 1008 && code !== 1009 && !(code >= 4400 && code <= 4499);
}

export class Connection {
  #ws = null;
  #welcomed = false;
  #welcomedAt = 0;
  #heardAt = 0;
  #cursor = null;
  #topics = {};
  #open = new Map(); // id → {frame, resolve, reject, tries}
  #lastId = 0;
  #pauseMs = FIRST_PAUSE_MS;
  #notBefore = 0;
  #timer = null;
  #ended = null;

  /**
   * `onState({name, missed?, code?, reason?})` with name connecting, connected, resumed, reconnecting or closed;
   * `onWelcome(frame)`; `onEvent(frame)` for change, message, reset and expiring, in the feed's order.
   */
  constructor(url, authKey, { onState, onWelcome, onEvent }) {
    Object.assign(this, { url, authKey, onState, onWelcome, onEvent });
  }

  start() {
    this.onState({ name: "connecting" });
    this.#connect();
    setInterval(() => this.#probe(), PROBE_MS);
    addEventListener("online", () => this.#wake());
    addEventListener("offline", () => this.#probe());
    document.addEventListener("visibilitychange", () => document.hidden || this.#wake());
  }

  /** The result of an action; it waits for as long as the connection is away. Throws Refused. */
  request(action, fields = {}) {
    if (this.#ended) return Promise.reject(this.#ended);
    const frame = { id: ++this.#lastId, action, ...fields };
    if (WRITES.has(action)) frame.request = uniqueId();
    return new Promise((resolve, reject) => {
      this.#open.set(frame.id, { frame, resolve, reject, tries: 0 });
      this.#send(frame);
    });
  }

  // ── the socket ────────────────────────────────────────────────────────────────────────────────────────────────────

  #connect() {
    clearTimeout(this.#timer);
    this.#timer = null;
    const ws = new WebSocket(this.#address());
    this.#ws = ws;
    // A socket that was given up may still speak: only the present one is listened to.
    ws.onmessage = ({ data }) => ws === this.#ws && this.#received(JSON.parse(data));
    ws.onclose = ({ code, reason }) => ws === this.#ws && this.#lost(code, reason);
    this.#probe();
  }

  #address() {
    const query = new URLSearchParams({ auth_key: this.authKey });
    if (this.#cursor !== null) {
      query.set("cursor", this.#cursor);
      query.set("topics", JSON.stringify(this.#topics));
    }
    return `${this.url}?${query}`;
  }

  #lost(code, reason) {
    const ws = this.#ws;
    this.#ws = null;
    ws.close();
    if (this.#welcomed && Date.now() - this.#welcomedAt > LONGEST_PAUSE_MS) this.#pauseMs = FIRST_PAUSE_MS;
    this.#welcomed = false;
    if (!comesBack(code)) {
      this.#end(code, reason);
      return;
    }
    const jittered = this.#pauseMs * (0.5 + Math.random() / 2); // else all clients of a server come back as one
    this.#pauseMs = Math.min(2 * this.#pauseMs, LONGEST_PAUSE_MS);
    this.#timer = setTimeout(() => this.#connect(), Math.max(jittered, this.#notBefore - Date.now()));
    this.onState({ name: "reconnecting" });
  }

  #end(code, reason) {
    this.#ended = new Refused("closed", "The connection is closed.");
    for (const { reject } of this.#open.values()) reject(this.#ended);
    this.#open.clear();
    this.onState({ name: "closed", code, reason });
  }

  /** Reconnect at once if that is what we wait for; else see whether the socket survived. */
  #wake() {
    if (this.#timer !== null) this.#connect();
    else this.#probe();
  }

  /** Ask for a sign of life: a socket whose network is gone looks open for minutes. */
  #probe() {
    const ws = this.#ws;
    if (!ws) return;
    const askedAt = performance.now();
    if (this.#welcomed) ws.send('{"id":"probe","action":"ping"}');
    setTimeout(() => ws === this.#ws && this.#heardAt < askedAt && this.#lost(1006, "no answer"), SILENCE_MS);
  }

  // ── frames ────────────────────────────────────────────────────────────────────────────────────────────────────────

  #send(frame) {
    if (this.#welcomed) this.#ws.send(JSON.stringify(frame)); // else with the next welcome
  }

  #received(frame) {
    this.#heardAt = performance.now();
    if ("cursor" in frame) this.#note(frame);
    switch (frame.type) {
      case "welcome":
        this.#welcome(frame);
        break;
      case "reply":
      case "error":
        this.#answered(frame);
        break;
      case "reconnect":
        this.#leave(frame.after_ms);
        break;
      default:
        this.onEvent(frame);
    }
  }

  #note(frame) {
    if (frame.type === "welcome") this.#topics = { ...frame.topics };
    if ("topic" in frame) this.#topics[frame.topic] = frame.cursor;
    else this.#cursor = frame.cursor;
  }

  #welcome(frame) {
    this.#welcomed = true;
    this.#welcomedAt = Date.now();
    for (const request of this.#open.values()) this.#send(request.frame);
    this.onState(frame.resumed ? { name: "resumed", missed: frame.replayed } : { name: "connected" });
    this.onWelcome(frame);
  }

  #answered({ id, type, result, code, message, retry, details }) {
    const request = this.#open.get(id);
    if (!request) return;
    if (type === "error" && retry && request.tries < MAX_TRIES) {
      const pauseMs = Math.min(FIRST_PAUSE_MS * 2 ** request.tries++, LONGEST_PAUSE_MS);
      setTimeout(() => this.#open.has(id) && this.#send(request.frame), details?.retry_after_ms ?? pauseMs);
      return;
    }
    this.#open.delete(id);
    if (type === "reply") request.resolve(result);
    else request.reject(new Refused(code, message, details));
  }

  /** The server is leaving, and says when to come back: it spreads its clients over time. */
  #leave(afterMs) {
    const ws = this.#ws;
    this.#notBefore = Date.now() + afterMs;
    setTimeout(() => ws === this.#ws && this.#lost(1012, ""), afterMs);
  }
}
