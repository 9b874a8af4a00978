//! What is done about keys while nobody asks: their use is written down, holders are told what is due, and what ended
//! long ago is forgotten. Each step is bounded; whoever has more to do comes again.

use std::collections::{BTreeMap, HashSet};

use paperkey_kit::db::check;
use paperkey_proto::Error;
use sea_orm::{
    ColumnTrait as _, Condition, EntityTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _,
    entity::prelude::Expr,
};

use super::{
    Failure, Store, Usage,
    entities::{keys, teams},
    keys::{ROTATION_DUE, key_of},
};
use crate::domain::{alert::AlertKey, api_key::ApiKey};

/// How many keys one step touches.
pub(crate) const STEP: u64 = 200;

pub(super) const MINUTE_MS: i64 = 60_000;
const DAY_MS: i64 = 24 * 60 * MINUTE_MS;

/// Keys whose rotation nobody was told of; the system key rotates itself. Written as the index over them is.
const TO_ROTATE: &str = "rotation_told_at_ms IS NULL AND team_id IS NOT NULL AND superseded_by IS NULL \
     AND revoked_at_ms IS NULL AND enabled AND (expires_at_ms IS NULL OR expires_at_ms > rotation_due_at_ms)";

/// How many days before its end a key is told of, the nearer first; and which keys that are, those that live no longer than
/// that aside. Written as the indexes over them are: a value that is bound says nothing to a planner.
const TOLD: [(i64, &str); 2] = [
    (
        1,
        "expiry_told <> 1 AND expires_at_ms - created_at_ms > 86400000 AND team_id IS NOT NULL \
         AND superseded_by IS NULL AND revoked_at_ms IS NULL AND enabled",
    ),
    (
        7,
        "expiry_told = 0 AND expires_at_ms - created_at_ms > 604800000 AND team_id IS NOT NULL \
         AND superseded_by IS NULL AND revoked_at_ms IS NULL AND enabled",
    ),
];

impl Store {
    /// Writes down when keys were used: to the minute, and only forward; and raises what these uses give cause to. What
    /// is not known is passed over.
    pub(crate) async fn record_uses(&self, uses: Vec<Usage>) -> Result<(), Error> {
        let now_ms = self.database.clock().now_ms();
        let mut by_key: BTreeMap<String, Vec<Usage>> = BTreeMap::new();
        for usage in uses {
            // Clocks of two machines may differ by a little; nothing was used in the future.
            let usage = Usage { at_ms: usage.at_ms.clamp(0, now_ms), ..usage };
            by_key.entry(usage.key_id.clone()).or_default().push(usage);
        }
        let mut by_minute: BTreeMap<i64, Vec<String>> = BTreeMap::new();
        for (id, uses) in &mut by_key {
            uses.sort_unstable();
            uses.dedup();
            let last_ms = uses.iter().map(|usage| usage.at_ms).max().unwrap_or(0);
            by_minute.entry(last_ms / MINUTE_MS * MINUTE_MS).or_default().push(id.clone());
        }
        if by_minute.is_empty() {
            return Ok(());
        }
        let (this, of_keys) = (self.clone(), by_key.clone());
        let found = self
            .database
            .write(move |tx| async move {
                // In the one order in which everybody locks, so that two batches cannot wait for each other.
                let held = keys::Entity::find()
                    .filter(keys::Column::Id.is_in(of_keys.keys()))
                    .order_by_asc(keys::Column::Id)
                    .lock_exclusive()
                    .all(&tx)
                    .await?;
                let found: HashSet<String> = held.iter().map(|row| row.id.clone()).collect();
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
                for row in held {
                    let uses = of_keys.get(&row.id).map(Vec::as_slice).unwrap_or_default();
                    this.watch_key(&tx, row, uses).await?;
                }
                Ok::<_, Failure>(found)
            })
            .await?;
        by_key.retain(|id, uses| !found.contains(id) && uses.iter().any(|usage| usage.network.is_some()));
        self.watch_pairs(by_key).await
    }

    /// Tells the holders of some keys that a rotation is due, each once for each time that it is. Says how many.
    pub(crate) async fn tell_rotations(&self) -> Result<u64, Error> {
        let store = self.clone();
        let told = self
            .database
            .write(move |tx| async move {
                let now_ms = store.database.clock().now_ms();
                let ids: Vec<String> = keys::Entity::find()
                    .select_only()
                    .column(keys::Column::Id)
                    .filter(keys::Column::RotationDueAtMs.lte(now_ms))
                    .filter(Expr::cust(TO_ROTATE))
                    .order_by_asc(keys::Column::RotationDueAtMs)
                    .limit(STEP)
                    .into_tuple()
                    .all(&tx)
                    .await?;
                if ids.is_empty() {
                    return Ok::<_, Failure>(0);
                }
                // In the one order in which everybody locks. What was told of meanwhile is told of.
                let due = keys::Entity::find()
                    .filter(keys::Column::Id.is_in(ids))
                    .filter(check(keys::Column::RotationDueAtMs.lte(now_ms)))
                    .filter(check(Expr::cust(TO_ROTATE)))
                    .order_by_asc(keys::Column::Id)
                    .lock_exclusive()
                    .all(&tx)
                    .await?;
                let ids: Vec<String> = due.iter().map(|key| key.id.clone()).collect();
                let told = u64::try_from(due.len()).unwrap_or(u64::MAX);
                keys::Entity::update_many()
                    .col_expr(keys::Column::RotationToldAtMs, Expr::value(now_ms))
                    .filter(keys::Column::Id.is_in(ids))
                    .exec(&tx)
                    .await?;
                // One that has ended since is of no interest any more.
                let living = |key: &keys::Model| key.expires_at_ms.is_none_or(|end_ms| end_ms > now_ms);
                for key in due.into_iter().filter(living).filter_map(key_of) {
                    let team = match &key.team_id {
                        Some(team_id) => teams::Entity::find_by_id(team_id.as_str()).one(&tx).await?,
                        None => None,
                    };
                    if team.is_some_and(|team| team.deleted_at_ms.is_none()) {
                        store.tell(&tx, ROTATION_DUE, &key, &key.event_data());
                        let known = AlertKey::from(&key);
                        let since_ms = key.rotation_due_at_ms.unwrap_or(now_ms);
                        store.raise(&tx, &known.tenant, known.rotation_is_due(since_ms)).await?;
                    }
                }
                Ok(told)
            })
            .await?;
        Ok(told)
    }

