"use strict";
// The host's console: reads the API and shows it. It writes nothing, keeps one session in this tab, and puts foreign
// text into the page as text only.

const KEY = "cloister-console";
const EVERY = 3000; // milliseconds
const STATES = { ready: "good", waiting: "wait", starting: "wait", opening: "wait", loading: "wait", restarting: "bad", failed: "bad" };
const VERDICTS = { trusted: "good", simulated: "wait", refused: "bad", unseen: "wait" };

let chosen = "";
let lastLine = 0;

const at = (id) => document.getElementById(id);

function element(name, text = "", className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function size(bytes) {
  if (bytes == null) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let value = bytes;
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${value >= 100 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${units[unit]}`;
}

const cores = (count) => `${count} ${count === 1 ? "core" : "cores"}`;

const moment = (seconds) => (seconds == null ? "–" : new Date(seconds * 1000).toLocaleString());

function left(seconds) {
  if (seconds == null) return "never";
  const hours = (seconds - Date.now() / 1000) / 3600;
  if (hours <= 0) return "over";
  return hours < 48 ? `in ${hours.toFixed(1)} h` : `in ${Math.floor(hours / 24)} days`;
}

async function begin() {
  const token = location.hash.slice(1);
  if (!token) return;
  history.replaceState(null, "", location.pathname);
  const answer = await fetch("/console/session", { method: "POST", body: JSON.stringify({ token }) });
  if (answer.ok) sessionStorage.setItem(KEY, (await answer.json()).session);
}

async function get(path) {
  const session = sessionStorage.getItem(KEY);
  if (!session) throw new Error("This page needs a one-time address: cloister host console prints one.");
  const answer = await fetch(path, { headers: { authorization: `Bearer ${session}` } });
  if (answer.status === 401) {
    sessionStorage.removeItem(KEY);
    throw new Error("This session is over. cloister host console prints a new address.");
  }
  if (!answer.ok) throw new Error(`The host answered ${answer.status}.`);
  return answer.json();
}

function stateCell(app) {
  const cell = element("td");
  cell.append(element("span", app.state, `state ${STATES[app.state] ?? ""}`), element("span", app.detail, "detail"));
  return cell;
}

function evidenceCell(app) {
  const cell = element("td");
  const seen = app.evidence;
  const verdict = seen ? seen.verdict : "not looked at";
  cell.append(element("span", verdict, `state ${VERDICTS[verdict] ?? ""}`));
  if (seen) {
    const failed = seen.failed.length ? `: ${seen.failed.join(", ")}` : "";
    cell.append(element("span", `${seen.detail}${failed} ${moment(seen.at)}`.trim(), "detail"));
  }
  return cell;
}

function row(app) {
  const made = element("tr");
  const head = element("th");
  head.scope = "row";
  const button = element("button", app.name);
  button.type = "button";
  button.addEventListener("click", () => choose(app.name));
  head.append(button);
  made.append(head, stateCell(app), evidenceCell(app));
  made.append(element("td", `${size(app.usage?.memory_bytes)} of ${size(app.memory_bytes)}`));
  made.append(element("td", app.usage ? `${app.usage.cpu_seconds.toFixed(0)} s, ${cores(app.cores)}` : cores(app.cores)));
  made.append(element("td", left(app.expires_at)));
  if (app.name === chosen) made.setAttribute("aria-current", "true");
  return made;
}

function showApps(apps) {
  const body = at("apps").querySelector("tbody");
  const focused = document.activeElement?.closest("tbody") ? document.activeElement.textContent : null;
  body.replaceChildren(...apps.map(row));
  at("none").hidden = apps.length > 0;
  for (const button of body.querySelectorAll("button")) if (button.textContent === focused) button.focus();
}

function facts(app) {
  const ready = app.ready ?? {};
  return [
    ["address", app.address],
    ["owner", app.owner],
    ["deployment", `${app.deployment}, release ${app.release}`],
    ["launch config", `sha256:${app.launch_sha256}`],
    ["kind", `${app.kind} on ${app.platform}`],
    ["bundle", app.bundle ? `sha256:${app.bundle}` : `none (public model ${app.model})`],
    ["model", [ready.model, ready.quantization, ready.model_sha256 && `sha256:${ready.model_sha256}`].filter(Boolean).join(", ") || "–"],
    ["may connect to", app.egress.length ? app.egress.join(", ") : "nowhere"],
    ["running since", app.state === "ready" ? moment(app.since) : "–"],
    ["starts", String(app.starts)],
    ["expires", `${moment(app.expires_at)} (${left(app.expires_at)})`],
    ["deployed by", `${app.deployed_by}, ${moment(app.changed_at)}`],
  ];
}

function showApp(app) {
  at("app").hidden = false;
  at("app-title").textContent = app.name;
  at("facts").replaceChildren(...facts(app).flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
}

function draw(id, title, points, unit) {
  const svg = at(id);
  at(`${id}-title`).textContent = points.length ? `${title}: ${unit(points[points.length - 1][1])} now` : `${title}: no samples yet`;
  svg.replaceChildren();
  if (points.length < 2) return;
  const most = Math.max(...points.map((point) => point[1])) || 1;
  const [first, last] = [points[0][0], points[points.length - 1][0]];
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  const place = ([time, value]) => `${(600 * (time - first)) / (last - first || 1)},${116 - (112 * value) / most}`;
  line.setAttribute("points", points.map(place).join(" "));
  svg.append(line);
}

function rates(samples, count) {
  const pairs = samples.slice(1).map((sample, index) => [samples[index], sample]);
  return pairs.map(([one, two]) => [two.at, Math.max(0, count(two) - count(one)) / Math.max(two.at - one.at, 0.001)]);
}

function showSamples(samples) {
  draw("memory", "Memory", samples.map((sample) => [sample.at, sample.memory_bytes]), size);
  draw("cpu", "CPU", rates(samples, (sample) => sample.cpu_seconds), (value) => `${(100 * value).toFixed(0)} %`);
  draw("traffic", "Traffic", rates(samples, (sample) => sample.received + sample.sent), (value) => `${size(value)}/s`);
}

function showLines(lines) {
  const log = at("log");
  const follow = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  for (const line of lines) {
    lastLine = line.seq;
    log.append(element("li", `${moment(line.at)}  ${line.kind}  ${line.text}`));
  }
  while (log.childElementCount > 500) log.firstElementChild.remove();
  if (follow) log.scrollTop = log.scrollHeight;
}

function choose(name) {
  chosen = name;
  lastLine = 0;
  at("log").replaceChildren();
  refresh().then(() => at("app-title").focus());
}

async function refresh() {
  try {
    const { apps } = await get("/v1/apps");
    if (!apps.some((app) => app.name === chosen)) {
      chosen = "";
      at("app").hidden = true;
    }
    showApps(apps);
    const name = chosen;
    if (name) {
      const path = `/v1/apps/${encodeURIComponent(name)}`;
      const [{ samples }, { lines }] = await Promise.all([get(`${path}/samples`), get(`${path}/logs?after=${lastLine}`)]);
      if (name === chosen) {
        showApp(apps.find((app) => app.name === name));
        showSamples(samples);
        showLines(lines.filter((line) => line.seq > lastLine));
      }
    }
    at("problem").hidden = true;
    at("live").textContent = `as of ${new Date().toLocaleTimeString()}`;
  } catch (error) {
    at("problem").textContent = error instanceof TypeError ? "The host cannot be reached." : error.message;
    at("problem").hidden = false;
  }
}

async function machine() {
  try {
    const host = await get("/v1/host");
    at("machine").textContent = `${host.backend} backend, platform ${host.platform}, ${cores(host.cores)}, ${size(host.memory_bytes)} for apps, bundles ${size(host.bundle_bytes)}`;
    if (host.platform === "sim") at("machine").textContent += " – SIMULATED: whoever runs this machine can read everything";
  } catch {
    // `refresh` says what is wrong
  }
}

async function run() {
  await begin();
  await machine();
  await refresh();
  setInterval(() => document.hidden || refresh(), EVERY);
}

run();
