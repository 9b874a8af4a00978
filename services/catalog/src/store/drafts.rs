//! Products that are being made.
//!
//! The keys of a product are made by auth before the product is written, and no transaction spans the two. So a draft
//! is written first: it becomes the product, or it is taken back, and then auth is told that the product is gone, in
//! the same transaction. Whichever of the two removes the draft wins, so a product is never both.

use std::time::Duration;

use paperkey_kit::{
    db::{DbError, Tx},
    events::PRODUCT_DELETED,
    ids::new_id,
    principal::{Tenant, mode_of},
    shutdown::Shutdown,
};
use sea_orm::{ConnectionTrait as _, Statement, Value};
use serde_json::json;

use super::{Failure, Store, TenantStore};
use crate::domain::Fault;

/// Who keeps something of a product that never was: whoever made its keys.
const KEEPERS: [&str; 1] = ["auth"];
/// How long a product may take to make. One that takes longer is taken back.
const PATIENCE_MS: i64 = 60_000;
/// How often to look for drafts that nobody completes.
const SWEEP: Duration = Duration::from_secs(15);
/// Drafts that one transaction takes back.
const BATCH: i64 = 100;

impl TenantStore {
    /// Writes that a product is being made, and answers its id.
    pub(crate) async fn draft(&self) -> Result<String, Failure> {
        let id = new_id("prod", &self.store.clock);
        let values: Vec<Value> = vec![
            id.as_str().into(),
            self.tenant.team_id.as_str().into(),
            self.tenant.mode_word().into(),
            self.store.clock.now_ms().into(),
        ];
        self.store
            .database
            .write(move |tx| async move {
                let text = "INSERT INTO drafts (id, team_id, mode, created_at_ms) VALUES ($1, $2, $3, $4)";
                tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), text, values)).await?;
                Ok(id)
            })
            .await
    }

    /// Takes a draft back. One that has become a product stays one.
    pub(crate) async fn abandon(&self, id: String) -> Result<(), Failure> {
        let this = self.clone();
        self.store
            .database
            .write(move |tx| async move {
                if remove(&tx, &id).await? {
                    this.store.take_back(&tx, &this.tenant, &id);
                }
                Ok(())
            })
            .await
    }
}

impl Store {
    /// Takes back what nobody has completed, until shut down. Several processes may do it at once.
    pub(crate) async fn sweep_drafts(self, mut shutdown: Shutdown) {
        while !shutdown.has_come() {
            match self.take_back_old().await {
                Ok(true) => continue,
                Ok(false) => {}
                Err(error) => tracing::warn!(%error, "drafts of products are not taken back yet"),
            }
            tokio::select! {
                () = shutdown.wait() => {}
                () = tokio::time::sleep(SWEEP) => {}
            }
        }
    }

    /// Takes some old drafts back, and says whether there may be more.
    async fn take_back_old(&self) -> Result<bool, DbError> {
        let before_ms = self.clock.now_ms().saturating_sub(PATIENCE_MS);
        let old = "SELECT id, team_id, mode FROM drafts WHERE created_at_ms < $1 ORDER BY created_at_ms LIMIT $2";
        let values: Vec<Value> = vec![before_ms.into(), BATCH.into()];
        let rows = self
            .database
            .read(move |reader| async move {
                let statement = Statement::from_sql_and_values(reader.get_database_backend(), old, values);
                Ok::<_, DbError>(reader.query_all_raw(statement).await?)
            })
            .await?;
        let mut drafts = Vec::with_capacity(rows.len());
        for row in &rows {
            let mode = mode_of(&row.try_get::<String>("", "mode")?);
            let mode = mode.ok_or_else(|| DbError::Internal("the mode of a draft is not one".to_owned()))?;
            drafts.push((row.try_get::<String>("", "id")?, Tenant { team_id: row.try_get("", "team_id")?, mode }));
        }
        if drafts.is_empty() {
            return Ok(false);
        }
        let this = self.clone();
        self.database
            .write(move |tx| async move {
                for (id, tenant) in &drafts {
                    if remove(&tx, id).await? {
                        this.take_back(&tx, tenant, id);
                    }
                }
                Ok(i64::try_from(drafts.len()).is_ok_and(|found| found == BATCH))
            })
            .await
    }

    fn take_back(&self, tx: &Tx, tenant: &Tenant, id: &str) {
        self.outbox.emit(tx, &KEEPERS, PRODUCT_DELETED, tenant, id, &json!({"id": id}));
    }
}

/// Ends a draft because it becomes a product in this transaction.
pub(super) async fn complete(tx: &Tx, id: &str) -> Result<(), Failure> {
    if remove(tx, id).await? { Ok(()) } else { Err(Fault::TooLate.into()) }
}

/// Removes a draft, and says whether it was there.
async fn remove(tx: &Tx, id: &str) -> Result<bool, DbError> {
    let text = "DELETE FROM drafts WHERE id = $1";
    let statement = Statement::from_sql_and_values(tx.get_database_backend(), text, vec![id.into()]);
    Ok(tx.execute_raw(statement).await?.rows_affected() > 0)
}
