//! Types and rules of products.
//!
//! Deliberately absent: tonic, sea-orm, and a clock; whoever calls says what time it is.

pub(crate) mod product;

pub(crate) use paperkey_kit::ids::could_be_id;

use paperkey_proto::Error;

/// Why the domain refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// There is no such product in the caller's team and mode.
    NoSuchProduct,
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::NoSuchProduct => Self::not_found("product"),
        }
    }
}
