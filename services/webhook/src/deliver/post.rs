//! One POST: signed, bounded in time and size, never redirected.

use std::{error::Error as StdError, time::Duration};

use bytes::Bytes;
use http::{HeaderValue, Request, header};
use http_body_util::{BodyExt as _, Full};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, Error as ClientError},
    rt::{TokioExecutor, TokioTimer},
};
use paperkey_kit::clock::Clock;

use super::{
    Limits,
    connector::{Connector, NoConnection},
};
use crate::{
    domain::{
        attempt::{Attempt, AttemptFault, fault_of_status, snippet},
        endpoint::UrlRules,
        schedule::retry_after_ms,
        signature::Signatures,
    },
    store::dispatch::{Claimed, Receiver},
};

/// How much of an answer's body is read.
const MAX_ANSWER_BYTES: usize = 16 * 1_024;
/// How long an unused connection is kept.
const IDLE: Duration = Duration::from_secs(30);
/// Unused connections kept to one receiver.
const IDLE_PER_HOST: usize = 4;

/// Sends deliveries.
pub(crate) struct Poster {
    client: Client<HttpsConnector<Connector>, Full<Bytes>>,
    clock: Clock,
    rules: UrlRules,
    timeout: Duration,
    user_agent: HeaderValue,
}

/// What an answer told.
struct Answer {
    status: u16,
    snippet: Option<String>,
    retry_after_ms: Option<i64>,
}

impl Poster {
    /// Sends within those limits.
    pub(crate) fn new(limits: &Limits, clock: Clock, version: &str) -> Self {
        let connector = HttpsConnectorBuilder::new()
            .with_webpki_roots()
            .https_or_http()
            .enable_http1()
            .wrap_connector(Connector::new(limits.rules));
        let client = Client::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .pool_max_idle_per_host(IDLE_PER_HOST)
            .build(connector);
        let user_agent = HeaderValue::from_str(&format!("Paperkey/{version}"))
            .unwrap_or_else(|_| HeaderValue::from_static("Paperkey"));
        Self { client, clock, rules: limits.rules, timeout: limits.timeout, user_agent }
    }

    /// Sends a delivery once. The time covers everything from the look-up of the name to the last byte that is read.
    pub(crate) async fn post(&self, delivery: &Claimed, receiver: &Receiver) -> Attempt {
        let at_ms = self.clock.now_ms();
        let began = self.clock.monotonic();
        let outcome = tokio::time::timeout(self.timeout, self.exchange(delivery, receiver, at_ms)).await;
        let duration = self.clock.monotonic().saturating_duration_since(began);
        let duration_ms = i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
        let failed = |fault| Attempt {
            at_ms,
            duration_ms,
            response_status: None,
            fault: Some(fault),
            snippet: None,
            retry_after_ms: None,
        };
        match outcome {
            Err(_) => failed(AttemptFault::Timeout),
            Ok(Err(fault)) => failed(fault),
            Ok(Ok(answer)) => Attempt {
                at_ms,
                duration_ms,
                response_status: Some(answer.status),
                fault: fault_of_status(answer.status),
                snippet: answer.snippet,
                retry_after_ms: answer.retry_after_ms,
            },
        }
    }

    async fn exchange(&self, delivery: &Claimed, receiver: &Receiver, at_ms: i64) -> Result<Answer, AttemptFault> {
        let request = self.request(delivery, receiver, at_ms)?;
        let response = self.client.request(request).await.map_err(|error| fault_of(&error))?;
        let (head, mut body) = response.into_parts();
        let mut read = Vec::new();
        while read.len() < MAX_ANSWER_BYTES {
            match body.frame().await {
                Some(Ok(frame)) => {
                    let data = frame.into_data().unwrap_or_default();
                    let room = MAX_ANSWER_BYTES - read.len();
                    read.extend_from_slice(data.get(..room).unwrap_or(&data));
                }
                Some(Err(_)) => return Err(AttemptFault::Other),
                None => break,
            }
        }
        let asked = head.headers.get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
        Ok(Answer {
            status: head.status.as_u16(),
            snippet: snippet(&read),
            retry_after_ms: asked.and_then(|value| retry_after_ms(value, self.clock.now_ms())),
        })
    }

    fn request(
        &self,
        delivery: &Claimed,
        receiver: &Receiver,
        at_ms: i64,
    ) -> Result<Request<Full<Bytes>>, AttemptFault> {
        // The rules may have become stricter since the address was written down.
        let target = self.rules.read(&receiver.url).map_err(|_| AttemptFault::AddressNotAllowed)?;
        let (Some(body), Some(secret)) = (&delivery.body, &receiver.secret) else { return Err(AttemptFault::Other) };
        let signatures = Signatures::of(secret).ok_or(AttemptFault::Other)?;
        let timestamp_s = at_ms / 1_000;
        Request::post(target.uri)
            .header(header::CONTENT_TYPE, "application/json")
            .header(header::USER_AGENT, self.user_agent.clone())
            .header("x-paperkey-event", &delivery.topic)
            .header("x-paperkey-delivery", &delivery.id)
            .header("x-paperkey-signature", signatures.own(body))
            .header("webhook-id", &delivery.id)
            .header("webhook-timestamp", timestamp_s)
            .header("webhook-signature", signatures.standard(&delivery.id, timestamp_s, body))
            .body(Full::new(Bytes::copy_from_slice(body)))
            .map_err(|_| AttemptFault::Other)
    }
}

/// The one word for what went wrong, found in the chain of causes.
fn fault_of(error: &ClientError) -> AttemptFault {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(error) = cause {
        if let Some(NoConnection(fault)) = error.downcast_ref() {
            return *fault;
        }
        if error.is::<rustls::Error>() {
            return AttemptFault::Tls;
        }
        // An io::Error keeps what it wraps beside the chain, not in it.
        let wrapped = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        cause = match wrapped {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    if error.is_connect() { AttemptFault::Connect } else { AttemptFault::Other }
}
