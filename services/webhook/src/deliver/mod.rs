//! The dispatcher: sends what is due, fairly, and never more at a time than an endpoint or the process can bear.
//!
//! Each look asks which endpoints have something due and claims for each at most what its cap leaves free, so a slow
//! or dead endpoint costs the others nothing but its own few places.

mod connector;
mod post;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use paperkey_kit::{clock::Clock, db::DbError, ids::new_id, shutdown::Shutdown};
use tokio::task::JoinSet;

use crate::{
    domain::endpoint::{Status, UrlRules},
    store::{
        Store,
        dispatch::{Claimed, LANES_A_LOOK, Outcome, Receiver, Want},
    },
    wake::Wake,
};

pub(crate) use post::Poster;

/// Deliveries under way in the whole process.
const MAX_IN_FLIGHT: usize = 256;
/// How often to look when nothing wakes the dispatcher: other processes hear nothing of this one, and retries fall due.
const LOOK: Duration = Duration::from_millis(500);
/// How much longer than an exchange a claim lasts, in milliseconds.
const CLAIM_SLACK_MS: i64 = 10_000;
/// How long deliveries under way may take at a shutdown, beyond their own timeout.
const DRAIN_SLACK: Duration = Duration::from_secs(1);

/// How deliveries are sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    pub(crate) rules: UrlRules,
    pub(crate) timeout: Duration,
    pub(crate) per_endpoint: usize,
}

/// Sends what is due.
pub(crate) struct Dispatcher {
    store: Store,
    clock: Clock,
    wake: Arc<Wake>,
    poster: Arc<Poster>,
    limits: Limits,
    holder: String,
    in_flight: HashMap<String, usize>,
    /// Deliveries under way, by id.
    held: HashSet<String>,
    tasks: JoinSet<(String, String)>,
}

impl Dispatcher {
    pub(crate) fn new(store: Store, clock: Clock, wake: Arc<Wake>, poster: Poster, limits: Limits) -> Self {
        let holder = new_id("proc", &clock);
        let poster = Arc::new(poster);
        let (in_flight, tasks) = (HashMap::new(), JoinSet::new());
        Self { store, clock, wake, poster, limits, holder, in_flight, held: HashSet::new(), tasks }
    }

    /// Sends until shut down, then waits for what is under way and gives back the rest.
    pub(crate) async fn run(mut self, mut shutdown: Shutdown) {
        if let Err(error) = self.store.release_orphans().await {
            tracing::warn!(%error, "claims of an earlier process run out by themselves");
        }
        while !shutdown.has_come() {
            let sent = match self.look().await {
                Ok(sent) => sent,
                Err(error) => {
                    tracing::warn!(%error, "webhooks wait for the database");
                    0
                }
            };
            // A full house is asked again when a place is free, an empty one when something comes or falls due.
            let idle = sent == 0;
            tokio::select! {
                () = shutdown.wait() => break,
                Some(done) = self.tasks.join_next() => self.leave(done),
                () = self.wake.wait() => {}
                () = tokio::time::sleep(LOOK), if idle => {}
                () = std::future::ready(()), if !idle => {}
            }
        }
        let drain = self.limits.timeout + DRAIN_SLACK;
        let drained = async {
            while let Some(done) = self.tasks.join_next().await {
                if let Ok((id, _)) = done {
                    self.held.remove(&id);
                }
            }
        };
        if tokio::time::timeout(drain, drained).await.is_err() {
            tracing::warn!("deliveries under way were left to be sent again");
        }
        let left = self.held.into_iter().collect();
        if let Err(error) = self.store.release(left, self.holder).await {
            tracing::warn!(%error, "claims of deliveries run out by themselves");
        }
    }

