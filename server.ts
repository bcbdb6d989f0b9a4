/// <reference types="bun-types" />
/**
 * A chat server in one file, to be read from top to bottom: limits, protocol, configuration; the brokers, which store;
 * the rooms, which a message passes through; access, server, export and import, main. The way of a message:
 *
 *    socket ── text frame ──▶ receive     parses the frame, in the socket's dialect            Rooms.receive
 *                                │
 *                                ▼
 *                              pace       a token bucket for each sender: slows, not drops     Rooms.#pace
 *                                │
 *                                ▼
 *                              broker     stores the post: it gets the room's next seq         Broker.append
 *                                │        only what is stored goes on
 *                                ▼
 *                              deliver    to chat.v1 one frame for all stored together, to     Rooms.stored
 *                                         plain sockets one for each text: server.publish(topic)
 *
 * One direction, no way back. Two rules hold it together, and each is marked where it applies:
 *   RULE 1  no `await` between storing (with Redis: one loop's reading what was stored) and publishing: the order stored
 *           is the order seen;
 *   RULE 2  no `await` between the last replayed message and `ws.subscribe`: nobody joins into a hole.
 *
 * Two dialects meet in every room. "Plain" sockets exchange bare texts. Sockets with the subprotocol `chat.v1` exchange
 * the JSON objects typed below: they get names, history, presence, and every message with its place in the log.
 */
import { Database, type Statement } from "bun:sqlite";
import { createHmac, createPrivateKey, scryptSync, timingSafeEqual, X509Certificate } from "node:crypto";
import { closeSync, openSync, readFileSync, realpathSync } from "node:fs";
import { networkInterfaces } from "node:os";
// As text, so that `bun build --compile` takes it into the executable.
import pageSource from "./index.html" with { type: "text" };
import { version } from "./package.json";

// ─── Limits ──────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Bytes of UTF-8 in the text of one message. */
const MAX_TEXT = 16 * 1024;
/** Bytes of one WebSocket frame from a client; a longer one closes the connection with 1009. */
const MAX_FRAME = 64 * 1024;
/** Characters (Unicode code points) of a person's name. */
const MAX_NAME = 32;
/** Characters (Unicode code points) of a room's name. */
const MAX_ROOM = 64;
/** Frames that are not of the protocol before a connection is closed with 1008. */
const MAX_STRIKES = 10;
/** Messages in a page of history, and in the `hello` of somebody who starts afresh. */
const PAGE_MESSAGES = 100;
/** Messages that a client may have missed and still resume; past that it starts afresh. */
const RESUME_MESSAGES = 1000;
/** Milliseconds that somebody who has seen more than this server waits for it to catch up, before they start afresh. */
const BEHIND_MS = 1000;
/**
 * Bytes of text in one page or `hello`, as JSON escapes it: far enough below
 * {@link BACKPRESSURE_BYTES} that a slow phone is not cut for it.
 */
const PAGE_BYTES = 256 * 1024;
/** Names in one presence frame; the count is always exact. */
const PRESENCE_NAMES = 100;
/** Milliseconds between two presence frames of a room. */
const PRESENCE_MS = 1000;
/** Milliseconds within which a second `typing` of the same person is not passed on. */
const TYPING_MS = 2000;
/** Seconds' worth of frames that a sender who was silent may send at once. */
const BURST_SECONDS = 10;
/** Bytes that may wait in one sender's queue before its socket is read no further. */
const QUEUE_BYTES = 1024 * 1024;
/** Bytes that a queued frame takes beside its strings: so that many tiny frames are bounded too. */
const QUEUE_FRAME_BYTES = 64;
/** Bytes in all the queues that people left behind when they closed: past that, what they sent too fast is dropped. */
const LEFT_BYTES = 16 * 1024 * 1024;
/** Bytes that the server buffers for a reader that does not read. With the frame that passes it, that is 1 MiB at most. */
const BACKPRESSURE_BYTES = 512 * 1024;
/** Seconds of silence after which a socket is dead. Bun pings before that; under 60 s, so that proxies see traffic. */
const IDLE_SECONDS = 50;
/**
 * Milliseconds for which posts are gathered under load: not to be seen, and it saves a system call for every socket and
 * message. Also the pause between two steps of trimming and the like, and between two looks at something awaited.
 */
const GATHER_MS = 6;
/** Posts, and characters (UTF-16 units) of text, that end the gathering at once. */
const GATHER_POSTS = 32;
const GATHER_CHARACTERS = 64 * 1024;
/** Messages that one step of trimming deletes: few, not to hold up a post. With SQLite, it begins when so many are over CHAT_HISTORY. */
const TRIM_MESSAGES = 1000;
/** Bytes of a request's body: a password and no more. */
const MAX_BODY = 4096;
const DAY_SECONDS = 24 * 60 * 60;
/** Seconds for which a session cookie is good. */
const SESSION_SECONDS = 30 * DAY_SECONDS;
/** Wrong passwords from one address that cost nothing; each one more doubles the wait, from one second up to a minute. */
const FREE_TRIES = 5;
const MAX_WAIT_SECONDS = 60;
/** Addresses whose wrong passwords are remembered, the newest; and the seconds after the last one until it is forgotten. */
const MAX_ADDRESSES = 10_000;
const FORGET_SECONDS = 15 * 60;
/** Milliseconds between two looks for rooms that are to be forgotten. */
const EXPIRE_MS = DAY_SECONDS * 1000;
/** Milliseconds that `stop` waits for clients to answer its Close frame. */
const STOP_MS = 2000;

// ─── The protocol: chat.v1 ───────────────────────────────────────────────────────────────────────────────────────────

/** A message as it is stored, and as every `chat.v1` client sees it. */
export interface Message {
  /** Its place in the room's log: 1, 2, 3 … without a gap. */
  seq: number;
  /** When the server received it: milliseconds since 1970. */
  at: number;
  /** Who sent it, as they called themselves; nothing proves it. */
  name: string;
  text: string;
  /** The key that its sender gave it; absent on messages of plain sockets. */
  key?: string;
}

/** What the server sends to a `chat.v1` client: one JSON object in each text frame. */
export type ServerFrame =
  | {
      /** Always the first frame. */
      type: "hello";
      /** Names this log: another epoch is another log, whose seqs mean nothing in the old one. */
      epoch: string;
      /** The oldest and the newest seq kept; an empty log has 1 and 0. */
      first: number;
      last: number;
      /** Whether `messages` is exactly what came after the client's `after`, or the newest page to start afresh from. */
      resumed: boolean;
      messages: Message[];
      limits: { text: number; name: number };
    }
  | { type: "messages"; messages: Message[] }
  | { type: "page"; messages: Message[] }
  | { type: "ack"; key: string; seq: number }
  | { type: "presence"; count: number; names: string[] }
  | { type: "typing"; name: string }
  | { type: "pong" }
  | { type: "error"; code: ErrorCode; text: string; key?: string };

/** What was wrong with a client's frame. Only `bad-frame` counts towards {@link MAX_STRIKES}. */
export type ErrorCode = "bad-frame" | "bad-key" | "bad-name" | "empty" | "too-long";

/** What a `chat.v1` client sends. A plain socket's frame becomes a `post` without a key. */
export type ClientFrame =
  | { type: "post"; key?: string; text: string }
  | { type: "page"; before: number }
  | { type: "name"; name: string }
  | { type: "typing" }
  | { type: "ping" };

/** The fields that each type of client frame must have, and their types. Others are refused. */
const CLIENT_FIELDS: Record<ClientFrame["type"], Record<string, "string" | "number">> = {
  post: { key: "string", text: "string" },
  page: { before: "number" },
  name: { name: "string" },
  typing: {},
  ping: {},
};

/** Close codes: RFC 6455 section 7.4.1, the IANA registry (1013), and the private range (4401). */
const CLOSE = {
  goingDown: 1001,
  binary: 1003,
  protocol: 1008,
  tooBig: 1009,
  bug: 1011,
  tryAgain: 1013,
  password: 4401,
} as const;

const KEY = /^[A-Za-z0-9_-]{1,64}$/;
const CONTROL = /[\p{Cc}\p{Zl}\p{Zp}]/u;

/** What is wrong with a frame, for its sender. */
class FrameError {
  constructor(
    readonly code: ErrorCode,
    readonly text: string,
  ) {}
}

/** Parses a `chat.v1` frame and checks its shape; what the values mean is checked where they are used. */
function parseFrame(data: string): ClientFrame | FrameError {
  let frame: unknown;
  try {
    frame = JSON.parse(data);
  } catch {
    return new FrameError("bad-frame", "The frame is not JSON.");
  }
  if (typeof frame !== "object" || frame === null || !("type" in frame)) {
    return new FrameError("bad-frame", "The frame is not an object with a type.");
  }
  const given = frame as Record<string, unknown>;
  const { type } = given;
  if (typeof type !== "string" || !Object.hasOwn(CLIENT_FIELDS, type)) {
    return new FrameError("bad-frame", `There is no such type. Types: ${Object.keys(CLIENT_FIELDS).join(", ")}.`);
  }
  const fields = CLIENT_FIELDS[type as ClientFrame["type"]];
  for (const field in fields) {
    if (typeof given[field] !== fields[field]) {
      return new FrameError("bad-frame", `"${type}" needs a ${fields[field]} "${field}".`);
    }
  }
  for (const field in given) {
    if (field !== "type" && !Object.hasOwn(fields, field)) {
      const known = ["type", ...Object.keys(fields)].join(", "); // and not what was sent: it may be long
      return new FrameError("bad-frame", `"${type}" has no other fields than: ${known}.`);
    }
  }
  return frame as ClientFrame;
}

/** A message, built field by field, so that all have one shape and a plain one has no `key`. */
function makeMessage(seq: number, at: number, name: string, text: string, key: string | null | undefined): Message {
  return key ? { seq, at, name, text, key } : { seq, at, name, text };
}

function encode(frame: ServerFrame): string {
  return JSON.stringify(frame);
}

