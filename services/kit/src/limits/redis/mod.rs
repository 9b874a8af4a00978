//! Windows in a Redis or Valkey that gateways share.
//!
//! The store judges each call by a script, on its own clock. A question has a deadline, and where it is missed no call
//! touches the store until a worker has found out how it is: nothing queues behind it.
//!
//! - **Up**: the store decides. What was let through here is noted beside it (`shadow`).
//! - **In doubt**: a question was not answered. Calls wait for a moment, in which the store is asked over a new connection. If
//!   it answers, a packet was lost or this machine was busy, and nothing has happened; otherwise the store is gone.
//! - **Down**: each limit does what it is configured to. An open one lets through this gateway's share, so that the shares
//!   of all gateways sum to the limit (`members`); a closed one refuses.
//! - **Joining**: the store is back, but may have lost everything, and does not know yet what the gateways have let through
//!   without it. Each tells it. Until all have had the time to, a call needs a place in the store and in the share.
//!
//! A gateway that starts is known to the others before it takes its first call, and whoever came back has told the store
//! everything by then: it waits for a little over a second.
//!
//! The store must not evict keys that have not expired (`maxmemory-policy noeviction`): what
//! it forgets is let through again. Its user needs the keys `paperkey:*`, scripts, and the commands of sorted sets, `TIME`,
//! `PEXPIRE`, `PING`, `INFO` and `CLUSTER SLOTS`.
//!
//! On a cluster a call that is refused because of a race may take a place in another window for the moment until it is
//! taken out again.
//!
//! Deliberately absent: a gateway that alone cannot reach a store which the others still reach. It goes by its share, of which
//! they do not know: for as long as that lasts, as much as its share may be let through beside the limit.

mod link;
mod members;
mod shadow;

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Mutex, RwLock};
use rand::RngExt as _;
use tokio::{
    sync::{Notify, Semaphore, watch},
    time,
};

use self::{
    link::{Dialer, Entry, Fault, Judged, Link, Place},
    members::{Crowd, Members},
    shadow::{Alone, Outage, SHARDS, Seat, Shadow},
};
use super::{Claim, OnStoreFailure, Receipt, Refused, Standing, Standings, Subject, Verdict};
use crate::{clock::Clock, secrets::Secret, shutdown::Shutdown};

/// How long a call waits for an answer of the store, all questions together.
const ANSWER_TIMEOUT: Duration = Duration::from_millis(70);
/// How long it is looked whether a store that did not answer is gone.
const DOUBT_TIMEOUT: Duration = Duration::from_millis(60);
/// How long a call takes at most, with a second question after a doubt that came to nothing.
const PATIENCE: Duration = Duration::from_millis(190);
/// Questions under way at most; more of them wait, within their deadline.
const MAX_UNDER_WAY: usize = 512;
/// How often a gateway says that it is there.
const BEAT_INTERVAL: Duration = Duration::from_secs(1);
const BEAT_TIMEOUT: Duration = Duration::from_millis(200);
/// How often a store is looked for that is gone, and how long each time.
const PROBE_INTERVAL: Duration = Duration::from_millis(200);
const PROBE_TIMEOUT: Duration = Duration::from_millis(300);
/// How long after its own return a gateway believes that all others have returned too.
const JOINING: Duration = Duration::from_secs(1);
/// How long a gateway that starts waits to be known: all others count once a second.
const BECOMING_KNOWN: Duration = Duration::from_millis(1_200);
/// How long a start looks for the store.
const START_PATIENCE: Duration = Duration::from_secs(3);
/// How long one piece of what was let through without the store may take to be told.
const UPLOAD_TIMEOUT: Duration = Duration::from_millis(500);
/// When to try again where nobody can know: the time in which limits are shared again once the store is back.
const TRY_AGAIN: Duration = Duration::from_secs(2);
/// Entries that may be in the store and should not, at most. One that is forgotten leaves with its window.
const MAX_ORPHANS: usize = 16_384;
/// Shards of the shadow that are swept each time round.
const SWEPT_AT_ONCE: usize = 16;

