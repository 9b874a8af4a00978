//! Receivers on sockets of this machine: with and without encryption, and such as know no manners.

use std::{
    convert::Infallible,
    future::Future,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, Version};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::TlsAcceptor;

pub(super) type Answer = Response<BoxBody<Bytes, Infallible>>;

/// An answer with that status and body.
pub(super) fn answer(status: u16, body: impl Into<Bytes>) -> Answer {
    let mut response = Response::new(Full::new(body.into()).boxed());
    *response.status_mut() = status.try_into().expect("it is a status");
    response
}

/// What a receiver was asked.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    pub(super) version: Version,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

/// A receiver. It notes every connection, whatever becomes of it.
pub(super) struct Receiver {
    pub(super) address: SocketAddr,
    connections: Arc<AtomicUsize>,
    asked: Arc<Mutex<Vec<Asked>>>,
    serving: JoinHandle<()>,
}

impl Receiver {
    /// Answers by a function of the number of the request, encrypted where there is a certificate.
    pub(super) async fn serve<F, Fut>(tls: Option<ServerConfig>, answers: F) -> Self
    where
        F: Fn(usize) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Answer> + Send + 'static,
    {
        let asked = Arc::<Mutex<Vec<Asked>>>::default();
        let (noted, answers) = (Arc::clone(&asked), Arc::new(answers));
        let acceptor = tls.map(|config| TlsAcceptor::from(Arc::new(config)));
        let serve = move |stream: TcpStream, _| {
            let (noted, answers, acceptor) = (Arc::clone(&noted), Arc::clone(&answers), acceptor.clone());
            async move {
                let service = service_fn(move |request: Request<Incoming>| {
                    let (noted, answers) = (Arc::clone(&noted), Arc::clone(&answers));
                    async move {
                        let (parts, body) = request.into_parts();
                        let body = body.collect().await?.to_bytes();
                        let number = {
                            let mut noted = noted.lock().expect("nobody panics");
                            noted.push(Asked { version: parts.version, headers: parts.headers, body });
                            noted.len() - 1
                        };
                        Ok::<_, hyper::Error>(answers(number).await)
                    }
                });
                let builder = auto::Builder::new(TokioExecutor::new());
                // Whoever goes away in the middle is what some tests are about.
                match acceptor {
                    Some(acceptor) => {
                        let Ok(stream) = acceptor.accept(stream).await else { return };
                        let _ = builder.serve_connection(TokioIo::new(stream), service).await;
                    }
                    None => drop(builder.serve_connection(TokioIo::new(stream), service).await),
                }
            }
        };
        Self::listen(asked, serve).await
    }

    /// Answers everything with one status.
    pub(super) async fn plain(status: u16) -> Self {
        Self::serve(None, move |_| async move { answer(status, "said") }).await
    }

    /// Leaves each connection, by its number, to a function.
    pub(super) async fn raw<F, Fut>(serve: F) -> Self
    where
        F: Fn(TcpStream, usize) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        Self::listen(Arc::default(), serve).await
    }

    async fn listen<F, Fut>(asked: Arc<Mutex<Vec<Asked>>>, serve: F) -> Self
    where
        F: Fn(TcpStream, usize) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let connections = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&connections);
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let number = counted.fetch_add(1, Ordering::SeqCst);
                tokio::spawn(serve(stream, number));
            }
        });
        Self { address, connections, asked, serving }
    }

    pub(super) fn port(&self) -> u16 {
        self.address.port()
    }

    /// How many connections there were.
    pub(super) fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    pub(super) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().expect("nobody panics").clone()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// Reads the head of a request and its body, which is as long as the head says.
pub(super) async fn read_request(stream: &mut TcpStream) -> Option<()> {
    let mut read = Vec::new();
    let mut buffer = [0; 4_096];
    loop {
        let length = stream.read(&mut buffer).await.ok().filter(|length| *length > 0)?;
        read.extend(&buffer[..length]);
        let text = String::from_utf8_lossy(&read).to_ascii_lowercase();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let declared = head.split_once("content-length: ")?.1.split("\r\n").next()?.parse::<usize>().ok()?;
        if body.len() >= declared {
            return Some(());
        }
    }
}

/// Says some bytes to whoever has asked.
pub(super) async fn say(stream: &mut TcpStream, bytes: impl AsRef<[u8]>) {
    let _ = stream.write_all(bytes.as_ref()).await;
    let _ = stream.flush().await;
}

/// An authority that issues certificates.
pub(super) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(super) pem: String,
}

impl Authority {
    pub(super) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::<String>::new()).expect("no names are good names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("there is chance");
        let pem = params.self_signed(&key).expect("it is signed").pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    /// A receiver's side of the encryption, for a name or an address.
    pub(super) fn certified(&self, name: &str) -> ServerConfig {
        self.issued(&CertificateParams::new(vec![name.to_owned()]).expect("it is a name"))
    }

    /// The same with a certificate whose time is over.
    pub(super) fn expired(&self, name: &str) -> ServerConfig {
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("it is a name");
        params.not_after = rcgen::date_time_ymd(2020, 1, 1);
        self.issued(&params)
    }

    fn issued(&self, params: &CertificateParams) -> ServerConfig {
        let key = KeyPair::generate().expect("there is chance");
        let certificate = params.signed_by(&key, &self.issuer).expect("it is signed");
        server_config(certificate.der().clone(), &key)
    }
}

/// With a certificate that nobody has issued but itself.
pub(super) fn self_signed(name: &str) -> ServerConfig {
    let key = KeyPair::generate().expect("there is chance");
    let params = CertificateParams::new(vec![name.to_owned()]).expect("it is a name");
    let certificate = params.self_signed(&key).expect("it is signed");
    server_config(certificate.der().clone(), &key)
}

fn server_config(certificate: CertificateDer<'static>, key: &KeyPair) -> ServerConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = PrivateKeyDer::try_from(key.serialize_der()).expect("it is a key");
    ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|config| config.with_no_client_auth().with_single_cert(vec![certificate], key))
        .expect("they fit")
}

/// Offers these versions of HTTP.
pub(super) fn offering(mut config: ServerConfig, versions: &[&str]) -> ServerConfig {
    config.alpn_protocols = versions.iter().map(|version| version.as_bytes().to_vec()).collect();
    config
}

/// An address of a test, as any other would be.
pub(super) const PUBLIC: IpAddr = IpAddr::V4(Ipv4Addr::new(93, 184, 215, 14));
