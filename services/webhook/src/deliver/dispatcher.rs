//! Decides what is sent next.
//!
//! Each endpoint has a lane of its own: a few deliveries under way, a few that were claimed ahead. Lanes take turns,
//! so a long queue of one costs another nothing; a lane whose receiver fails is narrowed to one delivery at a time.
//! Lanes that fail, or that nobody knows yet, have together only half of the places, and of what is claimed ahead, so
//! that receivers that are known to answer always find one. How many are claimed ahead follows from how fast a receiver answers, so that a claim is
//! about a second old when its turn comes and what was changed meanwhile still counts; where not all find room, all
//! find the same.
//!
//! The bounds hold for each process. What keeps two processes from sending the same is the claim, not this module.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    future::Future,
    sync::Arc,
    time::Duration,
};

use paperkey_kit::{
    clock::Clock,
    db::DbError,
    ids::new_id,
    shutdown::Shutdown,
    telemetry::{self, Span, SpanKind},
};
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
    figures,
    store::{
        Store,
        dispatch::{Claim, Claimed, Haul, Lanes, Outcome, Receiver, Want},
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
/// Of these, to receivers that failed last time or have not answered yet.
const MAX_DOUBTFUL: usize = MAX_IN_FLIGHT / 2;
/// Deliveries claimed ahead, of one endpoint.
const MAX_AHEAD: usize = 128;
/// Deliveries claimed ahead, of all endpoints together.
const MAX_AHEAD_OF_ALL: usize = 2_048;
/// Of these, of receivers that failed last time or have not answered yet.
const MAX_DOUBTFUL_AHEAD: usize = MAX_AHEAD_OF_ALL / 2;
/// Endpoints for which one look claims: each costs a statement of its own, and the first of them waits for the last.
const CLAIMS_A_LOOK: usize = 64;
/// How old a claim may be when its turn comes; older ones are given back, and claimed anew with fresh knowledge.
const FRESH_MS: i64 = 3_000;
/// What a claim lasts beyond the exchange itself.
const CLAIM_MARGIN_MS: i64 = 20_000;
/// How often to look for what a clock that was set back has left in the future.
const LOOK_INTO_FUTURE: Duration = Duration::from_mins(1);
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

    /// Whether that claim is too old to be sent under: what was known when the database answered it may hold no
    /// longer, or, where the database was slow to answer, it may end before what came of it is written down.
    fn is_stale(self, claimed: &Claimed, now_ms: i64) -> bool {
        now_ms.saturating_sub(claimed.answered_at_ms) > FRESH_MS
            || claimed.held_until_ms.saturating_sub(now_ms) < self.timeout_ms * 2
    }
}

/// Sends what is due, until shut down.
pub(crate) struct Dispatcher {
    store: Store,
    sender: Arc<Sender>,
    clock: Clock,
    wake: Arc<Wake>,
    pace: Pace,
    holder: String,
    lanes: HashMap<String, Lane>,
    /// Lanes that may start something, in the order of their turns.
    rotation: VecDeque<String>,
    /// What is under way: to which endpoint, and whether that was doubtful.
    places: HashMap<Id, (String, bool)>,
    doubtful_places: usize,
    /// Deliveries claimed ahead, of all lanes.
    ahead: usize,
    /// Claims to be given back.
    returned: Vec<Claim>,
    look_at: Instant,
    /// Where the next look begins among the endpoints.
    cursor: String,
    /// Doubtful lanes up to here have had their turn; those behind were left out for want of room, and are next.
    doubtful_cursor: String,
    /// Whether any were left out since a look last began at the first endpoint.
    is_crowded: bool,
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
    lanes: Lanes,
    choice: Choice,
    haul: Haul,
}

/// An endpoint for which something is due, and how much it would take.
struct Candidate {
    want: Want,
    is_doubtful: bool,
}

/// What one look asks for.
#[derive(Debug, Default)]
struct Choice {
    wants: Vec<Want>,
    /// Whether there was no room for all: the next look begins behind the last that was asked for, if any was.
    cut: Option<Option<String>>,
    /// Whether doubtful lanes were left out for want of room.
    is_crowded: bool,
    /// Up to which id doubtful lanes have had their turn.
    doubtful_cursor: String,
}

