//! `Idempotency-Key`: a call that is sent again takes effect once, for every method that the contract says it of.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use http::Method;
use paperkey_proto::{
    Contract,
    catalog::v1::{CreateProductRequest, CreateProductResponse},
    errors::v1::Reason,
};
use paperkey_tests::{Account, Answer, Api, Installation, Receiver, eventually, grpc, on_both_kinds, people::text};
use serde_json::{Value, json};

on_both_kinds! {
    every_method_that_says_so_takes_effect_once,
    a_key_is_for_one_request_of_one_credential,
    two_at_once_make_one,
    an_answer_outlives_the_process_that_gave_it,
    a_refusal_is_replayed_and_a_limit_is_not,
    a_page_is_told_the_same_again_over_grpc_web,
}

/// A call to a method, and who makes it.
struct Call {
    rpc: &'static str,
    caller: Api,
    path: String,
    body: Value,
}

/// One call to each method that takes the header. Each succeeds, and would do something else the second time.
async fn calls(install: &Installation) -> Vec<Call> {
    let (owner, receiver) = (install.register().await, Receiver::start().await);
    let mate = install.register().await;
    let product = owner.create_product("App").await;
    let [revoked, reinstated, activated] = [
        owner.issue(&product, json!({})).await,
        owner.issue(&product, json!({})).await,
        owner.issue(&product, json!({})).await,
    ];
    owner.revoke(&reinstated).await.gives(200);
    let app = owner.app(&product).0;
    owner.app(&product).activate(&revoked, "bound").await.gives(200);
    let team = owner.team_id.clone();
    let invitation = owner.invite(&mate.email, "member").await;
    let rotated = owner.create_key(json!({"name": "Rotated"})).await;
    let by_itself = owner.create_key(json!({"name": "By itself"})).await;
    let webhook = owner.subscribe(&product, receiver.url()).await;
    let webhook = format!("/products/{}/webhooks/{}", product.id, webhook.id);
    owner.issue(&product, json!({})).await;
    let delivery = eventually("something was sent", || async {
        let answer = owner.get(&format!("{webhook}/deliveries")).await;
        let newest = answer.gives(200)["deliveries"][0].clone();
        (newest["status"] == "succeeded").then(|| text(&newest, "/id"))
    })
    .await;
    let call = |rpc, caller: &Api, path: &str, body| Call { rpc, caller: caller.clone(), path: path.to_owned(), body };
    let hook = json!({"url": receiver.url(), "events": ["license.created"]});
    let integration = owner.integration();
    vec![
        call("CreateProduct", &owner, "/products", json!({"name": "Twice"})),
        call("CreateProductApiKey", &owner, &format!("/products/{}/api-keys", product.id), json!({})),
        call("CreateClient", &integration, "/api/v1/clients", json!({"name": "Twice"})),
        call("CreateLicense", &owner, "/licenses", json!({"productId": product.id})),
        call(
            "ActivateLicense",
            &app,
            "/v1/licenses/activate",
            json!({"license_key": activated.key, "fingerprint": "one"}),
        ),
        call(
            "DeactivateLicense",
            &app,
            "/v1/licenses/deactivate",
            json!({"license_key": revoked.key, "fingerprint": "bound"}),
        ),
        call("RevokeLicense", &owner, &format!("/licenses/{}/revoke", revoked.id), json!({})),
        call("ReinstateLicense", &owner, &format!("/licenses/{}/reinstate", reinstated.id), json!({})),
        call("CreateWebhook", &owner, &format!("/products/{}/webhooks", product.id), hook),
        call("ReplayDelivery", &owner, &format!("{webhook}/deliveries/{delivery}/replay"), json!({})),
        call("RecoverDeliveries", &owner, &format!("{webhook}/recover"), json!({"since": "2026-01-01T00:00:00Z"})),
        call("TestWebhook", &owner, &format!("{webhook}/test"), json!({})),
        call("RotateWebhookSecret", &owner, &format!("{webhook}/rotate-secret"), json!({})),
        call("BatchCreateLicenses", &owner, "/licenses/batch", json!({"licenses": [{"productId": product.id}]})),
        call("CreateApiKey", &owner, &format!("/teams/{team}/api-keys"), json!({"name": "Twice"})),
        call("CreateTemporaryApiKey", &owner, &format!("/teams/{team}/api-keys/temporary"), json!({})),
        call("CreatePlatformApiKey", &integration, "/v1/keys", json!({"name": "Twice", "type": "test"})),
        call("RotateApiKey", &owner, &format!("/teams/{team}/api-keys/{}/rotate", rotated.id), json!({})),
        call("RotateCurrentApiKey", &install.api().with_key(&by_itself.token), "/v1/keys/self/rotate", json!({})),
        call("CreateTeam", &owner, "/teams", json!({"name": "Twice"})),
        call(
            "CreateMember",
            &owner,
            &format!("/teams/{team}/members"),
            json!({"email": paperkey_tests::people::new_email(), "role": "member"}),
        ),
        call("AcceptInvitation", &mate, "/auth/invitations/accept", json!({"token": invitation.token})),
    ]
}

impl Call {
    async fn with(&self, key: &str) -> Answer {
        self.caller.with("idempotency-key", key).post(&self.path, self.body.clone()).await
    }
}

#[track_caller]
fn is_a_replay_of(replay: &Answer, first: &Answer) {
    assert_eq!(replay.header("idempotent-replayed"), Some("true"), "{}: {}", replay.asked, replay.text());
    assert_eq!(first.header("idempotent-replayed"), None, "{}", first.asked);
    assert_eq!((replay.status, &replay.body), (first.status, &first.body), "{}", replay.asked);
    assert_ne!(replay.header("x-request-id"), first.header("x-request-id"), "{}", replay.asked);
}

