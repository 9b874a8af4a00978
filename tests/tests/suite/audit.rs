//! The audit log of a running installation: who did what, from where, and how it ended; and that nobody can change it.

use paperkey_proto::{
    auth::v1::{ListAuditLogsRequest, audit_log_service_client::AuditLogServiceClient},
    errors::v1::Reason,
};
use paperkey_tests::{
    Account, Installation, Settings, eventually,
    grpc::{Bearer, connect},
    installation::SERVE,
    leaks::tokens_in,
    on_both_kinds,
    people::text,
};
use serde_json::{Value, json};

on_both_kinds! {
    every_call_is_in_the_log_with_what_it_changed,
    the_log_is_filtered_and_paged,
    the_log_is_exported_as_it_is_listed,
    a_team_sees_its_own_log_and_only_its_owners_and_admins,
    the_end_of_a_process_loses_nothing,
    a_change_is_in_the_log_whatever_was_killed,
}

async fn entries(owner: &Account, query: &str) -> Vec<Value> {
    let path = format!("/teams/{}/audit-logs?pageSize=100{query}", owner.team_id);
    owner.get(&path).await.gives(200)["entries"].as_array().expect("a list").clone()
}

/// The entry of a call, once it is there with what it changed.
async fn entry_of(owner: &Account, request_id: &str, complete: impl Fn(&Value) -> bool) -> Value {
    eventually("the call is in the log", || async {
        let all = entries(owner, "").await;
        all.into_iter().find(|entry| entry["requestId"] == request_id).filter(|entry| complete(entry))
    })
    .await
}

async fn every_call_is_in_the_log_with_what_it_changed(install: Installation) {
    let owner = install.register().await;
    let created = owner.with("user-agent", "Browser/1.0").post("/products?x=secret", json!({"name": "App"})).await;
    created.refused_for("x");
    let created = owner.with("user-agent", "Browser/1.0").post("/products", json!({"name": "App"})).await;
    let id = text(created.gives(201), "/id");
    let request_id = created.header("x-request-id").unwrap();
    let has_product = |entry: &Value| entry["resources"].as_array().is_some_and(|all| all.contains(&json!(id)));
    let entry = entry_of(&owner, request_id, |entry| has_product(entry) && !entry["status"].is_null()).await;
    assert!(text(&entry, "/id").starts_with("aud_"));
    let actor = json!({"kind": "account", "id": owner.user_id, "name": owner.email});
    assert_eq!((&entry["actor"], &entry["method"], &entry["path"]), (&actor, &json!("POST"), &json!("/products")));
    assert_eq!(entry["rpc"], "paperkey.catalog.v1.CatalogService/CreateProduct");
    assert_eq!((&entry["status"], &entry["code"]), (&json!(201), &Value::Null));
    assert_eq!((&entry["ip"], &entry["userAgent"]), (&json!("127.0.0.1"), &json!("Browser/1.0")));
    assert!(entry["durationMs"].is_number() && text(&entry, "/time").ends_with('Z'), "{entry}");

    let refused = owner.integration().get("/api/v1/products/prod_nobody").await;
    refused.refused(Reason::NotFound);
    let entry = entry_of(&owner, refused.header("x-request-id").unwrap(), |_| true).await;
    assert_eq!((&entry["status"], &entry["code"]), (&json!(404), &json!("PB_NOT_FOUND")));
    assert_eq!((&entry["resources"], &entry["actor"]["kind"]), (&json!(["prod_nobody"]), &json!("team_key")));

    let channel = connect(&install.url()).await;
    let mut client = AuditLogServiceClient::with_interceptor(channel, Bearer::new(&owner.token));
    client.list_audit_logs(ListAuditLogsRequest::default()).await.unwrap();
    let by_grpc = eventually("the gRPC call is in the log", || async {
        let all = entries(&owner, "&method=ListAuditLogs").await;
        all.into_iter().find(|entry| entry["method"].is_null())
    })
    .await;
    assert_eq!((&by_grpc["status"], &by_grpc["actor"]), (&json!(200), &actor));

    let all = json!(entries(&owner, "").await).to_string();
    assert_eq!(tokens_in(all.as_bytes()), Vec::<String>::new(), "no token is in the log");
}

