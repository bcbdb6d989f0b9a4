/// <reference types="bun-types" />
/**
 * The benchmark: what a delivered message costs the server, against a bare `Bun.serve` that does nothing but publish.
 *
 *    bun run bench                                  everything, about two minutes
 *    bun run bench --scenario talk,join --rounds 5  some of it, more exactly
 *    bun run bench --broker redis                   one, two and four servers over one Redis (started here too)
 *    bun run bench --messages 100000                a smaller database for start, return and history
 *
 * Scenarios: talk, crowd, busy, calm, memory, join, return, start, history, rooms.
 *
 * Wall-clock time says much about the machine and its other users; CPU time says what the server does. So the figure is
 * the CPU time of the server's process (user and system, all threads, as the kernel counts it) for each message that
 * arrived at a client. The same is taken of the floor, in turns, and the median over the rounds of their ratio counts.
 *
 * The load comes from this process. It speaks WebSocket over raw sockets and reads little more than frame headers, so
 * that it has time to spare. Every client checks that it got every message, in the order in which all others did; a run
 * that lost anything prints LOST instead of a figure, and the exit code is 1.
 */
import { Database } from "bun:sqlite";
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync } from "node:fs";
import { cpus, release, tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";

// ─── The floor ───────────────────────────────────────────────────────────────────────────────────────────────────────

/**
 * The floor: what arrives is published to everyone, unread. For a `chat.v1` row the clients send it texts that are as
 * long as the chat's frame with one message, so that both deliver as many bytes: it is a server that parses nothing,
 * numbers nothing, stores nothing. Started as a process of its own: `bun run bench.ts --floor`.
 */
function floor(): void {
  const server = Bun.serve({
    port: 0,
    fetch: (request, server) => (server.upgrade(request) ? undefined : new Response("floor")),
    websocket: {
      open: (ws) => void ws.subscribe("room"),
      message: (_, data) => void server.publish("room", data, false),
    },
  });
  console.log(`The floor is open: ${server.url}`);
}

// ─── What is measured ────────────────────────────────────────────────────────────────────────────────────────────────

/** A way to run the chat. */
interface Variant {
  /** The clients' dialect: `chat.v1`, or plain. */
  readonly chat: boolean;
  /** How durable the store is: `CHAT_SYNC`, or with Redis its `appendfsync`. */
  readonly sync: "normal" | "full";
  /** Servers that share the clients; more than one only with Redis. */
  readonly servers?: number;
}

/** The four ways with SQLite; the targets of a {@link Load} are in this order. */
const SQLITE_VARIANTS: readonly Variant[] = [
  { chat: false, sync: "normal" },
  { chat: false, sync: "full" },
  { chat: true, sync: "normal" },
  { chat: true, sync: "full" },
];

/** One, two and four servers over one Redis, side by side; they have no targets. */
const REDIS_VARIANTS: readonly Variant[] = [false, true].flatMap((chat) =>
  [1, 2, 4].map((servers) => ({ chat, sync: "normal" as const, servers })),
);

/** People who talk in one room. */
interface Load {
  readonly title: string;
  readonly clients: number;
  /** Clients that send; the others listen. */
  readonly senders: number;
  /** Closed loop: messages that each sender has under way; it sends the next when its own arrives. */
  readonly inFlight?: number;
  /** Open loop: messages a second in all, evenly spaced, the senders in turn. */
  readonly rate?: number;
  /** Bytes of one text. */
  readonly text: number;
  /** Seconds of one round. */
  readonly seconds: number;
  /** The ratios to the floor that are to be reached, as {@link SQLITE_VARIANTS}. */
  readonly targets: readonly [number, number, number, number];
}

const LOADS: Record<string, Load> = {
  talk: {
    title: "32 clients, all send, 1 in flight, 64 B",
    clients: 32,
    senders: 32,
    inFlight: 1,
    text: 64,
    seconds: 0.5,
    targets: [1.15, 1.5, 1.3, 1.5],
  },
  crowd: {
    title: "1,000 clients, 10 send, 4 in flight, 128 B",
    clients: 1000,
    senders: 10,
    inFlight: 4,
    text: 128,
    seconds: 0.8,
    targets: [1.0, 1.15, 0.75, 0.75],
  },
  busy: {
    title: "200 clients, 500 messages/s, 128 B",
    clients: 200,
    senders: 200,
    rate: 500,
    text: 128,
    seconds: 0.8,
    targets: [0.65, 0.7, 0.55, 0.6],
  },
  calm: {
    title: "200 clients, 20 messages/s, 128 B",
    clients: 200,
    senders: 200,
    rate: 20,
    text: 128,
    seconds: 1.5,
    targets: [1.2, 1.3, 1.3, 1.35],
  },
};

/** What every process does before it is measured, so that its hot code is compiled: many messages among few. */
const WARM_UP: Load = { ...LOADS.talk!, clients: 16, senders: 16, inFlight: 4, text: 128, seconds: 0.6 };

/** Bytes by which the chat's frame with one message is longer than its text: the JSON, a name and a key as sent here. */
const FRAME_BYTES = 135;
/** Clients in the rows on memory and on coming back. */
const MANY_CLIENTS = 5000;
/** Joins of one round. */
const JOINS = 1000;
/** Messages in the room that is joined. */
const JOIN_MESSAGES = 10_000;
/** Messages that each client missed when the server was restarted. */
const MISSED_MESSAGES = 100;
/** Pages of history asked for in one round. */
const PAGES = 300;
/** Rooms of two clients each; fewer when a process may not open so many sockets. */
const MANY_ROOMS = 10_000;
/** Messages a second over all rooms: so few that none are gathered, neither in many rooms nor in one. */
const ROOMS_RATE = 125;
/** Messages a second to rooms with a short and a long history: few, for the short one to stay short. */
const HISTORY_RATE = 1000;
/** Seconds of one round over all rooms. */
const ROOMS_SECONDS = 2;
/** Connections that are being made at a time. */
const CONNECTING = 64;
/** Milliseconds after which what has not arrived is lost. */
const LOST_MS = 10_000;
/** Milliseconds for a process to start. */
const START_MS = 20_000;
/** Milliseconds after which memory is read: garbage is collected, presence has settled. */
const SETTLE_MS = 2500;

/** A run that is no figure: a message, a connection or an answer did not come. */
class Lost extends Error {}

// ─── Processes ───────────────────────────────────────────────────────────────────────────────────────────────────────

const here = import.meta.dir;
const children = new Set<Bun.Subprocess>();
let temporary = "";
let serial = 0;

/** A path in this run's temporary directory that was never used. */
function temporaryPath(name: string): string {
  temporary ||= mkdtempSync(join(tmpdir(), "chat-bench-"));
  return join(temporary, `${++serial}-${name}`);
}

/** Kills what was started and removes what was written: after each scenario, and when the run fails or is interrupted. */
function cleanUp(): void {
  for (const child of children) child.kill("SIGKILL");
  children.clear();
  if (temporary) rmSync(temporary, { recursive: true, force: true });
  temporary = "";
}

/** One or more processes that serve the same chat, or the floor. */
class Target {
  readonly ports: number[] = [];
  readonly #processes: Bun.Subprocess[] = [];

  /** Starts a process and waits until it has printed its URL. */
  async start(command: string[], env: Record<string, string>): Promise<void> {
    const output = temporaryPath("output"); // a file: a pipe would wake this process for every line
    const child = Bun.spawn(["bun", "run", ...command], {
      cwd: here,
      env: { PATH: process.env.PATH, TMPDIR: process.env.TMPDIR, ...env },
      stdout: Bun.file(output),
      stderr: "inherit",
    });
    children.add(child);
    this.#processes.push(child);
    const complaint = `${command.join(" ")} did not start`;
    const port = await until(START_MS, complaint, () => {
      if (child.exitCode !== null) throw new Lost(complaint);
      return existsSync(output) ? /http:\/\/[^:]+:(\d+)\//.exec(readFileSync(output, "utf8"))?.[1] : undefined;
    });
    this.ports.push(Number(port));
  }

  /** CPU time used so far by all threads, user and system, in microseconds. */
  cpu(): number {
    let nanoseconds = 0;
    for (const { pid } of this.#processes) {
      for (const thread of readdirSync(`/proc/${pid}/task`)) {
        try {
          nanoseconds += Number(readFileSync(`/proc/${pid}/task/${thread}/schedstat`, "utf8").split(" ")[0]);
        } catch {
          // The thread ended just now. Threads that serve do not.
        }
      }
    }
    return nanoseconds / 1000;
  }

  /** Resident memory in bytes. */
  memory(): number {
    return this.#processes.reduce((sum, { pid }) => {
      const pages = Number(readFileSync(`/proc/${pid}/statm`, "utf8").split(" ")[1]);
      return sum + pages * 4096;
    }, 0);
  }

  /** Stops the processes; SIGKILL, because how they stop is not measured here. */
  async stop(): Promise<void> {
    for (const child of this.#processes) {
      child.kill("SIGKILL");
      await child.exited;
      children.delete(child);
    }
  }
}

