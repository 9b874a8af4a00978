//! The policy of the contract, enforced: once in the gateway, and again in every service, by the same function.
//!
//! What is judged here is coarse on purpose: kind of caller, scope, role, read-only, expiry. Whether a thing is the
//! caller's is decided by the service that loads it, through a store that is opened by tenant.

use std::{convert::Infallible, sync::Arc};

use http::{HeaderMap, HeaderValue, Request, Response, header::AUTHORIZATION, request::Parts};
use paperkey_proto::{
    Contract, Error,
    contract::Method,
    errors::v1::Reason,
    options::v1::{Caller as Kind, Scope, Tenant as TenantOption},
    principal::v1::{Mode, Principal, Role},
};
use tokio::time::{Instant, timeout_at};
use tonic::{Status, body::Body};

use crate::{
    authn::Authenticator,
    channel::deadline,
    clock::Clock,
    db::Database,
    ids::new_id,
    once::{Answers, Once},
    principal::{Caller, PRINCIPAL_HEADER, Signer, mode_of},
    service::{Answer, Rpcs},
    telemetry::{self, Direction, metrics::Measured},
};

/// Whether that principal may call that method at all.
pub fn authorize(method: &Method, principal: &Principal, now_ms: i64) -> Result<(), Error> {
    if principal.expires_at_ms != 0 && principal.expires_at_ms <= now_ms {
        return Err(Error::unauthenticated());
    }
    let kind = principal.kind();
    let served = method.serves(kind) || (method.serves(Kind::Anyone) && kind != Kind::Service);
    if !served {
        return Err(Error::new(Reason::ScopeInsufficient).with_agent_message(
            "This call does not serve credentials of this kind. Use one of the kinds that its documentation names; do \
             not retry with this credential.",
        ));
    }
    if kind == Kind::Service {
        return Ok(());
    }
    if principal.read_only && !method.is_read() {
        return Err(Error::new(Reason::ScopeInsufficient)
            .with_message("This key is read-only")
            .with_agent_message("Use a key of the team that may write. Do not retry with this one."));
    }
    let tenant = method.policy.tenant();
    let needs_team = matches!(tenant, TenantOption::Caller | TenantOption::Member)
        || (tenant == TenantOption::Any && kind != Kind::SystemKey);
    if needs_team && principal.team_id.is_empty() {
        // The account has no team, or none that it named.
        return match kind {
            Kind::SystemKey => Err(Error::field("Paperkey-Team", "must name the team that the call is for")),
            _ => Err(Error::not_found("team")),
        };
    }
    match method.scope {
        Some(scope) => authorize_scope(method, principal, scope),
        None => Ok(()),
    }
}

fn authorize_scope(method: &Method, principal: &Principal, scope: Scope) -> Result<(), Error> {
    if method.policy.owner_only
        && principal.role() != Role::Owner
        && matches!(principal.kind(), Kind::Account | Kind::UserToken)
    {
        return Err(Error::new(Reason::RoleInsufficient));
    }
    must_hold(principal, scope)
}

/// Refuses who may not do what a scope names. For a method whose answer shows more than its own scope stands for.
pub fn must_hold(principal: &Principal, scope: Scope) -> Result<(), Error> {
    let held = principal.scopes().any(|held| held == scope);
    let by_role = role_allows(principal.role(), scope);
    match principal.kind() {
        Kind::Account if !by_role => Err(Error::new(Reason::RoleInsufficient)),
        Kind::UserToken if held && !by_role => Err(Error::new(Reason::RoleInsufficient)),
        Kind::Account | Kind::Service => Ok(()),
        _ if !held => {
            let word = Contract::get().scope_word(scope);
            Err(Error::new(Reason::ScopeInsufficient).with_message(format!("This call needs the scope {word}")))
        }
        _ => Ok(()),
    }
}

/// Whether a credential may do at all what a scope names: it holds the scope, no read-only key holds one that changes
/// anything, and a user's token holds none that the user's role does not allow.
pub fn holds(principal: &Principal, scope: Scope) -> bool {
    principal.scopes().any(|held| held == scope)
        && !(principal.read_only && Contract::get().scope_writes(scope))
        && (principal.kind() != Kind::UserToken || role_allows(principal.role(), scope))
}

