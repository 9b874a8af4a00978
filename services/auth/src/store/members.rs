//! Who is in a team, and who is invited. Whatever is decided here is decided while the team's row is held.

use paperkey_kit::{db::Tx, ids::new_id, secrets::Secret};
use paperkey_proto::{Error, principal::v1::Role};
use sea_orm::{
    ActiveValue::Set, ColumnTrait as _, Condition, ConnectionTrait, EntityTrait as _, PaginatorTrait as _,
    QueryFilter as _, QueryOrder as _, QuerySelect as _, entity::prelude::Expr, sea_query::OnConflict,
};

use super::{
    Act, Failure, Store, announce,
    entities::{invitations, keys, memberships, teams, users},
    keys::{REVOKED, key_of, tokens_of},
    teams::{lock_team, must_have_room_for_a_team, take_team},
};
use crate::domain::{
    Fault,
    account::Email,
    letter::{Letter, Link},
    member::{
        INVITATION_LIFETIME_MS, INVITATION_PREFIX, LETTERS_APART_MS, LETTERS_WINDOW_MS, MAX_LETTERS, MAX_PEOPLE,
        Member, Place, is_invitation,
    },
    team::{MemberTeam, may_touch, role_of, role_word},
};

/// Somebody who is about to be invited.
#[derive(Debug)]
pub(crate) struct NewInvitation {
    pub(crate) email: Email,
    pub(crate) role: Role,
    /// What the link carries.
    pub(crate) ticket: Secret,
    pub(crate) link: Secret,
}

/// Who changes something in a team.
#[derive(Clone, Debug)]
pub(crate) struct Actor {
    pub(crate) user_id: String,
    /// By which others know them.
    pub(crate) name: String,
}

impl Store {
    /// Those who are invited, and then the members, both the newest first, after a place in the list, read one row too
    /// long.
    pub(crate) async fn members(&self, team_id: String, size: u64, after: Option<Place>) -> Result<Vec<Member>, Error> {
        let now_ms = self.database.clock().now_ms();
        let limit = size.saturating_add(1);
        let listed = self
            .database
            .snapshot(move |reader| async move {
                let mut listed = Vec::new();
                if after.as_ref().is_none_or(|place| place.invited) {
                    let mut query = invitations::Entity::find().filter(open_in(&team_id, now_ms));
                    if let Some(place) = &after {
                        query = query.filter(earlier(invitations::Column::CreatedAtMs, invitations::Column::Id, place));
                    }
                    let rows = query
                        .order_by_desc(invitations::Column::CreatedAtMs)
                        .order_by_desc(invitations::Column::Id)
                        .limit(limit)
                        .all(&reader)
                        .await?;
                    listed.extend(rows.into_iter().map(invited));
                }
                let room = limit.saturating_sub(u64::try_from(listed.len()).unwrap_or(limit));
                if room > 0 {
                    let mut query =
                        memberships::Entity::find().filter(memberships::Column::TeamId.eq(team_id.as_str()));
                    if let Some(place) = after.filter(|place| !place.invited) {
                        let (time, id) = (memberships::Column::CreatedAtMs, memberships::Column::UserId);
                        query = query.filter(earlier(time, id, &place));
                    }
                    let rows = query
                        .find_also_related(users::Entity)
                        .order_by_desc(memberships::Column::CreatedAtMs)
                        .order_by_desc(memberships::Column::UserId)
                        .limit(room)
                        .all(&reader)
                        .await?;
                    listed.extend(rows.into_iter().filter_map(|(membership, user)| Some(member(&membership, user?))));
                }
                Ok::<_, Failure>(listed)
            })
            .await?;
        Ok(listed)
    }

