//! Windows in this process.
//!
//! Subjects are spread over shards, each under a lock of its own. A call holds the locks of all its subjects, taken in one
//! order, while it is judged and entered: it counts in all of its windows or in none, and nothing that is entered is ever
//! taken out again because another claim was refused. The clock is read while the locks are held, so the times of a window
//! are in order.
//!
//! What no longer counts is dropped by the way: each call looks at one more place of each shard that it holds, and one that
//! brings a new subject at several, so there is no worker and no pause. A shard that nobody calls keeps what it has.
//!
//! There are [`MAX_SUBJECTS`] at most. One more takes the place of the subject, among a handful, that has the fewest calls
//! in its window. Whoever can bring so many subjects to call within one window has the allowance of each of them, and gains
//! one more call by each that is forgotten; were new subjects refused instead, he could shut everybody out. Somebody who is
//! at his limit has many calls in his window, and is not forgotten for those who have one. It is warned of, and counted.
//!
//! Deliberately absent: what one subject's window may hold at most. That is its limit, and the operator's choice.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use arrayvec::ArrayVec;
use hashbrown::HashTable;
use parking_lot::{Mutex, MutexGuard};

use super::{
    Claim, MAX_CLAIMS, Receipt, Refused, Standing, Standings, Subject, Verdict,
    window::{Place, Window},
};
use crate::clock::Clock;

/// As many as a byte of a subject can tell apart.
const SHARDS: usize = 256;

/// What a table of 16 384 places takes before it grows.
const SUBJECTS_A_SHARD: usize = 14_336;

/// The most subjects that are known at once. With up to four calls each they take about 270 MB, and twice that at the very
/// most, where so many come and go.
pub const MAX_SUBJECTS: usize = SHARDS * SUBJECTS_A_SHARD;

/// Places of a shard that a new subject looks at, to drop what no longer counts.
const SWEPT_BY_A_NEW_SUBJECT: usize = 8;

/// Subjects of which one is forgotten where there are too many.
const CANDIDATES: usize = 8;

/// A smaller table is not made smaller.
const SMALL_TABLE: usize = 256;

/// Counts calls in this process.
pub struct MemoryLimiter {
    clock: Clock,
    shards: Box<[Aligned]>,
    /// The most subjects of a shard.
    most: usize,
    forgotten: AtomicU64,
}

/// A shard on a line of the cache of its own.
#[derive(Default)]
#[repr(align(64))]
struct Aligned(Mutex<Shard>);

#[derive(Default)]
struct Shard {
    table: HashTable<Known>,
    /// The place that is looked at next.
    hand: usize,
}

/// A subject and its calls.
struct Known {
    subject: Subject,
    window: Window,
}

impl fmt::Debug for MemoryLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryLimiter").finish_non_exhaustive()
    }
}

impl MemoryLimiter {
    /// Counts by that clock.
    pub fn new(clock: Clock) -> Self {
        Self::bounded(clock, SUBJECTS_A_SHARD)
    }

    fn bounded(clock: Clock, most: usize) -> Self {
        let shards = (0..SHARDS).map(|_| Aligned::default()).collect();
        Self { clock, shards, most, forgotten: AtomicU64::new(0) }
    }

    /// Counts a call against all of its limits, or against none.
    ///
    /// # Panics
    ///
    /// Where there are more than [`MAX_CLAIMS`] claims.
    pub fn check(&self, claims: &[Claim]) -> Verdict {
        self.judge(claims, || self.clock.boot_us())
    }

    /// The same at a time of [`Clock::boot_us`] that the caller knows. A subject that was called later than that is
    /// judged as of its last call.
    pub fn decide(&self, claims: &[Claim], now_us: u64) -> Verdict {
        self.judge(claims, || now_us)
    }

    /// Takes back what a call has counted.
    pub fn take_back(&self, receipt: &Receipt) {
        for (subject, id) in &receipt.entries {
            self.remove(*subject, *id);
        }
    }

    /// Where a subject stands.
    pub fn standing(&self, claim: &Claim) -> Standing {
        let shard = self.lock(claim.subject);
        let now_us = self.clock.boot_us();
        standing(claim, &shard.place(claim, now_us), now_us)
    }

    /// How many calls of the subject count at that time.
    pub fn count(&self, claim: &Claim, now_us: u64) -> u32 {
        self.lock(claim.subject).place(claim, now_us).counted
    }