/// How the store is reached.
#[derive(Clone, Debug)]
pub struct RedisOptions {
    /// Where it is.
    pub url: Secret,
    /// How many gateways there are at most, where that is configured.
    pub gateways: Option<u32>,
}

/// How the shared store is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreState {
    /// It decides.
    Up,
    /// It is back; what was let through without it is being told.
    Joining,
    /// It is gone.
    Down,
}

/// What is known of the shared store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RedisStats {
    /// How it is.
    pub state: StoreState,
    /// How often it was lost.
    pub failures: u64,
    /// Among how many gateways limits are divided without it.
    pub gateways: u32,
}

/// Counts calls in a shared store.
pub struct RedisLimiter(Arc<Inner>);

struct Inner {
    dialer: Dialer,
    phase: RwLock<Numbered>,
    /// The worker has something to look after.
    changed: Notify,
    /// The number of the phase, for those who wait for the next one.
    numbers: watch::Sender<u64>,
    under_way: Semaphore,
    shadow: Shadow,
    members: Mutex<Members>,
    /// Which store has all that is confirmed.
    told: Mutex<Option<Arc<str>>>,
    /// What may be in the store and should not.
    orphans: Mutex<Vec<(Subject, u64)>>,
    failures: AtomicU64,
    gateway: u64,
    clock: Clock,
    started: Instant,
    last_call: AtomicU64,
}

/// A phase, and a number that tells it from others of its kind.
struct Numbered {
    number: u64,
    phase: Phase,
}

#[derive(Clone)]
enum Phase {
    Up(Link),
    Doubt,
    Joining(Link, Outage),
    Down(Outage),
}

/// How a call is decided.
enum Way {
    Store(Link, u64),
    Both(Link, u64, Alone),
    Decided(Verdict),
    /// Not before it is known how the store is.
    Wait,
}

impl RedisLimiter {
    /// Dials the store. The limiter then needs [`run`](Self::run) to be running: without it a store that was lost is not
    /// found again.
    ///
    /// Takes a little over a second, in which the other gateways learn of this one.
    pub async fn connect(options: RedisOptions, clock: Clock) -> Result<Self, String> {
        let dialer = Dialer::new(&options.url).map_err(|_| {
            "redis.url cannot be read: write it as redis://user:password@host:6379, or with rediss:// for TLS"
                .to_owned()
        })?;
        let gateway = rand::rng().random();
        let members = Mutex::new(Members::new(options.gateways));
        let started = clock.monotonic();
        let nowhere = Outage { number: 1, since: 0, crowd: members.lock().crowd() };
        let inner = Inner {
            dialer,
            phase: RwLock::new(Numbered { number: 0, phase: Phase::Down(nowhere) }),
            changed: Notify::new(),
            numbers: watch::Sender::new(0),
            under_way: Semaphore::new(MAX_UNDER_WAY),
            shadow: Shadow::new(),
            members,
            told: Mutex::default(),
            orphans: Mutex::default(),
            failures: AtomicU64::new(0),
            gateway,
            clock,
            started,
            last_call: AtomicU64::new(0),
        };
        let begun = time::Instant::now();
        loop {
            match inner.arrive().await {
                Ok(()) => break,
                Err(fault) if fault.hopeless || begun.elapsed() >= START_PATIENCE => {
                    if options.gateways.is_none() {
                        return Err(format!(
                            "the store at redis.url cannot be used ({fault}): start it or correct redis.url, or set \
                             redis.gateways to let gateways start without it"
                        ));
                    }
                    tracing::warn!(%fault, "starting without the shared store of limits: going by this gateway's share");
                    break;
                }
                Err(_) => time::sleep(PROBE_INTERVAL).await,
            }
        }
        Ok(Self(Arc::new(inner)))
    }

    /// Keeps in touch with the store and the other gateways, until shut down.
    pub fn run(&self, mut shutdown: Shutdown) -> impl Future<Output = ()> + Send + use<> {
        let inner = Arc::clone(&self.0);
        async move {
            tokio::select! {
                () = shutdown.wait() => {}
                () = inner.keep() => {}
            }
        }
    }

    /// Counts a call against all of its limits, or against none.
    pub async fn check(&self, claims: &[Claim]) -> Verdict {
        self.0.decide(claims).await.0
    }

