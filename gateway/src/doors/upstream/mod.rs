//! Mounted upstreams: whole servers of the operator's own, with the gateway's door before them.
//!
//! A request is identified and judged like any other, and then passed on piece by piece, in both directions and at the
//! pace of the slower side. What the server is told of its caller comes from here alone; what it answers goes back as
//! it is. Upgrades are not passed on, and neither are trailers.

mod headers;
mod path;
mod stream;

use std::{error::Error as StdError, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method as Verb, Request, Response, StatusCode, Uri, Version,
    header::{ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_REQUEST_HEADERS, CONTENT_LENGTH, TRANSFER_ENCODING, UPGRADE},
    request::Parts as Head,
    uri::{Authority, Scheme},
};
use http_body_util::{BodyExt as _, combinators::UnsyncBoxBody};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use paperkey_kit::{
    config::{Tiers, Upstream, upstreams},
    principal::REQUEST_ID_HEADER,
    shed::Errand,
    telemetry,
};
use paperkey_proto::{Contract, Error, errors::v1::Reason, options::v1::Scope, principal::v1::Principal};
use tokio::time::{Instant, timeout_at};

use super::{Answered, identity, is_read, may, take};
use crate::{GatewayError, Inner, body::Body, call::Call, edge, envelope::Refusal};
use stream::{Answer, Outgoing, Progress};

/// How long a connection may take to open at most.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a connection is kept for the next request.
const KEPT_IDLE: Duration = Duration::from_secs(15);

/// Connections that are kept for one server.
const MAX_IDLE: usize = 64;

/// The verbs that browsers are told of.
const VERBS: HeaderValue = HeaderValue::from_static("GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS");

type BoxError = Box<dyn StdError + Send + Sync>;
type Sender = Client<HttpsConnector<HttpConnector>, UnsyncBoxBody<Bytes, BoxError>>;

/// The mounted upstreams, those with the longest paths first.
pub(crate) struct Mounts {
    mounts: Vec<Mount>,
    client: Option<Sender>,
}

/// A mounted upstream.
#[derive(Debug)]
pub(crate) struct Mount {
    /// Its path, without a slash at the end.
    prefix: String,
    scheme: Scheme,
    authority: Authority,
    /// What is put before the path that it is asked for.
    base: String,
    scope: Option<Scope>,
    /// The meter that a call takes units of, and how many.
    meter: Option<(String, i64)>,
    anonymous: bool,
    strip_prefix: bool,
    max_body_bytes: u64,
    timeout: Duration,
    forward_credential: bool,
}

impl Mounts {
    /// Mounts what is configured, or says what is wrong with it.
    pub(crate) fn new(configured: &[Upstream], tiers: &Tiers) -> Result<Self, GatewayError> {
        let problems = upstreams::problems(configured, tiers);
        if !problems.is_empty() {
            return Err(GatewayError::Upstream(problems.join("; ")));
        }
        let mut mounts = configured.iter().map(Mount::new).collect::<Result<Vec<_>, _>>()?;
        mounts.sort_by_key(|mount| std::cmp::Reverse(mount.prefix.len()));
        // Trust roots are only read where there is somebody to trust.
        let patience = mounts.iter().map(|mount| mount.timeout / 2).fold(CONNECT_TIMEOUT, Duration::min);
        let client = if mounts.is_empty() { None } else { Some(sender(patience)?) };
        Ok(Self { mounts, client })
    }

    /// The upstream of a path: that with the longest path of its own.
    pub(crate) fn find(&self, path: &str) -> Option<&Mount> {
        self.mounts.iter().find(|mount| {
            let rest = path.strip_prefix(&mount.prefix);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        })
    }
}

impl Mounts {
    /// Whether a path leads to that mount however it is read: another one below it must not be reached by a spelling.
    fn is_found_at(&self, mount: &Mount, read: &str) -> bool {
        let lower = read.to_ascii_lowercase();
        let found = self.mounts.iter().find(|other| {
            let prefix = other.prefix.to_ascii_lowercase();
            lower.strip_prefix(&prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        });
        found.is_some_and(|found| std::ptr::eq(found, mount))
    }
}

fn sender(patience: Duration) -> Result<Sender, GatewayError> {
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    // Shorter than the patience with any mount, so that a server that is not reached is known not to have been.
    connector.set_connect_timeout(Some(patience));
    let connector = HttpsConnectorBuilder::new()
        .with_provider_and_webpki_roots(Arc::new(rustls::crypto::ring::default_provider()))
        .map_err(|error| GatewayError::Upstream(format!("there is no TLS: {error}")))?
        .https_or_http()
        .enable_http1()
        .wrap_connector(connector);
    Ok(Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(KEPT_IDLE)
        .pool_max_idle_per_host(MAX_IDLE)
        .build(connector))
}

impl Mount {
    fn new(upstream: &Upstream) -> Result<Self, GatewayError> {
        let bad = || GatewayError::Upstream(format!("{} is no URL", upstream.url));
        let uri: Uri = upstream.url.parse().map_err(|_| bad())?;
        let base = uri.path().trim_end_matches('/').to_owned();
        let parts = uri.into_parts();
        Ok(Self {
            prefix: upstream.prefix().to_owned(),
            scheme: parts.scheme.ok_or_else(bad)?,
            authority: parts.authority.ok_or_else(bad)?,
            base,
            scope: upstream.scope.as_deref().and_then(|word| Contract::get().scope_named(word)),
            meter: upstream.meter.clone().map(|meter| (meter, upstream.cost)),
            anonymous: upstream.anonymous,
            strip_prefix: upstream.strip_prefix,
            max_body_bytes: upstream.max_body_bytes,
            timeout: Duration::from_millis(upstream.timeout_ms),
            forward_credential: upstream.forward_credential,
        })
    }

