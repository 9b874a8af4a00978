//! One POST, from the name to the last byte of the answer, in the time it may take.

use std::{error::Error as StdError, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderName, HeaderValue, Request,
    header::{CONTENT_TYPE, RETRY_AFTER, USER_AGENT},
};
use http_body_util::{BodyExt as _, Full};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, Error as ClientError},
    rt::{TokioExecutor, TokioTimer},
};
use paperkey_kit::clock::Clock;
use paperkey_proto::Error;

use super::connector::{Connector, NoConnection};
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
const MAX_HEAD_BYTES: usize = 32 * 1024;
/// How long a connection is kept for the next delivery. Short, so that a receiver that moves is soon followed.
const KEPT_IDLE: Duration = Duration::from_secs(20);

const SIGNATURE: HeaderName = HeaderName::from_static("x-paperkey-signature");
const EVENT: HeaderName = HeaderName::from_static("x-paperkey-event");
const DELIVERY: HeaderName = HeaderName::from_static("x-paperkey-delivery");
const STANDARD_ID: HeaderName = HeaderName::from_static("webhook-id");
const STANDARD_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const STANDARD_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");

/// Sends deliveries.
#[derive(Clone)]
pub(crate) struct Sender {
    client: Client<HttpsConnector<Connector>, Full<Bytes>>,
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
}

/// What is known of an answer, also where the rest of it never comes.
#[derive(Default)]
struct Answer {
    status: Option<u16>,
    body: Vec<u8>,
    retry_after_ms: Option<i64>,
}

impl Sender {
    /// Sends as the configuration says.
    pub(crate) fn new(config: &WebhookConfig, clock: Clock) -> Result<Self, Error> {
        let rules = config.url_rules();
        let timeout = Duration::from_millis(config.timeout_ms.max(1));
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let connector = HttpsConnectorBuilder::new()
            .with_provider_and_webpki_roots(provider)
            .map_err(Error::internal)?
            // Plain http is refused by the rules, where it is.
            .https_or_http()
            .enable_http1()
            .wrap_connector(Connector::new(rules, timeout));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(KEPT_IDLE)
            .pool_max_idle_per_host(config.max_in_flight_per_endpoint.max(1))
            .http1_max_buf_size(MAX_HEAD_BYTES)
            .build(connector);
        let user_agent = HeaderValue::try_from(format!("Paperkey/{}", config.version)).map_err(Error::internal)?;
        Ok(Self { client, rules, timeout, clock, user_agent })
    }

    /// What addresses it sends to.
    pub(crate) fn rules(&self) -> UrlRules {
        self.rules
    }

    /// Sends a delivery once.
    pub(crate) async fn send(&self, target: &Target, signatures: &Signatures, parcel: Parcel<'_>) -> Attempt {
        let (at_ms, began) = (self.clock.now_ms(), self.clock.monotonic());
        let mut answer = Answer::default();
        let exchange = self.exchange(target, signatures, parcel, at_ms, &mut answer);
        let fault = match tokio::time::timeout(self.timeout, exchange).await {
            Ok(Ok(())) => answer.status.map_or(Some(AttemptFault::Other), fault_of_status),
            Ok(Err(fault)) => Some(fault),
            Err(_) => Some(AttemptFault::Timeout),
        };
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
        parcel: Parcel<'_>,
        at_ms: i64,
        answer: &mut Answer,
    ) -> Result<(), AttemptFault> {
        let request = self.request(target, signatures, parcel, at_ms).map_err(|_| AttemptFault::Other)?;
        let response = self.client.request(request).await.map_err(|error| fault_of(&error))?;
        answer.status = Some(response.status().as_u16());
        let retry_after = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
        answer.retry_after_ms = retry_after.and_then(|value| retry_after_ms(value, at_ms));
        let mut body = response.into_body();
        let mut read = 0;
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame.map_err(|_| AttemptFault::Other)?.into_data() else { continue };
            let room = SNIPPET_BYTES.saturating_sub(answer.body.len()).min(data.len());
            answer.body.extend_from_slice(&data[..room]);
            read += data.len();
            if read > MAX_ANSWER_BYTES {
                // The status has said all that counts. Dropping the rest closes the connection.
                break;
            }
        }
        Ok(())
    }

    fn request(
        &self,
        target: &Target,
        signatures: &Signatures,
        parcel: Parcel<'_>,
        at_ms: i64,
    ) -> Result<Request<Full<Bytes>>, http::Error> {
        let timestamp_s = at_ms.div_euclid(1_000);
        Request::post(target.uri.clone())
            .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
            .header(USER_AGENT, self.user_agent.clone())
            .header(SIGNATURE, signatures.own(&parcel.body))
            .header(EVENT, parcel.topic)
            .header(DELIVERY, parcel.delivery_id)
            .header(STANDARD_ID, parcel.delivery_id)
            .header(STANDARD_TIMESTAMP, timestamp_s)
            .header(STANDARD_SIGNATURE, signatures.standard(parcel.delivery_id, timestamp_s, &parcel.body))
            .body(Full::new(parcel.body))
    }
}

fn fault_of(error: &ClientError) -> AttemptFault {
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(NoConnection(fault)) = cause.downcast_ref() {
            return *fault;
        }
        source = cause.source();
    }
    // What fails while connecting and is not said by the connector is what stands on top of it.
    if error.is_connect() { AttemptFault::Tls } else { AttemptFault::Other }
}
