//! The connections of one channel: which are open, how much each carries, and which takes the next call.
//!
//! [`keep`] runs beside the calls: it looks the hosts up, again every few seconds while there are calls, and keeps a
//! connection to each address that was found. One that fails is left out until it has answered again. Calls read a slice
//! that is swapped whole, and count in atomics; only those that find no room wait.

use std::{
    collections::HashMap,
    fmt,
    io::ErrorKind,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use arc_swap::ArcSwap;
use futures_util::{FutureExt as _, StreamExt as _, stream::FuturesUnordered};
use hyper::client::conn::http2::SendRequest;
use paperkey_proto::Error;
use parking_lot::Mutex;
use rand::RngExt as _;
use tokio::{
    sync::Notify,
    task::{AbortHandle, JoinSet},
    time::{Instant, timeout_at},
};

use super::{
    ChannelStats, ClientTls, Resolver,
    body::Outgoing,
    dial::{Heard, Target, dial},
    retry::{Budget, words},
};

/// How often hosts are looked up while there are calls, and the pause after each look-up.
const LOOK_UP_EVERY: Duration = Duration::from_secs(3);
const LOOK_UP_PAUSE: Duration = Duration::from_millis(500);
/// How long a look-up may take.
const LOOK_UP_TIMEOUT: Duration = Duration::from_secs(5);
/// Addresses that one host may have; more are left out.
const MAX_ADDRESSES: usize = 64;
/// Connections to one address. The second is opened when the first is full of calls.
const MAX_CONNECTIONS: usize = 8;
/// Calls under way on one connection, if its peer allows as many.
const MAX_STREAMS: usize = 256;
/// The pauses between attempts to reach an address: the first, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// A connection beyond the first is closed when it has carried nothing for as long.
const IDLE: Duration = Duration::from_mins(1);
/// How often is looked whether one has, and how long a call may take to be noticed on one that takes no more.
const IDLE_LOOK: Duration = Duration::from_secs(1);
/// How long whoever has refused a call for want of room is spared, while there are others.
const SPARED: Duration = Duration::from_secs(1);
/// A connection that has lasted as long is dialled again at once.
const STEADY: Duration = Duration::from_secs(1);
/// How long a call waits for a connection.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often a call that is stuck looks whether there is somebody else to ask.
const LOOK_AGAIN: Duration = Duration::from_millis(250);
/// Calls that may wait for one.
const MAX_WAITING: usize = 1_024;

/// An address, of one of the hosts that a channel names.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Address {
    target: usize,
    at: SocketAddr,
}

/// What is known of an address.
pub(super) struct Place {
    pub(super) target: Arc<Target>,
    pub(super) at: SocketAddr,
    /// Told when its connections are full.
    full: Notify,
    /// Until when it is spared, in milliseconds since the channel was made.
    spared_until_ms: AtomicU64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.target, self.at)
    }
}

/// An open connection.
pub(super) struct Connection {
    place: Arc<Place>,
    sender: SendRequest<Outgoing>,
    heard: Arc<Heard>,
    under_way: AtomicUsize,
    /// How many its peer allows.
    limit: AtomicUsize,
    /// Whether it takes no new call: its peer is gone, or has said that it goes.
    closed: AtomicBool,
}

impl Connection {
    pub(super) fn new(place: Arc<Place>, sender: SendRequest<Outgoing>, heard: Arc<Heard>) -> Self {
        let (under_way, limit) = (AtomicUsize::new(0), AtomicUsize::new(1));
        Self { place, sender, heard, under_way, limit, closed: AtomicBool::new(false) }
    }

    /// Notes how many calls its peer allows at a time.
    pub(super) fn allow(&self, streams: usize) {
        self.limit.store(streams.clamp(1, MAX_STREAMS), Ordering::Relaxed);
    }

    fn has_ended(&self) -> bool {
        self.closed.load(Ordering::Acquire) || self.sender.is_closed()
    }

