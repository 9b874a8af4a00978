//! Opens connections, to judged addresses only.
//!
//! A name is resolved once for a connection. Every address that it resolves to is judged, and exactly one of these
//! is dialled, so that no second look-up can answer otherwise. A connection that is kept for the next delivery was
//! judged when it was opened. Proxies of the environment are not known here.

use std::{
    fmt,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use http::Uri;
use hyper::rt::{Read, ReadBufCursor, Write};
use hyper_util::{
    client::legacy::connect::{Connected, Connection},
    rt::TokioIo,
};
use tokio::net::TcpStream;
use tower::Service;

use super::names::Names;
use crate::domain::{
    address::is_public,
    attempt::AttemptFault,
    endpoint::{Target, UrlRules},
};

/// Addresses of a name that are tried at most.
const MAX_ADDRESSES: usize = 8;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.word())]
pub(super) struct NoConnection(pub(super) AttemptFault);

/// Opens a socket to one address, and to no other.
pub(crate) trait Dial: Clone + Send + Sync + 'static {
    /// The socket, connected.
    fn dial(&self, address: SocketAddr) -> impl Future<Output = io::Result<TcpStream>> + Send;
}

/// Dials over the network.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tcp;

impl Dial for Tcp {
    async fn dial(&self, address: SocketAddr) -> io::Result<TcpStream> {
        TcpStream::connect(address).await
    }
}

/// Opens connections to what the rules allow.
#[derive(Clone)]
pub(super) struct Connector<D = Tcp> {
    rules: UrlRules,
    names: Names,
    timeout: Duration,
    dial: D,
}

impl<D: Dial> Connector<D> {
    pub(super) fn new(rules: UrlRules, names: Names, timeout: Duration, dial: D) -> Self {
        Self { rules, names, timeout, dial }
    }

    async fn connect(self, uri: Uri) -> Result<Wire, NoConnection> {
        let target = self.rules.read(&uri.to_string()).map_err(|_| NoConnection(AttemptFault::AddressNotAllowed))?;
        let addresses = self.resolve(&target).await?;
        // The last address may use all the time that is left, the ones before it must leave some.
        let share = self.timeout / u32::try_from(addresses.len() + 1).unwrap_or(u32::MAX);
        let last = addresses.len() - 1;
        for (position, address) in addresses.into_iter().enumerate() {
            let connecting = self.dial.dial(address);
            let connected = if position == last {
                connecting.await
            } else {
                let slow = |_| Err(io::ErrorKind::TimedOut.into());
                tokio::time::timeout(share, connecting).await.unwrap_or_else(slow)
            };
            if let Ok(stream) = connected {
                // Without it a delivery is only slower.
                let _ = stream.set_nodelay(true);
                return Ok(Wire { stream: TokioIo::new(stream), opened: Opened(Instant::now()) });
            }
        }
        Err(NoConnection(AttemptFault::Connect))
    }

    /// The addresses of a host that are tried; never none. If any that it has is not allowed, the host is not.
    async fn resolve(&self, target: &Target) -> Result<Vec<SocketAddr>, NoConnection> {
        let mut addresses = match target.host.parse::<IpAddr>() {
            Ok(address) => vec![address],
            Err(_) => self.names.addresses(&target.host).await.map_err(|error| {
                tracing::debug!(host = target.host, %error, "a name cannot be resolved");
                NoConnection(AttemptFault::Dns)
            })?,
        };
        let allowed = |address: &IpAddr| self.rules.allow_private_networks || is_public(*address);
        if !addresses.iter().all(allowed) {
            return Err(NoConnection(AttemptFault::AddressNotAllowed));
        }
        addresses.truncate(MAX_ADDRESSES);
        Ok(addresses.into_iter().map(|address| SocketAddr::new(address, target.port)).collect())
    }
}

impl<D: Dial> Service<Uri> for Connector<D> {
    type Response = Wire;
    type Error = NoConnection;
    type Future = Pin<Box<dyn Future<Output = Result<Wire, NoConnection>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), NoConnection>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(self.clone().connect(uri))
    }
}

/// When a connection was opened.
#[derive(Clone, Copy, Debug)]
pub(super) struct Opened(pub(super) Instant);

/// A connection to a judged address, which knows since when.
pub(super) struct Wire {
    stream: TokioIo<TcpStream>,
    opened: Opened,
}

impl fmt::Debug for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wire").field("opened", &self.opened).finish_non_exhaustive()
    }
}

impl Connection for Wire {
    fn connected(&self) -> Connected {
        Connected::new().extra(self.opened)
    }
}

impl Read for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl Write for Wire {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, pieces)
    }
}
