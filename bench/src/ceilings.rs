//! The ceilings: the least that an axum and a tonic server do for a call; and the sink of deliveries. Each runs in a
//! process of its own.

use std::{
    convert::Infallible,
    env,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};

use axum::{Json, Router, routing::post};
use bytes::Bytes;
use clap::ValueEnum;
use hdrhistogram::Histogram;
use http::{Request, Response, uri::PathAndQuery};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use prost::Message;
use serde::{Deserialize, Serialize};
use tokio::{net::TcpListener, task::JoinSet};
use tonic::{
    body::Body,
    server::NamedService,
    transport::{Endpoint, Server, server::TcpIncoming},
};
use tonic_prost::ProstCodec;
use tower::Service;

use crate::{
    Result,
    load::{Outcome, Phase, histogram, measure},
};

const ECHO: &str = "/bench.Echo/Echo";

/// A server that does nothing but answer.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Ceiling {
    /// JSON in, JSON out, over HTTP/1.1.
    Axum,
    /// Protobuf in, protobuf out, over HTTP/2.
    Tonic,
    /// Takes deliveries, counts them, and says nothing.
    Sink,
}

/// A ceiling in its own process, ended when dropped.
pub(crate) struct Process {
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Process {
    pub(crate) async fn start(ceiling: Ceiling) -> Result<Self> {
        let name = ceiling.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        let mut child = Command::new(env::current_exe()?).args(["serve", &name]).stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take().ok_or("the ceiling has no output")?;
        let line = tokio::task::spawn_blocking(move || {
            let mut line = String::new();
            BufReader::new(stdout).read_line(&mut line).map(|_| line)
        })
        .await??;
        Ok(Self { child, address: line.trim().parse()? })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[derive(Deserialize, Serialize)]
struct EchoJson {
    license_key: String,
    fingerprint: String,
}

#[derive(Clone, PartialEq, Message)]
struct EchoProto {
    #[prost(string, tag = "1")]
    license_key: String,
    #[prost(string, tag = "2")]
    fingerprint: String,
}

#[expect(clippy::print_stdout, reason = "the address is this process's answer to the one that started it")]
pub(crate) async fn serve(ceiling: Ceiling) -> Result<()> {
    let listener = TcpListener::bind((std::net::Ipv4Addr::LOCALHOST, 0)).await?;
    println!("{}", listener.local_addr()?);
    match ceiling {
        Ceiling::Axum => {
            let app = Router::new().route("/echo", post(|Json(echo): Json<EchoJson>| async { Json(echo) }));
            axum::serve(axum::serve::ListenerExt::tap_io(listener, |stream| drop(stream.set_nodelay(true))), app)
                .await?;
        }
        Ceiling::Tonic => {
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            Server::builder().add_service(EchoService).serve_with_incoming(incoming).await?;
        }
        Ceiling::Sink => sink(listener).await?,
    }
    Ok(())
}

/// What a sink knows of what has arrived.
#[derive(Default)]
struct Arrived {
    probes: AtomicU64,
    hooks: AtomicU64,
    /// The first body.
    body: OnceLock<Bytes>,
}

async fn sink(listener: TcpListener) -> Result<()> {
    let arrived = Arc::new(Arrived::default());
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let arrived = Arc::clone(&arrived);
        let service = service_fn(move |request| take(request, Arc::clone(&arrived)));
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service));
    }
}

async fn take(
    request: Request<Incoming>,
    arrived: Arc<Arrived>,
) -> std::result::Result<Response<Full<Bytes>>, hyper::Error> {
    let (head, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let count = |of: &AtomicU64| Bytes::from(of.load(Ordering::SeqCst).to_string());
    let answer = match head.uri.path() {
        "/count/probe" => count(&arrived.probes),
        "/count/hook" => count(&arrived.hooks),
        "/body" => arrived.body.get().cloned().unwrap_or_default(),
        path => {
            let of = if path == "/probe" { &arrived.probes } else { &arrived.hooks };
            arrived.body.get_or_init(|| body);
            of.fetch_add(1, Ordering::SeqCst);
            Bytes::new()
        }
    };
    Ok(Response::new(Full::new(answer)))
}

#[derive(Clone, Copy)]
struct EchoService;

impl NamedService for EchoService {
    const NAME: &'static str = "bench.Echo";
}

impl tonic::server::UnaryService<EchoProto> for EchoService {
    type Response = EchoProto;
    type Future = std::future::Ready<std::result::Result<tonic::Response<EchoProto>, tonic::Status>>;

    fn call(&mut self, request: tonic::Request<EchoProto>) -> Self::Future {
        std::future::ready(Ok(tonic::Response::new(request.into_inner())))
    }
}

impl Service<Request<Body>> for EchoService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = std::pin::Pin<Box<dyn Future<Output = std::result::Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<std::result::Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(async move {
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<EchoProto, EchoProto>::default());
            Ok(grpc.unary(EchoService, request).await)
        })
    }
}

/// Unary calls over so many connections, each with so many callers.
pub(crate) async fn load_tonic(
    address: SocketAddr,
    connections: usize,
    callers: usize,
    span: Duration,
    pid: u32,
) -> Result<Outcome> {
    let phase = Arc::new(Phase::default());
    let mut tasks = JoinSet::new();
    for _ in 0..connections {
        let channel = Endpoint::from_shared(format!("http://{address}"))?.tcp_nodelay(true).connect().await?;
        for _ in 0..callers {
            let (channel, phase) = (channel.clone(), Arc::clone(&phase));
            tasks.spawn(async move { call_tonic(channel, &phase).await });
        }
    }
    measure(tasks, phase, span, &[pid]).await
}

async fn call_tonic(channel: tonic::transport::Channel, phase: &Phase) -> Result<Histogram<u64>> {
    let mut client = tonic::client::Grpc::new(channel);
    let message =
        EchoProto { license_key: "K7WX9-M3NP4-H8TRC-DJ".to_owned(), fingerprint: "paperkey_fp_v1_bench".to_owned() };
    let mut latencies = histogram()?;
    while !phase.is_over() {
        let began = Instant::now();
        client.ready().await?;
        let codec = ProstCodec::<EchoProto, EchoProto>::default();
        client.unary(tonic::Request::new(message.clone()), PathAndQuery::from_static(ECHO), codec).await?;
        if phase.is_counting() {
            latencies.saturating_record(u64::try_from(began.elapsed().as_micros())?);
        }
    }
    Ok(latencies)
}
