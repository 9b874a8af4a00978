// Which page stands where, and who may see it. What a person's role does not open has no door: no link leads there, and
// the address shows that there is nothing.

import type { Component } from "svelte";

import type { Right } from "./lib/session.svelte";

export interface Route {
  /** Such as `/products/:id`; the parts that it names are given to the page. */
  path: string;
  page: () => Promise<{ default: Component<Record<string, string>> }>;
  right: Right;
}

type Loaded = Promise<{ default: Component<Record<string, string>> }>;
// Svelte's types tell pages apart by their properties; all of ours take text, or nothing.
const load = (page: Promise<unknown>): Loaded => page as Loaded;

export const routes: Route[] = [
  { path: "/", right: "read", page: () => load(import("./pages/Overview.svelte")) },
  { path: "/products", right: "read", page: () => load(import("./pages/Products.svelte")) },
  { path: "/products/:id", right: "read", page: () => load(import("./pages/Product.svelte")) },
  { path: "/products/:productId/webhooks/:id", right: "read", page: () => load(import("./pages/Webhook.svelte")) },
  { path: "/clients", right: "read", page: () => load(import("./pages/Clients.svelte")) },
  { path: "/clients/:id", right: "read", page: () => load(import("./pages/Client.svelte")) },
  { path: "/licenses", right: "read", page: () => load(import("./pages/Licenses.svelte")) },
  { path: "/licenses/:id", right: "read", page: () => load(import("./pages/License.svelte")) },
  { path: "/webhooks", right: "read", page: () => load(import("./pages/Webhooks.svelte")) },
  { path: "/webhooks/:id", right: "read", page: () => load(import("./pages/Webhook.svelte")) },
  { path: "/usage", right: "read", page: () => load(import("./pages/Usage.svelte")) },
  { path: "/alerts", right: "audit", page: () => load(import("./pages/Alerts.svelte")) },
  { path: "/audit-log", right: "audit", page: () => load(import("./pages/AuditLog.svelte")) },
  { path: "/settings/integrations", right: "keys", page: () => load(import("./pages/Integrations.svelte")) },
  { path: "/settings/api-keys", right: "keys", page: () => load(import("./pages/ApiKeys.svelte")) },
  { path: "/settings/members", right: "members", page: () => load(import("./pages/Members.svelte")) },
  { path: "/settings/team", right: "read", page: () => load(import("./pages/Team.svelte")) },
  { path: "/account", right: "self", page: () => load(import("./pages/Account.svelte")) },
];

export interface Entry {
  label: string;
  path: string;
  right: Right;
}

/** The doors, in their order. */
export const navigation: { label: string; entries: Entry[] }[] = [
  {
    label: "Sell",
    entries: [
      { label: "Overview", path: "/", right: "read" },
      { label: "Products", path: "/products", right: "read" },
      { label: "Licences", path: "/licenses", right: "read" },
      { label: "Clients", path: "/clients", right: "read" },
      { label: "Webhooks", path: "/webhooks", right: "read" },
    ],
  },
  {
    label: "Watch",
    entries: [
      { label: "Usage", path: "/usage", right: "read" },
      { label: "Alerts", path: "/alerts", right: "audit" },
      { label: "Audit log", path: "/audit-log", right: "audit" },
    ],
  },
  {
    label: "Settings",
    entries: [
      { label: "Integrations", path: "/settings/integrations", right: "keys" },
      { label: "Members", path: "/settings/members", right: "members" },
      { label: "Team", path: "/settings/team", right: "read" },
    ],
  },
];
