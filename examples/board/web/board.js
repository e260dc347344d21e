const given = new URLSearchParams(location.hash.slice(1));
const key = given.get("key"), board = given.get("board") ?? "plans";
const COLUMNS = ["To do", "Doing", "Done"];
const $ = (id) => document.getElementById(id);

/** The result of an action. Repeats it while no gateway answers; throws with the server's message. */
async function act(action, fields) {
  for (let pauseMs = 200; ; pauseMs = Math.min(2 * pauseMs, 5000)) {
    try {
      const answer = await fetch(`/v1/${action}`, {
        method: "POST",
        headers: { Authorization: `Bearer ${key}`, "Content-Type": "application/json" },
        body: JSON.stringify(fields),
      });
      const body = await answer.json();
      if (answer.ok) return body;
      if (!body.retry) throw new Refused(body.message);
    } catch (error) {
      if (error instanceof Refused) throw error; // else the gateway is away
    }
    await new Promise((resolve) => setTimeout(resolve, pauseMs));
  }
}

class Refused extends Error {}

/** A write has a request id: repeated, it is done once. */
function write(action, fields) {
  act(action, { ...fields, request: crypto.randomUUID() }).catch(complain);
}

function complain(error) {
  $("problem").textContent = error.message;
  $("problem").hidden = false;
}

const query = async (table, partition) => (await act("query", { table, key: partition, limit: 1000 })).items;

/** Show the board as it is. A change that arrives meanwhile makes it run once more. */
let running = false, again = false;
async function refresh() {
  if (running) return void (again = true);
  running = true;
  try {
    do {
      again = false;
      const [cards, participants] = await Promise.all([query("cards", board), query("participants", board)]);
      const users = participants.map(({ item }) => item.user);
      const connected = await Promise.all(users.map((user) => query("connections", user)));
      show(cards.map(({ item }) => item), users.filter((_, number) => connected[number].length));
    } while (again);
  } catch (error) {
    complain(error);
  } finally {
    running = false;
  }
}

function show(cards, online) {
  $("people").textContent = `Online: ${online.join(", ")}`;
  $("columns").replaceChildren(...COLUMNS.map((name, column) => {
    const section = Object.assign(document.createElement("section"), { ariaLabel: name });
    section.append(Object.assign(document.createElement("h2"), { textContent: name }));
    section.append(...cards.filter((card) => card.column === column).map((card) => element(card)));
    return section;
  }));
}

function element(card) {
  const article = document.createElement("article");
  article.append(Object.assign(document.createElement("p"), { textContent: card.text }));
  const last = card.column === COLUMNS.length - 1;
  const button = Object.assign(document.createElement("button"), {
    textContent: last ? "Remove" : "Move on",
    ariaLabel: `${last ? "Remove" : "Move on"}: ${card.text}`,
  });
  const id = { board, id: card.id };
  button.onclick = () => last
    ? write("delete", { table: "cards", key: id })
    : write("update", { table: "cards", key: id, add: { column: 1 } });
  article.append(button);
  return article;
}

$("title").textContent = `Board: ${board}`;
$("add").onsubmit = (event) => {
  event.preventDefault();
  const item = { board, id: `${Date.now()}-${crypto.randomUUID().slice(0, 8)}`, text: $("text").value, column: 0 };
  write("put", { table: "cards", item });
  $("text").value = "";
};

if (!key) {
  complain(new Error("Open this page with #key=AUTH_KEY. A key comes from: tidewire keys create --user NAME"));
} else {
  const { user } = await act("whoami", {}).catch((error) => (complain(error), {}));
  if (user) {
    // The browser reconnects by itself and sends the last event id, so no change is missed.
    const events = new EventSource(`/v1/feed?auth_key=${encodeURIComponent(key)}`);
    events.onmessage = refresh;
    write("put", { table: "participants", item: { board, user } });
  }
}
