//! What is done about keys while nobody asks: their use is written down, holders are told what is due, and what ended
//! long ago is forgotten. Each step is bounded; whoever has more to do comes again.

use std::collections::BTreeMap;

use paperkey_proto::Error;
use sea_orm::{
    ColumnTrait as _, Condition, EntityTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _,
    entity::prelude::Expr,
};

use super::{
    Failure, Store,
    entities::{keys, teams},
    keys::{ROTATION_DUE, key_of},
};
use crate::domain::api_key::ApiKey;

/// How many keys one step touches.
pub(crate) const STEP: u64 = 200;

const MINUTE_MS: i64 = 60_000;

impl Store {
    /// Writes down when keys were used: to the minute, and only forward. What is not known is passed over.
    pub(crate) async fn record_uses(&self, uses: Vec<(String, i64)>) -> Result<(), Error> {
        let now_ms = self.database.clock().now_ms();
        let mut last: BTreeMap<String, i64> = BTreeMap::new();
        for (id, at_ms) in uses {
            // Clocks of two machines may differ by a little; nothing was used in the future.
            let minute_ms = at_ms.clamp(0, now_ms) / MINUTE_MS * MINUTE_MS;
            let known = last.entry(id).or_insert(minute_ms);
            *known = Ord::max(minute_ms, *known);
        }
        let mut by_minute: BTreeMap<i64, Vec<String>> = BTreeMap::new();
        for (id, minute_ms) in &last {
            by_minute.entry(*minute_ms).or_default().push(id.clone());
        }
        if by_minute.is_empty() {
            return Ok(());
        }
        self.database
            .write(move |tx| async move {
                // In the one order in which everybody locks, so that two batches cannot wait for each other.
                let ids = keys::Entity::find()
                    .select_only()
                    .column(keys::Column::Id)
                    .filter(keys::Column::Id.is_in(last.into_keys()))
                    .order_by_asc(keys::Column::Id)
                    .lock_exclusive();
                ids.into_tuple::<String>().all(&tx).await?;
                for (minute_ms, ids) in by_minute {
                    let earlier = Condition::any()
                        .add(keys::Column::LastUsedAtMs.is_null())
                        .add(keys::Column::LastUsedAtMs.lt(minute_ms));
                    keys::Entity::update_many()
                        .col_expr(keys::Column::LastUsedAtMs, Expr::value(minute_ms))
                        .filter(keys::Column::Id.is_in(ids))
                        .filter(earlier)
                        .exec(&tx)
                        .await?;
                }
                Ok::<_, Failure>(())
            })
            .await?;
        Ok(())
    }

    /// Tells the holders of some keys that a rotation is due, each once for each time that it is. Says how many.
    pub(crate) async fn tell_rotations(&self) -> Result<u64, Error> {
        let store = self.clone();
        let told = self
            .database
            .write(move |tx| async move {
                let now_ms = store.database.clock().now_ms();
                let due = keys::Entity::find()
                    .filter(keys::Column::RotationDueAtMs.lte(now_ms))
                    .filter(keys::Column::RotationToldAtMs.is_null())
                    // The system key rotates itself.
                    .filter(keys::Column::TeamId.is_not_null())
                    .filter(keys::Column::SupersededBy.is_null())
                    .filter(keys::Column::RevokedAtMs.is_null())
                    .filter(keys::Column::Enabled.eq(true))
                    .filter(
                        Condition::any()
                            .add(keys::Column::ExpiresAtMs.is_null())
                            .add(keys::Column::ExpiresAtMs.gt(now_ms)),
                    )
                    .order_by_asc(keys::Column::Id)
                    .limit(STEP)
                    .lock_exclusive()
                    .all(&tx)
                    .await?;
                let ids: Vec<String> = due.iter().map(|key| key.id.clone()).collect();
                let told = u64::try_from(due.len()).unwrap_or(u64::MAX);
                if ids.is_empty() {
                    return Ok::<_, Failure>(0);
                }
                keys::Entity::update_many()
                    .col_expr(keys::Column::RotationToldAtMs, Expr::value(now_ms))
                    .filter(keys::Column::Id.is_in(ids))
                    .exec(&tx)
                    .await?;
                for key in due.into_iter().filter_map(key_of) {
                    let team = match &key.team_id {
                        Some(team_id) => teams::Entity::find_by_id(team_id.as_str()).one(&tx).await?,
                        None => None,
                    };
                    if team.is_some_and(|team| team.deleted_at_ms.is_none()) {
                        store.tell(&tx, ROTATION_DUE, &key, &key.event_data());
                    }
                }
                Ok(told)
            })
            .await?;
        Ok(told)
    }

    /// Forgets some keys that were revoked or have expired long ago. Says how many.
    pub(crate) async fn purge_keys(&self) -> Result<u64, Error> {
        let before_ms = ApiKey::listed_since_ms(self.database.clock().now_ms());
        let purged = self
            .database
            .write(move |tx| async move {
                let long_gone = Condition::any()
                    .add(keys::Column::RevokedAtMs.lte(before_ms))
                    .add(keys::Column::ExpiresAtMs.lte(before_ms));
                let ids: Vec<String> = keys::Entity::find()
                    .select_only()
                    .column(keys::Column::Id)
                    .filter(long_gone.clone())
                    .limit(STEP)
                    .into_tuple()
                    .all(&tx)
                    .await?;
                if ids.is_empty() {
                    return Ok::<_, Failure>(0);
                }
                let gone = keys::Entity::delete_many()
                    .filter(keys::Column::Id.is_in(ids))
                    // A key whose end was moved meanwhile stays.
                    .filter(long_gone)
                    .exec(&tx)
                    .await?;
                Ok(gone.rows_affected)
            })
            .await?;
        Ok(purged)
    }
}
