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
    Manual { now_ms: Arc<AtomicI64>, started: Instant, start_ms: i64 },
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
        let now_ms = Arc::new(AtomicI64::new(start_ms));
        let hand = ManualClock(Arc::clone(&now_ms));
        (Self(Source::Manual { now_ms, started: Instant::now(), start_ms }), hand)
    }

    /// Milliseconds since 1970, UTC.
    pub fn now_ms(&self) -> i64 {
        match &self.0 {
            Source::System => SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX)),
            Source::Manual { now_ms, .. } => now_ms.load(Ordering::SeqCst),
        }
    }

    /// Milliseconds that never step back and go on while the machine sleeps, from a beginning that means nothing: for
    /// judging how old something is that must not outlive its time.
    pub fn boot_ms(&self) -> i64 {
        match &self.0 {
            Source::System => boot_ms(),
            Source::Manual { now_ms, .. } => now_ms.load(Ordering::SeqCst),
        }
    }

    /// Time that never steps back, for measuring spans.
    pub fn monotonic(&self) -> Instant {
        match &self.0 {
            Source::System => Instant::now(),
            Source::Manual { now_ms, started, start_ms } => {
                let moved = now_ms.load(Ordering::SeqCst).saturating_sub(*start_ms);
                *started + Duration::from_millis(u64::try_from(moved).unwrap_or(0))
            }
        }
    }
}

#[cfg(target_os = "linux")]
fn boot_ms() -> i64 {
    let since = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    since.tv_sec * 1_000 + since.tv_nsec / 1_000_000
}

/// Elsewhere the monotonic clock must do.
#[cfg(not(target_os = "linux"))]
fn boot_ms() -> i64 {
    static START: std::sync::LazyLock<Instant> = std::sync::LazyLock::new(Instant::now);
    i64::try_from(START.elapsed().as_millis()).unwrap_or(i64::MAX)
}

impl ManualClock {
    /// Moves the clock forward.
    pub fn advance_ms(&self, by_ms: i64) {
        self.0.fetch_add(by_ms, Ordering::SeqCst);
    }
}
