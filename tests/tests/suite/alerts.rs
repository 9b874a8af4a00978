//! Alerts: what a team learns of without asking.

use http::Method;
use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{Account, Installation, Receiver, eventually, on_both_kinds, people::text};
use serde_json::{Value, json};

on_both_kinds! {
    the_use_of_a_revoked_key_is_told_once_with_a_count,
    an_old_key_that_is_still_used_is_told,
    a_burst_of_refused_calls_is_told,
    a_paused_webhook_is_told,
    alerts_are_for_owners_and_admins_of_the_team,
}

async fn alerts(owner: &Account, cause: &str) -> Vec<Value> {
    let answer = owner.get(&format!("/teams/{}/alerts?pageSize=100", owner.team_id)).await;
    let all = answer.gives(200)["alerts"].as_array().unwrap().clone();
    all.into_iter().filter(|alert| alert["cause"] == cause).collect()
}

/// The one alert of a cause, once it is there.
async fn the_alert(owner: &Account, cause: &str) -> Value {
    let found = eventually(&format!("there is an alert of {cause}"), || async {
        Some(alerts(owner, cause).await).filter(|found| !found.is_empty())
    })
    .await;
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(text(&found[0], "/id").starts_with("alrt_") && !text(&found[0], "/message").is_empty());
    found[0].clone()
}

async fn the_use_of_a_revoked_key_is_told_once_with_a_count(install: Installation) {
    let (owner, receiver) = (install.register().await, Receiver::start().await);
    let subscribed = json!({"url": receiver.url(), "events": ["alert.created"]});
    owner.post(&format!("/teams/{}/webhooks", owner.team_id), subscribed).await.gives(201);
    let key = owner.create_key(json!({"name": "Revoked"})).await;
    owner.revoke_key(&key).await;
    let api = install.api().with_key(&key.token);
    eventually("it is refused", || async { (api.get("/api/v1/me").await.status == 401).then_some(()) }).await;
    let alert = the_alert(&owner, "revoked_key_used").await;
    assert_eq!(alert["subject"], key.id.as_str());
    let told = receiver.received(1).await;
    assert_eq!((told[0].event(), &told[0].json["data"]["id"]), ("alert.created", &alert["id"]));
    let mails = eventually("a mail tells of it", || async {
        Some(install.mails_to(&owner.email))
            .filter(|mails| mails.iter().any(|mail| mail.contains("Revoked") || mail.contains("revoked")))
    })
    .await;
    assert!(mails.iter().all(|mail| !mail.contains(&key.token)));
}

async fn an_old_key_that_is_still_used_is_told(install: Installation) {
    let owner = install.register().await;
    let key = owner.create_key(json!({"name": "Old"})).await;
    let rotate = format!("/teams/{}/api-keys/{}/rotate", owner.team_id, key.id);
    owner.post(&rotate, json!({})).await.gives(200);
    // What is told at once would tell of a holder who is just about to change it.
    let answer = install.api().with_key(&key.token).get("/api/v1/me").await;
    assert!(answer.gives(200).is_object() && answer.header("paperkey-key-expires").is_some());
    assert!(alerts(&owner, "old_key_used").await.is_empty());
}

async fn a_burst_of_refused_calls_is_told(install: Installation) {
    let owner = install.register().await;
    let key = owner.create_key(json!({"name": "Curious", "scope": "read_only"})).await;
    let api = install.api().with_key(&key.token);
    for _ in 0..25 {
        api.call(Method::POST, "/api/v1/products", Some(json!({"name": "No"})))
            .await
            .refused(Reason::ScopeInsufficient);
    }
    let alert = the_alert(&owner, "refusal_burst").await;
    assert_eq!(alert["subject"], key.id.as_str());
}

async fn a_paused_webhook_is_told(install: Installation) {
    let (owner, receiver) = (install.register().await, Receiver::start().await);
    receiver.answers(500);
    let product = owner.create_product("App").await;
    let webhook = owner.subscribe(&product, receiver.url()).await;
    for _ in 0..4 {
        owner.issue(&product, json!({})).await;
    }
    let alert = the_alert(&owner, "webhook_paused").await;
    assert_eq!(alert["subject"], webhook.id.as_str());
}

async fn alerts_are_for_owners_and_admins_of_the_team(install: Installation) {
    let (owner, stranger) = (install.register().await, install.register().await);
    let path = format!("/teams/{}/alerts", owner.team_id);
    owner.get(&path).await.gives(200);
    stranger.get(&path).await.refused(Reason::NotFound);
    owner.team_mate(&install, "member").await.get(&path).await.refused(Reason::RoleInsufficient);
    owner.integration().get(&path).await.refused(Reason::InvalidCredentials);
}
