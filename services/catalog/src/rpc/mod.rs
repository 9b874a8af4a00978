//! Decode, call, encode. No rules here.

mod clients;
mod intake;
mod products;

pub(crate) use clients::Clients;
pub(crate) use intake::Intake;
pub(crate) use products::Products;
