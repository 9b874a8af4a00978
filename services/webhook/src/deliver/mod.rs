//! Sending: what goes out, to where it may go, and in which order.

mod connector;
mod dispatcher;
mod names;
mod recorder;
mod sender;
#[cfg(test)]
mod tests;
mod tls;

pub(crate) use dispatcher::{Dispatcher, Pace};
pub(crate) use sender::{Parcel, Sender};
