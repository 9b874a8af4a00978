//! Credentials, found by the hash of their token: one look-up in a unique index, and a second one where the pepper was
//! changed and the token was not used since.
//!
//! What the first good use of a token changes (that it was used, and under which pepper its hash is) is written before
//! the use is granted, once in the life of a key: whoever replaces a key that was never used must be able to rely on it.
//! That a key was tried after it was revoked is noted in memory: its refusal is that of a key that never was.

use paperkey_kit::{
    changes::{Changes, changes_since, latest_seq},
    principal::{Tenant, mode_of},
    secrets::Secret,
};
use paperkey_proto::{Error, principal::v1::Role};
use sea_orm::{ColumnTrait as _, EntityTrait as _, QueryFilter as _, entity::prelude::Expr};

use super::{
    Failure, Store,
    entities::{keys, product_keys, teams},
    keys::{key_of, membership},
    watch::pair_in_alerts,
};
use crate::domain::{alert::AlertKey, api_key::ApiKey, key::KeyKind};

/// How often a key is looked up anew that changed between being found and being marked as used.
const TRIES: usize = 3;

/// A key that is good at that time.
#[derive(Debug)]
pub(crate) struct FoundKey {
    pub(crate) key: ApiKey,
    /// None for the system key.
    pub(crate) team: Option<FoundTeam>,
    /// The role of the user that a user token acts for.
    pub(crate) role: Role,
}

/// The team of a credential.
#[derive(Debug)]
pub(crate) struct FoundTeam {
    pub(crate) id: String,
    pub(crate) tier: String,
    /// Where the installation has set it for the team.
    pub(crate) requests_per_minute: Option<i64>,
    /// When it ends, if it is a sandbox.
    pub(crate) expires_at_ms: Option<i64>,
}

/// A product's pair that is not revoked.
#[derive(Debug)]
pub(crate) struct FoundPair {
    pub(crate) id: String,
    pub(crate) tenant: Tenant,
    pub(crate) team: FoundTeam,
    pub(crate) product_id: String,
}

/// Which half of a pair a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PairHalf {
    Public,
    Secret,
}

/// The team, if anything in it still works.
pub(super) fn living(team: teams::Model, now_ms: i64) -> Option<FoundTeam> {
    let alive = team.deleted_at_ms.is_none() && team.expires_at_ms.is_none_or(|at_ms| at_ms > now_ms);
    alive.then_some(FoundTeam {
        id: team.id,
        tier: team.tier,
        requests_per_minute: team.requests_per_minute,
        expires_at_ms: team.expires_at_ms,
    })
}

/// The key, if it is good.
fn judged(
    key: keys::Model,
    team: Option<teams::Model>,
    member: Option<(Role, i64)>,
    kind: KeyKind,
    now_ms: i64,
) -> Option<FoundKey> {
    let key = key_of(key).filter(|key| key.kind == kind && key.is_good(now_ms))?;
    let team = match (&key.team_id, team) {
        (Some(_), Some(team)) => Some(living(team, now_ms)?),
        (None, _) if kind == KeyKind::System => None,
        // Its team is gone.
        _ => return None,
    };
    let role = match (kind, member) {
        // Who has left and come back begins anew: tokens of the time before stay ended.
        (KeyKind::User, Some((role, since_ms))) if since_ms <= key.created_at_ms => role,
        (KeyKind::User, _) => return None,
        _ => Role::Unspecified,
    };
    Some(FoundKey { key, team, role })
}

impl Store {
    /// Notes that a key was tried that was revoked, if it was.
    fn note_revoked(&self, row: &keys::Model) {
        if let Some(revoked_at_ms) = row.revoked_at_ms
            && let Some(key) = key_of(row.clone())
        {
            self.revoked_uses.note(AlertKey::from(&key), revoked_at_ms);
        }
    }

    /// The key of that token, if it is good: of the kind that the token says, enabled, neither revoked nor expired, of
    /// a team that is there, and if it is a user's token, of a member.
    pub(crate) async fn key_by_token(
        &self,
        token: &Secret,
        kind: KeyKind,
        now_ms: i64,
    ) -> Result<Option<FoundKey>, Error> {
        let hash = self.hash(token);
        for _ in 0..TRIES {
            let mut found = None;
            for hashes in self.searches(token) {
                found = self.key_by_hash(hashes, kind, now_ms).await?;
                if found.is_some() {
                    break;
                }
            }
            let Some((stored, Some(good))) = found else { return Ok(None) };
            let settled = stored == hash && good.key.first_used_at_ms.is_some();
            if settled || self.mark_used(&good.key, stored, hash.clone(), now_ms).await? {
                return Ok(Some(good));
            }
        }
        Ok(None)
    }

    /// Under which hashes to look, one search after the other: under that of today, and where there was another pepper
    /// before, under both at once, since somebody else may be hashing it anew between two searches.
    fn searches(&self, token: &Secret) -> Vec<Vec<Vec<u8>>> {
        let hashes = self.hashes(token);
        let first = hashes.iter().take(1).cloned().collect();
        if hashes.len() > 1 { vec![first, hashes] } else { vec![first] }
    }

