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
 * Two dialects meet in every room. "Plain" sockets exchange bare texts; those with the subprotocol `chat.v1` the JSON
 * objects typed below: they get names, history, presence, and every message with its place in the log.
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
const MAX_FRAME = 64 * 1024; // bytes of a client's frame; a longer one closes with 1009
const MAX_NAME = 32; // characters (Unicode code points) of a person's name
const MAX_ROOM = 64; // characters of a room's name
const MAX_STRIKES = 10; // frames outside the protocol, until it closes with 1008
const PAGE_MESSAGES = 100; // in a page of history, and in the hello of a fresh start
const RESUME_MESSAGES = 1000; // that a client may miss and still resume
const PAGE_BYTES = 256 * 1024; // of text in a page or hello, as JSON: half of BACKPRESSURE_BYTES
const CACHED_HELLOS = 64; // kept ready in the whole server: at most some 20 MB
const BEHIND_MS = 100; // for this server to hear what a client has seen on another
const PRESENCE_PEOPLE = 100; // listed in a presence frame; the count is exact
const PRESENCE_MS = 1000; // between two presence frames of a room
const TYPING_MS = 2000; // between two typing frames of a sender that are passed on
const BURST_SECONDS = 10; // worth of frames that a silent sender may send at once
const ADDRESS_CONNECTIONS = 10; // worth of frames that one address may send
const FREE_TRIES = 5; // wrong passwords of an address at once; then one a minute
const MAX_BUCKETS = 10_000; // token buckets of each kind, the newest
const QUEUE_BYTES = 1024 * 1024; // in a sender's queue, until its socket is read no further
const QUEUE_FRAME_BYTES = 64; // of a queued frame beside its text: tiny ones count too
const BACKPRESSURE_BYTES = 512 * 1024; // for a slow reader: with the frame that passes it, 1 MiB
const GATHER_MS = 6; // of gathering under load: it saves a system call for every socket
const GATHER_POSTS = 32; // that end the gathering at once
const GATHER_CHARACTERS = 64 * 1024; // (UTF-16 units) that end it at once
const STEP_MESSAGES = 1000; // trimmed or exported at once: few, so that posts get in between
const MAX_BODY = 4096; // bytes of a request's body: a password
const DAY_SECONDS = 24 * 60 * 60;
const SESSION_SECONDS = 30 * DAY_SECONDS; // of the cookie that a password gives
const IDENTITY_SECONDS = 365 * DAY_SECONDS; // of the cookie that makes a browser's ids
const DRAIN_MS = 800; // that `stop` waits for the store, and less than 3 s with the next
const CLOSE_MS = 2000; // that it waits for clients to answer the Close frame

// ─── The protocol: chat.v1 ───────────────────────────────────────────────────────────────────────────────────────────

