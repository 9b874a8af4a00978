//! What is sent again, what is tried out, and secrets that are replaced.

use std::sync::Arc;

use paperkey_kit::{
    db::{Database, DbError},
    store_suite,
};
use sea_orm::ConnectionTrait as _;

use super::{
    super::{Act, Failure, Store, sql},
    CREATED, DAY_MS, START_MS, World, act, everything, failed, number, outcome, tenant,
};
use crate::domain::{
    Fault,
    attempt::AttemptFault,
    delivery::{Delivery, DeliveryStatus},
    endpoint::{Changes, Endpoint, PREVIOUS_SECRET_MS, Status},
};
use paperkey_proto::principal::v1::Mode;

store_suite! {
    paperkey_migrations::webhook::Migrator;
    a_delivery_of_any_status_is_sent_again_under_its_id,
    what_is_under_way_is_left_alone,
    a_claim_that_has_run_out_holds_up_nothing_and_its_outcome_comes_too_late,
    a_replay_has_a_schedule_of_its_own,
    a_replay_that_fails_pauses_nothing_and_one_that_succeeds_ends_a_row_of_failures,
    a_replay_that_is_not_wanted_at_all_pauses,
    many_replays_at_once_are_one,
    a_replay_for_a_paused_endpoint_waits_until_it_is_resumed,
    an_old_delivery_that_is_replayed_is_held_from_then_on,
    an_event_stays_as_long_as_it_may_be_replayed,
    a_replay_and_the_housekeeping_never_meet_halfway,
    everything_that_has_failed_is_sent_again_however_much_it_is,
    only_what_has_failed_since_then_is_sent_again,
    what_fails_anew_is_not_sent_again_by_the_same_recovery,
    two_recoveries_at_once_send_everything_once,
    what_is_recovered_pauses_nothing_though_it_was_never_tried,
    a_test_goes_to_its_endpoint_and_to_no_other,
    nothing_is_tried_out_on_a_paused_endpoint,
    a_secret_that_is_replaced_is_kept_for_a_day,
    what_is_not_there_is_neither_sent_again_nor_changed,
}

impl World {
    async fn replay(&self, endpoint: &Endpoint, id: &str) -> Delivery {
        self.tenant.replay(&endpoint.product_id, &endpoint.id, id, act()).await.unwrap()
    }

    async fn recover(&self, endpoint: &Endpoint, since_ms: i64) -> i64 {
        self.tenant.recover(&endpoint.product_id, &endpoint.id, since_ms, act()).await.unwrap()
    }

    async fn delivery(&self, endpoint: &Endpoint, id: &str) -> Delivery {
        self.tenant.delivery(&endpoint.product_id, &endpoint.id, id).await.unwrap().0
    }

    /// Takes everything that is due for an endpoint, and lets it end like that.
    async fn send(&self, endpoint: &Endpoint, fault: Option<AttemptFault>) -> usize {
        let mut sent = 0;
        loop {
            let claimed = self.claim(endpoint, 60, "one").await;
            if claimed.is_empty() {
                return sent;
            }
            sent += claimed.len();
            let outcomes = claimed.iter().map(|one| outcome(one, fault)).collect();
            self.store.record(outcomes, "one".into()).await.unwrap();
        }
    }

    /// An endpoint of which so many deliveries have failed for good, without being paused by them.
    async fn failures(&self, count: usize) -> Endpoint {
        let endpoint = self.queue(count).await;
        let text = "UPDATE deliveries SET status = 'failed', error = 'http_status', attempts = 1, response_status = 500, \
                    finished_at_ms = $1, next_attempt_at_ms = NULL WHERE endpoint_id = $2";
        let (now_ms, id) = (self.clock.now_ms(), endpoint.id.clone());
        let job = move |tx: paperkey_kit::db::Tx| async move {
            tx.execute_raw(sql(tx.get_database_backend(), text, vec![now_ms.into(), id.into()])).await?;
            Ok::<_, DbError>(())
        };
        self.store.database.write(job).await.unwrap();
        endpoint
    }
}

