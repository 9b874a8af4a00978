// How little a first visit takes: what is asked for before somebody can sign in, and how much all pages weigh. These are
// counted, for counts do not depend on the machine; the milliseconds are only told.
import assert from "node:assert/strict";
import { base, report, step, walk } from "./lib.mjs";

/** Scripts and styles of all pages, compressed. */
const MOST_BYTES = 180_000;
/** Requests before the first page can be used. */
const MOST_REQUESTS = 8;

await walk(async ({ person }) => {
  step("a first visit, with nothing in the cache");
  const at = await person("visitor");
  const { page } = at;
  const asked = [];
  page.on("request", (request) => asked.push(request.url()));
  const files = new Set();
  page.on("response", (response) => {
    if (/javascript|css/.test(response.headers()["content-type"] ?? "")) files.add(response.url());
  });
  const began = performance.now();
  await page.goto(`${base}/app/`, { waitUntil: "commit" });
  await page.getByLabel("Email", { exact: true }).waitFor();
  const usable = performance.now() - began;
  assert.ok(await page.getByLabel("Password", { exact: true }).isEnabled());
  assert.ok(await at.button("Sign in").isEnabled());
  // The icon is asked for by the page and by the browser.
  const before = new Set(asked).size;
  report(`usable after ${usable.toFixed(0)} ms and ${before} requests`);
  assert.ok(before <= MOST_REQUESTS, `${before} requests:\n${asked.join("\n")}`);

  step("a second visit asks for no file twice that cannot have changed");
  asked.length = 0;
  const again = performance.now();
  await page.goto(`${base}/app/`, { waitUntil: "commit" });
  await page.getByLabel("Email", { exact: true }).waitFor();
  report(`usable again after ${(performance.now() - again).toFixed(0)} ms`);
  const fromServer = await page.evaluate(() =>
    performance
      .getEntriesByType("resource")
      .filter(({ name, transferSize }) => name.includes("/assets/") && transferSize > 0)
      .map(({ name }) => name),
  );
  assert.deepEqual(fromServer, []);

  step("all pages together");
  // Files name the files that they ask for.
  const named = new Set();
  let total = 0;
  const sizes = [];
  const follow = async (path) => {
    if (named.has(path)) return;
    named.add(path);
    const answer = await fetch(base + path, { headers: { "accept-encoding": "gzip" } });
    assert.equal(answer.status, 200, path);
    assert.equal(answer.headers.get("content-encoding"), "gzip", path);
    if (path !== "/app/") {
      const sent = Number(answer.headers.get("content-length"));
      assert.ok(sent > 0, path);
      total += sent;
      sizes.push([sent, path]);
    }
    for (const [found] of (await answer.text()).matchAll(/(?<=["'/])(?:assets\/|\.\/)?[\w.-]+\.(?:js|css)(?=["'`])/g)) {
      await follow(`/app/assets/${found.slice(found.lastIndexOf("/") + 1)}`);
    }
  };
  await follow("/app/");
  for (const [size, path] of sizes.sort(([a], [b]) => b - a).slice(0, 8)) report(`${String(size).padStart(7)} ${path}`);
  report(`${sizes.length} files of scripts and styles: ${(total / 1024).toFixed(1)} KB compressed`);
  for (const url of files) assert.ok(named.has(new URL(url).pathname), `${url} was not counted`);
  assert.ok(total < MOST_BYTES, `${total} bytes`);
});
