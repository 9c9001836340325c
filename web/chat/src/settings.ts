// The settings dialog: what is asked with every question, how the page looks, and what becomes of what it keeps.

import { type Settings, DEFAULTS } from "./conversation";
import { byId, el } from "./dom";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"] as const;
const THEME = "cloister-theme";

export function applyTheme(): void {
  const theme = localStorage.getItem(THEME);
  if (theme === "light" || theme === "dark") document.documentElement.dataset["theme"] = theme;
  else delete document.documentElement.dataset["theme"];
}

/** What was kept, as far as it is settings. */
export function parseSettings(raw: unknown): Settings {
  const told = (typeof raw === "object" && raw ? raw : {}) as Partial<Record<keyof Settings, unknown>>;
  const settings = { ...DEFAULTS };
  if (typeof told.system === "string") settings.system = told.system;
  if (typeof told.model === "string") settings.model = told.model;
  for (const name of NUMBERS) {
    const value = told[name];
    if (typeof value === "number" && Number.isFinite(value)) settings[name] = value;
  }
  return settings;
}

export function showModels(names: string[], chosen: string): void {
  const select = byId<HTMLSelectElement>("set-model");
  const known = names.includes(chosen) || !chosen ? names : [chosen, ...names];
  select.replaceChildren(...known.map((name) => el("option", { value: name }, name)));
  select.value = chosen || (names[0] ?? "");
}

export function startSettings(current: () => Settings, changed: (settings: Settings) => void): void {
  const dialog = byId<HTMLDialogElement>("settings");
  const form = byId<HTMLFormElement>("settings-form");
  const theme = byId<HTMLSelectElement>("set-theme");
  const field = (name: string) => byId<HTMLInputElement>(`set-${name}`);

  byId("open-settings").addEventListener("click", () => {
    const settings = current();
    byId<HTMLTextAreaElement>("set-system").value = settings.system;
    if (settings.model) byId<HTMLSelectElement>("set-model").value = settings.model;
    for (const name of NUMBERS) field(name).value = settings[name] === null ? "" : String(settings[name]);
    theme.value = localStorage.getItem(THEME) ?? "auto";
    dialog.showModal();
  });
  theme.addEventListener("change", () => {
    localStorage.setItem(THEME, theme.value);
    applyTheme();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const numbers = Object.fromEntries(
      NUMBERS.map((name) => [name, field(name).value === "" ? null : field(name).valueAsNumber]),
    );
    const system = byId<HTMLTextAreaElement>("set-system").value;
    const model = byId<HTMLSelectElement>("set-model").value;
    changed(parseSettings({ system, model, ...numbers }));
    dialog.close();
  });
}
