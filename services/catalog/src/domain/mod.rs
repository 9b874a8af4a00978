//! Types and rules of products.
//!
//! Deliberately absent: tonic, sea-orm, and a clock; whoever calls says what time it is.

pub(crate) mod product;

use paperkey_proto::Error;

/// The longest id that any of ours has.
const MAX_ID_BYTES: usize = 64;

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

/// Whether a text could be one of our ids. What cannot be is unknown without a look-up, whatever bytes it holds.
pub(crate) fn could_be_id(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_ID_BYTES && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}
