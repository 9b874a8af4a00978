//! What a job gets: a [`Reader`] or a [`Tx`], and the unit of work in the latter.

use std::{
    any::type_name,
    fmt::Write as _,
    future::Future,
    panic::AssertUnwindSafe,
    sync::{Arc, OnceLock},
    time::Instant,
};

use async_trait::async_trait;
use futures_util::FutureExt as _;
use parking_lot::Mutex;
use sea_orm::{
    ConnectionTrait, DatabaseConnection, DatabaseTransaction, DbBackend, DbErr, ExecResult, QueryResult, Statement,
    Value,
};

use super::{DbError, Engine, Shared, postgres, sqlite::Session};
use crate::telemetry::{self, Span};

/// Rows of one INSERT at most, well below the limits of both engines on bound
/// values.
const ROWS_AN_INSERT: usize = 500;

/// What a job violates that keeps an answer where there is one.
pub(crate) const ANSWER_IS_KEPT: &str = "idempotency.key_hash";
/// Whom a commit with audit entries wakes, beside the relays of the outbox.
pub(crate) const AUDIT_WAKER: &str = "audit";

/// Something another service must learn, once this transaction is durable.
#[derive(Clone, Debug)]
pub struct OutboxMessage {
    /// Which relay takes it.
    pub target: &'static str,
    /// The event's id (`evt_…`), by which the receiver recognises a repetition.
    pub id: String,
    /// What kind of event.
    pub topic: String,
    /// Whose event.
    pub team_id: String,
    /// The body, sealed by the caller.
    pub payload: Vec<u8>,
}

/// Who did what to which resources.
#[derive(Clone, Debug)]
pub struct AuditEntry {
    /// The kind of the actor: a user, a key, the system.
    pub actor_kind: String,
    /// The actor's id.
    pub actor_id: String,
    /// What people call the actor; empty where it has no name.
    pub actor_name: String,
    /// Whose log it belongs to; empty where no team is concerned.
    pub team_id: String,
    /// The path of the rpc.
    pub action: String,
    /// The ids of what was touched.
    pub resources: Vec<String>,
    /// The request in which it happened.
    pub request_id: String,
}

/// The answer to a request, kept for those who ask again with the same key.
#[derive(Clone, Debug)]
pub struct IdempotencyRow {
    /// A hash of credential and key.
    pub key_hash: Vec<u8>,
    /// A hash of the request, to refuse the key for another one.
    pub request_hash: Vec<u8>,
    /// The answer, sealed by the caller.
    pub sealed_response: Vec<u8>,
    /// Until when it is kept.
    pub expires_at_ms: i64,
}

type Hook = Box<dyn FnOnce() + Send>;

/// What a job has collected.
#[derive(Default)]
struct Work {
    outbox: Vec<OutboxMessage>,
    audit: Vec<AuditEntry>,
    idempotency: Option<IdempotencyRow>,
    subjects: Vec<String>,
    /// Whether the feed has something new.
    announces: bool,
    hooks: Vec<Hook>,
    /// Who is woken by the commit.
    targets: Vec<&'static str>,
}

/// What is to be done after a commit.
pub(crate) struct Settlement {
    announces: bool,
    hooks: Vec<Hook>,
    targets: Vec<&'static str>,
}

impl Settlement {
    /// Whether an event was emitted.
    pub(crate) fn emits(&self) -> bool {
        self.targets.iter().any(|target| *target != AUDIT_WAKER)
    }

    /// Runs the hooks, wakes the relays, and tells those who follow the feed.
    pub(crate) fn settle(self, shared: &Shared) {
        for hook in self.hooks {
            if std::panic::catch_unwind(AssertUnwindSafe(hook)).is_err() {
                tracing::error!(service = shared.service, "a hook after a commit panicked");
            }
        }
        for target in self.targets {
            shared.waker(target).notify_one();
        }
        if let Some(bell) = shared.bell.as_ref().filter(|_| self.announces) {
            bell.ring(shared.service);
        }
    }
}

enum TxConnection {
    Sqlite(Session),
    Postgres(DatabaseTransaction),
}

