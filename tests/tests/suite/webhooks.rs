//! Webhooks on their way: tried again, paused, held, told once, and never sent where they may not go.

use std::{collections::BTreeSet, time::Duration};

use paperkey_kit::{clock::Clock, values::rfc3339};
use paperkey_tests::{
    Account, Installation, Product, Receiver, Settings, eventually, on_both_kinds,
    people::{Webhook, text, time_ms},
    receiver::Delivery,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;

on_both_kinds! {
    a_failed_delivery_is_tried_again_under_the_same_id_and_logged,
    what_a_paused_webhook_misses_is_held_and_sent_when_it_is_resumed,
    ten_failures_in_a_row_pause_a_webhook_and_delay_no_other,
    a_receiver_that_is_gone_for_good_pauses_its_webhook_at_once,
    a_receiver_that_asks_to_be_left_alone_is,
    an_expired_licence_is_told_once_and_again_after_it_was_extended,
    a_webhook_hears_only_what_it_subscribed_to,
    an_address_or_event_that_cannot_be_is_refused,
}

async fn subscribed(install: &Installation, receiver: &Receiver) -> (Account, Product, Webhook, String) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let webhook = owner.subscribe(&product, receiver.url()).await;
    let path = format!("/products/{}/webhooks/{}", product.id, webhook.id);
    (owner, product, webhook, path)
}

async fn a_failed_delivery_is_tried_again_under_the_same_id_and_logged(install: Installation) {
    let receiver = Receiver::start().await;
    let (owner, product, webhook, path) = subscribed(&install, &receiver).await;

    receiver.answers(500);
    owner.issue(&product, json!({})).await;
    receiver.wait("two attempts", |arrived| (arrived.len() >= 2).then_some(())).await;
    receiver.answers(200);
    let arrived =
        receiver.wait("a success", |arrived| arrived.iter().any(|d| d.answered == 200).then(|| arrived.to_vec())).await;
    let ids: BTreeSet<_> = arrived.iter().map(|delivery| delivery.header("webhook-id").to_owned()).collect();
    assert_eq!(ids.len(), 1, "every attempt bears the id of its delivery");
    for delivery in &arrived {
        delivery.is_signed_with(&webhook.secret);
    }
    let delivery_id = ids.into_iter().next().unwrap();
    let logged = eventually("the success is logged", || async {
        let answer = owner.get(&format!("{path}/deliveries/{delivery_id}")).await;
        (answer.gives(200)["status"] == "succeeded").then_some(answer)
    })
    .await;
    let attempts = logged.json["attempts"].as_array().unwrap().clone();
    assert_eq!(attempts.len(), arrived.len());
    // What was sent is shown as it was, to whoever may read licences.
    let sent = String::from_utf8(arrived[0].body.to_vec()).unwrap();
    assert_eq!(logged.json["payload"], Value::from(sent.as_str()));
    let one = format!("{path}/deliveries/{delivery_id}");
    let mate = owner.team_mate(&install, "member").await;
    assert_eq!(mate.for_team(&owner.team_id).get(&one).await.gives(200)["payload"], Value::from(sent));
    let blind = owner.create_key(json!({"name": "Blind", "scopes": ["webhooks:read"]})).await;
    let blind = install.api().with_key(&blind.token).get(&one.replace("/products", "/api/v1/products")).await;
    assert_eq!((&blind.gives(200)["payload"], &blind.json["status"]), (&Value::Null, &json!("succeeded")));
    assert_eq!(attempts[0]["responseStatus"], 500);
    assert_eq!(attempts.last().unwrap()["responseStatus"], 200);
    assert_eq!(attempts.last().unwrap()["responseSnippet"], "thank you");
    let listed = owner.get(&format!("{path}/deliveries")).await;
    assert_eq!(listed.gives(200)["deliveries"][0]["id"], Value::from(delivery_id));
    assert_eq!(listed.json["deliveries"][0]["attemptsCount"], attempts.len());
}

async fn what_a_paused_webhook_misses_is_held_and_sent_when_it_is_resumed(install: Installation) {
    let receiver = Receiver::start().await;
    let (owner, product, _, path) = subscribed(&install, &receiver).await;
    owner.patch(&path, json!({"status": "paused"})).await.gives(200);
    let held = owner.issue(&product, json!({})).await;
    // That it is held shows in its log; that nothing was sent, at the receiver.
    eventually("the delivery is held", || async {
        let answer = owner.get(&format!("{path}/deliveries")).await;
        let newest = answer.gives(200)["deliveries"][0].clone();
        (newest["status"] == "pending" && newest["attemptsCount"] == 0).then_some(())
    })
    .await;
    assert!(receiver.deliveries().is_empty(), "nothing is sent to a paused webhook");
    let resumed = owner.patch(&path, json!({"status": "active"})).await;
    assert_eq!(resumed.gives(200)["consecutiveFailures"], 0);
    receiver
        .wait("what was held", |arrived| arrived.iter().any(|d| d.json["data"]["id"] == held.id.as_str()).then_some(()))
        .await;
}