    /// What the server is asked for.
    fn target(&self, asked: &Uri) -> Result<Uri, Error> {
        let path = asked.path();
        let path = if self.strip_prefix { path.strip_prefix(&self.prefix).unwrap_or(path) } else { path };
        let mut target = format!("{}{path}", self.base);
        if target.is_empty() {
            target.push('/');
        }
        if let Some(query) = asked.query() {
            target.push('?');
            target.push_str(query);
        }
        Uri::builder()
            .scheme(self.scheme.clone())
            .authority(self.authority.clone())
            .path_and_query(target)
            .build()
            .map_err(Error::internal)
    }

    fn too_large(&self) -> Error {
        let message = format!("The request body is larger than {} bytes", self.max_body_bytes);
        Error::new(Reason::BodyTooLarge).with_message(message)
    }
}

/// Answers a request for a mounted upstream.
pub(crate) async fn answer<B>(
    gateway: &Inner,
    mount: &Mount,
    head: Head,
    body: B,
    peer: SocketAddr,
    call: &mut Call,
) -> Answered
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    call.span.name(|| format!("{} {}/*", telemetry::verb(&head.method), mount.prefix));
    call.span.set("http.route", || format!("{}/*", mount.prefix));
    let has_body = !body.is_end_stream();
    let shared = gateway.config.cors_any_origin;
    if shared && edge::is_preflight(&head.method, &head.headers) {
        call.aside = true;
        let mut response = edge::preflight(VERBS, head.headers.get(ACCESS_CONTROL_REQUEST_HEADERS));
        if has_body {
            edge::hang_up(head.version, response.headers_mut());
        }
        return Answered::Ours(response);
    }
    match pass(gateway, mount, &head, body, peer, call).await {
        Ok(mut response) => {
            let headers = response.headers_mut();
            call.told.put_on(headers);
            if let Ok(id) = HeaderValue::from_str(&call.request_id) {
                headers.insert(REQUEST_ID_HEADER, id);
            }
            if shared && !headers.contains_key(ACCESS_CONTROL_ALLOW_ORIGIN) {
                edge::share(headers);
            }
            Answered::Theirs(response)
        }
        Err(refusal) => {
            call.failed(&refusal.error);
            let teller = gateway.doorman(head.uri.path(), &head.headers, &call.request_id);
            let mut response = teller.tell(&refusal);
            let headers = response.headers_mut();
            call.told.put_on(headers);
            if has_body {
                edge::hang_up(head.version, headers);
            }
            if shared {
                edge::share(headers);
            }
            Answered::Ours(response)
        }
    }
}

async fn pass<B>(
    gateway: &Inner,
    mount: &Mount,
    head: &Head,
    body: B,
    peer: SocketAddr,
    call: &mut Call,
) -> Result<Response<Body>, Refusal>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    let read = path::as_read(head.uri.path()).map_err(Error::malformed).and_then(|read| {
        let found = gateway.doors.mounts.is_found_at(mount, &read);
        found.then_some(()).ok_or_else(|| Error::malformed("The path could be read as another"))
    });
    if let Err(ambiguous) = read {
        gateway.gate.count_stray(call).await?;
        return Err(ambiguous.into());
    }
    gateway.must_be_seen(Errand::Call, None, call).await?;
    let known = identified(gateway, mount, head, call).await?;
    passable(head)?;
    let (ended, length) = (body.is_end_stream(), body.size_hint().exact());
    let declared = body.size_hint().lower();
    if declared > mount.max_body_bytes {
        return Err(mount.too_large().into());
    }
    let principal = known.as_deref();
    let progress = Arc::new(Progress::new());
    let outgoing = Outgoing::new(body, mount.max_body_bytes, Arc::clone(&progress));
    let mut request = Request::new(outgoing.boxed_unsync());
    *request.method_mut() = head.method.clone();
    *request.version_mut() = Version::HTTP_11;
    *request.uri_mut() = mount.target(&head.uri)?;
    *request.headers_mut() = headers::of_request(
        gateway,
        head,
        peer,
        &call.request_id,
        mount.forward_credential,
        &principal.map(identity).unwrap_or_default(),
    )?;
    if telemetry::exports() {
        telemetry::inject(request.headers_mut());
    }
    // Left to itself, hyper sends no body with a verb that reads and an unknown length, and no length with none.
    if !ended && length.is_none() {
        request.headers_mut().insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
    } else if ended && !is_read(head.method.as_str()) {
        request.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
    // Nothing stands between the units and what they are for that could fail.
    let taken = match &known {
        Some(principal) => take(gateway, principal, mount.meter.as_ref()).await?,
        None => None,
    };
    let answered = exchange(gateway, mount, request, &progress).await;
    if let (Err(Unanswered { reached: false, .. }), Some(taken)) = (&answered, &taken) {
        gateway.meters.give_back(taken).await;
    }
    let response = answered.map_err(|unanswered| unanswered.error)?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        return Err(Error::unavailable("an upstream switched protocols unasked").into());
    }
    let (mut head, body) = response.into_parts();
    headers::clean_answer(&mut head.headers);
    head.version = Version::default();
    head.extensions.clear();
    let body = tonic::body::Body::new(Answer::new(body, mount.timeout));
    Ok(Response::from_parts(head, body.into()))
}

