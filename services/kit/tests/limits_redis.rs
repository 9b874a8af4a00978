//! Limits that gateways share: exact while the store is there, within the limit while it is gone, and shared again when it
//! is back. Each test has servers of its own.

use std::{
    collections::BTreeMap,
    env,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures_util::future::join_all;
use paperkey_kit::{
    clock::Clock,
    limits::{
        Claim, MAX_CLAIMS, OnStoreFailure, Receipt, RedisLimiter, RedisOptions, Refused, StoreState, Subject, Verdict,
    },
    secrets::Secret,
    shutdown::{self, ShutdownHandle},
};
use rand::RngExt as _;
use redis::aio::MultiplexedConnection;

const GATEWAYS: usize = 4;
/// What an answer may take, whatever becomes of the store.
const ANSWER: Duration = Duration::from_millis(250);
/// Within how long of its return the store is shared again.
const SHARED_AGAIN: Duration = Duration::from_secs(2);

// --- servers ---------------------------------------------------------------------------------------------------------

/// A redis-server in a folder of its own.
struct Server {
    child: Child,
    port: u16,
    folder: PathBuf,
    arguments: Vec<String>,
}

/// Whether there is a redis-server; `CI=true` insists on it.
fn redis_is_here() -> bool {
    let here = Command::new("redis-server").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !here {
        assert!(env::var("CI").as_deref() != Ok("true"), "there is no redis-server: shared limits are not tested");
        eprintln_skipped();
    }
    here
}

#[expect(clippy::print_stderr, reason = "who skips a test says so")]
fn eprintln_skipped() {
    eprintln!("*** SKIPPED: there is no redis-server ***");
}

impl Server {
    async fn start(arguments: &[&str]) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        for _ in 0..20 {
            let port = free_port();
            let folder = env::temp_dir().join(format!("paperkey-redis-{}-{number}-{port}", std::process::id()));
            std::fs::create_dir(&folder).expect("a folder can be made");
            let arguments: Vec<String> = arguments.iter().map(ToString::to_string).collect();
            let child = spawn(port, &folder, &arguments);
            let mut server = Self { child, port, folder, arguments };
            if server.answers().await {
                return server;
            }
        }
        panic!("redis-server does not start");
    }

    fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    async fn connection(&self) -> MultiplexedConnection {
        let client = redis::Client::open(self.url()).expect("the address is one");
        client.get_multiplexed_async_connection().await.expect("the server answers")
    }

    /// Waits until it answers; not for one that has ended.
    async fn answers(&mut self) -> bool {
        let deadline = Instant::now() + Duration::from_secs(10);
        let client = redis::Client::open(self.url()).expect("the address is one");
        while Instant::now() < deadline {
            if let Ok(mut connection) = client.get_multiplexed_async_connection().await
                && redis::cmd("PING").exec_async(&mut connection).await.is_ok()
            {
                return true;
            }
            if self.child.try_wait().expect("a child can be asked").is_some() {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        false
    }

    fn kill(&mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
    }

    /// Starts it again after it was killed. It kept nothing.
    async fn restart(&mut self) {
        self.child = spawn(self.port, &self.folder, &self.arguments);
        assert!(self.answers().await, "the server does not come back");
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").arg(signal).arg(self.child.id().to_string()).status();
        assert!(sent.is_ok_and(|status| status.success()));
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn spawn(port: u16, folder: &Path, arguments: &[String]) -> Child {
    Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .args(["--dir", &folder.to_string_lossy(), "--logfile", "redis.log"])
        .args(arguments)
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server can be run")
}

/// A port outside the range that outgoing connections are given, as is the one that a cluster's node takes besides.
fn free_port() -> u16 {
    loop {
        let port = rand::rng().random_range(10_000..20_000);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() && TcpListener::bind(("127.0.0.1", port + 10_000)).is_ok() {
            return port;
        }
    }
}

// --- gateways --------------------------------------------------------------------------------------------------------

/// Gateways that share a store.
struct Fleet {
    gateways: Vec<Arc<RedisLimiter>>,
    _shutdown: ShutdownHandle,
}

impl Fleet {
    async fn of(count: usize, url: &str) -> Self {
        let (handle, shutdown) = shutdown::channel();
        let gateways = join_all((0..count).map(async |_| {
            let options = RedisOptions { url: Secret::new(url), gateways: None };
            let limiter = RedisLimiter::connect(options, Clock::system()).await.expect("the store is there");
            tokio::spawn(limiter.run(shutdown.clone()));
            Arc::new(limiter)
        }))
        .await;
        let fleet = Self { gateways, _shutdown: handle };
        fleet.become_acquainted().await;
        fleet
    }

    /// All know of all.
    async fn become_acquainted(&self) {
        let count = self.gateways.len();
        let known = || self.gateways.iter().all(|gateway| gateway.stats().gateways as usize == count);
        eventually(Duration::from_secs(5), "the gateways do not know each other", known).await;
    }

    fn all_are(&self, state: StoreState) -> bool {
        self.gateways.iter().all(|gateway| gateway.stats().state == state)
    }

    async fn are_up_again(&self, stalls: &Stalls) {
        let began = Instant::now();
        eventually(SHARED_AGAIN * 3, "limits are not shared again", || self.all_are(StoreState::Up)).await;
        let took = began.elapsed();
        assert!(took < stalls.allow(SHARED_AGAIN), "limits are shared again only after {took:?}");
    }
}

/// Whether this machine let the tests wait for their turn: then nobody can keep to a deadline.
struct Stalls {
    longest_ms: Arc<AtomicU64>,
    watch: tokio::task::JoinHandle<()>,
}

impl Stalls {
    fn watch() -> Self {
        let longest_ms = Arc::new(AtomicU64::new(0));
        let noted = Arc::clone(&longest_ms);
        let watch = tokio::spawn(async move {
            loop {
                let due = Instant::now() + Duration::from_millis(5);
                tokio::time::sleep_until(due.into()).await;
                let late = u64::try_from(due.elapsed().as_millis()).unwrap_or(u64::MAX);
                noted.fetch_max(late, Ordering::Relaxed);
            }
        });
        Self { longest_ms, watch }
    }

    /// What the product promises, or three times that on a machine that has no time.
    fn allow(&self, promised: Duration) -> Duration {
        if self.longest_ms.load(Ordering::Relaxed) > 40 { promised * 3 } else { promised }
    }
}

impl Drop for Stalls {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

async fn eventually(within: Duration, what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + within;
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn subject(number: u128) -> Subject {
    // Spread over shards and slots, and in no order.
    Subject(number.wrapping_mul(0x9e37_79b9_7f4a_7c15_f39c_c060_5ced_c835).to_be_bytes())
}

fn claim(number: u128, requests: u32, window_ms: u64) -> Claim {
    Claim {
        subject: subject(number),
        class: "test",
        requests,
        window: Duration::from_millis(window_ms),
        on_store_failure: OnStoreFailure::Open,
    }
}

fn closed(claim: Claim) -> Claim {
    Claim { on_store_failure: OnStoreFailure::Closed, ..claim }
}

fn key(subject: Subject) -> String {
    format!("paperkey:limit:{{{:032x}}}", u128::from_be_bytes(subject.0))
}

fn passed(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Passed(_))
}

fn expect_passed(verdict: Verdict) -> Receipt {
    match verdict {
        Verdict::Passed(receipt) => receipt,
        Verdict::Refused(refused) => panic!("refused: {refused:?}"),
    }
}

fn expect_refused(verdict: Verdict) -> Refused {
    match verdict {
        Verdict::Refused(refused) => refused,
        Verdict::Passed(receipt) => panic!("let through: {receipt:?}"),
    }
}

async fn count(connection: &mut MultiplexedConnection, subject: Subject) -> u32 {
    redis::cmd("ZCARD").arg(key(subject)).query_async(connection).await.expect("the server answers")
}

// --- while the store is there ----------------------------------------------------------------------------------------

/// A call, as the store decided it.
struct Decided {
    at_us: u64,
    claims: Vec<Claim>,
    verdict: Verdict,
}

/// Holds all that was decided against the definition: half-open windows, and nobody refused who had room.
fn judge(mut calls: Vec<Decided>) {
    // What was decided in one microsecond may have been decided in any order.
    calls.sort_by_key(|call| (call.at_us, !passed(&call.verdict)));
    let mut windows: BTreeMap<Subject, Vec<u64>> = BTreeMap::new();
    for call in &calls {
        let used: Vec<usize> = call
            .claims
            .iter()
            .map(|claim| {
                let length = u64::try_from(claim.window.as_micros()).unwrap();
                let window = windows.entry(claim.subject).or_default();
                window.iter().filter(|entered| **entered + length > call.at_us).count()
            })
            .collect();
        match &call.verdict {
            Verdict::Passed(receipt) => {
                for ((claim, used), standing) in call.claims.iter().zip(used).zip(&receipt.standings) {
                    assert!(used < claim.requests as usize, "{} calls of {}", used + 1, claim.requests);
                    assert_eq!(standing.remaining as usize, claim.requests as usize - used - 1);
                    windows.entry(claim.subject).or_default().push(call.at_us);
                }
            }
            Verdict::Refused(refused) => {
                let claim = &call.claims[refused.by];
                assert!(used[refused.by] >= claim.requests as usize, "refused with {} in use", used[refused.by]);
                // Exactly when the last claim has room, as far as is known.
                let room = call.claims.iter().map(|claim| {
                    let length = u64::try_from(claim.window.as_micros()).unwrap();
                    let window = &windows[&claim.subject];
                    let leaver = window.len().checked_sub(claim.requests as usize).map(|index| window[index] + length);
                    leaver.map_or(0, |leaves| leaves.saturating_sub(call.at_us))
                });
                assert_eq!(refused.retry_after, Duration::from_micros(room.max().unwrap()));
                assert!(!refused.store_is_gone);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn four_gateways_let_through_exactly_the_limit() {
    if !redis_is_here() {
        return;
    }
    let server = Server::start(&[]).await;
    let fleet = Fleet::of(GATEWAYS, &server.url()).await;
    let limits = [(1, 1, 90), (2, 3, 150), (3, 8, 240), (4, 2, 60), (5, 20, 400), (6, 5, 120)];
    let end = Instant::now() + Duration::from_secs(4);
    let callers = (0..12).map(|caller| {
        let gateway = Arc::clone(&fleet.gateways[caller % GATEWAYS]);
        tokio::spawn(async move {
            let mut calls = Vec::new();
            while Instant::now() < end {
                let mut claims: Vec<Claim> = Vec::new();
                let (wanted, pause) = {
                    let mut rng = rand::rng();
                    for _ in 0..rng.random_range(1..=MAX_CLAIMS) {
                        let (number, requests, window) = limits[rng.random_range(0..limits.len())];
                        if claims.iter().all(|other| other.subject != subject(number)) {
                            claims.push(claim(number, requests, window));
                        }
                    }
                    (rng.random_range(1..4), rng.random_range(0..30))
                };
                for _ in 0..wanted {
                    let (verdict, at_us) = gateway.check_timed(&claims).await;
                    let at_us = at_us.expect("the store decides");
                    calls.push(Decided { at_us, claims: claims.clone(), verdict });
                }
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
            calls
        })
    });
    let calls: Vec<Decided> = join_all(callers).await.into_iter().flat_map(|calls| calls.expect("no panic")).collect();
    let through = calls.iter().filter(|call| passed(&call.verdict)).count();
    assert!(through > 100 && calls.len() - through > 100, "{through} of {}", calls.len());
    judge(calls);
}

#[tokio::test]
async fn a_refused_call_uses_up_nothing() {
    if !redis_is_here() {
        return;
    }
    let server = Server::start(&[]).await;
    let fleet = Fleet::of(1, &server.url()).await;
    let mut connection = server.connection().await;
    let gateway = &fleet.gateways[0];
    let (wide, narrow) = (claim(1, 100, 60_000), claim(2, 1, 60_000));
    expect_passed(gateway.check(&[wide, narrow]).await);
    for _ in 0..10 {
        let refused = expect_refused(gateway.check(&[wide, narrow]).await);
        assert_eq!(refused.by, 1);
        assert_eq!(refused.standings[0].remaining, 99);
    }
    assert_eq!(count(&mut connection, wide.subject).await, 1);
    assert_eq!(count(&mut connection, narrow.subject).await, 1);
    // Keys do not outlive what they hold for long.
    let left_ms: i64 = redis::cmd("PTTL").arg(key(wide.subject)).query_async(&mut connection).await.unwrap();
    assert!((60_000..=65_000).contains(&left_ms), "{left_ms}");
}

#[tokio::test]
async fn what_is_taken_back_counts_nowhere() {
    if !redis_is_here() {
        return;
    }
    let server = Server::start(&[]).await;
    let fleet = Fleet::of(2, &server.url()).await;
    let claims = [claim(1, 1, 60_000), claim(2, 5, 60_000)];
    let receipt = expect_passed(fleet.gateways[0].check(&claims).await);
    expect_refused(fleet.gateways[1].check(&claims).await);
    assert_eq!(fleet.gateways[1].standing(&claims[0]).await.remaining, 0);
    fleet.gateways[0].take_back(&receipt).await;
    assert_eq!(fleet.gateways[1].standing(&claims[1]).await.remaining, 5);
    expect_passed(fleet.gateways[1].check(&claims).await);
}

#[tokio::test]
async fn a_clock_that_is_set_back_lets_nobody_through_too_early() {
    if !redis_is_here() {
        return;
    }
    let server = Server::start(&[]).await;
    let fleet = Fleet::of(1, &server.url()).await;
    let mut connection = server.connection().await;
    let gateway = &fleet.gateways[0];
    let now_us = async |connection: &mut MultiplexedConnection| {
        let (s, us): (u64, u64) = redis::cmd("TIME").query_async(connection).await.unwrap();
        s * 1_000_000 + us
    };
    let newest_us = async |connection: &mut MultiplexedConnection, subject| {
        let mut newest = redis::cmd("ZRANGE");
        newest.arg(key(subject)).arg(-1).arg(-1).arg("WITHSCORES");
        let (_, at): (String, u64) = newest.query_async(connection).await.unwrap();
        at
    };
    let plant = async |connection: &mut MultiplexedConnection, subject, at: u64, name: &str| {
        redis::cmd("ZADD").arg(key(subject)).arg(at).arg(name).exec_async(connection).await.unwrap();
    };

    // A little: the window stands still until the clock has caught up.
    let little = claim(1, 2, 10_000);
    let ahead = now_us(&mut connection).await + 800_000;
    plant(&mut connection, little.subject, ahead, "a").await;
    let (verdict, at) = gateway.check_timed(&[little]).await;
    expect_passed(verdict);
    assert!(at.is_some_and(|at| at >= ahead));
    let refused = expect_refused(gateway.check(&[little]).await);
    let elapsed = Duration::from_micros(now_us(&mut connection).await - (ahead - 800_000));
    assert!(refused.retry_after + elapsed >= Duration::from_millis(10_800), "{refused:?}");

    // By an hour: nobody waits for an hour, and the distances stay.
    let much = claim(2, 2, 10_000);
    let ahead = now_us(&mut connection).await + 3_600_000_000;
    plant(&mut connection, much.subject, ahead - 4_000_000, "a").await;
    plant(&mut connection, much.subject, ahead, "b").await;
    let refused = expect_refused(gateway.check(&[much]).await);
    assert_eq!(refused.retry_after, Duration::from_secs(6));
    assert!(newest_us(&mut connection, much.subject).await <= now_us(&mut connection).await);
    let refused = expect_refused(gateway.check(&[much]).await);
    assert!(refused.retry_after < Duration::from_secs(6));
}

#[tokio::test]
async fn a_store_that_forgot_the_scripts_learns_them_again() {
    if !redis_is_here() {
        return;
    }
    let server = Server::start(&[]).await;
    let fleet = Fleet::of(1, &server.url()).await;
    let mut connection = server.connection().await;
    redis::cmd("SCRIPT").arg("FLUSH").exec_async(&mut connection).await.unwrap();
    expect_passed(fleet.gateways[0].check(&[claim(1, 1, 60_000)]).await);
    expect_refused(fleet.gateways[0].check(&[claim(1, 1, 60_000)]).await);
    assert!(fleet.all_are(StoreState::Up));
}

#[tokio::test]
async fn a_store_without_tls_is_not_talked_to_where_tls_is_asked_for() {
    if !redis_is_here() {
        return;
    }
    let server = Server::start(&[]).await;
    let options = RedisOptions { url: Secret::new(format!("rediss://127.0.0.1:{}", server.port)), gateways: None };
    let told = RedisLimiter::connect(options, Clock::system()).await.expect_err("it speaks no TLS");
    assert!(told.contains("redis.url"), "{told}");
}

#[tokio::test]
async fn a_gateway_starts_without_the_store_only_where_its_share_is_configured() {
    let port = free_port();
    let options = |gateways| RedisOptions { url: Secret::new(format!("redis://u:hunter2@127.0.0.1:{port}")), gateways };
    let connect = |gateways| RedisLimiter::connect(options(gateways), Clock::system());
    let (alone, configured) = tokio::join!(connect(None), connect(Some(3)));
    let told = alone.expect_err("there is no store");
    assert!(told.contains("redis.url") && told.contains("redis.gateways") && !told.contains("hunter2"), "{told}");
    let limiter = configured.expect("its share is known");
    assert_eq!(limiter.stats().state, StoreState::Down);
    let mut through = 0;
    for _ in 0..100 {
        through += u32::from(passed(&limiter.check(&[claim(1, 10, 60_000)]).await));
    }
    assert_eq!(through, 3);
    assert!(!format!("{limiter:?}").contains("hunter2"));
    let nonsense = RedisOptions { url: Secret::new("redis:/nonsense hunter2"), gateways: Some(3) };
    let told = RedisLimiter::connect(nonsense, Clock::system()).await.expect_err("that is no address");
    assert!(told.contains("redis.url") && !told.contains("hunter2"), "{told}");
}

// --- while it is gone ------------------------------------------------------------------------------------------------

/// A call, as its caller saw it.
#[derive(Clone, Copy)]
struct Seen {
    began: Instant,
    ended: Instant,
    through: bool,
}

/// Callers at all gateways, until told to stop.
struct Load {
    stop: Arc<AtomicBool>,
    callers: Vec<tokio::task::JoinHandle<Vec<Seen>>>,
}

impl Load {
    fn start(fleet: &Fleet, claims: &[Claim]) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        // Most of them at one gateway.
        let callers = [0, 0, 0, 0, 0, 0, 1, 1, 1, 2, 2, 3].map(|gateway| {
            let gateway = Arc::clone(&fleet.gateways[gateway]);
            let (stop, claims) = (Arc::clone(&stop), claims.to_vec());
            tokio::spawn(async move {
                let mut seen = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let began = Instant::now();
                    let through = passed(&gateway.check(&claims).await);
                    seen.push(Seen { began, ended: Instant::now(), through });
                    let pause = rand::rng().random_range(1..8);
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                }
                seen
            })
        });
        Self { stop, callers: callers.into() }
    }

    async fn stop(self) -> Vec<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        join_all(self.callers).await.into_iter().flat_map(|seen| seen.expect("no panic")).collect()
    }
}

/// The most calls that were surely let through within one window.
fn most_within(seen: &[Seen], window: Duration) -> usize {
    let through: Vec<&Seen> = seen.iter().filter(|seen| seen.through).collect();
    let within = |first: &Seen| {
        through.iter().filter(|seen| seen.began >= first.began && seen.ended < first.began + window).count()
    };
    through.iter().map(|first| within(first)).max().unwrap_or(0)
}

fn slowest(seen: &[Seen]) -> Duration {
    seen.iter().map(|seen| seen.ended - seen.began).max().unwrap_or_default()
}

/// A store that goes and comes back under load: all calls are answered, and the sum stays within the limit throughout.
async fn the_sum_holds(server: &mut Server, go: impl Fn(&mut Server), back: impl AsyncFn(&mut Server)) {
    const LIMIT: u32 = 40;
    const WINDOW_MS: u64 = 700;
    let stalls = Stalls::watch();
    let fleet = Fleet::of(GATEWAYS, &server.url()).await;
    let load = Load::start(&fleet, &[claim(1, LIMIT, WINDOW_MS)]);
    tokio::time::sleep(Duration::from_millis(1_200)).await;
    go(server);
    let gone = Instant::now();
    eventually(Duration::from_secs(2), "nobody notices", || fleet.all_are(StoreState::Down)).await;
    let shut = Instant::now();
    let refused = expect_refused(fleet.gateways[0].check(&[closed(claim(2, 5, WINDOW_MS))]).await);
    assert!(refused.store_is_gone && refused.retry_after > Duration::ZERO);
    assert!(shut.elapsed() < stalls.allow(ANSWER));
    tokio::time::sleep(Duration::from_secs(2)).await;
    let returned = Instant::now();
    back(server).await;
    fleet.are_up_again(&stalls).await;
    let shared = Instant::now();
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let seen = load.stop().await;

    let window = Duration::from_millis(WINDOW_MS);
    assert!(slowest(&seen) < stalls.allow(ANSWER), "an answer took {:?}", slowest(&seen));
    assert!(most_within(&seen, window) <= LIMIT as usize, "{} of {LIMIT}", most_within(&seen, window));
    // It was not kept within the limit by refusing everybody.
    let of = |from: Instant, to: Instant| {
        let part: Vec<Seen> = seen.iter().filter(|seen| seen.began >= from && seen.ended < to).copied().collect();
        most_within(&part, window)
    };
    assert!(of(gone + window * 2, returned) >= LIMIT as usize / 2, "{}", of(gone + window * 2, returned));
    assert!(of(shared, Instant::now()) >= LIMIT as usize / 2, "{}", of(shared, Instant::now()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sum_holds_when_the_store_is_killed_and_comes_back_empty() {
    if redis_is_here() {
        let mut server = Server::start(&[]).await;
        Box::pin(the_sum_holds(&mut server, Server::kill, async |server: &mut Server| server.restart().await)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_sum_holds_when_the_store_stops_answering_for_a_while() {
    if redis_is_here() {
        let mut server = Server::start(&[]).await;
        let stop = |server: &mut Server| server.signal("-STOP");
        Box::pin(the_sum_holds(&mut server, stop, async |server: &mut Server| server.signal("-CONT"))).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_the_store_the_shares_sum_to_the_limit() {
    if !redis_is_here() {
        return;
    }
    let mut server = Server::start(&[]).await;
    let stalls = Stalls::watch();
    let fleet = Fleet::of(GATEWAYS, &server.url()).await;
    server.kill();
    eventually(Duration::from_secs(3), "nobody notices", || fleet.all_are(StoreState::Down)).await;
    for (number, limit) in [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (6, 41), (7, 100)] {
        let claims = [claim(number, limit, 60_000)];
        let mut through = 0;
        for _ in 0..limit {
            for gateway in &fleet.gateways {
                through += u32::from(passed(&gateway.check(&claims).await));
            }
        }
        assert_eq!(through, limit);
    }
    // Whoever has no share at all refuses because of the store, not because of the caller.
    let refused = join_all(fleet.gateways.iter().map(|gateway| async { gateway.check(&[claim(1, 1, 60_000)]).await }));
    let gone = refused.await.into_iter().filter(|verdict| match verdict {
        Verdict::Refused(refused) => refused.store_is_gone,
        Verdict::Passed(_) => panic!("let through twice"),
    });
    assert_eq!(gone.count(), GATEWAYS - 1);

    // The store comes back empty, and learns of all that was let through without it.
    server.restart().await;
    fleet.are_up_again(&stalls).await;
    let mut connection = server.connection().await;
    for (number, limit) in [(1, 1), (5, 6), (7, 100)] {
        assert_eq!(count(&mut connection, subject(number)).await, limit);
        expect_refused(fleet.gateways[0].check(&[claim(number, limit, 60_000)]).await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_used_up_before_the_failure_stays_used_up() {
    if !redis_is_here() {
        return;
    }
    let mut server = Server::start(&[]).await;
    let stalls = Stalls::watch();
    let fleet = Fleet::of(GATEWAYS, &server.url()).await;
    let (full, half) = (claim(1, 12, 60_000), claim(2, 40, 60_000));
    for call in 0..12 {
        expect_passed(fleet.gateways[call % 2].check(&[full]).await);
    }
    for gateway in &fleet.gateways {
        expect_refused(gateway.check(&[full]).await);
    }
    for call in 0..20 {
        expect_passed(fleet.gateways[call % GATEWAYS].check(&[half]).await);
    }
    server.kill();
    eventually(Duration::from_secs(3), "nobody notices", || fleet.all_are(StoreState::Down)).await;
    let mut through = 0;
    for gateway in &fleet.gateways {
        let refused = expect_refused(gateway.check(&[full]).await);
        assert!(refused.retry_after > Duration::from_secs(40), "{refused:?}");
        for _ in 0..40 {
            through += usize::from(passed(&gateway.check(&[half]).await));
        }
    }
    // 20 were left; whoever had heard last of the total is right, and the others are wrong by less than a round.
    assert!((16..=20 + GATEWAYS).contains(&through), "{through}");
    server.restart().await;
    fleet.are_up_again(&stalls).await;
    let mut connection = server.connection().await;
    assert_eq!(count(&mut connection, full.subject).await, 12);
    assert_eq!(count(&mut connection, half.subject).await as usize, 20 + through);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_taken_back_while_the_store_is_gone_is_gone_when_it_is_back() {
    if !redis_is_here() {
        return;
    }
    let server = Server::start(&[]).await;
    let stalls = Stalls::watch();
    let fleet = Fleet::of(1, &server.url()).await;
    let claims = [claim(1, 5, 60_000)];
    let before = expect_passed(fleet.gateways[0].check(&claims).await);
    server.signal("-STOP");
    let during = expect_passed(fleet.gateways[0].check(&claims).await);
    expect_passed(fleet.gateways[0].check(&claims).await);
    fleet.gateways[0].take_back(&before).await;
    fleet.gateways[0].take_back(&during).await;
    server.signal("-CONT");
    fleet.are_up_again(&stalls).await;
    assert_eq!(fleet.gateways[0].standing(&claims[0]).await.remaining, 4);
}

// --- a cluster -------------------------------------------------------------------------------------------------------

async fn start_cluster() -> Vec<Server> {
    let mut nodes = Vec::new();
    for _ in 0..3 {
        nodes.push(Server::start(&["--cluster-enabled", "yes", "--cluster-node-timeout", "1000"]).await);
    }
    let mut create = Command::new("redis-cli");
    create.args(["--cluster", "create"]).args(nodes.iter().map(|node| format!("127.0.0.1:{}", node.port)));
    let created = create.args(["--cluster-yes"]).stdout(Stdio::null()).status();
    assert!(created.is_ok_and(|status| status.success()), "the cluster is not made");
    for node in &nodes {
        healthy(node).await;
    }
    nodes
}

async fn healthy(node: &Server) {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut connection = node.connection().await;
    loop {
        let info: String = redis::cmd("CLUSTER").arg("INFO").query_async(&mut connection).await.unwrap();
        if info.contains("cluster_state:ok") {
            return;
        }
        assert!(Instant::now() < deadline, "the cluster does not become healthy");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// What all nodes together hold of a subject.
async fn count_in(nodes: &[Server], subject: Subject) -> u32 {
    for node in nodes {
        let counted = redis::cmd("ZCARD").arg(key(subject)).query_async(&mut node.connection().await).await;
        // The others say where it is.
        if let Ok(count) = counted {
            return count;
        }
    }
    panic!("no node has the slot");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_cluster_a_call_counts_in_all_slots_or_in_none() {
    if !redis_is_here() {
        return;
    }
    let mut nodes = start_cluster().await;
    let stalls = Stalls::watch();
    let fleet = Fleet::of(GATEWAYS, &nodes[0].url()).await;

    // Refused by one slot, and entered in no other.
    let claims = [claim(1, 100, 60_000), claim(2, 1, 60_000), claim(3, 100, 60_000), claim(4, 100, 60_000)];
    let receipt = expect_passed(fleet.gateways[0].check(&claims).await);
    for gateway in &fleet.gateways {
        let refused = expect_refused(gateway.check(&claims).await);
        assert_eq!((refused.by, refused.standings[0].remaining), (1, 99));
    }
    for claim in &claims {
        assert_eq!(count_in(&nodes, claim.subject).await, 1);
    }
    fleet.gateways[0].take_back(&receipt).await;
    for claim in &claims {
        assert_eq!(count_in(&nodes, claim.subject).await, 0);
    }

    // Many at once, who find one slot full after they have entered another.
    for round in 0..20 {
        let (some, few, many) = (10 + round * 3, 11 + round * 3, 12 + round * 3);
        let claims = [claim(some, 5, 60_000), claim(few, 3, 60_000), claim(many, 1_000, 60_000)];
        let calls = (0..24).map(|call| {
            let gateway = Arc::clone(&fleet.gateways[call % GATEWAYS]);
            tokio::spawn(async move { passed(&gateway.check(&claims).await) })
        });
        let through = join_all(calls).await.into_iter().filter(|through| *through.as_ref().unwrap()).count();
        assert_eq!(through, 3);
        for claim in &claims {
            assert_eq!(count_in(&nodes, claim.subject).await, 3);
        }
    }
    assert!(fleet.all_are(StoreState::Up));

    // A node is lost, and comes back empty.
    nodes[2].kill();
    let mut slowest = Duration::ZERO;
    let mut through = 0;
    for _ in 0..100 {
        for gateway in &fleet.gateways {
            let began = Instant::now();
            let claims = [claim(1_001, 30, 60_000), claim(1_002, 30, 60_000), claim(1_003, 30, 60_000)];
            through += usize::from(passed(&gateway.check(&claims).await));
            slowest = slowest.max(began.elapsed());
        }
    }
    assert!(slowest < stalls.allow(ANSWER), "{slowest:?}");
    assert!((1..=30).contains(&through), "{through}");
    eventually(Duration::from_secs(3), "nobody notices", || fleet.all_are(StoreState::Down)).await;
    nodes[2].restart().await;
    for node in &nodes {
        healthy(node).await;
    }
    eventually(Duration::from_secs(5), "limits are not shared again", || fleet.all_are(StoreState::Up)).await;
    for number in [1_001, 1_002, 1_003] {
        assert_eq!(count_in(&nodes, subject(number)).await as usize, through);
    }
}
