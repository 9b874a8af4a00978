//! Keys of a tenant: made, found, changed, rotated and revoked.
//!
//! Whoever changes a key locks its row first and judges what is there then, so that of many who come at once each
//! sees what the one before has done: SQLite has one writer, and PostgreSQL reads a locked row afresh. The row of the
//! team is the lock under which keys are counted. It is taken before that of a key, and an old half before its
//! successor.

use paperkey_kit::{
    db::Tx,
    ids::new_id,
    principal::{Tenant, mode_of, mode_word},
    secrets::Secret,
    values::Page,
};
use paperkey_proto::{
    Error,
    principal::v1::{Mode, Role},
};
use sea_orm::{
    ActiveModelTrait as _, ColumnTrait as _, Condition, ConnectionTrait, EntityTrait as _, PaginatorTrait as _,
    QueryFilter as _, QueryOrder as _, QuerySelect as _, Select, entity::prelude::Expr,
};

use super::{
    Act, Failure, Store, TenantStore, announce,
    entities::{keys, memberships, teams, users},
};
use crate::domain::{
    Fault,
    allowlist::Allowlist,
    api_key::{
        Actor, ApiKey, COUNTED, Changes, Doer, Hand, MAX_ACTIVE_KEYS, MAX_ROTATED_TOKENS, MAX_TEMPORARY_KEYS,
        MAX_USER_TOKENS, Overlap, Terms, Wish,
    },
    key::{KeyKind, NewKey, scopes_json, scopes_of},
    team::role_of,
};

/// The events of keys.
pub(super) const CREATED: &str = "api_key.created";
pub(super) const ROTATED: &str = "api_key.rotated";
pub(super) const REVOKED: &str = "api_key.revoked";
pub(super) const ROTATION_DUE: &str = "api_key.rotation_due";

/// A key that was made, with its token.
#[derive(Debug)]
pub(crate) struct MadeKey {
    pub(crate) key: ApiKey,
    pub(crate) token: Secret,
}

/// A key that took the place of another.
#[derive(Debug)]
pub(crate) struct RotatedKey {
    pub(crate) key: ApiKey,
    pub(crate) token: Secret,
    pub(crate) old_expires_at_ms: Option<i64>,
}

/// What was stored as a key; `None` for what this code would not have stored, which therefore opens nothing.
pub(super) fn key_of(row: keys::Model) -> Option<ApiKey> {
    Some(ApiKey {
        kind: KeyKind::of_word(&row.kind)?,
        mode: mode_of(&row.mode)?,
        terms: Terms {
            scopes: scopes_of(&row.scopes),
            allowlist: Allowlist::from_json(row.allowlist.as_deref())?,
            name: row.name,
            read_only: row.read_only,
            enabled: row.enabled,
            expires_at_ms: ApiKey::end_ms(row.expires_at_ms, row.temporary, row.created_at_ms),
            requests_per_minute: row.requests_per_minute,
            rotate_every_days: row.rotate_every_days,
            user_id: row.user_id,
        },
        id: row.id,
        team_id: row.team_id,
        shown_prefix: row.shown_prefix,
        creator: Actor { id: row.created_by, name: row.created_by_name },
        created_at_ms: row.created_at_ms,
        revoked_at_ms: row.revoked_at_ms,
        revoker: Actor { id: row.revoked_by, name: row.revoked_by_name },
        superseded_by: row.superseded_by,
        replaces: row.replaces,
        lineage: row.lineage,
        self_rotated: row.self_rotated,
        given_to: row.given_to,
        rotated_at_ms: row.rotated_at_ms,
        first_used_at_ms: row.first_used_at_ms,
        last_used_at_ms: row.last_used_at_ms,
        rotation_due_at_ms: row.rotation_due_at_ms,
        temporary: row.temporary,
    })
}

