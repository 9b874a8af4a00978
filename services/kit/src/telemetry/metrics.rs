//! What a process counts: read by Prometheus at `/metrics`, and pushed over OTLP where somewhere to send it is named.
//!
//! Who counts holds a plain atomic, made once: a call pays for a few additions and for no look-up by name, no lock and
//! no allocation. What has to be asked for (a pool, a spool, the process itself) is asked when somebody reads. Both ways
//! out are written from the same [`Snapshot`], so they tell the same under the same names.
//!
//! A label has few values, and all are known beforehand: methods of the contract, codes of the catalogue, services,
//! classes of limits. What is none of these counts as `other`. Nothing that a caller sends becomes a label.
//!
//! Deliberately absent: the metrics of the OpenTelemetry SDK. It finds each number by hashing its labels under a lock,
//! four times for a call that is counted here twice, which costs more than a call may pay; and its names are only
//! nearly those that were here before.

mod calls;
mod fleet;
mod observed;
pub mod otlp;
mod process;
mod text;

use std::{
    collections::{HashMap, hash_map},
    sync::{
        Arc, LazyLock,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use parking_lot::RwLock;

pub use calls::{Measured, PerMethod, method_word, methods};
pub use fleet::{observe_certificates, observe_channels, observe_load};
pub use observed::{observe_audit, observe_authenticator, observe_databases, observe_limiter};
pub use process::{READY, observe_process};

/// What a number does over time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It only grows, from zero at the start of the process.
    Counter,
    /// It goes up and down.
    Gauge,
    /// How many of the things that were measured were at most so large.
    Histogram,
}

/// Numbers of one name, told apart by labels.
#[derive(Debug)]
pub struct Family {
    /// The name, with its unit last.
    pub name: &'static str,
    /// What the numbers do.
    pub kind: Kind,
    /// The labels that each of the numbers has.
    pub labels: &'static [&'static str],
    /// What it says, in a sentence.
    pub help: &'static str,
}

