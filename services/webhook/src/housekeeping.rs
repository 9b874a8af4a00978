//! Forgets what was kept long enough. One process at a time does it; doing it twice would do no harm.

use std::time::Duration;

use paperkey_kit::{
    clock::Clock,
    db::{Database, DbError},
    ids::new_id,
    lease::Leases,
    shutdown::Shutdown,
};

use crate::store::Store;

/// How long an event without deliveries is kept, so that it is known if it comes again.
const EVENTS_KEPT_MS: i64 = 24 * 3_600 * 1_000;
/// The time between two rounds.
const INTERVAL: Duration = Duration::from_mins(10);
/// How long the lease outlives its holder.
const LEASE: Duration = Duration::from_mins(5);
const LEASE_NAME: &str = "webhook-housekeeping";

/// How long what is kept.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Retention {
    /// Deliveries for a paused endpoint.
    pub(crate) held_ms: i64,
    /// Finished deliveries.
    pub(crate) kept_ms: i64,
}

impl Retention {
    /// As many days.
    pub(crate) fn of_days(held: u32, kept: u32) -> Self {
        let ms = |days| i64::from(days).saturating_mul(24 * 3_600 * 1_000);
        Self { held_ms: ms(held), kept_ms: ms(kept) }
    }
}

/// Forgets, from time to time, until shut down.
pub(crate) async fn run(store: Store, database: Database, clock: Clock, retention: Retention, mut shutdown: Shutdown) {
    let leases = Leases::new(database);
    let holder = new_id("proc", &clock);
    loop {
        match leases.try_hold(LEASE_NAME, &holder, LEASE).await {
            Ok(true) => {
                if let Err(error) = round(&store, clock.now_ms(), retention, &shutdown).await {
                    tracing::warn!(%error, "housekeeping was cut short");
                }
                // If this fails, the lease runs out by itself.
                let _ = leases.release(LEASE_NAME, &holder).await;
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(%error, "housekeeping has to wait"),
        }
        tokio::select! {
            () = shutdown.wait() => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
    }
}

async fn round(store: &Store, now_ms: i64, retention: Retention, shutdown: &Shutdown) -> Result<(), DbError> {
    while !shutdown.has_come() && store.forget_secrets().await? {}
    store.forget_watchers().await?;
    while !shutdown.has_come() && store.fail_held(now_ms.saturating_sub(retention.held_ms)).await? {}
    while !shutdown.has_come() && store.remove_finished(now_ms.saturating_sub(retention.kept_ms)).await? {}
    let mut after = Some(String::new());
    while let Some(id) = after.take().filter(|_| !shutdown.has_come()) {
        let (gone, next) = store.orphaned(id).await?;
        for endpoint_id in gone {
            while !shutdown.has_come() && store.forget_orphans(endpoint_id.clone()).await? {}
        }
        after = next;
    }
    let mut after = Some(String::new());
    while let Some(id) = after.take().filter(|_| !shutdown.has_come()) {
        after = store.remove_events(id, now_ms.saturating_sub(EVENTS_KEPT_MS)).await?;
    }
    Ok(())
}
