//! Credentials, found by the hash of their token: one look-up in a unique index.

use paperkey_kit::{
    changes::{Changes, changes_since, latest_seq},
    principal::{Tenant, mode_of},
    secrets::Secret,
};
use paperkey_proto::{Error, options::v1::Scope, principal::v1::Mode};
use sea_orm::{ColumnTrait as _, EntityTrait as _, QueryFilter as _};

use super::{
    Failure, Store,
    entities::{keys, product_keys, teams},
};
use crate::domain::key::{KeyKind, scopes_of};

/// A key that is good at that time.
#[derive(Debug)]
pub(crate) struct FoundKey {
    pub(crate) id: String,
    pub(crate) name: String,
    /// Whose it is, and that team's tier; nobody's for the system key.
    pub(crate) team: Option<(Tenant, String)>,
    pub(crate) scopes: Vec<Scope>,
    pub(crate) read_only: bool,
    pub(crate) expires_at_ms: Option<i64>,
}

/// A product's pair that is not revoked.
#[derive(Debug)]
pub(crate) struct FoundPair {
    pub(crate) id: String,
    pub(crate) tenant: Tenant,
    pub(crate) tier: String,
    pub(crate) product_id: String,
}

/// Which half of a pair a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PairHalf {
    Public,
    Secret,
}

impl Store {
    /// The key of that token, if it is good: of the kind that the token says, enabled, neither revoked nor expired.
    pub(crate) async fn key_by_token(
        &self,
        token: &Secret,
        kind: KeyKind,
        now_ms: i64,
    ) -> Result<Option<FoundKey>, Error> {
        let hash = self.hash(token);
        let found = self
            .database
            .read(move |reader| async move {
                let query =
                    keys::Entity::find().filter(keys::Column::TokenHash.eq(hash)).find_also_related(teams::Entity);
                Ok::<_, Failure>(query.one(&reader).await?)
            })
            .await?;
        Ok(found.and_then(|(key, team)| {
            let team = match (&key.team_id, team) {
                (Some(_), Some(team)) => Some((Tenant { team_id: team.id, mode: mode_of(&key.mode)? }, team.tier)),
                (None, _) if kind == KeyKind::System => None,
                // Its team is gone.
                _ => return None,
            };
            // Addresses are not judged yet, so a key that is bound to some is closed rather than open.
            let open = key.enabled && key.revoked_at_ms.is_none() && key.allowlist.is_none();
            let alive = key.expires_at_ms.is_none_or(|at_ms| at_ms > now_ms);
            (open && alive && key.kind == kind.word()).then(|| FoundKey {
                id: key.id,
                name: key.name,
                team,
                scopes: scopes_of(&key.scopes),
                read_only: key.read_only,
                expires_at_ms: key.expires_at_ms,
            })
        }))
    }

    /// The product's pair of which that token is one half, if it is not revoked.
    pub(crate) async fn pair_by_token(&self, token: &Secret, half: PairHalf) -> Result<Option<FoundPair>, Error> {
        let hash = self.hash(token);
        let column = match half {
            PairHalf::Public => product_keys::Column::PublicHash,
            PairHalf::Secret => product_keys::Column::SecretHash,
        };
        let found = self
            .database
            .read(move |reader| async move {
                let query = product_keys::Entity::find()
                    .filter(column.eq(hash))
                    .filter(product_keys::Column::RevokedAtMs.is_null())
                    .find_also_related(teams::Entity);
                Ok::<_, Failure>(query.one(&reader).await?)
            })
            .await?;
        Ok(found.and_then(|(pair, team)| {
            let (team, mode): (_, Mode) = (team?, mode_of(&pair.mode)?);
            Some(FoundPair {
                id: pair.id,
                tenant: Tenant { team_id: team.id, mode },
                tier: team.tier,
                product_id: pair.product_id,
            })
        }))
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
