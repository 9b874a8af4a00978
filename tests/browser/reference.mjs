// The reference: it asks nobody else for anything, is given a key by one click, and a call that is tried out with it is
// answered.
import assert from "node:assert/strict";
import { join } from "node:path";
import { base, made, pictures, registered, step, walk } from "./lib.mjs";

/** What is ours of the page; the rest is the viewer's. */
const OURS = "header";

/** The viewer asks whether it may make functions of text; it may not, and does without. */
const PROBE = /^content security policy: script-src forbids eval$/;

await walk(async ({ person }) => {
  step("a visitor reads it");
  const visitor = await person("visitor");
  visitor.forgives(PROBE);
  await visitor.visit("/api/docs");
  await visitor.page.getByRole("heading", { name: /Paperkey/ }).first().waitFor();
  await visitor.page.waitForLoadState("networkidle");
  await visitor.judged("visitor", { within: OURS });
  assert.equal(await visitor.page.getByRole("button", { name: /^Use my key/ }).isVisible(), false);
  visitor.faultless();

  step("an owner is given a key for it");
  const ada = await registered("Ada Lovelace");
  await made("POST", "/products", { token: ada.token, body: { name: "Nimbus" }, headers: { "paperkey-mode": "test" } });
  for (const dark of [false, true]) {
    const at = await person(dark ? "ada-by-night" : "ada", { dark });
    const { page } = at;
    at.forgives(PROBE);
    await at.signIn(ada);
    await page.goto(`${base}/api/docs`);
    await page.waitForLoadState("networkidle");
    const minted = page.waitForResponse((answer) => answer.url().endsWith("/api-keys/temporary"));
    await page.getByRole("button", { name: /^Use my key/ }).click();
    const { key } = await (await minted).json();
    assert.match(key, /^p[bk]_test_/);
    await page.getByRole("status").filter({ hasText: "test key" }).waitFor();
    await page.screenshot({ path: join(pictures, `${dark ? "dark" : "light"}.png`) });
    await at.judged("reference", { within: OURS });
    at.faultless();
    if (dark) continue;

    step("a call is tried out with it");
    await page.getByRole("button", { name: "Open Group - Catalog" }).nth(1).click();
    await page.locator('a[href$="/GET/api/v1/products"]').first().click();
    await page.getByRole("button", { name: /^Test Request ?\(get \/api\/v1\/products\)$/ }).first().click();
    const answered = page.waitForResponse((answer) => new URL(answer.url()).pathname === "/api/v1/products");
    await page.getByRole("button", { name: /Send get request to/ }).click();
    const answer = await answered;
    assert.equal(answer.status(), 200, await answer.text());
    assert.equal(answer.request().headers().authorization, `Bearer ${key}`);
    assert.match(await answer.text(), /"Nimbus"/);
    await page.getByText("Nimbus").first().waitFor();
    await page.screenshot({ path: join(pictures, "answered.png") });
    at.faultless();
  }

  step("who may make no keys is offered none");
  const grace = await registered("Grace Hopper");
  const { inviteUrl } = await made("POST", `/teams/${ada.teamId}/members`, { token: ada.token, body: { email: grace.email, role: "member" } });
  await made("POST", "/auth/invitations/accept", { token: grace.token, body: { token: new URL(inviteUrl).searchParams.get("token") } });
  await made("DELETE", `/teams/${grace.teamId}`, { token: grace.token });
  const member = await person("grace");
  member.forgives(PROBE);
  await member.signIn(grace);
  await member.visit("/api/docs");
  await member.page.waitForLoadState("networkidle");
  assert.equal(await member.page.getByRole("button", { name: /^Use my key/ }).isVisible(), false);
});
