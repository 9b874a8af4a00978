//! Watching events as callers do, on both engines.

mod common;

use common::{
    OTHER_PRODUCT, PRODUCT, Receiver, Reply, TEST_PRODUCT, World, account, lax, reason, refusal, secret_key, until,
    within,
};
use paperkey_kit::{db::Database, db::DbError, store_suite, testing::TestDb};
use paperkey_migrations::webhook::Migrator;
use paperkey_proto::{
    errors::v1::Reason,
    events::v1::Event,
    options::v1::Scope,
    principal::v1::{Mode, Principal, Role},
    webhook::v1::{DeliveryStatus, WatchEventsRequest, WatchEventsResponse, WatchedEvent},
};
use prost_types::Timestamp;
use sea_orm::{ConnectionTrait as _, Statement};
use tonic::Streaming;

store_suite! {
    paperkey_migrations::webhook::Migrator;
    what_happens_is_shown_though_nobody_subscribes,
    deliveries_are_shown_on_their_way,
    a_test_is_shown_as_well,
    who_asks_again_since_the_last_event_misses_nothing,
    nobody_watches_what_is_not_theirs,
    the_eleventh_has_to_wait_until_one_ends,
    who_goes_away_watches_no_longer,
    a_reader_who_stops_reading_holds_up_nobody,
    a_stream_ends_well_with_the_process,
    a_watch_of_a_deleted_product_cannot_be_begun_again,
}

type Shows = Streaming<WatchEventsResponse>;

fn of_product(product_id: &str) -> WatchEventsRequest {
    WatchEventsRequest { product_id: product_id.into(), ..WatchEventsRequest::default() }
}

fn owner() -> Principal {
    account("team_1", Mode::Live, Role::Owner)
}

/// A stream that has begun: its first answer is empty.
async fn watch(world: &World, caller: Principal, request: WatchEventsRequest) -> Shows {
    let mut stream = world.client(caller).watch_events(request).await.expect("it begins").into_inner();
    assert_eq!(next(&mut stream).await, WatchEventsResponse::default());
    stream
}

async fn next(stream: &mut Shows) -> WatchEventsResponse {
    within(stream.message()).await.expect("it goes on").expect("it has not ended")
}

async fn next_event(stream: &mut Shows) -> WatchedEvent {
    let next = next(stream).await;
    assert_eq!(next.delivery, None);
    next.event.expect("an event is shown")
}

/// Those who watch at this moment.
const WATCHING: &str = "watchers WHERE ended_at_ms IS NULL";

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

async fn what_happens_is_shown_though_nobody_subscribes(database: Database) {
    let world = World::on(database, lax(1));
    world.happens("license.created").await;
    let mut one = watch(&world, owner(), of_product(PRODUCT)).await;
    let mut other = watch(&world, secret_key(PRODUCT), of_product(PRODUCT)).await;
    let mut of_team = watch(&world, account("team_1", Mode::Live, Role::Admin), of_product("")).await;
    let mut events = Vec::new();
    for _ in 0..3 {
        events.push(world.happens("license.updated").await);
        let of_other = Event { product_id: OTHER_PRODUCT.into(), ..world.event("license.updated") };
        world.ingest(vec![of_other]).await;
    }
    for stream in [&mut one, &mut other] {
        for id in &events {
            let event = next_event(stream).await;
            assert_eq!((&event.id, event.event.as_str()), (id, "license.updated"));
            assert_eq!(event.created_at, Some(Timestamp { seconds: 1_798_675_200, nanos: 0 }));
            let expected = format!(
                r#"{{"id":"{id}","event":"license.updated","createdAt":"2026-12-31T00:00:00.000Z","data":{{"id":"lic_1", "key":"K7WX9"}}}}"#
            );
            assert_eq!(event.payload, expected);
        }
    }
    let event = world.team_event("api_key.created", Mode::Live);
    world.ingest(vec![event.clone(), world.team_event("api_key.created", Mode::Test)]).await;
    assert_eq!(next_event(&mut of_team).await.id, event.id);
    world.shut_down().await;
    for mut stream in [one, other, of_team] {
        assert_eq!(within(stream.message()).await.unwrap(), None);
    }
}

