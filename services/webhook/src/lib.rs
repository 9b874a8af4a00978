//! The webhook service: endpoints, the events that it takes over, and their way to the receivers.
//!
//! An endpoint belongs to a product and gets its events, or to the team and gets those of the team. An event is taken
//! over once and becomes one delivery for each endpoint that subscribes to it. A delivery goes out
//! at least once and keeps its id over all attempts; claims in the database, and not locks in a process, decide who
//! sends it. Where nothing may go is decided when an address is written and again when it is dialled.
//!
//! That an endpoint was paused is told to auth, which tells the team.
//!
//! Deliberately absent: what makes events; they come through the outboxes of other services.

mod deliver;
mod domain;
mod figures;
pub mod forward;
mod housekeeping;
mod rpc;
mod store;
mod wake;

use std::{net::SocketAddr, sync::Arc};

use paperkey_kit::{
    audit,
    once::forget_answers,
    service::{Assembled, Rpcs, ServiceDeps, Worker},
    shutdown::{self, Shutdown},
};
use paperkey_proto::{
    Error, events::v1::intake_service_server::IntakeServiceServer,
    webhook::v1::webhook_service_server::WebhookServiceServer,
};

use crate::{
    deliver::{Dispatcher, Pace, Sender},
    domain::{endpoint::UrlRules, schedule::Schedule},
    housekeeping::Retention,
    rpc::{Intake, Watches, Webhooks},
    store::Store,
    wake::Wake,
};

/// What the service is called where services name each other.
const NAME: &str = "webhook";

/// How webhooks are sent.
#[derive(Clone, Debug)]
pub struct WebhookConfig {
    /// Takes addresses with plain http as well. For development.
    pub allow_http: bool,
    /// Sends to addresses that are not public as well. For development.
    pub allow_private_networks: bool,
    /// How long one exchange may take, from the name to the last byte of the answer.
    pub timeout_ms: u64,
    /// How many deliveries to one endpoint are under way at once, in each process.
    pub max_in_flight_per_endpoint: usize,
    /// The waits before the first attempt, the second and so on; as many attempts as there are waits.
    pub retry_schedule_s: Vec<u64>,
    /// How long deliveries are held for a paused endpoint.
    pub held_days: u32,
    /// How long finished deliveries are kept.
    pub kept_days: u32,
    /// The name servers that are asked for addresses; those of the system where absent.
    pub name_servers: Option<Vec<SocketAddr>>,
    /// Certificates (PEM) that are trusted beside the public ones.
    pub extra_ca: Option<Vec<u8>>,
    /// The version that the user agent names.
    pub version: &'static str,
}

impl Default for WebhookConfig {
    fn default() -> Self {
        Self {
            allow_http: false,
            allow_private_networks: false,
            timeout_ms: 5_000,
            max_in_flight_per_endpoint: 5,
            retry_schedule_s: vec![0, 5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400],
            held_days: 30,
            kept_days: 30,
            name_servers: None,
            extra_ca: None,
            version: env!("CARGO_PKG_VERSION"),
        }
    }
}

impl WebhookConfig {
    fn url_rules(&self) -> UrlRules {
        UrlRules { allow_http: self.allow_http, allow_private_networks: self.allow_private_networks }
    }
}

/// Makes the service: its rpcs, the dispatcher, the relay of its audit entries, and the housekeeping.
pub fn assemble(deps: ServiceDeps, config: WebhookConfig) -> Result<Assembled, Error> {
    let ServiceDeps { database, keys, clock, signer, channels } = deps;
    let (auth, catalog) = (channels.get("auth")?.clone(), channels.get("catalog")?.clone());
    let audit = audit::relay(database.clone(), NAME, &auth, signer.clone());
    let wake = Arc::new(Wake::default());
    let (rules, pace) = (config.url_rules(), Pace::new(&config));
    let sender = Sender::new(&config, clock.clone())?;
    let schedule = Arc::new(Schedule::new(config.retry_schedule_s));
    let retention = Retention::of_days(config.held_days, config.kept_days);
    let store = Store::new(database.clone(), &keys, clock.clone(), schedule, Arc::clone(&wake));

    let relay = store.outbox().relay("webhook to auth", database.clone(), NAME, "auth", auth, signer.clone());
    // Calls are finished before a process ends; watching would go on for minutes, and so is told.
    let (end_watches, ending) = shutdown::channel();
    let webhooks = Webhooks::new(store.clone(), rules, catalog, signer, Watches::until(ending));
    let rpcs = Rpcs::new(WebhookServiceServer::new(webhooks))
        .add_service(IntakeServiceServer::new(Intake::new(store.clone())));

    let dispatcher = Dispatcher::new(store.clone(), sender, clock.clone(), wake, pace);
    figures::publish();
    let (counted, counting) = (store.clone(), clock.clone());
    let workers = vec![
        Worker::new("webhook figures", move |shutdown| figures::sample(counted, counting, shutdown)),
        forget_answers(database.clone()),
        audit,
        Worker::new("webhook dispatcher", move |shutdown| dispatcher.run(shutdown)),
        Worker::new("webhook housekeeping", move |shutdown| {
            housekeeping::run(store, database, clock, retention, shutdown)
        }),
        Worker::new("webhook watches", |mut shutdown: Shutdown| async move {
            shutdown.wait().await;
            end_watches.shut_down();
        }),
        relay,
    ];
    Ok(Assembled { rpcs, workers })
}
