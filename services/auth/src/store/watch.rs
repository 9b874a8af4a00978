//! What the uses of keys, good and bad, tell of them: old tokens in use, networks that are new, bursts of refused calls,
//! keys that were revoked.
//!
//! The row of a key is held before its networks are looked at, so that of many processes that tell of a network one finds
//! it new. Keys are taken in the order of their ids, those of products in a transaction of their own.

use std::{
    collections::BTreeMap,
    sync::{Arc, atomic::Ordering},
};

use paperkey_kit::{
    db::{DbError, Tx},
    principal::{Tenant, mode_of},
};
use paperkey_proto::{Error, principal::v1::Mode};
use sea_orm::{
    ColumnTrait as _, ConnectionTrait, EntityTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _,
    Statement, Value,
};

use super::{
    Failure, Store,
    entities::{alerts, key_networks, keys, product_keys},
    keys::key_of,
    upkeep::MINUTE_MS,
};
use crate::domain::{
    alert::{
        AlertKey, Burst, MAX_NETWORKS, MAX_NOBODYS, NETWORK_KNOWN_MS, NewAlert, OVERLAP_GRACE_MS, cause_word, hour_of,
    },
    api_key::ApiKey,
    key::KeyKind,
};

/// What alerts call the pair of a product: it has no name.
const PAIR_NAME: &str = "Product secret key";

/// That a key was used.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Usage {
    pub(crate) key_id: String,
    pub(crate) at_ms: i64,
    /// From where, if that is known.
    pub(crate) network: Option<String>,
}

/// A product's pair, as alerts speak of it.
pub(super) fn pair_in_alerts(pair: product_keys::Model) -> Option<AlertKey> {
    let tenant = Tenant { team_id: pair.team_id, mode: mode_of(&pair.mode)? };
    Some(AlertKey { id: pair.id, name: PAIR_NAME.to_owned(), prefix: pair.secret_prefix, tenant })
}

impl Store {
    /// Raises what these uses of a key, whose row is held, give cause to.
    pub(super) async fn watch_key(&self, tx: &Tx, row: keys::Model, uses: &[Usage]) -> Result<(), DbError> {
        let Some(key) = key_of(row) else { return Ok(()) };
        let known = AlertKey::from(&key);
        if known.tenant.team_id.is_empty() || key.kind == KeyKind::System {
            return Ok(());
        }
        if let (Some(successor), Some(rotated_at_ms)) = (&key.superseded_by, key.rotated_at_ms) {
            let since_ms = rotated_at_ms.saturating_add(OVERLAP_GRACE_MS);
            for usage in uses.iter().filter(|usage| usage.at_ms > since_ms) {
                if is_recorded(tx, &key, usage).await? {
                    continue;
                }
                let alert = known.still_used(successor, key.terms.expires_at_ms, usage.network.as_deref());
                self.raise(tx, &known.tenant, alert).await?;
            }
        }
        self.watch_networks(tx, &known, uses).await
    }

    /// The same for pairs of products: those of the ids that are such.
    pub(super) async fn watch_pairs(&self, uses: BTreeMap<String, Vec<Usage>>) -> Result<(), Error> {
        if uses.is_empty() {
            return Ok(());
        }
        let this = self.clone();
        self.database
            .write(move |tx| async move {
                let held = product_keys::Entity::find()
                    .filter(product_keys::Column::Id.is_in(uses.keys()))
                    .filter(product_keys::Column::RevokedAtMs.is_null())
                    .order_by_asc(product_keys::Column::Id)
                    .lock_exclusive()
                    .all(&tx)
                    .await?;
                for pair in held.into_iter().filter_map(pair_in_alerts) {
                    let uses = uses.get(&pair.id).map(Vec::as_slice).unwrap_or_default();
                    this.watch_networks(&tx, &pair, uses).await?;
                }
                Ok::<_, Failure>(())
            })
            .await?;
        Ok(())
    }

