// An rxjs webSocket(url) subject with nothing of ours: writes a message, and prints the change that comes of it.
import { filter, firstValueFrom, timeout } from "rxjs";
import { webSocket } from "rxjs/webSocket";
import WebSocket from "ws";

const [url, user, room] = process.argv.slice(2);
const subject = webSocket({ url, WebSocketCtor: WebSocket });
const change = firstValueFrom(
  subject.pipe(filter((frame) => frame.type === "change" && frame.table === "messages"), timeout(20000)),
);
const reply = firstValueFrom(subject.pipe(filter((frame) => frame.type === "reply" && frame.id === 1), timeout(20000)));
subject.next({
  id: 1,
  action: "put",
  table: "messages",
  item: { room, id: "from-rxjs", author: user, text: "hello from rxjs" },
});
console.log(JSON.stringify({ reply: await reply, change: await change }));
subject.complete();
