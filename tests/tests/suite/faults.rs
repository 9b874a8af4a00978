//! A fleet of which anything may fail at any moment: two gateways, two of each service, PostgreSQL and Redis, under load
//! all the time.
//!
//! The load comes through a client that behaves as a balancer does, and everything that it is told is written down. In
//! the end that is held against what is stored, what was delivered and what may have been granted. The machine is this
//! test's alone while it runs, since a fleet on two cores has to be well again within seconds.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::Path,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::{
    future::join_all,
    stream::{self, StreamExt as _},
};
use http::Method;
use paperkey_kit::{clock::Clock, values::rfc3339};
use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{
    Account, Api, Balancer, License, LocalFleet, Product, Receiver,
    balancer::{Call, Outcome},
    eventually,
    people::{App, text},
};
use rand::RngExt as _;
use serde_json::{Value, json};
use tokio::task::JoinHandle;

use crate::freshness::PROMISED;

/// How long a process stands still.
const STANDSTILL: Duration = Duration::from_secs(10);
/// Within which time everything is well again.
const RECOVERY: Duration = Duration::from_secs(5);
/// The part of calls that may fail while nothing is wrong: one in a thousand.
const ERRORS_IN: usize = 1_000;
/// How many calls are made between two faults, at the least.
const BETWEEN_FAULTS: usize = 100;
/// How long a call may take that asks whether all is well again.
const PROBE: Duration = Duration::from_secs(2);

/// The units of a month that the team has which uses them up, and those of the other.
const FEW_UNITS: u64 = 250;
const MANY_UNITS: u64 = 1_000_000;
/// The calls a minute of the key that has a limit.
const LIMIT: usize = 30;
const WINDOW: Duration = Duration::from_mins(1);
/// The machines of a licence.
const SLOTS: usize = 3;
/// After how many seconds licences expire that do.
const SOON_S: std::ops::Range<i64> = 5..40;

const LIMITS: &str = "{ per_key = { requests = 1000000 }, per_ip = { requests = 1000000 }, \
     auth = { requests = 1000000 }, license_validate = { requests = 1000000 }, \
     license_activate = { requests = 1000000 }, test_key = { requests = 1000000 }, \
     refused_credentials = { requests = 1000000 } }";

/// Kinds of calls under load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Validate,
    Verify,
    Read,
    Limited,
    FewUnits,
    ManyUnits,
    Issue,
    IssueOnce,
    Expiring,
    Activate,
    ActivateOnce,
}

impl Kind {
    const ALL: [Self; 11] = [
        Self::Validate,
        Self::Verify,
        Self::Read,
        Self::Limited,
        Self::FewUnits,
        Self::ManyUnits,
        Self::Issue,
        Self::IssueOnce,
        Self::Expiring,
        Self::Activate,
        Self::ActivateOnce,
    ];

    /// How many clients make such calls, and how often each of them does, in milliseconds.
    fn load(self) -> (usize, u64) {
        match self {
            Self::Validate => (12, 200),
            Self::Verify => (6, 250),
            Self::Read => (2, 250),
            Self::Limited | Self::ManyUnits => (2, 500),
            Self::FewUnits => (1, 500),
            Self::Issue | Self::IssueOnce => (2, 1_000),
            Self::Expiring => (1, 1_000),
            Self::Activate | Self::ActivateOnce => (2, 700),
        }
    }
}

/// A call that was made, and what it came to.
#[derive(Debug)]
struct Entry {
    kind: Kind,
    began: Instant,
    ended: Instant,
    gateway: usize,
    good: bool,
    said: String,
    /// What the attempts before the last came to, each with its gateway.
    before: Vec<(usize, String)>,
}

/// What the callers were told, and what follows from it.
#[derive(Debug, Default)]
struct Ledger {
    entries: Vec<Entry>,
    licenses: BTreeMap<String, Option<i64>>,
    /// Licences with a few slots, for which many machines ask.
    slots: Vec<License>,
    activations: BTreeMap<String, BTreeSet<String>>,
    /// When calls of the limited key were let through: some time between these two.
    let_through: Vec<(Instant, Instant)>,
    few_units: Units,
    many_units: Units,
}

