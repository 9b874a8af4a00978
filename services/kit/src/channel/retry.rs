//! When a call may be made again, and how often.
//!
//! What no service has taken may always go elsewhere. What one may have acted upon is sent again only where the contract
//! says that twice is once ([`paperkey_proto::contract::Method::may_repeat`]) or the caller has asked for that by an
//! `Idempotency-Key`; and within a budget, so that a service which fails is not called more for it.

use std::{
    error::Error as _,
    sync::atomic::{AtomicI64, AtomicU64, Ordering},
};

use http::Response;
use paperkey_proto::{Error, errors::v1::Reason};
use tokio::time::Instant;
use tonic::{Code, Status};

/// How often a call that may have been acted upon is sent again.
pub(super) const MORE_TRIES: u32 = 2;
/// How often a call that nobody has taken goes elsewhere.
pub(super) const MOVES: u32 = 8;

/// What a try costs, in fractions: each call earns one of them.
const TRY: i64 = 5;
/// Tries that are earned by time alone, a second.
const TRIES_PER_SECOND: i64 = 10;
/// Tries that can be saved up.
const SAVED_TRIES: i64 = 500;

/// A call in five may be made again, and some a second however few calls there are.
#[derive(Debug)]
pub(super) struct Budget {
    began: Instant,
    /// In fractions of a try.
    saved: AtomicI64,
    /// The last second for which tries were given.
    second: AtomicU64,
}

impl Budget {
    pub(super) fn new() -> Self {
        Self { began: Instant::now(), saved: AtomicI64::new(TRIES_PER_SECOND * TRY), second: AtomicU64::new(0) }
    }

    /// Counts a call.
    pub(super) fn earn(&self) {
        // Two at once may save one too many, which does no harm.
        if self.saved.load(Ordering::Relaxed) < SAVED_TRIES * TRY {
            self.saved.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether a call may be made again.
    pub(super) fn spend(&self) -> bool {
        self.spend_in(self.began.elapsed().as_secs())
    }

    fn spend_in(&self, second: u64) -> bool {
        let last = self.second.swap(second, Ordering::Relaxed);
        if second > last {
            let seconds = i64::try_from(second - last).unwrap_or(i64::MAX);
            let earned = seconds.saturating_mul(TRIES_PER_SECOND * TRY).min(SAVED_TRIES * TRY);
            let raised = |saved: i64| Some(saved.saturating_add(earned).min(SAVED_TRIES * TRY).max(saved));
            let _ = self.saved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, raised);
        }
        let spent = |saved: i64| (saved >= TRY).then_some(saved - TRY);
        self.saved.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spent).is_ok()
    }
}

/// Whether a peer has said that it did not act upon a request: it refused its stream, or went away naming an earlier one
/// as its last.
pub(super) fn was_refused(error: &hyper::Error) -> bool {
    // hyper has no word for it, and its cause is of a crate of which nothing else is needed here. A wording that changes
    // makes us try too little and never too much.
    let causes = std::iter::successors(error.source(), |cause| (*cause).source());
    causes.map(ToString::to_string).any(|text| {
        text.starts_with("connection error received") || text.starts_with("stream error received: refused stream")
    })
}

/// Whether a service has answered that it cannot right now, and does not ask to be left alone.
pub(super) fn is_unavailable<B>(response: &Response<B>) -> bool {
    Status::from_header_map(response.headers()).is_some_and(|status| {
        status.code() == Code::Unavailable && {
            let error = Error::from_status(&status);
            error.reason() == Reason::Unavailable && error.retry_after().is_none()
        }
    })
}

/// Whether a service has answered that the same call, by its `Idempotency-Key`, is still under way.
pub(super) fn is_under_way<B>(response: &Response<B>) -> bool {
    Status::from_header_map(response.headers()).is_some_and(|status| {
        status.code() != Code::Ok && {
            let error = Error::from_status(&status);
            error.reason() == Reason::Conflict && error.retry_after().is_some()
        }
    })
}

/// What hyper says of an error is what it was about to do; why stands behind it.
pub(super) fn words(error: &(dyn std::error::Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |cause| (*cause).source());
    causes.fold(error.to_string(), |text, cause| {
        let more = cause.to_string();
        if text.contains(&more) { text } else { format!("{text}: {more}") }
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_call_in_five_may_be_made_again_and_a_few_a_second() {
        let budget = Budget::new();
        let spent = |second| std::iter::repeat_with(|| budget.spend_in(second)).take_while(|may| *may).count();
        assert_eq!(spent(0), 10, "what one begins with");
        (0..100).for_each(|_| budget.earn());
        assert_eq!(spent(0), 20);
        assert_eq!(spent(3), 30);
        (0..10_000).for_each(|_| budget.earn());
        assert_eq!(spent(4_000), 500, "no more can be saved");
    }

    #[test]
    fn a_service_that_says_how_long_to_wait_is_not_asked_at_once() {
        let answer = |error: Error| Status::from(error).into_http::<()>();
        assert!(is_unavailable(&answer(Error::unavailable("restarting"))));
        assert!(is_unavailable(&Status::unavailable("somebody else's").into_http::<()>()));
        assert!(!is_unavailable(&answer(Error::unavailable("full").with_retry_after(Duration::from_secs(9)))));
        assert!(!is_unavailable(&answer(Error::new(Reason::Conflict))));
        assert!(!is_unavailable(&Response::new(())));
    }

    #[test]
    fn a_call_that_is_under_way_is_told_from_other_conflicts() {
        let answer = |error: Error| Status::from(error).into_http::<()>();
        let conflict = || Error::new(Reason::Conflict);
        assert!(is_under_way(&answer(conflict().with_retry_after(Duration::from_secs(5)))));
        assert!(!is_under_way(&answer(conflict())));
        assert!(!is_under_way(&answer(Error::unavailable("full").with_retry_after(Duration::from_secs(9)))));
        assert!(!is_under_way(&Response::new(())));
    }
}