/// The transaction itself; [`Tx`] is the handle that a job holds.
pub(crate) struct TxCore {
    connection: TxConnection,
    work: Mutex<Work>,
    failure: Mutex<Option<DbError>>,
    /// The code of the job, as the compiler calls it.
    origin: OnceLock<&'static str>,
    shared: Arc<Shared>,
}

impl TxCore {
    pub(crate) fn sqlite(session: Session, shared: Arc<Shared>) -> Self {
        Self::new(TxConnection::Sqlite(session), shared)
    }

    pub(crate) fn postgres(transaction: DatabaseTransaction, shared: Arc<Shared>) -> Self {
        Self::new(TxConnection::Postgres(transaction), shared)
    }

    fn new(connection: TxConnection, shared: Arc<Shared>) -> Self {
        Self { connection, work: Mutex::default(), failure: Mutex::default(), origin: OnceLock::new(), shared }
    }

    pub(crate) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// The first statement that failed, if one has.
    pub(crate) fn failure(&self) -> Option<DbError> {
        self.failure.lock().clone()
    }

    /// The PostgreSQL transaction, to end it.
    pub(crate) fn into_transaction(self) -> Option<DatabaseTransaction> {
        match self.connection {
            TxConnection::Postgres(transaction) => Some(transaction),
            TxConnection::Sqlite(_) => None,
        }
    }

    pub(crate) fn take_settlement(&self) -> Settlement {
        let mut work = self.work.lock();
        Settlement {
            announces: work.announces,
            hooks: std::mem::take(&mut work.hooks),
            targets: std::mem::take(&mut work.targets),
        }
    }

    fn backend(&self) -> DbBackend {
        match self.connection {
            TxConnection::Sqlite(_) => DbBackend::Sqlite,
            TxConnection::Postgres(_) => DbBackend::Postgres,
        }
    }

    /// The span of a statement.
    fn span(&self, sql: &str) -> Span {
        telemetry::statement(engine(self.backend()), self.shared.service, sql)
    }

    /// Refuses statements after one has failed, as PostgreSQL does.
    fn start(&self, statement: Option<&Statement>) -> Result<(), DbErr> {
        if self.failure.lock().is_some() {
            let error = DbError::internal("an earlier statement of this transaction failed");
            return Err(error.into_orm());
        }
        self.shared.counters.write_statement();
        if let Some(statement) = statement {
            self.shared.record(self.origin.get().copied().unwrap_or_default(), statement);
        }
        Ok(())
    }

    fn end<T>(&self, span: Span, result: Result<T, DbErr>) -> Result<T, DbErr> {
        if let Err(error) = &result {
            self.failure.lock().get_or_insert_with(|| error.into());
        }
        ended(span, result)
    }

    async fn run(&self, sql: impl Into<String>, values: Vec<Value>) -> Result<ExecResult, DbError> {
        let statement = Statement::from_sql_and_values(self.backend(), sql, values);
        Ok(self.execute_raw(statement).await?)
    }

    /// One INSERT of many rows. `$n` in order is understood by both engines.
    async fn insert(&self, into: &str, rows: Vec<Vec<Value>>) -> Result<(), DbError> {
        let mut rows = rows.into_iter().peekable();
        while rows.peek().is_some() {
            let mut sql = format!("INSERT INTO {into} VALUES ");
            let mut values = Vec::new();
            for (index, row) in rows.by_ref().take(ROWS_AN_INSERT).enumerate() {
                sql.push_str(if index == 0 { "(" } else { ", (" });
                for (column, value) in row.into_iter().enumerate() {
                    values.push(value);
                    let comma = if column == 0 { "" } else { ", " };
                    // Writing to a string does not fail.
                    let _ = write!(sql, "{comma}${}", values.len());
                }
                sql.push(')');
            }
            self.run(sql, values).await?;
        }
        Ok(())
    }