/// The row of a new key.
pub(super) fn key_row(
    key: &NewKey,
    token_hash: Vec<u8>,
    team_id: Option<&str>,
    creator: Actor,
    now_ms: i64,
) -> keys::Model {
    let terms = &key.terms;
    keys::Model {
        id: key.id.clone(),
        kind: key.kind.word().to_owned(),
        team_id: team_id.map(str::to_owned),
        mode: mode_word(key.mode).to_owned(),
        user_id: terms.user_id.clone(),
        created_by: creator.id,
        name: terms.name.clone(),
        token_hash,
        shown_prefix: key.shown_prefix.clone(),
        scopes: scopes_json(&terms.scopes),
        read_only: terms.read_only,
        allowlist: terms.allowlist.json(),
        enabled: terms.enabled,
        expires_at_ms: terms.expires_at_ms,
        created_at_ms: now_ms,
        revoked_at_ms: None,
        revoked_by: None,
        created_by_name: creator.name,
        revoked_by_name: None,
        superseded_by: None,
        replaces: None,
        lineage: None,
        rotated_at_ms: None,
        first_used_at_ms: None,
        last_used_at_ms: None,
        requests_per_minute: terms.requests_per_minute,
        rotate_every_days: terms.rotate_every_days,
        rotation_due_at_ms: terms.rotation_due_at_ms(now_ms),
        rotation_told_at_ms: None,
        self_rotated: false,
        given_to: None,
        leak_told_at_ms: None,
        expiry_told: 0,
        temporary: key.temporary,
    }
}

/// Stores a key, and reads it back.
pub(super) async fn insert_key(tx: &Tx, row: keys::Model) -> Result<ApiKey, Failure> {
    let key = key_of(row.clone()).ok_or_else(|| Failure::Invalid(Error::internal("a new key is not one")))?;
    keys::Entity::insert(keys::ActiveModel::from(row).reset_all()).exec_without_returning(tx).await?;
    Ok(key)
}

/// A key by its id, locked until the transaction ends.
pub(super) async fn locked_key(tx: &Tx, id: &str) -> Result<Option<ApiKey>, Failure> {
    Ok(keys::Entity::find_by_id(id).lock_exclusive().one(tx).await?.and_then(key_of))
}

/// Who did it, by a name that people know.
pub(super) async fn actor_of(tx: &Tx, doer: &Doer) -> Result<Actor, Failure> {
    let name = match &doer.hand {
        Hand::Member { user_id, .. } => {
            let user = users::Entity::find_by_id(user_id.as_str()).one(tx).await?;
            user.map_or_else(|| doer.name.clone(), |user| user.name.unwrap_or(user.email))
        }
        Hand::Token { .. } | Hand::Key | Hand::System => doer.name.clone(),
    };
    Ok(Actor { id: Some(doer.id.clone()), name: Some(name) })
}

/// The user who is shown what somebody makes. Who acts by a token may be whoever was shown that token.
async fn receiver(tx: &Tx, doer: &Doer) -> Result<Option<String>, Failure> {
    Ok(match &doer.hand {
        Hand::Member { user_id, .. } => Some(user_id.clone()),
        Hand::Token { .. } => {
            keys::Entity::find_by_id(doer.id.as_str()).one(tx).await?.and_then(|token| token.given_to)
        }
        Hand::Key | Hand::System => None,
    })
}

/// Somebody, with the role that they have in the team now, whose row is held: what their credential said may have
/// been true a moment ago. Keys are nobody's.
async fn judged(tx: &Tx, team_id: &str, doer: Doer) -> Result<Doer, Failure> {
    let Some(user_id) = doer.person() else { return Ok(doer) };
    let (role, _) = membership(tx, team_id, user_id).await?.ok_or(Failure::Fault(Fault::NoSuchTeam))?;
    Ok(doer.with_role(role)?)
}

