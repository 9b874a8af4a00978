//! Webhooks of teams, and those of products as a team's integrations manage them.

use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{
    Account, Installation, Receiver, on_both_kinds,
    people::{Webhook, text},
};
use serde_json::{Value, json};

on_both_kinds! {
    a_team_has_webhooks_of_its_own,
    what_a_webhook_of_a_team_cannot_be_is_refused,
    nobody_else_reaches_the_webhooks_of_a_team,
    an_integration_manages_the_webhooks_of_products,
    the_team_is_told_of_its_keys_in_their_mode_and_never_the_key_itself,
}

fn of_team(owner: &Account) -> String {
    format!("/teams/{}/webhooks", owner.team_id)
}

async fn a_team_has_webhooks_of_its_own(install: Installation) {
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let webhooks = of_team(&owner);
    let body = json!({"url": receiver.url(), "events": ["api_key.created", "quota.warning"]});
    let created = owner.post(&webhooks, body).await;
    let webhook = Webhook::of(created.gives(201));
    assert!(webhook.secret.starts_with("whsec_"));
    assert_eq!(created.json["productId"], Value::Null);
    let of_product = owner.subscribe(&product, receiver.url()).await;

    let path = format!("{webhooks}/{}", webhook.id);
    let got = owner.get(&path).await;
    assert_eq!(got.gives(200)["events"], json!(["api_key.created", "quota.warning"]));
    assert!(!got.text().contains(&webhook.secret), "a secret is shown once");
    let ids = |json: &Value| -> Vec<String> {
        json["webhooks"].as_array().unwrap().iter().map(|webhook| text(webhook, "/id")).collect()
    };
    assert_eq!(ids(owner.get(&webhooks).await.gives(200)), [webhook.id.as_str()]);
    let of_products = format!("/products/{}/webhooks", product.id);
    assert_eq!(ids(owner.get(&of_products).await.gives(200)), [of_product.id.as_str()]);
    owner.get(&format!("{of_products}/{}", webhook.id)).await.refused(Reason::NotFound);
    owner.get(&format!("{webhooks}/{}", of_product.id)).await.refused(Reason::NotFound);
    // What is no product is not the team.
    owner.get("/products//webhooks").await.refused(Reason::NotFound);
    // The other world of the same team.
    assert_eq!(ids(owner.in_test_mode().get(&webhooks).await.gives(200)), Vec::<String>::new());
    owner.in_test_mode().get(&path).await.refused(Reason::NotFound);

    let patched = owner.patch(&path, json!({"status": "paused", "events": ["alert.created"]})).await;
    assert_eq!((&patched.gives(200)["status"], &patched.json["events"]), (&json!("paused"), &json!(["alert.created"])));
    assert_eq!(owner.get(&format!("{path}/deliveries")).await.gives(200)["deliveries"], json!([]));
    owner.get(&format!("{path}/deliveries/dlv_00000000000000000000000000")).await.refused(Reason::NotFound);
    owner.delete(&path).await.gives(204);
    owner.get(&path).await.refused(Reason::NotFound);
}

async fn what_a_webhook_of_a_team_cannot_be_is_refused(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let (webhooks, url) = (of_team(&owner), "https://example.com/hook");
    owner.post(&webhooks, json!({"url": "ftp://example.com", "events": ["api_key.created"]})).await.refused_for("url");
    owner.post(&webhooks, json!({"url": url, "events": []})).await.refused_for("events");
    let mixed = json!({"url": url, "events": ["api_key.created", "license.created"]});
    owner.post(&webhooks, mixed).await.refused_for("events[1]");
    let of_products = format!("/products/{}/webhooks", product.id);
    owner.post(&of_products, json!({"url": url, "events": ["api_key.created"]})).await.refused_for("events[0]");
    // A webhook belongs to one of them.
    let both = json!({"url": url, "events": ["api_key.created"], "productId": product.id});
    owner.post(&webhooks, both).await.refused_for("teamId");
    let both = json!({"url": url, "events": ["license.created"], "teamId": owner.team_id});
    owner.post(&of_products, both).await.refused_for("teamId");
    assert_eq!(owner.get(&webhooks).await.gives(200)["webhooks"], json!([]));
    assert_eq!(owner.get(&of_products).await.gives(200)["webhooks"], json!([]));
}

