//! What is sent again, what is tried out, and secrets that are replaced, as callers meet them, on both engines.

mod common;

use std::collections::BTreeSet;

use common::{OTHER_PRODUCT, PRODUCT, Receiver, Reply, World, account, lax, reason, refusal, secret_key, until};
use paperkey_kit::{
    db::{Database, DbError},
    store_suite,
};
use paperkey_proto::{
    errors::v1::Reason,
    principal::v1::{Mode, Role},
    webhook::v1::{
        Delivery, DeliveryStatus, RecoverDeliveriesRequest, ReplayDeliveryRequest, RotateWebhookSecretRequest,
        RotateWebhookSecretResponse, TestWebhookRequest, WebhookStatus,
    },
};
use paperkey_webhook::WebhookConfig;
use prost_types::Timestamp;
use sea_orm::{ConnectionTrait as _, Statement};

store_suite! {
    paperkey_migrations::webhook::Migrator;
    a_delivery_that_is_replayed_arrives_again_under_its_id,
    what_failed_while_a_receiver_was_away_is_recovered,
    a_test_arrives_at_an_endpoint_that_subscribes_to_nothing_of_it,
    a_paused_webhook_is_resumed_before_it_is_tried_out,
    a_new_secret_is_shown_once_and_the_old_one_ends_tomorrow,
    a_replay_is_written_down_with_what_it_was_on,
    who_only_reads_sends_nothing_again,
    a_stranger_finds_nothing_to_send_again,
    what_is_kept_and_held_follows_the_configuration,
}

const URL: &str = "https://example.com/hooks";

fn replay(id: &str, delivery_id: &str) -> ReplayDeliveryRequest {
    ReplayDeliveryRequest {
        product_id: PRODUCT.into(),
        webhook_id: id.into(),
        delivery_id: delivery_id.into(),
        ..ReplayDeliveryRequest::default()
    }
}

fn recover(id: &str, since: Option<Timestamp>) -> RecoverDeliveriesRequest {
    RecoverDeliveriesRequest {
        product_id: PRODUCT.into(),
        webhook_id: id.into(),
        since,
        ..RecoverDeliveriesRequest::default()
    }
}

fn test(id: &str) -> TestWebhookRequest {
    TestWebhookRequest { product_id: PRODUCT.into(), webhook_id: id.into(), ..TestWebhookRequest::default() }
}

fn rotate(id: &str) -> RotateWebhookSecretRequest {
    RotateWebhookSecretRequest {
        product_id: PRODUCT.into(),
        webhook_id: id.into(),
        ..RotateWebhookSecretRequest::default()
    }
}

async fn replayed(world: &World, id: &str, delivery_id: &str) -> Delivery {
    world.owner().replay_delivery(replay(id, delivery_id)).await.unwrap().into_inner().delivery.unwrap()
}

async fn rotated(world: &World, id: &str) -> RotateWebhookSecretResponse {
    world.owner().rotate_webhook_secret(rotate(id)).await.unwrap().into_inner()
}

