//! New passwords, the links by which forgotten ones are replaced, and failed logins.
//!
//! The row of the account is the lock under which its password changes: whoever sets one takes that row first.

use std::sync::Arc;

use paperkey_kit::{db::Tx, ids::new_id, secrets::Secret};
use paperkey_proto::Error;
use sea_orm::{
    ColumnTrait as _, Condition, ConnectionTrait as _, EntityTrait as _, QueryFilter as _, Statement,
    entity::prelude::Expr, sea_query::ExprTrait as _,
};

use super::{
    Act, Failure, PasswordHash, Store, announce,
    entities::{invitations, login_failures, password_resets, users},
};
use crate::domain::{
    Fault,
    account::{Account, Email, FAILURES_WINDOW_MS, MAX_FAILURES, RESET_LIFETIME_MS, RESETS_WINDOW_MS},
    letter::{Letter, Link},
};

/// What is to change in an account; `None` leaves it.
#[derive(Debug, Default)]
pub(crate) struct AccountChanges {
    pub(crate) name: Option<Option<String>>,
    pub(crate) password: Option<NewPassword>,
}

/// A new password of somebody who has proved the present one.
#[derive(Debug)]
pub(crate) struct NewPassword {
    pub(crate) hash: PasswordHash,
    /// The epoch of the account when the present one was proved.
    pub(crate) epoch: i64,
}

impl Store {
    /// The account of an id, and the hash of its password.
    pub(crate) async fn account_by_id(&self, user_id: &str) -> Result<Option<(Account, PasswordHash)>, Error> {
        let user_id = user_id.to_owned();
        let found = self
            .database
            .read(move |reader| async move { Ok::<_, Failure>(users::Entity::find_by_id(user_id).one(&reader).await?) })
            .await?;
        Ok(found.map(|mut row| {
            let hash = PasswordHash(std::mem::take(&mut row.password_hash));
            (row.into(), hash)
        }))
    }

    /// Changes an account. A new password ends every session, unless one has ended since the present one was proved.
    pub(crate) async fn change_account(
        &self,
        user_id: String,
        changes: AccountChanges,
        act: Act,
    ) -> Result<Account, Error> {
        let this = self.clone();
        let account = self
            .database
            .write(move |tx| async move {
                let mut account = users::Entity::find_by_id(user_id.as_str()).one(&tx).await?;
                if let Some(name) = changes.name {
                    let changed = users::Entity::update_many()
                        .col_expr(users::Column::Name, Expr::value(name))
                        .filter(users::Column::Id.eq(user_id.as_str()))
                        .exec_with_returning(&tx)
                        .await?;
                    account = changed.into_iter().next();
                }
                if let Some(password) = changes.password {
                    let proved =
                        users::Column::Id.eq(user_id.as_str()).and(users::Column::SessionEpoch.eq(password.epoch));
                    account = this.set_password(&tx, Condition::all().add(proved), password.hash).await?;
                    if account.is_none() {
                        return Err(Failure::from(Fault::SessionEnded));
                    }
                }
                let account = account.ok_or(Failure::Fault(Fault::NoSuchAccount))?;
                tx.audit(act.on(vec![user_id]));
                Ok(account.into())
            })
            .await?;
        Ok(account)
    }

    /// Ends every session of an account.
    pub(crate) async fn sign_out(&self, user_id: String, act: Act) -> Result<(), Error> {
        let epochs = Arc::clone(&self.epochs);
        self.database
            .write(move |tx| async move {
                let ended = users::Entity::update_many()
                    .col_expr(users::Column::SessionEpoch, Expr::col(users::Column::SessionEpoch).add(1_i64))
                    .filter(users::Column::Id.eq(user_id.as_str()))
                    .exec(&tx)
                    .await?;
                if ended.rows_affected == 0 {
                    return Err(Failure::from(Fault::NoSuchAccount));
                }
                announce(&tx, &epochs, format!("user:{user_id}"));
                tx.audit(act.on(vec![user_id]));
                Ok(())
            })
            .await?;
        Ok(())
    }

    /// Sets a new password and ends every session: for the operator, who need not know the old one.
    pub(crate) async fn reset_password(&self, email: Email, hash: PasswordHash, act: Act) -> Result<(), Error> {
        let this = self.clone();
        self.database
            .write(move |tx| async move {
                let whose = Condition::all().add(users::Column::EmailLower.eq(email.lower));
                let user = this.set_password(&tx, whose, hash).await?.ok_or(Failure::Fault(Fault::NoSuchAccount))?;
                tx.audit(act.on(vec![user.id]));
                Ok::<_, Failure>(())
            })
            .await?;
        Ok(())
    }

