//! The licensing service: licences, their activations, and the checks that shipped apps make.
//!
//! The limit of a licence is held by its row ([`store`]), its key by a code that needs no look-up
//! ([`domain::license_key`]), and its end by its own time at each answer. A warm validation asks no database and
//! changes nothing.
//!
//! Deliberately absent: products and clients (asked of catalog), webhooks (told by events), and rate limits (the gateway's).

pub mod domain;
mod rpc;
pub mod store;

use paperkey_kit::{
    audit,
    once::forget_answers,
    service::{Assembled, Rpcs, ServiceDeps, Worker},
};
use paperkey_proto::{
    Error,
    events::v1::intake_service_server::IntakeServiceServer,
    licensing::v1::{
        license_check_service_server::LicenseCheckServiceServer, licensing_service_server::LicensingServiceServer,
    },
};

use crate::{
    rpc::{Catalog, Checks, Intake, Licenses},
    store::Store,
};

/// What the service is called where services name each other.
const NAME: &str = "licensing";

/// Makes the service: its rpcs, the relays of its events and of its audit entries, the sweep of what expires, and, where other processes write
/// to the same database, the reader of their changes.
pub fn assemble(deps: ServiceDeps) -> Result<Assembled, Error> {
    let store = Store::new(deps.database.clone(), &deps.keys, deps.clock.clone());
    assemble_around(store, deps)
}

/// The same around a store that the caller keeps a handle of, such as a test that does what the workers do.
pub fn assemble_around(store: Store, deps: ServiceDeps) -> Result<Assembled, Error> {
    let ServiceDeps { signer, channels, .. } = deps;
    let catalog = channels.get("catalog")?.clone();
    let webhook = channels.get("webhook")?.clone();
    let audit = audit::relay(store.database().clone(), NAME, channels.get("auth")?, signer.clone());

    let catalog = Catalog::new(catalog, signer.clone());
    let rpcs = Rpcs::new(LicensingServiceServer::new(Licenses::new(store.clone(), catalog)))
        .add_service(LicenseCheckServiceServer::new(Checks::new(store.clone())))
        .add_service(IntakeServiceServer::new(Intake::new(store.clone())));

    let relay =
        store.outbox().relay("licensing to webhook", store.database().clone(), NAME, "webhook", webhook, signer);
    let expiry = {
        let store = store.clone();
        Worker::new("license expiry", move |shutdown| store.expire(shutdown))
    };
    let mut workers = vec![relay, audit, expiry, forget_answers(store.database().clone())];
    if store.is_shared() {
        workers.push(Worker::new("license changes", move |shutdown| store.follow_changes(shutdown)));
    }
    Ok(Assembled { rpcs, workers })
}
