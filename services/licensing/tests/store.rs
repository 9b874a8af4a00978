//! The store of licences, on both engines: slots under any concurrency, caches that never lie, one event an expiry.

mod common;

use std::{sync::Arc, time::Duration};

use common::World;

use paperkey_kit::{
    clock::Clock,
    db::{Database, DbError, Engine},
    principal::{Caller, Tenant},
    secrets::{Keyring, Purpose},
    store_suite,
    values::{Page, struct_of},
};
use paperkey_licensing::{
    domain::{
        Fault,
        license::{Changes, Draft, License, Status, Terms, Verdict},
        license_key::LicenseKey,
    },
    store::{Act, Failure, Filter, Store, TenantStore},
};
use paperkey_proto::{
    events::v1::Event,
    principal::v1::{Mode, Principal},
};
use prost::Message as _;
use sea_orm::{ConnectionTrait as _, Statement};
use serde_json::{Value, json};
use tokio::{sync::Barrier, task::JoinSet};

const PRODUCT: &str = "prod_1";
const START_MS: i64 = 1_790_000_000_000;
const DAY_MS: i64 = 86_400_000;

store_suite! {
    paperkey_migrations::licensing::Migrator;
    a_hundred_machines_on_three_slots_take_exactly_three,
    fifty_activations_of_one_machine_take_one_slot,
    a_storm_leaves_the_count_equal_to_the_rows,
    activating_again_refreshes_and_takes_no_slot,
    a_revoked_or_expired_licence_activates_nothing_and_releases_all,
    a_limit_below_what_is_activated_adds_none_and_removes_none,
    a_warm_validation_asks_no_database,
    a_revocation_is_seen_by_the_very_next_validation,
    a_remembered_absence_is_dropped_by_creation,
    another_process_is_heard_by_the_feed_and_not_trusted_without_it,
    each_expiry_is_told_once_whoever_sweeps_and_after_downtime,
    extending_arms_the_event_again,
    a_revoked_licence_expires_when_it_is_reinstated,
    many_sweeps_at_once_tell_each_expiry_once,
    ten_thousand_that_came_due_during_an_outage_are_told_in_bounded_portions,
    an_expiry_is_told_once_however_the_clock_goes,
    an_extension_that_races_the_sweep_is_told_and_armed,
    a_damaged_licence_holds_up_no_other,
    a_dead_process_of_before_the_clock_was_set_back_holds_up_no_expiry,
    revoking_twice_at_once_is_told_once,
    merges_of_metadata_follow_each_other,
    a_key_in_use_is_passed_over,
    no_licence_outlives_its_product,
    a_licence_made_while_its_product_is_deleted_goes_with_it,
    deleting_a_product_with_many_activations_ends,
    nothing_of_another_team_mode_or_product_is_reached,
    lists_are_filtered_and_paged,
    removing_an_activation_frees_its_slot,
    no_licence_names_a_client_that_is_gone_however_they_race,
    a_client_of_many_licences_goes_from_all,
    a_client_belongs_to_one_team_and_mode,
    a_deleted_team_leaves_nothing_and_the_others_all,
    a_licence_that_was_made_while_its_team_went_goes_when_it_is_told_again,
    the_schema_goes_back_and_forth_and_knows_whose_products_there_are,
}

fn tenant(team_id: &str, mode: Mode) -> Tenant {
    Tenant { team_id: team_id.to_owned(), mode }
}

fn home() -> Tenant {
    tenant("team_1", Mode::Live)
}

fn store(database: &Database, clock: &Clock) -> Store {
    Store::new(database.clone(), &Keyring::for_tests(), clock.clone())
}

fn all(store: &Store) -> TenantStore {
    store.of(home())
}

fn app(store: &Store) -> TenantStore {
    store.of(home()).within(Some(PRODUCT))
}

fn act() -> Act {
    let principal = Principal { id: "key_1".into(), ..Principal::default() };
    Act::by(&Caller { principal: Arc::new(principal), request_id: "req_1".into(), once: None }, "/test")
}

fn terms(max_activations: Option<i64>) -> Terms {
    Terms { email: None, client_id: None, max_activations, expires_at_ms: None, metadata: None }
}

async fn issue(store: &Store, terms: Terms) -> (License, LicenseKey) {
    let license = all(store).create(PRODUCT.into(), terms, act()).await.unwrap();
    let key = license.key.clone().unwrap();
    (license, key)
}

async fn activate(store: &Store, key: &LicenseKey, machine: &str) -> Result<(String, Option<i64>), Fault> {
    match app(store).activate(key.clone(), machine.into(), None, act()).await {
        Ok((activation, remaining)) => Ok((activation.id, remaining)),
        Err(failure) => Err(fault(failure)),
    }
}

async fn deactivate(store: &Store, key: &LicenseKey, machine: &str) -> Result<Option<i64>, Fault> {
    app(store).deactivate(key.clone(), machine.into(), act()).await.map_err(fault)
}

fn fault(failure: Failure) -> Fault {
    match failure {
        Failure::Fault(fault) => fault,
        other => panic!("not a refusal: {other:?}"),
    }
}

/// What a validation finds, as the rpc asks for it.
async fn verdict(store: &Store, clock: &Clock, key: &LicenseKey, machine: Option<&str>) -> Option<Verdict> {
    let license = app(store).find(key).await.unwrap()?;
    let activated = match machine {
        Some(machine) => Some(app(store).is_activated(&license.id, machine).await.unwrap()),
        None => None,
    };
    Some(license.standing.verdict(activated, clock.now_ms()))
}

async fn rows(database: &Database, sql: &'static str) -> Vec<i64> {
    let job = database.read(move |reader| async move {
        let statement = Statement::from_string(reader.get_database_backend(), sql);
        let rows = reader.query_all_raw(statement).await?;
        Ok::<_, DbError>(rows.iter().map(|row| row.try_get::<i64>("", "n").unwrap()).collect())
    });
    job.await.unwrap()
}

async fn number(database: &Database, sql: &'static str) -> i64 {
    rows(database, sql).await[0]
}

/// All events that were recorded so far.
async fn events(database: &Database) -> Vec<Event> {
    let job = database.read(move |reader| async move {
        let sql = "SELECT id, payload FROM outbox WHERE target = 'webhook' ORDER BY seq";
        let statement = Statement::from_string(reader.get_database_backend(), sql);
        let rows = reader.query_all_raw(statement).await?;
        let row = |row: &sea_orm::QueryResult| {
            (row.try_get::<String>("", "id").unwrap(), row.try_get::<Vec<u8>>("", "payload").unwrap())
        };
        Ok::<_, DbError>(rows.iter().map(row).collect::<Vec<_>>())
    });
    let sealer = Keyring::for_tests().sealer(Purpose::Outbox);
    let open =
        |(id, payload): (String, Vec<u8>)| Event::decode(sealer.open(&id, &payload).unwrap().as_slice()).unwrap();
    job.await.unwrap().into_iter().map(open).collect()
}

