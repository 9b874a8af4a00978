//! Errors as callers see them: the three envelopes of the surfaces, and RFC 9457.
//!
//! Nobody else writes an error body. What failed inside an internal error is logged here and told to nobody.

use http::{
    HeaderMap, HeaderValue, Response, StatusCode,
    header::{ACCEPT, ALLOW, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
};
use paperkey_proto::{
    Error,
    errors::v1::Reason,
    options::v1::{Envelope, LetterCase, SurfaceOptions},
};

use crate::{
    body::Body,
    transcode::{camel_case, put_text},
};

/// The media type of RFC 9457.
const PROBLEM: &str = "application/problem+json";

/// A call that is refused, and what the answer must say beside the error.
#[derive(Debug)]
pub(crate) struct Refusal {
    pub(crate) error: Box<Error>,
    /// Whether a credential was sent, so that a 401 can say it was no good (RFC 6750).
    pub(crate) credential_sent: bool,
    /// Whether the fields at fault are named as the caller named them, not as the contract does.
    pub(crate) as_sent: bool,
    /// The verbs that the path takes.
    pub(crate) allow: Option<HeaderValue>,
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self { error: Box::new(error), credential_sent: false, as_sent: false, allow: None }
    }
}

impl Refusal {
    /// The path does not take the verb.
    pub(crate) fn other_verb(allow: HeaderValue) -> Self {
        Self { allow: Some(allow), ..Error::new(Reason::MethodNotAllowed).into() }
    }

    /// A fault in what was sent, in the caller's own names.
    pub(crate) fn as_sent(error: Error) -> Self {
        Self { as_sent: true, ..error.into() }
    }
}

/// What an answer about an error depends on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Teller<'a> {
    /// The surface of the path; outside of all surfaces errors are flat.
    pub(crate) surface: Option<&'a SurfaceOptions>,
    pub(crate) request_id: &'a str,
    pub(crate) public_url: &'a str,
    pub(crate) path: &'a str,
    /// Whether the caller asked for `application/problem+json`.
    pub(crate) problem: bool,
}

