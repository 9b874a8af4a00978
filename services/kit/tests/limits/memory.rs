//! Windows in memory.

use std::{sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use paperkey_kit::{
    clock::{Clock, ManualClock},
    limits::{Claim, MemoryLimiter, Receipt, Refused, Standing, Verdict},
};
use proptest::{prelude::*, test_runner::TestCaseResult};

use crate::suite::{
    self, Passed, START_US, Windows, a_refused_call_passes_exactly_when_it_was_told, assert_exact, claim, race, replay,
};

const SECOND: Duration = Duration::from_secs(1);

/// Windows whose clock is set to what the suite says.
struct Held {
    limiter: MemoryLimiter,
    clock: Clock,
    hand: ManualClock,
}

impl Held {
    fn new() -> Self {
        let (clock, hand) = Clock::manual(i64::try_from(START_US / 1_000).unwrap());
        Self { limiter: MemoryLimiter::new(clock.clone()), clock, hand }
    }

    fn set(&self, now_us: u64) {
        self.hand.advance_us(i64::try_from(now_us - self.clock.boot_us()).unwrap());
    }
}

impl Windows for Held {
    async fn check(&self, claims: &[Claim], now_us: u64) -> Verdict {
        self.set(now_us);
        self.limiter.check(claims)
    }

    async fn take_back(&self, receipt: &Receipt, now_us: u64) {
        self.set(now_us);
        self.limiter.take_back(receipt);
    }

    async fn standing(&self, claim: &Claim, now_us: u64) -> Standing {
        self.set(now_us);
        self.limiter.standing(claim)
    }
}

/// Windows that go by the machine's clock.
struct Real(MemoryLimiter);

impl Windows for Real {
    async fn check(&self, claims: &[Claim], _: u64) -> Verdict {
        self.0.check(claims)
    }

    async fn take_back(&self, receipt: &Receipt, _: u64) {
        self.0.take_back(receipt);
    }

    async fn standing(&self, claim: &Claim, _: u64) -> Standing {
        self.0.standing(claim)
    }
}

/// What is in memory is there at once.
fn at_once(test: impl Future<Output = TestCaseResult>) -> TestCaseResult {
    test.now_or_never().expect("nothing waits")
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_answer_of_every_history_is_exact(history in suite::histories()) {
        at_once(replay(&Held::new(), &history))?;
    }

    #[test]
    fn a_refused_call_passes_when_it_was_told_and_not_a_microsecond_earlier(crowd in suite::crowds()) {
        at_once(a_refused_call_passes_exactly_when_it_was_told(&Held::new(), &crowd))?;
    }
}

fn limiter() -> MemoryLimiter {
    MemoryLimiter::new(Clock::system())
}

fn passes(limiter: &MemoryLimiter, claims: &[Claim], now_us: u64) -> bool {
    matches!(limiter.decide(claims, now_us), Verdict::Passed(_))
}

fn receipt(verdict: Verdict) -> Receipt {
    match verdict {
        Verdict::Passed(receipt) => receipt,
        Verdict::Refused(refused) => panic!("it was refused: {refused:?}"),
    }
}

fn refused(verdict: Verdict) -> Refused {
    match verdict {
        Verdict::Refused(refused) => refused,
        Verdict::Passed(receipt) => panic!("it passed: {receipt:?}"),
    }
}

#[test]
fn the_window_is_half_open_and_exact_to_the_microsecond() {
    let limiter = limiter();
    let claims = [claim(0, 2, SECOND)];
    assert!(passes(&limiter, &claims, 5_000_000));
    assert!(passes(&limiter, &claims, 5_000_001));
    assert!(!passes(&limiter, &claims, 5_999_999));
    assert!(passes(&limiter, &claims, 6_000_000));
    assert!(!passes(&limiter, &claims, 6_000_000));
    assert!(passes(&limiter, &claims, 6_000_001));
}

#[test]
fn a_caller_who_keeps_to_the_limit_is_never_refused() {
    let limiter = limiter();
    let claims = [claim(0, 10, SECOND), claim(1, 40, 4 * SECOND)];
    for call in 0..10_000 {
        assert!(passes(&limiter, &claims, 100_000 * call));
    }
    let together = [claim(2, 50, SECOND)];
    for burst in 0..20 {
        for _ in 0..50 {
            assert!(passes(&limiter, &together, 1_000_000 * burst), "all at one microsecond");
        }
        assert!(!passes(&limiter, &together, 1_000_000 * burst));
    }
}

#[test]
fn a_refused_call_uses_up_nothing_of_any_of_its_limits() {
    let limiter = limiter();
    let (wide, full, other) = (claim(0, 5, SECOND), claim(1, 1, SECOND), claim(3, 7, SECOND));
    assert!(passes(&limiter, &[full], 0));
    for _ in 0..100 {
        let refused = refused(limiter.decide(&[wide, full, other], 10));
        assert_eq!(refused.standings.iter().map(|standing| standing.remaining).collect::<Vec<_>>(), [5, 0, 7]);
        assert_eq!(refused.standings[0].resets_in, Duration::ZERO);
        assert_eq!((refused.by, refused.retry_after), (1, Duration::from_micros(999_990)));
        assert!(!refused.store_is_gone);
    }
    assert_eq!(limiter.subjects(), 1, "who was refused is not even known");
    assert_eq!((limiter.count(&wide, 10), limiter.count(&other, 10)), (0, 0));
}

#[test]
fn the_claim_that_takes_longest_is_named() {
    let limiter = limiter();
    let (short, long) = (claim(0, 1, SECOND), claim(1, 1, 9 * SECOND));
    assert!(passes(&limiter, &[short, long], 0));
    for (claims, by) in [([short, long], 1), ([long, short], 0)] {
        let refused = refused(limiter.decide(&claims, 400_000));
        assert_eq!((refused.by, refused.retry_after), (by, Duration::from_millis(8_600)));
    }
    let refused = refused(limiter.decide(&[claim(2, 4, SECOND), short], 400_000));
    assert_eq!((refused.by, refused.retry_after), (1, Duration::from_millis(600)));
}

#[test]
fn standings_say_what_is_left_and_when_the_oldest_call_leaves() {
    let limiter = limiter();
    let claims = [claim(0, 3, SECOND)];
    let first = receipt(limiter.decide(&claims, 0)).standings[0];
    assert_eq!(first, Standing { class: "a", requests: 3, window: SECOND, remaining: 2, resets_in: SECOND });
    let second = receipt(limiter.decide(&claims, 250_000)).standings[0];
    assert_eq!(second, Standing { remaining: 1, resets_in: Duration::from_millis(750), ..first });
    let third = receipt(limiter.decide(&claims, 1_000_000)).standings[0];
    assert_eq!(third, Standing { remaining: 1, resets_in: Duration::from_millis(250), ..first });
}

#[test]
fn asking_where_a_subject_stands_counts_nothing() {
    let held = Held::new();
    let claim = claim(0, 1, SECOND);
    let untouched = held.limiter.standing(&claim);
    assert_eq!((untouched.remaining, untouched.resets_in), (1, Duration::ZERO));
    receipt(held.limiter.check(&[claim]));
    held.hand.advance_ms(400);
    let standing = held.limiter.standing(&claim);
    assert_eq!((standing.remaining, standing.resets_in), (0, Duration::from_millis(600)));
    held.hand.advance_ms(600);
    assert_eq!(held.limiter.standing(&claim), untouched);
}

#[test]
fn another_limit_acts_at_once() {
    let limiter = limiter();
    let with = |requests, window| [claim(0, requests, window)];
    for call in 0..10 {
        assert!(passes(&limiter, &with(10, SECOND), call));
    }
    assert!(!passes(&limiter, &with(10, SECOND), 10));
    assert!(passes(&limiter, &with(11, SECOND), 10), "raised");
    let lowered = refused(limiter.decide(&with(3, SECOND), 11));
    assert_eq!(lowered.standings[0].remaining, 0);
    // Of eleven calls the nine oldest must leave, and the ninth came at 8.
    assert_eq!(lowered.retry_after, Duration::from_micros(999_997));
    assert!(!passes(&limiter, &with(3, SECOND), 1_000_007));
    assert!(passes(&limiter, &with(3, SECOND), 1_000_008));
    assert!(!passes(&limiter, &with(3, 2 * SECOND), 1_000_009), "a longer window");
    assert!(passes(&limiter, &with(3, Duration::from_millis(1)), 1_001_008), "a shorter one");
}

#[test]
fn what_is_taken_back_can_be_used_again_and_nothing_else_is_lost() {
    let limiter = limiter();
    let (one, two) = (claim(0, 2, SECOND), claim(1, 6, SECOND));
    let kept = receipt(limiter.decide(&[one, two], 7));
    let taken = receipt(limiter.decide(&[two, one], 7));
    assert!(!passes(&limiter, &[one], 7));
    limiter.take_back(&taken);
    assert_eq!((limiter.count(&one, 7), limiter.count(&two, 7)), (1, 1));
    assert!(passes(&limiter, &[one], 8));
    assert!(!passes(&limiter, &[one], 8));
    limiter.take_back(&kept);
    assert_eq!((limiter.count(&one, 8), limiter.count(&two, 8)), (1, 0));
}

#[test]
fn a_receipt_of_long_ago_takes_back_nothing_of_today() {
    let limiter = limiter();
    let claim = claim(0, 1, SECOND);
    let old = receipt(limiter.decide(&[claim], 0));
    assert!(passes(&limiter, &[claim], 1_000_000));
    limiter.take_back(&old);
    assert!(!passes(&limiter, &[claim], 1_000_001));
}

#[test]
fn a_subject_that_is_claimed_twice_counts_once_and_must_meet_both() {
    let limiter = limiter();
    let (loose, tight) = (claim(0, 5, SECOND), claim(0, 2, SECOND));
    let first = receipt(limiter.decide(&[loose, tight], 0));
    assert_eq!(first.standings.iter().map(|standing| standing.remaining).collect::<Vec<_>>(), [4, 1]);
    assert_eq!(limiter.count(&loose, 0), 1);
    assert!(passes(&limiter, &[tight, loose], 0));
    let third = refused(limiter.decide(&[loose, tight], 0));
    assert_eq!(third.by, 1);
    limiter.take_back(&first);
    assert_eq!(limiter.count(&loose, 0), 1);
}

#[test]
fn a_limit_of_nothing_lets_nothing_through() {
    let limiter = limiter();
    for _ in 0..2 {
        let refused = refused(limiter.decide(&[claim(0, 0, SECOND)], 5));
        assert_eq!(refused.retry_after, SECOND);
        assert!(passes(&limiter, &[claim(0, 9, SECOND)], 5));
    }
}

#[test]
fn a_call_without_claims_passes() {
    assert!(receipt(limiter().check(&[])).standings.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 8)]
async fn callers_side_by_side_never_get_more_than_the_limit_in_any_window() {
    for (requests, window_ms) in [(1, 1), (3, 2), (50, 5), (1_000, 20)] {
        let claim = claim(0, requests, Duration::from_millis(window_ms));
        race(Arc::new(Real(limiter())), claim, 8, 10).await;
    }
}

#[test]
fn nobody_is_refused_for_a_call_that_was_refused_itself_in_whatever_order_the_claims_come() {
    let limiter = limiter();
    let (full, wide, other) = (claim(0, 1, 600 * SECOND), claim(1, 4_000, 600 * SECOND), claim(2, 1, 600 * SECOND));
    receipt(limiter.check(&[full, other]));
    let passed: usize = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..8_usize)
            .map(|caller| {
                let limiter = &limiter;
                scope.spawn(move || {
                    for _ in 0..1_000 {
                        let verdict = match caller % 4 {
                            0 => limiter.check(&[wide, full, other]),
                            1 => limiter.check(&[other, wide]),
                            _ => continue,
                        };
                        assert!(matches!(verdict, Verdict::Refused(_)));
                    }
                    (0..1_000).filter(|_| matches!(limiter.check(&[wide]), Verdict::Passed(_))).count()
                })
            })
            .collect();
        callers.into_iter().map(|caller| caller.join().unwrap()).sum()
    });
    assert_eq!(passed, 4_000);
}

#[test]
fn the_judge_of_the_suite_knows_what_is_too_much() {
    let exact = [0, 1, 1_000_000, 1_000_001].map(Passed::at);
    assert_exact(&exact, 2, SECOND);
    let too_much = |passed: &[Passed]| std::panic::catch_unwind(|| assert_exact(passed, 2, SECOND)).is_err();
    assert!(too_much(&[0, 1, 999_999].map(Passed::at)));
    assert!(too_much(&[5, 5, 5].map(Passed::at)));
    // One of these may have been let through late enough.
    let unknown = Passed { not_before_us: 900_000, not_after_us: 1_100_000 };
    assert!(!too_much(&[Passed::at(0), Passed::at(1), unknown]));
    assert!(too_much(&[Passed::at(200_000), Passed::at(300_000), unknown]));
}