/// Refuses a key beyond those that a team may have of its sort. The team's row is held.
async fn must_have_room(tx: &Tx, team_id: &str, new: &NewKey, now_ms: i64) -> Result<(), Failure> {
    if !COUNTED.contains(&new.kind) {
        return Ok(());
    }
    let of_its_sort = if new.temporary {
        temporary_past(now_ms)
    } else {
        let lasts = Condition::any().add(keys::Column::ExpiresAtMs.is_null()).add(keys::Column::ExpiresAtMs.gt(now_ms));
        Condition::all().add(keys::Column::Temporary.eq(false)).add(lasts)
    };
    let active = keys::Entity::find()
        .filter(keys::Column::TeamId.eq(team_id))
        .filter(keys::Column::Kind.is_in(COUNTED.map(KeyKind::word)))
        .filter(keys::Column::RevokedAtMs.is_null())
        .filter(keys::Column::SupersededBy.is_null())
        .filter(of_its_sort)
        .count(tx)
        .await?;
    match new.temporary {
        true if active >= MAX_TEMPORARY_KEYS => Err(Fault::TooManyTemporaryKeys.into()),
        false if active >= MAX_ACTIVE_KEYS => Err(Fault::TooManyKeys.into()),
        _ => Ok(()),
    }
}

/// Temporary keys whose end is later than that, by [`ApiKey::end_ms`].
pub(super) fn temporary_past(end_ms: i64) -> Condition {
    Condition::all()
        .add(keys::Column::Temporary.eq(true))
        .add(keys::Column::CreatedAtMs.gt(ApiKey::temporary_made_since_ms(end_ms)))
        .add(Condition::any().add(keys::Column::ExpiresAtMs.is_null()).add(keys::Column::ExpiresAtMs.gt(end_ms)))
}

/// Refuses a further token of a user who has so many that have not ended. The team's row is held.
pub(super) async fn must_have_room_for_a_token(
    tx: &Tx,
    team_id: &str,
    user_id: &str,
    most: u64,
    now_ms: i64,
) -> Result<(), Failure> {
    let count = keys::Entity::find().filter(tokens_of(team_id, user_id, now_ms)).count(tx).await?;
    if count < most { Ok(()) } else { Err(Fault::TooManyTokens.into()) }
}

/// The tokens of a user in a team that have not come to their end, superseded or not.
pub(super) fn tokens_of(team_id: &str, user_id: &str, now_ms: i64) -> Condition {
    Condition::all()
        .add(keys::Column::Kind.eq(KeyKind::User.word()))
        .add(keys::Column::TeamId.eq(team_id))
        .add(keys::Column::UserId.eq(user_id))
        .add(keys::Column::RevokedAtMs.is_null())
        .add(Condition::any().add(keys::Column::ExpiresAtMs.is_null()).add(keys::Column::ExpiresAtMs.gt(now_ms)))
}

/// Since when a user is a member of a team, and in which role.
pub(super) async fn membership(
    connection: &impl ConnectionTrait,
    team_id: &str,
    user_id: &str,
) -> Result<Option<(Role, i64)>, Failure> {
    let row = memberships::Entity::find_by_id((team_id.to_owned(), user_id.to_owned())).one(connection).await?;
    Ok(row.map(|row| (role_of(&row.role), row.created_at_ms)))
}

impl Store {
    /// Puts a new key in the place of `old`, whose row is locked. The old one works on until `old_expires_at_ms`. The
    /// new one takes over the terms of `like`: what was changed since the first rotation is not lost by a second. Who
    /// is shown the new token is known where a person asks, and not the key itself.
    pub(super) async fn succeed(
        &self,
        tx: &Tx,
        old: &ApiKey,
        like: &ApiKey,
        asker: Option<&Doer>,
        old_expires_at_ms: Option<i64>,
        now_ms: i64,
    ) -> Result<MadeKey, Failure> {
        let given_to = match asker {
            Some(doer) => receiver(tx, doer).await?,
            None => old.given_to.clone(),
        };
        let new = NewKey::generate(new_id("key", self.database.clock()), old.kind, old.mode, like.terms.clone());
        // A user's token is tied to the membership that it was made in, so it is never older than the one before.
        let made_at_ms = now_ms.max(like.created_at_ms);
        let hash = self.hash(&new.token);
        // A rotation changes the token, and not who made the key.
        let row = keys::Model {
            replaces: Some(old.id.clone()),
            lineage: Some(old.first_of_its_line().to_owned()),
            rotated_at_ms: Some(now_ms),
            self_rotated: asker.is_none(),
            given_to,
            ..key_row(&new, hash, old.team_id.as_deref(), old.creator.clone(), made_at_ms)
        };
        let mut put = keys::Entity::update_many()
            .col_expr(keys::Column::SupersededBy, Expr::value(new.id.clone()))
            .col_expr(keys::Column::RotatedAtMs, Expr::value(now_ms))
            .col_expr(keys::Column::ExpiresAtMs, Expr::value(old_expires_at_ms))
            // The holder is told no more: what is due is done.
            .col_expr(keys::Column::RotationDueAtMs, Expr::value(None::<i64>))
            .filter(keys::Column::Id.eq(old.id.as_str()))
            .filter(keys::Column::RevokedAtMs.is_null());
        put = match &old.superseded_by {
            None => put.filter(keys::Column::SupersededBy.is_null()),
            Some(successor) => put.filter(keys::Column::SupersededBy.eq(successor.as_str())),
        };
        if put.exec(tx).await?.rows_affected == 0 {
            return Err(Fault::KeyRotated.into());
        }
        let key = insert_key(tx, row).await?;
        announce(tx, &self.epochs, format!("key:{}", old.id));
        let mut data = key.event_data();
        data["replaces"] = old.id.clone().into();
        self.tell(tx, ROTATED, &key, &data);
        Ok(MadeKey { key, token: new.token })
    }

