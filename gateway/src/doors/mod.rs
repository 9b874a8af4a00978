//! Doors for other people's APIs: whoever comes through is judged here, and what they came for is elsewhere.
//!
//! [`forward_auth`] answers proxies that ask before each request, [`envoy`] answers Envoy's form of the same question,
//! and [`upstream`] stands in front of whole servers. All three take the credentials of the platform surface and judge
//! them alike. They are no methods of the contract: what they guard has a shape that the contract does not know.
//!
//! A call through a door counts as one of its key, and takes units of a meter where the question or the mount names one.

pub(crate) mod envoy;
pub(crate) mod forward_auth;
pub(crate) mod upstream;

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue, Method as Verb, Request, Response};
use paperkey_kit::{
    config::Tiers,
    meters::Taken,
    policy::{holds, role_allows},
    principal::mode_word,
    shed::Errand,
    values::rfc3339,
};
use paperkey_proto::{
    Contract, Error,
    contract::SurfaceEntry,
    errors::v1::Reason,
    options::v1::{Caller, Scope, Surface},
    principal::v1::{Mode, Principal},
};

use crate::{
    GatewayConfig, GatewayError, Inner,
    body::Body,
    call::Call,
    edge,
    envelope::{Refusal, Teller},
    table::Kinds,
};

const KEY: HeaderName = HeaderName::from_static("x-paperkey-key");
const TEAM: HeaderName = HeaderName::from_static("x-paperkey-team");
const MODE: HeaderName = HeaderName::from_static("x-paperkey-mode");
const SCOPES: HeaderName = HeaderName::from_static("x-paperkey-scopes");
const USER: HeaderName = HeaderName::from_static("x-paperkey-user");

/// All names by which a guarded server learns who calls.
static IDENTITY: [HeaderName; 5] = [KEY, TEAM, MODE, SCOPES, USER];

/// What the doors share.
pub(crate) struct Doors {
    /// The surface that they all are on.
    platform: &'static SurfaceEntry,
    accepted: Kinds,
    mounts: upstream::Mounts,
}

/// An answer, and whose it is.
pub(crate) enum Answered {
    /// The gateway's own.
    Ours(Response<Body>),
    /// That of a server behind the gateway, to be passed on as it is.
    Theirs(Response<Body>),
}

impl Doors {
    pub(crate) fn new(contract: &'static Contract, config: &GatewayConfig) -> Result<Self, GatewayError> {
        let platform = contract
            .surfaces()
            .iter()
            .find(|entry| entry.surface == Surface::Platform)
            .ok_or_else(|| GatewayError::Path(forward_auth::PATH.to_owned()))?;
        let people = platform.options.callers().filter(|kind| !matches!(kind, Caller::Anyone | Caller::Service));
        Ok(Self {
            platform,
            accepted: Kinds::of(people),
            mounts: upstream::Mounts::new(&config.upstreams, &config.tiers)?,
        })
    }

    /// Whether a path leads through a door.
    pub(crate) fn leads_through(&self, path: &str) -> bool {
        path == forward_auth::PATH || self.mounts.find(path).is_some()
    }
}

/// Answers a request whose path leads through a door.
pub(crate) async fn answer<B>(gateway: &Inner, request: Request<B>, peer: SocketAddr, call: &mut Call) -> Answered
where
    B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (head, body) = request.into_parts();
    match gateway.doors.mounts.find(head.uri.path()) {
        Some(mount) => upstream::answer(gateway, mount, head, body, peer, call).await,
        None => Answered::Ours(forward_auth::answer(gateway, &head, !body.is_end_stream(), peer, call).await),
    }
}

/// Whether a verb only reads. RFC 9110 calls such verbs safe.
fn is_read(verb: &str) -> bool {
    [Verb::GET, Verb::HEAD, Verb::OPTIONS].iter().any(|safe| safe == verb)
}

/// Whether whoever was identified may do what is asked: with a verb that writes, where the verb is known, and with a
/// scope, where one is needed.
fn may(principal: &Principal, scope: Option<Scope>, writes: Option<bool>) -> Result<(), Error> {
    let insufficient = |message: String| Err(Error::new(Reason::ScopeInsufficient).with_message(message));
    if principal.read_only && (writes == Some(true) || scope.is_some_and(|scope| Contract::get().scope_writes(scope))) {
        return insufficient("This key is read-only".to_owned());
    }
    let Some(scope) = scope else { return Ok(()) };
    if !principal.scopes().any(|held| held == scope) {
        return insufficient(format!("This call needs the scope {}", Contract::get().scope_word(scope)));
    }
    if principal.kind() == Caller::UserToken && !role_allows(principal.role(), scope) {
        return Err(Error::new(Reason::RoleInsufficient));
    }
    Ok(())
}