impl Dispatcher {
    pub(crate) fn new(store: Store, sender: Sender, clock: Clock, wake: Arc<Wake>, pace: Pace) -> Self {
        let holder = new_id("proc", &clock);
        Self {
            store,
            sender: Arc::new(sender),
            clock,
            wake,
            pace,
            holder,
            lanes: HashMap::new(),
            rotation: VecDeque::new(),
            places: HashMap::new(),
            doubtful_places: 0,
            ahead: 0,
            returned: Vec::new(),
            look_at: Instant::now(),
            cursor: String::new(),
            doubtful_cursor: String::new(),
            is_crowded: false,
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
        let mut aside = JoinSet::new();
        aside.spawn(free_from_the_future(self.store.clone(), Arc::clone(&self.wake), self.pace));
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
        aside.shutdown().await;
        if let Some(look) = look
            && let Ok(Ok(look)) = look.await
        {
            self.returned.extend(look.haul.deliveries.into_iter().map(Claim::from));
        }
        for lane in self.lanes.values_mut() {
            self.returned.extend(lane.queue.drain(..).map(Claim::from));
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
            if lane.is_doubtful() && self.doubtful_places >= MAX_DOUBTFUL {
                // What has grown old while it waited is not kept from others.
                while let Some(claimed) = lane.queue.pop_front_if(|claimed| self.pace.is_stale(claimed, now_ms)) {
                    lane.more = true;
                    self.ahead = self.ahead.saturating_sub(1);
                    self.returned.push(claimed.into());
                }
                lane.turning = !lane.queue.is_empty();
                if lane.turning {
                    self.rotation.push_back(endpoint_id);
                }
                continue;
            }
            let next = if lane.in_flight < lane.width(self.pace) { lane.queue.pop_front() } else { None };
            let Some(claimed) = next else {
                lane.turning = false;
                continue;
            };
            self.ahead = self.ahead.saturating_sub(1);
            if self.pace.is_stale(&claimed, now_ms) {
                lane.more = true;
                self.returned.push(claimed.into());
            } else {
                lane.in_flight += 1;
                let place = (endpoint_id.clone(), lane.is_doubtful());
                self.doubtful_places += usize::from(place.1);
                let address = Arc::clone(&lane.address);
                let sending = post(Arc::clone(&self.sender), self.clock.clone(), address, claimed, outcomes.clone());
                self.places.insert(posts.spawn(sending).id(), place);
            }
            self.rotation.push_back(endpoint_id);
            turns = self.rotation.len();
        }
    }

    /// Gives back what is to be given back.
    fn give_back(&mut self) -> impl Future<Output = ()> + Send + use<> {
        let (claims, store, holder) = (std::mem::take(&mut self.returned), self.store.clone(), self.holder.clone());
        async move {
            if claims.is_empty() {
                return;
            }
            if let Err(error) = store.release(claims, holder).await {
                // They come free by themselves, only later.
                tracing::warn!(%error, "claims could not be given back");
            }
        }
    }

    /// A look at what is due, and the claim of what there is room for. Runs beside the lanes.
    fn look(&self) -> impl Future<Output = Result<Look, DbError>> + Send + use<> {
        let room: HashMap<String, (usize, bool)> =
            self.lanes.iter().map(|(id, lane)| (id.clone(), (lane.room(self.pace), lane.is_doubtful()))).collect();
        let left = MAX_AHEAD_OF_ALL.saturating_sub(self.ahead);
        let doubtful = self.lanes.values().filter(|lane| lane.is_doubtful()).map(|lane| lane.queue.len());
        let left_to_doubtful = MAX_DOUBTFUL_AHEAD.saturating_sub(doubtful.sum());
        let (store, holder, cursor) = (self.store.clone(), self.holder.clone(), self.cursor.clone());
        let (pace, clock, doubtful_cursor) = (self.pace, self.clock.clone(), self.doubtful_cursor.clone());
        async move {
            let at_ms = clock.now_ms();
            let lanes = store.due_lanes(cursor).await?;
            let due = lanes.due.iter().filter(|lane| lane.due_at_ms <= at_ms);
            let candidates = due.map(|lane| {
                let (count, is_doubtful) = room.get(&lane.endpoint_id).copied().unwrap_or((pace.per_endpoint, true));
                Candidate { want: Want { endpoint_id: lane.endpoint_id.clone(), count }, is_doubtful }
            });
            let choice = chosen(candidates, left, left_to_doubtful, doubtful_cursor);
            let haul = if choice.wants.is_empty() {
                Haul::default()
            } else {
                // From before the claim, however long that takes: nobody else may take it as ended before we do.
                let held_until_ms = clock.now_ms().saturating_add(pace.claim_ms());
                store.claim(choice.wants.clone(), holder, held_until_ms).await?
            };
            Ok(Look { at_ms, lanes, choice, haul })
        }
    }

    /// Takes in what a look has found, and decides when to look again.
    fn found(&mut self, found: Result<Result<Look, DbError>, JoinError>) {
        // Who was told that an endpoint is paused or changed was told before anything of this look goes out.
        self.forget(self.wake.take_changed(), true);
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
            look.choice.wants.iter().map(|want| (want.endpoint_id.as_str(), want.count)).collect();
        for due in &look.lanes.due {
            if due.due_at_ms > look.at_ms {
                self.look_again_at(due.due_at_ms);
            } else {
                let got = got.get(due.endpoint_id.as_str()).copied().unwrap_or(0);
                let asked = asked.get(due.endpoint_id.as_str()).copied().unwrap_or(0);
                self.lanes.entry(due.endpoint_id.clone()).or_default().more = got >= asked;
            }
        }
        self.doubtful_cursor = look.choice.doubtful_cursor;
        self.is_crowded |= look.choice.is_crowded;
        match (look.choice.cut, look.lanes.next) {
            // There are more endpoints than one look asks for, or than it finds: on with the next ones.
            (Some(Some(next)), _) | (None, Some(next)) => {
                self.cursor = next;
                self.look_at = Instant::now();
            }
            // Nothing can be claimed ahead at this moment: on from the same place when there is room.
            (Some(None), _) => {}
            (None, None) => {
                self.cursor.clear();
                if !std::mem::take(&mut self.is_crowded) {
                    // Everyone has had a turn.
                    self.doubtful_cursor.clear();
                }
            }
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
                self.returned.push(claimed.into());
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
        let Some((endpoint_id, doubtful)) = self.places.remove(&id) else { return };
        self.doubtful_places = self.doubtful_places.saturating_sub(usize::from(doubtful));
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
            self.returned.extend(lane.queue.drain(..).map(Claim::from));
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
                self.returned.extend(lane.queue.drain(..).map(Claim::from));
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
    /// Whether nobody knows that its receiver answers.
    fn is_doubtful(&self) -> bool {
        self.troubled || self.answer_ms.is_none()
    }

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
        let signatures = receiver.secret.as_ref().and_then(Signatures::of);
        let signatures = match &receiver.previous {
            Some((secret, until_ms)) => signatures.map(|current| current.with_previous(secret, *until_ms)),
            None => signatures,
        };
        Self { target: sender.rules().read(&receiver.url).ok(), signatures }
    }
}

/// Chooses, in the order of their ids, for whom to claim, and shares out `left` among them: first among those that are
/// known to answer. Of the rest the others get at most `left_to_doubtful`; but whoever is chosen gets something, for
/// nobody else would ever be known to answer.
fn chosen(
    candidates: impl Iterator<Item = Candidate>,
    left: usize,
    left_to_doubtful: usize,
    doubtful_cursor: String,
) -> Choice {
    let (mut known, mut doubtful, mut last) = (Vec::new(), Vec::new(), None);
    let mut choice = Choice { doubtful_cursor, ..Choice::default() };
    for Candidate { want, is_doubtful } in candidates.filter(|candidate| candidate.want.count > 0) {
        if is_doubtful && want.endpoint_id <= choice.doubtful_cursor {
            continue;
        }
        if is_doubtful && doubtful.len() >= left_to_doubtful {
            choice.is_crowded = true;
            continue;
        }
        if known.len() + doubtful.len() >= left.min(CLAIMS_A_LOOK) {
            choice.cut = Some(last);
            break;
        }
        last = Some(want.endpoint_id.clone());
        if is_doubtful { doubtful.push(want) } else { known.push(want) }
    }
    if choice.is_crowded
        && let Some(last) = doubtful.last()
    {
        choice.doubtful_cursor.clone_from(&last.endpoint_id);
    }
    choice.wants = shared_out(known, left.saturating_sub(doubtful.len()));
    let taken: usize = choice.wants.iter().map(|want| want.count).sum();
    choice.wants.extend(shared_out(doubtful, left.saturating_sub(taken).min(left_to_doubtful)));
    choice
}

/// Shares out `left` among those that want something: whoever wants less than an equal share gets all of it, and what
/// is over goes to the others.
fn shared_out(mut wants: Vec<Want>, mut left: usize) -> Vec<Want> {
    wants.retain(|want| want.count > 0);
    wants.sort_by_key(|want| want.count);
    let mut others = wants.len();
    for want in &mut wants {
        want.count = want.count.min(left.div_ceil(others.max(1)));
        left -= want.count;
        others -= 1;
    }
    wants.retain(|want| want.count > 0);
    wants
}

/// From time to time makes due what a clock that was set back has left in the future.
async fn free_from_the_future(store: Store, wake: Arc<Wake>, pace: Pace) {
    loop {
        match store.free_from_the_future(pace.claim_ms()).await {
            Ok(0) => {}
            Ok(freed) => {
                tracing::warn!(freed, "deliveries waited for a time that is far away: was the clock set back?");
                wake.work();
            }
            Err(error) => tracing::warn!(%error, "deliveries that wait for too long could not be looked for"),
        }
        tokio::time::sleep(LOOK_INTO_FUTURE).await;
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
    sender: Arc<Sender>,
    clock: Clock,
    address: Arc<Address>,
    mut claimed: Claimed,
    outcomes: mpsc::Sender<Entry>,
) -> Sent {
    let under_way = figures::begins();
    let attempt = match (&address.target, &address.signatures, claimed.body.take()) {
        (None, ..) => Attempt::unsent(clock.now_ms(), AttemptFault::AddressNotAllowed),
        (Some(_), None, _) | (Some(_), _, None) => Attempt::unsent(clock.now_ms(), AttemptFault::Other),
        (Some(target), Some(signatures), Some(body)) => {
            let mut span = attempt_span(&claimed, target);
            // Where nothing is recorded here, the receiver may still join what is recorded elsewhere.
            let traceparent = if span.is_recorded() { span.traceparent() } else { claimed.traceparent.clone() };
            let parcel = Parcel { delivery_id: &claimed.id, topic: &claimed.topic, body, traceparent: &traceparent };
            let attempt = sender.send(target, signatures, parcel).await;
            if let Some(status) = attempt.response_status {
                span.set("http.response.status_code", || i64::from(status));
            }
            if let Some(fault) = attempt.fault {
                span.failed(|| fault.word().into());
            }
            attempt
        }
    };
    figures::attempted(&attempt);
    drop(under_way);
    let failed = attempt.fault.is_some();
    let duration_ms = u64::try_from(attempt.duration_ms).unwrap_or(0);
    let (written, verdict) = failed.then(oneshot::channel).unzip();
    let outcome = Outcome {
        delivery_id: claimed.id,
        endpoint_id: claimed.endpoint_id,
        attempts: claimed.attempts,
        replayed_after: claimed.replayed_after,
        held_until_ms: claimed.held_until_ms,
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

/// The span of an attempt, in the trace in which the event happened. Of the address only the host is told.
fn attempt_span(claimed: &Claimed, target: &Target) -> Span {
    let mut span =
        telemetry::continued(&claimed.traceparent, SpanKind::Client, || format!("deliver {}", claimed.topic));
    span.set("http.request.method", || "POST");
    span.set("server.address", || target.host.clone());
    span.set("server.port", || i64::from(target.port));
    span.set("paperkey.delivery_id", || claimed.id.clone());
    span.set("paperkey.webhook_id", || claimed.endpoint_id.clone());
    span.set("paperkey.attempt", || claimed.attempts + 1);
    span
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shares(counts: &[usize], left: usize) -> Vec<usize> {
        let want = |count: &usize| Want { endpoint_id: String::new(), count: *count };
        shared_out(counts.iter().map(want).collect(), left).into_iter().map(|want| want.count).collect()
    }

    #[test]
    fn what_is_not_enough_for_all_is_shared_out_evenly() {
        assert_eq!(shares(&[128, 0, 3, 128], 1_000), [3, 128, 128]);
        assert_eq!(shares(&[128, 128, 2, 128], 32), [2, 10, 10, 10]);
        assert_eq!(shares(&[5; 10], 3), [1, 1, 1]);
        assert_eq!(shares(&[5; 3], 0), [0; 0]);
        assert_eq!(shares(&[], 10), [0; 0]);
        let all = shares(&[128; 500], 2_048);
        assert_eq!((all.len(), all.iter().sum::<usize>()), (500, 2_048));
    }

    /// Candidates by their ids, how much they would take, and whether they are doubtful.
    fn choice(candidates: &[(usize, usize, bool)], left: usize, left_to_doubtful: usize, after: &str) -> Choice {
        let candidate = |(id, count, is_doubtful): &(usize, usize, bool)| Candidate {
            want: Want { endpoint_id: format!("wh_{id:04}"), count: *count },
            is_doubtful: *is_doubtful,
        };
        chosen(candidates.iter().map(candidate), left, left_to_doubtful, after.to_owned())
    }

    fn sum(choice: &Choice) -> usize {
        choice.wants.iter().map(|want| want.count).sum()
    }

    #[test]
    fn one_look_asks_for_so_many_endpoints_and_the_next_goes_on_behind_them() {
        let all: Vec<_> = (0..=CLAIMS_A_LOOK * 2).map(|id| (id, 5, false)).collect();
        let first = choice(&all, MAX_AHEAD_OF_ALL, MAX_DOUBTFUL_AHEAD, "");
        assert_eq!((first.wants.len(), sum(&first)), (CLAIMS_A_LOOK, CLAIMS_A_LOOK * 5));
        assert_eq!(first.cut, Some(Some("wh_0063".to_owned())));
        let last = choice(&all[CLAIMS_A_LOOK * 2..], MAX_AHEAD_OF_ALL, MAX_DOUBTFUL_AHEAD, "");
        assert_eq!((last.wants.len(), last.cut), (1, None));
        // Where little is left, those behind come next as well; where nothing is, all wait.
        let few = choice(&all, 3, 3, "");
        assert_eq!((few.wants.len(), few.cut), (3, Some(Some("wh_0002".to_owned()))));
        assert_eq!(choice(&all, 0, 0, "").cut, Some(None));
    }

    #[test]
    fn receivers_that_are_known_to_answer_are_not_crowded_out() {
        // Many that are dead and have much waiting come first, and get their half.
        let dead: Vec<_> = (0..50).map(|id| (id, 128, true)).collect();
        let first = choice(&dead, MAX_AHEAD_OF_ALL, MAX_DOUBTFUL_AHEAD, "");
        assert_eq!(sum(&first), MAX_DOUBTFUL_AHEAD);
        let mut all = dead;
        all.extend((50..58).map(|id| (id, 128, false)));
        let next = choice(&all, MAX_AHEAD_OF_ALL - MAX_DOUBTFUL_AHEAD, 0, "");
        assert_eq!((sum(&next), next.wants.len(), next.cut, next.is_crowded), (8 * 128, 8, None, true));
        // Those that are known come first where not all is there, and nobody who is chosen gets nothing.
        let both = choice(&[(0, 128, true), (1, 128, false), (2, 128, true)], 100, 100, "");
        let counts: Vec<_> = both.wants.iter().map(|want| (want.endpoint_id.as_str(), want.count)).collect();
        assert_eq!(counts, [("wh_0001", 98), ("wh_0000", 1), ("wh_0002", 1)]);
    }

    #[test]
    fn doubtful_receivers_take_turns_where_not_all_find_room() {
        let dead: Vec<_> = (0..5).map(|id| (id, 1, true)).collect();
        let first = choice(&dead, 100, 2, "");
        assert_eq!((first.wants.len(), first.is_crowded, first.doubtful_cursor.as_str()), (2, true, "wh_0001"));
        let second = choice(&dead, 100, 2, &first.doubtful_cursor);
        assert_eq!((second.wants[0].endpoint_id.as_str(), second.doubtful_cursor.as_str()), ("wh_0002", "wh_0003"));
        let third = choice(&dead, 100, 2, &second.doubtful_cursor);
        assert_eq!((third.wants[0].endpoint_id.as_str(), third.is_crowded), ("wh_0004", false));
    }

    #[test]
    fn a_claim_is_fresh_from_when_it_was_answered_while_it_holds_long_enough() {
        let pace = Pace { per_endpoint: 5, timeout_ms: 5_000 };
        // The database took fifteen seconds for it.
        let claimed = Claimed {
            id: String::new(),
            endpoint_id: String::new(),
            topic: String::new(),
            attempts: 0,
            replayed_after: None,
            held_until_ms: pace.claim_ms(),
            answered_at_ms: 15_000,
            body: None,
            traceparent: String::new(),
        };
        assert!(!pace.is_stale(&claimed, 15_000));
        assert!(!pace.is_stale(&claimed, 15_000 + FRESH_MS));
        assert!(pace.is_stale(&claimed, 15_001 + FRESH_MS));
        // One that ends too soon is never sent under.
        let claimed = Claimed { answered_at_ms: pace.claim_ms(), ..claimed };
        assert!(pace.is_stale(&claimed, pace.claim_ms() - 9_999));
        assert!(!pace.is_stale(&claimed, pace.claim_ms() - 10_000));
    }

    #[test]
    fn a_lane_is_doubtful_until_its_receiver_answers_and_when_it_fails() {
        let mut lane = Lane::default();
        assert!(lane.is_doubtful());
        lane.answer_ms = Some(7);
        assert!(!lane.is_doubtful());
        lane.troubled = true;
        assert!(lane.is_doubtful());
    }
}
