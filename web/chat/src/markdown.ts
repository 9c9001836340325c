// Markdown that a model wrote, to elements. Its HTML is shown as text; what markdown makes is sanitized all the same, and
// comes out as nodes: no markup that the enclave had a hand in is ever parsed into the page itself.

import DOMPurify from "dompurify";
import hljs from "highlight.js/lib/core";
import bash from "highlight.js/lib/languages/bash";
import c from "highlight.js/lib/languages/c";
import cpp from "highlight.js/lib/languages/cpp";
import css from "highlight.js/lib/languages/css";
import diff from "highlight.js/lib/languages/diff";
import go from "highlight.js/lib/languages/go";
import java from "highlight.js/lib/languages/java";
import javascript from "highlight.js/lib/languages/javascript";
import json from "highlight.js/lib/languages/json";
import python from "highlight.js/lib/languages/python";
import rust from "highlight.js/lib/languages/rust";
import sql from "highlight.js/lib/languages/sql";
import typescript from "highlight.js/lib/languages/typescript";
import xml from "highlight.js/lib/languages/xml";
import yaml from "highlight.js/lib/languages/yaml";
import { Marked } from "marked";
import { codeBlock, el, plain } from "./dom";

const LANGUAGES = { bash, c, cpp, css, diff, go, java, javascript, json, python, rust, sql, typescript, xml, yaml };
for (const [name, language] of Object.entries(LANGUAGES)) hljs.registerLanguage(name, language);

const LONGEST_COLOURED = 20_000; // characters of a block of code

const escaped = (text: string) =>
  text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escaped(text),
    image: ({ text, href }) => `<em>${escaped(text || "image")}</em> (${escaped(href)})`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

// DOMPurify parses with it, into a document of its own that runs nothing. It never leaves this module.
const policy = window.trustedTypes?.createPolicy("cloister-markdown", {
  createHTML: (text) => text,
  createScriptURL: () => {
    throw new TypeError("no script has an address here");
  },
});

const TAGS = [
  ..."p br hr strong em del code pre blockquote ul ol li a h1 h2 h3 h4 h5 h6".split(" "),
  ..."table thead tbody tr th td span".split(" "),
];

function sanitized(html: string): DocumentFragment {
  return DOMPurify.sanitize(html, {
    ALLOWED_TAGS: TAGS,
    ALLOWED_ATTR: ["href", "title", "class", "start", "align"],
    ALLOW_DATA_ATTR: false,
    ALLOW_ARIA_ATTR: false,
    ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
    RETURN_DOM_FRAGMENT: true,
    ...(policy ? { TRUSTED_TYPES_POLICY: policy as unknown as TrustedTypePolicy } : {}),
  });
}

export function rendered(markdown: string): DocumentFragment {
  const fragment = sanitized(marked.parse(markdown, { async: false }));
  for (const code of fragment.querySelectorAll("pre > code")) decorate(code as HTMLElement);
  for (const one of fragment.querySelectorAll("[class]")) {
    // Classes belong to the page: nothing that a model says may look like its badge.
    if (!one.closest("figure.code")) one.removeAttribute("class");
  }
  for (const link of fragment.querySelectorAll("a")) showTarget(link);
  for (const table of fragment.querySelectorAll("table")) {
    const frame = el("div", { class: "table", tabindex: "0", role: "group", "aria-label": "Table" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return fragment;
}

function decorate(code: HTMLElement): void {
  const text = code.textContent ?? "";
  const named = /(?:^|\s)language-([\w+#.-]{1,30})/.exec(code.className)?.[1]?.toLowerCase() ?? "";
  const language = hljs.getLanguage(named) ? named : "";
  const shown = el("code");
  if (language && text.length < LONGEST_COLOURED) shown.append(coloured(text, language));
  else shown.textContent = text;
  code.parentElement?.replaceWith(codeBlock(named || "text", shown));
}

function coloured(text: string, language: string): DocumentFragment {
  const fragment = sanitized(hljs.highlight(text, { language, ignoreIllegals: true }).value);
  for (const one of fragment.querySelectorAll("[class]")) {
    if (!/^(?:hljs-[\w-]+|language-[\w-]+|[\w-]+_)(?: [\w-]+_)*$/.test(one.className)) one.removeAttribute("class");
  }
  return fragment;
}

/** A link says where it leads: its words are the model's, and may say something else. */
function showTarget(link: HTMLAnchorElement): void {
  const href = link.getAttribute("href");
  if (!href) {
    link.replaceWith(...link.childNodes);
    return;
  }
  link.target = "_blank";
  link.rel = "noopener noreferrer nofollow";
  link.title = plain(href);
  const host = URL.canParse(href) ? new URL(href).host : "";
  if (host && !link.textContent?.includes(host)) link.append(el("span", { class: "target" }, host));
}
