//! What the tests stand on: the assembled service with a catalogue of a few products, and receivers on real sockets.

#![expect(dead_code, reason = "each test file uses its part")]

use std::{
    collections::VecDeque,
    convert::Infallible,
    future::Future,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request as HttpRequest, Response as HttpResponse, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{
    body::{Body as HttpBody, Frame, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use paperkey_kit::{
    channel::Channel,
    clock::Clock,
    db::Database,
    ids::new_id,
    policy::Guarded,
    principal::{Caller, Signer},
    secrets::Keyring,
    service::{Channels, Rpcs, ServiceDeps},
    shutdown::{self, ShutdownHandle},
    testing,
};
use paperkey_proto::{
    Error,
    catalog::v1::{
        self as catalog, GetProductRequest, GetProductResponse, Product,
        catalog_service_server::{CatalogService, CatalogServiceServer},
    },
    errors::v1::Reason,
    events::v1::{
        Event, IngestEventsRequest, IngestEventsResponse,
        intake_service_client::IntakeServiceClient,
        intake_service_server::{IntakeService, IntakeServiceServer},
    },
    options::v1::{Caller as Kind, Scope},
    principal::v1::{Mode, Principal, Role},
    webhook::v1::{
        CreateWebhookRequest, Delivery, DeliveryStatus, GetDeliveryRequest, GetDeliveryResponse, GetWebhookRequest,
        ListDeliveriesRequest, UpdateWebhookRequest, Webhook, WebhookStatus,
        webhook_service_client::WebhookServiceClient,
    },
};
use paperkey_webhook::{WebhookConfig, assemble};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, mpsc},
    task::JoinHandle,
};
use tonic::{Request, Response, Status, body::Body, codegen::Service};

/// A product of `team_1` in live mode.
pub(crate) const PRODUCT: &str = "prod_1";
/// Another one.
pub(crate) const OTHER_PRODUCT: &str = "prod_2";
/// Longer than anything here takes, and shorter than anyone's patience.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for something that must happen.
pub(crate) async fn within<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, what).await.expect("it happens in time")
}

