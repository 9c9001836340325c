// The page: conversations on the left, one in the middle, what is believed of the enclave at the top.

import { type Proof, CutOff, Refused, begin, chat, key, models, proof, renewKey } from "./api";
import {
  type Conversation,
  type Message,
  type Settings,
  DEFAULTS,
  newConversation,
  question,
  titleOf,
} from "./conversation";
import { announce, byId, el, iconButton, plain, saveFile } from "./dom";
import { fillBody, messageElement, renderMessages, startCopying } from "./messages";
import { showChecking, showProof, startPanel } from "./panel";
import { applyTheme, parseSettings, showModels, startSettings } from "./settings";
import { type Vault, Forgetful, openVault } from "./vault";

const SETTINGS = "settings";
const NEAR_END = 120; // pixels from the end of the page within which it follows an answer
const REDRAW = 60; // milliseconds between two drawings of a growing answer

let vault: Vault = new Forgetful();
let settings: Settings = DEFAULTS;
let known: string[] = [];
let trust: Proof | null = null;
let conversations: Conversation[] = [];
let current: Conversation = newConversation("");
let asking: AbortController | null = null;

const heldWith = () => (trust ? `${trust.owner} ${trust.deployment}` : "");
const sealed = () => trust?.verdict === "trusted" || trust?.verdict === "simulated";
const foreign = () => current.heldWith !== "" && sealed() && current.heldWith !== heldWith();

const composer = byId<HTMLTextAreaElement>("question");
const sendButton = byId<HTMLButtonElement>("send");
const stopButton = byId<HTMLButtonElement>("stop");

const actions = {
  ready: () => asking === null,
  regenerate(at: number) {
    if (!asking) void answer(current.messages.splice(at));
  },
  edit(at: number, text: string) {
    if (asking) return;
    current.messages.length = at;
    if (at === 0) current.title = titleOf(text);
    current.messages.push({ role: "user", content: text });
    void answer();
  },
};

// What is believed

async function check(fresh = false): Promise<void> {
  showChecking();
  trust = await proof(fresh);
  showProof(trust);
  showFoot();
}

/** The line under the box: what becomes of what is written into it. */
function showFoot(): void {
  const verdict = trust?.verdict;
  const words = {
    trusted: `Sealed on this machine to the verified enclave “${plain(trust?.deployment ?? "")}”.`,
    simulated: "Sealed, but to simulated hardware: whoever runs it can read this. Not for secrets.",
    refused: "Blocked: nothing is sent while the enclave is not trusted.",
    unreachable: "Nothing is sent while the enclave cannot be verified.",
    checking: "Verifying the enclave…",
  }[verdict ?? "checking"];
  const foot = byId("foot");
  foot.className = `foot ${verdict ?? "checking"}`;
  foot.textContent = foreign() ? "This conversation was held with another deployment: it can be read here, not continued." : words;
  const first = trust?.explained.first_use ?? "";
  byId("first-use").hidden = !first;
  byId("first-use-text").textContent = plain(first);
  showButtons();
}

function showButtons(): void {
  sendButton.hidden = asking !== null;
  stopButton.hidden = asking === null;
  sendButton.disabled = !composer.value.trim() || foreign();
}

// Asking

async function send(): Promise<void> {
  const text = composer.value.trim();
  if (!text || asking || foreign()) return;
  if (!current.messages.length) current.title = titleOf(text);
  current.messages.push({ role: "user", content: text });
  composer.value = "";
  fit();
  await answer();
}

/** Verifies, then asks with the conversation as it stands. What is refused leaves the words here, to be sent again; and
 * `replaced`, which a new answer takes the place of, where none came. */
async function answer(replaced: Message[] = []): Promise<void> {
  const conversation = current;
  const stop = new AbortController();
  asking = stop;
  showError(null);
  renderMessages(conversation, actions);
  showButtons();
  toEnd();
  try {
    if (!sealed()) showChecking();
    trust = await proof();
    showProof(trust);
    showFoot();
    if (!sealed()) throw new Refused(0, trust.code, trust.message, trust.hint);
    conversation.heldWith ||= heldWith();
    if (foreign()) return;
    if (!known.length) await loadModels();
    await stream(conversation, stop.signal);
  } catch (error) {
    if (!stop.signal.aborted) await failed(error);
  } finally {
    asking = null;
    if (conversation.messages.at(-1)?.role !== "assistant") conversation.messages.push(...replaced);
    conversation.updated = Date.now();
    await keep(conversation);
    if (current === conversation) renderMessages(conversation, actions);
    showList();
    showButtons();
  }
}