async fn topics(database: &Database) -> Vec<String> {
    events(database).await.into_iter().map(|event| event.topic).collect()
}

async fn told(database: &Database, topic: &str) -> usize {
    topics(database).await.iter().filter(|told| *told == topic).count()
}

async fn a_hundred_machines_on_three_slots_take_exactly_three(database: Database) {
    // Two stores are two processes: nothing but the database may hold the limit.
    let stores = [store(&database, &Clock::system()), store(&database, &Clock::system())];
    let (_, key) = issue(&stores[0], terms(Some(3))).await;
    let start = Arc::new(Barrier::new(100));
    let mut machines = JoinSet::new();
    for machine in 0..100 {
        let (store, key, start) = (stores[machine % 2].clone(), key.clone(), Arc::clone(&start));
        machines.spawn(async move {
            start.wait().await;
            activate(&store, &key, &format!("machine {machine}")).await
        });
    }
    let outcomes = machines.join_all().await;
    let mut remaining: Vec<_> = outcomes.iter().filter_map(|outcome| outcome.as_ref().ok()?.1).collect();
    remaining.sort_unstable();
    assert_eq!(remaining, [0, 1, 2]);
    assert!(outcomes.iter().all(|outcome| outcome.is_ok() || outcome == &Err(Fault::LimitReached)));
    assert_eq!(number(&database, "SELECT activations_count AS n FROM licenses").await, 3);
    assert_eq!(number(&database, "SELECT COUNT(*) AS n FROM activations").await, 3);
    assert_eq!(told(&database, "activation.created").await, 3);
}

async fn fifty_activations_of_one_machine_take_one_slot(database: Database) {
    // Several times where the second to come finds the slot taken, with connections that are warm by then.
    let rounds = [None, Some(5), Some(1), Some(1), Some(1), Some(1), Some(1), Some(1)];
    for slots in rounds {
        let stores = [store(&database, &Clock::system()), store(&database, &Clock::system())];
        let (license, key) = issue(&stores[0], terms(slots)).await;
        let start = Arc::new(Barrier::new(50));
        let mut calls = JoinSet::new();
        for call in 0..50 {
            let (store, key, start) = (stores[call % 2].clone(), key.clone(), Arc::clone(&start));
            calls.spawn(async move {
                start.wait().await;
                activate(&store, &key, "one").await.unwrap()
            });
        }
        let mut answers = calls.join_all().await;
        answers.dedup();
        assert_eq!(answers.len(), 1, "all are told the same: {answers:?}");
        assert_eq!(answers[0].1, slots.map(|slots| slots - 1));
        let (license, activations) = all(&stores[0]).get(&license.id).await.unwrap();
        assert_eq!((license.standing.activations_count, activations.len()), (1, 1));
    }
    assert_eq!(told(&database, "activation.created").await, rounds.len());
}

async fn a_storm_leaves_the_count_equal_to_the_rows(database: Database) {
    let stores = [store(&database, &Clock::system()), store(&database, &Clock::system())];
    let (_, key) = issue(&stores[0], terms(Some(3))).await;
    let mut tasks = JoinSet::new();
    for task in 0..12_usize {
        let (store, key) = (stores[task % 2].clone(), key.clone());
        tasks.spawn(async move {
            for step in 0..25_usize {
                let machine = format!("machine {}", (task * 7 + step * 3) % 6);
                if (task + step).is_multiple_of(2) {
                    let outcome = activate(&store, &key, &machine).await;
                    assert!(outcome.is_ok() || outcome == Err(Fault::LimitReached), "{outcome:?}");
                } else {
                    let outcome = deactivate(&store, &key, &machine).await;
                    assert!(outcome.is_ok() || outcome == Err(Fault::NoSuchActivation), "{outcome:?}");
                }
            }
        });
    }
    tasks.join_all().await;
    let count = number(&database, "SELECT activations_count AS n FROM licenses").await;
    assert_eq!(count, number(&database, "SELECT COUNT(*) AS n FROM activations").await);
    assert!((0..=3).contains(&count));
    let (created, removed) = (told(&database, "activation.created").await, told(&database, "activation.removed").await);
    assert_eq!(created - removed, usize::try_from(count).unwrap());
}

async fn activating_again_refreshes_and_takes_no_slot(database: Database) {
    let (clock, hand) = Clock::manual(START_MS);
    let store = store(&database, &clock);
    let (license, key) = issue(&store, terms(Some(2))).await;
    let name = |name: &str| Some(name.to_owned());
    let (first, _) = app(&store).activate(key.clone(), "one".into(), name("Desk"), act()).await.unwrap();
    hand.advance_ms(5_000);
    let (again, remaining) = app(&store).activate(key.clone(), "one".into(), None, act()).await.unwrap();
    assert_eq!(again, paperkey_licensing::domain::license::Activation { last_check_at_ms: START_MS + 5_000, ..first });
    assert_eq!(remaining, Some(1));
    let (renamed, _) = app(&store).activate(key, "one".into(), name("Lap"), act()).await.unwrap();
    assert_eq!(renamed.name.as_deref(), Some("Lap"));
    let (_, activations) = all(&store).get(&license.id).await.unwrap();
    assert_eq!(activations, [renamed]);
    assert_eq!(topics(&database).await, ["license.created", "activation.created"]);
}

async fn a_revoked_or_expired_licence_activates_nothing_and_releases_all(database: Database) {
    let (clock, hand) = Clock::manual(START_MS);
    let store = store(&database, &clock);
    let (license, key) = issue(&store, Terms { expires_at_ms: Some(START_MS + 10), ..terms(Some(3)) }).await;
    for machine in ["one", "two"] {
        activate(&store, &key, machine).await.unwrap();
    }
    all(&store).revoke(&license.id, act()).await.unwrap();
    for machine in ["one", "three"] {
        assert_eq!(activate(&store, &key, machine).await, Err(Fault::Revoked), "{machine}");
    }
    assert_eq!(deactivate(&store, &key, "one").await, Ok(Some(2)));
    all(&store).reinstate(&license.id, act()).await.unwrap();
    hand.advance_ms(10);
    for machine in ["two", "three"] {
        assert_eq!(activate(&store, &key, machine).await, Err(Fault::Expired), "{machine}");
    }
    assert_eq!(deactivate(&store, &key, "two").await, Ok(Some(3)));
    assert_eq!(deactivate(&store, &key, "two").await, Err(Fault::NoSuchActivation));
    assert_eq!(number(&database, "SELECT activations_count AS n FROM licenses").await, 0);
}

