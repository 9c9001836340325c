// The few things that every part of the page does with the document. Text enters it as text, never as markup.

export type Attributes = Record<string, string | boolean>;

export function el<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  attributes: Attributes = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[K] {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

export function byId<T extends HTMLElement = HTMLElement>(id: string): T {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no #${id}`);
  return found as T;
}

const SVG = "http://www.w3.org/2000/svg";

export function icon(name: string): SVGSVGElement {
  const drawn = document.createElementNS(SVG, "svg");
  drawn.setAttribute("class", "icon");
  drawn.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  drawn.append(use);
  return drawn;
}

export function iconButton(name: string, label: string, onClick: () => void, more: Attributes = {}): HTMLButtonElement {
  const button = el("button", { type: "button", class: "quiet", "aria-label": label, title: label, ...more }, icon(name));
  button.addEventListener("click", onClick);
  return button;
}

/** `code` under its label, with a button that copies it; it works inside what `startCopying` watches. */
export function codeBlock(label: string, code: HTMLElement): HTMLElement {
  const copy = el("button", { type: "button", class: "quiet copy-code" }, icon("copy"), el("span", {}, "Copy"));
  const head = el("div", { class: "code-head" }, el("span", {}, label), copy);
  const block = el("pre", { tabindex: "0", role: "group", "aria-label": `Code, ${label}` }, code);
  return el("figure", { class: "code" }, head, block);
}

/** What somebody else wrote, without characters that hide it, turn its order around or break its line. */
export function plain(text: string): string {
  return text.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]+/gu, " ").trim();
}

export function saveFile(name: string, text: string): void {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}

let announcing = 0;

/** Says something to a screen reader, politely. */
export function announce(text: string): void {
  const region = byId("announcer");
  region.textContent = "";
  clearTimeout(announcing);
  announcing = window.setTimeout(() => {
    region.textContent = text;
  }, 50);
}