    /// Revokes a key whose row is locked and which is not revoked.
    pub(super) async fn end(&self, tx: &Tx, key: &ApiKey, revoker: &Actor, now_ms: i64) -> Result<(), Failure> {
        keys::Entity::update_many()
            .col_expr(keys::Column::RevokedAtMs, Expr::value(now_ms))
            .col_expr(keys::Column::RevokedBy, Expr::value(revoker.id.clone()))
            .col_expr(keys::Column::RevokedByName, Expr::value(revoker.name.clone()))
            .filter(keys::Column::Id.eq(key.id.as_str()))
            .filter(keys::Column::RevokedAtMs.is_null())
            .exec(tx)
            .await?;
        announce(tx, &self.epochs, format!("key:{}", key.id));
        self.tell(tx, REVOKED, key, &key.event_data());
        Ok(())
    }

    /// Tells the webhooks of the key's team. The system key has none.
    pub(super) fn tell(&self, tx: &Tx, topic: &str, key: &ApiKey, data: &serde_json::Value) {
        if let Some(team_id) = key.team_id.clone() {
            self.outbox.emit(tx, &["webhook"], topic, &Tenant { team_id, mode: key.mode }, "", data);
        }
    }
}

impl TenantStore {
    /// Makes a key as a person asks for it. A user's token needs that user's membership, which is looked up.
    pub(crate) async fn create_key(
        &self,
        kind: KeyKind,
        mode: Mode,
        terms: Terms,
        doer: Doer,
        act: Act,
    ) -> Result<MadeKey, Error> {
        let (store, team_id) = (self.store.clone(), self.tenant.team_id.clone());
        let made = self
            .store
            .database
            .write(move |tx| async move {
                lock_team(&tx, &team_id).await?;
                let doer = judged(&tx, &team_id, doer).await?;
                let mut now_ms = store.database.clock().now_ms();
                if let Some(user_id) = &terms.user_id {
                    let (role, since_ms) = membership(&tx, &team_id, user_id)
                        .await?
                        .ok_or_else(|| Failure::Invalid(Error::field("user_id", "must be a member of the team")))?;
                    doer.may_touch_token_of(user_id, role)?;
                    must_have_room_for_a_token(&tx, &team_id, user_id, MAX_USER_TOKENS, now_ms).await?;
                    now_ms = now_ms.max(since_ms);
                }
                let new = NewKey::generate(new_id("key", store.database.clock()), kind, mode, terms);
                store.add(&tx, &team_id, new, &doer, now_ms, &act).await
            })
            .await?;
        Ok(made)
    }

