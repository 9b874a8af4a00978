//! Whether a call costs the same among ten million licences as among ten thousand.
//!
//! Two databases are filled, one after the other, with licences and API keys as the product would have written them:
//! sealed by its own sealer and hashed by its own keys, so that each licence can be validated by its key and each API
//! key verified. They come by COPY, with the indexes made afterwards, as a restored backup would. Then the product runs
//! on them as a fleet, each call is made so many times, and the CPU time of its processes and of the database is read
//! before and after. The same number of calls on both: caches of the two are as warm.

use std::{
    env,
    fmt::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use paperkey_kit::{
    clock::Clock,
    db::{Database, DatabaseOptions, DatabaseUrl},
    ids::new_id,
    secrets::{KeptKey, KeyedHash, Keyring, Purpose, Sealer, Secret},
    token::{TokenKind, shown_prefix},
};
use paperkey_licensing::domain::license_key::LicenseKey;
use sea_orm::sqlx::{AssertSqlSafe, Connection as _, PgConnection, Row as _};
use serde_json::json;
use tokio::sync::mpsc;

use crate::{
    Result,
    deliveries::{POSTGRES_PID, POSTGRES_URL},
    load::{Counted, Load, cpu_us},
    peers::{Installation, KEYS, Storage, Vendor},
    results,
};

/// How many licences there are in the smaller installation.
const SMALL: u64 = 10_000;
/// Licences for each API key in the larger one; the smaller has as many API keys as licences.
const LICENSES_PER_KEY: u64 = 10;
/// Of ten licences, so many are the vendor's that is measured; the others are of a thousand other teams.
const OWN_OF_TEN: u64 = 8;
const OTHER_TEAMS: u64 = 1_000;
/// Rows of one portion of a COPY.
const PORTION: u64 = 5_000;
/// Portions that wait for the database.
const WAITING: usize = 8;
/// Connections that call.
const CONNECTIONS: usize = 32;
/// Calls of a measurement whose answers are known to the caches.
const WARM_CALLS: usize = 60_000;
/// Calls of one that asks the database each time: each brings something new.
const COLD_CALLS: usize = 5_000;
/// Calls of a measurement of lists and of writes.
const CALLS: usize = 3_000;
/// Calls before each measurement, for connections to be made.
const WARM_UP: usize = 500;
/// Different licences and API keys that warm calls go round.
const ROUND: usize = 100;
/// Licences that are due at once.
const DUE: usize = 2_000;
/// What a call may cost in the larger installation, of what it costs in the smaller.
const MOST: f64 = 1.3;
/// However slow it is, what is waited for ends.
const PATIENCE: Duration = Duration::from_mins(5);
/// The machine that is activated where one is.
const FINGERPRINT: &str = "paperkey_fp_v1_bench";
const YEAR_MS: i64 = 365 * 24 * 60 * 60 * 1_000;

/// What a measurement found.
struct Figure {
    name: &'static str,
    calls: u64,
    elapsed: Duration,
    p50_us: u64,
    p99_us: u64,
    cpu_us: u64,
    database_cpu_us: u64,
}

impl Figure {
    #[expect(clippy::cast_precision_loss, reason = "counts of a few seconds are far below 2^52")]
    fn each(&self, us: u64) -> f64 {
        us as f64 / self.calls.max(1) as f64
    }

    fn all(&self) -> f64 {
        self.each(self.cpu_us + self.database_cpu_us)
    }
}

/// Everything that was found in an installation of one size.
struct Size {
    licenses: u64,
    keys: u64,
    filled_in: Duration,
    bytes: i64,
    /// What the database keeps in memory at most, as it says it.
    buffers: String,
    figures: Vec<Figure>,
}

/// Measures both and prints the table.
#[expect(clippy::print_stdout, reason = "the table is this command's answer")]
pub(crate) async fn run(licenses: u64, binary: &Path, write: Option<PathBuf>) -> Result<()> {
    let url = env::var(POSTGRES_URL).map_err(|_| format!("{POSTGRES_URL} is not set: start this by bench/run"))?;
    let pid = env::var(POSTGRES_PID).ok().and_then(|pid| pid.parse().ok());
    let mut sizes = Vec::new();
    for (licenses, keys) in [(SMALL, SMALL), (licenses, (licenses / LICENSES_PER_KEY).max(SMALL))] {
        sizes.push(size(&url, pid, binary, licenses, keys).await?);
    }
    let table = table(&sizes)?;
    println!("{table}");
    if let Some(path) = write {
        results::write(&path, &table)?;
    }
    Ok(())
}

fn table(sizes: &[Size]) -> Result<String> {
    let [small, large] = sizes else { return Err("two sizes are compared".into()) };
    let cores = std::thread::available_parallelism()?;
    let mut text = format!(
        "## At scale\n\n\
         Command: `bench/run --only scale --licenses {}`. {} licences and {} API keys beside {} and {}, on PostgreSQL with \
         {} of shared buffers, into which tables and unique indexes were read before ({:.1} GB after {} s, beside {:.2} GB). The product runs as five processes; \
         {cores} cores shared by client, product and database. The same number of calls each: warm ones go round {ROUND} \
         keys, cold ones bring a new key each time. CPU is user and system time per call; the ratio is of all of it, the \
         database's included, and may be {MOST} for validations and verifications.\n\n\
         | what | small: CPU µs | of the database | p50 µs | p99 µs | large: CPU µs | of the database | p50 µs | p99 µs | \
         ratio |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n",
        large.licenses,
        large.licenses,
        large.keys,
        small.licenses,
        small.keys,
        large.buffers,
        gigabytes(large.bytes),
        large.filled_in.as_secs(),
        gigabytes(small.bytes),
    );
    for (small, large) in small.figures.iter().zip(&large.figures) {
        write!(text, "| {}", small.name)?;
        for figure in [small, large] {
            write!(
                text,
                " | {:.1} | {:.1} | {} | {}",
                figure.each(figure.cpu_us),
                figure.each(figure.database_cpu_us),
                figure.p50_us,
                figure.p99_us
            )?;
        }
        let ratio = large.all() / small.all();
        let is_bound = small.name.starts_with("validate") || small.name.starts_with("verify");
        let verdict = if is_bound && ratio > MOST { " (too much)" } else { "" };
        writeln!(text, " | {ratio:.2}{verdict} |")?;
    }
    Ok(text)
}

#[expect(clippy::cast_precision_loss, reason = "a size is shown with one digit")]
fn gigabytes(bytes: i64) -> f64 {
    bytes as f64 / 1e9
}

#[expect(clippy::print_stderr, reason = "progress, beside the table on standard output")]
fn say(what: &str) {
    eprintln!("{what}");
}

// --- one size --------------------------------------------------------------------------------------------------------

async fn size(server: &str, pid: Option<u32>, binary: &Path, licenses: u64, keys: u64) -> Result<Size> {
    let name = format!("paperkey_scale_{licenses}");
    let mut admin = PgConnection::connect(server).await?;
    for sql in [format!("DROP DATABASE IF EXISTS {name} WITH (FORCE)"), format!("CREATE DATABASE {name}")] {
        sea_orm::sqlx::query(AssertSqlSafe(sql)).execute(&mut admin).await?;
    }
    let url = match server.rsplit_once('/') {
        Some((server, _)) => format!("{server}/{name}"),
        None => return Err("the address of the server names no database".into()),
    };
    let storage = Storage::Postgres { url: url.clone(), pid };
    // The vendor's own account, product and first keys come as anybody's do.
    let vendor = {
        let installation = Installation::start_fleet(binary, &storage).await?;
        Arc::new(installation.set_up(0).await?)
    };
    let began = Instant::now();
    let mut connection = PgConnection::connect(&url).await?;
    let sample = fill(&url, &mut connection, &vendor, licenses, keys).await?;
    let filled_in = began.elapsed();
    let row = sea_orm::sqlx::query("SELECT pg_database_size(current_database())").fetch_one(&mut connection).await?;
    let bytes: i64 = row.try_get(0)?;
    let buffers = sea_orm::sqlx::query("SHOW shared_buffers").fetch_one(&mut connection).await?.try_get(0)?;
    say(&format!("{licenses} licences, {keys} API keys: {:.2} GB in {filled_in:?}", gigabytes(bytes)));

    let installation = Arc::new(Installation::start_fleet(binary, &storage).await?);
    let bench = Bench { installation, storage, vendor, sample };
    let figures = bench.all(&mut connection).await?;
    drop(bench);
    connection.close().await?;
    sea_orm::sqlx::query(AssertSqlSafe(format!("DROP DATABASE {name} WITH (FORCE)"))).execute(&mut admin).await?;
    admin.close().await?;
    Ok(Size { licenses, keys, filled_in, bytes, buffers, figures })
}

/// Some of what is there, spread over all of it.
#[derive(Default)]
struct Sample {
    /// Ids and keys of licences of the vendor that are in force.
    licenses: Vec<(String, String)>,
    /// API keys of the vendor.
    keys: Vec<String>,
}

struct Bench {
    installation: Arc<Installation>,
    storage: Storage,
    vendor: Arc<Vendor>,
    sample: Sample,
}

impl Bench {
    async fn all(&self, connection: &mut PgConnection) -> Result<Vec<Figure>> {
        let app = Some(self.vendor.public_key.clone());
        let team = Some(self.vendor.team_key.clone());
        let address = self.installation.address;
        let (around, fresh) = self.sample.licenses.split_at(ROUND.min(self.sample.licenses.len()));
        let texts = |some: &[(String, String)]| some.iter().map(|(_, key)| key.clone()).collect::<Vec<_>>();
        let check = |keys: Vec<String>| {
            Load::post(address, "/v1/licenses/validate", app.clone(), move |n| {
                json!({"license_key": keys[n % keys.len()], "fingerprint": FINGERPRINT}).to_string()
            })
        };
        let (around_keys, fresh_keys) = self.sample.keys.split_at(ROUND.min(self.sample.keys.len()));
        let verify = |keys: Vec<String>| {
            Load::post(address, "/v1/keys/verify", team.clone(), move |n| {
                json!({"key": keys[n % keys.len()], "scope": "licenses:read"}).to_string()
            })
        };
        let licenses = texts(fresh);
        let activate = Load::post(address, "/v1/licenses/activate", app.clone(), {
            let licenses = licenses.clone();
            move |n| {
                let machine = format!("machine-{n}");
                json!({"license_key": licenses[n % licenses.len()], "fingerprint": machine}).to_string()
            }
        });
        let list = |path: Box<dyn Fn(usize) -> String + Send + Sync>| Load::get(address, team.clone(), path);
        let product_id = self.vendor.product_id.clone();
        let issue = Load::post(address, "/licenses", Some(self.vendor.token.clone()), move |n| {
            json!({"productId": product_id, "email": format!("buyer{n}@example.com")}).to_string()
        });
        let places: Vec<String> = fresh.iter().map(|(id, _)| URL_SAFE_NO_PAD.encode(id)).collect();

        let mut figures = Vec::new();
        let warm = check(texts(around));
        figures.push(self.measure("validate, warm", &warm, WARM_UP, WARM_CALLS).await?);
        let cold = licenses.len().min(COLD_CALLS);
        figures.push(self.measure("validate, cold", &check(licenses.clone()), 0, cold).await?);
        figures.push(self.measure("verify, warm", &verify(around_keys.to_vec()), WARM_UP, WARM_CALLS).await?);
        let cold = fresh_keys.len().min(COLD_CALLS);
        figures.push(self.measure("verify, cold", &verify(fresh_keys.to_vec()), 0, cold).await?);
        figures.push(self.measure("activate a new machine (durable)", &activate, 0, licenses.len().min(CALLS)).await?);
        let first = list(Box::new(|_| "/api/v1/licenses?page_size=50".to_owned()));
        figures.push(self.measure("list, first page of 50", &first, 50, CALLS).await?);
        let deep =
            list(Box::new(move |n| format!("/api/v1/licenses?page_size=50&page_token={}", places[n % places.len()])));
        figures.push(self.measure("list, a page from anywhere", &deep, 50, CALLS).await?);
        figures.push(self.measure("issue a licence (durable), until its event is delivered", &issue, 0, CALLS).await?);
        figures.push(self.expire(connection).await?);
        Ok(figures)
    }

    /// Makes calls after a few that are not counted, and reads what they took; with the events that they leave.
    async fn measure(&self, name: &'static str, load: &Load, warm_up: usize, calls: usize) -> Result<Figure> {
        if warm_up > 0 {
            load.times(CONNECTIONS, warm_up).await?;
        }
        let before = self.cpu()?;
        let Counted { latencies, elapsed } = load.times(CONNECTIONS, calls).await?;
        if name.contains("event") {
            self.drained().await?;
        }
        let after = self.cpu()?;
        Ok(told(Figure {
            name,
            calls: latencies.len(),
            elapsed,
            p50_us: latencies.value_at_quantile(0.5),
            p99_us: latencies.value_at_quantile(0.99),
            cpu_us: after.0 - before.0,
            database_cpu_us: after.1.saturating_sub(before.1),
        }))
    }

    /// Lets licences become due, and waits until all of them are told.
    async fn expire(&self, connection: &mut PgConnection) -> Result<Figure> {
        let ids: Vec<String> = self.sample.licenses.iter().rev().take(DUE).map(|(id, _)| id.clone()).collect();
        let now_ms = now_ms()?;
        let sql = "UPDATE licensing.licenses SET expires_at_ms = $1 WHERE id = ANY($2)";
        let due = sea_orm::sqlx::query(sql).bind(now_ms).bind(&ids).execute(&mut *connection).await?.rows_affected();
        let before = self.cpu()?;
        let began = Instant::now();
        let left = "SELECT 1 FROM licensing.licenses WHERE expires_at_ms <= $1 AND expired_event_at_ms IS NULL \
                    AND revoked_at_ms IS NULL LIMIT 1";
        while sea_orm::sqlx::query(left).bind(now_ms).fetch_optional(&mut *connection).await?.is_some() {
            if began.elapsed() > PATIENCE {
                return Err("what is due is not told".into());
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        self.drained().await?;
        let (elapsed, after) = (began.elapsed(), self.cpu()?);
        let each = u64::try_from(elapsed.as_micros())? / due.max(1);
        Ok(told(Figure {
            name: "tell that a licence has expired, until its event is delivered",
            calls: due,
            elapsed,
            p50_us: each,
            p99_us: each,
            cpu_us: after.0 - before.0,
            database_cpu_us: after.1.saturating_sub(before.1),
        }))
    }

    /// Waits until no event is on its way from licensing.
    async fn drained(&self) -> Result<()> {
        let Storage::Postgres { url, .. } = &self.storage else { return Ok(()) };
        let mut connection = PgConnection::connect(url).await?;
        let began = Instant::now();
        let left = "SELECT 1 FROM licensing.outbox LIMIT 1";
        while sea_orm::sqlx::query(left).fetch_optional(&mut connection).await?.is_some() {
            if began.elapsed() > PATIENCE {
                return Err("events are not delivered".into());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        connection.close().await?;
        Ok(())
    }

    /// Of the product and of the database so far.
    fn cpu(&self) -> Result<(u64, u64)> {
        Ok((cpu_us(&self.installation.pids())?, self.storage.cpu_us()?.unwrap_or_default()))
    }
}

fn told(figure: Figure) -> Figure {
    say(&format!(
        "{}: {} calls in {:?}, {:.1} CPU-µs and {:.1} of the database",
        figure.name,
        figure.calls,
        figure.elapsed,
        figure.each(figure.cpu_us),
        figure.each(figure.database_cpu_us)
    ));
    figure
}

fn now_ms() -> Result<i64> {
    Ok(i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis())?)
}

// --- filling ---------------------------------------------------------------------------------------------------------

/// What rows are made with.
struct Press {
    vendor: Arc<Vendor>,
    team_id: String,
    hasher: KeyedHash,
    sealer: Sealer,
    token_hasher: KeyedHash,
    now_ms: i64,
    licenses: u64,
    keys: u64,
}

/// A part of the rows of each table, and the samples among them.
#[derive(Default)]
struct Portion {
    rows: String,
    activations: String,
    sample: Sample,
}

async fn fill(
    url: &str,
    connection: &mut PgConnection,
    vendor: &Arc<Vendor>,
    licenses: u64,
    keys: u64,
) -> Result<Sample> {
    let options = DatabaseOptions::new("licensing", DatabaseUrl::Postgres(url.to_owned()), Clock::system());
    let database = Database::open(options).await?;
    let [master, pepper, signing] = KEYS.map(|(_, key)| Secret::new(key));
    let keyring = Keyring::from_base64(&master, &pepper, &signing).map_err(|error| error.0)?;
    let keyring = keyring.with_kept(&database, "licensing").await?;
    database.close().await;
    let sql = "SELECT team_id FROM auth.keys WHERE team_id IS NOT NULL LIMIT 1";
    let team_id = sea_orm::sqlx::query(sql).fetch_one(&mut *connection).await?.try_get(0)?;
    let press = Arc::new(Press {
        vendor: Arc::clone(vendor),
        team_id,
        hasher: keyring.kept(KeptKey::LicenseKey),
        sealer: keyring.sealer(Purpose::LicenseKey),
        token_hasher: keyring.token_hasher(),
        now_ms: now_ms()?,
        licenses,
        keys,
    });
    let mut sample = Sample::default();
    // What this connection loses if the machine stops is made again.
    run_all(connection, &["SET synchronous_commit = off", "SET maintenance_work_mem = '1GB'"]).await?;
    let made = indexes_of(connection, &["licensing.licenses", "licensing.activations", "auth.keys"]).await?;
    for (drop, _) in made.iter().rev() {
        run_all(connection, &[drop]).await?;
    }

    let mut activations = PgConnection::connect(url).await?;
    {
        let mut into_licenses = connection
            .copy_in_raw(
                "COPY licensing.licenses (id, team_id, mode, product_id, key_hash, key_sealed, email, email_lower, \
                 client_id, max_activations, activations_count, expires_at_ms, expired_event_at_ms, metadata, \
                 created_at_ms, updated_at_ms, revoked_at_ms) FROM STDIN",
            )
            .await?;
        let mut into_activations = activations
            .copy_in_raw(
                "COPY licensing.activations (id, license_id, fingerprint, name, created_at_ms, last_check_at_ms) \
                 FROM STDIN",
            )
            .await?;
        let mut portions = printed(&press, licenses, Press::licenses);
        while let Some(portion) = portions.recv().await {
            into_licenses.send(portion.rows.into_bytes()).await?;
            into_activations.send(portion.activations.into_bytes()).await?;
            sample.licenses.extend(portion.sample.licenses);
        }
        into_licenses.finish().await?;
        into_activations.finish().await?;
    }
    activations.close().await?;

    run_all(connection, &["CREATE UNLOGGED TABLE auth.printed (id text, token_hash bytea, shown text, team_id text)"])
        .await?;
    {
        let mut into = connection.copy_in_raw("COPY auth.printed FROM STDIN").await?;
        let mut portions = printed(&press, keys, Press::keys);
        while let Some(portion) = portions.recv().await {
            into.send(portion.rows.into_bytes()).await?;
            sample.keys.extend(portion.sample.keys);
        }
        into.finish().await?;
    }
    // Whatever else a key has, it has of the vendor's first live key.
    let columns = sea_orm::sqlx::query(
        "SELECT string_agg(CASE column_name WHEN 'id' THEN 'p.id' WHEN 'token_hash' THEN 'p.token_hash' \
         WHEN 'shown_prefix' THEN 'p.shown' WHEN 'team_id' THEN 'p.team_id' \
         WHEN 'first_used_at_ms' THEN 'k.created_at_ms' ELSE 'k.' || quote_ident(column_name) END, ', ' \
         ORDER BY ordinal_position) FROM information_schema.columns \
         WHERE table_schema = 'auth' AND table_name = 'keys'",
    )
    .fetch_one(&mut *connection)
    .await?;
    let columns: String = columns.try_get(0)?;
    let shown = shown_prefix(&vendor.team_key);
    let copy = format!(
        "INSERT INTO auth.keys SELECT {columns} FROM auth.printed p, \
         (SELECT * FROM auth.keys WHERE shown_prefix = '{shown}' ORDER BY id LIMIT 1) k"
    );
    run_all(connection, &[&copy, "DROP TABLE auth.printed"]).await?;
    say("rows are there; their indexes are being made");
    for (_, create) in &made {
        run_all(connection, &[create]).await?;
    }
    run_all(connection, &["VACUUM (ANALYZE)", "CHECKPOINT"]).await?;
    // As after a day of work, not as after a start: what each call needs is in the database's memory, if there is room.
    let read_all = "SELECT sum(pg_prewarm(c.oid)) FROM pg_class c LEFT JOIN pg_index i ON i.indexrelid = c.oid \
                    WHERE c.relnamespace IN ('licensing'::regnamespace, 'auth'::regnamespace) \
                    AND (c.relkind = 'r' OR i.indisunique)";
    run_all(connection, &["CREATE EXTENSION IF NOT EXISTS pg_prewarm", read_all]).await?;
    // Nor is anything of it still being written.
    tokio::process::Command::new("sync").status().await?;
    Ok(sample)
}

async fn run_all(connection: &mut PgConnection, statements: &[&str]) -> Result<()> {
    for statement in statements {
        let query = sea_orm::sqlx::query(AssertSqlSafe((*statement).to_owned()));
        query.execute(&mut *connection).await.map_err(|error| format!("{statement}: {error}"))?;
    }
    Ok(())
}

/// How the indexes of tables are dropped and made again: constraints first, as they are looked up most.
async fn indexes_of(connection: &mut PgConnection, tables: &[&str]) -> Result<Vec<(String, String)>> {
    let mut made = Vec::new();
    for table in tables {
        let sql = format!(
            "SELECT format('ALTER TABLE {table} DROP CONSTRAINT %I', conname), \
             format('ALTER TABLE {table} ADD CONSTRAINT %I %s', conname, pg_get_constraintdef(oid)) \
             FROM pg_constraint WHERE conrelid = '{table}'::regclass AND contype IN ('p', 'u') \
             UNION ALL SELECT format('DROP INDEX %s', indexrelid::regclass), pg_get_indexdef(indexrelid) \
             FROM pg_index WHERE indrelid = '{table}'::regclass AND NOT EXISTS \
             (SELECT 1 FROM pg_constraint WHERE conindid = indexrelid AND contype IN ('p', 'u'))"
        );
        for row in sea_orm::sqlx::query(AssertSqlSafe(sql)).fetch_all(&mut *connection).await? {
            made.push((row.try_get(0)?, row.try_get(1)?));
        }
    }
    Ok(made)
}

/// Rows as all processors make them, in the order in which they are done.
fn printed(
    press: &Arc<Press>,
    count: u64,
    print: fn(&Press, u64, u64, &mut Portion) -> std::fmt::Result,
) -> mpsc::Receiver<Portion> {
    let (done, portions) = mpsc::channel(WAITING);
    let threads = std::thread::available_parallelism().map_or(2, std::num::NonZero::get) as u64;
    for thread in 0..threads {
        let (press, done) = (Arc::clone(press), done.clone());
        std::thread::spawn(move || {
            let mut first = thread * PORTION;
            while first < count {
                let mut portion = Portion::default();
                // Writing to a String cannot fail.
                let _ = print(&press, first, count.min(first + PORTION), &mut portion);
                if done.blocking_send(portion).is_err() {
                    return;
                }
                first += threads * PORTION;
            }
        });
    }
    portions
}

impl Press {
    /// Samples are spread evenly, so that what is asked for lies anywhere.
    fn is_sampled(n: u64, count: u64) -> bool {
        let every = (count * OWN_OF_TEN / 10 / (COLD_CALLS as u64 + ROUND as u64 + 1_000)).max(1);
        (n / 10).is_multiple_of(every) || every == 1
    }

    fn licenses(&self, first: u64, end: u64, portion: &mut Portion) -> std::fmt::Result {
        for n in first..end {
            let age = i64::try_from(u128::from(self.licenses - n) * 31_536_000_000 / u128::from(self.licenses));
            let created_ms = self.now_ms - age.unwrap_or(YEAR_MS);
            let id = new_id("lic", &Clock::manual(created_ms).0);
            let is_own = n % 10 < OWN_OF_TEN;
            let other = n / 10 % OTHER_TEAMS;
            let (team, product) = if is_own {
                (self.team_id.clone(), self.vendor.product_id.clone())
            } else {
                (format!("team_of_{other}"), format!("prod_of_{other}"))
            };
            let key = LicenseKey::random();
            let (hash, sealed) = (self.hasher.hash(key.as_bytes()), self.sealer.seal(&id, key.as_bytes()));
            let is_active = n % 4 == 0;
            let (is_over, is_revoked) = (n % 20 == 7, n % 50 == 11);
            let rows = &mut portion.rows;
            write!(rows, "{id}\t{team}\tlive\t{product}\t")?;
            bytes(rows, &hash)?;
            rows.push('\t');
            bytes(rows, &sealed)?;
            let optional = |value: Option<i64>| value.map_or_else(|| "\\N".to_owned(), |value| value.to_string());
            let expires = match n % 3 {
                _ if is_over => Some(created_ms + 1),
                0 => None,
                _ => Some(self.now_ms + YEAR_MS),
            };
            writeln!(
                rows,
                "\tbuyer{n}@example.com\tbuyer{n}@example.com\t\\N\t3\t{}\t{}\t{}\t\\N\t{created_ms}\t{created_ms}\t{}",
                i32::from(is_active),
                optional(expires),
                optional(is_over.then_some(created_ms + 2)),
                optional(is_revoked.then_some(created_ms + 3)),
            )?;
            if is_active {
                let activation = new_id("act", &Clock::manual(created_ms).0);
                writeln!(portion.activations, "{activation}\t{id}\t{FINGERPRINT}\t\\N\t{created_ms}\t{created_ms}")?;
            }
            if is_own && !is_over && !is_revoked && Self::is_sampled(n, self.licenses) {
                portion.sample.licenses.push((id, key.to_string()));
            }
        }
        Ok(())
    }

    fn keys(&self, first: u64, end: u64, portion: &mut Portion) -> std::fmt::Result {
        for n in first..end {
            let token = TokenKind::PlatformLive.generate();
            let id = new_id("key", &Clock::manual(self.now_ms - YEAR_MS).0);
            let is_own = n % 10 < OWN_OF_TEN;
            let team = if is_own { self.team_id.clone() } else { format!("team_of_{}", n / 10 % OTHER_TEAMS) };
            write!(portion.rows, "{id}\t")?;
            bytes(&mut portion.rows, &self.token_hasher.hash(token.as_bytes()))?;
            writeln!(portion.rows, "\t{}\t{team}", shown_prefix(&token))?;
            if is_own && Self::is_sampled(n, self.keys) {
                portion.sample.keys.push(token);
            }
        }
        Ok(())
    }
}

/// Bytes as COPY reads them.
fn bytes(text: &mut String, bytes: &[u8]) -> std::fmt::Result {
    text.push_str("\\\\x");
    bytes.iter().try_for_each(|byte| write!(text, "{byte:02x}"))
}
