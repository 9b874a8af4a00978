//! Webhooks of teams, the end of a team, and the two worlds, on both engines.

mod common;

use std::collections::BTreeSet;

use common::{PRODUCT, Receiver, Reply, TEST_PRODUCT, World, account, lax, reason, refusal, secret_key, until};
use paperkey_kit::{
    db::{Database, DbError},
    events::TEAM_DELETED,
    store_suite,
};
use paperkey_proto::{
    Contract,
    errors::v1::Reason,
    options::v1::{Caller as Kind, Scope},
    principal::v1::{Mode, Principal, Role},
    webhook::v1::{
        CreateWebhookRequest, DeleteWebhookRequest, GetDeliveryRequest, GetWebhookRequest, ListDeliveriesRequest,
        ListWebhooksRequest, RecoverDeliveriesRequest, ReplayDeliveryRequest, RotateWebhookSecretRequest,
        TestWebhookRequest, UpdateWebhookRequest, WatchEventsRequest, Webhook, WebhookStatus,
    },
};
use paperkey_webhook::WebhookConfig;
use prost_types::FieldMask;
use sea_orm::{ConnectionTrait as _, Statement};

store_suite! {
    paperkey_migrations::webhook::Migrator;
    a_team_has_webhooks_of_its_own,
    a_webhook_belongs_to_a_product_or_to_the_team,
    products_and_teams_have_their_own_events,
    a_key_of_a_product_and_a_stranger_find_no_team,
    every_key_of_the_team_manages_what_it_may,
    an_event_of_the_team_arrives_at_its_endpoints_of_that_mode,
    who_may_read_what_a_delivery_tells_of_reads_its_body,
    a_deleted_team_is_sent_nothing_more,
    neither_world_sees_the_other_by_any_method,
    the_schema_goes_back_and_forth,
}

const URL: &str = "https://example.com/hooks";
const TEAM: &str = "team_1";

/// Whose webhooks a request is about.
#[derive(Clone, Copy)]
struct Source {
    product_id: &'static str,
    team_id: &'static str,
}

const OF_TEAM: Source = Source { product_id: "", team_id: TEAM };
const OF_CALLER: Source = Source { product_id: "", team_id: "" };

const fn of_product(product_id: &'static str) -> Source {
    Source { product_id, team_id: "" }
}

impl Source {
    fn create(self, events: &[&str]) -> CreateWebhookRequest {
        let events = events.iter().map(ToString::to_string).collect();
        let (product_id, team_id) = (self.product_id.into(), self.team_id.into());
        CreateWebhookRequest { product_id, url: URL.into(), events, team_id }
    }

    fn get(self, id: &str) -> GetWebhookRequest {
        let (product_id, team_id) = (self.product_id.into(), self.team_id.into());
        GetWebhookRequest { product_id, webhook_id: id.into(), team_id }
    }

    fn list(self) -> ListWebhooksRequest {
        let (product_id, team_id) = (self.product_id.into(), self.team_id.into());
        ListWebhooksRequest { product_id, team_id, ..ListWebhooksRequest::default() }
    }

    fn update(self, id: &str) -> UpdateWebhookRequest {
        let (product_id, team_id) = (self.product_id.into(), self.team_id.into());
        UpdateWebhookRequest { product_id, webhook_id: id.into(), team_id, ..UpdateWebhookRequest::default() }
    }

    fn delete(self, id: &str) -> DeleteWebhookRequest {
        let (product_id, team_id) = (self.product_id.into(), self.team_id.into());
        DeleteWebhookRequest { product_id, webhook_id: id.into(), team_id }
    }

    fn deliveries(self, id: &str) -> ListDeliveriesRequest {
        let (product_id, team_id) = (self.product_id.into(), self.team_id.into());
        ListDeliveriesRequest { product_id, webhook_id: id.into(), team_id, ..ListDeliveriesRequest::default() }
    }

    fn delivery(self, id: &str, delivery_id: &str) -> GetDeliveryRequest {
        let (product_id, team_id) = (self.product_id.into(), self.team_id.into());
        GetDeliveryRequest { product_id, webhook_id: id.into(), delivery_id: delivery_id.into(), team_id }
    }

