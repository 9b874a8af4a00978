//! The main job, from registration to a checked licence: over REST, gRPC and gRPC-Web, with its webhooks.

use std::collections::BTreeSet;

use paperkey_proto::{
    Contract,
    catalog::v1::{CreateProductRequest, ListProductsRequest, ListProductsResponse, catalog_service_client},
    errors::v1::Reason,
    licensing::v1::{
        ActivateLicenseRequest, CreateLicenseRequest, DeactivateLicenseRequest, LicenseStatus, RevokeLicenseRequest,
        ValidateLicenseRequest, ValidateLicenseResponse, ValidationCode, license_check_service_client,
        licensing_service_client,
    },
};
use paperkey_tests::{
    Account, Installation, Receiver,
    envelope::details,
    grpc, on_both_kinds,
    people::{App, License, text},
    receiver::Delivery,
};
use prost::Message as _;
use prost_reflect::DescriptorPool;
use serde_json::{Value, json};
use tonic::Code;
use tonic_reflection::pb::v1::{
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

on_both_kinds! {
    a_licence_is_sold_used_revoked_and_reinstated,
    the_same_works_over_grpc,
    the_same_works_over_grpc_web,
    reflection_shows_the_public_services_and_resolves_their_files,
    lists_are_paged_newest_first,
    a_vendors_server_manages_its_product_with_the_secret_key,
    an_integration_manages_products_and_licences_with_a_team_key,
    a_patch_leaves_what_is_absent_and_clears_what_is_null,
    a_product_takes_everything_of_its_own_with_it,
    a_licence_key_with_a_typing_error_is_pointed_out,
    a_known_email_is_a_conflict_and_a_wrong_password_is_refused,
}

/// Everything secret that the main job meets.
pub(crate) async fn main_job(install: &Installation) -> Vec<String> {
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let me = owner.get("/auth/me").await;
    assert_eq!(me.gives(200)["teams"][0]["id"], Value::from(owner.team_id.as_str()));
    assert_eq!(me.json["teams"][0]["role"], "owner");
    assert_eq!(me.json["teams"][0]["tier"], "free");

    let product = owner.create_product("App").await;
    assert!(product.public_key.starts_with("pk_") && product.secret_key.starts_with("sk_"), "{product:?}");
    let read = [
        owner.get(&format!("/products/{}", product.id)).await,
        owner.get("/products").await,
        owner.get(&format!("/products/{}/api-keys", product.id)).await,
    ];
    for answer in &read {
        answer.gives(200);
        assert!(!answer.text().contains(&product.secret_key), "{} shows the secret key", answer.asked);
    }

    let webhook = owner.subscribe(&product, receiver.url()).await;
    let shown = owner.get(&format!("/products/{}/webhooks/{}", product.id, webhook.id)).await;
    assert_eq!(shown.gives(200)["status"], "active");
    assert!(!shown.text().contains(&webhook.secret), "the secret of a webhook is shown once");

    let with = json!({"email": "customer@example.com", "maxActivations": 3, "metadata": {"order": 17, "tags": ["a"]}});
    let license = owner.issue(&product, with).await;
    let app = owner.app(&product);
    walk_through_a_licence(&owner, &app, &license).await;

    let deliveries = receiver.received(7).await;
    let logged = owner.get(&format!("/products/{}/webhooks/{}/deliveries", product.id, webhook.id)).await;
    assert_eq!(logged.gives(200)["deliveries"].as_array().map(Vec::len), Some(7), "nothing else is on its way");
    the_events_tell_the_story(&deliveries, &webhook.secret, &product.id, &license);
    vec![
        owner.token.clone(),
        owner.password.clone(),
        owner.free_key.clone(),
        owner.live_key.clone(),
        product.public_key,
        product.secret_key,
        webhook.secret,
        license.key,
    ]
}

async fn walk_through_a_licence(owner: &Account, app: &App, license: &License) {
    let fresh = app.validate(license).await;
    let fresh = fresh.gives(200);
    assert_eq!((&fresh["valid"], &fresh["code"]), (&json!(true), &json!("valid")));
    let expected = json!({
        "id": license.id, "status": "active", "expiresAt": null, "activationsCount": 0, "activationsLimit": 3,
        "isActivated": null, "metadata": {"order": 17, "tags": ["a"]},
    });
    assert_eq!(fresh["license"], expected);

    for (fingerprint, remaining) in [("machine-1", 2), ("machine-2", 1), ("machine-3", 0)] {
        let answer = app.activate(license, fingerprint).await;
        let json = answer.gives(200);
        assert_eq!(json["success"], true);
        assert_eq!(json["activationsRemaining"], remaining);
        assert_eq!(json["activation"]["fingerprint"], fingerprint);
        assert_eq!(json["activation"]["name"], "MacBook Pro");
    }
    let again = app.activate(license, "machine-1").await;
    assert_eq!(again.gives(200)["activationsRemaining"], 0, "the same machine takes no further slot");
    app.activate(license, "machine-4").await.refused(Reason::ActivationLimitReached);

    let known = app.validate_on(license, "machine-2").await;
    assert_eq!(known.gives(200)["license"]["isActivated"], true);
    assert_eq!(known.json["code"], "valid");
    let unknown = app.validate_on(license, "machine-4").await;
    assert_eq!(unknown.gives(200)["code"], "activation_limit_reached");
    assert_eq!(unknown.json["license"]["isActivated"], false);
    assert_eq!(unknown.json["valid"], false);

    let freed = app.deactivate(license, "machine-2").await;
    assert_eq!(freed.gives(200), &json!({"success": true, "activationsRemaining": 1}));
    app.deactivate(license, "machine-2").await.refused(Reason::NotFound);

    assert_eq!(owner.revoke(license).await.gives(200)["status"], "revoked");
    assert_eq!(app.verdict(license).await, "revoked");
    app.activate(license, "machine-5").await.refused(Reason::LicenseRevoked);
    let reinstated = owner.reinstate(license).await;
    assert_eq!(reinstated.gives(200)["status"], "active");
    assert_eq!(reinstated.json["revokedAt"], Value::Null);
    assert_eq!(app.verdict(license).await, "valid");

    let whole = owner.get(&format!("/licenses/{}", license.id)).await;
    let whole = whole.gives(200);
    assert_eq!(whole["key"], Value::from(license.key.as_str()));
    assert_eq!(whole["activationsCount"], 2);
    let machines: BTreeSet<_> =
        whole["activations"].as_array().into_iter().flatten().filter_map(|a| a["fingerprint"].as_str()).collect();
    assert_eq!(machines, BTreeSet::from(["machine-1", "machine-3"]));
}

fn the_events_tell_the_story(deliveries: &[Delivery], secret: &str, product_id: &str, license: &License) {
    let mut told: Vec<&str> = deliveries.iter().map(Delivery::event).collect();
    told.sort_unstable();
    let story = [
        "activation.created",
        "activation.created",
        "activation.created",
        "activation.removed",
        "license.created",
        "license.reinstated",
        "license.revoked",
    ];
    assert_eq!(told, story);
    let ids: BTreeSet<&str> = deliveries.iter().map(Delivery::event_id).collect();
    assert_eq!(ids.len(), deliveries.len(), "each event is told once");
    for delivery in deliveries {
        delivery.is_signed_with(secret);
        assert!(text(&delivery.json, "/createdAt").ends_with('Z'), "{}", delivery.json);
        let data = &delivery.json["data"];
        if delivery.event().starts_with("license.") {
            assert_eq!(data["id"], Value::from(license.id.as_str()));
            assert_eq!(data["key"], Value::from(license.key.as_str()));
            assert_eq!(data["productId"], product_id);
            assert_eq!(data["email"], "customer@example.com");
            assert_eq!(data["maxActivations"], 3);
            assert_eq!(data["expiresAt"], Value::Null);
            assert_eq!(data["metadata"], json!({"order": 17, "tags": ["a"]}));
            let status = if delivery.event() == "license.revoked" { "revoked" } else { "active" };
            assert_eq!(data["status"], status);
        } else {
            assert!(text(data, "/id").starts_with("act_"), "{data}");
            assert_eq!(data["licenseId"], Value::from(license.id.as_str()));
            assert_eq!(data["licenseKey"], Value::from(license.key.as_str()));
            assert_eq!(data["name"], "MacBook Pro");
            assert!(text(data, "/createdAt").ends_with('Z'), "{data}");
        }
    }
    let removed = deliveries.iter().find(|delivery| delivery.event() == "activation.removed");
    assert_eq!(removed.map(|delivery| &delivery.json["data"]["fingerprint"]), Some(&json!("machine-2")));
}

async fn a_licence_is_sold_used_revoked_and_reinstated(install: Installation) {
    let secrets = main_job(&install).await;
    assert_eq!(secrets.len(), 8);
}

async fn the_same_works_over_grpc(install: Installation) {
    let owner = install.register().await;
    let channel = grpc::connect(&install.url()).await;
    let bearer = grpc::Bearer::new(&owner.token);
    let mut catalog = catalog_service_client::CatalogServiceClient::with_interceptor(channel.clone(), bearer.clone());
    let mut licensing =
        licensing_service_client::LicensingServiceClient::with_interceptor(channel.clone(), bearer.clone());

    let created = catalog.create_product(CreateProductRequest { name: "App".into(), ..Default::default() }).await;
    let created = created.unwrap().into_inner();
    let (product_id, pair) = (created.product.unwrap().id, created.api_key.unwrap());
    assert!(pair.secret_key.starts_with("sk_"));
    let public_key = pair.api_key.unwrap().public_key;

    let request =
        CreateLicenseRequest { product_id: product_id.clone(), max_activations: Some(3), ..Default::default() };
    let license = licensing.create_license(request).await.unwrap().into_inner().license.unwrap();
    assert_eq!(license.status(), LicenseStatus::Active);

    let bearer = grpc::Bearer::new(&public_key);
    let mut app = license_check_service_client::LicenseCheckServiceClient::with_interceptor(channel, bearer);
    let validate = |fingerprint: Option<&str>| ValidateLicenseRequest {
        license_key: license.key.clone(),
        fingerprint: fingerprint.map(str::to_owned),
    };
    let activate = |fingerprint: &str| ActivateLicenseRequest {
        license_key: license.key.clone(),
        fingerprint: fingerprint.to_owned(),
        name: None,
    };
    assert!(app.validate_license(validate(None)).await.unwrap().into_inner().valid);
    for (fingerprint, remaining) in [("a", 2), ("b", 1), ("c", 0), ("a", 0)] {
        let answer = app.activate_license(activate(fingerprint)).await.unwrap().into_inner();
        assert_eq!(answer.activations_remaining, Some(remaining), "{fingerprint}");
        assert_eq!(answer.activation.unwrap().fingerprint, fingerprint);
    }
    grpc::refused(app.activate_license(activate("d")).await, Reason::ActivationLimitReached);
    let request = DeactivateLicenseRequest { license_key: license.key.clone(), fingerprint: "b".into() };
    assert!(app.deactivate_license(request).await.unwrap().into_inner().success);

    let revoked = licensing.revoke_license(RevokeLicenseRequest { id: license.id.clone() }).await.unwrap();
    assert_eq!(revoked.into_inner().license.unwrap().status(), LicenseStatus::Revoked);
    let verdict = app.validate_license(validate(Some("a"))).await.unwrap().into_inner();
    assert_eq!((verdict.valid, verdict.code()), (false, ValidationCode::Revoked));
    grpc::refused(app.activate_license(activate("e")).await, Reason::LicenseRevoked);

    let nameless = catalog.create_product(CreateProductRequest::default()).await;
    grpc::refused(nameless, Reason::ValidationFailed);
    let answered = catalog.list_products(ListProductsRequest::default()).await.unwrap();
    let id = answered.metadata().get("x-request-id").and_then(|id| id.to_str().ok()).unwrap_or_default();
    assert!(id.starts_with("req_"), "gRPC answers bear a request id too: {:?}", answered.metadata());
}

async fn the_same_works_over_grpc_web(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let license = owner.issue(&product, json!({})).await;
    let app = install.api().with_key(&product.public_key);
    let rpc = "/paperkey.licensing.v1.LicenseCheckService/ValidateLicense";
    let asked = ValidateLicenseRequest { license_key: license.key, fingerprint: None };
    for text in [false, true] {
        let answer = grpc::web_call(&app, rpc, &asked, text).await;
        assert_eq!(answer.status, Code::Ok);
        let verdict = ValidateLicenseResponse::decode(answer.message.unwrap()).unwrap();
        assert_eq!((verdict.valid, verdict.license.unwrap().id), (true, license.id.clone()));

        let listed = grpc::web_call(
            &owner,
            "/paperkey.catalog.v1.CatalogService/ListProducts",
            &ListProductsRequest::default(),
            text,
        )
        .await;
        let listed = ListProductsResponse::decode(listed.message.unwrap()).unwrap();
        assert_eq!(listed.products.iter().map(|product| &product.id).collect::<Vec<_>>(), [&product.id]);

        let refused = grpc::web_call(&install.api(), rpc, &asked, text).await;
        assert_eq!((refused.status, refused.message), (Code::Unauthenticated, None));
        let broken = grpc::web_call(&app, rpc, &ValidateLicenseRequest::default(), text).await;
        assert_eq!(broken.status, Code::InvalidArgument);
    }
}

async fn reflection_shows_the_public_services_and_resolves_their_files(install: Installation) {
    let owner = install.register().await;
    let channel = grpc::connect(&install.url()).await;
    let services = grpc::reflected_services(&channel, Some(&owner.live_key)).await.unwrap();
    let public: BTreeSet<&str> =
        Contract::get().methods().iter().filter(|method| method.is_public()).map(|m| m.service.as_str()).collect();
    let shown: BTreeSet<&str> =
        services.iter().map(String::as_str).filter(|name| name.starts_with("paperkey.")).collect();
    assert_eq!(shown, public, "reflection shows every public service, and no other of ours");

    let symbol = "paperkey.licensing.v1.LicenseCheckService".to_owned();
    let answer =
        grpc::reflect(&channel, Some(&owner.live_key), MessageRequest::FileContainingSymbol(symbol.clone())).await;
    let MessageResponse::FileDescriptorResponse(files) = answer.unwrap() else { panic!("no file for {symbol}") };
    let mut pool = DescriptorPool::new();
    let mut waiting: Vec<Vec<u8>> = files.file_descriptor_proto;
    // Files come in any order, and what they import is asked for by name.
    while let Some(bytes) = waiting.pop() {
        let file = prost_types::FileDescriptorProto::decode(bytes.as_slice()).unwrap();
        let missing = file.dependency.iter().find(|name| pool.get_file_by_name(name).is_none()).cloned();
        match missing {
            None => pool.decode_file_descriptor_proto(bytes.as_slice()).unwrap(),
            Some(name) => {
                let answer =
                    grpc::reflect(&channel, Some(&owner.live_key), MessageRequest::FileByFilename(name.clone())).await;
                let MessageResponse::FileDescriptorResponse(files) = answer.unwrap() else { panic!("no file {name}") };
                waiting.push(bytes);
                waiting.extend(files.file_descriptor_proto);
            }
        }
    }
    let service = pool.get_service_by_name(&symbol).expect("the files define the service");
    assert_eq!(service.methods().len(), 3);

    let internal = "paperkey.auth.v1.CredentialService".to_owned();
    let answer = grpc::reflect(&channel, Some(&owner.live_key), MessageRequest::FileContainingSymbol(internal)).await;
    assert!(!matches!(answer, Ok(MessageResponse::FileDescriptorResponse(_))), "{answer:?}");
}

async fn lists_are_paged_newest_first(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let mut issued = Vec::new();
    for number in 0..5 {
        issued.push(owner.issue(&product, json!({"email": format!("c{number}@example.com")})).await.id);
    }
    issued.reverse();
    let mut path = format!("/licenses?productId={}&pageSize=2", product.id);
    let (mut listed, mut pages) = (Vec::new(), 0);
    loop {
        let page = owner.get(&path).await;
        let page = page.gives(200);
        let licenses = page["licenses"].as_array().unwrap();
        assert!(licenses.len() <= 2);
        listed.extend(licenses.iter().map(|license| text(license, "/id")));
        pages += 1;
        match page["nextPageToken"].as_str() {
            Some(token) => path = format!("/licenses?productId={}&pageSize=2&pageToken={token}", product.id),
            None => break,
        }
    }
    assert_eq!((listed, pages), (issued.clone(), 3));

    let one = owner.get("/licenses?email=c3@example.com").await;
    assert_eq!(one.gives(200)["licenses"].as_array().map(Vec::len), Some(1));
    assert_eq!(one.json["licenses"][0]["id"], Value::from(issued[1].as_str()));
    let none = owner.get("/licenses?status=revoked").await;
    assert_eq!(none.gives(200), &json!({"licenses": [], "nextPageToken": null}));
}

async fn a_vendors_server_manages_its_product_with_the_secret_key(install: Installation) {
    let owner = install.register().await;
    let (mine, other) = (owner.create_product("Mine").await, owner.create_product("Other").await);
    let server = owner.server(&mine);
    let answer = server.post("/licenses", json!({"productId": mine.id})).await;
    let license = License::of(answer.gives(201));
    let foreign = owner.issue(&other, json!({})).await;

    server.get(&format!("/licenses/{}", license.id)).await.gives(200);
    server.get(&format!("/licenses/{}", foreign.id)).await.refused(Reason::NotFound);
    server.post("/licenses", json!({"productId": other.id})).await.refused(Reason::NotFound);
    server.post(&format!("/licenses/{}/revoke", foreign.id), json!({})).await.refused(Reason::NotFound);
    let listed = server.get("/licenses").await;
    let ids: Vec<String> =
        listed.gives(200)["licenses"].as_array().unwrap().iter().map(|license| text(license, "/id")).collect();
    assert_eq!(ids, [license.id.as_str()], "a secret key sees its product's licences only");

    let events = json!({"url": "http://127.0.0.1:9/hook", "events": ["license.created"]});
    server.post(&format!("/products/{}/webhooks", mine.id), events.clone()).await.gives(201);
    server.post(&format!("/products/{}/webhooks", other.id), events).await.refused(Reason::NotFound);
    server.post(&format!("/products/{}/api-keys", mine.id), json!({})).await.refused(Reason::ScopeInsufficient);
    server.delete(&format!("/products/{}", mine.id)).await.refused(Reason::ScopeInsufficient);
}

async fn an_integration_manages_products_and_licences_with_a_team_key(install: Installation) {
    let owner = install.register().await;
    let integration = owner.integration();
    let created = integration
        .post("/api/v1/products", json!({"name": "App", "sku": "A-1", "price": {"amount": 1999, "currency": "EUR"}}))
        .await;
    let product = created.gives(201);
    assert_eq!(product["price"], json!({"amount": 1999, "currency": "EUR"}));
    assert!(text(product, "/api_key/secret_key").starts_with("sk_"), "{product}");
    let created =
        integration.post("/api/v1/licenses", json!({"product_id": product["id"], "max_activations": 2})).await;
    let license = created.gives(201);
    assert_eq!((&license["max_activations"], &license["status"]), (&json!(2), &json!("active")));
    let id = text(license, "/id");
    let revoked = integration.post(&format!("/api/v1/licenses/{id}/revoke"), json!({})).await;
    assert_eq!(revoked.gives(200)["status"], "revoked");
    let seen = owner.get(&format!("/licenses/{id}")).await;
    assert_eq!(seen.gives(200)["status"], "revoked", "what the key does, the dashboard shows");
    integration.delete(&format!("/api/v1/products/{}", text(product, "/id"))).await.gives(204);
    owner.get(&format!("/products/{}", text(product, "/id"))).await.refused(Reason::NotFound);

    let status = integration.get("/v1/status").await;
    assert_eq!(status.gives(200)["caller"]["team_id"], Value::from(owner.team_id.as_str()));
    assert_eq!(install.api().get("/v1/status").await.gives(200)["caller"], Value::Null);
}

async fn a_patch_leaves_what_is_absent_and_clears_what_is_null(install: Installation) {
    let owner = install.register().await;
    let full = json!({
        "name": "App", "description": "An app", "sku": "A-1", "unit": "seat", "metadata": {"a": 1, "b": {"c": 2, "d": 3}},
    });
    let id = text(owner.post("/products", full).await.gives(201), "/id");
    let path = format!("/products/{id}");
    let patched =
        owner.patch(&path, json!({"sku": null, "unit": "machine", "metadata": {"a": null, "b": {"c": 4}}})).await;
    let patched = patched.gives(200);
    assert_eq!(patched["name"], "App");
    assert_eq!(patched["description"], "An app");
    assert_eq!(patched["sku"], Value::Null);
    assert_eq!(patched["unit"], "machine");
    assert_eq!(patched["metadata"], json!({"b": {"c": 4, "d": 3}}));
    assert_eq!(owner.get(&path).await.gives(200), patched, "what was answered is what is there");
    owner.patch(&path, json!({"name": null})).await.refused_for("name");

    let product = owner.create_product("Licensed").await;
    let license = owner.issue(&product, json!({"email": "a@example.com", "maxActivations": 3})).await;
    let path = format!("/licenses/{}", license.id);
    let patched = owner.patch(&path, json!({"maxActivations": null})).await;
    assert_eq!(patched.gives(200)["maxActivations"], Value::Null);
    assert_eq!(patched.json["email"], "a@example.com");
    let ended = owner.patch(&path, json!({"expiresAt": "2020-01-01T00:00:00Z"})).await;
    assert_eq!(ended.gives(200)["expiresAt"], "2020-01-01T00:00:00.000Z");
    let app = owner.app(&product);
    assert_eq!(app.verdict(&license).await, "expired");
    app.activate(&license, "machine-1").await.refused(Reason::LicenseExpired);
    owner.patch(&path, json!({"expiresAt": null})).await.gives(200);
    assert_eq!(app.verdict(&license).await, "valid", "extending the expiry makes it active again");

    let unlimited = owner.post("/licenses", json!({"productId": product.id, "maxActivations": null})).await;
    assert_eq!(unlimited.gives(201)["maxActivations"], Value::Null);
    let default = owner.post("/licenses", json!({"productId": product.id})).await;
    assert_eq!(default.gives(201)["maxActivations"], 1);
}

async fn a_product_takes_everything_of_its_own_with_it(install: Installation) {
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = owner.create_product("Short-lived").await;
    let webhook = owner.subscribe(&product, receiver.url()).await;
    let license = owner.issue(&product, json!({})).await;
    let app = owner.app(&product);
    app.activate(&license, "machine-1").await.gives(200);
    owner.delete(&format!("/products/{}", product.id)).await.gives(204);

    owner.get(&format!("/products/{}", product.id)).await.refused(Reason::NotFound);
    owner.delete(&format!("/products/{}", product.id)).await.refused(Reason::NotFound);
    // What the other services hold of it goes with the event of its end.
    paperkey_tests::eventually("the licences of a deleted product are gone", || async {
        (owner.get(&format!("/licenses/{}", license.id)).await.status == 404).then_some(())
    })
    .await;
    paperkey_tests::eventually("the keys of a deleted product are refused", || async {
        (app.validate(&license).await.status == 401).then_some(())
    })
    .await;
    let path = format!("/products/{}/webhooks/{}", product.id, webhook.id);
    paperkey_tests::eventually("the webhooks of a deleted product are gone", || async {
        (owner.get(&path).await.status == 404).then_some(())
    })
    .await;
    assert_eq!(owner.get("/products").await.gives(200)["products"], json!([]));
    assert_eq!(owner.get("/licenses").await.gives(200)["licenses"], json!([]));
}

async fn a_licence_key_with_a_typing_error_is_pointed_out(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let license = owner.issue(&product, json!({})).await;
    let app = owner.app(&product);
    let spoken = License { key: license.key.to_lowercase().replace('-', " "), ..license.clone() };
    assert_eq!(app.verdict(&spoken).await, "valid", "case, hyphens and spaces do not matter");

    let mut wrong = license.key.clone().into_bytes();
    wrong[2] = if wrong[2] == b'7' { b'8' } else { b'7' };
    let wrong = License { key: String::from_utf8(wrong).unwrap(), ..license.clone() };
    for answer in
        [app.validate(&wrong).await, app.activate(&wrong, "machine-1").await, app.deactivate(&wrong, "machine-1").await]
    {
        answer.refused_for("license_key");
        let message = details(&answer)[0]["message"].as_str().unwrap_or_default().to_owned();
        assert!(message.contains(&license.key), "one wrong character is pointed at: {message}");
    }
    // The example of the specification: whole, and nobody's.
    let nobodys = License { key: "K7WX9-M3NP4-H8TRC-DJ".to_owned(), ..license };
    assert_eq!(app.verdict(&nobodys).await, "not_found");
    assert_eq!(app.validate(&nobodys).await.gives(200)["license"], Value::Null);
    app.activate(&nobodys, "machine-1").await.refused(Reason::NotFound);
    app.deactivate(&nobodys, "machine-1").await.refused(Reason::NotFound);
}

async fn a_known_email_is_a_conflict_and_a_wrong_password_is_refused(install: Installation) {
    let somebody = install.register().await;
    let api = install.api();
    let shouted = json!({"email": somebody.email.to_uppercase(), "password": "another password"});
    api.post("/auth/register", shouted).await.refused(Reason::Conflict);
    let wrong = api.post("/auth/login", json!({"email": somebody.email, "password": "wrong password"})).await;
    let unknown = api.post("/auth/login", json!({"email": "nobody@example.com", "password": "wrong password"})).await;
    let (wrong, unknown) = (wrong.refused(Reason::InvalidCredentials), unknown.refused(Reason::InvalidCredentials));
    assert_eq!(wrong.json["message"], unknown.json["message"], "nobody learns who has an account");
    let right = json!({"email": somebody.email.to_uppercase(), "password": somebody.password});
    let answer = api.post("/auth/login", right).await;
    let token = text(answer.gives(200), "/token");
    assert_eq!(api.as_account(&token).get("/auth/me").await.gives(200)["user"]["id"], Value::from(somebody.user_id));
}
