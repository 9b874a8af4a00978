//! Stored answers: looking one up, and forgetting the old ones. They are stored
//! by [`super::Tx::idempotency`], in the transaction they answer for.

use sea_orm::{ConnectionTrait, Statement};

use super::{Database, DbError};

/// An answer given before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredAnswer {
    /// The hash of the request it answered.
    pub request_hash: Vec<u8>,
    /// The answer, sealed.
    pub sealed_response: Vec<u8>,
}

/// The living answer stored under a key, if there is one.
pub async fn find_answer(
    connection: &impl ConnectionTrait,
    key_hash: &[u8],
    now_ms: i64,
) -> Result<Option<StoredAnswer>, DbError> {
    let statement = Statement::from_sql_and_values(
        connection.get_database_backend(),
        "SELECT request_hash, sealed_response FROM idempotency \
         WHERE key_hash = $1 AND expires_at_ms > $2",
        [key_hash.to_vec().into(), now_ms.into()],
    );
    let Some(row) = connection.query_one_raw(statement).await? else {
        return Ok(None);
    };
    Ok(Some(StoredAnswer {
        request_hash: row.try_get("", "request_hash")?,
        sealed_response: row.try_get("", "sealed_response")?,
    }))
}

/// Forgets at most `limit` answers that have expired, and says how many it were.
pub async fn prune_answers(database: &Database, limit: u32) -> Result<u64, DbError> {
    let now_ms = database.clock().now_ms();
    database
        .write(move |tx| async move {
            let statement = Statement::from_sql_and_values(
                tx.get_database_backend(),
                "DELETE FROM idempotency WHERE key_hash IN (SELECT key_hash FROM idempotency \
                 WHERE expires_at_ms <= $1 ORDER BY expires_at_ms LIMIT $2)",
                [now_ms.into(), i64::from(limit).into()],
            );
            Ok(tx.execute_raw(statement).await?.rows_affected())
        })
        .await
}
