//! Keys over REST, for the whole of their life: from the dashboard, from other keys, and by themselves.

use std::time::{Duration, Instant};

use http::Method;
use paperkey_kit::{clock::Clock, token::TokenKind, values::rfc3339};
use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{Account, Api, Installation, on_both_kinds, people::text, within};
use serde_json::{Value, json};

on_both_kinds! {
    a_key_lives_from_the_dashboard,
    a_key_makes_rotates_and_ends_others,
    a_key_rotates_itself_and_a_lost_answer_locks_nobody_out,
    a_users_token_does_what_its_user_may,
    when_a_key_was_last_used_is_known_to_the_minute_and_costs_no_write_a_call,
    an_address_off_the_list_is_turned_away,
    a_stranger_gets_a_sandbox_and_reports_a_leak,
    what_is_asked_for_in_nonsense_is_refused_politely,
    a_key_of_an_hour_is_made_to_try_calls_out_with,
}

const HOUR_MS: i64 = 60 * 60 * 1_000;
const MINUTES: i64 = 60 * 1_000;

/// What the specification promises.
const PROMISED: Duration = Duration::from_secs(1);

fn in_ms(ms: i64) -> Value {
    rfc3339(Clock::system().now_ms() + ms).into()
}

fn keys_of(owner: &Account) -> String {
    format!("/teams/{}/api-keys", owner.team_id)
}

/// Makes a key in the dashboard, and answers its id and token.
async fn create(owner: &Account, with: Value) -> (String, String) {
    let made = owner.post(&keys_of(owner), with).await;
    let json = made.gives(201);
    (text(json, "/id"), text(json, "/key"))
}

async fn ids(api: &Api, path: &str, list: &str) -> Vec<String> {
    let answer = api.get(path).await;
    let listed = answer.gives(200)[list].as_array().expect("a list").clone();
    listed.iter().map(|key| text(key, "/id")).collect()
}

/// Asks until the key is refused: at once where everything is in one process, within a second elsewhere.
async fn ends(key: &Api) {
    within(PROMISED, "the key is refused", || async { (key.get("/api/v1/me").await.status == 401).then_some(()) })
        .await;
    key.get("/api/v1/me").await.refused(Reason::InvalidCredentials);
}