    fn replay(self, id: &str, delivery_id: &str) -> ReplayDeliveryRequest {
        let (product_id, team_id) = (self.product_id.into(), self.team_id.into());
        ReplayDeliveryRequest { product_id, webhook_id: id.into(), delivery_id: delivery_id.into(), team_id }
    }

    fn recover(self, id: &str) -> RecoverDeliveriesRequest {
        let (product_id, team_id) = (self.product_id.into(), self.team_id.into());
        let since = Some(prost_types::Timestamp::default());
        RecoverDeliveriesRequest { product_id, webhook_id: id.into(), since, team_id }
    }

    fn test(self, id: &str) -> TestWebhookRequest {
        let (product_id, team_id) = (self.product_id.into(), self.team_id.into());
        TestWebhookRequest { product_id, webhook_id: id.into(), team_id }
    }

    fn rotate(self, id: &str) -> RotateWebhookSecretRequest {
        let (product_id, team_id) = (self.product_id.into(), self.team_id.into());
        RotateWebhookSecretRequest { product_id, webhook_id: id.into(), team_id }
    }

    fn watch(self) -> WatchEventsRequest {
        let (product_id, team_id) = (self.product_id.into(), self.team_id.into());
        WatchEventsRequest { product_id, team_id, since: None }
    }

    /// An event that an endpoint of it may have.
    fn event(self) -> &'static str {
        if self.product_id.is_empty() { "api_key.created" } else { "license.created" }
    }
}

/// Why each of the methods refuses that caller, by its name.
async fn reasons(
    world: &World,
    caller: &Principal,
    source: Source,
    id: &str,
    delivery_id: &str,
) -> Vec<(&'static str, Reason)> {
    let mut client = world.client(caller.clone());
    vec![
        ("CreateWebhook", reason(client.create_webhook(source.create(&[source.event()])).await)),
        ("GetWebhook", reason(client.get_webhook(source.get(id)).await)),
        ("ListWebhooks", reason(client.list_webhooks(source.list()).await)),
        ("UpdateWebhook", reason(client.update_webhook(source.update(id)).await)),
        ("DeleteWebhook", reason(client.delete_webhook(source.delete(id)).await)),
        ("ListDeliveries", reason(client.list_deliveries(source.deliveries(id)).await)),
        ("GetDelivery", reason(client.get_delivery(source.delivery(id, delivery_id)).await)),
        ("ReplayDelivery", reason(client.replay_delivery(source.replay(id, delivery_id)).await)),
        ("RecoverDeliveries", reason(client.recover_deliveries(source.recover(id)).await)),
        ("TestWebhook", reason(client.test_webhook(source.test(id)).await)),
        ("RotateWebhookSecret", reason(client.rotate_webhook_secret(source.rotate(id)).await)),
        ("WatchEvents", reason(client.watch_events(source.watch()).await)),
    ]
}

fn idle(database: Database) -> World {
    World::idle(database, WebhookConfig::default())
}

fn owner() -> Principal {
    account(TEAM, Mode::Live, Role::Owner)
}

async fn listed(world: &World, caller: Principal, source: Source) -> Vec<Webhook> {
    world.client(caller).list_webhooks(source.list()).await.unwrap().into_inner().webhooks
}