    /// Invites somebody, and leaves them a letter. An address that was invited before gets a new link and role. A team
    /// mails neither many people a day nor one again and again: they never asked for it.
    pub(crate) async fn invite(
        &self,
        team_id: String,
        actor: Actor,
        invitation: NewInvitation,
        act: Act,
    ) -> Result<Member, Error> {
        let this = self.clone();
        let ticket_hash = self.hash(&invitation.ticket);
        let clock = self.database.clock();
        let (now_ms, new_id) = (clock.now_ms(), new_id(INVITATION_PREFIX, clock));
        let expires_at_ms = now_ms.saturating_add(INVITATION_LIFETIME_MS);
        let made = self
            .database
            .write(move |tx| async move {
                let NewInvitation { email, role, link, .. } = invitation;
                let own = lock_team(&tx, &team_id, &actor.user_id).await?;
                may_touch(own, &[role])?;
                let present = memberships::Entity::find()
                    .filter(memberships::Column::TeamId.eq(team_id.as_str()))
                    .inner_join(users::Entity)
                    .filter(users::Column::EmailLower.eq(email.lower.as_str()))
                    .count(&tx)
                    .await?;
                if present > 0 {
                    return Err(Failure::from(Fault::AlreadyMember));
                }
                let earlier = invitations::Entity::find()
                    .filter(open_in(&team_id, now_ms))
                    .filter(invitations::Column::EmailLower.eq(email.lower.as_str()))
                    .one(&tx)
                    .await?;
                match earlier {
                    Some(earlier) => {
                        may_touch(own, &[role_of(&earlier.role)])?;
                        let again_in_ms = earlier.created_at_ms.saturating_add(LETTERS_APART_MS).saturating_sub(now_ms);
                        if again_in_ms > 0 {
                            return Err(Failure::from(Fault::InvitedJustNow { again_in_ms }));
                        }
                    }
                    None => must_have_room(&tx, &team_id, now_ms).await?,
                }
                let team = take_team(&tx, &team_id).await?.ok_or(Failure::Fault(Fault::NoSuchTeam))?;
                count_letter(&tx, &team, now_ms).await?;
                let row = invitations::ActiveModel {
                    id: Set(new_id),
                    team_id: Set(team_id.clone()),
                    email_lower: Set(email.lower),
                    email: Set(email.shown.clone()),
                    role: Set(role_word(role).to_owned()),
                    token_hash: Set(ticket_hash),
                    invited_by: Set(actor.user_id.clone()),
                    created_at_ms: Set(now_ms),
                    expires_at_ms: Set(expires_at_ms),
                };
                let row = invitations::Entity::insert(row).on_conflict(replacing()).exec_with_returning(&tx).await?;
                let inviter = users::Entity::find_by_id(actor.user_id).one(&tx).await?;
                let letter = Letter::Invitation {
                    to: email.shown,
                    team: team.name,
                    inviter: inviter.map_or(actor.name, |user| match user.name {
                        Some(name) => format!("{name} ({})", user.email),
                        None => user.email,
                    }),
                    link: Link::from(&link),
                    expires_at_ms,
                };
                this.outgoing.leave(&tx, &letter).await?;
                tx.audit(act.on(vec![team_id, row.id.clone()]));
                let made = invited(row);
                act.answer(&tx, &made)?;
                Ok(made)
            })
            .await?;
        Ok(made)
    }

