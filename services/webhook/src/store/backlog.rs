//! How much is due and how much is paused: for whoever watches over the service.

use paperkey_kit::db::DbError;
use sea_orm::ConnectionTrait as _;

use super::{
    Store,
    dispatch::{LANES_A_LOOK, look_at_lanes},
    sql,
};

/// Rows of one endpoint that are counted at most, so that a long queue of one is not walked along.
const MAX_OF_ONE: usize = 1_000;
/// Counting ends here.
const MAX_COUNTED: i64 = 10_000;
/// Looks at the endpoints at most: those behind wait for somebody to count them, and not for their deliveries.
const MAX_LOOKS: usize = 10;

/// What waits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Backlog {
    /// Deliveries to active endpoints whose time has come and that nobody has claimed.
    pub(crate) due: i64,
    /// Since when the oldest of them is due.
    pub(crate) oldest_due_ms: Option<i64>,
    /// Endpoints that are paused.
    pub(crate) paused: i64,
}

/// What one look has counted.
struct Counted {
    due: i64,
    oldest_due_ms: Option<i64>,
    /// Behind which endpoint the next look goes on, where there may be more.
    next: Option<String>,
}

impl Store {
    /// Counts what waits, and ends early where that is much.
    pub(crate) async fn backlog(&self) -> Result<Backlog, DbError> {
        let now_ms = self.clock.now_ms();
        let mut backlog = Backlog { paused: self.paused_endpoints().await?, ..Backlog::default() };
        let mut after = Some(String::new());
        for _ in 0..MAX_LOOKS {
            let Some(id) = after.take().filter(|_| backlog.due < MAX_COUNTED) else { break };
            let counted = self.due_behind(id, now_ms).await?;
            backlog.due = backlog.due.saturating_add(counted.due).min(MAX_COUNTED);
            backlog.oldest_due_ms = backlog.oldest_due_ms.into_iter().chain(counted.oldest_due_ms).min();
            after = counted.next;
        }
        Ok(backlog)
    }

    /// Like a look of the dispatcher.
    async fn due_behind(&self, after: String, now_ms: i64) -> Result<Counted, DbError> {
        let due = format!(
            ", CASE WHEN e.status = 'active' THEN (SELECT COUNT(*) FROM (SELECT 1 FROM deliveries d \
             WHERE d.status = 'pending' AND d.endpoint_id = lanes.endpoint_id AND d.due_at_ms <= $2 \
             LIMIT {MAX_OF_ONE}) counted) END AS due"
        );
        let text = look_at_lanes(&due);
        let values = vec![after.into(), now_ms.into()];
        let found = self
            .database
            .read(move |reader| async move {
                Ok::<_, DbError>(reader.query_all_raw(sql(reader.get_database_backend(), text, values)).await?)
            })
            .await?;
        let mut counted = Counted { due: 0, oldest_due_ms: None, next: None };
        for row in &found {
            counted.due += row.try_get::<Option<i64>>("", "due")?.unwrap_or(0);
            let due_at_ms = row.try_get::<Option<i64>>("", "due_at_ms")?.filter(|due_at_ms| *due_at_ms <= now_ms);
            counted.oldest_due_ms = counted.oldest_due_ms.into_iter().chain(due_at_ms).min();
            counted.next = Some(row.try_get("", "endpoint_id")?);
        }
        counted.next = counted.next.filter(|_| found.len() >= LANES_A_LOOK);
        Ok(counted)
    }

    async fn paused_endpoints(&self) -> Result<i64, DbError> {
        let text = "SELECT COUNT(*) AS paused FROM (SELECT 1 FROM endpoints WHERE status = 'paused' LIMIT $1) counted";
        self.database
            .read(move |reader| async move {
                let statement = sql(reader.get_database_backend(), text, vec![MAX_COUNTED.into()]);
                let row = reader.query_one_raw(statement).await?;
                Ok::<_, DbError>(row.map_or(Ok(0), |row| row.try_get("", "paused"))?)
            })
            .await
    }
}
