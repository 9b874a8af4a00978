//! What webhooks are: rules and types, without a transport, a database or a clock of their own.

pub(crate) mod address;
pub(crate) mod attempt;
pub(crate) mod delivery;
pub(crate) mod endpoint;
pub(crate) mod event;
pub(crate) mod schedule;
pub(crate) mod signature;

pub(crate) use paperkey_kit::ids::could_be_id;

use paperkey_proto::{Error, errors::v1::Reason};

use endpoint::MAX_PER_PRODUCT;

/// Why the domain refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The product is not there, not the caller's, or deleted.
    NoSuchProduct,
    /// The endpoint is not there, or not the caller's.
    NoSuchWebhook,
    /// The delivery is not there, or not the caller's.
    NoSuchDelivery,
    /// The product has as many endpoints as it may have.
    TooManyWebhooks,
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::NoSuchProduct => Self::not_found("product"),
            Fault::NoSuchWebhook => Self::not_found("webhook"),
            Fault::NoSuchDelivery => Self::not_found("delivery"),
            Fault::TooManyWebhooks => Self::new(Reason::Conflict).with_message(format!(
                "This product has {MAX_PER_PRODUCT} webhooks, which is the most it can have: delete one that is no \
                 longer needed, or subscribe an existing one to more events"
            )),
        }
    }
}
