//! The relay: brings what transactions have emitted to where it belongs.
//!
//! Rows of one target are delivered in their order, at least once: the receiver
//! recognises a repetition by the event's id. A lease keeps a second process from
//! delivering the same rows, which saves work but is not what correctness rests
//! on. On PostgreSQL a row that commits late is delivered after its successors.
//!
//! Deliberately absent: giving up on a row. A sink that cannot use one accepts
//! it and deals with it; as long as it refuses, nothing of that target moves.

use std::{fmt, future::Future, time::Duration};

use sea_orm::{ConnectionTrait as _, Statement, Value};
use tokio::sync::watch;

use crate::{
    db::{Database, DbError},
    fail_point::{self, Point},
    lease::Leases,
};

/// Rows handed over at once at most.
pub const MAX_BATCH: u32 = 200;

/// An event on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutboxRow {
    /// Its place in the order.
    pub seq: i64,
    /// The event's id.
    pub id: String,
    /// What kind of event.
    pub topic: String,
    /// Whose event.
    pub team_id: String,
    /// The body, sealed by the one who emitted it.
    pub payload: Vec<u8>,
    /// When it was emitted.
    pub created_at_ms: i64,
}

/// Where a relay delivers.
pub trait Sink: Send + Sync {
    /// Why a delivery failed; it is logged.
    type Error: fmt::Display + Send;

    /// Takes the batch as a whole, durably, or fails and gets it again. It may
    /// contain what was delivered before.
    fn deliver(&self, batch: &[OutboxRow]) -> impl Future<Output = Result<(), Self::Error>> + Send;
}

/// How a relay paces itself.
#[derive(Clone, Copy, Debug)]
pub struct RelayOptions {
    /// Rows of one delivery, [`MAX_BATCH`] at most.
    pub batch: u32,
    /// How often to look when nothing wakes the relay.
    pub poll: Duration,
    /// How long one delivery may take.
    pub deliver_timeout: Duration,
    /// How long the lease lasts. A delivery begins only while at least half of
    /// it is left, so it should be twice `deliver_timeout` or more. Also the
    /// delay after a crash until another process goes on.
    pub lease_ttl: Duration,
    /// The longest pause after failures.
    pub max_backoff: Duration,
}

impl Default for RelayOptions {
    fn default() -> Self {
        Self {
            batch: MAX_BATCH,
            poll: Duration::from_millis(500),
            deliver_timeout: Duration::from_secs(3),
            lease_ttl: Duration::from_secs(6),
            max_backoff: Duration::from_secs(5),
        }
    }
}

/// Delivers the rows of one target.
pub struct Relay<S> {
    database: Database,
    leases: Leases,
    target: &'static str,
    lease: String,
    holder: String,
    sink: S,
    options: RelayOptions,
    held_until_ms: i64,
}

enum Round {
    /// Nothing to do, or another process does it.
    Idle,
    /// A batch was delivered; there may be more.
    Delivered,
}

impl<S: Sink> Relay<S> {
    /// A relay for `target`. `holder` names this process among others.
    pub fn new(
        database: Database,
        target: &'static str,
        holder: impl Into<String>,
        sink: S,
        options: RelayOptions,
    ) -> Self {
        Self {
            leases: Leases::new(database.clone()),
            database: database.patient(),
            target,
            lease: format!("outbox:{target}"),
            holder: holder.into(),
            sink,
            options,
            held_until_ms: i64::MIN,
        }
    }

