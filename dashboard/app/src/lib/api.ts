// The calls of the contract, over gRPC-Web to where the page came from.
//
// Who calls is told by a cookie that no script can read. Which team and mode a call is for stands in its headers.

import { timestampDate, timestampFromDate, type Timestamp } from "@bufbuild/protobuf/wkt";
import { Code, ConnectError, createClient, type Interceptor } from "@connectrpc/connect";
import { createGrpcWebTransport } from "@connectrpc/connect-web";

import { BadRequestSchema, ErrorInfoSchema, RequestInfoSchema, RetryInfoSchema } from "../gen/google/rpc/error_details_pb";
import { AlertService } from "../gen/paperkey/auth/v1/alerts_pb";
import { AuditLogService } from "../gen/paperkey/auth/v1/audit_pb";
import { AuthService, ProductApiKeyService } from "../gen/paperkey/auth/v1/auth_pb";
import { ApiKeyService } from "../gen/paperkey/auth/v1/keys_pb";
import { MemberService, TeamService } from "../gen/paperkey/auth/v1/teams_pb";
import { UsageService } from "../gen/paperkey/auth/v1/usage_pb";
import { CatalogService } from "../gen/paperkey/catalog/v1/catalog_pb";
import { ClientService } from "../gen/paperkey/catalog/v1/clients_pb";
import { LicensingService } from "../gen/paperkey/licensing/v1/licensing_pb";
import { WebhookService } from "../gen/paperkey/webhook/v1/webhook_pb";

/** Which team and mode calls are for; `lib/session` keeps it. */
export const tenant: { teamId: string; test: boolean } = { teamId: "", test: false };

/** Called when the session is over. */
export const onSignedOut: { call: () => void } = { call: () => {} };

const headers: Interceptor = (next) => async (request) => {
  for (const [name, value] of Object.entries(restHeaders())) request.header.set(name, value);
  // Sessions are given as cookies, wherever one is made.
  request.header.set("Paperkey-Session", "cookie");
  return next(request);
};

const transport = createGrpcWebTransport({ baseUrl: location.origin, interceptors: [headers] });

export const alerts = createClient(AlertService, transport);
export const audit = createClient(AuditLogService, transport);
export const auth = createClient(AuthService, transport);
export const clients = createClient(ClientService, transport);
export const keys = createClient(ApiKeyService, transport);
export const licensing = createClient(LicensingService, transport);
export const members = createClient(MemberService, transport);
export const productKeys = createClient(ProductApiKeyService, transport);
export const products = createClient(CatalogService, transport);
export const teams = createClient(TeamService, transport);
export const usage = createClient(UsageService, transport);
export const webhooks = createClient(WebhookService, transport);

/** Why a call failed, as a person should read it. */
export class Problem {
  constructor(
    /** In one sentence. */
    readonly message: string,
    /** The reason of the catalogue, such as `NOT_FOUND`; empty where there was no answer. */
    readonly reason: string,
    /** What is wrong with which field, by its name in the contract. */
    readonly fields: Record<string, string> = {},
    /** The page of the error. */
    readonly docs: string | null = null,
    /** `req_…` */
    readonly requestId: string | null = null,
    /** When it makes sense to ask again, in seconds. */
    readonly retryAfter: number | null = null,
  ) {}

  /** What is said of a field, whichever of its names is asked for: `maxActivations` is `max_activations`. */
  of(field: string): string | undefined {
    const snake = field.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
    return this.fields[field] ?? this.fields[snake];
  }

  /** Reads whatever was thrown. */
  static from(thrown: unknown): Problem {
    if (thrown instanceof Problem) return thrown;
    if (!(thrown instanceof ConnectError)) {
      return new Problem(thrown instanceof Error ? thrown.message : "Something went wrong in this page", "");
    }
    const error = ConnectError.from(thrown);
    const info = error.findDetails(ErrorInfoSchema)[0];
    const fields: Record<string, string> = {};
    for (const bad of error.findDetails(BadRequestSchema)) {
      for (const { field, description } of bad.fieldViolations) fields[field] = description;
    }
    const delay = error.findDetails(RetryInfoSchema)[0]?.retryDelay;
    const requestId = error.findDetails(RequestInfoSchema)[0]?.requestId ?? error.metadata.get("x-request-id");
    const code = info?.metadata["code"];
    if (!info && (error.code === Code.Unknown || error.code === Code.Unavailable) && !requestId) {
      return new Problem("The server could not be reached. Check your connection, then try again.", "UNREACHABLE");
    }
    return new Problem(
      error.rawMessage || "The call failed",
      info?.reason ?? "",
      fields,
      code ? `/docs/errors/${code}` : null,
      requestId || null,
      delay ? Math.ceil(Number(delay.seconds) + delay.nanos / 1e9) : null,
    );
  }
}

/** What a call has failed with. Whoever is not signed in any more is shown where to sign in. */
export function failed(thrown: unknown): Problem {
  const problem = Problem.from(thrown);
  if (problem.reason === "INVALID_CREDENTIALS") onSignedOut.call();
  return problem;
}

/** Runs a call, and throws a [`Problem`] where it fails. */
export async function ask<T>(call: Promise<T>): Promise<T> {
  try {
    return await call;
  } catch (thrown) {
    throw failed(thrown);
  }
}

/** A key for a call that must take effect once. */
export function once(): { headers: HeadersInit } {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return { headers: { "Idempotency-Key": Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("") } };
}

/** Which team and mode a call is for: the headers of each, also of REST calls, which file uploads are. */
export function restHeaders(): Record<string, string> {
  const set: Record<string, string> = {};
  if (tenant.teamId) set["Paperkey-Team"] = tenant.teamId;
  if (tenant.test) set["Paperkey-Mode"] = "test";
  return set;
}

export const dateOf = (at: Timestamp | undefined): Date | null => (at ? timestampDate(at) : null);
export const timestampOf = (at: Date | null): Timestamp | undefined => (at ? timestampFromDate(at) : undefined);
