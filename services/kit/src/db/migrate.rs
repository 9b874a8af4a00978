//! Bringing a schema up to date, and telling whether it is.
//!
//! sea-orm's migrator runs on a connection of its own, never on the pool or on
//! the writer. On SQLite everything pending is one transaction: all of it
//! happens or none. On PostgreSQL each migration is one, unless it says that it
//! cannot be, and an advisory lock lets one process migrate while others wait
//! for it.
//!
//! What wants a table to itself on PostgreSQL does not wait for it for long:
//! everybody who comes later waits behind it. It gives up, lets the others
//! pass, and tries again. What is built beside all others waits for as long as
//! it takes.
//!
//! A schema that is newer than the program is good enough, and nothing is done
//! about it: that is how the release before is gone back to.
//!
//! Deliberately absent: migrating while opening. A fleet migrates once, by
//! decision, before it rolls; the embedded default calls it before serving.

use std::{
    collections::BTreeSet,
    fmt,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use sea_orm::{
    ConnectionTrait, DatabaseConnection, DbBackend, DbErr, ProxyDatabaseTrait, ProxyExecResult, ProxyRow, Statement,
};
use sea_orm_migration::MigratorTrait;

use super::{
    Backend, Database, DatabaseUrl, DbError, postgres,
    sqlite::{self, Role, Session},
};

/// A migration may rebuild a large table.
const MIGRATION_LIMIT: Duration = Duration::from_hours(1);

/// How long a migration waits for a table on PostgreSQL, and with it everybody who wants that table.
const LOCK_LIMIT: Duration = Duration::from_secs(3);

/// How often it is tried, and how long others are let pass before it is tried again.
const TRIES: u32 = 10;
const BETWEEN_TRIES: Duration = Duration::from_secs(2);

/// How often is looked whether another migrator is done.
const LOOK_FOR_LOCK: Duration = Duration::from_millis(200);

/// One migration, and whether this database has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrationStatus {
    /// Its name.
    pub name: String,
    /// Whether it was applied.
    pub state: MigrationState,
}

/// Whether a database has a migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MigrationState {
    /// It has.
    Applied,
    /// It has not: the schema is older than this program.
    Pending,
    /// It has one which this program does not know: the schema is newer. That
    /// is normal for a while when a fleet is upgraded.
    Unknown,
}

/// The names of the migrations that a program knows, in their order.
pub fn migration_names<M: MigratorTrait>() -> Vec<String> {
    M::migrations().iter().map(|migration| migration.name().to_owned()).collect()
}

#[derive(Clone, Copy)]
enum Step {
    Up,
    Down(u32),
}

impl Step {
    /// Migrates, one migration after another.
    async fn run<M: MigratorTrait + 'static>(self, connection: &DatabaseConnection) -> Result<(), DbErr> {
        for in_transaction in self.plan::<M>(recorded::<M>(connection).await?)? {
            self.run_one::<M>(connection, in_transaction).await?;
        }
        Ok(())
    }

    /// What is to be done to a database that has these migrations: of each in turn, whether it is a transaction.
    fn plan<M: MigratorTrait>(self, mut recorded: BTreeSet<String>) -> Result<Vec<bool>, DbErr> {
        let migrations = M::migrations();
        let (applied, pending): (Vec<_>, Vec<_>) =
            migrations.iter().partition(|migration| recorded.remove(migration.name()));
        let alone = Some(false);
        // What is left is of a newer release, or of another.
        let refused = match (self, recorded.first(), pending.first()) {
            (Self::Up, Some(strange), Some(lacking)) => {
                format!(
                    "it has {strange}, which this release does not know, and lacks {}: use the release that made it",
                    lacking.name()
                )
            }
            (Self::Down(_), Some(strange), _) => {
                format!(
                    "it has {strange}, which this release does not know: take that back with the release that made it"
                )
            }
            (Self::Up, ..) => {
                return Ok(pending.iter().map(|migration| migration.use_transaction() != alone).collect());
            }
            (Self::Down(steps), None, _) => {
                let steps = usize::try_from(steps).unwrap_or(usize::MAX);
                return Ok(applied
                    .iter()
                    .rev()
                    .take(steps)
                    .map(|migration| migration.use_transaction() != alone)
                    .collect());
            }
        };
        Err(DbError::internal(format!("the schema is not one of this release: {refused}")).into_orm())
    }

    /// The next migration, and on PostgreSQL again where others would not let go of a table.
    async fn run_one<M: MigratorTrait + 'static>(
        self,
        connection: &DatabaseConnection,
        in_transaction: bool,
    ) -> Result<(), DbErr> {
        let is_shared = connection.get_database_backend() == DbBackend::Postgres;
        if is_shared {
            let limit = if in_transaction { LOCK_LIMIT.as_millis() } else { 0 };
            connection.execute_unprepared(&format!("SET lock_timeout = {limit}")).await?;
        }
        let mut tries = 1;
        loop {
            let outcome = match self {
                Self::Up => M::up(connection, Some(1)).await,
                Self::Down(_) => M::down(connection, Some(1)).await,
            };
            match outcome {
                Err(error) if is_shared && in_transaction && tries < TRIES && DbError::from(&error).is_retryable() => {
                    tracing::warn!(%error, tries, "a migration lets others pass, and is tried again");
                    tries += 1;
                    tokio::time::sleep(BETWEEN_TRIES).await;
                }
                outcome => return outcome,
            }
        }
    }
}

