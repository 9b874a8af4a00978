//! Every combination of filters: it finds what it should, in its order, and by an index.

use std::{collections::BTreeSet, sync::Arc};

use paperkey_kit::{
    clock::{Clock, ManualClock},
    db::Database,
    principal::{Caller, Tenant},
    secrets::Keyring,
    store_suite,
};
use paperkey_proto::principal::v1::{Mode, Principal};
use rand::{RngExt as _, seq::IndexedRandom as _};

use super::*;
use crate::{
    domain::license::{Draft, Terms},
    store::{Act, Store, expiry::ANY_DUE},
};

const START_MS: i64 = 1_790_000_000_000;
const STATUSES: [Option<Status>; 4] = [None, Some(Status::Active), Some(Status::Expired), Some(Status::Revoked)];

store_suite! {
    paperkey_migrations::licensing::Migrator;
    every_filter_finds_what_a_look_at_each_licence_finds,
    every_filter_walks_an_index,
    the_sweep_looks_at_what_is_due_alone,
    what_is_due_and_not_told_is_expired_and_what_was_told_too_early_is_active,
}

fn tenant(team_id: &str, mode: Mode) -> Tenant {
    Tenant { team_id: team_id.to_owned(), mode }
}

fn act() -> Act {
    let principal = Principal { id: "usr_1".into(), ..Principal::default() };
    Act::by(&Caller { principal: Arc::new(principal), request_id: "req_1".into(), once: None }, "/test")
}

fn terms(email: Option<&str>, client_id: Option<&str>, expires_at_ms: Option<i64>) -> Terms {
    Terms {
        email: email.map(Into::into),
        client_id: client_id.map(Into::into),
        max_activations: Some(1),
        expires_at_ms,
        metadata: None,
    }
}

fn some<'a>(among: &[&'a str]) -> Option<&'a str> {
    let mut chance = rand::rng();
    if chance.random_range(0..=among.len()) == 0 { None } else { among.choose(&mut chance).copied() }
}

const EMAILS: [&str; 9] = [
    "ann@example.com",
    "Ann.B@example.com",
    "anna@example.com",
    "bob@example.com",
    "a%n@example.com",
    "a_n@example.com",
    "ä@example.com",
    "a\u{10ffff}b@example.com",
    "a\u{10ffff}\u{10ffff}@example.com",
];
const CLIENTS: [&str; 2] = ["cli_1", "cli_2"];
const PRODUCTS: [&str; 2] = ["prod_1", "prod_2"];

/// Some hundred licences of one tenant in every state, and as many of others.
async fn populated(store: &Store, hand: &ManualClock) -> Vec<License> {
    let mine = store.of(tenant("team_1", Mode::Live));
    let mut licenses: Vec<License> = Vec::new();
    for others in [tenant("team_1", Mode::Test), tenant("team_2", Mode::Live)] {
        let client_id = format!("cli_{}_{}", others.team_id, others.mode_word());
        let drafts = (0..60).map(|number| Draft {
            product_id: format!("prod_{}", 1 + number % 2),
            terms: terms(some(&EMAILS), some(&[&client_id]), Some(START_MS + number * 60)),
            key: None,
            revoked_at_ms: None,
        });
        store.of(others).create_all(drafts.collect(), act()).await.unwrap();
    }
    for _ in 0..6 {
        hand.advance_ms(500);
        let drafts = (0..60).map(|_| {
            let mut chance = rand::rng();
            let expires_at_ms = chance.random_bool(0.7).then(|| START_MS + chance.random_range(0..10_000));
            let product_id = PRODUCTS.choose(&mut chance).copied().unwrap_or_default().to_owned();
            Draft {
                product_id,
                terms: terms(some(&EMAILS), some(&CLIENTS), expires_at_ms),
                key: None,
                revoked_at_ms: None,
            }
        });
        licenses.extend(mine.create_all(drafts.collect(), act()).await.unwrap());
    }
    for license in &mut licenses {
        if rand::rng().random_bool(0.2) {
            *license = mine.revoke(&license.id, act()).await.unwrap();
        }
    }
    licenses.sort_by(|one, other| other.id.cmp(&one.id));
    licenses
}