    /// Takes a place on it.
    fn take(&self) -> bool {
        if self.has_ended() {
            return false;
        }
        let limit = self.limit.load(Ordering::Relaxed);
        let one_more = |under_way: usize| (under_way < limit).then_some(under_way + 1);
        // In one order with `Pool::waiting`: see there.
        let Ok(before) = self.under_way.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_more) else {
            return false;
        };
        // Before it is full, so that nobody waits for the next.
        if before + 1 == limit / 4 * 3 {
            self.place.full.notify_one();
        }
        true
    }

    /// Waits until it has carried nothing for a while.
    async fn is_left(&self) {
        let mut used = Instant::now();
        while used.elapsed() < IDLE {
            tokio::time::sleep(IDLE_LOOK).await;
            if self.under_way.load(Ordering::SeqCst) > 0 {
                used = Instant::now();
            }
        }
    }

    /// Waits until it carries nothing more.
    async fn is_empty(&self) {
        loop {
            tokio::time::sleep(IDLE_LOOK).await;
            if self.under_way.load(Ordering::SeqCst) == 0 {
                return;
            }
        }
    }

    /// Whether calls should rather go elsewhere, and how busy it is.
    fn busy(&self) -> (bool, usize) {
        (self.has_ended() || self.heard.is_silent(), self.under_way.load(Ordering::Relaxed))
    }
}

/// A place on a connection, for as long as a call takes.
pub(super) struct Slot {
    pool: Arc<Pool>,
    connection: Arc<Connection>,
}

impl Slot {
    /// Whom it leads to.
    pub(super) fn place(&self) -> &Arc<Place> {
        &self.connection.place
    }

    pub(super) fn sender(&self) -> SendRequest<Outgoing> {
        self.connection.sender.clone()
    }

    /// Waits until the peer is silent, and there is somebody else to ask.
    pub(super) async fn deserted(&self) {
        loop {
            self.connection.heard.silence().await;
            if self.pool.has_other(self.place()) {
                return;
            }
            tokio::time::sleep(LOOK_AGAIN).await;
        }
    }

    /// Spares whom it leads to for a while: it has more to do than it can.
    pub(super) fn spare(&self) {
        self.place().spared_until_ms.store(self.pool.now_ms() + millis(SPARED), Ordering::Relaxed);
    }

    /// Leaves the connection out: it has not taken a call.
    pub(super) fn leave_out(&self) {
        self.connection.closed.store(true, Ordering::Release);
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.connection.under_way.fetch_sub(1, Ordering::SeqCst);
        if self.pool.waiting.load(Ordering::SeqCst) > 0 {
            self.pool.room.notify_one();
        }
    }
}

/// All connections of a channel.
pub(super) struct Pool {
    targets: Vec<Arc<Target>>,
    pub(super) tls: Option<ClientTls>,
    resolve: Resolver,
    made: Instant,
    /// The connections to each place that has any.
    open: ArcSwap<Vec<Vec<Arc<Connection>>>>,
    /// Told of every connection that opens and, while somebody waits, of every call that ends.
    room: Notify,
    /// Calls that wait. Who waits says so before it looks for room, and who makes room does so before it looks whether
    /// anybody waits: all in one order, so that one of the two sees the other.
    waiting: AtomicUsize,
    /// Whether there were calls since hosts were looked up.
    used: AtomicBool,
    /// Told of the first call since then.
    awake: Notify,
    /// Told when somebody may have moved.
    stale: Notify,
    known: AtomicUsize,
    /// Why there is no connection.
    why: Mutex<Option<String>>,
    pub(super) budget: Budget,
    pub(super) calls: AtomicU64,
    pub(super) retries: AtomicU64,
    pub(super) retries_refused: AtomicU64,
    dials_failed: AtomicU64,
}

impl Pool {
    pub(super) fn new(targets: Vec<Arc<Target>>, tls: Option<ClientTls>, resolve: Resolver) -> Self {
        Self {
            targets,
            tls,
            resolve,
            made: Instant::now(),
            open: ArcSwap::default(),
            room: Notify::new(),
            waiting: AtomicUsize::new(0),
            used: AtomicBool::new(false),
            awake: Notify::new(),
            stale: Notify::new(),
            known: AtomicUsize::new(0),
            why: Mutex::new(None),
            budget: Budget::new(),
            calls: AtomicU64::new(0),
            retries: AtomicU64::new(0),
            retries_refused: AtomicU64::new(0),
            dials_failed: AtomicU64::new(0),
        }
    }

