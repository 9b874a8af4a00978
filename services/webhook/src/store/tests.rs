//! The store by itself, on both engines: what depends on the order of transactions, and on time.

mod replays;
mod watch;

use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
};

use paperkey_kit::{
    clock::{Clock, ManualClock},
    db::{Database, DbError},
    ids::new_id,
    principal::Tenant,
    secrets::Keyring,
    store_suite,
    testing::TestDb,
    values::Page,
};
use paperkey_proto::{events::v1::Event, principal::v1::Mode};
use sea_orm::ConnectionTrait as _;

use super::{
    Act, Failure, Store, TenantStore,
    dispatch::{Claim, Claimed, Haul, LANES_A_LOOK, Outcome, Want},
    sql,
};
use crate::{
    domain::{
        Fault,
        attempt::{Attempt, AttemptFault},
        delivery::DeliveryStatus,
        endpoint::{Changes, Endpoint, Status},
        schedule::Schedule,
    },
    wake::Wake,
};

store_suite! {
    paperkey_migrations::webhook::Migrator;
    a_claim_is_held_by_one_and_runs_out,
    a_delivery_is_claimed_once_however_many_try,
    an_outcome_counts_only_under_its_claim,
    who_wakes_up_late_has_no_say_in_what_was_claimed_anew,
    a_claim_that_was_given_back_is_due_again,
    a_clock_that_was_set_back_holds_nothing_for_ever,
    the_secret_before_is_loaded_beside_the_new_one,
    the_tenth_failure_pauses_once_however_they_come_together,
    a_success_ends_a_row_of_failures,
    what_is_paused_is_not_found_and_not_claimed,
    resuming_makes_due_what_was_held_and_leaves_what_is_under_way,
    a_look_finds_every_endpoint_once_however_long_its_queue,
    a_look_ends_and_the_next_goes_on,
    endpoints_that_are_paused_end_a_look_too,
    no_more_than_twenty_endpoints_however_they_are_made,
    a_team_has_twenty_of_its_own_in_each_mode_and_its_products_theirs,
    events_of_a_team_go_to_its_endpoints_of_their_mode,
    nothing_is_left_of_a_team_and_all_of_the_others,
    what_is_under_way_for_a_team_that_goes_ends_without_a_trace,
    an_endpoint_that_was_made_while_its_team_went_goes_when_it_is_told_again,
    a_product_cannot_get_an_endpoint_after_its_end_however_they_race,
    nothing_is_left_of_an_endpoint_that_goes_while_events_come,
    much_that_was_sent_to_an_endpoint_goes_with_it_and_after_it,
    what_is_under_way_to_an_endpoint_that_goes_ends_quietly,
    of_a_product_that_goes_nothing_is_left,
    nothing_of_another_team_or_mode_is_there,
    a_hundred_deliveries_are_listed,
    what_is_old_goes_and_what_is_not_stays,
    what_is_sealed_is_sealed,
}

const START_MS: i64 = 1_798_675_200_000;
const DAY_MS: i64 = 24 * 3_600 * 1_000;
const CREATED: &str = "license.created";

struct World {
    store: Store,
    tenant: TenantStore,
    hand: ManualClock,
    clock: Clock,
}

impl World {
    fn new(database: Database, waits_s: Vec<u64>) -> Self {
        let (clock, hand) = Clock::manual(START_MS);
        let schedule = Arc::new(Schedule::new(waits_s));
        let store = Store::new(database, &Keyring::for_tests(), clock.clone(), schedule, Arc::new(Wake::default()));
        Self { tenant: store.of(tenant("team_1", Mode::Live)), store, hand, clock }
    }

    async fn endpoint(&self, product: &str) -> Endpoint {
        let (url, events) = ("https://example.com/".to_owned(), vec![CREATED.to_owned()]);
        self.tenant.create_endpoint(product.into(), url, events, act()).await.unwrap().0
    }

    fn events(&self, product: &str, count: usize) -> Vec<Event> {
        let event = |_| Event {
            id: new_id("evt", &self.clock),
            topic: CREATED.into(),
            team_id: "team_1".into(),
            mode: Mode::Live.into(),
            product_id: product.into(),
            created_at_ms: START_MS,
            data_json: r#"{"key":"K7WX9"}"#.into(),
            traceparent: String::new(),
        };
        (0..count).map(event).collect()
    }

    /// An endpoint of a product of its own, for which so many deliveries wait.
    async fn queue(&self, count: usize) -> Endpoint {
        let product = new_id("prod", &self.clock);
        let endpoint = self.endpoint(&product).await;
        self.store.ingest(self.events(&product, count)).await.unwrap();
        endpoint
    }

    async fn claim(&self, endpoint: &Endpoint, count: usize, holder: &str) -> Vec<Claimed> {
        let want = Want { endpoint_id: endpoint.id.clone(), count };
        let until = self.clock.now_ms() + 30_000;
        self.store.claim(vec![want], holder.into(), until).await.unwrap().deliveries
    }

    async fn set(&self, endpoint: &Endpoint, status: Status) -> Endpoint {
        let changes = Changes { status: Some(status), ..Changes::default() };
        self.tenant.update_endpoint(&endpoint.product_id, &endpoint.id, changes, act()).await.unwrap()
    }

    async fn reload(&self, endpoint: &Endpoint) -> Endpoint {
        self.tenant.endpoint(&endpoint.product_id, &endpoint.id).await.unwrap()
    }
}

fn tenant(team: &str, mode: Mode) -> Tenant {
    Tenant { team_id: team.into(), mode }
}

fn act() -> Act {
    Act::by_operator("/test")
}

