//! The installation's own key. The schema allows one that has neither been revoked nor replaced.

use paperkey_kit::{db::Tx, secrets::Secret};
use paperkey_proto::Error;
use sea_orm::{
    ActiveModelTrait as _, ColumnTrait as _, EntityTrait as _, QueryFilter as _, entity::prelude::Expr,
    sea_query::OnConflict,
};

use super::{
    Act, Failure, Store, announce,
    entities::keys,
    keys::{key_of, key_row},
};
use crate::domain::{
    Fault,
    api_key::{Actor, ApiKey, Overlap},
    key::{KeyKind, NewKey},
};

/// What becomes of the system key that there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Before {
    /// It stays, and no other is stored.
    Stays,
    /// It works on for a while.
    Overlaps,
    /// It and all before it end at once.
    Ends,
}

impl Store {
    /// Stores a system key. Says whether that was done.
    pub(crate) async fn put_system_key(&self, key: NewKey, before: Before, act: Act) -> Result<bool, Error> {
        let store = self.clone();
        let hash = self.hash(&key.token);
        let stored = self
            .database
            .write(move |tx| async move {
                let now_ms = store.database.clock().now_ms();
                let mut touched = vec![key.id.clone()];
                let mut row = key_row(&key, hash, None, Actor::default(), now_ms);
                if before == Before::Overlaps
                    && let Some(old) = supersede(&tx, &key.id, now_ms).await?
                {
                    row.lineage = old.lineage.or_else(|| Some(old.id.clone()));
                    row.replaces = Some(old.id);
                    row.rotated_at_ms = Some(now_ms);
                }
                touched.extend(row.replaces.clone());
                if before == Before::Ends {
                    touched.extend(end_all(&tx, now_ms).await?);
                }
                for ended in touched.iter().skip(1) {
                    announce(&tx, &store.epochs, format!("key:{ended}"));
                }
                // Who comes second finds one there.
                let stored = keys::Entity::insert(keys::ActiveModel::from(row).reset_all())
                    .on_conflict(OnConflict::new().do_nothing().to_owned())
                    .exec_without_returning(&tx)
                    .await?
                    > 0;
                match (stored, before) {
                    (true, _) => tx.audit(act.on(touched)),
                    (false, Before::Stays) => {}
                    (false, Before::Overlaps | Before::Ends) => return Err(Failure::from(Fault::RotatedMeanwhile)),
                }
                Ok(stored)
            })
            .await?;
        Ok(stored)
    }

    /// The system key that has neither been revoked nor replaced.
    pub(crate) async fn current_system_key(&self) -> Result<Option<ApiKey>, Error> {
        let found = self
            .database
            .read(|reader| async move {
                let query = keys::Entity::find()
                    .filter(is_system())
                    .filter(keys::Column::RevokedAtMs.is_null())
                    .filter(keys::Column::SupersededBy.is_null());
                Ok::<_, Failure>(query.one(&reader).await?)
            })
            .await?;
        Ok(found.and_then(key_of))
    }

    /// Whether that is the token of the system key that there is.
    pub(crate) async fn is_current_system_key(&self, token: &Secret) -> Result<bool, Error> {
        let hashes = self.hashes(token);
        let found = self
            .database
            .read(move |reader| async move {
                let query = keys::Entity::find()
                    .filter(keys::Column::TokenHash.is_in(hashes))
                    .filter(is_system())
                    .filter(keys::Column::RevokedAtMs.is_null())
                    .filter(keys::Column::SupersededBy.is_null());
                Ok::<_, Failure>(query.one(&reader).await?)
            })
            .await?;
        Ok(found.is_some())
    }
}

/// Written as the index over such keys is: a value that is bound says nothing to a planner.
fn is_system() -> Expr {
    debug_assert_eq!(KeyKind::System.word(), "system");
    Expr::cust("kind = 'system'")
}

/// Gives the system key that there is a successor and an end.
async fn supersede(tx: &Tx, successor: &str, now_ms: i64) -> Result<Option<keys::Model>, Failure> {
    let end_ms = now_ms.saturating_add(Overlap::default().ms());
    let replaced = keys::Entity::update_many()
        .col_expr(keys::Column::SupersededBy, Expr::value(successor))
        .col_expr(keys::Column::RotatedAtMs, Expr::value(now_ms))
        .col_expr(keys::Column::ExpiresAtMs, Expr::value(end_ms))
        .col_expr(keys::Column::RotationDueAtMs, Expr::value(None::<i64>))
        .filter(is_system())
        .filter(keys::Column::RevokedAtMs.is_null())
        .filter(keys::Column::SupersededBy.is_null())
        .exec_with_returning(tx)
        .await?;
    Ok(replaced.into_iter().next())
}

/// Ends every system key, those in their last hours included.
async fn end_all(tx: &Tx, now_ms: i64) -> Result<Vec<String>, Failure> {
    let ended = keys::Entity::update_many()
        .col_expr(keys::Column::RevokedAtMs, Expr::value(now_ms))
        .filter(is_system())
        .filter(keys::Column::RevokedAtMs.is_null())
        .exec_with_returning(tx)
        .await?;
    Ok(ended.into_iter().map(|key| key.id).collect())
}