    pub(super) fn stats(&self) -> ChannelStats {
        let open = self.open.load();
        let mut connected: Vec<_> = open.iter().flatten().filter(|it| !it.has_ended()).map(|it| it.place.at).collect();
        connected.sort_unstable();
        connected.dedup();
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        ChannelStats {
            calls: read(&self.calls),
            retries: read(&self.retries),
            retries_refused: read(&self.retries_refused),
            dials_failed: read(&self.dials_failed),
            connected: connected.len() as u64,
            known: self.known.load(Ordering::Relaxed) as u64,
            in_flight: open.iter().flatten().map(|it| it.under_way.load(Ordering::Relaxed) as u64).sum(),
        }
    }

    /// Why there is no connection, where there is none.
    pub(super) fn trouble(&self) -> Option<String> {
        self.why.lock().clone().filter(|_| self.open.load().iter().flatten().all(|connection| connection.has_ended()))
    }

    /// Notes that there is a call.
    pub(super) fn is_used(&self) {
        if !self.used.load(Ordering::Relaxed) && !self.used.swap(true, Ordering::Relaxed) {
            self.awake.notify_one();
        }
    }

    /// A place on a connection, elsewhere than at `avoided` if there is another. Waits a while for one.
    pub(super) async fn slot(self: &Arc<Self>, avoided: Option<&Arc<Place>>) -> Result<Slot, Error> {
        if let Some(slot) = self.pick(avoided) {
            return Ok(slot);
        }
        let until = Instant::now() + PATIENCE;
        let waiting = Waiting(&self.waiting);
        if waiting.0.fetch_add(1, Ordering::SeqCst) >= MAX_WAITING {
            return Err(self.no_room());
        }
        loop {
            let room = self.room.notified();
            let mut room = std::pin::pin!(room);
            // From here on nothing is missed.
            room.as_mut().enable();
            if let Some(slot) = self.pick(avoided) {
                return Ok(slot);
            }
            if timeout_at(until, room).await.is_err() {
                return Err(self.no_room());
            }
        }
    }

    fn no_room(&self) -> Error {
        let names = || self.targets.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let text = if self.open.load().iter().flatten().any(|connection| !connection.has_ended()) {
            format!("{}: all connections are full of calls", names())
        } else {
            let why = self.why.lock().clone();
            format!("{}: no connection ({})", names(), why.as_deref().unwrap_or("nothing has answered yet"))
        };
        Error::unavailable(text)
    }

    /// A place on a connection to the less busy of two places that chance names, or else to any that has room.
    fn pick(self: &Arc<Self>, avoided: Option<&Arc<Place>>) -> Option<Slot> {
        let open = self.open.load();
        let now_ms = self.now_ms();
        // Of the connections to a place the first that is not busy, so that those that were opened for a burst fall idle.
        let best = |those: &Vec<Arc<Connection>>| {
            let rank = |it: &Arc<Connection>| {
                let (is_left_out, under_way) = it.busy();
                let share = it.limit.load(Ordering::Relaxed) / 2;
                (is_left_out, if under_way < share { 0 } else { under_way })
            };
            those.iter().min_by_key(|it| rank(it)).cloned()
        };
        let busy = |those: &Vec<Arc<Connection>>| {
            let place = &those[0].place;
            let is_avoided = avoided.is_some_and(|avoided| Arc::ptr_eq(avoided, place));
            let is_spared = place.spared_until_ms.load(Ordering::Relaxed) > now_ms;
            let is_left_out = those.iter().all(|it| it.busy().0);
            let under_way: usize = those.iter().map(|it| it.under_way.load(Ordering::Relaxed)).sum();
            (is_left_out, is_avoided, is_spared, under_way)
        };
        let take = |connection: &Arc<Connection>| {
            connection.take().then(|| Slot { pool: Arc::clone(self), connection: Arc::clone(connection) })
        };
        let first = match open.len() {
            0 => return None,
            1 => &open[0],
            many => {
                let mut chance = rand::rng();
                let one = chance.random_range(0..many);
                let other = (one + chance.random_range(1..many)) % many;
                if busy(&open[one]) <= busy(&open[other]) { &open[one] } else { &open[other] }
            }
        };
        if let (false, false, false, _) = busy(first)
            && let Some(slot) = best(first).as_ref().and_then(take)
        {
            return Some(slot);
        }
        let mut others: Vec<_> = open.iter().map(|those| (busy(those), those)).collect();
        others.sort_unstable_by_key(|(busy, _)| *busy);
        let found = others.iter().find_map(|(_, those)| {
            let best = best(those).as_ref().and_then(take);
            best.or_else(|| those.iter().find_map(take))
        });
        if found.is_none() {
            for those in open.iter() {
                those[0].place.full.notify_one();
            }
        }
        found
    }

