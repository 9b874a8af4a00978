//! Types and rules of accounts, teams and keys.
//!
//! Deliberately absent: tonic, sea-orm, and a clock; whoever calls says what time it is.

pub(crate) mod account;
pub(crate) mod alert;
pub(crate) mod allowlist;
pub(crate) mod api_key;
pub(crate) mod audit;
pub(crate) mod fault;
pub(crate) mod key;
pub(crate) mod letter;
pub(crate) mod member;
pub(crate) mod quota;
pub(crate) mod session;
pub(crate) mod team;
pub(crate) mod ticket;

pub(crate) use paperkey_kit::ids::could_be_id;

pub(crate) use fault::Fault;