async function stream(conversation: Conversation, signal: AbortSignal): Promise<void> {
  const model = settings.model || known[0] || "default";
  const asked = question(conversation, settings, model);
  const message: Message = { role: "assistant", content: "", model };
  conversation.messages.push(message);
  const shown = messageElement(message, conversation.messages.length - 1, actions);
  shown.classList.add("growing");
  shown.setAttribute("aria-busy", "true");
  byId("messages").append(shown);
  toEnd();
  announce("The model is answering.");
  const body = shown.querySelector<HTMLElement>(".body")!;
  let drawn = 0;
  const draw = () => {
    drawn = 0;
    const follow = atEnd();
    fillBody(body, message);
    if (follow) toEnd();
  };
  try {
    for await (const piece of chat(asked, signal)) {
      if (piece.kind === "text") message.content += piece.text;
      else if (piece.kind === "thought") message.thought = (message.thought ?? "") + piece.text;
      else if (piece.kind === "end") message.end = piece.reason === "length" ? "length" : "whole";
      drawn ||= window.setTimeout(draw, REDRAW);
    }
    message.end ??= "whole";
    draw();
    announce(`Answer: ${spoken(body)}`);
  } catch (error) {
    if (signal.aborted) message.end = "stopped";
    else if (message.content || error instanceof CutOff) message.end = "cut";
    if (!message.content && message.end !== "stopped") conversation.messages.pop();
    if (signal.aborted) announce("Stopped.");
    else throw error;
  } finally {
    clearTimeout(drawn);
  }
}

/** What a screen reader shall hear of an answer: neither its thoughts nor the buttons on its code. */
function spoken(body: HTMLElement): string {
  const copy = body.cloneNode(true) as HTMLElement;
  for (const one of copy.querySelectorAll("details, button")) one.remove();
  return plain(copy.textContent ?? "");
}

async function failed(error: unknown): Promise<void> {
  const known = error instanceof Refused;
  if (error instanceof CutOff) {
    showError(new Refused(0, "cut", "The answer was cut off: its authenticated end did not come.", "Ask again."));
  } else {
    showError(known ? error : new Refused(0, "page", "The page could not read the answer.", "Ask again."));
  }
  if (!known || error.status === 502) await check();
}

function showError(error: Refused | null): void {
  const shown = byId("error");
  shown.hidden = error === null;
  if (!error) return;
  const text = el("p", {}, el("strong", {}, plain(error.message)), error.hint ? ` ${plain(error.hint)}` : "");
  const again = el("button", { type: "button" }, "Try again");
  again.addEventListener("click", () => {
    if (!asking) void answer();
  });
  const last = current.messages.at(-1)?.role === "user";
  shown.replaceChildren(text, ...(last ? [again] : []));
}

const scroller = byId("scroller");
const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR_END;

function toEnd(): void {
  scroller.scrollTop = scroller.scrollHeight;
}

async function loadModels(): Promise<void> {
  try {
    known = await models();
  } catch {
    known = [];
  }
  showModels(known, settings.model);
}

// What is kept

async function keep(conversation: Conversation): Promise<void> {
  if (!conversation.messages.length) return;
  if (!conversations.includes(conversation)) conversations.unshift(conversation);
  conversations.sort((a, b) => b.updated - a.updated);
  await vault.put(conversation.id, conversation);
}

function isConversation(value: unknown): value is Conversation {
  const one = value as Partial<Conversation> | null;
  return typeof one === "object" && one !== null && typeof one.id === "string" && Array.isArray(one.messages);
}

