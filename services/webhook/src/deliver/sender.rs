//! One POST, from the name to the last byte of the answer, in the time it may take.
//!
//! Answers are never decompressed, and no more is read of them than is counted here. HTTP/2 is spoken with receivers
//! that choose it: one connection then carries all that is under way to a host, so one that fails in time is not used
//! again, however alive it seems.

use std::{
    error::Error as StdError,
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{
    Extensions, HeaderName, HeaderValue, Method, Request,
    header::{CONTENT_TYPE, RETRY_AFTER, USER_AGENT},
};
use http_body_util::{BodyExt as _, Full};
use hyper_util::{
    client::legacy::{
        Client, Error as ClientError,
        connect::{CaptureConnection, Connected, capture_connection},
    },
    rt::{TokioExecutor, TokioTimer},
};
use paperkey_kit::{
    clock::Clock,
    fail_point::{self, Point},
};
use paperkey_proto::Error;

use super::{
    connector::{Connector, Dial, NoConnection, Opened, Tcp},
    names::Names,
    tls::{Wires, find},
};
use crate::{
    WebhookConfig,
    domain::{
        attempt::{Attempt, AttemptFault, SNIPPET_BYTES, fault_of_status, snippet},
        endpoint::{Target, UrlRules},
        schedule::retry_after_ms,
        signature::Signatures,
    },
};

/// How much of an answer's body is read.
const MAX_ANSWER_BYTES: usize = 16 * 1024;
/// How large the head of an answer may be.
const MAX_HEAD_BYTES: u16 = 32 * 1024;
/// What a receiver may send ahead over HTTP/2, in one answer and in all that share a connection.
const STREAM_WINDOW: u32 = 32 * 1024;
const CONNECTION_WINDOW: u32 = 256 * 1024;
/// How long a connection is kept for the next delivery. Short, so that a receiver that moves is soon followed.
const KEPT_IDLE: Duration = Duration::from_secs(20);

const SIGNATURE: HeaderName = HeaderName::from_static("x-paperkey-signature");
const EVENT: HeaderName = HeaderName::from_static("x-paperkey-event");
const DELIVERY: HeaderName = HeaderName::from_static("x-paperkey-delivery");
const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const STANDARD_ID: HeaderName = HeaderName::from_static("webhook-id");
const STANDARD_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const STANDARD_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");

/// Sends deliveries.
#[derive(Clone)]
pub(crate) struct Sender<D = Tcp> {
    client: Client<Wires<D>, Full<Bytes>>,
    rules: UrlRules,
    timeout: Duration,
    clock: Clock,
    user_agent: HeaderValue,
}

/// What is sent.
pub(crate) struct Parcel<'a> {
    pub(crate) delivery_id: &'a str,
    pub(crate) topic: &'a str,
    pub(crate) body: Bytes,
    /// The trace that it is a part of; empty where there is none to tell of.
    pub(crate) traceparent: &'a str,
}

/// What is known of an exchange, also where the rest of it never comes.
#[derive(Default)]
struct Answer {
    status: Option<u16>,
    body: Vec<u8>,
    retry_after_ms: Option<i64>,
    connection: Option<CaptureConnection>,
}

/// Why there is no answer.
enum Broken {
    /// A connection that was kept has ended under the request, before a word of an answer: nothing is known of the
    /// receiver, who may have closed it just then.
    Stale,
    For(AttemptFault),
}

impl Sender {
    /// Sends as the configuration says.
    pub(crate) fn new(config: &WebhookConfig, clock: Clock) -> Result<Self, Error> {
        Self::over(Tcp, config, clock)
    }
}

