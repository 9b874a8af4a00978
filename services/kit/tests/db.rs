//! The storage layer: the same promises on SQLite and on PostgreSQL.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::{FutureExt as _, future::join_all};
use paperkey_kit::{
    changes::{Changes, PAGE, changes_since, latest_seq, prune_changes},
    clock::Clock,
    db::{
        AuditEntry, Database, DbError, Engine, IdempotencyRow, JobKind, OutboxMessage, Tx, find_answer,
        is_unique_violation, prune_answers,
    },
    lease::Leases,
    outbox::{OutboxRow, Relay, RelayOptions, Sink},
    store_suite,
    testing::TestDb,
};
use sea_orm::{
    ActiveModelTrait as _, ActiveValue::Set, ColumnTrait as _, ConnectionTrait, EntityTrait as _, PaginatorTrait as _,
    QueryFilter as _, Statement, entity::prelude::Expr, sea_query::ExprTrait as _,
};
use sea_orm_migration::{
    MigrationName, MigrationTrait, MigratorTrait, SchemaManager, async_trait,
    sea_query::{ColumnDef, Table},
};
use tokio::sync::{oneshot, watch};

/// The kit's tables and one of the tests' own.
struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        let mut all = paperkey_migrations::kit::migrations();
        all.push(Box::new(Seats));
        all
    }
}

struct Seats;

impl MigrationName for Seats {
    fn name(&self) -> &'static str {
        "test_0001_seats"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Seats {
    async fn up(&self, manager: &SchemaManager) -> Result<(), sea_orm::DbErr> {
        let table = Table::create()
            .table("seats")
            .col(ColumnDef::new("id").text().not_null().primary_key())
            .col(ColumnDef::new("used").big_integer().not_null())
            .col(ColumnDef::new("open").boolean().not_null())
            .col(ColumnDef::new("ratio").double())
            .col(ColumnDef::new("secret").blob())
            .take();
        manager.create_table(table).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), sea_orm::DbErr> {
        manager.drop_table(Table::drop().table("seats").take()).await
    }
}

/// A release that has gone another way.
struct Forked;

impl MigratorTrait for Forked {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        let mut all = paperkey_migrations::kit::migrations();
        all.push(Box::new(Other));
        all
    }
}

struct Other;

impl MigrationName for Other {
    fn name(&self) -> &'static str {
        "test_0001_other"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Other {
    async fn up(&self, _: &SchemaManager) -> Result<(), sea_orm::DbErr> {
        Ok(())
    }
}

mod seats {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, PartialEq, DeriveEntityModel)]
    #[sea_orm(table_name = "seats")]
    pub(crate) struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub(crate) id: String,
        pub(crate) used: i64,
        pub(crate) open: bool,
        pub(crate) ratio: Option<f64>,
        pub(crate) secret: Option<Vec<u8>>,
    }

    #[derive(Copy, Clone, Debug, EnumIter, DeriveRelation)]
    pub(crate) enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

store_suite! {
    super::Migrator;
    an_entity_comes_back_as_it_was_stored,
    an_answer_comes_after_the_commit,
    a_job_that_fails_leaves_no_trace_and_harms_no_neighbour,
    a_job_that_panics_answers_an_error_and_harms_no_neighbour,
    a_job_whose_caller_is_gone_still_commits,
    hooks_run_after_the_commit_and_before_the_answer,
    hooks_do_not_run_when_the_job_fails,
    a_unique_violation_is_recognised,
    a_failed_statement_condemns_its_job_even_if_ignored,
    a_handle_kept_after_its_job_is_dead,
    exactly_as_many_get_a_seat_as_there_are,
    a_snapshot_does_not_move,
    a_reader_cannot_write,
    what_a_job_collects_is_written_with_it_or_not_at_all,
    many_messages_of_one_job_are_all_written,
    an_answer_is_stored_once_until_it_expires,
    a_lease_has_one_holder,
    an_expired_lease_is_taken_over_but_not_renewed,
    the_feed_is_gapless_under_many_writers,
    the_feed_tells_a_late_reader_what_it_missed,
    the_relay_delivers_in_order_and_deletes,
    the_relay_tries_again_after_a_failure,
    the_relay_is_woken_by_a_commit,
    two_relays_share_one_target,
    migrations_go_up_down_and_up,
    statements_are_counted,
    a_closed_database_refuses_work_but_finishes_what_it_has,
}

async fn add_seat(tx: &Tx, id: &str) -> Result<(), DbError> {
    let seat = seats::ActiveModel {
        id: Set(id.to_owned()),
        used: Set(0),
        open: Set(true),
        ratio: Set(None),
        secret: Set(None),
    };
    seats::Entity::insert(seat).exec_without_returning(tx).await?;
    Ok(())
}

