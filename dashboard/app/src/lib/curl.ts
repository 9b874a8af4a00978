// Calls written as commands that run as they stand, for this very host.

import { tenant } from "./api";

const quoted = (text: string): string => `'${text.replaceAll("'", `'\\''`)}'`;

/** What stands for a key of the team where none can be shown: keys are kept as hashes. */
export const yourKey = (): string => (tenant.test ? "$PAPERKEY_TEST_KEY" : "$PAPERKEY_API_KEY");

/** Such as `curl https://…/api/v1/products -H "Authorization: Bearer $PAPERKEY_API_KEY"`. */
export function curl(method: "GET" | "POST", path: string, bearer: string, body?: unknown): string {
  const lines = [`curl ${method === "GET" || body !== undefined ? "" : `-X ${method} `}${location.origin}${path}`];
  lines.push(`-H "Authorization: Bearer ${bearer}"`);
  if (body !== undefined) lines.push(`-H "Content-Type: application/json"`, `-d ${quoted(JSON.stringify(body))}`);
  return lines.join(" \\\n  ");
}
