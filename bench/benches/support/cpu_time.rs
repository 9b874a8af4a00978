//! The processor's time as what is measured: whatever else the machine does is not counted.

use criterion::measurement::{Measurement, ValueFormatter, WallTime};

/// Nanoseconds that this thread was at work.
pub(crate) struct CpuTime;

impl CpuTime {
    fn now_ns() -> u64 {
        let since = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        u64::try_from(since.tv_sec * 1_000_000_000 + since.tv_nsec).unwrap_or(0)
    }
}

impl Measurement for CpuTime {
    type Intermediate = u64;
    type Value = u64;

    fn start(&self) -> u64 {
        Self::now_ns()
    }

    fn end(&self, began_ns: u64) -> u64 {
        Self::now_ns() - began_ns
    }

    fn add(&self, one: &u64, other: &u64) -> u64 {
        one + other
    }

    fn zero(&self) -> u64 {
        0
    }

    #[expect(clippy::cast_precision_loss, reason = "a measurement takes seconds, far below 2^52 ns")]
    fn to_f64(&self, value_ns: &u64) -> f64 {
        *value_ns as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        // It is the same unit.
        WallTime.formatter()
    }
}
