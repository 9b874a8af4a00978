//! What validation remembers, so that a warm one asks no database.
//!
//! Three bounded caches: the licence behind a key (or that there is none), whether a machine is activated, and which
//! products exist. Every write bumps what it changed before it is answered. Where other processes write to the same
//! database, their changes come by the feed, and what is remembered counts only while the feed does: the last poll
//! that was answered must have begun less than [`TRUST_MS`] ago, else the database is asked.
//!
//! Deliberately absent: expiry. A licence's end is judged at each answer by its own time.

use std::{
    hash::Hash,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use paperkey_kit::{
    cache::{Epochs, Tick, VersionedCache},
    changes::{self, Changes},
    clock::Clock,
    db::{Database, DbError},
    principal::Tenant,
    shutdown::Shutdown,
};
use paperkey_proto::principal::v1::Mode;
use prost_types::Struct;
use quick_cache::Equivalent;
use tokio::sync::Mutex;

use super::Store;
use crate::domain::license::Standing;

/// How long after the beginning of the last answered poll a remembered thing counts.
const TRUST_MS: i64 = 900;
/// How often the feed is asked.
const POLL: Duration = Duration::from_millis(250);
/// How long changes stay in the feed: far longer than a process may sleep before it rather forgets everything.
const KEEP_CHANGES: Duration = Duration::from_mins(10);
/// How often old changes are forgotten.
const PRUNE: Duration = Duration::from_mins(1);

/// Licences that are remembered, by key.
const LICENSES: usize = 50_000;
/// Those among them whose metadata is large: few, because each takes much room.
const LARGE_LICENSES: usize = 1_000;
/// Metadata of more bytes than this is large.
const LARGE_BYTES: usize = 1_024;
/// Activations that are remembered.
const ACTIVATIONS: usize = 100_000;
/// Products that are remembered.
const PRODUCTS: usize = 10_000;

/// What a validation needs of a licence.
#[derive(Clone, Debug)]
pub struct View {
    /// `lic_…`
    pub id: String,
    /// What decides whether it may be used.
    pub standing: Standing,
    /// The vendor's own data.
    pub metadata: Option<Struct>,
}

#[derive(PartialEq, Eq, Hash)]
struct LicenseSlot {
    key_hash: [u8; 32],
    team_id: String,
    mode: Mode,
    product_id: String,
}

#[derive(Hash)]
struct LicenseQuery<'a> {
    key_hash: &'a [u8; 32],
    team_id: &'a str,
    mode: Mode,
    product_id: &'a str,
}

impl Equivalent<LicenseSlot> for LicenseQuery<'_> {
    fn equivalent(&self, slot: &LicenseSlot) -> bool {
        *self.key_hash == slot.key_hash
            && self.team_id == slot.team_id
            && self.mode == slot.mode
            && self.product_id == slot.product_id
    }
}

#[derive(PartialEq, Eq, Hash)]
struct ActivationSlot {
    license_id: String,
    fingerprint: String,
}

#[derive(Hash)]
struct ActivationQuery<'a> {
    license_id: &'a str,
    fingerprint: &'a str,
}

impl Equivalent<ActivationSlot> for ActivationQuery<'_> {
    fn equivalent(&self, slot: &ActivationSlot) -> bool {
        self.license_id == slot.license_id && self.fingerprint == slot.fingerprint
    }
}

#[derive(PartialEq, Eq, Hash)]
struct ProductSlot {
    team_id: String,
    mode: Mode,
    product_id: String,
}

/// The caches, and what keeps them honest.
pub(super) struct Lookups {
    epochs: Epochs,
    licenses: VersionedCache<LicenseSlot, Option<Arc<View>>>,
    large_licenses: VersionedCache<LicenseSlot, Option<Arc<View>>>,
    activations: VersionedCache<ActivationSlot, bool>,
    products: VersionedCache<ProductSlot, ()>,
    /// Where others write to the same database.
    feed: Option<Feed>,
}

