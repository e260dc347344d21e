// The chat's view: draws what the collections hold, and turns what a person does into requests. Text from others goes
// into the page as text only, never as HTML.

import { Collection } from "./collection.js";
import { Connection, uniqueId } from "./connection.js";

const PAGE = 100;
const SAME_BREATH_MS = 5 * 60_000;
const $ = (id) => document.getElementById(id);
const link = new URLSearchParams(location.hash.slice(1));
const wide = matchMedia("(min-width: 60rem)");

const rooms = new Collection(); // my own items of `members`, by room
const presence = new Map(); // user → Collection of the user's connections
const unsent = new Map(); // message id → {item, failed}
const unread = new Map(); // room → messages that came while another was open
const drafts = new Map(); // room → what stood in the composer
let connection;
let me = null;
let here = null; // the open room: {room, messages, members, since}; messages before `since` are not loaded

// ── beginning ───────────────────────────────────────────────────────────────────────────────────────────────

function begin() {
  const given = link.get("key");
  if (given) sessionStorage.setItem("key", given);
  link.delete("key"); // it is not to be seen, copied or kept in the history with the address
  keepLink();
  const key = sessionStorage.getItem("key");
  if (key) open(key);
  else askForKey();
}

function keepLink() {
  history.replaceState(null, "", link.size ? `#${link}` : location.pathname);
}

function askForKey(problem = "") {
  sessionStorage.removeItem("key");
  $("app").hidden = true;
  $("welcome").hidden = false;
  $("key-problem").hidden = !problem;
  $("key-problem").textContent = problem;
  $("key").focus();
}

function open(key) {
  $("welcome").hidden = true;
  $("app").hidden = false;
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  const port = /^\d{1,5}$/.test(link.get("ws")) ? link.get("ws") : "8080";
  const url = `${scheme}://${location.hostname}:${port}/v1`;
  connection = new Connection(url, key, { onState, onWelcome, onEvent });
  connection.start();
}

function onState({ name, missed, code, reason }) {
  if (code === 4401) {
    askForKey("This key is not valid, or no longer. Open a new link, or paste another key.");
    return;
  }
  const closed = { 4403: "Refused", 4429: "Too many open connections" }[code] ?? `Disconnected (${code})`;
  const words = {
    connecting: "Connecting…",
    connected: "Connected",
    resumed: `Resumed, ${missed} missed ${missed === 1 ? "message" : "messages"}`,
    reconnecting: "Reconnecting…",
    closed: reason ? `${closed}: ${reason}` : closed,
  };
  setText($("status"), words[name]);
  $("status").dataset.state = name;
  $("reconnect").hidden = name !== "closed";
  clearTimeout(onState.timer);
  if (name === "resumed") onState.timer = setTimeout(() => onState({ name: "connected" }), 10_000);
}

async function onWelcome(frame) {
  if (me !== null) return; // what was missed meanwhile comes by itself, or a reset does
  me = frame.user;
  $("me").textContent = me;
  await loadRooms();
  const wanted = link.get("room");
  if (wanted && !rooms.get(wanted)) complain(`You are not in the room “${wanted}”: ask its owner to invite you.`);
  show(rooms.get(wanted) ? wanted : roomIds()[0]);
}

function onEvent(frame) {
  if (frame.type === "change") onChange(frame);
  else if (frame.type === "reset") queryAgain();
  else if (frame.type === "expiring") complain("Your key ends within a minute: open a new link to stay.");
}

function onChange({ table, key, event, new: item, position, by }) {
  // Of a room that one is no longer in, all is left at once: one's own membership, which goes too, says the rest.
  if (event === "LEAVE" && table !== "connections" && Object.keys(key).length === 1) return;
  const now = event === "REMOVE" || event === "LEAVE" ? null : item;
  if (table === "connections") presence.get(key.user)?.apply(key.connection, now, position);
  if (table === "messages" && key.room === here?.room) here.messages.apply(key.id, now, position);
  else if (table === "messages" && event === "INSERT" && by !== me) count(key.room);
  if (table === "members") {
    if (key.room === here?.room) here.members.apply(key.user, now, position);
    if (key.user === me) myMembership(key.room, now, position, by);
    if (now) watchPresence([key.user]);
  }
  draw();
}

