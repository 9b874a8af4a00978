//! A client before several gateways that behaves as a balancer does, and keeps book of what each call came to.
//!
//! It asks each gateway whether it is ready, and sends new calls to those that are. What could not be sent it sends to
//! another one. What was sent and came to nothing, or was answered 503 with a time to come back, it sends to another one
//! only where the call may be repeated: never a change that has no `Idempotency-Key`.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use serde_json::Value;
use tokio::task::JoinHandle;

/// How long a connection may take to open.
const CONNECT: Duration = Duration::from_secs(1);
/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(5);
/// How often a call is tried at most.
const ATTEMPTS: usize = 3;
/// How often gateways are asked whether they are ready, and how long they have to say so.
const ASKED_EVERY: Duration = Duration::from_millis(200);
const ASKED_FOR: Duration = Duration::from_secs(1);

/// A call, ready to be made more than once.
#[derive(Clone, Debug)]
pub struct Call {
    /// The verb.
    pub verb: Method,
    /// The path.
    pub path: String,
    /// The credential.
    pub token: String,
    /// The body, as JSON.
    pub json: Option<Value>,
    /// What keeps a change from being made twice.
    pub idempotency_key: Option<String>,
    /// Whether it changes nothing, so that it may be made again.
    pub reads: bool,
}

/// What came of one attempt.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// At which gateway.
    pub gateway: usize,
    /// The status; none where there was no answer.
    pub status: Option<u16>,
    /// The answer's JSON.
    pub json: Value,
    /// Why there was no answer.
    pub cut: Option<String>,
    /// Whether something was sent.
    pub sent: bool,
    /// Whether the answer names a time to come back.
    retry_after: bool,
}

/// What came of a call.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// When it was made.
    pub began: Instant,
    /// When the last attempt ended.
    pub ended: Instant,
    /// Every attempt; the last is what the caller was told.
    pub attempts: Vec<Attempt>,
}

impl Outcome {
    /// What the caller was told.
    pub fn last(&self) -> &Attempt {
        self.attempts.last().expect("a call is tried at least once")
    }
}

impl Attempt {
    /// What it came to, in a few words.
    pub fn said(&self) -> String {
        let reason = ["/error/reason", "/error/code", "/code", "/error"];
        let reason = reason.iter().find_map(|pointer| self.json.pointer(pointer)?.as_str());
        match (self.status, &self.cut) {
            (Some(status), _) => format!("{status} {}", reason.unwrap_or_default()),
            (None, cut) => cut.clone().unwrap_or_default(),
        }
    }
}

/// The balancer.
#[derive(Debug)]
pub struct Balancer {
    gateways: Vec<Gateway>,
    next: AtomicUsize,
    asking: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Gateway {
    base: String,
    client: Client<HttpConnector, Full<Bytes>>,
    ready: Arc<AtomicBool>,
}

impl Balancer {
    /// Before these gateways: where they serve, and where they say whether they are ready.
    pub fn before(gateways: &[(String, String)]) -> Self {
        let mut asking = Vec::new();
        let gateways = gateways
            .iter()
            .map(|(base, operations)| {
                let ready = Arc::new(AtomicBool::new(true));
                asking.push(tokio::spawn(ask(format!("{operations}/readyz"), Arc::clone(&ready))));
                Gateway { base: base.clone(), client: client(), ready }
            })
            .collect();
        Self { gateways, next: AtomicUsize::new(0), asking }
    }

    /// Makes a call at whichever gateway is ready, and again where that is allowed.
    pub async fn call(&self, call: &Call) -> Outcome {
        let began = Instant::now();
        let may_be_repeated = call.reads || call.idempotency_key.is_some();
        let mut attempts: Vec<Attempt> = Vec::new();
        loop {
            let attempt = self.attempt(self.choose(attempts.last().map(|last| last.gateway)), call, ATTEMPT).await;
            let again = match attempt.status {
                None => !attempt.sent || may_be_repeated,
                Some(status) => status == 503 && attempt.retry_after && may_be_repeated,
            };
            attempts.push(attempt);
            if !again || attempts.len() == ATTEMPTS {
                return Outcome { began, ended: Instant::now(), attempts };
            }
        }
    }

    /// Makes a call once, at one gateway.
    pub async fn call_at(&self, gateway: usize, call: &Call, limit: Duration) -> Outcome {
        let began = Instant::now();
        let attempts = vec![self.attempt(gateway, call, limit).await];
        Outcome { began, ended: Instant::now(), attempts }
    }

    /// How many gateways there are.
    pub fn len(&self) -> usize {
        self.gateways.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.gateways.is_empty()
    }

    /// In turn; not the one that has just failed, and one that is ready if any is.
    fn choose(&self, failed: Option<usize>) -> usize {
        let turn = self.next.fetch_add(1, Ordering::Relaxed);
        let in_turn = (0..self.gateways.len()).map(|step| (turn + step) % self.gateways.len());
        let others: Vec<usize> = in_turn.filter(|gateway| Some(*gateway) != failed).collect();
        let ready = others.iter().find(|gateway| self.gateways[**gateway].ready.load(Ordering::Relaxed));
        ready.or_else(|| others.first()).copied().unwrap_or_default()
    }

    async fn attempt(&self, at: usize, call: &Call, limit: Duration) -> Attempt {
        let gateway = &self.gateways[at];
        let mut request = Request::builder()
            .method(call.verb.clone())
            .uri(format!("{}{}", gateway.base, call.path))
            .header(header::AUTHORIZATION, format!("Bearer {}", call.token));
        if let Some(key) = &call.idempotency_key {
            request = request.header("idempotency-key", key);
        }
        if call.json.is_some() {
            request = request.header(header::CONTENT_TYPE, "application/json");
        }
        let body = call.json.as_ref().map(Value::to_string).unwrap_or_default();
        let request = request.body(Full::new(Bytes::from(body))).expect("tests name what exists");
        let exchange = async {
            let response = gateway.client.request(request).await.map_err(|error| {
                let sent = !error.is_connect();
                (sent, if sent { "cut off".to_owned() } else { "not connected".to_owned() })
            })?;
            let (head, body) = response.into_parts();
            let body = body.collect().await.map_err(|_| (true, "cut off in the answer".to_owned()))?.to_bytes();
            Ok((head, serde_json::from_slice(&body).unwrap_or(Value::Null)))
        };
        let attempt =
            Attempt { gateway: at, status: None, json: Value::Null, cut: None, sent: true, retry_after: false };
        match tokio::time::timeout(limit, exchange).await {
            Err(_) => Attempt { cut: Some("no answer in time".to_owned()), ..attempt },
            Ok(Err((sent, cut))) => Attempt { cut: Some(cut), sent, ..attempt },
            Ok(Ok((head, json))) => {
                let retry_after = head.headers.contains_key(header::RETRY_AFTER);
                Attempt { status: Some(head.status.as_u16()), json, retry_after, ..attempt }
            }
        }
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        for asking in &self.asking {
            asking.abort();
        }
    }
}

fn client() -> Client<HttpConnector, Full<Bytes>> {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT));
    Client::builder(TokioExecutor::new()).build(connector)
}

/// Asks again and again whether a gateway is ready.
async fn ask(url: String, ready: Arc<AtomicBool>) {
    let client = client();
    loop {
        let request = Request::get(&url).body(Full::default()).expect("it is a URL");
        let answered = tokio::time::timeout(ASKED_FOR, client.request(request)).await;
        ready.store(answered.is_ok_and(|answer| answer.is_ok_and(|it| it.status() == 200)), Ordering::Relaxed);
        tokio::time::sleep(ASKED_EVERY).await;
    }
}
