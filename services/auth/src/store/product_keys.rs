//! Key pairs of a tenant's products.
//!
//! The registry's row of a product is the lock under which its pairs are counted and made. Whoever holds it sees all
//! that earlier holders have done, on both engines: SQLite has one writer, and PostgreSQL looks afresh in each
//! statement.

use std::sync::Arc;

use paperkey_kit::{
    db::{Tx, check},
    principal::{Tenant, mode_of},
    values::Page,
};
use paperkey_proto::{Error, principal::v1::Mode};
use sea_orm::{
    ActiveModelTrait as _,
    ActiveValue::Set,
    ColumnTrait as _, Condition, ConnectionTrait, EntityTrait as _, PaginatorTrait as _, QueryFilter as _,
    QueryOrder as _, QuerySelect as _, Select,
    entity::prelude::Expr,
    sea_query::{ExprTrait as _, OnConflict},
};

use super::{
    Act, Failure, Store, announce,
    entities::{product_keys, product_registry},
};
use crate::domain::{
    Fault,
    key::{MAX_ACTIVE_PAIRS, NewPair, Pair, REVOKED_LISTED_MS},
};

/// The data of one tenant.
#[derive(Clone, Debug)]
pub(crate) struct TenantStore {
    pub(super) store: Store,
    pub(super) tenant: Tenant,
}

impl From<product_keys::Model> for Pair {
    fn from(row: product_keys::Model) -> Self {
        Self {
            mode: mode_of(&row.mode).unwrap_or(Mode::Unspecified),
            id: row.id,
            product_id: row.product_id,
            public_key: row.public_key,
            secret_prefix: row.secret_prefix,
            created_at_ms: row.created_at_ms,
            revoked_at_ms: row.revoked_at_ms,
            revoked_by: row.revoked_by,
        }
    }
}

impl TenantStore {
    pub(super) fn new(store: Store, tenant: Tenant) -> Self {
        Self { store, tenant }
    }

    /// Takes a product into the registry and makes its first pair. Called again (an answer was lost), it makes
    /// another, within the product's limit: the secret of the first is known to nobody.
    pub(crate) async fn provision(&self, product_id: String, pair: NewPair, act: Act) -> Result<Pair, Error> {
        self.make_pair(product_id, pair, act, true).await
    }

    /// Makes a further pair of a product.
    pub(crate) async fn create_pair(&self, product_id: String, pair: NewPair, act: Act) -> Result<Pair, Error> {
        self.make_pair(product_id, pair, act, false).await
    }

    async fn make_pair(&self, product_id: String, pair: NewPair, act: Act, first: bool) -> Result<Pair, Error> {
        let tenant = self.tenant.clone();
        let now_ms = self.store.database.clock().now_ms();
        let public_hash = self.store.hasher.hash(pair.public_key.as_bytes()).to_vec();
        let secret_hash = self.store.hash(&pair.secret_key);
        let made = self
            .store
            .database
            .write(move |tx| async move {
                if first {
                    product_registry::Entity::insert(registered(&tenant, &product_id, false))
                        .on_conflict(OnConflict::column(product_registry::Column::ProductId).do_nothing().to_owned())
                        .exec_without_returning(&tx)
                        .await?;
                }
                lock_product(&tx, &tenant, &product_id).await?;
                let active = pairs_of(&tenant, &product_id)
                    .filter(product_keys::Column::RevokedAtMs.is_null())
                    .count(&tx)
                    .await?;
                if active >= MAX_ACTIVE_PAIRS {
                    return Err(Failure::from(Fault::TooManyPairs));
                }
                let row = product_keys::Model {
                    id: pair.id.clone(),
                    team_id: tenant.team_id.clone(),
                    mode: tenant.mode_word().to_owned(),
                    product_id,
                    public_key: pair.public_key,
                    public_hash,
                    secret_hash,
                    secret_prefix: pair.secret_prefix,
                    created_at_ms: now_ms,
                    revoked_at_ms: None,
                    revoked_by: None,
                    leak_told_at_ms: None,
                };
                let model = product_keys::ActiveModel::from(row.clone());
                product_keys::Entity::insert(model.reset_all()).exec_without_returning(&tx).await?;
                tx.audit(act.on_team(&tenant.team_id).on(vec![row.product_id.clone(), pair.id]));
                let made = Pair::from(row);
                act.answer(&tx, &made)?;
                Ok(made)
            })
            .await?;
        Ok(made)
    }

    /// The pairs of a product, newest first, read one row too long. Those revoked long ago are left out.
    pub(crate) async fn pairs(&self, product_id: String, page: &Page) -> Result<Vec<Pair>, Error> {
        let tenant = self.tenant.clone();
        let (limit, before) = (page.size.saturating_add(1), page.before.clone());
        let listed_since_ms = self.store.database.clock().now_ms().saturating_sub(REVOKED_LISTED_MS);
        let rows = self
            .store
            .database
            .read(move |reader| async move {
                product(&reader, &tenant, &product_id).await?;
                let listed = Condition::any()
                    .add(product_keys::Column::RevokedAtMs.is_null())
                    .add(product_keys::Column::RevokedAtMs.gt(listed_since_ms));
                let mut query = pairs_of(&tenant, &product_id).filter(listed);
                if let Some(before) = before {
                    query = query.filter(product_keys::Column::Id.lt(before));
                }
                let rows = query.order_by_desc(product_keys::Column::Id).limit(limit).all(&reader).await?;
                Ok::<_, Failure>(rows)
            })
            .await?;
        Ok(rows.into_iter().map(Pair::from).collect())
    }

