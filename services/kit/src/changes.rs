//! The feed of changes: what others may have cached and must drop.
//!
//! [`crate::db::Tx::changed`] appends to it inside the change's own transaction,
//! with numbers from one locked counter row: a number that a reader has seen is
//! never followed by the late commit of a smaller one. A reader asks for what
//! came after the number it knows. Old rows are forgotten, and a reader that
//! slept through that learns so.
//!
//! The [`bell`] tells readers that there may be something new, where there is a Redis to tell it.
//!
//! Deliberately absent: any meaning of a subject. It is a string that its writer
//! and its readers agree on.

pub mod bell;

use std::time::Duration;

use sea_orm::{ConnectionTrait as _, Statement};

use crate::db::{Database, DbError};

/// Subjects of one answer at most.
pub const PAGE: usize = 1000;

/// What happened since a number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Changes {
    /// The next subjects, in the order of their commits.
    Page {
        /// Ask again from here.
        latest_seq: i64,
        /// What has changed.
        subjects: Vec<String>,
        /// Whether asking again at once would bring more.
        more: bool,
    },
    /// Some were missed (they are forgotten, or the database is another one):
    /// drop everything, then ask from `latest_seq`.
    Gap {
        /// Ask again from here.
        latest_seq: i64,
    },
}

/// What happened after `seq`. One statement, so one snapshot and one round trip. It waits for no caller's job: where it
/// came late, nobody could trust what is remembered any more, and all of them would ask at once.
pub async fn changes_since(database: &Database, seq: i64) -> Result<Changes, DbError> {
    let limit = i64::try_from(PAGE).unwrap_or(i64::MAX);
    let rows = database
        .read_vital(move |reader| async move {
            let statement = Statement::from_sql_and_values(
                reader.get_database_backend(),
                "SELECT c.seq AS latest_seq, c.pruned_seq AS pruned_seq, \
                 f.seq AS seq, f.subject AS subject FROM change_counter c LEFT JOIN \
                 (SELECT seq, subject FROM changes WHERE seq > $1 ORDER BY seq LIMIT $2) f \
                 ON 1 = 1 WHERE c.id = 1 ORDER BY f.seq",
                [seq.into(), limit.into()],
            );
            Ok::<_, DbError>(reader.query_all_raw(statement).await?)
        })
        .await?;
    let Some(first) = rows.first() else {
        return Err(DbError::Internal("the counter of changes is missing".to_owned()));
    };
    let mut latest_seq: i64 = first.try_get("", "latest_seq")?;
    let pruned_seq: i64 = first.try_get("", "pruned_seq")?;
    if seq < pruned_seq || seq > latest_seq {
        return Ok(Changes::Gap { latest_seq });
    }
    let more = rows.len() == PAGE;
    let mut subjects = Vec::with_capacity(rows.len());
    for row in &rows {
        // The outer join gives one row without a subject when there is none.
        if let Some(subject) = row.try_get::<Option<String>>("", "subject")? {
            subjects.push(subject);
        }
    }
    if let (true, Some(last)) = (more, rows.last()) {
        latest_seq = last.try_get("", "seq")?;
    }
    Ok(Changes::Page { latest_seq, subjects, more })
}

/// The number of the latest change: where a reader with an empty cache begins.
pub async fn latest_seq(database: &Database) -> Result<i64, DbError> {
    let row = database
        .read(|reader| async move {
            let statement =
                Statement::from_string(reader.get_database_backend(), "SELECT seq FROM change_counter WHERE id = 1");
            Ok::<_, DbError>(reader.query_one_raw(statement).await?)
        })
        .await?;
    match row {
        Some(row) => Ok(row.try_get("", "seq")?),
        None => Err(DbError::Internal("the counter of changes is missing".to_owned())),
    }
}

/// Forgets changes older than `keep`, and says how many they were. The numbers
/// go on.
pub async fn prune_changes(database: &Database, keep: Duration) -> Result<u64, DbError> {
    let keep_ms = i64::try_from(keep.as_millis()).unwrap_or(i64::MAX);
    let before_ms = database.clock().now_ms().saturating_sub(keep_ms);
    database
        .write(move |tx| async move {
            let backend = tx.get_database_backend();
            // Up to the first young one, so that what stays has no holes even if
            // the clocks of the writers disagree. One statement, lest a change
            // commits between looking for young ones and taking all.
            let found = tx
                .query_one_raw(Statement::from_sql_and_values(
                    backend,
                    "SELECT COALESCE((SELECT MIN(seq) FROM changes WHERE at_ms >= $1) - 1, \
                     (SELECT MAX(seq) FROM changes), 0) AS seq",
                    [before_ms.into()],
                ))
                .await?;
            let last: i64 = match found {
                Some(row) => row.try_get("", "seq")?,
                None => 0,
            };
            let removed = tx
                .execute_raw(Statement::from_sql_and_values(
                    backend,
                    "DELETE FROM changes WHERE seq <= $1",
                    [last.into()],
                ))
                .await?
                .rows_affected();
            if removed > 0 {
                tx.execute_raw(Statement::from_sql_and_values(
                    backend,
                    "UPDATE change_counter SET pruned_seq = $1 WHERE id = 1 AND pruned_seq < $2",
                    [last.into(), last.into()],
                ))
                .await?;
            }
            Ok(removed)
        })
        .await
}