async fn the_log_is_filtered_and_paged(install: Installation) {
    let owner = install.register().await;
    for name in ["One", "Two", "Three"] {
        owner.create_product(name).await;
    }
    let key = owner.integration();
    key.get("/api/v1/products").await.gives(200);
    key.get("/api/v1/products/prod_nobody").await.refused(Reason::NotFound);
    let key_id = text(key.get("/api/v1/me").await.gives(200), "/id");
    let count = async |query: &str| entries(&owner, query).await.len();
    eventually("everything is in the log", || async {
        (count("&method=CreateProduct").await == 3 && count(&format!("&actor={key_id}")).await == 3).then_some(())
    })
    .await;
    assert_eq!(count("&status=404").await, 1);
    assert_eq!(count("&status=4xx").await, 1);
    assert_eq!(count(&format!("&key={key_id}&status=2xx")).await, 2);
    assert_eq!(count("&method=POST").await, 3);
    assert_eq!(count("&actor=system_key").await, 0);
    assert_eq!(count("&until=2020-01-01T00:00:00Z").await, 0);
    assert!(count("&since=2020-01-01T00:00:00Z").await >= 6);
    let base = format!("/teams/{}/audit-logs?method=CreateProduct&pageSize=2", owner.team_id);
    let mut seen = Vec::new();
    let mut next = Some(String::new());
    while let Some(token) = next {
        let page = owner.get(&format!("{base}&pageToken={token}")).await;
        let json = page.gives(200);
        seen.extend(json["entries"].as_array().unwrap().iter().map(|entry| text(entry, "/time")));
        next = json["nextPageToken"].as_str().map(str::to_owned);
    }
    let mut sorted = seen.clone();
    sorted.sort_by(|one, other| other.cmp(one));
    assert_eq!((seen.len(), &seen), (3, &sorted), "newest first");
    owner.get(&format!("{base}&pageToken=nonsense")).await.refused_for("pageToken");
    owner.get(&format!("/teams/{}/audit-logs?status=wrong", owner.team_id)).await.refused(Reason::ValidationFailed);
}

async fn the_log_is_exported_as_it_is_listed(install: Installation) {
    let owner = install.register().await;
    owner.with("user-agent", "=cmd|' /C calc'!A0, \"quoted\"").get("/products").await.gives(200);
    owner.create_product("App").await;
    let path = format!("/teams/{}/audit-logs?method=Product", owner.team_id);
    eventually("both are in the log, and what was made", || async {
        let all = entries(&owner, "&method=Product").await;
        let made = all.iter().any(|entry| entry["resources"].as_array().is_some_and(|made| made.len() == 2));
        (all.len() == 2 && made).then_some(())
    })
    .await;
    let listed = entries(&owner, "&method=Product").await;
    let lines = owner.get(&format!("{path}&format=ndjson")).await;
    assert_eq!((lines.status.as_u16(), lines.header("content-type")), (200, Some("application/x-ndjson")));
    let parsed: Vec<Value> = lines.text().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(parsed, listed);
    let table = owner.get(&format!("{path}&format=csv")).await;
    assert_eq!((table.status.as_u16(), table.header("content-type")), (200, Some("text/csv; charset=utf-8")));
    let text = table.text();
    assert_eq!(text.lines().count(), 3, "a header and two lines: {text}");
    assert!(text.contains("\"'=cmd|' /C calc'!A0, \"\"quoted\"\"\""), "{text}");
    assert!(table.header("x-ratelimit-limit").is_some() && table.header("x-request-id").is_some());
    owner.get(&format!("{path}&format=xml")).await.refused_for("format");
    owner.integration().get(&format!("{path}&format=csv")).await.refused(Reason::InvalidCredentials);
}

