//! `paperkey listen`: brings the events of a product, or of a team, to a server on the developer's own machine, as its
//! endpoint would get them: signed, byte for byte, under the same headers.
//!
//! Each event is sent once, since somebody watches: what failed is made again by hand, not by a schedule. A stream that
//! ends is begun anew from a little before the last event, and what was sent already is known by its id. Nothing here
//! grows with time: ids are forgotten in their order, and no more is read than is being sent.

use std::{
    collections::{HashSet, VecDeque},
    io,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Args;
use futures_util::{Stream, StreamExt as _};
use paperkey_kit::{
    api::{Api, Refusal},
    clock::Clock,
    ids::new_id,
    secrets::Secret,
    values::{rfc3339, time_ms, timestamp},
};
use paperkey_proto::webhook::v1::{
    WatchEventsRequest, WatchEventsResponse, WatchedEvent, webhook_service_client::WebhookServiceClient,
};
use paperkey_webhook::forward::{Forwarded, Forwarder, new_secret};
use tokio::{sync::Semaphore, task::JoinSet};

use crate::{
    Failure,
    client::{self, ApiArgs},
    process::Signals,
};

/// What a credential needs to watch.
const SCOPE: &str = "webhooks:read";
/// Events that are on their way to the local server at once.
const AT_ONCE: usize = 16;
/// How long the local server may take.
const TIMEOUT_MS: u64 = 30_000;
/// How long the API may take to say that it watches.
const READY_TIMEOUT: Duration = Duration::from_secs(30);
/// A stream that has lasted so long was a good one, and is begun anew at once.
const LASTED: Duration = Duration::from_secs(5);
/// The waits between attempts to begin anew double from the first to the last.
const FIRST_WAIT: Duration = Duration::from_millis(500);
const LAST_WAIT: Duration = Duration::from_secs(15);
/// How far before the last event a stream is begun anew: events of several services arrive nearly in order.
const OVERLAP_MS: i64 = 60_000;
/// No stream begins earlier than an hour ago; a minute is left for the way there and for clocks that differ.
const LOOK_BACK_MS: i64 = 59 * 60_000;
/// Ids that are remembered: far more events than an overlap holds.
const REMEMBERED: usize = 65_536;

#[derive(Debug, Args)]
#[group(id = "whose", required = true, multiple = true, args = ["product", "team"])]
pub(crate) struct Listen {
    /// The product whose events are meant; without it those of the team
    #[arg(long, value_name = "ID")]
    product: Option<String>,
    /// Where events are sent, such as http://localhost:3000/hook
    #[arg(long, value_name = "URL")]
    forward: String,
    /// Only these events, such as license.created,license.revoked
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    events: Vec<String>,
    #[command(flatten)]
    api: ApiArgs,
}

/// Runs until SIGINT or SIGTERM, or until the API refuses for good.
pub(crate) async fn run(command: &Listen) -> Result<(), Failure> {
    let mut signals = Signals::new()?;
    let api = command.api.connect()?;
    let (secret, is_new) = match client::variable("PAPERKEY_WEBHOOK_SECRET") {
        Some(secret) => (Secret::new(secret.trim()), false),
        None => (new_secret(), true),
    };
    let clock = Clock::system();
    let forwarder = Forwarder::new(&command.forward, &secret, AT_ONCE, TIMEOUT_MS, clock.clone())?;
    let mut listener = Listener {
        command,
        api,
        forwarder: Arc::new(forwarder),
        places: Arc::new(Semaphore::new(AT_ONCE)),
        under_way: JoinSet::new(),
        progress: Progress::default(),
        clock,
    };
    tokio::select! {
        outcome = listener.listen(is_new.then_some(&secret)) => outcome,
        () = signals.received() => Ok(()),
    }
}

struct Listener<'a> {
    command: &'a Listen,
    api: Api,
    forwarder: Arc<Forwarder>,
    places: Arc<Semaphore>,
    under_way: JoinSet<io::Result<()>>,
    progress: Progress,
    clock: Clock,
}

/// Why a stream is no longer read.
enum End {
    /// The API has ended it, as it does after some minutes.
    Ended,
    Refused(Refusal),
    /// Nobody reads what is written.
    Unread(io::Error),
}