fn outcome(claimed: &Claimed, fault: Option<AttemptFault>) -> Outcome {
    let status = if fault.is_none() { 200 } else { 500 };
    Outcome {
        delivery_id: claimed.id.clone(),
        endpoint_id: claimed.endpoint_id.clone(),
        attempts: claimed.attempts,
        replayed_after: claimed.replayed_after,
        held_until_ms: claimed.held_until_ms,
        attempt: Attempt {
            at_ms: START_MS,
            duration_ms: 7,
            response_status: Some(status),
            fault,
            snippet: Some("ok".into()),
            retry_after_ms: None,
        },
        chance: 0.5,
    }
}

fn failed(claimed: &Claimed) -> Outcome {
    outcome(claimed, Some(AttemptFault::HttpStatus))
}

fn everything() -> Page {
    Page::new(Some(100), "").unwrap()
}

async fn number(store: &Store, text: &'static str) -> i64 {
    let job = move |reader: paperkey_kit::db::Reader| async move {
        let row = reader.query_one_raw(sql(reader.get_database_backend(), text, vec![])).await?;
        Ok::<i64, DbError>(row.expect("a count has a row").try_get("", "number")?)
    };
    store.database.read(job).await.unwrap()
}

async fn a_claim_is_held_by_one_and_runs_out(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.queue(1).await;
    // A process takes it, and dies between the POST and the note of it.
    let [first] = world.claim(&endpoint, 5, "one").await.try_into().unwrap();
    assert!(world.claim(&endpoint, 5, "other").await.is_empty());
    world.hand.advance_ms(29_999);
    assert!(world.claim(&endpoint, 5, "other").await.is_empty());
    world.hand.advance_ms(1);
    let [second] = world.claim(&endpoint, 5, "other").await.try_into().unwrap();
    assert_eq!((&first.id, first.attempts), (&second.id, second.attempts));
    assert_eq!(first.body, second.body);
    assert!(first.body.is_some());
}

async fn a_delivery_is_claimed_once_however_many_try(database: Database) {
    let world = Arc::new(World::new(database, vec![0]));
    let endpoint = Arc::new(world.queue(200).await);
    let tasks = (0..8).map(|holder| {
        let (world, endpoint) = (Arc::clone(&world), Arc::clone(&endpoint));
        tokio::spawn(async move {
            let mut mine = Vec::new();
            loop {
                let claimed = world.claim(&endpoint, 7, &format!("holder {holder}")).await;
                if claimed.is_empty() {
                    return mine;
                }
                mine.extend(claimed.into_iter().map(|claimed| claimed.id));
            }
        })
    });
    let mut all = Vec::new();
    for task in tasks.collect::<Vec<_>>() {
        all.extend(task.await.unwrap());
    }
    // Those that were locked by another while this one looked were passed over: once more for what is left.
    all.extend(world.claim(&endpoint, 200, "last").await.into_iter().map(|claimed| claimed.id));
    let distinct: HashSet<_> = all.iter().collect();
    assert_eq!((all.len(), distinct.len()), (200, 200));
}

async fn an_outcome_counts_only_under_its_claim(database: Database) {
    let world = World::new(database, vec![0, 60]);
    let endpoint = world.queue(1).await;
    let [first] = world.claim(&endpoint, 1, "slow").await.try_into().unwrap();
    world.hand.advance_ms(30_000);
    let [second] = world.claim(&endpoint, 1, "quick").await.try_into().unwrap();
    // What the slow one says comes too late, and what the quick one says twice counts once.
    world.store.record(vec![failed(&first)], "slow".into()).await.unwrap();
    world.store.record(vec![failed(&second)], "quick".into()).await.unwrap();
    world.store.record(vec![failed(&second)], "quick".into()).await.unwrap();
    let (delivery, attempts) = world.tenant.delivery(&endpoint.product_id, &endpoint.id, &first.id).await.unwrap();
    assert_eq!((delivery.attempts, attempts.len()), (1, 1));
    assert_eq!(delivery.status, DeliveryStatus::Pending);
    assert_eq!(delivery.next_attempt_at_ms, Some(START_MS + 90_000));
    assert_eq!(world.reload(&endpoint).await.consecutive_failures, 1);
}

async fn a_claim_that_was_given_back_is_due_again(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.queue(3).await;
    let claims: Vec<Claim> = world.claim(&endpoint, 3, "one").await.into_iter().map(Claim::from).collect();
    // Another's word does not count.
    world.store.release(claims.clone(), "other".into()).await.unwrap();
    assert!(world.claim(&endpoint, 3, "other").await.is_empty());
    world.store.release(claims, "one".into()).await.unwrap();
    assert_eq!(world.claim(&endpoint, 3, "other").await.len(), 3);
}

async fn who_wakes_up_late_has_no_say_in_what_was_claimed_anew(database: Database) {
    let world = World::new(database, vec![0, 60]);
    for next in ["other", "one"] {
        let endpoint = world.queue(1).await;
        let [late] = world.claim(&endpoint, 1, "one").await.try_into().unwrap();
        world.hand.advance_ms(30_000);
        let [current] = world.claim(&endpoint, 1, next).await.try_into().unwrap();
        assert_eq!((&late.id, late.attempts), (&current.id, current.attempts));
        for outcome in [failed(&late), outcome(&late, None)] {
            let recorded = world.store.record(vec![outcome], "one".into()).await.unwrap();
            assert!(recorded.paused.is_empty());
        }
        world.store.release(vec![late.clone().into()], "one".into()).await.unwrap();
        let seen = world.tenant.delivery(&endpoint.product_id, &endpoint.id, &late.id).await.unwrap();
        assert_eq!((seen.0.status, seen.0.attempts, seen.1.len()), (DeliveryStatus::Pending, 0, 0), "{next}");
        assert_eq!(world.reload(&endpoint).await.consecutive_failures, 0, "{next}");
        assert!(world.claim(&endpoint, 1, "third").await.is_empty(), "the claim of {next} was taken from it");
        // Who holds it now has the say.
        world.store.record(vec![failed(&current)], next.into()).await.unwrap();
        let seen = world.tenant.delivery(&endpoint.product_id, &endpoint.id, &late.id).await.unwrap();
        assert_eq!((seen.0.attempts, seen.1.len()), (1, 1), "{next}");
        assert_eq!(world.reload(&endpoint).await.consecutive_failures, 1, "{next}");
    }
}

