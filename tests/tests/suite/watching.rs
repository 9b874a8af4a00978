//! Watching events as they happen, over gRPC and as lines over REST.

use std::time::Duration;

use paperkey_proto::{
    errors::v1::Reason,
    webhook::v1::{
        DeliveryStatus, WatchEventsRequest, WatchEventsResponse, WatchedDelivery, WatchedEvent,
        webhook_service_client::WebhookServiceClient,
    },
};
use paperkey_tests::{Account, Api, Installation, Product, Receiver, grpc, on_both_kinds, people::text};
use prost_types::Timestamp;
use serde_json::{Value, json};
use tonic::{Status, Streaming};

on_both_kinds! {
    an_event_is_shown_whether_or_not_anybody_subscribes,
    what_becomes_of_the_deliveries_is_shown_too,
    only_what_is_watched_is_shown,
    what_was_missed_a_moment_ago_is_shown,
    events_of_a_team_are_watched_by_themselves,
    lines_of_json_are_shown_over_rest,
    a_revoked_key_watches_no_longer,
    a_stream_ends_with_the_process_and_does_not_hold_it_up,
}

/// How long an answer may take before the test fails.
const PATIENCE: Duration = Duration::from_mins(1);

struct Watch(Streaming<WatchEventsResponse>);

impl Watch {
    /// Begins to watch, and is there when what comes next is shown.
    async fn begin(install: &Installation, credential: &str, request: WatchEventsRequest) -> Self {
        let mut watch = Self::try_begin(install, credential, request).await.unwrap();
        let first = watch.next().await.unwrap();
        assert_eq!(first, WatchEventsResponse::default(), "the first answer is empty");
        watch
    }

    async fn try_begin(install: &Installation, credential: &str, request: WatchEventsRequest) -> Result<Self, Status> {
        let channel = grpc::connect_without_limit(&install.url()).await;
        let mut client = WebhookServiceClient::with_interceptor(channel, grpc::Bearer::new(credential));
        Ok(Self(client.watch_events(request).await?.into_inner()))
    }

    async fn next(&mut self) -> Result<WatchEventsResponse, Status> {
        let next = tokio::time::timeout(PATIENCE, self.0.message()).await.expect("something is shown within a minute");
        next.map(|shown| shown.expect("the stream goes on"))
    }

    /// The next event; deliveries between are passed over.
    async fn event(&mut self) -> WatchedEvent {
        loop {
            if let Some(event) = self.next().await.unwrap().event {
                return event;
            }
        }
    }

    /// The next delivery that is as wanted; others are passed over, and so are events.
    async fn delivery(&mut self, wanted: impl Fn(&WatchedDelivery) -> bool) -> WatchedDelivery {
        loop {
            if let Some(delivery) = self.next().await.unwrap().delivery.filter(&wanted) {
                return delivery;
            }
        }
    }
}

fn of_product(product: &Product) -> WatchEventsRequest {
    WatchEventsRequest { product_id: product.id.clone(), ..WatchEventsRequest::default() }
}

async fn scene(install: &Installation) -> (Account, Product) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    (owner, product)
}

async fn an_event_is_shown_whether_or_not_anybody_subscribes(install: Installation) {
    let (owner, product) = scene(&install).await;
    // Two at a time, of which each is shown everything.
    let mut one = Watch::begin(&install, &owner.token, of_product(&product)).await;
    let mut other = Watch::begin(&install, &product.secret_key, of_product(&product)).await;
    let license = owner.issue(&product, json!({"email": "customer@example.com"})).await;
    owner.revoke(&license).await.gives(200);
    for watch in [&mut one, &mut other] {
        for name in ["license.created", "license.revoked"] {
            let event = watch.event().await;
            assert_eq!(event.event, name);
            let payload: Value = serde_json::from_str(&event.payload).unwrap();
            assert_eq!((&payload["id"], &payload["event"]), (&json!(event.id), &json!(name)));
            assert_eq!(payload["data"]["id"], license.id.as_str());
            assert!(event.id.starts_with("evt_") && event.created_at.is_some());
        }
    }
}

async fn what_becomes_of_the_deliveries_is_shown_too(install: Installation) {
    let (owner, product) = scene(&install).await;
    let receiver = Receiver::start().await;
    let webhook = owner.subscribe(&product, receiver.url()).await;
    receiver.answers(500);
    let mut watch = Watch::begin(&install, &owner.token, of_product(&product)).await;
    owner.issue(&product, json!({})).await;
    let event = watch.event().await;
    let shown = watch
        .delivery(|shown| shown.delivery.as_ref().is_some_and(|delivery| delivery.response_status == Some(500)))
        .await;
    let failed = shown.delivery.unwrap();
    assert_eq!((shown.webhook_id, &failed.event_id), (webhook.id, &event.id));
    assert_eq!(failed.status(), DeliveryStatus::Pending);
    receiver.answers(200);
    let done = watch
        .delivery(|shown| shown.delivery.as_ref().is_some_and(|now| now.status() == DeliveryStatus::Succeeded))
        .await;
    assert_eq!(done.delivery.unwrap().id, failed.id);
    // What is sent is what was shown.
    let arrived = receiver.wait("a success", |arrived| arrived.iter().find(|d| d.answered == 200).cloned()).await;
    assert_eq!(arrived.body, event.payload.as_bytes());
    assert_eq!(arrived.header("webhook-id"), failed.id);
}

