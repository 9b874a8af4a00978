//! What happened in a process, on its way to the audit log that auth keeps.
//!
//! A change records itself in its own transaction (`Tx::audit`), and a relay brings what is written there to auth
//! ([`relay`]). What only a gateway knows of a call is recorded in an [`AuditSink`]: in memory first, on disk a moment
//! later, and out of both when auth has taken it over. So a process that is killed loses the last moment at most, and
//! one that ends in good order nothing. Each batch keeps its id wherever it waits, by which auth knows it again.
//!
//! Deliberately absent: joining the two, which auth does where the log is read; and secrets, which nobody is to record
//! and which are taken out where somebody has put one into a path.

mod relay;
mod spool;

use std::{
    collections::VecDeque,
    fmt, io,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use paperkey_proto::{
    Error,
    auth::v1::{AuditRecord, RecordAuditRequest, audit_intake_service_client::AuditIntakeServiceClient},
};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::Notify;

use crate::{channel::ServiceChannel, clock::Clock, ids::new_id, shutdown::Shutdown, token::TokenKind};

pub use relay::relay;
use spool::Spool;

/// How long a record waits for others before it is on disk and on its way.
const INTERVAL: Duration = Duration::from_millis(50);
/// As many records are on their way at once.
const BATCH: usize = 500;
/// Records of one batch at most.
pub const MAX_BATCH: usize = 1_000;
/// A batch ends where it has grown to this, in bytes.
const BATCH_BYTES: usize = 256 * 1_024;
/// As many records may wait in memory; beyond it the sink is closed.
const MAX_WAITING: usize = 20_000;
/// Calls that were let in while the sink was open are still recorded, up to here.
const MOST_WAITING: usize = 100_000;
/// The longest pause after auth did not take a batch.
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// The longest path that is kept, in bytes.
const MAX_PATH: usize = 1_024;
/// The longest of all other texts, in bytes.
const MAX_TEXT: usize = 256;
/// As many resources of a record are kept.
const MAX_RESOURCES: usize = 200;
/// What stands where a secret stood.
const REDACTED: &str = "[redacted]";

/// The records of one process.
///
/// The one of [`Default`] has no way to auth: it keeps what it is given, for those who look ([`Self::take`]).
#[derive(Default)]
pub struct AuditSink {
    way: Option<Way>,
    waiting: Mutex<Vec<AuditRecord>>,
    /// How many wait, to be asked without the lock.
    count: AtomicUsize,
    first: Notify,
    many: Notify,
    spooled: Notify,
    recorded: AtomicU64,
    handed_over: AtomicU64,
    lost: AtomicU64,
}

/// The way to auth, and where batches wait for it.
struct Way {
    client: AuditIntakeServiceClient<ServiceChannel>,
    spool: Arc<Spool>,
    clock: Clock,
    /// One writes at a time, and one sends, so that batches go in their order.
    writing: tokio::sync::Mutex<()>,
    sending: tokio::sync::Mutex<()>,
}

/// What a sink has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AuditCounts {
    /// Records that were taken.
    pub recorded: u64,
    /// Records that auth has taken over, of those and of what was found on disk.
    pub handed_over: u64,
    /// Records that found no room: that many calls ended while the sink had long been closed.
    pub lost: u64,
    /// Records that wait in memory.
    pub waiting: u64,
    /// Bytes on disk that auth has not taken yet.
    pub spooled_bytes: u64,
}

impl AuditSink {
    /// Hands over by that client. What auth has not taken waits in the folder, where it may take up that many bytes
    /// and a batch; what an earlier process has left there is handed over first.
    pub fn new(
        client: AuditIntakeServiceClient<ServiceChannel>,
        folder: &Path,
        max_bytes: u64,
        clock: Clock,
    ) -> io::Result<Arc<Self>> {
        let spool = Arc::new(Spool::open(folder, max_bytes)?);
        let (writing, sending) = Default::default();
        Ok(Arc::new(Self { way: Some(Way { client, spool, clock, writing, sending }), ..Self::default() }))
    }