    /// Gives a member another role; without one, answers what they have.
    pub(crate) async fn change_role(
        &self,
        team_id: String,
        actor: Actor,
        user_id: String,
        role: Option<Role>,
        act: Act,
    ) -> Result<Member, Error> {
        let this = self.clone();
        let changed = self
            .database
            .write(move |tx| async move {
                let own = lock_team(&tx, &team_id, &actor.user_id).await?;
                let present = membership(&tx, &team_id, &user_id).await?;
                let before = role_of(&present.role);
                let role = role.unwrap_or(before);
                may_touch(own, &[before, role])?;
                if role != before {
                    if before == Role::Owner {
                        must_not_be_the_last_owner(&tx, &team_id).await?;
                    }
                    memberships::Entity::update_many()
                        .col_expr(memberships::Column::Role, Expr::value(role_word(role)))
                        .filter(of(&team_id, &user_id))
                        .exec(&tx)
                        .await?;
                    let mut touched = vec![team_id.clone(), user_id.clone()];
                    if role == Role::Owner {
                        // Whoever else was shown a token of theirs may be no Owner.
                        let of_others = Condition::any()
                            .add(keys::Column::GivenTo.is_null())
                            .add(keys::Column::GivenTo.ne(user_id.as_str()));
                        touched.extend(this.end_tokens(&tx, &team_id, &user_id, of_others, &actor).await?);
                    }
                    announce(&tx, &this.epochs, format!("user:{user_id}"));
                    tx.audit(act.on(touched));
                }
                let user = users::Entity::find_by_id(user_id).one(&tx).await?;
                let user = user.ok_or(Failure::Fault(Fault::NoSuchMember))?;
                Ok::<_, Failure>(Member { role, ..member(&present, user) })
            })
            .await?;
        Ok(changed)
    }

    /// Takes somebody out of a team, or an invitation back.
    pub(crate) async fn remove_member(&self, team_id: String, actor: Actor, id: String, act: Act) -> Result<(), Error> {
        let this = self.clone();
        self.database
            .write(move |tx| async move {
                let own = lock_team(&tx, &team_id, &actor.user_id).await?;
                if is_invitation(&id) {
                    let earlier = invitations::Entity::find()
                        .filter(open_in(&team_id, this.database.clock().now_ms()))
                        .filter(invitations::Column::Id.eq(id.as_str()))
                        .one(&tx)
                        .await?
                        .ok_or(Failure::Fault(Fault::NoSuchMember))?;
                    may_touch(own, &[role_of(&earlier.role)])?;
                    let taken = invitations::Entity::delete_by_id(id.as_str()).exec(&tx).await?;
                    if taken.rows_affected == 0 {
                        return Err(Failure::from(Fault::NoSuchMember));
                    }
                    tx.audit(act.on(vec![team_id, id]));
                    return Ok(());
                }
                let present = membership(&tx, &team_id, &id).await?;
                may_touch(own, &[role_of(&present.role)])?;
                this.end_membership(&tx, &present, &actor, &act).await
            })
            .await?;
        Ok(())
    }

    /// Takes an account out of a team by its own wish.
    pub(crate) async fn leave(&self, team_id: String, actor: Actor, act: Act) -> Result<(), Error> {
        let this = self.clone();
        self.database
            .write(move |tx| async move {
                lock_team(&tx, &team_id, &actor.user_id).await?;
                let present = membership(&tx, &team_id, &actor.user_id).await?;
                this.end_membership(&tx, &present, &actor, &act).await?;
                Ok::<_, Failure>(())
            })
            .await?;
        Ok(())
    }

    /// Ends a membership, and the tokens that the person has in that team, of which there are few. What the team has,
    /// stays.
    async fn end_membership(
        &self,
        tx: &Tx,
        present: &memberships::Model,
        actor: &Actor,
        act: &Act,
    ) -> Result<(), Failure> {
        let (team_id, user_id) = (present.team_id.as_str(), present.user_id.as_str());
        if role_of(&present.role) == Role::Owner {
            must_not_be_the_last_owner(tx, team_id).await?;
        }
        memberships::Entity::delete_many().filter(of(team_id, user_id)).exec(tx).await?;
        let mut touched = vec![team_id.to_owned(), user_id.to_owned()];
        touched.extend(self.end_tokens(tx, team_id, user_id, Condition::all(), actor).await?);
        announce(tx, &self.epochs, format!("user:{user_id}"));
        tx.audit(act.on(touched));
        Ok(())
    }

