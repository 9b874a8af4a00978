//! What ends by time: sandbox teams, the rows of deleted teams, and what nobody needs to remember.

use std::time::Duration;

use paperkey_kit::{db::Database, ids::new_id, lease::Leases, shutdown::Shutdown};
use paperkey_proto::Error;

use crate::{
    NAME,
    store::{Act, FORGOTTEN_A_STEP, Store},
};

/// How often is looked for teams.
const TEAMS_EVERY: Duration = Duration::from_secs(5);
/// How many teams one look takes.
const TEAMS_A_LOOK: u64 = 100;

/// How often is forgotten what nobody needs.
const FORGET_EVERY: Duration = Duration::from_hours(1);
/// Held from one look to almost the next, so that of many processes one does it.
const FORGET_LEASE: Duration = Duration::from_mins(59);
const FORGET_LEASE_NAME: &str = "auth/forget_ended";

/// How often consumptions are forgotten: there may be many, and each look takes its share.
const CONSUMPTIONS_EVERY: Duration = Duration::from_mins(10);
/// Longer than a step takes, and gone before the next look if its holder dies.
const CONSUMPTIONS_LEASE: Duration = Duration::from_mins(9);
const CONSUMPTIONS_LEASE_NAME: &str = "auth/quotas";
/// Steps of one look at most; the next one goes on.
const MAX_STEPS: u32 = 1_000;

/// Ends teams whose time has come, until shut down.
pub(crate) async fn end_teams(store: Store, mut shutdown: Shutdown) {
    loop {
        teams_once(&store).await;
        tokio::select! {
            () = tokio::time::sleep(TEAMS_EVERY) => {}
            () = shutdown.wait() => return,
        }
    }
}

/// Each team by itself, and nothing if another process was first: what fails with one keeps no other from its end.
async fn teams_once(store: &Store) {
    match store.expired_sandboxes(TEAMS_A_LOOK).await {
        Ok(expired) => {
            for team_id in expired {
                let act = Act::by_service(NAME, "auth/expire-sandbox");
                if let Err(error) = store.expire_sandbox(team_id.clone(), act).await {
                    tracing::warn!(team = team_id, %error, "a sandbox could not be ended");
                }
            }
        }
        Err(error) => tracing::warn!(%error, "sandboxes could not be looked for"),
    }
    match store.removable_teams(TEAMS_A_LOOK).await {
        Ok(removable) => {
            for team_id in removable {
                match store.remove_team(team_id.clone()).await {
                    Ok(true) => tracing::debug!(team = team_id, "a deleted team is removed"),
                    Ok(false) => {}
                    Err(error) => tracing::warn!(team = team_id, %error, "a deleted team could not be removed"),
                }
            }
        }
        Err(error) => tracing::warn!(%error, "deleted teams could not be looked for"),
    }
}

/// Forgets old invitations, links, counts and alerts once an hour, until shut down.
pub(crate) async fn forget(store: Store, database: Database, mut shutdown: Shutdown) {
    let holder = new_id("proc", database.clock());
    let leases = Leases::new(database);
    loop {
        let forgotten = match leases.try_hold(FORGET_LEASE_NAME, &holder, FORGET_LEASE).await {
            Ok(true) => match store.forget_ended().await {
                Ok(ended) => store.forget_alerts().await.map(|alerts| ended + alerts),
                Err(error) => Err(error),
            },
            Ok(false) => Ok(0),
            Err(error) => Err(error.into()),
        };
        // The next hour does what this one could not.
        match forgotten {
            Ok(0) => {}
            Ok(count) => tracing::debug!(count, "what has ended is forgotten"),
            Err(error) => tracing::warn!(%error, "what has ended could not be forgotten"),
        }
        tokio::select! {
            () = tokio::time::sleep(FORGET_EVERY) => {}
            () = shutdown.wait() => return,
        }
    }
}

/// Forgets consumptions that nobody repeats any more, until shut down.
pub(crate) async fn forget_consumptions(store: Store, database: Database, mut shutdown: Shutdown) {
    let (holder, leases) = (new_id("proc", database.clock()), Leases::new(database));
    loop {
        match forget_consumptions_once(&store, &leases, &holder, &shutdown).await {
            Ok(0) => {}
            Ok(count) => tracing::debug!(count, "old consumptions are forgotten"),
            // The next look does what this one could not.
            Err(error) => tracing::warn!(%error, "old consumptions could not be forgotten"),
        }
        tokio::select! {
            () = tokio::time::sleep(CONSUMPTIONS_EVERY) => {}
            () = shutdown.wait() => break,
        }
    }
    // If this fails, the lease runs out by itself.
    let _ = leases.release(CONSUMPTIONS_LEASE_NAME, &holder).await;
}

async fn forget_consumptions_once(
    store: &Store,
    leases: &Leases,
    holder: &str,
    shutdown: &Shutdown,
) -> Result<u64, Error> {
    let mut forgotten = 0;
    for _ in 0..MAX_STEPS {
        if !leases.try_hold(CONSUMPTIONS_LEASE_NAME, holder, CONSUMPTIONS_LEASE).await? {
            break;
        }
        let now = store.forget_consumptions().await?;
        forgotten += now;
        if now < FORGOTTEN_A_STEP || shutdown.has_come() {
            break;
        }
    }
    Ok(forgotten)
}
