//! Who may pass: the credential of a call, whose it is, and whether the method is theirs.
//!
//! The judgement itself is the kit's, and services repeat it. Here the credential is found and exchanged, and kinds
//! of caller that a surface does not know are turned away as if they were strangers. Where people are served, their
//! session may also come in a [cookie](crate::session); where none are, a cookie is not looked at.

use std::{future::poll_fn, net::IpAddr, pin::pin, sync::Arc, task::Poll};

use http::{HeaderMap, HeaderName, HeaderValue, Uri, header::AUTHORIZATION};
use ipnet::IpNet;
use paperkey_kit::{
    authn::Authenticator,
    clock::Clock,
    config::Tiers,
    incidents::Incidents,
    policy::{authorize, named_tenant},
    shed::{Errand, Places},
    token::TokenKind,
    values::rfc3339,
};
use paperkey_proto::{
    Error,
    errors::v1::Reason,
    options::v1::{Caller, Feature, RateClass},
    principal::v1::Principal,
};

use crate::{
    call::{Call, Told},
    credentials::wrong_kind,
    envelope::Refusal,
    limits::{Claims, Limits},
    session::{Outcome, Sender, Sessions},
    table::{Kinds, Rpc},
};

/// Where apps may put their key.
const API_KEY_HEADER: &str = "x-api-key";

/// What a call brings to the gate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival<'a> {
    pub(crate) rpc: &'a Rpc,
    /// The kinds of caller that are known where the call arrived.
    pub(crate) accepted: Kinds,
    /// Whether the credential may stand in `x-api-key`.
    pub(crate) api_key_header: bool,
    /// The team that the path names.
    pub(crate) team: Option<&'a str>,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) uri: &'a Uri,
    pub(crate) sessions: &'a Sessions,
}

/// The credential that a call is judged by.
pub(crate) struct Presented<'a> {
    pub(crate) credential: Result<Option<&'a str>, Refusal>,
    /// Whether it is, or should have been, a browser's cookie.
    by_cookie: bool,
}

impl<'a> Arrival<'a> {
    /// The one credential of the call. A cookie counts only where no other is sent, and where people are served.
    pub(crate) fn presented(&self) -> Presented<'a> {
        let credential = credential(self.headers, self.api_key_header);
        let serves_people = || self.accepted.has(Caller::Account) && self.rpc.method.serves(Caller::Account);
        if !matches!(credential, Ok(None)) || !self.sessions.are_sent(self.headers) || !serves_people() {
            return Presented { credential, by_cookie: false };
        }
        Presented { credential: self.sessions.session(self.sender()).map_err(sent), by_cookie: true }
    }

    /// What is to become of the session that the call makes or ends.
    fn asks_for(&self) -> Result<Outcome, Refusal> {
        match self.rpc.session_field {
            Some(field) => self.sessions.asked_for(self.sender(), field).map_err(Refusal::as_sent),
            None if self.rpc.ends_session => Ok(self.sessions.ended_for(self.sender())),
            None => Ok(Outcome::Shown),
        }
    }

    fn sender(&self) -> Sender<'a> {
        Sender { headers: self.headers, uri: self.uri }
    }
}

/// Judges calls.
#[derive(Clone)]
pub(crate) struct Gate {
    pub(crate) authenticator: Arc<dyn Authenticator>,
    pub(crate) clock: Clock,
    pub(crate) limits: Limits,
    pub(crate) tiers: Arc<Tiers>,
    pub(crate) incidents: Option<Arc<Incidents>>,
    pub(crate) billing_url: Option<String>,
    pub(crate) places: Option<Places>,
}

/// Why somebody does not pass, and what the attempt counts as.
struct Stopped {
    refusal: Refusal,
    claims: Box<Claims>,
    /// It is not the caller's doing: it is told where it stands, and nothing is counted.
    blameless: bool,
}

