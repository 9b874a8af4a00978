//! What streams, over REST and over gRPC: events as lines, files in pieces, and the end of both.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use async_trait::async_trait;
use bytes::{BufMut as _, Bytes, BytesMut};
use futures_util::{FutureExt as _, future::BoxFuture, stream};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, StreamBody};
use paperkey_gateway::{Body, Gateway, GatewayConfig, GatewayDeps};
use paperkey_kit::{
    authn::Authenticator,
    channel::Channel,
    clock::Clock,
    limits::{Limiter, MemoryLimiter, Subjects},
    policy::Guarded,
    principal::Signer,
    secrets::Keyring,
    service::Rpcs,
    shutdown::{self, ShutdownHandle},
};
use paperkey_proto::{
    Error,
    errors::v1::Reason,
    licensing::v1 as licensing,
    options::v1::{Caller, Scope},
    principal::v1::{Mode, Principal},
    webhook::v1 as webhook,
};
use prost::Message;
use serde_json::{Value as Json, json};
use tokio::sync::mpsc;
use tonic::Status;

const PEER: &str = "203.0.113.7:4321";
const WATCH: &str = "/products/prod_1/events";
const WATCH_RPC: &str = "/paperkey.webhook.v1.WebhookService/WatchEvents";
const IMPORT: &str = "/licenses/import?productId=prod_1";
const IMPORT_RPC: &str = "/paperkey.licensing.v1.LicensingService/ImportLicenses";
/// Reported on piece by piece.
const ECHOED: &str = "prod_echoed";

/// Lets one key in, until it is revoked.
#[derive(Default)]
struct Doorman {
    revoked: AtomicBool,
    narrowed: AtomicBool,
}

#[async_trait]
impl Authenticator for Doorman {
    async fn authenticate(&self, credential: &str, _: Option<&str>, _: Mode) -> Result<Arc<Principal>, Error> {
        if credential != "sk_1" || self.revoked.load(Ordering::SeqCst) {
            return Err(Error::unauthenticated());
        }
        Ok(Arc::new(Principal {
            kind: Caller::ProductSecretKey.into(),
            id: "key_1".into(),
            team_id: "team_1".into(),
            product_id: "prod_1".into(),
            mode: Mode::Live.into(),
            scopes: if self.narrowed.load(Ordering::SeqCst) {
                vec![Scope::WebhooksRead.into()]
            } else {
                vec![Scope::WebhooksRead.into(), Scope::LicensesWrite.into()]
            },
            tier: "free".into(),
            ..Principal::default()
        }))
    }
}

/// Shows what it is given, as it is given.
#[derive(Clone)]
struct Events(Arc<parking_lot::Mutex<Option<mpsc::Receiver<webhook::WatchEventsResponse>>>>);

/// Reports what it was sent, and beside what; for a product of its own piece by piece, as it is read.
#[derive(Clone)]
struct Imports;

fn frame(message: &impl Message) -> Bytes {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.encoded_len()).unwrap());
    message.encode(&mut frame).unwrap();
    frame.freeze()
}

fn good_end() -> Frame<Bytes> {
    let mut trailers = HeaderMap::new();
    Status::ok("").add_header(&mut trailers).unwrap();
    Frame::trailers(trailers)
}

type Answering = BoxFuture<'static, Result<Response<tonic::body::Body>, Infallible>>;

impl tonic::server::NamedService for Events {
    const NAME: &'static str = "paperkey.webhook.v1.WebhookService";
}

impl tower::Service<Request<tonic::body::Body>> for Events {
    type Response = Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<tonic::body::Body>) -> Answering {
        let given = self.0.lock().take();
        let frames = stream::unfold(given, |given| async {
            let mut given = given?;
            match given.recv().await {
                Some(message) => Some((Ok::<_, Status>(Frame::data(frame(&message))), Some(given))),
                None => Some((Ok(good_end()), None)),
            }
        });
        async { Ok(Response::new(tonic::body::Body::new(StreamBody::new(frames)))) }.boxed()
    }
}

impl tonic::server::NamedService for Imports {
    const NAME: &'static str = "paperkey.licensing.v1.LicensingService";
}