    /// The same, with the microsecond of the store's clock at which the store decided, if it did: for tests of windows.
    #[doc(hidden)]
    pub async fn check_timed(&self, claims: &[Claim]) -> (Verdict, Option<u64>) {
        self.0.decide(claims).await
    }

    /// Takes back what a call has counted.
    pub async fn take_back(&self, receipt: &Receipt) {
        self.0.take_back(receipt).await;
    }

    /// Where a subject stands.
    pub async fn standing(&self, claim: &Claim) -> Standing {
        self.0.standing(claim).await
    }

    /// What is known of the store.
    pub fn stats(&self) -> RedisStats {
        let (state, gateways) = match &self.0.phase.read().phase {
            Phase::Up(_) | Phase::Doubt => (StoreState::Up, self.0.members.lock().crowd().gateways),
            Phase::Joining(_, outage) => (StoreState::Joining, outage.crowd.gateways),
            Phase::Down(outage) => (StoreState::Down, outage.crowd.gateways),
        };
        RedisStats { state, failures: self.0.failures.load(Ordering::Relaxed), gateways }
    }
}

impl fmt::Debug for RedisLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedisLimiter").field("stats", &self.stats()).finish_non_exhaustive()
    }
}

// Calls.
impl Inner {
    async fn decide(&self, claims: &[Claim]) -> (Verdict, Option<u64>) {
        let deadline = time::Instant::now() + PATIENCE;
        while time::Instant::now() < deadline {
            let (number, way) = self.way(claims);
            match way {
                Way::Decided(verdict) => return (verdict, None),
                Way::Wait => self.certainty(number, deadline).await,
                Way::Store(link, call) => match self.ask(link.judge(claims, &self.entry(call)), deadline).await {
                    Ok(judged) => {
                        let totals = judged.places.iter().map(|place| place.count);
                        if judged.refused_by.is_none() {
                            self.shadow.note(claims, call, totals, self.now());
                        } else {
                            self.shadow.tell(claims, totals, self.now());
                        }
                        let at = judged.places.iter().map(|place| place.at).max();
                        return (verdict_of_store(claims, call, &judged), at);
                    }
                    Err(fault) => {
                        self.orphan(claims.iter().map(|claim| (claim.subject, call)));
                        self.fail(number, &fault);
                    }
                },
                Way::Both(link, call, alone) => {
                    let judged = self.ask(link.judge(claims, &self.entry(call)), deadline).await;
                    return (self.decide_by_both(claims, number, call, &alone, judged), None);
                }
            }
        }
        // Time is up. What nobody knows by now is taken for the worse.
        self.give_up(self.phase.read().number);
        match &self.phase.read().phase {
            Phase::Down(outage) => (self.decide_alone(claims, self.next_call(), outage), None),
            _ => (gone(claims), None),
        }
    }

    /// Decides a call that has its place in the share.
    fn decide_by_both(
        &self,
        claims: &[Claim],
        number: u64,
        call: u64,
        alone: &Alone,
        judged: Result<Judged, Fault>,
    ) -> Verdict {
        match judged {
            Ok(judged) if judged.refused_by.is_some() => {
                self.withdraw(claims, call);
                verdict_of_store(claims, call, &judged)
            }
            Ok(judged) => {
                for claim in claims {
                    self.shadow.confirm(claim.subject, call);
                }
                both(verdict_of_store(claims, call, &judged), alone)
            }
            Err(fault) => {
                self.fail(number, &fault);
                let now = self.phase.read();
                let open = claims.iter().all(|claim| claim.on_store_failure == OnStoreFailure::Open);
                if open && matches!(now.phase, Phase::Down(_)) {
                    // The store learns of it when it is back.
                    return verdict_alone(claims, call, alone);
                }
                // It is closed; or the store came back while this call still waited, and nobody would tell it.
                self.withdraw(claims, call);
                self.orphan(claims.iter().map(|claim| (claim.subject, call)));
                gone(claims)
            }
        }
    }

