//! Deliveries, as public libraries verify them: what Paperkey signs is what others understand by the standard.

use std::time::{SystemTime, UNIX_EPOCH};

use paperkey_tests::{
    Installation, Receiver, on_both_kinds,
    people::text,
    verifiers::{Case, judge},
};
use serde_json::json;

on_both_kinds! {
    every_library_verifies_what_was_sent_and_nothing_else,
    while_a_secret_is_rotated_every_library_verifies_with_both,
}

/// A secret that is nobody's.
const NOBODYS_SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYqrTwjU";

/// A little more than the five minutes that the libraries allow.
const TOO_OLD_S: u64 = 330;

async fn all_verify(cases: &[Case]) {
    for (case, verdicts) in cases.iter().zip(judge(cases).await) {
        assert!(verdicts.values().all(Option::is_none), "{:?} is refused: {verdicts:#?}", case.headers);
    }
}

async fn all_refuse(cases: &[Case]) {
    for (case, verdicts) in cases.iter().zip(judge(cases).await) {
        assert!(verdicts.values().all(Option::is_some), "{case:?} is taken: {verdicts:#?}");
    }
}

async fn every_library_verifies_what_was_sent_and_nothing_else(install: Installation) {
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let webhook = owner.subscribe(&product, receiver.url()).await;
    // Letters of every kind, since what is signed are bytes.
    let license = owner.issue(&product, json!({"metadata": {"name": "Grüße 東京 🗝 \"quoted\" \\ \u{7f}"}})).await;
    owner.app(&product).activate(&license, "machine-1").await.gives(200);
    owner.revoke(&license).await.gives(200);
    let arrived = receiver.received(3).await;
    let cases: Vec<Case> = arrived.iter().map(|delivery| Case::of(delivery, &webhook.secret)).collect();
    all_verify(&cases).await;

    let good = cases.iter().find(|case| case.body.contains("東京")).expect("the licence was told").clone();
    let other = &cases.iter().find(|case| case.body != good.body).expect("there are other events").headers;
    let old = (SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() - TOO_OLD_S).to_string();
    let signer = standardwebhooks::Webhook::new(&webhook.secret).unwrap();
    let signed_then = signer.sign(&good.headers["webhook-id"], old.parse().unwrap(), good.body.as_bytes()).unwrap();
    all_refuse(&[
        Case { body: good.body.replace("license", "licence"), ..good.clone() },
        Case { body: format!("{} ", good.body), ..good.clone() },
        Case { secret: NOBODYS_SECRET.to_owned(), ..good.clone() },
        good.with("webhook-id", &other["webhook-id"]),
        good.with("webhook-signature", &other["webhook-signature"]),
        good.with("webhook-timestamp", &old),
        // Rightly signed, and brought again by somebody who has kept it.
        good.with("webhook-timestamp", &old).with("webhook-signature", &signed_then),
    ])
    .await;
}

async fn while_a_secret_is_rotated_every_library_verifies_with_both(install: Installation) {
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let webhook = owner.subscribe(&product, receiver.url()).await;
    let path = format!("/products/{}/webhooks/{}", product.id, webhook.id);
    let rotated = owner.post(&format!("{path}/rotate-secret"), json!({})).await;
    let new = text(rotated.gives(200), "/secret");
    assert_ne!(new, webhook.secret);
    owner.issue(&product, json!({})).await;
    let delivery = &receiver.received(1).await[0];
    all_verify(&[Case::of(delivery, &webhook.secret), Case::of(delivery, &new)]).await;
    all_refuse(&[Case::of(delivery, NOBODYS_SECRET)]).await;

    // Each of the two signatures is good by itself, also for a library that reads but one.
    let signatures: Vec<&str> = delivery.header("webhook-signature").split(' ').collect();
    assert_eq!(signatures.len(), 2, "{signatures:?}");
    let alone = |signature, secret| Case::of(delivery, secret).with("webhook-signature", signature);
    let cases = signatures.iter().flat_map(|one| [alone(one, &webhook.secret), alone(one, &new)]);
    let taken: Vec<bool> =
        judge(&cases.collect::<Vec<_>>()).await.iter().map(|verdicts| verdicts.values().all(Option::is_none)).collect();
    let of_one_secret = |of: &[bool]| of[0] != of[1];
    assert!(taken.chunks(2).all(of_one_secret) && taken[0] != taken[2], "each is that of one secret: {taken:?}");
}