/// What a look at each licence finds.
fn naive(licenses: &[License], filter: &Filter, now_ms: i64) -> Vec<String> {
    let matches = |license: &&License| {
        let email = license.email.as_deref().map(str::to_lowercase);
        filter.product_id.as_ref().is_none_or(|id| *id == license.product_id)
            && filter.status.is_none_or(|status| license.standing.status(now_ms) == status)
            && filter.email.as_ref().is_none_or(|wanted| email.as_ref() == Some(&wanted.to_lowercase()))
            && filter.client_id.as_ref().is_none_or(|id| license.client_id.as_ref() == Some(id))
            && filter.query.as_ref().is_none_or(|query| {
                let key = LicenseKey::parse(query).ok();
                email.as_ref().is_some_and(|email| email.starts_with(&query.to_lowercase()))
                    || (key.is_some() && license.key == key)
                    || license.id == *query
            })
    };
    licenses.iter().filter(matches).map(|license| license.id.clone()).collect()
}

fn text(text: Option<&str>) -> Option<String> {
    text.map(ToOwned::to_owned)
}

/// Every combination of filters, with several values of each.
fn filters(licenses: &[License]) -> Vec<Filter> {
    let key = licenses[7].key.as_ref().unwrap().to_string();
    let typed = key.to_lowercase().replace('-', " ");
    let queries = ["a", "ANN", "a%", "a_", "ä", "a\u{10ffff}", "", "zzz", "b", &key, &typed, &licenses[3].id];
    let queries: Vec<_> = queries.into_iter().filter(|query| !query.is_empty()).map(Some).chain([None]).collect();
    let mut filters = Vec::new();
    for product_id in [None, Some("prod_1"), Some("prod_none")] {
        for status in STATUSES {
            for email in [None, Some("ANN@example.com"), Some("nobody@example.com")] {
                for client_id in [None, Some("cli_1")] {
                    for query in &queries {
                        filters.push(Filter {
                            product_id: text(product_id),
                            status,
                            email: text(email),
                            client_id: text(client_id),
                            query: text(*query),
                        });
                    }
                }
            }
        }
    }
    filters
}

/// All pages of a filter, with pages, sorted matches and chunks of those sizes.
async fn paged(store: &TenantStore, filter: &Filter, size: u64, sorted: u64, chunk: u64) -> Vec<String> {
    let Some(mut plan) = store.plan(filter.clone()) else { return Vec::new() };
    (plan.sorted, plan.chunk) = (sorted, chunk);
    let database = &store.parts().database;
    let mut found: Vec<String> = Vec::new();
    loop {
        let (plan, before) = (plan.clone(), found.last().cloned());
        let rows = database.read(move |reader| async move { plan.rows(&reader, before.as_deref(), size).await });
        let rows = rows.await.unwrap();
        assert!(rows.len() as u64 <= size);
        let is_last = (rows.len() as u64) < size;
        found.extend(rows.into_iter().map(|row| row.id));
        if is_last {
            return found;
        }
    }
}