async fn a_key_lives_from_the_dashboard(install: Installation) {
    let owner = install.register().await;
    let path = keys_of(&owner);
    let asked = json!({
        "name": "  Billing ", "mode": "live", "scope": "read_write", "scopes": ["products:read", "products:write"],
        "expiresAt": in_ms(HOUR_MS), "allowlist": ["::ffff:127.0.0.1", "::1"], "requestsPerMinute": 600,
        "rotateEveryDays": 30
    });
    let made = owner.post(&path, asked).await;
    let json = made.gives(201);
    let (id, token) = (text(json, "/id"), text(json, "/key"));
    assert_eq!(TokenKind::of(&token), Some(TokenKind::TeamLive));
    assert_eq!(json["name"], "Billing");
    assert_eq!((&json["kind"], &json["mode"], &json["status"]), (&json!("team"), &json!("live"), &json!("active")));
    assert_eq!((&json["scope"], &json["prefix"]), (&json!("read_write"), &json!(token[..12])));
    assert_eq!(json["allowlist"], json!(["127.0.0.1/32", "::1/128"]));
    assert_eq!((&json["requestsPerMinute"], &json["rotateEveryDays"]), (&json!(600), &json!(30)));
    assert_eq!(json["creator"], json!({"id": owner.user_id, "name": "Ada"}));
    assert!(json["rotationDueAt"].is_string() && json["revokedAt"].is_null() && json["supersededBy"].is_null());

    let got = owner.get(&format!("{path}/{id}")).await;
    assert!(got.gives(200)["key"].is_null(), "a token is shown once: {}", got.text());
    let listed = ids(&owner, &path, "apiKeys").await;
    assert_eq!((listed.len(), &listed[0]), (3, &id));

    let key = install.api().with_key(&token);
    let me = key.get("/api/v1/me").await;
    assert_eq!(me.gives(200)["id"], id);
    assert_eq!(
        (&me.json["team"]["id"], &me.json["limits"]["requests_per_minute"]),
        (&json!(owner.team_id), &json!(600))
    );
    key.get("/v1/keys").await.refused(Reason::ScopeInsufficient);

    let one = format!("{path}/{id}");
    let changed = owner.patch(&one, json!({"name": "Invoices", "allowlist": null, "rotateEveryDays": null})).await;
    assert_eq!((&changed.gives(200)["name"], &changed.json["allowlist"]), (&json!("Invoices"), &json!([])));
    assert!(changed.json["rotationDueAt"].is_null() && !changed.json["expiresAt"].is_null());
    assert_eq!(owner.patch(&one, json!({"enabled": false})).await.gives(200)["status"], "disabled");
    ends(&key).await;
    assert_eq!(owner.patch(&one, json!({"enabled": true})).await.gives(200)["status"], "active");
    within(Duration::from_secs(10), "the key works again", || async {
        (key.get("/api/v1/me").await.status == 200).then_some(())
    })
    .await;

    let rotated = owner.post(&format!("{one}/rotate"), json!({"overlapHours": 168})).await;
    let json = rotated.gives(200);
    let (new_id, new_token) = (text(json, "/id"), text(json, "/key"));
    assert_eq!((&json["name"], &json["oldKeyExpiresAt"]), (&json!("Invoices"), &changed.json["expiresAt"]));
    owner.post(&format!("{one}/rotate"), json!({})).await.refused(Reason::Conflict);
    owner.patch(&one, json!({"name": "Late"})).await.refused(Reason::Conflict);
    let new = install.api().with_key(&new_token);
    let told = new.get("/api/v1/me").await;
    assert_eq!(told.gives(200)["id"], new_id);
    assert_eq!(told.header("paperkey-key-expires"), None);
    within(PROMISED, "the old half tells of its end", || async {
        let told = key.get("/api/v1/me").await;
        let end = told.header("paperkey-key-expires").map(str::to_owned)?;
        assert_eq!((&told.gives(200)["status"], &told.json["expires_at"]), (&json!("superseded"), &json!(end)));
        assert_eq!(told.json["superseded_by"], json!(new_id));
        Some(())
    })
    .await;

    let revoked = owner.delete(&format!("{path}/{new_id}")).await;
    assert_eq!(revoked.gives(200)["id"], new_id);
    ends(&new).await;
    let again = owner.delete(&format!("{path}/{new_id}")).await;
    assert_eq!(again.gives(200), &revoked.json);
    let listed = owner.get(&format!("{path}/{new_id}")).await;
    assert_eq!(
        (&listed.gives(200)["status"], &listed.json["revokedAt"]),
        (&json!("revoked"), &revoked.json["revokedAt"])
    );
    assert_eq!(listed.json["revokedBy"], json!({"id": owner.user_id, "name": "Ada"}));
    key.get("/api/v1/me").await.gives(200);
}

