//! Listening, serving, draining: how anything of ours is reached over a socket.
//!
//! One accept loop for HTTP/1.1 and HTTP/2, with TLS or without. Slow senders are cut off while they shake hands, say nothing
//! or send headers, and hold nobody else up; what is in flight at a shutdown is finished within the grace, and so is what
//! the kernel had let in before. What is served decides about everything else.

use std::{
    convert::Infallible,
    future::Future,
    io,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use futures_util::{FutureExt as _, future::BoxFuture};
use http::{
    HeaderValue, Request, Response, StatusCode, Version,
    header::{CONNECTION, CONTENT_TYPE},
};
use http_body::Body as HttpBody;
use http_body_util::Full;
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::{Service, service_fn},
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use paperkey_proto::Contract;
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::{Status, body::Body};

use self::beginning::Begun;
use crate::{
    authn::FEED,
    policy::Guarded,
    ready::Health,
    service::Rpcs,
    shed::{Errand, Places, SHED_HEADER},
    shutdown::Shutdown,
    telemetry::metrics,
};

mod beginning;

/// Connections open at a time, of one listener.
const MAX_CONNECTIONS: usize = 16_384;
/// How long a handshake may take.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// What the first byte of a TLS connection says: a handshake.
const HANDSHAKE: u8 = 0x16;
/// How long the headers of a request may take, and how long a connection may be silent before the first.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// How often an idle HTTP/2 connection is asked whether it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
/// Calls under way on one HTTP/2 connection.
const MAX_STREAMS: u32 = 256;
/// Calls that our own processes may take back on a connection before we have looked at them: all that are under way.
const MAX_PEERS_RESETS: usize = MAX_STREAMS as usize;
/// How long those who are connected when we end have to say what they want.
const LAST_WORD: Duration = Duration::from_millis(500);

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

/// Says what a listener shows to the next caller.
pub type ServerTls = Arc<dyn Fn() -> Arc<ServerConfig> + Send + Sync>;

/// A listener, and how it is spoken to.
pub struct Door {
    listener: TcpListener,
    tls: Option<ServerTls>,
    leaving: Option<Shutdown>,
    peers: bool,
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Door")
            .field("listener", &self.listener)
            .field("tls", &self.tls.is_some())
            .finish_non_exhaustive()
    }
}

impl From<TcpListener> for Door {
    fn from(listener: TcpListener) -> Self {
        Self { listener, tls: None, leaving: None, peers: false }
    }
}

impl Door {
    /// The same listener, with TLS.
    #[must_use]
    pub fn with_tls(self, tls: Option<ServerTls>) -> Self {
        Self { tls, ..self }
    }

    /// Only our own processes are expected to call.
    #[must_use]
    pub fn for_peers(self) -> Self {
        Self { peers: true, ..self }
    }

    /// Asks callers to make their next connection elsewhere from then on, while it still takes new ones.
    #[must_use]
    pub fn leaving_at(self, leaving: Shutdown) -> Self {
        Self { leaving: Some(leaving), ..self }
    }
}

/// Serves until shut down, and then finishes what is in flight within the grace.
pub async fn serve<F, Fut, B>(door: impl Into<Door>, handle: F, shutdown: Shutdown, grace: Duration)
where
    F: Fn(Request<Incoming>, SocketAddr) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = Response<B>> + Send + 'static,
    B: HttpBody<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let Door { listener, tls, leaving, peers } = door.into();
    let leaving = leaving.unwrap_or_else(|| shutdown.clone());
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let protocols = Protocols::new(peers);
    let let_in = |stream: TcpStream, peer: SocketAddr, place: OwnedSemaphorePermit| {
        // A connection without it works too, only slower.
        let _ = stream.set_nodelay(true);
        let (handle, leaving) = (handle.clone(), leaving.clone());
        let service = service_fn(move |request: Request<Incoming>| {
            let leaving = (request.version() < Version::HTTP_2).then(|| leaving.clone());
            handle(request, peer).map(move |mut response| {
                // HTTP/2 is told at the end, by a frame that loses no stream.
                if leaving.is_some_and(|leaving| leaving.has_come())
                    && response.status() != StatusCode::SWITCHING_PROTOCOLS
                {
                    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
                }
                Ok::<_, Infallible>(response)
            })
        });
        let (protocols, shutdown) = (protocols.clone(), shutdown.clone());
        // Asked for each time: certificates change while a process runs.
        let config = tls.as_ref().map(|tls| tls());
        tokio::spawn(async move {
            let _place = place;
            let mut end = shutdown.clone();
            let last_word = async move {
                end.wait().await;
                tokio::time::sleep(LAST_WORD).await;
            };
            match config {
                None => {
                    let Some(stream) = begun(stream, last_word).await else { return };
                    protocols.speak(stream, service, shutdown).await;
                }
                Some(config) => {
                    let shaking = tokio::time::timeout(HANDSHAKE_TIMEOUT, shake_hands(stream, config));
                    let Ok(Some(stream)) = shaking.await else { return };
                    let Some(stream) = begun(stream, last_word).await else { return };
                    protocols.speak(stream, service, shutdown).await;
                }
            }
        });
    };
    let mut end = shutdown.clone();
    loop {
        let place = tokio::select! {
            place = Arc::clone(&places).acquire_owned() => place,
            () = end.wait() => break,
        };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = end.wait() => break,
        };
        match (accepted, place) {
            (Ok((stream, peer)), Ok(place)) => let_in(stream, peer, place),
            (Err(error), _) => {
                tracing::warn!(%error, "a connection could not be accepted");
                // Out of file descriptors, most likely: let some be closed first.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            // The places are never closed.
            (_, Err(_)) => break,
        }
    }
    // The kernel has told those in its queue that they are connected.
    if let Ok(listener) = listener.into_std() {
        while let Ok(place) = Arc::clone(&places).try_acquire_owned()
            && let Ok((stream, peer)) = listener.accept()
        {
            if let Ok(stream) = stream.set_nonblocking(true).and_then(|()| TcpStream::from_std(stream)) {
                let_in(stream, peer, place);
            }
        }
    }
    // Who has a place holds it to the end of the connection.
    let all = u32::try_from(MAX_CONNECTIONS).unwrap_or(u32::MAX);
    if tokio::time::timeout(grace, places.acquire_many(all)).await.is_err() {
        tracing::warn!("connections were cut off at the end of the grace");
    }
}