async function startFloor(): Promise<Target> {
  const target = new Target();
  await target.start(["bench.ts", "--floor"], {});
  return target;
}

/** Starts the chat with the store that `--broker` says, on a database of its own unless one is given. */
async function startChat(sync: "normal" | "full", env: Record<string, string> = {}, servers = 1): Promise<Target> {
  const target = new Target();
  const store: Record<string, string> = { CHAT_DB: temporaryPath("chat.sqlite") };
  if (options.broker === "redis") store.REDIS_URL = await startRedis(sync);
  for (let i = 0; i < servers; i++) {
    await target.start(["server.ts"], { PORT: "0", CHAT_RATE: "0", CHAT_SYNC: sync, ...store, ...env });
  }
  return target;
}

/** Starts a Redis on a free port, as durable as `sync` says, and returns its URL. Its CPU time is not counted. */
async function startRedis(sync: "normal" | "full"): Promise<string> {
  const probe = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
  const port = String(probe.port);
  probe.stop(true);
  const dir = mkdtempSync(temporaryPath("redis-"));
  const fsync = sync === "full" ? "always" : "everysec";
  const command = ["redis-server", "--port", port, "--bind", "127.0.0.1", "--dir", dir, "--save", ""];
  const child = Bun.spawn([...command, "--appendonly", "yes", "--appendfsync", fsync], { stdout: "ignore" });
  children.add(child);
  const url = `redis://127.0.0.1:${port}`;
  const client = new Bun.RedisClient(url);
  await until(START_MS, "redis-server did not start", () => client.ping().catch(() => undefined));
  client.close();
  return url;
}

