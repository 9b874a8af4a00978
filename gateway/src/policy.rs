//! Who may pass: the credential of a call, whose it is, and whether the method is theirs.
//!
//! The judgement itself is the kit's, and services repeat it. Here the credential is found and exchanged, and kinds
//! of caller that a surface does not know are turned away as if they were strangers.

use std::{net::IpAddr, sync::Arc};

use async_trait::async_trait;
use http::{HeaderMap, HeaderName, HeaderValue, header::AUTHORIZATION};
use ipnet::IpNet;
use paperkey_kit::{
    authn::Authenticator,
    clock::Clock,
    policy::{authorize, named_tenant},
    token::TokenKind,
    values::rfc3339,
};
use paperkey_proto::{
    Error,
    contract::Method,
    errors::v1::Reason,
    options::v1::{Caller, Surface},
    principal::v1::Principal,
};

use crate::{
    envelope::Refusal,
    table::{Kinds, Rpc},
};

/// Where apps may put their key.
const API_KEY_HEADER: &str = "x-api-key";

/// Decides whether a call is one too many.
#[async_trait]
pub trait Limiter: Send + Sync {
    /// Counts the call, and answers with the headers that tell the caller what is left.
    async fn check(&self, call: &LimitedCall<'_>) -> Result<Vec<(HeaderName, HeaderValue)>, Error>;
}

/// What a limit may count by.
#[derive(Clone, Copy, Debug)]
pub struct LimitedCall<'a> {
    /// The method that is called.
    pub method: &'a Method,
    /// The surface; none for gRPC.
    pub surface: Option<Surface>,
    /// Who calls; nobody in particular where no credential was needed.
    pub principal: Option<&'a Principal>,
    /// Where the call comes from.
    pub client: IpAddr,
}

/// What a call brings to the gate.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Arrival<'a> {
    pub(crate) rpc: &'a Rpc,
    pub(crate) surface: Option<Surface>,
    /// The kinds of caller that are known where the call arrived.
    pub(crate) accepted: Kinds,
    /// Whether the credential may stand in `x-api-key`.
    pub(crate) api_key_header: bool,
    /// The team that the path names.
    pub(crate) team: Option<&'a str>,
    pub(crate) headers: &'a HeaderMap,
    pub(crate) client: IpAddr,
}

/// A call that may pass.
#[derive(Debug)]
pub(crate) struct Admitted {
    pub(crate) principal: Option<Arc<Principal>>,
    /// What the limiter says of the call.
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
}

/// Judges calls.
#[derive(Clone)]
pub(crate) struct Gate {
    pub(crate) authenticator: Arc<dyn Authenticator>,
    pub(crate) clock: Clock,
    pub(crate) limiter: Option<Arc<dyn Limiter>>,
}

impl Gate {
    /// Lets a call pass, or says why not.
    pub(crate) async fn admit(&self, arrival: &Arrival<'_>) -> Result<Admitted, Refusal> {
        let rpc = arrival.rpc;
        let now_ms = self.clock.now_ms();
        let principal = if rpc.only_anyone { None } else { self.principal(arrival, now_ms).await? };
        let mut headers = match &self.limiter {
            Some(limiter) => {
                let call = LimitedCall {
                    method: &rpc.method,
                    surface: arrival.surface,
                    principal: principal.as_deref(),
                    client: arrival.client,
                };
                limiter.check(&call).await?
            }
            None => Vec::new(),
        };
        if let Some(principal) = &principal {
            headers.extend(told_of(principal, now_ms));
        }
        Ok(Admitted { principal, headers })
    }

    async fn principal(&self, arrival: &Arrival<'_>, now_ms: i64) -> Result<Option<Arc<Principal>>, Refusal> {
        let method = &arrival.rpc.method;
        let Some(principal) =
            self.holder(arrival.headers, arrival.api_key_header, arrival.team, arrival.accepted).await?
        else {
            return if method.serves(Caller::Anyone) { Ok(None) } else { Err(Error::unauthenticated().into()) };
        };
        allowed_from(&principal, arrival.client).map_err(sent)?;
        authorize(method, &principal, now_ms).map_err(sent)?;
        Ok(Some(principal))
    }

    /// Whose the credential of these headers is, if there is one. It must be good and of an accepted kind.
    async fn holder(
        &self,
        headers: &HeaderMap,
        api_key_header: bool,
        team: Option<&str>,
        accepted: Kinds,
    ) -> Result<Option<Arc<Principal>>, Refusal> {
        let Some(credential) = credential(headers, api_key_header)? else { return Ok(None) };
        // Told by its form, before anybody is asked: an answer must not tell whether such a credential exists.
        if kind_by_form(credential).is_some_and(|kind| !accepted.has(kind)) {
            let message = "This kind of credential is not accepted here";
            return Err(sent(Error::unauthenticated().with_message(message)));
        }
        let (named, mode) = named_tenant(headers).map_err(Refusal::as_sent)?;
        let principal = self.authenticator.principal(credential, team.or(named), mode).await.map_err(sent)?;
        if accepted.has(principal.kind()) { Ok(Some(principal)) } else { Err(sent(Error::unauthenticated())) }
    }
}

/// Whose a credential is, outside of any method.
#[derive(Debug)]
pub(crate) struct Identified {
    pub(crate) principal: Arc<Principal>,
    /// What its holder should be told.
    pub(crate) headers: Vec<(HeaderName, HeaderValue)>,
}

impl Gate {
    /// Whose the credential of these headers is, if there is one. It must be good, of an accepted kind, and used from
    /// where it may be used; where the address is not known, one that is bound to some is refused.
    pub(crate) async fn identify(
        &self,
        headers: &HeaderMap,
        accepted: Kinds,
        client: Option<IpAddr>,
    ) -> Result<Option<Identified>, Refusal> {
        let Some(principal) = self.holder(headers, true, None, accepted).await? else { return Ok(None) };
        let now_ms = self.clock.now_ms();
        if principal.expires_at_ms != 0 && principal.expires_at_ms <= now_ms {
            return Err(sent(Error::unauthenticated()));
        }
        match client {
            Some(client) => allowed_from(&principal, client).map_err(sent)?,
            None if principal.allowlist.is_empty() => {}
            None => return Err(sent(Error::new(Reason::IpNotAllowed))),
        }
        let headers = told_of(&principal, now_ms);
        Ok(Some(Identified { principal, headers }))
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

/// What the holder of a credential should know of its end.
fn told_of(principal: &Principal, now_ms: i64) -> Vec<(HeaderName, HeaderValue)> {
    let mut headers = Vec::new();
    let mut tell = |name, at_ms| {
        if let Ok(time) = HeaderValue::from_str(&rfc3339(at_ms)) {
            headers.push((HeaderName::from_static(name), time));
        }
    };
    if principal.superseded && principal.expires_at_ms != 0 {
        tell("paperkey-key-expires", principal.expires_at_ms);
    }
    if principal.rotation_due_at_ms != 0 && principal.rotation_due_at_ms <= now_ms {
        tell("paperkey-key-rotation-due", principal.rotation_due_at_ms);
    }
    headers
}

/// The one credential of a call, if it brings one.
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
