// Builds the page: node build.mjs [FOLDER]. The same sources and lock give the same bytes, on any machine.
import { createHash } from "node:crypto";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const folder = process.argv[2] ?? join(here, "../../src/cloister/proxy/page");
const bundled = ["dompurify", "highlight.js", "marked"];

const digest = (algorithm, bytes, encoding) => createHash(algorithm).update(bytes).digest(encoding);

async function bundle(entry) {
  const { outputFiles } = await build({
    absWorkingDir: here,
    entryPoints: [entry],
    bundle: true,
    write: false,
    outdir: "out",
    minify: true,
    charset: "utf8",
    format: "iife",
    target: ["chrome123", "firefox128", "safari17.5"],
    legalComments: "none",
    logLevel: "warning",
  });
  return Buffer.from(outputFiles[0].contents);
}

async function licenses() {
  const texts = [];
  for (const name of bundled) {
    const at = join(here, "node_modules", name);
    const { version, license } = JSON.parse(await readFile(join(at, "package.json"), "utf8"));
    const text = await readFile(join(at, "LICENSE"), "utf8");
    texts.push(`${name} ${version} (${license})\n\n${text.replaceAll("\r\n", "\n").trim()}\n`);
  }
  return Buffer.from(`The script of this page contains:\n\n${texts.join(`\n${"-".repeat(80)}\n\n`)}`);
}

const files = { "app.js": await bundle("src/main.ts"), "style.css": await bundle("src/style.css") };
let page = await readFile(join(here, "src/index.html"), "utf8");
for (const [name, bytes] of Object.entries(files)) {
  const integrity = `sha384-${digest("sha384", bytes, "base64")}`;
  if (!page.includes(`{{${name}}}`)) throw new Error(`index.html names no ${name}`);
  page = page.replaceAll(`{{${name}}}`, integrity);
}
files["index.html"] = Buffer.from(page);
files["LICENSES.txt"] = await licenses();

const names = Object.keys(files).sort();
const pins = Object.fromEntries(names.map((name) => [name, `sha256:${digest("sha256", files[name], "hex")}`]));
await mkdir(folder, { recursive: true });
for (const name of names) await writeFile(join(folder, name), files[name]);
await writeFile(join(folder, "assets.json"), `${JSON.stringify(pins, null, 1)}\n`);