async fn a_key_makes_rotates_and_ends_others(install: Installation) {
    let owner = install.register().await;
    let maker = owner.integration();
    let made = maker.post("/v1/keys", json!({"name": "CI", "type": "live", "scope": "read_only"})).await;
    let json = made.gives(201);
    let (id, reader) = (text(json, "/id"), install.api().with_key(&text(json, "/key")));
    assert_eq!((&json["kind"], &json["scope"]), (&json!("platform"), &json!("read_only")));
    assert_eq!(json["creator"]["name"], "First live key");
    reader.get("/api/v1/products").await.gives(200);
    reader.post("/v1/keys", json!({"name": "More", "type": "live"})).await.refused(Reason::ScopeInsufficient);
    assert_eq!(maker.get(&format!("/v1/keys/{id}")).await.gives(200)["name"], "CI");
    assert!(ids(&maker, "/v1/keys?page_size=1", "api_keys").await.contains(&id));

    let test = maker.post("/v1/keys", json!({"name": "Test", "type": "test"})).await;
    let test_token = text(test.gives(201), "/key");
    assert_eq!(TokenKind::of(&test_token), Some(TokenKind::PlatformTest));
    assert!(test.json["expires_at"].is_string());
    let tester = install.api().with_key(&test_token);
    assert_eq!(ids(&tester, "/v1/keys", "api_keys").await, [text(&test.json, "/id")]);
    tester.get(&format!("/v1/keys/{id}")).await.refused(Reason::NotFound);
    tester.delete(&format!("/v1/keys/{id}")).await.refused(Reason::NotFound);
    tester.post("/v1/keys", json!({"name": "More", "type": "test"})).await.refused(Reason::ScopeInsufficient);
    let late = json!({"name": "Test", "type": "test", "expires_at": in_ms(25 * HOUR_MS)});
    maker.post("/v1/keys", late).await.refused_for("expires_at");

    let (narrow_id, narrow) = create(&owner, json!({"name": "Narrow", "scopes": ["keys:write", "keys:read"]})).await;
    let narrow = install.api().with_key(&narrow);
    let wide = json!({"name": "Wide", "type": "live", "scopes": ["products:write"]});
    narrow.post("/v1/keys", wide).await.refused(Reason::ScopeInsufficient);
    narrow.post(&format!("/v1/keys/{id}/rotate"), json!({})).await.refused(Reason::ScopeInsufficient);
    let rotated = maker.post(&format!("/v1/keys/{id}/rotate"), json!({"overlap_hours": 0})).await;
    let new = install.api().with_key(&text(&rotated.json, "/key"));
    ends(&reader).await;
    new.get("/api/v1/products").await.gives(200);
    let gone = maker.delete(&format!("/v1/keys/{}", text(&rotated.json, "/id"))).await;
    assert!(gone.gives(200)["effective_by"].is_string());
    ends(&new).await;
    // Ending itself is allowed to each.
    narrow.delete(&format!("/v1/keys/{narrow_id}")).await.gives(200);
    ends(&narrow).await;

    let system = install.api().with_key(&install.system_key().await);
    system.post("/v1/keys", json!({"name": "Whose?", "type": "live"})).await.refused(Reason::ValidationFailed);
    let named = system.for_team(&owner.team_id);
    named.post("/v1/keys", json!({"name": "By the installation", "type": "live"})).await.gives(201);
    let told = system.get("/api/v1/me").await;
    assert_eq!((&told.gives(200)["kind"], &told.json["team"]), (&json!("system"), &Value::Null));

    // Ten, and not one more; the free key and old halves are beside them.
    let active = async || {
        let answer = maker.get("/v1/keys?page_size=100").await;
        let counts = |key: &&Value| {
            ["team", "platform"].contains(&text(key, "/kind").as_str())
                && ["active", "disabled"].contains(&text(key, "/status").as_str())
        };
        answer.gives(200)["api_keys"].as_array().expect("a list").iter().filter(counts).count()
    };
    while active().await < 10 {
        maker.post("/v1/keys", json!({"name": "One more", "type": "live"})).await.gives(201);
    }
    let eleventh = json!({"name": "Eleventh", "type": "live"});
    maker.post("/v1/keys", eleventh.clone()).await.refused(Reason::KeyLimitReached);
    owner.post(&keys_of(&owner), json!({"name": "Eleventh"})).await.refused(Reason::KeyLimitReached);
    let racers: Vec<_> = (0..5).map(|_| maker.post("/v1/keys", eleventh.clone())).collect();
    for refused in futures_util::future::join_all(racers).await {
        refused.refused(Reason::KeyLimitReached);
    }
}