async fn a_limit_below_what_is_activated_adds_none_and_removes_none(database: Database) {
    let store = store(&database, &Clock::system());
    let (license, key) = issue(&store, terms(None)).await;
    for machine in ["one", "two", "three"] {
        assert_eq!(activate(&store, &key, machine).await.unwrap().1, None, "unlimited");
    }
    let limit = |max| Changes { max_activations: Some(Some(max)), ..Changes::default() };
    all(&store).update(&license.id, limit(1), act()).await.unwrap();
    assert_eq!(activate(&store, &key, "one").await.unwrap().1, Some(0));
    assert_eq!(activate(&store, &key, "four").await, Err(Fault::LimitReached));
    assert_eq!(deactivate(&store, &key, "two").await, Ok(Some(0)));
    assert_eq!(deactivate(&store, &key, "three").await, Ok(Some(0)));
    assert_eq!(deactivate(&store, &key, "one").await, Ok(Some(1)));
    all(&store).update(&license.id, limit(0), act()).await.unwrap();
    assert_eq!(activate(&store, &key, "one").await, Err(Fault::LimitReached));
}

async fn a_warm_validation_asks_no_database(database: Database) {
    let (clock, _) = Clock::manual(START_MS);
    let store = store(&database, &clock);
    let (_, key) = issue(&store, terms(Some(1))).await;
    let unknown = LicenseKey::random();
    activate(&store, &key, "one").await.unwrap();
    store.poll_changes().await.unwrap();
    let round = || async {
        assert_eq!(verdict(&store, &clock, &key, None).await, Some(Verdict::Valid));
        assert_eq!(verdict(&store, &clock, &key, Some("one")).await, Some(Verdict::Valid));
        assert_eq!(verdict(&store, &clock, &key, Some("two")).await, Some(Verdict::LimitReached));
        assert_eq!(verdict(&store, &clock, &unknown, Some("one")).await, None);
    };
    round().await;
    let before = database.stats();
    for _ in 0..10 {
        round().await;
    }
    assert_eq!(database.stats(), before);
}

async fn a_revocation_is_seen_by_the_very_next_validation(database: Database) {
    let (clock, hand) = Clock::manual(START_MS);
    let store = store(&database, &clock);
    let (license, key) = issue(&store, terms(Some(1))).await;
    store.poll_changes().await.unwrap();
    for _ in 0..20 {
        assert_eq!(verdict(&store, &clock, &key, Some("one")).await, Some(Verdict::Valid));
        all(&store).revoke(&license.id, act()).await.unwrap();
        assert_eq!(verdict(&store, &clock, &key, Some("one")).await, Some(Verdict::Revoked));
        all(&store).reinstate(&license.id, act()).await.unwrap();
        activate(&store, &key, "two").await.unwrap();
        assert_eq!(verdict(&store, &clock, &key, Some("one")).await, Some(Verdict::LimitReached));
        assert_eq!(verdict(&store, &clock, &key, Some("two")).await, Some(Verdict::Valid));
        deactivate(&store, &key, "two").await.unwrap();
        assert_eq!(verdict(&store, &clock, &key, Some("two")).await, Some(Verdict::Valid), "a slot is free");
    }
    // Time alone needs nobody to say so.
    let soon = Changes { expires_at_ms: Some(Some(START_MS + 1)), ..Changes::default() };
    all(&store).update(&license.id, soon, act()).await.unwrap();
    assert_eq!(verdict(&store, &clock, &key, None).await, Some(Verdict::Valid));
    hand.advance_ms(1);
    assert_eq!(verdict(&store, &clock, &key, None).await, Some(Verdict::Expired));
}

async fn a_remembered_absence_is_dropped_by_creation(database: Database) {
    let (clock, _) = Clock::manual(START_MS);
    let store = store(&database, &clock);
    store.poll_changes().await.unwrap();
    let key = LicenseKey::random();
    assert_eq!(verdict(&store, &clock, &key, None).await, None);
    let given = key.clone();
    all(&store).create_with(PRODUCT.into(), terms(None), move || given.clone(), act()).await.unwrap();
    assert_eq!(verdict(&store, &clock, &key, None).await, Some(Verdict::Valid));
}

async fn another_process_is_heard_by_the_feed_and_not_trusted_without_it(database: Database) {
    if database.engine() == Engine::Sqlite {
        // One process owns the file.
        return;
    }
    let (clock, hand) = Clock::manual(START_MS);
    let (here, there) = (store(&database, &clock), store(&database, &clock));
    let (license, key) = issue(&there, terms(Some(1))).await;
    here.poll_changes().await.unwrap();
    assert_eq!(verdict(&here, &clock, &key, Some("one")).await, Some(Verdict::Valid));

    all(&there).revoke(&license.id, act()).await.unwrap();
    assert_eq!(verdict(&here, &clock, &key, None).await, Some(Verdict::Valid), "not heard yet");
    here.poll_changes().await.unwrap();
    assert_eq!(verdict(&here, &clock, &key, None).await, Some(Verdict::Revoked));

    all(&there).reinstate(&license.id, act()).await.unwrap();
    hand.advance_ms(901);
    assert_eq!(verdict(&here, &clock, &key, None).await, Some(Verdict::Valid), "a silent feed is no feed");
    let before = database.stats();
    assert_eq!(verdict(&here, &clock, &key, None).await, Some(Verdict::Valid));
    assert!(database.stats().read_jobs > before.read_jobs);

    here.poll_changes().await.unwrap();
    assert_eq!(verdict(&here, &clock, &key, Some("one")).await, Some(Verdict::Valid));
    activate(&there, &key, "two").await.unwrap();
    here.poll_changes().await.unwrap();
    assert_eq!(verdict(&here, &clock, &key, Some("one")).await, Some(Verdict::LimitReached));
    assert_eq!(verdict(&here, &clock, &key, Some("two")).await, Some(Verdict::Valid));

    let unknown = LicenseKey::random();
    assert_eq!(verdict(&here, &clock, &unknown, None).await, None);
    let given = unknown.clone();
    all(&there).create_with(PRODUCT.into(), terms(None), move || given.clone(), act()).await.unwrap();
    assert!(activate(&here, &unknown, "one").await.is_ok(), "activation does not believe in absence");
    here.poll_changes().await.unwrap();
    assert_eq!(verdict(&here, &clock, &unknown, None).await, Some(Verdict::Valid));
}

