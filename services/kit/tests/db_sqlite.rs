//! What only SQLite can get wrong: groups, the file, the one writer.

use std::{os::unix::fs::PermissionsExt as _, time::Duration};

use paperkey_kit::{
    db::{Database, DatabaseUrl, DbError},
    testing::TestDb,
};
use paperkey_migrations::kit::Migrator;
use sea_orm::{ConnectionTrait, Statement};
use tokio::sync::oneshot;

async fn run(connection: &impl ConnectionTrait, sql: &str) -> Result<u64, DbError> {
    let statement = Statement::from_string(connection.get_database_backend(), sql);
    Ok(connection.execute_raw(statement).await?.rows_affected())
}

async fn lease(db: &Database, name: &'static str) -> Result<(), DbError> {
    db.write(move |tx| async move {
        run(&tx, &format!("INSERT INTO leases VALUES ('{name}', 'me', 0)")).await?;
        Ok(())
    })
    .await
}

async fn leases(db: &Database) -> Vec<String> {
    db.read(|reader| async move {
        let sql = "SELECT name FROM leases ORDER BY name";
        let statement = Statement::from_string(reader.get_database_backend(), sql);
        let rows = reader.query_all_raw(statement).await?;
        rows.iter().map(|row| Ok::<String, DbError>(row.try_get("", "name")?)).collect()
    })
    .await
    .unwrap()
}