/// Asks again until the answer is yes.
pub(crate) async fn until<F, Fut>(mut asks: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    within(async {
        while !asks().await {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

/// A configuration for receivers on this machine, with so many attempts at once.
pub(crate) fn lax(attempts: usize) -> WebhookConfig {
    WebhookConfig {
        allow_http: true,
        allow_private_networks: true,
        retry_schedule_s: vec![0; attempts],
        version: "1.2.3",
        ..WebhookConfig::default()
    }
}

/// A client's way to the service, which signs as the gateway would.
#[derive(Clone)]
pub(crate) struct As {
    channel: Channel,
    signer: Signer,
    principal: Principal,
}

impl Service<HttpRequest<Body>> for As {
    type Response = HttpResponse<Body>;
    type Error = Status;
    type Future = <Channel as Service<HttpRequest<Body>>>::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.channel.poll_ready(context)
    }

    fn call(&mut self, request: HttpRequest<Body>) -> Self::Future {
        testing::call(self.channel.clone(), &self.signer, Some(&self.principal), "req_1", request)
    }
}

/// One in test mode.
pub(crate) const TEST_PRODUCT: &str = "prod_3";
/// What the ids of as many more products of `team_1` in live mode begin with as a test wants.
pub(crate) const ONE_OF_MANY: &str = "prod_many_";

/// A catalogue in which `team_1` has two products in live mode, and one in test mode.
struct TwoProducts;

#[tonic::async_trait]
impl CatalogService for TwoProducts {
    async fn get_product(&self, request: Request<GetProductRequest>) -> Result<Response<GetProductResponse>, Status> {
        let tenant = Caller::of(&request)?.tenant()?;
        let id = request.into_inner().id;
        let of_mode: &[&str] = if tenant.mode == Mode::Live { &[PRODUCT, OTHER_PRODUCT] } else { &[TEST_PRODUCT] };
        let is_one_of_many = tenant.mode == Mode::Live && id.starts_with(ONE_OF_MANY);
        if !(of_mode.contains(&id.as_str()) || is_one_of_many) || tenant.team_id != "team_1" {
            return Err(Error::not_found("product").into());
        }
        Ok(Response::new(GetProductResponse { product: Some(Product { id, ..Product::default() }) }))
    }

    async fn create_product(
        &self,
        _: Request<catalog::CreateProductRequest>,
    ) -> Result<Response<catalog::CreateProductResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn list_products(
        &self,
        _: Request<catalog::ListProductsRequest>,
    ) -> Result<Response<catalog::ListProductsResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn update_product(
        &self,
        _: Request<catalog::UpdateProductRequest>,
    ) -> Result<Response<catalog::UpdateProductResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn delete_product(
        &self,
        _: Request<catalog::DeleteProductRequest>,
    ) -> Result<Response<catalog::DeleteProductResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }
}

/// Auth, as it takes events over: not at the first time.
#[derive(Default)]
struct Auth {
    told: Arc<Mutex<Vec<Event>>>,
    asked: AtomicUsize,
}

#[tonic::async_trait]
impl IntakeService for Auth {
    async fn ingest_events(
        &self,
        request: Request<IngestEventsRequest>,
    ) -> Result<Response<IngestEventsResponse>, Status> {
        if self.asked.fetch_add(1, Ordering::SeqCst) == 0 {
            return Err(Error::unavailable("just starting").into());
        }
        self.told.lock().expect("nobody panics").extend(request.into_inner().events);
        Ok(Response::new(IngestEventsResponse {}))
    }
}

/// The service, running.
pub(crate) struct World {
    pub(crate) database: Database,
    told_to_auth: Arc<Mutex<Vec<Event>>>,
    channel: Channel,
    signer: Signer,
    clock: Clock,
    running: Option<(ShutdownHandle, Vec<JoinHandle<()>>)>,
}

impl World {
    /// The service with its workers.
    pub(crate) fn on(database: Database, config: WebhookConfig) -> Self {
        let (mut world, workers) = Self::assembled(database, config);
        let (handle, signal) = shutdown::channel();
        let running = workers.into_iter().map(|worker| tokio::spawn(worker.run(signal.clone()))).collect();
        world.running = Some((handle, running));
        world
    }

    /// The service without its workers: nothing is sent.
    pub(crate) fn idle(database: Database, config: WebhookConfig) -> Self {
        Self::assembled(database, config).0
    }

    fn assembled(database: Database, config: WebhookConfig) -> (Self, Vec<paperkey_kit::service::Worker>) {
        let clock = Clock::system();
        let keys = Keyring::for_tests();
        let signer = Signer::new(&keys, clock.clone());
        let guarded = |rpcs| Guarded::new(rpcs, signer.clone(), clock.clone(), None, Some(database.clone()));
        let catalog = Channel::local();
        catalog.bind(guarded(Rpcs::new(CatalogServiceServer::new(TwoProducts))));
        let mut channels = Channels::default();
        channels.insert("catalog", catalog);
        let (auth, taking) = (Channel::local(), Auth::default());
        let told_to_auth = Arc::clone(&taking.told);
        auth.bind(guarded(Rpcs::new(IntakeServiceServer::new(taking))));
        channels.insert("auth", auth);
        let deps =
            ServiceDeps { database: database.clone(), keys, clock: clock.clone(), signer: signer.clone(), channels };
        let assembled = assemble(deps, config).expect("it assembles");
        let channel = Channel::local();
        channel.bind(guarded(assembled.rpcs));
        (Self { database, told_to_auth, channel, signer, clock, running: None }, assembled.workers)
    }

    /// What auth was told so far.
    pub(crate) fn told_to_auth(&self) -> Vec<Event> {
        self.told_to_auth.lock().expect("nobody panics").clone()
    }

    /// Ends the workers as a process would, and waits for them.
    pub(crate) async fn shut_down(mut self) {
        if let Some((handle, running)) = self.running.take() {
            handle.shut_down();
            for worker in running {
                within(worker).await.expect("a worker does not panic");
            }
        }
    }

    /// A client of that caller.
    pub(crate) fn client(&self, principal: Principal) -> WebhookServiceClient<As> {
        WebhookServiceClient::new(self.way(principal))
    }

    /// The way of that caller to the service.
    pub(crate) fn way(&self, principal: Principal) -> As {
        let (channel, signer) = (self.channel.clone(), self.signer.clone());
        As { channel, signer, principal }
    }

    /// A client of the owner of `team_1`, in live mode.
    pub(crate) fn owner(&self) -> WebhookServiceClient<As> {
        self.client(account("team_1", Mode::Live, Role::Owner))
    }

    /// A new endpoint of `prod_1` for all events of licences, and its secret.
    pub(crate) async fn endpoint(&self, url: &str) -> (Webhook, String) {
        self.endpoint_for(url, &["license.created", "license.updated"]).await
    }

    /// A new endpoint of `prod_1`, and its secret.
    pub(crate) async fn endpoint_for(&self, url: &str, events: &[&str]) -> (Webhook, String) {
        let events = events.iter().map(ToString::to_string).collect();
        let request = CreateWebhookRequest {
            product_id: PRODUCT.into(),
            url: url.into(),
            events,
            ..CreateWebhookRequest::default()
        };
        let response = self.owner().create_webhook(request).await.expect("it is created").into_inner();
        (response.webhook.expect("it is answered"), response.secret)
    }

    /// Hands events over, as the relay of another service would.
    pub(crate) async fn ingest(&self, events: Vec<Event>) {
        let way = self.channel.as_service("licensing", self.signer.clone(), None);
        IntakeServiceClient::new(way).ingest_events(IngestEventsRequest { events }).await.expect("it is taken over");
    }

    /// A new event of `prod_1`.
    pub(crate) fn event(&self, topic: &str) -> Event {
        Event {
            id: new_id("evt", &self.clock),
            topic: topic.into(),
            team_id: "team_1".into(),
            mode: Mode::Live.into(),
            product_id: PRODUCT.into(),
            created_at_ms: 1_798_675_200_000,
            data_json: r#"{"id":"lic_1", "key":"K7WX9"}"#.into(),
            traceparent: String::new(),
        }
    }

    /// A new endpoint of `team_1`, live, and its secret.
    pub(crate) async fn team_endpoint(&self, url: &str, events: &[&str]) -> (Webhook, String) {
        let events = events.iter().map(ToString::to_string).collect();
        let request = CreateWebhookRequest { url: url.into(), events, ..CreateWebhookRequest::default() };
        let response = self.owner().create_webhook(request).await.expect("it is created").into_inner();
        (response.webhook.expect("it is answered"), response.secret)
    }

    /// A new event of `team_1` itself.
    pub(crate) fn team_event(&self, topic: &str, mode: Mode) -> Event {
        Event {
            mode: mode.into(),
            product_id: String::new(),
            data_json: r#"{"id":"key_1","name":"CI","prefix":"pk_live_abcd","mode":"live","expiresAt":null}"#.into(),
            ..self.event(topic)
        }
    }

    /// Hands a new event over, and answers its id.
    pub(crate) async fn happens(&self, topic: &str) -> String {
        let event = self.event(topic);
        let id = event.id.clone();
        self.ingest(vec![event]).await;
        id
    }

    pub(crate) async fn webhook(&self, id: &str) -> Webhook {
        let request =
            GetWebhookRequest { product_id: PRODUCT.into(), webhook_id: id.into(), ..GetWebhookRequest::default() };
        self.owner().get_webhook(request).await.expect("it is there").into_inner().webhook.expect("it is answered")
    }

    pub(crate) async fn deliveries(&self, webhook_id: &str) -> Vec<Delivery> {
        let request = ListDeliveriesRequest {
            product_id: PRODUCT.into(),
            webhook_id: webhook_id.into(),
            page_size: Some(100),
            ..ListDeliveriesRequest::default()
        };
        self.owner().list_deliveries(request).await.expect("they are there").into_inner().deliveries
    }

    /// The one delivery of an endpoint.
    pub(crate) async fn only_delivery(&self, webhook_id: &str) -> GetDeliveryResponse {
        let deliveries = self.deliveries(webhook_id).await;
        let [delivery] = deliveries.as_slice() else { panic!("one delivery, not {deliveries:?}") };
        let request = GetDeliveryRequest {
            product_id: PRODUCT.into(),
            webhook_id: webhook_id.into(),
            delivery_id: delivery.id.clone(),
            ..GetDeliveryRequest::default()
        };
        self.owner().get_delivery(request).await.expect("it is there").into_inner()
    }

    /// Waits until all deliveries of an endpoint have that status.
    pub(crate) async fn until_all(&self, webhook_id: &str, status: DeliveryStatus) {
        until(async || {
            let deliveries = self.deliveries(webhook_id).await;
            !deliveries.is_empty() && deliveries.iter().all(|delivery| delivery.status() == status)
        })
        .await;
    }

    /// Waits until the only delivery of an endpoint has been tried so often, and answers it.
    pub(crate) async fn until_tried(&self, webhook_id: &str, attempts: i32) -> GetDeliveryResponse {
        until(async || self.only_delivery(webhook_id).await.delivery.unwrap().attempts_count >= attempts).await;
        self.only_delivery(webhook_id).await
    }

    pub(crate) async fn set_status(&self, webhook_id: &str, status: WebhookStatus) {
        let request = UpdateWebhookRequest {
            product_id: PRODUCT.into(),
            webhook_id: webhook_id.into(),
            status: status.into(),
            ..UpdateWebhookRequest::default()
        };
        self.owner().update_webhook(request).await.expect("it is changed");
    }
}

/// A person in a team.
pub(crate) fn account(team: &str, mode: Mode, role: Role) -> Principal {
    Principal {
        kind: Kind::Account.into(),
        id: "usr_1".into(),
        user_id: "usr_1".into(),
        team_id: team.into(),
        mode: mode.into(),
        role: role.into(),
        ..Principal::default()
    }
}

/// A product's secret key.
pub(crate) fn secret_key(product: &str) -> Principal {
    Principal {
        kind: Kind::ProductSecretKey.into(),
        id: "key_1".into(),
        team_id: "team_1".into(),
        mode: Mode::Live.into(),
        product_id: product.into(),
        scopes: vec![Scope::WebhooksRead.into(), Scope::WebhooksWrite.into(), Scope::LicensesRead.into()],
        ..Principal::default()
    }
}

/// Why a call was refused.
pub(crate) fn refusal<T: std::fmt::Debug>(outcome: Result<T, Status>) -> Error {
    Error::from_status(&outcome.expect_err("it is refused"))
}

/// The reason for which a call was refused.
pub(crate) fn reason<T: std::fmt::Debug>(outcome: Result<T, Status>) -> Reason {
    refusal(outcome).reason()
}

/// What a receiver got.
#[derive(Debug)]
pub(crate) struct Received {
    pub(crate) headers: HeaderMap,
    pub(crate) path: String,
    pub(crate) body: Bytes,
}

impl Received {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).unwrap_or_else(|| panic!("there is {name}")).to_str().expect("it is text")
    }

    /// The id of the event in the body.
    pub(crate) fn event_id(&self) -> String {
        let body: serde_json::Value = serde_json::from_slice(&self.body).expect("it is JSON");
        body["id"].as_str().expect("it has an id").to_owned()
    }
}