async fn a_team_has_webhooks_of_its_own(database: Database) {
    let world = idle(database);
    let created = world.owner().create_webhook(OF_TEAM.create(&["api_key.created"])).await.unwrap().into_inner();
    assert!(created.secret.starts_with("whsec_"));
    let webhook = created.webhook.unwrap();
    assert_eq!(
        (webhook.product_id.as_deref(), webhook.events.as_slice()),
        (None, ["api_key.created".into()].as_slice())
    );
    // Who names no team means their own.
    let second = world.owner().create_webhook(OF_CALLER.create(&["alert.created"])).await.unwrap().into_inner();
    let second = second.webhook.unwrap();
    let (of_product_1, _) = world.endpoint(URL).await;
    for source in [OF_TEAM, OF_CALLER] {
        assert_eq!(listed(&world, owner(), source).await, [second.clone(), webhook.clone()]);
        let got = world.owner().get_webhook(source.get(&webhook.id)).await.unwrap().into_inner();
        assert_eq!(got.webhook.as_ref(), Some(&webhook));
        assert_eq!(reason(world.owner().get_webhook(source.get(&of_product_1.id)).await), Reason::NotFound);
    }
    assert_eq!(listed(&world, owner(), of_product(PRODUCT)).await, [of_product_1]);
    assert_eq!(reason(world.owner().get_webhook(of_product(PRODUCT).get(&webhook.id)).await), Reason::NotFound);

    let paused = UpdateWebhookRequest {
        status: WebhookStatus::Paused.into(),
        update_mask: Some(FieldMask { paths: vec!["team_id".into(), "status".into()] }),
        ..OF_TEAM.update(&webhook.id)
    };
    let paused = world.owner().update_webhook(paused).await.unwrap().into_inner().webhook.unwrap();
    assert_eq!(paused.status(), WebhookStatus::Paused);
    world.owner().delete_webhook(OF_TEAM.delete(&webhook.id)).await.unwrap();
    assert_eq!(reason(world.owner().delete_webhook(OF_TEAM.delete(&webhook.id)).await), Reason::NotFound);
    assert_eq!(listed(&world, owner(), OF_TEAM).await, [second]);
}

async fn a_webhook_belongs_to_a_product_or_to_the_team(database: Database) {
    let world = idle(database);
    let (webhook, _) = world.endpoint(URL).await;
    let both = Source { product_id: PRODUCT, team_id: TEAM };
    for (method, reason) in reasons(&world, &owner(), both, &webhook.id, "dlv_1").await {
        assert_eq!(reason, Reason::ValidationFailed, "{method}");
    }
    let error = refusal(world.owner().get_webhook(both.get(&webhook.id)).await);
    assert_eq!(error.violations()[0].field, "team_id");
    assert_eq!(world.webhook(&webhook.id).await, webhook);
}

async fn products_and_teams_have_their_own_events(database: Database) {
    let world = idle(database);
    let of_team = ["api_key.created", "api_key.rotated", "api_key.revoked", "api_key.rotation_due"];
    let of_team = [&of_team[..], &["quota.warning", "quota.exceeded", "alert.created", "webhook.test"]].concat();
    assert!(world.owner().create_webhook(OF_TEAM.create(&of_team)).await.is_ok());
    for (source, unknown) in [
        (OF_TEAM, "license.created"),
        (OF_TEAM, "activation.removed"),
        (OF_TEAM, "team.deleted"),
        (OF_TEAM, "client.deleted"),
        (of_product(PRODUCT), "api_key.created"),
        (of_product(PRODUCT), "product.deleted"),
    ] {
        let error = refusal(world.owner().create_webhook(source.create(&["webhook.test", unknown])).await);
        assert_eq!(error.violations()[0].field, "events[1]", "{unknown}");
        assert!(error.violations()[0].message.contains(source.event()));
    }
    let [webhook] = listed(&world, owner(), OF_TEAM).await.try_into().unwrap();
    let update = UpdateWebhookRequest { events: vec!["license.created".into()], ..OF_TEAM.update(&webhook.id) };
    assert_eq!(refusal(world.owner().update_webhook(update).await).violations()[0].field, "events[0]");
}

async fn a_key_of_a_product_and_a_stranger_find_no_team(database: Database) {
    let world = idle(database);
    let (webhook, _) = world.team_endpoint(URL, &["api_key.created"]).await;
    for source in [OF_TEAM, OF_CALLER] {
        for (method, reason) in reasons(&world, &secret_key(PRODUCT), source, &webhook.id, "dlv_1").await {
            assert_eq!(reason, Reason::NotFound, "{method}");
        }
    }
    let stranger = account("team_2", Mode::Live, Role::Owner);
    for (method, reason) in reasons(&world, &stranger, OF_TEAM, &webhook.id, "dlv_1").await {
        assert_eq!(reason, Reason::NotFound, "{method}");
    }
    let nonsense = Source { product_id: "", team_id: "' OR 1=1 --" };
    for (method, reason) in reasons(&world, &owner(), nonsense, &webhook.id, "dlv_1").await {
        assert_eq!(reason, Reason::NotFound, "{method}");
    }
    assert!(listed(&world, stranger, OF_CALLER).await.is_empty());
    assert_eq!(listed(&world, owner(), OF_TEAM).await, [webhook]);
}