async fn every_filter_finds_what_a_look_at_each_licence_finds(database: Database) {
    let (clock, hand) = Clock::manual(START_MS);
    let store = Store::new(database.clone(), &Keyring::for_tests(), clock.clone());
    let licenses = populated(&store, &hand).await;
    let mine = store.of(tenant("team_1", Mode::Live));
    let filters = filters(&licenses);
    // Nothing told, some told and some due, and some told too early.
    for (moved_ms, sweeps) in [(1_000, false), (1_000, true), (1_500, false), (-3_000, false)] {
        hand.advance_ms(moved_ms);
        if sweeps {
            store.expire_due().await.unwrap();
        }
        for filter in &filters {
            let expected = naive(&licenses, filter, clock.now_ms());
            let mut chance = rand::rng();
            // Whether matches are sorted or walked, and in what portions, is all the same.
            let size = *[1, 7, 100, 1_000].choose(&mut chance).unwrap();
            if size == 1 && expected.len() > 30 {
                continue;
            }
            let sorted = *[0, 3, 40, 10_000].choose(&mut chance).unwrap();
            let chunk = *[1, 3, 512].choose(&mut chance).unwrap();
            let found = paged(&mine, filter, size, sorted, chunk).await;
            assert_eq!(found, expected, "{filter:?} in pages of {size}, {sorted} sorted by {chunk}");
        }
    }
    // Who is bound to a product finds that one's, whatever else is named.
    let bound = mine.clone().within(Some("prod_1"));
    for filter in filters.iter().take(200) {
        let reach = Filter { product_id: text(Some("prod_1")), ..filter.clone() };
        let is_foreign = filter.product_id.as_ref().is_some_and(|id| id != "prod_1");
        let expected = if is_foreign { Vec::new() } else { naive(&licenses, &reach, clock.now_ms()) };
        assert_eq!(paged(&bound, filter, 50, SORTED, CHUNK).await, expected, "{filter:?}");
    }
}

async fn what_is_due_and_not_told_is_expired_and_what_was_told_too_early_is_active(database: Database) {
    let (clock, hand) = Clock::manual(START_MS);
    let store = Store::new(database, &Keyring::for_tests(), clock);
    let mine = store.of(tenant("team_1", Mode::Live));
    let drafts = |count| {
        let terms = terms(None, None, Some(START_MS + 10));
        vec![Draft { product_id: "prod_1".into(), terms, key: None, revoked_at_ms: None }; count]
    };
    mine.create_all(drafts(3), act()).await.unwrap();
    let count = async |status| {
        let filter = Filter { status: Some(status), ..Filter::default() };
        mine.list(filter, Page { size: 100, before: None }).await.unwrap().0.len()
    };
    assert_eq!((count(Status::Active).await, count(Status::Expired).await), (3, 0));
    hand.advance_ms(10);
    assert_eq!((count(Status::Active).await, count(Status::Expired).await), (0, 3));
    assert_eq!(store.expire_due().await.unwrap(), 3);
    assert_eq!((count(Status::Active).await, count(Status::Expired).await), (0, 3));
    hand.advance_ms(-5);
    assert_eq!((count(Status::Active).await, count(Status::Expired).await), (3, 0));
    // Told once is told, however the clock goes.
    assert_eq!(store.expire_due().await.unwrap(), 0);
    hand.advance_ms(5);
    assert_eq!((store.expire_due().await.unwrap(), count(Status::Expired).await), (0, 3));
}

