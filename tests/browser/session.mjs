// The session: no script can read it, no other site can use it, nothing keeps a token; every tab of a browser is signed
// in by it, and signing out ends it in all of them.
import assert from "node:assert/strict";
import { base, call, registered, step, walk } from "./lib.mjs";

await walk(async ({ person }) => {
  const ada = await registered("Ada Lovelace");
  const at = await person("ada");
  const { page, context } = at;

  step("signing in gives a cookie that scripts and other sites have no use of");
  await at.signIn(ada);
  const cookies = await context.cookies();
  assert.equal(cookies.length, 1, JSON.stringify(cookies));
  const [session] = cookies;
  assert.equal(session.httpOnly, true);
  assert.equal(session.sameSite, "Strict");
  assert.equal(session.domain, new URL(base).hostname);

  step("nothing that scripts can reach holds a token");
  const within = async (page) =>
    page.evaluate(async () => ({
      cookie: document.cookie,
      local: JSON.stringify({ ...localStorage }),
      tab: JSON.stringify({ ...sessionStorage }),
      databases: (await indexedDB.databases()).length,
      caches: (await caches.keys()).length,
    }));
  const nothingIn = ({ cookie, local, tab, databases, caches }) => {
    assert.equal(cookie, "");
    for (const kept of [local, tab]) {
      assert.ok(!kept.includes(session.value) && !kept.includes(ada.token), kept);
      assert.doesNotMatch(kept, /eyJ|ses_|p[bk]_(live|test|free)_/);
    }
    assert.equal(databases + caches, 0);
  };
  nothingIn(await within(page));
  assert.ok(!(await page.content()).includes(session.value));

  step("the session is shown in no address and in no answer");
  await at.enter("Products");
  assert.ok(!page.url().includes(session.value));

  step("a second tab is signed in, and so is a tab that is loaded anew");
  const second = await context.newPage();
  await second.goto(`${base}/app/licenses`);
  await second.getByRole("heading", { level: 1, name: "Licences" }).waitFor();
  nothingIn(await within(second));
  await page.reload();
  await page.getByRole("heading", { level: 1, name: "Products" }).waitFor();

  step("the cookie is a session for whoever has it, from this site only");
  const cookie = `${session.name}=${session.value}`;
  const own = await call("GET", "/auth/me", { headers: { cookie, origin: base } });
  assert.equal(own.status, 200, own.text);
  for (const origin of ["https://evil.example", "null"]) {
    const foreign = await call("POST", "/products", {
      body: { name: "Not mine" },
      headers: { cookie, origin, "sec-fetch-site": "cross-site", "sec-fetch-mode": "cors" },
    });
    assert.ok([401, 403].includes(foreign.status), `from ${origin}: ${foreign.status} ${foreign.text}`);
  }

  step("signing out ends it in both");
  await at.signOut();
  assert.deepEqual(await context.cookies(), []);
  await second.reload();
  await second.getByRole("button", { name: "Sign in", exact: true }).waitFor();
  const after = await call("GET", "/auth/me", { headers: { cookie, origin: base } });
  assert.equal(after.status, 401, after.text);

  step("who comes back after signing in is where they wanted to be");
  await at.visit("/app/clients?q=x");
  await page.getByLabel("Email", { exact: true }).fill(ada.email);
  await page.getByLabel("Password", { exact: true }).fill("not the password");
  await at.button("Sign in").click();
  await page.getByRole("alert").waitFor();
  await at.look("refused");
  await page.getByLabel("Password", { exact: true }).fill(ada.password);
  await at.button("Sign in").click();
  await page.getByRole("heading", { level: 1, name: "Clients" }).waitFor();
  assert.equal(new URL(page.url()).search, "?q=x");
});