    /// Makes a key to try calls out with, for a person of that address.
    pub(crate) async fn create_temporary_key(&self, email: String, doer: Doer, act: Act) -> Result<MadeKey, Error> {
        let (store, team_id) = (self.store.clone(), self.tenant.team_id.clone());
        let made = self
            .store
            .database
            .write(move |tx| async move {
                lock_team(&tx, &team_id).await?;
                let doer = judged(&tx, &team_id, doer).await?;
                let now_ms = store.database.clock().now_ms();
                let new = NewKey::temporary(new_id("key", store.database.clock()), &email, now_ms);
                store.add(&tx, &team_id, new, &doer, now_ms, &act).await
            })
            .await?;
        Ok(made)
    }

    /// Makes a key as another key asks for it, within what that one may do.
    pub(crate) async fn create_platform_key(&self, wish: Wish, doer: Doer, act: Act) -> Result<MadeKey, Error> {
        let (store, team_id) = (self.store.clone(), self.tenant.team_id.clone());
        let made = self
            .store
            .database
            .write(move |tx| async move {
                lock_team(&tx, &team_id).await?;
                let now_ms = store.database.clock().now_ms();
                let maker = calling_key(&tx, &doer, now_ms).await?;
                let mode = wish.mode;
                let terms = wish.granted_by(&maker, now_ms).map_err(Failure::Invalid)?;
                let new = NewKey::generate(new_id("key", store.database.clock()), KeyKind::Platform, mode, terms);
                store.add(&tx, &team_id, new, &doer, now_ms, &act).await
            })
            .await?;
        Ok(made)
    }

    /// A key that is listed, or was revoked or expired not long ago.
    pub(crate) async fn key(&self, key_id: String) -> Result<ApiKey, Error> {
        let tenant = self.tenant.clone();
        let now_ms = self.store.database.clock().now_ms();
        let row = self
            .store
            .database
            .read(move |reader| async move {
                let query = keys_of(&tenant, now_ms).filter(keys::Column::Id.eq(key_id));
                Ok::<_, Failure>(query.one(&reader).await?)
            })
            .await?;
        row.and_then(key_of).ok_or_else(|| Fault::NoSuchKey.into())
    }

    /// The keys, newest first, read one row too long.
    pub(crate) async fn keys(&self, page: &Page) -> Result<Vec<ApiKey>, Error> {
        let tenant = self.tenant.clone();
        let (limit, before) = (page.size.saturating_add(1), page.before.clone());
        let now_ms = self.store.database.clock().now_ms();
        let rows = self
            .store
            .database
            .read(move |reader| async move {
                let mut query = keys_of(&tenant, now_ms);
                if let Some(before) = before {
                    query = query.filter(keys::Column::Id.lt(before));
                }
                Ok::<_, Failure>(query.order_by_desc(keys::Column::Id).limit(limit).all(&reader).await?)
            })
            .await?;
        Ok(rows.into_iter().filter_map(key_of).collect())
    }

    /// Changes a key.
    pub(crate) async fn update_key(
        &self,
        key_id: String,
        changes: Changes,
        doer: Doer,
        act: Act,
    ) -> Result<ApiKey, Error> {
        let (store, tenant) = (self.store.clone(), self.tenant.clone());
        let changed = self
            .store
            .database
            .write(move |tx| async move {
                // Keys are counted by their end, among other things.
                lock_team(&tx, &tenant.team_id).await?;
                let doer = judged(&tx, &tenant.team_id, doer).await?;
                let key = own_key(&tx, &tenant, &key_id, store.database.clock().now_ms()).await?;
                let now_ms = store.database.clock().now_ms();
                must_be_touchable(&tx, &tenant, &key, &doer).await?;
                key.must_be_current(now_ms)?;
                let changed = key.changed(changes, now_ms).map_err(Failure::Invalid)?;
                let terms = &changed.terms;
                let mut update = keys::Entity::update_many()
                    .col_expr(keys::Column::Name, Expr::value(terms.name.clone()))
                    .col_expr(keys::Column::Enabled, Expr::value(terms.enabled))
                    .col_expr(keys::Column::ReadOnly, Expr::value(terms.read_only))
                    .col_expr(keys::Column::Scopes, Expr::value(scopes_json(&terms.scopes)))
                    .col_expr(keys::Column::Allowlist, Expr::value(terms.allowlist.json()))
                    .col_expr(keys::Column::ExpiresAtMs, Expr::value(terms.expires_at_ms))
                    .col_expr(keys::Column::RequestsPerMinute, Expr::value(terms.requests_per_minute))
                    .col_expr(keys::Column::RotateEveryDays, Expr::value(terms.rotate_every_days))
                    .col_expr(keys::Column::RotationDueAtMs, Expr::value(changed.rotation_due_at_ms));
                if changed.rotation_due_at_ms != key.rotation_due_at_ms {
                    update = update.col_expr(keys::Column::RotationToldAtMs, Expr::value(None::<i64>));
                }
                if changed.terms.expires_at_ms != key.terms.expires_at_ms {
                    update = update.col_expr(keys::Column::ExpiryTold, Expr::value(0_i64));
                }
                update.filter(keys::Column::Id.eq(key_id.as_str())).exec(&tx).await?;
                announce(&tx, &store.epochs, format!("key:{key_id}"));
                tx.audit(act.on(vec![key_id]));
                Ok::<_, Failure>(changed)
            })
            .await?;
        Ok(changed)
    }

