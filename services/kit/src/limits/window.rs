//! The calls of one subject that count: a short list of times, oldest first.
//!
//! Calls of the same microsecond are as many equal times, so none is moved to another microsecond to tell it apart, and
//! to take any one of them back is to take back the right one.
//!
//! Deliberately absent: a clock and a lock. Whoever owns the window has both.

use std::collections::VecDeque;

/// As many times as a window holds without an allocation of its own.
const FEW: usize = 4;

/// What a ring begins with.
const FIRST_RING: usize = 2 * FEW;

/// The calls of one subject.
#[derive(Debug)]
pub(super) struct Window {
    /// How long the last call that was entered counts, and with it all others.
    length_us: u64,
    times: Times,
}

/// Times in µs, oldest first.
#[derive(Debug)]
enum Times {
    Few { len: u8, times: [u64; FEW] },
    Many(VecDeque<u64>),
}

/// Where a window stands at some time, by some limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// The calls that count.
    pub(super) counted: u32,
    /// When the oldest of them no longer does.
    pub(super) oldest_leaves_us: Option<u64>,
    /// When there is room for one more, if there is none now.
    pub(super) room_at_us: Option<u64>,
}

impl Place {
    /// Where a subject stands of whom nothing is known.
    pub(super) fn untouched(requests: u32, length_us: u64, now_us: u64) -> Self {
        // There is never room in a window for no calls; a window later is as good an answer as any.
        let room_at_us = (requests == 0).then(|| now_us.saturating_add(length_us));
        Self { counted: 0, oldest_leaves_us: None, room_at_us }
    }
}

impl Window {
    pub(super) fn new(length_us: u64) -> Self {
        Self { length_us, times: Times::Few { len: 0, times: [0; FEW] } }
    }

    /// Where the subject stands. A time before the newest call is taken for that of the newest call.
    pub(super) fn place(&self, requests: u32, length_us: u64, now_us: u64) -> Place {
        let now_us = now_us.max(self.newest().unwrap_or(0));
        let len = self.len();
        let gone = self.gone(length_us, now_us);
        let leaves = |index: usize| self.at(index).map(|time_us| time_us.saturating_add(length_us));
        let counted = u32::try_from(len - gone).unwrap_or(u32::MAX);
        // Of more calls than the limit, which a lowered limit finds, all but `requests - 1` must leave.
        let room_at_us = (counted >= requests)
            .then(|| leaves(len - requests as usize).unwrap_or_else(|| now_us.saturating_add(length_us)));
        Place { counted, oldest_leaves_us: leaves(gone), room_at_us }
    }

    /// Enters a call without judging it, and says at which time it is kept: `now_us`, or that of the newest call if that
    /// is later. What no longer counts is dropped. So is the oldest where there are twice as many calls as the limit, which
    /// only those can bring about who do not judge.
    pub(super) fn enter(&mut self, requests: u32, length_us: u64, now_us: u64) -> u64 {
        let time_us = now_us.max(self.newest().unwrap_or(0));
        self.length_us = length_us;
        let most = (requests as usize).saturating_mul(2).max(FEW);
        let gone = self.gone(length_us, time_us).max((self.len() + 1).saturating_sub(most));
        self.forget(gone);
        self.push(time_us, requests as usize);
        time_us
    }

    /// Removes one call of that time, and says whether there was one.
    pub(super) fn remove(&mut self, time_us: u64) -> bool {
        match &mut self.times {
            Times::Few { len, times } => {
                let used = &mut times[..usize::from(*len)];
                let Some(index) = used.iter().rposition(|time| *time == time_us) else { return false };
                used[index..].rotate_left(1);
                *len -= 1;
                true
            }
            Times::Many(ring) => {
                let index = ring.partition_point(|time| *time <= time_us);
                index > 0 && ring[index - 1] == time_us && ring.remove(index - 1).is_some()
            }
        }
    }

