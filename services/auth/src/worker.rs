//! What the service does besides answering: it forgets old changes, tells the holders of keys that a rotation is due and
//! their teams that an end is near, and forgets keys that ended long ago.

use std::time::Duration;

use paperkey_kit::{
    changes::prune_changes,
    db::{Database, DbError},
    ids::new_id,
    lease::Leases,
    shutdown::Shutdown,
};
use paperkey_proto::Error;

use crate::store::{STEP, Store};

/// How long changes are kept. A gateway asks four times a second; one that slept longer forgets all it has cached.
const KEEP: Duration = Duration::from_hours(24);
/// How often they are looked through.
const EVERY: Duration = Duration::from_hours(1);
/// Held from one look to almost the next, so that of many processes one does it.
const LEASE: Duration = Duration::from_mins(59);
const LEASE_NAME: &str = "auth/prune_changes";

/// How often keys are looked through: a rotation that is due is told within a minute.
const KEYS_EVERY: Duration = Duration::from_mins(1);
/// Longer than a round takes, and gone before the next but one if its holder dies.
const KEYS_LEASE: Duration = Duration::from_secs(90);
const KEYS_LEASE_NAME: &str = "auth/keys";
/// Steps of one round at most; the next round goes on.
const MAX_STEPS: u32 = 50;

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

/// Looks through the keys once a minute, until shut down.
pub(crate) async fn keep_keys(store: Store, database: Database, mut shutdown: Shutdown) {
    let (holder, leases) = (new_id("proc", database.clock()), Leases::new(database));
    loop {
        match keep_keys_once(&store, &leases, &holder, &shutdown).await {
            Ok((0, 0)) => {}
            Ok((told, purged)) => tracing::debug!(told, purged, "keys are looked through"),
            // The next minute does what this one could not.
            Err(error) => tracing::warn!(%error, "keys could not be looked through"),
        }
        tokio::select! {
            () = tokio::time::sleep(KEYS_EVERY) => {}
            () = shutdown.wait() => break,
        }
    }
    // If this fails, the lease runs out by itself.
    let _ = leases.release(KEYS_LEASE_NAME, &holder).await;
}

/// One round: how many holders were told, and how many keys forgotten.
async fn keep_keys_once(
    store: &Store,
    leases: &Leases,
    holder: &str,
    shutdown: &Shutdown,
) -> Result<(u64, u64), Error> {
    let (mut told, mut purged) = (0, 0);
    for _ in 0..MAX_STEPS {
        if shutdown.has_come() || !leases.try_hold(KEYS_LEASE_NAME, holder, KEYS_LEASE).await? {
            break;
        }
        let now_told = store.tell_rotations().await?.max(store.tell_expiries().await?);
        let now_purged = store.purge_keys().await?;
        told += now_told;
        purged += now_purged;
        if now_told < STEP && now_purged < STEP {
            break;
        }
    }
    Ok((told, purged))
}

#[cfg(test)]
mod tests {
    use std::{future::Future, sync::Arc};

    use paperkey_kit::{
        clock::{Clock, ManualClock},
        principal::Tenant,
        secrets::{Keyring, Secret},
        shutdown,
        testing::TestDb,
    };
    use paperkey_proto::principal::v1::{Mode, Role};
    use sea_orm::{ConnectionTrait as _, Statement};

    use super::*;
    use crate::{
        accounts::{Accounts, Registration},
        domain::{
            api_key::{Changes, Doer, Hand, Overlap, Terms},
            key::KeyKind,
            session::Sessions,
        },
        store::{Act, MadeKey, TenantStore},
    };

    const START_MS: i64 = 1_790_000_000_000;
    const DAY_MS: i64 = 24 * 60 * 60 * 1_000;

