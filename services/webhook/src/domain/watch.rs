//! Watching: what is shown of events while they happen.

use std::time::Duration;

use super::delivery::Delivery;

/// Who may watch one product, or the events of a team itself, at once.
pub(crate) const MAX_WATCHES: i64 = 10;
/// Who may watch anything of a team at once, in one mode.
pub(crate) const MAX_WATCHES_OF_TEAM: i64 = 50;
/// When to ask again where as many watch as may: watches that ended without a word are forgotten by then.
pub(crate) const WATCH_RETRY: Duration = Duration::from_mins(1);

/// An event as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Shown {
    pub(crate) id: String,
    pub(crate) topic: String,
    pub(crate) created_at_ms: i64,
    /// The body of its deliveries.
    pub(crate) payload: String,
}

/// A delivery of an event that was shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ShownDelivery {
    pub(crate) endpoint_id: String,
    pub(crate) delivery: Delivery,
}