impl tower::Service<Request<tonic::body::Body>> for Imports {
    type Response = Response<tonic::body::Body>;
    type Error = Infallible;
    type Future = Answering;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Answering {
        async {
            let mut body = request.into_body();
            let first = match body.frame().await {
                Some(Ok(first)) => first.into_data().unwrap(),
                _ => return Ok(Status::internal("no first message").into_http()),
            };
            if licensing::ImportLicensesRequest::decode(&first[5..]).unwrap().product_id == ECHOED {
                return Ok(Response::new(tonic::body::Body::new(StreamBody::new(echoed(body)))));
            }
            let sent = match body.collect().await {
                Ok(rest) => [first, rest.to_bytes()].concat(),
                Err(status) => return Ok(status.into_http()),
            };
            let (mut left, mut data, mut product_id) = (&sent[..], Vec::new(), String::new());
            while let Some(([_, length @ ..], rest)) = left.split_first_chunk::<5>() {
                let (message, rest) = rest.split_at(u32::from_be_bytes(*length) as usize);
                let message = licensing::ImportLicensesRequest::decode(message).unwrap();
                data.extend(message.data);
                product_id.push_str(&message.product_id);
                left = rest;
            }
            let said = format!("{product_id}: {}", String::from_utf8(data).unwrap());
            let pieces = [("application/x-ndjson", said.as_str()), ("", "\n")].map(|(content_type, data)| {
                let piece = licensing::ImportLicensesResponse { content_type: content_type.into(), data: data.into() };
                Ok::<_, Status>(Frame::data(frame(&piece)))
            });
            let frames = stream::iter(pieces.into_iter().chain([Ok(good_end())]));
            Ok(Response::new(tonic::body::Body::new(StreamBody::new(frames))))
        }
        .boxed()
    }
}

/// The pieces of a file as they come; none is read before the one before it was taken.
fn echoed(body: tonic::body::Body) -> impl futures_util::Stream<Item = Result<Frame<Bytes>, Status>> {
    stream::unfold(Some(body), |body| async {
        let mut body = body?;
        let piece = match body.frame().await {
            Some(Ok(piece)) => piece.into_data().unwrap(),
            Some(Err(status)) => return Some((Err(status), None)),
            None => return Some((Ok(good_end()), None)),
        };
        let data = licensing::ImportLicensesRequest::decode(&piece[5..]).unwrap().data;
        let piece = licensing::ImportLicensesResponse { content_type: "application/x-ndjson".into(), data };
        Some((Ok(Frame::data(frame(&piece))), Some(body)))
    })
}

struct House {
    gateway: Gateway,
    doorman: Arc<Doorman>,
    events: mpsc::Sender<webhook::WatchEventsResponse>,
    shutdown: ShutdownHandle,
}

fn house() -> House {
    let clock = Clock::system();
    let signer = Signer::new(&Keyring::for_tests(), clock.clone());
    let (events, given) = mpsc::channel(8);
    let rpcs = Rpcs::new(Events(Arc::new(parking_lot::Mutex::new(Some(given))))).add_service(Imports);
    let channel = Channel::local();
    channel.bind(Guarded::new(rpcs, signer.clone(), clock.clone(), None, None));
    let owners = ["auth", "catalog", "licensing", "webhook"];
    let channels: HashMap<_, _> = owners.map(|owner| (owner.to_owned(), channel.clone())).into();
    let doorman = Arc::new(Doorman::default());
    let (shutdown, ending) = shutdown::channel();
    let config = GatewayConfig {
        public_url: "https://keys.example/".into(),
        public_url_is_configured: true,
        trusted_proxies: Vec::new(),
        trusted_parents: Vec::new(),
        cors_any_origin: false,
        call_timeout_ms: 10_000,
        upstreams: Vec::new(),
        version: "1.2.3",
        tiers: Arc::default(),
        limits: paperkey_kit::config::Limits::default(),
        billing_url: None,
    };
    let deps = GatewayDeps {
        channels,
        authenticator: Arc::clone(&doorman) as _,
        signer,
        limiter: Arc::new(Limiter::Memory(MemoryLimiter::new(clock.clone()))),
        subjects: Subjects::new(&Keyring::for_tests()),
        clock,
        audit: None,
        incidents: None,
        shutdown: Some(ending),
        places: None,
    };
    House { gateway: Gateway::new(config, deps).unwrap(), doorman, events, shutdown }
}

