//! Copies of files that are written to: of one moment, whole, and in nobody's way.

use std::{
    fs,
    ops::ControlFlow,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::Duration,
};

use paperkey_kit::{
    clock::Clock,
    db::{Database, DatabaseOptions, DatabaseUrl, DbError, Snapshots},
};
use paperkey_migrations::kit::Migrator;
use rusqlite::{Connection, OpenFlags};
use sea_orm::{ConnectionTrait as _, Statement};
use tempfile::TempDir;

const BOTH: [&str; 2] = ["auth", "webhook"];

struct House {
    folder: TempDir,
    databases: Vec<Database>,
}

impl House {
    async fn new() -> Self {
        let folder = TempDir::with_prefix("paperkey-snapshot-").unwrap();
        let mut databases = Vec::new();
        for service in BOTH {
            let url = DatabaseUrl::Sqlite { folder: folder.path().to_owned() };
            let database = Database::open(DatabaseOptions::new(service, url, Clock::system())).await.unwrap();
            database.migrate_up::<Migrator>().await.unwrap();
            databases.push(database);
        }
        Self { folder, databases }
    }

    fn path(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    fn target(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

async fn lease(database: &Database, name: String) -> Result<(), DbError> {
    let sql = format!("INSERT INTO leases VALUES ('{name}', 'me', 0)");
    database
        .write(move |tx| async move {
            tx.execute_raw(Statement::from_string(tx.get_database_backend(), sql)).await?;
            Ok(())
        })
        .await
}

fn leases_of(path: &Path) -> i64 {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY).unwrap();
    connection.query_row("SELECT count(*) FROM leases", [], |row| row.get(0)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn writes_go_on_while_a_copy_is_made_and_are_not_in_it() {
    let house = House::new().await;
    let first = &house.databases[0];
    // More than is copied at a time.
    first
        .write(|tx| async move {
            tx.execute_unprepared("INSERT INTO leases VALUES ('big', hex(zeroblob(5000000)), 0)").await?;
            Ok::<_, DbError>(())
        })
        .await
        .unwrap();
    let (copying, is_copying) = mpsc::channel();
    let (go_on, may_go_on) = mpsc::channel::<()>();
    let (path, target) = (house.path(), house.target("copy.db"));
    let work = tokio::task::spawn_blocking(move || {
        let (files, ()) = Snapshots::take(&path, &BOTH, || Ok(())).unwrap();
        let mut steps = 0;
        let applied = files.files()[0]
            .copy_to(&target, |copied| {
                steps += 1;
                if steps == 1 {
                    assert!(copied.pages < copied.of, "one step is not all of it: {copied:?}");
                    copying.send(()).unwrap();
                    may_go_on.recv().unwrap();
                }
                ControlFlow::Continue(())
            })
            .unwrap()
            .unwrap();
        assert_eq!(applied, ["kit_0001_tables", "kit_0002_audit", "kit_0003_kept_keys", "kit_0004_waiting_audit"]);
        target
    });
    tokio::task::spawn_blocking(move || is_copying.recv().unwrap()).await.unwrap();
    // A copy stands in the middle, for as long as it likes, and every write is answered.
    for number in 0..100 {
        for database in &house.databases {
            lease(database, format!("later-{number}")).await.unwrap();
        }
    }
    go_on.send(()).unwrap();
    let target = work.await.unwrap();
    assert_eq!(leases_of(&target), 1);
    assert_eq!(leases_of(&house.target("auth.db")), 101);
    assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o600);
    for beside in ["copy.db-wal", "copy.db-shm", "copy.db-journal"] {
        assert!(!house.target(beside).exists(), "{beside}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_comes_while_writers_are_held_waits_and_is_done() {
    let house = House::new().await;
    let (path, database) = (house.path(), house.databases[1].clone());
    let runtime = tokio::runtime::Handle::current();
    let (files, waiting) = tokio::task::spawn_blocking(move || {
        Snapshots::take(&path, &BOTH, || {
            let database = database.clone();
            let waiting = runtime.spawn(async move { lease(&database, "waits".to_owned()).await });
            std::thread::sleep(Duration::from_millis(100));
            assert!(!waiting.is_finished(), "nobody writes while all are held");
            Ok(waiting)
        })
        .unwrap()
    })
    .await
    .unwrap();
    waiting.await.unwrap().unwrap();
    assert!(files.held_for() >= Duration::from_millis(100));
    let target = house.target("copy.db");
    files.files()[1].copy_to(&target, |_| ControlFlow::Continue(())).unwrap().unwrap();
    assert_eq!(leases_of(&target), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_files_are_of_one_moment_however_busy_their_writers_are() {
    let house = House::new().await;
    let ended = Arc::new(AtomicBool::new(false));
    let pairs: Vec<_> = (0..4)
        .map(|writer| {
            let (first, second) = (house.databases[0].clone(), house.databases[1].clone());
            let ended = Arc::clone(&ended);
            tokio::spawn(async move {
                let mut number = 0;
                while !ended.load(Ordering::SeqCst) {
                    number += 1;
                    // As an event: first where it comes from, then where it goes to.
                    lease(&first, format!("{writer}-{number}")).await.unwrap();
                    lease(&second, format!("{writer}-{number}")).await.unwrap();
                }
                number
            })
        })
        .collect();
    for round in 0..20 {
        let (path, targets) = (house.path(), BOTH.map(|name| house.target(&format!("{name}-{round}.copy"))));
        let counts = tokio::task::spawn_blocking(move || {
            let (files, ()) = Snapshots::take(&path, &BOTH, || Ok(())).unwrap();
            for (file, target) in files.files().iter().zip(&targets) {
                file.copy_to(target, |_| ControlFlow::Continue(())).unwrap().unwrap();
            }
            targets.map(|target| leases_of(&target))
        })
        .await
        .unwrap();
        let [first, second] = counts;
        assert!((second..=second + 4).contains(&first), "{first} came from one, and {second} to the other");
    }
    ended.store(true, Ordering::SeqCst);
    for pair in pairs {
        assert!(pair.await.unwrap() > 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_never_lets_go_is_not_waited_for_forever_and_nobody_stays_held() {
    let house = House::new().await;
    let blocked = Connection::open(house.target("webhook.db")).unwrap();
    blocked.execute_batch("BEGIN IMMEDIATE").unwrap();
    let path = house.path();
    let taking = tokio::task::spawn_blocking(move || Snapshots::take(&path, &BOTH, || Ok(())).map(|_| ()));
    let refused = taking.await.unwrap();
    assert!(matches!(refused, Err(DbError::Busy(_))), "{refused:?}");
    // The first file was held each time for a second at most; its writers waited, and none was refused.
    lease(&house.databases[0], "free".to_owned()).await.unwrap();
    blocked.execute_batch("ROLLBACK").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_is_left_off_says_so_and_a_damaged_one_is_refused() {
    let house = House::new().await;
    let (path, target) = (house.path(), house.target("copy.db"));
    let (files, ()) = Snapshots::take(&path, &BOTH, || Ok(())).unwrap();
    assert_eq!(files.files()[0].copy_to(&target, |_| ControlFlow::Break(())), Ok(None));
    let from = Connection::open(house.target("webhook.db")).unwrap();
    from.execute_batch(
        "PRAGMA foreign_keys = OFF; CREATE TABLE child (id INTEGER REFERENCES leases (name)); INSERT INTO child VALUES (7)",
    )
    .unwrap();
    drop(files);
    let (files, ()) = Snapshots::take(&path, &BOTH, || Ok(())).unwrap();
    let damaged = files.files()[1].copy_to(&house.target("damaged.db"), |_| ControlFlow::Continue(()));
    assert!(damaged.as_ref().is_err_and(|error| error.to_string().contains("damaged.db is damaged")), "{damaged:?}");
}
