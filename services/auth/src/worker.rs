//! What the service does besides answering: it forgets old changes.

use std::time::Duration;

use paperkey_kit::{
    changes::prune_changes,
    db::{Database, DbError},
    ids::new_id,
    lease::Leases,
    shutdown::Shutdown,
};

/// How long changes are kept. A gateway asks four times a second; one that slept longer forgets all it has cached.
const KEEP: Duration = Duration::from_hours(24);
/// How often they are looked through.
const EVERY: Duration = Duration::from_hours(1);
/// Held from one look to almost the next, so that of many processes one does it.
const LEASE: Duration = Duration::from_mins(59);
const LEASE_NAME: &str = "auth/prune_changes";

/// Forgets old changes once an hour, until shut down.
pub(crate) async fn prune(database: Database, mut shutdown: Shutdown) {
    let holder = new_id("proc", database.clock());
    loop {
        match prune_once(&database, &holder).await {
            Ok(0) => {}
            Ok(removed) => tracing::debug!(removed, "old changes are forgotten"),
            // The next hour does what this one could not.
            Err(error) => tracing::warn!(%error, "old changes could not be forgotten"),
        }
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = shutdown.wait() => return,
        }
    }
}

async fn prune_once(database: &Database, holder: &str) -> Result<u64, DbError> {
    if Leases::new(database.clone()).try_hold(LEASE_NAME, holder, LEASE).await? {
        prune_changes(database, KEEP).await
    } else {
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use paperkey_kit::{clock::Clock, db::Database, testing::TestDb};

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn one_of_two_processes_forgets_what_is_a_day_old() {
        let db = TestDb::sqlite();
        let (clock, hand) = Clock::manual(1_790_000_000_000);
        let mut options = db.options();
        options.clock = clock;
        let database = Database::open(options).await.unwrap();
        database.migrate_up::<paperkey_migrations::auth::Migrator>().await.unwrap();
        let change = || async {
            database
                .write(|tx| async move {
                    tx.changed("key:key_1");
                    Ok::<_, DbError>(())
                })
                .await
                .unwrap();
        };
        change().await;
        assert_eq!(prune_once(&database, "first").await.unwrap(), 0, "it is young");
        hand.advance_ms(24 * 60 * 60 * 1_000 + 1);
        change().await;
        assert!(Leases::new(database.clone()).try_hold(LEASE_NAME, "second", LEASE).await.unwrap());
        assert_eq!(prune_once(&database, "first").await.unwrap(), 0, "the second has the lease");
        assert_eq!(prune_once(&database, "second").await.unwrap(), 1);
    }
}