const PENDING: &str = "SELECT COUNT(*) AS number FROM deliveries WHERE status = 'pending'";

async fn a_delivery_of_any_status_is_sent_again_under_its_id(database: Database) {
    let world = World::new(database, vec![0]);
    for fault in [None, Some(AttemptFault::HttpStatus)] {
        let endpoint = world.queue(1).await;
        let [first] = world.claim(&endpoint, 1, "one").await.try_into().unwrap();
        world.store.record(vec![outcome(&first, fault)], "one".into()).await.unwrap();
        world.hand.advance_ms(1_000);
        let now_ms = world.clock.now_ms();
        let after = world.replay(&endpoint, &first.id).await;
        assert_eq!((after.id.as_str(), after.status, after.attempts), (first.id.as_str(), DeliveryStatus::Pending, 1));
        assert_eq!(after.next_attempt_at_ms, Some(now_ms));
        // What the last attempt has shown stays.
        assert_eq!(after.error.as_deref(), fault.map(AttemptFault::word));
        let [second] = world.claim(&endpoint, 5, "one").await.try_into().unwrap();
        assert_eq!((&second.id, second.attempts, second.replayed_after), (&first.id, 1, Some(1)));
        assert_eq!(second.body, first.body);
        world.store.record(vec![outcome(&second, None)], "one".into()).await.unwrap();
        let (after, attempts) = world.tenant.delivery(&endpoint.product_id, &endpoint.id, &first.id).await.unwrap();
        assert_eq!((after.status, after.attempts), (DeliveryStatus::Succeeded, 2));
        assert_eq!(attempts.iter().map(|attempt| attempt.number).collect::<Vec<_>>(), [1, 2]);
    }
    // One that waits for its next attempt is due at once.
    let world = World::new(world.store.database.clone(), vec![0, 3_600]);
    let endpoint = world.queue(1).await;
    let [first] = world.claim(&endpoint, 1, "one").await.try_into().unwrap();
    world.store.record(vec![failed(&first)], "one".into()).await.unwrap();
    assert!(world.claim(&endpoint, 1, "one").await.is_empty());
    world.replay(&endpoint, &first.id).await;
    let [again] = world.claim(&endpoint, 1, "one").await.try_into().unwrap();
    assert_eq!((again.id, again.attempts), (first.id, 1));
}

async fn what_is_under_way_is_left_alone(database: Database) {
    let world = World::new(database, vec![0, 60]);
    let endpoint = world.queue(1).await;
    let [claimed] = world.claim(&endpoint, 1, "one").await.try_into().unwrap();
    let before = world.delivery(&endpoint, &claimed.id).await;
    assert_eq!(world.replay(&endpoint, &claimed.id).await, before);
    assert!(world.claim(&endpoint, 1, "other").await.is_empty());
    world.store.record(vec![failed(&claimed)], "one".into()).await.unwrap();
    let after = world.delivery(&endpoint, &claimed.id).await;
    assert_eq!((after.attempts, after.next_attempt_at_ms), (1, Some(START_MS + 60_000)));
    assert_eq!(world.reload(&endpoint).await.consecutive_failures, 1);
}

async fn a_claim_that_has_run_out_holds_up_nothing_and_its_outcome_comes_too_late(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.queue(1).await;
    let [slow] = world.claim(&endpoint, 1, "slow").await.try_into().unwrap();
    world.hand.advance_ms(30_000);
    world.replay(&endpoint, &slow.id).await;
    world.store.record(vec![outcome(&slow, None)], "slow".into()).await.unwrap();
    assert_eq!(world.delivery(&endpoint, &slow.id).await.attempts, 0);
    let [claimed] = world.claim(&endpoint, 1, "other").await.try_into().unwrap();
    world.store.record(vec![outcome(&claimed, None)], "other".into()).await.unwrap();
    let (after, attempts) = world.tenant.delivery(&endpoint.product_id, &endpoint.id, &slow.id).await.unwrap();
    assert_eq!((after.attempts, attempts.len()), (1, 1));
}