/** Asks again and again until there is an answer. @throws Lost when there is none in time */
async function until<T>(timeout: number, complaint: string, ask: () => T | Promise<T>): Promise<NonNullable<T>> {
  const end = performance.now() + timeout;
  for (;;) {
    const answer = await ask();
    if (answer !== undefined && answer !== null && answer !== false) return answer;
    if (performance.now() > end) throw new Lost(complaint);
    await Bun.sleep(2);
  }
}

// ─── Clients ─────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Everyone in one room. */
class Crowd {
  readonly clients: Client[] = [];
  /** Messages sent in the room since it was made: what each of its clients is to receive. */
  sent = 0;

  /** @throws Lost unless every client got every message, in one order */
  check(): void {
    const [first] = this.clients;
    for (const client of this.clients) {
      if (client.fault !== "") throw new Lost(client.fault);
      if (client.received !== this.sent) throw new Lost(`${this.sent} sent, ${client.received} received`);
      if (client.order !== first?.order) throw new Lost("two clients saw different orders");
    }
  }

  get quiet(): boolean {
    return this.clients.every((client) => client.received >= this.sent || client.fault !== "");
  }
}

/** Latencies of one's own message, milliseconds, since the round began. */
let latencies: number[] = [];
/** Whether senders of a closed loop go on. */
let running = false;
/** When the chunk that is being read arrived. */
let now = 0;

/** Where the first seq stands in a frame with messages, and what comes before the text of a message. */
const FIRST_SEQ = '{"type":"messages","messages":[{"seq":'.length;
const MESSAGE_TYPE = '{"type":"'.length;
const [BRACE, LETTER_M, LETTER_H, LETTER_P, LETTER_A] = [..."{mhpa"].map((letter) => letter.charCodeAt(0));
const TEXT_FRAME = 0x81;
const PING_FRAME = 0x89;
/** Digits at the start of each text: the sender and its count. */
const SENDER_DIGITS = 6;
const COUNT_DIGITS = 8;
let clientSerial = 0;

/** One connection that counts what it gets. */
class Client {
  /** Messages received, and a hash over who sent them in which order. */
  received = 0;
  order = 0;
  /** The newest seq; only `chat.v1` frames have one. */
  seq = 0;
  /** What was wrong, in words. */
  fault = "";
  /** The last hello and the last page, as they came. */
  hello: Buffer | undefined;
  page: Buffer | undefined;
  joined = false;
  /** When each message that is under way was sent. */
  readonly sentAt: number[] = [];
  #count = 0;
  #socket!: Bun.Socket<Client>;
  #rest: Buffer | undefined;
  #upgraded = false;
  readonly #sender = String(++clientSerial).padStart(SENDER_DIGITS, "0");
  readonly #tag = Buffer.from(`"text":"${this.#sender}`);
  readonly #frame: Buffer;
  /** Where the count stands in {@link #frame}: in the text and, in `chat.v1`, in the key. */
  readonly #countsAt: number[];

  constructor(
    readonly crowd: Crowd,
    /** The dialect of its frames. */
    readonly chat: boolean,
    /** Bytes of a text. */
    text: number,
    /** Whether it sends again when its own message arrives. */
    readonly loop: boolean,
    /** Whether it reads every frame in full, as a check on the others, which do not. */
    readonly thorough: boolean,
  ) {
    const start = this.#sender + "0".repeat(COUNT_DIGITS);
    const body = start.padEnd(text, "x");
    const payload = chat ? JSON.stringify({ type: "post", key: `key-${start}`, text: body }) : body;
    this.#frame = maskedFrame(payload);
    const texts = [payload.indexOf(start), payload.lastIndexOf(start)];
    const header = this.#frame.length - payload.length;
    this.#countsAt = [...new Set(texts)].map((at) => header + at + SENDER_DIGITS);
  }

