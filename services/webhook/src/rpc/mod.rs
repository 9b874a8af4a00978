//! Decode, call, encode. No rules here.

mod deliveries;
mod intake;
mod webhooks;

pub(crate) use intake::Intake;
pub(crate) use webhooks::Webhooks;
