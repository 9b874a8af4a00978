//! One suite for whatever counts calls: what is true of windows in memory is true of windows in a shared store.
//!
//! [`replay`] drives a random history through the windows and compares each answer with a naive [`Model`], microsecond by
//! microsecond; it needs windows whose clock the test holds. [`race`] goes by real time, with callers side by side, and is
//! judged by [`assert_exact`] alone, which needs to know of each call only between which two moments it was let through:
//! so it also judges a store that counts by a clock of its own.

use std::{future::Future, ops::Range, sync::Arc, time::Duration};

use paperkey_kit::{
    clock::Clock,
    limits::{Claim, MAX_CLAIMS, OnStoreFailure, Receipt, Standing, Subject, Verdict},
};
use proptest::{prelude::*, sample::Index, test_runner::TestCaseResult};

/// What is tested: windows that are told what time it is, or that go by a clock of their own and do not listen.
pub(crate) trait Windows {
    /// Counts a call against all claims, or against none.
    fn check(&self, claims: &[Claim], now_us: u64) -> impl Future<Output = Verdict> + Send;

    /// Takes back what was counted.
    fn take_back(&self, receipt: &Receipt, now_us: u64) -> impl Future<Output = ()> + Send;

    /// Where a subject stands.
    fn standing(&self, claim: &Claim, now_us: u64) -> impl Future<Output = Standing> + Send;
}

/// When histories begin. Not at zero, where a window would reach back behind the beginning of time.
pub(crate) const START_US: u64 = 1_790_000_000_000_000;

/// The classes of the subjects, so that a mistaken one shows.
const CLASSES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];

/// The claim of a numbered subject.
pub(crate) fn claim(subject: usize, requests: u32, window: Duration) -> Claim {
    let mut bytes = [0; 16];
    // Two of them share a shard, and the order of the numbers is not that of the shards.
    bytes[0] = [9, 4, 200, 4, 0, 255][subject % CLASSES.len()];
    bytes[8..].copy_from_slice(&subject.to_le_bytes());
    let class = CLASSES[subject % CLASSES.len()];
    Claim { subject: Subject(bytes), class, requests, window, on_store_failure: OnStoreFailure::Open }
}

// --- exactness -------------------------------------------------------------------------------------------------------

/// A call that was let through at some moment of this span.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Passed {
    pub(crate) not_before_us: u64,
    pub(crate) not_after_us: u64,
}

impl Passed {
    /// Let through at exactly that moment.
    pub(crate) fn at(now_us: u64) -> Self {
        Self { not_before_us: now_us, not_after_us: now_us }
    }
}

/// Of any `requests + 1` calls that were let through, the last came at least the window's length after the first.
///
/// # Panics
///
/// Where that cannot be, whenever within their spans the calls were let through.
pub(crate) fn assert_exact(passed: &[Passed], requests: u32, window: Duration) {
    let window_us = u64::try_from(window.as_micros()).expect("windows of tests are short");
    let mut by_start = passed.to_vec();
    by_start.sort_by_key(|call| call.not_before_us);
    for last in passed {
        // Those that were certainly let through within less than a window's length, up to the end of `last`.
        let first = by_start.partition_point(|call| call.not_before_us + window_us <= last.not_after_us);
        let within = by_start[first..].iter().filter(|call| call.not_after_us <= last.not_after_us).count();
        assert!(
            within <= requests as usize,
            "{within} calls of {requests} were let through in the {window_us} µs up to {}",
            last.not_after_us
        );
    }
}

// --- the model -------------------------------------------------------------------------------------------------------

/// Windows as simple as can be: all calls that ever were, counted anew each time.
#[derive(Debug, Default)]
pub(crate) struct Model {
    calls: Vec<Counted>,
    next_call: usize,
}

#[derive(Debug)]
struct Counted {
    call: usize,
    subject: Subject,
    at_us: u64,
    /// The shortest window that its subject has been judged by since. Windows need not remember it for longer, so where
    /// windows become longer again it is not certain whether it counts.
    certain_for_us: u64,
}