    /// Remembers from which networks a key was used, and raises those that are new for it. The first of all is no news.
    async fn watch_networks(&self, tx: &Tx, key: &AlertKey, uses: &[Usage]) -> Result<(), DbError> {
        let stale_ms = self.database.clock().now_ms().saturating_sub(NETWORK_KNOWN_MS);
        for usage in uses {
            let Some(network) = usage.network.as_deref() else { continue };
            let id = (key.id.clone(), network.to_owned());
            let seen = key_networks::Entity::find_by_id(id).one(tx).await?;
            if seen.as_ref().is_none_or(|seen| seen.last_seen_ms < usage.at_ms) {
                see(tx, key, network, usage.at_ms).await?;
            }
            if seen.is_some_and(|seen| seen.last_seen_ms > stale_ms) {
                continue;
            }
            let others = key_networks::Entity::find()
                .filter(key_networks::Column::KeyId.eq(key.id.as_str()))
                .filter(key_networks::Column::Network.ne(network))
                .limit(1)
                .one(tx)
                .await?;
            if others.is_some() {
                forget_beyond(tx, &key.id).await?;
                self.raise(tx, &key.tenant, key.seen_in(network)).await?;
            }
        }
        Ok(())
    }

    /// Raises bursts of refused calls: of the teams whose keys they are, and of the installation where nobody's.
    pub(crate) async fn record_bursts(&self, bursts: Vec<Burst>) -> Result<(), Error> {
        if bursts.is_empty() {
            return Ok(());
        }
        let this = self.clone();
        self.database
            .write(move |tx| async move {
                let ids: Vec<&str> = bursts.iter().filter_map(|burst| burst.key_id.as_deref()).collect();
                let known = keys_in_alerts(&tx, &ids).await?;
                let mut raised: Vec<_> = bursts
                    .iter()
                    .filter_map(|burst| match &burst.key_id {
                        None => Some((nobodys(), burst.of_address(), true)),
                        Some(id) => known.get(id).map(|key| (key.tenant.clone(), key.refused(burst), false)),
                    })
                    .collect();
                raised.sort_by(|(one, a, _), (other, b, _)| {
                    (&one.team_id, one.mode_word(), &a.subject).cmp(&(&other.team_id, other.mode_word(), &b.subject))
                });
                for (tenant, alert, of_address) in raised {
                    if !of_address || this.has_room_for_address(&tx, &alert).await? {
                        this.raise(&tx, &tenant, alert).await?;
                    }
                }
                Ok::<_, Failure>(())
            })
            .await?;
        Ok(())
    }

    /// Whether an address may be told of. Strangers have as many as they like: beyond some in an hour, only those that
    /// were told of are counted on.
    async fn has_room_for_address(&self, tx: &Tx, alert: &NewAlert) -> Result<bool, DbError> {
        let hour = hour_of(self.database.clock().now_ms());
        let nobodys = || {
            alerts::Entity::find()
                .filter(alerts::Column::TeamId.eq(""))
                .filter(alerts::Column::Mode.eq(nobodys().mode_word()))
        };
        if self.crowded_hour.load(Ordering::Relaxed) != hour {
            let nth = nobodys().order_by_desc(alerts::Column::Id).offset(MAX_NOBODYS - 1).one(tx).await?;
            if nth.is_none_or(|nth| nth.hour < hour) {
                return Ok(true);
            }
            let crowded_hour = Arc::clone(&self.crowded_hour);
            tx.after_commit(move || {
                if crowded_hour.swap(hour, Ordering::Relaxed) != hour {
                    tracing::warn!(
                        "calls from more than {MAX_NOBODYS} addresses are refused: no more of them are told of"
                    );
                }
            });
        }
        let told = nobodys()
            .filter(alerts::Column::Cause.eq(cause_word(alert.cause)))
            .filter(alerts::Column::Subject.eq(alert.subject.as_str()))
            .filter(alerts::Column::Hour.eq(hour))
            .one(tx)
            .await?;
        Ok(told.is_some())
    }

