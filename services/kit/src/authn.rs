//! Whose a credential is: asked of auth once, then answered from a bounded cache that a revocation empties.
//!
//! The cache is kept honest from two sides. In one process, auth bumps the shared [`Epochs`] when it commits a change.
//! Across processes, [`Watcher`] asks auth four times a second what has changed since the last number it saw; entries
//! are trusted only while such a question was answered within the last 900 ms, so that a lost notification, a stopped
//! process or a cut network lead to a look-up, never to a revoked key that still works.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use paperkey_proto::{
    Error,
    auth::v1::{AuthenticateRequest, ListChangesRequest, credential_service_client::CredentialServiceClient},
    errors::v1::Reason,
    principal::v1::{Mode, Principal},
};
use parking_lot::RwLock;
use sha2::{Digest as _, Sha256};

use crate::{
    cache::{Epochs, VersionedCache},
    channel::{Channel, ServiceChannel},
    clock::Clock,
    principal::Signer,
    shutdown::Shutdown,
    token::TokenKind,
};

/// How many judged credentials are kept.
const CAPACITY: usize = 100_000;
/// Longer than any credential of ours.
const MAX_CREDENTIAL_BYTES: usize = 4_096;
/// How often auth is asked for changes.
const POLL_INTERVAL: Duration = Duration::from_millis(250);
/// How old the last answered question may be before entries are no longer trusted.
const TRUSTED_FOR: Duration = Duration::from_millis(900);
/// How long auth may take to answer before it counts as not there.
const ASK_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a refusal is kept, in milliseconds.
const REFUSED_FOR_MS: i64 = 5_000;

/// Tells whose a credential is.
#[async_trait]
pub trait Authenticator: Send + Sync {
    /// The principal behind a credential, in the team and mode that the call names (for accounts).
    async fn authenticate(&self, credential: &str, team: Option<&str>, mode: Mode) -> Result<Arc<Principal>, Error>;
}

/// Asks auth, and remembers.
pub struct CachedAuthenticator {
    client: CredentialServiceClient<ServiceChannel>,
    cache: VersionedCache<[u8; 32], Verdict>,
    epochs: Arc<Epochs>,
    clock: Clock,
    /// When the last answered question about changes was asked: how far the cache may be trusted.
    asked: RwLock<Option<Instant>>,
    lookups: AtomicU64,
}

#[derive(Clone)]
enum Verdict {
    Good(Arc<Principal>),
    Refused { until_ms: i64 },
}

impl CachedAuthenticator {
    /// Asks auth by that channel. Where auth is in this process, `epochs` is shared with it.
    pub fn new(auth: &Channel, signer: Signer, clock: Clock, epochs: Arc<Epochs>) -> Arc<Self> {
        Arc::new(Self {
            client: CredentialServiceClient::new(auth.as_service("gateway", signer, None)),
            cache: VersionedCache::new(CAPACITY),
            epochs,
            clock,
            asked: RwLock::new(None),
            lookups: AtomicU64::new(0),
        })
    }

    /// How many times auth was asked whose a credential is.
    pub fn lookups(&self) -> u64 {
        self.lookups.load(Ordering::Relaxed)
    }

    /// Learns of changes until shut down.
    pub async fn watch(self: Arc<Self>, mut shutdown: Shutdown) {
        let mut since = -1;
        loop {
            let asked = self.clock.monotonic();
            let mut client = self.client.clone();
            let question = client.list_changes(ListChangesRequest { since });
            match tokio::time::timeout(ASK_TIMEOUT, question).await.unwrap_or_else(|_| Err(too_late().into())) {
                Ok(answer) => {
                    let answer = answer.into_inner();
                    if answer.gap || since < 0 {
                        self.epochs.bump_all();
                    }
                    for subject in &answer.subjects {
                        self.epochs.bump(subject);
                    }
                    let more = since >= 0 && answer.seq > since && !answer.subjects.is_empty();
                    since = answer.seq;
                    *self.asked.write() = Some(asked);
                    // A full page may not be the last.
                    if more && answer.subjects.len() >= 1_000 {
                        continue;
                    }
                }
                Err(status) => tracing::warn!(code = ?status.code(), "auth does not answer what has changed"),
            }
            tokio::select! {
                () = tokio::time::sleep(POLL_INTERVAL) => {}
                () = shutdown.wait() => return,
            }
        }
    }

    fn is_trusted(&self) -> bool {
        self.asked.read().is_some_and(|asked| self.clock.monotonic().duration_since(asked) <= TRUSTED_FOR)
    }

    async fn ask(&self, credential: &str, team: Option<&str>, mode: Mode) -> Result<Arc<Principal>, Error> {
        self.lookups.fetch_add(1, Ordering::Relaxed);
        let request = AuthenticateRequest {
            credential: credential.to_owned(),
            team_id: team.unwrap_or_default().to_owned(),
            mode: mode.into(),
        };
        let mut client = self.client.clone();
        let answer = tokio::time::timeout(ASK_TIMEOUT, client.authenticate(request)).await.map_err(|_| too_late())?;
        let answer = answer.map_err(|status| Error::from_status(&status))?;
        answer.into_inner().principal.map(Arc::new).ok_or_else(Error::unauthenticated)
    }
}

#[async_trait]
impl Authenticator for CachedAuthenticator {
    async fn authenticate(&self, credential: &str, team: Option<&str>, mode: Mode) -> Result<Arc<Principal>, Error> {
        if credential.len() > MAX_CREDENTIAL_BYTES || !(TokenKind::of(credential).is_some() || is_jwt(credential)) {
            return Err(Error::unauthenticated());
        }
        let key = cache_key(credential, team, mode);
        if self.is_trusted() {
            match self.cache.get(&self.epochs, &key) {
                Some(Verdict::Good(principal)) => return Ok(principal),
                Some(Verdict::Refused { until_ms }) if self.clock.now_ms() < until_ms => {
                    return Err(Error::unauthenticated());
                }
                _ => {}
            }
        }
        let began = self.epochs.now();
        let verdict = self.ask(credential, team, mode).await;
        match &verdict {
            Ok(principal) => {
                let subjects = principal.subjects.iter().map(String::as_str);
                self.cache.insert(&self.epochs, key, Verdict::Good(Arc::clone(principal)), subjects, began);
            }
            Err(error) if error.reason() == Reason::InvalidCredentials => {
                let until_ms = self.clock.now_ms() + REFUSED_FOR_MS;
                self.cache.insert(&self.epochs, key, Verdict::Refused { until_ms }, [], began);
            }
            Err(_) => {}
        }
        verdict
    }
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