async fn status_becomes(owner: &Account, path: &str, status: &str) -> Value {
    eventually(&format!("the webhook is {status}"), || async {
        let answer = owner.get(path).await;
        (answer.gives(200)["status"] == status).then_some(answer.json)
    })
    .await
}

async fn ten_failures_in_a_row_pause_a_webhook_and_delay_no_other(install: Installation) {
    let (dead, alive) = (Receiver::start().await, Receiver::start().await);
    dead.answers(500);
    let (owner, product, _, path) = subscribed(&install, &dead).await;
    let healthy = owner.subscribe(&product, alive.url()).await;
    for _ in 0..10 {
        owner.issue(&product, json!({})).await;
    }
    let paused = status_becomes(&owner, &path, "paused").await;
    assert!(paused["consecutiveFailures"].as_i64().is_some_and(|failures| failures >= 10), "{paused}");
    let arrived = alive.received(10).await;
    for delivery in &arrived {
        delivery.is_signed_with(&healthy.secret);
    }
    let other = format!("/products/{}/webhooks/{}", product.id, healthy.id);
    assert_eq!(owner.get(&other).await.gives(200)["status"], "active");

    dead.answers(200);
    owner.patch(&path, json!({"status": "active"})).await.gives(200);
    let delivered = |arrived: &[Delivery]| {
        let good = arrived.iter().filter(|delivery| delivery.answered == 200);
        let events: BTreeSet<_> = good.map(|delivery| delivery.event_id().to_owned()).collect();
        (events.len() == 10).then_some(())
    };
    dead.wait("all that was held", delivered).await;
}

async fn a_receiver_that_is_gone_for_good_pauses_its_webhook_at_once(install: Installation) {
    let receiver = Receiver::start().await;
    receiver.answers(410);
    let (owner, product, _, path) = subscribed(&install, &receiver).await;
    owner.issue(&product, json!({})).await;
    status_becomes(&owner, &path, "paused").await;
    assert_eq!(receiver.deliveries().len(), 1);
}

async fn a_receiver_that_asks_to_be_left_alone_is(install: Installation) {
    let receiver = Receiver::start().await;
    receiver.answers_later(503, 3_600);
    let (owner, product, _, path) = subscribed(&install, &receiver).await;
    owner.issue(&product, json!({})).await;
    let waiting = eventually("the first attempt has failed", || async {
        let answer = owner.get(&format!("{path}/deliveries")).await;
        let newest = answer.gives(200)["deliveries"][0].clone();
        (newest["attemptsCount"] == 1).then_some(newest)
    })
    .await;
    let (last, next) = (text(&waiting, "/lastAttemptAt"), text(&waiting, "/nextAttemptAt"));
    assert!(time_ms(&next) - time_ms(&last) >= 3_600_000, "after an hour at the earliest: {last}, {next}");
    // Its owner need not wait as long.
    receiver.answers(200);
    let replay = format!("{path}/deliveries/{}/replay", text(&waiting, "/id"));
    owner.post(&replay, json!({})).await.gives(200);
    let arrived = receiver.received(2).await;
    assert_eq!(arrived[0].header("webhook-id"), arrived[1].header("webhook-id"));
}

async fn an_expired_licence_is_told_once_and_again_after_it_was_extended(install: Installation) {
    let receiver = Receiver::start().await;
    let (owner, product, _, _) = subscribed(&install, &receiver).await;
    let soon = || json!(rfc3339(Clock::system().now_ms() + 1_000));
    let license = owner.issue(&product, json!({"expiresAt": soon()})).await;
    let expired = |times: usize| {
        move |arrived: &[Delivery]| {
            let told: Vec<Delivery> =
                arrived.iter().filter(|delivery| delivery.event() == "license.expired").cloned().collect();
            (told.len() >= times).then_some(told)
        }
    };
    // The promise is a minute, which is how long is waited.
    let told = receiver.wait("the expiry", expired(1)).await;
    assert_eq!(told[0].json["data"]["id"], license.id.as_str());
    assert_eq!(told[0].json["data"]["status"], "expired");
    assert_eq!(owner.app(&product).verdict(&license).await, "expired");
    owner.patch(&format!("/licenses/{}", license.id), json!({"expiresAt": soon()})).await.gives(200);
    let told = receiver.wait("the second expiry", expired(2)).await;
    let ids: BTreeSet<&str> = told.iter().map(Delivery::event_id).collect();
    assert_eq!((told.len(), ids.len()), (2, 2), "each expiry is told once");
}

