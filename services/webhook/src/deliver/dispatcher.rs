//! Decides what is sent next.
//!
//! Each endpoint has a lane of its own: a few deliveries under way, a few that were claimed ahead. Lanes take turns,
//! so a long queue of one costs another nothing; a lane whose receiver fails is narrowed to one delivery at a time,
//! and all such lanes together to half of the places. How many are claimed ahead follows from how fast a receiver
//! answers, so that a claim is about a second old when its turn comes and what was changed meanwhile still counts.
//!
//! The bounds hold for each process. What keeps two processes from sending the same is the claim, not this module.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    future::Future,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use paperkey_kit::{clock::Clock, db::DbError, ids::new_id, shutdown::Shutdown};
use tokio::{
    sync::{mpsc, oneshot},
    task::{Id, JoinError, JoinHandle, JoinSet},
    time::Instant,
};

use super::{
    recorder::{self, Entry, Verdict},
    sender::{Parcel, Sender},
};
use crate::{
    WebhookConfig,
    domain::{
        attempt::{Attempt, AttemptFault},
        endpoint::{Status, Target},
        signature::Signatures,
    },
    store::{
        Store,
        dispatch::{Claimed, DueLane, Haul, LANES_A_LOOK, Outcome, Receiver, Want},
    },
    wake::{Changed, Wake},
};

/// How often to look when nothing wakes the dispatcher.
const POLL: Duration = Duration::from_millis(500);
/// The shortest time between two looks that nothing asked for.
const MIN_POLL: Duration = Duration::from_millis(5);
/// How long to leave a failing database alone.
const AFTER_FAILURE: Duration = Duration::from_secs(1);
/// Deliveries under way, of all endpoints together.
const MAX_IN_FLIGHT: usize = 1_024;
/// Of these, to receivers that failed last time.
const MAX_TROUBLED: usize = MAX_IN_FLIGHT / 2;
/// Deliveries claimed ahead, of one endpoint.
const MAX_AHEAD: usize = 128;
/// Deliveries claimed ahead, of all endpoints together.
const MAX_AHEAD_OF_ALL: usize = 2_048;
/// How old a claim may be when its turn comes; older ones are given back, and claimed anew with fresh knowledge.
const FRESH_MS: i64 = 3_000;
/// What a claim lasts beyond the exchange itself.
const CLAIM_MARGIN_MS: i64 = 20_000;
/// Lanes that are remembered without having anything to do.
const MAX_IDLE_LANES: usize = 2_000;

/// How many deliveries at a time, and how long one may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pace {
    per_endpoint: usize,
    timeout_ms: i64,
}

impl Pace {
    /// As the configuration says.
    pub(crate) fn new(config: &WebhookConfig) -> Self {
        Self {
            per_endpoint: config.max_in_flight_per_endpoint.clamp(1, MAX_AHEAD),
            timeout_ms: i64::try_from(config.timeout_ms.max(1)).unwrap_or(i64::MAX / 4).min(i64::MAX / 4),
        }
    }

    fn claim_ms(self) -> i64 {
        self.timeout_ms * 2 + CLAIM_MARGIN_MS
    }
}

/// Sends what is due, until shut down.
pub(crate) struct Dispatcher {
    store: Store,
    sender: Sender,
    clock: Clock,
    wake: Arc<Wake>,
    pace: Pace,
    holder: String,
    lanes: HashMap<String, Lane>,
    /// Lanes that may start something, in the order of their turns.
    rotation: VecDeque<String>,
    /// What is under way: to which endpoint, and whether in a narrowed lane.
    places: HashMap<Id, (String, bool)>,
    troubled_places: usize,
    /// Deliveries claimed ahead, of all lanes.
    ahead: usize,
    /// Claims to be given back.
    returned: Vec<String>,
    look_at: Instant,
    /// Where the next look begins among the endpoints.
    cursor: String,
    /// What was changed while a look was under way, whose finds may be older than that.
    meanwhile: Vec<Changed>,
}