    /// Leaves a letter with a link for whoever has this address. For an address that nobody has, the same is done.
    pub(crate) async fn forgot_password(
        &self,
        email_lower: String,
        ticket: &Secret,
        link: Secret,
        act: Act,
    ) -> Result<(), Error> {
        let this = self.clone();
        let ticket_hash = self.hash(ticket);
        let clock = self.database.clock();
        let (now_ms, reset_id) = (clock.now_ms(), new_id("reset", clock));
        let expires_at_ms = now_ms.saturating_add(RESET_LIFETIME_MS);
        self.database
            .write(move |tx| async move {
                let statement = Statement::from_sql_and_values(
                    tx.get_database_backend(),
                    "INSERT INTO password_resets (id, token_hash, user_id, created_at_ms, expires_at_ms) \
                     VALUES ($1, $2, (SELECT u.id FROM users u WHERE u.email_lower = $3), $4, $5)",
                    [
                        reset_id.as_str().into(),
                        ticket_hash.into(),
                        email_lower.into(),
                        now_ms.into(),
                        expires_at_ms.into(),
                    ],
                );
                tx.execute_raw(statement).await?;
                let letter =
                    Letter::PasswordReset { reset_id: reset_id.clone(), link: Link::from(&link), expires_at_ms };
                this.outgoing.leave(&tx, &letter).await?;
                tx.audit(act.on(vec![reset_id]));
                Ok::<_, Failure>(())
            })
            .await?;
        Ok(())
    }

    /// Whether a link is still good. Asked before the costly part; what counts is [`Self::use_reset`].
    pub(crate) async fn is_reset_good(&self, ticket: &Secret) -> Result<bool, Error> {
        let good = good_reset(self.hash(ticket), self.database.clock().now_ms());
        let found = self
            .database
            .read(move |reader| async move {
                Ok::<_, Failure>(password_resets::Entity::find().filter(good).one(&reader).await?)
            })
            .await?;
        Ok(found.is_some())
    }

    /// Sets a new password by a link, which is used up, as are all others of the account. Of two at once one wins.
    pub(crate) async fn use_reset(&self, ticket: &Secret, hash: PasswordHash, act: Act) -> Result<(), Error> {
        let this = self.clone();
        let good = good_reset(self.hash(ticket), self.database.clock().now_ms());
        self.database
            .write(move |tx| async move {
                let reset = password_resets::Entity::find().filter(good.clone()).one(&tx).await?;
                let user_id = reset.and_then(|reset| reset.user_id).ok_or(Failure::Fault(Fault::BadResetToken))?;
                // The account first, so that two links of one account wait for each other instead of both winning.
                let whose = Condition::all().add(users::Column::Id.eq(user_id.as_str()));
                let locked = users::Entity::update_many()
                    .col_expr(users::Column::SessionEpoch, Expr::col(users::Column::SessionEpoch))
                    .filter(whose.clone())
                    .exec(&tx)
                    .await?;
                let still_good = password_resets::Entity::find().filter(good).one(&tx).await?;
                if locked.rows_affected == 0 || still_good.is_none() {
                    return Err(Failure::from(Fault::BadResetToken));
                }
                let user = this.set_password(&tx, whose, hash).await?.ok_or(Failure::Fault(Fault::BadResetToken))?;
                tx.audit(act.or_by_account(&user.id, &user.email).on(vec![user.id]));
                Ok(())
            })
            .await?;
        Ok(())
    }

    /// Sets the password of the account that the condition names, if there is one: ends its sessions and its links,
    /// forgives its failed logins, and tells its owner.
    async fn set_password(
        &self,
        tx: &Tx,
        whose: Condition,
        hash: PasswordHash,
    ) -> Result<Option<users::Model>, Failure> {
        let changed = users::Entity::update_many()
            .col_expr(users::Column::PasswordHash, Expr::value(hash.0))
            .col_expr(users::Column::SessionEpoch, Expr::col(users::Column::SessionEpoch).add(1_i64))
            .filter(whose)
            .exec_with_returning(tx)
            .await?;
        let Some(user) = changed.into_iter().next() else { return Ok(None) };
        // They are kept for a while: how many were mailed lately still counts.
        password_resets::Entity::update_many()
            .col_expr(password_resets::Column::ExpiresAtMs, Expr::value(0_i64))
            .filter(password_resets::Column::UserId.eq(user.id.as_str()))
            .exec(tx)
            .await?;
        login_failures::Entity::delete_by_id(self.failures_of(&user.email_lower)).exec(tx).await?;
        let letter = Letter::PasswordChanged { to: user.email.clone(), at_ms: self.database.clock().now_ms() };
        self.outgoing.leave(tx, &letter).await?;
        announce(tx, &self.epochs, format!("user:{}", user.id));
        Ok(Some(user))
    }

