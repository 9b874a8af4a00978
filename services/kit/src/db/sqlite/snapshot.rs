//! Several files of one installation as they are at one moment, while another process writes to them.
//!
//! No transaction spans two files: what one service tells another goes from the one's outbox to the other's tables, and
//! only then out of the outbox. Copies of different moments could have it in neither. So the writers of all files are
//! held first, by a transaction of ours that changes nothing; a second connection to each begins to read, which keeps it
//! at what it sees; and the writers are let go, after milliseconds. What is copied afterwards, for however long that
//! takes, is that moment's. SQLite's backup reads in the transaction that its source has open.
//!
//! A writer that finds its file held waits ([`super::BUSY_TIMEOUT`]) for longer than it is ever held here
//! ([`HELD_AT_MOST`]), so nothing of it fails.
//!
//! Deliberately absent: what is copied besides, and where to.

use std::{
    fs::File,
    ops::ControlFlow,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use rusqlite::{
    Connection, ErrorCode, OpenFlags,
    backup::{Backup, StepResult},
};

use super::{Role, connect, create_file};
use crate::db::DbError;

/// How long writers are held at most, before all are let go and it is tried again. Less than half of what they wait.
const HELD_AT_MOST: Duration = Duration::from_secs(1);

/// How long is waited for the first of them, while nothing is held.
const FIRST_WITHIN: Duration = Duration::from_secs(10);

/// How often it is tried.
const TRIES: u32 = 5;

/// How often a held file is tried. A busy writer lets go of it between two transactions only, for microseconds: whoever
/// looks as seldom as SQLite does by itself might never find it free.
const LOOK_EVERY: Duration = Duration::from_micros(50);

/// Pages that are copied at a time: 4 MiB.
const PAGES: i32 = 1024;

/// Files of one moment, and what they are held by.
#[derive(Debug)]
pub struct Snapshots {
    files: Vec<Snapshot>,
    held_for: Duration,
}

/// A file as it was at one moment, for as long as this value lives. Its log grows in the meantime.
#[derive(Debug)]
pub struct Snapshot {
    service: &'static str,
    source: Connection,
}

/// How far a copy has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    /// Pages that are there.
    pub pages: u64,
    /// Pages that it will have.
    pub of: u64,
}

impl Snapshots {
    /// Takes the files of the services in a folder, and what `meanwhile` says while nobody writes to any of them. That may be
    /// asked more than once, of which the last counts, and has to be done in a moment: what takes longer is for afterwards.
    pub fn take<T>(
        folder: &Path,
        services: &[&'static str],
        meanwhile: impl Fn() -> std::io::Result<T>,
    ) -> Result<(Self, T), DbError> {
        // All that can be done before anybody is held: opening, and what a first reading needs.
        let mut writers = Vec::new();
        let mut files = Vec::new();
        for service in services {
            let path = folder.join(format!("{service}.db"));
            let writer = connect(&path, Role::Write)?;
            writer.busy_timeout(Duration::ZERO)?;
            writers.push(writer);
            let source = connect(&path, Role::Read)?;
            look(&source)?;
            files.push(Snapshot { service, source });
        }
        for _ in 0..TRIES {
            let Some(held) = Held::all(&writers)? else { continue };
            let said = meanwhile();
            if held.since.elapsed() > HELD_AT_MOST {
                held.release()?;
                continue;
            }
            for file in &files {
                file.source.execute_batch("BEGIN DEFERRED")?;
                look(&file.source)?;
            }
            let held_for = held.release()?;
            let said = said.map_err(|error| DbError::unavailable(format!("what stands beside the files: {error}")))?;
            return Ok((Self { files, held_for }, said));
        }
        Err(DbError::busy("the files are written to without a pause"))
    }

    /// How long nobody could write.
    pub fn held_for(&self) -> Duration {
        self.held_for
    }

    /// The files, in the order in which they were asked for.
    pub fn files(&self) -> &[Snapshot] {
        &self.files
    }
}

/// The first read of a transaction is what its snapshot is taken by.
fn look(connection: &Connection) -> Result<i64, DbError> {
    Ok(connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?)
}

/// Files that nobody else writes to. They are let go in any case.
struct Held<'c> {
    writers: Vec<&'c Connection>,
    since: Instant,
}

