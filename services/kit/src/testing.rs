//! Databases for tests: one suite, both engines.
//!
//! [`store_suite!`](crate::store_suite) turns async functions that take a
//! [`Database`] into tests on SQLite and on PostgreSQL. Each test has a database
//! of its own, which is gone afterwards. PostgreSQL is the one that
//! `PAPERKEY_TEST_POSTGRES_URL` names, with the rights to create databases.
//! Without it that half is skipped, loudly; where `CI=true` it fails instead.
//!
//! [`call`] is the way of a gateway to a service, for tests of a whole service. It sends whatever takes an
//! `Idempotency-Key` twice, as a caller does who has not heard the answer, so that every test tries that as well.
//!
//! What a store asked in its test is judged at the end of it: see `plans`.
//!
//! Deliberately absent: a fake engine. What a store does is what its engine does.

mod plans;

use std::{
    env,
    future::Future,
    panic::AssertUnwindSafe,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures_util::FutureExt as _;
use http::{HeaderMap, Request, Response, response::Parts};
use http_body_util::{BodyExt as _, Full};
use paperkey_proto::{
    Contract, Error,
    principal::v1::{Once as Token, Principal},
};
use rand::RngExt as _;
use sea_orm::{ConnectOptions, ConnectionTrait as _};
use sea_orm_migration::MigratorTrait;
use tonic::{Code, Status, body::Body};
use tower::Service as _;

use crate::{
    channel::{Channel, Exchange},
    clock::Clock,
    db::{Database, DatabaseOptions, DatabaseUrl, Recorded, Statements},
    once::{Once, REPLAYED_HEADER},
    policy::authorize,
    principal::{Caller, PRINCIPAL_HEADER, Signer, nobody},
};

/// Where the tests find PostgreSQL.
pub const POSTGRES_ENV: &str = "PAPERKEY_TEST_POSTGRES_URL";

/// The schema or file that tests work in.
const SERVICE: &str = "test";

/// A database that lives as long as its test.
#[derive(Debug)]
pub struct TestDb {
    options: DatabaseOptions,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Folder(PathBuf),
    Postgres { admin: String, name: String },
}

impl TestDb {
    /// A new SQLite database in a temporary folder.
    pub fn sqlite() -> Self {
        let folder = env::temp_dir().join(unique_name());
        let url = DatabaseUrl::Sqlite { folder: folder.clone() };
        Self { options: options(url), place: Place::Folder(folder) }
    }

    /// A new database on the PostgreSQL of [`POSTGRES_ENV`]; `None`, and a loud
    /// line, if there is none.
    ///
    /// # Panics
    ///
    /// If it cannot be made, and where `CI=true` if the variable is missing.
    pub async fn postgres() -> Option<Self> {
        let Ok(admin) = env::var(POSTGRES_ENV) else {
            skipped();
            return None;
        };
        let name = unique_name();
        run_as_admin(&admin, &format!("CREATE DATABASE \"{name}\"")).await;
        let url = DatabaseUrl::Postgres(with_database(&admin, &name));
        Some(Self { options: options(url), place: Place::Postgres { admin, name } })
    }

    /// Options for this database, to be changed and given to [`Database::open`].
    pub fn options(&self) -> DatabaseOptions {
        self.options.clone()
    }

    /// Opens it with the usual options.
    ///
    /// # Panics
    ///
    /// If that fails.
    pub async fn open(&self) -> Database {
        Database::open(self.options()).await.unwrap_or_else(|error| panic!("the test database does not open: {error}"))
    }

    /// Opens it with all tables of a migrator.
    ///
    /// # Panics
    ///
    /// If that fails.
    pub async fn migrated<M: MigratorTrait + 'static>(&self) -> Database {
        let database = self.open().await;
        if let Err(error) = database.migrate_up::<M>().await {
            panic!("the test database does not migrate: {error}");
        }
        database
    }

    /// Judges the plans of what it was asked, and removes the database. A folder goes by itself when this value does.
    ///
    /// # Panics
    ///
    /// If a statement costs more the more there is.
    pub async fn remove(self) {
        let outcome = AssertUnwindSafe(self.judge()).catch_unwind().await;
        self.discard().await;
        if let Err(panic) = outcome {
            std::panic::resume_unwind(panic);
        }
    }

    /// What it was asked, once.
    fn recorded(&self) -> Vec<Recorded> {
        self.options.statements.as_deref().map(Statements::all).unwrap_or_default()
    }

    async fn judge(&self) {
        match &self.options.url {
            DatabaseUrl::Postgres(url) => plans::judge_postgres(url, SERVICE, self.recorded()).await,
            DatabaseUrl::Sqlite { .. } => {
                let database = self.open().await;
                plans::judge_sqlite(&database, self.recorded()).await;
                database.close().await;
            }
        }
    }

    async fn discard(&self) {
        if let Place::Postgres { admin, name } = &self.place {
            let drop = format!("DROP DATABASE IF EXISTS \"{name}\" WITH (FORCE)");
            run_as_admin(admin, &drop).await;
        }
    }
}