    /// Removes an entry, if it is still there.
    fn remove(&self, subject: Subject, id: u64) {
        if let Some(window) = self.lock(subject).find_mut(subject) {
            window.remove(id);
        }
    }

    /// How many subjects are known, those included whose calls no longer count and who are still to be dropped.
    pub fn subjects(&self) -> usize {
        self.shards.iter().map(|shard| shard.0.lock().table.len()).sum()
    }

    /// How many subjects were forgotten before their time, since there were [`MAX_SUBJECTS`].
    pub fn forgotten(&self) -> u64 {
        self.forgotten.load(Ordering::Relaxed)
    }

    fn judge(&self, claims: &[Claim], now: impl FnOnce() -> u64) -> Verdict {
        let mut held = Held::lock(&self.shards, claims);
        let now_us = now();
        let mut standings = Standings::new();
        let mut room: Option<(usize, u64)> = None;
        let mut places = ArrayVec::<Place, MAX_CLAIMS>::new();
        for (index, claim) in claims.iter().enumerate() {
            let place = held.shard(claim.subject).place(claim, now_us);
            if let Some(at_us) = place.room_at_us
                && room.is_none_or(|(_, latest_us)| at_us > latest_us)
            {
                room = Some((index, at_us));
            }
            places.push(place);
        }
        if let Some((by, at_us)) = room {
            standings.extend(claims.iter().zip(&places).map(|(claim, place)| standing(claim, place, now_us)));
            held.sweep(now_us);
            let retry_after = Duration::from_micros(at_us.saturating_sub(now_us));
            return Verdict::Refused(Refused { standings, by, retry_after, store_is_gone: false });
        }
        let mut entries = ArrayVec::new();
        let mut forgotten = 0;
        for (index, (claim, place)) in claims.iter().zip(&mut places).enumerate() {
            let is_new = !claims[..index].iter().any(|earlier| earlier.subject == claim.subject);
            let mut time_us = now_us;
            if is_new {
                let (id, instead) = held.shard(claim.subject).enter(claim, now_us, self.most, claims);
                forgotten += u64::from(instead);
                entries.push((claim.subject, id));
                time_us = id;
            }
            place.oldest_leaves_us.get_or_insert_with(|| time_us.saturating_add(us(claim.window)));
            place.counted = place.counted.saturating_add(1);
            standings.push(standing(claim, place, now_us));
        }
        held.sweep(now_us);
        drop(held);
        self.tell_of_forgotten(forgotten);
        Verdict::Passed(Receipt { standings, entries })
    }

    fn lock(&self, subject: Subject) -> MutexGuard<'_, Shard> {
        self.shards[shard_of(subject)].0.lock()
    }

    fn tell_of_forgotten(&self, subjects: u64) {
        if subjects == 0 {
            return;
        }
        let before = self.forgotten.fetch_add(subjects, Ordering::Relaxed);
        // At the first, and then ever more rarely.
        if before == 0 || before.ilog2() != (before + subjects).ilog2() {
            let forgotten = before + subjects;
            tracing::warn!(forgotten, most = self.most * SHARDS, "more callers than limits can be kept of");
        }
    }
}

/// The shards that a call holds, each once.
struct Held<'a>(ArrayVec<(usize, MutexGuard<'a, Shard>), MAX_CLAIMS>);

impl<'a> Held<'a> {
    /// Locks what the claims need. All lock in ascending order, so nobody waits for one who waits for him.
    fn lock(shards: &'a [Aligned], claims: &[Claim]) -> Self {
        let mut needed: ArrayVec<usize, MAX_CLAIMS> = claims.iter().map(|claim| shard_of(claim.subject)).collect();
        needed.sort_unstable();
        let mut held = ArrayVec::<_, MAX_CLAIMS>::new();
        for index in needed {
            if held.last().is_none_or(|(last, _)| *last != index) {
                held.push((index, shards[index].0.lock()));
            }
        }
        Self(held)
    }

    fn shard(&mut self, subject: Subject) -> &mut Shard {
        let wanted = shard_of(subject);
        let place = self.0.iter().position(|(index, _)| *index == wanted).expect("the shards of all claims are held");
        &mut self.0[place].1
    }

    fn sweep(&mut self, now_us: u64) {
        for (_, shard) in &mut self.0 {
            shard.sweep(1, now_us);
        }
    }
}

