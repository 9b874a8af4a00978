//! Many at once: limits and uniqueness hold however many processes answer.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{Account, Api, Installation, Receiver, on_both_kinds, people::new_email};
use serde_json::json;

on_both_kinds! {
    one_email_is_one_account_however_many_ask_at_once,
    revoking_and_reinstating_at_once_ends_in_one_state_with_its_events,
    the_same_machine_takes_one_slot_however_often_it_asks_at_once,
    a_product_has_ten_pairs_however_many_are_asked_for_at_once,
}

/// 100 machines at once, through several gateways, on a licence of three.
async fn three_of_a_hundred(owner: &Account, gateways: &[Api]) {
    let product = owner.create_product("App").await;
    let license = owner.issue(&product, json!({"maxActivations": 3})).await;
    let apps: Vec<_> = gateways.iter().map(|gateway| owner.at(gateway).app(&product)).collect();
    let answers = join_all((0..100).map(|number| {
        let (app, license) = (apps[number % apps.len()].clone(), license.clone());
        tokio::spawn(async move { app.activate(&license, &format!("machine-{number}")).await })
    }))
    .await;
    let mut activated = BTreeSet::new();
    for answer in answers.into_iter().map(Result::unwrap) {
        if answer.status == 200 {
            activated.insert(answer.gives(200)["activation"]["fingerprint"].to_string());
        } else {
            answer.refused(Reason::ActivationLimitReached);
        }
    }
    assert_eq!(activated.len(), 3, "{activated:?}");
    let seen = owner.get(&format!("/licenses/{}", license.id)).await;
    assert_eq!(seen.gives(200)["activationsCount"], 3);
    let listed: BTreeSet<String> =
        seen.json["activations"].as_array().unwrap().iter().map(|a| a["fingerprint"].to_string()).collect();
    assert_eq!(listed, activated, "those who were told so are those who are activated");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_machines_get_three_slots_in_one_process() {
    let install = Installation::all_in_one().await;
    let owner = install.register().await;
    for _ in 0..3 {
        three_of_a_hundred(&owner, &[install.api()]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_machines_get_three_slots_in_two_licensing_processes() {
    let Some(install) = Installation::fleet_with_two_licensings().await else { return };
    let owner = install.register().await;
    for _ in 0..3 {
        three_of_a_hundred(&owner, &[install.api(), install.second_api()]).await;
    }
}

async fn one_email_is_one_account_however_many_ask_at_once(install: Installation) {
    let (api, email) = (install.api(), new_email());
    let answers = join_all((0..50).map(|number| {
        // Case makes no difference.
        let email = if number % 2 == 0 { email.clone() } else { email.to_uppercase() };
        let api = api.clone();
        tokio::spawn(
            async move { api.post("/auth/register", json!({"email": email, "password": "correct horse"})).await },
        )
    }))
    .await;
    let mut created = 0;
    for answer in answers.into_iter().map(Result::unwrap) {
        if answer.status == 201 {
            created += 1;
        } else {
            answer.refused(Reason::Conflict);
        }
    }
    assert_eq!(created, 1);
    api.post("/auth/login", json!({"email": email, "password": "correct horse"})).await.gives(200);
}

async fn revoking_and_reinstating_at_once_ends_in_one_state_with_its_events(install: Installation) {
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let webhook = owner.subscribe(&product, receiver.url()).await;
    let license = owner.issue(&product, json!({})).await;
    let answers = join_all((0..40).map(|number| {
        let (owner, license) = (owner.clone(), license.clone());
        tokio::spawn(async move {
            if number % 2 == 0 { owner.revoke(&license).await } else { owner.reinstate(&license).await }
        })
    }))
    .await;
    for answer in answers {
        answer.unwrap().gives(200);
    }
    let seen = owner.get(&format!("/licenses/{}", license.id)).await;
    let status = seen.gives(200)["status"].clone();
    let verdict = owner.app(&product).verdict(&license).await;
    assert_eq!(verdict == "revoked", status == "revoked", "{verdict} {status}");

    // Changes take turns, so their events do too: one more revocation than reinstatement, or as many.
    let last = owner.issue(&product, json!({"email": "last@example.com"})).await;
    let arrived = receiver
        .wait("the last event", |arrived| {
            arrived.iter().any(|d| d.json["data"]["id"] == last.id.as_str()).then(|| arrived.to_vec())
        })
        .await;
    let listed = owner.get(&format!("/products/{}/webhooks/{}/deliveries?pageSize=100", product.id, webhook.id)).await;
    let count = |event: &str| {
        let all = listed.gives(200)["deliveries"].as_array().unwrap();
        i64::try_from(all.iter().filter(|delivery| delivery["event"] == event).count()).unwrap()
    };
    let (revoked, reinstated) = (count("license.revoked"), count("license.reinstated"));
    assert_eq!(revoked - reinstated, i64::from(status == "revoked"), "{revoked} revocations, {reinstated} taken back");
    let ids: BTreeSet<&str> = arrived.iter().map(paperkey_tests::receiver::Delivery::event_id).collect();
    assert_eq!(ids.len(), arrived.len(), "no event was told twice");
}

async fn the_same_machine_takes_one_slot_however_often_it_asks_at_once(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let license = owner.issue(&product, json!({"maxActivations": 2})).await;
    let app = owner.app(&product);
    let answers = join_all((0..30).map(|_| {
        let (app, license) = (app.clone(), license.clone());
        tokio::spawn(async move { app.activate(&license, "the one machine").await })
    }))
    .await;
    let ids: BTreeSet<String> =
        answers.into_iter().map(|answer| answer.unwrap().gives(200)["activation"]["id"].to_string()).collect();
    assert_eq!(ids.len(), 1, "it is one activation: {ids:?}");
    assert_eq!(app.validate(&license).await.gives(200)["license"]["activationsCount"], 1);
}

async fn a_product_has_ten_pairs_however_many_are_asked_for_at_once(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let path = format!("/products/{}/api-keys", product.id);
    let answers = join_all((0..20).map(|_| {
        let (owner, path) = (owner.clone(), path.clone());
        tokio::spawn(async move { owner.post(&path, json!({})).await })
    }))
    .await;
    let mut made = 1;
    for answer in answers.into_iter().map(Result::unwrap) {
        if answer.status == 201 {
            made += 1;
        } else {
            answer.refused(Reason::KeyLimitReached);
        }
    }
    assert_eq!(made, 10, "the first pair and nine more");
}
