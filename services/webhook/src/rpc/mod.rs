//! The service as others call it: decode, call, encode. No rules here.

pub(crate) mod intake;
pub(crate) mod webhooks;