impl House {
    async fn ask(&self, request: http::request::Builder, body: impl Into<Bytes>) -> Response<Body> {
        let request = request.body(Full::new(body.into())).unwrap();
        let peer: SocketAddr = PEER.parse().unwrap();
        self.gateway.handle(request, peer).await
    }

    /// Asks to watch, and gets the first answer.
    async fn watch(&self) -> Response<Body> {
        self.events.send(webhook::WatchEventsResponse::default()).await.unwrap();
        let response = self.ask(Request::get(WATCH).header("authorization", "Bearer sk_1"), "").await;
        assert_eq!(response.status(), StatusCode::OK);
        response
    }

    async fn happens(&self, id: &str) {
        let event = webhook::WatchedEvent { id: id.into(), event: "license.created".into(), ..Default::default() };
        self.events.send(webhook::WatchEventsResponse { event: Some(event), delivery: None }).await.unwrap();
    }
}

/// The next lines that come in one frame; none at the end.
async fn line(response: &mut Response<Body>) -> Option<Result<Json, Status>> {
    let frame = response.body_mut().frame().await?;
    Some(frame.map(|frame| {
        let data = frame.into_data().unwrap();
        assert_eq!(data.last(), Some(&b'\n'));
        serde_json::from_slice(&data).unwrap()
    }))
}

#[tokio::test]
async fn what_is_streamed_is_shown_line_by_line_as_it_comes() {
    let house = house();
    let mut watched = house.watch().await;
    assert_eq!(watched.headers()["content-type"], "application/x-ndjson");
    assert!(watched.headers().contains_key("ratelimit"));
    assert_eq!(line(&mut watched).await.unwrap().unwrap(), json!({"event": null, "delivery": null}));
    house.happens("evt_1").await;
    let shown = line(&mut watched).await.unwrap().unwrap();
    assert_eq!((&shown["event"]["id"], &shown["event"]["createdAt"]), (&json!("evt_1"), &Json::Null));
    house.happens("evt_2").await;
    assert_eq!(line(&mut watched).await.unwrap().unwrap()["event"]["id"], "evt_2");
    drop(house.events);
    assert!(line(&mut watched).await.is_none());
}

#[tokio::test]
async fn who_may_not_watch_is_refused_before_anything_is_shown() {
    let house = house();
    let response = house.ask(Request::get(WATCH).header("authorization", "Bearer sk_2"), "").await;
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    let unknown = format!("{WATCH}?colour=red");
    let response = house.ask(Request::get(unknown).header("authorization", "Bearer sk_1"), "").await;
    assert_eq!(response.status(), StatusCode::BAD_REQUEST);
}

#[tokio::test(start_paused = true)]
async fn a_revoked_key_stops_watching_over_rest() {
    let house = house();
    let mut watched = house.watch().await;
    line(&mut watched).await.unwrap().unwrap();
    house.doorman.revoked.store(true, Ordering::SeqCst);
    let status = line(&mut watched).await.unwrap().unwrap_err();
    assert_eq!(Error::from_status(&status).reason(), Reason::InvalidCredentials);
    assert!(line(&mut watched).await.is_none());
    assert!(house.events.is_closed(), "the service learns that nobody watches");
}