async fn a_replay_has_a_schedule_of_its_own(database: Database) {
    let world = World::new(database, vec![0, 5, 300]);
    let endpoint = world.queue(1).await;
    let mut id = String::new();
    // Twice through the whole schedule: each time the same waits, and then the end.
    for round in 0..2_i64 {
        for (made, wait_ms) in [(1, Some(5_000)), (2, Some(300_000)), (3, None)] {
            let [claimed] = world.claim(&endpoint, 1, "one").await.try_into().unwrap();
            id.clone_from(&claimed.id);
            world.store.record(vec![failed(&claimed)], "one".into()).await.unwrap();
            let after = world.delivery(&endpoint, &id).await;
            assert_eq!(after.attempts, round * 3 + made);
            assert_eq!(after.next_attempt_at_ms, wait_ms.map(|wait_ms| world.clock.now_ms() + wait_ms));
            world.hand.advance_ms(wait_ms.unwrap_or(0));
        }
        assert_eq!(world.delivery(&endpoint, &id).await.status, DeliveryStatus::Failed);
        world.replay(&endpoint, &id).await;
    }
    // In the middle of it, it begins anew as well.
    let [claimed] = world.claim(&endpoint, 1, "one").await.try_into().unwrap();
    world.store.record(vec![failed(&claimed)], "one".into()).await.unwrap();
    world.replay(&endpoint, &id).await;
    let [claimed] = world.claim(&endpoint, 1, "one").await.try_into().unwrap();
    world.store.record(vec![failed(&claimed)], "one".into()).await.unwrap();
    let after = world.delivery(&endpoint, &id).await;
    assert_eq!((after.attempts, after.next_attempt_at_ms), (8, Some(world.clock.now_ms() + 5_000)));
}

async fn a_replay_that_fails_pauses_nothing_and_one_that_succeeds_ends_a_row_of_failures(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.queue(9).await;
    world.send(&endpoint, Some(AttemptFault::HttpStatus)).await;
    assert_eq!(world.reload(&endpoint).await.consecutive_failures, 9);
    assert_eq!(world.recover(&endpoint, 0).await, 9);
    assert_eq!(world.send(&endpoint, Some(AttemptFault::Timeout)).await, 9);
    let after = world.reload(&endpoint).await;
    assert_eq!((after.status, after.consecutive_failures), (Status::Active, 9));
    assert_eq!(world.recover(&endpoint, 0).await, 9);
    assert_eq!(world.send(&endpoint, None).await, 9);
    assert_eq!(world.reload(&endpoint).await.consecutive_failures, 0);
    // What is new counts as ever.
    world.store.ingest(world.events(&endpoint.product_id, 1)).await.unwrap();
    world.send(&endpoint, Some(AttemptFault::HttpStatus)).await;
    assert_eq!(world.reload(&endpoint).await.consecutive_failures, 1);
}

async fn a_replay_that_is_not_wanted_at_all_pauses(database: Database) {
    let world = World::new(database, vec![0, 60]);
    let endpoint = world.failures(1).await;
    world.recover(&endpoint, 0).await;
    let [claimed] = world.claim(&endpoint, 1, "one").await.try_into().unwrap();
    let mut gone = failed(&claimed);
    gone.attempt.response_status = Some(410);
    assert_eq!(world.store.record(vec![gone], "one".into()).await.unwrap().paused.len(), 1);
    assert_eq!(world.reload(&endpoint).await.status, Status::Paused);
}

