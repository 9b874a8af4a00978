//! `kill -9` at any moment, and at every moment that matters: what was answered is there afterwards, and its event is
//! told, as one delivery.

use std::{
    collections::{BTreeMap, BTreeSet},
    os::unix::process::ExitStatusExt as _,
    sync::Arc,
    time::Duration,
};

use paperkey_kit::fail_point::Point;
use paperkey_tests::{Account, Api, Installation, License, Product, Receiver, Settings, eventually, people::Webhook};
use rand::RngExt as _;
use serde_json::json;
use tokio::sync::mpsc;

/// How often processes are killed.
const KILLS: usize = 20;

/// How many processes in a row end at fail points: everything in one, and of a fleet, where one that has died leaves
/// leases behind that run out before the next goes on.
const ROUNDS: usize = 100;
const ROUNDS_OF_A_FLEET: usize = 44;

/// The signal of `kill -9`.
const SIGKILL: i32 = 9;

/// How many callers there are at a time.
const CALLERS: usize = 6;

/// How long somebody who was refused waits before the next try.
const BETWEEN_TRIES: Duration = Duration::from_millis(20);

/// Something that was answered with success.
#[derive(Debug)]
enum Answered {
    License(License),
    Activation { license_id: String, activation_id: String },
}

/// Issues licences and activates machines until the product stops answering or nobody listens.
async fn stream_of_changes(owner: Account, product: Arc<Product>, said: mpsc::Sender<Answered>) {
    loop {
        let asked = json!({"productId": product.id, "maxActivations": null, "email": "customer@example.com"});
        let Ok(answer) = owner.try_post("/licenses", asked).await else { return };
        if answer.status != 201 {
            return unavailable(answer.status.as_u16());
        }
        let license = License::of(answer.gives(201));
        if said.send(Answered::License(license.clone())).await.is_err() {
            return;
        }
        for machine in 0..2 {
            let asked = json!({"license_key": license.key, "fingerprint": format!("machine-{machine}")});
            let Ok(answer) = owner.app(&product).0.try_post("/v1/licenses/activate", asked).await else { return };
            if answer.status != 200 {
                return unavailable(answer.status.as_u16());
            }
            let activation_id = answer.gives(200)["activation"]["id"].as_str().unwrap().to_owned();
            if said.send(Answered::Activation { license_id: license.id.clone(), activation_id }).await.is_err() {
                return;
            }
        }
    }
}

/// While a service is gone, the gateway says so, and nothing else.
#[track_caller]
fn unavailable(status: u16) {
    assert!(matches!(status, 503 | 504), "a service that is gone is unavailable, not {status}");
}

/// What is known to have been answered.
#[derive(Default)]
struct Ledger {
    licenses: BTreeSet<String>,
    activations: BTreeMap<String, BTreeSet<String>>,
}

impl Ledger {
    fn note(&mut self, answered: Answered) {
        match answered {
            Answered::License(license) => {
                self.licenses.insert(license.id);
            }
            Answered::Activation { license_id, activation_id } => {
                self.activations.entry(license_id).or_default().insert(activation_id);
            }
        }
    }

    /// Lets callers loose until something has ended by itself, which they need not notice.
    async fn until_ended<T>(&mut self, owner: &Account, product: &Arc<Product>, ended: impl Future<Output = T>) -> T {
        let (said, mut heard) = mpsc::channel(1);
        // Whoever is refused tries again: what was started a moment ago may not be reached yet.
        let persistent = |said: mpsc::Sender<Answered>| {
            let (owner, product) = (owner.clone(), Arc::clone(product));
            async move {
                while !said.is_closed() {
                    stream_of_changes(owner.clone(), Arc::clone(&product), said.clone()).await;
                    tokio::time::sleep(BETWEEN_TRIES).await;
                }
            }
        };
        let callers: Vec<_> = (0..CALLERS).map(|_| tokio::spawn(persistent(said.clone()))).collect();
        tokio::pin!(ended);
        let how = loop {
            tokio::select! {
                how = &mut ended => break how,
                Some(answered) = heard.recv() => self.note(answered),
            }
        };
        heard.close();
        while let Some(answered) = heard.recv().await {
            self.note(answered);
        }
        for caller in callers {
            caller.await.expect("a caller is refused in an orderly way");
        }
        how
    }

