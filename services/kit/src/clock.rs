//! Time, as the rest of the code sees it: a value that is handed in, so that tests can hold it still.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

/// Where the time comes from.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    System,
    Manual { now_us: Arc<AtomicI64>, started: Instant, start_us: i64 },
}

/// The hand that moves a manual clock.
#[derive(Clone, Debug)]
pub struct ManualClock(Arc<AtomicI64>);

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that stands at `start_ms` until it is moved.
    pub fn manual(start_ms: i64) -> (Self, ManualClock) {
        let start_us = start_ms.saturating_mul(1_000);
        let now_us = Arc::new(AtomicI64::new(start_us));
        let hand = ManualClock(Arc::clone(&now_us));
        (Self(Source::Manual { now_us, started: Instant::now(), start_us }), hand)
    }

    /// Milliseconds since 1970, UTC.
    pub fn now_ms(&self) -> i64 {
        match &self.0 {
            Source::System => SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX)),
            Source::Manual { now_us, .. } => now_us.load(Ordering::SeqCst).div_euclid(1_000),
        }
    }

    /// Milliseconds that never step back and go on while the machine sleeps, from a beginning that means nothing: for
    /// judging how old something is that must not outlive its time.
    pub fn boot_ms(&self) -> i64 {
        match &self.0 {
            Source::System => boot_ms(),
            Source::Manual { now_us, .. } => now_us.load(Ordering::SeqCst).div_euclid(1_000),
        }
    }

    /// The same in microseconds.
    pub fn boot_us(&self) -> u64 {
        match &self.0 {
            Source::System => boot_us(),
            Source::Manual { now_us, .. } => u64::try_from(now_us.load(Ordering::SeqCst)).unwrap_or(0),
        }
    }

    /// Time that never steps back, for measuring spans.
    pub fn monotonic(&self) -> Instant {
        match &self.0 {
            Source::System => Instant::now(),
            Source::Manual { now_us, started, start_us } => {
                let moved = now_us.load(Ordering::SeqCst).saturating_sub(*start_us);
                *started + Duration::from_micros(u64::try_from(moved).unwrap_or(0))
            }
        }
    }
}

fn boot_ms() -> i64 {
    i64::try_from(boot_us() / 1_000).unwrap_or(i64::MAX)
}

#[cfg(target_os = "linux")]
fn boot_us() -> u64 {
    let since = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    u64::try_from(since.tv_sec * 1_000_000 + since.tv_nsec / 1_000).unwrap_or(0)
}

/// Elsewhere the monotonic clock must do.
#[cfg(not(target_os = "linux"))]
fn boot_us() -> u64 {
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    u64::try_from(START.elapsed().as_micros()).unwrap_or(u64::MAX)
}

impl ManualClock {
    /// Moves the clock forward.
    pub fn advance_ms(&self, by_ms: i64) {
        self.0.fetch_add(by_ms.saturating_mul(1_000), Ordering::SeqCst);
    }

    /// Moves the clock forward by less than a millisecond, or by more.
    pub fn advance_us(&self, by_us: i64) {
        self.0.fetch_add(by_us, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manual_clock_shows_one_time_in_every_unit() {
        let (clock, hand) = Clock::manual(1_790_000_000_000);
        let began = clock.monotonic();
        hand.advance_us(999);
        assert_eq!((clock.now_ms(), clock.boot_us()), (1_790_000_000_000, 1_790_000_000_000_999));
        hand.advance_us(1);
        assert_eq!((clock.now_ms(), clock.boot_ms()), (1_790_000_000_001, 1_790_000_000_001));
        hand.advance_ms(1);
        assert_eq!(clock.boot_us(), 1_790_000_000_002_000);
        assert_eq!(clock.monotonic() - began, Duration::from_millis(2));
    }

    #[test]
    fn boot_time_is_the_same_in_both_units_and_never_steps_back() {
        let clock = Clock::system();
        let before_us = clock.boot_us();
        let between_us = u64::try_from(clock.boot_ms()).unwrap() * 1_000;
        let after_us = clock.boot_us();
        assert!(before_us <= after_us);
        assert!(before_us - before_us % 1_000 <= between_us && between_us <= after_us);
    }
}
