/// <reference types="bun-types" />
/**
 * The benchmark: what a delivered message costs the server, against a bare `Bun.serve` that does nothing but publish.
 *
 *    bun run bench                       every row, some minutes
 *    bun run bench calm idle --rounds 5  the rows of some scenarios, more exactly
 *    bun run bench --broker redis        one, two and four servers on one port, over a Redis that is started here too
 *
 * Wall-clock time says much about the machine and its other users; CPU time says what the server does. So the figure is
 * the CPU time of the server's process (user and system, all threads, as the kernel counts it) for each message that
 * arrived at a client. The same is taken of the floor, in turns, and the median over the rounds of their ratio counts.
 *
 * The load comes from this process. It speaks WebSocket over raw sockets and reads little more than frame headers, so
 * that it has time to spare (with Bun's own client it would reach a third of the deliveries). Every client counts its
 * messages; a run that lost one prints LOST instead of a figure, and the exit code is 1.
 */
import { existsSync, mkdtempSync, readdirSync, readFileSync, rmSync } from "node:fs";
import { cpus, release, tmpdir } from "node:os";
import { join } from "node:path";
import { parseArgs } from "node:util";

// ─── The floor ───────────────────────────────────────────────────────────────────────────────────────────────────────

/**
 * The floor: what arrives is published to everyone, unread. For a `chat.v1` row the clients send it texts that are as
 * long as the chat's frame with one message, so that both deliver as many bytes: it is a server that parses nothing,
 * numbers nothing, stores nothing. It runs in a process of its own.
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

/** People in one room. */
interface Load {
  readonly clients: number;
  readonly senders: number; // the others listen
  readonly inFlight?: number; // closed loop: messages that each sender has under way; the next when its own arrives
  readonly rate?: number; // open loop: messages a second in all, evenly spaced, the senders in turn
  readonly text: number; // bytes of one text
  readonly seconds: number; // of one round
}

/** The loads, and the ratios to the floor that are to be reached: plain `normal`, plain `full`, then `chat.v1` likewise. */
const LOADS: Record<string, Load & { targets: number[] }> = {
  talk: { clients: 32, senders: 32, inFlight: 1, text: 64, seconds: 0.5, targets: [1.15, 1.5, 1.3, 1.5] },
  crowd: { clients: 1000, senders: 10, inFlight: 4, text: 128, seconds: 0.8, targets: [1.0, 1.15, 0.75, 0.75] },
  busy: { clients: 200, senders: 200, rate: 500, text: 128, seconds: 0.8, targets: [0.65, 0.7, 0.55, 0.6] },
  calm: { clients: 200, senders: 200, rate: 20, text: 128, seconds: 1.5, targets: [1.2, 1.3, 1.3, 1.35] },
};

/** What every process does before it is measured, so that its hot code is compiled: many messages among few. */
const WARM_UP: Load = { clients: 16, senders: 16, inFlight: 4, text: 128, seconds: 0.6 };
/** People who only listen. */
const MANY: Load = { clients: 5000, senders: 0, text: 128, seconds: 0 };
const ONE: Load = { ...MANY, clients: 1 };

/** Bytes by which the chat's frame with one message is longer than its text: the JSON, a name and a key as sent here. */
const FRAME_BYTES = 135;
/** Messages kept in a very long room. */
const MANY_MESSAGES = 1_000_000;
const CONNECTING = 64; // connections that are being made at a time
const LOST_MS = 20_000; // after which what has not arrived is lost
const SETTLE_MS = 2500; // after which memory is read: garbage is collected, presence has settled

// ─── Processes ───────────────────────────────────────────────────────────────────────────────────────────────────────

type Env = Record<string, string>;

const children = new Set<Bun.Subprocess>();
const folder = mkdtempSync(join(tmpdir(), "chat-bench-"));
/** Numbers the files, the clients, and the keys of their posts. */
let serial = 0;

/** A path in this run's temporary folder that was never used. */
function newPath(name: string): string {
  return join(folder, `${++serial}-${name}`);
}

