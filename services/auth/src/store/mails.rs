//! Mail that waits to be sent: written in the transaction of what it tells of, sealed, and taken by one process at a time.

use std::{sync::Arc, time::Duration};

use paperkey_kit::{
    clock::Clock,
    db::{DbError, Tx},
    ids::new_id,
    secrets::{CannotOpen, Keyring, Purpose, Sealer},
};
use sea_orm::{
    ActiveValue::Set, ColumnTrait as _, EntityTrait as _, PaginatorTrait as _, QueryFilter as _, QuerySelect as _,
    entity::prelude::Expr,
};
use tokio::sync::Notify;

use super::{
    Store,
    entities::{mails, memberships, password_resets, teams, users},
    queue,
};
use crate::domain::{
    account::{MAX_RESET_MAILS, RESETS_WINDOW_MS},
    letter::Letter,
    team::hears_of_alerts,
};

const TABLE: &str = "mails";

/// Where letters are left, and who is told.
#[derive(Clone, Debug)]
pub(crate) struct Outgoing {
    sealer: Sealer,
    clock: Clock,
    wake: Arc<Notify>,
}

impl Outgoing {
    pub(super) fn new(keys: &Keyring, clock: Clock) -> Self {
        Self { sealer: keys.sealer(Purpose::Mail), clock, wake: Arc::default() }
    }

    /// Leaves a letter, to be sent once the transaction is durable.
    pub(super) async fn leave(&self, tx: &Tx, letter: &Letter) -> Result<(), DbError> {
        let id = new_id("mail", &self.clock);
        let now_ms = self.clock.now_ms();
        let plain = serde_json::to_vec(letter).map_err(|error| DbError::Internal(error.to_string()))?;
        let row = mails::ActiveModel {
            sealed: Set(self.sealer.seal(&id, &plain)),
            id: Set(id),
            attempts: Set(0),
            due_at_ms: Set(now_ms),
            created_at_ms: Set(now_ms),
        };
        mails::Entity::insert(row).exec_without_returning(tx).await?;
        let wake = Arc::clone(&self.wake);
        tx.after_commit(move || wake.notify_one());
        Ok(())
    }

    /// Waits until a letter may have been left in this process.
    pub(crate) async fn wait(&self) {
        self.wake.notified().await;
    }
}

/// A mail that this process holds for a while.
#[derive(Debug)]
pub(crate) struct ClaimedMail {
    pub(crate) id: String,
    /// This attempt included.
    pub(crate) attempts: i64,
    pub(crate) created_at_ms: i64,
    pub(crate) letter: Result<Letter, CannotOpen>,
}

impl Store {
    /// Letters that were left.
    pub(crate) fn outgoing(&self) -> &Outgoing {
        &self.outgoing
    }

    /// Takes mails that are due, for that long. Of several processes one gets each.
    pub(crate) async fn claim_mails(&self, count: i64, held: Duration) -> Result<Vec<ClaimedMail>, DbError> {
        let claimed = queue::claim(&self.database, TABLE, count, held).await?;
        let opened = claimed.into_iter().map(|row| {
            let plain = self.outgoing.sealer.open(&row.id, &row.sealed);
            ClaimedMail {
                letter: plain.and_then(|plain| serde_json::from_slice(&plain).map_err(|_| CannotOpen::Damaged)),
                id: row.id,
                attempts: row.attempts,
                created_at_ms: row.created_at_ms,
            }
        });
        Ok(opened.collect())
    }

    /// Tries a mail again at that time; forgets it where there is none. A claim that has passed to another changes
    /// nothing.
    pub(crate) async fn settle_mail(&self, mail: &ClaimedMail, again_at_ms: Option<i64>) -> Result<(), DbError> {
        queue::settle(&self.database, TABLE, &mail.id, mail.attempts, again_at_ms).await
    }

    /// Where the link of a forgotten password is to be sent: nowhere where the address has no account, or was sent
    /// several lately. The request is marked as mailed then, and only marked ones count: whoever asks in the name of
    /// another cannot keep the links from them for longer than that. The same is done where there is no account.
    pub(crate) async fn reset_address(&self, reset_id: String) -> Result<Option<String>, DbError> {
        let now_ms = self.database.clock().now_ms();
        self.database
            .write(move |tx| async move {
                let Some(reset) = password_resets::Entity::find_by_id(reset_id.as_str()).one(&tx).await? else {
                    return Ok(None);
                };
                let user_id = reset.user_id.unwrap_or_default();
                // Held, so that of many letters to one account each sees those before it.
                let user = users::Entity::find_by_id(user_id.as_str()).lock_exclusive().one(&tx).await?;
                let lately = password_resets::Entity::find()
                    .filter(password_resets::Column::UserId.eq(user_id.as_str()))
                    .filter(password_resets::Column::MailedAtMs.gt(now_ms.saturating_sub(RESETS_WINDOW_MS)))
                    .filter(password_resets::Column::Id.ne(reset_id.as_str()))
                    .count(&tx)
                    .await?;
                let mut mark = password_resets::Entity::update_many()
                    .col_expr(password_resets::Column::MailedAtMs, Expr::value(now_ms))
                    .filter(password_resets::Column::Id.eq(reset_id.as_str()))
                    .filter(password_resets::Column::UserId.is_not_null());
                if lately >= MAX_RESET_MAILS {
                    // One that is tried again has its place.
                    mark = mark.filter(password_resets::Column::MailedAtMs.is_not_null());
                }
                let marked = mark.exec(&tx).await?.rows_affected > 0;
                Ok::<_, DbError>(user.filter(|_| marked).map(|user| user.email))
            })
            .await
    }

    /// Where an alert of a team is to be sent: nowhere where the account is no longer one that hears of them.
    pub(crate) async fn alert_address(&self, team_id: String, user_id: String) -> Result<Option<String>, DbError> {
        self.database
            .read(move |reader| async move {
                let membership = memberships::Entity::find_by_id((team_id, user_id))
                    .find_also_related(teams::Entity)
                    .filter(teams::Column::DeletedAtMs.is_null())
                    .one(&reader)
                    .await?;
                match membership {
                    Some((membership, Some(_))) if hears_of_alerts(&membership.role) => {
                        let user = users::Entity::find_by_id(membership.user_id).one(&reader).await?;
                        Ok::<_, DbError>(user.map(|user| user.email))
                    }
                    _ => Ok(None),
                }
            })
            .await
    }
}
