//! The service as its callers meet it: assembled, behind its policy, with the catalogue played by the test.

mod common;

use common::{OTHER_PRODUCT, PRODUCT, World, account, lax, reason, refusal, secret_key};
use paperkey_kit::testing::TestDb;
use paperkey_proto::{
    errors::v1::Reason,
    principal::v1::{Mode, Role},
    webhook::v1::{
        CreateWebhookRequest, DeleteWebhookRequest, GetDeliveryRequest, GetWebhookRequest, ListDeliveriesRequest,
        ListWebhooksRequest, UpdateWebhookRequest, WebhookStatus,
    },
};
use paperkey_webhook::WebhookConfig;
use prost_types::FieldMask;

const URL: &str = "https://example.com/hooks";

/// A world, and the folder that goes with it.
async fn world() -> (World, TestDb) {
    let db = TestDb::sqlite();
    let database = db.migrated::<paperkey_migrations::webhook::Migrator>().await;
    (World::idle(database, WebhookConfig::default()), db)
}

fn create(url: &str, events: &[&str]) -> CreateWebhookRequest {
    let events = events.iter().map(ToString::to_string).collect();
    CreateWebhookRequest { product_id: PRODUCT.into(), url: url.into(), events, ..CreateWebhookRequest::default() }
}

fn get(id: &str) -> GetWebhookRequest {
    GetWebhookRequest { product_id: PRODUCT.into(), webhook_id: id.into(), ..GetWebhookRequest::default() }
}

fn list(page_size: Option<i32>, page_token: &str) -> ListWebhooksRequest {
    ListWebhooksRequest {
        product_id: PRODUCT.into(),
        page_size,
        page_token: page_token.into(),
        ..ListWebhooksRequest::default()
    }
}

fn update(id: &str) -> UpdateWebhookRequest {
    UpdateWebhookRequest { product_id: PRODUCT.into(), webhook_id: id.into(), ..UpdateWebhookRequest::default() }
}

fn delete(id: &str) -> DeleteWebhookRequest {
    DeleteWebhookRequest { product_id: PRODUCT.into(), webhook_id: id.into(), ..DeleteWebhookRequest::default() }
}

fn mask(paths: &[&str]) -> FieldMask {
    FieldMask { paths: paths.iter().map(ToString::to_string).collect() }
}

#[tokio::test]
async fn a_new_webhook_is_active_and_shows_its_secret_once() {
    let (world, _db) = world().await;
    let created = world.owner().create_webhook(create(URL, &["license.created"])).await.unwrap().into_inner();
    assert!(created.secret.starts_with("whsec_"));
    let webhook = created.webhook.unwrap();
    assert!(webhook.id.starts_with("wh_"));
    assert_eq!((webhook.product_id.as_deref(), webhook.url.as_str()), (Some(PRODUCT), URL));
    assert_eq!(webhook.events, ["license.created"]);
    assert_eq!((webhook.status(), webhook.consecutive_failures), (WebhookStatus::Active, 0));
    assert_eq!(webhook.created_at, webhook.updated_at);
    assert_eq!(world.webhook(&webhook.id).await, webhook);
}

#[tokio::test]
async fn what_is_wrong_with_a_webhook_is_said_by_its_field() {
    let (world, _db) = world().await;
    let fault = async |request| {
        let error = refusal(world.owner().create_webhook(request).await);
        assert_eq!(error.reason(), Reason::ValidationFailed);
        error.violations()[0].field.clone()
    };
    assert_eq!(fault(create("", &["license.created"])).await, "url");
    assert_eq!(fault(create("http://example.com/", &["license.created"])).await, "url");
    assert_eq!(fault(create("https://10.0.0.1/", &["license.created"])).await, "url");
    assert_eq!(fault(create("https://u:p@example.com/", &["license.created"])).await, "url");
    assert_eq!(fault(create(URL, &[])).await, "events");
    assert_eq!(fault(create(URL, &["license.created", "license.created"])).await, "events[1]");
    assert_eq!(fault(create(URL, &["license.created", "api_key.created"])).await, "events[1]");
    let error = refusal(world.owner().create_webhook(create(URL, &["license.eaten"])).await);
    assert!(error.violations()[0].message.contains("activation.removed"));
}

