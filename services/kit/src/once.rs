//! Calls that take effect once, however often they are sent: `Idempotency-Key`, on the side of the services.
//!
//! The gateway derives an id, a hash of the request and a key to seal by from the caller's raw credential and the
//! `Idempotency-Key`; of both, nothing else goes on. [`crate::policy::Guarded`] looks for an answer under the id
//! before it lets a call through. The change that a call makes keeps its answer in its own transaction
//! ([`crate::store::Act::answer`]), sealed: it may hold a token that is shown once. What changed nothing, and what was
//! refused for good, is kept afterwards by the policy layer. Whoever keeps an answer first is right; everybody else
//! takes back what they did and gives that answer, in this process or in another.
//!
//! Deliberately absent: answers to calls that failed inside (5xx) or came too often (429), so that trying again is
//! trying again; and a way to open an answer without the credential and the key that it was made under.

use std::{
    any::{Any, TypeId},
    collections::HashMap,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderMap, HeaderName, HeaderValue, Response, header::CONTENT_TYPE};
use http_body::Frame;
use http_body_util::{BodyExt as _, Limited, StreamBody};
use paperkey_proto::{Error, errors::v1::Reason, principal::v1::Once as Token};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::OwnedMutexGuard;
use tonic::{Code, Status, body::Body};

use crate::{
    db::{Database, DbError, IdempotencyRow, Tx, find_answer, prune_answers},
    ids::new_id,
    lease::Leases,
    secrets::KeySealer,
    service::{Answer, Worker},
    shutdown::Shutdown,
};

/// Tells, in the metadata of an answer, that it was given before.
pub const REPLAYED_HEADER: &str = "idempotent-replayed";

/// How long an answer is kept.
const KEPT_MS: i64 = 24 * 60 * 60 * 1_000;
/// How long a repetition waits for the call that it repeats.
const PATIENCE: Duration = Duration::from_secs(2);
/// How many repetitions of one call may wait.
const MAX_WAITING: usize = 32;
/// The longest answer that is read to be kept; longer than what any service may answer with.
const MAX_ANSWER_BYTES: usize = 4 * 1_024 * 1_024;
/// Before each message of gRPC: whether it is compressed, and how long it is.
const FRAME_HEADER_BYTES: usize = 5;

/// How often is looked for answers that were kept long enough.
const FORGET_EVERY: Duration = Duration::from_hours(1);
/// Held from one look to almost the next, so that of many processes one does it.
const FORGET_LEASE: Duration = Duration::from_mins(59);
const FORGET_LEASE_NAME: &str = "kit/answers";
/// Answers that one transaction forgets.
const FORGET_STEP: u32 = 1_000;
/// Transactions of one look at most; the next goes on.
const FORGET_STEPS: u32 = 500;

/// A call that is to take effect once: what tells it from others, and how far it has come.
pub struct Once {
    token: Token,
    id: [u8; 32],
    sealer: KeySealer,
    /// Whether its handler has recorded a change.
    has_changed: AtomicBool,
    /// Whether its answer is kept: durably, with what it answers for.
    is_kept: AtomicBool,
}

impl Once {
    /// A call by what was derived for it; none where that has not the right form.
    pub fn new(token: Token) -> Option<Self> {
        let id = <[u8; 32]>::try_from(token.id.as_slice()).ok()?;
        let sealer = KeySealer::new(&token.seal_key)?;
        (token.request_hash.len() == 32).then_some(())?;
        let (has_changed, is_kept) = (AtomicBool::new(false), AtomicBool::new(false));
        Some(Self { token, id, sealer, has_changed, is_kept })
    }

    /// What was derived for it, as it travels.
    pub fn token(&self) -> &Token {
        &self.token
    }

    /// The same call, before anything was done.
    pub(crate) fn anew(&self) -> Self {
        let (has_changed, is_kept) = (AtomicBool::new(false), AtomicBool::new(false));
        Self { token: self.token.clone(), id: self.id, sealer: self.sealer.clone(), has_changed, is_kept }
    }

    /// Notes that a change is recorded that the answer must be kept with.
    pub(crate) fn changes(&self) {
        self.has_changed.store(true, Ordering::SeqCst);
    }