/// What windows have to answer.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// This.
    Passed(Vec<Standing>),
    /// This: standings, by, retry after.
    Refused(Vec<Standing>, usize, Duration),
    /// It passes, or not, or the numbers are not known: a window has become longer.
    Uncertain { may_pass: bool, may_be_refused: bool },
}

impl Model {
    fn counted<'a>(&'a self, claim: &'a Claim, now_us: u64) -> impl Iterator<Item = &'a Counted> {
        let window_us = us(claim.window);
        self.calls.iter().filter(move |call| call.subject == claim.subject && call.at_us + window_us > now_us)
    }

    /// Where a subject stands, if that is certain.
    pub(crate) fn standing(&self, claim: &Claim, now_us: u64) -> Option<Standing> {
        let calls: Vec<_> = self.counted(claim, now_us).collect();
        let certain = calls.iter().all(|call| call.at_us + call.certain_for_us > now_us);
        let oldest = calls.iter().map(|call| call.at_us).min();
        certain.then(|| Standing {
            class: claim.class,
            requests: claim.requests,
            window: claim.window,
            remaining: claim.requests.saturating_sub(u32::try_from(calls.len()).expect("few calls")),
            resets_in: oldest.map_or(Duration::ZERO, |at| Duration::from_micros(at + us(claim.window) - now_us)),
        })
    }

    /// What a call has to be answered.
    pub(crate) fn judge(&self, claims: &[Claim], now_us: u64) -> Expected {
        let standings: Option<Vec<_>> = claims.iter().map(|claim| self.standing(claim, now_us)).collect();
        let Some(mut standings) = standings else {
            let possible = claims.iter().map(|claim| self.counted(claim, now_us).count());
            let certain = claims.iter().map(|claim| {
                self.counted(claim, now_us).filter(|call| call.at_us + call.certain_for_us > now_us).count()
            });
            let met = |(claim, count): (&Claim, usize)| count < claim.requests as usize;
            return Expected::Uncertain {
                may_pass: claims.iter().zip(certain).all(met),
                may_be_refused: !claims.iter().zip(possible).all(met),
            };
        };
        let mut waits: Vec<(u64, usize)> = Vec::new();
        for (index, claim) in claims.iter().enumerate() {
            let mut times: Vec<u64> = self.counted(claim, now_us).map(|call| call.at_us).collect();
            times.sort_unstable();
            // Tried out, not computed: the first moment at which fewer than the limit are left.
            let moments = times.iter().map(|at| at + us(claim.window));
            let left_at = |moment: u64| times.iter().filter(|at| **at + us(claim.window) > moment).count();
            let has_room = |moment: &u64| left_at(*moment) < claim.requests as usize;
            if !has_room(&now_us) {
                let room_at = moments.into_iter().find(has_room).expect("there is room when all have left");
                waits.push((room_at - now_us, index));
            }
        }
        if let Some(longest) = waits.iter().map(|(wait, _)| *wait).max() {
            let (_, by) = waits.into_iter().find(|(wait, _)| *wait == longest).expect("it is one of them");
            return Expected::Refused(standings, by, Duration::from_micros(longest));
        }
        for standing in &mut standings {
            standing.remaining -= 1;
            if standing.resets_in.is_zero() {
                standing.resets_in = standing.window;
            }
        }
        Expected::Passed(standings)
    }

    /// Notes that the claims were judged, and the call if it was let through. Answers its number.
    pub(crate) fn note(&mut self, claims: &[Claim], now_us: u64, passed: bool) -> usize {
        self.next_call += 1;
        for claim in claims {
            let certain_for_us = us(claim.window);
            for call in self.calls.iter_mut().filter(|call| call.subject == claim.subject) {
                call.certain_for_us = call.certain_for_us.min(certain_for_us);
            }
            if passed {
                let (call, subject) = (self.next_call, claim.subject);
                self.calls.push(Counted { call, subject, at_us: now_us, certain_for_us });
            }
        }
        self.next_call
    }

    /// Forgets a call that was taken back.
    pub(crate) fn take_back(&mut self, call: usize) {
        self.calls.retain(|counted| counted.call != call);
    }
}

fn us(window: Duration) -> u64 {
    u64::try_from(window.as_micros()).expect("windows of tests are short")
}

// --- histories -------------------------------------------------------------------------------------------------------

