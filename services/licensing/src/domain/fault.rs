//! What callers can be told, each as one reason of the catalogue.

use paperkey_proto::{Error, errors::v1::Reason};

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
            Fault::Revoked => Self::new(Reason::LicenseRevoked),
            Fault::Expired => Self::new(Reason::LicenseExpired),
            Fault::LimitReached => Self::new(Reason::ActivationLimitReached),
        }
    }
}