    /// Raises that somebody has tried keys after they were revoked.
    pub(crate) async fn tell_revoked_uses(&self, mut tried: Vec<(AlertKey, i64)>) -> Result<(), Error> {
        tried.sort_by(|(one, _), (other, _)| one.id.cmp(&other.id));
        let this = self.clone();
        self.database
            .write(move |tx| async move {
                for (key, revoked_at_ms) in tried {
                    this.raise(&tx, &key.tenant, key.tried_after_its_end(revoked_at_ms)).await?;
                }
                Ok::<_, Failure>(())
            })
            .await?;
        Ok(())
    }
}

/// Nobody's alerts are the installation's.
fn nobodys() -> Tenant {
    Tenant { team_id: String::new(), mode: Mode::Live }
}

/// What alerts say of keys and pairs.
async fn keys_in_alerts(
    connection: &impl ConnectionTrait,
    ids: &[&str],
) -> Result<BTreeMap<String, AlertKey>, DbError> {
    if ids.is_empty() {
        return Ok(BTreeMap::new());
    }
    let keys = keys::Entity::find().filter(keys::Column::Id.is_in(ids.iter().copied())).all(connection).await?;
    let pairs = product_keys::Entity::find()
        .filter(product_keys::Column::Id.is_in(ids.iter().copied()))
        .all(connection)
        .await?;
    let keys = keys.into_iter().filter_map(key_of).map(|key| {
        let mut known = AlertKey::from(&key);
        if known.tenant.team_id.is_empty() {
            // The system key is of no mode.
            known.tenant = nobodys();
        }
        known
    });
    let known = keys.chain(pairs.into_iter().filter_map(pair_in_alerts));
    Ok(known.map(|key| (key.id.clone(), key)).collect())
}

/// Whether a use of a key was told of before, as far as is remembered: whoever has no answer tells of it again.
async fn is_recorded(tx: &Tx, key: &ApiKey, usage: &Usage) -> Result<bool, DbError> {
    let Some(network) = &usage.network else {
        return Ok(key.last_used_at_ms.is_some_and(|last_ms| usage.at_ms / MINUTE_MS * MINUTE_MS <= last_ms));
    };
    let seen = key_networks::Entity::find_by_id((key.id.clone(), network.clone())).one(tx).await?;
    Ok(seen.is_some_and(|seen| seen.last_seen_ms >= usage.at_ms))
}

/// Remembers that a key, whose row is held, was used from a network.
async fn see(tx: &Tx, key: &AlertKey, network: &str, at_ms: i64) -> Result<(), DbError> {
    let sql = "INSERT INTO key_networks (key_id, network, team_id, first_seen_ms, last_seen_ms) \
         VALUES ($1, $2, $3, $4, $4) ON CONFLICT (key_id, network) DO UPDATE SET last_seen_ms = excluded.last_seen_ms";
    let values: Vec<Value> =
        vec![key.id.as_str().into(), network.into(), key.tenant.team_id.as_str().into(), at_ms.into()];
    tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), sql, values)).await?;
    Ok(())
}

/// Forgets the networks of a key that are too many.
async fn forget_beyond(tx: &Tx, key_id: &str) -> Result<(), DbError> {
    let first_too_many = key_networks::Entity::find()
        .filter(key_networks::Column::KeyId.eq(key_id))
        .order_by_desc(key_networks::Column::LastSeenMs)
        .offset(MAX_NETWORKS)
        .one(tx)
        .await?;
    if let Some(first) = first_too_many {
        key_networks::Entity::delete_many()
            .filter(key_networks::Column::KeyId.eq(key_id))
            .filter(key_networks::Column::LastSeenMs.lte(first.last_seen_ms))
            .exec(tx)
            .await?;
    }
    Ok(())
}
