//! Whose a credential is: asked of auth once, then answered from a bounded cache that a revocation empties.
//!
//! The cache is kept honest from two sides. In one process, auth bumps the shared [`Epochs`] when it commits a change.
//! Across processes, the watcher asks auth four times a second what has changed since the last number it saw; entries
//! are trusted only while such a question was answered that began within the last 900 ms of boot time, so that a lost
//! notification, a stopped process or a cut network lead to a look-up, never to a revoked key that still works.
//!
//! A refusal tells nothing of the key that was refused, so it has no subject by which a change could end it. It is
//! therefore kept only until anything at all changes, and for five seconds at most: a key that is enabled again works
//! as soon as one that is revoked stops.
//!
//! However many ask at once whose a credential is that nobody knows yet, auth is asked once.

use std::{
    collections::{HashMap, hash_map},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use paperkey_proto::{
    Error,
    auth::v1::{AuthenticateRequest, ListChangesRequest, credential_service_client::CredentialServiceClient},
    errors::v1::Reason,
    options::v1::Caller as Kind,
    principal::v1::{Mode, Principal},
};
use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use tonic::Status;

use crate::{
    cache::{Epochs, Tick, VersionedCache},
    changes::{self, bell::Rhythm},
    channel::{Channel, ServiceChannel},
    clock::Clock,
    principal::Signer,
    shutdown::Shutdown,
    telemetry::{self, metrics::Counter},
    token::TokenKind,
    uses::{KeyUses, minute_of},
};

/// How many judged credentials are kept.
const CAPACITY: usize = 100_000;
/// How many credentials may be asked about at a time.
const MAX_QUESTIONS: usize = 4_096;
/// Longer than any credential of ours.
const MAX_CREDENTIAL_BYTES: usize = 4_096;
/// How often auth is asked for changes.
pub const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// How old, in milliseconds, what was learned may be before it is no longer trusted.
const TRUSTED_FOR_MS: i64 = 900;
/// How long auth may take to answer before it counts as not there.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// How long, in milliseconds, auth may be silent before it counts as not there. All processes hear the same silence, so
/// whoever left out those that hear it would soon leave out all of them; what needs nobody's credential still works.
const SILENT_FOR_MS: i64 = 30_000;
/// The question of what has changed, which nothing may keep waiting.
pub(crate) const FEED: &str = "/paperkey.auth.v1.CredentialService/ListChanges";
/// How often a verdict is asked for that changes overtake.
const MAX_TRIES: usize = 3;
/// How long a refusal is kept, in milliseconds.
const REFUSED_FOR_MS: i64 = 5_000;

/// Tells whose a credential is.
#[async_trait]
pub trait Authenticator: Send + Sync {
    /// The principal behind a credential, in the team and mode that the call names (for accounts).
    async fn authenticate(&self, credential: &str, team: Option<&str>, mode: Mode) -> Result<Arc<Principal>, Error>;

    /// What [`Self::authenticate`] would say, where that is known without asking anybody.
    fn recall(&self, credential: &str, team: Option<&str>, mode: Mode) -> Option<Result<Arc<Principal>, Error>> {
        let _ = (credential, team, mode);
        None
    }
}

impl dyn Authenticator {
    /// The principal behind a credential: what is known, or else what is asked. Nothing is allocated for what is known.
    pub async fn principal(&self, credential: &str, team: Option<&str>, mode: Mode) -> Result<Arc<Principal>, Error> {
        match self.recall(credential, team, mode) {
            Some(known) => known,
            None => self.authenticate(credential, team, mode).await,
        }
    }
}

/// Asks auth, and remembers.
#[derive(Debug)]
pub struct CachedAuthenticator(Arc<Memory>);

/// How credentials were judged so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgements {
    /// Auth was asked.
    pub lookups: u64,
    /// The answer was known.
    pub hits: u64,
    /// The credential could be none: its form or its checksum is wrong.
    pub malformed: u64,
}

/// How well a process keeps up with what changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feed {
    /// Questions of what has changed that were answered.
    pub answered: u64,
    /// Questions that were not.
    pub failed: u64,
    /// How long ago the last one began that was answered to its end; since the start, where none was.
    pub age: Duration,
    /// Credentials that are remembered.
    pub entries: usize,
}

/// What questions share with those who wait for their answers.
struct Memory {
    client: CredentialServiceClient<ServiceChannel>,
    cache: VersionedCache<[u8; 32], Verdict>,
    questions: Mutex<HashMap<[u8; 32], Question>>,
    epochs: Arc<Epochs>,
    uses: Arc<KeyUses>,
    clock: Clock,
    /// When the last answered question about changes was asked, in boot time: how far the cache may be trusted.
    asked_ms: AtomicI64,
    /// Whether auth did not answer when it was asked last.
    is_deaf: AtomicBool,
    /// When it was made, in boot time.
    made_ms: i64,
    polls: Counter,
    failed_polls: Counter,
    lookups: AtomicU64,
    hits: AtomicU64,
    malformed: AtomicU64,
}

