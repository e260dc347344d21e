import { Connection } from "./connection.js";
import { Model } from "./model.js";

const $ = (id) => document.getElementById(id);
const link = new URLSearchParams(location.hash.slice(1));
const stored = (name) => link.get(name) ?? sessionStorage.getItem(name);

const model = new Model();
const sending = new Map(); // message id → what is on its way, or has failed
let connection, me, room = null;
let rooms = new Map(); // room → title

function element(tag, properties = {}, ...children) {
  const { data, ...rest } = properties;
  const made = Object.assign(document.createElement(tag), rest);
  Object.assign(made.dataset, data);
  made.append(...children);
  return made;
}

function toast(text) {
  $("toast").textContent = text;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => ($("toast").textContent = ""), 6000);
}

// Does it, and tells the person when it cannot be done.
async function attempt(action, fields) {
  try {
    return await connection.request(action, fields);
  } catch (error) {
    toast(error.message);
    return null;
  }
}

// ── starting ──────────────────────────────────────────────────────────────────────────────────────────────────────

function askForKey(reason = "") {
  sessionStorage.removeItem("key");
  $("chat").hidden = true;
  $("welcome").hidden = false;
  $("key-reason").textContent = reason;
  $("key").focus();
}

function begin(key) {
  sessionStorage.setItem("key", key);
  const port = stored("ws") ?? "8080";
  sessionStorage.setItem("ws", port);
  $("welcome").hidden = true;
  $("chat").hidden = false;
  const scheme = location.protocol === "https:" ? "wss" : "ws";
  connection = new Connection(`${scheme}://${location.hostname}:${port}/v1`, key, {
    onState: (text, kind) => { $("status").textContent = text; $("status").dataset.kind = kind; },
    onWelcome: welcomed,
    onFrame: received,
    onRefused: askForKey,
  });
}

async function welcomed(frame) {
  if (me) return; // again: the cursor has brought what was missed
  me = frame.user;
  $("me").textContent = me;
  await loadRooms();
  open(link.get("room") ?? [...rooms.keys()][0] ?? null);
}

// The rooms one knows: from the link, and from what was created or joined while the page was open.
async function loadRooms() {
  const known = JSON.parse(sessionStorage.getItem(`rooms:${me}`) ?? "[]");
  const named = new Set([link.get("room"), ...known].filter(Boolean));
  await Promise.all([...named].map(queryMembers));
  showRooms();
}

function rememberRooms() {
  sessionStorage.setItem(`rooms:${me}`, JSON.stringify([...rooms.keys()]));
}

// ── what comes ────────────────────────────────────────────────────────────────────────────────────────────────────

function received(frame) {
  if (frame.type === "reset") return refresh(true);
  if (frame.type !== "change" || !model.change(frame)) return;
  if (frame.table === "members") memberChanged(frame);
  else if (frame.table === "messages" && frame.key.room === room) showMessages();
  else if (frame.table === "connections") showMembers();
}

function memberChanged({ key }) {
  noteRoom(key.room);
  if (key.user !== me && key.room === room) askWhoIsOnline(key.user);
  if (key.room === room) {
    if (rooms.has(room)) showMembers();
    else { toast("You are no longer in that room."); open([...rooms.keys()][0] ?? null); }
  }
}

// A room is known while one is a member of it.
function noteRoom(id) {
  const members = model.all("members", "room", id);
  if (members.some((member) => member.user === me)) {
    rooms.set(id, members.find((member) => member.title)?.title ?? id);
  } else {
    rooms.delete(id);
  }
  rememberRooms();
  showRooms();
}

async function query(table, key, options = {}) {
  const result = await connection.request("query", { table, key, ...options });
  for (const { item, version } of result.items) model.apply(table, keyOf(table, item), version, item);
}

const keys = { members: ["room", "user"], messages: ["room", "id"], connections: ["user", "connection"] };
const keyOf = (table, item) => Object.fromEntries(keys[table].map((name) => [name, item[name]]));

async function queryMembers(id) {
  await query("members", id);
  noteRoom(id);
}

async function askWhoIsOnline(user) {
  await query("connections", user);
  showMembers();
}

// All that is shown, anew; after a reset without what was held, since it may be gone.
async function refresh(anew) {
  if (!room) return;
  const shown = room;
  if (anew) for (const table of ["members", "messages"]) model.forget(table, "room", shown);
  try {
    await Promise.all([queryMembers(shown), query("messages", shown, { limit: 100, reverse: true })]);
    if (shown !== room) return;
    const members = model.all("members", "room", shown);
    if (anew) for (const { user } of members) model.forget("connections", "user", user);
    await Promise.all(members.map(({ user }) => query("connections", user)));
  } catch (error) {
    toast(error.message);
  }
  showRoom();
}

// ── rooms ─────────────────────────────────────────────────────────────────────────────────────────────────────────

function open(id) {
  room = id && rooms.has(id) ? id : null;
  document.body.classList.remove("menu-open");
  $("menu").setAttribute("aria-expanded", "false");
  showRoom();
  refresh(false);
}

function showRooms() {
  const buttons = [...rooms].map(([id, title]) => {
    const button = element("button", { textContent: title, onclick: () => open(id) });
    if (id === room) button.setAttribute("aria-current", "page");
    return element("li", {}, button);
  });
  $("room-list").replaceChildren(...buttons);
}

function showRoom() {
  showRooms();
  $("room-title").textContent = room ? rooms.get(room) : "Tidewire chat";
  $("composer").hidden = !room;
  showMembers();
  showMessages();
}