impl Shard {
    fn place(&self, claim: &Claim, now_us: u64) -> Place {
        let length_us = us(claim.window);
        match self.table.find(hash_of(claim.subject), |known| known.subject == claim.subject) {
            Some(known) => known.window.place(claim.requests, length_us, now_us),
            None => Place::untouched(claim.requests, length_us, now_us),
        }
    }

    fn find_mut(&mut self, subject: Subject) -> Option<&mut Window> {
        self.table.find_mut(hash_of(subject), |known| known.subject == subject).map(|known| &mut known.window)
    }

    /// Enters a call, and says at which time it is kept and whether another subject was forgotten for it: none of those
    /// of `claims`.
    fn enter(&mut self, claim: &Claim, now_us: u64, most: usize, claims: &[Claim]) -> (u64, bool) {
        let (subject, length_us) = (claim.subject, us(claim.window));
        if let Some(window) = self.find_mut(subject) {
            return (window.enter(claim.requests, length_us, now_us), false);
        }
        self.sweep(SWEPT_BY_A_NEW_SUBJECT, now_us);
        let forgotten = self.table.len() >= most && self.forget_one(now_us, claims);
        let mut window = Window::new(length_us);
        let id = window.enter(claim.requests, length_us, now_us);
        self.table.insert_unique(hash_of(subject), Known { subject, window }, |known| hash_of(known.subject));
        (id, forgotten)
    }

    /// Looks at that many more places, drops who has no call that counts, and makes the table smaller where it has
    /// become much too large, once a round.
    fn sweep(&mut self, places: usize, now_us: u64) {
        for _ in 0..places {
            if self.hand >= self.table.num_buckets() {
                self.hand = 0;
                let (len, buckets) = (self.table.len(), self.table.num_buckets());
                // It grows at 7/8, and is then 7/16 full; smaller, it has room for a while.
                if buckets > SMALL_TABLE && len < buckets / 3 {
                    self.table.shrink_to(len + len / 4, |known| hash_of(known.subject));
                }
            }
            if let Ok(mut known) = self.table.get_bucket_entry(self.hand)
                && !known.get_mut().window.tidy(now_us)
            {
                known.remove();
            }
            self.hand += 1;
        }
    }

    /// Forgets one of the next few subjects: who has the fewest calls, and of those who called longest ago. Says whether
    /// there was one.
    fn forget_one(&mut self, now_us: u64, claims: &[Claim]) -> bool {
        let mut least: Option<((usize, Option<u64>), usize)> = None;
        let mut candidates = 0;
        for _ in 0..self.table.num_buckets() {
            if self.hand >= self.table.num_buckets() {
                self.hand = 0;
            }
            let index = self.hand;
            self.hand += 1;
            let Some(known) = self.table.get_bucket(index) else { continue };
            // What this very call was judged by stays.
            if claims.iter().any(|claim| claim.subject == known.subject) {
                continue;
            }
            let window = &known.window;
            let worth = (window.counted(window.length_us(), now_us), window.newest());
            if least.is_none_or(|(worth_of_least, _)| worth < worth_of_least) {
                least = Some((worth, index));
            }
            candidates += 1;
            if candidates == CANDIDATES {
                break;
            }
        }
        let Some((_, index)) = least else { return false };
        self.table.get_bucket_entry(index).is_ok_and(|known| {
            known.remove();
            true
        })
    }
}

fn standing(claim: &Claim, place: &Place, now_us: u64) -> Standing {
    Standing {
        class: claim.class,
        requests: claim.requests,
        window: claim.window,
        remaining: claim.requests.saturating_sub(place.counted),
        resets_in: place
            .oldest_leaves_us
            .map_or(Duration::ZERO, |at_us| Duration::from_micros(at_us.saturating_sub(now_us))),
    }
}

/// The window in whole microseconds, none of it lost.
fn us(window: Duration) -> u64 {
    let below_a_second = u64::from(window.subsec_nanos().div_ceil(1_000));
    window.as_secs().saturating_mul(1_000_000).saturating_add(below_a_second)
}

/// Subjects are keyed hashes already: one byte finds the shard and eight others the place in it.
fn shard_of(subject: Subject) -> usize {
    usize::from(subject.0[0])
}

