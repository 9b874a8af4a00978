//! Verification of keys: what a vendor's own API learns of the keys that its callers send, and what that costs.

use std::time::Instant;

use futures_util::future::join_all;
use paperkey_proto::{
    errors::v1::Reason,
    gateway::v1::{VerificationCode, VerifyKeyRequest, key_verification_service_client::KeyVerificationServiceClient},
};
use paperkey_tests::{
    Account, Answer, Api, Installation, Settings, eventually,
    grpc::{Bearer, connect, refused},
    on_both_kinds,
    people::text,
    within,
};
use serde_json::{Value, json};

use crate::freshness::{PROMISED, lookups, metric, statements};

on_both_kinds! {
    a_vendor_learns_of_its_own_keys_and_of_nobody_elses,
    the_same_is_said_over_grpc,
    the_installation_verifies_every_teams_keys,
    a_mistyped_token_is_refused_without_a_lookup,
    a_warm_verification_costs_no_lookup_and_no_statement,
    a_revoked_key_is_verified_no_longer,
}

async fn verify(api: &Api, body: Value) -> Answer {
    api.post("/v1/keys/verify", body).await
}

async fn code(api: &Api, key: &str) -> String {
    let answer = verify(api, json!({"key": key})).await;
    let json = answer.gives(200);
    let code = text(json, "/code");
    assert_eq!(json["valid"], json!(code == "valid"), "{json}");
    code
}

async fn a_vendor_learns_of_its_own_keys_and_of_nobody_elses(install: Installation) {
    let (owner, stranger) = (install.register().await, install.register().await);
    let product = owner.create_product("App").await;
    let vendor = owner.integration();
    for key in [&owner.live_key, &owner.free_key, &product.secret_key] {
        let answer = verify(&vendor, json!({"key": key})).await;
        let json = answer.gives(200);
        assert_eq!((&json["valid"], &json["code"], &json["mode"]), (&json!(true), &json!("valid"), &json!("live")));
        assert_eq!(json["team_id"], owner.team_id.as_str());
        assert!(text(json, "/key_id").starts_with("key_"));
        assert!(json["scopes"].as_array().is_some_and(|scopes| scopes.contains(&json!("licenses:read"))), "{json}");
    }
    let unknown = json!({"valid": false, "code": "invalid_key", "key_id": null, "team_id": null, "mode": null,
        "scopes": [], "ratelimit": null, "quota": null});
    let system_key = install.system_key().await;
    let foreign = [&stranger.live_key, &stranger.free_key, &system_key];
    let no_keys = [&owner.token, &product.public_key, &"nonsense".to_owned()];
    for key in foreign.into_iter().chain(no_keys) {
        assert_eq!(verify(&vendor, json!({"key": key})).await.gives(200), &unknown);
        let asked = json!({"key": key, "scope": "audit:write", "ip": "192.0.2.1"});
        assert_eq!(verify(&vendor, asked).await.gives(200), &unknown);
    }

    let asked = json!({"key": product.secret_key, "scope": "products:write"});
    let answer = verify(&vendor, asked).await;
    let json = answer.gives(200);
    assert_eq!((&json["valid"], &json["code"]), (&json!(false), &json!("scope_insufficient")));
    assert_eq!(json["team_id"], owner.team_id.as_str());
    verify(&vendor, json!({"key": owner.free_key, "scope": "licenses:read", "ip": "2001:db8::1"})).await.gives(200);
    verify(&vendor, json!({"key": owner.free_key, "scope": "licences:read"})).await.refused_for("scope");
    verify(&vendor, json!({"key": owner.free_key, "ip": "somewhere"})).await.refused_for("ip");
    verify(&vendor, json!({})).await.refused_for("key");
    verify(&install.api(), json!({"key": owner.live_key})).await.refused(Reason::InvalidCredentials);
    verify(&owner, json!({"key": owner.live_key})).await.refused(Reason::InvalidCredentials);
}

