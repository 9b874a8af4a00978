//! Decode, call, encode. No rules here.

mod batch;
mod catalog;
mod checks;
mod export;
mod import;
mod intake;
mod licenses;

pub(crate) use catalog::Catalog;
pub(crate) use checks::Checks;
pub(crate) use intake::Intake;
pub(crate) use licenses::Licenses;

use paperkey_kit::values;
use paperkey_proto::licensing::v1::LicenseStatus;
use prost_types::Timestamp;

use crate::domain::license::Status;

fn status(status: Status) -> LicenseStatus {
    match status {
        Status::Active => LicenseStatus::Active,
        Status::Expired => LicenseStatus::Expired,
        Status::Revoked => LicenseStatus::Revoked,
    }
}

/// Counts are limited to what the contract can hold where they come in.
fn count(number: i64) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

fn time(at_ms: Option<i64>) -> Option<Timestamp> {
    at_ms.map(values::timestamp)
}