    /// Takes a record, which is then on its way. Waits for nothing.
    pub fn record(&self, mut record: AuditRecord) {
        shorten(&mut record);
        let count = {
            let mut waiting = self.waiting.lock();
            if waiting.len() >= MOST_WAITING {
                self.lost.fetch_add(1, Ordering::Relaxed);
                return;
            }
            waiting.push(record);
            self.count.store(waiting.len(), Ordering::Relaxed);
            waiting.len()
        };
        self.recorded.fetch_add(1, Ordering::Relaxed);
        match count {
            1 => self.first.notify_one(),
            BATCH => self.many.notify_one(),
            _ => {}
        }
    }

    /// Whether calls may be answered: a record of them could still be kept.
    pub fn is_open(&self) -> bool {
        self.way.is_none() || self.count.load(Ordering::Relaxed) < MAX_WAITING
    }

    /// What it has done so far.
    pub fn counts(&self) -> AuditCounts {
        AuditCounts {
            recorded: self.recorded.load(Ordering::Relaxed),
            handed_over: self.handed_over.load(Ordering::Relaxed),
            lost: self.lost.load(Ordering::Relaxed),
            waiting: self.count.load(Ordering::Relaxed).try_into().unwrap_or(u64::MAX),
            spooled_bytes: self.way.as_ref().map_or(0, |way| way.spool.bytes()),
        }
    }

    /// What waits in memory, which is then nobody's but the caller's. For tests of those who record.
    pub fn take(&self) -> Vec<AuditRecord> {
        let mut waiting = self.waiting.lock();
        self.count.store(0, Ordering::Relaxed);
        std::mem::take(&mut *waiting)
    }

    /// Writes to disk and hands over, until shut down. Whoever ends the process calls [`Self::flush`] after the last
    /// call was answered.
    pub async fn run(self: Arc<Self>, shutdown: Shutdown) {
        let Some(way) = &self.way else { return };
        tokio::join!(self.keep_writing(way, shutdown.clone()), self.keep_sending(way, shutdown));
    }

    /// Writes all that waits to disk, also beyond what may be there, and hands over what auth takes. The rest is handed
    /// over by the next process.
    pub async fn flush(&self) -> Result<(), Error> {
        let Some(way) = &self.way else { return Ok(()) };
        self.write(way, true).await;
        while self.send_one(way).await? {}
        if self.count.load(Ordering::Relaxed) > 0 {
            return Err(Error::unavailable("records could neither be handed over nor written to disk"));
        }
        Ok(())
    }

    async fn keep_writing(&self, way: &Way, mut shutdown: Shutdown) {
        loop {
            if self.count.load(Ordering::Relaxed) == 0 {
                tokio::select! {
                    () = self.first.notified() => {}
                    () = shutdown.wait() => return,
                }
            }
            tokio::select! {
                () = tokio::time::sleep(INTERVAL) => {}
                () = self.many.notified() => {}
                () = shutdown.wait() => return,
            }
            self.write(way, false).await;
        }
    }

    async fn keep_sending(&self, way: &Way, mut shutdown: Shutdown) {
        let mut failures: u32 = 0;
        loop {
            let pause = match self.send_one(way).await {
                Ok(true) => {
                    failures = 0;
                    continue;
                }
                Ok(false) => None,
                Err(error) => {
                    if failures == 0 {
                        let reason = error.reason().as_str_name();
                        tracing::warn!(reason, "auth does not take the audit log; it is kept on disk");
                    }
                    failures = failures.saturating_add(1);
                    Some((INTERVAL * 2_u32.saturating_pow(failures.min(8))).min(MAX_PAUSE))
                }
            };
            let again = async {
                match pause {
                    Some(pause) => tokio::time::sleep(pause).await,
                    None => self.spooled.notified().await,
                }
            };
            tokio::select! {
                () = again => {}
                () = shutdown.wait() => return,
            }
        }
    }

    /// Brings what waits in memory to the spool, batch by batch, as far as there is room. What finds none stays.
    async fn write(&self, way: &Way, at_last: bool) {
        let _one = way.writing.lock().await;
        // Where there is no room the records stay counted, and the door closed.
        if !at_last && !way.spool.has_room() {
            return;
        }
        let mut records = VecDeque::from(self.take());
        while !records.is_empty() && (at_last || way.spool.has_room()) {
            let batch = next_batch(&mut records, &way.clock);
            let (spool, body) = (Arc::clone(&way.spool), batch.encode_to_vec());
            let written = tokio::task::spawn_blocking(move || spool.append(body.into())).await;
            if !written.unwrap_or(false) {
                for record in batch.records.into_iter().rev() {
                    records.push_front(record);
                }
                break;
            }
            self.spooled.notify_one();
        }
        if records.is_empty() {
            return;
        }
        // They were first, and stay so.
        let mut waiting = self.waiting.lock();
        records.extend(waiting.drain(..));
        *waiting = records.into();
        self.count.store(waiting.len(), Ordering::Relaxed);
    }