    fn leave(&mut self, done: Result<(String, String), tokio::task::JoinError>) {
        let Ok((id, endpoint_id)) = done else {
            // A task that panicked does not say whose it was: count anew when nothing is under way.
            if self.tasks.is_empty() {
                self.in_flight.clear();
            }
            return;
        };
        self.held.remove(&id);
        if let Some(count) = self.in_flight.get_mut(&endpoint_id) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.in_flight.remove(&endpoint_id);
            }
        }
    }

    /// Claims what is due and starts sending it; says how many that were.
    async fn look(&mut self) -> Result<usize, DbError> {
        while let Some(done) = self.tasks.try_join_next() {
            self.leave(done);
        }
        // What has changed is read anew at each claim, so there is nothing to forget here.
        drop(self.wake.take_changed());
        let mut free = MAX_IN_FLIGHT.saturating_sub(self.tasks.len());
        if free == 0 {
            return Ok(0);
        }
        let now_ms = self.clock.now_ms();
        let mut wants = Vec::new();
        let mut after = String::new();
        // Page by page, so that no number of busy endpoints hides those behind them.
        while free > 0 {
            let lanes = self.store.due_lanes(after).await?;
            let more = lanes.len() == LANES_A_LOOK;
            after = lanes.last().map(|lane| lane.endpoint_id.clone()).unwrap_or_default();
            for lane in lanes.into_iter().filter(|lane| lane.due_at_ms <= now_ms) {
                let busy = self.in_flight.get(&lane.endpoint_id).copied().unwrap_or(0);
                let count = self.limits.per_endpoint.saturating_sub(busy).min(free);
                if count > 0 {
                    free -= count;
                    wants.push(Want { endpoint_id: lane.endpoint_id, count });
                }
            }
            if !more {
                break;
            }
        }
        if wants.is_empty() {
            return Ok(0);
        }
        let timeout_ms = i64::try_from(self.limits.timeout.as_millis()).unwrap_or(i64::MAX);
        let held_until_ms = now_ms.saturating_add(timeout_ms).saturating_add(CLAIM_SLACK_MS);
        let haul = self.store.claim(wants, self.holder.clone(), held_until_ms).await?;
        let receivers: HashMap<_, _> =
            haul.receivers.into_iter().map(|(id, receiver)| (id, Arc::new(receiver))).collect();
        let count = haul.deliveries.len();
        let mut back = Vec::new();
        for delivery in haul.deliveries {
            match receivers.get(&delivery.endpoint_id) {
                Some(receiver) if receiver.status == Status::Active => {
                    *self.in_flight.entry(delivery.endpoint_id.clone()).or_default() += 1;
                    self.held.insert(delivery.id.clone());
                    self.start(delivery, Arc::clone(receiver));
                }
                // Paused or deleted since the look: held, or gone.
                _ => back.push(delivery.id),
            }
        }
        if !back.is_empty() {
            self.store.release(back, self.holder.clone()).await?;
        }
        Ok(count)
    }

    fn start(&mut self, delivery: Claimed, receiver: Arc<Receiver>) {
        let (store, poster, holder) = (self.store.clone(), Arc::clone(&self.poster), self.holder.clone());
        self.tasks.spawn(async move {
            let attempt = poster.post(&delivery, &receiver).await;
            tracing::debug!(
                delivery = delivery.id,
                status = attempt.response_status,
                fault = attempt.fault.map(|fault| fault.word()),
                "sent"
            );
            let outcome = Outcome {
                delivery_id: delivery.id.clone(),
                endpoint_id: delivery.endpoint_id.clone(),
                attempts: delivery.attempts,
                attempt,
                chance: rand::random(),
            };
            match store.record(vec![outcome], holder).await {
                Ok(recorded) => {
                    for id in recorded.paused {
                        tracing::warn!(endpoint = id, "a webhook endpoint was paused");
                    }
                }
                // The claim runs out, and the delivery is sent again: at least once.
                Err(error) => {
                    tracing::warn!(delivery = delivery.id, %error, "what came of a delivery could not be written");
                }
            }
            (delivery.id, delivery.endpoint_id)
        });
    }
}
