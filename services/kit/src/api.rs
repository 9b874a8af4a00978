//! The public API as a program reaches it from outside: over gRPC at the gateway's port, with a credential of its own.
//!
//! What the commands for developers call ([`Api`]), and how they are told why not ([`Refusal`]). Nothing here belongs
//! to an installation: no configuration, no key, no signature between services. A credential goes into the headers of
//! each call and is shown nowhere. Proxies of the environment are not known here.

use std::{
    error::Error as StdError,
    fmt,
    task::{Context, Poll},
    time::Duration,
};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, Uri, header::AUTHORIZATION, uri::Scheme};
use paperkey_proto::Error;
use serde_json::Value;
use tonic::{
    Code, Status,
    body::Body,
    transport::{self, ClientTlsConfig, Endpoint},
};
use tower::Service;

use crate::{channel::Exchange, principal::REQUEST_ID_HEADER, secrets::Secret};

/// How long a connection may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a connection is asked whether it lives, and how long it may take to say so.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

const TEAM: HeaderName = HeaderName::from_static("paperkey-team");
const MODE: HeaderName = HeaderName::from_static("paperkey-mode");

/// Where the API is, and who calls.
#[derive(Clone, Debug)]
pub struct ApiOptions {
    /// Such as `https://keys.example.com`, with the public roots of trust, or `http://127.0.0.1:8080`.
    pub url: String,
    /// Any credential that the API takes as a bearer.
    pub credential: Secret,
    /// The team that is meant, where the credential is good for several.
    pub team: Option<String>,
    /// `live` or `test`, where the credential is good for both.
    pub mode: Option<String>,
    /// What the program calls itself.
    pub user_agent: String,
}

/// The way to the API, for generated clients. Connects when first used, and again when cut off.
#[derive(Clone)]
pub struct Api {
    channel: transport::Channel,
    headers: HeaderMap,
}

impl fmt::Debug for Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Api")
    }
}

impl Api {
    /// The way to an API; nothing is dialled yet. Fails with the faults of `url`, `credential`, `team` or `mode`.
    pub fn new(options: ApiOptions) -> Result<Self, Error> {
        let uri: Uri = options.url.parse().map_err(|_| bad_url())?;
        let encrypted = match uri.scheme() {
            Some(scheme) if *scheme == Scheme::HTTPS => true,
            Some(scheme) if *scheme == Scheme::HTTP => false,
            _ => return Err(bad_url()),
        };
        if uri.authority().is_none_or(|authority| authority.as_str().contains('@')) {
            return Err(bad_url());
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(Error::field("url", "must end after the host and the port: gRPC knows no base path"));
        }
        let mut endpoint = Endpoint::from(uri)
            .user_agent(options.user_agent)
            .map_err(Error::internal)?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        if encrypted {
            endpoint = endpoint.tls_config(ClientTlsConfig::new().with_webpki_roots()).map_err(Error::internal)?;
        }
        let mut headers = HeaderMap::new();
        let bearer = format!("Bearer {}", options.credential.expose());
        let unreadable = |field: &'static str| move |_| Error::field(field, "holds characters that no header may hold");
        let mut bearer = HeaderValue::try_from(bearer).map_err(unreadable("credential"))?;
        bearer.set_sensitive(true);
        headers.insert(AUTHORIZATION, bearer);
        if let Some(team) = options.team {
            headers.insert(TEAM, HeaderValue::try_from(team).map_err(unreadable("team"))?);
        }
        if let Some(mode) = options.mode {
            headers.insert(MODE, HeaderValue::try_from(mode).map_err(unreadable("mode"))?);
        }
        Ok(Self { channel: endpoint.connect_lazy(), headers })
    }
}

fn bad_url() -> Error {
    Error::field("url", "must be the address of the API, such as https://keys.example.com")
}

impl Service<Request<Body>> for Api {
    type Response = Response<Body>;
    type Error = Status;
    type Future = Exchange;

    /// The call itself waits until the channel is ready.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        for (name, value) in &self.headers {
            request.headers_mut().insert(name, value.clone());
        }
        Box::pin(send(self.channel.clone(), request))
    }
}

async fn send(mut channel: transport::Channel, request: Request<Body>) -> Result<Response<Body>, Status> {
    std::future::poll_fn(|context| channel.poll_ready(context)).await.map_err(|error| cut_off(&error))?;
    channel.call(request).await.map_err(|error| cut_off(&error))
}

/// What a transport says of itself is "transport error"; why stands behind it.
fn cut_off(error: &transport::Error) -> Status {
    let causes = std::iter::successors(error.source(), |cause| (*cause).source());
    let text = causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"));
    Error::unavailable(text).into()
}

/// Why a call to the API failed, in one line: what is wrong, with which fields, and in which request.
#[derive(Debug)]
pub struct Refusal {
    /// Aside, since results carry refusals by value.
    error: Box<Error>,
    request_id: Option<String>,
    /// What the network or a server that is not ours said.
    aside: Option<String>,
}

impl Refusal {
    /// What HTTP has for it.
    pub fn http_status(&self) -> u32 {
        self.error.entry().http_status
    }

    /// Whether the same call will fail again until somebody changes something.
    pub fn is_final(&self) -> bool {
        matches!(self.http_status(), 400..=499) && !matches!(self.http_status(), 408 | 429)
    }

    /// How long the API asks to be left alone.
    pub fn retry_after(&self) -> Option<Duration> {
        self.error.retry_after()
    }