async fn many_replays_at_once_are_one(database: Database) {
    let world = Arc::new(World::new(database, vec![0]));
    let endpoint = Arc::new(world.failures(1).await);
    let (listed, _) = world.tenant.deliveries(&endpoint.product_id, &endpoint.id, everything()).await.unwrap();
    let id = listed[0].id.clone();
    let tasks: Vec<_> = (0..10)
        .map(|round| {
            let (world, endpoint, id) = (Arc::clone(&world), Arc::clone(&endpoint), id.clone());
            tokio::spawn(async move {
                world.replay(&endpoint, &id).await;
                let claimed = world.claim(&endpoint, 5, &format!("holder {round}")).await;
                let outcomes: Vec<_> = claimed.iter().map(|one| outcome(one, None)).collect();
                let sent = outcomes.len();
                if sent > 0 {
                    world.store.record(outcomes, format!("holder {round}")).await.unwrap();
                }
                sent
            })
        })
        .collect();
    let mut sent = 0;
    for task in tasks {
        sent += task.await.unwrap();
    }
    // Each time that it was sent is an attempt with a number of its own.
    let (after, attempts) = world.tenant.delivery(&endpoint.product_id, &endpoint.id, &id).await.unwrap();
    let numbers: Vec<i64> = attempts.iter().map(|attempt| attempt.number).collect();
    assert_eq!(after.attempts, 1 + i64::try_from(sent).unwrap());
    assert_eq!(numbers, (2..=after.attempts).collect::<Vec<_>>());
}

async fn a_replay_for_a_paused_endpoint_waits_until_it_is_resumed(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.failures(1).await;
    world.set(&endpoint, Status::Paused).await;
    assert_eq!(world.recover(&endpoint, 0).await, 1);
    assert!(world.claim(&endpoint, 5, "one").await.is_empty());
    world.set(&endpoint, Status::Active).await;
    assert_eq!(world.claim(&endpoint, 5, "one").await.len(), 1);
}

async fn an_old_delivery_that_is_replayed_is_held_from_then_on(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.queue(1).await;
    world.set(&endpoint, Status::Paused).await;
    world.hand.advance_ms(31 * DAY_MS);
    world.store.fail_held(world.clock.now_ms() - 30 * DAY_MS).await.unwrap();
    assert_eq!(number(&world.store, PENDING).await, 0);
    let (listed, _) = world.tenant.deliveries(&endpoint.product_id, &endpoint.id, everything()).await.unwrap();
    assert_eq!(listed[0].error.as_deref(), Some("held_too_long"));
    // That is no attempt, and so not what the last one has shown.
    assert_eq!(world.replay(&endpoint, &listed[0].id).await.error, None);
    world.hand.advance_ms(29 * DAY_MS);
    world.store.fail_held(world.clock.now_ms() - 30 * DAY_MS).await.unwrap();
    assert_eq!(number(&world.store, PENDING).await, 1);
    world.hand.advance_ms(2 * DAY_MS);
    world.store.fail_held(world.clock.now_ms() - 30 * DAY_MS).await.unwrap();
    assert_eq!(number(&world.store, PENDING).await, 0);
}

/// Everything that the housekeeping removes.
async fn keep_house(store: &Store, now_ms: i64) {
    while store.remove_finished(now_ms - 30 * DAY_MS).await.unwrap() {}
    let mut after = Some(String::new());
    while let Some(id) = after {
        after = store.remove_events(id, now_ms - DAY_MS).await.unwrap();
    }
}

async fn an_event_stays_as_long_as_it_may_be_replayed(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.failures(1).await;
    world.hand.advance_ms(29 * DAY_MS);
    keep_house(&world.store, world.clock.now_ms()).await;
    assert_eq!(world.recover(&endpoint, 0).await, 1);
    // It is old by now, and yet not finished.
    world.hand.advance_ms(29 * DAY_MS);
    keep_house(&world.store, world.clock.now_ms()).await;
    let [claimed] = world.claim(&endpoint, 1, "one").await.try_into().unwrap();
    assert!(claimed.body.is_some());
    world.store.record(vec![outcome(&claimed, None)], "one".into()).await.unwrap();
    world.hand.advance_ms(31 * DAY_MS);
    keep_house(&world.store, world.clock.now_ms()).await;
    let gone = world.tenant.replay(&endpoint.product_id, &endpoint.id, &claimed.id, act()).await;
    assert!(matches!(gone, Err(Failure::Fault(Fault::NoSuchDelivery))), "{gone:?}");
    for text in [
        "SELECT COUNT(*) AS number FROM deliveries",
        "SELECT COUNT(*) AS number FROM attempts",
        "SELECT COUNT(*) AS number FROM events",
    ] {
        assert_eq!(number(&world.store, text).await, 0, "{text}");
    }
}