impl Gate {
    /// Lets a call pass, or says why not. It is counted, unless it counts by a field of its message: then it is counted
    /// by [`Self::count`], once that is known.
    pub(crate) async fn admit(&self, arrival: &Arrival<'_>, call: &mut Call) -> Result<(), Refusal> {
        let rpc = arrival.rpc;
        let judged = match arrival.asks_for() {
            Ok(outcome) => {
                call.session = outcome;
                if rpc.only_anyone { Ok(()) } else { self.judge(arrival, call).await }
            }
            Err(refusal) => Err(self.unknown(refusal, call)),
        };
        if let Err(stopped) = judged {
            return Err(self.stop(stopped, call).await);
        }
        if rpc.rate_field.is_some() { Ok(()) } else { self.count(rpc, None, call).await }
    }

    /// Counts a call that may pass, by a field of its message where the method says so and there is one.
    pub(crate) async fn count(&self, rpc: &Rpc, field: Option<&[u8]>, call: &mut Call) -> Result<(), Refusal> {
        let claims = self.limits.claims(&rpc.rate_classes, call.principal.as_deref(), call.client, field);
        Ok(self.limits.count(&claims, &mut call.told).await?)
    }

    /// Finds a place for a call that leads to a service or to none, before anything is spent on it. One for which there is
    /// none is not recorded: whoever makes more calls than can be answered would fill the record with them.
    pub(crate) fn make_room(&self, errand: Errand, service: Option<&str>, call: &mut Call) -> Result<(), Error> {
        let Some(places) = self.places.as_ref().filter(|_| call.place.is_none()) else { return Ok(()) };
        let place = places.take_towards(errand, service).inspect_err(|_| call.aside = true)?;
        call.place = Some(place);
        Ok(())
    }

    /// Reads what a call sends. Where that has not all come, the call gives its place back until it has: whoever sends
    /// slowly would keep others from being answered, and has not been counted yet where it counts by what it sends.
    pub(crate) async fn read<F: Future>(&self, rpc: &Rpc, reading: F, call: &mut Call) -> Result<F::Output, Error> {
        let mut reading = pin!(reading);
        if let Poll::Ready(read) = poll_fn(|context| Poll::Ready(reading.as_mut().poll(context))).await {
            return Ok(read);
        }
        let Some(places) = &self.places else { return Ok(reading.await) };
        call.place = None;
        let sender = places.wait_for(call.client).inspect_err(|_| call.aside = true)?;
        let read = reading.await;
        drop(sender);
        self.make_room(rpc.errand(), Some(rpc.owner()), call)?;
        Ok(read)
    }

    /// Counts a call that leads nowhere.
    pub(crate) async fn count_stray(&self, call: &mut Call) -> Result<(), Error> {
        self.make_room(Errand::Call, None, call)?;
        self.limits.count(&self.limits.claims_of_stranger(call.client), &mut call.told).await
    }

    /// Tells a caller where it stands whose call does not count.
    pub(crate) async fn look_at_stranger(&self, call: &mut Call) {
        self.limits.look(&self.limits.claims_of_stranger(call.client), &mut call.told).await;
    }

    async fn judge(&self, arrival: &Arrival<'_>, call: &mut Call) -> Result<(), Stopped> {
        let Presented { credential, by_cookie } = arrival.presented();
        let judged = self.judge_by(credential, arrival, call).await;
        if by_cookie {
            match &judged {
                // It would be sent for days, and never be any good.
                Err(stopped) if stopped.refusal.error.reason() == Reason::InvalidCredentials => {
                    arrival.sessions.forget(call);
                }
                // Who has a cookie that no script can read is not shown what it is.
                _ => call.session = arrival.rpc.session_field.map_or(call.session, Outcome::Kept),
            }
        }
        judged
    }