async fn a_clock_that_was_set_back_holds_nothing_for_ever(database: Database) {
    const CLAIM_MS: i64 = 30_000;
    let world = World::new(database, vec![0, 300]);
    let freed = async || world.store.free_from_the_future(CLAIM_MS).await.unwrap();
    // A clock that is a year ahead: one claim of a process that dies, one wait, one that was never tried.
    world.hand.advance_ms(365 * DAY_MS);
    let endpoint = world.queue(3).await;
    let [_, tried] = world.claim(&endpoint, 2, "dead").await.try_into().unwrap();
    world.store.record(vec![Outcome { attempt: at(&world, &tried), ..failed(&tried) }], "dead".into()).await.unwrap();
    assert_eq!(freed().await, 0, "as long as the clock is right, all of that may wait");
    world.hand.advance_ms(-365 * DAY_MS);
    assert!(world.claim(&endpoint, 5, "living").await.is_empty());
    assert_eq!(freed().await, 3);
    assert_eq!(world.claim(&endpoint, 5, "living").await.len(), 3);
    // Once is enough, and what is claimed or waits by the clock of today is left alone.
    assert_eq!(freed().await, 0);

    let other = world.queue(3).await;
    let [claimed, short, long] = world.claim(&other, 3, "living").await.try_into().unwrap();
    let long = Outcome { attempt: Attempt { retry_after_ms: Some(DAY_MS), ..at(&world, &long) }, ..failed(&long) };
    let short = Outcome { attempt: at(&world, &short), ..failed(&short) };
    world.store.record(vec![short, long], "living".into()).await.unwrap();
    assert_eq!(freed().await, 0);
    // By as little as two clocks may differ, nothing is lost either.
    world.hand.advance_ms(-60_000);
    assert_eq!(freed().await, 0);
    world.store.record(vec![outcome(&claimed, None)], "living".into()).await.unwrap();
    let (seen, _) = world.tenant.delivery(&other.product_id, &other.id, &claimed.id).await.unwrap();
    assert_eq!(seen.status, DeliveryStatus::Succeeded);
}

/// A failed attempt of this moment.
fn at(world: &World, claimed: &Claimed) -> Attempt {
    Attempt { at_ms: world.clock.now_ms(), ..failed(claimed).attempt }
}

