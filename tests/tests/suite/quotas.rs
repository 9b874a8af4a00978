//! Units of meters: never one too many, none lost, by every door that takes them.

use std::sync::{
    Arc,
    atomic::{AtomicI64, Ordering},
};

use futures_util::future::join_all;
use http::Method;
use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{Account, Api, Echo, Installation, Receiver, Settings, on_both_kinds_with, people::text, within};
use serde_json::{Value, json};

use crate::freshness::PROMISED;

on_both_kinds_with! {
    hundred_units;
    fifty_callers_race_for_the_last_hundred_units,
    what_was_let_through_is_counted_whatever_is_killed,
    a_team_sees_what_it_has_used_and_what_is_left,
    test_mode_counts_nothing,
    a_team_sees_what_it_has_used_day_by_day,
    a_change_of_the_plan_acts_at_once,
    a_proxy_takes_units_by_asking,
    the_team_is_told_at_eighty_and_at_a_hundred_percent,
}

/// The tier that everybody begins on has a hundred renders a month.
fn hundred_units() -> Settings {
    let tiers = "{ free = { requests_per_minute = 1000000 }, pro = { requests_per_minute = 1000000 } }";
    Settings { environment: vec![("PAPERKEY__TIERS", tiers.to_owned())], ..Settings::default() }
}

async fn take(api: &Api, key: &str, cost: i64) -> Value {
    let answer = api.post("/v1/keys/verify", json!({"key": key, "meter": "renders", "cost": cost})).await;
    answer.gives(200).clone()
}

async fn used(owner: &Account) -> i64 {
    let answer = owner.get(&format!("/teams/{}/usage", owner.team_id)).await;
    let meters = answer.gives(200)["meters"].as_array().unwrap().clone();
    let renders = meters.iter().find(|meter| meter["meter"] == "renders").expect("every configured meter is listed");
    renders["used"].as_i64().unwrap()
}

async fn fifty_callers_race_for_the_last_hundred_units(install: Installation) {
    let owner = install.register().await;
    let granted = AtomicI64::new(0);
    let callers = (0..50).map(|index| {
        let (api, key, granted) = (owner.integration().on_new_connections(), owner.free_key.clone(), &granted);
        async move {
            let cost = index % 7 + 1;
            let answer = take(&api, &key, cost).await;
            match text(&answer, "/code").as_str() {
                "valid" => {
                    granted.fetch_add(cost, Ordering::SeqCst);
                    assert!(answer["quota"]["used"].as_i64().unwrap() <= 100, "{answer}");
                }
                "quota_exceeded" => {
                    assert_eq!(answer["valid"], false);
                    assert!(answer["quota"]["used"].as_i64().unwrap() + cost > 100, "refused too early: {answer}");
                }
                other => panic!("{other}"),
            }
        }
    });
    join_all(callers).await;
    let granted = granted.load(Ordering::SeqCst);
    assert!((94..=100).contains(&granted), "{granted} units were granted");
    assert_eq!(used(&owner).await, granted);
}