    async fn judge_by(
        &self,
        credential: Result<Option<&str>, Refusal>,
        arrival: &Arrival<'_>,
        call: &mut Call,
    ) -> Result<(), Stopped> {
        let rpc = arrival.rpc;
        let found = match credential {
            Ok(Some(credential)) => {
                self.holder(credential, arrival.headers, arrival.team, arrival.accepted).await.map(Some)
            }
            Ok(None) => Ok(None),
            Err(refusal) => Err(refusal),
        };
        let Some(principal) = found.map_err(|refusal| self.unknown(refusal, call))? else {
            let refusal = Refusal::from(Error::unauthenticated());
            return if rpc.method.serves(Caller::Anyone) { Ok(()) } else { Err(self.unknown(refusal, call)) };
        };
        self.known(&principal, Some(call.client), call)?;
        let judged = authorize(&rpc.method, &principal, self.clock.now_ms())
            .and_then(|()| self.included(&principal, rpc.method.policy.feature()));
        judged.map_err(|error| {
            let claims = self.limits.claims(&rpc.rate_classes, Some(&principal), call.client, None);
            Stopped { refusal: sent(error), claims: Box::new(claims), blameless: false }
        })
    }

    /// Somebody whose credential was good: whether it may be used from here, and what its holder should be told.
    fn known(&self, principal: &Arc<Principal>, client: Option<IpAddr>, call: &mut Call) -> Result<(), Stopped> {
        // A refusal is known to be this key's, but its limit is not used up by whoever has stolen it.
        call.principal = Some(Arc::clone(principal));
        let allowed = match client {
            Some(client) => allowed_from(principal, client),
            None if principal.allowlist.is_empty() => Ok(()),
            None => Err(Error::new(Reason::IpNotAllowed)),
        };
        allowed.map_err(|error| {
            let claims = self.limits.claims_of_refused(call.client);
            Stopped { refusal: sent(error), claims: Box::new(claims), blameless: false }
        })?;
        if let (Some(incidents), Some(client)) = (&self.incidents, client) {
            incidents.used(principal, client);
        }
        tell_of(principal, self.clock.now_ms(), &mut call.told);
        Ok(())
    }

    /// Nobody who is known: what the attempt counts as.
    fn unknown(&self, refusal: Refusal, call: &Call) -> Stopped {
        let reason = refusal.error.reason();
        let claims = if reason == Reason::InvalidCredentials && refusal.credential_sent {
            self.limits.claims_of_refused(call.client)
        } else {
            self.limits.claims_of_stranger(call.client)
        };
        // Nobody could be asked.
        let blameless = matches!(reason, Reason::Unavailable | Reason::Deadline | Reason::Internal);
        Stopped { refusal, claims: Box::new(claims), blameless }
    }

    /// Whether the team's tier includes what the call needs. The API itself is needed by every key.
    pub(crate) fn included(&self, principal: &Principal, feature: Feature) -> Result<(), Error> {
        let kind = principal.kind();
        if principal.team_id.is_empty() || matches!(kind, Caller::FreeKey | Caller::SystemKey) {
            return Ok(());
        }
        let tier = self.tiers.of_team(&principal.tier);
        let by_key = matches!(kind, Caller::TeamKey | Caller::UserToken);
        let needed = [(by_key, "api"), (feature == Feature::Webhooks, "webhooks")];
        match needed.into_iter().find(|(is_needed, feature)| *is_needed && !tier.features.contains(*feature)) {
            Some((_, feature)) => Err(self.upgrade(
                Error::new(Reason::FeatureNotInPlan)
                    .with_message(format!("The team's plan does not include this feature: {feature}")),
            )),
            None => Ok(()),
        }
    }

    /// Names the place where an upgrade can be bought, if there is one.
    pub(crate) fn upgrade(&self, error: Error) -> Error {
        let Some(url) = &self.billing_url else { return error };
        let agent_message = format!("{} The plan is changed at {url}", error.agent_message());
        let message = format!("{}. The plan is changed at {url}", error.message());
        error.with_message(message).with_agent_message(agent_message)
    }

