//! What a key does about itself, and what strangers may do about keys: a sandbox of their own, and telling of tokens
//! that lie about.

use std::collections::BTreeSet;

use paperkey_kit::{config::limits::FIRST_TIER, db::Tx, secrets::Secret, token::TokenKind};
use paperkey_proto::Error;
use sea_orm::{
    ActiveModelTrait as _, ColumnTrait as _, EntityTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _,
    entity::prelude::Expr,
};

use super::{
    Act, Failure, Store, announce,
    entities::{keys, product_keys, teams},
    keys::{
        MadeKey, RotatedKey, insert_key, key_of, key_row, lock_team, locked_key, membership, must_have_room_for_a_token,
    },
    watch::pair_in_alerts,
};
use crate::domain::{
    Fault,
    alert::AlertKey,
    api_key::{Actor, ApiKey, MAX_ROTATED_TOKENS, Overlap, TEST_KEY_LIFETIME_MS},
    key::{KeyKind, NewKey},
};

/// What a sandbox team is called.
const SANDBOX: &str = "Sandbox";

/// By whom a reported key is revoked, where people look.
const REPORTED: &str = "Reported as leaked";

/// A key and the team that it belongs to.
#[derive(Debug)]
pub(crate) struct KeyAtHome {
    pub(crate) key: ApiKey,
    pub(crate) team: Option<Home>,
}

/// What a key learns of its team.
#[derive(Debug)]
pub(crate) struct Home {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) tier: String,
    pub(crate) requests_per_minute: Option<i64>,
}

impl Store {
    /// Makes a sandbox team with its one key.
    pub(crate) async fn create_sandbox(&self, team_id: String, key: NewKey, act: Act) -> Result<ApiKey, Error> {
        let hash = self.hash(&key.token);
        let now_ms = self.database.clock().now_ms();
        let made = self
            .database
            .write(move |tx| async move {
                let team = teams::Model {
                    id: team_id.clone(),
                    name: SANDBOX.to_owned(),
                    tier: FIRST_TIER.to_owned(),
                    sandbox: true,
                    created_at_ms: now_ms,
                    leak_action: "revoke".to_owned(),
                    expires_at_ms: Some(now_ms.saturating_add(TEST_KEY_LIFETIME_MS)),
                    deleted_at_ms: None,
                    requests_per_minute: None,
                    invited_since_ms: None,
                    invited_count: 0,
                };
                teams::Entity::insert(teams::ActiveModel::from(team).reset_all()).exec_without_returning(&tx).await?;
                let made = insert_key(&tx, key_row(&key, hash, Some(&team_id), Actor::default(), now_ms)).await?;
                tx.audit(act.on_team(&team_id).on(vec![team_id, key.id]));
                Ok::<_, Failure>(made)
            })
            .await?;
        Ok(made)
    }

    /// A key by its id, with its team.
    pub(crate) async fn key_at_home(&self, key_id: String) -> Result<KeyAtHome, Error> {
        let found = self
            .database
            .read(move |reader| async move {
                let query = keys::Entity::find_by_id(key_id).find_also_related(teams::Entity);
                Ok::<_, Failure>(query.one(&reader).await?)
            })
            .await?;
        let (key, team) = found.ok_or(Fault::BadCredential)?;
        Ok(KeyAtHome {
            key: key_of(key).ok_or(Fault::BadCredential)?,
            team: team.map(|team| Home {
                id: team.id,
                name: team.name,
                tier: team.tier,
                requests_per_minute: team.requests_per_minute,
            }),
        })
    }