impl Family {
    /// A number that only grows.
    pub const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Self { name, kind: Kind::Counter, labels, help }
    }

    /// A number that goes up and down.
    pub const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Self { name, kind: Kind::Gauge, labels, help }
    }

    /// How the sizes of many things are spread.
    pub const fn histogram(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Self {
        Self { name, kind: Kind::Histogram, labels, help }
    }
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// None so far. For statics.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// One more.
    pub fn inc(&self) {
        self.add(1);
    }

    /// So many more.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// How many so far.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicI64);

impl Gauge {
    /// Zero. For statics.
    pub const fn new() -> Self {
        Self(AtomicI64::new(0))
    }

    /// It is so much now.
    pub fn set(&self, value: i64) {
        self.0.store(value, Ordering::Relaxed);
    }

    /// One more, until what is returned is dropped.
    pub fn hold(&'static self) -> Held {
        self.0.fetch_add(1, Ordering::Relaxed);
        Held(&self.0)
    }

    /// How much it is.
    pub fn get(&self) -> i64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One of what a gauge counts.
#[derive(Debug)]
pub struct Held(&'static AtomicI64);

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Upper bounds of durations, in microseconds: from half a millisecond, which a cached answer takes, to the ten seconds
/// after which nobody waits.
pub const DURATION_BOUNDS_US: [u64; 14] = [
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000, 2_500_000, 5_000_000,
    10_000_000,
];

/// How long things took.
#[derive(Debug)]
pub struct Durations {
    /// One more than there are bounds: the last is for what is larger than all.
    buckets: [AtomicU64; DURATION_BOUNDS_US.len() + 1],
    sum_us: AtomicU64,
}

impl Default for Durations {
    fn default() -> Self {
        Self::new()
    }
}

impl Durations {
    /// Nothing was measured so far. For statics.
    pub const fn new() -> Self {
        Self { buckets: [const { AtomicU64::new(0) }; DURATION_BOUNDS_US.len() + 1], sum_us: AtomicU64::new(0) }
    }

    /// Something took so long.
    pub fn observe(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = DURATION_BOUNDS_US.partition_point(|bound| *bound < us);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    /// What was measured so far, in seconds.
    #[expect(clippy::cast_precision_loss, reason = "within the precision of a measurement")]
    pub fn read(&self) -> Spread {
        Spread {
            bounds: DURATION_BOUNDS_US.iter().map(|us| *us as f64 / 1e6).collect(),
            counts: self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect(),
            sum: self.sum_us.load(Ordering::Relaxed) as f64 / 1e6,
        }
    }
}

/// Upper bounds of sizes of groups.
const SIZE_BOUNDS: [u64; 9] = [1, 2, 4, 8, 16, 32, 64, 128, 256];

/// How large groups were.
#[derive(Debug, Default)]
pub struct Sizes {
    buckets: [AtomicU64; SIZE_BOUNDS.len() + 1],
    sum: AtomicU64,
}

impl Sizes {
    /// A group was so large.
    pub fn observe(&self, size: usize) {
        let size = u64::try_from(size).unwrap_or(u64::MAX);
        self.buckets[SIZE_BOUNDS.partition_point(|bound| *bound < size)].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(size, Ordering::Relaxed);
    }

    /// What was measured so far.
    #[expect(clippy::cast_precision_loss, reason = "within the precision of a measurement")]
    pub fn read(&self) -> Spread {
        Spread {
            bounds: SIZE_BOUNDS.iter().map(|size| *size as f64).collect(),
            counts: self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).collect(),
            sum: self.sum.load(Ordering::Relaxed) as f64,
        }
    }
}

/// How the sizes of things are spread.
#[derive(Clone, Debug, PartialEq)]
pub struct Spread {
    /// Upper bounds, ascending.
    pub bounds: Vec<f64>,
    /// How many were above the bound before and at most this one; and at the end, above all.
    pub counts: Vec<u64>,
    /// All together.
    pub sum: f64,
}

impl Spread {
    /// How many things were measured.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// A number that was read.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A whole number.
    Whole(u64),
    /// Any number.
    Real(f64),
    /// Of a histogram.
    Spread(Spread),
}

impl From<u64> for Value {
    fn from(value: u64) -> Self {
        Self::Whole(value)
    }
}

impl From<usize> for Value {
    fn from(value: usize) -> Self {
        Self::Whole(u64::try_from(value).unwrap_or(u64::MAX))
    }
}

impl From<u32> for Value {
    fn from(value: u32) -> Self {
        Self::Whole(value.into())
    }
}

impl From<bool> for Value {
    fn from(value: bool) -> Self {
        Self::Whole(value.into())
    }
}

/// What is counted up and down may be read between a down and its up.
impl From<i64> for Value {
    fn from(value: i64) -> Self {
        Self::Whole(u64::try_from(value).unwrap_or(0))
    }
}

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self::Real(value)
    }
}

impl From<Duration> for Value {
    fn from(value: Duration) -> Self {
        Self::Real(value.as_secs_f64())
    }
}

impl From<Spread> for Value {
    fn from(value: Spread) -> Self {
        Self::Spread(value)
    }
}

/// A number with the values of its family's labels.
#[derive(Clone, Debug, PartialEq)]
pub struct Point {
    /// The values of the labels, in the order of the family.
    pub labels: Vec<String>,
    /// The number.
    pub value: Value,
}

/// All numbers of a process, at one moment.
#[derive(Debug, Default)]
pub struct Snapshot {
    order: Vec<&'static Family>,
    points: HashMap<&'static str, Vec<Point>>,
}

impl Snapshot {
    /// Announces families, so that their names are known before there is a number.
    fn announce(&mut self, families: &[&'static Family]) {
        for family in families {
            if let hash_map::Entry::Vacant(entry) = self.points.entry(family.name) {
                entry.insert(Vec::new());
                self.order.push(family);
            }
        }
    }

    /// Puts a number in. One of a family that was not announced, or without all of its labels, is a fault that tests
    /// run into, and is left out.
    pub fn put(&mut self, family: &'static Family, labels: &[&str], value: impl Into<Value>) {
        debug_assert_eq!(family.labels.len(), labels.len(), "{}", family.name);
        debug_assert!(self.points.contains_key(family.name), "{} was not announced", family.name);
        if let Some(points) = self.points.get_mut(family.name) {
            let labels = labels.iter().map(|label| (*label).to_owned()).collect();
            points.push(Point { labels, value: value.into() });
        }
    }

    /// All families with their numbers.
    pub fn families(&self) -> impl Iterator<Item = (&'static Family, &[Point])> {
        self.order.iter().map(|family| (*family, self.points.get(family.name).map_or(&[][..], Vec::as_slice)))
    }
}

type Collect = Arc<dyn Fn(&mut Snapshot) + Send + Sync>;

/// Where everybody says how their numbers are read.
struct Registry {
    started: SystemTime,
    collectors: RwLock<Vec<(&'static [&'static Family], Collect)>>,
}

/// A process has one of each number, so it has one registry.
static REGISTRY: LazyLock<Registry> =
    LazyLock::new(|| Registry { started: SystemTime::now(), collectors: RwLock::default() });

/// Says how the numbers of some families are read. What is called must not wait for anything.
pub fn publish(families: &'static [&'static Family], collect: impl Fn(&mut Snapshot) + Send + Sync + 'static) {
    REGISTRY.collectors.write().push((families, Arc::new(collect)));
}

