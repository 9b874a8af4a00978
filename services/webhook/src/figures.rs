//! What is counted of deliveries: attempts by what came of them, what is due and for how long, what is paused.
//!
//! What stands in tables is looked at from time to time, and never because somebody reads the numbers.

use std::{sync::Once, time::Duration};

use paperkey_kit::{
    clock::Clock,
    shutdown::Shutdown,
    telemetry::metrics::{self, Counter, Durations, Family, Gauge, Held, Snapshot},
};

use crate::{
    domain::attempt::{Attempt, AttemptFault},
    store::{Store, backlog::Backlog},
};

/// How often what is due is looked at.
const SAMPLE: Duration = Duration::from_secs(10);

static ATTEMPTS: Family =
    Family::counter("paperkey_webhook_attempts_total", &["outcome"], "Attempts to deliver, by what came of them.");
static DURATION: Family = Family::histogram(
    "paperkey_webhook_attempt_duration_seconds",
    &["outcome"],
    "How long attempts took, from the name to the last byte of the answer.",
);
static DELIVERIES: Family = Family::counter(
    "paperkey_webhook_deliveries_total",
    &["outcome"],
    "Deliveries whose attempt was written down: delivered, to be tried again, or given up.",
);
static IN_FLIGHT: Family = Family::gauge("paperkey_webhook_in_flight", &[], "Attempts under way in this process.");
static PAUSES: Family = Family::counter(
    "paperkey_webhook_pauses_total",
    &[],
    "Endpoints that this process has paused because their receivers kept failing.",
);
static DUE: Family = Family::gauge(
    "paperkey_webhook_due",
    &[],
    "Deliveries to active endpoints whose time has come and that nobody sends yet; counting ends at 10000.",
);
static DUE_AGE: Family =
    Family::gauge("paperkey_webhook_oldest_due_age_seconds", &[], "For how long the oldest of them has been due.");
static PAUSED: Family =
    Family::gauge("paperkey_webhook_paused_endpoints", &[], "Endpoints that are paused; counting ends at 10000.");
static FAMILIES: &[&Family] = &[&ATTEMPTS, &DURATION, &DELIVERIES, &IN_FLIGHT, &PAUSES, &DUE, &DUE_AGE, &PAUSED];

/// What may come of an attempt; the first is that it was taken.
const OUTCOMES: [Option<AttemptFault>; 9] = [
    None,
    Some(AttemptFault::Timeout),
    Some(AttemptFault::Dns),
    Some(AttemptFault::AddressNotAllowed),
    Some(AttemptFault::Connect),
    Some(AttemptFault::Tls),
    Some(AttemptFault::HttpStatus),
    Some(AttemptFault::Redirect),
    Some(AttemptFault::Other),
];

static BY_OUTCOME: [Counter; OUTCOMES.len()] = [const { Counter::new() }; OUTCOMES.len()];
static TAKEN: Durations = Durations::new();
static NOT_TAKEN: Durations = Durations::new();
static DELIVERED: Counter = Counter::new();
static AGAIN: Counter = Counter::new();
static GIVEN_UP: Counter = Counter::new();
static UNDER_WAY: Gauge = Gauge::new();
static WERE_PAUSED: Counter = Counter::new();
static DUE_NOW: Gauge = Gauge::new();
static DUE_FOR_MS: Gauge = Gauge::new();
static ARE_PAUSED: Gauge = Gauge::new();

/// An attempt begins; it is under way until what is returned is dropped.
pub(crate) fn begins() -> Held {
    UNDER_WAY.hold()
}

/// An attempt has ended.
pub(crate) fn attempted(attempt: &Attempt) {
    let number = OUTCOMES.iter().position(|outcome| *outcome == attempt.fault).unwrap_or(OUTCOMES.len() - 1);
    BY_OUTCOME[number].inc();
    let took = Duration::from_millis(u64::try_from(attempt.duration_ms).unwrap_or(0));
    if attempt.fault.is_none() { TAKEN.observe(took) } else { NOT_TAKEN.observe(took) }
}

/// What came of attempts is written down.
pub(crate) fn recorded(delivered: u64, again: u64, given_up: u64, paused: usize) {
    DELIVERED.add(delivered);
    AGAIN.add(again);
    GIVEN_UP.add(given_up);
    WERE_PAUSED.add(u64::try_from(paused).unwrap_or(u64::MAX));
}

/// Publishes all that. The numbers are the process's, however many services it makes.
pub(crate) fn publish() {
    static PUBLISHED: Once = Once::new();
    PUBLISHED.call_once(|| metrics::publish(FAMILIES, collect));
}

fn collect(snapshot: &mut Snapshot) {
    for (outcome, count) in OUTCOMES.iter().zip(&BY_OUTCOME) {
        let word = outcome.map_or("delivered", AttemptFault::word);
        snapshot.put(&ATTEMPTS, &[word], count.get());
    }
    snapshot.put(&DURATION, &["delivered"], TAKEN.read());
    snapshot.put(&DURATION, &["failed"], NOT_TAKEN.read());
    for (word, count) in [("delivered", &DELIVERED), ("retried", &AGAIN), ("given_up", &GIVEN_UP)] {
        snapshot.put(&DELIVERIES, &[word], count.get());
    }
    snapshot.put(&IN_FLIGHT, &[], UNDER_WAY.get());
    snapshot.put(&PAUSES, &[], WERE_PAUSED.get());
    snapshot.put(&DUE, &[], DUE_NOW.get());
    snapshot.put(&DUE_AGE, &[], Duration::from_millis(u64::try_from(DUE_FOR_MS.get()).unwrap_or(0)));
    snapshot.put(&PAUSED, &[], ARE_PAUSED.get());
}

/// Looks at what is due and what is paused, until shut down.
pub(crate) async fn sample(store: Store, clock: Clock, mut shutdown: Shutdown) {
    while !shutdown.has_come() {
        match store.backlog().await {
            Ok(Backlog { due, oldest_due_ms, paused }) => {
                DUE_NOW.set(due);
                DUE_FOR_MS.set(oldest_due_ms.map_or(0, |at_ms| clock.now_ms().saturating_sub(at_ms)));
                ARE_PAUSED.set(paused);
            }
            // What was seen before stands; that the database does not answer is told elsewhere.
            Err(error) => tracing::debug!(%error, "what is due was not looked at"),
        }
        tokio::select! {
            () = shutdown.wait() => {}
            () = tokio::time::sleep(SAMPLE) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_is_counted_by_what_came_of_it() {
        let before = BY_OUTCOME[2].get();
        attempted(&Attempt::unsent(0, AttemptFault::Dns));
        assert!(BY_OUTCOME[2].get() > before);
        publish();
        assert!(metrics::text().contains("paperkey_webhook_attempts_total{outcome=\"dns\"} "));
    }
}