/** Whether a text is longer than `max` bytes of UTF-8 (a UTF-16 unit takes one to three of them). */
function longerThan(text: string, max: number): boolean {
  return text.length > max || (text.length * 3 > max && Buffer.byteLength(text) > max);
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

// ─── Configuration ───────────────────────────────────────────────────────────────────────────────────────────────────

const LOG_LEVELS = ["silent", "error", "info", "debug"] as const;
const SYNC_MODES = ["full", "normal"] as const;

/** What a chat is started with, frozen; what comes from the environment is checked by {@link readConfig}. */
export interface Config {
  /** TCP port, 0 to 65535; 0 takes a free one. */
  readonly port: number;
  /** Address to listen on; `""` is all interfaces, IPv4 and IPv6. */
  readonly host: string;
  /** SQLite database: a file, or `:memory:`. */
  readonly db: string;
  /** `full`: a commit is on the disk before anyone sees it. `normal`: it is with the operating system. */
  readonly sync: (typeof SYNC_MODES)[number];
  /** A Redis to use instead of SQLite, or `""`. */
  readonly redisUrl: string;
  /** What all keys of this chat in Redis begin with: other chats may share it. */
  readonly prefix: string;
  /** Messages kept in each room, 1 to 10,000,000. */
  readonly history: number;
  /** Days after the last message until a room is forgotten when nobody is in it, 0 to 36,500; 0 is never. */
  readonly idleDays: number;
  /** Frames a second of each connection, but for pings, 0 to 1,000,000; 0 is no limit. */
  readonly rate: number;
  /** Origins (`https://a.example`) or hosts (`a.example:8443`) whose pages may connect beside the server's own; `*` is any. */
  readonly origins: readonly string[];
  /** Asked of everyone who comes in; `""` lets anyone in who reaches the port. */
  readonly password: string;
  /** Proxies in front, 0 to 10, whose `X-Forwarded-For` is believed; each adds the address it was reached from at the right. */
  readonly proxies: number;
  /** PEM files of a certificate and its key: both, to serve https and wss, or `""`. */
  readonly tlsCert: string;
  readonly tlsKey: string;
  /** Whether other servers may listen on the same port (Linux): with Redis, they share the work. */
  readonly reusePort: boolean;
  readonly logLevel: (typeof LOG_LEVELS)[number];
}

/** A mistake of the operator, told in one line: a bad value, a port in use, a database that cannot be opened. */
export class StartError extends Error {}

/** A whole number from `min` to `max`. @throws StartError */
function wholeNumber(variable: string, value: string, min: number, max: number): number {
  const number = /^\d{1,9}$/.test(value) ? Number(value) : NaN;
  if (number >= min && number <= max) return number;
  throw new StartError(`${variable}=${value}: must be a whole number from ${min} to ${max}.`);
}

/** One of a few words. @throws StartError */
function oneOf<T extends string>(variable: string, value: string, allowed: readonly T[]): T {
  const found = allowed.find((word) => word === value);
  if (found !== undefined) return found;
  throw new StartError(`${variable}=${value}: must be one of ${allowed.join(", ")}.`);
}

/**
 * Reads the configuration from environment variables; unset and empty ones take their defaults.
 * @throws StartError that names the variable, its value and what is allowed
 */
export function readConfig(env: Record<string, string | undefined>): Config {
  if (env.REUSE_PORT === "1" && !env.REDIS_URL) {
    throw new StartError("REUSE_PORT=1: needs REDIS_URL, so that all servers on the port are one chat.");
  }
  if (!env.TLS_CERT !== !env.TLS_KEY) throw new StartError("TLS_CERT and TLS_KEY: must be set both, or neither.");
  return Object.freeze<Config>({
    port: wholeNumber("PORT", env.PORT || "8080", 0, 65535),
    host: (env.HOST ?? "").replace(/^\[(.*)\]$/, "$1"), // an IPv6 address, as a URL has it
    db: (env.CHAT_DB ?? "").trim() || "chat.sqlite",
    sync: oneOf("CHAT_SYNC", env.CHAT_SYNC || "full", SYNC_MODES),
    redisUrl: env.REDIS_URL || "",
    prefix: env.CHAT_PREFIX || "chat:",
    idleDays: wholeNumber("CHAT_IDLE_DAYS", env.CHAT_IDLE_DAYS || "30", 0, 36_500),
    history: wholeNumber("CHAT_HISTORY", env.CHAT_HISTORY || "10000", 1, 10_000_000),
    rate: wholeNumber("CHAT_RATE", env.CHAT_RATE || "20", 0, 1_000_000),
    origins: readOrigins(env.CHAT_ORIGINS || ""),
    password: env.CHAT_PASSWORD || "",
    proxies: wholeNumber("CHAT_PROXIES", env.CHAT_PROXIES || "0", 0, 10),
    tlsCert: env.TLS_CERT || "",
    tlsKey: env.TLS_KEY || "",
    reusePort: wholeNumber("REUSE_PORT", env.REUSE_PORT || "0", 0, 1) === 1,
    logLevel: oneOf("LOG_LEVEL", env.LOG_LEVEL || "info", LOG_LEVELS),
  });
}

/** A list of origins (as `URL` writes them) or hosts (as given), separated by commas. @throws StartError */
function readOrigins(list: string): readonly string[] {
  const entries = list
    .split(",")
    .map((entry) => entry.trim())
    .filter((entry) => entry !== "");
  return entries.map((entry) => {
    if (entry === "*") return entry;
    const url = URL.parse(entry.includes("://") ? entry : `http://${entry}`);
    const bare =
      url &&
      !entry.includes("*") &&
      /^https?:$/.test(url.protocol) &&
      `${url.pathname}${url.search}${url.hash}` === "/";
    if (bare) return entry.includes("://") ? url.origin : entry;
    throw new StartError(
      `CHAT_ORIGINS=${list}: must be origins (https://a.example) or hosts, separated by commas, or *.`,
    );
  });
}

type Logger = (level: "error" | "info" | "debug", line: string) => void;

/** Logs an outage when it begins and when it ends, however often it shows in between. */
class Outage {
  #begun = false;

  constructor(readonly log: Logger) {}

  begins(line: string): void {
    if (!this.#begun) this.log("error", line);
    this.#begun = true;
  }

  ends(line: string): void {
    if (this.#begun) this.log("error", line);
    this.#begun = false;
  }
}

/** Prints lines up to a level: errors to standard error, the rest to standard output. */
function makeLogger(upTo: Config["logLevel"]): Logger {
  return (level, line) => {
    if (LOG_LEVELS.indexOf(level) > LOG_LEVELS.indexOf(upTo)) return;
    // Names and texts may hold signs that turn a line around, or that a terminal obeys. (Those of the banner are ours.)
    const seen = line.replace(
      /(?![\n\x1b])[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu,
      (sign) => `\\u{${(sign.codePointAt(0) as number).toString(16)}}`,
    );
    if (level === "error") console.error(seen);
    else console.log(seen);
  };
}

// ─── Broker: what stores messages and says what is stored ────────────────────────────────────────────────────────────

/** A post on its way to the log. */
interface Post {
  readonly room: string;
  readonly at: number;
  readonly name: string;
  readonly text: string;
  readonly key: string | undefined;
  /** Who gets the `ack`, or is told that the post could not be stored. */
  readonly sender: Member;
}

/** A room's log as it was when it was opened. */
interface LogState {
  readonly epoch: string;
  /** Seqs of the oldest and the newest message; an empty log has 1 and 0. */
  readonly first: number;
  readonly last: number;
}

/** Who is in a room on one server. */
interface Here {
  readonly count: number;
  /** Distinct, at most {@link PRESENCE_NAMES}. */
  readonly names: string[];
}

/** Stores posts, gives each the next seq of its room, and tells {@link BrokerEvents} what happened to it. */
interface Broker {
  /** Begins; resolves when posts can be taken, or when it is clear that they cannot for now. */
  start(): Promise<void>;
  /**
   * Opens a room's log and calls `opened` with its state. What is stored after that `last` is told to `stored`,
   * until `close`. Rejects when the store cannot be reached.
   */
  open(room: string, opened: (state: LogState) => void): Promise<void>;
  /** Ends what `open` began, when the last member has left. */
  close(room: string): void;
  /** Takes a post to store. Its outcome comes as an event: `stored`, `repeated` or `refused`, or the room is `lost`. */
  append(post: Post): void;
  /** Messages of an open room with `from <= seq <= to`, ascending: the newest `limit` and {@link PAGE_BYTES} of them. */
  read(room: string, from: number, to: number, limit: number): Promise<Message[]>;
  /** Says who is in a room here, and returns who is in it on each server, this one first. */
  present(room: string, here: Here): Promise<Here[]>;
  /** Says that somebody here types; it goes to the other servers. */
  typing(room: string, name: string): void;
  /** Stores and tells what still waits, and closes the store. */
  stop(): Promise<void>;
}

/** What a broker tells. */
interface BrokerEvents {
  /** Messages of a room that were stored together: ascending, without a gap after those told before. */
  stored(room: string, messages: Message[]): void;
  /** A post whose key is in the log already. */
  repeated(post: Post, seq: number): void;
  /** Posts that were not stored, as far as is known. */
  refused(posts: Post[]): void;
  /** A room's log cannot be followed any further: its members must come back and take it from there. */
  lost(room: string): void;
  /** Presence of a room changed on another server. */
  presenceChanged(room: string): void;
  /** Somebody on another server types. */
  typing(room: string, name: string): void;
}

/**
 * Collects posts to be stored together. After {@link GATHER_MS} of quiet a post is stored at once; else with those that
 * come within that time after it: less when they are {@link GATHER_POSTS} or {@link GATHER_CHARACTERS} before, or when
 * there is nobody to wait for.
 */
class Gatherer {
  #posts: Post[] = [];
  #characters = 0;
  #timer: Timer | undefined;
  #immediate: ReturnType<typeof setImmediate> | undefined;
  /** When `store` last returned, on the monotonic clock: from then on it is quiet. */
  #flushedAt = -Infinity;
  /** Who posted the last time, and has not yet again. */
  #awaited = new Set<Member>();

  constructor(readonly store: (posts: Post[]) => void) {}

  add(post: Post): void {
    this.#posts.push(post);
    this.#characters += post.text.length;
    this.#awaited.delete(post.sender);
    const enough = this.#posts.length >= GATHER_POSTS || this.#characters >= GATHER_CHARACTERS;
    const quiet = this.#posts.length === 1 && performance.now() - this.#flushedAt >= GATHER_MS;
    if (enough || quiet) this.flush();
    // All who posted last time have posted again, as programs do that wait for their own message: no more will come. Not
    // before the end of this tick, for what was read together belongs together.
    else if (this.#awaited.size === 0) this.#immediate ??= setImmediate(() => this.flush());
    else this.#timer ??= setTimeout(() => this.flush(), GATHER_MS);
  }

  flush(): void {
    clearTimeout(this.#timer);
    clearImmediate(this.#immediate);
    this.#timer = this.#immediate = undefined;
    const posts = this.#posts;
    if (posts.length === 0) return;
    this.#posts = [];
    this.#characters = 0;
    this.#awaited = new Set(posts.map(({ sender }) => sender));
    this.store(posts);
    this.#flushedAt = performance.now();
  }
}

/** Of messages that come newest first, as many as fit in {@link PAGE_BYTES}, but one at least: ascending. */
function newestThatFit(newestFirst: Iterable<Message>): Message[] {
  const messages: Message[] = [];
  let bytes = 0;
  for (const each of newestFirst) {
    bytes += Buffer.byteLength(JSON.stringify(each.text)) - 2; // as it is sent: a control character takes six bytes
    if (bytes > PAGE_BYTES && messages.length > 0) break;
    messages.push(each);
  }
  return messages.reverse();
}

// ─── Broker: SQLite, the default ─────────────────────────────────────────────────────────────────────────────────────

/** A room's log as the SQLite broker knows it, while the room is open. */
interface SqliteLog {
  readonly room: string;
  /** The room's row; 0 until its first message is stored, so that a visit alone leaves no trace. */
  id: number;
  readonly epoch: string;
  /** The oldest row in the table: up to {@link TRIM_MESSAGES} more than are kept, until trimming begins. */
  oldest: number;
  last: number;
  keys: KeyMap | undefined;
}

/**
 * The keys of a room's kept messages, and of as many before them, which do not count. In memory, because an index on
 * random keys costs ten times the insert. In two maps, of which the older is dropped as a whole, because a Map that
 * loses its oldest entries one by one gets slow.
 */
class KeyMap {
  #newer = new Map<string, number>();
  #older: Map<string, number>;

  /** @param keys those of the newest `history` messages, with their seqs */
  constructor(
    readonly history: number,
    keys: Map<string, number>,
  ) {
    this.#older = keys;
  }

  /** The seq of a key, if its message is one of the newest `history` up to `last`. */
  get(key: string, last: number): number | undefined {
    const seq = this.#newer.get(key) ?? this.#older.get(key);
    return seq !== undefined && seq > last - this.history ? seq : undefined;
  }

  set(key: string, seq: number): void {
    this.#newer.set(key, seq);
    if (this.#newer.size < this.history) return;
    this.#older = this.#newer; // nothing in the older one is kept any longer: `history` messages came after it
    this.#newer = new Map();
  }
}

/** The messages of one room that are about to be stored together. */
interface Batch {
  readonly log: SqliteLog;
  /** The room's row; made by the transaction, and true only once it is committed. */
  id: number;
  readonly messages: Message[];
  readonly keys: Map<string, number>;
  /** Posts whose key was there already, with its seq. */
  readonly repeats: [Post, number][];
}

const INSERT_ROOM = "INSERT INTO rooms (name, epoch) VALUES (?, ?)";
const INSERT_MESSAGE = "INSERT INTO messages (room, seq, at, name, key, text) VALUES (?, ?, ?, ?, ?, ?)";

type Row = { seq: number; at: number; name: string; key: string | null; text: string };

/** Keeps the logs in one SQLite file. Posts that wait together are committed in one transaction, then told. */
class SqliteBroker implements Broker {
  readonly #db: Database;
  /** Held for life, so that a second server on the same file is refused; the system frees it when the process dies. */
  readonly #lock: Database | undefined;
  readonly #logs = new Map<string, SqliteLog>();
  readonly #insert: Statement;
  readonly #select: Statement<Row, [number, number, number, number]>;
  /** Commits posts or nothing. */
  readonly #transaction: (batches: Iterable<Batch>) => void;
  readonly #gatherer = new Gatherer((posts) => this.#commit(posts));
  #trimming: Timer | undefined;
  #expiring: Timer | undefined;
  readonly #outage: Outage;

  /** @throws StartError when the database cannot be opened and written */
  constructor(
    readonly config: Config,
    readonly events: BrokerEvents,
    readonly log: Logger,
  ) {
    const { db, lock } = openLocked(config);
    this.#db = db;
    this.#lock = lock;
    this.#outage = new Outage(log);
    this.#insert = this.#db.query(INSERT_MESSAGE);
    this.#select = this.#db.query(
      "SELECT seq, at, name, key, text FROM messages WHERE room = ? AND seq BETWEEN ? AND ? ORDER BY seq DESC LIMIT ?",
    );
    this.#transaction = this.#db.transaction((batches: Iterable<Batch>) => {
      for (const batch of batches) this.#store(batch);
    }).immediate;
  }

  async start(): Promise<void> {
    this.#expireRooms(0);
  }

  async open(room: string, opened: (state: LogState) => void): Promise<void> {
    this.#gatherer.flush(); // posts of people who have just left: they belong to what is read now
    const found = this.#db
      .query<{ id: number; epoch: string; oldest: number | null; last: number | null }, [string]>(
        `SELECT id, epoch, (SELECT min(seq) FROM messages WHERE room = id) AS oldest,
                           (SELECT max(seq) FROM messages WHERE room = id) AS last FROM rooms WHERE name = ?`,
      )
      .get(room);
    const { id = 0, epoch = randomName(), oldest, last } = found ?? {};
    const log: SqliteLog = { room, id, epoch, oldest: oldest ?? 1, last: last ?? 0, keys: undefined };
    this.#logs.set(room, log);
    opened({ epoch, first: log.oldest, last: log.last });
  }

  close(room: string): void {
    const log = this.#logs.get(room);
    // In a tick of its own: this may be called from inside `stored`, and posts of people who have just left may wait.
    setImmediate(() => {
      if (this.#logs.get(room) !== log) return;
      this.#gatherer.flush();
      this.#logs.delete(room);
    });
  }

  append(post: Post): void {
    this.#gatherer.add(post);
  }

  async read(room: string, from: number, to: number, limit: number): Promise<Message[]> {
    const rows = Iterator.from(this.#select.iterate(this.#logs.get(room)?.id ?? 0, from, to, limit));
    return newestThatFit(rows.map(({ seq, at, name, text, key }) => makeMessage(seq, at, name, text, key)));
  }

  async present(_room: string, here: Here): Promise<Here[]> {
    return [here]; // one server is all there is
  }

  typing(): void {}

  async stop(): Promise<void> {
    this.#gatherer.flush();
    clearTimeout(this.#trimming);
    clearTimeout(this.#expiring);
    this.#db.close();
    this.#lock?.close();
  }

  /** Stores posts in one transaction and tells what became of them. */
  #commit(posts: Post[]): void {
    const batches = new Map<string, Batch>();
    try {
      for (const post of posts) this.#assign(post, batches);
      const [batch] = batches.values();
      // One message of a room that is there is one statement, which SQLite commits by itself, for less.
      if (posts.length === 1 && batch && batch.id !== 0) this.#store(batch);
      else this.#transaction(batches.values());
    } catch (error) {
      this.#outage.begins(`The database cannot be written, posts are refused: ${(error as Error).message}`);
      return this.events.refused(posts);
    }
    this.#outage.ends("The database can be written again.");
    // RULE 1: no await from the commit to here, nor in `stored`.
    for (const batch of batches.values()) this.#tell(batch);
  }

  /** Gives a post the next seq of its room, or finds that it is there already. */
  #assign(post: Post, batches: Map<string, Batch>): void {
    let batch = batches.get(post.room);
    if (!batch) {
      const log = this.#logs.get(post.room);
      if (!log) throw new Error("A post came after its room was closed.");
      log.keys ??= this.#loadKeys(log);
      batches.set(post.room, (batch = { log, id: log.id, messages: [], keys: new Map(), repeats: [] }));
    }
    const { log, messages, keys, repeats } = batch;
    const known = post.key && (log.keys?.get(post.key, log.last) ?? keys.get(post.key));
    if (known) return void repeats.push([post, known]);
    const seq = log.last + messages.length + 1;
    if (post.key) keys.set(post.key, seq);
    messages.push(makeMessage(seq, post.at, post.name, post.text, post.key));
  }

  /** Writes one room's messages, inside the transaction. */
  #store(batch: Batch): void {
    if (batch.id === 0) {
      const { lastInsertRowid: id } = this.#db.query(INSERT_ROOM).run(batch.log.room, batch.log.epoch);
      batch.id = Number(id);
    }
    for (const { seq, at, name, key, text } of batch.messages) {
      this.#insert.run(batch.id, seq, at, name, key ?? null, text);
    }
  }

  /** Makes what was committed true in memory, and tells it. */
  #tell({ log, id, messages, keys, repeats }: Batch): void {
    log.id = id;
    log.last += messages.length;
    for (const [key, seq] of keys) log.keys?.set(key, seq);
    if (messages.length > 0) this.events.stored(log.room, messages);
    for (const [post, seq] of repeats) this.events.repeated(post, seq);
    if (log.last - log.oldest + 1 >= this.config.history + TRIM_MESSAGES) this.#trimSoon(log);
  }

  #loadKeys(log: SqliteLog): KeyMap {
    const rows = this.#db
      .query<{ key: string; seq: number }, [number, number]>(
        "SELECT key, seq FROM messages WHERE room = ? AND seq > ? AND key IS NOT NULL ORDER BY seq",
      )
      .all(log.id, log.last - this.config.history);
    return new KeyMap(this.config.history, new Map(rows.map(({ key, seq }) => [key, seq])));
  }

  /** Deletes the oldest messages of a room, a step at a time, so that posts get in between. */
  #trimSoon(log: SqliteLog): void {
    this.#trimming ??= setTimeout(() => {
      this.#trimming = undefined;
      const kept = log.last - this.config.history;
      const upTo = Math.min(kept, log.oldest + TRIM_MESSAGES - 1);
      try {
        this.#db.query("DELETE FROM messages WHERE room = ? AND seq <= ?").run(log.id, upTo);
        log.oldest = upTo + 1;
      } catch (error) {
        return this.log("error", `The history cannot be trimmed: ${(error as Error).message}`);
      }
      if (upTo < kept) this.#trimSoon(log);
    }, GATHER_MS);
  }

  /**
   * Forgets the rooms that nobody is in and nobody has posted to for {@link Config.idleDays}: those from row `from` on,
   * a step at a time. Each step looks anew, for a room may be used again at any time.
   */
  #expireRooms(wait: number, from = 0): void {
    if (this.config.idleDays === 0) return;
    this.#expiring = setTimeout(() => {
      try {
        const room = this.#idleRoom(from);
        if (!room) return this.#expireRooms(EXPIRE_MS);
        const done = this.#logs.has(room.name) || this.#forgetSome(room.id);
        this.#expireRooms(GATHER_MS, done ? room.id + 1 : room.id);
      } catch (error) {
        this.log("error", `Idle rooms cannot be forgotten now: ${(error as Error).message}`);
        this.#expireRooms(EXPIRE_MS);
      }
    }, wait);
  }

  #idleRoom(from: number): { id: number; name: string } | null {
    const newest = "SELECT at FROM messages WHERE room = id ORDER BY seq DESC LIMIT 1";
    return this.#db
      .query<{ id: number; name: string }, [number, number]>(
        `SELECT id, name FROM rooms WHERE id >= ? AND (${newest}) < ? ORDER BY id LIMIT 1`,
      )
      .get(from, Date.now() - this.config.idleDays * DAY_SECONDS * 1000);
  }

  /** Deletes a room's oldest messages, and with the last ones the room. Returns whether it is gone. */
  #forgetSome(id: number): boolean {
    const some = "DELETE FROM messages WHERE room = ?1 AND seq < (SELECT min(seq) FROM messages WHERE room = ?1) + ?2";
    const empty = "DELETE FROM rooms WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM messages WHERE room = ?1)";
    const both = this.#db.transaction(() => {
      this.#db.query(some).run(id, TRIM_MESSAGES);
      return this.#db.query(empty).run(id).changes > 0;
    });
    return both.immediate();
  }
}