async fn add(db: &Database, id: &'static str) -> Result<(), DbError> {
    db.write(move |tx| async move { add_seat(&tx, id).await }).await
}

async fn ids(db: &Database) -> BTreeSet<String> {
    db.read(|reader| async move {
        let all = seats::Entity::find().all(&reader).await?;
        Ok::<_, DbError>(all.into_iter().map(|seat| seat.id).collect())
    })
    .await
    .unwrap()
}

async fn count(db: &Database, table: &'static str) -> i64 {
    db.read(move |reader| async move {
        let sql = format!("SELECT COUNT(*) AS number FROM {table}");
        let statement = Statement::from_string(reader.get_database_backend(), sql);
        let row = reader.query_one_raw(statement).await?.unwrap();
        Ok::<i64, DbError>(row.try_get("", "number")?)
    })
    .await
    .unwrap()
}

/// Keeps the writer busy, so that what comes next is one group.
async fn hold_writer(db: &Database) -> tokio::task::JoinHandle<()> {
    let (started, running) = oneshot::channel();
    let db = db.clone();
    let holding = tokio::spawn(async move {
        db.write(|_tx| async move {
            let _ = started.send(());
            std::thread::sleep(Duration::from_millis(100));
            Ok::<_, DbError>(())
        })
        .await
        .unwrap();
    });
    running.await.unwrap();
    holding
}

async fn an_entity_comes_back_as_it_was_stored(db: Database) {
    let stored = seats::Model {
        id: "seat_1".to_owned(),
        used: i64::MAX,
        open: false,
        ratio: Some(0.25),
        secret: Some(vec![0, 255]),
    };
    let expected = stored.clone();
    let inserted = db
        .write(|tx| async move { Ok::<_, DbError>(seats::ActiveModel::from(stored).insert(&tx).await?) })
        .await
        .unwrap();
    assert_eq!(inserted, expected);
    add(&db, "seat_2").await.unwrap();
    let (found, number, empty) = db
        .read(|reader| async move {
            let found = seats::Entity::find_by_id("seat_1").one(&reader).await?.unwrap();
            let number = seats::Entity::find().count(&reader).await?;
            let empty = seats::Entity::find_by_id("seat_2").one(&reader).await?.unwrap();
            Ok::<_, DbError>((found, number, empty))
        })
        .await
        .unwrap();
    assert_eq!(found, expected);
    assert_eq!(number, 2);
    assert_eq!((empty.open, empty.ratio, empty.secret), (true, None, None));
}

async fn an_answer_comes_after_the_commit(db: Database) {
    for id in ["a", "b", "c"] {
        add(&db, id).await.unwrap();
        assert!(ids(&db).await.contains(id), "{id} is visible elsewhere once answered");
    }
}

async fn a_job_that_fails_leaves_no_trace_and_harms_no_neighbour(db: Database) {
    let holding = hold_writer(&db).await;
    let fails = db.write(|tx| async move {
        add_seat(&tx, "lost").await?;
        Err::<(), _>(DbError::NotFound)
    });
    let (before, failed, after) = tokio::join!(add(&db, "before"), fails, add(&db, "after"));
    holding.await.unwrap();
    before.unwrap();
    after.unwrap();
    assert_eq!(failed, Err(DbError::NotFound));
    assert_eq!(ids(&db).await, ["after", "before"].map(str::to_owned).into());
}

async fn a_job_that_panics_answers_an_error_and_harms_no_neighbour(db: Database) {
    let holding = hold_writer(&db).await;
    let panics = db.write(|tx| async move {
        add_seat(&tx, "lost").await?;
        assert!(ids_are_even(&tx), "on purpose");
        Ok::<_, DbError>(())
    });
    let (before, failed, after) = tokio::join!(add(&db, "before"), panics, add(&db, "after"));
    holding.await.unwrap();
    before.unwrap();
    after.unwrap();
    assert!(matches!(failed, Err(DbError::Internal(_))));
    assert_eq!(ids(&db).await, ["after", "before"].map(str::to_owned).into());
}

fn ids_are_even(_: &Tx) -> bool {
    false
}

async fn a_job_whose_caller_is_gone_still_commits(db: Database) {
    let holding = hold_writer(&db).await;
    let (done, committed) = oneshot::channel();
    let caller = {
        let db = db.clone();
        tokio::spawn(async move {
            db.write(|tx| async move {
                add_seat(&tx, "orphan").await?;
                tx.after_commit(move || done.send(()).unwrap());
                Ok::<_, DbError>(())
            })
            .await
        })
    };
    tokio::time::sleep(Duration::from_millis(30)).await;
    caller.abort();
    holding.await.unwrap();
    committed.await.unwrap();
    assert!(ids(&db).await.contains("orphan"));
}

