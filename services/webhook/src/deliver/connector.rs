//! Opens connections, to judged addresses only.
//!
//! A name is resolved once for a connection. Every address that it resolves to is judged, and exactly one of these
//! is dialled, so that no second look-up can answer otherwise. A connection that is kept for the next delivery was
//! judged when it was opened. Proxies of the environment are not known here.

use std::{
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::net::{TcpStream, lookup_host};
use tower::Service;

use crate::domain::{address::is_public, attempt::AttemptFault, endpoint::UrlRules};

/// Addresses of a name that are tried at most.
const MAX_ADDRESSES: usize = 8;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.word())]
pub(crate) struct NoConnection(pub(crate) AttemptFault);

/// Opens connections to what the rules allow.
#[derive(Clone, Debug)]
pub(crate) struct Connector {
    rules: UrlRules,
    timeout: Duration,
}

impl Connector {
    pub(crate) fn new(rules: UrlRules, timeout: Duration) -> Self {
        Self { rules, timeout }
    }

    async fn connect(self, uri: Uri) -> Result<TokioIo<TcpStream>, NoConnection> {
        // Bounded here as well: a connection that nobody waits for any more must not be sought for ever.
        let opened = tokio::time::timeout(self.timeout, self.open(&uri)).await;
        opened.unwrap_or(Err(NoConnection(AttemptFault::Timeout)))
    }

    async fn open(&self, uri: &Uri) -> Result<TokioIo<TcpStream>, NoConnection> {
        let target = self.rules.read(&uri.to_string()).map_err(|_| NoConnection(AttemptFault::AddressNotAllowed))?;
        let addresses = self.resolve(&target.host, target.port).await?;
        // The last address may use all the time that is left, the ones before it must leave some.
        let share = self.timeout / u32::try_from(addresses.len() + 1).unwrap_or(u32::MAX);
        let last = addresses.len() - 1;
        for (position, address) in addresses.into_iter().enumerate() {
            let connecting = TcpStream::connect(address);
            let connected = if position == last {
                connecting.await
            } else {
                let slow = |_| Err(io::ErrorKind::TimedOut.into());
                tokio::time::timeout(share, connecting).await.unwrap_or_else(slow)
            };
            if let Ok(stream) = connected {
                // Without it a delivery is only slower.
                let _ = stream.set_nodelay(true);
                return Ok(TokioIo::new(stream));
            }
        }
        Err(NoConnection(AttemptFault::Connect))
    }

    /// All addresses of a host; never none. If one of them is not allowed, the host is not.
    async fn resolve(&self, host: &str, port: u16) -> Result<Vec<SocketAddr>, NoConnection> {
        let addresses: Vec<SocketAddr> = match host.parse::<IpAddr>() {
            Ok(address) => vec![SocketAddr::new(address, port)],
            Err(_) => lookup_host((host, port)).await.map_err(|_| NoConnection(AttemptFault::Dns))?.collect(),
        };
        if addresses.is_empty() {
            return Err(NoConnection(AttemptFault::Dns));
        }
        let allowed = |address: &SocketAddr| self.rules.allow_private_networks || is_public(address.ip());
        if !addresses.iter().all(allowed) {
            return Err(NoConnection(AttemptFault::AddressNotAllowed));
        }
        Ok(addresses.into_iter().take(MAX_ADDRESSES).collect())
    }
}

impl Service<Uri> for Connector {
    type Response = TokioIo<TcpStream>;
    type Error = NoConnection;
    type Future = Pin<Box<dyn Future<Output = Result<TokioIo<TcpStream>, NoConnection>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), NoConnection>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        Box::pin(self.clone().connect(uri))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRICT: UrlRules = UrlRules { allow_http: true, allow_private_networks: false };
    const LAX: UrlRules = UrlRules { allow_http: true, allow_private_networks: true };

    #[tokio::test]
    async fn a_name_that_resolves_to_a_private_address_is_not_dialled() {
        let connector = Connector::new(STRICT, Duration::from_secs(5));
        let refused = connector.resolve("localhost", 80).await.unwrap_err();
        assert_eq!(refused.0, AttemptFault::AddressNotAllowed);
        let refused = connector.resolve("127.0.0.1", 80).await.unwrap_err();
        assert_eq!(refused.0, AttemptFault::AddressNotAllowed);
        let lax = Connector::new(LAX, Duration::from_secs(5));
        assert!(!lax.resolve("localhost", 80).await.unwrap().is_empty());
    }

    #[tokio::test]
    async fn a_name_that_does_not_exist_is_a_fault_of_names() {
        let connector = Connector::new(STRICT, Duration::from_secs(30));
        let refused = connector.resolve("does-not-exist.invalid", 443).await.unwrap_err();
        assert_eq!(refused.0, AttemptFault::Dns);
    }
}
