// The call by which an app checks a licence, as it can be run at a prompt.

import { ask, productKeys } from "../../lib/api";

/** The public key of a product's newest pair; none where all are revoked. */
export async function publicKeyOf(productId: string): Promise<string | null> {
  let pageToken = "";
  do {
    const page = await ask(productKeys.listProductApiKeys({ productId, pageSize: 100, pageToken }));
    const newest = page.apiKeys.find((pair) => !pair.revokedAt);
    if (newest) return newest.publicKey;
    pageToken = page.nextPageToken ?? "";
  } while (pageToken);
  return null;
}

export const validateCall = (publicKey: string, licenseKey: string): string =>
  [
    `curl -X POST ${location.origin}/v1/licenses/validate \\`,
    `  -H "Authorization: Bearer ${publicKey}" \\`,
    `  -H "Content-Type: application/json" \\`,
    `  -d '{"license_key": "${licenseKey}"}'`,
  ].join("\n");
