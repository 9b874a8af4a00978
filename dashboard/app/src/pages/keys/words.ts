// What is said of keys.

import { ApiKeyKind, ApiKeyScope, ApiKeyStatus, type ApiKey } from "../../gen/paperkey/auth/v1/keys_pb";

/** How many keys a team has at most that are neither revoked, expired nor rotated. */
export const MOST = 10;

/** What a key may be allowed, by what it is about. */
export const SCOPES: { group: string; words: string[] }[] = [
  ...["products", "clients", "licenses", "webhooks", "keys", "members", "usage", "audit"].map((group) => ({
    group: `${group === "licenses" ? "Licences" : (group[0]?.toUpperCase() ?? "") + group.slice(1)}`,
    words: [`${group}:read`, `${group}:write`],
  })),
  { group: "Meters", words: ["meters:consume"] },
];

export const ALL = SCOPES.flatMap((group) => group.words);

export const scopeName = (scope: ApiKeyScope): string => (scope === ApiKeyScope.READ_ONLY ? "Read-only" : "Read & Write");

/** Whether it counts among the keys of its team. */
export const counts = (key: ApiKey): boolean =>
  (key.kind === ApiKeyKind.TEAM || key.kind === ApiKeyKind.PLATFORM) &&
  (key.status === ApiKeyStatus.ACTIVE || key.status === ApiKeyStatus.DISABLED) &&
  !key.supersededBy &&
  !key.temporary;

/** Whether it has come to its end. */
export const isOver = (key: ApiKey): boolean => key.status === ApiKeyStatus.REVOKED || key.status === ApiKeyStatus.EXPIRED;

/** Whether it may still be changed. */
export const isCurrent = (key: ApiKey): boolean => !isOver(key) && !key.supersededBy;

/** What sets it apart from an integration's key, if anything does. */
export const kindName = (key: ApiKey): string =>
  ({
    [ApiKeyKind.UNSPECIFIED]: "",
    [ApiKeyKind.TEAM]: "",
    [ApiKeyKind.PLATFORM]: "",
    [ApiKeyKind.FREE]: "Free key",
    [ApiKeyKind.USER_TOKEN]: "User token",
    [ApiKeyKind.SYSTEM]: "System key",
  })[key.kind];

/** A call that works with a key as it is: every key may ask about itself. */
export const firstCall = (token: string, key: ApiKey | undefined): string =>
  `curl ${location.origin}/api/v1/${key?.scopes.includes("products:read") ? "products" : "me"} -H "Authorization: Bearer ${token}"`;