    /// Milliseconds since it was made.
    fn now_ms(&self) -> u64 {
        millis(self.made.elapsed())
    }

    /// Whether there is another place to ask than this one.
    pub(super) fn has_other(&self, place: &Arc<Place>) -> bool {
        let is_other = |it: &Arc<Connection>| !Arc::ptr_eq(&it.place, place) && !it.busy().0;
        self.open.load().iter().flatten().any(is_other)
    }

    fn add(&self, connection: &Arc<Connection>) {
        self.open.rcu(|open| {
            let mut open = Vec::clone(open);
            let at_its_place = |it: &&mut Vec<Arc<Connection>>| Arc::ptr_eq(&it[0].place, &connection.place);
            match open.iter_mut().find(at_its_place) {
                Some(those) => those.push(Arc::clone(connection)),
                None => open.push(vec![Arc::clone(connection)]),
            }
            open
        });
        *self.why.lock() = None;
        self.room.notify_waiters();
    }

    fn remove(&self, connection: &Arc<Connection>) {
        connection.closed.store(true, Ordering::Release);
        self.open.rcu(|open| {
            let others = |those: &Vec<Arc<Connection>>| {
                those.iter().filter(|it| !Arc::ptr_eq(it, connection)).cloned().collect::<Vec<_>>()
            };
            open.iter().map(others).filter(|those| !those.is_empty()).collect::<Vec<_>>()
        });
    }