async fn deliveries_are_shown_on_their_way(database: Database) {
    let world = World::on(database, lax(2));
    let receiver = Receiver::start(&[Reply::Status(500), Reply::Status(200)]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    let mut stream = watch(&world, owner(), of_product(PRODUCT)).await;
    let id = world.happens("license.created").await;
    assert_eq!(next_event(&mut stream).await.id, id);
    let mut attempts = -1;
    loop {
        let shown = next(&mut stream).await.delivery.expect("a delivery is shown");
        let delivery = shown.delivery.unwrap();
        assert_eq!((shown.webhook_id.as_str(), delivery.event_id.as_str()), (webhook.id.as_str(), id.as_str()));
        assert!(delivery.attempts_count >= attempts);
        attempts = delivery.attempts_count;
        if delivery.status() == DeliveryStatus::Succeeded {
            break;
        }
    }
    assert_eq!(attempts, 2);
    world.shut_down().await;
    assert_eq!(within(stream.message()).await.unwrap(), None);
}

async fn a_test_is_shown_as_well(database: Database) {
    let world = World::on(database, lax(1));
    let receiver = Receiver::start(&[Reply::Status(200)]).await;
    let (webhook, _) = world.endpoint(&receiver.url()).await;
    let mut stream = watch(&world, owner(), of_product(PRODUCT)).await;
    let request = paperkey_proto::webhook::v1::TestWebhookRequest {
        product_id: PRODUCT.into(),
        webhook_id: webhook.id,
        ..Default::default()
    };
    let made = world.owner().test_webhook(request).await.unwrap().into_inner().delivery.unwrap();
    assert_eq!(next_event(&mut stream).await.id, made.event_id);
    assert_eq!(next(&mut stream).await.delivery.unwrap().delivery.unwrap().id, made.id);
}

async fn who_asks_again_since_the_last_event_misses_nothing(database: Database) {
    let world = World::on(database, lax(1));
    let now = || Timestamp::from(std::time::SystemTime::now());
    let begun = now();
    let stream = watch(&world, owner(), of_product(PRODUCT)).await;
    let first = world.happens("license.created").await;
    let second = world.happens("license.created").await;
    drop(stream);
    let since = WatchEventsRequest { since: Some(begun), ..of_product(PRODUCT) };
    let mut stream = watch(&world, owner(), since).await;
    assert_eq!([next_event(&mut stream).await.id, next_event(&mut stream).await.id], [first, second]);
    let third = world.happens("license.created").await;
    assert_eq!(next_event(&mut stream).await.id, third);
    // From the future, nothing has come yet.
    let future = Timestamp { seconds: begun.seconds + 1_000_000, nanos: 0 };
    let future = WatchEventsRequest { since: Some(future), ..of_product(PRODUCT) };
    let mut stream = watch(&world, owner(), future).await;
    let fourth = world.happens("license.created").await;
    assert_eq!(next_event(&mut stream).await.id, fourth);
    let odd = Timestamp { seconds: i64::MIN, nanos: -1 };
    let odd = world.owner().watch_events(WatchEventsRequest { since: Some(odd), ..of_product(PRODUCT) }).await;
    assert_eq!(reason(odd), Reason::ValidationFailed);
    world.shut_down().await;
}

async fn nobody_watches_what_is_not_theirs(database: Database) {
    let world = World::on(database.clone(), lax(1));
    let test = || account("team_1", Mode::Test, Role::Owner);
    for (caller, product) in [
        (owner(), "prod_unknown"),
        (owner(), "' OR 1=1 --"),
        (owner(), TEST_PRODUCT),
        (test(), PRODUCT),
        (account("team_2", Mode::Live, Role::Owner), PRODUCT),
        (secret_key(OTHER_PRODUCT), PRODUCT),
        (secret_key(PRODUCT), ""),
    ] {
        let refused = world.client(caller).watch_events(of_product(product)).await;
        assert_eq!(reason(refused), Reason::NotFound, "{product}");
    }
    // What is shown are licences with their keys, or the team's keys and alerts: who may not read those is not shown them.
    let hooks_only = Principal { scopes: vec![Scope::WebhooksRead.into()], ..secret_key(PRODUCT) };
    assert_eq!(reason(world.client(hooks_only).watch_events(of_product(PRODUCT)).await), Reason::ScopeInsufficient);
    for role in [Role::Manager, Role::Member] {
        let person = || account("team_1", Mode::Live, role);
        assert_eq!(reason(world.client(person()).watch_events(of_product("")).await), Reason::RoleInsufficient);
        watch(&world, person(), of_product(PRODUCT)).await;
    }
    until(async || count(&database, WATCHING).await == 0).await;
    let of_another = WatchEventsRequest { team_id: "team_2".into(), ..of_product("") };
    assert_eq!(reason(world.owner().watch_events(of_another).await), Reason::NotFound);
    let of_both = WatchEventsRequest { team_id: "team_1".into(), ..of_product(PRODUCT) };
    assert_eq!(reason(world.owner().watch_events(of_both).await), Reason::ValidationFailed);
    assert_eq!(count(&database, WATCHING).await, 0);

    // The two worlds apart: each sees its own.
    let (mut live, mut tested) =
        (watch(&world, owner(), of_product("")).await, watch(&world, test(), of_product("")).await);
    let of_live = world.team_event("api_key.created", Mode::Live);
    let of_test = world.team_event("api_key.created", Mode::Test);
    world.ingest(vec![of_test.clone(), of_live.clone()]).await;
    assert_eq!(next_event(&mut live).await.id, of_live.id);
    assert_eq!(next_event(&mut tested).await.id, of_test.id);
    world.shut_down().await;
    assert_eq!(within(live.message()).await.unwrap(), None);
    assert_eq!(within(tested.message()).await.unwrap(), None);
}

async fn the_eleventh_has_to_wait_until_one_ends(database: Database) {
    let world = World::on(database, lax(1));
    let mut streams = Vec::new();
    for _ in 0..10 {
        streams.push(watch(&world, owner(), of_product(PRODUCT)).await);
    }
    let refused = refusal(world.owner().watch_events(of_product(PRODUCT)).await);
    assert_eq!(refused.reason(), Reason::RateLimited);
    assert!(refused.message().contains("10") && refused.retry_after().is_some());
    watch(&world, owner(), of_product(OTHER_PRODUCT)).await;
    streams.pop();
    until(async || world.owner().watch_events(of_product(PRODUCT)).await.is_ok()).await;
    world.shut_down().await;
}

async fn who_goes_away_watches_no_longer(database: Database) {
    let world = World::on(database.clone(), lax(1));
    let stream = watch(&world, owner(), of_product(PRODUCT)).await;
    assert_eq!(count(&database, WATCHING).await, 1);
    drop(stream);
    until(async || count(&database, WATCHING).await == 0).await;
    // Kept for whoever asks again; after a minute it would not be.
    let missed = world.event("license.created");
    world.ingest(vec![missed.clone()]).await;
    let since = Some(Timestamp::default());
    let again = WatchEventsRequest { since, ..of_product(PRODUCT) };
    let mut stream = watch(&world, owner(), again).await;
    assert_eq!(next_event(&mut stream).await.id, missed.id);
    world.shut_down().await;
}

async fn a_reader_who_stops_reading_holds_up_nobody(database: Database) {
    let world = World::on(database.clone(), lax(1));
    let mut idle = watch(&world, owner(), of_product(PRODUCT)).await;
    let mut brisk = watch(&world, owner(), of_product(PRODUCT)).await;
    let mut ids = Vec::new();
    for _ in 0..20 {
        let events: Vec<Event> = (0..20).map(|_| world.event("license.created")).collect();
        ids.extend(events.iter().map(|event| event.id.clone()));
        world.ingest(events).await;
    }
    ids.sort_unstable();
    for stream in [&mut brisk, &mut idle] {
        // The idle one reads only when the other has read everything, and finds it all as well.
        let mut found = Vec::new();
        for _ in &ids {
            found.push(next_event(stream).await.id);
        }
        found.sort_unstable();
        assert_eq!(found, ids);
    }
    for _ in 0..40 {
        world.ingest(vec![world.event("license.created")]).await;
    }
    // Neither reads any more, and the process ends all the same.
    world.shut_down().await;
    until(async || count(&database, WATCHING).await == 0).await;
}

async fn a_stream_ends_well_with_the_process(database: Database) {
    let world = World::on(database.clone(), lax(1));
    let mut streams = Vec::new();
    for product in [PRODUCT, OTHER_PRODUCT, ""] {
        streams.push(watch(&world, owner(), of_product(product)).await);
    }
    world.shut_down().await;
    for stream in &mut streams {
        assert_eq!(within(stream.message()).await.unwrap(), None);
    }
    assert_eq!(count(&database, WATCHING).await, 0);
}

async fn a_watch_of_a_deleted_product_cannot_be_begun_again(database: Database) {
    let world = World::on(database.clone(), lax(1));
    let _stream = watch(&world, owner(), of_product(PRODUCT)).await;
    world.ingest(vec![world.event(paperkey_kit::events::PRODUCT_DELETED)]).await;
    assert_eq!(count(&database, WATCHING).await, 0);
    world.happens("license.created").await;
    assert_eq!(count(&database, "events").await, 0);
    world.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_arrives_in_another_process_is_shown_here() {
    let Some(db) = TestDb::postgres().await else { return };
    let database = db.migrated::<Migrator>().await;
    // A pool of its own each, as two processes have.
    let (one, other) = (World::on(database, lax(1)), World::on(db.open().await, lax(1)));
    let mut here = watch(&one, owner(), of_product(PRODUCT)).await;
    let mut there = watch(&other, owner(), of_product(PRODUCT)).await;
    let mut ids = Vec::new();
    for _ in 0..20 {
        let (some, more) = (one.event("license.created"), other.event("license.updated"));
        ids.extend([some.id.clone(), more.id.clone()]);
        // Each also comes a second time, where it was not first.
        tokio::join!(one.ingest(vec![some.clone()]), other.ingest(vec![more.clone()]));
        tokio::join!(one.ingest(vec![more]), other.ingest(vec![some]));
    }
    ids.sort_unstable();
    for stream in [&mut here, &mut there] {
        let mut found = Vec::new();
        for _ in &ids {
            found.push(next_event(stream).await.id);
        }
        found.sort_unstable();
        assert_eq!(found, ids);
    }
    let (first, second) = (one.database.clone(), other.database.clone());
    one.shut_down().await;
    other.shut_down().await;
    for mut stream in [here, there] {
        assert_eq!(within(stream.message()).await.unwrap(), None);
    }
    first.close().await;
    second.close().await;
    db.remove().await;
}
