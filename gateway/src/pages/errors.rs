//! The pages of errors, one for each code of the catalogue, and the list of all.
//!
//! All of it comes from the catalogue, and the samples from the code that makes the real answers.

use std::fmt::Write as _;

use http::StatusCode;
use paperkey_proto::{
    contract::SurfaceEntry,
    error::{catalogue, reason_word},
    errors::v1::{Reason, ReasonOptions, StatusCode as GrpcCode},
    options::v1::Envelope,
};

use super::document::{Block, Document, Span};
use crate::{json::pretty, samples};

/// Where the list is; the page of a code stands below it.
pub(super) const LIST: &str = "/docs/errors/";

/// The page of a code.
pub(super) fn page_of(code: &str) -> String {
    format!("{LIST}{code}")
}

/// The code of the page that a name means, however it is written; codes of integrations mean theirs too.
pub(super) fn canonical(name: &str) -> Option<&'static str> {
    catalogue()
        .find(|(_, entry)| entry.agent_code.eq_ignore_ascii_case(name) || entry.typed_code.eq_ignore_ascii_case(name))
        .map(|(_, entry)| entry.agent_code.as_str())
}

/// The list of all errors.
pub(super) fn list() -> Document {
    let columns =
        vec!["Code", "HTTP", "What it means", "Retry", "gRPC", "Dashboard and client code", "Team code", "Type"];
    let rows = catalogue().map(|(_, entry)| {
        vec![
            vec![Span::Link(Box::new(Span::Code(entry.agent_code.clone())), page_of(&entry.agent_code))],
            Span::text(entry.http_status.to_string()),
            Span::text(entry.message.as_str()),
            Span::text(if entry.retryable { "yes" } else { "no" }),
            Span::code(samples::grpc_name(entry.grpc_code())),
            Span::code(entry.flat_code.as_str()),
            Span::code(entry.typed_code.as_str()),
            Span::code(entry.r#type.as_str()),
        ]
    });
    Document {
        title: "Errors".into(),
        blocks: vec![
            Block::Trail(home()),
            Block::Title(Span::text("Errors")),
            Block::Text(vec![
                Span::Text(
                    "Every error of the API has one of these reasons. The code in the first column is that of the \
                     platform paths, and names the page of the error everywhere; the dashboard, client and team paths \
                     have codes of their own for it. Over gRPC the code is in the metadata of "
                        .into(),
                ),
                Span::Code("google.rpc.ErrorInfo".into()),
                Span::Text(". With ".into()),
                Span::Code("Accept: application/problem+json".into()),
                Span::Text(" every path answers as RFC 9457 says.".into()),
            ]),
            Block::Table(columns, rows.collect()),
        ],
    }
}

/// The page of one error.
pub(super) fn page(reason: Reason, entry: &ReasonOptions, public_url: &str) -> Document {
    let mut blocks = vec![
        Block::Trail(trail()),
        Block::Title(Span::code(entry.agent_code.as_str())),
        Block::Text(Span::text(format!("{}.", entry.message))),
        Block::Heading("Why it happens"),
        Block::Text(Span::text(entry.cause.as_str())),
        Block::Heading("What to do"),
        Block::Text(Span::text(entry.agent_message.as_str())),
        Block::Heading("Retrying"),
        Block::Text(Span::text(retrying(reason, entry))),
        Block::Heading("How it is told"),
        Block::Facts(facts(reason, entry)),
    ];
    if let Some(command) = provoking(reason, public_url) {
        blocks.push(Block::Heading("See it yourself"));
        blocks.push(Block::Code(command));
    }
    let told = [
        (Envelope::Flat, "On the dashboard and client paths"),
        (Envelope::Typed, "On the team paths"),
        (Envelope::Agent, "On the platform paths"),
    ];
    for (envelope, heading) in told {
        let Some(surface) = samples::surface_with(envelope) else { continue };
        blocks.push(Block::Heading(heading));
        blocks.push(Block::Code(shown(reason, surface, public_url, false)));
    }
    if let Some(surface) = samples::surface_with(Envelope::Agent) {
        blocks.push(Block::Heading("As application/problem+json"));
        blocks.push(Block::Code(shown(reason, surface, public_url, true)));
    }
    blocks.push(Block::Heading("Over gRPC"));
    blocks.push(Block::Code(pretty(&samples::status(reason).written())));
    Document { title: entry.agent_code.clone(), blocks }
}

/// What stands where a code has no page.
pub(super) fn missing() -> Document {
    Document {
        title: "No such error".into(),
        blocks: vec![
            Block::Trail(trail()),
            Block::Title(Span::text("No such error")),
            Block::Text(vec![
                Span::Text("No error has this code. ".into()),
                Span::Link(Box::new(Span::Text("All errors".into())), LIST.into()),
                Span::Text(" are listed with their codes on every surface.".into()),
            ]),
        ],
    }
}

fn home() -> Vec<Span> {
    vec![Span::Link(Box::new(Span::Text("Paperkey".into())), "/app/".into())]
}

fn trail() -> Vec<Span> {
    let mut trail = home();
    trail.push(Span::Text(" · ".into()));
    trail.push(Span::Link(Box::new(Span::Text("errors".into())), LIST.into()));
    trail
}

fn facts(reason: Reason, entry: &ReasonOptions) -> Vec<(&'static str, Vec<Span>)> {
    let status = u16::try_from(entry.http_status).ok().and_then(|code| StatusCode::from_u16(code).ok());
    let grpc = entry.grpc_code();
    vec![
        ("HTTP status", Span::text(status.map_or_else(String::new, |status| status.to_string()))),
        ("gRPC status", Span::text(format!("{} ({})", samples::grpc_name(grpc), grpc as i32))),
        ("Code on the dashboard and client paths", Span::code(entry.flat_code.as_str())),
        ("Code on the team paths", Span::code(entry.typed_code.as_str())),
        ("Code on the platform paths", Span::code(entry.agent_code.as_str())),
        ("Reason in google.rpc.ErrorInfo", Span::code(reason_word(reason))),
        ("Type", Span::code(entry.r#type.as_str())),
        ("Retryable", Span::text(if entry.retryable { "yes" } else { "no" })),
    ]
}

/// Whether to send the same request again, and how.
fn retrying(reason: Reason, entry: &ReasonOptions) -> &'static str {
    match (entry.retryable, entry.grpc_code()) {
        (true, GrpcCode::ResourceExhausted) => {
            "Yes: the same request will be let through once the wait is over that Retry-After names in seconds, and \
             RetryInfo over gRPC. It is never too short, and coming back earlier gains nothing."
        }
        (true, _) => {
            "Yes: wait a moment, double the wait each time, and add some chance to it, so that not all callers come \
             back at once. Where there is a Retry-After, wait for that long. Calls that change something are safe to \
             send again with the Idempotency-Key of the first try, where they take one."
        }
        (false, _) if reason == Reason::QuotaExceeded => {
            "No: nothing changes before the month that is named by Retry-After, in seconds, begins, or the plan changes."
        }
        (false, _) => "No: the same request gets the same answer until what is described above has changed.",
    }
}

/// A command that gets this answer from any installation, where there is one.
fn provoking(reason: Reason, public_url: &str) -> Option<String> {
    let login = format!("{public_url}/auth/login");
    Some(match reason {
        Reason::ValidationFailed => {
            format!("curl -i {login} -H 'Content-Type: application/json' -d '{{\"email\": 7}}'")
        }
        Reason::InvalidCredentials => format!("curl -i {public_url}/api/v1/me"),
        Reason::NotFound => format!("curl -i {public_url}/v1/no/such/path"),
        Reason::MethodNotAllowed => format!("curl -i -X DELETE {public_url}/v1/status"),
        Reason::UnsupportedMediaType => format!("curl -i {login} -d 'email=you@example.com'"),
        Reason::BodyTooLarge => {
            format!("head -c 70000 /dev/zero | curl -i {login} -H 'Content-Type: application/json' --data-binary @-")
        }
        _ => return None,
    })
}

/// An answer as it comes over the wire, its JSON spread over lines.
fn shown(reason: Reason, surface: &SurfaceEntry, public_url: &str, problem: bool) -> String {
    let answer = samples::answer(reason, surface, public_url, problem);
    let mut text = format!("HTTP/1.1 {}\n", answer.status);
    for (name, value) in &answer.headers {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{name}: {value}");
    }
    text + "\n" + &pretty(&answer.body)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const LIST_FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/errors.md");

    #[test]
    fn the_list_of_errors_in_the_docs_is_that_of_the_catalogue() {
        let expected = list().markdown(None);
        if std::env::var_os("UPDATE_DOCS").is_some() {
            fs::write(LIST_FILE, &expected).unwrap();
        }
        let page = fs::read_to_string(LIST_FILE).unwrap_or_default();
        assert!(page == expected, "docs/errors.md is stale: UPDATE_DOCS=1 scripts/test -p paperkey-gateway errors");
    }

    #[test]
    fn a_page_says_everything_that_the_catalogue_does() {
        for (reason, entry) in catalogue() {
            let page = page(reason, entry, "https://keys.example").markdown(None);
            let page = page.replace('\\', "");
            for text in [
                &entry.message,
                &entry.cause,
                &entry.agent_message,
                &entry.flat_code,
                &entry.typed_code,
                &entry.agent_code,
                &entry.r#type,
            ] {
                assert!(page.contains(text.replace('\\', "").as_str()), "{reason:?} does not say {text}");
            }
            assert_eq!(page.matches(&format!("HTTP/1.1 {}", entry.http_status)).count(), 4, "{reason:?}");
            assert_eq!(page.contains("\nRetry-After: "), entry.http_status == 429, "{reason:?}");
        }
    }

    #[test]
    fn a_code_is_known_however_it_is_written() {
        assert_eq!(canonical("PB_NOT_FOUND"), Some("PB_NOT_FOUND"));
        assert_eq!(canonical("pb_not_found"), Some("PB_NOT_FOUND"));
        assert_eq!(canonical("quota_exceeded"), Some("PB_MONTHLY_QUOTA_EXCEEDED"));
        for name in ["", "PB_", "PB_NO_SUCH", "forbidden", "../PB_NOT_FOUND"] {
            assert_eq!(canonical(name), None, "{name}");
        }
    }
}
