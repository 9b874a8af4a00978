//! What this gateway has let through itself: what it goes by while the store is gone, and tells the store when it is back.
//!
//! While the store decides, every call that was let through is noted here too, and what the store last said of its subject.
//! While it is gone, a gateway lets through its share of a limit, so that the shares of all gateways sum to it. In the first
//! window after the failure it lets through less where it knows of others' calls: what it has in the window itself, and its
//! part of what was left at most. So the sum holds across the moment of failure too, for a subject that had used up its
//! limit.
//!
//! Deliberately absent: subjects that this gateway has not heard of within the window before the failure. It cannot know
//! that others have let through calls of theirs, and gives them its share.

use std::collections::HashMap;

use arrayvec::ArrayVec;
use parking_lot::{Mutex, MutexGuard};

use super::{link::micros, members::Crowd};
use crate::limits::{Claim, MAX_CLAIMS, Subject};

/// As many as a byte of a subject can tell apart.
pub(super) const SHARDS: usize = 256;
/// Subjects of a shard at most. One more takes the place of the one, among a few, that has the fewest calls.
const SUBJECTS_A_SHARD: usize = 14_336;
/// Subjects of which one is forgotten where there are too many.
const CANDIDATES: usize = 8;
/// A table with fewer places is not made smaller.
const SMALL_TABLE: usize = 1_024;

/// Marks a call that the store has confirmed to know.
const CONFIRMED: u64 = 1 << 63;

/// A time during which the store is gone.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outage {
    /// Tells it from others.
    pub number: u32,
    /// When it was noticed.
    pub since: u64,
    /// Who shares the limits.
    pub crowd: Crowd,
}

/// Where a subject stands by what this gateway knows alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seat {
    /// Calls of this gateway that count.
    pub count: u32,
    /// How many it may let through.
    pub allowed: u32,
    /// Microseconds until the oldest leaves.
    pub resets_in: u64,
    /// Microseconds until there is room: 0 where there is, nothing where there will be none before the store is back.
    pub wait: Option<u64>,
}

/// What became of a call that was judged here.
#[derive(Clone, Debug)]
pub(super) struct Alone {
    /// The first claim for which there was no room.
    pub refused_by: Option<usize>,
    /// In the order of claims.
    pub seats: ArrayVec<Seat, MAX_CLAIMS>,
}

/// The calls of a subject that still count.
#[derive(Clone, Debug)]
pub(super) struct Running {
    pub subject: Subject,
    pub window_us: u64,
    pub calls: Vec<u64>,
}

/// Calls are known by their times, in microseconds since this gateway has started; no two have the same.
#[derive(Debug)]
pub(super) struct Shadow {
    shards: Box<[Mutex<HashMap<Subject, Record>>]>,
}

#[derive(Debug, Default)]
struct Record {
    /// In the order of times. The first ones may have left the window.
    calls: Vec<u64>,
    /// The most calls of which the store has spoken lately, and when: within the last window, if it has spoken at all.
    peak_at: u64,
    peak: u32,
    /// Rounded up to milliseconds: what is kept longer does no harm.
    window_ms: u32,
    /// The outage for which `cap` was found.
    capped_in: u32,
    /// How many calls there may be in the first window of that outage, beside the share.
    cap: u32,
}

impl Record {
    fn start(&self, window_us: u64, now: u64) -> usize {
        self.calls.partition_point(|call| time(*call).saturating_add(window_us) <= now)
    }

    fn window_us(&self) -> u64 {
        u64::from(self.window_ms) * 1_000
    }

    fn touched(&self) -> u64 {
        self.calls.last().map_or(0, |last| time(*last)).max(self.peak_at)
    }

    fn unheard_of(&self, window_us: u64, since: u64) -> bool {
        self.touched() == 0 || self.touched().saturating_add(window_us) <= since
    }

    fn enter(&mut self, claim: &Claim, call: u64) {
        self.window_ms = u32::try_from(claim.window.as_micros().div_ceil(1_000)).unwrap_or(u32::MAX);
        let at = self.calls.partition_point(|other| time(*other) <= time(call));
        self.calls.insert(at, call);
        // Not each time: moving what is left must not cost more than the calls themselves.
        let left = self.start(self.window_us(), time(call));
        if left * 2 > self.calls.len() {
            self.calls.drain(..left);
        }
    }

