/// <reference types="bun-types" />
/**
 * The promises of the chat, a test each, against real servers, real files and real sockets.
 * The order: what is served · the two dialects · promises 1 to 4 · the store · operation · the page.
 */
import { Database } from "bun:sqlite";
import { afterAll, afterEach, describe, expect, setDefaultTimeout, test } from "bun:test";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";

import { type Chat, type Config, type Message, readConfig, type ServerFrame, startChat } from "./server.ts";

// ─── Tools: servers, clients, waiting ────────────────────────────────────────────────────────────────────────────────

/** Folder for the databases of this run. */
const FOLDER = mkdtempSync(join(tmpdir(), "chat-test-"));
/** Milliseconds after which what should have come is missing. No test is about time: this only ends a failed one. */
const DEADLINE_MS = 20_000;

setDefaultTimeout(60_000);

let files = 0;
/** What a test started, ended after it in reverse. */
const started: (() => unknown)[] = [];

afterEach(async () => {
  for (const end of started.splice(0).reverse()) await end();
});
afterAll(() => rmSync(FOLDER, { recursive: true, force: true }));

/** A path for a new database. */
function newFile(): string {
  return join(FOLDER, `${++files}.sqlite`);
}

/** Starts a chat in this process. */
async function start(config: Partial<Config> = {}): Promise<Chat> {
  const chat = await startChat({ port: 0, db: ":memory:", logLevel: "silent", ...config });
  started.push(() => chat.stop());
  return chat;
}

/** A chat in a process of its own, as `bun run server.ts` starts it. */
interface ServerProcess extends Bun.Subprocess<"ignore", "pipe", "pipe"> {
  url: string;
  /** What it has printed. */
  output: string;
}

/** Starts a chat in a process of its own and waits until it prints its address. */
async function spawnServer(env: Record<string, string>): Promise<ServerProcess> {
  const server = spawn(env) as ServerProcess;
  server.output = "";
  const opened = Promise.withResolvers<string>();
  (async () => {
    for await (const chunk of server.stdout.pipeThrough(new TextDecoderStream())) {
      server.output += chunk;
      const url = /open: (http\S+)\n/.exec(server.output)?.[1];
      if (url) opened.resolve(url);
    }
    opened.reject(new Error(`The server ended: ${await new Response(server.stderr).text()}`));
  })();
  opened.promise.catch(() => {});
  server.url = await within(opened.promise, "the server's address");
  return server;
}

function spawn(env: Record<string, string>, args: string[] = []): Bun.Subprocess<"ignore", "pipe", "pipe"> {
  const server = Bun.spawn([process.execPath, "run", join(import.meta.dir, "server.ts"), ...args], {
    env: { PATH: process.env.PATH, HOME: FOLDER, PORT: "0", CHAT_DB: ":memory:", ...env },
    cwd: FOLDER,
    stdin: "ignore",
    stdout: "pipe",
    stderr: "pipe",
  });
  started.push(() => server.kill("SIGKILL"));
  return server;
}

/** Runs the server until it ends by itself: its exit code and what it said on standard error. */
async function failedStart(env: Record<string, string>): Promise<{ code: number; said: string }> {
  const server = spawn(env);
  const code = await within(server.exited, "the server's end");
  return { code, said: await new Response(server.stderr).text() };
}

/** A port that is free now. */
async function freePort(): Promise<number> {
  const probe = Bun.serve({ port: 0, fetch: () => new Response() });
  const { port } = probe;
  await probe.stop(true);
  return port as number;
}

/** Something that keeps messages; each `make` is a new, empty one. */
interface Store {
  readonly name: string;
  /** The configuration for a chat in this process, and the same for one in a process of its own. */
  make(): Promise<{ config: Partial<Config>; env: Record<string, string> }>;
}

const REDIS_SERVER = installed("redis-server", "redis-server");

const STORES: Store[] = [
  {
    name: "SQLite",
    make: async () => {
      const db = newFile();
      return { config: { db }, env: { CHAT_DB: db } };
    },
  },
  {
    name: "Redis",
    make: async () => {
      const { url } = await sharedRedis();
      const prefix = `test${++files}:`;
      return { config: { redisUrl: url, prefix }, env: { REDIS_URL: url, CHAT_PREFIX: prefix } };
    },
  },
];

/** The path of a program, or undefined. Where it must be there, its absence is a failure, not a skip. */
function installed(program: string, debianPackage: string): string | undefined {
  const path = Bun.which(program) ?? undefined;
  if (!path && process.env.CI) throw new Error(`CI needs ${program}: apt-get install ${debianPackage}`);
  if (!path) console.warn(`skip: the tests that need ${program}; to run them: apt-get install ${debianPackage}`);
  return path;
}

/** A Redis of the tests' own, with an append-only file. */
class Redis {
  #process: Bun.Subprocess | undefined;

  private constructor(
    readonly port: number,
    readonly folder: string,
  ) {}

  static async start(...args: string[]): Promise<Redis> {
    const redis = new Redis(await freePort(), mkdtempSync(join(FOLDER, "redis-")));
    await redis.run(...args);
    return redis;
  }

  get url(): string {
    return `redis://127.0.0.1:${this.port}`;
  }

  /** Starts the process, again if it was killed, and waits until it answers. */
  async run(...args: string[]): Promise<void> {
    const options = ["--port", `${this.port}`, "--dir", this.folder, "--appendonly", "yes", "--appendfsync", "always"];
    this.#process = Bun.spawn([REDIS_SERVER as string, ...options, "--save", "", ...args], { stdout: "ignore" });
    const answers = async () => {
      while ((await this.command("PING").catch(() => "")) !== "PONG") await Bun.sleep(10); // until it listens
    };
    await within(answers(), "an answer of Redis");
  }

  async command(command: string, ...args: string[]): Promise<unknown> {
    const client = new Bun.RedisClient(this.url, { autoReconnect: false });
    try {
      return await client.send(command, args);
    } finally {
      client.close();
    }
  }

  signal(signal: "SIGKILL" | "SIGSTOP" | "SIGCONT"): void {
    this.#process?.kill(signal);
  }

  async kill(): Promise<void> {
    this.signal("SIGKILL");
    await this.#process?.exited;
  }
}

let shared: Promise<Redis> | undefined;
/** One Redis for the tests that do nothing to it. */
function sharedRedis(): Promise<Redis> {
  return (shared ??= Redis.start());
}
afterAll(async () => (await shared)?.kill());