async fn what_was_let_through_is_counted_whatever_is_killed(mut install: Installation) {
    let owner = install.register().await;
    let system = install.api().with_key(&install.system_key().await);
    let limits = format!("/api/v1/teams/{}/limits", owner.team_id);
    system.call(Method::PUT, &limits, Some(json!({"quotas": {"renders": 1_000_000}}))).await.gives(200);
    let mut answered = 0;
    for round in 1..=5 {
        let owner = owner.at(&install.api());
        let granted = Arc::new(AtomicI64::new(0));
        let callers: Vec<_> = (1..=6)
            .map(|cost| {
                let (api, key, granted) = (owner.integration(), owner.free_key.clone(), Arc::clone(&granted));
                tokio::spawn(async move {
                    let body = json!({"key": key, "meter": "renders", "cost": cost});
                    while let Ok(answer) = api.try_post("/v1/keys/verify", body.clone()).await {
                        if answer.status != 200 {
                            return;
                        }
                        assert_eq!(text(&answer.json, "/code"), "valid");
                        granted.fetch_add(cost, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        within(PROMISED * 60, "units are taken", || async { (granted.load(Ordering::SeqCst) > 50).then_some(()) })
            .await;
        let victim = install.host_of("auth");
        install.kill(victim);
        for caller in callers {
            caller.await.expect("a caller is refused in an orderly way");
        }
        answered += granted.load(Ordering::SeqCst);
        install.start(victim).await.expect("it starts again");
        let owner = owner.at(&install.api());
        let counted = paperkey_tests::eventually("auth answers again", || async {
            let answer = owner.try_get(&format!("/teams/{}/usage", owner.team_id)).await.ok()?;
            answer.json["meters"].as_array()?.iter().find(|meter| meter["meter"] == "renders")?["used"].as_i64()
        })
        .await;
        // Units that were taken for a call whose answer was lost stay taken, or are given back later; six calls were under
        // way at most.
        let at_most = answered + round * 6 * 7;
        assert!((answered..=at_most).contains(&counted), "{answered} were let through, {counted} counted");
    }
}

async fn a_team_sees_what_it_has_used_and_what_is_left(install: Installation) {
    let owner = install.register().await;
    let vendor = owner.integration();
    let answer = take(&vendor, &owner.free_key, 30).await;
    assert_eq!((answer["quota"]["used"].clone(), answer["quota"]["remaining"].clone()), (json!(30), json!(70)));
    let looked = take(&vendor, &owner.free_key, 0).await;
    assert_eq!((looked["quota"]["used"].clone(), looked["code"].clone()), (json!(30), json!("valid")));
    let usage = vendor.get("/v1/usage").await;
    let meter = &usage.gives(200)["meters"][0];
    assert_eq!((&meter["meter"], &meter["used"], &meter["limit"]), (&json!("renders"), &json!(30), &json!(100)));
    assert!(text(meter, "/resets_at").ends_with("-01T00:00:00.000Z"), "{meter}");
    assert_eq!(used(&owner).await, 30);
    let mate = owner.team_mate(&install, "member").await;
    mate.get(&format!("/teams/{}/usage", owner.team_id)).await.gives(200);
    let stranger = install.register().await;
    stranger.get(&format!("/teams/{}/usage", owner.team_id)).await.refused(Reason::NotFound);
    let refused = vendor.post("/v1/keys/verify", json!({"key": owner.free_key, "meter": "moons"})).await;
    refused.refused_for("meter");
    vendor.post("/v1/keys/verify", json!({"key": owner.free_key, "cost": 1})).await.refused_for("cost");
    vendor
        .post("/v1/keys/verify", json!({"key": owner.free_key, "meter": "renders", "cost": -1}))
        .await
        .refused_for("cost");
}

async fn test_mode_counts_nothing(install: Installation) {
    let owner = install.register().await;
    let key = owner.create_key(json!({"name": "Test", "mode": "test"})).await;
    for _ in 0..3 {
        assert_eq!(take(&owner.integration(), &key.token, 90).await["code"], "valid");
    }
    assert_eq!(used(&owner).await, 0);
}

async fn a_team_sees_what_it_has_used_day_by_day(install: Installation) {
    let owner = install.register().await;
    let path = format!("/teams/{}/usage/history", owner.team_id);
    for cost in [20, 10] {
        take(&owner.integration(), &owner.free_key, cost).await;
    }
    let answer = owner.get(&format!("{path}?days=7")).await;
    let meters = answer.gives(200)["meters"].as_array().unwrap().clone();
    let renders = meters.iter().find(|meter| meter["meter"] == "renders").expect("every configured meter is listed");
    let days = renders["days"].as_array().unwrap();
    let used: Vec<i64> = days.iter().map(|day| day["used"].as_i64().unwrap()).collect();
    // It may be midnight now.
    assert_eq!((used.len(), used.iter().sum(), used[5] + used[6]), (7, 30, 30));
    let dates: Vec<String> = days.iter().map(|day| text(day, "/date")).collect();
    assert!(dates.iter().all(|date| date.len() == 10) && dates.is_sorted(), "{dates:?}");
    assert_eq!(owner.get(&path).await.gives(200)["meters"][0]["days"].as_array().unwrap().len(), 30);
    let in_test = owner.in_test_mode().get(&path).await;
    assert!(!in_test.gives(200).to_string().contains("\"used\":30"), "{}", in_test.text());
    owner.team_mate(&install, "member").await.get(&path).await.gives(200);
    install.register().await.get(&path).await.refused(Reason::NotFound);
    for nonsense in ["0", "91", "-1"] {
        owner.get(&format!("{path}?days={nonsense}")).await.refused_for("days");
    }
    owner.get(&format!("{path}?days=all")).await.refused(Reason::ValidationFailed);
}

async fn a_change_of_the_plan_acts_at_once(install: Installation) {
    let owner = install.register().await;
    let system = install.api().with_key(&install.system_key().await);
    let put = async |what: &str, body| {
        let path = format!("/api/v1/teams/{}/{what}", owner.team_id);
        system.call(Method::PUT, &path, Some(body)).await.gives(200);
    };
    let vendor = owner.integration();
    let code = async |cost| text(&take(&vendor, &owner.free_key, cost).await, "/code");
    assert_eq!([code(100).await, code(1).await], ["valid", "quota_exceeded"]);
    put("tier", json!({"tier": "pro"})).await;
    assert_eq!(code(9_900).await, "valid");
    assert_eq!(code(1).await, "quota_exceeded");
    put("tier", json!({"tier": "scale"})).await;
    assert_eq!(code(1_000_000).await, "valid");
    put("limits", json!({"quotas": {"renders": 5}})).await;
    assert_eq!(code(1).await, "quota_exceeded");
}

async fn a_proxy_takes_units_by_asking(install: Installation) {
    let owner = install.register().await;
    let key = owner.integration();
    assert_eq!(key.get("/v1/authz?meter=renders&cost=60").await.status, 200);
    let refused = key.get("/v1/authz?meter=renders&cost=60").await;
    refused.refused(Reason::QuotaExceeded);
    assert!(refused.header("retry-after").is_some());
    assert_eq!(key.get("/v1/authz?meter=renders&cost=40").await.status, 200);
    let denied = key.get("/v1/authz?meter=renders&deny=403").await;
    assert_eq!((denied.status.as_u16(), denied.header("paperkey-status")), (403, Some("429")));
    assert_eq!(used(&owner).await, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mounted_server_costs_units_which_come_back_where_it_could_not_be_reached() {
    let backend = Echo::start().await;
    let mounted = format!(
        "[{{ path = \"/v1/pdf/\", url = \"http://{}\", meter = \"renders\", cost = 3, anonymous = true }}, \
         {{ path = \"/v1/gone/\", url = \"http://127.0.0.1:9\", meter = \"renders\", cost = 3 }}]",
        backend.at()
    );
    let settings = hundred_units();
    let environment = settings.environment.into_iter().chain([("PAPERKEY__UPSTREAMS", mounted)]).collect();
    let install = Installation::all_in_one_with(Settings { environment, ..Settings::default() }).await;
    let owner = install.register().await;
    owner.integration().get("/v1/pdf/generate").await.gives(200);
    owner.integration().get("/v1/gone/generate").await.refused(Reason::Unavailable);
    install.api().get("/v1/pdf/generate").await.gives(200);
    assert_eq!(used(&owner).await, 3, "a visitor takes none");
    for _ in 0..32 {
        owner.integration().get("/v1/pdf/generate").await.gives(200);
    }
    owner.integration().get("/v1/pdf/generate").await.refused(Reason::QuotaExceeded);
}

async fn the_team_is_told_at_eighty_and_at_a_hundred_percent(install: Installation) {
    let (owner, receiver) = (install.register().await, Receiver::start().await);
    let events = json!(["quota.warning", "quota.exceeded", "alert.created"]);
    let subscribed = json!({"url": receiver.url(), "events": events});
    owner.post(&format!("/teams/{}/webhooks", owner.team_id), subscribed).await.gives(201);
    let vendor = owner.integration();
    for cost in [79, 1, 1, 19, 1] {
        take(&vendor, &owner.free_key, cost).await;
    }
    let told = receiver
        .wait("both events and both alerts", |deliveries| {
            let mut events: Vec<_> = deliveries.iter().map(|delivery| delivery.event().to_owned()).collect();
            events.sort();
            (events.len() == 4).then_some((events, deliveries.to_vec()))
        })
        .await;
    assert_eq!(told.0, ["alert.created", "alert.created", "quota.exceeded", "quota.warning"]);
    let warning = told.1.iter().find(|delivery| delivery.event() == "quota.warning").unwrap();
    let data = &warning.json["data"];
    assert_eq!((&data["meter"], &data["used"], &data["limit"]), (&json!("renders"), &json!(80), &json!(100)));
    let feed = owner.get(&format!("/teams/{}/alerts", owner.team_id)).await;
    let causes: Vec<_> =
        feed.gives(200)["alerts"].as_array().unwrap().iter().map(|alert| text(alert, "/cause")).collect();
    assert_eq!(causes, ["quota_exceeded", "quota_warning"]);
}
