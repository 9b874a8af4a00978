//! The rpcs: decode, call, encode. One file a resource.
//!
//! Deliberately absent: rules. Who may call what is the contract's; the rest is the domain's.

pub(crate) mod accounts;
pub(crate) mod api_keys;
pub(crate) mod credentials;
pub(crate) mod intake;
pub(crate) mod members;
pub(crate) mod product_keys;
pub(crate) mod status;
pub(crate) mod teams;