/** Fails when a promise takes longer than the deadline. */
async function within<T>(promise: Promise<T>, what: string): Promise<T> {
  let timer: Timer | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what} did not come in ${DEADLINE_MS} ms`)), DEADLINE_MS);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

type Frame<T extends ServerFrame["type"]> = Extract<ServerFrame, { type: T }>;

interface JoinOptions {
  room?: string;
  name?: string;
  plain?: boolean;
  epoch?: string;
  after?: number;
  headers?: Record<string, string>;
}

/** A client of either dialect that records what it receives. */
class Client {
  readonly texts: string[] = [];
  readonly frames: ServerFrame[] = [];
  readonly closed: Promise<CloseEvent>;
  #wake = Promise.withResolvers<void>();

  private constructor(readonly ws: WebSocket) {
    const closed = Promise.withResolvers<CloseEvent>();
    this.closed = closed.promise;
    ws.onmessage = ({ data }) => {
      this.texts.push(data);
      if (ws.protocol === "chat.v1") this.frames.push(JSON.parse(data));
      this.#wakeUp();
    };
    ws.onclose = (event) => {
      closed.resolve(event);
      this.#wakeUp();
    };
  }

  #wakeUp(): void {
    this.#wake.resolve();
    this.#wake = Promise.withResolvers();
  }

  /** Connects and, in chat.v1, waits for the hello. */
  static async join(url: string, options: JoinOptions = {}): Promise<Client> {
    const client = await Client.connect(url, options);
    if (!options.plain) await client.first("hello");
    return client;
  }

  static async connect(url: string, { room = "", plain, headers, ...query }: JoinOptions): Promise<Client> {
    const address = new URL(`ws/${encodeURIComponent(room)}`, url.replace("http", "ws"));
    for (const [key, value] of Object.entries(query)) address.searchParams.set(key, String(value));
    const ws = new WebSocket(address, plain ? { headers } : { protocols: ["chat.v1"], headers });
    const client = new Client(ws);
    started.push(() => ws.terminate());
    const opened = Promise.withResolvers<void>();
    ws.onopen = () => opened.resolve();
    ws.onerror = () => opened.reject(new Error("The socket did not open."));
    await within(opened.promise, "the socket");
    return client;
  }

  /** Waits until something is true of this client; fails when its connection closes before. */
  async until(what: string, done: () => boolean): Promise<void> {
    const loop = async () => {
      while (!done()) {
        if (this.ws.readyState === WebSocket.CLOSED) throw new Error(`The connection closed before ${what}.`);
        await this.#wake.promise;
      }
    };
    await within(loop(), what);
  }

  /** The first frame of a type, waiting for it if need be. */
  async first<T extends ServerFrame["type"]>(type: T): Promise<Frame<T>> {
    return this.nth(type, 1);
  }

  async nth<T extends ServerFrame["type"]>(type: T, n: number): Promise<Frame<T>> {
    await this.until(`${type} ${n}`, () => this.all(type).length >= n);
    return this.all(type)[n - 1] as Frame<T>;
  }

  all<T extends ServerFrame["type"]>(type: T): Frame<T>[] {
    return this.frames.filter((frame): frame is Frame<T> => frame.type === type);
  }

  /** All messages received, those of the hello first. */
  get messages(): Message[] {
    return this.frames.flatMap((frame) => (frame.type === "hello" || frame.type === "messages" ? frame.messages : []));
  }

  async untilMessages(count: number): Promise<Message[]> {
    await this.until(`${count} messages`, () => this.messages.length >= count);
    return this.messages;
  }

  async untilTexts(count: number): Promise<string[]> {
    await this.until(`${count} texts`, () => this.texts.length >= count);
    return this.texts;
  }

  send(frame: string | object): void {
    this.ws.send(typeof frame === "string" ? frame : JSON.stringify(frame));
  }

  /** Posts a text; the key is the text itself unless given. */
  post(text: string, key = text.replaceAll(/[^\w-]/g, "_").slice(0, 64)): void {
    this.send({ type: "post", key, text });
  }

  /** A round trip: all that this client sent before was received by the server, all it answered has arrived here. */
  async settle(): Promise<void> {
    const before = this.all("pong").length;
    this.send({ type: "ping" });
    await this.nth("pong", before + 1);
  }

  async leave(): Promise<void> {
    this.ws.close();
    await within(this.closed, "the close");
  }
}

/** The whole log of a room, read by pages. */
async function readLog(url: string, room = ""): Promise<Message[]> {
  const client = await Client.join(url, { room });
  const { first, messages } = await client.first("hello");
  const log = [...messages];
  for (let pages = 1; log.length > 0 && (log[0] as Message).seq > first; pages++) {
    client.send({ type: "page", before: (log[0] as Message).seq });
    log.unshift(...(await client.nth("page", pages)).messages);
  }
  await client.leave();
  return log;
}

/** Seqs that go up by one, from the first on. */
function expectDense(messages: Message[]): void {
  const from = messages[0]?.seq ?? 0;
  expect(messages.map(({ seq }) => seq)).toEqual(messages.map((_, i) => from + i));
}

function textsOf(messages: Message[]): string[] {
  return messages.map(({ text }) => text);
}

/** Answers of the handshake that are no upgrade. */
async function refusal(url: string, headers: Record<string, string>): Promise<Response> {
  const upgrade = { Connection: "Upgrade", Upgrade: "websocket", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==" };
  return fetch(url, { headers: { ...upgrade, "Sec-WebSocket-Version": "13", ...headers } });
}

/** Numbers that look random and are the same in every run. */
function randomFrom(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

// ─── What is served ──────────────────────────────────────────────────────────────────────────────────────────────────

describe("over HTTP", () => {
  test("every path outside /ws/ answers with the page", async () => {
    const { url } = await start();
    const source = await Bun.file(join(import.meta.dir, "index.html")).text();
    for (const path of ["", "team", "a/b?c", "favicon.ico", "%E5%9B%A2", "%ff", "ws", "wsx/y"]) {
      const response = await fetch(url + path);
      expect([path, response.status, response.headers.get("content-type")]).toEqual([
        path,
        200,
        "text/html; charset=utf-8",
      ]);
      expect(await response.text()).toBe(source);
    }
  });

  test("HEAD answers with the headers of GET alone", async () => {
    const { url } = await start();
    const [head, get] = [await fetch(url, { method: "HEAD" }), await fetch(url)];
    expect(head.status).toBe(200);
    expect(await head.text()).toBe("");
    for (const name of ["content-type", "etag", "content-security-policy"]) {
      expect(head.headers.get(name)).toBe(get.headers.get(name) as string);
    }
  });

  test("a page that the browser has is not sent again", async () => {
    const { url } = await start();
    const etag = (await fetch(url)).headers.get("etag") as string;
    for (const tag of [etag, etag.slice(2), `"other", ${etag}`]) {
      const again = await fetch(url, { headers: { "If-None-Match": tag } });
      expect([tag, again.status, await again.text()]).toEqual([tag, 304, ""]);
    }
    expect((await fetch(url, { headers: { "If-None-Match": '"other"' } })).status).toBe(200);
  });

  test("the page is compressed for those who accept it, and only for them", async () => {
    const { url } = await start();
    const encoded = async (accept: string) => {
      const response = await fetch(url, { headers: { "Accept-Encoding": accept }, decompress: false });
      return [response.headers.get("content-encoding"), (await response.bytes()).length];
    };
    const full = (await encoded("identity"))[1] as number;
    expect(await encoded("gzip;q=0")).toEqual([null, full]);
    const [encoding, size] = await encoded("br, gzip");
    expect(encoding).toBe("gzip");
    expect(size).toBeLessThan(full / 2);
    expect(size).toBeLessThanOrEqual(24 * 1024);
  });

  test("the page asks nothing of another host", async () => {
    const { url } = await start();
    const response = await fetch(url);
    const html = await response.text();
    expect(html).not.toMatch(/<(script|img|link|iframe)[^>]+(src|href)="(?!data:)/);
    expect(response.headers.get("content-security-policy")).toStartWith("default-src 'none'; ");
    expect(response.headers.get("content-security-policy")).not.toMatch(/https?:|\*|unsafe/);
  });

  test("a method that the page has no answer to is refused", async () => {
    const { url } = await start();
    const response = await fetch(url, { method: "PUT", body: "x" });
    expect([response.status, response.headers.get("allow")]).toEqual([405, "GET, HEAD"]);
  });

  test("a request to /ws/ that is no upgrade gets 426", async () => {
    const { url } = await start();
    const response = await fetch(`${url}ws/`);
    expect([response.status, response.headers.get("upgrade")]).toEqual([426, "websocket"]);
  });

  test("a handshake that is not right is refused with a status and a sentence", async () => {
    const { url } = await start();
    const tooLong = encodeURIComponent("团".repeat(65));
    const refused: [string, Record<string, string>, number][] = [
      ["ws/", { "Sec-WebSocket-Version": "8" }, 426],
      ["ws/", { "Sec-WebSocket-Protocol": "chat.v2" }, 400],
      ["ws/%ff", {}, 400],
      ["ws/a%00b", {}, 400],
      ["ws/a%0Ab", {}, 400],
      [`ws/${tooLong}`, {}, 400],
      ["ws/", { Origin: "https://elsewhere.example" }, 403],
      ["ws/", { Origin: "null" }, 403],
    ];
    for (const [path, headers, status] of refused) {
      const response = await refusal(url + path, headers);
      expect([path, headers, response.status]).toEqual([path, headers, status]);
      expect(await response.text()).toMatch(/^[A-Z].+[.]\n$/);
    }
  });
});

// ─── The plain dialect ───────────────────────────────────────────────────────────────────────────────────────────────

describe("a plain socket", () => {
  test("receives exactly what is sent, byte for byte, its own texts too", async () => {
    const { url } = await start();
    const [ann, bo] = [await Client.join(url, { plain: true }), await Client.join(url, { plain: true })];
    const long = '团🙂"\\\n'.repeat(1700).slice(0, 16 * 1024);
    const texts = [
      "hi",
      "",
      "line\nbreak\r\n\ttab",
      `"quotes" 'and' \\`,
      "<b>bold</b>&amp;",
      "👩‍👩‍👧 🇨🇳 é e\u0301",
      "请输入",
      "\ufeffBOM",
      "a\0b",
    ];
    const kib = "x".repeat(16 * 1024);
    for (const text of [...texts, kib, "end"]) ann.send(text);
    expect(await bo.untilTexts(texts.length + 2)).toEqual([...texts, kib, "end"]);
    expect(await ann.untilTexts(texts.length + 2)).toEqual([...texts, kib, "end"]);
    expect(Buffer.byteLength(long)).toBeGreaterThan(16 * 1024); // counted in bytes, not in characters:
    ann.send(long);
    expect((await within(ann.closed, "the close")).code).toBe(1009);
  });

  test("receives nothing else, whatever the others do", async () => {
    const { url } = await start();
    const plain = await Client.join(url, { plain: true });
    const ann = await Client.join(url, { name: "Ann" });
    ann.send({ type: "typing" });
    ann.send({ type: "name", name: "Anna" });
    ann.send({ type: "page", before: 1 });
    ann.send({ type: "nonsense" });
    await ann.first("presence");
    await (await Client.join(url, { name: "Bo" })).leave();
    ann.post("the one text");
    expect(await plain.untilTexts(1)).toEqual(["the one text"]);
    await ann.leave();
    const bo = await Client.join(url, { plain: true });
    bo.send("bye");
    expect(await plain.untilTexts(2)).toEqual(["the one text", "bye"]);
    expect(bo.texts.filter((text) => text !== "bye")).toEqual([]);
  });

  test("reaches the chat by localhost, 127.0.0.1 and [::1]", async () => {
    const { url } = await start();
    const clients = await Promise.all(
      ["localhost", "127.0.0.1", "[::1]"].map((host) => Client.join(url.replace("localhost", host), { plain: true })),
    );
    for (const [i, client] of clients.entries()) client.send(`from ${i}`);
    for (const client of clients)
      expect((await client.untilTexts(3)).toSorted()).toEqual(["from 0", "from 1", "from 2"]);
  });

  test("is closed with 1003 for a binary frame and with 1009 for a long one", async () => {
    const { url } = await start();
    const [binary, long, longer] = await Promise.all([1, 2, 3].map(() => Client.join(url, { plain: true })));
    binary?.ws.send(new Uint8Array([1, 2, 3]));
    long?.ws.send("x".repeat(16 * 1024 + 1));
    longer?.ws.send("x".repeat(64 * 1024 + 1));
    const codes = [binary, long, longer].map(async (client) => (await within(client!.closed, "the close")).code);
    expect(await Promise.all(codes)).toEqual([1003, 1009, 1009]);
  });

  test("takes part in its room alone", async () => {
    const { url } = await start();
    const [team, lobby] = [
      await Client.join(url, { plain: true, room: "team" }),
      await Client.join(url, { plain: true }),
    ];
    team.send("for the team");
    lobby.send("for the lobby");
    expect(await team.untilTexts(1)).toEqual(["for the team"]);
    expect(await lobby.untilTexts(1)).toEqual(["for the lobby"]);
  });

  test("meets chat.v1 in the same room", async () => {
    const { url } = await start();
    const ann = await Client.join(url, { name: "Ann" });
    const bot = await Client.join(url, { plain: true, name: "bot" });
    const plain = await Client.join(url, { plain: true });
    bot.send("built");
    plain.send("hello");
    ann.post("thanks");
    await ann.untilMessages(3);
    expect(ann.messages.map(({ name, text }) => `${name}: ${text}`).toSorted()).toEqual([
      "Ann: thanks",
      "Guest: hello",
      "bot: built",
    ]);
    expect(ann.messages.map(({ text }) => text)).toEqual(await plain.untilTexts(3));
    expect(ann.messages.filter(({ key }) => key !== undefined)).toHaveLength(1);
  });
});

// ─── The dialect chat.v1 ─────────────────────────────────────────────────────────────────────────────────────────────

describe("a chat.v1 client", () => {
  test("gets the hello first, also in an empty room", async () => {
    const { url } = await start();
    const ann = await Client.join(url, { name: "Ann" });
    await ann.first("presence");
    const { epoch, ...rest } = ann.frames[0] as Frame<"hello">;
    expect(epoch).toMatch(/^[0-9a-f]{16}$/);
    expect(rest).toEqual({
      type: "hello",
      first: 1,
      last: 0,
      resumed: false,
      messages: [],
      limits: { text: 16384, name: 32 },
    });
  });

  test("sees its post with seq, time, name and key, and nothing more", async () => {
    const { url } = await start();
    const ann = await Client.join(url, { name: "  Ann  " });
    const before = Date.now();
    ann.post("hi", "k-1");
    const [{ at, ...rest }] = (await ann.untilMessages(1)) as [Message];
    expect(rest).toEqual({ seq: 1, name: "Ann", text: "hi", key: "k-1" });
    expect(at).toBeGreaterThanOrEqual(before);
    expect(at).toBeLessThanOrEqual(Date.now());
  });

  test("gets the newest hundred messages, and older ones by pages", async () => {
    const { url } = await start({ rate: 0 });
    const ann = await Client.join(url);
    for (let i = 1; i <= 250; i++) ann.post(`m${i}`);
    await ann.untilMessages(250);
    const bo = await Client.join(url);
    const { first, last, messages } = await bo.first("hello");
    expect([first, last, messages.length, messages[0]?.seq]).toEqual([1, 250, 100, 151]);
    bo.send({ type: "page", before: 151 });
    bo.send({ type: "page", before: 51 });
    bo.send({ type: "page", before: 1 });
    bo.send({ type: "page", before: 9_999_999 });
    await bo.nth("page", 4);
    const pages = bo.all("page").map(({ messages }) => [messages[0]?.seq, messages.at(-1)?.seq, messages.length]);
    expect(pages).toEqual([
      [51, 150, 100],
      [1, 50, 50],
      [undefined, undefined, 0],
      [151, 250, 100],
    ]);
    expect(textsOf(await readLog(url))).toEqual(Array.from({ length: 250 }, (_, i) => `m${i + 1}`));
  });

  test("is told of its room by path: NFC, Chinese, slashes and 64 characters", async () => {
    const { url } = await start();
    const pairs = [
      ["caf\u00e9", "cafe\u0301"],
      ["团队", "团队"],
      ["a/b", "a/b"],
      ["🙂".repeat(64), "🙂".repeat(64)],
      ["", ""],
    ] as const;
    for (const [one, other] of pairs) {
      const [ann, bo] = [await Client.join(url, { room: one }), await Client.join(url, { room: other })];
      ann.post(`to ${one}`);
      expect(textsOf(await bo.untilMessages(1))).toEqual([`to ${one}`]);
    }
  });

  test("sees who is here, in one frame a second at most, and only when it changed", async () => {
    const { url } = await start();
    const ann = await Client.join(url, { name: "Ann" });
    await ann.first("presence");
    const others = await Promise.all(["Bo", "Cy", "Bo"].map((name) => Client.join(url, { name })));
    await Client.join(url, { plain: true });
    const { count, names } = await ann.nth("presence", 2);
    expect([count, names.toSorted()]).toEqual([5, ["Ann", "Bo", "Cy"]]);
    others[0]?.send({ type: "name", name: "Bea" });
    await others[0]?.settle();
    for (const other of others) await other.leave();
    expect(await ann.nth("presence", 3)).toEqual({ type: "presence", count: 2, names: ["Ann"] });
    await (await Client.join(url, { name: "Di" })).first("presence");
    expect(ann.all("presence")).toHaveLength(4);
  });

  test("passes typing on to the others, never to itself, and once in two seconds", async () => {
    const { url } = await start();
    const [ann, bo] = [await Client.join(url, { name: "Ann" }), await Client.join(url, { name: "Bo" })];
    for (let i = 0; i < 5; i++) ann.send({ type: "typing" });
    ann.post("done");
    await bo.untilMessages(1);
    await ann.settle();
    expect(bo.all("typing")).toEqual([{ type: "typing", name: "Ann" }]);
    expect(ann.all("typing")).toEqual([]);
  });

  test("can change its name at any time; the others see it from the next post on", async () => {
    const { url } = await start();
    const ann = await Client.join(url);
    ann.post("one");
    ann.send({ type: "name", name: "安" });
    ann.post("two");
    expect((await ann.untilMessages(2)).map(({ name }) => name)).toEqual(["Guest", "安"]);
  });

  test("keeps its name when it asks for one that is not allowed, and is told", async () => {
    const { url } = await start();
    const ann = await Client.join(url, { name: "x".repeat(33) });
    for (const name of ["", "   ", "a\nb", "a\u0000", "\u2028", "团".repeat(33)]) ann.send({ type: "name", name });
    ann.send({ type: "name", name: "🙂".repeat(32) });
    ann.post("hi");
    expect((await ann.untilMessages(1))[0]?.name).toBe("🙂".repeat(32));
    expect(ann.all("error").map(({ code }) => code)).toEqual(Array(7).fill("bad-name"));
  });

  test("is told in words what was wrong with a post, with its key, and stays", async () => {
    const { url } = await start();
    const ann = await Client.join(url);
    ann.post("", "empty");
    ann.post("团".repeat(5462), "long"); // 16,386 bytes of UTF-8
    ann.post("hi", "no spaces");
    ann.post("hi", "x".repeat(65));
    ann.post("团".repeat(5461), "fits");
    expect((await ann.untilMessages(1))[0]?.key).toBe("fits");
    const errors = ann.all("error").map(({ code, key }) => [code, key]);
    expect(errors).toEqual([
      ["empty", "empty"],
      ["too-long", "long"],
      ["bad-key", undefined],
      ["bad-key", undefined],
    ]);
    for (const { text } of ann.all("error")) expect(text).toMatch(/^[A-Z].+[.]$/);
  });

  test("gets an answer to ping", async () => {
    const { url } = await start();
    await (await Client.join(url)).settle();
  });

  test("sees the same text in the room as in the log, lone surrogates and NUL included", async () => {
    const { url } = await start();
    const ann = await Client.join(url);
    for (const [i, text] of ["a\ud800b", "\udfff", "a\0b", "\ufeffx", "__proto__"].entries()) ann.post(text, `k${i}`);
    const seen = await ann.untilMessages(5);
    expect(textsOf(seen)).toEqual(["a\ufffdb", "\ufffd", "a\0b", "\ufeffx", "__proto__"]);
    expect(await readLog(url)).toEqual(seen);
  });

  test("gets the posts of one tick in one frame", async () => {
    const { url } = await start();
    const [ann, bo] = [await Client.join(url), await Client.join(url)];
    for (let i = 0; i < 20; i++) ann.post(`m${i}`);
    await bo.untilMessages(20);
    expect(bo.all("messages").length).toBeLessThan(20);
    expectDense(bo.messages);
  });
});

/** Frames that are not of the protocol; each makes one strike. */
const MALFORMED = [
  "",
  "no json",
  "null",
  "42",
  '"post"',
  "[]",
  "{}",
  '{"type":null}',
  '{"type":"nope"}',
  '{"type":"constructor"}',
  '{"type":"__proto__"}',
  '{"type":"hello"}',
  '{"type":"post"}',
  '{"type":"post","key":"k"}',
  '{"type":"post","text":"x"}',
  '{"type":"post","key":1,"text":"x"}',
  '{"type":"post","key":"k","text":{"a":1}}',
  '{"type":"post","key":"k","text":"x","extra":1}',
  '{"type":"post","key":"k","text":"x","__proto__":{}}',
  '{"type":"page"}',
  '{"type":"page","before":"1"}',
  '{"type":"page","before":0}',
  '{"type":"page","before":-1}',
  '{"type":"page","before":1.5}',
  '{"type":"page","before":1e400}',
  '{"type":"name"}',
  '{"type":"name","name":null}',
  '{"type":"typing","name":"x"}',
  '{"type":"ping","x":1}',
  `${"[".repeat(10_000)}${"]".repeat(10_000)}`,
  `{"type":"post","key":"k","text":${"[".repeat(10_000)}${"]".repeat(10_000)}}`,
];

describe("a malformed frame", () => {
  test("of every kind is answered in words, and the others do not notice", async () => {
    const { url } = await start();
    const bo = await Client.join(url, { name: "Bo" });
    for (const frame of MALFORMED) {
      const ann = await Client.join(url, { name: "Ann" });
      ann.send(frame);
      expect([frame.slice(0, 60), (await ann.first("error")).code]).toEqual([frame.slice(0, 60), "bad-frame"]);
      await ann.settle(); // the connection stays open
      await ann.leave();
    }
    await bo.settle();
    expect(bo.frames.filter(({ type }) => !["hello", "presence", "pong"].includes(type))).toEqual([]);
    bo.post("still here");
    await bo.untilMessages(1);
  });

  test("ten times ends the connection with 1008, and nobody else's", async () => {
    const { url } = await start();
    const [ann, bo] = [await Client.join(url), await Client.join(url)];
    for (let i = 0; i < 9; i++) ann.send("no json");
    await ann.settle();
    ann.send("no json");
    expect((await within(ann.closed, "the close")).code).toBe(1008);
    await bo.settle();
  });

  test("that is binary ends the connection with 1003", async () => {
    const { url } = await start();
    const ann = await Client.join(url);
    ann.ws.send(new Uint8Array([123, 125]));
    expect((await within(ann.closed, "the close")).code).toBe(1003);
  });
});

/** The same promises over both brokers. */
const describeStore = (title: string, tests: (make: Store["make"]) => void) => {
  for (const { name, make } of STORES) {
    describe.skipIf(name === "Redis" && !REDIS_SERVER)(`${title} (${name})`, () => tests(make));
  }
};

// ─── Promises 1 to 4: order, stored before seen, once, resume ────────────────────────────────────────────────────────

describeStore("one order", (make) => {
  test("forty clients of both dialects, all sending, see the same messages in the same order", async () => {
    const { url } = await start((await make()).config);
    const clients = await Promise.all(
      Array.from({ length: 40 }, (_, i) => Client.join(url, { name: `c${i}`, plain: i % 2 === 1 })),
    );
    for (let round = 0; round < 25; round++) {
      for (const [i, client] of clients.entries()) {
        if (client.ws.protocol === "") client.send(`${i}:${round}`);
        else client.post(`${i}:${round}`);
      }
    }
    const seen = await Promise.all(
      clients.map(async (c) => (c.ws.protocol === "" ? c.untilTexts(1000) : textsOf(await c.untilMessages(1000)))),
    );
    const log = await readLog(url);
    expectDense(log);
    for (const texts of seen) expect(texts).toEqual(textsOf(log));
    for (let i = 0; i < 40; i++) {
      const own = textsOf(log).filter((text) => text.startsWith(`${i}:`));
      expect(own).toEqual(Array.from({ length: 25 }, (_, round) => `${i}:${round}`));
    }
  });
});

describe("Bun", () => {
  test("publish and send of one tick arrive in the order of the calls, small frames and large", async () => {
    // What the order of hello, messages and acks rests on: Bun's, so it is pinned here.
    const server = Bun.serve({
      port: 0,
      fetch: (request, server) => (server.upgrade(request) ? undefined : new Response()),
      websocket: {
        open: (ws) => void ws.subscribe("t"),
        message: (ws) => {
          for (const size of [1, 20_000, 3, 70_000, 5]) {
            server.publish("t", "p".repeat(size));
            ws.send("s".repeat(size));
          }
        },
      },
    });
    started.push(() => server.stop(true));
    const ws = new WebSocket(server.url);
    const got: string[] = [];
    const all = Promise.withResolvers<void>();
    ws.onopen = () => ws.send("go");
    ws.onmessage = ({ data }) => got.push(data[0] + data.length) === 10 && all.resolve();
    await within(all.promise, "ten frames");
    expect(got).toEqual(["p1", "s1", "p20000", "s20000", "p3", "s3", "p70000", "s70000", "p5", "s5"]);
  });
});

/** A client that keeps posting and, when cut, comes back with `epoch` and `after` and sends again what was not confirmed. */
class Talker {
  /** The log as this client knows it. */
  readonly log: Message[] = [];
  /** What it posted and saw neither in the log nor acked, by key. */
  readonly outbox = new Map<string, string>();
  /** Keys that were acked or seen. */
  readonly confirmed = new Set<string>();
  epoch: string | undefined;
  holes = 0;
  /** How often it resumed, and how often it was told to start afresh. */
  resumes = 0;
  fresh = 0;
  #client: Client | undefined;
  #stopped = false;

  constructor(
    readonly name: string,
    readonly url: () => string,
  ) {
    started.push(() => this.stop());
    void this.#run();
  }

  async #run(): Promise<void> {
    for (let keyNumber = 0; !this.#stopped;) {
      try {
        const after = this.log.at(-1)?.seq ?? 0;
        const resume = this.epoch === undefined ? {} : { epoch: this.epoch, after };
        const client = await Client.join(this.url(), { name: this.name, ...resume });
        this.#client = client;
        client.ws.addEventListener("message", () => this.#take(client));
        this.#take(client);
        for (const [key, text] of this.outbox) client.post(text, key);
        while (client.ws.readyState === WebSocket.OPEN && !this.#stopped) {
          const key = `${this.name}-${keyNumber++}`;
          this.outbox.set(key, `text of ${key}`);
          client.post(`text of ${key}`, key);
          await client.settle();
        }
      } catch {
        await Bun.sleep(5); // the server is away: not a wait for something, only not to spin
      }
    }
  }

  /** Takes the frames that came since the last time. */
  #take(client: Client): void {
    for (const frame of client.frames.splice(0)) {
      if (frame.type === "hello") {
        if (frame.resumed) this.resumes++;
        else this.fresh++;
        if (!frame.resumed) this.log.length = 0;
        this.epoch = frame.epoch;
      }
      if (frame.type === "pong") client.frames.push(frame); // `settle` counts them
      if (frame.type === "ack") this.#confirm(frame.key);
      if (frame.type === "hello" || frame.type === "messages") for (const each of frame.messages) this.#add(each);
    }
  }

  #add(each: Message): void {
    const last = this.log.at(-1);
    if (last && each.seq !== last.seq + 1) this.holes++;
    this.log.push(each);
    if (each.key) this.#confirm(each.key);
  }

  #confirm(key: string): void {
    if (key.startsWith(`${this.name}-`)) this.confirmed.add(key);
    this.outbox.delete(key);
  }

  /** Cuts the connection without a Close frame. */
  cut(): void {
    this.#client?.ws.terminate();
  }

  /** Waits until this client has seen `n` messages more. */
  async sees(n: number): Promise<void> {
    const wanted = this.confirmed.size + n;
    const loop = async () => {
      while (this.confirmed.size < wanted) await Bun.sleep(2); // polls what the other task of this client counts
    };
    await within(loop(), `${n} more messages of ${this.name}`);
  }

  stop(): void {
    this.#stopped = true;
    this.cut();
  }
}

/** Compares what clients saw and were promised with the log: everything in it, once, in its order. */
function expectKept(talkers: Talker[], log: Message[]): void {
  expectDense(log);
  const keys = log.map(({ key }) => key as string);
  expect(new Set(keys).size).toBe(keys.length);
  const kept = new Set(keys);
  for (const talker of talkers) {
    expect(talker.holes).toBe(0);
    expect(talker.log.length).toBeGreaterThan(0);
    const from = (talker.log[0] as Message).seq - (log[0] as Message).seq;
    expect(talker.log).toEqual(log.slice(from, from + talker.log.length));
    expect([...talker.confirmed].filter((key) => !kept.has(key))).toEqual([]);
  }
}

describeStore("seen means stored", (make) => {
  test("a server killed with kill -9 under load again and again loses nothing that anyone saw", async () => {
    const env = { ...(await make()).env, CHAT_RATE: "0", PORT: String(await freePort()) };
    let server = await spawnServer(env);
    const { url } = server;
    const talkers = Array.from({ length: 8 }, (_, i) => new Talker(`t${i}`, () => url));
    for (let kill = 0; kill < 6; kill++) {
      await Promise.all(talkers.map((talker) => talker.sees(20)));
      server.kill("SIGKILL");
      await server.exited;
      server = await spawnServer(env);
    }
    await Promise.all(talkers.map((talker) => talker.sees(20)));
    for (const talker of talkers) talker.stop();
    expectKept(talkers, await readLog(url));
    for (const { resumes, fresh } of talkers) expect([resumes >= 6, fresh]).toEqual([true, 1]);
  });
});

describe("the SQLite store", () => {
  test("a message is in the file before anyone receives it", async () => {
    const file = newFile();
    const { url } = await start({ db: file });
    const [ann, bo] = [await Client.join(url), await Client.join(url, { plain: true })];
    using reader = new Database(file, { readonly: true });
    const stored = reader.query<{ n: number }, [string]>("SELECT count(*) AS n FROM messages WHERE text = ?");
    const found: number[] = [];
    bo.ws.addEventListener("message", ({ data }) => found.push(stored.get(data)?.n ?? 0));
    for (let i = 0; i < 50; i++) {
      ann.post(`m${i}`);
      await bo.untilTexts(i + 1);
    }
    expect(found).toEqual(Array(50).fill(1));
  });
});

describeStore("once", (make) => {
  test("a post sent again with its key is acked with its seq, not stored again", async () => {
    const { url } = await start((await make()).config);
    const [ann, bo] = [await Client.join(url), await Client.join(url)];
    ann.post("hi", "k");
    await ann.untilMessages(1);
    ann.post("hi", "k");
    bo.post("another text, the same key", "k");
    expect(await ann.first("ack")).toEqual({ type: "ack", key: "k", seq: 1 });
    expect(await bo.first("ack")).toEqual({ type: "ack", key: "k", seq: 1 });
    expect(await readLog(url)).toHaveLength(1);
  });

  test("a post sent again in the same tick is stored once", async () => {
    const { url } = await start((await make()).config);
    const ann = await Client.join(url);
    for (let i = 0; i < 5; i++) ann.post("hi", "k");
    await ann.nth("ack", 4);
    expect(textsOf(await readLog(url))).toEqual(["hi"]);
  });

  test("a post sent again after a restart is stored once", async () => {
    const { config } = await make();
    const before = await start(config);
    const ann = await Client.join(before.url);
    ann.post("hi", "k");
    await ann.untilMessages(1);
    await before.stop();
    const after = await start(config);
    const again = await Client.join(after.url);
    again.post("hi", "k");
    expect(await again.first("ack")).toEqual({ type: "ack", key: "k", seq: 1 });
    expect(await readLog(after.url)).toHaveLength(1);
  });

  test("the same key in another room is another post", async () => {
    const { url } = await start((await make()).config);
    for (const room of ["a", "b"]) {
      const ann = await Client.join(url, { room });
      ann.post("hi", "k");
      await ann.untilMessages(1);
    }
  });
});

describeStore("resume", (make) => {
  /** A room with `count` messages m1, m2 … and its epoch. */
  async function filled(url: string, count: number): Promise<string> {
    const ann = await Client.join(url);
    for (let i = 1; i <= count; i++) ann.post(`m${i}`);
    await ann.untilMessages(count);
    const { epoch } = await ann.first("hello");
    await ann.leave();
    return (await (await Client.join(url)).first("hello")).epoch ?? epoch;
  }

  test("gives exactly what was missed", async () => {
    const { url } = await start({ ...(await make()).config, rate: 0 });
    const epoch = await filled(url, 500);
    for (const [after, count] of [
      [500, 0],
      [499, 1],
      [123, 377],
      [0, 500],
    ] as const) {
      const { resumed, messages, last } = await (await Client.join(url, { epoch, after })).first("hello");
      expect([resumed, messages.length, last]).toEqual([true, count, 500]);
      expect(textsOf(messages)).toEqual(Array.from({ length: count }, (_, i) => `m${after + i + 1}`));
    }
  });

  test("starts afresh when the epoch is another, the place is out of the log, or too much was missed", async () => {
    const { url } = await start({ ...(await make()).config, rate: 0, history: 1500 });
    const epoch = await filled(url, 2000);
    const places: [string, number][] = [
      ["0000000000000000", 2000],
      [epoch, 2001],
      [epoch, 999],
      [epoch, 499],
      [epoch, 0],
    ];
    for (const [epoch, after] of places) {
      const hello = await (await Client.join(url, { epoch, after })).first("hello");
      expect([after, hello.resumed, hello.messages[0]?.seq, hello.messages.at(-1)?.seq]).toEqual([
        after,
        false,
        1901,
        2000,
      ]);
      expect(hello.first).toBe(501);
    }
    const { resumed, messages } = await (await Client.join(url, { epoch, after: 1000 })).first("hello");
    expect([resumed, messages.length]).toEqual([true, 1000]);
  });

  test("works before any message was ever received", async () => {
    const { url } = await start((await make()).config);
    const [ann, bo] = [await Client.join(url), await Client.join(url)];
    const { epoch } = await ann.first("hello");
    ann.ws.terminate();
    bo.post("one");
    await bo.untilMessages(1);
    const { resumed, messages } = await (await Client.join(url, { epoch, after: 0 })).first("hello");
    expect([resumed, textsOf(messages)]).toEqual([true, ["one"]]);
  });

  test("keeps the epoch over a restart, and makes another for another log", async () => {
    const [one, other] = [await make(), await make()];
    const epochs: string[] = [];
    for (const { config } of [one, one, other]) {
      const chat = await start(config);
      const ann = await Client.join(chat.url);
      ann.post("hi");
      await ann.until("the message", () => ann.all("messages").length + ann.all("ack").length > 0);
      epochs.push((await ann.first("hello")).epoch);
      await chat.stop();
    }
    expect(epochs[1]).toBe(epochs[0] as string);
    expect(epochs[2]).not.toBe(epochs[0] as string);
  });

  test("a client cut at random, again and again, ends with exactly the log", async () => {
    const { url } = await start({ ...(await make()).config, rate: 0 });
    const random = randomFrom(7);
    const talkers = Array.from({ length: 4 }, (_, i) => new Talker(`r${i}`, () => url));
    for (let cut = 0; cut < 40; cut++) {
      const talker = talkers[Math.floor(random() * talkers.length)] as Talker;
      await talker.sees(Math.floor(random() * 8));
      talker.cut();
    }
    await Promise.all(talkers.map((talker) => talker.sees(5)));
    for (const talker of talkers) talker.stop();
    expectKept(talkers, await readLog(url));
    for (const talker of talkers) expect(talker.fresh).toBe(1);
  });

  test("a client that joins while others talk misses nothing between hello and the first message", async () => {
    const { url } = await start({ ...(await make()).config, rate: 0 });
    const talkers = Array.from({ length: 3 }, (_, i) => new Talker(`j${i}`, () => url));
    await talkers[0]?.sees(1);
    for (let i = 0; i < 50; i++) {
      const client = await Client.join(url);
      await client.until("messages after the hello", () => client.all("messages").length >= 2);
      expectDense(client.messages);
      client.ws.terminate();
    }
    for (const talker of talkers) talker.stop();
  });

  test("a hundred long messages do not make a hello that fills a phone: older ones come by pages", async () => {
    const { url } = await start({ ...(await make()).config, rate: 0 });
    const ann = await Client.join(url);
    for (let i = 0; i < 100; i++) ann.post("x".repeat(16 * 1024), `k${i}`);
    await ann.untilMessages(100);
    const { epoch } = await ann.first("hello");
    const bo = await Client.join(url, { epoch, after: 0 });
    const hello = await bo.first("hello");
    expect([hello.resumed, hello.messages.length, hello.messages.at(-1)?.seq]).toEqual([false, 16, 100]);
    expect(await readLog(url)).toHaveLength(100);
  });
});

// ─── The store ───────────────────────────────────────────────────────────────────────────────────────────────────────

describe("the SQLite store", () => {
  test("keeps what was said over a restart, in both settings of CHAT_SYNC", async () => {
    for (const sync of ["full", "normal"] as const) {
      const db = newFile();
      const chat = await start({ db, sync });
      const ann = await Client.join(chat.url, { name: "Ann", room: "团" });
      ann.post("still here?");
      const said = await ann.untilMessages(1);
      await chat.stop();
      expect(await readLog((await start({ db, sync })).url, "团")).toEqual(said);
    }
  });

  test("keeps the newest CHAT_HISTORY messages of each room, and forgets the keys of the others", async () => {
    const db = newFile();
    const { url, stop } = await start({ db, history: 50, rate: 0 });
    const ann = await Client.join(url);
    const bo = await Client.join(url, { room: "small" });
    bo.post("kept");
    await bo.untilMessages(1);
    for (let i = 1; i <= 3000; i++) ann.post(`m${i}`);
    await ann.untilMessages(3000);
    expect(textsOf(await readLog(url))).toEqual(Array.from({ length: 50 }, (_, i) => `m${2951 + i}`));
    ann.post("m1"); // so old that nobody can know
    await ann.untilMessages(3001);
    ann.post("m2999");
    expect((await ann.first("ack")).seq).toBe(2999);
    using reader = new Database(db, { readonly: true });
    const rows = () => reader.query<{ n: number }, []>("SELECT count(*) AS n FROM messages").get()?.n ?? 0;
    while (rows() > 50 + 1000 + 1) await ann.settle(); // trimming follows behind, a step at a time
    expect(await readLog(url, "small")).toHaveLength(1);
    await stop();
  });

  test("a visit leaves no trace", async () => {
    const db = newFile();
    const { url } = await start({ db });
    await (await Client.join(url, { room: "visited" })).leave();
    using reader = new Database(db, { readonly: true });
    expect(reader.query("SELECT * FROM rooms").all()).toEqual([]);
  });

  test("that cannot be opened, or is no database, or is in use, is refused in one line", async () => {
    const text = newFile();
    await Bun.write(text, "This is no database. ".repeat(100));
    const used = newFile();
    await start({ db: used });
    const folder = join(FOLDER, "no", "such", "folder.sqlite");
    for (const [db, why] of [
      [text, /not a database/],
      [folder, /unable to open/],
      [used, /second server/],
      [FOLDER, /unable/],
    ] as const) {
      const { code, said } = await failedStart({ CHAT_DB: db });
      expect([db, code]).toEqual([db, 1]);
      expect(said).toMatch(/^CHAT_DB=.+: the database cannot be opened and written: .+\n$/);
      expect(said).toMatch(why);
    }
  });

  test("that is locked by another program acks nothing, closes with 1013, and works again by itself", async () => {
    const db = newFile();
    const { url } = await start({ db });
    const [ann, bo] = [await Client.join(url), await Client.join(url)];
    ann.post("before");
    await bo.untilMessages(1);
    {
      using other = new Database(db);
      other.run("BEGIN IMMEDIATE");
      ann.post("meanwhile");
      expect((await within(ann.closed, "the close")).code).toBe(1013);
      expect([ann.all("ack"), ann.messages.length]).toEqual([[], 1]);
      other.run("ROLLBACK");
    }
    const again = await Client.join(url);
    again.post("meanwhile");
    await again.untilMessages(2);
    expect(textsOf(await bo.untilMessages(2))).toEqual(["before", "meanwhile"]);
  });
});

// ─── Operation ───────────────────────────────────────────────────────────────────────────────────────────────────────

describe("an operator", () => {
  test("is told which value is bad and what is allowed, in one line, with exit code 1", async () => {
    const bad: Record<string, string>[] = [
      { PORT: "http" },
      { PORT: "65536" },
      { PORT: "-1" },
      { CHAT_SYNC: "off" },
      { CHAT_HISTORY: "0" },
      { CHAT_HISTORY: "1e3" },
      { CHAT_RATE: "1.5" },
      { LOG_LEVEL: "verbose" },
      { CHAT_ORIGINS: "https://a.example/path" },
    ];
    for (const env of bad) {
      const [[variable, value]] = Object.entries(env) as [[string, string]];
      expect(() => readConfig(env)).toThrow(`${variable}=${value}: must be `);
    }
    const { code, said } = await failedStart({ CHAT_RATE: "many" });
    expect([code, said]).toEqual([1, "CHAT_RATE=many: must be a whole number from 0 to 1000000.\n"]);
  });

  test("gets the defaults for what is not set or empty", () => {
    expect(readConfig({ PORT: "", CHAT_ORIGINS: " https://A.example:443 , b.example:8443,*" })).toEqual({
      port: 8080,
      host: "",
      db: "chat.sqlite",
      sync: "full",
      history: 10000,
      redisUrl: "",
      prefix: "chat:",
      idleDays: 30,
      rate: 20,
      password: "",
      proxies: 0,
      tlsCert: "",
      tlsKey: "",
      reusePort: false,
      origins: ["https://a.example", "b.example:8443", "*"],
      logLevel: "info",
    });
    expect(Object.isFrozen(readConfig({}))).toBe(true);
  });

  test("is told in one line when the port is taken", async () => {
    const { url } = await start();
    const { port } = new URL(url);
    const { code, said } = await failedStart({ PORT: port });
    expect([code, said]).toEqual([1, `PORT=${port}: another program listens there; set PORT to another.\n`]);
  });

  test("sees the address, who comes and goes, and at debug what is said", async () => {
    const server = await spawnServer({ LOG_LEVEL: "debug" });
    const ann = await Client.join(server.url, { name: "Ann" });
    ann.post("line one\nline two");
    await ann.untilMessages(1);
    await ann.leave();
    server.kill("SIGTERM");
    expect(await within(server.exited, "the end")).toBe(0);
    expect(server.output).toMatch(/^The chat is open: http:\/\/localhost:\d+\/\n/);
    expect(server.output).toContain(" joined the lobby (Ann)\n");
    expect(server.output).toContain('the lobby #1 Ann: "line one\\nline two"\n');
    expect(server.output).toContain(" left the lobby (1005)\n");
  });

  test("stops it with SIGTERM and SIGINT: what was said is stored, sockets get 1001, also with a client that never answers", async () => {
    for (const signal of ["SIGTERM", "SIGINT"] as const) {
      const file = newFile();
      const server = await spawnServer({ CHAT_DB: file });
      const [ann, bo] = [await Client.join(server.url), await Client.join(server.url, { plain: true })];
      const silent = await Bun.connect({
        hostname: "localhost",
        port: Number(new URL(server.url).port),
        socket: { data: () => {} },
      });
      silent.write(
        "GET /ws/ HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" +
          "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
      );
      ann.post("last words");
      await ann.untilMessages(1);
      server.kill(signal);
      for (const client of [ann, bo]) expect((await within(client.closed, "the close")).code).toBe(1001);
      expect(await within(server.exited, "the end")).toBe(0);
      silent.end();
      expect(textsOf(await readLog((await start({ db: file })).url))).toEqual(["last words"]);
    }
  });
});