    /// Drops what no longer counts, and memory that a subject holds who has become quiet. Says whether anything is left.
    pub(super) fn tidy(&mut self, now_us: u64) -> bool {
        self.forget(self.gone(self.length_us, now_us));
        let Some(newest_us) = self.newest() else { return false };
        let Times::Many(ring) = &mut self.times else { return true };
        // Who calls steadily keeps his ring, so that it does not shrink and grow by turns.
        if newest_us.saturating_add(self.length_us / 2) > now_us {
            return true;
        }
        if ring.len() <= FEW {
            let mut times = [0; FEW];
            for (place, time) in times.iter_mut().zip(&*ring) {
                *place = *time;
            }
            self.times = Times::Few { len: few(ring.len()), times };
        } else if ring.len() <= ring.capacity() / 4 {
            ring.shrink_to(ring.len() * 2);
        }
        true
    }

    /// How long the last call that was entered counts.
    pub(super) fn length_us(&self) -> u64 {
        self.length_us
    }

    /// How many calls still count by that length.
    pub(super) fn counted(&self, length_us: u64, now_us: u64) -> usize {
        self.len() - self.gone(length_us, now_us)
    }

    /// The calls that still count by the length of the last one.
    #[cfg(test)]
    pub(super) fn times(&self, now_us: u64) -> Vec<u64> {
        (self.gone(self.length_us, now_us)..self.len()).filter_map(|index| self.at(index)).collect()
    }

    /// When the newest call was.
    pub(super) fn newest(&self) -> Option<u64> {
        self.len().checked_sub(1).and_then(|last| self.at(last))
    }

    fn len(&self) -> usize {
        match &self.times {
            Times::Few { len, .. } => usize::from(*len),
            Times::Many(ring) => ring.len(),
        }
    }

    fn at(&self, index: usize) -> Option<u64> {
        match &self.times {
            Times::Few { len, times } => times[..usize::from(*len)].get(index).copied(),
            Times::Many(ring) => ring.get(index).copied(),
        }
    }

    /// How many of the oldest no longer count. The window is half open: after exactly its length a call has left it.
    fn gone(&self, length_us: u64, now_us: u64) -> usize {
        let has_left = |time_us: &u64| time_us.saturating_add(length_us) <= now_us;
        match &self.times {
            Times::Few { len, times } => times[..usize::from(*len)].partition_point(has_left),
            Times::Many(ring) if ring.front().is_some_and(has_left) => ring.partition_point(has_left),
            Times::Many(_) => 0,
        }
    }

    /// Drops that many of the oldest.
    fn forget(&mut self, gone: usize) {
        match &mut self.times {
            _ if gone == 0 => {}
            Times::Few { len, times } => {
                times.copy_within(gone.min(FEW).., 0);
                *len -= few(gone);
            }
            // A drain from the front of plain numbers moves the ring's head and nothing else.
            Times::Many(ring) => drop(ring.drain(..gone)),
        }
    }

    fn push(&mut self, time_us: u64, requests: usize) {
        match &mut self.times {
            Times::Few { len, times } => {
                if let Some(place) = times.get_mut(usize::from(*len)) {
                    *place = time_us;
                    *len += 1;
                    return;
                }
                let mut ring = VecDeque::with_capacity(requests.clamp(FEW + 1, FIRST_RING));
                ring.extend(&*times);
                ring.push_back(time_us);
                self.times = Times::Many(ring);
            }
            Times::Many(ring) => {
                // It doubles, but not beyond the limit unless there are more calls than that.
                let (len, capacity) = (ring.len(), ring.capacity());
                if len == capacity {
                    ring.reserve_exact(len.min(requests.saturating_sub(len)).max(1));
                }
                ring.push_back(time_us);
            }
        }
    }
}

