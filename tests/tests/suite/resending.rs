//! What an owner does about deliveries: sends them again, recovers them, tries an endpoint, changes its secret.

use std::collections::BTreeSet;

use paperkey_kit::{clock::Clock, values::rfc3339};
use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{
    Account, Installation, Product, Receiver, Settings, eventually, on_both_kinds_with,
    people::{Webhook, text},
    receiver::Delivery,
};
use serde_json::{Value, json};

on_both_kinds_with! {
    one_attempt;
    a_delivery_is_sent_again_under_its_id_and_counts_once,
    what_is_sent_again_to_a_paused_webhook_waits_until_it_is_resumed,
    replays_that_fail_pause_nothing,
    what_has_failed_for_good_is_recovered_and_nothing_else,
    a_test_event_goes_to_the_one_webhook_whatever_it_subscribes_to,
    a_rotated_secret_signs_beside_the_old_one,
    a_webhook_that_keeps_failing_is_paused_with_one_alert,
    nobody_else_sends_anything_again,
}

/// Every delivery has one attempt, and has then failed for good.
fn one_attempt() -> Settings {
    let environment = vec![("PAPERKEY__WEBHOOKS__RETRY_SCHEDULE_S", "[0]".to_owned())];
    Settings { environment, ..Settings::default() }
}

struct Scene {
    owner: Account,
    product: Product,
    webhook: Webhook,
    path: String,
    receiver: Receiver,
}

impl Scene {
    async fn of(install: &Installation) -> Self {
        let receiver = Receiver::start().await;
        let owner = install.register().await;
        let product = owner.create_product("App").await;
        let webhook = owner.subscribe(&product, receiver.url()).await;
        let path = format!("/products/{}/webhooks/{}", product.id, webhook.id);
        Self { owner, product, webhook, path, receiver }
    }

    /// Waits until so many deliveries have this status, and answers them, newest first.
    async fn deliveries(&self, status: &str, count: usize) -> Vec<Value> {
        let path = format!("{}/deliveries?pageSize=100", self.path);
        eventually(&format!("{count} deliveries are {status}"), || async {
            let listed = self.owner.get(&path).await;
            let all = listed.gives(200)["deliveries"].as_array().unwrap().clone();
            let found: Vec<Value> = all.into_iter().filter(|delivery| delivery["status"] == status).collect();
            (found.len() == count).then_some(found)
        })
        .await
    }

    async fn replay(&self, id: &str) -> Value {
        let answer = self.owner.post(&format!("{}/deliveries/{id}/replay", self.path), json!({})).await;
        answer.gives(200).clone()
    }

    /// How many deliveries were recovered.
    async fn recover(&self, since_ms: i64) -> Value {
        let answer = self.owner.post(&format!("{}/recover", self.path), json!({"since": rfc3339(since_ms)})).await;
        answer.gives(200)["recovered"].clone()
    }
}

fn ids(arrived: &[Delivery]) -> BTreeSet<String> {
    arrived.iter().map(|delivery| delivery.header("webhook-id").to_owned()).collect()
}

async fn a_delivery_is_sent_again_under_its_id_and_counts_once(install: Installation) {
    let scene = Scene::of(&install).await;
    scene.owner.issue(&scene.product, json!({})).await;
    let first = scene.deliveries("succeeded", 1).await.remove(0);
    let id = text(&first, "/id");
    let again = scene.replay(&id).await;
    assert_eq!((&again["id"], &again["eventId"]), (&first["id"], &first["eventId"]));
    let arrived = scene.receiver.received(2).await;
    assert_eq!(ids(&arrived), BTreeSet::from([id.clone()]), "a replay keeps its id");
    assert_eq!(arrived[0].body, arrived[1].body, "byte for byte");
    for delivery in &arrived {
        delivery.is_signed_with(&scene.webhook.secret);
    }
    let logged = eventually("both attempts are logged", || async {
        let answer = scene.owner.get(&format!("{}/deliveries/{id}", scene.path)).await;
        (answer.gives(200)["attempts"].as_array().map(Vec::len) == Some(2)).then_some(answer.json)
    })
    .await;
    assert_eq!((&logged["status"], &logged["attemptsCount"]), (&json!("succeeded"), &json!(2)));
    assert_eq!(scene.deliveries("succeeded", 1).await.len(), 1, "it is one delivery");
}

async fn what_is_sent_again_to_a_paused_webhook_waits_until_it_is_resumed(install: Installation) {
    let scene = Scene::of(&install).await;
    scene.owner.issue(&scene.product, json!({})).await;
    let id = text(&scene.deliveries("succeeded", 1).await[0], "/id");
    scene.owner.patch(&scene.path, json!({"status": "paused"})).await.gives(200);
    assert_eq!(scene.replay(&id).await["status"], "pending");
    scene.owner.post(&format!("{}/test", scene.path), json!({})).await.refused(Reason::Conflict);
    assert_eq!(scene.receiver.deliveries().len(), 1, "nothing is sent to a paused webhook");
    scene.owner.patch(&scene.path, json!({"status": "active"})).await.gives(200);
    assert_eq!(ids(&scene.receiver.received(2).await), BTreeSet::from([id]));
}

