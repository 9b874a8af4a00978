//! Who watches, what is kept for them, and what they are shown.

use std::{collections::HashSet, sync::Arc};

use paperkey_kit::{
    clock::{Clock, ManualClock},
    db::Database,
    secrets::Keyring,
    store_suite,
};
use paperkey_proto::{events::v1::Event, principal::v1::Mode};

use super::{
    super::{Failure, Store, watch::Watch},
    CREATED, DAY_MS, KEY_CREATED, START_MS, World, act, failed, number, outcome, team_event, tenant,
};
use crate::{
    domain::{
        Fault,
        delivery::DeliveryStatus,
        schedule::Schedule,
        watch::{MAX_WATCHES, ShownDelivery},
    },
    wake::Wake,
};

store_suite! {
    paperkey_migrations::webhook::Migrator;
    what_is_watched_is_kept_and_shown_though_nobody_subscribes,
    what_is_shown_is_what_is_sent_byte_for_byte,
    everybody_who_watches_is_shown_everything_once,
    nothing_from_before_is_shown_unless_it_is_asked_for,
    what_arrives_in_another_process_is_shown_though_its_clock_is_behind,
    what_comes_again_is_not_shown_again,
    a_flood_is_shown_whole_and_once,
    deliveries_are_shown_when_they_change,
    only_what_is_ones_own_is_shown,
    no_more_than_ten_watch_one_product_however_they_begin,
    who_watches_no_longer_makes_room,
    a_watch_ends_with_its_product_and_its_team,
    what_was_only_watched_goes_after_a_day,
}

const EVENTS: &str = "SELECT COUNT(*) AS number FROM events";
const WATCHERS: &str = "SELECT COUNT(*) AS number FROM watchers WHERE ended_at_ms IS NULL";

/// The store of another process, with a clock of its own.
fn other_process(database: Database, behind_ms: i64) -> (Store, ManualClock) {
    let (clock, hand) = Clock::manual(START_MS - behind_ms);
    let schedule = Arc::new(Schedule::new(vec![0]));
    (Store::new(database, &Keyring::for_tests(), clock, schedule, Arc::new(Wake::default())), hand)
}

async fn watch(world: &World, product: &str, since_ms: Option<i64>) -> Watch {
    world.tenant.watch(product, since_ms).await.unwrap()
}

/// The ids of all that there is to show.
async fn shown(watch: &mut Watch) -> Vec<String> {
    let mut ids = Vec::new();
    loop {
        let look = watch.look().await.unwrap();
        ids.extend(look.events.into_iter().map(|event| event.id));
        if !look.more {
            return ids;
        }
    }
}

fn ids(events: &[Event]) -> Vec<String> {
    let mut ids: Vec<String> = events.iter().map(|event| event.id.clone()).collect();
    ids.sort_unstable();
    ids
}

async fn what_is_watched_is_kept_and_shown_though_nobody_subscribes(database: Database) {
    let world = World::new(database, vec![0]);
    let before = world.events("prod_1", 1);
    world.store.ingest(before).await.unwrap();
    assert_eq!(number(&world.store, EVENTS).await, 0);
    let mut watching = watch(&world, "prod_1", None).await;
    assert_eq!(shown(&mut watching).await, [""; 0]);
    let events = world.events("prod_1", 3);
    world.store.ingest([events.clone(), world.events("prod_2", 3)].concat()).await.unwrap();
    assert_eq!(shown(&mut watching).await, ids(&events));
    assert_eq!(shown(&mut watching).await, [""; 0]);
    assert_eq!(number(&world.store, EVENTS).await, 3);
    assert_eq!(number(&world.store, "SELECT COUNT(*) AS number FROM deliveries").await, 0);
    assert!(watching.changes().await.unwrap().is_empty());
    // What no endpoint could have is none of theirs either.
    let [event] = world.events("prod_1", 1).try_into().unwrap();
    world.store.ingest(vec![Event { topic: "license.eaten".into(), ..event.clone() }]).await.unwrap();
    world.store.ingest(vec![Event { data_json: "{".into(), ..event }]).await.unwrap();
    assert_eq!(shown(&mut watching).await, [""; 0]);
    watching.registration().end().await.unwrap();
    // Whoever was cut off and asks again has missed nothing.
    let [event] = world.events("prod_1", 1).try_into().unwrap();
    let ended_ms = world.store.clock.now_ms();
    world.store.ingest(vec![event.clone()]).await.unwrap();
    let mut again = watch(&world, "prod_1", Some(ended_ms)).await;
    assert!(shown(&mut again).await.contains(&event.id));
    again.registration().end().await.unwrap();
    world.hand.advance_ms(60_000);
    world.store.ingest(world.events("prod_1", 1)).await.unwrap();
    assert_eq!(number(&world.store, EVENTS).await, 4);
}

