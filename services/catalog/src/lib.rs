//! The catalog service: the products of a team.
//!
//! A product is a name to which keys, licences and webhooks belong; all of those live with their own services. The
//! first key pair is made by auth before the product is written, and what belongs to a deleted product goes by an
//! event that commits with the deletion.
//!
//! Deliberately absent: keys, licences, webhooks, and a cache; a product is read when it is shown.

mod domain;
mod rpc;
mod store;

use paperkey_kit::{
    channel::Channel,
    events::EventOutbox,
    principal::Signer,
    service::{Assembled, Rpcs, ServiceDeps, Worker},
    shutdown::Shutdown,
};
use paperkey_proto::{
    Error,
    auth::v1::{self as auth, intake_service_client::IntakeServiceClient as AuthIntake},
    catalog::v1::catalog_service_server::CatalogServiceServer,
    events::v1::Event,
    licensing::v1::{self as licensing, intake_service_client::IntakeServiceClient as LicensingIntake},
    webhook::v1::{self as webhook, intake_service_client::IntakeServiceClient as WebhookIntake},
};

use crate::{rpc::Products, store::Store};

/// What the service is called where services name each other.
const NAME: &str = "catalog";

/// Who keeps something of a product, and so must learn that it is gone.
const KEEPERS: [&str; 3] = ["auth", "licensing", "webhook"];

/// Makes the service: its rpcs, and a relay to each service that keeps something of a product.
pub fn assemble(deps: ServiceDeps) -> Result<Assembled, Error> {
    let ServiceDeps { database, keys, clock, signer, channels } = deps;
    let outbox = EventOutbox::new(&keys, clock.clone());
    let [auth, licensing, webhook] = KEEPERS.map(|keeper| channels.get(keeper).cloned());
    let (auth, licensing, webhook) = (auth?, licensing?, webhook?);

    let store = Store::new(database.clone(), outbox.clone(), clock);
    let products = Products::new(store, auth.clone(), signer.clone());
    let rpcs = Rpcs::new(CatalogServiceServer::new(products));

    let relay = |name, target, channel: Channel, hand_over: HandOver| {
        let (outbox, database, signer) = (outbox.clone(), database.clone(), signer.clone());
        Worker::new(name, move |shutdown: Shutdown| {
            let ingest = move |events| hand_over(&channel, signer.clone(), events);
            outbox.relay(database, target, ingest, shutdown)
        })
    };
    let workers = vec![
        relay("catalog to auth", "auth", auth, to_auth),
        relay("catalog to licensing", "licensing", licensing, to_licensing),
        relay("catalog to webhook", "webhook", webhook, to_webhook),
    ];
    Ok(Assembled { rpcs, workers })
}

type HandedOver = std::pin::Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>;
type HandOver = fn(&Channel, Signer, Vec<Event>) -> HandedOver;

fn to_auth(channel: &Channel, signer: Signer, events: Vec<Event>) -> HandedOver {
    let mut client = AuthIntake::new(channel.as_service(NAME, signer, None));
    Box::pin(async move {
        let outcome = client.ingest_events(auth::IngestEventsRequest { events }).await;
        outcome.map(drop).map_err(|status| Error::from_status(&status))
    })
}

fn to_licensing(channel: &Channel, signer: Signer, events: Vec<Event>) -> HandedOver {
    let mut client = LicensingIntake::new(channel.as_service(NAME, signer, None));
    Box::pin(async move {
        let outcome = client.ingest_events(licensing::IngestEventsRequest { events }).await;
        outcome.map(drop).map_err(|status| Error::from_status(&status))
    })
}

fn to_webhook(channel: &Channel, signer: Signer, events: Vec<Event>) -> HandedOver {
    let mut client = WebhookIntake::new(channel.as_service(NAME, signer, None));
    Box::pin(async move {
        let outcome = client.ingest_events(webhook::IngestEventsRequest { events }).await;
        outcome.map(drop).map_err(|status| Error::from_status(&status))
    })
}
