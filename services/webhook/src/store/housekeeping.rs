//! What is kept long enough, and then goes. Everything in batches, so that no transaction holds up the others.

use paperkey_kit::db::DbError;
use sea_orm::{ConnectionTrait as _, Value};

use super::{Store, places, sql};

/// Rows of one batch.
const BATCH: i64 = 500;

impl Store {
    /// Removes deliveries that were finished before a time, with their attempts. Says whether there may be more.
    pub(crate) async fn remove_finished(&self, before_ms: i64) -> Result<bool, DbError> {
        self.database
            .write(move |tx| async move {
                let backend = tx.get_database_backend();
                let find = "SELECT id FROM deliveries WHERE finished_at_ms IS NOT NULL AND finished_at_ms < $1 \
                            ORDER BY finished_at_ms LIMIT $2";
                let found = tx.query_all_raw(sql(backend, find, vec![before_ms.into(), BATCH.into()])).await?;
                let mut ids: Vec<Value> = Vec::with_capacity(found.len());
                for row in &found {
                    ids.push(row.try_get::<String>("", "id")?.into());
                }
                if ids.is_empty() {
                    return Ok(false);
                }
                let list = places(ids.len(), 0);
                // What is finished stays so: nothing can have changed since the look.
                let deliveries = format!("DELETE FROM deliveries WHERE id IN ({list})");
                let attempts = format!("DELETE FROM attempts WHERE delivery_id IN ({list})");
                tx.execute_raw(sql(backend, deliveries, ids.clone())).await?;
                tx.execute_raw(sql(backend, attempts, ids)).await?;
                Ok(i64::try_from(found.len()).is_ok_and(|found| found == BATCH))
            })
            .await
    }

    /// Fails deliveries that have waited for a paused endpoint since before a time. Says whether there may be more.
    pub(crate) async fn fail_held(&self, before_ms: i64) -> Result<bool, DbError> {
        let now_ms = self.clock.now_ms();
        self.database
            .write(move |tx| async move {
                let text = "UPDATE deliveries SET status = 'failed', error = 'held_too_long', finished_at_ms = $1, \
                            next_attempt_at_ms = NULL, claimed_by = NULL WHERE status = 'pending' AND id IN ( \
                            SELECT d.id FROM deliveries d JOIN endpoints e ON e.id = d.endpoint_id \
                            WHERE d.status = 'pending' AND d.created_at_ms < $2 AND e.status = 'paused' \
                            ORDER BY d.created_at_ms LIMIT $3)";
                let values: Vec<Value> = vec![now_ms.into(), before_ms.into(), BATCH.into()];
                let failed = tx.execute_raw(sql(tx.get_database_backend(), text, values)).await?.rows_affected();
                Ok(i64::try_from(failed).is_ok_and(|failed| failed == BATCH))
            })
            .await
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