  /** Connects and waits until the room has let it in. */
  async connect(port: number, path: string): Promise<this> {
    this.crowd.clients.push(this);
    const protocol = this.chat ? "Sec-WebSocket-Protocol: chat.v1\r\n" : "";
    // Each of these addresses has its own local ports: together they are enough for every connection of a run.
    const hostname = `127.0.0.${1 + (clientSerial % 8)}`;
    this.#socket = await Bun.connect({ hostname, port, data: this, socket: HANDLERS });
    this.#socket.write(
      `GET ${path} HTTP/1.1\r\nHost: ${hostname}:${port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n${protocol}` +
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    );
    await until(LOST_MS, `${path} was not joined`, () => this.joined || this.fault !== "");
    if (this.fault !== "") throw new Lost(this.fault);
    return this;
  }

  /** Sends the next message. */
  send(): void {
    let count = ++this.#count;
    for (let digit = COUNT_DIGITS - 1; digit >= 0; digit--, count = Math.floor(count / 10)) {
      for (const at of this.#countsAt) this.#frame[at + digit] = 48 + (count % 10);
    }
    this.crowd.sent++;
    this.sentAt.push(performance.now());
    if (this.#socket.write(this.#frame) !== this.#frame.length) this.fault ||= "a message could not be sent";
  }

  /** Asks for the messages before a seq. */
  askPage(before: number): void {
    this.page = undefined;
    this.#socket.write(maskedFrame(JSON.stringify({ type: "page", before })));
  }

  close(): void {
    this.fault ||= "closed";
    this.#socket.terminate();
  }

  /** Bytes arrived: reads the frames that are complete. */
  data(chunk: Buffer): void {
    if (this.#rest) chunk = Buffer.concat([this.#rest, chunk]);
    let at = this.#upgraded ? 0 : this.#readHandshake(chunk);
    for (;;) {
      const short = chunk[at + 1] ?? 128;
      const start = at + (short < 126 ? 2 : short === 126 ? 4 : 10);
      if (short > 127 || start > chunk.length) break;
      const length = short < 126 ? short : short === 126 ? chunk.readUInt16BE(at + 2) : chunk.readUInt32BE(at + 6);
      if (start + length > chunk.length) break;
      this.#read(chunk, chunk[at] as number, start, start + length);
      at = start + length;
    }
    this.#rest = at < chunk.length ? chunk.subarray(at) : undefined;
  }

  /** Reads the answer to the handshake, and returns where the frames begin. */
  #readHandshake(chunk: Buffer): number {
    const end = chunk.indexOf("\r\n\r\n");
    if (end < 0) return 0;
    this.#upgraded = chunk.toString("latin1", 0, 12) === "HTTP/1.1 101";
    if (!this.#upgraded) this.fault ||= chunk.toString("latin1", 0, 40);
    this.joined = this.#upgraded && !this.chat;
    return end + 4;
  }

  /** Reads one frame, whose payload is `chunk[start..end]`. */
  #read(chunk: Buffer, opcode: number, start: number, end: number): void {
    if (opcode === PING_FRAME) return void this.#socket.write(PONG_FRAME);
    if (opcode !== TEXT_FRAME) return void (this.fault ||= `a frame with opcode ${opcode}`);
    if (!this.chat) return this.#readPlain(chunk, start);
    const type = chunk[start + MESSAGE_TYPE];
    if (type === LETTER_M) return this.#readMessages(chunk, start, end);
    if (type === LETTER_H) return this.#readHello(chunk.subarray(start, end));
    if (type === LETTER_P && chunk[start + MESSAGE_TYPE + 1] === LETTER_A) this.page = chunk.subarray(start, end);
    if (type !== LETTER_P) this.fault ||= chunk.toString("utf8", start, end);
  }

  /** A plain text is one message: its sender's and its count's last digits go into the hash. */
  #readPlain(chunk: Buffer, at: number): void {
    const count = at + SENDER_DIGITS + COUNT_DIGITS;
    const who = ((chunk[at + 4] as number) << 8) | (chunk[at + 5] as number);
    const which = ((chunk[count - 2] as number) << 8) | (chunk[count - 1] as number);
    this.order = (Math.imul(this.order, 31) + Math.imul(who, 7919) + which) | 0;
    this.received++;
    if (this.sentAt.length > 0 && chunk.toString("latin1", at, at + SENDER_DIGITS) === this.#sender) this.#own();
  }

  /** A frame of messages: its first and last seq say how many, and whether one is missing. */
  #readMessages(chunk: Buffer, start: number, end: number): void {
    const first = readNumber(chunk, start + FIRST_SEQ);
    let brace = end - 1;
    while (chunk[brace] !== BRACE) brace--; // no text here has one, so it opens the last message
    const last = readNumber(chunk, brace + '{"seq":'.length);
    if (first !== this.seq + 1) this.fault ||= `seq ${first} came after ${this.seq}`;
    if (this.thorough) this.#checkMessages(chunk.toString("utf8", start, end), first, last);
    this.received += last - first + 1;
    this.seq = last;
    if (this.sentAt.length === 0) return;
    for (let at = start; (at = chunk.indexOf(this.#tag, at)) >= 0 && at < end; at++) this.#own();
  }

  #checkMessages(frame: string, first: number, last: number): void {
    const { messages } = JSON.parse(frame) as { messages: { seq: number }[] };
    const dense = messages.every(({ seq }, i) => seq === first + i) && messages.length === last - first + 1;
    if (!dense) this.fault ||= `not dense: ${frame.slice(0, 200)}`;
  }

  #readHello(hello: Buffer): void {
    this.hello = hello;
    this.seq = Number(/"last":(\d+)/.exec(hello.toString("latin1", 0, 200))?.[1]);
    this.joined = true;
  }

  /** Its own message arrived. */
  #own(): void {
    latencies.push(now - (this.sentAt.shift() as number));
    if (this.loop && running) this.send();
  }
}

const HANDLERS: Bun.SocketHandler<Client> = {
  data(socket, chunk) {
    now = performance.now();
    socket.data.data(chunk);
  },
  close(socket) {
    socket.data.fault ||= "the server closed the connection";
  },
  error(socket, error) {
    socket.data.fault ||= error.message;
  },
};

/** A text frame from a client. Its mask is zero: right by the protocol, and no work for the load. */
function maskedFrame(payload: string, opcode = TEXT_FRAME): Buffer {
  const { length } = payload;
  const header = length < 126 ? [opcode, 128 | length] : [opcode, 128 | 126, length >> 8, length & 255];
  return Buffer.concat([Buffer.from([...header, 0, 0, 0, 0]), Buffer.from(payload, "latin1")]);
}

const PONG_FRAME = maskedFrame("", 0x8a);

/** The decimal number that starts at a place in a buffer. */
function readNumber(chunk: Buffer, at: number): number {
  let number = 0;
  for (let digit; (digit = (chunk[at++] as number) - 48) >= 0 && digit <= 9;) number = number * 10 + digit;
  return number;
}

