//! Accounts, their teams, and what a session finds of both.

use std::sync::Arc;

use paperkey_kit::config::limits::FIRST_TIER;
use paperkey_proto::{Error, principal::v1::Role};
use sea_orm::{
    ActiveModelTrait as _, ActiveValue::Set, ColumnTrait as _, EntityTrait as _, QueryFilter as _, QueryOrder as _,
    entity::prelude::Expr, sea_query::OnConflict,
};

use super::{
    Act, Failure, FoundTeam, Store, announce,
    credentials::living,
    entities::{keys, memberships, teams, users},
    keys::key_row,
    teams::insert_team,
};
use crate::domain::{
    Fault,
    account::{Account, Email},
    api_key::Actor,
    key::NewKey,
    team::{MemberTeam, role_of},
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

pub(super) fn member_team((membership, team): (memberships::Model, Option<teams::Model>)) -> Option<MemberTeam> {
    let team = team?;
    Some(MemberTeam {
        id: team.id,
        name: team.name,
        role: role_of(&membership.role),
        tier: team.tier,
        requests_per_minute: team.requests_per_minute,
    })
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
                insert_team(&tx, &new.team_id, &new.team_name, &new.user_id, now_ms).await?;
                let mut touched = vec![new.user_id.clone(), new.team_id.clone()];
                let creator = new.name.clone().unwrap_or_else(|| new.email.shown.clone());
                let creator = Actor { id: Some(new.user_id.clone()), name: Some(creator) };
                for (key, hash) in new.keys.iter().zip(hashes) {
                    let row = key_row(key, hash, Some(&new.team_id), creator.clone(), now_ms);
                    keys::Entity::insert(keys::ActiveModel::from(row).reset_all()).exec_without_returning(&tx).await?;
                    touched.push(key.id.clone());
                }
                tx.audit(act.or_by_account(&new.user_id, &new.email.shown).on_team(&new.team_id).on(touched));
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
                        tier: FIRST_TIER.to_owned(),
                        requests_per_minute: None,
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
                    .filter(teams::Column::DeletedAtMs.is_null())
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
                    .filter(teams::Column::DeletedAtMs.is_null())
                    .order_by_asc(teams::Column::CreatedAtMs)
                    .order_by_asc(teams::Column::Id)
                    .one(&reader)
                    .await?;
                Ok(Some(Standing { account: user.into(), team: team.and_then(member_team) }))
            })
            .await?;
        Ok(found)
    }

    /// Puts a team on a tier, which is one of the configured ones.
    pub(crate) async fn set_tier(&self, team_id: String, tier: String, act: Act) -> Result<(), Error> {
        let epochs = Arc::clone(&self.epochs);
        self.database
            .write(move |tx| async move {
                let changed = teams::Entity::update_many()
                    .col_expr(teams::Column::Tier, Expr::value(tier))
                    .filter(teams::Column::Id.eq(team_id.as_str()))
                    .filter(teams::Column::DeletedAtMs.is_null())
                    .exec(&tx)
                    .await?;
                if changed.rows_affected == 0 {
                    return Err(Failure::from(Fault::NoSuchTeam));
                }
                announce(&tx, &epochs, format!("team:{team_id}"));
                tx.audit(act.on_team(&team_id).on(vec![team_id]));
                Ok(())
            })
            .await?;
        Ok(())
    }

    /// A team that somebody who is in none acts for. One that was deleted is not there, nor is a sandbox that has ended.
    pub(crate) async fn team_at_work(&self, team_id: &str) -> Result<Option<FoundTeam>, Error> {
        let team_id = team_id.to_owned();
        let team = self
            .database
            .read(move |reader| async move {
                let query = teams::Entity::find_by_id(team_id).filter(teams::Column::DeletedAtMs.is_null());
                Ok::<_, Failure>(query.one(&reader).await?)
            })
            .await?;
        Ok(team.and_then(|team| living(team, self.database.clock().now_ms())))
    }
}