/// Units that were granted, and calls for one unit of which nobody knows what came of them.
#[derive(Clone, Copy, Debug, Default)]
struct Units {
    granted: u64,
    unknown: u64,
}

/// A fleet and those who use it.
struct Scene {
    fleet: LocalFleet,
    balancer: Balancer,
    receiver: Receiver,
    owner: Account,
    poor: Account,
    product: Product,
    license: License,
    limited_key: String,
    ledger: Mutex<Ledger>,
    asked: AtomicUsize,
    over: AtomicBool,
    began: Instant,
}

/// A time at which something was wrong: until 5 seconds after it had begun to be right again.
#[derive(Clone, Debug)]
struct Trouble {
    what: String,
    began: Instant,
    ended: Instant,
    well: BTreeMap<(Kind, usize), Duration>,
}

impl Trouble {
    fn touches(&self, entry: &Entry) -> bool {
        entry.ended >= self.began && entry.began <= self.ended + RECOVERY
    }
}

impl Scene {
    async fn set() -> Option<Arc<Self>> {
        let fleet = LocalFleet::up(&[
            ("PAPERKEY__LIMITS", LIMITS),
            ("PAPERKEY__TIERS", "{ free = { requests_per_minute = 1000000 } }"),
            ("PAPERKEY__TELEMETRY__LOG", "json"),
            ("PAPERKEY__WEBHOOKS__ALLOW_HTTP", "true"),
            ("PAPERKEY__WEBHOOKS__ALLOW_PRIVATE_NETWORKS", "true"),
            ("PAPERKEY__WEBHOOKS__RETRY_SCHEDULE_S", "[0, 1, 1, 1, 2, 2, 2, 5, 5, 5]"),
        ])
        .await?;
        let (receiver, api) = (Receiver::start().await, fleet.api(0));
        let (owner, poor) = (Account::register(&api).await, Account::register(&api).await);
        let system = api.with_key(fleet.does("run", &["admin", "system-key"]).await.trim());
        for (account, units) in [(&owner, MANY_UNITS), (&poor, FEW_UNITS)] {
            let limits = format!("/api/v1/teams/{}/limits", account.team_id);
            system.call(Method::PUT, &limits, Some(json!({"quotas": {"renders": units}}))).await.gives(200);
        }
        let product = owner.create_product("App").await;
        owner.subscribe(&product, receiver.url()).await;
        let license = owner.issue(&product, json!({})).await;
        let limited_key = owner.create_key(json!({"name": "Small", "requestsPerMinute": LIMIT})).await.token;
        let mut ledger = Ledger::default();
        for _ in 0..10 {
            let license = owner.issue(&product, json!({"maxActivations": SLOTS})).await;
            ledger.licenses.insert(license.id.clone(), None);
            ledger.slots.push(license);
        }
        Some(Arc::new(Self {
            balancer: Balancer::before(&fleet.gateways()),
            fleet,
            receiver,
            owner,
            poor,
            product,
            license,
            limited_key,
            ledger: Mutex::new(ledger),
            asked: AtomicUsize::new(0),
            over: AtomicBool::new(false),
            began: Instant::now(),
        }))
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next call of a kind.
    fn next(&self, kind: Kind) -> Call {
        let asked = self.asked.fetch_add(1, Ordering::Relaxed);
        let owner = self.owner.token.clone();
        let post = |token: &str, path: &str, json: Value| Call {
            verb: Method::POST,
            path: path.to_owned(),
            token: token.to_owned(),
            json: Some(json),
            idempotency_key: None,
            reads: false,
        };
        let get = |token: &str, path: &str| Call {
            verb: Method::GET,
            json: None,
            reads: true,
            ..post(token, path, Value::Null)
        };
        let once = |call: Call| Call { idempotency_key: Some(format!("call-{asked}")), ..call };
        let issue = |with: Value| {
            let mut json = json!({"productId": self.product.id, "metadata": {"call": asked}});
            json.as_object_mut().expect("it is one").extend(with.as_object().cloned().unwrap_or_default());
            post(&owner, "/licenses", json)
        };
        let activate = || {
            let license = {
                let ledger = self.ledger();
                let asked: usize = ledger.activations.values().map(BTreeSet::len).sum();
                // A few at a time, for which both kinds of clients ask.
                let first = (asked / SLOTS).min(ledger.slots.len() - 1);
                let upto = (first + 2).min(ledger.slots.len());
                ledger.slots[rand::rng().random_range(first..upto)].key.clone()
            };
            let json = json!({"license_key": license, "fingerprint": format!("machine-{asked}"), "name": "Mac"});
            post(&self.product.public_key, "/v1/licenses/activate", json)
        };
        let take = |account: &Account| {
            let json = json!({"key": account.free_key, "meter": "renders", "cost": 1});
            post(&account.live_key, "/v1/keys/verify", json)
        };
        match kind {
            Kind::Validate => {
                let json = json!({"license_key": self.license.key});
                Call { reads: true, ..post(&self.product.public_key, "/v1/licenses/validate", json) }
            }
            Kind::Verify => {
                let json = json!({"key": self.product.secret_key});
                Call { reads: true, ..post(&self.owner.live_key, "/v1/keys/verify", json) }
            }
            Kind::Read => get(&self.owner.token, &format!("/licenses/{}", self.license.id)),
            Kind::Limited => get(&self.limited_key, "/api/v1/me"),
            Kind::FewUnits => take(&self.poor),
            Kind::ManyUnits => take(&self.owner),
            Kind::Issue => issue(json!({"maxActivations": SLOTS})),
            Kind::IssueOnce => once(issue(json!({"maxActivations": SLOTS}))),
            Kind::Expiring => {
                let after_s = rand::rng().random_range(SOON_S);
                once(issue(json!({"expiresAt": rfc3339(Clock::system().now_ms() + after_s * 1_000)})))
            }
            Kind::Activate => activate(),
            Kind::ActivateOnce => once(activate()),
        }
    }

    /// Writes down what a call came to.
    fn note(&self, kind: Kind, call: &Call, outcome: &Outcome) -> bool {
        let last = outcome.last();
        let json = &last.json;
        let mut ledger = self.ledger();
        let good = match (kind, last.status) {
            (Kind::Validate | Kind::Verify, Some(200)) => json["valid"] == true,
            (Kind::Limited, Some(200)) => {
                ledger.let_through.push((outcome.began, outcome.ended));
                true
            }
            (Kind::Read, Some(200)) | (Kind::Limited, Some(429)) => true,
            (Kind::FewUnits | Kind::ManyUnits, Some(200)) => {
                let granted = u64::from(json["valid"] == true);
                ledger.units(kind).granted += granted;
                granted == 1 || (kind == Kind::FewUnits && json["code"] == "quota_exceeded")
            }
            (Kind::Issue | Kind::IssueOnce | Kind::Expiring, Some(201)) => {
                let license = License::of(json);
                let expires_at =
                    (kind == Kind::Expiring).then(|| paperkey_tests::people::time_ms(&text(json, "/expiresAt")));
                ledger.licenses.insert(license.id.clone(), expires_at);
                if kind != Kind::Expiring {
                    ledger.slots.push(license);
                }
                true
            }
            (Kind::Activate | Kind::ActivateOnce, Some(200)) => {
                let key = &call.json.as_ref().expect("it has one")["license_key"];
                let license = ledger.slots.iter().find(|license| *key == license.key.as_str());
                let license_id = license.expect("it is one of ours").id.clone();
                ledger.activations.entry(license_id).or_default().insert(text(json, "/activation/id"));
                true
            }
            (Kind::Activate | Kind::ActivateOnce, Some(_)) => {
                json["error"] == paperkey_proto::error::entry(Reason::ActivationLimitReached).flat_code.as_str()
                    || json["error"]["code"]
                        == paperkey_proto::error::entry(Reason::ActivationLimitReached).typed_code.as_str()
            }
            _ => false,
        };
        if matches!(kind, Kind::FewUnits | Kind::ManyUnits) {
            let lost = outcome.attempts.iter().filter(|attempt| attempt.sent && attempt.status != Some(200)).count();
            ledger.units(kind).unknown += lost as u64;
        }
        let (before, last) = (&outcome.attempts[..outcome.attempts.len() - 1], outcome.last());
        ledger.entries.push(Entry {
            kind,
            began: outcome.began,
            ended: outcome.ended,
            gateway: last.gateway,
            good,
            said: last.said(),
            before: before.iter().map(|attempt| (attempt.gateway, attempt.said())).collect(),
        });
        good
    }

    /// Lets all clients loose.
    fn load(self: &Arc<Self>) -> Vec<JoinHandle<()>> {
        let clients = Kind::ALL.into_iter().flat_map(|kind| {
            let (clients, period_ms) = kind.load();
            (0..clients).map(move |_| (kind, Duration::from_millis(period_ms)))
        });
        let call_again_and_again = |(kind, period): (Kind, Duration)| {
            let scene = Arc::clone(self);
            tokio::spawn(async move {
                let offset = period.mul_f64(rand::rng().random());
                let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + offset, period);
                ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
                while !scene.over.load(Ordering::Relaxed) {
                    ticks.tick().await;
                    let call = scene.next(kind);
                    let outcome = scene.balancer.call(&call).await;
                    scene.note(kind, &call, &outcome);
                }
            })
        };
        clients.map(call_again_and_again).collect()
    }