async function openKept(begun: Promise<unknown>): Promise<void> {
  let refused: unknown = await begun;
  let forgets = "this browser was not opened with the one-time address that the command printed.";
  try {
    vault = await openVault(await key());
  } catch (error) {
    vault = new Forgetful();
    if (!(error instanceof Refused && ["no_session", "proxy_key"].includes(error.code))) {
      forgets = "the key for it cannot be had.";
      refused = error;
    }
    if (refused instanceof Refused) showError(refused);
  }
  const { values, closed } = await vault.all();
  settings = parseSettings(values.get(SETTINGS));
  conversations = [...values.values()].filter(isConversation).sort((a, b) => b.updated - a.updated);
  const kept = vault.keeps
    ? "Kept in this browser only, encrypted; the key stays with the local proxy."
    : `Nothing is kept: ${forgets}`;
  const lost = closed ? ` ${closed} kept under an earlier key cannot be opened: “Wipe all” removes them.` : "";
  byId("kept").textContent = kept + lost;
}

function showList(): void {
  const rows = conversations.map((one) => {
    const open = el("button", { type: "button", class: "open" }, plain(one.title) || "Untitled");
    if (one === current) open.setAttribute("aria-current", "true");
    open.addEventListener("click", () => show(one));
    return el("li", {}, open, iconButton("trash", `Delete “${plain(one.title)}”`, () => void remove(one)));
  });
  byId("conversations").replaceChildren(...rows);
  byId("no-conversations").hidden = rows.length > 0;
}

function show(conversation: Conversation): void {
  if (asking) return;
  current = conversation;
  renderMessages(current, actions);
  showError(null);
  showList();
  showFoot();
  openSide(false);
  toEnd();
  composer.focus();
}

async function remove(conversation: Conversation): Promise<void> {
  if (asking) return;
  conversations = conversations.filter((one) => one !== conversation);
  await vault.remove(conversation.id);
  if (conversation === current) show(newConversation(""));
  else showList();
  announce("Deleted.");
}

function exportAll(): void {
  saveFile("cloister-conversations.json", `${JSON.stringify({ cloister_chat: 1, settings, conversations }, null, 1)}\n`);
}

async function wipe(): Promise<void> {
  asking?.abort();
  while (asking) await new Promise((resolve) => setTimeout(resolve, 20)); // until it has kept what it had
  await vault.wipe(renewKey);
  conversations = [];
  settings = DEFAULTS;
  byId<HTMLDialogElement>("settings").close();
  byId<HTMLDialogElement>("confirm-wipe").close();
  await openKept(begin());
  show(newConversation(""));
  announce("All conversations were wiped, and their key with them.");
}

// The page's own controls

function openSide(open: boolean): void {
  document.body.classList.toggle("side-open", open);
  byId("open-side").setAttribute("aria-expanded", String(open));
}

function fit(): void {
  composer.style.height = "auto";
  composer.style.height = `${Math.min(composer.scrollHeight, innerHeight * 0.4)}px`;
}

function wire(): void {
  byId("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    void send();
  });
  composer.addEventListener("input", () => {
    fit();
    showButtons();
  });
  composer.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    void send();
  });
  stopButton.addEventListener("click", () => asking?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
    if (asking) asking.abort();
    else openSide(false);
  });
  byId("new").addEventListener("click", () => show(newConversation("")));
  byId("open-side").addEventListener("click", () => openSide(!document.body.classList.contains("side-open")));
  byId("shade").addEventListener("click", () => openSide(false));
  for (const button of document.querySelectorAll<HTMLElement>("[data-close]")) {
    button.addEventListener("click", () => button.closest("dialog")?.close());
  }
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog) dialog.close(); // beside it
    });
  }
  byId("export").addEventListener("click", exportAll);
  byId("wipe").addEventListener("click", () => byId<HTMLDialogElement>("confirm-wipe").showModal());
  byId("really-wipe").addEventListener("click", () => void wipe());
  startPanel(() => check(true));
  startCopying();
  startSettings(
    () => settings,
    (changed) => {
      settings = changed;
      void vault.put(SETTINGS, settings);
    },
  );
}

async function start(): Promise<void> {
  applyTheme();
  wire();
  // An address that was used up is no harm to the browser that used it. A proxy with a key answers a session alone.
  const begun = begin().catch((error: unknown) => error);
  const [opened] = await Promise.allSettled([openKept(begun), begun.then(() => check())]);
  if (opened.status === "rejected") byId("kept").textContent = "This browser gives the page no storage: nothing is kept.";
  showList();
  showFoot();
  if (sealed()) await loadModels();
  document.body.dataset["ready"] = "yes";
  composer.focus();
}

void start();