async fn each_expiry_is_told_once_whoever_sweeps_and_after_downtime(database: Database) {
    let (clock, hand) = Clock::manual(START_MS);
    let stores = [store(&database, &clock), store(&database, &clock)];
    for number in 0..250 {
        let expires_at_ms = Some(START_MS + 1 + number * 100);
        issue(&stores[0], Terms { expires_at_ms, ..terms(None) }).await;
    }
    issue(&stores[0], terms(None)).await;
    assert_eq!(stores[0].expire_due().await.unwrap(), 0);
    hand.advance_ms(9 * DAY_MS);
    let mut sweeps = JoinSet::new();
    for sweep in 0..4 {
        let store = stores[sweep % 2].clone();
        sweeps.spawn(async move {
            loop {
                match store.expire_due().await {
                    Ok(told) => return told,
                    // Two sweeps may wait for each other: one of them goes again.
                    Err(error) => assert!(error.is_retryable(), "{error}"),
                }
            }
        });
    }
    sweeps.join_all().await;
    assert_eq!(stores[1].expire_due().await.unwrap(), 0);
    let events = events(&database).await;
    let mut expired: Vec<String> = events
        .iter()
        .filter(|event| event.topic == "license.expired")
        .map(|event| serde_json::from_str::<Value>(&event.data_json).unwrap()["id"].to_string())
        .collect();
    assert_eq!(expired.len(), 250);
    expired.sort_unstable();
    expired.dedup();
    assert_eq!(expired.len(), 250);
    let last = events.last().unwrap();
    assert_eq!((last.team_id.as_str(), last.mode(), last.product_id.as_str()), ("team_1", Mode::Live, PRODUCT));
    assert_eq!(serde_json::from_str::<Value>(&last.data_json).unwrap()["status"], "expired");
}

async fn extending_arms_the_event_again(database: Database) {
    let (clock, hand) = Clock::manual(START_MS);
    let store = store(&database, &clock);
    let (license, key) = issue(&store, Terms { expires_at_ms: Some(START_MS + 10), ..terms(None) }).await;
    let until = |at_ms: Option<i64>| Changes { expires_at_ms: Some(at_ms), ..Changes::default() };
    let update = |changes| async { all(&store).update(&license.id, changes, act()).await.unwrap() };
    hand.advance_ms(10);
    assert_eq!(store.expire_due().await.unwrap(), 1);

    // Moved within the past: it was told.
    update(until(Some(START_MS + 5))).await;
    assert_eq!(store.expire_due().await.unwrap(), 0);

    let extended = update(until(Some(START_MS + 20))).await;
    assert_eq!(extended.standing.status(clock.now_ms()), Status::Active);
    assert_eq!(verdict(&store, &clock, &key, None).await, Some(Verdict::Valid));
    assert_eq!(store.expire_due().await.unwrap(), 0);
    hand.advance_ms(10);
    assert_eq!(store.expire_due().await.unwrap(), 1);

    // Extended, expired, and extended again before any sweep: told by the change.
    update(until(Some(START_MS + 30))).await;
    hand.advance_ms(10);
    update(until(None)).await;
    assert_eq!(store.expire_due().await.unwrap(), 0);
    assert_eq!(told(&database, "license.expired").await, 3);
    assert_eq!(topics(&database).await.last().map(String::as_str), Some("license.updated"));
}

async fn a_revoked_licence_expires_when_it_is_reinstated(database: Database) {
    let (clock, hand) = Clock::manual(START_MS);
    let store = store(&database, &clock);
    let (license, key) = issue(&store, Terms { expires_at_ms: Some(START_MS + 10), ..terms(None) }).await;
    all(&store).revoke(&license.id, act()).await.unwrap();
    hand.advance_ms(DAY_MS);
    assert_eq!(store.expire_due().await.unwrap(), 0);
    let reinstated = all(&store).reinstate(&license.id, act()).await.unwrap();
    assert_eq!(reinstated.standing.status(clock.now_ms()), Status::Expired);
    assert_eq!(verdict(&store, &clock, &key, None).await, Some(Verdict::Expired));
    assert_eq!(store.expire_due().await.unwrap(), 1);
    let told = ["license.created", "license.revoked", "license.reinstated", "license.expired"];
    assert_eq!(topics(&database).await, told);
}

/// So many licences that end at that time.
async fn issue_all(store: &Store, count: usize, expires_at_ms: i64) -> Vec<License> {
    let mut licenses = Vec::new();
    while licenses.len() < count {
        let terms = Terms { expires_at_ms: Some(expires_at_ms), ..terms(None) };
        let drafts = vec![
            Draft { product_id: PRODUCT.into(), terms, key: None, revoked_at_ms: None };
            (count - licenses.len()).min(1_000)
        ];
        licenses.extend(all(store).create_all(drafts, act()).await.unwrap());
    }
    licenses
}

/// The ids of the licences whose expiry was told, sorted; each as often as it was told.
async fn expired(database: &Database) -> Vec<String> {
    let told = events(database).await.into_iter().filter(|event| event.topic == "license.expired");
    let id = |event: Event| serde_json::from_str::<Value>(&event.data_json).unwrap()["id"].as_str().unwrap().to_owned();
    let mut ids: Vec<_> = told.map(id).collect();
    ids.sort_unstable();
    ids
}

fn sorted_ids(licenses: &[License]) -> Vec<String> {
    let mut ids: Vec<_> = licenses.iter().map(|license| license.id.clone()).collect();
    ids.sort_unstable();
    ids
}

async fn many_sweeps_at_once_tell_each_expiry_once(database: Database) {
    let (clock, hand) = Clock::manual(START_MS);
    let stores = [store(&database, &clock), store(&database, &clock)];
    for round in 1..=3 {
        let licenses = issue_all(&stores[0], 1_200, clock.now_ms() + 1).await;
        hand.advance_ms(1);
        let start = Arc::new(Barrier::new(24));
        let mut sweeps = JoinSet::new();
        for sweep in 0..24 {
            let (store, start) = (stores[sweep % 2].clone(), Arc::clone(&start));
            sweeps.spawn(async move {
                start.wait().await;
                // Nobody waits for anybody, so nobody is refused either.
                store.expire_due().await.unwrap()
            });
        }
        assert_eq!(sweeps.join_all().await.iter().sum::<u64>(), 1_200);
        assert_eq!(stores[1].expire_due().await.unwrap(), 0);
        let told = expired(&database).await;
        assert_eq!(told.len(), 1_200 * round);
        assert!(sorted_ids(&licenses).iter().all(|id| told.binary_search(id).is_ok()));
    }
    let mut told = expired(&database).await;
    told.dedup();
    assert_eq!(told.len(), 3_600);
}