impl<D: Dial> Sender<D> {
    /// Sends over connections that are dialled like that.
    pub(super) fn over(dial: D, config: &WebhookConfig, clock: Clock) -> Result<Self, Error> {
        let rules = config.url_rules();
        let timeout = Duration::from_millis(config.timeout_ms.max(1));
        let names = Names::new(config.name_servers.clone(), rules.allow_private_networks, timeout);
        let connector = Connector::new(rules, names.map_err(Error::internal)?, timeout, dial);
        let wires = Wires::new(&connector, config.extra_ca.as_deref(), timeout)?;
        let client = Client::builder(TokioExecutor::new())
            .timer(TokioTimer::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(KEPT_IDLE)
            .pool_max_idle_per_host(config.max_in_flight_per_endpoint.max(1))
            .http1_max_buf_size(MAX_HEAD_BYTES.into())
            .http2_max_header_list_size(MAX_HEAD_BYTES.into())
            .http2_initial_stream_window_size(STREAM_WINDOW)
            .http2_initial_connection_window_size(CONNECTION_WINDOW)
            // A connection that is dead, and not only slow, is found out while something waits for it.
            .http2_keep_alive_interval(timeout / 4)
            .http2_keep_alive_timeout(timeout / 2)
            .http2_keep_alive_while_idle(false)
            .build(wires);
        let user_agent = HeaderValue::try_from(format!("Paperkey/{}", config.version)).map_err(Error::internal)?;
        Ok(Self { client, rules, timeout, clock, user_agent })
    }

    /// What addresses it sends to.
    pub(crate) fn rules(&self) -> UrlRules {
        self.rules
    }

    /// Sends a delivery once.
    pub(crate) async fn send(&self, target: &Target, signatures: &Signatures, parcel: Parcel<'_>) -> Attempt {
        fail_point::reach(Point::PostBefore);
        let (at_ms, began) = (self.clock.now_ms(), self.clock.monotonic());
        let mut answer = Answer::default();
        let exchange = self.exchange(target, signatures, &parcel, at_ms, &mut answer);
        let fault = match tokio::time::timeout(self.timeout, exchange).await {
            Ok(Ok(())) => answer.status.map_or(Some(AttemptFault::Other), fault_of_status),
            Ok(Err(fault)) => Some(fault),
            Err(_) => Some(AttemptFault::Timeout),
        };
        if fault == Some(AttemptFault::Timeout) {
            // Whoever is behind it may be gone without a word; the next delivery finds out over a new one.
            with_connection(answer.connection.as_ref(), Connected::poison);
        }
        fail_point::reach(Point::PostAfter);
        let took = self.clock.monotonic().saturating_duration_since(began);
        Attempt {
            at_ms,
            duration_ms: i64::try_from(took.as_millis()).unwrap_or(i64::MAX),
            response_status: answer.status,
            fault,
            snippet: snippet(&answer.body),
            retry_after_ms: answer.retry_after_ms,
        }
    }

    async fn exchange(
        &self,
        target: &Target,
        signatures: &Signatures,
        parcel: &Parcel<'_>,
        at_ms: i64,
        answer: &mut Answer,
    ) -> Result<(), AttemptFault> {
        loop {
            return match self.once(target, signatures, parcel, at_ms, answer).await {
                Ok(()) => Ok(()),
                // Each turn has used up a connection that was kept, and of those there are few.
                Err(Broken::Stale) => continue,
                Err(Broken::For(fault)) => Err(fault),
            };
        }
    }

    async fn once(
        &self,
        target: &Target,
        signatures: &Signatures,
        parcel: &Parcel<'_>,
        at_ms: i64,
        answer: &mut Answer,
    ) -> Result<(), Broken> {
        let began = Instant::now();
        let mut request = self.request(target, signatures, parcel, at_ms);
        let connection = &*answer.connection.insert(capture_connection(&mut request));
        let response = match self.client.request(request).await {
            Ok(response) => response,
            Err(error) if was_open(connection, began) && is_closed(&error) => {
                with_connection(Some(connection), Connected::poison);
                return Err(Broken::Stale);
            }
            Err(error) => return Err(Broken::For(fault_of(&error))),
        };
        answer.status = Some(response.status().as_u16());
        let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        answer.retry_after_ms = retry_after.and_then(|value| retry_after_ms(value, at_ms));
        let mut body = response.into_body();
        let mut read = 0;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| Broken::For(fault_of(&error)))?;
            let Ok(data) = frame.into_data() else { continue };
            let room = SNIPPET_BYTES.saturating_sub(answer.body.len()).min(data.len());
            answer.body.extend_from_slice(&data[..room]);
            read += data.len();
            if read > MAX_ANSWER_BYTES {
                // The status has said all that counts. Dropping the rest closes the connection, or the stream.
                break;
            }
        }
        Ok(())
    }

    fn request(
        &self,
        target: &Target,
        signatures: &Signatures,
        parcel: &Parcel<'_>,
        at_ms: i64,
    ) -> Request<Full<Bytes>> {
        let (timestamp_s, body) = (at_ms.div_euclid(1_000), &parcel.body);
        let mut request = Request::new(Full::new(body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = target.uri.clone();
        let headers = request.headers_mut();
        headers.reserve(10);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        headers.insert(USER_AGENT, self.user_agent.clone());
        headers.insert(STANDARD_TIMESTAMP, HeaderValue::from(timestamp_s));
        for (name, text) in [
            (SIGNATURE, signatures.own(body, at_ms)),
            (STANDARD_SIGNATURE, signatures.standard(parcel.delivery_id, timestamp_s, body, at_ms)),
            (EVENT, parcel.topic.to_owned()),
            (DELIVERY, parcel.delivery_id.to_owned()),
            (STANDARD_ID, parcel.delivery_id.to_owned()),
            (TRACEPARENT, parcel.traceparent.to_owned()),
        ] {
            if text.is_empty() {
                continue;
            }
            // Ids, names of events and signatures are words that any header can hold.
            if let Ok(value) = HeaderValue::from_maybe_shared(Bytes::from(text)) {
                headers.insert(name, value);
            }
        }
        request
    }
}

/// Does something with the connection that a request was given, if it was given one.
fn with_connection(connection: Option<&CaptureConnection>, act: impl FnOnce(&Connected)) {
    if let Some(connection) = connection
        && let Some(connected) = &*connection.connection_metadata()
    {
        act(connected);
    }
}

/// Whether a request was given a connection that was there before.
fn was_open(connection: &CaptureConnection, began: Instant) -> bool {
    let mut was_open = false;
    with_connection(Some(connection), |connected| {
        let mut extras = Extensions::new();
        connected.get_extras(&mut extras);
        was_open = extras.get::<Opened>().is_some_and(|opened| opened.0 < began);
    });
    was_open
}

/// Whether the other side ended the connection without an answer.
fn is_closed(error: &ClientError) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    let hyper = find::<hyper::Error>(error);
    // Too slow is not gone.
    !hyper.is_some_and(hyper::Error::is_timeout)
        && (hyper.is_some_and(|error| error.is_incomplete_message() || error.is_canceled() || error.is_closed())
            || find::<std::io::Error>(error).is_some_and(|error| {
                matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
            }))
}

fn fault_of(error: &(dyn StdError + 'static)) -> AttemptFault {
    if let Some(NoConnection(fault)) = find(error) {
        *fault
    } else if find::<rustls::Error>(error).is_some() {
        AttemptFault::Tls
    } else if find::<hyper::Error>(error).is_some_and(hyper::Error::is_timeout) {
        AttemptFault::Timeout
    } else if error.downcast_ref::<ClientError>().is_some_and(ClientError::is_connect)
        && find::<std::io::Error>(error).is_some()
    {
        // What fails while connecting and is not said by the connector is what stands on top of it.
        AttemptFault::Tls
    } else {
        AttemptFault::Other
    }
}