/// How far the feed was read.
struct Feed {
    clock: Clock,
    started_ms: i64,
    /// When the last poll that was answered began, in milliseconds since `started_ms`.
    answered_ms: AtomicI64,
    /// The last number that was seen; `None` before the first poll.
    seq: Mutex<Option<i64>>,
}

impl Feed {
    fn since_start_ms(&self) -> i64 {
        self.clock.boot_ms() - self.started_ms
    }

    fn is_fresh(&self) -> bool {
        let answered_ms = self.answered_ms.load(Ordering::SeqCst);
        answered_ms >= 0 && self.since_start_ms() - answered_ms <= TRUST_MS
    }
}

impl std::fmt::Debug for Lookups {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Lookups").field("licenses", &self.licenses.len()).finish_non_exhaustive()
    }
}

/// The subject of what is known of a key, whether or not there is a licence to it.
pub(super) fn key_subject(key_hash: &[u8]) -> String {
    key_hash.iter().fold(String::with_capacity(2 * key_hash.len()), |mut hex, byte| {
        for digit in [byte >> 4, byte & 15] {
            hex.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
        }
        hex
    })
}

/// The subject of whether a machine is activated.
pub(super) fn activation_subject(license_id: &str, fingerprint: &str) -> String {
    format!("{license_id}/{fingerprint}")
}

impl Lookups {
    pub(super) fn new(shared: bool, clock: Clock) -> Self {
        let feed = shared.then(|| Feed {
            started_ms: clock.boot_ms(),
            clock,
            answered_ms: AtomicI64::new(-1),
            seq: Mutex::default(),
        });
        Self {
            epochs: Epochs::default(),
            licenses: VersionedCache::named("licenses", LICENSES),
            large_licenses: VersionedCache::named("large_licenses", LARGE_LICENSES),
            activations: VersionedCache::named("activations", ACTIVATIONS),
            products: VersionedCache::named("products", PRODUCTS),
            feed,
        }
    }

    /// Whether other processes write to the same database.
    pub(super) fn is_shared(&self) -> bool {
        self.feed.is_some()
    }

    pub(super) fn bump(&self, subjects: &[String]) {
        for subject in subjects {
            self.epochs.bump(subject);
        }
    }

    /// To be taken before a load begins.
    pub(super) fn now(&self) -> Tick {
        self.epochs.now()
    }

    fn trusted(&self) -> bool {
        self.feed.as_ref().is_none_or(Feed::is_fresh)
    }

    /// The licence behind a key; `Some(None)` where it is known that there is none.
    #[expect(clippy::option_option, reason = "not known, known to be none, and known are three things")]
    pub(super) fn license(&self, tenant: &Tenant, product_id: &str, key_hash: &[u8; 32]) -> Option<Option<Arc<View>>> {
        if !self.trusted() {
            return None;
        }
        let query = LicenseQuery { key_hash, team_id: &tenant.team_id, mode: tenant.mode, product_id };
        let small = self.licenses.get(&self.epochs, &query);
        small.or_else(|| self.large_licenses.get(&self.epochs, &query))
    }

    pub(super) fn learn_license(
        &self,
        tenant: &Tenant,
        product_id: &str,
        key_hash: [u8; 32],
        found: Option<(Arc<View>, usize)>,
        loaded: Tick,
    ) {
        let slot = LicenseSlot {
            key_hash,
            team_id: tenant.team_id.clone(),
            mode: tenant.mode,
            product_id: product_id.to_owned(),
        };
        let key_subject = key_subject(&key_hash);
        let Some((view, metadata_bytes)) = found else {
            return self.licenses.insert(&self.epochs, slot, None, [key_subject.as_str()], loaded);
        };
        let subjects = [key_subject.as_str(), view.id.as_str()];
        let cache = if metadata_bytes > LARGE_BYTES { &self.large_licenses } else { &self.licenses };
        cache.insert(&self.epochs, slot, Some(Arc::clone(&view)), subjects, loaded);
    }

