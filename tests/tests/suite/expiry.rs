//! Licences that expire while nobody is there to see it.

use std::collections::BTreeMap;

use paperkey_kit::{clock::Clock, values::rfc3339};
use paperkey_tests::{Account, Installation, License, Product, Receiver, eventually};
use serde_json::json;

/// Licences that expire while everything is stopped.
const LICENSES: usize = 250;

/// How long they last: long enough to issue them all.
const LASTS_MS: i64 = 8_000;

struct Scene {
    owner: Account,
    product: Product,
    receiver: Receiver,
    licenses: Vec<License>,
    expires_at_ms: i64,
}

impl Scene {
    async fn of(install: &Installation) -> Self {
        let receiver = Receiver::start().await;
        let owner = install.register().await;
        let product = owner.create_product("App").await;
        owner.subscribe(&product, receiver.url()).await;
        let expires_at_ms = Clock::system().now_ms() + LASTS_MS;
        let license = json!({"productId": product.id, "expiresAt": rfc3339(expires_at_ms)});
        let made = owner.post("/licenses/batch", json!({"licenses": vec![license; LICENSES]})).await;
        let licenses = made.gives(201)["licenses"].as_array().unwrap().iter().map(License::of).collect();
        Self { owner, product, receiver, licenses, expires_at_ms }
    }

    async fn all_have_expired(&self) {
        assert!(Clock::system().now_ms() < self.expires_at_ms, "what was to expire later has expired before");
        eventually("they have expired", || async { (Clock::system().now_ms() > self.expires_at_ms).then_some(()) })
            .await;
    }

    /// Each expiry is told, and none twice: not before another one was told that came after all of them.
    async fn each_is_told_once(&self, owner: &Account) {
        let expired = |at_least: usize| {
            move |arrived: &[paperkey_tests::receiver::Delivery]| {
                let mut told: BTreeMap<String, Vec<String>> = BTreeMap::new();
                for delivery in arrived.iter().filter(|delivery| delivery.event() == "license.expired") {
                    let id = delivery.json["data"]["id"].as_str().unwrap_or_default().to_owned();
                    told.entry(id).or_default().push(delivery.event_id().to_owned());
                }
                (told.len() >= at_least).then_some(told)
            }
        };
        self.receiver.wait("every expiry", expired(LICENSES)).await;
        let soon = json!({"expiresAt": rfc3339(Clock::system().now_ms() + 1_000)});
        let last = owner.issue(&self.product, soon).await;
        let told = self.receiver.wait("the last expiry", expired(LICENSES + 1)).await;
        assert!(told.contains_key(&last.id));
        for license in &self.licenses {
            assert_eq!(told.get(&license.id).map(Vec::len), Some(1), "{}: {:?}", license.id, told.get(&license.id));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_expires_while_the_one_process_is_dead_is_told_once_when_it_is_back() {
    let mut install = Installation::all_in_one().await;
    let scene = Scene::of(&install).await;
    install.kill("serve");
    scene.all_have_expired().await;
    install.start("serve").await.unwrap();
    scene.each_is_told_once(&scene.owner.at(&install.api())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_expires_while_two_licensing_processes_are_dead_is_told_once_when_they_are_back() {
    let Some(mut install) = Installation::fleet_with_two_licensings().await else { return };
    let scene = Scene::of(&install).await;
    for name in ["licensing", "licensing-2"] {
        install.kill(name);
    }
    scene.all_have_expired().await;
    for name in ["licensing", "licensing-2"] {
        install.start(name).await.unwrap();
    }
    eventually("licences are issued again", || async {
        let answer = scene.owner.try_post("/licenses", json!({"productId": scene.product.id})).await.ok()?;
        (answer.status == 201).then_some(())
    })
    .await;
    scene.each_is_told_once(&scene.owner).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_expires_under_two_licensing_processes_is_told_once_though_one_is_killed() {
    let Some(mut install) = Installation::fleet_with_two_licensings().await else { return };
    let scene = Scene::of(&install).await;
    scene.all_have_expired().await;
    // Whichever of the two is at it.
    install.kill("licensing-2");
    scene.each_is_told_once(&scene.owner).await;
}
