//! Accounts, their teams, and what a session finds of both.

use std::sync::Arc;

use paperkey_kit::{db::Tx, principal::mode_word};
use paperkey_proto::{Error, principal::v1::Role};
use sea_orm::{
    ActiveValue::Set,
    ColumnTrait as _, EntityTrait as _, QueryFilter as _, QueryOrder as _,
    entity::prelude::Expr,
    sea_query::{ExprTrait as _, OnConflict},
};

use super::{
    Act, Failure, Store, announce,
    entities::{keys, memberships, teams, users},
};
use crate::domain::{
    Fault,
    account::{Account, Email},
    key::{NewKey, scopes_json},
    team::{MemberTeam, Tier, role_of, role_word},
};

/// An account that is about to be made, with its first team and keys.
#[derive(Debug)]
pub(crate) struct NewAccount {
    pub(crate) user_id: String,
    pub(crate) email: Email,
    pub(crate) name: Option<String>,
    pub(crate) password_hash: PasswordHash,
    pub(crate) team_id: String,
    pub(crate) team_name: String,
    pub(crate) keys: Vec<NewKey>,
}

/// The hash of a password, which is printed no more than the password.
pub(crate) struct PasswordHash(pub(crate) String);

impl std::fmt::Debug for PasswordHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[redacted]")
    }
}

/// An account that was made, and its first team.
#[derive(Debug)]
pub(crate) struct Registered {
    pub(crate) account: Account,
    pub(crate) team: MemberTeam,
}

/// An account, and the team in which a session acts.
#[derive(Debug)]
pub(crate) struct Standing {
    pub(crate) account: Account,
    pub(crate) team: Option<MemberTeam>,
}

impl From<users::Model> for Account {
    fn from(row: users::Model) -> Self {
        Self {
            id: row.id,
            email: row.email,
            name: row.name,
            session_epoch: row.session_epoch,
            created_at_ms: row.created_at_ms,
        }
    }
}

fn member_team((membership, team): (memberships::Model, Option<teams::Model>)) -> Option<MemberTeam> {
    let team = team?;
    Some(MemberTeam { id: team.id, name: team.name, role: role_of(&membership.role), tier: team.tier })
}

impl Store {
    /// Makes an account, its team and its first keys, all or nothing.
    pub(crate) async fn register(&self, new: NewAccount, act: Act) -> Result<Registered, Error> {
        let hashes: Vec<Vec<u8>> = new.keys.iter().map(|key| self.hash(&key.token)).collect();
        let now_ms = self.database.clock().now_ms();
        let registered = self
            .database
            .write(move |tx| async move {
                let user = users::ActiveModel {
                    id: Set(new.user_id.clone()),
                    email_lower: Set(new.email.lower),
                    email: Set(new.email.shown.clone()),
                    name: Set(new.name.clone()),
                    password_hash: Set(new.password_hash.0),
                    session_epoch: Set(0),
                    created_at_ms: Set(now_ms),
                };
                let inserted = users::Entity::insert(user)
                    .on_conflict(OnConflict::column(users::Column::EmailLower).do_nothing().to_owned())
                    .exec_without_returning(&tx)
                    .await?;
                if inserted == 0 {
                    return Err(Failure::from(Fault::EmailTaken));
                }
                let team = teams::ActiveModel {
                    id: Set(new.team_id.clone()),
                    name: Set(new.team_name.clone()),
                    tier: Set(Tier::Free.word().to_owned()),
                    sandbox: Set(false),
                    created_at_ms: Set(now_ms),
                };
                teams::Entity::insert(team).exec_without_returning(&tx).await?;
                let membership = memberships::ActiveModel {
                    team_id: Set(new.team_id.clone()),
                    user_id: Set(new.user_id.clone()),
                    role: Set(role_word(Role::Owner).to_owned()),
                    created_at_ms: Set(now_ms),
                };
                memberships::Entity::insert(membership).exec_without_returning(&tx).await?;
                let mut touched = vec![new.user_id.clone(), new.team_id.clone()];
                for (key, hash) in new.keys.iter().zip(hashes) {
                    let row = key_row(key, hash, Some(&new.team_id), Some(&new.user_id), now_ms);
                    keys::Entity::insert(row).exec_without_returning(&tx).await?;
                    touched.push(key.id.clone());
                }
                tx.audit(act.or_by_account(&new.user_id).on(touched));
                Ok(Registered {
                    account: Account {
                        id: new.user_id,
                        email: new.email.shown,
                        name: new.name,
                        session_epoch: 0,
                        created_at_ms: now_ms,
                    },
                    team: MemberTeam {
                        id: new.team_id,
                        name: new.team_name,
                        role: Role::Owner,
                        tier: Tier::Free.word().to_owned(),
                    },
                })
            })
            .await?;
        Ok(registered)
    }