async fn a_key_rotates_itself_and_a_lost_answer_locks_nobody_out(install: Installation) {
    let owner = install.register().await;
    let old = owner.integration();
    let first = old.post("/v1/keys/self/rotate", json!({})).await;
    let lost = install.api().with_key(&text(&first.json, "/key"));
    let second = old.post("/v1/keys/self/rotate", json!({})).await;
    assert_eq!(second.json["old_key_expires_at"], first.json["old_key_expires_at"]);
    lost.get("/api/v1/me").await.refused(Reason::InvalidCredentials);
    let new = install.api().with_key(&text(&second.json, "/key"));
    assert_eq!(new.get("/api/v1/me").await.gives(200)["name"], "First live key");
    old.post("/v1/keys/self/rotate", json!({})).await.refused(Reason::Conflict);
    old.get("/api/v1/me").await.gives(200);
    let ended = new.post("/v1/keys/self/rotate", json!({"overlap_hours": 0})).await;
    ends(&new).await;
    install.api().with_key(&text(&ended.json, "/key")).get("/api/v1/me").await.gives(200);
    let free = install.api().with_key(&owner.free_key).post("/v1/keys/self/rotate", json!({})).await;
    assert_eq!(TokenKind::of(&text(&free.json, "/key")), Some(TokenKind::Free));
    owner.post("/v1/keys/self/rotate", json!({})).await.refused(Reason::InvalidCredentials);
}

async fn a_users_token_does_what_its_user_may(install: Installation) {
    let owner = install.register().await;
    let asked = json!({"name": "Laptop", "kind": "user_token", "scopes": ["products:read", "keys:read", "keys:write"]});
    let made = owner.post(&keys_of(&owner), asked).await;
    let (id, token) = (text(made.gives(201), "/id"), text(&made.json, "/key"));
    assert_eq!((&made.json["kind"], &made.json["userId"]), (&json!("user_token"), &json!(owner.user_id)));
    assert_eq!(TokenKind::of(&token), Some(TokenKind::User));
    let laptop = install.api().with_key(&token);
    laptop.get("/api/v1/products").await.gives(200);
    laptop.post("/api/v1/products", json!({"name": "App"})).await.refused(Reason::ScopeInsufficient);
    laptop.post("/v1/keys", json!({"name": "More", "type": "live"})).await.refused(Reason::ScopeInsufficient);
    let me = laptop.get("/api/v1/me").await;
    assert_eq!((&me.gives(200)["user_id"], &me.json["mode"]), (&json!(owner.user_id), &json!("live")));
    let integration = owner.integration();
    integration.post(&format!("/v1/keys/{id}/rotate"), json!({})).await.refused(Reason::ScopeInsufficient);
    integration.delete(&format!("/v1/keys/{id}")).await.refused(Reason::ScopeInsufficient);
    let rotated = laptop.post("/v1/keys/self/rotate", json!({})).await;
    let new = install.api().with_key(&text(&rotated.json, "/key"));
    new.get("/api/v1/products").await.gives(200);
    laptop.delete(&format!("/v1/keys/{id}")).await.gives(200);
    ends(&laptop).await;
    let test = json!({"name": "Laptop", "kind": "user_token", "mode": "test"});
    owner.post(&keys_of(&owner), test).await.refused_for("mode");
    let stranger = install.register().await;
    let foreign = json!({"name": "Laptop", "kind": "user_token", "userId": stranger.user_id});
    owner.post(&keys_of(&owner), foreign).await.refused_for("userId");
}

async fn an_address_off_the_list_is_turned_away(install: Installation) {
    let owner = install.register().await;
    let (id, token) = create(&owner, json!({"name": "Office", "allowlist": ["192.0.2.0/24"]})).await;
    let office = install.api().with_key(&token);
    office.get("/api/v1/me").await.refused(Reason::IpNotAllowed);
    owner.patch(&format!("{}/{id}", keys_of(&owner)), json!({"allowlist": ["127.0.0.0/8"]})).await.gives(200);
    within(PROMISED, "the address is let in", || async {
        (office.get("/api/v1/me").await.status == 200).then_some(())
    })
    .await;
}

