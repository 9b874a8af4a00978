//! Sealing anew, in the background: what is sealed under another master key than the one that seals now.
//!
//! A column is walked through in the order of its table's key, a few rows at a time, while others read and write it. A row
//! is replaced only where it still holds what was opened, so no change of anybody's is lost; on PostgreSQL one that
//! somebody has locked is left to the next walk, so that two never wait for each other. What cannot be opened is counted
//! and stays as it is.
//!
//! Deliberately absent: how often is walked, and when that is enough.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use sea_orm::{ConnectionTrait as _, Statement, Value};

use super::{KeyId, Keyring, RowKey, SealedColumn, key_named, sealer::head_of};
use crate::db::{Database, DbError, Engine};

/// Rows that one transaction replaces.
const STEP: usize = 50;
/// How often a step is tried that found the database busy.
const TRIES: u32 = 10;
/// How long is waited before it is tried again.
const PATIENCE: Duration = Duration::from_millis(200);
/// Owners of what cannot be opened that are told.
const TOLD: usize = 5;

/// What a walk through a column has found and done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resealed {
    /// Rows that hold something sealed.
    pub rows: u64,
    /// How many of them were found under each key; under none where that cannot be told.
    pub under: BTreeMap<Option<KeyId>, u64>,
    /// Rows that can be opened, in the form that names no key.
    pub unnamed: u64,
    /// Rows that were not as the key of today seals: under another key, or in the form that names none where several are
    /// known.
    pub old: u64,
    /// Rows of these that are now sealed anew.
    pub resealed: u64,
    /// Rows that cannot be opened.
    pub unopened: u64,
    /// The owners of the first of them.
    pub unopened_owners: Vec<String>,
}

impl Resealed {
    /// Rows that could be sealed anew, and are not: somebody else has changed, removed or held them.
    pub fn left(&self) -> u64 {
        self.old - self.unopened - self.resealed
    }

    fn add(&mut self, other: Self) {
        self.rows += other.rows;
        self.unnamed += other.unnamed;
        self.old += other.old;
        self.resealed += other.resealed;
        self.unopened += other.unopened;
        self.unopened_owners.extend(other.unopened_owners);
        self.unopened_owners.truncate(TOLD);
        for (key, rows) in other.under {
            *self.under.entry(key).or_default() += rows;
        }
    }
}

/// Walks through a column once. With `changes`, what is sealed under another key than that of today is sealed anew;
/// otherwise it is only opened. `tell` hears of the sum after each step.
pub async fn reseal(
    database: &Database,
    keys: &Keyring,
    column: &'static SealedColumn,
    changes: bool,
    mut tell: impl FnMut(&Resealed),
) -> Result<Resealed, DbError> {
    let mut sum = Resealed::default();
    let mut after = match column.key {
        RowKey::Text(_) => Value::from(""),
        RowKey::Number(_) => Value::from(i64::MIN),
    };
    loop {
        let rows = patiently(|| step(database, keys, column, after.clone())).await?;
        let Some(last) = rows.last() else { return Ok(sum) };
        after = last.key.clone();
        let (mut done, replacements) = look_at(keys, column, rows);
        if changes && !replacements.is_empty() {
            let began = Instant::now();
            done.resealed = patiently(|| replace(database, column, replacements.clone())).await?;
            // As long as others were kept waiting, they are left alone.
            tokio::time::sleep(began.elapsed()).await;
        }
        sum.add(done);
        tell(&sum);
    }
}

/// A row, with what is sealed unless that is under the key of today.
struct Row {
    key: Value,
    owner: String,
    old: Option<Vec<u8>>,
}

#[derive(Clone)]
struct Replacement {
    key: Value,
    old: Vec<u8>,
    new: Vec<u8>,
}