/// What each role may do in its team.
pub fn role_allows(role: Role, scope: Scope) -> bool {
    use Scope as S;
    let manages = matches!(
        scope,
        S::ProductsWrite | S::ClientsWrite | S::LicensesWrite | S::WebhooksWrite | S::LicensesCheck | S::MetersConsume
    );
    let reads = matches!(scope, S::ProductsRead | S::ClientsRead | S::LicensesRead | S::WebhooksRead | S::UsageRead);
    match role {
        Role::Owner | Role::Admin => scope != S::Unspecified,
        Role::Manager => manages || reads,
        Role::Member => reads,
        Role::Unspecified => false,
    }
}

/// The team that a call names, for credentials that belong to none.
pub const TEAM_HEADER: &str = "paperkey-team";
/// The mode that a call names, for credentials that belong to none.
pub const MODE_HEADER: &str = "paperkey-mode";

/// The team and mode that a call names in its headers or metadata.
pub fn named_tenant(headers: &HeaderMap) -> Result<(Option<&str>, Mode), Error> {
    let team = headers
        .get(TEAM_HEADER)
        .map(|team| team.to_str().map_err(|_| Error::field("Paperkey-Team", "must be the id of a team")));
    let mode = headers.get(MODE_HEADER).map(|word| {
        let mode = word.to_str().ok().and_then(mode_of);
        mode.ok_or_else(|| Error::field("Paperkey-Mode", "must be one of live, test"))
    });
    Ok((team.transpose()?, mode.transpose()?.unwrap_or_default()))
}

/// A service behind its policy: nothing reaches the routes without a verified caller who may call that method.
#[derive(Clone)]
pub struct Guarded(Arc<Guard>);

struct Guard {
    rpcs: Rpcs,
    signer: Signer,
    clock: Clock,
    /// Judges a system key that calls this port directly.
    direct: Option<Arc<dyn Authenticator>>,
    /// What was answered to calls that take effect once.
    answers: Option<Answers>,
}

impl Guarded {
    /// Puts the policy in front of a service's rpcs. People with a system key may call directly, such as by grpcurl
    /// at the service's own port, where there is an authenticator to ask. Calls that are to take effect once need the
    /// database in which the service makes its changes.
    pub fn new(
        rpcs: Rpcs,
        signer: Signer,
        clock: Clock,
        direct: Option<Arc<dyn Authenticator>>,
        database: Option<Database>,
    ) -> Self {
        let answers = database.map(Answers::new);
        Self(Arc::new(Guard { rpcs, signer, clock, direct, answers }))
    }

    /// Answers a call of somebody in this process who says whom it is for, if that caller may make it. Nothing that
    /// arrived from outside comes this way.
    pub fn call_as(&self, request: Request<Body>, caller: Caller) -> Measured {
        let method = Contract::get().method(request.uri().path()).map(|method| &**method);
        let answer = match method {
            None => refuse(Error::unauthenticated()),
            Some(found) => match authorize(found, &caller.principal, self.0.clock.now_ms()) {
                Ok(()) => self.0.serve(method, Direction::Within, request, caller),
                Err(error) => refuse(error),
            },
        };
        Measured::new(method, &self.0.clock, answer)
    }

    /// Whether one of our processes makes a call in its own name.
    pub(crate) fn is_of_ours(&self, request: &Request<Body>) -> bool {
        let assertion = request.headers().get(PRINCIPAL_HEADER);
        let caller = assertion.and_then(|assertion| self.0.signer.verify(assertion, request.uri().path()).ok());
        caller.is_some_and(|caller| caller.principal.kind() == Kind::Service)
    }

    /// Answers a call, if its caller may make it.
    pub fn call(&self, request: Request<Body>) -> Measured {
        let method = Contract::get().method(request.uri().path());
        // What our own processes send is judged without waiting for anything.
        let answer = match (method, request.headers().get(PRINCIPAL_HEADER)) {
            (Some(method), Some(assertion)) => match self.0.assertion(method, assertion) {
                Ok(caller) => self.0.serve(Some(method), Direction::Hop, request, caller),
                Err(error) => refuse(error),
            },
            (method, _) => {
                let (guard, method) = (Arc::clone(&self.0), method.cloned());
                Box::pin(async move {
                    // The body is not Sync, so it stays aside while the caller is looked at.
                    let (parts, body) = request.into_parts();
                    match guard.direct(method.as_deref(), &parts).await {
                        Ok(caller) => {
                            let request = Request::from_parts(parts, body);
                            guard.serve(method.as_deref(), Direction::Direct, request, caller).await
                        }
                        Err(error) => refuse(error).await,
                    }
                }) as Answer
            }
        };
        Measured::new(method.map(|method| &**method), &self.0.clock, answer)
    }
}