async fn a_team_sees_its_own_log_and_only_its_owners_and_admins(install: Installation) {
    let (owner, stranger) = (install.register().await, install.register().await);
    let path = format!("/teams/{}/audit-logs", owner.team_id);
    stranger.get(&path).await.refused(Reason::NotFound);
    owner.team_mate(&install, "admin").await.for_team(&owner.team_id).get(&path).await.gives(200);
    for role in ["manager", "member"] {
        let mate = owner.team_mate(&install, role).await;
        mate.get(&path).await.refused(Reason::RoleInsufficient);
        mate.get(&format!("{path}?format=csv")).await.refused(Reason::RoleInsufficient);
    }
    stranger.create_product("Theirs").await;
    eventually("theirs is in their log", || async {
        (entries(&stranger, "&method=CreateProduct").await.len() == 1).then_some(())
    })
    .await;
    assert!(entries(&owner, "&method=CreateProduct").await.is_empty());
}

async fn the_end_of_a_process_loses_nothing(mut install: Installation) {
    let owner = install.register().await;
    let mut asked = Vec::new();
    for _ in 0..50 {
        let answer = owner.get("/products").await;
        asked.push(answer.header("x-request-id").unwrap().to_owned());
    }
    let name = install.gateway();
    let (status, _) = install.process(name).terminate().await;
    assert!(status.success(), "{status}");
    install.kill(name);
    install.start(name).await.expect("it starts again");
    let owner = owner.at(&install.api());
    eventually("everything is in the log", || async {
        let logged = entries(&owner, "&method=ListProducts").await;
        asked.iter().all(|id| logged.iter().any(|entry| entry["requestId"] == id.as_str())).then_some(())
    })
    .await;
}

async fn a_change_is_in_the_log_whatever_was_killed(mut install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("Kept").await;
    for name in install.names() {
        install.kill(&name);
    }
    for name in paperkey_tests::installation::SERVICES.map(str::to_owned).into_iter().chain(["gateway".to_owned()]) {
        if install.kind() == paperkey_tests::Kind::Fleet {
            install.start(&name).await.expect("it starts again");
        }
    }
    if install.kind() == paperkey_tests::Kind::AllInOne {
        install.start(SERVE).await.expect("it starts again");
    }
    let owner = owner.at(&install.api());
    eventually("the change is in the log", || async {
        let answer = owner.try_get(&format!("/teams/{}/audit-logs?pageSize=100", owner.team_id)).await.ok()?;
        let all = answer.json["entries"].as_array()?.clone();
        all.iter()
            .any(|entry| entry["resources"].as_array().is_some_and(|all| all.contains(&json!(product.id))))
            .then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tampering_with_the_file_is_found() {
    let mut install = Installation::all_in_one_with(Settings::default()).await;
    let owner = install.register().await;
    for name in ["One", "Two", "Three"] {
        owner.create_product(name).await;
    }
    let (status, _) = install.process(SERVE).terminate().await;
    assert!(status.success());
    install.kill(SERVE);
    let good = install.command(&["audit", "verify"], "").await;
    good.succeeded();
    let file = install.data().join("auth.db");
    let tamper = |sql: &str| {
        let connection = rusqlite::Connection::open(&file).unwrap();
        assert!(connection.execute(sql, []).unwrap() > 0, "{sql} changes something");
    };
    let copy = |from: &str, to: &str| std::fs::copy(install.data().join(from), install.data().join(to)).unwrap();
    copy("auth.db", "kept.db");
    for sql in [
        "UPDATE audit_blocks SET payload = CAST(payload || x'00' AS BLOB) WHERE chain_no = 1",
        "UPDATE audit_blocks SET team_id = 'team_other' WHERE chain_no = (SELECT MAX(chain_no) FROM audit_blocks)",
        "DELETE FROM audit_blocks WHERE chain_no = 2",
        "DELETE FROM audit_blocks WHERE chain_no = (SELECT MAX(chain_no) FROM audit_blocks)",
    ] {
        tamper(sql);
        let found = install.command(&["audit", "verify"], "").await;
        let said = found.failed();
        assert!(said.contains("block"), "{sql}: {said}");
        for left in ["auth.db-wal", "auth.db-shm"] {
            let _ = std::fs::remove_file(install.data().join(left));
        }
        copy("kept.db", "auth.db");
    }
    install.command(&["audit", "verify"], "").await.succeeded();
}