    /// Puts a new key in the place of one. A key that asks for it must be at least as wide.
    pub(crate) async fn rotate_key(
        &self,
        key_id: String,
        overlap: Overlap,
        doer: Doer,
        act: Act,
    ) -> Result<RotatedKey, Error> {
        let (store, tenant) = (self.store.clone(), self.tenant.clone());
        let rotated = self
            .store
            .database
            .write(move |tx| async move {
                lock_team(&tx, &tenant.team_id).await?;
                let doer = judged(&tx, &tenant.team_id, doer).await?;
                let old = own_key(&tx, &tenant, &key_id, store.database.clock().now_ms()).await?;
                let now_ms = store.database.clock().now_ms();
                if doer.is_key() {
                    if tenant.mode != Mode::Live {
                        return Err(Failure::from(Fault::NotLive));
                    }
                    if old.kind == KeyKind::User {
                        return Err(Failure::from(Fault::TokenOfUser));
                    }
                    old.must_not_exceed(&calling_key(&tx, &doer, now_ms).await?)?;
                }
                let still_member = must_be_touchable(&tx, &tenant, &old, &doer).await?;
                old.must_be_current(now_ms)?;
                old.must_be_rotatable()?;
                if !still_member {
                    return Err(Failure::from(Fault::KeyRevoked));
                }
                if let (KeyKind::User, Some(user_id)) = (old.kind, &old.terms.user_id) {
                    must_have_room_for_a_token(&tx, &tenant.team_id, user_id, MAX_ROTATED_TOKENS, now_ms).await?;
                }
                let old_expires_at_ms = Some(old.end_after(overlap, now_ms));
                let made = store.succeed(&tx, &old, &old, Some(&doer), old_expires_at_ms, now_ms).await?;
                let MadeKey { key, token } = made;
                tx.audit(act.on(vec![old.id, key.id.clone()]));
                let rotated = RotatedKey { key, token, old_expires_at_ms };
                act.answer(&tx, &rotated)?;
                Ok(rotated)
            })
            .await?;
        Ok(rotated)
    }

    /// Revokes a key, and says when that was. One that is revoked already stays as it is.
    pub(crate) async fn revoke_key(&self, key_id: String, doer: Doer, act: Act) -> Result<i64, Error> {
        let (store, tenant) = (self.store.clone(), self.tenant.clone());
        let revoked_at_ms = self
            .store
            .database
            .write(move |tx| async move {
                lock_team(&tx, &tenant.team_id).await?;
                let doer = judged(&tx, &tenant.team_id, doer).await?;
                let key = own_key(&tx, &tenant, &key_id, store.database.clock().now_ms()).await?;
                let now_ms = store.database.clock().now_ms();
                must_be_touchable(&tx, &tenant, &key, &doer).await?;
                if let Some(at_ms) = key.revoked_at_ms {
                    return Ok::<_, Failure>(at_ms);
                }
                let revoker = actor_of(&tx, &doer).await?;
                store.end(&tx, &key, &revoker, now_ms).await?;
                tx.audit(act.on(vec![key_id]));
                Ok(now_ms)
            })
            .await?;
        Ok(revoked_at_ms)
    }
}

