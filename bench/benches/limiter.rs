//! What a decision of the limiter in memory costs, the clock it reads included: the processor's time, not the wall's, so
//! that whatever else the machine does is not counted.
//!
//! Time is simulated beside it, so that the windows are in the state that they are said to be in, however long it takes.

#[path = "support/cpu_time.rs"]
mod cpu_time;

use std::{hint::black_box, time::Duration};

use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use paperkey_kit::{
    clock::Clock,
    limits::{Claim, MAX_CLAIMS, MemoryLimiter, OnStoreFailure, Subject, Verdict},
};

use cpu_time::CpuTime;

/// Subjects that fit into the caches of a processor, and subjects that do not.
const FEW: u64 = 1_000;
const MANY: u64 = 1_000_000;

/// Spread as a keyed hash would be.
fn mixed(number: u64) -> u64 {
    let mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn claim(number: u64, class: u8, requests: u32) -> Claim {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&mixed(number << 8 | u64::from(class)).to_le_bytes());
    bytes[8..].copy_from_slice(&mixed(number << 8 | u64::from(class) | 1 << 63).to_le_bytes());
    let (window, on_store_failure) = (Duration::from_mins(1), OnStoreFailure::Open);
    Claim { subject: Subject(bytes), class: "per_key", requests, window, on_store_failure }
}

/// A call against that many windows.
fn claims(number: u64, count: usize) -> [Claim; MAX_CLAIMS] {
    assert!(count <= MAX_CLAIMS);
    [(1, 60), (3, 100), (5, 30), (7, 600)].map(|(class, requests)| claim(number, class, requests))
}

fn decisions(criterion: &mut Criterion<CpuTime>) {
    let mut group = criterion.benchmark_group("limiter");
    group.warm_up_time(Duration::from_secs(2)).measurement_time(Duration::from_secs(4));
    let clock = Clock::system();

    // Each subject calls 20 times a minute: all pass, windows go round.
    for (name, subjects, count) in
        [("passed", FEW, 1), ("passed", FEW, 2), ("passed", FEW, 3), ("passed, a million subjects", MANY, 3)]
    {
        let limiter = MemoryLimiter::new(clock.clone());
        let (mut call, between_ns) = (0, 3_000_000_000 / subjects);
        let mut decide = || {
            // In an order that no processor foresees.
            let number = call * 611_953 % subjects;
            let verdict = limiter.decide(&claims(number, count)[..count], 1 + call * between_ns / 1_000);
            call += 1;
            black_box(clock.boot_us());
            assert!(matches!(verdict, Verdict::Passed(_)));
            verdict
        };
        for _ in 0..4 * subjects {
            decide();
        }
        group.bench_function(BenchmarkId::new(name, count), |bencher| bencher.iter(&mut decide));
    }

    for count in [1, 3] {
        let limiter = MemoryLimiter::new(clock.clone());
        let full = |number: u64| {
            let mut claims = claims(number, count);
            claims[count - 1].requests = 30;
            claims
        };
        for number in 0..FEW {
            for _ in 0..30 {
                limiter.decide(&full(number)[count - 1..count], 1);
            }
        }
        let mut call = 0;
        group.bench_function(BenchmarkId::new("refused", count), |bencher| {
            bencher.iter(|| {
                let verdict = limiter.decide(&full(call * 611_953 % FEW)[..count], 2);
                call += 1;
                black_box(clock.boot_us());
                assert!(matches!(verdict, Verdict::Refused(_)));
                verdict
            });
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().with_measurement(CpuTime);
    targets = decisions
}
criterion_main!(benches);
