/// <reference types="bun-types" />
/**
 * A chat server in one file, to be read from top to bottom. A message passes through it in the order of the file:
 *
 *    socket ── text frame ──▶ receive     parses the frame and checks its size
 *                                │
 *                                ▼
 *                              pace       the token buckets of the sender and its address: slows, never drops
 *                                │
 *                                ▼
 *                              append     the broker stores the post and gives it the room's next seq
 *                                │        only what is stored goes on
 *                                ▼
 *                              deliver    one frame for each dialect: server.publish(topic) ──▶ every socket of the room
 *
 * Three rules hold it together, and a comment marks each place where one applies:
 *   RULE 1  Never await between the commit (Redis: the notification) and publish: the order stored is the order seen.
 *   RULE 2  Never await between the last replayed message and `ws.subscribe`: nobody joins into a gap.
 *   RULE 3  In doubt, lose the room: close its sockets with 1013 and forget it. Clients resume exactly, so this is the
 *           only recovery; nothing here repairs, bridges or catches up.
 *
 * Two dialects meet in every room. "Plain" sockets exchange bare texts. Sockets with the subprotocol `chat.v1` exchange
 * the JSON objects typed below; they get names, history, presence, and every message with its place in the log.
 */
import { Database, type Statement } from "bun:sqlite";
import { createHmac, scryptSync, timingSafeEqual } from "node:crypto";
import { closeSync, existsSync, openSync, realpathSync } from "node:fs";
import { networkInterfaces } from "node:os";
import { setTimeout as sleep } from "node:timers/promises";
// As text, so that `bun build --compile` takes it into the executable.
import pageSource from "./index.html" with { type: "text" };
import { version } from "./package.json";

// ─── Limits ──────────────────────────────────────────────────────────────────────────────────────────────────────────

const MAX_TEXT = 16 * 1024; // bytes of UTF-8 in the text of one message
const MAX_FRAME = 64 * 1024; // bytes of a WebSocket frame from a client; a longer one closes the connection with 1009
const MAX_NAME = 32; // characters (Unicode code points) of a person's name
const MAX_ROOM = 64; // characters of a room's name
const MAX_STRIKES = 10; // frames outside the protocol, before a connection is closed with 1008
const PAGE_MESSAGES = 100; // in a page of history, and in the hello of a client that starts afresh
const RESUME_MESSAGES = 1000; // that a client may have missed and still resume
const PAGE_BYTES = 256 * 1024; // of text in one page or hello, as JSON escapes it: half of BACKPRESSURE_BYTES
const CACHED_HELLOS = 64; // kept ready in the whole server, the newest: at most some 20 MB
const BEHIND_MS = 100; // for this server to hear of what a client has already seen on another one
const PRESENCE_PEOPLE = 100; // listed in one presence frame; the count is always exact
const PRESENCE_MS = 1000; // between two presence frames of a room
const TYPING_MS = 2000; // between two typing frames of one sender that are passed on
const BURST_SECONDS = 10; // worth of frames that a sender may send at once after a silence
const ADDRESS_CONNECTIONS = 10; // worth of frames that one address may send
const FREE_TRIES = 5; // wrong passwords that an address may give at once; after that, one a minute
const MAX_BUCKETS = 10_000; // token buckets that are remembered of each kind, the newest
const QUEUE_BYTES = 1024 * 1024; // that wait in one sender's queue before its socket is read no further
const QUEUE_FRAME_BYTES = 64; // that a queued frame takes beside its text, so that many tiny ones are bounded too
const BACKPRESSURE_BYTES = 512 * 1024; // for a reader that does not read: with the frame that passes it, at most 1 MiB
const GATHER_MS = 6; // of gathering posts under load: nobody sees it, and it saves a system call for every socket
const GATHER_POSTS = 32; // that end the gathering at once
const GATHER_CHARACTERS = 64 * 1024; // (UTF-16 units) of text that end it at once
const STEP_MESSAGES = 1000; // trimmed, forgotten or exported at once: few, so that posts get in between
const MAX_BODY = 4096; // bytes of a request's body: a password and no more
const DAY_SECONDS = 24 * 60 * 60;
const SESSION_SECONDS = 30 * DAY_SECONDS; // for which the cookie of a password is good
const IDENTITY_SECONDS = 365 * DAY_SECONDS; // for which a browser keeps the cookie that makes its ids
const DRAIN_MS = 800; // that `stop` waits for the store; with CLOSE_MS it takes less than 3 s
const CLOSE_MS = 2000; // that `stop` waits for clients to answer the Close frame

// ─── The protocol: chat.v1 ───────────────────────────────────────────────────────────────────────────────────────────

/** An entry of a room's log, as it is stored and as every `chat.v1` client sees it. */
export interface Message {
  seq: number; // its place in the room's log: 1, 2, 3 … without a gap
  at: number; // when the server received it: milliseconds since 1970
  name: string; // who sent it, as they called themselves; nothing proves it
  from?: string; // the sender's id in this room; absent when the sender brought no cookie
  text: string;
  removes?: number; // the seq of the message that this entry takes back; the entry itself has no text
  removed?: true; // this message was taken back: its text is gone
  key?: string; // the key that its sender gave it; absent on messages of plain sockets
}

/** Somebody who is in a room. */
export type Person = Pick<Message, "name" | "from">;
export type Role = "guest" | "operator";

/** What the server sends to a `chat.v1` client: one JSON object in each text frame. */
export type ServerFrame =
  | {
      type: "hello"; // always the first frame
      you?: string; // the client's own id, if it has one
      role?: Role; // only where the server has an operator
      epoch: string; // names this log: the seqs of another epoch mean nothing in it
      first: number; // the oldest seq kept, and the newest; an empty log has 1 and 0
      last: number;
      resumed: boolean; // `messages` is exactly what came after the client's `after`; else start afresh from them
      messages: Message[];
      limits: { text: number; name: number };
    }
  | { type: "messages"; messages: Message[] }
  | { type: "page"; messages: Message[] }
  | { type: "ack"; key: string; seq: number }
  | { type: "presence"; count: number; people: Person[] }
  | { type: "typing"; name: string }
  | { type: "pong" }
  | ErrorFrame;

type ErrorFrame = { type: "error"; code: ErrorCode; text: string; key?: string };

/** What a `chat.v1` client sends. A plain socket's frame becomes a `post` without a key. */
export type ClientFrame =
  | { type: "post"; key?: string; text: string }
  | { type: "remove"; key: string; seq: number }
  | { type: "page"; before: number }
  | { type: "name"; name: string }
  | { type: "typing" }
  | { type: "ping" };

/** The fields that each type of client frame must have, and their types. Others are refused. */
const CLIENT_FIELDS: Record<ClientFrame["type"], Record<string, "string" | "number">> = {
  post: { key: "string", text: "string" },
  remove: { key: "string", seq: "number" },
  page: { before: "number" },
  name: { name: "string" },
  typing: {},
  ping: {},
};

/** What can be wrong with a client's frame. Only `bad-frame` counts towards {@link MAX_STRIKES}. */
const ERRORS = {
  "bad-frame": "The frame is not of the protocol chat.v1.",
  "bad-key": "A key is 1 to 64 characters of A-Z, a-z, 0-9, _ and -.",
  "bad-name": `A name has 1 to ${MAX_NAME} characters, and no control characters.`,
  empty: "The text is empty.",
  "too-long": `A text has at most ${MAX_TEXT} bytes.`,
  "not-yours": "Only its author or the operator can take a message back.",
  gone: "This message is not kept any more.",
};
export type ErrorCode = keyof typeof ERRORS;

/** Close codes: RFC 6455 section 7.4.1, the IANA registry (1013), and the private range (4401). */
const CLOSE = { goingDown: 1001, binary: 1003, protocol: 1008, tooBig: 1009, bug: 1011, tryAgain: 1013, login: 4401 };

const KEY = /^[A-Za-z0-9_-]{1,64}$/;
const ID = /^[A-Za-z0-9_-]{12}$/;
const CONTROL = /[\p{Cc}\p{Zl}\p{Zp}]/u;

/** Parses a `chat.v1` frame and checks its shape; what the values mean is checked where they are used. */
function parseFrame(data: string): ClientFrame | ErrorFrame {
  let frame: Record<string, unknown>;
  try {
    frame = JSON.parse(data) ?? {};
  } catch {
    return badFrame("The frame is not JSON.");
  }
  const { type } = frame;
  if (typeof type !== "string" || !Object.hasOwn(CLIENT_FIELDS, type)) {
    return badFrame(`A frame is an object with a type: ${Object.keys(CLIENT_FIELDS).join(", ")}.`);
  }
  const fields = CLIENT_FIELDS[type as ClientFrame["type"]];
  const names = Object.keys(fields);
  const fits = names.every((name) => typeof frame[name] === fields[name]);
  if (fits && Object.keys(frame).length === names.length + 1) return frame as ClientFrame;
  // Lists the fields that it should have, not those that it has, which may be long.
  const list = names.map((name) => `, ${name} (a ${fields[name]})`);
  return badFrame(`"${type}" has the fields type${list.join("")}, and no others.`);
}

function errorFrame(code: ErrorCode, key = "", text = ERRORS[code]): ErrorFrame {
  return { type: "error", code, text, key: KEY.test(key) ? key : undefined };
}

function badFrame(text: string): ErrorFrame {
  return errorFrame("bad-frame", "", text);
}

/** A frame as JSON; fields that are undefined are left out. */
function encode(frame: ServerFrame): string {
  return JSON.stringify(frame);
}

function isSeq(value: unknown): value is number {
  return Number.isSafeInteger(value) && (value as number) >= 1;
}

/** Whether a text is longer than {@link MAX_TEXT} (a UTF-16 unit takes one to three bytes of UTF-8). */
function isTooLong(text: string): boolean {
  return text.length > MAX_TEXT || (text.length * 3 > MAX_TEXT && Buffer.byteLength(text) > MAX_TEXT);
}

/** A name as it is shown, or undefined when it is empty, longer than {@link MAX_NAME} or has control characters. */
function cleanName(name: string): string | undefined {
  const clean = name.normalize("NFC").toWellFormed().trim();
  return clean === "" || [...clean].length > MAX_NAME || CONTROL.test(clean) ? undefined : clean;
}

/**
 * The room that a path names: the decoded rest after `/ws/`, NFC-normalised; `""` is the lobby.
 * Undefined when it cannot be decoded, is longer than {@link MAX_ROOM} or has control characters.
 */
function roomOf(path: string): string | undefined {
  try {
    const room = decodeURIComponent(path).normalize("NFC");
    return [...room].length > MAX_ROOM || CONTROL.test(room) ? undefined : room;
  } catch {
    return undefined;
  }
}

/** A random text: so many bits, in hexadecimal. */
function randomHex(bits: number): string {
  return Buffer.from(crypto.getRandomValues(new Uint8Array(bits / 8))).toString("hex");
}

function sha256(text: string, encoding: "hex" | "base64" | "base64url"): string {
  return new Bun.CryptoHasher("sha256").update(text).digest(encoding);
}

// ─── Configuration ───────────────────────────────────────────────────────────────────────────────────────────────────