async fn a_replay_and_the_housekeeping_never_meet_halfway(database: Database) {
    let world = Arc::new(World::new(database, vec![0]));
    for _ in 0..5 {
        let endpoint = Arc::new(world.failures(50).await);
        world.hand.advance_ms(31 * DAY_MS);
        let recovering = {
            let (world, endpoint) = (Arc::clone(&world), Arc::clone(&endpoint));
            tokio::spawn(async move { world.recover(&endpoint, 0).await })
        };
        keep_house(&world.store, world.clock.now_ms()).await;
        let recovered = usize::try_from(recovering.await.unwrap()).unwrap();
        // What was promised to be sent again is there, with its body.
        let claimed = world.claim(&endpoint, 100, "one").await;
        assert_eq!(claimed.len(), recovered);
        assert!(claimed.iter().all(|claimed| claimed.body.is_some()));
    }
}

async fn everything_that_has_failed_is_sent_again_however_much_it_is(database: Database) {
    let world = World::new(database, vec![0]);
    let (endpoint, other) = (world.failures(1_201).await, world.failures(2).await);
    assert_eq!(world.recover(&endpoint, START_MS).await, 1_201);
    assert_eq!(number(&world.store, PENDING).await, 1_201);
    assert_eq!(world.recover(&endpoint, START_MS).await, 0);
    assert_eq!(world.send(&endpoint, None).await, 1_201);
    assert_eq!(world.recover(&endpoint, START_MS).await, 0);
    assert!(world.claim(&other, 5, "one").await.is_empty());
}

async fn only_what_has_failed_since_then_is_sent_again(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.queue(1).await;
    world.send(&endpoint, Some(AttemptFault::HttpStatus)).await;
    world.hand.advance_ms(1_000);
    world.store.ingest(world.events(&endpoint.product_id, 2)).await.unwrap();
    world.send(&endpoint, Some(AttemptFault::HttpStatus)).await;
    world.store.ingest(world.events(&endpoint.product_id, 1)).await.unwrap();
    world.send(&endpoint, None).await;
    assert_eq!(world.recover(&endpoint, START_MS + 1_001).await, 0);
    assert_eq!(world.recover(&endpoint, i64::MAX).await, 0);
    assert_eq!(world.recover(&endpoint, START_MS + 1_000).await, 2);
    assert_eq!(world.recover(&endpoint, i64::MIN).await, 1);
}

async fn what_fails_anew_is_not_sent_again_by_the_same_recovery(database: Database) {
    let world = Arc::new(World::new(database, vec![0]));
    let endpoint = Arc::new(world.failures(700).await);
    world.hand.advance_ms(1);
    let sending = {
        let (world, endpoint) = (Arc::clone(&world), Arc::clone(&endpoint));
        tokio::spawn(async move {
            loop {
                // Whatever is sent fails again at once, a little later each time.
                world.hand.advance_ms(1);
                world.send(&endpoint, Some(AttemptFault::HttpStatus)).await;
                tokio::task::yield_now().await;
            }
        })
    };
    let recovered = world.recover(&endpoint, 0).await;
    sending.abort();
    assert_eq!(recovered, 700);
}

