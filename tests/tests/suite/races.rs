//! Many at once: limits and uniqueness hold however many processes answer.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{
    Account, Api, Installation, Receiver, on_both_kinds,
    people::{new_email, text},
};
use serde_json::json;

on_both_kinds! {
    one_email_is_one_account_however_many_ask_at_once,
    revoking_and_reinstating_at_once_ends_in_one_state_with_its_events,
    the_same_machine_takes_one_slot_however_often_it_asks_at_once,
    a_product_has_ten_pairs_however_many_are_asked_for_at_once,
    a_team_with_five_keys_gets_five_more_however_many_are_asked_for_at_once,
    a_key_is_rotated_once_however_many_ask_at_once,
    an_invitation_is_accepted_once_and_the_last_owner_stays,
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

async fn a_team_with_five_keys_gets_five_more_however_many_are_asked_for_at_once(install: Installation) {
    let owner = install.register().await;
    let path = format!("/teams/{}/api-keys", owner.team_id);
    for number in 0..4 {
        owner.post(&path, json!({"name": format!("Key {number}"), "mode": "test"})).await.gives(201);
    }
    let by_key = owner.integration();
    let answers = join_all((0..20).map(|number| {
        let (owner, by_key, path) = (owner.clone(), by_key.clone(), path.clone());
        tokio::spawn(async move {
            // Through both doors, and in both modes.
            if number % 2 == 0 {
                owner.post(&path, json!({"name": "One of many", "mode": "live"})).await
            } else {
                by_key.post("/v1/keys", json!({"name": "One of many", "type": "test"})).await
            }
        })
    }))
    .await;
    let mut made = 0;
    for answer in answers.into_iter().map(Result::unwrap) {
        if answer.status == 201 {
            made += 1;
        } else {
            answer.refused(Reason::KeyLimitReached);
        }
    }
    assert_eq!(made, 5, "one from the registration, four, and five more");
    let listed = owner.get(&format!("{path}?pageSize=100")).await;
    let kinds = |kind: &str| {
        let all = listed.gives(200)["apiKeys"].as_array().unwrap();
        all.iter().filter(|key| key["kind"] == kind).count()
    };
    assert_eq!(kinds("team") + kinds("platform"), 10);
}

async fn a_key_is_rotated_once_however_many_ask_at_once(install: Installation) {
    let owner = install.register().await;
    let path = format!("/teams/{}/api-keys", owner.team_id);
    let made = owner.post(&path, json!({"name": "To be rotated"})).await;
    let rotate = format!("{path}/{}/rotate", text(made.gives(201), "/id"));
    let answers = join_all((0..20).map(|_| {
        let (owner, rotate) = (owner.clone(), rotate.clone());
        tokio::spawn(async move { owner.post(&rotate, json!({})).await })
    }))
    .await;
    let mut keys = Vec::new();
    for answer in answers.into_iter().map(Result::unwrap) {
        if answer.status == 200 {
            keys.push(text(answer.gives(200), "/key"));
        } else {
            answer.refused(Reason::Conflict);
        }
    }
    assert_eq!(keys.len(), 1, "one new key");
    install.api().with_key(&keys[0]).get("/api/v1/me").await.gives(200);
    let old = text(made.gives(201), "/key");
    let still = install.api().with_key(&old).get("/api/v1/me").await;
    assert_eq!(still.gives(200)["status"], "superseded");
    assert!(still.header("paperkey-key-expires").is_some(), "its holder is told");
}

async fn an_invitation_is_accepted_once_and_the_last_owner_stays(install: Installation) {
    let (owner, guest) = (install.register().await, install.register().await);
    let members = format!("/teams/{}/members", owner.team_id);
    let invited = owner.post(&members, json!({"email": guest.email, "role": "owner"})).await;
    let link = text(invited.gives(201), "/inviteUrl");
    let token = link.split_once("token=").unwrap().1.to_owned();
    let answers = join_all((0..10).map(|_| {
        let (guest, token) = (guest.clone(), token.clone());
        tokio::spawn(async move { guest.post("/auth/invitations/accept", json!({"token": token})).await.status })
    }))
    .await;
    let accepted = answers.into_iter().filter(|status| *status.as_ref().unwrap() == 200).count();
    assert_eq!(accepted, 1, "a link is good once");

    // Two Owners, and each throws the other out.
    let guest_in_team = guest.for_team(&owner.team_id);
    let (one, other) = (format!("{members}/{}", owner.user_id), format!("{members}/{}", guest.user_id));
    let (_, _) = tokio::join!(guest_in_team.delete(&one), owner.delete(&other));
    let mut owners = 0;
    for person in [&owner, &guest] {
        let me = person.get("/auth/me").await;
        let teams = me.gives(200)["teams"].as_array().unwrap().clone();
        owners += teams.iter().filter(|team| team["id"] == owner.team_id.as_str() && team["role"] == "owner").count();
    }
    assert_eq!(owners, 1, "one of the two is left");
}