/// What goes to one endpoint.
#[derive(Default)]
struct Lane {
    queue: VecDeque<Claimed>,
    in_flight: usize,
    /// Whether it stands in the rotation.
    turning: bool,
    /// Whether its receiver failed last time.
    troubled: bool,
    /// How long its receiver takes, on average.
    answer_ms: Option<u64>,
    /// Whether there may be more in the database than was claimed.
    more: bool,
    address: Arc<Address>,
}

/// Where and how to send.
#[derive(Default)]
struct Address {
    target: Option<Target>,
    signatures: Option<Signatures>,
}

/// A delivery that was sent.
struct Sent {
    failed: bool,
    duration_ms: u64,
    verdict: Verdict,
}

/// What a look has found.
struct Look {
    at_ms: i64,
    lanes: Vec<DueLane>,
    wants: Vec<Want>,
    haul: Haul,
}

impl Dispatcher {
    pub(crate) fn new(store: Store, sender: Sender, clock: Clock, wake: Arc<Wake>, pace: Pace) -> Self {
        let holder = new_id("proc", &clock);
        Self {
            store,
            sender,
            clock,
            wake,
            pace,
            holder,
            lanes: HashMap::new(),
            rotation: VecDeque::new(),
            places: HashMap::new(),
            troubled_places: 0,
            ahead: 0,
            returned: Vec::new(),
            look_at: Instant::now(),
            cursor: String::new(),
            meanwhile: Vec::new(),
        }
    }

    /// Sends what is due, until shut down. What is under way is finished first.
    pub(crate) async fn run(mut self, mut shutdown: Shutdown) {
        if let Err(error) = self.store.release_orphans().await {
            // They come free by themselves, only later.
            tracing::warn!(%error, "claims of an earlier process could not be given back");
        }
        let (outcomes, queue) = recorder::queue();
        let patience = Duration::from_millis(u64::try_from(self.pace.claim_ms()).unwrap_or(0));
        let recorder = tokio::spawn(recorder::run(self.store.clone(), self.holder.clone(), queue, patience));
        let wake = Arc::clone(&self.wake);
        let mut posts: JoinSet<Sent> = JoinSet::new();
        let mut look: Option<JoinHandle<Result<Look, DbError>>> = None;
        while !shutdown.has_come() {
            self.start(&mut posts, &outcomes);
            if !self.returned.is_empty() {
                let giving_back = self.give_back();
                let wake = Arc::clone(&wake);
                tokio::spawn(async move {
                    giving_back.await;
                    wake.work();
                });
            }
            if look.is_none() && self.look_at <= Instant::now() {
                self.meanwhile.clear();
                self.look_at = Instant::now() + POLL;
                look = Some(tokio::spawn(self.look()));
            }
            tokio::select! {
                () = shutdown.wait() => {}
                Some(sent) = posts.join_next_with_id() => {
                    self.sent(sent);
                    // As many as are there, so that one round through this loop serves them all.
                    while let Some(sent) = posts.try_join_next_with_id() {
                        self.sent(sent);
                    }
                }
                found = finished(&mut look) => {
                    look = None;
                    self.found(found);
                }
                () = wake.wait() => {
                    self.look_at = Instant::now();
                    self.forget(wake.take_changed(), look.is_some());
                }
                () = tokio::time::sleep_until(self.look_at), if look.is_none() => {}
            }
        }
        if let Some(look) = look
            && let Ok(Ok(look)) = look.await
        {
            self.returned.extend(look.haul.deliveries.into_iter().map(|claimed| claimed.id));
        }
        for lane in self.lanes.values_mut() {
            self.returned.extend(lane.queue.drain(..).map(|claimed| claimed.id));
        }
        self.give_back().await;
        drop(outcomes);
        while posts.join_next().await.is_some() {}
        // It ends when the last outcome is written, or cannot be.
        let _ = recorder.await;
    }

