//! A refused credential teaches nothing: unknown, revoked, expired, disabled and malformed are answered alike.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use paperkey_kit::{token::TokenKind, values::rfc3339};
use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{Account, Answer, Installation, eventually, grpc, on_both_kinds, people::text};
use serde_json::{Value, json};

on_both_kinds! {
    no_answer_tells_why_a_key_was_refused,
    a_good_key_of_the_wrong_kind_is_told_from_no_unknown_one,
}

/// A good key of a team that ends soon, was revoked, is disabled, and so on.
async fn refused_keys(install: &Installation, owner: &Account) -> BTreeMap<&'static str, String> {
    let api_keys = format!("/teams/{}/api-keys", owner.team_id);
    let make = async |body: Value| {
        let made = owner.post(&api_keys, body).await;
        let json = made.gives(201);
        (text(json, "/id"), text(json, "/key"))
    };
    let (revoked_id, revoked) = make(json!({"name": "Revoked"})).await;
    let (disabled_id, disabled) = make(json!({"name": "Disabled"})).await;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("it is after 1970") + Duration::from_millis(1_500);
    let soon = rfc3339(i64::try_from(now.as_millis()).expect("it is before the year 9999"));
    let (_, expired) = make(json!({"name": "Expired", "expiresAt": soon})).await;
    owner.delete(&format!("{api_keys}/{revoked_id}")).await.gives(200);
    owner.patch(&format!("{api_keys}/{disabled_id}"), json!({"enabled": false})).await.gives(200);
    let mut cut = owner.live_key.clone();
    cut.pop();
    let mut swapped = owner.live_key.clone().into_bytes();
    let at = (10..40).find(|at| swapped[*at] != swapped[*at + 1]).expect("not all characters are the same");
    swapped.swap(at, at + 1);
    let keys = BTreeMap::from([
        ("unknown", TokenKind::TeamLive.generate()),
        ("revoked", revoked),
        ("disabled", disabled),
        ("expired", expired),
        ("cut", cut),
        ("swapped", String::from_utf8(swapped).expect("tokens are ASCII")),
        ("malformed", "nonsense".to_owned()),
    ]);
    for key in keys.values() {
        let api = install.api().with_key(key);
        eventually("the key is refused", || async { (api.get("/api/v1/products").await.status == 401).then_some(()) })
            .await;
    }
    keys
}

/// All that a caller can see, but for what differs from answer to answer anyway.
fn seen(answer: &Answer) -> String {
    let id = answer.header("x-request-id").expect("every answer has one").to_owned();
    let mut headers: Vec<String> = answer
        .headers
        .iter()
        .filter(|(name, _)| !["x-request-id", "date"].contains(&name.as_str()))
        .map(|(name, value)| {
            let value = value.to_str().unwrap_or_default();
            // Which limit is told of must be the same; what is left of it is less each time.
            let counts = ["ratelimit", "x-ratelimit-remaining", "x-ratelimit-reset"].contains(&name.as_str());
            let shown: String = value.chars().filter(|letter| !counts || !letter.is_ascii_digit()).collect();
            format!("{name}: {shown}")
        })
        .collect();
    headers.sort();
    format!("{}\n{}\n{}", answer.status, headers.join("\n"), answer.text().replace(&id, "req_…"))
}

async fn no_answer_tells_why_a_key_was_refused(install: Installation) {
    let owner = install.register().await;
    let keys = refused_keys(&install, &owner).await;
    for path in ["/api/v1/products", "/api/v1/me", "/v1/status", "/v1/keys", "/api/v1/products/prod_1"] {
        let mut answers = BTreeMap::new();
        for (name, key) in &keys {
            let answer = install.api().with_key(key).get(path).await;
            answer.refused(Reason::InvalidCredentials);
            answers.insert(*name, seen(&answer));
        }
        let unknown = &answers["unknown"];
        for (name, answer) in &answers {
            assert_eq!(answer, unknown, "{path}: {name} can be told from unknown");
        }
        let missing = install.api().get(path).await;
        if path != "/v1/status" {
            // Nothing was refused that could be guessed at, so it counts as any call of a stranger.
            let without_code = unknown.replace(" error=\"invalid_token\"", "").replace("refused_credentials", "per_ip");
            assert_eq!(seen(&missing), without_code, "{path}: missing differs in more than the challenge");
        }
    }
    let channel = grpc::connect(&install.url()).await;
    let mut statuses = BTreeMap::new();
    for (name, key) in &keys {
        let rpc = "/paperkey.catalog.v1.CatalogService/ListProducts";
        let outcome = grpc::call(&channel, rpc, bytes::Bytes::new(), grpc::credential(key)).await;
        let status = outcome.expect_err("it is refused");
        // The details hold a map, whose order is another one each time and tells nothing.
        let mut details = status.details().to_vec();
        details.sort_unstable();
        statuses.insert(*name, format!("{:?} {} {details:?}", status.code(), status.message()));
    }
    let unknown = statuses["unknown"].clone();
    assert!(statuses.values().all(|status| *status == unknown), "{statuses:#?}");
}

async fn a_good_key_of_the_wrong_kind_is_told_from_no_unknown_one(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let pairs = [
        (product.public_key.clone(), TokenKind::ProductPublic.generate(), "/api/v1/products"),
        (product.secret_key.clone(), TokenKind::ProductSecret.generate(), "/api/v1/products"),
        (product.secret_key, TokenKind::ProductSecret.generate(), "/v1/keys"),
        (owner.live_key.clone(), TokenKind::PlatformLive.generate(), "/products"),
        (owner.free_key.clone(), TokenKind::Free.generate(), "/licenses"),
        (install.system_key().await, TokenKind::System.generate(), "/auth/me"),
    ];
    for (good, unknown, path) in pairs {
        let good = install.api().with_key(&good).get(path).await;
        let unknown = install.api().with_key(&unknown).get(path).await;
        good.refused(Reason::InvalidCredentials);
        assert_eq!(seen(&good), seen(&unknown), "{path}: a key that exists can be told from one that does not");
    }
}