#[tokio::test]
async fn a_product_that_is_not_there_has_no_webhooks() {
    let (world, _db) = world().await;
    for product in ["prod_unknown", "prod\0", "' OR 1=1 --", "é"] {
        let request = CreateWebhookRequest { product_id: product.into(), ..create(URL, &["license.created"]) };
        assert_ne!(world.owner().create_webhook(request).await.unwrap_err().code(), tonic::Code::Internal);
        let request = ListWebhooksRequest { product_id: product.into(), ..ListWebhooksRequest::default() };
        assert_ne!(world.owner().list_webhooks(request).await.unwrap_err().code(), tonic::Code::Internal);
    }
    let request = ListWebhooksRequest { product_id: "prod_unknown".into(), ..ListWebhooksRequest::default() };
    assert_eq!(reason(world.owner().list_webhooks(request).await), Reason::NotFound);
    assert!(world.owner().list_webhooks(list(None, "")).await.unwrap().into_inner().webhooks.is_empty());
}

#[tokio::test]
async fn a_stranger_finds_nothing() {
    let (world, _db) = world().await;
    let (webhook, _) = world.endpoint(URL).await;
    let id = webhook.id.as_str();
    for stranger in [
        account("team_2", Mode::Live, Role::Owner),
        account("team_1", Mode::Test, Role::Owner),
        secret_key(OTHER_PRODUCT),
    ] {
        let mut client = world.client(stranger);
        assert_eq!(reason(client.create_webhook(create(URL, &["license.created"])).await), Reason::NotFound);
        assert_eq!(reason(client.list_webhooks(list(None, "")).await), Reason::NotFound);
        assert_eq!(reason(client.get_webhook(get(id)).await), Reason::NotFound);
        assert_eq!(reason(client.update_webhook(update(id)).await), Reason::NotFound);
        let request = delete(id);
        assert_eq!(reason(client.delete_webhook(request).await), Reason::NotFound);
        let request = ListDeliveriesRequest {
            product_id: PRODUCT.into(),
            webhook_id: id.into(),
            ..ListDeliveriesRequest::default()
        };
        assert_eq!(reason(client.list_deliveries(request).await), Reason::NotFound);
        let request = GetDeliveryRequest {
            product_id: PRODUCT.into(),
            webhook_id: id.into(),
            delivery_id: "dlv_1".into(),
            ..GetDeliveryRequest::default()
        };
        assert_eq!(reason(client.get_delivery(request).await), Reason::NotFound);
    }
    assert_eq!(world.webhook(id).await, webhook);
}

#[tokio::test]
async fn a_secret_key_reaches_its_product_and_a_member_only_reads() {
    let (world, _db) = world().await;
    let mut key = world.client(secret_key(PRODUCT));
    let webhook = key.create_webhook(create(URL, &["license.created"])).await.unwrap().into_inner().webhook.unwrap();
    assert!(key.get_webhook(get(&webhook.id)).await.is_ok());
    let mut member = world.client(account("team_1", Mode::Live, Role::Member));
    assert!(member.get_webhook(get(&webhook.id)).await.is_ok());
    assert_eq!(reason(member.update_webhook(update(&webhook.id)).await), Reason::RoleInsufficient);
}

#[tokio::test]
async fn an_update_changes_what_it_names_and_nothing_else() {
    let (world, _db) = world().await;
    let (webhook, _) = world.endpoint(URL).await;
    let mut owner = world.owner();

    let paused = UpdateWebhookRequest { status: WebhookStatus::Paused.into(), ..update(&webhook.id) };
    let after = owner.update_webhook(paused).await.unwrap().into_inner().webhook.unwrap();
    assert_eq!(after.status(), WebhookStatus::Paused);
    assert_eq!((&after.url, &after.events), (&webhook.url, &webhook.events));

    // Only what the mask names counts.
    let masked = UpdateWebhookRequest {
        url: Some("https://example.org/".into()),
        events: vec!["license.revoked".into()],
        update_mask: Some(mask(&["events"])),
        ..update(&webhook.id)
    };
    let after = owner.update_webhook(masked).await.unwrap().into_inner().webhook.unwrap();
    assert_eq!((after.url.as_str(), after.events.as_slice()), (URL, ["license.revoked".to_owned()].as_slice()));

    let moved = UpdateWebhookRequest { url: Some("https://example.org/".into()), ..update(&webhook.id) };
    let after = owner.update_webhook(moved).await.unwrap().into_inner().webhook.unwrap();
    assert_eq!((after.url.as_str(), after.status()), ("https://example.org/", WebhookStatus::Paused));

    // Nothing named, nothing changed.
    let same = owner.update_webhook(update(&webhook.id)).await.unwrap().into_inner().webhook.unwrap();
    assert_eq!(same, after);
}