    /// Waits until it is known how the store is. If that takes too long, it is gone.
    async fn certainty(&self, number: u64, deadline: time::Instant) {
        let mut numbers = self.numbers.subscribe();
        let patience = deadline.min(time::Instant::now() + DOUBT_TIMEOUT + DOUBT_TIMEOUT / 4);
        if time::timeout_at(patience, numbers.wait_for(|now| *now != number)).await.is_err() {
            self.give_up(number);
        }
    }

    /// How a call is decided now. What needs no store is decided while the phase stands still, so that whoever tells the
    /// store what was let through misses nothing.
    fn way(&self, claims: &[Claim]) -> (u64, Way) {
        let now = self.phase.read();
        let call = self.next_call();
        let way = match &now.phase {
            Phase::Up(link) => Way::Store(link.clone(), call),
            Phase::Joining(link, outage) => {
                let alone = self.shadow.claim(claims, call, outage);
                match alone.refused_by {
                    Some(_) => Way::Decided(verdict_alone(claims, call, &alone)),
                    None => Way::Both(link.clone(), call, alone),
                }
            }
            Phase::Down(outage) => Way::Decided(self.decide_alone(claims, call, outage)),
            Phase::Doubt => Way::Wait,
        };
        (now.number, way)
    }

    fn decide_alone(&self, claims: &[Claim], call: u64, outage: &Outage) -> Verdict {
        if claims.iter().any(|claim| claim.on_store_failure == OnStoreFailure::Closed) {
            return gone(claims);
        }
        verdict_alone(claims, call, &self.shadow.claim(claims, call, outage))
    }

    async fn take_back(&self, receipt: &Receipt) {
        for (subject, call) in &receipt.entries {
            self.shadow.remove(*subject, *call);
        }
        let (number, link) = self.link();
        let taken = match link {
            Some(link) => {
                let entries = receipt.entries.iter().map(|(subject, call)| (*subject, self.entry(*call)));
                self.ask(link.remove(entries), time::Instant::now() + PATIENCE)
                    .await
                    .inspect_err(|fault| self.fail(number, fault))
                    .is_ok()
            }
            None => false,
        };
        if !taken {
            self.orphan(receipt.entries.iter().copied());
        }
    }

    async fn standing(&self, claim: &Claim) -> Standing {
        let (number, link) = self.link();
        let place = match link {
            Some(link) => {
                let looked = self.ask(link.look(std::slice::from_ref(claim)), time::Instant::now() + PATIENCE).await;
                looked.inspect_err(|fault| self.fail(number, fault)).ok()
            }
            None => None,
        };
        let place = place.and_then(|judged| judged.places.first().copied());
        let outage = match self.phase.read().phase {
            Phase::Up(_) | Phase::Doubt => None,
            Phase::Joining(_, outage) | Phase::Down(outage) => Some(outage),
        };
        let seat = outage.map(|outage| self.shadow.look(claim, self.now(), &outage));
        match (place, seat) {
            (Some(place), None) => of_place(claim, place),
            (Some(place), Some(seat)) => of_both(of_place(claim, place), seat),
            (None, Some(_)) if claim.on_store_failure == OnStoreFailure::Closed => standing(claim, claim.requests, 0),
            (None, Some(seat)) => of_seat(claim, seat),
            // It is in doubt, or came back while this was asked.
            (None, None) => standing(claim, claim.requests, 0),
        }
    }

    /// Puts a question to the store, with a deadline.
    async fn ask<T>(
        &self,
        question: impl Future<Output = Result<T, Fault>>,
        deadline: time::Instant,
    ) -> Result<T, Fault> {
        let asked = async {
            // The semaphore is never closed.
            let _permit = self.under_way.acquire().await.map_err(|_| Fault::timed_out())?;
            question.await
        };
        let deadline = deadline.min(time::Instant::now() + ANSWER_TIMEOUT);
        time::timeout_at(deadline, asked).await.unwrap_or_else(|_| Err(Fault::timed_out()))
    }

    fn link(&self) -> (u64, Option<Link>) {
        let now = self.phase.read();
        let link = match &now.phase {
            Phase::Up(link) | Phase::Joining(link, _) => Some(link.clone()),
            Phase::Doubt | Phase::Down(_) => None,
        };
        (now.number, link)
    }