    /// Writes what was collected. The feed comes last: its counter row is locked
    /// from here to the commit, so whoever holds it waits for nothing else.
    async fn flush(&self) -> Result<(), DbError> {
        let (idempotency, outbox, audit, subjects) = {
            let mut work = self.work.lock();
            let outbox = std::mem::take(&mut work.outbox);
            work.targets = outbox.iter().map(|message| message.target).collect();
            work.targets.sort_unstable();
            work.targets.dedup();
            if !work.audit.is_empty() {
                work.targets.push(AUDIT_WAKER);
            }
            (work.idempotency.take(), outbox, std::mem::take(&mut work.audit), std::mem::take(&mut work.subjects))
        };
        let now_ms = self.shared.clock.now_ms();
        if let Some(row) = idempotency {
            self.keep_answer(row, now_ms).await?;
        }
        if !outbox.is_empty() {
            let rows = outbox
                .into_iter()
                .map(|message| {
                    vec![
                        message.target.into(),
                        message.id.into(),
                        message.topic.into(),
                        message.team_id.into(),
                        message.payload.into(),
                        now_ms.into(),
                    ]
                })
                .collect();
            let into = "outbox (target, id, topic, team_id, payload, created_at_ms)";
            self.insert(into, rows).await?;
        }
        if !audit.is_empty() {
            let rows = audit
                .into_iter()
                .map(|entry| {
                    vec![
                        now_ms.into(),
                        entry.actor_kind.into(),
                        entry.actor_id.into(),
                        entry.action.into(),
                        serde_json::Value::from(entry.resources).to_string().into(),
                        entry.request_id.into(),
                        entry.team_id.into(),
                        entry.actor_name.into(),
                    ]
                })
                .collect();
            let into = "audit_entries \
                 (at_ms, actor_kind, actor_id, action, resources, request_id, team_id, actor_name)";
            self.insert(into, rows).await?;
        }
        if self.shared.feed && !subjects.is_empty() {
            self.announce(subjects, now_ms).await?;
            self.work.lock().announces = true;
        }
        Ok(())
    }

    async fn keep_answer(&self, row: IdempotencyRow, now_ms: i64) -> Result<(), DbError> {
        // An expired row gives way; a living one does not.
        let sql = "INSERT INTO idempotency \
             (key_hash, request_hash, sealed_response, expires_at_ms) \
             VALUES ($1, $2, $3, $4) \
             ON CONFLICT (key_hash) DO UPDATE SET \
             request_hash = excluded.request_hash, \
             sealed_response = excluded.sealed_response, \
             expires_at_ms = excluded.expires_at_ms \
             WHERE idempotency.expires_at_ms <= $5";
        let values = vec![
            row.key_hash.into(),
            row.request_hash.into(),
            row.sealed_response.into(),
            row.expires_at_ms.into(),
            now_ms.into(),
        ];
        if self.run(sql, values).await?.rows_affected() == 0 {
            return Err(DbError::UniqueViolation { constraint: ANSWER_IS_KEPT.to_owned() });
        }
        Ok(())
    }

    async fn announce(&self, subjects: Vec<String>, now_ms: i64) -> Result<(), DbError> {
        let count = i64::try_from(subjects.len()).unwrap_or(i64::MAX);
        let statement = Statement::from_sql_and_values(
            self.backend(),
            "UPDATE change_counter SET seq = seq + $1 WHERE id = 1 RETURNING seq",
            [count.into()],
        );
        let last: i64 = match self.query_one_raw(statement).await? {
            Some(row) => row.try_get("", "seq").map_err(DbError::from)?,
            None => return Err(DbError::internal("the counter of changes is missing")),
        };
        let rows = (last - count + 1..)
            .zip(subjects)
            .map(|(seq, subject)| vec![seq.into(), subject.into(), now_ms.into()])
            .collect();
        self.insert("changes (seq, subject, at_ms)", rows).await
    }
}

#[async_trait]
impl ConnectionTrait for TxCore {
    fn get_database_backend(&self) -> DbBackend {
        self.backend()
    }

