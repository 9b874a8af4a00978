//! What the limiter in memory allocates, beside what its decisions cost as `benches/limiter.rs` has measured them.
//!
//! A program of its own, since every allocation is counted here, which would slow down what else is measured.

mod results;

use std::{alloc::System, error::Error, fmt::Write as _, fs, path::PathBuf, time::Duration};

use clap::Parser;
use paperkey_kit::{
    clock::Clock,
    limits::{Claim, MemoryLimiter, OnStoreFailure, Subject, Verdict},
};
use serde_json::Value;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const MILLION: u64 = 1_000_000;

/// Memory and cost of the limiter in memory.
#[derive(Debug, Parser)]
struct Cli {
    /// Where the measured decisions are
    #[arg(long, default_value = "target/criterion/limiter")]
    estimates: PathBuf,
    /// Also put the table into this file, as a part of its own
    #[arg(long)]
    write: Option<PathBuf>,
}

#[expect(clippy::print_stdout, reason = "the table is this command's answer")]
fn main() -> Result<(), Box<dyn Error>> {
    let cli = Cli::parse();
    let mut text = "## The limiter in memory\n\n\
         Command: `bench/run --only limiter`. CPU of one thread per decision, with the clock that it reads; memory as it is \
         asked of the allocator.\n\n| what | |\n|---|--:|\n"
        .to_owned();
    let rows = [
        ("passed/1", "passed, 1 claim, a thousand subjects"),
        ("passed/2", "passed, 2 claims, a thousand subjects"),
        ("passed/3", "passed, 3 claims, a thousand subjects"),
        ("passed, a million subjects/3", "passed, 3 claims, a million subjects of each"),
        ("refused/1", "refused, 1 claim, a thousand subjects"),
        ("refused/3", "refused by the last of 3 claims, a thousand subjects"),
    ];
    for (id, name) in rows {
        let path = cli.estimates.join(id).join("new/estimates.json");
        let Ok(estimates) = fs::read(&path) else {
            writeln!(text, "| {name} | not measured |")?;
            continue;
        };
        let estimates: Value = serde_json::from_slice(&estimates)?;
        let mean = estimates["mean"]["point_estimate"].as_f64().ok_or("an estimate has a mean")?;
        writeln!(text, "| {name} | {mean:.0} ns |")?;
    }
    writeln!(text, "| allocations per decision of known subjects | {} |", allocations_of_decisions())?;
    for (calls, bytes) in [(1, megabytes(1)), (4, megabytes(4))] {
        let plural = if calls == 1 { "call" } else { "calls" };
        writeln!(text, "| a million subjects with {calls} {plural} in their window | {bytes} MB |")?;
    }
    println!("{text}");
    if let Some(path) = cli.write {
        results::write(&path, &text)?;
    }
    Ok(())
}

/// Spread as a keyed hash would be.
fn mixed(number: u64) -> u64 {
    let mixed = number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

fn claim(number: u64, requests: u32) -> Claim {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&mixed(number).to_le_bytes());
    bytes[8..].copy_from_slice(&mixed(number | 1 << 63).to_le_bytes());
    let (window, on_store_failure) = (Duration::from_mins(1), OnStoreFailure::Open);
    Claim { subject: Subject(bytes), class: "per_key", requests, window, on_store_failure }
}

/// Allocations of a hundred thousand decisions, divided by them and rounded up: anything but 0 means that there are some.
fn allocations_of_decisions() -> usize {
    let limiter = MemoryLimiter::new(Clock::system());
    let round = |from_us: u64| {
        for call in 0..1_000 {
            for number in 0..100 {
                let claims = [claim(number, 60), claim(100 + number, 4), claim(200 + number, 600)];
                limiter.decide(&claims[..=(call % 3)], from_us + call as u64 * 60_000);
            }
        }
    };
    round(0);
    round(60_000_000);
    let region = Region::new(ALLOCATOR);
    round(120_000_000);
    let change = region.change();
    (change.allocations + change.reallocations).div_ceil(100_000)
}

/// Megabytes that a million subjects take.
fn megabytes(calls: u64) -> usize {
    let region = Region::new(ALLOCATOR);
    let limiter = MemoryLimiter::new(Clock::system());
    for call in 0..calls {
        for number in 0..MILLION {
            let verdict = limiter.decide(&[claim(number, 60)], call);
            assert!(matches!(verdict, Verdict::Passed(_)), "nobody is at his limit");
        }
    }
    assert_eq!((limiter.subjects(), limiter.forgotten()), (1_000_000, 0));
    let change = region.change();
    (change.bytes_allocated - change.bytes_deallocated).div_ceil(1_000_000)
}