    /// Hands the oldest batch over. Says whether there was one.
    async fn send_one(&self, way: &Way) -> Result<bool, Error> {
        let _one = way.sending.lock().await;
        let spool = Arc::clone(&way.spool);
        let oldest = match spool.in_memory() {
            Some(body) => Some(body),
            None => tokio::task::spawn_blocking(move || spool.oldest()).await.map_err(Error::internal)?,
        };
        let Some(body) = oldest else { return Ok(false) };
        // What passed its checksum was written by us.
        let batch = RecordAuditRequest::decode(body).map_err(Error::internal)?;
        let count = batch.records.len();
        way.client.clone().record_audit(batch).await.map_err(|status| Error::from_status(&status))?;
        self.handed_over.fetch_add(count.try_into().unwrap_or(0), Ordering::Relaxed);
        let spool = Arc::clone(&way.spool);
        tokio::task::spawn_blocking(move || spool.remove_oldest()).await.map_err(Error::internal)?;
        Ok(true)
    }
}

impl fmt::Debug for AuditSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuditSink").field("counts", &self.counts()).finish_non_exhaustive()
    }
}

fn next_batch(records: &mut VecDeque<AuditRecord>, clock: &Clock) -> RecordAuditRequest {
    let mut batch = RecordAuditRequest { batch_id: new_id("audb", clock), records: Vec::new() };
    let mut bytes = 0;
    while batch.records.len() < MAX_BATCH && bytes < BATCH_BYTES {
        let Some(mut record) = records.pop_front() else { break };
        redact(&mut record);
        bytes += record.encoded_len();
        batch.records.push(record);
    }
    batch
}

/// Cuts what is too long, and takes out what must not be kept: of a record that comes from elsewhere.
pub fn make_fit(record: &mut AuditRecord) {
    shorten(record);
    redact(record);
}

fn shorten(record: &mut AuditRecord) {
    let AuditRecord { team_id, request_id, actor_kind, actor_id, actor_name, rpc, resources, call, .. } = record;
    for text in [team_id, request_id, actor_kind, actor_id, actor_name, rpc] {
        cut(text, MAX_TEXT);
    }
    resources.truncate(MAX_RESOURCES);
    for resource in resources {
        cut(resource, MAX_TEXT);
    }
    if let Some(call) = call {
        cut(&mut call.path, MAX_PATH);
        for text in [&mut call.method, &mut call.code, &mut call.ip, &mut call.user_agent] {
            cut(text, MAX_TEXT);
        }
    }
}

fn cut(text: &mut String, most: usize) {
    if text.len() > most {
        text.truncate(text.floor_char_boundary(most));
        text.shrink_to_fit();
    }
}

/// A path, what it names and a user agent are the caller's words, and somebody may put a key where none belongs.
fn redact(record: &mut AuditRecord) {
    for resource in record.resources.iter_mut().filter(|resource| is_secret(resource)) {
        REDACTED.clone_into(resource);
    }
    let Some(call) = &mut record.call else { return };
    if let Some(end) = call.path.find('?') {
        call.path.truncate(end);
    }
    for (text, between) in [(&mut call.path, '/'), (&mut call.user_agent, ' ')] {
        if text.split(between).any(is_secret) {
            let parts: Vec<&str> =
                text.split(between).map(|part| if is_secret(part) { REDACTED } else { part }).collect();
            *text = parts.join(between.encode_utf8(&mut [0; 4]));
        }
    }
}

/// Whether that could be a token, a session or a licence key.
fn is_secret(word: &str) -> bool {
    let token = word.len() >= 30 && TokenKind::ALL.iter().any(|kind| word.contains(kind.prefix()));
    let session = word.starts_with("eyJ") && word.contains('.');
    let groups = || word.split('-').map(str::len);
    let licence = word.len() == 20 && groups().eq([5, 5, 5, 2]);
    token || session || licence
}

#[cfg(test)]
mod tests;