    /// Starts what may be started, lane by lane.
    fn start(&mut self, posts: &mut JoinSet<Sent>, outcomes: &mpsc::Sender<Entry>) {
        let now_ms = self.clock.now_ms();
        let mut turns = self.rotation.len();
        while turns > 0 && self.places.len() < MAX_IN_FLIGHT {
            turns -= 1;
            let Some(endpoint_id) = self.rotation.pop_front() else { return };
            let Some(lane) = self.lanes.get_mut(&endpoint_id) else { continue };
            if lane.troubled && self.troubled_places >= MAX_TROUBLED {
                self.rotation.push_back(endpoint_id);
                continue;
            }
            let next = if lane.in_flight < lane.width(self.pace) { lane.queue.pop_front() } else { None };
            let Some(claimed) = next else {
                lane.turning = false;
                continue;
            };
            self.ahead = self.ahead.saturating_sub(1);
            let claimed_at_ms = claimed.held_until_ms.saturating_sub(self.pace.claim_ms());
            if now_ms.saturating_sub(claimed_at_ms) > FRESH_MS {
                lane.more = true;
                self.returned.push(claimed.id);
            } else {
                lane.in_flight += 1;
                let place = (endpoint_id.clone(), lane.troubled);
                self.troubled_places += usize::from(lane.troubled);
                let address = Arc::clone(&lane.address);
                let sending = post(self.sender.clone(), self.clock.clone(), address, claimed, outcomes.clone());
                self.places.insert(posts.spawn(sending).id(), place);
            }
            self.rotation.push_back(endpoint_id);
            turns = self.rotation.len();
        }
    }

    /// Gives back what is to be given back.
    fn give_back(&mut self) -> impl Future<Output = ()> + Send + use<> {
        let (ids, store, holder) = (std::mem::take(&mut self.returned), self.store.clone(), self.holder.clone());
        async move {
            if ids.is_empty() {
                return;
            }
            if let Err(error) = store.release(ids, holder).await {
                // They come free by themselves, only later.
                tracing::warn!(%error, "claims could not be given back");
            }
        }
    }

    /// A look at what is due, and the claim of what there is room for. Runs beside the lanes.
    fn look(&self) -> impl Future<Output = Result<Look, DbError>> + Send + use<> {
        let room: HashMap<String, usize> =
            self.lanes.iter().map(|(id, lane)| (id.clone(), lane.room(self.pace))).collect();
        let mut left = MAX_AHEAD_OF_ALL.saturating_sub(self.ahead);
        let (store, holder, cursor) = (self.store.clone(), self.holder.clone(), self.cursor.clone());
        let (pace, at_ms) = (self.pace, self.clock.now_ms());
        async move {
            let lanes = store.due_lanes(cursor).await?;
            let mut wants = Vec::new();
            for lane in lanes.iter().filter(|lane| lane.due_at_ms <= at_ms) {
                let count = room.get(&lane.endpoint_id).copied().unwrap_or(pace.per_endpoint).min(left);
                if count > 0 {
                    left -= count;
                    wants.push(Want { endpoint_id: lane.endpoint_id.clone(), count });
                }
            }
            let haul = if wants.is_empty() {
                Haul::default()
            } else {
                store.claim(wants.clone(), holder, at_ms.saturating_add(pace.claim_ms())).await?
            };
            Ok(Look { at_ms, lanes, wants, haul })
        }
    }