    fn tell(&mut self, claim: &Claim, total: u32, now: u64) {
        self.window_ms = u32::try_from(claim.window.as_micros().div_ceil(1_000)).unwrap_or(u32::MAX);
        if total >= self.peak || !self.peak_lasts(micros(claim.window), now) {
            self.peak = total;
            self.peak_at = now;
        }
    }

    fn peak_lasts(&self, window_us: u64, now: u64) -> bool {
        self.peak_at > 0 && self.peak_at.saturating_add(window_us) > now
    }

    /// How many calls may be in the window.
    fn allowed(&mut self, claim: &Claim, outage: &Outage, now: u64) -> u32 {
        let share = outage.crowd.share(claim.requests);
        let window = micros(claim.window);
        if now >= outage.since.saturating_add(window) {
            return share;
        }
        if self.capped_in != outage.number && self.unheard_of(window, outage.since) {
            self.cap = u32::MAX;
            self.capped_in = outage.number;
        }
        if self.capped_in != outage.number {
            let own = self
                .calls
                .iter()
                .filter(|call| time(**call) <= outage.since && time(**call).saturating_add(window) > outage.since);
            let own = u32::try_from(own.count()).unwrap_or(u32::MAX);
            let peak = if self.peak_lasts(window, outage.since) { self.peak } else { 0 };
            let left = claim.requests.saturating_sub(peak);
            self.cap = own.saturating_add(outage.crowd.part(left));
            self.capped_in = outage.number;
        }
        self.cap.min(share)
    }

    fn seat(&mut self, claim: &Claim, outage: &Outage, now: u64) -> Seat {
        let allowed = self.allowed(claim, outage, now);
        let window = micros(claim.window);
        let calls = &self.calls[self.start(window, now)..];
        let leaves_in = |call: u64| (time(call).saturating_add(window)).saturating_sub(now);
        let room_in = |allowed: u32| {
            let allowed = allowed as usize;
            match calls.len().checked_sub(allowed) {
                None => Some(0),
                Some(_) if allowed == 0 => None,
                Some(index) => Some(leaves_in(calls[index])),
            }
        };
        let share = outage.crowd.share(claim.requests);
        let end = outage.since.saturating_add(window).saturating_sub(now);
        let wait = match (room_in(allowed), room_in(share).filter(|_| share > allowed)) {
            (Some(now), Some(later)) => Some(now.min(later.max(end))),
            (None, Some(later)) => Some(later.max(end)),
            (now, None) => now,
        };
        Seat {
            count: u32::try_from(calls.len()).unwrap_or(u32::MAX),
            allowed,
            resets_in: calls.first().map_or(0, |first| leaves_in(*first)),
            wait,
        }
    }
}

impl Shadow {
    pub(super) fn new() -> Self {
        Self { shards: (0..SHARDS).map(|_| Mutex::default()).collect() }
    }

    /// Notes a call that the store has let through, and what it said.
    pub(super) fn note(&self, claims: &[Claim], call: u64, totals: impl Iterator<Item = u32>, now: u64) {
        for (claim, total) in claims.iter().zip(totals) {
            let mut shard = self.shard(claim.subject);
            let record = record(&mut shard, claim.subject);
            record.enter(claim, call | CONFIRMED);
            record.tell(claim, total, now);
        }
    }

    /// Notes what the store said of a call that it refused.
    pub(super) fn tell(&self, claims: &[Claim], totals: impl Iterator<Item = u32>, now: u64) {
        for (claim, total) in claims.iter().zip(totals) {
            record(&mut self.shard(claim.subject), claim.subject).tell(claim, total, now);
        }
    }