    async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
        self.start(Some(&statement))?;
        let span = self.span(&statement.sql);
        let result = match &self.connection {
            TxConnection::Sqlite(session) => {
                session.execute(&statement).map(ExecResult::from).map_err(DbError::into_orm)
            }
            TxConnection::Postgres(transaction) => transaction.execute_raw(statement).await,
        };
        self.end(span, result)
    }

    async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
        self.start(None)?;
        let span = self.span(sql);
        let result = match &self.connection {
            TxConnection::Sqlite(session) => session.batch(sql).map(ExecResult::from).map_err(DbError::into_orm),
            TxConnection::Postgres(transaction) => transaction.execute_unprepared(sql).await,
        };
        self.end(span, result)
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        self.start(Some(&statement))?;
        let span = self.span(&statement.sql);
        let result = match &self.connection {
            TxConnection::Sqlite(session) => one_row(session, &statement),
            TxConnection::Postgres(transaction) => transaction.query_one_raw(statement).await,
        };
        self.end(span, result)
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        self.start(Some(&statement))?;
        let span = self.span(&statement.sql);
        let result = match &self.connection {
            TxConnection::Sqlite(session) => all_rows(session, &statement),
            TxConnection::Postgres(transaction) => transaction.query_all_raw(statement).await,
        };
        self.end(span, result)
    }

    fn support_returning(&self) -> bool {
        true
    }
}

fn engine(backend: DbBackend) -> Engine {
    match backend {
        DbBackend::Postgres => Engine::Postgres,
        _ => Engine::Sqlite,
    }
}

/// Ends the span of a statement.
fn ended<T>(mut span: Span, result: Result<T, DbErr>) -> Result<T, DbErr> {
    if result.is_err() {
        span.failed(|| "statement".into());
    }
    result
}

fn one_row(session: &Session, statement: &Statement) -> Result<Option<QueryResult>, DbErr> {
    let rows = session.query(statement, 1).map_err(DbError::into_orm)?;
    Ok(rows.into_iter().next().map(QueryResult::from))
}

fn all_rows(session: &Session, statement: &Statement) -> Result<Vec<QueryResult>, DbErr> {
    let rows = session.query(statement, usize::MAX).map_err(DbError::into_orm)?;
    Ok(rows.into_iter().map(QueryResult::from).collect())
}

/// Runs a job and, if it succeeds, writes what it collected. A panic becomes an
/// error.
pub(crate) async fn drive<T, E, F, Fut>(core: &Arc<TxCore>, job: F) -> Result<T, E>
where
    F: FnOnce(Tx) -> Fut,
    Fut: Future<Output = Result<T, E>>,
    E: From<DbError>,
{
    let tx = Tx { core: Arc::clone(core) };
    // A transaction drives one job.
    let _ = core.origin.set(type_name::<F>());
    let outcome = AssertUnwindSafe(async move { job(tx).await }).catch_unwind().await;
    let value = match outcome {
        Ok(result) => result?,
        Err(_) => return Err(DbError::internal("the job panicked").into()),
    };
    // PostgreSQL would answer the COMMIT of a failed transaction with a
    // rollback, and call that a success.
    if let Some(error) = core.failure() {
        return Err(error.into());
    }
    core.flush().await?;
    Ok(value)
}

/// A transaction, and what is to be written with it. Lent to one job.
pub struct Tx {
    core: Arc<TxCore>,
}

impl Tx {
    /// Tells another service, at least once, through the outbox.
    pub fn emit(&self, message: OutboxMessage) {
        self.core.work.lock().outbox.push(message);
    }

    /// Records who did this.
    pub fn audit(&self, entry: AuditEntry) {
        self.core.work.lock().audit.push(entry);
    }

    /// Keeps the answer for those who repeat the request. If a living answer
    /// exists under the same key, the job fails with
    /// [`DbError::UniqueViolation`] and nothing of it is kept. A second call
    /// replaces the first.
    pub fn idempotency(&self, row: IdempotencyRow) {
        self.core.work.lock().idempotency = Some(row);
    }

    /// The time by which the storage layer writes.
    pub(crate) fn now_ms(&self) -> i64 {
        self.core.shared.clock.now_ms()
    }

    /// Announces that what others may have cached about `subject` is stale.
    pub fn changed(&self, subject: impl Into<String>) {
        self.core.work.lock().subjects.push(subject.into());
    }

    /// Runs `hook` after the commit is durable and before the caller has the
    /// answer. It must be quick, and is never run for a job that failed.
    pub fn after_commit(&self, hook: impl FnOnce() + Send + 'static) {
        self.core.work.lock().hooks.push(Box::new(hook));
    }
}

#[async_trait]
impl ConnectionTrait for Tx {
    fn get_database_backend(&self) -> DbBackend {
        self.core.backend()
    }