    /// The addresses of a host, if it has any.
    async fn look_up(&self, target: &Target) -> Option<Vec<SocketAddr>> {
        let found = (self.resolve)(target.host().to_owned(), target.port());
        let found = tokio::time::timeout(LOOK_UP_TIMEOUT, found).await;
        let why = match found.unwrap_or_else(|_| Err(ErrorKind::TimedOut.into())) {
            Ok(mut found) if !found.is_empty() => {
                found.sort_unstable();
                found.dedup();
                found.truncate(MAX_ADDRESSES);
                return Some(found);
            }
            Ok(_) => "has no address".to_owned(),
            Err(error) => format!("cannot be looked up ({error})"),
        };
        tracing::debug!(%target, why, "the addresses that were known last are kept");
        self.why.lock().get_or_insert_with(|| format!("{} {why}", target.host()));
        None
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Leaves the queue.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Keeps connections to wherever the hosts are, until aborted.
pub(super) async fn keep(pool: Arc<Pool>) {
    // They end with this one.
    let mut tasks = JoinSet::new();
    let mut kept: HashMap<Address, AbortHandle> = HashMap::new();
    loop {
        pool.used.store(false, Ordering::Relaxed);
        // Each counts as soon as it is found: one name that is slow holds up no other.
        let mut looked_up: FuturesUnordered<_> = pool
            .targets
            .iter()
            .enumerate()
            .map(|(number, target)| pool.look_up(target).map(move |found| (number, target, found)))
            .collect();
        while let Some((number, target, found)) = looked_up.next().await {
            // The addresses that were known last stay.
            let Some(found) = found else { continue };
            kept.retain(|address, task| {
                let stays = address.target != number || found.contains(&address.at);
                if !stays {
                    tracing::info!(%target, address = %address.at, "an address is no longer one of that host");
                    task.abort();
                }
                stays
            });
            for at in found {
                kept.entry(Address { target: number, at }).or_insert_with(|| {
                    let place = Place {
                        target: Arc::clone(target),
                        at,
                        full: Notify::new(),
                        spared_until_ms: AtomicU64::new(0),
                    };
                    tasks.spawn(keep_place(Arc::clone(&pool), Arc::new(place)))
                });
            }
            pool.known.store(kept.len(), Ordering::Relaxed);
        }
        pool.known.store(kept.len(), Ordering::Relaxed);
        while tasks.try_join_next().is_some() {}
        tokio::time::sleep(LOOK_UP_PAUSE).await;
        tokio::select! {
            () = pool.stale.notified() => {}
            () = tokio::time::sleep(LOOK_UP_EVERY) => while !pool.used.load(Ordering::Relaxed) {
                pool.awake.notified().await;
            },
        }
    }
}

/// Keeps a connection to an address, and more while that is full of calls.
async fn keep_place(pool: Arc<Pool>, place: Arc<Place>) {
    let mut more = JoinSet::new();
    let first = keep_connected(&pool, &place);
    let mut first = std::pin::pin!(first);
    let mut grown = Instant::now();
    loop {
        tokio::select! {
            () = &mut first => {}
            () = place.full.notified() => {
                while more.try_join_next().is_some() {}
                // One after the other: a burst may have passed by then.
                if more.len() + 1 < MAX_CONNECTIONS && grown.elapsed() > FIRST_PAUSE {
                    grown = Instant::now();
                    let (pool, place) = (Arc::clone(&pool), Arc::clone(&place));
                    more.spawn(async move { connect(&pool, &place, true).await.map(drop) });
                }
            }
        }
    }
}

async fn keep_connected(pool: &Arc<Pool>, place: &Arc<Place>) {
    let mut pause = FIRST_PAUSE;
    let mut failing = false;
    loop {
        match connect(pool, place, false).await {
            Ok(lasted) => {
                if std::mem::take(&mut failing) {
                    tracing::info!(%place, "it answered again");
                }
                // Who was there may be elsewhere now.
                pool.stale.notify_one();
                if lasted > STEADY {
                    pause = FIRST_PAUSE;
                    continue;
                }
            }
            Err(why) => {
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%place, why, "it cannot be reached, and is tried again");
                }
            }
        }
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..1.0))).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Opens a connection and holds it until it has ended, or until nobody needs it where it is one more; tells how long that
/// was, or why there was none.
async fn connect(pool: &Arc<Pool>, place: &Arc<Place>, is_more: bool) -> Result<Duration, String> {
    let (connection, driver) = match dial(place, pool.tls.as_ref()).await {
        Ok(dialled) => dialled,
        Err(error) => {
            pool.dials_failed.fetch_add(1, Ordering::Relaxed);
            let why = words(&*error);
            *pool.why.lock() = Some(format!("{place}: {why}"));
            return Err(why);
        }
    };
    let since = Instant::now();
    let listed = Listed { pool, connection };
    pool.add(&listed.connection);
    let unneeded = async {
        if !is_more {
            return std::future::pending().await;
        }
        listed.connection.is_left().await;
        pool.remove(&listed.connection);
        // Whoever has picked it before finishes.
        listed.connection.is_empty().await;
    };
    let ended = tokio::select! {
        ended = driver => ended,
        () = unneeded => Ok(()),
    };
    if let Err(error) = ended {
        tracing::debug!(%place, why = words(&error), "a connection was cut off");
    }
    Ok(since.elapsed())
}

/// A connection that calls find, until this is dropped.
struct Listed<'a> {
    pool: &'a Arc<Pool>,
    connection: Arc<Connection>,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.pool.remove(&self.connection);
    }
}
