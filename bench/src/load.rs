//! The load: keep-alive HTTP/1.1 connections that each send the next request when the last is answered.

use std::{
    fs,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use hdrhistogram::Histogram;
use http::{Request, header};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, task::JoinSet};

use crate::Result;

/// Before anything is counted.
const WARM_UP: Duration = Duration::from_secs(1);
/// The unit of `/proc/<pid>/stat`, fixed at 100 a second on Linux.
const TICK_US: u64 = 10_000;

/// One kind of request.
#[derive(Clone)]
pub(crate) struct Load {
    address: SocketAddr,
    path: &'static str,
    key: Option<String>,
    body: Arc<dyn Fn(usize) -> String + Send + Sync>,
    /// The path of the n-th request, where it is a GET.
    place: Option<Arc<dyn Fn(usize) -> String + Send + Sync>>,
}

/// What came of so many calls.
pub(crate) struct Counted {
    pub(crate) latencies: Histogram<u64>,
    pub(crate) elapsed: Duration,
}

/// What came of a measurement.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) requests: u64,
    pub(crate) elapsed: Duration,
    pub(crate) p50_us: u64,
    pub(crate) p99_us: u64,
    pub(crate) server_cpu_us: u64,
}

/// When to count and when to end.
#[derive(Default)]
pub(crate) struct Phase {
    counting: AtomicBool,
    over: AtomicBool,
}

impl Phase {
    pub(crate) fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    pub(crate) fn is_counting(&self) -> bool {
        self.counting.load(Ordering::Relaxed)
    }
}

/// A histogram for one connection.
pub(crate) fn histogram() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, 60_000_000, 3)?)
}

/// Runs the connections, counts between warm-up and end, and reads the server's CPU time at both.
pub(crate) async fn measure(
    mut tasks: JoinSet<Result<Histogram<u64>>>,
    phase: Arc<Phase>,
    span: Duration,
    pids: &[u32],
) -> Result<Outcome> {
    tokio::time::sleep(WARM_UP).await;
    let cpu_before = cpu_us(pids)?;
    let began = Instant::now();
    phase.counting.store(true, Ordering::Relaxed);
    tokio::time::sleep(span).await;
    phase.over.store(true, Ordering::Relaxed);
    let elapsed = began.elapsed();
    let server_cpu_us = cpu_us(pids)? - cpu_before;
    let mut all = histogram()?;
    while let Some(connection) = tasks.join_next().await {
        all.add(connection??)?;
    }
    Ok(Outcome {
        requests: all.len(),
        elapsed,
        p50_us: all.value_at_quantile(0.5),
        p99_us: all.value_at_quantile(0.99),
        server_cpu_us,
    })
}

impl Load {
    /// POSTs of what `body` makes for the n-th request.
    pub(crate) fn post(
        address: SocketAddr,
        path: &'static str,
        key: Option<String>,
        body: impl Fn(usize) -> String + Send + Sync + 'static,
    ) -> Self {
        Self { address, path, key, body: Arc::new(body), place: None }
    }

    /// GETs of what `place` makes for the n-th request.
    pub(crate) fn get(
        address: SocketAddr,
        key: Option<String>,
        place: impl Fn(usize) -> String + Send + Sync + 'static,
    ) -> Self {
        Self { address, path: "GET", key, body: Arc::new(|_| String::new()), place: Some(Arc::new(place)) }
    }

    /// Sends so many over so many connections, all of them counted.
    pub(crate) async fn times(&self, connections: usize, calls: usize) -> Result<Counted> {
        let phase = Arc::new(Phase::default());
        phase.counting.store(true, Ordering::Relaxed);
        let next = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        let began = Instant::now();
        for _ in 0..connections {
            let (load, phase, next) = (self.clone(), Arc::clone(&phase), Arc::clone(&next));
            tasks.spawn(async move { load.connection(&phase, &next, calls).await });
        }
        let mut latencies = histogram()?;
        while let Some(connection) = tasks.join_next().await {
            latencies.add(connection??)?;
        }
        Ok(Counted { latencies, elapsed: began.elapsed() })
    }

    /// Sends for a while over so many connections.
    pub(crate) async fn run(&self, connections: usize, span: Duration, pids: &[u32]) -> Result<Outcome> {
        let phase = Arc::new(Phase::default());
        let next = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        for _ in 0..connections {
            let (load, phase, next) = (self.clone(), Arc::clone(&phase), Arc::clone(&next));
            tasks.spawn(async move { load.connection(&phase, &next, usize::MAX).await });
        }
        measure(tasks, phase, span, pids).await
    }

    async fn connection(&self, phase: &Phase, next: &AtomicUsize, calls: usize) -> Result<Histogram<u64>> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let mut latencies = histogram()?;
        while !phase.is_over() {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= calls {
                break;
            }
            let request = self.request(number)?;
            let began = Instant::now();
            let response = sender.send_request(request).await?;
            let status = response.status();
            let body = response.into_body().collect().await?.to_bytes();
            if !status.is_success() {
                return Err(format!("{} answered {status}: {}", self.path, String::from_utf8_lossy(&body)).into());
            }
            if phase.is_counting() {
                latencies.saturating_record(u64::try_from(began.elapsed().as_micros())?);
            }
        }
        driver.abort();
        Ok(latencies)
    }

    fn request(&self, n: usize) -> Result<Request<Full<Bytes>>> {
        let request = match &self.place {
            Some(place) => Request::get(place(n)),
            None => Request::post(self.path),
        };
        let mut request = request.header(header::HOST, "localhost").header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        Ok(request.body(Full::new(Bytes::from((self.body)(n))))?)
    }
}

/// User and system time of the processes so far.
pub(crate) fn cpu_us(pids: &[u32]) -> Result<u64> {
    let mut total = 0;
    for pid in pids {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name in parentheses may hold spaces; utime and stime are the 12th and 13th field after it.
        let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let mut times = after_name.split_whitespace().skip(11);
        for _ in 0..2 {
            total += times.next().unwrap_or("0").parse::<u64>()? * TICK_US;
        }
    }
    Ok(total)
}