/// When counting began: at the start of the process.
pub fn started() -> SystemTime {
    REGISTRY.started
}

/// All numbers, as they are now.
pub fn snapshot() -> Snapshot {
    let collectors = REGISTRY.collectors.read().clone();
    let mut snapshot = Snapshot::default();
    for (families, collect) in &collectors {
        snapshot.announce(families);
        collect(&mut snapshot);
    }
    snapshot
}

/// All numbers in the text format of Prometheus.
pub fn text() -> String {
    text::encode(&snapshot())
}

#[cfg(test)]
mod tests {
    use super::*;

    static CALLS: Family = Family::counter("calls_total", &["rpc"], "Calls.");
    static TOOK: Family = Family::histogram("took_seconds", &[], "How long\nthey took.");
    static OPEN: Family = Family::gauge("open", &[], "Open.");

    #[test]
    fn what_is_put_in_is_written_as_prometheus_reads_it() {
        let mut snapshot = Snapshot::default();
        snapshot.announce(&[&CALLS, &TOOK, &OPEN]);
        snapshot.put(&CALLS, &["a\"b\\c\nd"], 7_u64);
        snapshot.put(&TOOK, &[], Spread { bounds: vec![0.5, 1.0], counts: vec![1, 0, 2], sum: 9.25 });
        let text = text::encode(&snapshot);
        assert_eq!(
            text,
            "# HELP calls_total Calls.\n# TYPE calls_total counter\ncalls_total{rpc=\"a\\\"b\\\\c\\nd\"} 7\n\
             # HELP took_seconds How long\\nthey took.\n# TYPE took_seconds histogram\n\
             took_seconds_bucket{le=\"0.5\"} 1\ntook_seconds_bucket{le=\"1\"} 1\ntook_seconds_bucket{le=\"+Inf\"} 3\n\
             took_seconds_sum 9.25\ntook_seconds_count 3\n# HELP open Open.\n# TYPE open gauge\n"
        );
    }

    #[test]
    fn a_duration_falls_into_the_first_bucket_that_holds_it() {
        let durations = Durations::new();
        for us in [0, 500, 501, 10_000_000, 10_000_001] {
            durations.observe(Duration::from_micros(us));
        }
        let spread = durations.read();
        assert_eq!(spread.count(), 5);
        assert_eq!((spread.counts[0], spread.counts[1], spread.counts[13], spread.counts[14]), (2, 1, 1, 1));
        assert!((spread.sum - 20.001_002).abs() < 1e-9, "{}", spread.sum);
    }

    #[test]
    fn what_is_held_counts_until_it_is_let_go() {
        static GAUGE: Gauge = Gauge::new();
        let held = (GAUGE.hold(), GAUGE.hold());
        assert_eq!(GAUGE.get(), 2);
        drop(held);
        assert_eq!(GAUGE.get(), 0);
    }
}