    /// On SQLite and on PostgreSQL, where time stands still.
    async fn on_both<F, Fut>(test: F)
    where
        F: Fn(Database, ManualClock) -> Fut,
        Fut: Future<Output = ()>,
    {
        for db in [Some(TestDb::sqlite()), TestDb::postgres().await].into_iter().flatten() {
            let (clock, hand) = Clock::manual(START_MS);
            let mut options = db.options();
            options.clock = clock;
            let database = Database::open(options).await.unwrap();
            database.migrate_up::<paperkey_migrations::auth::Migrator>().await.unwrap();
            test(database.clone(), hand).await;
            database.close().await;
            db.remove().await;
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_of_two_processes_forgets_what_is_a_day_old() {
        on_both(|database, hand| async move {
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
            hand.advance_ms(DAY_MS + 1);
            change().await;
            assert!(Leases::new(database.clone()).try_hold(LEASE_NAME, "second", LEASE).await.unwrap());
            assert_eq!(prune_once(&database, "first").await.unwrap(), 0, "the second has the lease");
            assert_eq!(prune_once(&database, "second").await.unwrap(), 1);
        })
        .await;
    }

    /// A team, and the means to look through its keys.
    struct Team {
        store: Store,
        of: TenantStore,
        doer: Doer,
        leases: Leases,
        shutdown: Shutdown,
        _handle: shutdown::ShutdownHandle,
    }

    impl Team {
        async fn new(database: &Database) -> Self {
            let keys = Keyring::for_tests();
            let store = Store::new(database.clone(), &keys, Arc::default());
            let sessions = Arc::new(Sessions::new(keys.signing_seed()).unwrap());
            let accounts =
                Accounts::new(store.clone(), Arc::default(), sessions, database.clock().clone(), String::new());
            let ada = Registration { email: "ada@example.com".into(), password: Secret::new("12345678"), name: None };
            let welcome = accounts.register(ada, Act::by_operator("test")).await.unwrap();
            let of = store.of(Tenant { team_id: welcome.team.id, mode: Mode::Live });
            let user_id = welcome.account.id;
            let doer =
                Doer { id: user_id.clone(), name: String::new(), hand: Hand::Member { user_id, role: Role::Owner } };
            let (handle, shutdown) = shutdown::channel();
            Self { store, of, doer, leases: Leases::new(database.clone()), shutdown, _handle: handle }
        }

        async fn key(&self, terms: Terms) -> MadeKey {
            let act = Act::by_operator("test");
            self.of.create_key(KeyKind::Team, Mode::Live, terms, self.doer.clone(), act).await.unwrap()
        }

        async fn round(&self) -> (u64, u64) {
            keep_keys_once(&self.store, &self.leases, "first", &self.shutdown).await.unwrap()
        }
    }

    async fn count(database: &Database, sql: &'static str) -> i64 {
        let job = database.read(move |reader| async move {
            let statement = Statement::from_string(reader.get_database_backend(), sql);
            let row = reader.query_one_raw(statement).await?;
            Ok::<_, DbError>(row.unwrap().try_get::<i64>("", "n")?)
        });
        job.await.unwrap()
    }

    async fn run(database: &Database, sql: &'static str) {
        let job = database.write(move |tx| async move {
            tx.execute_unprepared(sql).await?;
            Ok::<_, DbError>(())
        });
        job.await.unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_rotation_that_is_due_is_told_once_for_each_time() {
        on_both(|database, hand| async move {
            let team = Team::new(&database).await;
            let due = |days| Terms { rotate_every_days: Some(days), ..Terms::all_of(KeyKind::Team, "Key") };
            let old = team.key(due(30)).await.key;
            let revoked = team.key(due(30)).await.key;
            team.key(due(60)).await;
            let act = Act::by_operator("test");
            team.of.revoke_key(revoked.id, team.doer.clone(), act.clone()).await.unwrap();
            assert_eq!(team.round().await, (0, 0));
            hand.advance_ms(30 * DAY_MS - 1);
            assert_eq!(team.round().await, (0, 0));
            hand.advance_ms(1);
            assert_eq!(team.round().await, (1, 0));
            assert_eq!(team.round().await, (0, 0), "it was told");
            let told = "SELECT COUNT(*) AS n FROM outbox WHERE topic = 'api_key.rotation_due'";
            let alerts = "SELECT COUNT(*) AS n FROM alerts WHERE cause = 'key_rotation_due' AND count = 1";
            assert_eq!((count(&database, told).await, count(&database, alerts).await), (1, 1));
            team.of.rotate_key(old.id, Overlap::default(), team.doer.clone(), act).await.unwrap();
            hand.advance_ms(30 * DAY_MS);
            assert_eq!(team.round().await.0, 2, "the new one is due again, and that of sixty days");
            assert_eq!((count(&database, told).await, count(&database, alerts).await), (3, 3));
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_end_is_told_a_week_and_a_day_before_and_each_once() {
        on_both(|database, hand| async move {
            let team = Team::new(&database).await;
            let ending = |days| Terms {
                expires_at_ms: Some(START_MS + days * DAY_MS),
                ..Terms::all_of(KeyKind::Team, format!("For {days} days"))
            };
            let long = team.key(ending(10)).await.key;
            let week = team.key(ending(7)).await.key;
            team.key(ending(1)).await;
            let (revoked, rotated) = (team.key(ending(10)).await.key, team.key(ending(10)).await.key);
            let act = || Act::by_operator("test");
            team.of.revoke_key(revoked.id, team.doer.clone(), act()).await.unwrap();
            team.of.rotate_key(rotated.id, Overlap::default(), team.doer.clone(), act()).await.unwrap();
            assert_eq!(team.round().await, (0, 0), "who was made to live so long knows it");
            let told = "SELECT COUNT(*) AS n FROM alerts WHERE cause = 'key_expiring' AND count = 1";
            hand.advance_ms(3 * DAY_MS - 1);
            assert_eq!(team.round().await, (0, 0));
            hand.advance_ms(1);
            assert_eq!(team.round().await, (2, 0), "the long one, and what took the place of the rotated one");
            assert_eq!(team.round().await, (0, 0), "it was told");
            assert_eq!(count(&database, told).await, 2);
            hand.advance_ms(3 * DAY_MS);
            assert_eq!(team.round().await, (1, 0), "the one of a week, a day before");
            // An end that is moved is told anew.
            let later = || Changes { expires_at_ms: Some(Some(START_MS + 20 * DAY_MS)), ..Changes::default() };
            team.of.update_key(long.id.clone(), later(), team.doer.clone(), act()).await.unwrap();
            hand.advance_ms(3 * DAY_MS);
            assert_eq!(team.round().await, (1, 0), "the other one of ten days, a day before");
            hand.advance_ms(4 * DAY_MS);
            assert_eq!(team.round().await, (1, 0), "the moved one, a week before");
            hand.advance_ms(6 * DAY_MS);
            assert_eq!(team.round().await, (1, 0), "and a day before");
            assert_eq!(team.round().await, (0, 0));
            assert_eq!(count(&database, told).await, 6);
            for (id, times) in [(&long.id, 3), (&week.id, 1)] {
                let of_key = format!("SELECT COUNT(*) AS n FROM alerts WHERE subject = '{id}'");
                assert_eq!(count(&database, of_key.leak()).await, times);
            }
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn keys_are_forgotten_ninety_days_after_their_end() {
        on_both(|database, hand| async move {
            let team = Team::new(&database).await;
            let revoked = team.key(Terms::all_of(KeyKind::Team, "Revoked")).await.key;
            let ending = Terms { expires_at_ms: Some(START_MS + DAY_MS), ..Terms::all_of(KeyKind::Team, "Ending") };
            let ending = team.key(ending).await.key;
            let act = Act::by_operator("test");
            team.of.revoke_key(revoked.id.clone(), team.doer.clone(), act).await.unwrap();
            hand.advance_ms(90 * DAY_MS - 1);
            assert_eq!(team.round().await, (0, 0));
            assert!(team.of.key(revoked.id.clone()).await.is_ok());
            hand.advance_ms(1);
            assert!(team.of.key(revoked.id.clone()).await.is_err(), "it is gone before it is forgotten");
            assert_eq!(team.round().await, (0, 1));
            assert!(team.of.key(ending.id.clone()).await.is_ok());
            hand.advance_ms(DAY_MS);
            assert_eq!(team.round().await, (0, 1));
            assert!(team.of.key(ending.id).await.is_err());
            let left = "SELECT COUNT(*) AS n FROM keys";
            assert_eq!(count(&database, left).await, 2, "the two of the registration");
            assert!(count(&database, "SELECT COUNT(*) AS n FROM audit_entries").await >= 4, "the audit log keeps them");
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_temporary_key_is_forgotten_a_day_after_its_end_and_nobody_is_told_of_it() {
        on_both(|database, hand| async move {
            let team = Team::new(&database).await;
            let act = Act::by_operator("test");
            let temporary = team.of.create_temporary_key("ada@example.com".to_owned(), team.doer.clone(), act);
            let temporary = temporary.await.unwrap().key;
            let end_ms = temporary.terms.expires_at_ms.unwrap();
            let usual = Terms { expires_at_ms: Some(end_ms), ..Terms::all_of(KeyKind::Team, "Usual") };
            let usual = team.key(usual).await.key;
            assert_eq!(team.round().await, (0, 0), "who asks for an hour knows when it ends");
            hand.advance_ms(end_ms - START_MS - 1);
            assert_eq!(team.round().await, (0, 0));
            hand.advance_ms(DAY_MS);
            assert_eq!(team.round().await, (0, 0));
            assert!(team.of.key(temporary.id.clone()).await.is_ok());
            hand.advance_ms(1);
            assert!(team.of.key(temporary.id.clone()).await.is_err(), "it is gone before it is forgotten");
            assert_eq!(team.round().await, (0, 1));
            assert_eq!(count(&database, "SELECT COUNT(*) AS n FROM keys WHERE temporary").await, 0);
            assert!(team.of.key(usual.id).await.is_ok());
            assert_eq!(count(&database, "SELECT COUNT(*) AS n FROM alerts").await, 0);
        })
        .await;
    }

    /// The release before knows of no temporary keys, and takes any end out that it is told to.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_temporary_key_ends_and_is_forgotten_also_where_no_end_is_stored() {
        on_both(|database, hand| async move {
            let team = Team::new(&database).await;
            let act = Act::by_operator("test");
            let temporary = team.of.create_temporary_key("ada@example.com".to_owned(), team.doer.clone(), act);
            let MadeKey { key: temporary, token } = temporary.await.unwrap();
            let end_ms = temporary.terms.expires_at_ms.unwrap();
            run(&database, "UPDATE keys SET expires_at_ms = NULL WHERE temporary").await;
            let found = async || {
                let now_ms = database.clock().now_ms();
                team.store.key_by_token(&token, KeyKind::Team, now_ms).await.unwrap()
            };
            assert_eq!(found().await.unwrap().key.terms.expires_at_ms, Some(end_ms));
            assert_eq!(team.of.key(temporary.id.clone()).await.unwrap().terms.expires_at_ms, Some(end_ms));
            hand.advance_ms(end_ms - START_MS);
            assert!(found().await.is_none());
            hand.advance_ms(DAY_MS - 1);
            assert_eq!(team.round().await, (0, 0));
            assert!(team.of.key(temporary.id.clone()).await.is_ok());
            hand.advance_ms(1);
            assert!(team.of.key(temporary.id).await.is_err());
            assert_eq!(team.round().await, (0, 1));
            assert_eq!(count(&database, "SELECT COUNT(*) AS n FROM keys WHERE temporary").await, 0);
        })
        .await;
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn one_process_looks_through_the_keys() {
        on_both(|database, hand| async move {
            let team = Team::new(&database).await;
            team.key(Terms { rotate_every_days: Some(1), ..Terms::all_of(KeyKind::Team, "Key") }).await;
            hand.advance_ms(DAY_MS);
            assert!(team.leases.try_hold(KEYS_LEASE_NAME, "second", KEYS_LEASE).await.unwrap());
            assert_eq!(team.round().await, (0, 0), "the second has the lease");
            hand.advance_ms(i64::try_from(KEYS_LEASE.as_millis()).unwrap());
            assert_eq!(team.round().await, (1, 0));
        })
        .await;
    }
}
