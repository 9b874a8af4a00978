//! `/v1/authz`: a proxy asks whether the request that it holds may pass.
//!
//! The proxy sends the headers of that request. It answers its caller by what is said here: 200 lets the request pass,
//! with the identity in headers, and anything else is the answer that the caller gets. The body is never looked at.
//!
//! `scope` names what the credential must be allowed to do. `deny=403` is for nginx, whose `auth_request` makes a 500
//! of everything but 401 and 403: other refusals then come as 403, with the real status in `Paperkey-Status`. `meter`
//! and `cost` name units that the call takes of its team's month. Names that are not known are refused.

use std::net::SocketAddr;

use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode, request::Parts as Head};
use paperkey_kit::{config::Tiers, telemetry};
use paperkey_proto::{Error, errors::v1::Reason};

use super::{COST, Terms, TermsRead, identity, is_read, judge};
use crate::{
    Inner,
    body::Body,
    call::Call,
    edge,
    envelope::Refusal,
    transcode::{pairs, percent_decoded},
};

/// Where proxies ask.
pub(crate) const PATH: &str = "/v1/authz";

/// The status that a refusal would have had.
const REAL_STATUS: HeaderName = HeaderName::from_static("paperkey-status");

/// Where proxies say by which verb they were called.
const VERB_HEADERS: [&str; 2] = ["x-forwarded-method", "x-original-method"];

/// Where proxies say what they were called for.
const URI_HEADERS: [&str; 3] = ["x-forwarded-uri", "x-original-uri", "x-original-url"];

/// The name by which a proxy says that it can carry only 401 and 403.
const DENY: &str = "deny";

/// The longest name of a query that is repeated to the caller.
const MAX_ECHO_CHARS: usize = 64;

/// What the proxy wants to know.
#[derive(Debug, Default)]
struct Question {
    terms: Terms,
    /// Whether only 401 and 403 can be carried.
    deny: bool,
}

/// Answers a proxy.
pub(crate) async fn answer(
    gateway: &Inner,
    head: &Head,
    body_unread: bool,
    peer: SocketAddr,
    call: &mut Call,
) -> Response<Body> {
    call.span.name(|| format!("{} {PATH}", telemetry::verb(&head.method)));
    call.span.set("http.route", || PATH);
    let (question, fault) = Question::read(head.uri.query(), &gateway.config.tiers);
    let trusted = gateway.trusts(peer);
    let writes = if trusted { writes(&head.headers) } else { None };
    let judged = if let Some(fault) = fault {
        let counted = gateway.gate.count_stray(call).await;
        Err(counted.map_or_else(Refusal::from, |()| Refusal::as_sent(fault)))
    } else {
        let client = Some(call.client);
        judge(gateway, &head.headers, client, &question.terms, writes, call).await
    };
    let mut response = match judged {
        Ok(principal) => {
            let mut response = Response::new(Body::empty());
            response.headers_mut().extend(identity(&principal));
            response
        }
        Err(refusal) => {
            call.failed(&refusal.error);
            let path = if trusted { original_path(&head.headers) } else { None };
            gateway.doorman(path.unwrap_or(PATH), &head.headers, &call.request_id).tell(&refusal)
        }
    };
    call.told.put_on(response.headers_mut());
    let status = response.status();
    if question.deny && !matches!(status, StatusCode::OK | StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        response.headers_mut().insert(REAL_STATUS, HeaderValue::from(status.as_u16()));
        *response.status_mut() = StatusCode::FORBIDDEN;
    }
    if body_unread {
        edge::hang_up(head.version, response.headers_mut());
    }
    response
}

impl Question {
    /// What was understood, and what was not.
    fn read(query: Option<&str>, tiers: &Tiers) -> (Self, Option<Error>) {
        let mut question = Self::default();
        let mut terms = TermsRead::default();
        let mut fault: Option<Error> = None;
        let mut blame = |name: &str, wrong: &'static str| {
            let error = fault.take().unwrap_or_else(|| Error::new(Reason::ValidationFailed));
            fault = Some(error.with_violation(name.chars().take(MAX_ECHO_CHARS).collect::<String>(), wrong));
        };
        let mut seen = Vec::new();
        for (raw, value) in pairs(query.unwrap_or_default()) {
            let name = percent_decoded(raw, true).unwrap_or_else(|| raw.into());
            let value = percent_decoded(value, true);
            let wrong = match (&*name, value.as_deref()) {
                (known, _) if seen.iter().any(|other| other == known) && (known == DENY || TermsRead::knows(known)) => {
                    Some("is there twice")
                }
                (known, Some(value)) if TermsRead::knows(known) => terms.read(known, value, tiers).err(),
                (known, None) if TermsRead::knows(known) => Some("must be valid UTF-8, percent-encoded"),
                (DENY, Some("403")) => {
                    question.deny = true;
                    None
                }
                (DENY, _) => Some("must be 403"),
                _ => Some("unknown query parameter"),
            };
            if let Some(wrong) = wrong {
                blame(&name, wrong);
            }
            seen.push(name.into_owned());
        }
        if let Some(wrong) = terms.fault_of_cost() {
            blame(COST, wrong);
        }
        question.terms = terms.terms();
        (question, fault)
    }
}

