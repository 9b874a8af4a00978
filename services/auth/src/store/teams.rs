//! Teams: made, changed, deleted, and removed when nothing that was under way can still need them.
//!
//! A team's row is the lock under which it is decided who is in it.

use std::sync::Arc;

use paperkey_kit::{config::limits::FIRST_TIER, db::Tx, events::TEAM_DELETED, principal::Tenant};
use paperkey_proto::{
    Error,
    principal::v1::{Mode, Role},
};
use sea_orm::{
    ActiveValue::Set, ColumnTrait as _, Condition, ConnectionTrait, EntityTrait as _, PaginatorTrait as _,
    QueryFilter as _, QueryOrder as _, QuerySelect as _, Statement, entity::prelude::Expr,
};
use serde_json::json;

use super::{
    Act, Failure, Store,
    accounts::member_team,
    announce,
    entities::{alerts, invitations, key_networks, keys, memberships, product_keys, product_registry, teams, users},
    quotas::remove_quotas_of,
};
use crate::{
    KEEPERS,
    domain::{
        Fault,
        team::{
            LeakAction, MAX_TEAMS, MemberTeam, REMOVED_AFTER_MS, TeamChanges, TeamDetails, may_manage_people, role_of,
            role_word,
        },
    },
};

/// How many rows of a deleted team one transaction removes.
const AT_A_TIME: u64 = 500;

/// What a team may have many of, and by what each is named.
const MANY: [(&str, &str); 6] = [
    ("invitations", "id"),
    ("keys", "id"),
    ("product_keys", "id"),
    ("product_registry", "product_id"),
    ("alerts", "id"),
    ("key_networks", "key_id"),
];

impl Store {
    /// Makes a team, of which the account becomes Owner.
    pub(crate) async fn create_team(
        &self,
        team_id: String,
        name: String,
        user_id: String,
        act: Act,
    ) -> Result<TeamDetails, Error> {
        let now_ms = self.database.clock().now_ms();
        let epochs = Arc::clone(&self.epochs);
        let made = self
            .database
            .write(move |tx| async move {
                must_have_room_for_a_team(&tx, &user_id).await?;
                insert_team(&tx, &team_id, &name, &user_id, now_ms).await?;
                // Who had no team was somebody without one until now.
                announce(&tx, &epochs, format!("user:{user_id}"));
                tx.audit(act.on_team(&team_id).on(vec![team_id.clone()]));
                let made = TeamDetails {
                    team: MemberTeam {
                        id: team_id,
                        name,
                        role: Role::Owner,
                        tier: FIRST_TIER.to_owned(),
                        requests_per_minute: None,
                    },
                    leak_action: LeakAction::Revoke,
                    created_at_ms: now_ms,
                };
                act.answer(&tx, &made)?;
                Ok::<_, Failure>(made)
            })
            .await?;
        Ok(made)
    }

    /// A team, as that account sees it.
    pub(crate) async fn team(&self, team_id: String, user_id: String) -> Result<TeamDetails, Error> {
        let found = self.database.read(move |reader| async move { details(&reader, &team_id, &user_id).await }).await?;
        Ok(found)
    }

    /// Changes a team.
    pub(crate) async fn update_team(
        &self,
        team_id: String,
        user_id: String,
        changes: TeamChanges,
        act: Act,
    ) -> Result<TeamDetails, Error> {
        let changed = self
            .database
            .write(move |tx| async move {
                may_manage_people(lock_team(&tx, &team_id, &user_id).await?)?;
                let mut update = teams::Entity::update_many().filter(teams::Column::Id.eq(team_id.as_str()));
                let is_change = changes != TeamChanges::default();
                if let Some(name) = changes.name {
                    update = update.col_expr(teams::Column::Name, Expr::value(name));
                }
                if let Some(action) = changes.leak_action {
                    update = update.col_expr(teams::Column::LeakAction, Expr::value(action.word()));
                }
                if is_change {
                    update.exec(&tx).await?;
                    tx.audit(act.on(vec![team_id.clone()]));
                }
                details(&tx, &team_id, &user_id).await
            })
            .await?;
        Ok(changed)
    }

    /// Deletes a team: at once for everyone who asks, and soon for good.
    pub(crate) async fn delete_team(&self, team_id: String, user_id: String, act: Act) -> Result<(), Error> {
        let this = self.clone();
        self.database
            .write(move |tx| async move {
                if lock_team(&tx, &team_id, &user_id).await? != Role::Owner {
                    return Err(Failure::from(Fault::RoleInsufficient));
                }
                this.mark_deleted(&tx, &team_id, &act).await
            })
            .await?;
        Ok(())
    }