/** Connects clients, a few at a time, spread over the target's processes. */
async function connectAll(count: number, target: Target, make: (i: number) => [Client, path: string]) {
  let next = 0;
  const clients: Client[] = [];
  const connectSome = async () => {
    while (next < count) {
      const i = next++;
      const [client, path] = make(i);
      clients[i] = await client.connect(target.ports[i % target.ports.length] as number, path);
    }
  };
  await Promise.all(Array.from({ length: CONNECTING }, connectSome));
  return clients;
}

/** Fills a room with the people of a load. */
async function gather(target: Target, chat: boolean, load: Load, room: string): Promise<Crowd> {
  const crowd = new Crowd();
  await connectAll(load.clients, target, (i) => {
    const loop = load.inFlight !== undefined && i < load.senders;
    return [new Client(crowd, chat, load.text, loop, i === 0), `/ws/${room}?name=Person${String(i).padStart(5, "0")}`];
  });
  return crowd;
}

// ─── One round ───────────────────────────────────────────────────────────────────────────────────────────────────────

/** What one round of a load gave. */
interface Round {
  /** Server CPU for each message delivered to one client, µs. */
  cpu: number;
  /** Messages delivered to one client, in a second. */
  perSecond: number;
  /** Latency of one's own message, ms. */
  p50: number;
  p99: number;
}

/** Lets senders send, waits until everything has arrived everywhere, and checks that it did. */
async function round(target: Target, crowds: Crowd[], load: Load, senders: Client[]): Promise<Round> {
  latencies = [];
  const sentBefore = crowds.reduce((sum, { sent, clients }) => sum + sent * clients.length, 0);
  const cpuBefore = target.cpu();
  const start = performance.now();
  if (load.rate === undefined) await closedLoop(senders, load.inFlight ?? 1, load.seconds);
  else await openLoop(senders, load.rate, load.seconds);
  await until(LOST_MS, "not everything arrived", () => crowds.every(({ quiet }) => quiet)).catch(() => {}); // check says what
  const seconds = (performance.now() - start) / 1000;
  const cpu = target.cpu() - cpuBefore;
  for (const crowd of crowds) crowd.check();
  const delivered = crowds.reduce((sum, { sent, clients }) => sum + sent * clients.length, 0) - sentBefore;
  latencies.sort((a, b) => a - b);
  const quantile = (q: number) => latencies[Math.floor(latencies.length * q)] ?? NaN;
  return { cpu: cpu / delivered, perSecond: delivered / seconds, p50: quantile(0.5), p99: quantile(0.99) };
}

async function closedLoop(senders: Client[], inFlight: number, seconds: number): Promise<void> {
  running = true;
  for (const sender of senders) for (let i = 0; i < inFlight; i++) sender.send();
  await Bun.sleep(seconds * 1000);
  running = false;
}

async function openLoop(senders: Client[], rate: number, seconds: number): Promise<void> {
  const start = performance.now();
  const total = Math.round(rate * seconds);
  for (let sent = 0; sent < total; await Bun.sleep(1)) {
    const due = Math.min(total, Math.floor(((performance.now() - start) / 1000) * rate) + 1);
    while (sent < due) senders[sent++ % senders.length]?.send();
  }
}

/** Makes a process compile what is hot; the round is thrown away. */
async function warmUp(target: Target, chat: boolean): Promise<void> {
  const crowd = await gather(target, chat, WARM_UP, "warm");
  await round(target, [crowd], WARM_UP, crowd.clients);
  for (const client of crowd.clients) client.close();
}

function median(values: number[]): number {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  if (sorted.length % 2 === 1) return sorted[middle] as number;
  return ((sorted[middle - 1] as number) + (sorted[middle] as number)) / 2;
}

/** Runs measurements in turns, several times, and returns each one's results. */
async function interleave<T>(...measurements: (() => Promise<T>)[]): Promise<T[][]> {
  const results: T[][] = measurements.map(() => []);
  for (let i = 0; i < options.rounds; i++) {
    for (const [j, measure] of measurements.entries()) results[j]?.push(await measure());
  }
  return results;
}

// ─── Scenarios: people who talk ──────────────────────────────────────────────────────────────────────────────────────

/** One of the four loads, in all variants, against the floor of its dialect. */
async function talk(load: Load): Promise<void> {
  const started: { target: Target; crowd: Crowd }[] = [];
  const start = async (target: Target, chat: boolean, load: Load) => {
    await warmUp(target, chat);
    const crowd = await gather(target, chat, load, "talk");
    started.push({ target, crowd });
  };
  await start(await startFloor(), false, load);
  await start(await startFloor(), false, { ...load, text: load.text + FRAME_BYTES });
  const variants = options.broker === "redis" ? REDIS_VARIANTS : SQLITE_VARIANTS;
  for (const { chat, sync, servers } of variants) await start(await startChat(sync, {}, servers), chat, load);
  const results = await interleave(
    ...started.map(({ target, crowd }) => () => {
      return round(target, [crowd], load, crowd.clients.slice(0, load.senders));
    }),
  );
  for (const [i, { chat, sync, servers }] of variants.entries()) {
    const floors = results[chat ? 1 : 0] as Round[];
    const rounds = results[i + 2] as Round[];
    const of = (key: keyof Round, of = rounds) => median(of.map((round) => round[key]));
    const both = (key: "p50" | "p99") => `${key} ${of(key).toFixed(1)} ms (${of(key, floors).toFixed(1)})`;
    const ratio = median(rounds.map(({ cpu }, round) => cpu / (floors[round]?.cpu as number)));
    print({
      what: `${load.title}: ${chat ? "chat.v1" : "plain"}, ${servers ? `${servers} server(s)` : sync}`,
      floor: `${of("cpu", floors).toFixed(2)} µs`,
      chat: `${of("cpu").toFixed(2)} µs`,
      figure: ratio,
      target: servers ? undefined : load.targets[i],
      rest: `${thousands(of("perSecond"))}/s (${thousands(of("perSecond", floors))}), ${both("p50")}, ${both("p99")}`,
    });
  }
}

