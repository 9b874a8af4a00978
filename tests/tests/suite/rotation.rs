//! The master key is changed while the product runs: nobody notices, nothing is lost, and the old key can go.

use std::{
    collections::BTreeSet,
    fs,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use paperkey_tests::{
    Account, Installation, License, Product, Receiver, eventually,
    people::Webhook,
    process::{Process, Stream},
};
use serde_json::json;
use tokio::task::JoinHandle;

const ROTATE: [&str; 2] = ["admin", "rotate-secrets"];

/// What there is of every kind that is sealed.
struct House {
    owner: Account,
    product: Product,
    licenses: Vec<License>,
    receiver: Receiver,
    webhook: Webhook,
    /// One that is paused, and what it misses.
    held: Webhook,
    held_by: Receiver,
}

impl House {
    async fn new(install: &Installation) -> Self {
        let (receiver, held_by) = (Receiver::start().await, Receiver::start().await);
        let owner = install.register().await;
        let product = owner.create_product("App").await;
        let webhook = owner.subscribe(&product, receiver.url()).await;
        let held = owner.subscribe(&product, held_by.url()).await;
        let path = format!("/products/{}/webhooks/{}", product.id, held.id);
        owner.patch(&path, json!({"status": "paused"})).await.gives(200);
        let mut house = Self { owner, product, licenses: Vec::new(), receiver, webhook, held, held_by };
        for _ in 0..60 {
            house.issue().await;
        }
        house.is_well(install).await;
        house
    }

    async fn issue(&mut self) {
        self.licenses.push(self.owner.issue(&self.product, json!({"email": "customer@example.com"})).await);
    }

    /// Each licence is found by its key and shows it, its event was told and is signed, and the log is whole.
    async fn is_well(&mut self, install: &Installation) {
        self.owner = self.owner.at(&install.api());
        self.issue().await;
        let app = self.owner.app(&self.product);
        for license in &self.licenses {
            assert_eq!(app.verdict(license).await, "valid");
            let shown = self.owner.get(&format!("/licenses/{}", license.id)).await;
            assert_eq!(License::of(shown.gives(200)).key, license.key);
        }
        self.are_told(&self.receiver, &self.webhook, &self.licenses).await;
        eventually("the audit log is whole", || async {
            let verdict = install.command(&["audit", "verify"], "").await;
            verdict.succeeded().starts_with("the audit log is whole").then_some(())
        })
        .await;
    }

    async fn are_told(&self, receiver: &Receiver, webhook: &Webhook, licenses: &[License]) {
        let all: BTreeSet<&str> = licenses.iter().map(|license| license.id.as_str()).collect();
        let told = receiver
            .wait("every licence", |arrived| {
                let told: BTreeSet<&str> =
                    arrived.iter().filter_map(|delivery| delivery.json["data"]["id"].as_str()).collect();
                all.is_subset(&told).then(|| arrived.to_vec())
            })
            .await;
        for delivery in told {
            delivery.is_signed_with(&webhook.secret);
        }
    }

    /// What was sealed long ago is sent when it may be.
    async fn resumes(&self) {
        assert!(self.held_by.deliveries().is_empty());
        let path = format!("/products/{}/webhooks/{}", self.product.id, self.held.id);
        self.owner.patch(&path, json!({"status": "active"})).await.gives(200);
        self.are_told(&self.held_by, &self.held, &self.licenses).await;
    }

    /// Issues and validates licences until told to end, none of which may fail. Gives back what was issued.
    fn is_busy(&self, until: &Arc<AtomicBool>) -> JoinHandle<Vec<License>> {
        let (owner, product, known) = (self.owner.clone(), self.product.clone(), self.licenses.clone());
        let until = Arc::clone(until);
        tokio::spawn(async move {
            let app = owner.app(&product);
            let mut issued = Vec::new();
            for license in known.iter().cycle() {
                if until.load(Ordering::SeqCst) {
                    break;
                }
                assert_eq!(app.verdict(license).await, "valid");
                let new = owner.issue(&product, json!({})).await;
                assert_eq!(app.verdict(&new).await, "valid");
                issued.push(new);
            }
            issued
        })
    }
}

/// The keys under which something is sealed, as the status tells.
async fn in_use(install: &Installation) -> BTreeSet<String> {
    let status = install.command(&[&ROTATE[..], &["--status"]].concat(), "").await;
    let lines = status.succeeded().lines().skip(1);
    lines.map(|line| line.split_whitespace().next().unwrap_or_default().to_owned()).collect()
}

/// Starts a change of the key, and kills it when it has said that.
async fn killed_after(install: &Installation, says: &str) {
    let mut command = Process::start("rotate-secrets", install.prepared(&ROTATE));
    command
        .line(|line| (line.stream == Stream::Err && line.text.contains(says)).then_some(()))
        .await
        .unwrap_or_else(|wrote| panic!("it ended before it was killed: {wrote}"));
    command.kill();
}

fn key_files(install: &Installation) -> Vec<String> {
    let folder = fs::read_dir(install.data().join("secrets")).unwrap();
    let names = folder.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name.starts_with("master.") && name != "master.lock").collect();
    names.sort();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_of_the_data_folder_is_changed_under_load_however_often_the_command_is_killed() {
    let mut install = Installation::all_in_one().await;
    let mut house = House::new(&install).await;
    let before = in_use(&install).await;
    assert_eq!(before.len(), 1);

    let ended = Arc::new(AtomicBool::new(false));
    let busy = [house.is_busy(&ended), house.is_busy(&ended)];
    killed_after(&install, "a new master key is made").await;
    killed_after(&install, "the new master key seals").await;
    let mut last = Process::start("rotate-secrets", install.prepared(&ROTATE));
    last.line(|line| line.text.contains("going on with").then_some(())).await.unwrap();
    let second = install.command(&ROTATE, "").await;
    assert!(second.failed().contains("another `paperkey admin rotate-secrets` is at work"), "{second:?}");
    assert!(last.ended().await.success(), "{}", last.text());
    ended.store(true, Ordering::SeqCst);
    for caller in busy {
        let issued = caller.await.unwrap();
        assert!(!issued.is_empty());
        house.licenses.extend(issued);
    }
    assert!(last.text().contains("is the master key; "), "{}", last.text());
    let after = in_use(&install).await;
    assert!(after.len() == 1 && after.is_disjoint(&before), "{before:?} {after:?}");
    house.is_well(&install).await;
    assert_eq!(key_files(&install).len(), 2);

    // What nobody needs any more goes, and the process that runs does not mind.
    let retire = [&ROTATE[..], &["--retire"]].concat();
    let retired = install.command(&retire, "").await;
    assert!(before.iter().all(|key| retired.succeeded().contains(key)), "{retired:?}");
    assert_eq!(key_files(&install), ["master.key"]);
    assert!(install.command(&retire, "").await.succeeded().contains("no key was removed"));
    house.is_well(&install).await;
    install.process("serve").terminate().await;
    install.kill("serve");
    install.start("serve").await.unwrap();
    house.is_well(&install).await;
    house.resumes().await;

    // And once more, while it does not run.
    install.kill("serve");
    install.command(&ROTATE, "").await.succeeded();
    install.command(&retire, "").await.succeeded();
    install.start("serve").await.unwrap();
    assert!(in_use(&install).await.is_disjoint(&after));
    house.is_well(&install).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_the_configuration_gives_is_changed_in_three_steps() {
    let Some(mut install) = Installation::fleet().await else { return };
    let mut house = House::new(&install).await;
    let before = in_use(&install).await;
    assert_eq!(before.len(), 1);
    let old = install.given_keys()[0].clone();
    let said = install.command(&ROTATE, "").await.succeeded().to_owned();
    let new = said.split("'[\"").nth(1).and_then(|rest| rest.split("\"]'").next()).expect("it makes a key").to_owned();
    assert!(said.contains("restart") && !said.contains(&old), "{said}");

    let list = |key: &str| format!("[\"{key}\"]");
    install.set("PAPERKEY__SECRETS__PREVIOUS_MASTER_KEYS", &list(&new));
    restarted_one_by_one(&mut install, &mut house).await;
    install.set("PAPERKEY__SECRETS__MASTER_KEY", &new);
    install.set("PAPERKEY__SECRETS__PREVIOUS_MASTER_KEYS", &list(&old));
    restarted_one_by_one(&mut install, &mut house).await;
    assert_eq!(in_use(&install).await.len(), 2);
    let retire = [&ROTATE[..], &["--retire"]].concat();
    assert!(install.command(&retire, "").await.succeeded().contains("No key may be dropped"));

    let ended = Arc::new(AtomicBool::new(false));
    let busy = house.is_busy(&ended);
    let mut first = Process::start("rotate-secrets", install.prepared(&ROTATE));
    let (one, other) = tokio::join!(install.command(&ROTATE, ""), install.command(&ROTATE, ""));
    // They help each other.
    assert!(first.ended().await.success(), "{}", first.text());
    for done in [one, other] {
        assert!(
            before.iter().all(|key| done.succeeded().contains(&format!("Nothing is sealed under {key}"))),
            "{done:?}"
        );
    }
    ended.store(true, Ordering::SeqCst);
    house.licenses.extend(busy.await.unwrap());
    let after = in_use(&install).await;
    assert!(after.len() == 1 && after.is_disjoint(&before), "{before:?} {after:?}");

    install.set("PAPERKEY__SECRETS__PREVIOUS_MASTER_KEYS", "[]");
    restarted_one_by_one(&mut install, &mut house).await;
    house.resumes().await;

    // Whoever comes with the old key, or with one that is none of the installation's, is not let near the data.
    for (service, named) in [("licensing", "license-key/v1"), ("auth", "audit-chain/v1")] {
        install.kill(service);
        install.set("PAPERKEY__SECRETS__MASTER_KEY", &old);
        let wrote = install.start(service).await.unwrap_err();
        assert!(wrote.contains(named) && wrote.contains("secrets.previous_master_keys"), "{wrote}");
        assert_eq!(wrote.matches("paperkey: ").count(), 1, "{wrote}");
        install.kill(service);
        install.set("PAPERKEY__SECRETS__MASTER_KEY", &new);
        install.start(service).await.unwrap();
    }
    house.is_well(&install).await;
}

/// Processes with the keys of before and of now work with each other.
async fn restarted_one_by_one(install: &mut Installation, house: &mut House) {
    for name in install.names() {
        install.process(&name).terminate().await;
        install.kill(&name);
        install.start(&name).await.unwrap();
        let answers = install.api();
        eventually("the fleet works", || async {
            let health = house.owner.at(&answers).try_post("/licenses", json!({"productId": house.product.id})).await;
            health.is_ok_and(|answer| answer.status == 201).then_some(())
        })
        .await;
        house.owner = house.owner.at(&install.api());
        house.issue().await;
        let license = house.licenses.last().expect("one was issued");
        assert_eq!(house.owner.app(&house.product).verdict(license).await, "valid");
    }
    house.is_well(install).await;
}
