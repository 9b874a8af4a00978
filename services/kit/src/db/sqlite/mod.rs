//! The SQLite half: one writer thread, a few readers, one file.
//!
//! Deliberately absent: a pool of writers. SQLite has one writer at a time
//! whatever one does; queueing in the process is cheaper than in the file's
//! lock, and lets one `fsync` serve everybody who waited.

mod readers;
mod snapshot;
mod statement;
mod writer;

use std::{
    fs::{self, DirBuilder, OpenOptions, Permissions},
    future::Future,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::Path,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    thread::{self, Thread},
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use rusqlite::{Connection, OpenFlags};
use sea_orm::{ProxyExecResult, ProxyRow, Statement};

use super::DbError;

pub(super) use readers::Readers;
pub use snapshot::{Copied, Snapshot, Snapshots};
pub(super) use writer::Writer;

/// How long a connection waits for another process that holds the file.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Prepared statements kept for each connection.
const STATEMENT_CACHE: usize = 256;

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    /// The one writer.
    Write,
    /// One of the readers; refuses to change anything.
    Read,
    /// Schema changes. Foreign keys are off, so that a table may be rebuilt;
    /// they are checked as a whole before the commit.
    Migrate,
}

/// Makes the file, readable by its owner only, and the folder around it.
pub(super) fn create_file(path: &Path) -> Result<(), DbError> {
    let failed = |what: &str, error: &std::io::Error| DbError::unavailable(format!("{what}: {}", error.kind()));
    if let Some(folder) = path.parent().filter(|folder| !folder.exists()) {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(|error| failed("creating the data folder", &error))?;
    }
    // SQLite gives its -wal and -shm files the mode of the main file.
    OpenOptions::new()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(path)
        .map_err(|error| failed("creating the database file", &error))?;
    fs::set_permissions(path, Permissions::from_mode(0o600))
        .map_err(|error| failed("restricting the database file", &error))
}

/// Opens one connection of the given role.
pub(super) fn connect(path: &Path, role: Role) -> Result<Connection, DbError> {
    let connection =
        Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.set_prepared_statement_cache_capacity(STATEMENT_CACHE);
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    connection.pragma_update(None, "foreign_keys", role != Role::Migrate)?;
    // 8 MiB of log before a commit pays for a checkpoint; the log file itself
    // is cut back after a burst.
    connection.pragma_update(None, "wal_autocheckpoint", 2000)?;
    connection.pragma_update(None, "journal_size_limit", 64 * 1024 * 1024)?;
    match role {
        Role::Read => connection.pragma_update(None, "query_only", true)?,
        Role::Write => forget_statistics(&connection)?,
        Role::Migrate => {}
    }
    Ok(connection)
}

/// Statistics of a file that was small let whole tables be read once it has grown: nobody takes them anew in between.
/// Without any, SQLite supposes that tables are large, which is what the indexes are made for.
fn forget_statistics(connection: &Connection) -> Result<(), DbError> {
    let kept = "SELECT COUNT(*) FROM sqlite_master WHERE name = 'sqlite_stat1'";
    let kept: i64 = connection.query_row(kept, [], |row| row.get(0))?;
    if kept > 0 {
        // The second statement makes this connection read again what it has read at its beginning.
        connection.execute_batch("DELETE FROM sqlite_stat1; ANALYZE sqlite_schema;")?;
    }
    Ok(())
}

/// A connection lent to one job. It goes dead when the job ends, so that a
/// handle kept longer cannot reach into somebody else's transaction.
#[derive(Clone)]
pub(crate) struct Session {
    connection: Arc<Mutex<Connection>>,
    live: Arc<AtomicBool>,
}

impl Session {
    fn new(connection: Arc<Mutex<Connection>>) -> Self {
        Self { connection, live: Arc::new(AtomicBool::new(true)) }
    }

    fn end(&self) {
        self.live.store(false, Ordering::Release);
    }

    fn with<T>(&self, work: impl FnOnce(&Connection) -> Result<T, DbError>) -> Result<T, DbError> {
        let connection = self.connection.lock();
        if !self.live.load(Ordering::Acquire) {
            return Err(DbError::internal("the database handle outlived its job"));
        }
        work(&connection)
    }

    pub(super) fn execute(&self, statement: &Statement) -> Result<ProxyExecResult, DbError> {
        self.with(|connection| statement::execute(connection, statement))
    }

    pub(super) fn query(&self, statement: &Statement, limit: usize) -> Result<Vec<ProxyRow>, DbError> {
        self.with(|connection| statement::query(connection, statement, limit))
    }

    pub(super) fn batch(&self, sql: &str) -> Result<ProxyExecResult, DbError> {
        self.with(|connection| {
            connection.execute_batch(sql)?;
            Ok(ProxyExecResult::new(0, connection.changes()))
        })
    }
}

/// A session for the migrator, which manages its transaction itself.
pub(super) fn migration_session(connection: Connection) -> Session {
    Session::new(Arc::new(Mutex::new(connection)))
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Drives a future on this thread, for at most `limit`.
///
/// Calls to SQLite never wait, so a job is normally done at the first poll. A
/// job that awaits something else holds up every writer behind it: it is given
/// `limit` and then dropped (`None`).
pub(super) fn block_on<F: Future>(future: F, limit: Duration) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut context = Context::from_waker(Waker::noop());
    if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
        return Some(output);
    }
    let started = Instant::now();
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut context) {
            return Some(output);
        }
        let left = limit.checked_sub(started.elapsed())?;
        thread::park_timeout(left);
    }
}
