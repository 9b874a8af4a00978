//! What a delivery costs: the product, beside a bare loop that signs and POSTs the same bytes to the same sink.
//!
//! Deliveries are measured by themselves. Licences are issued while the endpoints are paused, so that events and
//! deliveries are written beforehand; then the endpoints are resumed, and everything that was held goes out. Counted is
//! what it takes from there: claims, opening what is sealed, signing, sending, and the record of each attempt, until
//! the sink has all of it and the last record is written. The sink is a process of its own and is not counted; the
//! database is, beside the process where it is one of its own.

use std::{
    collections::BTreeSet,
    env,
    fmt::Write as _,
    fs,
    io::Write as _,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use paperkey_kit::secrets::KeyedHash;
use serde_json::json;
use tokio::{
    net::TcpStream,
    sync::{mpsc, oneshot},
    task::JoinSet,
};
use tonic::metadata::BinaryMetadataValue;

use crate::{
    Result,
    ceilings::{Ceiling, Process},
    load::cpu_us,
    peers::{Installation, Storage, text},
    results,
};

/// Where the server is that `bench/run` has started, and its process.
pub(crate) const POSTGRES_URL: &str = "PAPERKEY_BENCH_POSTGRES_URL";
pub(crate) const POSTGRES_PID: &str = "PAPERKEY_BENCH_POSTGRES_PID";

/// Endpoints that get each event; a product may have one more, which tells when all events have been taken over.
const ENDPOINTS: usize = 19;
/// Deliveries under way to one endpoint, as it is configured by default.
const AT_ONCE: usize = 5;
/// Licences issued for each second that a measurement is to last: about what the bare loop would send.
const EVENTS_PER_SECOND: u64 = 400;
/// Licences issued at once, while nothing is measured.
const ISSUERS: usize = 32;
/// However slow it is, a measurement ends.
const PATIENCE: Duration = Duration::from_mins(3);
/// The records of the last deliveries are written within that time, and counted.
const SETTLING: Duration = Duration::from_millis(500);
/// Lines that wait for the log of the bare loop.
const WAITING_LINES: usize = 1_024;

/// What came of a measurement.
struct Row {
    name: String,
    sent: u64,
    elapsed: Duration,
    cpu_us: u64,
    /// Of a database that is a process of its own.
    database_cpu_us: Option<u64>,
}

impl Row {
    #[expect(clippy::cast_precision_loss, reason = "counts of a few seconds are far below 2^52")]
    fn each(&self, us: u64) -> f64 {
        us as f64 / self.sent.max(1) as f64
    }

    #[expect(clippy::cast_precision_loss, reason = "counts of a few seconds are far below 2^52")]
    fn per_second(&self) -> f64 {
        self.sent as f64 / self.elapsed.as_secs_f64()
    }
}

/// Measures all of it and prints the table.
#[expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the table is this command's answer, with progress beside"
)]
pub(crate) async fn run(span: Duration, binary: &Path, write: Option<PathBuf>) -> Result<()> {
    let events = EVENTS_PER_SECOND * span.as_secs().max(1);
    let (sqlite, body) = product("Paperkey, SQLite", Storage::Sqlite, binary, events).await?;
    let mut rows = Vec::new();
    for (name, log) in [("bare loop", false), ("bare loop with a log", true)] {
        rows.push(bare_loop(name, body.clone(), log, span).await?);
    }
    rows.push(sqlite);
    if let Ok(url) = env::var(POSTGRES_URL) {
        let pid = env::var(POSTGRES_PID).ok().and_then(|pid| pid.parse().ok());
        rows.push(product("Paperkey, PostgreSQL", Storage::Postgres { url, pid }, binary, events).await?.0);
    } else {
        eprintln!("there is no PostgreSQL: {POSTGRES_URL} is not set, so it is not measured");
    }
    let table = table(&rows, span, body.len())?;
    println!("{table}");
    if let Some(path) = write {
        results::write(&path, &table)?;
    }
    Ok(())
}