/** After a reset: what is held may be incomplete. */
async function queryAgain() {
  await attempt(async () => {
    await Promise.all([loadRooms(), loadRoom(), ...[...presence.keys()].map(loadPresence)]);
    if (here && !rooms.get(here.room)) show(roomIds()[0]);
  });
}

// ── rooms ───────────────────────────────────────────────────────────────────────────────────────────────────────────

const roomIds = () => rooms.entries().map(([room]) => room);
const titleOf = (room) => String(rooms.get(room)?.title ?? room);

/** One's rooms are one query of an index. It follows within moments, so each membership is then read itself. */
async function loadRooms() {
  const query = { table: "members", index: "by_member", key: me, limit: 1000 };
  const { items } = await connection.request("query", query);
  const known = new Set([...items.map(({ item }) => item.room), ...roomIds(), link.get("room")].filter(Boolean));
  await Promise.all([...known].map(loadMembership));
}

async function loadMembership(room) {
  try {
    const { item, position } = await connection.request("get", { table: "members", key: { room, user: me } });
    rooms.add([[room, item]], position);
  } catch {
    rooms.forget(room);
  }
}

function myMembership(room, item, position, by) {
  const title = titleOf(room);
  const before = rooms.get(room);
  if (!rooms.apply(room, item, position)) return;
  if (item && !before && by !== me) say(`${by} invited you to “${titleOf(room)}”.`);
  if (item && !here) show(room);
  if (item || !before) return;
  say(by === me ? `You left “${title}”.` : `You are no longer in “${title}”.`);
  if (here?.room === room) show(roomIds()[0]);
}

function count(room) {
  unread.set(room, (unread.get(room) ?? 0) + 1);
}

/** Open a room; none when there is none. */
function show(room) {
  if (here) drafts.set(here.room, $("text").value);
  here = room ? { room, messages: new Collection(), members: new Collection(), since: "", loaded: false } : null;
  $("messages").replaceChildren();
  $("members").replaceChildren();
  $("text").value = drafts.get(room) ?? "";
  $("rooms").togglePopover(false);
  unread.delete(room);
  if (room) link.set("room", room);
  else link.delete("room");
  keepLink();
  draw();
  attempt(loadRoom);
}

/** Changes that come while the queries are on their way are held already: the collections sort out what is newer. */
async function loadRoom() {
  const at = here;
  if (!at) return;
  const [messages, members] = await Promise.all([
    connection.request("query", { table: "messages", key: at.room, limit: PAGE, reverse: true }),
    connection.request("query", { table: "members", key: at.room, limit: 1000 }),
  ]);
  at.since = messages.next ?? "";
  at.messages.replace(messages.items.map(({ item }) => [item.id, item]), messages.position);
  at.members.replace(members.items.map(({ item }) => [item.user, item]), members.position);
  if (at !== here) return;
  drawNow({ toEnd: !at.loaded });
  at.loaded = true;
  watchPresence(at.members.entries().map(([user]) => user));
}

async function loadOlder() {
  const at = here;
  const query = { table: "messages", key: at.room, limit: PAGE, reverse: true, before: at.since };
  const { items, next, position } = await connection.request("query", query);
  at.since = next ?? "";
  at.messages.add(items.map(({ item }) => [item.id, item]), position);
  const fromEnd = $("log").scrollHeight - $("log").scrollTop;
  drawNow();
  $("log").scrollTop = $("log").scrollHeight - fromEnd;
}

function watchPresence(users) {
  for (const user of users) {
    if (presence.has(user)) continue;
    presence.set(user, new Collection());
    loadPresence(user).catch(() => presence.delete(user));
  }
}

async function loadPresence(user) {
  const { items, position } = await connection.request("query", { table: "connections", key: user });
  presence.get(user).replace(items.map(({ item }) => [item.connection, item]), position);
  draw();
}

const isOnline = (user) => Boolean(presence.get(user)?.entries().length);

// ── what a person does ──────────────────────────────────────────────────────────────────────────────────────────────

const put = (table, item, more) => connection.request("put", { table, item, ...more });
const remove = (table, key) => connection.request("delete", { table, key });