    async fn execute_raw(&self, statement: Statement) -> Result<ExecResult, DbErr> {
        self.core.execute_raw(statement).await
    }

    async fn execute_unprepared(&self, sql: &str) -> Result<ExecResult, DbErr> {
        self.core.execute_unprepared(sql).await
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        self.core.query_one_raw(statement).await
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        self.core.query_all_raw(statement).await
    }

    fn support_returning(&self) -> bool {
        true
    }
}

enum ReadConnection {
    Sqlite(Session),
    Pool(DatabaseConnection),
    Snapshot(DatabaseTransaction),
}

/// A connection for reading. Lent to one job.
pub struct Reader {
    connection: ReadConnection,
    shared: Arc<Shared>,
    /// The code of the job, as the compiler calls it.
    origin: &'static str,
}

impl Reader {
    pub(crate) fn sqlite(session: Session, shared: Arc<Shared>, origin: &'static str) -> Self {
        Self { connection: ReadConnection::Sqlite(session), shared, origin }
    }

    pub(crate) fn pool(pool: DatabaseConnection, shared: Arc<Shared>, origin: &'static str) -> Self {
        Self { connection: ReadConnection::Pool(pool), shared, origin }
    }

    pub(crate) fn in_snapshot(transaction: DatabaseTransaction, shared: Arc<Shared>, origin: &'static str) -> Self {
        Self { connection: ReadConnection::Snapshot(transaction), shared, origin }
    }
}

#[async_trait]
impl ConnectionTrait for Reader {
    fn get_database_backend(&self) -> DbBackend {
        match self.connection {
            ReadConnection::Sqlite(_) => DbBackend::Sqlite,
            ReadConnection::Pool(_) | ReadConnection::Snapshot(_) => DbBackend::Postgres,
        }
    }

    async fn execute_raw(&self, _: Statement) -> Result<ExecResult, DbErr> {
        Err(DbError::internal("a reading job does not execute").into_orm())
    }

    async fn execute_unprepared(&self, _: &str) -> Result<ExecResult, DbErr> {
        Err(DbError::internal("a reading job does not execute").into_orm())
    }

    async fn query_one_raw(&self, statement: Statement) -> Result<Option<QueryResult>, DbErr> {
        self.shared.counters.read_statement();
        self.shared.record(self.origin, &statement);
        let span = telemetry::statement(engine(self.get_database_backend()), self.shared.service, &statement.sql);
        let result = match &self.connection {
            ReadConnection::Sqlite(session) => one_row(session, &statement),
            // A statement of its own, which changes nothing: twice is as good as once.
            ReadConnection::Pool(pool) => {
                let began = Instant::now();
                match pool.query_one_raw(statement.clone()).await {
                    Err(error) if postgres::is_worth_another(began, &error) => {
                        match postgres::living(pool, &self.shared).await {
                            Ok(living) => living.query_one_raw(statement).await,
                            Err(error) => Err(error),
                        }
                    }
                    outcome => outcome,
                }
            }
            ReadConnection::Snapshot(transaction) => transaction.query_one_raw(statement).await,
        };
        ended(span, result)
    }

    async fn query_all_raw(&self, statement: Statement) -> Result<Vec<QueryResult>, DbErr> {
        self.shared.counters.read_statement();
        self.shared.record(self.origin, &statement);
        let span = telemetry::statement(engine(self.get_database_backend()), self.shared.service, &statement.sql);
        let result = match &self.connection {
            ReadConnection::Sqlite(session) => all_rows(session, &statement),
            ReadConnection::Pool(pool) => {
                let began = Instant::now();
                match pool.query_all_raw(statement.clone()).await {
                    Err(error) if postgres::is_worth_another(began, &error) => {
                        match postgres::living(pool, &self.shared).await {
                            Ok(living) => living.query_all_raw(statement).await,
                            Err(error) => Err(error),
                        }
                    }
                    outcome => outcome,
                }
            }
            ReadConnection::Snapshot(transaction) => transaction.query_all_raw(statement).await,
        };
        ended(span, result)
    }

    fn support_returning(&self) -> bool {
        true
    }
}
