//! What webhooks are: rules and types, without a transport, a database or a clock of their own.

pub(crate) mod address;
pub(crate) mod attempt;
pub(crate) mod delivery;
pub(crate) mod endpoint;
pub(crate) mod event;
pub(crate) mod schedule;
pub(crate) mod signature;
pub(crate) mod watch;

pub(crate) use paperkey_kit::ids::could_be_id;

use paperkey_proto::{Error, errors::v1::Reason};

use endpoint::MAX_ENDPOINTS;
use watch::{MAX_WATCHES, MAX_WATCHES_OF_TEAM, WATCH_RETRY};

/// Whether a text could name whose events are meant: a product by its id, or the team by none.
pub(crate) fn could_be_source(product_id: &str) -> bool {
    product_id.is_empty() || could_be_id(product_id)
}

/// Why the domain refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The product is not there, not the caller's, or deleted.
    NoSuchProduct,
    /// The endpoint is not there, or not the caller's.
    NoSuchWebhook,
    /// The delivery is not there, or not the caller's.
    NoSuchDelivery,
    /// The product, or the team, has as many endpoints as it may have.
    TooManyWebhooks,
    /// The endpoint is paused, and nothing is sent to it.
    WebhookPaused,
    /// As many watch the product, or the team, as may at once.
    TooManyWatches,
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::NoSuchProduct => Self::not_found("product"),
            Fault::NoSuchWebhook => Self::not_found("webhook"),
            Fault::NoSuchDelivery => Self::not_found("delivery"),
            Fault::TooManyWebhooks => Self::new(Reason::Conflict).with_message(format!(
                "There are {MAX_ENDPOINTS} webhooks here, which is the most that a product or a team can have: delete \
                 one that is no longer needed, or subscribe an existing one to more events"
            )),
            Fault::WebhookPaused => Self::new(Reason::Conflict)
                .with_message("This webhook is paused, so that nothing is sent to it: resume it first"),
            Fault::TooManyWatches => Self::new(Reason::RateLimited)
                .with_message(format!(
                    "At most {MAX_WATCHES} watch the events of a product or of a team at once, and {MAX_WATCHES_OF_TEAM} \
                     those of a team with all its products: end one that is no longer needed"
                ))
                .with_retry_after(WATCH_RETRY),
        }
    }
}