    /// Keeps a message as the answer, if the transaction commits.
    pub(crate) fn keep(self: &Arc<Self>, tx: &Tx, message: Vec<u8>) {
        tx.idempotency(self.row(&Kept { message, ..Kept::default() }, tx.now_ms()));
        let this = Arc::clone(self);
        tx.after_commit(move || this.is_kept.store(true, Ordering::SeqCst));
    }

    fn row(&self, kept: &Kept, now_ms: i64) -> IdempotencyRow {
        IdempotencyRow {
            key_hash: self.id.to_vec(),
            request_hash: self.token.request_hash.clone(),
            sealed_response: self.sealer.seal(&self.owner(), &kept.encode_to_vec()),
            expires_at_ms: now_ms.saturating_add(KEPT_MS),
        }
    }

    /// What a sealed answer is bound to: the call, and the request that it answers.
    fn owner(&self) -> String {
        let bytes = self.id.iter().chain(&self.token.request_hash);
        bytes.fold(String::with_capacity(128), |text, byte| text + &format!("{byte:02x}"))
    }
}

impl fmt::Debug for Once {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Once([redacted])")
    }
}

/// Makes a message of what a store has written, if it is made of such.
type Make = dyn Fn(&dyn Any) -> Option<Vec<u8>> + Send + Sync;

/// How the answer of a call is made of what a store has written.
#[derive(Clone)]
pub(crate) struct Encode {
    takes: TypeId,
    make: Arc<Make>,
}

impl Encode {
    pub(crate) fn new<T: Any, M: Message>(encode: impl Fn(&T) -> M + Send + Sync + 'static) -> Self {
        let make = move |made: &dyn Any| made.downcast_ref::<T>().map(|made| encode(made).encode_to_vec());
        Self { takes: TypeId::of::<T>(), make: Arc::new(make) }
    }

    /// Whether the answer is made of that.
    pub(crate) fn takes<T: Any>(&self) -> bool {
        self.takes == TypeId::of::<T>()
    }

    pub(crate) fn bytes_of(&self, made: &dyn Any) -> Option<Vec<u8>> {
        (self.make)(made)
    }
}

impl fmt::Debug for Encode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Encode")
    }
}

/// An answer as it is kept: the bytes of a message, or a status.
#[derive(Clone, PartialEq, prost::Message)]
#[prost(skip_debug)]
struct Kept {
    /// The gRPC code of a refusal; 0 where `message` is the answer.
    #[prost(int32, tag = "1")]
    code: i32,
    /// What a refusal says.
    #[prost(string, tag = "2")]
    text: String,
    /// The details of a refusal.
    #[prost(bytes = "vec", tag = "3")]
    details: Vec<u8>,
    /// The message of an answer.
    #[prost(bytes = "vec", tag = "4")]
    message: Vec<u8>,
}

/// It may hold a token.
impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Kept([redacted])")
    }
}

impl Kept {
    fn refusal(status: &Status) -> Self {
        let (text, details) = (status.message().to_owned(), status.details().to_vec());
        Self { code: status.code().into(), text, details, message: Vec::new() }
    }

    /// The answer again, marked as such.
    fn replayed(self) -> Response<Body> {
        let mut response = match Code::from_i32(self.code) {
            Code::Ok => answer_of(&self.message),
            code => Status::with_details(code, self.text, Bytes::from(self.details)).into_http(),
        };
        let name = HeaderName::from_static(REPLAYED_HEADER);
        response.headers_mut().insert(name, HeaderValue::from_static("true"));
        response
    }
}

