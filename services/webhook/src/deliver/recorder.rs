//! Writes down what came of deliveries, as many at once as have come together.
//!
//! One at a time would cost a commit each. Nothing is waited for to make a batch larger: while one is written, the
//! next gathers.

use std::time::Duration;

use paperkey_kit::fail_point::{self, Point};
use tokio::sync::{mpsc, oneshot};

use crate::{
    figures,
    store::{Store, dispatch::Outcome},
};

/// Outcomes of one transaction.
const BATCH: usize = 64;
/// Outcomes that wait to be written; beyond it, sending waits.
const QUEUE: usize = 1_024;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// What a recorded failure means for its endpoint.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Verdict {
    /// It was paused by what was just recorded.
    pub(super) paused: bool,
    /// When something of what was just recorded is to be tried again.
    pub(super) next_due_at_ms: Option<i64>,
}

/// An outcome, and who waits for it to be written.
pub(super) struct Entry {
    pub(super) outcome: Outcome,
    pub(super) written: Option<oneshot::Sender<Verdict>>,
}

/// Where outcomes go.
pub(super) fn queue() -> (mpsc::Sender<Entry>, mpsc::Receiver<Entry>) {
    mpsc::channel(QUEUE)
}

/// Writes until nobody sends any more. An outcome that cannot be written for as long as a claim lasts is let go: the
/// delivery is anyone's again by then, and is sent once more.
pub(super) async fn run(store: Store, holder: String, mut queue: mpsc::Receiver<Entry>, patience: Duration) {
    let mut batch = Vec::with_capacity(BATCH);
    while queue.recv_many(&mut batch, BATCH).await > 0 {
        let (outcomes, waiting): (Vec<Outcome>, Vec<_>) =
            batch.drain(..).map(|entry| (entry.outcome, entry.written)).unzip();
        let mut waited = Duration::ZERO;
        let mut pause = FIRST_PAUSE;
        loop {
            match store.record(outcomes.clone(), holder.clone()).await {
                Ok(recorded) => {
                    fail_point::reach(Point::OutcomeAfterCommit);
                    let paused = recorded.paused.len();
                    figures::recorded(recorded.delivered, recorded.again, recorded.given_up, paused);
                    for endpoint_id in &recorded.paused {
                        tracing::warn!(endpoint = endpoint_id, "a webhook was paused: its receiver keeps failing");
                    }
                    for (outcome, written) in outcomes.iter().zip(waiting) {
                        let Some(written) = written else { continue };
                        let paused = recorded.paused.contains(&outcome.endpoint_id);
                        // Who does not wait any more does not need to know.
                        let _ = written.send(Verdict { paused, next_due_at_ms: recorded.next_due_at_ms });
                    }
                    break;
                }
                Err(error) if waited >= patience => {
                    tracing::error!(%error, lost = outcomes.len(), "outcomes of deliveries could not be written");
                    break;
                }
                Err(error) => {
                    tracing::warn!(%error, "outcomes of deliveries wait to be written");
                    tokio::time::sleep(pause).await;
                    waited += pause;
                    pause = (pause * 2).min(MAX_PAUSE);
                }
            }
        }
    }
}