function killAll(): void {
  for (const child of [...children].reverse()) child.kill("SIGKILL"); // a server before its Redis, or it complains
}

function run(command: string[], env: Env = {}, stdout?: Bun.BunFile): Bun.Subprocess {
  const all: Env = { PATH: process.env.PATH!, PORT: "0", CHAT_RATE: "0", CHAT_SYNC: "normal", ...env };
  const child = Bun.spawn(command, { cwd: import.meta.dir, env: all, stdout });
  children.add(child);
  return child;
}

/** One or more processes that serve the same chat on one port, or the floor. */
class Target {
  port = 0;
  readonly #processes: Bun.Subprocess[] = [];
  readonly #threads = new Map<string, number>(); // CPU time, also of those that have ended

  /** Starts a process and waits until it has printed its URL. */
  async start(command: string[], env?: Env): Promise<this> {
    const output = newPath("output"); // a file: a pipe would wake this process for every line
    this.#processes.push(run(command, env, Bun.file(output)));
    const port = await until(`${command} did not start`, () => {
      return existsSync(output) && /http:\/\/[^:]+:(\d+)\//.exec(readFileSync(output, "utf8"))?.[1];
    });
    this.port = Number(port);
    return this;
  }

  /** CPU time used so far by all threads, user and system, in microseconds. */
  cpu(): number {
    const tasks = this.#processes.map(({ pid }) => `/proc/${pid}/task`);
    for (const thread of tasks.flatMap((task) => readdirSync(task).map((id) => `${task}/${id}/schedstat`))) {
      this.#threads.set(thread, Number(readFileSync(thread, "utf8").split(" ")[0]) / 1000);
    }
    return [...this.#threads.values()].reduce((sum, each) => sum + each, 0);
  }

  /** Memory of its one process, in bytes: resident, and of it what is no page of a file, as Bun's executable is. */
  memory(): { resident: number; own: number } {
    const [, resident = 0, shared = 0] = readFileSync(`/proc/${this.#processes[0]?.pid}/statm`, "utf8").split(" ");
    return { resident: Number(resident) * 4096, own: (Number(resident) - Number(shared)) * 4096 };
  }

  /** Stops the processes; SIGKILL, because how they stop is not measured here. */
  async stop(): Promise<void> {
    for (const child of this.#processes) {
      child.kill("SIGKILL");
      await child.exited;
    }
  }
}

const startFloor = () => new Target().start(["bun", "-e", `(${floor})()`]);

/** Starts the chat on a store; several servers share one port. */
async function startChat(env: Env, servers = 1): Promise<Target> {
  const target = new Target();
  const shared: Env = servers > 1 ? { PORT: freePort(), REUSE_PORT: "1" } : {};
  for (let i = 0; i < servers; i++) await target.start(["bun", "run", "server.ts"], { ...env, ...shared });
  return target;
}

/** Settings for an empty store of the kind that `--broker` names. The CPU time of a Redis is not counted. */
async function newStore(): Promise<Env> {
  if (options.broker === "sqlite") return { CHAT_DB: newPath("chat.sqlite") };
  const port = freePort();
  const command = ["redis-server", "--port", port, "--bind", "127.0.0.1", "--dir", mkdtempSync(newPath("redis-"))];
  run([...command, "--save", "", "--appendonly", "yes"], {}, Bun.file("/dev/null"));
  const REDIS_URL = `redis://127.0.0.1:${port}`;
  const client = new Bun.RedisClient(REDIS_URL);
  await until("redis-server did not start", () => client.ping().catch(() => false));
  client.close();
  return { REDIS_URL };
}

function freePort(): string {
  const probe = Bun.listen({ hostname: "127.0.0.1", port: 0, socket: { data() {} } });
  probe.stop(true);
  return String(probe.port);
}

/** Asks again and again until there is an answer. @throws when there is none in time */
async function until<T>(complaint: string, ask: () => T | Promise<T>): Promise<T> {
  for (const end = performance.now() + LOST_MS; performance.now() < end; await Bun.sleep(2)) {
    const answer = await ask();
    if (answer) return answer;
  }
  throw new Error(complaint);
}

/** Does something some times, one after the other; returns the CPU time of a server for each, µs. */
async function cpuOf(target: Target, times: number, act: (i: number) => Promise<unknown>): Promise<number> {
  const before = target.cpu();
  for (let i = 0; i < times; i++) await act(i);
  return (target.cpu() - before) / times;
}

// ─── Clients ─────────────────────────────────────────────────────────────────────────────────────────────────────────

let latencies: number[] = []; // of one's own message, milliseconds, since the round began
let running = false; // whether senders of a closed loop go on

const TEXT_FRAME = 0x81;
const PING_FRAME = 0x89;
const PONG_FRAME = 0x8a;
const [BRACE, LETTER_M] = [0x7b, 0x6d];
/** Where the type of a frame stands in it, and the first seq of a frame with messages. */
const TYPE_AT = '{"type":"'.length;
const SEQ_AT = '{"type":"messages","messages":[{"seq":'.length;

/** One connection that counts what it gets. */
class Client {
  received = 0; // messages
  frames = 0; // that they came in; counted in `chat.v1`
  seq = 0; // the newest; only in `chat.v1`
  fault = ""; // what was wrong, in words
  hello: Buffer | undefined; // its first frame
  readonly #sentAt: number[] = []; // when each message that is under way was sent
  #socket!: Bun.Socket<Client>;
  #rest: Buffer | undefined;
  #upgraded = false;
  #reply: PromiseWithResolvers<Buffer> | undefined; // who waits for the next frame
  readonly #tag = `#${padded(++serial, 8)}`; // what its texts begin with; nothing else in a frame has a `#`
  readonly #tagBytes = Buffer.from(this.#tag);

