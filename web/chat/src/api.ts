// What the page asks the local proxy: the enclave's API, its proof, and the session's key. Nothing else is ever asked.

export interface Turn {
  role: "system" | "user" | "assistant";
  content: string;
}

export interface Question {
  model: string;
  messages: Turn[];
  temperature?: number;
  top_p?: number;
  max_tokens?: number;
  seed?: number;
}

export type Piece =
  | { kind: "text" | "thought"; text: string }
  | { kind: "end"; reason: string }
  | { kind: "usage"; tokens: number };

export interface Step {
  step: string;
  verdict: "pass" | "fail" | "not-checked";
  expected: string;
  got: string;
  hint: string;
  about: "key" | "code" | "chip" | "model";
  result: string;
  meaning: string;
  remedy: string;
}

export type Tone = "" | "good" | "warn" | "bad";

export interface Explained {
  word: string;
  platform: string;
  sentence: string;
  first_use: string;
  facts: [string, string][];
  firmware: [string, Tone][];
  forecast: { when: string; date: string; what: string; word: string; tone: Tone }[];
  steps: Step[];
}

export interface Proof {
  verdict: "trusted" | "simulated" | "refused" | "unreachable";
  explained: Explained;
  saved: unknown;
  owner: string;
  deployment: string;
  enclave: string;
  message: string;
  hint: string;
  code: string;
  /** The lines of a policy that would accept what was refused; empty where none would. */
  policyChange: string;
}

export class Refused extends Error {
  constructor(
    readonly status: number,
    readonly code: string,
    message: string,
    readonly hint: string,
  ) {
    super(message);
  }
}

/** The answer ended before its authenticated end. */
export class CutOff extends Error {}

const BINDING = "cloister-binding";

/** Half of the session goes with every question: a proxy that asks for a key lets its page in by it. */
const bound = () => ({ "x-cloister-binding": localStorage.getItem(BINDING) ?? "" });

async function ask(path: string, more: More & { method?: string; body?: string } = {}): Promise<Response> {
  const headers = { ...bound(), ...more.headers };
  try {
    return await fetch(path, { credentials: "same-origin", redirect: "error", cache: "no-store", ...more, headers });
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new Refused(0, "no_proxy", "The local proxy does not answer.", "Is the command that you started still running?");
  }
}

interface More {
  headers?: Record<string, string>;
  signal?: AbortSignal;
}

function post(path: string, body: unknown, more: More = {}): Promise<Response> {
  const headers = { "content-type": "application/json", ...more.headers };
  return ask(path, { ...more, method: "POST", body: JSON.stringify(body), headers });
}

async function refusal(answer: Response): Promise<Refused> {
  const told: unknown = await answer.json().catch(() => null);
  const error = (told as { error?: Record<string, unknown> } | null)?.error ?? {};
  const text = (name: string) => (typeof error[name] === "string" ? error[name] : "");
  const message = text("message") || `The answer was status ${answer.status}.`;
  return new Refused(answer.status, text("code"), message, text("hint"));
}

// The enclave

export async function models(): Promise<string[]> {
  const answer = await ask("/v1/models");
  if (!answer.ok) throw await refusal(answer);
  const told = (await answer.json()) as { data?: { id?: unknown }[] };
  return (told.data ?? []).map((one) => one.id).filter((id): id is string => typeof id === "string");
}

export async function* chat(question: Question, signal: AbortSignal): AsyncGenerator<Piece> {
  const body = { ...question, stream: true, stream_options: { include_usage: true } };
  const answer = await post("/v1/chat/completions", body, { signal });
  if (!answer.ok || !answer.body) throw await refusal(answer);
  let ended = false;
  for await (const data of events(answer.body)) {
    if (data === "[DONE]") {
      ended = true;
      continue;
    }
    yield* pieces(JSON.parse(data));
  }
  if (!ended) throw new CutOff();
}

async function* events(body: ReadableStream<Uint8Array>): AsyncGenerator<string> {
  const reader = body.pipeThrough(new TextDecoderStream() as ReadableWritablePair<string, Uint8Array>).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await read(reader);
      if (done) return;
      text += value;
      const whole = text.split(/\r?\n\r?\n/);
      text = whole.pop() ?? "";
      for (const event of whole) {
        const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
      }
    }
  } finally {
    await reader.cancel().catch(() => undefined);
  }
}

