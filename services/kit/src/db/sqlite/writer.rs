//! The one writer of a file.
//!
//! A thread takes what is waiting, runs each job in a savepoint of one shared
//! transaction, commits once with a full sync, and only then answers anybody.
//! A job that fails or panics takes back its own savepoint and nobody else's.
//! When the transaction as a whole is lost (disk full, a commit that fails),
//! everybody in the group gets the error: nobody is told "done" for something
//! that is not on disk.
//!
//! Deliberately absent: a delay to gather more jobs. While one group is synced
//! the next one gathers by itself.

use std::{collections::VecDeque, future::Future, marker::PhantomData, sync::Arc, thread};

use parking_lot::Mutex;
use rusqlite::Connection;
use tokio::{
    runtime::Handle,
    sync::{
        mpsc::{
            self,
            error::{SendTimeoutError, TrySendError},
        },
        oneshot,
    },
};

use super::{Session, block_on};
use crate::{
    db::{
        DbError, Shared, Tx,
        tx::{self, Settlement, TxCore},
    },
    fail_point::{self, Point},
    telemetry::Scope,
};

/// Jobs which share one commit at most.
const MAX_GROUP: usize = 256;

/// The sending side.
pub(crate) struct Writer {
    queue: mpsc::Sender<Message>,
    shared: Arc<Shared>,
}

enum Message {
    Job(Box<dyn Job>),
    Close(oneshot::Sender<()>),
}

impl Writer {
    /// Starts the thread.
    pub(crate) fn start(
        service: &str,
        connection: Connection,
        queue_len: usize,
        shared: Arc<Shared>,
    ) -> Result<Self, DbError> {
        let (queue, jobs) = mpsc::channel(queue_len);
        let desk = Desk { connection: Arc::new(Mutex::new(connection)), shared: Arc::clone(&shared) };
        // Jobs and hooks may want the runtime, to spawn or to notify.
        let runtime = Handle::current();
        thread::Builder::new()
            .name(format!("{service}-writer"))
            .spawn(move || {
                let _runtime = runtime.enter();
                desk.work(jobs);
            })
            .map_err(|_| DbError::unavailable("no thread for the writer"))?;
        Ok(Self { queue, shared })
    }

    /// Submits a job and waits until it is durable. Who stops waiting does not
    /// stop the job.
    /// Who is patient waits for room in the queue, for as long as somebody may
    /// wait for a connection.
    pub(crate) async fn run<T, E, F, Fut>(&self, job: F, is_patient: bool) -> Result<T, E>
    where
        F: FnOnce(Tx) -> Fut + Send + 'static,
        Fut: Future<Output = Result<T, E>> + Send + 'static,
        T: Send + 'static,
        E: From<DbError> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job =
            Box::new(TypedJob { job: Some(job), result: None, reply, scope: Scope::current(), future: PhantomData });
        self.submit(Message::Job(job), is_patient).await?;
        match answer.await {
            Ok(result) => result,
            Err(_) => Err(DbError::unavailable("the writer stopped").into()),
        }
    }

    async fn submit(&self, message: Message, is_patient: bool) -> Result<(), DbError> {
        let closed = || DbError::unavailable("the database is closed");
        match self.queue.try_send(message) {
            Ok(()) => Ok(()),
            Err(TrySendError::Closed(_)) => Err(closed()),
            Err(TrySendError::Full(message)) if is_patient => {
                self.queue.send_timeout(message, self.shared.acquire_timeout).await.map_err(|error| match error {
                    SendTimeoutError::Closed(_) => closed(),
                    SendTimeoutError::Timeout(_) => self.shared.overloaded(),
                })
            }
            Err(TrySendError::Full(_)) => Err(self.shared.overloaded()),
        }
    }

    /// Jobs that were submitted and that the thread has not taken yet.
    pub(crate) fn waiting(&self) -> usize {
        self.queue.max_capacity() - self.queue.capacity()
    }

    /// Lets the thread finish what was submitted, then stops it.
    pub(crate) async fn close(&self) {
        let (reply, done) = oneshot::channel();
        // Waiting without a limit is sound: the thread always makes progress.
        if self.queue.send(Message::Close(reply)).await.is_ok() {
            let _ = done.await;
        }
    }
}

/// A job with its types hidden, as the thread sees it.
trait Job: Send {
    /// Runs it, and says whether it wants to be kept.
    fn run(&mut self, core: &Arc<TxCore>) -> bool;
    /// Answers the caller: with the job's own result, or with the error that
    /// overrules it.
    fn answer(self: Box<Self>, overruled: Option<DbError>);
}

struct TypedJob<T, E, F, Fut> {
    job: Option<F>,
    result: Option<Result<T, E>>,
    reply: oneshot::Sender<Result<T, E>>,
    scope: Option<Scope>,
    future: PhantomData<fn() -> Fut>,
}

