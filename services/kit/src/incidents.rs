//! What a gateway sees of mistakes and attacks, on its way to the alerts of teams: from which networks keys are used, and
//! bursts of refused calls.
//!
//! Networks go along with the uses of keys ([`crate::uses`]), each at most once an hour and key, or once a minute where the
//! key was rotated and its old token is used. Of refusals the last few of each key and of each address are remembered:
//! where as many lie within a minute, that is told, and again each minute while it goes on. Memory is bounded: what was
//! not heard of for longest is forgotten first.
//!
//! Deliberately absent: what a refusal was about, and anything that a caller would wait for. A process that is killed
//! loses what it has not yet handed over.

use std::{
    collections::{HashMap, hash_map::RandomState},
    convert::Infallible,
    hash::BuildHasher as _,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
    time::Duration,
};

use paperkey_proto::{
    Error,
    auth::v1::{
        Incident, RecordIncidentsRequest, RefusalBurst, credential_service_client::CredentialServiceClient,
        incident::What,
    },
    options::v1::Caller as Kind,
    principal::v1::Principal,
};
use parking_lot::Mutex;
use quick_cache::sync::Cache;

use crate::{authn::is_key, channel::ServiceChannel, clock::Clock, shutdown::Shutdown, uses::KeyUses};

/// How many refusals within [`WINDOW_MS`] are a burst.
const BURST: usize = 20;
const WINDOW_MS: i64 = 60_000;
/// How often a burst is told while it goes on, in milliseconds.
const TOLD_EVERY_MS: i64 = 60_000;
/// How often a network is told that a key is used from.
const NETWORK_EVERY_MS: i64 = 60 * 60 * 1_000;
/// How often where the key was rotated. A clock's minute, as that in which the use itself is noted.
const OLD_KEY_EVERY_MS: i64 = 60_000;

/// How many keys and networks are known to have been noted.
const NETWORKS: usize = 100_000;
/// Of how many keys and addresses refusals are remembered.
const SUBJECTS: usize = 20_000;
/// Incidents of one batch at most.
const BATCH: usize = 500;
/// How many incidents may wait to be handed over.
const MAX_WAITING: usize = 5_000;
/// How often what was noted is handed over.
const INTERVAL: Duration = Duration::from_secs(1);

/// What one process has seen.
pub struct Incidents {
    client: CredentialServiceClient<ServiceChannel>,
    uses: Arc<KeyUses>,
    clock: Clock,
    /// Chosen anew by each process: nobody can make two things collide.
    hasher: RandomState,
    /// When a key and a network were noted last, counted in the spans in which they are noted once.
    networks: Cache<u64, i64>,
    refusals: Cache<u64, Arc<Mutex<Refusals>>>,
    waiting: Mutex<HashMap<u64, Incident>>,
}

/// The refusals of one key or address.
#[derive(Debug)]
struct Refusals {
    /// When the last few were, in a ring.
    at_ms: [i64; BURST],
    next: usize,
    /// Those of the burst that goes on; 0 where there is none.
    count: i32,
    since_ms: i64,
    told_at_ms: i64,
}

/// What is told of a burst.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Burst {
    refused: i32,
    since_ms: i64,
}

/// What became of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counted {
    /// One of few.
    Alone,
    /// One of a burst, which was told not long ago.
    Known,
    /// One of a burst that is to be told.
    Told(Burst),
}

impl Default for Refusals {
    fn default() -> Self {
        Self { at_ms: [i64::MIN; BURST], next: 0, count: 0, since_ms: 0, told_at_ms: i64::MIN }
    }
}

impl Refusals {
    fn count(&mut self, now_ms: i64) -> Counted {
        self.at_ms[self.next] = now_ms;
        self.next = (self.next + 1) % BURST;
        let first_ms = self.at_ms[self.next];
        if now_ms.saturating_sub(first_ms) >= WINDOW_MS {
            self.count = 0;
            return Counted::Alone;
        }
        if self.count == 0 {
            self.since_ms = first_ms;
            self.count = i32::try_from(BURST).unwrap_or(i32::MAX);
        } else {
            self.count = self.count.saturating_add(1);
        }
        if now_ms.saturating_sub(self.told_at_ms) < TOLD_EVERY_MS {
            return Counted::Known;
        }
        self.told_at_ms = now_ms;
        Counted::Told(Burst { refused: self.count, since_ms: self.since_ms })
    }
}

impl Incidents {
    /// Hands over by that client; networks go along with those uses.
    pub fn new(client: CredentialServiceClient<ServiceChannel>, uses: Arc<KeyUses>, clock: Clock) -> Arc<Self> {
        Arc::new(Self {
            client,
            uses,
            clock,
            hasher: RandomState::new(),
            networks: Cache::new(NETWORKS),
            refusals: Cache::new(SUBJECTS),
            waiting: Mutex::default(),
        })
    }