impl std::fmt::Debug for Memory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Memory").field("entries", &self.cache.len()).finish_non_exhaustive()
    }
}

/// What asked-for changes nobody has learned yet.
const NEVER: i64 = i64::MIN;

#[derive(Clone)]
enum Verdict {
    Good(Arc<Known>),
    /// Good until anything changes after this.
    Refused {
        began: Tick,
        until_ms: i64,
    },
}

struct Known {
    principal: Arc<Principal>,
    /// The last minute in which a use was noted.
    noted_minute: AtomicI64,
}

/// What auth said; nothing yet where it has not answered. Errors travel as the status that they came as, which many
/// can read.
type Answer = Option<Result<Arc<Principal>, Status>>;

/// A question that is under way.
struct Question {
    answer: watch::Receiver<Answer>,
    began: Began,
}

#[derive(Clone, Copy, PartialEq, Eq)]
struct Began {
    tick: Tick,
    boot_ms: i64,
    /// Tells the questions about one credential apart.
    number: u64,
}

impl CachedAuthenticator {
    /// Asks auth by that channel. Where auth is in this process, `epochs` is shared with it.
    pub fn new(auth: &Channel, signer: Signer, clock: Clock, epochs: Arc<Epochs>) -> Arc<Self> {
        let client = CredentialServiceClient::new(auth.as_service("gateway", signer, None));
        Arc::new(Self(Arc::new(Memory {
            uses: Arc::new(KeyUses::new(client.clone())),
            client,
            cache: VersionedCache::new(CAPACITY),
            questions: Mutex::default(),
            epochs,
            made_ms: clock.boot_ms(),
            clock,
            polls: Counter::new(),
            failed_polls: Counter::new(),
            asked_ms: AtomicI64::new(NEVER),
            is_deaf: AtomicBool::new(false),
            lookups: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
        })))
    }

    /// How credentials were judged so far.
    pub fn judgements(&self) -> Judgements {
        let Memory { lookups, hits, malformed, .. } = &*self.0;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Judgements { lookups: read(lookups), hits: read(hits), malformed: read(malformed) }
    }

    /// How well this process keeps up with what changes.
    pub fn feed(&self) -> Feed {
        let Memory { clock, asked_ms, made_ms, polls, failed_polls, cache, .. } = &*self.0;
        let asked_ms = asked_ms.load(Ordering::SeqCst).max(*made_ms);
        let age_ms = u64::try_from(clock.boot_ms().saturating_sub(asked_ms)).unwrap_or(0);
        Feed {
            answered: polls.get(),
            failed: failed_polls.get(),
            age: Duration::from_millis(age_ms),
            entries: cache.len(),
        }
    }

    /// The uses of keys that were noted here.
    pub fn uses(&self) -> &Arc<KeyUses> {
        &self.0.uses
    }

    /// Whether auth has ever said what has changed, and has not been silent for long since. Until it has, nobody can be
    /// let in; how old what is known is, [`Self::feed`] tells long before.
    pub fn hears_auth(&self) -> bool {
        let asked_ms = self.0.asked_ms.load(Ordering::SeqCst);
        asked_ms != NEVER && self.0.clock.boot_ms() - asked_ms <= SILENT_FOR_MS
    }

    /// Learns of changes until shut down. A rhythm slower than [`POLL_INTERVAL`] would let nothing be trusted for long.
    pub async fn watch(self: Arc<Self>, mut rhythm: Rhythm, mut shutdown: Shutdown) {
        let mut since = -1;
        while !shutdown.has_come() {
            // A full page may not be the last.
            if self.0.learn(&mut since).await {
                continue;
            }
            tokio::select! {
                () = rhythm.next() => {}
                () = shutdown.wait() => return,
            }
        }
    }
}

impl Memory {
    /// Asks once what has changed after a number, and says whether there is more. Only when there is not, all that had
    /// changed when the question was asked is known, and what is remembered may be trusted from then on.
    async fn learn(&self, since: &mut i64) -> bool {
        let asked_ms = self.clock.boot_ms();
        let mut client = self.client.clone();
        let question = client.list_changes(ListChangesRequest { since: *since });
        let answer = match tokio::time::timeout(ASK_TIMEOUT, question).await.unwrap_or_else(|_| Err(too_late().into()))
        {
            Ok(answer) => answer.into_inner(),
            Err(status) => {
                self.failed_polls.inc();
                if !self.is_deaf.swap(true, Ordering::Relaxed) {
                    tracing::warn!(code = ?status.code(), "auth does not answer what has changed, and is asked on");
                }
                return false;
            }
        };
        self.polls.inc();
        if self.is_deaf.swap(false, Ordering::Relaxed) {
            tracing::info!("auth answers again what has changed");
        }
        if answer.gap || *since < 0 {
            self.epochs.bump_all();
        }
        for subject in &answer.subjects {
            self.epochs.bump(subject);
        }
        *since = answer.seq;
        let more = answer.subjects.len() >= changes::PAGE;
        if !more {
            self.asked_ms.store(asked_ms, Ordering::SeqCst);
        }
        more
    }