impl Teller<'_> {
    /// The answer to a refused call.
    pub(crate) fn tell(&self, refusal: &Refusal) -> Response<Body> {
        let error = &refusal.error;
        if let Some(source) = error.source() {
            let reason = error.reason().as_str_name();
            tracing::error!(reason, error = %source, request_id = self.request_id, "call failed");
        }
        let status = status_of(error);
        let (media_type, body) = if self.problem {
            (PROBLEM, self.problem(refusal, status))
        } else {
            ("application/json", self.body(refusal))
        };
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(media_type));
        if status == StatusCode::UNAUTHORIZED {
            let challenge = if refusal.credential_sent { "Bearer error=\"invalid_token\"" } else { "Bearer" };
            headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        if let Some(wait) = error.retry_after() {
            // Rounded up: a caller who comes back a moment early is refused again.
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if let Some(allow) = &refusal.allow {
            headers.insert(ALLOW, allow.clone());
        }
        response
    }

    fn body(&self, refusal: &Refusal) -> Vec<u8> {
        let (error, entry) = (&*refusal.error, refusal.error.entry());
        let mut out = Members::with_capacity(512);
        match self.envelope() {
            Envelope::Typed => {
                out.open("error");
                out.text("type", &entry.r#type);
                out.text("code", &entry.typed_code);
                out.text("message", error.message());
                self.details(&mut out, refusal);
                out.text("request_id", self.request_id);
                out.close();
            }
            Envelope::Agent => {
                out.open("error");
                out.text("code", &entry.agent_code);
                out.text("type", &entry.r#type);
                out.text("human_message", error.message());
                out.text("agent_message", error.agent_message());
                out.text("docs_url", &self.docs_url(error));
                out.flag("retryable", entry.retryable);
                self.details(&mut out, refusal);
                out.text("request_id", self.request_id);
                out.close();
            }
            Envelope::Flat | Envelope::Unspecified => {
                out.text("error", &entry.flat_code);
                out.text("message", error.message());
                self.details(&mut out, refusal);
                out.text("requestId", self.request_id);
            }
        }
        out.finish()
    }

    fn problem(&self, refusal: &Refusal, status: StatusCode) -> Vec<u8> {
        let (error, entry) = (&*refusal.error, refusal.error.entry());
        let code = match self.envelope() {
            Envelope::Typed => &entry.typed_code,
            Envelope::Agent => &entry.agent_code,
            Envelope::Flat | Envelope::Unspecified => &entry.flat_code,
        };
        let mut out = Members::with_capacity(768);
        out.text("type", &self.docs_url(error));
        out.text("title", &entry.message);
        out.raw("status", status.as_str());
        out.text("detail", error.message());
        out.text("instance", self.path);
        out.text("code", code);
        out.text("agent_message", error.agent_message());
        out.flag("retryable", entry.retryable);
        self.details(&mut out, refusal);
        out.text("request_id", self.request_id);
        out.finish()
    }

    fn details(&self, out: &mut Members, refusal: &Refusal) {
        let violations = refusal.error.violations();
        if violations.is_empty() {
            return;
        }
        let camel = !refusal.as_sent && self.surface.is_some_and(|options| options.request_case() == LetterCase::Camel);
        out.name("details");
        out.0.push(b'[');
        for (index, violation) in violations.iter().enumerate() {
            if index > 0 {
                out.0.push(b',');
            }
            out.0.push(b'{');
            if camel {
                out.text("field", &camel_case(&violation.field));
            } else {
                out.text("field", &violation.field);
            }
            out.text("message", &violation.message);
            out.0.push(b'}');
        }
        out.0.push(b']');
    }

    fn envelope(&self) -> Envelope {
        self.surface.map_or(Envelope::Flat, SurfaceOptions::envelope)
    }

    fn docs_url(&self, error: &Error) -> String {
        format!("{}/docs/errors/{}", self.public_url, error.entry().agent_code)
    }
}

/// Whether the caller would rather have `application/problem+json`.
pub(crate) fn asks_for_problem(headers: &HeaderMap) -> bool {
    headers.get_all(ACCEPT).iter().filter_map(|value| value.to_str().ok()).flat_map(|value| value.split(',')).any(
        |range| {
            let mut parts = range.split(';').map(str::trim);
            parts.next().is_some_and(|media_type| media_type.eq_ignore_ascii_case(PROBLEM))
                && !parts.any(|parameter| matches!(parameter, "q=0" | "q=0.0" | "q=0.00" | "q=0.000"))
        },
    )
}

/// The HTTP status of an error.
pub(crate) fn status_of(error: &Error) -> StatusCode {
    u16::try_from(error.entry().http_status)
        .ok()
        .filter(|code| *code >= 400)
        .and_then(|code| StatusCode::from_u16(code).ok())
        .unwrap_or(StatusCode::INTERNAL_SERVER_ERROR)
}

/// A JSON object that is being written.
struct Members(Vec<u8>);

impl Members {
    fn with_capacity(bytes: usize) -> Self {
        let mut out = Vec::with_capacity(bytes);
        out.push(b'{');
        Self(out)
    }

    fn name(&mut self, name: &str) {
        if !matches!(self.0.last(), Some(b'{')) {
            self.0.push(b',');
        }
        put_text(&mut self.0, name.as_bytes());
        self.0.push(b':');
    }

    fn text(&mut self, name: &str, text: &str) {
        self.name(name);
        put_text(&mut self.0, text.as_bytes());
    }

    fn flag(&mut self, name: &str, flag: bool) {
        self.raw(name, if flag { "true" } else { "false" });
    }

    fn raw(&mut self, name: &str, json: &str) {
        self.name(name);
        self.0.extend_from_slice(json.as_bytes());
    }

    fn open(&mut self, name: &str) {
        self.name(name);
        self.0.push(b'{');
    }

    fn close(&mut self) {
        self.0.push(b'}');
    }

    fn finish(mut self) -> Vec<u8> {
        self.close();
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use paperkey_proto::{Contract, options::v1::Surface};
    use serde_json::{Value as Json, json};

    use super::*;

    fn teller(surface: Option<Surface>) -> Teller<'static> {
        let entries = Contract::get().surfaces();
        Teller {
            surface: surface
                .and_then(|wanted| entries.iter().find(|entry| entry.surface == wanted))
                .map(|e| &e.options),
            request_id: "req_1",
            public_url: "https://keys.example",
            path: "/some/path",
            problem: false,
        }
    }

    async fn told(teller: Teller<'_>, refusal: Refusal) -> (http::response::Parts, Json) {
        use http_body_util::BodyExt as _;
        let (parts, body) = teller.tell(&refusal).into_parts();
        (parts, serde_json::from_slice(&body.collect().await.unwrap().to_bytes()).unwrap())
    }

    fn violation() -> Refusal {
        Error::field("price.unit_price", "must be \"x\"").into()
    }

    #[tokio::test]
    async fn the_dashboard_is_told_flatly_in_camel_case() {
        let (parts, json) = told(teller(Some(Surface::Dashboard)), violation()).await;
        assert_eq!(parts.status, 400);
        assert_eq!(parts.headers["content-type"], "application/json");
        assert_eq!(
            json,
            json!({
                "error": "validation_error", "message": "Invalid request data",
                "details": [{"field": "price.unitPrice", "message": "must be \"x\""}], "requestId": "req_1",
            })
        );
    }

    #[tokio::test]
    async fn the_app_is_told_flatly_in_the_names_of_its_requests() {
        let (_, json) = told(teller(Some(Surface::Client)), Error::field("license_key", "is required").into()).await;
        assert_eq!(json["details"][0]["field"], "license_key");
        let sent = Refusal::as_sent(Error::field("li_cense", "unknown field"));
        let (_, json) = told(teller(Some(Surface::Dashboard)), sent).await;
        assert_eq!(json["details"][0]["field"], "li_cense");
    }

    #[tokio::test]
    async fn integrations_are_told_a_type_and_a_code() {
        let (parts, json) = told(teller(Some(Surface::Team)), Error::unauthenticated().into()).await;
        assert_eq!(parts.status, 401);
        assert_eq!(parts.headers["www-authenticate"], "Bearer");
        assert_eq!(
            json,
            json!({"error": {
                "type": "authentication_error", "code": "invalid_token",
                "message": "Invalid or missing API token", "request_id": "req_1",
            }})
        );
        let (_, json) = told(teller(Some(Surface::Team)), violation()).await;
        assert_eq!(json["error"]["details"][0]["field"], "price.unit_price");
    }

    #[tokio::test]
    async fn agents_are_told_what_to_do_next() {
        let limited = Error::new(Reason::RateLimited).with_retry_after(Duration::from_millis(1_001));
        let (parts, json) = told(teller(Some(Surface::Platform)), limited.into()).await;
        assert_eq!(parts.headers["retry-after"], "2");
        assert_eq!(
            json,
            json!({"error": {
                "code": "PB_RATE_LIMIT_EXCEEDED", "type": "rate_limit_error", "human_message": "Too many requests",
                "agent_message": "Wait for the number of seconds in Retry-After (over gRPC: the delay in RetryInfo) and send \
                                  the request again.",
                "docs_url": "https://keys.example/docs/errors/PB_RATE_LIMIT_EXCEEDED", "retryable": true,
                "request_id": "req_1",
            }})
        );
    }

    #[tokio::test]
    async fn problem_details_carry_the_same() {
        let teller = Teller { problem: true, ..teller(Some(Surface::Platform)) };
        let (parts, json) = told(teller, Error::not_found("key").into()).await;
        assert_eq!(parts.headers["content-type"], "application/problem+json");
        assert_eq!(json["type"], "https://keys.example/docs/errors/PB_NOT_FOUND");
        assert_eq!((&json["status"], &json["instance"]), (&json!(404), &json!("/some/path")));
        assert_eq!((&json["title"], &json["detail"]), (&json!("No such resource"), &json!("No such key")));
        assert_eq!((&json["code"], &json["retryable"]), (&json!("PB_NOT_FOUND"), &json!(false)));
        assert!(json["agent_message"].is_string() && json["request_id"] == "req_1");
    }

    #[tokio::test]
    async fn an_error_may_know_better_than_the_catalogue_what_to_do() {
        let refusal = || Error::unauthenticated().with_agent_message("Ask for the \"right\" password.").into();
        let (_, json) = told(teller(Some(Surface::Platform)), refusal()).await;
        assert_eq!(json["error"]["agent_message"], "Ask for the \"right\" password.");
        let problem = Teller { problem: true, ..teller(Some(Surface::Dashboard)) };
        assert_eq!(told(problem, refusal()).await.1["agent_message"], "Ask for the \"right\" password.");
    }

    #[tokio::test]
    async fn what_failed_inside_stays_inside() {
        let (parts, json) = told(teller(None), Error::internal("the password is hunter2").into()).await;
        assert_eq!(parts.status, 500);
        assert_eq!(
            json,
            json!({"error": "internal_error", "message": "Something went wrong on our side", "requestId": "req_1"})
        );
    }

    #[tokio::test]
    async fn a_credential_that_was_sent_is_said_to_be_no_good() {
        let refusal = Refusal { credential_sent: true, ..Error::unauthenticated().into() };
        let (parts, _) = told(teller(None), refusal).await;
        assert_eq!(parts.headers["www-authenticate"], "Bearer error=\"invalid_token\"");
    }

    #[test]
    fn problem_details_must_be_asked_for() {
        let asked = |accept: &'static str| {
            asks_for_problem(&HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(accept))]))
        };
        assert!(asked("application/problem+json"));
        assert!(asked("application/json, Application/Problem+JSON;q=0.5"));
        assert!(!asked("application/json") && !asked("*/*") && !asked("application/problem+json;q=0"));
    }
}
