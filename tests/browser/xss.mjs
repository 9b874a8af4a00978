// What people write is text. Markup stands in every name, address and note that the API takes, and in what a client says
// of itself; every page is then opened, and none of it may be anything but letters on the screen.
import assert from "node:assert/strict";
import { base, call, made, receiver, registered, report, step, walk } from "./lib.mjs";

const IMAGE = "<img src=x onerror=alert(1)>";
const SCRIPT = '"><script>alert(1)</script>';
const LINK = "javascript:alert(1)";
const TURNED = "abc\u202Egpj.exe\u202C";
const TEMPLATE = "{{constructor.constructor('alert(1)')()}}${alert(1)}";
const ALL = [IMAGE, SCRIPT, LINK, TURNED, TEMPLATE, `'-alert(1)-'</title></textarea><svg onload=alert(1)>`];
const AGENT = `Mozilla/5.0 ${IMAGE}${SCRIPT}`;

await walk(async ({ person }) => {
  step("markup in everything that is taken");
  const headers = { "user-agent": AGENT };
  const mallory = await registered(`Mallory ${IMAGE}`, headers);
  const { token, teamId } = mallory;
  const taken = { token, headers };
  const refused = [];
  // What is refused cannot be shown.
  const tried = async (method, path, body, more = {}) => {
    const { status, json, text } = await call(method, path, { token: more.token ?? token, body, headers: { ...headers, ...more.headers } });
    assert.ok(status < 500, `${method} ${path}: ${status} ${text}`);
    if (status >= 300) refused.push(`${status} ${path} ${JSON.stringify(body).slice(0, 80)}`);
    return status < 300 ? json : null;
  };
  await tried("PATCH", `/teams/${teamId}`, { name: `Team ${IMAGE}` });
  const products = [];
  for (const text of ALL) {
    products.push(
      await tried("POST", "/products", { name: text, description: text, sku: text, unit: text.slice(0, 50), metadata: { [text]: text } }),
    );
  }
  const product = products.find(Boolean);
  assert.ok(product, refused.join("\n"));
  const { key } = await made("POST", `/teams/${teamId}/api-keys`, { ...taken, body: { name: `Key ${IMAGE}` } });
  for (const text of ALL) await tried("POST", `/teams/${teamId}/api-keys`, { name: text });
  const clients = [];
  for (const text of ALL) {
    clients.push(await tried("POST", "/api/v1/clients", { name: text, company: text, metadata: { [text]: text } }, { token: key }));
  }
  const client = clients.find(Boolean);
  await tried("POST", "/api/v1/clients", { name: "An address", email: `"${IMAGE}"@example.com` }, { token: key });
  const license = await made("POST", "/licenses", {
    ...taken,
    body: { productId: product.id, clientId: client?.id, email: "customer@example.com", maxActivations: 20, metadata: Object.fromEntries(ALL.map((text, at) => [`${at} ${text}`, text])) },
  });
  await tried("POST", "/licenses", { productId: product.id, email: `"${IMAGE}"@example.com` });
  const { publicKey } = product.apiKey;
  for (const text of ALL) {
    await tried("POST", "/v1/licenses/activate", { license_key: license.key, fingerprint: text, name: text }, { token: publicKey });
  }
  const urls = [LINK, `${receiver}?q=<script>alert(1)</script>`, `${receiver}?${encodeURIComponent(IMAGE)}`, `${receiver}#"onclick="alert(1)`, `data:text/html,${SCRIPT}`];
  const webhooks = [];
  for (const url of urls) {
    webhooks.push(await tried("POST", `/products/${product.id}/webhooks`, { url, events: ["license.created", "license.updated"] }));
    await tried("POST", `/teams/${teamId}/webhooks`, { url, events: ["api_key.created"] });
  }
  assert.ok(!webhooks[0] && !webhooks[4], "only addresses of the web are taken");
  const webhook = webhooks.find(Boolean);
  assert.ok(webhook, refused.join("\n"));
  await tried("PATCH", `/licenses/${license.id}`, { metadata: { [IMAGE]: SCRIPT } });
  await tried("POST", `/products/${product.id}/webhooks/${webhook.id}/test`, {});
  await tried("POST", `/teams/${teamId}/members`, { email: `"${IMAGE}"@example.com`, role: "member" });
  await tried("POST", `/teams/${teamId}/members`, { email: "img.src=x@example.com", role: "member" });
  const mate = await registered(`Trudy ${SCRIPT}`, headers);
  const { inviteUrl } = await made("POST", `/teams/${teamId}/members`, { ...taken, body: { email: mate.email, role: "admin" } });
  await made("POST", "/auth/invitations/accept", { token: mate.token, headers, body: { token: new URL(inviteUrl).searchParams.get("token") } });
  for (const line of refused) report(`refused: ${line}`);

  step("none of it runs, anywhere");
  const at = await person("mallory");
  const { page } = at;
  await at.signIn(mallory);
  const whole = async () => {
    const injected = await page.evaluate(() => ({
      images: document.querySelectorAll('img[src="x"]').length,
      scripts: [...document.scripts].filter((script) => !script.src && script.type !== "application/json").length,
      handlers: document.querySelectorAll("[onerror], [onload], [onclick]").length,
      links: [...document.querySelectorAll("a[href], [src], [action], [formaction]")]
        .flatMap((element) => ["href", "src", "action", "formaction"].map((name) => element.getAttribute(name)))
        .filter((value) => /^\s*(javascript|data:text)/i.test(value ?? "")),
    }));
    assert.deepEqual(injected, { images: 0, scripts: 0, handlers: 0, links: [] }, page.url());
    at.faultless();
  };
  const shows = async (text) => {
    // Also where it stands within a longer text, or in a field.
    await page
      .waitForFunction(
        (text) =>
          document.body.innerText.includes(text) ||
          [...document.querySelectorAll("input, textarea, option")].some((field) => (field.value + field.textContent).includes(text)),
        text,
      )
      .catch(() => assert.fail(`${page.url()} does not show ${text} as text`));
  };
  const open = async (path, ...texts) => {
    await at.visit(`/app${path}`);
    for (const text of texts) await shows(text);
    await whole();
  };
  await open("/");
  await open("/products", IMAGE, SCRIPT, LINK, TEMPLATE);
  await open(`/products/${product.id}`, IMAGE);
  for (const tab of ["keys", "licences", "webhooks", "settings"]) await open(`/products/${product.id}?tab=${tab}`, IMAGE);
  await open("/clients", IMAGE, SCRIPT, LINK);
  await open(`/clients/${client.id}`, client.name);
  await open("/licenses", "customer@example.com");
  await open(`/licenses?q=${encodeURIComponent(SCRIPT)}&product=${encodeURIComponent(IMAGE)}`);
  await open(`/licenses/${license.id}`, IMAGE, SCRIPT);
  await open("/webhooks");
  await open(`/products/${product.id}/webhooks/${webhook.id}`);
  for (const tab of ["live", "settings"]) await open(`/products/${product.id}/webhooks/${webhook.id}?tab=${tab}`);
  await open("/usage");
  await open("/alerts");
  await open("/settings/integrations");
  await open("/settings/api-keys", `Key ${IMAGE}`);
  await open("/settings/members", `Trudy ${SCRIPT}`);
  await open("/settings/team", `Team ${IMAGE}`);
  await open("/account", `Mallory ${IMAGE}`);

  step("the audit log shows what a client says of itself as text");
  await open("/audit-log?method=CreateProduct");
  await at.button("Details").first().click();
  await shows(AGENT);
  await whole();
  await at.look("audit-log");

  step("dialogs and the palette");
  await at.visit("/app/licenses");
  await at.button("Issue licence").first().click();
  await at.dialog().waitFor();
  await whole();
  await page.keyboard.press("Escape");
  await page.keyboard.press("Control+k");
  await page.getByRole("dialog").waitFor();
  await page.keyboard.type("<img");
  await shows(IMAGE);
  await whole();

  step("addresses that nobody has thought of, and the pages beside the dashboard");
  const visitor = await person("visitor");
  visitor.forgives(/Failed to load resource: the server responded with a status of 4\d\d/);
  const quoted = encodeURIComponent(SCRIPT);
  for (const path of [
    `/app/${quoted}`,
    `/app/sign-in?next=${encodeURIComponent(LINK)}`,
    `/app/sign-in?next=${encodeURIComponent("//evil.example/")}`,
    `/app/reset-password?token=${quoted}`,
    `/app/accept-invitation?token=${quoted}`,
    "/",
    "/docs/",
    `/docs/${quoted}`,
    "/docs/errors/",
    `/docs/errors/${quoted}`,
    "/pricing",
    `/${quoted}`,
    `/auth/${quoted}`,
  ]) {
    await visitor.page.goto(base + path);
    await visitor.page.waitForLoadState("networkidle");
    assert.equal(await visitor.page.locator('img[src="x"]').count(), 0, path);
    visitor.faultless();
  }

  step("who signs in is not led elsewhere by the address");
  for (const next of ["//evil.example/", "https://evil.example/", LINK, "\\\\evil.example"]) {
    const again = await person(`led-${next.length}`);
    await again.visit(`/app/sign-in?next=${encodeURIComponent(next)}`);
    await again.page.getByLabel("Email", { exact: true }).fill(mallory.email);
    await again.page.getByLabel("Password", { exact: true }).fill(mallory.password);
    await again.button("Sign in").click();
    await again.isIn();
    assert.equal(new URL(again.page.url()).origin, base, next);
    again.faultless();
    await again.context.close();
  }
});
