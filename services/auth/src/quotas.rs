//! Units are taken here: those that wait for one counter become one write.
//!
//! Each counter that somebody waits for has a queue and a task, which writes what waits as one transaction, and while it
//! does, the next gather; nobody waits for a better moment. The task ends when nobody waits any more. A caller who goes
//! away takes nothing while still waiting, and what is being written already stands.
//!
//! Deliberately absent: numbers that are kept here. What is used and what is left is known to the database alone, so
//! that several processes take from the same, and a change of the limit counts at once.

use std::{
    collections::{BTreeSet, HashMap, VecDeque},
    sync::Arc,
};

use paperkey_kit::{clock::Clock, config::Tiers};
use paperkey_proto::{Error, principal::v1::Mode};
use parking_lot::Mutex;
use tokio::sync::{Semaphore, oneshot};

use crate::{
    domain::{
        Fault, could_be_id,
        quota::{Balance, Consumption, Counter, MeterHistory, MeterUse, Month, Outcome, Period, consume_id, histories},
    },
    store::{Failure, Store},
};

/// How many counters may be waited for at once.
const MAX_COUNTERS: usize = 1_024;
/// How many may wait for one counter.
const MAX_WAITING: usize = 1_024;
/// How many one transaction settles.
const MAX_BATCH: usize = 400;

/// Takes units.
#[derive(Clone, Debug)]
pub(crate) struct Quotas(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    store: Store,
    tiers: Arc<Tiers>,
    meters: BTreeSet<String>,
    clock: Clock,
    counters: Mutex<HashMap<Counter, VecDeque<Waiting>>>,
    writers: Semaphore,
}

/// Somebody who asks for units.
#[derive(Debug)]
struct Waiting {
    consumption: Consumption,
    answer: oneshot::Sender<Result<Outcome, Refusal>>,
}

/// Why nobody was asked, or nobody has answered. What has failed is in the log, once for all of them.
#[derive(Clone, Copy, Debug)]
enum Refusal {
    Fault(Fault),
    Failed,
}

/// Who asks for how much of what.
#[derive(Debug)]
pub(crate) struct Asked {
    pub(crate) consume_id: String,
    pub(crate) team_id: String,
    pub(crate) mode: Mode,
    pub(crate) meter: String,
    pub(crate) units: i64,
}

impl Quotas {
    pub(crate) fn new(store: Store, tiers: Arc<Tiers>, clock: Clock) -> Self {
        let meters = tiers.meters().into_iter().map(str::to_owned).collect();
        let writers = Semaphore::new(store.counters_at_once());
        Self(Arc::new(Inner { store, tiers, meters, clock, counters: Mutex::default(), writers }))
    }

    /// Takes units, all or none, or only looks where there are none to take. They are taken for good when this answers.
    pub(crate) async fn consume(&self, asked: Asked) -> Result<Outcome, Error> {
        let inner = &self.0;
        let Asked { consume_id: id, team_id, mode, meter, units } = asked;
        let id = consume_id(id)?;
        if !inner.meters.contains(&meter) {
            let known = inner.meters.iter().map(String::as_str).collect::<Vec<_>>().join(", ");
            return Err(Error::field("meter", format!("must be one of {known}")));
        }
        if !could_be_id(&team_id) {
            return Err(Fault::NoSuchTeam.into());
        }
        let month = Month::at(inner.clock.now_ms());
        let resets_at_ms = month.ends_at_ms();
        let counter = Counter { team_id, meter, month };
        if mode == Mode::Test || units <= 0 {
            let mut balance = inner.store.balance(&inner.tiers, counter).await?;
            if mode == Mode::Test {
                balance.used = 0;
            }
            // Nothing is never too much.
            return Ok(Outcome { granted: true, balance, resets_at_ms });
        }
        let answer = self.submit(counter, Consumption { id, units })?;
        match answer.await {
            Ok(Ok(outcome)) => Ok(outcome),
            Ok(Err(Refusal::Fault(fault))) => Err(fault.into()),
            Ok(Err(Refusal::Failed)) => Err(Error::unavailable("the units could not be taken")),
            Err(_) => Err(Error::unavailable("whoever takes units has ended")),
        }
    }

    /// Gives units back.
    pub(crate) async fn refund(&self, id: String) -> Result<(), Error> {
        self.0.store.refund(consume_id(id)?).await
    }

