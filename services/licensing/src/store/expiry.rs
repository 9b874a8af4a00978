//! The one event of each expiry.
//!
//! `expired_event_at_ms` is set by a guarded UPDATE in the transaction that records the event, so each expiry is told
//! once, whoever sweeps, however often, and however late. A revoked licence is passed over: what its vendor took back
//! does not expire for anyone. If it is reinstated after its time, the event comes then. An expiry that was put off
//! before it was told is told by the change that puts it off (see `update`).
//!
//! Deliberately absent: timers. The table knows what is due, also after days of downtime. There is no audit entry
//! either, since nobody did anything.

use std::time::Duration;

use paperkey_kit::{
    db::DbError,
    ids::new_id,
    lease::Leases,
    principal::{Tenant, mode_of},
    shutdown::Shutdown,
};
use sea_orm::{ConnectionTrait as _, FromQueryResult as _, Statement};

use super::{
    Store, WEBHOOK, first_row,
    licenses::{Model, license_of},
};
use crate::domain::event::{LICENSE_EXPIRED, license_data};

/// Licences that expire in one transaction at most.
const BATCH: i64 = 100;
/// How often to look.
const SWEEP: Duration = Duration::from_secs(5);
/// The lease under which one process sweeps; longer than a batch can take.
const LEASE: &str = "license-expiry";
const LEASE_TTL: Duration = Duration::from_secs(30);

const DUE: &str = "expires_at_ms <= $1 AND expired_event_at_ms IS NULL AND revoked_at_ms IS NULL";

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
        let leases = Leases::new(self.parts.database.clone());
        let holder = new_id("proc", &self.parts.clock);
        while !shutdown.has_come() {
            match self.expire_under(&leases, &holder).await {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "expired licenses are not told yet"),
            }
            tokio::select! {
                () = shutdown.wait() => {}
                () = tokio::time::sleep(SWEEP) => {}
            }
        }
    }

    /// One batch, if there is one and no other process is at it. Says whether there may be more.
    async fn expire_under(&self, leases: &Leases, holder: &str) -> Result<bool, DbError> {
        // Looking costs nothing; a lease taken for nothing costs a commit.
        if !self.any_due().await? || !leases.try_hold(LEASE, holder, LEASE_TTL).await? {
            return Ok(false);
        }
        Ok(self.expire_some().await? > 0)
    }

    async fn any_due(&self) -> Result<bool, DbError> {
        let now_ms = self.now_ms();
        self.parts
            .database
            .read(move |reader| async move {
                let sql = format!("SELECT id FROM licenses WHERE {DUE} LIMIT 1");
                Ok(first_row(&reader, sql, vec![now_ms.into()]).await?.is_some())
            })
            .await
    }

    async fn expire_some(&self) -> Result<u64, DbError> {
        let store = self.clone();
        let now_ms = self.now_ms();
        self.parts
            .database
            .write(move |tx| async move {
                // Judged again outside: who waited for another sweep's lock finds its rows no longer due.
                let sql = format!(
                    "UPDATE licenses SET expired_event_at_ms = $1 WHERE id IN \
                     (SELECT id FROM licenses WHERE {first} ORDER BY expires_at_ms LIMIT {BATCH}) \
                     AND {second} RETURNING *",
                    first = DUE.replace("$1", "$2"),
                    second = DUE.replace("$1", "$3"),
                );
                let values = [now_ms.into(), now_ms.into(), now_ms.into()];
                let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql, values);
                let rows = tx.query_all_raw(statement).await?;
                let count = rows.len();
                for row in rows {
                    let row = Model::from_query_result(&row, "")?;
                    let Some(mode) = mode_of(&row.mode) else {
                        return Err(DbError::Internal("the mode of a license is not one".to_owned()));
                    };
                    let tenant = Tenant { team_id: row.team_id.clone(), mode };
                    let license = license_of(row, &store.parts.vault)?;
                    let data = license_data(&license, now_ms);
                    store.parts.outbox.emit(&tx, WEBHOOK, LICENSE_EXPIRED, &tenant, &license.product_id, &data);
                }
                Ok(u64::try_from(count).unwrap_or(u64::MAX))
            })
            .await
    }
}
