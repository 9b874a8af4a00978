//! Connections to addresses that webhooks may go to.
//!
//! The name is resolved once, every address it has is judged, and the connection goes to exactly one that was judged:
//! there is no second look-up that could answer otherwise. Proxies of the environment are not known here.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, lookup_host};
use tower::Service;

use crate::domain::{address::is_public, attempt::AttemptFault, endpoint::UrlRules};

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.word())]
pub(crate) struct NoConnection(pub(crate) AttemptFault);

/// Opens connections to allowed addresses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Connector {
    rules: UrlRules,
}

impl Connector {
    pub(crate) fn new(rules: UrlRules) -> Self {
        Self { rules }
    }

    async fn dial(self, uri: Uri) -> Result<TcpStream, NoConnection> {
        let target = self.rules.read(&uri.to_string()).map_err(|_| NoConnection(AttemptFault::AddressNotAllowed))?;
        let addresses: Vec<SocketAddr> = match target.host.parse::<IpAddr>() {
            Ok(address) => vec![SocketAddr::new(address, target.port)],
            Err(_) => lookup_host((target.host.as_str(), target.port))
                .await
                .map_err(|_| NoConnection(AttemptFault::Dns))?
                .collect(),
        };
        if addresses.is_empty() {
            return Err(NoConnection(AttemptFault::Dns));
        }
        // One bad address condemns the name: which of them a receiver would be reached at is not left to chance.
        if !self.rules.allow_private_networks && !addresses.iter().all(|address| is_public(address.ip())) {
            return Err(NoConnection(AttemptFault::AddressNotAllowed));
        }
        let mut last = io::Error::from(io::ErrorKind::AddrNotAvailable);
        for address in addresses {
            match TcpStream::connect(address).await {
                Ok(stream) => {
                    // A connection without it works too, only slower.
                    let _ = stream.set_nodelay(true);
                    return Ok(stream);
                }
                Err(error) => last = error,
            }
        }
        tracing::debug!(error = %last, "nobody accepts the connection of a delivery");
        Err(NoConnection(AttemptFault::Connect))
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = NoConnection;
    type Future = BoxFuture<'static, Result<Self::Response, NoConnection>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), NoConnection>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let this = *self;
        Box::pin(async move { Ok(TokioIo::new(this.dial(uri).await?)) })
    }
}