  constructor(
    readonly room: { sent: number }, // messages sent there: what each of its clients is to receive
    readonly chat: boolean, // its dialect: `chat.v1`, or plain
    readonly text: number, // bytes
    readonly loop: boolean, // whether it sends again when its own message arrives
  ) {}

  /** Connects, and waits until the room has let it in. */
  async connect(port: number, path: string, headers = ""): Promise<void> {
    if (this.chat) headers += "Sec-WebSocket-Protocol: chat.v1\r\n";
    this.#socket = await Bun.connect({ hostname: "127.0.0.1", port, data: this, socket: HANDLERS });
    this.hello = await this.ask(
      `GET ${path} HTTP/1.1\r\nHost: localhost:${port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n${headers}` +
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    );
  }

  /** Sends a frame, or the handshake, and waits for the next frame that is not presence. */
  ask(request: string | { type: string; [field: string]: unknown }): Promise<Buffer> {
    this.#reply = Promise.withResolvers();
    const timer = setTimeout(() => this.fail("no answer"), LOST_MS);
    this.#socket.write(typeof request === "string" ? request : maskedFrame(JSON.stringify(request)));
    return this.#reply.promise.finally(() => clearTimeout(timer));
  }

  /** Sends the next message. */
  send(): void {
    this.room.sent++;
    this.#sentAt.push(performance.now());
    const text = this.#tag.padEnd(this.text, "x");
    const frame = maskedFrame(this.chat ? `{"type":"post","key":"${padded(++serial, 18)}","text":"${text}"}` : text);
    if (this.#socket.write(frame) !== frame.length) this.fail("a message could not be sent");
  }

  close(): void {
    this.#socket.terminate();
  }

  fail(why: string): void {
    this.fault ||= why;
    this.#reply?.reject(new Error(why));
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
    if (!this.#upgraded) this.fail(chunk.toString("latin1", 0, 40));
    if (!this.chat) this.#reply?.resolve(chunk);
    return end + 4;
  }

  /** Reads one frame, whose payload is `chunk[start..end]`. */
  #read(chunk: Buffer, opcode: number, start: number, end: number): void {
    if (opcode === PING_FRAME) return void this.#socket.write(maskedFrame("", PONG_FRAME));
    if (opcode !== TEXT_FRAME) return this.fail(`a frame with opcode ${opcode}`);
    if (!this.chat) return this.#readPlain(chunk, start);
    const often = chunk[start + TYPE_AT] === LETTER_M;
    const type = often ? "mes" : chunk.toString("latin1", start + TYPE_AT, start + TYPE_AT + 3);
    if (type === "pre") return;
    if (type === "err") return this.fail(chunk.toString("utf8", start, end));
    if (type === "hel") this.seq = Number(/"last":(\d+)/.exec(chunk.toString("latin1", start, start + 200))?.[1]);
    if (type === "mes") this.#readMessages(chunk, start, end);
    this.#reply?.resolve(chunk.subarray(start, end));
    this.#reply = undefined;
  }

  /** A plain text is one message; it begins with the tag of its sender. */
  #readPlain(chunk: Buffer, start: number): void {
    this.received++;
    if (this.#sentAt.length === 0) return;
    if (chunk.toString("latin1", start, start + this.#tag.length) === this.#tag) this.#own();
  }

  /** A frame of messages: its first and last seq say how many, and whether one is missing. */
  #readMessages(chunk: Buffer, start: number, end: number): void {
    const first = readNumber(chunk, start + SEQ_AT);
    const last = readNumber(chunk, chunk.lastIndexOf(BRACE, end) + '{"seq":'.length); // no text here has a brace
    if (first !== this.seq + 1) this.fail(`seq ${first} came after ${this.seq}`);
    this.received += last - first + 1;
    this.frames++;
    this.seq = last;
    if (this.#sentAt.length === 0) return;
    for (let at = start; (at = chunk.indexOf(this.#tagBytes, at)) >= 0 && at < end; at++) this.#own();
  }

  /** Its own message arrived. */
  #own(): void {
    latencies.push(performance.now() - (this.#sentAt.shift() as number));
    if (this.loop && running) this.send();
  }
}

const HANDLERS: Bun.SocketHandler<Client> = {
  data: (socket, chunk) => socket.data.data(chunk),
  close: (socket) => socket.data.fail("the server closed the connection"),
  error: (socket, error) => socket.data.fail(error.message),
};

/** A text frame from a client. Its mask is zero: right by the protocol, and no work for the load. */
function maskedFrame(payload: string, opcode = TEXT_FRAME): Buffer {
  const { length } = payload;
  const header = length < 126 ? [opcode, 128 | length] : [opcode, 128 | 126, length >> 8, length & 255];
  return Buffer.concat([Buffer.from([...header, 0, 0, 0, 0]), Buffer.from(payload, "latin1")]);
}

/** The decimal number that starts at a place in a buffer. */
function readNumber(chunk: Buffer, at: number): number {
  let number = 0;
  for (let digit; (digit = chunk[at++]! - 48) >= 0 && digit <= 9;) number = number * 10 + digit;
  return number;
}

function padded(number: number, digits: number): string {
  return String(number).padStart(digits, "0");
}

/** Brings the people of a load into a room, or spreads them over rooms of that name; `query` is for those who resume. */
async function gather(target: Target, chat: boolean, load: Load, room: string, query = "", rooms = 1) {
  const clients: Client[] = [];
  const sent = Array.from({ length: rooms }, () => ({ sent: 0 }));
  const connect = (i: number) => {
    const client = new Client(sent[i % rooms]!, chat, load.text, load.inFlight !== undefined && i < load.senders);
    clients.push(client);
    return client.connect(target.port, `/ws/${room}${i % rooms}?name=Person${padded(i, 5)}${query}`);
  };
  for (let i = 0; i < load.clients; i += CONNECTING) {
    const some = Math.min(CONNECTING, load.clients - i);
    await Promise.all(Array.from({ length: some }, (_, j) => connect(i + j)));
  }
  if (!chat) await Bun.sleep(SETTLE_MS / 10); // a plain client is not told when the room has let it in
  return clients;
}

/** @throws unless every client got every message */
function check(clients: Client[]): void {
  for (const { fault, received, room } of clients) {
    if (fault !== "") throw new Error(fault);
    if (received !== room.sent) throw new Error(`${room.sent} sent, ${received} received`);
  }
}

// ─── A store with a past ─────────────────────────────────────────────────────────────────────────────────────────────

const FILLED = "filled";

/** Makes a store with messages of 128 bytes in a room, by the server's own import; returns its settings. */
async function fillStore(messages: number): Promise<Env> {
  const store = { ...(await newStore()), CHAT_HISTORY: String(2 * MANY_MESSAGES) };
  const path = newPath("messages.jsonl");
  const lines = Bun.file(path).writer();
  const start = Date.now() - messages; // the newest just now: old rooms may be forgotten
  const room = `${FILLED}0`;
  for (let seq = 1; seq <= messages; seq++) {
    const message = { seq, at: start + seq, name: `Person${padded(seq % 100, 5)}`, key: padded(++serial, 18) };
    lines.write(`${JSON.stringify({ room, ...message, text: padded(seq, 128) })}\n`);
    if (seq % 10_000 === 0) await lines.flush();
  }
  await lines.end();
  const importing = run(["bun", "run", "server.ts", "import", path], store);
  if ((await importing.exited) !== 0) throw new Error("the store was not filled");
  return store;
}

// ─── One round ───────────────────────────────────────────────────────────────────────────────────────────────────────

/** Lets the first of some clients send, waits until everything has arrived everywhere, and checks that it did. */
async function round(target: Target, clients: Client[], load: Load) {
  latencies = [];
  const senders = clients.slice(0, load.senders);
  const { received, frames } = clients[0]!;
  const deliveries = () => clients.reduce((sum, client) => sum + client.received, 0);
  const [before, start] = [deliveries(), performance.now()];
  const cpu = await cpuOf(target, 1, async () => {
    if (load.rate === undefined) await closedLoop(senders, load.inFlight ?? 1, load.seconds);
    else await openLoop(senders, load.rate, load.seconds);
    const arrived = () => clients.every(({ fault, received, room }) => fault !== "" || received >= room.sent);
    await until("", arrived).catch(() => check(clients));
  });
  const seconds = (performance.now() - start) / 1000;
  check(clients);
  const delivered = deliveries() - before;
  latencies.sort((a, b) => a - b);
  const quantile = (q: number) => latencies[Math.floor(latencies.length * q)] ?? NaN;
  return {
    cpu: cpu / delivered, // of the server for each message delivered to one client, µs
    perSecond: delivered / seconds,
    p50: quantile(0.5), // latency of one's own message, ms
    p99: quantile(0.99),
    inFrame: (clients[0]!.received - received) / (clients[0]!.frames - frames), // only in `chat.v1`
  };
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
  const clients = await gather(target, chat, WARM_UP, "warm");
  await round(target, clients, WARM_UP);
  for (const client of clients) client.close();
}

type Figures = Record<string, number>;

/** Runs measurements in turns, several times, short ones more often, and returns each one's results. */
async function interleave<T extends Figures>(measurements: (() => Promise<T>)[], times = 1): Promise<T[][]> {
  const results: T[][] = measurements.map(() => []);
  for (let i = 0; i < times * Number(options.rounds); i++) {
    for (const [j, measure] of measurements.entries()) results[j]?.push(await measure());
  }
  return results;
}

/** The median of one figure over the rounds; with a base, of its ratio to the base's in the same round. */
function median<T extends Figures>(rounds: T[], key: keyof T, bases?: T[]): number {
  const values = rounds.map((round, i) => round[key]! / (bases?.[i]?.[key] ?? 1));
  return values.toSorted((a, b) => a - b)[values.length >> 1]!;
}

// ─── Scenarios ───────────────────────────────────────────────────────────────────────────────────────────────────────

/** One of the four loads against the floor: plain and `chat.v1`, with SQLite how durable, with Redis on how many servers. */
async function talk({ targets, ...load }: (typeof LOADS)[string]): Promise<void> {
  const variants = [false, true].flatMap((chat) =>
    options.broker === "sqlite"
      ? ["normal", "full"].map((sync, i) => ({ chat, name: sync, servers: 1, target: targets[chat ? i + 2 : i] }))
      : [1, 2, 4].map((servers) => ({ chat, name: `${servers} server(s)`, servers, target: undefined })),
  );
  const prepare = async (target: Target, chat: boolean, load: Load) => {
    await warmUp(target, chat);
    const clients = await gather(target, chat, load, "talk");
    return () => round(target, clients, load);
  };
  const rounds = [
    await prepare(await startFloor(), false, load),
    await prepare(await startFloor(), false, { ...load, text: load.text + FRAME_BYTES }),
  ];
  for (const { chat, servers, name } of variants) {
    const env = { ...(await newStore()), CHAT_SYNC: name === "full" ? name : "normal" };
    rounds.push(await prepare(await startChat(env, servers), chat, load));
  }
  const [plainFloor = [], chatFloor = [], ...results] = await interleave(rounds);
  const { clients, senders, inFlight } = load;
  const title = `${short(clients)} people, ${inFlight ? `${senders} send, ${inFlight} under way` : `${load.rate} messages/s`}`;
  for (const [i, { chat, name, target }] of variants.entries()) {
    const [base, chats] = [chat ? chatFloor : plainFloor, results[i]!];
    const both = (key: "perSecond" | "p50" | "p99") => `${short(median(chats, key))} (${short(median(base, key))})`;
    const inFrame = chat ? `, ${short(median(chats, "inFrame"))} in a frame` : "";
    const rest = `${both("perSecond")}/s, p50 ${both("p50")} ms, p99 ${both("p99")} ms${inFrame}`;
    print(`${title}: ${chat ? "chat.v1" : "plain"}, ${name}`, "µs", "cpu", chats, { base, ratio: target, rest });
  }
}

/** What idle connections take, the first and those that come later: CPU until they have joined, and memory. */
async function idle(): Promise<void> {
  const grow = (chat: boolean) => async () => {
    const target = await (chat ? startChat(await newStore()) : startFloor());
    // No warm-up: what it leaves to the garbage collector would hide what connections take.
    const join = async (room: string) => {
      await Bun.sleep(SETTLE_MS);
      const before = target.memory();
      const cpu = await cpuOf(target, 1, async () => check(await gather(target, chat, MANY, room)));
      await Bun.sleep(SETTLE_MS);
      const after = target.memory();
      return [cpu, after.resident - before.resident, after.own - before.own].map((sum) => sum / MANY.clients);
    };
    const [cpu = NaN, resident = NaN, own = NaN] = await join("idle");
    const [, more = NaN] = await join("more");
    await target.stop();
    return { cpu, resident, own, more };
  };
  const [base, chats = []] = await interleave([grow(false), grow(true)]);
  print("an idle chat.v1 connection, 5,000 in a room", "B", "resident", chats, { base, most: 3500 });
  print("of it, without pages of Bun's executable", "B", "own", chats, { base });
  print("each of 5,000 more", "B", "more", chats, { base });
  print("a connect with its join", "µs", "cpu", chats, { base, most: 70 });
}

/** Joins the filled room, afresh or to resume, checks that every hello has 100 messages, and leaves. */
async function joinFilled(target: Target, load: Load, query = "") {
  let clients: Client[] = [];
  const cpu = await cpuOf(target, 1, async () => (clients = await gather(target, true, load, FILLED, query)));
  const hellos = clients.map(({ hello }) => JSON.parse(String(hello)));
  const right = hellos.every(({ messages, resumed }) => messages.length === 100 && resumed === (query !== ""));
  if (!right) throw new Error("a hello is wrong");
  for (const client of clients) client.close();
  await Bun.sleep(SETTLE_MS / 10); // the leaves are no part of what is measured next
  return { cpu: cpu / load.clients, epoch: hellos[0].epoch as string, last: hellos[0].last as number };
}

/** What a long history costs against a short one: a start and what comes after it, then what people do in the room. */
async function history(): Promise<void> {
  const stores = [await fillStore(100), await fillStore(MANY_MESSAGES)];
  const kept = `${short(MANY_MESSAGES)} messages kept against 100`;
  const [fresh = [], old = []] = await interleave(stores.map((store) => () => restart(store)));
  print(`start to first page, wall, ${kept}`, "ms", "start", old, { base: fresh, most: 150 });
  print(`first post, wall: longest wait of others`, "ms", "wait", old, { base: fresh, most: 20 });
  print(`${short(MANY.clients)} come back, each missed 100`, "s", "comeBack", old, { base: fresh, most: 3 });
  const [few = [], many = []] = await interleave(await Promise.all(stores.map(peopleIn)), 5);
  for (const key of ["post", "join", "page", "removal"] as const) {
    print(`${key}, ${kept}`, "µs", key, many, { base: few, ratio: 1.1 });
  }
  print("search through 10,000 messages: 100 pages", "ms", "search", many, { base: few });
}

/** A start until the first page, the first post while another person talks elsewhere, and people who come back. */
async function restart(store: Env) {
  const begin = performance.now();
  const target = await startChat(store);
  await (await fetch(`http://127.0.0.1:${target.port}/`)).text();
  const start = performance.now() - begin;
  const [author] = await gather(target, true, ONE, FILLED);
  const [other] = await gather(target, true, ONE, "elsewhere");
  const post = async (client: Client) => {
    const start = performance.now();
    await client.ask({ type: "post", key: padded(++serial, 18), text: "hi" });
    return performance.now() - start;
  };
  for (let i = 0; i < 300; i++) await post(other!); // the warm-up
  const posted = post(author!);
  let wait = 0;
  for (const end = performance.now() + 1500; performance.now() < end; await Bun.sleep(3)) {
    wait = Math.max(wait, await post(other!));
  }
  await posted;
  const { epoch, last } = await joinFilled(target, ONE);
  const { cpu } = await joinFilled(target, MANY, `&epoch=${epoch}&after=${last - 100}`);
  await target.stop();
  return { start, wait, comeBack: (cpu * MANY.clients) / 1e6 };
}

/** Makes a measurement of the CPU of what people do in the filled room. */
async function peopleIn(store: Env) {
  const load: Load = { clients: 10, senders: 10, rate: 1000, text: 128, seconds: 1 };
  const target = await startChat({ ...store, CHAT_OPERATOR: "operator" }); // may remove any message
  await warmUp(target, true);
  const operator = new Client({ sent: 0 }, true, 0, false);
  await operator.connect(target.port, `/ws/${FILLED}0`, "Authorization: Bearer operator\r\n");
  await operator.ask({ type: "post", key: padded(++serial, 18), text: "the first, which may read all keys" });
  const clients = await gather(target, true, load, FILLED);
  return async () => {
    const { seq } = operator;
    const before = (i: number) => seq - Math.floor(((seq - 100) * i) / 100);
    const page = await cpuOf(target, 100, (i) => operator.ask({ type: "page", before: before(i) }));
    const remove = (i: number) => operator.ask({ type: "remove", key: padded(++serial, 18), seq: seq - i });
    const removal = await cpuOf(target, 100, remove);
    clients[0]!.room.sent += 100; // the removals
    const { cpu: post } = await round(target, clients, load);
    const { cpu: join } = await joinFilled(target, { ...MANY, clients: 500 });
    return { post, join, page, search: page / 10, removal };
  };
}

/** Many rooms of two against one room of two, as many messages in all: so few that none are gathered. */
async function manyRooms(): Promise<void> {
  const prepare = async (rooms: number) => {
    const target = await startChat(await newStore());
    await warmUp(target, true);
    const load: Load = { clients: 2 * rooms, senders: 2 * rooms, rate: 125, text: 128, seconds: 2 };
    const clients = await gather(target, true, load, "room", "", rooms);
    await Bun.sleep(SETTLE_MS);
    return () => round(target, clients, load);
  };
  const [chats = [], base] = await interleave([await prepare(5000), await prepare(1)], 5);
  print("5,000 rooms of two against one, 125 messages/s in all", "µs", "cpu", chats, { base, ratio: 1.3 });
}

/** With Redis: what each message in a busy room costs a server that has members of it, and one that has none. */
async function elsewhere(): Promise<void> {
  const store = await newStore();
  const load: Load = { clients: 10, senders: 10, rate: 1000, text: 128, seconds: 2 };
  const [first, second, third] = [await startChat(store), await startChat(store), await startChat(store)];
  for (const target of [first, second, third]) await warmUp(target, true);
  const clients = await gather(first, true, load, "busy");
  await gather(second, true, load, "busy");
  await gather(third, true, load, "quiet");
  const measure = (target: Target) => async () => ({
    cpu: (await cpuOf(target, 1, () => round(first, clients, load))) / 2000,
  });
  const [base, chats = []] = await interleave([measure(second), measure(third)]);
  print("a message, for a server with nobody in its room against ten", "µs", "cpu", chats, { base, ratio: 0.1 });
}

// ─── The table ───────────────────────────────────────────────────────────────────────────────────────────────────────

/** Prints a row; `most` is what its figure, and `ratio` what the ratio to the base's, is to be at most. */
function print<T extends Figures>(
  what: string,
  unit: string,
  key: keyof T,
  chats: T[],
  { base, most, ratio, rest = "" }: { base?: T[]; most?: number; ratio?: number; rest?: string },
): void {
  const of = (rounds: T[]) => `${short(median(rounds, key))} ${unit}`;
  const quotient = base ? median(chats, key, base) : NaN;
  const target = most ?? ratio;
  const figure = most === undefined ? quotient : median(chats, key);
  const verdict = target === undefined ? "" : Number(figure.toPrecision(3)) <= target ? "met" : "missed";
  printCells(what, base ? of(base) : "", of(chats), base ? short(quotient) : "", `${target ?? ""}`, verdict, rest);
}

function printCells(what: string, ...cells: string[]): void {
  const widths = [10, 10, 7, 7, 6, 0];
  console.log([what.padEnd(66), ...cells.map((cell, i) => cell.padStart(widths[i]!))].join("  "));
}

/** A number with the digits that say something. */
function short(number: number): string {
  return number.toLocaleString("en-US", { maximumSignificantDigits: 3 });
}

// ─── Main ────────────────────────────────────────────────────────────────────────────────────────────────────────────

const SCENARIOS: Record<string, () => Promise<void>> = {
  ...Object.fromEntries(Object.entries(LOADS).map(([name, load]) => [name, () => talk(load)])),
  idle,
  history,
  rooms: manyRooms,
  elsewhere,
};

const { values: options, positionals } = parseArgs({
  allowPositionals: true,
  options: { broker: { type: "string", default: "sqlite" }, rounds: { type: "string", default: "3" } },
});

async function main(): Promise<void> {
  const names = positionals.length > 0 ? positionals : Object.keys(SCENARIOS);
  const known = names.every((name) => Object.hasOwn(SCENARIOS, name)) && /^(redis|sqlite)$/.test(options.broker);
  if (!known || !/^[1-9]\d?$/.test(options.rounds)) {
    console.error(`bun run bench [${Object.keys(SCENARIOS).join("|")}] [--broker sqlite|redis] [--rounds 3]`);
    process.exit(2);
  }
  console.log(
    `${cpus()[0]?.model}, ${cpus().length} cores, Linux ${release()}, Bun ${Bun.version}; ${options.broker}; medians ` +
      `of ${options.rounds} rounds; server CPU for each message delivered to a client, unless said otherwise\n`,
  );
  printCells("", "floor/base", "chat", "ratio", "target", "", "deliveries/s, latency (and the floor's)");
  for (const name of names) {
    if (name === "elsewhere" && options.broker === "sqlite") continue;
    await SCENARIOS[name]!().catch((error) => {
      console.log(`${name}: LOST:`, error);
      process.exitCode = 1;
    });
    killAll();
  }
}

process.on("exit", () => {
  killAll();
  rmSync(folder, { recursive: true });
});
for (const signal of ["SIGINT", "SIGTERM"]) process.on(signal, () => process.exit(130));
await main();
process.exit();