    fn withdraw(&self, claims: &[Claim], call: u64) {
        for claim in claims {
            self.shadow.remove(claim.subject, call);
        }
    }

    fn orphan(&self, entries: impl Iterator<Item = (Subject, u64)>) {
        let mut orphans = self.orphans.lock();
        let room = MAX_ORPHANS.saturating_sub(orphans.len());
        orphans.extend(entries.take(room));
    }

    fn now(&self) -> u64 {
        // From 1, as 0 means never.
        link::micros(self.clock.monotonic().saturating_duration_since(self.started)).saturating_add(1)
    }

    /// The time of a call, by which it is known: no two have the same.
    fn next_call(&self) -> u64 {
        let now = self.now();
        let before = self.last_call.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |last| Some(now.max(last + 1)));
        before.map_or(now, |last| now.max(last + 1))
    }

    fn entry(&self, call: u64) -> Entry {
        (u128::from(self.gateway) << 64 | u128::from(call)).to_be_bytes()
    }
}

// The state of the store.
impl Inner {
    /// The store has failed, unless that is known or it has come back since.
    fn fail(&self, number: u64, fault: &Fault) {
        let next = match &self.phase.read().phase {
            Phase::Up(_) => Phase::Doubt,
            Phase::Joining(_, outage) => Phase::Down(*outage),
            Phase::Doubt | Phase::Down(_) => return,
        };
        if self.go_on(number, || next).is_some() {
            tracing::debug!(%fault, "the shared store of limits has not answered");
            self.changed.notify_one();
        }
    }

    /// What is in doubt is gone.
    fn give_up(&self, number: u64) -> Option<(u64, Outage)> {
        if !matches!(self.phase.read().phase, Phase::Doubt) {
            return None;
        }
        let lost = self.failures.load(Ordering::Relaxed);
        // Not 0, which is none, and not 1, which is a start without the store.
        let tells_apart = u32::try_from(lost % u64::from(u32::MAX - 2)).unwrap_or(0) + 2;
        let crowd = self.members.lock().crowd();
        let outage = || Outage { number: tells_apart, since: self.now(), crowd };
        let mut begun = None;
        let number = self.go_on(number, || Phase::Down(*begun.insert(outage())))?;
        self.failures.fetch_add(1, Ordering::Relaxed);
        tracing::warn!("the shared store of limits is gone: going by this gateway's share");
        self.changed.notify_one();
        begun.map(|outage| (number, outage))
    }

    /// Goes on to another phase, unless this one has ended.
    fn go_on(&self, number: u64, phase: impl FnOnce() -> Phase) -> Option<u64> {
        let mut now = self.phase.write();
        if now.number != number {
            return None;
        }
        *now = Numbered { number: number + 1, phase: phase() };
        self.numbers.send_replace(number + 1);
        Some(number + 1)
    }

    /// A new connection over which everything works.
    async fn reach(&self, timeout: Duration) -> Result<(Link, Crowd), Fault> {
        let reached = async {
            let link = self.dialer.dial().await?;
            link.probe().await?;
            let crowd = link.beat(&self.name()).await?;
            Ok((link, crowd))
        };
        time::timeout(timeout, reached).await.unwrap_or_else(|_| Err(Fault::timed_out()))
    }

    async fn beat(&self, link: &Link) -> Result<Crowd, Fault> {
        time::timeout(BEAT_TIMEOUT, link.beat(&self.name())).await.unwrap_or_else(|_| Err(Fault::timed_out()))
    }

    fn name(&self) -> String {
        format!("{:016x}", self.gateway)
    }

    /// Starts with the store.
    async fn arrive(&self) -> Result<(), Fault> {
        let (link, crowd) = self.reach(PROBE_TIMEOUT).await?;
        self.members.lock().saw(crowd);
        time::sleep(BECOMING_KNOWN).await;
        let crowd = self.beat(&link).await?;
        self.members.lock().saw(crowd);
        *self.told.lock() = link.identity().cloned();
        let number = self.phase.read().number;
        self.go_on(number, || Phase::Up(link));
        Ok(())
    }

