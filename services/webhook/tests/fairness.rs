//! Many events to many endpoints, of which some hang, some refuse and some fail: the others must not notice.
//!
//! What is shown: of fifty endpoints of ten products, twenty go bad. While each product's events keep coming, at the rate
//! at which the healthy endpoints take them, those get everything, and in the time in which they got it before: of a
//! hundred, ninety-nine within a second, or, where the machine was slow even then, within five times as long as before.
//! A receiver that hangs does so for five seconds, so one that waited for it would be found out. Each bad endpoint
//! is paused by ten failures and told of once, and what was held for it arrives when it is resumed.
//!
//! How fast events are fed follows from how many are on their way, and never from a clock.

mod common;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    convert::Infallible,
    io::Write as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use common::{ONE_OF_MANY, World, lax};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use paperkey_kit::{db::Database, testing};
use paperkey_migrations::webhook::Migrator;
use paperkey_proto::{
    events::v1::Event,
    webhook::v1::{CreateWebhookRequest, GetWebhookRequest, UpdateWebhookRequest, Webhook, WebhookStatus},
};
use paperkey_webhook::WebhookConfig;
use tokio::net::{TcpSocket, UdpSocket};

const PRODUCTS: usize = 10;
const ENDPOINTS: usize = 50;
const HANGING: usize = 10;
const REFUSING: usize = 5;
const FAILING: usize = 5;
const BAD: usize = HANGING + REFUSING + FAILING;
/// Events of each product that are handed over at once.
const BATCH: usize = 5;
/// Deliveries to healthy endpoints that may be on their way when more events are handed over.
const ON_THE_WAY: usize = 200;
/// Far longer than anything takes.
const PATIENCE: Duration = Duration::from_mins(3);

/// How a receiver behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mood {
    Well,
    Hanging,
    Failing,
    /// Nobody listens.
    Refusing,
}

/// What a receiver has got, and how it behaves.
struct Sink {
    mood: Mutex<Mood>,
    got: Mutex<HashMap<String, Got>>,
    /// Of all healthy receivers together.
    arrived: Arc<AtomicUsize>,
}

/// What came of one event.
struct Got {
    deliveries: HashSet<String>,
    first_ms: i64,
}

impl Sink {
    fn mood(&self) -> Mood {
        *self.mood.lock().unwrap()
    }

    async fn answer(&self, request: Request<Incoming>) -> Response<Empty<bytes::Bytes>> {
        let (parts, body) = request.into_parts();
        let Ok(body) = body.collect().await else { return Response::default() };
        let body = body.to_bytes();
        match self.mood() {
            Mood::Hanging => std::future::pending().await,
            Mood::Failing | Mood::Refusing => {
                let mut response = Response::default();
                *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                response
            }
            Mood::Well => {
                // The id comes first.
                let id = body.split(|byte| *byte == b'"').nth(3).expect("it has an id");
                let id = String::from_utf8(id.to_vec()).expect("an id is text");
                let delivery = parts.headers["webhook-id"].to_str().expect("an id is text").to_owned();
                let mut got = self.got.lock().unwrap();
                let of_event = got.entry(id).or_insert_with(|| {
                    self.arrived.fetch_add(1, Ordering::SeqCst);
                    Got { deliveries: HashSet::new(), first_ms: now_ms() }
                });
                of_event.deliveries.insert(delivery);
                Response::default()
            }
        }
    }
}

/// A receiver on a socket of this machine.
struct Receiver {
    product: String,
    webhook: Webhook,
    sink: Arc<Sink>,
    /// The port of one that refuses.
    refusing: Option<TcpSocket>,
}

fn now_ms() -> i64 {
    i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis()).unwrap()
}

/// A port that is taken, and on which nobody listens yet.
fn bound() -> TcpSocket {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
    socket
}