const LOG_LEVELS = ["silent", "error", "info", "debug"] as const;
const REDIS = /^(redis|valkey)s?:\/\/./;
const ORIGIN = /^(\*|(https?:\/\/)?[^/?#*@\s]+)$/;

/** Each setting's variable, its default, its check (which throws what is allowed) and what it is for, as `--help` says. */
const SETTINGS = {
  port: ["PORT", "8080", wholeNumber(0, 65_535), "TCP port; 0: a free one"],
  host: ["HOST", "", (host: string) => host.replace(/^\[(.*)\]$/, "$1"), "address to listen on; empty: all"],
  db: ["CHAT_DB", "chat.sqlite", (path: string) => path.trim() || "chat.sqlite", "the database: a file, or :memory:"],
  sync: ["CHAT_SYNC", "full", word("full", "normal"), "full survives a power cut, normal a crash of the server"],
  redisUrls: ["REDIS_URL", "", listOf(REDIS, "redis:// addresses"), "a Redis to use instead, or several, by commas"],
  prefix: ["CHAT_PREFIX", "chat:", String, "what this chat's keys in Redis begin with"],
  password: ["CHAT_PASSWORD", "", String, "asked of everyone; without it, whoever reaches the port is in"],
  operator: ["CHAT_OPERATOR", "", String, "a second password: whoever gives it may remove any message"],
  origins: [
    "CHAT_ORIGINS",
    "",
    listOf(ORIGIN, "origins, hosts, or *"),
    "whose pages may connect beside the server's own",
  ],
  proxies: ["CHAT_PROXIES", "0", wholeNumber(0, 10), "how many proxies in front are trusted to add X-Forwarded-For"],
  history: ["CHAT_HISTORY", "10000", wholeNumber(1, 10_000_000), "messages kept in each room"],
  idleDays: ["CHAT_IDLE_DAYS", "30", wholeNumber(0, 36_500), "until a room that nobody uses is forgotten; 0: never"],
  rate: ["CHAT_RATE", "20", wholeNumber(0, 1_000_000), "frames a second of each connection; 0: no limit"],
  tlsCert: ["TLS_CERT", "", String, "PEM file of a certificate: serves https and wss"],
  tlsKey: ["TLS_KEY", "", String, "PEM file of its key"],
  reusePort: ["REUSE_PORT", "0", word("0", "1"), "1: several servers on one port (Linux, with Redis)"],
  logLevel: ["LOG_LEVEL", "info", word(...LOG_LEVELS), `${LOG_LEVELS.join(", ")} (each message too)`],
} as const;

/** What a chat is started with, frozen: the settings, and two times that only tests shorten. */
export type Config = { readonly [Name in keyof typeof SETTINGS]: ReturnType<(typeof SETTINGS)[Name][2]> } & {
  readonly silenceSeconds: number; // until a connection is ended; under 60, so that proxies see traffic
  readonly expireMs: number; // from the start to the first look for idle rooms, and between two
};

/** A mistake of the operator, told in one line: a bad value, a port in use, a database that cannot be opened. */
export class StartError extends Error {}

function wholeNumber(min: number, max: number): (value: string) => number {
  return (value) => {
    const number = Number(value);
    if (/^\d{1,9}$/.test(value) && String(number) === value && number >= min && number <= max) return number;
    throw new Error(`must be a whole number from ${min} to ${max}`);
  };
}

function word<T extends string>(...allowed: T[]): (value: string) => T {
  return (value) => {
    if (allowed.includes(value as T)) return value as T;
    throw new Error(`must be one of ${allowed.join(", ")}`);
  };
}

function splitList(list: string): string[] {
  return list.split(",").flatMap((entry) => entry.trim() || []);
}

function listOf(form: RegExp, allowed: string): (list: string) => readonly string[] {
  return (list) => {
    const entries = splitList(list);
    if (entries.every((entry) => form.test(entry))) return entries;
    throw new Error(`must be ${allowed}, separated by commas`);
  };
}

/**
 * Reads the configuration from environment variables; unset and empty ones take their defaults.
 * @throws StartError that names the variable, its value and what is allowed
 */
export function readConfig(env: Record<string, string | undefined>): Config {
  const entries = Object.entries(SETTINGS).map(([name, [variable, fallback, read]]) => {
    const value = env[variable] || fallback;
    try {
      return [name, read(value)];
    } catch (error) {
      throw new StartError(`${variable}=${withoutPassword(value)}: ${(error as Error).message}.`);
    }
  });
  const config: Config = { ...Object.fromEntries(entries), silenceSeconds: 50, expireMs: DAY_SECONDS * 1000 };
  if (config.reusePort === "1" && config.redisUrls.length === 0) {
    throw new StartError("REUSE_PORT=1: needs REDIS_URL, so that all servers on the port are one chat.");
  }
  if (!config.tlsCert !== !config.tlsKey) throw new StartError("TLS_CERT and TLS_KEY: must be set both, or neither.");
  if (config.operator !== "" && config.operator === config.password) {
    throw new StartError("CHAT_OPERATOR: must differ from CHAT_PASSWORD, or everyone is the operator.");
  }
  return Object.freeze(config);
}

/** One URL, or several, without what stands before the last @ of each: a password may have an @. */
function withoutPassword(urls: string): string {
  return urls.replace(/\/\/[^,]*@/g, "//…@");
}

type Logger = (level: "error" | "info" | "debug", line: string) => void;

/** Prints lines up to a level: errors to standard error, the rest to standard output. */
function makeLogger(upTo: Config["logLevel"]): Logger {
  return (level, line) => {
    if (LOG_LEVELS.indexOf(level) > LOG_LEVELS.indexOf(upTo)) return;
    // Names and texts may hold characters that reverse a line, or that a terminal obeys.
    const escape = (character: string) => `\\u{${character.codePointAt(0)?.toString(16)}}`;
    const seen = line.replace(/(?!\n)[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, escape);
    if (level === "error") console.error(seen);
    else console.log(seen);
  };
}

/** Logs an outage when it begins and when it ends, however often it shows in between. */
class Outage {
  #isOver = true;

  constructor(readonly log: Logger) {}

  begins(line: string): void {
    if (this.#isOver) this.log("error", line);
    this.#isOver = false;
  }

  ends(line: string): void {
    if (!this.#isOver) this.log("error", line);
    this.#isOver = true;
  }
}

// ─── Token buckets: one kind for every rate ──────────────────────────────────────────────────────────────────────────

/** A token bucket for each sender, or address: `burst` tokens after a silence, `perSecond` on average. Full ones are forgotten. */
class TokenBuckets<Owner> {
  readonly #buckets = new Map<Owner, { tokens: number; at: number }>();

  constructor(
    readonly perSecond: number,
    readonly burst: number,
  ) {}

  /** Milliseconds until there is a token: 0 when there is one now. */
  wait(owner: Owner): number {
    return Math.max(0, Math.ceil(((1 - this.#tokens(owner)) * 1000) / this.perSecond));
  }

  take(owner: Owner): void {
    const tokens = this.#tokens(owner) - 1;
    const [oldest] = this.#buckets.size < MAX_BUCKETS ? [] : this.#buckets.keys();
    if (oldest !== undefined) this.#buckets.delete(oldest);
    this.#buckets.set(owner, { tokens, at: performance.now() });
  }

  forgetFull(): void {
    for (const owner of this.#buckets.keys()) if (this.#tokens(owner) === this.burst) this.#buckets.delete(owner);
  }

  #tokens(owner: Owner): number {
    const { tokens, at } = this.#buckets.get(owner) ?? { tokens: this.burst, at: 0 };
    return Math.min(this.burst, tokens + ((performance.now() - at) / 1000) * this.perSecond);
  }
}

// ─── Rooms and their members: what is known of them ──────────────────────────────────────────────────────────────────

type Socket = Bun.ServerWebSocket<Member>;

/** What the handshake learns of a client. */
interface Visitor {
  readonly roomName: string;
  readonly address: string; // where it comes from, for the log
  readonly network: string; // whose rate it shares; "": this machine itself, which is free
  readonly isChat: boolean; // it speaks chat.v1; else plain
  readonly from: string | undefined; // its id in this room, if it brought the cookie
  readonly role: Role;
  readonly resume: { readonly epoch: string; readonly after: number } | undefined; // where it left off
}

type MemberState =
  | "joining" // its hello is not out yet: its frames wait in the queue
  | "here" // it gets every message of its room, and its frames are acted on
  | "refused" // it was sent away: what it sends now would overtake what it must send again, and is ignored
  | "gone"; // its socket is closed

/** One connection, as `ws.data`. */
class Member {
  state: MemberState = "joining";
  ws!: Socket; // set, as the room is, when the socket opens
  room!: Room;
  heardAt = performance.now(); // when something last came from it, on the monotonic clock
  queue: { frame: ClientFrame | ErrorFrame; bytes: number }[] = []; // what came too fast, or before the hello
  queueBytes = 0;
  draining: Timer | undefined; // comes back for the queue
  strikes = 0; // frames outside the protocol
  typedAt = -Infinity;

  constructor(
    public name: string,
    readonly visitor: Visitor,
  ) {}
}

/** Who is in a room on one server. */
interface Here {
  readonly ids: string[]; // everybody who has an id, once
  readonly nameless: number; // sockets without an id
  readonly people: Person[]; // those of chat.v1, at most PRESENCE_PEOPLE
}

/** A room while somebody is in it: one object for the rooms and the broker. */
class Room {
  state: "opening" | "open" | "closed" = "opening"; // closed: the last member has left, or the room is lost
  opened!: Promise<void>; // settles when its log is open
  readonly members = new Set<Member>();
  readonly chatTopic: string;
  readonly plainTopic: string;
  // What the brokers set:
  epoch = ""; // names its log
  first = 1; // the oldest seq in the store
  last = 0; // the newest, and that of the last message delivered
  row = 0; // SQLite: its row; 0 until its first message is stored
  keys: Map<string, number> | undefined; // SQLite: the seqs of its messages by key, once they are needed
  waiting: Post[] = []; // Redis: posts to be stored next
  isStoring = false; // Redis: whether others are being stored
  early: StoredNotice[] = []; // Redis: what was heard while the room was opening
  // What the rooms set:
  readonly pendingJoins = new Set<Message[]>(); // what was delivered since a joining member began to read the log
  readonly elsewhere = new Map<string, Here>(); // who is here on other servers
  announced = ""; // who is here on this one, as the others were last told
  presence = ""; // the last presence frame
  presenceAt = -Infinity;
  presenceTimer: Timer | undefined;

  constructor(
    readonly name: string,
    readonly broker: Broker, // the one that keeps its log
  ) {
    this.chatTopic = `chat.v1/${name}`;
    this.plainTopic = `plain/${name}`;
  }

  /** As the server's own log names it. */
  toString(): string {
    return this.name === "" ? "the lobby" : `room "${this.name}"`;
  }
}

// ─── In: receive and pace ────────────────────────────────────────────────────────────────────────────────────────────

const PONG = encode({ type: "pong" });

/** Takes frames from sockets, at each sender's rate, and hands posts to the broker. */
class Inbox {
  isStopping = false; // the server goes down: frames are ignored
  readonly senders: TokenBuckets<Member>;
  readonly addresses: TokenBuckets<string>; // many people may be behind one: it has several connections' worth

  constructor(
    readonly config: Config,
    readonly rooms: Rooms,
  ) {
    const { rate } = config;
    this.senders = new TokenBuckets(rate, rate * BURST_SECONDS);
    this.addresses = new TokenBuckets(rate * ADDRESS_CONNECTIONS, rate * ADDRESS_CONNECTIONS * BURST_SECONDS);
  }

  /** A frame arrived. */
  receive(ws: Socket, data: string | Buffer): void {
    const member = ws.data;
    member.heardAt = performance.now();
    if (ws.readyState !== WebSocket.OPEN) return; // read together with a frame that closed the connection
    if (typeof data !== "string") return ws.close(CLOSE.binary, "Only text frames are understood here.");
    const frame: ClientFrame | ErrorFrame = member.visitor.isChat ? parseFrame(data) : { type: "post", text: data };
    // A ping passes the queue, or a client that is slowed would take its connection for dead. Never before the hello.
    if (frame.type === "ping" && member.state === "here") return void ws.send(PONG);
    this.pace(member, frame, data.length);
  }

  /** Acts on a frame at once while the sender keeps to the rate; else the frame waits its turn in the sender's queue. */
  pace(member: Member, frame: ClientFrame | ErrorFrame, length: number): void {
    const isNext = member.state === "here" && member.queue.length === 0;
    if (isNext && this.#takeTokens(member) === 0) return this.#act(member, frame);
    const bytes = length + QUEUE_FRAME_BYTES;
    member.queue.push({ frame, bytes });
    member.queueBytes += bytes;
    if (member.queueBytes >= QUEUE_BYTES && !member.ws.isPaused) member.ws.pause();
    if (member.state === "here") this.drain(member);
  }

  /** Takes as many frames from a member's queue as the rates allow, and comes back for the rest. */
  drain(member: Member): void {
    if (member.draining) return;
    let wait = 0;
    while (member.queue.length > 0 && (wait = this.#takeTokens(member)) === 0) {
      const { frame, bytes } = member.queue.shift() as Member["queue"][0];
      member.queueBytes -= bytes;
      this.#act(member, frame);
    }
    if (member.state !== "here") return;
    if (member.ws.isPaused && member.queueBytes < QUEUE_BYTES / 2) member.ws.resume();
    if (member.queue.length === 0) return;
    const again = () => {
      member.draining = undefined;
      this.drain(member);
    };
    // No more often than its own tokens come, though many connections may wait for one address.
    member.draining = setTimeout(again, Math.max(wait, 1000 / this.config.rate));
  }

  /** Takes a token of the sender and one of its address, and returns 0; or the milliseconds until there are both. */
  #takeTokens(member: Member): number {
    if (this.config.rate === 0) return 0;
    const { network } = member.visitor;
    const wait = Math.max(this.senders.wait(member), network === "" ? 0 : this.addresses.wait(network));
    if (wait > 0) return wait;
    this.senders.take(member);
    if (network !== "") this.addresses.take(network);
    return 0;
  }

  /** Does what a frame asks. */
  #act(member: Member, frame: ClientFrame | ErrorFrame): void {
    if (this.isStopping || member.state === "refused") return;
    if (frame.type === "post") this.#post(member, frame.text, frame.key);
    else if (frame.type === "remove") this.#remove(member, frame.seq, frame.key);
    else if (frame.type === "page") this.#page(member, frame.before);
    else if (frame.type === "name") this.#rename(member, frame.name);
    else if (frame.type === "typing") this.#typing(member);
    else if (frame.type === "error") this.#complain(member, frame);
    else member.ws.send(PONG);
  }

  #post(member: Member, text: string, key: string | undefined): void {
    const { isChat } = member.visitor;
    if (isTooLong(text) && !isChat) return member.ws.close(CLOSE.tooBig, ERRORS["too-long"]);
    if (isTooLong(text)) return this.#complain(member, errorFrame("too-long", key));
    if (isChat && !KEY.test(key ?? "")) return this.#complain(member, errorFrame("bad-key"));
    if (isChat && text === "") return this.#complain(member, errorFrame("empty", key));
    // A lone surrogate has no UTF-8: it is replaced here, so that what is seen now and what is read later are the same.
    this.#append(member, { text: text.toWellFormed(), key });
  }

  #remove(member: Member, removes: number, key: string): void {
    if (!KEY.test(key)) return this.#complain(member, errorFrame("bad-key"));
    if (!isSeq(removes)) return this.#complain(member, badFrame('"seq" is a whole number from 1.'));
    this.#append(member, { text: "", removes, key });
  }

  #append(sender: Member, post: Pick<Message, "text" | "removes" | "key">): void {
    const { room, name, visitor } = sender;
    room.broker.append({ room, sender, at: Date.now(), name, from: visitor.from, ...post });
  }

  #page(member: Member, before: number): void {
    const { room, ws } = member;
    if (!isSeq(before)) return this.#complain(member, badFrame('"before" is a whole number from 1.'));
    const to = Math.min(before - 1, room.last);
    const from = Math.max(firstKept(room, this.config), to - PAGE_MESSAGES + 1);
    room.broker.read(room, from, to).then(
      (messages) => ws.send(encode({ type: "page", messages })),
      (error: Error) => this.rooms.unreadable(room, error),
    );
  }

  #rename(member: Member, name: string): void {
    const clean = cleanName(name);
    if (clean === undefined) return this.#complain(member, errorFrame("bad-name"));
    member.name = clean;
    this.rooms.presenceChanged(member.room);
  }

  #typing(member: Member): void {
    const { room, name, ws, typedAt } = member;
    if (performance.now() - typedAt < TYPING_MS) return;
    member.typedAt = performance.now();
    ws.publish(room.chatTopic, encode({ type: "typing", name }), false); // to all but the sender
    room.broker.typing(room, name);
  }

  /** Tells a client what was wrong with its frame, and ends the connection that keeps sending something else. */
  #complain(member: Member, frame: ErrorFrame): void {
    member.ws.send(encode(frame));
    if (frame.code !== "bad-frame" || ++member.strikes < MAX_STRIKES) return;
    member.ws.close(CLOSE.protocol, `${MAX_STRIKES} frames were not of the protocol chat.v1.`);
  }
}

/** The oldest seq that counts as kept: what the store has before it is trimmed in time. */
function firstKept(room: Room, { history }: Config): number {
  return Math.max(room.first, room.last - history + 1);
}

// ─── Brokers: append ─────────────────────────────────────────────────────────────────────────────────────────────────

/** A post, or a removal, on its way to the log. */
interface Post extends Omit<Message, "seq" | "removed"> {
  readonly room: Room;
  readonly sender: Member;
}

/** What becomes of a post that is no new message: the seq of the message that it already is; or why it is refused. */
type Answer = number | "gone" | "not-yours";

/** Keeps the logs of rooms. When it cannot tell what became of a post, or what comes next in a log, it loses the room. */
interface Broker {
  /** Begins; resolves when posts can be taken, or when it is clear that they cannot for now. */
  start(): Promise<void>;
  /** Opens a room: sets its epoch, first and last, and its state. @throws when the store cannot be reached */
  open(room: Room): Promise<void>;
  /** Ends what `open` began. */
  close(room: Room): void;
  /** Takes a post to store; then it is delivered to its room, or its sender is answered, or the room is lost. */
  append(post: Post): void;
  /** Messages with `from <= seq <= to`, ascending: the newest {@link PAGE_BYTES} of them. */
  read(room: Room, from: number, to: number): Promise<Message[]>;
  /** Tells the other servers who is in a room here, and that somebody here types. */
  announce(room: Room, here: Here): void;
  typing(room: Room, name: string): void;
  /** Stores and delivers what still waits. */
  drain(): Promise<void>;
  /** Closes the store. */
  stop(): void;
}

/** Gathers what is to be handled together: after {@link GATHER_MS} of quiet an item alone, else all that come in that time. */
class Gatherer<Item> {
  #items: Item[] = [];
  #characters = 0;
  #timer: Timer | undefined;
  #doneAt = -Infinity; // when the last batch was done, on the monotonic clock

  constructor(readonly handle: (items: Item[]) => void) {}

  /** @param characters UTF-16 units of text in the item */
  add(item: Item, characters: number): void {
    this.#items.push(item);
    this.#characters += characters;
    const isEnough = this.#items.length >= GATHER_POSTS || this.#characters >= GATHER_CHARACTERS;
    const isQuiet = this.#items.length === 1 && performance.now() - this.#doneAt >= GATHER_MS;
    if (isEnough || isQuiet) this.flush();
    else this.#timer ??= setTimeout(() => this.flush(), GATHER_MS);
  }

  flush(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    if (this.#items.length === 0) return;
    const items = this.#items;
    this.#items = [];
    this.#characters = 0;
    this.handle(items);
    this.#doneAt = performance.now();
  }
}

/** Of messages that come newest first, as many as fit in {@link PAGE_BYTES}, but one at least: ascending. */
function newestThatFit(newestFirst: Iterable<Message>): Message[] {
  const messages: Message[] = [];
  let bytes = 0;
  for (const message of newestFirst) {
    bytes += Buffer.byteLength(JSON.stringify(message.text)) - 2; // as it is sent: a control character takes six bytes
    if (bytes > PAGE_BYTES && messages.length > 0) break;
    messages.push(message);
  }
  return messages.reverse();
}

// ─── Broker: SQLite, the default ─────────────────────────────────────────────────────────────────────────────────────

const INSERT_ROOM = "INSERT INTO rooms (name, epoch) VALUES (?, ?)";
const INSERT_MESSAGE = `INSERT INTO messages (room, seq, at, name, sender, text, removes, removed, key)
  VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)`;
const COLUMNS = 'seq, at, messages.name, sender AS "from", text, removes, removed, key';
type Row = { [Column in keyof Message]-?: Message[Column] | null };

function messageOf(row: Row): Message {
  const { seq, at, name, from, text, removes, removed, key } = row as Required<Row>;
  const kept = { seq, at, name, from: from ?? undefined, text, removes: removes ?? undefined } as Message;
  return { ...kept, removed: removed ? true : undefined, key: key ?? undefined };
}

/** Keeps the logs in one SQLite file. Posts that wait together are committed in one transaction, then delivered. */
class SqliteBroker implements Broker {
  readonly #db: Database;
  readonly #close: () => void;
  readonly #insert: Statement;
  readonly #select: Statement<Row, [number, number, number]>;
  readonly #storeAll: (posts: Post[]) => (Message | Answer)[]; // or none of them
  readonly #gatherer = new Gatherer<Post>((posts) => this.#commit(posts));
  readonly #outage: Outage;
  #trimming: Timer | undefined;
  #expiring: Timer | undefined;

  /** @throws StartError when the database cannot be opened and written */
  constructor(
    readonly config: Config,
    readonly rooms: Rooms,
    readonly log: Logger,
  ) {
    const { db, close } = openLocked(config);
    this.#db = db;
    this.#close = close;
    this.#insert = db.query(INSERT_MESSAGE);
    this.#select = db.query(`SELECT ${COLUMNS} FROM messages WHERE room = ? AND seq BETWEEN ? AND ? ORDER BY seq DESC`);
    this.#storeAll = db.transaction((posts: Post[]) => posts.map((post) => this.#store(post))).immediate;
    this.#outage = new Outage(log);
  }

  async start(): Promise<void> {
    // Not at once: a backup that is restored after a long time must not be emptied before anyone has looked at it.
    if (this.config.idleDays > 0) this.#expiring = setInterval(() => void this.#forgetIdle(), this.config.expireMs);
  }

  async open(room: Room): Promise<void> {
    this.#gatherer.flush(); // posts of clients who have just left this room: they belong to what is read now
    const found = this.#db
      .query<{ id: number; epoch: string; first: number | null; last: number | null }, [string]>(
        `SELECT id, epoch, (SELECT min(seq) FROM messages WHERE room = id) AS first,
                           (SELECT max(seq) FROM messages WHERE room = id) AS last FROM rooms WHERE name = ?`,
      )
      .get(room.name);
    room.row = found?.id ?? 0; // a visit alone leaves no trace
    room.epoch = found?.epoch ?? randomHex(64);
    room.first = found?.first ?? 1;
    room.last = found?.last ?? 0;
    room.state = "open";
  }

  close(): void {}

  append(post: Post): void {
    this.#gatherer.add(post, post.text.length);
  }

  /** Stores posts in one transaction, then delivers them. */
  #commit(posts: Post[]): void {
    const stored = new Map<Room, Message[]>();
    const answers: [Post, Answer][] = [];
    try {
      // One post to a room that is there is one statement, which SQLite commits by itself, for less.
      const isStatement = posts.length === 1 && posts.every(({ room, removes }) => room.row > 0 && !removes);
      const outcomes = isStatement ? posts.map((post) => this.#store(post)) : this.#storeAll(posts);
      for (const [i, post] of posts.entries()) {
        const outcome = outcomes[i] as Message | Answer;
        if (typeof outcome !== "object") answers.push([post, outcome]);
        else if (!stored.get(post.room)?.push(outcome)) stored.set(post.room, [outcome]);
      }
    } catch (error) {
      this.#outage.begins(`The database cannot be written, posts are refused: ${(error as Error).message}`);
      for (const { room } of posts) this.rooms.lose(room, "The message could not be stored"); // RULE 3
      return;
    }
    this.#outage.ends("The database can be written again.");
    // RULE 1: no await from the commit to here, nor in `deliver`.
    for (const [room, messages] of stored) this.rooms.deliver(room, messages);
    for (const [post, answer] of answers) this.rooms.answer(post, answer);
    for (const room of stored.keys()) this.#trimSoon(room);
  }

  /** Writes a post as the next message of its room. What it changes in the room is right, or the commit fails and loses it. */
  #store({ room, sender, ...post }: Post): Message | Answer {
    const { at, name, from, text, removes, key } = post;
    const known = key && (room.keys ??= this.#loadKeys(room)).get(key);
    if (known && known > room.last - this.config.history) return known;
    const refusal = removes && this.#erase(room, removes, sender);
    if (refusal) return refusal;
    if (room.row === 0) room.row = Number(this.#db.query(INSERT_ROOM).run(room.name, room.epoch).lastInsertRowid);
    const seq = ++room.last;
    this.#insert.run(room.row, seq, at, name, from ?? null, text, removes ?? null, null, key ?? null);
    if (key) room.keys?.set(key, seq);
    return { seq, ...post };
  }

  /** Deletes the text of a message that is taken back, or says why not. */
  #erase(room: Room, seq: number, { visitor: { from, role } }: Member): Answer | undefined {
    const target = this.#select.get(room.row, seq, seq);
    if (!target || target.removes !== null || seq <= room.last - this.config.history) return "gone";
    if (role !== "operator" && !(from && target.from === from)) return "not-yours";
    if (target.removed) return seq;
    this.#db.query("UPDATE messages SET text = '', removed = 1 WHERE room = ? AND seq = ?").run(room.row, seq);
    return undefined;
  }

  /** In memory, because an index on random keys costs ten times the insert. */
  #loadKeys(room: Room): Map<string, number> {
    const keys = "SELECT key, seq FROM messages WHERE room = ? AND key IS NOT NULL ORDER BY seq";
    return new Map(this.#db.query<never, [number]>(keys).values(room.row) as [string, number][]);
  }

  async read(room: Room, from: number, to: number): Promise<Message[]> {
    return newestThatFit(Iterator.from(this.#select.iterate(room.row, from, to)).map(messageOf));
  }

  announce(): void {} // one server is all there is

  typing(): void {}

  async drain(): Promise<void> {
    this.#gatherer.flush();
  }

  stop(): void {
    clearTimeout(this.#trimming);
    clearInterval(this.#expiring);
    this.#close();
  }

  /** Deletes a step of a room's oldest messages when it has so many too many. */
  #trimSoon(room: Room): void {
    if (room.last - room.first + 1 < this.config.history + STEP_MESSAGES) return;
    this.#trimming ??= setTimeout(() => {
      this.#trimming = undefined;
      try {
        const step = "DELETE FROM messages WHERE room = ? AND seq < ? RETURNING key";
        for (const [key] of this.#db.query(step).values(room.row, room.first + STEP_MESSAGES)) {
          room.keys?.delete(key as string);
        }
      } catch (error) {
        return this.log("error", `The history of ${room} cannot be trimmed: ${(error as Error).message}`);
      }
      room.first += STEP_MESSAGES;
      this.#trimSoon(room);
    }, GATHER_MS);
  }

  /** Forgets the rooms that nobody is in and nobody has posted to for {@link Config.idleDays}, one at a time. */
  async #forgetIdle(): Promise<void> {
    const newest = "SELECT at FROM messages WHERE room = id ORDER BY seq DESC LIMIT 1";
    const nextIdle = this.#db.query<{ id: number; name: string }, [number, number]>(
      `SELECT id, name FROM rooms WHERE id > ? AND (${newest}) < ? ORDER BY id LIMIT 1`,
    );
    const since = Date.now() - this.config.idleDays * DAY_SECONDS * 1000;
    try {
      for (let id = 0, room; (room = nextIdle.get(id, since)); await Bun.sleep(GATHER_MS)) {
        id = room.id;
        this.#gatherer.flush(); // a post of a client that has just left would go to a room that is not there
        if (this.rooms.open.has(room.name)) continue;
        this.#db.query("DELETE FROM messages WHERE room = ?").run(id);
        this.#db.query("DELETE FROM rooms WHERE id = ?").run(id);
        this.log("info", `Room "${room.name}" was forgotten: nobody used it any more.`);
      }
    } catch (error) {
      this.log("error", `Idle rooms cannot be forgotten now: ${(error as Error).message}`);
    }
  }
}

/**
 * Opens the database and keeps every other server off it, by a lock that the system frees when the process dies.
 * @throws StartError when it cannot be opened and written
 */
function openLocked({ db: path, sync }: Config): { db: Database; close: () => void } {
  let lock: Database | undefined;
  try {
    if (path !== ":memory:") {
      closeSync(openSync(path, "a")); // it is there from now on: by all its names the lock is the same
      lock = new Database(`${realpathSync(path)}-lock`);
      lock.run("PRAGMA busy_timeout = 500"); // of two that start at the same moment, one gets it
      lock.run("BEGIN EXCLUSIVE"); // and keeps it: it never ends
    }
    const db = openDatabase(path, sync);
    const close = () => {
      db.run("PRAGMA wal_checkpoint(TRUNCATE)"); // so that no text that was taken back is left there
      db.close();
      lock?.close();
    };
    return { db, close };
  } catch (error) {
    lock?.close();
    const isLocked = (error as { code?: string }).code === "SQLITE_BUSY";
    const why = isLocked ? "another process holds it; is a second server running?" : `${(error as Error).message}.`;
    throw new StartError(`CHAT_DB=${path}: the database cannot be opened and written: ${why}`);
  }
}

/** Opens the database for reading and writing, with its tables. @throws when that is not possible */
function openDatabase(path: string, sync: Config["sync"]): Database {
  const db = new Database(path, { create: true, readwrite: true, strict: true });
  db.run("PRAGMA busy_timeout = 500");
  db.run("PRAGMA journal_mode = WAL");
  db.run("PRAGMA wal_autocheckpoint = 4000"); // pages: 16 MB. A page that is written often is then copied once for many
  db.run(`PRAGMA synchronous = ${sync}`);
  db.run("PRAGMA secure_delete = ON"); // what was taken back is overwritten, not only unlinked
  db.run("CREATE TABLE IF NOT EXISTS rooms (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, epoch TEXT NOT NULL)");
  db.run(`CREATE TABLE IF NOT EXISTS messages (
    room INTEGER NOT NULL, seq INTEGER NOT NULL, at INTEGER NOT NULL, name TEXT NOT NULL, key TEXT, text TEXT NOT NULL,
    PRIMARY KEY (room, seq)) WITHOUT ROWID`);
  // These are the tables of version 1. A new file and one of that version are taken over alike.
  const { user_version: version } = db.query("PRAGMA user_version").get() as { user_version: number };
  db.transaction(() => {
    const added = version < 2 ? ["sender TEXT", "removes INTEGER", "removed INTEGER"] : [];
    for (const column of added) db.run(`ALTER TABLE messages ADD COLUMN ${column}`);
    db.run("PRAGMA user_version = 2"); // a write in any case: a read-only file or a full disk is found now
  }).immediate();
  return db;
}

// ─── Broker: Redis, for more than one server ─────────────────────────────────────────────────────────────────────────
//
// Keys, after CHAT_PREFIX:       room:<room>  hash: epoch, and the seq of the newest message
//                                log:<room>   list: the messages as JSON; trimming does not move an index from its end
//                                keys:<room>  hash: key → seq
//                                data         a random name: another data set has another
// Channels, after CHAT_PREFIX:   room:<room>  what was stored; who is in the room on a server; who types
//                                servers      the servers' heartbeats
//
// The log is the truth, the channel only the quick way to hear of it. A server delivers what it hears if that is exactly
// what comes next; anything else is doubt (RULE 3).

const RETRY_MS = 50; // between two tries to reach Redis: the first, and the longest
const MAX_RETRY_MS = 1000;
const HEARTBEAT_MS = 2000; // between two heartbeats of a server
const SILENT_MS = 5000; // without a byte, after which a connection is given up: on each a heartbeat goes or comes
const ALIVE_MS = 9000; // without a heartbeat, after which a server's people are gone
const TRIM_TOGETHER = 100; // messages over CHAT_HISTORY
const OPEN_SECONDS = 3600; // that a room lives at least after it was opened
const KEEP_BEATS = 900; // after which an open room is given OPEN_SECONDS again
const LOG_DIGITS = 16; // of an epoch: they name the log in Redis, those after them the run of Redis

/** What every script on a room begins with. KEYS: room, log, keys. */
const SCRIPT_HEAD = `
local room, log, keys = unpack(KEYS)
local epoch, last = unpack(redis.call('HMGET', room, 'epoch', 'last'))
last = tonumber(last or 0)
local function expire(idle) -- in so many seconds, or never
  for _, name in ipairs(KEYS) do
    if idle > 0 then redis.call('EXPIRE', name, idle) else redis.call('PERSIST', name) end
  end
end
`;

/**
 * Stores posts and publishes them in one step, so that they are heard in the order of the log. ARGV: the epoch that the
 * server knows, history, seconds until an idle room expires (0: never), channel; then of each post its key, the seq that
 * it removes, whose messages its sender may remove ("*": all), and its JSON after `{"seq":…,`. Returns nil when the log is
 * another one; else of each post the seq that it got, minus the seq that it already had, or why it was refused.
 */
const STORE_SCRIPT = `${SCRIPT_HEAD}
if epoch ~= ARGV[1] then return false end
local history = tonumber(ARGV[2])
local function erase(target, whose)
  local index = target - last - 1
  local text = index < 0 and target > last - history and redis.call('LINDEX', log, index)
  local message = text and cjson.decode(text)
  if not message or message.removes then return 'gone' end
  if whose ~= '*' and message.from ~= whose then return 'not-yours' end
  if message.removed then return -target end
  message.text, message.removed = '', true
  redis.call('LSET', log, index, cjson.encode(message))
end
local answers, stored, length = {}, {}, 0
for i = 5, #ARGV, 4 do
  local key, target, whose, rest = unpack(ARGV, i, i + 3)
  local known = key ~= '' and redis.call('HGET', keys, key)
  local answer = known and -known or target ~= '' and erase(tonumber(target), whose)
  if not answer then
    last = last + 1
    answer = last
    stored[#stored + 1] = '{"seq":' .. last .. ',' .. rest
    length = redis.call('RPUSH', log, stored[#stored])
    if key ~= '' then redis.call('HSET', keys, key, last) end
  end
  answers[#answers + 1] = answer
end
if #stored == 0 then return answers end
redis.call('HSET', room, 'last', last)
if length >= history + ${TRIM_TOGETHER} then
  for _, text in ipairs(redis.call('LRANGE', log, 0, -history - 1)) do
    local key = cjson.decode(text).key
    if key then redis.call('HDEL', keys, key) end
  end
  redis.call('LTRIM', log, -history, -1)
end
expire(tonumber(ARGV[3]))
redis.call('PUBLISH', ARGV[4], '{"epoch":"' .. epoch .. '","messages":[' .. table.concat(stored, ',') .. ']}')
return answers`;

/** ARGV: an epoch for a new room. Makes the room, or keeps it for a while. Returns its epoch, its last seq and its length. */
const OPEN_SCRIPT = `${SCRIPT_HEAD}
if not epoch then
  epoch, last = ARGV[1], 0
  redis.call('DEL', log, keys)
  redis.call('HSET', room, 'epoch', epoch, 'last', last)
  redis.call('EXPIRE', room, ${OPEN_SECONDS})
end
for _, name in ipairs(KEYS) do redis.call('EXPIRE', name, ${OPEN_SECONDS}, 'GT') end
return {epoch, last, redis.call('LLEN', log)}`;

/** ARGV: epoch ("": any), from, to. Returns the messages from one seq to the other, or nil when the log is another one. */
const READ_SCRIPT = `${SCRIPT_HEAD}
if ARGV[1] ~= '' and epoch ~= ARGV[1] then return false end
return redis.call('LRANGE', log, math.max(ARGV[2] - last - 1, -redis.call('LLEN', log)), ARGV[3] - last - 1)`;

/** What was stored together in a room; the epoch is that of the log, without the run. */
type StoredNotice = { readonly epoch: string; readonly messages: Message[] };

/** What a server says on a room's channel: who is there, who types, or nothing, to ask who is there on the others. */
type ServerNotice = { readonly server: string; readonly here?: Here; readonly typing?: string };

/** The two connections to a Redis: they are used together, and replaced together when either fails. */
interface Link {
  readonly commands: Bun.RedisClient;
  readonly subscriber: Bun.RedisClient;
  /**
   * Names the run of Redis: its process and its data set. It is part of every epoch, so that a log that has lost
   * something is never taken for the one that a client has seen.
   */
  run: string;
}

/** Keeps the logs of its rooms in one Redis, which any number of servers share. */
class RedisBroker implements Broker {
  /** This server's name among those that share the Redis. */
  readonly #server = randomHex(64);
  /** Undefined while Redis is away. */
  #link: Link | undefined;
  /** When there was last a sign of life of each server, on the monotonic clock. */
  readonly #alive = new Map<string, number>();
  #beats = 0;
  #storing = 0; // rooms whose posts are being stored
  readonly #gatherer = new Gatherer<{ room: Room; notice: StoredNotice }>((heard) => {
    for (const [room, some] of Map.groupBy(heard, ({ room }) => room))
      this.#deliver(
        room,
        some.map(({ notice }) => notice),
      );
  });
  readonly #outage: Outage;
  #isStopped = false;

  constructor(
    readonly url: string,
    readonly config: Config,
    readonly rooms: Rooms,
    log: Logger,
  ) {
    this.#outage = new Outage(log);
  }

  start(): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    void this.#keepLink(resolve);
    return promise;
  }

  async open(room: Room): Promise<void> {
    const { subscriber, run } = this.#linkOrThrow();
    await subscriber.subscribe(this.#channel(room), (text) => this.#onNotice(room, text));
    const [epoch, last, length] = (await this.#run(OPEN_SCRIPT, room, [randomHex(64)])) as [string, number, number];
    if (room.state === "closed") return;
    room.epoch = epoch + run;
    room.first = last - length + 1;
    room.last = last;
    room.state = "open";
    this.#deliver(room, room.early.splice(0));
    this.#tell(room, {});
  }

  close(room: Room): void {
    this.announce(room, { ids: [], nameless: 0, people: [] });
    this.#link?.subscriber.unsubscribe(this.#channel(room)).catch(ignore);
  }

  append(post: Post): void {
    post.room.waiting.push(post);
    if (!post.room.isStoring) void this.#storeWaiting(post.room);
  }

  /** One batch at a time, so that a later post cannot overtake one that may not have been stored. */
  async #storeWaiting(room: Room): Promise<void> {
    room.isStoring = true;
    this.#storing++;
    while (room.waiting.length > 0) {
      let characters = 0;
      const end = room.waiting.findIndex(({ text }) => (characters += text.length) > GATHER_CHARACTERS);
      try {
        await this.#store(room, room.waiting.splice(0, end < 0 ? STEP_MESSAGES : Math.max(1, end)));
        this.#outage.ends("Redis can be used again.");
      } catch (error) {
        this.#outage.begins(`Redis does not take posts: ${(error as Error).message}`);
        room.waiting = []; // their senders send again, from the first post on
        this.rooms.lose(room, "The message could not be stored"); // RULE 3
      }
    }
    room.isStoring = false;
    this.#storing--;
  }

  /** Stores posts in one round trip. They are delivered when they are heard of; those that were not stored are answered. */
  async #store(room: Room, posts: Post[]): Promise<void> {
    const { history, idleDays } = this.config;
    const args = [logEpoch(room), `${history}`, `${idleDays * DAY_SECONDS}`, this.#channel(room)];
    for (const { sender, at, name, from, text, removes, key } of posts) {
      const whose = sender.visitor.role === "operator" ? "*" : (from ?? "");
      const rest = JSON.stringify({ at, name, from, text, removes, key }).slice(1);
      args.push(key ?? "", `${removes ?? ""}`, whose, rest);
    }
    const answers = (await this.#run(STORE_SCRIPT, room, args)) as Answer[] | null;
    if (!answers) throw new Error(`the log of ${room} is another one`);
    for (const [i, answer] of answers.entries()) {
      if (typeof answer === "string") this.rooms.answer(posts[i] as Post, answer);
      else if (answer < 0) this.rooms.answer(posts[i] as Post, -answer);
    }
  }

  /** Something was said on a room's channel. */
  #onNotice(room: Room, text: string): void {
    const notice = JSON.parse(text) as StoredNotice | ServerNotice;
    if ("epoch" in notice) return this.#gatherer.add({ room, notice }, text.length);
    const { server, here, typing } = notice;
    if (server === this.#server) return;
    this.#alive.set(server, performance.now());
    if (typing !== undefined) this.rooms.typing(room, typing);
    else if (here) this.rooms.presentElsewhere(room, server, here);
    else this.rooms.announceAgain(room);
  }

  /** Delivers what was heard of a room, if it is exactly what comes next. */
  #deliver(room: Room, notices: StoredNotice[]): void {
    if (room.state === "opening") return void room.early.push(...notices); // until it is known what comes next
    if (room.state === "closed") return;
    const messages: Message[] = [];
    for (const notice of notices) {
      if (notice.epoch !== logEpoch(room)) return this.rooms.lose(room, "Its log is another one"); // RULE 3
      for (const message of notice.messages) {
        const next = room.last + messages.length + 1;
        if (message.seq > next) return this.rooms.lose(room, `Message ${next} was not heard`); // RULE 3
        if (message.seq === next) messages.push(message); // a lower one was in the log when the room was opened
      }
    }
    if (messages.length === 0) return;
    // RULE 1: no await since `last` was read.
    room.last += messages.length;
    this.rooms.deliver(room, messages);
  }

  async read(room: Room, from: number, to: number): Promise<Message[]> {
    if (to < from) return [];
    const texts = (await this.#run(READ_SCRIPT, room, [logEpoch(room), `${from}`, `${to}`])) as string[] | null;
    if (!texts) throw new Error("it is another one");
    return newestThatFit(texts.reverse().map((text) => JSON.parse(text) as Message));
  }

  announce(room: Room, here: Here): void {
    this.#tell(room, { here });
  }

  typing(room: Room, typing: string): void {
    this.#tell(room, { typing });
  }

  async drain(): Promise<void> {
    for (const until = performance.now() + DRAIN_MS; this.#storing > 0 && performance.now() < until;) {
      await Bun.sleep(GATHER_MS);
    }
    await Bun.sleep(GATHER_MS); // what was stored is heard by now
    this.#gatherer.flush();
  }

  stop(): void {
    this.#isStopped = true;
    this.#link?.commands.close();
  }

  // ── The link ──

  /** Keeps the link, for ever: when a connection fails, both are replaced, and every room is lost. */
  async #keepLink(tried: () => void): Promise<void> {
    for (let retry = RETRY_MS; !this.#isStopped; retry = Math.min(MAX_RETRY_MS, retry * 2)) {
      const link: Link = { commands: connectRedis(this.url), subscriber: connectRedis(this.url), run: "" };
      const fault = new AbortController();
      link.commands.onclose = link.subscriber.onclose = (error) => fault.abort(error);
      try {
        await this.#connect(link);
        this.#link = link;
        this.#outage.ends("Redis can be used again.");
        retry = RETRY_MS;
        tried();
        for (;;) await this.#beat(link).then(() => sleep(HEARTBEAT_MS, undefined, fault));
      } catch (error) {
        const { message } = fault.signal.aborted ? fault.signal.reason : error;
        const why = `REDIS_URL=${withoutPassword(this.url)}: cannot be used: ${message}.`;
        if (!this.#isStopped) this.#outage.begins(`${why} Trying again until it can.`);
      }
      this.#link = undefined;
      link.commands.close();
      link.subscriber.close();
      for (const room of this.#rooms()) this.rooms.lose(room, "The store cannot be reached"); // RULE 3
      tried();
      if (!this.#isStopped) await Bun.sleep(retry);
    }
  }

  /** Connects, and learns the run before anything else is done. */
  async #connect(link: Link): Promise<void> {
    const { commands, subscriber } = link;
    const { prefix } = this.config;
    await Promise.all([commands.connect(), subscriber.connect()]);
    await commands.send("SET", [`${prefix}data`, randomHex(64), "NX"]);
    link.run = await this.#readRun(link);
    await subscriber.subscribe(`${prefix}servers`, (server) => void this.#alive.set(server, performance.now()));
  }

  /** Names the Redis process and its data set as they are now. */
  async #readRun({ commands }: Link): Promise<string> {
    const asked = [commands.send("INFO", ["server"]), commands.send("GET", [`${this.config.prefix}data`])];
    const [info, data] = (await Promise.all(asked)) as [string, string | null];
    return sha256(`${/run_id:(\w+)/.exec(info)?.[1]} ${data}`, "hex").slice(0, 12);
  }

  /** Says that this server lives, and finds out who else does, and whether Redis is still the same. */
  async #beat(link: Link): Promise<void> {
    await link.commands.publish(`${this.config.prefix}servers`, this.#server);
    if ((await this.#readRun(link)) !== link.run) throw new Error("it has lost something, or is another one");
    for (const [server, at] of this.#alive) if (performance.now() - at > ALIVE_MS) this.#forget(server);
    if (++this.#beats % KEEP_BEATS === 0) for (const room of this.#rooms()) this.#keep(room);
  }

  /** Forgets the people of a server that is silent. */
  #forget(server: string): void {
    this.#alive.delete(server);
    for (const room of this.#rooms()) this.rooms.presentElsewhere(room, server, undefined);
  }

  /** Its open rooms. */
  #rooms(): Room[] {
    return [...this.rooms.open.values()].filter((room) => room.broker === this);
  }

  /** Keeps an open room from expiring. */
  #keep({ name }: Room): void {
    for (const key of roomKeys(this.config, name)) {
      this.#link?.commands.send("EXPIRE", [key, `${OPEN_SECONDS}`, "GT"]).catch(ignore);
    }
  }

  /** Says something to the other servers that have a room open. Where it is lost, so is the room. */
  #tell(room: Room, notice: Omit<ServerNotice, "server">): void {
    const text = JSON.stringify({ server: this.#server, ...notice });
    this.#link?.commands.publish(this.#channel(room), text).catch(ignore);
  }

  /** Sent whole: by its hash, it would have to be sent again to a Redis that has forgotten it. */
  async #run(script: string, room: Room, args: string[]): Promise<unknown> {
    const keys = roomKeys(this.config, room.name);
    return this.#linkOrThrow().commands.send("EVAL", [script, "3", ...keys, ...args]);
  }

  #channel({ name }: Room): string {
    return `${this.config.prefix}room:${name}`;
  }

  #linkOrThrow(): Link {
    if (!this.#link) throw new Error("Redis is away");
    return this.#link;
  }
}

/** The part of a room's epoch that its log in Redis has. */
function logEpoch({ epoch }: Room): string {
  return epoch.slice(0, LOG_DIGITS);
}

/** The keys of a room, in the order that {@link SCRIPT_HEAD} takes them in. */
function roomKeys({ prefix }: Config, room: string): string[] {
  return ["room", "log", "keys"].map((kind) => `${prefix}${kind}:${room}`);
}

/** A connection that is never made again by itself: it is replaced. */
function connectRedis(url: string, idleTimeout = SILENT_MS): Bun.RedisClient {
  return new Bun.RedisClient(url, { autoReconnect: false, connectionTimeout: SILENT_MS, idleTimeout });
}

/**
 * Which of several Redis keeps a room: the one whose hash with the room's name is the highest (rendezvous hashing). So the
 * order of the list does not matter, and one more Redis takes only its share of the rooms.
 */
function homeOf(room: string, urls: readonly string[]): number {
  const hashes = urls.map((url) => sha256(`${room}\n${withoutPassword(url)}`, "hex"));
  return hashes.reduce((best, hash, i) => (hash > (hashes[best] as string) ? i : best), 0);
}

/** Rejects when a promise takes too long. */
function inTime<T>(promise: Promise<T>, ms: number): Promise<T> {
  const late = Promise.withResolvers<never>();
  const timer = setTimeout(() => late.reject(new Error(`no answer in ${ms} ms`)), ms);
  return Promise.race([promise, late.promise]).finally(() => clearTimeout(timer));
}

/** For what may fail without harm. */
function ignore(): void {}

// ─── Out: deliver; who comes and goes ────────────────────────────────────────────────────────────────────────────────

/** A hello as JSON, without what is said to one client alone; and the last seq that it covers. */
type Hello = { readonly last: number; readonly json: string };

/** All open rooms of this server: gives what is stored to everyone, lets members in and out, and loses rooms. */
class Rooms {
  server!: Bun.Server<Member>; // this and the next two are made by `startChat`
  inbox!: Inbox;
  brokerOf!: (room: string) => Broker;
  readonly open = new Map<string, Room>(); // the rooms that somebody is in, by name
  readonly #hellos = new Map<Room, Promise<Hello>>(); // the newest of each room, made once for each change
  #toldAt = -Infinity; // when an unreadable log was last told, on the monotonic clock

  constructor(
    readonly config: Config,
    readonly log: Logger,
  ) {}

  /** Sends stored messages to everyone in their room. They come in the order of seq, without a gap. */
  deliver(room: Room, messages: Message[]): void {
    // RULE 1: no await since SQLite has committed them, or Redis has notified of them.
    this.#hellos.delete(room);
    for (const missed of room.pendingJoins) missed.push(...messages);
    if (this.server.subscriberCount(room.chatTopic) > 0) this.#publish(room, { type: "messages", messages });
    if (this.server.subscriberCount(room.plainTopic) > 0) {
      for (const { text, removes } of messages) if (!removes) this.server.publish(room.plainTopic, text, false);
    }
    if (this.config.logLevel !== "debug") return;
    for (const { seq, name, text } of messages) this.log("debug", `${room} #${seq} ${name}: ${JSON.stringify(text)}`);
  }

  #publish(room: Room, frame: ServerFrame): void {
    this.server.publish(room.chatTopic, encode(frame), false);
  }

  /** Tells a sender what became of a post that is no new message: it is in the log already, or is refused. */
  answer({ sender: { ws }, key = "" }: Post, answer: Answer): void {
    const isStored = typeof answer === "number";
    ws.send(encode(isStored ? { type: "ack", key, seq: answer } : errorFrame(answer, key)));
  }

  /** RULE 3: whoever is in the room comes back and resumes. */
  lose(room: Room, why: string): void {
    if (room.state === "closed") return;
    this.log("debug", `${room} is lost. ${why}.`);
    this.#close(room);
    for (const member of room.members) {
      if (member.state !== "gone") member.state = "refused";
      member.ws.close(CLOSE.tryAgain, `${why}: come back.`);
    }
  }

  /** A log cannot be read. */
  unreadable(room: Room, { message }: Error): void {
    if (room.state === "closed") return;
    if (performance.now() - this.#toldAt > 60_000) {
      this.#toldAt = performance.now(); // a line a minute, as clients try again
      this.log("error", `The log of ${room} cannot be read: ${message}`);
    }
    this.lose(room, "The store cannot be reached"); // RULE 3
  }

  #close(room: Room): void {
    room.state = "closed";
    clearTimeout(room.presenceTimer);
    this.#hellos.delete(room);
    this.open.delete(room.name);
    room.broker.close(room);
  }

  // ── Joining and leaving ──

  /** A socket opened: joins its room. */
  enter(ws: Socket): void {
    const member = ws.data;
    if (member.state === "refused") return ws.close(CLOSE.login, "A password is needed.");
    const { roomName } = member.visitor;
    let room = this.open.get(roomName);
    if (!room) {
      room = new Room(roomName, this.brokerOf(roomName));
      this.open.set(roomName, room);
      room.opened = room.broker.open(room);
    }
    member.ws = ws;
    member.room = room;
    room.members.add(member);
    this.#join(member, room).catch((error: Error) => this.unreadable(room, error));
  }

  async #join(member: Member, room: Room): Promise<void> {
    const { ws, visitor } = member;
    await room.opened;
    if (visitor.resume?.epoch === room.epoch && visitor.resume.after > room.last) await Bun.sleep(BEHIND_MS);
    const missed: Message[] = [];
    room.pendingJoins.add(missed);
    const hello = visitor.isChat ? await this.#hello(room, visitor.resume) : undefined;
    room.pendingJoins.delete(missed);
    // RULE 2: no await from here to the end. What was delivered since the hello was read is in `missed`.
    if (member.state === "joining") {
      if (hello) this.#greet(member, hello, missed);
      ws.subscribe(visitor.isChat ? room.chatTopic : room.plainTopic);
      member.state = "here";
      room.presence = ""; // the new member has not seen it, even if it stays the same
      this.presenceChanged(room);
      this.log("info", `${visitor.address} joined ${room} (${visitor.isChat ? member.name : "plain"})`);
    }
    this.inbox.drain(member);
    if (member.state === "gone") this.#release(member);
  }

  #greet({ ws, visitor }: Member, { last, json }: Hello, missed: Message[]): void {
    const role = this.config.operator === "" ? undefined : visitor.role;
    const own = JSON.stringify({ type: "hello", you: visitor.from, role });
    ws.send(`${own.slice(0, -1)},${json.slice(1)}`);
    const messages = missed.filter(({ seq }) => seq > last);
    if (messages.length > 0) ws.send(encode({ type: "messages", messages }));
  }

  /** The hello for a client that comes back, as far as it can resume; else the newest one. */
  async #hello(room: Room, resume: Visitor["resume"]): Promise<Hello> {
    const from = resume?.epoch === room.epoch ? resume.after + 1 : 0;
    const count = room.last - from + 1;
    if (from >= firstKept(room, this.config) && count >= 0 && count <= RESUME_MESSAGES) {
      return this.#makeHello(room, from, true);
    }
    let newest = this.#hellos.get(room);
    if (!newest) {
      newest = this.#makeHello(room, Math.max(firstKept(room, this.config), room.last - PAGE_MESSAGES + 1), false);
      newest.catch(() => this.#hellos.delete(room)); // the next who joins reads again
      const [oldest] = this.#hellos.size < CACHED_HELLOS ? [] : this.#hellos.keys();
      if (oldest) this.#hellos.delete(oldest);
      this.#hellos.set(room, newest);
    }
    return newest;
  }

  async #makeHello(room: Room, from: number, isResume: boolean): Promise<Hello> {
    const { epoch, last } = room;
    const messages = await room.broker.read(room, from, last);
    const resumed = isResume && messages.length === last - from + 1; // or what it missed is too long for one frame
    if (!resumed) messages.splice(0, messages.length - PAGE_MESSAGES);
    const limits = { text: MAX_TEXT, name: MAX_NAME };
    return {
      last,
      json: JSON.stringify({ epoch, first: firstKept(room, this.config), last, resumed, messages, limits }),
    };
  }

  /** A socket closed. What it sent within its rate is stored; the rest of its queue is dropped. */
  leave(ws: Socket, code: number): void {
    const member = ws.data;
    const { room, state } = member;
    if (!room) return; // it never entered
    clearTimeout(member.draining);
    member.state = "gone";
    if (state === "joining") return; // what it has sent is stored when the room is open
    if (state === "here") this.log("info", `${member.visitor.address} left ${room} (${code})`);
    this.#release(member);
  }

  /** Nothing of a member is left to do. The last one closes the room. */
  #release(member: Member): void {
    const { room } = member;
    room.members.delete(member);
    if (room.members.size > 0) this.presenceChanged(room);
    else if (room.state !== "closed") this.#close(room);
  }

  // ── Presence ──

  /** Sends presence at once when the last one is a second past, else when it is. */
  presenceChanged(room: Room): void {
    if (room.state === "closed") return;
    const wait = room.presenceAt + PRESENCE_MS - performance.now();
    room.presenceTimer ??= setTimeout(() => this.#sendPresence(room), Math.max(0, wait));
  }

  /** Who is in a room on another server; undefined: nobody any more. */
  presentElsewhere(room: Room, server: string, here: Here | undefined): void {
    if (here) room.elsewhere.set(server, here);
    else if (!room.elsewhere.delete(server)) return;
    this.presenceChanged(room);
  }

  /** Another server asks who is here. */
  announceAgain(room: Room): void {
    room.announced = "";
    this.presenceChanged(room);
  }

  /** Somebody types on another server. */
  typing(room: Room, name: string): void {
    this.#publish(room, { type: "typing", name });
  }

  #sendPresence(room: Room): void {
    room.presenceTimer = undefined;
    room.presenceAt = performance.now();
    const here = whoIsHere(room);
    const announced = JSON.stringify(here);
    if (announced !== room.announced) room.broker.announce(room, here);
    room.announced = announced;
    const all = [here, ...room.elsewhere.values()];
    const count = new Set(all.flatMap(({ ids }) => ids)).size + all.reduce((sum, { nameless }) => sum + nameless, 0);
    const people = new Map(all.flatMap((each) => each.people).map((person) => [person.from ?? person, person]));
    const presence = { count, people: [...people.values()].slice(0, PRESENCE_PEOPLE) };
    if (JSON.stringify(presence) === room.presence) return;
    room.presence = JSON.stringify(presence);
    this.#publish(room, { type: "presence", ...presence });
  }

  // ── Dead peers, and the end ──

  /** Pings the connections that are silent, and ends those that stay so: Bun's idle timer is put off by what is sent. */
  checkSilence(): void {
    const silenceMs = this.config.silenceSeconds * 1000;
    for (const { ws, heardAt } of this.#members()) {
      const silent = ws.isPaused ? 0 : performance.now() - heardAt; // while paused, its answers are not read
      if (silent >= silenceMs) ws.terminate();
      else if (silent >= silenceMs / 3) ws.ping();
    }
  }

  /** Closes every socket with 1001. What was delivered goes out before the Close frame. */
  closeAll(): void {
    for (const { ws } of this.#members()) ws.close(CLOSE.goingDown, "The server goes down: come back soon.");
  }

  #members(): Member[] {
    return [...this.open.values()].flatMap(({ members }) => [...members]);
  }
}

