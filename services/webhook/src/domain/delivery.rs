//! Deliveries: one event on its way to one endpoint.

use super::{attempt::Attempt, schedule::Schedule};

/// How far a delivery is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DeliveryStatus {
    /// Waiting for its first or next attempt.
    Pending,
    /// The receiver has it.
    Succeeded,
    /// No further attempt is made.
    Failed,
}

impl DeliveryStatus {
    /// The word that is stored.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
        }
    }

    /// The status by its word.
    pub(crate) fn of(word: &str) -> Option<Self> {
        match word {
            "pending" => Some(Self::Pending),
            "succeeded" => Some(Self::Succeeded),
            "failed" => Some(Self::Failed),
            _ => None,
        }
    }
}

/// One event on its way to one endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Delivery {
    pub(crate) id: String,
    pub(crate) event_id: String,
    pub(crate) topic: String,
    pub(crate) status: DeliveryStatus,
    pub(crate) attempts: i64,
    pub(crate) response_status: Option<i64>,
    pub(crate) duration_ms: Option<i64>,
    pub(crate) error: Option<String>,
    pub(crate) created_at_ms: i64,
    pub(crate) last_attempt_at_ms: Option<i64>,
    pub(crate) next_attempt_at_ms: Option<i64>,
}

/// An attempt as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LoggedAttempt {
    pub(crate) number: i64,
    pub(crate) at_ms: i64,
    pub(crate) duration_ms: i64,
    pub(crate) response_status: Option<i64>,
    pub(crate) error: Option<String>,
    pub(crate) snippet: Option<String>,
}

/// What becomes of a delivery after an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Settled {
    pub(crate) status: DeliveryStatus,
    /// Only where it is pending.
    pub(crate) next_attempt_at_ms: Option<i64>,
}

/// What becomes of a delivery that has been tried `made` times, this one included.
pub(crate) fn settle(schedule: &Schedule, made: i64, attempt: &Attempt, now_ms: i64, chance: f64) -> Settled {
    if attempt.fault.is_none() {
        return Settled { status: DeliveryStatus::Succeeded, next_attempt_at_ms: None };
    }
    match schedule.next_ms(made, chance, attempt.retry_after_ms) {
        Some(wait_ms) => {
            Settled { status: DeliveryStatus::Pending, next_attempt_at_ms: Some(now_ms.saturating_add(wait_ms)) }
        }
        None => Settled { status: DeliveryStatus::Failed, next_attempt_at_ms: None },
    }
}
