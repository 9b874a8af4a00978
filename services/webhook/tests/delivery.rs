//! Deliveries on real sockets, on both engines.

mod common;

use std::{
    collections::{BTreeSet, HashSet},
    sync::Arc,
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use common::{PATIENCE, PRODUCT, Receiver, Reply, World, by_name, lax, until, within};
use paperkey_kit::{
    db::{Database, DbError},
    events::PRODUCT_DELETED,
    secrets::KeyedHash,
    store_suite,
    testing::TestDb,
};
use paperkey_migrations::webhook::Migrator;
use paperkey_proto::{
    principal::v1::Mode,
    webhook::v1::{DeleteWebhookRequest, DeliveryStatus, WebhookStatus},
};
use paperkey_webhook::WebhookConfig;
use sea_orm::{ConnectionTrait as _, Statement};
use tokio::sync::Semaphore;

store_suite! {
    paperkey_migrations::webhook::Migrator;
    a_delivery_arrives_and_verifies,
    an_event_that_comes_many_times_is_delivered_once,
    an_event_goes_to_the_endpoints_that_subscribe_to_it_and_to_no_other,
    a_delivery_that_is_tried_again_keeps_its_id,
    the_last_attempt_fails_the_delivery,
    ten_failures_pause_and_what_is_held_goes_out_when_resumed,
    auth_is_told_once_of_each_pause_and_nothing_of_the_address_but_its_host,
    an_endpoint_that_is_gone_is_paused_at_once,
    a_paused_endpoint_gets_nothing_and_loses_nothing,
    a_hanging_receiver_does_not_delay_another,
    a_long_queue_goes_out_whole_and_no_more_than_five_at_once,
    an_answer_without_end_is_cut,
    an_answer_that_gets_stuck_is_a_timeout,
    a_redirect_is_a_failure_and_is_not_followed,
    a_receiver_that_asks_for_time_gets_it,
    what_refuses_connections_and_what_does_not_speak_tls_is_told_apart,
    a_private_address_is_refused_when_it_is_dialled,
    what_waits_goes_with_its_endpoint,
    a_deleted_product_takes_everything_along,
    what_is_under_way_is_finished_before_the_end_and_the_rest_is_given_back,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"))
}

async fn count(database: &Database, table: &'static str) -> i64 {
    database
        .read(move |reader| async move {
            let text = format!("SELECT COUNT(*) AS number FROM {table}");
            let statement = Statement::from_string(reader.get_database_backend(), text);
            let row = reader.query_one_raw(statement).await?.expect("a count has a row");
            Ok::<i64, DbError>(row.try_get("", "number")?)
        })
        .await
        .unwrap()
}

async fn a_delivery_arrives_and_verifies(database: Database) {
    let world = World::on(database, lax(1));
    let mut receiver = Receiver::start(&[Reply::With(200, "x-any", "1".into(), b"thanks".to_vec())]).await;
    let (webhook, secret) = world.endpoint(&format!("{}?a=b%20c", receiver.url())).await;
    let event_id = world.happens("license.created").await;

    let received = receiver.next().await;
    let expected = format!(
        r#"{{"id":"{event_id}","event":"license.created","createdAt":"2026-12-31T00:00:00.000Z","data":{{"id":"lic_1", "key":"K7WX9"}}}}"#
    );
    assert_eq!(received.body, expected.as_bytes());
    assert_eq!(received.path, "/hook?a=b%20c");
    assert_eq!(received.header("content-type"), "application/json");
    assert_eq!(received.header("user-agent"), "Paperkey/1.2.3");
    assert_eq!(received.header("x-paperkey-event"), "license.created");
    let own = KeyedHash::new(secret.as_bytes()).hash(&received.body);
    assert_eq!(received.header("x-paperkey-signature"), hex(&own));
    let id = received.header("webhook-id");
    assert_eq!(received.header("x-paperkey-delivery"), id);
    let key = BASE64.decode(secret.strip_prefix("whsec_").unwrap()).unwrap();
    assert_eq!(key.len(), 32);
    let signed = format!("{id}.{}.{expected}", received.header("webhook-timestamp"));
    let standard = BASE64.encode(KeyedHash::new(&key).hash(signed.as_bytes()));
    assert_eq!(received.header("webhook-signature"), format!("v1,{standard}"));

    let answer = world.until_tried(&webhook.id, 1).await;
    let delivery = answer.delivery.unwrap();
    assert_eq!((delivery.id.as_str(), delivery.event_id.as_str()), (id, event_id.as_str()));
    assert_eq!(delivery.status(), DeliveryStatus::Succeeded);
    assert_eq!((delivery.response_status, delivery.error), (Some(200), None));
    assert_eq!(delivery.next_attempt_at, None);
    assert!(delivery.last_attempt_at.is_some() && delivery.duration_ms.is_some());
    let [attempt] = answer.attempts.as_slice() else { panic!("one attempt") };
    assert_eq!((attempt.number, attempt.response_snippet.as_deref()), (1, Some("thanks")));
    world.shut_down().await;
}

async fn an_event_that_comes_many_times_is_delivered_once(database: Database) {
    let world = World::on(database, lax(1));
    let mut receiver = Receiver::start(&[Reply::Status(200)]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    let event = world.event("license.created");
    // Together and one after the other, alone and twice in a batch.
    tokio::join!(
        world.ingest(vec![event.clone()]),
        world.ingest(vec![event.clone(), event.clone()]),
        world.ingest(vec![event.clone()]),
    );
    assert_eq!(receiver.next().await.event_id(), event.id);
    world.until_all(&webhook.id, DeliveryStatus::Succeeded).await;
    world.ingest(vec![event.clone()]).await;
    let other = world.happens("license.updated").await;
    assert_eq!(receiver.next().await.event_id(), other);
    world.until_all(&webhook.id, DeliveryStatus::Succeeded).await;
    assert_eq!(world.deliveries(&webhook.id).await.len(), 2);
    assert!(receiver.rest().is_empty());
    world.shut_down().await;
}

async fn an_event_goes_to_the_endpoints_that_subscribe_to_it_and_to_no_other(database: Database) {
    let world = World::on(database, lax(1));
    let mut one = Receiver::start(&[Reply::Status(200)]).await;
    let mut other = Receiver::start(&[Reply::Status(200)]).await;
    world.endpoint_for(&one.url(), &["license.created", "license.revoked"]).await;
    world.endpoint_for(&other.url(), &["license.revoked"]).await;
    let mut of_test = world.event("license.revoked");
    of_test.mode = paperkey_proto::principal::v1::Mode::Test.into();
    let mut of_another_team = world.event("license.revoked");
    of_another_team.team_id = "team_2".into();
    let mut of_another_product = world.event("license.revoked");
    of_another_product.product_id = "prod_2".into();
    let mut of_nobody = world.event("license.revoked");
    of_nobody.mode = 0;
    let mut broken = world.event("license.revoked");
    broken.data_json = "{".into();
    let created = world.event("license.created");
    let revoked = world.event("license.revoked");
    let expected: BTreeSet<String> = [created.id.clone(), revoked.id.clone()].into();
    let foreign = vec![of_test, of_another_team, of_another_product, of_nobody, broken];
    world.ingest([foreign, vec![created, revoked.clone()]].concat()).await;
    assert_eq!(other.next().await.event_id(), revoked.id);
    let got: BTreeSet<String> = [one.next().await.event_id(), one.next().await.event_id()].into();
    assert_eq!(got, expected);
    world.shut_down().await;
    assert!(one.rest().is_empty() && other.rest().is_empty());
}

async fn a_delivery_that_is_tried_again_keeps_its_id(database: Database) {
    let world = World::on(database, lax(5));
    let mut receiver = Receiver::start(&[Reply::Status(500), Reply::Status(404), Reply::Status(200)]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    world.happens("license.created").await;
    let [first, second, third] = [receiver.next().await, receiver.next().await, receiver.next().await];
    assert_eq!(first.header("webhook-id"), second.header("webhook-id"));
    assert_eq!(first.header("webhook-id"), third.header("webhook-id"));
    assert_eq!(first.body, third.body);
    let answer = world.until_tried(&webhook.id, 3).await;
    assert_eq!(answer.delivery.unwrap().status(), DeliveryStatus::Succeeded);
    let log: Vec<_> =
        answer.attempts.iter().map(|a| (a.number, a.response_status.unwrap(), a.error.as_deref())).collect();
    assert_eq!(log, [(1, 500, Some("http_status")), (2, 404, Some("http_status")), (3, 200, None)]);
    assert_eq!(world.webhook(&webhook.id).await.consecutive_failures, 0);
    world.shut_down().await;
}

async fn the_last_attempt_fails_the_delivery(database: Database) {
    let world = World::on(database, lax(3));
    let receiver = Receiver::start(&[Reply::Status(500)]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    world.happens("license.created").await;
    world.until_all(&webhook.id, DeliveryStatus::Failed).await;
    let answer = world.only_delivery(&webhook.id).await;
    let delivery = answer.delivery.unwrap();
    assert_eq!((delivery.attempts_count, delivery.next_attempt_at), (3, None));
    assert_eq!(answer.attempts.len(), 3);
    assert_eq!(world.webhook(&webhook.id).await.consecutive_failures, 3);
    world.shut_down().await;
}

async fn ten_failures_pause_and_what_is_held_goes_out_when_resumed(database: Database) {
    let world = World::on(database, lax(100));
    let mut receiver = Receiver::start(&[Reply::Status(500)]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    let mut events = HashSet::new();
    for _ in 0..7 {
        events.insert(world.happens("license.created").await);
    }
    until(async || world.webhook(&webhook.id).await.status() == WebhookStatus::Paused).await;
    assert!(world.webhook(&webhook.id).await.consecutive_failures >= 10);

    // One that comes now is held with the others.
    events.insert(world.happens("license.updated").await);
    // What goes to another endpoint shows that the dispatcher has looked since.
    let mut fence = Receiver::start(&[Reply::Status(200)]).await;
    world.endpoint_for(&fence.url(), &["webhook.test"]).await;
    world.happens("webhook.test").await;
    fence.next().await;
    let tried = receiver.rest().len();
    assert!((10..15).contains(&tried), "{tried} attempts");
    assert!(world.deliveries(&webhook.id).await.iter().all(|d| d.status() == DeliveryStatus::Pending));

    receiver.answers(Reply::Status(200));
    world.set_status(&webhook.id, WebhookStatus::Active).await;
    world.until_all(&webhook.id, DeliveryStatus::Succeeded).await;
    let got: HashSet<String> = receiver.rest().iter().map(common::Received::event_id).collect();
    assert_eq!(got, events);
    let resumed = world.webhook(&webhook.id).await;
    assert_eq!((resumed.status(), resumed.consecutive_failures), (WebhookStatus::Active, 0));
    world.shut_down().await;
}

async fn auth_is_told_once_of_each_pause_and_nothing_of_the_address_but_its_host(database: Database) {
    let world = World::on(database, lax(100));
    let mut receiver = Receiver::start(&[Reply::Status(500)]).await;
    let (webhook, _) = world.endpoint(&format!("{}?token=hunter2", receiver.url())).await;
    let (of_team, _) = world.team_endpoint(&receiver.url(), &["api_key.created"]).await;
    for _ in 0..12 {
        world.happens("license.created").await;
    }
    until(async || world.webhook(&webhook.id).await.status() == WebhookStatus::Paused).await;
    // Auth has refused it at first.
    until(async || world.told_to_auth().len() == 1).await;
    receiver.rest();
    receiver.answers(Reply::Status(410));
    world.ingest(vec![world.team_event("api_key.created", Mode::Live)]).await;
    until(async || world.told_to_auth().len() == 2).await;
    world.set_status(&webhook.id, WebhookStatus::Active).await;
    until(async || world.told_to_auth().len() == 3).await;
    until(async || count(&world.database, "outbox").await == 0).await;
    let told = world.told_to_auth();
    assert_eq!(told.len(), 3, "and no more: {told:?}");
    for (event, id, product_id, gone) in [
        (&told[0], &webhook.id, PRODUCT, false),
        (&told[1], &of_team.id, "", true),
        (&told[2], &webhook.id, PRODUCT, true),
    ] {
        assert_eq!((event.topic.as_str(), event.team_id.as_str()), ("webhook.paused", "team_1"));
        assert_eq!((event.mode(), event.product_id.as_str()), (Mode::Live, product_id));
        let data: serde_json::Value = serde_json::from_str(&event.data_json).unwrap();
        assert_eq!((&data["webhookId"], &data["host"]), (&id.as_str().into(), &"127.0.0.1".into()));
        assert_eq!((&data["productId"], &data["gone"]), (&product_id.into(), &gone.into()));
        assert_eq!(data["failures"].as_i64().unwrap() >= 10, !gone, "{data}");
        assert!(!event.data_json.contains("hunter2"), "{data}");
    }
    world.shut_down().await;
}

async fn an_endpoint_that_is_gone_is_paused_at_once(database: Database) {
    let world = World::on(database, lax(100));
    let receiver = Receiver::start(&[Reply::Status(410)]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    world.happens("license.created").await;
    until(async || world.webhook(&webhook.id).await.status() == WebhookStatus::Paused).await;
    assert_eq!(world.only_delivery(&webhook.id).await.delivery.unwrap().attempts_count, 1);
    world.shut_down().await;
}

async fn a_paused_endpoint_gets_nothing_and_loses_nothing(database: Database) {
    let world = World::on(database, lax(1));
    let mut receiver = Receiver::start(&[Reply::Status(200)]).await;
    let mut fence = Receiver::start(&[Reply::Status(200)]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    world.endpoint(&fence.url()).await;
    world.set_status(&webhook.id, WebhookStatus::Paused).await;
    let event_id = world.happens("license.created").await;
    fence.next().await;
    world.happens("license.created").await;
    fence.next().await;
    assert!(receiver.rest().is_empty());
    world.set_status(&webhook.id, WebhookStatus::Active).await;
    let [one, other] = [receiver.next().await, receiver.next().await];
    assert!(one.event_id() == event_id || other.event_id() == event_id);
    world.shut_down().await;
}

async fn a_hanging_receiver_does_not_delay_another(database: Database) {
    // Far longer than the test may take: the others cannot have waited for one of these to end.
    let config = WebhookConfig { timeout_ms: 2 * u64::try_from(PATIENCE.as_millis()).unwrap(), ..lax(1) };
    let world = World::on(database, config);
    let gate = Arc::new(Semaphore::new(0));
    let mut hanging = Receiver::start(&[Reply::Gated(Arc::clone(&gate))]).await;
    let mut lively = Receiver::start(&[Reply::Status(200)]).await;
    world.endpoint_for(&hanging.url(), &["license.created"]).await;
    let (webhook, _) = world.endpoint_for(&lively.url(), &["license.updated"]).await;
    let stuck = (0..200).map(|_| world.event("license.created")).collect();
    world.ingest(stuck).await;
    hanging.next().await;
    let moving = (0..50).map(|_| world.event("license.updated")).collect();
    world.ingest(moving).await;
    for _ in 0..50 {
        lively.next().await;
    }
    world.until_all(&webhook.id, DeliveryStatus::Succeeded).await;
    assert!(hanging.most_inside() <= 5);
    gate.add_permits(200);
    world.shut_down().await;
}

async fn a_long_queue_goes_out_whole_and_no_more_than_five_at_once(database: Database) {
    let world = World::on(database, lax(1));
    let mut receiver = Receiver::start(&[Reply::Status(204)]).await;
    world.endpoint(&receiver.url()).await;
    let events: Vec<_> = (0..400).map(|_| world.event("license.created")).collect();
    let expected: HashSet<String> = events.iter().map(|event| event.id.clone()).collect();
    world.ingest(events).await;
    let mut got = HashSet::new();
    for _ in 0..400 {
        got.insert(receiver.next().await.event_id());
    }
    assert_eq!(got, expected);
    assert!(receiver.most_inside() <= 5, "{} at once", receiver.most_inside());
    world.shut_down().await;
    assert!(receiver.rest().is_empty());
}

async fn an_answer_without_end_is_cut(database: Database) {
    let world = World::on(database, lax(1));
    let receiver = Receiver::start(&[Reply::Endless]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    world.happens("license.created").await;
    let answer = world.until_tried(&webhook.id, 1).await;
    assert_eq!(answer.delivery.unwrap().status(), DeliveryStatus::Succeeded);
    assert_eq!(answer.attempts[0].response_snippet.as_deref(), Some("x".repeat(1_024).as_str()));
    world.shut_down().await;
}

async fn an_answer_that_gets_stuck_is_a_timeout(database: Database) {
    let world = World::on(database, WebhookConfig { timeout_ms: 300, ..lax(1) });
    let receiver = Receiver::start(&[Reply::Stuck]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    world.happens("license.created").await;
    let answer = world.until_tried(&webhook.id, 1).await;
    let delivery = answer.delivery.unwrap();
    assert_eq!(delivery.status(), DeliveryStatus::Failed);
    assert_eq!((delivery.response_status, delivery.error.as_deref()), (Some(200), Some("timeout")));
    world.shut_down().await;
}

async fn a_redirect_is_a_failure_and_is_not_followed(database: Database) {
    let world = World::on(database, lax(1));
    let mut elsewhere = Receiver::start(&[Reply::Status(200)]).await;
    let receiver = Receiver::start(&[Reply::With(307, "location", elsewhere.url(), Vec::new())]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    world.happens("license.created").await;
    let delivery = world.until_tried(&webhook.id, 1).await.delivery.unwrap();
    assert_eq!((delivery.response_status, delivery.error.as_deref()), (Some(307), Some("redirect")));
    assert!(elsewhere.rest().is_empty());
    world.shut_down().await;
}

async fn a_receiver_that_asks_for_time_gets_it(database: Database) {
    let world = World::on(database, lax(5));
    let receiver = Receiver::start(&[Reply::With(503, "retry-after", "3600".into(), Vec::new())]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    world.happens("license.created").await;
    let delivery = world.until_tried(&webhook.id, 1).await.delivery.unwrap();
    assert_eq!(delivery.status(), DeliveryStatus::Pending);
    let wait_s = delivery.next_attempt_at.unwrap().seconds - delivery.last_attempt_at.unwrap().seconds;
    assert!((3_599..3_640).contains(&wait_s), "{wait_s} s");
    world.shut_down().await;
}

async fn what_refuses_connections_and_what_does_not_speak_tls_is_told_apart(database: Database) {
    let world = World::on(database, lax(1));
    let receiver = Receiver::start(&[Reply::Status(200)]).await;
    let (plain, _) = world.endpoint(&receiver.url().replace("http://", "https://")).await;
    let gone = Receiver::start(&[]).await;
    let (refusing, _) = world.endpoint(&gone.url()).await;
    drop(gone);
    world.happens("license.created").await;
    let error = async |id: &str| world.until_tried(id, 1).await.delivery.unwrap().error;
    assert_eq!(error(&plain.id).await.as_deref(), Some("tls"));
    assert_eq!(error(&refusing.id).await.as_deref(), Some("connect"));
    world.shut_down().await;
}

async fn a_private_address_is_refused_when_it_is_dialled(database: Database) {
    // Written down while that was allowed, or under a name that has moved since.
    let mut receiver = Receiver::start(&[Reply::Status(200)]).await;
    let before = World::idle(database.clone(), lax(1));
    let (by_address, _) = before.endpoint(&receiver.url()).await;
    let (by_name, _) = before.endpoint(&by_name(receiver.address)).await;
    let world = World::on(database, WebhookConfig { allow_private_networks: false, ..lax(1) });
    world.happens("license.created").await;
    for webhook in [by_address, by_name] {
        let delivery = world.until_tried(&webhook.id, 1).await.delivery.unwrap();
        assert_eq!(delivery.error.as_deref(), Some("address_not_allowed"), "{}", webhook.url);
    }
    assert!(receiver.rest().is_empty());
    world.shut_down().await;
}

async fn what_waits_goes_with_its_endpoint(database: Database) {
    let world = World::on(database.clone(), lax(1));
    let receiver = Receiver::start(&[Reply::Status(200)]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    world.happens("license.created").await;
    world.until_all(&webhook.id, DeliveryStatus::Succeeded).await;
    world.set_status(&webhook.id, WebhookStatus::Paused).await;
    world.happens("license.created").await;
    assert_eq!((count(&database, "deliveries").await, count(&database, "attempts").await), (2, 1));
    let request =
        DeleteWebhookRequest { product_id: PRODUCT.into(), webhook_id: webhook.id, ..DeleteWebhookRequest::default() };
    world.owner().delete_webhook(request).await.unwrap();
    for table in ["endpoints", "deliveries", "attempts"] {
        assert_eq!(count(&database, table).await, 0, "{table}");
    }
    world.shut_down().await;
}

async fn a_deleted_product_takes_everything_along(database: Database) {
    let world = World::on(database.clone(), lax(1));
    let receiver = Receiver::start(&[Reply::Status(200)]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    world.happens("license.created").await;
    world.until_all(&webhook.id, DeliveryStatus::Succeeded).await;
    let gone = world.event(PRODUCT_DELETED);
    // Late events of it, and the news itself once more.
    world.ingest(vec![world.event("license.created"), gone.clone()]).await;
    world.ingest(vec![gone, world.event("license.updated")]).await;
    for table in ["endpoints", "deliveries", "attempts", "events"] {
        assert_eq!(count(&database, table).await, 0, "{table}");
    }
    // The catalogue that this service asks may not have heard of it, or be asked just before.
    let request = paperkey_proto::webhook::v1::CreateWebhookRequest {
        product_id: PRODUCT.into(),
        url: receiver.url(),
        events: vec!["license.created".into()],
        ..Default::default()
    };
    let reason = common::reason(world.owner().create_webhook(request).await);
    assert_eq!(reason, paperkey_proto::errors::v1::Reason::NotFound);
    world.shut_down().await;
}

async fn what_is_under_way_is_finished_before_the_end_and_the_rest_is_given_back(database: Database) {
    let world = World::on(database.clone(), lax(1));
    let gate = Arc::new(Semaphore::new(0));
    let mut receiver = Receiver::start(&[Reply::Gated(Arc::clone(&gate))]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    world.ingest((0..30).map(|_| world.event("license.created")).collect()).await;
    for _ in 0..5 {
        receiver.next().await;
    }
    let end = tokio::spawn(world.shut_down());
    // The claims that were ahead come back while the others are still under way.
    until(async || {
        let claimed = database
            .read(|reader| async move {
                let text = "SELECT COUNT(*) AS number FROM deliveries WHERE claimed_by IS NOT NULL";
                let row = reader.query_one_raw(Statement::from_string(reader.get_database_backend(), text)).await?;
                Ok::<i64, DbError>(row.expect("a count has a row").try_get("", "number")?)
            })
            .await;
        claimed.unwrap() == 5
    })
    .await;
    gate.add_permits(5);
    within(end).await.unwrap();
    let later = World::idle(database, lax(1));
    let deliveries = later.deliveries(&webhook.id).await;
    let succeeded = deliveries.iter().filter(|delivery| delivery.status() == DeliveryStatus::Succeeded).count();
    assert_eq!((deliveries.len(), succeeded), (30, 5));
    assert!(receiver.rest().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_never_send_one_delivery_twice() {
    let Some(db) = TestDb::postgres().await else { return };
    let database = db.migrated::<Migrator>().await;
    // A pool of its own each, as two processes have.
    let one = World::on(database, lax(1));
    let other = World::on(db.open().await, lax(1));
    let mut receivers = Vec::new();
    for _ in 0..4 {
        let receiver = Receiver::start(&[Reply::Status(200)]).await;
        one.endpoint(&receiver.url()).await;
        receivers.push(receiver);
    }
    for _ in 0..25 {
        let (some, more) =
            ((0..5).map(|_| one.event("license.created")), (0..5).map(|_| other.event("license.updated")));
        tokio::join!(one.ingest(some.collect()), other.ingest(more.collect()));
    }
    for receiver in &mut receivers {
        let mut seen = HashSet::new();
        for _ in 0..250 {
            let received = receiver.next().await;
            assert!(seen.insert(received.header("webhook-id").to_owned()), "sent twice");
        }
    }
    let (first, second) = (one.database.clone(), other.database.clone());
    one.shut_down().await;
    other.shut_down().await;
    assert!(receivers.iter_mut().all(|receiver| receiver.rest().is_empty()));
    first.close().await;
    second.close().await;
    db.remove().await;
}
