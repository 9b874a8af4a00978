//! Bounded caches that never serve what has changed.
//!
//! Whoever changes a thing bumps its subject in [`Epochs`] after the commit and before the answer; an entry is good
//! only while none of its subjects was bumped since its load *began*. A load that raced a change is therefore never
//! served, whichever of the two finished first, and nothing needs an index from subjects to entries.
//! There is no expiry by time here: what also changes by time says so itself (`expires_at`).

use std::{
    hash::{BuildHasher as _, Hash},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use quick_cache::{DefaultHashBuilder, sync::Cache};

use crate::telemetry::metrics::Counter;

/// Subjects share this many counters; two that share one only cost each other a reload.
const STRIPES: usize = 16_384;

/// When what was last changed, by subject.
#[derive(Debug)]
pub struct Epochs {
    tick: AtomicU64,
    everything: AtomicU64,
    stripes: Box<[AtomicU64]>,
    hasher: DefaultHashBuilder,
}

/// A point in the order of changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tick(u64);

impl Default for Epochs {
    fn default() -> Self {
        Self {
            tick: AtomicU64::new(0),
            everything: AtomicU64::new(0),
            stripes: (0..STRIPES).map(|_| AtomicU64::new(0)).collect(),
            hasher: DefaultHashBuilder::default(),
        }
    }
}

impl Epochs {
    /// To be taken before a load begins.
    pub fn now(&self) -> Tick {
        Tick(self.tick.load(Ordering::SeqCst))
    }

    /// The subject has changed: entries of it that were loaded before are no longer good.
    pub fn bump(&self, subject: &str) {
        let tick = self.tick.fetch_add(1, Ordering::SeqCst) + 1;
        self.stripe(self.slot(subject)).fetch_max(tick, Ordering::SeqCst);
    }

    /// Anything may have changed.
    pub fn bump_all(&self) {
        let tick = self.tick.fetch_add(1, Ordering::SeqCst) + 1;
        self.everything.fetch_max(tick, Ordering::SeqCst);
    }

    /// Whether any of the subjects may have changed since.
    pub fn has_changed<'a>(&self, subjects: impl IntoIterator<Item = &'a str>, since: Tick) -> bool {
        let slots: Vec<u32> = subjects.into_iter().map(|subject| self.slot(subject)).collect();
        !self.unchanged(&slots, since)
    }

    fn slot(&self, subject: &str) -> u32 {
        // The mask keeps it far below u32's bound.
        u32::try_from(self.hasher.hash_one(subject) & (STRIPES as u64 - 1)).unwrap_or(0)
    }

    fn stripe(&self, slot: u32) -> &AtomicU64 {
        &self.stripes[slot as usize]
    }

    fn unchanged(&self, slots: &[u32], since: Tick) -> bool {
        self.everything.load(Ordering::SeqCst) <= since.0
            && slots.iter().all(|slot| self.stripe(*slot).load(Ordering::SeqCst) <= since.0)
    }
}

/// A bounded cache whose entries are judged by [`Epochs`].
#[derive(Debug)]
pub struct VersionedCache<K, V> {
    entries: Cache<K, Entry<V>>,
    counts: Option<Arc<Counts>>,
}

/// How often a cache was asked.
#[derive(Debug, Default)]
struct Counts {
    hits: Counter,
    misses: Counter,
}

