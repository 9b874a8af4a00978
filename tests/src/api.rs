//! An HTTP client that keeps its connections, sends what it is told to, and looks at every answer.

use std::{net::IpAddr, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Frame, Incoming};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use paperkey_proto::{Contract, errors::v1::Reason};
use serde_json::Value;

use crate::{envelope, http1::Connection, leaks::tokens_in};

/// How long an answer may take before the test fails.
const PATIENCE: Duration = Duration::from_mins(1);

/// A client of one listener, with the headers that it sends on every call.
#[derive(Clone, Debug)]
pub struct Api {
    base: String,
    client: Client<HttpConnector, Full<Bytes>>,
    headers: HeaderMap,
    public: bool,
}

/// What was answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// What was asked: verb and path.
    pub asked: String,
    /// The path without the query.
    pub path: String,
    /// The status.
    pub status: StatusCode,
    /// The headers.
    pub headers: HeaderMap,
    /// The body.
    pub body: Bytes,
    /// The body as JSON; null where it is none.
    pub json: Value,
}

impl Api {
    /// A client of a public listener. Every answer there bears a request id.
    pub fn new(base: &str) -> Self {
        Self { base: base.to_owned(), client: new_client(), headers: HeaderMap::new(), public: true }
    }

    /// A client of somebody else's listener, such as a proxy's.
    pub fn of_another(base: &str) -> Self {
        Self { public: false, ..Self::new(base) }
    }

    /// A client of an operations listener.
    pub fn of_operations(base: &str) -> Self {
        Self { public: false, ..Self::new(base) }
    }

    /// The same client, calling from another address of this machine, such as 127.0.0.5.
    #[must_use]
    pub fn from_address(&self, address: &str) -> Self {
        let address: IpAddr = address.parse().expect("tests name addresses that exist");
        Self { client: new_client_from(Some(address)), ..self.clone() }
    }

    /// The same client, with none of the connections it has.
    #[must_use]
    pub fn on_new_connections(&self) -> Self {
        Self { client: new_client(), ..self.clone() }
    }

    /// The same client with one more header on every call.
    #[must_use]
    pub fn with(&self, name: &'static str, value: &str) -> Self {
        let mut with = self.clone();
        let value = HeaderValue::from_str(value).expect("tests send what a header can hold");
        with.headers.insert(HeaderName::from_static(name), value);
        with
    }

    /// The same client with the JWT of an account.
    #[must_use]
    pub fn as_account(&self, token: &str) -> Self {
        self.with("authorization", &format!("Bearer {token}"))
    }

    /// The same client with a key.
    #[must_use]
    pub fn with_key(&self, key: &str) -> Self {
        self.as_account(key)
    }

    /// The same client, in the world of test data.
    #[must_use]
    pub fn in_test_mode(&self) -> Self {
        self.with("paperkey-mode", "test")
    }

    /// The same client, for a team.
    #[must_use]
    pub fn for_team(&self, team: &str) -> Self {
        self.with("paperkey-team", team)
    }

    /// `GET`
    pub async fn get(&self, path: &str) -> Answer {
        self.call(Method::GET, path, None).await
    }

    /// `GET`, where the listener may not be there.
    pub async fn try_get(&self, path: &str) -> Result<Answer, String> {
        self.try_call(Method::GET, path, None).await
    }

    /// `POST` with JSON.
    pub async fn post(&self, path: &str, json: Value) -> Answer {
        self.call(Method::POST, path, Some(json)).await
    }

    /// `POST` with JSON, where the listener may not be there.
    pub async fn try_post(&self, path: &str, json: Value) -> Result<Answer, String> {
        self.try_call(Method::POST, path, Some(json)).await
    }

    /// `PATCH` with JSON.
    pub async fn patch(&self, path: &str, json: Value) -> Answer {
        self.call(Method::PATCH, path, Some(json)).await
    }

    /// `DELETE`
    pub async fn delete(&self, path: &str) -> Answer {
        self.call(Method::DELETE, path, None).await
    }

    /// Any verb, with JSON or without a body.
    pub async fn call(&self, verb: Method, path: &str, json: Option<Value>) -> Answer {
        self.try_call(verb, path, json).await.unwrap_or_else(|cut| panic!("{cut}"))
    }

