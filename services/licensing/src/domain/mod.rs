//! Types and rules of licences and activations.
//!
//! Deliberately absent: tonic, sea-orm, and a clock; whoever calls says what time it is.

pub mod event;
mod fault;
pub mod license;
pub mod license_key;

pub use fault::Fault;

/// The longest id that any of ours has.
const MAX_ID_BYTES: usize = 64;

/// Whether a text could be one of our ids. What cannot be is unknown without a look-up, whatever bytes it holds.
pub fn could_be_id(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_ID_BYTES && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}
