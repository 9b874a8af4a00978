//! Errors: a reason of the catalogue, what to say of it, and its two faces, gRPC status and HTTP answer.
//!
//! An [`Error`] is what every layer above a store returns. What went wrong inside ([`Error::internal`]) has no
//! way to a caller: it is logged where the error becomes a status, and the caller learns the request id.

use std::{borrow::Cow, error::Error as StdError, fmt, sync::LazyLock, time::Duration};

use prost_reflect::DescriptorPool;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt as _};

use crate::errors::v1::{Reason, ReasonOptions};

/// The domain of our reasons in `google.rpc.ErrorInfo`.
pub const DOMAIN: &str = "paperkey";

/// A field at fault, and what is wrong with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The path of the field in the contract's own names, such as `price.currency`.
    pub field: String,
    /// What is wrong and what would be right, for a person.
    pub message: String,
}

/// Why a call failed.
#[derive(Debug)]
pub struct Error {
    reason: Reason,
    message: Option<Cow<'static, str>>,
    violations: Vec<Violation>,
    retry_after: Option<Duration>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl Error {
    /// An error that says what the catalogue says.
    pub fn new(reason: Reason) -> Self {
        Self { reason, message: None, violations: Vec::new(), retry_after: None, source: None }
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

    /// Names a field at fault.
    #[must_use]
    pub fn with_violation(mut self, field: impl Into<String>, message: impl Into<String>) -> Self {
        self.violations.push(Violation { field: field.into(), message: message.into() });
        self
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

    /// The fields at fault.
    pub fn violations(&self) -> &[Violation] {
        &self.violations
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
        let reason = details
            .error_info()
            .filter(|info| info.domain == DOMAIN)
            .and_then(|info| Reason::from_str_name(&format!("REASON_{}", info.reason)));
        let Some(reason) = reason else {
            return Self::of_transport(status);
        };
        let mut error = Self::new(reason).with_message(status.message().to_owned());
        if let Some(bad_request) = details.bad_request() {
            error.violations = bad_request
                .field_violations
                .iter()
                .map(|violation| Violation { field: violation.field.clone(), message: violation.description.clone() })
                .collect();
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
        let reason = error.reason.as_str_name().trim_start_matches("REASON_");
        details.set_error_info(reason, DOMAIN, std::collections::HashMap::new());
        if !error.violations.is_empty() {
            let violations: Vec<_> =
                error.violations.iter().map(|v| FieldViolation::new(v.field.clone(), v.message.clone())).collect();
            details.set_bad_request(violations);
        }
        if error.retry_after.is_some() {
            details.set_retry_info(error.retry_after);
        }
        let code = Code::from_i32(error.entry().grpc_code);
        Self::with_error_details(code, error.message().to_owned(), details)
    }
}

/// What the catalogue says of a reason.
pub fn entry(reason: Reason) -> &'static ReasonOptions {
    static UNKNOWN: LazyLock<ReasonOptions> = LazyLock::new(ReasonOptions::default);
    usize::try_from(reason as i32).ok().and_then(|number| CATALOGUE.get(number)).unwrap_or(&UNKNOWN)
}

/// All entries, by number of the reason.
static CATALOGUE: LazyLock<Vec<ReasonOptions>> =
    LazyLock::new(|| catalogue_of(crate::contract::pool()).unwrap_or_default());

fn catalogue_of(pool: &DescriptorPool) -> Option<Vec<ReasonOptions>> {
    let reasons = pool.get_enum_by_name("paperkey.errors.v1.Reason")?;
    let extension = pool.get_extension_by_name("paperkey.errors.v1.reason")?;
    let mut entries = vec![ReasonOptions::default(); reasons.values().len()];
    for value in reasons.values() {
        let options = value.options();
        let read = options.get_extension(&extension).as_message().map(prost_reflect::DynamicMessage::transcode_to);
        if let (Ok(index), Some(Ok(entry))) = (usize::try_from(value.number()), read) {
            *entries.get_mut(index)? = entry;
        }
    }
    Some(entries)
}