    /// Ends the load, and waits for what is under way.
    async fn end(&self, clients: Vec<JoinHandle<()>>) {
        self.over.store(true, Ordering::Relaxed);
        for client in clients {
            client.await.expect("a client writes down whatever it is told");
        }
    }

    /// Waits until so many calls were made that began after a moment.
    async fn calls_since(&self, moment: Instant, calls: usize) {
        eventually("calls are made", || async {
            let ledger = self.ledger();
            let since = ledger.entries.iter().rev().take_while(|entry| entry.ended > moment);
            (since.filter(|entry| entry.began > moment).count() >= calls).then_some(())
        })
        .await;
    }

    async fn kill(&self, name: &str) -> Trouble {
        let began = Instant::now();
        self.fleet.does("kill", &[name]).await;
        self.started_again(format!("{name} killed"), name, began).await
    }

    async fn restart(&self, name: &str) -> Trouble {
        let began = Instant::now();
        self.fleet.does("stop", &[name]).await;
        self.started_again(format!("{name} restarted"), name, began).await
    }

    /// Starts what was ended. The fault is over when somebody listens there again; of PostgreSQL, when it has read its log
    /// and lets somebody in.
    async fn started_again(&self, what: String, name: &str, began: Instant) -> Trouble {
        let arguments = [name];
        let start = async {
            self.fleet.does("start", &arguments).await;
            Instant::now()
        };
        let (ended, well) = if name == "postgres" {
            let ended = start.await;
            (ended, self.well_again(ended).await)
        } else {
            let serves = async {
                let ended = self.fleet.listens(name).await;
                (ended, self.well_again(ended).await)
            };
            tokio::join!(serves, start).0
        };
        Trouble { what, began, ended, well }
    }

