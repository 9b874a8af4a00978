//! What a database is doing, for whoever watches over it.
//!
//! Counted where it happens, in plain atomics. What stands in tables is looked at by [`super::Database::sample`], at its
//! own pace, so that reading the numbers never asks the database.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use sea_orm::{ConnectionTrait as _, Statement};

use super::{Database, DbError, Shared};
use crate::telemetry::metrics::{Counter, Durations, Sizes, Spread};

/// Rows of an outbox that are counted at most.
const MAX_COUNTED: i64 = 10_000;
/// Leases that are remembered; there are a handful of names.
const MAX_LEASES: usize = 64;
/// How long a look at the outboxes may take until the database counts as gone.
const SAMPLE_TIMEOUT: Duration = Duration::from_secs(4);

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JobKind {
    /// It only reads.
    Read,
    /// It may change something.
    Write,
}

/// How a database is doing.
#[derive(Debug, Default)]
pub struct Figures {
    up: AtomicBool,
    in_flight: AtomicI64,
    read: Jobs,
    write: Jobs,
    groups: Sizes,
    outboxes: Mutex<BTreeMap<&'static str, OutboxFigures>>,
    leases: Mutex<BTreeMap<String, i64>>,
}

#[derive(Debug, Default)]
struct Jobs {
    durations: Durations,
    failures: Counter,
}

/// What waits in an outbox for one target, and what became of the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OutboxFigures {
    /// Rows that wait, ten thousand at most.
    pub waiting: u64,
    /// How long the oldest of them has waited.
    pub oldest: Duration,
    /// Rows that this process has delivered.
    pub delivered: u64,
    /// Deliveries of this process that failed.
    pub failures: u64,
}

/// A pool of connections, or the readers and the writer of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolFigures {
    /// As many there may be.
    pub max: u32,
    /// As many are open.
    pub open: u32,
    /// Of these, as many do nothing.
    pub idle: u32,
    /// Jobs under way that hold none.
    pub waiting: u32,
    /// Jobs that wait for the writer, where there is one.
    pub writer_queue: Option<u32>,
}

impl Figures {
    /// Whether the database answered when it was last sampled.
    pub fn is_up(&self) -> bool {
        self.up.load(Ordering::Relaxed)
    }

    /// Jobs under way.
    pub fn in_flight(&self) -> i64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// How long jobs took, and how many failed.
    pub fn jobs(&self, kind: JobKind) -> (Spread, u64) {
        let jobs = self.of(kind);
        (jobs.durations.read(), jobs.failures.get())
    }

    /// How many jobs shared a commit.
    pub fn groups(&self) -> Spread {
        self.groups.read()
    }

    /// The outboxes that this process relays from, by target.
    pub fn outboxes(&self) -> Vec<(&'static str, OutboxFigures)> {
        self.outboxes.lock().iter().map(|(target, figures)| (*target, *figures)).collect()
    }

    /// The leases that this process asked for, and until when it holds them: long ago, where it does not.
    pub fn leases(&self) -> Vec<(String, i64)> {
        self.leases.lock().iter().map(|(name, until_ms)| (name.clone(), *until_ms)).collect()
    }

    pub(crate) fn grouped(&self, size: usize) {
        self.groups.observe(size);
    }

    pub(crate) fn relays(&self, target: &'static str) {
        self.outboxes.lock().entry(target).or_default();
    }

    pub(crate) fn delivered(&self, target: &'static str, rows: usize) {
        let rows = u64::try_from(rows).unwrap_or(u64::MAX);
        self.outboxes.lock().entry(target).or_default().delivered += rows;
    }

    pub(crate) fn not_delivered(&self, target: &'static str) {
        self.outboxes.lock().entry(target).or_default().failures += 1;
    }

    pub(crate) fn leased(&self, name: &str, until_ms: i64) {
        let mut leases = self.leases.lock();
        if let Some(known) = leases.get_mut(name) {
            *known = until_ms;
        } else if leases.len() < MAX_LEASES {
            leases.insert(name.to_owned(), until_ms);
        }
    }

    fn of(&self, kind: JobKind) -> &Jobs {
        match kind {
            JobKind::Read => &self.read,
            JobKind::Write => &self.write,
        }
    }
}

/// A job under way. One that nobody waits for any more counts as ended: what it cost its caller is all that is measured.
pub(super) struct Measured {
    shared: Arc<Shared>,
    kind: JobKind,
    began: Instant,
}

impl Measured {
    pub(super) fn begins(shared: &Arc<Shared>, kind: JobKind) -> Self {
        shared.figures.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { shared: Arc::clone(shared), kind, began: shared.clock.monotonic() }
    }

    pub(super) fn ended<T, E>(self, result: Result<T, E>) -> Result<T, E> {
        if result.is_err() {
            self.shared.figures.of(self.kind).failures.inc();
        }
        result
    }
}

impl Drop for Measured {
    fn drop(&mut self) {
        let figures = &self.shared.figures;
        figures.in_flight.fetch_sub(1, Ordering::Relaxed);
        let took = self.shared.clock.monotonic().saturating_duration_since(self.began);
        figures.of(self.kind).durations.observe(took);
    }
}

impl Database {
    /// How the database is doing.
    pub fn figures(&self) -> &Figures {
        &self.shared.figures
    }

    /// Looks at what waits in the outboxes that this process relays from, and with that at whether the database
    /// answers.
    pub async fn sample(&self) {
        let targets: Vec<&'static str> = self.shared.figures.outboxes.lock().keys().copied().collect();
        // One that has too much to do is there.
        let is_up = match tokio::time::timeout(SAMPLE_TIMEOUT, self.is_there()).await {
            Ok(answer) => answer.as_ref().err().is_none_or(DbError::is_retryable),
            Err(_) => false,
        };
        self.shared.figures.up.store(is_up, Ordering::Relaxed);
        let looking = async {
            let mut found = Vec::with_capacity(targets.len());
            for target in targets {
                found.push((target, self.waiting_for(target).await?));
            }
            Ok::<_, DbError>(found)
        };
        // What cannot be counted now stays as it was.
        let Ok(Ok(found)) = tokio::time::timeout(SAMPLE_TIMEOUT, looking).await else { return };
        let mut outboxes = self.shared.figures.outboxes.lock();
        for (target, (waiting, oldest)) in found {
            let outbox = outboxes.entry(target).or_default();
            (outbox.waiting, outbox.oldest) = (waiting, oldest);
        }
    }

    /// One walk along an index, that ends early.
    async fn waiting_for(&self, target: &'static str) -> Result<(u64, Duration), DbError> {
        let now_ms = self.clock().now_ms();
        self.read(move |reader| async move {
            let statement = Statement::from_sql_and_values(
                reader.get_database_backend(),
                "SELECT COUNT(*) AS waiting, MIN(created_at_ms) AS oldest_ms FROM \
                 (SELECT created_at_ms FROM outbox WHERE target = $1 ORDER BY seq LIMIT $2) waiting_rows",
                [target.into(), MAX_COUNTED.into()],
            );
            let Some(row) = reader.query_one_raw(statement).await? else { return Ok((0, Duration::ZERO)) };
            let waiting = u64::try_from(row.try_get::<i64>("", "waiting")?).unwrap_or(0);
            let age_ms = row.try_get::<Option<i64>>("", "oldest_ms")?.map_or(0, |at_ms| now_ms.saturating_sub(at_ms));
            Ok((waiting, Duration::from_millis(u64::try_from(age_ms).unwrap_or(0))))
        })
        .await
    }
}
