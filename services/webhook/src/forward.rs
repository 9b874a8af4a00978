//! Sends events to a developer's own machine, as deliveries are sent to endpoints: the same bytes under the same headers,
//! from the same client, which follows no redirect and knows no proxy.
//!
//! An address may be private here and needs no TLS: whoever names it asks for it. Everything is tried once, and nothing
//! is written down.

use bytes::Bytes;
use paperkey_kit::{clock::Clock, secrets::Secret};
use paperkey_proto::Error;

use crate::{
    WebhookConfig,
    deliver::{Parcel, Sender},
    domain::{
        attempt::AttemptFault,
        endpoint::{Target, UrlRules},
        signature::{self, Signatures},
    },
};

/// A new signing secret, `whsec_…`.
pub fn new_secret() -> Secret {
    signature::new_secret()
}

/// Sends events to one address, signed under one secret.
pub struct Forwarder {
    sender: Sender,
    target: Target,
    signatures: Signatures,
}

/// What came of sending an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Forwarded {
    /// The status of the answer, if there was one.
    pub response_status: Option<u16>,
    /// How long it took.
    pub duration_ms: i64,
    /// Why it failed; `None` where it did not.
    pub fault: Option<&'static str>,
}

impl Forwarder {
    /// Sends to an address, at most so many at a time, each within the time. Fails with what is wrong with `url` or
    /// with `secret`.
    pub fn new(url: &str, secret: &Secret, at_once: usize, timeout_ms: u64, clock: Clock) -> Result<Self, Error> {
        let config = WebhookConfig {
            allow_http: true,
            allow_private_networks: true,
            timeout_ms,
            max_in_flight_per_endpoint: at_once,
            ..WebhookConfig::default()
        };
        let target = UrlRules { allow_http: true, allow_private_networks: true }.read(url)?;
        let signatures = Signatures::of(secret)
            .ok_or_else(|| Error::field("secret", "must be a signing secret: whsec_ and base 64"))?;
        Ok(Self { sender: Sender::new(&config, clock)?, target, signatures })
    }

    /// Sends an event once, under the id of a delivery.
    pub async fn forward(&self, delivery_id: &str, event: &str, payload: String) -> Forwarded {
        let parcel = Parcel { delivery_id, topic: event, body: Bytes::from(payload), traceparent: "" };
        let attempt = self.sender.send(&self.target, &self.signatures, parcel).await;
        Forwarded {
            response_status: attempt.response_status,
            duration_ms: attempt.duration_ms,
            fault: attempt.fault.map(said),
        }
    }
}

/// Why an attempt failed, for a person.
fn said(fault: AttemptFault) -> &'static str {
    match fault {
        AttemptFault::Timeout => "no whole answer in time",
        AttemptFault::Dns => "the name does not resolve",
        AttemptFault::AddressNotAllowed => "it cannot be sent to that address",
        AttemptFault::Connect => "nobody accepts connections there",
        AttemptFault::Tls => "no trustworthy encrypted connection",
        AttemptFault::HttpStatus => "the status says no",
        AttemptFault::Redirect => "redirects are not followed",
        AttemptFault::Other => "the answer is not HTTP",
    }
}