    /// Lets callers loose, and lets them go on until so many were answered; `kill` ends something under their feet.
    async fn until_killed(&mut self, owner: &Account, product: &Arc<Product>, kill: impl AsyncFnOnce()) {
        let (said, mut heard) = mpsc::channel(1);
        let callers: Vec<_> = (0..CALLERS)
            .map(|_| tokio::spawn(stream_of_changes(owner.clone(), Arc::clone(product), said.clone())))
            .collect();
        drop(said);
        for _ in 0..rand::rng().random_range(5..25) {
            self.note(heard.recv().await.expect("the callers are answered until something is killed"));
        }
        // The callers go on while it dies, and what they are still answered counts.
        let dying = kill();
        let listening = async {
            while let Some(answered) = heard.recv().await {
                self.note(answered);
            }
        };
        tokio::join!(dying, listening);
        for caller in callers {
            caller.await.expect("a caller is refused in an orderly way");
        }
    }

    /// Everything that was answered must be there, and every event of it told: under one id, as one delivery, and with
    /// good signatures, however often it was sent.
    async fn holds(&self, owner: &Account, receiver: &Receiver, webhook: &Webhook) {
        let machines: usize = self.activations.values().map(BTreeSet::len).sum();
        assert!(self.licenses.len() > KILLS && machines > KILLS, "too little was answered to prove anything");
        for id in &self.licenses {
            let answer = owner.get(&format!("/licenses/{id}")).await;
            let there: BTreeSet<String> = answer.gives(200)["activations"]
                .as_array()
                .unwrap()
                .iter()
                .filter_map(|activation| activation["id"].as_str().map(str::to_owned))
                .collect();
            let answered = self.activations.get(id).cloned().unwrap_or_default();
            assert!(there.is_superset(&answered), "{id} has lost activations: {answered:?}, but {there:?}");
            assert_eq!(answer.json["activationsCount"], there.len(), "the count is what is there");
        }
        let activations = self.activations.values().flatten();
        let expected: BTreeSet<(String, String)> = self
            .licenses
            .iter()
            .map(|id| ("license.created".to_owned(), id.clone()))
            .chain(activations.map(|id| ("activation.created".to_owned(), id.clone())))
            .collect();
        receiver
            .wait("every event of what was answered", |arrived| {
                let told: BTreeSet<(String, String)> = arrived
                    .iter()
                    .map(|delivery| {
                        (
                            delivery.event().to_owned(),
                            delivery.json["data"]["id"].as_str().unwrap_or_default().to_owned(),
                        )
                    })
                    .collect();
                told.is_superset(&expected).then_some(())
            })
            .await;
        let mut events: BTreeMap<(String, String), BTreeSet<(String, String)>> = BTreeMap::new();
        let mut deliveries: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for delivery in receiver.deliveries() {
            delivery.is_signed_with(&webhook.secret);
            let subject = (delivery.event().to_owned(), delivery.json["data"]["id"].to_string());
            let (event_id, delivery_id) = (delivery.event_id().to_owned(), delivery.header("webhook-id").to_owned());
            events.entry(subject).or_default().insert((event_id.clone(), delivery_id.clone()));
            deliveries.entry(delivery_id).or_default().insert(event_id);
        }
        for (subject, ids) in events {
            assert_eq!(ids.len(), 1, "{subject:?} is one event and one delivery, whatever died: {ids:?}");
        }
        for (delivery_id, ids) in deliveries {
            assert_eq!(ids.len(), 1, "{delivery_id} brings one event: {ids:?}");
        }
    }
}