    async fn pause(&self, name: &str) -> Trouble {
        let began = Instant::now();
        self.fleet.does("pause", &[name]).await;
        // This is no waiting for anything: it is the fault.
        tokio::time::sleep(STANDSTILL).await;
        self.fleet.does("resume", &[name]).await;
        let ended = Instant::now();
        Trouble { what: format!("{name} paused"), began, ended, well: self.well_again(ended).await }
    }

    /// Makes every kind of call at every gateway until it succeeds; when it did, counted from a moment.
    async fn well_again(&self, since: Instant) -> BTreeMap<(Kind, usize), Duration> {
        let each = Kind::ALL.into_iter().flat_map(|kind| (0..self.balancer.len()).map(move |at| (kind, at)));
        let probes = each.map(|(kind, gateway)| async move {
            eventually(&format!("{kind:?} succeeds at gateway {}", gateway + 1), || async {
                let call = self.next(kind);
                let outcome = self.balancer.call_at(gateway, &call, PROBE).await;
                self.note(kind, &call, &outcome).then_some(())
            })
            .await;
            ((kind, gateway), since.elapsed())
        });
        join_all(probes).await.into_iter().collect()
    }
}

impl Ledger {
    fn units(&mut self, kind: Kind) -> &mut Units {
        if kind == Kind::FewUnits { &mut self.few_units } else { &mut self.many_units }
    }
}

