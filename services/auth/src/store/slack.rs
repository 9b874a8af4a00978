//! Posts to Slack that wait to be sent: written in the transaction of what they tell of, sealed, and taken by one process
//! at a time. Where no Slack is configured, none are written.

use std::{sync::Arc, time::Duration};

use paperkey_kit::{
    clock::Clock,
    db::{DbError, Tx},
    ids::new_id,
    secrets::{CannotOpen, Keyring, Purpose, Sealer},
};
use sea_orm::{ConnectionTrait as _, Statement, Value};
use tokio::sync::Notify;

use super::{Store, queue};
use crate::domain::alert::MAX_POSTS;

const TABLE: &str = "slack_posts";

/// Where posts are left, and who is told.
#[derive(Clone, Debug)]
pub(crate) struct Posts {
    sealer: Sealer,
    clock: Clock,
    wake: Arc<Notify>,
    configured: bool,
}

impl Posts {
    pub(super) fn new(keys: &Keyring, clock: Clock) -> Self {
        Self { sealer: keys.sealer(Purpose::Slack), clock, wake: Arc::default(), configured: false }
    }

    /// Whether anybody sends them.
    pub(super) fn are_sent(&self) -> bool {
        self.configured
    }

    /// Leaves a post, to be sent once the transaction is durable. Where as many wait as may, it is let go: the alert is
    /// in the feed.
    pub(super) async fn leave(&self, tx: &Tx, text: &str) -> Result<(), DbError> {
        let id = new_id("post", &self.clock);
        let now_ms = self.clock.now_ms();
        let sealed = self.sealer.seal(&id, text.as_bytes());
        let values: Vec<Value> = vec![id.into(), sealed.into(), now_ms.into(), MAX_POSTS.into()];
        let sql = "INSERT INTO slack_posts (id, sealed, attempts, due_at_ms, created_at_ms) \
             SELECT $1, $2, 0, $3, $3 WHERE (SELECT COUNT(*) FROM slack_posts) < $4";
        let left = tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), sql, values)).await?;
        if left.rows_affected() == 0 {
            tracing::warn!("too many posts to Slack wait, and one is let go");
            return Ok(());
        }
        let wake = Arc::clone(&self.wake);
        tx.after_commit(move || wake.notify_one());
        Ok(())
    }

    /// Waits until a post may have been left in this process.
    pub(crate) async fn wait(&self) {
        self.wake.notified().await;
    }
}

/// A post that this process holds for a while.
#[derive(Debug)]
pub(crate) struct ClaimedPost {
    pub(crate) id: String,
    /// This attempt included.
    pub(crate) attempts: i64,
    pub(crate) created_at_ms: i64,
    pub(crate) text: Result<String, CannotOpen>,
}

impl Store {
    /// The same store, whose alerts are also told to Slack.
    pub(crate) fn telling_slack(mut self) -> Self {
        self.posts.configured = true;
        self
    }

    /// Posts that were left.
    pub(crate) fn posts(&self) -> &Posts {
        &self.posts
    }

    /// Takes posts that are due, for that long. Of several processes one gets each.
    pub(crate) async fn claim_posts(&self, count: i64, held: Duration) -> Result<Vec<ClaimedPost>, DbError> {
        let claimed = queue::claim(&self.database, TABLE, count, held).await?;
        let opened = claimed.into_iter().map(|row| {
            let plain = self.posts.sealer.open(&row.id, &row.sealed);
            ClaimedPost {
                text: plain.and_then(|plain| String::from_utf8(plain).map_err(|_| CannotOpen::Damaged)),
                id: row.id,
                attempts: row.attempts,
                created_at_ms: row.created_at_ms,
            }
        });
        Ok(opened.collect())
    }

    /// Tries a post again at that time; forgets it where there is none. A claim that has passed to another changes
    /// nothing.
    pub(crate) async fn settle_post(&self, post: &ClaimedPost, again_at_ms: Option<i64>) -> Result<(), DbError> {
        queue::settle(&self.database, TABLE, &post.id, post.attempts, again_at_ms).await
    }
}
