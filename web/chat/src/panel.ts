// The trust panel: what was verified, step by step, in the words that the proxy gives; those of `cloister verify --explain`.

import type { Proof, Step, Tone } from "./api";
import { announce, byId, codeBlock, el, icon, plain, saveFile } from "./dom";

type State = "checking" | Proof["verdict"];

const BADGES: Record<State, { label: string; style: string; icon: string }> = {
  checking: { label: "Checking…", style: "pending", icon: "pending" },
  trusted: { label: "Verified", style: "verified", icon: "shield-check" },
  simulated: { label: "Simulated", style: "simulated", icon: "shield-sim" },
  refused: { label: "Blocked", style: "blocked", icon: "shield-x" },
  unreachable: { label: "Not reachable", style: "blocked", icon: "shield-x" },
};

const HEADLINES: Record<State, string> = {
  checking: "Asking the enclave for evidence. Nothing is sent before it is judged.",
  trusted: "The hardware vouches for what answers here, and your policy accepts it.",
  simulated: "",
  refused: "Nothing was sent, and nothing is while this lasts.",
  unreachable: "Nothing can be verified now, so nothing is sent.",
};

const TABS = [
  { id: "key", title: "Key", about: "The keys that your words are sealed to, and whether the evidence is new." },
  { id: "code", title: "Code", about: "What runs in there, who started it, and with which settings." },
  { id: "chip", title: "Chip", about: "The hardware that signed the evidence, and how old its firmware is." },
  { id: "model", title: "Model", about: "The weights that answer." },
  { id: "open", title: "Not proved", about: "What this evidence cannot say. It is listed so that you know." },
] as const;
const CHANGE =
  "These lines of a policy would accept what answers there now. They say what runs, not that it is right: ask its owner " +
  "first, by another way. Then start the command again with that policy.";

type Tab = (typeof TABS)[number]["id"];

let chosen: Tab = "key";
let latest: Proof | null = null;

export function showBadge(state: State): void {
  const { label, style, icon: name } = BADGES[state];
  const badge = byId("badge");
  const before = badge.dataset["state"];
  badge.dataset["state"] = state;
  badge.className = `badge ${style}`;
  badge.replaceChildren(icon(name), el("span", {}, label));
  badge.setAttribute("aria-label", `${label}: show what was verified`);
  if (before !== state && state !== "checking") announce(`The enclave is: ${label}.`);
}

/** Everything pending: what was believed before counts no more. */
export function showChecking(): void {
  latest = null;
  showBadge("checking");
  render("checking", null);
}

export function showProof(proof: Proof): void {
  latest = proof;
  const failed = proof.explained.steps.find((step) => step.verdict === "fail");
  if (failed && !byId<HTMLDialogElement>("panel").open) chosen = failed.about;
  showBadge(proof.verdict);
  render(proof.verdict, proof);
}

function render(state: State, proof: Proof | null): void {
  const explained = proof?.explained;
  const verdict = byId("panel-verdict");
  const word = explained?.word || BADGES[state].label.toUpperCase().replace("…", "");
  verdict.className = `verdict ${BADGES[state].style}`;
  verdict.replaceChildren(
    el(
      "p",
      { class: "verdict-word" },
      icon(BADGES[state].icon),
      el("strong", {}, plain(word)),
      el("span", {}, plain(explained?.platform ?? "")),
    ),
  );
  for (const text of [proof?.message, explained?.sentence || HEADLINES[state], proof?.hint]) {
    if (text) verdict.append(el("p", {}, plain(text)));
  }
  const failed = (explained?.steps ?? []).filter((step) => step.verdict === "fail");
  renderChange(state === "refused" ? (proof?.policyChange ?? "") : "", failed);
  if (explained?.first_use) {
    verdict.append(el("p", { class: "first-use" }, el("strong", {}, "FIRST USE"), ` ${plain(explained.first_use)}`));
  }
  byId("panel-facts").replaceChildren(
    ...(explained?.facts ?? []).flatMap(([name, value]) => [el("dt", {}, plain(name)), el("dd", {}, plain(value))]),
  );
  renderPhases(state, explained?.steps ?? []);
  renderTabs(explained?.steps ?? []);
  renderTab();
  byId<HTMLButtonElement>("panel-save").disabled = !proof?.saved;
}

/** Old and new of each step that failed, and the lines that would accept it: for whoever has asked its owner, to take over
 * into a policy. */
function renderChange(lines: string, failed: Step[]): void {
  const area = byId("panel-change");
  area.hidden = !lines;
  const code = el("code", {}, lines.split("\n").map(plain).join("\n"));
  area.replaceChildren(
    el("h3", {}, "What changed"),
    ...failed.flatMap((step) => [el("p", {}, el("code", {}, plain(step.step))), comparison(step)]),
    el("h3", {}, "If this change was meant"),
    el("p", {}, CHANGE),
    codeBlock("policy, TOML", code),
  );
}

// The four things that are judged, one after the other

function renderPhases(state: State, steps: Step[]): void {
  const phases = TABS.filter((tab) => tab.id !== "open").map(({ id, title, about }) => {
    const own = steps.filter((step) => step.about === id);
    const failed = own.filter((step) => step.verdict === "fail").length;
    const passed = own.filter((step) => step.verdict === "pass").length;
    // No step, no proof: what is absent was never passed.
    const result = failed ? "failed" : state !== "checking" && passed ? "passed" : state === "checking" ? "pending" : "none";
    const words = {
      failed: `failed: ${failed} of ${failed + passed}`,
      passed: `passed: ${passed} of ${passed}`,
      pending: "pending",
      none: "not checked",
    }[result];
    const mark = { failed: "cross", passed: "check", pending: "pending", none: "pending" }[result];
    const text = el("span", { class: "phase-name" }, el("strong", {}, title), el("span", {}, about));
    return el("li", { class: `phase ${result}` }, icon(mark), text, el("span", { class: "phase-result" }, words));
  });
  const open = steps.filter((step) => step.verdict === "not-checked").length;
  const words = state === "checking" ? "pending" : open ? `${open} listed` : "nothing listed";
  const text = el("span", { class: "phase-name" }, el("strong", {}, "Not proved"), el("span", {}, TABS[4].about));
  phases.push(el("li", { class: "phase open" }, icon("open"), text, el("span", { class: "phase-result" }, words)));
  byId("panel-phases").replaceChildren(...phases);
}