    async fn mark_deleted(&self, tx: &Tx, team_id: &str, act: &Act) -> Result<(), Failure> {
        let marked = teams::Entity::update_many()
            .col_expr(teams::Column::DeletedAtMs, Expr::value(self.database.clock().now_ms()))
            .filter(living(team_id))
            .exec(tx)
            .await?;
        if marked.rows_affected == 0 {
            return Err(Failure::from(Fault::NoSuchTeam));
        }
        announce(tx, &self.epochs, format!("team:{team_id}"));
        self.tell_of_deletion(tx, team_id);
        tx.audit(act.on_team(team_id).on(vec![team_id.to_owned()]));
        Ok(())
    }

    fn tell_of_deletion(&self, tx: &Tx, team_id: &str) {
        let tenant = Tenant { team_id: team_id.to_owned(), mode: Mode::Live };
        self.outbox.emit(tx, &KEEPERS, TEAM_DELETED, &tenant, "", &json!({ "id": team_id }));
    }

    /// Sandbox teams whose time is over and that are not yet deleted.
    pub(crate) async fn expired_sandboxes(&self, limit: u64) -> Result<Vec<String>, Error> {
        let over = Condition::all()
            .add(teams::Column::Sandbox.eq(true))
            .add(teams::Column::ExpiresAtMs.lte(self.database.clock().now_ms()))
            .add(teams::Column::DeletedAtMs.is_null());
        self.teams_where(over, teams::Column::ExpiresAtMs, limit).await
    }

    /// Deleted teams whose rows may go.
    pub(crate) async fn removable_teams(&self, limit: u64) -> Result<Vec<String>, Error> {
        self.teams_where(Condition::all().add(self.may_be_removed()), teams::Column::DeletedAtMs, limit).await
    }

    /// In the order of the time that the condition is about: by that they are found.
    async fn teams_where(&self, condition: Condition, by: teams::Column, limit: u64) -> Result<Vec<String>, Error> {
        let query = teams::Entity::find().filter(condition).order_by_asc(by).limit(limit);
        let rows = self.database.read(move |reader| async move { Ok::<_, Failure>(query.all(&reader).await?) }).await?;
        Ok(rows.into_iter().map(|team| team.id).collect())
    }

    fn may_be_removed(&self) -> sea_orm::sea_query::SimpleExpr {
        teams::Column::DeletedAtMs.lte(self.database.clock().now_ms().saturating_sub(REMOVED_AFTER_MS))
    }

    /// Deletes a team whose time is over, if nobody has yet.
    pub(crate) async fn expire_sandbox(&self, team_id: String, act: Act) -> Result<(), Error> {
        let this = self.clone();
        self.database
            .write(move |tx| async move {
                match this.mark_deleted(&tx, &team_id, &act).await {
                    Err(Failure::Fault(Fault::NoSuchTeam)) => Ok(()),
                    outcome => outcome,
                }
            })
            .await?;
        Ok(())
    }

    /// Tells once more that a team is deleted, and removes all that is kept of it here: what there may be much of in
    /// steps, the team itself last, so that whatever comes between is made good by the next look. Of several processes
    /// one does.
    pub(crate) async fn remove_team(&self, team_id: String) -> Result<bool, Error> {
        for (table, id) in MANY {
            while self.remove_some(&team_id, table, id).await? {}
        }
        let this = self.clone();
        let ready = self.may_be_removed();
        let removed = self
            .database
            .write(move |tx| async move {
                let gone = teams::Entity::delete_many()
                    .filter(teams::Column::Id.eq(team_id.as_str()))
                    .filter(ready)
                    .exec(&tx)
                    .await?;
                if gone.rows_affected == 0 {
                    return Ok::<_, Failure>(false);
                }
                let team = team_id.as_str();
                memberships::Entity::delete_many().filter(memberships::Column::TeamId.eq(team)).exec(&tx).await?;
                invitations::Entity::delete_many().filter(invitations::Column::TeamId.eq(team)).exec(&tx).await?;
                keys::Entity::delete_many().filter(keys::Column::TeamId.eq(team)).exec(&tx).await?;
                product_keys::Entity::delete_many().filter(product_keys::Column::TeamId.eq(team)).exec(&tx).await?;
                product_registry::Entity::delete_many()
                    .filter(product_registry::Column::TeamId.eq(team))
                    .exec(&tx)
                    .await?;
                remove_quotas_of(&tx, team).await?;
                alerts::Entity::delete_many().filter(alerts::Column::TeamId.eq(team)).exec(&tx).await?;
                key_networks::Entity::delete_many().filter(key_networks::Column::TeamId.eq(team)).exec(&tx).await?;
                announce(&tx, &this.epochs, format!("team:{team}"));
                this.tell_of_deletion(&tx, team);
                Ok(true)
            })
            .await?;
        Ok(removed)
    }
}

