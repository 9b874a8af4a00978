//! Keys that somebody tries after they were revoked, on their way to an alert.
//!
//! A refusal must not cost a write, and must not tell a revoked key from one that never was: so a try is noted in
//! memory, at most once a minute and key, and written down by a worker.
//!
//! Deliberately absent: certainty. A process that is killed forgets what it has not yet written.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use paperkey_kit::{clock::Clock, shutdown::Shutdown, uses::minute_of};
use tokio::sync::Notify;

use crate::{domain::alert::AlertKey, store::Store};

/// How many keys are known to have been noted this minute.
const MAX_RECENT: usize = 10_000;
/// How many may wait to be written.
const MAX_WAITING: usize = 1_000;
/// How many one transaction writes.
const AT_A_TIME: usize = 100;
/// What gathers between two transactions is written together.
const PAUSE: Duration = Duration::from_secs(1);
/// How often is looked for what could not be written.
const EVERY: Duration = Duration::from_secs(30);

/// Keys that were tried, and when each was revoked.
#[derive(Clone, Debug)]
pub(crate) struct RevokedUses {
    memory: Arc<Mutex<Memory>>,
    wake: Arc<Notify>,
    clock: Clock,
}

#[derive(Debug, Default)]
struct Memory {
    /// The minute in which a key was noted last.
    recent: HashMap<String, i64>,
    waiting: BTreeMap<String, (AlertKey, i64)>,
}

impl RevokedUses {
    pub(crate) fn new(clock: Clock) -> Self {
        Self { memory: Arc::default(), wake: Arc::default(), clock }
    }

    /// Notes that a key was tried, unless that was noted of this minute already.
    pub(crate) fn note(&self, key: AlertKey, revoked_at_ms: i64) {
        let minute = minute_of(self.clock.now_ms());
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let Memory { recent, waiting } = &mut *memory;
        if recent.get(&key.id).is_some_and(|noted| *noted >= minute) || waiting.len() >= MAX_WAITING {
            return;
        }
        if recent.len() >= MAX_RECENT {
            recent.retain(|_, noted| *noted >= minute);
            if recent.len() >= MAX_RECENT {
                return;
            }
        }
        recent.insert(key.id.clone(), minute);
        waiting.insert(key.id.clone(), (key, revoked_at_ms));
        drop(memory);
        self.wake.notify_one();
    }

    fn take(&self) -> Vec<(AlertKey, i64)> {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let mut taken = Vec::new();
        while let Some((_, tried)) = (taken.len() < AT_A_TIME).then(|| memory.waiting.pop_first()).flatten() {
            taken.push(tried);
        }
        taken
    }

    fn put_back(&self, tried: Vec<(AlertKey, i64)>) {
        let mut memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        for tried in tried {
            memory.waiting.entry(tried.0.id.clone()).or_insert(tried);
        }
    }
}

/// Writes down what was noted, until shut down.
pub(crate) async fn write_down(store: Store, mut shutdown: Shutdown) {
    let uses = store.revoked_uses().clone();
    loop {
        write_all(&store, &uses).await;
        if shutdown.has_come() {
            return;
        }
        tokio::select! {
            () = uses.wake.notified() => {}
            () = tokio::time::sleep(EVERY) => {}
            () = shutdown.wait() => continue,
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            () = shutdown.wait() => {}
        }
    }
}

async fn write_all(store: &Store, uses: &RevokedUses) {
    loop {
        let tried = uses.take();
        if tried.is_empty() {
            return;
        }
        if let Err(error) = store.tell_revoked_uses(tried.clone()).await {
            tracing::warn!(%error, "uses of revoked keys have to wait");
            uses.put_back(tried);
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use paperkey_kit::principal::Tenant;
    use paperkey_proto::principal::v1::Mode;

    use super::*;

    fn key(id: &str) -> AlertKey {
        let tenant = Tenant { team_id: "team_1".into(), mode: Mode::Live };
        AlertKey { id: id.into(), name: "CI".into(), prefix: "pk_live_abcd".into(), tenant }
    }

    #[test]
    fn a_key_is_noted_once_a_minute() {
        let (clock, hand) = Clock::manual(1_790_000_000_000 / 60_000 * 60_000);
        let uses = RevokedUses::new(clock);
        for _ in 0..3 {
            uses.note(key("key_1"), 1);
            uses.note(key("key_2"), 1);
        }
        assert_eq!(uses.take().len(), 2);
        uses.note(key("key_1"), 1);
        assert!(uses.take().is_empty());
        hand.advance_ms(60_000);
        uses.note(key("key_1"), 1);
        assert_eq!(uses.take().len(), 1);
    }

    #[test]
    fn no_more_wait_than_fit_and_those_that_were_not_written_are_kept() {
        let (clock, hand) = Clock::manual(1_790_000_000_000);
        let uses = RevokedUses::new(clock);
        for number in 0..2 * MAX_WAITING {
            uses.note(key(&format!("key_{number}")), 1);
        }
        let taken = uses.take();
        assert_eq!(taken.len(), AT_A_TIME);
        uses.put_back(taken);
        let mut count = 0;
        while let Some(more) = Some(uses.take().len()).filter(|more| *more > 0) {
            count += more;
        }
        assert_eq!(count, MAX_WAITING);
        for number in 0..2 * MAX_RECENT {
            uses.note(key(&format!("other_{number}")), 1);
            uses.take();
        }
        assert!(uses.memory.lock().unwrap().recent.len() <= MAX_RECENT);
        hand.advance_ms(60_000);
        uses.note(key("key_1"), 1);
        assert_eq!(uses.take().len(), 1, "another minute, and there is room");
    }
}
