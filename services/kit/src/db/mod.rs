//! Storage: one API, two engines.
//!
//! A service opens one [`Database`], reads through [`Database::read`] and
//! changes things through [`Database::write`]. Both hand the job a connection
//! that speaks sea-orm's `ConnectionTrait`, so that a store is written once.
//! [`Tx`] is also the unit of work: the outbox rows, the audit entry, the
//! idempotency row and the changes a job collects are written in its own
//! transaction, or not at all.
//!
//! What holds on both engines:
//! * an answer of `write` comes after the commit is durable, and a caller who
//!   goes away does not abort what he submitted;
//! * once a statement has failed, its transaction is lost: later statements are
//!   refused and the job's `Ok` becomes that error. Where a conflict is
//!   expected, say so in the statement (`ON CONFLICT`);
//! * a job awaits its own database calls and nothing else, because others may
//!   queue behind it;
//! * an integer is `i64` in an entity, a yes or no is `bool` on a column
//!   declared `boolean`, JSON is text, and columns are read by name (a row from
//!   SQLite is ordered by name, so `into_tuple` would mix them up).
//!
//! Deliberately absent: transactions that a caller opens, keeps and forgets;
//! retries, since only the caller knows whether twice is once.

mod error;
mod idempotency;
mod migrate;
mod postgres;
mod sqlite;
mod tx;

use std::{
    collections::HashMap,
    fmt,
    future::Future,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use sea_orm::{ConnectionTrait as _, Statement};
use tokio::sync::Notify;

use crate::clock::Clock;

pub use error::{DbError, is_unique_violation};
pub use idempotency::{StoredAnswer, find_answer, prune_answers};
pub use migrate::{MigrationState, MigrationStatus};
pub(crate) use tx::{ANSWER_IS_KEPT, AUDIT_WAKER};
pub use tx::{AuditEntry, IdempotencyRow, OutboxMessage, Reader, Tx};

/// Which engine stands behind a database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// One file in the data folder.
    Sqlite,
    /// A schema of a PostgreSQL database, or of one that speaks its protocol.
    Postgres,
}

/// Where a database is.
#[derive(Clone, PartialEq, Eq)]
pub enum DatabaseUrl {
    /// The folder that holds one file for each service.
    Sqlite {
        /// The data folder; made if missing.
        folder: PathBuf,
    },
    /// A `postgres://` URL. It may hold a password and is never printed.
    Postgres(String),
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite { folder } => f.debug_struct("Sqlite").field("folder", folder).finish(),
            Self::Postgres(_) => f.write_str("Postgres(redacted)"),
        }
    }
}

/// How to open a database. [`DatabaseOptions::new`] fills in what rarely
/// matters.
#[derive(Clone)]
pub struct DatabaseOptions {
    /// The service whose data this is: `auth` lives in the file `auth.db` or in
    /// the schema `auth`. Lower-case letters and underscores.
    pub service: &'static str,
    /// Where it is.
    pub url: DatabaseUrl,
    /// Gives the times that the storage layer itself writes.
    pub clock: Clock,
    /// Connections of the pool on PostgreSQL, readers on SQLite.
    pub max_connections: u32,
    /// How long a job waits for a connection, a reader or a place in the
    /// writer's queue before it is refused as [`DbError::Busy`].
    pub acquire_timeout: Duration,
    /// How long one job may run.
    pub job_timeout: Duration,
    /// Jobs that may wait for the SQLite writer.
    pub queue_len: usize,
    /// Whether [`Tx::changed`] writes to the feed. A service whose caches live
    /// in the one process that owns the file needs no feed.
    pub feed: bool,
}

impl DatabaseOptions {
    /// Options with the usual limits.
    pub fn new(service: &'static str, url: DatabaseUrl, clock: Clock) -> Self {
        Self {
            service,
            url,
            clock,
            max_connections: 8,
            acquire_timeout: Duration::from_secs(5),
            job_timeout: Duration::from_secs(15),
            queue_len: 4096,
            feed: true,
        }
    }
}

