//! Encrypted connections: whose certificates are trusted, and which version of HTTP is spoken.

use std::{
    error::Error as StdError,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::Uri;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder, MaybeHttpsStream};
use paperkey_proto::{Error, errors::v1::Reason};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, pem::PemObject as _},
};
use tower::Service;

use super::connector::{Connector, Dial, NoConnection, Tcp, Wire};
use crate::domain::attempt::AttemptFault;

type BoxError = Box<dyn StdError + Send + Sync>;

/// Opens connections, encrypted where the scheme says so, in the time that a whole exchange may take: nobody may wait
/// any more for one that is being opened, and it must not be sought for ever.
///
/// Trusted are the public authorities and, if there are any, those that the configuration adds.
pub(super) struct Wires<D = Tcp>(Arc<Shared<D>>);

struct Shared<D> {
    connector: HttpsConnector<Connector<D>>,
    timeout: Duration,
}

/// Every request has one of its own.
impl<D> Clone for Wires<D> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<D: Dial> Wires<D> {
    /// `extra_ca` are certificates in PEM.
    pub(super) fn new(connector: &Connector<D>, extra_ca: Option<&[u8]>, timeout: Duration) -> Result<Self, Error> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        // TLS 1.2 and 1.3.
        let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
        let config = config.map_err(Error::internal)?.with_root_certificates(roots(extra_ca)?).with_no_client_auth();
        // Plain http is refused by the rules, where it is. HTTP/2 is spoken with those that choose it.
        let builder = HttpsConnectorBuilder::new().with_tls_config(config).https_or_http();
        let connector = builder.enable_http1().enable_http2().wrap_connector(connector.clone());
        Ok(Self(Arc::new(Shared { connector, timeout })))
    }
}

impl<D: Dial> Service<Uri> for Wires<D> {
    type Response = MaybeHttpsStream<Wire>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<MaybeHttpsStream<Wire>, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let shared = Arc::clone(&self.0);
        Box::pin(async move {
            let late = |_| Err(NoConnection(AttemptFault::Timeout).into());
            tokio::time::timeout(shared.timeout, shared.connector.clone().call(uri)).await.unwrap_or_else(late)
        })
    }
}

fn roots(extra_ca: Option<&[u8]>) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    let Some(pem) = extra_ca else { return Ok(roots) };
    let refuse = |why: String| Error::new(Reason::Internal).with_message(why);
    let public = roots.len();
    for certificate in CertificateDer::pem_slice_iter(pem) {
        let certificate = certificate.map_err(|error| refuse(format!("webhooks.ca_file is not PEM: {error}")))?;
        roots
            .add(certificate)
            .map_err(|error| refuse(format!("webhooks.ca_file holds what is no certificate: {error}")))?;
    }
    if roots.len() == public {
        return Err(refuse("webhooks.ca_file holds no certificate: it must be one or more in PEM".to_owned()));
    }
    Ok(roots)
}

/// What lies beneath an error, however it was wrapped.
pub(super) fn find<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    if let Some(found) = error.downcast_ref() {
        return Some(found);
    }
    // An error of input and output hides what it is made of from `source`.
    let inside = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    inside.and_then(|inside| find(inside as &(dyn StdError + 'static))).or_else(|| error.source().and_then(find))
}
