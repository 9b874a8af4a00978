//! Listening, serving, draining: how anything of ours is reached over a socket.
//!
//! One accept loop for HTTP/1.1 and HTTP/2. Slow senders are cut off while they send headers; what is in flight at a
//! shutdown is finished within the grace. What is served decides about everything else.

use std::{convert::Infallible, fmt::Write as _, future::Future, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::{FutureExt as _, future::BoxFuture};
use http::{Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body::Body as HttpBody;
use http_body_util::Full;
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
};
use tokio::{net::TcpListener, sync::Semaphore};
use tonic::body::Body;

use crate::{db::Database, policy::Guarded, service::Rpcs, shutdown::Shutdown};

/// Connections open at a time, of one listener.
const MAX_CONNECTIONS: usize = 16_384;
/// How long the headers of a request may take.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// How often an idle HTTP/2 connection is asked whether it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// Calls under way on one HTTP/2 connection.
const MAX_STREAMS: u32 = 256;

/// Binds a listener, or says what to do.
pub async fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await.map_err(|error| {
        let advice = match error.kind() {
            io::ErrorKind::AddrInUse => "another process has it: stop that one, or name another address",
            io::ErrorKind::PermissionDenied => "it needs more rights: name a port above 1023",
            io::ErrorKind::AddrNotAvailable => "this machine has no such address: name one of its own",
            _ => "name another address",
        };
        io::Error::new(error.kind(), format!("cannot listen on {address}: {advice}"))
    })
}

/// Serves until shut down, and then finishes what is in flight within the grace.
pub async fn serve<F, Fut, B>(listener: TcpListener, handle: F, mut shutdown: Shutdown, grace: Duration)
where
    F: Fn(Request<Incoming>, SocketAddr) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = Response<B>> + Send + 'static,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let graceful = GracefulShutdown::new();
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .max_concurrent_streams(MAX_STREAMS)
        .adaptive_window(true);
    loop {
        let place = tokio::select! {
            place = Arc::clone(&places).acquire_owned() => place,
            () = shutdown.wait() => break,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shutdown.wait() => break,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                // Out of file descriptors, most likely: let some be closed first.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        // A connection without it works too, only slower.
        let _ = stream.set_nodelay(true);
        let handle = handle.clone();
        let service = service_fn(move |request| handle(request, peer).map(Ok::<_, Infallible>));
        let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).into_owned();
        let connection = graceful.watch(connection);
        tokio::spawn(async move {
            let _place = place;
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection ended early");
            }
        });
    }
    drop(listener);
    if tokio::time::timeout(grace, graceful.shutdown()).await.is_err() {
        tracing::warn!("connections were cut off at the end of the grace");
    }
}

/// A service's own gRPC listener: its guarded rpcs, health for anyone, reflection for those who may call.
#[derive(Clone)]
pub struct GrpcHost {
    guarded: Guarded,
    health: Rpcs,
}

impl GrpcHost {
    /// Puts health beside a guarded service.
    pub async fn new(guarded: Guarded) -> Self {
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_service_status("", tonic_health::ServingStatus::Serving).await;
        Self { guarded, health: Rpcs::new(health) }
    }

    /// Answers one call.
    pub async fn handle(&self, request: Request<Incoming>, _peer: SocketAddr) -> Response<Body> {
        let request = request.map(Body::new);
        let answer = if request.uri().path().starts_with("/grpc.health.v1.Health/") {
            self.health.call(request).await
        } else {
            self.guarded.call(request).await
        };
        answer.unwrap_or_else(|impossible: Infallible| match impossible {})
    }
}

type Ready = Arc<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;
type Metrics = Arc<dyn Fn(&mut String) + Send + Sync>;

/// The operations listener: `/healthz`, `/readyz`, `/metrics`.
#[derive(Clone)]
pub struct Operations {
    ready: Ready,
    metrics: Metrics,
}

impl Operations {
    /// Answers by these functions.
    pub fn new<R>(ready: R, metrics: impl Fn(&mut String) + Send + Sync + 'static) -> Self
    where
        R: Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync + 'static,
    {
        Self { ready: Arc::new(ready), metrics: Arc::new(metrics) }
    }

    /// Answers one request.
    pub async fn handle(&self, request: Request<Incoming>, _peer: SocketAddr) -> Response<Full<Bytes>> {
        let (status, text) = match request.uri().path() {
            "/healthz" => (StatusCode::OK, "ok\n".to_owned()),
            "/readyz" => match (self.ready)().await {
                Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
                Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
            },
            "/metrics" => {
                let mut text = String::new();
                (self.metrics)(&mut text);
                (StatusCode::OK, text)
            }
            _ => (StatusCode::NOT_FOUND, "here are /healthz, /readyz and /metrics\n".to_owned()),
        };
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        let plain = http::HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        response.headers_mut().insert(CONTENT_TYPE, plain);
        response
    }
}

/// What the databases of a process have done, in the text format of Prometheus.
pub fn write_database_metrics(text: &mut String, databases: &[(&'static str, Database)]) {
    let mut family = |name: &str, help: &str, value: fn(&crate::db::DbStats) -> u64| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} counter");
        for (service, database) in databases {
            let _ = writeln!(text, "{name}{{service=\"{service}\"}} {}", value(&database.stats()));
        }
    };
    family("paperkey_db_read_statements_total", "Statements of reading jobs.", |stats| stats.read_statements);
    family("paperkey_db_write_statements_total", "Statements of writing jobs.", |stats| stats.write_statements);
    family("paperkey_db_write_jobs_total", "Jobs given to the writer.", |stats| stats.write_jobs);
    family("paperkey_db_commits_total", "Commits; a group of jobs may share one.", |stats| stats.commits);
}