async fn ten_thousand_that_came_due_during_an_outage_are_told_in_bounded_portions(database: Database) {
    let (clock, hand) = Clock::manual(START_MS);
    let store = store(&database, &clock);
    let licenses = issue_all(&store, 10_000, START_MS + 1).await;
    hand.advance_ms(5 * DAY_MS);
    let before = database.stats();
    assert_eq!(store.expire_due().await.unwrap(), 10_000);
    let jobs = database.stats().write_jobs - before.write_jobs;
    assert!((10..=200).contains(&jobs), "{jobs} transactions");
    assert_eq!(expired(&database).await, sorted_ids(&licenses));
}

async fn an_expiry_is_told_once_however_the_clock_goes(database: Database) {
    let (clock, hand) = Clock::manual(START_MS);
    let store = store(&database, &clock);
    let licenses = issue_all(&store, 3, START_MS + DAY_MS).await;
    let until = |at_ms: i64| Changes { expires_at_ms: Some(Some(at_ms)), ..Changes::default() };
    // Forward by a jump, and back again, and then by itself.
    for (moved_ms, told) in [(2 * DAY_MS, 3), (-2 * DAY_MS, 0), (DAY_MS - 1, 0), (1, 0), (DAY_MS, 0), (-5 * DAY_MS, 0)]
    {
        hand.advance_ms(moved_ms);
        assert_eq!(store.expire_due().await.unwrap(), told, "by {moved_ms}");
    }
    assert_eq!(expired(&database).await, sorted_ids(&licenses));
    // Early by the clock of then: whoever is given another end is told of that one.
    all(&store).update(&licenses[0].id, until(START_MS + 2 * DAY_MS), act()).await.unwrap();
    hand.advance_ms(10 * DAY_MS);
    assert_eq!(store.expire_due().await.unwrap(), 1);
    assert_eq!(store.expire_due().await.unwrap(), 0);
}

async fn an_extension_that_races_the_sweep_is_told_and_armed(database: Database) {
    let (clock, hand) = Clock::manual(START_MS);
    let store = store(&database, &clock);
    let (license, _) = issue(&store, Terms { expires_at_ms: Some(START_MS + 1), ..terms(None) }).await;
    for round in 1..=30 {
        hand.advance_ms(1);
        let start = Arc::new(Barrier::new(4));
        let mut sweeps = JoinSet::new();
        for _ in 0..3 {
            let (store, start) = (store.clone(), Arc::clone(&start));
            sweeps.spawn(async move {
                start.wait().await;
                store.expire_due().await.unwrap()
            });
        }
        start.wait().await;
        let until = Changes { expires_at_ms: Some(Some(clock.now_ms() + 1)), ..Changes::default() };
        let extended = all(&store).update(&license.id, until, act()).await.unwrap();
        assert_eq!(extended.standing.status(clock.now_ms()), Status::Active);
        sweeps.join_all().await;
        // Told by the one or by the other, and armed for its new end.
        assert_eq!(told(&database, "license.expired").await, round);
        assert_eq!(store.expire_due().await.unwrap(), 0);
    }
}

async fn a_damaged_licence_holds_up_no_other(database: Database) {
    let (clock, hand) = Clock::manual(START_MS);
    let store = store(&database, &clock);
    let metadata = Some(json!({"kept": 1}));
    let mut ids = Vec::new();
    for _ in 0..4 {
        let terms = Terms { expires_at_ms: Some(START_MS + 1), metadata: metadata.clone(), ..terms(None) };
        ids.push(issue(&store, terms).await.0.id);
    }
    for (id, damage) in ids.iter().zip(["metadata = '{nonsense'", "key_sealed = key_hash", "mode = 'neither'"]) {
        let sql = format!("UPDATE licenses SET {damage} WHERE id = '{id}'");
        let job = database.write(move |tx| async move {
            tx.execute_raw(Statement::from_string(tx.get_database_backend(), sql)).await?;
            Ok::<_, DbError>(())
        });
        job.await.unwrap();
    }
    hand.advance_ms(1);
    assert_eq!(store.expire_due().await.unwrap(), 4);
    assert_eq!(store.expire_due().await.unwrap(), 0);
    let mut told = Vec::new();
    for event in events(&database).await.into_iter().filter(|event| event.topic == "license.expired") {
        let data: Value = serde_json::from_str(&event.data_json).unwrap();
        told.push((data["id"].as_str().unwrap().to_owned(), data["key"].is_null(), data["metadata"].is_null()));
    }
    told.sort_unstable();
    let mut expected = [(ids[0].clone(), false, true), (ids[1].clone(), true, false), (ids[3].clone(), false, false)];
    expected.sort_unstable();
    assert_eq!(told, expected);

    // What can be read of them is listed, and a change leaves alone what it does not change.
    let page = Page::new(None, "").unwrap();
    assert_eq!(all(&store).list(Filter::default(), page).await.unwrap().0.len(), 3);
    let change = Changes { email: Some(Some("a@b.cd".into())), ..Changes::default() };
    assert_eq!(all(&store).update(&ids[0], change, act()).await.unwrap().metadata, None);
    let kept = "SELECT COUNT(*) AS n FROM licenses WHERE metadata = '{nonsense'";
    assert_eq!(number(&database, kept).await, 1);
}

async fn a_dead_process_of_before_the_clock_was_set_back_holds_up_no_expiry(database: Database) {
    let (clock, _) = Clock::manual(START_MS);
    issue_all(&store(&database, &clock), 3, START_MS - 1).await;
    // Leases go by the clock of the database.
    let until_ms = database.clock().now_ms() + DAY_MS;
    let job = database.write(move |tx| async move {
        let sql = format!("INSERT INTO leases (name, holder, until_ms) VALUES ('license-expiry', 'dead', {until_ms})");
        tx.execute_raw(Statement::from_string(tx.get_database_backend(), sql)).await?;
        Ok::<_, DbError>(())
    });
    job.await.unwrap();
    let mut world = World::on(database);
    let mut told = 0;
    while told < 3 {
        let (topic, _) = tokio::time::timeout(Duration::from_mins(1), world.event()).await.unwrap();
        told += usize::from(topic == "license.expired");
    }
    world.end().await;
}

async fn revoking_twice_at_once_is_told_once(database: Database) {
    let store = store(&database, &Clock::system());
    let (license, _) = issue(&store, terms(None)).await;
    for revoke in [true, false] {
        let mut calls = JoinSet::new();
        for _ in 0..10 {
            let (store, id) = (store.clone(), license.id.clone());
            calls.spawn(async move {
                let turned =
                    if revoke { all(&store).revoke(&id, act()).await } else { all(&store).reinstate(&id, act()).await };
                turned.unwrap().standing.revoked_at_ms.is_some()
            });
        }
        assert_eq!(calls.join_all().await, [revoke; 10]);
    }
    assert_eq!(topics(&database).await, ["license.created", "license.revoked", "license.reinstated"]);
    assert_eq!(number(&database, "SELECT COUNT(*) AS n FROM audit_entries").await, 3);
}

