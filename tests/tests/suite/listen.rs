//! `paperkey listen`: events reach a developer's machine as an endpoint would get them, once each, whatever becomes of
//! the connection.

use std::{collections::BTreeSet, fs, path::Path};

use paperkey_proto::{Error, errors::v1::Reason};
use paperkey_tests::{
    Account, Installation, Product, Receiver, StandIn, on_both_kinds,
    process::{self, Ended, Process},
    receiver::Delivery,
    stand_in::{ready, shown},
};
use serde_json::json;
use standardwebhooks::Webhook;
use tempfile::TempDir;
use tonic::Status;

on_both_kinds! {
    what_happens_reaches_the_developers_machine,
    events_of_the_team_and_of_test_data_are_told_apart,
    a_key_that_is_not_good_ends_the_command,
}

const NOW: i64 = 1_790_000_000_000;
/// A payload that no writer of JSON would write a second time.
const PAYLOAD: &str = "{\"id\":\"evt_1\",\"event\":\"license.created\" , \"data\":{\"email\":\"zo\u{eb}\\u00eb\"}}";

fn environment(api: &str, more: &[(&str, &str)]) -> Vec<(String, String)> {
    let given = [("PAPERKEY_URL", api), ("PAPERKEY_API_KEY", "pb_live_stand_in")];
    given.iter().chain(more).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// Starts listening, with these arguments beside where to forward to.
fn listen(folder: &Path, api: &str, forward: &str, arguments: &[&str], more: &[(&str, &str)]) -> Process {
    let mut all = vec!["listen", "--forward", forward];
    all.extend(arguments);
    Process::start("listen", process::command(&all, &environment(api, more), folder))
}

/// Listens until it ends by itself.
async fn listened(api: &str, forward: &str, arguments: &[&str], more: &[(&str, &str)]) -> Ended {
    let folder = TempDir::new().unwrap();
    let mut all = vec!["listen", "--forward", forward];
    all.extend(arguments);
    process::run(process::command(&all, &environment(api, more), folder.path()), "").await
}

/// Waits until it watches, and answers with the secret that it made.
async fn is_ready(listening: &mut Process) -> Option<String> {
    let ready = listening.line(|line| line.text.starts_with("Ready: ").then_some(())).await;
    ready.unwrap_or_else(|wrote| panic!("it does not listen:\n{wrote}"));
    listening.lines().iter().find_map(|line| {
        let secret = line.text.strip_prefix("Your webhook signing secret is ")?;
        Some(secret.strip_suffix(" (this session only)")?.to_owned())
    })
}

async fn says(listening: &mut Process, what: &str) -> String {
    let said = listening.line(|line| line.text.contains(what).then(|| line.text.clone())).await;
    said.unwrap_or_else(|wrote| panic!("it has ended without saying {what:?}:\n{wrote}"))
}

#[track_caller]
fn verifies(delivery: &Delivery, secret: &str) {
    delivery.is_signed_with(secret);
    Webhook::new(secret).unwrap().verify(&delivery.body, &delivery.headers).unwrap();
}

fn ids(arrived: &[Delivery]) -> Vec<String> {
    arrived.iter().map(|delivery| delivery.event_id().to_owned()).collect()
}

// --- against a stand-in ----------------------------------------------------------------------------------------------

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_sent_byte_for_byte_under_the_headers_of_a_delivery() {
    let (receiver, folder) = (Receiver::start().await, TempDir::new().unwrap());
    let other = "{\"id\":\"evt_2\",\"event\":\"license.revoked\"}";
    let wanted = "{\"id\":\"evt_3\",\"event\":\"license.updated\"}";
    let script = vec![
        ready(),
        shown("evt_1", "license.created", NOW, PAYLOAD),
        shown("evt_2", "license.revoked", NOW, other),
        shown("evt_3", "license.updated", NOW, wanted),
    ];
    let api = StandIn::watching(vec![script]).await;
    let arguments =
        ["--product", "prod_1", "--team", "team_1", "--mode", "test", "--events", "license.created,license.updated"];
    let mut listening = listen(folder.path(), api.url(), receiver.url(), &arguments, &[]);
    let secret = is_ready(&mut listening).await.expect("it makes a secret");
    let arrived = receiver.received(2).await;
    let first = arrived.iter().find(|delivery| delivery.event_id() == "evt_1").expect("the first event arrives");
    assert_eq!(first.body, PAYLOAD);
    for delivery in &arrived {
        verifies(delivery, &secret);
        assert!(delivery.header("user-agent").starts_with("Paperkey/"), "{delivery:?}");
        assert_ne!(delivery.event(), "license.revoked", "nobody asked for it");
    }
    let deliveries: BTreeSet<_> = arrived.iter().map(|delivery| delivery.header("webhook-id")).collect();
    assert_eq!(deliveries.len(), 2, "each event has a delivery of its own");
    let said = says(&mut listening, "license.created evt_1").await;
    assert!(said.contains("-> 200 in ") && said.ends_with(" ms"), "{said}");

    let (metadata, request) = api.asked().remove(0);
    let header = |name: &str| metadata.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    assert_eq!(header("authorization"), "Bearer pb_live_stand_in");
    assert_eq!((header("paperkey-team"), header("paperkey-mode")), ("team_1".to_owned(), "test".to_owned()));
    assert_eq!((request.product_id.as_str(), request.team_id.as_str()), ("prod_1", "team_1"));
    assert!(request.since.is_none(), "it begins with what happens now");
    assert!(!listening.text().contains("pb_live_stand_in"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_ends_is_begun_anew_and_nothing_is_sent_twice() {
    let (receiver, folder) = (Receiver::start().await, TempDir::new().unwrap());
    let event = |n: i64| {
        let id = format!("evt_{n}");
        shown(&id, "license.created", NOW + n, &format!("{{\"id\":\"{id}\",\"event\":\"license.created\"}}"))
    };
    let api = StandIn::watching(vec![
        vec![ready(), event(1), event(2)],
        vec![ready(), event(2), event(1), event(3), Err(Status::unavailable("restarting"))],
        vec![Err(Status::from(Error::unavailable("not yet")))],
        vec![ready(), event(3), event(4)],
    ])
    .await;
    // A secret of one's own is not shown.
    let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let environment = [("PAPERKEY_WEBHOOK_SECRET", secret)];
    let mut listening = listen(folder.path(), api.url(), receiver.url(), &["--product", "prod_1"], &environment);
    assert_eq!(is_ready(&mut listening).await, None);
    let arrived = receiver.received(4).await;
    says(&mut listening, "trying again in").await;
    let mut sent = ids(&arrived);
    sent.sort();
    assert_eq!(sent, ["evt_1", "evt_2", "evt_3", "evt_4"], "each once");
    for delivery in &arrived {
        verifies(delivery, secret);
    }
    let sinces: Vec<_> = api.asked().iter().map(|(_, request)| request.since.is_some()).collect();
    assert_eq!(sinces[..4], [false, true, true, true]);
    assert!(!listening.text().contains(secret));
    assert_eq!(listening.text().matches("Ready: ").count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_for_good_ends_the_command_with_a_sentence() {
    for (reason, advice) in [
        (Reason::InvalidCredentials, "PAPERKEY_API_KEY"),
        (Reason::ScopeInsufficient, "webhooks:read"),
        (Reason::NotFound, "--mode"),
        // What never was there is a mistake in the address.
        (Reason::Unavailable, "is the address"),
    ] {
        let mut status = Status::from(Error::new(reason));
        status.metadata_mut().insert("x-request-id", "req_1".parse().unwrap());
        let api = StandIn::watching(vec![vec![Err(status)]]).await;
        let ended = listened(api.url(), "http://localhost:1/hook", &["--product", "prod_1"], &[]).await;
        let said = ended.failed();
        assert_eq!(ended.status.code(), Some(1));
        assert!(said.contains("req_1") && said.contains(advice), "{reason:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(!ended.out.contains("whsec_"), "no secret is shown for nothing: {ended:?}");
    }
    // Revoked while it watches.
    let api = StandIn::watching(vec![vec![ready(), Err(Status::from(Error::unauthenticated()))]]).await;
    let ended = listened(api.url(), "http://localhost:1/hook", &["--product", "prod_1"], &[]).await;
    assert!(ended.failed().contains("PAPERKEY_API_KEY"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_before_anything_is_asked() {
    let api = StandIn::watching(Vec::new()).await;
    let product = ["--product", "prod_1"];
    let long = "x".repeat(70);
    for (forward, more, says) in [
        ("localhost:3000", vec![], "url"),
        ("http://u:p@localhost:3000/", vec![], "url"),
        ("http://localhost:3000/", vec![("PAPERKEY_WEBHOOK_SECRET", long.as_str())], "whsec_"),
        ("http://localhost:3000/", vec![("PAPERKEY_URL", "localhost")], "url"),
        ("http://localhost:3000/", vec![("PAPERKEY_API_KEY", "")], "PAPERKEY_API_KEY"),
    ] {
        let ended = listened(api.url(), forward, &product, &more).await;
        assert!(ended.failed().contains(says), "{forward} {more:?}: {ended:?}");
        assert!(!ended.err.contains(&long), "no secret is repeated: {ended:?}");
    }
    assert!(api.asked().is_empty());
    // Nobody is there at all.
    let ended = listened("http://127.0.0.1:1", "http://localhost:3000/", &product, &[]).await;
    assert!(ended.failed().contains("http://127.0.0.1:1"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn it_says_what_the_local_server_answers_tries_once_and_ends_when_it_is_told_to() {
    let (receiver, folder) = (Receiver::start().await, TempDir::new().unwrap());
    // Nothing of an installation is needed, and none is looked at.
    fs::write(folder.path().join("paperkey.toml"), "[server\n").unwrap();
    let broken =
        [("PAPERKEY__NONSENSE", "1"), ("HTTP_PROXY", "http://127.0.0.1:1"), ("http_proxy", "http://127.0.0.1:1")];
    for (status, says_so) in [(500, "-> 500 in "), (302, "redirects are not followed"), (204, "-> 204 in ")] {
        receiver.answers(status);
        let before = receiver.deliveries().len();
        let api = StandIn::watching(vec![vec![ready(), shown("evt_1", "license.created", NOW, PAYLOAD)]]).await;
        let mut listening = listen(folder.path(), api.url(), receiver.url(), &["--team", "team_1"], &broken);
        says(&mut listening, says_so).await;
        assert_eq!(receiver.deliveries().len(), before + 1);
        listening.signal(if status == 500 { "INT" } else { "TERM" });
        assert_eq!(listening.ended().await.code(), Some(0));
    }
    let api = StandIn::watching(vec![vec![ready(), shown("evt_1", "license.created", NOW, PAYLOAD)]]).await;
    let mut listening = listen(folder.path(), api.url(), "http://127.0.0.1:1/", &["--team", "team_1"], &[]);
    says(&mut listening, "nobody accepts connections there").await;
    listening.terminate().await;
}

// --- against an installation -----------------------------------------------------------------------------------------

fn with_key(key: &str) -> [(&str, &str); 1] {
    [("PAPERKEY_API_KEY", key)]
}

async fn developer(install: &Installation) -> (Account, Product, Receiver, TempDir) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    (owner, product, Receiver::start().await, TempDir::new().unwrap())
}

async fn what_happens_reaches_the_developers_machine(install: Installation) {
    let (owner, product, receiver, folder) = developer(&install).await;
    let other = owner.create_product("Other").await;
    // A product's own secret key is enough, and no endpoint is needed.
    let arguments = ["--product", product.id.as_str()];
    let key = with_key(&product.secret_key);
    let mut listening = listen(folder.path(), &install.url(), receiver.url(), &arguments, &key);
    let secret = is_ready(&mut listening).await.expect("it makes a secret");
    owner.issue(&other, json!({})).await;
    let license = owner.issue(&product, json!({"email": "zo\u{eb}@example.com"})).await;
    let created = receiver.received(1).await.remove(0);
    assert_eq!((created.event(), created.json["data"]["id"].as_str()), ("license.created", Some(license.id.as_str())));
    owner.revoke(&license).await.gives(200);
    let arrived = receiver.received(2).await;
    assert_eq!(arrived[1].event(), "license.revoked");
    assert_eq!(arrived.len(), 2, "what happens to another product is not shown");
    for delivery in &arrived {
        verifies(delivery, &secret);
    }
    says(&mut listening, "license.revoked").await;
    let (status, _) = listening.terminate().await;
    assert_eq!(status.code(), Some(0));
}

async fn events_of_the_team_and_of_test_data_are_told_apart(install: Installation) {
    let (owner, _, receiver, folder) = developer(&install).await;
    let token = [("PAPERKEY_API_KEY", ""), ("PAPERKEY_TOKEN", owner.token.as_str())];
    let arguments = ["--team", owner.team_id.as_str(), "--mode", "live"];
    let mut listening = listen(folder.path(), &install.url(), receiver.url(), &arguments, &token);
    let secret = is_ready(&mut listening).await.expect("it makes a secret");
    owner.create_key(json!({"name": "Test", "mode": "test"})).await;
    let key = owner.create_key(json!({"name": "Live"})).await;
    let arrived = receiver
        .wait("the key that was made", |arrived| {
            arrived.iter().any(|delivery| delivery.json["data"]["id"] == key.id.as_str()).then(|| arrived.to_vec())
        })
        .await;
    for delivery in &arrived {
        assert_eq!((delivery.event(), delivery.json["data"]["mode"].as_str()), ("api_key.created", Some("live")));
        verifies(delivery, &secret);
    }
    assert!(!listening.text().contains(&key.token));
}

async fn a_key_that_is_not_good_ends_the_command(install: Installation) {
    let (owner, product, receiver, _) = developer(&install).await;
    let stranger = install.register().await;
    let arguments = ["--product", product.id.as_str()];
    let url = install.url();
    for (key, status) in [("pb_live_nonsense", "PAPERKEY_API_KEY"), (stranger.live_key.as_str(), "--team")] {
        let ended = listened(&url, receiver.url(), &arguments, &with_key(key)).await;
        assert_eq!(ended.status.code(), Some(1));
        assert!(ended.failed().contains(status), "{ended:?}");
        assert!(!ended.err.contains(key), "{ended:?}");
    }
    let weak = owner.create_key(json!({"name": "Weak", "scopes": ["licenses:read"]})).await;
    let ended = listened(&url, receiver.url(), &arguments, &with_key(&weak.token)).await;
    assert!(ended.failed().contains("webhooks:read"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_while_the_api_is_away_is_sent_when_it_is_back() {
    // The processes of a fleet keep their addresses.
    let Some(mut install) = Installation::fleet().await else { return };
    let (owner, product, receiver, folder) = developer(&install).await;
    // What an endpoint subscribes to is kept, also while nobody watches.
    let endpoint = Receiver::start().await;
    owner.subscribe(&product, endpoint.url()).await;
    let arguments = ["--product", product.id.as_str()];
    let key = with_key(&owner.live_key);
    let mut listening = listen(folder.path(), &install.url(), receiver.url(), &arguments, &key);
    let secret = is_ready(&mut listening).await.expect("it makes a secret");
    let first = owner.issue(&product, json!({})).await;
    receiver.received(1).await;
    for process in ["gateway", "webhook"] {
        install.kill(process);
        says(&mut listening, "trying again in").await;
        install.start(process).await.unwrap();
    }
    // Before or after it watches again: nothing is missed either way.
    let second = owner.issue(&product, json!({})).await;
    let third = owner.issue(&product, json!({})).await;
    let arrived = receiver.received(3).await;
    let told: BTreeSet<_> =
        arrived.iter().map(|delivery| delivery.json["data"]["id"].as_str().unwrap().to_owned()).collect();
    assert_eq!(told, BTreeSet::from([first.id, second.id, third.id]));
    assert_eq!(arrived.len(), 3, "each is sent once");
    for delivery in &arrived {
        verifies(delivery, &secret);
    }
}