impl Drop for TestDb {
    fn drop(&mut self) {
        if let Place::Folder(folder) = &self.place {
            // A folder that stays behind is a nuisance, not a failure.
            let _ = std::fs::remove_dir_all(folder);
        }
    }
}

/// Runs one test of a suite on SQLite. Used by [`store_suite!`](crate::store_suite).
pub async fn on_sqlite<M, F, Fut>(test: F)
where
    M: MigratorTrait + 'static,
    F: FnOnce(Database) -> Fut,
    Fut: Future<Output = ()>,
{
    run::<M, F, Fut>(TestDb::sqlite(), test).await;
}

/// Runs one test of a suite on PostgreSQL. Used by
/// [`store_suite!`](crate::store_suite).
pub async fn on_postgres<M, F, Fut>(test: F)
where
    M: MigratorTrait + 'static,
    F: FnOnce(Database) -> Fut,
    Fut: Future<Output = ()>,
{
    if let Some(db) = TestDb::postgres().await {
        run::<M, F, Fut>(db, test).await;
    }
}

async fn run<M, F, Fut>(db: TestDb, test: F)
where
    M: MigratorTrait + 'static,
    F: FnOnce(Database) -> Fut,
    Fut: Future<Output = ()>,
{
    let database = db.migrated::<M>().await;
    // The database goes even if the test fails.
    let outcome = AssertUnwindSafe(test(database.clone())).catch_unwind().await;
    if let Err(panic) = outcome {
        db.discard().await;
        std::panic::resume_unwind(panic);
    }
    database.close().await;
    db.remove().await;
}

/// Makes tests for both engines out of async functions that take a [`Database`]
/// with the tables of the given migrator. Once in a file, beside the functions:
///
/// ```ignore
/// store_suite! {
///     paperkey_migrations::auth::Migrator;
///     a_team_is_found_by_its_id,
///     a_deleted_key_is_gone,
/// }
/// ```
#[macro_export]
macro_rules! store_suite {
    ($migrator:ty; $($test:ident),+ $(,)?) => {
        mod sqlite {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $test() {
                    $crate::testing::on_sqlite::<$migrator, _, _>(super::$test).await;
                }
            )+
        }

        mod postgres {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $test() {
                    $crate::testing::on_postgres::<$migrator, _, _>(super::$test).await;
                }
            )+
        }
    };
}

