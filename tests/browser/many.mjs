// A list of a hundred thousand licences costs a page what one of fifty costs: one call for the next page, and no more
// rows on the screen than a page has.
import assert from "node:assert/strict";
import { made, registered, report, step, walk } from "./lib.mjs";

const LICENSES = Number(process.env.WALK_LICENSES ?? 100_000);
const AT_ONCE = 1_000;
/** How many batches are on their way at a time. */
const LANES = 2;
const ROWS_OF_A_PAGE = 50;

await walk(async ({ person }) => {
  const ada = await registered("Ada Lovelace");
  const { token } = ada;
  const product = await made("POST", "/products", { token, body: { name: "Nimbus" } });
  const other = await made("POST", "/products", { token, body: { name: "Stratus" } });
  const rare = await made("POST", "/licenses", { token, body: { productId: other.id, email: "rare@example.com" } });

  const began = performance.now();
  step(`${LICENSES} licences`);
  let next = 0;
  const lane = async () => {
    for (let first = next; first < LICENSES; first = next) {
      next += AT_ONCE;
      const licenses = Array.from({ length: Math.min(AT_ONCE, LICENSES - first) }, (_, at) => ({
        productId: product.id,
        email: `customer-${first + at}@example.com`,
      }));
      await made("POST", "/licenses/batch", { token, body: { licenses } });
    }
  };
  await Promise.all(Array.from({ length: LANES }, lane));
  report(`made within ${((performance.now() - began) / 1000).toFixed(1)} s`);
  const revoked = await made("GET", "/licenses?pageSize=1", { token });
  await made("POST", `/licenses/${revoked.licenses[0].id}/revoke`, { token, body: {} });

  step("the list");
  const at = await person("ada");
  const { page } = at;
  await at.signIn(ada);
  // The calls of the list alone: what else a page asks for is not what many licences would make more of.
  const isOfList = (call) => call.method() === "POST" && new URL(call.url()).pathname.endsWith("/ListLicenses");
  let calls = 0;
  page.on("request", (request) => {
    if (isOfList(request)) calls += 1;
  });
  const rows = async () => {
    await at.settled();
    const found = await page.getByRole("row").count();
    assert.ok(found <= ROWS_OF_A_PAGE + 1, `${found} rows`);
    return found - 1;
  };
  let expected = 0;
  /** Does something that asks for the list, and waits until it is answered and shown: that takes one call. One too many
   * that comes late is found by what is done next. */
  const takesOne = async (what, deed) => {
    const asked = page.waitForRequest(isOfList);
    const [request] = await Promise.all([asked, deed()]);
    await (await request.response()).finished();
    await at.settled();
    report(`${what}: ${calls} calls so far`);
    assert.equal(calls, ++expected, what);
  };
  // The page that one comes to first asks for licences too, and has by now.
  calls = 0;
  await takesOne("opening", () => at.enter("Licences"));
  assert.equal(await rows(), ROWS_OF_A_PAGE);
  const firstOf = async () => page.getByRole("row").nth(1).innerText();
  const seen = new Set([await firstOf()]);
  for (const number of [2, 3, 4]) {
    await takesOne(`page ${number}`, async () => {
      await at.button(/Older/).click();
      await page.getByText(`Page ${number}`, { exact: true }).waitFor();
    });
    assert.equal(await rows(), ROWS_OF_A_PAGE);
    seen.add(await firstOf());
  }
  assert.equal(seen.size, 4, "each page begins with another licence");
  await takesOne("back", async () => {
    await at.button(/Newer/).click();
    await page.getByText("Page 3", { exact: true }).waitFor();
  });
  await at.look("licences");

  step("filters, which stand in the address");
  const main = page.getByRole("main");
  await main.getByLabel("Filter by product").selectOption({ label: "Stratus" });
  await main.getByRole("row").filter({ hasText: "rare@example.com" }).waitFor();
  assert.equal(await rows(), 1);
  assert.match(page.url(), new RegExp(other.id));
  await at.look("of-a-product");
  await page.reload();
  await main.getByRole("row").filter({ hasText: "rare@example.com" }).waitFor();
  assert.equal(await rows(), 1);
  await at.visit("/app/licenses");
  await main.getByLabel("Filter by status").selectOption({ label: "Revoked" });
  await main.getByRole("row").filter({ hasText: "Revoked" }).waitFor();
  assert.equal(await rows(), 1);
  await at.visit("/app/licenses");
  // Not on the first page, where it would be seen without a search.
  const somewhere = Math.floor(LICENSES / 2);
  await main.getByLabel("Search licences").fill(`customer-${somewhere}@example.com`);
  await main.getByRole("row").filter({ hasText: `customer-${somewhere}@example.com` }).first().waitFor();
  assert.equal(await rows(), 1);
  assert.ok(rare.id);
});
