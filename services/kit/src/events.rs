//! Events between services: sealed into the outbox by the one who makes them, opened by the relay that hands them on.
//!
//! Payloads hold licence keys, so an outbox row keeps them sealed; they are plain only on the way between two
//! processes of the installation.

use std::future::Future;

use paperkey_proto::{
    Error,
    events::v1::{Event, IngestEventsRequest, intake_service_client::IntakeServiceClient},
};
use prost::Message as _;
use serde_json::Value;

use crate::{
    channel::Channel,
    clock::Clock,
    db::{Database, OutboxMessage, Tx},
    ids::new_id,
    outbox::{OutboxRow, Relay, RelayOptions, Sink},
    principal::{Signer, Tenant},
    secrets::{CannotOpen, Keyring, Purpose, Sealer},
    service::Worker,
    telemetry::{self, Span, SpanKind},
};

/// A product was deleted: whoever keeps something of it, deletes that.
pub const PRODUCT_DELETED: &str = "product.deleted";

/// A client was deleted: whoever names it, names nobody. The data holds its `id`.
pub const CLIENT_DELETED: &str = "client.deleted";

/// A team was deleted, with all that it has in both modes: whoever keeps something of it, deletes that. Told twice: at
/// once, and again when nothing that was under way at that moment can still be.
pub const TEAM_DELETED: &str = "team.deleted";

/// A webhook was paused, since its receiver keeps failing or is gone. The data holds `webhookId`, the `host` of its
/// address, the `failures` in a row, and whether it is `gone`.
pub const WEBHOOK_PAUSED: &str = "webhook.paused";

/// The rpc by which events are handed over, for audit entries.
pub const INGEST_EVENTS: &str = "/paperkey.events.v1.IntakeService/IngestEvents";

/// Records events in the transaction that makes them happen.
#[derive(Clone, Debug)]
pub struct EventOutbox {
    sealer: Sealer,
    clock: Clock,
}

impl EventOutbox {
    /// Seals with the installation's keys.
    pub fn new(keys: &Keyring, clock: Clock) -> Self {
        Self { sealer: keys.sealer(Purpose::Outbox), clock }
    }