impl<'c> Held<'c> {
    /// Holds all of them, in their order; none where that takes too long.
    fn all(writers: &'c [Connection]) -> Result<Option<Self>, DbError> {
        let mut held: Option<Self> = None;
        let began = Instant::now();
        for writer in writers {
            loop {
                match writer.execute_batch("BEGIN IMMEDIATE") {
                    Ok(()) => break,
                    Err(rusqlite::Error::SqliteFailure(failure, _)) if failure.code == ErrorCode::DatabaseBusy => {}
                    Err(error) => return Err(error.into()),
                }
                let late = match &held {
                    Some(held) => held.since.elapsed() > HELD_AT_MOST,
                    None => began.elapsed() > FIRST_WITHIN,
                };
                if late {
                    return Ok(None);
                }
                thread::sleep(LOOK_EVERY);
            }
            held.get_or_insert_with(|| Self { writers: Vec::new(), since: Instant::now() }).writers.push(writer);
        }
        Ok(held)
    }

    fn release(mut self) -> Result<Duration, DbError> {
        let writers = std::mem::take(&mut self.writers);
        let outcomes: Vec<_> = writers.into_iter().map(|writer| writer.execute_batch("ROLLBACK")).collect();
        let held_for = self.since.elapsed();
        outcomes.into_iter().collect::<Result<(), _>>()?;
        Ok(held_for)
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        for writer in self.writers.drain(..) {
            // The connection is closed in a moment, which does the same.
            let _ = writer.execute_batch("ROLLBACK");
        }
    }
}

impl Snapshot {
    /// Whose file it is.
    pub fn service(&self) -> &'static str {
        self.service
    }

    /// Copies it into a new file, which is on disk when this returns, and whole by SQLite's own judgement. Says which
    /// migrations it has. `None`: `tell` has asked to leave off, and the new file is of no use.
    pub fn copy_to(
        &self,
        path: &Path,
        mut tell: impl FnMut(Copied) -> ControlFlow<()>,
    ) -> Result<Option<Vec<String>>, DbError> {
        create_file(path)?;
        let mut target = plain(path)?;
        // A copy that is not brought to its end is thrown away: it needs no journal, and is synced once, at its end.
        target.pragma_update(None, "journal_mode", "OFF")?;
        target.pragma_update(None, "synchronous", "OFF")?;
        let backup = Backup::new(&self.source, &mut target)?;
        loop {
            let step = backup.step(PAGES)?;
            let progress = backup.progress();
            let [of, remaining] =
                [progress.pagecount, progress.remaining].map(|pages| u64::try_from(pages).unwrap_or(0));
            if tell(Copied { pages: of.saturating_sub(remaining), of }).is_break() {
                return Ok(None);
            }
            match step {
                StepResult::Done => break,
                // Nobody else has the new file, and the source reads without a lock that anybody could refuse.
                StepResult::Busy | StepResult::Locked => return Err(DbError::busy("the file is held")),
                _ => {}
            }
        }
        drop(backup);
        drop(target);
        let applied = judge(path)?;
        let synced = File::open(path).and_then(|file| file.sync_all());
        synced.map_err(|error| DbError::unavailable(format!("{}: {error}", path.display())))?;
        Ok(Some(applied))
    }
}

fn plain(path: &Path) -> Result<Connection, DbError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    Ok(Connection::open_with_flags(path, flags)?)
}

/// Makes a copy one file without a log beside it, and looks whether it is whole.
fn judge(path: &Path) -> Result<Vec<String>, DbError> {
    let connection = plain(path)?;
    connection.pragma_update(None, "synchronous", "OFF")?;
    let damaged = |what: String| DbError::unavailable(format!("{} is damaged: {what}", path.display()));
    let mode: String = connection.query_row("PRAGMA journal_mode = DELETE", [], |row| row.get(0))?;
    if mode != "delete" {
        return Err(DbError::internal("the log of a copy cannot be taken away"));
    }
    let found: String = connection.query_row("PRAGMA integrity_check(1)", [], |row| row.get(0))?;
    if found != "ok" {
        return Err(damaged(found));
    }
    let mut dangling = connection.prepare("PRAGMA foreign_key_check")?;
    if dangling.exists([])? {
        return Err(damaged("a row refers to one that is not there".to_owned()));
    }
    let probe = "SELECT 1 FROM sqlite_schema WHERE type = 'table' AND name = 'seaql_migrations'";
    if !connection.prepare(probe)?.exists([])? {
        return Ok(Vec::new());
    }
    let mut applied = connection.prepare("SELECT version FROM seaql_migrations ORDER BY version")?;
    let applied = applied.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    Ok(applied)
}