    fn failures_of(&self, counted_as: &str) -> Vec<u8> {
        self.failures.hash(counted_as.as_bytes()).to_vec()
    }

    /// Counts a login as failed, before anybody knows; refuses it where too many have failed lately.
    pub(crate) async fn count_login(&self, counted_as: &str) -> Result<(), Error> {
        let whose = self.failures_of(counted_as);
        let now_ms = self.database.clock().now_ms();
        let ended_ms = now_ms.saturating_sub(FAILURES_WINDOW_MS);
        self.database
            .write(move |tx| async move {
                let statement = Statement::from_sql_and_values(
                    tx.get_database_backend(),
                    "INSERT INTO login_failures (email_hash, failures, since_ms) VALUES ($1, 1, $2) \
                     ON CONFLICT (email_hash) DO UPDATE SET \
                     failures = CASE WHEN login_failures.since_ms <= $3 THEN 1 ELSE login_failures.failures + 1 END, \
                     since_ms = CASE WHEN login_failures.since_ms <= $3 THEN $2 ELSE login_failures.since_ms END \
                     WHERE login_failures.failures < $4 OR login_failures.since_ms <= $3",
                    [whose.clone().into(), now_ms.into(), ended_ms.into(), MAX_FAILURES.into()],
                );
                if tx.execute_raw(statement).await?.rows_affected() > 0 {
                    return Ok::<_, Failure>(());
                }
                let row = login_failures::Entity::find_by_id(whose).one(&tx).await?;
                let since_ms = row.map_or(now_ms, |row| row.since_ms);
                let again_in_ms = since_ms.saturating_add(FAILURES_WINDOW_MS).saturating_sub(now_ms);
                Err(Failure::from(Fault::TooManyFailures { again_in_ms }))
            })
            .await?;
        Ok(())
    }

    /// Takes one count back: nobody has looked at the password.
    pub(crate) async fn uncount_login(&self, counted_as: &str) -> Result<(), Error> {
        let whose = login_failures::Column::EmailHash
            .eq(self.failures_of(counted_as))
            .and(login_failures::Column::Failures.gt(0));
        self.database
            .write(move |tx| async move {
                login_failures::Entity::update_many()
                    .col_expr(login_failures::Column::Failures, Expr::col(login_failures::Column::Failures).sub(1_i64))
                    .filter(whose)
                    .exec(&tx)
                    .await?;
                Ok::<_, Failure>(())
            })
            .await?;
        Ok(())
    }

    /// Forgives failed logins: one has succeeded.
    pub(crate) async fn forgive_logins(&self, counted_as: &str) -> Result<(), Error> {
        let whose = self.failures_of(counted_as);
        self.database
            .write(move |tx| async move {
                login_failures::Entity::delete_by_id(whose).exec(&tx).await?;
                Ok::<_, Failure>(())
            })
            .await?;
        Ok(())
    }

    /// Forgets invitations, links and counts that mean nothing any more. Says how many.
    pub(crate) async fn forget_ended(&self) -> Result<u64, Error> {
        let now_ms = self.database.clock().now_ms();
        let forgotten = self
            .database
            .write(move |tx| async move {
                let resets = password_resets::Entity::delete_many()
                    .filter(password_resets::Column::CreatedAtMs.lte(now_ms.saturating_sub(2 * RESETS_WINDOW_MS)))
                    .exec(&tx)
                    .await?;
                // After those, as whoever sets a password does it: the two never wait for each other.
                let failures = login_failures::Entity::delete_many()
                    .filter(login_failures::Column::SinceMs.lte(now_ms.saturating_sub(FAILURES_WINDOW_MS)))
                    .exec(&tx)
                    .await?;
                let invitations = invitations::Entity::delete_many()
                    .filter(invitations::Column::ExpiresAtMs.lte(now_ms))
                    .exec(&tx)
                    .await?;
                Ok::<_, Failure>(failures.rows_affected + resets.rows_affected + invitations.rows_affected)
            })
            .await?;
        Ok(forgotten)
    }
}

fn good_reset(ticket_hash: Vec<u8>, now_ms: i64) -> Condition {
    Condition::all()
        .add(password_resets::Column::TokenHash.eq(ticket_hash))
        .add(password_resets::Column::UserId.is_not_null())
        .add(password_resets::Column::ExpiresAtMs.gt(now_ms))
}
