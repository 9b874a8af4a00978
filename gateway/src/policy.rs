//! Who may pass: the credential of a call, whose it is, and whether the method is theirs.
//!
//! The judgement itself is the kit's, and services repeat it. Here the credential is found and exchanged, and kinds
//! of caller that a surface does not know are turned away as if they were strangers.

use std::{net::IpAddr, sync::Arc};

use async_trait::async_trait;
use http::{HeaderMap, HeaderName, HeaderValue, header::AUTHORIZATION};
use paperkey_kit::{authn::Authenticator, clock::Clock, policy::authorize, principal::mode_of};
use paperkey_proto::{
    Error,
    contract::Method,
    options::v1::{Caller, Surface},
    principal::v1::{Mode, Principal},
};

use crate::{
    envelope::Refusal,
    table::{Kinds, Rpc},
};

/// The team that an account means.
const TEAM_HEADER: &str = "paperkey-team";
/// The mode that an account means.
const MODE_HEADER: &str = "paperkey-mode";
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
        let principal = if rpc.only_anyone { None } else { self.principal(arrival).await? };
        let headers = match &self.limiter {
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
        Ok(Admitted { principal, headers })
    }

    async fn principal(&self, arrival: &Arrival<'_>) -> Result<Option<Arc<Principal>>, Refusal> {
        let method = &arrival.rpc.method;
        let Some(credential) = credential(arrival.headers, arrival.api_key_header)? else {
            return if method.serves(Caller::Anyone) { Ok(None) } else { Err(Error::unauthenticated().into()) };
        };
        let team = match arrival.headers.get(TEAM_HEADER) {
            Some(team) => Some(team.to_str().map_err(|_| at_header("Paperkey-Team", "must be the id of a team"))?),
            None => None,
        };
        let mode = match arrival.headers.get(MODE_HEADER) {
            Some(word) => word
                .to_str()
                .ok()
                .and_then(mode_of)
                .ok_or_else(|| at_header("Paperkey-Mode", "must be one of live, test"))?,
            None => Mode::Unspecified,
        };
        let sent = |error: Error| Refusal { credential_sent: true, ..error.into() };
        let principal = self.authenticator.authenticate(credential, team, mode).await.map_err(sent)?;
        if !arrival.accepted.has(principal.kind()) {
            let message = "This kind of credential is not accepted here";
            return Err(sent(Error::unauthenticated().with_message(message)));
        }
        authorize(method, &principal, self.clock.now_ms()).map_err(sent)?;
        Ok(Some(principal))
    }
}

fn at_header(name: &str, message: &str) -> Refusal {
    Refusal::as_sent(Error::field(name, message))
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