    /// The account of an address, and the hash of its password.
    pub(crate) async fn account_by_email(&self, email_lower: &str) -> Result<Option<(Account, PasswordHash)>, Error> {
        let email_lower = email_lower.to_owned();
        let found = self
            .database
            .read(move |reader| async move {
                let query = users::Entity::find().filter(users::Column::EmailLower.eq(email_lower));
                Ok::<_, Failure>(query.one(&reader).await?)
            })
            .await?;
        Ok(found.map(|mut row| {
            let hash = PasswordHash(std::mem::take(&mut row.password_hash));
            (row.into(), hash)
        }))
    }

    /// An account and its teams, oldest first.
    pub(crate) async fn account_and_teams(&self, user_id: &str) -> Result<Option<(Account, Vec<MemberTeam>)>, Error> {
        let user_id = user_id.to_owned();
        let found = self
            .database
            .snapshot(move |reader| async move {
                let Some(user) = users::Entity::find_by_id(user_id).one(&reader).await? else {
                    return Ok::<_, Failure>(None);
                };
                let teams = memberships::Entity::find()
                    .filter(memberships::Column::UserId.eq(user.id.as_str()))
                    .find_also_related(teams::Entity)
                    .order_by_asc(teams::Column::CreatedAtMs)
                    .order_by_asc(teams::Column::Id)
                    .all(&reader)
                    .await?;
                Ok(Some((user.into(), teams.into_iter().filter_map(member_team).collect())))
            })
            .await?;
        Ok(found)
    }

    /// An account, and the team in which it acts: the one that is asked for if the account is a member of it, else
    /// none; where none is asked for, the oldest.
    pub(crate) async fn standing(&self, user_id: &str, team_id: Option<&str>) -> Result<Option<Standing>, Error> {
        let (user_id, team_id) = (user_id.to_owned(), team_id.map(str::to_owned));
        let found = self
            .database
            .read(move |reader| async move {
                let Some(user) = users::Entity::find_by_id(user_id).one(&reader).await? else {
                    return Ok::<_, Failure>(None);
                };
                let mut query = memberships::Entity::find().filter(memberships::Column::UserId.eq(user.id.as_str()));
                if let Some(team_id) = team_id {
                    query = query.filter(memberships::Column::TeamId.eq(team_id));
                }
                let team = query
                    .find_also_related(teams::Entity)
                    .order_by_asc(teams::Column::CreatedAtMs)
                    .order_by_asc(teams::Column::Id)
                    .one(&reader)
                    .await?;
                Ok(Some(Standing { account: user.into(), team: team.and_then(member_team) }))
            })
            .await?;
        Ok(found)
    }

    /// Sets a new password and ends every session.
    pub(crate) async fn reset_password(&self, email: Email, hash: PasswordHash, act: Act) -> Result<(), Error> {
        let epochs = Arc::clone(&self.epochs);
        self.database
            .write(move |tx| async move {
                let changed = users::Entity::update_many()
                    .col_expr(users::Column::PasswordHash, Expr::value(hash.0))
                    .col_expr(users::Column::SessionEpoch, Expr::col(users::Column::SessionEpoch).add(1_i64))
                    .filter(users::Column::EmailLower.eq(email.lower))
                    .exec_with_returning(&tx)
                    .await?;
                let Some(user) = changed.into_iter().next() else {
                    return Err(Failure::from(Fault::NoSuchAccount));
                };
                announce(&tx, &epochs, format!("user:{}", user.id));
                tx.audit(act.on(vec![user.id]));
                Ok(())
            })
            .await?;
        Ok(())
    }