function whoIsHere({ members }: Room): Here {
  const ids = new Set<string>();
  const people = new Map<string | Member, Person>(); // by id, so that several tabs of a person are one
  let nameless = 0;
  for (const member of members) {
    if (member.state !== "here") continue;
    const { from, isChat } = member.visitor;
    if (from) ids.add(from);
    else nameless++;
    if (isChat && people.size < PRESENCE_PEOPLE) people.set(from ?? member, { name: member.name, from });
  }
  return { ids: [...ids], nameless, people: [...people.values()] };
}

// ─── Access: origin, address, id, password ───────────────────────────────────────────────────────────────────────────

/** Whether a request comes from the server's own page, from an allowed one, or from no page at all. RFC 6455 section 10.2. */
function originAllowed(headers: Headers, allowed: readonly string[]): boolean {
  const origin = headers.get("origin");
  if (origin === null || allowed.includes("*")) return true;
  const url = URL.parse(origin);
  if (!url) return false; // "null": a sandboxed frame or a local file
  const isHost = (host: string | null) => URL.parse(`${url.protocol}//${host}`)?.host === url.host;
  if (isHost(headers.get("host"))) return true;
  return allowed.some((entry) => (entry.includes("://") ? URL.parse(entry)?.origin === url.origin : isHost(entry)));
}

