//! One typical error for each reason, as callers meet it, made by the code that makes the real ones.
//!
//! The pages of errors and the reference show these, and a snapshot of all of them on every surface is kept beside
//! this file, so that nobody changes what callers are told without seeing it.

use std::time::Duration;

use futures_util::FutureExt as _;
use http::{
    HeaderValue, StatusCode,
    header::{ALLOW, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE},
};
use http_body_util::BodyExt as _;
use paperkey_proto::{
    Contract, Error,
    contract::SurfaceEntry,
    errors::v1::{Reason, StatusCode as GrpcCode},
    options::v1::{Envelope, Surface},
};
use tonic::Status;
use tonic_types::StatusExt as _;

use crate::{
    envelope::{Refusal, Teller},
    json::Json,
};

/// The id of the request that all samples answer.
const REQUEST_ID: &str = "req_01k6f7q2d8x4m9v3c5t0w1n7za";

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    /// The headers that tell something of the error, by the name as it is shown.
    pub(crate) headers: Vec<(&'static str, String)>,
    /// Without spaces.
    pub(crate) body: String,
}

/// A typical error.
pub(crate) fn error(reason: Reason) -> Error {
    let error = Error::new(reason);
    let seconds = Duration::from_secs;
    match reason {
        Reason::ValidationFailed => error.with_violation("max_activations", "must be at least 0"),
        Reason::RateLimited => error
            .with_retry_after(seconds(17))
            .with_quota_violation("per_key:key_01k6f7q2d8x4m9v3c5t0w1n7za", "60 calls in 60 seconds"),
        Reason::AuthRateLimited => {
            error.with_retry_after(seconds(540)).with_quota_violation("auth:203.0.113.7", "5 calls in 900 seconds")
        }
        Reason::LicenseRateLimited => {
            error.with_retry_after(seconds(12)).with_quota_violation("license_validate", "30 calls in 60 seconds")
        }
        Reason::QuotaExceeded => error
            .with_retry_after(seconds(777_600))
            .with_quota_violation("renders:team_01k6f7q2d8x4m9v3c5t0w1n7za", "100 units a month"),
        _ => error,
    }
}

/// A typical refusal.
pub(crate) fn refusal(reason: Reason) -> Refusal {
    let allow = (reason == Reason::MethodNotAllowed).then(|| HeaderValue::from_static("GET, POST"));
    Refusal { allow, credential_sent: true, ..error(reason).into() }
}

/// A path of a surface, on which its samples are answered.
pub(crate) fn path(surface: Surface) -> &'static str {
    match surface {
        Surface::Dashboard | Surface::Unspecified => "/licenses",
        Surface::Client => "/v1/licenses/activate",
        Surface::Team => "/api/v1/licenses",
        Surface::Platform => "/v1/keys",
    }
}

/// The typical answer on a surface, in its envelope or as `application/problem+json`.
pub(crate) fn answer(reason: Reason, entry: &SurfaceEntry, public_url: &str, problem: bool) -> Answer {
    let teller = Teller {
        surface: Some(&entry.options),
        request_id: REQUEST_ID,
        public_url,
        path: path(entry.surface),
        problem,
    };
    let (head, body) = teller.tell(&refusal(reason)).into_parts();
    // The body is at hand, so this is ready at once.
    let body = body.collect().now_or_never().and_then(Result::ok).map(http_body_util::Collected::to_bytes);
    let told = [
        ("Content-Type", CONTENT_TYPE),
        ("WWW-Authenticate", WWW_AUTHENTICATE),
        ("Allow", ALLOW),
        ("Retry-After", RETRY_AFTER),
    ];
    let headers = told
        .into_iter()
        .filter_map(|(shown, name)| Some((shown, head.headers.get(name)?.to_str().ok()?.to_owned())))
        .collect();
    let body = body.and_then(|bytes| String::from_utf8(bytes.into()).ok()).unwrap_or_default();
    Answer { status: head.status, headers, body }
}

/// The first surface that has that envelope.
pub(crate) fn surface_with(envelope: Envelope) -> Option<&'static SurfaceEntry> {
    Contract::get().surfaces().iter().find(|entry| entry.options.envelope() == envelope)
}

