//! Limits of rates.

mod memory;
mod suite;
