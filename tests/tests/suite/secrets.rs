//! What is secret is nowhere but where it belongs: not in the log, not in the files.

use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{Installation, Settings, people::text};
use serde_json::json;

fn chatty() -> Settings {
    Settings { environment: vec![("PAPERKEY__TELEMETRY__LOG_LEVEL", "debug".to_owned())], ..Settings::default() }
}

/// Uses the product with everything secret that there is, faults included.
async fn use_everything(install: &Installation) -> Vec<String> {
    let mut secrets = crate::path::main_job(install).await;
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let license = owner.issue(&product, json!({})).await;
    let api = install.api();
    let login = json!({"email": owner.email, "password": owner.password});
    let token = text(api.post("/auth/login", login).await.gives(200), "/token");
    let wrong = json!({"email": owner.email, "password": "a wrong password, but somebody's"});
    api.post("/auth/login", wrong).await;
    // Secrets where they do not belong: on the wrong path, in the wrong field, cut short.
    api.with_key(&owner.live_key).get("/products").await;
    api.with_key(&product.public_key).get(&format!("/products/{}", license.key)).await;
    owner.post("/products", json!({"name": "A", "nonsense": product.secret_key})).await;
    owner.get(&format!("/licenses?query={}", license.key)).await;
    owner.app(&product).0.post("/v1/licenses/activate", json!({"license_key": license.key, "fingerprint": 17})).await;
    let system_key = install.system_key().await;
    api.with_key(&system_key).get("/v1/status").await.gives(200);
    // Keys through their life, and as strangers report them.
    let path = format!("/teams/{}/api-keys", owner.team_id);
    let made = owner.post(&path, json!({"name": "Key"})).await;
    let (key_id, key) = (text(made.gives(201), "/id"), text(&made.json, "/key"));
    let next = owner.post(&format!("{path}/{key_id}/rotate"), json!({})).await;
    let next = text(next.gives(200), "/key");
    let own = api.with_key(&next).post("/v1/keys/self/rotate", json!({})).await;
    let own = text(own.gives(200), "/key");
    let sandbox = text(api.post("/v1/keys/test", json!({})).await.gives(201), "/key");
    let leaked = json!({"tokens": [key, next, own, sandbox, product.secret_key]});
    api.post("/v1/keys/report-leak", leaked).await.gives(202);
    api.post("/v1/keys/report-leak", json!({"tokens": own, "nonsense": sandbox})).await;
    // Keys that others ask about, and links that are as good as a password.
    let asked = json!({"key": next, "scope": "licenses:read", "ip": "127.0.0.1"});
    api.with_key(&owner.live_key).post("/v1/keys/verify", asked).await.gives(200);
    api.with_key(&owner.live_key).get("/v1/authz?scope=licenses:read").await;
    api.with_key(&next).get(&format!("/v1/authz?scope={next}")).await;
    let invitation = owner.invite("grace@example.com", "member").await;
    owner.accept(&invitation).await.refused(Reason::NotFound);
    api.post("/auth/password/forgot", json!({"email": owner.email})).await.gives(200);
    api.post("/auth/password/reset", json!({"token": invitation.token, "password": "a new passphrase"})).await;
    secrets.extend([key, next, own, sandbox, invitation.token]);
    let rotated = install.command(&["admin", "system-key", "--rotate"], "").await.succeeded().to_owned();
    install.command(&["admin", "reset-password", &owner.email], "a new passphrase\n").await.succeeded();
    secrets.extend([
        token,
        owner.token.clone(),
        owner.password.clone(),
        owner.live_key.clone(),
        owner.free_key.clone(),
        product.public_key,
        product.secret_key,
        license.key,
        system_key,
        rotated,
        "a wrong password, but somebody's".to_owned(),
        "a new passphrase".to_owned(),
    ]);
    secrets.extend(install.given_keys());
    secrets
}

fn nothing_is_written(install: &Installation, secrets: &[String]) {
    let written = install.written();
    assert!(written.len() > install.names().len(), "the processes have written something");
    for (name, line) in &written {
        for secret in secrets {
            assert!(!line.text.contains(secret), "{name} wrote the secret {secret}: {}", line.text);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_writes_no_secret_to_its_log_nor_to_its_files() {
    let install = Installation::all_in_one_with(chatty()).await;
    let secrets = use_everything(&install).await;
    nothing_is_written(&install, &secrets);
    let files = install.files();
    assert!(files.iter().any(|(_, bytes)| bytes.starts_with(b"SQLite format 3")), "the databases are looked at");
    // A product's public key ships in apps, and is listed in the dashboard.
    for secret in secrets.iter().filter(|secret| !is_public_key(secret)) {
        // A mail that nobody sends is kept for a person to read.
        for (path, bytes) in files.iter().filter(|(path, _)| path.extension().is_none_or(|kind| kind != "eml")) {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "{} holds the secret {secret}", path.display());
        }
    }
}

fn is_public_key(secret: &str) -> bool {
    secret.starts_with("pk_") && !secret.starts_with("pk_free_")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_writes_no_secret_to_its_logs_nor_to_its_tables() {
    let Some(install) = Installation::fleet_with(chatty()).await else { return };
    let secrets = use_everything(&install).await;
    nothing_is_written(&install, &secrets);
    let rows = install.rows().await;
    for table in ["auth.audit_blocks", "auth.keys", "auth.product_keys", "licensing.licenses"] {
        assert!(rows.iter().any(|(name, _)| name == table), "{table} is looked at");
    }
    for (table, row) in &rows {
        for secret in secrets.iter().filter(|secret| !is_public_key(secret)) {
            let found = row.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "{table} holds the secret {secret}");
        }
    }
}