impl Guard {
    fn assertion(&self, method: &Method, assertion: &HeaderValue) -> Result<Caller, Error> {
        let caller = self.signer.verify(assertion, &method.path)?;
        authorize(method, &caller.principal, self.clock.now_ms())?;
        Ok(caller)
    }

    /// The methods of reflection stand outside the contract: they take a system key, which reaches everything.
    async fn direct(&self, method: Option<&Method>, request: &Parts) -> Result<Caller, Error> {
        let (Some(direct), Some(credential)) = (&self.direct, bearer(request)) else {
            return Err(Error::unauthenticated());
        };
        let (team, mode) = named_tenant(&request.headers)?;
        let principal = direct.authenticate(credential, team, mode).await?;
        // Addresses are the gateway's to judge, so a key that is bound to some does not pass here.
        if principal.kind() != Kind::SystemKey || !principal.allowlist.is_empty() {
            return Err(Error::unauthenticated());
        }
        if let Some(method) = method {
            authorize(method, &principal, self.clock.now_ms())?;
        }
        Ok(Caller { principal, request_id: new_id("req", &self.clock), once: None })
    }

    fn serve(
        self: &Arc<Self>,
        method: Option<&Method>,
        direction: Direction,
        mut request: Request<Body>,
        mut caller: Caller,
    ) -> Answer {
        let path = method.map(|method| method.path.as_str());
        let begun = telemetry::serve(path, direction, &caller.request_id, request.headers());
        request.headers_mut().remove(PRINCIPAL_HEADER);
        let takes_effect_once = method.is_some_and(|method| method.policy.idempotent);
        caller.once = caller.once.take().filter(|_| takes_effect_once).map(|once| Arc::new(once.anew()));
        let once = caller.once.clone();
        request.extensions_mut().insert(caller);
        let until = deadline::of(&request);
        if until.is_some_and(|until| until <= Instant::now()) {
            return refuse(deadline::too_late());
        }
        let answer = match once {
            None => self.rpcs.call(request),
            Some(once) => {
                let guard = Arc::clone(self);
                Box::pin(async move { Ok(guard.answer_once(once, request).await) })
            }
        };
        let streams = method.is_none_or(|method| method.streams);
        let answer = match until {
            // What is asked of others while a stream goes on is asked after its beginning was answered in time.
            Some(until) if streams => answered_by(until, answer),
            Some(until) => answered_by(until, deadline::bounded(until, answer)),
            None => answer,
        };
        match begun {
            None => answer,
            Some((scope, span)) => Box::pin(scope.within(span.around(answer))),
        }
    }
}

impl Guard {
    async fn answer_once(&self, once: Arc<Once>, request: Request<Body>) -> Response<Body> {
        match &self.answers {
            Some(answers) => answers.answer(once, move || self.rpcs.call(request)).await,
            None => Status::from(Error::internal("there is nowhere to keep the answer of a call")).into_http(),
        }
    }
}

/// Gives up on an answer whose caller has done so.
fn answered_by(
    until: Instant,
    answer: impl Future<Output = Result<Response<Body>, Infallible>> + Send + 'static,
) -> Answer {
    Box::pin(async move {
        let answer = timeout_at(until, answer).await;
        answer.unwrap_or_else(|_| Ok(Status::from(deadline::too_late()).into_http()))
    })
}

fn refuse(error: Error) -> Answer {
    Box::pin(async { Ok(Status::from(error).into_http()) })
}

