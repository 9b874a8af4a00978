// What the walks through the pages have in common: a browser that reaches this machine alone, people in it, each with a
// profile of their own, and a guard on every page that they open.
//
// The guard: a request to anywhere but the installation, an error in the console or in a script, a breach of the content
// security policy, or a dialog of the browser's own fails the walk, whenever it happens. What people look at must have
// no serious finding of axe; pictures of it are kept.
//
// A walk is told by its environment where everything is; see tests/src/browser.rs. It ends with 0 where all is well.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdirSync } from "node:fs";
import { createRequire } from "node:module";
import { basename, join } from "node:path";
import { pathToFileURL } from "node:url";

/** Where the libraries are installed, and where pictures go. */
const folder = process.env.PAPERKEY_TEST_BROWSER;
const require = createRequire(pathToFileURL(`${folder}/`));
const { chromium } = require("playwright-core");
const { default: AxeBuilder } = require("@axe-core/playwright");

/** The browser, which is no part of them. */
const executablePath = process.env.PAPERKEY_TEST_CHROMIUM ?? "/usr/bin/chromium";

/** Where the installation is, such as http://127.0.0.1:4321. */
export const base = process.env.WALK_URL;
/** Where webhooks can be sent to. */
export const receiver = process.env.WALK_RECEIVER_URL;
/** How long a walk may take before it is given up, so that it can still say where it was. */
const PATIENCE_MS = Number(process.env.WALK_PATIENCE_MS ?? 200_000);
/** How long anything may take that is waited for. */
const PATIENCE_OF_A_STEP_MS = 30_000;

/** The walk: the name of the script, and what it was told. */
const told = process.argv.slice(2);
const name = [basename(process.argv[1], ".mjs"), ...told].join("-");
/** Where pictures of this walk are kept. */
export const pictures = join(folder, "screenshots", name);

const FLAGS = [
  "--no-sandbox",
  "--disable-gpu",
  "--disable-quic",
  "--no-first-run",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-sync",
  // What is asked of any other machine is found out by the guard, and goes nowhere.
  "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
];

const began = Date.now();
const said = (text) => console.log(`${((Date.now() - began) / 1000).toFixed(1).padStart(6)} s  ${text}`);

/** Says what comes next, so that a failure tells where it was. */
export const step = (text) => said(text);

/** Says something that was measured. */
export const report = (text) => said(`    ${text}`);

/** The looks that a walk was told to have, such as `dark 390`. */
export const screen = { dark: told[0] === "dark", width: Number(told[1] ?? 1440), height: 900 };

/** Somebody with a profile of their own. */
export class Person {
  #faults = [];
  #forgiven = [];

  constructor(context, page, name) {
    this.context = context;
    this.page = page;
    this.name = name;
    context.on("page", (page) => this.#guard(page));
    this.#guard(page);
  }

  #guard(page) {
    const fault = (text) => this.#faults.push(`${text}\n      on ${page.url()}`);
    page.on("request", (request) => {
      const url = new URL(request.url());
      if (["data:", "blob:", "about:"].includes(url.protocol)) return;
      if (url.origin !== base) fault(`a request to another origin: ${request.url()}`);
    });
    page.on("websocket", (socket) => fault(`a socket to ${socket.url()}`));
    page.on("console", (message) => {
      const text = message.text();
      if (message.type() === "error" && !this.#forgiven.some((known) => known.test(text))) {
        fault(`an error in the console: ${text} (${message.location().url})`);
      }
    });
    page.on("pageerror", (error) => fault(`an error in a script: ${error.stack ?? error}`));
    page.on("crash", () => fault("the page crashed"));
    page.on("dialog", (dialog) => {
      fault(`a dialog of the browser's own: ${dialog.type()} ${dialog.message()}`);
      void dialog.dismiss();
    });
  }

  /** Some errors in the console belong to what is tried out: the browser reports answers such as 404 as errors. */
  forgives(...patterns) {
    this.#forgiven.push(...patterns);
  }