/// A message as a server of gRPC answers with it.
fn answer_of(message: &[u8]) -> Response<Body> {
    let mut frame = Vec::with_capacity(FRAME_HEADER_BYTES + message.len());
    frame.push(0);
    // Nothing is kept that is longer than what is read.
    frame.extend_from_slice(&u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes());
    frame.extend_from_slice(message);
    let trailers = HeaderMap::from_iter([(Status::GRPC_STATUS, HeaderValue::from_static("0"))]);
    let mut response = Response::new(body_of(Bytes::from(frame), Some(trailers)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

fn body_of(data: Bytes, trailers: Option<HeaderMap>) -> Body {
    // Of no length that is told: over gRPC-Web trailers are a piece of the body, and what comes after a length that was
    // told is cut off.
    let frames = [Some(Frame::data(data)), trailers.map(Frame::trailers)];
    Body::new(StreamBody::new(stream::iter(frames.into_iter().flatten().map(Ok::<_, Status>))))
}

/// The message of one plain frame.
fn message_of(frame: &[u8]) -> Option<&[u8]> {
    let ([compressed, length @ ..], message) = frame.split_first_chunk::<FRAME_HEADER_BYTES>()?;
    let is_whole = usize::try_from(u32::from_be_bytes(*length)).is_ok_and(|length| length == message.len());
    (*compressed == 0 && is_whole).then_some(message)
}

/// The answers that a service has kept, and the calls that are under way in this process.
pub(crate) struct Answers {
    database: Database,
    under_way: Arc<UnderWay>,
}

impl Answers {
    pub(crate) fn new(database: Database) -> Self {
        Self { database, under_way: Arc::default() }
    }

    /// Makes the call, unless it was made before: then its answer is given again.
    pub(crate) async fn answer(&self, once: Arc<Once>, call: impl FnOnce() -> Answer + Send) -> Response<Body> {
        self.try_answer(&once, call).await.unwrap_or_else(|error| Status::from(error).into_http())
    }

    async fn try_answer(&self, once: &Once, call: impl FnOnce() -> Answer + Send) -> Result<Response<Body>, Error> {
        let _turn = Turn::take(&self.under_way, once.id).await?;
        if let Some(kept) = self.find(once).await? {
            return Ok(kept.replayed());
        }
        let response = match call().await {
            Ok(response) => response,
            Err(impossible) => match impossible {},
        };
        match Status::from_header_map(response.headers()) {
            Some(status) if status.code() != Code::Ok => self.refused(once, response, &status).await,
            _ if once.is_kept.load(Ordering::SeqCst) => Ok(response),
            _ => self.answered(once, response).await,
        }
    }

    /// The answer to the same request, if it was given before; an error where the key was used for another request.
    async fn find(&self, once: &Once) -> Result<Option<Kept>, Error> {
        let (id, now_ms) = (once.id, self.database.clock().now_ms());
        let found = self.database.read(move |reader| async move { find_answer(&reader, &id, now_ms).await }).await?;
        let Some(found) = found else { return Ok(None) };
        if found.request_hash != once.token.request_hash {
            return Err(Error::new(Reason::IdempotencyMismatch));
        }
        let plain = once.sealer.open(&once.owner(), &found.sealed_response)?;
        Kept::decode(plain.as_slice()).map(Some).map_err(Error::internal)
    }

    /// After a refusal: one for good is kept. One that came from inside, or because there were too many calls, may be
    /// because another was first.
    async fn refused(&self, once: &Once, response: Response<Body>, status: &Status) -> Result<Response<Body>, Error> {
        match Error::from_status(status).entry().http_status {
            // What has no details of ours was said by the transport, and not by the service.
            400..=428 | 430..500 if !status.details().is_empty() => {
                self.keep(once, Kept::refusal(status), response).await
            }
            400..=428 | 430..500 => Ok(response),
            _ => match self.find(once).await {
                Ok(Some(kept)) => Ok(kept.replayed()),
                Err(error) if error.reason() == Reason::IdempotencyMismatch => Err(error),
                Ok(None) | Err(_) => Ok(response),
            },
        }
    }

    /// After an answer that was not kept with a change: there was nothing to change.
    async fn answered(&self, once: &Once, response: Response<Body>) -> Result<Response<Body>, Error> {
        if once.has_changed.load(Ordering::SeqCst) {
            tracing::error!("a change did not keep its answer: had the process died, a repetition would change again");
            debug_assert!(false, "a handler records a change and keeps no answer with it: `Act::answer` is missing");
        }
        let (head, body) = response.into_parts();
        let collected = Limited::new(body, MAX_ANSWER_BYTES).collect().await.map_err(Error::internal)?;
        let trailers = collected.trailers().cloned();
        let data = collected.to_bytes();
        let succeeded = trailers.as_ref().and_then(Status::from_header_map).is_some_and(|end| end.code() == Code::Ok);
        let message = message_of(&data).filter(|_| succeeded).map(<[u8]>::to_vec);
        let response = Response::from_parts(head, body_of(data, trailers));
        match message {
            Some(message) => self.keep(once, Kept { message, ..Kept::default() }, response).await,
            None => Ok(response),
        }
    }

    /// Keeps the answer that `response` gives, and gives the one that counts: where another call has kept one first,
    /// that one.
    async fn keep(&self, once: &Once, kept: Kept, response: Response<Body>) -> Result<Response<Body>, Error> {
        let row = once.row(&kept, self.database.clock().now_ms());
        // The call is done: what is left is small, and spares its repetition.
        let database = self.database.clone().patient();
        let job = database.write(move |tx| async move {
            tx.idempotency(row);
            Ok::<_, DbError>(())
        });
        match job.await {
            Ok(()) => Ok(response),
            Err(error) if error.is_unique_violation() => Ok(match self.find(once).await? {
                Some(first) => first.replayed(),
                None => response,
            }),
            Err(error) => {
                // Nothing was changed, so a repetition may find out anew.
                tracing::warn!(%error, "the answer to a call that changed nothing could not be kept");
                Ok(response)
            }
        }
    }
}

/// The calls that are under way, by their ids.
#[derive(Default)]
struct UnderWay(Mutex<HashMap<[u8; 32], Arc<tokio::sync::Mutex<()>>>>);

/// The turn of one call among those of the same id. The last to leave clears up.
struct Turn {
    under_way: Arc<UnderWay>,
    id: [u8; 32],
    held: Option<OwnedMutexGuard<()>>,
}

impl Turn {
    /// Waits for the calls of the same id that came before, for a while.
    async fn take(under_way: &Arc<UnderWay>, id: [u8; 32]) -> Result<Self, Error> {
        let busy = || {
            let message = "A call with this Idempotency-Key is still under way";
            Error::new(Reason::Conflict).with_message(message).with_retry_after(PATIENCE)
        };
        let turns = {
            let mut under_way = under_way.0.lock();
            let turns = under_way.entry(id).or_default();
            // Held by the map, by the call that runs, and by each that waits.
            if Arc::strong_count(turns) > MAX_WAITING + 1 {
                return Err(busy());
            }
            Arc::clone(turns)
        };
        // From here on it clears up after itself, also where its caller goes away while it waits.
        let mut turn = Self { under_way: Arc::clone(under_way), id, held: None };
        turn.held = Some(tokio::time::timeout(PATIENCE, turns.lock_owned()).await.map_err(|_| busy())?);
        Ok(turn)
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut under_way = self.under_way.0.lock();
        self.held = None;
        if under_way.get(&self.id).is_some_and(|turns| Arc::strong_count(turns) == 1) {
            under_way.remove(&self.id);
        }
    }
}

/// Forgets the answers of a service that were kept long enough, once an hour.
pub fn forget_answers(database: Database) -> Worker {
    Worker::new("answers", |shutdown| forget(database, shutdown))
}

async fn forget(database: Database, mut shutdown: Shutdown) {
    let holder = new_id("proc", database.clock());
    let leases = Leases::new(database.clone());
    loop {
        let forgotten = match leases.try_hold(FORGET_LEASE_NAME, &holder, FORGET_LEASE).await {
            Ok(true) => forget_once(&database, &shutdown).await,
            Ok(false) => Ok(0),
            Err(error) => Err(error),
        };
        match forgotten {
            Ok(0) => {}
            Ok(count) => tracing::debug!(count, "answers are forgotten"),
            // The next hour does what this one could not.
            Err(error) => tracing::warn!(%error, "answers could not be forgotten"),
        }
        tokio::select! {
            () = tokio::time::sleep(FORGET_EVERY) => {}
            () = shutdown.wait() => return,
        }
    }
}

async fn forget_once(database: &Database, shutdown: &Shutdown) -> Result<u64, DbError> {
    let mut forgotten = 0;
    for _ in 0..FORGET_STEPS {
        let step = prune_answers(database, FORGET_STEP).await?;
        forgotten += step;
        if step < u64::from(FORGET_STEP) || shutdown.has_come() {
            break;
        }
    }
    Ok(forgotten)
}