    async fn keep(&self) {
        let mut shard = 0;
        loop {
            let (number, phase) = {
                let now = self.phase.read();
                (now.number, now.phase.clone())
            };
            let interval = match phase {
                Phase::Down(_) => {
                    let next = time::Instant::now() + PROBE_INTERVAL;
                    if let Ok((link, crowd)) = self.reach(PROBE_TIMEOUT).await {
                        self.come_back(number, link, crowd).await;
                    }
                    next.saturating_duration_since(time::Instant::now())
                }
                Phase::Doubt => {
                    self.dispel(number).await;
                    BEAT_INTERVAL
                }
                Phase::Up(link) | Phase::Joining(link, _) => {
                    tokio::select! {
                        () = self.touch(number, &link) => {}
                        // Seen to below.
                        () = self.changed.notified() => self.changed.notify_one(),
                    }
                    BEAT_INTERVAL
                }
            };
            for _ in 0..SWEPT_AT_ONCE {
                let outage = match self.phase.read().phase {
                    Phase::Up(_) | Phase::Doubt => None,
                    Phase::Joining(_, outage) | Phase::Down(outage) => Some(outage),
                };
                self.shadow.sweep(shard, self.now(), outage.as_ref());
                shard = (shard + 1) % SHARDS;
            }
            tokio::select! {
                () = time::sleep(interval) => {}
                () = self.changed.notified() => {
                    let down = matches!(self.phase.read().phase, Phase::Down(_));
                    // All questions that were under way come to their end before the store is looked for.
                    time::sleep(if down { ANSWER_TIMEOUT + ANSWER_TIMEOUT / 2 } else { Duration::ZERO }).await;
                }
            }
        }
    }

    /// Says that this gateway is there, and tidies up.
    async fn touch(&self, number: u64, link: &Link) {
        let touched = async {
            let crowd = self.beat(link).await?;
            self.members.lock().saw(crowd);
            self.remove_orphans(link).await
        };
        if let Err(fault) = touched.await {
            self.fail(number, &fault);
        }
    }

    /// Finds out whether the store is gone that has not answered a question.
    async fn dispel(&self, number: u64) {
        let reached = self.reach(DOUBT_TIMEOUT).await;
        if let Ok((link, crowd)) = reached {
            if self.has_everything(&link) && self.remove_orphans(&link).await.is_ok() {
                self.go_on(number, || Phase::Up(link));
            } else if let Some((number, _)) = self.give_up(number) {
                self.come_back(number, link, crowd).await;
            }
        } else {
            self.give_up(number);
        }
    }

    /// Tells the store what it has missed, and lets it decide when all others have had the time to do so.
    async fn come_back(&self, number: u64, link: Link, crowd: Crowd) {
        let Phase::Down(outage) = self.phase.read().phase else { return };
        let outage = Outage { crowd: outage.crowd.joined_by(crowd), ..outage };
        let mut until = 0;
        let joining = || {
            // Later calls tell the store themselves.
            until = self.next_call();
            Phase::Joining(link.clone(), outage)
        };
        let Some(number) = self.go_on(number, joining) else { return };
        let told = async {
            self.tell_everything(&link, until).await?;
            self.remove_orphans(&link).await
        };
        if let Err(fault) = told.await {
            self.fail(number, &fault);
            return;
        }
        *self.told.lock() = link.identity().cloned();
        tokio::select! {
            () = time::sleep(JOINING) => {}
            () = self.changed.notified() => return self.changed.notify_one(),
        }
        self.touch(number, &link).await;
        if self.go_on(number, || Phase::Up(link)).is_some() {
            tracing::info!("the shared store of limits is back");
        }
    }

    /// Whether it is the same store that was told everything, and was not restarted since.
    fn has_everything(&self, link: &Link) -> bool {
        self.told.lock().as_ref().is_some_and(|told| link.identity() == Some(told))
    }

    async fn tell_everything(&self, link: &Link, until: u64) -> Result<(), Fault> {
        let confirmed_too = !self.has_everything(link);
        let running = (0..SHARDS).flat_map(|shard| self.shadow.running(shard, self.now(), until, confirmed_too));
        let age = |call: u64| self.now().saturating_sub(call);
        link.upload(running, age, |call| self.entry(call), UPLOAD_TIMEOUT).await
    }

