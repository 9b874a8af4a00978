//! Types and rules of licences and activations.
//!
//! Deliberately absent: tonic, sea-orm, and a clock; whoever calls says what time it is.

pub mod csv;
pub mod event;
mod fault;
pub mod file;
pub mod license;
pub mod license_key;

pub use paperkey_kit::ids::could_be_id;

pub use fault::{Fault, at_place, of_places};