// --- what is judged in the end --------------------------------------------------------------------------------------

impl Scene {
    /// Everything that was promised, held against what is there; what is wrong, in sentences.
    async fn judge(&self, troubles: &[Trouble]) -> Vec<String> {
        let mut wrong = Vec::new();
        self.judge_calls(troubles, &mut wrong);
        self.judge_grants(&mut wrong).await;
        self.judge_what_is_stored(&mut wrong).await;
        self.judge_what_was_told(&mut wrong).await;
        wrong
    }

    /// Hardly a call fails while nothing is wrong, and soon after something was, all is well again.
    fn judge_calls(&self, troubles: &[Trouble], wrong: &mut Vec<String>) {
        for trouble in troubles {
            for ((kind, gateway), after) in &trouble.well {
                if *after > RECOVERY {
                    wrong.push(format!(
                        "{}: {kind:?} succeeds at gateway {} after {after:?}",
                        trouble.what,
                        gateway + 1
                    ));
                }
            }
        }
        let ledger = self.ledger();
        let outside = || ledger.entries.iter().filter(|entry| !troubles.iter().any(|trouble| trouble.touches(entry)));
        let (all, failed) = (outside().count(), outside().filter(|entry| !entry.good).count());
        if failed * ERRORS_IN >= all.max(1) {
            wrong.push(format!("{failed} of {all} calls failed while nothing was wrong"));
        }
    }

    /// No window of the limit holds more than the limit, and no quota was overrun.
    async fn judge_grants(&self, wrong: &mut Vec<String>) {
        let (mut let_through, few, many) = {
            let ledger = self.ledger();
            (ledger.let_through.clone(), ledger.few_units, ledger.many_units)
        };
        let_through.sort_unstable();
        for (began, _) in &let_through {
            // Only what lies wholly within the window was counted within it for certain.
            let within = let_through.iter().filter(|(from, to)| from >= began && *to < *began + WINDOW);
            let count = within.count();
            if count > LIMIT {
                let at = began.duration_since(self.began);
                wrong.push(format!("{count} calls were let through within a minute from {at:?}, of {LIMIT}"));
                break;
            }
        }
        for (account, units, limit) in [(&self.poor, few, FEW_UNITS), (&self.owner, many, MANY_UNITS)] {
            let used = used(account).await;
            let possible = units.granted..=units.granted + units.unknown;
            if used > limit || units.granted > limit || !possible.contains(&used) {
                wrong.push(format!("{used} units are counted, of {limit}: {units:?}"));
            }
        }
    }

    /// Whatever was answered is there, none of it twice, and no licence has more machines than it may.
    async fn judge_what_is_stored(&self, wrong: &mut Vec<String>) {
        let stored = self.stored().await;
        let (licenses, activations) = {
            let ledger = self.ledger();
            (ledger.licenses.clone(), ledger.activations.clone())
        };
        for (id, expires_at) in &licenses {
            match stored.get(id) {
                None => wrong.push(format!("{id} is lost")),
                Some(license) if expires_at.is_some() && license["status"] != "expired" => {
                    wrong.push(format!("{id} has not expired: {license}"));
                }
                Some(_) => {}
            }
        }
        let mut made: BTreeMap<String, usize> = BTreeMap::new();
        for license in stored.values() {
            *made.entry(license["metadata"]["call"].to_string()).or_default() += 1;
        }
        for (call, times) in made {
            if times > 1 && call != "null" {
                wrong.push(format!("call {call} has made {times} licences"));
            }
        }
        let bound =
            stored.values().filter(|license| license["activationsCount"].as_u64().is_some_and(|count| count > 0));
        let read = bound.map(|license| async { self.activations(license).await });
        let there: BTreeMap<String, BTreeSet<String>> = stream::iter(read).buffer_unordered(8).collect().await;
        for (license, there) in &there {
            if there.len() > SLOTS {
                wrong.push(format!("{license} has {} machines, of {SLOTS}", there.len()));
            }
        }
        for (license, answered) in activations {
            let lost: Vec<_> =
                answered.iter().filter(|id| there.get(&license).is_none_or(|it| !it.contains(*id))).collect();
            if !lost.is_empty() {
                wrong.push(format!("{license} has lost {lost:?}"));
            }
        }
    }