/** An entry of a room's log, as it is stored and as every `chat.v1` client sees it. */
export interface Message {
  seq: number; // its place in the room's log: 1, 2, 3 … without a gap
  at: number; // when the server received it: milliseconds since 1970
  name: string; // the sender's name; nothing proves it
  from?: string; // the sender's id in this room; absent without its cookie
  text: string;
  removes?: number; // the seq that this entry takes back; the entry has no text
  removed?: true; // it was taken back: its text is gone
  key?: string; // the sender's; absent from plain sockets
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
      epoch: string; // names this log; seqs of another mean nothing in it
      first: number; // the oldest seq kept, and the newest; an empty log has 1 and 0
      last: number;
      resumed: boolean; // `messages` is exactly what was missed; else start afresh from them
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

/** What a `chat.v1` client sends: the fields of each type of frame, by values of their types. */
const CLIENT_FRAMES = {
  post: { key: "", text: "" }, // a plain socket's frame becomes one with the key ""
  remove: { key: "", seq: 0 },
  page: { before: 0 },
  name: { name: "" },
  typing: {},
  ping: {},
};
type ClientFrames = { [Type in keyof typeof CLIENT_FRAMES]: { type: Type } & (typeof CLIENT_FRAMES)[Type] };
export type ClientFrame = ClientFrames[keyof ClientFrames];

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

/** Parses a `chat.v1` frame and checks its shape; the values are checked where they are used. */
function parseFrame(data: string): ClientFrame | ErrorFrame {
  let frame: Record<string, unknown>;
  try {
    frame = JSON.parse(data) ?? {};
  } catch {
    return badFrame("The frame is not JSON.");
  }
  const { type } = frame;
  if (typeof type !== "string" || !Object.hasOwn(CLIENT_FRAMES, type)) {
    return badFrame(`A frame is an object with a type: ${Object.keys(CLIENT_FRAMES).join(", ")}.`);
  }
  const sample: Record<string, unknown> = CLIENT_FRAMES[type as ClientFrame["type"]];
  const names = Object.keys(sample);
  const fits = names.every((name) => typeof frame[name] === typeof sample[name]);
  if (fits && Object.keys(frame).length === names.length + 1) return frame as ClientFrame;
  // Lists the known fields, not the unknown, which may be long.
  const list = names.map((name) => `, ${name} (a ${typeof sample[name]})`);
  return badFrame(`"${type}" has the fields type${list.join("")}, and no others.`);
}

function errorFrame(code: ErrorCode, key = "", text = ERRORS[code]): ErrorFrame {
  return { type: "error", code, text, key: KEY.test(key) ? key : undefined };
}

const badFrame = (text: string) => errorFrame("bad-frame", "", text);
const isSeq = (value: unknown): value is number => Number.isSafeInteger(value) && (value as number) >= 1;
/** A frame as JSON; fields that are undefined are left out. */
const encode = (frame: ServerFrame) => JSON.stringify(frame);
/** A UTF-16 unit takes one to three bytes of UTF-8. */
const isTooLong = (text: string) => text.length * 3 > MAX_TEXT && Buffer.byteLength(text) > MAX_TEXT;
/** A name as it is shown, or undefined when it cannot be given. */
const cleanName = (name: string) => cleanLine(name.toWellFormed().trim(), MAX_NAME) || undefined;

/** A text, NFC-normalised; undefined when it has too many code points, or control characters. */
function cleanLine(text: string, max: number): string | undefined {
  const clean = text.normalize("NFC");
  return [...clean].length > max || CONTROL.test(clean) ? undefined : clean;
}

/** The room that a path names after `/ws/`; `""` is the lobby. Undefined when it names none. */
function roomOf(path: string): string | undefined {
  try {
    return cleanLine(decodeURIComponent(path), MAX_ROOM);
  } catch {
    return undefined; // it is not UTF-8
  }
}

/** A random text: so many bits, in hexadecimal. */
const randomHex = (bits: number) => Buffer.from(crypto.getRandomValues(new Uint8Array(bits / 8))).toString("hex");
const sha256 = (text: string, encoding: "hex" | "base64" | "base64url") =>
  new Bun.CryptoHasher("sha256").update(text).digest(encoding);
/** The entries of a list that is separated by commas. */
const splitList = (list: string) => list.split(",").flatMap((entry) => entry.trim() || []);
/** For what may fail without harm. */
const ignore = () => {};

// ─── Configuration ───────────────────────────────────────────────────────────────────────────────────────────────────

const LOG_LEVELS = ["silent", "error", "info", "debug"] as const;
const REDIS = /^(redis|valkey)s?:\/\/./;
const ORIGIN = /^(\*|(https?:\/\/)?[^/?#*@\s]+)$/;

/** Throws what is allowed where `read` finds nothing. */
function check<T>(allowed: string, read: (value: string) => T | undefined): (value: string) => T {
  return (value) => {
    const found = read(value);
    if (found !== undefined) return found;
    throw new Error(`must be ${allowed}`);
  };
}

const wholeNumber = (min: number, max: number) =>
  check(`a whole number from ${min} to ${max}`, (value) => {
    const number = Number(value);
    return String(number) === value && Number.isInteger(number) && number >= min && number <= max ? number : undefined;
  });
const word = <T extends string>(...words: T[]) =>
  check(`one of ${words.join(", ")}`, (value) => words.find((each) => each === value));
const listOf = (form: RegExp, what: string) =>
  check(`${what}, separated by commas`, (list) => {
    const entries = splitList(list);
    return entries.every((entry) => form.test(entry)) ? entries : undefined;
  });

/** Of each setting the variable, the default, the check, and the line of `--help`. */
const SETTINGS = {
  port: ["PORT", "8080", wholeNumber(0, 65_535), "TCP port; 0: a free one"],
  host: ["HOST", "", (host: string) => host.replace(/^\[(.*)\]$/, "$1"), "address to listen on; empty: all"],
  db: ["CHAT_DB", "chat.sqlite", (path: string) => path.trim() || "chat.sqlite", "the database: a file, or :memory:"],
  sync: ["CHAT_SYNC", "full", word("full", "normal"), "full survives a power cut, normal a crash of the server"],
  redisUrls: ["REDIS_URL", "", listOf(REDIS, "redis:// addresses"), "a Redis to use instead, or several, by commas"],
  prefix: ["CHAT_PREFIX", "chat:", String, "what this chat's keys in Redis begin with"],
  password: ["CHAT_PASSWORD", "", String, "asked of everyone; without it, whoever reaches the port is in"],
  operator: ["CHAT_OPERATOR", "", String, "a second password: whoever gives it may remove any message"],
  origins: ["CHAT_ORIGINS", "", listOf(ORIGIN, "origins, hosts, or *"), "whose pages may connect beside its own"],
  proxies: ["CHAT_PROXIES", "0", wholeNumber(0, 10), "how many proxies in front are trusted to add X-Forwarded-For"],
  history: ["CHAT_HISTORY", "10000", wholeNumber(1, 10_000_000), "messages kept in each room"],
  idleDays: ["CHAT_IDLE_DAYS", "30", wholeNumber(0, 36_500), "until a room that nobody uses is forgotten; 0: never"],
  rate: ["CHAT_RATE", "20", wholeNumber(0, 1_000_000), "frames a second of each connection; 0: no limit"],
  tlsCert: ["TLS_CERT", "", String, "PEM file of a certificate: serves https and wss"],
  tlsKey: ["TLS_KEY", "", String, "PEM file of its key"],
  reusePort: ["REUSE_PORT", "0", word("0", "1"), "1: several servers on one port (Linux, with Redis)"],
  logLevel: ["LOG_LEVEL", "info", word(...LOG_LEVELS), `${LOG_LEVELS.join(", ")} (each message too)`],
} as const;

/** What a chat is started with: the settings, and two times that only tests shorten. */
export type Config = { readonly [Name in keyof typeof SETTINGS]: ReturnType<(typeof SETTINGS)[Name][2]> } & {
  readonly silenceSeconds: number; // until a connection is ended; under 60, so that proxies see traffic
  readonly expireMs: number; // from the start to the first look for idle rooms, and between two
};

/** A mistake of the operator, told in one line, such as a bad value or a port in use. */
export class StartError extends Error {}

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

/** URLs without what stands before the last @ of each: a password may have an @. */
const withoutPassword = (urls: string) => urls.replace(/\/\/[^,]*@/g, "//…@");

type Logger = (level: "error" | "info" | "debug", line: string) => void;

/** Prints lines up to a level: errors to standard error, the rest to standard output. */
function makeLogger(upTo: Config["logLevel"]): Logger {
  return (level, line) => {
    if (LOG_LEVELS.indexOf(level) > LOG_LEVELS.indexOf(upTo)) return;
    // Names and texts may hold characters that a terminal obeys.
    const escape = (character: string) => `\\u{${character.codePointAt(0)?.toString(16)}}`;
    const seen = line.replace(/(?!\n)[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, escape);
    if (level === "error") console.error(seen);
    else console.log(seen);
  };
}

/** Drops the entry that was added first, when there are more than so many. */
function dropOldest<Key>(map: Map<Key, unknown>, max: number): void {
  if (map.size > max) map.delete(map.keys().next().value as Key);
}

// ─── Token buckets: one kind for every rate ──────────────────────────────────────────────────────────────────────────

/** A token bucket for each owner: `burst` at once after a silence, `perSecond` on average. */
class TokenBuckets<Owner> {
  readonly #buckets = new Map<Owner, { tokens: number; at: number }>();

  constructor(readonly rate: { readonly perSecond: number; readonly burst: number }) {}

  /** Milliseconds until there is a token: 0 when there is one now. */
  wait(owner: Owner): number {
    return Math.max(0, Math.ceil(((1 - this.#tokens(owner)) * 1000) / this.rate.perSecond));
  }

  take(owner: Owner): void {
    const tokens = this.#tokens(owner) - 1;
    this.#buckets.set(owner, { tokens, at: performance.now() });
    dropOldest(this.#buckets, MAX_BUCKETS);
  }

  forgetFull(): void {
    for (const owner of this.#buckets.keys()) if (this.#tokens(owner) === this.rate.burst) this.#buckets.delete(owner);
  }

  #tokens(owner: Owner): number {
    const { perSecond, burst } = this.rate;
    const { tokens, at } = this.#buckets.get(owner) ?? { tokens: burst, at: 0 };
    return Math.min(burst, tokens + ((performance.now() - at) / 1000) * perSecond);
  }
}

// ─── Rooms and their members: what is known of them ──────────────────────────────────────────────────────────────────

type Server = Bun.Server<Member>;
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
  // What the brokers set:
  epoch = ""; // names its log
  first = 1; // the oldest seq in the store
  last = 0; // the newest, and that of the last message delivered
  row = 0; // SQLite: its row; 0 until its first message is stored
  keys: Map<string, number> | undefined; // SQLite: the seqs of its messages by key, once they are needed
  waiting: Post[] = []; // Redis: posts to be stored next
  isStoring = false; // Redis: whether others are being stored
  early: Heard[] = []; // Redis: what was heard while the room was opening
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
    readonly chatTopic = `chat.v1/${name}`,
    readonly plainTopic = `plain/${name}`,
  ) {}

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

  constructor(readonly rooms: Rooms) {
    const { rate } = rooms.config;
    const perSecond = rate * ADDRESS_CONNECTIONS;
    this.senders = new TokenBuckets({ perSecond: rate, burst: rate * BURST_SECONDS });
    this.addresses = new TokenBuckets({ perSecond, burst: perSecond * BURST_SECONDS });
  }

  /** A frame arrived. */
  receive(ws: Socket, data: string | Buffer): void {
    const member = ws.data;
    member.heardAt = performance.now();
    if (ws.readyState !== WebSocket.OPEN) return; // read together with a frame that closed the connection
    if (typeof data !== "string") return ws.close(CLOSE.binary, "Only text frames are understood here.");
    const frame: ClientFrame | ErrorFrame = member.visitor.isChat
      ? parseFrame(data)
      : { type: "post", key: "", text: data };
    // A ping passes the queue, or a client that is slowed would take its connection for dead. Never before the hello.
    if (frame.type === "ping" && member.state === "here") return void ws.send(PONG);
    this.pace(member, frame, data.length);
  }

  /** A frame waits its turn in the sender's queue: none while the sender keeps to the rate. */
  pace(member: Member, frame: ClientFrame | ErrorFrame, length: number): void {
    const bytes = length + QUEUE_FRAME_BYTES;
    member.queue.push({ frame, bytes });
    member.queueBytes += bytes;
    if (member.state === "here") this.drain(member);
    if (member.queueBytes >= QUEUE_BYTES && !member.ws.isPaused) member.ws.pause();
  }

  /** Acts on as many frames as the rates allow, and comes back for the rest. */
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
    member.draining = setTimeout(again, Math.max(wait, 1000 / this.rooms.config.rate));
  }

  /** Takes a token of the sender and of its address; or returns the milliseconds until there are both. */
  #takeTokens(member: Member): number {
    if (this.rooms.config.rate === 0) return 0;
    const { network } = member.visitor;
    const wait = Math.max(this.senders.wait(member), network === "" ? 0 : this.addresses.wait(network));
    if (wait > 0) return wait;
    this.senders.take(member);
    if (network !== "") this.addresses.take(network);
    return 0;
  }

  /** Does what a frame asks, or tells its sender what is wrong with it. */
  #act(member: Member, frame: ClientFrame | ErrorFrame): void {
    if (this.isStopping || member.state === "refused") return;
    const error = frame.type === "error" ? frame : this.#refusal(member, frame);
    if (!error) return;
    member.ws.send(encode(error));
    if (error.code !== "bad-frame" || ++member.strikes < MAX_STRIKES) return;
    member.ws.close(CLOSE.protocol, `${MAX_STRIKES} frames were not of the protocol chat.v1.`);
  }

  /** Does what a frame asks, unless it returns what is wrong with it. */
  #refusal(member: Member, frame: ClientFrame): ErrorFrame | undefined {
    const { type } = frame;
    if (type === "post") return this.#post(member, frame.key, frame.text);
    if (type === "remove") return this.#post(member, frame.key, "", frame.seq);
    if (type === "page") return this.#page(member, frame.before);
    if (type === "name") return this.#rename(member, frame.name);
    if (type === "typing") this.#typing(member);
    else member.ws.send(PONG);
    return undefined;
  }

  /** Hands a post to the broker, or the removal of a message. */
  #post({ room, ws, name, visitor }: Member, key: string, text: string, removes?: number): ErrorFrame | undefined {
    const { isChat, from } = visitor;
    if (isTooLong(text) && !isChat) return void ws.close(CLOSE.tooBig, ERRORS["too-long"]);
    if (isTooLong(text)) return errorFrame("too-long", key);
    if (isChat && !KEY.test(key)) return errorFrame("bad-key");
    if (isChat && text === "" && removes === undefined) return errorFrame("empty", key);
    if (removes !== undefined && !isSeq(removes)) return badFrame('"seq" is a whole number from 1.');
    // A lone surrogate has no UTF-8: replaced here, it looks the same now and when it is read later.
    const post = { at: Date.now(), name, from, text: text.toWellFormed(), removes, key: key || undefined };
    room.broker.append({ room, sender: ws.data, ...post });
  }

  #page({ room, ws }: Member, before: number): ErrorFrame | undefined {
    if (!isSeq(before)) return badFrame('"before" is a whole number from 1.');
    const to = Math.min(before - 1, room.last);
    const from = Math.max(firstKept(room, this.rooms.config), to - PAGE_MESSAGES + 1);
    room.broker.read(room, from, to).then(
      (messages) => ws.send(encode({ type: "page", messages })),
      (error: Error) => this.rooms.unreadable(room, error),
    );
  }

  #rename(member: Member, name: string): ErrorFrame | undefined {
    const clean = cleanName(name);
    if (clean === undefined) return errorFrame("bad-name");
    member.name = clean;
    this.rooms.presenceChanged(member.room);
  }

