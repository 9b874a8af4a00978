//! The way to other processes, over real sockets: shared, balanced, mended. Each server here is a runtime of its own on a
//! thread of its own, so that it can die, stop and go on like a process.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    task::{Context, Poll},
    thread,
    time::{Duration, Instant},
};

use futures_util::future::BoxFuture;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use paperkey_kit::{
    channel::{Channel, ChannelStats, ClientTls, Exchange, Resolver, ServiceChannel},
    clock::Clock,
    host,
    policy::Guarded,
    principal::{Caller, Signer},
    secrets::Keyring,
    service::Rpcs,
    shutdown::{self, ShutdownHandle},
};
use paperkey_proto::{
    Error,
    catalog::v1::{
        Client, CreateClientRequest, CreateClientResponse, DeleteClientRequest, DeleteClientResponse, GetClientRequest,
        GetClientResponse, ListClientsRequest, ListClientsResponse, UpdateClientRequest, UpdateClientResponse,
        client_service_client::ClientServiceClient,
        client_service_server::{ClientService, ClientServiceServer},
    },
    options::v1::Caller as Kind,
    principal::v1::{Mode, Principal, Role},
};
use parking_lot::Mutex;
use rustls::{ClientConfig, RootCertStore, ServerConfig, pki_types::PrivateKeyDer};
use tokio::{net::TcpListener, sync::oneshot, task::JoinSet};
use tonic::{
    Code, Request, Response, Status,
    body::Body,
    codegen::{Service, http},
};

const SOON: Duration = Duration::from_secs(20);

/// What the servers of a test have done, by the id of each call.
type Done = Arc<Mutex<HashMap<String, u32>>>;

/// What the tests call. The id of a call says what is to happen.
#[derive(Clone)]
struct Clients {
    name: &'static str,
    done: Done,
    calls: Arc<AtomicUsize>,
    /// Whom calls whose id begins with "next" ask further, and what was left for that.
    next: Option<Channel>,
    left: Arc<Mutex<Vec<Duration>>>,
}

impl Clients {
    async fn act<T>(&self, request: &Request<T>, id: &str) -> Result<(), Status> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        *self.done.lock().entry(id.to_owned()).or_default() += 1;
        if let Some(left) = request.metadata().get("grpc-timeout") {
            let micros = left.to_str().unwrap().strip_suffix('u').expect("ours are in microseconds").parse().unwrap();
            self.left.lock().push(Duration::from_micros(micros));
        }
        match id.split('-').next() {
            Some("down") => Err(Error::unavailable("it is down").into()),
            Some("full") if self.name == "first" => {
                let mut refused = Status::from(Error::unavailable("full").with_retry_after(Duration::from_secs(1)));
                refused.metadata_mut().insert("paperkey-shed", "1".parse().unwrap());
                Err(refused)
            }
            Some("never") => std::future::pending().await,
            Some("next") => {
                tokio::time::sleep(Duration::from_millis(100)).await;
                let caller = Caller::of(request)?;
                let way = self.next.as_ref().unwrap().as_service("test", signer(), None).serving(&caller);
                let id = id.trim_start_matches("next-").to_owned();
                ClientServiceClient::new(way).get_client(GetClientRequest { id }).await.map(drop)
            }
            _ => {
                tokio::time::sleep(Duration::from_millis(5)).await;
                Ok(())
            }
        }
    }
}

#[tonic::async_trait]
impl ClientService for Clients {
    async fn get_client(&self, request: Request<GetClientRequest>) -> Result<Response<GetClientResponse>, Status> {
        let id = request.get_ref().id.clone();
        self.act(&request, &id).await?;
        let client = Client { id, name: self.name.to_owned(), ..Client::default() };
        Ok(Response::new(GetClientResponse { client: Some(client) }))
    }

    async fn delete_client(
        &self,
        request: Request<DeleteClientRequest>,
    ) -> Result<Response<DeleteClientResponse>, Status> {
        let id = request.get_ref().id.clone();
        self.act(&request, &id).await?;
        Ok(Response::new(DeleteClientResponse::default()))
    }