#[tokio::test(start_paused = true)]
async fn a_key_that_may_do_less_has_to_ask_again() {
    let house = house();
    let mut watched = house.watch().await;
    line(&mut watched).await.unwrap().unwrap();
    house.doorman.narrowed.store(true, Ordering::SeqCst);
    let status = line(&mut watched).await.unwrap().unwrap_err();
    assert_eq!(Error::from_status(&status).reason(), Reason::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn a_revoked_key_stops_watching_over_grpc() {
    let house = house();
    house.events.send(webhook::WatchEventsResponse::default()).await.unwrap();
    let request = Request::post(WATCH_RPC).header("content-type", "application/grpc").header("te", "trailers");
    let asked = frame(&webhook::WatchEventsRequest { product_id: "prod_1".into(), ..Default::default() });
    let mut watched = house.ask(request.header("authorization", "Bearer sk_1"), asked).await;
    assert!(watched.body_mut().frame().await.unwrap().unwrap().is_data());
    house.doorman.revoked.store(true, Ordering::SeqCst);
    let end = watched.body_mut().frame().await.unwrap().unwrap().into_trailers().unwrap();
    let status = Status::from_header_map(&end).unwrap();
    assert_eq!(Error::from_status(&status).reason(), Reason::InvalidCredentials);
    assert!(watched.body_mut().frame().await.is_none());
}

#[tokio::test]
async fn watching_ends_with_the_process() {
    let house = house();
    let mut watched = house.watch().await;
    line(&mut watched).await.unwrap().unwrap();
    house.shutdown.shut_down();
    assert!(line(&mut watched).await.is_none());
}

#[tokio::test]
async fn a_file_goes_to_its_service_with_what_the_query_says() {
    let house = house();
    let request = Request::post(IMPORT).header("authorization", "Bearer sk_1").header("content-type", "text/csv");
    let response = house.ask(request, "email\na@b.c\n").await;
    assert_eq!(response.status(), StatusCode::OK);
    assert_eq!(response.headers()["content-type"], "application/x-ndjson");
    let said = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(said, "prod_1: email\na@b.c\n\n");
}

#[tokio::test]
async fn a_file_that_says_that_it_is_too_large_is_not_read() {
    let house = house();
    let request = Request::post(IMPORT).header("authorization", "Bearer sk_1").header("content-length", "9999999999");
    let response = house.ask(request, "email\n").await;
    assert_eq!(response.status(), StatusCode::PAYLOAD_TOO_LARGE);
}

/// Sends so many pieces of 64 kB, or as many as are taken, before anything of the report is read.
async fn sent_first(house: &House, count: usize) -> (usize, Response<Body>) {
    let (file, pieces) = mpsc::channel(1);
    let pieces = stream::unfold(pieces, |mut pieces: mpsc::Receiver<Bytes>| async {
        let piece = pieces.recv().await?;
        Some((Ok::<_, Infallible>(Frame::data(piece)), pieces))
    });
    let request = Request::post(format!("/licenses/import?productId={ECHOED}")).header("authorization", "Bearer sk_1");
    let request = request.body(StreamBody::new(pieces)).unwrap();
    let sending = async move {
        for sent in 0..count {
            if file.send(Bytes::from(vec![b'x'; 65_536])).await.is_err() {
                return sent;
            }
        }
        count
    };
    let sent = async { tokio::join!(sending, house.gateway.handle(request, PEER.parse().unwrap())) };
    tokio::time::timeout(std::time::Duration::from_mins(10), sent).await.expect("nobody waits for ever")
}

#[tokio::test(start_paused = true)]
async fn a_client_that_sends_a_whole_file_before_it_reads_gets_its_report() {
    let house = house();
    let (sent, response) = sent_first(&house, 100).await;
    assert_eq!((sent, response.status()), (100, StatusCode::OK));
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes().len(), 100 * 65_536);
}

#[tokio::test(start_paused = true)]
async fn a_report_that_nobody_reads_is_kept_up_to_a_bound_and_ends_in_an_error() {
    let house = house();
    let (sent, response) = sent_first(&house, 1_000).await;
    assert!((128..140).contains(&sent), "{sent} pieces were taken");
    let mut body = response.into_body();
    let mut read = 0;
    let end = loop {
        match body.frame().await.expect("no good end") {
            Ok(frame) => read += frame.into_data().unwrap().len(),
            Err(status) => break status,
        }
    };
    assert_eq!(Error::from_status(&end).reason(), Reason::Deadline);
    assert_eq!(read, 8 * 1_024 * 1_024, "what there is room for");
}

#[tokio::test]
async fn a_key_that_a_file_cannot_heed_is_refused() {
    let house = house();
    let request = Request::post(IMPORT).header("authorization", "Bearer sk_1").header("idempotency-key", "once");
    let response = house.ask(request, "email\n").await;
    assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    let said = response.into_body().collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&said).contains("Idempotency-Key"), "{said:?}");
    let request = Request::post(IMPORT_RPC).header("content-type", "application/grpc").header("te", "trailers");
    let request = request.header("authorization", "Bearer sk_1").header("idempotency-key", "once");
    let response = house.ask(request, frame(&licensing::ImportLicensesRequest::default())).await;
    let status = Status::from_header_map(response.headers()).unwrap();
    assert_eq!(Error::from_status(&status).violations()[0].field, "Idempotency-Key");
}
