//! What ends by time: sandbox teams, the rows of deleted teams, and what nobody needs to remember.

use std::time::Duration;

use paperkey_kit::{db::Database, ids::new_id, lease::Leases, shutdown::Shutdown};

use crate::{
    NAME,
    store::{Act, Store},
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

/// Forgets old invitations, links and counts once an hour, until shut down.
pub(crate) async fn forget(store: Store, database: Database, mut shutdown: Shutdown) {
    let holder = new_id("proc", database.clock());
    let leases = Leases::new(database);
    loop {
        let forgotten = match leases.try_hold(FORGET_LEASE_NAME, &holder, FORGET_LEASE).await {
            Ok(true) => store.forget_ended().await,
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