    /// A good credential was used from an address. A product's public key is used everywhere, and the system key by the
    /// installation itself: their networks tell nothing.
    pub fn used(&self, principal: &Principal, client: IpAddr) {
        let is_of_team =
            matches!(principal.kind(), Kind::TeamKey | Kind::FreeKey | Kind::UserToken | Kind::ProductSecretKey);
        if !is_of_team {
            return;
        }
        let network = network_of(client);
        let hash = self.hasher.hash_one((&principal.id, network, principal.superseded));
        let now_ms = self.clock.now_ms();
        let span = if principal.superseded {
            now_ms.div_euclid(OLD_KEY_EVERY_MS)
        } else {
            // Not all at the full hour.
            let shift_ms = i64::try_from(hash % NETWORK_EVERY_MS.unsigned_abs()).unwrap_or(0);
            now_ms.saturating_add(shift_ms).div_euclid(NETWORK_EVERY_MS)
        };
        if self.networks.get(&hash).is_some_and(|noted| noted >= span) {
            return;
        }
        if self.uses.note_from(&principal.id, now_ms, &network_text(network)) {
            self.networks.insert(hash, span);
        }
    }

    /// A call was refused with 401, 403 or 429: of somebody who is known, or of nobody. It counts for its key; and for
    /// its address, unless there is a burst of the key already, which is then what is told.
    pub fn refused(&self, principal: Option<&Principal>, client: IpAddr) {
        let now_ms = self.clock.now_ms();
        let ip = address_text(client);
        if let Some(key) = principal.filter(|principal| is_key(principal.kind())) {
            let subject = self.hasher.hash_one(("key", &key.id));
            match self.count(subject, now_ms) {
                Counted::Alone => {}
                Counted::Known => return,
                Counted::Told(Burst { refused, since_ms }) => {
                    let burst = RefusalBurst { key_id: key.id.clone(), ip, refused, since_ms };
                    let what = Some(What::RefusalBurst(burst));
                    self.keep(subject, Incident { team_id: key.team_id.clone(), mode: key.mode, what });
                    return;
                }
            }
        }
        let subject = self.hasher.hash_one(("ip", &ip));
        if let Counted::Told(Burst { refused, since_ms }) = self.count(subject, now_ms) {
            let burst = RefusalBurst { key_id: String::new(), ip, refused, since_ms };
            self.keep(subject, Incident { what: Some(What::RefusalBurst(burst)), ..Incident::default() });
        }
    }

    fn count(&self, subject: u64, now_ms: i64) -> Counted {
        let refusals = self.refusals.get_or_insert_with(&subject, || Ok::<_, Infallible>(Arc::default()));
        let Ok(refusals) = refusals;
        refusals.lock().count(now_ms)
    }

    /// Keeps an incident until it is handed over, in the place of an earlier one of the same.
    fn keep(&self, subject: u64, incident: Incident) {
        let mut waiting = self.waiting.lock();
        if waiting.len() < MAX_WAITING || waiting.contains_key(&subject) {
            waiting.insert(subject, incident);
        }
    }

    /// How many incidents wait to be handed over.
    pub fn waiting(&self) -> usize {
        self.waiting.lock().len()
    }

    /// Hands over what was seen, until shut down.
    pub async fn run(self: Arc<Self>, mut shutdown: Shutdown) {
        let mut failing = false;
        loop {
            tokio::select! {
                () = tokio::time::sleep(INTERVAL) => {}
                () = shutdown.wait() => return,
            }
            let outcome = self.flush().await;
            if let (Err(error), false) = (&outcome, failing) {
                tracing::warn!(reason = error.reason().as_str_name(), "auth does not take incidents; they are kept");
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
            let incidents = batch.iter().map(|(_, incident)| incident.clone()).collect();
            let mut client = self.client.clone();
            let Err(status) = client.record_incidents(RecordIncidentsRequest { incidents }).await else { continue };
            let mut waiting = self.waiting.lock();
            for (subject, incident) in batch {
                // What came meanwhile is newer.
                waiting.entry(subject).or_insert(incident);
            }
            return Err(Error::from_status(&status));
        }
    }

    fn take(&self) -> Vec<(u64, Incident)> {
        let mut waiting = self.waiting.lock();
        let subjects: Vec<u64> = waiting.keys().take(BATCH).copied().collect();
        subjects.into_iter().filter_map(|subject| waiting.remove_entry(&subject)).collect()
    }
}

impl std::fmt::Debug for Incidents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Incidents").field("waiting", &self.waiting()).finish_non_exhaustive()
    }
}

/// The first address of the network that an address is in: of the /24 of an IPv4 address, of the /48 of another.
fn network_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V4(address) => Ipv4Addr::from_bits(address.to_bits() & (u32::MAX << 8)).into(),
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 80)).into(),
    }
}

fn network_text(network: IpAddr) -> String {
    let length = if network.is_ipv4() { 24 } else { 48 };
    format!("{network}/{length}")
}

/// By what an address is counted: itself, or the /64 of an IPv6 address.
fn address_text(address: IpAddr) -> String {
    match address.to_canonical() {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("{}/64", Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << 64))),
    }
}

#[cfg(test)]
mod tests;