/// The typical status over gRPC, in the JSON form of `google.rpc.Status`.
pub(crate) fn status(reason: Reason) -> Json {
    let status = Status::from(error(reason));
    let details = status.get_error_details();
    let mut shown = Vec::new();
    let kind = |name: &str| Json::from(format!("type.googleapis.com/google.rpc.{name}"));
    if let Some(info) = details.error_info() {
        let mut metadata: Vec<(String, Json)> =
            info.metadata.iter().map(|(name, text)| (name.clone(), text.clone().into())).collect();
        metadata.sort_by(|(one, _), (other, _)| one.cmp(other));
        shown.push(Json::object([
            ("@type", kind("ErrorInfo")),
            ("reason", info.reason.clone().into()),
            ("domain", info.domain.clone().into()),
            ("metadata", Json::Object(metadata)),
        ]));
    }
    if let Some(request) = details.bad_request() {
        let violations = request.field_violations.iter().map(|violation| {
            Json::object([
                ("field", violation.field.clone().into()),
                ("description", violation.description.clone().into()),
            ])
        });
        shown
            .push(Json::object([("@type", kind("BadRequest")), ("fieldViolations", Json::List(violations.collect()))]));
    }
    if let Some(delay) = details.retry_info().and_then(|info| info.retry_delay) {
        shown.push(Json::object([
            ("@type", kind("RetryInfo")),
            ("retryDelay", format!("{}s", delay.as_secs_f64()).into()),
        ]));
    }
    if let Some(failure) = details.quota_failure() {
        let violations = failure.violations.iter().map(|violation| {
            Json::object([
                ("subject", violation.subject.clone().into()),
                ("description", violation.description.clone().into()),
            ])
        });
        shown.push(Json::object([("@type", kind("QuotaFailure")), ("violations", Json::List(violations.collect()))]));
    }
    Json::object([
        ("code", Json::Number((status.code() as i32).into())),
        ("message", status.message().into()),
        ("details", Json::List(shown)),
    ])
}

/// The name of a gRPC code, such as `NOT_FOUND`.
pub(crate) fn grpc_name(code: GrpcCode) -> &'static str {
    code.as_str_name().trim_start_matches("STATUS_CODE_")
}

#[cfg(test)]
mod tests {
    use std::fmt::Write as _;

    use paperkey_proto::error::{catalogue, reason_word};

    use super::*;
    use crate::json::pretty;

    const URL: &str = "https://keys.example";

    fn shown(answer: &Answer) -> String {
        let mut text = format!("{}\n", answer.status);
        for (name, value) in &answer.headers {
            writeln!(text, "{name}: {value}").unwrap();
        }
        text + &pretty(&answer.body) + "\n"
    }

    /// What is told on a surface for every reason: its envelope, and `application/problem+json`.
    fn told_on(surface: Surface) -> String {
        let entry = Contract::get().surfaces().iter().find(|entry| entry.surface == surface).unwrap();
        let told = catalogue().map(|(reason, _)| {
            let plain = shown(&answer(reason, entry, URL, false));
            let problem = shown(&answer(reason, entry, URL, true));
            format!("## {}\n\n{plain}\n{problem}", reason_word(reason))
        });
        told.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn the_dashboard_is_told_every_reason_so() {
        insta::assert_snapshot!("errors_on_the_dashboard_surface", told_on(Surface::Dashboard));
    }

    #[test]
    fn apps_are_told_every_reason_so() {
        insta::assert_snapshot!("errors_on_the_client_surface", told_on(Surface::Client));
    }

    #[test]
    fn integrations_are_told_every_reason_so() {
        insta::assert_snapshot!("errors_on_the_team_surface", told_on(Surface::Team));
    }

    #[test]
    fn agents_are_told_every_reason_so() {
        insta::assert_snapshot!("errors_on_the_platform_surface", told_on(Surface::Platform));
    }

    #[test]
    fn callers_of_grpc_are_told_every_reason_so() {
        let told = catalogue().map(|(reason, entry)| {
            let shown = pretty(&status(reason).written());
            format!("## {}\n\n{}\n{shown}\n", reason_word(reason), grpc_name(entry.grpc_code()))
        });
        insta::assert_snapshot!("errors_over_grpc", told.collect::<Vec<_>>().join("\n"));
    }
}