/// What a guarded server is told of who calls. What is empty is not told.
fn identity(principal: &Principal) -> Vec<(HeaderName, HeaderValue)> {
    let scopes: Vec<&str> = principal
        .scopes()
        .filter(|scope| holds(principal, *scope))
        .map(|scope| Contract::get().scope_word(scope))
        .collect();
    let user = if principal.kind() == Caller::UserToken { principal.user_id.as_str() } else { "" };
    let told = [
        (KEY, principal.id.as_str()),
        (TEAM, principal.team_id.as_str()),
        (MODE, mode_word(principal.mode())),
        (SCOPES, &scopes.join(" ")),
        (USER, user),
    ];
    told.into_iter()
        .filter(|(_, value)| !value.is_empty())
        .filter_map(|(name, value)| Some((name, HeaderValue::from_str(value).ok()?)))
        .collect()
}

/// Whether only we may speak by a header of that name. Servers that know headers as CGI variables cannot tell `_` from
/// `-`, so both are ours.
fn is_our_word(name: &str) -> bool {
    let name = name.replace('_', "-");
    name.starts_with("x-paperkey-") || name.starts_with("paperkey-")
}

/// Units of one call at most.
const MAX_COST: i64 = 1_000_000_000;

/// What is wrong with the name of a meter that there is none of.
pub(crate) const NO_METER: &str = "must be a meter that a tier gives a quota of, such as renders";
/// What is wrong with a number of units without a meter.
pub(crate) const NO_METER_NAMED: &str = "is that of a meter, and none is named";

/// What must hold for whoever comes through, and what it costs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Terms {
    pub(crate) scope: Option<Scope>,
    /// The meter that units are taken of, and how many.
    pub(crate) meter: Option<(String, i64)>,
}

/// The names by which a question or a route says its terms.
const SCOPE: &str = "scope";
const METER: &str = "meter";
const COST: &str = "cost";

/// Terms that are being read.
#[derive(Debug, Default)]
struct TermsRead {
    scope: Option<Scope>,
    meter: Option<String>,
    cost: Option<i64>,
    /// Whether a meter was named, be there one of that name or not.
    names_meter: bool,
}

impl TermsRead {
    /// Whether it is one of the names of terms.
    fn knows(name: &str) -> bool {
        [SCOPE, METER, COST].contains(&name)
    }

    /// Reads what is said under one of the names, or says what is wrong with it.
    fn read(&mut self, name: &str, value: &str, tiers: &Tiers) -> Result<(), &'static str> {
        match name {
            SCOPE => {
                self.scope = Contract::get().scope_named(value);
                self.scope.map(|_| ()).ok_or("must be a scope, such as licenses:read")
            }
            METER => {
                self.names_meter = true;
                self.meter = Some(value.to_owned()).filter(|meter| tiers.has_meter(meter));
                self.meter.as_ref().map(|_| ()).ok_or(NO_METER)
            }
            _ => {
                self.cost = value.parse().ok().filter(|units| (0..=MAX_COST).contains(units));
                self.cost.map(|_| ()).ok_or("must be a number of units from 0 to 1000000000")
            }
        }
    }

    /// What is wrong with the cost, now that everything was read.
    fn fault_of_cost(&self) -> Option<&'static str> {
        (self.cost.is_some() && !self.names_meter).then_some(NO_METER_NAMED)
    }

    fn terms(self) -> Terms {
        let cost = self.cost.unwrap_or(1);
        Terms { scope: self.scope, meter: self.meter.map(|meter| (meter, cost)) }
    }
}

/// Identifies whoever sent these headers, and lets them pass or not. Nobody in particular is refused here.
async fn judge(
    gateway: &Inner,
    headers: &HeaderMap,
    client: Option<IpAddr>,
    terms: &Terms,
    writes: Option<bool>,
    call: &mut Call,
) -> Result<Arc<Principal>, Refusal> {
    gateway.must_be_seen(Errand::Call, None, call).await?;
    let principal = gateway.gate.identify(headers, gateway.doors.accepted, client, call).await?;
    let principal = principal.ok_or_else(|| Refusal::from(Error::unauthenticated()))?;
    may(&principal, terms.scope, writes).map_err(|error| Refusal { credential_sent: true, ..error.into() })?;
    take(gateway, &principal, terms.meter.as_ref()).await?;
    Ok(principal)
}

/// Takes the units that a call costs, or refuses it.
async fn take(gateway: &Inner, principal: &Principal, meter: Option<&(String, i64)>) -> Result<Option<Taken>, Error> {
    let Some((meter, cost)) = meter else { return Ok(None) };
    // The installation's own key belongs to no team that could run out of anything.
    if principal.team_id.is_empty() {
        return Ok(None);
    }
    let taken = gateway.meters.take(principal, meter, *cost).await?;
    if !taken.granted {
        return Err(gateway.used_up(meter, &taken));
    }
    // What only looks, and what test data takes, is nothing that could come back.
    Ok(Some(taken).filter(|_| *cost > 0 && principal.mode() != Mode::Test))
}

