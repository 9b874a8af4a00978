//! Types and rules of products and clients.
//!
//! Deliberately absent: tonic, sea-orm, and a clock; whoever calls says what time it is.

pub(crate) mod client;
pub(crate) mod product;

pub(crate) use paperkey_kit::ids::could_be_id;

use paperkey_proto::Error;

/// Why the domain refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// There is no such product in the caller's team and mode.
    NoSuchProduct,
    /// There is no such client in the caller's team and mode.
    NoSuchClient,
    /// The product was not completed in time and has been taken back.
    TooLate,
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::NoSuchProduct => Self::not_found("product"),
            Fault::NoSuchClient => Self::not_found("client"),
            Fault::TooLate => Self::unavailable("a product took too long to make"),
        }
    }
}