    fn is_trusted(&self) -> bool {
        let asked_ms = self.asked_ms.load(Ordering::SeqCst);
        asked_ms != NEVER && self.clock.boot_ms() - asked_ms <= TRUSTED_FOR_MS
    }

    /// What is known of a credential.
    fn recall(&self, key: &[u8; 32]) -> Option<Result<Arc<Principal>, Error>> {
        let verdict = self.cache.get(&self.epochs, key)?;
        // Looked at last: what was known a while before is known no longer.
        if !self.is_trusted() {
            return None;
        }
        let now_ms = self.clock.now_ms();
        let known = match verdict {
            Verdict::Good(known) => {
                let alive = is_alive(&known.principal, now_ms);
                if alive {
                    self.note(&known, now_ms);
                }
                if alive { Ok(Arc::clone(&known.principal)) } else { Err(Error::unauthenticated()) }
            }
            Verdict::Refused { began, until_ms } if now_ms < until_ms && began == self.epochs.now() => {
                Err(Error::unauthenticated())
            }
            Verdict::Refused { .. } => return None,
        };
        self.hits.fetch_add(1, Ordering::Relaxed);
        Some(known)
    }

    /// Notes that a credential was used, if it is a key.
    fn note(&self, known: &Known, now_ms: i64) {
        let minute = minute_of(now_ms);
        if known.noted_minute.load(Ordering::Relaxed) == minute {
            return;
        }
        known.noted_minute.store(minute, Ordering::Relaxed);
        if is_key(known.principal.kind()) {
            self.uses.note(&known.principal.id, now_ms);
        }
    }

    /// Asks whose a credential is, or waits for the answer to the same question of somebody else.
    async fn ask(
        self: &Arc<Self>,
        key: [u8; 32],
        credential: &str,
        team: Option<&str>,
        mode: Mode,
    ) -> Result<Arc<Principal>, Error> {
        let mut answer = self.question(key, credential, team, mode)?;
        let answer = match answer.wait_for(Option::is_some).await {
            Ok(answer) => answer.clone(),
            Err(_) => None,
        };
        let unanswered = || Err(Error::unavailable("a question to auth has come to nothing").into());
        let principal = answer.unwrap_or_else(unanswered).map_err(|status| Error::from_status(&status))?;
        if is_alive(&principal, self.clock.now_ms()) { Ok(principal) } else { Err(Error::unauthenticated()) }
    }

    /// The question about a credential. One that is under way already is joined, unless its answer may be older than
    /// what this caller must know: where something has changed since, or for longer than anything known is trusted.
    fn question(
        self: &Arc<Self>,
        key: [u8; 32],
        credential: &str,
        team: Option<&str>,
        mode: Mode,
    ) -> Result<watch::Receiver<Answer>, Error> {
        let boot_ms = self.clock.boot_ms();
        let mut questions = self.questions.lock();
        let full = questions.len() >= MAX_QUESTIONS;
        let entry = questions.entry(key);
        if let hash_map::Entry::Occupied(entry) = &entry {
            let Question { answer, began } = entry.get();
            if boot_ms - began.boot_ms <= TRUSTED_FOR_MS && began.tick == self.epochs.now() {
                return Ok(answer.clone());
            }
        } else if full {
            return Err(Error::unavailable("too many credentials are asked about"));
        }
        let number = self.lookups.fetch_add(1, Ordering::Relaxed);
        let began = Began { tick: self.epochs.now(), boot_ms, number };
        let (sender, answer) = watch::channel(None);
        entry.insert_entry(Question { answer: answer.clone(), began });
        drop(questions);
        let request = AuthenticateRequest {
            credential: credential.to_owned(),
            team_id: team.unwrap_or_default().to_owned(),
            mode: mode.into(),
        };
        let asked = Asked { memory: Arc::clone(self), key, began };
        // On its own, so that one who goes away takes nobody else's answer along.
        tokio::spawn(telemetry::carried(async move {
            let answer = asked.answer(request).await;
            sender.send_replace(Some(answer));
        }));
        Ok(answer)
    }
}

/// A question that is no longer under way once this is dropped.
struct Asked {
    memory: Arc<Memory>,
    key: [u8; 32],
    began: Began,
}

