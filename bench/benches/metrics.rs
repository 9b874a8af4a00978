//! What it costs a call to be counted: the processor's time, not the wall's.
//!
//! A service counts a call by wrapping its answer; what the gateway does is the same additions once more, without the
//! wrapping. A call may pay 300 ns for both.

use std::{hint::black_box, time::Duration};

use criterion::{
    Criterion, criterion_group, criterion_main,
    measurement::{Measurement, ValueFormatter, WallTime},
};
use futures_util::FutureExt as _;
use http::Response;
use paperkey_kit::{
    clock::Clock,
    service::Answer,
    telemetry::metrics::{Counter, Durations, Gauge, Measured, PerMethod},
};
use paperkey_proto::Contract;
use tonic::body::Body;

/// Nanoseconds that this thread was at work.
struct CpuTime;

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

fn answer() -> Answer {
    Box::pin(std::future::ready(Ok(Response::new(Body::empty()))))
}

#[derive(Default)]
struct Figures {
    calls: Counter,
    took: Durations,
}

static FIGURES: PerMethod<Figures> = PerMethod::new();
static IN_FLIGHT: Gauge = Gauge::new();

fn counting(criterion: &mut Criterion<CpuTime>) {
    let clock = Clock::system();
    let method = Contract::get().methods().last().expect("the contract has methods");
    let mut group = criterion.benchmark_group("counting");
    group.bench_function("an answer that nobody counts", |bencher| {
        bencher.iter(|| black_box(answer()).now_or_never());
    });
    group.bench_function("an answer that a service counts", |bencher| {
        bencher.iter(|| Measured::new(Some(method), &clock, black_box(answer())).now_or_never());
    });
    group.bench_function("the additions alone", |bencher| {
        bencher.iter(|| {
            let held = IN_FLIGHT.hold();
            let figures = FIGURES.of(Some(black_box(method)));
            figures.calls.inc();
            figures.took.observe(black_box(Duration::from_micros(740)));
            drop(held);
        });
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime);
    targets = counting
}
criterion_main!(benches);