impl Store {
    /// Stores a new key of a team whose row is locked, if there is room for it.
    async fn add(
        &self,
        tx: &Tx,
        team_id: &str,
        new: NewKey,
        doer: &Doer,
        now_ms: i64,
        act: &Act,
    ) -> Result<MadeKey, Failure> {
        must_have_room(tx, team_id, &new, now_ms).await?;
        let creator = actor_of(tx, doer).await?;
        let given_to = receiver(tx, doer).await?;
        let row = keys::Model { given_to, ..key_row(&new, self.hash(&new.token), Some(team_id), creator, now_ms) };
        let key = insert_key(tx, row).await?;
        self.tell(tx, CREATED, &key, &key.event_data());
        tx.audit(act.on(vec![key.id.clone()]));
        let made = MadeKey { key, token: new.token };
        act.answer(tx, &made)?;
        Ok(made)
    }
}

/// Keeps others from making keys of a team until the transaction ends. A deleted team is not there.
pub(super) async fn lock_team(tx: &Tx, team_id: &str) -> Result<(), Failure> {
    let locked = teams::Entity::update_many()
        .col_expr(teams::Column::Tier, Expr::col(teams::Column::Tier))
        .filter(teams::Column::Id.eq(team_id))
        .filter(teams::Column::DeletedAtMs.is_null())
        .exec(tx)
        .await?;
    if locked.rows_affected == 0 { Err(Fault::NoSuchTeam.into()) } else { Ok(()) }
}

/// The key that calls, as it is now: what the gateway knows of it may be a second old.
async fn calling_key(tx: &Tx, doer: &Doer, now_ms: i64) -> Result<ApiKey, Failure> {
    let row = keys::Entity::find_by_id(doer.id.as_str()).one(tx).await?;
    row.and_then(key_of).filter(|key| key.is_good(now_ms)).ok_or(Failure::Fault(Fault::BadCredential))
}

/// A key that the tenant may see, locked until the transaction ends.
async fn own_key(tx: &Tx, tenant: &Tenant, key_id: &str, now_ms: i64) -> Result<ApiKey, Failure> {
    let row = keys_of(tenant, now_ms).filter(keys::Column::Id.eq(key_id)).lock_exclusive().one(tx).await?;
    row.and_then(key_of).ok_or(Failure::Fault(Fault::NoSuchKey))
}

/// Refuses a user's token to those who may not touch it. Says whether the key is still anybody's: a token outlives
/// its user's membership only as a row.
async fn must_be_touchable(tx: &Tx, tenant: &Tenant, key: &ApiKey, doer: &Doer) -> Result<bool, Failure> {
    if key.kind != KeyKind::User {
        return Ok(true);
    }
    let user_id = key.terms.user_id.as_deref().unwrap_or_default();
    let member = membership(tx, &tenant.team_id, user_id).await?;
    doer.may_touch_token_of(user_id, member.map_or(Role::Unspecified, |(role, _)| role))?;
    Ok(member.is_some_and(|(_, since_ms)| since_ms <= key.created_at_ms))
}

/// The keys that a tenant sees: in test mode those of test mode, in live mode, where keys of both are made, all.
fn keys_of(tenant: &Tenant, now_ms: i64) -> Select<keys::Entity> {
    let since_ms = ApiKey::listed_since_ms(now_ms);
    let not_long_gone = |column: keys::Column| Condition::any().add(column.is_null()).add(column.gt(since_ms));
    let query = keys::Entity::find()
        .filter(keys::Column::TeamId.eq(tenant.team_id.as_str()))
        .filter(not_long_gone(keys::Column::RevokedAtMs))
        .filter(not_long_gone(keys::Column::ExpiresAtMs))
        .filter(
            Condition::any()
                .add(keys::Column::Temporary.eq(false))
                .add(temporary_past(ApiKey::temporary_listed_since_ms(now_ms))),
        );
    match tenant.mode {
        Mode::Live => query,
        Mode::Test | Mode::Unspecified => query.filter(keys::Column::Mode.eq(tenant.mode_word())),
    }
}