async fn merges_of_metadata_follow_each_other(database: Database) {
    let store = store(&database, &Clock::system());
    let (license, _) = issue(&store, Terms { metadata: Some(json!({"kept": 1})), ..terms(None) }).await;
    let mut calls = JoinSet::new();
    for number in 0..20 {
        let (store, id) = (store.clone(), license.id.clone());
        calls.spawn(async move {
            let patch = struct_of(&json!({format!("m{number}"): number}));
            let changes = Changes { metadata: Some(patch), ..Changes::default() };
            all(&store).update(&id, changes, act()).await.unwrap();
        });
    }
    calls.join_all().await;
    let (merged, _) = all(&store).get(&license.id).await.unwrap();
    assert_eq!(merged.metadata.unwrap().as_object().unwrap().len(), 21);

    let told_before = topics(&database).await.len();
    let same = Changes { metadata: Some(struct_of(&json!({"kept": 1}))), ..Changes::default() };
    let untouched = all(&store).update(&license.id, same, act()).await.unwrap();
    assert_eq!(untouched.updated_at_ms, merged.updated_at_ms);
    assert_eq!(topics(&database).await.len(), told_before, "a change that changes nothing is not told");
}

async fn a_key_in_use_is_passed_over(database: Database) {
    let store = store(&database, &Clock::system());
    let (_, taken) = issue(&store, terms(None)).await;
    let free = LicenseKey::random();
    let mut keys = vec![free.clone(), taken.clone(), taken.clone()];
    let next = move || keys.pop().unwrap();
    let license = all(&store).create_with(PRODUCT.into(), terms(None), next, act()).await.unwrap();
    assert_eq!(license.key, Some(free));
    let always = move || taken.clone();
    let failure = all(&store).create_with(PRODUCT.into(), terms(None), always, act()).await.unwrap_err();
    assert!(matches!(failure, Failure::Database(DbError::Internal(_))));
    assert_eq!(number(&database, "SELECT COUNT(*) AS n FROM licenses").await, 2);
}

async fn no_licence_outlives_its_product(database: Database) {
    let store = store(&database, &Clock::system());
    store.poll_changes().await.unwrap();
    let (_, key) = issue(&store, terms(None)).await;
    activate(&store, &key, "one").await.unwrap();
    let other = all(&store).create("prod_2".into(), terms(None), act()).await.unwrap();
    let asked = all(&store).before_learning();
    all(&store).learn_product(PRODUCT, asked);
    assert!(all(&store).knows_product(PRODUCT));

    all(&store).forget_product(PRODUCT, act()).await.unwrap();
    assert_eq!(number(&database, "SELECT COUNT(*) AS n FROM licenses WHERE product_id = 'prod_1'").await, 0);
    assert_eq!(number(&database, "SELECT COUNT(*) AS n FROM activations").await, 0);
    assert!(!all(&store).knows_product(PRODUCT));
    assert!(app(&store).find(&key).await.unwrap().is_none());
    assert_eq!(activate(&store, &key, "one").await, Err(Fault::NoSuchLicense));
    let refused = all(&store).create(PRODUCT.into(), terms(None), act()).await.unwrap_err();
    assert_eq!(fault(refused), Fault::NoSuchProduct);
    assert!(all(&store).get(&other.id).await.is_ok());

    // Told again, and told nonsense.
    for id in [PRODUCT, "prod_never", "", "a\0b"] {
        all(&store).forget_product(id, act()).await.unwrap();
    }
}

async fn a_licence_made_while_its_product_is_deleted_goes_with_it(database: Database) {
    let store = store(&database, &Clock::system());
    let mut created = 0;
    for round in 0..25 {
        let product = format!("prod_{round}");
        let start = Arc::new(Barrier::new(7));
        let mut creations = JoinSet::new();
        for _ in 0..6 {
            let (store, start, product) = (store.clone(), Arc::clone(&start), product.clone());
            creations.spawn(async move {
                start.wait().await;
                let outcome = all(&store).create(product, terms(None), act()).await;
                outcome.map(drop).map_err(fault)
            });
        }
        start.wait().await;
        all(&store).forget_product(&product, act()).await.unwrap();
        let outcomes = creations.join_all().await;
        assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(()) | Err(Fault::NoSuchProduct))), "{outcomes:?}");
        created += outcomes.iter().filter(|outcome| outcome.is_ok()).count();
    }
    assert_eq!(number(&database, "SELECT COUNT(*) AS n FROM licenses").await, 0);
    assert_eq!(told(&database, "license.created").await, created);
}

async fn deleting_a_product_with_many_activations_ends(database: Database) {
    let store = store(&database, &Clock::system());
    let (_, key) = issue(&store, terms(None)).await;
    for machine in 0..450 {
        activate(&store, &key, &format!("machine {machine}")).await.unwrap();
    }
    for _ in 0..120 {
        issue(&store, terms(None)).await;
    }
    all(&store).forget_product(PRODUCT, act()).await.unwrap();
    assert_eq!(number(&database, "SELECT COUNT(*) AS n FROM licenses").await, 0);
    assert_eq!(number(&database, "SELECT COUNT(*) AS n FROM activations").await, 0);
}

async fn nothing_of_another_team_mode_or_product_is_reached(database: Database) {
    let store = store(&database, &Clock::system());
    store.poll_changes().await.unwrap();
    let (license, key) = issue(&store, terms(Some(5))).await;
    let (activation, _) = app(&store).activate(key.clone(), "one".into(), None, act()).await.unwrap();
    // Remembered for its own, so that a memory which forgot whose it is would show.
    assert!(app(&store).find(&key).await.unwrap().is_some());
    let strangers = [
        store.of(tenant("team_2", Mode::Live)).within(Some(PRODUCT)),
        store.of(tenant("team_1", Mode::Test)).within(Some(PRODUCT)),
        store.of(home()).within(Some("prod_2")),
    ];
    for stranger in strangers {
        let id = license.id.as_str();
        assert!(stranger.find(&key).await.unwrap().is_none());
        let activate = stranger.activate(key.clone(), "two".into(), None, act()).await;
        assert_eq!(fault(activate.unwrap_err()), Fault::NoSuchLicense);
        let deactivate = stranger.deactivate(key.clone(), "one".into(), act()).await;
        assert_eq!(fault(deactivate.unwrap_err()), Fault::NoSuchLicense);
        assert_eq!(fault(stranger.get(id).await.unwrap_err()), Fault::NoSuchLicense);
        assert_eq!(fault(stranger.revoke(id, act()).await.unwrap_err()), Fault::NoSuchLicense);
        assert_eq!(fault(stranger.reinstate(id, act()).await.unwrap_err()), Fault::NoSuchLicense);
        let update = stranger.update(id, Changes { email: Some(None), ..Changes::default() }, act()).await;
        assert_eq!(fault(update.unwrap_err()), Fault::NoSuchLicense);
        let delete = stranger.delete_activation(id, &activation.id, act()).await;
        assert_eq!(fault(delete.unwrap_err()), Fault::NoSuchLicense);
        for query in [None, Some(id.to_owned()), Some(key.to_string())] {
            let filter = Filter { query, ..Filter::default() };
            let page = Page::new(None, "").unwrap();
            assert!(stranger.list(filter, page).await.unwrap().0.is_empty());
        }
    }
    let (license, activations) = all(&store).get(&license.id).await.unwrap();
    assert_eq!((license.standing.activations_count, activations.len()), (1, 1));
    assert_eq!(topics(&database).await, ["license.created", "activation.created"]);
}

