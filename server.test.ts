/// <reference types="bun-types" />
/**
 * The promises of the chat, each with a test, against real servers, real files and real sockets.
 * In order: what is served · the two dialects · who is who · promises 1 to 4 · the store · who gets in · slow readers,
 * flooders, hostile bytes · several servers · operation · commands · the page.
 */
import { Database } from "bun:sqlite";
import { afterAll, afterEach, describe, expect, setDefaultTimeout, setSystemTime, spyOn, test } from "bun:test";
import { mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync } from "node:fs";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { connect as connectTls } from "node:tls";

import { Browser, type BrowserWindow, type Element, type HTMLAnchorElement } from "happy-dom";
import type { HTMLElement, HTMLTextAreaElement } from "happy-dom";
import { exportMessages, importMessages, main, readConfig, startChat } from "./server.ts";
import type { Chat, Config, Message, ServerFrame } from "./server.ts";

// ─── Tools: servers, clients, waiting ────────────────────────────────────────────────────────────────────────────────

const SERVER = join(import.meta.dir, "server.ts");
const FOLDER = mkdtempSync(join(tmpdir(), "chat-test-"));
/** Milliseconds after which what should have come is missing. No test is about time: this only ends a failed one. */
const DEADLINE_MS = 20_000;
setDefaultTimeout(60_000);
let files = 0;
/** Ends what a test started, the last first. */
const started: (() => unknown)[] = [];

afterEach(async () => {
  for (const end of started.splice(0).reverse()) await end();
});
afterAll(() => rmSync(FOLDER, { recursive: true, force: true }));

const newFile = () => join(FOLDER, `${++files}.sqlite`);

async function start(config: Partial<Config> = {}): Promise<Chat> {
  const chat = await startChat({ port: 0, db: ":memory:", logLevel: "silent", ...config });
  started.push(() => chat.stop());
  return chat;
}

function spawn(env: Record<string, string>, args: string[] = []) {
  const server = Bun.spawn([process.execPath, "run", SERVER, ...args], {
    env: { PATH: process.env.PATH, HOME: FOLDER, PORT: "0", CHAT_DB: ":memory:", ...env },
    cwd: FOLDER,
    stdio: ["ignore", "pipe", "pipe"],
  });
  started.push(() => server.kill("SIGKILL"));
  return server;
}

type ServerProcess = Awaited<ReturnType<typeof spawnServer>>;

/** Starts a chat in a process of its own, waits until it prints its address, and collects what it prints. */
async function spawnServer(env: Record<string, string> = {}) {
  const server = Object.assign(spawn(env), { url: "", output: "", errors: "", env });
  const listen = async (stream: ReadableStream<Uint8Array<ArrayBuffer>>, to: "output" | "errors") => {
    for await (const text of stream.pipeThrough(new TextDecoderStream())) server[to] += text;
  };
  void listen(server.stdout, "output");
  void listen(server.stderr, "errors");
  await eventually("the server's address", () => {
    if (server.exitCode !== null) throw new Error(`The server ended: ${server.errors}`);
    return (server.url = /open: (http\S+)\n/.exec(server.output)?.[1] ?? "");
  });
  return server;
}

/** Ends a server and starts it again on the same port, with the same settings. */
async function restart(server: ServerProcess, signal: "SIGKILL" | "SIGTERM", meanwhile = (): unknown => undefined) {
  server.kill(signal);
  const code = await within(server.exited, "the server's end");
  if (signal === "SIGTERM") expect(code).toBe(0);
  await meanwhile();
  return spawnServer({ ...server.env, PORT: new URL(server.url).port });
}

/** Runs the server, or one of its commands, until it ends by itself. */
async function run(env: Record<string, string>, args: string[] = []) {
  const process = spawn(env, args);
  const output = [new Response(process.stdout).text(), new Response(process.stderr).text()] as const;
  const [out, said] = await within(Promise.all(output), `the end of ${args.join(" ")}`);
  return { code: await process.exited, out, said };
}

async function freePort(): Promise<number> {
  using probe = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
  return probe.port;
}

const memoryOf = ({ pid }: { pid: number }) =>
  Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]) / 1024;

/** A new store, as a chat in this process and one of its own are told of it. */
type MakeStore = () => Promise<{ config: Partial<Config>; env: Record<string, string> }>;

const REDIS_SERVER = installed("redis-server", "redis-server");

const STORES: Record<"SQLite" | "Redis", MakeStore> = {
  SQLite: async () => {
    const db = newFile();
    return { config: { db }, env: { CHAT_DB: db } };
  },
  Redis: async () => {
    const { url } = await sharedRedis();
    const prefix = `test${++files}:`; // that chats of different CHAT_PREFIX never meet, all tests rely on
    return { config: { redisUrls: [url], prefix }, env: { REDIS_URL: url, CHAT_PREFIX: prefix } };
  },
};

/** The same promises over both brokers. */
function describeStore(title: string, tests: (make: MakeStore) => void): void {
  for (const [name, make] of Object.entries(STORES)) {
    describe.skipIf(name === "Redis" && !REDIS_SERVER)(`${title} (${name})`, () => tests(make));
  }
}

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

  readonly folder = mkdtempSync(join(FOLDER, "redis-"));

  private constructor(
    readonly port: number,
    readonly url = `redis://127.0.0.1:${port}`,
  ) {}

  static async start(): Promise<Redis> {
    const redis = new Redis(await freePort());
    await redis.run();
    return redis;
  }

  /** Starts the process, again if it was killed, and waits until it answers. */
  async run(...args: string[]): Promise<void> {
    const options = ["--port", `${this.port}`, "--dir", this.folder, "--appendonly", "yes", "--appendfsync", "always"];
    this.#process = Bun.spawn([REDIS_SERVER as string, ...options, "--save", "", ...args], { stdout: "ignore" });
    await eventually("an answer of Redis", async () => (await this.command("PING").catch(() => "")) === "PONG");
  }

  async command(command: string, ...args: string[]): Promise<unknown> {
    const client = new Bun.RedisClient(this.url, { autoReconnect: false });
    return client.send(command, args).finally(() => client.close());
  }

  async keys(pattern = "*"): Promise<string[]> {
    return (await this.command("KEYS", pattern)) as string[];
  }

  signal(signal: "SIGKILL" | "SIGSTOP" | "SIGCONT"): void {
    this.#process?.kill(signal);
  }

  async kill(): Promise<void> {
    this.signal("SIGKILL");
    await this.#process?.exited;
  }

  async restart(...args: string[]): Promise<void> {
    await this.kill();
    await this.run(...args);
  }
}

let shared: Promise<Redis> | undefined;
/** One Redis for the tests that do nothing to it. */
const sharedRedis = () => (shared ??= Redis.start());
afterAll(async () => (await shared)?.kill());

