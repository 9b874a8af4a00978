//! Deliveries, as the contract has them.

use paperkey_kit::values::timestamp;
use paperkey_proto::webhook::v1::{Delivery as DeliveryMessage, DeliveryAttempt, DeliveryStatus as StatusMessage};

use crate::domain::delivery::{Delivery, DeliveryStatus, LoggedAttempt};

pub(super) fn encode(delivery: Delivery) -> DeliveryMessage {
    let status = match delivery.status {
        DeliveryStatus::Pending => StatusMessage::Pending,
        DeliveryStatus::Succeeded => StatusMessage::Succeeded,
        DeliveryStatus::Failed => StatusMessage::Failed,
    };
    DeliveryMessage {
        id: delivery.id,
        event_id: delivery.event_id,
        event: delivery.topic,
        status: status.into(),
        attempts_count: narrow(delivery.attempts),
        response_status: delivery.response_status.map(narrow),
        duration_ms: delivery.duration_ms.map(narrow),
        error: delivery.error,
        created_at: Some(timestamp(delivery.created_at_ms)),
        last_attempt_at: delivery.last_attempt_at_ms.map(timestamp),
        next_attempt_at: delivery.next_attempt_at_ms.map(timestamp),
    }
}

pub(super) fn encode_attempt(attempt: LoggedAttempt) -> DeliveryAttempt {
    DeliveryAttempt {
        number: narrow(attempt.number),
        at: Some(timestamp(attempt.at_ms)),
        duration_ms: narrow(attempt.duration_ms),
        response_status: attempt.response_status.map(narrow),
        error: attempt.error,
        response_snippet: attempt.snippet,
    }
}

/// A stored number in the width of the contract. None of ours comes near its bounds.
pub(super) fn narrow(number: i64) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}