/// What happens to windows.
#[derive(Clone, Debug)]
pub(crate) struct History {
    /// Limit and window of each subject, to begin with.
    pub(crate) limits: Vec<(u32, u64)>,
    pub(crate) steps: Vec<Step>,
}

/// One thing after the other.
#[derive(Clone, Debug)]
pub(crate) enum Step {
    /// Time passes.
    Wait(Index, Gap),
    /// A call that counts against these subjects, that often at once.
    Calls(Vec<Index>, u8),
    /// As many calls as fit and some more, each this long after the one before.
    Stream(Index, Gap, u8),
    /// A call that was let through is taken back.
    TakeBack(Index),
    /// The limit of a subject is another one from now on.
    Limit(Index, u32),
    /// The window of a subject is another one from now on.
    Window(Index, u64),
    /// Somebody asks where a subject stands.
    Look(Index),
}

/// How much time passes, by the limit of a subject.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Gap {
    /// The least.
    Microsecond,
    /// As long as steady calls that just fit are apart.
    Steady,
    /// The window, and this much more or less.
    Window(i64),
    /// Anything up to two windows, in thousandths.
    Part(u64),
}

impl Gap {
    fn us(self, (requests, window_us): (u32, u64)) -> u64 {
        match self {
            Self::Microsecond => 1,
            Self::Steady => window_us.div_ceil(requests.into()),
            Self::Window(more) => window_us.saturating_add_signed(more),
            Self::Part(thousandths) => 2 * window_us * thousandths / 1_000,
        }
    }
}

fn gaps() -> impl Strategy<Value = Gap> {
    prop_oneof![
        Just(Gap::Microsecond),
        Just(Gap::Steady),
        (-1..=1_i64).prop_map(Gap::Window),
        (0..=1_000_u64).prop_map(Gap::Part),
        // Short of what counts: most histories should run into their limits.
        (0..=50_u64).prop_map(Gap::Part),
    ]
}

fn requests() -> impl Strategy<Value = u32> {
    prop_oneof![1..=5_u32, 1..=50_u32]
}

/// From a millisecond, the shortest there is.
const WINDOWS_US: Range<u64> = 1_000..2_000_000;

/// Random histories of a few subjects: bursts, steady streams, calls at the very edge, calls that count against several
/// subjects, limits and windows that change under way.
pub(crate) fn histories() -> impl Strategy<Value = History> {
    let step = prop_oneof![
        4 => (any::<Index>(), gaps()).prop_map(|(subject, gap)| Step::Wait(subject, gap)),
        4 => (prop::collection::vec(any::<Index>(), 1..=MAX_CLAIMS), 1..=4_u8).prop_map(|(of, n)| Step::Calls(of, n)),
        1 => (any::<Index>(), 5..=60_u8).prop_map(|(subject, n)| Step::Calls(vec![subject], n)),
        1 => (any::<Index>(), gaps(), 1..=60_u8).prop_map(|(subject, gap, n)| Step::Stream(subject, gap, n)),
        1 => any::<Index>().prop_map(Step::TakeBack),
        1 => (any::<Index>(), requests()).prop_map(|(subject, requests)| Step::Limit(subject, requests)),
        1 => (any::<Index>(), WINDOWS_US).prop_map(|(subject, window)| Step::Window(subject, window)),
        1 => any::<Index>().prop_map(Step::Look),
    ];
    let limits = prop::collection::vec((requests(), WINDOWS_US), 1..=CLASSES.len());
    (limits, prop::collection::vec(step, 1..60)).prop_map(|(limits, steps)| History { limits, steps })
}

/// Drives windows through a history, compares each answer with the model's, and lastly judges what was let through by
/// [`assert_exact`] for each subject and each time between two changes of its limit.
pub(crate) async fn replay(windows: &impl Windows, history: &History) -> TestCaseResult {
    let mut run = Run {
        windows,
        model: Model::default(),
        now_us: START_US,
        receipts: Vec::new(),
        passed: history.limits.iter().map(|limit| vec![(*limit, Vec::new())]).collect(),
    };
    for step in &history.steps {
        run.step(step).await?;
    }
    for ((requests, window_us), passed) in run.passed.into_iter().flatten() {
        assert_exact(&passed, requests, Duration::from_micros(window_us));
    }
    Ok(())
}