fn table(rows: &[Row], span: Duration, body: usize) -> Result<String> {
    let cores = std::thread::available_parallelism()?;
    let mut text = format!(
        "## Deliveries\n\n\
         Command: `bench/run --only webhooks --seconds {}`. {ENDPOINTS} endpoints with {AT_ONCE} deliveries under way each, \
         bodies of {body} bytes, to a sink on loopback; {cores} cores shared with the sink and the database. The events are \
         made and the deliveries written before, while the endpoints are paused: counted are claims, opening, signing, \
         sending and the records of the attempts. The bare loop signs and POSTs the same bytes over as many connections; \
         its log is a line for each delivery in a file that is synced before the loop goes on, a batch at a time. The sink \
         is not counted. The ratios are of all CPU, the database's included.\n\n\
         | what | deliveries/s | CPU µs each | of the database | × bare loop | × with a log |\n|---|--:|--:|--:|--:|--:|\n",
        span.as_secs()
    );
    let all = |row: &Row| row.each(row.cpu_us + row.database_cpu_us.unwrap_or_default());
    let [bare, logged, ..] = rows else { return Err("the bare loops come first".into()) };
    for row in rows {
        let database = row.database_cpu_us.map_or_else(|| "–".to_owned(), |us| format!("{:.1}", row.each(us)));
        let (own, over_bare, over_logged) = (row.each(row.cpu_us), all(row) / all(bare), all(row) / all(logged));
        writeln!(
            text,
            "| {} | {:.0} | {own:.1} | {database} | {over_bare:.2} | {over_logged:.2} |",
            row.name,
            row.per_second()
        )?;
    }
    Ok(text)
}

#[expect(clippy::print_stderr, reason = "progress, beside the table on standard output")]
fn progress(row: &Row) {
    eprintln!("{}: {:.0}/s, {:.1} CPU-µs", row.name, row.per_second(), row.each(row.cpu_us));
}

// --- the product -----------------------------------------------------------------------------------------------------

/// Lets the product send, and answers with what it took and the body of one delivery.
async fn product(name: &str, storage: Storage, binary: &Path, events: u64) -> Result<(Row, Bytes)> {
    let sink = Process::start(Ceiling::Sink).await?;
    let installation = Arc::new(Installation::start_with(binary, &storage, &sending()).await?);
    let vendor = installation.set_up(0).await?;
    let (token, product) = (vendor.token.as_str(), vendor.product_id.as_str());
    let webhooks = format!("/products/{product}/webhooks");
    let subscribe = async |path: String| {
        let url = format!("http://{}{path}", sink.address);
        let webhook = json!({"url": url, "events": ["license.created"]});
        text(&installation.post(&webhooks, Some(token), &webhook).await?, "/id")
    };
    let mut paused = Vec::new();
    for n in 0..ENDPOINTS {
        paused.push(format!("{webhooks}/{}", subscribe(format!("/hook/{n}")).await?));
    }
    subscribe("/probe".to_owned()).await?;
    let set = async |status: &str| -> Result<()> {
        for path in &paused {
            installation.call(Method::PATCH, path, Some(token), &json!({"status": status})).await?;
        }
        Ok(())
    };
    set("paused").await?;
    issue(&installation, token, product, events).await?;
    // The event that this one was told of has been taken over for all of them.
    arrived(&sink, "/probe", events).await?;

    let pids = installation.pids();
    let expected = events * ENDPOINTS as u64;
    let before = (cpu_us(&pids)?, storage.cpu_us()?);
    let began = Instant::now();
    set("active").await?;
    arrived(&sink, "/hook", expected).await?;
    let elapsed = began.elapsed();
    tokio::time::sleep(SETTLING).await;
    let row = Row {
        name: name.to_owned(),
        sent: expected,
        elapsed,
        cpu_us: cpu_us(&pids)? - before.0,
        database_cpu_us: storage.cpu_us()?.zip(before.1).map(|(after, before)| after.saturating_sub(before)),
    };
    progress(&row);
    Ok((row, ask(sink.address, "/body").await?))
}

/// What the product needs to send to a sink on this machine.
fn sending() -> Vec<(&'static str, String)> {
    let on = || "true".to_owned();
    vec![
        ("PAPERKEY__WEBHOOKS__ALLOW_HTTP", on()),
        ("PAPERKEY__WEBHOOKS__ALLOW_PRIVATE_NETWORKS", on()),
        ("PAPERKEY__WEBHOOKS__MAX_IN_FLIGHT_PER_ENDPOINT", AT_ONCE.to_string()),
    ]
}