    /// Rotates the key that calls. Where it has done that before and the new one was never used, the new one is
    /// replaced: its token may have been lost on the way. The end of the old one stays as it is then. What a person
    /// has put in its place stays: the old token may be in the wrong hands.
    pub(crate) async fn rotate_own_key(&self, key_id: String, overlap: Overlap, act: Act) -> Result<RotatedKey, Error> {
        let store = self.clone();
        let rotated = self
            .database
            .write(move |tx| async move {
                let whose = keys::Entity::find_by_id(key_id.as_str()).one(&tx).await?;
                let whose = whose.and_then(key_of).ok_or(Fault::BadCredential)?;
                let user = match (&whose.team_id, &whose.terms.user_id) {
                    (Some(team_id), Some(user_id)) if whose.kind == KeyKind::User => Some((team_id, user_id)),
                    _ => None,
                };
                if let Some((team_id, _)) = user {
                    lock_team(&tx, team_id).await?;
                }
                let old = locked_key(&tx, &key_id).await?.ok_or(Fault::BadCredential)?;
                let now_ms = store.database.clock().now_ms();
                if !old.is_good(now_ms) || !is_held_by_member(&tx, &old).await? {
                    return Err(Failure::from(Fault::BadCredential));
                }
                old.must_be_rotatable()?;
                if let Some((team_id, user_id)) = user {
                    must_have_room_for_a_token(&tx, team_id, user_id, MAX_ROTATED_TOKENS, now_ms).await?;
                }
                let mut touched = vec![old.id.clone()];
                let (made, old_expires_at_ms) = match &old.superseded_by {
                    None => {
                        let end_ms = Some(old.end_after(overlap, now_ms));
                        (store.succeed(&tx, &old, &old, None, end_ms, now_ms).await?, end_ms)
                    }
                    Some(successor) => {
                        let lost = locked_key(&tx, successor).await?.filter(is_unclaimed);
                        let lost = lost.ok_or(Fault::SuccessorInUse)?;
                        let revoker = Actor { id: Some(old.id.clone()), name: Some(old.terms.name.clone()) };
                        store.end(&tx, &lost, &revoker, now_ms).await?;
                        let end_ms = old.terms.expires_at_ms;
                        touched.push(lost.id.clone());
                        (store.succeed(&tx, &old, &lost, None, end_ms, now_ms).await?, end_ms)
                    }
                };
                let MadeKey { key, token } = made;
                touched.push(key.id.clone());
                tx.audit(act.on(touched));
                let rotated = RotatedKey { key, token, old_expires_at_ms };
                act.answer(&tx, &rotated)?;
                Ok(rotated)
            })
            .await?;
        Ok(rotated)
    }

    /// Revokes what is good and secret among these tokens, or tells the team of it, as the team has set. One
    /// transaction, whatever they are.
    pub(crate) async fn report_leaks(&self, tokens: Vec<Secret>, act: Act) -> Result<(), Error> {
        let store = self.clone();
        let mut of_keys = BTreeSet::new();
        let mut of_pairs = BTreeSet::new();
        for token in &tokens {
            match TokenKind::of(token.expose()) {
                None | Some(TokenKind::ProductPublic) => {}
                Some(kind) if KeyKind::of(kind).is_some() => of_keys.extend(self.hashes(token)),
                Some(_) => of_pairs.extend(self.hashes(token)),
            }
        }
        self.database
            .write(move |tx| async move {
                store.keys_leaked(&tx, of_keys, &act).await?;
                store.pairs_leaked(&tx, of_pairs, &act).await
            })
            .await?;
        Ok(())
    }

    /// Locks the keys of these hashes in the order of their ids, which is the one in which everybody locks.
    async fn keys_leaked(&self, tx: &Tx, hashes: BTreeSet<Vec<u8>>, act: &Act) -> Result<(), Failure> {
        if hashes.is_empty() {
            return Ok(());
        }
        let rows = keys::Entity::find()
            .filter(keys::Column::TokenHash.is_in(hashes))
            .order_by_asc(keys::Column::Id)
            .lock_exclusive()
            .all(tx)
            .await?;
        for row in rows {
            self.key_leaked(tx, row, act).await?;
        }
        Ok(())
    }