    /// Whether a machine is activated, if that is known.
    pub(super) fn activated(&self, license_id: &str, fingerprint: &str) -> Option<bool> {
        let query = ActivationQuery { license_id, fingerprint };
        self.trusted().then(|| self.activations.get(&self.epochs, &query)).flatten()
    }

    pub(super) fn learn_activated(&self, license_id: &str, fingerprint: &str, activated: bool, loaded: Tick) {
        let slot = ActivationSlot { license_id: license_id.to_owned(), fingerprint: fingerprint.to_owned() };
        let subject = activation_subject(license_id, fingerprint);
        self.activations.insert(&self.epochs, slot, activated, [subject.as_str()], loaded);
    }

    pub(super) fn knows_product(&self, tenant: &Tenant, product_id: &str) -> bool {
        self.trusted() && self.products.get(&self.epochs, &product_slot(tenant, product_id)).is_some()
    }

    pub(super) fn learn_product(&self, tenant: &Tenant, product_id: &str, loaded: Tick) {
        self.products.insert(&self.epochs, product_slot(tenant, product_id), (), [product_id], loaded);
    }

    /// Reads the feed to its end.
    async fn poll(&self, feed: &Feed, database: &Database) -> Result<(), DbError> {
        let mut known = feed.seq.lock().await;
        let began_ms = feed.since_start_ms();
        let mut seq = if let Some(seq) = *known {
            seq
        } else {
            let latest_seq = changes::latest_seq(database).await?;
            self.epochs.bump_all();
            latest_seq
        };
        loop {
            let more = match changes::changes_since(database, seq).await? {
                Changes::Page { latest_seq, subjects, more } => {
                    self.bump(&subjects);
                    seq = latest_seq;
                    more
                }
                Changes::Gap { latest_seq } => {
                    self.epochs.bump_all();
                    seq = latest_seq;
                    false
                }
            };
            *known = Some(seq);
            if !more {
                break;
            }
        }
        feed.answered_ms.store(began_ms, Ordering::SeqCst);
        Ok(())
    }
}

fn product_slot(tenant: &Tenant, product_id: &str) -> ProductSlot {
    ProductSlot { team_id: tenant.team_id.clone(), mode: tenant.mode, product_id: product_id.to_owned() }
}

impl Store {
    /// Learns once what other processes have changed. Does nothing where there can be none.
    pub async fn poll_changes(&self) -> Result<(), DbError> {
        let lookups = &self.parts.lookups;
        match &lookups.feed {
            Some(feed) => lookups.poll(feed, &self.parts.database).await,
            None => Ok(()),
        }
    }

    /// Whether other processes write to the same database.
    pub(crate) fn is_shared(&self) -> bool {
        self.parts.lookups.is_shared()
    }

    /// Learns what other processes change, until shut down.
    pub(crate) async fn follow_changes(self, mut shutdown: Shutdown) {
        let mut failing = false;
        let mut rhythm = self.parts.database.rhythm(POLL);
        let mut pruned = self.parts.clock.monotonic();
        while !shutdown.has_come() {
            // What hangs is given up: a feed that is not read is a cache that is not used.
            let outcome = tokio::time::timeout(Duration::from_secs(2), self.poll_changes()).await;
            let failed = !matches!(outcome, Ok(Ok(())));
            if failed != failing {
                failing = failed;
                if failed {
                    tracing::warn!("the feed of changes does not answer; licenses are read from the database");
                } else {
                    tracing::info!("the feed of changes answers");
                }
            }
            let now = self.parts.clock.monotonic();
            if !failed && now.saturating_duration_since(pruned) >= PRUNE {
                pruned = now;
                if let Err(error) = changes::prune_changes(&self.parts.database, KEEP_CHANGES).await {
                    tracing::warn!(%error, "old changes are not forgotten");
                }
            }
            tokio::select! {
                () = shutdown.wait() => {}
                () = rhythm.next() => {}
            }
        }
    }
}