  /** Fails where the guard has found something. */
  faultless() {
    assert.deepEqual(this.#faults, [], `${this.name}:\n  ${this.#faults.join("\n  ")}`);
  }

  get faults() {
    return this.#faults;
  }

  /** Opens an address of the installation, and waits until it stands. */
  async visit(path) {
    await this.page.goto(base + path);
    await this.settled();
  }

  /** Waits until there is a heading, and nothing is on its way any more. */
  async settled() {
    await this.page.waitForFunction(() => {
      const says = (text) => [...document.querySelectorAll("[role=status], td, p")].some((at) => at.textContent.trim() === text);
      return document.querySelector("h1") && !document.querySelector("[aria-busy=true]") && !says("Loading…");
    });
  }

  /** Looks at what is on the screen: keeps a picture, and has axe judge it. */
  async look(as, { within, without } = {}) {
    await this.settled();
    await this.page.screenshot({ path: join(pictures, `${as}.png`), fullPage: true });
    await this.judged(as, { within, without });
    this.faultless();
  }

  async judged(as, { within, without } = {}) {
    let axe = new AxeBuilder({ page: this.page }).setLegacyMode(true);
    if (within) axe = axe.include(within);
    if (without) axe = axe.exclude(without);
    const { violations } = await axe.analyze();
    const grave = violations.filter(({ impact }) => impact === "serious" || impact === "critical");
    const told = grave.map(({ id, impact, help, nodes }) => {
      const places = nodes.slice(0, 5).map((node) => `      ${node.html.slice(0, 300)}\n        ${node.failureSummary?.replaceAll("\n", "\n        ")}`);
      return `    ${id} (${impact}): ${help}\n${places.join("\n")}`;
    });
    assert.equal(grave.length, 0, `axe on ${as}, ${this.page.url()}:\n${told.join("\n")}`);
    // Nothing but what scrolls by itself is wider than the window.
    const wider = await this.page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    assert.ok(wider <= 0, `${as}, ${this.page.url()}: the page is ${wider} px wider than the window`);
  }

  button(name, within = this.page) {
    return within.getByRole("button", { name, exact: typeof name === "string" });
  }

  /** What is to be done, also where it is done at another address. */
  deed(name, within = this.page) {
    return this.button(name, within).or(within.getByRole("link", { name, exact: typeof name === "string" })).first();
  }

  /** A field by its label, whether or not it may be left empty. */
  field(label, within = this.page) {
    return within.getByLabel(new RegExp(`^${label}( ?\\(optional\\))?$`));
  }

  dialog() {
    return this.page.getByRole("dialog");
  }

  /** Where the pages are chosen from; on a small screen it must be opened first. */
  async doors() {
    const menu = this.button("Menu");
    if ((await menu.isVisible()) && (await menu.getAttribute("aria-expanded")) !== "true") await menu.click();
    return this.page.getByRole("navigation", { name: "Pages" }).first();
  }

  /** Goes to a page by its door. */
  async enter(door) {
    await (await this.doors()).getByRole("link", { name: door, exact: true }).click();
    await this.settled();
  }

  async signIn({ email, password }, path = "/app/sign-in") {
    await this.visit(path);
    await this.field("Email").fill(email);
    await this.field("Password").fill(password);
    await this.button("Sign in").click();
    await this.isIn();
  }

  /** Waits until the dashboard is entered; on a small screen its doors are behind a button. */
  async isIn() {
    await this.button("Menu").or(this.page.getByRole("navigation", { name: "Pages" })).first().waitFor();
    await this.settled();
  }

  /** Fills the form to sign up, and sends it. */
  async signUp({ name, email, password }) {
    await this.field("Name").fill(name);
    await this.field("Email").fill(email);
    await this.field("Password").fill(password);
    await this.button("Create account").click();
  }

  async signOut() {
    await this.doors();
    await this.button("Sign out").click();
    await this.field("Password").waitFor();
  }
}

/** Waits until something is so, with a deadline. */
export async function eventually(what, ask) {
  const until = Date.now() + PATIENCE_OF_A_STEP_MS;
  for (;;) {
    const found = await ask();
    if (found) return found;
    assert.ok(Date.now() < until, `${what}: not so after ${PATIENCE_OF_A_STEP_MS} ms`);
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
}

/** Runs a command as somebody would who has copied it, and gives what it wrote. */
export async function bash(command) {
  const shell = spawn("bash", ["-c", command], { stdio: ["ignore", "pipe", "pipe"], timeout: PATIENCE_OF_A_STEP_MS });
  const written = { stdout: "", stderr: "" };
  for (const stream of ["stdout", "stderr"]) shell[stream].on("data", (piece) => (written[stream] += piece));
  const code = await new Promise((resolve) => shell.on("close", resolve));
  assert.equal(code, 0, `${command}\nended with ${code}:\n${written.stdout}${written.stderr}`);
  return written.stdout;
}

/** Asks the API, without a browser. */
export async function call(method, path, { token, body, headers = {} } = {}) {
  const sent = { ...headers };
  if (token) sent.authorization = `Bearer ${token}`;
  if (body !== undefined) sent["content-type"] = "application/json";
  const answer = await fetch(base + path, { method, headers: sent, body: body === undefined ? undefined : JSON.stringify(body) });
  const text = await answer.text();
  let json = null;
  try {
    json = JSON.parse(text);
  } catch {
    // Not everything is JSON.
  }
  return { status: answer.status, json, text };
}

/** The same where it must succeed: gives the answer. */
export async function made(method, path, { token, body, headers } = {}) {
  const { status, json, text } = await call(method, path, { token, body, headers });
  assert.ok(status < 300, `${method} ${path}: ${status} ${text}`);
  return json;
}

let people = 0;

/** Somebody whom nobody knows yet. */
export function somebody(name = "Ada Lovelace") {
  const nobody = `${Date.now().toString(36)}-${process.pid}-${++people}`;
  return { name, email: `somebody-${nobody}@example.com`, password: `correct horse ${nobody}` };
}

/** Registers somebody over the API: an owner with a team. */
export async function registered(name, headers) {
  const person = somebody(name);
  const { token, user, team } = await made("POST", "/auth/register", { body: person, headers });
  return { ...person, token, userId: user.id, teamId: team.id };
}

/** Walks: opens a browser, does the steps, and fails where they do or where a guard has found something. */
export async function walk(steps) {
  mkdirSync(pictures, { recursive: true });
  const browser = await chromium.launch({ executablePath, args: FLAGS, headless: true });
  const present = [];
  const person = async (name, { width = 1440, height = 900, dark = false } = {}) => {
    const context = await browser.newContext({
      viewport: { width, height },
      colorScheme: dark ? "dark" : "light",
      reducedMotion: "reduce",
      permissions: ["clipboard-read", "clipboard-write"],
      locale: "en-GB",
    });
    context.setDefaultTimeout(PATIENCE_OF_A_STEP_MS);
    await context.addInitScript(() => {
      addEventListener("securitypolicyviolation", ({ effectiveDirective, blockedURI }) =>
        console.error(`content security policy: ${effectiveDirective} forbids ${blockedURI}`.trim()),
      );
    });
    const found = new Person(context, await context.newPage(), name);
    present.push(found);
    return found;
  };
  const failed = async (error) => {
    console.error(`\n${name} FAILED: ${error.stack ?? error}`);
    for (const { name, context, faults } of present) {
      for (const [at, page] of context.pages().entries()) {
        const path = join(pictures, `failed-${name}-${at}.png`);
        await page.screenshot({ path, timeout: 5_000 }).catch(() => {});
        console.error(`\n${name} is at ${page.url()}, as ${path} shows`);
      }
      for (const fault of faults) console.error(`  ${fault}`);
    }
    process.exit(1);
  };
  const watch = setTimeout(() => void failed(new Error(`not done after ${PATIENCE_MS} ms`)), PATIENCE_MS);
  try {
    await steps({ person, browser });
    for (const one of present) one.faultless();
  } catch (error) {
    await failed(error);
  }
  clearTimeout(watch);
  await browser.close();
  said("all is well");
}