    /// Whose a credential is. It must be good and of an accepted kind.
    async fn holder(
        &self,
        credential: &str,
        headers: &HeaderMap,
        team: Option<&str>,
        accepted: Kinds,
    ) -> Result<Arc<Principal>, Refusal> {
        // Told by its form, before anybody is asked: an answer must not tell whether such a credential exists.
        if let Some(kind) = kind_by_form(credential).filter(|kind| !accepted.has(*kind)) {
            return Err(sent(wrong_kind(kind, accepted)));
        }
        let (named, mode) = named_tenant(headers).map_err(Refusal::as_sent)?;
        let principal = self.authenticator.principal(credential, team.or(named), mode).await.map_err(sent)?;
        let kind = principal.kind();
        if accepted.has(kind) { Ok(principal) } else { Err(sent(wrong_kind(kind, accepted))) }
    }

    /// Whose the credential of these headers is, outside of any method. It must be good, of an accepted kind, and used
    /// from where it may be used; where the address is not known, one that is bound to some is refused. The call counts
    /// as one of the key; one without a credential is the caller's to judge, and counts by its address.
    pub(crate) async fn identify(
        &self,
        headers: &HeaderMap,
        accepted: Kinds,
        client: Option<IpAddr>,
        call: &mut Call,
    ) -> Result<Option<Arc<Principal>>, Refusal> {
        let found = match credential(headers, true) {
            Ok(Some(credential)) => self.holder(credential, headers, None, accepted).await,
            Ok(None) => {
                self.count_stray(call).await?;
                return Ok(None);
            }
            Err(refusal) => Err(refusal),
        };
        let stopped = match found {
            Err(refusal) => self.unknown(refusal, call),
            Ok(principal) => match self.outside(&principal, client, call) {
                Ok(()) => {
                    let claims = self.limits.claims(&[RateClass::PerKey], Some(&principal), call.client, None);
                    self.limits.count(&claims, &mut call.told).await?;
                    self.included(&principal, Feature::Unspecified).map_err(sent)?;
                    return Ok(Some(principal));
                }
                Err(stopped) => stopped,
            },
        };
        Err(self.stop(stopped, call).await)
    }

    /// Turns somebody away, who has then called once more.
    async fn stop(&self, stopped: Stopped, call: &mut Call) -> Refusal {
        if stopped.blameless {
            self.limits.look(&stopped.claims, &mut call.told).await;
            return stopped.refusal;
        }
        match self.limits.count(&stopped.claims, &mut call.told).await {
            Ok(()) => stopped.refusal,
            Err(limited) => limited.into(),
        }
    }

    fn outside(&self, principal: &Arc<Principal>, client: Option<IpAddr>, call: &mut Call) -> Result<(), Stopped> {
        if principal.expires_at_ms != 0 && principal.expires_at_ms <= self.clock.now_ms() {
            return Err(self.unknown(sent(Error::unauthenticated()), call));
        }
        self.known(principal, client, call)
    }
}

/// A refusal of what was sent as a credential.
fn sent(error: Error) -> Refusal {
    Refusal { credential_sent: true, ..error.into() }
}

/// The kind of caller that a credential claims to be of, whether it is good or not.
fn kind_by_form(credential: &str) -> Option<Caller> {
    // The parts of a session are told by dots, which no key has.
    if credential.contains('.') {
        return Some(Caller::Account);
    }
    TokenKind::claimed_by(credential).map(|kind| match kind {
        TokenKind::TeamLive | TokenKind::TeamTest | TokenKind::PlatformLive | TokenKind::PlatformTest => {
            Caller::TeamKey
        }
        TokenKind::Free => Caller::FreeKey,
        TokenKind::System => Caller::SystemKey,
        TokenKind::User => Caller::UserToken,
        TokenKind::ProductPublic => Caller::ProductPublicKey,
        TokenKind::ProductSecret => Caller::ProductSecretKey,
    })
}

/// Refuses an address that the credential may not be used from.
pub(crate) fn allowed_from(principal: &Principal, client: IpAddr) -> Result<(), Error> {
    let within = |network: &String| network.parse::<IpNet>().is_ok_and(|network| network.contains(&client));
    if principal.allowlist.is_empty() || principal.allowlist.iter().any(within) {
        Ok(())
    } else {
        Err(Error::new(Reason::IpNotAllowed))
    }
}