  #typing(member: Member): void {
    const { room, name, ws, typedAt } = member;
    if (performance.now() - typedAt < TYPING_MS) return;
    member.typedAt = performance.now();
    ws.publish(room.chatTopic, encode({ type: "typing", name }), false); // to all but the sender
    room.broker.tell?.(room, { typing: name });
  }
}

/** The oldest seq that counts as kept: what the store has before it is trimmed in time. */
const firstKept = (room: Room, { history }: Config) => Math.max(room.first, room.last - history + 1);

// ─── Brokers: append ─────────────────────────────────────────────────────────────────────────────────────────────────

/** A post, or a removal, on its way to the log. */
interface Post extends Omit<Message, "seq" | "removed"> {
  readonly room: Room;
  readonly sender: Member;
}

/** The seq of the message that a post already is, or why it is refused. */
type Answer = number | "gone" | "not-yours";

/** What a server tells the others of a room: who is there, who types; or nothing, to ask who is there. */
type Notice = { readonly here?: Here; readonly typing?: string };

/** Keeps the logs of rooms. In doubt about a post, or about what comes next, it loses the room. */
interface Broker {
  /** Begins; resolves when posts can be taken, or when it is clear that they cannot for now. */
  start(): Promise<void>;
  /** Opens a room: sets its epoch, first and last, and its state. @throws when the store cannot be reached */
  open(room: Room): Promise<void>;
  /** Ends what `open` began. */
  close?(room: Room): void;
  /** Stores a post, then delivers it, or answers its sender, or loses the room. */
  append(post: Post): void;
  /** Messages with `from <= seq <= to`, ascending: the newest {@link PAGE_BYTES} of them. */
  read(room: Room, from: number, to: number): Promise<Message[]>;
  /** Tells the other servers, where there are any. */
  tell?(room: Room, notice: Notice): void;
  /** Stores and delivers what still waits. */
  drain(): Promise<void>;
  /** Closes the store. */
  stop(): void;
}

/** Gathers items under load: after {@link GATHER_MS} of quiet one is handled alone, else all of that time together. */
class Gatherer<Item> {
  #items: Item[] = [];
  #characters = 0;
  #timer: Timer | undefined;
  #doneAt = -Infinity; // when the last batch was done, on the monotonic clock

  constructor(readonly handle: (items: Item[]) => void) {}

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

/** Of messages, newest first, as many as fit in {@link PAGE_BYTES}, but one at least: ascending. */
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
const FIND_ROOM = `SELECT id, epoch, ifnull((SELECT min(seq) FROM messages WHERE room = id), 1),
  ifnull((SELECT max(seq) FROM messages WHERE room = id), 0) FROM rooms WHERE name = ?`;
const NEXT_IDLE = `SELECT id, name FROM rooms
  WHERE id > ? AND (SELECT at FROM messages WHERE room = id ORDER BY seq DESC LIMIT 1) < ? ORDER BY id LIMIT 1`;
type Row = { [Column in keyof Message]-?: Message[Column] | null };

function messageOf(row: Row): Message {
  const { seq, at, name, from, text, removes, removed, key } = row as Required<Row>;
  const kept = { seq, at, name, from: from ?? undefined, text, removes: removes ?? undefined } as Message;
  return { ...kept, removed: removed ? true : undefined, key: key ?? undefined };
}

/** Keeps the logs in one SQLite file. What waits together is committed in one transaction, then delivered. */
class SqliteBroker implements Broker {
  readonly #db: Database;
  readonly #close: () => void;
  readonly #insert: Statement;
  readonly #select: Statement<Row, [number, number, number]>;
  readonly #storeAll: (posts: Post[]) => (Message | Answer)[]; // or none of them
  readonly #gatherer = new Gatherer<Post>((posts) => this.#commit(posts));
  #trimming: Timer | undefined;
  #expiring: Timer | undefined;