fn hash_of(subject: Subject) -> u64 {
    subject.0.last_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{clock::ManualClock, limits::OnStoreFailure};

    const WINDOW: Duration = Duration::from_mins(1);
    const WINDOW_MS: i64 = 60_000;

    /// A subject of the shard.
    fn subject(shard: u8, number: u64) -> Subject {
        let mut bytes = [0; 16];
        bytes[0] = shard;
        // As a hash would, in all of its bits.
        bytes[8..].copy_from_slice(&number.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        Subject(bytes)
    }

    fn claim(subject: Subject, requests: u32) -> Claim {
        Claim { subject, class: "per_key", requests, window: WINDOW, on_store_failure: OnStoreFailure::Open }
    }

    fn bounded(most: usize) -> (MemoryLimiter, ManualClock) {
        let (clock, hand) = Clock::manual(1_790_000_000_000);
        (MemoryLimiter::bounded(clock, most), hand)
    }

    fn passes(limiter: &MemoryLimiter, claims: &[Claim]) -> bool {
        matches!(limiter.check(claims), Verdict::Passed(_))
    }

    #[test]
    fn who_has_left_his_window_is_dropped_as_others_come() {
        let (limiter, hand) = bounded(SUBJECTS_A_SHARD);
        for number in 0..1_000 {
            assert!(passes(&limiter, &[claim(subject(1, number), 1)]));
        }
        assert_eq!(limiter.subjects(), 1_000);
        hand.advance_ms(WINDOW_MS);
        for number in 1_000..1_300 {
            assert!(passes(&limiter, &[claim(subject(1, number), 1)]));
        }
        assert_eq!(limiter.subjects(), 300);
        assert_eq!(limiter.forgotten(), 0);
    }

    #[test]
    fn who_has_left_his_window_is_dropped_though_only_one_goes_on_calling_and_the_table_shrinks() {
        let (limiter, hand) = bounded(SUBJECTS_A_SHARD);
        for number in 0..1_000 {
            passes(&limiter, &[claim(subject(1, number), 1)]);
        }
        hand.advance_ms(WINDOW_MS);
        let places = |limiter: &MemoryLimiter| limiter.shards[1].0.lock().table.num_buckets();
        let before = places(&limiter);
        for call in 0..=2 * before {
            // A refused call sweeps as well.
            assert_eq!(passes(&limiter, &[claim(subject(1, 5), 1)]), call == 0);
        }
        assert_eq!(limiter.subjects(), 1);
        assert!(places(&limiter) < before / 8);
        assert!(!passes(&limiter, &[claim(subject(1, 5), 1)]), "and it is known as before");
    }

    #[test]
    fn a_sweep_loses_nobody_who_still_counts() {
        let (limiter, hand) = bounded(SUBJECTS_A_SHARD);
        for number in 0..2_000 {
            assert!(passes(&limiter, &[claim(subject(7, number), 1)]));
            hand.advance_ms(10);
        }
        for number in 0..2_000 {
            assert!(!passes(&limiter, &[claim(subject(7, number), 1)]));
        }
    }

    #[test]
    fn one_subject_too_many_takes_the_place_of_one_with_few_calls() {
        let (limiter, _hand) = bounded(1_000);
        let at_his_limit = subject(3, u64::MAX);
        for _ in 0..5 {
            assert!(passes(&limiter, &[claim(at_his_limit, 5)]));
        }
        for number in 0..10_000 {
            assert!(passes(&limiter, &[claim(subject(3, number), 5)]), "nobody new is shut out");
            assert!(limiter.subjects() <= 1_000);
        }
        assert_eq!(limiter.forgotten(), 9_001);
        assert!(!passes(&limiter, &[claim(at_his_limit, 5)]), "many new ones do not set anybody free");
    }

    #[test]
    fn the_subjects_of_one_call_do_not_take_each_others_place() {
        let (limiter, _hand) = bounded(1);
        let claims = [1, 2, 3, 4].map(|number| claim(subject(9, number), 1));
        assert!(passes(&limiter, &claims));
        for claim in claims {
            assert!(!passes(&limiter, &[claim]));
        }
        assert!(passes(&limiter, &[claim(subject(9, 5), 1)]));
        assert!(limiter.subjects() <= 4);
    }

    #[test]
    fn a_window_is_counted_in_whole_microseconds_of_which_none_is_lost() {
        assert_eq!(us(Duration::from_millis(1)), 1_000);
        assert_eq!(us(Duration::from_nanos(1_000_000_001)), 1_000_001);
        assert_eq!(us(Duration::MAX), u64::MAX);
    }
}
