//! Opening one connection: to an address, through TLS where the URL says so, up to the first word of the peer.
//!
//! That word is waited for: the kernel of a stopped process accepts connections as if nothing were the matter. From then
//! on the peer is asked every second whether it lives. One that does not say so is soon left alone ([`Heard::is_silent`]),
//! and given up only later: what it does for us may be done all the same.

use std::{
    error::Error as StdError,
    fmt,
    future::{Future, poll_fn},
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures_util::future::BoxFuture;
use http::uri::{Authority, Scheme};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use paperkey_proto::Error;
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::Notify,
    time::Instant,
};
use tokio_rustls::TlsConnector;

use super::{
    ClientTls,
    pool::{Connection, Place},
};

/// How long it may take until the peer has said something.
const DIAL_TIMEOUT: Duration = Duration::from_secs(2);
/// How often a peer is asked whether it lives, where nothing else is heard of it.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
/// How long it may then take to say so before the connection is cut.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// How long nothing may be heard of a peer until others are asked instead: by then it was asked and had a while.
const SILENT_AFTER: Duration = Duration::from_millis(1_600);
/// How often is looked whether a peer has said that it goes; a call finds out too.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// The protocol that a TLS peer must speak.
const H2: &[u8] = b"h2";

/// A URL of a channel.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) scheme: Scheme,
    pub(super) authority: Authority,
    /// Whose certificate the peer must show.
    name: Option<ServerName<'static>>,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.authority.fmt(f)
    }
}

impl Target {
    /// Reads URLs with commas between them.
    pub(super) fn all(urls: &str) -> Result<Vec<Arc<Self>>, Error> {
        urls.split(',').map(|url| Self::read(url.trim()).map(Arc::new)).collect()
    }

    fn read(url: &str) -> Result<Self, Error> {
        let unusable = || Error::unavailable(format!("{url} is no URL of a service, such as http://10.0.0.7:7001"));
        let uri: http::Uri = url.parse().map_err(|_| unusable())?;
        let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else { return Err(unusable()) };
        let is_bare = matches!(uri.path(), "" | "/") && uri.query().is_none() && !authority.as_str().contains('@');
        if !is_bare || authority.host().is_empty() {
            return Err(unusable());
        }
        let name = if *scheme == Scheme::HTTPS {
            Some(ServerName::try_from(bare(authority.host()).to_owned()).map_err(|_| unusable())?)
        } else if *scheme == Scheme::HTTP {
            None
        } else {
            return Err(unusable());
        };
        Ok(Self { scheme: scheme.clone(), authority: authority.clone(), name })
    }

    pub(super) fn host(&self) -> &str {
        bare(self.authority.host())
    }

    pub(super) fn port(&self) -> u16 {
        self.authority.port_u16().unwrap_or_else(|| if self.name.is_some() { 443 } else { 80 })
    }
}