  /** @throws StartError when the database cannot be opened and written */
  constructor(readonly rooms: Rooms) {
    const { db, close } = openLocked(rooms.config);
    this.#db = db;
    this.#close = close;
    this.#insert = db.query(INSERT_MESSAGE);
    this.#select = db.query(`SELECT ${COLUMNS} FROM messages WHERE room = ? AND seq BETWEEN ? AND ? ORDER BY seq DESC`);
    this.#storeAll = db.transaction((posts: Post[]) => posts.map((post) => this.#store(post))).immediate;
  }

  async start(): Promise<void> {
    // Not at once: a backup that is restored late must not be emptied before anyone has looked at it.
    const { idleDays, expireMs } = this.rooms.config;
    if (idleDays > 0) this.#expiring = setInterval(() => void this.#forgetIdle(), expireMs);
  }

  async open(room: Room): Promise<void> {
    this.#gatherer.flush(); // posts of clients who have just left this room: they belong to what is read now
    const [found] = this.#db.query(FIND_ROOM).values(room.name) as [number, string, number, number][];
    [room.row, room.epoch, room.first, room.last] = found ?? [0, randomHex(64), 1, 0]; // a visit alone leaves no trace
    room.state = "open";
  }

  append(post: Post): void {
    this.#gatherer.add(post, post.text.length);
  }

  /** Stores posts in one transaction, then delivers them. */
  #commit(posts: Post[]): void {
    const stored = new Map<Room, Message[]>();
    const answers: [Post, Answer][] = [];
    try {
      // A single statement is its own transaction, for less.
      const isStatement = posts.length === 1 && posts.every(({ room, removes }) => room.row > 0 && !removes);
      const outcomes = isStatement ? posts.map((post) => this.#store(post)) : this.#storeAll(posts);
      for (const [i, post] of posts.entries()) {
        const outcome = outcomes[i] as Message | Answer;
        if (typeof outcome !== "object") answers.push([post, outcome]);
        else if (!stored.get(post.room)?.push(outcome)) stored.set(post.room, [outcome]);
      }
    } catch (error) {
      this.rooms.outage(this, false, `The database cannot be written, posts are refused: ${(error as Error).message}`);
      for (const { room } of posts) this.rooms.lose(room, "The message could not be stored"); // RULE 3
      return;
    }
    this.rooms.outage(this, true, "The database can be written again.");
    // RULE 1: no await from the commit to here, nor in `deliver`.
    for (const [room, messages] of stored) this.rooms.deliver(room, messages);
    for (const [post, answer] of answers) this.rooms.answer(post, answer);
    for (const room of stored.keys()) this.#trimSoon(room);
  }

  /** Writes a post as the next message of its room. If the commit fails, what it changes in the room is lost with it. */
  #store({ room, sender, ...post }: Post): Message | Answer {
    const { at, name, from, text, removes, key } = post;
    const known = key && (room.keys ??= this.#loadKeys(room)).get(key);
    if (known && known > room.last - this.rooms.config.history) return known;
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
    if (!target || target.removes !== null || seq <= room.last - this.rooms.config.history) return "gone";
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

  async drain(): Promise<void> {
    this.#gatherer.flush();
  }

  stop(): void {
    clearTimeout(this.#trimming);
    clearInterval(this.#expiring);
    this.#expiring = undefined;
    this.#close();
  }

  /** Deletes a room's oldest messages, a step at a time. */
  #trimSoon(room: Room): void {
    if (room.last - room.first + 1 < this.rooms.config.history + STEP_MESSAGES) return;
    this.#trimming ??= setTimeout(() => {
      this.#trimming = undefined;
      try {
        const step = this.#db.query("DELETE FROM messages WHERE room = ? AND seq < ? RETURNING key, seq");
        for (const [key, seq] of step.values(room.row, room.first + STEP_MESSAGES) as [string, number][]) {
          if (room.keys?.get(key) === seq) room.keys.delete(key); // or it is that of a newer message by now
        }
      } catch (error) {
        return this.rooms.log("error", `The history of ${room} cannot be trimmed: ${(error as Error).message}`);
      }
      room.first += STEP_MESSAGES;
      this.#trimSoon(room);
    }, GATHER_MS);
  }

  /** Forgets, one at a time, the rooms that nobody is in and nobody has posted to for some days. */
  async #forgetIdle(): Promise<void> {
    const nextIdle = this.#db.query<{ id: number; name: string }, [number, number]>(NEXT_IDLE);
    const since = Date.now() - this.rooms.config.idleDays * DAY_SECONDS * 1000;
    try {
      for (let id = 0, room; (room = nextIdle.get(id, since)); await Bun.sleep(GATHER_MS)) {
        id = room.id;
        this.#gatherer.flush(); // a post of a client that has just left would go to a room that is not there
        if (this.rooms.open.has(room.name)) continue;
        this.#db.query("DELETE FROM messages WHERE room = ?").run(id);
        this.#db.query("DELETE FROM rooms WHERE id = ?").run(id);
        this.rooms.log("info", `Room "${room.name}" was forgotten: nobody used it any more.`);
      }
    } catch (error) {
      if (this.#expiring) this.rooms.log("error", `Idle rooms cannot be forgotten: ${(error as Error).message}`);
    }
  }
}

/** Opens the database, with a lock against other servers, which the system frees when the process dies. @throws StartError */
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
  // These are the tables of version 1: a new file and one of that version are taken over alike.
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
// Keys, after CHAT_PREFIX:       state:<room>     hash: epoch, and the seq of the newest message
//                                messages:<room>  list: the log as JSON; trimming does not move an index from its end
//                                keys:<room>      hash: key → seq
//                                data             a random name: another data set has another
// Channels, after CHAT_PREFIX:   state:<room>     what was stored; who is in the room on a server; who types
//                                servers          the servers' heartbeats
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
local function expire(...) for _, name in ipairs(KEYS) do redis.call('EXPIRE', name, ...) end end
`;

/**
 * Stores posts and publishes them in one step, so that they are heard in the order of the log. ARGV: epoch, history,
 * seconds until an idle room expires; then of each post its key, the seq that it removes, whose messages its sender may
 * remove ("*": all), and its JSON after `{"seq":…,`. Returns nil if the log is another one; else of each post the seq
 * that it got, minus the seq that it had, or why it is refused.
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
for i = 4, #ARGV, 4 do
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
expire(ARGV[3])
redis.call('PUBLISH', room, '{"epoch":"' .. epoch .. '","messages":[' .. table.concat(stored, ',') .. ']}')
return answers`;

/** ARGV: an epoch for a new room. Makes or keeps the room. Returns its epoch, last seq and length. */
const OPEN_SCRIPT = `${SCRIPT_HEAD}
if not epoch then
  epoch, last = ARGV[1], 0
  redis.call('DEL', log, keys)
  redis.call('HSET', room, 'epoch', epoch, 'last', last)
  expire(${OPEN_SECONDS})
end
expire(${OPEN_SECONDS}, 'GT')
return {epoch, last, redis.call('LLEN', log)}`;

/** ARGV: epoch ("": any), from, to. Returns the messages, or nil if the log is another one. */
const READ_SCRIPT = `${SCRIPT_HEAD}
if ARGV[1] ~= '' and epoch ~= ARGV[1] then return false end
return redis.call('LRANGE', log, math.max(ARGV[2] - last - 1, -redis.call('LLEN', log)), ARGV[3] - last - 1)`;

/** Messages that were stored together; the epoch is the log's, without the run. */
type Heard = { readonly room: Room; readonly epoch: string; readonly messages: Message[] };

/** The two connections to a Redis: when either fails, both are replaced. */
interface Link {
  readonly commands: Bun.RedisClient;
  readonly subscriber: Bun.RedisClient;
  run: string; // names the process and its data set; part of every epoch, so that no log that lost something passes
}

/** Keeps the logs of its rooms in one Redis, which any number of servers share. */
class RedisBroker implements Broker {
  readonly #server = randomHex(64); // this server's name among those that share the Redis
  #link: Link | undefined; // undefined while Redis is away
  readonly #alive = new Map<string, number>(); // when there was last a sign of life of each server, on the monotonic clock
  #beats = 0; // heartbeats of this server
  #storing = 0; // rooms whose posts are being stored
  readonly #gatherer = new Gatherer<Heard>((heard) => {
    for (const [room, some] of Map.groupBy(heard, (each) => each.room)) this.#deliver(room, some);
  });
  #isStopped = false;