async fn hooks_run_after_the_commit_and_before_the_answer(db: Database) {
    let commits_before = db.stats().commits;
    let commits_seen = Arc::new(AtomicUsize::new(0));
    let hook = Arc::clone(&commits_seen);
    let other = db.clone();
    db.write(move |tx| async move {
        add_seat(&tx, "hooked").await?;
        tx.after_commit(|| panic!("a hook that panics spoils nothing"));
        tx.after_commit(move || {
            let commits = other.stats().commits - commits_before;
            hook.store(usize::try_from(commits).unwrap(), Ordering::SeqCst);
        });
        Ok::<_, DbError>(())
    })
    .await
    .unwrap();
    assert_eq!(commits_seen.load(Ordering::SeqCst), 1, "before the answer, after the commit");
}

async fn hooks_do_not_run_when_the_job_fails(db: Database) {
    add(&db, "taken").await.unwrap();
    let ran = Arc::new(AtomicBool::new(false));
    let hook = Arc::clone(&ran);
    let failed = db
        .write(move |tx| async move {
            tx.after_commit(move || hook.store(true, Ordering::SeqCst));
            add_seat(&tx, "taken").await
        })
        .await;
    assert!(failed.is_err());
    assert!(!ran.load(Ordering::SeqCst));
}

async fn a_unique_violation_is_recognised(db: Database) {
    add(&db, "taken").await.unwrap();
    let error = add(&db, "taken").await.unwrap_err();
    assert!(error.is_unique_violation(), "{error:?}");
    assert!(error.to_string().contains("seats"), "{error}");
    assert!(!error.to_string().contains("taken"), "no values: {error}");
    let raw = db
        .write(|tx| async move {
            let twice = Statement::from_string(
                tx.get_database_backend(),
                "INSERT INTO seats (id, used, open) VALUES ('taken', 0, TRUE)",
            );
            let error = tx.execute_raw(twice).await.unwrap_err();
            Ok::<_, DbError>(is_unique_violation(&error))
        })
        .await;
    assert!(raw.unwrap_err().is_unique_violation());
}

async fn a_failed_statement_condemns_its_job_even_if_ignored(db: Database) {
    add(&db, "taken").await.unwrap();
    let result = db
        .write(|tx| async move {
            add_seat(&tx, "first").await?;
            let _ = add_seat(&tx, "taken").await;
            let refused = add_seat(&tx, "second").await;
            assert!(refused.is_err(), "nothing more after a failure");
            Ok::<_, DbError>(())
        })
        .await;
    assert!(result.unwrap_err().is_unique_violation());
    assert_eq!(ids(&db).await, ["taken".to_owned()].into());
}

async fn a_handle_kept_after_its_job_is_dead(db: Database) {
    let kept = Arc::new(Mutex::new(None));
    let place = Arc::clone(&kept);
    let result = db
        .write(move |tx| async move {
            add_seat(&tx, "inside").await?;
            *place.lock().unwrap() = Some(tx);
            Ok::<_, DbError>(())
        })
        .await;
    let tx = kept.lock().unwrap().take();
    let late = match &tx {
        Some(tx) if db.engine() == Engine::Sqlite => add_seat(tx, "outside").await,
        _ => Err(DbError::NotFound),
    };
    drop(tx);
    assert!(result.is_err() && late.is_err());
    assert!(ids(&db).await.is_empty());
}

async fn exactly_as_many_get_a_seat_as_there_are(db: Database) {
    add(&db, "room").await.unwrap();
    let callers: Vec<_> = (0..100)
        .map(|_| {
            let db = db.clone();
            tokio::spawn(async move {
                db.write(|tx| async move {
                    let updated = seats::Entity::update_many()
                        .col_expr(seats::Column::Used, Expr::col(seats::Column::Used).add(1))
                        .filter(seats::Column::Id.eq("room"))
                        .filter(seats::Column::Used.lt(3))
                        .exec(&tx)
                        .await?;
                    Ok::<_, DbError>(updated.rows_affected)
                })
                .await
                .unwrap()
            })
        })
        .collect();
    let mut seated = 0;
    for caller in callers {
        seated += caller.await.unwrap();
    }
    assert_eq!(seated, 3);
}

async fn a_snapshot_does_not_move(db: Database) {
    let other = db.clone();
    let (before, after) = db
        .snapshot(|reader| async move {
            let before = seats::Entity::find().count(&reader).await?;
            add(&other, "late").await?;
            let after = seats::Entity::find().count(&reader).await?;
            Ok::<_, DbError>((before, after))
        })
        .await
        .unwrap();
    assert_eq!((before, after), (0, 0));
    assert_eq!(ids(&db).await.len(), 1);
}