    /// Records one event for each of the targets. Returns its id.
    pub fn emit(
        &self,
        tx: &Tx,
        targets: &[&'static str],
        topic: &str,
        tenant: &Tenant,
        product_id: &str,
        data: &Value,
    ) -> String {
        let event = Event {
            id: new_id("evt", &self.clock),
            topic: topic.to_owned(),
            team_id: tenant.team_id.clone(),
            mode: tenant.mode.into(),
            product_id: product_id.to_owned(),
            created_at_ms: self.clock.now_ms(),
            data_json: data.to_string(),
            traceparent: telemetry::traceparent(),
        };
        let plain = event.encode_to_vec();
        for target in targets {
            tx.emit(OutboxMessage {
                target,
                id: event.id.clone(),
                topic: event.topic.clone(),
                team_id: event.team_id.clone(),
                payload: self.sealer.seal(&event.id, &plain),
            });
        }
        event.id
    }

    /// Hands what `from` recorded for `target` to that service, at least once, until shut down.
    pub fn relay(
        &self,
        name: &'static str,
        database: Database,
        from: &'static str,
        target: &'static str,
        channel: Channel,
        signer: Signer,
    ) -> Worker {
        let Self { sealer, clock } = self.clone();
        Worker::new(name, move |shutdown| async move {
            let ingest = move |events| {
                let mut intake = IntakeServiceClient::new(channel.as_service(from, signer.clone(), None));
                async move {
                    let outcome = intake.ingest_events(IngestEventsRequest { events }).await;
                    outcome.map(drop).map_err(|status| Error::from_status(&status))
                }
            };
            let holder = new_id("proc", &clock);
            let sink = EventSink { sealer, ingest };
            Relay::new(database, target, holder, sink, RelayOptions::default()).run(shutdown.into_receiver()).await;
        })
    }
}

/// Begins a span for each event whose trace is recorded, in the trace in which the event happened, and lets whoever gets
/// the events go on from there.
pub fn pass_on(kind: &SpanKind, verb: &'static str, events: &mut [Event]) -> Vec<Span> {
    let mut spans = Vec::new();
    for event in events {
        let mut span = telemetry::continued(&event.traceparent, kind.clone(), || format!("{verb} {}", event.topic));
        if span.is_recorded() {
            span.set("messaging.message.id", || event.id.clone());
            event.traceparent = span.traceparent();
            spans.push(span);
        }
    }
    spans
}

struct EventSink<F> {
    sealer: Sealer,
    ingest: F,
}

impl<F, Fut> Sink for EventSink<F>
where
    F: Fn(Vec<Event>) -> Fut + Send + Sync,
    Fut: Future<Output = Result<(), Error>> + Send,
{
    type Error = Error;

    async fn deliver(&self, batch: &[OutboxRow]) -> Result<(), Error> {
        let mut events = Vec::with_capacity(batch.len());
        for row in batch {
            events.extend(self.open(row)?);
        }
        // The one who takes them goes on from here: each event has a trace of its own.
        let spans = pass_on(&SpanKind::Producer, "relay", &mut events);
        let outcome = (self.ingest)(events).await;
        for mut span in spans {
            if let Err(error) = &outcome {
                span.failed(|| error.reason().as_str_name().into());
            }
        }
        outcome
    }
}

impl<F> EventSink<F> {
    /// A row under a key that is not known keeps all waiting until it is: whoever passes over it, deletes it. One that is
    /// damaged never can be opened: it is passed over, loudly, so that those behind it go on.
    fn open(&self, row: &OutboxRow) -> Result<Option<Event>, Error> {
        let opened = self.sealer.open(&row.id, &row.payload);
        if let Err(error @ CannotOpen::UnknownKey(_)) = opened {
            tracing::warn!(event = row.id, topic = row.topic, %error, "an event has to wait");
            return Err(Error::unavailable(error));
        }
        let event = opened.ok().and_then(|plain| Event::decode(plain.as_slice()).ok());
        if event.is_none() {
            tracing::error!(event = row.id, topic = row.topic, "an event cannot be opened and is lost");
        }
        Ok(event)
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::*;
    use crate::secrets::Secret;

    /// Keys whose master keys are of these bytes, the first of which seals.
    fn keys(masters: [u8; 2]) -> Keyring {
        let key = |byte: u8| {
            use base64::Engine as _;
            Secret::new(base64::engine::general_purpose::STANDARD.encode([byte; 32]))
        };
        Keyring::with_previous_masters(&key(masters[0]), &[key(masters[1])], &key(101), &key(102)).unwrap()
    }

    fn row(seq: i64, keys: &Keyring) -> OutboxRow {
        let id = format!("evt_{seq}");
        let payload =
            keys.sealer(Purpose::Outbox).seal(&id, &Event { id: id.clone(), ..Event::default() }.encode_to_vec());
        OutboxRow { seq, id, topic: "test".to_owned(), team_id: "team_1".to_owned(), payload, created_at_ms: 1 }
    }

    #[tokio::test]
    async fn what_is_under_an_unknown_key_waits_and_what_is_damaged_is_passed_over() {
        let (known, ahead) = (keys([1, 2]), keys([3, 1]));
        let told = Mutex::new(Vec::new());
        let ingest = |events: Vec<Event>| {
            told.lock().extend(events.into_iter().map(|event| event.id));
            std::future::ready(Ok(()))
        };
        let sink = EventSink { sealer: known.sealer(Purpose::Outbox), ingest };
        let mut damaged = row(2, &known);
        *damaged.payload.last_mut().unwrap() ^= 1;
        let mut cut = row(3, &ahead);
        cut.payload.truncate(12);
        sink.deliver(&[row(1, &known), damaged, cut, row(4, &keys([2, 1]))]).await.unwrap();
        assert_eq!(*told.lock(), ["evt_1", "evt_4"]);

        let batch = [row(5, &known), row(6, &ahead)];
        let refused = sink.deliver(&batch).await.unwrap_err();
        assert_eq!(refused.reason(), paperkey_proto::errors::v1::Reason::Unavailable);
        assert_eq!(told.lock().len(), 2);
        let sink = EventSink { sealer: keys([1, 3]).sealer(Purpose::Outbox), ..sink };
        sink.deliver(&batch).await.unwrap();
        assert_eq!(told.lock()[2..], ["evt_5", "evt_6"]);
    }
}