/** A TCP proxy: the network between a server and its Redis, or between a page and its server. */
class Wire {
  readonly #ends = new Set<Socket>();
  #silent = false;
  #lost: string | undefined;
  readonly #listener = createServer((near) => {
    const far = connect(this.port, "127.0.0.1");
    for (const [end, other] of [[near, far] as const, [far, near] as const]) {
      this.#ends.add(end);
      if (this.#silent) end.pause();
      end.on("data", (data: Buffer) => void other.write(end === far ? this.#withoutLost(data) : data));
      end.on("error", () => {});
      end.on("close", () => {
        this.#ends.delete(end);
        other.destroy();
      });
    }
  });

  private constructor(readonly port: number) {}

  static async to({ port }: { port: number }): Promise<Wire> {
    const wire = new Wire(port);
    await new Promise<void>((listening) => wire.#listener.listen(0, "127.0.0.1", listening));
    started.push(() => {
      wire.cut();
      wire.#listener.close();
    });
    return wire;
  }

  get address(): string {
    return `127.0.0.1:${(this.#listener.address() as AddressInfo).port}`;
  }

  /** Forwards nothing any more, and tells nobody: what is sent waits. */
  silence(): void {
    this.#silent = true;
    this.silenceOpen();
  }

  /** The same for the connections that are open; new ones work. */
  silenceOpen(): void {
    for (const end of this.#ends) end.pause();
  }

  /** Forwards again, first what waited. */
  speak(): void {
    this.#silent = false;
    for (const end of this.#ends) end.resume();
  }

  /** Ends every connection at once, after which new ones work; says how many there were. */
  cut(): number {
    const ends = [...this.#ends];
    for (const end of ends) end.destroy();
    return ends.length / 2;
  }

  /** Loses the next notification of Redis that holds this text, and nothing else; resolves when it did. */
  async lose(text: string): Promise<void> {
    this.#lost = text;
    await eventually("a notification to lose", () => this.#lost === undefined);
  }

  #withoutLost(data: Buffer): Buffer {
    if (this.#lost === undefined) return data;
    const bytes = data.toString("latin1");
    for (const push of bytes.matchAll(/[>*]3\r\n\$7\r\nmessage\r\n\$\d+\r\n[^\r]*\r\n\$(\d+)\r\n/g)) {
      const end = push.index + push[0].length + Number(push[1]) + 2;
      if (end > bytes.length || !bytes.slice(push.index, end).includes(this.#lost)) continue;
      this.#lost = undefined;
      return Buffer.concat([data.subarray(0, push.index), data.subarray(end)]);
    }
    return data;
  }
}

async function within<T>(promise: Promise<T>, what: string): Promise<T> {
  let timer: Timer | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what} did not come in ${DEADLINE_MS} ms`)), DEADLINE_MS);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

/** Waits for something that no event tells. */
async function eventually(what: string, done: () => unknown): Promise<void> {
  const end = performance.now() + DEADLINE_MS;
  while (!(await done())) {
    if (performance.now() > end) throw new Error(`${what} did not come in ${DEADLINE_MS} ms`);
    await Bun.sleep(5);
  }
}

type Frame<T extends ServerFrame["type"]> = Extract<ServerFrame, { type: T }>;

interface ClientOptions {
  room?: string;
  name?: string;
  plain?: boolean;
  /** The value of the cookie that makes its ids. */
  me?: string;
  epoch?: string;
  after?: number;
  headers?: Record<string, string>;
}

/** The handshake of a client as bytes; a test may change it. */
function handshake(url: string, { room = "", plain, me, headers = {}, ...query }: ClientOptions = {}): string {
  const asked = new URLSearchParams(Object.entries(query).map(([name, value]): [string, string] => [name, `${value}`]));
  const lines = {
    Host: new URL(url).host,
    Connection: "Upgrade",
    Upgrade: "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
    ...(plain ? {} : { "Sec-WebSocket-Protocol": "chat.v1" }),
    ...(me ? { Cookie: `chat-me=${me}` } : {}),
    ...headers,
  };
  const head = Object.entries(lines).map(([name, value]) => `${name}: ${value}\r\n`);
  return `GET /ws/${encodeURIComponent(room)}?${asked} HTTP/1.1\r\n${head.join("")}\r\n`;
}

/** One WebSocket frame as a client writes it; every part of it can be made wrong. RFC 6455 section 5.2. */
function rawFrame(payload: string | Uint8Array, opcode = 1, { fin = true, mask = true, rsv = 0 } = {}): Buffer {
  const body = Buffer.from(payload as Uint8Array);
  const head = Buffer.alloc(body.length < 126 ? 2 : body.length < 65536 ? 4 : 10);
  head[0] = (fin ? 0x80 : 0) | (rsv << 4) | opcode;
  if (head.length === 2) head[1] = body.length;
  else if (head.length === 4) ((head[1] = 126), head.writeUInt16BE(body.length, 2));
  else ((head[1] = 127), head.writeBigUInt64BE(BigInt(body.length), 2));
  if (!mask) return Buffer.concat([head, body]);
  head[1]! |= 0x80;
  return Buffer.concat([head, Buffer.alloc(4), body]); // a mask of zeros leaves the payload as it is
}

/** A client of either dialect that records what it receives, on a bare connection: it can do wrong as well as right. */
class Client {
  /** What came: each text frame, the same as an object in chat.v1, and the messages in it. */
  readonly texts: string[] = [];
  readonly frames: ServerFrame[] = [];
  readonly messages: Message[] = [];
  /** The answer to the handshake: its status, and all of it when it is no upgrade. */
  status: number | undefined;
  answer = "";
  /** The code of the Close frame that came, 1005 without one in it, 1006 when the connection just ended. */
  closeCode: number | undefined;
  closeReason = "";
  ended = false;
  /** Answers no WebSocket ping, like a machine that went away. */
  dead = false;
  onframe = (_: ServerFrame) => {};
  #chat = false;
  #rest = Buffer.alloc(0);
  #wake = Promise.withResolvers<void>();

  private constructor(readonly socket: Socket) {
    socket.on("data", (data: Buffer) => this.#read(data));
    socket.on("error", () => {}); // a reset: `ended` says it
    socket.on("close", () => {
      this.ended = true;
      this.closeCode ??= 1006;
      this.#wakeUp();
    });
    started.push(() => socket.destroy());
  }

  static async open(url: string): Promise<Client> {
    const { protocol, hostname, port } = new URL(url);
    const to = { port: Number(port), host: hostname.replace(/^\[(.*)\]$/, "$1") };
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    const tls = protocol === "https:";
    const socket = tls ? connectTls({ ...to, rejectUnauthorized: false }, resolve) : connect(to, resolve);
    socket.once("error", reject);
    await within(promise, "a connection");
    return new Client(socket);
  }

  /** Shakes hands; `status` says how the server answered. */
  static async connect(url: string, options: ClientOptions = {}): Promise<Client> {
    const client = await Client.open(url);
    client.raw(handshake(url, options));
    await client.until("an answer", () => client.status !== undefined);
    return client;
  }

  /** Connects, is let in, and in chat.v1 waits for the hello. */
  static async join(url: string, options: ClientOptions = {}): Promise<Client> {
    const client = await Client.connect(url, options);
    if (client.status !== 101) throw new Error(`The server refused: ${client.answer}`);
    if (!options.plain) await client.first("hello");
    return client;
  }

  #wakeUp(): void {
    this.#wake.resolve();
    this.#wake = Promise.withResolvers();
  }

  #read(data: Buffer): void {
    this.#rest = Buffer.concat([this.#rest, data]);
    if (this.status !== 101) this.#readAnswer();
    if (this.status === 101) while (this.#readFrame());
    this.#wakeUp();
  }

  #readAnswer(): void {
    this.answer = this.#rest.toString("latin1");
    const end = this.answer.indexOf("\r\n\r\n") + 4;
    if (end < 4) return;
    this.status = Number(/^HTTP\/1\.1 (\d+)/.exec(this.answer)?.[1]);
    this.#chat = /^sec-websocket-protocol: chat.v1/im.test(this.answer);
    if (this.status === 101) this.#rest = this.#rest.subarray(end);
  }

  /** Reads one frame of the server, if all of it is there. */
  #readFrame(): boolean {
    const bytes = this.#rest;
    if (bytes.length < 2) return false;
    let [size, head] = [bytes[1] as number, 2];
    if (size === 126) [size, head] = [bytes.length < 4 ? Infinity : bytes.readUInt16BE(2), 4];
    else if (size === 127) [size, head] = [bytes.length < 10 ? Infinity : Number(bytes.readBigUInt64BE(2)), 10];
    if (bytes.length < head + size) return false;
    this.#rest = bytes.subarray(head + size);
    this.#take((bytes[0] as number) & 15, bytes.subarray(head, head + size));
    return true;
  }

  #take(opcode: number, payload: Buffer): void {
    if (opcode === 8) this.closeCode = payload.length < 2 ? 1005 : payload.readUInt16BE(0);
    if (opcode === 8) this.closeReason = payload.toString("utf8", 2);
    if (opcode === 9 && !this.dead) this.raw(rawFrame(payload, 10));
    if (opcode !== 1) return;
    const text = payload.toString();
    this.texts.push(text);
    if (!this.#chat) return;
    const frame: ServerFrame = JSON.parse(text);
    this.frames.push(frame);
    if (frame.type === "hello" || frame.type === "messages") this.messages.push(...frame.messages);
    this.onframe(frame);
  }

  /** Waits until something is true of this client; fails when its connection ends before. */
  async until(what: string, done: () => boolean): Promise<void> {
    const loop = async () => {
      while (!done()) {
        if (this.ended) throw new Error(`The connection ended (${this.closeCode}) before ${what}.`);
        await this.#wake.promise;
      }
    };
    await within(loop(), what);
  }

  async end(): Promise<number> {
    await this.until("the end", () => this.ended);
    return this.closeCode as number;
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
  async untilMessages(count: number): Promise<Message[]> {
    await this.until(`${count} messages`, () => this.messages.length >= count);
    return this.messages;
  }

  async untilTexts(count: number): Promise<string[]> {
    await this.until(`${count} texts`, () => this.texts.length >= count);
    return this.texts;
  }

  /** Waits until it was told that these people are here, and that they are so many connections. */
  async sees(count: number, ...names: string[]): Promise<void> {
    await this.until(`${count} people: ${names}`, () => {
      const newest = this.all("presence").at(-1);
      const there = newest?.people.map(({ name }) => name).toSorted();
      return newest?.count === count && there?.join() === names.join();
    });
  }

  raw(bytes: string | Uint8Array): void {
    this.socket.write(bytes);
  }

  send(frame: string | object): void {
    this.raw(rawFrame(typeof frame === "string" ? frame : JSON.stringify(frame)));
  }

  /** Posts a text; the key is the text itself unless given. A plain socket has no key. */
  post(text: string, key = text.replaceAll(/[^\w-]/g, "_").slice(0, 64)): void {
    this.send(this.#chat ? { type: "post", key, text } : text);
  }

  /** Posts m1, m2 … without a pause. */
  postAll(count: number, text = (n: number) => `m${n}`): void {
    for (let n = 1; n <= count; n++) this.post(text(n), `k${n}`);
  }

  /** Posts a text, waits until it is in the room, and returns it as it is there (in chat.v1). */
  async say(text: string, key?: string): Promise<Message> {
    this.post(text, key);
    await this.until(`"${text}"`, () => this.seen.includes(text));
    return this.messages.findLast((message) => message.text === text) as Message;
  }

  /** The texts that came in the room, in either dialect. */
  get seen(): string[] {
    return this.#chat ? textsOf(this.messages) : this.texts;
  }

  /** A round trip: all that this client sent before was received by the server, all it answered has arrived here. */
  async settle(): Promise<void> {
    const before = this.all("pong").length;
    this.send({ type: "ping" });
    await this.nth("pong", before + 1);
  }

  async leave(): Promise<void> {
    this.raw(rawFrame("", 8));
    await this.end();
  }

  drop(): void {
    this.socket.destroy();
  }
}

function idOf(me: string, room = ""): string {
  return new Bun.CryptoHasher("sha256").update(`${me}\n${room}`).digest("base64url").slice(0, 12);
}

/** One client for each of these, or with these names; spread over servers if there are several. */
async function joinAll<All extends (string | ClientOptions)[]>(
  servers: string | { url: string }[],
  ...all: All
): Promise<{ [K in keyof All]: Client }> {
  const clients: Client[] = [];
  for (const [i, who] of all.entries()) {
    const url = typeof servers === "string" ? servers : servers[i % servers.length]!.url;
    clients.push(await Client.join(url, typeof who === "string" ? { name: who } : who));
  }
  return clients as { [K in keyof All]: Client };
}

async function joinWhenOpen(url: string, options?: ClientOptions): Promise<Client> {
  let client: Client | undefined;
  const tried = async () => (client = await Client.join(url, options).catch(() => undefined));
  await eventually("a server that takes people in", tried);
  return client as Client;
}

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

/** The texts m1, m2 … as {@link Client.postAll} posts them. */
function numbered(from: number, to: number): string[] {
  return Array.from({ length: to - from + 1 }, (_, i) => `m${from + i}`);
}

// ─── Tools: a browser ────────────────────────────────────────────────────────────────────────────────────────────────

// What runs in the page sees the page's globals; their types are happy-dom's, because the DOM's clash with Bun's.
declare const document: BrowserWindow["document"];
declare const location: BrowserWindow["location"];
declare const localStorage: BrowserWindow["localStorage"];
declare const innerWidth: number;
declare const innerHeight: number;
declare const getComputedStyle: BrowserWindow["getComputedStyle"];
declare const requestAnimationFrame: (callback: (value: unknown) => void) => number;
declare const KeyboardEvent: BrowserWindow["KeyboardEvent"];
declare const Event: BrowserWindow["Event"];
declare const CompositionEvent: new (type: string, init: object) => InstanceType<BrowserWindow["Event"]>;
declare const dispatchEvent: BrowserWindow["dispatchEvent"];

/** What a test may say of the browser that it opens. */
interface TabOptions {
  width?: number;
  height?: number;
  languages?: string;
  dark?: boolean;
  /** Whether the server goes away in this test, of which the browser complains in its console. */
  serverGoes?: boolean;
}

const BROWSER = installed("chromium", "chromium fonts-noto-cjk");
/** Tests of the page where a browser is installed. */
const describePage = describe.skipIf(!BROWSER);
const CHROMIUM = ["--no-sandbox", "--disable-quic", "--disable-component-update", "--disable-sync"];

/** A tab of a browser, of Chromium unless another's is given. All share one profile, as the tabs of one person do. */
class Tab {
  /** Errors that the browser reported: none is expected, ever. */
  readonly problems: string[] = [];
  /** Errors that belong to the test: the browser writes every refused request into its console. */
  expected: RegExp | undefined;

  constructor(readonly view: Bun.WebView) {
    started.push(() => this.close());
  }

  static async open(url: string, options: TabOptions = {}): Promise<Tab> {
    const { width = 800, height = 600 } = options;
    const tab = new Tab(new Bun.WebView({ width, height, backend: { type: "chrome", argv: CHROMIUM } }));
    await tab.view.navigate("about:blank");
    tab.#watch(options);
    for (const domain of ["Runtime", "Log", "Page"]) await tab.view.cdp(`${domain}.enable`);
    await tab.size(width, height);
    const features = [{ name: "prefers-color-scheme", value: options.dark ? "dark" : "light" }];
    await tab.view.cdp("Emulation.setEmulatedMedia", { features });
    const userAgent = { userAgent: "Chromium", acceptLanguage: options.languages ?? "en-US,en" };
    await tab.view.cdp("Emulation.setUserAgentOverride", userAgent);
    await tab.go(url);
    return tab;
  }

  #watch({ serverGoes }: TabOptions): void {
    if (serverGoes) this.expected = /WebSocket connection to|ERR_CONNECTION_REFUSED/;
    const on = (event: string, problem: (data: any) => string | false) =>
      this.view.addEventListener(event, (e) => {
        const found = problem((e as MessageEvent).data);
        if (found && !this.expected?.test(found)) this.problems.push(found);
      });
    on("Runtime.exceptionThrown", ({ exceptionDetails }) => JSON.stringify(exceptionDetails));
    on("Runtime.consoleAPICalled", ({ type, args }) => type === "error" && JSON.stringify(args));
    on("Log.entryAdded", ({ entry }) => /error|warning/.test(entry.level) && `${entry.text} ${entry.url}`);
  }

  async go(url: string): Promise<void> {
    await within(this.view.navigate(url), url);
  }

  /** Goes to a page of the chat and waits for its greeting. */
  static async join(url: string, options: TabOptions = {}): Promise<Tab> {
    const tab = await Tab.open(url, options);
    await tab.is("online");
    return tab;
  }

  async is(state: string): Promise<void> {
    await this.until(state, (s) => document.querySelector<HTMLElement>("#status")!.dataset.state === s, state);
  }

  async size(width: number, height: number): Promise<void> {
    await this.view.cdp("Emulation.setDeviceMetricsOverride", { width, height, deviceScaleFactor: 1, mobile: false });
  }

  async run<T, A extends unknown[]>(inPage: (...args: A) => T, ...args: A): Promise<Awaited<T>> {
    return (await this.view.evaluate(`(${inPage})(...${JSON.stringify(args)})`)) as Awaited<T>;
  }

  /** Waits until a function in the page says yes. */
  async until<A extends unknown[]>(what: string, inPage: (...args: A) => unknown, ...args: A): Promise<void> {
    await eventually(what, () => this.run(inPage, ...args));
  }

  /** Types a text into the field and sends it with Enter. */
  async say(text: string): Promise<void> {
    await this.run(() => document.querySelector<HTMLElement>("#text")!.focus());
    await this.view.type(text);
    await this.view.press("Enter");
  }

  /** What the rows say, by their state if it is given. */
  texts(state = ""): Promise<string[]> {
    const selector = `.message${state && `[data-state=${state}]`} .text`;
    return this.run((s) => [...document.querySelectorAll(s)].map((text) => text.textContent!), selector);
  }

  async untilText(text: string, state = ""): Promise<void> {
    await eventually(`"${text.slice(0, 40)}" ${state}`, async () => (await this.texts(state)).includes(text));
  }

  async close(): Promise<void> {
    await this.view.close();
    expect(this.problems).toEqual([]);
  }
}

/** Posts many messages to a room, as somebody else. */
async function fill(url: string, room: string, count: number, text = (n: number) => `Message ${n}`): Promise<Client> {
  const client = await Client.join(url, { room, name: "Filler", me: "f".repeat(22) });
  for (let n = 1; n <= count; n++) client.post(text(n), `fill-${n}`);
  await client.untilMessages(count);
  return client;
}

/** In the page: where an element is. */
const boxOf = (selector: string) => document.querySelector(selector)!.getBoundingClientRect().toJSON() as any;

/** Lets the browser draw: what a scroll or a resize sets off has happened then. */
async function drawn(tab: Tab): Promise<void> {
  await tab.run(
    () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done)))),
  );
}

/**
 * Scrolls by steps until a message is drawn. Says by how many pixels at most the first row in sight moved while others
 * were drawn around it, and how many rows were in the page at most.
 */
function sweep(tab: Tab, step: number, end: number): Promise<{ moved: number; most: number }> {
  const inPage = async (step: number, end: number) => {
    const log = document.querySelector<HTMLElement>("#log")!;
    const frame = () => new Promise((done) => requestAnimationFrame(done));
    let [moved, most] = [0, 0];
    while (!log.querySelector(`[data-seq="${end}"]`)) {
      log.scrollBy(0, step);
      const edge = log.getBoundingClientRect().top + 1;
      const rows = [...log.querySelectorAll<HTMLElement>(".message")];
      const seen = rows.find((row) => row.getBoundingClientRect().bottom > edge)!;
      const before = seen.getBoundingClientRect().top;
      await frame();
      await frame();
      moved = Math.max(moved, seen.isConnected ? Math.abs(seen.getBoundingClientRect().top - before) : Infinity);
      most = Math.max(most, rows.length);
    }
    return { moved, most };
  };
  return tab.run(inPage, step, end);
}

/** What Firefox and WebKit can do of what Chromium's tabs can. */
type View = Pick<Bun.WebView, "navigate" | "reload" | "evaluate" | "type" | "press" | "close">;

interface OtherBrowser {
  open(): Promise<View>;
  /** Errors in its pages, where the browser tells. */
  readonly problems: string[];
}

/** Programs of other browsers that run now. */
const browserPrograms: Bun.Subprocess<"pipe", "ignore", "ignore">[] = [];

function launch(command: string[], display = ""): void {
  // A browser is many processes. Their group ends with its standard input, so with this process at the latest.
  const keeper = '"$@" </dev/null & read; kill $!; wait; kill -KILL 0';
  const program = Bun.spawn(["setsid", "bash", "-c", keeper, "bash", ...command], {
    env: { PATH: process.env.PATH, HOME: FOLDER, TMPDIR: FOLDER, DISPLAY: display },
    stdin: "pipe",
    stdout: "ignore",
    stderr: "ignore",
  });
  browserPrograms.push(program);
}

/** Types as both protocols have it. */
function keyboard(perform: (actions: object) => Promise<void>): Pick<View, "type" | "press"> {
  const special: Record<string, string> = { Enter: "\uE007" };
  const stroke = (value: string) => ["keyDown", "keyUp"].map((type) => ({ type, value }));
  const type = (keys: Iterable<string>) =>
    perform({ actions: [{ type: "key", id: "keyboard", actions: [...keys].flatMap(stroke) }] });
  return { type, press: (key) => type([special[key] ?? key]) };
}

/** Firefox speaks WebDriver BiDi: commands, answers and events are JSON texts on one WebSocket. */
async function startFirefox(): Promise<OtherBrowser> {
  const port = await freePort();
  const profile = mkdtempSync(join(FOLDER, "firefox-"));
  launch(["firefox-esr", "--headless", "--profile", profile, `--remote-debugging-port=${port}`]);
  await eventually("Firefox", () => fetch(`http://127.0.0.1:${port}/`).catch(() => false));
  const ws = new WebSocket(`ws://127.0.0.1:${port}/session`);
  const answers: ReturnType<typeof Promise.withResolvers<any>>[] = [];
  const problems: string[] = [];
  ws.onmessage = ({ data }) => {
    const { type, id, result, error, message, params } = JSON.parse(data);
    if (type === "success") answers[id]!.resolve(result);
    else if (type === "error") answers[id]!.reject(new Error(`${error}: ${message}`));
    else if (params.level === "error" && !/ wss?:/.test(params.text)) problems.push(params.text); // servers go in tests
  };
  await within(new Promise((opened) => (ws.onopen = opened)), "Firefox's answer");
  const call = (method: string, params: object) => {
    const answer = Promise.withResolvers<any>();
    ws.send(JSON.stringify({ id: answers.push(answer) - 1, method, params }));
    return answer.promise;
  };
  await call("session.new", { capabilities: {} });
  await call("session.subscribe", { events: ["log.entryAdded"] });
  return { open: () => openFirefox(call), problems };
}

async function openFirefox(call: (method: string, params: object) => Promise<any>): Promise<View> {
  const { context } = await call("browsingContext.create", { type: "window" });
  const evaluate = async (script: string) => {
    const expression = `(async () => JSON.stringify(await ${script}))()`; // Firefox would make a tree of types of it
    const options = { expression, target: { context }, awaitPromise: true };
    const { result, exceptionDetails } = await call("script.evaluate", options);
    if (exceptionDetails) throw new Error(exceptionDetails.text);
    return result.value && JSON.parse(result.value);
  };
  return {
    navigate: (url) => call("browsingContext.navigate", { context, url, wait: "complete" }),
    reload: () => call("browsingContext.reload", { context, wait: "complete" }),
    evaluate,
    ...keyboard((actions) => call("input.performActions", { context, ...actions })),
    close: () => call("browsingContext.close", { context }),
  };
}

/** WebKit speaks WebDriver: a command is a request over HTTP, to the window that was chosen last. It wants a screen. */
async function startWebKit(): Promise<OtherBrowser> {
  const port = await freePort();
  const display = `:${port}`; // a number that nobody has
  launch(["Xvfb", display, "-nolisten", "tcp"]);
  const socket = Bun.file(`/tmp/.X11-unix/X${port}`);
  await eventually("Xvfb", () => socket.stat().catch(() => false));
  launch(["WebKitWebDriver", `--port=${port}`], display);
  let base = `http://127.0.0.1:${port}`;
  const call = async (method: string, path: string, body?: object) => {
    const answer = await fetch(`${base}/${path}`, { method, body: JSON.stringify(body) });
    const { value } = (await answer.json()) as any;
    if (!answer.ok) throw new Error(`${value.error}: ${value.message}`);
    return value;
  };
  await eventually("WebKitWebDriver", () => call("GET", "status").catch(() => false));
  const alwaysMatch = { "webkitgtk:browserOptions": { args: ["--automation"] } };
  const { sessionId } = await call("POST", "session", { capabilities: { alwaysMatch } });
  base += `/session/${sessionId}`;
  const first = await call("GET", "window");
  const open = async (): Promise<View> => {
    await call("POST", "window", { handle: first });
    const { handle } = await call("POST", "window/new", { type: "window" });
    const here = async (method: string, path: string, body: object) => {
      await call("POST", "window", { handle });
      return call(method, path, body);
    };
    return {
      navigate: (url) => here("POST", "url", { url }),
      reload: () => here("POST", "refresh", {}),
      evaluate: (script) => here("POST", "execute/sync", { script: `return ${script}`, args: [] }),
      ...keyboard((actions) => here("POST", "actions", actions)),
      close: () => here("DELETE", "window", {}),
    };
  };
  return { open, problems: [] };
}

const OTHER_BROWSERS = [
  ["Firefox", startFirefox, installed("firefox-esr", "firefox-esr")],
  ["WebKit", startWebKit, installed("WebKitWebDriver", "webkit2gtk-driver") && installed("Xvfb", "xvfb")],
] as const;

for (const [name, startBrowser, there] of OTHER_BROWSERS)
  describe.skipIf(!there)(`the page in ${name}`, () => {
    let browser: OtherBrowser | undefined;

    afterAll(async () => {
      for (const program of browserPrograms.splice(0).reverse()) {
        program.stdin.end();
        await within(program.exited, "the end of a browser");
      }
      expect(browser?.problems ?? []).toEqual([]);
    });

    const open = async (url: string): Promise<Tab> => {
      browser ??= await startBrowser();
      const tab = new Tab((await browser.open()) as Bun.WebView);
      await tab.go(url);
      await tab.is("online");
      return tab;
    };

    test("what one tab sends arrives in the other, and is gone from both when it is taken back", async () => {
      const { url } = await start();
      const [one, two] = [await open(url), await open(url)];
      await one.say("a slip 你好");
      await one.untilText("a slip 你好", "sent");
      await two.untilText("a slip 你好");
      await click(one, ".own .remove");
      for (const tab of [one, two]) await tab.untilText("Message removed");
      expect(await valueOf(one)).toBe("a slip 你好");
      await one.view.type("word ".repeat(60));
      const hidden = () => {
        const { scrollHeight, clientHeight } = document.querySelector<HTMLElement>("#text")!;
        return scrollHeight > 48 && scrollHeight - clientHeight;
      };
      expect(await one.run(hidden)).toBe(0);
    });

    test("what was written without a server survives a reload and is sent once when the server is back", async () => {
      const first = await spawnServer({ CHAT_DB: newFile() });
      const tab = await open(first.url);
      const second = await restart(first, "SIGKILL", async () => {
        await tab.say("written without a server");
        await tab.untilText("written without a server", "pending");
      });
      await tab.view.reload();
      await tab.untilText("written without a server", "sent");
      expect(textsOf(await readLog(second.url))).toEqual(["written without a server"]);
    });

    test("a search finds what was written long ago", async () => {
      const { url } = await start({ rate: 0 });
      await fill(url, "", 250, (n) => (n === 3 ? "Ein Café" : `Message ${n}`));
      await search(await open(url), "cafe", ["Café"]);
    });

    test("a reader who goes up through the history is not moved by what is drawn above", async () => {
      const { url } = await start({ rate: 0 });
      await fill(url, "", 500);
      const tab = await open(url);
      await tab.untilText("Message 500");
      const { moved } = await sweep(tab, -400, 1);
      expect(moved).toBeLessThan(1);
    });
  });

// ─── What is served ──────────────────────────────────────────────────────────────────────────────────────────────────

describe("over HTTP", () => {
  test("every path outside /ws/ answers with the page", async () => {
    const { url } = await start();
    const source = await Bun.file(join(import.meta.dir, "index.html")).text();
    for (const path of ["", "team", "a/b?c", "favicon.ico", "%E5%9B%A2", "%ff", "ws", "wsx/y"]) {
      const response = await fetch(url + path);
      expect([path, response.status, await response.text()]).toEqual([path, 200, source]);
      expect(response.headers.get("content-type")).toBe("text/html; charset=utf-8");
    }
  });

  test("HEAD answers with the headers of GET alone; the page is not sent twice, and compressed for those who accept it", async () => {
    const { url } = await start();
    const [head, get] = [await fetch(url, { method: "HEAD" }), await fetch(url)];
    expect([head.status, await head.text()]).toEqual([200, ""]);
    for (const name of ["content-type", "etag", "content-security-policy"]) {
      expect(head.headers.get(name)).toBe(get.headers.get(name) as string);
    }
    const etag = get.headers.get("etag") as string;
    const again = (tag: string) => fetch(url, { headers: { "If-None-Match": tag } });
    for (const tag of [etag, etag.slice(2), `"other", ${etag}`])
      expect([tag, (await again(tag)).status]).toEqual([tag, 304]);
    expect((await again('"other"')).status).toBe(200);
    for (const [accept, encoding] of Object.entries({ identity: null, "gzip;q=0": null, "br, gzip": "gzip" })) {
      const response = await fetch(url, { headers: { "Accept-Encoding": accept }, decompress: false });
      const isSmall = (await response.bytes()).length < 30_000;
      expect([response.headers.get("content-encoding"), isSmall]).toEqual([encoding, encoding === "gzip"]);
    }
  });

  test("the page's policy allows its one script and its one style by their hashes, and nothing of another host", async () => {
    const { url } = await start({ password: "sesame" });
    const response = await fetch(`${url}team`);
    const [headers, html] = [response.headers, await response.text()];
    const hash = (tag: string) => {
      const [[, content = ""] = [], ...more] = html.matchAll(new RegExp(`<${tag}[^>]*>([^]*?)</${tag}>`, "g"));
      expect(more).toEqual([]);
      return `'sha256-${new Bun.CryptoHasher("sha256").update(content).digest("base64")}'`;
    };
    const others = `base-uri 'none'; connect-src 'self'; default-src 'none'; form-action 'self'; frame-ancestors 'none'; img-src data:;
      require-trusted-types-for 'script'; trusted-types 'none'`;
    const expected = [...others.split(/;\s+/), `script-src ${hash("script")}`, `style-src ${hash("style")}`];
    expect(headers.get("content-security-policy")?.split("; ").toSorted()).toEqual(expected.toSorted());
    const more = ["x-content-type-options", "referrer-policy", "cache-control"].map((name) => headers.get(name));
    expect(more).toEqual(["nosniff", "no-referrer", "private, no-cache"]);
    expect(html).not.toMatch(/\son[a-z]+\s*=\s*["']|style="|javascript:/i);
    expect(html).not.toMatch(/<(script|img|link|iframe)[^>]+(src|href)="(?!data:)/i);
  });
});

// ─── The plain dialect ───────────────────────────────────────────────────────────────────────────────────────────────

const TEXTS = [
  ...`hi||line\nbreak\r\n\ttab|"quotes" 'and' \\|<b>bold</b>&amp;|👩‍👩‍👧 🇨🇳 é e\u0301|请输入|\ufeffBOM|a\0b`.split("|"),
  ...["x".repeat(16 * 1024), "end"],
];

describeStore("a plain socket", (make) => {
  test("receives exactly what is sent, byte for byte, its own texts too", async () => {
    const { url } = await start((await make()).config);
    const hosts = ["localhost", "127.0.0.1", "[::1]"].map((host) => url.replace("localhost", host));
    const clients = await Promise.all(hosts.map((host) => Client.join(host, { plain: true })));
    for (const client of clients) await client.say("in"); // it is told nothing else that says that it is in the room
    for (const text of TEXTS) clients[0]!.send(text);
    for (const client of clients) {
      await client.until("the end", () => client.texts.at(-1) === "end");
      expect(client.texts.filter((text) => text !== "in")).toEqual(TEXTS);
    }
    expect(textsOf(await readLog(url))).toEqual(["in", "in", "in", ...TEXTS]);
  });

  test("receives nothing else, whatever the others do", async () => {
    const { url } = await start((await make()).config);
    const [plain, ann] = await joinAll(url, { plain: true }, "Ann");
    for (const type of ["typing", "ping", "page", "nonsense"]) ann.send({ type });
    ann.send({ type: "name", name: "Anna" });
    await ann.first("presence");
    await (await Client.join(url, { name: "Bo" })).leave();
    await ann.say("the one text");
    expect(await plain.untilTexts(1)).toEqual(["the one text"]);
    await ann.leave();
    const bo = await Client.join(url, { plain: true });
    bo.send("bye");
    expect(await plain.untilTexts(2)).toEqual(["the one text", "bye"]);
    expect(await bo.untilTexts(1)).toEqual(["bye"]);
  });

  test("meets chat.v1 in the same room, under the name that it gave", async () => {
    const { url } = await start((await make()).config);
    const [ann, bot, plain] = await joinAll(url, "Ann", { plain: true, name: "bot" }, { plain: true });
    bot.send("built");
    plain.send("hello");
    ann.post("thanks", "k");
    const messages = await ann.untilMessages(3);
    const said = messages.map(({ name, text, key }) => `${name}: ${text} ${key}`).toSorted();
    expect(said).toEqual(["Ann: thanks k", "Guest: hello undefined", "bot: built undefined"]);
    expect(textsOf(messages)).toEqual(await plain.untilTexts(3));
  });
});

// ─── The dialect chat.v1 ─────────────────────────────────────────────────────────────────────────────────────────────

describe("a chat.v1 client", () => {
  test("gets the hello first, however early it speaks, in whatever pieces, and also in an empty room", async () => {
    const { url } = await start();
    const frames = ['{"type":"ping"}', "nonsense", '{"type":"post","key":"k","text":"early"}', '{"type":"ping"}'];
    const bytes = Buffer.concat([Buffer.from(handshake(url)), ...frames.map((frame) => rawFrame(frame))]);
    for (const size of [bytes.length, 1]) {
      const early = await Client.open(url);
      early.socket.setNoDelay(true);
      for (let at = 0; at < bytes.length; at += size) {
        await new Promise((sent) => early.socket.write(bytes.subarray(at, at + size), sent));
      }
      await early.nth("pong", 2);
      const types = early.frames.map(({ type }) => type).filter((type) => /hello|pong|error/.test(type));
      expect(types).toEqual(["hello", "pong", "error", "pong"]);
    }
    const { epoch, ...rest } = await (await Client.join(url, { room: "empty" })).first("hello");
    expect(epoch).toMatch(/^[0-9a-f]{16}$/);
    const limits = { text: 16384, name: 32 };
    expect(rest).toEqual({ type: "hello", first: 1, last: 0, resumed: false, messages: [], limits });
  });

  test("sees its post with seq, time, name and key, and nothing more, in the room as in the log", async () => {
    const { url } = await start();
    const ann = await Client.join(url, { name: "  Ann  " });
    const before = Date.now();
    const { at, ...rest } = await ann.say("hi", "k-1");
    expect(rest).toEqual({ seq: 1, name: "Ann", text: "hi", key: "k-1" });
    expect(at).toBeWithin(before, Date.now() + 1);
    for (const [i, text] of ["a\ud800b", "\udfff", "a\0b", "\ufeffx", "__proto__"].entries()) ann.post(text, `k${i}`);
    const seen = await ann.untilMessages(6);
    expect(textsOf(seen).slice(1)).toEqual(["a\ufffdb", "\ufffd", "a\0b", "\ufeffx", "__proto__"]);
    expect(await readLog(url)).toEqual(seen);
  });

  test("gets the newest hundred messages, and older ones by pages", async () => {
    const { url } = await start({ rate: 0 });
    const ann = await Client.join(url);
    ann.postAll(250);
    await ann.untilMessages(250);
    expect(ann.all("messages").length).toBeLessThan(100); // what is stored together comes in one frame
    const bo = await Client.join(url);
    const { first, last, messages } = await bo.first("hello");
    expect([first, last, messages.length, messages[0]?.seq]).toEqual([1, 250, 100, 151]);
    for (const before of [151, 51, 1, 9_999_999]) bo.send({ type: "page", before });
    await bo.nth("page", 4);
    const pages = bo.all("page").map(({ messages }) => textsOf(messages));
    expect(pages).toEqual([numbered(51, 150), numbered(1, 50), [], numbered(151, 250)]);
    expect(textsOf(await readLog(url))).toEqual(numbered(1, 250));
  });

  test("is told of its room by path, and of no other: NFC, Chinese, slashes and 64 characters", async () => {
    const { url } = await start();
    const pairs = [["caf\u00e9", "cafe\u0301"], ...["团队", "a/b", "🙂".repeat(64), ""].map((room) => [room, room])];
    for (const [room, same] of pairs as [string, string][]) {
      const [ann, bo] = await joinAll(url, { room }, { room: same });
      ann.post(`to ${room}`);
      expect(textsOf(await bo.untilMessages(1))).toEqual([`to ${room}`]);
    }
  });

  test("sees who is here, in one frame a second at most and only when it changed, and who is typing", async () => {
    const { url } = await start();
    const ann = await Client.join(url, { name: "Ann" });
    await ann.first("presence");
    const [bo, ...others] = await joinAll(url, "Bo", "Cy", "Bo");
    await Client.join(url, { plain: true });
    await ann.sees(5, "Ann", "Bo", "Bo", "Cy");
    bo.send({ type: "name", name: "Bea" });
    await bo.settle();
    for (const other of [bo, ...others]) await other.leave();
    await ann.sees(2, "Ann");
    const di = await Client.join(url, { name: "Di" });
    for (let i = 0; i < 5; i++) di.send({ type: "typing" }); // passed on to the others, once in two seconds
    await di.first("presence");
    expect(ann.all("presence")).toHaveLength(4);
    expect([ann.all("typing"), di.all("typing")]).toEqual([[{ type: "typing", name: "Di" }], []]);
  });

  test("changes its name when it wants, and keeps it when it asks for one that is not allowed", async () => {
    const { url } = await start();
    const ann = await Client.join(url);
    const longest = "🙂".repeat(32);
    await ann.say("one");
    const names = ["安", longest, "", "   ", "a\nb", "a\u0000", "\u2028", "a\u202eb", "团".repeat(33)];
    for (const name of names) ann.send({ type: "name", name });
    await ann.say("two");
    expect(ann.messages.map(({ name }) => name)).toEqual(["Guest", longest]);
    expect(ann.all("error").map(({ code }) => code)).toEqual(Array(7).fill("bad-name"));
  });

  test("is told in words what was wrong with a post, with its key, and stays", async () => {
    const { url } = await start();
    const ann = await Client.join(url);
    for (const text of ["", " \n"]) ann.post(text, "empty");
    ann.post("团".repeat(5462), "long"); // 16,386 bytes of UTF-8
    ann.post("hi", "no spaces");
    ann.post("hi", "x".repeat(65));
    ann.post("团".repeat(5461), "fits");
    expect((await ann.untilMessages(1))[0]?.key).toBe("fits");
    const errors = ann.all("error").map(({ code, key }) => `${code} ${key}`);
    expect(errors).toEqual(["empty empty", "empty empty", "too-long long", "bad-key undefined", "bad-key undefined"]);
    for (const { text } of ann.all("error")) expect(text).toMatch(/^[A-Z].+[.]$/);
  });
});

/** Frames that are not of the protocol, one a line; each makes one strike. */
const MALFORMED = `

no json
null
42
{"type":null}
{"type":"__proto__"}
{"type":"post","key":"k"}
{"type":"post","key":"k","text":{"a":1}}
{"type":"post","key":"k","text":"x","from":"somebodyElse"}
{"type":"page","before":1e400}
{"type":"remove","key":"k","seq":0}
{"type":"ping","${"x".repeat(60_000)}":1}
{"type":"post","key":"k","text":${"[".repeat(10_000)}${"]".repeat(10_000)}}`;

test("A malformed frame of every kind is answered in words, the tenth ends the connection, and nobody else notices.", async () => {
  const { url } = await start();
  const bo = await Client.join(url, { name: "Bo" });
  let ann = await Client.join(url, { name: "Ann" });
  for (const [i, frame] of MALFORMED.split("\n").slice(1).entries()) {
    ann.send(frame);
    const { code, text } = await ann.nth("error", 1 + (i % 10));
    expect([frame.slice(0, 60), code, text.length < 200]).toEqual([frame.slice(0, 60), "bad-frame", true]);
    if (i % 10 < 9) await ann.settle();
    else expect(await ann.end()).toBe(1008);
    if (ann.ended) ann = await Client.join(url, { name: "Ann" });
  }
  await bo.settle();
  expect(bo.frames.filter(({ type }) => !/hello|presence|pong/.test(type))).toEqual([]);
});

// ─── Who is who, and taking back ─────────────────────────────────────────────────────────────────────────────────────

test("A browser gets a cookie with the page, when it has none: also with a 304, and only then.", async () => {
  const { url } = await start();
  const etag = (await fetch(url)).headers.get("etag") as string;
  const set = async (headers: object) => (await fetch(url, { headers: { ...headers } })).headers.getSetCookie();
  const cookies = await Promise.all([{}, { "If-None-Match": etag }, { Cookie: "other=1" }].map(set));
  for (const [cookie] of cookies) {
    expect(cookie).toMatch(/^chat-me=[0-9a-f]{32}; Max-Age=31536000; SameSite=Lax; Path=\/; HttpOnly$/);
  }
  expect(new Set(cookies.flat()).size).toBe(3);
  expect(await set({ Cookie: `other=1; ${cookieOf(await fetch(url))}` })).toEqual([]);
});

describeStore("an id", (make) => {
  test("is the same for a cookie on each server and after a restart, another in each room, and none without", async () => {
    const store = await make();
    const servers = await startServers(store);
    const idsIn = async (url: string, options: ClientOptions) => {
      const client = await Client.join(url, options);
      return [(await client.first("hello")).you, (await client.say(crypto.randomUUID())).from];
    };
    for (const { url } of servers) {
      for (const room of ["", "team"])
        expect(await idsIn(url, { me: "ann", room })).toEqual([idOf("ann", room), idOf("ann", room)]);
      expect(await idsIn(url, {})).toEqual([undefined, undefined]);
    }
    await (servers[0] as Chat).stop();
    const { url } = await start(store.config);
    expect((await readLog(url))[0]!.from).toBe(idOf("ann"));
    expect((await idsIn(url, { me: "ann" }))[0]).toBe(idOf("ann"));
  });

  test("tells two people of one name apart, and counts a person with two tabs once, on all servers", async () => {
    const servers = await startServers(await make());
    const [ann, bot] = [{ name: "Ann", me: "ann" }, { name: "Bot" }];
    const clients = await joinAll(servers, ann, ann, { name: "Ann", me: "eve" }, bot, bot);
    await Client.join(servers[0]!.url, { plain: true });
    for (const client of clients) {
      await client.sees(5, "Ann", "Ann", "Bot", "Bot");
      const { people } = client.all("presence").at(-1)!;
      expect(new Set(people.map(({ from }) => from))).toEqual(new Set([idOf("ann"), idOf("eve"), undefined]));
    }
    for (const client of [clients[0], clients[4]]) await client.leave();
    await clients[1].sees(4, "Ann", "Ann", "Bot");
  });
});

/** All that a store holds, for somebody who looks into its files, or into its keys. */
async function contentOf({ db, prefix }: Partial<Config>): Promise<string> {
  const files = db ? readdirSync(FOLDER).filter((file) => file.startsWith(basename(db))) : [];
  if (db) return files.map((file) => readFileSync(join(FOLDER, file), "utf8")).join();
  const redis = await sharedRedis();
  let content = "";
  for (const key of await redis.keys(`${prefix}*`)) {
    const reads = [redis.command("LRANGE", key, "0", "-1"), redis.command("HGETALL", key), redis.command("GET", key)];
    content += JSON.stringify(await Promise.allSettled(reads)); // one of them is for its type
  }
  return content;
}

describeStore("what was taken back", (make) => {
  test("is gone from the log, every page, resume and export, and from the store itself", async () => {
    const store = await make();
    const servers = await startServers(store);
    const ann = await Client.join(servers[0]!.url, { name: "Ann", me: "ann" });
    const bo = await Client.join(servers.at(-1)!.url);
    const plain = await Client.join(servers[0]!.url, { plain: true });
    const { epoch } = await ann.first("hello");
    const secret = "a secret ".repeat(1000); // in pages of the file that it alone takes
    const { at, ...said } = await ann.say(secret, "k1");
    for (const key of ["r1", "r1", "r2"]) ann.send({ type: "remove", key, seq: 1 });
    const { at: removedAt, ...entry } = (await bo.untilMessages(2))[1] as Message;
    expect(entry).toEqual({ seq: 2, name: "Ann", from: idOf("ann"), text: "", removes: 1, key: "r1" });
    await ann.untilMessages(2);
    ann.post(secret, "k1"); // sent again, it does not come back
    await ann.nth("ack", 3);
    expect(ann.all("ack").map(({ key }) => key)).toEqual(["r1", "r2", "k1"]);
    const gone: Message = { ...said, at, text: "", removed: true };
    const log = [gone, { ...entry, at: removedAt }];
    for (const { url } of servers) {
      const again = await Client.join(url, { epoch, after: 0 });
      again.send({ type: "page", before: 3 });
      expect([await readLog(url), again.messages, (await again.first("page")).messages]).toEqual([log, log, log]);
    }
    await ann.say("after");
    expect(await plain.untilTexts(2)).toEqual([secret, "after"]); // the entry is no text
    const lines = await exported(store.config);
    expect(lines.slice(0, 2).map(({ room, ...message }) => message)).toEqual(log);
    await (servers[0] as Chat).stop();
    const content = await contentOf(store.config);
    expect([content.includes("a secret"), content.includes("after")]).toEqual([false, true]);
    const { config } = await make();
    await importMessages({ ...readConfig({}), ...config }, lines.map((line) => JSON.stringify(line)).join("\n"));
    expect((await readLog((await start(config)).url)).slice(0, 2)).toEqual(log);
  });

  test("was one's own, or the operator took it: not somebody without an id, nor a message that is not kept", async () => {
    const { url } = await start({ ...(await make()).config, history: 2, operator: "open wide" });
    const [ann, eve, bot] = await joinAll(url, { me: "ann" }, { me: "eve" }, {});
    const host = await Client.join(url, { name: "Host", headers: { Authorization: "Bearer open wide" } });
    for (const [n, client] of [ann, ann, bot].entries()) await client.say(`said ${n}`);
    const attempts: [Client, code: string, ...seqs: number[]][] = [
      [eve, "not-yours", 2, 3],
      [bot, "not-yours", 2, 3],
      [ann, "gone", 1, 4],
      [host, "gone", 1, 4],
    ];
    for (const [client, code, ...seqs] of attempts) {
      for (const seq of seqs) client.send({ type: "remove", key: "r", seq });
      await client.nth("error", 2);
      for (const error of client.all("error")) expect([error.code, error.key]).toEqual([code as "gone", "r"]);
    }
    expect(textsOf(await readLog(url))).toEqual(["said 1", "said 2"]);
    host.send({ type: "remove", key: "r", seq: 3 });
    expect((await ann.untilMessages(4))[3]).toMatchObject({ seq: 4, name: "Host", text: "", removes: 3, key: "r" });
    expect(textsOf(await readLog(url))).toEqual(["", ""]);
  });
});

// ─── Promises 1 to 4: order, stored before seen, once, resume ────────────────────────────────────────────────────────

/** A Redis for one test, which may do anything to it. */
async function ownRedis(): Promise<Redis> {
  const redis = await Redis.start();
  started.push(() => redis.kill());
  return redis;
}

/** Servers of one chat over a store: one in this process, and with Redis one more in a process of its own. */
async function startServers({ config, env }: Awaited<ReturnType<MakeStore>>): Promise<{ url: string }[]> {
  const first = await start({ ...config, rate: 0 });
  return config.redisUrls ? [first, await spawnServer({ ...env, CHAT_RATE: "0" })] : [first];
}

async function importOld(config: Partial<Config>, count: number): Promise<void> {
  const line = (seq: number) => JSON.stringify({ room: "", seq, at: 1, name: "Ann", text: "old", key: `old${seq}` });
  const lines = Array.from({ length: count }, (_, i) => line(i + 1));
  expect(await importMessages({ ...readConfig({}), ...config }, lines.join("\n"))).toEqual([]);
}

/** Milliseconds that people wait between two posts, and a client that found no server before it tries again. */
const REST_MS = 15;

/**
 * Somebody who posts all the time, takes some of it back, and keeps all they were ever told. When the connection ends,
 * they go to the next server, with `epoch` and `after`, and send again what was not confirmed.
 */
class Talker {
  /** What they were told: one record for each time that they started afresh. */
  readonly records: { epoch: string; messages: Message[] }[] = [];
  /** What they sent and saw neither in the log nor acked, by key. */
  readonly outbox = new Map<string, object>();
  /** Keys that were acked or seen, and the epoch of that log. */
  readonly confirmed = new Map<string, string>();
  readonly closes: number[] = [];
  resumes = 0;
  talking = true;
  #client: Client | undefined;
  #stopped = false;
  #sent = 0;
  /** Of this log, the newest that they have taken back. */
  #removed = 0;

  constructor(
    readonly name: string,
    readonly servers: { url: string }[],
    public at: number,
    readonly rest: number,
    readonly room: string,
  ) {
    started.push(() => this.stop());
    void this.#run();
  }

  get last(): number {
    return this.records.at(-1)?.messages.at(-1)?.seq ?? 0;
  }

  async #run(): Promise<void> {
    for (; !this.#stopped; this.at++) {
      await this.#visit(this.servers[this.at % this.servers.length]!.url).catch(() => {});
      await Bun.sleep(REST_MS); // the server is away: not a wait for something, only not to spin
    }
  }

  async #visit(url: string): Promise<void> {
    const { name, room } = this;
    const resume = this.records.length === 0 ? {} : { epoch: this.records.at(-1)?.epoch, after: this.last };
    const client = await Client.connect(url, { name, me: name, room, ...resume });
    this.#client = client;
    for (const frame of client.frames) this.#take(frame);
    client.onframe = (frame) => this.#take(frame);
    try {
      await client.first("hello");
      for (const frame of this.outbox.values()) client.send(frame);
      while (!client.ended && !this.#stopped) await this.#talk(client);
    } finally {
      client.drop();
      this.closes.push(client.closeCode as number);
    }
  }

  async #talk(client: Client): Promise<void> {
    if (this.talking && this.outbox.size < 3) {
      const key = `${this.name}-${this.#sent++}`;
      const own = idOf(this.name);
      const last = this.records.at(-1)?.messages.findLast(({ from, text }) => from === own && text)?.seq ?? 0;
      const isRemoval = this.#sent % 4 === 0 && last > this.#removed;
      if (isRemoval) this.#removed = last;
      const frame = isRemoval ? { type: "remove", key, seq: last } : { type: "post", key, text: `text of ${key}` };
      this.outbox.set(key, frame);
      client.send(frame);
    }
    await Bun.sleep(this.rest); // people do not talk without a break
  }

  #take(frame: ServerFrame): void {
    if (frame.type === "hello" && frame.resumed) this.resumes++;
    else if (frame.type === "hello") this.#startAfresh(frame.epoch);
    const { epoch, messages } = this.records.at(-1) as Talker["records"][0];
    if (frame.type === "ack") this.#confirm(frame.key, epoch);
    if (frame.type !== "hello" && frame.type !== "messages") return;
    messages.push(...frame.messages);
    for (const { key } of frame.messages) if (key) this.#confirm(key, epoch);
  }

  #startAfresh(epoch: string): void {
    if (epoch !== this.records.at(-1)?.epoch) {
      for (const [key, frame] of this.outbox) if ("seq" in frame) this.outbox.delete(key); // it means nothing here
      this.#removed = 0;
    }
    this.records.push({ epoch, messages: [] });
  }

  #confirm(key: string, epoch: string): void {
    if (this.outbox.delete(key)) this.confirmed.set(key, epoch);
  }

  async talks(n: number): Promise<void> {
    const wanted = this.confirmed.size + n;
    await eventually(`${n} more posts of ${this.name}`, () => this.confirmed.size >= wanted);
  }

  cut(): void {
    this.#client?.drop();
  }

  stop(): void {
    this.#stopped = true;
    this.cut();
  }
}

function talkers(count: number, servers: { url: string }[], rest = REST_MS, room = ""): Talker[] {
  return Array.from({ length: count }, (_, i) => new Talker(`t${i}`, servers, i, rest, room));
}

const allTalk = (all: Talker[], n: number) => Promise.all(all.map((talker) => talker.talks(n)));

/**
 * Ends the talk, and compares what everyone was told and promised with the log, on every server: nothing confirmed is
 * missing, nothing is doubled, one order, no holes, nobody was left behind, and what was taken back is gone.
 */
async function expectOneChat(all: Talker[], servers: { url: string }[]): Promise<void> {
  for (const talker of all) talker.talking = false;
  await eventually("the last posts", () => all.every(({ outbox }) => outbox.size === 0));
  let logs: Message[][] = [];
  await eventually("all of it at everyone", async () => {
    logs = await Promise.all(servers.map(({ url }) => readLog(url, all[0]?.room))).catch(() => []); // it may come back just now
    const lasts = [...logs.map((log) => log.at(-1)?.seq), ...all.map(({ last }) => last)];
    return logs.length > 0 && new Set(lasts).size === 1;
  });
  const [log = [], ...others] = logs;
  for (const other of others) expect(other).toEqual(log);
  expectDense(log);
  const removed = log.filter((message) => message.removed);
  const taken = log.flatMap(({ removes }) => removes ?? []).toSorted((a, b) => a - b);
  expect(removed.map(({ seq, text }) => [seq, text])).toEqual(taken.map((seq) => [seq, ""]));
  const keys = log.map(({ key }) => key as string);
  const kept = new Set(keys);
  expect(kept.size).toBe(keys.length);
  const epoch = all[0]?.records.at(-1)?.epoch as string;
  const told = new Map(log.map((message) => [`${epoch} ${message.seq}`, message]));
  for (const { name, records, confirmed } of all) {
    expect(records.at(-1)?.epoch).toBe(epoch);
    for (const { epoch: of, messages } of records) {
      expectDense(messages);
      for (const message of messages) {
        const known = told.getOrInsert(`${of} ${message.seq}`, message); // a log that is gone was the same for all too
        const gone = known.removed || message.removed ? ({ text: "", removed: true } as const) : {};
        expect({ ...message, ...gone }).toEqual({ ...known, ...gone });
      }
    }
    expect([...confirmed].filter(([key, of]) => of === epoch && !kept.has(key))).toEqual([]);
    const own = keys.filter((key) => key.startsWith(`${name}-`)).map((key) => Number(key.split("-")[1]));
    expect([name, own]).toEqual([name, own.toSorted((a, b) => a - b)]); // what one client sends stays in its order
  }
}

describeStore("one order", (make) => {
  test("forty clients of both dialects, all sending, see the same messages in the same order on each server", async () => {
    const servers = await startServers(await make());
    const options = Array.from({ length: 40 }, (_, i) => ({ name: `c${i}`, plain: i % 4 > 1 }));
    const clients = await Promise.all(options.map((each, i) => Client.join(servers[i % servers.length]!.url, each)));
    for (const [i, client] of clients.entries()) await client.say("in", `in${i}`); // a plain socket knows only by this
    for (let round = 0; round < 25; round++) {
      for (const [i, client] of clients.entries()) client.post(`${i}:${round}`);
    }
    const all = ({ seen }: Client) => seen.filter((text) => text !== "in").length >= 1000;
    await Promise.all(clients.map((client) => client.until("all texts", () => all(client))));
    const logs = await Promise.all(servers.map(({ url }) => readLog(url)));
    const texts = textsOf(logs[0]!);
    for (const log of logs) expect(log).toEqual(logs[0]!);
    for (const [i, { seen }] of clients.entries()) {
      expect(seen).toEqual(texts.slice(-seen.length));
      const own = texts.filter((text) => text.startsWith(`${i}:`));
      expect(own).toEqual(Array.from({ length: 25 }, (_, round) => `${i}:${round}`));
    }
  });
});

describeStore("seen means stored", (make) => {
  test("clients that are cut, and a server that is killed or stopped under load, lose nothing that anyone saw", async () => {
    let server = await spawnServer({ ...(await make()).env, CHAT_RATE: "0", CHAT_SYNC: "normal" });
    const { url } = server;
    const all = talkers(8, [{ url }], 0);
    for (let cut = 0; cut < 20; cut++) {
      await all[cut % 8]!.talks(cut % 5);
      all[(cut * 3) % 8]!.cut();
    }
    for (const signal of ["SIGKILL", "SIGTERM", "SIGKILL", "SIGTERM", "SIGKILL", "SIGKILL"] as const) {
      await allTalk(all, 20);
      for (const { closes } of all) closes.splice(0);
      server = await restart(server, signal);
      await eventually("everyone again", () => all.every(({ closes }) => closes.length > 0));
      if (signal === "SIGTERM") for (const { closes } of all) expect(closes[0]).toBe(1001);
    }
    await allTalk(all, 20);
    await expectOneChat(all, [{ url }]);
    for (const { resumes, records } of all) expect([resumes >= 6, records.length]).toEqual([true, 1]);
  });
});

describeStore("once", (make) => {
  test("a post sent again with its key is acked with its seq and not stored again: at once, later, by another, elsewhere", async () => {
    const servers = await startServers(await make());
    const ann = await Client.join(servers[0]!.url);
    for (let i = 0; i < 5; i++) ann.post("hi", "k");
    await ann.nth("ack", 4);
    ann.post("another text, the same key", "k");
    expect(await ann.nth("ack", 5)).toEqual({ type: "ack", key: "k", seq: 1 });
    const bo = await Client.join(servers.at(-1)!.url);
    bo.post("hi", "k");
    expect(await bo.first("ack")).toEqual({ type: "ack", key: "k", seq: 1 });
    await bo.say("next");
    expect(textsOf(await readLog(servers[0]!.url))).toEqual(["hi", "next"]);
    await (await Client.join(servers[0]!.url, { room: "other" })).say("another post", "k");
  });
});

describeStore("resume", (make) => {
  test("gives each of five hundred exactly what they missed", async () => {
    const { url } = await start({ ...(await make()).config, rate: 0 });
    const ann = await Client.join(url);
    ann.postAll(500);
    await ann.untilMessages(500);
    const { epoch } = await ann.first("hello");
    const places = Array.from({ length: 501 }, (_, after) => Client.join(url, { epoch, after })); // all at once
    for (const [after, client] of (await Promise.all(places)).entries()) {
      const { resumed, messages, last } = await client.first("hello");
      expect([after, resumed, textsOf(messages), last]).toEqual([after, true, numbered(after + 1, 500), 500]);
    }
  });

  test("starts afresh when the epoch is another, the place is out of the log, or too much was missed", async () => {
    const { url } = await start({ ...(await make()).config, rate: 0, history: 1500 });
    const ann = await Client.join(url);
    ann.postAll(2000);
    await ann.untilMessages(2000);
    const { epoch } = await ann.first("hello");
    const places = [2001, 999, 499, 0].map((after) => ({ epoch, after }));
    for (const place of [{ epoch: "0".repeat(16), after: 2000 }, ...places]) {
      const { resumed, first, messages } = await (await Client.join(url, place)).first("hello");
      expect([place, resumed, first, textsOf(messages)]).toEqual([place, false, 501, numbered(1901, 2000)]);
    }
    const { resumed, messages } = await (await Client.join(url, { epoch, after: 1000 })).first("hello");
    expect([resumed, messages.length]).toEqual([true, 1000]);
  });

  test("a client that joins while others talk misses nothing between hello and the first message", async () => {
    const servers = await startServers(await make());
    await allTalk(talkers(3, servers, 0), 1);
    for (let i = 0; i < 50; i++) {
      const client = await Client.join(servers[0]!.url);
      await client.nth("messages", 2);
      expectDense(client.messages);
      client.drop();
    }
  });

  test("a hundred long messages do not make a hello that fills a phone: older ones come by pages", async () => {
    const { url } = await start({ ...(await make()).config, rate: 0 });
    const [ann, bot] = await joinAll(url, {}, { plain: true, room: "control" });
    ann.postAll(100, () => "x".repeat(16 * 1024));
    bot.postAll(100, () => "\u0001".repeat(16 * 1024)); // each character takes six bytes in JSON
    await ann.untilMessages(100);
    await bot.untilTexts(100);
    const { epoch } = await ann.first("hello");
    for (const room of ["", "control"]) {
      const bo = await Client.join(url, { room, ...(room === "" ? { epoch, after: 0 } : {}) });
      const { resumed, messages } = await bo.first("hello");
      expect([resumed, messages.at(-1)?.seq, bo.texts[0]!.length < 300 * 1024]).toEqual([false, 100, true]);
      expect(await readLog(url, room)).toHaveLength(100);
    }
  });
});

// ─── The store ───────────────────────────────────────────────────────────────────────────────────────────────────────

describeStore("the store", (make) => {
  test("keeps the newest CHAT_HISTORY messages of each room, with their keys, and trims the rest", async () => {
    const { config } = await make();
    const { url } = await start({ ...config, history: 50, rate: 0 });
    const [ann, bo] = await joinAll(url, {}, { room: "small" });
    await (await Client.join(url, { room: "visited" })).leave();
    await bo.say("kept");
    ann.postAll(1030);
    await ann.untilMessages(1030);
    expect(textsOf(await readLog(url))).toEqual(numbered(981, 1030));
    const old = config.db ? "k970" : "k1"; // Redis forgets a key when it trims its message
    await ann.say("so old that nobody knows its key", old);
    for (let n = 1032; n <= 1060; n++) await ann.say(`m${n}`);
    await eventually("the end of the trimming", async () => (await exported(config)).length < 152);
    for (const key of [old, "k1011", "k1020"]) ann.post("sent again", key);
    await ann.nth("ack", 3);
    expect(ann.all("ack").map(({ seq }) => seq)).toEqual([1031, 1011, 1020]);
    const rooms = (await exported({ ...config, history: 50 })).map(({ room }) => room).toSorted();
    expect([rooms.length, rooms[0], rooms[49], rooms[50]]).toEqual([51, "", "", "small"]);
  });

  test("keeps the order of those who post right after a start, and knows every key of many", async () => {
    const { config } = await make();
    await importOld(config, 120_000);
    const [ann, bo] = await joinAll((await start({ ...config, rate: 0, history: 130_000 })).url, "Ann", "Bo");
    for (let n = 1; n <= 100; n++) {
      for (const client of [ann, bo]) client.post(`m${n}`, `${n}-${client === ann}`);
      if (n % 10 === 0) await ann.settle(); // so that some come while the keys are read
    }
    for (const n of [1, 98_000, 98_001, 120_000]) bo.post("sent again", `old${n}`);
    await bo.nth("ack", 4);
    expect(bo.all("ack").map(({ seq }) => seq)).toEqual([1, 98_000, 98_001, 120_000]);
    const posted = (await ann.untilMessages(300)).slice(100);
    for (const name of ["Ann", "Bo"]) {
      expect(textsOf(posted.filter((message) => message.name === name))).toEqual(numbered(1, 100));
    }
  });
});

describe("the SQLite store", () => {
  test("keeps what waits for the keys though its sender leaves or the server stops, but nothing behind what fails", async () => {
    const config = { db: newFile(), history: 200_000 };
    await importOld(config, 100_000);
    for (const text of ["left", "stopped"]) {
      const chat = await start(config);
      const ann = await Client.join(chat.url);
      ann.post(text);
      await ann.leave();
      if (text === "left") await (await Client.join(chat.url)).say("next");
      await chat.stop();
    }
    using other = new Database(config.db);
    other.run("CREATE TRIGGER t BEFORE INSERT ON messages WHEN new.text = 'bad' BEGIN SELECT RAISE(ABORT, 'bad'); END");
    const { url } = await start(config);
    const bo = await Client.join(url);
    for (const text of ["bad", "behind", "too"]) bo.post(text);
    expect(await bo.end()).toBe(1013);
    const { messages } = await (await Client.join(url)).first("hello");
    expect(textsOf(messages).slice(-4)).toEqual(["old", "left", "next", "stopped"]);
  });

  test("has a message in the file before anyone receives it", async () => {
    const file = newFile();
    const [ann, bo] = await joinAll((await start({ db: file })).url, "Ann", "Bo");
    using reader = new Database(file, { readonly: true });
    const stored = reader.query<{ n: number }, [string]>("SELECT count(*) AS n FROM messages WHERE text = ?");
    const found: unknown[] = [];
    bo.onframe = () => found.push(stored.get(bo.messages.at(-1)?.text ?? "")?.n);
    for (let i = 1; i <= 50; i++) {
      await ann.say(`m${i}`);
      await bo.untilMessages(i);
    }
    expect(new Set(found.slice(-50))).toEqual(new Set([1]));
  });

  test("is refused in one line when it cannot be opened, is no database, may only be read, or is in use", async () => {
    const [text, used, link, later] = [newFile(), newFile(), newFile(), newFile()];
    await Bun.write(text, "This is no database. ".repeat(100));
    symlinkSync(used, link);
    symlinkSync(later, `${later}-link`); // to a file that is not there yet
    const first = await spawnServer({ CHAT_DB: used });
    await spawnServer({ CHAT_DB: `${later}-link` });
    const bad = [text, join(FOLDER, "no", "folder"), FOLDER];
    for (const db of [...bad, used, link, join(FOLDER, "x", "..", basename(used)), later]) {
      const { code, said } = await run({ CHAT_DB: db });
      const line = /^CHAT_DB=.+: the database cannot be opened for writing: .+\n$/;
      expect([code, said]).toEqual([1, expect.stringMatching(line)]);
      expect(said.includes("is a second server running?")).toBe(!bad.includes(db));
    }
    await (await Client.join(first.url)).say("mine");
    first.kill("SIGKILL");
    await first.exited;
    expect(textsOf(await readLog((await start({ db: used })).url))).toEqual(["mine"]); // a dead server's lock is none
  });

  test("of the version before is taken over, with its messages", async () => {
    const db = newFile();
    {
      using old = new Database(db);
      old.run("CREATE TABLE rooms (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, epoch TEXT NOT NULL)");
      old.run(`CREATE TABLE messages (room INTEGER NOT NULL, seq INTEGER NOT NULL, at INTEGER NOT NULL, name TEXT NOT NULL,
        key TEXT, text TEXT NOT NULL, PRIMARY KEY (room, seq)) WITHOUT ROWID`);
      old.run("INSERT INTO rooms VALUES (1, '', 'fedcba9876543210')");
      old.run("INSERT INTO messages VALUES (1, 1, 1790, 'Ann', 'k', 'kept'), (1, 2, 1791, 'bot', NULL, 'too')");
      old.run("PRAGMA user_version = 1");
    }
    for (let time = 1; time <= 2; time++) {
      const { url, stop } = await start({ db });
      const ann = await Client.join(url, { epoch: "fedcba9876543210", after: 1 });
      expect((await ann.first("hello")).resumed).toBe(true);
      ann.post("kept", "k");
      expect((await ann.first("ack")).seq).toBe(1);
      await ann.say(`new ${time}`);
      expect((await readLog(url))[0]).toEqual({ seq: 1, at: 1790, name: "Ann", text: "kept", key: "k" });
      await stop();
    }
  });

  test("locked by another program acks nothing, closes with 1013, tells the operator, and works again by itself", async () => {
    const db = newFile();
    const server = await spawnServer({ CHAT_DB: db });
    const [ann, bo] = await joinAll(server.url, "Ann", "Bo");
    await ann.say("before");
    using other = new Database(db);
    other.run("BEGIN IMMEDIATE");
    for (let time = 0; time < 2; time++) {
      const client = await Client.join(server.url);
      client.post("meanwhile");
      expect([await client.end(), client.all("ack"), client.messages.length]).toEqual([1013, [], 1]);
    }
    expect([await ann.end(), await bo.end()]).toEqual([1013, 1013]);
    other.run("ROLLBACK");
    await (await Client.join(server.url)).say("meanwhile");
    expect(textsOf(await readLog(server.url))).toEqual(["before", "meanwhile"]);
    await eventually("two lines", () => server.errors.split("\n").length > 2);
    const cannot = "The database cannot be used: database is locked\n";
    expect(server.errors).toBe(`${cannot}The database can be used again.\n`);
  });
});

// ─── Who gets in ─────────────────────────────────────────────────────────────────────────────────────────────────────

test("A page of another origin is kept out, unless CHAT_ORIGINS names it; the server's own comes in.", async () => {
  const cases = `
    101  -     http://chat.example              chat.example
    101  -     http://CHAT.example              chat.Example
    101  -     http://chat.example:80           chat.example
    101  -     https://chat.example             chat.example:443
    101  -     http://[::1]                     [0:0:0:0:0:0:0:1]
    403  -     http://chat.example              chat.example:8080
    403  -     http://[::2]:8080                [::1]:8080
    403  -     http://chat.example.evil.example chat.example
    403  -     http://evil.example#chat.example chat.example
    403  -     http://chat.example@evil.example chat.example
    403  -     http://chat.example,http://e.example chat.example
    403  -     null                             null
    101  list  https://chat.example:443         localhost
    403  list  http://chat.example              localhost
    101  list  http://other.example:8443        localhost
    403  list  https://other.example            localhost
    403  list  http://https                     localhost
    403  list  null                             localhost
    101  *     null                             localhost`;
  const origins: Record<string, string> = { "-": "", list: "https://Chat.example, other.example:8443", "*": "*" };
  for (const row of cases.trim().split("\n")) {
    const [status, list = "", Origin = "", Host = ""] = row.trim().split(/ +/);
    const { url } = await start({ origins: readConfig({ CHAT_ORIGINS: origins[list] }).origins });
    const { status: answered } = await Client.connect(url, { headers: { Origin, Host } });
    expect([list, Origin, Host, `${answered}`]).toEqual([list, Origin, Host, `${status}`]);
  }
});

/** Gives a password to the form of the page, and returns the answer. */
function login(url: string, password: string, headers: Record<string, string> = {}): Promise<Response> {
  const body = new URLSearchParams({ password });
  return fetch(url, { method: "POST", body, headers, tls: { rejectUnauthorized: false } });
}

function cookieOf(response: Response): string {
  return /^[^;]+/.exec(response.headers.get("set-cookie") ?? "")?.[0] ?? "";
}

describe("a password", () => {
  const PASSWORD = "öpen sesame+&=%";
  /** The status with which a plain handshake is answered. */
  const knock = async (url: string, headers: Record<string, string>) =>
    (await Client.connect(url, { plain: true, headers })).status;

  test("keeps everything but the page from those who do not have it, in both dialects", async () => {
    const { url } = await start({ password: PASSWORD });
    const ann = await Client.join(url, { name: "Ann", headers: { Cookie: cookieOf(await login(url, PASSWORD)) } });
    await ann.say("secret");
    expect((await fetch(url)).status).toBe(200);
    for (const room of ["", "team"]) {
      const plain = await Client.connect(url, { room, plain: true });
      expect([plain.status, plain.answer.split("\r\n\r\n")[1]]).toEqual([401, "A password is needed.\n"]);
      const chat = await Client.connect(url, { room, epoch: "0", after: 0 });
      chat.post("in");
      expect([await chat.end(), chat.frames]).toEqual([4401, []]);
    }
    ann.send({ type: "typing" });
    await ann.settle();
    expect([textsOf(ann.messages), ann.all("presence").at(-1)?.count]).toEqual([["secret"], 1]);
  });

  test("is given at any path for a cookie that does not hold it, and is honoured in both dialects; so is Bearer", async () => {
    const { url } = await start({ password: "sesame" });
    expect((await login(url, "sesame ")).status).toBe(401);
    const response = await login(`${url}team`, "sesame");
    expect([response.status, await response.text()]).toEqual([204, ""]);
    const [set, ...others] = response.headers.getSetCookie() as [string];
    expect(others).toEqual([]);
    expect((await login(url, "sesame", { Origin: "https://evil.example" })).status).toBe(403);
    expect((await login(url, "sesame", { Origin: url.slice(0, -1) })).status).toBe(204);
    expect(set).toMatch(/^chat-[\w-]{8}=[\w.-]+; Max-Age=\d+; SameSite=Strict; Path=\/; HttpOnly$/);
    expect(Buffer.from(set, "base64").toString("latin1") + set).not.toContain("sesame");
    const Cookie = `other=1; ${cookieOf(response)}; last=2`;
    const bearers = ["Bearer sesame", "bearer sesame"].map((Authorization) => ({ Authorization }));
    const another = await start({ password: "sesame", port: await freePort() }); // one more server of the chat
    for (const headers of [{ Cookie }, ...bearers] as Record<string, string>[]) {
      for (const each of [url, another.url]) expect(await knock(each, headers)).toBe(101);
      await Client.join(url, { headers });
    }
  });

  test("wrong, forged, of another password, or no cookie at all: none comes in, and an old one only until its time is over", async () => {
    const [first, other] = [await start({ password: "one" }), await start({ password: "two" })];
    const cookie = cookieOf(await login(first.url, "one"));
    const foreign = cookieOf(await login(other.url, "two"));
    const [name, ends, signature = ""] = cookie.split(/[=.]/);
    const values = [
      ...["", ".", ends, `${ends}.`, `.${signature}`, `${Number(ends) + 1}.${signature}`, `1e99.${signature}`],
      ...[`${ends}.${signature.slice(0, -2)}`, `${ends}.${signature}AAAA`, `${ends}.${"A".repeat(43)}`],
      ...[`operator.${ends}.${signature}`, "%00%ff%zz", "x".repeat(8000), "one", foreign.split("=")[1]],
    ];
    const others = [";;;===", foreign, `chat=${ends}.${signature}`, cookie.toUpperCase()];
    const bad = [...values.map((value) => `${name}=${value}`), ...others];
    for (const Cookie of bad) expect([Cookie, await knock(first.url, { Cookie })]).toEqual([Cookie, 401]);
    for (const Authorization of ["Basic b25l", "Bearer", "one", "Bearer  one"]) {
      expect([Authorization, await knock(first.url, { Authorization })]).toEqual([Authorization, 401]);
    }
    expect(await knock(first.url, { Cookie: cookie })).toBe(101);
    expect(await knock(first.url, { Cookie: `${foreign}; ${cookie}` })).toBe(101); // two chats on one host
    const over = Number(/Max-Age=(\d+)/.exec((await login(first.url, "one")).headers.get("set-cookie") ?? "")?.[1]);
    started.push(() => setSystemTime());
    const now = Date.now();
    setSystemTime(new Date(now + (over - 60) * 1000));
    expect(await knock(first.url, { Cookie: cookie })).toBe(101);
    setSystemTime(new Date(now + (over + 60) * 1000));
    expect(await knock(first.url, { Cookie: cookie })).toBe(401);
  });

  test("guessed wrong makes the address wait, by form, Bearer and socket alike, and nobody else", async () => {
    const { url } = await start({ password: "sesame", operator: "open wide", proxies: 1 });
    const from = (address: string) => ({ "X-Forwarded-For": address });
    const guess = async (_: unknown, i: number) => (await login(url, `guess${i}`, from("192.0.2.1"))).status;
    expect(await Array.fromAsync({ length: 7 }, guess)).toEqual([401, 401, 401, 401, 401, 429, 429]);
    const refused = await login(url, "sesame", from("192.0.2.1"));
    expect([refused.status, Number(refused.headers.get("retry-after")) > 0]).toEqual([429, true]);
    const headers = { Authorization: "Bearer open wide", ...from("192.0.2.1") };
    expect(await knock(url, headers)).toBe(429);
    const locked = await Client.connect(url, { headers });
    expect([await locked.end(), locked.closeReason]).toEqual([4401, "Too many wrong passwords: try later."]);
    expect((await login(url, "sesame", from("192.0.2.2"))).status).toBe(204);
  });

  test("is counted by the address that the trusted proxies saw, whatever the client made up", async () => {
    const x = "198.51.100.7";
    const others = [1, (i: number) => `2001:db8:1:${i}::1`] as const;
    for (const [proxies, address] of [
      [0, (i: number) => `192.0.2.${i}`], // no proxy is trusted: the header is nothing
      [1, (i: number) => `192.0.2.${i}, ${x}`],
      [1, (i: number) => `192.0.2.${i}\r\nX-Forwarded-For: ${x}`], // as HAProxy adds it
      [2, (i: number) => `192.0.2.${i}, ${x}, 203.0.113.9`],
      [1, (i: number) => `2001:db8:1:2:${i}::1`], // one /64
      [1, (i: number) => `${x}:${5000 + i}`], // with a port, as some proxies add it
      [1, (i: number) => `[2001:db8:1:2::1]:${5000 + i}`],
      others,
    ] as const) {
      const { url } = await start({ password: "sesame", proxies });
      const statuses = [];
      for (let i = 0; i < 8; i++)
        statuses.push(await knock(url, { Authorization: "Bearer no", "X-Forwarded-For": address(i) }));
      expect([address(1), statuses.includes(429)]).toEqual([address(1), address !== others[1]]);
    }
  });

  test("for the operator makes an operator of who gives it, by form or Bearer, and opens the chat too", async () => {
    const roleOf = async (url: string, headers: Record<string, string>) =>
      (await (await Client.join(url, { headers })).first("hello")).role;
    const { url } = await start({ password: "sesame", operator: "open wide" });
    for (const [password, role] of Object.entries({ sesame: "guest", "open wide": "operator" })) {
      expect(await roleOf(url, { Authorization: `Bearer ${password}` })).toBe(role as "guest");
      expect(await roleOf(url, { Cookie: cookieOf(await login(url, password)) })).toBe(role as "guest");
    }
    expect((await login(url, "open")).status).toBe(401);
    const open = await start({ operator: "open wide" });
    expect(await roleOf(open.url, {})).toBe("guest");
    expect(await roleOf(open.url, { Cookie: cookieOf(await login(open.url, "open wide")) })).toBe("operator");
    expect("role" in (await (await Client.join((await start()).url)).first("hello"))).toBe(false);
  });
});

test("With a certificate it serves https and wss, and its cookie is Secure; a bad one is told in one line.", async () => {
  const certify = (name: string) => {
    const [cert, key] = [join(FOLDER, `${name}.crt`), join(FOLDER, `${name}.key`)];
    const curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    const files = ["-keyout", key, "-out", cert, "-days", "2", "-subj", `/CN=${name}`];
    expect(Bun.spawnSync(["openssl", "req", "-x509", ...curve, ...files]).exitCode).toBe(0);
    return [cert, key] as const;
  };
  const [[cert, key], [, other]] = [certify("one"), certify("two")];
  const { url } = await start({ tlsCert: cert, tlsKey: key, password: "sesame" });
  const [page, response] = [await fetch(url, { tls: { rejectUnauthorized: false } }), await login(url, "sesame")];
  expect(page.headers.get("set-cookie")).toEndWith("; SameSite=Lax; Path=/; HttpOnly; Secure");
  expect(response.headers.get("set-cookie")).toEndWith("; SameSite=Strict; Path=/; HttpOnly; Secure");
  await (await Client.join(url, { headers: { Cookie: cookieOf(response) } })).say("hi");
  for (const [TLS_CERT, TLS_KEY] of [
    [cert, other],
    [key, key],
    [cert, `${key}-none`],
    [`${cert}-none`, key],
    [cert, ""],
  ] as const) {
    const said = expect.stringMatching(/^TLS_CERT.+TLS_KEY.+\n$/);
    expect(await run({ TLS_CERT, TLS_KEY })).toEqual({ code: 1, out: "", said });
  }
});

// ─── Slow readers, flooders ──────────────────────────────────────────────────────────────────────────────────────────

describe("a reader that does not read", () => {
  test("is cut, costs a bounded buffer, hurts nobody, and resumes without a hole", async () => {
    const server = await spawnServer({ CHAT_RATE: "0" });
    const [ann, bo] = await joinAll(server.url, "Ann", { plain: true });
    const { epoch } = await ann.first("hello");
    const slow = await Promise.all(Array.from({ length: 30 }, () => Client.join(server.url)));
    for (const { socket } of slow) socket.pause();
    const before = memoryOf(server);
    let [posted, most] = [0, 0];
    const cut = () => server.output.match(/ left the lobby \(1006\)/g)?.length ?? 0;
    while (cut() < slow.length && posted < 4000) {
      for (let i = 0; i < 20; i++) ann.post("x".repeat(16_000), `k${++posted}`);
      await ann.untilMessages(posted);
      most = Math.max(most, memoryOf(server));
    }
    expect(cut()).toBe(slow.length);
    expect(most - before).toBeLessThan(slow.length * 1 + 48); // 48 for the messages on their way and the database's cache
    expectDense(ann.messages);
    expect((await bo.untilTexts(posted)).length).toBe(posted);
    const { resumed, messages } = await (await Client.join(server.url, { epoch, after: posted - 10 })).first("hello");
    expect([resumed, messages[0]?.seq, messages.length]).toEqual([true, posted - 9, 10]);
  });

  test("nor answers a ping is ended, in a busy room too; one that only answers stays", async () => {
    const { url } = await start({ silenceSeconds: 2 });
    const [quiet, dead, plain] = await joinAll(url, {}, {}, { plain: true });
    dead.dead = plain.dead = true;
    const [talker] = talkers(1, [{ url }]);
    await Promise.all([dead.end(), plain.end()]);
    await quiet.sees(2, "Guest", "t0");
    expect([quiet.ended, talker!.closes]).toEqual([false, []]);
  });

  test("leaves a bounded memory of hellos behind, however many rooms have one", async () => {
    const db = newFile();
    await (await start({ db })).stop(); // makes the tables
    using file = new Database(db);
    const count = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < 13999)";
    const values = "i / 14 + 1, i % 14 + 1, 1, 'Ann', hex(zeroblob(8192))";
    file.run(`${count} INSERT INTO messages (room, seq, at, name, text) SELECT ${values} FROM n`);
    file.run(`${count} INSERT INTO rooms SELECT i + 1, i, '0123456789abcdef' FROM n WHERE i < 1000`);
    const server = await spawnServer({ CHAT_DB: db });
    for (let room = 0; room < 1000; room++) {
      const idle = await Client.join(server.url, { room: `${room}` });
      for (const kept of [idle.texts, idle.frames, idle.messages]) kept.length = 0; // it is this process that forgets
    }
    expect(memoryOf(server)).toBeLessThan(200);
  });
});

describe("a flooder", () => {
  test("is slowed to CHAT_RATE, but not with 0, and nothing of it is lost or changes places", async () => {
    for (const [rate, plain, count, length] of [
      [1000, false, 13_000, 1],
      [20, true, 260, 16 * 1024],
      [0, false, 12_000, 1],
    ] as const) {
      const { url } = await start({ rate });
      const [ann, flooder] = await joinAll(url, {}, { plain });
      flooder.postAll(count, (n) => `m${n}`.padEnd(length));
      if (plain) await ann.untilMessages(1);
      else await flooder.settle(); // its pings are answered while its posts wait
      if (rate > 0) expect(ann.messages.length).toBeLessThan(count);
      if (rate === 1000) for (let i = 0; i < 5000; i++) flooder.send({ type: "ping" });
      expect(textsOf(await ann.untilMessages(count))).toEqual(numbered(1, count).map((text) => text.padEnd(length)));
      expect(flooder.all("pong").length).toBeLessThan(5000); // pings are slowed too
    }
  });

  test("is slowed by its address too, however many connections it opens; others do not wait", async () => {
    const { url } = await start({ rate: 10, proxies: 1 });
    const from = (address: string) => Client.join(url, { headers: { "X-Forwarded-For": address } });
    const ann = await from("192.0.2.1");
    const flooders = await Promise.all(Array.from({ length: 100 }, () => from("198.51.100.7")));
    for (const [i, flooder] of flooders.entries()) for (let n = 1; n <= 16; n++) flooder.post(`${i}:${n}`);
    for (const flooder of flooders) await flooder.settle();
    await ann.say("not slowed");
    expect(ann.messages.length).toBeLessThan(1600);
    const texts = textsOf(await ann.untilMessages(1601));
    for (const i of flooders.keys()) {
      const own = texts.filter((text) => text.startsWith(`${i}:`));
      expect(own).toEqual(Array.from({ length: 16 }, (_, n) => `${i}:${n + 1}`));
    }
  });

  test("makes neither its queue nor its unread answers large, whatever it sends", async () => {
    const long = "x".repeat(60_000);
    const post = { type: "post", key: "k", text: "x".repeat(16_000) };
    const others = [{ ...post, text: long }, { ...post, key: long }, { type: "name", name: long }, { type: "typing" }];
    const queued = [post, ...others].map((frame) => rawFrame(JSON.stringify(frame)));
    const answered = ['{"type":"ping"}', '{"type":"page","before":101}'].map((frame) => rawFrame(frame));
    const get = Buffer.from("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    for (const bytes of [...queued, ...answered, rawFrame("p".repeat(125), 9), get]) {
      const isQueued = queued.includes(bytes);
      const server = await spawnServer({ CHAT_RATE: isQueued ? "1" : "0" });
      const ann = await Client.join(server.url);
      if (!isQueued) ann.postAll(100, () => post.text);
      await ann.untilMessages(isQueued ? 0 : 100);
      const before = memoryOf(server);
      const sender = await (bytes === get ? Client.open(server.url) : Client.join(server.url));
      sender.socket.pause();
      const many = Buffer.concat(Array(isQueued ? Math.ceil(1e6 / bytes.length) : 600).fill(bytes));
      for (let i = 0; i < 150 && !sender.ended && sender.socket.writableLength < 20e6; i++) {
        sender.raw(many); // until it is cut, or read no further
        await ann.settle();
      }
      expect([`${bytes.subarray(0, 40)}`, memoryOf(server) - before < 48]).toEqual([`${bytes.subarray(0, 40)}`, true]);
      server.kill("SIGKILL");
    }
  });
});

// ─── Broken and hostile clients ──────────────────────────────────────────────────────────────────────────────────────

describe("a broken handshake", () => {
  test("gets the right status and a sentence, and nobody notices", async () => {
    const server = await spawnServer();
    const ann = await Client.join(server.url);
    const good = handshake(server.url);
    const without = (header: RegExp) => good.replace(header, "");
    const room = (path: string) => good.replace("/ws/?", `/ws/${path}`);
    const cases: [what: string, request: string, status: number][] = [
      ["version 8", good.replace("Version: 13", "Version: 8"), 426],
      ["no upgrade", without(/Upgrade: websocket\r\n/), 426],
      ["a PUT of the page", good.replace("GET /ws/", "PUT /"), 405],
      ["another subprotocol", good.replace("chat.v1", "chat.v2"), 400],
      ["no key", without(/Sec-WebSocket-Key.*\r\n/), 400],
      ["a room that is too long", room("%E5%9B%A2".repeat(65)), 400],
      ["a room with a NUL", room("a%00b"), 400],
      ["a room that is no UTF-8", room("%ff"), 400],
      ["a bad name", good.replace("?", "?name=%00"), 400],
      ["a page of another origin", good.replace("Host:", "Origin: https://elsewhere.example\r\nHost:"), 403],
      ["a Host that is half an address", good.replace(/Host: .*\r\n/, "Host: [\r\n"), 400],
      ["a page from a Host that is none", "GET / HTTP/1.1\r\nHost: %zz\r\n\r\n", 400],
    ];
    for (const [what, request, status] of cases) {
      const client = await Client.open(server.url);
      client.raw(request);
      await client.until(`an answer to ${what}`, () => client.status !== undefined);
      expect([what, client.status]).toEqual([what, status]);
      expect(client.answer).toMatch(/\r\n\r\n[A-Z].+[.]\n$/);
      if (status === 405) expect(client.answer).toMatch(/^allow: GET, HEAD\r$/im);
      client.drop();
    }
    await ann.settle();
    expect([server.exitCode, server.errors]).toEqual([null, ""]); // no stack for what others do wrong
  });

  test("and what else is never finished, half open or left in the middle keeps nobody out and leaves nothing behind", async () => {
    const server = await spawnServer();
    const ann = await Client.join(server.url);
    const openFiles = () => readdirSync(`/proc/${server.pid}/fd`).length;
    const [memory, open] = [memoryOf(server), openFiles()];
    const unfinished = await Promise.all(Array.from({ length: 1000 }, () => Client.open(server.url)));
    for (const [i, client] of unfinished.entries()) client.raw(handshake(server.url).slice(0, i % 200));
    const joined = await Promise.all(Array.from({ length: 40 }, () => Client.join(server.url, { name: "x" })));
    for (const [i, client] of joined.entries()) {
      if (i % 4 === 0) for (let k = 0; k < 12; k++) client.send("bad");
      if (i % 4 === 1) client.raw(rawFrame("x".repeat(1000)).subarray(0, 500));
      if (i % 4 === 2) client.socket.end();
      if (i % 4 === 3) client.socket.resetAndDestroy();
    }
    await ann.settle();
    for (const client of [...unfinished, ...joined]) client.drop();
    await eventually("that all are closed", () => openFiles() <= open + 2);
    await ann.sees(1, "Guest");
    expect(memoryOf(server) - memory).toBeLessThan(32);
  });
});

test("A broken frame ends the connection with the code of RFC 6455, in both dialects, and nobody else's.", async () => {
  const { url } = await start({ rate: 0 });
  const ann = await Client.join(url);
  const cases: [what: string, code: number, ...frames: Buffer[]][] = [
    ["binary", 1003, rawFrame("x", 2)],
    ["no UTF-8", 1007, rawFrame(Buffer.from([0x22, 0xff, 0x22]))],
    ["64 KiB and one byte", 1009, rawFrame("x".repeat(65_537))],
  ];
  for (const plain of [false, true]) {
    const long: typeof cases = plain ? [["a text of more than 16 KiB", 1009, rawFrame("团".repeat(5462))]] : [];
    for (const [what, code, ...frames] of [...cases, ...long]) {
      const client = await Client.join(url, { plain });
      for (const frame of frames) client.raw(frame);
      client.post("after the end", "never");
      expect([what, await client.end()]).toEqual([what, code]);
    }
  }
  await ann.say("still here");
  expect(textsOf(ann.messages)).toEqual(["still here"]);
});

test("Whatever a generator makes up is answered or refused, and the others see only what is sound.", async () => {
  const SEED = Number(process.env.SEED ?? 20260101);
  let state = SEED;
  const random = () => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) / 2 ** 32; // the same in every run
  const int = (below: number) => Math.floor(random() * below);
  const odds = (chance: number) => random() < chance;
  const strings = ["hi", "", " ", " x", "a\0", "\ud800", "e\u0301", "\u2028", "🙂", "团".repeat(33), "團".repeat(5462)];
  const odd = `{} [] {"a":1} 0 -1 1e999 1.5 01 NaN null true "" " " "type" "post" "text" "from" "__proto__" "constructor"
    "\\ud800" "\\x" "\u0001" "unfinished 'single' { } [ ] , : \\ ${"[".repeat(3000)}`;
  const tokens = odd.split(/[ \n]+/);
  let tried = 0;
  /** A frame of the protocol with up to three of its tokens changed. */
  const json = () => {
    const [key, text] = [`k${odds(0.1) ? 0 : tried}`, strings[int(strings.length)]];
    const post = { type: "post", key, text };
    const good = [post, post, { type: "page", before: 1 }, { type: "name", name: text }, { type: "typing" }];
    const parts = JSON.stringify(good[int(5)]).split(/([{}:,])/);
    for (let n = int(4); n > 0; n--) parts.splice(int(parts.length), int(2), tokens[int(tokens.length)]!);
    return parts.join("");
  };
  const server = await spawnServer({ CHAT_RATE: "0" });
  const ann = await Client.join(server.url, { name: "Ann" });
  const attack = async () => {
    const plain = odds(0.2);
    const client = await Client.join(server.url, { plain });
    const careful = odds(0.6); // its frames are in order, what they say is not
    for (let k = 1 + int(12); k > 0; k--, tried++) {
      const options = careful ? {} : { fin: odds(0.8), mask: odds(0.95), rsv: odds(0.05) ? int(8) : 0 };
      const frame = rawFrame(json(), careful ? 1 : int(16), options);
      if (!careful) frame[int(Math.min(40, frame.length))] = int(256); // in the header, the mask or the payload
      client.raw(careful || odds(0.9) ? frame : frame.subarray(0, int(frame.length)));
    }
    if (careful && !plain) await client.settle();
    client.drop();
  };
  for (let round = 0; round < 100; round++) {
    await Promise.all(Array.from({ length: 20 }, () => attack().catch(() => {}))); // an early end is an answer too
    await ann.settle();
  }
  await ann.sees(1, "Ann"); // the others have left: whatever they sent was received
  await ann.say("the end");
  expectDense(ann.messages);
  expect(await readLog(server.url)).toEqual(ann.messages);
  for (const { seq, at, name, text, key = "k", ...rest } of ann.messages) {
    expect([typeof seq, typeof at, rest]).toEqual(["number", "number", {}]);
    expect(text.isWellFormed() && name.isWellFormed() && name === name.trim() && [...name].length <= 32).toBe(true);
    expect([Buffer.byteLength(text) <= 16 * 1024, key]).toEqual([true, expect.stringMatching(/^[\w-]{1,64}$/)]);
  }
  expect(ann.messages.length).toBeGreaterThan(100);
  expect([server.exitCode, server.errors]).toEqual([null, ""]);
});

// ─── Several servers, one chat ───────────────────────────────────────────────────────────────────────────────────────

type Scene = Awaited<ReturnType<typeof stage>>;

/** Three servers of one Redis: the second may be killed, the third reaches Redis over a wire. People talk on all. */
async function stage(people = 9) {
  const redis = await ownRedis();
  const wire = await Wire.to(redis);
  const settings = { CHAT_RATE: "0", REDIS_URL: redis.url };
  const config = { ...readConfig(settings), port: 0, logLevel: "silent" } as const;
  const wired = { ...settings, REDIS_URL: `redis://${wire.address}` };
  const servers = await Promise.all([start(config), spawnServer(settings), spawnServer(wired)]);
  return { redis, wire, servers, all: talkers(people, servers) };
}

async function expectClosed(all: Talker[]): Promise<void> {
  for (const { closes } of all) closes.splice(0);
  await eventually("a close of every connection", () => all.every(({ closes }) => closes.length > 0));
  for (const { closes } of all) expect(closes[0]).toBe(1013);
}

/** What happens, while people talk on all, to a server, to Redis, or to the wire between the two. */
const FAULTS: Record<string, (scene: Scene) => unknown> = {
  "a server is killed with kill -9": async ({ servers, all }) => {
    servers[1] = await restart(servers[1], "SIGKILL", () => allTalk(all, 5));
  },
  "a server sleeps while the others talk": async ({ servers, all }) => {
    servers[1].kill("SIGSTOP");
    const others = all.filter(({ at }) => at % 3 !== 1);
    await allTalk(others, 100);
    servers[1].kill("SIGCONT");
  },
  "Redis is killed with kill -9": ({ redis }) => redis.restart(),
  "Redis is frozen": async ({ redis, all }) => {
    redis.signal("SIGSTOP");
    await expectClosed(all);
    redis.signal("SIGCONT");
  },
  "Redis takes no writes, because it is full or a replica": async ({ redis, all }) => {
    await redis.command("CONFIG", "SET", "maxmemory", "1");
    await expectClosed(all);
    await redis.command("CONFIG", "SET", "maxmemory", "0");
    await allTalk(all, 3);
    await redis.command("REPLICAOF", "127.0.0.1", "1"); // of a master that is not there
    await expectClosed(all);
    await redis.command("REPLICAOF", "NO", "ONE");
  },
  "the connections of one server are cut, or silent for a moment and then cut": async ({ wire, all }) => {
    for (let time = 0; time < 5; time++) {
      const others = all.filter(({ at }) => at % 3 !== 2);
      if (time % 2 === 0) wire.silence();
      await allTalk(others, 5);
      wire.cut();
      wire.speak();
    }
  },
  "the connections of one server are silent": async ({ wire, all, servers }) => {
    const listener = await joinWhenOpen(servers[2].url);
    wire.silence();
    expect(await listener.end()).toBe(1013); // nobody stays on the deaf server
    await allTalk(all, 10);
    wire.speak();
    await joinWhenOpen(servers[2].url);
    expect(wire.cut()).toBeLessThanOrEqual(2);
  },
};

describe.skipIf(!REDIS_SERVER)("nothing is lost, doubled or misplaced", () => {
  for (const [what, fault] of Object.entries(FAULTS)) {
    test(`while ${what}`, async () => {
      const scene = await stage();
      for (let i = 0; i < 2; i++) {
        await allTalk(scene.all, 5);
        await fault(scene);
      }
      await allTalk(scene.all, 10);
      await expectOneChat(scene.all, scene.servers);
    });
  }

  test("when one notification to one server is lost: its people come back, and nobody has a hole", async () => {
    const { wire, servers, all } = await stage();
    await allTalk(all, 3);
    const listener = await Client.join(servers[2].url);
    const { epoch } = await listener.first("hello");
    await wire.lose('"text of t');
    expect(await listener.end()).toBe(1013);
    const back = await Client.join(servers[2].url, { epoch, after: listener.messages.at(-1)!.seq });
    expect((await back.first("hello")).resumed).toBe(true);
    expectDense([...listener.messages, ...back.messages]);
    await allTalk(all, 10);
    await expectOneChat(all, servers);
    for (const { records } of all) expect(records).toHaveLength(1);
  });
});

/** How Redis may lose its data, of which it has only what was there at the last `SAVE`. */
const LOSSES: Record<string, (redis: Redis) => unknown> = {
  "is started again empty": async (redis) => {
    rmSync(join(redis.folder, "dump.rdb"), { force: true });
    await redis.restart("--appendonly", "no");
  },
  "is flushed": (redis) => redis.command("FLUSHALL"),
  "is started again with an older state": (redis) => redis.restart("--appendonly", "no"),
};

describe.skipIf(!REDIS_SERVER)("a Redis that comes back with less than it had", () => {
  for (const [what, lose] of Object.entries(LOSSES)) {
    test(`because it ${what}: it is another log for everyone, in quiet rooms and for those who are away too`, async () => {
      const { redis, servers, all } = await stage();
      const away = await Client.join(servers[0].url, { room: "left" });
      await away.say("one");
      await redis.command("CONFIG", "SET", "appendonly", "no");
      rmSync(join(redis.folder, "appendonlydir"), { recursive: true });
      await redis.command("SAVE");
      await away.say("two");
      await away.leave(); // no server has the room open, or remembers how far it was
      for (let loss = 0; loss < 2; loss++) {
        await allTalk(all, 10);
        const quiet = await Promise.all(servers.map(({ url }) => joinWhenOpen(url, { room: "quiet" })));
        await lose(redis);
        for (const client of quiet) expect(await client.end()).toBe(1013);
      }
      await allTalk(all, 10);
      await expectOneChat(all, servers);
      for (const { records } of all) expect(records.length).toBeGreaterThanOrEqual(3);
      const { epoch } = await away.first("hello");
      const other = await joinWhenOpen(servers[1].url, { room: "left" });
      await other.say("new");
      await other.say("newer");
      for (const { url } of servers) {
        const { resumed } = await (await Client.join(url, { room: "left", epoch, after: 2 })).first("hello");
        expect(resumed).toBe(false);
      }
    });
  }
});

describe.skipIf(!REDIS_SERVER)("a server without its Redis", () => {
  test("tells people to try again, the operator once, and goes on when it is there", async () => {
    const redis = await ownRedis();
    await redis.kill();
    const server = await spawnServer({ REDIS_URL: redis.url, CHAT_RATE: "0" });
    for (let i = 0; i < 10; i++) expect(await (await Client.connect(server.url)).end()).toBe(1013);
    expect(server.errors.trim().split("\n").length).toBeLessThanOrEqual(2); // not for each of them
    const all = talkers(4, [server]);
    await redis.run();
    await allTalk(all, 5);
    await expectOneChat(all, [server]);
  });

  test("ends by itself when it is stopped while Redis is frozen, with exit code 0", async () => {
    const redis = await ownRedis();
    const server = await spawnServer({ REDIS_URL: redis.url });
    const ann = await Client.join(server.url);
    redis.signal("SIGSTOP");
    ann.post("too late");
    await ann.settle();
    server.kill("SIGTERM");
    expect(await within(server.exited, "the server's end")).toBe(0);
  });

  test("is not one because one room, or a notice of one, cannot be read: the others go on, and no outage is told", async () => {
    const redis = await ownRedis();
    const server = await spawnServer({ REDIS_URL: redis.url });
    await (await Client.join(server.url, { room: "broken" })).leave();
    for (const key of await redis.keys("*:broken")) await redis.command("SET", key, "nothing of this chat");
    for (let i = 0; i < 5; i++) {
      expect(await (await Client.connect(server.url, { room: "broken" })).end()).toBe(1013);
      await (await Client.join(server.url, { room: `sound ${i}` })).say("hi");
    }
    const [odd, other, sound] = await joinAll(server.url, { room: "odd" }, { room: "other" }, { room: "sound" });
    await redis.command("PUBLISH", "chat:state:odd", "no json");
    await redis.command("HSET", "chat:state:other", "epoch", "another");
    other.post("hi");
    expect([await odd.end(), await other.end()]).toEqual([1013, 1013]);
    await sound.say("hi");
    expect(server.errors).toMatch(/^(room "(broken|odd|other)" (cannot be used: .+|can be used again[.])\n)+$/);
  });
});

describe.skipIf(!REDIS_SERVER)("with Redis", () => {
  test("presence adds up counts and names, passes typing on, and shows who leaves, is renamed, or was on a server that died", async () => {
    const { servers } = await stage(0);
    const [ann, bo, cy, second] = await joinAll(servers, "Ann", "Bo", "Cy", "Ann");
    const plain = await Client.join(servers[1].url, { plain: true });
    for (const client of [ann, bo, cy, second]) await client.sees(5, "Ann", "Ann", "Bo", "Cy");
    ann.send({ type: "typing" });
    for (const client of [bo, second]) expect(await client.first("typing")).toEqual({ type: "typing", name: "Ann" });
    ann.post("done");
    for (const client of [ann, bo, cy]) await client.untilMessages(1);
    expect([ann, bo, cy].map((client) => client.all("typing").length)).toEqual([0, 1, 1]);
    await plain.leave();
    await second.leave();
    bo.send({ type: "name", name: "Bea" });
    for (const client of [ann, bo, cy]) await client.sees(3, "Ann", "Bea", "Cy");
    servers[1].kill("SIGTERM");
    for (const client of [ann, cy]) await client.sees(2, "Ann", "Cy");
    servers[2].kill("SIGKILL");
    await ann.sees(1, "Ann");
  });

  test("presence is right again after people were sent away and came back", async () => {
    const { wire, servers } = await stage(0);
    const [ann] = await joinAll(servers, "Ann");
    for (let time = 0; time < 3; time++) {
      const cy = await joinWhenOpen(servers[2].url, { name: "Cy", me: "c".repeat(22) });
      for (const client of [ann, cy]) await client.sees(2, "Ann", "Cy");
      wire.cut();
      expect(await cy.end()).toBe(1013);
    }
    await ann.sees(1, "Ann");
  });

  test("a room leaves after CHAT_IDLE_DAYS, never with 0, and stays while somebody is in it", async () => {
    const redis = await ownRedis();
    for (const idleDays of [7, 0]) {
      const room = `${idleDays} days`;
      const { url } = await start({ redisUrls: [redis.url], idleDays });
      await (await Client.join(url, { room })).say("hi", "k");
      const keys = await redis.keys(`*:${room}`);
      const ttls = () => Promise.all(keys.map((key) => redis.command("TTL", key) as Promise<number>));
      for (const ttl of await ttls()) expect(ttl / 86400 > (idleDays ? 6.9 : 9999)).toBe(true);
      for (const key of keys) await redis.command("EXPIRE", key, "60");
      await Client.join((await start({ redisUrls: [redis.url], idleDays })).url, { room }); // another server opens it
      for (const ttl of await ttls()) expect([room, ttl > 3000]).toEqual([room, true]);
      const quiet = await Client.join(url, { room: `quiet ${room}` });
      await redis.command("DEL", `chat:state:quiet ${room}`); // nobody has posted for an hour
      await quiet.say("the first");
    }
  });

  test("a thousand rooms lie evenly on three Redis, whatever the order of the list", async () => {
    const redises = [await ownRedis(), await ownRedis(), await ownRedis()];
    const urls = redises.map(({ url }) => url);
    const line = (room: number) => JSON.stringify({ room: `room ${room}`, seq: 1, at: 1, name: "Ann", text: "hi" });
    const lines = Array.from({ length: 1000 }, (_, room) => line(room)).join("\n");
    expect(await importMessages(readConfig({ REDIS_URL: `${urls}` }), lines)).toEqual([]);
    const counts = await Promise.all(redises.map(async (redis) => (await redis.keys("chat:messages:*")).length));
    for (const count of counts) expect(Math.abs(count - 1000 / 3)).toBeLessThan(1000 / 3 / 5);
    expect(await importMessages(readConfig({ REDIS_URL: `${urls.toReversed()}` }), lines)).toHaveLength(1000);
    const away = importMessages(readConfig({ REDIS_URL: `${urls},redis://:a@127.0.0.1:1` }), lines);
    await expect(away).rejects.toThrow("REDIS_URL=redis://…@127.0.0.1:1: Connection closed.");
  });

  test("several Redis share the rooms, which move when there is one more", async () => {
    const redises = [await ownRedis(), await ownRedis()] as const;
    const redisUrls = redises.map(({ url }) => url);
    const servers = [await start({ redisUrls }), await start({ redisUrls: redisUrls.toReversed() })];
    const homes = new Set<number>();
    for (let room = 0; room < 30; room++) {
      const [ann, bo] = await joinAll(servers, { room: `${room}` }, { room: `${room}` });
      await ann.say("hi");
      await bo.untilMessages(1);
      const isHome = await Promise.all(redises.map(async (redis) => (await redis.keys(`*:${room}`)).length > 0));
      expect(isHome.toSorted()).toEqual([false, true]);
      homes.add(isHome.indexOf(true));
    }
    expect(homes.size).toBe(2);
    const { out } = await run({ REDIS_URL: `${redisUrls}` }, ["export"]);
    const more = { REDIS_URL: `${redisUrls},${(await ownRedis()).url}`, CHAT_PREFIX: "moved:" };
    const lines = /^(Room ".+" belongs on redis:.+: an import moves it there[.]\n)+30 messages exported[.]\n$/;
    expect((await run({ ...more, CHAT_PREFIX: "" }, ["export"])).said).toMatch(lines);
    expect(await importMessages(readConfig(more), out)).toEqual([]);
    const { url } = await start({ ...readConfig(more), port: 0, logLevel: "silent" });
    for (let room = 0; room < 30; room++) expect(textsOf(await readLog(url, `${room}`))).toEqual(["hi"]);
  });

  test("one of three Redis is killed under load: its rooms recover, and the others notice nothing", async () => {
    const redises = [await ownRedis(), await ownRedis(), await ownRedis()] as const;
    const redisUrls = redises.map(({ url }) => url);
    const servers = [await start({ redisUrls, rate: 0 }), await start({ redisUrls: redisUrls.toReversed(), rate: 0 })];
    const rooms = Array.from({ length: 20 }, (_, room) => talkers(2, servers, 100, `${room}`));
    await allTalk(rooms.flat(), 3);
    const hit = new Set((await redises[0].keys("chat:state:*")).map((key) => key.slice("chat:state:".length)));
    const [lost = [], others = []] = [true, false].map((isHit) =>
      rooms.filter(([some]) => hit.has(some!.room) === isHit),
    );
    await redises[0].kill();
    await allTalk(others.flat(), 10);
    await redises[0].run();
    await allTalk(rooms.flat(), 3);
    for (const room of rooms) await expectOneChat(room, servers);
    const starts = (some: Talker[][]) => new Set(some.flat().map(({ records }) => records.length));
    expect([starts(lost), starts(others)]).toEqual([new Set([2]), new Set([1])]);
    for (const { closes } of others.flat()) expect(closes).toEqual([]);
  });

  test("servers share one port with REUSE_PORT=1, and both get clients", async () => {
    const redis = await ownRedis();
    const env = { REDIS_URL: redis.url, PORT: `${await freePort()}`, REUSE_PORT: "1", LOG_LEVEL: "info" };
    const servers = await Promise.all([spawnServer(env), spawnServer(env)]);
    const clients: Client[] = [];
    while (!servers.every(({ output }) => output.split("joined").length > 3)) {
      clients.push(await Client.join(servers[0].url)); // to one of them, as the kernel pleases
    }
    clients[0]!.post("to all");
    for (const client of clients) expect(textsOf(await client.untilMessages(1))).toEqual(["to all"]);
  });
});

// ─── Operation ───────────────────────────────────────────────────────────────────────────────────────────────────────

describe("an operator", () => {
  test("is told which value is bad and what is allowed, in one line, with exit code 1", async () => {
    const bad = `PORT=http PORT=65536 PORT=-1 CHAT_SYNC=off CHAT_HISTORY=0 CHAT_HISTORY=1e3 CHAT_RATE=1.5 LOG_LEVEL=verbose
      REUSE_PORT=01 REUSE_PORT=2 REDIS_URL=localhost CHAT_ORIGINS=https://a.example/path CHAT_ORIGINS=*.a.example`;
    for (const setting of bad.split(/\s+/)) {
      const [name, value] = setting.split("=") as [string, string];
      expect(() => readConfig({ REDIS_URL: "redis://localhost", [name]: value })).toThrow(`${setting}: must be `);
    }
    expect(() => readConfig({ CHAT_PASSWROD: "x" })).toThrow("CHAT_PASSWROD: no such setting");
    expect(() => readConfig({ TLS_CERT: "cert.pem" })).toThrow("TLS_CERT and TLS_KEY: ");
    expect(() => readConfig({ CHAT_PASSWORD: "a", CHAT_OPERATOR: "a" })).toThrow("CHAT_OPERATOR: must differ");
    expect(() => readConfig({ REDIS_URL: "http://us:p,a@ss@localhost" })).toThrow("REDIS_URL=http://…@localhost: must");
    const read = readConfig({ HOST: "[::1]", PORT: "", CHAT_DB: " " });
    expect([read.host, read.port, read.db, Object.isFrozen(read)]).toEqual(["::1", 8080, "chat.sqlite", true]);
    const said = "CHAT_RATE=many: must be a whole number from 0 to 1000000.\n";
    expect(await run({ CHAT_RATE: "many" })).toEqual({ code: 1, out: "", said });
  });

  test("who embeds the chat is told by an error why it does not start", async () => {
    const port = Number(new URL((await start()).url).port);
    await expect(start({ port })).rejects.toThrow(`PORT=${port}: cannot listen: `);
    await expect(start({ host: "203.0.113.1" })).rejects.toThrow("HOST=203.0.113.1 PORT=0: cannot listen: ");
    await expect(exported({ db: join(FOLDER, "nothing.sqlite") })).rejects.toThrow(": there is no such database");
  });

  test("sees at each LOG_LEVEL what it is for, and no sign that a terminal obeys", async () => {
    const printed = spyOn(console, "log").mockImplementation(() => {});
    started.push(() => printed.mockRestore());
    const joined = " joined the lobby (Ann, no id)";
    const said = 'the lobby #1 Ann: "a\\nb\\u{9b}c\\u{202e}d\\u{2028}e"';
    const left = " left the lobby (1005)";
    const lines = { silent: [], error: [], info: [joined, left], debug: [joined, said, left] };
    for (const logLevel of ["silent", "error", "info", "debug"] as const) {
      printed.mockClear();
      const chat = await start({ logLevel });
      const ann = await Client.join(chat.url, { name: "Ann" });
      await ann.say("a\nb\u009bc\u202ed\u2028e");
      await ann.leave();
      await chat.stop();
      expect(printed.mock.calls).toEqual(lines[logLevel].map((line) => [expect.stringContaining(line)]));
    }
  });

  test("stops the server with SIGTERM and SIGINT: what was said is stored, sockets get 1001, also with a client that never answers", async () => {
    for (const signal of ["SIGTERM", "SIGINT"] as const) {
      const db = newFile();
      const server = await spawnServer({ CHAT_DB: db });
      expect(server.output).toMatch(/^The chat is open: http:\/\/localhost:\d+\/\n$/);
      const [ann, plain, silent] = await joinAll(server.url, {}, { plain: true }, {});
      silent.socket.pause();
      await ann.say("last words");
      server.kill(signal);
      expect([await ann.end(), await plain.end()]).toEqual([1001, 1001]);
      expect(await within(server.exited, "the end")).toBe(0);
      expect(textsOf(await readLog((await start({ db })).url))).toEqual(["last words"]);
    }
  });

  test("loses the rooms that nobody used for CHAT_IDLE_DAYS, none with 0, and never at the start: a backup is not emptied", async () => {
    const printed = spyOn(console, "log").mockImplementation(() => {});
    started.push(() => printed.mockRestore());
    const db = newFile();
    const at = Date.now() - 8 * 24 * 60 * 60 * 1000;
    const lines = ["used", "old", "young"].map((room) => ({ room, seq: 1, at, name: "Ann", text: "hi" }));
    lines[2]!.at = Date.now();
    await importMessages({ ...readConfig({}), db }, lines.map((line) => JSON.stringify(line)).join("\n"));
    for (const row of ["0 1", "9 1", "7 86400000", "7 1000"]) {
      const [idleDays, expireMs] = row.split(" ").map(Number) as [number, number];
      const { url, stop } = await start({ db, idleDays, expireMs, logLevel: "info" });
      await Client.join(url, { room: "used" });
      const told = () => printed.mock.calls.some(([line]) => `${line}`.startsWith('Room "old" was forgotten: '));
      if (expireMs === 1000) await eventually("the end of the room", told);
      expect([idleDays, (await readLog(url, "old")).length]).toEqual([idleDays, expireMs === 1000 ? 0 : 1]);
      await stop();
    }
    expect((await exported({ db })).map(({ room }) => room)).toEqual(["used", "young"]);
  });
});

// ─── Commands: export and import, the executable ──────────────────────────────────────────────────────────────────────

function exported(config: Partial<Config>) {
  return Array.fromAsync(exportMessages({ ...readConfig({}), ...config }));
}

describe("export and import", () => {
  test.skipIf(!REDIS_SERVER)("move a running chat from SQLite to Redis, and to SQLite, without a loss", async () => {
    const [sqlite, redis, back] = [await STORES.SQLite(), await STORES.Redis(), await STORES.SQLite()];
    const { url } = await start({ ...sqlite.config, rate: 0, history: 1200 });
    const [ann, plain] = await joinAll(url, { name: "安", me: "an" }, { room: "团 a*[b]", plain: true });
    ann.postAll(2500, (n) => `m${n} \0 "\n" 🙂`);
    await plain.say("from a plain socket");
    await ann.untilMessages(2500);
    ann.send({ type: "remove", key: "r", seq: 2400 });
    await ann.untilMessages(2501);
    const lines = await exported({ ...sqlite.config, history: 1200 });
    const text = lines.map((line) => `${JSON.stringify(line)}\n`).join("");
    const said = "1201 messages exported.\n";
    expect(await run({ ...sqlite.env, CHAT_HISTORY: "1200" }, ["export"])).toEqual({ code: 0, out: text, said });
    const full = Bun.spawn([process.execPath, SERVER, "export"], { env: sqlite.env, stdout: Bun.file("/dev/full") });
    expect(await full.exited).toBe(1); // not a backup that is cut off
    for (const { config } of [redis, back]) {
      expect(await importMessages({ ...readConfig({}), ...config }, text)).toEqual([]);
      const same = (await exported(config)).toSorted((a, b) => b.room.localeCompare(a.room) || a.seq - b.seq);
      expect(same).toEqual(lines.toSorted((a, b) => b.room.localeCompare(a.room) || a.seq - b.seq));
      const moved = await start(config);
      const again = await Client.join(moved.url, { epoch: (await ann.first("hello")).epoch, after: 2400 });
      const { resumed, first, last, messages } = await again.first("hello");
      expect([resumed, first, last, messages.length]).toEqual([false, 1302, 2501, 100]); // another store is another log
      again.post("again", "k2400");
      expect((await again.first("ack")).seq).toBe(2400);
    }
  });

  test("refuse a broken line with its number, a room that is there, and a store in use, and change nothing", async () => {
    const line = { room: "", seq: 1, at: 1, name: "Ann", from: "abcdefghijkl", text: "hi", key: "k" };
    const broken: [object | null, string][] = [
      [null, 'it has no valid "seq"'],
      [{ room: "a\0" }, 'it has no valid "room"'],
      [{ seq: 3 }, "it does not follow the one before"],
      [{ at: "now" }, 'it has no valid "at"'],
      [{ name: " " }, 'it has no valid "name"'],
      [{ from: "Ann" }, 'it has no valid "from"'],
      [{ text: "x".repeat(16385) }, 'it has no valid "text"'],
      [{ removed: true }, 'it has no valid "text"'],
      [{ text: "", removes: 2 }, 'it has no valid "removes"'],
      [{ key: "a b" }, 'it has no valid "key"'],
    ];
    for (const [name, make] of Object.entries(STORES)) {
      if (name === "Redis" && !REDIS_SERVER) continue;
      const { config, env } = await make();
      await (await start(config)).stop(); // makes the database
      const take = (text: string) => importMessages({ ...readConfig({}), ...config }, text);
      const taken = (...lines: unknown[]) => take(lines.map((each) => JSON.stringify(each)).join("\n"));
      for (const [change, why] of broken) {
        const second = change && { ...line, seq: 2, ...change };
        await expect(taken(line, second)).rejects.toThrow(`Line 2: ${why}. Nothing was imported.`);
      }
      await expect(take("{no json")).rejects.toThrow(/^Line 1: .+ Nothing was imported[.]$/);
      expect(await exported(config)).toEqual([]);
      expect(await taken(line)).toEqual([]);
      expect(await taken(line, { ...line, room: "new" })).toEqual([""]);
      expect(await exported(config)).toHaveLength(2);
      const file = newFile();
      await Bun.write(file, JSON.stringify(line));
      const said = 'These rooms already exist, and only the others were imported: [""].\n';
      expect(await run(env, ["import", file])).toEqual({ code: 1, out: "", said });
      if (name === "Redis") continue;
      await start(config);
      expect((await run(env, ["import", file])).said).toEndWith("is a second server running?\n");
    }
  });
});

test("The command line tells its commands and its settings, and refuses others.", async () => {
  const { out: help } = await run({}, ["--help"]);
  expect(help).toMatch(/export > chat/);
  const variables = `PORT HOST CHAT_DB CHAT_SYNC REDIS_URL CHAT_PREFIX CHAT_PASSWORD CHAT_OPERATOR CHAT_ORIGINS CHAT_PROXIES
    CHAT_HISTORY CHAT_IDLE_DAYS CHAT_RATE TLS_CERT TLS_KEY REUSE_PORT LOG_LEVEL`;
  for (const variable of variables.split(/\s+/)) expect(help).toMatch(new RegExp(`^  ${variable} +[^ ]`, "m"));
  for (const words of ["expotr", "export x", "import x y"]) {
    await expect(main(words.split(" "))).rejects.toThrow(`${words}: no such command; --help lists them.`);
  }
  await expect(main(["import", join(FOLDER, "no such file")])).rejects.toThrow(/no such file/);
});

test("One executable is built, which serves the chat from an empty folder.", async () => {
  const file = join(FOLDER, "executable", "chat");
  const build = ["build", "--compile", SERVER, "--outfile", file];
  expect(Bun.spawnSync([process.execPath, ...build]).exitCode).toBe(0);
  const server = Bun.spawn([file], { cwd: join(FOLDER, "executable"), env: { PORT: "0" }, stdout: "pipe" });
  started.push(() => server.kill("SIGKILL"));
  const { value } = await within(server.stdout.getReader().read(), "its address");
  const url = /http\S+/.exec(new TextDecoder().decode(value))![0];
  expect(await (await fetch(url)).text()).toBe(await Bun.file(join(import.meta.dir, "index.html")).text());
  await (await Client.join(url)).say("hi");
});

// ─── The page in Chromium ────────────────────────────────────────────────────────────────────────────────────────────

function textOf(tab: Tab, selector: string): Promise<string> {
  return tab.run((selector) => document.querySelector(selector)?.textContent ?? "", selector);
}

async function untilSays(tab: Tab, selector: string, text: string): Promise<void> {
  await eventually(`"${text}" in ${selector}`, async () => (await textOf(tab, selector)) === text);
}

function valueOf(tab: Tab, selector = "#text"): Promise<string> {
  return tab.run((selector) => document.querySelector<HTMLTextAreaElement>(selector)!.value, selector);
}

async function click(tab: Tab, selector: string): Promise<void> {
  await tab.run((selector) => document.querySelector<HTMLElement>(selector)!.click(), selector);
}

/** A chat, Bo in its lobby, and a tab there. */
async function startWithTab(options: TabOptions = {}, config: Partial<Config> = {}) {
  const { url } = await start(config);
  const bo = await Client.join(url, { name: "Bo" });
  return { url, bo, tab: await Tab.join(url, options) };
}

/** A chat with messages of a filler in its lobby, and a tab there, at an address such as #42. */
async function startWithHistory(count: number, text?: (n: number) => string, hash = "", history = 10_000) {
  const { url } = await start({ rate: 0, history });
  const filler = await fill(url, "", count, text);
  return { url, filler, tab: await Tab.join(url + hash) };
}

/** The element that has the focus, by what tells it from others. */
function focused(tab: Tab): Promise<string> {
  return tab.run(() => {
    const { id, dataset, className } = document.activeElement as HTMLElement;
    return id || dataset.seq || dataset.name || className;
  });
}

async function untilFound(tab: Tab, seq: number): Promise<void> {
  await tab.until(`#${seq}`, (seq) => document.querySelector<HTMLElement>(".found")?.dataset.seq === `${seq}`, seq);
}

async function givePassword(tab: Tab, password: string, said: string): Promise<void> {
  await tab.until("the form", () => document.activeElement!.id === "password");
  await tab.view.type(password);
  await tab.view.press("Enter");
  await untilSays(tab, "#password-said", said);
}

/** In the page: makes it look hidden, or seen again. */
function hide(hidden: boolean): void {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}

async function type(tab: Tab, query: string): Promise<void> {
  await tab.run(() => {
    if (!document.querySelector("#search[open]")) document.querySelector<HTMLElement>("#show-search")!.click();
    document.querySelector<HTMLTextAreaElement>("#query")!.select();
  });
  await tab.view.type(query);
}

/** Searches for a text to the end, and expects that it was found at these places, written like this. */
async function search(tab: Tab, query: string, found: string[]): Promise<void> {
  await type(tab, query);
  await tab.until("the end", () => document.querySelector("#searched")!.getAttribute("aria-busy") === "false");
  const marks = () => [...document.querySelectorAll("#results mark")].map((mark) => mark.textContent!);
  expect([query, ...(await tab.run(marks))]).toEqual([query, ...found]);
}

describePage("in a browser", () => {
  test("people who are here are listed and counted, and a new name is seen at once", async () => {
    const { url, tab } = await startWithTab();
    await untilSays(tab, "#count", "2 here");
    await tab.view.click("#me");
    await tab.view.type("Newname");
    await tab.view.press("Enter");
    await tab.until("the new name", () => document.querySelector("#people")!.textContent!.includes("Newname"));
    await tab.say("who am I");
    await tab.untilText("who am I", "sent");
    expect((await readLog(url))[0]!.name).toBe("Newname");
  });

  test("who is typing is said, until the message comes", async () => {
    const { url, bo, tab } = await startWithTab();
    await bo.until("the tab", () => bo.all("presence").some(({ count }) => count === 2));
    bo.send({ type: "typing" });
    await untilSays(tab, "#typing", "Bo is typing…");
    bo.post("done");
    await untilSays(tab, "#typing", "");
    await tab.view.click("#text");
    await tab.view.type("x");
    const { name } = await bo.first("typing");
    const others = await joinAll(url, name, "one", "2", "3", "4");
    for (const other of others.slice(0, 2)) other.send({ type: "typing" }); // in another tab of one's own, too
    await untilSays(tab, "#typing", "one is typing…");
    for (const other of others.slice(2)) other.send({ type: "typing" });
    await untilSays(tab, "#typing", "4 people are typing…");
  });
});

describePage("nothing is lost in the page", () => {
  test("a server that is killed under a page that sends loses nothing and doubles nothing", async () => {
    let server = await spawnServer({ CHAT_DB: newFile() });
    const tab = await Tab.join(server.url, { serverGoes: true });
    const sent: string[] = [];
    for (let round = 0; round < 4; round++) {
      for (let n = 0; n < 15; n++) {
        sent.push(`message ${round}.${n}`);
        await tab.say(sent.at(-1)!);
        if (n === 7) server.kill("SIGKILL");
      }
      server = await restart(server, "SIGKILL");
    }
    await tab.until("all sent", () => !document.querySelector("[data-state=pending]"));
    const log = await readLog(server.url);
    expect(textsOf(log)).toEqual(sent);
    expect(await tab.texts("sent")).toEqual(sent);
  });

  test("a socket that falls silent without closing is found dead, and what was sent on it arrives once", async () => {
    const { url } = await start();
    const wire = await Wire.to({ port: Number(new URL(url).port) });
    const tab = await Tab.join(`http://${wire.address}/`);
    wire.silenceOpen();
    await tab.say("into the silence");
    await tab.untilText("into the silence", "pending");
    // A return to the tab asks for a sign of life; none comes.
    await tab.run(() => document.dispatchEvent(new Event("visibilitychange")));
    await tab.untilText("into the silence", "sent");
    expect(textsOf(await readLog(url))).toEqual(["into the silence"]);
  });

  test("what waits is shown in every tab of the room and sent once, in order, though its tab is gone", async () => {
    const first = await spawnServer({ CHAT_DB: newFile() });
    const tabs = [1, 2, 3].map(() => Tab.join(first.url, { serverGoes: true }));
    const [one, two, closed] = (await Promise.all(tabs)) as [Tab, Tab, Tab];
    const texts = ["from one", "from two", "from the closed one"];
    const second = await restart(first, "SIGKILL", async () => {
      for (const [n, tab] of [one, two, closed].entries()) {
        await tab.is("reconnecting");
        await tab.say(texts[n]!);
        for (const each of [one, two, closed]) await each.untilText(texts[n]!, "pending");
      }
      await closed.go("about:blank");
    });
    for (const tab of [one, two, await Tab.join(second.url, { serverGoes: true })]) {
      await tab.until("all sent", () => document.querySelectorAll("[data-state=sent]").length === 3);
      expect(await tab.texts()).toEqual(texts);
    }
    expect(textsOf(await readLog(second.url))).toEqual(texts);
    expect(await one.run(() => Object.keys(localStorage).filter((key) => key.includes("outbox")))).toEqual([]);
  });

  test("a long outbox is sent in order, once, within what the server takes", async () => {
    const first = await spawnServer({ CHAT_DB: newFile() });
    const tab = await Tab.join(first.url, { serverGoes: true });
    const second = await restart(first, "SIGKILL", async () => {
      await tab.is("reconnecting");
      await tab.run(() => {
        for (let n = 0; n < 120; n++) {
          document.querySelector<HTMLTextAreaElement>("#text")!.value = `waiting ${n}`;
          document.querySelector<HTMLElement>("#send")!.click();
        }
      });
      expect((await tab.texts("pending")).length).toBe(120);
    });
    await tab.until("all sent", () => !document.querySelector("[data-state=pending]"));
    expect(textsOf(await readLog(second.url))).toEqual(Array.from({ length: 120 }, (_, n) => `waiting ${n}`));
  });

  test("what waits in one room is not sent in another, whose name is the beginning of its name", async () => {
    const first = await spawnServer({ CHAT_DB: newFile() });
    const tab = await Tab.join(`${first.url}team:secret`, { serverGoes: true });
    const { url } = await restart(first, "SIGKILL", async () => {
      await tab.say("the secret");
      await tab.untilText("the secret", "pending");
      await tab.go("about:blank");
    });
    for (const room of ["team", ""]) {
      await tab.go(url + room);
      await tab.is("online");
      await tab.say("said here");
      await tab.untilText("said here", "sent");
      expect(textsOf(await readLog(url, room))).toEqual(["said here"]);
    }
    await tab.go(`${url}team:secret`);
    await tab.untilText("the secret", "sent");
  });

  test("what is written while reading old messages without a connection is pending at once, and sent at the end", async () => {
    const { url } = await start({ rate: 0 });
    await fill(url, "", 700);
    const wire = await Wire.to({ port: Number(new URL(url).port) });
    const tab = await Tab.open(`http://${wire.address}/#50`, { serverGoes: true });
    await tab.untilText("Message 50");
    wire.silence();
    await tab.run(() => dispatchEvent(new Event("offline")));
    await tab.say("written there");
    await tab.untilText("written there", "pending");
    wire.cut();
    wire.speak();
    await tab.untilText("written there", "sent");
    await tab.untilText("Message 700");
  });

  test("a message that is too long stays with its reason and what can be done with it, and is edited and sent", async () => {
    const { bo, tab } = await startWithTab();
    const long = "é".repeat(8193);
    await tab.say(long);
    await tab.untilText(long, "failed");
    expect(await textOf(tab, ".why")).toStartWith("Not sent: Message too long.");
    await tab.run(() => document.querySelector<HTMLElement>(".why .retry")!.focus());
    bo.post("hello");
    await tab.untilText("hello");
    expect(await focused(tab)).toBe("retry");
    await tab.view.press("Enter"); // it is too long still
    await tab.untilText(long, "failed");
    expect(await focused(tab)).toStartWith("message "); // the button went meanwhile
    await click(tab, ".why .edit");
    expect(await tab.texts()).toEqual(["hello"]);
    await tab.view.press("Backspace");
    await tab.view.press("Enter");
    await tab.untilText(long.slice(1), "sent");
  });

  test("a password is asked for, refused, taken, and then the page connects", async () => {
    const { url } = await start({ password: "sesame" });
    const tab = await Tab.open(url);
    tab.expected = /401/;
    await givePassword(tab, "wrong", "Wrong password.");
    await givePassword(tab, "sesame", "");
    await tab.is("online");
    expect(await tab.run(() => document.querySelector<HTMLElement>("#password-form")!.hidden)).toBe(true);
    expect([await valueOf(tab, "#password"), await focused(tab)]).toEqual(["", "text"]);
  });

  test("the page works whatever others have written into its storage", async () => {
    const { tab } = await startWithTab();
    for (const value of ["5", "[null, 5]", '{"at":1}', '{"key":"k","text":"x","name":"n","at":1e300}', "no json"]) {
      await tab.run((value) => {
        for (const key of ["name", "rooms", "notify", "draft:", 'outbox:"":A', 'outbox:"":1e+300-k'])
          localStorage.setItem(`chat.${key}`, value);
      }, value);
      await tab.view.reload();
      await tab.is("online");
      await tab.say(value);
      await tab.untilText(value, "sent");
    }
    await tab.run(() => localStorage.clear());
  });
});

describePage("who is who, and taking it back", () => {
  test("two people of one name are told apart by colour and by the start of an id, in the log and in the list", async () => {
    const { url } = await start();
    const names = ["Ann", "Ann", "Á NN\u3164\u200B", "Ann"]; // the last is a script, without an id
    const me = (n: number) => ["a", "b", "c"][n]?.repeat(22);
    const clients = await joinAll(url, ...names.map((name, n) => ({ name, me: me(n) })));
    for (const [n, client] of clients.entries()) await client.say(`from ${n}`);
    const tab = await Tab.join(url, { width: 1200 });
    const tags = ["", idOf(me(1)!).slice(0, 4), idOf(me(2)!).slice(0, 4), ""];
    const shown = (selector: string) =>
      [...document.querySelectorAll<HTMLElement>(selector)].map((by) => [
        by.querySelector<HTMLElement>(".name")!.style.getPropertyValue("--hue"),
        by.querySelector(".tag")?.textContent ?? "",
      ]);
    const rows = await tab.run(shown, ".message");
    expect(rows.map(([, tag]) => tag!)).toEqual(tags);
    expect(new Set(rows.map(([hue]) => hue)).size).toBe(4);
    await tab.until("the list", () => document.querySelectorAll("#people li").length === 5);
    expect(await tab.run(shown, "#people li")).toEqual(expect.arrayContaining(rows));
  });

  test("own messages are told by their id, after a reload and in another tab too", async () => {
    const { url, tab } = await startWithTab();
    await tab.say("mine");
    await tab.untilText("mine", "sent");
    const [{ key, name } = { key: "" }] = await readLog(url);
    const mallory = await Client.join(url, { name });
    mallory.post("not mine", `${key}x`);
    await tab.untilText("not mine");
    await tab.view.reload();
    await tab.untilText("not mine");
    for (const each of [tab, await Tab.join(url)]) expect(await each.texts("sent")).toEqual(["mine"]);
  });

  test("what was taken back leaves every page: rows, answers, results; the words go back to the composer", async () => {
    const { url, bo, tab: one } = await startWithTab();
    const two = await Tab.join(url);
    await one.say("the secret");
    await one.untilText("the secret", "sent");
    bo.post("#1 I see", "k1");
    for (const tab of [one, two]) await tab.untilText("#1 I see");
    await search(two, "SECRET", ["secret"]);
    await two.run(hide, true);
    await click(one, ".own .remove");
    for (const tab of [one, two]) {
      await tab.untilText("Message removed");
      expect(await textOf(tab, ".quote")).toEndWith("Message removed");
      expect(await tab.run(() => document.body.innerHTML.includes("the secret"))).toBe(false);
    }
    expect(await two.run(() => document.title + document.querySelectorAll("#results li").length)).toBe("Lobby – Chat0");
    expect(await valueOf(one)).toBe("the secret");
    expect((await one.texts()).length).toBe(2);
    expect((await readLog(url)).map(({ text, removed, removes }) => [text, removed, removes])).toEqual([
      ["", true, undefined],
      ["#1 I see", undefined, undefined],
      ["", undefined, 1],
    ]);
    await two.view.reload();
    await two.untilText("Message removed");
  });

  test("a tap on a message brings up what can be done with it, and does none of it", async () => {
    const { tab } = await startWithTab();
    for (const text of ["one", "two"]) await tab.say(text);
    await tab.untilText("two", "sent");
    await tab.view.cdp("Emulation.setEmulatedMedia", { features: [{ name: "hover", value: "none" }] }); // as on a phone
    const { right, top } = await tab.run(boxOf, ".own + .own .text");
    const touchPoints = [{ x: right - 20, y: top + 8 }];
    await tab.view.cdp("Input.dispatchTouchEvent", { type: "touchStart", touchPoints });
    await tab.view.cdp("Input.dispatchTouchEvent", { type: "touchEnd", touchPoints: [] });
    await tab.until("its row", () => document.activeElement!.matches(".own"));
    await tab.say("three");
    await tab.untilText("three", "sent");
    expect(await tab.texts()).toEqual(["one", "two", "three"]);
  });

  test("what is taken back without a server is taken back when there is one", async () => {
    const server = await spawnServer({ CHAT_DB: newFile() });
    const tab = await Tab.join(server.url, { serverGoes: true });
    await tab.say("a slip");
    await tab.untilText("a slip", "sent");
    await restart(server, "SIGKILL", async () => {
      await tab.is("reconnecting");
      await click(tab, ".remove");
      expect(await tab.texts()).toEqual(["a slip"]);
    });
    await tab.untilText("Message removed");
  });

  test("the operator's password is asked for in the menu, and lets one remove what others wrote", async () => {
    const { bo, tab } = await startWithTab({}, { operator: "boss" });
    tab.expected = /401/;
    bo.post("an advertisement");
    await tab.untilText("an advertisement");
    expect(await tab.run(() => document.querySelector(".remove"))).toBeNull();
    await click(tab, "#operator");
    await givePassword(tab, "wrong", "Wrong password.");
    await tab.view.press("Escape");
    expect(await focused(tab)).toBe("text");
    await click(tab, "#operator");
    await givePassword(tab, "boss", "");
    await tab.until("the action", () => document.querySelector(".remove")?.textContent === "Remove");
    expect(await tab.run(() => document.querySelector<HTMLElement>("#operator")!.hidden)).toBe(true);
    await click(tab, ".remove");
    await tab.untilText("Message removed");
    expect(await valueOf(tab)).toBe("");
  });
});

describePage("search, answers, mentions", () => {
  test("finds in the whole history, newest first, once, whatever case and accents; opens what is chosen", async () => {
    const special: Record<number, string> = {
      7: "Ein Ca\u200Bfé am Straßenrand, un e\u0301clair",
      8: "Привет, мир! 你好，世界",
      9: "ΟΔΟΣ ﬁn 👩‍👩‍👧🏠 <img src=x onerror=alert(1)>",
      320: "another cafe",
    };
    const { tab } = await startWithHistory(350, (n) => special[n] ?? `Message ${n}`);
    for (const [query, ...found] of [
      ["CAFÉ", "cafe", "Ca\u200Bfé"],
      ["cafe a", "Ca\u200Bfé a"],
      ["strassen", "Straßen"],
      ["Eclair", "e\u0301clair"],
      ["привет", "Привет"],
      ["世界", "世界"],
      ["οδός", "ΟΔΟΣ"],
      ["f", "f", "ﬁ", "f"],
      ["🏠", "🏠"],
      ["<IMG", "<img"],
      ["nothing of it"],
    ] as [string, ...string[]][]) {
      await search(tab, query, found);
    }
    expect(await tab.run(() => document.querySelectorAll("#results img").length)).toBe(0);
    await search(tab, "Message 1", Array(100).fill("Message 1")); // of 111: more when scrolled
    expect(await textOf(tab, "#searched")).toBe("111 found · all messages searched");
    await tab.run(() => void (document.querySelector("#results")!.scrollTop = 1e6));
    await tab.until("more", () => document.querySelectorAll("#results li").length === 111);
    await search(tab, "cafe a", ["Ca\u200Bfé a"]);
    await tab.view.press("Enter");
    await tab.view.press("Enter");
    await untilFound(tab, 7);
    expect(await tab.run(() => location.hash + document.querySelectorAll("dialog[open]").length)).toBe("#70");
    await tab.view.click("#newer");
    await tab.untilText("Message 350");
  });

  test("reads 10,000 messages at the rate of a server, and what is live comes meanwhile", async () => {
    const db = newFile();
    const first = await startChat({ port: 0, db, logLevel: "silent", rate: 0 });
    const filler = await fill(first.url, "", 10_000, (n) => (n === 3 ? "the needle" : `Message ${n}`));
    await filler.leave();
    await first.stop();
    const { bo, tab } = await startWithTab({}, { db });
    await type(tab, "needle");
    bo.post("a live needle");
    await untilSays(tab, "#results mark", "needle");
    expect(await tab.run(() => document.querySelector("#searched")!.getAttribute("aria-busy"))).toBe("true");
    await tab.until("the end", () => document.querySelector("#searched")!.getAttribute("aria-busy") === "false");
    expect(await textOf(tab, "#searched")).toBe("2 found · all messages searched");
  });

  test("is used by the keyboard alone, closed by Escape, and takes the screen of a phone", async () => {
    const { url, tab } = await startWithTab({ width: 320, height: 480 });
    await search(tab, "anything", []);
    expect(await textOf(tab, "#searched")).toBe("Nothing found · all messages searched");
    await tab.view.press("Escape");
    await fill(url, "", 5);
    await tab.untilText("Message 5");
    await tab.run(() => document.querySelector<HTMLElement>("#log")!.focus());
    await tab.view.press("/");
    await search(tab, "message", Array(5).fill("Message"));
    expect(await tab.run(boxOf, "#search")).toMatchObject({ x: 0, y: 0, width: 320, height: 480 });
    for (const key of ["Enter", "ArrowDown", "ArrowDown", "ArrowUp"] as const) await tab.view.press(key);
    expect(await focused(tab)).toBe("4");
    await tab.view.press("Escape");
    expect([await focused(tab), await tab.run(() => document.querySelector("dialog[open]"))]).toEqual(["log", null]);
    await tab.run(() => document.querySelector<HTMLElement>("#text")!.focus());
    await tab.view.type("a/b");
    expect(await valueOf(tab)).toBe("a/b");
  });

  test("Reply begins with #42, which is a link; an answer shows a line of what it answers", async () => {
    const { bo, tab } = await startWithTab();
    bo.post("<b>bold</b>\nquestion", "k1");
    await tab.untilText("<b>bold</b>\nquestion");
    await click(tab, ".reply");
    await tab.view.type("`#1` https://a.example/#1 #2 x#1 ##1 #99 #01 #1a é#1 (#1)");
    await tab.view.press("Enter");
    await tab.until("the answer", () => document.querySelector<HTMLElement>(".own")?.dataset.seq === "2");
    const links = () => [...document.querySelectorAll<HTMLAnchorElement>(".own a")].map((a) => a.textContent!);
    expect(await tab.run(links)).toEqual(["Bo <b>bold</b>\nquestion", "#1", "https://a.example/#1", "#1"]);
    await click(tab, ".quote");
    await untilFound(tab, 1);
    expect(await tab.run(() => location.hash)).toBe("#1");
  });

  test("Tab completes names of those here, and elsewhere moves on; a person of the list is written to", async () => {
    const { url } = await start();
    for (const name of ["Ann", "Ánna Bell", "Bo"]) await Client.join(url, { name });
    const tab = await Tab.join(url, { width: 1200 });
    await tab.until("the list", () => document.querySelectorAll("#people li").length === 4);
    await tab.view.click("#text");
    await tab.view.type("hi,@an");
    for (const completed of ["hi,@Ann ", "hi,@Ánna Bell ", "hi,@Ann "]) {
      await tab.view.press("Tab");
      expect(await valueOf(tab)).toBe(completed);
    }
    await tab.view.type("me@bo");
    await tab.view.press("Tab");
    expect(await focused(tab)).toBe("send");
    await click(tab, '#people [data-name="Bo"]');
    expect([await valueOf(tab), await focused(tab)]).toEqual(["hi,@Ann me@bo @Bo ", "text"]);
  });
});

describePage("the connection", () => {
  test("being offline is said in words, and what was written is sent at once when it ends", async () => {
    const { url, tab } = await startWithTab();
    tab.expected = /ERR_INTERNET_DISCONNECTED|closed before the connection is established/;
    const network = { latency: 0, downloadThroughput: -1, uploadThroughput: -1 };
    const offline = (offline: boolean) => tab.view.cdp("Network.emulateNetworkConditions", { ...network, offline });
    await tab.view.cdp("Network.enable");
    await offline(true);
    await untilSays(tab, "#status", "Offline");
    await tab.say("written offline");
    await tab.untilText("written offline", "pending");
    await offline(false);
    await tab.untilText("written offline", "sent");
    expect(textsOf(await readLog(url))).toEqual(["written offline"]);
  });

  test("a room whose name begins with a slash is a room, and what is typed as a path leads to the room", async () => {
    const { url } = await start();
    const tab = await Tab.join(`${url}%2Fevil.example`);
    await tab.say("said here");
    await tab.untilText("said here", "sent");
    expect(textsOf(await readLog(url, "/evil.example"))).toEqual(["said here"]);
    const links = () => [...document.querySelectorAll<HTMLAnchorElement>("#visited a")].map(({ href }) => href);
    expect(await tab.run(links)).toEqual([url, `${url}%2Fevil.example`]);
    await tab.run(() => {
      document.querySelector<HTMLTextAreaElement>("#go-room")!.value = "/team";
      document.querySelector<HTMLElement>("#go button")!.click();
    });
    await tab.until("the room", () => location.pathname === "/team");
    await tab.is("online");
  });

  test("an address that names no room is told so, and nothing is connected", async () => {
    const { url } = await start();
    for (const path of ["%ff", "a%00b", "x".repeat(65)]) {
      const tab = await Tab.open(url + path);
      await tab.is("bad-room");
      expect(await textOf(tab, "#blank-title")).toBe("Invalid room name");
    }
  });
});

describePage("scrolling", () => {
  const place = (tab: Tab) =>
    tab.run(() => {
      const edge = document.querySelector("#log")!.getBoundingClientRect().top + 1;
      const rows = [...document.querySelectorAll<HTMLElement>(".message")];
      const row = rows.find((row) => row.getBoundingClientRect().bottom > edge)!;
      return [row.dataset.seq, row.getBoundingClientRect().top];
    });

  test("the page sticks to the bottom when it is there", async () => {
    const { filler, tab } = await startWithHistory(50);
    for (let n = 0; n < 5; n++) {
      filler.post(`new ${n}`);
      await tab.untilText(`new ${n}`);
    }
    await drawn(tab);
    const below = () => {
      const log = document.querySelector<HTMLElement>("#log")!;
      return log.scrollHeight - log.clientHeight - log.scrollTop;
    };
    expect(await tab.run(below)).toBeLessThan(1);
    expect(await tab.run(() => document.querySelector<HTMLElement>("#newer")!.hidden)).toBe(true);
    for (let height = 600; height >= 320; height -= 40) {
      await tab.size(400, height); // as a keyboard that comes up step by step
      await drawn(tab);
      expect(await tab.run(below)).toBeLessThan(1);
    }
  });

  test("who reads above is not moved; a button counts what is new, a line shows where it begins", async () => {
    const { filler, tab } = await startWithHistory(60, (n) => `Message ${n} ${"word ".repeat(n)}`);
    await tab.run(() => document.querySelector("#log")!.scrollBy(0, -700));
    await drawn(tab);
    const before = await place(tab);
    for (let n = 0; n < 3; n++) filler.post(`new ${n}`);
    await tab.until("the button", () => document.querySelector("#newer")!.textContent === "3 new messages ↓");
    expect(await place(tab)).toEqual(before);
    for (const width of [400, 800]) {
      await tab.size(width, 600);
      await drawn(tab);
      expect(await place(tab)).toEqual(before);
    }
    expect(await tab.run(() => document.title)).toBe("(3) Lobby – Chat");
    const line = () => (document.querySelector(".unread-line")!.nextElementSibling as HTMLElement).dataset.seq;
    expect(await tab.run(line)).toBe("61");
    await tab.view.click("#newer");
    await tab.until("the end", () => document.querySelector<HTMLElement>("#newer")!.hidden);
    expect(await tab.run(() => document.title)).toBe("Lobby – Chat");
  });

  test("in a room of 10,000 messages nothing moves by a pixel, up and down, and few rows are in the page", async () => {
    const { tab } = await startWithHistory(10_000, (n) => `Message ${n} ${"word ".repeat(n % 40)}`);
    await tab.untilText("Message 10000 ");
    await tab.run(() => [...document.querySelectorAll<HTMLElement>(".message")].at(-1)!.focus());
    const seen = [await sweep(tab, -6000, 9000)];
    expect(await focused(tab)).toBe("log"); // so that the keys still scroll
    await tab.run(() => (location.hash = "#1200"));
    await untilFound(tab, 1200);
    seen.push(await sweep(tab, -6000, 1), await sweep(tab, 6000, 2400));
    await tab.size(800, 16_000); // more than what is drawn at most can fill
    await drawn(tab);
    await tab.size(800, 600);
    await tab.view.click("#newer");
    await tab.untilText("Message 10000 ");
    expect(Math.max(...seen.map(({ moved }) => moved))).toBeLessThan(1);
    expect(Math.max(...seen.map(({ most }) => most))).toBe(300);
  });

  test("hundreds of messages that were taken back do not hide what was written before them", async () => {
    const { filler, tab } = await startWithHistory(500);
    for (let seq = 31; seq <= 500; seq++) filler.send({ type: "remove", seq, key: `r${seq}` });
    await filler.untilMessages(970);
    await tab.view.reload();
    await tab.untilText("Message removed");
    expect((await sweep(tab, -2000, 1)).moved).toBeLessThan(1);
    await tab.untilText("Message 30");
    await sweep(tab, 2000, 500);
    await tab.say("the end");
    await tab.untilText("the end", "sent");
  });

  test("#42 opens the page at that message, and from there all later ones can be reached", async () => {
    const { filler, tab } = await startWithHistory(1000, undefined, "#42");
    await untilFound(tab, 42);
    const y = await tab.run(() => document.querySelector(".found")!.getBoundingClientRect().y);
    expect(y > 0 && y < 600).toBe(true);
    filler.post("a new one");
    await tab.until("the count", () => document.querySelector("#newer")!.textContent === "1 new message ↓");
    expect(await tab.texts()).not.toContain("a new one");
    await sweep(tab, 1e6, 1001);
    const seqs = () => [...document.querySelectorAll<HTMLElement>(".message")].map((row) => Number(row.dataset.seq));
    const found = await tab.run(seqs);
    expect(found).toEqual(found.map((_, i) => found[0]! + i));
  });

  test("what was trimmed meanwhile is not asked for again and again, and the button leads to the end", async () => {
    const { filler, tab } = await startWithHistory(300, undefined, "#50", 300);
    await untilFound(tab, 50);
    for (let n = 301; n <= 2500; n++) filler.post(`Message ${n}`, `more-${n}`);
    await filler.untilMessages(2500);
    let asked = 0;
    tab.view.addEventListener("Network.webSocketFrameSent", (event) => {
      if ((event as MessageEvent).data.response.payloadData.includes('"page"')) asked++;
    });
    await tab.view.cdp("Network.enable");
    await tab.run(() => void (document.querySelector("#log")!.scrollTop = 1e9));
    await tab.until("an answer", () => document.querySelector("#log")!.getAttribute("aria-busy") === "false");
    await click(tab, "#newer");
    await tab.untilText("Message 2500");
    expect(asked > 0 && asked < 10).toBe(true);
  });

  test("the longest messages, whose pages are cut, can be read up and down, and opened at any", async () => {
    const { tab } = await startWithHistory(150, (n) => `${n} ${"x".repeat(16_000)}`, "#20");
    for (const seq of [20, 75]) {
      await tab.run((seq) => (location.hash = `#${seq}`), seq);
      await untilFound(tab, seq);
    }
    await sweep(tab, -1e6, 1);
    await sweep(tab, 1e6, 150);
  });
});

describePage("what people write", () => {
  test("Shift+Enter breaks the line, the draft survives a reload, Enter sends", async () => {
    const { tab } = await startWithTab();
    await tab.view.click("#text");
    await tab.view.type("one");
    await tab.view.press("Enter", { modifiers: ["Shift"] });
    await tab.view.reload();
    await tab.view.click("#text");
    await tab.view.type("two");
    await tab.view.press("Enter");
    await tab.untilText("one\ntwo", "sent");
  });

  test("Enter that ends a composition sends nothing, in either order of events", async () => {
    const { tab } = await startWithTab();
    const sent = await tab.run(() => {
      const field = document.querySelector<HTMLTextAreaElement>("#text")!;
      const key = (isComposing: boolean, keyCode: number) =>
        field.dispatchEvent(
          new KeyboardEvent("keydown", { key: "Enter", isComposing, keyCode, bubbles: true, cancelable: true }),
        );
      const end = () => field.dispatchEvent(new CompositionEvent("compositionend", { data: "你好" }));
      field.value = "你好";
      key(true, 229); // Chrome, Firefox: the key first, within the composition
      end();
      end(); // Safari: the composition ends first
      key(false, 229);
      const early = document.querySelectorAll(".message").length;
      key(false, 13);
      return [early, document.querySelectorAll(".message").length];
    });
    expect(sent).toEqual([0, 1]);
  });

  test("the field grows to six lines", async () => {
    const { tab } = await startWithTab();
    const height = (lines: number) =>
      tab.run((lines) => {
        const field = document.querySelector<HTMLTextAreaElement>("#text")!;
        field.value = Array(lines).fill("x").join("\n");
        field.dispatchEvent(new Event("input"));
        return field.offsetHeight;
      }, lines);
    const [one, two, six, nine] = [await height(1), await height(2), await height(6), await height(9)];
    expect([two - one, six - one, nine - six]).toEqual([24, 5 * 24, 0]);
  });

  const HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "[x](javascript:alert(1)) data:text/html,<b>x</b>",
    '"><iframe srcdoc="<b>x</b>">',
    "{{7*7}} ${7*7} <%= 7 %>",
    "\u202Eright to left override\u202C \u200Bzero\u200D width",
    "\u0000\u0001\u001b[31m",
    "__proto__",
    " leading and   inner spaces",
    "a\n\n\nb\ttab",
    "*".repeat(5000),
    "https://[",
    "x".repeat(16_384),
    "🏳️‍🌈👩‍👩‍👧‍👦 é é ﷽",
  ];

  test("a battery of texts appears as it was written, and makes no element", async () => {
    const { bo, tab } = await startWithTab();
    HOSTILE.forEach((text, n) => bo.post(text, `h${n}`));
    await tab.until("all of it", (count) => document.querySelectorAll(".message").length === count, HOSTILE.length);
    expect(await tab.texts()).toEqual(HOSTILE);
    const elements = () => document.querySelectorAll(".text *, .name *, main iframe, main script, main img").length;
    expect(await tab.run(elements)).toBe(0);
  });

  test("a battery of names appears as it was given", async () => {
    const { url } = await start();
    const names = ["<b>bold</b>", '"onclick="alert(1)', "__proto__", "\u200Fevil", "👩‍👩‍👧", "$& $1 `", "(.*)+["];
    const tab = await Tab.join(url, { width: 1000 });
    for (const name of names) (await Client.join(url, { name })).post("x", `n${names.indexOf(name)}`);
    const count = names.length;
    await tab.until("all of them", (count) => document.querySelectorAll(".message").length === count, count);
    const shown = () => [...document.querySelectorAll(".message .name")].map((name) => name.textContent!);
    expect((await tab.run(shown)).sort()).toEqual(names.sort());
    await tab.until("the list", (count) => document.querySelectorAll("#people li").length === count + 1, count);
    await tab.run((name) => localStorage.setItem("chat.name", JSON.stringify(name)), "(.*)+[");
    await tab.view.reload();
    await tab.until("the reload", (count) => document.querySelectorAll(".message").length === count, count);
  });

  test("links, code and mentions of one's own name become elements, and nothing else", async () => {
    const { bo, tab } = await startWithTab();
    const name = await textOf(tab, "#me");
    for (const text of [
      `(see https://a.example/x?y=1.) \`a <b>\` @${name}!\n\`\`\`js\nlet x = "<i>";\n\`\`\``,
      "看这里：https://b.example/路径，好吗？",
      `“https://c.example” [https://d.example/] **https://e.example** (https://f.example/(g)\u202E) ${name}ë`,
    ]) {
      await bo.say(text);
    }
    await tab.until("all", () => document.querySelectorAll(".message").length === 3);
    const found = () => [...document.querySelectorAll(".text *")].map((e) => `${e.localName} ${e.textContent}`);
    expect(await tab.run(found)).toEqual([
      "a https://a.example/x?y=1",
      "code a <b>",
      `mark @${name}`,
      'pre let x = "<i>";',
      'code let x = "<i>";',
      "a https://b.example/路径",
      "a https://c.example",
      "a https://d.example/",
      "a https://e.example",
      "a https://f.example/(g)",
    ]);
    expect(await tab.run(() => document.querySelector(".text a")!.outerHTML)).toStartWith(
      '<a href="https://a.example/x?y=1" target="_blank" rel="noopener noreferrer">',
    );
  });
});

describePage("attention, language, form", () => {
  test("the title counts what came while the page was hidden", async () => {
    const { bo, tab } = await startWithTab();
    await tab.run(hide, true);
    for (let n = 0; n < 2; n++) bo.post(`unseen ${n}`);
    await tab.until("the count", () => document.title === "(2) Lobby – Chat");
    await tab.run(hide, false);
    await tab.until("no count", () => document.title === "Lobby – Chat");
  });

  test("a page that comes back by the back button has the name and the rooms of today", async () => {
    const { tab } = await startWithTab();
    await tab.run(() => {
      localStorage.setItem("chat.name", '"Newname"');
      localStorage.setItem("chat.rooms", '["elsewhere"]');
      dispatchEvent(new Event("pageshow"));
    });
    await untilSays(tab, "#me", "Newname");
    expect(await textOf(tab, "#visited")).toBe("Lobbyelsewhere");
  });

  test("messages stand in one column with the field; a notice beside the button; a sheet is none in a wide window", async () => {
    const { tab } = await startWithHistory(60);
    await tab.untilText("Message 60");
    await tab.run(() => {
      document.querySelector("#log")!.scrollTop = 0;
      document.querySelector<HTMLElement>(".copy")!.click();
      document.querySelector<HTMLElement>("#show-rooms")!.click();
    });
    await tab.until("both", () => !document.querySelector<HTMLElement>("#newer")!.hidden);
    for (const width of [320, 800, 1000, 1400]) {
      await tab.size(width, 600);
      await drawn(tab);
      const [notice, newer] = [await tab.run(boxOf, "#notice"), await tab.run(boxOf, "#newer")];
      expect(notice.bottom).toBeLessThanOrEqual(newer.top);
      const { left, width: wide } = await tab.run(boxOf, "#composer");
      expect(await tab.run(boxOf, ".message")).toMatchObject({ left, width: wide });
    }
    expect(await tab.run(() => document.querySelector("#rooms")!.matches(":popover-open"))).toBe(false);
    const borders = () => ["#rooms", "#who"].map((id) => getComputedStyle(document.querySelector(id)!).borderWidth);
    expect(await tab.run(borders)).toEqual(["0px 1px 0px 0px", "0px 0px 0px 1px"]);
  });

  test("nothing scrolls sideways and nothing is cut off at 320 pixels", async () => {
    const { url } = await start();
    const room = "room".repeat(16);
    const long = await Client.join(url, { room, name: "W".repeat(32) });
    const link = `https://example.com/${"a".repeat(200)}`;
    for (const text of ["w".repeat(300), link, `\`\`\`\n${"c".repeat(200)}\n\`\`\``, "مرحبا", "x"])
      await long.say(text);
    const tab = await Tab.join(url + room, { width: 320, height: 480 });
    await tab.say("mine ".repeat(50));
    await tab.say("mine"); // its actions have the time among them, where there is room
    await tab.until("all", () => document.querySelectorAll("[data-seq]").length === 7);
    for (const width of [320, 390, 768, 1440]) {
      await tab.size(width, 700);
      await drawn(tab);
      const sideways = await tab.run(() => {
        const log = document.querySelector<HTMLElement>("#log")!;
        const wide = [...document.querySelectorAll("body *")].filter((element) => {
          const { left, right, width } = element.getBoundingClientRect();
          return width > 1 && (left < -1 || right > innerWidth + 1);
        });
        const scrolls = [document.documentElement.scrollWidth - innerWidth, log.scrollWidth - log.clientWidth];
        return [...scrolls, ...wide.map((e) => e.outerHTML.slice(0, 99))];
      });
      expect([width, ...sideways]).toEqual([width, 0, 0]);
    }
  });

  test("all can be done with the keyboard alone", async () => {
    const { url, bo, tab } = await startWithTab();
    await bo.say("first");
    await bo.say("second");
    await tab.until("both", () => document.querySelectorAll("#people li").length === 2);
    await tab.run(() => document.querySelector<HTMLElement>("#text")!.blur());
    const order: string[] = [];
    while (order.at(-1) !== "send" && order.length < 10) {
      await tab.view.press("Tab");
      order.push(await focused(tab));
    }
    expect(order).toEqual(["show-rooms", "show-search", "count", "log", "me", "text", "send"]);
    await tab.run(() => document.querySelector<HTMLElement>("#log")!.focus());
    await tab.view.press("ArrowUp");
    await tab.view.press("ArrowUp");
    expect(await focused(tab)).toBe("1");
    await tab.view.press("Tab");
    expect(await focused(tab)).toBe("reply");
    await tab.view.press("Tab");
    await tab.view.press("Enter");
    await tab.until("the notice", () => document.querySelector("#notice")!.textContent === "Copied");
    await tab.view.press("Escape");
    expect(await focused(tab)).toBe("text");
    await tab.run(() => document.querySelector<HTMLElement>("#count")!.focus());
    for (const key of ["Enter", "Tab"] as const) await tab.view.press(key);
    expect(await focused(tab)).toBe("Bo");
    await Client.join(url, { name: "Cy" });
    await tab.until("another", () => document.querySelectorAll("#people li").length === 3);
    expect(await focused(tab)).toBe("Bo");
    await tab.view.press("Escape");
    expect(await tab.run(() => document.querySelector("#who")!.matches(":popover-open"))).toBe(false);
    expect(await focused(tab)).toBe("count");
  });

  test.each([false, true])("every text has a contrast of 4.5 to 1 (dark: %p)", async (dark) => {
    const { bo, tab } = await startWithTab({ dark, width: 1300 });
    bo.post(`\`code\` https://a.example @${await textOf(tab, "#me")}`, "k1");
    await tab.say("mine `code` https://b.example");
    await tab.say("é".repeat(8193));
    await tab.until("all", () => document.querySelectorAll(".message").length === 3);
    expect(await tab.run(lowContrasts)).toEqual([]);
  });
});

/** In the page: the texts whose contrast with what is behind them is below 4.5, with names in all hues. */
function lowContrasts(): string[] {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true })!;
  /** The luminance of colours painted over each other. */
  const luminance = (colors: string[]) => {
    for (const color of ["white", ...colors]) {
      context.fillStyle = color;
      context.fillRect(0, 0, 1, 1);
    }
    const parts = [...context.getImageData(0, 0, 1, 1).data].map((part) => part / 255);
    const [r, g, b] = parts.map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r! + 0.7152 * g! + 0.0722 * b!;
  };
  const low: string[] = [];
  const check = (element: Element, what: string) => {
    const grounds: string[] = [];
    for (let e: Element | null = element; e; e = e.parentElement) grounds.unshift(getComputedStyle(e).backgroundColor);
    const both = [luminance(grounds), luminance([...grounds, getComputedStyle(element).color])];
    const contrast = (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
    if (contrast < 4.5) low.push(`${what}: ${contrast.toFixed(2)}`);
  };
  for (const element of document.querySelectorAll("body *")) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent!.trim());
    if (own && element.checkVisibility()) check(element, `${element.localName}.${element.className}#${element.id}`);
  }
  const row = document.querySelector<HTMLElement>(".message:not(.own)")!;
  for (let hue = 0; hue < 360; hue++) {
    for (const element of row.querySelectorAll<HTMLElement>(".name, .avatar")) {
      element.style.setProperty("--hue", String(hue));
      check(element, `${element.className} ${hue}`);
    }
  }
  return low;
}