async function createRoom(title) {
  const room = uniqueId().slice(0, 16);
  const item = { room, user: me, role: "owner", title };
  const { position } = await put("members", item); // who writes first into a vacant room owns it
  rooms.apply(room, item, position);
  show(room);
  if (wide.matches) $("text").focus();
}

async function invite(user) {
  const item = { room: here.room, user, role: "member", title: titleOf(here.room) };
  await put("members", item, { if: { absent: true } }).catch((error) => {
    throw error.code === "conflict" ? new Error(`${user} is in this room already.`) : error;
  });
  say(`${user} is invited.`);
}

async function removeMember(user) {
  const title = titleOf(here.room);
  const key = { room: here.room, user };
  const sure = user === me ? [`Leave “${title}”?`, "Leave"] : [`Remove ${user} from “${title}”?`, "Remove"];
  if (await confirmed(...sure)) await remove("members", key);
}

/** Ids sort by time; a clock that is a little behind the others' still puts its message last. */
function nextId() {
  const now = Date.now();
  const last = parseInt(shownMessages().at(-1)?.[0], 10) || 0;
  const ms = Math.max(now, Math.min(last + 1, now + 60_000));
  return `${String(ms).padStart(15, "0")}-${uniqueId().slice(0, 8)}`;
}

async function send(item) {
  unsent.set(item.id, { item, failed: false });
  drawNow({ toEnd: true });
  await attempt(async () => {
    try {
      const { position } = await put("messages", item);
      if (item.room === here?.room) here.messages.apply(item.id, item, position);
      unsent.delete(item.id);
    } catch (error) {
      unsent.set(item.id, { item, failed: true }); // it stays in view, to be tried again
      throw error;
    }
  });
  draw();
}

async function saveEdit(row) {
  const at = here;
  const key = { room: at.room, id: row.dataset.key };
  const set = { text: row.querySelector("textarea").value.trim(), edited: true };
  const { item, position } = await connection.request("update", { table: "messages", key, set });
  at.messages.apply(key.id, item, position);
  closeEditor(row);
  draw();
}

function openEditor(row) {
  row.classList.add("editing");
  row.querySelector(".editor").hidden = false;
  const box = row.querySelector("textarea");
  box.value = String(here.messages.get(row.dataset.key).text);
  box.focus();
}

function closeEditor(row) {
  row.classList.remove("editing");
  row.querySelector(".editor").hidden = true;
  $("text").focus({ preventScroll: true });
}

const actions = {
  edit: openEditor,
  cancel: closeEditor,
  retry: (row) => send(unsent.get(row.dataset.key).item),
  discard: (row) => unsent.delete(row.dataset.key) && draw(),
  delete: async (row) => {
    const key = { room: here.room, id: row.dataset.key };
    if (await confirmed("Delete this message for everybody?", "Delete")) await remove("messages", key);
  },
};

async function copyLink() {
  const shared = new URL(`#${link}`, location.href).href; // without the key
  await navigator.clipboard.writeText(shared).then(
    () => say("Copied. Only members of the room can open it, each with a key of their own."),
    () => say(shared),
  );
}

// ── telling and asking ──────────────────────────────────────────────────────────────────────────────────────────────

const FRIENDLY = {
  forbidden: "You may not do that here.",
  not_found: "That is not there any more.",
  too_large: "That is too long to send.",
};

/** Do it, and say what went wrong, if something does. */
async function attempt(work) {
  try {
    await work();
  } catch (error) {
    complain(FRIENDLY[error.code] ?? error.message);
  }
}

function say(text, role = "status") {
  const toast = $("toast");
  toast.role = role;
  toast.togglePopover(false);
  toast.togglePopover(true); // again the topmost, above a drawer
  toast.textContent = text;
  clearTimeout(say.timer);
  say.timer = setTimeout(() => toast.togglePopover(false), role === "alert" ? 12_000 : 6_000);
}

const complain = (text) => say(text, "alert");

function confirmed(question, verb) {
  $("question").textContent = question;
  $("confirm-yes").textContent = verb;
  const dialog = $("confirm");
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "yes"), { once: true });
  });
}