// Tabs

const inTab = (tab: Tab, step: Step) =>
  tab === "open" ? step.verdict === "not-checked" : step.about === tab && step.verdict !== "not-checked";

function renderTabs(steps: Step[]): void {
  byId("panel-tabs").replaceChildren(
    ...TABS.map(({ id, title }) => {
      const selected = id === chosen;
      const own = steps.filter((step) => inTab(id, step));
      const failed = own.some((step) => step.verdict === "fail");
      const count = el("span", { class: "count" }, String(own.length));
      const tab = el(
        "button",
        {
          type: "button",
          role: "tab",
          id: `tab-${id}`,
          "aria-controls": "panel-steps",
          "aria-selected": String(selected),
          tabindex: selected ? "0" : "-1",
          class: failed ? "failed" : "",
        },
        title,
        count,
      );
      tab.addEventListener("click", () => choose(id));
      return tab;
    }),
  );
}

function choose(tab: Tab): void {
  chosen = tab;
  renderTabs(latest?.explained.steps ?? []);
  renderTab();
  byId(`tab-${tab}`).focus();
}

function renderTab(): void {
  const area = byId("panel-steps");
  area.setAttribute("aria-labelledby", `tab-${chosen}`);
  const tab = TABS.find(({ id }) => id === chosen);
  const own = (latest?.explained.steps ?? []).filter((step) => inTab(chosen, step));
  own.sort((a, b) => Number(b.verdict === "fail") - Number(a.verdict === "fail"));
  area.replaceChildren(el("p", { class: "muted" }, tab?.about ?? ""));
  if (chosen === "chip") area.append(...firmware());
  if (own.length) area.append(el("ol", { class: "steps" }, ...own.map(stepRow)));
  else area.append(el("p", { class: "muted" }, latest ? "No step of this kind was reported." : "Pending."));
}

const TONES: Record<Tone, string> = { "": "", good: "tone-good", warn: "tone-warn", bad: "tone-bad" };

function firmware(): HTMLElement[] {
  const { firmware = [], forecast = [] } = latest?.explained ?? {};
  const shown: HTMLElement[] = [];
  if (firmware.length) {
    const lines = firmware.map(([line, tone]) => el("li", { class: TONES[tone] }, plain(line)));
    shown.push(el("h3", {}, "Firmware"), el("ul", { class: "lines" }, ...lines));
  }
  if (forecast.length) {
    const rows = forecast.map(({ when, date, what, word, tone }) =>
      el(
        "tr",
        {},
        el("td", {}, when),
        el("td", {}, date),
        el("td", {}, plain(what)),
        el("td", { class: TONES[tone] }, word),
      ),
    );
    const heads = ["When", "Date", "What ends", "Do"].map((text) => el("th", { scope: "col" }, text));
    const table = el("table", {}, el("thead", {}, el("tr", {}, ...heads)), el("tbody", {}, ...rows));
    shown.push(el("h3", {}, "Forecast"), table);
  }
  if (shown.length) shown.push(el("h3", {}, "Steps"));
  return shown;
}

const RESULTS: Record<Step["verdict"], string> = { pass: "passed", fail: "failed", "not-checked": "open" };

function stepRow(step: Step): HTMLElement {
  const row = el(
    "li",
    { class: `step ${RESULTS[step.verdict]}` },
    el("p", { class: "step-head" }, el("code", {}, plain(step.step)), el("span", { class: "step-result" }, step.result)),
  );
  if (step.verdict === "pass") {
    if (step.got) row.append(el("p", { class: "value" }, plain(step.got)));
  } else if (step.verdict === "fail") {
    row.append(comparison(step));
  }
  if (step.hint) row.append(el("p", { class: "hint" }, plain(step.hint)));
  if (step.meaning) row.append(el("p", {}, step.meaning));
  if (step.remedy) row.append(el("p", { class: "remedy" }, step.remedy));
  return row;
}

function comparison(step: Step): HTMLElement {
  return el(
    "dl",
    { class: "compare" },
    el("dt", {}, "expected"),
    el("dd", {}, plain(step.expected) || "nothing"),
    el("dt", {}, "got"),
    el("dd", {}, plain(step.got) || "nothing"),
  );
}

/** Wires the panel's controls; `again` verifies anew. */
export function startPanel(again: () => Promise<void>): void {
  const dialog = byId<HTMLDialogElement>("panel");
  byId("badge").addEventListener("click", () => dialog.showModal());
  byId("panel-again").addEventListener("click", () => void again());
  byId("panel-save").addEventListener("click", () => {
    if (latest?.saved) saveFile("cloister-verification.json", `${JSON.stringify(latest.saved, null, 1)}\n`);
  });
  byId("panel-tabs").addEventListener("keydown", (event) => {
    const at = TABS.findIndex(({ id }) => id === chosen);
    const moves: Record<string, number> = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: TABS.length - 1 };
    const to = moves[event.key];
    if (to === undefined) return;
    event.preventDefault();
    choose(TABS[(to + TABS.length) % TABS.length]!.id);
  });
}
