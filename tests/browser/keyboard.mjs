// Without a mouse: the palette finds and goes there; a dialog is reached, filled, left, and gives the focus back.
import assert from "node:assert/strict";
import { made, registered, step, walk } from "./lib.mjs";

await walk(async ({ person }) => {
  const ada = await registered("Ada Lovelace");
  const names = ["Nimbus", "Stratus", "Cirrus"];
  const products = {};
  for (const name of names) products[name] = await made("POST", "/products", { token: ada.token, body: { name } });
  const license = await made("POST", "/licenses", { token: ada.token, body: { productId: products.Cirrus.id, email: "customer@example.com" } });
  const at = await person("ada");
  const { page } = at;
  const dialog = at.dialog();
  const press = async (...keys) => {
    for (const key of keys) await page.keyboard.press(key);
  };
  const focused = () =>
    page.evaluate(() => {
      const element = document.activeElement;
      const label = element.labels?.[0]?.textContent ?? element.getAttribute("aria-label") ?? element.textContent;
      const role = element.getAttribute("role") ?? element.tagName.toLowerCase();
      return { role, label: label.trim().replaceAll(/\s+/g, " "), inDialog: Boolean(element.closest("dialog, [role=dialog]")) };
    });
  /** Whether it can be seen where the focus is. */
  const marked = () =>
    page.evaluate(() => {
      const { outlineStyle, outlineWidth, boxShadow } = getComputedStyle(document.activeElement);
      return (outlineStyle !== "none" && parseFloat(outlineWidth) > 0) || boxShadow !== "none";
    });
  const tabTo = async (label, role = "", most = 80) => {
    const passed = [];
    for (let pressed = 0; pressed < most; pressed++) {
      await press("Tab");
      const now = await focused();
      passed.push(now.label);
      if (label.test(now.label) && (!role || now.role === role)) return passed;
    }
    return assert.fail(`Tab does not come to ${label}: ${passed.join(" | ")}`);
  };

  step("signing in");
  await at.visit("/app/sign-in");
  await tabTo(/^Email/);
  await page.keyboard.type(ada.email);
  await tabTo(/^Password/);
  await page.keyboard.type(ada.password);
  await press("Enter");
  await at.isIn();

  step("the palette finds a product, and goes there");
  await press("Control+k");
  await dialog.waitFor();
  assert.equal((await focused()).inDialog, true);
  await page.keyboard.type("strat");
  await dialog.getByText("Stratus").first().waitFor();
  await at.look("palette");
  await press("Enter");
  await page.waitForURL(`**/app/products/${products.Stratus.id}`);
  await dialog.waitFor({ state: "detached" });
  await page.getByRole("heading", { level: 1, name: "Stratus" }).waitFor();

  step("it finds pages, and things by their ids");
  await press("Control+k");
  await dialog.waitFor();
  await page.keyboard.type("audit");
  await dialog.getByText("Audit log").first().waitFor();
  await press("Enter");
  await page.waitForURL("**/app/audit-log");
  await press("Control+k");
  await dialog.waitFor();
  await page.keyboard.type(license.id);
  await dialog.getByText(license.id).first().waitFor();
  await press("Enter");
  await page.waitForURL(`**/app/licenses/${license.id}`);
  await at.settled();

  step("Escape closes it, and the focus is where it was");
  await at.visit("/app/products");
  await at.button("Create product").first().focus();
  await press("Control+k");
  await dialog.waitFor();
  await press("Escape");
  await dialog.waitFor({ state: "detached" });
  assert.match((await focused()).label, /^Create product/);

  step("the first stop of a page leads past its doors");
  await at.visit("/app/products");
  await press("Tab");
  assert.match((await focused()).label, /^Skip/);
  await press("Enter");
  assert.equal(await page.evaluate(() => document.activeElement.id), "main");

  step("a dialog: everything in it is reached, and nothing behind it");
  await tabTo(/^Create product/);
  assert.ok(await marked(), "it can be seen where the focus is");
  await press("Enter");
  await dialog.waitFor();
  const inside = await dialog.evaluate(
    (dialog) => [...dialog.querySelectorAll("a[href], button, input, select, textarea")].filter((one) => !one.disabled && one.checkVisibility()).length,
  );
  const stops = new Set();
  for (let pressed = 0; pressed < inside * 2 + 2; pressed++) {
    const now = await focused();
    // Past the last stop is what the browser has around the page: then nothing of the page has the focus.
    assert.ok(now.inDialog || now.role === "body", `the focus left the dialog for ${now.label}`);
    if (now.inDialog) stops.add(await page.evaluate(() => (document.activeElement.dataset.stop ??= String(Math.random()))));
    await press("Tab");
  }
  assert.ok(stops.size >= inside, `${stops.size} stops in a dialog of ${inside}`);
  await press("Escape");
  await dialog.waitFor({ state: "detached" });
  assert.match((await focused()).label, /^Create product/, "the focus is where it was");

  step("a product is made with the keyboard alone");
  await press("Enter");
  await dialog.waitFor();
  if (!/^Product name/.test((await focused()).label)) await tabTo(/^Product name/);
  await page.keyboard.type("Altus");
  await press("Enter");
  await at.button("I have saved it").waitFor();
  await press("Escape");
  assert.ok(await dialog.isVisible(), "what is shown once is not closed by the way");
  await tabTo(/^I have saved it/);
  await press("Enter");
  await dialog.waitFor({ state: "detached" });

  step("tabs are turned with the arrows");
  await at.visit(`/app/products/${products.Nimbus.id}`);
  await tabTo(/^Overview$/, "tab");
  await press("ArrowRight");
  await page.getByRole("tab", { name: "Keys", exact: true, selected: true }).waitFor();
  await at.settled();
});