async fn only_what_is_watched_is_shown(install: Installation) {
    let (owner, product) = scene(&install).await;
    let other = owner.create_product("Other").await;
    let tested = owner.in_test_mode().create_product("Test").await;
    let (_, foreign) = scene(&install).await;
    let mut watch = Watch::begin(&install, &owner.token, of_product(&product)).await;
    owner.issue(&other, json!({})).await;
    owner.in_test_mode().issue(&tested, json!({})).await;
    let license = owner.issue(&product, json!({})).await;
    let event = watch.event().await;
    assert!(event.payload.contains(&license.id), "what is of another product came first: {event:?}");
    for unseen in [&foreign, &tested] {
        let refused = Watch::try_begin(&install, &owner.token, of_product(unseen)).await;
        let outcome = match refused {
            Ok(mut watch) => watch.next().await,
            Err(status) => Err(status),
        };
        grpc::refused(outcome, Reason::NotFound);
    }
}

async fn what_was_missed_a_moment_ago_is_shown(install: Installation) {
    let (owner, product) = scene(&install).await;
    let receiver = Receiver::start().await;
    // What somebody subscribes to is kept.
    owner.subscribe(&product, receiver.url()).await;
    let missed = owner.issue(&product, json!({})).await;
    receiver.received(1).await;
    let a_minute_ago = Timestamp::from(std::time::SystemTime::now() - Duration::from_mins(1));
    let since = WatchEventsRequest { since: Some(a_minute_ago), ..of_product(&product) };
    let mut watch = Watch::begin(&install, &owner.token, since).await;
    assert!(watch.event().await.payload.contains(&missed.id));
    let next = owner.issue(&product, json!({})).await;
    assert!(watch.event().await.payload.contains(&next.id), "each is shown once, and the new after the old");
}

async fn events_of_a_team_are_watched_by_themselves(install: Installation) {
    let (owner, product) = scene(&install).await;
    let request = WatchEventsRequest { team_id: owner.team_id.clone(), ..WatchEventsRequest::default() };
    let mut watch = Watch::begin(&install, &owner.token, request).await;
    owner.issue(&product, json!({})).await;
    let key = owner.create_key(json!({"name": "Watched"})).await;
    let event = watch.event().await;
    assert_eq!(event.event, "api_key.created");
    assert!(event.payload.contains(&key.id) && !event.payload.contains(&key.token));
}

async fn lines_of_json_are_shown_over_rest(install: Installation) {
    let (owner, product) = scene(&install).await;
    let ways: [(Api, String); 3] = [
        ((*owner).clone(), format!("/products/{}/events", product.id)),
        (owner.integration(), format!("/api/v1/products/{}/events", product.id)),
        (owner.server(&product), format!("/products/{}/events", product.id)),
    ];
    for (api, path) in ways {
        let mut lines = api.lines(&path).await;
        if lines.head.status == 401 {
            // Not every surface takes every key.
            continue;
        }
        assert_eq!(lines.head.status, 200, "{path}");
        assert_eq!(lines.head.header("content-type"), Some("application/x-ndjson"));
        let first = lines.next().await.unwrap().unwrap();
        assert!(first["event"].is_null() && first["delivery"].is_null(), "the first line is empty: {first}");
        let license = owner.issue(&product, json!({})).await;
        let line = lines.next().await.unwrap().unwrap();
        let event = &line["event"];
        assert_eq!(event["event"], "license.created", "{line}");
        let payload: Value = serde_json::from_str(event["payload"].as_str().unwrap()).unwrap();
        assert_eq!((&payload["id"], &payload["data"]["id"]), (&event["id"], &json!(license.id)));
        let created_at = text(event, if path.starts_with("/api/") { "/created_at" } else { "/createdAt" });
        assert!(created_at.ends_with('Z'), "{created_at}");
    }
    let stranger = install.register().await;
    let refused = stranger.lines(&format!("/products/{}/events", product.id)).await;
    refused.whole().await.refused(Reason::NotFound);
}

async fn a_revoked_key_watches_no_longer(install: Installation) {
    let (owner, product) = scene(&install).await;
    let key = owner.create_key(json!({"name": "Watcher"})).await;
    let mut watch = Watch::begin(&install, &key.token, of_product(&product)).await;
    let api = install.api().with_key(&key.token);
    let mut lines = api.lines(&format!("/api/v1/products/{}/events", product.id)).await;
    assert!(lines.next().await.unwrap().is_some());
    owner.issue(&product, json!({})).await;
    watch.event().await;
    assert!(lines.next().await.unwrap().is_some());
    owner.revoke_key(&key).await;
    let end = loop {
        if let Err(status) = watch.next().await {
            break status;
        }
    };
    grpc::refused(Err::<(), _>(end), Reason::InvalidCredentials);
    let cut = loop {
        match lines.next().await {
            Ok(Some(_)) => {}
            Ok(None) => break false,
            Err(_) => break true,
        }
    };
    assert!(cut, "an answer that was cut off does not look like one that is whole");
}

async fn a_stream_ends_with_the_process_and_does_not_hold_it_up(mut install: Installation) {
    let (owner, product) = scene(&install).await;
    let mut watch = Watch::begin(&install, &owner.token, of_product(&product)).await;
    let gateway = install.gateway();
    let (status, _) = install.process(gateway).terminate().await;
    assert!(status.success(), "{status}");
    let end = tokio::time::timeout(PATIENCE, watch.0.message()).await.expect("it ends");
    assert!(!matches!(end, Ok(Some(_))), "nothing is shown after the end: {end:?}");
}
