//! Sealed things that wait to be sent, and are taken by one process at a time.
//!
//! A claim moves `due_at_ms` to its own end and counts an attempt; the number of attempts is what the holder of a claim
//! proves it by. A process that dies leaves what becomes due by itself.

use std::time::Duration;

use paperkey_kit::db::{Database, DbError, Engine};
use sea_orm::{ConnectionTrait as _, Statement};

/// Something that this process holds for a while.
#[derive(Debug)]
pub(super) struct Claimed {
    pub(super) id: String,
    pub(super) sealed: Vec<u8>,
    /// This attempt included.
    pub(super) attempts: i64,
    pub(super) created_at_ms: i64,
}

/// Takes rows of a table that are due, for that long. Of several processes one gets each.
pub(super) async fn claim(
    database: &Database,
    table: &'static str,
    count: i64,
    held: Duration,
) -> Result<Vec<Claimed>, DbError> {
    let now_ms = database.clock().now_ms();
    let held_until_ms = now_ms.saturating_add(i64::try_from(held.as_millis()).unwrap_or(i64::MAX));
    let lock = match database.engine() {
        Engine::Postgres => "FOR UPDATE SKIP LOCKED",
        Engine::Sqlite => "",
    };
    let text = format!(
        "WITH picked AS MATERIALIZED (SELECT id FROM {table} WHERE due_at_ms <= $1 \
         ORDER BY due_at_ms, id LIMIT $2 {lock}) \
         UPDATE {table} SET attempts = attempts + 1, due_at_ms = $3 \
         WHERE id IN (SELECT id FROM picked) AND due_at_ms <= $1 RETURNING id, sealed, attempts, created_at_ms"
    );
    let rows = database
        .write(move |tx| async move {
            let values = [now_ms.into(), count.into(), held_until_ms.into()];
            let statement = Statement::from_sql_and_values(tx.get_database_backend(), text, values);
            Ok::<_, DbError>(tx.query_all_raw(statement).await?)
        })
        .await?;
    rows.into_iter()
        .map(|row| {
            Ok(Claimed {
                id: row.try_get("", "id")?,
                sealed: row.try_get("", "sealed")?,
                attempts: row.try_get("", "attempts")?,
                created_at_ms: row.try_get("", "created_at_ms")?,
            })
        })
        .collect()
}

/// Makes a claimed row due again at that time; forgets it where there is none. A claim that has passed to another
/// changes nothing.
pub(super) async fn settle(
    database: &Database,
    table: &'static str,
    id: &str,
    attempts: i64,
    again_at_ms: Option<i64>,
) -> Result<(), DbError> {
    let (text, values) = match again_at_ms {
        Some(due_at_ms) => (
            format!("UPDATE {table} SET due_at_ms = $1 WHERE id = $2 AND attempts = $3"),
            vec![due_at_ms.into(), id.into(), attempts.into()],
        ),
        None => (format!("DELETE FROM {table} WHERE id = $1 AND attempts = $2"), vec![id.into(), attempts.into()]),
    };
    database
        .write(move |tx| async move {
            tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), text, values)).await?;
            Ok(())
        })
        .await
}