struct Run<'a, W> {
    windows: &'a W,
    model: Model,
    now_us: u64,
    /// Of calls that could be taken back, and their numbers.
    receipts: Vec<(usize, Receipt)>,
    /// What was let through of each subject, by each of the limits that it has had. What was taken back is among it: it did
    /// count until then, and lets through no more than there would have been.
    passed: Vec<Vec<Era>>,
}

/// A limit, and what it let through.
type Era = ((u32, u64), Vec<Passed>);

impl<W: Windows> Run<'_, W> {
    async fn step(&mut self, step: &Step) -> TestCaseResult {
        match step {
            Step::Wait(subject, gap) => self.now_us += gap.us(self.limit(self.subject(*subject))),
            Step::Calls(subjects, times) => {
                let mut subjects: Vec<_> = subjects.iter().map(|subject| self.subject(*subject)).collect();
                // In an order that is not always the same, each once.
                let mut seen = std::collections::BTreeSet::new();
                subjects.retain(|subject| seen.insert(*subject));
                for _ in 0..*times {
                    self.call(&subjects).await?;
                }
            }
            Step::Stream(subject, gap, times) => {
                let subject = self.subject(*subject);
                for _ in 0..*times {
                    self.call(&[subject]).await?;
                    self.now_us += gap.us(self.limit(subject));
                }
            }
            Step::TakeBack(which) => {
                if !self.receipts.is_empty() {
                    let (call, receipt) = self.receipts.swap_remove(which.index(self.receipts.len()));
                    self.windows.take_back(&receipt, self.now_us).await;
                    self.model.take_back(call);
                    self.end_eras();
                }
            }
            Step::Limit(subject, requests) => {
                let subject = self.subject(*subject);
                let (_, window_us) = self.limit(subject);
                self.passed[subject].push(((*requests, window_us), Vec::new()));
            }
            Step::Window(subject, window_us) => {
                let subject = self.subject(*subject);
                let (requests, _) = self.limit(subject);
                self.passed[subject].push(((requests, *window_us), Vec::new()));
            }
            Step::Look(subject) => {
                let claim = self.claim(self.subject(*subject));
                let standing = self.windows.standing(&claim, self.now_us).await;
                if let Some(expected) = self.model.standing(&claim, self.now_us) {
                    prop_assert_eq!(standing, expected);
                }
            }
        }
        Ok(())
    }

    async fn call(&mut self, subjects: &[usize]) -> TestCaseResult {
        let claims: Vec<_> = subjects.iter().map(|subject| self.claim(*subject)).collect();
        let expected = self.model.judge(&claims, self.now_us);
        let verdict = self.windows.check(&claims, self.now_us).await;
        let passed = matches!(verdict, Verdict::Passed(_));
        match (&verdict, expected) {
            (Verdict::Passed(receipt), Expected::Passed(standings)) => {
                prop_assert_eq!(receipt.standings.as_slice(), standings);
            }
            (Verdict::Refused(refused), Expected::Refused(standings, by, retry_after)) => {
                prop_assert_eq!(refused.standings.as_slice(), standings);
                prop_assert_eq!((refused.by, refused.retry_after, refused.store_is_gone), (by, retry_after, false));
            }
            (_, Expected::Uncertain { may_pass, may_be_refused }) => {
                let allowed = if passed { may_pass } else { may_be_refused };
                prop_assert!(allowed, "at {}: {verdict:?}", self.now_us);
            }
            (verdict, expected) => prop_assert!(false, "at {}: {verdict:?} is not {expected:?}", self.now_us),
        }
        let call = self.model.note(&claims, self.now_us, passed);
        if let Verdict::Passed(receipt) = verdict {
            self.receipts.push((call, receipt));
            for subject in subjects {
                let (_, passed) = self.passed[*subject].last_mut().expect("there is always a limit");
                passed.push(Passed::at(self.now_us));
            }
        }
        Ok(())
    }

    /// What was taken back makes room, so that what comes is judged apart from what came.
    fn end_eras(&mut self) {
        for eras in &mut self.passed {
            let (limit, _) = *eras.last().expect("there is always a limit");
            eras.push((limit, Vec::new()));
        }
    }

    fn subject(&self, index: Index) -> usize {
        index.index(self.passed.len())
    }

    fn limit(&self, subject: usize) -> (u32, u64) {
        self.passed[subject].last().expect("there is always a limit").0
    }

    fn claim(&self, subject: usize) -> Claim {
        let (requests, window_us) = self.limit(subject);
        claim(subject, requests, Duration::from_micros(window_us))
    }
}