    /// Takes in what a look has found, and decides when to look again.
    fn found(&mut self, found: Result<Result<Look, DbError>, JoinError>) {
        let look = match found {
            Ok(Ok(look)) => look,
            Ok(Err(error)) => {
                tracing::warn!(%error, "deliveries cannot be claimed");
                self.look_at = Instant::now() + AFTER_FAILURE;
                return;
            }
            Err(error) => {
                tracing::error!(%error, "looking for deliveries was interrupted");
                self.look_at = Instant::now() + AFTER_FAILURE;
                return;
            }
        };
        let mut got: HashMap<&str, usize> = HashMap::new();
        for claimed in &look.haul.deliveries {
            *got.entry(&claimed.endpoint_id).or_default() += 1;
        }
        let asked: HashMap<&str, usize> =
            look.wants.iter().map(|want| (want.endpoint_id.as_str(), want.count)).collect();
        for due in &look.lanes {
            if due.due_at_ms > look.at_ms {
                self.look_again_at(due.due_at_ms);
            } else {
                let got = got.get(due.endpoint_id.as_str()).copied().unwrap_or(0);
                let asked = asked.get(due.endpoint_id.as_str()).copied().unwrap_or(0);
                self.lanes.entry(due.endpoint_id.clone()).or_default().more = got >= asked;
            }
        }
        match look.lanes.last() {
            // There are more endpoints than one look finds: on with the next ones.
            Some(last) if look.lanes.len() >= LANES_A_LOOK => {
                self.cursor.clone_from(&last.endpoint_id);
                self.look_at = Instant::now();
            }
            _ => self.cursor.clear(),
        }
        self.take_in(look.haul);
        if self.lanes.len() > MAX_IDLE_LANES {
            self.lanes.retain(|_, lane| lane.in_flight > 0 || lane.turning || !lane.queue.is_empty());
        }
    }

    /// Puts what was claimed into its lanes.
    fn take_in(&mut self, haul: Haul) {
        let mut open = HashSet::new();
        for (endpoint_id, receiver) in haul.receivers {
            // What was paused or changed since the claim is looked at anew.
            let outdated = self.meanwhile.iter().any(|changed| changed.includes(&endpoint_id));
            if receiver.status == Status::Active && !outdated {
                let lane = self.lanes.entry(endpoint_id.clone()).or_default();
                lane.address = Arc::new(Address::of(&self.sender, &receiver));
                lane.troubled = receiver.consecutive_failures > 0;
                open.insert(endpoint_id);
            }
        }
        for claimed in haul.deliveries {
            let lane = self.lanes.get_mut(&claimed.endpoint_id).filter(|_| open.contains(&claimed.endpoint_id));
            let Some(lane) = lane else {
                self.returned.push(claimed.id);
                continue;
            };
            self.ahead += 1;
            if !lane.turning {
                lane.turning = true;
                self.rotation.push_back(claimed.endpoint_id.clone());
            }
            lane.queue.push_back(claimed);
        }
    }

    /// Frees the place of what was sent.
    fn sent(&mut self, sent: Result<(Id, Sent), JoinError>) {
        let (id, sent) = match sent {
            Ok((id, sent)) => (id, Some(sent)),
            Err(error) => {
                // Its claim runs out, and it is sent again.
                tracing::error!(%error, "sending a delivery was interrupted");
                (error.id(), None)
            }
        };
        let Some((endpoint_id, troubled_place)) = self.places.remove(&id) else { return };
        self.troubled_places = self.troubled_places.saturating_sub(usize::from(troubled_place));
        let Some(lane) = self.lanes.get_mut(&endpoint_id) else { return };
        lane.in_flight = lane.in_flight.saturating_sub(1);
        let mut verdict = Verdict::default();
        if let Some(sent) = sent {
            lane.troubled = sent.failed;
            if !sent.failed {
                let before_ms = lane.answer_ms.unwrap_or(sent.duration_ms);
                lane.answer_ms = Some((before_ms * 7 + sent.duration_ms) / 8);
            }
            verdict = sent.verdict;
        }
        if verdict.paused {
            lane.more = false;
            self.ahead = self.ahead.saturating_sub(lane.queue.len());
            self.returned.extend(lane.queue.drain(..).map(|claimed| claimed.id));
        }
        if !lane.queue.is_empty() && !lane.turning {
            lane.turning = true;
            self.rotation.push_back(endpoint_id);
        }
        if lane.more && lane.queue.len() * 2 <= lane.depth(self.pace) {
            self.look_at = Instant::now();
        }
        if let Some(due_at_ms) = verdict.next_due_at_ms {
            self.look_again_at(due_at_ms);
        }
    }