impl<T, E, F, Fut> Job for TypedJob<T, E, F, Fut>
where
    F: FnOnce(Tx) -> Fut + Send,
    Fut: Future<Output = Result<T, E>> + Send,
    T: Send,
    E: From<DbError> + Send,
{
    fn run(&mut self, core: &Arc<TxCore>) -> bool {
        let Some(job) = self.job.take() else {
            return false;
        };
        let drive = || block_on(tx::drive(core, job), core.shared().job_timeout);
        let result = match self.scope.take() {
            Some(scope) => scope.enter(drive),
            None => drive(),
        };
        let result = result.unwrap_or_else(|| Err(DbError::internal("the job waited for something else").into()));
        let result = if Arc::strong_count(core) > 1 && result.is_ok() {
            Err(DbError::internal("the database handle outlived its job").into())
        } else {
            result
        };
        let keep = result.is_ok();
        self.result = Some(result);
        keep
    }

    fn answer(self: Box<Self>, overruled: Option<DbError>) {
        let result = match (overruled, self.result) {
            (Some(error), _) => Err(error.into()),
            (None, Some(result)) => result,
            (None, None) => Err(DbError::internal("the job did not run").into()),
        };
        // The caller may be gone; the work is done all the same.
        let _ = self.reply.send(result);
    }
}

/// The thread's side.
struct Desk {
    connection: Arc<Mutex<Connection>>,
    shared: Arc<Shared>,
}

impl Desk {
    fn work(&self, mut queue: mpsc::Receiver<Message>) {
        let mut waiting = VecDeque::with_capacity(MAX_GROUP);
        let mut closing = Vec::new();
        loop {
            if waiting.is_empty() {
                match queue.blocking_recv() {
                    Some(message) => sort(message, &mut waiting, &mut closing, &mut queue),
                    None => break,
                }
            }
            while waiting.len() < MAX_GROUP {
                match queue.try_recv() {
                    Ok(message) => sort(message, &mut waiting, &mut closing, &mut queue),
                    Err(_) => break,
                }
            }
            if !waiting.is_empty() {
                self.group(&mut waiting);
            }
        }
        // Fails harmlessly while another process reads: the log stays for the
        // next start. Statistics are not kept: those of a file that was small
        // would let whole tables be read once it has grown.
        let _ = self.connection.lock().execute_batch("PRAGMA wal_checkpoint(TRUNCATE);");
        for reply in closing {
            let _ = reply.send(());
        }
    }

    /// Runs what waits as one transaction. What is left in `waiting` afterwards
    /// has not run and belongs to the next group.
    fn group(&self, waiting: &mut VecDeque<Box<dyn Job>>) {
        if let Err(error) = self.sql("BEGIN IMMEDIATE") {
            for job in waiting.drain(..) {
                job.answer(Some(error.clone()));
            }
            return;
        }
        // Alone, the transaction itself is the savepoint.
        let alone = waiting.len() == 1;
        self.shared.figures.grouped(waiting.len());
        let mut ran: Vec<(Box<dyn Job>, Option<Settlement>)> = Vec::with_capacity(waiting.len());
        let mut lost = None;
        while let Some(mut job) = waiting.pop_front() {
            match self.one(job.as_mut(), alone) {
                Ok(settlement) => ran.push((job, settlement)),
                Err(error) => {
                    ran.push((job, None));
                    lost = Some(error);
                    break;
                }
            }
        }
        if lost.is_none() {
            let keep = ran.iter().any(|(_, settlement)| settlement.is_some());
            let emits = || ran.iter().filter_map(|(_, settlement)| settlement.as_ref()).any(Settlement::emits);
            fail_point::reach_if(Point::OutboxBeforeCommit, emits);
            // An error here is only about a transaction in which nothing is
            // worth keeping.
            lost = if keep {
                self.sql("COMMIT").err()
            } else {
                let _ = self.sql("ROLLBACK");
                None
            };
            if keep && lost.is_none() {
                self.shared.counters.commit();
                fail_point::reach_if(Point::OutboxAfterCommit, emits);
            }
        }
        if lost.is_some() && !self.connection.lock().is_autocommit() {
            // Fails only when SQLite has rolled back by itself.
            let _ = self.sql("ROLLBACK");
        }
        for (job, settlement) in ran {
            if let (None, Some(settlement)) = (&lost, settlement) {
                settlement.settle(&self.shared);
            }
            job.answer(lost.clone());
        }
    }

    /// Runs one job of a group. `Ok(None)`: it failed and left no trace.
    /// `Err`: the transaction as a whole is lost.
    fn one(&self, job: &mut dyn Job, alone: bool) -> Result<Option<Settlement>, DbError> {
        if !alone {
            self.sql("SAVEPOINT job")?;
        }
        let session = Session::new(Arc::clone(&self.connection));
        let core = Arc::new(TxCore::sqlite(session.clone(), Arc::clone(&self.shared)));
        let keep = job.run(&core);
        session.end();
        if self.connection.lock().is_autocommit() {
            return Err(core.failure().unwrap_or_else(|| DbError::internal("the transaction ended early")));
        }
        if keep {
            if !alone {
                self.sql("RELEASE job")?;
            }
            Ok(Some(core.take_settlement()))
        } else {
            if !alone {
                self.sql("ROLLBACK TO job")?;
                self.sql("RELEASE job")?;
            }
            Ok(None)
        }
    }

    fn sql(&self, sql: &'static str) -> Result<(), DbError> {
        let connection = self.connection.lock();
        connection.prepare_cached(sql)?.raw_execute()?;
        Ok(())
    }
}

fn sort(
    message: Message,
    waiting: &mut VecDeque<Box<dyn Job>>,
    closing: &mut Vec<oneshot::Sender<()>>,
    queue: &mut mpsc::Receiver<Message>,
) {
    match message {
        Message::Job(job) => waiting.push_back(job),
        Message::Close(reply) => {
            // Refuses new jobs; those already submitted still come.
            queue.close();
            closing.push(reply);
        }
    }
}