// --- single properties -----------------------------------------------------------------------------------------------

/// After a random history, a refused call passes after exactly as long as it was told, if nobody else calls, and not a
/// microsecond earlier.
pub(crate) async fn a_refused_call_passes_exactly_when_it_was_told(
    windows: &impl Windows,
    (limits, gaps): &Crowd,
) -> TestCaseResult {
    let mut now_us = START_US;
    let claims: Vec<_> = limits
        .iter()
        .enumerate()
        .map(|(subject, (requests, window_us))| claim(subject, *requests, Duration::from_micros(*window_us)))
        .collect();
    for (subject, gap) in gaps {
        let subject = subject.index(limits.len());
        windows.check(&claims[subject..=subject], now_us).await;
        if let Verdict::Refused(refused) = windows.check(&claims, now_us).await {
            let retry_us = us(refused.retry_after);
            prop_assert!(retry_us > 0);
            let early = windows.check(&claims, now_us + retry_us - 1).await;
            prop_assert!(matches!(early, Verdict::Refused(_)), "a microsecond early");
            let by = windows.check(&claims[refused.by..=refused.by], now_us + retry_us - 1).await;
            prop_assert!(matches!(by, Verdict::Refused(_)), "it is the one that takes longest");
            let then = windows.check(&claims, now_us + retry_us).await;
            prop_assert!(matches!(then, Verdict::Passed(_)), "when it was told");
            now_us += retry_us;
        }
        now_us += gap.us(limits[subject]);
    }
    Ok(())
}

/// Limits of subjects, and who calls and how long after him the next one does.
pub(crate) type Crowd = (Vec<(u32, u64)>, Vec<(Index, Gap)>);

/// Crowds for [`a_refused_call_passes_exactly_when_it_was_told`].
pub(crate) fn crowds() -> impl Strategy<Value = Crowd> {
    let limits = prop::collection::vec((requests(), WINDOWS_US), 1..=MAX_CLAIMS);
    // Short gaps, so that limits are hit.
    let gap = prop_oneof![Just(Gap::Microsecond), Just(Gap::Steady), (0..=30_u64).prop_map(Gap::Part)];
    (limits, prop::collection::vec((any::<Index>(), gap), 1..150))
}

// --- races -----------------------------------------------------------------------------------------------------------

/// Many callers of one subject side by side, in real time: never more than the limit in any window. They go on until
/// `rounds` times the limit were let through, and fail where that takes much longer than the windows do.
pub(crate) async fn race<W>(windows: Arc<W>, claim: Claim, callers: usize, rounds: usize)
where
    W: Windows + Send + Sync + 'static,
{
    let clock = Clock::system();
    let wanted = rounds * claim.requests as usize;
    let began_us = clock.boot_us();
    let all = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let callers: Vec<_> = (0..callers)
        .map(|_| {
            let (windows, clock, all) = (Arc::clone(&windows), clock.clone(), Arc::clone(&all));
            tokio::spawn(async move {
                while all.lock().len() < wanted {
                    let not_before_us = clock.boot_us();
                    let verdict = windows.check(&[claim], not_before_us).await;
                    let not_after_us = clock.boot_us();
                    match verdict {
                        Verdict::Passed(_) => all.lock().push(Passed { not_before_us, not_after_us }),
                        Verdict::Refused(_) => tokio::task::yield_now().await,
                    }
                    let allowed_us = 30_000_000 + us(claim.window) * rounds as u64;
                    assert!(not_after_us < began_us + allowed_us, "callers are let through as time passes");
                }
            })
        })
        .collect();
    for caller in callers {
        caller.await.expect("no caller fails");
    }
    let all = all.lock();
    assert_exact(&all, claim.requests, claim.window);
}