/// The indexes that a statement uses, as its engine explains it; and that it does nothing else.
async fn indexes_of(database: &Database, statement: Statement) -> BTreeSet<String> {
    let engine = database.engine();
    let lines = database
        .snapshot(move |reader| async move {
            let backend = reader.get_database_backend();
            let (explain, column) = match engine {
                Engine::Sqlite => ("EXPLAIN QUERY PLAN", "detail"),
                Engine::Postgres => {
                    // A table of a test is small enough for the planner to prefer reading all of it.
                    let setting = "SELECT set_config('enable_seqscan', 'off', true)";
                    reader.query_one_raw(Statement::from_string(backend, setting)).await?;
                    ("EXPLAIN", "QUERY PLAN")
                }
            };
            let explained = Statement { sql: format!("{explain} {}", statement.sql), ..statement };
            let rows = reader.query_all_raw(explained).await?;
            Ok::<_, DbError>(rows.iter().map(|row| row.try_get("", column).unwrap()).collect::<Vec<String>>())
        })
        .await
        .unwrap();
    let mut indexes = BTreeSet::new();
    for line in &lines {
        let words: Vec<_> = line.split_whitespace().collect();
        for pair in words.windows(3) {
            // By whatever index, each id is looked up.
            let by_id = line.ends_with("(id=?)") || line.ends_with(" id=?)");
            match pair {
                ["USING", "INDEX", _] if by_id => indexes.insert(BY_ID.to_owned()),
                ["using", "licenses_pkey", "on"] => indexes.insert(BY_ID.to_owned()),
                // SQLite: SEARCH licenses USING COVERING INDEX name (…)
                ["USING" | "COVERING", "INDEX", name] => indexes.insert((*name).to_owned()),
                // PostgreSQL: Index Only Scan Backward using name on licenses
                ["using", name, "on"] | ["Scan", "on", name] if name.starts_with("licenses_") => {
                    indexes.insert((*name).to_owned())
                }
                _ => false,
            };
        }
        let is_whole = (line.starts_with("SCAN licenses") && !line.contains("USING")) || line.contains("Seq Scan");
        assert!(!is_whole, "reads the whole table: {lines:#?}");
    }
    assert!(!indexes.is_empty(), "no index: {lines:#?}");
    indexes
}

/// So many rows that PostgreSQL has something to choose by.
async fn crowd(database: &Database) {
    let engine = database.engine();
    let job = database.write(move |tx| async move {
        let (numbers, hash) = match engine {
            Engine::Sqlite => (
                "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 60000) ",
                "CAST('hash' || n AS BLOB)",
            ),
            Engine::Postgres => {
                ("WITH numbers AS (SELECT n FROM generate_series(1, 60000) AS n) ", "CAST('hash' || n AS bytea)")
            }
        };
        let sql = format!(
            "INSERT INTO licenses (id, team_id, mode, product_id, key_hash, key_sealed, email, email_lower, client_id, \
             max_activations, activations_count, expires_at_ms, expired_event_at_ms, metadata, created_at_ms, \
             updated_at_ms, revoked_at_ms) {numbers} SELECT 'lic_' || (100000 + n), 'team_' || (n % 20), 'live', \
             'prod_' || (n / 20 % 5), {hash}, {hash}, NULL, 'user' || n || '@example.com', 'cli_' || (n / 20 % 150), 1, 0, \
             CASE WHEN n % 3 = 0 THEN NULL ELSE {START_MS} + n / 2 END, \
             CASE WHEN n % 3 = 1 THEN {START_MS} ELSE NULL END, NULL, {START_MS}, {START_MS}, \
             CASE WHEN n % 17 = 0 THEN {START_MS} ELSE NULL END FROM numbers"
        );
        let analyze = Statement::from_string(tx.get_database_backend(), "ANALYZE");
        tx.execute_raw(Statement::from_string(tx.get_database_backend(), sql)).await?;
        tx.execute_raw(analyze).await?;
        Ok::<_, DbError>(())
    });
    job.await.unwrap();
}

