//! Sending: what goes out, to where it may go, and in which order.

mod connector;
mod dispatcher;
mod recorder;
mod sender;

pub(crate) use dispatcher::{Dispatcher, Pace};
pub(crate) use sender::Sender;
