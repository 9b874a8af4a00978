//! What limits in memory cost in memory. In a program of its own, whose every allocation is counted.

use std::{alloc::System, time::Duration};

use paperkey_kit::{
    clock::Clock,
    limits::{Claim, MemoryLimiter, OnStoreFailure, Subject, Verdict},
};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const WINDOW_US: u64 = 60_000_000;
const MILLION: u64 = 1_000_000;

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
    Claim {
        subject: Subject(bytes),
        class: "per_key",
        requests,
        window: Duration::from_micros(WINDOW_US),
        on_store_failure: OnStoreFailure::Open,
    }
}

fn passes(limiter: &MemoryLimiter, claims: &[Claim], now_us: u64) -> bool {
    matches!(limiter.decide(claims, now_us), Verdict::Passed(_))
}

fn megabytes(region: &Region<'_, System>) -> usize {
    let change = region.change();
    (change.bytes_allocated - change.bytes_deallocated) / 1_000_000
}

/// One test, since another beside it would be counted with it.
#[test]
fn a_decision_of_known_subjects_allocates_nothing_and_a_million_subjects_stay_under_200_megabytes() {
    decisions_allocate_nothing();
    a_million_subjects_stay_small();
}

fn decisions_allocate_nothing() {
    let limiter = MemoryLimiter::new(Clock::system());
    // Few calls and many, refused ones and ones that pass, and windows that go round.
    let few: Vec<_> = (0..300).map(|number| claim(number, 4)).collect();
    let many: Vec<_> = (300..600).map(|number| claim(number, 90)).collect();
    let round = |from_us: u64| {
        for call in 0..120_u64 {
            for (few, many) in few.iter().zip(&many) {
                let now_us = from_us + call * 500_000;
                passes(&limiter, &[*few, *many, claim(1_000, 1)], now_us);
                passes(&limiter, &[*many, *few], now_us);
                passes(&limiter, &[*many], now_us);
                if let Verdict::Passed(receipt) = limiter.decide(&[*few], now_us) {
                    limiter.take_back(&receipt);
                }
            }
        }
    };
    round(0);
    round(WINDOW_US);
    let region = Region::new(ALLOCATOR);
    round(2 * WINDOW_US);
    let change = region.change();
    assert_eq!((change.allocations, change.reallocations, change.deallocations), (0, 0, 0));
}

fn a_million_subjects_stay_small() {
    let region = Region::new(ALLOCATOR);
    let limiter = MemoryLimiter::new(Clock::system());
    for number in (0..MILLION).step_by(4) {
        let claims = [0, 1, 2, 3].map(|next| claim(number + next, 4));
        for call in 0..4 {
            assert!(passes(&limiter, &claims, call));
        }
    }
    let before = megabytes(&region);
    assert!(before < 200, "{before} MB");
    assert_eq!((limiter.subjects(), limiter.forgotten()), (1_000_000, 0));
    // Others come in their stead. Each looks at eight places, so a quarter of a million see nearly all there are.
    for number in (MILLION..MILLION * 5 / 4).step_by(4) {
        let claims = [0, 1, 2, 3].map(|next| claim(number + next, 4));
        assert!(passes(&limiter, &claims, WINDOW_US + 3));
    }
    assert!(megabytes(&region) <= before);
    assert!(limiter.subjects() < 400_000, "{} subjects", limiter.subjects());
    assert_eq!(limiter.forgotten(), 0);
}