impl Listener<'_> {
    async fn listen(&mut self, new_secret: Option<&Secret>) -> Result<(), Failure> {
        let mut failed: u32 = 0;
        let mut has_begun = false;
        loop {
            let mut ready_at = None;
            let end = self.watch(&mut ready_at, has_begun, new_secret).await;
            has_begun |= ready_at.is_some();
            let lasted = ready_at.is_some_and(|ready: Instant| ready.elapsed() >= LASTED);
            failed = if lasted { 0 } else { failed.saturating_add(1) };
            let mut wait = wait(failed);
            match end {
                End::Ended => {}
                End::Unread(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                End::Unread(error) => return Err(error.into()),
                // What never was there is a mistake in the address; what has gone may come back.
                End::Refused(refusal) if refusal.is_final() || !has_begun => {
                    return Err(self.command.api.explain(&refusal, SCOPE));
                }
                End::Refused(refusal) => {
                    wait = wait.max(FIRST_WAIT).max(refusal.retry_after().unwrap_or_default().min(LAST_WAIT));
                    client::note(format_args!(
                        "The connection is lost: {refusal}; trying again in {:.1} s",
                        wait.as_secs_f32()
                    ));
                }
            }
            tokio::time::sleep(wait).await;
        }
    }

    /// Reads one stream to its end.
    async fn watch(&mut self, ready_at: &mut Option<Instant>, again: bool, new_secret: Option<&Secret>) -> End {
        let request = WatchEventsRequest {
            product_id: self.command.product.clone().unwrap_or_default(),
            since: self.progress.since_ms(self.clock.now_ms()).map(timestamp),
            team_id: self.command.api.team.clone().unwrap_or_default(),
        };
        let mut client = WebhookServiceClient::new(self.api.clone());
        let beginning = async {
            let mut stream = client.watch_events(request).await.map_err(Refusal::from)?.into_inner();
            let first = stream.message().await.map_err(Refusal::from)?;
            Ok((first, stream))
        };
        let begun = tokio::time::timeout(READY_TIMEOUT, beginning).await;
        let (first, stream) = match begun.unwrap_or_else(|_| Err(Refusal::timed_out())) {
            Ok((Some(first), stream)) => (first, stream),
            Ok((None, _)) => return End::Ended,
            Err(refusal) => return End::Refused(refusal),
        };
        *ready_at = Some(Instant::now());
        self.progress.begins(self.clock.now_ms());
        if !again && let Err(error) = self.welcome(new_secret) {
            return End::Unread(error);
        }
        // The first answer is empty where the API keeps to its word, and read where it does not.
        let stream = futures_util::stream::iter([Ok(first)]).chain(stream.map(|answer| answer.map_err(Refusal::from)));
        self.pass_on(stream).await
    }

    fn welcome(&self, new_secret: Option<&Secret>) -> io::Result<()> {
        if let Some(secret) = new_secret {
            client::line(format_args!("Your webhook signing secret is {} (this session only)", secret.expose()))?;
        }
        let whose = match (&self.command.product, &self.command.api.team) {
            (Some(product), _) => product.as_str(),
            (None, team) => team.as_deref().unwrap_or("the team"),
        };
        client::line(format_args!(
            "Ready: events of {whose} at {} go to {}",
            self.command.api.url(),
            self.command.forward
        ))
    }

    async fn pass_on(&mut self, stream: impl Stream<Item = Result<WatchEventsResponse, Refusal>>) -> End {
        let mut stream = pin!(stream);
        loop {
            tokio::select! {
                answer = stream.next() => match answer {
                    None => return End::Ended,
                    Some(Err(refusal)) => return End::Refused(refusal),
                    Some(Ok(answer)) => {
                        if let Some(event) = answer.event {
                            self.take(event).await;
                        }
                    }
                },
                Some(done) = self.under_way.join_next() => {
                    // One that panicked has said so.
                    if let Ok(Err(error)) = done {
                        return End::Unread(error);
                    }
                }
            }
        }
    }

    /// Sends an event on its way, if it is new and wanted. Waits while as many are under way as may be.
    async fn take(&mut self, event: WatchedEvent) {
        let created_at_ms = event.created_at.as_ref().and_then(|at| time_ms("created_at", at).ok());
        if !self.progress.is_new(&event.id, created_at_ms) {
            return;
        }
        let wanted = &self.command.events;
        if !wanted.is_empty() && !wanted.iter().any(|name| name.trim() == event.event) {
            return;
        }
        let Ok(place) = Arc::clone(&self.places).acquire_owned().await else { return };
        let (forwarder, clock) = (Arc::clone(&self.forwarder), self.clock.clone());
        self.under_way.spawn(async move {
            let _place = place;
            let at_ms = clock.now_ms();
            let delivery_id = new_id("dlv", &clock);
            let WatchedEvent { id, event, payload, .. } = event;
            let forwarded = forwarder.forward(&delivery_id, &event, payload).await;
            client::line(format_args!("{} {event} {id} -> {}", rfc3339(at_ms), outcome(forwarded)))
        });
    }
}

