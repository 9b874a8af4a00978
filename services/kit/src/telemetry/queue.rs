//! What waits to be exported: a bounded queue, and the task that empties it in batches.
//!
//! Whoever puts something in never waits. What finds no room, and what the collector does not take, is lost: it is
//! counted, and told of once a minute.

use std::{
    fmt,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
    time::Instant,
};

/// What waits at most.
const LENGTH: usize = 8_192;
/// What is sent at once at most.
const MAX_BATCH: usize = 512;
/// How long a batch gathers.
const GATHER: Duration = Duration::from_secs(1);
/// How long a batch may take to be sent.
pub(super) const EXPORT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often it is told of losses.
const TELL_EVERY: Duration = Duration::from_mins(1);

/// The end at which things are put in.
pub(super) struct Queue<T> {
    sender: mpsc::Sender<T>,
    lost: Arc<AtomicU64>,
}

/// The task at the other end.
pub(super) struct Pipeline {
    end: watch::Sender<bool>,
    task: JoinHandle<()>,
}

impl<T> fmt::Debug for Queue<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queue").finish_non_exhaustive()
    }
}

impl fmt::Debug for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipeline").finish_non_exhaustive()
    }
}

impl<T: Send + 'static> Queue<T> {
    /// A queue of `what`, whose batches `export` sends.
    pub(super) fn start<F, Fut>(what: &'static str, export: F) -> (Self, Pipeline)
    where
        F: Fn(Vec<T>) -> Fut + Send + 'static,
        Fut: Future<Output = bool> + Send + 'static,
    {
        let (sender, receiver) = mpsc::channel(LENGTH);
        let (end, ending) = watch::channel(false);
        let lost = Arc::new(AtomicU64::new(0));
        let task = tokio::spawn(run(what, receiver, ending, Arc::clone(&lost), export));
        (Self { sender, lost }, Pipeline { end, task })
    }

    /// Puts something in, if there is room.
    pub(super) fn put(&self, item: T) {
        if self.sender.try_send(item).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Pipeline {
    /// Sends what is left, and takes nothing more.
    pub(super) async fn end(self) {
        self.end.send_replace(true);
        // A task that panicked has said so.
        let _ = self.task.await;
    }
}

async fn run<T, F, Fut>(
    what: &'static str,
    mut queue: mpsc::Receiver<T>,
    mut ending: watch::Receiver<bool>,
    lost: Arc<AtomicU64>,
    export: F,
) where
    F: Fn(Vec<T>) -> Fut,
    Fut: Future<Output = bool>,
{
    let mut losses = Losses { what, lost, told: 0, tell_at: Instant::now() };
    let mut batch = Vec::new();
    let mut open = true;
    loop {
        tokio::select! {
            received = queue.recv_many(&mut batch, MAX_BATCH) => if received == 0 { break },
            () = ended(&mut ending), if open => {
                open = false;
                // What is in it already still comes.
                queue.close();
            }
            () = tokio::time::sleep_until(losses.tell_at), if losses.has_news() => {}
        }
        losses.tell();
        let gathered = Instant::now() + GATHER;
        while !batch.is_empty() && batch.len() < MAX_BATCH {
            let room = MAX_BATCH - batch.len();
            tokio::select! {
                received = queue.recv_many(&mut batch, room) => if received == 0 { break },
                () = ended(&mut ending), if open => {
                    open = false;
                    queue.close();
                }
                () = tokio::time::sleep_until(gathered) => break,
            }
        }
        if batch.is_empty() {
            continue;
        }
        let count = u64::try_from(batch.len()).unwrap_or(u64::MAX);
        let taken = tokio::time::timeout(EXPORT_TIMEOUT, export(std::mem::take(&mut batch))).await;
        if taken != Ok(true) {
            losses.lost.fetch_add(count, Ordering::Relaxed);
        }
    }
}

/// Waits until the end is told of.
async fn ended(ending: &mut watch::Receiver<bool>) {
    // Nobody can tell of it any more where the other half is gone.
    if ending.wait_for(|ended| *ended).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// What was lost, and whether it was told of.
struct Losses {
    what: &'static str,
    lost: Arc<AtomicU64>,
    told: u64,
    tell_at: Instant,
}

impl Losses {
    fn has_news(&self) -> bool {
        self.lost.load(Ordering::Relaxed) > self.told
    }

    fn tell(&mut self) {
        let now = Instant::now();
        if now < self.tell_at || !self.has_news() {
            return;
        }
        let lost = self.lost.load(Ordering::Relaxed);
        tracing::warn!(what = self.what, lost = lost - self.told, "the collector does not take what is sent to it");
        self.told = lost;
        self.tell_at = now + TELL_EVERY;
    }
}