/// The caches of this process that have a name: few, and known when it starts.
static NAMED: Mutex<Vec<(&'static str, Arc<Counts>)>> = Mutex::new(Vec::new());

/// The caches of this process that have a name, how often they knew the answer, and how often they did not.
pub fn counts() -> Vec<(&'static str, u64, u64)> {
    NAMED.lock().iter().map(|(name, counts)| (*name, counts.hits.get(), counts.misses.get())).collect()
}

#[derive(Clone, Debug)]
struct Entry<V> {
    value: V,
    loaded: Tick,
    slots: smallslots::Slots,
}

impl<K: Eq + Hash, V: Clone> VersionedCache<K, V> {
    /// Holds at most about so many entries.
    pub fn new(capacity: usize) -> Self {
        Self { entries: Cache::new(capacity), counts: None }
    }

    /// The same, counted under a name. Caches of one name are counted together.
    pub fn named(name: &'static str, capacity: usize) -> Self {
        let mut named = NAMED.lock();
        let known = named.iter().find(|(known, _)| *known == name).map(|(_, counts)| Arc::clone(counts));
        let counts = known.unwrap_or_else(|| {
            let counts = Arc::<Counts>::default();
            named.push((name, Arc::clone(&counts)));
            counts
        });
        Self { entries: Cache::new(capacity), counts: Some(counts) }
    }

    /// The value, if it is still good.
    pub fn get<Q>(&self, epochs: &Epochs, key: &Q) -> Option<V>
    where
        Q: Hash + quick_cache::Equivalent<K> + ?Sized,
    {
        let found = self.look_up(epochs, key);
        if let Some(counts) = &self.counts {
            if found.is_some() { counts.hits.inc() } else { counts.misses.inc() }
        }
        found
    }

    fn look_up<Q>(&self, epochs: &Epochs, key: &Q) -> Option<V>
    where
        Q: Hash + quick_cache::Equivalent<K> + ?Sized,
    {
        let entry = self.entries.get(key)?;
        if epochs.unchanged(entry.slots.as_slice(), entry.loaded) {
            Some(entry.value)
        } else {
            self.entries.remove(key);
            None
        }
    }

    /// Keeps a value whose load began at `loaded`, until one of its subjects changes.
    pub fn insert<'a>(
        &self,
        epochs: &Epochs,
        key: K,
        value: V,
        subjects: impl IntoIterator<Item = &'a str>,
        loaded: Tick,
    ) {
        let slots = subjects.into_iter().map(|subject| epochs.slot(subject)).collect();
        self.entries.insert(key, Entry { value, loaded, slots });
    }

    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

/// A few slots without an allocation, many with one.
mod smallslots {
    const INLINE: usize = 4;

    #[derive(Clone, Debug)]
    pub(super) enum Slots {
        Few([u32; INLINE], u8),
        Many(Box<[u32]>),
    }

    impl Slots {
        pub(super) fn as_slice(&self) -> &[u32] {
            match self {
                Self::Few(slots, count) => &slots[..usize::from(*count)],
                Self::Many(slots) => slots,
            }
        }
    }

    impl FromIterator<u32> for Slots {
        fn from_iter<I: IntoIterator<Item = u32>>(iter: I) -> Self {
            let all: Vec<u32> = iter.into_iter().collect();
            match u8::try_from(all.len()) {
                Ok(count) if all.len() <= INLINE => {
                    let mut few = [0; INLINE];
                    few[..all.len()].copy_from_slice(&all);
                    Self::Few(few, count)
                }
                _ => Self::Many(all.into_boxed_slice()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_served_until_its_subject_changes() {
        let epochs = Epochs::default();
        let cache = VersionedCache::new(10);
        cache.insert(&epochs, 1, "one", ["a", "b"], epochs.now());
        assert_eq!(cache.get(&epochs, &1), Some("one"));
        epochs.bump("b");
        assert_eq!(cache.get(&epochs, &1), None);
    }

    #[test]
    fn a_load_that_raced_a_change_is_not_served() {
        let epochs = Epochs::default();
        let cache = VersionedCache::new(10);
        let began = epochs.now();
        epochs.bump("a");
        cache.insert(&epochs, 1, "stale", ["a"], began);
        assert_eq!(cache.get(&epochs, &1), None);
    }

    #[test]
    fn bumping_all_forgets_everything() {
        let epochs = Epochs::default();
        let cache = VersionedCache::new(10);
        cache.insert(&epochs, 1, "one", [], epochs.now());
        epochs.bump_all();
        assert_eq!(cache.get(&epochs, &1), None);
    }
}