    /// Tells the teams of some keys that these are about to end: a week before, and a day before, each once. A key that
    /// was made to live no longer than that is not told of, and so no temporary one. Says how many.
    pub(crate) async fn tell_expiries(&self) -> Result<u64, Error> {
        let (mut told, mut after_days) = (0, 0);
        for (days, untold) in TOLD {
            told += self.tell_expiries_between(after_days, days, untold).await?;
            after_days = days;
        }
        Ok(told)
    }

    async fn tell_expiries_between(&self, after_days: i64, days: i64, untold: &'static str) -> Result<u64, Error> {
        let store = self.clone();
        let told = self
            .database
            .write(move |tx| async move {
                let now_ms = store.database.clock().now_ms();
                let in_ms = |days: i64| now_ms.saturating_add(days * DAY_MS);
                let ids: Vec<String> = keys::Entity::find()
                    .select_only()
                    .column(keys::Column::Id)
                    .filter(keys::Column::ExpiresAtMs.gt(in_ms(after_days)))
                    .filter(keys::Column::ExpiresAtMs.lte(in_ms(days)))
                    .filter(Expr::cust(untold))
                    .order_by_asc(keys::Column::ExpiresAtMs)
                    .limit(STEP)
                    .into_tuple()
                    .all(&tx)
                    .await?;
                if ids.is_empty() {
                    return Ok::<_, Failure>(0);
                }
                // In the one order in which everybody locks. What was told of meanwhile is told of.
                let near = keys::Entity::find()
                    .filter(keys::Column::Id.is_in(ids))
                    .filter(check(Expr::cust(untold)))
                    .order_by_asc(keys::Column::Id)
                    .lock_exclusive()
                    .all(&tx)
                    .await?;
                let told = u64::try_from(near.len()).unwrap_or(u64::MAX);
                keys::Entity::update_many()
                    .col_expr(keys::Column::ExpiryTold, Expr::value(days))
                    .filter(keys::Column::Id.is_in(near.iter().map(|key| key.id.as_str())))
                    .exec(&tx)
                    .await?;
                for key in near.into_iter().filter_map(key_of) {
                    let known = AlertKey::from(&key);
                    let alert = known.expires(key.terms.expires_at_ms.unwrap_or(now_ms), days);
                    store.raise(&tx, &known.tenant, alert).await?;
                }
                Ok(told)
            })
            .await?;
        Ok(told)
    }

    /// Forgets some keys that were revoked or have expired long ago. Says how many.
    pub(crate) async fn purge_keys(&self) -> Result<u64, Error> {
        let now_ms = self.database.clock().now_ms();
        let purged = self
            .database
            .write(move |tx| async move {
                let mut ids: Vec<String> = Vec::new();
                // One by one, since each has an index of its own.
                for gone in long_gone(now_ms) {
                    let query = keys::Entity::find().select_only().column(keys::Column::Id).filter(gone).limit(STEP);
                    ids.extend(query.into_tuple::<String>().all(&tx).await?);
                }
                if ids.is_empty() {
                    return Ok::<_, Failure>(0);
                }
                let gone = keys::Entity::delete_many()
                    .filter(keys::Column::Id.is_in(ids))
                    // A key whose end was moved meanwhile stays.
                    .filter(check(long_gone(now_ms).into_iter().fold(Condition::any(), Condition::add)))
                    .exec(&tx)
                    .await?;
                Ok(gone.rows_affected)
            })
            .await?;
        Ok(purged)
    }
}

/// What makes a key one that ended long ago, of which nobody wants to know any more.
fn long_gone(now_ms: i64) -> [Condition; 4] {
    let before_ms = ApiKey::listed_since_ms(now_ms);
    let temporary_end_ms = ApiKey::temporary_listed_since_ms(now_ms);
    // Written as the indexes over them are: a value that is bound says nothing to a planner.
    let temporary = || Condition::all().add(Expr::col((keys::Entity, keys::Column::Temporary)));
    [
        Condition::all().add(keys::Column::RevokedAtMs.lte(before_ms)),
        Condition::all().add(keys::Column::ExpiresAtMs.lte(before_ms)),
        temporary().add(keys::Column::CreatedAtMs.lte(ApiKey::temporary_made_since_ms(temporary_end_ms))),
        temporary().add(keys::Column::ExpiresAtMs.lte(temporary_end_ms)),
    ]
}
