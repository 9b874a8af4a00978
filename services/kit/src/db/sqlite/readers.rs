//! A few read-only connections, each job on one of them, off the async threads.

use std::{any::type_name, future::Future, panic::AssertUnwindSafe, path::PathBuf, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use parking_lot::Mutex;
use rusqlite::Connection;
use tokio::sync::Semaphore;

use super::{Role, Session, block_on, connect};
use crate::{
    db::{DbError, Lane, Reader, Shared},
    telemetry,
};

/// The readers of one file.
pub(crate) struct Readers {
    path: PathBuf,
    idle: Mutex<Vec<Arc<Mutex<Connection>>>>,
    permits: Arc<Semaphore>,
    /// One more reader, for what must not wait behind callers.
    vital: Arc<Semaphore>,
    most: usize,
    shared: Arc<Shared>,
}

impl Readers {
    pub(crate) fn new(path: PathBuf, most: usize, shared: Arc<Shared>) -> Self {
        let (idle, permits) = (Mutex::new(Vec::with_capacity(most)), Arc::new(Semaphore::new(most)));
        Self { path, idle, permits, vital: Arc::new(Semaphore::new(1)), most, shared }
    }

    /// How many there may be, how many are open, and how many of these do nothing.
    pub(crate) fn count(&self) -> (usize, usize, usize) {
        let free = self.permits.available_permits() + self.vital.available_permits();
        let used = (self.most + 1).saturating_sub(free);
        let idle = self.idle.lock().len();
        (self.most, used + idle, idle)
    }

    /// Runs a job in one snapshot, on a reader of its lane.
    pub(crate) async fn run<T, E, F, Fut>(self: &Arc<Self>, lane: Lane, job: F, is_patient: bool) -> Result<T, E>
    where
        F: FnOnce(Reader) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, E>> + Send + 'static,
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
    {
        let permits = match lane {
            Lane::Usual => &self.permits,
            Lane::Vital => &self.vital,
        };
        let permit = if let Ok(permit) = Arc::clone(permits).try_acquire_owned() {
            permit
        } else {
            let _room = match lane {
                Lane::Usual => Some(self.shared.room(is_patient).await?),
                Lane::Vital => None,
            };
            let waiting = Arc::clone(permits).acquire_owned();
            match tokio::time::timeout(self.shared.acquire_timeout, waiting).await {
                Ok(Ok(permit)) => permit,
                Ok(Err(_)) => return Err(DbError::unavailable("closed").into()),
                Err(_) => return Err(DbError::busy("no free reader in time").into()),
            }
        };
        let readers = Arc::clone(self);
        let running = tokio::task::spawn_blocking(telemetry::scoped(move || {
            let _permit = permit;
            readers.run_here(job)
        }));
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
        let reader = Reader::sqlite(session.clone(), Arc::clone(&self.shared), type_name::<F>());
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
