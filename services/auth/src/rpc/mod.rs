//! The rpcs: decode, call, encode. One file a resource.
//!
//! Deliberately absent: rules. Who may call what is the contract's; the rest is the domain's.

pub(crate) mod accounts;
pub(crate) mod alerts;
pub(crate) mod api_keys;
pub(crate) mod audit;
pub(crate) mod credentials;
pub(crate) mod intake;
pub(crate) mod members;
pub(crate) mod product_keys;
pub(crate) mod status;
pub(crate) mod teams;
pub(crate) mod usage;

use paperkey_proto::Error;

use crate::domain::{Fault, could_be_id};

/// What cannot be an id names nothing.
fn known(id: String, fault: Fault) -> Result<String, Error> {
    if could_be_id(&id) { Ok(id) } else { Err(fault.into()) }
}
