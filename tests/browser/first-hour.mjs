// The first hour of an owner: from signing up, through a product and a licence that a customer's app validates, a webhook
// that is seen arriving, and a key that is used and taken back, to signing out. Commands that a page shows are read from
// the page and run as they stand. Called with `light` or `dark`, and the width of the window.
import assert from "node:assert/strict";
import { base, bash, receiver, screen, somebody, step, walk } from "./lib.mjs";

/** What a token of a key looks like. */
const TOKEN = /\bp[kb]_(?:live|test)_[A-Za-z0-9_-]{8,}/;

await walk(async ({ person }) => {
  const ada = somebody();
  const at = await person("ada", screen);
  const { page } = at;
  const dialog = at.dialog();

  step("signing up");
  await at.visit("/app/");
  await at.look("sign-in");
  await page.getByRole("link", { name: "Create an account" }).click();
  await at.settled();
  await at.look("sign-up");
  await at.signUp(ada);
  await page.getByText("Your keys").first().waitFor();
  await at.look("your-keys");
  const shown = await page.locator("body").innerText();
  assert.match(shown, /\bpk_free_\w+/);
  assert.match(shown, /\bpb_live_\w+/);
  await at.button("I have saved it").click();
  await at.isIn();
  assert.doesNotMatch(await page.content(), /pb_live_\w{20,}/, "a key is shown once");
  await at.look("overview-empty");

  step("a product");
  await at.enter("Products");
  await at.look("products-empty");
  await at.deed("Create product").click();
  await at.field("Product name", dialog).fill("Nimbus");
  await at.look("create-product");
  await at.button("Create product", dialog).click();
  await at.button("I have saved it").waitFor();
  const pair = await dialog.innerText();
  assert.match(pair, /\bpk_\w+/);
  assert.match(pair, /\bsk_\w+/);
  await at.look("product-keys");
  await at.button("I have saved it").click();
  await dialog.waitFor({ state: "detached" });
  await at.enter("Products");
  await page.getByRole("link", { name: "Nimbus" }).waitFor();
  await at.look("products");

  step("a licence");
  await at.enter("Licences");
  await at.look("licences-empty");
  await at.deed("Issue licence").click();
  await at.field("Product", dialog).selectOption({ label: "Nimbus" });
  await at.field("Email", dialog).fill("customer@example.com");
  await at.field("Machines", dialog).fill("3");
  await at.look("issue-licence");
  await at.button("Issue licence", dialog).click();
  await dialog.getByText("Licence issued").waitFor();
  await at.look("licence-issued");
  await at.deed("Open licence", dialog).click();
  await page.waitForURL(/\/app\/licenses\/lic_/);
  await at.settled();
  await at.look("licence");

  step("the command that the page shows says that the licence is valid");
  const validate = page.getByRole("region", { name: "Validate it" });
  const command = await validate.locator("pre").innerText();
  const verdict = JSON.parse(await bash(command.replace(/^curl /, "curl -sS ")));
  assert.equal(verdict.valid, true, JSON.stringify(verdict));

  step("a webhook");
  await at.enter("Products");
  await page.getByRole("link", { name: "Nimbus" }).first().click();
  await at.settled();
  await page.getByRole("tab", { name: "Webhooks", exact: true }).click();
  await at.settled();
  await at.look("product-webhooks-empty");
  await at.deed("Add endpoint").click();
  await dialog.waitFor();
  await at.field("Endpoint URL", dialog).fill(receiver);
  for (const event of ["license.created", "license.revoked"]) {
    const box = dialog.getByRole("checkbox", { name: event, exact: true });
    if (!(await box.isChecked())) await box.check();
  }
  await at.look("add-endpoint");
  await at.button("Add endpoint", dialog).click();
  await at.button("I have saved it").waitFor();
  assert.match(await dialog.innerText(), /whsec_[\w+/]{40,}/);
  await at.look("webhook-secret");
  await at.button("I have saved it").click();
  await dialog.waitFor({ state: "detached" });
  await at.settled();

  step("a delivery is seen arriving, without loading anything anew");
  await page.waitForURL(/\/webhooks\/wh_/);
  await at.look("webhook-empty");
  await page.getByRole("tab", { name: "Live", exact: true }).click();
  await at.settled();
  await page.evaluate(() => (window.notLoadedAnew = true));
  await at.deed("Send test event").click();
  const happening = page.getByRole("list", { name: "Events" }).getByRole("listitem").first();
  await happening.getByText(/\b200\b/).waitFor();
  assert.equal(await page.evaluate(() => window.notLoadedAnew), true);
  await at.look("webhook-live");
  await page.getByRole("tab", { name: "Deliveries", exact: true }).click();
  await at.settled();
  await page.getByRole("tabpanel").getByText(/\b200\b/).first().waitFor();
  await at.look("webhook-deliveries");

  step("a key");
  await at.enter("Integrations");
  await at.look("integrations");
  await page.getByRole("main").getByRole("link", { name: /^API keys/i }).click();
  await page.waitForURL(/\/app\/settings\/api-keys/);
  await at.settled();
  await at.look("api-keys");
  await at.deed("Create API Key").click();
  await at.field("Key name", dialog).fill("Backend");
  await dialog.getByRole("radio", { name: /^Read & Write/ }).check();
  await at.look("create-key");
  await at.button("Create key", dialog).click();
  await at.button("I have saved it").waitFor();
  await at.look("key-once");
  const inDialog = await dialog.innerText();
  const token = TOKEN.exec(inDialog)?.[0];
  assert.ok(token, inDialog);
  await dialog.getByRole("button", { name: /^Copy / }).first().click();
  const copied = await page.evaluate(() => navigator.clipboard.readText());
  assert.equal(copied.trim(), token, "what is copied is the token");
  const curl = /curl [\s\S]*Bearer[^"]*"/.exec(inDialog)?.[0];
  assert.ok(curl?.includes(`${base}/api/v1/products`), `a command for this host: ${inDialog}`);
  await at.button("I have saved it").click();
  await dialog.waitFor({ state: "detached" });
  assert.ok(!(await page.content()).includes(token), "a token is shown once");

  step("the key is used");
  const asked = curl.replace(/^curl /, "curl -sS -w '\\n%{http_code}' ");
  const [list, status] = (await bash(asked)).split(/\n(?=\d+$)/);
  assert.equal(status, "200", list);
  assert.match(list, /"Nimbus"/);

  step("the key is taken back, and refused");
  const row = page.getByRole("row").filter({ hasText: "Backend" });
  await row.getByRole("button").last().click();
  await at.look("key-menu");
  await page.getByRole("menuitem", { name: "Revoke" }).click();
  await dialog.waitFor();
  await at.look("revoke-key");
  await dialog.getByRole("button", { name: /^Revoke/ }).click();
  await dialog.waitFor({ state: "detached" });
  await at.settled();
  await at.look("key-revoked");
  const after = await bash(asked);
  assert.match(after, /\n401$/, after);

  step("what happened is in the audit log");
  await at.enter("Audit log");
  await page.getByRole("main").getByRole("row").filter({ hasText: "RevokeApiKey" }).first().waitFor();
  await at.look("audit-log");

  step("signing out");
  await at.signOut();
  await at.look("signed-out");
  await at.visit("/app/products");
  await page.getByLabel("Password", { exact: true }).waitFor();
});