    /// Every licence of the product, by its id.
    async fn stored(&self) -> BTreeMap<String, Value> {
        let first = format!("/licenses?productId={}&pageSize=100", self.product.id);
        let (mut path, mut stored) = (first.clone(), BTreeMap::new());
        loop {
            let page = self.owner.get(&path).await;
            let page = page.gives(200);
            for license in page["licenses"].as_array().into_iter().flatten() {
                stored.insert(text(license, "/id"), license.clone());
            }
            let Some(token) = page["nextPageToken"].as_str() else { return stored };
            path = format!("{first}&pageToken={token}");
        }
    }

    async fn activations(&self, license: &Value) -> (String, BTreeSet<String>) {
        let id = text(license, "/id");
        let answer = self.owner.get(&format!("/licenses/{id}")).await;
        let activations = answer.gives(200)["activations"].as_array().cloned().unwrap_or_default();
        (id, activations.iter().map(|activation| text(activation, "/id")).collect())
    }

    /// Every change that was answered is told, as one event and one delivery; and so is every expiry.
    async fn judge_what_was_told(&self, wrong: &mut Vec<String>) {
        let expected: BTreeSet<(String, String)> = {
            let ledger = self.ledger();
            let told = |event: &str, id: &String| (event.to_owned(), id.clone());
            let created = ledger.licenses.keys().map(|id| told("license.created", id));
            let expired = ledger.licenses.iter().filter(|(_, at)| at.is_some());
            let expired = expired.map(|(id, _)| told("license.expired", id));
            let activated = ledger.activations.values().flatten().map(|id| told("activation.created", id));
            created.chain(expired).chain(activated).collect()
        };
        let subject = |delivery: &paperkey_tests::receiver::Delivery| {
            (delivery.event().to_owned(), delivery.json["data"]["id"].as_str().unwrap_or_default().to_owned())
        };
        let all = tokio::time::timeout(
            Duration::from_secs(50),
            self.receiver.wait("every event of what was answered", |arrived| {
                (arrived.len() >= expected.len()).then_some(())?;
                let told: BTreeSet<_> = arrived.iter().map(subject).collect();
                told.is_superset(&expected).then_some(())
            }),
        );
        let complete = all.await.is_ok();
        let mut events: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
        let mut deliveries: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for delivery in self.receiver.deliveries() {
            events.entry(subject(&delivery)).or_default().insert(delivery.event_id().to_owned());
            let id = delivery.event_id().to_owned();
            deliveries.entry(id).or_default().insert(delivery.header("webhook-id").to_owned());
        }
        if !complete {
            let missing: Vec<_> = expected.iter().filter(|subject| !events.contains_key(*subject)).collect();
            wrong.push(format!(
                "{} events were not told: {:?}",
                missing.len(),
                missing.iter().take(20).collect::<Vec<_>>()
            ));
        }
        for (subject, ids) in events.iter().filter(|(_, ids)| ids.len() > 1) {
            wrong.push(format!("{subject:?} was told as {} events", ids.len()));
        }
        for (event, ids) in deliveries.iter().filter(|(_, ids)| ids.len() > 1) {
            wrong.push(format!("{event} went out as {} deliveries", ids.len()));
        }
    }

