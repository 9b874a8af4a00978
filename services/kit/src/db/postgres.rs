//! The PostgreSQL half: a bounded pool, one transaction a job.
//!
//! A server that was started again leaves a pool of dead connections behind. The
//! first statement on each finds that out. Where it begins a transaction, another
//! connection is tried: as often as there are connections that may be dead, and
//! once more. A read that failed at once is tried again, once, on a connection
//! that is known to live: it may be what has ended the first. A COMMIT is never
//! tried twice.
//!
//! Deliberately absent: a ping before each use of a connection. It would double
//! the round trips to find out what the statement itself finds out.

use std::{
    any::type_name,
    future::Future,
    sync::Arc,
    time::{Duration, Instant},
};

use sea_orm::{
    AccessMode, ConnectOptions, DatabaseConnection, DatabaseTransaction, DbErr, IsolationLevel, TransactionTrait as _,
    sqlx::{AssertSqlSafe, Executor as _},
};

use super::{DatabaseOptions, DbError, Engine, Reader, Shared, Tx, error::is_dead_connection, tx, tx::TxCore};
use crate::{
    fail_point::{self, Point},
    telemetry,
};

/// What was given a dead connection fails as soon. What fails later was being done.
const AT_ONCE: Duration = Duration::from_millis(100);

/// A pool of at most that many connections, which work in the service's own schema.
pub(super) async fn pool(url: &str, options: &DatabaseOptions, most: u32) -> Result<DatabaseConnection, DbError> {
    let mut connect = ConnectOptions::new(url);
    connect
        .max_connections(most)
        .min_connections(0)
        .acquire_timeout(options.acquire_timeout)
        .idle_timeout(Duration::from_mins(5))
        .max_lifetime(Duration::from_mins(30))
        .test_before_acquire(false)
        .connect_lazy(true)
        .sqlx_logging(false)
        .record_stmt_in_spans(false);
    // One round trip for all that a session needs. The isolation is set here,
    // because setting it in each transaction would cost a round trip there.
    let limit_ms = options.job_timeout.as_millis();
    let prepare = format!(
        "SET search_path = \"{}\"; SET statement_timeout = {limit_ms}; \
         SET idle_in_transaction_session_timeout = {limit_ms}; \
         SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL READ COMMITTED",
        options.service
    );
    connect.map_sqlx_postgres_pool_opts(move |pool| {
        let prepare = prepare.clone();
        pool.after_connect(move |connection, _| {
            let prepare = prepare.clone();
            Box::pin(async move {
                connection.execute(AssertSqlSafe(prepare)).await?;
                Ok(())
            })
        })
    });
    Ok(sea_orm::Database::connect(connect).await?)
}

/// A single connection for the migrator, which may take its time.
pub(super) async fn migration_connection(url: &str, service: &str) -> Result<DatabaseConnection, DbError> {
    let mut connect = ConnectOptions::new(url);
    connect
        .max_connections(1)
        .min_connections(0)
        .acquire_timeout(Duration::from_secs(10))
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        .sqlx_logging(false)
        .set_schema_search_path(service);
    Ok(sea_orm::Database::connect(connect).await?)
}

/// Whether a statement of its own, which reads, may be given another connection: the first that it had was dead.
pub(super) fn is_worth_another(began: Instant, error: &DbErr) -> bool {
    is_dead_connection(error) && began.elapsed() < AT_ONCE
}

/// A connection that lives: it has begun a transaction, which is rolled back when this goes.
pub(super) async fn living(pool: &DatabaseConnection, shared: &Shared) -> Result<DatabaseTransaction, DbErr> {
    begin(pool, shared, Some((IsolationLevel::ReadCommitted, AccessMode::ReadOnly))).await
}

/// Begins a transaction on a living connection.
async fn begin(
    pool: &DatabaseConnection,
    shared: &Shared,
    kind: Option<(IsolationLevel, AccessMode)>,
) -> Result<DatabaseTransaction, DbErr> {
    let (isolation, access) = kind.unzip();
    // All of the pool may be dead, but none that is opened after that.
    for _ in 0..shared.max_connections {
        match pool.begin_with_config(isolation, access).await {
            Err(error) if is_dead_connection(&error) => {}
            outcome => return outcome,
        }
    }
    pool.begin_with_config(isolation, access).await
}

/// Gives a job the time it may have.
pub(super) async fn limited<T, E: From<DbError>>(
    shared: &Shared,
    job: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    match tokio::time::timeout(shared.job_timeout, job).await {
        Ok(result) => result,
        Err(_) => Err(DbError::busy("the job took too long").into()),
    }
}

/// Runs a reading job on one snapshot.
pub(super) async fn snapshot<T, E, F, Fut>(pool: &DatabaseConnection, shared: &Arc<Shared>, job: F) -> Result<T, E>
where
    F: FnOnce(Reader) -> Fut,
    Fut: Future<Output = Result<T, E>>,
    E: From<DbError>,
{
    let kind = Some((IsolationLevel::RepeatableRead, AccessMode::ReadOnly));
    let transaction = begin(pool, shared, kind).await.map_err(DbError::from)?;
    // Dropped with the job, which rolls it back: nothing was changed.
    let reader = Reader::in_snapshot(transaction, Arc::clone(shared), type_name::<F>());
    limited(shared, job(reader)).await
}

/// Runs a job in a transaction of its own, in a task of its own.
pub(super) async fn write<T, E, F, Fut>(
    pool: &DatabaseConnection,
    shared: &Arc<Shared>,
    job: F,
    is_patient: bool,
) -> Result<T, E>
where
    F: FnOnce(Tx) -> Fut + Send + 'static,
    Fut: Future<Output = Result<T, E>> + Send + 'static,
    T: Send + 'static,
    E: From<DbError> + Send + 'static,
{
    let room = shared.room(is_patient).await?;
    let pool = pool.clone();
    let shared = Arc::clone(shared);
    let task = async move {
        let _room = room;
        in_transaction(&pool, shared, job).await
    };
    match tokio::spawn(telemetry::carried(task)).await {
        Ok(result) => result,
        Err(_) => Err(DbError::unavailable("the job was interrupted").into()),
    }
}

async fn in_transaction<T, E, F, Fut>(pool: &DatabaseConnection, shared: Arc<Shared>, job: F) -> Result<T, E>
where
    F: FnOnce(Tx) -> Fut,
    Fut: Future<Output = Result<T, E>>,
    E: From<DbError>,
{
    let transaction = begin(pool, &shared, None).await.map_err(DbError::from)?;
    let core = Arc::new(TxCore::postgres(transaction, Arc::clone(&shared)));
    let result = limited(&shared, tx::drive(&core, job)).await;
    let settlement = core.take_settlement();
    let Some(transaction) = Arc::into_inner(core).and_then(TxCore::into_transaction) else {
        return Err(DbError::internal("the database handle outlived its job").into());
    };
    match result {
        Ok(value) => {
            fail_point::reach_if(Point::OutboxBeforeCommit, || settlement.emits());
            let span = telemetry::statement(Engine::Postgres, shared.service, "COMMIT");
            transaction.commit().await.map_err(DbError::from)?;
            drop(span);
            fail_point::reach_if(Point::OutboxAfterCommit, || settlement.emits());
            shared.counters.commit();
            settlement.settle(&shared);
            Ok(value)
        }
        Err(error) => {
            // If this fails the connection is broken, and the server rolls back.
            let _ = transaction.rollback().await;
            Err(error)
        }
    }
}