/// How a receiver answers.
#[derive(Clone)]
pub(crate) enum Reply {
    Status(u16),
    /// With a header and a body.
    With(u16, &'static str, String, Vec<u8>),
    /// A body that goes on as long as someone reads.
    Endless,
    /// A body of which one byte comes and then nothing.
    Stuck,
    /// 200, as soon as the gate is opened for it.
    Gated(Arc<Semaphore>),
}

/// A receiver on a socket of this machine.
pub(crate) struct Receiver {
    pub(crate) address: SocketAddr,
    received: mpsc::UnboundedReceiver<Received>,
    shared: Arc<Shared>,
    server: JoinHandle<()>,
}

struct Shared {
    replies: Mutex<VecDeque<Reply>>,
    otherwise: Mutex<Reply>,
    inside: AtomicUsize,
    most_inside: AtomicUsize,
    received: mpsc::UnboundedSender<Received>,
}

impl Receiver {
    /// Answers the first requests as listed and all others with the last of these.
    pub(crate) async fn start(replies: &[Reply]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        let (sender, received) = mpsc::unbounded_channel();
        let otherwise = replies.last().cloned().unwrap_or(Reply::Status(200));
        let shared = Arc::new(Shared {
            replies: Mutex::new(replies.iter().take(replies.len().saturating_sub(1)).cloned().collect()),
            otherwise: Mutex::new(otherwise),
            inside: AtomicUsize::new(0),
            most_inside: AtomicUsize::new(0),
            received: sender,
        });
        let serving = Arc::clone(&shared);
        let server = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let shared = Arc::clone(&serving);
                tokio::spawn(async move {
                    let service = service_fn(move |request| answer(Arc::clone(&shared), request));
                    // A sender who goes away in the middle is what some tests are about.
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { address, received, shared, server }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/hook", self.address)
    }

    /// Answers all further requests like that.
    pub(crate) fn answers(&self, reply: Reply) {
        self.shared.replies.lock().unwrap().clear();
        *self.shared.otherwise.lock().unwrap() = reply;
    }

    /// The next that comes.
    pub(crate) async fn next(&mut self) -> Received {
        within(self.received.recv()).await.expect("the receiver lives")
    }

    /// All that has come and was not looked at.
    pub(crate) fn rest(&mut self) -> Vec<Received> {
        let mut rest = Vec::new();
        while let Ok(received) = self.received.try_recv() {
            rest.push(received);
        }
        rest
    }

    /// How many were inside at the same time at most.
    pub(crate) fn most_inside(&self) -> usize {
        self.shared.most_inside.load(Ordering::SeqCst)
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.server.abort();
    }
}

type Answered = HttpResponse<BoxBody<Bytes, Infallible>>;

struct Inside(Arc<Shared>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
    }
}

async fn answer(shared: Arc<Shared>, request: HttpRequest<Incoming>) -> Result<Answered, hyper::Error> {
    let inside = shared.inside.fetch_add(1, Ordering::SeqCst) + 1;
    shared.most_inside.fetch_max(inside, Ordering::SeqCst);
    let _inside = Inside(Arc::clone(&shared));
    let (parts, body) = request.into_parts();
    let body = body.collect().await?.to_bytes();
    let path = parts.uri.path_and_query().map_or("", |path| path.as_str()).to_owned();
    let _ = shared.received.send(Received { headers: parts.headers, path, body });
    let next = shared.replies.lock().unwrap().pop_front();
    let reply = next.unwrap_or_else(|| shared.otherwise.lock().unwrap().clone());
    let full = |body: Vec<u8>| Full::new(Bytes::from(body)).boxed();
    let (status, body) = match reply {
        Reply::Status(status) => (status, full(format!("said {status}").into_bytes())),
        Reply::With(status, name, value, body) => {
            let mut response = HttpResponse::new(full(body));
            *response.status_mut() = StatusCode::from_u16(status).unwrap();
            response.headers_mut().insert(name, value.parse().unwrap());
            return Ok(response);
        }
        Reply::Endless => (200, Flow { left: None }.boxed()),
        Reply::Stuck => (200, Flow { left: Some(1) }.boxed()),
        Reply::Gated(gate) => {
            gate.acquire().await.unwrap().forget();
            (200, full(Vec::new()))
        }
    };
    let mut response = HttpResponse::new(body);
    *response.status_mut() = StatusCode::from_u16(status).unwrap();
    Ok(response)
}

/// A body that never ends.
struct Flow {
    /// How many pieces until it stops without ending.
    left: Option<usize>,
}

impl HttpBody for Flow {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match &mut self.left {
            None => Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&[b'x'; 4_096]))))),
            // Nobody will wake this up again, which is the point.
            Some(0) => Poll::Pending,
            Some(left) => {
                *left -= 1;
                Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"x")))))
            }
        }
    }
}

/// The same place under another name.
pub(crate) fn by_name(address: SocketAddr) -> String {
    let uri: Uri = format!("http://localhost:{}/hook", address.port()).parse().expect("it is a URL");
    uri.to_string()
}