impl Inner {
    /// What a team is told whose units are used up.
    fn used_up(&self, meter: &str, taken: &Taken) -> Error {
        let Taken { used, limit, resets_at_ms, .. } = taken;
        let limit = limit.map_or_else(|| "unlimited".to_owned(), |limit| limit.to_string());
        let until = rfc3339(*resets_at_ms);
        let message = format!(
            "The call takes more than is left of the month's {meter}: {used} of {limit} are used until {until}"
        );
        let wait_ms = u64::try_from(resets_at_ms - self.clock.now_ms()).unwrap_or(0);
        let units = format!("{limit} units of {meter} a month");
        let error = Error::new(Reason::QuotaExceeded).with_message(message).with_quota_violation(meter, units);
        self.gate.upgrade(error.with_retry_after(Duration::from_millis(wait_ms)))
    }
}

impl Inner {
    /// Who tells of refusals at the doors.
    fn doorman<'a>(&'a self, path: &'a str, headers: &HeaderMap, request_id: &'a str) -> Teller<'a> {
        Teller {
            surface: Some(&self.doors.platform.options),
            request_id,
            public_url: &self.config.public_url,
            path,
            problem: crate::envelope::asks_for_problem(headers),
        }
    }

    /// Whether the other end of a socket is a proxy whose word counts.
    fn trusts(&self, peer: SocketAddr) -> bool {
        edge::is_trusted(peer.ip(), &self.config.trusted_proxies)
    }
}

#[cfg(test)]
mod tests {
    use paperkey_proto::principal::v1::Role;

    use super::*;

    fn key(scopes: &[Scope], read_only: bool) -> Principal {
        Principal {
            kind: Caller::TeamKey.into(),
            id: "key_1".into(),
            team_id: "team_1".into(),
            user_id: "usr_1".into(),
            scopes: scopes.iter().map(|scope| i32::from(*scope)).collect(),
            read_only,
            ..Principal::default()
        }
    }

    fn verdict(principal: &Principal, scope: Option<Scope>, writes: Option<bool>) -> Option<Reason> {
        may(principal, scope, writes).err().map(|error| error.reason())
    }

    #[test]
    fn a_read_only_key_writes_neither_by_verb_nor_by_scope() {
        let both = [Scope::LicensesRead, Scope::LicensesWrite];
        let (full, reading) = (key(&both, false), key(&both, true));
        for writes in [None, Some(false), Some(true)] {
            assert_eq!(verdict(&full, Some(Scope::LicensesWrite), writes), None);
            assert_eq!(verdict(&reading, Some(Scope::LicensesWrite), writes), Some(Reason::ScopeInsufficient));
        }
        assert_eq!(verdict(&reading, Some(Scope::LicensesRead), None), None);
        assert_eq!(verdict(&reading, Some(Scope::LicensesRead), Some(false)), None);
        assert_eq!(verdict(&reading, Some(Scope::LicensesRead), Some(true)), Some(Reason::ScopeInsufficient));
        assert_eq!(verdict(&reading, None, Some(true)), Some(Reason::ScopeInsufficient));
        assert_eq!(verdict(&reading, None, None), None);
    }

    #[test]
    fn a_user_token_does_no_more_than_the_role_of_its_user() {
        let mut token = key(&[Scope::LicensesRead, Scope::LicensesWrite], false);
        token.kind = Caller::UserToken.into();
        token.role = Role::Member.into();
        assert_eq!(verdict(&token, Some(Scope::LicensesRead), None), None);
        assert_eq!(verdict(&token, Some(Scope::LicensesWrite), None), Some(Reason::RoleInsufficient));
        let told = identity(&token);
        assert!(told.contains(&(SCOPES, HeaderValue::from_static("licenses:read"))), "{told:?}");
        assert!(told.contains(&(USER, HeaderValue::from_static("usr_1"))), "{told:?}");
    }

    #[test]
    fn a_server_is_told_what_the_key_may_really_do_and_of_no_user_behind_a_key() {
        let told = identity(&key(&[Scope::LicensesRead, Scope::LicensesWrite], true));
        let told: Vec<_> = told.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        let expected = [
            ("x-paperkey-key", "key_1"),
            ("x-paperkey-team", "team_1"),
            ("x-paperkey-mode", "live"),
            ("x-paperkey-scopes", "licenses:read"),
        ];
        assert_eq!(told, expected);
    }

    #[test]
    fn names_of_ours_are_ours_however_they_are_written() {
        for name in ["x-paperkey-team", "x_paperkey_team", "x-paperkey_key", "paperkey-principal-bin", "paperkey_mode"]
        {
            assert!(is_our_word(name), "{name}");
        }
        assert!(!is_our_word("x-paper") && !is_our_word("x-my-paperkey-team"));
    }
}