    /// Revokes those of a user's tokens in a team, whose row is held, that have not ended and are such. Says which.
    async fn end_tokens(
        &self,
        tx: &Tx,
        team_id: &str,
        user_id: &str,
        such: Condition,
        actor: &Actor,
    ) -> Result<Vec<String>, Failure> {
        let now_ms = self.database.clock().now_ms();
        let by = users::Entity::find_by_id(actor.user_id.as_str()).one(tx).await?;
        let by_name = by.map_or_else(|| actor.name.clone(), |user| user.name.unwrap_or(user.email));
        let ended = keys::Entity::update_many()
            .col_expr(keys::Column::RevokedAtMs, Expr::value(now_ms))
            .col_expr(keys::Column::RevokedBy, Expr::value(actor.user_id.as_str()))
            .col_expr(keys::Column::RevokedByName, Expr::value(by_name))
            .filter(tokens_of(team_id, user_id, now_ms))
            .filter(such)
            .exec_with_returning(tx)
            .await?;
        let mut ids = Vec::with_capacity(ended.len());
        for key in ended {
            announce(tx, &self.epochs, format!("key:{}", key.id));
            ids.push(key.id.clone());
            if let Some(key) = key_of(key) {
                self.tell(tx, REVOKED, &key, &key.event_data());
            }
        }
        Ok(ids)
    }

    /// Joins the team of an invitation, which is used up. An account that it was not sent to does not find it.
    pub(crate) async fn accept(&self, ticket: &Secret, user_id: String, act: Act) -> Result<MemberTeam, Error> {
        let this = self.clone();
        let ticket_hash = self.hash(ticket);
        let now_ms = self.database.clock().now_ms();
        let joined = self
            .database
            .write(move |tx| async move {
                let sent = Condition::all()
                    .add(invitations::Column::TokenHash.eq(ticket_hash))
                    .add(invitations::Column::ExpiresAtMs.gt(now_ms));
                let none = || Failure::from(Fault::NoSuchInvitation);
                let invitation = invitations::Entity::find().filter(sent.clone()).one(&tx).await?.ok_or_else(none)?;
                let user = users::Entity::find_by_id(user_id.as_str()).one(&tx).await?.ok_or_else(none)?;
                if user.email_lower != invitation.email_lower {
                    return Err(none());
                }
                let team = take_team(&tx, &invitation.team_id).await?.ok_or_else(none)?;
                // Again, now that nobody else can change it: it may have been used, replaced or taken back.
                let invitation = invitations::Entity::find().filter(sent).one(&tx).await?.ok_or_else(none)?;
                let used = invitations::Entity::delete_by_id(invitation.id.as_str()).exec(&tx).await?;
                if used.rows_affected == 0 {
                    return Err(none());
                }
                let present = memberships::Entity::find_by_id((team.id.clone(), user_id.clone())).one(&tx).await?;
                let role = if let Some(present) = present {
                    role_of(&present.role)
                } else {
                    must_have_room_for_a_team(&tx, &user_id).await?;
                    let membership = memberships::ActiveModel {
                        team_id: Set(team.id.clone()),
                        user_id: Set(user_id.clone()),
                        role: Set(invitation.role.clone()),
                        created_at_ms: Set(now_ms),
                    };
                    memberships::Entity::insert(membership).exec_without_returning(&tx).await?;
                    announce(&tx, &this.epochs, format!("user:{user_id}"));
                    role_of(&invitation.role)
                };
                tx.audit(act.on_team(&team.id).on(vec![team.id.clone(), user_id, invitation.id]));
                let joined = MemberTeam {
                    id: team.id,
                    name: team.name,
                    role,
                    tier: team.tier,
                    requests_per_minute: team.requests_per_minute,
                };
                act.answer(&tx, &joined)?;
                Ok(joined)
            })
            .await?;
        Ok(joined)
    }
}