/** A random name, for a log or a server: another one never has it. */
function randomName(): string {
  return Buffer.from(crypto.getRandomValues(new Uint8Array(8))).toString("hex");
}

/** Opens the database and keeps every other server off it. @throws StartError when it cannot be opened and written */
function openLocked({ db: path, sync }: Config): { db: Database; lock: Database | undefined } {
  let lock: Database | undefined;
  try {
    if (path !== ":memory:") {
      closeSync(openSync(path, "a")); // it is there from now on: by all its names the lock is the same
      lock = lockDatabase(`${realpathSync(path)}-lock`);
    }
    return { db: openDatabase(path, sync), lock };
  } catch (error) {
    lock?.close();
    const locked = (error as { code?: string }).code === "SQLITE_BUSY";
    const why = locked ? "another process holds it; is a second server running?" : `${(error as Error).message}.`;
    throw new StartError(`CHAT_DB=${path}: the database cannot be opened and written: ${why}`);
  }
}

/** Takes the lock that keeps a second server off the database. @throws when it is taken */
function lockDatabase(path: string): Database {
  const lock = new Database(path);
  lock.run("PRAGMA busy_timeout = 500"); // of two that start at the same moment, one gets it
  lock.run("BEGIN EXCLUSIVE"); // and keeps it: it never ends
  return lock;
}

/** Opens the database for reading and writing, with its tables. @throws when that is not possible */
function openDatabase(path: string, sync: Config["sync"]): Database {
  const db = new Database(path, { create: true, readwrite: true, strict: true });
  db.run("PRAGMA busy_timeout = 500");
  db.run("PRAGMA journal_mode = WAL");
  db.run("PRAGMA wal_autocheckpoint = 4000"); // pages: 16 MB. A page that is written often is then copied once for many
  db.run(`PRAGMA synchronous = ${sync}`);
  db.run(`CREATE TABLE IF NOT EXISTS rooms (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, epoch TEXT NOT NULL)`);
  db.run(`CREATE TABLE IF NOT EXISTS messages (
    room INTEGER NOT NULL, seq INTEGER NOT NULL, at INTEGER NOT NULL, name TEXT NOT NULL, key TEXT, text TEXT NOT NULL,
    PRIMARY KEY (room, seq)) WITHOUT ROWID`);
  db.run("PRAGMA user_version = 1"); // The first write: a read-only file or a full disk is found now, not at the first post.
  return db;
}

// ─── Broker: Redis, for more than one server ─────────────────────────────────────────────────────────────────────────
//
// Keys, after CHAT_PREFIX:   room:<room>   hash: epoch, last …        log:<room>   stream: the messages, `<seq>-0` each
//                            keys:<room>   hash: key → seq            feed         stream: what happened, in all rooms
//                            here:<server>:<room>   presence          servers      sorted set: the servers that live
//                            generation    a time: a later one when Redis has lost something
//
// A post is stored by one script, which dedups, counts and writes log and feed in one step. Every server follows the feed
// on a connection of its own: it alone publishes, in the order it reads. Streams, not pub/sub: after an outage the
// tail goes on where it was, and finds in the logs what the feed no longer has.

/** Milliseconds that a tail read waits in Redis, and past which, with the margin, its connection is dead. */
const BLOCK_MS = 2000;
const BLOCK_MARGIN_MS = 1500;
/** Milliseconds for any other answer of Redis. */
const REDIS_MS = 2500;
/** Milliseconds without the feed after which this server sends its members away, to try again until it is back. */
const AWAY_MS = 3000;
/** Milliseconds between two tries to reach Redis: the first, and the longest. */
const RETRY_MS = 50;
const MAX_RETRY_MS = 1000;
/** Entries of the feed that are kept: what a server may lag behind before it must look into the logs. */
const FEED_ENTRIES = 4096;
/** Milliseconds between two signs of life of a server, and seconds after the last one until its members are gone. */
const HEARTBEAT_MS = 3000;
const ALIVE_SECONDS = 9;
/** Entries of the feed that are read at once. */
const FEED_READ = 1000;
/** Milliseconds that `stop` waits for Redis; with STOP_MS it is within the three seconds that a stop may take. */
const FINISH_MS = 800;
/** Messages of a room between two looks at what can be trimmed. */
const TRIM_EVERY = 100;
/** Posts that are stored in one round trip at most. */
const STORE_POSTS = 1000;
/** Seconds that a room lives at least after a server opened it; as long as it is open there, it is opened again twice in that time. */
const OPEN_SECONDS = 3600;

/**
 * What every script begins with. ARGV: prefix, the generation and the newest entry of its feed that are known here (both empty
 * at first), a new name. Redis may come back without what it had, or with an older state of it: that entry is missing then.
 * From there on everything is of another generation, and a log of an earlier one gets another epoch before it is used again.
 * Generations are times in microseconds, or later than the one before: that of an older state is known by it.
 * Every script ends with `answer`: the generation, the newest entry of its feed, and the result.
 */
const SCRIPT_HEAD = `
local prefix, known, newest, new = unpack(ARGV, 1, 4)
local feed, generation = prefix .. 'feed', redis.call('GET', prefix .. 'generation')
local there = generation == known and redis.call('XREVRANGE', feed, newest, '-', 'COUNT', 1)[1]
-- Where older entries are, and it is not, it was not trimmed.
if not generation or generation < known or there and there[1] ~= newest then
  local time = redis.call('TIME')
  generation = string.format('%016.0f', math.max(time[1] * 1000000 + time[2], (tonumber(known) or 0) + 1))
  redis.call('SET', prefix .. 'generation', generation)
  redis.call('XADD', feed, '*', 'room', '', 'from', '', 'what', 'generation', 'name', '') -- the feed is never empty
end
local function answer(result)
  return {generation, redis.call('XREVRANGE', feed, '+', '-', 'COUNT', 1)[1][1], result}
end
local function names(room)
  return prefix .. 'room:' .. room, prefix .. 'log:' .. room, prefix .. 'keys:' .. room
end
local function expire(idle, ...) -- in so many seconds, or never
  for _, name in ipairs({...}) do
    if idle > 0 then redis.call('EXPIRE', name, idle) else redis.call('PERSIST', name) end
  end
end
local function open(room)
  local meta, log, keys = names(room)
  local epoch, made_in = unpack(redis.call('HMGET', meta, 'epoch', 'generation'))
  if not epoch then
    redis.call('DEL', log, keys)
    redis.call('HSET', meta, 'last', 0)
    expire(${OPEN_SECONDS}, meta)
  end
  if made_in ~= generation then -- or it is new
    epoch = new
    redis.call('HSET', meta, 'epoch', epoch, 'generation', generation)
  end
  return epoch, meta, log, keys
end`;

/**
 * ARGV: history, seconds until an idle room expires (0: never), then of each post the room, its epoch as it is known here
 * ("": any will do), at, name, text, key. Returns of each the seq that it got, minus the one that it had already, or 0: the log
 * is another one, and what its sender posted before may be lost, and has to come again first.
 */
const APPEND_SCRIPT = `${SCRIPT_HEAD}
local history, idle = tonumber(ARGV[5]), tonumber(ARGV[6])
local seqs = {}
for i = 7, #ARGV, 6 do
  local room, expected, at, name, text, key = unpack(ARGV, i, i + 5)
  local epoch, meta, log, keys = open(room)
  local same = expected == '' or expected == epoch
  local stored = same and key ~= '' and redis.call('HGET', keys, key)
  if not same then
    seqs[#seqs + 1] = 0
  elseif stored then
    seqs[#seqs + 1] = -stored
  else
    local seq = redis.call('HINCRBY', meta, 'last', 1)
    redis.call('XADD', log, seq .. '-0', 'at', at, 'name', name, 'text', text, 'key', key)
    if key ~= '' then redis.call('HSET', keys, key, seq) end
    redis.call('XADD', feed, 'MAXLEN', '~', ${FEED_ENTRIES}, '*', 'room', room, 'epoch', epoch,
      'seq', seq, 'at', at, 'name', name, 'text', text, 'key', key)
    if seq > history and seq % ${TRIM_EVERY} == 0 then
      local old = redis.call('XRANGE', log, '-', (seq - history) .. '-0', 'COUNT', ${TRIM_MESSAGES})
      for _, entry in ipairs(old) do redis.call('HDEL', keys, entry[2][8]) end -- the value of its fourth field, key
      if old[1] then redis.call('XTRIM', log, 'MINID', old[#old][1]) end
    end
    expire(idle, meta, log, keys)
    seqs[#seqs + 1] = seq
  end
end
return answer(seqs)`;

/** Only looks whether Redis has lost something. */
const CHECK_SCRIPT = `${SCRIPT_HEAD}
return answer(false)`;

/** ARGV: room. Keeps it for a while, or makes it. Returns its epoch, the id of its oldest message, and the seq of its newest. */
const OPEN_SCRIPT = `${SCRIPT_HEAD}
local epoch, meta, log, keys = open(ARGV[5])
for _, name in ipairs({meta, log, keys}) do redis.call('EXPIRE', name, ${OPEN_SECONDS}, 'GT') end
local oldest = redis.call('XRANGE', log, '-', '+', 'COUNT', 1)[1]
return answer({epoch, oldest and oldest[1] or '1-0', redis.call('HGET', meta, 'last')})`;

/** ARGV: room, its epoch as it is known here, XRANGE or XREVRANGE, from, to, count. Returns entries, or nil: the log is another one. */
const READ_SCRIPT = `${SCRIPT_HEAD}
local epoch, meta, log = open(ARGV[5])
return answer(epoch == ARGV[6] and redis.call(ARGV[7], log, ARGV[8], ARGV[9], 'COUNT', ARGV[10]))`;

/** ARGV: this server, seconds. Says that this server lives, and returns all that do. */
const ALIVE_SCRIPT = `${SCRIPT_HEAD}
local servers, now = prefix .. 'servers', tonumber(redis.call('TIME')[1])
redis.call('ZREMRANGEBYSCORE', servers, '-inf', now)
redis.call('ZADD', servers, now + ARGV[6], ARGV[5])
return answer(redis.call('ZRANGE', servers, 0, -1))`;

