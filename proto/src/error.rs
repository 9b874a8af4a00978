//! Errors: a reason of the catalogue, what to say of it, and its two faces, gRPC status and HTTP answer.
//!
//! An [`Error`] is what every layer above a store returns. What went wrong inside ([`Error::internal`]) has no
//! way to a caller: it is logged where the error becomes a status, and the caller learns the request id.
//!
//! A status carries everything that an HTTP answer is made of, so that a caller of gRPC can do what a caller of REST
//! can: `google.rpc.ErrorInfo` always, with the words of [`metadata`] in it, and `BadRequest`, `RetryInfo` and
//! `QuotaFailure` where they apply. Reading it back ([`Error::from_status`]) loses nothing but the source.

use std::{borrow::Cow, collections::HashMap, error::Error as StdError, fmt, sync::LazyLock, time::Duration};

use prost_reflect::DescriptorPool;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, QuotaViolation as QuotaDetail, StatusExt as _};

use crate::errors::v1::{Reason, ReasonOptions};

/// The domain of our reasons in `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "paperkey";

/// The most faults that one error names: all of it must fit into the trailers of an answer.
const MAX_VIOLATIONS: usize = 32;

/// What the metadata of `google.rpc.ErrorInfo` tells beside the reason.
pub mod metadata {
    /// The code of the agent envelope, such as `PB_NOT_FOUND`, which also names the page of the error.
    pub const CODE: &str = "code";
    /// The family of the error, such as `not_found_error`.
    pub const TYPE: &str = "type";
    /// The status that HTTP has for it.
    pub const HTTP_STATUS: &str = "http_status";
    /// Whether the same call may succeed later: `true` or `false`.
    pub const RETRYABLE: &str = "retryable";
    /// What to do next.
    pub const AGENT_MESSAGE: &str = "agent_message";
}

/// A field at fault, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The path of the field in the contract's own names, such as `price.currency`.
    pub field: String,
    /// What is wrong and what would be right, for a person.
    pub message: String,
}

/// A limit or a quota that was hit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuotaViolation {
    /// What was counted, such as `key:key_1` or `meter:renders`.
    pub subject: String,
    /// How much of it is allowed, for a person.
    pub description: String,
}

/// Why a call failed.
#[derive(Debug)]
pub struct Error {
    reason: Reason,
    message: Option<Cow<'static, str>>,
    violations: Vec<Violation>,
    retry_after: Option<Duration>,
    source: Option<Box<dyn StdError + Send + Sync>>,
    /// Aside, since it is rare, and results carry errors by value.
    rare: Option<Box<Rare>>,
}

/// What few errors say.
#[derive(Debug, Default)]
struct Rare {
    agent_message: Option<Cow<'static, str>>,
    quota_violations: Vec<QuotaViolation>,
}

impl Error {
    /// An error that says what the catalogue says.
    pub fn new(reason: Reason) -> Self {
        Self { reason, message: None, violations: Vec::new(), retry_after: None, source: None, rare: None }
    }