// ── drawing ─────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Soon, once for all that comes at once. */
function draw() {
  draw.timer ??= setTimeout(drawNow, 5);
}

function drawNow({ toEnd = false } = {}) {
  clearTimeout(draw.timer);
  draw.timer = null;
  const title = here ? titleOf(here.room) : "Tidewire chat";
  const waiting = [...unread.values()].reduce((sum, more) => sum + more, 0);
  document.title = `${waiting ? `(${waiting}) ` : ""}${title}`;
  setText($("room-title"), title);
  for (const id of ["log", "composer", "room-link"]) $(id).hidden = !here;
  $("empty").hidden = Boolean(here) || me === null;
  $("new-room").hidden = me === null;
  drawRooms();
  drawMembers();
  drawMessages(toEnd);
}

function drawRooms() {
  const known = rooms.entries().sort(([a], [b]) => titleOf(a).localeCompare(titleOf(b)));
  keyed($("room-list"), known, $("room-template"), (row, room) => {
    const button = row.querySelector("button");
    const more = unread.get(room) ?? 0;
    if (room === here?.room) button.setAttribute("aria-current", "page");
    else button.removeAttribute("aria-current");
    setText(row.querySelector(".name"), titleOf(room));
    setText(row.querySelector(".badge"), more ? `${more} new` : "");
    row.querySelector(".badge").hidden = !more;
  });
}

function drawMembers() {
  const members = here?.members.entries() ?? [];
  const owned = here && rooms.get(here.room)?.role === "owner";
  members.sort(([, a], [, b]) => (b.role === "owner") - (a.role === "owner"));
  $("invite").hidden = !owned;
  setText($("online"), here ? `${members.filter(([user]) => isOnline(user)).length} online` : "");
  keyed($("members"), members, $("member-template"), (row, user, { role }) => {
    const online = isOnline(user);
    Object.assign(row.dataset, { user, online });
    paintAvatar(row, user);
    setText(row.querySelector(".name"), user === me ? `${user} (you)` : user);
    setText(row.querySelector(".state"), `${role === "owner" ? "owner, " : ""}${online ? "online" : "offline"}`);
    const button = row.querySelector("button");
    button.hidden = role === "owner" || !(owned || user === me);
    setText(button, user === me ? "Leave" : "Remove");
    button.setAttribute("aria-label", user === me ? "Leave the room" : `Remove ${user}`);
  });
}

function shownMessages() {
  const { room, messages, since } = here;
  const sending = [...unsent].filter(([id, { item }]) => item.room === room && !messages.get(id));
  const all = [...messages.entries().filter(([id]) => id >= since), ...sending.map(([id, { item }]) => [id, item])];
  return all.sort(([a], [b]) => (a < b ? -1 : 1));
}

function drawMessages(toEnd) {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  const rows = here ? shownMessages() : [];
  const grown = rows.length > $("messages").children.length;
  log.setAttribute("aria-busy", String(!here?.loaded)); // what was there before is not read out
  $("older").hidden = !here?.since;
  $("silence").hidden = !here?.loaded || rows.length > 0;
  let previous = null;
  keyed($("messages"), rows, $("message-template"), (row, id, item) => {
    drawMessage(row, id, item, previous);
    previous = item;
  });
  if (toEnd || atEnd) log.scrollTop = log.scrollHeight;
  else if (grown) $("newest").hidden = false;
}

function drawMessage(row, id, item, previous) {
  const author = String(item.author);
  const pending = here.messages.get(id) ? null : unsent.get(id);
  const mine = author === me;
  row.dataset.author = author;
  row.classList.toggle("own", mine);
  row.classList.toggle("pending", Boolean(pending));
  row.classList.toggle("follows", previous?.author === author && item.sent - previous.sent < SAME_BREATH_MS);
  paintAvatar(row, author);
  setText(row.querySelector(".author"), author);
  setText(row.querySelector(".text"), String(item.text ?? ""));
  setText(row.querySelector("time"), timeOf(item.sent));
  const note = pending ? (pending.failed ? "not sent" : "sending…") : item.edited ? "edited" : "";
  setText(row.querySelector(".note"), note);
  for (const button of row.querySelectorAll(".actions button")) {
    button.hidden = ["retry", "discard"].includes(button.dataset.do) ? !pending?.failed : !mine || Boolean(pending);
  }
}