/// Keeps the writer busy, so that what comes next is one group.
async fn hold_writer(db: &Database, ms: u64) -> tokio::task::JoinHandle<Result<(), DbError>> {
    let (started, running) = oneshot::channel();
    let db = db.clone();
    let holding = tokio::spawn(async move {
        db.write(move |_tx| async move {
            let _ = started.send(());
            std::thread::sleep(Duration::from_millis(ms));
            Ok(())
        })
        .await
    });
    running.await.unwrap();
    holding
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_shares_one_commit() {
    let place = TestDb::sqlite();
    let db = place.migrated::<Migrator>().await;
    let holding = hold_writer(&db, 100).await;
    let before = db.stats().commits;
    let (a, b, c) = tokio::join!(lease(&db, "a"), lease(&db, "b"), lease(&db, "c"));
    holding.await.unwrap().unwrap();
    a.unwrap();
    b.unwrap();
    c.unwrap();
    assert_eq!(db.stats().commits - before, 2, "the holder's and the group's");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_transaction_is_answered_ok_to_nobody() {
    let place = TestDb::sqlite();
    let db = place.migrated::<Migrator>().await;
    lease(&db, "taken").await.unwrap();
    let holding = hold_writer(&db, 100).await;
    // `OR ROLLBACK` ends the whole transaction, as a full disk does.
    let ruins = db.write(|tx| async move {
        run(&tx, "INSERT OR ROLLBACK INTO leases VALUES ('taken', 'me', 0)").await?;
        Ok::<_, DbError>(())
    });
    let (before, ruined, after) = tokio::join!(biased; lease(&db, "before"), ruins, lease(&db, "after"));
    holding.await.unwrap().unwrap();
    assert!(before.is_err(), "in the transaction that was lost");
    assert!(ruined.is_err());
    after.unwrap();
    assert_eq!(leases(&db).await, ["after", "taken"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_answered_ok_to_nobody() {
    let place = TestDb::sqlite();
    let db = place.migrated::<Migrator>().await;
    let filled = db
        .write(|tx| async move {
            tx.execute_unprepared("PRAGMA max_page_count = 40").await?;
            run(&tx, "INSERT INTO leases VALUES ('big', hex(zeroblob(1000000)), 0)").await
        })
        .await;
    assert_eq!(filled, Err(DbError::Unavailable("the disk is full".to_owned())));
    lease(&db, "small").await.unwrap();
    assert_eq!(leases(&db).await, ["small"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_waits_for_something_else_is_dropped() {
    let place = TestDb::sqlite();
    let mut options = place.options();
    options.job_timeout = Duration::from_millis(50);
    let db = Database::open(options).await.unwrap();
    db.migrate_up::<Migrator>().await.unwrap();
    let stuck = db
        .write(|tx| async move {
            run(&tx, "INSERT INTO leases VALUES ('stuck', 'me', 0)").await?;
            std::future::pending::<()>().await;
            Ok::<_, DbError>(())
        })
        .await;
    assert!(matches!(stuck, Err(DbError::Internal(_))));
    lease(&db, "next").await.unwrap();
    assert_eq!(leases(&db).await, ["next"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_finds_the_queue_full_is_refused_at_once() {
    let place = TestDb::sqlite();
    let mut options = place.options();
    options.queue_len = 1;
    let db = Database::open(options).await.unwrap();
    db.migrate_up::<Migrator>().await.unwrap();
    let holding = hold_writer(&db, 200).await;
    let (first, second) = tokio::join!(lease(&db, "first"), lease(&db, "second"));
    holding.await.unwrap().unwrap();
    first.unwrap();
    assert_eq!(second, Err(DbError::Overloaded));
    assert_eq!(db.stats().refused, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_files_are_for_their_owner_only() {
    let place = TestDb::sqlite();
    let db = place.migrated::<Migrator>().await;
    lease(&db, "a").await.unwrap();
    let DatabaseUrl::Sqlite { folder } = place.options().url else {
        panic!("a folder");
    };
    for file in ["test.db", "test.db-wal", "test.db-shm"] {
        let mode = folder.join(file).metadata().unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{file}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_answered_survives_reopening() {
    let place = TestDb::sqlite();
    let db = place.migrated::<Migrator>().await;
    lease(&db, "kept").await.unwrap();
    // A second process, so to speak, sees it and may write too.
    let other = place.open().await;
    assert_eq!(leases(&other).await, ["kept"]);
    lease(&other, "other").await.unwrap();
    assert_eq!(leases(&db).await, ["kept", "other"]);
    db.close().await;
    other.close().await;
    assert_eq!(leases(&place.open().await).await, ["kept", "other"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_migration_that_fails_leaves_nothing_behind() {
    use sea_orm_migration::{MigrationName, MigrationTrait, MigratorTrait, SchemaManager, async_trait};

    struct Broken;

    impl MigrationName for Broken {
        fn name(&self) -> &'static str {
            "broken"
        }
    }

    #[async_trait::async_trait]
    impl MigrationTrait for Broken {
        async fn up(&self, manager: &SchemaManager) -> Result<(), sea_orm::DbErr> {
            let connection = manager.get_connection();
            connection.execute_unprepared("CREATE TABLE half (id TEXT)").await?;
            connection.execute_unprepared("CREATE TABLE half (id TEXT)").await?;
            Ok(())
        }
    }

    struct All;

    impl MigratorTrait for All {
        fn migrations() -> Vec<Box<dyn MigrationTrait>> {
            let mut all = paperkey_migrations::kit::migrations();
            all.push(Box::new(Broken));
            all
        }
    }

    let place = TestDb::sqlite();
    let db = place.open().await;
    assert!(db.migrate_up::<All>().await.is_err());
    assert_eq!(db.pending_migrations::<All>().await.unwrap().len(), All::migrations().len());
    db.migrate_up::<Migrator>().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn statistics_of_a_file_that_was_small_are_forgotten() {
    let place = TestDb::sqlite();
    let db = place.migrated::<Migrator>().await;
    lease(&db, "a").await.unwrap();
    db.write(|tx| async move { run(&tx, "ANALYZE").await }).await.unwrap();
    db.close().await;
    let db = place.open().await;
    let kept = db.read(|reader| async move {
        let statement =
            Statement::from_string(reader.get_database_backend(), "SELECT COUNT(*) AS kept FROM sqlite_stat1");
        let row = reader.query_one_raw(statement).await?;
        row.map(|row| Ok::<i64, DbError>(row.try_get("", "kept")?)).transpose()
    });
    assert_eq!(kept.await.unwrap(), Some(0));
}
