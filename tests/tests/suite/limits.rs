//! Limits of rates on a running installation: the numbers of the specification, and what gateways share.

use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{
    Account, Answer, Api, Installation, Redis, Settings, eventually, on_both_kinds_with, people::text, within,
};
use serde_json::json;

use crate::freshness::PROMISED;

on_both_kinds_with! {
    as_specified;
    the_numbers_are_those_of_the_specification,
    a_tier_and_a_limit_of_the_team_act_at_once,
}

/// The defaults, where every other test has more generous numbers.
fn as_specified() -> Settings {
    let environment = vec![("PAPERKEY__LIMITS", "{}".to_owned()), ("PAPERKEY__TIERS", "{}".to_owned())];
    Settings { environment, ..Settings::default() }
}

/// What a limit says of itself.
#[track_caller]
fn limit(answer: &Answer) -> u64 {
    answer.header("x-ratelimit-limit").expect("every answer tells of its limit").parse().unwrap()
}

#[track_caller]
fn waits_at_most(answer: &Answer, seconds: u64) {
    let wait: u64 = answer.header("retry-after").expect("a limit says how long to wait").parse().unwrap();
    assert!((1..=seconds).contains(&wait), "{}: {wait}", answer.asked);
}

async fn the_numbers_are_those_of_the_specification(install: Installation) {
    let owner = Account::register(&install.api()).await;
    let product = owner.create_product("App").await;
    let license = owner.issue(&product, json!({})).await;
    // Registering was the first of five.
    for _ in 0..4 {
        assert_eq!(owner.login("wrong password").await.status, 401);
    }
    let refused = owner.login(&owner.password).await;
    refused.refused(Reason::AuthRateLimited);
    waits_at_most(&refused, 900);
    owner.get("/auth/me").await.gives(200);

    let app = owner.app(&product);
    for _ in 0..30 {
        app.validate(&license).await.gives(200);
    }
    let refused = app.validate(&license).await;
    refused.refused(Reason::LicenseRateLimited);
    waits_at_most(&refused, 60);
    for index in 0..10 {
        let answer =
            if index % 2 == 0 { app.activate(&license, "one").await } else { app.deactivate(&license, "one").await };
        answer.gives(200);
    }
    let refused = app.activate(&license, "one").await;
    refused.refused(Reason::LicenseRateLimited);
    waits_at_most(&refused, 3_600);

    // From other addresses, so that what was counted so far is somebody else's.
    let visitor = install.api().from_address("127.0.0.9");
    for _ in 0..5 {
        visitor.post("/v1/keys/test", json!({})).await.gives(201);
    }
    let refused = visitor.post("/v1/keys/test", json!({})).await;
    refused.refused(Reason::RateLimited);
    waits_at_most(&refused, 3_600);
    let guesser = install.api().from_address("127.0.0.10").with_key("nonsense");
    for _ in 0..30 {
        guesser.get("/api/v1/products").await.refused(Reason::InvalidCredentials);
    }
    guesser.get("/v1/keys").await.refused(Reason::RateLimited);
    let many = install.api().from_address("127.0.0.11");
    for _ in 0..100 {
        many.get("/v1/status").await.gives(200);
    }
    many.get("/v1/status").await.refused(Reason::RateLimited);
    let key = many.with_key(&owner.live_key);
    for _ in 0..60 {
        key.get("/v1/status").await.gives(200);
    }
    key.get("/api/v1/me").await.refused(Reason::RateLimited);
}

async fn a_tier_and_a_limit_of_the_team_act_at_once(install: Installation) {
    let owner = install.register().await;
    let system = install.api().with_key(&install.system_key().await);
    let (key, team) = (owner.integration(), owner.team_id.clone());
    let soon = async |expected: u64| {
        within(PROMISED, "the limit is another one", || async {
            (limit(&key.get("/api/v1/me").await) == expected).then_some(())
        })
        .await;
    };
    assert_eq!(limit(&key.get("/api/v1/me").await), 60);
    system
        .call(http::Method::PUT, &format!("/api/v1/teams/{team}/tier"), Some(json!({"tier": "pro"})))
        .await
        .gives(200);
    soon(600).await;
    let limits = format!("/api/v1/teams/{team}/limits");
    let put = async |body| system.call(http::Method::PUT, &limits, Some(body)).await;
    put(json!({"requestsPerMinute": 700})).await.gives(200);
    soon(700).await;
    put(json!({"requests_per_minute": 0})).await.refused_for("requests_per_minute");
    put(json!({"quotas": {"moons": 1}})).await.refused(Reason::ValidationFailed);
    put(json!({})).await.gives(200);
    soon(600).await;
    let own = owner.create_key(json!({"name": "Small", "requestsPerMinute": 7})).await;
    assert_eq!(limit(&install.api().with_key(&own.token).get("/api/v1/me").await), 7);
    owner.call(http::Method::PUT, &limits, Some(json!({}))).await.refused(Reason::InvalidCredentials);
}

