//! `kill -9` at any moment: what was answered is there afterwards, and its event is told.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use paperkey_tests::{Account, Api, Installation, License, Product, Receiver, eventually};
use rand::RngExt as _;
use serde_json::json;
use tokio::sync::mpsc;

/// How often processes are killed.
const KILLS: usize = 20;

/// How many callers there are at a time.
const CALLERS: usize = 6;

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

    /// Everything that was answered must be there, and every event of it told under one id.
    async fn holds(&self, owner: &Account, receiver: &Receiver) {
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
        let mut events: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
        for delivery in receiver.deliveries() {
            let subject = (delivery.event().to_owned(), delivery.json["data"]["id"].to_string());
            events.entry(subject).or_default().insert(delivery.event_id().to_owned());
        }
        for (subject, ids) in events {
            assert_eq!(ids.len(), 1, "{subject:?} is one event, whatever died: {ids:?}");
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
    ledger.holds(&there, &receiver).await;
    receiver.deliveries()[0].is_signed_with(&webhook.secret);
}

#[tokio::test(flavor = "multi_thread")]
async fn services_of_a_fleet_that_are_killed_twenty_times_lose_nothing_that_was_answered() {
    let Some(mut install) = Installation::fleet().await else { return };
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = Arc::new(owner.create_product("App").await);
    owner.subscribe(&product, receiver.url()).await;
    let mut ledger = Ledger::default();
    for _ in 0..KILLS / 2 {
        // Without webhook nothing stops: its callers do not need it, so licensing is killed a moment later.
        install.kill("webhook");
        ledger.until_killed(&owner, &product, async || install.kill("licensing")).await;
        install.start("webhook").await.unwrap();
        install.start("licensing").await.unwrap();
        answers_again(&owner, &product).await;
    }
    ledger.holds(&owner, &receiver).await;
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
