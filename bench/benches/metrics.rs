//! What it costs a call to be counted: the processor's time, not the wall's.
//!
//! A service counts a call by wrapping its answer; what the gateway does is the same additions once more, without the
//! wrapping. A call may pay 300 ns for both.

#[path = "support/cpu_time.rs"]
mod cpu_time;

use std::{hint::black_box, time::Duration};

use criterion::{Criterion, criterion_group, criterion_main};
use futures_util::FutureExt as _;
use http::Response;
use paperkey_kit::{
    clock::Clock,
    service::Answer,
    telemetry::metrics::{Counter, Durations, Gauge, Measured, PerMethod},
};
use paperkey_proto::Contract;
use tonic::body::Body;

use cpu_time::CpuTime;

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