async fn every_method_that_says_so_takes_effect_once(install: Installation) {
    let calls = calls(&install).await;
    let called: BTreeSet<&str> = calls.iter().map(|call| call.rpc).collect();
    let said: BTreeSet<&str> = Contract::get()
        .methods()
        .iter()
        .filter(|method| method.policy.idempotent)
        .map(|method| method.path.rsplit('/').next().unwrap_or_default())
        .collect();
    assert_eq!(called, said, "the methods that take an Idempotency-Key");
    for call in &calls {
        let first = call.with("the-first").await;
        assert!(first.status.is_success(), "{}: {}", call.rpc, first.text());
        let again = call.with("the-first").await;
        is_a_replay_of(&again, &first);
        let mut other = call.body.clone();
        other["name"] = json!("Somebody else's");
        let mismatch = call.caller.with("idempotency-key", "the-first").post(&call.path, other).await;
        let takes_names = !matches!(mismatch.status.as_u16(), 400);
        if takes_names {
            mismatch.refused(Reason::IdempotencyMismatch);
        }
    }
}

async fn a_key_is_for_one_request_of_one_credential(install: Installation) {
    let owner = install.register().await;
    let create = async |api: &Api, key: &str, name: &str| {
        api.with("idempotency-key", key).post("/products", json!({"name": name})).await
    };
    let first = create(&owner, "key-1", "App").await;
    let id = text(first.gives(201), "/id");
    create(&owner, "key-1", "Another").await.refused(Reason::IdempotencyMismatch);
    assert_ne!(text(create(&owner, "key-2", "App").await.gives(201), "/id"), id, "another key");
    assert_ne!(text(create(&owner.in_test_mode(), "key-1", "App").await.gives(201), "/id"), id, "another mode");
    let stranger = install.register().await;
    assert_ne!(text(create(&stranger, "key-1", "App").await.gives(201), "/id"), id, "another credential");
    let licenses = owner.with("idempotency-key", "key-1").post("/licenses", json!({"productId": id})).await;
    licenses.gives(201);
    for bad in ["", &"x".repeat(256)] {
        create(&owner, bad, "App").await.refused_for("Idempotency-Key");
    }
    let listed = owner.with("idempotency-key", "key-1").get("/products").await;
    assert_eq!(listed.header("idempotent-replayed"), None, "what only reads takes none");
}

async fn two_at_once_make_one(install: Installation) {
    let owner = install.register().await;
    for round in 0..5 {
        let key = format!("round-{round}");
        let create = || async {
            let api = owner.on_new_connections().with("idempotency-key", &key);
            api.post("/products", json!({"name": key})).await
        };
        let answers = join_all((0..8).map(|_| create())).await;
        let mut ids = BTreeSet::new();
        for answer in &answers {
            if answer.status == 409 {
                answer.refused(Reason::Conflict);
            } else {
                ids.insert(text(answer.gives(201), "/apiKey/secretKey"));
            }
        }
        assert_eq!(ids.len(), 1, "one product with one key pair");
        assert_eq!(text(create().await.gives(201), "/apiKey/secretKey"), ids.pop_first().unwrap());
    }
    let products = owner.get("/products?pageSize=100").await;
    assert_eq!(products.gives(200)["products"].as_array().unwrap().len(), 5);
}

async fn an_answer_outlives_the_process_that_gave_it(mut install: Installation) {
    let owner = install.register().await;
    let create = async |owner: &Account| {
        let api = owner.with("idempotency-key", "before-the-crash");
        api.try_call(Method::POST, "/products", Some(json!({"name": "App"}))).await
    };
    let first = create(&owner).await.unwrap();
    first.gives(201);
    let victim = install.host_of("catalog");
    install.kill(victim);
    install.start(victim).await.expect("it starts again");
    let owner = owner.at(&install.api());
    let again =
        eventually("it answers again", || async { create(&owner).await.ok().filter(|answer| answer.status != 503) })
            .await;
    is_a_replay_of(&again, &first);
}

async fn a_refusal_is_replayed_and_a_limit_is_not(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let license = owner.issue(&product, json!({"maxActivations": 1})).await;
    let app = owner.app(&product);
    app.activate(&license, "first").await.gives(200);
    let second = || async {
        let body = json!({"license_key": license.key, "fingerprint": "second"});
        app.0.with("idempotency-key", "second").post("/v1/licenses/activate", body).await
    };
    let refused = second().await;
    refused.refused(Reason::ActivationLimitReached);
    app.deactivate(&license, "first").await.gives(200);
    let again = second().await;
    again.refused(Reason::ActivationLimitReached);
    assert_eq!(again.header("idempotent-replayed"), Some("true"));
    app.activate(&license, "second").await.gives(200);
}

async fn a_page_is_told_the_same_again_over_grpc_web(install: Installation) {
    let owner = install.register().await;
    let page = owner.with("idempotency-key", "once");
    let asked = CreateProductRequest { name: "App".into(), ..CreateProductRequest::default() };
    for as_text in [false, true] {
        let create = || grpc::web_call(&page, "/paperkey.catalog.v1.CatalogService/CreateProduct", &asked, as_text);
        let first: CreateProductResponse = create().await.gives();
        let again: CreateProductResponse = create().await.gives();
        assert_eq!(again, first);
    }
    let refused = CreateProductRequest { name: "Another".into(), ..CreateProductRequest::default() };
    let refused = grpc::web_call(&page, "/paperkey.catalog.v1.CatalogService/CreateProduct", &refused, false).await;
    assert_eq!(refused.status, tonic::Code::FailedPrecondition);
}