function showMembers() {
  const members = room ? model.all("members", "room", room) : [];
  const owner = members.find((member) => member.role === "owner");
  $("invite").hidden = owner?.user !== me;
  $("leave").hidden = !room || owner?.user === me;
  const rows = members.sort((a, b) => a.user.localeCompare(b.user)).map((member) => {
    const online = model.all("connections", "user", member.user).length > 0;
    const row = element("li", { data: { testid: "member", user: member.user, online } },
      element("span", { className: "name", textContent: member.user }),
      element("span", { className: "note", textContent: `${online ? "online" : "away"}${member.role === "owner" ? ", owner" : ""}` }));
    if (owner?.user === me && member.user !== me) {
      row.append(element("button", { className: "quiet", textContent: "Remove", ariaLabel: `Remove ${member.user}`,
        onclick: () => attempt("delete", { table: "members", key: { room, user: member.user } }) }));
    }
    return row;
  });
  $("members").replaceChildren(...rows);
}

// ── messages ──────────────────────────────────────────────────────────────────────────────────────────────────────

function showMessages() {
  const log = $("log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  const held = room ? model.all("messages", "room", room) : [];
  for (const { id } of held) sending.delete(id);
  const waiting = [...sending.values()].filter((one) => one.item.room === room);
  const rows = [...held.map((item) => row(item)), ...waiting.map((one) => row(one.item, one))];
  rows.sort((a, b) => (a.dataset.id < b.dataset.id ? -1 : 1));
  // Rows that are the same stay, so that a reader's place, and what is read aloud, stay too.
  const old = new Map([...$("messages").children].map((child) => [child.dataset.id + child.dataset.state, child]));
  $("messages").replaceChildren(...rows.map((made) => old.get(made.dataset.id + made.dataset.state) ?? made));
  $("empty").textContent = !room ? "Create a room to begin, or ask somebody to invite you." : rows.length ? "" : "Nothing has been said here yet.";
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function row(item, pending = null) {
  const time = new Date(item.sent ?? 0).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
  const state = pending ? (pending.error ? `not sent: ${pending.error}` : "sending…") : item.edited ? "edited" : "";
  const made = element("li", { className: item.author === me ? "mine" : "", data: { testid: "message", author: item.author, id: item.id, state: state + item.text } },
    element("p", { className: "head" },
      element("span", { className: "name", textContent: item.author }),
      element("span", { className: "note", textContent: ` ${item.sent ? time : ""} ${state}` })),
    element("p", { className: "text", textContent: item.text }));
  const key = { room: item.room, id: item.id };
  if (pending?.error) {
    made.append(element("button", { className: "quiet", textContent: "Try again", onclick: () => send(item) }));
  } else if (!pending && item.author === me) {
    made.append(element("div", { className: "actions" },
      element("button", { className: "quiet", textContent: "Edit", onclick: () => edit(made, item) }),
      element("button", { className: "quiet", textContent: "Delete", onclick: () => attempt("delete", { table: "messages", key }) })));
  }
  return made;
}

function edit(made, item) {
  const input = element("textarea", { value: item.text, rows: 2, ariaLabel: "Edit your message" });
  const form = element("form", { className: "inline" }, input, element("button", { textContent: "Save" }));
  form.onsubmit = async (event) => {
    event.preventDefault();
    const fields = { table: "messages", key: { room: item.room, id: item.id }, set: { text: input.value, edited: true } };
    if (input.value.trim() && (await attempt("update", fields))) form.replaceWith();
  };
  made.querySelector(".actions").replaceWith(form);
  input.focus();
}

// In the order of time, and of no two the same.
const newId = () => `${Date.now().toString().padStart(15, "0")}-${Math.random().toString(36).slice(2, 8)}`;

async function send(item) {
  sending.set(item.id, { item });
  showMessages();
  try {
    await connection.request("put", { table: "messages", item });
  } catch (error) {
    if (sending.has(item.id)) sending.get(item.id).error = error.message;
    showMessages();
  }
}

// ── forms ─────────────────────────────────────────────────────────────────────────────────────────────────────────

function onSubmit(form, input, act) {
  $(form).onsubmit = async (event) => {
    event.preventDefault();
    const value = $(input).value.trim();
    // The text is cleared once it is safe somewhere else.
    if (value && (await act(value)) !== null) $(input).value = "";
  };
}

onSubmit("key-form", "key", (key) => begin(key));
onSubmit("composer", "text", (text) => {
  send({ room, id: newId(), author: me, text, sent: Date.now() });
  $("log").scrollTop = $("log").scrollHeight;
});
onSubmit("invite", "invite-name", (user) => {
  if (model.all("members", "room", room).some((member) => member.user === user)) {
    toast(`${user} is in this room already.`);
    return null;
  }
  return attempt("put", { table: "members", item: { room, user, role: "member", title: rooms.get(room) } });
});
onSubmit("new-room", "new-room-name", async (title) => {
  const id = newId();
  const result = await attempt("put", { table: "members", item: { room: id, user: me, role: "owner", title } });
  if (result === null) return null;
  await queryMembers(id);
  open(id);
});
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("composer").requestSubmit();
  }
};
$("leave").onclick = () => attempt("delete", { table: "members", key: { room, user: me } });
$("menu").onclick = () => {
  const shown = document.body.classList.toggle("menu-open");
  $("menu").setAttribute("aria-expanded", shown);
};
addEventListener("hashchange", () => location.reload()); // another link: another person, or another room

const key = stored("key");
if (key) begin(key);
else askForKey();