fn bearer(request: &Parts) -> Option<&str> {
    let value = request.headers.get(AUTHORIZATION)?.to_str().ok()?;
    let (scheme, credential) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then_some(credential.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn method(path: &str) -> &'static Method {
        Contract::get().method(path).expect("it is in the contract")
    }

    fn principal(kind: Kind, role: Role) -> Principal {
        Principal { kind: kind.into(), role: role.into(), team_id: "team_1".into(), ..Principal::default() }
    }

    #[test]
    fn a_member_reads_and_a_manager_writes() {
        let read = method("/paperkey.catalog.v1.CatalogService/ListProducts");
        let write = method("/paperkey.catalog.v1.CatalogService/CreateProduct");
        let verdict = |method, role| authorize(method, &principal(Kind::Account, role), 0).map_err(|e| e.reason());
        assert_eq!(verdict(read, Role::Member), Ok(()));
        assert_eq!(verdict(write, Role::Member), Err(Reason::RoleInsufficient));
        assert_eq!(verdict(write, Role::Manager), Ok(()));
        assert_eq!(verdict(write, Role::Unspecified), Err(Reason::RoleInsufficient));
    }

    #[test]
    fn a_key_needs_the_scope_and_a_read_only_key_writes_nothing() {
        let read = method("/paperkey.catalog.v1.CatalogService/ListProducts");
        let write = method("/paperkey.catalog.v1.CatalogService/CreateProduct");
        let mut key = principal(Kind::TeamKey, Role::Unspecified);
        assert_eq!(authorize(read, &key, 0).map_err(|e| e.reason()), Err(Reason::ScopeInsufficient));
        key.scopes = vec![Scope::ProductsRead.into(), Scope::ProductsWrite.into()];
        assert!(authorize(write, &key, 0).is_ok());
        key.read_only = true;
        assert!(authorize(read, &key, 0).is_ok());
        assert_eq!(authorize(write, &key, 0).map_err(|e| e.reason()), Err(Reason::ScopeInsufficient));
    }

    #[test]
    fn a_credential_holds_what_it_was_given_and_may_use() {
        let mut key = principal(Kind::TeamKey, Role::Unspecified);
        key.scopes = vec![Scope::LicensesRead.into(), Scope::LicensesWrite.into(), Scope::LicensesCheck.into()];
        assert!(holds(&key, Scope::LicensesWrite) && !holds(&key, Scope::ProductsRead));
        key.read_only = true;
        assert!(holds(&key, Scope::LicensesRead));
        assert!(!holds(&key, Scope::LicensesWrite) && !holds(&key, Scope::LicensesCheck));
        let mut token = Principal { kind: Kind::UserToken.into(), read_only: false, ..key };
        assert!(!holds(&token, Scope::LicensesRead), "a user without a role in the team");
        token.role = Role::Member.into();
        assert!(holds(&token, Scope::LicensesRead) && !holds(&token, Scope::LicensesWrite));
        assert!(!holds(&token, Scope::ProductsRead), "the role alone is not enough");
    }

    #[tokio::test]
    async fn a_caller_who_is_handed_over_by_value_is_judged_like_any_other() {
        let (clock, hand) = Clock::manual(1_000);
        let signer = Signer::new(&crate::secrets::Keyring::for_tests(), clock.clone());
        // No service is behind it: who is let pass learns that there is none.
        let guarded = Guarded::new(Rpcs::default(), signer, clock, None, None);
        let code = async |path: &'static str, principal: &Principal| {
            let mut request = Request::new(Body::empty());
            *request.uri_mut() = http::Uri::from_static(path);
            let caller = Caller { principal: Arc::new(principal.clone()), request_id: "req_1".to_owned(), once: None };
            let answer = guarded.call_as(request, caller).await.expect("it cannot fail");
            Status::from_header_map(answer.headers()).expect("it was refused").code()
        };
        let list = "/paperkey.catalog.v1.CatalogService/ListProducts";
        let internal = "/paperkey.auth.v1.CredentialService/Authenticate";
        let owner = Principal { expires_at_ms: 2_000, ..principal(Kind::Account, Role::Owner) };
        assert_eq!(code(list, &owner).await, tonic::Code::Unimplemented);
        assert_eq!(code(list, &principal(Kind::Anyone, Role::Unspecified)).await, tonic::Code::PermissionDenied);
        assert_eq!(code(internal, &owner).await, tonic::Code::PermissionDenied);
        assert_eq!(code("/paperkey.catalog.v1.CatalogService/Nothing", &owner).await, tonic::Code::Unauthenticated);
        hand.advance_ms(1_000);
        assert_eq!(code(list, &owner).await, tonic::Code::Unauthenticated);
    }

    #[test]
    fn a_credential_that_has_expired_is_no_credential() {
        let read = method("/paperkey.catalog.v1.CatalogService/ListProducts");
        let mut owner = principal(Kind::Account, Role::Owner);
        owner.expires_at_ms = 1_000;
        assert!(authorize(read, &owner, 999).is_ok());
        assert_eq!(authorize(read, &owner, 1_000).map_err(|e| e.reason()), Err(Reason::InvalidCredentials));
    }

    #[test]
    fn only_processes_reach_internal_methods() {
        let internal = method("/paperkey.auth.v1.CredentialService/Authenticate");
        for kind in [Kind::Anyone, Kind::Account, Kind::TeamKey, Kind::SystemKey] {
            assert!(authorize(internal, &principal(kind, Role::Owner), 0).is_err(), "{kind:?}");
        }
        assert!(authorize(internal, &principal(Kind::Service, Role::Unspecified), 0).is_ok());
    }
}
