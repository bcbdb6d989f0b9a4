/// <reference types="bun-types" />
/**
 * Makes the README's pictures from the running server: `bun run picture` (needs Chromium).
 * Light and dark, with a reply and a message that was taken back; on a phone, the search.
 */
import { startChat } from "../server.ts";

const ARGV = ["--no-sandbox", "--disable-quic", "--disable-component-update", "--disable-sync"];
const SIZES = { wide: [1100, 720], narrow: [390, 720] } as const;

const chat = await startChat({ port: 0, db: ":memory:", logLevel: "silent" });
const socketUrl = chat.url.replace("http", "ws");

/** Somebody with an id of their own, who says something, takes the last of it back if asked, and stays. */
async function say(name: string, texts: string[], takesBack = false): Promise<void> {
  const headers = { Cookie: `chat-me=${encodeURIComponent(name)}` };
  const url = `${socketUrl}ws/team?name=${encodeURIComponent(name)}`;
  const socket = new WebSocket(url, { protocols: ["chat.v1"], headers });
  const done = Promise.withResolvers<void>();
  const send = (frame: object) => socket.send(JSON.stringify({ ...frame, key: crypto.randomUUID() }));
  let seen = 0;
  socket.onmessage = ({ data }) => {
    const frame = JSON.parse(data);
    if (frame.type === "hello") for (const text of texts) send({ type: "post", text });
    if (frame.type !== "messages") return;
    seen += frame.messages.length;
    if (takesBack && seen === texts.length) send({ type: "remove", seq: frame.messages.at(-1).seq });
    if (seen === texts.length + Number(takesBack)) done.resolve();
  };
  await done.promise;
}

await say("Ann", ["Good morning! The release is out: https://example.org/releases/42"]);
await say("小明", ["太好了，我下午把文档更新一下。"]);
await say("Bo", ["One thing for later:\n```\nbun run server.ts export > chat.jsonl\n```", "Wrong room, sorry"], true);
await say("Dana", ["Is the demo still at three?"]);

for (const scheme of ["light", "dark"] as const) {
  for (const [size, [width, height]] of Object.entries(SIZES)) {
    await using view = new Bun.WebView({ width, height, backend: { type: "chrome", argv: ARGV } });
    await view.navigate("about:blank");
    await view.cdp("Emulation.setEmulatedMedia", { features: [{ name: "prefers-color-scheme", value: scheme }] });
    await view.cdp("Emulation.setDeviceMetricsOverride", { width, height, deviceScaleFactor: 1, mobile: false });
    await view.navigate(`${chat.url}team`);
    await view.evaluate(`new Promise((shown) => {
      const look = () => (document.querySelector(".message") ? setTimeout(shown, 1500) : setTimeout(look, 50));
      look();
    })`);
    if (scheme === "light" && size === "wide") {
      await view.click("#text");
      await view.type("#6 Yes, in the big room");
      await view.press("Enter");
      await view.evaluate(`new Promise((sent) => {
        const look = () => (document.querySelector("[data-state=sent]") ? setTimeout(sent, 500) : setTimeout(look, 50));
        look();
      })`);
    }
    if (size === "narrow") {
      await view.click("#show-search");
      await view.type("the");
      await Bun.sleep(1000);
    }
    await Bun.write(
      `${import.meta.dir}/${scheme}-${size}.webp`,
      await view.screenshot({ format: "webp", quality: 80 }),
    );
  }
}
await chat.stop();
process.exit();