async fn two_recoveries_at_once_send_everything_once(database: Database) {
    let world = Arc::new(World::new(database, vec![0]));
    let endpoint = Arc::new(world.failures(1_100).await);
    let tasks: Vec<_> = (0..3)
        .map(|_| {
            let (world, endpoint) = (Arc::clone(&world), Arc::clone(&endpoint));
            tokio::spawn(async move { world.recover(&endpoint, 0).await })
        })
        .collect();
    let mut recovered = 0;
    for task in tasks {
        recovered += task.await.unwrap();
    }
    assert_eq!(recovered, 1_100);
    assert_eq!(number(&world.store, PENDING).await, 1_100);
}

async fn what_is_recovered_pauses_nothing_though_it_was_never_tried(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.queue(15).await;
    world.set(&endpoint, Status::Paused).await;
    world.hand.advance_ms(31 * DAY_MS);
    world.store.fail_held(world.clock.now_ms() - 30 * DAY_MS).await.unwrap();
    world.set(&endpoint, Status::Active).await;
    assert_eq!(world.recover(&endpoint, 0).await, 15);
    assert_eq!(world.send(&endpoint, Some(AttemptFault::HttpStatus)).await, 15);
    let after = world.reload(&endpoint).await;
    assert_eq!((after.status, after.consecutive_failures), (Status::Active, 0));
}

async fn a_test_goes_to_its_endpoint_and_to_no_other(database: Database) {
    let world = World::new(database, vec![0]);
    let (url, events) = ("https://example.com/".to_owned(), vec!["webhook.test".to_owned()]);
    let (subscribed, _) = world.tenant.create_endpoint("prod_1".into(), url, events, act()).await.unwrap();
    let endpoint = world.endpoint("prod_1").await;
    assert_eq!(endpoint.events, [CREATED]);
    let made = world.tenant.test_endpoint("prod_1", &endpoint.id, act()).await.unwrap();
    assert_eq!((made.topic.as_str(), made.status, made.attempts), ("webhook.test", DeliveryStatus::Pending, 0));
    assert_eq!(world.delivery(&endpoint, &made.id).await, made);
    let [claimed] = world.claim(&endpoint, 5, "one").await.try_into().unwrap();
    let body: serde_json::Value = serde_json::from_slice(&claimed.body.unwrap()).unwrap();
    assert_eq!((&body["event"], &body["data"]["webhookId"]), (&"webhook.test".into(), &endpoint.id.as_str().into()));
    assert_eq!(body["id"], made.event_id.as_str());
    assert!(body["data"]["message"].is_string());
    assert!(world.claim(&subscribed, 5, "one").await.is_empty());
    // It is kept like any other, and may be replayed.
    let again = world.tenant.test_endpoint("prod_1", &endpoint.id, act()).await.unwrap();
    assert_ne!((again.id, again.event_id), (made.id, made.event_id));
}

async fn nothing_is_tried_out_on_a_paused_endpoint(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.endpoint("prod_1").await;
    world.set(&endpoint, Status::Paused).await;
    let refused = world.tenant.test_endpoint("prod_1", &endpoint.id, act()).await;
    assert!(matches!(refused, Err(Failure::Fault(Fault::WebhookPaused))), "{refused:?}");
    assert_eq!(number(&world.store, "SELECT COUNT(*) AS number FROM events").await, 0);
}

/// The secrets of an endpoint as they are kept: the present one, and the one before.
async fn secrets(world: &World, endpoint: &Endpoint) -> (String, Option<String>) {
    let id = endpoint.id.clone();
    let job = move |reader: paperkey_kit::db::Reader| async move {
        let text = "SELECT secret_sealed, previous_secret_sealed FROM endpoints WHERE id = $1";
        let row = reader.query_one_raw(sql(reader.get_database_backend(), text, vec![id.into()])).await?;
        let row = row.expect("it is there");
        Ok::<_, DbError>((
            row.try_get::<Vec<u8>>("", "secret_sealed")?,
            row.try_get::<Option<Vec<u8>>>("", "previous_secret_sealed")?,
        ))
    };
    let (present, previous) = world.store.database.read(job).await.unwrap();
    let open = |sealed: Vec<u8>| String::from_utf8(world.store.secrets.open(&endpoint.id, &sealed).unwrap()).unwrap();
    (open(present), previous.map(open))
}