    /// What happened, in two tables: how each trouble went, and what calls came to that did not go well at once.
    fn tables(&self, troubles: &[Trouble]) -> String {
        let ledger = self.ledger();
        let since = |moment: Instant| moment.duration_since(self.began).as_secs_f64();
        let mut text = format!(
            "{:<22} {:>7} {:>7} {:>6} {:>6} {:>9}  last to be well\n",
            "trouble", "began", "ended", "calls", "failed", "well"
        );
        let mut row =
            |what: &str, began: f64, ended: f64, entries: &[&Entry], well: Option<((Kind, usize), Duration)>| {
                let failed = entries.iter().filter(|entry| !entry.good).count();
                let (last, after) = well.map_or_else(Default::default, |((kind, gateway), after)| {
                    (format!("{kind:?} at gateway {}", gateway + 1), format!("{:.2} s", after.as_secs_f64()))
                });
                // Writing to a String cannot fail.
                let _ = writeln!(
                    text,
                    "{what:<22} {began:>7.1} {ended:>7.1} {:>6} {failed:>6} {after:>9}  {last}",
                    entries.len()
                );
            };
        for trouble in troubles {
            let entries: Vec<_> = ledger.entries.iter().filter(|entry| trouble.touches(entry)).collect();
            let last = trouble.well.iter().max_by_key(|(_, after)| **after).map(|(key, after)| (*key, *after));
            row(&trouble.what, since(trouble.began), since(trouble.ended), &entries, last);
        }
        let outside: Vec<_> =
            ledger.entries.iter().filter(|entry| !troubles.iter().any(|trouble| trouble.touches(entry))).collect();
        row("none", 0.0, since(Instant::now()), &outside, None);

        let mut counts: BTreeMap<(String, String), usize> = BTreeMap::new();
        let during = |entry: &Entry| {
            troubles
                .iter()
                .find(|trouble| trouble.touches(entry))
                .map_or("none", |trouble| trouble.what.as_str())
                .to_owned()
        };
        for entry in &ledger.entries {
            let mut count = |gateway: usize, said: &str, how: &str| {
                let what = format!("{how} {:?} at gateway {}: {said}", entry.kind, gateway + 1);
                *counts.entry((during(entry), what)).or_default() += 1;
            };
            for (gateway, said) in &entry.before {
                count(*gateway, said, "repeated");
            }
            if !entry.good {
                count(entry.gateway, &entry.said, "failed  ");
            }
        }
        for ((trouble, what), count) in counts {
            let _ = writeln!(text, "{trouble:<22} {count:>5} × {what}");
        }
        for entry in outside.iter().filter(|entry| !entry.good).take(50) {
            let took = entry.ended.duration_since(entry.began);
            let _ = writeln!(
                text,
                "at {:.2} s, for {took:?}: {:?} at gateway {}: {} ({:?})",
                since(entry.began),
                entry.kind,
                entry.gateway + 1,
                entry.said,
                entry.before
            );
        }
        text
    }

    /// Fails with both tables where anything is wrong; they are kept in any case.
    async fn all_was_well(&self, name: &str, troubles: &[Trouble]) {
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.txt"));
        let keep = |wrong: &[String]| {
            let text = format!("{}\n{}", self.tables(troubles), wrong.join("\n"));
            fs::write(&kept, &text).expect("the build has a folder for this");
            text
        };
        keep(&[]);
        let wrong = self.judge(troubles).await;
        let text = keep(&wrong);
        assert!(wrong.is_empty(), "{text}\n{}", wrong.iter().take(50).cloned().collect::<Vec<_>>().join("\n"));
    }
}

async fn used(account: &Account) -> u64 {
    let answer = account.get(&format!("/teams/{}/usage", account.team_id)).await;
    let meters = answer.gives(200)["meters"].as_array().cloned().unwrap_or_default();
    let renders = meters.iter().find(|meter| meter["meter"] == "renders");
    renders.and_then(|renders| renders["used"].as_u64()).expect("every configured meter is listed")
}