async fn a_stranger_gets_a_sandbox_and_reports_a_leak(install: Installation) {
    let owner = install.register().await;
    let made = install.api().post("/v1/keys/test", json!({})).await;
    let token = text(made.gives(201), "/key");
    assert_eq!(TokenKind::of(&token), Some(TokenKind::PlatformTest));
    assert!(made.json["expires_at"].is_string());
    let sandbox = install.api().with_key(&token);
    let me = sandbox.get("/api/v1/me").await;
    assert_eq!((&me.gives(200)["mode"], &me.json["team"]["name"]), (&json!("test"), &json!("Sandbox")));
    assert_ne!(me.json["team"]["id"], json!(owner.team_id));
    sandbox.post("/api/v1/products", json!({"name": "App"})).await.gives(201);
    assert_eq!(sandbox.get("/api/v1/products").await.gives(200)["products"].as_array().unwrap().len(), 1);

    let product = owner.create_product("App").await;
    let (_, leaked) = create(&owner, json!({"name": "Leaked"})).await;
    let (holder, server) = (install.api().with_key(&leaked), owner.server(&product));
    holder.get("/api/v1/me").await.gives(200);
    server.get(&format!("/licenses?productId={}", product.id)).await.gives(200);
    let unknown = TokenKind::TeamLive.generate();
    let report = async |tokens: Vec<&str>| {
        let answer = install.api().post("/v1/keys/report-leak", json!({"tokens": tokens})).await;
        assert_eq!(answer.gives(202), &json!({"received": tokens.len()}));
    };
    report(vec![&unknown, "nonsense", &product.public_key, ""]).await;
    server.get(&format!("/licenses?productId={}", product.id)).await.gives(200);
    report(vec![&leaked, &product.secret_key, &token, &leaked]).await;
    for ended in [&holder, &sandbox] {
        ends(ended).await;
    }
    within(PROMISED, "the pair is refused", || async {
        (server.get(&format!("/licenses?productId={}", product.id)).await.status == 401).then_some(())
    })
    .await;
    owner.integration().get("/api/v1/me").await.gives(200);
}

async fn what_is_asked_for_in_nonsense_is_refused_politely(install: Installation) {
    let owner = install.register().await;
    let path = keys_of(&owner);
    for (asked, field) in [
        (json!({}), "name"),
        (json!({"name": ""}), "name"),
        (json!({"name": "  "}), "name"),
        (json!({"name": "K", "scopes": ["licenses:check"]}), "scopes[0]"),
        (json!({"name": "K", "scopes": ["licenses:read", "all"]}), "scopes[1]"),
        (json!({"name": "K", "scopes": []}), "scopes"),
        (json!({"name": "K", "allowlist": ["here"]}), "allowlist[0]"),
        (json!({"name": "K", "expiresAt": in_ms(-MINUTES)}), "expiresAt"),
        (json!({"name": "K", "requestsPerMinute": 0}), "requestsPerMinute"),
        (json!({"name": "K", "rotateEveryDays": 366}), "rotateEveryDays"),
        (json!({"name": "K", "kind": "system"}), "kind"),
        (json!({"name": "K", "mode": "both"}), "mode"),
        (json!({"name": "K", "scope": "admin"}), "scope"),
        (json!({"name": "K", "nonsense": 1}), "nonsense"),
    ] {
        owner.post(&path, asked).await.refused_for(field);
    }
    let (id, _) = create(&owner, json!({"name": "Key"})).await;
    let one = format!("{path}/{id}");
    for (asked, field) in [
        (json!({"name": null}), "name"),
        (json!({"enabled": null}), "enabled"),
        (json!({"enabled": "no"}), "enabled"),
        (json!({"mode": "test"}), "mode"),
        (json!({"scopes": []}), "scopes"),
        (json!({"scopes": null}), "scopes"),
        (json!({"expiresAt": "soon"}), "expiresAt"),
        (json!({"allowlist": ["10.0.0.0/8", "10.0.0.0/99"]}), "allowlist[1]"),
    ] {
        owner.patch(&one, asked).await.refused_for(field);
    }
    owner.post(&format!("{one}/rotate"), json!({"overlapHours": 169})).await.refused_for("overlapHours");
    owner.integration().post("/v1/keys", json!({"name": "K", "type": "both"})).await.refused_for("type");
    owner.integration().post("/v1/keys", json!({"name": "K"})).await.refused_for("type");
    install.api().post("/v1/keys/report-leak", json!({"tokens": []})).await.refused_for("tokens");
    install.api().post("/v1/keys/report-leak", json!({"tokens": vec!["x"; 101]})).await.refused_for("tokens");

    let stranger = install.register().await;
    for (verb, path) in [
        (Method::GET, one.clone()),
        (Method::DELETE, one.clone()),
        (Method::GET, path.clone()),
        (Method::GET, format!("{}/{id}", keys_of(&stranger))),
        (Method::DELETE, format!("{}/{id}", keys_of(&stranger))),
        (Method::GET, format!("{}/nobodys", keys_of(&owner))),
    ] {
        stranger.call(verb, &path, None).await.refused(Reason::NotFound);
    }
    assert_eq!(owner.get(&one).await.gives(200)["name"], "Key");
}