/// Whether the original request writes; none where its verb is not said. Of several verbs any may be the real one.
fn writes(headers: &HeaderMap) -> Option<bool> {
    let mut said = VERB_HEADERS.iter().flat_map(|name| headers.get_all(*name)).peekable();
    said.peek()?;
    Some(said.any(|verb| !verb.to_str().is_ok_and(|verb| is_read(verb.trim()))))
}

/// The path of the original request.
fn original_path(headers: &HeaderMap) -> Option<&str> {
    let said = URI_HEADERS.iter().find_map(|name| headers.get(*name))?.to_str().ok()?;
    let path = match said.split_once("://") {
        Some((_, rest)) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => said,
    };
    path.split(['?', '#']).next().filter(|path| path.starts_with('/'))
}

#[cfg(test)]
mod tests {
    use paperkey_proto::options::v1::Scope;

    use super::*;

    fn fields(query: &str) -> Vec<String> {
        let (_, fault) = Question::read(Some(query), &Tiers::default());
        fault.map_or_else(Vec::new, |fault| fault.violations().iter().map(|v| v.field.clone()).collect())
    }

    #[test]
    fn a_question_is_understood_whole_or_refused() {
        let read = |query| Question::read(query, &Tiers::default());
        let (question, fault) = read(Some("scope=licenses%3Aread&deny=403&meter=renders"));
        assert!(fault.is_none() && question.deny && question.terms.scope == Some(Scope::LicensesRead));
        assert_eq!(question.terms.meter, Some(("renders".to_owned(), 1)));
        assert_eq!(read(Some("meter=renders&cost=0")).0.terms.meter, Some(("renders".to_owned(), 0)));
        assert!(read(None).1.is_none() && read(Some("")).1.is_none());
        assert_eq!(fields("cost=1"), ["cost"]);
        assert_eq!(fields("meter=moons&cost=-1"), ["meter", "cost"]);
        assert_eq!(fields("scop=licenses:read"), ["scop"]);
        for query in ["scope=", "scope=licenses", "scope=%ff", "scope", "scope=licenses:read&scope=keys:read"] {
            assert_eq!(fields(query), ["scope"], "{query}");
        }
        for query in ["deny=", "deny=401", "deny=403&deny=403"] {
            assert_eq!(fields(query), ["deny"], "{query}");
        }
    }

    #[test]
    fn of_several_verbs_any_may_be_the_real_one() {
        let of = |said: &[(&'static str, &'static str)]| {
            let mut headers = HeaderMap::new();
            for (name, value) in said {
                headers.append(*name, HeaderValue::from_static(value));
            }
            writes(&headers)
        };
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[("x-forwarded-method", "GET")]), Some(false));
        assert_eq!(of(&[("x-original-method", "HEAD"), ("x-forwarded-method", "OPTIONS")]), Some(false));
        assert_eq!(of(&[("x-original-method", "POST"), ("x-forwarded-method", "GET")]), Some(true));
        assert_eq!(of(&[("x-forwarded-method", "GET"), ("x-forwarded-method", "DELETE")]), Some(true));
        for odd in ["", "get", "GET, POST", "PROPFIND"] {
            assert_eq!(of(&[("x-forwarded-method", odd)]), Some(true), "{odd}");
        }
    }

    #[test]
    fn the_original_path_is_read_without_its_query() {
        let of = |value: &'static str| {
            let headers =
                HeaderMap::from_iter([(HeaderName::from_static("x-original-url"), HeaderValue::from_static(value))]);
            original_path(&headers).map(str::to_owned)
        };
        assert_eq!(of("https://api.example/a/b?c=d").as_deref(), Some("/a/b"));
        assert_eq!(of("/a?b").as_deref(), Some("/a"));
        assert_eq!(of("https://api.example").as_deref(), Some("/"));
        assert_eq!(of("nonsense"), None);
    }
}
