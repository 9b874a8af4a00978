//! The contract, and its typed reading.
//!
//! Every public call is an rpc in `paperkey/*/v1`, annotated with its REST routes, its policy and its rules;
//! every error is a value of the catalogue in `paperkey/errors/v1`. This crate holds the generated types,
//! the descriptors with all options ([`contract`]), the errors ([`error`]) and the rules ([`rules`]).
//! It knows no transport beyond tonic's types and no behaviour of any service.

pub mod codec;
pub mod contract;
pub mod error;
pub mod rules;

pub use contract::Contract;
pub use error::Error;

/// The bytes of the compiled contract: a `FileDescriptorSet` with imports, comments and custom options.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/contract.bin"));

mod generated {
    #![expect(
        missing_docs,
        unreachable_pub,
        clippy::all,
        clippy::pedantic,
        clippy::allow_attributes,
        reason = "generated from the contract"
    )]
    include!(concat!(env!("OUT_DIR"), "/contract.rs"));
    include!(concat!(env!("OUT_DIR"), "/redacted.rs"));
}

pub use generated::paperkey::{auth, catalog, errors, events, gateway, licensing, options, principal, webhook};
