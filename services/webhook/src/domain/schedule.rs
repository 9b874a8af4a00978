//! When a delivery is tried again.

use jiff::fmt::rfc2822::DateTimeParser;

/// The longest wait that an answer may ask for.
const MAX_RETRY_AFTER_MS: i64 = 24 * 3_600 * 1_000;
/// How far a wait may stray, in thousandths of it, so that a receiver that comes back is not met by all at once.
const JITTER_PERMILLE: i64 = 200;

/// The waits before each attempt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Schedule(Vec<i64>);

impl Schedule {
    /// The waits before the first attempt, the second and so on, in seconds. There is always a first one.
    pub(crate) fn new(waits_s: Vec<u64>) -> Self {
        let mut waits: Vec<i64> =
            waits_s.into_iter().map(|wait_s| i64::try_from(wait_s).unwrap_or(i64::MAX).saturating_mul(1_000)).collect();
        if waits.is_empty() {
            waits.push(0);
        }
        Self(waits)
    }

    /// The wait before the first attempt.
    pub(crate) fn first_ms(&self) -> i64 {
        self.0.first().copied().unwrap_or(0)
    }

    /// Longer than any wait can be.
    pub(crate) fn longest_ms(&self) -> i64 {
        let longest_ms = self.0.iter().copied().max().unwrap_or(0);
        longest_ms.saturating_add(longest_ms / 1_000 * JITTER_PERMILLE + JITTER_PERMILLE).max(MAX_RETRY_AFTER_MS)
    }

    /// How long to wait after `made` attempts; `None` where there are no more. `chance` is from 0 to 1.
    pub(crate) fn next_ms(&self, made: i64, chance: f64, retry_after_ms: Option<i64>) -> Option<i64> {
        let wait_ms = *self.0.get(usize::try_from(made).ok()?)?;
        #[expect(clippy::cast_possible_truncation, reason = "a number from -1000 to 1000")]
        let stray_permille = ((chance.clamp(0.0, 1.0) * 2.0 - 1.0) * 1_000.0) as i64 * JITTER_PERMILLE / 1_000;
        // Divided first: a wait of centuries must not overflow.
        let strayed_ms = wait_ms.saturating_add(
            (wait_ms / 1_000).saturating_mul(stray_permille).saturating_add(wait_ms % 1_000 * stray_permille / 1_000),
        );
        Some(strayed_ms.max(retry_after_ms.unwrap_or(0).min(MAX_RETRY_AFTER_MS)))
    }
}

/// Reads `Retry-After`: seconds, or a date.
pub(crate) fn retry_after_ms(value: &str, now_ms: i64) -> Option<i64> {
    let value = value.trim();
    if !value.is_empty() && value.bytes().all(|byte| byte.is_ascii_digit()) {
        let seconds = value.parse::<i64>().unwrap_or(i64::MAX);
        return Some(seconds.saturating_mul(1_000).min(MAX_RETRY_AFTER_MS));
    }
    let at_ms = DateTimeParser::new().parse_timestamp(value).ok()?.as_millisecond();
    Some(at_ms.saturating_sub(now_ms).clamp(0, MAX_RETRY_AFTER_MS))
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: i64 = 784_111_777_000;

    #[test]
    fn waits_stray_by_a_fifth_at_most() {
        let schedule = Schedule::new(vec![0, 5, 300]);
        assert_eq!(schedule.first_ms(), 0);
        assert_eq!(schedule.next_ms(1, 0.0, None), Some(4_000));
        assert_eq!(schedule.next_ms(1, 0.5, None), Some(5_000));
        assert_eq!(schedule.next_ms(1, 1.0, None), Some(6_000));
        assert_eq!(schedule.next_ms(2, 1.0, None), Some(360_000));
        assert_eq!(schedule.next_ms(3, 0.5, None), None);
    }

    #[test]
    fn a_receiver_may_ask_for_a_longer_wait_but_not_for_a_shorter_or_endless_one() {
        let schedule = Schedule::new(vec![0, 5]);
        assert_eq!(schedule.next_ms(1, 0.5, Some(60_000)), Some(60_000));
        assert_eq!(schedule.next_ms(1, 0.5, Some(1)), Some(5_000));
        assert_eq!(schedule.next_ms(1, 0.5, Some(i64::MAX)), Some(MAX_RETRY_AFTER_MS));
        assert_eq!(schedule.next_ms(2, 0.5, Some(60_000)), None);
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        assert_eq!(retry_after_ms("120", NOW_MS), Some(120_000));
        assert_eq!(retry_after_ms("99999999999999999999999", NOW_MS), Some(MAX_RETRY_AFTER_MS));
        assert_eq!(retry_after_ms("Sun, 06 Nov 1994 08:50:37 GMT", NOW_MS), Some(60_000));
        assert_eq!(retry_after_ms("Sun, 06 Nov 1994 08:00:00 GMT", NOW_MS), Some(0));
        for nonsense in ["", "soon", "-5", "1.5", "Sun, 06 Nov", "12 parsecs"] {
            assert_eq!(retry_after_ms(nonsense, NOW_MS), None, "{nonsense}");
        }
    }

    #[test]
    fn no_wait_is_longer_than_the_longest() {
        for waits in [vec![], vec![0, 5, 300], vec![0, 86_400], vec![0, 1_000_000, 7], vec![0, u64::MAX]] {
            let schedule = Schedule::new(waits);
            for made in 0..4 {
                for retry_after_ms in [None, Some(i64::MAX)] {
                    assert!(schedule.next_ms(made, 1.0, retry_after_ms).unwrap_or(0) <= schedule.longest_ms());
                }
            }
        }
    }

    #[test]
    fn a_schedule_has_at_least_one_attempt_and_survives_absurd_waits() {
        assert_eq!(Schedule::new(vec![]).first_ms(), 0);
        assert_eq!(Schedule::new(vec![0, u64::MAX]).next_ms(1, 1.0, None), Some(i64::MAX));
        assert_eq!(Schedule::new(vec![0]).next_ms(-1, 1.0, None), None);
    }
}