#[tokio::test]
async fn an_update_can_neither_clear_nor_break_a_field() {
    let (world, _db) = world().await;
    let (webhook, _) = world.endpoint(URL).await;
    let fault = async |request| {
        let error = refusal(world.owner().update_webhook(request).await);
        assert_eq!(error.reason(), Reason::ValidationFailed);
        error.violations()[0].field.clone()
    };
    for field in ["url", "events", "status"] {
        let cleared = UpdateWebhookRequest { update_mask: Some(mask(&[field])), ..update(&webhook.id) };
        assert_eq!(fault(cleared).await, field);
    }
    let unknown = UpdateWebhookRequest { update_mask: Some(mask(&["secret"])), ..update(&webhook.id) };
    assert_eq!(fault(unknown).await, "secret");
    let odd = UpdateWebhookRequest { status: 99, ..update(&webhook.id) };
    assert_eq!(fault(odd).await, "status");
    let private = UpdateWebhookRequest { url: Some("https://127.0.0.1/".into()), ..update(&webhook.id) };
    assert_eq!(fault(private).await, "url");
    assert_eq!(world.webhook(&webhook.id).await, webhook);
}

#[tokio::test]
async fn a_product_has_at_most_twenty_webhooks_in_pages_newest_first() {
    let (world, _db) = world().await;
    for _ in 0..20 {
        world.endpoint(URL).await;
    }
    let error = refusal(world.owner().create_webhook(create(URL, &["license.created"])).await);
    assert_eq!(error.reason(), Reason::Conflict);
    assert!(error.message().contains("20"));

    let (mut ids, mut token) = (Vec::new(), String::new());
    loop {
        let page = world.owner().list_webhooks(list(Some(7), &token)).await.unwrap().into_inner();
        ids.extend(page.webhooks.into_iter().map(|webhook| webhook.id));
        match page.next_page_token {
            Some(next) => token = next,
            None => break,
        }
    }
    assert_eq!(ids.len(), 20);
    assert!(ids.is_sorted_by(|newer, older| newer > older));
    assert_eq!(reason(world.owner().list_webhooks(list(None, "nonsense!")).await), Reason::ValidationFailed);
}

#[tokio::test]
async fn a_deleted_webhook_is_gone() {
    let (world, _db) = world().await;
    let (webhook, _) = world.endpoint(URL).await;
    let request = delete(&webhook.id);
    world.owner().delete_webhook(request.clone()).await.unwrap();
    assert_eq!(reason(world.owner().delete_webhook(request).await), Reason::NotFound);
    assert_eq!(reason(world.owner().get_webhook(get(&webhook.id)).await), Reason::NotFound);
}

#[tokio::test]
async fn development_may_use_http_and_its_own_machine() {
    let db = TestDb::sqlite();
    let world = World::idle(db.migrated::<paperkey_migrations::webhook::Migrator>().await, lax(1));
    world.endpoint("http://localhost:3000/hook").await;
    world.endpoint("http://[::1]:3000/hook").await;
}

#[tokio::test]
async fn only_processes_hand_over_events() {
    use paperkey_proto::events::v1::{IngestEventsRequest, intake_service_client::IntakeServiceClient};
    let (world, _db) = world().await;
    let mut intake = IntakeServiceClient::new(world.way(account("team_1", Mode::Live, Role::Owner)));
    let events = vec![world.event("license.created")];
    assert!(intake.ingest_events(IngestEventsRequest { events }).await.is_err());
}