/// Two gateways, one store, and a limit that is quickly reached.
async fn sharing(redis: &Redis, extra: &[(&'static str, String)]) -> Option<(Installation, Account, [Api; 2])> {
    let mut environment = vec![
        ("PAPERKEY__REDIS__URL", redis.url()),
        ("PAPERKEY__TIERS", "{ free = { requests_per_minute = 40 } }".to_owned()),
    ];
    environment.extend(extra.iter().cloned());
    let settings = Settings { environment, two_licensings: true, ..Settings::default() };
    let install = Installation::fleet_with(settings).await?;
    let owner = install.register().await;
    let key = |api: Api| api.with_key(&owner.live_key);
    let gateways = [key(install.api()), key(install.second_api())];
    Some((install, owner, gateways))
}

/// Calls until a gateway refuses; how many were let through.
async fn until_refused(gateways: &[Api]) -> usize {
    let mut passed = 0;
    for gateway in gateways.iter().cycle() {
        let answer = gateway.get("/api/v1/me").await;
        if answer.status != 200 {
            answer.refused(Reason::RateLimited);
            waits_at_most(&answer, 60);
            return passed;
        }
        passed += 1;
        assert!(passed <= 40, "more than the limit");
    }
    passed
}

#[tokio::test(flavor = "multi_thread")]
async fn gateways_share_one_limit_in_redis() {
    let Some(redis) = Redis::start().await else { return };
    let Some((_install, _, gateways)) = sharing(&redis, &[]).await else { return };
    assert_eq!(until_refused(&gateways).await, 40);
    for gateway in &gateways {
        gateway.get("/api/v1/me").await.refused(Reason::RateLimited);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_each_gateway_lets_through_its_share_and_no_answer_waits() {
    let Some(mut redis) = Redis::start().await else { return };
    let Some((_install, owner, gateways)) = sharing(&redis, &[]).await else { return };
    // A key that nobody has used yet, so that nothing of it was counted before.
    let fresh = owner.create_key(json!({"name": "Fresh"})).await;
    let gateways = gateways.map(|gateway| gateway.with_key(&fresh.token));
    redis.pause();
    let mut passed = 0;
    for index in 0..60 {
        let (answer, took) = timed(&gateways[index % 2]).await;
        passed += usize::from(answer.status == 200);
        assert!(took < std::time::Duration::from_millis(250), "an answer took {took:?} with the store paused");
    }
    assert_eq!(passed, 40, "twenty each");
    redis.resume();
    redis.kill();
    assert_eq!(gateways[0].get("/api/v1/me").await.status, 429, "it is used up without the store as well");
    redis.restart().await;
    eventually("limits are shared again", || async {
        let other = owner.create_key(json!({"name": "Other"})).await;
        let pair = [gateways[0].with_key(&other.token), gateways[1].with_key(&other.token)];
        let told = [limit_left(&pair[0]).await, limit_left(&pair[1]).await];
        owner.revoke_key(&other).await;
        (told == [39, 38]).then_some(())
    })
    .await;
}

async fn limit_left(api: &Api) -> u64 {
    api.get("/api/v1/me").await.header("x-ratelimit-remaining").unwrap_or_default().parse().unwrap_or_default()
}

async fn timed(api: &Api) -> (Answer, std::time::Duration) {
    let began = std::time::Instant::now();
    (api.get("/api/v1/me").await, began.elapsed())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_limit_refuses_without_redis() {
    let Some(mut redis) = Redis::start().await else { return };
    let closed = [("PAPERKEY__LIMITS__PER_KEY__ON_STORE_FAILURE", "closed".to_owned())];
    let Some((_install, _, gateways)) = sharing(&redis, &closed).await else { return };
    gateways[0].get("/api/v1/me").await.gives(200);
    redis.kill();
    let refused = gateways[0].get("/api/v1/me").await;
    refused.refused(Reason::Unavailable);
    assert!(refused.header("retry-after").is_some());
    let text = text(&refused.json, "/error/message");
    assert!(!text.contains("127.0.0.1"), "{text}");
}