    /// Judges a call by what is known here, and enters it everywhere or nowhere.
    pub(super) fn claim(&self, claims: &[Claim], call: u64, outage: &Outage) -> Alone {
        // All locks at once, always in the same order.
        let mut order: ArrayVec<usize, MAX_CLAIMS> = claims.iter().map(|claim| index(claim.subject)).collect();
        order.sort_unstable();
        let mut locked: ArrayVec<(usize, MutexGuard<'_, HashMap<Subject, Record>>), MAX_CLAIMS> = ArrayVec::new();
        for shard in order {
            if locked.last().is_none_or(|(last, _)| *last != shard) {
                locked.push((shard, self.shards[shard].lock()));
            }
        }
        let mut records = |subject: Subject, work: &mut dyn FnMut(&mut Record)| {
            if let Some((_, shard)) = locked.iter_mut().find(|(shard, _)| *shard == index(subject)) {
                work(record(shard, subject));
            }
        };
        let mut alone = Alone { refused_by: None, seats: ArrayVec::new() };
        for claim in claims.iter().take(MAX_CLAIMS) {
            records(claim.subject, &mut |record| alone.seats.push(record.seat(claim, outage, call)));
        }
        alone.refused_by = alone.seats.iter().position(|seat| seat.wait != Some(0));
        if alone.refused_by.is_none() {
            for (claim, seat) in claims.iter().zip(&mut alone.seats) {
                records(claim.subject, &mut |record| {
                    record.enter(claim, call);
                    *seat = Seat { wait: Some(0), ..record.seat(claim, outage, call) };
                });
            }
        }
        alone
    }

    /// Where a subject stands, without counting anything.
    pub(super) fn look(&self, claim: &Claim, now: u64, outage: &Outage) -> Seat {
        match self.shard(claim.subject).get_mut(&claim.subject) {
            Some(record) => record.seat(claim, outage, now),
            None => Record::default().seat(claim, outage, now),
        }
    }

    /// The store knows of a call.
    pub(super) fn confirm(&self, subject: Subject, call: u64) {
        if let Some(record) = self.shard(subject).get_mut(&subject)
            && let Ok(at) = record.calls.binary_search_by_key(&call, |other| time(*other))
        {
            record.calls[at] |= CONFIRMED;
        }
    }

    /// Takes a call out.
    pub(super) fn remove(&self, subject: Subject, call: u64) {
        if let Some(record) = self.shard(subject).get_mut(&subject)
            && let Ok(at) = record.calls.binary_search_by_key(&call, |other| time(*other))
        {
            record.calls.remove(at);
        }
    }

    /// The calls of a shard that still count and came before a time: all, or those that the store is not known to have.
    pub(super) fn running(&self, shard: usize, now: u64, until: u64, confirmed_too: bool) -> Vec<Running> {
        let shard = self.shards[shard].lock();
        let running = shard.iter().map(|(subject, record)| {
            let window_us = record.window_us();
            let calls = &record.calls[record.start(window_us, now)..];
            let wanted = calls
                .iter()
                .filter(|call| time(**call) < until)
                .filter(|call| confirmed_too || **call & CONFIRMED == 0);
            Running { subject: *subject, window_us, calls: wanted.map(|call| time(*call)).collect() }
        });
        running.filter(|running| !running.calls.is_empty()).collect()
    }

    /// Forgets the subjects of a shard that mean nothing any more.
    pub(super) fn sweep(&self, shard: usize, now: u64, outage: Option<&Outage>) {
        let mut shard = self.shards[shard].lock();
        shard.retain(|_, record| {
            let window = record.window_us();
            let matters_until = record.touched().saturating_add(window);
            match outage {
                // What was known at its beginning matters for a window more.
                Some(outage) if matters_until > outage.since => {
                    matters_until.max(outage.since.saturating_add(window)) > now
                }
                _ => matters_until > now,
            }
        });
        if shard.capacity() > SMALL_TABLE && shard.len() < shard.capacity() / 4 {
            let twice = shard.len() * 2;
            shard.shrink_to(twice);
        }
    }

    fn shard(&self, subject: Subject) -> MutexGuard<'_, HashMap<Subject, Record>> {
        self.shards[index(subject)].lock()
    }
}

fn index(subject: Subject) -> usize {
    usize::from(subject.0[0]) % SHARDS
}

fn time(call: u64) -> u64 {
    call & !CONFIRMED
}