    /// Lets go of what was claimed for endpoints that have changed: it may not go out as it was loaded.
    fn forget(&mut self, changed: Changed, looking: bool) {
        if !changed.any() {
            return;
        }
        for (endpoint_id, lane) in &mut self.lanes {
            if changed.includes(endpoint_id) {
                self.ahead = self.ahead.saturating_sub(lane.queue.len());
                self.returned.extend(lane.queue.drain(..).map(|claimed| claimed.id));
            }
        }
        if looking {
            self.meanwhile.push(changed);
        }
    }

    fn look_again_at(&mut self, due_at_ms: i64) {
        let wait_ms = u64::try_from(due_at_ms.saturating_sub(self.clock.now_ms())).unwrap_or(0);
        let wait = Duration::from_millis(wait_ms).clamp(MIN_POLL, POLL);
        self.look_at = self.look_at.min(Instant::now() + wait);
    }
}

impl Lane {
    /// How many may be under way.
    fn width(&self, pace: Pace) -> usize {
        if self.troubled { 1 } else { pace.per_endpoint }
    }

    /// How many may wait: about as many as go out in a second.
    fn depth(&self, pace: Pace) -> usize {
        match self.answer_ms {
            _ if self.troubled => 0,
            None => pace.per_endpoint,
            Some(answer_ms) => {
                let a_second = 1_000 / usize::try_from(answer_ms.max(1)).unwrap_or(usize::MAX);
                pace.per_endpoint.saturating_mul(a_second).clamp(1, MAX_AHEAD)
            }
        }
    }

    /// How many more it would take.
    fn room(&self, pace: Pace) -> usize {
        let places = self.width(pace).saturating_sub(self.in_flight);
        (places + self.depth(pace)).saturating_sub(self.queue.len())
    }
}

impl Address {
    /// The address of a receiver, as far as the rules of today allow it.
    fn of(sender: &Sender, receiver: &Receiver) -> Self {
        Self {
            target: sender.rules().read(&receiver.url).ok(),
            signatures: receiver.secret.as_ref().and_then(Signatures::of),
        }
    }
}

/// Waits for a look that is under way; for ever where none is.
async fn finished<T>(look: &mut Option<JoinHandle<T>>) -> Result<T, JoinError> {
    match look {
        Some(look) => look.await,
        None => std::future::pending().await,
    }
}

/// Sends a delivery and hands on what came of it. A failure keeps its place until it is written down: who pauses an
/// endpoint is decided there.
async fn post(
    sender: Sender,
    clock: Clock,
    address: Arc<Address>,
    claimed: Claimed,
    outcomes: mpsc::Sender<Entry>,
) -> Sent {
    let attempt = match (&address.target, &address.signatures, claimed.body) {
        (None, ..) => Attempt::unsent(clock.now_ms(), AttemptFault::AddressNotAllowed),
        (Some(_), None, _) | (Some(_), _, None) => Attempt::unsent(clock.now_ms(), AttemptFault::Other),
        (Some(target), Some(signatures), Some(body)) => {
            let parcel = Parcel { delivery_id: &claimed.id, topic: &claimed.topic, body: Bytes::from(body) };
            sender.send(target, signatures, parcel).await
        }
    };
    let failed = attempt.fault.is_some();
    let duration_ms = u64::try_from(attempt.duration_ms).unwrap_or(0);
    let (written, verdict) = failed.then(oneshot::channel).unzip();
    let outcome = Outcome {
        delivery_id: claimed.id,
        endpoint_id: claimed.endpoint_id,
        attempts: claimed.attempts,
        attempt,
        chance: rand::random(),
    };
    // If nobody writes any more, the claim runs out and the delivery is sent again.
    let _ = outcomes.send(Entry { outcome, written }).await;
    let verdict = match verdict {
        Some(verdict) => verdict.await.unwrap_or_default(),
        None => Verdict::default(),
    };
    Sent { failed, duration_ms, verdict }
}
