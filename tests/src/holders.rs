//! Every kind of caller there is, and what the specification lets each do.
//!
//! This is written from the specification (the kinds of key, the table of roles) and the contract, and not from the
//! code that enforces them: the one is tested against the other.

use std::fmt::Write as _;

use paperkey_proto::{
    Contract,
    contract::Method,
    options::v1::{Caller, Scope, Surface},
    principal::v1::Role,
};

/// What becomes of a call before anybody looks at what it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// 401: the credential is none, or none that is taken there.
    Unauthenticated,
    /// 403: it is a good one, and not allowed to do this.
    ScopeInsufficient,
    /// 403: the person's role does not allow it.
    RoleInsufficient,
    /// The call is judged by its content.
    Through,
}

/// A kind of caller.
#[derive(Clone, Copy, Debug)]
pub struct Holder {
    /// What the table calls it.
    pub name: &'static str,
    /// The kind, if the credential is good.
    pub kind: Option<Caller>,
    /// The role of the person behind it.
    pub role: Role,
    /// The key only reads.
    pub read_only: bool,
    /// Whether anything is sent at all.
    pub sent: bool,
}

impl Holder {
    const fn new(name: &'static str, kind: Caller) -> Self {
        Self { name, kind: Some(kind), role: Role::Unspecified, read_only: false, sent: true }
    }

    const fn person(name: &'static str, role: Role) -> Self {
        Self { role, ..Self::new(name, Caller::Account) }
    }

    /// Nobody in particular.
    pub const NOBODY: Self =
        Self { name: "nobody", kind: None, role: Role::Unspecified, read_only: false, sent: false };
    /// Somebody with a credential that is no good.
    pub const BAD: Self = Self { name: "a bad credential", sent: true, ..Self::NOBODY };
    /// An Owner of the team.
    pub const OWNER: Self = Self::person("Owner", Role::Owner);
    /// An Admin of the team.
    pub const ADMIN: Self = Self::person("Admin", Role::Admin);
    /// A Manager of the team.
    pub const MANAGER: Self = Self::person("Manager", Role::Manager);
    /// A Member of the team.
    pub const MEMBER: Self = Self::person("Member", Role::Member);
    /// A team key with all that it can be allowed.
    pub const TEAM_KEY: Self = Self::new("team key", Caller::TeamKey);
    /// A team key that only reads.
    pub const READ_ONLY_KEY: Self = Self { name: "read-only key", read_only: true, ..Self::TEAM_KEY };
    /// The free key of a registration.
    pub const FREE_KEY: Self = Self::new("free key", Caller::FreeKey);
    /// An Owner's token with all that it can be allowed.
    pub const OWNERS_TOKEN: Self = Self { name: "user token", role: Role::Owner, ..Self::new("", Caller::UserToken) };
    /// A Member's token with all that it can be allowed.
    pub const MEMBERS_TOKEN: Self = Self { name: "a Member's token", role: Role::Member, ..Self::OWNERS_TOKEN };
    /// The installation's own key, for a team that it names.
    pub const SYSTEM_KEY: Self = Self::new("system key", Caller::SystemKey);
    /// A product's public key.
    pub const PUBLIC_KEY: Self = Self::new("`pk_`", Caller::ProductPublicKey);
    /// A product's secret key.
    pub const SECRET_KEY: Self = Self::new("`sk_`", Caller::ProductSecretKey);

    /// The columns of the table.
    pub const TABLE: [Self; 12] = [
        Self::NOBODY,
        Self::OWNER,
        Self::ADMIN,
        Self::MANAGER,
        Self::MEMBER,
        Self::TEAM_KEY,
        Self::READ_ONLY_KEY,
        Self::FREE_KEY,
        Self::OWNERS_TOKEN,
        Self::SYSTEM_KEY,
        Self::PUBLIC_KEY,
        Self::SECRET_KEY,
    ];

    /// What its credential may hold, whatever the role of the person behind it.
    pub fn scopes(&self) -> Vec<Scope> {
        let all = Contract::get().scopes().map(|(scope, _)| scope);
        match self.kind {
            Some(Caller::SystemKey) => all.collect(),
            Some(Caller::ProductPublicKey) => vec![Scope::LicensesCheck],
            Some(Caller::ProductSecretKey) => {
                vec![Scope::LicensesRead, Scope::LicensesWrite, Scope::WebhooksRead, Scope::WebhooksWrite]
            }
            Some(Caller::TeamKey | Caller::FreeKey | Caller::UserToken) => {
                all.filter(|scope| *scope != Scope::LicensesCheck).collect()
            }
            _ => Vec::new(),
        }
    }

