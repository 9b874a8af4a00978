//! What the gateway counts of its calls: how many, how they ended, how long they took, how many are under way, and what
//! limits let through.
//!
//! A caller chooses none of the labels: methods, surfaces and classes come from the contract, codes from the catalogue
//! of errors. Where a caller went away before the answer, that is a status of its own, 499.

use std::{
    sync::{
        LazyLock, Once, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::Uri;
use paperkey_kit::{
    config::limits::REFUSED_CREDENTIALS,
    telemetry::metrics::{self, Counter, Durations, Family, Gauge, Held, PerMethod, Snapshot, method_word},
};
use paperkey_proto::{Contract, contract::Method, options::v1::Surface};
use parking_lot::RwLock;

static CALLS: Family = Family::counter(
    "paperkey_gateway_calls_total",
    &["rpc", "surface", "status"],
    "Calls that the gateway has answered, by the class of the status.",
);
static DURATION: Family = Family::histogram(
    "paperkey_gateway_call_duration_seconds",
    &["rpc", "surface"],
    "How long calls took, from the head of the request to the head of the answer.",
);
static ERRORS: Family = Family::counter(
    "paperkey_gateway_errors_total",
    &["rpc", "status", "code"],
    "Calls that ended in an error, by its status over REST and its code in the catalogue.",
);
static IN_FLIGHT: Family = Family::gauge("paperkey_gateway_in_flight", &[], "Calls that the gateway is answering.");
static DECISIONS: Family = Family::counter(
    "paperkey_limits_decisions_total",
    &["class", "outcome"],
    "What limits decided. A call that is refused counts once, for the class that refused it.",
);
static FAMILIES: &[&Family] = &[&CALLS, &DURATION, &ERRORS, &IN_FLIGHT, &DECISIONS];

/// How a call came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Way {
    /// By a path, which may be that of a surface.
    #[default]
    Path,
    Grpc,
    GrpcWeb,
    /// At a door to somebody else's API.
    Door,
}

/// The ways that are no surface, as labels name them; the last is that of paths beside all surfaces.
const WAYS: [&str; 4] = ["grpc", "grpc_web", "door", "none"];

/// The words of all surfaces, and those of the ways beside them.
static SURFACES: LazyLock<Vec<String>> = LazyLock::new(|| {
    let last = Contract::get().surfaces().iter().map(|entry| entry.surface as usize).max().unwrap_or(0);
    let mut words: Vec<String> = WAYS.iter().map(|way| (*way).to_owned()).collect();
    let surface = |number: usize| i32::try_from(number).ok().and_then(|number| Surface::try_from(number).ok());
    words.extend((0..=last).map(|number| {
        let name = surface(number).map_or("none", |surface| surface.as_str_name());
        name.trim_start_matches("SURFACE_").to_ascii_lowercase()
    }));
    words
});

/// The classes of a status, as labels name them.
const CLASSES: [&str; 5] = ["1xx", "2xx", "3xx", "4xx", "5xx"];

/// What an error is called that has no code of ours: those of other people's servers.
const NO_CODE: &str = "none";
/// And one that nobody was there to be told.
const GONE_CODE: &str = "caller_gone";

#[derive(Debug, Default)]
struct OnSurface {
    by_class: [Counter; CLASSES.len()],
    duration: Durations,
}

#[derive(Debug)]
struct OfMethod {
    on: Box<[OnceLock<Box<OnSurface>>]>,
    /// Errors are few and the same ones: a list that is walked along.
    errors: RwLock<Vec<(u16, &'static str, AtomicU64)>>,
}

impl Default for OfMethod {
    fn default() -> Self {
        Self { on: SURFACES.iter().map(|_| OnceLock::new()).collect(), errors: RwLock::default() }
    }
}

/// Errors of one method that are told apart. The catalogue has fewer; what a server behind a door answers is its own.
const MAX_ERRORS: usize = 128;
/// What the errors beyond are called, each with the first status of its class.
const OTHER_CODE: &str = "other";

static METHODS: PerMethod<OfMethod> = PerMethod::new();
static UNDER_WAY: Gauge = Gauge::new();

/// A call under way.
#[derive(Debug)]
pub(crate) struct Running {
    _held: Held,
}

/// A call has arrived.
pub(crate) fn begins() -> Running {
    Running { _held: UNDER_WAY.hold() }
}

impl Running {
    /// The call has ended.
    pub(crate) fn ends(
        self,
        (method, way, uri): (Option<&Method>, Way, &Uri),
        status: u16,
        code: Option<&'static str>,
        took: Duration,
    ) {
        let of = METHODS.of(method);
        let number = match way {
            Way::Grpc => 0,
            Way::GrpcWeb => 1,
            Way::Door => 2,
            Way::Path => Contract::get().surface_of(uri.path()).map_or(3, |entry| WAYS.len() + entry.surface as usize),
        };
        if let Some(on) = of.on.get(number) {
            let on = on.get_or_init(Box::default);
            on.by_class[usize::from(status / 100).clamp(1, CLASSES.len()) - 1].inc();
            on.duration.observe(took);
        }
        if status >= 400 {
            let code = code.unwrap_or(if status == crate::call::GONE { GONE_CODE } else { NO_CODE });
            of.failed(status, code);
        }
        drop(self);
    }
}

impl OfMethod {
    fn failed(&self, status: u16, code: &'static str) {
        if count_among(&self.errors.read(), status, code) {
            return;
        }
        // Where there is no more room, this lock is taken by whoever finds that out first.
        let is_full = self.errors.read().len() >= MAX_ERRORS;
        let (status, code) = if is_full { (status / 100 * 100, OTHER_CODE) } else { (status, code) };
        if is_full && count_among(&self.errors.read(), status, code) {
            return;
        }
        let mut errors = self.errors.write();
        if !count_among(&errors, status, code) {
            errors.push((status, code, AtomicU64::new(1)));
        }
    }
}

/// Counts an error, if it was seen before.
fn count_among(errors: &[(u16, &'static str, AtomicU64)], status: u16, code: &'static str) -> bool {
    let found = errors.iter().find(|error| error.0 == status && error.1 == code);
    found.map(|error| error.2.fetch_add(1, Ordering::Relaxed)).is_some()
}

/// What a limit decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    Allowed,
    Refused,
    /// The store is gone, and the limit is closed without it.
    Closed,
}

const DECISIONS_WORDS: [&str; 3] = ["allowed", "refused", "closed"];

static LIMITS: LazyLock<Vec<(&'static str, [Counter; 3])>> = LazyLock::new(|| {
    let classes = Contract::get().rate_classes().map(|(_, options)| options.word.as_str());
    classes.chain([REFUSED_CREDENTIALS]).map(|class| (class, Default::default())).collect()
});

/// A limit of that class has decided.
pub(crate) fn decided(class: &'static str, decision: Decision) {
    // There are a handful of classes.
    if let Some((_, counters)) = LIMITS.iter().find(|(known, _)| *known == class) {
        counters[decision as usize].inc();
    }
}

/// Publishes all that. The numbers are the process's, however many gateways it makes.
pub(crate) fn publish() {
    static PUBLISHED: Once = Once::new();
    PUBLISHED.call_once(|| metrics::publish(FAMILIES, collect));
}

fn collect(snapshot: &mut Snapshot) {
    snapshot.put(&IN_FLIGHT, &[], UNDER_WAY.get());
    for (method, of) in METHODS.iter() {
        let rpc = method_word(method);
        for (surface, on) in SURFACES.iter().zip(&of.on) {
            let Some(on) = on.get() else { continue };
            for (class, count) in CLASSES.iter().zip(&on.by_class) {
                if count.get() > 0 {
                    snapshot.put(&CALLS, &[rpc, surface, class], count.get());
                }
            }
            snapshot.put(&DURATION, &[rpc, surface], on.duration.read());
        }
        for (status, code, count) in of.errors.read().iter() {
            snapshot.put(&ERRORS, &[rpc, &status.to_string(), code], count.load(Ordering::Relaxed));
        }
    }
    for (class, counters) in LIMITS.iter() {
        for (outcome, count) in DECISIONS_WORDS.iter().zip(counters) {
            snapshot.put(&DECISIONS, &[class, outcome], count.get());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_is_counted_under_its_method_its_surface_and_its_error() {
        let method = Contract::get().method("/paperkey.catalog.v1.CatalogService/GetProduct").expect("it is there");
        let uri = Uri::from_static("/v1/products/prod_1");
        for way in [Way::Path, Way::Grpc] {
            begins().ends((Some(method), way, &uri), 404, Some("PB_NOT_FOUND"), Duration::from_millis(2));
        }
        begins().ends((None, Way::Path, &Uri::from_static("/x")), crate::call::GONE, None, Duration::ZERO);
        let running = begins();
        publish();
        let text = metrics::text();
        drop(running);
        let rpc = "rpc=\"paperkey.catalog.v1.CatalogService/GetProduct\"";
        let has = |line: &str| assert!(text.lines().any(|written| written == line), "no {line} in {text}");
        has(&format!("paperkey_gateway_errors_total{{{rpc},status=\"404\",code=\"PB_NOT_FOUND\"}} 2"));
        has(&format!("paperkey_gateway_calls_total{{{rpc},surface=\"grpc\",status=\"4xx\"}} 1"));
        has("paperkey_gateway_errors_total{rpc=\"other\",status=\"499\",code=\"caller_gone\"} 1");
        has("paperkey_gateway_calls_total{rpc=\"other\",surface=\"none\",status=\"4xx\"} 1");
    }

    #[test]
    fn however_many_errors_there_are_they_take_bounded_room() {
        let of = OfMethod::default();
        for status in 0..1_000 {
            of.failed(status, NO_CODE);
        }
        let errors = of.errors.read();
        // And those of each class that there are.
        assert_eq!(errors.len(), MAX_ERRORS + 9);
        let counted: u64 = errors.iter().map(|error| error.2.load(Ordering::Relaxed)).sum();
        assert_eq!(counted, 1_000, "none is forgotten");
        assert!(errors.iter().any(|error| error.0 == 500 && error.1 == OTHER_CODE));
    }
}
