//! Leases: one holder at a time, for a while.
//!
//! A conditional upsert decides, on both engines. The times come from the clocks
//! of the holders, so a lease is a way to avoid double work, not a proof that
//! there is none: what is done under one must bear being done twice.
//!
//! A lease that was taken before a clock was set back ends long after it should.
//! Nobody waits for that: an end that lies further ahead than twice the time for
//! which the lease is held is one that no living holder has set. So all who hold
//! a lease of one name hold it for the same time.

use std::time::Duration;

use sea_orm::{ConnectionTrait as _, Statement, Value};

use crate::db::{Database, DbError};

/// The leases of one database.
#[derive(Clone, Debug)]
pub struct Leases {
    database: Database,
}

impl Leases {
    /// The leases in this database.
    pub fn new(database: Database) -> Self {
        // Who loses a lease for want of room hands on more work than it saves.
        Self { database: database.patient() }
    }

    /// Takes the lease if it is free, expired, held by `holder` already, or held
    /// for longer than anybody holds it, and says whether it is held now.
    pub async fn try_hold(&self, name: &str, holder: &str, ttl: Duration) -> Result<bool, DbError> {
        let now_ms = self.database.clock().now_ms();
        let ends_ms = until_ms(now_ms, ttl);
        let believable_ms = until_ms(now_ms, ttl.saturating_mul(2));
        let values: Vec<Value> =
            vec![name.into(), holder.into(), until_ms(now_ms, ttl).into(), now_ms.into(), believable_ms.into()];
        let held = self.change(
            "INSERT INTO leases (name, holder, until_ms) VALUES ($1, $2, $3) \
             ON CONFLICT (name) DO UPDATE SET \
             holder = excluded.holder, until_ms = excluded.until_ms \
             WHERE leases.until_ms <= $4 OR leases.until_ms > $5 OR leases.holder = excluded.holder",
            values,
        );
        let held = held.await?;
        self.database.figures().leased(name, if held { ends_ms } else { i64::MIN });
        Ok(held)
    }

    /// Prolongs the lease, and says whether it is still held. Unlike
    /// [`Self::try_hold`] it does not take back one that has expired. One whose
    /// end lies too far ahead is still held by whoever is named in it: from then
    /// on it ends when it should.
    pub async fn renew(&self, name: &str, holder: &str, ttl: Duration) -> Result<bool, DbError> {
        let now_ms = self.database.clock().now_ms();
        let values: Vec<Value> = vec![until_ms(now_ms, ttl).into(), name.into(), holder.into(), now_ms.into()];
        let ends_ms = until_ms(now_ms, ttl);
        let held = self.change(
            "UPDATE leases SET until_ms = $1 \
             WHERE name = $2 AND holder = $3 AND until_ms > $4",
            values,
        );
        let held = held.await?;
        self.database.figures().leased(name, if held { ends_ms } else { i64::MIN });
        Ok(held)
    }

    /// Gives the lease back, and says whether it was held.
    pub async fn release(&self, name: &str, holder: &str) -> Result<bool, DbError> {
        let values: Vec<Value> = vec![name.into(), holder.into()];
        self.database.figures().leased(name, i64::MIN);
        self.change("DELETE FROM leases WHERE name = $1 AND holder = $2", values).await
    }

    /// Ends all leases, whoever holds them. For a process that is the only one on this database: what it finds there
    /// is held by one that is no more.
    pub async fn end_all(&self) -> Result<(), DbError> {
        self.change("DELETE FROM leases", Vec::new()).await.map(drop)
    }

    async fn change(&self, sql: &'static str, values: Vec<Value>) -> Result<bool, DbError> {
        self.database
            .write(move |tx| async move {
                let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql, values);
                Ok(tx.execute_raw(statement).await?.rows_affected() > 0)
            })
            .await
    }
}

fn until_ms(now_ms: i64, ttl: Duration) -> i64 {
    now_ms.saturating_add(i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX))
}
