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

mod checked;
mod error;
mod figures;
mod idempotency;
mod migrate;
mod postgres;
mod sqlite;
mod statements;
mod tx;

use std::{
    any::type_name,
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
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::{
    changes::bell::{Bell, Rhythm},
    clock::Clock,
};

use figures::Measured;

pub use checked::{check, checked};
pub use error::{DbError, is_unique_violation};
pub use figures::{Figures, JobKind, OutboxFigures, PoolFigures};
pub use idempotency::{StoredAnswer, find_answer, prune_answers};
pub use migrate::{MigrationState, MigrationStatus, migration_names};
pub use sqlite::{Copied, Snapshot, Snapshots};
pub use statements::{Recorded, Statements};
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

/// Which connections a job may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lane {
    /// Those that callers share.
    Usual,
    /// One that no caller takes.
    Vital,
}

/// How many jobs may wait for each connection of a pool. What comes after them would be answered too late for anybody.
const WAITING_FOR_EACH: usize = 64;

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
    /// Connections of the pool on PostgreSQL, readers on SQLite. One more is for [`Database::read_vital`].
    pub max_connections: u32,
    /// How long a job waits for a connection or a reader before it is refused
    /// as [`DbError::Busy`]. Where too many wait already, it is refused at once
    /// as [`DbError::Overloaded`].
    pub acquire_timeout: Duration,
    /// How long one job may run.
    pub job_timeout: Duration,
    /// Jobs that may wait for the SQLite writer.
    pub queue_len: usize,
    /// Whether [`Tx::changed`] writes to the feed. A service whose caches live
    /// in the one process that owns the file needs no feed.
    pub feed: bool,
    /// Rung by each commit that writes to the feed.
    pub bell: Option<Bell>,
    /// Keeps what the database is asked; only where plans are judged, in tests.
    pub statements: Option<Arc<Statements>>,
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
            bell: None,
            statements: None,
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
    /// Jobs that were refused because too many waited.
    pub refused: u64,
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
    refused: AtomicU64,
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
            refused: self.refused.load(Ordering::Relaxed),
        }
    }
}

/// What all parts of one database have in common.
pub(crate) struct Shared {
    service: &'static str,
    clock: Clock,
    feed: bool,
    bell: Option<Bell>,
    acquire_timeout: Duration,
    job_timeout: Duration,
    counters: Counters,
    figures: Figures,
    statements: Option<Arc<Statements>>,
    /// Room for those who use a connection and those who wait for one.
    room: Arc<Semaphore>,
    max_connections: u32,
    wakers: Mutex<HashMap<&'static str, Arc<Notify>>>,
}

impl Shared {
    fn record(&self, origin: &'static str, statement: &Statement) {
        if let Some(statements) = &self.statements {
            statements.record(origin, statement);
        }
    }

    /// Room for a job, or a refusal where too many wait already. Who is patient waits for it as long as for a connection.
    async fn room(&self, is_patient: bool) -> Result<OwnedSemaphorePermit, DbError> {
        match Arc::clone(&self.room).try_acquire_owned() {
            Err(_) if is_patient => {
                let room = tokio::time::timeout(self.acquire_timeout, Arc::clone(&self.room).acquire_owned()).await;
                room.ok().and_then(Result::ok).ok_or_else(|| self.overloaded())
            }
            room => room.map_err(|_| self.overloaded()),
        }
    }

    /// Notes that a job is refused.
    fn overloaded(&self) -> DbError {
        self.counters.refused.fetch_add(1, Ordering::Relaxed);
        DbError::Overloaded
    }

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
    /// Whether its jobs wait where there is no room for them.
    is_patient: bool,
}

#[derive(Clone)]
enum Backend {
    Sqlite { writer: Arc<sqlite::Writer>, readers: Arc<sqlite::Readers>, path: PathBuf },
    Postgres { pool: sea_orm::DatabaseConnection, vital: sea_orm::DatabaseConnection },
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
        let connections = usize::try_from(options.max_connections).unwrap_or(usize::MAX).clamp(1, 10_000);
        let shared = Arc::new(Shared {
            room: Arc::new(Semaphore::new(connections * (1 + WAITING_FOR_EACH))),
            max_connections: options.max_connections,
            service: options.service,
            clock: options.clock.clone(),
            feed: options.feed,
            bell: options.bell.clone(),
            acquire_timeout: options.acquire_timeout,
            job_timeout: options.job_timeout,
            counters: Counters::default(),
            figures: Figures::default(),
            statements: options.statements.clone(),
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
            DatabaseUrl::Postgres(url) => Backend::Postgres {
                pool: postgres::pool(url, &options, options.max_connections.max(1)).await?,
                vital: postgres::pool(url, &options, 1).await?,
            },
        };
        Ok(Self { backend, shared, url: options.url, is_patient: false })
    }

    /// Which engine this is.
    pub fn engine(&self) -> Engine {
        match self.backend {
            Backend::Sqlite { .. } => Engine::Sqlite,
            Backend::Postgres { .. } => Engine::Postgres,
        }
    }