async fn issue(installation: &Arc<Installation>, token: &str, product: &str, count: u64) -> Result<()> {
    let next = Arc::new(AtomicU64::new(0));
    let mut issuers = JoinSet::new();
    for _ in 0..ISSUERS {
        let (installation, next, token) = (Arc::clone(installation), Arc::clone(&next), token.to_owned());
        let license = json!({"productId": product, "email": "buyer@example.com"});
        issuers.spawn(async move {
            while next.fetch_add(1, Ordering::Relaxed) < count {
                installation.post("/licenses", Some(&token), &license).await?;
            }
            Result::Ok(())
        });
    }
    while let Some(issued) = issuers.join_next().await {
        issued??;
    }
    Ok(())
}

/// Waits until the sink has so many POSTs below a path.
async fn arrived(sink: &Process, path: &str, expected: u64) -> Result<()> {
    let began = Instant::now();
    let count = format!("/count{path}");
    loop {
        let here: u64 = String::from_utf8_lossy(&ask(sink.address, &count).await?).parse()?;
        if here >= expected {
            return Ok(());
        }
        if began.elapsed() > PATIENCE {
            return Err(format!("{here} of {expected} deliveries to {path} arrived within {PATIENCE:?}").into());
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn ask(address: SocketAddr, path: &str) -> Result<Bytes> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(TcpStream::connect(address).await?)).await?;
    let driver = tokio::spawn(connection);
    let request = Request::get(path).header(header::HOST, "localhost").body(Full::<Bytes>::default())?;
    let answer = sender.send_request(request).await?.into_body().collect().await?.to_bytes();
    driver.abort();
    Ok(answer)
}

impl Storage {
    /// What a database that is a process of its own has used so far; the processes below it are its connections.
    pub(crate) fn cpu_us(&self) -> Result<Option<u64>> {
        let Self::Postgres { pid: Some(pid), .. } = self else { return Ok(None) };
        let mut pids = BTreeSet::from([*pid]);
        for entry in fs::read_dir("/proc")? {
            let Ok(child) = entry?.file_name().to_string_lossy().parse::<u32>() else { continue };
            // It may have ended in between.
            let Ok(stat) = fs::read_to_string(format!("/proc/{child}/stat")) else { continue };
            let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1)?.parse().ok());
            if parent == Some(*pid) {
                pids.insert(child);
            }
        }
        // Connections end and begin; what has ended is missing, and is little.
        let used = pids.iter().filter_map(|pid| cpu_us(&[*pid]).ok());
        Ok(Some(used.sum()))
    }
}

// --- the bare loop ---------------------------------------------------------------------------------------------------

/// What the loop keeps of each delivery.
struct Line {
    text: String,
    kept: oneshot::Sender<()>,
}

/// Signs and POSTs for a while, over as many connections as the product may use.
async fn bare_loop(name: &str, body: Bytes, log: bool, span: Duration) -> Result<Row> {
    let sink = Process::start(Ceiling::Sink).await?;
    let folder = tempfile::Builder::new().prefix("paperkey-bench-").tempdir()?;
    let (lines, writer) = if log {
        let file = fs::File::create(folder.path().join("deliveries.log"))?;
        let (lines, waiting) = mpsc::channel(WAITING_LINES);
        (Some(lines), Some(tokio::task::spawn_blocking(move || keep(file, waiting))))
    } else {
        (None, None)
    };
    let over = Arc::new(AtomicBool::new(false));
    let mut loops = JoinSet::new();
    let before = cpu_us(&[std::process::id()])?;
    let began = Instant::now();
    for n in 0..ENDPOINTS * AT_ONCE {
        let (over, lines, body) = (Arc::clone(&over), lines.clone(), body.clone());
        let (address, path) = (sink.address, format!("/hook/{}", n % ENDPOINTS));
        loops.spawn(async move { one_loop(address, &path, body, lines, &over).await });
    }
    drop(lines);
    tokio::time::sleep(span).await;
    over.store(true, Ordering::Relaxed);
    let mut sent = 0;
    while let Some(done) = loops.join_next().await {
        sent += done??;
    }
    let elapsed = began.elapsed();
    if let Some(writer) = writer {
        writer.await??;
    }
    let row = Row {
        name: name.to_owned(),
        sent,
        elapsed,
        cpu_us: cpu_us(&[std::process::id()])? - before,
        database_cpu_us: None,
    };
    progress(&row);
    Ok(row)
}