/// Counts a letter of a team, whose row is held; refuses it where there were many lately.
async fn count_letter(tx: &Tx, team: &teams::Model, now_ms: i64) -> Result<(), Failure> {
    let ends_ms = |since_ms: i64| since_ms.saturating_add(LETTERS_WINDOW_MS);
    let (since_ms, count) = match team.invited_since_ms {
        Some(since_ms) if ends_ms(since_ms) > now_ms => (since_ms, team.invited_count),
        _ => (now_ms, 0),
    };
    if count >= MAX_LETTERS {
        return Err(Failure::from(Fault::TooManyLetters { again_in_ms: ends_ms(since_ms).saturating_sub(now_ms) }));
    }
    teams::Entity::update_many()
        .col_expr(teams::Column::InvitedSinceMs, Expr::value(since_ms))
        .col_expr(teams::Column::InvitedCount, Expr::value(count.saturating_add(1)))
        .filter(teams::Column::Id.eq(team.id.as_str()))
        .exec(tx)
        .await?;
    Ok(())
}

/// What an invitation of the same address becomes.
fn replacing() -> OnConflict {
    use invitations::Column as C;
    OnConflict::columns([C::TeamId, C::EmailLower])
        .update_columns([C::Id, C::Email, C::Role, C::TokenHash, C::InvitedBy, C::CreatedAtMs, C::ExpiresAtMs])
        .to_owned()
}

fn member(membership: &memberships::Model, user: users::Model) -> Member {
    Member {
        id: user.id,
        email: user.email,
        name: user.name,
        role: role_of(&membership.role),
        since_ms: membership.created_at_ms,
        expires_at_ms: None,
    }
}

fn invited(row: invitations::Model) -> Member {
    Member {
        id: row.id,
        email: row.email,
        name: None,
        role: role_of(&row.role),
        since_ms: row.created_at_ms,
        expires_at_ms: Some(row.expires_at_ms),
    }
}

fn of(team_id: &str, user_id: &str) -> Condition {
    Condition::all().add(memberships::Column::TeamId.eq(team_id)).add(memberships::Column::UserId.eq(user_id))
}

/// Invitations of a team that are still good.
fn open_in(team_id: &str, now_ms: i64) -> Condition {
    Condition::all().add(invitations::Column::TeamId.eq(team_id)).add(invitations::Column::ExpiresAtMs.gt(now_ms))
}

/// Rows after a place, where the newest come first: those before it by time and id.
fn earlier<C: sea_orm::ColumnTrait>(time: C, id: C, place: &Place) -> Condition {
    Condition::any()
        .add(time.lt(place.since_ms))
        .add(Condition::all().add(time.eq(place.since_ms)).add(id.lt(place.id.as_str())))
}

async fn membership(
    connection: &impl ConnectionTrait,
    team_id: &str,
    user_id: &str,
) -> Result<memberships::Model, Failure> {
    let found = memberships::Entity::find_by_id((team_id.to_owned(), user_id.to_owned())).one(connection).await?;
    found.ok_or(Failure::Fault(Fault::NoSuchMember))
}

/// Counted while the team's row is held, so that of two Owners who give up at the same moment one stays.
async fn must_not_be_the_last_owner(tx: &Tx, team_id: &str) -> Result<(), Failure> {
    let owners = memberships::Entity::find()
        .filter(memberships::Column::TeamId.eq(team_id))
        .filter(memberships::Column::Role.eq(role_word(Role::Owner)))
        .count(tx)
        .await?;
    if owners > 1 { Ok(()) } else { Err(Failure::Fault(Fault::LastOwner)) }
}

async fn must_have_room(tx: &Tx, team_id: &str, now_ms: i64) -> Result<(), Failure> {
    let members = memberships::Entity::find().filter(memberships::Column::TeamId.eq(team_id)).count(tx).await?;
    let invited = invitations::Entity::find().filter(open_in(team_id, now_ms)).count(tx).await?;
    if members.saturating_add(invited) < MAX_PEOPLE { Ok(()) } else { Err(Failure::Fault(Fault::TeamIsFull)) }
}
