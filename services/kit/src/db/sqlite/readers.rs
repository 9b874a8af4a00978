//! A few read-only connections, each job on one of them, off the async threads.

use std::{future::Future, panic::AssertUnwindSafe, path::PathBuf, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use parking_lot::Mutex;
use rusqlite::Connection;
use tokio::sync::Semaphore;

use super::{Role, Session, block_on, connect};
use crate::db::{DbError, Reader, Shared};

/// The readers of one file.
pub(crate) struct Readers {
    path: PathBuf,
    idle: Mutex<Vec<Arc<Mutex<Connection>>>>,
    permits: Arc<Semaphore>,
    shared: Arc<Shared>,
}

impl Readers {
    pub(crate) fn new(path: PathBuf, most: usize, shared: Arc<Shared>) -> Self {
        Self { path, idle: Mutex::new(Vec::with_capacity(most)), permits: Arc::new(Semaphore::new(most)), shared }
    }

    /// Runs a job in one snapshot.
    pub(crate) async fn run<T, E, F, Fut>(self: &Arc<Self>, job: F) -> Result<T, E>
    where
        F: FnOnce(Reader) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, E>> + Send + 'static,
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
    {
        let permits = Arc::clone(&self.permits);
        let permit = if let Ok(permit) = permits.try_acquire_owned() {
            permit
        } else {
            let waiting = Arc::clone(&self.permits).acquire_owned();
            match tokio::time::timeout(self.shared.acquire_timeout, waiting).await {
                Ok(Ok(permit)) => permit,
                Ok(Err(_)) => return Err(DbError::unavailable("closed").into()),
                Err(_) => return Err(DbError::busy("no free reader in time").into()),
            }
        };
        let readers = Arc::clone(self);
        let span = tracing::Span::current();
        let running = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            span.in_scope(|| readers.run_here(job))
        });
        match running.await {
            Ok(result) => result,
            Err(_) => Err(DbError::unavailable("the reader stopped").into()),
        }
    }

    fn run_here<T, E, F, Fut>(&self, job: F) -> Result<T, E>
    where
        F: FnOnce(Reader) -> Fut,
        Fut: Future<Output = Result<T, E>>,
        E: From<DbError>,
    {
        let waiting = self.idle.lock().pop();
        let connection = match waiting {
            Some(connection) => connection,
            None => Arc::new(Mutex::new(connect(&self.path, Role::Read)?)),
        };
        begin(&connection)?;
        let session = Session::new(Arc::clone(&connection));
        let reader = Reader::sqlite(session.clone(), Arc::clone(&self.shared));
        let work = AssertUnwindSafe(async move { job(reader).await }).catch_unwind();
        let limit: Duration = self.shared.job_timeout;
        let result = match block_on(work, limit) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(DbError::internal("the job panicked").into()),
            None => Err(DbError::internal("the job waited for something else").into()),
        };
        session.end();
        // A connection that cannot end its snapshot is not lent again.
        if end(&connection).is_ok() {
            self.idle.lock().push(connection);
        }
        result
    }
}

fn begin(connection: &Mutex<Connection>) -> Result<(), DbError> {
    let connection = connection.lock();
    connection.prepare_cached("BEGIN DEFERRED")?.raw_execute()?;
    Ok(())
}

fn end(connection: &Mutex<Connection>) -> Result<(), DbError> {
    let connection = connection.lock();
    connection.prepare_cached("COMMIT")?.raw_execute()?;
    Ok(())
}