async fn replays_that_fail_pause_nothing(install: Installation) {
    let scene = Scene::of(&install).await;
    scene.owner.issue(&scene.product, json!({})).await;
    let id = text(&scene.deliveries("succeeded", 1).await[0], "/id");
    scene.receiver.answers(500);
    for attempts in 2..=12 {
        scene.replay(&id).await;
        eventually("the replay has failed", || async {
            let answer = scene.owner.get(&format!("{}/deliveries/{id}", scene.path)).await;
            let failed = answer.gives(200)["status"] == "failed" && answer.json["attemptsCount"] == attempts;
            failed.then_some(())
        })
        .await;
    }
    let webhook = scene.owner.get(&scene.path).await;
    assert_eq!((&webhook.gives(200)["status"], &webhook.json["consecutiveFailures"]), (&json!("active"), &json!(0)));
}

async fn what_has_failed_for_good_is_recovered_and_nothing_else(install: Installation) {
    let scene = Scene::of(&install).await;
    let began_ms = Clock::system().now_ms();
    scene.owner.issue(&scene.product, json!({})).await;
    let good = text(&scene.deliveries("succeeded", 1).await[0], "/id");
    scene.receiver.answers(500);
    for _ in 0..4 {
        scene.owner.issue(&scene.product, json!({})).await;
    }
    let failed: BTreeSet<String> =
        scene.deliveries("failed", 4).await.iter().map(|delivery| text(delivery, "/id")).collect();
    scene.receiver.answers(200);
    // Nothing has failed since a moment that is still to come.
    assert_eq!(scene.recover(Clock::system().now_ms() + 60_000).await, 0);
    assert_eq!(scene.recover(began_ms).await, 4);
    scene.deliveries("succeeded", 5).await;
    let arrived = scene.receiver.deliveries();
    let taken: Vec<&Delivery> = arrived.iter().filter(|delivery| delivery.answered == 200).collect();
    let recovered: BTreeSet<String> =
        taken.iter().map(|delivery| delivery.header("webhook-id").to_owned()).filter(|id| *id != good).collect();
    assert_eq!((taken.len(), recovered), (5, failed), "each once, and what had succeeded not again");
    assert_eq!(scene.recover(began_ms).await, 0, "there is nothing left to recover");
    let path = format!("{}/recover", scene.path);
    scene.owner.post(&path, json!({})).await.refused_for("since");
}

async fn a_test_event_goes_to_the_one_webhook_whatever_it_subscribes_to(install: Installation) {
    let scene = Scene::of(&install).await;
    let other = Receiver::start().await;
    let webhooks = format!("/products/{}/webhooks", scene.product.id);
    let narrow = json!({"url": other.url(), "events": ["license.revoked"]});
    let narrow = Webhook::of(scene.owner.post(&webhooks, narrow).await.gives(201));
    let tested = scene.owner.post(&format!("{webhooks}/{}/test", narrow.id), json!({})).await;
    assert_eq!(tested.gives(200)["event"], "webhook.test");
    let arrived = &other.received(1).await[0];
    arrived.is_signed_with(&narrow.secret);
    assert_eq!(arrived.event(), "webhook.test");
    assert_eq!(arrived.header("webhook-id"), text(&tested.json, "/id"));
    assert_eq!(arrived.event_id(), text(&tested.json, "/eventId"));
    // What comes after it shows that nothing came to the other one.
    scene.owner.issue(&scene.product, json!({})).await;
    let arrived = scene.receiver.received(1).await;
    assert_eq!((arrived.len(), arrived[0].event()), (1, "license.created"));

    // A webhook of the team is tried in the same way.
    let of_team = format!("/teams/{}/webhooks", scene.owner.team_id);
    let subscribed = json!({"url": other.url(), "events": ["api_key.created"]});
    let webhook = Webhook::of(scene.owner.post(&of_team, subscribed).await.gives(201));
    scene.owner.post(&format!("{of_team}/{}/test", webhook.id), json!({})).await.gives(200);
    other.received(2).await[1].is_signed_with(&webhook.secret);
}

