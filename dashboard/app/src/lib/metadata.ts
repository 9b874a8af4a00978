// The vendor's own data on a thing: a JSON object, written as text, and sent as a merge patch (RFC 7396).

import type { JsonObject, JsonValue } from "@bufbuild/protobuf";

/** The fullest that it may be, in bytes of JSON. */
const MOST = 16_384;

export const written = (data: JsonObject | undefined): string => (data && Object.keys(data).length > 0 ? JSON.stringify(data, null, 2) : "");

const isObject = (value: JsonValue | undefined): value is JsonObject =>
  typeof value === "object" && value !== null && !Array.isArray(value);

/** What the text says, or what is wrong with it. An empty one is no data. */
export function read(text: string): { data: JsonObject; error?: undefined } | { data?: undefined; error: string } {
  if (text.trim() === "") return { data: {} };
  let data: JsonValue;
  try {
    data = JSON.parse(text) as JsonValue;
  } catch (thrown) {
    return { error: `is not JSON: ${thrown instanceof Error ? thrown.message : "it cannot be read"}` };
  }
  if (!isObject(data)) return { error: 'must be a JSON object, such as {"plan": "pro"}' };
  if (new TextEncoder().encode(JSON.stringify(data)).length > MOST) return { error: "must be at most 16 KB of JSON" };
  return { data };
}

/** What turns the one into the other: what is gone is null. Undefined where nothing changes. */
export function patch(before: JsonObject, after: JsonObject): JsonObject | undefined {
  const changes: JsonObject = {};
  for (const name of Object.keys(before)) if (!Object.hasOwn(after, name)) changes[name] = null;
  for (const [name, value] of Object.entries(after)) {
    const old = Object.hasOwn(before, name) ? before[name] : undefined;
    if (isObject(old) && isObject(value)) {
      const inner = patch(old, value);
      if (inner) changes[name] = inner;
    } else if (JSON.stringify(old) !== JSON.stringify(value)) {
      changes[name] = value;
    }
  }
  return Object.keys(changes).length > 0 ? changes : undefined;
}