    /// The same database, whose jobs wait for room where those of callers are refused: for what nobody waits for and
    /// there is little of, such as leases.
    pub(crate) fn patient(mut self) -> Self {
        self.is_patient = true;
        self
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
        let measured = Measured::begins(&self.shared, JobKind::Read);
        measured.ended(match &self.backend {
            Backend::Sqlite { readers, .. } => readers.run(Lane::Usual, job, self.is_patient).await,
            Backend::Postgres { pool, .. } => match self.shared.room(self.is_patient).await {
                Ok(_room) => {
                    let reader = Reader::pool(pool.clone(), Arc::clone(&self.shared), type_name::<F>());
                    postgres::limited(&self.shared, job(reader)).await
                }
                Err(full) => Err(full.into()),
            },
        })
    }

    /// The same, on a connection of its own: however many callers wait, this waits for none of them. For the little that
    /// everything else stands on, such as what others may no longer trust; a few short statements at a time.
    pub async fn read_vital<T, E, F, Fut>(&self, job: F) -> Result<T, E>
    where
        F: FnOnce(Reader) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, E>> + Send + 'static,
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
    {
        self.shared.counters.read_jobs.fetch_add(1, Ordering::Relaxed);
        let measured = Measured::begins(&self.shared, JobKind::Read);
        measured.ended(match &self.backend {
            Backend::Sqlite { readers, .. } => readers.run(Lane::Vital, job, self.is_patient).await,
            Backend::Postgres { vital, .. } => {
                let reader = Reader::pool(vital.clone(), Arc::clone(&self.shared), type_name::<F>());
                postgres::limited(&self.shared, job(reader)).await
            }
        })
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
        let measured = Measured::begins(&self.shared, JobKind::Read);
        measured.ended(match &self.backend {
            Backend::Sqlite { readers, .. } => readers.run(Lane::Usual, job, self.is_patient).await,
            Backend::Postgres { pool, .. } => match self.shared.room(self.is_patient).await {
                Ok(_room) => postgres::snapshot(pool, &self.shared, job).await,
                Err(full) => Err(full.into()),
            },
        })
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
        let measured = Measured::begins(&self.shared, JobKind::Write);
        measured.ended(match &self.backend {
            Backend::Sqlite { writer, .. } => writer.run(job, self.is_patient).await,
            Backend::Postgres { pool, .. } => postgres::write(pool, &self.shared, job, self.is_patient).await,
        })
    }

    /// Whether the database answers, to whoever waits in turn.
    pub async fn ping(&self) -> Result<(), DbError> {
        self.read(answers).await
    }

    /// Whether the database answers, however many wait for it.
    pub(crate) async fn is_there(&self) -> Result<(), DbError> {
        self.read_vital(answers).await
    }

    /// When to ask for the changes of this database next: every so often, and when its bell rings.
    pub fn rhythm(&self, interval: Duration) -> Rhythm {
        Rhythm::every(interval).hastened_by(self.shared.bell.as_ref(), self.shared.service)
    }

    /// What was done so far.
    pub fn stats(&self) -> DbStats {
        self.shared.counters.stats()
    }

    /// How busy its connections are.
    pub fn pool(&self) -> PoolFigures {
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let (max, open, idle, elsewhere) = match &self.backend {
            Backend::Sqlite { writer, readers, .. } => {
                let (max, open, idle) = readers.count();
                (number(max), number(open), number(idle), number(writer.waiting()))
            }
            Backend::Postgres { pool, vital } => {
                let (pool, vital) = (pool.get_postgres_connection_pool(), vital.get_postgres_connection_pool());
                let vital = vital.size().saturating_sub(number(vital.num_idle()));
                (self.shared.max_connections, pool.size(), number(pool.num_idle()), vital)
            }
        };
        let writer_queue = (self.engine() == Engine::Sqlite).then_some(elsewhere);
        // On SQLite the writer's jobs hold no reader; they are in its queue.
        let jobs = u32::try_from(self.shared.figures.in_flight()).unwrap_or(0);
        let waiting = jobs.saturating_sub(elsewhere).saturating_sub(open.saturating_sub(idle));
        PoolFigures { max, open, idle, waiting, writer_queue }
    }

    /// Refuses new work, finishes what was submitted, and lets go of the
    /// database. Holds for all clones of this handle.
    pub async fn close(self) {
        match &self.backend {
            Backend::Sqlite { writer, .. } => writer.close().await,
            Backend::Postgres { pool, vital } => {
                // A pool waits for connections in use to come back.
                let _ = pool.clone().close().await;
                let _ = vital.clone().close().await;
            }
        }
    }

    /// Fires after each commit that emitted to the target.
    pub(crate) fn waker(&self, target: &'static str) -> Arc<Notify> {
        self.shared.waker(target)
    }
}

/// The least that a database can be asked.
async fn answers(reader: Reader) -> Result<(), DbError> {
    let statement = Statement::from_string(reader.get_database_backend(), "SELECT 1 AS up");
    reader.query_one_raw(statement).await?;
    Ok(())
}
