// What is common to the pages of webhooks: which events there are, and how things are called.

import { type Delivery, DeliveryStatus, type Webhook, WebhookStatus } from "../../gen/paperkey/webhook/v1/webhook_pb";
import { href } from "../../lib/router.svelte";

interface Group {
  label: string;
  events: string[];
}

const TEST: Group = { label: "For trying out", events: ["webhook.test"] };

const OF_PRODUCTS: Group[] = [
  {
    label: "Licences",
    events: ["license.created", "license.updated", "license.revoked", "license.reinstated", "license.expired"],
  },
  { label: "Activations", events: ["activation.created", "activation.removed"] },
  TEST,
];

const OF_TEAMS: Group[] = [
  { label: "API keys", events: ["api_key.created", "api_key.rotated", "api_key.revoked", "api_key.rotation_due"] },
  { label: "Quotas", events: ["quota.warning", "quota.exceeded"] },
  { label: "Alerts", events: ["alert.created"] },
  TEST,
];

/** The events that an endpoint of a product may have, or one of the team where none is named. */
export const groupsOf = (productId: string): Group[] => (productId ? OF_PRODUCTS : OF_TEAMS);

/** The page of an endpoint. */
export const endpointHref = (id: string, productId: string | undefined): string =>
  href(productId ? `/products/${productId}/webhooks/${id}` : `/webhooks/${id}`);

/** The list that an endpoint of that product, or of the team, stands in. */
export const listHref = (productId: string): string => href(`/webhooks${productId ? `?product=${productId}` : ""}`);

/** Attempts that fail in a row until an endpoint is paused. */
export const MAX_FAILURES = 10;

/** Why an endpoint is as it is; empty where there is nothing to say. */
export function standing(webhook: Webhook): string {
  const failures = webhook.consecutiveFailures;
  if (webhook.status === WebhookStatus.PAUSED) {
    return failures >= MAX_FAILURES ? `${failures} attempts in a row failed` : "by hand, or its receiver said that it is gone";
  }
  return failures > 0 ? `${failures} of ${MAX_FAILURES} failures in a row` : "";
}

export type Tone = "plain" | "good" | "warn" | "bad";

export function deliveryState(delivery: Delivery): { label: string; tone: Tone } {
  if (delivery.status === DeliveryStatus.SUCCEEDED) return { label: "Succeeded", tone: "good" };
  if (delivery.status === DeliveryStatus.FAILED) return { label: "Failed", tone: "bad" };
  return delivery.attemptsCount > 0 ? { label: "Retrying", tone: "warn" } : { label: "Waiting", tone: "plain" };
}

const ERRORS: Record<string, string> = {
  timeout: "took longer than 5 seconds",
  dns: "the name does not resolve",
  address_not_allowed: "the address is not public",
  connect: "nobody accepts connections there",
  tls: "no trustworthy encrypted connection",
  http_status: "the answer was not 2xx",
  redirect: "the answer was a redirect, which is not followed",
  other: "the answer could not be read",
};

/** Why an attempt failed. */
export const errorText = (error: string | undefined): string => (error ? (ERRORS[error] ?? error) : "");

/** JSON as people read it; as it is where it is none. */
export function pretty(json: string): string {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}
