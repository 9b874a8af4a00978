//! The shapes of errors: what each surface promises, looked at member by member.

use paperkey_proto::{
    Contract,
    errors::v1::{Reason, ReasonOptions},
    options::v1::Envelope,
};
use serde_json::Value;

use crate::api::Answer;

/// The envelope of the surface that a path belongs to. What belongs to none is told as on the dashboard.
pub fn of_path(path: &str) -> Envelope {
    Contract::get().surface_of(path).map_or(Envelope::Flat, |entry| entry.options.envelope())
}

/// The answer must be the error that the catalogue describes, in the envelope of its path.
#[track_caller]
pub fn check(answer: &Answer, reason: Reason) {
    let entry = paperkey_proto::error::entry(reason);
    let shown = format!("{} → {} {}", answer.asked, answer.status, answer.text());
    assert_eq!(u32::from(answer.status.as_u16()), entry.http_status, "{shown}");
    assert_eq!(answer.header("content-type"), Some("application/json"), "{shown}");
    match of_path(&answer.path) {
        Envelope::Typed => typed(answer, entry, &shown),
        Envelope::Agent => agent(answer, entry, &shown),
        Envelope::Flat | Envelope::Unspecified => flat(answer, entry, &shown),
    }
    match reason {
        Reason::InvalidCredentials => {
            let challenge = answer.header("www-authenticate").unwrap_or_default();
            assert!(challenge.starts_with("Bearer"), "401 without a challenge: {shown}");
        }
        Reason::MethodNotAllowed => assert!(answer.header("allow").is_some(), "405 without Allow: {shown}"),
        _ => {}
    }
}

/// The fields that an error names.
pub fn details(answer: &Answer) -> Vec<Value> {
    let error = &answer.json["error"];
    let details = if error.is_object() { &error["details"] } else { &answer.json["details"] };
    details.as_array().cloned().unwrap_or_default()
}

#[track_caller]
fn flat(answer: &Answer, entry: &ReasonOptions, shown: &str) {
    assert_eq!(answer.json["error"], Value::from(entry.flat_code.as_str()), "{shown}");
    said(&answer.json["message"], shown);
    same_request(answer, &answer.json["requestId"], shown);
    only(&answer.json, &["error", "message", "details", "requestId"], shown);
}

#[track_caller]
fn typed(answer: &Answer, entry: &ReasonOptions, shown: &str) {
    let error = &answer.json["error"];
    assert_eq!(error["type"], Value::from(entry.r#type.as_str()), "{shown}");
    assert_eq!(error["code"], Value::from(entry.typed_code.as_str()), "{shown}");
    said(&error["message"], shown);
    same_request(answer, &error["request_id"], shown);
    only(error, &["type", "code", "message", "request_id", "details"], shown);
    only(&answer.json, &["error"], shown);
}

#[track_caller]
fn agent(answer: &Answer, entry: &ReasonOptions, shown: &str) {
    let error = &answer.json["error"];
    assert_eq!(error["code"], Value::from(entry.agent_code.as_str()), "{shown}");
    assert_eq!(error["type"], Value::from(entry.r#type.as_str()), "{shown}");
    said(&error["human_message"], shown);
    said(&error["agent_message"], shown);
    let page = format!("/docs/errors/{}", entry.agent_code);
    assert!(error["docs_url"].as_str().is_some_and(|url| url.ends_with(&page)), "{shown}");
    assert_eq!(error["retryable"], Value::from(entry.retryable), "{shown}");
    same_request(answer, &error["request_id"], shown);
    let members = ["code", "type", "human_message", "agent_message", "docs_url", "retryable", "request_id", "details"];
    only(error, &members, shown);
    only(&answer.json, &["error"], shown);
}

/// The answer must be the error that the catalogue describes, as RFC 9457 wants it.
#[track_caller]
pub fn check_problem(answer: &Answer, reason: Reason) {
    let entry = paperkey_proto::error::entry(reason);
    let shown = format!("{} → {} {}", answer.asked, answer.status, answer.text());
    assert_eq!(u32::from(answer.status.as_u16()), entry.http_status, "{shown}");
    assert_eq!(answer.header("content-type"), Some("application/problem+json"), "{shown}");
    let page = format!("/docs/errors/{}", entry.agent_code);
    assert!(answer.json["type"].as_str().is_some_and(|uri| uri.ends_with(&page)), "{shown}");
    assert_eq!(answer.json["status"], Value::from(entry.http_status), "{shown}");
    said(&answer.json["title"], shown.as_str());
    said(&answer.json["agent_message"], shown.as_str());
    assert_eq!(answer.json["retryable"], Value::from(entry.retryable), "{shown}");
    same_request(answer, &answer.json["request_id"], &shown);
}

#[track_caller]
fn said(text: &Value, shown: &str) {
    assert!(text.as_str().is_some_and(|text| !text.trim().is_empty()), "nothing is said: {shown}");
}

#[track_caller]
fn same_request(answer: &Answer, id: &Value, shown: &str) {
    assert_eq!(id.as_str(), answer.header("x-request-id"), "another request id than in the header: {shown}");
}

#[track_caller]
fn only(object: &Value, members: &[&str], shown: &str) {
    for name in object.as_object().into_iter().flat_map(serde_json::Map::keys) {
        assert!(members.contains(&name.as_str()), "the member {name} is not of this envelope: {shown}");
    }
}