    /// What is found under one of these hashes: nothing, or that hash and a key, if it is good.
    async fn key_by_hash(
        &self,
        hashes: Vec<Vec<u8>>,
        kind: KeyKind,
        now_ms: i64,
    ) -> Result<Option<(Vec<u8>, Option<FoundKey>)>, Error> {
        let found = self
            .database
            .read(move |reader| async move {
                let query =
                    keys::Entity::find().filter(keys::Column::TokenHash.is_in(hashes)).find_also_related(teams::Entity);
                let Some((key, team)) = query.one(&reader).await? else { return Ok::<_, Failure>(None) };
                let member = match (&key.team_id, &key.user_id) {
                    (Some(team_id), Some(user_id)) => membership(&reader, team_id, user_id).await?,
                    _ => None,
                };
                Ok(Some((key, team, member)))
            })
            .await?;
        Ok(found.map(|(mut key, team, member)| {
            let stored = std::mem::take(&mut key.token_hash);
            self.note_revoked(&key);
            (stored, judged(key, team, member, kind, now_ms))
        }))
    }

    /// Writes down the first use of a key, and its hash under the pepper of today. Says whether the key was still as
    /// it was found.
    async fn mark_used(&self, key: &ApiKey, found: Vec<u8>, hash: Vec<u8>, now_ms: i64) -> Result<bool, Error> {
        let (id, first) = (key.id.clone(), key.first_used_at_ms);
        let marked = self
            .database
            .write(move |tx| async move {
                let mut update = keys::Entity::update_many()
                    .col_expr(keys::Column::TokenHash, Expr::value(hash))
                    .col_expr(keys::Column::FirstUsedAtMs, Expr::value(first.unwrap_or(now_ms)))
                    .filter(keys::Column::Id.eq(id))
                    .filter(keys::Column::TokenHash.eq(found))
                    .filter(keys::Column::RevokedAtMs.is_null());
                if first.is_none() {
                    update = update.filter(keys::Column::FirstUsedAtMs.is_null());
                }
                Ok::<_, Failure>(update.exec(&tx).await?.rows_affected > 0)
            })
            .await?;
        Ok(marked)
    }

    /// The product's pair of which that token is one half, if it is not revoked.
    pub(crate) async fn pair_by_token(
        &self,
        token: &Secret,
        half: PairHalf,
        now_ms: i64,
    ) -> Result<Option<FoundPair>, Error> {
        let column = match half {
            PairHalf::Public => product_keys::Column::PublicHash,
            PairHalf::Secret => product_keys::Column::SecretHash,
        };
        for hashes in self.searches(token) {
            let found = self
                .database
                .read(move |reader| async move {
                    let query =
                        product_keys::Entity::find().filter(column.is_in(hashes)).find_also_related(teams::Entity);
                    Ok::<_, Failure>(query.one(&reader).await?)
                })
                .await?;
            let Some((pair, team)) = found else { continue };
            if let Some(revoked_at_ms) = pair.revoked_at_ms {
                // A public key lives on in apps that nobody updates.
                if let (PairHalf::Secret, Some(key)) = (half, pair_in_alerts(pair)) {
                    self.revoked_uses.note(key, revoked_at_ms);
                }
                return Ok(None);
            }
            let stored = match half {
                PairHalf::Public => pair.public_hash,
                PairHalf::Secret => pair.secret_hash,
            };
            let Some(team) = team.and_then(|team| living(team, now_ms)) else { return Ok(None) };
            let Some(mode) = mode_of(&pair.mode) else { return Ok(None) };
            let hash = self.hash(token);
            if stored != hash {
                self.rehash_pair(pair.id.clone(), column, stored, hash).await?;
            }
            let tenant = Tenant { team_id: team.id.clone(), mode };
            return Ok(Some(FoundPair { id: pair.id, tenant, team, product_id: pair.product_id }));
        }
        Ok(None)
    }

    async fn rehash_pair(
        &self,
        id: String,
        column: product_keys::Column,
        found: Vec<u8>,
        hash: Vec<u8>,
    ) -> Result<(), Error> {
        self.database
            .write(move |tx| async move {
                product_keys::Entity::update_many()
                    .col_expr(column, Expr::value(hash))
                    .filter(product_keys::Column::Id.eq(id))
                    .filter(column.eq(found))
                    .exec(&tx)
                    .await?;
                Ok::<_, Failure>(())
            })
            .await?;
        Ok(())
    }

    /// What changed in the judgement of credentials since that number.
    pub(crate) async fn changes_since(&self, seq: i64) -> Result<Changes, Error> {
        Ok(changes_since(&self.database, seq).await?)
    }

    /// The number of the newest change.
    pub(crate) async fn newest_change(&self) -> Result<i64, Error> {
        Ok(latest_seq(&self.database).await?)
    }
}