async fn every_key_of_the_team_manages_what_it_may(database: Database) {
    let world = idle(database);
    let key = |kind: Kind, role: Role, scopes: &[Scope]| Principal {
        kind: kind.into(),
        role: role.into(),
        scopes: scopes.iter().map(|scope| (*scope).into()).collect(),
        ..owner()
    };
    let all = [Scope::WebhooksRead, Scope::WebhooksWrite];
    for kind in [Kind::TeamKey, Kind::FreeKey, Kind::SystemKey] {
        let mut client = world.client(key(kind, Role::Unspecified, &all));
        for source in [OF_TEAM, OF_CALLER, of_product(PRODUCT)] {
            let made = client.create_webhook(source.create(&[source.event()])).await.unwrap().into_inner();
            client.delete_webhook(source.delete(&made.webhook.unwrap().id)).await.unwrap();
        }
    }
    let token = |role| key(Kind::UserToken, role, &all);
    assert!(world.client(token(Role::Manager)).create_webhook(OF_TEAM.create(&["webhook.test"])).await.is_ok());
    let member = world.client(token(Role::Member)).create_webhook(OF_TEAM.create(&["webhook.test"])).await;
    assert_eq!(reason(member), Reason::RoleInsufficient);
    let reads = key(Kind::TeamKey, Role::Unspecified, &[Scope::WebhooksRead]);
    assert_eq!(listed(&world, reads.clone(), OF_TEAM).await.len(), 1);
    let outcome = world.client(reads).create_webhook(OF_TEAM.create(&["webhook.test"])).await;
    assert_eq!(reason(outcome), Reason::ScopeInsufficient);
}

async fn who_may_read_what_a_delivery_tells_of_reads_its_body(database: Database) {
    let world = World::on(database.clone(), lax(1));
    let mut receiver = Receiver::start(&[Reply::Status(200)]).await;
    let (of_product_1, _) = world.endpoint(&receiver.url()).await;
    let (of_team, _) = world.team_endpoint(&receiver.url(), &["api_key.created"]).await;
    let key = |kind: Kind, role: Role, scopes: &[Scope]| Principal {
        kind: kind.into(),
        role: role.into(),
        scopes: scopes.iter().map(|scope| (*scope).into()).collect(),
        ..owner()
    };
    let team_key = |scopes: &[Scope]| key(Kind::TeamKey, Role::Unspecified, scopes);
    let (webhooks, licenses, keys) = (Scope::WebhooksRead, Scope::LicensesRead, Scope::KeysRead);
    let token = key(Kind::UserToken, Role::Member, &[webhooks, licenses, keys]);
    // Whoever is among the first reads both, of the second that of a product, of the third that of the team.
    let both = [owner(), account(TEAM, Mode::Live, Role::Admin), team_key(&[webhooks, licenses, keys])];
    let product = [
        account(TEAM, Mode::Live, Role::Manager),
        account(TEAM, Mode::Live, Role::Member),
        team_key(&[webhooks, licenses]),
        token,
    ];
    let team = [team_key(&[webhooks, keys])];
    let neither = [team_key(&[webhooks]), key(Kind::UserToken, Role::Owner, &[webhooks])];
    let mut seen = Vec::new();
    for (source, webhook) in [(of_product(PRODUCT), &of_product_1), (OF_TEAM, &of_team)] {
        let event = match source.product_id {
            "" => world.team_event("api_key.created", Mode::Live),
            _ => world.event("license.created"),
        };
        world.ingest(vec![event]).await;
        let sent = receiver.next().await;
        let [delivery] = world
            .owner()
            .list_deliveries(source.deliveries(&webhook.id))
            .await
            .unwrap()
            .into_inner()
            .deliveries
            .try_into()
            .unwrap();
        let payload = async |who: &Principal| {
            let got = world.client(who.clone()).get_delivery(source.delivery(&webhook.id, &delivery.id)).await;
            got.unwrap().into_inner().payload
        };
        let reads: Vec<bool> = {
            let mut reads = Vec::new();
            for who in both.iter().chain(&product).chain(&team).chain(&neither) {
                let payload = payload(who).await;
                // Byte for byte what the receiver has.
                assert!(payload.as_deref().is_none_or(|payload| payload.as_bytes() == sent.body));
                reads.push(payload.is_some());
            }
            reads
        };
        seen.push(reads);
        if source.product_id == PRODUCT {
            assert!(payload(&secret_key(PRODUCT)).await.is_some());
            let blind = Principal { scopes: vec![webhooks.into()], ..secret_key(PRODUCT) };
            assert!(payload(&blind).await.is_none());
        }
    }
    let expected = |product: bool, team: bool| -> Vec<bool> {
        [vec![true; 3], vec![product; 4], vec![team; 1], vec![false; 2]].concat()
    };
    assert_eq!(seen, [expected(true, false), expected(false, true)]);

    // What cannot be opened, or is not there any more, is missed by nobody else.
    let [delivery] = world.deliveries(&of_product_1.id).await.try_into().unwrap();
    for spoil in ["UPDATE events SET body_sealed = secret_sealed FROM endpoints", "DELETE FROM events"] {
        let spoil = database.write(move |tx| async move {
            tx.execute_unprepared(spoil).await?;
            Ok::<_, DbError>(())
        });
        spoil.await.unwrap();
        let request = of_product(PRODUCT).delivery(&of_product_1.id, &delivery.id);
        let got = world.owner().get_delivery(request).await.unwrap().into_inner();
        assert_eq!((got.payload, got.attempts.len().min(1)), (None, 1));
        assert_eq!(got.delivery.unwrap().event_id, delivery.event_id);
    }
    world.shut_down().await;
}

