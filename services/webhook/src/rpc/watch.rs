//! Watching: a stream of what happens.
//!
//! A task of its own looks, renews the row that makes events be kept, and removes it at the end. It waits for its reader,
//! so that nothing gathers; a reader who goes away ends it, and so do the end of the process and some minutes.

use std::{sync::Arc, time::Duration};

use futures_util::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use paperkey_kit::{shutdown::Shutdown, values::timestamp};
use paperkey_proto::{
    Error,
    webhook::v1::{WatchEventsResponse, WatchedDelivery, WatchedEvent},
};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Instant, sleep, timeout},
};
use tonic::Status;

use super::deliveries::encode as encode_delivery;
use crate::{
    domain::watch::{Shown, ShownDelivery},
    store::{
        TenantStore,
        watch::{Registration, Watch},
    },
};

/// What watchers are shown.
pub(super) type Watching = BoxStream<'static, Result<WatchEventsResponse, Status>>;

/// Streams of one process: as many as ten teams may have in both modes.
const MAX_STREAMS: usize = 1_000;
/// When to ask again where there are as many.
const FULL_RETRY: Duration = Duration::from_secs(10);
/// What waits for a reader at most.
const AHEAD: usize = 16;
/// The same after a failure.
const RENEW_SOON: Duration = Duration::from_secs(2);
/// Without a renewal for so long, a stream ends: what happens might soon be missed.
const UNRENEWED: Duration = Duration::from_secs(45);
/// Looks that fail one after the other until a stream ends.
const MAX_FAILURES: u32 = 5;
/// The pause after one.
const AFTER_FAILURE: Duration = Duration::from_secs(1);
/// How long an end may take.
const FAREWELL: Duration = Duration::from_secs(2);

/// The times of a stream.
#[derive(Clone, Copy, Debug)]
struct Pace {
    /// How long it lasts.
    lasts: Duration,
    /// Between two looks.
    poll: Duration,
    /// Between two looks at what has become of deliveries, at least.
    follow: Duration,
    /// Between two renewals, well within what one is good for.
    renew: Duration,
}

const PACE: Pace = Pace {
    lasts: Duration::from_mins(10),
    poll: Duration::from_millis(250),
    follow: Duration::from_secs(1),
    renew: Duration::from_secs(20),
};

/// The streams of this process.
pub(crate) struct Watches {
    places: Arc<Semaphore>,
    ending: Shutdown,
    pace: Pace,
}

impl Watches {
    /// Streams that end at the latest with the process.
    pub(crate) fn until(ending: Shutdown) -> Self {
        Self { places: Arc::new(Semaphore::new(MAX_STREAMS)), ending, pace: PACE }
    }

    /// Begins a stream. From its first answer, which is empty, nothing is missed.
    pub(super) async fn begin(
        &self,
        store: &TenantStore,
        product_id: &str,
        since_ms: Option<i64>,
    ) -> Result<Watching, Error> {
        let place = Arc::clone(&self.places)
            .try_acquire_owned()
            .map_err(|_| Error::unavailable("too many watch here").with_retry_after(FULL_RETRY))?;
        let watch = store.watch(product_id, since_ms).await?;
        let (show, shown) = mpsc::channel(AHEAD);
        tokio::spawn(run(watch, show, self.ending.clone(), self.pace, place));
        let shown = stream::unfold(shown, |mut shown| async move { shown.recv().await.map(|next| (next, shown)) });
        Ok(stream::iter([Ok(WatchEventsResponse::default())]).chain(shown).boxed())
    }
}

/// Where what is shown goes to.
type Show = mpsc::Sender<Result<WatchEventsResponse, Status>>;

async fn run(watch: Watch, show: Show, mut ending: Shutdown, pace: Pace, place: OwnedSemaphorePermit) {
    let registration = watch.registration();
    let failure = tokio::select! {
        failure = look(watch, &show, pace) => failure,
        failure = renew(&registration, pace.renew) => Some(failure),
        () = show.closed() => None,
        () = ending.wait() => None,
        () = sleep(pace.lasts) => None,
    };
    // Before the reader learns of the end, who may ask again at once. If it fails, the row runs out by itself.
    let _ = timeout(FAREWELL, registration.end()).await;
    if let Some(error) = failure {
        // Who reads no longer does not need to know.
        let _ = timeout(FAREWELL, show.send(Err(error.into()))).await;
    }
    drop(place);
}

/// Shows what happens, until that fails or nobody reads any more.
async fn look(mut watch: Watch, show: &Show, pace: Pace) -> Option<Error> {
    let (mut failures, mut follow_at) = (0, Instant::now());
    loop {
        let follows = follow_at <= Instant::now();
        if follows {
            follow_at = Instant::now() + pace.follow;
        }
        match look_once(&mut watch, show, follows).await {
            Ok(Some(more)) => {
                failures = 0;
                if !more {
                    sleep(pace.poll).await;
                }
            }
            Ok(None) => return None,
            Err(error) => {
                failures += 1;
                if failures >= MAX_FAILURES {
                    return Some(error);
                }
                sleep(AFTER_FAILURE).await;
            }
        }
    }
}

/// Says whether there is more to show at once; nothing where nobody reads any more.
async fn look_once(watch: &mut Watch, show: &Show, follows: bool) -> Result<Option<bool>, Error> {
    let found = watch.look().await?;
    for event in found.events {
        if show.send(Ok(encode_event(event))).await.is_err() {
            return Ok(None);
        }
    }
    let changes = if follows { watch.changes().await? } else { Vec::new() };
    for delivery in changes {
        if show.send(Ok(encode_shown(delivery))).await.is_err() {
            return Ok(None);
        }
    }
    Ok(Some(found.more))
}