fn record(shard: &mut HashMap<Subject, Record>, subject: Subject) -> &mut Record {
    if shard.len() >= SUBJECTS_A_SHARD && !shard.contains_key(&subject) {
        // Were new subjects refused instead, whoever brings many could shut everybody out.
        let fewest = shard.iter().take(CANDIDATES).min_by_key(|(_, record)| record.calls.len());
        if let Some(forgotten) = fewest.map(|(subject, _)| *subject) {
            shard.remove(&forgotten);
        }
    }
    shard.entry(subject).or_default()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::limits::OnStoreFailure;

    const SECOND: u64 = 1_000_000;

    fn claim(subject: u8, requests: u32) -> Claim {
        Claim {
            subject: Subject([subject; 16]),
            class: "test",
            requests,
            window: Duration::from_secs(10),
            on_store_failure: OnStoreFailure::Open,
        }
    }

    fn outage(since: u64, gateways: u32) -> Outage {
        Outage { number: 2, since, crowd: Crowd { gateways, rank: Some(0) } }
    }

    /// Calls as often as there is room; how often there was.
    fn through(shadow: &Shadow, claims: &[Claim], at: u64, outage: &Outage) -> u64 {
        (0..1_000).take_while(|call| shadow.claim(claims, at + call, outage).refused_by.is_none()).count() as u64
    }

    #[test]
    fn a_subject_that_nobody_has_heard_of_has_the_share() {
        let shadow = Shadow::new();
        let outage = outage(100 * SECOND, 4);
        assert_eq!(through(&shadow, &[claim(1, 10)], 100 * SECOND, &outage), 3);
        assert_eq!(through(&shadow, &[claim(1, 10)], 105 * SECOND, &outage), 0);
        let seat = shadow.look(&claim(1, 10), 110 * SECOND - 1, &outage);
        assert_eq!((seat.count, seat.allowed, seat.resets_in, seat.wait), (3, 3, 1, Some(1)));
        assert_eq!(shadow.look(&claim(1, 10), 110 * SECOND, &outage).count, 2);
    }

    #[test]
    fn in_the_first_window_own_calls_are_replaced_and_what_was_left_is_divided() {
        let shadow = Shadow::new();
        let claims = [claim(1, 40)];
        shadow.note(&claims, 91 * SECOND, [1].into_iter(), 91 * SECOND);
        shadow.note(&claims, 98 * SECOND, [32].into_iter(), 98 * SECOND);
        let outage = outage(100 * SECOND, 4);
        // Two of its own, and a quarter of eight.
        assert_eq!(through(&shadow, &claims, 100 * SECOND, &outage), 2);
        assert_eq!(shadow.look(&claims[0], 100 * SECOND + 5, &outage).wait, Some(SECOND - 5));
        assert_eq!(through(&shadow, &claims, 101 * SECOND, &outage), 1);
        assert_eq!(through(&shadow, &claims, 102 * SECOND, &outage), 0);
        // Then it has its whole share.
        assert_eq!(shadow.look(&claims[0], 109 * SECOND, &outage).allowed, 4);
        assert_eq!(through(&shadow, &claims, 110 * SECOND, &outage), 10 - 1);
    }

    #[test]
    fn a_subject_that_has_used_up_its_limit_gets_no_more_than_leaves() {
        let shadow = Shadow::new();
        let claims = [claim(1, 40)];
        shadow.note(&claims, 95 * SECOND, [40].into_iter(), 95 * SECOND);
        // Fewer were counted later; but there are others who may have taken their place.
        shadow.tell(&claims, [36].into_iter(), 99 * SECOND);
        let outage = outage(100 * SECOND, 4);
        assert_eq!(through(&shadow, &claims, 100 * SECOND, &outage), 0);
        assert_eq!(through(&shadow, &claims, 105 * SECOND, &outage), 1);
        // Somebody else's calls alone: nothing of its own to replace, until the share begins.
        let others = [claim(2, 40)];
        shadow.tell(&others, [40].into_iter(), 99 * SECOND);
        let seat = shadow.look(&others[0], 100 * SECOND, &outage);
        assert_eq!((seat.allowed, seat.wait), (0, Some(10 * SECOND)));
    }

    #[test]
    fn what_was_said_longer_ago_than_a_window_means_nothing() {
        let shadow = Shadow::new();
        let claims = [claim(1, 40)];
        shadow.note(&claims, 80 * SECOND, [40].into_iter(), 80 * SECOND);
        assert_eq!(through(&shadow, &claims, 100 * SECOND, &outage(100 * SECOND, 4)), 10);
        // A peak is forgotten too, however often the store speaks.
        let other = [claim(2, 40)];
        for second in 0..30 {
            shadow.tell(&other, [if second == 0 { 40 } else { 4 }].into_iter(), (70 + second) * SECOND);
        }
        assert_eq!(shadow.look(&other[0], 100 * SECOND, &outage(100 * SECOND, 4)).allowed, 9);
    }

    #[test]
    fn a_call_is_entered_everywhere_or_nowhere() {
        let shadow = Shadow::new();
        let outage = outage(0, 1);
        let (wide, narrow) = (claim(1, 10), claim(2, 1));
        assert_eq!(through(&shadow, &[wide, narrow], SECOND, &outage), 1);
        assert_eq!(shadow.look(&wide, SECOND + 5, &outage).count, 1);
        // Subjects of one shard are as good as any.
        let beside = Claim { subject: Subject([&[1][..], &[9; 15]].concat().try_into().unwrap()), ..wide };
        assert_eq!(through(&shadow, &[wide, beside], SECOND + 100, &outage), 9);
        shadow.remove(wide.subject, SECOND);
        assert_eq!(shadow.look(&wide, SECOND + 200, &outage).count, 9);
    }

    #[test]
    fn a_gateway_without_a_share_does_not_say_when_to_come_back() {
        let outage = Outage { crowd: Crowd { gateways: 4, rank: Some(3) }, ..outage(0, 4) };
        assert_eq!(Shadow::new().look(&claim(1, 3), SECOND, &outage).wait, None);
    }

    #[test]
    fn the_store_is_told_what_it_does_not_know() {
        let shadow = Shadow::new();
        let claims = [claim(1, 40)];
        let shard = index(claims[0].subject);
        shadow.note(&claims, 85 * SECOND, [1].into_iter(), 85 * SECOND);
        shadow.note(&claims, 95 * SECOND, [2].into_iter(), 95 * SECOND);
        let outage = outage(96 * SECOND, 1);
        shadow.claim(&claims, 97 * SECOND, &outage);
        shadow.claim(&claims, 98 * SECOND, &outage);
        shadow.confirm(claims[0].subject, 98 * SECOND);
        shadow.claim(&claims, 99 * SECOND, &outage);
        let told =
            |all| shadow.running(shard, 100 * SECOND, 99 * SECOND, all).into_iter().flat_map(|running| running.calls);
        assert_eq!(told(false).collect::<Vec<_>>(), [97 * SECOND]);
        assert_eq!(told(true).collect::<Vec<_>>(), [95 * SECOND, 97 * SECOND, 98 * SECOND]);
    }

    #[test]
    fn subjects_are_forgotten_when_they_mean_nothing_and_not_before() {
        let shadow = Shadow::new();
        let claims = [claim(1, 40)];
        let shard = index(claims[0].subject);
        let known = || shadow.shards[shard].lock().len();
        shadow.note(&claims, 95 * SECOND, [40].into_iter(), 95 * SECOND);
        shadow.sweep(shard, 104 * SECOND, None);
        assert_eq!(known(), 1);
        // What was known when the store was lost counts for a window.
        let outage = outage(100 * SECOND, 4);
        shadow.sweep(shard, 109 * SECOND, Some(&outage));
        assert_eq!(known(), 1);
        assert_eq!(shadow.look(&claims[0], 109 * SECOND, &outage).allowed, 1);
        shadow.sweep(shard, 110 * SECOND, Some(&outage));
        assert_eq!(known(), 0);
    }

    #[test]
    fn there_are_only_so_many_subjects() {
        let shadow = Shadow::new();
        let outage = outage(0, 1);
        for number in 0..SUBJECTS_A_SHARD + 100 {
            let mut name = [0; 16];
            name[8..].copy_from_slice(&(number as u64).to_be_bytes());
            shadow.claim(&[Claim { subject: Subject(name), ..claim(0, 5) }], 1 + number as u64, &outage);
        }
        assert_eq!(shadow.shards[0].lock().len(), SUBJECTS_A_SHARD);
    }
}