async fn the_same_is_said_over_grpc(install: Installation) {
    let (owner, stranger) = (install.register().await, install.register().await);
    let channel = connect(&install.url()).await;
    let mut client = KeyVerificationServiceClient::with_interceptor(channel.clone(), Bearer::new(&owner.live_key));
    let asked = |key: &str| VerifyKeyRequest { key: key.to_owned(), ..VerifyKeyRequest::default() };
    let answer = client.verify_key(asked(&owner.free_key)).await.unwrap().into_inner();
    assert_eq!((answer.code(), answer.valid), (VerificationCode::Valid, true));
    assert_eq!(answer.team_id.as_deref(), Some(owner.team_id.as_str()));
    for key in [stranger.live_key.as_str(), "nonsense"] {
        let answer = client.verify_key(asked(key)).await.unwrap().into_inner();
        assert_eq!((answer.code(), answer.valid, answer.team_id), (VerificationCode::InvalidKey, false, None));
    }
    refused(client.verify_key(asked("")).await, Reason::ValidationFailed);
    let scope = Some("nothing:at-all".to_owned());
    refused(client.verify_key(VerifyKeyRequest { scope, ..asked("nonsense") }).await, Reason::ValidationFailed);
    let mut anonymous = KeyVerificationServiceClient::new(channel);
    refused(anonymous.verify_key(asked(&owner.free_key)).await, Reason::InvalidCredentials);
}

async fn the_installation_verifies_every_teams_keys(install: Installation) {
    let system_key = install.system_key().await;
    let system = install.api().with_key(&system_key);
    for _ in 0..2 {
        let owner = install.register().await;
        let answer = verify(&system, json!({"key": owner.live_key})).await;
        assert_eq!(answer.gives(200)["team_id"], owner.team_id.as_str());
    }
    let answer = verify(&system, json!({"key": system_key})).await;
    let json = answer.gives(200);
    assert_eq!((&json["code"], &json["team_id"], &json["mode"]), (&json!("valid"), &Value::Null, &Value::Null));
}

/// The token with one character missing, changed, or in its neighbour's place.
fn mistyped(token: &str) -> Vec<String> {
    let letters: Vec<char> = token.chars().collect();
    let mut all = Vec::new();
    for at in 0..letters.len() {
        let mut missing = letters.clone();
        missing.remove(at);
        all.push(missing);
        let mut changed = letters.clone();
        changed[at] = if changed[at] == 'x' { 'y' } else { 'x' };
        all.push(changed);
        if at + 1 < letters.len() && letters[at] != letters[at + 1] {
            let mut swapped = letters.clone();
            swapped.swap(at, at + 1);
            all.push(swapped);
        }
    }
    all.into_iter().map(String::from_iter).collect()
}

/// Calls until what was changed just now is no longer news, which is looked up.
async fn warm(vendor: &Api, key: &str) {
    let changed = Instant::now();
    while changed.elapsed() < PROMISED {
        assert_eq!(code(vendor, key).await, "valid");
    }
}

async fn a_mistyped_token_is_refused_without_a_lookup(install: Installation) {
    let owner = install.register().await;
    let vendor = owner.integration();
    warm(&vendor, &owner.free_key).await;
    let operations = install.operations(install.gateway());
    let malformed = || metric(&operations, "paperkey_credential_malformed_total");
    let tokens = mistyped(&owner.live_key);
    assert!(tokens.len() > 100);

    // As the credential of a call: nobody else calls, so nothing at all may be looked up.
    let (asked, refused) = (lookups(&operations).await, malformed().await);
    let api = install.api();
    for token in &tokens {
        verify(&api.with_key(token), json!({"key": owner.live_key})).await.refused(Reason::InvalidCredentials);
    }
    assert_eq!(lookups(&operations).await, asked);
    assert_eq!(malformed().await - refused, tokens.len() as u64);

    // And as the key that is asked about. The caller's own key may have to be looked up again on a machine so slow that
    // the news of changes stay out.
    assert_eq!(code(&vendor, &owner.live_key).await, "valid");
    let asked = lookups(&operations).await;
    for token in &tokens {
        assert_eq!(code(&vendor, token).await, "invalid_key");
    }
    assert!(lookups(&operations).await - asked <= 5);
}