// ─── The page in happy-dom: what needs no layout ─────────────────────────────────────────────────────────────────────

describe("without a layout", () => {
  async function openPage(url: string, languages = ["en-US"], prepare = (_: BrowserWindow) => {}) {
    const browser = new Browser({
      settings: { enableJavaScriptEvaluation: true, suppressInsecureJavaScriptEnvironmentWarning: true },
    });
    const sockets: WebSocket[] = [];
    started.push(() => {
      for (const socket of sockets) socket.onclose = null; // else it would tell a page that is gone
      return browser.close();
    });
    const page = browser.newPage();
    page.url = url;
    const window = page.mainFrame.window;
    Object.defineProperty(window.navigator, "languages", { value: languages });
    class PageSocket extends WebSocket {
      constructor(url: string, protocol: string) {
        super(url, protocol);
        sockets.push(this);
      }
    }
    Object.assign(window, { WebSocket: PageSocket });
    prepare(window);
    page.content = await (await fetch(url)).text();
    const document = window.document;
    const $ = (selector: string) => document.querySelector(selector) as HTMLElement & HTMLTextAreaElement;
    const rows = () => [...document.querySelectorAll(".message")] as HTMLElement[];
    await eventually("the connection", () => $("#status").dataset.state === "online");
    const say = (text: string) => {
      $("#text").value = text;
      $("#send").click();
    };
    return { window, $, rows, say };
  }

  test("the page speaks Chinese or English", async () => {
    const { url } = await start();
    const zh = await openPage(url, ["zh-CN", "en"]);
    const said = ({ $ }: typeof zh) => [$("html").lang, $("#text").placeholder, $("#send").textContent];
    expect(said(zh)).toEqual(["zh-CN", "请输入", "发送"]);
    const en = await openPage(url, ["fr", "en"]);
    expect(said(en)).toEqual(["en", "Write a message", "Send"]);
  });

  test("people talk, also where storage is forbidden and notifications are missing", async () => {
    const { url } = await start();
    const bo = await Client.join(url, { name: "Bo" });
    const page = await openPage(url, ["en"], (window) => {
      Object.defineProperty(window, "localStorage", { get: () => JSON.parse("forbidden") }); // throws
      Object.defineProperty(window, "Notification", { value: undefined });
    });
    page.say("hi Bo");
    expect(page.rows()[0]!.dataset.state).toBe("pending");
    await eventually("the confirmation", () => page.rows()[0]!.dataset.state === "sent");
    expect(textsOf(await bo.untilMessages(1))).toEqual(["hi Bo"]);
    bo.post("hi you");
    await eventually("the answer", () => page.rows()[1]?.querySelector(".text")?.textContent === "hi you");
  });
});