/// Renews for as long as that is possible.
async fn renew(registration: &Registration, every: Duration) -> Error {
    let (mut renewed, mut pause) = (Instant::now(), every);
    loop {
        sleep(pause).await;
        let begun = Instant::now();
        match registration.renew().await {
            Ok(true) => (renewed, pause) = (begun, every),
            Ok(false) => return Error::unavailable("a watch has run out"),
            Err(error) if renewed.elapsed() >= UNRENEWED => return error.into(),
            Err(_) => pause = RENEW_SOON,
        }
    }
}

fn encode_event(event: Shown) -> WatchEventsResponse {
    let event = WatchedEvent {
        id: event.id,
        event: event.topic,
        created_at: Some(timestamp(event.created_at_ms)),
        payload: event.payload,
    };
    WatchEventsResponse { event: Some(event), delivery: None }
}

fn encode_shown(shown: ShownDelivery) -> WatchEventsResponse {
    let delivery = WatchedDelivery { webhook_id: shown.endpoint_id, delivery: Some(encode_delivery(shown.delivery)) };
    WatchEventsResponse { event: None, delivery: Some(delivery) }
}

#[cfg(test)]
mod tests {
    use paperkey_kit::{
        clock::Clock,
        db::{Database, DbError},
        principal::Tenant,
        secrets::Keyring,
        shutdown::{self, ShutdownHandle},
        store_suite,
    };
    use paperkey_proto::{errors::v1::Reason, principal::v1::Mode};
    use sea_orm::{ConnectionTrait as _, Statement};

    use super::*;
    use crate::{domain::schedule::Schedule, store::Store, wake::Wake};

    store_suite! {
        paperkey_migrations::webhook::Migrator;
        a_stream_ends_well_when_its_time_is_over,
        a_stream_is_renewed_as_long_as_it_lasts,
        a_stream_that_has_run_out_says_so,
        a_process_has_so_many_streams_and_no_more,
    }

    const LONG: Duration = Duration::from_mins(5);
    const SHORT: Duration = Duration::from_millis(20);

    fn world(database: &Database, lasts: Duration, streams: usize) -> (Watches, ShutdownHandle, TenantStore) {
        let (handle, ending) = shutdown::channel();
        let pace = Pace { lasts, poll: SHORT, follow: SHORT, renew: SHORT };
        let watches = Watches { places: Arc::new(Semaphore::new(streams)), ending, pace };
        let (schedule, wake) = (Arc::new(Schedule::new(vec![])), Arc::new(Wake::default()));
        let store = Store::new(database.clone(), &Keyring::for_tests(), Clock::system(), schedule, wake);
        (watches, handle, store.of(Tenant { team_id: "team_1".into(), mode: Mode::Live }))
    }

    async fn rest(stream: Watching) -> Vec<Result<WatchEventsResponse, Reason>> {
        let reasons = stream.map(|next| next.map_err(|status| Error::from_status(&status).reason()));
        timeout(LONG, reasons.collect()).await.expect("it ends")
    }

    async fn watchers(database: &Database, text: &'static str) -> Option<i64> {
        let job = move |reader: paperkey_kit::db::Reader| async move {
            let row = reader.query_one_raw(Statement::from_string(reader.get_database_backend(), text)).await?;
            Ok::<_, DbError>(row.map(|row| row.try_get("", "number")).transpose()?)
        };
        database.read(job).await.unwrap()
    }

    const UNTIL: &str = "SELECT until_ms AS number FROM watchers WHERE ended_at_ms IS NULL";

    async fn a_stream_ends_well_when_its_time_is_over(database: Database) {
        let (watches, _handle, store) = world(&database, SHORT, 1);
        let stream = watches.begin(&store, "prod_1", None).await.unwrap();
        assert_eq!(rest(stream).await, [Ok(WatchEventsResponse::default())]);
        assert_eq!(watchers(&database, UNTIL).await, None);
    }

    async fn a_stream_is_renewed_as_long_as_it_lasts(database: Database) {
        let (watches, handle, store) = world(&database, LONG, 1);
        let stream = watches.begin(&store, "prod_1", None).await.unwrap();
        let first = watchers(&database, UNTIL).await.unwrap();
        let renewed = async {
            while watchers(&database, UNTIL).await.unwrap() == first {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(LONG, renewed).await.expect("it is renewed");
        handle.shut_down();
        assert_eq!(rest(stream).await, [Ok(WatchEventsResponse::default())]);
        assert_eq!(watchers(&database, UNTIL).await, None);
    }

    async fn a_stream_that_has_run_out_says_so(database: Database) {
        let (watches, _handle, store) = world(&database, LONG, 1);
        let stream = watches.begin(&store, "prod_1", None).await.unwrap();
        let job = |tx: paperkey_kit::db::Tx| async move {
            tx.execute_unprepared("DELETE FROM watchers").await?;
            Ok::<_, DbError>(())
        };
        database.write(job).await.unwrap();
        assert_eq!(rest(stream).await, [Ok(WatchEventsResponse::default()), Err(Reason::Unavailable)]);
    }

    async fn a_process_has_so_many_streams_and_no_more(database: Database) {
        let (watches, _handle, store) = world(&database, LONG, 2);
        let first = watches.begin(&store, "prod_1", None).await.unwrap();
        let _second = watches.begin(&store, "prod_2", None).await.unwrap();
        let Err(refused) = watches.begin(&store, "prod_3", None).await else { panic!("a third stream") };
        assert_eq!((refused.reason(), refused.retry_after()), (Reason::Unavailable, Some(FULL_RETRY)));
        drop(first);
        let begun = async {
            while watches.begin(&store, "prod_3", None).await.is_err() {
                sleep(Duration::from_millis(5)).await;
            }
        };
        timeout(LONG, begun).await.expect("there is room again");
    }
}
