//! A PostgreSQL database that lives as long as its installation.

use std::{env, thread};

use sea_orm::{ConnectOptions, ConnectionTrait as _, Database, DbBackend, DbErr, Statement};

/// Where the tests find PostgreSQL.
const POSTGRES_ENV: &str = "PAPERKEY_TEST_POSTGRES_URL";

/// How often a refused statement is tried: two databases that are made at once may be in each other's way.
const TRIES: u32 = 20;

/// A fresh database, gone when this value goes.
#[derive(Debug)]
pub(crate) struct PostgresDatabase {
    admin: String,
    name: String,
}

impl PostgresDatabase {
    /// A new, empty database; `None`, and a loud line, where there is no PostgreSQL.
    pub(crate) async fn create() -> Option<Self> {
        let Ok(admin) = env::var(POSTGRES_ENV) else {
            skipped();
            return None;
        };
        let name = format!("paperkey_suite_{:032x}", rand::random::<u128>());
        let create = format!("CREATE DATABASE \"{name}\" TEMPLATE template0");
        let mut tries = 0;
        while let Err(error) = execute(&admin, &create).await {
            tries += 1;
            assert!(tries < TRIES, "the PostgreSQL of {POSTGRES_ENV} refused: {error}");
        }
        Some(Self { admin, name })
    }

    /// The URL of this database.
    pub(crate) fn url(&self) -> String {
        let (main, query) = self.admin.split_once('?').map_or((self.admin.as_str(), None), |(m, q)| (m, Some(q)));
        let start = main.find("://").map_or(0, |at| at + 3);
        let server = main[start..].find('/').map_or(main, |at| &main[..start + at]);
        let query = query.map(|query| format!("?{query}")).unwrap_or_default();
        format!("{server}/{}{query}", self.name)
    }
}

impl PostgresDatabase {
    /// Every row of every table, as text and with the bytes that it holds; and the name of its table.
    pub(crate) async fn rows(&self) -> Vec<(String, Vec<u8>)> {
        let read = async {
            let mut options = ConnectOptions::new(self.url());
            options.max_connections(1).sqlx_logging(false);
            let connection = Database::connect(options).await?;
            let ask = |sql: String| Statement::from_string(DbBackend::Postgres, sql);
            let tables = "SELECT format('%I.%I', schemaname, tablename) AS name FROM pg_tables \
                          WHERE schemaname NOT IN ('pg_catalog', 'information_schema')";
            let mut rows = Vec::new();
            for table in connection.query_all_raw(ask(tables.to_owned())).await? {
                let table: String = table.try_get("", "name")?;
                for row in connection.query_all_raw(ask(format!("SELECT t::text AS row FROM {table} AS t"))).await? {
                    rows.push((table.clone(), with_bytes(&row.try_get::<String>("", "row")?)));
                }
            }
            connection.close().await?;
            Ok::<_, DbErr>(rows)
        };
        read.await.unwrap_or_else(|error| panic!("the tables cannot be read: {error}"))
    }
}

/// The text of a row, followed by the bytes that stand in it in hexadecimal digits.
fn with_bytes(row: &str) -> Vec<u8> {
    let mut all = row.as_bytes().to_vec();
    for hidden in row.split("\\x").skip(1) {
        let digit = |byte| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
        let digits: Vec<u8> = hidden.bytes().map_while(digit).collect();
        all.push(b'\n');
        all.extend(digits.chunks_exact(2).map(|pair| pair[0] * 16 + pair[1]));
    }
    all
}

impl Drop for PostgresDatabase {
    fn drop(&mut self) {
        let (admin, drop) = (self.admin.clone(), format!("DROP DATABASE IF EXISTS \"{}\" WITH (FORCE)", self.name));
        // A value may go inside a runtime, where nothing may block; so another thread waits.
        let dropping = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            if let Ok(runtime) = runtime {
                // A database that stays behind is a nuisance, not a failure.
                let _ = runtime.block_on(execute(&admin, &drop));
            }
        });
        let _ = dropping.join();
    }
}

async fn execute(url: &str, sql: &str) -> Result<(), DbErr> {
    let mut options = ConnectOptions::new(url);
    options.max_connections(1).sqlx_logging(false);
    let connection = Database::connect(options).await?;
    let outcome = connection.execute_unprepared(sql).await;
    connection.close().await?;
    outcome.map(drop)
}

#[expect(clippy::print_stderr, reason = "a skipped half must be seen in the output of the tests")]
fn skipped() {
    assert!(env::var("CI").as_deref() != Ok("true"), "{POSTGRES_ENV} is not set, and a skipped half is a failure here");
    eprintln!("*** {POSTGRES_ENV} is not set: the fleet's half of this test was SKIPPED ***");
}