/** `entries`: [key, value] pairs. Rows that stay are kept in place, and with them the focus and what is read out. */
function keyed(list, entries, template, fill) {
  const wanted = new Set(entries.map(([key]) => key));
  const rows = new Map();
  for (const row of [...list.children]) {
    if (wanted.has(row.dataset.key)) rows.set(row.dataset.key, row);
    else row.remove();
  }
  let next = list.firstElementChild;
  for (const [key, value] of entries) {
    const row = rows.get(key) ?? template.content.firstElementChild.cloneNode(true);
    row.dataset.key = key;
    if (row === next) next = next.nextElementSibling;
    else list.insertBefore(row, next);
    fill(row, key, value);
  }
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function paintAvatar(row, user) {
  const name = String(user);
  const avatar = row.querySelector(".avatar");
  setText(avatar, ([...name][0] ?? "?").toUpperCase());
  const hue = [...name].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 360, 7);
  avatar.style.setProperty("--hue", hue);
}

function timeOf(ms) {
  const date = new Date(ms);
  if (!Number.isFinite(date.getTime())) return ""; // others' items may hold anything
  const today = date.toDateString() === new Date().toDateString();
  const day = today ? {} : { day: "numeric", month: "short" };
  return date.toLocaleString([], { ...day, hour: "2-digit", minute: "2-digit" });
}

// ── wiring ──────────────────────────────────────────────────────────────────────────────────────────────────────────

/** A form with one field: the text is cleared once it has done its work. */
function onSubmit(form, field, act) {
  $(form).addEventListener("submit", async (event) => {
    event.preventDefault();
    const text = $(field).value.trim();
    if (!text) return;
    await attempt(async () => {
      await act(text);
      if ($(field).value.trim() === text) $(field).value = "";
    });
  });
}

onSubmit("key-form", "key", (key) => {
  sessionStorage.setItem("key", key);
  location.reload(); // perhaps another person: nothing of the one before stays
});
onSubmit("new-room", "new-room-name", createRoom);
onSubmit("invite", "invite-name", invite);
onSubmit("composer", "text", (text) => {
  send({ room: here.room, id: nextId(), author: me, text, sent: Date.now() }); // not awaited: one may write on
});

$("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("room-list").addEventListener("click", ({ target }) => {
  const row = target.closest("button")?.closest("li");
  if (row) show(row.dataset.key);
});
$("members").addEventListener("click", ({ target }) => {
  const row = target.closest("button")?.closest("li");
  if (row) attempt(() => removeMember(row.dataset.user));
});
$("messages").addEventListener("click", ({ target }) => {
  const act = actions[target.closest("button")?.dataset.do];
  if (act) attempt(() => act(target.closest("li")));
});
$("messages").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(() => saveEdit(event.target.closest("li")));
});
$("messages").addEventListener("keydown", (event) => {
  if (event.key === "Escape" && event.target.matches("textarea")) closeEditor(event.target.closest("li"));
});
$("older").addEventListener("click", () => attempt(loadOlder));
$("newest").addEventListener("click", () => drawNow({ toEnd: true }));
$("log").addEventListener("scroll", () => {
  const { scrollHeight, scrollTop, clientHeight } = $("log");
  if (scrollHeight - scrollTop - clientHeight < 60) $("newest").hidden = true;
});
$("begin").addEventListener("click", () => {
  if (!wide.matches) $("rooms").togglePopover(true);
  $("new-room-name").focus();
});
$("copy-link").addEventListener("click", () => attempt(copyLink));
$("reconnect").addEventListener("click", () => location.reload());
$("sign-out").addEventListener("click", () => {
  sessionStorage.removeItem("key");
  location.reload();
});
wide.addEventListener("change", () => {
  for (const id of ["rooms", "people"]) $(id).togglePopover(false); // side by side they are no drawers
});
addEventListener("hashchange", ({ newURL }) => {
  history.replaceState(null, "", newURL); // another link, which we may have written over meanwhile
  location.reload();
});

begin();