  constructor(
    readonly url: string,
    readonly rooms: Rooms,
  ) {}

  start(): Promise<void> {
    return new Promise((tried) => void this.#keepLink(tried));
  }

  async open(room: Room): Promise<void> {
    await this.#link?.subscriber.subscribe(this.#keys(room)[0], (text) => this.#hear(room, text));
    const [epoch, last, length] = (await this.#run(OPEN_SCRIPT, room, [randomHex(64)])) as [string, number, number];
    if (room.state === "closed" || !this.#link) return;
    room.epoch = epoch + this.#link.run;
    room.first = last - length + 1;
    room.last = last;
    room.state = "open";
    this.#deliver(room, room.early.splice(0));
    this.tell(room, {});
  }

  close(room: Room): void {
    this.tell(room, { here: { ids: [], nameless: 0, people: [] } });
    this.#link?.subscriber.unsubscribe(this.#keys(room)[0]).catch(ignore);
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
        this.rooms.outage(this, true, "Redis can be used again.");
      } catch (error) {
        this.rooms.outage(this, false, `Redis does not take posts: ${(error as Error).message}`);
        room.waiting = []; // their senders send again, from the first post on
        this.rooms.lose(room, "The message could not be stored"); // RULE 3
      }
    }
    room.isStoring = false;
    this.#storing--;
  }

  /** Stores posts in one round trip. What is stored is delivered when it is heard of; the rest is answered here. */
  async #store(room: Room, posts: Post[]): Promise<void> {
    const { config } = this.rooms;
    const args = [logEpoch(room), `${config.history}`, idleSeconds(config)];
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

  /** Something was said on a room's channel: by the store script, or by a server. */
  #hear(room: Room, text: string): void {
    const { epoch, messages, server, here, typing } = JSON.parse(text) as Partial<Heard> & Notice & { server?: string };
    if (epoch && messages) return this.#gatherer.add({ room, epoch, messages }, text.length);
    if (!server || server === this.#server) return;
    this.#alive.set(server, performance.now());
    if (typing) return this.rooms.publish(room, { type: "typing", name: typing });
    if (here) room.elsewhere.set(server, here);
    else room.announced = ""; // it asks who is here
    this.rooms.presenceChanged(room);
  }

  /** Delivers what was heard of a room, if it is exactly what comes next. */
  #deliver(room: Room, heard: Heard[]): void {
    if (room.state === "opening") return void room.early.push(...heard); // until it is known what comes next
    if (room.state === "closed") return;
    const next: Message[] = [];
    for (const { epoch, messages } of heard) {
      if (epoch !== logEpoch(room)) return this.rooms.lose(room, "Its log is another one"); // RULE 3
      for (const message of messages) {
        const seq = room.last + next.length + 1;
        if (message.seq > seq) return this.rooms.lose(room, `Message ${seq} was not heard`); // RULE 3
        if (message.seq === seq) next.push(message); // a lower one was in the log when the room was opened
      }
    }
    // RULE 1: no await since `last` was read.
    room.last += next.length;
    if (next.length > 0) this.rooms.deliver(room, next);
  }