    async fn create_client(&self, _: Request<CreateClientRequest>) -> Result<Response<CreateClientResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn list_clients(&self, _: Request<ListClientsRequest>) -> Result<Response<ListClientsResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn update_client(&self, _: Request<UpdateClientRequest>) -> Result<Response<UpdateClientResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }
}

/// A process, as far as anybody can tell who calls it.
struct Server {
    address: SocketAddr,
    clients: Clients,
    runtime: tokio::runtime::Handle,
    drain: ShutdownHandle,
    kill: Option<oneshot::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Server {
    fn start(name: &'static str, done: &Done) -> Self {
        Self::run(name, done, None, None)
    }

    /// With a certificate that it shows, and another server that it asks.
    fn run(name: &'static str, done: &Done, tls: Option<ServerConfig>, next: Option<Channel>) -> Self {
        let (calls, left) = (Arc::default(), Arc::default());
        let clients = Clients { name, done: Arc::clone(done), calls, next, left };
        let (drain, shutdown) = shutdown::channel();
        let (kill, killed) = oneshot::channel();
        let (started, starting) = mpsc::channel();
        let guarded = guarded(clients.clone());
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async move {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                started.send((listener.local_addr().unwrap(), tokio::runtime::Handle::current())).unwrap();
                let serve: BoxFuture<'static, ()> = match tls {
                    None => Box::pin(host::serve(
                        listener,
                        move |request, _| {
                            let guarded = guarded.clone();
                            async move { guarded.call(request.map(Body::new)).await.unwrap() }
                        },
                        shutdown,
                        Duration::from_secs(10),
                    )),
                    Some(tls) => Box::pin(serve_encrypted(listener, Arc::new(tls), guarded)),
                };
                tokio::select! {
                    () = serve => {}
                    _ = killed => {}
                }
            });
        });
        let (address, runtime) = starting.recv().unwrap();
        Self { address, clients, runtime, drain, kill: Some(kill), thread: Some(thread) }
    }

    /// Like SIGKILL: whatever it was doing is not done, and its sockets are closed.
    fn kill(&mut self) {
        drop(self.kill.take());
        self.thread.take().unwrap().join().unwrap();
    }

    /// Like SIGSTOP, until what this returns is dropped.
    fn stop(&self) -> mpsc::Sender<()> {
        let (go_on, stopped) = mpsc::channel();
        self.runtime.spawn(async move { stopped.recv().unwrap_err() });
        go_on
    }

    fn calls(&self) -> usize {
        self.clients.calls.load(Ordering::SeqCst)
    }
}

async fn serve_encrypted(listener: TcpListener, tls: Arc<ServerConfig>, guarded: Guarded) {
    let acceptor = tokio_rustls::TlsAcceptor::from(tls);
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let Ok(stream) = acceptor.accept(stream).await else { continue };
        let guarded = guarded.clone();
        let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
            let guarded = guarded.clone();
            async move { guarded.call(request.map(Body::new)).await }
        });
        let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(TokioIo::new(stream), service);
        tokio::spawn(connection);
    }
}

fn signer() -> Signer {
    Signer::new(&Keyring::for_tests(), Clock::system())
}

fn guarded(clients: Clients) -> Guarded {
    Guarded::new(Rpcs::new(ClientServiceServer::new(clients)), signer(), Clock::system(), None, None)
}

fn client(channel: &Channel) -> ClientServiceClient<ServiceChannel> {
    ClientServiceClient::new(channel.as_service("test", signer(), None))
}

/// Calls as the gateway does in somebody's name.
#[derive(Clone)]
struct AsOwner(Channel);

impl Service<http::Request<Body>> for AsOwner {
    type Response = http::Response<Body>;
    type Error = Status;
    type Future = Exchange;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Exchange {
        let principal = Principal {
            kind: Kind::Account.into(),
            role: Role::Owner.into(),
            team_id: "team_1".to_owned(),
            mode: Mode::Live.into(),
            ..Principal::default()
        };
        let caller = Caller { principal: Arc::new(principal), request_id: "req_1".to_owned(), once: None };
        self.0.call_as(caller, &signer(), request)
    }
}

/// A host whose addresses are what the test says; none is a failure to look it up.
#[derive(Clone, Default)]
struct Names(Arc<Mutex<Vec<SocketAddr>>>);