    async fn key_leaked(&self, tx: &Tx, row: keys::Model, act: &Act) -> Result<(), Failure> {
        let now_ms = self.database.clock().now_ms();
        let still_open =
            |key: &ApiKey| key.revoked_at_ms.is_none() && key.terms.expires_at_ms.is_none_or(|at_ms| at_ms > now_ms);
        let Some(key) = key_of(row).filter(still_open) else { return Ok(()) };
        if let Some(team_id) = &key.team_id
            && self.wants_alert(tx, team_id).await?
        {
            let known = AlertKey::from(&key);
            // Whoever reports one again and again is heard once an hour.
            if self.raise_once(tx, &known.tenant, known.leaked()).await? {
                tx.audit(act.as_seen_by(&known.tenant.team_id).on(vec![key.id]));
            }
            return Ok(());
        }
        let revoker = Actor { id: None, name: Some(REPORTED.to_owned()) };
        self.end(tx, &key, &revoker, now_ms).await?;
        tx.audit(act.as_seen_by(key.team_id.as_deref().unwrap_or_default()).on(vec![key.id]));
        Ok(())
    }

    /// The same for the pairs of products.
    async fn pairs_leaked(&self, tx: &Tx, hashes: BTreeSet<Vec<u8>>, act: &Act) -> Result<(), Failure> {
        if hashes.is_empty() {
            return Ok(());
        }
        let pairs = product_keys::Entity::find()
            .filter(product_keys::Column::SecretHash.is_in(hashes))
            .filter(product_keys::Column::RevokedAtMs.is_null())
            .order_by_asc(product_keys::Column::Id)
            .lock_exclusive()
            .all(tx)
            .await?;
        for pair in pairs {
            self.pair_leaked(tx, pair, act).await?;
        }
        Ok(())
    }

    async fn pair_leaked(&self, tx: &Tx, pair: product_keys::Model, act: &Act) -> Result<(), Failure> {
        let now_ms = self.database.clock().now_ms();
        if self.wants_alert(tx, &pair.team_id).await? {
            let touched = vec![pair.product_id.clone(), pair.id.clone()];
            if let Some(known) = pair_in_alerts(pair)
                && self.raise_once(tx, &known.tenant, known.leaked()).await?
            {
                tx.audit(act.as_seen_by(&known.tenant.team_id).on(touched));
            }
            return Ok(());
        }
        product_keys::Entity::update_many()
            .col_expr(product_keys::Column::RevokedAtMs, Expr::value(now_ms))
            .filter(product_keys::Column::Id.eq(pair.id.as_str()))
            .filter(product_keys::Column::RevokedAtMs.is_null())
            .exec(tx)
            .await?;
        announce(tx, &self.epochs, format!("key:{}", pair.id));
        tx.audit(act.as_seen_by(&pair.team_id).on(vec![pair.product_id, pair.id]));
        Ok(())
    }

    async fn wants_alert(&self, tx: &Tx, team_id: &str) -> Result<bool, Failure> {
        let team = teams::Entity::find_by_id(team_id).one(tx).await?;
        Ok(team.is_some_and(|team| team.leak_action == "alert"))
    }
}

/// Whether nobody has anything to lose by its end: no person asked for it, and it was never used, and not replaced or
/// revoked by anybody.
fn is_unclaimed(key: &ApiKey) -> bool {
    key.self_rotated && key.first_used_at_ms.is_none() && key.revoked_at_ms.is_none() && key.superseded_by.is_none()
}

/// Whether the user of a token is still a member of its team. Other keys depend on nobody.
async fn is_held_by_member(tx: &Tx, key: &ApiKey) -> Result<bool, Failure> {
    match (&key.terms.user_id, &key.team_id) {
        (Some(user_id), Some(team_id)) if key.kind == KeyKind::User => {
            let member = membership(tx, team_id, user_id).await?;
            Ok(member.is_some_and(|(_, since_ms)| since_ms <= key.created_at_ms))
        }
        _ => Ok(key.kind != KeyKind::User),
    }
}