    /// Any verb, where the listener may not be there.
    pub async fn try_call(&self, verb: Method, path: &str, json: Option<Value>) -> Result<Answer, String> {
        let content_type = json.is_some().then_some("application/json");
        let body = json.map(|json| json.to_string()).unwrap_or_default();
        self.try_send(verb, path, content_type, body.into()).await
    }

    /// Any verb with any bytes.
    pub async fn send(&self, verb: Method, path: &str, content_type: Option<&str>, body: Bytes) -> Answer {
        self.try_send(verb, path, content_type, body).await.unwrap_or_else(|cut| panic!("{cut}"))
    }

    /// Any verb with a body of JSON of which only the length is told, on a connection of its own: what is answered to
    /// that before any of it is sent.
    pub async fn announce(&self, verb: Method, path: &str, length: usize) -> Answer {
        let header = |(name, value): (&HeaderName, &HeaderValue)| {
            format!("{name}: {}\r\n", value.to_str().expect("tests send text"))
        };
        let own: String = self.headers.iter().map(header).collect();
        let head = format!(
            "{verb} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n{own}"
        );
        let mut connection = Connection::open(&self.base).await;
        connection.write(format!("{head}\r\n")).await;
        let answer = connection.answer().await.unwrap_or_else(|| panic!("{verb} {path}: no answer"));
        Answer::new(format!("{verb} {path}"), path, answer.status, answer.headers, answer.body)
    }

    /// `GET`, where the answer goes on for as long as somebody reads: lines of JSON.
    pub async fn lines(&self, path: &str) -> Lines {
        let asked = format!("GET {path}");
        let mut request = Request::get(format!("{}{path}", self.base));
        if let Some(headers) = request.headers_mut() {
            headers.extend(self.headers.clone());
        }
        let request = request.body(Full::default()).expect("tests name paths that exist");
        let response = tokio::time::timeout(PATIENCE, self.client.request(request)).await;
        let response = response.unwrap_or_else(|_| panic!("{asked}: no answer"));
        let response = response.unwrap_or_else(|error| panic!("{asked}: {error:?}"));
        let (head, body) = response.into_parts();
        let head = Answer::new(asked, path, head.status, head.headers, Bytes::new());
        head.bears_a_request_id();
        Lines { head, body, read: BytesMut::new() }
    }

    async fn try_send(
        &self,
        verb: Method,
        path: &str,
        content_type: Option<&str>,
        body: Bytes,
    ) -> Result<Answer, String> {
        let asked = format!("{verb} {path}");
        let mut request = Request::builder().method(verb).uri(format!("{}{path}", self.base));
        if let Some(headers) = request.headers_mut() {
            headers.extend(self.headers.clone());
        }
        if let Some(content_type) = content_type {
            request = request.header(header::CONTENT_TYPE, content_type);
        }
        let request = request.body(Full::new(body)).map_err(|error| format!("{asked}: {error}"))?;
        let answered = async {
            let response = self.client.request(request).await.map_err(|error| format!("{asked}: {error:?}"))?;
            let (head, body) = response.into_parts();
            let body = body.collect().await.map_err(|error| format!("{asked}: {error:?}"))?.to_bytes();
            Ok::<_, String>((head, body))
        };
        let (head, body) =
            tokio::time::timeout(PATIENCE, answered).await.map_err(|_| format!("{asked}: no answer"))??;
        let answer = Answer::new(asked, path, head.status, head.headers, body);
        if self.public {
            answer.bears_a_request_id();
            answer.tells_of_limits();
            answer.tells_no_secret();
        }
        Ok(answer)
    }
}

/// An answer that goes on. It is given up with this value.
#[derive(Debug)]
pub struct Lines {
    /// How it has begun; its body is what follows.
    pub head: Answer,
    body: Incoming,
    read: BytesMut,
}

impl Lines {
    /// The next line; `None` at the end, and `Err` where the answer breaks off.
    pub async fn next(&mut self) -> Result<Option<Value>, String> {
        loop {
            if let Some(end) = self.read.iter().position(|byte| *byte == b'\n') {
                let line = self.read.split_to(end + 1);
                let json = serde_json::from_slice(&line);
                return Ok(Some(json.unwrap_or_else(|_| panic!("{}: no JSON: {line:?}", self.head.asked))));
            }
            let frame = tokio::time::timeout(PATIENCE, self.body.frame()).await;
            let frame = frame.unwrap_or_else(|_| panic!("{}: no further line", self.head.asked));
            match frame.transpose().map_err(|error| format!("{error:?}"))?.map(Frame::into_data) {
                Some(Ok(data)) => self.read.extend_from_slice(&data),
                Some(Err(_)) => {}
                None => {
                    assert!(self.read.is_empty(), "{} ends within a line: {:?}", self.head.asked, self.read);
                    return Ok(None);
                }
            }
        }
    }