    /// Nobody answered in time.
    pub fn timed_out() -> Self {
        let error = Box::new(Error::unavailable("no answer"));
        Self { error, request_id: None, aside: Some("no answer in time".to_owned()) }
    }
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        let error = Error::from_status(&status);
        // What failed inside is kept by the error only where the status has none of our details.
        let foreign = error.source().is_some() || status.code() == Code::Unimplemented;
        let aside = foreign.then(|| said(&status)).filter(|said| !said.is_empty());
        let request_id = status.metadata().get(REQUEST_ID_HEADER).and_then(|id| id.to_str().ok());
        Self { request_id: request_id.map(str::to_owned), error: Box::new(error), aside }
    }
}

/// The text of a status and of what caused it, without saying anything twice.
fn said(status: &Status) -> String {
    let mut text = status.message().to_owned();
    let mut cause = StdError::source(status);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text.replace(['\r', '\n'], " ")
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.error.message())?;
        for violation in self.error.violations() {
            write!(f, ": {} {}", violation.field, violation.message)?;
        }
        for hit in self.error.quota_violations() {
            write!(f, ": {} {}", hit.subject, hit.description)?;
        }
        if let Some(aside) = &self.aside {
            write!(f, " ({aside})")?;
        }
        if let Some(id) = &self.request_id {
            write!(f, " (request {id})")?;
        }
        Ok(())
    }
}

impl StdError for Refusal {}

/// What a line of the report of an import says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reported {
    /// What became of a line of the file.
    Line {
        /// Which line of the file, if it says so.
        line: Option<u64>,
        /// In a word of the report's, such as `created`.
        outcome: String,
        /// Whether it was refused.
        failed: bool,
    },
    /// The last line: on how many lines it has reported.
    End {
        /// That number.
        lines: u64,
    },
}

impl Reported {
    /// Reads a line of a report: a JSON object with a `status`, and an `error` where the line was refused; or the last
    /// one, with the number of `lines`. `None` where it is none, such as an empty line.
    pub fn read(line: &[u8]) -> Option<Self> {
        let Ok(Value::Object(object)) = serde_json::from_slice(line) else { return None };
        let status = object.get("status").and_then(Value::as_str);
        if let (None, Some(lines)) = (status, object.get("lines").and_then(Value::as_u64)) {
            return Some(Self::End { lines });
        }
        let failed = status == Some("failed") || object.get("error").is_some_and(|error| !error.is_null());
        let outcome = if failed { "failed" } else { status? };
        let line = object.get("line").and_then(Value::as_u64);
        Some(Self::Line { line, outcome: outcome.to_owned(), failed })
    }
}

#[cfg(test)]
mod tests {
    use paperkey_proto::errors::v1::Reason;

    use super::*;

    fn options(url: &str) -> ApiOptions {
        let url = url.to_owned();
        let credential = Secret::new("pb_live_secret");
        ApiOptions { url, credential, team: None, mode: None, user_agent: "test".to_owned() }
    }

    #[tokio::test]
    async fn what_is_no_address_or_no_header_is_refused_before_anything_is_dialled() {
        for url in
            ["", "keys.example.com", "ftp://keys.example.com", "http://", "https://u:p@example.com", "https://a/b"]
        {
            let error = Api::new(options(url)).unwrap_err();
            assert_eq!(error.violations()[0].field, "url", "{url}");
        }
        for url in ["http://127.0.0.1:8080", "http://[::1]:8080/", "https://keys.example.com"] {
            Api::new(options(url)).unwrap();
        }
        let error = Api::new(ApiOptions { credential: Secret::new("a\nb"), ..options("http://a") }).unwrap_err();
        assert_eq!(error.violations()[0].field, "credential");
        assert!(!format!("{error:?}").contains("a\\nb"));
    }

    #[tokio::test]
    async fn a_credential_is_not_shown() {
        let api = Api::new(options("http://127.0.0.1:1")).unwrap();
        assert!(!format!("{api:?} {:?} {:?}", api.headers, options("http://a")).contains("pb_live_secret"));
    }

    #[test]
    fn a_refusal_says_what_is_wrong_with_what_and_in_which_request() {
        let mut status = Status::from(Error::field("product_id", "must not be empty"));
        status.metadata_mut().insert(REQUEST_ID_HEADER, "req_1".parse().unwrap());
        let refusal = Refusal::from(status);
        let said = refusal.to_string();
        assert!(said.ends_with(": product_id must not be empty (request req_1)"), "{said}");
        assert!(refusal.is_final());
        for (reason, is_final) in [
            (Reason::InvalidCredentials, true),
            (Reason::NotFound, true),
            (Reason::Unavailable, false),
            (Reason::RateLimited, false),
            (Reason::Internal, false),
        ] {
            assert_eq!(Refusal::from(Status::from(Error::new(reason))).is_final(), is_final, "{reason:?}");
        }
        let cut = Refusal::from(Status::unavailable("connection\nrefused"));
        assert!(cut.to_string().contains("(connection refused)") && !cut.is_final(), "{cut}");
    }

    #[test]
    fn a_line_of_a_report_tells_what_became_of_it() {
        let line = |line, outcome: &str, failed| Some(Reported::Line { line, outcome: outcome.to_owned(), failed });
        let read = |line: &str| Reported::read(line.as_bytes());
        assert_eq!(read(r#"{"line": 2, "status": "created", "id": "lic_1"}"#), line(Some(2), "created", false));
        assert_eq!(read(r#"{"line": 2, "status": "exists", "error": null}"#), line(Some(2), "exists", false));
        for (failed, number) in [(r#"{"status": "failed"}"#, None), (r#"{"line": 3, "error": {"code": "X"}}"#, Some(3))]
        {
            assert_eq!(read(failed), line(number, "failed", true), "{failed}");
        }
        assert_eq!(read(r#"{"lines": 3, "created": 2, "failed": 1}"#), Some(Reported::End { lines: 3 }));
        assert_eq!((read(""), read("[]"), read("{\"line\": 1}"), read("{")), (None, None, None, None));
    }
}