/// Who calls, as far as the mount wants to know.
async fn identified(
    gateway: &Inner,
    mount: &Mount,
    head: &Head,
    call: &mut Call,
) -> Result<Option<Arc<Principal>>, Refusal> {
    let client = Some(call.client);
    let Some(known) = gateway.gate.identify(&head.headers, gateway.doors.accepted, client, call).await? else {
        return if mount.anonymous { Ok(None) } else { Err(Error::unauthenticated().into()) };
    };
    may(&known, mount.scope, Some(!is_read(head.method.as_str())))
        .map_err(|error| Refusal { credential_sent: true, ..error.into() })?;
    Ok(Some(known))
}

/// Refuses what cannot be passed on.
fn passable(head: &Head) -> Result<(), Refusal> {
    if matches!(head.method, Verb::TRACE | Verb::CONNECT) {
        return Err(Refusal::other_verb(VERBS));
    }
    // HTTP/2 in clear text is an offer, which may be passed over in silence.
    let offers = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"h2c");
    if !head.headers.get_all(UPGRADE).iter().all(offers) {
        return Err(Error::malformed("Upgrades, such as to WebSocket, are not passed on").into());
    }
    // Where a request says twice how long its body is, hyper goes by the chunks and ends the connection after it; what
    // is sent on is framed anew. Other codings than chunks would have to be undone here.
    let mut codings = head.headers.get_all(TRANSFER_ENCODING).iter();
    if codings.next().is_some_and(|coding| !coding.as_bytes().eq_ignore_ascii_case(b"chunked"))
        || codings.next().is_some()
    {
        return Err(Error::malformed("Of transfer codings only chunked is known").into());
    }
    Ok(())
}

/// Why there is no answer of the server's.
struct Unanswered {
    error: Error,
    /// Whether the server may have seen the request.
    reached: bool,
}

/// Sends the request, and waits for the head of the answer: for as long as the body makes progress, and then for the
/// time that the mount allows.
async fn exchange(
    gateway: &Inner,
    mount: &Mount,
    request: Request<UnsyncBoxBody<Bytes, BoxError>>,
    progress: &Progress,
) -> Result<Response<Incoming>, Unanswered> {
    let client = gateway.doors.mounts.client.as_ref().ok_or_else(|| {
        let error = Error::internal("mounts without a client");
        Unanswered { error, reached: false }
    })?;
    let mut answering = client.request(request);
    loop {
        if let Ok(answered) = timeout_at(progress.last() + mount.timeout, &mut answering).await {
            return answered.map_err(|failure| {
                let reached = !failure.is_connect();
                let error = match () {
                    () if progress.overflowed() => mount.too_large(),
                    () if progress.cut_off() => Error::malformed("The request body was cut off"),
                    () => Error::unavailable(failure),
                };
                Unanswered { error, reached }
            });
        }
        if progress.last() + mount.timeout > Instant::now() {
            continue;
        }
        let message = if progress.waits_for_the_caller() {
            "The request body took too long to arrive"
        } else {
            "The server behind this path took too long to answer"
        };
        let error = Error::new(Reason::Deadline).with_message(message);
        return Err(Unanswered { error, reached: true });
    }
}

/// Whether a header stands for the connection alone, or is named by `Connection` as such.
fn is_hop_by_hop(name: &HeaderName, headers: &HeaderMap) -> bool {
    headers::HOP_BY_HOP.contains(&name.as_str())
        || name.as_str().starts_with("proxy-")
        || headers
            .get_all(http::header::CONNECTION)
            .iter()
            .flat_map(|value| value.as_bytes().split(|byte| *byte == b','))
            .any(|token| token.trim_ascii().eq_ignore_ascii_case(name.as_str().as_bytes()))
}
