//! The webhook service: endpoints, the events they subscribe to, and deliveries that arrive.
//!
//! Events come in from the outboxes of other services, at least once, and are kept once. Each becomes one delivery an
//! endpoint, which the dispatcher sends until the receiver has it or the schedule ends.
//!
//! Deliberately absent: waiting. Nothing that a caller does waits for a receiver.

mod deliver;
mod domain;
mod rpc;
mod store;
mod wake;

use std::{sync::Arc, time::Duration};

use paperkey_kit::{
    clock::Clock,
    db::DbError,
    ids::new_id,
    lease::Leases,
    service::{Assembled, Rpcs, ServiceDeps, Worker},
    shutdown::Shutdown,
};
use paperkey_proto::{
    Error,
    webhook::v1::{intake_service_server::IntakeServiceServer, webhook_service_server::WebhookServiceServer},
};

use crate::{
    deliver::{Dispatcher, Limits, Poster},
    domain::{endpoint::UrlRules, schedule::Schedule},
    store::Store,
    wake::Wake,
};

/// How often old deliveries are looked for.
const TIDY: Duration = Duration::from_mins(10);
/// How long deliveries are kept, and held ones wait: 30 days, in milliseconds.
const KEEP_MS: i64 = 30 * 24 * 3_600 * 1_000;
/// How long one process tidies alone.
const TIDY_LEASE: Duration = Duration::from_mins(2);

/// How the service behaves.
#[derive(Clone, Debug)]
pub struct WebhookConfig {
    /// For development: allows `http://` addresses.
    pub allow_http: bool,
    /// For development: allows addresses that are not public.
    pub allow_private_networks: bool,
    /// How long one exchange may take.
    pub timeout_ms: u64,
    /// Deliveries under way to one endpoint at a time.
    pub max_in_flight_per_endpoint: u32,
    /// The waits before each attempt.
    pub retry_schedule_s: Vec<u64>,
    /// The version that receivers are told.
    pub version: &'static str,
}

/// Puts the service together.
pub fn assemble(deps: ServiceDeps, config: WebhookConfig) -> Result<Assembled, Error> {
    let ServiceDeps { database, keys, clock, signer, channels } = deps;
    let rules = UrlRules { allow_http: config.allow_http, allow_private_networks: config.allow_private_networks };
    let (schedule, wake) = (Arc::new(Schedule::new(&config.retry_schedule_s)), Arc::new(Wake::default()));
    let store = Store::new(database.clone(), &keys, clock.clone(), schedule, Arc::clone(&wake));
    let limits = Limits {
        rules,
        timeout: Duration::from_millis(config.timeout_ms),
        per_endpoint: usize::try_from(config.max_in_flight_per_endpoint).unwrap_or(usize::MAX),
    };
    let poster = Poster::new(&limits, clock.clone(), config.version);
    let dispatcher = Dispatcher::new(store.clone(), clock.clone(), wake, poster, limits);

    let catalog = channels.get("catalog")?.clone();
    let webhooks = rpc::webhooks::Webhooks { store: store.clone(), rules, catalog, signer };
    let rpcs = Rpcs::new(WebhookServiceServer::new(webhooks))
        .add_service(IntakeServiceServer::new(rpc::intake::Intake { store: store.clone() }));
    let holder = new_id("proc", &clock);
    let workers = vec![
        Worker::new("webhook/deliver", |shutdown| dispatcher.run(shutdown)),
        Worker::new("webhook/tidy", move |shutdown| tidy(store, clock, Leases::new(database), holder, shutdown)),
    ];
    Ok(Assembled { rpcs, workers })
}

/// Forgets what is old, one process at a time, until shut down.
async fn tidy(store: Store, clock: Clock, leases: Leases, holder: String, mut shutdown: Shutdown) {
    while !shutdown.has_come() {
        let tidied = async {
            if leases.try_hold("webhook/tidy", &holder, TIDY_LEASE).await? {
                forget(&store, clock.now_ms().saturating_sub(KEEP_MS), &shutdown).await?;
            }
            Ok::<_, DbError>(())
        };
        if let Err(error) = tidied.await {
            tracing::warn!(%error, "old deliveries are not forgotten");
        }
        tokio::select! {
            () = shutdown.wait() => {}
            () = tokio::time::sleep(TIDY) => {}
        }
    }
}

/// Fails what was held too long, and removes finished deliveries and events that nobody needs, in batches.
async fn forget(store: &Store, before_ms: i64, shutdown: &Shutdown) -> Result<(), DbError> {
    while !shutdown.has_come() && store.fail_held(before_ms).await? {}
    while !shutdown.has_come() && store.remove_finished(before_ms).await? {}
    let mut after = Some(String::new());
    while let Some(id) = after.filter(|_| !shutdown.has_come()) {
        after = store.remove_events(id, before_ms).await?;
    }
    Ok(())
}