/** A room's log as the Redis broker knows it, while the room is open here. */
interface RedisLog {
  readonly room: string;
  epoch: string;
  /** The newest seq that was told; undefined while the log is being opened. */
  last: number | undefined;
  /** What the feed brought while the log was being opened. */
  early: Entry[];
  /** What this server last said of the room's presence. */
  here: string;
}

/** A stored message, as the feed brings it. */
interface Entry {
  readonly epoch: string;
  readonly message: Message;
}

/** An entry of a stream: its id, and its fields and values in turn. */
type StreamEntry = [id: string, fields: string[]];

/** Keeps the logs in Redis, which any number of servers share. */
class RedisBroker implements Broker {
  /** This server's name among those that share the Redis. */
  readonly #server = randomName();
  readonly #logs = new Map<string, RedisLog>();
  readonly #gatherer = new Gatherer((posts) => void this.#storeInTurn(posts));
  /** Posts that are next, and whether others are being stored. */
  #waiting: Post[] = [];
  #storing = false;
  /** The connection for all but the tail; undefined until it is needed, and after it failed. */
  #commands: Bun.RedisClient | undefined;
  /** The {@link SCRIPT_HEAD generation} and the newest entry of its feed that are known here. */
  #generation = "";
  #newest = "";
  /** The last entry that the tail has read; undefined at first and in a new generation, until `#catchUp` finds where to begin. */
  #cursor: string | undefined;
  /** The connection for the tail. */
  #tail: Bun.RedisClient | undefined;
  /** Whether messages may be missing: the feed was cut before it was read, or Redis lost something. The tail looks into the logs. */
  #doubt = false;
  /** When few messages were last told, on the monotonic clock: after many there is no pause. */
  #toldAt = -Infinity;
  /** Posts that Redis does not take. */
  readonly #outage: Outage;
  /** Redis out of reach. */
  readonly #unreachable: Outage;
  /** Whether the feed is out of reach: rooms cannot be opened, posts are refused. */
  #away = true;
  #awayTimer: Timer | undefined;
  #heartbeat: Timer | undefined;
  /** Keeps the rooms that are open from expiring. */
  #keeper: Timer | undefined;
  /** The servers that live, as of the last heartbeat. */
  #alive: string[] = [];
  #stopped = false;

  /** @throws StartError when the address cannot be one of a Redis */
  constructor(
    readonly config: Config,
    readonly events: BrokerEvents,
    readonly log: Logger,
  ) {
    this.#outage = new Outage(log);
    this.#unreachable = new Outage(log);
    try {
      connectRedis(config.redisUrl).close();
    } catch (error) {
      throw new StartError(`REDIS_URL=${withoutPassword(config.redisUrl)}: ${(error as Error).message}.`);
    }
  }