async fn a_webhook_hears_only_what_it_subscribed_to(install: Installation) {
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let (product, other) = (owner.create_product("App").await, owner.create_product("Other").await);
    let path = format!("/products/{}/webhooks", product.id);
    owner.post(&path, json!({"url": receiver.url(), "events": ["license.revoked"]})).await.gives(201);
    let license = owner.issue(&product, json!({})).await;
    let elsewhere = owner.issue(&other, json!({})).await;
    owner.revoke(&elsewhere).await.gives(200);
    owner.reinstate(&license).await.gives(200);
    owner.revoke(&license).await.gives(200);
    let arrived = receiver.received(1).await;
    assert_eq!(arrived[0].json["data"]["id"], license.id.as_str());
    let listed = owner.get(&path).await;
    let id = listed.gives(200)["webhooks"][0]["id"].as_str().unwrap().to_owned();
    let deliveries = owner.get(&format!("{path}/{id}/deliveries")).await;
    assert_eq!(deliveries.gives(200)["deliveries"].as_array().map(Vec::len), Some(1), "nothing else is on its way");
}

async fn an_address_or_event_that_cannot_be_is_refused(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let path = format!("/products/{}/webhooks", product.id);
    for url in [
        "",
        "nonsense",
        "ftp://example.com/",
        "javascript:alert(1)",
        "https://",
        "https:///x",
        "http://user:pw@example.com/",
        "https://exa mple.com/",
        "https://example.com:99999/",
        "file:///etc/passwd",
        "https://\u{0}/",
    ] {
        let answer = owner.post(&path, json!({"url": url, "events": ["license.created"]})).await;
        assert_eq!(answer.status, 400, "{url:?}: {}", answer.text());
        answer.refused_for("url");
    }
    for events in [json!([]), json!(["nonsense"]), json!(["license.created", "license.created"]), json!([""])] {
        let answer = owner.post(&path, json!({"url": "https://example.com/", "events": events})).await;
        assert_eq!(answer.status, 400, "{events}: {}", answer.text());
    }
    assert_eq!(owner.get(&path).await.gives(200)["webhooks"], json!([]));
}

/// As installed: neither http nor private addresses.
fn careful() -> Settings {
    let off = |name| (name, "false".to_owned());
    let environment = vec![off("PAPERKEY__WEBHOOKS__ALLOW_HTTP"), off("PAPERKEY__WEBHOOKS__ALLOW_PRIVATE_NETWORKS")];
    Settings { environment, ..Settings::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_leave_nothing_is_sent_in_the_clear_nor_into_private_networks() {
    let install = Installation::all_in_one_with(careful()).await;
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let path = format!("/products/{}/webhooks", product.id);
    let plain = json!({"url": "http://example.com/hook", "events": ["license.created"]});
    owner.post(&path, plain).await.refused_for("url");

    // Somebody listens; nobody may ever call.
    let private = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = private.local_addr().unwrap().port();
    let hosts = ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "127.1", "2130706433", "0x7f.1", "0.0.0.0"];
    let mut accepted = 0;
    for host in hosts {
        let body = json!({"url": format!("https://{host}:{port}/hook"), "events": ["license.created"]});
        let answer = owner.post(&path, body).await;
        // Some addresses are known to be private when they are written, others when they are resolved.
        if answer.status == 201 {
            accepted += 1;
        } else {
            answer.refused_for("url");
        }
    }
    owner.issue(&product, json!({})).await;
    let listed = owner.get(&path).await;
    let webhooks = listed.gives(200)["webhooks"].as_array().unwrap().clone();
    assert_eq!(webhooks.len(), accepted);
    for webhook in webhooks {
        let path = format!("{path}/{}/deliveries", webhook["id"].as_str().unwrap());
        eventually("the delivery is refused", || async {
            let answer = owner.get(&path).await;
            let delivery = answer.gives(200)["deliveries"][0].clone();
            assert_eq!(delivery["responseStatus"], Value::Null, "{delivery}");
            delivery["error"].is_string().then_some(())
        })
        .await;
    }
    let called = tokio::time::timeout(Duration::ZERO, private.accept()).await;
    assert!(called.is_err(), "a private address was called");
}
