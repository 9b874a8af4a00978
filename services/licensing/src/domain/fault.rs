//! What callers can be told, each as one reason of the catalogue.

use paperkey_proto::{Error, error::Violation, errors::v1::Reason};

/// Why the domain refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// There is no such licence in the caller's reach.
    NoSuchLicense,
    /// The licence has no such activation.
    NoSuchActivation,
    /// There is no such product in the caller's reach, or it is being deleted.
    NoSuchProduct,
    /// The licence names a client that the caller's team does not have, or that is being deleted.
    NoSuchClient,
    /// The licence key belongs to another licence. Whose that is, is not said.
    KeyInUse,
    /// The licence was revoked.
    Revoked,
    /// The licence has expired.
    Expired,
    /// All slots are taken.
    LimitReached,
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::NoSuchLicense => Self::not_found("license"),
            Fault::NoSuchActivation => Self::not_found("activation"),
            Fault::NoSuchProduct => Self::not_found("product"),
            Fault::NoSuchClient => Self::field("client_id", "must be the id of a client"),
            Fault::KeyInUse => Self::new(Reason::Conflict)
                .with_message("This license key is in use")
                .with_violation("key", "is in use"),
            Fault::Revoked => Self::new(Reason::LicenseRevoked),
            Fault::Expired => Self::new(Reason::LicenseExpired),
            Fault::LimitReached => Self::new(Reason::ActivationLimitReached),
        }
    }
}

/// What is at fault with one of several licences, named by its place: `licenses[3].email`.
pub fn at_place(place: usize, error: &Error) -> Vec<(String, String)> {
    if error.violations().is_empty() {
        return vec![(format!("licenses[{place}]"), error.message().to_owned())];
    }
    let named = |violation: &Violation| (format!("licenses[{place}].{}", violation.field), violation.message.clone());
    error.violations().iter().map(named).collect()
}

/// The faults of several licences as one error.
pub fn of_places(faults: impl IntoIterator<Item = (String, String)>) -> Error {
    let error = Error::new(Reason::ValidationFailed);
    faults.into_iter().fold(error, |error, (field, message)| error.with_violation(field, message))
}