    /// What becomes of its calls of a method, where these kinds are taken.
    pub fn verdict(&self, method: &Method, accepts: impl Fn(Caller) -> bool) -> Verdict {
        // Where only strangers are served, nobody looks at what they carry.
        if method.callers == [Caller::Anyone] {
            return Verdict::Through;
        }
        let Some(kind) = self.kind.filter(|kind| accepts(*kind)) else {
            let stranger = !self.sent && method.serves(Caller::Anyone);
            return if stranger { Verdict::Through } else { Verdict::Unauthenticated };
        };
        if !method.serves(kind) && !method.serves(Caller::Anyone) {
            return Verdict::ScopeInsufficient;
        }
        if self.read_only && !method.is_read() {
            return Verdict::ScopeInsufficient;
        }
        let Some(scope) = method.scope else { return Verdict::Through };
        if kind != Caller::Account && !self.scopes().contains(&scope) {
            return Verdict::ScopeInsufficient;
        }
        let of_a_person = matches!(kind, Caller::Account | Caller::UserToken);
        let by_role = role_allows(self.role, scope) && (!method.policy.owner_only || self.role == Role::Owner);
        if of_a_person && !by_role { Verdict::RoleInsufficient } else { Verdict::Through }
    }

    /// What becomes of its calls over REST.
    pub fn over_rest(&self, method: &Method, surface: Surface) -> Verdict {
        self.verdict(method, |kind| surface_accepts(surface, kind))
    }

    /// gRPC has no surfaces of its own: it accepts what one of the method's surfaces accepts.
    pub fn over_grpc(&self, method: &Method) -> Verdict {
        self.verdict(method, |kind| {
            method.serves(kind) || method.routes.iter().any(|route| surface_accepts(route.surface, kind))
        })
    }
}

fn surface_accepts(surface: Surface, kind: Caller) -> bool {
    let entry = Contract::get().surfaces().iter().find(|entry| entry.surface == surface);
    entry.expect("a route belongs to a surface").options.callers().any(|caller| caller == kind)
}

/// The table of roles of the specification.
fn role_allows(role: Role, scope: Scope) -> bool {
    let word = Contract::get().scope_word(scope);
    let (area, action) = word.split_once(':').unwrap_or((word, ""));
    match (area, action) {
        ("products" | "clients" | "licenses" | "webhooks" | "usage", "read") => role != Role::Unspecified,
        ("products" | "clients" | "licenses" | "webhooks", "write") => {
            matches!(role, Role::Owner | Role::Admin | Role::Manager)
        }
        _ => matches!(role, Role::Owner | Role::Admin),
    }
}

/// The page that tells a person who may call what.
pub fn permissions_page() -> String {
    let mut page = String::from(
        "# Who may call what\n\n\
         Every method, its paths and scope, and whether each kind of caller may call it. Made from the contract by a test,\n\
         which also asks a running installation for every cell. `yes`: the call is \
         judged by its\ncontent. `no`: 403. `–`: 401, the credential is not taken there.\n\n\
         A team key is any of `pk_live_`, `pk_test_`, `pb_live_`, `pb_test_`. The columns of keys show a key with every \
         scope that its\nkind may hold; one with fewer is refused (403 `scope_insufficient`) where the scope of the row \
         is missing. A user token is an\nOwner's here: no user token does more than its user's role allows at that \
         moment. The system key names the team with\n`Paperkey-Team`. `sk_` reaches its own product's licences and \
         webhooks only.\n",
    );
    let mut service = "";
    for method in Contract::get().methods().iter().filter(|method| method.is_public()) {
        if method.service != service {
            service = &method.service;
            let _ = writeln!(page, "\n## {service}\n");
            let names = Holder::TABLE.map(|holder| holder.name).join(" | ");
            let _ = writeln!(page, "| rpc | REST | scope | {names} |");
            let _ = writeln!(page, "|---|---|---|{}", ":-:|".repeat(Holder::TABLE.len()));
        }
        let routes: Vec<_> = method.routes.iter().map(|route| format!("{} `{}`", route.verb, route.template)).collect();
        let scope = method.scope.map(|scope| Contract::get().scope_word(scope)).unwrap_or_default();
        let cells = Holder::TABLE.map(|holder| match holder.over_grpc(method) {
            Verdict::Through => "yes",
            Verdict::Unauthenticated => "–",
            Verdict::ScopeInsufficient | Verdict::RoleInsufficient => "no",
        });
        let (name, routes) = (method.descriptor.name(), routes.join("<br>"));
        let _ = writeln!(page, "| {name} | {routes} | {scope} | {} |", cells.join(" | "));
    }
    page
}