impl fmt::Debug for DatabaseOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DatabaseOptions")
            .field("service", &self.service)
            .field("url", &self.url)
            .field("max_connections", &self.max_connections)
            .field("acquire_timeout", &self.acquire_timeout)
            .field("job_timeout", &self.job_timeout)
            .field("queue_len", &self.queue_len)
            .field("feed", &self.feed)
            .finish_non_exhaustive()
    }
}

/// What a database has done since it was opened. The numbers only grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DbStats {
    /// Jobs given to [`Database::read`] and [`Database::snapshot`].
    pub read_jobs: u64,
    /// Statements of these jobs.
    pub read_statements: u64,
    /// Jobs given to [`Database::write`].
    pub write_jobs: u64,
    /// Statements of these jobs, reading ones included.
    pub write_statements: u64,
    /// Commits. On SQLite fewer than jobs, since a group shares one.
    pub commits: u64,
}

impl DbStats {
    /// Everything that reached the database: zero difference between two
    /// readings means no access at all.
    pub fn statements(&self) -> u64 {
        self.read_statements + self.write_statements
    }
}

#[derive(Default)]
pub(crate) struct Counters {
    read_jobs: AtomicU64,
    read_statements: AtomicU64,
    write_jobs: AtomicU64,
    write_statements: AtomicU64,
    commits: AtomicU64,
}

impl Counters {
    fn read_statement(&self) {
        self.read_statements.fetch_add(1, Ordering::Relaxed);
    }

    fn write_statement(&self) {
        self.write_statements.fetch_add(1, Ordering::Relaxed);
    }

    fn commit(&self) {
        self.commits.fetch_add(1, Ordering::Relaxed);
    }

    fn stats(&self) -> DbStats {
        DbStats {
            read_jobs: self.read_jobs.load(Ordering::Relaxed),
            read_statements: self.read_statements.load(Ordering::Relaxed),
            write_jobs: self.write_jobs.load(Ordering::Relaxed),
            write_statements: self.write_statements.load(Ordering::Relaxed),
            commits: self.commits.load(Ordering::Relaxed),
        }
    }
}

/// What all parts of one database have in common.
pub(crate) struct Shared {
    service: &'static str,
    clock: Clock,
    feed: bool,
    acquire_timeout: Duration,
    job_timeout: Duration,
    counters: Counters,
    wakers: Mutex<HashMap<&'static str, Arc<Notify>>>,
}

impl Shared {
    fn waker(&self, target: &'static str) -> Arc<Notify> {
        Arc::clone(self.wakers.lock().entry(target).or_default())
    }
}

/// A service's database. Cloning it gives another handle to the same one.
#[derive(Clone)]
pub struct Database {
    backend: Backend,
    shared: Arc<Shared>,
    url: DatabaseUrl,
}

#[derive(Clone)]
enum Backend {
    Sqlite { writer: Arc<sqlite::Writer>, readers: Arc<sqlite::Readers>, path: PathBuf },
    Postgres(sea_orm::DatabaseConnection),
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Database")
            .field("service", &self.shared.service)
            .field("engine", &self.engine())
            .finish_non_exhaustive()
    }
}

impl Database {
    /// Opens the database without touching its schema.
    ///
    /// The SQLite file is made if missing. PostgreSQL is dialled when it is
    /// first needed, so that services may start in any order; [`Self::ping`]
    /// tells whether it is there.
    pub async fn open(options: DatabaseOptions) -> Result<Self, DbError> {
        let plain = |byte: u8| byte.is_ascii_lowercase() || byte == b'_';
        if options.service.is_empty() || !options.service.bytes().all(plain) {
            return Err(DbError::internal("a service is named by lower-case letters and underscores"));
        }
        let shared = Arc::new(Shared {
            service: options.service,
            clock: options.clock.clone(),
            feed: options.feed,
            acquire_timeout: options.acquire_timeout,
            job_timeout: options.job_timeout,
            counters: Counters::default(),
            wakers: Mutex::default(),
        });
        let backend = match &options.url {
            DatabaseUrl::Sqlite { folder } => {
                let path = folder.join(format!("{}.db", options.service));
                let opening = path.clone();
                let connection = tokio::task::spawn_blocking(move || {
                    sqlite::create_file(&opening)?;
                    sqlite::connect(&opening, sqlite::Role::Write)
                })
                .await
                .map_err(|_| DbError::unavailable("opening was interrupted"))??;
                let most = usize::try_from(options.max_connections).unwrap_or(usize::MAX);
                let readers = sqlite::Readers::new(path.clone(), most.clamp(1, 64), Arc::clone(&shared));
                let writer =
                    sqlite::Writer::start(options.service, connection, options.queue_len.max(1), Arc::clone(&shared))?;
                Backend::Sqlite { writer: Arc::new(writer), readers: Arc::new(readers), path }
            }
            DatabaseUrl::Postgres(url) => Backend::Postgres(postgres::pool(url, &options).await?),
        };
        Ok(Self { backend, shared, url: options.url })
    }