fn serve(socket: TcpSocket, sink: Arc<Sink>) {
    let listener = socket.listen(1_024).unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let sink = Arc::clone(&sink);
            tokio::spawn(async move {
                let service = service_fn(move |request| {
                    let sink = Arc::clone(&sink);
                    async move { Ok::<_, Infallible>(sink.answer(request).await) }
                });
                let mut builder = http1::Builder::new();
                // Who goes away in the middle is what this is about.
                let _ = builder.timer(TokioTimer::new()).serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
}

/// Waits for something that must happen, and says what did not.
async fn until(what: &str, mut asks: impl AsyncFnMut() -> bool) {
    let waiting = async {
        while !asks().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    assert!(tokio::time::timeout(PATIENCE, waiting).await.is_ok(), "not in time: {what}");
}

struct Fair {
    world: World,
    receivers: Vec<Receiver>,
    /// When each event was made, by its product.
    fed: BTreeMap<String, HashMap<String, i64>>,
    arrived: Arc<AtomicUsize>,
    expected: usize,
}

impl Fair {
    async fn start(database: Database) -> Self {
        // Nothing is tried for the last time here, and nothing waits for minutes.
        let config = WebhookConfig { retry_schedule_s: [0, 1].into_iter().chain([5; 98]).collect(), ..lax(1) };
        let world = World::on(database, config);
        let (arrived, nobody) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let mut receivers = Vec::new();
        for number in 0..ENDPOINTS {
            let socket = bound();
            let address = socket.local_addr().unwrap();
            let arrived = Arc::clone(if number < BAD { &nobody } else { &arrived });
            let sink = Arc::new(Sink { mood: Mutex::new(Mood::Well), got: Mutex::default(), arrived });
            let refusing = if (HANGING..HANGING + REFUSING).contains(&number) {
                *sink.mood.lock().unwrap() = Mood::Refusing;
                Some(socket)
            } else {
                serve(socket, Arc::clone(&sink));
                None
            };
            let product = format!("{ONE_OF_MANY}{}", number % PRODUCTS);
            let request = CreateWebhookRequest {
                product_id: product.clone(),
                url: format!("http://{address}/hook"),
                events: vec!["license.created".into()],
                ..CreateWebhookRequest::default()
            };
            let webhook = world.owner().create_webhook(request).await.unwrap().into_inner().webhook.unwrap();
            receivers.push(Receiver { product, webhook, sink, refusing });
        }
        Self { world, receivers, fed: BTreeMap::new(), arrived, expected: 0 }
    }

    fn healthy(&self) -> &[Receiver] {
        &self.receivers[BAD..]
    }

    fn bad(&self) -> &[Receiver] {
        &self.receivers[..BAD]
    }

    /// Hands so many events over, as fast as the healthy receivers get them, and waits until they have all. Answers how
    /// long the slowest but one of a hundred took, in milliseconds.
    async fn feed(&mut self, events: usize) -> i64 {
        let before: HashSet<String> = self.fed.values().flat_map(HashMap::keys).cloned().collect();
        for _ in 0..events / (PRODUCTS * BATCH) {
            for product in 0..PRODUCTS {
                let (expected, arrived) = (self.expected, Arc::clone(&self.arrived));
                until("healthy endpoints take what comes", async || {
                    expected - arrived.load(Ordering::SeqCst) <= ON_THE_WAY
                })
                .await;
                let product = format!("{ONE_OF_MANY}{product}");
                let batch: Vec<Event> = (0..BATCH)
                    .map(|_| Event {
                        product_id: product.clone(),
                        created_at_ms: now_ms(),
                        ..self.world.event("license.created")
                    })
                    .collect();
                let fed = self.fed.entry(product.clone()).or_default();
                fed.extend(batch.iter().map(|event| (event.id.clone(), event.created_at_ms)));
                self.expected += BATCH * self.healthy().iter().filter(|healthy| healthy.product == product).count();
                self.world.ingest(batch).await;
            }
        }
        let (expected, arrived) = (self.expected, Arc::clone(&self.arrived));
        until("healthy endpoints have everything", async || arrived.load(Ordering::SeqCst) >= expected).await;
        let mut took = Vec::new();
        for healthy in self.healthy() {
            let got = healthy.sink.got.lock().unwrap();
            for (id, at_ms) in self.fed[&healthy.product].iter().filter(|(id, _)| !before.contains(*id)) {
                took.push(got[id].first_ms - at_ms);
            }
        }
        took.sort_unstable();
        took[took.len() * 99 / 100]
    }

    /// Holds that a receiver has each event of its product, under one id each.
    fn has_everything(&self, receiver: &Receiver) {
        let (fed, got) = (&self.fed[&receiver.product], receiver.sink.got.lock().unwrap());
        assert_eq!(got.len(), fed.len());
        for id in fed.keys() {
            assert_eq!(got.get(id).map(|got| got.deliveries.len()), Some(1), "{id}");
        }
    }

    async fn webhook(&self, receiver: &Receiver) -> Webhook {
        let request = GetWebhookRequest {
            product_id: receiver.product.clone(),
            webhook_id: receiver.webhook.id.clone(),
            ..GetWebhookRequest::default()
        };
        self.world.owner().get_webhook(request).await.unwrap().into_inner().webhook.unwrap()
    }

    /// How often auth was told that an endpoint was paused.
    fn pauses(&self) -> BTreeMap<String, usize> {
        let mut pauses = BTreeMap::new();
        for event in self.world.told_to_auth() {
            let data: serde_json::Value = serde_json::from_str(&event.data_json).unwrap();
            *pauses.entry(data["webhookId"].as_str().unwrap().to_owned()).or_default() += 1;
        }
        pauses
    }
}

async fn the_healthy_do_not_notice_the_others(database: Database, events: usize) {
    let mut fair = Fair::start(database).await;
    // Those that refuse do so from the beginning; all others are well.
    let before_ms = fair.feed(events / 10).await;
    for (number, bad) in fair.bad().iter().enumerate() {
        let mut mood = bad.sink.mood.lock().unwrap();
        if number < HANGING {
            *mood = Mood::Hanging;
        } else if *mood == Mood::Well {
            *mood = Mood::Failing;
        }
    }
    let during_ms = fair.feed(events - events / 10).await;
    let _ = writeln!(std::io::stderr(), "of a hundred, 99 within {before_ms} ms before, {during_ms} ms during");
    assert!(during_ms <= (before_ms * 5).max(1_000), "{before_ms} ms before, {during_ms} ms with bad ones beside");
    for healthy in fair.healthy() {
        fair.has_everything(healthy);
        assert_eq!(fair.webhook(healthy).await.status(), WebhookStatus::Active);
    }

    let expected: BTreeMap<String, usize> = fair.bad().iter().map(|bad| (bad.webhook.id.clone(), 1)).collect();
    until("all bad endpoints are paused", async || fair.pauses().len() >= BAD).await;
    assert_eq!(fair.pauses(), expected);
    for bad in fair.bad() {
        let webhook = fair.webhook(bad).await;
        assert_eq!(webhook.status(), WebhookStatus::Paused);
        // Those that were under way when the tenth failed are counted with it.
        assert!((10..20).contains(&webhook.consecutive_failures), "{webhook:?}");
    }

    for bad in &mut fair.receivers[..BAD] {
        *bad.sink.mood.lock().unwrap() = Mood::Well;
        if let Some(socket) = bad.refusing.take() {
            serve(socket, Arc::clone(&bad.sink));
        }
    }
    for bad in fair.bad() {
        let request = UpdateWebhookRequest {
            product_id: bad.product.clone(),
            webhook_id: bad.webhook.id.clone(),
            status: WebhookStatus::Active.into(),
            ..UpdateWebhookRequest::default()
        };
        fair.world.owner().update_webhook(request).await.unwrap();
    }
    until("what was held arrives", async || {
        let whole = |bad: &Receiver| bad.sink.got.lock().unwrap().len() >= fair.fed[&bad.product].len();
        fair.bad().iter().all(whole)
    })
    .await;
    for receiver in &fair.receivers {
        fair.has_everything(receiver);
        assert_eq!(fair.webhook(receiver).await.status(), WebhookStatus::Active);
    }
    assert_eq!(fair.pauses(), expected);
    fair.world.shut_down().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_events_on_sqlite() {
    testing::on_sqlite::<Migrator, _, _>(|database| the_healthy_do_not_notice_the_others(database, 10_000)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_thousand_events_on_postgres() {
    testing::on_postgres::<Migrator, _, _>(|database| the_healthy_do_not_notice_the_others(database, 2_000)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_nobody_answers_for_delay_no_other() {
    const NAMES: usize = 19;
    const EVENTS: usize = 100;
    testing::on_sqlite::<Migrator, _, _>(|database| async move {
        let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        // Far longer than the test may take: the others cannot have waited for one of these to end.
        let timeout_ms = 2 * u64::try_from(PATIENCE.as_millis()).unwrap();
        let name_servers = Some(vec![silent.local_addr().unwrap()]);
        let world = World::on(database, WebhookConfig { timeout_ms, name_servers, ..lax(1) });
        for number in 0..NAMES {
            world.endpoint(&format!("http://nobody-{number}.example/hook")).await;
        }
        let mut lively = common::Receiver::start(&[common::Reply::Status(200)]).await;
        world.endpoint(&lively.url()).await;
        for _ in 0..EVENTS / BATCH {
            world.ingest((0..BATCH).map(|_| world.event("license.created")).collect()).await;
        }
        for _ in 0..EVENTS {
            lively.next().await;
        }
        // Names were asked for, and nobody has been told anything.
        let mut question = [0; 512];
        assert!(silent.recv(&mut question).await.unwrap() > 12);
        // What is under way is waited for at the end of a process, and here it would be for long.
        drop(world);
    })
    .await;
}
