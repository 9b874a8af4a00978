//! A server that webhooks are sent to. It keeps what arrives, fails when it is told to, and checks signatures by itself.

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicU16, AtomicU64, Ordering},
    },
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::Bytes;
use hmac::{Hmac, KeyInit as _, Mac as _};
use http::{HeaderMap, Request, Response, header};
use http_body_util::{BodyExt as _, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use sha2::Sha256;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};

use crate::wait::GENEROUS;

/// One request that arrived.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// Its headers.
    pub headers: HeaderMap,
    /// Its body, byte for byte.
    pub body: Bytes,
    /// Its body as JSON.
    pub json: Value,
    /// What it was answered.
    pub answered: u16,
}

/// How it answers.
#[derive(Debug)]
struct Manners {
    status: AtomicU16,
    /// Seconds after which to try again; none where 0.
    retry_after: AtomicU64,
}

/// A local webhook receiver.
#[derive(Debug)]
pub struct Receiver {
    url: String,
    arrived: watch::Receiver<Vec<Delivery>>,
    manners: Arc<Manners>,
    serving: JoinHandle<()>,
}

impl Receiver {
    /// Listens on a port of its own, and answers 200.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
        let url = format!("http://{}/hook", listener.local_addr().expect("it is bound"));
        let (keep, arrived) = watch::channel(Vec::new());
        let keep = Arc::new(keep);
        let manners = Arc::new(Manners { status: AtomicU16::new(200), retry_after: AtomicU64::new(0) });
        let of_server = Arc::clone(&manners);
        let serving = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (keep, manners) = (Arc::clone(&keep), Arc::clone(&of_server));
                let service = service_fn(move |request| receive(request, Arc::clone(&keep), Arc::clone(&manners)));
                tokio::spawn(async move {
                    // A sender that is killed cuts its connection.
                    let _ = http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        Self { url, arrived, manners, serving }
    }

    /// Where it listens.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// What it answers from now on.
    pub fn answers(&self, status: u16) {
        self.answers_later(status, 0);
    }

    /// The same, asking to be left alone for so many seconds.
    pub fn answers_later(&self, status: u16, retry_after_s: u64) {
        self.manners.retry_after.store(retry_after_s, Ordering::SeqCst);
        self.manners.status.store(status, Ordering::SeqCst);
    }

    /// What has arrived so far.
    pub fn deliveries(&self) -> Vec<Delivery> {
        self.arrived.borrow().clone()
    }

    /// Waits until what has arrived is enough.
    pub async fn wait<T>(&self, what: &str, enough: impl Fn(&[Delivery]) -> Option<T>) -> T {
        let mut arrived = self.arrived.clone();
        let waiting = async {
            loop {
                if let Some(found) = enough(&arrived.borrow_and_update()) {
                    return found;
                }
                arrived.changed().await.expect("the receiver is there");
            }
        };
        let found = tokio::time::timeout(GENEROUS, waiting).await;
        let Ok(found) = found else {
            panic!("{what} did not arrive within {GENEROUS:?}; what did: {:#?}", self.names())
        };
        found
    }

    /// Waits until so many deliveries have arrived.
    pub async fn received(&self, count: usize) -> Vec<Delivery> {
        self.wait(&format!("{count} deliveries"), |arrived| (arrived.len() >= count).then(|| arrived.to_vec())).await
    }

    fn names(&self) -> Vec<String> {
        self.deliveries().iter().map(|delivery| format!("{} {}", delivery.event(), delivery.json["id"])).collect()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

async fn receive(
    request: Request<Incoming>,
    keep: Arc<watch::Sender<Vec<Delivery>>>,
    manners: Arc<Manners>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, retry_after_s) = (manners.status.load(Ordering::SeqCst), manners.retry_after.load(Ordering::SeqCst));
    let (head, body) = request.into_parts();
    // A body that was cut off is no delivery: the sender was killed, and sends it again.
    if let Ok(body) = body.collect().await {
        let body = body.to_bytes();
        let json = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let delivery = Delivery { headers: head.headers, body, json, answered: status };
        keep.send_modify(|arrived| arrived.push(delivery));
    }
    let mut response = Response::new(Full::new(Bytes::from_static(b"thank you")));
    *response.status_mut() = status.try_into().expect("tests name statuses that exist");
    if retry_after_s > 0 {
        response.headers_mut().insert(header::RETRY_AFTER, retry_after_s.into());
    }
    Ok(response)
}

impl Delivery {
    /// A header's text.
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The event, as the header names it.
    pub fn event(&self) -> &str {
        self.header("x-paperkey-event")
    }

    /// The `evt_…` of the event.
    pub fn event_id(&self) -> &str {
        self.json["id"].as_str().unwrap_or_default()
    }

    /// Whether one of the signatures by Standard Webhooks is that of this secret.
    #[track_caller]
    pub fn is_signed_by_the_standard_with(&self, secret: &str) -> bool {
        let key = secret.strip_prefix("whsec_").and_then(|key| BASE64.decode(key).ok());
        let key = key.expect("a secret is whsec_ and base 64");
        assert!((24..=64).contains(&key.len()), "a key has 24 to 64 bytes, not {}", key.len());
        let (id, timestamp) = (self.header("webhook-id"), self.header("webhook-timestamp"));
        let signed = hmac(&key, &[id.as_bytes(), b".", timestamp.as_bytes(), b".", &self.body]);
        let expected = format!("v1,{}", BASE64.encode(signed));
        self.header("webhook-signature").split(' ').any(|signature| signature == expected)
    }

    /// Both signatures must be good, and headers and body must say the same.
    #[track_caller]
    pub fn is_signed_with(&self, secret: &str) {
        let expected = hex(&hmac(secret.as_bytes(), &[&self.body]));
        assert_eq!(self.header("x-paperkey-signature"), expected, "the signature of the body");
        let signatures = self.header("webhook-signature");
        assert!(self.is_signed_by_the_standard_with(secret), "{signatures} is of another secret");
        let (id, timestamp) = (self.header("webhook-id"), self.header("webhook-timestamp"));

        assert!(id.starts_with("dlv_"), "{id}");
        assert_eq!(self.header("x-paperkey-delivery"), id);
        assert!(timestamp.parse::<u64>().is_ok_and(|seconds| seconds > 1_700_000_000), "{timestamp}");
        assert_eq!(self.json["event"], self.event());
        assert!(self.event_id().starts_with("evt_"), "{}", self.json);
        assert_eq!(self.header("content-type"), "application/json");
    }
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    for part in parts {
        mac.update(part);
    }
    mac.finalize().into_bytes().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signatures_are_those_of_the_published_vectors() {
        assert_eq!(
            hex(&hmac(b"It's a Secret to Everybody", &[b"Hello, World!"])),
            "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
        );
        let key = BASE64.decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let signed = hmac(&key, &[b"msg_p5jXN8AQM9LWM0D4loKWxJek.1614265330.", b"{\"test\": 2432232314}"]);
        assert_eq!(BASE64.encode(signed), "g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }
}