async fn an_event_of_the_team_arrives_at_its_endpoints_of_that_mode(database: Database) {
    let world = World::on(database, lax(1));
    let mut receiver = Receiver::start(&[Reply::Status(200)]).await;
    let mut of_test = Receiver::start(&[Reply::Status(200)]).await;
    let (webhook, _) = world.team_endpoint(&receiver.url(), &["api_key.created", "api_key.revoked"]).await;
    let tested = CreateWebhookRequest { url: of_test.url(), ..OF_TEAM.create(&["api_key.created"]) };
    world.client(account(TEAM, Mode::Test, Role::Owner)).create_webhook(tested).await.unwrap();
    world.endpoint(&receiver.url()).await;

    let event = world.team_event("api_key.created", Mode::Live);
    let ignored = world.team_event("api_key.rotated", Mode::Live);
    world.ingest(vec![event.clone(), ignored, event.clone()]).await;
    let received = receiver.next().await;
    let expected = format!(
        r#"{{"id":"{}","event":"api_key.created","createdAt":"2026-12-31T00:00:00.000Z","data":{}}}"#,
        event.id, event.data_json
    );
    assert_eq!(received.body, expected.as_bytes());
    assert_eq!(received.header("x-paperkey-event"), "api_key.created");
    let id = received.header("webhook-id").to_owned();
    until(async || {
        let answer = world.owner().get_delivery(OF_TEAM.delivery(&webhook.id, &id)).await.unwrap().into_inner();
        answer.attempts.len() == 1
    })
    .await;
    let listed = world.owner().list_deliveries(OF_TEAM.deliveries(&webhook.id)).await.unwrap().into_inner();
    assert_eq!(listed.deliveries.iter().map(|delivery| &delivery.id).collect::<Vec<_>>(), [&id]);

    let event = world.team_event("api_key.created", Mode::Test);
    world.ingest(vec![event.clone()]).await;
    assert_eq!(of_test.next().await.event_id(), event.id);
    world.shut_down().await;
    assert!(receiver.rest().is_empty() && of_test.rest().is_empty());
}