/// Makes a call as somebody, signed as by a gateway; one that takes an `Idempotency-Key` twice, under a key of its own.
///
/// # Panics
///
/// If the second answer is not what was kept of the first.
pub fn call(
    mut channel: Channel,
    signer: &Signer,
    principal: Option<&Principal>,
    request_id: &str,
    mut request: Request<Body>,
) -> Exchange {
    let rpc = request.uri().path().to_owned();
    let principal: Arc<Principal> = principal.map_or_else(nobody, |principal| principal.clone().into());
    // Who may not call the method at all is refused before anything is looked up or kept.
    let may_repeat = Contract::get()
        .method(&rpc)
        .is_some_and(|method| method.policy.idempotent && authorize(method, &principal, signer.clock.now_ms()).is_ok());
    let once = may_repeat.then(fresh_once).flatten();
    let caller = Caller { principal, request_id: request_id.to_owned(), once: once.map(Into::into) };
    request.headers_mut().insert(PRINCIPAL_HEADER, signer.sign_as(&caller, &rpc));
    if caller.once.is_none() {
        return channel.call(request);
    }
    Box::pin(async move {
        let (head, body) = request.into_parts();
        let body = body.collect().await?.to_bytes();
        let again = Request::from_parts(head.clone(), Body::new(Full::new(body.clone())));
        let first = whole(channel.call(Request::from_parts(head, Body::new(Full::new(body)))).await?).await?;
        let refusal = Status::from_header_map(&first.0.headers).filter(|status| status.code() != Code::Ok);
        let code = refusal.map(|status| Error::from_status(&status).entry().http_status);
        let is_kept = code.is_none_or(|code| (400..500).contains(&code) && code != 429);
        if is_kept {
            let second = whole(channel.call(again).await?).await?;
            assert!(second.0.headers.contains_key(REPLAYED_HEADER), "{rpc} was done twice: {:?}", second.0);
            assert_eq!((&first.1, &first.2), (&second.1, &second.2), "{rpc} is answered in two ways");
            for name in ["grpc-status", "grpc-message", "grpc-status-details-bin"] {
                assert_eq!(first.0.headers.get(name), second.0.headers.get(name), "{rpc} is refused in two ways");
            }
        }
        let (head, data, trailers) = first;
        let body = Full::new(data).with_trailers(std::future::ready(trailers.map(Ok)));
        Ok(Response::from_parts(head, Body::new(body)))
    })
}

/// What tells a call from all others.
fn fresh_once() -> Option<Once> {
    let mut chance = rand::rng();
    let mut bytes = || chance.random::<[u8; 32]>().to_vec();
    Once::new(Token { id: bytes(), request_hash: bytes(), seal_key: bytes() })
}

async fn whole(response: Response<Body>) -> Result<(Parts, Bytes, Option<HeaderMap>), Status> {
    let (head, body) = response.into_parts();
    let collected = body.collect().await?;
    let trailers = collected.trailers().cloned();
    Ok((head, collected.to_bytes(), trailers))
}

fn options(url: DatabaseUrl) -> DatabaseOptions {
    let statements = Some(Arc::new(Statements::default()));
    DatabaseOptions { statements, ..DatabaseOptions::new(SERVICE, url, Clock::system()) }
}

fn unique_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let nanos = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.subsec_nanos());
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("paperkey_test_{}_{nanos}_{number}", std::process::id())
}

async fn run_as_admin(url: &str, sql: &str) {
    let mut options = ConnectOptions::new(url);
    options.max_connections(1).sqlx_logging(false);
    let result = async {
        let connection = sea_orm::Database::connect(options).await?;
        connection.execute_unprepared(sql).await?;
        connection.close().await
    }
    .await;
    if let Err(error) = result {
        panic!("PostgreSQL of {POSTGRES_ENV} refused: {error}");
    }
}

/// The same server, another database.
fn with_database(url: &str, name: &str) -> String {
    let (main, query) = url.split_once('?').map_or((url, None), |(main, query)| (main, Some(query)));
    let start = main.find("://").map_or(0, |at| at + 3);
    let server = match main[start..].find('/') {
        Some(at) => &main[..start + at],
        None => main,
    };
    match query {
        Some(query) => format!("{server}/{name}?{query}"),
        None => format!("{server}/{name}"),
    }
}

#[expect(clippy::print_stderr, reason = "a skipped half must be seen in the output of the tests")]
fn skipped() {
    assert!(env::var("CI").as_deref() != Ok("true"), "{POSTGRES_ENV} is not set, and a skipped half is a failure here");
    eprintln!("*** {POSTGRES_ENV} is not set: the PostgreSQL half of this test was SKIPPED ***");
}