/// A number that is known to be one of a few.
fn few(number: usize) -> u8 {
    u8::try_from(number.min(FEW)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LENGTH: u64 = 1_000;

    fn entered(times: impl IntoIterator<Item = u64>) -> Window {
        let mut window = Window::new(LENGTH);
        for time in times {
            window.enter(100, LENGTH, time);
        }
        window
    }

    #[test]
    fn a_window_and_its_subject_fill_one_line_of_the_cache() {
        assert_eq!(size_of::<Window>() + size_of::<super::super::Subject>(), 64);
    }

    #[test]
    fn a_call_leaves_after_exactly_the_length_whether_there_are_few_or_many() {
        for calls in [1, 3, 4, 5, 9, 50] {
            let window = entered(0..calls);
            for now in 0..calls + LENGTH {
                let expected = (0..calls).filter(|time| now.max(calls - 1) < time + LENGTH).count();
                assert_eq!(window.place(100, LENGTH, now).counted as usize, expected, "{calls} calls at {now}");
            }
        }
    }

    #[test]
    fn calls_of_one_microsecond_all_count_and_all_leave_together() {
        let window = entered([7; 30]);
        assert_eq!(window.place(100, LENGTH, 7 + LENGTH - 1).counted, 30);
        assert_eq!(window.place(100, LENGTH, 7 + LENGTH).counted, 0);
    }

    #[test]
    fn room_comes_when_enough_calls_have_left() {
        let window = entered([1, 2, 3, 4, 5, 6]);
        let room = |requests| window.place(requests, LENGTH, 10).room_at_us;
        assert_eq!([7, 6, 5, 1, 0].map(room), [None, Some(1_001), Some(1_002), Some(1_006), Some(1_010)]);
    }

    #[test]
    fn one_call_of_a_time_is_removed_and_no_other() {
        for mut window in [entered([1, 2, 2, 3]), entered([1, 2, 2, 3, 4, 5])] {
            let before = window.times(5).len();
            assert!(window.remove(2));
            assert!(!window.remove(9));
            assert_eq!(window.times(5).len(), before - 1);
            assert_eq!(window.times(5)[..3], [1, 2, 3]);
            assert!(window.remove(2));
            assert!(!window.remove(2));
        }
        assert!(!entered([]).remove(0));
    }

    #[test]
    fn a_ring_grows_up_to_the_limit_and_not_beyond() {
        let capacity = |window: &Window| match &window.times {
            Times::Few { .. } => 0,
            Times::Many(ring) => ring.capacity(),
        };
        for limit in [5, 6, 60, 100, 1_000] {
            let mut window = Window::new(LENGTH);
            for time in 0..u64::from(limit) {
                window.enter(limit, LENGTH, time);
            }
            assert_eq!(capacity(&window), limit as usize);
            assert_eq!(window.times(0).len(), limit as usize);
        }
    }

    #[test]
    fn who_does_not_judge_fills_it_to_twice_the_limit_at_most() {
        let mut window = Window::new(LENGTH);
        for time in 0..500 {
            window.enter(10, LENGTH, time);
        }
        assert_eq!(window.times(500), (480..500).collect::<Vec<_>>());
    }

    #[test]
    fn a_quiet_subject_gives_back_its_memory_and_a_steady_one_keeps_it() {
        let mut window = entered(0..100);
        window.enter(100, LENGTH, 1_050);
        // At 1 070 there are 100 - 71 left, of a ring of a hundred.
        assert!(window.tidy(1_070));
        assert!(matches!(&window.times, Times::Many(ring) if ring.capacity() >= 100), "it called just now");
        assert!(window.tidy(1_600));
        assert!(matches!(window.times, Times::Few { len: 1, .. }));
        assert_eq!(window.times(1_600), [1_050]);
        assert!(!window.tidy(2_050), "nothing is left");

        let mut window = entered((0..100).chain(2_000..2_010));
        assert!(window.tidy(2_700));
        assert!(matches!(&window.times, Times::Many(ring) if ring.capacity() < 50));
        assert_eq!(window.times(2_700), (2_000..2_010).collect::<Vec<_>>());
    }

    #[test]
    fn an_earlier_time_is_taken_for_that_of_the_newest_call() {
        let mut window = entered([500]);
        assert_eq!(window.enter(100, LENGTH, 400), 500);
        assert_eq!(
            window.place(2, LENGTH, 0),
            Place { counted: 2, oldest_leaves_us: Some(1_500), room_at_us: Some(1_500) }
        );
    }
}
