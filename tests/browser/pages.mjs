// Every page, with something on it: pictures of all, and what axe says of them. Called with `light` or `dark`, and the
// width of the window.
import { call, made, receiver, registered, screen, step, walk } from "./lib.mjs";

await walk(async ({ person }) => {
  step("things to see");
  const ada = await registered("Ada Lovelace");
  const { token, teamId } = ada;
  const { key } = await made("POST", `/teams/${teamId}/api-keys`, { token, body: { name: "Backend" } });
  await made("POST", `/teams/${teamId}/api-keys`, { token, body: { name: "Reader", scope: "read_only", mode: "test" } });
  const product = await made("POST", "/products", {
    token,
    body: { name: "Nimbus", description: "Clouds, as a library", sku: "NIM-1", price: { amount: 4900, currency: "EUR" } },
  });
  const client = await made("POST", "/api/v1/clients", { token: key, body: { name: "Grace Hopper", email: "grace@example.com", company: "Navy" } });
  const webhook = await made("POST", `/products/${product.id}/webhooks`, { token, body: { url: receiver, events: ["license.created", "license.revoked"] } });
  await made("POST", `/teams/${teamId}/webhooks`, { token, body: { url: receiver, events: ["api_key.created"] } });
  const licenses = [];
  for (let at = 0; at < 12; at++) {
    licenses.push(
      await made("POST", "/licenses", {
        token,
        body: { productId: product.id, clientId: at % 3 ? undefined : client.id, email: `customer-${at}@example.com`, maxActivations: 3, metadata: { order: `A-${at}` } },
      }),
    );
  }
  const [license] = licenses;
  await made("POST", `/licenses/${licenses[1].id}/revoke`, { token, body: {} });
  for (const machine of ["one", "two"]) {
    await made("POST", "/v1/licenses/activate", { token: product.apiKey.publicKey, body: { license_key: license.key, fingerprint: machine, name: "MacBook Pro" } });
  }
  await made("POST", `/teams/${teamId}/members`, { token, body: { email: "invited@example.com", role: "manager" } });
  await call("POST", "/v1/licenses/validate", { token: product.apiKey.publicKey, body: { license_key: license.key } });

  const within = [
    ["", "overview"],
    ["/products", "products"],
    [`/products/${product.id}`, "product"],
    ...["keys", "licences", "webhooks", "settings"].map((tab) => [`/products/${product.id}?tab=${tab}`, `product-${tab}`]),
    ["/licenses", "licences"],
    [`/licenses/${license.id}`, "licence"],
    [`/licenses/${licenses[1].id}`, "licence-revoked"],
    ["/clients", "clients"],
    [`/clients/${client.id}`, "client"],
    ["/webhooks", "webhooks"],
    [`/products/${product.id}/webhooks/${webhook.id}`, "webhook"],
    ...["live", "settings"].map((tab) => [`/products/${product.id}/webhooks/${webhook.id}?tab=${tab}`, `webhook-${tab}`]),
    ["/usage", "usage"],
    ["/alerts", "alerts"],
    ["/audit-log", "audit-log"],
    ["/settings/integrations", "integrations"],
    ["/settings/api-keys", "api-keys"],
    ["/settings/members", "members"],
    ["/settings/team", "team"],
    ["/account", "account"],
    ["/no-such-page", "nothing"],
  ];
  const outside = [
    ["/app/sign-in", "sign-in"],
    ["/app/sign-up", "sign-up"],
    ["/app/forgot-password", "forgot-password"],
    ["/app/reset-password?token=none", "reset-password"],
    ["/app/accept-invitation?token=none", "accept-invitation"],
    ["/", "front"],
    ["/pricing", "pricing"],
    ["/docs/", "docs"],
    ["/docs/errors/not_found", "error"],
  ];
  step("who is not signed in");
  const at = await person("ada", screen);
  at.forgives(/Failed to load resource: the server responded with a status of 404/);
  for (const [path, name] of outside) {
    await at.visit(path);
    await at.look(name);
  }
  step("who is");
  await at.signIn(ada);
  for (const [path, name] of within) {
    await at.visit(`/app${path}`);
    await at.look(name);
  }
  if (screen.width < 1024) {
    await at.doors();
    await at.look("doors");
  }
});
