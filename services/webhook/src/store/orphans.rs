//! What is left of endpoints and products that are gone.
//!
//! Their own rows go in one short transaction, with which sending ends. What was or would be sent, which may be millions
//! of rows, goes afterwards, in bounded transactions that hold up nobody: some of it at once, the rest with the
//! housekeeping. Nobody claims it, and nobody is shown it under an endpoint that is not there.

use std::time::Duration;

use paperkey_kit::{db::DbError, principal::Tenant};
use sea_orm::{ConnectionTrait as _, Value};
use tokio::time::Instant;

use super::{Store, places, sql};

/// Rows of one batch.
const BATCH: i64 = 500;
/// How long whoever removes something waits for what is left of it.
const AT_ONCE: Duration = Duration::from_secs(1);

impl Store {
    /// Removes what is left of endpoints and products that are gone, as much of it as can be removed in a short time.
    pub(super) async fn forget_soon(&self, endpoints: Vec<String>, products: Vec<(Tenant, String)>) {
        let until = Instant::now() + AT_ONCE;
        if let Err(error) = self.forget_until(until, endpoints, products).await {
            tracing::warn!(%error, "what is left of something deleted goes with the next housekeeping");
        }
    }

    async fn forget_until(
        &self,
        until: Instant,
        endpoints: Vec<String>,
        products: Vec<(Tenant, String)>,
    ) -> Result<(), DbError> {
        for endpoint_id in endpoints {
            while Instant::now() < until && self.forget_orphans(endpoint_id.clone()).await? {}
        }
        for (tenant, product_id) in products {
            while Instant::now() < until && self.forget_events(tenant.clone(), product_id.clone()).await? {}
        }
        Ok(())
    }

    /// Endpoints behind an id that are gone while deliveries of theirs are there, and where to go on, if there may be
    /// more. The index is read once for each endpoint, gone or not.
    pub(crate) async fn orphaned(&self, after: String) -> Result<(Vec<String>, Option<String>), DbError> {
        let text = format!(
            "WITH RECURSIVE lanes (endpoint_id, number) AS ( \
             SELECT MIN(d.endpoint_id), 1 FROM deliveries d WHERE d.endpoint_id > $1 \
             UNION ALL \
             SELECT (SELECT MIN(d.endpoint_id) FROM deliveries d WHERE d.endpoint_id > lanes.endpoint_id), \
             lanes.number + 1 FROM lanes WHERE lanes.endpoint_id IS NOT NULL AND lanes.number < {BATCH}) \
             SELECT lanes.endpoint_id AS endpoint_id, e.id AS known FROM lanes \
             LEFT JOIN endpoints e ON e.id = lanes.endpoint_id \
             WHERE lanes.endpoint_id IS NOT NULL ORDER BY lanes.endpoint_id"
        );
        let rows = self
            .database
            .read(move |reader| async move {
                let statement = sql(reader.get_database_backend(), text, vec![after.into()]);
                Ok::<_, DbError>(reader.query_all_raw(statement).await?)
            })
            .await?;
        let (mut gone, mut last) = (Vec::new(), None);
        for row in &rows {
            let endpoint_id: String = row.try_get("", "endpoint_id")?;
            if row.try_get::<Option<String>>("", "known")?.is_none() {
                gone.push(endpoint_id.clone());
            }
            last = Some(endpoint_id);
        }
        Ok((gone, last.filter(|_| i64::try_from(rows.len()).is_ok_and(|rows| rows == BATCH))))
    }

    /// Removes some of what was or would be sent to an endpoint that is gone, and says whether there may be more.
    pub(crate) async fn forget_orphans(&self, endpoint_id: String) -> Result<bool, DbError> {
        // What somebody is writing down at this moment is passed over; there is no endpoint to lock any more.
        let text = format!(
            "WITH picked AS MATERIALIZED (SELECT id FROM deliveries WHERE endpoint_id = $1 \
             AND NOT EXISTS (SELECT 1 FROM endpoints e WHERE e.id = $1) ORDER BY id LIMIT $2 {}) \
             DELETE FROM deliveries WHERE id IN (SELECT id FROM picked) RETURNING id",
            self.passing_over("UPDATE")
        );
        self.database
            .write(move |tx| async move {
                let backend = tx.get_database_backend();
                let rows = tx.query_all_raw(sql(backend, text, vec![endpoint_id.into(), BATCH.into()])).await?;
                let gone = rows.iter().map(|row| row.try_get::<String>("", "id").map(Value::from));
                let gone = gone.collect::<Result<Vec<_>, _>>()?;
                if gone.is_empty() {
                    return Ok(false);
                }
                let text = format!("DELETE FROM attempts WHERE delivery_id IN ({})", places(gone.len(), 0));
                tx.execute_raw(sql(backend, text, gone)).await?;
                Ok(i64::try_from(rows.len()).is_ok_and(|rows| rows == BATCH))
            })
            .await
    }

    /// Removes some events of a product that is gone, and says whether there may be more. What is left of them goes
    /// with the other events that have no deliveries any more.
    async fn forget_events(&self, tenant: Tenant, product_id: String) -> Result<bool, DbError> {
        let text = format!(
            "WITH picked AS MATERIALIZED (SELECT id FROM events \
             WHERE product_id = $1 AND team_id = $2 AND mode = $3 LIMIT $4 {}) \
             DELETE FROM events WHERE id IN (SELECT id FROM picked)",
            self.passing_over("UPDATE")
        );
        self.database
            .write(move |tx| async move {
                let values: Vec<Value> =
                    vec![product_id.into(), tenant.team_id.as_str().into(), tenant.mode_word().into(), BATCH.into()];
                let gone = tx.execute_raw(sql(tx.get_database_backend(), text, values)).await?.rows_affected();
                Ok(i64::try_from(gone).is_ok_and(|gone| gone == BATCH))
            })
            .await
    }
}