/// Waits until somebody begins to speak, for as long as that may take.
async fn begun<S: AsyncRead + Unpin>(stream: S, last_word: impl Future<Output = ()>) -> Option<Begun<S>> {
    tokio::select! {
        begun = tokio::time::timeout(HEADER_TIMEOUT, Begun::read(stream)) => begun.ok()?.ok(),
        () = last_word => None,
    }
}

/// How each of the two is spoken.
#[derive(Clone)]
struct Protocols {
    http1: http1::Builder,
    http2: http2::Builder<TokioExecutor>,
}

impl Protocols {
    fn new(peers: bool) -> Self {
        let (mut http1, mut http2) = (http1::Builder::new(), http2::Builder::new(TokioExecutor::new()));
        http1.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
        http2
            .timer(TokioTimer::new())
            .keep_alive_interval(KEEP_ALIVE)
            .max_concurrent_streams(MAX_STREAMS)
            .adaptive_window(true);
        if peers {
            // They take back what strangers give up on, and one stranger must not cost the others the connection.
            http2.max_pending_accept_reset_streams(MAX_PEERS_RESETS);
        }
        Self { http1, http2 }
    }

    /// Answers on a connection until its end, or until it has finished what is under way at the shutdown.
    async fn speak<S, H, B>(&self, stream: Begun<S>, service: H, shutdown: Shutdown)
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
        H: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
        H::Future: Send + 'static,
        B: HttpBody<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let is_http2 = stream.is_http2();
        let stream = TokioIo::new(stream);
        if is_http2 {
            let connection = self.http2.serve_connection(stream, service);
            finish(connection, http2::Connection::graceful_shutdown, shutdown).await;
        } else {
            let connection = self.http1.serve_connection(stream, service).with_upgrades();
            finish(connection, http1::UpgradeableConnection::graceful_shutdown, shutdown).await;
        }
    }
}

