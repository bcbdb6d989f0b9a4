/// <reference types="bun-types" />
/**
 * The promises of the chat, a test each, against real servers, real files and real sockets.
 * The order: what is served · the two dialects · promises 1 to 4 · the store · who gets in, slow readers, flooders, hostile
 * bytes, the machine's limits (promises 5 to 7) · many servers · operation · commands · the page.
 */
import { Database } from "bun:sqlite";
import { afterAll, afterEach, describe, expect, setDefaultTimeout, setSystemTime, spyOn, test } from "bun:test";
import {
  copyFileSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { type AddressInfo, connect, createServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { basename, join } from "node:path";
import { connect as connectTls } from "node:tls";

import { Browser, type BrowserWindow, type Element, type HTMLAnchorElement } from "happy-dom";
import type { HTMLElement, HTMLTextAreaElement } from "happy-dom";

import {
  type Chat,
  type Config,
  exportMessages,
  importMessages,
  main,
  type Message,
  readConfig,
  type ServerFrame,
  type StartError,
  startChat,
} from "./server.ts";

// ─── Tools: servers, clients, waiting ────────────────────────────────────────────────────────────────────────────────

const SERVER = join(import.meta.dir, "server.ts");
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
async function spawnServer(env: Record<string, string>, limit?: string): Promise<ServerProcess> {
  const server = spawn(env, [], limit) as ServerProcess;
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

/** Starts `server.ts`; `limit` is a shell command before it, such as `ulimit -n 64`. */
function spawn(
  env: Record<string, string>,
  args: string[] = [],
  limit = ":",
): Bun.Subprocess<"ignore", "pipe", "pipe"> {
  const command = ["bash", "-c", `${limit}; exec "$@"`, "bash", process.execPath, "run", SERVER, ...args];
  const server = Bun.spawn(command, {
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
    await eventually("an answer of Redis", async () => (await this.command("PING").catch(() => "")) === "PONG");
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

  /** From here on it forgets, when it is killed, what came after `SAVE`. */
  async saveOnlyWhenTold(): Promise<void> {
    await this.command("CONFIG", "SET", "appendonly", "no");
    rmSync(join(this.folder, "appendonlydir"), { recursive: true });
  }

  /** Kills it, and starts it again with what was there at the last `SAVE`. */
  async goBack(): Promise<void> {
    await this.kill();
    await this.run("--appendonly", "no");
  }
}

/** A TCP proxy: the network between a server and its Redis, or between a page and its server. */
class Wire {
  /** Both ends of each connection. */
  readonly #ends = new Set<Socket>();
  #silent = false;
  readonly #listener = createServer((near) => {
    const far = connect(this.port, "127.0.0.1");
    for (const [end, other] of [[near, far] as const, [far, near] as const]) {
      this.#ends.add(end);
      if (this.#silent) end.pause();
      end.on("data", (data) => void other.write(data));
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

  /** Where it listens: host and port. */
  get address(): string {
    return `127.0.0.1:${(this.#listener.address() as AddressInfo).port}`;
  }

  get connections(): number {
    return this.#ends.size / 2;
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

  /** Ends every connection at once; new ones are possible. */
  cut(): void {
    for (const end of [...this.#ends]) end.destroy();
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

/** Waits for something that no event tells. */
async function eventually(what: string, done: () => unknown): Promise<void> {
  const end = performance.now() + DEADLINE_MS;
  while (!(await done())) {
    if (performance.now() > end) throw new Error(`${what} did not come in ${DEADLINE_MS} ms`);
    await Bun.sleep(5);
  }
}

type Frame<T extends ServerFrame["type"]> = Extract<ServerFrame, { type: T }>;

interface JoinOptions {
  room?: string;
  name?: string;
  plain?: boolean;
  epoch?: string;
  after?: number;
  headers?: Record<string, string>;
  tls?: { rejectUnauthorized: boolean };
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

  static async connect(url: string, { room = "", plain, headers, tls, ...query }: JoinOptions): Promise<Client> {
    const address = new URL(`ws/${encodeURIComponent(room)}`, url.replace("http", "ws"));
    for (const [key, value] of Object.entries(query)) address.searchParams.set(key, String(value));
    const ws = new WebSocket(address, plain ? { headers, tls } : { protocols: ["chat.v1"], headers, tls });
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
    await tab.online();
    return tab;
  }

  async online(): Promise<void> {
    await this.until(
      "the connection",
      () => document.querySelector<HTMLElement>("#status")!.dataset.state === "online",
    );
  }

  async reload(): Promise<void> {
    await within(this.view.reload(), "the reload");
  }

  async size(width: number, height: number): Promise<void> {
    await this.view.cdp("Emulation.setDeviceMetricsOverride", { width, height, deviceScaleFactor: 1, mobile: false });
  }

  /** Runs a function in the page. */
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
  async texts(state = ""): Promise<string[]> {
    return this.run((state) => {
      const rows = [...document.querySelectorAll<HTMLElement>(".message")];
      return rows
        .filter((row) => !state || row.dataset.state === state)
        .map((row) => row.querySelector(".text")!.textContent!);
    }, state);
  }

  async untilText(text: string, state = ""): Promise<void> {
    const found = (text: string, state: string) =>
      [...document.querySelectorAll<HTMLElement>(".message")].some(
        (row) => row.querySelector(".text")!.textContent === text && (!state || row.dataset.state === state),
      );
    await this.until(`"${text.slice(0, 40)}" ${state}`, found, text, state);
  }

  async close(): Promise<void> {
    await this.view.close();
    expect(this.problems).toEqual([]);
  }
}

/** Posts many messages to a room, as somebody else. */
async function fill(url: string, room: string, count: number, text = (n: number) => `Message ${n}`): Promise<Client> {
  const client = await Client.join(url, { room, name: "Filler" });
  for (let n = 1; n <= count; n++) client.post(text(n), `fill-${n}`);
  await client.untilMessages(count);
  return client;
}

/** Lets the browser draw: what a scroll or a resize sets off has happened then. */
async function drawn(tab: Tab): Promise<void> {
  await tab.run(
    () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done)))),
  );
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
      await tab.online();
      return tab;
    };

    test("what one tab sends arrives in the other, and is gone from both when it is taken back", async () => {
      const { url } = await start();
      const [one, two] = [await open(url), await open(url)];
      await one.say("a slip 你好");
      await one.untilText("a slip 你好", "sent");
      await two.untilText("a slip 你好");
      await click(one, ".own .remove");
      for (const tab of [one, two]) await tab.untilText("Taken back");
      expect(await valueOf(one)).toBe("a slip 你好");
    });

    test("what was written without a server survives a reload and is sent once when the server is back", async () => {
      const db = newFile();
      const first = await spawnServer({ CHAT_DB: db });
      const tab = await open(first.url);
      first.kill("SIGKILL");
      await tab.say("written without a server");
      await tab.untilText("written without a server", "pending");
      const second = await spawnServer({ CHAT_DB: db, PORT: new URL(first.url).port });
      await tab.reload();
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
      const moved = await tab.run(async () => {
        const log = document.querySelector<HTMLElement>("#log")!;
        const frame = () => new Promise((done) => requestAnimationFrame(done));
        let worst = 0;
        for (let seen = log.querySelector<HTMLElement>(".message")!; seen.dataset.seq !== "1";) {
          log.scrollBy(0, -400);
          const rows = [...log.querySelectorAll<HTMLElement>(".message")];
          seen = rows.find((row) => row.getBoundingClientRect().bottom > log.getBoundingClientRect().top + 1)!;
          const before = seen.getBoundingClientRect().top;
          await frame();
          await frame();
          worst = Math.max(worst, seen.isConnected ? Math.abs(seen.getBoundingClientRect().top - before) : Infinity);
        }
        return worst;
      });
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
    const plain = await Client.join(url, { name: "x".repeat(33), plain: true });
    ann.post("to all");
    expect(await plain.untilTexts(1)).toEqual(["to all"]); // a plain socket is told nothing but messages
  });

  test("gets the hello before anything else, however early it speaks", async () => {
    const { url } = await start();
    const { epoch } = await (await Client.join(url)).first("hello");
    const early = await Client.connect(url, { epoch, after: 9 }); // a place that is not there yet is waited for
    for (const frame of [{ type: "ping" }, { type: "nonsense" }, { type: "ping" }]) early.send(frame);
    await early.until("the answers", () => early.all("pong").length === 2);
    const types = early.frames.map(({ type }) => type).filter((type) => type !== "presence");
    expect(types).toEqual(["hello", "pong", "error", "pong"]);
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
  `{"type":"ping","${"x".repeat(60_000)}":1}`,
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
      const { code, text } = await ann.first("error");
      expect([frame.slice(0, 60), code, text.length < 200]).toEqual([frame.slice(0, 60), "bad-frame", true]);
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

/** Milliseconds that a client waits which found no server, or that people wait between two messages. */
const REST_MS = 15;

/**
 * A client that posts all the time and keeps all it was ever told. When its connection ends, it goes to the next server,
 * with `epoch` and `after`, and sends again what was not confirmed.
 */
class Mover {
  /** What it was told: one record for each time that it started afresh. */
  readonly records: { epoch: string; messages: Message[] }[] = [];
  /** What it posted and saw neither in the log nor acked, by key. */
  readonly outbox = new Map<string, string>();
  /** Keys that were acked or seen, and the epoch of that log. */
  readonly confirmed = new Map<string, string>();
  /** How its connections ended. */
  readonly closes: number[] = [];
  resumes = 0;
  talking = true;
  #server: number;
  #client: Client | undefined;
  /** The one that was said hello to last. */
  #met: Client | undefined;
  #stopped = false;
  #posted = 0;

  constructor(
    readonly name: string,
    readonly servers: { url: string }[],
    server: number,
    readonly room = "",
    readonly rest = REST_MS,
  ) {
    this.#server = server;
    started.push(() => this.stop());
    void this.#run();
  }

  /** The newest seq that it was told. */
  get last(): number {
    const record = this.records.at(-1);
    return record?.messages.at(-1)?.seq ?? 0;
  }

  async #run(): Promise<void> {
    for (; !this.#stopped; this.#server++) {
      try {
        const { url } = this.servers[this.#server % this.servers.length] as { url: string };
        const epoch = this.records.at(-1)?.epoch;
        const resume = epoch === undefined ? {} : { epoch, after: this.last };
        const client = await Client.connect(url, { room: this.room, name: this.name, ...resume });
        this.#client = client;
        client.ws.addEventListener("message", () => this.#take(client));
        client.ws.addEventListener("close", ({ code }) => this.closes.push(code));
        await client.until("the hello", () => this.#met === client);
        for (const [key, text] of this.outbox) client.post(text, key);
        while (client.ws.readyState === WebSocket.OPEN && !this.#stopped) await this.#talk(client);
      } catch {
        await Bun.sleep(REST_MS); // the server is away: not a wait for something, only not to spin
      }
    }
  }

  async #talk(client: Client): Promise<void> {
    if (this.talking && this.outbox.size < 3) {
      const key = `${this.name}-${this.#posted++}`;
      this.outbox.set(key, `text of ${key}`);
      client.post(`text of ${key}`, key);
    }
    await Bun.sleep(this.rest); // people do not talk without a break
  }

  /** Takes the frames that came since the last time. */
  #take(client: Client): void {
    for (const frame of client.frames.splice(0)) {
      if (frame.type === "hello") {
        this.#met = client;
        if (frame.resumed) this.resumes++;
        else this.records.push({ epoch: frame.epoch, messages: [] });
      }
      const { epoch, messages } = this.records.at(-1) as Mover["records"][0];
      if (frame.type === "ack") this.#confirm(frame.key, epoch);
      if (frame.type === "hello" || frame.type === "messages") {
        messages.push(...frame.messages);
        for (const { key } of frame.messages) if (key) this.#confirm(key, epoch);
      }
    }
  }

  #confirm(key: string, epoch: string): void {
    if (this.outbox.delete(key)) this.confirmed.set(key, epoch);
  }

  /** Waits until `n` posts more of this client were confirmed. */
  async talks(n: number): Promise<void> {
    const wanted = this.confirmed.size + n;
    await eventually(`${n} more posts of ${this.name}`, () => this.confirmed.size >= wanted);
  }

  /** Posts no more; waits until all it posted is confirmed. */
  async quiet(): Promise<void> {
    this.talking = false;
    await eventually(`the last posts of ${this.name}`, () => this.outbox.size === 0);
  }

  /** Waits until this client was told all up to a seq. */
  async reaches(seq: number): Promise<void> {
    await eventually(`seq ${seq} at ${this.name}`, () => this.last >= seq);
  }

  cut(): void {
    this.#client?.ws.terminate();
  }

  stop(): void {
    this.#stopped = true;
    this.cut();
  }
}

/** `count` movers spread over servers. */
function movers(count: number, servers: { url: string }[], room = "", rest = REST_MS): Mover[] {
  return Array.from({ length: count }, (_, i) => new Mover(`m${i}`, servers, i, room, rest));
}

/** People who talk over servers that share one Redis, as `launch` starts them. */
async function moversOver<Server extends { url: string }>(
  launch: (count: number, url: string) => Promise<Server[]>,
  count: number,
  people: number,
): Promise<{ redis: Redis; servers: Server[]; all: Mover[] }> {
  const redis = await ownRedis();
  const servers = await launch(count, redis.url);
  return { redis, servers, all: movers(people, servers) };
}

const allTalk = (all: Mover[], n: number) => Promise.all(all.map((mover) => mover.talks(n)));

/**
 * Ends the talk, and compares what everyone was told and promised with the log, on every server: nothing confirmed is
 * missing, nothing is doubled, one order, no holes, and nobody was left behind.
 */
async function expectOneChat(all: Mover[], servers: { url: string }[], room = ""): Promise<Message[]> {
  await Promise.all(all.map((mover) => mover.quiet()));
  // All is confirmed; the tail of a server may be a moment behind the one that confirmed it.
  const lasts = await Promise.all(servers.map(async ({ url }) => (await readLog(url, room)).at(-1)?.seq ?? 0));
  const whole = async ({ url }: { url: string }) => {
    for (;;) {
      const log = await readLog(url, room);
      if ((log.at(-1)?.seq ?? 0) >= Math.max(...lasts)) return log;
    }
  };
  const [log = [], ...others] = await within(Promise.all(servers.map(whole)), "the whole log on each server");
  for (const other of others) expect(other).toEqual(log);
  expectDense(log);
  const keys = log.map(({ key }) => key as string);
  expect(new Set(keys).size).toBe(keys.length);
  const last = (log.at(-1) as Message).seq;
  await Promise.all(all.map((mover) => mover.reaches(last)));
  const epoch = all[0]?.records.at(-1)?.epoch as string;
  const kept = new Set(keys);
  const old = new Map<string, Message>();
  for (const { name, records, confirmed } of all) {
    expect(records.at(-1)?.epoch).toBe(epoch);
    for (const record of records) {
      expectDense(record.messages);
      if (record.epoch === epoch) {
        const from = (record.messages[0]?.seq ?? 1) - (log[0] as Message).seq;
        expect(record.messages).toEqual(log.slice(from, from + record.messages.length));
      } else {
        for (const each of record.messages) {
          const place = `${record.epoch} ${each.seq}`;
          expect(each).toEqual(old.get(place) ?? each); // a log that is gone was one and the same for all
          old.set(place, each);
        }
      }
    }
    expect([...confirmed].filter(([key, of]) => of === epoch && !kept.has(key))).toEqual([]);
    const own = log.filter(({ key }) => key?.startsWith(`${name}-`)).map(({ key }) => Number(key?.split("-")[1]));
    expect([name, own]).toEqual([name, own.toSorted((a, b) => a - b)]); // what one client sends stays in its order
  }
  return log;
}

describeStore("seen means stored", (make) => {
  test("a server killed with kill -9 under load again and again loses nothing that anyone saw", async () => {
    const env = { ...(await make()).env, CHAT_RATE: "0", PORT: String(await freePort()) };
    let server = await spawnServer(env);
    const { url } = server;
    const all = movers(8, [{ url }], "", 0);
    for (let kill = 0; kill < 6; kill++) {
      await allTalk(all, 20);
      server.kill("SIGKILL");
      await server.exited;
      server = await spawnServer(env);
    }
    await allTalk(all, 20);
    await expectOneChat(all, [{ url }]);
    for (const { resumes, records } of all) expect([resumes >= 6, records.length]).toEqual([true, 1]);
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

describeStore("a script that posts and goes", (make) => {
  test("loses nothing, though nobody is in the room and it closes at once", async () => {
    const { url } = await start((await make()).config);
    for (let i = 0; i < 20; i++) {
      const script = await Client.connect(url, { room: "empty", plain: true });
      script.send(`line ${i}`);
      await script.leave();
    }
    const lines = Array.from({ length: 20 }, (_, i) => `line ${i}`);
    // It went before its post was stored.
    await eventually("twenty lines", async () => (await readLog(url, "empty")).length === 20);
    expect(textsOf(await readLog(url, "empty")).toSorted()).toEqual(lines.toSorted());
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
    const all = movers(4, [{ url }], "", 0);
    for (let cut = 0; cut < 40; cut++) {
      const mover = all[Math.floor(random() * all.length)] as Mover;
      await mover.talks(Math.floor(random() * 8));
      mover.cut();
    }
    await allTalk(all, 5);
    await expectOneChat(all, [{ url }]);
    for (const { records } of all) expect(records).toHaveLength(1);
  });

  test("a client that joins while others talk misses nothing between hello and the first message", async () => {
    const { url } = await start({ ...(await make()).config, rate: 0 });
    await allTalk(movers(3, [{ url }], "", 0), 1);
    for (let i = 0; i < 50; i++) {
      const client = await Client.join(url);
      await client.until("messages after the hello", () => client.all("messages").length >= 2);
      expectDense(client.messages);
      client.ws.terminate();
    }
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
    for (let i = 2952; i <= 3000; i++) ann.post(`m${i}`); // with m1 they are the newest 50
    ann.post("m2951");
    await ann.untilMessages(3002);
    await ann.nth("ack", 49);
    expect(ann.all("ack").map(({ seq }) => seq)).toEqual(Array.from({ length: 49 }, (_, i) => 2952 + i));
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
      [folder, /no such file or directory/],
      [used, /second server/],
      [FOLDER, /illegal operation on a directory/],
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

/** A WebSocket handshake as bytes; `change` makes it wrong. */
function rawHandshake(path = "/ws/", { plain = false, headers = "" } = {}): string {
  return (
    `GET ${path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n` +
    "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n" +
    `${plain ? "" : "Sec-WebSocket-Protocol: chat.v1\r\n"}${headers}\r\n`
  );
}

/** A TCP connection that says whatever it is told to, and records what comes back. */
class Raw {
  #received: Buffer[] = [];
  /** Bytes that came. */
  bytes = 0;
  ended = false;
  /** Whether what comes is kept, or only counted. */
  keep = true;
  #wake = Promise.withResolvers<void>();

  private constructor(readonly socket: Socket) {
    socket.on("data", (data: Buffer) => {
      this.bytes += data.length;
      if (this.keep) this.#received.push(data);
      this.#wakeUp();
    });
    for (const event of ["drain", "close"]) socket.on(event, () => this.#wakeUp());
    socket.on("close", () => (this.ended = true));
    socket.on("error", () => {}); // a reset: `ended` says it
    started.push(() => socket.destroy());
  }

  static async open(url: string): Promise<Raw> {
    const connected = Promise.withResolvers<void>();
    const socket = connect(Number(new URL(url).port), "127.0.0.1", connected.resolve);
    socket.once("error", connected.reject);
    await within(connected.promise, "a TCP connection");
    return new Raw(socket);
  }

  /** Opens and makes a WebSocket of it; returns when the hello has come, or the 101 for a plain one. */
  static async join(url: string, path?: string, options?: Parameters<typeof rawHandshake>[1]): Promise<Raw> {
    const raw = await Raw.open(url);
    raw.send(rawHandshake(path, options));
    await raw.until("the handshake", () => raw.text.includes(options?.plain ? "\r\n\r\n" : '"limits"'));
    return raw;
  }

  #wakeUp(): void {
    this.#wake.resolve();
    this.#wake = Promise.withResolvers();
  }

  get text(): string {
    return Buffer.concat(this.#received).toString("latin1");
  }

  /** The status line's number, or undefined when none came. */
  get status(): number | undefined {
    const status = /^HTTP\/1\.1 (\d+)/.exec(this.text)?.[1];
    return status === undefined ? undefined : Number(status);
  }

  /** The frames after the handshake: opcode and payload. */
  get frames(): [opcode: number, payload: Buffer][] {
    const all = Buffer.concat(this.#received);
    const frames: [number, Buffer][] = [];
    for (let at = all.indexOf("\r\n\r\n") + 4; at + 2 <= all.length;) {
      let [size, head] = [all[at + 1] as number, 2];
      if (size === 126) [size, head] = [all.readUInt16BE(at + 2), 4];
      else if (size === 127) [size, head] = [Number(all.readBigUInt64BE(at + 2)), 10];
      if (at + head + size > all.length) break;
      frames.push([(all[at] as number) & 15, all.subarray(at + head, at + head + size)]);
      at += head + size;
    }
    return frames;
  }

  /** The code of the Close frame that came; 1005 for one without. */
  get closeCode(): number | undefined {
    const close = this.frames.find(([opcode]) => opcode === 8)?.[1];
    return close && (close.length < 2 ? 1005 : close.readUInt16BE(0));
  }

  send(data: string | Uint8Array): void {
    this.socket.write(data);
  }

  async until(what: string, done: () => boolean): Promise<void> {
    const loop = async () => {
      while (!done()) {
        if (this.ended) throw new Error(`The connection ended before ${what}: ${this.text.slice(0, 300)}`);
        await this.#wake.promise;
      }
    };
    await within(loop(), what);
  }

  async untilEnded(): Promise<void> {
    const loop = async () => {
      while (!this.ended) await this.#wake.promise;
    };
    await within(loop(), "the end of the connection");
  }
}

/** MiB of memory that a process holds. */
function memoryOf(pid: number): number {
  return Number(/VmRSS:\s+(\d+)/.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1]) / 1024;
}

/** Collects what a process says on standard error. */
function errorsOf(server: ServerProcess): { text: string } {
  const errors = { text: "" };
  const [own, other] = server.stderr.tee(); // `spawnServer` reads the other one when the server ends
  Object.defineProperty(server, "stderr", { value: other });
  (async () => {
    for await (const chunk of own.pipeThrough(new TextDecoderStream())) errors.text += chunk;
  })();
  return errors;
}

// ─── Who gets in ─────────────────────────────────────────────────────────────────────────────────────────────────────

describe("a page of another origin", () => {
  const answer = async (url: string, origin: string, host: string) => {
    const raw = await Raw.open(url);
    const headers = `Origin: ${origin}\r\n`;
    raw.send(rawHandshake("/ws/", { headers }).replace("Host: localhost", `Host: ${host}`));
    await raw.until("an answer", () => raw.status !== undefined);
    return raw.status;
  };

  test("is kept out, the server's own comes in: with ports, IPv6 hosts, upper case, null and lists", async () => {
    const { url } = await start();
    const cases = [
      ["http://chat.example", "chat.example", 101],
      ["http://CHAT.example", "chat.example", 101],
      ["http://chat.example", "CHAT.Example", 101],
      ["https://chat.example", "chat.example", 101],
      ["http://chat.example:80", "chat.example", 101],
      ["https://chat.example", "chat.example:443", 101],
      ["http://chat.example:8080", "chat.example:8080", 101],
      ["http://[::1]:8080", "[::1]:8080", 101],
      ["http://[::1]", "[0:0:0:0:0:0:0:1]", 101],
      ["http://127.0.0.1:8080", "127.0.0.1:8080", 101],
      ["http://chat.example", "chat.example:8080", 403],
      ["http://chat.example:8081", "chat.example:8080", 403],
      ["http://[::2]:8080", "[::1]:8080", 403],
      ["http://evil.example", "chat.example", 403],
      ["http://chat.example.evil.example", "chat.example", 403],
      ["http://evil.example/chat.example", "chat.example", 403],
      ["http://evil.example#chat.example", "chat.example", 403],
      ["http://chat.example@evil.example", "chat.example", 403],
      ["http://xchat.example", "chat.example", 403],
      ["http://chat.example, http://evil.example", "chat.example", 403],
      ["http://chat.example,http://evil.example", "chat.example", 403],
      ["null", "chat.example", 403],
      ["", "chat.example", 403],
      ["null", "null", 403],
      ["file://", "chat.example", 403],
      ["chrome-extension://chat.example", "localhost", 403],
      ["about:blank", "chat.example", 403],
    ] as const;
    for (const [origin, host, status] of cases) {
      expect([origin, host, await answer(url, origin, host)]).toEqual([origin, host, status]);
    }
  });

  test("comes in when CHAT_ORIGINS names it: as an origin, as a host, or by *; a proxy may rewrite Host then", async () => {
    const { origins } = readConfig({ CHAT_ORIGINS: "https://Chat.example, other.example:8443" });
    const { url } = await start({ origins });
    const cases = [
      ["https://chat.example", 101],
      ["https://chat.example:443", 101],
      ["http://chat.example", 403],
      ["https://other.example:8443", 101],
      ["http://other.example:8443", 101],
      ["https://other.example", 403],
      ["https://evil.example", 403],
      ["null", 403],
    ] as const;
    for (const [origin, status] of cases) {
      expect([origin, await answer(url, origin, "127.0.0.1:9000")]).toEqual([origin, status]);
    }
    const open = await start({ origins: ["*"] });
    for (const origin of ["https://evil.example", "null"]) expect(await answer(open.url, origin, "x")).toBe(101);
  });
});

describe("a password", () => {
  const PASSWORD = "öpen sesame+&=%";
  const login = (url: string, password: string, headers: Record<string, string> = {}, path = "") =>
    fetch(url + path, { method: "POST", body: new URLSearchParams({ password }), headers });
  const cookieOf = (response: Response) => /^[^;]+/.exec(response.headers.get("set-cookie") ?? "")?.[0] ?? "";
  /** The status with which a plain handshake is answered. */
  const knock = async (url: string, headers: Record<string, string>) => {
    const raw = await Raw.open(url);
    const lines = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`);
    raw.send(Buffer.from(rawHandshake("/ws/", { plain: true, headers: lines.join("") })));
    await raw.until("an answer", () => raw.status !== undefined);
    return raw.status;
  };

  test("keeps everything but the page from those who do not have it, in both dialects", async () => {
    const { url } = await start({ password: PASSWORD });
    const ann = await Client.join(url, { name: "Ann", headers: { Cookie: cookieOf(await login(url, PASSWORD)) } });
    ann.post("secret");
    await ann.untilMessages(1);
    expect(await (await fetch(url)).text()).toBe(await Bun.file(join(import.meta.dir, "index.html")).text());
    for (const path of ["/ws/", "/ws/team", "/ws/?epoch=0&after=0"]) {
      const plain = await Raw.open(url);
      plain.send(rawHandshake(path, { plain: true }));
      await plain.until("an answer", () => plain.status === 401);
      expect(plain.text).toContain("\r\n\r\nA password is needed.\n");
      const chat = await Raw.open(url);
      chat.send(rawHandshake(path) + rawFrame('{"type":"post","key":"k","text":"in"}').toString("latin1"));
      await chat.untilEnded();
      expect([chat.status, chat.closeCode, chat.frames.length]).toEqual([101, 4401, 1]);
    }
    ann.send({ type: "typing" });
    await ann.settle();
    expect(textsOf(ann.messages)).toEqual(["secret"]);
    expect(ann.all("presence").at(-1)?.count).toBe(1);
  });

  test("is given at any path for a cookie that does not hold it, and is honoured in both dialects; so is Bearer", async () => {
    const { url } = await start({ password: "sesame" });
    const response = await login(url, "sesame", {}, "team");
    expect([response.status, await response.text()]).toEqual([204, ""]);
    const [set, ...others] = response.headers.getSetCookie();
    expect(others).toEqual([]);
    expect(set).toMatch(/^chat-[0-9a-f]{8}=[\w.-]+; Path=\/; Max-Age=\d+; HttpOnly; SameSite=Strict$/);
    expect(Buffer.from(set!, "base64").toString("latin1") + set).not.toContain("sesame");
    const cookie = cookieOf(response);
    await (await Client.join(url, { headers: { Cookie: `other=1; ${cookie}; last=2` } })).settle();
    expect(await knock(url, { Cookie: cookie })).toBe(101);
    expect(await knock(url, { Authorization: "Bearer sesame" })).toBe(101);
    expect(await knock(url, { Authorization: "bearer sesame" })).toBe(101);
    await (await Client.join(url, { headers: { Authorization: "Bearer sesame" } })).settle();
  });

  test("of any characters is understood by the form", async () => {
    const { url } = await start({ password: PASSWORD });
    expect((await login(url, PASSWORD)).status).toBe(204);
    expect((await login(url, `${PASSWORD} `)).status).toBe(401);
  });

  test("wrong, forged, ended, of another password, or no cookie at all: none comes in", async () => {
    const first = await start({ password: "one" });
    const other = await start({ password: "two" });
    const cookie = cookieOf(await login(first.url, "one"));
    expect(await knock(other.url, { Cookie: cookie })).toBe(401);
    const [name, ends, signature] = cookie.split(/[=.]/) as [string, string, string];
    const [, session] = cookieOf(await login(other.url, "two")).split("=");
    const bad = [
      `${name}=`,
      `${name}=.`,
      `${name}=${ends}`,
      `${name}=${ends}.`,
      `${name}=.${signature}`,
      `${name}=${Number(ends) + 1}.${signature}`,
      `${name}=1e99.${signature}`,
      `${name}=${ends}.${signature.slice(0, -2)}`,
      `${name}=${ends}.${signature}AAAA`,
      `${name}=${ends}.${"A".repeat(43)}`,
      `${name.toUpperCase()}=${ends}.${signature}`,
      `${name}=%00%ff%zz`,
      `${name}=${"x".repeat(8000)}`,
      ";;;===",
      `${name}=one`,
      `${name}=${session}`,
      `chat=${ends}.${signature}`,
    ];
    for (const each of bad) expect([each, await knock(first.url, { Cookie: each })]).toEqual([each, 401]);
    expect(await knock(first.url, { Cookie: cookie })).toBe(101);
    for (const each of ["Basic b25l", "Bearer", "one", "Bearer  one"]) {
      expect([each, await knock(first.url, { Authorization: each })]).toEqual([each, 401]);
    }
  });

  test("lets a browser into two chats on one host, whose cookies it keeps together", async () => {
    const passwords = ["one", "two"];
    const chats = await Promise.all(passwords.map((password) => start({ password })));
    const jar = new Map<string, string>();
    for (const [i, { url }] of chats.entries()) {
      const [name = "", value = ""] = cookieOf(await login(url, passwords[i] as string)).split("=");
      jar.set(name, value);
    }
    const Cookie = Array.from(jar, ([name, value]) => `${name}=${value}`).join("; ");
    for (const { url } of chats) expect(await knock(url, { Cookie })).toBe(101);
  });

  test("that was changed ends the old cookies", async () => {
    const db = newFile();
    const before = await start({ password: "old", db });
    const cookie = cookieOf(await login(before.url, "old"));
    await before.stop();
    const after = await start({ password: "new", db });
    expect(await knock(after.url, { Cookie: cookie })).toBe(401);
    await after.stop();
    const back = await start({ password: "old", db });
    expect(await knock(back.url, { Cookie: cookie })).toBe(101);
  });

  test("is not tried from pages of other origins", async () => {
    const { url } = await start({ password: "sesame" });
    for (const Origin of ["https://evil.example", "null"]) {
      const response = await login(url, "sesame", { Origin });
      expect([response.status, response.headers.get("set-cookie")]).toEqual([403, null]);
    }
    expect((await login(url, "sesame", { Origin: url.slice(0, -1) })).status).toBe(204);
  });

  test("guessed wrong makes the address wait, by form, Bearer and socket alike, and nobody else", async () => {
    const { url } = await start({ password: "sesame", proxies: 1 });
    const from = (address: string) => ({ "X-Forwarded-For": address });
    const statuses = [];
    for (let i = 0; i < 7; i++) statuses.push((await login(url, `guess${i}`, from("192.0.2.1"))).status);
    expect(statuses).toEqual([401, 401, 401, 401, 401, 401, 429]);
    const refused = await login(url, "sesame", from("192.0.2.1"));
    expect([refused.status, refused.headers.get("retry-after")]).toEqual([429, "1"]);
    expect(await knock(url, { Authorization: "Bearer sesame", ...from("192.0.2.1") })).toBe(429);
    const chat = await Raw.open(url);
    chat.send(rawHandshake("/ws/", { headers: "Authorization: Bearer sesame\r\nX-Forwarded-For: 192.0.2.1\r\n" }));
    await chat.untilEnded();
    expect(chat.closeCode).toBe(4401);
    expect((await login(url, "sesame", from("192.0.2.2"))).status).toBe(204);
  });

  test("guessed a thousand times leaves a server that answers, and those who are in", async () => {
    const server = await spawnServer({ CHAT_PASSWORD: "sesame", CHAT_PROXIES: "1", LOG_LEVEL: "info" });
    const ann = await Client.join(server.url, {
      headers: { Authorization: "Bearer sesame", "X-Forwarded-For": "192.0.2.99" },
    });
    const guess = (i: number) =>
      login(server.url, "x".repeat(2000), { "X-Forwarded-For": `10.${i >> 16}.${(i >> 8) & 255}.${i & 255}` });
    const before = memoryOf(server.pid);
    for (let i = 0; i < 1000; i += 100) await Promise.all(Array.from({ length: 100 }, (_, k) => guess(i + k)));
    const same = await Promise.all(Array.from({ length: 200 }, () => guess(0)));
    expect(same.filter(({ status }) => status === 429).length).toBeGreaterThan(190);
    await ann.settle();
    expect(memoryOf(server.pid) - before).toBeLessThan(64);
  });

  test("is counted by the address that the trusted proxies saw, whatever the client made up", async () => {
    const spoof = async (config: Partial<Config>, lines: (i: number) => [string, string][]) => {
      const { url } = await start({ password: "sesame", ...config });
      const statuses = [];
      for (let i = 0; i < 8; i++) {
        const raw = await Raw.open(url);
        const headers = lines(i)
          .map(([name, value]) => `${name}: ${value}\r\n`)
          .join("");
        raw.send(rawHandshake("/ws/", { plain: true, headers: `Authorization: Bearer no\r\n${headers}` }));
        await raw.until("an answer", () => raw.status !== undefined);
        statuses.push(raw.status);
      }
      return statuses.includes(429);
    };
    const x = "X-Forwarded-For";
    expect(await spoof({}, (i) => [[x, `192.0.2.${i}`]])).toBe(true); // no proxy is trusted: the header is nothing
    expect(await spoof({ proxies: 1 }, (i) => [[x, `192.0.2.${i}, 198.51.100.7`]])).toBe(true);
    expect(
      await spoof({ proxies: 1 }, (i) => [
        [x, `192.0.2.${i}`],
        [x, "198.51.100.7"],
      ]),
    ).toBe(true); // as HAProxy adds it
    expect(await spoof({ proxies: 2 }, (i) => [[x, `192.0.2.${i}, 198.51.100.7, 203.0.113.9`]])).toBe(true);
    expect(await spoof({ proxies: 1 }, (i) => [[x, `2001:db8:1:2:${i}::1`]])).toBe(true); // one /64
    expect(await spoof({ proxies: 1 }, (i) => [[x, `2001:db8:1:2::${i}`]])).toBe(true);
    expect(await spoof({ proxies: 1 }, (i) => [[x, `2001:DB8:1:2::${i ? "a" : "A"}`]])).toBe(true);
    expect(await spoof({ proxies: 1 }, (i) => [[x, `2001:db8:1:${i}::1`]])).toBe(false); // others
    expect(await spoof({ proxies: 1 }, (i) => [[x, `198.51.100.7:${5000 + i}`]])).toBe(true); // with a port, as some proxies add it
    expect(await spoof({ proxies: 1 }, (i) => [[x, `[2001:db8:1:2::1]:${5000 + i}`]])).toBe(true);
  });
});

describe("the page's headers", () => {
  test("are the ones that the design names, and the policy's hashes are of its one script and one style", async () => {
    const { url } = await start({ password: "sesame" });
    const response = await fetch(`${url}team`);
    const html = await response.text();
    const hash = (tag: string) => {
      const contents = [...html.matchAll(new RegExp(`<${tag}[^>]*>([^]*?)</${tag}>`, "g"))];
      expect(contents).toHaveLength(1);
      return `'sha256-${new Bun.CryptoHasher("sha256").update(contents[0]?.[1] ?? "").digest("base64")}'`;
    };
    const policy = Object.fromEntries(
      (response.headers.get("content-security-policy") ?? "").split(";").map((directive) => {
        const [name = "", ...values] = directive.trim().split(" ");
        return [name, values.join(" ")];
      }),
    );
    expect(policy).toEqual({
      "default-src": "'none'",
      "script-src": hash("script"),
      "style-src": hash("style"),
      "img-src": "data:",
      "connect-src": "'self'",
      "base-uri": "'none'",
      "form-action": "'self'",
      "frame-ancestors": "'none'",
      "require-trusted-types-for": "'script'",
      "trusted-types": "'none'",
    });
    expect(response.headers.get("x-content-type-options")).toBe("nosniff");
    expect(response.headers.get("referrer-policy")).toBe("no-referrer");
    expect(response.headers.get("cache-control")).toBe("no-cache");
    expect(response.headers.get("access-control-allow-origin")).toBe(null);
    expect(response.headers.get("server") ?? response.headers.get("x-powered-by")).toBe(null);
    expect(html).not.toMatch(/\son[a-z]+\s*=\s*["']|style="|javascript:/i);
  });
});

// ─── Slow readers, flooders ──────────────────────────────────────────────────────────────────────────────────────────

describe("a reader that does not read", () => {
  test("is cut, costs a bounded buffer, hurts nobody, and resumes without a hole", async () => {
    const server = await spawnServer({ CHAT_RATE: "0" });
    const [ann, bo] = [await Client.join(server.url, { name: "Ann" }), await Client.join(server.url, { plain: true })];
    const { epoch } = await ann.first("hello");
    const slow = await Promise.all(Array.from({ length: 30 }, () => Raw.join(server.url)));
    for (const { socket } of slow) socket.pause();
    const before = memoryOf(server.pid);
    let [posted, most] = [0, 0];
    const cut = () => server.output.match(/ left the lobby \(1006\)/g)?.length ?? 0;
    const text = "x".repeat(16_000);
    while (cut() < slow.length && posted < 4000) {
      for (let i = 0; i < 20; i++) ann.post(text, `k${++posted}`);
      await ann.untilMessages(posted);
      most = Math.max(most, memoryOf(server.pid));
    }
    expect(cut()).toBe(slow.length);
    expect(most - before).toBeLessThan(slow.length * 1 + 48); // 48 for the messages on their way and the database's cache
    expectDense(ann.messages);
    expect((await bo.untilTexts(posted)).length).toBe(posted);
    const after = posted - 10;
    const again = await Client.join(server.url, { epoch, after });
    const { resumed, messages } = await again.first("hello");
    expect([resumed, messages[0]?.seq, messages.length]).toEqual([true, after + 1, 10]);
  });

  test("of pongs, pings, pages and the page itself costs no more", async () => {
    const server = await spawnServer({ CHAT_RATE: "0" });
    const ann = await Client.join(server.url);
    for (let i = 0; i < 100; i++) ann.post("x".repeat(16_000), `k${i}`);
    await ann.untilMessages(100);
    const before = memoryOf(server.pid);
    const asks = [
      Buffer.concat(Array(4000).fill(rawFrame("p".repeat(125), 9))),
      Buffer.concat(Array(20_000).fill(rawFrame('{"type":"ping"}'))),
      Buffer.concat(Array(500).fill(rawFrame('{"type":"page","before":101}'))),
    ];
    for (const ask of asks) {
      const raws = await Promise.all(Array.from({ length: 5 }, () => Raw.join(server.url)));
      for (const raw of raws) raw.socket.pause();
      for (const raw of raws) for (let i = 0; i < 5; i++) raw.send(ask);
      await ann.settle();
      for (const raw of raws) raw.socket.destroy();
    }
    const piped = await Promise.all(Array.from({ length: 5 }, () => Raw.open(server.url)));
    for (const { socket } of piped) socket.pause();
    for (const raw of piped) raw.send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".repeat(2000));
    for (let i = 0; i < 20; i++) await ann.settle();
    expect(memoryOf(server.pid) - before).toBeLessThan(96);
  });

  test("of a hello full of control characters still gets in: what is bounded is what is sent", async () => {
    const { url } = await start({ rate: 0 });
    const [bot, ann] = [await Client.join(url, { plain: true }), await Client.join(url)];
    for (let i = 1; i <= 100; i++) {
      bot.send("\u0001".repeat(16 * 1024)); // each takes six bytes in JSON
      await ann.untilMessages(i);
    }
    const { frames } = await Raw.join(url);
    expect(frames[0]?.[1].length).toBeLessThan(300 * 1024);
    const bo = await Client.join(url);
    const [oldest] = (await bo.first("hello")).messages;
    bo.send({ type: "page", before: oldest!.seq });
    expect((await bo.first("page")).messages.at(-1)?.seq).toBe(oldest!.seq - 1);
    expect((bo.texts.find((text) => text.includes('"page"')) ?? "").length).toBeLessThan(300 * 1024);
  });

  test("of a thousand resumed hellos, each another, leaves no memory behind", async () => {
    const server = await spawnServer({ CHAT_RATE: "0" });
    const ann = await Client.join(server.url);
    const { epoch } = await ann.first("hello");
    for (let i = 0; i < 1000; i++) ann.post("x".repeat(250), `k${i}`);
    await ann.untilMessages(1000);
    const before = memoryOf(server.pid);
    for (let after = 1; after < 1000; after++) {
      const raw = await Raw.open(server.url);
      raw.keep = false;
      raw.send(rawHandshake(`/ws/?epoch=${epoch}&after=${after}`));
      await raw.until("the hello", () => raw.bytes > 400);
      raw.socket.destroy();
    }
    expect(memoryOf(server.pid) - before).toBeLessThan(140);
  });
});

describe("a flooder", () => {
  /** Sends frames as fast as the server takes them, until it takes no more or `count` are sent. */
  const flood = async (raw: Raw, count: number, frame: (i: number) => Buffer) => {
    for (let i = 1; i <= count; i += 100) {
      raw.send(Buffer.concat(Array.from({ length: Math.min(100, count - i + 1) }, (_, k) => frame(i + k))));
      if (raw.socket.writableNeedDrain) await raw.until("room to send", () => !raw.socket.writableNeedDrain);
    }
  };
  const post = (i: number, text: string) => rawFrame(JSON.stringify({ type: "post", key: `k${i}`, text }));

  test("is slowed to CHAT_RATE, and nothing of it is lost or changes places: tiny frames", async () => {
    const { url } = await start({ rate: 1000 });
    const [ann, raw] = [await Client.join(url), await Raw.join(url)];
    await flood(raw, 15_000, (i) => post(i, `${i}`));
    expect(ann.messages.length).toBeLessThan(15_000);
    await ann.untilMessages(15_000);
    expect(textsOf(ann.messages)).toEqual(Array.from({ length: 15_000 }, (_, i) => `${i + 1}`));
    expectDense(ann.messages);
  });

  test("is slowed to CHAT_RATE, and nothing of it is lost or changes places: 16 KiB frames, plain", async () => {
    const { url } = await spawnServer({ CHAT_RATE: "20" });
    const [ann, raw] = [await Client.join(url), await Raw.join(url, "/ws/", { plain: true })];
    const text = (i: number) => `${i}:`.padEnd(16 * 1024, "x");
    await flood(raw, 240, (i) => rawFrame(text(i)));
    await ann.untilMessages(240);
    expect(ann.messages.every((each, i) => each.text === text(i + 1))).toBe(true);
  });

  test("that closes cleanly still gets in what it had sent", async () => {
    const { url } = await start({ rate: 200 });
    const [ann, raw] = [await Client.join(url), await Raw.join(url)];
    await flood(raw, 2500, (i) => post(i, `${i}`));
    raw.send(rawFrame(Buffer.from([3, 232]), 8));
    await raw.untilEnded(); // the close is answered before the queue is empty
    expect(raw.closeCode).toBe(1000);
    expect(ann.messages.length).toBeLessThan(2500);
    await ann.untilMessages(2500);
    expect(textsOf(ann.messages)).toEqual(Array.from({ length: 2500 }, (_, i) => `${i + 1}`));
  });

  test("gets its pings answered while its posts wait", async () => {
    const { url } = await start({ rate: 10 });
    const [ann, raw] = [await Client.join(url), await Raw.join(url)];
    await flood(raw, 5000, (i) => post(i, `${i}`));
    raw.send(rawFrame('{"type":"ping"}'));
    raw.send(rawFrame("anybody?", 9));
    const answers = () => raw.frames.map(([opcode, payload]) => `${opcode} ${payload}`);
    await raw.until("the pongs", () => answers().includes("10 anybody?") && answers().includes('1 {"type":"pong"}'));
    expect(ann.messages.length).toBeLessThan(5000);
  });

  test("cannot make its queue large, by whatever its frames are large with", async () => {
    const frames = {
      text: JSON.stringify({ type: "post", key: "k", text: "x".repeat(16_000) }),
      "a text that is too long": JSON.stringify({ type: "post", key: "k", text: "x".repeat(60_000) }),
      "a key that is too long": JSON.stringify({ type: "post", key: "k".repeat(60_000), text: "x" }),
      "a name that is too long": JSON.stringify({ type: "name", name: "n".repeat(60_000) }),
      nothing: '{"type":"typing"}',
    };
    for (const [what, frame] of Object.entries(frames)) {
      const server = await spawnServer({ CHAT_RATE: "1" });
      const [ann, raw] = [await Client.join(server.url), await Raw.join(server.url)];
      const before = memoryOf(server.pid);
      const many = Buffer.concat(Array(Math.ceil(1e6 / frame.length)).fill(rawFrame(frame)));
      for (let i = 0; i < 150; i++) {
        raw.send(many);
        await ann.settle();
        if (raw.socket.writableLength > 20e6) break; // it is read no further
      }
      expect([what, memoryOf(server.pid) - before < 48]).toEqual([what, true]);
      server.kill("SIGKILL");
    }
  });

  test("is not slowed with CHAT_RATE=0", async () => {
    const { url } = await start({ rate: 0 });
    const [ann, raw] = [await Client.join(url), await Raw.join(url)];
    await flood(raw, 20_000, (i) => post(i, `${i}`));
    raw.send(rawFrame('{"type":"ping"}'));
    await raw.until("the pong", () => raw.text.includes('"pong"')); // by then all of it was handed to the broker
    await ann.untilMessages(20_000);
    expectDense(ann.messages);
  });
});

// ─── Broken and hostile clients ──────────────────────────────────────────────────────────────────────────────────────

describe("a broken handshake", () => {
  test("gets the right status and a sentence, and nobody notices", async () => {
    const server = await spawnServer({});
    const errors = errorsOf(server);
    const ann = await Client.join(server.url);
    const good = rawHandshake();
    const cases: [what: string, request: string, status: number][] = [
      ["no key", good.replace(/Sec-WebSocket-Key.*\r\n/, ""), 400],
      ["a short key", good.replace(/Key: .*\r\n/, "Key: abc\r\n"), 400],
      ["a long key", good.replace(/Key: .*\r\n/, `Key: ${"A".repeat(60)}\r\n`), 400],
      ["version 8", good.replace("Version: 13", "Version: 8"), 426],
      ["no version", good.replace(/Sec-WebSocket-Version.*\r\n/, ""), 426],
      ["two versions", good.replace("Version: 13", "Version: 13, 8"), 426],
      ["no upgrade", good.replace("Upgrade: websocket\r\n", ""), 426],
      ["another upgrade", good.replace("Upgrade: websocket", "Upgrade: h2c"), 426],
      ["another subprotocol", good.replace("chat.v1", "chat.v2"), 400],
      ["POST", good.replace("GET", "POST"), 400],
      ["a room that is too long", good.replace("/ws/", `/ws/${"r".repeat(65)}`), 400],
      ["a room with a control character", good.replace("/ws/", "/ws/a%00b"), 400],
      ["a room that is no UTF-8", good.replace("/ws/", "/ws/%ff"), 400],
      ["no Host", good.replace("Host: localhost\r\n", ""), 400],
      ["a Host with a space", good.replace("Host: localhost", "Host: a b"), 400],
      ["a Host that is half an address", good.replace("Host: localhost", "Host: ["), 400],
      ["a page from a Host that is none", "GET / HTTP/1.1\r\nHost: %zz\r\n\r\n", 400],
      ["garbage", "\x16\x03\x01\x02\x00\x01\xff\r\n\r\n", 400],
      ["HTTP/2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400],
      ["HTTP/9.9", "GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", 505],
      ["huge headers", good.replace("Host:", `X: ${"x".repeat(200_000)}\r\nHost:`), 431],
      ["a huge path", good.replace("/ws/", `/${"x".repeat(200_000)}`), 431],
      ["a thousand headers", good.replace("Host:", `${"X: x\r\n".repeat(1000)}Host:`), 431],
      ["two lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", 400],
      [
        "a length and chunks",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
      ],
    ];
    for (const [what, request, status] of cases) {
      const raw = await Raw.open(server.url);
      raw.send(Buffer.from(request, "latin1"));
      await raw.until(`an answer to ${what}`, () => raw.status !== undefined);
      expect([what, raw.status]).toEqual([what, status]);
      raw.socket.destroy();
    }
    await ann.settle();
    expect([server.exitCode, errors.text]).toEqual([null, ""]); // no stack for what others do wrong
  });

  test("that is cut into single bytes, or comes with its first frames, is none", async () => {
    const { url } = await start();
    const slow = await Raw.open(url);
    slow.socket.setNoDelay(true);
    for (const byte of Buffer.concat([Buffer.from(rawHandshake()), rawFrame('{"type":"ping"}')])) {
      await new Promise((sent) => slow.socket.write(Buffer.from([byte]), sent));
    }
    await slow.until("the pong", () => slow.text.includes('"pong"'));
    const eager = await Raw.open(url);
    eager.send(
      Buffer.concat([
        Buffer.from(rawHandshake()),
        rawFrame('{"type":"post","key":"k","text":"early"}'),
        rawFrame('{"type":"ping"}'),
      ]),
    );
    await eager.until("both answers", () => eager.text.includes('"early"') && eager.text.includes('"pong"'));
    expect(JSON.parse(eager.frames[0]?.[1].toString() ?? "").type).toBe("hello");
  });

  test("a thousand times, never finished, keeps nobody out, and leaves nothing behind", async () => {
    const server = await spawnServer({});
    const ann = await Client.join(server.url);
    const descriptors = () => readdirSync(`/proc/${server.pid}/fd`).length;
    const [memory, files] = [memoryOf(server.pid), descriptors()];
    const raws = await Promise.all(Array.from({ length: 1000 }, () => Raw.open(server.url)));
    for (const [i, raw] of raws.entries()) raw.send(rawHandshake().slice(0, i % 200));
    await (await Client.join(server.url)).settle();
    await ann.settle();
    for (const { socket } of raws) socket.destroy();
    await eventually("that all are closed", () => descriptors() <= files + 2);
    expect(memoryOf(server.pid) - memory).toBeLessThan(32);
  });
});

describe("a broken frame", () => {
  const text = '{"type":"ping"}';
  const close = (code: number, reason = "") =>
    rawFrame(Buffer.concat([Buffer.from([code >> 8, code & 255]), Buffer.from(reason, "latin1")]), 8);
  const header = (...bytes: number[]) => Buffer.from([0x81, 0xff, ...bytes, 0, 0, 0, 0]);

  test("ends the connection with the code of RFC 6455, and nobody else's", async () => {
    const { url } = await start({ rate: 0 });
    const ann = await Client.join(url);
    const cases: [what: string, code: number, ...frames: Buffer[]][] = [
      ["unmasked", 1002, rawFrame(text, 1, { mask: false })],
      ["RSV1", 1002, rawFrame(text, 1, { rsv: 4 })],
      ["RSV2", 1002, rawFrame(text, 1, { rsv: 2 })],
      ["RSV3", 1002, rawFrame(text, 1, { rsv: 1 })],
      ...[3, 4, 5, 6, 7, 11, 12, 13, 14, 15].map((op): [string, number, Buffer] => [
        `opcode ${op}`,
        1002,
        rawFrame("", op),
      ]),
      ["a fragmented ping", 1002, rawFrame("x", 9, { fin: false })],
      ["a fragmented close", 1002, rawFrame("", 8, { fin: false })],
      ["a ping of 126 bytes", 1002, rawFrame("x".repeat(126), 9)],
      ["a continuation of nothing", 1002, rawFrame(text, 0)],
      ["a text inside a text", 1002, rawFrame("a", 1, { fin: false }), rawFrame(text)],
      ["a binary frame", 1003, rawFrame(text, 2)],
      ["no UTF-8", 1007, rawFrame(Buffer.from([0x22, 0xff, 0x22]))],
      ["a surrogate", 1007, rawFrame(Buffer.from([0xed, 0xa0, 0x80]))],
      ["an overlong slash", 1007, rawFrame(Buffer.from([0xc0, 0xaf]))],
      ["UTF-8 that breaks off", 1007, rawFrame(Buffer.from([0xe5, 0x9b]))],
      [
        "UTF-8 that breaks off between fragments",
        1007,
        rawFrame(Buffer.from([0xe5]), 1, { fin: false }),
        rawFrame("x", 0),
      ],
      ["1 GiB", 1009, header(0, 0, 0, 0, 0x40, 0, 0, 0)],
      ["2^63 bytes", 1009, header(0x80, 0, 0, 0, 0, 0, 0, 0)],
      ["2^64 - 1 bytes", 1009, header(255, 255, 255, 255, 255, 255, 255, 255)],
      ["64 KiB and one byte", 1009, rawFrame("x".repeat(65_537))],
      [
        "fragments of more than 64 KiB",
        1009,
        ...Array.from({ length: 65 }, (_, i) => rawFrame("x".repeat(1024), i ? 0 : 1, { fin: false })),
      ],
      ["a close of one byte", 1002, rawFrame("\x03", 8)],
      ...[0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65_535].map((code): [string, number, Buffer] => [
        `close ${code}`,
        1002,
        close(code),
      ]),
      ["a close whose reason is no UTF-8", 1007, close(1000, "\xff\xfe")],
      ["a close without a code", 1005, rawFrame("", 8)],
      ["a close", 1000, close(1000, "bye")],
      ["a close of an application", 4999, close(4999)],
      ["zeros", 1002, Buffer.alloc(100)],
      ["HTTP", 1002, Buffer.from("GET / HTTP/1.1\r\n\r\n")],
    ];
    for (const [what, code, ...frames] of cases) {
      for (const plain of [false, true]) {
        const raw = await Raw.join(url, "/ws/", { plain });
        for (const frame of frames) raw.send(frame);
        raw.send(rawFrame('{"type":"post","key":"never","text":"after the end"}'));
        await raw.untilEnded();
        expect([what, raw.closeCode]).toEqual([what, code]);
      }
    }
    ann.post("still here");
    await ann.untilMessages(1);
    expect(textsOf(ann.messages)).toEqual(["still here"]);
  });

  test("that only looks like one is understood: fragments with a ping between, UTF-8 cut in two, long forms of short lengths", async () => {
    const { url } = await start();
    const plain = await Raw.join(url, "/ws/", { plain: true });
    const [first, ...rest] = Buffer.from("团队🙂");
    plain.send(rawFrame(Buffer.from([first!]), 1, { fin: false }));
    plain.send(rawFrame("between", 9));
    for (const byte of rest) plain.send(rawFrame(Buffer.from([byte]), 0, { fin: false }));
    plain.send(rawFrame("", 0));
    plain.send(rawFrame("unasked", 10));
    plain.send(Buffer.concat([Buffer.from([0x81, 0xff, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0]), Buffer.from("hi")]));
    plain.send(rawFrame(""));
    await plain.until("its texts", () => plain.frames.length >= 4);
    expect(plain.frames.map(([opcode, payload]) => [opcode, payload.toString()])).toEqual([
      [10, "between"],
      [1, "团队🙂"],
      [1, "hi"],
      [1, ""],
    ]);
  });

  test("never answered, half open or left in the middle leaves nothing behind when its connection goes", async () => {
    const server = await spawnServer({});
    const ann = await Client.join(server.url);
    const descriptors = () => readdirSync(`/proc/${server.pid}/fd`).length;
    const before = descriptors();
    const raws = await Promise.all(Array.from({ length: 40 }, () => Raw.join(server.url, "/ws/?name=x")));
    for (const [i, raw] of raws.entries()) {
      if (i % 4 === 0) for (let k = 0; k < 12; k++) raw.send(rawFrame("bad"));
      if (i % 4 === 1) raw.send(rawFrame("x".repeat(1000)).subarray(0, 500));
      if (i % 4 === 2) raw.socket.end();
      if (i % 4 === 3) raw.socket.resetAndDestroy();
    }
    await ann.settle();
    for (const { socket } of raws) socket.destroy();
    await eventually("that all are closed", () => descriptors() <= before);
    await ann.until("that all have left", () => ann.all("presence").at(-1)?.count === 1);
  });
});

describe("whatever a generator makes up", () => {
  const SEED = Number(process.env.SEED ?? 20260101);
  const TYPES = new Set(["hello", "messages", "page", "ack", "presence", "typing", "pong", "error"]);

  /** What a client sees of the others must be well formed, whatever they send. */
  const expectSound = (client: Client) => {
    for (const frame of client.frames) expect(TYPES.has(frame.type)).toBe(true);
    expectDense(client.messages);
    for (const { seq, at, name, text, key, ...rest } of client.messages) {
      expect([typeof seq, typeof at, typeof name, typeof text, rest]).toEqual([
        "number",
        "number",
        "string",
        "string",
        {},
      ]);
      expect(name.isWellFormed() && text.isWellFormed() && name.trim() === name && [...name].length <= 32).toBe(true);
      expect(Buffer.byteLength(text)).toBeLessThanOrEqual(16 * 1024);
      if (key !== undefined) expect(key).toMatch(/^[\w-]{1,64}$/);
    }
  };

  test("as JSON is answered or refused, and the others see only what is sound", async () => {
    const server = await spawnServer({ CHAT_RATE: "0" });
    const ann = await Client.join(server.url, { name: "Ann" });
    const random = randomFrom(SEED);
    const pick = <T>(from: readonly T[]): T => from[Math.floor(random() * from.length)] as T;
    const strings = [
      "",
      "x",
      " ",
      "\0",
      "\ud800",
      "\udc00x",
      "\ufeff",
      "🙂",
      "e\u0301",
      "\u202e",
      "__proto__",
      "constructor",
      "團".repeat(5462),
      "a".repeat(70),
      "ping",
      "post",
      "\u2028",
      '"}',
      "k1",
    ];
    const value = (): string =>
      pick([
        () => JSON.stringify(pick(strings)),
        () =>
          pick([
            "0",
            "-1",
            "1e999",
            "-0",
            "1.5",
            "9007199254740993",
            "123456789012345678901234567890",
            "1E+2",
            "01",
            "NaN",
            "+1",
          ]),
        () =>
          pick([
            "null",
            "true",
            "false",
            "{}",
            "[]",
            '{"type":"post"}',
            '["post"]',
            "[".repeat(3000) + "]".repeat(3000),
            '{"__proto__":{"type":"ping"}}',
          ]),
        () => pick(['"\\ud83d"', '"\\u0000"', '"\\x"', '"\u0001"', '"unfinished', "'single'"]),
      ])();
    const fields = [
      "type",
      "key",
      "text",
      "before",
      "name",
      "__proto__",
      "constructor",
      "toString",
      "extra",
      "",
      "Type",
    ];
    let keys = 0;
    const valid = [
      () => ({ type: '"post"', key: random() < 0.1 ? '"again"' : `"k${++keys}"`, text: JSON.stringify(pick(strings)) }),
      () => ({ type: '"page"', before: `${Math.floor(random() * 100)}` }),
      () => ({ type: '"name"', name: JSON.stringify(pick(strings)) }),
      () => ({ type: '"typing"' }),
      () => ({ type: '"ping"' }),
    ];
    const mutate = (): string => {
      const entries: [string, string][] = Object.entries(pick(valid)());
      for (let n = Math.floor(random() * 3); n > 0; n--) {
        const what = random();
        if (what < 0.4) pick(entries)[1] = value();
        else if (what < 0.6) entries.push([pick(fields), value()]);
        else if (what < 0.75 && entries.length > 1) entries.splice(Math.floor(random() * entries.length), 1);
        else if (what < 0.9)
          entries.unshift([...pick(entries)]); // a key twice
        else pick(entries)[0] = pick(fields);
      }
      const space = () => (random() < 0.02 ? pick(["\ufeff", "\u00a0", "\0"]) : pick(["", "", " ", "\n\t"]));
      let json = `${space()}{${entries.map(([name, each]) => `${JSON.stringify(name)}${space()}:${space()}${each}`).join(",")}}${space()}`;
      if (random() < 0.05) json = json.slice(0, Math.floor(random() * json.length));
      return json.toWellFormed();
    };
    let tried = 0;
    for (let i = 0; i < 1000; i++) {
      const client = await Client.connect(server.url, { name: pick(strings).slice(0, 40) });
      for (let k = 0; k < 12; k++, tried++) client.send(mutate());
      client.send({ type: "ping" });
      await client.until("an answer", () => client.all("pong").length > 0 || client.ws.readyState >= WebSocket.CLOSING);
      for (const frame of client.frames) expect(TYPES.has(frame.type)).toBe(true);
      client.ws.close();
    }
    await ann.settle();
    expectSound(ann);
    expect(ann.messages.length).toBeGreaterThan(100);
    expectSound(await Client.join(server.url, { name: "Bo" }));
    expect(server.exitCode).toBe(null);
    console.log(`The generator (seed ${SEED}) tried ${tried} JSON frames; ${ann.messages.length} were posts.`);
  });

  test("as bytes is answered with a Close or understood, and the others see only what is sound", async () => {
    const server = await spawnServer({ CHAT_RATE: "0" });
    const ann = await Client.join(server.url, { name: "Ann" });
    const random = randomFrom(SEED + 1);
    const int = (below: number) => Math.floor(random() * below);
    const bytes = (length: number) => Buffer.from(Array.from({ length }, () => int(256)));
    let tried = 0;
    const memory = memoryOf(server.pid);
    for (let round = 0; round < 100; round++) {
      const one = async () => {
        const plain = random() < 0.5;
        const raw = await Raw.join(server.url, "/ws/", { plain });
        for (let k = 1 + int(6); k > 0; k--, tried++) {
          const payload =
            random() < 0.3
              ? bytes(int(200))
              : Buffer.from(random() < 0.5 ? `{"type":"post","key":"r${tried}","text":"t"}` : "t".repeat(int(300)));
          const opcode = random() < 0.7 ? 1 : int(16);
          const frame = rawFrame(payload, opcode, {
            fin: random() < 0.8,
            mask: random() < 0.95,
            rsv: random() < 0.05 ? int(8) : 0,
          });
          if (random() < 0.1) frame[int(Math.min(14, frame.length))] = int(256); // a bit of the header or the mask is another
          if (random() < 0.1) raw.send(bytes(int(100)));
          raw.send(random() < 0.1 ? frame.subarray(0, int(frame.length)) : frame);
        }
        if (random() < 0.5) raw.socket.end();
        else raw.socket.resetAndDestroy();
      };
      await Promise.all(Array.from({ length: 20 }, () => one().catch(() => {}))); // an early end is an answer too
      await ann.settle();
    }
    expectSound(ann);
    expect(memoryOf(server.pid) - memory).toBeLessThan(64);
    expect(server.exitCode).toBe(null);
    console.log(`The generator (seed ${SEED}) tried ${tried} raw frames; ${ann.messages.length} were posts.`);
  });
});

// ─── Hard days of an operator ────────────────────────────────────────────────────────────────────────────────────────

/** A small file system of the test's own, or undefined where none may be mounted. */
function mountTmpfs(size: string): string | undefined {
  const folder = mkdtempSync(join(FOLDER, "tmpfs-"));
  const mounted = Bun.spawnSync(["mount", "-t", "tmpfs", "-o", `size=${size}`, "tmpfs", folder]).exitCode === 0;
  if (!mounted) return undefined;
  started.push(() => Bun.spawnSync(["umount", "-l", folder]));
  return folder;
}

const CAN_MOUNT =
  process.platform === "linux" && process.getuid?.() === 0 && Bun.spawnSync(["unshare", "-m", "true"]).exitCode === 0;

describe("when the machine is at its end", () => {
  test("of file descriptors: who is in goes on, who comes later gets in when some are free, and the operator is told", async () => {
    const server = await spawnServer({ CHAT_DB: newFile() }, "ulimit -n 64");
    const errors = errorsOf(server);
    const ann = await Client.join(server.url, { name: "Ann" });
    const raws = await Promise.all(Array.from({ length: 150 }, () => Raw.open(server.url)));
    await eventually("all are taken", () => readdirSync(`/proc/${server.pid}/fd`).length >= 64);
    ann.post("still here");
    await ann.untilMessages(1);
    await eventually("a line for the operator", () => /descriptor|EMFILE/i.test(errors.text));
    const late = Client.join(server.url, { name: "Bo" });
    for (const { socket } of raws) socket.destroy();
    const bo = await within(late, "a place");
    expect(textsOf(bo.messages)).toEqual(["still here"]);
    bo.post("me too");
    expect(textsOf(await ann.untilMessages(2))).toEqual(["still here", "me too"]);
    expect(server.exitCode).toBe(null);
  });

  test.skipIf(!CAN_MOUNT)(
    "of disk: nothing is acked that is not stored, all is told, and it goes on by itself",
    async () => {
      const folder = mountTmpfs("2m") as string;
      const db = join(folder, "chat.sqlite");
      const server = await spawnServer({ CHAT_DB: db, CHAT_RATE: "0" });
      const errors = errorsOf(server);
      const [ann, bo] = [await Client.join(server.url), await Client.join(server.url)];
      let sent = 0;
      while (ann.ws.readyState === WebSocket.OPEN && sent < 400) {
        ann.post("x".repeat(8000), `k${++sent}`);
        if (sent % 10 === 0) await Promise.race([ann.settle().catch(() => {}), ann.closed]);
      }
      expect((await within(ann.closed, "the close")).code).toBe(1013);
      await eventually("a line", () => errors.text !== "");
      expect(errors.text).toBe("The database cannot be written, posts are refused: database or disk is full\n");
      await bo.settle(); // who only reads is not cut
      const seen = bo.messages;
      expectDense(seen);
      Bun.spawnSync(["mount", "-o", "remount,size=32m", folder]);
      const again = await Client.join(server.url);
      again.post("room again");
      await again.until("its post", () => again.messages.some(({ text }) => text === "room again"));
      await eventually("another line", () => errors.text.trim().includes("\n"));
      expect(errors.text).toEndWith("\nThe database can be written again.\n");
      server.kill("SIGKILL");
      await server.exited;
      const stored = await readLog((await start({ db })).url);
      expect(stored.slice(0, seen.length)).toEqual(seen);
      expect(stored).toHaveLength(seen.length + 1);
    },
  );

  const probe = newFile();
  writeFileSync(probe, "");
  const canFreeze = Bun.spawnSync(["chattr", "+i", probe]).exitCode === 0; // not for everyone, not on every file system
  Bun.spawnSync(["chattr", "-i", probe]);

  test.skipIf(!canFreeze)("of rights: a database that may only be read is refused in one line", async () => {
    const file = newFile();
    const chat = await start({ db: file });
    await chat.stop();
    Bun.spawnSync(["chattr", "+i", file]);
    started.push(() => Bun.spawnSync(["chattr", "-i", file]));
    const { code, said } = await failedStart({ CHAT_DB: file });
    expect(code).toBe(1);
    expect(said).toMatch(/^CHAT_DB=.+: the database cannot be opened and written: .+\n$/);
  });

  test("of patience: a second server on the same database is refused, by whatever path it comes", async () => {
    const file = newFile();
    const first = await spawnServer({ CHAT_DB: file });
    const other = newFile();
    symlinkSync(file, other);
    const ann = await Client.join(first.url);
    ann.post("mine");
    await ann.untilMessages(1);
    for (const path of [file, other, join(FOLDER, ".", "x", "..", basename(file))]) {
      const { code, said } = await failedStart({ CHAT_DB: path });
      expect([path, code]).toEqual([path, 1]);
      expect(said).toContain("is a second server running?");
    }
    first.kill("SIGKILL");
    await first.exited;
    expect(textsOf(await readLog((await start({ db: file })).url))).toEqual(["mine"]); // a dead server's lock is none
    const later = newFile(); // a file that is not there yet
    symlinkSync(later, `${later}-link`);
    await spawnServer({ CHAT_DB: `${later}-link` });
    for (const path of [later, ` ${later} `]) expect((await failedStart({ CHAT_DB: path })).code).toBe(1);
  });

  test("of haste: who looks at the lock for a moment, as a second server does, keeps nobody from starting", async () => {
    const file = newFile();
    using other = new Database(`${file}-lock`);
    other.run("CREATE TABLE looked (at)");
    other.run("BEGIN");
    other.query("SELECT * FROM looked").all();
    const server = spawn({ CHAT_DB: file });
    const files = () => readdirSync(`/proc/${server.pid}/fd`).map((fd) => readlinkSync(`/proc/${server.pid}/fd/${fd}`));
    const asks = () => server.exitCode !== null || files().includes(`${file}-lock`);
    await eventually("the server at the lock", () => Promise.try(asks).catch(() => false)); // a file may close meanwhile
    other.run("COMMIT");
    const { value } = await within(server.stdout.getReader().read(), "what it says");
    expect(new TextDecoder().decode(value)).toStartWith("The chat is open");
  });

  test("of a terminal that closes, when it was started with nohup", async () => {
    const server = await spawnServer({}, "trap '' HUP");
    const ann = await Client.join(server.url);
    server.kill("SIGHUP");
    ann.post("still here");
    await ann.untilMessages(1);
    await ann.settle();
    expect([server.exitCode, server.signalCode]).toEqual([null, null]);
  });

  test("of luck with the clock: set back an hour, seqs and order hold, sessions and rates work", async () => {
    const chat = await start({ password: "sesame", rate: 100 });
    const now = Date.now();
    setSystemTime(new Date(now));
    try {
      const ann = await Client.join(chat.url, { headers: { Authorization: "Bearer sesame" } });
      ann.post("before");
      await ann.untilMessages(1);
      setSystemTime(new Date(now - 3_600_000));
      for (let i = 0; i < 20; i++) ann.post(`after ${i}`);
      await ann.untilMessages(21);
      expectDense(ann.messages);
      const login = await fetch(chat.url, { method: "POST", body: new URLSearchParams({ password: "sesame" }) });
      const cookie = login.headers.get("set-cookie")?.split(";")[0] as string;
      setSystemTime(new Date(now));
      await (await Client.join(chat.url, { headers: { Cookie: cookie } })).settle();
    } finally {
      setSystemTime();
    }
  });
});

describe("with a certificate", () => {
  /** A new certificate in the files that the server reads. */
  const certify = (name: string, into = name) => {
    const [cert, key] = [join(FOLDER, `${into}.crt`), join(FOLDER, `${into}.key`)];
    const curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    const files = ["-keyout", key, "-out", cert, "-days", "2", "-subj", `/CN=${name}`];
    expect(Bun.spawnSync(["openssl", "req", "-x509", ...curve, ...files]).exitCode).toBe(0);
    return { cert, key, env: { TLS_CERT: cert, TLS_KEY: key } };
  };
  const tls = { rejectUnauthorized: false };
  const open = (url: string) => {
    const { promise, resolve, reject } = Promise.withResolvers<ReturnType<typeof connectTls>>();
    const socket = connectTls({ port: Number(new URL(url).port), host: "127.0.0.1", ...tls }, () => resolve(socket));
    socket.on("error", reject);
    started.push(() => socket.destroy());
    return within(promise, "a TLS connection");
  };
  const nameOf = async (url: string) => {
    const socket = await open(url);
    const name = socket.getPeerCertificate().subject.CN;
    socket.destroy();
    return name;
  };
  /** A chat.v1 client over a connection that was made before. */
  const joinOver = async (socket: ReturnType<typeof connectTls>) => {
    const client = { text: "", closed: false, send: (frame: string) => socket.write(rawFrame(frame)) };
    socket.on("data", (data) => (client.text += data));
    socket.on("close", () => (client.closed = true));
    socket.write(rawHandshake());
    await eventually("the hello", () => client.text.includes('"limits"'));
    return client;
  };

  test("embedded: it is read again when asked, stays when the new one is bad, and nobody is cut", async () => {
    const files = certify("embedded");
    const { url, reloadTls } = await start({ tlsCert: files.cert, tlsKey: files.key });
    const ann = await Client.join(url, { name: "Ann", tls });
    certify("renewed", "embedded");
    reloadTls();
    writeFileSync(files.key, "no key");
    expect(reloadTls).toThrow("cannot be used");
    const bo = await Client.join(url, { name: "Bo", tls });
    ann.post("over the old certificate");
    bo.post("over the new one");
    for (const client of [ann, bo]) expect(await client.untilMessages(2)).toHaveLength(2);
  });

  test("serves https and wss, and its cookie is Secure", async () => {
    const { cert, key } = certify("one");
    const { url } = await start({ tlsCert: cert, tlsKey: key, password: "sesame" });
    expect(url).toStartWith("https://");
    expect((await fetch(url, { tls })).status).toBe(200);
    const login = await fetch(url, { method: "POST", body: new URLSearchParams({ password: "sesame" }), tls });
    expect(login.headers.get("set-cookie")).toEndWith("; HttpOnly; SameSite=Strict; Secure");
    const ws = new WebSocket(`${url.replace("http", "ws")}ws/`, {
      protocols: ["chat.v1"],
      headers: { Cookie: login.headers.get("set-cookie")?.split(";")[0] as string },
      tls,
    } as unknown as string);
    const hello = Promise.withResolvers<string>();
    ws.onmessage = ({ data }) => hello.resolve(data);
    expect(await within(hello.promise, "the hello")).toStartWith('{"type":"hello"');
    ws.close();
  });

  test("that is bad, missing, another's or alone does not start: one line, exit code 1", async () => {
    const [one, two] = [certify("one"), certify("two")];
    const cases: Record<string, string>[] = [
      { TLS_CERT: one.cert, TLS_KEY: two.key },
      { TLS_CERT: join(FOLDER, "none.crt"), TLS_KEY: one.key },
      { TLS_CERT: one.cert, TLS_KEY: join(FOLDER, "none.key") },
      { TLS_CERT: one.key, TLS_KEY: one.key },
      { TLS_CERT: one.cert, TLS_KEY: one.cert },
      { TLS_CERT: FOLDER, TLS_KEY: FOLDER },
      { TLS_CERT: one.cert },
      { TLS_KEY: one.key },
    ];
    const results = await Promise.all(cases.map((env) => failedStart(env)));
    for (const { code, said } of results) {
      expect(code).toBe(1);
      expect(said).toMatch(/^TLS_CERT.* TLS_KEY.*: .+\n$/);
    }
    const { said } = await failedStart({ ...one.env, HOST: "203.0.113.1" }); // and is not blamed for something else
    expect(said).toBe("HOST=203.0.113.1: this machine has no such address.\n");
  });

  test("that is renewed is taken up on SIGHUP: nobody is cut, kept waiting or deaf; a bad one is told and not taken", async () => {
    const files = certify("one", "live");
    const server = await spawnServer({ ...files.env, CHAT_RATE: "0" });
    const errors = errorsOf(server);
    const ann = await Client.join(server.url, { name: "Ann", tls });
    const idle = await open(server.url); // connected before, a client only afterwards
    expect(await nameOf(server.url)).toBe("one");
    certify("two", "live");
    server.kill("SIGHUP");
    await eventually("the new certificate", async () => (await nameOf(server.url).catch(() => "")) === "two");
    const bo = await Client.join(server.url, { name: "Bo", tls });
    const cy = await joinOver(idle);
    bo.post("to all");
    ann.send({ type: "typing" });
    await Promise.all([ann.untilMessages(1), bo.untilMessages(1)]);
    expect((await bo.first("typing")).name).toBe("Ann");
    for (const frame of ['"to all"', '"typing","name":"Ann"']) await eventually(frame, () => cy.text.includes(frame));
    copyFileSync(certify("three").key, files.key); // the key of another certificate
    server.kill("SIGHUP");
    await eventually("a line", () => /^The TLS files stay as they were\. .+another certificate\n/.test(errors.text));
    writeFileSync(files.cert, "no certificate");
    server.kill("SIGHUP");
    await eventually("another line", () => errors.text.trim().split("\n").length === 2);
    expect(await nameOf(server.url)).toBe("two");
    expect([ann.ws.readyState, bo.ws.readyState, cy.closed]).toEqual([WebSocket.OPEN, WebSocket.OPEN, false]);
    server.kill("SIGTERM");
    expect(await within(server.exited, "the end")).toBe(0);
    await within(Promise.all([ann.closed, bo.closed]), "the close");
    await eventually("the close", () => cy.closed);
  });

  test("that is renewed while a connection has yet to become a socket does not leave it deaf", async () => {
    const files = certify("one", "deaf");
    const server = await spawnServer(files.env);
    const idle = await open(server.url);
    certify("two", "deaf");
    server.kill("SIGHUP");
    await eventually("the new certificate", async () => (await nameOf(server.url).catch(() => "")) === "two");
    const ann = await joinOver(idle);
    ann.send('{"type":"post","key":"k1","text":"does anybody hear me?"}');
    await eventually("its own post", () => ann.closed || ann.text.includes('"does anybody hear me?"')); // cut would be fine: it comes again
  });
});

describe("the end of a server", () => {
  test("under full load loses nothing that anyone saw; the next one on its port takes over and all resume", async () => {
    const [db, port] = [newFile(), await freePort()];
    const env = { CHAT_DB: db, PORT: `${port}`, CHAT_RATE: "0", CHAT_HISTORY: "1000000" };
    const first = await spawnServer(env);
    const talkers = await Promise.all(Array.from({ length: 10 }, () => Client.join(first.url)));
    const { epoch } = await talkers[0]!.first("hello");
    let sent = 0;
    const talk = setInterval(() => {
      for (const talker of talkers) if (talker.ws.readyState === WebSocket.OPEN) talker.post(`m${sent++}`);
    }, 0);
    await talkers[0]!.untilMessages(500);
    first.kill("SIGTERM");
    const codes = await Promise.all(talkers.map(async ({ closed }) => (await within(closed, "the close")).code));
    clearInterval(talk);
    expect(new Set(codes)).toEqual(new Set([1001]));
    expect(await within(first.exited, "the end")).toBe(0);
    const second = await spawnServer(env);
    const back = await Promise.all(
      talkers.map(({ messages }) => Client.join(second.url, { epoch, after: messages.length })),
    );
    const log = await readLog(second.url);
    expectDense(log);
    for (const [i, talker] of talkers.entries()) {
      const hello = await back[i]!.first("hello");
      expect(hello.resumed).toBe(true);
      expect([...talker.messages, ...hello.messages]).toEqual(log);
    }
  });

  test("brings everyone back at once: five hundred resume, each from their own place, within a few seconds", async () => {
    const server = await spawnServer({ CHAT_RATE: "0" });
    const ann = await Client.join(server.url);
    const { epoch } = await ann.first("hello");
    for (let i = 0; i < 500; i++) ann.post(`m${i}`);
    await ann.untilMessages(500);
    const hellos = await Promise.all(
      Array.from({ length: 500 }, async (_, after) => (await Client.join(server.url, { epoch, after })).first("hello")),
    );
    for (const [after, { resumed, messages, last }] of hellos.entries()) {
      expect([resumed, messages[0]?.seq, messages.length]).toEqual([true, after + 1, last - after]);
    }
  });
});

// ─── Many servers, one chat ──────────────────────────────────────────────────────────────────────────────────────────

/** A Redis for one test, that it may do anything to. */
async function ownRedis(...args: string[]): Promise<Redis> {
  const redis = await Redis.start(...args);
  started.push(async () => {
    redis.signal("SIGCONT");
    await redis.kill();
  });
  return redis;
}

/** Servers of one chat, each in a process of its own. */
async function spawnServers(count: number, url: string, env: Record<string, string> = {}): Promise<ServerProcess[]> {
  return Promise.all(Array.from({ length: count }, () => spawnServer({ REDIS_URL: url, CHAT_RATE: "0", ...env })));
}

/** The same where none of them is killed: the first one in this process, so that it counts for the coverage. */
async function startServers(count: number, url: string, env: Record<string, string> = {}): Promise<{ url: string }[]> {
  const config = readConfig({ REDIS_URL: url, CHAT_RATE: "0", ...env });
  return Promise.all([start({ ...config, port: 0, logLevel: "silent" }), ...(await spawnServers(count - 1, url, env))]);
}

/** One server, in this process, over a Redis of its own. */
async function startOverRedis(): Promise<{ redis: Redis; url: string }> {
  const redis = await ownRedis();
  const [server] = await startServers(1, redis.url);
  return { redis, url: (server as { url: string }).url };
}

/** Servers of one chat, `direct` ones and then one that reaches the Redis over a wire. */
async function startWired(direct: number): Promise<{ redis: Redis; wire: Wire; servers: { url: string }[] }> {
  const redis = await ownRedis();
  const wire = await Wire.to(redis);
  const wired = startServers(1, `redis://${wire.address}`);
  return { redis, wire, servers: [...(await startServers(direct, redis.url)), ...(await wired)] };
}

describe.skipIf(!REDIS_SERVER)("several servers with one Redis", () => {
  test("forty clients of both dialects over three servers see the same messages in the same order", async () => {
    const redis = await ownRedis();
    const servers = await startServers(3, redis.url);
    const clients = await Promise.all(
      Array.from({ length: 40 }, (_, i) =>
        Client.join((servers[i % 3] as { url: string }).url, { name: `c${i}`, plain: i % 4 === 3 }),
      ),
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
    const logs = await Promise.all(servers.map(({ url }) => readLog(url)));
    const log = logs[0] as Message[];
    expectDense(log);
    expect(log.at(-1)?.seq).toBe(1000);
    for (const other of logs) expect(other).toEqual(log);
    for (const texts of seen) expect(texts).toEqual(textsOf(log));
    for (let i = 0; i < 40; i++) {
      const own = textsOf(log).filter((text) => text.startsWith(`${i}:`));
      expect(own).toEqual(Array.from({ length: 25 }, (_, round) => `${i}:${round}`));
    }
    const epochs = await Promise.all(
      servers.map(async ({ url }) => (await (await Client.join(url)).first("hello")).epoch),
    );
    expect(new Set(epochs).size).toBe(1);
  });

  test("a client goes from server to server and misses nothing, and never has to start afresh", async () => {
    const { servers, all } = await moversOver(startServers, 3, 9);
    const random = randomFrom(3);
    for (let cut = 0; cut < 60; cut++) {
      const mover = all[Math.floor(random() * all.length)] as Mover;
      await mover.talks(1);
      mover.cut();
    }
    await allTalk(all, 3);
    await expectOneChat(all, servers);
    expect(all.map(({ records }) => records.length)).toEqual(all.map(() => 1));
  });

  test("a post sent again on another server is acked with its seq, not stored again", async () => {
    const redis = await ownRedis();
    const [one, other] = (await startServers(2, redis.url)) as [{ url: string }, { url: string }];
    const ann = await Client.join(one.url);
    ann.post("hi", "k1");
    await ann.untilMessages(1);
    ann.ws.terminate();
    const again = await Client.join(other.url);
    again.post("hi", "k1");
    expect(await again.first("ack")).toEqual({ type: "ack", key: "k1", seq: 1 });
    again.post("next", "k2");
    expect(textsOf(await again.untilMessages(2))).toEqual(["hi", "next"]);
  });

  test("the same post sent on two servers at once is stored once", async () => {
    const redis = await ownRedis();
    const servers = await startServers(2, redis.url);
    const clients = await Promise.all(servers.map(({ url }) => Client.join(url)));
    for (let i = 0; i < 100; i++) for (const client of clients) client.post(`m${i}`);
    for (const client of clients) client.post("end", `end-${clients.indexOf(client)}`);
    for (const client of clients) await client.untilMessages(102);
    for (const client of clients) expectDense(client.messages);
    const acks = () => clients.flatMap((client) => client.all("ack"));
    await eventually("100 acks", () => acks().length === 100); // they come to one client or the other
    const seqs = new Map(clients[0]?.messages.map(({ key, seq }) => [key, seq]));
    for (const { key, seq } of acks()) expect(seq).toBe(seqs.get(key) as number);
  });

  test("two chats with different CHAT_PREFIX share a Redis and never meet", async () => {
    const redis = await ownRedis();
    const servers = await Promise.all(
      ["a:", "b:"].map((prefix) => spawnServer({ REDIS_URL: redis.url, CHAT_PREFIX: prefix })),
    );
    const [ann, bo] = (await Promise.all(servers.map(({ url }) => Client.join(url)))) as [Client, Client];
    ann.post("for a", "k");
    bo.post("for b", "k");
    expect(textsOf(await ann.untilMessages(1))).toEqual(["for a"]);
    expect(textsOf(await bo.untilMessages(1))).toEqual(["for b"]);
    expect((await ann.first("presence")).count + (await bo.first("presence")).count).toBe(2);
    const keys = (await redis.command("KEYS", "*")) as string[];
    expect(keys.filter((key) => !/^[ab]:/.test(key))).toEqual([]);
  });

  test("every text comes back as it was sent, from the room and from the log", async () => {
    const redis = await ownRedis();
    const servers = await startServers(2, redis.url);
    const [ann, bo] = (await Promise.all(servers.map(({ url }) => Client.join(url, { plain: true })))) as [
      Client,
      Client,
    ];
    const texts = [
      "hi",
      "",
      "line\nbreak\r\n\ttab",
      "a\0b",
      "\ufeffBOM",
      "👩‍👩‍👧 🇨🇳 e\u0301",
      "请输入",
      "团".repeat(5461),
      "end",
    ];
    for (const [i, client] of [ann, bo].entries()) {
      client.send(`joined ${i}`); // a plain socket is told nothing: its own text says that it has joined
      await client.until("its own text", () => client.texts.includes(`joined ${i}`));
    }
    await ann.until("the other's", () => ann.texts.includes("joined 1"));
    for (const client of [ann, bo]) client.texts.length = 0;
    for (const text of texts) ann.send(text);
    expect(await ann.untilTexts(texts.length)).toEqual(texts);
    expect(await bo.untilTexts(texts.length)).toEqual(texts);
    for (const { url } of servers) expect(textsOf(await readLog(url)).slice(2)).toEqual(texts);
  });
});

describe.skipIf(!REDIS_SERVER)("a server that was cut off for a moment", () => {
  test("takes from the log what it has missed, and hears who is typing elsewhere again", async () => {
    const { config } = await (STORES[1] as Store).make();
    const wire = await Wire.to(await sharedRedis());
    const [one, other] = [await start(config), await start({ ...config, redisUrl: `redis://${wire.address}` })];
    const [ann, bo] = [await Client.join(one.url, { name: "Ann" }), await Client.join(other.url, { name: "Bo" })];
    const both = (client: Client) => client.all("presence").some(({ count }) => count === 2);
    for (const client of [ann, bo]) await client.until("both people", () => both(client));
    wire.silence();
    for (let i = 0; i < 5; i++) ann.post(`said meanwhile ${i}`);
    await ann.untilMessages(5);
    wire.cut();
    wire.speak();
    expect(textsOf(await bo.untilMessages(5))).toEqual(textsOf(ann.messages));
    ann.send({ type: "typing" });
    expect(await bo.first("typing")).toEqual({ type: "typing", name: "Ann" });
    expectDense(bo.messages);
  });
});

describe.skipIf(!REDIS_SERVER)("resume on a server that is behind", () => {
  test("waits until that server knows what the client has seen, and gives exactly what was missed", async () => {
    const { wire, servers } = await startWired(1);
    const [one, other] = servers as [{ url: string }, { url: string }];
    const bo = await Client.join(other.url, { name: "Bo" });
    const ann = await Client.join(one.url, { name: "Ann" });
    ann.post("one");
    await bo.untilMessages(1);
    wire.silence();
    ann.post("two");
    await ann.untilMessages(2);
    const { epoch } = await ann.first("hello");
    const again = await Client.connect(other.url, { name: "Ann", epoch, after: 2 });
    wire.speak();
    const { resumed, messages } = await again.first("hello");
    expect([resumed, messages]).toEqual([true, []]);
    ann.post("three");
    expect(textsOf(await again.untilMessages(1))).toEqual(["three"]);
  });
});

describe.skipIf(!REDIS_SERVER)("presence over several servers", () => {
  const names = ({ names }: Frame<"presence">) => names.toSorted();
  /** Waits until a client's newest presence frame says this. */
  const sees = (client: Client, count: number, ...expected: string[]) =>
    client.until(`${count} people: ${expected}`, () => {
      const newest = client.all("presence").at(-1);
      return newest?.count === count && names(newest).join() === expected.join();
    });

  test("adds up counts and names, plain sockets too, and shows who leaves and who changes their name", async () => {
    const redis = await ownRedis();
    const [one, two, three] = (await spawnServers(3, redis.url)) as [ServerProcess, ServerProcess, ServerProcess];
    const ann = await Client.join(one.url, { name: "Ann" });
    const bo = await Client.join(two.url, { name: "Bo" });
    const cy = await Client.join(three.url, { name: "Cy" });
    const second = await Client.join(three.url, { name: "Ann" });
    const plain = await Client.join(two.url, { plain: true });
    for (const client of [ann, bo, cy, second]) await sees(client, 5, "Ann", "Bo", "Cy");
    await plain.leave();
    await second.leave();
    bo.send({ type: "name", name: "Bea" });
    for (const client of [ann, bo, cy]) await sees(client, 3, "Ann", "Bea", "Cy");
    two.kill("SIGTERM");
    for (const client of [ann, cy]) await sees(client, 2, "Ann", "Cy");
  });

  test("forgets the people of a server that was killed with kill -9", async () => {
    const redis = await ownRedis();
    const [one, two] = (await spawnServers(2, redis.url)) as [ServerProcess, ServerProcess];
    const ann = await Client.join(one.url, { name: "Ann" });
    await Client.join(two.url, { name: "Bo" });
    await sees(ann, 2, "Ann", "Bo");
    two.kill("SIGKILL");
    await sees(ann, 1, "Ann");
  });

  test("passes typing on to the other servers, never back to who types", async () => {
    const redis = await ownRedis();
    const [one, other] = (await startServers(2, redis.url)) as [{ url: string }, { url: string }];
    const [ann, bo, cy] = [
      await Client.join(other.url, { name: "Ann" }),
      await Client.join(other.url, { name: "Bo" }),
      await Client.join(one.url, { name: "Cy" }),
    ];
    for (const client of [ann, bo, cy]) await sees(client, 3, "Ann", "Bo", "Cy"); // the servers know of each other
    ann.send({ type: "typing" });
    expect(await cy.first("typing")).toEqual({ type: "typing", name: "Ann" });
    ann.post("done");
    for (const client of [ann, bo, cy]) await client.untilMessages(1);
    await ann.settle();
    expect([ann, bo, cy].map((client) => client.all("typing").length)).toEqual([0, 1, 1]);
  });

  test("is right again after people were sent away and came back", async () => {
    const redis = await ownRedis();
    const [one, two] = (await startServers(2, redis.url)) as [{ url: string }, { url: string }];
    const ann = await Client.join(one.url, { name: "Ann" });
    const bo = await Client.join(two.url, { name: "Bo" });
    await sees(bo, 2, "Ann", "Bo");
    await Client.join(two.url, { name: "Cy" });
    await sees(bo, 3, "Ann", "Bo", "Cy"); // this second's presence is out: the next waits
    await redis.command("HSET", "chat:room:", "epoch", "0123456789abcdef"); // another log: everyone has to come back
    ann.post("to the log that is gone", "k");
    expect((await within(ann.closed, "the close")).code).toBe(1013);
    const again = await Client.join(one.url, { name: "Ann" });
    again.post("to the other log", "k");
    expect((await within(bo.closed, "the close")).code).toBe(1013);
    const bea = await Client.join(two.url, { name: "Bea" });
    for (const client of [again, bea]) await sees(client, 2, "Ann", "Bea");
    await Client.join(two.url, { name: "Di" });
    for (const client of [again, bea]) await sees(client, 3, "Ann", "Bea", "Di");
    expect(bea.all("presence").filter(({ names }) => !names.includes("Bea"))).toEqual([]);
    const from = again.all("presence").findIndex(({ count }) => count === 2);
    expect(
      again
        .all("presence")
        .slice(from)
        .filter(({ count }) => count < 2),
    ).toEqual([]);
  });

  test("is right again after Redis could not be written for a moment", async () => {
    const redis = await ownRedis();
    const [one, two] = (await startServers(2, redis.url)) as [{ url: string }, { url: string }];
    const ann = await Client.join(one.url, { name: "Ann" });
    const bo = await Client.join(two.url, { name: "Bo" });
    for (const client of [ann, bo]) await sees(client, 2, "Ann", "Bo");
    await redis.command("CONFIG", "SET", "maxmemory", "1");
    ann.send({ type: "name", name: "Anna" });
    await ann.settle();
    const dead = await Client.join(two.url, { name: "Cy" });
    await dead.leave();
    const refused = async () => {
      const stats = (await redis.command("INFO", "commandstats")) as string;
      return Number(/cmdstat_set:.*rejected_calls=(\d+)/.exec(stats)?.[1] ?? 0);
    };
    await eventually("that the servers have tried to say all three changes", async () => (await refused()) >= 3);
    await redis.command("CONFIG", "SET", "maxmemory", "0");
    for (const client of [ann, bo]) await sees(client, 2, "Anna", "Bo");
  });
});

/** Somebody on each server in a room where one message was posted, and no more will be. */
async function joinQuiet(servers: { url: string }[]): Promise<Client[]> {
  const quiet = await Promise.all(servers.map(({ url }) => Client.join(url, { room: "quiet" })));
  quiet[0]?.post("in the old log");
  for (const client of quiet) await client.untilMessages(1);
  return quiet;
}

describe.skipIf(!REDIS_SERVER)("a fault", () => {
  test("a server killed with kill -9 under load: its clients go to another, and nothing is lost or doubled", async () => {
    const { redis, servers, all } = await moversOver(spawnServers, 3, 12);
    for (let kill = 0; kill < 3; kill++) {
      await allTalk(all, 10);
      const killed = servers[kill] as ServerProcess;
      killed.kill("SIGKILL");
      await killed.exited;
      await allTalk(all, 5);
      servers[kill] = (await spawnServers(1, redis.url))[0] as ServerProcess;
    }
    await allTalk(all, 5);
    await expectOneChat(all, servers);
  });

  test("Redis killed with kill -9 and started again with its append-only file", async () => {
    const { redis, servers, all } = await moversOver(spawnServers, 3, 12);
    for (let kill = 0; kill < 3; kill++) {
      await allTalk(all, 10);
      await redis.kill();
      await redis.run();
    }
    await allTalk(all, 10);
    await expectOneChat(all, servers);
  });

  test("Redis frozen: everyone is sent to try again, and goes on when it is back", async () => {
    const { redis, servers, all } = await moversOver(spawnServers, 3, 12);
    await allTalk(all, 10);
    redis.signal("SIGSTOP");
    await eventually("the close of every connection", () => all.every(({ closes }) => closes.includes(1013)));
    redis.signal("SIGCONT");
    await allTalk(all, 10);
    await expectOneChat(all, servers);
  });

  test("the connections between one server and Redis cut, again and again", async () => {
    const { wire, servers } = await startWired(2);
    const all = movers(12, servers);
    for (let cut = 0; cut < 10; cut++) {
      await allTalk(all, 3);
      wire.cut();
    }
    await allTalk(all, 10);
    await expectOneChat(all, servers);
    expect(wire.connections).toBeLessThanOrEqual(2);
  });

  test("the connections between one server and Redis silent: nobody stays on the deaf server, and it hears again", async () => {
    const { wire, servers } = await startWired(2);
    const all = movers(6, servers);
    const listener = await Client.join((servers[2] as { url: string }).url);
    await allTalk(all, 10);
    wire.silence();
    expect((await within(listener.closed, "the close")).code).toBe(1013);
    await allTalk(all, 10);
    wire.speak();
    const back = async () => {
      // Until the server takes people in again: it says so by a hello.
      for (;;) {
        const client = await Client.connect((servers[2] as { url: string }).url, {});
        if (await client.first("hello").catch(() => undefined)) return client;
        await Bun.sleep(10);
      }
    };
    const again = await within(back(), "a hello of the server");
    await again.until("messages", () => again.all("messages").length > 0);
    await expectOneChat(all, servers);
    expect(wire.connections).toBeLessThanOrEqual(2);
  });

  test("the connections between one server and Redis silent for a moment, then dropped", async () => {
    const { wire, servers } = await startWired(2);
    const all = movers(9, servers);
    for (let moment = 0; moment < 3; moment++) {
      await allTalk(all, 5);
      wire.silence();
      await allTalk(
        all.filter((_, i) => i % 3 < 2),
        10,
      );
      wire.cut();
      wire.speak();
    }
    await allTalk(all, 10);
    await expectOneChat(all, servers);
  });

  test("Redis started again empty: a new epoch, and everyone starts afresh", async () => {
    const { redis, servers, all } = await moversOver(spawnServers, 3, 9);
    const quiet = await joinQuiet(servers);
    await allTalk(all, 10);
    await redis.kill();
    rmSync(join(redis.folder, "appendonlydir"), { recursive: true });
    await redis.run();
    await allTalk(all, 10);
    const log = await expectOneChat(all, servers);
    expect(log[0]?.seq).toBe(1);
    for (const { records } of all) expect(records.length).toBeGreaterThanOrEqual(2);
    for (const client of quiet) expect((await within(client.closed, "the close")).code).toBe(1013); // in the quiet room too
  });

  test("FLUSHALL under everyone's feet: a new epoch, and everyone starts afresh, in quiet rooms too", async () => {
    const { redis, servers, all } = await moversOver(startServers, 3, 9);
    const quiet = await joinQuiet(servers);
    await allTalk(all, 10);
    await redis.command("FLUSHALL");
    await allTalk(all, 10);
    for (const client of quiet) expect((await within(client.closed, "the close")).code).toBe(1013); // while others talk
    const log = await expectOneChat(all, servers);
    expect(log[0]?.seq).toBe(1);
  });

  test("Redis came back empty: a post is not stored there before those that were lost", async () => {
    const { redis, url } = await startOverRedis();
    const ann = await Client.join(url);
    ann.post("one");
    await ann.untilMessages(1);
    await redis.command("FLUSHALL");
    ann.post("two");
    expect((await within(ann.closed, "the close")).code).toBe(1013);
    expect(await readLog(url)).toEqual([]);
  });

  test("Redis came back empty: what a plain client posts is stored there, for it sends nothing again", async () => {
    const { redis, url } = await startOverRedis();
    const plain = await Client.join(url, { plain: true });
    plain.send("one");
    await plain.untilTexts(1);
    await redis.command("FLUSHALL");
    plain.send("two");
    expect((await within(plain.closed, "the close")).code).toBe(1013);
    expect(textsOf(await readLog(url))).toEqual(["two"]);
  });

  test("Redis started again with an older state, while all talk: a new epoch, and everyone starts afresh", async () => {
    const { redis, servers, all } = await moversOver(spawnServers, 3, 9);
    await redis.saveOnlyWhenTold();
    await allTalk(all, 10);
    await redis.command("SAVE");
    await allTalk(all, 10);
    await redis.goBack();
    await allTalk(all, 10);
    await expectOneChat(all, servers);
    for (const { records } of all) expect(records.length).toBeGreaterThanOrEqual(2);
  });

  test("Redis started again with an older state: the log is not taken for the one that somebody who is away has seen", async () => {
    const redis = await ownRedis();
    const servers = await spawnServers(2, redis.url);
    const [one, two] = servers as [ServerProcess, ServerProcess];
    await redis.saveOnlyWhenTold();
    const ann = await Client.join(one.url);
    const { epoch } = await ann.first("hello");
    ann.post("kept");
    await ann.untilMessages(1);
    await redis.command("SAVE");
    for (let i = 1; i <= 10; i++) ann.post(`lost ${i}`);
    await ann.untilMessages(11);
    await ann.leave(); // no server has the room open, or remembers how far it was
    const talkers = movers(4, servers);
    for (let loss = 0; loss < 2; loss++) {
      await redis.goBack(); // the second time with a generation that had ended
      await allTalk(talkers, 10);
    }
    const log = await expectOneChat(talkers, servers);
    expect(log[0]?.text).toBe("kept");
    for (const { url } of [one, two]) {
      const { resumed } = await (await Client.join(url, { epoch, after: 11 })).first("hello");
      expect(resumed).toBe(false);
    }
  });

  test("Redis started again as it was before there was a feed: it is another log, and nobody stays deaf", async () => {
    const redis = await ownRedis();
    const line = { room: "", epoch: "0123456789abcdef", seq: 1, at: 1, name: "Ann", text: "imported", key: "k" };
    await importMessages(readConfig({ REDIS_URL: redis.url }), JSON.stringify(line));
    await redis.saveOnlyWhenTold();
    await redis.command("SAVE");
    const [{ url }] = (await spawnServers(1, redis.url)) as [ServerProcess];
    const ann = await Client.join(url);
    ann.post("lost");
    await ann.untilMessages(2);
    await redis.goBack();
    expect((await within(ann.closed, "the close")).code).toBe(1013);
    const again = await Client.join(url, { epoch: line.epoch, after: 2 });
    again.post("new");
    expect(textsOf(await again.untilMessages(2))).toEqual(["imported", "new"]);
    expect((await again.first("hello")).epoch).not.toBe(line.epoch);
  });

  test("Redis started again without a message that was told, but had not been read of the feed yet", async () => {
    const { redis, url } = await startOverRedis();
    const ann = await Client.join(url);
    ann.post("kept");
    await ann.untilMessages(1);
    await redis.saveOnlyWhenTold();
    await redis.command("SAVE");
    await redis.command("ACL", "SETUSER", "default", "-xread"); // the feed cannot be read: the log is looked into instead
    const [, tail = "0"] = /^id=(\d+) .* cmd=xread /m.exec((await redis.command("CLIENT", "LIST")) as string) ?? [];
    await redis.command("CLIENT", "UNBLOCK", tail); // if it had begun to wait before
    ann.post("lost");
    await ann.untilMessages(2);
    await redis.goBack();
    expect((await within(ann.closed, "the close")).code).toBe(1013);
    const { epoch } = await ann.first("hello");
    const again = await Client.join(url, { epoch, after: 2 });
    again.post("new");
    expect(textsOf(await again.untilMessages(2))).toEqual(["kept", "new"]);
    expect((await again.first("hello")).epoch).not.toBe(epoch);
  });

  test("a hello of the old epoch is never made of the new log", async () => {
    const { redis, url } = await startOverRedis();
    const ann = await Client.join(url);
    for (let i = 1; i <= 3; i++) ann.post(`m${i}`);
    await ann.untilMessages(3);
    const { epoch } = await ann.first("hello");
    await redis.command("FLUSHALL");
    const bo = await Client.connect(url, { epoch, after: 1 });
    expect((await within(bo.closed, "the close")).code).toBe(1013);
    expect(bo.all("hello")).toEqual([]);
    expect((await (await Client.join(url, { epoch, after: 1 })).first("hello")).epoch).not.toBe(epoch);
  });

  test("Redis that takes no writes: nothing is acked, nobody hangs, and it goes on when it does again", async () => {
    const { redis, servers, all } = await moversOver(startServers, 3, 9);
    const { port } = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } }); // a master that says nothing
    const refusals = [
      [
        ["CONFIG", "SET", "maxmemory", "1"],
        ["CONFIG", "SET", "maxmemory", "0"],
      ],
      [
        ["REPLICAOF", "127.0.0.1", `${port}`],
        ["REPLICAOF", "NO", "ONE"],
      ],
    ] as [string[], string[]][];
    for (const [[refuse = "", ...no], [accept = "", ...yes]] of refusals) {
      await allTalk(all, 5);
      await redis.command(refuse, ...no);
      const closes = all.map(({ closes }) => closes.length);
      const told = () => all.every((mover, i) => mover.closes.length > (closes[i] as number));
      await eventually("a close of every connection", told);
      await redis.command(accept, ...yes);
      await allTalk(all, 5);
    }
    await expectOneChat(all, servers);
    for (const { closes } of all) expect(closes.filter((code) => code !== 1013)).toEqual([]);
  });

  test("a hello that could not be read once is read again for the next who joins", async () => {
    const { redis, url } = await startOverRedis();
    const ann = await Client.join(url);
    ann.post("hi");
    await ann.untilMessages(1);
    await redis.command("ACL", "SETUSER", "default", "-xrevrange");
    const bo = await Client.connect(url, {});
    expect((await within(bo.closed, "the close")).code).toBe(1013);
    await redis.command("ACL", "SETUSER", "default", "+xrevrange");
    expect(textsOf(await (await Client.join(url)).untilMessages(1))).toEqual(["hi"]);
  });

  test("Redis away when the servers start: people are told to try again, until it is there", async () => {
    const redis = await ownRedis();
    await redis.kill();
    const servers = await spawnServers(2, redis.url);
    const errors = errorsOf(servers[0] as ServerProcess);
    for (let i = 0; i < 10; i++) {
      const early = await Client.connect((servers[0] as ServerProcess).url, {});
      expect((await within(early.closed, "the close")).code).toBe(1013);
    }
    expect(errors.text.split("\n").filter((line) => line.includes("The log of"))).toHaveLength(1); // not for each of them
    const all = movers(4, servers);
    await redis.run();
    await allTalk(all, 5);
    await expectOneChat(all, servers);
  });

  test("SCRIPT FLUSH is not noticed", async () => {
    const { redis, servers, all } = await moversOver(startServers, 2, 4);
    for (let flush = 0; flush < 5; flush++) {
      await allTalk(all, 3);
      await redis.command("SCRIPT", "FLUSH");
    }
    await expectOneChat(all, servers);
    for (const { closes } of all) expect(closes).toEqual([]);
  });
});

describe.skipIf(!REDIS_SERVER)("a server that is slow", () => {
  /** Posts many short texts from one client and waits until all are stored. */
  async function postMany(client: Client, count: number, text: string): Promise<void> {
    const before = client.messages.length;
    for (let i = 0; i < count; i++) client.post(text, `many-${before}-${i}`);
    await client.untilMessages(before + count);
  }

  test("finds in the logs what was cut off the feed before it was read, in quiet rooms too", async () => {
    const redis = await ownRedis();
    const [one, two] = (await spawnServers(2, redis.url)) as [ServerProcess, ServerProcess];
    const ann = await Client.join(one.url);
    const [quiet, teller] = [
      await Client.join(two.url, { room: "quiet" }),
      await Client.join(one.url, { room: "quiet" }),
    ];
    const busy = await Client.join(two.url);
    await postMany(ann, 1, "x");
    await busy.untilMessages(1);
    two.kill("SIGSTOP");
    await postMany(ann, 10, "x");
    teller.post("said while that server slept");
    await teller.untilMessages(1);
    await postMany(ann, 6000, "x");
    expect(Number(await redis.command("XLEN", "chat:feed"))).toBeLessThan(5000);
    two.kill("SIGCONT");
    expect(textsOf(await quiet.untilMessages(1))).toEqual(["said while that server slept"]);
    expectDense(await busy.untilMessages(6011));
  });

  test("tells what it has missed in frames of bounded size, and cuts nobody for it", async () => {
    const redis = await ownRedis();
    const [one, two] = (await spawnServers(2, redis.url)) as [ServerProcess, ServerProcess];
    const [ann, bo] = [await Client.join(one.url), await Client.join(two.url)];
    await postMany(ann, 1, "x");
    await bo.untilMessages(1);
    two.kill("SIGSTOP");
    await postMany(ann, 150, "x".repeat(16 * 1024));
    two.kill("SIGCONT");
    await bo.untilMessages(151);
    expectDense(bo.messages);
    expect(Math.max(...bo.texts.map((text) => text.length))).toBeLessThan(256 * 1024);
  });

  test("that is stopped while Redis is frozen ends by itself, with exit code 0", async () => {
    const redis = await ownRedis();
    const [server] = (await spawnServers(1, redis.url)) as [ServerProcess];
    const ann = await Client.join(server.url);
    redis.signal("SIGSTOP");
    ann.post("too late");
    await ann.settle();
    server.kill("SIGTERM");
    expect(await within(server.exited, "the server's end")).toBe(0);
  });
});

describe.skipIf(!REDIS_SERVER)("a room that nobody uses", () => {
  const keysOf = async (redis: Redis) => ((await redis.command("KEYS", "*")) as string[]).toSorted();
  const ttl = (redis: Redis, key: string) => redis.command("TTL", key) as Promise<number>;

  test("leaves Redis after CHAT_IDLE_DAYS, and never with 0", async () => {
    const redis = await ownRedis();
    for (const [days, from, to] of [
      ["7", 7 * 86400 - 60, 7 * 86400],
      ["0", -1, -1],
    ] as const) {
      const [{ url }] = (await startServers(1, redis.url, { CHAT_IDLE_DAYS: days })) as [{ url: string }];
      const ann = await Client.join(url, { room: days });
      ann.post("hi");
      await ann.untilMessages(1);
      for (const key of [`chat:room:${days}`, `chat:log:${days}`, `chat:keys:${days}`]) {
        expect(await ttl(redis, key)).toBeGreaterThanOrEqual(from);
        expect(await ttl(redis, key)).toBeLessThanOrEqual(to);
      }
    }
  });

  test("stays in Redis while somebody is in it", async () => {
    const { redis, wire, servers } = await startWired(1);
    const [one, wired] = servers as [{ url: string }, { url: string }];
    const keys = ["chat:room:", "chat:log:", "chat:keys:"];
    const expireSoon = () => Promise.all(keys.map((key) => redis.command("EXPIRE", key, "60")));
    const stay = async () => (await Promise.all(keys.map((key) => ttl(redis, key)))).every((seconds) => seconds > 3000);
    const ann = await Client.join(wired.url);
    ann.post("hi");
    await ann.untilMessages(1);
    await expireSoon();
    await Client.join(one.url); // it is opened by another server
    expect(await stay()).toBe(true);
    await expireSoon();
    wire.cut(); // or looked at again
    await eventually("rooms that stay", stay);
  });

  test("that was only visited leaves one key that expires, and none of who was there", async () => {
    const redis = await ownRedis();
    const [one] = (await startServers(1, redis.url, { CHAT_IDLE_DAYS: "0" })) as [{ url: string }];
    const ann = await Client.join(one.url, { room: "r" });
    await ann.first("presence");
    await ann.leave();
    const bo = await Client.join(one.url, { room: "s" });
    await bo.first("presence");
    const here = async () => (await keysOf(redis)).filter((key) => /:here:.+:r$/.test(key));
    const gone = async () => {
      while ((await here()).length > 0) await bo.settle(); // the key goes a moment after the one who left
    };
    await within(gone(), "the end of the key");
    expect(await ttl(redis, "chat:room:r")).toBeGreaterThan(0);
    expect((await keysOf(redis)).filter((key) => key.endsWith(":r"))).toEqual(["chat:room:r"]);
  });

  test("keeps exactly CHAT_HISTORY messages for its clients, and not many more in Redis, nor keys", async () => {
    const redis = await ownRedis();
    const servers = await startServers(2, redis.url, { CHAT_HISTORY: "150" });
    const [ann, bo] = (await Promise.all(servers.map(({ url }) => Client.join(url)))) as [Client, Client];
    for (let i = 1; i <= 1170; i++) ann.post(`m${i}`);
    await ann.untilMessages(1170);
    await bo.untilMessages(1170);
    for (const { url } of servers) {
      const { first, last } = await (await Client.join(url)).first("hello");
      expect([first, last]).toEqual([1021, 1170]);
      expect(textsOf(await readLog(url))).toEqual(Array.from({ length: 150 }, (_, i) => `m${1021 + i}`));
    }
    expect(Number(await redis.command("XLEN", "chat:log:"))).toBeLessThan(250);
    expect(Number(await redis.command("HLEN", "chat:keys:"))).toBeLessThan(250);
    bo.post("m900", "m900"); // so old that nobody can know
    bo.post("m1100", "m1100");
    expect((await bo.first("ack")).seq).toBe(1100);
  });
});

describe("the SQLite store", () => {
  test("forgets at the start the rooms that were idle for CHAT_IDLE_DAYS, and none with 0", async () => {
    const db = newFile();
    const chat = await start({ db });
    for (const room of ["old", "young"]) {
      const ann = await Client.join(chat.url, { room });
      ann.post(`in the ${room} room`);
      ann.post("again", "again");
      await ann.untilMessages(2);
    }
    await chat.stop();
    {
      using file = new Database(db);
      const at = Date.now() - 8 * 24 * 60 * 60 * 1000;
      file.run("UPDATE messages SET at = ? WHERE room = (SELECT id FROM rooms WHERE name = 'old')", [at]);
    }
    for (const [idleDays, kept] of [
      [0, 2],
      [9, 2],
      [7, 0],
    ] as const) {
      const { url, stop } = await start({ db, idleDays });
      expect([idleDays, (await readLog(url, "old")).length]).toEqual([idleDays, kept]);
      expect(await readLog(url, "young")).toHaveLength(2);
      await stop();
    }
    using file = new Database(db, { readonly: true });
    expect(file.query("SELECT name FROM rooms").all()).toEqual([{ name: "young" }]);
    expect(file.query("SELECT count(*) AS n FROM messages").get()).toEqual({ n: 2 });
  });
});

describe.skipIf(!REDIS_SERVER)("many servers", () => {
  test.skipIf(process.platform !== "linux")("share one port with REUSE_PORT=1, and both get clients", async () => {
    const redis = await ownRedis();
    const port = `${await freePort()}`;
    const servers = await spawnServers(2, redis.url, { PORT: port, REUSE_PORT: "1", LOG_LEVEL: "info" });
    const clients: Client[] = [];
    const joins = ({ output }: ServerProcess) => output.split("joined").length - 1;
    const spread = async () => {
      // Each connection goes to one of them, as the kernel pleases.
      while (!servers.every((server) => joins(server) >= 3))
        clients.push(await Client.join((servers[0] as ServerProcess).url));
    };
    await within(spread(), "clients of both");
    clients[0]?.post("to all");
    for (const client of clients) expect(textsOf(await client.untilMessages(1))).toEqual(["to all"]);
  });

  test("the posts of a tick cost one round trip, and another server one read for many messages", async () => {
    const redis = await ownRedis();
    const [one, two] = (await startServers(2, redis.url)) as [{ url: string }, { url: string }];
    const clients = await Promise.all(Array.from({ length: 20 }, () => Client.join(one.url)));
    const bo = await Client.join(two.url);
    const calls = async (command: string) => {
      const stats = (await redis.command("INFO", "commandstats")) as string;
      return Number(new RegExp(`cmdstat_${command}:calls=(\\d+)`).exec(stats)?.[1] ?? 0);
    };
    const before = [await calls("eval"), await calls("xread")] as [number, number];
    for (let i = 0; i < 100; i++) for (const client of clients) client.post(`m${i}`, `${clients.indexOf(client)}-${i}`);
    await bo.untilMessages(2000);
    const [evals, reads] = [(await calls("eval")) - before[0], (await calls("xread")) - before[1]];
    expect(evals).toBeLessThan(2000 / 10);
    expect(reads).toBeLessThan(2 * (2000 / 10)); // of two servers
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
      { CHAT_ORIGINS: "*.a.example" },
    ];
    for (const env of bad) {
      const [[variable, value]] = Object.entries(env) as [[string, string]];
      expect(() => readConfig(env)).toThrow(`${variable}=${value}: must be `);
    }
    expect(() => readConfig({ REUSE_PORT: "1" })).toThrow("REUSE_PORT=1: needs REDIS_URL, ");
    expect(() => readConfig({ TLS_CERT: "cert.pem" })).toThrow("TLS_CERT and TLS_KEY: ");
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

  test("may write an IPv6 address as a URL has it", () => {
    expect(["[::1]", "::1", "localhost"].map((HOST) => readConfig({ HOST }).host)).toEqual(["::1", "::1", "localhost"]);
  });

  test("is told in one line when the port is taken", async () => {
    const { url } = await start();
    const { port } = new URL(url);
    const { code, said } = await failedStart({ PORT: port });
    expect([code, said]).toEqual([1, `PORT=${port}: another program listens there; set PORT to another.\n`]);
  });

  test("who embeds it is told the same by a StartError", async () => {
    const port = Number(new URL((await start()).url).port);
    const cases: [Partial<Config>, string][] = [
      [{ port }, `PORT=${port}: another program listens there`],
      [{ host: "203.0.113.1" }, "HOST=203.0.113.1: this machine has no such address"],
      [{ db: join(FOLDER, "no", "such", "folder") }, "the database cannot be opened and written"],
      [{ redisUrl: "http://user:sec@ret@localhost" }, "REDIS_URL=http://…@localhost: "],
      [{ tlsCert: "no.pem", tlsKey: "no.pem" }, "TLS_CERT=no.pem TLS_KEY=no.pem: cannot be used: "],
    ];
    for (const [config, why] of cases) await expect(start(config)).rejects.toThrow(why);
    const nothing = { ...readConfig({}), db: join(FOLDER, "nothing.sqlite") };
    await expect(exportMessages(nothing, async () => {})).rejects.toThrow("the database cannot be read");
  });

  test("sees the address, who comes and goes, and at debug what is said", async () => {
    const server = await spawnServer({ LOG_LEVEL: "debug" });
    const ann = await Client.join(server.url, { name: "Ann" });
    ann.post("line one\nline two");
    ann.post("a\u009bb\u202ec\u2028d");
    await ann.untilMessages(2);
    await ann.leave();
    server.kill("SIGTERM");
    expect(await within(server.exited, "the end")).toBe(0);
    expect(server.output).toMatch(/^The chat is open: http:\/\/localhost:\d+\/\n/);
    expect(server.output).toContain(" joined the lobby (Ann)\n");
    expect(server.output).toContain('the lobby #1 Ann: "line one\\nline two"\n');
    expect(server.output).toContain('the lobby #2 Ann: "a\\u{9b}b\\u{202e}c\\u{2028}d"\n'); // none that a terminal obeys
    expect(server.output).toContain(" left the lobby (1005)\n");
  });

  test("sees at each LOG_LEVEL what it is for", async () => {
    const printed = spyOn(console, "log").mockImplementation(() => {});
    started.push(() => printed.mockRestore());
    for (const [logLevel, lines] of [
      ["silent", 0],
      ["error", 0],
      ["info", 2],
      ["debug", 3],
    ] as const) {
      printed.mockClear();
      const chat = await start({ logLevel });
      const ann = await Client.join(chat.url, { name: "Ann" });
      ann.post("hi");
      await ann.untilMessages(1);
      await ann.leave();
      await chat.stop();
      expect([logLevel, printed.mock.calls.length]).toEqual([logLevel, lines]);
    }
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
      silent.write(rawHandshake("/ws/", { plain: true }));
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

// ─── Commands: export and import, the executable, the README's clients ───────────────────────────────────────────────

/** Runs a command of the server to its end. */
async function run(env: Record<string, string>, args: string[]): Promise<{ code: number; out: string; said: string }> {
  const process = spawn(env, args);
  const output = [new Response(process.stdout).text(), new Response(process.stderr).text()] as const;
  const [out, said] = await within(Promise.all(output), `the end of ${args.join(" ")}`);
  return { code: await process.exited, out, said };
}

describe("export and import", () => {
  test.skipIf(!REDIS_SERVER)(
    "move the log from SQLite to Redis and back without a loss, while the chat runs",
    async () => {
      const [sqlite, redis, back] = [await STORES[0]!.make(), await STORES[1]!.make(), await STORES[0]!.make()];
      const { url } = await start({ ...sqlite.config, rate: 0, history: 1200 });
      const [ann, plain] = [
        await Client.join(url, { name: "安" }),
        await Client.join(url, { room: "团 a*[b]", plain: true }),
      ];
      for (let i = 0; i < 2500; i++) ann.post(`m${i} \0 "\n" 🙂`, `k${i}`);
      plain.send("from a plain socket");
      await ann.untilMessages(2500);
      await plain.untilTexts(1);
      const settings = (store: Partial<Config>): Config => ({ ...readConfig({ CHAT_HISTORY: "1200" }), ...store });
      const lines = async (store: Partial<Config>): Promise<string[]> => {
        let text = "";
        const count = await exportMessages(settings(store), async (lines) => void (text += lines));
        expect(count).toBe(1201);
        return text.split("\n");
      };
      const exported = await lines(sqlite.config);
      const { out, said } = await run({ ...sqlite.env, CHAT_HISTORY: "1200" }, ["export"]);
      expect([out.split("\n"), said]).toEqual([exported, "1201 messages exported.\n"]);
      for (const { config } of [redis, back]) {
        expect(await importMessages(settings(config), exported.join("\n"))).toBe(1201);
        expect((await lines(config)).toSorted()).toEqual(exported.toSorted());
      }
      const moved = await start(redis.config);
      const { epoch } = await ann.first("hello");
      const resumed = await (await Client.join(moved.url, { epoch, after: 2400 })).first("hello");
      expect([resumed.resumed, resumed.first, resumed.last, resumed.messages.length]).toEqual([true, 1301, 2500, 100]);
      const again = await Client.join(moved.url);
      again.post("again", "k2400");
      expect((await again.first("ack")).seq).toBe(2401);
    },
  );

  test.skipIf(!REDIS_SERVER)("give a room of a generation that was lost another epoch", async () => {
    const redis = await ownRedis();
    const config = readConfig({ REDIS_URL: redis.url });
    const line = { room: "", epoch: "0123456789abcdef", seq: 1, at: 1, name: "Ann", text: "hi", key: "k" };
    await importMessages(config, JSON.stringify(line));
    const epoch = async () => {
      let text = "";
      await exportMessages(config, async (lines) => void (text += lines));
      return JSON.parse(text).epoch;
    };
    expect(await epoch()).toBe(line.epoch);
    await redis.command("SET", "chat:generation", `${Date.now()}999`);
    expect(await epoch()).toMatch(/^(?!0123456789abcdef)[0-9a-f]{16}$/);
  });

  test.skipIf(!REDIS_SERVER)(
    "lose nothing when somebody comes into a room that is being imported, who sees it then",
    async () => {
      const { redis, url } = await startOverRedis();
      const lines = ["big", "other"].flatMap((room) =>
        Array.from({ length: 10_000 }, (_, i) =>
          JSON.stringify({ room, epoch: "0123456789abcdef", seq: i + 1, at: 1, name: "Ann", text: "hi", key: `k${i}` }),
        ),
      );
      const importing = importMessages(readConfig({ REDIS_URL: redis.url }), lines.join("\n"));
      const begun = async () => ((await redis.command("KEYS", "chat:*log:big")) as string[]).length > 0;
      await eventually("the first of them in Redis", begun);
      const bo = await Client.join(url, { room: "big" });
      expect([0, 100]).toContain((await bo.first("hello")).messages.length); // all of it or nothing
      await importing;
      expect((await within(bo.closed, "the close")).code).toBe(1013); // there is more to see now
      expect((await (await Client.join(url, { room: "big" })).first("hello")).last).toBe(10_000);
      expect(await redis.command("XLEN", "chat:log:big")).toBe(10_000);
      const keys = (await redis.command("KEYS", "chat:import*")) as string[];
      expect(keys).toEqual([]);
    },
  );

  test("refuse a broken line with its number, a room that is there, and a store in use, and change nothing", async () => {
    const line = { room: "", epoch: "0123456789abcdef", seq: 1, at: 1, name: "Ann", text: "hi", key: "k" };
    const broken: [unknown, string][] = [
      ["no json", "it is not JSON"],
      [null, "it has no valid room"],
      [{ ...line, room: "a\0" }, "it has no valid room"],
      [{ ...line, epoch: "e" }, "it has no valid epoch"],
      [{ ...line, seq: 3 }, "it does not follow the one before"],
      [{ ...line, seq: 0 }, "it has no valid seq"],
      [{ ...line, seq: 2, at: "now" }, "it has no valid time"],
      [{ ...line, seq: 2, at: 9e15 }, "it has no valid time"],
      [{ ...line, seq: 2, name: " " }, "it has no valid name"],
      [{ ...line, seq: 2, text: "x".repeat(16385) }, "it has no valid text"],
      [{ ...line, seq: 2, key: "a b" }, "its key is not valid"],
      [{ ...line, seq: 2 }, "its key was there before"],
    ];
    for (const { name, make } of STORES) {
      if (name === "Redis" && !REDIS_SERVER) continue;
      const config = { ...readConfig({}), ...(await make()).config };
      await (await start(config)).stop(); // makes the database
      const taken = async (...lines: unknown[]): Promise<string> => {
        const text = lines.map((line) => (line === "no json" ? line : JSON.stringify(line))).join("\n");
        return importMessages(config, text).then(String, ({ message }: StartError) => message);
      };
      for (const [second, why] of broken) {
        expect(await taken(line, second)).toBe(`Line 2: ${why}. Nothing was imported.`);
      }
      expect(await exportMessages(config, async () => {})).toBe(0);
      expect(await taken(line)).toBe("1");
      expect(await taken(line)).toBe('Room "" has messages already. Nothing was imported.');
      expect(await taken({ ...line, room: "new" }, { ...line, room: "" })).toMatch(/Nothing was imported/);
      expect(await exportMessages(config, async () => {})).toBe(1);
    }
    const { config, env } = await STORES[0]!.make();
    await start(config);
    const file = newFile();
    await Bun.write(file, JSON.stringify(line));
    const { code, said } = await run(env, ["import", file]);
    expect([code, said]).toEqual([1, expect.stringMatching(/is a second server running\?\n$/)]);
  });
});

describe("the command line", () => {
  test("tells its commands and its version, and refuses others", async () => {
    const { version } = await Bun.file(join(import.meta.dir, "package.json")).json();
    expect(await run({}, ["--version"])).toEqual({ code: 0, out: `${version}\n`, said: "" });
    const help = await run({}, ["--help"]);
    expect([help.code, help.out]).toEqual([0, expect.stringContaining("export")]);
    const source = await Bun.file(SERVER).text();
    for (const [, variable] of source.matchAll(/env\.([A-Z_]+)/g)) expect(help.out).toContain(variable as string);
    const said = "expotr: no such command; --help lists them.\n";
    expect(await run({}, ["expotr"])).toEqual({ code: 1, out: "", said });
  });

  test("is a function too, for who embeds it", async () => {
    const printed = spyOn(console, "log").mockImplementation(() => {});
    started.push(() => printed.mockRestore());
    await main(["--version"]);
    await main(["-h"]);
    expect(printed.mock.calls.map(([line]) => line)).toEqual([
      expect.stringMatching(/^\d+\.\d+\.\d+$/),
      expect.stringMatching(/export > chat/),
    ]);
    for (const args of [["serve"], ["export", "x"], ["import", "x", "y"]]) {
      await expect(main(args)).rejects.toThrow(`${args.join(" ")}: no such command; --help lists them.`);
    }
    await expect(main(["import", join(FOLDER, "no such file")])).rejects.toThrow(/no such file/);
  });

  test("builds one executable that serves the chat from an empty folder", async () => {
    const file = join(FOLDER, "executable", "chat");
    const build = ["build", "--compile", SERVER, "--outfile", file];
    expect(Bun.spawnSync([process.execPath, ...build]).exitCode).toBe(0);
    const server = Bun.spawn([file], {
      cwd: join(FOLDER, "executable"),
      env: { PORT: "0" },
      stdout: "pipe",
    });
    started.push(() => server.kill("SIGKILL"));
    const reader = server.stdout.getReader();
    const { value } = await within(reader.read(), "its address");
    const url = /http\S+/.exec(new TextDecoder().decode(value))![0];
    const page = await Bun.file(join(import.meta.dir, "index.html")).text();
    expect(await (await fetch(url)).text()).toBe(page);
    const ann = await Client.join(url);
    ann.post("hi");
    await ann.untilMessages(1);
  });
});

describe("the README", () => {
  /** The code block in a language whose text has `part`, with the address of a running chat. */
  async function example(language: string, part: string, url: string): Promise<string> {
    const readme = await Bun.file(join(import.meta.dir, "README.md")).text();
    const blocks = [...readme.matchAll(new RegExp(`\`\`\`${language}\\n([^]*?)\`\`\``, "g"))];
    const found = blocks.map(([, code]) => code as string).filter((code) => code.includes(part));
    expect(found).toHaveLength(1);
    return (found[0] as string).replaceAll("localhost:8080", new URL(url).host);
  }

  // Debian's Python, whose packages are Debian's: another one in the PATH does not have them.
  const PATH = `/usr/bin:/bin:${process.env.PATH}`;
  const websockets = Bun.spawnSync(["python3", "-c", "import websockets"], { env: { PATH } }).success;
  if (!websockets && process.env.CI) throw new Error("CI needs: apt-get install python3-websockets");
  if (!websockets) console.warn("skip: the README's Python examples; to run them: apt-get install python3-websockets");

  test.skipIf(!websockets)(
    "has a shell line that posts a notice, one that posts a log as it grows, and a client in Python",
    async () => {
      const { url } = await start();
      const watcher = await Client.join(url, { room: "team" });
      const sh = (code: string) => Bun.spawn(["sh", "-c", code], { cwd: FOLDER, env: { PATH }, stdout: "pipe" });
      sh(await example("sh", "build 42 is green", url));
      await watcher.untilMessages(1);
      await Bun.write(join(FOLDER, "app.log"), "line one\n");
      const tail = sh(`exec ${await example("sh", "tail -f", url)}`);
      started.push(() => tail.kill());
      await watcher.untilMessages(2);
      const python = Bun.spawn(["python3", "-c", await example("python", "import", url)], {
        env: { PATH },
        stdout: "pipe",
      });
      expect(await within(new Response(python.stdout).text(), "what it prints")).toBe("hello from Python\n");
      const said = watcher.messages.map(({ name, text }) => [name, text]);
      expect(said).toEqual([
        ["build", "build 42 is green"],
        ["log", "line one"],
        ["python", "hello from Python"],
      ]);
    },
  );

  test("has a bot in TypeScript that answers", async () => {
    const { url } = await start();
    const ann = await Client.join(url, { room: "team" });
    const bot = Bun.spawn([process.execPath, "-e", await example("ts", "echo-bot", url)]);
    started.push(() => bot.kill());
    await ann.until("the bot", () => ann.all("presence").some(({ count }) => count === 2));
    ann.post("!echo hello");
    const [, answer] = await ann.untilMessages(2);
    expect([answer?.name, answer?.text]).toEqual(["echo-bot", "hello"]);
  });
});

// ─── The page in Chromium ────────────────────────────────────────────────────────────────────────────────────────────

/** The text of the first element that a selector names. */
function textOf(tab: Tab, selector: string): Promise<string> {
  return tab.run((selector) => document.querySelector(selector)?.textContent ?? "", selector);
}

async function untilSays(tab: Tab, selector: string, text: string): Promise<void> {
  await eventually(`"${text}" in ${selector}`, async () => (await textOf(tab, selector)) === text);
}

async function untilState(tab: Tab, state: string): Promise<void> {
  await tab.until(state, (s) => document.querySelector<HTMLElement>("#status")!.dataset.state === s, state);
}

function valueOf(tab: Tab, selector = "#text"): Promise<string> {
  return tab.run((selector) => document.querySelector<HTMLTextAreaElement>(selector)!.value, selector);
}

async function click(tab: Tab, selector: string): Promise<void> {
  await tab.run((selector) => document.querySelector<HTMLElement>(selector)!.click(), selector);
}

/** The message that was opened by its number. */
async function untilFound(tab: Tab, seq: number): Promise<void> {
  await tab.until(`#${seq}`, (seq) => document.querySelector<HTMLElement>(".found")?.dataset.seq === `${seq}`, seq);
}

/** Types a password into the form that asks for one. */
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

/** Types what to search for. */
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
    const { url } = await start();
    await Client.join(url, { name: "Ann" });
    const tab = await Tab.join(url, { width: 1000 });
    await tab.until("Ann", () => document.querySelector("#people")!.textContent!.includes("Ann"));
    await tab.until("the count", () => document.querySelector("#count")!.textContent === "2 here");
    await tab.view.click("#me");
    await tab.view.type("Newname");
    await tab.view.press("Enter");
    await tab.until("the new name", () => document.querySelector("#people")!.textContent!.includes("Newname"));
    await tab.say("who am I");
    await tab.untilText("who am I", "sent");
    expect((await readLog(url))[0]!.name).toBe("Newname");
  });

  test("who is typing is said, until the message comes", async () => {
    const { url } = await start();
    const ann = await Client.join(url, { name: "Ann" });
    const tab = await Tab.join(url);
    await ann.until("the tab", () => ann.all("presence").some(({ count }) => count === 2));
    ann.send({ type: "typing" });
    await untilSays(tab, "#typing", "Ann is typing…");
    ann.post("done");
    await untilSays(tab, "#typing", "");
    await tab.view.click("#text");
    await tab.view.type("x");
    await ann.first("typing");
  });
});

describePage("nothing is lost in the page", () => {
  test("a server that is killed under a page that sends loses nothing and doubles nothing", async () => {
    const db = newFile();
    let server = await spawnServer({ CHAT_DB: db });
    const port = new URL(server.url).port;
    const tab = await Tab.join(server.url, { serverGoes: true });
    const sent: string[] = [];
    for (let round = 0; round < 4; round++) {
      for (let n = 0; n < 15; n++) {
        sent.push(`message ${round}.${n}`);
        await tab.say(sent.at(-1)!);
        if (n === 7) server.kill("SIGKILL");
      }
      server = await spawnServer({ CHAT_DB: db, PORT: port });
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
    const db = newFile();
    const first = await spawnServer({ CHAT_DB: db });
    const tabs = [1, 2, 3].map(() => Tab.join(first.url, { serverGoes: true }));
    const [one, two, closed] = (await Promise.all(tabs)) as [Tab, Tab, Tab];
    first.kill("SIGKILL");
    const texts = ["from one", "from two", "from the closed one"];
    for (const [n, tab] of [one, two, closed].entries()) {
      await untilState(tab, "reconnecting");
      await tab.say(texts[n]!);
      for (const each of [one, two, closed]) await each.untilText(texts[n]!, "pending");
    }
    await closed.go("about:blank");
    const second = await spawnServer({ CHAT_DB: db, PORT: new URL(first.url).port });
    for (const tab of [one, two, await Tab.join(second.url, { serverGoes: true })]) {
      await tab.until("all sent", () => document.querySelectorAll("[data-state=sent]").length === 3);
      expect(await tab.texts()).toEqual(texts);
    }
    expect(textsOf(await readLog(second.url))).toEqual(texts);
    expect(await one.run(() => Object.keys(localStorage).filter((key) => key.includes("outbox")))).toEqual([]);
  });

  test("a message that is too long stays with its reason, and can be edited and sent again", async () => {
    const { url } = await start();
    const tab = await Tab.join(url);
    const long = "é".repeat(8193);
    await tab.say(long);
    await tab.untilText(long, "failed");
    expect(await tab.run(() => document.querySelector(".why")!.textContent)).toStartWith("Not sent: Too long");
    await click(tab, ".why .edit");
    expect(await tab.texts()).toEqual([]);
    await tab.view.press("Backspace");
    await tab.view.press("Enter");
    await tab.untilText(long.slice(1), "sent");
  });

  test("a long outbox is sent in order, once, within what the server takes", async () => {
    const db = newFile();
    const first = await spawnServer({ CHAT_DB: db });
    const port = new URL(first.url).port;
    const tab = await Tab.join(first.url, { serverGoes: true });
    first.kill("SIGKILL");
    await untilState(tab, "reconnecting");
    await tab.run(() => {
      for (let n = 0; n < 120; n++) {
        document.querySelector<HTMLTextAreaElement>("#text")!.value = `waiting ${n}`;
        document.querySelector<HTMLElement>("#send")!.click();
      }
    });
    expect((await tab.texts("pending")).length).toBe(120);
    const second = await spawnServer({ CHAT_DB: db, PORT: port });
    await tab.until("all sent", () => !document.querySelector("[data-state=pending]"));
    expect(textsOf(await readLog(second.url))).toEqual(Array.from({ length: 120 }, (_, n) => `waiting ${n}`));
  });

  test("what waits in one room is not sent in another, whose name is the beginning of its name", async () => {
    const db = newFile();
    const first = await spawnServer({ CHAT_DB: db });
    const port = new URL(first.url).port;
    const tab = await Tab.join(`${first.url}team:secret`, { serverGoes: true });
    first.kill("SIGKILL");
    await tab.say("the secret");
    await tab.untilText("the secret", "pending");
    await tab.go("about:blank");
    const { url } = await spawnServer({ CHAT_DB: db, PORT: port });
    for (const room of ["team", ""]) {
      await tab.go(url + room);
      await tab.online();
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
    const tab = await Tab.open(`http://${wire.address}/#50`);
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

  test("what can be done with a post that failed keeps the focus while others write", async () => {
    const { url } = await start();
    const tab = await Tab.join(url);
    const bo = await Client.join(url, { name: "Bo" });
    const long = "x".repeat(16 * 1024 + 1);
    await tab.say(long);
    await tab.untilText(long, "failed");
    await tab.run(() => document.querySelector<HTMLElement>(".why .retry")!.focus());
    bo.post("hello");
    await tab.untilText("hello");
    expect(await tab.run(() => document.activeElement!.className)).toBe("retry");
    await tab.view.press("Enter"); // it is too long still
    await tab.untilText(long, "failed");
    expect(await tab.run(() => document.activeElement!.className)).toStartWith("message "); // the button went meanwhile
  });

  test("a password is asked for, refused, taken, and then the page connects", async () => {
    const { url } = await start({ password: "sesame" });
    const tab = await Tab.open(url);
    tab.expected = /401/;
    await givePassword(tab, "wrong", "That is not the password.");
    await givePassword(tab, "sesame", "");
    await tab.online();
    expect(await tab.run(() => document.querySelector<HTMLElement>("#password-form")!.hidden)).toBe(true);
    expect([await valueOf(tab, "#password"), await tab.run(() => document.activeElement!.id)]).toEqual(["", "text"]);
  });

  test("the draft survives a reload", async () => {
    const { url } = await start();
    const tab = await Tab.join(url);
    await tab.view.click("#text");
    await tab.view.type("half a thou");
    await tab.reload();
    expect(await valueOf(tab)).toBe("half a thou");
  });

  test("the page works whatever others have written into its storage", async () => {
    const { url } = await start();
    const tab = await Tab.join(url);
    for (const value of ["5", "[null, 5]", '{"at":1}', '{"key":"k","text":"x","name":"n","at":1e300}', "no json"]) {
      await tab.run((value) => {
        for (const key of ["name", "rooms", "notify", "draft:", 'outbox:"":A', 'outbox:"":1e+300-k'])
          localStorage.setItem(`chat.${key}`, value);
      }, value);
      await tab.reload();
      await tab.online();
      await tab.say(value);
      await tab.untilText(value, "sent");
    }
    await tab.run(() => localStorage.clear());
  });
});

describePage("who is who, and taking it back", () => {
  const COOKIE = (letter: string) => ({ Cookie: `chat-me=${letter.repeat(22)}` });

  test("two people of one name are told apart by colour and by the start of an id, in the log and in the list", async () => {
    const { url } = await start();
    const ann = await Client.join(url, { name: "Ann", headers: COOKIE("a") });
    const other = await Client.join(url, { name: "Ann", headers: COOKIE("b") });
    const script = await Client.join(url, { name: "Ann" });
    for (const [n, client] of [ann, other, script].entries()) {
      client.post(`from ${n}`, `k${n}`);
      await ann.untilMessages(n + 1);
    }
    const tab = await Tab.join(url, { width: 1200 });
    const id = (await other.first("hello")).you!;
    const shown = (tab: Tab, selector: string) =>
      tab.run(
        (selector) =>
          [...document.querySelectorAll<HTMLElement>(selector)].map((by) => [
            by.querySelector<HTMLElement>(".name")!.style.getPropertyValue("--hue"),
            by.querySelector(".tag")?.textContent ?? "",
          ]),
        selector,
      );
    const rows = await shown(tab, ".message");
    expect(rows.map(([, tag]) => tag)).toEqual(["", id.slice(0, 4), ""]);
    expect(new Set(rows.map(([hue]) => hue)).size).toBe(3);
    await tab.until("the list", () => document.querySelectorAll("#people li").length === 4);
    expect(await shown(tab, "#people li")).toEqual(expect.arrayContaining(rows));
  });

  test("own messages are told by their id, after a reload and in another tab too", async () => {
    const { url } = await start();
    const tab = await Tab.join(url);
    await tab.say("mine");
    await tab.untilText("mine", "sent");
    const [{ key, name } = { key: "" }] = await readLog(url);
    const mallory = await Client.join(`${url}`, { name });
    mallory.post("not mine", `${key}x`);
    await tab.untilText("not mine");
    await tab.reload();
    await tab.untilText("not mine");
    for (const each of [tab, await Tab.join(url)]) expect(await each.texts("sent")).toEqual(["mine"]);
  });

  test("what was taken back leaves every page: rows, answers, results; the words go back to the composer", async () => {
    const { url } = await start();
    const bo = await Client.join(url, { name: "Bo" });
    const [one, two] = [await Tab.join(url), await Tab.join(url)];
    await one.say("the secret");
    await one.untilText("the secret", "sent");
    bo.post("#1 I see", "k1");
    for (const tab of [one, two]) await tab.untilText("#1 I see");
    await search(two, "SECRET", ["secret"]);
    await two.run(hide, true);
    await click(one, ".own .remove");
    for (const tab of [one, two]) {
      await tab.untilText("Taken back");
      expect(await textOf(tab, ".quote")).toEndWith("Taken back");
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
    await two.reload();
    await two.untilText("Taken back");
  });

  test("what is taken back without a server is taken back when there is one", async () => {
    const db = newFile();
    const first = await spawnServer({ CHAT_DB: db });
    const tab = await Tab.join(first.url, { serverGoes: true });
    await tab.say("a slip");
    await tab.untilText("a slip", "sent");
    first.kill("SIGKILL");
    await untilState(tab, "reconnecting");
    await click(tab, ".remove");
    expect(await tab.texts()).toEqual(["a slip"]);
    await spawnServer({ CHAT_DB: db, PORT: new URL(first.url).port });
    await tab.untilText("Taken back");
  });

  test("the operator's password is asked for in the menu, and lets one remove what others wrote", async () => {
    const { url } = await start({ operator: "sesame" });
    const bo = await Client.join(url, { name: "Bo" });
    bo.post("an advertisement", "k1");
    const tab = await Tab.join(url);
    tab.expected = /401/;
    await tab.untilText("an advertisement");
    expect(await tab.run(() => document.querySelector(".remove"))).toBeNull();
    await click(tab, "#operator");
    await givePassword(tab, "wrong", "That is not the password.");
    await givePassword(tab, "sesame", "");
    await tab.until("the action", () => document.querySelector(".remove")?.textContent === "Remove");
    expect(await tab.run(() => document.querySelector<HTMLElement>("#operator")!.hidden)).toBe(true);
    await click(tab, ".remove");
    await tab.untilText("Taken back");
    expect(await valueOf(tab)).toBe("");
  });
});

describePage("search, answers, mentions", () => {
  test("finds in the whole history, newest first, once, whatever case and accents; opens what is chosen", async () => {
    const { url } = await start({ rate: 0 });
    const special: Record<number, string> = {
      7: "Ein Café am Straßenrand, un e\u0301clair",
      8: "Привет, мир! 你好，世界",
      9: "ΟΔΟΣ ﬁn 👩‍👩‍👧🏠 <img src=x onerror=alert(1)>",
      320: "another cafe",
    };
    await fill(url, "", 350, (n) => special[n] ?? `Message ${n}`);
    const tab = await Tab.join(url);
    for (const [query, ...found] of [
      ["CAFÉ", "cafe", "Café"],
      ["cafe a", "Café a"],
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
    expect(await textOf(tab, "#searched")).toBe("111 found · searched everything");
    await tab.run(() => void (document.querySelector("#results")!.scrollTop = 1e6));
    await tab.until("more", () => document.querySelectorAll("#results li").length === 111);
    await search(tab, "cafe a", ["Café a"]);
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
    const { url } = await start({ db });
    const bo = await Client.join(url, { name: "Bo" });
    const tab = await Tab.join(url);
    await type(tab, "needle");
    bo.post("a live needle");
    await untilSays(tab, "#results mark", "needle");
    expect(await tab.run(() => document.querySelector("#searched")!.getAttribute("aria-busy"))).toBe("true");
    await tab.until("the end", () => document.querySelector("#searched")!.getAttribute("aria-busy") === "false");
    expect(await textOf(tab, "#searched")).toBe("2 found · searched everything");
  });

  test("is used by the keyboard alone, closed by Escape, and takes the screen of a phone", async () => {
    const { url } = await start();
    await fill(url, "", 5);
    const tab = await Tab.join(url, { width: 320, height: 480 });
    await tab.untilText("Message 5");
    await tab.run(() => document.querySelector<HTMLElement>("#log")!.focus());
    await tab.view.press("/");
    await search(tab, "message", Array(5).fill("Message"));
    const box = () => {
      const { x, y, width, height } = document.querySelector("#search")!.getBoundingClientRect();
      return [x, y, width, height];
    };
    expect(await tab.run(box)).toEqual([0, 0, 320, 480]);
    for (const key of ["Enter", "ArrowDown", "ArrowDown", "ArrowUp"] as const) await tab.view.press(key);
    expect(await tab.run(() => (document.activeElement as HTMLElement).dataset.seq)).toBe("4");
    await tab.view.press("Escape");
    expect(await tab.run(() => document.querySelector("dialog[open]") ?? document.activeElement!.id)).toBe("log");
    await tab.run(() => document.querySelector<HTMLElement>("#text")!.focus());
    await tab.view.type("a/b");
    expect(await valueOf(tab)).toBe("a/b");
  });

  test("Reply begins with #42, which is a link; an answer shows a line of what it answers", async () => {
    const { url } = await start();
    const bo = await Client.join(url, { name: "Bo" });
    bo.post("<b>bold</b>\nquestion", "k1");
    const tab = await Tab.join(url);
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
    expect(await tab.run(() => document.activeElement!.id)).toBe("send");
    await tab.run(() =>
      [...document.querySelectorAll<HTMLElement>("#people button")].find((b) => b.textContent!.includes("Bo"))!.click(),
    );
    expect(await valueOf(tab)).toBe("hi,@Ann me@bo @Bo ");
    expect(await tab.run(() => document.activeElement!.id)).toBe("text");
  });
});

describePage("the connection", () => {
  test("being offline is said in words, and what was written is sent at once when it ends", async () => {
    const { url } = await start();
    const tab = await Tab.join(url);
    tab.expected = /ERR_INTERNET_DISCONNECTED|closed before the connection is established/;
    const network = { latency: 0, downloadThroughput: -1, uploadThroughput: -1 };
    const offline = (offline: boolean) => tab.view.cdp("Network.emulateNetworkConditions", { ...network, offline });
    await tab.view.cdp("Network.enable");
    await offline(true);
    await tab.until("the word", () => document.querySelector("#status")!.textContent === "Offline");
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
    await tab.online();
  });

  test("an address that names no room is told so, and nothing is connected", async () => {
    const { url } = await start();
    for (const path of ["%ff", "a%00b", "x".repeat(65)]) {
      const tab = await Tab.open(url + path);
      await tab.until("the word", () => document.querySelector<HTMLElement>("#status")!.dataset.state === "bad-room");
      expect(await tab.run(() => document.querySelector("#blank-title")!.textContent)).toBe(
        "No room can have this name",
      );
    }
  });
});

describePage("scrolling", () => {
  /** How far each drawn message stands from the top of the log, by its seq. */
  const places = (tab: Tab) =>
    tab.run(() => {
      const top = document.querySelector("#log")!.getBoundingClientRect().top;
      const rows = [...document.querySelectorAll<HTMLElement>(".message")];
      return Object.fromEntries(rows.map((row) => [row.dataset.seq, row.getBoundingClientRect().top - top]));
    });
  const seqs = (tab: Tab) =>
    tab.run(() => [...document.querySelectorAll<HTMLElement>(".message")].map((row) => Number(row.dataset.seq)));

  test("the page sticks to the bottom when it is there", async () => {
    const { url } = await start();
    const bo = await fill(url, "", 50);
    const tab = await Tab.join(url);
    for (let n = 0; n < 5; n++) {
      bo.post(`new ${n}`);
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
    const { url } = await start();
    const bo = await fill(url, "", 60);
    const tab = await Tab.join(url);
    await tab.run(() => document.querySelector("#log")!.scrollBy(0, -700));
    await drawn(tab);
    const before = await places(tab);
    for (let n = 0; n < 3; n++) bo.post(`new ${n}`);
    await tab.until("the button", () => document.querySelector("#newer")!.textContent === "3 new messages ↓");
    const after = await places(tab);
    for (const seq in before) expect(after[seq]).toBe(before[seq]!);
    expect(await tab.run(() => document.title)).toBe("(3) Lobby – Chat");
    const line = () => (document.querySelector(".unread-line")!.nextElementSibling as HTMLElement).dataset.seq;
    expect(await tab.run(line)).toBe("61");
    await tab.view.click("#newer");
    await tab.until("the end", () => document.querySelector<HTMLElement>("#newer")!.hidden);
    expect(await tab.run(() => document.title)).toBe("Lobby – Chat");
  });

  test("through 10,000 messages and back, nothing moves by a pixel and few rows are in the page", async () => {
    const { url } = await start({ rate: 0 });
    await fill(url, "", 10_000, (n) => `Message ${n} ${"word ".repeat(n % 40)}`);
    const tab = await Tab.open(url);
    await tab.untilText("Message 10000 ");
    const moved = await tab.run(async () => {
      const log = document.querySelector<HTMLElement>("#log")!;
      const frame = () => new Promise((done) => requestAnimationFrame(done));
      const rows = () => [...document.querySelectorAll<HTMLElement>(".message")];
      let worst = 0;
      let most = 0;
      const sweep = async (step: number, end: string) => {
        for (let still = 0; still < 100;) {
          log.scrollTop += step;
          const seen = rows().find((row) => row.getBoundingClientRect().bottom > log.getBoundingClientRect().top + 1)!;
          const before = seen.getBoundingClientRect().top;
          await frame();
          await frame();
          worst = Math.max(worst, seen.isConnected ? Math.abs(seen.getBoundingClientRect().top - before) : Infinity);
          most = Math.max(most, rows().length);
          const done = rows().some((row) => row.dataset.seq === end);
          still = done ? still + 25 : 0;
        }
      };
      await sweep(-6000, "1");
      await sweep(6000, "10000");
      return { worst, most };
    });
    expect(moved.worst).toBeLessThan(1);
    expect(moved.most).toBeLessThanOrEqual(300);
  });

  test("#42 opens the page at that message, and from there all later ones can be reached", async () => {
    const { url } = await start({ rate: 0 });
    const bo = await fill(url, "", 1000);
    const tab = await Tab.join(`${url}#42`);
    await untilFound(tab, 42);
    const { y, height } = await tab.run(() => {
      const { y } = document.querySelector(".found")!.getBoundingClientRect();
      return { y, height: innerHeight };
    });
    expect(y).toBeGreaterThan(0);
    expect(y).toBeLessThan(height);
    bo.post("a new one");
    await tab.until("the count", () => document.querySelector("#newer")!.textContent === "1 new message ↓");
    expect(await tab.texts()).not.toContain("a new one");
    await tab.until("the end", () => {
      const log = document.querySelector<HTMLElement>("#log")!;
      log.scrollTop = log.scrollHeight;
      return [...document.querySelectorAll<HTMLElement>(".message")].at(-1)!.dataset.seq === "1001";
    });
    const found = await seqs(tab);
    expect(found).toEqual(found.map((_, i) => found[0]! + i));
    await tab.run(() => (location.hash = "#500"));
    await untilFound(tab, 500);
    await tab.view.click("#newer");
    await tab.untilText("a new one");
  });
});

describePage("a history of the longest messages", () => {
  test("whose middle was trimmed meanwhile is not asked for again and again, and the button leads to its end", async () => {
    const { url } = await start({ rate: 0, history: 300 });
    const filler = await fill(url, "", 300);
    const tab = await Tab.open(`${url}#50`);
    await tab.untilText("Message 50");
    for (let n = 301; n <= 2500; n++) filler.post(`Message ${n}`, `more-${n}`);
    await filler.untilMessages(2500);
    await tab.run(() => {
      const { send } = WebSocket.prototype;
      Object.assign(globalThis, { asked: 0 });
      WebSocket.prototype.send = function (frame) {
        if (String(frame).includes('"page"')) (globalThis as any).asked++;
        send.call(this, frame);
      };
    });
    await tab.run(() => void (document.querySelector("#log")!.scrollTop = 1e9));
    await tab.until("an answer", () => document.querySelector("#log")!.getAttribute("aria-busy") === "false");
    await click(tab, "#newer");
    await tab.untilText("Message 2500");
    expect(await tab.run(() => (globalThis as any).asked)).toBeLessThan(10);
  });

  test("can be read up and down, and opened at any message, though its pages are cut", async () => {
    const { url } = await start({ rate: 0 });
    await fill(url, "", 150, (n) => `${n} ${"x".repeat(16_000)}`);
    const tab = await Tab.join(`${url}#20`);
    for (const seq of [20, 75]) {
      await tab.run((seq) => (location.hash = `#${seq}`), seq);
      await untilFound(tab, seq);
    }
    for (const [edge, seq] of [
      [0, "1"],
      [1, "150"],
    ] as const) {
      const reached = (edge: number, seq: string) => {
        const log = document.querySelector<HTMLElement>("#log")!;
        log.scrollTop = edge * log.scrollHeight;
        return document.querySelector(`.message[data-seq="${seq}"]`);
      };
      await tab.until(seq, reached as (edge: number, seq: string) => unknown, edge, seq);
    }
  });
});

describePage("the composer", () => {
  test("Enter sends and Shift+Enter breaks the line", async () => {
    const { url } = await start();
    const tab = await Tab.join(url);
    await tab.view.click("#text");
    await tab.view.type("one");
    await tab.view.press("Enter", { modifiers: ["Shift"] });
    await tab.view.type("two");
    await tab.view.press("Enter");
    await tab.untilText("one\ntwo", "sent");
  });

  test("Enter that ends a composition sends nothing, in either order of events", async () => {
    const { url } = await start();
    const tab = await Tab.join(url);
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
    const { url } = await start();
    const tab = await Tab.join(url);
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
});

describePage("what people write stays text", () => {
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
    const { url } = await start();
    const bo = await Client.join(url, { name: "Bo" });
    const tab = await Tab.join(url);
    HOSTILE.forEach((text, n) => bo.post(text, `h${n}`));
    await tab.until("all of it", (count) => document.querySelectorAll(".message").length === count, HOSTILE.length);
    expect(await tab.texts()).toEqual(HOSTILE);
    const elements = () => document.querySelectorAll(".text *, .name *, main iframe, main script, main img").length;
    expect(await tab.run(elements)).toBe(0);
  });

  test("a battery of names appears as it was given", async () => {
    const { url } = await start();
    const names = ["<b>bold</b>", '"onclick="alert(1)', "__proto__", "\u202Eevil", "👩‍👩‍👧", "$& $1 `", "(.*)+["];
    const tab = await Tab.join(url, { width: 1000 });
    for (const name of names) (await Client.join(url, { name })).post("x", `n${names.indexOf(name)}`);
    const count = names.length;
    await tab.until("all of them", (count) => document.querySelectorAll(".message").length === count, count);
    const shown = () => [...document.querySelectorAll(".message .name")].map((name) => name.textContent!);
    expect((await tab.run(shown)).sort()).toEqual(names.sort());
    await tab.until("the list", (count) => document.querySelectorAll("#people li").length === count + 1, count);
    await tab.run((name) => localStorage.setItem("chat.name", JSON.stringify(name)), "(.*)+[");
    await tab.reload();
    await tab.until("the reload", (count) => document.querySelectorAll(".message").length === count, count);
  });

  test("links, code and mentions of one's own name become elements, and nothing else", async () => {
    const { url } = await start();
    const bo = await Client.join(url, { name: "Bo" });
    const tab = await Tab.join(url);
    const name = await tab.run(() => document.querySelector("#me")!.textContent!);
    bo.post(`(see https://a.example/x?y=1.) \`a <b>\` @${name}!\n\`\`\`js\nlet x = "<i>";\n\`\`\``, "k1");
    bo.post("看这里：https://b.example/路径，好吗？", "k2");
    bo.post(`“https://c.example” [https://d.example/] **https://e.example** (https://f.example/(g)) ${name}ë`, "k3");
    await tab.until("all", () => document.querySelectorAll(".message").length === 3);
    const found = () => [...document.querySelectorAll(".text *")].map((e) => [e.localName, e.textContent!]);
    expect(await tab.run(found)).toEqual([
      ["a", "https://a.example/x?y=1"],
      ["code", "a <b>"],
      ["mark", `@${name}`],
      ["pre", 'let x = "<i>";'],
      ["code", 'let x = "<i>";'],
      ["a", "https://b.example/路径"],
      ...["https://c.example", "https://d.example/", "https://e.example", "https://f.example/(g)"].map((url) => [
        "a",
        url,
      ]),
    ]);
    const link = () => {
      const { href, rel, target } = document.querySelector<HTMLAnchorElement>(".text a")!;
      return [href, rel, target];
    };
    expect(await tab.run(link)).toEqual(["https://a.example/x?y=1", "noopener noreferrer", "_blank"]);
  });
});

describePage("attention, language, form", () => {
  test("the title counts what came while the page was hidden", async () => {
    const { url } = await start();
    const bo = await Client.join(url, { name: "Bo" });
    const tab = await Tab.join(url);
    await tab.run(hide, true);
    for (let n = 0; n < 2; n++) bo.post(`unseen ${n}`);
    await tab.until("the count", () => document.title === "(2) Lobby – Chat");
    await tab.run(hide, false);
    await tab.until("no count", () => document.title === "Lobby – Chat");
  });

  test("a page that comes back by the back button has the name and the rooms of today", async () => {
    const { url } = await start();
    const tab = await Tab.join(url);
    await tab.run(() => {
      localStorage.setItem("chat.name", '"Newname"');
      localStorage.setItem("chat.rooms", '["elsewhere"]');
      dispatchEvent(new Event("pageshow"));
    });
    await untilSays(tab, "#me", "Newname");
    expect(await textOf(tab, "#visited")).toBe("Lobbyelsewhere");
  });

  test("messages stand in one column with the field; a notice beside the button; a sheet is none in a wide window", async () => {
    const { url } = await start();
    await fill(url, "", 60);
    const tab = await Tab.join(url);
    await tab.untilText("Message 60");
    await tab.run(() => {
      document.querySelector("#log")!.scrollTop = 0;
      document.querySelector<HTMLElement>(".copy")!.click();
      document.querySelector<HTMLElement>("#show-rooms")!.click();
    });
    await tab.until("both", () => !document.querySelector<HTMLElement>("#newer")!.hidden);
    const edges = () =>
      ["#notice", "#newer", ".message", "#composer"].map((selector) => {
        const { top, bottom, left, right } = document.querySelector(selector)!.getBoundingClientRect();
        return { top, bottom, left, right };
      });
    for (const width of [320, 800, 1000, 1400]) {
      await tab.size(width, 600);
      await drawn(tab);
      const [notice, newer, message, composer] = await tab.run(edges);
      expect(notice!.bottom).toBeLessThanOrEqual(newer!.top);
      expect([width, message!.left, message!.right]).toEqual([width, composer!.left, composer!.right]);
    }
    expect(await tab.run(() => document.querySelector("#rooms")!.matches(":popover-open"))).toBe(false);
  });

  test("nothing scrolls sideways and nothing is cut off at 320 pixels", async () => {
    const { url } = await start();
    const room = "room".repeat(16);
    const long = await Client.join(url, { room, name: "W".repeat(32) });
    [
      "w".repeat(300),
      `https://example.com/${"a".repeat(200)}`,
      "```\n" + "c".repeat(200) + "\n```",
      "مرحبا",
      "x",
    ].forEach((text, n) => long.post(text, `w${n}`));
    const tab = await Tab.join(url + room, { width: 320, height: 480 });
    await tab.say("mine ".repeat(50));
    await tab.until("all", () => document.querySelectorAll(".message").length === 6);
    for (const width of [320, 390, 768, 1440]) {
      await tab.size(width, 700);
      await drawn(tab);
      const sideways = await tab.run(() => {
        const log = document.querySelector<HTMLElement>("#log")!;
        const wide = [...document.querySelectorAll("body *")].filter((element) => {
          const { left, right, width } = element.getBoundingClientRect();
          return width > 1 && (left < -1 || right > innerWidth + 1) && !element.closest("pre");
        });
        return [
          document.documentElement.scrollWidth - innerWidth,
          log.scrollWidth - log.clientWidth,
          wide.map((e) => e.outerHTML.slice(0, 99)),
        ];
      });
      expect([width, ...sideways]).toEqual([width, 0, 0, []]);
    }
  });

  test("all can be done with the keyboard alone", async () => {
    const { url } = await start();
    const bo = await Client.join(url, { name: "Bo" });
    bo.post("first", "k1");
    bo.post("second", "k2");
    await bo.untilMessages(2);
    const tab = await Tab.join(url);
    const focused = () =>
      document.activeElement!.id || document.activeElement!.className || document.activeElement!.localName;
    await tab.until("the count", () => !document.querySelector<HTMLElement>("#count")!.hidden);
    await tab.run(() => document.querySelector<HTMLElement>("#text")!.blur());
    const order: string[] = [];
    while (order.at(-1) !== "send" && order.length < 10) {
      await tab.view.press("Tab");
      order.push(await tab.run(focused));
    }
    expect(order).toEqual(["show-rooms", "show-search", "count", "log", "me", "text", "send"]);
    await tab.run(() => document.querySelector<HTMLElement>("#log")!.focus());
    await tab.view.press("ArrowUp");
    await tab.view.press("ArrowUp");
    expect(await tab.run(() => (document.activeElement as HTMLElement).dataset.seq)).toBe("1");
    await tab.view.press("Tab");
    expect(await tab.run(focused)).toBe("reply");
    await tab.view.press("Tab");
    await tab.view.press("Enter");
    await tab.until("the notice", () => document.querySelector("#notice")!.textContent === "Copied");
    await tab.view.press("Escape");
    expect(await tab.run(focused)).toBe("text");
    await tab.run(() => document.querySelector<HTMLElement>("#count")!.focus());
    await tab.view.press("Enter");
    expect(await tab.run(() => document.querySelector("#who")!.matches(":popover-open"))).toBe(true);
    await tab.view.press("Escape");
    expect(await tab.run(() => document.querySelector("#who")!.matches(":popover-open"))).toBe(false);
    expect(await tab.run(focused)).toBe("count");
  });

  test.each([false, true])("every text has a contrast of 4.5 to 1 (dark: %p)", async (dark) => {
    const { url } = await start();
    const bo = await Client.join(url, { name: "Bo" });
    const tab = await Tab.join(url, { dark, width: 1300 });
    const name = await tab.run(() => document.querySelector("#me")!.textContent!);
    bo.post(`\`code\` https://a.example @${name}`, "k1");
    await tab.say("mine `code` https://b.example");
    await tab.say("é".repeat(8193));
    await tab.until("all", () => document.querySelectorAll(".message").length === 3);
    const low = await tab.run(lowContrasts);
    expect(low).toEqual([]);
  });
});

/** In the page: the texts whose contrast with what is behind them is below 4.5, with names in all hues. */
function lowContrasts(): string[] {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true })!;
  const paint = (colors: string[]) => {
    for (const color of colors) {
      context.fillStyle = color;
      context.fillRect(0, 0, 1, 1);
    }
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (rgb: number[]) => {
    const [r, g, b] = rgb.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r! + 0.7152 * g! + 0.0722 * b!;
  };
  const contrast = (element: Element) => {
    const grounds: string[] = [];
    for (let e: Element | null = element; e; e = e.parentElement) grounds.unshift(getComputedStyle(e).backgroundColor);
    const ground = paint(["white", ...grounds]);
    const text = paint([`rgb(${ground.slice(0, 3).join()})`, getComputedStyle(element).color]);
    const [low, high] = [luminance(ground), luminance(text)].sort((a, b) => a - b);
    return (high! + 0.05) / (low! + 0.05);
  };
  const low: string[] = [];
  const check = (element: Element, what: string) => {
    const found = contrast(element);
    if (found < 4.5) low.push(`${what}: ${found.toFixed(2)}`);
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
  /** A page of the chat in happy-dom. */
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
    expect([zh.$("html").lang, zh.$("#text").placeholder, zh.$("#send").textContent]).toEqual([
      "zh-CN",
      "请输入",
      "发送",
    ]);
    const en = await openPage(url, ["fr", "en"]);
    expect([en.$("html").lang, en.$("#text").placeholder, en.$("#send").textContent]).toEqual([
      "en",
      "Write a message",
      "Send",
    ]);
  });

  test("a message is pending at once, then sent, and others receive it", async () => {
    const { url } = await start();
    const bo = await Client.join(url, { name: "Bo" });
    const page = await openPage(url);
    page.say("hi Bo");
    expect(page.rows()[0]!.dataset.state).toBe("pending");
    await eventually("the confirmation", () => page.rows()[0]!.dataset.state === "sent");
    await bo.untilMessages(1);
    bo.post("hi you");
    await eventually("the answer", () => page.rows().length === 2);
    expect(page.rows()[1]!.querySelector(".text")!.textContent).toBe("hi you");
  });

  test("the page works when storage is forbidden and notifications are missing", async () => {
    const { url } = await start();
    const page = await openPage(url, ["en"], (window) => {
      const forbidden = {
        get: () => {
          throw new Error("storage is forbidden");
        },
      };
      Object.defineProperty(window, "localStorage", forbidden);
      Object.defineProperty(window, "Notification", { value: undefined });
    });
    page.say("still here");
    await eventually("the confirmation", () => page.rows()[0]?.dataset.state === "sent");
  });
});