async fn every_filter_walks_an_index(database: Database) {
    crowd(&database).await;
    let engine = database.engine();
    let (clock, hand) = Clock::manual(START_MS);
    hand.advance_ms(20_000);
    let store = Store::new(database.clone(), &Keyring::for_tests(), clock);
    let team = store.of(tenant("team_1", Mode::Live));
    let bound = team.clone().within(Some("prod_1"));
    let key = LicenseKey::random().to_string();
    let all = |query: Option<&str>| {
        let mut filters = Vec::new();
        for product_id in [None, Some("prod_1")] {
            for status in STATUSES {
                for email in [None, Some("user1@example.com")] {
                    for client_id in [None, Some("cli_1")] {
                        let (product_id, email, client_id) = (text(product_id), text(email), text(client_id));
                        filters.push(Filter { product_id, status, email, client_id, query: text(query) });
                    }
                }
            }
        }
        filters
    };
    let filters = [None, Some("user12"), Some("user5"), Some(key.as_str()), Some("lic_100001")].map(all).concat();
    for filter in filters {
        for store in [&team, &bound] {
            let Some(plan) = store.plan(filter.clone()) else { continue };
            let is_sorted = |way: &[Source]| way.iter().any(|source| matches!(source, Source::Sorted { .. }));
            let is_walked = is_sorted(&plan.ways[0]);
            // What is walked where the prefix has many matches is what has the status, if one is named and no client.
            let is_narrow = filter.status.is_some() && filter.email.is_none() && filter.client_id.is_none();
            assert_eq!(plan.ways[1].is_empty(), !is_narrow || filter.query.is_none(), "{filter:?}");
            let by_status = ["licenses_revoked", "licenses_active", "licenses_expired"];
            let is_by_status = |index: &str| by_status.iter().any(|name| index.starts_with(name));
            let walks = plan.ways[1].iter().filter_map(|source| match source {
                Source::Walk { index, .. } => *index,
                Source::Sorted { .. } => None,
            });
            assert!(walks.clone().all(is_by_status) && walks.count() == plan.ways[1].len().min(1), "{filter:?}");
            let used: &[_] = if is_walked { &plan.ways } else { &plan.ways[..1] };
            for (way, source) in used.iter().enumerate().flat_map(|(at, way)| way.iter().map(move |one| (at, one))) {
                for before in [None, Some("lic_120000")] {
                    let statements = match source {
                        Source::Walk { index, condition } => vec![plan.page(*index, condition, before, 21)],
                        Source::Sorted { .. } => vec![plan.count(source).unwrap(), plan.ids(source, before)],
                    };
                    for statement in statements {
                        let sql = statement.sql.clone();
                        let used = indexes_of(&database, statement).await;
                        // Walking is what is done where many match; if an engine knows better, it may.
                        let is_good =
                            way > 0 && engine == Engine::Postgres || used.iter().all(|used| may_use(source, used));
                        assert!(is_good, "{filter:?} walks {used:?}: {sql}");
                    }
                }
            }
            if is_walked {
                let ids = vec!["lic_100001".into(), "lic_100002".into()];
                let used = indexes_of(&database, plan.of_ids(ids, 21)).await;
                // PostgreSQL may look them up in an index that holds the ids of fewer.
                let is_good = engine == Engine::Postgres || used == BTreeSet::from([BY_ID.to_owned()]);
                assert!(is_good, "{filter:?} looks ids up in {used:?}");
            }
        }
    }
}

async fn the_sweep_looks_at_what_is_due_alone(database: Database) {
    crowd(&database).await;
    let backend = match database.engine() {
        Engine::Sqlite => sea_orm::DbBackend::Sqlite,
        Engine::Postgres => sea_orm::DbBackend::Postgres,
    };
    for now_ms in [0, START_MS + 1_000_000] {
        let statement = Statement::from_sql_and_values(backend, ANY_DUE, [now_ms.into()]);
        let used = indexes_of(&database, statement).await;
        assert_eq!(used, BTreeSet::from(["licenses_due".to_owned()]));
    }
}

/// An index in which an id is looked up.
const BY_ID: &str = "by id";

fn may_use(source: &Source, used: &str) -> bool {
    // PostgreSQL has those that were there before once more.
    let used = used.strip_suffix("_in_bytes").unwrap_or(used);
    match source {
        // One row.
        Source::Walk { index: None, .. } => true,
        // What is due is few, whosever it is.
        Source::Sorted { index: "licenses_due_by_tenant", .. } if used == "licenses_due" => true,
        Source::Sorted { index, .. } => used == *index,
        // Of a tenant that has few of a status all may be read by product, and sorted.
        Source::Walk { index: Some(index), .. } => used == *index || used == format!("{index}_by_product"),
    }
}
