// Who is signed in, for which team, in which mode, and what their role lets them do.

import { Role } from "../gen/paperkey/principal/v1/principal_pb";
import type { Team, User } from "../gen/paperkey/auth/v1/auth_pb";
import { Problem, ask, auth, onSignedOut, tenant } from "./api";

/** The scopes that a role may be asked for in this page. */
export type Right =
  | "self"
  | "read"
  | "write"
  | "keys"
  | "members"
  | "audit"
  | "own";

const RIGHTS: Record<Role, Right[]> = {
  [Role.UNSPECIFIED]: [],
  [Role.OWNER]: ["read", "write", "keys", "members", "audit", "own"],
  [Role.ADMIN]: ["read", "write", "keys", "members", "audit"],
  [Role.MANAGER]: ["read", "write"],
  [Role.MEMBER]: ["read"],
};

const REMEMBERED = "paperkey.team";

export const roleName = (role: Role): string =>
  ({ [Role.UNSPECIFIED]: "–", [Role.OWNER]: "Owner", [Role.ADMIN]: "Admin", [Role.MANAGER]: "Manager", [Role.MEMBER]: "Member" })[role];

interface Remembered {
  id?: string;
  role?: string;
  mode?: "live" | "test";
}

function remembered(): Remembered {
  try {
    return (JSON.parse(localStorage.getItem(REMEMBERED) ?? "{}") ?? {}) as Remembered;
  } catch {
    return {};
  }
}

class Session {
  user = $state.raw<User | null>(null);
  teams = $state.raw<Team[]>([]);
  team = $state.raw<Team | null>(null);
  test = $state(false);
  /** `loading` until it is known who is there. */
  phase = $state<"loading" | "out" | "in" | "failed">("loading");
  problem = $state.raw<Problem | null>(null);
  /** Why nobody is signed in any more, for whoever is asked to sign in again. */
  notice = $state("");
  /** Where whoever was here was when their session ended by itself. */
  #ended: Remembered | null = null;

  constructor() {
    onSignedOut.call = () => this.forget(this.phase === "in" ? "Your session has ended. Sign in to go on." : this.notice);
  }

  can(right: Right): boolean {
    // What concerns oneself needs no team.
    if (right === "self") return this.user !== null;
    return RIGHTS[this.team?.role ?? Role.UNSPECIFIED].includes(right);
  }

  /** Asks who is signed in. */
  async load(): Promise<void> {
    try {
      const me = await auth.getMe({});
      let id = this.team?.id;
      // Other tabs write what is remembered, too: it is where this one begins, and no more.
      if (!this.user) {
        const kept = this.#ended ?? remembered();
        id = kept.id;
        this.test = kept.mode === "test" && me.teams.some((team) => team.id === id);
      }
      this.user = me.user ?? null;
      this.teams = me.teams;
      this.enter(me.teams.find((team) => team.id === id) ?? me.teams[0] ?? null);
      this.phase = "in";
      this.problem = null;
      this.notice = "";
    } catch (thrown) {
      const problem = Problem.from(thrown);
      if (problem.reason === "INVALID_CREDENTIALS") onSignedOut.call();
      else {
        this.problem = problem;
        this.phase = "failed";
      }
    }
  }

  enter(team: Team | null): void {
    this.team = team;
    this.#remember();
  }

  setTest(test: boolean): void {
    this.test = test;
    this.#remember();
  }

  /** Ends every session of the account. */
  async signOut(): Promise<void> {
    await ask(auth.logout({}));
    this.forget();
  }

  forget(notice = ""): void {
    // Who was cut off comes back to where they were; who signs out leaves nothing behind.
    if (this.phase === "in") this.#ended = notice ? this.#here() : null;
    else if (this.phase === "loading") this.#ended = remembered();
    this.notice = notice;
    this.user = null;
    this.teams = [];
    this.team = null;
    this.test = false;
    tenant.teamId = "";
    tenant.test = false;
    try {
      localStorage.removeItem(REMEMBERED);
    } catch {
      // Then nothing was kept either.
    }
    this.phase = "out";
  }

  #here(): Remembered {
    return {
      id: this.team?.id ?? "",
      role: roleName(this.team?.role ?? Role.UNSPECIFIED).toLowerCase(),
      mode: this.test ? "test" : "live",
    };
  }

  #remember(): void {
    tenant.teamId = this.team?.id ?? "";
    tenant.test = this.test;
    try {
      // The reference reads it, to make keys for the right team.
      localStorage.setItem(REMEMBERED, JSON.stringify(this.#here()));
    } catch {
      // A browser that keeps nothing begins with the first team.
    }
  }
}

export const session = new Session();