/// The names of the migrations that a database has. Works on an empty one.
async fn recorded<M: MigratorTrait>(connection: &impl ConnectionTrait) -> Result<BTreeSet<String>, DbErr> {
    let table = M::migration_table_name().to_string();
    let backend = connection.get_database_backend();
    let probe = match backend {
        DbBackend::Postgres => {
            "SELECT tablename AS name FROM pg_tables \
             WHERE schemaname = current_schema() AND tablename = $1"
        }
        _ => "SELECT name FROM sqlite_master WHERE type = 'table' AND name = $1",
    };
    let probe = Statement::from_sql_and_values(backend, probe, [table.clone().into()]);
    if connection.query_one_raw(probe).await?.is_none() {
        return Ok(BTreeSet::new());
    }
    let list = Statement::from_string(backend, format!("SELECT version FROM \"{table}\""));
    connection.query_all_raw(list).await?.iter().map(|row| row.try_get("", "version")).collect()
}

impl Database {
    /// Applies all pending migrations. A schema that is newer than this program stays as it is; one that is of neither
    /// is refused.
    pub async fn migrate_up<M: MigratorTrait + 'static>(&self) -> Result<(), DbError> {
        self.migrate::<M>(Step::Up).await
    }

    /// Takes back the given number of migrations, the latest first.
    pub async fn migrate_down<M: MigratorTrait + 'static>(&self, steps: u32) -> Result<(), DbError> {
        self.migrate::<M>(Step::Down(steps)).await
    }

    /// All migrations, those this program knows first, in their order. Changes
    /// nothing, and works on an empty database.
    pub async fn migration_status<M: MigratorTrait>(&self) -> Result<Vec<MigrationStatus>, DbError> {
        // Readiness asks for this, and is not to be lost to load.
        let mut applied =
            self.read_vital(|reader| async move { recorded::<M>(&reader).await.map_err(DbError::from) }).await?;
        let mut all: Vec<MigrationStatus> = M::migrations()
            .iter()
            .map(|migration| {
                let name = migration.name().to_owned();
                let state = if applied.remove(&name) { MigrationState::Applied } else { MigrationState::Pending };
                MigrationStatus { name, state }
            })
            .collect();
        all.extend(applied.into_iter().map(|name| MigrationStatus { name, state: MigrationState::Unknown }));
        Ok(all)
    }

    /// The names of the migrations this database lacks. Empty means that the
    /// schema is new enough to serve.
    pub async fn pending_migrations<M: MigratorTrait>(&self) -> Result<Vec<String>, DbError> {
        Ok(self
            .migration_status::<M>()
            .await?
            .into_iter()
            .filter(|migration| migration.state == MigrationState::Pending)
            .map(|migration| migration.name)
            .collect())
    }

    async fn migrate<M: MigratorTrait + 'static>(&self, step: Step) -> Result<(), DbError> {
        match (&self.backend, &self.url) {
            (Backend::Sqlite { path, .. }, _) => {
                let path = path.clone();
                tokio::task::spawn_blocking(move || in_file::<M>(&path, step))
                    .await
                    .map_err(|_| DbError::internal("a migration panicked"))?
            }
            (Backend::Postgres { .. }, DatabaseUrl::Postgres(url)) => {
                in_schema::<M>(url, self.shared.service, step).await
            }
            (Backend::Postgres { .. }, DatabaseUrl::Sqlite { .. }) => {
                Err(DbError::internal("the engine does not fit the URL"))
            }
        }
    }
}