/// Whether the product issues licences again.
async fn answers_again(owner: &Account, product: &Product) {
    eventually("licences are issued again", || async {
        let asked = json!({"productId": product.id});
        let answer = owner.try_post("/licenses", asked).await.ok()?;
        (answer.status == 201).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_that_is_killed_twenty_times_loses_nothing_that_it_answered() {
    let mut install = Installation::all_in_one().await;
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = Arc::new(owner.create_product("App").await);
    let webhook = owner.subscribe(&product, receiver.url()).await;
    let mut ledger = Ledger::default();
    for _ in 0..KILLS {
        let there = owner.at(&install.api());
        ledger.until_killed(&there, &product, async || install.kill("serve")).await;
        install.start("serve").await.unwrap();
    }
    let there = owner.at(&install.api());
    ledger.holds(&there, &receiver, &webhook).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_of_a_fleet_that_are_killed_twenty_times_lose_nothing_that_was_answered() {
    let Some(mut install) = Installation::fleet().await else { return };
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = Arc::new(owner.create_product("App").await);
    let webhook = owner.subscribe(&product, receiver.url()).await;
    let mut ledger = Ledger::default();
    for _ in 0..KILLS / 2 {
        // Without webhook nothing stops: its callers do not need it, so licensing is killed a moment later.
        install.kill("webhook");
        ledger.until_killed(&owner, &product, async || install.kill("licensing")).await;
        install.start("webhook").await.unwrap();
        install.start("licensing").await.unwrap();
        answers_again(&owner, &product).await;
    }
    ledger.holds(&owner, &receiver, &webhook).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_goes_on_when_each_of_its_processes_was_killed_in_turn() {
    let Some(mut install) = Installation::fleet().await else { return };
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    for name in install.names() {
        install.kill(&name);
        if name != "gateway" {
            // Whatever is gone, the gateway answers, and within its own limit of time.
            let answer = owner.post("/licenses", json!({"productId": product.id})).await;
            assert!(matches!(answer.status.as_u16(), 201 | 503 | 504), "without {name}: {}", answer.text());
        }
        install.start(&name).await.unwrap();
        let there: Api = install.api();
        answers_again(&owner.at(&there), &product).await;
    }
}

/// The points of so many rounds: every point, and then every point a reaching later.
fn armed(rounds: usize) -> impl Iterator<Item = (Point, String)> {
    let reachings = (1..).flat_map(|nth| Point::ALL.map(|point| (point, point.at(nth))));
    reachings.take(rounds)
}

/// The process of a fleet that comes to a point.
fn who_reaches(point: Point) -> &'static str {
    match point {
        Point::OutboxBeforeCommit
        | Point::OutboxAfterCommit
        | Point::RelayBeforeDelivery
        | Point::RelayAfterDelivery => "licensing",
        Point::FanOutBeforeCommit
        | Point::FanOutAfterCommit
        | Point::ClaimAfterCommit
        | Point::PostBefore
        | Point::PostAfter
        | Point::OutcomeBeforeCommit
        | Point::OutcomeAfterCommit => "webhook",
        _ => unreachable!("{point:?} is no point of an event"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_that_dies_a_hundred_times_where_it_matters_tells_each_event_as_one_delivery() {
    let mut install = Installation::all_in_one().await;
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = Arc::new(owner.create_product("App").await);
    let webhook = owner.subscribe(&product, receiver.url()).await;
    let mut ledger = Ledger::default();
    install.kill("serve");
    for (_, point) in armed(ROUNDS) {
        let ready = install.start_armed("serve", &point).await;
        let there = owner.at(&install.api());
        let how = if ready {
            ledger.until_ended(&there, &product, install.ended("serve")).await
        } else {
            install.ended("serve").await
        };
        assert_eq!(how.signal(), Some(SIGKILL), "at {point}: {how}");
    }
    install.start("serve").await.unwrap();
    ledger.holds(&owner.at(&install.api()), &receiver, &webhook).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn services_of_a_fleet_that_die_where_it_matters_tell_each_event_as_one_delivery() {
    // Claims of a process that is no more run out by themselves; how soon depends on how long an exchange may take.
    let environment = vec![("PAPERKEY__WEBHOOKS__TIMEOUT_MS", "1000".to_owned())];
    let settings = Settings { environment, ..Settings::default() };
    let Some(mut install) = Installation::fleet_with(settings).await else { return };
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = Arc::new(owner.create_product("App").await);
    let webhook = owner.subscribe(&product, receiver.url()).await;
    let mut ledger = Ledger::default();
    for (point, name) in armed(ROUNDS_OF_A_FLEET) {
        let process = who_reaches(point);
        install.kill(process);
        let ready = install.start_armed(process, &name).await;
        let how = if ready {
            ledger.until_ended(&owner, &product, install.ended(process)).await
        } else {
            install.ended(process).await
        };
        assert_eq!(how.signal(), Some(SIGKILL), "{process} at {name}: {how}");
        install.start(process).await.unwrap();
    }
    answers_again(&owner, &product).await;
    ledger.holds(&owner, &receiver, &webhook).await;
}
