// Conversations and settings as plain values.

import type { Question, Turn } from "./api";

export interface Message {
  role: "user" | "assistant";
  content: string;
  thought?: string;
  /** How an answer ended; "cut": without the enclave's word that this is all of it. */
  end?: "whole" | "length" | "stopped" | "cut";
  model?: string;
}

export interface Conversation {
  id: string;
  title: string;
  /** Owner and deployment of the enclave that it was held with: it is never sent to another. */
  heldWith: string;
  updated: number;
  messages: Message[];
}

export interface Settings {
  system: string;
  model: string;
  temperature: number | null;
  top_p: number | null;
  max_tokens: number | null;
  seed: number | null;
}

export const DEFAULTS: Settings = { system: "", model: "", temperature: null, top_p: null, max_tokens: null, seed: null };

export function newConversation(heldWith: string): Conversation {
  return { id: crypto.randomUUID(), title: "", heldWith, updated: Date.now(), messages: [] };
}

const LONGEST_TITLE = 60;

export function titleOf(text: string): string {
  const line = text.trim().split(/\s+/).join(" ");
  return line.length > LONGEST_TITLE ? `${line.slice(0, LONGEST_TITLE - 1)}…` : line;
}

export function question(conversation: Conversation, settings: Settings, model: string): Question {
  const system: Turn[] = settings.system.trim() ? [{ role: "system", content: settings.system }] : [];
  const said = conversation.messages.filter((one) => one.content || one.role === "user");
  const asked: Question = { model, messages: [...system, ...said.map(({ role, content }) => ({ role, content }))] };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"] as const) {
    const value = settings[name];
    if (value !== null) asked[name] = value;
  }
  return asked;
}
