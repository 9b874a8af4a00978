//! Brings the audit entries that transactions have written to auth, and forgets them here.
//!
//! Rows are claimed by giving them the id of a batch, which they keep: however often a batch is sent, auth takes it over
//! once. A lease keeps two processes from sending the same, which saves work but is not what correctness rests on.
//! Rows that nobody takes over stay where they are, so a process that ends, however it does, loses none.

use std::time::Duration;

use paperkey_proto::{
    Error,
    auth::v1::{AuditRecord, RecordAuditRequest, audit_intake_service_client::AuditIntakeServiceClient},
};
use sea_orm::{ConnectionTrait, QueryResult, Statement, Value};

use super::make_fit;
use crate::{
    channel::{Channel, ServiceChannel},
    db::{AUDIT_WAKER, Database, DbError},
    ids::new_id,
    lease::Leases,
    principal::Signer,
    service::Worker,
    shutdown::Shutdown,
};

/// Rows of one batch at most: with all their resources they fit into one message.
const BATCH: i64 = 250;
/// How long entries wait for others.
const GATHER: Duration = Duration::from_millis(200);
/// How often is looked for what other processes have written.
const POLL: Duration = Duration::from_secs(1);
/// The longest pause after auth did not take a batch.
const MAX_PAUSE: Duration = Duration::from_secs(5);
const LEASE_NAME: &str = "audit";
/// Longer than a batch takes.
const LEASE: Duration = Duration::from_secs(10);

/// Hands the audit entries in the database of the service of that name to auth, until shut down and once more then.
pub fn relay(database: Database, name: &'static str, auth: &Channel, signer: Signer) -> Worker {
    let client = AuditIntakeServiceClient::new(auth.as_service(name, signer, None));
    Worker::new("audit relay", move |shutdown| {
        let holder = new_id("proc", database.clock());
        Relay { leases: Leases::new(database.clone()), database: database.patient(), holder, client }.run(shutdown)
    })
}

struct Relay {
    database: Database,
    leases: Leases,
    holder: String,
    client: AuditIntakeServiceClient<ServiceChannel>,
}

impl Relay {
    async fn run(mut self, mut shutdown: Shutdown) {
        let waker = self.database.waker(AUDIT_WAKER);
        let mut failures: u32 = 0;
        loop {
            let last = shutdown.has_come();
            match self.hand_over().await {
                Ok(()) => failures = 0,
                Err(error) => {
                    if failures == 0 {
                        let reason = error.reason().as_str_name();
                        tracing::warn!(reason, %error, "audit entries wait in the database");
                    }
                    failures = failures.saturating_add(1);
                }
            }
            if last {
                break;
            }
            let pause =
                if failures == 0 { POLL } else { (GATHER * 2_u32.saturating_pow(failures.min(8))).min(MAX_PAUSE) };
            let woken = async {
                // A new entry is no reason to ask an auth earlier that does not answer.
                if failures == 0 {
                    waker.notified().await;
                    tokio::time::sleep(GATHER).await;
                } else {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = woken => {}
                () = tokio::time::sleep(pause) => {}
                () = shutdown.wait() => {}
            }
        }
        // If this fails, the lease runs out by itself.
        let _ = self.leases.release(LEASE_NAME, &self.holder).await;
    }

    /// Hands over all there is.
    async fn hand_over(&mut self) -> Result<(), Error> {
        loop {
            // A relay that has nothing to do only reads: no lease is kept alive for nothing.
            if !self.is_any().await? || !self.leases.try_hold(LEASE_NAME, &self.holder, LEASE).await? {
                return Ok(());
            }
            let Some((batch_id, records)) = self.claim().await? else { return Ok(()) };
            let request = RecordAuditRequest { batch_id: batch_id.clone(), records };
            self.client.record_audit(request).await.map_err(|status| Error::from_status(&status))?;
            self.forget(batch_id).await?;
        }
    }

    async fn is_any(&self) -> Result<bool, DbError> {
        self.database
            .read(|reader| async move {
                let statement =
                    Statement::from_string(reader.get_database_backend(), "SELECT id FROM audit_entries LIMIT 1");
                Ok(reader.query_one_raw(statement).await?.is_some())
            })
            .await
    }

    /// The batch that was sent and not forgotten, if there is one; else a new one of the oldest rows.
    async fn claim(&self) -> Result<Option<(String, Vec<AuditRecord>)>, DbError> {
        let fresh = new_id("audb", self.database.clock());
        self.database
            .write(move |tx| async move {
                let backend = tx.get_database_backend();
                let sql = "SELECT batch FROM audit_entries WHERE batch IS NOT NULL ORDER BY batch LIMIT 1";
                let begun = tx.query_one_raw(Statement::from_string(backend, sql)).await?;
                let batch = if let Some(row) = begun {
                    row.try_get("", "batch")?
                } else {
                    // Asked twice, so that of two who claim at once the second passes over what the first has.
                    let sql = "UPDATE audit_entries SET batch = $1 WHERE id IN (SELECT id FROM audit_entries \
                         WHERE batch IS NULL ORDER BY id LIMIT $2) AND batch IS NULL";
                    run(&tx, sql, vec![fresh.as_str().into(), BATCH.into()]).await?;
                    fresh
                };
                let sql = "SELECT at_ms, team_id, request_id, actor_kind, actor_id, actor_name, action, resources \
                     FROM audit_entries WHERE batch = $1 ORDER BY id";
                let values = vec![batch.as_str().into()];
                let rows = tx.query_all_raw(Statement::from_sql_and_values(backend, sql, values)).await?;
                let records = rows.iter().map(record_of).collect::<Result<Vec<_>, DbError>>()?;
                Ok::<_, DbError>((!records.is_empty()).then_some((batch, records)))
            })
            .await
    }

    async fn forget(&self, batch: String) -> Result<(), DbError> {
        self.database
            .write(move |tx| async move {
                run(&tx, "DELETE FROM audit_entries WHERE batch = $1", vec![batch.into()]).await
            })
            .await
    }
}

async fn run(tx: &impl ConnectionTrait, sql: &str, values: Vec<Value>) -> Result<(), DbError> {
    tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), sql, values)).await?;
    Ok(())
}

fn record_of(row: &QueryResult) -> Result<AuditRecord, DbError> {
    // An earlier release has written neither the team nor the name.
    let optional = |column| row.try_get::<Option<String>>("", column).map(Option::unwrap_or_default);
    let resources: String = row.try_get("", "resources")?;
    let mut record = AuditRecord {
        at_ms: row.try_get("", "at_ms")?,
        team_id: optional("team_id")?,
        request_id: row.try_get("", "request_id")?,
        actor_kind: row.try_get("", "actor_kind")?,
        actor_id: row.try_get("", "actor_id")?,
        actor_name: optional("actor_name")?,
        rpc: row.try_get("", "action")?,
        resources: serde_json::from_str(&resources).unwrap_or_default(),
        call: None,
    };
    make_fit(&mut record);
    Ok(record)
}