/// What came of sending an event, as it stands at the end of its line.
fn outcome(forwarded: Forwarded) -> String {
    let Forwarded { response_status, duration_ms, fault } = forwarded;
    match (response_status, fault) {
        (Some(status), None) => format!("{status} in {duration_ms} ms"),
        (Some(status), Some(why)) => format!("{status} in {duration_ms} ms: {why}"),
        (None, why) => format!("no answer after {duration_ms} ms: {}", why.unwrap_or("it failed")),
    }
}

/// How long to wait after so many streams in a row that did not last.
fn wait(failed: u32) -> Duration {
    match failed.checked_sub(1) {
        None => Duration::ZERO,
        Some(doubled) => FIRST_WAIT.saturating_mul(1 << doubled.min(16)).min(LAST_WAIT),
    }
}

/// How far the events are read.
#[derive(Debug, Default)]
struct Progress {
    /// When the first stream began, by this machine's clock: what counts until an event has said the API's time.
    began_ms: Option<i64>,
    /// Of the first event, and of the latest.
    first_ms: Option<i64>,
    latest_ms: Option<i64>,
    known: HashSet<String>,
    /// The same ids, in the order of their coming.
    order: VecDeque<String>,
}

impl Progress {
    fn begins(&mut self, now_ms: i64) {
        self.began_ms.get_or_insert(now_ms);
    }

    /// From when on the next stream is to show events; `None` for the first one, which begins with what happens then.
    fn since_ms(&self, now_ms: i64) -> Option<i64> {
        let since = match (self.first_ms, self.latest_ms) {
            // Never before what the first stream began with.
            (Some(first), Some(latest)) => first.max(latest - OVERLAP_MS),
            _ => self.began_ms?,
        };
        Some(since.max(now_ms - LOOK_BACK_MS))
    }

    /// Notes an event; says whether it was not noted before.
    fn is_new(&mut self, id: &str, created_at_ms: Option<i64>) -> bool {
        if !self.known.insert(id.to_owned()) {
            return false;
        }
        self.order.push_back(id.to_owned());
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        if let Some(at) = created_at_ms {
            self.first_ms = Some(self.first_ms.map_or(at, |first| first.min(at)));
            self.latest_ms = Some(self.latest_ms.map_or(at, |latest| latest.max(at)));
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_790_000_000_000;

    #[test]
    fn an_event_that_comes_again_is_known_and_memory_is_bounded() {
        let mut progress = Progress::default();
        assert!(progress.is_new("evt_0", Some(NOW)));
        assert!(!progress.is_new("evt_0", Some(NOW)));
        for n in 1..=REMEMBERED {
            assert!(progress.is_new(&format!("evt_{n}"), None));
        }
        assert_eq!((progress.known.len(), progress.order.len()), (REMEMBERED, REMEMBERED));
        assert!(progress.is_new("evt_0", Some(NOW)), "the oldest is forgotten first");
    }

    #[test]
    fn a_stream_is_begun_anew_a_little_before_the_last_event_and_never_before_the_first() {
        let mut progress = Progress::default();
        assert_eq!(progress.since_ms(NOW), None, "the first stream begins now");
        progress.begins(NOW);
        progress.begins(NOW + 1);
        assert_eq!(progress.since_ms(NOW + 5_000), Some(NOW));
        // The API's clock is the one that counts as soon as it is known.
        progress.is_new("evt_1", Some(NOW - 7_000));
        assert_eq!(progress.since_ms(NOW), Some(NOW - 7_000));
        progress.is_new("evt_2", Some(NOW + 1_000));
        assert_eq!(progress.since_ms(NOW), Some(NOW - 7_000));
        progress.is_new("evt_3", Some(NOW + 100_000));
        assert_eq!(progress.since_ms(NOW), Some(NOW + 40_000));
        // Whatever is older than that is not kept.
        let tomorrow = NOW + 24 * 3_600_000;
        assert_eq!(progress.since_ms(tomorrow), Some(tomorrow - LOOK_BACK_MS));
    }

    #[test]
    fn the_waits_double_up_to_a_bound_and_a_good_stream_has_none() {
        let waits: Vec<_> = [0, 1, 2, 3, 6, 1_000].map(|failed| wait(failed).as_millis()).into();
        assert_eq!(waits, [0, 500, 1_000, 2_000, 15_000, 15_000]);
    }

    #[test]
    fn a_line_says_what_came_of_it() {
        let said = |response_status, fault| outcome(Forwarded { response_status, duration_ms: 12, fault });
        assert_eq!(said(Some(200), None), "200 in 12 ms");
        assert_eq!(said(Some(500), Some("the status says no")), "500 in 12 ms: the status says no");
        assert_eq!(said(None, Some("nobody accepts")), "no answer after 12 ms: nobody accepts");
    }
}