async fn one_loop(
    address: SocketAddr,
    path: &str,
    body: Bytes,
    log: Option<mpsc::Sender<Line>>,
    over: &AtomicBool,
) -> Result<u64> {
    let (own, standard) = (KeyedHash::new(b"whsec_of the bare loop"), KeyedHash::new(b"of the bare loop"));
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let driver = tokio::spawn(connection);
    let mut sent: u64 = 0;
    while !over.load(Ordering::Relaxed) {
        let id = format!("dlv_{sent:026}");
        let timestamp = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let mut signed = format!("{id}.{timestamp}.").into_bytes();
        signed.extend_from_slice(&body);
        let request = Request::post(path)
            .header(header::HOST, "127.0.0.1")
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::USER_AGENT, "Paperkey/0.0.0")
            .header("x-paperkey-signature", hex(&own.hash(&body)))
            .header("x-paperkey-event", "license.created")
            .header("x-paperkey-delivery", &id)
            .header("webhook-id", &id)
            .header("webhook-timestamp", timestamp)
            .header("webhook-signature", base64(&standard.hash(&signed)))
            .body(Full::new(body.clone()))?;
        let response = sender.send_request(request).await?;
        let status = response.status().as_u16();
        response.into_body().collect().await?;
        if let Some(log) = &log {
            let (kept, written) = oneshot::channel();
            let text = format!("{{\"delivery\":\"{id}\",\"at\":{timestamp},\"status\":{status},\"attempt\":1}}\n");
            log.send(Line { text, kept }).await?;
            written.await?;
        }
        sent += 1;
    }
    driver.abort();
    Ok(sent)
}

/// Writes what waits as one batch, and lets the loops go on when it is on disk.
fn keep(mut file: fs::File, mut waiting: mpsc::Receiver<Line>) -> std::io::Result<()> {
    let mut batch = Vec::new();
    while let Some(line) = waiting.blocking_recv() {
        batch.push(line);
        while let Ok(line) = waiting.try_recv() {
            batch.push(line);
        }
        let text: String = batch.iter().map(|line| line.text.as_str()).collect();
        file.write_all(text.as_bytes())?;
        file.sync_data()?;
        for line in batch.drain(..) {
            // A loop that has failed waits no more.
            let _ = line.kept.send(());
        }
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// As the standard's header has it. Binary metadata is base 64 without the padding, of which 32 bytes have one.
fn base64(hash: &[u8; 32]) -> String {
    let value = BinaryMetadataValue::from_bytes(hash);
    format!("v1,{}=", String::from_utf8_lossy(value.as_encoded_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bare_loop_writes_the_headers_of_a_delivery() {
        assert_eq!(base64(&[0; 32]), "v1,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=");
        let hash = KeyedHash::new(b"It's a Secret to Everybody").hash(b"Hello, World!");
        assert_eq!(hex(&hash), "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17");
    }

    #[test]
    fn the_table_reads_all_cpu_against_the_bare_loops() {
        let row = |name: &str, cpu_us, database_cpu_us| {
            let (sent, elapsed) = (1_000, Duration::from_secs(1));
            Row { name: name.to_owned(), sent, elapsed, cpu_us, database_cpu_us }
        };
        let rows = [row("bare", 20_000, None), row("logged", 40_000, None), row("ours", 50_000, Some(10_000))];
        let table = table(&rows, Duration::from_secs(5), 300).unwrap();
        assert!(table.starts_with("## Deliveries\n"), "{table}");
        assert!(table.contains("| bare | 1000 | 20.0 | – | 1.00 | 0.50 |"), "{table}");
        assert!(table.contains("| ours | 1000 | 50.0 | 10.0 | 3.00 | 1.50 |"), "{table}");
    }
}