// ─── Scenarios: the rest ─────────────────────────────────────────────────────────────────────────────────────────────

/** Memory that one more idle `chat.v1` connection takes, each with a name of its own. */
async function memory(): Promise<void> {
  const grow = async () => {
    // No warm-up: what it leaves to the garbage collector would hide what the connections take.
    const target = await startChat("normal");
    const idle = { ...WARM_UP, clients: MANY_CLIENTS / 10 };
    const first = await gather(target, true, idle, "idle");
    await Bun.sleep(SETTLE_MS);
    const before = target.memory();
    const rest = await gather(target, true, { ...idle, clients: MANY_CLIENTS }, "idle");
    await Bun.sleep(SETTLE_MS);
    const bytes = (target.memory() - before) / MANY_CLIENTS;
    await target.stop();
    if (first.clients.length + rest.clients.length !== MANY_CLIENTS * 1.1) throw new Lost("not all could connect");
    return bytes / 1024;
  };
  const [kibs] = await interleave(grow);
  print({
    what: `idle chat.v1 connection, of ${thousands(MANY_CLIENTS)}`,
    unit: "KiB",
    figure: median(kibs ?? []),
    target: 4,
  });
}

/** Server CPU for each join and its hello of 100 messages. */
async function joins(): Promise<void> {
  const target = await startChat("normal", { CHAT_DB: await makeDatabase(JOIN_MESSAGES) });
  await warmUp(target, true);
  const measure = async () => {
    const before = target.cpu();
    const crowd = await joinMany(target, JOINS, "", PAGE_MESSAGES);
    const cpu = (target.cpu() - before) / JOINS;
    for (const client of crowd.clients) client.close();
    await Bun.sleep(200);
    return cpu;
  };
  await measure(); // the warm-up
  const [cpus] = await interleave(measure);
  const what = `join of a room with ${thousands(JOIN_MESSAGES)} messages kept, hello of ${PAGE_MESSAGES}: CPU`;
  print({ what, unit: "µs", figure: median(cpus ?? []), target: 60 });
}

/** Messages in a page and a hello, as the design says. */
const PAGE_MESSAGES = 100;

/** Joins the prefilled room, and checks that every hello has the messages that are due. */
async function joinMany(target: Target, count: number, query: string, messages: number): Promise<Crowd> {
  const crowd = new Crowd();
  const path = (i: number) => `/ws/${FILLED_ROOM}?name=Person${String(i).padStart(5, "0")}${query}`;
  await connectAll(count, target, (i) => [new Client(crowd, true, 128, false, false), path(i)]);
  const first = crowd.clients[0]?.hello as Buffer;
  const hello = JSON.parse(first.toString("utf8")) as { resumed: boolean; last: number; messages: { seq: number }[] };
  const dense = hello.messages.every(({ seq }, i) => seq === hello.last - messages + 1 + i);
  if (!dense || hello.messages.length !== messages) throw new Lost(`hello of ${hello.messages.length} messages`);
  if (hello.resumed !== (query !== "")) throw new Lost("resumed is wrong");
  for (const client of crowd.clients) if (!client.hello?.equals(first)) throw new Lost("hellos differ");
  return crowd;
}

/** Clients that come back after a restart: how long until all have what they missed. */
async function comeBack(): Promise<void> {
  const measure = async () => {
    const database = await makeDatabase(JOIN_MESSAGES);
    const target = await startChat("normal", { CHAT_DB: database });
    const start = performance.now();
    const query = `&epoch=${FILLED_EPOCH}&after=${JOIN_MESSAGES - MISSED_MESSAGES}`;
    const crowd = await joinMany(target, MANY_CLIENTS, query, MISSED_MESSAGES);
    const result = { wall: (performance.now() - start) / 1000, cpu: target.cpu() / 1e6 };
    for (const client of crowd.clients) client.close();
    await target.stop();
    return result;
  };
  const [results = []] = await interleave(measure);
  const cpu = median(results.map(({ cpu }) => cpu));
  const rest = `server CPU since its start; wall ${median(results.map(({ wall }) => wall)).toFixed(1)} s`;
  print({
    what: `${thousands(MANY_CLIENTS)} come back, each missed ${MISSED_MESSAGES}`,
    unit: "s",
    figure: cpu,
    target: 3,
    rest,
  });
}

/** From the start of the process to its first answer. */
async function startUp(): Promise<void> {
  const database = await makeDatabase(options.messages);
  const measure = async () => {
    const start = performance.now();
    const target = await startChat("full", { CHAT_DB: database });
    await (await fetch(`http://127.0.0.1:${target.ports[0]}/`)).text();
    const milliseconds = performance.now() - start;
    await target.stop();
    return milliseconds;
  };
  const [milliseconds] = await interleave(measure);
  const what = `start to first page, ${thousands(options.messages)} messages in the database`;
  print({ what, unit: "ms", figure: median(milliseconds ?? []), target: 150, rest: "wall" });
}