async fn a_deleted_team_is_sent_nothing_more(database: Database) {
    let world = World::on(database.clone(), lax(1));
    let mut receiver = Receiver::start(&[Reply::Status(200)]).await;
    let (of_team, _) = world.team_endpoint(&receiver.url(), &["api_key.created"]).await;
    let (of_product_1, _) = world.endpoint(&receiver.url()).await;
    world.happens("license.created").await;
    world.ingest(vec![world.team_event("api_key.created", Mode::Live)]).await;
    receiver.next().await;
    receiver.next().await;
    // It is told once for both modes.
    let gone = world.team_event(TEAM_DELETED, Mode::Live);
    let mut late = world.event("license.created");
    late.id.push('x');
    world.ingest(vec![late, world.team_event("api_key.created", Mode::Live), gone.clone()]).await;
    world.ingest(vec![gone]).await;
    assert_eq!(reason(world.owner().get_webhook(OF_TEAM.get(&of_team.id)).await), Reason::NotFound);
    assert_eq!(reason(world.owner().get_webhook(of_product(PRODUCT).get(&of_product_1.id)).await), Reason::NotFound);
    world.shut_down().await;
    assert!(receiver.rest().is_empty());
    for table in ["endpoints", "deliveries", "attempts", "events", "products"] {
        assert_eq!(count(&database, table).await, 0, "{table}");
    }
}

/// Live and test: what is in one is not there for the other, whatever the method.
async fn neither_world_sees_the_other_by_any_method(database: Database) {
    let world = idle(database);
    for (own, other, product) in [(Mode::Live, Mode::Test, PRODUCT), (Mode::Test, Mode::Live, TEST_PRODUCT)] {
        let (own, other) = (account(TEAM, own, Role::Owner), account(TEAM, other, Role::Owner));
        for source in [of_product(product), OF_TEAM] {
            let mut client = world.client(own.clone());
            let made = client.create_webhook(source.create(&[source.event()])).await.unwrap().into_inner();
            let made = made.webhook.unwrap();
            let event = world.event(source.event());
            let event =
                paperkey_proto::events::v1::Event { mode: own.mode, product_id: source.product_id.into(), ..event };
            world.ingest(vec![event]).await;
            let deliveries = client.list_deliveries(source.deliveries(&made.id)).await.unwrap().into_inner().deliveries;
            let [delivery] = deliveries.as_slice() else { panic!("one delivery, not {deliveries:?}") };

            let mut asked = BTreeSet::new();
            if source.product_id.is_empty() {
                // The team is in both worlds; what it has there is not.
                let mut client = world.client(other.clone());
                assert_eq!(reason(client.get_webhook(source.get(&made.id)).await), Reason::NotFound);
                assert_eq!(reason(client.update_webhook(source.update(&made.id)).await), Reason::NotFound);
                assert_eq!(reason(client.delete_webhook(source.delete(&made.id)).await), Reason::NotFound);
                assert_eq!(reason(client.list_deliveries(source.deliveries(&made.id)).await), Reason::NotFound);
                let get = source.delivery(&made.id, &delivery.id);
                assert_eq!(reason(client.get_delivery(get).await), Reason::NotFound);
                let replay = source.replay(&made.id, &delivery.id);
                assert_eq!(reason(client.replay_delivery(replay).await), Reason::NotFound);
                assert_eq!(reason(client.recover_deliveries(source.recover(&made.id)).await), Reason::NotFound);
                assert_eq!(reason(client.test_webhook(source.test(&made.id)).await), Reason::NotFound);
                assert_eq!(reason(client.rotate_webhook_secret(source.rotate(&made.id)).await), Reason::NotFound);
                assert!(listed(&world, other.clone(), source).await.iter().all(|webhook| webhook.id != made.id));
            } else {
                for (method, reason) in reasons(&world, &other, source, &made.id, &delivery.id).await {
                    assert_eq!(reason, Reason::NotFound, "{method}");
                    asked.insert(method);
                }
                let methods = Contract::get().methods().iter().filter_map(|method| {
                    let path = method.path.strip_prefix("/paperkey.webhook.v1.")?;
                    Some(path.split_once('/').unwrap().1)
                });
                assert_eq!(asked, methods.collect(), "no method of the service is left out");
            }
            assert_eq!(listed(&world, own.clone(), source).await, [made]);
        }
    }
}

async fn the_schema_goes_back_and_forth(database: Database) {
    let world = idle(database.clone());
    let (webhook, _) = world.team_endpoint(URL, &["api_key.created"]).await;
    database.migrate_down::<paperkey_migrations::webhook::Migrator>(1).await.unwrap();
    database.migrate_up::<paperkey_migrations::webhook::Migrator>().await.unwrap();
    assert_eq!(listed(&world, owner(), OF_TEAM).await, [webhook]);
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