/// A host without the brackets that an address has in a URL.
fn bare(host: &str) -> &str {
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

/// Runs a connection until it has ended.
pub(super) type Driver = BoxFuture<'static, Result<(), hyper::Error>>;

type BoxError = Box<dyn StdError + Send + Sync>;

/// Opens a connection to a peer that answers.
pub(super) async fn dial(place: &Arc<Place>, tls: Option<&ClientTls>) -> Result<(Arc<Connection>, Driver), BoxError> {
    let opened = tokio::time::timeout(DIAL_TIMEOUT, open(place, tls)).await;
    opened.unwrap_or_else(|_| Err("it does not answer".into()))
}

async fn open(place: &Arc<Place>, tls: Option<&ClientTls>) -> Result<(Arc<Connection>, Driver), BoxError> {
    let stream = TcpStream::connect(place.at).await?;
    // A connection without it works too, only slower.
    let _ = stream.set_nodelay(true);
    match &place.target.name {
        None => shake_hands(place, stream).await,
        Some(name) => {
            let config = tls.map_or_else(|| Arc::clone(&PUBLIC), |tls| speaking_h2(tls()));
            let stream =
                TlsConnector::from(config).connect(name.clone(), stream).await.map_err(|error| refused(&error))?;
            if stream.get_ref().1.alpn_protocol() != Some(H2) {
                return Err("it does not speak HTTP/2 over TLS".into());
            }
            shake_hands(place, stream).await
        }
    }
}

async fn shake_hands<S>(place: &Arc<Place>, stream: S) -> Result<(Arc<Connection>, Driver), BoxError>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let heard = Arc::new(Heard::new());
    let stream = Listening { stream, heard: Arc::clone(&heard) };
    let (sender, mut running) = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .handshake(TokioIo::new(stream))
        .await?;
    let connection = Arc::new(Connection::new(Arc::clone(place), sender, Arc::clone(&heard)));
    tokio::select! {
        ended = &mut running => return Err(ended.err().map_or_else(|| "it hung up".into(), Into::into)),
        () = heard.something() => {}
    }
    connection.allow(running.current_max_send_streams());
    let kept = Arc::clone(&connection);
    let driver = async move {
        let mut look = tokio::time::interval(LOOK_EVERY);
        poll_fn(|context| {
            // hyper learns of the peer's going when it is asked, and that is when somebody calls, or now.
            while look.poll_tick(context).is_ready() {
                kept.allow(running.current_max_send_streams());
            }
            Pin::new(&mut running).poll(context)
        })
        .await
    };
    Ok((connection, Box::pin(driver)))
}

/// What a failed handshake is told as.
fn refused(error: &io::Error) -> BoxError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(rustls::Error::InvalidCertificate(why)) => format!("its certificate is not trusted here ({why})").into(),
        Some(why) => format!("TLS failed: {why}").into(),
        None => format!("TLS failed: {error}").into(),
    }
}

/// Trusts the public authorities.
static PUBLIC: LazyLock<Arc<ClientConfig>> = LazyLock::new(|| {
    let roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider knows the versions that it is made for")
        .with_root_certificates(roots)
        .with_no_client_auth();
    speaking_h2(Arc::new(config))
});

fn speaking_h2(config: Arc<ClientConfig>) -> Arc<ClientConfig> {
    if config.alpn_protocols == [H2] {
        return config;
    }
    let mut config = Arc::unwrap_or_clone(config);
    config.alpn_protocols = vec![H2.to_vec()];
    Arc::new(config)
}

/// When the peer has last said anything.
pub(super) struct Heard {
    since: Instant,
    /// In milliseconds since then, and one more: 0 where nothing was heard.
    last: AtomicU64,
    first: Notify,
}

impl Heard {
    fn new() -> Self {
        Self { since: Instant::now(), last: AtomicU64::new(0), first: Notify::new() }
    }

    fn note(&self) {
        let now = u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX - 1);
        if self.last.swap(now + 1, Ordering::AcqRel) == 0 {
            self.first.notify_one();
        }
    }

    async fn something(&self) {
        while self.last.load(Ordering::Acquire) == 0 {
            self.first.notified().await;
        }
    }

    /// From when on the peer is silent, if nothing is heard until then.
    fn silent_from(&self) -> Instant {
        let last = self.last.load(Ordering::Acquire).saturating_sub(1);
        self.since + Duration::from_millis(last) + SILENT_AFTER
    }

    /// Whether nothing was heard for so long that the peer may be stopped.
    pub(super) fn is_silent(&self) -> bool {
        self.silent_from() <= Instant::now()
    }

    /// Waits until that is so.
    pub(super) async fn silence(&self) {
        while !self.is_silent() {
            tokio::time::sleep_until(self.silent_from()).await;
        }
    }
}

/// A stream of which is noted when something comes.
struct Listening<S> {
    stream: S,
    heard: Arc<Heard>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Listening<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = into.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, into);
        if into.filled().len() > before {
            self.heard.note();
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Listening<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
