//! Migrations only expand: the release before works on the new schema, beside the new one and after it. Tried with the
//! binary of the commit before, which `scripts/test` builds.

use std::{
    collections::BTreeSet,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use paperkey_kit::{clock::Clock, values::rfc3339};
use paperkey_tests::{
    Account, Installation, License, Product, Receiver, Settings, eventually,
    people::Webhook,
    process::{binary, previous_binary},
    schema::Schema,
};
use rand::seq::SliceRandom as _;
use serde_json::json;
use tokio::task::JoinHandle;

/// Callers at a time, and how long each rests after a call.
const CALLERS: usize = 2;
const REST: Duration = Duration::from_millis(50);

/// How long the licences last that are to expire.
const SOON_MS: i64 = 1_500;

/// A vendor with everything on the main path.
struct House {
    owner: Account,
    product: Product,
    webhook: Webhook,
    receiver: Receiver,
    licenses: Vec<License>,
}

impl House {
    async fn new(install: &Installation) -> Self {
        let receiver = Receiver::start().await;
        let owner = install.register().await;
        let product = owner.create_product("App").await;
        let webhook = owner.subscribe(&product, receiver.url()).await;
        Self { owner, product, webhook, receiver, licenses: Vec::new() }
    }

    /// All of the main path, on what was made before by whichever release, and with something new of each kind.
    async fn works(&mut self, install: &Installation) {
        let someone = install.register().await;
        someone.create_product("Another").await;
        self.owner = self.owner.at(&install.api());
        let owner = &self.owner;
        owner.login(&owner.password).await.gives(200);
        let app = owner.app(&self.product);
        for license in &self.licenses {
            assert_eq!(app.verdict(license).await, "valid");
            app.validate_on(license, "machine").await.gives(200);
            assert_eq!(License::of(owner.get(&format!("/licenses/{}", license.id)).await.gives(200)).key, license.key);
        }
        let license = owner.issue(&self.product, json!({"email": "customer@example.com"})).await;
        app.activate(&license, "machine").await.gives(200);
        assert_eq!(app.verdict(&license).await, "valid");
        let key = owner.create_key(json!({"name": "New"})).await;
        for known in [&owner.live_key, &key.token] {
            let answer = owner.integration().post("/v1/keys/verify", json!({"key": known})).await;
            assert_eq!(answer.gives(200)["code"], "valid");
        }
        owner.revoke_key(&key).await;
        let revoked = owner.issue(&self.product, json!({})).await;
        owner.revoke(&revoked).await.gives(200);
        assert_eq!(app.verdict(&revoked).await, "revoked");
        let soon = json!({"expiresAt": rfc3339(Clock::system().now_ms() + SOON_MS)});
        let expiring = owner.issue(&self.product, soon).await;
        let listed = owner.get(&format!("/licenses?productId={}&pageSize=100", self.product.id)).await;
        assert!(listed.gives(200).to_string().contains(&expiring.id), "{}", listed.text());
        self.is_told("license.created", &license.id).await;
        self.is_told("license.revoked", &revoked.id).await;
        self.is_told("license.expired", &expiring.id).await;
        assert_eq!(app.verdict(&expiring).await, "expired");
        self.licenses.push(license);
        eventually("the audit log is whole", || async {
            let verdict = install.own_command(&["audit", "verify"]).await;
            verdict.succeeded().starts_with("the audit log is whole").then_some(())
        })
        .await;
    }

    async fn is_told(&self, event: &str, id: &str) {
        let delivery = self
            .receiver
            .wait(&format!("{event} of {id}"), |arrived| {
                arrived.iter().find(|one| one.event() == event && one.json["data"]["id"] == id).cloned()
            })
            .await;
        delivery.is_signed_with(&self.webhook.secret);
    }

    /// Issues and validates until told to end. A process that is restarted is not there for a moment; anything else that is
    /// not success is a failure.
    fn is_busy(&self, until: &Arc<AtomicBool>) -> Vec<JoinHandle<BTreeSet<String>>> {
        let caller = || {
            let (owner, product, until) = (self.owner.clone(), self.product.clone(), Arc::clone(until));
            tokio::spawn(async move {
                let app = owner.app(&product);
                let mut issued = BTreeSet::new();
                while !until.load(Ordering::SeqCst) {
                    tokio::time::sleep(REST).await;
                    let Ok(answer) = owner.try_post("/licenses", json!({"productId": product.id})).await else {
                        continue;
                    };
                    if matches!(answer.status.as_u16(), 503 | 504) {
                        continue;
                    }
                    let license = License::of(answer.gives(201));
                    issued.insert(license.id.clone());
                    let asked = json!({"license_key": license.key});
                    let Ok(answer) = app.0.try_post("/v1/licenses/validate", asked).await else { continue };
                    if !matches!(answer.status.as_u16(), 503 | 504) {
                        assert_eq!(answer.gives(200)["code"], "valid");
                    }
                }
                issued
            })
        };
        (0..CALLERS).map(|_| caller()).collect()
    }

    /// What was answered is there, and told.
    async fn holds(&self, issued: &BTreeSet<String>) {
        assert!(!issued.is_empty());
        for id in issued {
            self.owner.get(&format!("/licenses/{id}")).await.gives(200);
            self.is_told("license.created", id).await;
        }
    }
}

/// Restarts every process by another binary, one after the other, in any order, under a light load.
async fn roll(install: &mut Installation, house: &mut House, binary: Option<&Path>) {
    let until = Arc::new(AtomicBool::new(false));
    let callers = house.is_busy(&until);
    let mut names = install.names();
    names.shuffle(&mut rand::rng());
    install.start_by(binary);
    for name in &names {
        install.process(name).terminate().await;
        install.kill(name);
        install.start(name).await.unwrap_or_else(|wrote| panic!("{name} in {names:?} did not start:\n{wrote}"));
        let there = house.owner.at(&install.api());
        eventually("licences are issued", || async {
            let answer = there.try_post("/licenses", json!({"productId": house.product.id})).await.ok()?;
            (answer.status == 201).then_some(())
        })
        .await;
    }
    until.store(true, Ordering::SeqCst);
    let mut issued = BTreeSet::new();
    for caller in callers {
        issued.extend(caller.await.unwrap_or_else(|_| panic!("a call failed while {names:?} were restarted")));
    }
    house.works(install).await;
    house.holds(&issued).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_is_upgraded_process_by_process_and_back() {
    let Some(previous) = previous_binary() else { return };
    // The schema is the new one from the beginning; the processes are not.
    let settings = Settings { binary: Some(previous.clone()), ..Settings::default() };
    let Some(mut install) = Installation::fleet_with(settings).await else { return };
    let mut house = House::new(&install).await;
    house.works(&install).await;
    roll(&mut install, &mut house, None).await;
    roll(&mut install, &mut house, Some(&previous)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_is_upgraded_on_its_own_files_and_back() {
    let Some(previous) = previous_binary() else { return };
    let settings = Settings { binary: Some(previous.clone()), ..Settings::default() };
    let mut install = Installation::all_in_one_with(settings).await;
    let mut house = House::new(&install).await;
    house.works(&install).await;
    for binary in [None, Some(previous.as_path()), None] {
        install.start_by(binary);
        install.process("serve").terminate().await;
        install.kill("serve");
        let started = install.start("serve").await;
        if let (Err(wrote), Some(_)) = (&started, binary) {
            // A release from before newer schemas were let pass says which migration it does not know, and changes nothing:
            // the one after it goes on. Its own way back is a copy of the folder from before the upgrade.
            assert!(wrote.contains("is missing, this migration has been applied"), "{wrote}");
            install.kill("serve");
            install.start_by(None);
            install.start("serve").await.unwrap();
        } else {
            started.unwrap();
        }
        house.works(&install).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schema_of_a_later_release_is_served_and_left_as_it_is() {
    let mut install = Installation::all_in_one().await;
    let mut house = House::new(&install).await;
    install.process("serve").terminate().await;
    install.kill("serve");
    {
        let webhook = rusqlite::Connection::open(install.data().join("webhook.db")).unwrap();
        webhook.execute("INSERT INTO seaql_migrations VALUES ('webhook_9999_later', 0)", []).unwrap();
    }
    let said = install.command(&["migrate", "up"], "").await;
    assert!(said.succeeded().contains("webhook: newer than this release"), "{said:?}");
    let said = install.command(&["migrate", "status"], "").await;
    assert!(said.succeeded().contains("webhook_9999_later applied by a newer release"), "{said:?}");
    let refused = install.command(&["migrate", "down", "webhook"], "").await;
    assert!(refused.failed().contains("take that back with the release that made it"), "{refused:?}");
    install.start("serve").await.unwrap();
    house.works(&install).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_new_schema_has_all_that_the_release_before_goes_by() {
    let Some(previous) = previous_binary() else { return };
    let (before, after) = (Schema::on_sqlite(&previous).await, Schema::on_sqlite(&binary()).await);
    assert!(before.0.len() > 20, "{:?}", before.0.keys());
    assert_eq!(before.broken_by(&after), Vec::<String>::new(), "on SQLite");
    let Some(before) = Schema::on_postgres(&previous).await else { return };
    let after = Schema::on_postgres(&binary()).await.expect("there was one a moment ago");
    assert!(before.0.len() > 20, "{:?}", before.0.keys());
    assert_eq!(before.broken_by(&after), Vec::<String>::new(), "on PostgreSQL");
}