    /// Delivers until `shutdown` turns true or its sender is gone. A delivery
    /// under way is finished first.
    pub async fn run(mut self, mut shutdown: watch::Receiver<bool>) {
        let waker = self.database.waker(self.target);
        self.database.figures().relays(self.target);
        let mut failures: u32 = 0;
        while !*shutdown.borrow() {
            let pause = match self.round().await {
                Ok(Round::Delivered) => {
                    failures = 0;
                    continue;
                }
                Ok(Round::Idle) => {
                    failures = 0;
                    self.options.poll
                }
                Err(why) => {
                    failures = failures.saturating_add(1);
                    self.database.figures().not_delivered(self.target);
                    let pause = self.backoff(failures);
                    let pause_ms = u64::try_from(pause.as_millis()).unwrap_or(u64::MAX);
                    tracing::warn!(target = self.target, failures, pause_ms, %why, "outbox waits");
                    pause
                }
            };
            // A new row is no reason to try a failing sink earlier.
            let woken = async {
                if failures == 0 {
                    waker.notified().await;
                } else {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                changed = shutdown.changed() => if changed.is_err() { break },
                () = woken => {}
                () = tokio::time::sleep(pause) => {}
            }
        }
        if self.held_until_ms != i64::MIN {
            // If this fails, the lease runs out by itself.
            let _ = self.leases.release(&self.lease, &self.holder).await;
        }
    }

    async fn round(&mut self) -> Result<Round, String> {
        let refused = |error: DbError| error.to_string();
        let batch = self.oldest().await.map_err(refused)?;
        // An idle relay only reads: no lease is kept alive for nothing.
        if batch.is_empty() {
            return Ok(Round::Idle);
        }
        let held_before = self.held();
        if !held_before && !self.hold().await.map_err(refused)? {
            return Ok(Round::Idle);
        }
        // What was read without the lease may have been delivered meanwhile.
        let batch = if held_before { batch } else { self.oldest().await.map_err(refused)? };
        if batch.is_empty() {
            return Ok(Round::Idle);
        }
        fail_point::reach(Point::RelayBeforeDelivery);
        match tokio::time::timeout(self.options.deliver_timeout, self.sink.deliver(&batch)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err("the delivery took too long".to_owned()),
        }
        fail_point::reach(Point::RelayAfterDelivery);
        self.delete(&batch).await.map_err(refused)?;
        self.database.figures().delivered(self.target, batch.len());
        Ok(Round::Delivered)
    }

    fn held(&self) -> bool {
        let whole_ms = i64::try_from(self.options.lease_ttl.as_millis()).unwrap_or(i64::MAX);
        let left_ms = self.held_until_ms.saturating_sub(self.database.clock().now_ms());
        // More than the whole is left where the clock was set back: others do not believe in that either.
        (whole_ms / 2..=whole_ms).contains(&left_ms)
    }

    async fn hold(&mut self) -> Result<bool, DbError> {
        let ttl = self.options.lease_ttl;
        let now_ms = self.database.clock().now_ms();
        let held = self.leases.try_hold(&self.lease, &self.holder, ttl).await?;
        self.held_until_ms =
            if held { now_ms.saturating_add(i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX)) } else { i64::MIN };
        Ok(held)
    }

    async fn oldest(&self) -> Result<Vec<OutboxRow>, DbError> {
        let target = self.target;
        let limit = i64::from(self.options.batch.clamp(1, MAX_BATCH));
        self.database
            .read(move |reader| async move {
                let statement = Statement::from_sql_and_values(
                    reader.get_database_backend(),
                    "SELECT seq, id, topic, team_id, payload, created_at_ms FROM outbox \
                     WHERE target = $1 ORDER BY seq LIMIT $2",
                    [target.into(), limit.into()],
                );
                let rows = reader.query_all_raw(statement).await?;
                rows.iter()
                    .map(|row| {
                        Ok(OutboxRow {
                            seq: row.try_get("", "seq")?,
                            id: row.try_get("", "id")?,
                            topic: row.try_get("", "topic")?,
                            team_id: row.try_get("", "team_id")?,
                            payload: row.try_get("", "payload")?,
                            created_at_ms: row.try_get("", "created_at_ms")?,
                        })
                    })
                    .collect()
            })
            .await
    }

    /// Deletes exactly the rows that were delivered: a smaller number that has
    /// committed since is still to come.
    async fn delete(&self, batch: &[OutboxRow]) -> Result<(), DbError> {
        let values: Vec<Value> = batch.iter().map(|row| row.seq.into()).collect();
        self.database
            .write(move |tx| async move {
                let places: Vec<String> = (1..=values.len()).map(|n| format!("${n}")).collect();
                let sql = format!("DELETE FROM outbox WHERE seq IN ({})", places.join(", "));
                let backend = tx.get_database_backend();
                tx.execute_raw(Statement::from_sql_and_values(backend, sql, values)).await?;
                Ok(())
            })
            .await
    }

    /// Doubles from 50 ms, up to the limit; a random half of it, so that many
    /// relays do not come back together.
    fn backoff(&self, failures: u32) -> Duration {
        let full = Duration::from_millis(50)
            .saturating_mul(2_u32.saturating_pow(failures.min(16)))
            .min(self.options.max_backoff);
        full.mul_f64(0.5 + rand::random::<f64>() / 2.0)
    }
}