/** The address that a request comes from, seen past as many proxies as are trusted. */
function addressOf(request: Request, server: Bun.Server<Member>, proxies: number): string {
  const socket = server.requestIP(request)?.address.replace(/^::ffff:/, "") ?? ""; // IPv4 that came to an IPv6 socket
  if (proxies === 0) return socket;
  // Each proxy appends the address that it was reached from. Counted from the right, what a client made up is not reached.
  const forwarded = splitList(request.headers.get("x-forwarded-for") ?? "");
  const address = forwarded[Math.max(0, forwarded.length - proxies)] ?? "";
  // Some proxies add the port too: another for each connection.
  return /^(?:\[(.+)\]|([\d.]+))(?::\d+)?$/.exec(address)?.slice(1).find(Boolean) ?? (address || socket);
}

/** The network that an address stands for: of IPv6 the first 64 bits, which one subscriber has for itself; `""`: this machine. */
function networkOf(address: string): string {
  if (address === "::1" || /^127\.[\d.]+$/.test(address)) return "";
  if (!address.includes(":") || address.includes(".")) return address;
  const [before = [], after = []] = address.split("::").map((part) => part.split(":").filter(Boolean));
  const zeros = Array<string>(Math.max(0, 8 - before.length - after.length)).fill("0");
  return [...before, ...zeros, ...after].slice(0, 4).join(":");
}