async fn nobody_else_reaches_the_webhooks_of_a_team(install: Installation) {
    let (owner, other) = (install.register().await, install.register().await);
    let product = owner.create_product("App").await;
    let webhooks = of_team(&owner);
    let body = json!({"url": "https://example.com/hook", "events": ["api_key.created"]});
    let webhook = Webhook::of(owner.post(&webhooks, body.clone()).await.gives(201));
    let path = format!("{webhooks}/{}", webhook.id);
    for client in [owner.server(&product), (*other).clone(), other.for_team(&owner.team_id)] {
        for answer in [
            client.get(&webhooks).await,
            client.post(&webhooks, body.clone()).await,
            client.get(&path).await,
            client.patch(&path, json!({"status": "paused"})).await,
            client.delete(&path).await,
            client.get(&format!("{path}/deliveries")).await,
        ] {
            answer.refused(Reason::NotFound);
            assert!(!answer.text().contains(&webhook.id));
        }
    }
    // Keys of the team belong on another surface, where teams have no webhooks.
    owner.integration().get(&webhooks).await.refused(Reason::InvalidCredentials);
    assert_eq!(owner.get(&path).await.gives(200)["status"], "active");
}

async fn an_integration_manages_the_webhooks_of_products(install: Installation) {
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let team = owner.integration();
    let webhooks = format!("/api/v1/products/{}/webhooks", product.id);
    let body = json!({"url": receiver.url(), "events": ["license.created"]});
    let created = team.post(&webhooks, body).await;
    let webhook = Webhook::of(created.gives(201));
    assert_eq!((&created.json["product_id"], &created.json["status"]), (&json!(product.id), &json!("active")));
    let path = format!("{webhooks}/{}", webhook.id);
    let license = team.post("/api/v1/licenses", json!({"product_id": product.id})).await;
    let [delivery] = receiver.received(1).await.try_into().unwrap();
    delivery.is_signed_with(&webhook.secret);
    assert_eq!(delivery.json["data"]["id"], license.gives(201)["id"]);
    let listed = team.get(&format!("{path}/deliveries")).await;
    assert_eq!(listed.gives(200)["deliveries"][0]["id"], delivery.header("webhook-id"));
    assert_eq!(team.patch(&path, json!({"status": "paused"})).await.gives(200)["status"], "paused");
    install.register().await.integration().get(&path).await.refused(Reason::NotFound);
    team.delete(&path).await.gives(204);
    team.get(&path).await.refused(Reason::NotFound);
}

async fn the_team_is_told_of_its_keys_in_their_mode_and_never_the_key_itself(install: Installation) {
    let (live, test, product_side) = (Receiver::start().await, Receiver::start().await, Receiver::start().await);
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    owner.subscribe(&product, product_side.url()).await;
    let subscribe = async |owner: &Account, receiver: &Receiver| {
        let body = json!({"url": receiver.url(), "events": ["api_key.created", "api_key.revoked"]});
        Webhook::of(owner.post(&of_team(owner), body).await.gives(201))
    };
    let of_live = subscribe(&owner, &live).await;
    let of_test = subscribe(&owner.in_test_mode(), &test).await;
    for (receiver, webhook, mode) in [(&live, &of_live, "live"), (&test, &of_test, "test")] {
        let keys = format!("/teams/{}/api-keys", owner.team_id);
        let created = owner.post(&keys, json!({"name": "CI", "mode": mode})).await;
        let (id, key) = (text(created.gives(201), "/id"), text(&created.json, "/key"));
        let [told] = receiver.received(1).await.try_into().unwrap();
        told.is_signed_with(&webhook.secret);
        assert_eq!((told.event(), &told.json["data"]["id"]), ("api_key.created", &json!(id)));
        assert_eq!((&told.json["data"]["name"], &told.json["data"]["mode"]), (&json!("CI"), &json!(mode)));
        assert_eq!(told.json["data"]["prefix"], created.json["prefix"]);
        assert_eq!(told.json["data"]["expiresAt"], created.json["expiresAt"]);
        assert!(!told.json.to_string().contains(&key), "the key is shown once, and not here");

        owner.delete(&format!("{keys}/{id}")).await.gives(200);
        let arrived = receiver.received(2).await;
        assert_eq!((arrived[1].event(), &arrived[1].json["data"]["id"]), ("api_key.revoked", &json!(id)));
        let asking = if mode == "test" { owner.in_test_mode() } else { owner.clone() };
        let listed = asking.get(&format!("{}/{}/deliveries", of_team(&owner), webhook.id)).await;
        assert_eq!(listed.gives(200)["deliveries"].as_array().unwrap().len(), 2);
    }
    assert_eq!((live.deliveries().len(), test.deliveries().len()), (2, 2), "each in its own world");
    assert!(product_side.deliveries().is_empty(), "a product hears nothing of the team");
}