impl Names {
    fn of(servers: &[&Server]) -> Self {
        let names = Self::default();
        names.become_those_of(servers);
        names
    }

    fn become_those_of(&self, servers: &[&Server]) {
        *self.0.lock() = servers.iter().map(|server| server.address).collect();
    }

    fn channel(&self) -> Channel {
        let names = self.clone();
        let resolver: Resolver = Arc::new(move |_, _| {
            let found = names.0.lock().clone();
            Box::pin(async move { if found.is_empty() { Err(io::Error::other("no such host")) } else { Ok(found) } })
        });
        Channel::connect_by("http://catalog:7002", None, resolver).unwrap()
    }
}

async fn within(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < until, "{what}: not in time");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn read(channel: &Channel, id: impl Into<String>) -> Result<String, Status> {
    let answer = client(channel).get_client(GetClientRequest { id: id.into() }).await?;
    Ok(answer.into_inner().client.unwrap_or_default().name)
}

async fn write(channel: &Channel, id: impl Into<String>) -> Result<(), Status> {
    let mut client = ClientServiceClient::new(AsOwner(channel.clone()));
    client.delete_client(DeleteClientRequest { id: id.into() }).await.map(drop)
}

fn stats(channel: &Channel) -> ChannelStats {
    channel.stats().unwrap()
}

/// Until both are connected to.
async fn connected(channel: &Channel, addresses: u64) {
    let _ = read(channel, "first").await;
    within("all are connected to", || stats(channel).connected == addresses).await;
}

/// The id of a call, whether it writes, and what became of it.
type Made = (String, bool, Result<(), Status>);

/// What came of the calls of a load.
struct Load {
    tasks: JoinSet<Vec<Made>>,
    begun: Arc<AtomicUsize>,
}

impl Load {
    const WORKERS: usize = 16;

    /// So many reading and as many writing callers, one call after the other.
    fn start(channel: &Channel, calls: usize) -> Self {
        let begun = Arc::new(AtomicUsize::new(0));
        let mut tasks = JoinSet::new();
        for worker in 0..Self::WORKERS {
            let (channel, begun) = (channel.clone(), Arc::clone(&begun));
            tasks.spawn(async move {
                let mut outcomes = Vec::new();
                for number in 0..calls {
                    begun.fetch_add(1, Ordering::SeqCst);
                    let (id, reads) = (format!("call-{worker}-{number}"), worker % 2 == 0);
                    let outcome = if reads {
                        read(&channel, id.clone()).await.map(drop)
                    } else {
                        write(&channel, id.clone()).await
                    };
                    outcomes.push((id, reads, outcome));
                }
                outcomes
            });
        }
        Self { tasks, begun }
    }

    async fn has_begun(&self, calls: usize) {
        within("the load goes on", || self.begun.load(Ordering::SeqCst) >= calls).await;
    }