  async start(): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    void this.#follow(resolve);
    this.#heartbeat = setInterval(() => void this.#beat(), HEARTBEAT_MS);
    // In doubt the tail opens every open room once more.
    this.#keeper = setInterval(() => (this.#doubt = true), (OPEN_SECONDS * 1000) / 2);
    await promise;
  }

  async open(room: string, opened: (state: LogState) => void): Promise<void> {
    if (this.#away) throw new Error("Redis cannot be reached");
    const log: RedisLog = { room, epoch: "", last: undefined, early: [], here: "" };
    this.#logs.set(room, log);
    const state = await this.#openLog(room);
    log.epoch = state.epoch;
    log.last = state.last;
    opened(state);
    this.#take(log, log.early.splice(0));
  }

  close(room: string): void {
    const log = this.#logs.get(room);
    this.#logs.delete(room);
    if (!log || log.here === "" || this.#away || this.#stopped) return;
    const said = this.#send("DEL", [this.#hereKey(this.#server, room)]).then(() => this.#notify("here", room, ""));
    said.catch(ignore);
  }

  append(post: Post): void {
    if (this.#away) this.events.refused([post]);
    else this.#gatherer.add(post);
  }

  async read(room: string, from: number, to: number, limit: number): Promise<Message[]> {
    const log = this.#logs.get(room);
    const entries = log && from <= to ? await this.#range(log, "XREVRANGE", to, from, limit) : [];
    return newestThatFit(entries.map(streamMessage));
  }

  async present(room: string, here: Here): Promise<Here[]> {
    const log = this.#logs.get(room);
    const own = JSON.stringify(here);
    if (log && log.here !== own) {
      log.here = own;
      await Promise.all([this.#keepHere(log), this.#notify("here", room, "")]).catch((error) => {
        log.here = ""; // to be said again
        throw error;
      });
    }
    const others = this.#alive.filter((server) => server !== this.#server);
    if (others.length === 0) return [here];
    const said = (await this.#send(
      "MGET",
      others.map((server) => this.#hereKey(server, room)),
    )) as (string | null)[];
    return [here, ...said.flatMap((each) => (each === null ? [] : [JSON.parse(each) as Here]))];
  }

  typing(room: string, name: string): void {
    if (this.#alive.length > 1) this.#notify("typing", room, name).catch(ignore);
  }

  async stop(): Promise<void> {
    this.#gatherer.flush();
    clearInterval(this.#heartbeat);
    clearInterval(this.#keeper);
    if (!this.#away) await inTime(this.#finish(), FINISH_MS).catch(ignore);
    this.#stopped = true;
    clearTimeout(this.#awayTimer); // not before: Redis may have gone while it was waited for
    this.#commands?.close();
    this.#tail?.close();
  }

  /** Takes this server off the list, and waits until what it has stored is told. */
  async #finish(): Promise<void> {
    while (this.#storing && !this.#stopped) await Bun.sleep(GATHER_MS);
    await this.#send("ZREM", [`${this.config.prefix}servers`, this.#server]);
    await this.#run(CHECK_SCRIPT, []);
    const last = this.#newest;
    while (idBefore(this.#cursor ?? last, last) && !this.#stopped) await Bun.sleep(GATHER_MS);
  }

  /** Stores posts, one batch after the other: nobody's later post is stored while it is open whether the earlier one was. */
  async #storeInTurn(posts: Post[]): Promise<void> {
    this.#waiting.push(...posts);
    if (this.#storing) return; // what is being stored now comes first, then these
    this.#storing = true;
    try {
      while (this.#waiting.length > 0) await this.#store(this.#waiting.splice(0, STORE_POSTS));
    } finally {
      this.#storing = false;
    }
  }

  /** Stores posts in one round trip. Those that are stored come back by the feed; the rest is told here. */
  async #store(gathered: Post[]): Promise<void> {
    // A sender may have been refused since they were gathered: what failed then must come again before these.
    const posts = gathered.filter(({ sender }) => !sender.refused);
    if (posts.length === 0) return;
    const { history, idleDays } = this.config;
    const args = [`${history}`, `${idleDays * DAY_SECONDS}`];
    const logs = posts.map(({ room }) => this.#logs.get(room));
    for (const [i, { room, at, name, text, key }] of posts.entries()) {
      // What a plain client posts may go to any log: it sends nothing again.
      const expected = key === undefined ? "" : (logs[i]?.epoch ?? "");
      args.push(room, expected, `${at}`, name, text, key ?? "");
    }
    try {
      const seqs = (await this.#run(APPEND_SCRIPT, args)) as number[];
      for (const [i, post] of posts.entries()) {
        const seq = seqs[i] as number;
        const log = logs[i];
        if (seq < 0) this.events.repeated(post, -seq);
        else if (seq === 0 && log) this.#lose(log);
      }
      this.#outage.ends("Redis takes posts again.");
    } catch (error) {
      this.#outage.begins(`Redis does not take posts, they are refused: ${(error as Error).message}`);
      this.events.refused(posts);
    }
  }

  // ── The tail ──

  /** Follows the feed for ever, each time on a new connection. */
  async #follow(tried: () => void): Promise<void> {
    for (let retry = RETRY_MS; !this.#stopped; retry = Math.min(MAX_RETRY_MS, retry * 2)) {
      const tail = (this.#tail = connectRedis(this.config.redisUrl));
      try {
        await inTime(tail.connect(), REDIS_MS);
        await this.#catchUp();
        this.#back();
        retry = RETRY_MS;
        tried();
        while (!this.#stopped) {
          if (this.#doubt) await this.#catchUp();
          await this.#readFeed(tail);
        }
      } catch (error) {
        if (!this.#stopped) this.#gone(error as Error);
        tried();
      } finally {
        tail.close();
      }
      if (!this.#stopped) await Bun.sleep(retry);
    }
  }

  /** Reads the feed once, and tells what it says. */
  async #readFeed(tail: Bun.RedisClient): Promise<void> {
    // Under load entries gather in the feed, as posts do before they are stored; enough at once need no wait.
    await Bun.sleep(Math.max(0, this.#toldAt + GATHER_MS - performance.now()));
    const feed = `${this.config.prefix}feed`;
    const from = this.#cursor;
    if (from === undefined) return; // a new generation: first `#catchUp`
    const args = ["COUNT", `${FEED_READ}`, "BLOCK", `${BLOCK_MS}`, "STREAMS", feed, from];
    const reply = (await inTime(tail.send("XREAD", args), BLOCK_MS + BLOCK_MARGIN_MS)) as Record<
      string,
      StreamEntry[]
    > | null;
    if (reply === null || this.#cursor === undefined) return; // silence; or a new generation has begun meanwhile
    const byRoom = new Map<RedisLog, Entry[]>();
    const read = reply[feed] ?? [];
    this.#cursor = read.at(-1)?.[0] ?? from;
    if (idBefore(this.#newest, this.#cursor)) this.#newest = this.#cursor;
    for (const [, fields] of read) {
      // A message: room, epoch, seq, at, name, text, key. A notice: room, from, what, name. Each field by name and value.
      const [, room = "", secondField, epoch = "", , seq = "", ...rest] = fields;
      const log = this.#logs.get(room);
      if (log && secondField === "from") this.#hear(room, fields);
      if (!log || secondField !== "epoch") continue;
      const entries = byRoom.get(log) ?? [];
      entries.push({ epoch, message: streamMessage([seq, rest]) }); // the rest is as the log has it
      byRoom.set(log, entries);
    }
    for (const [log, entries] of byRoom) this.#take(log, entries);
    if (byRoom.size > 0 && read.length < GATHER_POSTS) this.#toldAt = performance.now();
    if (read.length < FEED_READ) return;
    // This server lags: what it has not read yet may be cut off by now.
    const [oldest] = (await this.#send("XRANGE", [feed, "-", "+", "COUNT", "1"])) as StreamEntry[];
    if (!oldest || idBefore(from, oldest[0])) this.#doubt = true;
  }

  /** A notice, by its fields: another server tells that presence changed, or that somebody types. */
  #hear(room: string, [, , , from, , what, , name = ""]: string[]): void {
    if (from === this.#server) return;
    if (what === "typing") this.events.typing(room, name);
    else this.events.presenceChanged(room);
  }

  /** Tells stored messages of a room, exactly those after the last one told. */
  #take(log: RedisLog, entries: Entry[]): void {
    if (log.last === undefined) return void log.early.push(...entries);
    if (this.#logs.get(log.room) !== log) return;
    const messages: Message[] = [];
    for (const { epoch, message } of entries) {
      if (epoch !== log.epoch) return this.#lose(log);
      const next = log.last + messages.length + 1;
      if (message.seq === next) messages.push(message);
      else if (message.seq > next) this.#doubt = true; // the feed was cut before it was read: the log has the rest
    }
    log.last += messages.length;
    // RULE 1: in the order of seq, and no await since `log.last` was read: by the tail, or by `open` what the tail brought before.
    for (const some of inFrames(messages)) this.events.stored(log.room, some);
  }

  /** After a connection was lost, or in doubt: brings every open room up to date, or loses it. */
  async #catchUp(): Promise<void> {
    await this.#run(CHECK_SCRIPT, []);
    this.#doubt = false;
    this.#cursor ??= this.#newest;
    const logs = [...this.#logs.values()].filter(({ last }) => last !== undefined);
    const states = await Promise.all(logs.map(({ room }) => this.#openLog(room)));
    for (const [i, log] of logs.entries()) {
      const { epoch, last } = states[i] as LogState;
      if (epoch === log.epoch) await this.#fill(log, last);
      else this.#lose(log);
    }
  }

  /** Tells what a log has after the last message told. */
  async #fill(log: RedisLog, last: number): Promise<void> {
    while ((log.last as number) < last && this.#logs.get(log.room) === log) {
      const next = (log.last as number) + 1;
      const messages = (await this.#range(log, "XRANGE", next, last, FEED_READ)).map(streamMessage);
      if (messages[0]?.seq !== next) return this.#lose(log); // trimmed: too far behind
      this.#take(
        log,
        messages.map((message) => ({ epoch: log.epoch, message })),
      );
    }
  }

  /** A room's log is another one now, or too far ahead: its members come back and take it from there. */
  #lose(log: RedisLog): void {
    if (this.#logs.get(log.room) === log) this.events.lost(log.room);
  }

  #back(): void {
    this.#unreachable.ends("Redis is there again.");
    clearTimeout(this.#awayTimer);
    this.#awayTimer = undefined;
    this.#away = false;
    void this.#beat();
  }

  /** The feed is out of reach. A short while is bridged; then members are sent to try again, here or at another server. */
  #gone(error: Error): void {
    const redis = `REDIS_URL=${withoutPassword(this.config.redisUrl)}`;
    this.#unreachable.begins(`${redis}: cannot be reached: ${error.message}. It is tried until it is there.`);
    this.#awayTimer ??= setTimeout(() => {
      this.#away = true;
      for (const room of [...this.#logs.keys()]) this.events.lost(room);
    }, AWAY_MS);
  }

  // ── Presence ──

  /** Says that this server lives and who is in its rooms, and finds out who else lives. */
  async #beat(): Promise<void> {
    if (this.#away || this.#stopped) return;
    try {
      const logs = [...this.#logs.values()];
      // First who is here, then that they count: whoever finds this server alive finds its people too.
      const kept = logs.filter(({ here }) => here !== "").map((log) => this.#keepHere(log));
      const said = this.#run(ALIVE_SCRIPT, [this.#server, `${ALIVE_SECONDS}`]);
      const [alive] = (await Promise.all([said, ...kept])) as [string[]];
      const changed = alive.toSorted().join() !== this.#alive.toSorted().join();
      this.#alive = alive;
      if (changed) for (const { room } of logs) this.events.presenceChanged(room);
    } catch (error) {
      this.log("debug", `A heartbeat failed: ${(error as Error).message}`);
    }
  }

  /** Writes who is in a room here; it is gone when this server no longer writes it. */
  #keepHere({ room, here }: RedisLog): Promise<unknown> {
    return this.#send("SET", [this.#hereKey(this.#server, room), here, "EX", `${ALIVE_SECONDS}`]);
  }

  #hereKey(server: string, room: string): string {
    return `${this.config.prefix}here:${server}:${room}`;
  }

  // ── Redis ──

  /** Opens a room's log in Redis, which keeps it from expiring for {@link OPEN_SECONDS}, and makes it if there is none. */
  async #openLog(room: string): Promise<LogState> {
    const [epoch, oldest, last] = (await this.#run(OPEN_SCRIPT, [room])) as [string, string, string];
    return { epoch, first: Number.parseInt(oldest), last: Number(last) };
  }

  /** Writes what is not stored into the feed: four fields, where a message has seven. */
  #notify(what: "here" | "typing", room: string, name: string): Promise<unknown> {
    const fields = ["room", room, "from", this.#server, "what", what, "name", name];
    return this.#send("XADD", [`${this.config.prefix}feed`, "MAXLEN", "~", `${FEED_ENTRIES}`, "*", ...fields]);
  }

  /** Entries of an open room's log. There are none when it is another log by now. */
  async #range(log: RedisLog, command: "XRANGE" | "XREVRANGE", from: number, to: number, count: number) {
    const args = [log.room, log.epoch, command, `${from}-0`, `${to}-0`, `${count}`];
    const entries = (await this.#run(READ_SCRIPT, args)) as StreamEntry[] | null;
    if (!entries) this.#lose(log);
    return entries ?? [];
  }

  /**
   * Runs a script, and notices when Redis has lost something: all open logs are looked at, the feed is read from its end.
   * It is sent whole: sent by its hash, it would have to be sent again to a Redis that has forgotten it.
   */
  async #run(script: string, args: string[]): Promise<unknown> {
    const head = [this.config.prefix, this.#generation, this.#newest, randomName()];
    const answer = await this.#send("EVAL", [script, "0", ...head, ...args]);
    const [generation, newest, result] = answer as [string, string, unknown];
    if (generation !== this.#generation) {
      this.#generation = generation;
      this.#newest = newest;
      this.#cursor = undefined;
      this.#doubt = true;
    }
    if (idBefore(this.#newest, newest)) this.#newest = newest;
    return result;
  }

  /** Sends a command. A connection that fails or is silent for {@link REDIS_MS} is given up for a new one. */
  async #send(command: string, args: string[]): Promise<unknown> {
    const redis = (this.#commands ??= connectRedis(this.config.redisUrl));
    try {
      return await inTime(redis.send(command, args), REDIS_MS);
    } catch (error) {
      if ((error as { code?: string }).code !== "ERR_REDIS_SERVER_ERROR") {
        if (this.#commands === redis) this.#commands = undefined;
        redis.close();
      }
      throw error;
    }
  }
}

function withoutPassword(url: string): string {
  return url.replace(/\/\/.*@/, "//…@"); // up to the last one: a password may have an @
}

/** A connection that is made by its first command and never again: it is replaced instead. */
function connectRedis(url: string): Bun.RedisClient {
  return new Bun.RedisClient(url, { autoReconnect: false, connectionTimeout: REDIS_MS });
}

/** A message as a log's stream has it. */
function streamMessage([id, [, at, , name = "", , text = "", , key]]: StreamEntry): Message {
  return makeMessage(Number.parseInt(id), Number(at), name, text, key);
}

/** Messages in runs that each make a frame of bounded size, however many a server that lagged has read at once. */
function* inFrames(messages: Message[]): Generator<Message[]> {
  let from = 0;
  let characters = 0;
  for (const [i, { text }] of messages.entries()) {
    characters += text.length;
    if (characters < GATHER_CHARACTERS && i < messages.length - 1) continue;
    yield messages.slice(from, i + 1);
    from = i + 1;
    characters = 0;
  }
}

/** Rejects when a promise takes too long. */
function inTime<T>(promise: Promise<T>, ms: number): Promise<T> {
  const late = Promise.withResolvers<never>();
  const timer = setTimeout(() => late.reject(new Error(`no answer in ${ms} ms`)), ms);
  return Promise.race([promise, late.promise]).finally(() => clearTimeout(timer));
}

/** Whether a stream id comes before another. */
function idBefore(one: string, other: string): boolean {
  const [a = 0, b = 0] = one.split("-").map(Number);
  const [c = 0, d = 0] = other.split("-").map(Number);
  return a < c || (a === c && b < d);
}

/** For what may fail without harm. */
function ignore(): null {
  return null;
}

// ─── Rooms: who is where, and the way of a message ───────────────────────────────────────────────────────────────────

type Socket = Bun.ServerWebSocket<Member>;

/** Where a client that comes back left off. */
interface Resume {
  readonly epoch: string;
  readonly after: number;
}

/** One connection, as `ws.data`. */
class Member {
  /** Set when the socket opens. */
  ws!: Socket;
  /** The one that took it in. */
  server!: Bun.Server<Member>;
  room!: Room;
  /** Whether the hello was sent and messages arrive; frames that come before that wait in the queue. */
  joined = false;
  /** Whether the password is missing: the socket is closed as soon as it opens, and never enters its room. */
  lockedOut = false;
  /** Whether a post was refused: what was sent after it must not be stored before it comes again. */
  refused = false;
  /** Whether the socket has closed; what waits in the queue is still sent. */
  left = false;
  /** The token bucket: frames that may be acted on now, and when that was true. */
  tokens: number;
  refilledAt = performance.now();
  /** Frames that came too fast, or before the hello, in order; its size in bytes; and the timer that takes from it. */
  queue: (ClientFrame | FrameError)[] = [];
  queueBytes = 0;
  draining: Timer | undefined;
  /** Frames that were not of the protocol. */
  strikes = 0;
  typedAt = -Infinity;

  constructor(
    readonly roomName: string,
    /** Where it comes from, for the log. */
    readonly address: string,
    /** Whether it speaks `chat.v1`; else plain. */
    readonly chat: boolean,
    public name: string,
    /** Whether the name that it asked for could not be given. Nobody tells that to a plain socket. */
    readonly badName: boolean,
    readonly resume: Resume | undefined,
    burst: number,
  ) {
    this.tokens = burst;
  }
}

/** A room while somebody is in it. */
class Room {
  readonly members = new Set<Member>();
  readonly chatTopic: string;
  readonly plainTopic: string;
  /** Members of `chat.v1` by name, how many have it, in the order of coming. */
  readonly names = new Map<string, number>();
  /** Members who have joined, in each dialect. */
  chatCount = 0;
  plainCount = 0;
  /** Settles when the log is open; the three below are true from then on. */
  opened!: Promise<void>;
  epoch = "";
  /** The oldest seq as it was then. */
  oldest = 1;
  /** The newest seq that was delivered here. */
  last = 0;
  /** The hellos as they are now, by the `after` they answer: made once for each change, not once for each join. */
  readonly hellos = new Map<number, Promise<string>>();
  /** Their size, in UTF-16 units. */
  hellosLength = 0;
  /** What was delivered since somebody who is joining began to read the log. */
  readonly joining = new Set<Message[]>();
  /** The last presence frame, when it went out, and the timer for the next. */
  presence = "";
  presenceAt = -Infinity;
  presenceTimer: Timer | undefined;

  constructor(readonly name: string) {
    this.chatTopic = `chat.v1/${name}`;
    this.plainTopic = `plain/${name}`;
  }
}

const PONG = encode({ type: "pong" });
/**
 * UTF-16 units of the hellos that are kept ready for one room, past which they are dropped before the next is made: enough for
 * those who come back together after an outage.
 */
const HELLOS_LENGTH = 8 * 1024 * 1024;
/** The key in {@link Room.hellos} of the hello for those who start afresh. */
const AFRESH = -1;

/** All rooms of this server: takes frames in, hands posts to the broker, and gives what is stored to everyone. */
class Rooms implements BrokerEvents {
  broker!: Broker;
  /** Set when the server goes down: from then on frames are ignored. */
  stopping = false;
  readonly #rooms = new Map<string, Room>();
  /** Bytes in the queues of members who have closed. */
  #leftBytes = 0;
  /** Logs that cannot be read. */
  readonly #outage: Outage;

  constructor(
    readonly config: Config,
    readonly log: Logger,
    /** Sends a frame to every socket that subscribed to a topic. */
    readonly publish: (topic: string, frame: string, except?: Member) => void,
  ) {
    this.#outage = new Outage(log);
  }

  // ── In ──

  /** A socket opened: joins its room. */
  enter(ws: Socket): void {
    const member = ws.data;
    if (member.lockedOut) return ws.close(CLOSE.password, "A password is needed.");
    member.ws = ws;
    const room = this.#rooms.get(member.roomName) ?? this.#open(member.roomName);
    member.room = room;
    room.members.add(member);
    this.#join(member, room).catch((error: Error) => {
      this.#outage.begins(`The log of ${describe(room.name)} cannot be read: ${error.message}`);
      member.refused = true;
      if (member.left) this.#drop(member);
      else ws.close(CLOSE.tryAgain, "The store cannot be reached: try again.");
    });
  }

  #open(name: string): Room {
    const room = new Room(name);
    this.#rooms.set(name, room);
    room.opened = this.broker.open(name, ({ epoch, first, last }) => {
      room.epoch = epoch;
      room.oldest = first;
      room.last = last;
    });
    return room;
  }

  async #join(member: Member, room: Room): Promise<void> {
    await room.opened;
    await this.#caughtUp(room, member.resume);
    const missed: Message[] = [];
    let hello = "";
    if (member.chat) {
      room.joining.add(missed);
      try {
        hello = await this.#hello(room, member.resume);
      } finally {
        room.joining.delete(missed);
      }
    }
    // RULE 2: no await from here to the end. What was delivered since the hello was read is in `missed`.
    const { ws } = member;
    if (ws.readyState !== WebSocket.OPEN) return this.#drain(member); // closed by now; what it sent before is still sent
    if (member.chat) ws.send(hello);
    if (missed.length > 0) ws.send(encode({ type: "messages", messages: missed }));
    ws.subscribe(member.chat ? room.chatTopic : room.plainTopic);
    member.joined = true;
    this.#count(room, member, +1);
    if (member.badName) this.#complain(member, badName());
    room.presence = ""; // whoever joins has not seen it, even if it is the same again
    this.#presenceChanged(room);
    this.#outage.ends("Logs can be read again.");
    this.log("info", `${member.address} joined ${describe(room.name)} (${member.chat ? member.name : "plain"})`);
    this.#drain(member);
  }

  /** Whoever comes from another server may have seen there what has yet to be delivered here: a moment is waited for it. */
  async #caughtUp(room: Room, resume: Resume | undefined): Promise<void> {
    const until = performance.now() + BEHIND_MS;
    const behind = () => resume?.epoch === room.epoch && resume.after > room.last;
    while (behind() && performance.now() < until) await Bun.sleep(GATHER_MS);
  }

  /** The hello for somebody who left off at `resume`, from the cache or from the log. */
  #hello(room: Room, resume: Resume | undefined): Promise<string> {
    const first = this.#first(room);
    const resumable =
      resume?.epoch === room.epoch &&
      resume.after >= first - 1 &&
      resume.after <= room.last &&
      room.last - resume.after <= RESUME_MESSAGES;
    const after = resumable ? resume.after : AFRESH;
    let hello = room.hellos.get(after);
    if (!hello) {
      if (room.hellosLength > HELLOS_LENGTH) this.#forgetHellos(room);
      room.hellos.set(after, (hello = this.#makeHello(room, first, room.last, after)));
      hello.then(
        ({ length }) => (room.hellosLength += length),
        () => this.#forgetHellos(room), // the next who joins reads again
      );
    }
    return hello;
  }

  #forgetHellos(room: Room): void {
    room.hellos.clear();
    room.hellosLength = 0;
  }

  async #makeHello(room: Room, first: number, last: number, after: number): Promise<string> {
    const wanted = after === AFRESH ? PAGE_MESSAGES : last - after;
    const found = wanted > 0 ? await this.broker.read(room.name, Math.max(first, last - wanted + 1), last, wanted) : [];
    const resumed = after !== AFRESH && found.length === wanted; // fewer: they were too long for one frame
    return encode({
      type: "hello",
      epoch: room.epoch,
      first,
      last,
      resumed,
      messages: resumed ? found : found.slice(-PAGE_MESSAGES),
      limits: { text: MAX_TEXT, name: MAX_NAME },
    });
  }

  /** The oldest seq that counts as kept; rows before it are trimmed in time. */
  #first(room: Room): number {
    return Math.max(room.oldest, room.last - this.config.history + 1);
  }

  /** A frame arrived: receive. */
  receive(ws: Socket, data: string | Buffer): void {
    if (ws.readyState !== WebSocket.OPEN) return; // frames that were read together with one that closed the connection
    if (typeof data !== "string") return ws.close(CLOSE.binary, "Only text frames are understood here.");
    const member = ws.data;
    if (!member.chat) return this.#pace(member, { type: "post", text: data });
    const frame = parseFrame(data);
    if (!member.joined) return this.#pace(member, frame); // the hello comes before any answer
    if (frame instanceof FrameError) return this.#complain(member, frame);
    // A ping passes the queue, so that a sender who is slowed does not take the connection for dead.
    if (frame.type === "ping") return void ws.send(PONG);
    this.#pace(member, frame);
  }

  /** Acts on a frame at once while the sender keeps to the rate; else the frame waits its turn in the sender's queue. */
  #pace(member: Member, frame: ClientFrame | FrameError): void {
    if (member.joined && member.queue.length === 0 && this.#takeToken(member)) return this.#act(member, frame);
    member.queue.push(frame);
    member.queueBytes += queueCost(frame);
    if (member.queueBytes >= QUEUE_BYTES && !member.ws.isPaused) member.ws.pause();
    if (member.joined) this.#drainLater(member);
  }

  /** Takes as many frames from the queue as the rate allows. */
  #drain(member: Member): void {
    member.draining = undefined;
    while (member.queue.length > 0 && this.#takeToken(member)) {
      const frame = member.queue.shift() as ClientFrame | FrameError;
      const cost = queueCost(frame);
      member.queueBytes -= cost;
      if (member.left) this.#leftBytes -= cost;
      this.#act(member, frame); // may end in `leave`, when the post cannot be stored
    }
    if (member.ws.isPaused && member.queueBytes < QUEUE_BYTES / 2) member.ws.resume();
    if (member.queue.length > 0) this.#drainLater(member);
    else if (member.left) this.#release(member);
  }

  #drainLater(member: Member): void {
    member.draining ??= setTimeout(() => this.#drain(member), 1000 / this.config.rate);
  }

  #takeToken(member: Member): boolean {
    const { rate } = this.config;
    if (rate === 0) return true;
    const now = performance.now();
    member.tokens = Math.min(rate * BURST_SECONDS, member.tokens + ((now - member.refilledAt) / 1000) * rate);
    member.refilledAt = now;
    if (member.tokens < 1) return false;
    member.tokens--;
    return true;
  }

  /** Does what a frame asks. */
  #act(member: Member, frame: ClientFrame | FrameError): void {
    if (this.stopping || member.refused) return;
    if (frame instanceof FrameError) this.#complain(member, frame);
    else if (frame.type === "post") this.#post(member, frame.text, frame.key);
    else if (frame.type === "page") this.#page(member, frame.before);
    else if (frame.type === "name") this.#rename(member, frame.name);
    else if (frame.type === "typing") this.#typing(member);
    else member.ws.send(PONG);
  }

  /** Hands a post to the broker. */
  #post(member: Member, text: string, key: string | undefined): void {
    const { room, name } = member;
    if (longerThan(text, MAX_TEXT)) {
      const why = `A text has at most ${MAX_TEXT} bytes.`;
      if (member.chat) this.#complain(member, new FrameError("too-long", why), key);
      else member.ws.close(CLOSE.tooBig, why);
      return;
    }
    if (member.chat && !KEY.test(key ?? "")) {
      return this.#complain(
        member,
        new FrameError("bad-key", "A key is 1 to 64 characters of A-Z, a-z, 0-9, _ and -."),
      );
    }
    if (member.chat && text === "") return this.#complain(member, new FrameError("empty", "The text is empty."), key);
    // A lone surrogate has no UTF-8: it is replaced here, so that what is seen now and what is read later are the same.
    this.broker.append({ room: room.name, at: Date.now(), name, text: text.toWellFormed(), key, sender: member });
  }

  #page(member: Member, before: number): void {
    const { room, ws } = member;
    if (!Number.isSafeInteger(before) || before < 1) {
      return this.#complain(member, new FrameError("bad-frame", '"before" is a seq: a whole number from 1.'));
    }
    const to = Math.min(before - 1, room.last);
    const from = Math.max(this.#first(room), to - PAGE_MESSAGES + 1);
    this.broker.read(room.name, from, to, PAGE_MESSAGES).then(
      (messages) => ws.send(encode({ type: "page", messages })),
      () => ws.close(CLOSE.tryAgain, "The store cannot be reached: try again."),
    );
  }

  #rename(member: Member, name: string): void {
    const clean = cleanName(name);
    if (clean === undefined) return this.#complain(member, badName());
    if (member.joined) {
      this.#countName(member.room, member.name, -1);
      this.#countName(member.room, clean, +1);
      this.#presenceChanged(member.room);
    }
    member.name = clean;
  }

  #typing(member: Member): void {
    const now = performance.now();
    if (now - member.typedAt < TYPING_MS) return;
    member.typedAt = now;
    this.publish(member.room.chatTopic, encode({ type: "typing", name: member.name }), member);
    this.broker.typing(member.room.name, member.name);
  }

  /** Tells a client what was wrong with its frame, and ends the connection that keeps sending something else. */
  #complain(member: Member, { code, text }: FrameError, key?: string): void {
    const known = key !== undefined && KEY.test(key);
    member.ws.send(encode(known ? { type: "error", code, text, key } : { type: "error", code, text }));
    if (code !== "bad-frame" || ++member.strikes < MAX_STRIKES) return;
    member.ws.close(CLOSE.protocol, `${MAX_STRIKES} frames were not of the protocol chat.v1.`);
  }

  // ── Out ──

  /** Messages were stored: deliver them. */
  stored(name: string, messages: Message[]): void {
    if (this.config.logLevel === "debug") {
      for (const { seq, name: who, text } of messages) {
        this.log("debug", `${describe(name)} #${seq} ${who}: ${JSON.stringify(text)}`);
      }
    }
    const room = this.#rooms.get(name);
    if (!room) return;
    room.last += messages.length;
    this.#forgetHellos(room);
    for (const missed of room.joining) missed.push(...messages);
    // RULE 1: no await since SQLite has committed them, or Redis has given them.
    if (room.chatCount > 0) this.publish(room.chatTopic, encode({ type: "messages", messages }));
    if (room.plainCount > 0) for (const { text } of messages) this.publish(room.plainTopic, text);
  }

  repeated(post: Post, seq: number): void {
    post.sender.ws.send(encode({ type: "ack", key: post.key as string, seq }));
  }

  refused(posts: Post[]): void {
    for (const { sender } of posts) {
      sender.refused = sender.chat; // a plain client sends nothing again: what it has in the queue is still tried
      sender.ws.close(CLOSE.tryAgain, "The message could not be stored: try again.");
    }
  }

  // ── Presence ──

  #count(room: Room, member: Member, change: 1 | -1): void {
    if (!member.chat) return void (room.plainCount += change);
    room.chatCount += change;
    this.#countName(room, member.name, change);
  }

  #countName(room: Room, name: string, change: 1 | -1): void {
    const count = (room.names.get(name) ?? 0) + change;
    if (count > 0) room.names.set(name, count);
    else room.names.delete(name);
  }

  /** Sends presence at once when the last one is a second past, else when it is. */
  #presenceChanged(room: Room): void {
    if (this.#rooms.get(room.name) !== room) return; // lost: another room may have its name and its topics by now
    const wait = room.presenceAt + PRESENCE_MS - performance.now();
    room.presenceTimer ??= setTimeout(() => this.#sendPresence(room), Math.max(0, wait));
  }

  async #sendPresence(room: Room): Promise<void> {
    room.presenceTimer = undefined;
    room.presenceAt = performance.now();
    const own: Here = {
      count: room.chatCount + room.plainCount,
      names: [...room.names.keys().take(PRESENCE_NAMES)],
    };
    const all = await this.broker.present(room.name, own).catch(() => undefined);
    if (this.#rooms.get(room.name) !== room) return;
    if (!all) return this.#presenceChanged(room); // the store did not say: asked again in a second
    const count = all.reduce((sum, here) => sum + here.count, 0);
    const names = [...new Set(all.flatMap((here) => here.names))].slice(0, PRESENCE_NAMES);
    const frame = encode({ type: "presence", count, names });
    if (frame === room.presence) return;
    room.presence = frame;
    this.publish(room.chatTopic, frame);
  }

  /** Presence changed on another server. */
  presenceChanged(name: string): void {
    const room = this.#rooms.get(name);
    if (room) this.#presenceChanged(room);
  }

  /** Somebody types on another server. */
  typing(name: string, who: string): void {
    const room = this.#rooms.get(name);
    if (room) this.publish(room.chatTopic, encode({ type: "typing", name: who }));
  }

  // ── Going ──

  /**
   * A socket closed. What it sent too fast is still sent: a script that posts 300 lines and ends loses none, unless
   * {@link LEFT_BYTES} wait already or the server stops.
   */
  leave(ws: Socket, code: number): void {
    const member = ws.data;
    if (member.lockedOut) return;
    const { room } = member;
    member.left = true;
    if (member.joined) {
      this.#count(room, member, -1);
      this.#presenceChanged(room);
      this.log("info", `${member.address} left ${describe(room.name)} (${code})`);
    }
    member.joined = false;
    this.#leftBytes += member.queueBytes;
    const keep = member.queue.length > 0 && !this.stopping && !member.refused && this.#leftBytes <= LEFT_BYTES;
    if (!keep) this.#drop(member);
  }

  /** Forgets what a member who has left did not get to send. */
  #drop(member: Member): void {
    this.#leftBytes -= member.queueBytes;
    member.queue = [];
    member.queueBytes = 0;
    this.#release(member);
  }

  /** Nothing of a member is left to do; the last one closes the room. */
  #release(member: Member): void {
    const { room } = member;
    clearTimeout(member.draining);
    room.members.delete(member);
    if (room.members.size === 0 && this.#rooms.get(room.name) === room) this.#close(room);
  }

  #close(room: Room): void {
    clearTimeout(room.presenceTimer);
    this.#rooms.delete(room.name);
    this.broker.close(room.name);
  }

  /** A room's log is lost: whoever is in the room comes back to another one. */
  lost(name: string): void {
    const room = this.#rooms.get(name);
    if (!room) return;
    this.#close(room);
    for (const member of room.members) {
      member.refused = member.chat; // it sends again what is not confirmed, from the first on
      member.ws.close(CLOSE.tryAgain, "The log cannot be followed: come back.");
    }
  }

  /** Closes every socket with 1001. What was delivered goes out before the Close frame. */
  closeAll(): void {
    for (const room of this.#rooms.values()) {
      for (const member of room.members) {
        if (member.left) this.#drop(member);
        else member.ws.close(CLOSE.goingDown, "The server goes down: come back soon.");
      }
    }
  }
}

function badName(): FrameError {
  return new FrameError("bad-name", `A name has 1 to ${MAX_NAME} characters, and no control characters.`);
}

function queueCost(frame: ClientFrame | FrameError): number {
  if (frame instanceof FrameError) return QUEUE_FRAME_BYTES;
  // All its strings: a key or a name that is too long is refused only when its turn comes.
  if (frame.type === "post")
    return QUEUE_FRAME_BYTES + Buffer.byteLength(frame.text) + Buffer.byteLength(frame.key ?? "");
  return QUEUE_FRAME_BYTES + (frame.type === "name" ? Buffer.byteLength(frame.name) : 0);
}

function describe(room: string): string {
  return room === "" ? "the lobby" : `room "${room}"`;
}

// ─── Access: origin, password, address ───────────────────────────────────────────────────────────────────────────────

/** Whether a request comes from the server's own page, from an allowed one, or from no page at all. RFC 6455 section 10.2. */
function originAllowed(headers: Headers, allowed: readonly string[]): boolean {
  const origin = headers.get("origin");
  if (origin === null || allowed.includes("*")) return true;
  const url = URL.parse(origin);
  if (!url) return false; // "null": a sandboxed frame or a local file
  const isHost = (host: string | null) => URL.parse(`${url.protocol}//${host}`)?.host === url.host;
  return isHost(headers.get("host")) || allowed.some((entry) => entry === url.origin || isHost(entry));
}

/** The address that a request comes from, seen past as many proxies as are trusted. */
function addressOf(request: Request, server: Bun.Server<Member>, proxies: number): string {
  const socket = server.requestIP(request)?.address.replace(/^::ffff:/, "") ?? ""; // IPv4 that came to an IPv6 socket
  if (proxies === 0) return socket;
  // Each proxy appends the address that it was reached from. Counted from the right, what a client made up is not reached.
  const forwarded =
    request.headers
      .get("x-forwarded-for")
      ?.split(",")
      .map((address) => address.trim()) ?? [];
  // Some proxies add the port too: another for each connection.
  const address = forwarded[Math.max(0, forwarded.length - proxies)] ?? "";
  return /^(?:\[(.+)\]|([\d.]+))(?::\d+)?$/.exec(address)?.slice(1).find(Boolean) ?? (address || socket);
}

/** Wrong passwords from one address. */
interface Tries {
  count: number;
  /** When the last one was made, and until when the next ones are refused unseen: seconds on the monotonic clock. */
  at: number;
  until: number;
}

/** Asks for the password, when there is one: by a session cookie, which `login` gives, or by `Authorization: Bearer`. */
class Access {
  /** Signs cookies and hashes what is compared. Made slowly from the password, so that a stolen cookie is no quick way to it. */
  readonly #key: Buffer;
  /** The cookie's name: of each password another, since a browser keeps one jar for all the ports of a host. */
  readonly #cookie: string;
  /** The addresses that gave wrong passwords, the longest silent first. */
  readonly #tries = new Map<string, Tries>();

  constructor(readonly config: Config) {
    this.#key = config.password === "" ? Buffer.alloc(0) : scryptSync(config.password, "chat session", 32);
    this.#cookie = `chat-${this.#hash("name of the cookie").toString("hex").slice(0, 8)}`;
  }

  /** Undefined when the request may come in, else the refusal. */
  check(request: Request, server: Bun.Server<Member>): Response | undefined {
    if (this.config.password === "") return undefined;
    const { headers } = request;
    const cookie = new Bun.CookieMap(headers.get("cookie") ?? "").get(this.#cookie);
    if (cookie && this.#isSession(cookie)) return undefined;
    const bearer = /^Bearer (.*)$/i.exec(headers.get("authorization") ?? "")?.[1];
    if (bearer !== undefined) return this.#try(bearer, request, server);
    return refuse(401, "A password is needed.", { "WWW-Authenticate": "Bearer" });
  }

  /** Answers the page's password form: 204 with a session cookie, 401, or 429 with the seconds to wait. */
  async login(request: Request, server: Bun.Server<Member>): Promise<Response> {
    if (!originAllowed(request.headers, this.config.origins))
      return refuse(403, "Pages of this origin may not log in.");
    const given = new URLSearchParams(await request.text()).get("password") ?? "";
    // No await from here on: tries that come at the same time are counted one after the other.
    const refused = this.#try(given, request, server);
    if (refused) return refused;
    const secure =
      this.config.tlsCert !== "" || (this.config.proxies > 0 && request.headers.get("x-forwarded-proto") === "https");
    const attributes = `Path=/; Max-Age=${SESSION_SECONDS}; HttpOnly; SameSite=Strict${secure ? "; Secure" : ""}`;
    const cookie = `${this.#cookie}=${this.#newSession()}; ${attributes}`;
    return new Response(null, { status: 204, headers: { "Set-Cookie": cookie } });
  }

  /** Compares a password in constant time, and makes an address that guesses wait. */
  #try(given: string, request: Request, server: Bun.Server<Member>): Response | undefined {
    const address = networkOf(addressOf(request, server, this.config.proxies));
    const now = performance.now() / 1000;
    let tries = this.#tries.get(address);
    if (!tries || now - tries.at > FORGET_SECONDS) tries = { count: 0, at: now, until: now };
    if (now < tries.until) {
      return refuse(429, "Too many wrong passwords: wait.", { "Retry-After": `${Math.ceil(tries.until - now)}` });
    }
    if (timingSafeEqual(this.#hash(given), this.#hash(this.config.password))) {
      this.#tries.delete(address);
      return undefined;
    }
    const costly = ++tries.count - FREE_TRIES;
    const wait = costly <= 0 ? 0 : Math.min(MAX_WAIT_SECONDS, 2 ** (costly - 1));
    this.#remember(address, { count: tries.count, at: now, until: now + wait });
    return refuse(401, "The password is wrong.", { "WWW-Authenticate": "Bearer" });
  }

  #remember(address: string, tries: Tries): void {
    this.#tries.delete(address); // and in again, as the newest
    this.#tries.set(address, tries);
    if (this.#tries.size <= MAX_ADDRESSES) return;
    const [longestSilent = ""] = this.#tries.keys();
    this.#tries.delete(longestSilent);
  }

  /** A session: when it ends, signed. Nothing is stored; with another password the signature is another. */
  #newSession(): string {
    const ends = `${Math.floor(Date.now() / 1000) + SESSION_SECONDS}`;
    return `${ends}.${this.#hash(ends).toString("base64url")}`;
  }

  #isSession(cookie: string): boolean {
    const [ends = "", signature = ""] = cookie.split(".");
    const [given, right] = [Buffer.from(signature, "base64url"), this.#hash(ends)];
    return given.length === right.length && timingSafeEqual(given, right) && Number(ends) > Date.now() / 1000;
  }

  #hash(text: string): Buffer {
    return createHmac("sha256", this.#key).update(text).digest();
  }
}

/** The network that an address stands for: of IPv6 the first 64 bits, which one subscriber has for itself. */
function networkOf(address: string): string {
  if (!address.includes(":") || address.includes(".")) return address;
  const [head = "", tail = ""] = address.split("::");
  const [before, after] = [head.split(":"), tail === "" ? [] : tail.split(":")];
  const zeros = Array<string>(Math.max(0, 8 - before.length - after.length)).fill("0");
  return [...before, ...zeros, ...after].slice(0, 4).join(":");
}

// ─── Server: the handshake, the page, start and stop ─────────────────────────────────────────────────────────────────

/** A running chat. */
export interface Chat {
  /** The address to open, with the port that was taken; ends with a slash. */
  readonly url: string;
  /** Reads the TLS files again, for connections from now on; nobody is cut. @throws StartError when they are bad: the old stay */
  reloadTls(): void;
  /** Stops accepting, stores and delivers what was taken, closes sockets with 1001 and the store. Takes at most 3 s. */
  stop(): Promise<void>;
}

/**
 * Starts a chat.
 * @param overrides what differs from the defaults; it is not checked
 * @throws StartError when the store cannot be opened, or the port cannot be listened on
 */
export async function startChat(overrides: Partial<Config> = {}): Promise<Chat> {
  const config: Config = Object.freeze({ ...readConfig({}), ...overrides });
  const log = makeLogger(config.logLevel);
  // More than one only after `reloadTls`. None is ever dropped: a connection that it had accepted may still become a socket.
  const servers: Bun.Server<Member>[] = [];
  const rooms = new Rooms(config, log, (topic, frame, except) => {
    for (const server of servers) {
      if (server === except?.server)
        except.ws.publish(topic, frame, false); // leaves out the sender
      else server.publish(topic, frame, false);
    }
  });
  const broker = config.redisUrl === "" ? new SqliteBroker(config, rooms, log) : new RedisBroker(config, rooms, log);
  rooms.broker = broker;
  await broker.start();
  const handlers = makeHandlers(config, rooms, log);
  try {
    servers.push(listen(config, readTls(config), handlers));
  } catch (error) {
    await broker.stop();
    throw error;
  }
  const { port } = servers[0] as Bun.Server<Member>;
  const watch = watchDescriptors(log);
  const reloadTls = () => {
    const tls = readTls(config);
    // A server on another port tries them first: if they are bad, nothing has happened.
    void listen({ ...config, port: 0, host: "127.0.0.1" }, tls, handlers).stop(true);
    for (const server of servers) void server.stop(); // accepts no more; its sockets live on
    servers.push(listen({ ...config, port: port as number }, tls, handlers));
  };
  const stop = async () => {
    const closed = Promise.all(servers.map((server) => server.stop()));
    rooms.stopping = true;
    clearInterval(watch);
    await broker.stop();
    rooms.closeAll();
    await inTime(closed, STOP_MS).catch(ignore); // whoever has not answered by then is cut
    for (const server of servers) void server.stop(true);
  };
  let stopped: Promise<void> | undefined;
  const host = config.host.includes(":") ? `[${config.host}]` : config.host || "localhost";
  const url = `${config.tlsCert === "" ? "http" : "https"}://${host}:${port}/`;
  return { url, reloadTls, stop: () => (stopped ??= stop()) };
}

/** Says when no file descriptor is free: nobody else can connect then, and Bun does not tell. */
function watchDescriptors(log: Logger): Timer {
  const outage = new Outage(log);
  return setInterval(() => {
    let exhausted = false;
    try {
      closeSync(openSync("/dev/null", "r"));
    } catch (error) {
      exhausted = /^E[MN]FILE$/.test((error as { code?: string }).code ?? "");
    }
    if (!exhausted) return outage.ends("File descriptors are free again.");
    outage.begins("No file descriptor is free, nobody else can connect: raise the limit (ulimit -n, LimitNOFILE).");
  }, 1000);
}

type Handlers = ReturnType<typeof makeHandlers>;

/** What the server does with requests and sockets. */
function makeHandlers(config: Config, rooms: Rooms, log: Logger) {
  const page = new Page(pageSource as unknown as string); // bun-types takes every .html import for a bundle
  const access = new Access(config);
  return {
    fetch: (request: Request, server: Bun.Server<Member>) => {
      const url = URL.parse(request.url);
      if (!url) return refuse(400, "The Host header names no host.");
      if (url.pathname.startsWith("/ws/")) return handshake(request, url, server, config, access);
      if (request.method === "POST" && config.password !== "") return access.login(request, server);
      return page.answer(request);
    },
    error: (error: Error) => {
      log("error", `A request failed: ${error.stack ?? error.message}`);
      return refuse(500, "Something went wrong here.");
    },
    websocket: {
      data: {} as Member,
      maxPayloadLength: MAX_FRAME,
      backpressureLimit: BACKPRESSURE_BYTES,
      closeOnBackpressureLimit: true,
      idleTimeout: IDLE_SECONDS,
      perMessageDeflate: false, // it would cost each message more time than it saves, and each socket its window
      open: (ws: Socket) => rooms.enter(ws),
      message: (ws: Socket, data: string | Buffer) => rooms.receive(ws, data),
      close: (ws: Socket, code: number) => rooms.leave(ws, code),
      error: (error: Error, ws: Socket | undefined) => {
        log("error", `A connection failed: ${error.stack ?? error.message}`);
        ws?.close(CLOSE.bug, "Something went wrong here.");
      },
    },
  };
}

/** Listens on the configured address. @throws StartError when that is not possible */
function listen(config: Config, tls: Tls | undefined, handlers: Handlers): Bun.Server<Member> {
  const { port, host } = config;
  const serve = (hostname: string) =>
    Bun.serve({
      ...handlers,
      port,
      hostname,
      tls,
      maxRequestBodySize: MAX_BODY,
      development: false,
      reusePort: config.reusePort, // said aloud: with `development: false` Bun would let a second server take the same port
    });
  try {
    if (host !== "") return serve(host);
    try {
      return serve("::"); // all interfaces, IPv4 too
    } catch (error) {
      if ((error as { code?: string }).code === "EADDRINUSE") throw error;
      return serve("0.0.0.0"); // a machine without IPv6
    }
  } catch (error) {
    const { code, message } = error as { code?: string; message: string };
    if (code === "EADDRINUSE")
      throw new StartError(`PORT=${port}: another program listens there; set PORT to another.`);
    if (/EADDRNOTAVAIL|EINVAL/.test(message)) throw new StartError(`HOST=${host}: this machine has no such address.`);
    if (tls && !/permission denied|EACCES/.test(message))
      throw new StartError(`TLS_CERT=${config.tlsCert} TLS_KEY=${config.tlsKey}: cannot be used: ${message}`);
    throw new StartError(`HOST=${host} PORT=${port}: cannot be listened on: ${message}`);
  }
}

/** A certificate and its key, as PEM. */
interface Tls {
  readonly cert: string;
  readonly key: string;
}

/** Reads the PEM files; undefined when there are none. @throws StartError when a file cannot be read, or the key is another's */
function readTls({ tlsCert, tlsKey }: Config): Tls | undefined {
  if (tlsCert === "") return undefined;
  try {
    const [cert, key] = [readFileSync(tlsCert, "utf8"), readFileSync(tlsKey, "utf8")];
    if (!new X509Certificate(cert).checkPrivateKey(createPrivateKey(key)))
      throw new Error("the key is of another certificate");
    return { cert, key };
  } catch (error) {
    throw new StartError(`TLS_CERT=${tlsCert} TLS_KEY=${tlsKey}: cannot be used: ${(error as Error).message}`);
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
  const room = roomOf(pathname.slice("/ws/".length));
  if (room === undefined) {
    return refuse(400, `A room's name has at most ${MAX_ROOM} characters, no control characters, and is valid UTF-8.`);
  }
  const offered = headers.get("sec-websocket-protocol");
  const chat = offered?.split(",").some((protocol) => protocol.trim() === "chat.v1") ?? false;
  if (offered !== null && !chat) return refuse(400, "The subprotocol is chat.v1, or none.");
  const refused = access.check(request, server);
  // A browser tells its page nothing of a refused handshake. So it is let in, and told by the Close frame.
  if (refused && !chat) return refused;
  const name = query.get("name");
  const clean = name === null ? "Guest" : cleanName(name);
  const address = addressOf(request, server, config.proxies);
  const data = new Member(
    room,
    address,
    chat,
    clean ?? "Guest",
    chat && clean === undefined,
    resumeOf(query),
    config.rate * BURST_SECONDS,
  );
  data.server = server;
  data.lockedOut = refused !== undefined;
  // A browser that offers a subprotocol and is answered none closes the connection: the WHATWG WebSockets standard.
  if (server.upgrade(request, { data, headers: chat ? { "Sec-WebSocket-Protocol": "chat.v1" } : {} })) return undefined;
  return refuse(400, "The WebSocket handshake is not complete.");
}

/** Where a client says that it left off; undefined when it does not, or not in a way that can be. */
function resumeOf(query: URLSearchParams): Resume | undefined {
  const epoch = query.get("epoch");
  const after = query.get("after") ?? "";
  return epoch !== null && /^\d{1,15}$/.test(after) ? { epoch, after: Number(after) } : undefined;
}

/** A refusal in plain text. */
function refuse(status: number, sentence: string, headers: Record<string, string> = {}): Response {
  return new Response(`${sentence}\n`, {
    status,
    headers: { "Content-Type": "text/plain; charset=utf-8", ...headers },
  });
}

/** The page, its headers and its compressed form, all made once. Every path outside `/ws/` answers with it. */
class Page {
  readonly #plain: Uint8Array<ArrayBuffer>;
  readonly #gzip: Uint8Array<ArrayBuffer>;
  readonly #headers: Record<string, string>;

  constructor(html: string) {
    this.#plain = new TextEncoder().encode(html);
    this.#gzip = Bun.gzipSync(this.#plain, { library: "libdeflate", level: 10 }); // 10 ms, once, for 5 % less each time
    this.#headers = {
      "Content-Type": "text/html; charset=utf-8",
      "Content-Security-Policy": contentSecurityPolicy(html),
      "X-Content-Type-Options": "nosniff",
      "Referrer-Policy": "no-referrer",
      "Cache-Control": "no-cache", // ask each time; the answer is nearly always 304
      Vary: "Accept-Encoding",
      ETag: `W/"${sha256(html, "hex").slice(0, 32)}"`, // weak: one for both forms
    };
  }

  answer(request: Request): Response {
    if (request.method !== "GET" && request.method !== "HEAD") {
      return refuse(405, "Here is only a page to GET.", { Allow: "GET, HEAD" });
    }
    const headers = this.#headers;
    const known = request.headers
      .get("if-none-match")
      ?.split(",")
      .map((tag) => tag.trim().replace(/^(?!W\/)/, "W/"));
    if (known?.includes(headers.ETag as string)) return new Response(null, { status: 304, headers });
    const gzip = /\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))/i.test(request.headers.get("accept-encoding") ?? "");
    if (!gzip) return new Response(this.#plain, { headers });
    return new Response(this.#gzip, { headers: { ...headers, "Content-Encoding": "gzip" } });
  }
}

/** The policy under which the page runs: its one script and its one style, and nothing from anywhere else. CSP Level 3. */
function contentSecurityPolicy(html: string): string {
  const hash = (tag: string) => {
    const content = new RegExp(`<${tag}>([^]*?)</${tag}>`).exec(html)?.[1] ?? "";
    return `'sha256-${sha256(content, "base64")}'`;
  };
  return [
    "default-src 'none'",
    `script-src ${hash("script")}`,
    `style-src ${hash("style")}`,
    "img-src data:",
    "connect-src 'self'",
    "base-uri 'none'",
    "form-action 'self'",
    "frame-ancestors 'none'",
    "require-trusted-types-for 'script'",
    "trusted-types 'none'",
  ].join("; ");
}

function sha256(text: string, encoding: "hex" | "base64"): string {
  return new Bun.CryptoHasher("sha256").update(text).digest(encoding);
}

// ─── Moving: export and import ───────────────────────────────────────────────────────────────────────────────────────

/** A line of an export: a message, and the log it stands in. */
interface Line extends Message {
  room: string;
  epoch: string;
}

/** Messages that are read from Redis, or written to it, at once. */
const MOVE_MESSAGES = 1000;

/** The kept messages of all rooms in a SQLite file, as they are at one moment. A server that uses the file is not disturbed. */
function* exportSqlite({ db: path, history }: Config): Generator<Line> {
  using db = openToRead(path);
  const rows = db.query<Row & { room: string; epoch: string }, [number]>(
    `SELECT rooms.name AS room, epoch, seq, at, messages.name, key, text FROM rooms JOIN messages ON room = id
     WHERE seq > (SELECT max(seq) FROM messages WHERE room = id) - ? ORDER BY id, seq`,
  );
  for (const { room, epoch, seq, at, name, text, key } of rows.iterate(history)) {
    yield { room, epoch, ...makeMessage(seq, at, name, text, key) };
  }
}

/** @throws StartError when there is no such database */
function openToRead(path: string): Database {
  try {
    return new Database(path, { readonly: true });
  } catch (error) {
    throw new StartError(`CHAT_DB=${path}: the database cannot be read: ${(error as Error).message}.`);
  }
}

/** A connection that closes with the block that it was made in. */
function disposable(redis: Bun.RedisClient): Bun.RedisClient & Disposable {
  return Object.assign(redis, { [Symbol.dispose]: () => redis.close() });
}

/** The kept messages of all rooms in a Redis, one room after the other. */
async function* exportRedis({ redisUrl, prefix }: Config): AsyncGenerator<Line> {
  using redis = disposable(connectRedis(redisUrl));
  const generation = await redis.send("GET", [`${prefix}generation`]);
  const logs = new Set<string>();
  let cursor = "0";
  do {
    const match = `${prefix.replaceAll(/[\\*?[\]]/g, "\\$&")}log:*`;
    const [next, keys] = (await redis.send("SCAN", [cursor, "MATCH", match, "COUNT", "1000"])) as [string, string[]];
    for (const key of keys) logs.add(key.slice(`${prefix}log:`.length));
    cursor = next;
  } while (cursor !== "0");
  for (const room of logs) {
    const state = await redis.send("HMGET", [`${prefix}room:${room}`, "epoch", "generation"]);
    const [kept, madeIn] = state as [string | null, string | null];
    if (kept === null) continue;
    const epoch = madeIn === generation ? kept : randomName(); // of a lost generation: nobody may resume into it
    for (let from = "-"; ;) {
      const range = [`${prefix}log:${room}`, from, "+", "COUNT", `${MOVE_MESSAGES}`];
      const entries = (await redis.send("XRANGE", range)) as StreamEntry[];
      for (const entry of entries) yield { room, epoch, ...streamMessage(entry) };
      const last = entries.at(-1);
      if (!last) break;
      from = `(${last[0]}`;
    }
  }
}

/**
 * Writes the kept messages of every room, a JSON object in each line; a server on the same store is not disturbed.
 * @param write takes some lines at a time; the next ones come when its promise resolves
 * @returns how many messages there were
 */
export async function exportMessages(config: Config, write: (lines: string) => Promise<unknown>): Promise<number> {
  let count = 0;
  let lines = "";
  for await (const line of config.redisUrl === "" ? exportSqlite(config) : exportRedis(config)) {
    lines += `${JSON.stringify(line)}\n`;
    if (++count % MOVE_MESSAGES !== 0) continue;
    await write(lines);
    lines = "";
  }
  await write(lines);
  return count;
}

/** Reads an export and checks all of it, so that a broken one changes nothing. @throws StartError with the line's number */
function readExport(text: string): Map<string, Line[]> {
  const rooms = new Map<string, Line[]>();
  const keys = new Set<string>();
  for (const [i, json] of text.split("\n").entries()) {
    if (json === "") continue;
    const broken = (why: string) => new StartError(`Line ${i + 1}: ${why}. Nothing was imported.`);
    const line = parseLine(json);
    if (typeof line === "string") throw broken(line);
    const before = rooms.get(line.room) ?? [];
    const last = before.at(-1);
    if (last && (last.epoch !== line.epoch || last.seq + 1 !== line.seq)) {
      throw broken("it does not follow the one before");
    }
    const key = line.key && `${line.key} ${line.room}`; // a key has no space
    if (key && keys.has(key)) throw broken("its key was there before");
    if (key) keys.add(key);
    before.push(line);
    rooms.set(line.room, before);
  }
  return rooms;
}

/** A line of an export, or what is wrong with it. */
function parseLine(json: string): Line | string {
  let line: Partial<Line>;
  try {
    line = JSON.parse(json) ?? {};
  } catch {
    return "it is not JSON";
  }
  const { room, epoch, seq, at, name, text, key } = line;
  if (typeof room !== "string" || roomOf(encodeURIComponent(room.toWellFormed())) !== room)
    return "it has no valid room";
  if (typeof epoch !== "string" || !/^[0-9a-f]{16}$/.test(epoch)) return "it has no valid epoch";
  if (!Number.isSafeInteger(seq) || (seq as number) < 1) return "it has no valid seq";
  if (!Number.isInteger(at) || Number.isNaN(new Date(at as number).getTime())) return "it has no valid time";
  if (typeof name !== "string" || cleanName(name) !== name) return "it has no valid name";
  if (typeof text !== "string" || longerThan(text, MAX_TEXT) || !text.isWellFormed()) return "it has no valid text";
  if (key !== undefined && !(typeof key === "string" && KEY.test(key))) return "its key is not valid";
  return { room, epoch, ...makeMessage(seq as number, at as number, name, text, key) };
}

/**
 * Takes an export into a store that does not have its rooms yet: all of it or nothing.
 * @returns how many messages there were
 * @throws StartError when a line is broken, a room has messages already, or a server uses the SQLite file
 */
export async function importMessages(config: Config, text: string): Promise<number> {
  const rooms = readExport(text);
  if (config.redisUrl === "") importSqlite(config, rooms);
  else await importRedis(config, rooms);
  return [...rooms.values()].reduce((sum, { length }) => sum + length, 0);
}

/** All in one transaction. A server that runs on the file has it locked: the import is refused, as it would not learn of it. */
function importSqlite(config: Config, rooms: Map<string, Line[]>): void {
  const { db, lock } = openLocked(config);
  const insertRoom = db.query(INSERT_ROOM);
  const insert = db.query(INSERT_MESSAGE);
  const insertAll = db.transaction(() => {
    for (const [room, lines] of rooms) {
      const taken = db.query("SELECT 1 FROM rooms WHERE name = ?").get(room);
      if (taken) throw new StartError(`Room "${room}" has messages already. Nothing was imported.`);
      const { lastInsertRowid: id } = insertRoom.run(room, (lines[0] as Line).epoch);
      for (const { seq, at, name, key, text } of lines) insert.run(id, seq, at, name, key ?? null, text);
    }
  });
  try {
    insertAll.immediate();
  } finally {
    db.close();
    lock?.close();
  }
}

/** ARGV: prefix, room, then seq, at, name, text, key of each message. Nobody sees them there: they are gone in a while. */
const IMPORT_SCRIPT = `
local log, keys = ARGV[1] .. 'import-log:' .. ARGV[2], ARGV[1] .. 'import-keys:' .. ARGV[2]
for i = 3, #ARGV, 5 do
  local seq, at, name, text, key = unpack(ARGV, i, i + 4)
  redis.call('XADD', log, seq .. '-0', 'at', at, 'name', name, 'text', text, 'key', key)
  if key ~= '' then redis.call('HSET', keys, key, seq) end
end
for _, name in ipairs({log, keys}) do redis.call('EXPIRE', name, ${OPEN_SECONDS}) end`;

/** ARGV: seconds until an idle room expires (0: never), then room, epoch, last of each. Returns a room that is there already, or nil. */
const IMPORTED_SCRIPT = `${SCRIPT_HEAD}
for i = 6, #ARGV, 3 do
  if tonumber(redis.call('HGET', prefix .. 'room:' .. ARGV[i], 'last') or 0) > 0 then return answer(ARGV[i]) end
end
local idle = tonumber(ARGV[5])
for i = 6, #ARGV, 3 do
  local room, epoch, last = unpack(ARGV, i, i + 2)
  local meta, log, keys = names(room)
  redis.call('DEL', meta, log, keys)
  redis.call('HSET', meta, 'epoch', epoch, 'last', last, 'generation', generation)
  redis.call('RENAME', prefix .. 'import-log:' .. room, log)
  if redis.call('EXISTS', prefix .. 'import-keys:' .. room) == 1 then
    redis.call('RENAME', prefix .. 'import-keys:' .. room, keys)
  end
  expire(idle, meta, log, keys)
  -- Whoever waits in the empty room is sent to come back, by a message of another epoch.
  redis.call('XADD', feed, 'MAXLEN', '~', ${FEED_ENTRIES}, '*', 'room', room, 'epoch', epoch, 'seq', last, 'at', 0)
end
return answer(false)`;

/** All rooms appear in one step, when their messages are there. */
async function importRedis({ redisUrl, prefix, idleDays }: Config, rooms: Map<string, Line[]>): Promise<void> {
  using redis = disposable(connectRedis(redisUrl));
  for (const [room, lines] of rooms) {
    await redis.send("DEL", [`${prefix}import-log:${room}`, `${prefix}import-keys:${room}`]);
    for (let i = 0; i < lines.length; i += MOVE_MESSAGES) {
      const some = lines.slice(i, i + MOVE_MESSAGES);
      const args = some.flatMap(({ seq, at, name, text, key }) => [`${seq}`, `${at}`, name, text, key ?? ""]);
      await redis.send("EVAL", [IMPORT_SCRIPT, "0", prefix, room, ...args]);
    }
  }
  const states = Array.from(rooms, ([room, lines]) => {
    const { epoch, seq } = lines.at(-1) as Line;
    return [room, epoch, `${seq}`];
  });
  const args = [prefix, "", "", "", `${idleDays * DAY_SECONDS}`, ...states.flat()];
  const [, , taken] = (await redis.send("EVAL", [IMPORTED_SCRIPT, "0", ...args])) as [string, string, string | null];
  if (taken !== null) throw new StartError(`Room "${taken}" has messages already. Nothing was imported.`);
}

// ─── Main ────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** The addresses at which others on the network reach this machine. */
function networkUrls(url: string): string[] {
  const addresses = Object.values(networkInterfaces()).flatMap((addresses) => addresses ?? []);
  const others = addresses.filter(({ internal, family }) => !internal && family === "IPv4");
  return others.map(({ address }) => url.replace("localhost", address));
}

const HELP = `A chat server in one file. It needs nothing: start it, and open the address it prints.

  bun run server.ts                      serves the chat
  bun run server.ts export > chat.jsonl  writes the kept messages of all rooms, a JSON object in each line
  bun run server.ts import [chat.jsonl]  takes them, from a file or standard input, into a store without those rooms
  bun run server.ts --help | --version

Settings are environment variables, or lines of a file .env (README.md says what each is for):
  PORT HOST CHAT_DB CHAT_SYNC REDIS_URL CHAT_PREFIX CHAT_PASSWORD CHAT_ORIGINS CHAT_PROXIES CHAT_HISTORY
  CHAT_IDLE_DAYS CHAT_RATE TLS_CERT TLS_KEY REUSE_PORT LOG_LEVEL`;

/** Does what the command line asks, with settings from the environment. @throws StartError when it asks for something else */
export async function main([command, ...rest]: string[]): Promise<void> {
  if (command === "--help" || command === "-h") return console.log(HELP);
  if (command === "--version" || command === "-v") return console.log(version);
  if (command === undefined) return serve(readConfig(process.env));
  if (command === "export" && rest.length === 0) return printExport(readConfig(process.env));
  if (command === "import" && rest.length <= 1) {
    const text = await (rest[0] === undefined ? Bun.stdin : Bun.file(rest[0])).text();
    return console.error(`${await importMessages(readConfig(process.env), text)} messages imported.`);
  }
  throw new StartError(`${[command, ...rest].join(" ")}: no such command; --help lists them.`);
}

/** Writes an export to standard output, and to a terminal's standard error how far it is. */
async function printExport(config: Config): Promise<void> {
  const out = Bun.stdout.writer();
  let written = 0;
  const count = await exportMessages(config, async (lines) => {
    out.write(lines);
    await out.flush();
    written += lines.length;
    if (process.stderr.isTTY) process.stderr.write(`\r${Math.round(written / 1e6)} MB `);
  });
  console.error(`${count} messages exported.`);
}

/** Serves until SIGTERM or SIGINT. */
async function serve(config: Config): Promise<void> {
  const chat = await startChat(config);
  const log = makeLogger(config.logLevel);
  if (process.stdout.isTTY) log("info", banner(chat.url, config));
  else log("info", `The chat is open: ${chat.url}`);
  const stop = () => void chat.stop().then(() => process.exit(0));
  process.on("SIGTERM", stop);
  process.on("SIGINT", stop);
  if (config.tlsCert === "") return; // a terminal that closes ends it then, but not under nohup
  process.on("SIGHUP", () => {
    try {
      chat.reloadTls();
      log("info", "The TLS files were read again.");
    } catch (error) {
      log("error", `The TLS files stay as they were. ${(error as Error).message}`);
    }
  });
}

/** What a person sees who started the chat in a terminal. */
function banner(url: string, { host }: Config): string {
  const others = host === "" ? networkUrls(url) : [];
  const line = (what: string, address: string) => `    ${what.padEnd(12)}\x1b[1m${address}\x1b[0m`;
  return ["", "  The chat is open.", "", line("here", url), ...others.map((each) => line("network", each)), ""].join(
    "\n",
  );
}

if (import.meta.main) {
  main(Bun.argv.slice(2)).catch((error: unknown) => {
    // What the operator can mend is said in a line; what only a programmer can, with its stack.
    const theirs = error instanceof StartError || (error instanceof Error && "code" in error);
    console.error(theirs ? error.message : error);
    process.exit(1);
  });
}