async fn finish<C>(connection: C, end: impl FnOnce(Pin<&mut C>), mut shutdown: Shutdown)
where
    C: Future<Output = hyper::Result<()>>,
{
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        // What has been sent is read before it is told of the end, which one on which nothing was asked would take for its
        // own.
        biased;
        ended = connection.as_mut() => ended,
        () = shutdown.wait() => {
            end(connection.as_mut());
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// Agrees with a caller on the keys of a connection; none where they do not.
async fn shake_hands(mut stream: TcpStream, config: Arc<ServerConfig>) -> Option<TlsStream<TcpStream>> {
    let mut first = [0];
    if stream.peek(&mut first).await.ok()? == 0 {
        return None;
    }
    if first != [HANDSHAKE] {
        // Somebody who speaks plain HTTP. What they have sent is read, or it would reset the answer.
        let _ = stream.read(&mut [0; 4_096]).await;
        let _ = stream.write_all(NOT_HTTPS).await;
        let _ = stream.shutdown().await;
        return None;
    }
    match TlsAcceptor::from(config).accept(stream).await {
        Ok(stream) => Some(stream),
        Err(error) => {
            tracing::debug!(%error, "a handshake failed");
            None
        }
    }
}

/// What is said to a caller who speaks plain HTTP where TLS is spoken.
const NOT_HTTPS: &[u8] = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Type: text/plain\r\n\
    Content-Length: 41\r\n\r\nThis port speaks HTTPS: call https://...\n";

/// A service's own gRPC listener: its guarded rpcs, health for anyone, reflection for those who may call.
#[derive(Clone)]
pub struct GrpcHost {
    guarded: Guarded,
    health: Rpcs,
    places: Places,
}

impl GrpcHost {
    /// Puts health beside a guarded service of that name in the contract, and a bound on what is answered at a time.
    pub fn new(owner: &str, guarded: Guarded, places: Places) -> (Self, Health) {
        let methods = Contract::get().methods().iter().filter(|method| method.owner == owner);
        let (health, rpcs) = Health::new(methods.map(|method| method.service.as_str()));
        (Self { guarded, health: rpcs, places }, health)
    }

    /// Answers one call.
    pub async fn handle(&self, request: Request<Incoming>, _peer: SocketAddr) -> Response<Body> {
        let request = request.map(Body::new);
        let path = request.uri().path();
        // Whoever watches over a process learns of it also when it has too much to do.
        if path.starts_with("/grpc.health.v1.Health/") {
            return answered(self.health.call(request).await);
        }
        let Some(errand) = errand(path, self.guarded.is_of_ours(&request)) else {
            return answered(self.guarded.call(request).await);
        };
        let place = match self.places.take(errand) {
            Ok(place) => place,
            Err(error) => {
                let mut refused = Status::from(error).into_http();
                refused.headers_mut().insert(SHED_HEADER, HeaderValue::from_static("1"));
                return refused;
            }
        };
        let answer = answered(self.guarded.call(request).await);
        if errand == Errand::Stream { answer.map(|body| place.kept_by(body)) } else { answer }
    }
}

/// What a call to a method is, which one of our processes makes in its own name or not. Reflection, which stands outside
/// the contract, is a stream. What all of them have to know all the time needs no place: where it found none, each would
/// have to ask more than before.
fn errand(path: &str, is_of_ours: bool) -> Option<Errand> {
    match Contract::get().method(path) {
        Some(method) if method.descriptor.is_client_streaming() || method.descriptor.is_server_streaming() => {
            Some(Errand::Stream)
        }
        Some(_) if is_of_ours && path == FEED => None,
        Some(_) => Some(if is_of_ours { Errand::Internal } else { Errand::Call }),
        None => Some(Errand::Stream),
    }
}

fn answered(answer: Result<Response<Body>, Infallible>) -> Response<Body> {
    answer.unwrap_or_else(|impossible: Infallible| match impossible {})
}

type Ready = Arc<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// The operations listener: `/healthz`, `/readyz`, `/metrics`.
#[derive(Clone)]
pub struct Operations {
    ready: Ready,
}

impl Operations {
    /// Whether the process is ready, that function says.
    pub fn new<R>(ready: R) -> Self
    where
        R: Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync + 'static,
    {
        Self { ready: Arc::new(ready) }
    }

    /// Whether the process can do its work, or why not.
    pub async fn judge(&self) -> Result<(), String> {
        let judged = (self.ready)().await;
        metrics::READY.set(judged.is_ok().into());
        judged
    }

    /// Answers one request.
    pub async fn handle(&self, request: Request<Incoming>, _peer: SocketAddr) -> Response<Full<Bytes>> {
        let (status, text) = match request.uri().path() {
            "/healthz" => (StatusCode::OK, "ok\n".to_owned()),
            "/readyz" => match self.judge().await {
                Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
                Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {why}\n")),
            },
            "/metrics" => (StatusCode::OK, metrics::text()),
            _ => (StatusCode::NOT_FOUND, "here are /healthz, /readyz and /metrics\n".to_owned()),
        };
        let mut response = Response::new(Full::new(Bytes::from(text)));
        *response.status_mut() = status;
        let plain = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
        response.headers_mut().insert(CONTENT_TYPE, plain);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_in_our_own_name_has_the_reserve_and_the_feed_needs_no_place() {
        let product = "/paperkey.catalog.v1.CatalogService/GetProduct";
        let authenticate = "/paperkey.auth.v1.CredentialService/Authenticate";
        for (path, is_of_ours, expected) in [
            (product, false, Some(Errand::Call)),
            (product, true, Some(Errand::Internal)),
            (authenticate, true, Some(Errand::Internal)),
            (authenticate, false, Some(Errand::Call)),
            (FEED, true, None),
            (FEED, false, Some(Errand::Call)),
            ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", true, Some(Errand::Stream)),
        ] {
            assert!(Contract::get().method(path).is_some() || path.starts_with("/grpc."), "{path}");
            assert_eq!(errand(path, is_of_ours), expected, "{path}, {is_of_ours}");
        }
    }
}
