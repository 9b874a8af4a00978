//! Mail that waits to be sent: written in the transaction of what it tells of, sealed, and taken by one process at a time.
//!
//! A claim moves `due_at_ms` to its own end and counts an attempt; the number of attempts is what the holder of a claim
//! proves it by. A process that dies leaves a mail that becomes due by itself.

use std::{sync::Arc, time::Duration};

use paperkey_kit::{
    clock::Clock,
    db::{DbError, Engine, Tx},
    ids::new_id,
    secrets::{Keyring, Sealer},
};
use paperkey_proto::Error;
use sea_orm::{
    ActiveValue::Set, ColumnTrait as _, ConnectionTrait as _, EntityTrait as _, PaginatorTrait as _, QueryFilter as _,
    QuerySelect as _, Statement, entity::prelude::Expr, sea_query::ExprTrait as _,
};
use tokio::sync::Notify;

use super::{
    Failure, Store,
    entities::{mails, password_resets, users},
};
use crate::domain::{
    account::{MAX_RESET_MAILS, RESETS_WINDOW_MS},
    letter::Letter,
};

/// Where letters are left, and who is told.
#[derive(Clone, Debug)]
pub(crate) struct Outgoing {
    sealer: Sealer,
    clock: Clock,
    wake: Arc<Notify>,
}

impl Outgoing {
    pub(super) fn new(keys: &Keyring, clock: Clock) -> Self {
        Self { sealer: keys.sealer("mail/v1"), clock, wake: Arc::default() }
    }

    /// Leaves a letter, to be sent once the transaction is durable.
    pub(super) async fn leave(&self, tx: &Tx, letter: &Letter) -> Result<(), Failure> {
        let id = new_id("mail", &self.clock);
        let now_ms = self.clock.now_ms();
        let plain = serde_json::to_vec(letter).map_err(|error| Failure::Invalid(Error::internal(error)))?;
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
    /// `None` where it cannot be opened.
    pub(crate) letter: Option<Letter>,
}

impl Store {
    /// Letters that were left.
    pub(crate) fn outgoing(&self) -> &Outgoing {
        &self.outgoing
    }

    /// Takes mails that are due, for that long. Of several processes one gets each.
    pub(crate) async fn claim_mails(&self, count: i64, held: Duration) -> Result<Vec<ClaimedMail>, DbError> {
        let now_ms = self.database.clock().now_ms();
        let held_until_ms = now_ms.saturating_add(i64::try_from(held.as_millis()).unwrap_or(i64::MAX));
        let lock = match self.database.engine() {
            Engine::Postgres => "FOR UPDATE SKIP LOCKED",
            Engine::Sqlite => "",
        };
        let text = format!(
            "WITH picked AS MATERIALIZED (SELECT id FROM mails WHERE due_at_ms <= $1 \
             ORDER BY due_at_ms, id LIMIT $2 {lock}) \
             UPDATE mails SET attempts = attempts + 1, due_at_ms = $3 \
             WHERE id IN (SELECT id FROM picked) AND due_at_ms <= $1 RETURNING id, sealed, attempts, created_at_ms"
        );
        let rows = self
            .database
            .write(move |tx| async move {
                let values = [now_ms.into(), count.into(), held_until_ms.into()];
                let statement = Statement::from_sql_and_values(tx.get_database_backend(), text, values);
                Ok::<_, DbError>(tx.query_all_raw(statement).await?)
            })
            .await?;
        let mut claimed = Vec::with_capacity(rows.len());
        for row in rows {
            let (id, sealed) = (row.try_get::<String>("", "id")?, row.try_get::<Vec<u8>>("", "sealed")?);
            let plain = self.outgoing.sealer.open(&id, &sealed).ok();
            claimed.push(ClaimedMail {
                attempts: row.try_get("", "attempts")?,
                created_at_ms: row.try_get("", "created_at_ms")?,
                letter: plain.and_then(|plain| serde_json::from_slice(&plain).ok()),
                id,
            });
        }
        Ok(claimed)
    }

    /// Tries a mail again at that time; forgets it where there is none. A claim that has passed to another changes
    /// nothing.
    pub(crate) async fn settle_mail(&self, mail: &ClaimedMail, again_at_ms: Option<i64>) -> Result<(), DbError> {
        let held = mails::Column::Id.eq(mail.id.as_str()).and(mails::Column::Attempts.eq(mail.attempts));
        self.database
            .write(move |tx| async move {
                match again_at_ms {
                    Some(due_at_ms) => {
                        let later =
                            mails::Entity::update_many().col_expr(mails::Column::DueAtMs, Expr::value(due_at_ms));
                        later.filter(held).exec(&tx).await?;
                    }
                    None => {
                        mails::Entity::delete_many().filter(held).exec(&tx).await?;
                    }
                }
                Ok(())
            })
            .await
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
}