async fn what_is_shown_is_what_is_sent_byte_for_byte(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.endpoint("prod_1").await;
    let mut watching = watch(&world, "prod_1", None).await;
    let [event] = world.events("prod_1", 1).try_into().unwrap();
    let event = Event { data_json: r#"{ "b":1,  "a":[1e2], "é":"\u00e9" }"#.into(), created_at_ms: 7, ..event };
    world.store.ingest(vec![event.clone()]).await.unwrap();
    let [shown] = watching.look().await.unwrap().events.try_into().unwrap();
    let [claimed] = world.claim(&endpoint, 1, "one").await.try_into().unwrap();
    assert_eq!((shown.id, shown.topic.as_str(), shown.created_at_ms), (event.id, CREATED, 7));
    assert_eq!(shown.payload.into_bytes(), claimed.body.unwrap());
}

async fn everybody_who_watches_is_shown_everything_once(database: Database) {
    let world = World::new(database, vec![0]);
    world.endpoint("prod_1").await;
    let mut one = watch(&world, "prod_1", None).await;
    let mut other = watch(&world, "prod_1", None).await;
    let mut expected = Vec::new();
    let (mut of_one, mut of_other) = (Vec::new(), Vec::new());
    for round in 0..40 {
        world.hand.advance_ms(900);
        let events = world.events("prod_1", 2);
        expected.extend(ids(&events));
        world.store.ingest(events).await.unwrap();
        of_one.extend(shown(&mut one).await);
        if round % 3 == 0 {
            of_other.extend(shown(&mut other).await);
        }
    }
    of_other.extend(shown(&mut other).await);
    for mut shown in [of_one, of_other] {
        shown.sort_unstable();
        assert_eq!(shown, expected);
    }
}

async fn nothing_from_before_is_shown_unless_it_is_asked_for(database: Database) {
    let world = World::new(database, vec![0]);
    world.endpoint("prod_1").await;
    let mut batches = Vec::new();
    // One and a half hours ago, half an hour ago, just now, and some that are from the future by our clock.
    for wait_ms in [0, 3_600_000, 1_798_000] {
        world.hand.advance_ms(wait_ms);
        let events = world.events("prod_1", 30);
        batches.push(ids(&events));
        world.store.ingest(events).await.unwrap();
    }
    let (ahead, _) = other_process(world.store.database.clone(), -5_405_000);
    ahead.ingest(world.events("prod_1", 2)).await.unwrap();
    world.hand.advance_ms(2_000);
    let now_ms = world.clock.now_ms();
    for since_ms in [None, Some(now_ms + 1), Some(i64::MAX)] {
        assert_eq!(shown(&mut watch(&world, "prod_1", since_ms).await).await, [""; 0], "{since_ms:?}");
    }
    let mut future = HashSet::new();
    for (since_ms, expected) in [
        // What was there a little before is shown as well: some of it may have been late.
        (now_ms, batches[2].clone()),
        (now_ms - 1_700_000, batches[2].clone()),
        (now_ms - 1_779_999, batches[2].clone()),
        (now_ms - 1_800_000, [batches[1].clone(), batches[2].clone()].concat()),
        (0, [batches[1].clone(), batches[2].clone()].concat()),
    ] {
        let mut all = shown(&mut watch(&world, "prod_1", Some(since_ms)).await).await;
        let rest = all.split_off(expected.len());
        all.sort_unstable();
        let mut expected = expected;
        expected.sort_unstable();
        assert_eq!(all, expected, "since {since_ms}");
        assert_eq!(rest.len(), 2);
        future.extend(rest);
    }
    assert_eq!(future.len(), 2);
}

async fn what_arrives_in_another_process_is_shown_though_its_clock_is_behind(database: Database) {
    let world = World::new(database.clone(), vec![0]);
    let (behind, hand) = other_process(database, 8_000);
    // What is there already is not news, whoever wrote it.
    world.endpoint("prod_1").await;
    behind.ingest(world.events("prod_1", 5)).await.unwrap();
    let mut watching = watch(&world, "prod_1", None).await;
    let (early, late) = (world.events("prod_1", 2), world.events("prod_1", 2));
    world.store.ingest(early.clone()).await.unwrap();
    assert_eq!(shown(&mut watching).await, ids(&early));
    behind.ingest(late.clone()).await.unwrap();
    assert_eq!(shown(&mut watching).await, ids(&late));
    for _ in 0..30 {
        world.hand.advance_ms(1_000);
        hand.advance_ms(1_000);
        let events = world.events("prod_1", 2);
        world.store.ingest(events[..1].to_vec()).await.unwrap();
        behind.ingest(events[1..].to_vec()).await.unwrap();
        let mut found = shown(&mut watching).await;
        found.sort_unstable();
        assert_eq!(found, ids(&events));
    }
}

async fn what_comes_again_is_not_shown_again(database: Database) {
    let world = World::new(database.clone(), vec![0]);
    let (other, _) = other_process(database, 0);
    let mut watching = watch(&world, "prod_1", None).await;
    let events = world.events("prod_1", 2);
    for store in [&world.store, &other, &world.store] {
        store.ingest([events.clone(), events.clone()].concat()).await.unwrap();
    }
    assert_eq!(shown(&mut watching).await, ids(&events));
    world.hand.advance_ms(60_000);
    other.ingest(events).await.unwrap();
    assert_eq!(shown(&mut watching).await, [""; 0]);
}

async fn a_flood_is_shown_whole_and_once(database: Database) {
    let world = World::new(database, vec![0]);
    let mut watching = watch(&world, "prod_1", None).await;
    let mut expected = HashSet::new();
    let mut found = Vec::new();
    // More within the last seconds than is remembered of them.
    for round in 0..10 {
        let events = world.events("prod_1", 500);
        expected.extend(ids(&events));
        world.store.ingest(events).await.unwrap();
        world.hand.advance_ms(100);
        if round % 4 == 0 {
            found.extend(watching.look().await.unwrap().events.into_iter().map(|event| event.id));
        }
    }
    loop {
        let look = watching.look().await.unwrap();
        assert!(look.events.len() <= 20);
        found.extend(look.events.into_iter().map(|event| event.id));
        if !look.more {
            break;
        }
    }
    found.extend(shown(&mut watching).await);
    assert_eq!((found.len(), found.into_iter().collect::<HashSet<_>>()), (5_000, expected));
}

async fn deliveries_are_shown_when_they_change(database: Database) {
    let world = World::new(database, vec![0, 60]);
    let (endpoint, other) = (world.endpoint("prod_1").await, world.endpoint("prod_1").await);
    let mut watching = watch(&world, "prod_1", None).await;
    world.store.ingest(world.events("prod_1", 1)).await.unwrap();
    let [event] = watching.look().await.unwrap().events.try_into().unwrap();
    let new = watching.changes().await.unwrap();
    let to: HashSet<&str> = new.iter().map(|one| one.endpoint_id.as_str()).collect();
    assert_eq!(to, HashSet::from([endpoint.id.as_str(), other.id.as_str()]));
    assert!(new.iter().all(|one| one.delivery.event_id == event.id && one.delivery.attempts == 0));
    assert!(watching.changes().await.unwrap().is_empty());

    let state = |one: &ShownDelivery| (one.endpoint_id.clone(), one.delivery.status, one.delivery.attempts);
    let [claimed] = world.claim(&endpoint, 1, "one").await.try_into().unwrap();
    assert!(watching.changes().await.unwrap().is_empty());
    world.store.record(vec![failed(&claimed)], "one".into()).await.unwrap();
    let [changed] = watching.changes().await.unwrap().try_into().unwrap();
    assert_eq!(state(&changed), (endpoint.id.clone(), DeliveryStatus::Pending, 1));
    assert_eq!(changed.delivery.next_attempt_at_ms, Some(START_MS + 60_000));
    for receiver in [&endpoint, &other] {
        world.hand.advance_ms(60_000);
        let [claimed] = world.claim(receiver, 1, "one").await.try_into().unwrap();
        world.store.record(vec![outcome(&claimed, None)], "one".into()).await.unwrap();
        let [changed] = watching.changes().await.unwrap().try_into().unwrap();
        assert_eq!(state(&changed), (receiver.id.clone(), DeliveryStatus::Succeeded, changed.delivery.attempts));
    }
    // All are finished, and one is replayed: that is seen too, if not at once.
    world.tenant.replay("prod_1", &endpoint.id, &claimed.id, act()).await.unwrap();
    let mut seen = Vec::new();
    for _ in 0..8 {
        seen.extend(watching.changes().await.unwrap());
    }
    let [replayed] = seen.try_into().unwrap();
    assert_eq!(state(&replayed), (endpoint.id.clone(), DeliveryStatus::Pending, 2));
    // What goes with its endpoint is no longer spoken of.
    world.tenant.delete_endpoint("prod_1", &endpoint.id, act()).await.unwrap();
    world.tenant.delete_endpoint("prod_1", &other.id, act()).await.unwrap();
    for _ in 0..8 {
        assert!(watching.changes().await.unwrap().is_empty());
    }
}

async fn only_what_is_ones_own_is_shown(database: Database) {
    let world = World::new(database, vec![0]);
    let mut of_product = watch(&world, "prod_1", None).await;
    let mut of_team = watch(&world, "", None).await;
    let mut of_test = world.store.of(tenant("team_1", Mode::Test)).watch("prod_1", None).await.unwrap();
    let mut of_stranger = world.store.of(tenant("team_2", Mode::Live)).watch("prod_1", None).await.unwrap();
    let product = world.events("prod_1", 1);
    let team = team_event(&world, KEY_CREATED, "team_1", Mode::Live);
    let [event] = world.events("prod_1", 1).try_into().unwrap();
    let tested = Event { mode: Mode::Test.into(), ..event.clone() };
    let strange = Event { team_id: "team_2".into(), id: format!("{}x", event.id), ..event };
    let elsewhere = team_event(&world, KEY_CREATED, "team_3", Mode::Live);
    let all = [product.clone(), vec![team.clone(), tested.clone(), strange.clone(), elsewhere]].concat();
    world.store.ingest(all).await.unwrap();
    for (watching, own) in
        [(&mut of_product, &product[0]), (&mut of_team, &team), (&mut of_test, &tested), (&mut of_stranger, &strange)]
    {
        assert_eq!(shown(watching).await, [own.id.as_str()]);
    }
    assert_eq!(number(&world.store, EVENTS).await, 4);
    let refused = world.tenant.watch("' OR 1=1 --", None).await;
    assert!(matches!(refused, Err(Failure::Fault(Fault::NoSuchProduct))));
}

async fn no_more_than_ten_watch_one_product_however_they_begin(database: Database) {
    let world = Arc::new(World::new(database, vec![0]));
    let tasks: Vec<_> = (0..25)
        .map(|_| {
            let tenant = world.tenant.clone();
            tokio::spawn(async move { tenant.watch("prod_1", None).await })
        })
        .collect();
    let mut begun = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(_) => begun += 1,
            Err(Failure::Fault(Fault::TooManyWatches)) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(begun, MAX_WATCHES);
    // Others are not concerned, until the team as a whole watches too much.
    world.store.of(tenant("team_1", Mode::Test)).watch("prod_1", None).await.unwrap();
    world.store.of(tenant("team_2", Mode::Live)).watch("prod_1", None).await.unwrap();
    for product in ["", "prod_2", "prod_3", "prod_4"] {
        for _ in 0..10 {
            watch(&world, product, None).await;
        }
    }
    let refused = world.tenant.watch("prod_5", None).await;
    assert!(matches!(refused, Err(Failure::Fault(Fault::TooManyWatches))));
}

async fn who_watches_no_longer_makes_room(database: Database) {
    let world = World::new(database, vec![0]);
    let mut all = Vec::new();
    for _ in 0..10 {
        all.push(watch(&world, "prod_1", None).await);
    }
    all[0].registration().end().await.unwrap();
    watch(&world, "prod_1", None).await;
    // One goes on, and the others were cut off without a word.
    world.hand.advance_ms(59_999);
    assert!(all[1].registration().renew().await.unwrap());
    world.hand.advance_ms(1);
    for _ in 0..9 {
        watch(&world, "prod_1", None).await;
    }
    let refused = world.tenant.watch("prod_1", None).await;
    assert!(matches!(refused, Err(Failure::Fault(Fault::TooManyWatches))));
    assert!(!all[0].registration().renew().await.unwrap());
    assert!(!all[2].registration().renew().await.unwrap());
    world.store.forget_watchers().await.unwrap();
    assert_eq!(number(&world.store, WATCHERS).await, 10);
    // Nobody watches any more, and nothing is kept.
    world.hand.advance_ms(60_000);
    world.store.ingest(world.events("prod_1", 1)).await.unwrap();
    assert_eq!(number(&world.store, EVENTS).await, 0);
    world.store.forget_watchers().await.unwrap();
    assert_eq!(number(&world.store, WATCHERS).await, 0);
}

async fn a_watch_ends_with_its_product_and_its_team(database: Database) {
    let world = World::new(database, vec![0]);
    let (of_product, of_team) = (watch(&world, "prod_1", None).await, watch(&world, "", None).await);
    let mut end = world.events("prod_1", 1);
    paperkey_kit::events::PRODUCT_DELETED.clone_into(&mut end[0].topic);
    world.store.ingest(end).await.unwrap();
    assert!(!of_product.registration().renew().await.unwrap());
    assert!(of_team.registration().renew().await.unwrap());
    world.store.ingest(vec![team_event(&world, "team.deleted", "team_1", Mode::Live)]).await.unwrap();
    assert!(!of_team.registration().renew().await.unwrap());
    assert_eq!(number(&world.store, WATCHERS).await, 0);
}

async fn what_was_only_watched_goes_after_a_day(database: Database) {
    let world = World::new(database, vec![0]);
    let mut watching = watch(&world, "prod_1", None).await;
    let events = world.events("prod_1", 3);
    world.store.ingest(events.clone()).await.unwrap();
    world.store.remove_events(String::new(), world.clock.now_ms() - DAY_MS).await.unwrap();
    assert_eq!(shown(&mut watching).await, ids(&events));
    world.hand.advance_ms(DAY_MS + 1);
    world.store.remove_events(String::new(), world.clock.now_ms() - DAY_MS).await.unwrap();
    assert_eq!(number(&world.store, EVENTS).await, 0);
}