async function read(reader: ReadableStreamDefaultReader<string>): Promise<ReadableStreamReadResult<string>> {
  try {
    return await reader.read();
  } catch (error) {
    if (error instanceof DOMException && error.name === "AbortError") throw error;
    throw new CutOff();
  }
}

interface Chunk {
  error?: { message?: string; code?: string };
  choices?: { delta?: { content?: string | null; reasoning_content?: string | null }; finish_reason?: string | null }[];
  usage?: { completion_tokens?: number } | null;
}

function* pieces(chunk: Chunk): Generator<Piece> {
  if (chunk.error) throw new Refused(200, chunk.error.code ?? "", chunk.error.message ?? "The model failed.", "");
  const choice = chunk.choices?.[0];
  if (choice?.delta?.reasoning_content) yield { kind: "thought", text: choice.delta.reasoning_content };
  if (choice?.delta?.content) yield { kind: "text", text: choice.delta.content };
  if (choice?.finish_reason) yield { kind: "end", reason: choice.finish_reason };
  if (chunk.usage?.completion_tokens) yield { kind: "usage", tokens: chunk.usage.completion_tokens };
}

// The proof

const NOTHING: Explained = {
  word: "", platform: "", sentence: "", first_use: "", facts: [], firmware: [], forecast: [], steps: [],
};

/** What is believed of the enclave now. Anything but a proof that says so itself is a refusal. */
export async function proof(fresh = false): Promise<Proof> {
  const none = { saved: null, owner: "", deployment: "", enclave: "", message: "", hint: "", code: "", policyChange: "" };
  let answer: Response;
  try {
    answer = await ask(`/verification?explain${fresh ? "&fresh" : ""}`);
  } catch (error) {
    const { message, hint, code } = error as Refused;
    return { ...none, verdict: "unreachable", explained: NOTHING, message, hint, code };
  }
  const told = ((await answer.json().catch(() => null)) ?? {}) as Record<string, unknown>;
  const explained = (told["explained"] as Explained | undefined) ?? NOTHING;
  const saved = told["saved"] ?? null;
  const verdict = told["verdict"];
  const sound = answer.ok && explained.steps.length > 0 && explained.steps.every((one) => one.verdict !== "fail");
  if (sound && (verdict === "trusted" || verdict === "simulated")) {
    const { owner_key: owner, deployment, enclave } = told as Record<string, string>;
    return { ...none, verdict, explained, saved, owner: owner ?? "", deployment: deployment ?? "", enclave: enclave ?? "" };
  }
  const error = (told["error"] ?? {}) as Record<string, string>;
  const { message = "The proxy gave no proof.", hint = "", code = "", policy_change: policyChange = "" } = error;
  const unreachable = code === "enclave_unreachable";
  return { ...none, verdict: unreachable ? "unreachable" : "refused", explained, saved, message, hint, code, policyChange };
}

// The session

/** Exchanges the one-time token of the address, if it has one, and takes it out of the address and the history. */
export async function begin(): Promise<void> {
  const token = location.hash.slice(1);
  if (!/^[\w-]{43}$/.test(token)) return;
  history.replaceState(null, "", location.pathname);
  const answer = await post("/chat/session", { token });
  if (!answer.ok) throw await refusal(answer);
  const { binding } = (await answer.json()) as { binding: string };
  localStorage.setItem(BINDING, binding);
}

async function keyOf(answer: Response): Promise<Uint8Array<ArrayBuffer>> {
  if (!answer.ok) throw await refusal(answer);
  const { key } = (await answer.json()) as { key: string };
  return Uint8Array.from(atob(key), (letter) => letter.charCodeAt(0));
}

export async function key(): Promise<Uint8Array<ArrayBuffer>> {
  return keyOf(await ask("/chat/key"));
}

/** Throws the key away, and gives a new one: what the old one encrypted stays closed, wherever it is. */
export async function renewKey(): Promise<Uint8Array<ArrayBuffer>> {
  return keyOf(await post("/chat/wipe", {}));
}