async fn in_schema<M: MigratorTrait + 'static>(url: &str, service: &str, step: Step) -> Result<(), DbError> {
    // The pool has one connection, so the lock, which belongs to a session,
    // covers all that follows. Closing the session gives it back.
    let connection = postgres::migration_connection(url, service).await?;
    let lock = format!("SELECT pg_try_advisory_lock(hashtext('paperkey'), hashtext('{service}')) AS held");
    let lock = Statement::from_string(DbBackend::Postgres, lock);
    let result = async {
        // Not a statement that waits: the one who has the lock may build an index beside all others, and waits for every
        // statement that began before.
        loop {
            let row = connection.query_one_raw(lock.clone()).await?;
            if row.map(|row| row.try_get("", "held")).transpose()?.unwrap_or(false) {
                break;
            }
            tokio::time::sleep(LOOK_FOR_LOCK).await;
        }
        // Asked first, because even IF NOT EXISTS wants the right to create one.
        let probe = "SELECT nspname FROM pg_namespace WHERE nspname = $1";
        let probe = Statement::from_sql_and_values(DbBackend::Postgres, probe, [service.into()]);
        if connection.query_one_raw(probe).await?.is_none() {
            let schema = format!("CREATE SCHEMA IF NOT EXISTS \"{service}\"");
            connection.execute_unprepared(&schema).await?;
        }
        step.run::<M>(&connection).await
    }
    .await;
    let _ = connection.close().await;
    Ok(result?)
}

fn in_file<M: MigratorTrait + 'static>(path: &Path, step: Step) -> Result<(), DbError> {
    let connection = sqlite::connect(path, Role::Migrate)?;
    let proxy = Proxy { session: sqlite::migration_session(connection), undone: Arc::default() };
    // Also keeps a second migrator out.
    proxy.session.batch("BEGIN IMMEDIATE")?;
    let work = async {
        let boxed: Box<dyn ProxyDatabaseTrait> = Box::new(proxy.clone());
        let connection = sea_orm::Database::connect_proxy(DbBackend::Sqlite, Arc::new(boxed)).await?;
        step.run::<M>(&connection).await
    };
    let result = match sqlite::block_on(work, MIGRATION_LIMIT) {
        Some(Ok(())) => proxy.check(),
        Some(Err(error)) => Err(error.into()),
        None => Err(DbError::internal("a migration waited for something else")),
    };
    match result {
        Ok(()) => proxy.session.batch("COMMIT").map(drop),
        Err(error) => {
            // Closing the connection would do the same.
            let _ = proxy.session.batch("ROLLBACK");
            Err(error)
        }
    }
}

/// The migrator's way to SQLite. Its transactions are part of the one around
/// everything; a rollback of one condemns the whole.
#[derive(Clone)]
struct Proxy {
    session: Session,
    undone: Arc<AtomicBool>,
}

impl Proxy {
    fn check(&self) -> Result<(), DbError> {
        if self.undone.load(Ordering::Relaxed) {
            return Err(DbError::internal("a migration rolled back a part of itself"));
        }
        // Foreign keys are not enforced while tables are rebuilt.
        let check = Statement::from_string(DbBackend::Sqlite, "PRAGMA foreign_key_check");
        if self.session.query(&check, 1)?.is_empty() {
            Ok(())
        } else {
            Err(DbError::internal("a migration left dangling references"))
        }
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").finish_non_exhaustive()
    }
}

#[async_trait]
impl ProxyDatabaseTrait for Proxy {
    async fn query(&self, statement: Statement) -> Result<Vec<ProxyRow>, DbErr> {
        self.session.query(&statement, usize::MAX).map_err(DbError::into_orm)
    }

    async fn execute(&self, statement: Statement) -> Result<ProxyExecResult, DbErr> {
        // Text without values may hold several statements.
        let result = if statement.values.is_none() {
            self.session.batch(&statement.sql)
        } else {
            self.session.execute(&statement)
        };
        result.map_err(DbError::into_orm)
    }

    async fn rollback(&self) {
        self.undone.store(true, Ordering::Relaxed);
    }

    fn start_rollback(&self) {
        self.undone.store(true, Ordering::Relaxed);
    }
}