async fn a_delivery_that_is_replayed_arrives_again_under_its_id(database: Database) {
    let world = World::on(database, lax(1));
    let mut receiver = Receiver::start(&[Reply::Status(200), Reply::Status(500), Reply::Status(200)]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    world.happens("license.created").await;
    let first = receiver.next().await;
    world.until_tried(&webhook.id, 1).await;
    for (made, status) in [(1, DeliveryStatus::Failed), (2, DeliveryStatus::Succeeded)] {
        let delivery = replayed(&world, &webhook.id, first.header("webhook-id")).await;
        assert_eq!((delivery.status(), delivery.attempts_count), (DeliveryStatus::Pending, made));
        let again = receiver.next().await;
        assert_eq!(again.header("webhook-id"), first.header("webhook-id"));
        assert_eq!(again.body, first.body);
        let answer = world.until_tried(&webhook.id, made + 1).await;
        assert_eq!(answer.delivery.unwrap().status(), status);
        let numbers: Vec<i32> = answer.attempts.iter().map(|attempt| attempt.number).collect();
        assert_eq!(numbers, (1..=made + 1).collect::<Vec<_>>());
        assert_eq!(world.webhook(&webhook.id).await.consecutive_failures, 0);
    }
    world.shut_down().await;
    assert!(receiver.rest().is_empty());
}

async fn what_failed_while_a_receiver_was_away_is_recovered(database: Database) {
    let world = World::on(database, lax(1));
    let mut receiver = Receiver::start(&[Reply::Status(503)]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    let mut events = BTreeSet::new();
    for _ in 0..8 {
        events.insert(world.happens("license.created").await);
    }
    world.until_all(&webhook.id, DeliveryStatus::Failed).await;
    receiver.rest();
    let future = Timestamp { seconds: 4_000_000_000, nanos: 0 };
    let long_ago = Timestamp { seconds: 0, nanos: 0 };
    let recovered = async |since| {
        world.owner().recover_deliveries(recover(&webhook.id, Some(since))).await.unwrap().into_inner().recovered
    };
    assert_eq!(recovered(future).await, 0);
    receiver.answers(Reply::Status(200));
    assert_eq!(recovered(long_ago).await, 8);
    let mut arrived = BTreeSet::new();
    for _ in 0..8 {
        arrived.insert(receiver.next().await.event_id());
    }
    assert_eq!(arrived, events);
    world.until_all(&webhook.id, DeliveryStatus::Succeeded).await;
    assert_eq!(recovered(long_ago).await, 0);
    let unsaid = refusal(world.owner().recover_deliveries(recover(&webhook.id, None)).await);
    assert_eq!((unsaid.reason(), unsaid.violations()[0].field.as_str()), (Reason::ValidationFailed, "since"));
    let odd = recover(&webhook.id, Some(Timestamp { seconds: i64::MIN, nanos: i32::MIN }));
    assert_eq!(reason(world.owner().recover_deliveries(odd).await), Reason::ValidationFailed);
    world.shut_down().await;
    assert!(receiver.rest().is_empty());
}

async fn a_test_arrives_at_an_endpoint_that_subscribes_to_nothing_of_it(database: Database) {
    let world = World::on(database, lax(1));
    let mut receiver = Receiver::start(&[Reply::Status(200)]).await;
    let mut other = Receiver::start(&[Reply::Status(200)]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    world.endpoint_for(&other.url(), &["webhook.test"]).await;
    let made = world.owner().test_webhook(test(&webhook.id)).await.unwrap().into_inner().delivery.unwrap();
    assert_eq!((made.event.as_str(), made.status()), ("webhook.test", DeliveryStatus::Pending));
    let received = receiver.next().await;
    assert_eq!(received.header("webhook-id"), made.id);
    assert_eq!(received.header("x-paperkey-event"), "webhook.test");
    let body: serde_json::Value = serde_json::from_slice(&received.body).unwrap();
    assert_eq!((&body["id"], &body["data"]["webhookId"]), (&made.event_id.into(), &webhook.id.as_str().into()));
    world.until_all(&webhook.id, DeliveryStatus::Succeeded).await;
    world.shut_down().await;
    assert!(receiver.rest().is_empty() && other.rest().is_empty());
}

async fn a_paused_webhook_is_resumed_before_it_is_tried_out(database: Database) {
    let world = World::idle(database, WebhookConfig::default());
    let (webhook, _) = world.endpoint(URL).await;
    world.set_status(&webhook.id, WebhookStatus::Paused).await;
    let refused = refusal(world.owner().test_webhook(test(&webhook.id)).await);
    assert_eq!(refused.reason(), Reason::Conflict);
    assert!(refused.message().contains("resume it first"));
    world.set_status(&webhook.id, WebhookStatus::Active).await;
    assert!(world.owner().test_webhook(test(&webhook.id)).await.is_ok());
}

async fn a_new_secret_is_shown_once_and_the_old_one_ends_tomorrow(database: Database) {
    let world = World::idle(database, WebhookConfig::default());
    let (webhook, first) = world.endpoint(URL).await;
    assert_eq!(webhook.previous_secret_expires_at, None);
    // Each call is made twice under one key, and answers the same secret both times.
    let second = rotated(&world, &webhook.id).await;
    let third = rotated(&world, &webhook.id).await;
    let secrets = BTreeSet::from([first.as_str(), second.secret.as_str(), third.secret.as_str()]);
    assert_eq!(secrets.len(), 3);
    assert!(secrets.iter().all(|secret| secret.starts_with("whsec_")));
    let after = world.webhook(&webhook.id).await;
    assert_eq!(Some(&after), third.webhook.as_ref());
    let (changed, expires) = (after.updated_at.unwrap(), after.previous_secret_expires_at.unwrap());
    assert_eq!(expires.seconds - changed.seconds, 24 * 3_600);
    assert_eq!((after.status(), after.url, after.events), (webhook.status(), webhook.url, webhook.events));
}

async fn a_replay_is_written_down_with_what_it_was_on(database: Database) {
    let world = World::idle(database.clone(), WebhookConfig::default());
    let (webhook, _) = world.endpoint(URL).await;
    world.happens("license.created").await;
    let delivery = world.only_delivery(&webhook.id).await.delivery.unwrap();
    replayed(&world, &webhook.id, &delivery.id).await;
    let job = |reader: paperkey_kit::db::Reader| async move {
        let text = "SELECT resources FROM audit_entries WHERE action LIKE '%/ReplayDelivery'";
        let rows = reader.query_all_raw(Statement::from_string(reader.get_database_backend(), text)).await?;
        rows.iter().map(|row| Ok::<String, DbError>(row.try_get("", "resources")?)).collect::<Result<Vec<_>, _>>()
    };
    let [resources] = database.read(job).await.unwrap().try_into().unwrap();
    for id in [delivery.id.as_str(), webhook.id.as_str(), PRODUCT] {
        assert!(resources.contains(id), "{id} is not among {resources}");
    }
}

async fn who_only_reads_sends_nothing_again(database: Database) {
    let world = World::idle(database, WebhookConfig::default());
    let (webhook, _) = world.endpoint(URL).await;
    let mut member = world.client(account("team_1", Mode::Live, Role::Member));
    assert_eq!(reason(member.replay_delivery(replay(&webhook.id, "dlv_1")).await), Reason::RoleInsufficient);
    let since = Some(Timestamp::default());
    assert_eq!(reason(member.recover_deliveries(recover(&webhook.id, since)).await), Reason::RoleInsufficient);
    assert_eq!(reason(member.test_webhook(test(&webhook.id)).await), Reason::RoleInsufficient);
    assert_eq!(reason(member.rotate_webhook_secret(rotate(&webhook.id)).await), Reason::RoleInsufficient);
}

async fn a_stranger_finds_nothing_to_send_again(database: Database) {
    let world = World::idle(database, WebhookConfig::default());
    let (webhook, _) = world.endpoint(URL).await;
    world.happens("license.created").await;
    let delivery = world.only_delivery(&webhook.id).await.delivery.unwrap();
    for stranger in [
        account("team_2", Mode::Live, Role::Owner),
        account("team_1", Mode::Test, Role::Owner),
        secret_key(OTHER_PRODUCT),
    ] {
        let mut client = world.client(stranger);
        assert_eq!(reason(client.replay_delivery(replay(&webhook.id, &delivery.id)).await), Reason::NotFound);
        let since = Some(Timestamp::default());
        assert_eq!(reason(client.recover_deliveries(recover(&webhook.id, since)).await), Reason::NotFound);
        assert_eq!(reason(client.test_webhook(test(&webhook.id)).await), Reason::NotFound);
        assert_eq!(reason(client.rotate_webhook_secret(rotate(&webhook.id)).await), Reason::NotFound);
    }
    let unknown = refusal(world.owner().replay_delivery(replay(&webhook.id, "dlv_unknown")).await);
    assert_eq!(unknown.reason(), Reason::NotFound);
    assert_eq!(world.only_delivery(&webhook.id).await.delivery.unwrap(), delivery);
    assert_eq!(world.webhook(&webhook.id).await, webhook);
}

async fn what_is_kept_and_held_follows_the_configuration(database: Database) {
    let world = World::on(database.clone(), lax(1));
    let mut receiver = Receiver::start(&[Reply::Status(200)]).await;
    let (done, _) = world.endpoint(&receiver.url()).await;
    let (held, _) = world.endpoint(&receiver.url()).await;
    world.set_status(&held.id, WebhookStatus::Paused).await;
    world.happens("license.created").await;
    receiver.next().await;
    world.until_all(&done.id, DeliveryStatus::Succeeded).await;
    world.shut_down().await;
    // It is looked for at the start.
    let world = World::on(database.clone(), WebhookConfig { held_days: 0, ..lax(1) });
    world.until_all(&held.id, DeliveryStatus::Failed).await;
    assert_eq!(world.only_delivery(&held.id).await.delivery.unwrap().error.as_deref(), Some("held_too_long"));
    assert_eq!(world.deliveries(&done.id).await.len(), 1);
    world.shut_down().await;
    let world = World::on(database, WebhookConfig { kept_days: 0, ..lax(1) });
    until(async || world.deliveries(&done.id).await.is_empty() && world.deliveries(&held.id).await.is_empty()).await;
    world.shut_down().await;
}