    /// Revokes a pair. One that is revoked already is not there.
    pub(crate) async fn revoke_pair(
        &self,
        product_id: String,
        key_id: String,
        revoked_by: String,
        act: Act,
    ) -> Result<(), Error> {
        let (tenant, epochs) = (self.tenant.clone(), Arc::clone(&self.store.epochs));
        let now_ms = self.store.database.clock().now_ms();
        self.store
            .database
            .write(move |tx| async move {
                product(&tx, &tenant, &product_id).await?;
                let revoked = product_keys::Entity::update_many()
                    .col_expr(product_keys::Column::RevokedAtMs, Expr::value(now_ms))
                    .col_expr(product_keys::Column::RevokedBy, Expr::value(revoked_by))
                    .filter(of_product(&tenant, &product_id))
                    .filter(product_keys::Column::Id.eq(key_id.as_str()))
                    .filter(product_keys::Column::RevokedAtMs.is_null())
                    .exec(&tx)
                    .await?;
                if revoked.rows_affected == 0 {
                    return Err(Failure::from(Fault::NoSuchKey));
                }
                announce(&tx, &epochs, format!("key:{key_id}"));
                tx.audit(act.on(vec![product_id, key_id]));
                Ok(())
            })
            .await?;
        Ok(())
    }

    /// Revokes all that a deleted product has, and remembers that it is deleted. Doing it twice changes nothing.
    pub(crate) async fn forget_product(&self, product_id: String, act: Act) -> Result<(), Error> {
        let (tenant, epochs) = (self.tenant.clone(), Arc::clone(&self.store.epochs));
        let now_ms = self.store.database.clock().now_ms();
        self.store
            .database
            .write(move |tx| async move {
                // Also where it is not known yet: a provisioning that comes late finds it deleted.
                let deleted = OnConflict::column(product_registry::Column::ProductId)
                    .update_column(product_registry::Column::Deleted)
                    .action_and_where(
                        Expr::col((product_registry::Entity, product_registry::Column::TeamId))
                            .eq(tenant.team_id.as_str())
                            .and(
                                Expr::col((product_registry::Entity, product_registry::Column::Mode))
                                    .eq(tenant.mode_word()),
                            ),
                    )
                    .to_owned();
                product_registry::Entity::insert(registered(&tenant, &product_id, true))
                    .on_conflict(deleted)
                    .exec_without_returning(&tx)
                    .await?;
                let revoked = product_keys::Entity::update_many()
                    .col_expr(product_keys::Column::RevokedAtMs, Expr::value(now_ms))
                    .filter(of_product(&tenant, &product_id))
                    .filter(product_keys::Column::RevokedAtMs.is_null())
                    .exec_with_returning(&tx)
                    .await?;
                if revoked.is_empty() {
                    return Ok::<_, Failure>(());
                }
                let mut touched = vec![product_id];
                for pair in revoked {
                    announce(&tx, &epochs, format!("key:{}", pair.id));
                    touched.push(pair.id);
                }
                tx.audit(act.on_team(&tenant.team_id).on(touched));
                Ok(())
            })
            .await?;
        Ok(())
    }
}

fn registered(tenant: &Tenant, product_id: &str, deleted: bool) -> product_registry::ActiveModel {
    product_registry::ActiveModel {
        product_id: Set(product_id.to_owned()),
        team_id: Set(tenant.team_id.clone()),
        mode: Set(tenant.mode_word().to_owned()),
        deleted: Set(deleted),
    }
}

fn living(tenant: &Tenant, product_id: &str) -> Select<product_registry::Entity> {
    product_registry::Entity::find()
        .filter(product_registry::Column::ProductId.eq(product_id))
        .filter(check(product_registry::Column::TeamId.eq(tenant.team_id.as_str())))
        .filter(product_registry::Column::Mode.eq(tenant.mode_word()))
        .filter(product_registry::Column::Deleted.eq(false))
}

/// Refuses a product that the tenant does not have.
async fn product(connection: &impl ConnectionTrait, tenant: &Tenant, product_id: &str) -> Result<(), Failure> {
    living(tenant, product_id).one(connection).await?.map(|_| ()).ok_or(Failure::Fault(Fault::NoSuchProduct))
}

/// The same, and keeps others from making pairs of it until the transaction ends.
async fn lock_product(tx: &Tx, tenant: &Tenant, product_id: &str) -> Result<(), Failure> {
    let row = living(tenant, product_id).lock_exclusive().one(tx).await?;
    row.map(|_| ()).ok_or(Failure::Fault(Fault::NoSuchProduct))
}

fn of_product(tenant: &Tenant, product_id: &str) -> Condition {
    Condition::all()
        .add(product_keys::Column::TeamId.eq(tenant.team_id.as_str()))
        .add(product_keys::Column::Mode.eq(tenant.mode_word()))
        .add(product_keys::Column::ProductId.eq(product_id))
}

fn pairs_of(tenant: &Tenant, product_id: &str) -> Select<product_keys::Entity> {
    product_keys::Entity::find().filter(of_product(tenant, product_id))
}
