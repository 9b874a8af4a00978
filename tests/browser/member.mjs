// Somebody who may only look: invited by the owner, with the link that the page shows where no mail is sent, they see
// what they may see, and neither a door nor a button nor an address nor the API gives them more.
import assert from "node:assert/strict";
import { call, made, registered, somebody, step, walk } from "./lib.mjs";

const CLOSED = ["/alerts", "/audit-log", "/settings/integrations", "/settings/api-keys", "/settings/members"];
const OPEN = ["/", "/products", "/licenses", "/clients", "/webhooks", "/usage", "/settings/team", "/account"];
/** What would change something. */
const DEEDS = /^(Create|Issue|Add|Invite|Import|Edit|Revoke|Reinstate|Delete|Pause|Resume|Send|Recover|Roll|Replay|Deactivate|Rename|Save)/;

await walk(async ({ person }) => {
  const ada = await registered("Ada Lovelace");
  const product = await made("POST", "/products", { token: ada.token, body: { name: "Nimbus" } });
  const license = await made("POST", "/licenses", { token: ada.token, body: { productId: product.id, email: "customer@example.com" } });
  const customer = await made("POST", "/api/v1/clients", { token: await keyOf(ada), body: { name: "Customer & Co" } });
  const webhook = await made("POST", `/products/${product.id}/webhooks`, {
    token: ada.token,
    body: { url: "https://example.com/hook", events: ["license.created"] },
  });

  step("the owner invites somebody");
  const owner = await person("ada");
  const grace = somebody("Grace Hopper");
  await owner.signIn(ada);
  await owner.enter("Members");
  await owner.look("members");
  await owner.deed("Invite").click();
  const dialog = owner.dialog();
  await owner.field("Email", dialog).fill(grace.email);
  const role = owner.field("Role", dialog);
  if (await role.count()) await role.selectOption({ label: "Member" });
  else await dialog.getByRole("radio", { name: /^Member/ }).check();
  await owner.look("invite");
  await owner.button("Send invitation", dialog).click();
  const link = dialog.getByText(/\/app\/accept-invitation\?token=/).first();
  await link.waitFor();
  // The link shown is this installation's.
  const { pathname, search } = new URL(/https?:\S+\?token=[\w-]+/.exec(await link.innerText())[0]);
  await owner.look("invited");

  step("who is invited signs up, and accepts");
  const member = await person("grace");
  const { page } = member;
  await member.visit(pathname + search);
  await member.look("invitation");
  const signUp = page.getByRole("link", { name: /Create an account/ });
  await signUp.click();
  await member.settled();
  await member.signUp(grace);
  await page.getByText("Your keys").first().waitFor();
  await member.button("I have saved it").click();
  // The invitation is where it was left.
  await member.button("Accept invitation").click();
  const doors = page.getByRole("navigation", { name: "Pages" }).first();
  await doors.waitFor();
  await member.settled();
  await page.getByRole("button", { name: /^Team: / }).filter({ hasText: "Member" }).waitFor();

  step("no door leads where they may not go");
  const links = await doors.getByRole("link").evaluateAll((links) => links.map((link) => link.getAttribute("href")));
  for (const path of CLOSED) assert.ok(!links.includes(`/app${path}`), `${path} has a door`);
  assert.ok(links.includes("/app/products") && links.includes("/app/licenses"), links.join(" "));

  step("no address leads there either");
  for (const path of CLOSED) {
    await member.visit(`/app${path}`);
    await page.getByText(/There is nothing|not found|nothing here/i).first().waitFor();
  }
  await member.look("closed");

  step("what they may see has no buttons that change anything");
  const things = [
    `/products/${product.id}`,
    `/licenses/${license.id}`,
    `/clients/${customer.id}`,
    `/products/${product.id}/webhooks/${webhook.id}`,
  ];
  const tabs = things.flatMap((path) => ["", "?tab=keys", "?tab=webhooks", "?tab=settings", "?tab=licences"].map((tab) => path + tab));
  for (const path of [...OPEN.filter((path) => path !== "/account"), ...tabs]) {
    await member.visit(`/app${path}`);
    const buttons = page.getByRole("main").getByRole("button");
    const names = await buttons.evaluateAll((all) => all.map((one) => one.getAttribute("aria-label") ?? one.textContent.trim()));
    const deeds = names.filter((name) => DEEDS.test(name));
    assert.deepEqual(deeds, [], path);
    assert.equal(await page.getByRole("alert").count(), 0, `${path}: something failed`);
    if (!path.includes("?")) await member.look(`may-see${path.replaceAll(/_\w+/g, "").replaceAll("/", "-")}`);
  }

  step("the API refuses them too");
  const { token } = await made("POST", "/auth/login", { body: { email: grace.email, password: grace.password } });
  const ofTheTeam = { "paperkey-team": ada.teamId };
  const asked = [
    ["POST", "/products", { name: "Mine" }],
    ["POST", "/licenses", { productId: product.id }],
    ["POST", `/licenses/${license.id}/revoke`, {}],
    ["GET", `/teams/${ada.teamId}/api-keys`],
    ["POST", `/teams/${ada.teamId}/api-keys`, { name: "Mine" }],
    ["POST", `/teams/${ada.teamId}/api-keys/temporary`, {}],
    ["POST", `/teams/${ada.teamId}/members`, { email: "other@example.com", role: "owner" }],
    ["GET", `/teams/${ada.teamId}/audit-logs`],
    ["DELETE", `/teams/${ada.teamId}`],
  ];
  for (const [method, path, body] of asked) {
    const { status, text } = await call(method, path, { token, body, headers: ofTheTeam });
    assert.equal(status, 403, `${method} ${path}: ${status} ${text}`);
  }
  const may = await call("GET", "/products", { token, headers: ofTheTeam });
  assert.equal(may.status, 200, may.text);
});

async function keyOf({ token, teamId }) {
  const { key } = await made("POST", `/teams/${teamId}/api-keys`, { token, body: { name: "Preparing" } });
  return key;
}