// --- the tests --------------------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn whatever_fails_nothing_is_lost_or_overrun_and_all_is_well_again_within_seconds() {
    let Some(scene) = Scene::set().await else { return };
    let clients = scene.load();
    scene.calls_since(scene.began, BETWEEN_FAULTS).await;
    let mut troubles = Vec::new();
    // For whoever looks for the cause of one: PAPERKEY_TEST_FAULTS='kill redis,pause auth-1' are all that happen.
    let only = std::env::var("PAPERKEY_TEST_FAULTS").unwrap_or_default();
    for how in ["kill", "pause", "restart"] {
        for name in scene.fleet.names() {
            if !only.is_empty() && !only.split(',').any(|it| it == format!("{how} {name}")) {
                continue;
            }
            let trouble = match how {
                "kill" => scene.kill(&name).await,
                "pause" => scene.pause(&name).await,
                _ => scene.restart(&name).await,
            };
            scene.calls_since(trouble.ended + RECOVERY, BETWEEN_FAULTS).await;
            troubles.push(trouble);
        }
    }
    scene.end(clients).await;
    let expired = Clock::system().now_ms() + SOON_S.end * 1_000;
    let last = scene.ledger().licenses.values().flatten().max().copied().unwrap_or_default();
    assert!(last <= expired, "licences expire soon");
    eventually("the last licence has expired", || async { (Clock::system().now_ms() > last).then_some(()) }).await;
    scene.all_was_well("faults", &troubles).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_of_everything_fails_no_call() {
    let Some(scene) = Scene::set().await else { return };
    let clients = scene.load();
    scene.calls_since(scene.began, BETWEEN_FAULTS).await;
    scene.fleet.does("restart", &["all"]).await;
    scene.calls_since(Instant::now(), BETWEEN_FAULTS).await;
    scene.end(clients).await;
    let last = scene.ledger().licenses.values().flatten().max().copied().unwrap_or_default();
    eventually("the last licence has expired", || async { (Clock::system().now_ms() > last).then_some(()) }).await;
    scene.all_was_well("rolling-restart", &[]).await;
    let tables = scene.tables(&[]);
    let failed = scene.ledger().entries.iter().filter(|entry| !entry.good).count();
    assert_eq!(failed, 0, "{tables}");
}

/// What two gateways think of a key and of a licence that are revoked.
async fn revocations_are_felt(scene: &Scene, gateways: &[Api; 2]) {
    for round in 0..6 {
        let owner = scene.owner.at(&gateways[round % 2]);
        let key = owner.create_key(json!({"name": "Short"})).await;
        let license = owner.issue(&scene.product, json!({})).await;
        let apps = gateways.clone().map(|gateway| App(gateway.with_key(&scene.product.public_key)));
        let keys = gateways.clone().map(|gateway| gateway.with_key(&key.token));
        for (app, key) in apps.iter().zip(&keys) {
            for _ in 0..3 {
                key.get("/api/v1/products").await.gives(200);
            }
            assert_eq!(app.verdict(&license).await, "valid");
        }
        owner.revoke_key(&key).await;
        let key_felt = Instant::now() + PROMISED;
        owner.revoke(&license).await.gives(200);
        let license_felt = Instant::now() + PROMISED;
        let refused = gateways.iter().enumerate().map(|(at, _)| {
            let (key, app, license) = (&keys[at], &apps[at], &license);
            async move {
                // Behind each gateway several processes answer, and the last of them counts. Until then everything goes on
                // being asked, since what nobody asks about is not remembered.
                while Instant::now() < license_felt {
                    let asked = Instant::now();
                    let refused = key.get("/api/v1/products").await.status == 401;
                    assert!(refused || asked < key_felt, "a key is good for longer than a second after its revocation");
                    app.verdict(license).await;
                }
                for _ in 0..10 {
                    key.get("/api/v1/products").await.refused(Reason::InvalidCredentials);
                    assert_eq!(app.verdict(license).await, "revoked");
                }
            }
        });
        join_all(refused).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revocation_is_felt_at_both_gateways_within_a_second_with_redis_and_without() {
    let Some(scene) = Scene::set().await else { return };
    let clients = scene.load();
    let gateways = [scene.fleet.api(0), scene.fleet.api(1)];
    revocations_are_felt(&scene, &gateways).await;
    scene.fleet.does("kill", &["redis"]).await;
    revocations_are_felt(&scene, &gateways).await;
    scene.fleet.does("start", &["redis"]).await;
    revocations_are_felt(&scene, &gateways).await;
    scene.end(clients).await;
}