    /// One field is at fault.
    pub fn field(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Reason::ValidationFailed).with_violation(field, message)
    }

    /// The request as a whole is at fault.
    pub fn malformed(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Reason::ValidationFailed).with_message(message)
    }

    /// There is no such resource, or it is not the caller's: the two are never told apart.
    pub fn not_found(what: &str) -> Self {
        Self::new(Reason::NotFound).with_message(format!("No such {what}"))
    }

    /// The credential is missing or not good.
    pub fn unauthenticated() -> Self {
        Self::new(Reason::InvalidCredentials)
    }

    /// Something failed inside. The caller learns nothing of it.
    pub fn internal(source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self { source: Some(source.into()), ..Self::new(Reason::Internal) }
    }

    /// Something that the call needs is not there at the moment.
    pub fn unavailable(source: impl Into<Box<dyn StdError + Send + Sync>>) -> Self {
        Self { source: Some(source.into()), ..Self::new(Reason::Unavailable) }
    }

    /// Says something closer than the catalogue does.
    #[must_use]
    pub fn with_message(mut self, message: impl Into<Cow<'static, str>>) -> Self {
        self.message = Some(message.into());
        self
    }

    /// Says something closer than the catalogue does of what to do next.
    #[must_use]
    pub fn with_agent_message(mut self, agent_message: impl Into<Cow<'static, str>>) -> Self {
        self.rare_mut().agent_message = Some(agent_message.into());
        self
    }

    /// Names a field at fault. Beyond a bound nobody reads on, and more are left out.
    #[must_use]
    pub fn with_violation(mut self, field: impl Into<String>, message: impl Into<String>) -> Self {
        if self.violations.len() < MAX_VIOLATIONS {
            self.violations.push(Violation { field: field.into(), message: message.into() });
        }
        self
    }

    /// Names a limit that was hit: what it counts, and how much it allows.
    #[must_use]
    pub fn with_quota_violation(mut self, subject: impl Into<String>, description: impl Into<String>) -> Self {
        let known = &mut self.rare_mut().quota_violations;
        if known.len() < MAX_VIOLATIONS {
            known.push(QuotaViolation { subject: subject.into(), description: description.into() });
        }
        self
    }

    fn rare_mut(&mut self) -> &mut Rare {
        self.rare.get_or_insert_default()
    }

    /// Says when the same call may succeed.
    #[must_use]
    pub fn with_retry_after(mut self, retry_after: Duration) -> Self {
        self.retry_after = Some(retry_after);
        self
    }

    /// The reason.
    pub fn reason(&self) -> Reason {
        self.reason
    }

    /// What a person is told.
    pub fn message(&self) -> &str {
        self.message.as_deref().unwrap_or_else(|| entry(self.reason).message.as_str())
    }

    /// What a program is told to do next.
    pub fn agent_message(&self) -> &str {
        let closer = self.rare.as_ref().and_then(|rare| rare.agent_message.as_deref());
        closer.unwrap_or_else(|| entry(self.reason).agent_message.as_str())
    }

    /// The fields at fault.
    pub fn violations(&self) -> &[Violation] {
        &self.violations
    }

    /// The limits that were hit.
    pub fn quota_violations(&self) -> &[QuotaViolation] {
        self.rare.as_ref().map_or(&[], |rare| &rare.quota_violations)
    }

    /// When the same call may succeed.
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// What the catalogue says of the reason.
    pub fn entry(&self) -> &'static ReasonOptions {
        entry(self.reason)
    }

    /// What failed inside, for the log.
    pub fn source(&self) -> Option<&(dyn StdError + Send + Sync + 'static)> {
        self.source.as_deref()
    }

    /// Reads the error back from a status of one of our services, or makes one of a status that a transport made.
    pub fn from_status(status: &Status) -> Self {
        let details = status.get_error_details();
        let ours = details.error_info().filter(|info| info.domain == DOMAIN).and_then(|info| {
            let reason = Reason::from_str_name(&format!("REASON_{}", info.reason))?;
            (reason != Reason::Unspecified).then_some((reason, info))
        });
        let Some((reason, info)) = ours else {
            return Self::of_transport(status);
        };
        let mut error = Self::new(reason).with_message(status.message().to_owned());
        if let Some(said) = info.metadata.get(metadata::AGENT_MESSAGE)
            && *said != entry(reason).agent_message
        {
            error = error.with_agent_message(said.clone());
        }
        if let Some(bad_request) = details.bad_request() {
            error = bad_request.field_violations.iter().fold(error, |error, violation| {
                error.with_violation(violation.field.clone(), violation.description.clone())
            });
        }
        if let Some(failure) = details.quota_failure() {
            error = failure.violations.iter().fold(error, |error, violation| {
                error.with_quota_violation(violation.subject.clone(), violation.description.clone())
            });
        }
        error.retry_after = details.retry_info().and_then(|info| info.retry_delay);
        error
    }

    /// A status without our details comes from tonic or from the network, and its text stays inside.
    fn of_transport(status: &Status) -> Self {
        let source = || format!("{:?}: {}", status.code(), status.message());
        match status.code() {
            Code::Unavailable | Code::Cancelled => Self::unavailable(source()),
            Code::DeadlineExceeded => Self::new(Reason::Deadline),
            Code::OutOfRange => Self::new(Reason::BodyTooLarge),
            Code::Unimplemented => Self::not_found("method"),
            Code::InvalidArgument => Self::malformed("the message is not valid protobuf of its type"),
            Code::Unauthenticated => Self::unauthenticated(),
            _ => Self::internal(source()),
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.message())
    }
}

