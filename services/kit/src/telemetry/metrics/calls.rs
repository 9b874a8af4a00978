//! Calls of a service: how many, how they ended, how long they took, how many are under way.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{LazyLock, OnceLock},
    task::{Context, Poll, ready},
    time::Instant,
};

use http::Response;
use paperkey_proto::{Contract, contract::Method};
use tonic::{Code, body::Body};

use super::{Counter, Durations, Family, Gauge, Held, Snapshot};
use crate::{clock::Clock, service::Answer};

/// What calls of no method of the contract are counted as.
const OTHER: &str = "other";

static RPC_CALLS: Family = Family::counter(
    "paperkey_rpc_calls_total",
    &["service", "rpc", "code"],
    "Calls that a service has answered, by the code of gRPC. A stream counts when it begins.",
);
static RPC_DURATION: Family = Family::histogram(
    "paperkey_rpc_duration_seconds",
    &["service", "rpc"],
    "How long a service took to answer, until the first byte where it streams.",
);
static RPC_IN_FLIGHT: Family =
    Family::gauge("paperkey_rpc_in_flight", &["service", "rpc"], "Calls that a service is answering.");

pub(super) static FAMILIES: &[&Family] = &[&RPC_CALLS, &RPC_DURATION, &RPC_IN_FLIGHT];

/// The codes of gRPC, by their numbers.
const CODES: [&str; 17] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
];

/// Something for each method of the contract, and one for what is no method of it. Made when it is first asked for.
#[derive(Debug)]
pub struct PerMethod<T: 'static>(LazyLock<Box<[OnceLock<Box<T>>]>>);

impl<T: Default> Default for PerMethod<T> {
    fn default() -> Self {
        Self::new()
    }
}

impl<T: Default> PerMethod<T> {
    /// Nothing yet. For statics.
    pub const fn new() -> Self {
        Self(LazyLock::new(|| (0..=Contract::get().methods().len()).map(|_| OnceLock::new()).collect()))
    }

    /// That of a method.
    pub fn of(&self, method: Option<&Method>) -> &T {
        let slots = &**self.0;
        let last = slots.len() - 1;
        slots[method.map_or(last, |method| method.number).min(last)].get_or_init(Box::default)
    }

    /// All that were asked for, with their methods.
    pub fn iter(&self) -> impl Iterator<Item = (Option<&'static Method>, &T)> {
        self.0.iter().zip(methods()).filter_map(|(slot, method)| Some((method, &**slot.get()?)))
    }
}

/// All methods of the contract, and at last what is none of them.
pub fn methods() -> impl Iterator<Item = Option<&'static Method>> {
    Contract::get().methods().iter().map(|method| Some(&**method)).chain([None])
}

/// How labels name a method.
pub fn method_word(method: Option<&Method>) -> &str {
    method.map_or(OTHER, |method| method.path.trim_start_matches('/'))
}

#[derive(Debug, Default)]
struct Calls {
    by_code: [Counter; CODES.len()],
    duration: Durations,
    in_flight: Gauge,
}

static CALLS: PerMethod<Calls> = PerMethod::new();

pub(super) fn collect(snapshot: &mut Snapshot) {
    for (method, calls) in CALLS.iter() {
        let service = method.map_or(OTHER, |method| method.owner.as_str());
        let rpc = method_word(method);
        for (code, counter) in CODES.iter().zip(&calls.by_code) {
            if counter.get() > 0 {
                snapshot.put(&RPC_CALLS, &[service, rpc, code], counter.get());
            }
        }
        snapshot.put(&RPC_DURATION, &[service, rpc], calls.duration.read());
        snapshot.put(&RPC_IN_FLIGHT, &[service, rpc], calls.in_flight.get());
    }
}

/// An answer that is counted when it is there, and also where nobody waits for it any more.
#[must_use = "a call is only made while it is waited for"]
pub struct Measured {
    answer: Answer,
    running: Option<Running>,
}

struct Running {
    calls: &'static Calls,
    began: Instant,
    clock: Clock,
    _in_flight: Held,
}

impl Measured {
    /// The answer to a call of that method, which has just arrived.
    pub fn new(method: Option<&Method>, clock: &Clock, answer: Answer) -> Self {
        let calls = CALLS.of(method);
        let running =
            Running { calls, began: clock.monotonic(), clock: clock.clone(), _in_flight: calls.in_flight.hold() };
        Self { answer, running: Some(running) }
    }
}

impl Running {
    fn ends(self, code: Code) {
        let number = usize::try_from(i32::from(code)).unwrap_or(0).min(CODES.len() - 1);
        self.calls.by_code[number].inc();
        self.calls.duration.observe(self.clock.monotonic().saturating_duration_since(self.began));
    }
}

impl Future for Measured {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = ready!(self.answer.as_mut().poll(context));
        if let (Some(running), Ok(response)) = (self.running.take(), &answer) {
            // An answer that is nothing but a refusal says so in its head; what begins well counts as that.
            let status = response.headers().get("grpc-status");
            running.ends(status.map_or(Code::Ok, |status| Code::from_bytes(status.as_bytes())));
        }
        Poll::Ready(answer)
    }
}

impl Drop for Measured {
    fn drop(&mut self) {
        if let Some(running) = self.running.take() {
            running.ends(Code::Cancelled);
        }
    }
}

impl std::fmt::Debug for Measured {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Measured").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_call_is_counted_by_its_code_also_where_nobody_waits_for_it() {
        let method = Contract::get().method("/paperkey.catalog.v1.CatalogService/GetProduct").expect("it is there");
        let calls = CALLS.of(Some(method));
        let (clock, hand) = Clock::manual(0);
        let refused: Answer = Box::pin(async { Ok(tonic::Status::not_found("none").into_http()) });
        let measured = Measured::new(Some(method), &clock, refused);
        assert_eq!(calls.in_flight.get(), 1);
        hand.advance_ms(3);
        let _ = measured.await;
        drop(Measured::new(Some(method), &clock, Box::pin(std::future::pending())));
        let counted = |code: Code| calls.by_code[code as usize].get();
        assert_eq!((counted(Code::NotFound), counted(Code::Cancelled), counted(Code::Ok)), (1, 1, 0));
        assert_eq!((calls.in_flight.get(), calls.duration.read().count()), (0, 2));
        assert!((calls.duration.read().sum - 0.003).abs() < 1e-9);
    }

    #[test]
    fn every_code_of_grpc_has_its_name() {
        for (number, name) in CODES.iter().enumerate() {
            let code = Code::from_i32(i32::try_from(number).expect("there are few"));
            assert_eq!(format!("{code:?}").to_uppercase(), name.replace('_', ""), "{number}");
        }
    }
}