async fn a_warm_verification_costs_no_lookup_and_no_statement(install: Installation) {
    const CALLS: u64 = 500;
    let owner = install.register().await;
    let vendor = owner.integration();
    warm(&vendor, &owner.free_key).await;
    let auth = install.operations(install.host_of("auth"));
    let gateway = install.operations(install.gateway());
    let (before, asked) = (statements(&auth, "auth").await, lookups(&gateway).await);
    let hits = metric(&gateway, "paperkey_credential_hits_total").await;
    let began = Instant::now();
    let calls = (0..CALLS).map(|_| code(&vendor, &owner.free_key));
    assert!(join_all(calls).await.iter().all(|code| code == "valid"));
    let took = began.elapsed();
    let during = statements(&auth, "auth").await - before;
    // Every process asks four times a second what has changed, and workers look for work, all at once where they could not
    // for a while; beyond that so many statements would they need to look forty times a second.
    let idle = 60 + u64::try_from(took.as_millis()).unwrap() / 25;
    assert!(during <= idle, "{during} statements during {CALLS} verifications in {took:?}");
    assert!(during < CALLS / 2, "the calls were too slow to prove anything: {took:?}");
    let asked = lookups(&gateway).await - asked;
    assert!(asked <= 5, "auth was asked {asked} times whose the same keys are");
    // The caller's key and the verified one: two a call where the machine has time to breathe.
    let hits = metric(&gateway, "paperkey_credential_hits_total").await - hits;
    // Those who came while auth was asked have waited for that one answer.
    assert!(hits >= CALLS, "{hits}");
}

async fn a_revoked_key_is_verified_no_longer(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let vendor = owner.integration();
    let key = product.secret_key.as_str();
    warm(&vendor, key).await;
    let path = format!("/products/{}/api-keys/{}", product.id, product.key_id);
    owner.delete(&path).await.gives(204);
    within(PROMISED, "the key is invalid", || async { (code(&vendor, key).await == "invalid_key").then_some(()) })
        .await;
    for _ in 0..20 {
        assert_eq!(code(&vendor, key).await, "invalid_key");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_one_process_the_next_verification_feels_a_revocation() {
    let install = Installation::all_in_one().await;
    let owner = install.register().await;
    let vendor = owner.integration();
    for _ in 0..20 {
        let product = owner.create_product("App").await;
        assert_eq!(code(&vendor, &product.secret_key).await, "valid");
        owner.delete(&format!("/products/{}/api-keys/{}", product.id, product.key_id)).await.gives(204);
        assert_eq!(code(&vendor, &product.secret_key).await, "invalid_key");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn many_verifications_of_one_cold_key_put_few_questions() {
    const CALLS: usize = 200;
    let Some(install) = Installation::fleet().await else { return };
    let owner = install.register().await;
    let vendor = owner.integration();
    warm(&vendor, &owner.live_key).await;
    let operations = install.operations(install.gateway());
    let asked = lookups(&operations).await;
    let codes = join_all((0..CALLS).map(|_| code(&vendor, &owner.free_key))).await;
    assert!(codes.iter().all(|code| code == "valid"));
    let asked = lookups(&operations).await - asked;
    assert!((1..=10).contains(&asked), "auth was asked {asked} times whose one key is");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_auth_nothing_is_verified_for_longer_than_a_second() {
    let impatient =
        Settings { environment: vec![("PAPERKEY__SERVER__CALL_TIMEOUT_MS", "1000".to_owned())], ..Settings::default() };
    let Some(mut install) = Installation::fleet_with(impatient).await else { return };
    let owner: Account = install.register().await;
    let vendor = owner.integration();
    warm(&vendor, &owner.free_key).await;
    // Stopped, not ended: connections stay open and nothing answers on them.
    install.process("auth").signal("STOP");
    let stopped = Instant::now();
    eventually("the gateway stops trusting its memory", || async {
        let answer = verify(&vendor, json!({"key": owner.free_key})).await;
        if answer.status == 200 {
            assert!(stopped.elapsed() < 3 * PROMISED, "answered from memory after {:?}", stopped.elapsed());
            return None;
        }
        assert_eq!(answer.status, 503, "{}", answer.text());
        Some(())
    })
    .await;
    install.process("auth").signal("CONT");
    eventually("the gateway recovers", || async {
        (verify(&vendor, json!({"key": owner.free_key})).await.status == 200).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_slept_through_a_revocation_does_not_answer_from_memory() {
    let Some(mut install) = Installation::fleet_with_two_licensings().await else { return };
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let sleeper = install.second_api().with_key(&owner.live_key);
    warm(&sleeper, &product.secret_key).await;
    install.process("gateway-2").signal("STOP");
    owner.delete(&format!("/products/{}/api-keys/{}", product.id, product.key_id)).await.gives(204);
    let revoked = Instant::now();
    eventually("a second has passed", || async { (revoked.elapsed() > PROMISED).then_some(()) }).await;
    install.process("gateway-2").signal("CONT");
    assert_eq!(code(&sleeper, &product.secret_key).await, "invalid_key");
}
