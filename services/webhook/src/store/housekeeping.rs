//! What is kept long enough, and then goes. Everything in batches, so that no transaction holds up the others.

use paperkey_kit::db::{DbError, Engine, checked};
use sea_orm::{ConnectionTrait as _, Value};

use super::{Store, places, sql};

/// Rows of one batch.
const BATCH: i64 = 500;

impl Store {
    /// Removes deliveries that were finished before a time, with their attempts. Says whether there may be more.
    pub(crate) async fn remove_finished(&self, before_ms: i64) -> Result<bool, DbError> {
        // One that is being replayed at this moment is passed over: it is finished no longer.
        let text = format!(
            "WITH picked AS MATERIALIZED (SELECT id FROM deliveries \
             WHERE finished_at_ms IS NOT NULL AND finished_at_ms < $1 ORDER BY finished_at_ms LIMIT $2 {}) \
             DELETE FROM deliveries WHERE id IN (SELECT id FROM picked) RETURNING id",
            self.passing_over("UPDATE")
        );
        self.database
            .write(move |tx| async move {
                let backend = tx.get_database_backend();
                let gone = tx.query_all_raw(sql(backend, text, vec![before_ms.into(), BATCH.into()])).await?;
                let mut ids: Vec<Value> = Vec::with_capacity(gone.len());
                for row in &gone {
                    ids.push(row.try_get::<String>("", "id")?.into());
                }
                if ids.is_empty() {
                    return Ok(false);
                }
                let attempts = format!("DELETE FROM attempts WHERE delivery_id IN ({})", places(ids.len(), 0));
                tx.execute_raw(sql(backend, attempts, ids)).await?;
                Ok(i64::try_from(gone.len()).is_ok_and(|gone| gone == BATCH))
            })
            .await
    }

    /// Fails deliveries that have waited for a paused endpoint since before a time: an old one that was replayed, since
    /// then. Says whether there may be more.
    pub(crate) async fn fail_held(&self, before_ms: i64) -> Result<bool, DbError> {
        let now_ms = self.clock.now_ms();
        // Judged by what is locked: an endpoint that is being resumed, or a delivery that somebody changes, is passed
        // over, and one that was resumed since the look is paused no longer.
        let lock = match self.database.engine() {
            Engine::Postgres => "FOR UPDATE OF d SKIP LOCKED FOR SHARE OF e SKIP LOCKED",
            Engine::Sqlite => "",
        };
        let still = checked("status = 'pending'");
        let text = format!(
            "WITH picked AS MATERIALIZED (SELECT d.id AS id FROM deliveries d JOIN endpoints e ON e.id = d.endpoint_id \
             WHERE d.status = 'pending' AND d.created_at_ms < $1 AND d.due_at_ms < $1 \
             AND (d.claimed_by IS NULL OR d.due_at_ms <= $2) AND e.status = 'paused' \
             ORDER BY d.created_at_ms LIMIT $3 {lock}) \
             UPDATE deliveries SET status = 'failed', error = 'held_too_long', finished_at_ms = $2, \
             next_attempt_at_ms = NULL, claimed_by = NULL WHERE {still} AND id IN (SELECT id FROM picked)"
        );
        self.database
            .write(move |tx| async move {
                let values: Vec<Value> = vec![before_ms.into(), now_ms.into(), BATCH.into()];
                let failed = tx.execute_raw(sql(tx.get_database_backend(), text, values)).await?.rows_affected();
                Ok(i64::try_from(failed).is_ok_and(|failed| failed == BATCH))
            })
            .await
    }

    /// Removes secrets that sign no longer. Says whether there may be more.
    pub(crate) async fn forget_secrets(&self) -> Result<bool, DbError> {
        let now_ms = self.clock.now_ms();
        let text = format!(
            "WITH picked AS MATERIALIZED (SELECT id FROM endpoints \
             WHERE previous_secret_until_ms IS NOT NULL AND previous_secret_until_ms <= $1 \
             ORDER BY previous_secret_until_ms LIMIT $2 {}) \
             UPDATE endpoints SET previous_secret_sealed = NULL, previous_secret_until_ms = NULL \
             WHERE id IN (SELECT id FROM picked)",
            self.passing_over("NO KEY UPDATE")
        );
        self.database
            .write(move |tx| async move {
                let statement = sql(tx.get_database_backend(), text, vec![now_ms.into(), BATCH.into()]);
                let gone = tx.execute_raw(statement).await?.rows_affected();
                Ok(i64::try_from(gone).is_ok_and(|gone| gone == BATCH))
            })
            .await
    }

    /// Removes those who have stopped watching without a word.
    pub(crate) async fn forget_watchers(&self) -> Result<(), DbError> {
        let now_ms = self.clock.now_ms();
        self.database
            .write(move |tx| async move {
                let text = "DELETE FROM watchers WHERE until_ms <= $1";
                tx.execute_raw(sql(tx.get_database_backend(), text, vec![now_ms.into()])).await?;
                Ok(())
            })
            .await
    }

    /// How rows are locked of which others may hold some: those are passed over instead of waited for, so that nobody
    /// waits in a circle.
    pub(super) fn passing_over(&self, lock: &str) -> String {
        match self.database.engine() {
            Engine::Postgres => format!("FOR {lock} SKIP LOCKED"),
            Engine::Sqlite => String::new(),
        }
    }

    /// Removes events that were taken over before a time and have no deliveries any more, from those after an id.
    /// Answers where to go on, if there may be more.
    pub(crate) async fn remove_events(&self, after: String, before_ms: i64) -> Result<Option<String>, DbError> {
        let seen = self
            .database
            .read(move |reader| async move {
                let text = "SELECT e.id AS id, (SELECT COUNT(*) FROM (SELECT 1 AS one FROM deliveries d \
                            WHERE d.event_id = e.id LIMIT 1) AS first_one) AS used \
                            FROM events e WHERE e.id > $1 AND e.created_at_ms < $2 ORDER BY e.id LIMIT $3";
                let values: Vec<Value> = vec![after.into(), before_ms.into(), BATCH.into()];
                Ok::<_, DbError>(reader.query_all_raw(sql(reader.get_database_backend(), text, values)).await?)
            })
            .await?;
        let (mut last, mut unused) = (None, Vec::<Value>::new());
        for row in &seen {
            let id: String = row.try_get("", "id")?;
            if row.try_get::<i64>("", "used")? == 0 {
                unused.push(id.as_str().into());
            }
            last = Some(id);
        }
        if !unused.is_empty() {
            self.database
                .write(move |tx| async move {
                    // An old event gets no new deliveries: it is known, and so passed over when it comes again.
                    let text = format!("DELETE FROM events WHERE id IN ({})", places(unused.len(), 0));
                    tx.execute_raw(sql(tx.get_database_backend(), text, unused)).await?;
                    Ok::<_, DbError>(())
                })
                .await?;
        }
        Ok(last.filter(|_| i64::try_from(seen.len()).is_ok_and(|seen| seen == BATCH)))
    }
}