#[tokio::test(flavor = "multi_thread")]
async fn in_one_process_the_next_call_feels_a_revocation() {
    let install = Installation::all_in_one().await;
    let owner = install.register().await;
    for _ in 0..5 {
        let (id, token) = create(&owner, json!({"name": "Key"})).await;
        let key = install.api().with_key(&token);
        key.get("/api/v1/me").await.gives(200);
        owner.delete(&format!("{}/{id}", keys_of(&owner))).await.gives(200);
        key.get("/api/v1/me").await.refused(Reason::InvalidCredentials);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_a_fleet_a_revoked_key_stops_within_a_second_at_every_gateway() {
    let Some(install) = Installation::fleet_with_two_licensings().await else { return };
    let owner = install.register().await;
    let (id, token) = create(&owner, json!({"name": "Key"})).await;
    let (here, elsewhere) = (install.api().with_key(&token), install.second_api().with_key(&token));
    for _ in 0..5 {
        here.get("/api/v1/me").await.gives(200);
        elsewhere.get("/api/v1/me").await.gives(200);
    }
    owner.delete(&format!("{}/{id}", keys_of(&owner))).await.gives(200);
    let revoked = Instant::now();
    let stops = async |key: &Api| {
        ends(key).await;
        assert!(revoked.elapsed() <= PROMISED + Duration::from_millis(200), "{:?}", revoked.elapsed());
        for _ in 0..20 {
            key.get("/api/v1/me").await.refused(Reason::InvalidCredentials);
        }
    };
    tokio::join!(stops(&here), stops(&elsewhere));
}

async fn when_a_key_was_last_used_is_known_to_the_minute_and_costs_no_write_a_call(install: Installation) {
    const CALLS: u64 = 300;
    let owner = install.register().await;
    let made = owner.create_key(json!({"name": "Used"})).await;
    let one = format!("{}/{}", keys_of(&owner), made.id);
    assert!(owner.get(&one).await.gives(200)["lastUsedAt"].is_null());
    let key = install.api().with_key(&made.token);
    key.get("/api/v1/products").await.gives(200);
    let auth = install.operations(install.host_of("auth"));
    let writes = async || {
        let metrics = auth.get("/metrics").await.text();
        let name = "paperkey_db_write_jobs_total{service=\"auth\"} ";
        let line = metrics.lines().find_map(|line| line.strip_prefix(name)).expect("the metric is there");
        line.parse::<u64>().expect("it is a number")
    };
    let (before, began) = (writes().await, Instant::now());
    for _ in 0..CALLS {
        key.get("/api/v1/products").await.gives(200);
    }
    // Workers look for work, and uses are handed over once a second; not once a call.
    let (during, idle) = (writes().await - before, 40 + 20 * began.elapsed().as_secs());
    assert!(during <= idle && during < CALLS / 2, "{during} writes during {CALLS} calls in {:?}", began.elapsed());
    let used = paperkey_tests::eventually("the use is known", || async {
        owner.get(&one).await.gives(200)["lastUsedAt"].as_str().map(str::to_owned)
    })
    .await;
    assert!(used.ends_with(":00.000Z"), "to the minute: {used}");
}

async fn a_key_of_an_hour_is_made_to_try_calls_out_with(install: Installation) {
    let owner = install.register().await;
    let path = keys_of(&owner);
    for number in 1..10 {
        create(&owner, json!({"name": format!("Key {number}")})).await;
    }
    owner.post(&path, json!({"name": "Eleventh"})).await.refused(Reason::KeyLimitReached);
    let made = owner.post(&format!("{path}/temporary"), json!({})).await;
    let json = made.gives(201);
    let (id, token) = (text(json, "/id"), text(json, "/key"));
    assert_eq!(TokenKind::of(&token), Some(TokenKind::TeamTest));
    assert_eq!(
        (&json["mode"], &json["scope"], &json["temporary"]),
        (&json!("test"), &json!("read_write"), &json!(true))
    );
    assert_eq!(json["name"], format!("Reference, {}", owner.email));
    let left_ms = paperkey_tests::people::time_ms(&text(json, "/expiresAt")) - Clock::system().now_ms();
    assert!((HOUR_MS - MINUTES..=HOUR_MS).contains(&left_ms), "{left_ms}");
    assert!(ids(&owner, &path, "apiKeys").await.contains(&id), "whoever looks after keys sees every one that works");

    // It reads and writes, in the world of test data alone.
    let key = install.api().with_key(&token);
    let product = key.post("/api/v1/products", json!({"name": "Tried out"})).await;
    let product = text(product.gives(201), "/id");
    key.get(&format!("/api/v1/products/{product}")).await.gives(200);
    owner.get(&format!("/products/{product}")).await.refused(Reason::NotFound);
    key.post("/v1/keys", json!({"name": "Wider", "type": "live"})).await.refused(Reason::ScopeInsufficient);
    key.post("/v1/keys/self/rotate", json!({})).await.refused(Reason::Conflict);
    let one = format!("{path}/{id}");
    owner.post(&format!("{one}/rotate"), json!({})).await.refused(Reason::Conflict);
    owner.patch(&one, json!({"expiresAt": null})).await.refused_for("expiresAt");
    owner.patch(&one, json!({"expiresAt": in_ms(2 * HOUR_MS)})).await.refused_for("expiresAt");

    for role in ["manager", "member"] {
        let mate = owner.team_mate(&install, role).await;
        mate.post(&format!("{path}/temporary"), json!({})).await.refused(Reason::RoleInsufficient);
    }
    let stranger = install.register().await;
    stranger.post(&format!("{path}/temporary"), json!({})).await.refused(Reason::NotFound);
    for _ in 1..20 {
        owner.in_test_mode().post(&format!("{path}/temporary"), json!({})).await.gives(201);
    }
    let full = owner.post(&format!("{path}/temporary"), json!({})).await;
    full.refused(Reason::KeyLimitReached);
    assert!(full.text().contains("20 temporary keys"), "{}", full.text());
    owner.delete(&one).await.gives(200);
    ends(&key).await;
    owner.post(&format!("{path}/temporary"), json!({})).await.gives(201);
    owner.post(&path, json!({"name": "Eleventh"})).await.refused(Reason::KeyLimitReached);
}
