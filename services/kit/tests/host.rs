//! Listeners over real sockets: handshakes, what is done at a time, and the end.

use std::{fs, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use paperkey_kit::{
    clock::Clock,
    config,
    host::{self, Door, GrpcHost},
    policy::Guarded,
    principal::Signer,
    ready::Readiness,
    secrets::Keyring,
    service::Rpcs,
    shed::{Errand, Places, RETRY_AFTER},
    shutdown::{self, Shutdown, ShutdownHandle},
    tls::Tls,
};
use paperkey_proto::{
    Error,
    catalog::v1::{ListProductsRequest, catalog_service_client::CatalogServiceClient},
    errors::v1::Reason,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject as _},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{Notify, Semaphore},
    task::JoinHandle,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::Status;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

const GENEROUS: Duration = Duration::from_mins(1);

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pem: String,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { issuer: Issuer::new(params, key), pem }
    }

    fn pair(&self) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    /// A caller who believes this authority, and shows a certificate or none.
    fn caller(&self, shows: Option<&(String, String)>) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.pem.as_bytes()).unwrap()).unwrap();
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let mut config = match shows {
            Some((cert, key)) => {
                let chain = vec![CertificateDer::from_pem_slice(cert.as_bytes()).unwrap()];
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap()).unwrap()
            }
            None => builder.with_no_client_auth(),
        };
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Arc::new(config)
    }
}

/// A listener that answers when it is let.
struct House {
    at: SocketAddr,
    tls: Option<Tls>,
    folder: TempDir,
    /// Calls that have arrived.
    arrived: Arc<Semaphore>,
    /// Lets those go on that ask for `/slow`.
    go: Arc<Notify>,
    leave: ShutdownHandle,
    end: ShutdownHandle,
    ended: JoinHandle<()>,
}

impl House {
    async fn plain() -> Self {
        Self::new(None, false).await
    }

    async fn new(authority: Option<&Authority>, peers: bool) -> Self {
        let folder = TempDir::with_prefix("paperkey-host-").unwrap();
        let ((leave, leaving), (end, shutdown)) = (shutdown::channel(), shutdown::channel());
        let tls = authority.map(|authority| {
            write_pair(&folder, &authority.pair());
            fs::write(folder.path().join("ca.crt"), &authority.pem).unwrap();
            let path = |name: &str| Some(folder.path().join(name));
            let (cert, key, client_ca) = (path("tls.crt"), path("tls.key"), path("ca.crt"));
            let files = config::Tls { cert, key, client_ca, ..config::Tls::default() };
            let tls = Tls::load(&files, Clock::system()).unwrap();
            tokio::spawn(tls.clone().follow(shutdown.clone()));
            tls
        });
        let (arrived, go) = (Arc::new(Semaphore::new(0)), Arc::new(Notify::new()));
        let handle = {
            let (arrived, go) = (Arc::clone(&arrived), Arc::clone(&go));
            move |request: Request<Incoming>, _: SocketAddr| {
                let (arrived, go) = (Arc::clone(&arrived), Arc::clone(&go));
                async move {
                    arrived.add_permits(1);
                    if request.uri().path() == "/slow" {
                        go.notified().await;
                    }
                    Response::new(Full::new(Bytes::from_static(b"done")))
                }
            }
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let shown = tls.as_ref().and_then(|tls| tls.for_listener(peers));
        let door = Door::from(listener).with_tls(shown).leaving_at(leaving);
        let ended = tokio::spawn(host::serve(door, handle, shutdown, GENEROUS));
        Self { at, tls, folder, arrived, go, leave, end, ended }
    }

    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.at).await.unwrap()
    }

    async fn shake_hands(&self, config: &Arc<ClientConfig>) -> std::io::Result<TlsStream<TcpStream>> {
        let name = ServerName::try_from("localhost").unwrap();
        TlsConnector::from(Arc::clone(config)).connect(name, self.connect().await).await
    }

    /// Waits until as many calls have arrived.
    async fn has_heard(&self, calls: u32) {
        self.arrived.acquire_many(calls).await.unwrap().forget();
    }

    async fn ended(self) {
        tokio::time::timeout(GENEROUS, self.ended).await.expect("it ends").unwrap();
    }
}