async fn lists_are_filtered_and_paged(database: Database) {
    let (clock, hand) = Clock::manual(START_MS);
    let store = store(&database, &clock);
    let mut ids = Vec::new();
    for (email, client, product, expires_at_ms) in [
        (Some("Ann@Example.com"), Some("cli_1"), PRODUCT, None),
        (Some("a%n@example.com"), Some("cli_2"), PRODUCT, None),
        (Some("a_n@example.com"), None, PRODUCT, Some(START_MS + 5)),
        (None, Some("cli_1"), "prod_2", None),
        (Some("b\\n@example.com"), None, "prod_2", None),
    ] {
        hand.advance_ms(1);
        let terms =
            Terms { email: email.map(Into::into), client_id: client.map(Into::into), expires_at_ms, ..terms(None) };
        ids.push(all(&store).create(product.into(), terms, act()).await.unwrap());
    }
    all(&store).revoke(&ids[1].id, act()).await.unwrap();
    let list = |filter: Filter| {
        let (store, ids) = (store.clone(), ids.clone());
        async move {
            let (found, _) = all(&store).list(filter, Page::new(None, "").unwrap()).await.unwrap();
            let place = |license: License| ids.iter().position(|known| known.id == license.id).unwrap();
            found.into_iter().map(place).collect::<Vec<_>>()
        }
    };
    let some = |text: &str| Some(text.to_owned());
    let query = |text: &str| Filter { query: Some(text.to_owned()), ..Filter::default() };
    assert_eq!(list(Filter::default()).await, [4, 3, 2, 1, 0]);
    assert_eq!(list(Filter { product_id: some("prod_2"), ..Filter::default() }).await, [4, 3]);
    assert_eq!(list(Filter { client_id: some("cli_1"), ..Filter::default() }).await, [3, 0]);
    assert_eq!(list(Filter { email: some("ANN@example.COM"), ..Filter::default() }).await, [0]);
    assert_eq!(list(query("A")).await, [2, 1, 0]);
    assert_eq!(list(query("ann@")).await, [0]);
    assert_eq!(list(query("a%")).await, [1], "a wildcard is a character");
    assert_eq!(list(query("a_")).await, [2], "a wildcard is a character");
    assert_eq!(list(query("b\\")).await, [4]);
    assert_eq!(list(query("%")).await, [0; 0]);
    assert_eq!(list(query("' OR 1=1 --")).await, [0; 0]);
    assert_eq!(list(query(&ids[3].id)).await, [3]);
    let typed = ids[3].key.as_ref().unwrap().to_string().to_lowercase().replace('-', " ");
    assert_eq!(list(query(&typed)).await, [3]);

    hand.advance_ms(10);
    let status = |status| Filter { status: Some(status), ..Filter::default() };
    assert_eq!(list(status(Status::Active)).await, [4, 3, 0]);
    assert_eq!(list(status(Status::Expired)).await, [2]);
    assert_eq!(list(status(Status::Revoked)).await, [1]);
    let both = Filter { product_id: some(PRODUCT), ..status(Status::Active) };
    assert_eq!(list(both).await, [0]);

    let mut seen = Vec::new();
    let mut token = String::new();
    loop {
        let page = Page::new(Some(2), &token).unwrap();
        let (found, next) = all(&store).list(Filter::default(), page).await.unwrap();
        assert!(found.len() <= 2);
        seen.extend(found.into_iter().map(|license| license.id));
        let Some(next) = next else { break };
        token = next;
    }
    let newest_first: Vec<_> = ids.iter().rev().map(|license| license.id.clone()).collect();
    assert_eq!(seen, newest_first);
}

async fn removing_an_activation_frees_its_slot(database: Database) {
    let store = store(&database, &Clock::system());
    let (license, key) = issue(&store, terms(Some(1))).await;
    let (other, _) = issue(&store, terms(Some(1))).await;
    let (id, _) = activate(&store, &key, "one").await.unwrap();
    let delete = |license_id: String, id: String| {
        let store = store.clone();
        async move { all(&store).delete_activation(&license_id, &id, act()).await.map_err(fault) }
    };
    assert_eq!(delete(other.id.clone(), id.clone()).await, Err(Fault::NoSuchActivation));
    assert_eq!(delete("lic_none".into(), id.clone()).await, Err(Fault::NoSuchLicense));
    assert_eq!(delete("\0".into(), id.clone()).await, Err(Fault::NoSuchLicense));
    assert_eq!(delete(license.id.clone(), "\0".into()).await, Err(Fault::NoSuchActivation));
    assert_eq!(delete(license.id.clone(), id.clone()).await, Ok(()));
    assert_eq!(delete(license.id.clone(), id.clone()).await, Err(Fault::NoSuchActivation));
    assert!(activate(&store, &key, "two").await.is_ok());
    assert_eq!(rows(&database, "SELECT activations_count AS n FROM licenses ORDER BY id").await.iter().sum::<i64>(), 1);
    let events = events(&database).await;
    let removed = events.iter().find(|event| event.topic == "activation.removed").unwrap();
    let data: Value = serde_json::from_str(&removed.data_json).unwrap();
    assert_eq!(data["licenseKey"], key.to_string());
    assert_eq!((&data["id"], &data["licenseId"]), (&json!(id), &json!(license.id)));
}

fn of_client(client_id: &str) -> Terms {
    Terms { client_id: Some(client_id.into()), ..terms(None) }
}

fn to_client(client_id: &str) -> Changes {
    Changes { client_id: Some(Some(client_id.into())), ..Changes::default() }
}

