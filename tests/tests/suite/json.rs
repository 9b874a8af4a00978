//! How answers and errors look: letter case, times, absence, and the envelope of each surface.

use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{Installation, envelope, on_both_kinds, people::text};
use serde_json::{Value, json};

use crate::samples::NOBODYS;

on_both_kinds! {
    each_surface_has_its_own_envelope,
    a_client_that_wants_problems_gets_problems,
    answers_are_spelled_as_their_surface_spells,
    requests_are_read_in_both_letter_cases,
    nothing_secret_may_be_cached,
}

async fn each_surface_has_its_own_envelope(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;

    let flat = owner.get(&format!("/products/{NOBODYS}")).await;
    flat.refused(Reason::NotFound);
    assert_eq!(flat.json["error"], "not_found");

    let app = owner.app(&product).0;
    let flat = app.post("/v1/licenses/validate", json!({})).await;
    flat.refused_for("license_key");
    assert_eq!(flat.json["error"], "validation_error");

    let typed = owner.integration().get(&format!("/api/v1/products/{NOBODYS}")).await;
    typed.refused(Reason::NotFound);
    assert_eq!(typed.json["error"]["type"], "not_found_error");
    let typed = owner.integration().post("/api/v1/licenses", json!({})).await;
    typed.refused_for("product_id");
    assert!(typed.json["error"]["details"].is_array(), "details stand inside the error: {}", typed.text());

    let agent = install.api().with_key("nonsense").get("/v1/status").await;
    agent.refused(Reason::InvalidCredentials);
    assert_eq!(agent.json["error"]["code"], "PB_INVALID_API_KEY");
    let wrong_kind = app.get("/v1/status").await;
    wrong_kind.refused(Reason::InvalidCredentials);
    install.api().get("/v1/nowhere").await.refused(Reason::NotFound);
}

async fn a_client_that_wants_problems_gets_problems(install: Installation) {
    let owner = install.register().await;
    let api = owner.with("accept", "application/problem+json");
    let missing = api.get(&format!("/products/{NOBODYS}")).await;
    envelope::check_problem(&missing, Reason::NotFound);
    let invalid = api.post("/products", json!({"nonsense": 1})).await;
    envelope::check_problem(&invalid, Reason::ValidationFailed);
    let anonymous = install.api().with("accept", "application/problem+json").get("/api/v1/products").await;
    envelope::check_problem(&anonymous, Reason::InvalidCredentials);
    let any = owner.with("accept", "*/*").get(&format!("/products/{NOBODYS}")).await;
    any.refused(Reason::NotFound);
    assert!(api.get("/products").await.gives(200)["products"].is_array(), "a success is what it always is");
}

/// The form `2026-12-31T00:00:00.000Z`.
fn is_time(value: &Value) -> bool {
    value.as_str().is_some_and(|text| {
        text.len() == 24
            && text.bytes().enumerate().all(|(at, byte)| match at {
                4 | 7 => byte == b'-',
                10 => byte == b'T',
                13 | 16 => byte == b':',
                19 => byte == b'.',
                23 => byte == b'Z',
                _ => byte.is_ascii_digit(),
            })
    })
}

fn names(value: &Value) -> Vec<String> {
    let mut names: Vec<String> = value.as_object().unwrap_or_else(|| panic!("{value}")).keys().cloned().collect();
    names.sort();
    names
}

async fn answers_are_spelled_as_their_surface_spells(install: Installation) {
    let owner = install.register().await;
    let created = owner.post("/products", json!({"name": "App"})).await;
    let product = created.gives(201);
    let members =
        ["active", "apiKey", "createdAt", "description", "id", "metadata", "name", "price", "sku", "unit", "updatedAt"];
    assert_eq!(names(product), members, "absent values are present as null");
    for absent in ["description", "metadata", "price", "sku", "unit"] {
        assert_eq!(product[absent], Value::Null, "{absent}");
    }
    assert_eq!(product["active"], true);
    assert!(is_time(&product["createdAt"]), "{product}");
    assert!(text(product, "/id").starts_with("prod_"));
    assert_eq!(product["apiKey"]["mode"], "live");
    assert_eq!(product["apiKey"]["productId"], product["id"]);
    assert_eq!(product["apiKey"]["revokedAt"], Value::Null);
    let product_id = text(product, "/id");

    let pair = owner.post(&format!("/products/{product_id}/api-keys"), json!({})).await;
    let members =
        ["createdAt", "id", "mode", "productId", "publicKey", "revokedAt", "revokedBy", "secretKey", "secretKeyPrefix"];
    assert_eq!(names(pair.gives(201)), members);
    let listed = owner.get(&format!("/products/{product_id}/api-keys")).await;
    assert_eq!(listed.gives(200)["apiKeys"].as_array().map(Vec::len), Some(2));

    let created =
        owner.post("/licenses", json!({"productId": product_id, "expiresAt": "2030-06-01T12:00:00+02:00"})).await;
    let license = created.gives(201);
    let members = [
        "activationsCount",
        "clientId",
        "createdAt",
        "email",
        "expiresAt",
        "id",
        "key",
        "maxActivations",
        "metadata",
        "productId",
        "revokedAt",
        "status",
        "updatedAt",
    ];
    assert_eq!(names(license), members);
    assert_eq!(license["expiresAt"], "2030-06-01T10:00:00.000Z", "times are told in UTC with milliseconds");
    assert_eq!((&license["status"], &license["metadata"]), (&json!("active"), &Value::Null));
    let id = text(license, "/id");

    let integration = owner.integration();
    let snake = integration.get(&format!("/api/v1/licenses/{id}")).await;
    let members = [
        "activations",
        "activations_count",
        "client_id",
        "created_at",
        "email",
        "expires_at",
        "id",
        "key",
        "max_activations",
        "metadata",
        "product_id",
        "revoked_at",
        "status",
        "updated_at",
    ];
    assert_eq!(names(snake.gives(200)), members);
    assert_eq!(snake.json["activations"], json!([]), "an empty list is a list");
    let status = install.api().get("/v1/status").await;
    assert_eq!(names(status.gives(200)), ["caller", "status", "time", "version"]);
    assert_eq!(status.json["status"], "ok");
    assert!(is_time(&status.json["time"]));
    assert_eq!(integration.get("/api/v1/products").await.gives(200)["next_page_token"], Value::Null);
    assert_eq!(owner.get("/products").await.gives(200)["nextPageToken"], Value::Null);
}

async fn requests_are_read_in_both_letter_cases(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    for body in
        [json!({"productId": product.id, "maxActivations": 7}), json!({"product_id": product.id, "max_activations": 7})]
    {
        assert_eq!(owner.post("/licenses", body.clone()).await.gives(201)["maxActivations"], 7);
        assert_eq!(owner.integration().post("/api/v1/licenses", body).await.gives(201)["max_activations"], 7);
    }
    let license = owner.issue(&product, json!({})).await;
    let app = owner.app(&product).0;
    for name in ["license_key", "licenseKey"] {
        assert_eq!(app.post("/v1/licenses/validate", json!({name: license.key})).await.gives(200)["valid"], true);
    }
    for query in ["productId", "product_id"] {
        let listed = owner.get(&format!("/licenses?{query}={}&pageSize=3", product.id)).await;
        assert_eq!(listed.gives(200)["licenses"].as_array().map(Vec::len), Some(3));
    }
}

async fn nothing_secret_may_be_cached(install: Installation) {
    let owner = install.register().await;
    let created = owner.post("/products", json!({"name": "App"})).await;
    created.gives(201);
    assert!(created.header("cache-control").is_some_and(|value| value.contains("no-store")), "{:?}", created.headers);
}