  async read(room: Room, from: number, to: number): Promise<Message[]> {
    if (to < from) return [];
    const texts = (await this.#run(READ_SCRIPT, room, [logEpoch(room), `${from}`, `${to}`])) as string[] | null;
    if (!texts) throw new Error("it is another one");
    return newestThatFit(texts.reverse().map((text) => JSON.parse(text) as Message));
  }

  tell(room: Room, notice: Notice): void {
    const text = JSON.stringify({ server: this.#server, ...notice });
    this.#link?.commands.publish(this.#keys(room)[0], text).catch(ignore); // where it is lost, so is the room
  }

  async drain(): Promise<void> {
    const until = performance.now() + DRAIN_MS;
    while (this.#storing > 0 && performance.now() < until) await Bun.sleep(GATHER_MS);
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
        this.rooms.outage(this, true, "Redis can be used again.");
        retry = RETRY_MS;
        tried();
        for (;;) {
          await this.#beat(link);
          await sleep(HEARTBEAT_MS, undefined, fault);
        }
      } catch (error) {
        const { message } = fault.signal.aborted ? fault.signal.reason : error;
        const why = `REDIS_URL=${withoutPassword(this.url)}: cannot be used: ${message}.`;
        if (!this.#isStopped) this.rooms.outage(this, false, `${why} Trying again until it can.`);
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
    const { prefix } = this.rooms.config;
    await Promise.all([commands.connect(), subscriber.connect()]);
    await commands.send("SET", [`${prefix}data`, randomHex(64), "NX"]);
    link.run = await this.#readRun(link);
    await subscriber.subscribe(`${prefix}servers`, (server) => void this.#alive.set(server, performance.now()));
  }

  /** Names the Redis process and its data set as they are now. */
  async #readRun({ commands }: Link): Promise<string> {
    const asked = [commands.send("INFO", ["server"]), commands.send("GET", [`${this.rooms.config.prefix}data`])];
    const [info, data] = (await Promise.all(asked)) as [string, string | null];
    return sha256(`${/run_id:(\w+)/.exec(info)?.[1]} ${data}`, "hex").slice(0, 12);
  }

  /** Says that this server lives; finds out who else does, and whether Redis is the same. */
  async #beat(link: Link): Promise<void> {
    await link.commands.publish(`${this.rooms.config.prefix}servers`, this.#server);
    if ((await this.#readRun(link)) !== link.run) throw new Error("it has lost something, or is another one");
    for (const [server, at] of this.#alive) {
      if (performance.now() - at < ALIVE_MS) continue;
      this.#alive.delete(server);
      for (const room of this.#rooms()) if (room.elsewhere.delete(server)) this.rooms.presenceChanged(room);
    }
    if (++this.#beats % KEEP_BEATS > 0) return;
    const keys = this.#rooms().flatMap((room) => this.#keys(room));
    for (const key of keys) link.commands.send("EXPIRE", [key, `${OPEN_SECONDS}`, "GT"]).catch(ignore);
  }

  /** Its open rooms. */
  #rooms(): Room[] {
    return [...this.rooms.open.values()].filter((room) => room.broker === this);
  }

  #keys(room: Room): ReturnType<typeof roomKeys> {
    return roomKeys(this.rooms.config, room.name);
  }

  /** Sent whole: Redis may have forgotten its hash. */
  async #run(script: string, room: Room, args: string[]): Promise<unknown> {
    if (!this.#link) throw new Error("Redis is away");
    return this.#link.commands.send("EVAL", [script, "3", ...this.#keys(room), ...args]);
  }
}

/** The part of a room's epoch that its log in Redis has. */
const logEpoch = ({ epoch }: Room) => epoch.slice(0, LOG_DIGITS);

/** A room's keys, as {@link SCRIPT_HEAD} takes them. The first also names its channel. */
function roomKeys({ prefix }: Config, room: string): [state: string, messages: string, keys: string] {
  return [`${prefix}state:${room}`, `${prefix}messages:${room}`, `${prefix}keys:${room}`];
}

/** Seconds until an idle room expires; never is 100 years. */
const idleSeconds = ({ idleDays }: Config) => `${(idleDays || 36_500) * DAY_SECONDS}`;

/** A connection that is replaced, never made again in place. */
function connectRedis(url: string, idleTimeout = SILENT_MS): Bun.RedisClient {
  return new Bun.RedisClient(url, { autoReconnect: false, connectionTimeout: SILENT_MS, idleTimeout });
}

/**
 * The place in the list of the Redis that keeps a room: the highest hash of room and address wins (rendezvous hashing).
 * So the order of the list does not matter, and one more Redis takes only its share of the rooms.
 */
function homeOf(room: string, urls: readonly string[]): number {
  const hashes = urls.map((url) => sha256(`${room}\n${withoutPassword(url)}`, "hex"));
  return hashes.reduce((best, hash, i) => (hash > (hashes[best] as string) ? i : best), 0);
}

// ─── Out: deliver; who comes and goes ────────────────────────────────────────────────────────────────────────────────

/** A hello without what is said to one client alone; and the last seq that it covers. */
type Hello = { readonly last: number; readonly json: string };

/** The open rooms: gives what is stored to everyone, lets members in and out, loses rooms. */
class Rooms {
  server!: Server; // this and the next two are made by `startChat`
  inbox!: Inbox;
  brokerOf!: (room: string) => Broker;
  readonly open = new Map<string, Room>(); // the rooms that somebody is in, by name
  readonly #hellos = new Map<Room, Promise<Hello>>(); // the newest of each room, made once for each change
  readonly #outages = new Set<Broker | string>(); // stores that fail, and rooms, by name

  constructor(
    readonly config: Config,
    readonly log: Logger,
  ) {}

  /** Sends stored messages, which come in order and without a gap, to everyone in the room. */
  deliver(room: Room, messages: Message[]): void {
    // RULE 1: no await since SQLite has committed them, or Redis has notified of them.
    this.#hellos.delete(room);
    for (const missed of room.pendingJoins) missed.push(...messages);
    if (this.server.subscriberCount(room.chatTopic) > 0) this.publish(room, { type: "messages", messages });
    if (this.server.subscriberCount(room.plainTopic) > 0) {
      for (const { text, removes } of messages) if (!removes) this.server.publish(room.plainTopic, text, false);
    }
    if (this.config.logLevel !== "debug") return;
    for (const { seq, name, text } of messages) this.log("debug", `${room} #${seq} ${name}: ${JSON.stringify(text)}`);
  }

  publish(room: Room, frame: ServerFrame): void {
    this.server.publish(room.chatTopic, encode(frame), false);
  }

  /** Tells a sender that a post is in the log already, or is refused. */
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
    if (!this.#outages.has(room.broker)) this.outage(room.name, false, `The log of ${room} cannot be read: ${message}`);
    this.lose(room, "The store cannot be reached"); // RULE 3
  }

  /** Logs that a store fails, or the log of a room, once until it works again. */
  outage(what: Broker | string, isOver: boolean, line: string): void {
    if (isOver ? this.#outages.delete(what) : !this.#outages.has(what)) this.log("error", line);
    if (!isOver) this.#outages.add(what);
  }

  #close(room: Room): void {
    room.state = "closed";
    clearTimeout(room.presenceTimer);
    this.#hellos.delete(room);
    this.open.delete(room.name);
    room.broker.close?.(room);
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
    this.outage(room.name, true, `The log of ${room} can be read again.`);
    // RULE 2: no await from here to the end. What was delivered since the hello was read is in `missed`.
    if (member.state === "joining") {
      if (hello) {
        const role = this.config.operator === "" ? undefined : visitor.role;
        const own = JSON.stringify({ type: "hello", you: visitor.from, role });
        ws.send(`${own.slice(0, -1)},${hello.json.slice(1)}`);
        const messages = missed.filter(({ seq }) => seq > hello.last);
        if (messages.length > 0) ws.send(encode({ type: "messages", messages }));
      }
      ws.subscribe(visitor.isChat ? room.chatTopic : room.plainTopic);
      member.state = "here";
      room.presence = ""; // the new member has not seen it, even if it stays the same
      this.presenceChanged(room);
      this.log("info", `${visitor.address} joined ${room} (${visitor.isChat ? member.name : "plain"})`);
    }
    this.inbox.drain(member);
    if (member.state === "gone") this.#release(member);
  }

  /** The hello with what a client missed, if it can resume; else the newest one. */
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
      this.#hellos.set(room, newest);
      dropOldest(this.#hellos, CACHED_HELLOS);
    }
    return newest;
  }

  async #makeHello(room: Room, from: number, isResume: boolean): Promise<Hello> {
    const { epoch, last } = room;
    const first = firstKept(room, this.config);
    const messages = await room.broker.read(room, from, last);
    const resumed = isResume && messages.length === last - from + 1; // or what it missed is too long for one frame
    if (!resumed) messages.splice(0, messages.length - PAGE_MESSAGES);
    const limits = { text: MAX_TEXT, name: MAX_NAME };
    return { last, json: JSON.stringify({ epoch, first, last, resumed, messages, limits }) };
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

  #sendPresence(room: Room): void {
    room.presenceTimer = undefined;
    room.presenceAt = performance.now();
    const here = whoIsHere(room);
    const announced = JSON.stringify(here);
    if (announced !== room.announced) room.broker.tell?.(room, { here });
    room.announced = announced;
    const all = [here, ...room.elsewhere.values()];
    const count = new Set(all.flatMap(({ ids }) => ids)).size + all.reduce((sum, { nameless }) => sum + nameless, 0);
    const people = new Map(all.flatMap((each) => each.people).map((person) => [person.from ?? person, person]));
    const presence = { count, people: [...people.values()].slice(0, PRESENCE_PEOPLE) };
    if (JSON.stringify(presence) === room.presence) return;
    room.presence = JSON.stringify(presence);
    this.publish(room, { type: "presence", ...presence });
  }

  // ── Dead peers, and the end ──

  /** Pings silent connections, ends those that stay so. (Bun's own timer is put off by what is sent.) */
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

/** Whether a request comes from the server's own page, an allowed one, or none. RFC 6455 section 10.2. */
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
function addressOf(request: Request, server: Server, proxies: number): string {
  const socket = server.requestIP(request)?.address.replace(/^::ffff:/, "") ?? ""; // IPv4 that came to an IPv6 socket
  if (proxies === 0) return socket;
  // Each proxy appends the address that it saw: counted from the right, what a client made up is not reached.
  const forwarded = splitList(request.headers.get("x-forwarded-for") ?? "");
  const address = forwarded[Math.max(0, forwarded.length - proxies)] ?? "";
  // Some proxies add the port too: another for each connection.
  return /^(?:\[(.+)\]|([\d.]+))(?::\d+)?$/.exec(address)?.slice(1).find(Boolean) ?? (address || socket);
}

/** The network of an address: of IPv6 the first 64 bits, which one subscriber has; `""`: this machine. */
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

/** A `Set-Cookie` for this host, unseen by scripts; `Secure` if the browser came by TLS, to the server or to a proxy. */
function setCookie(cookie: string, request: Request, { proxies, tlsCert }: Config): string {
  const isForwarded = proxies > 0 && request.headers.get("x-forwarded-proto") === "https";
  return `${cookie}; Path=/; HttpOnly${tlsCert !== "" || isForwarded ? "; Secure" : ""}`;
}

/** The cookie of 128 random bits from which a browser has its ids. */
const IDENTITY_COOKIE = "chat-me";

/** A new identity. Lax, because a page that is opened by a link from elsewhere must keep it. */
const newIdentity = () => `${IDENTITY_COOKIE}=${randomHex(128)}; Max-Age=${IDENTITY_SECONDS}; SameSite=Lax`;

/** The id of a browser in a room: the same for ever, another in other rooms, not to be had without the cookie. */
function idOf(request: Request, room: string): string | undefined {
  const cookie = cookieOf(request, IDENTITY_COOKIE);
  return cookie && sha256(`${cookie}\n${room}`, "base64url").slice(0, 12);
}

type Password = { readonly role: Role; readonly password: string; readonly key: Buffer };

/**
 * Asks for a password, where there is one: by a session cookie, which `login` gives, or `Authorization: Bearer`. The
 * cookie holds a role and its end, signed; nothing of it is stored, and another password ends it.
 */
class Access {
  readonly wrong = new TokenBuckets<string>({ perSecond: 1 / 60, burst: FREE_TRIES }); // wrong passwords of both kinds, by address
  /** With what signs their cookies: made slowly, so that a stolen one is no quick way to the password. */
  readonly #passwords: Password[] = [];

  constructor(readonly config: Config) {
    for (const [role, password] of [
      ["operator", config.operator],
      ["guest", config.password],
    ] as [Role, string][]) {
      if (password) this.#passwords.push({ role, password, key: scryptSync(password, "chat session", 32) });
    }
  }

  /** Whether there is a password. */
  get asks(): boolean {
    return this.#passwords.length > 0;
  }

  /** The role in which a request may come in, or the refusal. */
  check(request: Request, server: Server): Role | Response {
    const [role, ends = "", signature = ""] = cookieOf(request, cookieName(server))?.split(".") ?? [];
    const owner = this.#passwords.find((each) => each.role === role);
    const isSigned = owner && isEqual(owner.key, signature, hmac(owner.key, ends));
    if (isSigned && Number(ends) > Date.now() / 1000) return owner.role;
    const bearer = /^Bearer (.*)$/i.exec(request.headers.get("authorization") ?? "")?.[1];
    if (bearer !== undefined && this.asks) {
      const found = this.#try(bearer, request, server);
      return found instanceof Response ? found : found.role;
    }
    return this.config.password === "" ? "guest" : refuse(401, "A password is needed.", BEARER);
  }

  /** Answers the page's password form: 204 with a session cookie, 401, or 429 with the seconds to wait. */
  async login(request: Request, server: Server): Promise<Response> {
    const { config } = this;
    if (!originAllowed(request.headers, config.origins)) return refuse(403, "Pages of this origin may not log in.");
    const given = new URLSearchParams(await request.text()).get("password") ?? "";
    // No await from here on: tries that come at the same time are counted one after the other.
    const found = this.#try(given, request, server);
    if (found instanceof Response) return found;
    const ends = `${Math.floor(Date.now() / 1000) + SESSION_SECONDS}`;
    const session = `${cookieName(server)}=${found.role}.${ends}.${hmac(found.key, ends)}`;
    const cookie = setCookie(`${session}; Max-Age=${SESSION_SECONDS}; SameSite=Strict`, request, config);
    return new Response(null, { status: 204, headers: { "Set-Cookie": cookie } });
  }

  /** The password that was given, or the refusal. An address that guesses must wait. */
  #try(given: string, request: Request, server: Server): Password | Response {
    const network = networkOf(addressOf(request, server, this.config.proxies));
    const wait = Math.ceil(this.wrong.wait(network) / 1000);
    if (wait > 0) return refuse(429, "Too many wrong passwords: wait.", { "Retry-After": `${wait}` });
    const [found] = this.#passwords.filter(({ key, password }) => isEqual(key, given, password)); // all are compared
    if (!found) this.wrong.take(network);
    return found ?? refuse(401, "The password is wrong.", BEARER);
  }
}

const BEARER = { "WWW-Authenticate": "Bearer" };

/** With the port, since a browser keeps one jar for all the ports of a host. */
const cookieName = ({ port }: Server) => `chat-${port}`;
const hmac = (key: Buffer, text: string) => createHmac("sha256", key).update(text).digest("base64url");
/** Compares in constant time. */
const isEqual = (key: Buffer, given: string, right: string) =>
  timingSafeEqual(Buffer.from(hmac(key, given)), Buffer.from(hmac(key, right)));

// ─── Server: the handshake, the page, start and stop ─────────────────────────────────────────────────────────────────

/** A running chat. */
export interface Chat {
  /** The address to open, with the port that was taken; ends with a slash. */
  readonly url: string;
  /** Stores and delivers what was taken, closes sockets with 1001, and the store. Takes at most 3 s. */
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
  const inbox = (rooms.inbox = new Inbox(rooms));
  const brokers = config.redisUrls.map((url): Broker => new RedisBroker(url, rooms));
  if (brokers.length === 0) brokers.push(new SqliteBroker(rooms));
  rooms.brokerOf = (room) => brokers[homeOf(room, config.redisUrls)] as Broker;
  await Promise.all(brokers.map((broker) => broker.start()));
  try {
    rooms.server = listen(config, makeHandlers(rooms, access));
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
    await Promise.race([closed, Bun.sleep(CLOSE_MS)]); // whoever has not answered by then is cut
    for (const broker of brokers) broker.stop();
    void server.stop(true);
  };
  let stopped: Promise<void> | undefined;
  const host = config.host.includes(":") ? `[${config.host}]` : config.host || "localhost";
  const url = `${config.tlsCert === "" ? "http" : "https"}://${host}:${server.port}/`;
  return { url, stop: () => (stopped ??= stop()) };
}

/** What the server does with requests and sockets. */
function makeHandlers(rooms: Rooms, access: Access) {
  const { config, log } = rooms;
  const page = makePage(pageSource as unknown as string, config); // bun-types takes every .html import for a bundle
  const isHeard = (ws: Socket) => void (ws.data.heardAt = performance.now());
  return {
    fetch: (request: Request, server: Server) => {
      const url = URL.parse(request.url);
      if (!url) return refuse(400, "The Host header names no host.");
      if (url.pathname.startsWith("/ws/")) return handshake(request, url, server, access);
      if (request.method === "POST" && access.asks) return access.login(request, server);
      return page(request);
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
function listen(config: Config, handlers: ReturnType<typeof makeHandlers>): Server {
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
function handshake(request: Request, url: URL, server: Server, access: Access): Response | undefined {
  const { headers } = request;
  const { config } = access;
  if (headers.get("upgrade")?.toLowerCase() !== "websocket") {
    return refuse(426, "Here a WebSocket is expected.", { Upgrade: "websocket", Connection: "Upgrade" });
  }
  if (headers.get("sec-websocket-version") !== "13") {
    return refuse(426, "The WebSocket version is 13.", { "Sec-WebSocket-Version": "13" }); // RFC 6455 section 4.2.2
  }
  if (!originAllowed(headers, config.origins)) {
    return refuse(403, "Pages of this origin may not connect; CHAT_ORIGINS lists those that may.");
  }
  const roomName = roomOf(url.pathname.slice("/ws/".length));
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
  const query = url.searchParams;
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

/** Answers every path outside `/ws/` with the page. Its headers and its compressed form are made once. */
function makePage(html: string, config: Config): (request: Request) => Response {
  const plain = new TextEncoder().encode(html);
  const compressed = Bun.gzipSync(plain, { library: "libdeflate", level: 10 }); // 10 ms, once, for 5 % less each time
  const etag = `W/"${sha256(html, "hex").slice(0, 32)}"`; // weak: one for both forms
  const fixed = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": contentSecurityPolicy(html),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    // Asked for each time, for a 304. Private: no cache may give two people one identity.
    "Cache-Control": "private, no-cache",
    Vary: "Accept-Encoding",
    ETag: etag,
  };
  return (request) => {
    const { method } = request;
    if (method !== "GET" && method !== "HEAD") {
      return refuse(405, "Only GET and HEAD are supported.", { Allow: "GET, HEAD" });
    }
    const headers = new Headers(fixed);
    if (cookieOf(request, IDENTITY_COOKIE) === undefined)
      headers.set("Set-Cookie", setCookie(newIdentity(), request, config));
    if (request.headers.get("if-none-match")?.includes(etag.slice(2)))
      return new Response(null, { status: 304, headers });
    const gzip = /\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))/i.test(request.headers.get("accept-encoding") ?? "");
    if (gzip) headers.set("Content-Encoding", "gzip");
    return new Response(gzip ? compressed : plain, { headers });
  };
}

/** The page runs its one script and its one style, and nothing from elsewhere. CSP Level 3. */
function contentSecurityPolicy(html: string): string {
  const hash = (tag: string) =>
    `'sha256-${sha256(new RegExp(`<${tag}>([^]*?)</${tag}>`).exec(html)?.[1] ?? "", "base64")}'`;
  const sources = `default-src 'none'; script-src ${hash("script")}; style-src ${hash("style")}; img-src data:`;
  const rest = "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";
  return `${sources}; ${rest}; require-trusted-types-for 'script'; trusted-types 'none'`;
}

// ─── Moving: export and import ───────────────────────────────────────────────────────────────────────────────────────

/** A line of an export: a message, and the room it stands in. */
type Line = Message & { room: string };

const EXPORT_ALL = `SELECT rooms.name AS room, ${COLUMNS} FROM rooms JOIN messages ON room = id
  WHERE seq > (SELECT max(seq) FROM messages WHERE room = id) - ? ORDER BY id, seq`;

/** The kept messages of every room, room by room. A server on the same store is not disturbed. @throws StartError */
export async function* exportMessages(config: Config): AsyncGenerator<Line> {
  for (const url of config.redisUrls) yield* exportRedis(url, config);
  if (config.redisUrls.length > 0) return;
  if (!existsSync(config.db)) throw new StartError(`CHAT_DB=${config.db}: there is no such database.`);
  using db = new Database(config.db, { readonly: true });
  const rows = db.query<Row & { room: string }, [number]>(EXPORT_ALL);
  for (const row of rows.iterate(config.history)) yield { room: row.room, ...messageOf(row) };
}

async function* exportRedis(url: string, config: Config): AsyncGenerator<Line> {
  const redis = connectRedis(url, 0);
  const match = `${config.prefix.replaceAll(/[\\*?[\]]/g, "\\$&")}state:*`;
  const rooms = new Set<string>();
  for (let cursor = ""; cursor !== "0";) {
    const scan = [cursor || "0", "MATCH", match, "COUNT", `${STEP_MESSAGES}`];
    const [next, keys] = (await redis.send("SCAN", scan)) as [string, string[]];
    for (const key of keys) rooms.add(key.slice(`${config.prefix}state:`.length));
    cursor = next;
  }
  for (const room of rooms) {
    const keys = roomKeys(config, room);
    const last = Number(await redis.send("HGET", [keys[0], "last"]));
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
function checkedLine(line: Partial<Line>): Line {
  const { room = "", seq = 0, at = NaN, name = "", from, text = "", removes, removed, key } = line;
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
 * @returns the rooms that were not taken, because they are there already
 * @throws StartError when a line is broken, or a server uses the SQLite file: then nothing has changed
 */
export async function importMessages(config: Config, text: string): Promise<string[]> {
  const rooms = readExport(text);
  return config.redisUrls.length === 0 ? importSqlite(config, rooms) : importRedis(config, rooms);
}

/** Refused while a server runs on the file, which would not learn of it. */
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

/** ARGV: epoch, the last seq, seconds until an idle room expires; then of each message its seq, key, JSON. */
const IMPORT_SCRIPT = `${SCRIPT_HEAD}
if last > 0 then return 0 end
redis.call('DEL', log, keys)
redis.call('HSET', room, 'epoch', ARGV[1], 'last', ARGV[2])
for i = 4, #ARGV, 3 do
  if ARGV[i + 1] ~= '' then redis.call('HSET', keys, ARGV[i + 1], ARGV[i]) end
  redis.call('RPUSH', log, ARGV[i + 2])
end
expire(ARGV[3])
redis.call('PUBLISH', room, '{"epoch":"' .. ARGV[1] .. '","messages":[]}') -- whoever is in the empty room comes back
return 1`;

async function importRedis(config: Config, rooms: Map<string, Line[]>): Promise<string[]> {
  const refused: string[] = [];
  const connections = config.redisUrls.map((url) => connectRedis(url, 0));
  for (const [name, lines] of rooms) {
    const keys = roomKeys(config, name);
    const head = [randomHex(64), `${lines.at(-1)?.seq}`, idleSeconds(config)];
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
    const refused = await importMessages(readConfig(process.env), text);
    if (refused.length === 0) return console.error("Imported.");
    throw new StartError(`Not imported, as these rooms are there already: ${JSON.stringify(refused)}.`);
  }
  throw new StartError(`${[command, ...rest].join(" ")}: no such command; --help lists them.`);
}

function help(): string {
  const settings = Object.values(SETTINGS).map(([variable, fallback, , what]) => {
    return `  ${variable.padEnd(15)} ${what}${fallback && ` (${fallback})`}`;
  });
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
  // For whoever started it in a terminal: the addresses at which others reach this machine.
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