    /// What a team has used of each meter this month, and when the month ends.
    pub(crate) async fn usage(&self, team_id: String, mode: Mode) -> Result<(Vec<MeterUse>, i64), Error> {
        let month = Month::at(self.0.clock.now_ms());
        let ends_at_ms = month.ends_at_ms();
        let mut used = self.0.store.usage(&self.0.tiers, team_id, month).await?;
        if mode == Mode::Test {
            for one in &mut used {
                one.balance = Balance { used: 0, ..one.balance };
            }
        }
        Ok((used, ends_at_ms))
    }

    /// What a team has used of each meter on the last days.
    pub(crate) async fn history(
        &self,
        team_id: String,
        mode: Mode,
        days: Option<i32>,
    ) -> Result<Vec<MeterHistory>, Error> {
        let period = Period::of_days(days, self.0.clock.now_ms())?;
        let mut used = self.0.store.used_by_day(team_id, period).await?;
        if mode == Mode::Test {
            used.clear();
        }
        Ok(histories(used, &self.0.tiers.meters(), period))
    }

    fn submit(
        &self,
        counter: Counter,
        consumption: Consumption,
    ) -> Result<oneshot::Receiver<Result<Outcome, Refusal>>, Error> {
        let (answer, answered) = oneshot::channel();
        let waiting = Waiting { consumption, answer };
        let mut counters = self.0.counters.lock();
        if let Some(queue) = counters.get_mut(&counter) {
            if queue.len() >= MAX_WAITING {
                return Err(Error::unavailable("too many wait for units of one team"));
            }
            queue.push_back(waiting);
        } else {
            if counters.len() >= MAX_COUNTERS {
                return Err(Error::unavailable("too many teams wait for units"));
            }
            counters.insert(counter.clone(), VecDeque::from([waiting]));
            drop(counters);
            tokio::spawn(Arc::clone(&self.0).settle(counter));
        }
        Ok(answered)
    }
}

impl Inner {
    /// Settles what waits for a counter until nothing does.
    async fn settle(self: Arc<Self>, counter: Counter) {
        // If this task ends in any other way, nobody is left waiting for it.
        let mut abandoned = Abandoned { inner: &self, counter: Some(&counter) };
        loop {
            // More may gather until it is this counter's turn.
            let turn = self.writers.acquire().await;
            let Some(batch) = self.next(&counter) else {
                abandoned.counter = None;
                return;
            };
            self.write(&counter, batch).await;
            drop(turn);
        }
    }

    /// What one transaction settles, in the order of asking. Where nobody waits, the counter is forgotten.
    fn next(&self, counter: &Counter) -> Option<Vec<Waiting>> {
        let mut counters = self.counters.lock();
        let queue = counters.get_mut(counter)?;
        let mut batch = Vec::new();
        while let Some(waiting) = queue.pop_front() {
            // Who has gone away takes nothing.
            if !waiting.answer.is_closed() {
                batch.push(waiting);
            }
            if batch.len() == MAX_BATCH {
                break;
            }
        }
        if batch.is_empty() {
            counters.remove(counter);
            return None;
        }
        Some(batch)
    }

    async fn write(&self, counter: &Counter, batch: Vec<Waiting>) {
        let (asked, answers): (Vec<_>, Vec<_>) =
            batch.into_iter().map(|waiting| (waiting.consumption, waiting.answer)).unzip();
        match self.store.consume(&self.tiers, counter, &asked.into()).await {
            Ok(verdicts) => {
                for (answer, verdict) in answers.into_iter().zip(verdicts) {
                    // Who went away meanwhile asks again, by the same id, or gives back.
                    let _ = answer.send(verdict.map_err(Refusal::Fault));
                }
            }
            Err(failure) => {
                let refusal = match failure {
                    Failure::Fault(fault) => Refusal::Fault(fault),
                    failure => {
                        let error = Error::from(failure);
                        tracing::warn!(%error, waiting = answers.len(), "units could not be taken");
                        Refusal::Failed
                    }
                };
                for answer in answers {
                    let _ = answer.send(Err(refusal));
                }
            }
        }
    }
}

/// Forgets a counter whose task ends before its work does; whoever waits is told by the end of their channel.
struct Abandoned<'a> {
    inner: &'a Inner,
    counter: Option<&'a Counter>,
}

impl Drop for Abandoned<'_> {
    fn drop(&mut self) {
        if let Some(counter) = self.counter {
            self.inner.counters.lock().remove(counter);
        }
    }
}