impl StdError for Error {}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        if let Some(source) = &error.source {
            tracing::error!(reason = error.reason.as_str_name(), error = %source, "call failed");
        }
        let mut details = ErrorDetails::new();
        let entry = error.entry();
        let told = [
            (metadata::CODE, entry.agent_code.clone()),
            (metadata::TYPE, entry.r#type.clone()),
            (metadata::HTTP_STATUS, entry.http_status.to_string()),
            (metadata::RETRYABLE, entry.retryable.to_string()),
            (metadata::AGENT_MESSAGE, error.agent_message().to_owned()),
        ];
        let told: HashMap<String, String> = told.into_iter().map(|(name, text)| (name.to_owned(), text)).collect();
        details.set_error_info(reason_word(error.reason), DOMAIN, told);
        if !error.violations.is_empty() {
            let violations: Vec<_> =
                error.violations.iter().map(|v| FieldViolation::new(v.field.clone(), v.message.clone())).collect();
            details.set_bad_request(violations);
        }
        if !error.quota_violations().is_empty() {
            let hit = |v: &QuotaViolation| QuotaDetail {
                subject: v.subject.clone(),
                description: v.description.clone(),
                ..QuotaDetail::default()
            };
            details.set_quota_failure(error.quota_violations().iter().map(hit).collect::<Vec<_>>());
        }
        if error.retry_after.is_some() {
            details.set_retry_info(error.retry_after);
        }
        let code = Code::from_i32(entry.grpc_code);
        Self::with_error_details(code, error.message().to_owned(), details)
    }
}

/// The reason as `google.rpc.ErrorInfo` names it, such as `NOT_FOUND`.
pub fn reason_word(reason: Reason) -> &'static str {
    reason.as_str_name().trim_start_matches("REASON_")
}

/// What the catalogue says of a reason. An error that has none is a fault of our own, and is told as one.
pub fn entry(reason: Reason) -> &'static ReasonOptions {
    let number = usize::try_from(reason as i32).unwrap_or_default();
    CATALOGUE.by_number.get(number).and_then(Option::as_ref).unwrap_or(&CATALOGUE.internal)
}

/// Every reason with what the catalogue says of it, in the order of the contract.
pub fn catalogue() -> impl Iterator<Item = (Reason, &'static ReasonOptions)> {
    CATALOGUE.by_number.iter().enumerate().filter_map(|(number, entry)| {
        let reason = i32::try_from(number).ok().and_then(|number| Reason::try_from(number).ok())?;
        Some((reason, entry.as_ref()?))
    })
}

/// The catalogue, as the contract declares it.
struct Catalogue {
    /// None where a number is no reason, or no longer one.
    by_number: Vec<Option<ReasonOptions>>,
    internal: ReasonOptions,
}

static CATALOGUE: LazyLock<Catalogue> = LazyLock::new(|| {
    let by_number = entries_of(crate::contract::pool()).unwrap_or_default();
    let internal = by_number.get(Reason::Internal as usize).cloned().flatten().unwrap_or_default();
    Catalogue { by_number, internal }
});

fn entries_of(pool: &DescriptorPool) -> Option<Vec<Option<ReasonOptions>>> {
    let reasons = pool.get_enum_by_name("paperkey.errors.v1.Reason")?;
    let extension = pool.get_extension_by_name("paperkey.errors.v1.reason")?;
    let mut entries = Vec::new();
    for value in reasons.values().filter(|value| value.number() > 0) {
        let options = value.options();
        let read = options.get_extension(&extension).as_message().map(prost_reflect::DynamicMessage::transcode_to);
        if let (Ok(index), Some(Ok(entry))) = (usize::try_from(value.number()), read) {
            entries.resize_with(entries.len().max(index + 1), || None);
            entries[index] = Some(entry);
        }
    }
    Some(entries)
}