async fn no_licence_names_a_client_that_is_gone_however_they_race(database: Database) {
    let store = store(&database, &Clock::system());
    let (license, _) = issue(&store, terms(None)).await;
    for round in 0..25 {
        let client = format!("cli_{round}");
        let start = Arc::new(Barrier::new(7));
        let mut calls = JoinSet::new();
        for at in 0..6 {
            let (store, start, client) = (store.clone(), Arc::clone(&start), client.clone());
            let id = license.id.clone();
            calls.spawn(async move {
                start.wait().await;
                let outcome = if at % 2 == 0 {
                    all(&store).create(PRODUCT.into(), of_client(&client), act()).await
                } else {
                    all(&store).update(&id, to_client(&client), act()).await
                };
                outcome.map(drop).map_err(fault)
            });
        }
        start.wait().await;
        all(&store).forget_client(&client, act()).await.unwrap();
        let outcomes = calls.join_all().await;
        assert!(outcomes.iter().all(|outcome| matches!(outcome, Ok(()) | Err(Fault::NoSuchClient))), "{outcomes:?}");
    }
    assert_eq!(number(&database, "SELECT COUNT(*) AS n FROM licenses WHERE client_id IS NOT NULL").await, 0);
}

async fn a_client_of_many_licences_goes_from_all(database: Database) {
    let (clock, hand) = Clock::manual(START_MS);
    let store = store(&database, &clock);
    for _ in 0..401 {
        issue(&store, of_client("cli_1")).await;
    }
    let (other, _) = issue(&store, of_client("cli_2")).await;
    let told_before = topics(&database).await.len();
    let recorded_before = number(&database, "SELECT COUNT(*) AS n FROM audit_entries").await;
    hand.advance_ms(1);
    for id in ["cli_1", "cli_1", "cli_never", "", "a\0b"] {
        all(&store).forget_client(id, act()).await.unwrap();
    }
    let moved = "SELECT COUNT(*) AS n FROM licenses WHERE client_id IS NULL AND updated_at_ms > created_at_ms";
    assert_eq!(number(&database, moved).await, 401);
    assert_eq!(all(&store).get(&other.id).await.unwrap().0.client_id.as_deref(), Some("cli_2"));
    assert_eq!(topics(&database).await.len(), told_before);
    let recorded = number(&database, "SELECT COUNT(*) AS n FROM audit_entries").await;
    assert_eq!(recorded, recorded_before + 2, "each deletion once");
}

async fn a_client_belongs_to_one_team_and_mode(database: Database) {
    let store = store(&database, &Clock::system());
    let (license, _) = issue(&store, of_client("cli_1")).await;
    for stranger in [tenant("team_2", Mode::Live), tenant("team_1", Mode::Test)] {
        let stranger = store.of(stranger);
        let refused = stranger.create("prod_2".into(), of_client("cli_1"), act()).await.unwrap_err();
        assert_eq!(fault(refused), Fault::NoSuchClient);
        stranger.forget_client("cli_1", act()).await.unwrap();
    }
    assert_eq!(all(&store).get(&license.id).await.unwrap().0.client_id.as_deref(), Some("cli_1"));
    assert!(all(&store).update(&license.id, to_client("cli_1"), act()).await.is_ok());
}

async fn a_deleted_team_leaves_nothing_and_the_others_all(database: Database) {
    // Time stands still, so that what is remembered counts however long the rest takes.
    let (clock, _hand) = Clock::manual(START_MS);
    let store = store(&database, &clock);
    store.poll_changes().await.unwrap();
    let (_, key) = issue(&store, of_client("cli_1")).await;
    for machine in 0..250 {
        activate(&store, &key, &format!("machine {machine}")).await.unwrap();
    }
    for _ in 0..120 {
        issue(&store, terms(None)).await;
    }
    let tested = store.of(tenant("team_1", Mode::Test));
    tested.create("prod_test".into(), of_client("cli_test"), act()).await.unwrap();
    tested.forget_product("prod_gone", act()).await.unwrap();
    let other = store.of(tenant("team_2", Mode::Live));
    let kept = other.create("prod_other".into(), of_client("cli_other"), act()).await.unwrap();
    let asked = all(&store).before_learning();
    all(&store).learn_product(PRODUCT, asked);
    assert!(all(&store).knows_product(PRODUCT));
    assert!(app(&store).find(&key).await.unwrap().is_some());

    let recorded_before = number(&database, "SELECT COUNT(*) AS n FROM audit_entries").await;
    for id in ["team_1", "team_1", "team_never", "", "a\0b"] {
        store.forget_team(id, act()).await.unwrap();
    }
    assert_eq!(number(&database, "SELECT COUNT(*) AS n FROM audit_entries").await, recorded_before + 1);
    for table in ["licenses", "products", "clients"] {
        let sql = format!("SELECT COUNT(*) AS n FROM {table}");
        assert_eq!(number(&database, sql.leak()).await, 1, "{table}");
    }
    assert_eq!(number(&database, "SELECT COUNT(*) AS n FROM activations").await, 0);
    assert!(!all(&store).knows_product(PRODUCT));
    assert!(app(&store).find(&key).await.unwrap().is_none());
    assert_eq!(activate(&store, &key, "one").await, Err(Fault::NoSuchLicense));
    assert_eq!(other.get(&kept.id).await.unwrap().0, kept);
}

async fn a_licence_that_was_made_while_its_team_went_goes_when_it_is_told_again(database: Database) {
    let store = store(&database, &Clock::system());
    let start = Arc::new(Barrier::new(7));
    let mut creations = JoinSet::new();
    for _ in 0..6 {
        let (store, start) = (store.clone(), Arc::clone(&start));
        creations.spawn(async move {
            start.wait().await;
            all(&store).create(PRODUCT.into(), of_client("cli_1"), act()).await.unwrap();
        });
    }
    start.wait().await;
    store.forget_team("team_1", act()).await.unwrap();
    creations.join_all().await;
    store.forget_team("team_1", act()).await.unwrap();
    for table in ["licenses", "products", "clients"] {
        let sql = format!("SELECT COUNT(*) AS n FROM {table}");
        assert_eq!(number(&database, sql.leak()).await, 0, "{table}");
    }
}

async fn the_schema_goes_back_and_forth_and_knows_whose_products_there_are(database: Database) {
    let store = store(&database, &Clock::system());
    issue(&store, terms(None)).await;
    all(&store).forget_product("prod_gone", act()).await.unwrap();
    database.migrate_down::<paperkey_migrations::licensing::Migrator>(3).await.unwrap();
    database.migrate_up::<paperkey_migrations::licensing::Migrator>().await.unwrap();
    let known = "SELECT COUNT(*) AS n FROM products WHERE id = 'prod_1' AND team_id = 'team_1'";
    assert_eq!(number(&database, known).await, 1);
    assert_eq!(number(&database, "SELECT COUNT(*) AS n FROM products WHERE team_id = ''").await, 1);
    issue(&store, of_client("cli_1")).await;
}