    /// The whole answer, where it is one that ends, such as a refusal.
    pub async fn whole(self) -> Answer {
        let body = tokio::time::timeout(PATIENCE, self.body.collect()).await;
        let body = body.unwrap_or_else(|_| panic!("{}: no end", self.head.asked));
        let body = body.unwrap_or_else(|error| panic!("{}: {error:?}", self.head.asked)).to_bytes();
        let Answer { asked, path, status, headers, .. } = self.head;
        Answer::new(asked, &path, status, headers, body)
    }
}

fn new_client() -> Client<HttpConnector, Full<Bytes>> {
    new_client_from(None)
}

fn new_client_from(address: Option<IpAddr>) -> Client<HttpConnector, Full<Bytes>> {
    let mut connector = HttpConnector::new();
    connector.set_local_address(address);
    connector.set_nodelay(true);
    Client::builder(TokioExecutor::new()).build(connector)
}

impl Answer {
    /// An answer, as it came.
    pub fn new(asked: String, path: &str, status: StatusCode, headers: HeaderMap, body: Bytes) -> Self {
        let path = path.split('?').next().unwrap_or(path).to_owned();
        let json = serde_json::from_slice(&body).unwrap_or(Value::Null);
        Self { asked, path, status, headers, body, json }
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The answer must be a success with that status; its JSON.
    #[track_caller]
    pub fn gives(&self, status: u16) -> &Value {
        assert_eq!(self.status, status, "{}: {}", self.asked, self.text());
        if status == 204 {
            assert!(self.body.is_empty(), "{}: 204 with a body", self.asked);
        } else {
            assert_eq!(self.header("content-type"), Some("application/json"), "{}", self.asked);
            assert!(!self.json.is_null(), "{}: no JSON: {}", self.asked, self.text());
        }
        &self.json
    }

    /// The answer must be a refusal for that reason, in the envelope of its surface.
    #[track_caller]
    pub fn refused(&self, reason: Reason) -> &Self {
        envelope::check(self, reason);
        self
    }

    /// The answer must be a refusal of the request's content that names this field.
    #[track_caller]
    pub fn refused_for(&self, field: &str) -> &Self {
        envelope::check(self, Reason::ValidationFailed);
        let details = envelope::details(self);
        let named = details.iter().any(|detail| detail["field"] == field && detail["message"].is_string());
        assert!(named, "{}: {field} is not named: {}", self.asked, self.text());
        self
    }

    /// A refusal gives nothing away, also not what the caller sent.
    #[track_caller]
    fn tells_no_secret(&self) {
        let refused = self.status.is_client_error() || self.status.is_server_error();
        let found = if refused { tokens_in(&self.body) } else { Vec::new() };
        assert!(found.is_empty(), "{}: the refusal holds {found:?}: {}", self.asked, self.text());
    }

    /// Every answer of the API tells how many calls are left.
    #[track_caller]
    fn tells_of_limits(&self) {
        let of_the_api = Contract::get().surface_of(&self.path).is_some();
        let asks_for_leave = self.asked.starts_with("OPTIONS ");
        if of_the_api && !asks_for_leave {
            for name in ["x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"] {
                let number = self.header(name).and_then(|text| text.parse::<i64>().ok());
                assert!(number.is_some(), "{} does not tell {name}: {:?}", self.asked, self.headers);
            }
            assert!(self.header("ratelimit").is_some() && self.header("ratelimit-policy").is_some(), "{}", self.asked);
        }
    }

    /// Every answer of the API can be found in the log.
    #[track_caller]
    pub fn bears_a_request_id(&self) {
        let id = self.header("x-request-id").unwrap_or_default();
        assert!(id.starts_with("req_") && id.len() > 10, "{} has no request id: {:?}", self.asked, self.headers);
    }
}
