//! Products, as far as licensing knows them: that they exist, and that they are gone.
//!
//! A product's row is a lock. Who makes a licence touches it and sees whether the product was deleted; who learns of
//! the deletion marks it. So a licence is either made before the mark, and deleted with the others, or not at all.

use std::collections::{BTreeSet, HashSet};

use paperkey_kit::{cache::Tick, db::Tx, principal::Tenant};
use sea_orm::{ColumnTrait as _, EntityTrait as _, QueryFilter as _, QueryResult, QuerySelect as _};

use super::{
    Act, Failure, TenantStore, activations, execute, insert_rows,
    licenses::{Column, Entity},
    lookups::key_subject,
};
use crate::domain::{Fault, could_be_id};

/// Licences that are deleted in one transaction.
const BATCH: u64 = 100;
/// A licence with more activations than this loses the others before, as many at a time.
const ACTIVATIONS: i64 = 200;

impl TenantStore {
    /// Whether the product is remembered to exist.
    pub fn knows_product(&self, product_id: &str) -> bool {
        self.parts().lookups.knows_product(&self.tenant, product_id)
    }

    /// To be taken before catalog is asked for a product.
    pub fn before_learning(&self) -> Tick {
        self.parts().lookups.now()
    }

    /// Remembers that the product exists, as catalog said after `asked`.
    pub fn learn_product(&self, product_id: &str, asked: Tick) {
        self.parts().lookups.learn_product(&self.tenant, product_id, asked);
    }

    /// Deletes all that belongs to a product, in bounded transactions. Doing it again, or going on where an earlier
    /// try was cut off, is the same as doing it once.
    pub async fn forget_product(&self, product_id: &str, act: Act) -> Result<(), Failure> {
        if !could_be_id(product_id) {
            return Ok(());
        }
        self.mark_deleted(product_id.to_owned(), act).await?;
        self.clone().within(Some(product_id)).forget_licenses().await
    }

    async fn mark_deleted(&self, product_id: String, act: Act) -> Result<(), Failure> {
        let store = self.store.clone();
        let (team_id, now_ms) = (self.tenant.team_id.clone(), store.now_ms());
        self.parts()
            .database
            .write(move |tx| async move {
                let marked = execute(
                    &tx,
                    "INSERT INTO products (id, team_id, deleted_at_ms) VALUES ($1, $2, $3) ON CONFLICT (id) DO UPDATE \
                     SET deleted_at_ms = excluded.deleted_at_ms WHERE products.deleted_at_ms IS NULL",
                    vec![product_id.clone().into(), team_id.as_str().into(), now_ms.into()],
                )
                .await?;
                if marked > 0 {
                    tx.audit(act.on_team(&team_id).on(vec![product_id.clone()]));
                    store.announce(&tx, vec![product_id]);
                }
                Ok(())
            })
            .await
    }

    /// Deletes all licences of this store with their activations, in bounded transactions.
    pub(super) async fn forget_licenses(&self) -> Result<(), Failure> {
        while self.forget_some().await? {}
        Ok(())
    }

    /// Deletes some, and says whether there were any.
    async fn forget_some(&self) -> Result<bool, Failure> {
        let query = self.scope().limit(BATCH);
        let licenses = self
            .parts()
            .database
            .read(move |reader| async move { query.all(&reader).await.map_err(Failure::from) })
            .await?;
        if licenses.is_empty() {
            return Ok(false);
        }
        for license in licenses.iter().filter(|license| license.activations_count > ACTIVATIONS) {
            while self.forget_activations(license.id.clone()).await? {}
        }
        let store = self.store.clone();
        let ids: Vec<String> = licenses.iter().map(|license| license.id.clone()).collect();
        let subjects =
            licenses.iter().flat_map(|license| [license.id.clone(), key_subject(&license.key_hash)]).collect();
        let delete = Entity::delete_many().filter(self.is_own()).filter(Column::Id.is_in(ids.clone()));
        let delete_activations = activations::Entity::delete_many().filter(activations::Column::LicenseId.is_in(ids));
        self.parts()
            .database
            .write(move |tx| async move {
                // The licences first: once they are locked, nothing is activated any more.
                delete.exec(&tx).await?;
                delete_activations.exec(&tx).await?;
                store.announce(&tx, subjects);
                Ok(true)
            })
            .await
    }

    async fn forget_activations(&self, license_id: String) -> Result<bool, Failure> {
        self.parts()
            .database
            .write(move |tx| async move {
                let gone = execute(
                    &tx,
                    "DELETE FROM activations WHERE id IN \
                     (SELECT id FROM activations WHERE license_id = $1 LIMIT $2)",
                    vec![license_id.into(), ACTIVATIONS.into()],
                )
                .await?;
                Ok(i64::try_from(gone).is_ok_and(|gone| gone == ACTIVATIONS))
            })
            .await
    }
}

/// Locks the product for the rest of the transaction; refuses one that was deleted.
pub(super) async fn lock_product(tx: &Tx, tenant: &Tenant, product_id: &str) -> Result<(), Failure> {
    let there = lock_products(tx, tenant, &BTreeSet::from([product_id])).await?;
    if there.contains(product_id) { Ok(()) } else { Err(Fault::NoSuchProduct.into()) }
}

/// Locks some products for the rest of the transaction, in the order of their ids, and says which were not deleted.
pub(super) async fn lock_products(tx: &Tx, tenant: &Tenant, ids: &BTreeSet<&str>) -> Result<HashSet<String>, Failure> {
    let row = |id: &str| vec![id.into(), tenant.team_id.as_str().into()];
    let conflict = "ON CONFLICT (id) DO UPDATE SET deleted_at_ms = products.deleted_at_ms RETURNING id, deleted_at_ms";
    let rows = ids.iter().map(|id| row(id)).collect();
    undeleted(insert_rows(tx, "products (id, team_id)", conflict, rows).await?)
}

/// The ids of those rows that are no tombstones.
pub(super) fn undeleted(rows: Vec<QueryResult>) -> Result<HashSet<String>, Failure> {
    let mut ids = HashSet::with_capacity(rows.len());
    for row in rows {
        if row.try_get::<Option<i64>>("", "deleted_at_ms")?.is_none() {
            ids.insert(row.try_get("", "id")?);
        }
    }
    Ok(ids)
}