async fn the_secret_before_is_loaded_beside_the_new_one(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.queue(1).await;
    let (id, sealed) = (endpoint.id.clone(), world.store.secrets.seal(&endpoint.id, b"whsec_b2xk"));
    let job = |tx: paperkey_kit::db::Tx| async move {
        let text = "UPDATE endpoints SET previous_secret_sealed = $1, previous_secret_until_ms = $2 WHERE id = $3";
        let values = vec![sealed.into(), (START_MS + 1).into(), id.into()];
        tx.execute_raw(sql(tx.get_database_backend(), text, values)).await?;
        Ok::<_, DbError>(())
    };
    world.store.database.write(job).await.unwrap();
    let want = Want { endpoint_id: endpoint.id.clone(), count: 1 };
    let haul: Haul = world.store.claim(vec![want], "one".into(), START_MS + 30_000).await.unwrap();
    let receiver = &haul.receivers[&endpoint.id];
    let (previous, until_ms) = receiver.previous.as_ref().unwrap();
    assert_eq!((previous.expose(), *until_ms), ("whsec_b2xk", START_MS + 1));
    assert_ne!(receiver.secret.as_ref().unwrap(), previous);
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_failures_that_two_processes_write_at_once_pause_once() {
    let Some(db) = TestDb::postgres().await else { return };
    let one = World::new(db.migrated::<paperkey_migrations::webhook::Migrator>().await, vec![0, 60]);
    // A pool of its own, as another process has.
    let other = World::new(db.open().await, vec![0, 60]);
    for round in 0..10 {
        // Many more wait than are tried: only what failed counts.
        let endpoint = one.queue(30).await;
        let (few, rest) = (one.claim(&endpoint, 5, "one").await, other.claim(&endpoint, 5, "other").await);
        assert_eq!((few.len(), rest.len()), (5, 5));
        let writes = few.iter().map(|claimed| (&one, "one", claimed));
        let writes = writes.chain(rest.iter().map(|claimed| (&other, "other", claimed)));
        let tasks: Vec<_> = writes
            .map(|(world, holder, claimed)| {
                let (store, outcome) = (world.store.clone(), failed(claimed));
                tokio::spawn(async move { store.record(vec![outcome], holder.into()).await.unwrap().paused.len() })
            })
            .collect();
        let mut paused = 0;
        for task in tasks {
            paused += task.await.unwrap();
        }
        assert_eq!(paused, 1, "round {round}");
        let after = other.reload(&endpoint).await;
        assert_eq!((after.status, after.consecutive_failures), (Status::Paused, 10));
        let told = "SELECT COUNT(*) AS number FROM outbox WHERE target = 'auth' AND topic = 'webhook.paused'";
        assert_eq!(number(&one.store, told).await, round + 1);
    }
    one.store.database.close().await;
    other.store.database.close().await;
    db.remove().await;
}

async fn the_tenth_failure_pauses_once_however_they_come_together(database: Database) {
    let world = Arc::new(World::new(database, vec![0, 60]));
    let endpoint = world.queue(40).await;
    let claimed = world.claim(&endpoint, 40, "one").await;
    let tasks: Vec<_> = claimed
        .chunks(4)
        .map(|few| {
            let (world, outcomes) = (Arc::clone(&world), few.iter().map(failed).collect());
            tokio::spawn(async move { world.store.record(outcomes, "one".into()).await.unwrap().paused.len() })
        })
        .collect();
    let mut paused = 0;
    for task in tasks {
        paused += task.await.unwrap();
    }
    assert_eq!(paused, 1);
    let told = "SELECT COUNT(*) AS number FROM outbox WHERE target = 'auth' AND topic = 'webhook.paused'";
    assert_eq!(number(&world.store, told).await, 1);
    let after = world.reload(&endpoint).await;
    assert_eq!((after.status, after.consecutive_failures), (Status::Paused, 40));
    let resumed = world.set(&after, Status::Active).await;
    assert_eq!((resumed.status, resumed.consecutive_failures), (Status::Active, 0));
    assert_eq!(world.claim(&endpoint, 100, "one").await.len(), 40);
}

async fn a_success_ends_a_row_of_failures(database: Database) {
    let world = World::new(database, vec![0, 60]);
    let endpoint = world.queue(20).await;
    let claimed = world.claim(&endpoint, 20, "one").await;
    // Nine, a success, nine: in one batch and in the order in which they came.
    let outcomes = claimed.iter().enumerate().take(19);
    let outcomes = outcomes.map(|(at, one)| if at == 9 { outcome(one, None) } else { failed(one) }).collect();
    assert!(world.store.record(outcomes, "one".into()).await.unwrap().paused.is_empty());
    assert_eq!(world.reload(&endpoint).await.consecutive_failures, 9);
    let recorded = world.store.record(vec![outcome(&claimed[19], None)], "one".into()).await.unwrap();
    assert_eq!(recorded.next_due_at_ms, None);
    assert_eq!(world.reload(&endpoint).await.consecutive_failures, 0);
}

async fn what_is_paused_is_not_found_and_not_claimed(database: Database) {
    let world = World::new(database, vec![0]);
    let (paused, active) = (world.queue(2).await, world.queue(2).await);
    world.set(&paused, Status::Paused).await;
    let lanes = world.store.due_lanes(String::new()).await.unwrap().due;
    assert_eq!(lanes.iter().map(|lane| &lane.endpoint_id).collect::<Vec<_>>(), [&active.id]);
    assert!(world.claim(&paused, 5, "one").await.is_empty());
    assert_eq!(world.claim(&active, 5, "one").await.len(), 2);
}

async fn resuming_makes_due_what_was_held_and_leaves_what_is_under_way(database: Database) {
    let world = World::new(database, vec![0, 3_600]);
    let endpoint = world.queue(2).await;
    let [early, late] = world.claim(&endpoint, 2, "one").await.try_into().unwrap();
    world.store.record(vec![failed(&early)], "one".into()).await.unwrap();
    world.set(&endpoint, Status::Paused).await;
    world.hand.advance_ms(1_000);
    world.set(&endpoint, Status::Active).await;
    let [again] = world.claim(&endpoint, 5, "other").await.try_into().unwrap();
    assert_eq!(again.id, early.id);
    // The other is still with the one that took it.
    world.store.record(vec![outcome(&late, None)], "one".into()).await.unwrap();
    let (delivery, _) = world.tenant.delivery(&endpoint.product_id, &endpoint.id, &late.id).await.unwrap();
    assert_eq!(delivery.status, DeliveryStatus::Succeeded);
}

async fn a_look_finds_every_endpoint_once_however_long_its_queue(database: Database) {
    let world = World::new(database, vec![0]);
    let (long, short) = (world.queue(700).await, world.queue(1).await);
    let lanes = world.store.due_lanes(String::new()).await.unwrap().due;
    let found: HashSet<_> = lanes.iter().map(|lane| lane.endpoint_id.as_str()).collect();
    assert_eq!((lanes.len(), found), (2, HashSet::from([long.id.as_str(), short.id.as_str()])));
    assert!(lanes.iter().all(|lane| lane.due_at_ms == START_MS));
    world.claim(&short, 1, "one").await;
    let lanes = world.store.due_lanes(String::new()).await.unwrap().due;
    let due: BTreeMap<_, _> = lanes.iter().map(|lane| (lane.endpoint_id.as_str(), lane.due_at_ms)).collect();
    assert_eq!(due, BTreeMap::from([(long.id.as_str(), START_MS), (short.id.as_str(), START_MS + 30_000)]));
}

/// Straight into the tables: so many endpoints, each with a delivery that is due, are slow to make.
async fn insert_lanes(world: &World, count: usize, status: impl Fn(usize) -> Status + Send + 'static) {
    let job = move |tx: paperkey_kit::db::Tx| async move {
        // Backwards, so that their order is that of nothing but their ids.
        for at in (0..count).rev() {
            let backend = tx.get_database_backend();
            let endpoint = "INSERT INTO endpoints (id, team_id, mode, product_id, url, events, secret_sealed, status, \
                            consecutive_failures, created_at_ms, updated_at_ms) \
                            VALUES ($1, 't', 'live', 'p', 'u', '[]', $2, $3, 0, 0, 0)";
            let id = format!("wh_{at:06}");
            let values = vec![id.as_str().into(), vec![0_u8].into(), status(at).word().into()];
            tx.execute_raw(sql(backend, endpoint, values)).await?;
            let delivery = "INSERT INTO deliveries (id, endpoint_id, event_id, team_id, mode, topic, status, attempts, \
                            due_at_ms, created_at_ms) VALUES ($1, $2, 'e', 't', 'live', 'x', 'pending', 0, 0, 0)";
            tx.execute_raw(sql(backend, delivery, vec![format!("dlv_{at}").into(), id.into()])).await?;
        }
        Ok::<_, DbError>(())
    };
    world.store.database.write(job).await.unwrap();
}

async fn a_look_ends_and_the_next_goes_on(database: Database) {
    let world = World::new(database, vec![0]);
    insert_lanes(&world, LANES_A_LOOK + 1, |_| Status::Active).await;
    let first = world.store.due_lanes(String::new()).await.unwrap();
    let last = format!("wh_{:06}", LANES_A_LOOK - 1);
    assert_eq!((first.due.len(), first.next.as_ref()), (LANES_A_LOOK, Some(&last)));
    assert!(first.due.is_sorted_by_key(|lane| &lane.endpoint_id));
    let second = world.store.due_lanes(last).await.unwrap();
    let found: Vec<_> = second.due.iter().map(|lane| lane.endpoint_id.clone()).collect();
    assert_eq!((found, second.next), (vec![format!("wh_{LANES_A_LOOK:06}")], None));
}

async fn endpoints_that_are_paused_end_a_look_too(database: Database) {
    let world = World::new(database, vec![0]);
    // Only each hundredth is active.
    let is_active = |at: usize| at % 100 == 99;
    insert_lanes(&world, 1_200, move |at| if is_active(at) { Status::Active } else { Status::Paused }).await;
    let (mut found, mut looks, mut after) = (Vec::new(), Vec::new(), Some(String::new()));
    while let Some(from) = after {
        let look = world.store.due_lanes(from).await.unwrap();
        looks.push(look.due.len());
        found.extend(look.due.into_iter().map(|lane| lane.endpoint_id));
        after = look.next;
    }
    assert_eq!(looks, [5, 5, 2]);
    let active = (0..1_200).filter(|at| is_active(*at)).map(|at| format!("wh_{at:06}"));
    assert_eq!(found, active.collect::<Vec<_>>());
}

async fn no_more_than_twenty_endpoints_however_they_are_made(database: Database) {
    let world = Arc::new(World::new(database, vec![0]));
    let tasks: Vec<_> = (0..30)
        .map(|_| {
            let tenant = world.tenant.clone();
            let url = "https://example.com/".to_owned();
            tokio::spawn(async move { tenant.create_endpoint("prod_1".into(), url, vec![CREATED.into()], act()).await })
        })
        .collect();
    let mut refused = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(_) => {}
            Err(Failure::Fault(Fault::TooManyWebhooks)) => refused += 1,
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(refused, 10);
    let (all, _) = world.tenant.endpoints("prod_1", everything()).await.unwrap();
    assert_eq!(all.len(), 20);
    // One that goes makes room for one.
    world.tenant.delete_endpoint("prod_1", &all[0].id, act()).await.unwrap();
    world.endpoint("prod_1").await;
}

async fn a_product_cannot_get_an_endpoint_after_its_end_however_they_race(database: Database) {
    let world = Arc::new(World::new(database, vec![0]));
    for round in 0..20 {
        let product = format!("prod_{round}");
        let mut end = world.events(&product, 1);
        paperkey_kit::events::PRODUCT_DELETED.clone_into(&mut end[0].topic);
        let (tenant, name) = (world.tenant.clone(), product.clone());
        let url = "https://example.com/".to_owned();
        let making = tokio::spawn(async move { tenant.create_endpoint(name, url, vec![CREATED.into()], act()).await });
        world.store.ingest(end).await.unwrap();
        // It may have been made before, and then it is gone.
        let made = making.await.unwrap();
        assert!(matches!(made, Ok(_) | Err(Failure::Fault(Fault::NoSuchProduct))), "{made:?}");
        let (left, _) = world.tenant.endpoints(&product, everything()).await.unwrap();
        assert!(left.is_empty());
    }
}

const KEY_CREATED: &str = "api_key.created";

fn team_event(world: &World, topic: &str, team: &str, mode: Mode) -> Event {
    let [event] = world.events("", 1).try_into().unwrap();
    Event { topic: topic.into(), team_id: team.into(), mode: mode.into(), ..event }
}

async fn team_endpoint(store: &TenantStore) -> Endpoint {
    let (url, events) = ("https://example.com/".to_owned(), vec![KEY_CREATED.to_owned()]);
    store.create_endpoint(String::new(), url, events, act()).await.unwrap().0
}

async fn a_team_has_twenty_of_its_own_in_each_mode_and_its_products_theirs(database: Database) {
    let world = Arc::new(World::new(database, vec![0]));
    let tasks: Vec<_> = (0..30)
        .map(|_| {
            let (tenant, url) = (world.tenant.clone(), "https://example.com/".to_owned());
            let events = vec![KEY_CREATED.to_owned()];
            tokio::spawn(async move { tenant.create_endpoint(String::new(), url, events, act()).await })
        })
        .collect();
    let mut made = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(_) => made += 1,
            Err(Failure::Fault(Fault::TooManyWebhooks)) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(made, 20);
    world.endpoint("prod_1").await;
    for other in [tenant("team_1", Mode::Test), tenant("team_2", Mode::Live)] {
        team_endpoint(&world.store.of(other)).await;
    }
    assert_eq!(world.tenant.endpoints("", everything()).await.unwrap().0.len(), 20);
    assert_eq!(world.tenant.endpoints("prod_1", everything()).await.unwrap().0.len(), 1);
}

async fn events_of_a_team_go_to_its_endpoints_of_their_mode(database: Database) {
    let world = World::new(database, vec![0]);
    let stores = [("team_1", Mode::Live), ("team_1", Mode::Test), ("team_2", Mode::Live)];
    let mut endpoints = Vec::new();
    for (team, mode) in stores {
        endpoints.push(team_endpoint(&world.store.of(tenant(team, mode))).await);
    }
    let of_product = world.endpoint("prod_1").await;
    let event = team_event(&world, KEY_CREATED, "team_1", Mode::Test);
    world.store.ingest(vec![event.clone(), event.clone()]).await.unwrap();
    world.store.ingest(vec![event.clone()]).await.unwrap();
    // A team is not deleted as a product without a name would be, and a product's event is none of the team's.
    world.store.ingest(vec![team_event(&world, "product.deleted", "team_1", Mode::Live)]).await.unwrap();
    world.store.ingest(world.events("prod_1", 1)).await.unwrap();
    let mut counts = Vec::new();
    for ((team, mode), endpoint) in stores.into_iter().zip(&endpoints) {
        let (listed, _) = world.store.of(tenant(team, mode)).deliveries("", &endpoint.id, everything()).await.unwrap();
        assert!(listed.iter().all(|delivery| delivery.event_id == event.id));
        counts.push(listed.len());
    }
    assert_eq!(counts, [0, 1, 0]);
    assert_eq!(world.tenant.deliveries("prod_1", &of_product.id, everything()).await.unwrap().0.len(), 1);
}

async fn nothing_is_left_of_a_team_and_all_of_the_others(database: Database) {
    let world = World::new(database, vec![0, 60]);
    let long = world.queue(1_100).await;
    let claimed = world.claim(&long, 3, "one").await;
    world.store.record(claimed.iter().map(failed).collect(), "one".into()).await.unwrap();
    let tested = world.store.of(tenant("team_1", Mode::Test));
    for store in [&world.tenant, &tested] {
        team_endpoint(store).await;
    }
    let of_test = team_event(&world, KEY_CREATED, "team_1", Mode::Test);
    let mut end = world.events("prod_gone", 1);
    "product.deleted".clone_into(&mut end[0].topic);
    end.push(of_test);
    world.store.ingest(end).await.unwrap();
    let other = world.store.of(tenant("team_2", Mode::Live));
    let kept = team_endpoint(&other).await;
    world.store.ingest(vec![team_event(&world, KEY_CREATED, "team_2", Mode::Live)]).await.unwrap();

    // What comes with the news is not sent any more.
    let gone = team_event(&world, "team.deleted", "team_1", Mode::Live);
    let late = team_event(&world, KEY_CREATED, "team_1", Mode::Live);
    let nobody = Event { team_id: "'".into(), ..gone.clone() };
    world.store.ingest(vec![late, nobody, gone.clone()]).await.unwrap();
    world.store.ingest(vec![gone]).await.unwrap();
    for (text, left) in [
        ("SELECT COUNT(*) AS number FROM endpoints", 1),
        ("SELECT COUNT(*) AS number FROM deliveries", 1),
        ("SELECT COUNT(*) AS number FROM attempts", 0),
        ("SELECT COUNT(*) AS number FROM events", 1),
        ("SELECT COUNT(*) AS number FROM products", 1),
    ] {
        assert_eq!(number(&world.store, text).await, left, "{text}");
    }
    assert_eq!(other.endpoint("", &kept.id).await.unwrap(), kept);
    assert_eq!(world.claim(&kept, 5, "one").await.len(), 1);
}

async fn what_is_under_way_for_a_team_that_goes_ends_without_a_trace(database: Database) {
    let world = Arc::new(World::new(database, vec![0, 60]));
    for _ in 0..5 {
        let endpoint = world.queue(60).await;
        let tasks: Vec<_> = world
            .claim(&endpoint, 60, "one")
            .await
            .chunks(10)
            .map(|few| {
                let (world, outcomes) = (Arc::clone(&world), few.iter().map(failed).collect());
                tokio::spawn(async move { world.store.record(outcomes, "one".into()).await.map(drop) })
            })
            .collect();
        let (coming, events) = (Arc::clone(&world), world.events(&endpoint.product_id, 20));
        let intake = tokio::spawn(async move { coming.store.ingest(events).await });
        let gone = team_event(&world, "team.deleted", "team_1", Mode::Live);
        world.store.ingest(vec![gone.clone()]).await.unwrap();
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        intake.await.unwrap().unwrap();
        world.store.ingest(vec![gone]).await.unwrap();
    }
    for text in [
        "SELECT COUNT(*) AS number FROM endpoints",
        "SELECT COUNT(*) AS number FROM deliveries",
        "SELECT COUNT(*) AS number FROM attempts",
        "SELECT COUNT(*) AS number FROM events",
    ] {
        assert_eq!(number(&world.store, text).await, 0, "{text}");
    }
}

async fn an_endpoint_that_was_made_while_its_team_went_goes_when_it_is_told_again(database: Database) {
    let world = World::new(database, vec![0]);
    let gone = team_event(&world, "team.deleted", "team_1", Mode::Live);
    let tasks: Vec<_> = (0..6)
        .map(|_| {
            let tenant = world.tenant.clone();
            tokio::spawn(async move { team_endpoint(&tenant).await })
        })
        .collect();
    world.store.ingest(vec![gone.clone()]).await.unwrap();
    for task in tasks {
        task.await.unwrap();
    }
    world.store.ingest(vec![gone]).await.unwrap();
    assert_eq!(number(&world.store, "SELECT COUNT(*) AS number FROM endpoints").await, 0);
    assert_eq!(number(&world.store, "SELECT COUNT(*) AS number FROM products").await, 0);
}

async fn nothing_is_left_of_an_endpoint_that_goes_while_events_come(database: Database) {
    let world = Arc::new(World::new(database, vec![0]));
    for round in 0..10 {
        let product = format!("prod_{round}");
        let endpoint = world.endpoint(&product).await;
        let (coming, events) = (Arc::clone(&world), world.events(&product, 20));
        let intake = tokio::spawn(async move { coming.store.ingest(events).await });
        world.tenant.delete_endpoint(&product, &endpoint.id, act()).await.unwrap();
        intake.await.unwrap().unwrap();
    }
    assert_eq!(number(&world.store, "SELECT COUNT(*) AS number FROM deliveries").await, 0);
}

/// What the housekeeping does for endpoints that are gone, and how many those were.
async fn sweep(store: &Store) -> usize {
    let (mut after, mut swept) = (Some(String::new()), 0);
    while let Some(id) = after {
        let (gone, next) = store.orphaned(id).await.unwrap();
        swept += gone.len();
        for endpoint_id in gone {
            while store.forget_orphans(endpoint_id.clone()).await.unwrap() {}
        }
        after = next;
    }
    swept
}

/// Removes the row of an endpoint and leaves the rest, as where a process ends right behind the deletion.
async fn remove_row(world: &World, endpoint: &Endpoint) {
    let id = endpoint.id.clone();
    let job = move |tx: paperkey_kit::db::Tx| async move { super::endpoints::remove(&tx, &id).await };
    world.store.database.write(job).await.unwrap();
}

async fn much_that_was_sent_to_an_endpoint_goes_with_it_and_after_it(database: Database) {
    let world = World::new(database, vec![0]);
    let kept = world.queue(3).await;
    // As much as a moment is enough for goes at once, and the rest later.
    let at_once = world.queue(1_250).await;
    world.tenant.delete_endpoint(&at_once.product_id, &at_once.id, act()).await.unwrap();
    sweep(&world.store).await;
    assert_eq!(number(&world.store, "SELECT COUNT(*) AS number FROM deliveries").await, 3);

    let orphaned = world.queue(1_250).await;
    let few = world.claim(&orphaned, 50, "one").await;
    world.store.record(few.iter().map(failed).collect(), "one".into()).await.unwrap();
    remove_row(&world, &orphaned).await;
    // What is left meanwhile is neither found nor claimed, shown nor given up for being held.
    let due: Vec<_> = world.store.due_lanes(String::new()).await.unwrap().due;
    assert_eq!(due.iter().map(|lane| &lane.endpoint_id).collect::<Vec<_>>(), [&kept.id]);
    assert!(world.claim(&orphaned, 5, "one").await.is_empty());
    let shown = world.tenant.deliveries(&orphaned.product_id, &orphaned.id, everything()).await;
    assert!(matches!(shown, Err(Failure::Fault(Fault::NoSuchWebhook))), "{shown:?}");
    assert!(!world.store.fail_held(START_MS + DAY_MS).await.unwrap());
    assert_eq!(sweep(&world.store).await, 1);
    assert_eq!(number(&world.store, "SELECT COUNT(*) AS number FROM deliveries").await, 3);
    assert_eq!(number(&world.store, "SELECT COUNT(*) AS number FROM attempts").await, 0);
    assert_eq!(sweep(&world.store).await, 0);
    // An endpoint that is there loses nothing by it.
    assert!(!world.store.forget_orphans(kept.id.clone()).await.unwrap());
    assert_eq!(world.claim(&kept, 5, "one").await.len(), 3);
}

async fn what_is_under_way_to_an_endpoint_that_goes_ends_quietly(database: Database) {
    let world = World::new(database, vec![0, 60]);
    for removed_before_the_outcome in [true, false] {
        let endpoint = world.queue(2).await;
        let [one, other] = world.claim(&endpoint, 2, "one").await.try_into().unwrap();
        if removed_before_the_outcome {
            world.tenant.delete_endpoint(&endpoint.product_id, &endpoint.id, act()).await.unwrap();
        } else {
            remove_row(&world, &endpoint).await;
        }
        let outcomes = vec![failed(&one), outcome(&other, None)];
        assert!(world.store.record(outcomes, "one".into()).await.unwrap().paused.is_empty());
        world.store.release(vec![one.into()], "one".into()).await.unwrap();
        sweep(&world.store).await;
        for text in ["SELECT COUNT(*) AS number FROM deliveries", "SELECT COUNT(*) AS number FROM attempts"] {
            assert_eq!(number(&world.store, text).await, 0, "{text}");
        }
    }
}

async fn of_a_product_that_goes_nothing_is_left(database: Database) {
    let world = World::new(database, vec![0]);
    let kept = world.queue(2).await;
    let endpoint = world.queue(1_250).await;
    let mut end = world.events(&endpoint.product_id, 1);
    paperkey_kit::events::PRODUCT_DELETED.clone_into(&mut end[0].topic);
    world.store.ingest(end.clone()).await.unwrap();
    assert!(world.claim(&endpoint, 5, "one").await.is_empty());
    sweep(&world.store).await;
    // Told again, it goes on with what is left.
    world.store.ingest(end).await.unwrap();
    for text in ["SELECT COUNT(*) AS number FROM deliveries", "SELECT COUNT(*) AS number FROM events"] {
        assert_eq!(number(&world.store, text).await, 2, "{text}");
    }
    assert_eq!(world.claim(&kept, 5, "one").await.len(), 2);
}

async fn nothing_of_another_team_or_mode_is_there(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.queue(1).await;
    let (product, id) = (endpoint.product_id.as_str(), endpoint.id.as_str());
    let (deliveries, _) = world.tenant.deliveries(product, id, everything()).await.unwrap();
    for stranger in [tenant("team_1", Mode::Test), tenant("team_2", Mode::Live)] {
        let store = world.store.of(stranger);
        let gone = |outcome: Result<(), Failure>| matches!(outcome, Err(Failure::Fault(Fault::NoSuchWebhook)));
        assert!(gone(store.endpoint(product, id).await.map(drop)));
        assert!(gone(store.update_endpoint(product, id, Changes::default(), act()).await.map(drop)));
        assert!(gone(store.delete_endpoint(product, id, act()).await));
        assert!(gone(store.deliveries(product, id, everything()).await.map(drop)));
        assert!(gone(store.delivery(product, id, &deliveries[0].id).await.map(drop)));
        assert!(store.endpoints(product, everything()).await.unwrap().0.is_empty());
        let taken = store.create_endpoint(product.into(), "https://a.example".into(), vec![], act()).await;
        assert!(matches!(taken, Err(Failure::Fault(Fault::NoSuchProduct))));
    }
    // Of the same team, but of another product.
    assert!(matches!(world.tenant.endpoint("prod_other", id).await, Err(Failure::Fault(Fault::NoSuchWebhook))));
}

async fn a_hundred_deliveries_are_listed(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.queue(0).await;
    for _ in 0..130 {
        world.hand.advance_ms(1);
        world.store.ingest(world.events(&endpoint.product_id, 1)).await.unwrap();
    }
    let mut token = String::new();
    let mut listed = Vec::new();
    loop {
        let page = Page::new(Some(40), &token).unwrap();
        let (some, next) = world.tenant.deliveries(&endpoint.product_id, &endpoint.id, page).await.unwrap();
        listed.extend(some);
        match next {
            Some(next) => token = next,
            None => break,
        }
    }
    assert_eq!(listed.len(), 100);
    assert!(listed.is_sorted_by(|newer, older| newer.id > older.id));
    assert_eq!(listed[0].created_at_ms, START_MS + 130);
    assert_eq!(listed[99].created_at_ms, START_MS + 31);
}

async fn what_is_old_goes_and_what_is_not_stays(database: Database) {
    let world = World::new(database, vec![0]);
    let (done, held, waiting) = (world.queue(1_100).await, world.queue(2).await, world.queue(1).await);
    for _ in 0..22 {
        let claimed = world.claim(&done, 50, "one").await;
        let outcomes = claimed.iter().map(|one| outcome(one, None)).collect();
        world.store.record(outcomes, "one".into()).await.unwrap();
    }
    world.set(&held, Status::Paused).await;
    world.hand.advance_ms(10 * DAY_MS);
    let young = world.queue(1).await;
    let [claimed] = world.claim(&young, 1, "one").await.try_into().unwrap();
    world.store.record(vec![outcome(&claimed, None)], "one".into()).await.unwrap();
    world.hand.advance_ms(21 * DAY_MS);

    let before_ms = world.clock.now_ms() - 30 * DAY_MS;
    assert!(!world.store.fail_held(before_ms).await.unwrap());
    let mut rounds = 1;
    while world.store.remove_finished(before_ms).await.unwrap() {
        rounds += 1;
    }
    assert_eq!(rounds, 3);
    let mut after = Some(String::new());
    while let Some(id) = after {
        after = world.store.remove_events(id, before_ms).await.unwrap();
    }

    let left = |endpoint: &Endpoint| {
        let (product, id) = (endpoint.product_id.clone(), endpoint.id.clone());
        let tenant = world.tenant.clone();
        async move { tenant.deliveries(&product, &id, everything()).await.unwrap().0 }
    };
    assert!(left(&done).await.is_empty());
    assert_eq!(left(&young).await.len(), 1);
    // What waits for an active endpoint waits on; what waited too long for a paused one has failed.
    assert_eq!(left(&waiting).await[0].status, DeliveryStatus::Pending);
    let held = left(&held).await;
    assert_eq!(held.len(), 2);
    assert!(held.iter().all(|delivery| delivery.status == DeliveryStatus::Failed));
    assert!(held.iter().all(|delivery| delivery.error.as_deref() == Some("held_too_long")));
    assert_eq!(number(&world.store, "SELECT COUNT(*) AS number FROM attempts").await, 1);
    assert_eq!(number(&world.store, "SELECT COUNT(*) AS number FROM events").await, 4);
}

async fn what_is_sealed_is_sealed(database: Database) {
    let world = World::new(database, vec![0]);
    let endpoint = world.queue(1).await;
    let want = Want { endpoint_id: endpoint.id.clone(), count: 1 };
    let haul: Haul = world.store.claim(vec![want], "one".into(), START_MS + 30_000).await.unwrap();
    let body = haul.deliveries[0].body.clone().unwrap();
    assert!(std::str::from_utf8(&body).unwrap().contains("K7WX9"));
    let secret = haul.receivers[&endpoint.id].secret.clone().unwrap();
    let job = |reader: paperkey_kit::db::Reader| async move {
        let backend = reader.get_database_backend();
        let event = reader.query_one_raw(sql(backend, "SELECT body_sealed AS sealed FROM events", vec![])).await?;
        let secret =
            reader.query_one_raw(sql(backend, "SELECT secret_sealed AS sealed FROM endpoints", vec![])).await?;
        let sealed = |row: Option<sea_orm::QueryResult>| row.expect("it is there").try_get::<Vec<u8>>("", "sealed");
        Ok::<_, DbError>([sealed(event)?, sealed(secret)?])
    };
    let stored = world.store.database.read(job).await.unwrap();
    for (stored, plain) in stored.iter().zip(["K7WX9", secret.expose()]) {
        assert!(!stored.windows(plain.len()).any(|window| window == plain.as_bytes()));
    }
}