    async fn outcomes(self) -> Vec<(String, bool, Result<(), Status>)> {
        self.tasks.join_all().await.into_iter().flatten().collect()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_servers_one_dies_and_only_writes_that_it_had_begun_fail() {
    let done = Done::default();
    let (mut first, second) = (Server::start("first", &done), Server::start("second", &done));
    let channel = Names::of(&[&first, &second]).channel();
    connected(&channel, 2).await;

    let load = Load::start(&channel, 100);
    load.has_begun(400).await;
    let shares = (first.calls(), second.calls());
    assert!(shares.0.min(shares.1) * 3 > shares.0.max(shares.1), "{shares:?} are no fair shares");
    first.kill();

    let mut failed = 0;
    for (id, reads, outcome) in load.outcomes().await {
        let times = done.lock().get(&id).copied().unwrap_or(0);
        match outcome {
            Ok(()) if reads => assert!(times >= 1, "{id}"),
            Ok(()) => assert_eq!(times, 1, "{id} was answered"),
            Err(status) => {
                assert!(!reads, "{id}: {status:?}");
                assert_eq!(status.code(), Code::Unavailable, "{id}");
                assert!(times <= 1, "{id} was done {times} times");
                failed += 1;
            }
        }
    }
    assert!(failed <= Load::WORKERS / 2, "{failed} writes failed");
    assert_eq!(stats(&channel).connected, 1);
    assert_eq!(stats(&channel).in_flight, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_drains_loses_no_call_and_does_none_twice() {
    let done = Done::default();
    let (first, second) = (Server::start("first", &done), Server::start("second", &done));
    let channel = Names::of(&[&first, &second]).channel();
    connected(&channel, 2).await;
    let load = Load::start(&channel, 100);
    load.has_begun(400).await;
    first.drain.shut_down();
    for (id, _, outcome) in load.outcomes().await {
        outcome.unwrap_or_else(|status| panic!("{id}: {status:?}"));
        assert_eq!(done.lock()[&id], 1, "{id}");
    }
    within("the other is left alone", || stats(&channel).connected == 1).await;
    assert_eq!(stats(&channel).retries, 0, "what was not taken is moved, and not tried again");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_server_is_left_within_seconds_and_comes_back_when_it_goes_on() {
    let done = Done::default();
    let (first, second) = (Server::start("first", &done), Server::start("second", &done));
    let channel = Names::of(&[&first, &second]).channel();
    connected(&channel, 2).await;
    let stopped = first.stop();
    let since = Instant::now();
    // Those that go there are stuck until it is found out.
    let mut reads: JoinSet<_> = (0..8)
        .map(|number| {
            let channel = channel.clone();
            async move { read(&channel, format!("read-{number}")).await }
        })
        .collect();
    while let Some(read) = reads.join_next().await {
        assert_eq!(read.unwrap().unwrap(), "second");
    }
    // Asked after a second, given a little, and some for a busy machine.
    assert!(since.elapsed() < Duration::from_secs(4), "it took {:?}", since.elapsed());
    for number in 0..20 {
        write(&channel, format!("soon-{number}")).await.unwrap();
    }
    within("it is given up", || stats(&channel).connected == 1).await;
    assert!(since.elapsed() < Duration::from_secs(8), "it took {:?}", since.elapsed());
    for number in 0..20 {
        write(&channel, format!("write-{number}")).await.unwrap();
    }
    drop(stopped);
    within("it is back", || stats(&channel).connected == 2).await;
    drop(second);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_holds_its_breath_finishes_what_it_has_begun_and_gets_nothing_new() {
    let done = Done::default();
    let (first, second) = (Server::start("first", &done), Server::start("second", &done));
    let channel = Names::of(&[&first, &second]).channel();
    connected(&channel, 2).await;
    let stopped = first.stop();
    let mut writes: JoinSet<_> = (0..16)
        .map(|number| {
            let channel = channel.clone();
            async move { write(&channel, format!("write-{number}")).await }
        })
        .collect();
    let since = Instant::now();
    // As long as reads are tried elsewhere, it is silent.
    assert_eq!(read(&channel, "read").await.unwrap(), "second");
    tokio::time::sleep(Duration::from_millis(2_200).saturating_sub(since.elapsed())).await;
    for number in 0..20 {
        assert_eq!(read(&channel, format!("read-{number}")).await.unwrap(), "second");
    }
    drop(stopped);
    while let Some(write) = writes.join_next().await {
        write.unwrap().unwrap();
    }
    assert_eq!(stats(&channel).connected, 2);
    assert!((0..16).all(|number| done.lock()[&format!("write-{number}")] == 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_one_has_no_room_for_another_does_and_the_first_is_spared_for_a_while() {
    let done = Done::default();
    let (first, second) = (Server::start("first", &done), Server::start("second", &done));
    let channel = Names::of(&[&first, &second]).channel();
    connected(&channel, 2).await;
    let (before, since) = (first.calls(), Instant::now());
    for number in 0..50 {
        write(&channel, format!("full-{number}")).await.unwrap();
    }
    let seconds = usize::try_from(since.elapsed().as_secs()).unwrap();
    let asked = first.calls() - before;
    assert!((1..=seconds + 2).contains(&asked), "asked {asked} times in {seconds} s");
    assert_eq!(stats(&channel).retries, 0, "what was not begun is moved, and not tried again");
    drop(second);
    // Where there is nobody else, it is heard out once.
    let alone = Names::of(&[&first]).channel();
    connected(&alone, 1).await;
    let before = first.calls();
    assert_eq!(write(&alone, "full").await.unwrap_err().code(), Code::Unavailable);
    assert_eq!(first.calls(), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_that_is_slow_to_look_up_holds_up_no_other() {
    let server = Server::start("it", &Done::default());
    let at = server.address;
    let resolver: Resolver = Arc::new(move |host, _| {
        Box::pin(async move {
            if host == "slow" {
                std::future::pending::<()>().await;
            }
            Ok(vec![at])
        })
    });
    let channel = Channel::connect_by("http://slow:1,http://quick:1", None, resolver).unwrap();
    let since = Instant::now();
    assert_eq!(read(&channel, "call").await.unwrap(), "it");
    assert!(since.elapsed() < Duration::from_secs(2), "it took {:?}", since.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_at_which_nobody_answers_is_left_out() {
    let done = Done::default();
    let server = Server::start("it", &done);
    // The kernel accepts for it; it never does.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let names = Names::of(&[&server]);
    names.0.lock().push(silent.local_addr().unwrap());
    let channel = names.channel();
    for number in 0..50 {
        assert_eq!(read(&channel, format!("call-{number}")).await.unwrap(), "it");
    }
    within("it was tried", || stats(&channel).dials_failed > 0).await;
    assert_eq!((stats(&channel).connected, stats(&channel).known), (1, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_moves_is_followed_and_one_that_cannot_be_looked_up_stays_where_it_was() {
    let done = Done::default();
    let (first, second) = (Server::start("first", &done), Server::start("second", &done));
    let names = Names::of(&[&first]);
    let channel = names.channel();
    assert_eq!(read(&channel, "call-1").await.unwrap(), "first");
    names.become_those_of(&[]);
    let until = Instant::now() + Duration::from_secs(4);
    while Instant::now() < until {
        assert_eq!(read(&channel, "call-2").await.unwrap(), "first");
    }
    names.become_those_of(&[&second]);
    let until = Instant::now() + SOON;
    while read(&channel, "call-3").await.unwrap() != "second" {
        assert!(Instant::now() < until, "it is not followed");
    }
    within("the old address is forgotten", || stats(&channel).known == 1 && stats(&channel).connected == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_comes_later_is_waited_for_a_while() {
    let names = Names::default();
    let channel = names.channel();
    let refused = write(&channel, "call-1").await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable);
    let why = channel.trouble().unwrap();
    assert!(why.contains("catalog") && why.contains("no such host"), "{why}");
    let waiting = tokio::spawn({
        let channel = channel.clone();
        async move {
            let until = Instant::now() + SOON;
            while write(&channel, "call-2").await.is_err() {
                assert!(Instant::now() < until, "nobody came");
            }
        }
    });
    let server = Server::start("late", &Done::default());
    names.become_those_of(&[&server]);
    waiting.await.unwrap();
    assert_eq!(server.calls(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn tries_do_not_multiply_what_is_down() {
    let server = Server::start("it", &Done::default());
    let channel = Names::of(&[&server]).channel();
    connected(&channel, 1).await;
    let began = Instant::now();
    for number in 0..200 {
        assert_eq!(read(&channel, format!("down-{number}")).await.unwrap_err().code(), Code::Unavailable);
    }
    let ChannelStats { calls, retries, retries_refused, .. } = stats(&channel);
    let bound = calls / 5 + 10 * (began.elapsed().as_secs() + 2);
    assert!(retries > 0 && retries <= bound, "{retries} of {bound}");
    assert!(retries_refused > 0);
    assert_eq!(server.calls() as u64, calls + retries);
    // What changes something is not sent twice.
    let before = server.calls();
    assert!(write(&channel, "down-write").await.is_err());
    assert_eq!(server.calls(), before + 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn more_calls_than_a_connection_carries_take_another() {
    let server = Server::start("it", &Done::default());
    let channel = Names::of(&[&server]).channel();
    connected(&channel, 1).await;
    let mut stuck = JoinSet::new();
    for number in 0..300 {
        let channel = channel.clone();
        stuck.spawn(async move { write(&channel, format!("never-{number}")).await });
    }
    within("all have arrived", || server.calls() > 300).await;
    assert_eq!(read(&channel, "call").await.unwrap(), "it");
    assert_eq!(stats(&channel).in_flight, 300);
    stuck.shutdown().await;
    within("their places are free", || stats(&channel).in_flight == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_shrinks_from_process_to_process() {
    let done = Done::default();
    let last = Server::start("last", &done);
    let first = Server::run("first", &done, None, Some(Names::of(&[&last]).channel()));
    let local = Channel::local();
    local.bind(guarded(Clients { next: Some(Names::of(&[&last]).channel()), ..first.clients.clone() }));
    for channel in [Names::of(&[&first]).channel(), local] {
        last.clients.left.lock().clear();
        let ask = async |id: &str, left| {
            let mut request = Request::new(GetClientRequest { id: id.to_owned() });
            request.set_timeout(left);
            client(&channel).get_client(request).await
        };
        ask("next-call", Duration::from_secs(3)).await.unwrap();
        ask("next-call", Duration::from_mins(1)).await.unwrap();
        let left = last.clients.left.lock().clone();
        assert!(left[0] <= Duration::from_millis(2_900) && left[0] > Duration::from_secs(1), "{left:?}");
        assert!(left[1] <= Duration::from_millis(4_900) && left[1] > Duration::from_secs(3), "{left:?}");
        let refused = ask("next-never", Duration::from_millis(300)).await.unwrap_err();
        assert_eq!(refused.code(), Code::DeadlineExceeded);
        let before = first.calls();
        assert_eq!(ask("call", Duration::from_nanos(1)).await.unwrap_err().code(), Code::DeadlineExceeded);
        assert_eq!(first.calls(), before, "it was begun");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_encrypted_server_is_judged_by_its_certificate() {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let provider = || Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let server = Server::run("it", &Done::default(), Some(config), None);
    let trusting = |roots: RootCertStore| {
        let config = ClientConfig::builder_with_provider(provider()).with_safe_default_protocol_versions().unwrap();
        let config = Arc::new(config.with_root_certificates(roots).with_no_client_auth());
        Arc::new(move || Arc::clone(&config)) as ClientTls
    };
    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let port = server.address.port();
    let trusted = Channel::connect(&format!("https://localhost:{port}"), Some(trusting(roots.clone()))).unwrap();
    assert_eq!(read(&trusted, "call").await.unwrap(), "it");

    let says = async |url: String, tls| {
        let channel = Channel::connect(&url, tls).unwrap();
        let refused = read(&channel, "call").await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable);
        channel.trouble().unwrap()
    };
    let other = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let mut foreign = RootCertStore::empty();
    foreign.add(other.cert.der().clone()).unwrap();
    for tls in [Some(trusting(foreign)), None] {
        let why = says(format!("https://localhost:{port}"), tls).await;
        assert!(why.contains("its certificate is not trusted here"), "{why}");
    }
    let why = says(format!("https://127.0.0.1:{port}"), Some(trusting(roots))).await;
    assert!(why.contains("its certificate is not trusted here"), "another name: {why}");
}

#[tokio::test]
async fn what_is_no_url_is_refused_before_anything_is_dialled() {
    for urls in
        ["", "catalog:7002", "ftp://catalog", "http://", "http://a,", "http://a/b", "http://u:p@a", "http://a?b"]
    {
        assert!(Channel::connect(urls, None).is_err(), "{urls}");
    }
    for urls in ["http://catalog:7002", "https://catalog", "http://10.0.0.7:7001, http://[::1]:7001/"] {
        assert!(Channel::connect(urls, None).is_ok(), "{urls}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_urls_are_one_service() {
    let done = Done::default();
    let (first, second) = (Server::start("first", &done), Server::start("second", &done));
    let channel = Channel::connect(&format!("http://{},http://{}", first.address, second.address), None).unwrap();
    connected(&channel, 2).await;
    for number in 0..100 {
        read(&channel, format!("call-{number}")).await.unwrap();
    }
    assert!(first.calls() > 10 && second.calls() > 10, "{} and {}", first.calls(), second.calls());
}