/** What a long history costs: sending, joining and paging, against a short one. */
async function history(): Promise<void> {
  const started: { target: Target; crowd: Crowd; firstPost: number; messages: number }[] = [];
  const load: Load = { ...WARM_UP, clients: 10, senders: 10, rate: HISTORY_RATE, seconds: 2 };
  for (const messages of [PAGE_MESSAGES, options.messages]) {
    const CHAT_DB = await makeDatabase(messages);
    const target = await startChat("normal", { CHAT_DB, CHAT_HISTORY: "10000000" });
    await warmUp(target, true);
    const crowd = await gather(target, true, load, FILLED_ROOM);
    const one: Load = { ...load, rate: undefined, inFlight: 1, seconds: 0 };
    const { p50: firstPost } = await round(target, [crowd], one, crowd.clients.slice(0, 1));
    started.push({ target, crowd, firstPost, messages });
  }
  const measure =
    ({ target, crowd, messages }: (typeof started)[0]) =>
    async () => {
      const page = await pagesCost(target, crowd, messages);
      const join = await joinCost(target);
      const { cpu: send } = await round(target, [crowd], load, crowd.clients);
      return { send, join, page };
    };
  const [short = [], long = []] = await interleave(...started.map(measure));
  const firstPosts = started.map(({ firstPost }) => `${firstPost.toFixed(0)} ms`).join(" and ");
  for (const key of ["send", "join", "page"] as const) {
    print({
      what: `${thousands(options.messages)} messages kept against ${PAGE_MESSAGES}: ${key}`,
      floor: `${median(short.map((result) => result[key])).toFixed(2)} µs`,
      chat: `${median(long.map((result) => result[key])).toFixed(2)} µs`,
      figure: median(long.map((result, i) => result[key] / (short[i]?.[key] as number))),
      target: 1.1,
      rest: key === "send" ? `first post after a start: ${firstPosts}` : "",
    });
  }
}

/** Server CPU for each page, µs. */
async function pagesCost(target: Target, crowd: Crowd, messages: number): Promise<number> {
  const client = crowd.clients[0] as Client;
  const before = target.cpu();
  for (let i = 0; i < PAGES; i++) {
    const seq = PAGE_MESSAGES + 1 + Math.floor((i / PAGES) * (messages - PAGE_MESSAGES));
    client.askPage(seq);
    const page = await until(LOST_MS, "no page", () => client.page);
    if (page.lastIndexOf(`{"seq":${seq - 1},`) < 0) throw new Lost(`the page before ${seq} does not end there`);
  }
  return (target.cpu() - before) / PAGES;
}

/** Server CPU for each of some joins, µs. */
async function joinCost(target: Target): Promise<number> {
  const before = target.cpu();
  const crowd = await joinMany(target, JOINS / 2, "", PAGE_MESSAGES);
  const cpu = target.cpu() - before;
  for (const client of crowd.clients) client.close();
  await Bun.sleep(100);
  return cpu / (JOINS / 2);
}

/** Many rooms of two against one room of two, as many messages in all. */
async function manyRooms(): Promise<void> {
  const limit = Number(/Max open files\s+(\d+)/.exec(readFileSync("/proc/self/limits", "utf8"))?.[1]);
  const count = Math.min(MANY_ROOMS, Math.floor((limit - 200) / 2));
  const load: Load = { ...WARM_UP, rate: ROOMS_RATE, seconds: ROOMS_SECONDS };
  const start = async (rooms: number) => {
    const target = await startChat("normal");
    await warmUp(target, true);
    const crowds = Array.from({ length: rooms }, () => new Crowd());
    await connectAll(rooms * 2, target, (i) => {
      const room = i >> 1;
      return [new Client(crowds[room] as Crowd, true, load.text, false, false), `/ws/room${room}?name=Person${i}`];
    });
    await Bun.sleep(1500); // presence
    const senders = crowds.flatMap(({ clients }) => clients);
    return () => round(target, crowds, load, senders);
  };
  const many = await start(count);
  const one = await start(1);
  const [manyRounds = [], oneRounds = []] = await interleave(many, one);
  print({
    what: `${thousands(count)} rooms of two against one, ${ROOMS_RATE} messages/s in all`,
    floor: `${median(oneRounds.map(({ cpu }) => cpu)).toFixed(2)} µs`,
    chat: `${median(manyRounds.map(({ cpu }) => cpu)).toFixed(2)} µs`,
    figure: median(manyRounds.map(({ cpu }, i) => cpu / (oneRounds[i]?.cpu as number))),
    target: 1.3,
  });
}

// ─── A database with a past ──────────────────────────────────────────────────────────────────────────────────────────

const FILLED_ROOM = "filled";
const FILLED_EPOCH = "0123456789abcdef";