async fn step(
    database: &Database,
    keys: &Keyring,
    column: &'static SealedColumn,
    after: Value,
) -> Result<Vec<Row>, DbError> {
    let SealedColumn { table, owner, column: sealed, .. } = column;
    let key = column.key.column();
    let head = head_of(keys.master_id());
    let sql = format!(
        "SELECT {key} AS row_key, {owner} AS row_owner, \
         CASE WHEN substr({sealed}, 1, {}) = $1 THEN NULL ELSE {sealed} END AS row_sealed \
         FROM {table} WHERE {key} > $2 AND {sealed} IS NOT NULL ORDER BY {key} LIMIT {STEP}",
        head.len()
    );
    let rows = database
        .read(move |reader| async move {
            let values = [head.to_vec().into(), after];
            let statement = Statement::from_sql_and_values(reader.get_database_backend(), sql, values);
            Ok::<_, DbError>(reader.query_all_raw(statement).await?)
        })
        .await?;
    rows.into_iter()
        .map(|row| {
            let key = match column.key {
                RowKey::Text(_) => Value::from(row.try_get::<String>("", "row_key")?),
                RowKey::Number(_) => Value::from(row.try_get::<i64>("", "row_key")?),
            };
            Ok(Row { key, owner: row.try_get("", "row_owner")?, old: row.try_get("", "row_sealed")? })
        })
        .collect()
}

fn look_at(keys: &Keyring, column: &SealedColumn, rows: Vec<Row>) -> (Resealed, Vec<Replacement>) {
    let sealer = keys.sealer(column.purpose);
    // What names no key is as it should be while there is only one.
    let alone = keys.other_master_ids().is_empty().then(|| keys.master_id());
    let (mut done, mut replacements) = (Resealed::default(), Vec::new());
    for Row { key, owner, old } in rows {
        done.rows += 1;
        let Some(old) = old else {
            *done.under.entry(Some(keys.master_id())).or_default() += 1;
            continue;
        };
        let named = key_named(&old);
        if let Ok(opened) = sealer.open_and_tell(&owner, &old) {
            *done.under.entry(Some(opened.key)).or_default() += 1;
            done.unnamed += u64::from(named.is_none());
            if named.is_none() && alone == Some(opened.key) {
                continue;
            }
            done.old += 1;
            replacements.push(Replacement { key, new: sealer.seal_named(&owner, &opened.plain), old });
        } else {
            done.old += 1;
            *done.under.entry(named).or_default() += 1;
            done.unopened += 1;
            done.unopened_owners.push(owner);
        }
    }
    (done, replacements)
}

async fn replace(
    database: &Database,
    column: &'static SealedColumn,
    replacements: Vec<Replacement>,
) -> Result<u64, DbError> {
    let SealedColumn { table, column: sealed, .. } = column;
    let key = column.key.column();
    let sql = match database.engine() {
        Engine::Sqlite => format!("UPDATE {table} SET {sealed} = $1 WHERE {key} = $2 AND {sealed} = $3"),
        // Whoever holds rows here waits for nobody's.
        Engine::Postgres => format!(
            "UPDATE {table} SET {sealed} = $1 WHERE {key} = \
             (SELECT {key} FROM {table} WHERE {key} = $2 FOR UPDATE SKIP LOCKED) AND {sealed} = $3"
        ),
    };
    database
        .write(move |tx| async move {
            let mut replaced = 0;
            for Replacement { key, old, new } in replacements {
                let values = [new.into(), key, old.into()];
                let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql.as_str(), values);
                replaced += tx.execute_raw(statement).await?.rows_affected();
            }
            Ok(replaced)
        })
        .await
}

/// Tries again what found the database busy: nothing of it was kept.
async fn patiently<T, Fut>(work: impl Fn() -> Fut) -> Result<T, DbError>
where
    Fut: Future<Output = Result<T, DbError>>,
{
    let mut tries = 0;
    loop {
        tries += 1;
        match work().await {
            Err(error) if error.is_retryable() && tries < TRIES => tokio::time::sleep(PATIENCE).await,
            outcome => return outcome,
        }
    }
}
