//! An error crosses from one process to another as a status, and nothing of it is lost on the way.

use std::{collections::HashMap, time::Duration};

use paperkey_proto::{
    Error,
    error::{DOMAIN, QuotaViolation, Violation, catalogue, entry, metadata},
    errors::v1::Reason,
};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// Everything of an error that a caller can be told.
#[derive(Debug, PartialEq)]
struct Told {
    reason: Reason,
    message: String,
    agent_message: String,
    violations: Vec<Violation>,
    quota_violations: Vec<QuotaViolation>,
    retry_after: Option<Duration>,
}

impl From<&Error> for Told {
    fn from(error: &Error) -> Self {
        Self {
            reason: error.reason(),
            message: error.message().to_owned(),
            agent_message: error.agent_message().to_owned(),
            violations: error.violations().to_vec(),
            quota_violations: error.quota_violations().to_vec(),
            retry_after: error.retry_after(),
        }
    }
}

/// A change to an error.
type Change = fn(Error) -> Error;

/// The ways in which an error can say more than its reason.
const CHANGES: [Change; 6] = [
    |error| error.with_message("Something closer, with “quotes” and a \n newline"),
    |error| error.with_agent_message("Do something else: ask /auth/password/forgot."),
    |error| error.with_violation("price.currency", "must be one of EUR, USD").with_violation("", "is \u{fffd} odd"),
    |error| error.with_quota_violation("key:key_1", "60 calls in 60 s").with_quota_violation("meter:renders", ""),
    |error| error.with_retry_after(Duration::new(17, 123_456_789)),
    |error| error.with_retry_after(Duration::ZERO),
];

/// Every reason, with every set of the changes.
fn all_errors() -> impl Iterator<Item = Error> {
    catalogue().flat_map(|(reason, _)| {
        (0..1_u32 << CHANGES.len()).map(move |set| {
            let chosen = CHANGES.iter().enumerate().filter(|(at, _)| set & (1 << at) != 0);
            chosen.fold(Error::new(reason), |error, (_, change)| change(error))
        })
    })
}

#[test]
fn every_error_survives_the_way_through_a_status() {
    let mut count = 0;
    for error in all_errors() {
        let told = Told::from(&error);
        let status = Status::from(error);
        assert_eq!(Told::from(&Error::from_status(&status)), told);
        // A process between the two passes it on.
        let passed_on = Status::from(Error::from_status(&status));
        assert_eq!(Told::from(&Error::from_status(&passed_on)), told);
        count += 1;
    }
    assert_eq!(count, catalogue().count() << CHANGES.len());
}

#[test]
fn a_status_tells_a_caller_of_grpc_what_a_caller_of_rest_is_told() {
    for error in all_errors() {
        let told = Told::from(&error);
        let entry = entry(told.reason);
        let status = Status::from(error);
        assert_eq!(status.code(), Code::from_i32(entry.grpc_code));
        assert_ne!(status.code(), Code::Ok);
        assert_eq!(status.message(), told.message);
        let details = status.check_error_details().unwrap();
        let info = details.error_info().unwrap();
        assert_eq!(info.domain, DOMAIN);
        assert_eq!(format!("REASON_{}", info.reason), told.reason.as_str_name());
        let expected: HashMap<_, _> = [
            (metadata::CODE, entry.agent_code.clone()),
            (metadata::TYPE, entry.r#type.clone()),
            (metadata::HTTP_STATUS, entry.http_status.to_string()),
            (metadata::RETRYABLE, entry.retryable.to_string()),
            (metadata::AGENT_MESSAGE, told.agent_message),
        ]
        .map(|(name, text)| (name.to_owned(), text))
        .into();
        assert_eq!(info.metadata, expected);
        assert_eq!(details.bad_request().is_some(), !told.violations.is_empty());
        assert_eq!(details.quota_failure().is_some(), !told.quota_violations.is_empty());
        assert_eq!(details.retry_info().and_then(|info| info.retry_delay), told.retry_after);
    }
}

#[test]
fn what_failed_inside_stays_on_this_side() {
    for error in [Error::internal("the password is hunter2"), Error::unavailable("db.internal:5432 refused")] {
        assert!(error.source().is_some());
        let status = Status::from(error);
        let bytes = String::from_utf8_lossy(status.details()).into_owned() + status.message();
        assert!(!bytes.contains("hunter2") && !bytes.contains("5432"), "{bytes}");
        assert!(Error::from_status(&status).source().is_none());
    }
}

#[test]
fn a_status_of_somebody_else_is_never_taken_for_ours() {
    let foreign = |domain: &str, reason: &str| {
        let details = tonic_types::ErrorDetails::with_error_info(reason, domain, HashMap::new());
        let status = Status::with_error_details(Code::PermissionDenied, "they said hunter2", details);
        Error::from_status(&status)
    };
    for error in [
        foreign("googleapis.com", "NOT_FOUND"),
        foreign(DOMAIN, "NO_SUCH_REASON"),
        foreign(DOMAIN, "UNSPECIFIED"),
        foreign(DOMAIN, ""),
        Error::from_status(&Status::with_details(Code::Internal, "hunter2", vec![0xff; 9].into())),
    ] {
        assert_eq!(error.reason(), Reason::Internal);
        assert!(!error.message().contains("hunter2") && !error.agent_message().contains("hunter2"));
    }
}

#[test]
fn an_error_without_a_reason_is_told_as_a_fault_of_our_own() {
    let status = Status::from(Error::new(Reason::Unspecified));
    assert_eq!(status.code(), Code::Internal);
    assert_eq!(entry(Reason::Unspecified), entry(Reason::Internal));
    assert!(catalogue().all(|(reason, _)| reason != Reason::Unspecified));
}

#[test]
fn the_faults_that_one_error_names_are_bounded() {
    let error = (0..10_000).fold(Error::new(Reason::ValidationFailed), |error, at| {
        error.with_violation(format!("items[{at}]"), "is required").with_quota_violation(format!("key:{at}"), "")
    });
    assert_eq!((error.violations().len(), error.quota_violations().len()), (32, 32));
    assert!(Status::from(error).details().len() < 4_096);
}