async fn a_rotated_secret_signs_beside_the_old_one(install: Installation) {
    let scene = Scene::of(&install).await;
    let old = scene.webhook.secret.clone();
    let rotate = format!("{}/rotate-secret", scene.path);
    let before_ms = Clock::system().now_ms();
    let rotated = scene.owner.post(&rotate, json!({})).await;
    let new = text(rotated.gives(200), "/secret");
    assert_ne!(new, old);
    let ends = text(&rotated.json, "/previousSecretExpiresAt");
    let day_ms = 24 * 60 * 60 * 1_000;
    assert!(ends >= rfc3339(before_ms + day_ms) && ends <= rfc3339(Clock::system().now_ms() + day_ms), "{ends}");
    let shown = scene.owner.get(&scene.path).await;
    assert_eq!(shown.gives(200)["previousSecretExpiresAt"], json!(ends));
    assert!(!shown.text().contains(&new), "a secret is shown once");

    scene.owner.issue(&scene.product, json!({})).await;
    let delivery = scene.receiver.received(1).await.remove(0);
    delivery.is_signed_with(&old);
    assert!(delivery.is_signed_by_the_standard_with(&new), "and with the new one, by the standard");

    // A third one ends the first at once.
    let third = text(scene.owner.post(&rotate, json!({})).await.gives(200), "/secret");
    scene.owner.issue(&scene.product, json!({})).await;
    let delivery = scene.receiver.received(2).await.remove(1);
    delivery.is_signed_with(&new);
    assert!(delivery.is_signed_by_the_standard_with(&third));
    assert!(!delivery.is_signed_by_the_standard_with(&old), "the first secret has ended");
}

async fn a_webhook_that_keeps_failing_is_paused_with_one_alert(install: Installation) {
    let scene = Scene::of(&install).await;
    let told = Receiver::start().await;
    let of_team = format!("/teams/{}/webhooks", scene.owner.team_id);
    let subscribed = json!({"url": told.url(), "events": ["alert.created"]});
    scene.owner.post(&of_team, subscribed).await.gives(201);
    scene.receiver.answers(500);
    for _ in 0..15 {
        scene.owner.issue(&scene.product, json!({})).await;
    }
    let alerts = format!("/teams/{}/alerts?pageSize=100", scene.owner.team_id);
    let of_pauses = async || {
        let answer = scene.owner.get(&alerts).await;
        let all = answer.gives(200)["alerts"].as_array().unwrap().clone();
        all.into_iter().filter(|alert| alert["cause"] == "webhook_paused").collect::<Vec<_>>()
    };
    let found =
        eventually("the pause is told", || async { Some(of_pauses().await).filter(|found| !found.is_empty()) }).await;
    assert_eq!((found.len(), &found[0]["subject"]), (1, &json!(scene.webhook.id)));
    let sent = told.received(1).await;
    assert_eq!((sent[0].event(), &sent[0].json["data"]["id"]), ("alert.created", &found[0]["id"]));
    let paused = scene.owner.get(&scene.path).await;
    assert_eq!(paused.gives(200)["status"], "paused");
    assert!(paused.json["consecutiveFailures"].as_i64().is_some_and(|failures| failures >= 10));

    // What failed for good stays so; what was never tried is held, and goes out.
    let failed = eventually("nothing is under way", || async {
        let listed = scene.owner.get(&format!("{}/deliveries?pageSize=100", scene.path)).await;
        let all = listed.gives(200)["deliveries"].as_array().unwrap().clone();
        let with = |status: &str| all.iter().filter(|delivery| delivery["status"] == status).count();
        (with("pending") + with("failed") == 15).then(|| with("failed"))
    })
    .await;
    scene.receiver.answers(200);
    scene.owner.patch(&scene.path, json!({"status": "active"})).await.gives(200);
    scene.deliveries("succeeded", 15 - failed).await;
    assert_eq!((of_pauses().await.len(), told.deliveries().len()), (1, 1), "a pause is told once");
}

async fn nobody_else_sends_anything_again(install: Installation) {
    let scene = Scene::of(&install).await;
    scene.owner.issue(&scene.product, json!({})).await;
    let id = text(&scene.deliveries("succeeded", 1).await[0], "/id");
    let stranger = install.register().await;
    let calls = [
        (format!("{}/deliveries/{id}/replay", scene.path), json!({})),
        (format!("{}/recover", scene.path), json!({"since": "2026-01-01T00:00:00Z"})),
        (format!("{}/test", scene.path), json!({})),
        (format!("{}/rotate-secret", scene.path), json!({})),
    ];
    let other = scene.owner.subscribe(&scene.product, scene.receiver.url()).await;
    let elsewhere = format!("/products/{}/webhooks/{}/deliveries/{id}/replay", scene.product.id, other.id);
    for (path, body) in &calls {
        stranger.post(path, body.clone()).await.refused(Reason::NotFound);
        scene.owner.in_test_mode().post(path, body.clone()).await.refused(Reason::NotFound);
    }
    scene.owner.post(&elsewhere, json!({})).await.refused(Reason::NotFound);
    let reader = scene.owner.create_key(json!({"name": "Reader", "scope": "read_only"})).await;
    let reader = install.api().with_key(&reader.token);
    for (path, body) in &calls {
        reader.post(&format!("/api/v1{path}"), body.clone()).await.refused(Reason::ScopeInsufficient);
    }
    assert_eq!(scene.receiver.deliveries().len(), 1, "nothing was sent");
}
