// How values are written for people.

import type { Timestamp } from "@bufbuild/protobuf/wkt";

import { dateOf } from "./api";

const relative = new Intl.RelativeTimeFormat("en", { numeric: "auto" });
const full = new Intl.DateTimeFormat("en", { dateStyle: "medium", timeStyle: "medium" });
const day = new Intl.DateTimeFormat("en", { dateStyle: "medium" });
const number = new Intl.NumberFormat("en");

const UNITS: [Intl.RelativeTimeFormatUnit, number][] = [
  ["year", 31_557_600],
  ["month", 2_629_800],
  ["day", 86_400],
  ["hour", 3_600],
  ["minute", 60],
];

/** Such as `3 minutes ago`, or `in 2 days`. */
export function ago(at: Timestamp | undefined, now = Date.now()): string {
  const date = dateOf(at);
  if (!date) return "never";
  const seconds = (date.getTime() - now) / 1000;
  for (const [unit, length] of UNITS) {
    if (Math.abs(seconds) >= length) return relative.format(Math.trunc(seconds / length), unit);
  }
  return seconds > 5 ? "in a moment" : "just now";
}

export const moment = (at: Timestamp | undefined): string => {
  const date = dateOf(at);
  return date ? full.format(date) : "–";
};

export const date = (at: Timestamp | undefined): string => {
  const found = dateOf(at);
  return found ? day.format(found) : "–";
};

export const count = (value: number | bigint): string => number.format(value);

export const milliseconds = (value: number | bigint): string =>
  Number(value) < 1000 ? `${value} ms` : `${(Number(value) / 1000).toFixed(1)} s`;

/** An amount in minor units, such as `49.00 EUR`. */
export function money(amount: bigint, currency: string): string {
  try {
    const format = new Intl.NumberFormat("en", { style: "currency", currency });
    const digits = format.resolvedOptions().maximumFractionDigits ?? 2;
    return format.format(Number(amount) / 10 ** digits);
  } catch {
    return `${amount} ${currency}`;
  }
}