async fn a_reader_cannot_write(db: Database) {
    let refused = db
        .read(|reader| async move {
            let statement = Statement::from_string(reader.get_database_backend(), "DELETE FROM seats");
            Ok::<_, DbError>(reader.execute_raw(statement).await?.rows_affected())
        })
        .await;
    assert!(refused.is_err());
}

fn message(id: impl Into<String>) -> OutboxMessage {
    OutboxMessage {
        target: "webhook",
        id: id.into(),
        topic: "licence.created".to_owned(),
        team_id: "team_1".to_owned(),
        payload: vec![1, 2, 3],
    }
}

fn answer(key: u8, expires_at_ms: i64) -> IdempotencyRow {
    IdempotencyRow { key_hash: vec![key], request_hash: vec![7], sealed_response: vec![8, 9], expires_at_ms }
}

async fn what_a_job_collects_is_written_with_it_or_not_at_all(db: Database) {
    let far = db.clock().now_ms() + 60_000;
    for fails in [true, false] {
        let result = db
            .write(move |tx| async move {
                tx.emit(message("evt_1"));
                tx.audit(AuditEntry {
                    actor_kind: "user".to_owned(),
                    actor_id: "user_1".to_owned(),
                    actor_name: "ada@example.com".to_owned(),
                    team_id: "team_1".to_owned(),
                    action: "/paperkey.auth.v1.Keys/Revoke".to_owned(),
                    resources: vec!["key_1".to_owned(), "key\"2".to_owned()],
                    request_id: "req_1".to_owned(),
                });
                tx.idempotency(answer(1, far));
                tx.changed("key:key_1");
                if fails { Err(DbError::NotFound) } else { Ok(()) }
            })
            .await;
        assert_eq!(result.is_err(), fails);
        let expected = i64::from(!fails);
        for table in ["outbox", "audit_entries", "idempotency", "changes"] {
            assert_eq!(count(&db, table).await, expected, "{table}");
        }
        assert_eq!(latest_seq(&db).await.unwrap(), expected);
    }
    let resources = db
        .read(|reader| async move {
            let sql = "SELECT resources FROM audit_entries";
            let statement = Statement::from_string(reader.get_database_backend(), sql);
            let row = reader.query_one_raw(statement).await?.unwrap();
            Ok::<String, DbError>(row.try_get("", "resources")?)
        })
        .await
        .unwrap();
    assert_eq!(resources, r#"["key_1","key\"2"]"#);
}

async fn many_messages_of_one_job_are_all_written(db: Database) {
    db.write(|tx| async move {
        for number in 0..1201 {
            tx.emit(message(format!("evt_{number}")));
        }
        Ok::<_, DbError>(())
    })
    .await
    .unwrap();
    assert_eq!(count(&db, "outbox").await, 1201);
}

async fn an_answer_is_stored_once_until_it_expires(db: Database) {
    let now_ms = db.clock().now_ms();
    let store = |expires_at_ms| {
        db.write(move |tx| async move {
            tx.idempotency(answer(1, expires_at_ms));
            Ok::<_, DbError>(())
        })
    };
    store(now_ms - 1).await.unwrap();
    let find = || db.read(move |reader| async move { find_answer(&reader, &[1], now_ms).await });
    assert_eq!(find().await.unwrap(), None, "expired");
    store(now_ms + 60_000).await.unwrap();
    let found = find().await.unwrap().unwrap();
    assert_eq!((found.request_hash, found.sealed_response), (vec![7], vec![8, 9]));
    assert!(store(now_ms + 60_000).await.unwrap_err().is_unique_violation());
    assert_eq!(prune_answers(&db, 10).await.unwrap(), 0);
    db.write(move |tx| async move {
        tx.idempotency(answer(2, now_ms - 1));
        Ok::<_, DbError>(())
    })
    .await
    .unwrap();
    assert_eq!(prune_answers(&db, 10).await.unwrap(), 1);
}

async fn a_lease_has_one_holder(db: Database) {
    let leases = Leases::new(db);
    let racers: Vec<_> = (0..20)
        .map(|number| {
            let leases = leases.clone();
            let holder = format!("holder_{number}");
            tokio::spawn(async move { leases.try_hold("job", &holder, Duration::from_mins(1)).await.unwrap() })
        })
        .collect();
    let mut held = 0;
    for racer in racers {
        held += usize::from(racer.await.unwrap());
    }
    assert_eq!(held, 1);
    assert!(leases.try_hold("another", "me", Duration::from_mins(1)).await.unwrap());
    assert!(leases.try_hold("another", "me", Duration::from_mins(1)).await.unwrap(), "again");
    assert!(leases.renew("another", "me", Duration::from_mins(1)).await.unwrap());
    assert!(!leases.renew("another", "you", Duration::from_mins(1)).await.unwrap());
    assert!(!leases.release("another", "you").await.unwrap());
    assert!(leases.release("another", "me").await.unwrap());
    assert!(leases.try_hold("another", "you", Duration::from_mins(1)).await.unwrap());
}

async fn an_expired_lease_is_taken_over_but_not_renewed(db: Database) {
    let leases = Leases::new(db);
    assert!(leases.try_hold("job", "old", Duration::ZERO).await.unwrap());
    assert!(!leases.renew("job", "old", Duration::from_mins(1)).await.unwrap());
    assert!(leases.try_hold("job", "new", Duration::from_mins(1)).await.unwrap());
    assert!(!leases.try_hold("job", "old", Duration::from_mins(1)).await.unwrap());
}

async fn the_feed_is_gapless_under_many_writers(db: Database) {
    let writers: Vec<_> = (0..50)
        .map(|number| {
            let db = db.clone();
            tokio::spawn(async move {
                db.write(move |tx| async move {
                    tx.changed(format!("one:{number}"));
                    tx.changed(format!("two:{number}"));
                    Ok::<_, DbError>(())
                })
                .await
                .unwrap();
            })
        })
        .collect();
    // A reader beside them sees every subject once, in an order without holes.
    let mut seq = 0;
    let mut seen = Vec::new();
    while seen.len() < 100 {
        match changes_since(&db, seq).await.unwrap() {
            Changes::Page { latest_seq, subjects, .. } => {
                let fresh = i64::try_from(subjects.len()).unwrap();
                assert_eq!(latest_seq, seq + fresh, "nothing is skipped");
                seq = latest_seq;
                seen.extend(subjects);
            }
            Changes::Gap { .. } => panic!("nothing was forgotten"),
        }
    }
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(seen.iter().collect::<BTreeSet<_>>().len(), 100);
    for pair in seen.chunks(2) {
        assert_eq!(pair[0].replace("one", "two"), pair[1], "one job is contiguous");
    }
}

async fn the_feed_tells_a_late_reader_what_it_missed(db: Database) {
    let number = i64::try_from(PAGE).unwrap() + 1;
    db.write(move |tx| async move {
        for subject in 0..number {
            tx.changed(format!("subject:{subject}"));
        }
        Ok::<_, DbError>(())
    })
    .await
    .unwrap();
    let Changes::Page { latest_seq, subjects, more } = changes_since(&db, 0).await.unwrap() else {
        panic!("nothing was forgotten");
    };
    assert_eq!((latest_seq, subjects.len(), more), (number - 1, PAGE, true));
    let rest = changes_since(&db, latest_seq).await.unwrap();
    let last = Changes::Page { latest_seq: number, subjects: vec![format!("subject:{}", number - 1)], more: false };
    assert_eq!(rest, last);
    assert_eq!(prune_changes(&db, Duration::from_hours(1)).await.unwrap(), 0);
    tokio::time::sleep(Duration::from_millis(5)).await;
    let removed = prune_changes(&db, Duration::ZERO).await.unwrap();
    assert_eq!(i64::try_from(removed).unwrap(), number);
    assert_eq!(changes_since(&db, 1).await.unwrap(), Changes::Gap { latest_seq: number });
    let nothing = Changes::Page { latest_seq: number, subjects: vec![], more: false };
    assert_eq!(changes_since(&db, number).await.unwrap(), nothing);
    let future = changes_since(&db, number + 5).await.unwrap();
    assert_eq!(future, Changes::Gap { latest_seq: number }, "another database");
    db.write(|tx| async move {
        tx.changed("next");
        Ok::<_, DbError>(())
    })
    .await
    .unwrap();
    let next = Changes::Page { latest_seq: number + 1, subjects: vec!["next".to_owned()], more: false };
    assert_eq!(changes_since(&db, number).await.unwrap(), next, "the numbers go on");
}

#[derive(Clone, Default)]
struct Collector {
    got: Arc<Mutex<Vec<String>>>,
    failures_left: Arc<AtomicUsize>,
    calls: Arc<AtomicUsize>,
}

impl Collector {
    fn got(&self) -> Vec<String> {
        self.got.lock().unwrap().clone()
    }

    async fn wait_for(&self, number: usize) {
        for _ in 0..1000 {
            if self.got().len() >= number {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{} of {number} were delivered", self.got().len());
    }
}

impl Sink for Collector {
    type Error = &'static str;

    async fn deliver(&self, batch: &[OutboxRow]) -> Result<(), Self::Error> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let ids = batch.iter().map(|row| row.id.clone());
        self.got.lock().unwrap().extend(ids);
        let take = |left: usize| left.checked_sub(1);
        match self.failures_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take) {
            Ok(_) => Err("on purpose"),
            Err(_) => Ok(()),
        }
    }
}

fn start_relay(
    db: &Database,
    holder: &str,
    sink: &Collector,
    options: RelayOptions,
) -> (watch::Sender<bool>, tokio::task::JoinHandle<()>) {
    let (stop, stopping) = watch::channel(false);
    let relay = Relay::new(db.clone(), "webhook", holder, sink.clone(), options);
    (stop, tokio::spawn(relay.run(stopping)))
}

async fn emit(db: &Database, ids: std::ops::Range<i32>) {
    db.write(move |tx| async move {
        for id in ids {
            tx.emit(message(format!("evt_{id}")));
        }
        Ok::<_, DbError>(())
    })
    .await
    .unwrap();
}

fn names(ids: std::ops::Range<i32>) -> Vec<String> {
    ids.map(|id| format!("evt_{id}")).collect()
}

async fn wait_until_empty(db: &Database) {
    for _ in 0..1000 {
        if count(db, "outbox").await == 0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("rows are left in the outbox");
}

async fn the_relay_delivers_in_order_and_deletes(db: Database) {
    emit(&db, 0..450).await;
    let sink = Collector::default();
    let (stop, relay) = start_relay(&db, "one", &sink, RelayOptions::default());
    wait_until_empty(&db).await;
    assert_eq!(sink.got(), names(0..450));
    assert_eq!(sink.calls.load(Ordering::SeqCst), 3, "200 at most at once");
    stop.send(true).unwrap();
    relay.await.unwrap();
    let free = Leases::new(db.clone());
    assert!(free.try_hold("outbox:webhook", "other", Duration::from_secs(1)).await.unwrap());
}

async fn the_relay_tries_again_after_a_failure(db: Database) {
    emit(&db, 0..3).await;
    let sink = Collector::default();
    sink.failures_left.store(2, Ordering::SeqCst);
    let (stop, relay) = start_relay(&db, "one", &sink, RelayOptions::default());
    wait_until_empty(&db).await;
    // Delivered before it failed, and delivered again: at least once.
    assert_eq!(sink.got(), [names(0..3), names(0..3), names(0..3)].concat());
    stop.send(true).unwrap();
    relay.await.unwrap();
}

async fn the_relay_is_woken_by_a_commit(db: Database) {
    let sink = Collector::default();
    let never = RelayOptions { poll: Duration::from_hours(1), ..RelayOptions::default() };
    let (stop, relay) = start_relay(&db, "one", &sink, never);
    tokio::time::sleep(Duration::from_millis(50)).await;
    emit(&db, 0..1).await;
    sink.wait_for(1).await;
    stop.send(true).unwrap();
    relay.await.unwrap();
}

async fn two_relays_share_one_target(db: Database) {
    let sink = Collector::default();
    let quick = RelayOptions { poll: Duration::from_millis(5), ..RelayOptions::default() };
    let (stop_one, one) = start_relay(&db, "one", &sink, quick);
    let (stop_two, two) = start_relay(&db, "two", &sink, quick);
    for start in 0..20 {
        emit(&db, start * 10..start * 10 + 10).await;
    }
    wait_until_empty(&db).await;
    assert_eq!(sink.got(), names(0..200), "in order and, without a failure, once");
    stop_one.send(true).unwrap();
    stop_two.send(true).unwrap();
    one.await.unwrap();
    two.await.unwrap();
}

async fn migrations_go_up_down_and_up(db: Database) {
    use paperkey_kit::db::MigrationState::{self, Applied, Pending, Unknown};
    use paperkey_migrations::kit::Migrator as Old;
    let states = |states: Vec<paperkey_kit::db::MigrationStatus>| -> Vec<MigrationState> {
        states.into_iter().map(|status| status.state).collect()
    };
    assert_eq!(states(db.migration_status::<Migrator>().await.unwrap()), [Applied; 5]);
    assert_eq!(states(db.migration_status::<Old>().await.unwrap()), [Applied, Applied, Applied, Applied, Unknown]);
    assert!(db.pending_migrations::<Old>().await.unwrap().is_empty(), "newer is good enough");
    add(&db, "before").await.unwrap();
    // The release before does nothing about it, and takes nothing of it back; one that has gone another way is refused.
    db.migrate_up::<Old>().await.unwrap();
    let refused = [db.migrate_down::<Old>(1).await, db.migrate_up::<Forked>().await];
    for refused in refused {
        let said = refused.unwrap_err().to_string();
        assert!(said.contains("it has test_0001_seats, which this release does not know"), "{said}");
    }
    add(&db, "still").await.unwrap();
    db.migrate_down::<Migrator>(1).await.unwrap();
    assert_eq!(db.pending_migrations::<Migrator>().await.unwrap(), ["test_0001_seats"]);
    assert!(add(&db, "nowhere").await.is_err());
    db.migrate_down::<Migrator>(5).await.unwrap();
    assert_eq!(states(db.migration_status::<Migrator>().await.unwrap()), [Pending; 5]);
    let (one, two) = tokio::join!(db.migrate_up::<Migrator>(), db.migrate_up::<Migrator>());
    one.unwrap();
    two.unwrap();
    add(&db, "after").await.unwrap();
    assert_eq!(ids(&db).await, ["after".to_owned()].into());
}

async fn statements_are_counted(db: Database) {
    let before = db.stats();
    add(&db, "counted").await.unwrap();
    ids(&db).await;
    db.write(|_tx| async move { Ok::<_, DbError>(()) }).await.unwrap();
    let after = db.stats();
    assert_eq!(after.write_jobs - before.write_jobs, 2);
    assert_eq!(after.read_jobs - before.read_jobs, 1);
    assert_eq!(after.write_statements - before.write_statements, 1);
    assert_eq!(after.read_statements - before.read_statements, 1);
    assert!(after.commits > before.commits);
    assert_eq!(after.statements() - before.statements(), 2);
}

async fn a_closed_database_refuses_work_but_finishes_what_it_has(db: Database) {
    let holding = hold_writer(&db).await;
    let last = {
        let db = db.clone();
        tokio::spawn(async move { add(&db, "last").await })
    };
    tokio::time::sleep(Duration::from_millis(30)).await;
    let closing = db.clone();
    closing.close().await;
    holding.await.unwrap();
    last.await.unwrap().unwrap();
    assert!(matches!(add(&db, "late").await, Err(DbError::Unavailable(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_waits_for_a_table_keeps_nobody_else_from_it() {
    let Some(place) = TestDb::postgres().await else { return };
    let db = place.open().await;
    db.migrate_up::<Migrator>().await.unwrap();
    add(&db, "first").await.unwrap();
    // Somebody who reads for long, and longer than a migration waits.
    let (holding, is_held) = oneshot::channel();
    let (go_on, may_go_on) = oneshot::channel::<()>();
    let reader = db.clone();
    let long = tokio::spawn(async move {
        reader
            .snapshot(|reader| async move {
                seats::Entity::find().all(&reader).await?;
                holding.send(()).unwrap();
                may_go_on.await.unwrap();
                Ok::<_, DbError>(())
            })
            .await
    });
    is_held.await.unwrap();
    let migrator = db.clone();
    let mut migrating = tokio::spawn(async move { migrator.migrate_down::<Migrator>(1).await });
    // Others wait behind it for a while, are let pass, and are answered, while it is not done.
    for id in ["second", "third", "fourth", "fifth"] {
        add(&db, id).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    assert!((&mut migrating).now_or_never().is_none());
    go_on.send(()).unwrap();
    long.await.unwrap().unwrap();
    migrating.await.unwrap().unwrap();
    assert!(add(&db, "late").await.is_err());
    db.close().await;
    place.remove().await;
}

#[tokio::test]
async fn an_empty_database_has_everything_pending() {
    for db in [Some(TestDb::sqlite()), TestDb::postgres().await].into_iter().flatten() {
        let database = db.open().await;
        database.ping().await.unwrap();
        assert_eq!(database.pending_migrations::<Migrator>().await.unwrap().len(), 5);
        database.close().await;
        db.remove().await;
    }
}

#[tokio::test]
async fn a_feed_that_is_off_writes_nothing() {
    let place = TestDb::sqlite();
    let mut options = place.options();
    options.feed = false;
    (options.clock, _) = Clock::manual(1);
    let db = Database::open(options).await.unwrap();
    db.migrate_up::<Migrator>().await.unwrap();
    db.write(|tx| async move {
        tx.changed("nobody");
        Ok::<_, DbError>(())
    })
    .await
    .unwrap();
    assert_eq!(latest_seq(&db).await.unwrap(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_from_before_the_clock_was_set_back_keeps_nobody_waiting() {
    const TTL: Duration = Duration::from_secs(30);
    for place in [Some(TestDb::sqlite()), TestDb::postgres().await].into_iter().flatten() {
        let (clock, hand) = Clock::manual(1_790_000_000_000);
        let mut options = place.options();
        options.clock = clock;
        let db = Database::open(options).await.unwrap();
        db.migrate_up::<Migrator>().await.unwrap();
        let leases = Leases::new(db.clone());
        assert!(leases.try_hold("job", "dead", TTL).await.unwrap());

        // Clocks that differ by less than the time of a lease are still believed.
        hand.advance_ms(-30_000);
        assert!(!leases.try_hold("job", "living", TTL).await.unwrap());
        hand.advance_ms(-1);
        assert!(leases.try_hold("job", "living", TTL).await.unwrap());
        assert!(!leases.try_hold("job", "other", TTL).await.unwrap());
        assert!(!leases.renew("job", "dead", TTL).await.unwrap());

        // Who holds one goes on with it, and from then on it ends when it should.
        hand.advance_ms(-3_600_000);
        assert!(leases.renew("job", "living", TTL).await.unwrap());
        assert!(!leases.try_hold("job", "other", TTL).await.unwrap());
        hand.advance_ms(30_000);
        assert!(!leases.renew("job", "living", TTL).await.unwrap());
        assert!(leases.try_hold("job", "other", TTL).await.unwrap());

        // Forward it was never a matter of belief.
        hand.advance_ms(3_600_000);
        assert!(leases.try_hold("job", "living", TTL).await.unwrap());
        db.close().await;
        place.remove().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_were_cut_cost_nobody_a_job() {
    let Some(place) = TestDb::postgres().await else { return };
    let db = place.migrated::<Migrator>().await;
    let knife = place.open().await;
    for round in 0..3 {
        // As many at once as there are connections, so that all of them are there to be cut.
        join_all((0..8).map(|_| {
            db.read(|reader| async move {
                let sleep =
                    Statement::from_string(reader.get_database_backend(), "SELECT pg_sleep(0.2)::text AS slept");
                reader.query_one_raw(sleep).await.map(drop).map_err(DbError::from)
            })
        }))
        .await
        .into_iter()
        .collect::<Result<Vec<_>, _>>()
        .unwrap();
        let cut = knife.read(|reader| async move {
            let cut = "SELECT count(pg_terminate_backend(pid)) AS cut FROM pg_stat_activity \
                 WHERE datname = current_database() AND pid <> pg_backend_pid()";
            let row = reader.query_one_raw(Statement::from_string(reader.get_database_backend(), cut)).await?;
            Ok::<i64, DbError>(row.unwrap().try_get("", "cut")?)
        });
        assert!(cut.await.unwrap() >= 4);
        let seats = (0..8).map(|seat| &*Box::leak(format!("{round}-{seat}").into_boxed_str()));
        let (written, read) =
            tokio::join!(join_all(seats.map(|seat| add(&db, seat))), join_all((0..8).map(|_| db.ping())),);
        assert!(written.iter().chain(&read).all(Result::is_ok), "{written:?} {read:?}");
        let snapshot = db.snapshot(|reader| async move { Ok::<_, DbError>(reader.get_database_backend()) });
        snapshot.await.unwrap();
    }
    assert_eq!(ids(&db).await.len(), 24);
    db.close().await;
    knife.close().await;
    place.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_too_many_wait_for_a_connection_the_next_is_refused_at_once() {
    for place in [Some(TestDb::sqlite()), TestDb::postgres().await].into_iter().flatten() {
        let mut options = place.options();
        options.max_connections = 1;
        let db = Database::open(options).await.unwrap();
        db.migrate_up::<Migrator>().await.unwrap();
        let (begun, is_held) = oneshot::channel();
        let (go, gone) = std::sync::mpsc::channel::<()>();
        let holder = db.clone();
        let holder = tokio::spawn(async move {
            holder
                .snapshot(|_reader| async move {
                    let _ = begun.send(());
                    let _ = tokio::task::block_in_place(|| gone.recv());
                    Ok::<_, DbError>(())
                })
                .await
        });
        is_held.await.unwrap();
        let (mut waiting, mut refused) = (Vec::new(), 0);
        for _ in 0..80 {
            let db = db.clone();
            let mut job = Box::pin(async move { db.ping().await });
            match (&mut job).now_or_never() {
                Some(answer) => {
                    assert_eq!(answer, Err(DbError::Overloaded));
                    refused += 1;
                }
                None => waiting.push(job),
            }
        }
        assert!((64..=65).contains(&waiting.len()), "{}", waiting.len());
        assert_eq!(db.stats().refused, refused);
        let (_, failures) = db.figures().jobs(JobKind::Read);
        assert_eq!(failures, refused, "who is refused has failed");
        // What everything else stands on waits for none of them.
        changes_since(&db, 0).await.unwrap();
        assert_eq!(db.pending_migrations::<Migrator>().await.unwrap(), Vec::<String>::new());
        db.sample().await;
        assert!(db.figures().is_up());
        go.send(()).unwrap();
        holder.await.unwrap().unwrap();
        for job in waiting {
            job.await.unwrap();
        }
        db.ping().await.unwrap();
        db.close().await;
        place.remove().await;
    }
}