/** Makes a database whose room {@link FILLED_ROOM} has some messages of 128 bytes; returns its path. */
async function makeDatabase(messages: number): Promise<string> {
  const path = temporaryPath("filled.sqlite");
  const target = await startChat("normal", { CHAT_DB: path }); // makes the tables
  await target.stop();
  const db = new Database(path);
  db.run("PRAGMA synchronous = off");
  db.run("INSERT INTO rooms (name, epoch) VALUES (?, ?)", [FILLED_ROOM, FILLED_EPOCH]);
  db.run(
    `WITH RECURSIVE n (seq) AS (SELECT 1 UNION ALL SELECT seq + 1 FROM n WHERE seq < ?)
     INSERT INTO messages (room, seq, at, name, key, text)
     SELECT (SELECT id FROM rooms WHERE name = ?), seq, ? + seq, 'Person' || (seq % 100),
            'k' || lower(hex(randomblob(8))), printf('%0128d', seq) FROM n`,
    [messages, FILLED_ROOM, Date.now() - messages], // the newest just now: old rooms may be forgotten
  );
  db.run("PRAGMA wal_checkpoint(TRUNCATE)");
  db.close();
  if (statSync(path).size < messages * 128) throw new Error("The database was not filled.");
  return path;
}

// ─── The table ───────────────────────────────────────────────────────────────────────────────────────────────────────

/** One row of the table. */
interface Row {
  readonly what: string;
  /** What it is compared with, and what the chat takes. */
  readonly floor?: string;
  readonly chat?: string;
  /** The ratio of the two, or a figure with a unit. */
  readonly figure: number;
  readonly unit?: string;
  /** What the figure is to be at most, if anything. */
  readonly target: number | undefined;
  readonly rest?: string;
}

const WIDTHS = [62, 10, 10, 10, 8, 6] as const;

function printCells(...cells: string[]): void {
  console.log(cells.map((cell, i) => (i === 0 ? cell.padEnd(WIDTHS[0]) : cell.padStart(WIDTHS[i] ?? 0))).join("  "));
}

function print({ what, floor = "", chat = "", figure, unit = "", target, rest = "" }: Row): void {
  const digits = figure < 10 ? 2 : figure < 100 ? 1 : 0;
  const met = target !== undefined && Number(figure.toFixed(digits)) <= target;
  const [aim, verdict] = target === undefined ? ["", ""] : [`${target} ${unit}`.trim(), met ? "met" : "missed"];
  printCells(what, floor, chat, `${figure.toFixed(digits)} ${unit}`.trim(), aim, verdict, rest);
}

function thousands(number: number): string {
  return Math.round(number).toLocaleString("en-US");
}

/** The machine, how the load is run, and the table's head. */
function printHead(): void {
  const [cpu] = cpus();
  console.log(`${cpu?.model ?? "unknown CPU"}, ${cpus().length} cores, Linux ${release()}, Bun ${Bun.version}`);
  const broker = options.broker === "redis" ? "Redis (its own CPU time is not counted)" : "SQLite";
  console.log(
    `${broker}; medians of ${options.rounds} rounds; CHAT_RATE=0; CPU time of the server for each message delivered to` +
      " a client, against a bare Bun.serve that only publishes; at the end of a row: deliveries, latency (and the floor's)\n",
  );
  printCells("", "floor/base", "chat", "ratio", "target", "", "");
}

// ─── Main ────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Every scenario by its name; those that fill a database by hand are for SQLite alone. */
const SCENARIOS: Record<string, { run: () => Promise<void>; sqlite?: true }> = {
  ...Object.fromEntries(Object.entries(LOADS).map(([name, load]) => [name, { run: () => talk(load) }])),
  memory: { run: memory },
  join: { run: joins, sqlite: true },
  return: { run: comeBack, sqlite: true },
  start: { run: startUp, sqlite: true },
  history: { run: history, sqlite: true },
  rooms: { run: manyRooms },
};

const options = readOptions();

/** Reads and checks the command line. */
function readOptions() {
  try {
    const { values } = parseArgs({
      options: {
        floor: { type: "boolean", default: false },
        scenario: { type: "string", default: Object.keys(SCENARIOS).join() },
        broker: { type: "string", default: "sqlite" },
        rounds: { type: "string", default: "3" },
        messages: { type: "string", default: "1000000" },
      },
    });
    const { floor, broker } = values;
    const scenarios = values.scenario.split(",");
    const [rounds, messages] = [Number(values.rounds), Number(values.messages)];
    const right =
      scenarios.every((name) => Object.hasOwn(SCENARIOS, name)) &&
      (broker === "redis" || broker === "sqlite") &&
      [rounds, messages].every((number) => Number.isSafeInteger(number) && number > 0) &&
      messages >= PAGE_MESSAGES;
    if (right) return { floor, scenarios, broker, rounds, messages };
  } catch {
    // An option that is not known, or has no value: told as any other mistake.
  }
  console.error(`--scenario ${Object.keys(SCENARIOS).join()} --broker sqlite|redis --rounds 3 --messages 1000000`);
  process.exit(2);
}

async function main(): Promise<void> {
  if (!existsSync("/proc/self/schedstat")) throw new Error("CPU time is read from /proc: this runs on Linux.");
  printHead();
  for (const name of options.scenarios) {
    const { run, sqlite } = SCENARIOS[name]!;
    if (sqlite && options.broker !== "sqlite") continue;
    try {
      await run();
    } catch (error) {
      if (!(error instanceof Lost)) throw error;
      console.log(`${name}: LOST: ${error.message}`);
      process.exitCode = 1;
    } finally {
      cleanUp();
    }
  }
}

if (options.floor) floor();
else {
  for (const signal of ["SIGINT", "SIGTERM"] as const) {
    process.on(signal, () => {
      cleanUp();
      process.exit(130);
    });
  }
  process.on("exit", cleanUp);
  await main();
  process.exit();
}