fn write_pair(folder: &TempDir, (cert, key): &(String, String)) {
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    fs::write(path("tls.crt"), cert).unwrap();
    fs::write(path("tls.key"), key).unwrap();
}

async fn speak_http1<S>(stream: S) -> http1::SendRequest<Empty<Bytes>>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn get(path: &str) -> Request<Empty<Bytes>> {
    Request::get(path).header("host", "localhost").body(Empty::new()).unwrap()
}

/// Asks until it is so.
async fn eventually<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    let asking = async {
        while !ask().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(GENEROUS, asking).await.unwrap_or_else(|_| panic!("{what}: not so"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_is_seen_by_the_next_handshake_and_old_connections_live_on() {
    let authority = Authority::new();
    let house = House::new(Some(&authority), false).await;
    let caller = authority.caller(None);
    let shown = |stream: &TlsStream<TcpStream>| stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned();
    let old = house.shake_hands(&caller).await.unwrap();
    let first = shown(&old);
    let mut old = speak_http1(old).await;
    assert_eq!(old.send_request(get("/")).await.unwrap().status(), StatusCode::OK);
    write_pair(&house.folder, &authority.pair());
    eventually("the new certificate is shown", || async { shown(&house.shake_hands(&caller).await.unwrap()) != first })
        .await;
    assert_eq!(old.send_request(get("/")).await.unwrap().status(), StatusCode::OK);
    assert_eq!(house.tls.as_ref().unwrap().shown().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn among_processes_only_who_shows_a_certificate_of_the_installation_is_heard() {
    let (authority, foreign) = (Authority::new(), Authority::new());
    let house = House::new(Some(&authority), true).await;
    for stranger in [None, Some(foreign.pair())] {
        // With TLS 1.3 the caller believes itself connected until it is told otherwise.
        let told = async {
            let mut stream = house.shake_hands(&authority.caller(stranger.as_ref())).await?;
            stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await?;
            stream.read_u8().await
        };
        assert!(told.await.is_err());
    }
    assert_eq!(house.arrived.available_permits(), 0);
    let stream = house.shake_hands(&authority.caller(Some(&authority.pair()))).await.unwrap();
    assert_eq!(speak_http1(stream).await.send_request(get("/")).await.unwrap().status(), StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread")]
async fn handshakes_that_never_end_hold_nobody_up() {
    let authority = Authority::new();
    let house = House::new(Some(&authority), false).await;
    let mut silent = Vec::new();
    for _ in 0..50 {
        let mut stream = house.connect().await;
        stream.write_all(&[0x16, 3, 1]).await.unwrap();
        silent.push(stream);
    }
    let stream = house.shake_hands(&authority.caller(None)).await.unwrap();
    assert_eq!(speak_http1(stream).await.send_request(get("/")).await.unwrap().status(), StatusCode::OK);
    drop(silent);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_speaks_plain_http_to_a_port_for_tls_is_told_so() {
    let house = House::new(Some(&Authority::new()), false).await;
    let mut stream = house.connect().await;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
    let mut said = String::new();
    stream.read_to_string(&mut said).await.unwrap();
    assert!(said.starts_with("HTTP/1.1 400 ") && said.contains("HTTPS"), "{said}");
    let (head, body) = said.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_in_flight_over_http1_are_finished_and_their_connections_closed() {
    let house = House::plain().await;
    let mut busy = speak_http1(house.connect().await).await;
    let answer = tokio::spawn(async move { busy.send_request(get("/slow")).await });
    house.has_heard(1).await;
    house.end.shut_down();
    eventually("nobody new is let in", || async { TcpStream::connect(house.at).await.is_err() }).await;
    assert!(!house.ended.is_finished());
    house.go.notify_one();
    let answer = answer.await.unwrap().unwrap();
    assert_eq!(answer.headers()["connection"], "close");
    assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "done");
    house.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_in_flight_over_http2_are_finished() {
    let house = House::plain().await;
    let stream = TokioIo::new(house.connect().await);
    let (sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    let connection = tokio::spawn(connection);
    let url = format!("http://{}/slow", house.at);
    let calls: Vec<_> = (0..20)
        .map(|_| {
            let (mut sender, url) = (sender.clone(), url.clone());
            tokio::spawn(async move {
                let answer = sender.send_request(get(&url)).await.unwrap();
                answer.into_body().collect().await.unwrap().to_bytes()
            })
        })
        .collect();
    house.has_heard(20).await;
    house.end.shut_down();
    eventually("nobody new is let in", || async { TcpStream::connect(house.at).await.is_err() }).await;
    // Whoever was not waiting yet is let go by the next round.
    let go = Arc::clone(&house.go);
    let letting = tokio::spawn(async move {
        loop {
            go.notify_waiters();
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    for call in calls {
        assert_eq!(call.await.unwrap(), "done");
    }
    letting.abort();
    house.ended().await;
    // The connection ends by itself, as one that was closed in order.
    drop(sender);
    connection.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_was_let_in_by_the_kernel_before_the_end_is_still_answered() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let mut queued = Vec::new();
    for _ in 0..8 {
        let mut stream = TcpStream::connect(at).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await.unwrap();
        queued.push(stream);
    }
    let (sender, connection) =
        http2::handshake(TokioExecutor::new(), TokioIo::new(TcpStream::connect(at).await.unwrap())).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut asking = sender.clone();
    let url = format!("http://{at}/");
    let asked = tokio::spawn(async move { asking.send_request(get(&url)).await });
    let (end, shutdown) = shutdown::channel();
    end.shut_down();
    let handle = |_, _| async { Response::new(Full::new(Bytes::from_static(b"done"))) };
    let ended = tokio::spawn(host::serve(listener, handle, shutdown, GENEROUS));
    for mut stream in queued {
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        assert!(said.starts_with("HTTP/1.1 200 ") && said.contains("connection: close"), "{said}");
    }
    assert_eq!(asked.await.unwrap().unwrap().status(), StatusCode::OK);
    drop(sender);
    connection.await.unwrap().unwrap();
    tokio::time::timeout(GENEROUS, ended).await.expect("it ends").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_never_says_anything_does_not_hold_up_the_end() {
    let house = House::plain().await;
    let mut silent = house.connect().await;
    // Nor does it make a difference to begin as HTTP/2 does.
    let mut hesitant = house.connect().await;
    hesitant.write_all(b"PRI * HT").await.unwrap();
    speak_http1(house.connect().await).await.send_request(get("/")).await.unwrap();
    house.end.shut_down();
    house.ended().await;
    for stream in [&mut silent, &mut hesitant] {
        assert!(matches!(stream.read(&mut [0]).await, Ok(0) | Err(_)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn while_it_leaves_it_takes_calls_and_asks_for_other_connections() {
    let house = House::plain().await;
    let mut kept = speak_http1(house.connect().await).await;
    let answer = kept.send_request(get("/")).await.unwrap();
    assert!(!answer.headers().contains_key("connection"));
    answer.into_body().collect().await.unwrap();
    house.leave.shut_down();
    let answer = kept.send_request(get("/")).await.unwrap();
    assert_eq!((answer.status(), &answer.headers()["connection"]), (StatusCode::OK, &"close".parse().unwrap()));
    let answer = speak_http1(house.connect().await).await.send_request(get("/")).await.unwrap();
    assert_eq!((answer.status(), &answer.headers()["connection"]), (StatusCode::OK, &"close".parse().unwrap()));
}

/// The gRPC listener of a service that has no rpcs, as far as it answers without any.
async fn grpc(places: Places, readiness: impl FnOnce(Shutdown) -> Readiness) -> (SocketAddr, ShutdownHandle) {
    let clock = Clock::system();
    let signer = Signer::new(&Keyring::for_tests(), clock.clone());
    let guarded = Guarded::new(Rpcs::default(), signer, clock, None, None);
    let (service, health) = GrpcHost::new("catalog", guarded, places);
    let (leave, leaving) = shutdown::channel();
    // It never ends before its test.
    let (end, shutdown) = shutdown::channel();
    tokio::spawn(health.follow(readiness(leaving), shutdown.clone()));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let handle = move |request, peer| {
        let service = service.clone();
        async move { service.handle(request, peer).await }
    };
    tokio::spawn(async move {
        let _end = end;
        host::serve(listener, handle, shutdown, GENEROUS).await;
    });
    (at, leave)
}

async fn list(at: SocketAddr) -> Status {
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{at}")).unwrap().connect().await.unwrap();
    let answer = CatalogServiceClient::new(channel).list_products(ListProductsRequest::default()).await;
    answer.expect_err("nobody in particular has asked")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_with_too_much_to_do_refuses_at_once_and_still_tells_its_health() {
    let places = Places::new(1);
    let (at, _leave) = grpc(places.clone(), |leaving| Readiness::new(|| async { Ok(()) }, leaving)).await;
    let reason = |status: Status| {
        let error = Error::from_status(&status);
        (error.reason(), error.retry_after())
    };
    let held = places.take(Errand::Call).unwrap();
    assert_eq!(reason(list(at).await), (Reason::Unavailable, Some(RETRY_AFTER)));
    assert_eq!(places.load().shed_calls, 1);
    eventually("it serves", || async { health(at, "").await == Ok(ServingStatus::Serving) }).await;
    drop(held);
    assert_eq!(reason(list(at).await), (Reason::InvalidCredentials, None));
    eventually("the place is free again", || async { places.load().calls == 0 }).await;
}

async fn health(at: SocketAddr, service: &str) -> Result<ServingStatus, tonic::Code> {
    let channel = tonic::transport::Endpoint::from_shared(format!("http://{at}")).unwrap().connect().await.unwrap();
    let request = HealthCheckRequest { service: service.to_owned() };
    let answer = HealthClient::new(channel).check(request).await.map_err(|status| status.code())?;
    Ok(answer.into_inner().status())
}

#[tokio::test(flavor = "multi_thread")]
async fn health_over_grpc_follows_readiness_and_says_at_once_that_it_leaves() {
    let up = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let asked = Arc::clone(&up);
    let check = move || {
        let up = asked.load(std::sync::atomic::Ordering::SeqCst);
        async move { if up { Ok(()) } else { Err("the database is gone".to_owned()) } }
    };
    let (at, leave) = grpc(Places::new(8), |leaving| Readiness::new(check, leaving)).await;
    let names = ["", "paperkey.catalog.v1.CatalogService"];
    let all = async |wanted: ServingStatus| {
        for name in names {
            eventually(name, || async { health(at, name).await == Ok(wanted) }).await;
        }
    };
    all(ServingStatus::Serving).await;
    assert_eq!(health(at, "paperkey.auth.v1.AuthService").await, Err(tonic::Code::NotFound));
    up.store(false, std::sync::atomic::Ordering::SeqCst);
    all(ServingStatus::NotServing).await;
    up.store(true, std::sync::atomic::Ordering::SeqCst);
    all(ServingStatus::Serving).await;
    leave.shut_down();
    all(ServingStatus::NotServing).await;
}

#[tokio::test]
async fn what_does_not_answer_in_time_is_not_ready() {
    let (_leave, leaving) = shutdown::channel();
    let stuck = Readiness::new(std::future::pending::<Result<(), String>>, leaving);
    assert!(stuck.judge().await.unwrap_err().contains("does not answer in time"));
}
