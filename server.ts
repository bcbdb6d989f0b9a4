/// <reference types="bun-types" />
/**
 * A chat server in one file. A message passes through it from top to bottom:
 *
 *    socket ── text frame ──▶ receive     parses the frame
 *                                │
 *                                ▼
 *                              pace       the token buckets of the sender and its address: slows, never drops
 *                                │
 *                                ▼
 *                              append     the broker stores the post and gives it the room's next seq
 *                                │        only what is stored goes on
 *                                ▼
 *                              deliver    server.publish(topic), for each dialect ──▶ every socket of the room
 *
 * Three rules hold it together, and a comment marks each place where one applies:
 *   RULE 1  Never await between raising `room.last` and publish: the order stored is the order seen.
 *   RULE 2  Never await between the last replayed message and `ws.subscribe`: nobody joins into a gap.
 *   RULE 3  In doubt, lose the room: close its sockets with 1013 and forget it. Clients resume exactly: this is
 *           the only recovery.
 *
 * Two dialects meet in every room. "Plain" sockets exchange bare texts; those with the subprotocol `chat.v1` the JSON
 * objects typed below.
 */
import { Database, type Statement } from "bun:sqlite";
import { createHmac, randomBytes, scryptSync, timingSafeEqual } from "node:crypto";
import { closeSync, existsSync, openSync, realpathSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
// As text, so that `bun build --compile` takes it into the executable.
import pageSource from "./index.html" with { type: "text" };

// ─── Limits ──────────────────────────────────────────────────────────────────────────────────────────────────────────

// What a client may send.
const MAX_TEXT = 16 * 1024; // bytes of UTF-8
const MAX_FRAME = 64 * 1024; // bytes; a longer one closes the socket with 1009
const MAX_NAME = 32; // code points
const MAX_ROOM = 64; // code points
const MAX_STRIKES = 10; // bad frames until the socket is closed with 1008
// What a client is sent.
const PAGE_MESSAGES = 100; // in a page of history, and in the hello of a fresh start
const PAGE_BYTES = 256 * 1024; // of text in both, as JSON: half of BACKPRESSURE_BYTES
const RESUME_MESSAGES = 1000; // that a client may miss and still resume
const CACHED_HELLOS = 64; // in the whole server: some 20 MB
const PRESENCE_PEOPLE = 100; // listed in a presence frame; the count is exact
const PRESENCE_MS = 1000; // between two presence frames of a room
const TYPING_MS = 2000; // between two typing frames of a sender that are passed on
const PONG_MS = 1000; // between two pongs that do not wait for the rate
// Rates: CHAT_RATE is that of one connection.
const BURST_SECONDS = 10; // worth of frames that a silent sender may send at once
const ADDRESS_CONNECTIONS = 10; // worth of frames that one address may send
const PAGE_TOKENS = 10; // of its address, for a page
const FREE_TRIES = 5; // wrong passwords of an address at once; then one a minute
const MAX_BUCKETS = 10_000; // of each kind
// What is buffered for one connection.
const QUEUE_BYTES = 1024 * 1024; // from a sender, until its socket is paused
const QUEUE_FRAME_BYTES = 64; // for each queued frame beside its text
const BACKPRESSURE_BYTES = 512 * 1024; // for a slow reader: with the frame that passes it, 1 MiB
// Under load messages are gathered, which saves system calls, until one of these is reached.
const GATHER_MS = 6;
const MAX_GATHER_MS = 20; // for 1,000 people
const GATHER_POSTS = 32;
const GATHER_CHARACTERS = 64 * 1024; // UTF-16 units
const CHUNK_MESSAGES = 1000; // read, trimmed or sent in one go: other work runs in between
const MAX_KEYS = 98_000; // in one Map: to grow further takes it 9 ms
const VACUUM_BYTES = 32 * 1024 * 1024; // largest database that is vacuumed at stop: 1 s
// Requests and cookies.
const MAX_BODY = 4096; // bytes: a password
const DAY_SECONDS = 24 * 60 * 60;
const SESSION_SECONDS = 30 * DAY_SECONDS; // of the cookie that a password gives
const IDENTITY_SECONDS = 365 * DAY_SECONDS; // of the cookie that makes a browser's ids
// How long `stop` waits: with the vacuum, less than 3 s.
const DRAIN_MS = 800; // for the store
const CLOSE_MS = 1000; // for clients to answer the Close frame

// ─── The protocol: chat.v1 ───────────────────────────────────────────────────────────────────────────────────────────

/** An entry of a room's log, as it is stored and as every `chat.v1` client sees it. */
export interface Message {
  seq: number; // 1, 2, 3 … without a gap
  at: number; // milliseconds since 1970
  name: string; // of the sender, who may have made it up
  from?: string; // the sender's id in this room, which its cookie proves
  text: string;
  removes?: number; // the seq of the message that this entry takes back
  removed?: true; // it was taken back: its text is gone
  key?: string; // made by a chat.v1 sender
}

/** Somebody who is in a room. */
export type Person = Pick<Message, "name" | "from">;
export type Role = "guest" | "operator";

/** What the server sends to a `chat.v1` client. */
export type ServerFrame =
  | {
      type: "hello"; // always the first frame
      you?: string; // the client's own id, if it has one
      role?: Role; // only where the server has an operator
      epoch: string; // names this log; seqs of another mean nothing in it
      first: number; // the oldest seq kept; 1 if there is none
      last: number; // the newest; 0 if there is none
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

/** What a `chat.v1` client sends: each type of frame, and a sample of each field. */
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

/** What can be wrong with a client's frame. Only `bad-frame` is a strike. */
const ERRORS = {
  "bad-frame": "The frame is not of the protocol chat.v1.",
  "bad-key": "A key is 1 to 64 characters of A-Z, a-z, 0-9, _ and -.",
  "bad-name": `A name has 1 to ${MAX_NAME} characters, and no control characters.`,
  empty: "The text is empty.",
  "too-long": `A text has at most ${MAX_TEXT} bytes.`,
  "not-yours": "Only its author or the operator can take a message back.",
  gone: "This message is no longer kept.",
};
export type ErrorCode = keyof typeof ERRORS;

/** Close codes of RFC 6455, the IANA registry (1013) and the private range (4401). */
const CLOSE = { goingDown: 1001, binary: 1003, protocol: 1008, tooBig: 1009, bug: 1011, tryAgain: 1013, login: 4401 };
const KEY = /^[A-Za-z0-9_-]{1,64}$/;
const ID = /^[A-Za-z0-9_-]{12}$/;
const CONTROL = /[\p{Cc}\p{Zl}\p{Zp}\u202a-\u202e\u2066-\u2069]/u; // and what turns texts around

/** Checks the fields of a `chat.v1` frame and their types: a number is a seq. Texts are checked where they are used. */
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
  const isNumber = (name: string) => typeof sample[name] === "number";
  const fits = names.every((name) => (isNumber(name) ? isSeq(frame[name]) : typeof frame[name] === "string"));
  if (fits && Object.keys(frame).length === names.length + 1) return frame as ClientFrame;
  const list = names.map((name) => `, ${name} (${isNumber(name) ? "a whole number from 1" : "a string"})`);
  return badFrame(`"${type}" has the fields type${list.join("")}, and no others.`);
}

function errorFrame(code: ErrorCode, key = "", text = ERRORS[code]): ErrorFrame {
  return { type: "error", code, text, key: KEY.test(key) ? key : undefined };
}

const badFrame = (text: string) => errorFrame("bad-frame", "", text);
const isSeq = (value: unknown) => Number.isSafeInteger(value) && (value as number) >= 1;
/** A frame as JSON; fields that are undefined are left out. */
const encode = (frame: ServerFrame) => JSON.stringify(frame);
const PONG = encode({ type: "pong" });
/** A UTF-16 unit takes one to three bytes of UTF-8. */
const isTooLong = (text: string) => text.length * 3 > MAX_TEXT && Buffer.byteLength(text) > MAX_TEXT;
/** A name as it is shown, or undefined when it cannot be given. */
const cleanName = (name: string) => cleanLine(name.toWellFormed().trim(), MAX_NAME) || undefined;

/** A text, NFC-normalised; undefined when it is too long, or has control characters. */
function cleanLine(text: string, max: number): string | undefined {
  const clean = text.normalize("NFC");
  const isOver = clean.length > max && [...clean].length > max;
  return isOver || CONTROL.test(clean) ? undefined : clean;
}

/** The room that a path names after `/ws/`; `""` is the lobby. Undefined if the name is invalid. */
function roomOf(path: string): string | undefined {
  try {
    return cleanLine(decodeURIComponent(path), MAX_ROOM);
  } catch {
    return undefined; // it is not UTF-8
  }
}

const randomHex = (bits: number) => randomBytes(bits / 8).toString("hex");
const sha256 = (text: string, encoding: "hex" | "base64" | "base64url") =>
  new Bun.CryptoHasher("sha256").update(text).digest(encoding);
const splitList = (list: string) => list.split(",").flatMap((entry) => entry.trim() || []);

// ─── Configuration ───────────────────────────────────────────────────────────────────────────────────────────────────

const LOG_LEVELS = ["silent", "error", "info", "debug"] as const;
const REDIS = /^(redis|valkey)s?:\/\/./;
const ORIGIN = /^(\*|(https?:\/\/)?[^/?#*@\s]+)$/;

/** Wraps `read`: where it returns undefined, throws what is allowed. */
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
const oneOf = <T extends string>(...words: T[]) =>
  check(`one of ${words.join(", ")}`, (value) => words.find((each) => each === value));
const listOf = (form: RegExp, what: string) =>
  check(`${what}, separated by commas`, (list) => {
    const entries = splitList(list);
    return entries.every((entry) => form.test(entry)) ? entries : undefined;
  });

/** The variable of each setting, its default, its check, and its line of `--help`. */
const SETTINGS = {
  port: ["PORT", "8080", wholeNumber(0, 65_535), "TCP port; 0: any free one"],
  host: ["HOST", "", (host: string) => host.replace(/^\[(.*)\]$/, "$1"), "address to listen on; empty: all"],
  db: ["CHAT_DB", "chat.sqlite", (path: string) => path.trim() || "chat.sqlite", "the database: a file, or :memory:"],
  sync: ["CHAT_SYNC", "full", oneOf("full", "normal"), "full survives a power cut, normal a crash of the server"],
  redisUrls: ["REDIS_URL", "", listOf(REDIS, "redis:// addresses"), "a Redis to use instead, or several, by commas"],
  prefix: ["CHAT_PREFIX", "chat:", String, "what this chat's keys in Redis begin with"],
  password: ["CHAT_PASSWORD", "", String, "asked of everyone; without it, anyone can join"],
  operator: ["CHAT_OPERATOR", "", String, "a second password, for whoever may remove any message"],
  origins: ["CHAT_ORIGINS", "", listOf(ORIGIN, "origins, hosts, or *"), "other origins whose pages may connect"],
  proxies: ["CHAT_PROXIES", "0", wholeNumber(0, 10), "proxies in front, trusted to add X-Forwarded-For"],
  history: ["CHAT_HISTORY", "10000", wholeNumber(1, 10_000_000), "messages kept in each room"],
  idleDays: ["CHAT_IDLE_DAYS", "30", wholeNumber(0, 36_500), "days until an unused room is forgotten; 0: never"],
  rate: ["CHAT_RATE", "20", wholeNumber(0, 1_000_000), "frames a second from each connection; 0: no limit"],
  tlsCert: ["TLS_CERT", "", String, "PEM file of a certificate: serves https and wss"],
  tlsKey: ["TLS_KEY", "", String, "PEM file of its key"],
  reusePort: ["REUSE_PORT", "0", oneOf("0", "1"), "1: several servers on one port (Linux, with Redis)"],
  logLevel: ["LOG_LEVEL", "info", oneOf(...LOG_LEVELS), `${LOG_LEVELS.join(", ")} (each message too)`],
} as const;

/** What a chat is started with: the settings, and two times that only tests shorten. */
export type Config = { readonly [Name in keyof typeof SETTINGS]: ReturnType<(typeof SETTINGS)[Name][2]> } & {
  readonly silenceSeconds: number; // until a dead connection is ended; under 60, so that proxies see traffic
  readonly expireMs: number; // between two looks for idle rooms
};

/** An operator error, such as a bad value or a port in use: gets one line. */
export class StartError extends Error {}

/** Unset and empty variables get their defaults. @throws StartError with the variable, its value and what is allowed */
export function readConfig(env: Record<string, string | undefined>): Config {
  const entries = Object.entries(SETTINGS).map(([name, [variable, fallback, read]]) => {
    const value = env[variable] || fallback;
    try {
      return [name, read(value)];
    } catch (error) {
      throw new StartError(`${variable}=${withoutPassword(value)}: ${(error as Error).message}.`);
    }
  });
  const known = Object.values(SETTINGS).map(([variable]) => variable as string);
  const unknown = Object.keys(env).find((name) => name.startsWith("CHAT_") && !known.includes(name));
  if (unknown) throw new StartError(`${unknown}: no such setting; --help lists them.`);
  const config: Config = { ...Object.fromEntries(entries), silenceSeconds: 50, expireMs: DAY_SECONDS * 1000 };
  if (!config.tlsCert !== !config.tlsKey) throw new StartError("TLS_CERT and TLS_KEY: set both, or neither.");
  if (config.operator !== "" && config.operator === config.password) {
    throw new StartError("CHAT_OPERATOR: must differ from CHAT_PASSWORD, or everyone is the operator.");
  }
  return Object.freeze(config);
}

/** Hides passwords in URLs: they may contain an @. */
const withoutPassword = (urls: string) => urls.replace(/\/\/.*@/, "//…@");

type Logger = (level: "error" | "info" | "debug", line: string) => void;

function makeLogger(upTo: Config["logLevel"]): Logger {
  return (level, line) => {
    if (LOG_LEVELS.indexOf(level) > LOG_LEVELS.indexOf(upTo)) return;
    // A terminal obeys some characters.
    const escape = (character: string) => `\\u{${character.codePointAt(0)?.toString(16)}}`;
    const seen = line.replace(/(?!\n)[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, escape);
    (level === "error" ? console.error : console.log)(seen);
  };
}

/** Keeps a cache small: drops the entry that was added first. */
function dropOldest<Key>(entries: Map<Key, unknown> | Set<Key>, max: number): void {
  if (entries.size > max) entries.delete(entries.keys().next().value as Key);
}

// ─── Token buckets: one kind for every rate ──────────────────────────────────────────────────────────────────────────

/** For each owner `burst` tokens after a silence, `perSecond` on average. */
class TokenBuckets<Owner> {
  readonly #buckets = new Map<Owner, { tokens: number; at: number }>();

  constructor(readonly rate: { readonly perSecond: number; readonly burst: number }) {}

  /** Milliseconds until there is a token. */
  wait(owner: Owner): number {
    return Math.max(0, Math.ceil(((1 - this.#tokens(owner)) * 1000) / this.rate.perSecond));
  }

  take(owner: Owner, count = 1): void {
    const tokens = this.#tokens(owner) - count;
    this.#buckets.delete(owner); // used last, dropped last
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

// ─── Rooms and members ───────────────────────────────────────────────────────────────────────────────────────────────

type Server = Bun.Server<Member>;
type Socket = Bun.ServerWebSocket<Member>;

/** What the handshake learns of a client. */
interface Visitor {
  roomName: string;
  address: string; // for the log
  network: string; // whose rate it shares; "": this machine, which is free
  isChat: boolean; // it speaks chat.v1; else plain
  from: string | undefined; // its id in this room, if it has the cookie
  role: Role;
  resume: { epoch: string; after: number } | undefined; // where it left off
}

/** Joining: its frames wait until its hello is out. Here: it gets every message. Gone: its socket is closed. */
type MemberState = "joining" | "here" | "gone";

/** One connection, as `ws.data`. */
class Member {
  state: MemberState = "joining";
  refusal = ""; // why it is closed at once
  ws!: Socket; // set, as the room is, when the socket opens
  room!: Room;
  heardAt = performance.now(); // when something last came from it
  queue: { frame: ClientFrame | ErrorFrame; bytes: number }[] = []; // what came too fast, or before the hello
  queueBytes = 0;
  drainTimer: Timer | undefined; // waits for the next token
  strikes = 0; // frames outside the protocol
  typedAt = -Infinity;
  pongedAt = -Infinity;

  constructor(
    public name: string,
    readonly visitor: Readonly<Visitor>,
  ) {}
}

/** Who is in a room on one server: each id once, the sockets without one, at most PRESENCE_PEOPLE of chat.v1. */
type Here = { ids: string[]; nameless: number; people: Person[] };

/** A room while somebody is in it. */
class Room {
  state: "opening" | "open" | "closed" = "opening"; // closed: nobody is in it, or it was lost
  opened!: Promise<void>; // settles when its log is open
  readonly members = new Set<Member>();
  // Set by the broker:
  epoch = ""; // names its log
  first = 1; // the oldest seq in the store
  last = 0; // the newest; SQLite raises it before the commit
  row = 0; // SQLite: its id; 0 until its first message is stored
  keys: Map<number, number>[] | undefined; // SQLite: seqs by hash of the key, once needed; the newest last
  waiting: Post[] = []; // SQLite: until the keys are loaded; Redis: for the batch in flight
  heldBack: Batch[] = []; // Redis: batches that arrived while it was opening
  readonly takenBack = new Set<number>(); // Redis: seqs, the newest only
  // Set by `Rooms`:
  readonly pendingJoins = new Set<Message[]>(); // for each hello being made: what was delivered since
  readonly elsewhere = new Map<string, Here>(); // who is here on other servers
  sentToServers = ""; // who is here on this one, as the others know it
  sentToClients = ""; // who is here on all, as the clients know it
  presenceAt = -Infinity;
  presenceTimer: Timer | undefined;

  constructor(
    readonly name: string,
    readonly broker: Broker, // the one that keeps its log
    readonly chatTopic = `chat.v1/${name}`,
    readonly plainTopic = `plain/${name}`,
  ) {}

  toString(): string {
    return this.name === "" ? "the lobby" : `room "${this.name}"`;
  }
}

// ─── In: receive and pace ────────────────────────────────────────────────────────────────────────────────────────────

/** Takes frames from `websocket.message`, at each sender's rate. */
class Inbox {
  isStopping = false;
  readonly senders: TokenBuckets<Member>;
  readonly addresses: TokenBuckets<string>; // many people may be behind one

  constructor(readonly rooms: Rooms) {
    const { rate } = rooms.config;
    const perSecond = rate * ADDRESS_CONNECTIONS;
    this.senders = new TokenBuckets({ perSecond: rate, burst: rate * BURST_SECONDS });
    this.addresses = new TokenBuckets({ perSecond, burst: perSecond * BURST_SECONDS });
  }

  receive(ws: Socket, data: string | Buffer): void {
    const member = ws.data;
    member.heardAt = performance.now();
    if (ws.readyState !== WebSocket.OPEN) return; // read with a frame that closed it
    if (typeof data !== "string") return ws.close(CLOSE.binary, "Only text frames are accepted.");
    const frame = member.visitor.isChat ? parseFrame(data) : ({ type: "post", key: "", text: data } as const);
    // A ping now and then passes the queue, or a slowed client would take its connection for dead.
    const passes = frame.type === "ping" && member.heardAt - member.pongedAt >= PONG_MS;
    if (!passes || member.state !== "here") return this.pace(member, frame, Buffer.byteLength(data));
    member.pongedAt = member.heardAt;
    ws.send(PONG);
  }

  /** Queues a frame, and acts on it at once while its sender keeps to the rate. */
  pace(member: Member, frame: ClientFrame | ErrorFrame, length: number): void {
    const bytes = length + QUEUE_FRAME_BYTES;
    member.queue.push({ frame, bytes });
    member.queueBytes += bytes;
    if (member.state === "here") this.drain(member);
    if (member.queueBytes >= QUEUE_BYTES && !member.ws.isPaused) member.ws.pause();
  }

  /** Acts on as many frames as the rates allow; a timer comes back for the rest. */
  drain(member: Member): void {
    if (member.drainTimer) return;
    let wait = 0;
    while (member.queue.length > 0 && (wait = this.#takeTokens(member)) === 0) {
      const { frame, bytes } = member.queue.shift() as Member["queue"][0];
      member.queueBytes -= bytes;
      this.#act(member, frame);
    }
    if (member.state !== "here") return;
    if (member.ws.isPaused && member.queueBytes < QUEUE_BYTES / 2) member.ws.resume();
    if (member.queue.length === 0) return;
    // Many may wait for one address: each looks only when its own tokens come.
    wait = Math.max(wait, 1000 / this.rooms.config.rate);
    member.drainTimer = setTimeout(() => {
      member.drainTimer = undefined;
      this.drain(member);
    }, wait);
  }

  /** Takes a token of the sender and of its address, or returns the milliseconds to wait for both. */
  #takeTokens(member: Member): number {
    if (this.rooms.config.rate === 0) return 0;
    const { network } = member.visitor;
    const wait = Math.max(this.senders.wait(member), network === "" ? 0 : this.addresses.wait(network));
    if (wait > 0) return wait;
    this.senders.take(member);
    if (network !== "") this.addresses.take(network, member.queue[0]?.frame.type === "page" ? PAGE_TOKENS : 1);
    return 0;
  }

  /** Does what a frame asks, or tells its sender what is wrong with it. */
  #act(member: Member, frame: ClientFrame | ErrorFrame): void {
    // In a lost room, a frame would overtake those that the client must send again.
    if (this.isStopping || member.room.state === "closed") return;
    const error = this.#perform(member, frame);
    if (!error) return;
    member.ws.send(encode(error));
    if (error.code !== "bad-frame" || ++member.strikes < MAX_STRIKES) return;
    member.ws.close(CLOSE.protocol, "Too many invalid frames.");
  }

  /** Does what a frame asks, or returns what is wrong with it. */
  #perform(member: Member, frame: ClientFrame | ErrorFrame): ErrorFrame | undefined {
    const { type } = frame;
    if (type === "error") return frame;
    if (type === "post") return this.#post(member, frame.key, frame.text);
    if (type === "remove") return this.#post(member, frame.key, "", frame.seq);
    if (type === "name") return this.#rename(member, frame.name);
    if (type === "page") this.#page(member, frame.before);
    else if (type === "typing") this.#typing(member);
    else member.ws.send(PONG);
  }

  /** Hands a post to the broker, or the removal of a message. */
  #post({ room, ws, name, visitor }: Member, key: string, text: string, removes?: number): ErrorFrame | undefined {
    const { isChat, from } = visitor;
    if (isTooLong(text)) return isChat ? errorFrame("too-long", key) : void ws.close(CLOSE.tooBig, ERRORS["too-long"]);
    if (isChat && !KEY.test(key)) return errorFrame("bad-key");
    if (isChat && text.trim() === "" && removes === undefined) return errorFrame("empty", key);
    // A lone surrogate has no UTF-8: replaced now, it looks the same live and later.
    text = text.toWellFormed();
    room.broker.append({ room, sender: ws.data, at: Date.now(), name, from, text, removes, key: key || undefined });
  }

  #page({ room, ws }: Member, before: number): void {
    const to = Math.min(before - 1, room.last);
    const from = Math.max(firstKept(room, this.rooms.config), to - PAGE_MESSAGES + 1);
    room.broker.read(room, from, to).then(
      (messages) => ws.send(encode({ type: "page", messages })),
      (error: Error) => this.rooms.roomFailed(room, error),
    );
  }

  #rename(member: Member, name: string): ErrorFrame | undefined {
    const clean = cleanName(name);
    if (clean === undefined) return errorFrame("bad-name");
    this.rooms.log("info", `${member.visitor.address} is now ${clean} in ${member.room}`);
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

/** The oldest seq that counts as kept: the store trims later. */
const firstKept = (room: Room, { history }: Config) => Math.max(room.first, room.last - history + 1);

// ─── Brokers: append ─────────────────────────────────────────────────────────────────────────────────────────────────

/** A post, or a removal, on its way to the log. */
type Post = Omit<Message, "seq" | "removed"> & { room: Room; sender: Member };

/** The seq of the message that a post already is, or why it is refused. */
type Answer = number | "gone" | "not-yours";

/** What a server tells the others of a room: who is there, or who types. An empty one asks who is there. */
type Notice = { here?: Here; typing?: string };

/** Keeps the logs of rooms. In doubt, it loses a room. */
interface Broker {
  readonly name: string; // in the log
  /** Resolves when the store can be used, or when it is clear that it cannot for now. */
  start?(): Promise<void>;
  /** Sets the epoch, first, last and state of a room. @throws when the store cannot be reached */
  open(room: Room): Promise<void>;
  /** Ends what `open` began. */
  close?(room: Room): void;
  /** Stores a post, then delivers it, or answers its sender, or loses the room. */
  append(post: Post): void;
  /** The messages with these seqs, ascending: the newest {@link PAGE_BYTES} of them. */
  read(room: Room, from: number, to: number): Promise<Message[]>;
  tell?(room: Room, notice: Notice): void;
  /** Stores and delivers what still waits. */
  finish(): Promise<void>;
  stop(): void;
}

/** Batches items under load, longer in large rooms; after a quiet time, handles one at once. */
class Gatherer<Item extends { room: Room }> {
  readonly #items: Item[] = [];
  #characters = 0;
  #timer: Timer | undefined;
  #doneAt = -Infinity; // when the last batch was handled

  constructor(readonly handle: (items: Item[]) => void) {}

  add(item: Item, characters: number): void {
    this.#items.push(item);
    this.#characters += characters;
    const isEnough = this.#items.length >= GATHER_POSTS || this.#characters >= GATHER_CHARACTERS;
    const waitMs = Math.min(MAX_GATHER_MS, Math.max(GATHER_MS, item.room.members.size / 50));
    const isQuiet = this.#items.length === 1 && performance.now() - this.#doneAt >= waitMs;
    if (isEnough || isQuiet) this.flush();
    else this.#timer ??= setTimeout(() => this.flush(), waitMs);
  }

  flush(): void {
    clearTimeout(this.#timer);
    this.#timer = undefined;
    if (this.#items.length === 0) return;
    const items = this.#items.splice(0);
    this.#characters = 0;
    this.handle(items);
    this.#doneAt = performance.now();
  }
}

/** The newest messages that fit in {@link PAGE_BYTES}, one at least, ascending. */
function newestThatFit(newestFirst: Iterable<Message>): Message[] {
  const messages: Message[] = [];
  let bytes = 0;
  for (const message of newestFirst) {
    // As sent: a control character takes six bytes.
    bytes += Buffer.byteLength(JSON.stringify(message.text)) - 2;
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

const SEED = randomBytes(8).readBigUInt64LE(); // so that nobody can make two keys with one hash
/** A key as it is kept in memory: a million numbers take 60 MB, as many strings 240. */
const hashOf = (key: string) => Number(BigInt.asUintN(53, BigInt(Bun.hash(key, SEED))));

/** Keeps a key in the newest of several Maps: one of a million stops the server for 0.1 s when it grows. */
function addKey(keys: Map<number, number>[], hash: number, seq: number, { history }: Config): void {
  const full = Math.min(MAX_KEYS, history);
  if ((keys.at(-1)?.size ?? full) === full) keys.push(new Map());
  // The full ones that are left hold all that is kept.
  if ((keys.length - 2) * full >= history) keys.shift();
  keys.at(-1)?.set(hash, seq);
}

/** Keeps the logs in one SQLite file: commits a batch in one transaction, then delivers it. */
class SqliteBroker implements Broker {
  readonly name = "The database";
  readonly #db: Database;
  readonly #close: (hasRemoved: boolean) => void;
  #hasRemoved = false;
  readonly #select: Statement<Row, [number, number, number]>;
  readonly #storeAll: (posts: Post[]) => (Message | Answer)[]; // all, or none
  readonly #gatherer = new Gatherer<Post>((posts) => this.#commit(posts));
  readonly #loading = new Map<string, Promise<void>>(); // by room: its keys are being read
  #trimming: Timer | undefined;
  #expiring: Timer | undefined;

  /** @throws StartError when the database cannot be opened for writing */
  constructor(readonly rooms: Rooms) {
    const { db, close } = openLocked(rooms.config);
    this.#db = db;
    this.#close = close;
    this.#select = db.query(`SELECT ${COLUMNS} FROM messages WHERE room = ? AND seq BETWEEN ? AND ? ORDER BY seq DESC`);
    this.#storeAll = db.transaction((posts: Post[]) => posts.map((post) => this.#store(post))).immediate;
    // Not at once: a restored backup must not be emptied before anyone has looked at it.
    const { idleDays, expireMs } = rooms.config;
    if (idleDays > 0) this.#expiring = setInterval(() => void this.#forgetIdle(), expireMs);
  }

  async open(room: Room): Promise<void> {
    // Clients who have just left this room may have posted.
    await this.#loading.get(room.name);
    this.#gatherer.flush();
    const [found] = this.#db.query(FIND_ROOM).values(room.name) as [number, string, number, number][];
    // A visit alone leaves no trace: the room is inserted with its first message.
    [room.row, room.epoch, room.first, room.last] = found ?? [0, randomHex(64), 1, 0];
    if (room.state === "opening") room.state = "open";
  }

  append(post: Post): void {
    const { room, text, key } = post;
    if (room.waiting.length === 0 && (room.keys || !key)) return this.#gatherer.add(post, text.length);
    if (room.waiting.push(post) > 1) return; // the keys are being read already
    const loading = this.#loadKeys(room).catch((error: Error) => this.rooms.roomFailed(room, error));
    const done = () => void this.#loading.delete(room.name);
    this.#loading.set(room.name, loading.then(done));
  }

  /** Keys are kept in memory, because an index makes inserts ten times slower. */
  async #loadKeys(room: Room): Promise<void> {
    const step = this.#db.query("SELECT key, seq FROM messages WHERE room = ? AND seq > ? ORDER BY seq LIMIT ?");
    const keys: Map<number, number>[] = [];
    for (let last = firstKept(room, this.rooms.config) - 1; last < room.last; await Bun.sleep(0)) {
      const rows = step.values(room.row, last, CHUNK_MESSAGES) as [string | null, number][];
      for (const [key, seq] of rows) if (key) addKey(keys, hashOf(key), seq, this.rooms.config);
      last = rows.at(-1)?.[1] ?? room.last;
    }
    room.keys = keys;
    // One by one: if a commit fails, `lose` drops the rest, as a later post must not overtake.
    for (let post; (post = room.waiting.shift());) this.#gatherer.add(post, post.text.length);
  }

  /** Stores posts in one transaction, then delivers them. */
  #commit(posts: Post[]): void {
    const stored = new Map<Room, Message[]>();
    const answers: [Post, Answer][] = [];
    try {
      for (const [i, outcome] of this.#storeAll(posts).entries()) {
        const post = posts[i] as Post;
        if (typeof outcome !== "object") answers.push([post, outcome]);
        else stored.getOrInsert(post.room, []).push(outcome);
      }
    } catch (error) {
      this.rooms.failed(this.name, (error as Error).message);
      for (const { room } of posts) this.rooms.lose(room, "The message could not be stored"); // RULE 3
      return;
    }
    this.rooms.recovered(this.name);
    // RULE 1: no await since `#store` raised `last`, nor in `deliver`.
    for (const [room, messages] of stored) this.rooms.deliver(room, messages);
    for (const [post, answer] of answers) this.rooms.answer(post, answer);
    for (const room of stored.keys()) this.#trimSoon(room);
  }

  /** Inserts a post as the next message. If the commit fails, the room is lost, and with it what is changed here. */
  #store({ room, sender, at, name, from, text, removes, key }: Post): Message | Answer {
    const hash = hashOf(key ?? "");
    const known = room.keys?.findLast((seqs) => seqs.has(hash))?.get(hash) ?? 0;
    const isKept = known >= firstKept(room, this.rooms.config);
    // Another key may have the same hash.
    if (isKept && this.#select.get(room.row, known, known)?.key === key) return known;
    const refusal = removes && this.#erase(room, removes, sender);
    if (refusal) return refusal;
    if (room.row === 0) room.row = Number(this.#db.query(INSERT_ROOM).run(room.name, room.epoch).lastInsertRowid);
    const seq = ++room.last;
    this.#db.query<never, any[]>(INSERT_MESSAGE).run(room.row, seq, at, name, from, text, removes, null, key);
    if (key && room.keys) addKey(room.keys, hash, seq, this.rooms.config);
    return { seq, at, name, from, text, removes, key };
  }

  /** Deletes the text of a message, or says why not. */
  #erase(room: Room, seq: number, { visitor: { from, role } }: Member): Answer | undefined {
    const target = this.#select.get(room.row, seq, seq);
    if (!target || target.removes !== null || seq < firstKept(room, this.rooms.config)) return "gone";
    if (role !== "operator" && !(from && target.from === from)) return "not-yours";
    if (target.removed) return seq;
    this.#hasRemoved = true;
    this.#db.query("UPDATE messages SET text = '', removed = 1 WHERE room = ? AND seq = ?").run(room.row, seq);
  }

  async read(room: Room, from: number, to: number): Promise<Message[]> {
    return newestThatFit(Iterator.from(this.#select.iterate(room.row, from, to)).map(messageOf));
  }

  async finish(): Promise<void> {
    await Promise.race([Promise.all(this.#loading.values()), Bun.sleep(DRAIN_MS)]);
    this.#gatherer.flush();
  }

  stop(): void {
    clearTimeout(this.#trimming);
    clearInterval(this.#expiring);
    this.#expiring = undefined;
    this.#close(this.#hasRemoved);
  }

  /** Deletes a room's oldest messages, step by step. */
  #trimSoon(room: Room): void {
    if (room.last - room.first + 1 < this.rooms.config.history + CHUNK_MESSAGES) return;
    this.#trimming ??= setTimeout(() => {
      this.#trimming = undefined;
      try {
        this.#db.run("DELETE FROM messages WHERE room = ? AND seq < ?", [room.row, room.first + CHUNK_MESSAGES]);
      } catch (error) {
        return this.rooms.log("error", `The history of ${room} cannot be trimmed: ${(error as Error).message}`);
      }
      room.first += CHUNK_MESSAGES;
      this.#trimSoon(room);
    }, GATHER_MS);
  }

  /** Forgets the rooms that nobody is in and nobody has posted to for some days. */
  async #forgetIdle(): Promise<void> {
    const nextIdle = this.#db.query<{ id: number; name: string }, [number, number]>(NEXT_IDLE);
    const cutoff = Date.now() - this.rooms.config.idleDays * DAY_SECONDS * 1000;
    try {
      for (let id = 0; ; await Bun.sleep(GATHER_MS)) {
        this.#gatherer.flush(); // a client that has just left may have posted
        const room = nextIdle.get(id, cutoff);
        if (!room) return;
        id = room.id;
        if (this.rooms.byName.has(room.name) || this.#loading.has(room.name)) continue;
        const forget = () => {
          this.#db.run("DELETE FROM messages WHERE room = ?", [id]);
          this.#db.run("DELETE FROM rooms WHERE id = ?", [id]);
        };
        this.#db.transaction(forget).immediate();
        this.rooms.log("info", `Room "${room.name}" was forgotten: nobody has used it lately.`);
      }
    } catch (error) {
      if (this.#expiring) this.rooms.log("error", `Idle rooms cannot be forgotten: ${(error as Error).message}`);
    }
  }
}

/** Opens the database for this process alone: the system frees the lock when it dies. @throws StartError */
function openLocked({ db: path, sync }: Config): { db: Database; close: (hasRemoved: boolean) => void } {
  let lock: Database | undefined;
  try {
    if (path !== ":memory:") {
      closeSync(openSync(path, "a")); // a file has one real path, whatever its names
      lock = new Database(`${realpathSync(path)}-lock`);
      lock.run("PRAGMA busy_timeout = 500"); // of two that start together, one gets it
      lock.run("BEGIN EXCLUSIVE"); // never committed
    }
    const db = openDatabase(path, sync);
    const close = (hasRemoved: boolean) => {
      try {
        // Rows that were moved leave copies behind, which only this clears.
        if (hasRemoved && Bun.file(path).size < VACUUM_BYTES) db.run("VACUUM");
        db.run("PRAGMA wal_checkpoint(TRUNCATE)");
      } catch {} // a full disk: the next stop does it
      db.close();
      lock?.close();
    };
    return { db, close };
  } catch (error) {
    lock?.close();
    const isLocked = (error as { code?: string }).code === "SQLITE_BUSY";
    const why = isLocked ? "another process holds it; is a second server running?" : `${(error as Error).message}.`;
    throw new StartError(`CHAT_DB=${path}: the database cannot be opened for writing: ${why}`);
  }
}

function openDatabase(path: string, sync: Config["sync"]): Database {
  const db = new Database(path, { create: true, readwrite: true, strict: true });
  db.run("PRAGMA busy_timeout = 500");
  db.run("PRAGMA journal_mode = WAL");
  db.run(`PRAGMA synchronous = ${sync}`);
  db.run("PRAGMA cache_size = -32000"); // KiB: history that many read stays in memory
  db.run("PRAGMA secure_delete = ON"); // removed texts are overwritten, not only unlinked
  db.run("CREATE TABLE IF NOT EXISTS rooms (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, epoch TEXT NOT NULL)");
  db.run(`CREATE TABLE IF NOT EXISTS messages (
    room INTEGER NOT NULL, seq INTEGER NOT NULL, at INTEGER NOT NULL, name TEXT NOT NULL, key TEXT, text TEXT NOT NULL,
    PRIMARY KEY (room, seq)) WITHOUT ROWID`);
  // These are the tables of version 1: a new file and an old one are upgraded alike.
  const { user_version: version } = db.query("PRAGMA user_version").get() as { user_version: number };
  db.transaction(() => {
    const added = version < 2 ? ["sender TEXT", "removes INTEGER", "removed INTEGER"] : [];
    for (const column of added) db.run(`ALTER TABLE messages ADD COLUMN ${column}`);
    // Always a write: finds a read-only file or a full disk.
    db.run("PRAGMA user_version = 2");
  }).immediate();
  return db;
}

// ─── Broker: Redis, for more than one server ─────────────────────────────────────────────────────────────────────────
//
// Keys, after CHAT_PREFIX:
//   state:<room>     hash: epoch, and last seq
//   messages:<room>  list: the log as JSON; trimming keeps indexes from its end valid
//   keys:<room>      hash: key → seq
//   data             a random name of the data set
// Channels, after CHAT_PREFIX:
//   state:<room>     what was stored; who is here on a server; who types
//   servers          heartbeats
//
// The log is the truth, the channel only the quick way to hear of it. A server delivers what it hears if that is exactly
// what comes next; anything else is doubt (RULE 3).

const RETRY_MS = 50; // before the first try to reach Redis again; doubled until MAX_RETRY_MS
const MAX_RETRY_MS = 1000;
const HEARTBEAT_MS = 2000;
const SILENT_MS = 5000; // after which a connection is dead: each carries heartbeats
const ALIVE_MS = 9000; // without a sign of life until a server's people are dropped
const TRIM_TOGETHER = 100; // messages over CHAT_HISTORY
const OPEN_SECONDS = 3600; // the least time to live of an opened room

/** What every script on a room begins with. KEYS: room, log, keys. */
const SCRIPT_HEAD = `
local room, log, keys = unpack(KEYS)
local epoch, last = unpack(redis.call('HMGET', room, 'epoch', 'last'))
last = tonumber(last or 0)
local function expire(...) for _, name in ipairs(KEYS) do redis.call('EXPIRE', name, ...) end end
`;

/**
 * Stores posts and publishes them in one step, so that they are heard in the order of the log.
 * ARGV: epoch, history, seconds until an idle room expires, last seq known; of each post its key, the seq that it
 * removes, whose messages its sender may remove ("*": all), and its JSON after `{"seq":…,`.
 * Returns nil if the epoch differs; else for each post 0 if it was stored, the seq that it already had, or the refusal.
 */
const STORE_SCRIPT = `${SCRIPT_HEAD}
if not epoch and ARGV[4] == '0' then epoch = ARGV[1] end -- an empty room that expired
if epoch ~= ARGV[1] then return false end
local history = tonumber(ARGV[2])
local function erase(target, whose)
  local index = target - last - 1
  local text = index < 0 and target > last - history and redis.call('LINDEX', log, index)
  local message = text and cjson.decode(text)
  if not message or message.removes then return 'gone' end
  if whose ~= '*' and message.from ~= whose then return 'not-yours' end
  if message.removed then return target end
  message.text, message.removed = '', true
  redis.call('LSET', log, index, cjson.encode(message))
end
local answers, stored, length = {}, {}, 0
for i = 5, #ARGV, 4 do
  local key, target, whose, rest = unpack(ARGV, i, i + 3)
  local known = key ~= '' and redis.call('HGET', keys, key)
  local answer = known and tonumber(known) or target ~= '' and erase(tonumber(target), whose)
  if not answer then
    last = last + 1
    stored[#stored + 1] = '{"seq":' .. last .. ',' .. rest
    length = redis.call('RPUSH', log, stored[#stored])
    if key ~= '' then redis.call('HSET', keys, key, last) end
  end
  answers[#answers + 1] = answer or 0
end
if #stored == 0 then return answers end
redis.call('HSET', room, 'epoch', epoch, 'last', last)
if length >= history + ${TRIM_TOGETHER} then
  for _, text in ipairs(redis.call('LRANGE', log, 0, -history - 1)) do
    redis.call('HDEL', keys, cjson.decode(text).key or '')
  end
  redis.call('LTRIM', log, -history, -1)
end
expire(ARGV[3])
redis.call('PUBLISH', room, '{"epoch":"' .. epoch .. '","messages":[' .. table.concat(stored, ',') .. ']}')
return answers`;

/** Makes or keeps a room. ARGV: an epoch for a new one. Returns its epoch, last seq and length. */
const OPEN_SCRIPT = `${SCRIPT_HEAD}
if not epoch then
  epoch, last = ARGV[1], 0
  redis.call('DEL', log, keys)
  redis.call('HSET', room, 'epoch', epoch, 'last', last)
  expire(${OPEN_SECONDS})
end
expire(${OPEN_SECONDS}, 'GT')
return {epoch, last, redis.call('LLEN', log)}`;

/** ARGV: epoch, from, to. Returns the newest PAGE_BYTES or a little more, newest first; nil if the epoch differs. */
const READ_SCRIPT = `${SCRIPT_HEAD}
if epoch ~= ARGV[1] then return false end
local texts, bytes = {}, 0
for seq = ARGV[3], math.max(ARGV[2], last - redis.call('LLEN', log) + 1), -1 do
  texts[#texts + 1] = redis.call('LINDEX', log, seq - last - 1)
  bytes = bytes + #texts[#texts]
  if bytes > ${2 * PAGE_BYTES} then break end
end
return texts`;

/** Messages that were stored together, with the epoch as Redis has it: see `logEpoch`. */
type Batch = { room: Room; epoch: string; messages: Message[] };

/**
 * The two connections to a Redis: when either fails, both are replaced. The run names the Redis process and its data
 * set; it is part of every epoch, so that a log that has lost something is another one.
 */
type Link = { commands: Bun.RedisClient; subscriber: Bun.RedisClient; run: string };

/** Keeps the logs of its rooms in one Redis, which any number of servers share. */
class RedisBroker implements Broker {
  #server = ""; // its name on this link
  #link: Link | undefined; // undefined while Redis is away
  readonly #storing = new Set<Room>(); // a batch of theirs is in flight
  readonly #alive = new Map<string, number>(); // the last sign of life of each server
  readonly #gatherer = new Gatherer<Batch>((batches) => {
    for (const [room, some] of Map.groupBy(batches, (each) => each.room)) this.#deliver(room, some);
  });
  #isStopped = false;
  readonly #ownRooms = () => [...this.rooms.byName.values()].filter((room) => room.broker === this);
  readonly #keys = (room: Room) => roomKeys(this.rooms.config, room.name);

  constructor(
    readonly url: string,
    readonly rooms: Rooms,
    readonly name = `REDIS_URL=${withoutPassword(url)}`,
  ) {}

  start(): Promise<void> {
    return new Promise((tried) => void this.#keepLink(tried));
  }

  async open(room: Room): Promise<void> {
    const hear = (text: string) => this.#onNotice(room, text).catch((error) => this.rooms.roomFailed(room, error));
    await this.#link?.subscriber.subscribe(this.#keys(room)[0], hear);
    const [epoch, last, length] = (await this.#eval(OPEN_SCRIPT, room, [randomHex(64)])) as [string, number, number];
    if (room.state === "closed" || !this.#link) return;
    room.epoch = `${epoch}-${this.#link.run}`;
    room.first = last - length + 1;
    room.last = last;
    room.state = "open";
    this.#deliver(room, room.heldBack.splice(0));
    this.tell(room, {});
  }

  close(room: Room): void {
    this.tell(room, { here: { ids: [], nameless: 0, people: [] } });
    this.#link?.subscriber.unsubscribe(this.#keys(room)[0]).catch(() => {});
  }

  append(post: Post): void {
    post.room.waiting.push(post);
    if (!this.#storing.has(post.room)) void this.#storeWaiting(post.room);
  }

  /** One batch at a time, so that a later post cannot overtake one that may not have been stored. */
  async #storeWaiting(room: Room): Promise<void> {
    this.#storing.add(room);
    while (room.waiting.length > 0) {
      let characters = 0;
      const isTooMuch = ({ text }: Post) => (characters += text.length) > GATHER_CHARACTERS;
      const end = room.waiting.findIndex((post, i) => i === CHUNK_MESSAGES || isTooMuch(post));
      try {
        await this.#store(room, room.waiting.splice(0, end < 0 ? CHUNK_MESSAGES : end));
        this.rooms.recovered(this.name);
      } catch (error) {
        this.rooms.failed(this.name, (error as Error).message);
        this.rooms.lose(room, "The message could not be stored"); // RULE 3
      }
    }
    this.#storing.delete(room);
  }

  /** Stores posts in one round trip; answers duplicates and refusals. The notification delivers what was stored. */
  async #store(room: Room, posts: Post[]): Promise<void> {
    const { config } = this.rooms;
    const args = [logEpoch(room), `${config.history}`, idleSeconds(config), `${room.last}`];
    for (const { sender, at, name, from, text, removes, key } of posts) {
      const whose = sender.visitor.role === "operator" ? "*" : (from ?? "");
      const rest = JSON.stringify({ at, name, from, text, removes, key }).slice(1);
      args.push(key ?? "", `${removes ?? ""}`, whose, rest);
    }
    const answers = (await this.#eval(STORE_SCRIPT, room, args)) as Answer[] | null;
    if (!answers) return this.rooms.roomFailed(room, new Error("it was replaced"));
    for (const [i, answer] of answers.entries()) {
      if (answer !== 0) this.rooms.answer(posts[i] as Post, answer);
    }
  }

  /** Takes a batch from the store script, or a notice from a server. Async only so that a throw becomes a rejection. */
  async #onNotice(room: Room, text: string): Promise<void> {
    const { epoch, messages, server, here, typing } = JSON.parse(text) as Partial<Batch> & Notice & { server?: string };
    if (epoch && messages) return this.#gatherer.add({ room, epoch, messages }, text.length);
    if (!server || server === this.#server) return;
    this.#alive.set(server, performance.now());
    if (typing) return this.rooms.publish(room, { type: "typing", name: typing });
    if (here) room.elsewhere.set(server, here);
    else room.sentToServers = ""; // it asks who is here
    this.rooms.presenceChanged(room);
  }

  /** Delivers what was heard of a room, if it is exactly what comes next. */
  #deliver(room: Room, batches: Batch[]): void {
    if (room.state === "opening") return void room.heldBack.push(...batches);
    if (room.state === "closed") return;
    const next: Message[] = [];
    for (const { epoch, messages } of batches) {
      if (epoch !== logEpoch(room)) return this.rooms.lose(room, "The log was replaced"); // RULE 3
      for (const message of messages) {
        const seq = room.last + next.length + 1;
        if (message.seq > seq) return this.rooms.lose(room, `Message ${seq} was missed`); // RULE 3
        if (message.seq === seq) next.push(message); // a lower one was read when the room was opened
        if (message.removes) dropOldest(room.takenBack.add(message.removes), CHUNK_MESSAGES);
      }
    }
    room.last += next.length; // RULE 1: no await from here to publish
    if (next.length > 0) this.rooms.deliver(room, next);
  }

  async read(room: Room, from: number, to: number): Promise<Message[]> {
    if (to < from) return [];
    const args = [logEpoch(room), `${from}`, `${to}`];
    const texts = (await this.#eval(READ_SCRIPT, room, args)) as string[] | null;
    if (!texts) throw new Error("it was replaced");
    const messages = newestThatFit(texts.map((text) => JSON.parse(text) as Message));
    // What was read may be older than a removal that was heard meanwhile.
    return messages.map((each) => (room.takenBack.has(each.seq) ? { ...each, text: "", removed: true } : each));
  }

  tell(room: Room, notice: Notice): void {
    const text = JSON.stringify({ server: this.#server, ...notice });
    this.#link?.commands.publish(this.#keys(room)[0], text).catch(() => {});
  }

  async finish(): Promise<void> {
    const until = performance.now() + DRAIN_MS;
    while (this.#storing.size > 0 && performance.now() < until) await Bun.sleep(GATHER_MS);
    await Bun.sleep(GATHER_MS); // to hear
    this.#gatherer.flush();
  }

  stop(): void {
    this.#isStopped = true;
    this.#link?.commands.close();
  }

  // ── The link ──

  /** When a connection fails, replaces both, and loses the rooms of this Redis. */
  async #keepLink(tried: () => void): Promise<void> {
    for (let retry = RETRY_MS; !this.#isStopped; retry = Math.min(MAX_RETRY_MS, retry * 2)) {
      const link: Link = { commands: connectRedis(this.url), subscriber: connectRedis(this.url), run: "" };
      const fault = new AbortController();
      link.commands.onclose = link.subscriber.onclose = (error) => fault.abort(error);
      try {
        await this.#connect(link);
        this.#link = link;
        this.rooms.recovered(this.name);
        retry = RETRY_MS;
        tried();
        while (!this.#isStopped) {
          await this.#beat(link);
          await sleep(HEARTBEAT_MS, undefined, { signal: fault.signal });
        }
      } catch (error) {
        const { message } = fault.signal.aborted ? fault.signal.reason : error;
        if (!this.#isStopped) this.rooms.failed(this.name, message);
      }
      this.#link = undefined;
      link.commands.close();
      link.subscriber.close();
      for (const room of this.#ownRooms()) this.rooms.lose(room, "The store cannot be reached"); // RULE 3
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
    this.#server = randomHex(64);
    await subscriber.subscribe(`${prefix}servers`, (server) => void this.#alive.set(server, performance.now()));
  }

  /** Names the Redis process and its data set. */
  async #readRun({ commands }: Link): Promise<string> {
    const asked = [commands.send("INFO", ["server"]), commands.send("GET", [`${this.rooms.config.prefix}data`])];
    const [info, data] = (await Promise.all(asked)) as [string, string | null];
    return sha256(`${/run_id:(\w+)/.exec(info)?.[1]} ${data}`, "hex").slice(0, 12);
  }

  /** Tells that this server is alive; checks whether Redis is the same, and who else is alive. */
  async #beat(link: Link): Promise<void> {
    await link.commands.publish(`${this.rooms.config.prefix}servers`, this.#server);
    if ((await this.#readRun(link)) !== link.run) throw new Error("it was restarted, or its data was replaced");
    for (const [server, at] of this.#alive) {
      if (performance.now() - at < ALIVE_MS) continue;
      this.#alive.delete(server);
      for (const room of this.#ownRooms()) if (room.elsewhere.delete(server)) this.rooms.presenceChanged(room);
    }
  }

  /** Sent whole: Redis may have forgotten its hash. */
  async #eval(script: string, room: Room, args: string[]): Promise<unknown> {
    if (!this.#link) throw new Error("Redis is away");
    return this.#link.commands.send("EVAL", [script, "3", ...this.#keys(room), ...args]);
  }
}

/** An epoch names the log, and after a hyphen the run of Redis. */
const logEpoch = ({ epoch }: Room) => epoch.split("-")[0] as string;
/** Seconds until an idle room expires; never is 100 years. */
const idleSeconds = ({ idleDays }: Config) => `${(idleDays || 36_500) * DAY_SECONDS}`;
const connectRedis = (url: string, idleTimeout = SILENT_MS) =>
  new Bun.RedisClient(url, { autoReconnect: false, connectionTimeout: SILENT_MS, idleTimeout });

/** A room's keys, as {@link SCRIPT_HEAD} takes them; the first also names its channel. */
function roomKeys({ prefix }: Config, room: string): [state: string, messages: string, keys: string] {
  return [`${prefix}state:${room}`, `${prefix}messages:${room}`, `${prefix}keys:${room}`];
}

/** Rendezvous hashing: a room lives on the Redis with the highest hash, so one more takes only its share of the rooms. */
function homeOf(room: string, urls: readonly string[]): number {
  const hashes = urls.map((url) => sha256(`${room}\n${url.replace(/\/\/.*@/, "//")}`, "hex"));
  return hashes.reduce((best, hash, i) => (hash > (hashes[best] as string) ? i : best), 0);
}

// ─── Out: deliver; who comes and goes ────────────────────────────────────────────────────────────────────────────────

/** The open rooms. */
class Rooms {
  server!: Server; // set by `startChat`, as the next two
  inbox!: Inbox;
  brokerOf!: (room: string) => Broker;
  readonly byName = new Map<string, Room>(); // the open ones
  readonly #hellos = new Map<Room, Promise<string>>(); // of each room, without what differs between clients, as JSON
  readonly #failing = new Set<string>(); // stores and rooms, as they were logged
  readonly members = () => [...this.byName.values()].flatMap(({ members }) => [...members]);

  constructor(
    readonly config: Config,
    readonly log: Logger,
  ) {}

  /** Sends stored messages to everyone in the room: in order, and without a gap. */
  deliver(room: Room, messages: Message[]): void {
    // RULE 1: no await since `room.last` was raised.
    this.#hellos.delete(room);
    for (const newer of room.pendingJoins) newer.push(...messages);
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
    ws.send(encode(typeof answer === "number" ? { type: "ack", key, seq: answer } : errorFrame(answer, key)));
  }

  /** RULE 3: whoever is in the room comes back and resumes. */
  lose(room: Room, why: string): void {
    room.waiting = []; // their senders send them again
    if (room.state === "closed") return;
    this.#close(room);
    for (const { ws } of room.members) ws.close(CLOSE.tryAgain, `${why}: reconnect.`);
  }

  /** A room's log cannot be used. */
  roomFailed(room: Room, { message }: Error): void {
    if (room.state === "closed") return;
    if (!this.#failing.has(room.broker.name)) this.failed(`${room}`, message);
    this.lose(room, "The store cannot be reached"); // RULE 3
  }

  /** Logs that a store or a room cannot be used: once, until it works again. */
  failed(what: string, why: string): void {
    if (!this.#failing.has(what)) this.log("error", `${what} cannot be used: ${why}`);
    this.#failing.add(what);
    dropOldest(this.#failing, MAX_BUCKETS);
  }

  recovered(what: string): void {
    if (this.#failing.delete(what)) this.log("error", `${what} can be used again.`);
  }

  #close(room: Room): void {
    room.state = "closed";
    clearTimeout(room.presenceTimer);
    this.#hellos.delete(room);
    this.byName.delete(room.name);
    room.broker.close?.(room);
  }

  // ── Joining and leaving ──

  /** A socket opened: joins its room. */
  enter(ws: Socket): void {
    const member = ws.data;
    if (member.refusal) return ws.close(CLOSE.login, member.refusal);
    const { visitor } = member;
    let room = this.byName.get(visitor.roomName);
    if (!room) {
      room = new Room(visitor.roomName, this.brokerOf(visitor.roomName));
      this.byName.set(visitor.roomName, room);
      room.opened = room.broker.open(room);
    }
    member.ws = ws;
    member.room = room;
    room.members.add(member);
    const hello = visitor.isChat && !visitor.resume && Bun.peek(this.#hellos.get(room));
    // One that is ready leaves in one packet with the handshake.
    if (typeof hello === "string") this.#admit(member, hello);
    else this.#join(member, room).catch((error: Error) => this.roomFailed(room, error));
  }

  /** Reads what a member needs first, then lets it in. */
  async #join(member: Member, room: Room): Promise<void> {
    const { visitor } = member;
    await room.opened;
    const newer: Message[] = [];
    room.pendingJoins.add(newer); // in the same tick as the hello reads `last`
    const hello = visitor.isChat ? await this.#hello(room, visitor.resume) : undefined;
    room.pendingJoins.delete(newer);
    this.recovered(`${room}`);
    this.#admit(member, hello, newer);
  }

  /** The hello with what a client missed, if it can resume; else the newest page. */
  async #hello(room: Room, resume: Visitor["resume"]): Promise<string> {
    const from = resume?.epoch === room.epoch ? resume.after + 1 : 0; // 0: cannot resume
    const count = room.last - from + 1;
    const canResume = from >= firstKept(room, this.config) && count >= 0 && count <= RESUME_MESSAGES;
    if (canResume) return this.#makeHello(room, from, true);
    let newest = this.#hellos.get(room);
    if (!newest) {
      newest = this.#makeHello(room, Math.max(firstKept(room, this.config), room.last - PAGE_MESSAGES + 1), false);
      this.#hellos.set(room, newest);
      dropOldest(this.#hellos, CACHED_HELLOS);
    }
    return newest;
  }

  async #makeHello(room: Room, from: number, isResume: boolean): Promise<string> {
    const { epoch, last } = room;
    const first = firstKept(room, this.config);
    const messages = await room.broker.read(room, from, last);
    // Else they did not all fit.
    const resumed = isResume && messages.length === last - from + 1;
    if (!resumed) messages.splice(0, messages.length - PAGE_MESSAGES);
    const limits = { text: MAX_TEXT, name: MAX_NAME };
    return JSON.stringify({ epoch, first, last, resumed, messages, limits });
  }

  /** Sends the hello, and what was delivered since it was made; from now on the member gets every message. */
  #admit(member: Member, hello: string | undefined, newer: Message[] = []): void {
    const { ws, room, visitor } = member;
    // RULE 2: no await from here to `subscribe`.
    if (member.state === "joining") {
      if (hello) {
        const role = this.config.operator === "" ? undefined : visitor.role;
        const own = JSON.stringify({ type: "hello", you: visitor.from, role });
        ws.send(`${own.slice(0, -1)},${hello.slice(1)}`);
        if (newer.length > 0) ws.send(encode({ type: "messages", messages: newer }));
      }
      ws.subscribe(visitor.isChat ? room.chatTopic : room.plainTopic);
      member.state = "here";
      // The new member has not seen it.
      room.sentToClients = "";
      this.presenceChanged(room);
      this.log("info", `${visitor.address} joined ${room} (${member.name}, ${visitor.from ?? "no id"})`);
    }
    this.inbox.drain(member);
    if (member.state === "gone") this.#release(member);
  }

  /** A socket closed. What it sent within its rate is stored; the rest of its queue is dropped. */
  leave(ws: Socket, code: number): void {
    const member = ws.data;
    const { room, state } = member;
    if (!room) return; // it never entered
    clearTimeout(member.drainTimer);
    member.state = "gone";
    if (state === "joining") return; // what it sent is stored when the room is open
    member.queue = []; // its token bucket still refers to it
    if (state === "here") this.log("info", `${member.visitor.address} left ${room} (${code})`);
    this.#release(member);
  }

  /** Removes a member that is done. The last one closes the room. */
  #release(member: Member): void {
    const { room } = member;
    room.members.delete(member);
    if (room.members.size > 0) this.presenceChanged(room);
    else if (room.state !== "closed") this.#close(room);
  }

  // ── Presence ──

  /** Sends presence, at most once in {@link PRESENCE_MS}. */
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
    if (announced !== room.sentToServers) room.broker.tell?.(room, { here });
    room.sentToServers = announced;
    const all = [here, ...room.elsewhere.values()];
    const count = new Set(all.flatMap(({ ids }) => ids)).size + all.reduce((sum, { nameless }) => sum + nameless, 0);
    const people = new Map(all.flatMap((each) => each.people).map((person) => [person.from ?? person, person]));
    const presence = encode({ type: "presence", count, people: [...people.values()].slice(0, PRESENCE_PEOPLE) });
    if (presence === room.sentToClients) return;
    room.sentToClients = presence;
    this.server.publish(room.chatTopic, presence, false);
  }

  // ── Dead peers ──

  /** Pings silent connections, and ends those that stay so. (Whatever is sent puts off Bun's idle timer.) */
  checkSilence(): void {
    const silenceMs = this.config.silenceSeconds * 1000;
    for (const member of this.members()) {
      if (member.ws.isPaused) member.heardAt = performance.now(); // its answers are not read
      const silent = performance.now() - member.heardAt;
      if (silent >= silenceMs) member.ws.terminate();
      else if (silent >= silenceMs / 3) member.ws.ping();
    }
  }
}

function whoIsHere({ members }: Room): Here {
  const here = [...members].filter(({ state }) => state === "here");
  const ids = new Set(here.flatMap(({ visitor }) => visitor.from ?? []));
  const nameless = here.filter(({ visitor }) => !visitor.from).length;
  const chat = here.filter(({ visitor }) => visitor.isChat);
  // Several tabs of a person are one.
  const people = new Map(chat.map(({ name, visitor: { from } }, i) => [from ?? i, { name, from }]));
  return { ids: [...ids], nameless, people: [...people.values()].slice(0, PRESENCE_PEOPLE) };
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

/** The address of a client, behind as many proxies as are trusted. */
function addressOf(request: Request, server: Server, proxies: number): string {
  const socket = server.requestIP(request)?.address.replace(/^::ffff:/, "") ?? ""; // IPv4 at an IPv6 socket
  if (proxies === 0) return socket;
  // Each proxy appends the address that it saw: what a client made up stands to the left of them.
  const forwarded = splitList(request.headers.get("x-forwarded-for") ?? "");
  const address = forwarded[Math.max(0, forwarded.length - proxies)] ?? "";
  // Some proxies add the port, which differs for each connection.
  return /^(?:\[(.+)\]|([\d.]+))(?::\d+)?$/.exec(address)?.slice(1).find(Boolean) ?? (address || socket);
}

/** The network of one subscriber: of IPv6 the first 64 bits. `""` is this machine. */
function networkOf(address: string): string {
  if (address === "::1" || /^127\.[\d.]+$/.test(address)) return "";
  if (!address.includes(":") || address.includes(".")) return address;
  const [before = [], after = []] = address.split("::").map((part) => part.split(":").filter(Boolean));
  const zeros = Array<string>(Math.max(0, 8 - before.length - after.length)).fill("0");
  return [...before, ...zeros, ...after].slice(0, 4).join(":");
}

const cookieOf = (request: Request, name: string) =>
  new Bun.CookieMap(request.headers.get("cookie") ?? "").get(name) || undefined;

/** A `Set-Cookie` that scripts do not see; `Secure` if the browser came by TLS, to the server or to a proxy. */
function setCookie(cookie: string, request: Request, { proxies, tlsCert }: Config): string {
  const isForwarded = proxies > 0 && request.headers.get("x-forwarded-proto") === "https";
  return `${cookie}; Path=/; HttpOnly${tlsCert !== "" || isForwarded ? "; Secure" : ""}`;
}

const IDENTITY_COOKIE = "chat-me";
/** Lax, because a page that is opened by a link from elsewhere must keep its identity. */
const newIdentity = () => `${IDENTITY_COOKIE}=${randomHex(128)}; Max-Age=${IDENTITY_SECONDS}; SameSite=Lax`;

/** The id of a browser in a room: always the same, another in other rooms, nobody's without the cookie. */
function idOf(request: Request, room: string): string | undefined {
  const cookie = cookieOf(request, IDENTITY_COOKIE);
  return cookie && sha256(`${cookie}\n${room}`, "base64url").slice(0, 12);
}

/** The key signs sessions; it is slow to derive, so that a stolen session hardly helps to guess the password. */
type Password = { role: Role; password: string; key: Buffer; cookie: string };

/**
 * Lets in who has the password: by a session cookie, which `login` gives, or `Authorization: Bearer`. The cookie holds
 * its expiry time, signed; nothing is stored, and a new password ends it.
 */
class Access {
  readonly wrongTries = new TokenBuckets<string>({ perSecond: 1 / 60, burst: FREE_TRIES }); // by address
  readonly #passwords: Password[] = [];
  readonly isOpen: boolean; // nobody is asked

  constructor(readonly config: Config) {
    const given = Object.entries({ operator: config.operator, guest: config.password });
    for (const [role, password] of given as [Role, string][]) {
      if (!password) continue;
      const key = scryptSync(password, "chat session", 32);
      // A browser keeps one jar for all the ports of a host: each password has a cookie of its own.
      this.#passwords.push({ role, password, key, cookie: `chat-${hmac(key, "cookie").slice(0, 8)}` });
    }
    this.isOpen = this.#passwords.length === 0;
  }

  /** The role in which a request may come in, or the refusal. */
  check(request: Request, server: Server): Role | Response {
    if (this.isOpen) return "guest";
    for (const { role, key, cookie } of this.#passwords) {
      const [ends = "", signature = ""] = cookieOf(request, cookie)?.split(".") ?? [];
      if (isEqual(key, signature, hmac(key, ends)) && Number(ends) > Date.now() / 1000) return role;
    }
    const bearer = /^Bearer (.*)$/i.exec(request.headers.get("authorization") ?? "")?.[1];
    if (bearer !== undefined) {
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
    // No await from here on, so that every try is counted before the next.
    const found = this.#try(given, request, server);
    if (found instanceof Response) return found;
    const ends = `${Math.floor(Date.now() / 1000) + SESSION_SECONDS}`;
    const session = `${found.cookie}=${ends}.${hmac(found.key, ends)}`;
    const cookie = setCookie(`${session}; Max-Age=${SESSION_SECONDS}; SameSite=Strict`, request, config);
    return new Response(null, { status: 204, headers: { "Set-Cookie": cookie } });
  }

  /** An address that guesses must wait. */
  #try(given: string, request: Request, server: Server): Password | Response {
    const network = networkOf(addressOf(request, server, this.config.proxies));
    const wait = Math.ceil(this.wrongTries.wait(network) / 1000);
    if (wait > 0) return refuse(429, "Too many wrong passwords: try later.", { "Retry-After": `${wait}` });
    // All are compared, so that the time tells nothing.
    const [found] = this.#passwords.filter(({ key, password }) => isEqual(key, given, password));
    if (!found) this.wrongTries.take(network);
    return found ?? refuse(401, "The password is wrong.", BEARER);
  }
}

const BEARER = { "WWW-Authenticate": "Bearer" };
const hmac = (key: Buffer, text: string) => createHmac("sha256", key).update(text).digest("base64url");
/** Compares in constant time. */
const isEqual = (key: Buffer, given: string, right: string) =>
  timingSafeEqual(Buffer.from(hmac(key, given)), Buffer.from(hmac(key, right)));

// ─── Server: the handshake, the page, start and stop ─────────────────────────────────────────────────────────────────

/** A running chat. */
export interface Chat {
  readonly url: string; // the address to open, with a slash at its end
  /** Stores and delivers what was received, then closes the sockets with 1001, and the store: within 3 s. */
  stop(): Promise<void>;
}

/**
 * Starts a chat.
 * @param overrides of the defaults; they are not checked
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
  await Promise.all(brokers.map((broker) => broker.start?.()));
  try {
    rooms.server = listen(config, makeHandlers(rooms, access));
  } catch (error) {
    for (const broker of brokers) broker.stop();
    throw error;
  }
  const sweeping = setInterval(() => {
    rooms.checkSilence();
    for (const buckets of [inbox.senders, inbox.addresses, access.wrongTries]) buckets.forgetFull();
  }, config.silenceSeconds * 100); // ms: a tenth of it
  const stop = async () => {
    const closed = rooms.server.stop(); // accepts no more; its sockets live on
    inbox.isStopping = true;
    clearInterval(sweeping);
    await Promise.all(brokers.map((broker) => broker.finish()));
    for (const { ws } of rooms.members()) ws.close(CLOSE.goingDown, "The server is shutting down: reconnect soon.");
    await Promise.race([closed, Bun.sleep(CLOSE_MS)]); // whoever has not answered by then is cut
    for (const broker of brokers) broker.stop();
    void rooms.server.stop(true);
  };
  let stopped: Promise<void> | undefined;
  const host = config.host.includes(":") ? `[${config.host}]` : config.host || "localhost";
  const url = `${config.tlsCert === "" ? "http" : "https"}://${host}:${rooms.server.port}/`;
  return { url, stop: () => (stopped ??= stop()) };
}

function makeHandlers(rooms: Rooms, access: Access) {
  const { config, log } = rooms;
  // bun-types takes every .html import for a bundle.
  const page = makePage(pageSource as unknown as string, config);
  const touch = (ws: Socket) => void (ws.data.heardAt = performance.now());
  return {
    fetch: (request: Request, server: Server) => {
      const url = URL.parse(request.url);
      if (!url) return refuse(400, "Invalid Host header.");
      if (url.pathname.startsWith("/ws/")) return handshake(request, url, server, access);
      if (request.method === "POST" && !access.isOpen) return access.login(request, server);
      return page(request);
    },
    websocket: {
      data: {} as Member,
      maxPayloadLength: MAX_FRAME,
      backpressureLimit: BACKPRESSURE_BYTES,
      closeOnBackpressureLimit: true,
      sendPings: false, // `checkSilence` sends them
      idleTimeout: 2 * Math.ceil(config.silenceSeconds), // for closing sockets, which are in no room any more
      perMessageDeflate: false, // it costs more time than it saves, and each socket a window
      open: (ws: Socket) => rooms.enter(ws),
      message: (ws: Socket, data: string | Buffer) => rooms.inbox.receive(ws, data),
      ping: touch,
      pong: touch,
      close: (ws: Socket, code: number) => rooms.leave(ws, code),
      error: (error: Error, ws: Socket | undefined) => {
        log("error", `A connection failed: ${error.stack}`);
        ws?.close(CLOSE.bug, "Something went wrong here.");
      },
    },
  };
}

/** @throws StartError when the address is taken or not this machine's, or a TLS file is bad */
function listen(config: Config, handlers: ReturnType<typeof makeHandlers>, hostname = config.host || "::"): Server {
  const { port, host, tlsCert, tlsKey } = config;
  const tls = tlsCert === "" ? undefined : { cert: Bun.file(tlsCert), key: Bun.file(tlsKey) };
  const reusePort = config.reusePort === "1" && config.redisUrls.length > 0; // set, as Bun's default is true
  const options = { ...handlers, port, tls, maxRequestBodySize: MAX_BODY, development: false, reusePort };
  try {
    return Bun.serve({ ...options, hostname }); // "::": all interfaces, IPv4 too
  } catch (error) {
    const { code, message } = error as { code?: string; message: string };
    if (host === "" && hostname === "::" && code !== "EADDRINUSE") return listen(config, handlers, "0.0.0.0"); // no IPv6
    const files = tls && `TLS_CERT=${tlsCert} TLS_KEY=${tlsKey} `;
    throw new StartError(`${files ?? ""}HOST=${host} PORT=${port}: cannot listen: ${message}`);
  }
}

/** Upgrades to a WebSocket: a ladder of guards, each with its status and sentence. */
function handshake(request: Request, url: URL, server: Server, access: Access): Response | undefined {
  const { headers } = request;
  const isWebSocket = headers.get("upgrade")?.toLowerCase() === "websocket";
  if (!isWebSocket || headers.get("sec-websocket-version") !== "13") {
    const wanted = { Upgrade: "websocket", Connection: "Upgrade", "Sec-WebSocket-Version": "13" };
    return refuse(426, "Only WebSocket connections (version 13) are accepted.", wanted); // RFC 6455 section 4.2.2
  }
  if (!originAllowed(headers, access.config.origins)) return refuse(403, "This page's origin is not in CHAT_ORIGINS.");
  const roomName = roomOf(url.pathname.slice("/ws/".length));
  if (roomName === undefined) return refuse(400, `A room has at most ${MAX_ROOM} characters, no control characters.`);
  const offered = headers.get("sec-websocket-protocol");
  const isChat = offered !== null && splitList(offered).includes("chat.v1");
  if (offered !== null && !isChat) return refuse(400, "The only subprotocol is chat.v1.");
  const role = access.check(request, server);
  const isRefused = role instanceof Response;
  // A page cannot see why a handshake is refused. So a browser is let in, and told by the Close frame.
  if (isRefused && !isChat) return role;
  const name = cleanName(url.searchParams.get("name") || "Guest");
  if (name === undefined) return refuse(400, ERRORS["bad-name"]);
  const address = addressOf(request, server, access.config.proxies);
  const network = networkOf(address);
  const from = idOf(request, roomName);
  const [epoch, after] = [url.searchParams.get("epoch"), url.searchParams.get("after") ?? ""];
  const resume = epoch !== null && /^\d{1,15}$/.test(after) ? { epoch, after: Number(after) } : undefined;
  const visitor = { roomName, address, network, isChat, from, role: isRefused ? "guest" : role, resume } as const;
  const data = new Member(name, visitor);
  if (isRefused) data.refusal = role.statusText;
  // A browser that offers a subprotocol fails when the answer names none: the WHATWG WebSockets standard.
  const chosen: Record<string, string> = isChat ? { "Sec-WebSocket-Protocol": "chat.v1" } : {};
  if (server.upgrade(request, { data, headers: chosen })) return undefined;
  return refuse(400, "The WebSocket handshake is incomplete.");
}

/** Bun ignores the statusText: it is for the Close frame. */
function refuse(status: number, sentence: string, headers: Record<string, string> = {}): Response {
  return new Response(`${sentence}\n`, { status, statusText: sentence, headers });
}

/** Answers with the page, whose headers and compressed form are made once. */
function makePage(html: string, config: Config): (request: Request) => Response {
  const plain = new TextEncoder().encode(html);
  const compressed = Bun.gzipSync(plain, { library: "libdeflate", level: 10 });
  const etag = `W/"${sha256(html, "hex").slice(0, 32)}"`; // weak: one for both forms
  const fixed = {
    "Content-Type": "text/html; charset=utf-8",
    "Content-Security-Policy": contentSecurityPolicy(html),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    // The browser asks each time, and gets a 304. Private: no cache may give two people one identity.
    "Cache-Control": "private, no-cache",
    Vary: "Accept-Encoding",
    ETag: etag,
  };
  return (request) => {
    const { method, headers: wanted } = request;
    if (!/^(GET|HEAD)$/.test(method)) return refuse(405, "Only GET and HEAD are supported.", { Allow: "GET, HEAD" });
    const headers = new Headers(fixed);
    if (!cookieOf(request, IDENTITY_COOKIE)) headers.set("Set-Cookie", setCookie(newIdentity(), request, config));
    if (wanted.get("if-none-match")?.includes(etag.slice(2))) return new Response(null, { status: 304, headers });
    const gzip = /\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))/i.test(wanted.get("accept-encoding") ?? "");
    if (gzip) headers.set("Content-Encoding", "gzip");
    return new Response(gzip ? compressed : plain, { headers });
  };
}

/** Allows the page its one script, its one style, and nothing from elsewhere. */
function contentSecurityPolicy(html: string): string {
  const hash = (tag: string) =>
    `'sha256-${sha256(new RegExp(`<${tag}>([^]*?)</${tag}>`).exec(html)?.[1] ?? "", "base64")}'`;
  const sources = `default-src 'none'; script-src ${hash("script")}; style-src ${hash("style")}; img-src data:`;
  const rest = "connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'";
  return `${sources}; ${rest}; require-trusted-types-for 'script'; trusted-types 'none'`;
}

// ─── Moving: export and import ───────────────────────────────────────────────────────────────────────────────────────

/** A line of an export. */
type Line = Message & { room: string };

const EXPORT_ALL = `SELECT rooms.name AS room, ${COLUMNS} FROM rooms JOIN messages ON room = id
  WHERE seq > (SELECT max(seq) FROM messages WHERE room = id) - ? ORDER BY id, seq`;

/** The kept messages, room by room. A server on the same store is not disturbed. @throws StartError */
export async function* exportMessages(config: Config): AsyncGenerator<Line> {
  for (const url of config.redisUrls) yield* exportRedis(url, config);
  if (config.redisUrls.length > 0) return;
  if (!existsSync(config.db)) throw new StartError(`CHAT_DB=${config.db}: there is no such database.`);
  using db = new Database(config.db, { readonly: true });
  const rows = db.query<Row & { room: string }, [number]>(EXPORT_ALL);
  for (const row of rows.iterate(config.history)) yield { room: row.room, ...messageOf(row) };
}

/** @throws StartError that names the address */
async function reachRedis(url: string): Promise<Bun.RedisClient> {
  const redis = connectRedis(url, 0);
  await redis.connect().catch(({ message }: Error) => {
    throw new StartError(`REDIS_URL=${withoutPassword(url)}: ${message}.`);
  });
  return redis;
}

async function* exportRedis(url: string, config: Config): AsyncGenerator<Line> {
  const redis = await reachRedis(url);
  const match = `${config.prefix.replaceAll(/[\\*?[\]]/g, "\\$&")}state:*`;
  const rooms = new Set<string>();
  for (let cursor = ""; cursor !== "0";) {
    const scan = [cursor || "0", "MATCH", match, "COUNT", `${CHUNK_MESSAGES}`];
    const [next, keys] = (await redis.send("SCAN", scan)) as [string, string[]];
    for (const key of keys) rooms.add(key.slice(`${config.prefix}state:`.length));
    cursor = next;
  }
  for (const room of rooms) {
    const home = config.redisUrls[homeOf(room, config.redisUrls)] as string;
    if (home !== url) console.error(`Room "${room}" belongs on ${withoutPassword(home)}: an import moves it there.`);
    const range = [roomKeys(config, room)[1], `${-config.history}`, "-1"];
    for (const text of (await redis.send("LRANGE", range)) as string[]) yield { room, ...JSON.parse(text) };
  }
  redis.close();
}

/** Checks all of an export, so that a broken one changes nothing. @throws StartError with the line's number */
function readExport(text: string): Map<string, Line[]> {
  const rooms = new Map<string, Line[]>();
  for (const [i, json] of text.split("\n").entries()) {
    if (json === "") continue;
    try {
      const line = checkedLine(JSON.parse(json) ?? {});
      const lines = rooms.getOrInsert(line.room, []);
      const last = lines.at(-1);
      if (last && last.seq + 1 !== line.seq) throw new Error("it does not follow the one before");
      lines.push(line);
    } catch (error) {
      throw new StartError(`Line ${i + 1}: ${(error as Error).message}. Nothing was imported.`);
    }
  }
  return rooms;
}

/** A line with the fields of one and no others. @throws what is wrong with it */
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
  const insert: Statement = db.query(INSERT_MESSAGE);
  const insertRoom = db.transaction((room: string, lines: Line[]) => {
    if (db.query("SELECT 1 FROM rooms WHERE name = ?").get(room)) return false;
    const { lastInsertRowid: id } = db.query(INSERT_ROOM).run(room, randomHex(64));
    for (const { seq, at, name, from, text, removes, removed, key } of lines) {
      insert.run(id, seq, at, name, from, text, removes, removed, key);
    }
    return true;
  });
  const refused = [...rooms].filter(([room, lines]) => !insertRoom.immediate(room, lines));
  close(false);
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
  const connections = await Promise.all(config.redisUrls.map(reachRedis)); // all, before anything is written
  for (const [name, lines] of rooms) {
    const head = [randomHex(64), `${lines.at(-1)?.seq}`, idleSeconds(config)];
    const rest = lines.flatMap(({ room, ...line }) => [`${line.seq}`, line.key ?? "", JSON.stringify(line)]);
    const redis = connections[homeOf(name, config.redisUrls)] as Bun.RedisClient;
    if (!(await redis.send("EVAL", [IMPORT_SCRIPT, "3", ...roomKeys(config, name), ...head, ...rest])))
      refused.push(name);
  }
  for (const redis of connections) redis.close();
  return refused;
}

// ─── Main ────────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Does what the command line asks. @throws StartError when it asks for something else */
export async function main([command, ...rest]: string[]): Promise<void> {
  if (command === "--help") return console.log(help());
  if (command === undefined) return serve(readConfig(process.env));
  if (command === "export" && rest.length === 0) return printExport(readConfig(process.env));
  if (command === "import" && rest.length <= 1) {
    const text = await (rest[0] === undefined ? Bun.stdin : Bun.file(rest[0])).text();
    const refused = await importMessages(readConfig(process.env), text);
    if (refused.length === 0) return console.error("Imported.");
    throw new StartError(`These rooms already exist, and only the others were imported: ${JSON.stringify(refused)}.`);
  }
  throw new StartError(`${[command, ...rest].join(" ")}: no such command; --help lists them.`);
}

function help(): string {
  const settings = Object.values(SETTINGS).map(([variable, fallback, , what]) => {
    return `  ${variable.padEnd(15)} ${what}${fallback && ` (${fallback})`}`;
  });
  return `A chat server in one file: start it, and open the address it prints.

  bun run server.ts                      serves the chat
  bun run server.ts export > chat.jsonl  writes the kept messages of all rooms, one JSON object per line
  bun run server.ts import [chat.jsonl]  imports them; rooms that exist are refused

Settings are environment variables, or lines of a file .env:
${settings.join("\n")}`;
}

async function printExport(config: Config): Promise<void> {
  let count = 0;
  for await (const line of exportMessages(config)) {
    await Bun.write(Bun.stdout, `${JSON.stringify(line)}\n`);
    count++;
  }
  console.error(`${count} messages exported.`);
}

/** Serves until SIGTERM or SIGINT. */
async function serve(config: Config): Promise<void> {
  const chat = await startChat(config);
  makeLogger(config.logLevel)("info", `The chat is open: ${chat.url}`);
  for (const signal of ["SIGTERM", "SIGINT"]) process.on(signal, () => void chat.stop().then(() => process.exit(0)));
}

if (import.meta.main) {
  main(Bun.argv.slice(2)).catch((error: unknown) => {
    // Operator errors get one line, bugs a stack trace.
    const isOperatorError = error instanceof StartError || (error instanceof Error && "code" in error);
    console.error(isOperatorError ? error.message : error);
    process.exit(1);
  });
}