    /// Which engine this is.
    pub fn engine(&self) -> Engine {
        match self.backend {
            Backend::Sqlite { .. } => Engine::Sqlite,
            Backend::Postgres(_) => Engine::Postgres,
        }
    }

    /// The clock whose times this database writes.
    pub fn clock(&self) -> &Clock {
        &self.shared.clock
    }

    /// Runs a reading job.
    ///
    /// On SQLite the job sees one snapshot. On PostgreSQL each statement sees
    /// its own and costs one round trip; a job that compares what two
    /// statements found wants [`Self::snapshot`].
    pub async fn read<T, E, F, Fut>(&self, job: F) -> Result<T, E>
    where
        F: FnOnce(Reader) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, E>> + Send + 'static,
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
    {
        self.shared.counters.read_jobs.fetch_add(1, Ordering::Relaxed);
        match &self.backend {
            Backend::Sqlite { readers, .. } => readers.run(job).await,
            Backend::Postgres(pool) => {
                let reader = Reader::pool(pool.clone(), Arc::clone(&self.shared));
                postgres::limited(&self.shared, job(reader)).await
            }
        }
    }

    /// Runs a reading job which sees one snapshot on both engines.
    pub async fn snapshot<T, E, F, Fut>(&self, job: F) -> Result<T, E>
    where
        F: FnOnce(Reader) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, E>> + Send + 'static,
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
    {
        self.shared.counters.read_jobs.fetch_add(1, Ordering::Relaxed);
        match &self.backend {
            Backend::Sqlite { readers, .. } => readers.run(job).await,
            Backend::Postgres(pool) => postgres::snapshot(pool, &self.shared, job).await,
        }
    }

    /// Runs a job in a transaction, writes what it collected, commits, runs its
    /// hooks, and then answers.
    ///
    /// An `Err` of the job, a panic in it or a failed commit takes everything
    /// back. Dropping the returned future does not abort a submitted job.
    pub async fn write<T, E, F, Fut>(&self, job: F) -> Result<T, E>
    where
        F: FnOnce(Tx) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, E>> + Send + 'static,
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
    {
        self.shared.counters.write_jobs.fetch_add(1, Ordering::Relaxed);
        match &self.backend {
            Backend::Sqlite { writer, .. } => writer.run(job).await,
            Backend::Postgres(pool) => postgres::write(pool, &self.shared, job).await,
        }
    }

    /// Whether the database answers.
    pub async fn ping(&self) -> Result<(), DbError> {
        self.read(|reader| async move {
            let statement = Statement::from_string(reader.get_database_backend(), "SELECT 1 AS up");
            reader.query_one_raw(statement).await?;
            Ok(())
        })
        .await
    }

    /// What was done so far.
    pub fn stats(&self) -> DbStats {
        self.shared.counters.stats()
    }

    /// Refuses new work, finishes what was submitted, and lets go of the
    /// database. Holds for all clones of this handle.
    pub async fn close(self) {
        match &self.backend {
            Backend::Sqlite { writer, .. } => writer.close().await,
            Backend::Postgres(pool) => {
                // The pool waits for connections in use to come back.
                let _ = pool.clone().close().await;
            }
        }
    }

    /// Fires after each commit that emitted to the target.
    pub(crate) fn waker(&self, target: &'static str) -> Arc<Notify> {
        self.shared.waker(target)
    }
}
