// What stands in fields, and what it means to the contract.

import type { JsonObject } from "@bufbuild/protobuf";
import type { Timestamp } from "@bufbuild/protobuf/wkt";

import { Problem, ask, dateOf, once, tenant, timestampOf } from "./api";
import { read } from "./metadata";

/** A day of a date field, such as `2030-01-31`: to its end, where the reader is. None where the field is empty. */
export function endOfDay(text: string): Timestamp | undefined {
  return text ? timestampOf(new Date(`${text}T23:59:59.999`)) : undefined;
}

/** The day of a moment, for a date field. */
export function dayOf(at: Timestamp | undefined): string {
  const date = dateOf(at);
  if (!date) return "";
  const two = (number: number): string => String(number).padStart(2, "0");
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`;
}

/** A whole number of a field; undefined where it is empty. */
export function whole(field: string, text: string | number | null): number | undefined {
  const trimmed = String(text ?? "").trim();
  if (!trimmed) return undefined;
  if (!/^\d{1,9}$/.test(trimmed)) throw new Problem("Some of it cannot be taken", "", { [field]: "must be a whole number" });
  return Number(trimmed);
}

/** The data of a metadata field; undefined where it is empty. */
export function metadataOf(text: string): JsonObject | undefined {
  const { data, error } = read(text);
  if (error) throw new Problem("Some of it cannot be taken", "", { metadata: error });
  return data && Object.keys(data).length > 0 ? data : undefined;
}

/** Failures that may hide a deed that was done, or that end: `UNREACHABLE` and no reason at all are no answer of ours. */
const UNSETTLED = ["", "UNREACHABLE", "DEADLINE", "UNAVAILABLE", "INTERNAL", "RATE_LIMITED"];

/** A deed that must be done once: who sends the same again because no answer came, sends it under the same key. */
export class Attempt {
  #options = once();
  #wanted = "";

  async run<W, T>(call: (wanted: W, options: { headers: HeadersInit }) => Promise<T>, wanted: NoInfer<W>): Promise<T> {
    // A key stands for one request: another one, or that of another team, is refused under it.
    const text = JSON.stringify([tenant, wanted], (_, value: unknown) => (typeof value === "bigint" ? String(value) : value));
    if (text !== this.#wanted) this.#renew(text);
    try {
      const answer = await ask(call(wanted, this.#options));
      this.#renew();
      return answer;
    } catch (thrown) {
      const problem = Problem.from(thrown);
      // A call that is still under way is a conflict to be asked for again; any other refusal is for good.
      if (!UNSETTLED.includes(problem.reason) && problem.retryAfter === null) this.#renew();
      throw problem;
    }
  }

  #renew(wanted = ""): void {
    this.#options = once();
    this.#wanted = wanted;
  }
}