    /// Puts a team on a tier.
    pub(crate) async fn set_tier(&self, team_id: String, tier: Tier, act: Act) -> Result<(), Error> {
        let epochs = Arc::clone(&self.epochs);
        self.database
            .write(move |tx| async move {
                let changed = teams::Entity::update_many()
                    .col_expr(teams::Column::Tier, Expr::value(tier.word()))
                    .filter(teams::Column::Id.eq(team_id.as_str()))
                    .exec(&tx)
                    .await?;
                if changed.rows_affected == 0 {
                    return Err(Failure::from(Fault::NoSuchTeam));
                }
                announce(&tx, &epochs, format!("team:{team_id}"));
                tx.audit(act.on(vec![team_id]));
                Ok(())
            })
            .await?;
        Ok(())
    }

    /// The tier of a team, if there is one.
    pub(crate) async fn tier_of(&self, team_id: &str) -> Result<Option<String>, Error> {
        let team_id = team_id.to_owned();
        let team = self
            .database
            .read(move |reader| async move { Ok::<_, Failure>(teams::Entity::find_by_id(team_id).one(&reader).await?) })
            .await?;
        Ok(team.map(|team| team.tier))
    }

    /// Stores the system key, unless there is one. With `rotate`, the one there is ends. Says whether it was stored.
    pub(crate) async fn put_system_key(&self, key: NewKey, rotate: bool, act: Act) -> Result<bool, Error> {
        let epochs = Arc::clone(&self.epochs);
        let hash = self.hash(&key.token);
        let now_ms = self.database.clock().now_ms();
        let stored = self
            .database
            .write(move |tx| async move {
                let mut touched = vec![key.id.clone()];
                if rotate {
                    for ended in end_system_key(&tx, now_ms).await? {
                        announce(&tx, &epochs, format!("key:{}", ended.id));
                        touched.push(ended.id);
                    }
                }
                // The schema allows one that is not revoked; who comes second finds it there.
                let stored = keys::Entity::insert(key_row(&key, hash, None, None, now_ms))
                    .on_conflict(OnConflict::new().do_nothing().to_owned())
                    .exec_without_returning(&tx)
                    .await?
                    > 0;
                match (stored, rotate) {
                    (true, _) => tx.audit(act.on(touched)),
                    (false, true) => return Err(Failure::from(Fault::RotatedMeanwhile)),
                    (false, false) => {}
                }
                Ok(stored)
            })
            .await?;
        Ok(stored)
    }
}

async fn end_system_key(tx: &Tx, now_ms: i64) -> Result<Vec<keys::Model>, Failure> {
    Ok(keys::Entity::update_many()
        .col_expr(keys::Column::RevokedAtMs, Expr::value(now_ms))
        .filter(keys::Column::Kind.eq(crate::domain::key::KeyKind::System.word()))
        .filter(keys::Column::RevokedAtMs.is_null())
        .exec_with_returning(tx)
        .await?)
}

fn key_row(
    key: &NewKey,
    token_hash: Vec<u8>,
    team_id: Option<&str>,
    created_by: Option<&str>,
    now_ms: i64,
) -> keys::ActiveModel {
    keys::ActiveModel {
        id: Set(key.id.clone()),
        kind: Set(key.kind.word().to_owned()),
        team_id: Set(team_id.map(str::to_owned)),
        mode: Set(mode_word(key.mode).to_owned()),
        // A team's key outlives the membership of whoever made it: it belongs to nobody.
        user_id: Set(None),
        created_by: Set(created_by.map(str::to_owned)),
        name: Set(key.name.to_owned()),
        token_hash: Set(token_hash),
        shown_prefix: Set(key.shown_prefix.clone()),
        scopes: Set(scopes_json(&key.kind.all_scopes())),
        read_only: Set(false),
        allowlist: Set(None),
        enabled: Set(true),
        expires_at_ms: Set(key.expires_at_ms),
        created_at_ms: Set(now_ms),
        revoked_at_ms: Set(None),
        revoked_by: Set(None),
    }
}