async fn a_secret_that_is_replaced_is_kept_for_a_day(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.endpoint("prod_1").await;
    assert_eq!(endpoint.previous_secret_until_ms, None);
    let (first, none) = secrets(&world, &endpoint).await;
    assert_eq!(none, None);
    let rotate = async || world.tenant.rotate_secret("prod_1", &endpoint.id, act()).await.unwrap();
    let (after, second) = rotate().await;
    assert_eq!(after.previous_secret_until_ms, Some(START_MS + PREVIOUS_SECRET_MS));
    assert_eq!(world.reload(&endpoint).await, after);
    assert_eq!(secrets(&world, &endpoint).await, (second.expose().to_owned(), Some(first)));
    world.hand.advance_ms(1_000);
    let (after, third) = rotate().await;
    assert_eq!(after.previous_secret_until_ms, Some(START_MS + 1_000 + PREVIOUS_SECRET_MS));
    let kept = (third.expose().to_owned(), Some(second.expose().to_owned()));
    assert_eq!(secrets(&world, &endpoint).await, kept);
    // Another change leaves both alone.
    world.set(&endpoint, Status::Paused).await;
    assert!(!world.store.forget_secrets().await.unwrap());
    assert_eq!(secrets(&world, &endpoint).await, kept);

    world.hand.advance_ms(PREVIOUS_SECRET_MS);
    assert_eq!(world.reload(&endpoint).await.previous_secret_until_ms, None);
    assert!(!world.store.forget_secrets().await.unwrap());
    assert_eq!(secrets(&world, &endpoint).await, (third.expose().to_owned(), None));
    let (after, _) = rotate().await;
    assert_eq!(after.previous_secret_until_ms, Some(world.clock.now_ms() + PREVIOUS_SECRET_MS));
}

async fn what_is_not_there_is_neither_sent_again_nor_changed(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.failures(1).await;
    let (product, id) = (endpoint.product_id.as_str(), endpoint.id.as_str());
    let (listed, _) = world.tenant.deliveries(product, id, everything()).await.unwrap();
    let delivery = listed[0].id.as_str();
    let other = world.queue(1).await;
    let gone = |outcome: Result<(), Failure>| matches!(outcome, Err(Failure::Fault(Fault::NoSuchWebhook)));
    for (tenant, product, id) in [
        (tenant("team_1", Mode::Test), product, id),
        (tenant("team_2", Mode::Live), product, id),
        (tenant("team_1", Mode::Live), "prod_other", id),
        (tenant("team_1", Mode::Live), "", id),
        (tenant("team_1", Mode::Live), product, "wh_unknown"),
        (tenant("team_1", Mode::Live), product, "'; --"),
    ] {
        let store = world.store.of(tenant);
        assert!(gone(store.replay(product, id, delivery, act()).await.map(drop)));
        assert!(gone(store.recover(product, id, 0, act()).await.map(drop)));
        assert!(gone(store.test_endpoint(product, id, act()).await.map(drop)));
        assert!(gone(store.rotate_secret(product, id, act()).await.map(drop)));
    }
    // A delivery of another endpoint of the same team, and none at all.
    for (endpoint, delivery) in [(&other, delivery), (&endpoint, "dlv_unknown"), (&endpoint, "\0")] {
        let refused = world.tenant.replay(&endpoint.product_id, &endpoint.id, delivery, act()).await;
        assert!(matches!(refused, Err(Failure::Fault(Fault::NoSuchDelivery))), "{refused:?}");
    }
    assert_eq!(world.delivery(&endpoint, delivery).await.status, DeliveryStatus::Failed);
    let unchanged = world.tenant.update_endpoint(product, id, Changes::default(), Act::by_operator("/test")).await;
    assert_eq!(unchanged.unwrap(), endpoint);
}