    /// Takes out what may be in the store and should not.
    async fn remove_orphans(&self, link: &Link) -> Result<(), Fault> {
        let orphans = std::mem::take(&mut *self.orphans.lock());
        for (done, some) in orphans.chunks(MAX_UNDER_WAY).enumerate() {
            let entries = some.iter().map(|(subject, call)| (*subject, self.entry(*call)));
            let removed = time::timeout(UPLOAD_TIMEOUT, link.remove(entries)).await;
            if let Err(fault) = removed.unwrap_or_else(|_| Err(Fault::timed_out())) {
                self.orphan(orphans.iter().skip(done * MAX_UNDER_WAY).copied());
                return Err(fault);
            }
        }
        Ok(())
    }
}

fn verdict_of_store(claims: &[Claim], call: u64, judged: &Judged) -> Verdict {
    let standings: Standings =
        claims.iter().zip(&judged.places).map(|(claim, place)| of_place(claim, *place)).collect();
    let Some(by) = judged.refused_by else {
        return Verdict::Passed(receipt(claims, call, standings));
    };
    let wait = judged.places.iter().map(|place| place.wait).max().unwrap_or(0);
    Verdict::Refused(Refused { standings, by, retry_after: Duration::from_micros(wait), store_is_gone: false })
}

fn verdict_alone(claims: &[Claim], call: u64, alone: &Alone) -> Verdict {
    let standings: Standings = claims.iter().zip(&alone.seats).map(|(claim, seat)| of_seat(claim, *seat)).collect();
    let Some(by) = alone.refused_by else {
        return Verdict::Passed(receipt(claims, call, standings));
    };
    let wait = alone.seats.iter().filter_map(|seat| seat.wait).max().unwrap_or(0);
    // A gateway without a share refuses because it cannot ask, not because of anything that was called.
    let store_is_gone = alone.seats.iter().any(|seat| seat.wait.is_none());
    let retry_after = Duration::from_micros(wait).max(if store_is_gone { TRY_AGAIN } else { Duration::ZERO });
    Verdict::Refused(Refused { standings, by, retry_after, store_is_gone })
}

/// Refuses a call because the store is gone.
fn gone(claims: &[Claim]) -> Verdict {
    let closed = claims.iter().position(|claim| claim.on_store_failure == OnStoreFailure::Closed);
    let standings = claims.iter().map(|claim| standing(claim, claim.requests, 0)).collect();
    Verdict::Refused(Refused { standings, by: closed.unwrap_or(0), retry_after: TRY_AGAIN, store_is_gone: true })
}

/// A verdict of the store, with what is left of the share too.
fn both(verdict: Verdict, alone: &Alone) -> Verdict {
    match verdict {
        Verdict::Passed(mut receipt) => {
            for (standing, seat) in receipt.standings.iter_mut().zip(&alone.seats) {
                *standing = of_both(*standing, *seat);
            }
            Verdict::Passed(receipt)
        }
        refused @ Verdict::Refused(_) => refused,
    }
}

fn receipt(claims: &[Claim], call: u64, standings: Standings) -> Receipt {
    Receipt { standings, entries: claims.iter().map(|claim| (claim.subject, call)).collect() }
}

fn of_place(claim: &Claim, place: Place) -> Standing {
    standing(claim, place.count, place.resets_in)
}

fn of_seat(claim: &Claim, seat: Seat) -> Standing {
    Standing { remaining: seat.allowed.saturating_sub(seat.count), ..standing(claim, seat.count, seat.resets_in) }
}

fn of_both(standing: Standing, seat: Seat) -> Standing {
    Standing { remaining: standing.remaining.min(seat.allowed.saturating_sub(seat.count)), ..standing }
}

fn standing(claim: &Claim, count: u32, resets_in_us: u64) -> Standing {
    Standing {
        class: claim.class,
        requests: claim.requests,
        window: claim.window,
        remaining: claim.requests.saturating_sub(count),
        resets_in: Duration::from_micros(resets_in_us),
    }
}