function cookieOf(request: Request, name: string): string | undefined {
  const cookies = request.headers.get("cookie");
  return (cookies && new Bun.CookieMap(cookies).get(name)) || undefined;
}

/** A `Set-Cookie` for this host, which scripts cannot read; `Secure` if the browser came by TLS, to the server or a proxy. */
function setCookie(
  cookie: string,
  sameSite: "Lax" | "Strict",
  seconds: number,
  request: Request,
  config: Config,
): string {
  const isForwarded = config.proxies > 0 && request.headers.get("x-forwarded-proto") === "https";
  const secure = config.tlsCert !== "" || isForwarded ? "; Secure" : "";
  return `${cookie}; Path=/; Max-Age=${seconds}; HttpOnly; SameSite=${sameSite}${secure}`;
}

/** The cookie of 128 random bits from which a browser has its ids. */
const IDENTITY_COOKIE = "chat-me";

/** The id of a browser in a room: the same for ever, another in every other room, and not to be had without its cookie. */
function idOf(request: Request, room: string): string | undefined {
  const cookie = cookieOf(request, IDENTITY_COOKIE);
  return cookie && sha256(`${cookie}\n${room}`, "base64url").slice(0, 12);
}

/**
 * Asks for a password, where there is one: by a session cookie, which `login` gives, or by `Authorization: Bearer`. The
 * cookie says whose it is and when it ends, and is signed; nothing of it is stored, and another password ends it.
 */
