//! When keys were last used, to the minute, and from which networks, without a write per call.
//!
//! Whoever judges credentials notes a use at most once a minute and key, and whoever knows where the call comes from notes
//! that beside it ([`crate::incidents`]); once a second what was noted is handed to auth in batches. What auth did not take
//! is kept and handed over with the next batch, the latest use of a key counting. The end of a process flushes what is
//! left.
//!
//! Deliberately absent: certainty. A process that is killed loses the uses of its last second, and one that cannot reach
//! auth notes no more keys than fit.

use std::{collections::HashMap, sync::Arc, time::Duration};

use paperkey_proto::{
    Error,
    auth::v1::{KeyUse, RecordKeyUsesRequest, credential_service_client::CredentialServiceClient},
};
use parking_lot::Mutex;
use quick_cache::sync::Cache;

use crate::{channel::ServiceChannel, shutdown::Shutdown};

/// Keys of one batch at most, and uses at which it is full.
const BATCH: usize = 500;
/// How many networks of one key may wait. A batch and one such key more are less than auth takes at once.
const MAX_NETWORKS: usize = 64;
/// How often what was noted is handed over.
const INTERVAL: Duration = Duration::from_secs(1);
/// How many keys may wait to be handed over.
pub(crate) const MAX_WAITING: usize = 100_000;
/// How many keys are known to have been noted this minute.
const RECENT: usize = 100_000;

const MINUTE_MS: i64 = 60_000;

/// Keys that were used, on their way to auth.
pub struct KeyUses {
    client: CredentialServiceClient<ServiceChannel>,
    waiting: Mutex<HashMap<String, Waiting>>,
    /// The last minute that was noted, by key: one key may be behind several entries of a cache.
    recent: Cache<String, i64>,
}

/// The uses of one key that wait.
#[derive(Debug, Default)]
struct Waiting {
    last_ms: i64,
    /// From where, and when last.
    networks: Vec<(String, i64)>,
}

impl Waiting {
    /// Says whether it was taken down.
    fn add(&mut self, at_ms: i64, network: Option<&str>) -> bool {
        self.last_ms = at_ms.max(self.last_ms);
        let Some(network) = network else { return true };
        if let Some((_, last_ms)) = self.networks.iter_mut().find(|(known, _)| known == network) {
            *last_ms = at_ms.max(*last_ms);
            return true;
        }
        let fits = self.networks.len() < MAX_NETWORKS;
        if fits {
            self.networks.push((network.to_owned(), at_ms));
        }
        fits
    }

    /// As auth is told. That a key was used is said by where it was used, if that is not older.
    fn told(self, key_id: &str) -> Vec<KeyUse> {
        let told = |used_at_ms, network| KeyUse { key_id: key_id.to_owned(), used_at_ms, network };
        let is_said = self.networks.iter().any(|(_, at_ms)| *at_ms >= self.last_ms);
        let plain = (!is_said).then(|| told(self.last_ms, String::new()));
        self.networks.into_iter().map(|(network, at_ms)| told(at_ms, network)).chain(plain).collect()
    }
}

/// The minute of a time.
pub fn minute_of(at_ms: i64) -> i64 {
    at_ms.div_euclid(MINUTE_MS)
}

impl KeyUses {
    /// Hands over by that client.
    pub fn new(client: CredentialServiceClient<ServiceChannel>) -> Self {
        Self { client, waiting: Mutex::default(), recent: Cache::new(RECENT) }
    }

    /// Notes that a key was used, unless that was noted of this minute already.
    pub fn note(&self, key_id: &str, at_ms: i64) {
        let minute = minute_of(at_ms);
        if self.recent.get(key_id).is_some_and(|noted| noted >= minute) {
            return;
        }
        if self.keep(key_id, at_ms, None) {
            self.recent.insert(key_id.to_owned(), minute);
        }
    }

    /// Notes that a key was used from a network, and says whether there was room for it.
    pub fn note_from(&self, key_id: &str, at_ms: i64, network: &str) -> bool {
        self.keep(key_id, at_ms, Some(network))
    }

    fn keep(&self, key_id: &str, at_ms: i64, network: Option<&str>) -> bool {
        let mut waiting = self.waiting.lock();
        let full = waiting.len() >= MAX_WAITING;
        match waiting.get_mut(key_id) {
            Some(known) => known.add(at_ms, network),
            None if full => false,
            None => {
                let mut first = Waiting { last_ms: at_ms, ..Waiting::default() };
                let taken = first.add(at_ms, network);
                waiting.insert(key_id.to_owned(), first);
                taken
            }
        }
    }

    /// How many keys wait to be handed over.
    pub fn waiting(&self) -> usize {
        self.waiting.lock().len()
    }

    /// Hands over what was noted, until shut down.
    pub async fn hand_over(self: Arc<Self>, mut shutdown: Shutdown) {
        let mut failing = false;
        loop {
            tokio::select! {
                () = tokio::time::sleep(INTERVAL) => {}
                () = shutdown.wait() => return,
            }
            let outcome = self.flush().await;
            if let (Err(error), false) = (&outcome, failing) {
                tracing::warn!(
                    reason = error.reason().as_str_name(),
                    "auth does not take the uses of keys; they are kept"
                );
            }
            failing = outcome.is_err();
        }
    }

    /// Hands over everything that waits; what is not taken waits on.
    pub async fn flush(&self) -> Result<(), Error> {
        loop {
            let batch = self.take();
            if batch.is_empty() {
                return Ok(());
            }
            let mut client = self.client.clone();
            let Err(status) = client.record_key_uses(RecordKeyUsesRequest { uses: batch.clone() }).await else {
                continue;
            };
            for used in &batch {
                self.keep(&used.key_id, used.used_at_ms, Some(used.network.as_str()).filter(|it| !it.is_empty()));
            }
            return Err(Error::from_status(&status));
        }
    }

    fn take(&self) -> Vec<KeyUse> {
        let mut waiting = self.waiting.lock();
        // In the order of ids, so that two processes that record the same keys lock them in the same order.
        let mut ids: Vec<String> = waiting.keys().take(BATCH).cloned().collect();
        ids.sort_unstable();
        let mut batch = Vec::with_capacity(ids.len());
        for id in ids {
            if batch.len() >= BATCH {
                break;
            }
            batch.extend(waiting.remove(&id).map(|known| known.told(&id)).unwrap_or_default());
        }
        batch
    }
}

impl std::fmt::Debug for KeyUses {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyUses").field("waiting", &self.waiting()).finish_non_exhaustive()
    }
}
