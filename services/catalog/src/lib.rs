//! The catalog service: the products and the clients of a team.
//!
//! A product is a name to which keys, licences and webhooks belong; all of those live with their own services. The
//! first key pair is made by auth while the product is a draft ([`store`]), and what belongs to a deleted product goes
//! by an event that commits with the deletion. A client is a customer, whom licences may name.
//!
//! Deliberately absent: keys, licences, webhooks, and a cache; a product is read when it is shown.

mod domain;
mod rpc;
mod store;

use paperkey_kit::{
    audit,
    events::EventOutbox,
    once::forget_answers,
    service::{Assembled, Rpcs, ServiceDeps, Worker},
};
use paperkey_proto::{
    Error,
    catalog::v1::{catalog_service_server::CatalogServiceServer, client_service_server::ClientServiceServer},
    events::v1::intake_service_server::IntakeServiceServer,
};

use crate::{
    rpc::{Clients, Intake, Products},
    store::Store,
};

/// What the service is called where services name each other.
const NAME: &str = "catalog";

/// Who keeps something of a product, and so must learn that it is gone.
const KEEPERS: [&str; 3] = ["auth", "licensing", "webhook"];

/// Makes the service: its rpcs, a relay to each service that keeps something of a product, and the sweep of products
/// that were not completed.
pub fn assemble(deps: ServiceDeps) -> Result<Assembled, Error> {
    let ServiceDeps { database, keys, clock, signer, channels } = deps;
    let outbox = EventOutbox::new(&keys, clock.clone());
    let [auth, licensing, webhook] = KEEPERS.map(|keeper| channels.get(keeper).cloned());
    let (auth, licensing, webhook) = (auth?, licensing?, webhook?);

    let audit = audit::relay(database.clone(), NAME, &auth, signer.clone());
    let store = Store::new(database.clone(), outbox.clone(), clock);
    let products = Products::new(store.clone(), auth.clone(), signer.clone());
    let rpcs = Rpcs::new(CatalogServiceServer::new(products))
        .add_service(ClientServiceServer::new(Clients::new(store.clone())))
        .add_service(IntakeServiceServer::new(Intake::new(store.clone())));

    let relay = |name, target, channel| outbox.relay(name, database.clone(), NAME, target, channel, signer.clone());
    let workers = vec![
        relay("catalog to auth", "auth", auth),
        relay("catalog to licensing", "licensing", licensing),
        relay("catalog to webhook", "webhook", webhook),
        audit,
        Worker::new("drafts of products", move |shutdown| store.sweep_drafts(shutdown)),
        forget_answers(database.clone()),
    ];
    Ok(Assembled { rpcs, workers })
}