class Access {
  /** Wrong passwords of both kinds, by address. */
  readonly wrong = new TokenBuckets<string>(1 / 60, FREE_TRIES);
  /** Whether there is a password. */
  readonly asks: boolean;
  /** Signs cookies and hashes what is compared. Made slowly, so that a stolen cookie is no quick way to a password. */
  readonly #key: Buffer;
  /** The cookie's name: of each password another, since a browser keeps one jar for all the ports of a host. */
  readonly #cookie: string;

  constructor(readonly config: Config) {
    const { password, operator } = config;
    this.asks = password !== "" || operator !== "";
    this.#key = this.asks ? scryptSync(`${password}\n${operator}`, "chat session", 32) : Buffer.alloc(0);
    this.#cookie = `chat-${this.#sign("name of the cookie").slice(0, 8)}`;
  }

  /** The role in which a request may come in, or the refusal. */
  check(request: Request, server: Bun.Server<Member>): Role | Response {
    if (!this.asks) return "guest";
    const [role, ends, signature] = cookieOf(request, this.#cookie)?.split(".") ?? [];
    const isSigned = this.#isEqual(`${signature}`, this.#sign(`${role}.${ends}`));
    if (isSigned && Number(ends) > Date.now() / 1000) return role as Role;
    const bearer = /^Bearer (.*)$/i.exec(request.headers.get("authorization") ?? "")?.[1];
    if (bearer !== undefined) return this.#try(bearer, request, server);
    return this.config.password === "" ? "guest" : refuse(401, "A password is needed.", BEARER);
  }

  /** Answers the page's password form: 204 with a session cookie, 401, or 429 with the seconds to wait. */
  async login(request: Request, server: Bun.Server<Member>): Promise<Response> {
    const { config } = this;
    if (!originAllowed(request.headers, config.origins)) return refuse(403, "Pages of this origin may not log in.");
    const given = new URLSearchParams(await request.text()).get("password") ?? "";
    // No await from here on: tries that come at the same time are counted one after the other.
    const role = this.#try(given, request, server);
    if (role instanceof Response) return role;
    const session = `${role}.${Math.floor(Date.now() / 1000) + SESSION_SECONDS}`;
    const cookie = `${this.#cookie}=${session}.${this.#sign(session)}`;
    const headers = { "Set-Cookie": setCookie(cookie, "Strict", SESSION_SECONDS, request, config) };
    return new Response(null, { status: 204, headers });
  }

  /** The role of whoever gave a password, or the refusal. An address that guesses must wait. */
  #try(given: string, request: Request, server: Bun.Server<Member>): Role | Response {
    const { password, operator, proxies } = this.config;
    const network = networkOf(addressOf(request, server, proxies));
    const wait = Math.ceil(this.wrong.wait(network) / 1000);
    if (wait > 0) return refuse(429, "Too many wrong passwords: wait.", { "Retry-After": `${wait}` });
    const [isGuest, isOperator] = [password, operator].map((right) => right !== "" && this.#isEqual(given, right));
    if (isOperator) return "operator";
    if (isGuest) return "guest";
    this.wrong.take(network);
    return refuse(401, "The password is wrong.", BEARER);
  }

  /** Compares in constant time. */
  #isEqual(given: string, right: string): boolean {
    return timingSafeEqual(Buffer.from(this.#sign(given)), Buffer.from(this.#sign(right)));
  }

  #sign(text: string): string {
    return createHmac("sha256", this.#key).update(text).digest("hex");
  }
}

const BEARER = { "WWW-Authenticate": "Bearer" };

// ─── Server: the handshake, the page, start and stop ─────────────────────────────────────────────────────────────────

/** A running chat. */
export interface Chat {
  /** The address to open, with the port that was taken; ends with a slash. */
  readonly url: string;
  /** Stops accepting, stores and delivers what was taken, closes sockets with 1001 and the store. Takes at most 3 s. */
  stop(): Promise<void>;
}

/**
 * Starts a chat.
 * @param overrides what differs from the defaults; it is not checked
 * @throws StartError when the store cannot be opened, or the server cannot listen
 */
export async function startChat(overrides: Partial<Config> = {}): Promise<Chat> {
  const config: Config = Object.freeze({ ...readConfig({}), ...overrides });
  const log = makeLogger(config.logLevel);
  const access = new Access(config);
  const rooms = new Rooms(config, log);
  const inbox = (rooms.inbox = new Inbox(config, rooms));
  const brokers = config.redisUrls.map((url): Broker => new RedisBroker(url, config, rooms, log));
  if (brokers.length === 0) brokers.push(new SqliteBroker(config, rooms, log));
  rooms.brokerOf = (room) => brokers[homeOf(room, config.redisUrls)] as Broker;
  await Promise.all(brokers.map((broker) => broker.start()));
  try {
    rooms.server = listen(config, makeHandlers(config, rooms, access, log));
  } catch (error) {
    for (const broker of brokers) broker.stop();
    throw error;
  }
  const { server } = rooms;
  const sweeping = setInterval(() => {
    rooms.checkSilence();
    for (const buckets of [inbox.senders, inbox.addresses, access.wrong]) buckets.forgetFull();
  }, config.silenceSeconds * 100);
  const stop = async () => {
    const closed = server.stop(); // accepts no more; its sockets live on
    inbox.isStopping = true;
    clearInterval(sweeping);
    await Promise.all(brokers.map((broker) => broker.drain()));
    rooms.closeAll();
    await inTime(closed, CLOSE_MS).catch(ignore); // whoever has not answered by then is cut
    for (const broker of brokers) broker.stop();
    void server.stop(true);
  };
  let stopped: Promise<void> | undefined;
  const host = config.host.includes(":") ? `[${config.host}]` : config.host || "localhost";
  const url = `${config.tlsCert === "" ? "http" : "https"}://${host}:${server.port}/`;
  return { url, stop: () => (stopped ??= stop()) };
}

/** What the server does with requests and sockets. */
function makeHandlers(config: Config, rooms: Rooms, access: Access, log: Logger) {
  const page = new Page(pageSource as unknown as string, config); // bun-types takes every .html import for a bundle
  const isHeard = (ws: Socket) => void (ws.data.heardAt = performance.now());
  return {
    fetch: (request: Request, server: Bun.Server<Member>) => {
      const url = URL.parse(request.url);
      if (!url) return refuse(400, "The Host header names no host.");
      if (url.pathname.startsWith("/ws/")) return handshake(request, url, server, config, access);
      if (request.method === "POST" && access.asks) return access.login(request, server);
      return page.answer(request);
    },
    error: (error: Error) => {
      log("error", `A request failed: ${error.stack}`);
      return refuse(500, "Something went wrong here.");
    },
    websocket: {
      data: {} as Member,
      maxPayloadLength: MAX_FRAME,
      backpressureLimit: BACKPRESSURE_BYTES,
      closeOnBackpressureLimit: true,
      sendPings: false, // `checkSilence` sends them
      idleTimeout: 2 * Math.ceil(config.silenceSeconds), // for sockets that are closing, and are in no room any more
      perMessageDeflate: false, // it would cost each message more time than it saves, and each socket its window
      open: (ws: Socket) => rooms.enter(ws),
      message: (ws: Socket, data: string | Buffer) => rooms.inbox.receive(ws, data),
      ping: isHeard,
      pong: isHeard,
      close: (ws: Socket, code: number) => rooms.leave(ws, code),
      error: (error: Error, ws: Socket | undefined) => {
        log("error", `A connection failed: ${error.stack}`);
        ws?.close(CLOSE.bug, "Something went wrong here.");
      },
    },
  };
}

/** Listens on the configured address. @throws StartError when that is not possible, or a TLS file is bad */
function listen(config: Config, handlers: ReturnType<typeof makeHandlers>): Bun.Server<Member> {
  const { port, host, tlsCert, tlsKey } = config;
  const tls = tlsCert === "" ? undefined : { cert: Bun.file(tlsCert), key: Bun.file(tlsKey) };
  const reusePort = config.reusePort === "1"; // stated, as Bun would else share the port when `development` is false
  const options = { ...handlers, port, tls, maxRequestBodySize: MAX_BODY, development: false, reusePort };
  try {
    return Bun.serve({ ...options, hostname: host || "::" }); // all interfaces, IPv4 too
  } catch (error) {
    const { code, message } = error as { code?: string; message: string };
    if (code === "EADDRINUSE")
      throw new StartError(`PORT=${port}: another program listens there; set PORT to another.`);
    if (tls && /ENOENT|EACCES|OSSL/.test(code ?? "")) {
      throw new StartError(`TLS_CERT=${tlsCert} TLS_KEY=${tlsKey}: cannot be used: ${message}`);
    }
    if (host === "") return Bun.serve({ ...options, hostname: "0.0.0.0" }); // a machine without IPv6
    throw new StartError(`HOST=${host} PORT=${port}: cannot listen: ${message}`);
  }
}

/** Lets a WebSocket in, or says why not: a ladder of guards, each with its status and its sentence. */
function handshake(
  request: Request,
  { pathname, searchParams: query }: URL,
  server: Bun.Server<Member>,
  config: Config,
  access: Access,
): Response | undefined {
  const { headers } = request;
  if (headers.get("upgrade")?.toLowerCase() !== "websocket") {
    return refuse(426, "Here a WebSocket is expected.", { Upgrade: "websocket", Connection: "Upgrade" });
  }
  if (headers.get("sec-websocket-version") !== "13") {
    return refuse(426, "The WebSocket version is 13.", { "Sec-WebSocket-Version": "13" }); // RFC 6455 section 4.2.2
  }
  if (!originAllowed(headers, config.origins)) {
    return refuse(403, "Pages of this origin may not connect; CHAT_ORIGINS lists those that may.");
  }
  const roomName = roomOf(pathname.slice("/ws/".length));
  if (roomName === undefined) {
    return refuse(400, `A room's name has at most ${MAX_ROOM} characters, no control characters, and is valid UTF-8.`);
  }
  const offered = headers.get("sec-websocket-protocol");
  const isChat = offered !== null && splitList(offered).includes("chat.v1");
  if (offered !== null && !isChat) return refuse(400, "The subprotocol is chat.v1, or none.");
  const role = access.check(request, server);
  const isRefused = role instanceof Response;
  // A browser tells its page nothing of a refused handshake. So it is let in, and told by the Close frame.
  if (isRefused && !isChat) return role;
  const name = cleanName(query.get("name") ?? "Guest");
  if (name === undefined) return refuse(400, ERRORS["bad-name"]);
  const address = addressOf(request, server, config.proxies);
  const [epoch, after] = [query.get("epoch"), query.get("after") ?? ""];
  const data = new Member(name, {
    roomName,
    address,
    network: networkOf(address),
    isChat,
    from: idOf(request, roomName),
    role: isRefused ? "guest" : role,
    resume: epoch !== null && /^\d{1,15}$/.test(after) ? { epoch, after: Number(after) } : undefined,
  });
  if (isRefused) data.state = "refused";
  // A browser that offers a subprotocol and is answered none closes the connection: the WHATWG WebSockets standard.
  if (server.upgrade(request, { data, headers: isChat ? { "Sec-WebSocket-Protocol": "chat.v1" } : {} }))
    return undefined;
  return refuse(400, "The WebSocket handshake is not complete.");
}

/** A refusal in plain text. */
function refuse(status: number, sentence: string, headers: Record<string, string> = {}): Response {
  const type = { "Content-Type": "text/plain; charset=utf-8" };
  return new Response(`${sentence}\n`, { status, headers: { ...type, ...headers } });
}

/** The page, its headers and its compressed form, all made once. Every path outside `/ws/` answers with it. */
class Page {
  readonly #plain: Uint8Array<ArrayBuffer>;
  readonly #gzip: Uint8Array<ArrayBuffer>;
  readonly #headers: Record<string, string>;

  constructor(
    html: string,
    readonly config: Config,
  ) {
    this.#plain = new TextEncoder().encode(html);
    this.#gzip = Bun.gzipSync(this.#plain, { library: "libdeflate", level: 10 }); // 10 ms, once, for 5 % less each time
    this.#headers = {
      "Content-Type": "text/html; charset=utf-8",
      "Content-Security-Policy": contentSecurityPolicy(html),
      "X-Content-Type-Options": "nosniff",
      "Referrer-Policy": "no-referrer",
      // Asked for each time; the answer is nearly always 304. Private, so that no cache gives two people one identity.
      "Cache-Control": "private, no-cache",
      Vary: "Accept-Encoding",
      ETag: `W/"${sha256(html, "hex").slice(0, 32)}"`, // weak: one for both forms
    };
  }

  answer(request: Request): Response {
    if (request.method !== "GET" && request.method !== "HEAD") {
      return refuse(405, "Only GET and HEAD are supported.", { Allow: "GET, HEAD" });
    }
    const headers = { ...this.#headers };
    if (cookieOf(request, IDENTITY_COOKIE) === undefined) {
      // Lax, because a page that is opened by a link from elsewhere must keep its identity.
      const cookie = `${IDENTITY_COOKIE}=${randomHex(128)}`;
      headers["Set-Cookie"] = setCookie(cookie, "Lax", IDENTITY_SECONDS, request, this.config);
    }
    const known = splitList(request.headers.get("if-none-match") ?? "").map((tag) => tag.replace(/^(?!W\/)/, "W/"));
    if (known.includes(headers.ETag as string)) return new Response(null, { status: 304, headers });
    const gzip = /\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))/i.test(request.headers.get("accept-encoding") ?? "");
    if (gzip) headers["Content-Encoding"] = "gzip";
    return new Response(gzip ? this.#gzip : this.#plain, { headers });
  }
}

/** The policy under which the page runs: its one script and its one style, and nothing from anywhere else. CSP Level 3. */
function contentSecurityPolicy(html: string): string {
  const hash = (tag: string) =>
    `'sha256-${sha256(new RegExp(`<${tag}>([^]*?)</${tag}>`).exec(html)?.[1] ?? "", "base64")}'`;
  return (
    `default-src 'none'; script-src ${hash("script")}; style-src ${hash("style")}; img-src data:; ` +
    "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; " +
    "require-trusted-types-for 'script'; trusted-types 'none'"
  );
}

// ─── Moving: export and import ───────────────────────────────────────────────────────────────────────────────────────

/** A line of an export: a message, and the room it stands in. */
type Line = Message & { room: string };

/** The kept messages of every room, room by room. A server on the same store is not disturbed. @throws StartError */
export async function* exportMessages(config: Config): AsyncGenerator<Line> {
  if (config.redisUrls.length === 0) yield* exportSqlite(config);
  for (const url of config.redisUrls) yield* exportRedis(url, config);
}

function* exportSqlite({ db: path, history }: Config): Generator<Line> {
  if (!existsSync(path)) throw new StartError(`CHAT_DB=${path}: there is no such database.`);
  using db = new Database(path, { readonly: true });
  const rows = db.query<Row & { room: string }, [number]>(
    `SELECT rooms.name AS room, ${COLUMNS} FROM rooms JOIN messages ON room = id
     WHERE seq > (SELECT max(seq) FROM messages WHERE room = id) - ? ORDER BY id, seq`,
  );
  for (const row of rows.iterate(history)) yield { room: row.room, ...messageOf(row) };
}

async function* exportRedis(url: string, config: Config): AsyncGenerator<Line> {
  const redis = connectRedis(url, 0);
  const match = `${config.prefix.replaceAll(/[\\*?[\]]/g, "\\$&")}room:*`;
  const rooms = new Set<string>();
  for (let cursor = ""; cursor !== "0";) {
    const scan = [cursor || "0", "MATCH", match, "COUNT", `${STEP_MESSAGES}`];
    const [next, keys] = (await redis.send("SCAN", scan)) as [string, string[]];
    for (const key of keys) rooms.add(key.slice(`${config.prefix}room:`.length));
    cursor = next;
  }
  for (const room of rooms) {
    const keys = roomKeys(config, room);
    const last = Number(await redis.send("HGET", [keys[0] as string, "last"]));
    for (let from = Math.max(1, last - config.history + 1); from <= last; from += STEP_MESSAGES) {
      const to = Math.min(last, from + STEP_MESSAGES - 1);
      const texts = (await redis.send("EVAL", [READ_SCRIPT, "3", ...keys, "", `${from}`, `${to}`])) as string[];
      for (const text of texts) yield { room, ...(JSON.parse(text) as Message) };
    }
  }
  redis.close();
}

/** Reads an export and checks all of it, so that a broken one changes nothing. @throws StartError with the line's number */
function readExport(text: string): Map<string, Line[]> {
  const rooms = new Map<string, Line[]>();
  for (const [i, json] of text.split("\n").entries()) {
    if (json === "") continue;
    try {
      const line = checkedLine(JSON.parse(json) ?? {});
      const lines = rooms.get(line.room) ?? [];
      const last = lines.at(-1);
      if (last && last.seq + 1 !== line.seq) throw new Error("it does not follow the one before");
      lines.push(line);
      rooms.set(line.room, lines);
    } catch (error) {
      throw new StartError(`Line ${i + 1}: ${(error as Error).message}. Nothing was imported.`);
    }
  }
  return rooms;
}

/** A line of an export, with the fields of one and no others. @throws what is wrong with it */
function checkedLine({
  room = "",
  seq = 0,
  at = NaN,
  name = "",
  from,
  text = "",
  removes,
  removed,
  key,
}: Partial<Line>): Line {
  const isText = (value: unknown, form: RegExp) =>
    value === undefined || (typeof value === "string" && form.test(value));
  const valid = {
    room: typeof room === "string" && roomOf(encodeURIComponent(room.toWellFormed())) === room,
    seq: isSeq(seq),
    at: Number.isInteger(at) && !Number.isNaN(new Date(at).getTime()),
    name: typeof name === "string" && cleanName(name) === name,
    from: isText(from, ID),
    text: typeof text === "string" && !isTooLong(text) && text.isWellFormed() && !(text && (removes || removed)),
    removes: removes === undefined || (isSeq(removes) && removes < seq),
    removed: removed === undefined || removed === true,
    key: isText(key, KEY),
  };
  for (const [field, isValid] of Object.entries(valid)) if (!isValid) throw new Error(`it has no valid "${field}"`);
  return { room, seq, at, name, from, text, removes, removed, key };
}

/**
 * Takes an export into the configured store, room by room; each begins a new epoch.
 * @returns how many messages were taken, and the rooms that were not, because they are there already
 * @throws StartError when a line is broken, or a server uses the SQLite file: then nothing has changed
 */
export async function importMessages(config: Config, text: string): Promise<{ count: number; refused: string[] }> {
  const rooms = readExport(text);
  const refused = config.redisUrls.length === 0 ? importSqlite(config, rooms) : await importRedis(config, rooms);
  const taken = [...rooms].filter(([room]) => !refused.includes(room));
  return { count: taken.reduce((sum, [, lines]) => sum + lines.length, 0), refused };
}

/** A server that runs on the file has it locked: the import is refused, as it would not learn of it. */
function importSqlite(config: Config, rooms: Map<string, Line[]>): string[] {
  const { db, close } = openLocked(config);
  const insert = db.query(INSERT_MESSAGE);
  const isTaken = db.transaction((room: string, lines: Line[]) => {
    if (db.query("SELECT 1 FROM rooms WHERE name = ?").get(room)) return false;
    const { lastInsertRowid: id } = db.query(INSERT_ROOM).run(room, randomHex(64));
    for (const { seq, at, name, from = null, text, removes = null, removed, key = null } of lines) {
      insert.run(id, seq, at, name, from, text, removes, removed ? 1 : null, key);
    }
    return true;
  });
  const refused = [...rooms].filter(([room, lines]) => !isTaken.immediate(room, lines));
  close();
  return refused.map(([room]) => room);
}

/** ARGV: epoch, the last seq, seconds until an idle room expires (0: never), channel; then of each message its seq, key, JSON. */
const IMPORT_SCRIPT = `${SCRIPT_HEAD}
if last > 0 then return 0 end
redis.call('DEL', log, keys)
redis.call('HSET', room, 'epoch', ARGV[1], 'last', ARGV[2])
for i = 5, #ARGV, 3 do
  if ARGV[i + 1] ~= '' then redis.call('HSET', keys, ARGV[i + 1], ARGV[i]) end
  redis.call('RPUSH', log, ARGV[i + 2])
end
expire(tonumber(ARGV[3]))
redis.call('PUBLISH', ARGV[4], '{"epoch":"' .. ARGV[1] .. '","messages":[]}') -- whoever is in the empty room comes back
return 1`;

async function importRedis(config: Config, rooms: Map<string, Line[]>): Promise<string[]> {
  const refused: string[] = [];
  const connections = config.redisUrls.map((url) => connectRedis(url, 0));
  for (const [name, lines] of rooms) {
    const keys = roomKeys(config, name);
    const head = [randomHex(64), `${lines.at(-1)?.seq}`, `${config.idleDays * DAY_SECONDS}`, keys[0] as string];
    const messages = lines.flatMap(({ room, ...line }) => [`${line.seq}`, line.key ?? "", JSON.stringify(line)]);
    const redis = connections[homeOf(name, config.redisUrls)] as Bun.RedisClient;
    if (!(await redis.send("EVAL", [IMPORT_SCRIPT, "3", ...keys, ...head, ...messages]))) refused.push(name);
  }
  for (const redis of connections) redis.close();
  return refused;
}

// ─── Main ────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Does what the command line asks, with settings from the environment. @throws StartError when it asks for something else */
export async function main([command, ...rest]: string[]): Promise<void> {
  if (command === "--help" || command === "-h") return console.log(help());
  if (command === "--version" || command === "-v") return console.log(version);
  if (command === undefined) return serve(readConfig(process.env));
  if (command === "export" && rest.length === 0) return printExport(readConfig(process.env));
  if (command === "import" && rest.length <= 1) {
    const text = await (rest[0] === undefined ? Bun.stdin : Bun.file(rest[0])).text();
    const { count, refused } = await importMessages(readConfig(process.env), text);
    console.error(`${count} messages imported.`);
    if (refused.length === 0) return;
    throw new StartError(`Not imported, as these rooms are there already: ${JSON.stringify(refused)}.`);
  }
  throw new StartError(`${[command, ...rest].join(" ")}: no such command; --help lists them.`);
}

function help(): string {
  const settings = Object.values(SETTINGS).map(
    ([variable, fallback, , what]) => `  ${variable.padEnd(15)} ${what}${fallback && ` (${fallback})`}`,
  );
  return `A chat server in one file. It needs nothing: start it, and open the address it prints.

  bun run server.ts                      serves the chat
  bun run server.ts export > chat.jsonl  writes the kept messages of all rooms, a JSON object in each line
  bun run server.ts import [chat.jsonl]  takes them, from a file or standard input, into a store without those rooms
  bun run server.ts --help | --version

Settings are environment variables, or lines of a file .env:
${settings.join("\n")}`;
}

async function printExport(config: Config): Promise<void> {
  const out = Bun.stdout.writer();
  let count = 0;
  for await (const line of exportMessages(config)) {
    out.write(`${JSON.stringify(line)}\n`);
    if (++count % STEP_MESSAGES === 0) await out.flush();
  }
  await out.flush();
  console.error(`${count} messages exported.`);
}

/** Serves until SIGTERM or SIGINT. */
async function serve(config: Config): Promise<void> {
  const chat = await startChat(config);
  const log = makeLogger(config.logLevel);
  log("info", `The chat is open: ${chat.url}`);
  // The addresses at which others on the network reach this machine, for whoever has started it in a terminal.
  const addresses = Object.values(networkInterfaces()).flatMap((all) => all ?? []);
  for (const { internal, family, address } of config.host === "" && process.stdout.isTTY ? addresses : []) {
    if (!internal && family === "IPv4") log("info", `       for others: ${chat.url.replace("localhost", address)}`);
  }
  const stop = () => void chat.stop().then(() => process.exit(0));
  process.on("SIGTERM", stop);
  process.on("SIGINT", stop);
}

if (import.meta.main) {
  main(Bun.argv.slice(2)).catch((error: unknown) => {
    // Operator errors get one line, bugs a stack trace.
    const isOperators = error instanceof StartError || (error instanceof Error && "code" in error);
    console.error(isOperators ? error.message : error);
    process.exit(1);
  });
}