/// Tells the holder of a credential of its end.
fn tell_of(principal: &Principal, now_ms: i64, told: &mut Told) {
    let mut tell = |name, at_ms| {
        if let Ok(time) = HeaderValue::from_str(&rfc3339(at_ms)) {
            told.tell(HeaderName::from_static(name), time);
        }
    };
    if principal.superseded && principal.expires_at_ms != 0 {
        tell("paperkey-key-expires", principal.expires_at_ms);
    }
    if principal.rotation_due_at_ms != 0 && principal.rotation_due_at_ms <= now_ms {
        tell("paperkey-key-rotation-due", principal.rotation_due_at_ms);
    }
}

/// The one credential of a call, if it brings one in a header of its own.
fn credential(headers: &HeaderMap, api_key_header: bool) -> Result<Option<&str>, Refusal> {
    let bearer = single(headers, &AUTHORIZATION)?.map(|value| bearer(value).ok_or_else(no_good)).transpose()?;
    if !api_key_header {
        return Ok(bearer);
    }
    let api_key = single(headers, &HeaderName::from_static(API_KEY_HEADER))?
        .map(|value| Some(value.trim()).filter(|key| is_token(key)).ok_or_else(no_good))
        .transpose()?;
    match (bearer, api_key) {
        // Which of the two is meant is not ours to guess.
        (Some(one), Some(other)) if one != other => Err(no_good()),
        (one, other) => Ok(one.or(other)),
    }
}

/// The value of a header that may be there once.
fn single<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Result<Option<&'h str>, Refusal> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(no_good());
    }
    value.to_str().map(Some).map_err(|_| no_good())
}

fn bearer(value: &str) -> Option<&str> {
    let (scheme, credential) = value.trim().split_once(' ')?;
    let credential = credential.trim();
    (scheme.eq_ignore_ascii_case("bearer") && is_token(credential)).then_some(credential)
}

fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())
}

fn no_good() -> Refusal {
    Refusal { credential_sent: true, ..Error::unauthenticated().into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(headers: &[(&'static str, &'static str)], api_key_header: bool) -> Result<Option<String>, ()> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(*name, HeaderValue::from_static(value));
        }
        credential(&map, api_key_header).map(|found| found.map(str::to_owned)).map_err(|refusal| {
            assert!(refusal.credential_sent);
        })
    }

    #[test]
    fn a_credential_is_a_bearer_token_or_where_apps_call_an_api_key() {
        let key = |text: &str| Ok(Some(text.to_owned()));
        assert_eq!(found(&[], true), Ok(None));
        assert_eq!(found(&[("authorization", "Bearer pk_1")], false), key("pk_1"));
        assert_eq!(found(&[("authorization", "bEARER   pk_1 ")], false), key("pk_1"));
        assert_eq!(found(&[("x-api-key", "pk_1")], true), key("pk_1"));
        assert_eq!(found(&[("x-api-key", "pk_1")], false), Ok(None));
        assert_eq!(found(&[("x-api-key", "pk_1"), ("authorization", "Bearer pk_1")], true), key("pk_1"));
    }

    #[test]
    fn anything_else_is_no_good() {
        for value in ["pk_1", "Bearer", "Bearer ", "Bearer a b", "Basic dTpw", "", "Bearerpk_1"] {
            assert_eq!(found(&[("authorization", value)], true), Err(()), "{value}");
        }
        assert_eq!(found(&[("x-api-key", "")], true), Err(()));
        assert_eq!(found(&[("x-api-key", "pk_1"), ("authorization", "Bearer pk_2")], true), Err(()));
        assert_eq!(found(&[("authorization", "Bearer a"), ("authorization", "Bearer a")], true), Err(()));
        assert_eq!(found(&[("x-api-key", "a"), ("x-api-key", "a")], true), Err(()));
    }
}
