//! Caches are warm and never stale: what was revoked stops at once, and a warm check touches no database.

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use http::Method;
use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{
    Account, Api, Installation, License, Product, Settings, eventually,
    people::{App, text},
    within,
};
use serde_json::{Value, json};

/// What the specification promises.
pub(crate) const PROMISED: Duration = Duration::from_secs(1);

async fn sold(install: &Installation) -> (Account, Product, License, App) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let license = owner.issue(&product, json!({"maxActivations": 3})).await;
    let app = owner.app(&product);
    for _ in 0..5 {
        assert_eq!(app.verdict(&license).await, "valid");
    }
    (owner, product, license, app)
}

async fn revoke_keys(owner: &Account, product: &Product) {
    owner.delete(&format!("/products/{}/api-keys/{}", product.id, product.key_id)).await.gives(204);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_one_process_the_next_call_feels_a_revocation() {
    let install = Installation::all_in_one().await;
    let (owner, product, license, app) = sold(&install).await;
    let server = owner.server(&product);
    server.get(&format!("/licenses/{}", license.id)).await.gives(200);
    for _ in 0..20 {
        owner.revoke(&license).await.gives(200);
        assert_eq!(app.verdict(&license).await, "revoked");
        owner.reinstate(&license).await.gives(200);
        assert_eq!(app.verdict(&license).await, "valid");
    }
    let extended =
        owner.patch(&format!("/licenses/{}", license.id), json!({"maxActivations": 5, "metadata": {"v": 2}})).await;
    extended.gives(200);
    let seen = app.validate(&license).await;
    assert_eq!(seen.gives(200)["license"]["activationsLimit"], 5);
    assert_eq!(seen.json["license"]["metadata"], json!({"v": 2}));
    app.activate(&license, "machine-1").await.gives(200);
    let seen = app.validate_on(&license, "machine-1").await;
    assert_eq!(seen.gives(200)["license"]["isActivated"], true);
    assert_eq!(seen.json["license"]["activationsCount"], 1);

    revoke_keys(&owner, &product).await;
    app.validate(&license).await.refused(Reason::InvalidCredentials);
    server.get(&format!("/licenses/{}", license.id)).await.refused(Reason::InvalidCredentials);
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_fleet_a_revoked_key_stops_within_a_second_at_every_gateway() {
    let Some(install) = Installation::fleet_with_two_licensings().await else { return };
    let (owner, product, license, app) = sold(&install).await;
    let elsewhere = owner.at(&install.second_api()).app(&product);
    assert_eq!(elsewhere.verdict(&license).await, "valid");
    revoke_keys(&owner, &product).await;
    let revoked = Instant::now();
    let stops = |app: App| {
        let license = license.clone();
        async move {
            within(PROMISED, "the key is refused", || async {
                (app.validate(&license).await.status == 401).then_some(())
            })
            .await;
            assert!(revoked.elapsed() <= PROMISED + Duration::from_millis(200), "{:?}", revoked.elapsed());
            for _ in 0..20 {
                app.validate(&license).await.refused(Reason::InvalidCredentials);
            }
        }
    };
    tokio::join!(stops(app), stops(elsewhere));
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_fleet_a_revoked_licence_stops_at_once_here_and_within_a_second_elsewhere() {
    let Some(install) = Installation::fleet_with_two_licensings().await else { return };
    let (owner, product, license, app) = sold(&install).await;
    let elsewhere = owner.at(&install.second_api()).app(&product);
    for _ in 0..3 {
        for (change, verdict) in [("revoke", "revoked"), ("reinstate", "valid")] {
            assert_ne!(elsewhere.verdict(&license).await, verdict);
            owner.post(&format!("/licenses/{}/{change}", license.id), json!({})).await.gives(200);
            assert_eq!(app.verdict(&license).await, verdict, "the process that changed it knows");
            within(PROMISED, "the other process knows", || async {
                (elsewhere.verdict(&license).await == verdict).then_some(())
            })
            .await;
            for _ in 0..5 {
                assert_eq!(elsewhere.verdict(&license).await, verdict, "and does not forget");
            }
        }
    }
    // A machine that is activated here is known there.
    app.activate(&license, "machine-1").await.gives(200);
    within(PROMISED, "the other process knows the machine", || async {
        let seen = elsewhere.validate_on(&license, "machine-1").await;
        (seen.gives(200)["license"]["isActivated"] == true).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_auth_no_gateway_trusts_what_it_remembers_for_longer_than_a_second() {
    let impatient =
        Settings { environment: vec![("PAPERKEY__SERVER__CALL_TIMEOUT_MS", "1000".to_owned())], ..Settings::default() };
    let Some(mut install) = Installation::fleet_with(impatient).await else { return };
    let (_, _, license, app) = sold(&install).await;
    // Stopped, not ended: connections stay open and nothing answers on them.
    install.process("auth").signal("STOP");
    let stopped = Instant::now();
    eventually("the gateway stops trusting its cache", || async {
        let asked = Instant::now();
        let answer = app.validate(&license).await;
        // A call may wait for as long as the configuration says, for whom to believe and for what to answer.
        assert!(asked.elapsed() < Duration::from_secs(5), "{} after {:?}", answer.status, asked.elapsed());
        if answer.status == 200 {
            // What is still answered was asked while the last news was fresh.
            assert!(stopped.elapsed() < Duration::from_secs(3), "answered from memory after {:?}", stopped.elapsed());
            return None;
        }
        assert!(matches!(answer.status.as_u16(), 503 | 504), "{}", answer.text());
        Some(())
    })
    .await;
    install.process("auth").signal("CONT");
    eventually("the gateway recovers", || async { (app.validate(&license).await.status == 200).then_some(()) }).await;
}

/// The database statements of a service so far, reading and writing.
pub(crate) async fn statements(operations: &Api, service: &str) -> u64 {
    let metrics = operations.get("/metrics").await;
    let count = |name: &str| {
        let label = format!("{name}{{service=\"{service}\"}} ");
        let line = metrics.text().lines().find_map(|line| line.strip_prefix(&label).map(str::to_owned));
        line.unwrap_or_else(|| panic!("no {label}in {}", metrics.text())).parse::<u64>().unwrap()
    };
    count("paperkey_db_read_statements_total") + count("paperkey_db_write_statements_total")
}

/// How often auth was asked whose a credential is.
pub(crate) async fn lookups(operations: &Api) -> u64 {
    metric(operations, "paperkey_credential_lookups_total").await
}

/// A number of the metrics that has no labels.
pub(crate) async fn metric(operations: &Api, name: &str) -> u64 {
    let metrics = operations.get("/metrics").await.text();
    let value = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("no {name} in {metrics}")).parse().unwrap()
}

async fn warm_checks_cost_no_statement(install: &Installation) {
    const CALLS: usize = 500;
    let (_, _, license, app) = sold(install).await;
    app.activate(&license, "machine-1").await.gives(200);
    // What was changed just now is news for a while, and news are looked up.
    let changed = Instant::now();
    while changed.elapsed() < PROMISED {
        app.validate_on(&license, "machine-1").await.gives(200);
        app.validate(&license).await.gives(200);
    }
    let operations = install.operations(install.host_of("licensing"));
    let gateway = install.operations(install.gateway());
    let (before, asked) = (statements(&operations, "licensing").await, lookups(&gateway).await);
    let began = Instant::now();
    let answers = join_all((0..CALLS).map(|number| {
        let (app, license) = (app.clone(), license.clone());
        async move {
            if number % 2 == 0 { app.validate(&license).await } else { app.validate_on(&license, "machine-1").await }
        }
    }))
    .await;
    for answer in answers {
        assert_eq!(answer.gives(200)["valid"], true);
    }
    let took = began.elapsed();
    let during = statements(&operations, "licensing").await - before;
    // Workers look for work in the meantime; so many statements would they need to look forty times a second.
    let idle = 20 + u64::try_from(took.as_millis()).unwrap() / 25;
    assert!(during <= idle, "{during} statements during {CALLS} checks in {took:?}");
    assert!(during < CALLS as u64 / 2, "the calls were too slow to prove anything: {took:?}");
    let lookups = lookups(&gateway).await - asked;
    assert!(lookups <= 5, "auth was asked {lookups} times whose the same key is");
}

#[tokio::test(flavor = "multi_thread")]
async fn in_one_process_a_warm_check_touches_no_database() {
    warm_checks_cost_no_statement(&Installation::all_in_one().await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_fleet_a_warm_check_touches_no_database() {
    let Some(install) = Installation::fleet().await else { return };
    warm_checks_cost_no_statement(&install).await;
}

/// A key that a team has made, and what the gateways think of it.
struct Watched {
    path: String,
    gateways: Vec<Api>,
}

impl Watched {
    async fn new(owner: &Account, gateways: &[Api], body: Value) -> Self {
        let made = owner.post(&format!("/teams/{}/api-keys", owner.team_id), body).await;
        let key = text(made.gives(201), "/key");
        let path = format!("/teams/{}/api-keys/{}", owner.team_id, text(made.gives(201), "/id"));
        let gateways: Vec<Api> = gateways.iter().map(|gateway| gateway.with_key(&key)).collect();
        for gateway in &gateways {
            for _ in 0..3 {
                gateway.get("/api/v1/products").await.gives(200);
            }
        }
        Self { path, gateways }
    }

    /// Every gateway comes to answer like that within a second, and goes on to.
    async fn come_to(&self, verb: Method, path: &str, body: Option<Value>, status: u16) {
        for gateway in &self.gateways {
            within(PROMISED, "every gateway has learned of it", || async {
                (gateway.call(verb.clone(), path, body.clone()).await.status == status).then_some(())
            })
            .await;
        }
        for _ in 0..10 {
            for gateway in &self.gateways {
                assert_eq!(gateway.call(verb.clone(), path, body.clone()).await.status, status);
            }
        }
    }
}

/// Whatever changes how a key is judged, is felt by its next call, or in a fleet within a second.
async fn every_change_of_a_key_reaches_every_gateway(install: &Installation, gateways: &[Api]) {
    let owner = install.register().await;
    let watched = Watched::new(&owner, gateways, json!({"name": "Watched"})).await;
    let product = json!({"name": "App"});
    let read = |status| watched.come_to(Method::GET, "/api/v1/products", None, status);
    let write = |status| watched.come_to(Method::POST, "/api/v1/products", Some(product.clone()), status);

    owner.patch(&watched.path, json!({"enabled": false})).await.gives(200);
    read(401).await;
    owner.patch(&watched.path, json!({"enabled": true})).await.gives(200);
    read(200).await;
    owner.patch(&watched.path, json!({"scope": "read_only"})).await.gives(200);
    write(403).await;
    owner.patch(&watched.path, json!({"scope": "read_write"})).await.gives(200);
    write(201).await;
    owner.patch(&watched.path, json!({"scopes": ["licenses:read"]})).await.gives(200);
    read(403).await;
    owner.patch(&watched.path, json!({"scopes": ["products:read", "products:write"]})).await.gives(200);
    read(200).await;
    owner.patch(&watched.path, json!({"allowlist": ["198.51.100.0/24"]})).await.gives(200);
    read(403).await;
    owner.patch(&watched.path, json!({"allowlist": ["127.0.0.1"]})).await.gives(200);
    read(200).await;
    owner.delete(&watched.path).await.gives(200);
    read(401).await;

    // A user token ends with the membership, and shrinks with the role.
    let guest = owner.team_mate(install, "admin").await;
    let token = json!({"name": "Mine", "kind": "user_token", "userId": guest.user_id});
    let watched = Watched::new(&owner, gateways, token).await;
    let member = format!("/teams/{}/members/{}", owner.team_id, guest.user_id);
    owner.patch(&member, json!({"role": "member"})).await.gives(200);
    watched.come_to(Method::POST, "/api/v1/products", Some(product.clone()), 403).await;
    watched.come_to(Method::GET, "/api/v1/products", None, 200).await;
    owner.delete(&member).await.gives(204);
    watched.come_to(Method::GET, "/api/v1/products", None, 401).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_one_process_every_change_of_a_key_is_felt() {
    let install = Installation::all_in_one().await;
    every_change_of_a_key_reaches_every_gateway(&install, &[install.api()]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_fleet_every_change_of_a_key_is_felt_within_a_second_at_every_gateway() {
    let Some(install) = Installation::fleet_with_two_licensings().await else { return };
    every_change_of_a_key_reaches_every_gateway(&install, &[install.api(), install.second_api()]).await;
}