impl Asked {
    /// What auth says. One that a change has overtaken is asked for anew: nobody is told of before it.
    async fn answer(&self, request: AuthenticateRequest) -> Result<Arc<Principal>, Status> {
        let Memory { epochs, lookups, .. } = &*self.memory;
        let mut began = self.began.tick;
        for _ in 0..MAX_TRIES {
            let answer = self.verdict(request.clone()).await;
            let overtaken = answer
                .as_ref()
                .is_ok_and(|principal| epochs.has_changed(principal.subjects.iter().map(String::as_str), began));
            if !overtaken {
                self.keep(&answer, began);
                return answer;
            }
            began = epochs.now();
            lookups.fetch_add(1, Ordering::Relaxed);
        }
        Err(Error::unavailable("a credential changes faster than auth answers").into())
    }

    async fn verdict(&self, request: AuthenticateRequest) -> Result<Arc<Principal>, Status> {
        let mut client = self.memory.client.clone();
        let answer = tokio::time::timeout(ASK_TIMEOUT, client.authenticate(request)).await;
        answer.unwrap_or_else(|_| Err(too_late().into())).and_then(|answer| {
            let principal = answer.into_inner().principal;
            principal.map(Arc::new).ok_or_else(|| Error::internal("auth answered with nobody").into())
        })
    }

    /// Keeps a verdict, and no failure.
    fn keep(&self, answer: &Result<Arc<Principal>, Status>, began: Tick) {
        let Memory { cache, epochs, clock, .. } = &*self.memory;
        match answer {
            Ok(principal) => {
                let subjects = principal.subjects.iter().map(String::as_str);
                let known = Known { principal: Arc::clone(principal), noted_minute: AtomicI64::new(i64::MIN) };
                self.memory.note(&known, clock.now_ms());
                cache.insert(epochs, self.key, Verdict::Good(Arc::new(known)), subjects, began);
            }
            Err(status) if Error::from_status(status).reason() == Reason::InvalidCredentials => {
                let until_ms = clock.now_ms() + REFUSED_FOR_MS;
                cache.insert(epochs, self.key, Verdict::Refused { began, until_ms }, [], began);
            }
            Err(_) => {}
        }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        let mut questions = self.memory.questions.lock();
        // Another may have taken its place.
        if questions.get(&self.key).is_some_and(|question| question.began == self.began) {
            questions.remove(&self.key);
        }
    }
}

#[async_trait]
impl Authenticator for CachedAuthenticator {
    async fn authenticate(&self, credential: &str, team: Option<&str>, mode: Mode) -> Result<Arc<Principal>, Error> {
        if let Some(known) = self.recall(credential, team, mode) {
            return known;
        }
        let (team, mode) = counted(credential, team, mode);
        self.0.ask(cache_key(credential, team, mode), credential, team, mode).await
    }

    fn recall(&self, credential: &str, team: Option<&str>, mode: Mode) -> Option<Result<Arc<Principal>, Error>> {
        if credential.len() > MAX_CREDENTIAL_BYTES || !(TokenKind::of(credential).is_some() || is_jwt(credential)) {
            self.0.malformed.fetch_add(1, Ordering::Relaxed);
            return Some(Err(Error::unauthenticated()));
        }
        let (team, mode) = counted(credential, team, mode);
        self.0.recall(&cache_key(credential, team, mode))
    }
}

/// The team and mode that a call names, where they count: a key has its own, and a caller who names another each time
/// must not make it be asked about each time.
fn counted<'t>(credential: &str, team: Option<&'t str>, mode: Mode) -> (Option<&'t str>, Mode) {
    match TokenKind::claimed_by(credential) {
        None | Some(TokenKind::System) => (team, mode),
        Some(_) => (None, Mode::Unspecified),
    }
}

fn is_alive(principal: &Principal, now_ms: i64) -> bool {
    principal.expires_at_ms == 0 || now_ms < principal.expires_at_ms
}

/// Whether that kind of caller is told by a key, whose use is recorded.
pub(crate) fn is_key(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::TeamKey
            | Kind::FreeKey
            | Kind::UserToken
            | Kind::SystemKey
            | Kind::ProductPublicKey
            | Kind::ProductSecretKey
    )
}

fn too_late() -> Error {
    Error::unavailable("auth does not answer in time")
}

/// Three parts of base64url between dots.
fn is_jwt(credential: &str) -> bool {
    credential.split('.').count() == 3
        && credential.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'))
}

fn cache_key(credential: &str, team: Option<&str>, mode: Mode) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(credential.as_bytes());
    hash.update([0, mode as u8]);
    hash.update(team.unwrap_or_default().as_bytes());
    hash.finalize().into()
}

#[cfg(test)]
mod tests;
