//! Decode, call, encode. No rules here.

mod deliveries;
mod intake;
mod watch;
mod webhooks;

pub(crate) use intake::Intake;
pub(crate) use watch::Watches;
pub(crate) use webhooks::Webhooks;
