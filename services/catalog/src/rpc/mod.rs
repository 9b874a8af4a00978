//! Decode, call, encode. No rules here.

mod products;

pub(crate) use products::Products;
