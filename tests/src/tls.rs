//! Certificates for a test, and a caller who looks at what is shown.

use std::{fs, io, net::SocketAddr, path::Path, sync::Arc};

use bytes::Bytes;
use http::{Method, Request};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::{api::Answer, wait::GENEROUS};

/// An authority that issues certificates for this machine.
#[derive(Debug)]
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

/// A certificate and its key, as PEM.
#[derive(Clone, Debug)]
pub struct Pair {
    cert: String,
    key: String,
}

impl Authority {
    /// A new one.
    ///
    /// # Panics
    ///
    /// If there is no chance to make a key from.
    #[expect(clippy::new_without_default, reason = "each is another one")]
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).expect("no names are good names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("there is chance");
        let pem = params.self_signed(&key).expect("it is signed").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A certificate for 127.0.0.1.
    ///
    /// # Panics
    ///
    /// If there is no chance to make a key from.
    pub fn issue(&self) -> Pair {
        let key = KeyPair::generate().expect("there is chance");
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned()]).expect("it is an address");
        let cert = params.signed_by(&key, &self.issuer).expect("it is signed");
        Pair { cert: cert.pem(), key: key.serialize_pem() }
    }

    /// Writes its own certificate to a file.
    ///
    /// # Panics
    ///
    /// If that fails.
    pub fn write(&self, path: &Path) {
        fs::write(path, &self.pem).expect("its folder is there");
    }

    /// A caller who believes this authority, and shows a certificate or none.
    ///
    /// # Panics
    ///
    /// If the certificate is none.
    pub fn caller(&self, shows: Option<&Pair>) -> Caller {
        let mut roots = RootCertStore::empty();
        roots.add(parsed(&self.pem)).expect("it is a certificate");
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .expect("there are some")
            .with_root_certificates(roots);
        let config = match shows {
            Some(Pair { cert, key }) => {
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("it is a key");
                builder.with_client_auth_cert(vec![parsed(cert)], key).expect("they fit")
            }
            None => builder.with_no_client_auth(),
        };
        Caller(Arc::new(config))
    }
}

impl Pair {
    /// Writes both to files.
    ///
    /// # Panics
    ///
    /// If that fails.
    pub fn write(&self, cert: &Path, key: &Path) {
        fs::write(cert, &self.cert).expect("its folder is there");
        fs::write(key, &self.key).expect("its folder is there");
    }

    /// The certificate, as handshakes show it.
    pub fn der(&self) -> CertificateDer<'static> {
        parsed(&self.cert)
    }
}

fn parsed(pem: &str) -> CertificateDer<'static> {
    CertificateDer::from_pem_slice(pem.as_bytes()).expect("it is a certificate")
}

/// A caller over HTTPS.
#[derive(Clone, Debug)]
pub struct Caller(Arc<ClientConfig>);

impl Caller {
    /// Sends one request on a connection of its own: the answer, and the certificate that was shown.
    pub async fn call(
        &self,
        at: SocketAddr,
        verb: Method,
        path: &str,
        json: Option<&Value>,
    ) -> io::Result<(Answer, CertificateDer<'static>)> {
        let called = async {
            let stream = TcpStream::connect(at).await?;
            let stream = TlsConnector::from(Arc::clone(&self.0)).connect(ServerName::from(at.ip()), stream).await?;
            let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first).cloned();
            let shown = shown.ok_or_else(|| io::Error::other("nothing was shown"))?;
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
            tokio::spawn(connection);
            let body = json.map(Value::to_string).unwrap_or_default();
            let request = Request::builder()
                .method(verb.clone())
                .uri(path)
                .header("host", at.to_string())
                .header("content-type", "application/json")
                .body(Full::new(Bytes::from(body)))
                .map_err(io::Error::other)?;
            let (head, body) = sender.send_request(request).await.map_err(io::Error::other)?.into_parts();
            let body = body.collect().await.map_err(io::Error::other)?.to_bytes();
            Ok((Answer::new(format!("{verb} {path}"), path, head.status, head.headers, body), shown.into_owned()))
        };
        tokio::time::timeout(GENEROUS, called).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}
