//! The one event of each expiry.
//!
//! `expired_event_at_ms` is set by a guarded UPDATE in the transaction that records the event, so each expiry is told
//! once, whoever sweeps, however often, and however late. A revoked licence is passed over: what its vendor took back
//! does not expire for anyone. If it is reinstated after its time, the event comes then. An expiry that was put off
//! before it was told is told by the change that puts it off (see `update`).
//!
//! A row that is damaged is told as far as it can be read, and passed over where it cannot: it holds up nobody.
//!
//! Deliberately absent: timers. The table knows what is due, also after days of downtime. There is no audit entry
//! either, since nobody did anything.

use std::time::Duration;

use paperkey_kit::{
    clock::Clock,
    db::{DbError, Engine, Tx, checked},
    ids::new_id,
    lease::Leases,
    principal::{Tenant, mode_of},
    shutdown::Shutdown,
};
use sea_orm::{FromQueryResult as _, QueryResult};

use super::{
    Store, WEBHOOK, all_rows, first_row,
    licenses::{Model, license_of},
};
use crate::domain::event::{LICENSE_EXPIRED, license_data};

/// Licences that expire in one transaction at most.
const BATCH: i64 = 500;
/// How often to look.
const SWEEP: Duration = Duration::from_secs(5);
/// The lease under which one process sweeps; longer than a batch can take.
const LEASE: &str = "license-expiry";
const LEASE_TTL: Duration = Duration::from_secs(30);
/// A lease is taken again once this is left of it, in milliseconds.
const LEASE_LEFT_MS: i64 = 15_000;

const DUE: &str = "expires_at_ms <= $1 AND expired_event_at_ms IS NULL AND revoked_at_ms IS NULL";
/// Whether anything is due. The order costs nothing, and is what makes PostgreSQL look into the index of what is due
/// however much it believes to be.
pub(super) const ANY_DUE: &str = "SELECT id FROM licenses WHERE expires_at_ms <= $1 AND expired_event_at_ms IS NULL \
                                  AND revoked_at_ms IS NULL ORDER BY expires_at_ms LIMIT 1";

impl Store {
    /// Tells every expiry that is due, and says how many there were.
    pub async fn expire_due(&self) -> Result<u64, DbError> {
        let mut told = 0;
        loop {
            let batch = self.expire_some().await?;
            if batch == 0 {
                return Ok(told);
            }
            told += batch;
        }
    }

    /// Sweeps until shut down.
    pub(crate) async fn expire(self, mut shutdown: Shutdown) {
        let mut sweep = Sweep {
            leases: Leases::new(self.parts.database.clone()),
            holder: new_id("proc", &self.parts.clock),
            held_until: None,
        };
        while !shutdown.has_come() {
            match self.expire_under(&mut sweep).await {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(%error, "expired licenses are not told yet");
                    // Another process may be luckier.
                    sweep.give_up().await;
                }
            }
            tokio::select! {
                () = shutdown.wait() => {}
                () = tokio::time::sleep(SWEEP) => {}
            }
        }
        sweep.give_up().await;
    }

    /// One batch, if there is one and no other process is at it. Says whether there may be more.
    async fn expire_under(&self, sweep: &mut Sweep) -> Result<bool, DbError> {
        // Looking costs nothing; a lease taken for nothing costs a commit.
        if !self.any_due().await? || !sweep.hold(&self.parts.clock).await? {
            return Ok(false);
        }
        Ok(self.expire_some().await? > 0)
    }

    async fn any_due(&self) -> Result<bool, DbError> {
        let now_ms = self.now_ms();
        self.parts
            .database
            .read(move |reader| async move { Ok(first_row(&reader, ANY_DUE, vec![now_ms.into()]).await?.is_some()) })
            .await
    }

    async fn expire_some(&self) -> Result<u64, DbError> {
        let store = self.clone();
        let now_ms = self.now_ms();
        self.parts
            .database
            .write(move |tx| async move {
                // What somebody else is about to change or to tell is left to them: nobody waits for anybody, and so
                // not for ever. SQLite has one writer. As an array the ids are found once, whatever the planner
                // believes of how many there are.
                let due = DUE.replace("$1", "$2");
                let due = format!("SELECT id FROM licenses WHERE {due} ORDER BY expires_at_ms LIMIT {BATCH}");
                let among = match store.parts.database.engine() {
                    Engine::Sqlite => format!("IN ({due})"),
                    Engine::Postgres => format!("= ANY(ARRAY({due} FOR UPDATE SKIP LOCKED))"),
                };
                let still = checked(&DUE.replace("$1", "$3"));
                let sql =
                    format!("UPDATE licenses SET expired_event_at_ms = $1 WHERE id {among} AND {still} RETURNING *");
                let rows = all_rows(&tx, sql, vec![now_ms.into(), now_ms.into(), now_ms.into()]).await?;
                for row in &rows {
                    store.tell_expiry(&tx, row, now_ms);
                }
                Ok(u64::try_from(rows.len()).unwrap_or(u64::MAX))
            })
            .await
    }

    fn tell_expiry(&self, tx: &Tx, row: &QueryResult, now_ms: i64) {
        let read = Model::from_query_result(row, "").ok();
        let Some((row, mode)) = read.and_then(|row| mode_of(&row.mode).map(|mode| (row, mode))) else {
            let license_id: String = row.try_get("", "id").unwrap_or_default();
            tracing::error!(license_id, "a license that has expired cannot be read and is not told");
            return;
        };
        let tenant = Tenant { team_id: row.team_id.clone(), mode };
        let license = license_of(row, &self.parts.vault);
        let data = license_data(&license, now_ms);
        self.parts.outbox.emit(tx, WEBHOOK, LICENSE_EXPIRED, &tenant, &license.product_id, &data);
    }
}

/// The part of one process in the sweeping.
struct Sweep {
    leases: Leases,
    holder: String,
    /// Until when it is this process's, if it is; in boot time, which nobody sets.
    held_until: Option<i64>,
}

impl Sweep {
    /// Whether this process is the one to sweep.
    async fn hold(&mut self, clock: &Clock) -> Result<bool, DbError> {
        let now_ms = clock.boot_ms();
        if self.held_until.is_some_and(|until_ms| until_ms - now_ms > LEASE_LEFT_MS) {
            return Ok(true);
        }
        let is_held = self.leases.try_hold(LEASE, &self.holder, LEASE_TTL).await?;
        let ttl_ms = i64::try_from(LEASE_TTL.as_millis()).unwrap_or(0);
        self.held_until = is_held.then_some(now_ms + ttl_ms);
        Ok(is_held)
    }

    async fn give_up(&mut self) {
        if self.held_until.take().is_some() {
            // If this fails, the lease runs out by itself.
            let _ = self.leases.release(LEASE, &self.holder).await;
        }
    }
}
