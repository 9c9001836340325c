// How a conversation looks: one element per message, and what can be done with it.

import type { Conversation, Message } from "./conversation";
import { announce, byId, el, icon, iconButton } from "./dom";
import { rendered } from "./markdown";

export interface Actions {
  regenerate(at: number): void;
  edit(at: number, text: string): void;
  /** Whether anything may be changed or sent now. */
  ready(): boolean;
}

const ENDS: Record<NonNullable<Message["end"]>, string> = {
  whole: "",
  length: "The answer reached its length limit.",
  stopped: "You stopped this answer.",
  cut: "CUT OFF: the enclave's authenticated end did not come. This is not the whole answer.",
};

export function renderMessages(conversation: Conversation, actions: Actions): void {
  const shown = conversation.messages.map((message, at) => messageElement(message, at, actions));
  byId("messages").replaceChildren(...shown);
  byId("welcome").hidden = shown.length > 0;
}

export function messageElement(message: Message, at: number, actions: Actions): HTMLElement {
  const mine = message.role === "user";
  const body = el("div", { class: "body" });
  const made = el(
    "article",
    { class: `message ${message.role}`, "aria-label": mine ? "You" : "Answer" },
    el("h3", { class: "who" }, mine ? "You" : message.model || "Answer"),
    body,
  );
  fillBody(body, message);
  const tools = el("div", { class: "tools" });
  tools.append(iconButton("copy", "Copy", () => void copied(message.content)));
  if (mine) {
    tools.append(iconButton("edit", "Edit and ask again", () => edit(made, body, message, at, actions)));
  } else {
    tools.append(iconButton("again", "Answer again", () => actions.regenerate(at)));
  }
  made.append(tools);
  return made;
}

export function fillBody(body: HTMLElement, message: Message): void {
  if (message.role === "user") {
    body.textContent = message.content;
    return;
  }
  const open = body.querySelector("details")?.open ?? false;
  body.replaceChildren();
  if (message.thought) {
    const details = el("details", { class: "thought" }, el("summary", {}, "Thinking"), el("div", {}, message.thought));
    details.open = open;
    body.append(details);
  }
  body.append(rendered(message.content));
  const end = message.end && ENDS[message.end];
  if (end) body.append(el("p", { class: `end ${message.end}` }, end));
}

function edit(made: HTMLElement, body: HTMLElement, message: Message, at: number, actions: Actions): void {
  if (!actions.ready() || made.classList.contains("editing")) return;
  const area = el("textarea", { "aria-label": "Edit your message", rows: "3" });
  area.value = message.content;
  const done = () => {
    made.classList.remove("editing");
    fillBody(body, message);
    made.querySelector<HTMLElement>(".tools button:last-child")?.focus();
  };
  const save = () => {
    const text = area.value.trim();
    if (text) actions.edit(at, text);
  };
  const cancel = el("button", { type: "button" }, "Cancel");
  const send = el("button", { type: "button", class: "primary" }, "Ask again");
  cancel.addEventListener("click", done);
  send.addEventListener("click", save);
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      done();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      save();
    }
  });
  made.classList.add("editing");
  const note = el("p", { class: "muted" }, "What follows this message is replaced.");
  body.replaceChildren(area, el("div", { class: "row" }, note, cancel, send));
  area.focus();
}

async function copied(text: string): Promise<boolean> {
  try {
    await navigator.clipboard.writeText(text);
    announce("Copied.");
    return true;
  } catch {
    announce("It could not be copied.");
    return false;
  }
}

/** The buttons on blocks of code, wherever in the conversation or the panel they appear. */
export function startCopying(): void {
  for (const area of ["messages", "panel-change"]) byId(area).addEventListener("click", copyCode);
}

function copyCode(event: Event): void {
  const button = (event.target as Element).closest<HTMLElement>("button.copy-code");
  const code = button?.closest("figure")?.querySelector("code");
  if (!button || !code) return;
  void copied(code.textContent ?? "").then((done) => {
    button.replaceChildren(icon(done ? "check" : "cross"), el("span", {}, done ? "Copied" : "Failed"));
    setTimeout(() => button.replaceChildren(icon("copy"), el("span", {}, "Copy")), 1500);
  });
}