impl Store {
    /// Removes some rows of a team that may be removed. Says whether there may be more.
    async fn remove_some(&self, team_id: &str, table: &'static str, id: &'static str) -> Result<bool, Error> {
        let team_id = team_id.to_owned();
        let ready = self.may_be_removed();
        let more = self
            .database
            .write(move |tx| async move {
                // Its row is held, so that no two processes remove the same and wait for each other.
                let team = teams::Entity::find_by_id(team_id.as_str()).filter(ready).lock_exclusive().one(&tx).await?;
                if team.is_none() {
                    return Ok::<_, Failure>(false);
                }
                let sql = format!(
                    "DELETE FROM {table} WHERE {id} IN (SELECT {id} FROM {table} WHERE team_id = $1 LIMIT {AT_A_TIME})"
                );
                let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql, [team_id.into()]);
                Ok(tx.execute_raw(statement).await?.rows_affected() >= AT_A_TIME)
            })
            .await?;
        Ok(more)
    }
}

/// A team that is there.
pub(super) fn living(team_id: &str) -> Condition {
    Condition::all().add(teams::Column::Id.eq(team_id)).add(teams::Column::DeletedAtMs.is_null())
}

/// Stores a team with its first Owner.
pub(super) async fn insert_team(
    tx: &Tx,
    team_id: &str,
    name: &str,
    owner_id: &str,
    now_ms: i64,
) -> Result<(), Failure> {
    let team = teams::ActiveModel {
        id: Set(team_id.to_owned()),
        name: Set(name.to_owned()),
        tier: Set(FIRST_TIER.to_owned()),
        sandbox: Set(false),
        created_at_ms: Set(now_ms),
        leak_action: Set(LeakAction::Revoke.word().to_owned()),
        expires_at_ms: Set(None),
        deleted_at_ms: Set(None),
        requests_per_minute: Set(None),
        invited_since_ms: Set(None),
        invited_count: Set(0),
    };
    teams::Entity::insert(team).exec_without_returning(tx).await?;
    let membership = memberships::ActiveModel {
        team_id: Set(team_id.to_owned()),
        user_id: Set(owner_id.to_owned()),
        role: Set(role_word(Role::Owner).to_owned()),
        created_at_ms: Set(now_ms),
    };
    memberships::Entity::insert(membership).exec_without_returning(tx).await?;
    Ok(())
}

async fn details(connection: &impl ConnectionTrait, team_id: &str, user_id: &str) -> Result<TeamDetails, Failure> {
    let found = memberships::Entity::find_by_id((team_id.to_owned(), user_id.to_owned()))
        .find_also_related(teams::Entity)
        .filter(teams::Column::DeletedAtMs.is_null())
        .one(connection)
        .await?;
    let (membership, team) = found.ok_or(Failure::Fault(Fault::NoSuchTeam))?;
    let kept = team.as_ref().map(|team| (LeakAction::of(&team.leak_action), team.created_at_ms));
    match (member_team((membership, team)), kept) {
        (Some(team), Some((leak_action, created_at_ms))) => Ok(TeamDetails { team, leak_action, created_at_ms }),
        _ => Err(Failure::Fault(Fault::NoSuchTeam)),
    }
}

/// Takes a team's row until the transaction ends, and answers the role that the account has in it now: what its
/// credential said may have been true a moment ago. A team that is deleted, or not theirs, is not there.
pub(super) async fn lock_team(tx: &Tx, team_id: &str, user_id: &str) -> Result<Role, Failure> {
    take_team(tx, team_id).await?.ok_or(Failure::Fault(Fault::NoSuchTeam))?;
    let membership = memberships::Entity::find_by_id((team_id.to_owned(), user_id.to_owned())).one(tx).await?;
    membership.map(|membership| role_of(&membership.role)).ok_or(Failure::Fault(Fault::NoSuchTeam))
}

/// Takes a team's row until the transaction ends, if the team lives.
pub(super) async fn take_team(tx: &Tx, team_id: &str) -> Result<Option<teams::Model>, Failure> {
    Ok(teams::Entity::find().filter(living(team_id)).lock_exclusive().one(tx).await?)
}

/// Refuses an account that is in as many teams as it may be; keeps others from adding it to one until the transaction
/// ends. Whoever takes a team as well takes it first.
pub(super) async fn must_have_room_for_a_team(tx: &Tx, user_id: &str) -> Result<users::Model, Failure> {
    let user = users::Entity::find_by_id(user_id).lock_exclusive().one(tx).await?;
    let user = user.ok_or(Failure::Fault(Fault::NoSuchAccount))?;
    let in_teams = memberships::Entity::find()
        .filter(memberships::Column::UserId.eq(user_id))
        .inner_join(teams::Entity)
        .filter(teams::Column::DeletedAtMs.is_null())
        .count(tx)
        .await?;
    if in_teams >= MAX_TEAMS { Err(Failure::Fault(Fault::TooManyTeams)) } else { Ok(user) }
}
