//! The bell: who has committed a change says so on Redis, and who follows the feed asks at once.
//!
//! It says that there may be news, and nothing of what: whoever hears it asks the feed, as it does without having heard
//! anything. So nothing depends on the bell. A word that is lost, a Redis that is away, and one that says nothing or
//! whatever it likes change how soon the feed is asked, never what is believed; and for its sake it is asked no more often
//! than every [`LEAST`], whoever rings. No call and no commit waits for it: there is one word on its way at most, and one after it.
//!
//! On a cluster any node passes a word on to all others, so the one that is configured is enough.
//!
//! Deliberately absent: a queue, and a repetition of what was not sent. The next look at the feed is close.

use std::{collections::BTreeMap, fmt, future::Future, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, StreamExt as _};
use rand::RngExt as _;
use redis::{
    AsyncConnectionConfig, Client, IntoConnectionInfo as _, RedisError,
    aio::{MultiplexedConnection, PubSub},
    io::tcp::TcpSettings,
};
use tokio::{sync::Notify, time::Instant};

use crate::{
    secrets::{Keyring, Secret},
    shutdown::Shutdown,
};

/// The least time between two looks at a feed for which the bell is the reason.
pub const LEAST: Duration = Duration::from_millis(100);
/// The least time between a look for any reason and one for which the bell is.
const BREATH: Duration = Duration::from_millis(10);
/// The feeds that there are: each is called as the service that writes it.
const FEEDS: [&str; 2] = ["auth", "licensing"];
/// How long anything that Redis is asked may take.
const PATIENCE: Duration = Duration::from_millis(500);
/// Whether Redis is still there is asked so often, where nothing else is heard of it.
const PING: Duration = Duration::from_secs(2);
/// How long nothing is tried after the first failure, and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The bell of an installation. Cloning it gives another handle to the same one.
#[derive(Clone)]
pub struct Bell(Arc<Inner>);

struct Inner {
    client: Client,
    feeds: BTreeMap<&'static str, Feed>,
    /// Something was changed here.
    rung: Notify,
}

struct Feed {
    /// What the feed is called in Redis. It tells nobody which feed that is, nor of whose installation.
    channel: String,
    /// Something was changed here, and nobody was told yet.
    rung: Arc<Notify>,
    /// Somebody has changed something.
    heard: Arc<Notify>,
}

impl fmt::Debug for Bell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bell").finish_non_exhaustive()
    }
}

/// Why an address is none.
#[derive(Debug, thiserror::Error)]
#[error("redis.url is no address of a Redis server")]
pub struct BadAddress;

impl Bell {
    /// A bell at that address. Nothing is dialled before [`Self::run`].
    pub fn new(url: &Secret, keys: &Keyring) -> Result<Self, BadAddress> {
        // An error of the client's may tell the address, which may hold a password.
        let at = url.expose().into_connection_info().map_err(|_| BadAddress)?;
        let at = at.set_tcp_settings(TcpSettings::default().set_nodelay(true));
        let client = Client::open(at).map_err(|_| BadAddress)?;
        let hasher = keys.hasher("feeds of changes");
        let feeds = FEEDS.map(|feed| {
            let name = hasher.hash(feed.as_bytes());
            let name = name[..16].iter().fold(String::from("paperkey:changes:"), |mut name, byte| {
                for digit in [byte >> 4, byte & 15] {
                    name.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
                }
                name
            });
            (feed, Feed { channel: name, rung: Arc::default(), heard: Arc::default() })
        });
        Ok(Self(Arc::new(Inner { client, feeds: BTreeMap::from(feeds), rung: Notify::new() })))
    }

    /// Says that a feed has news. Costs nothing, and waits for nobody.
    pub fn ring(&self, feed: &str) {
        if let Some(feed) = self.0.feeds.get(feed) {
            feed.rung.notify_one();
            self.0.rung.notify_one();
        }
    }

    /// Fires when somebody says that a feed has news.
    fn heard(&self, feed: &str) -> Option<Arc<Notify>> {
        self.0.feeds.get(feed).map(|feed| Arc::clone(&feed.heard))
    }

    /// Rings and listens until shut down.
    pub async fn run(self, mut shutdown: Shutdown) {
        let mut pause = FIRST_PAUSE;
        let mut is_away = false;
        while !shutdown.has_come() {
            let began = Instant::now();
            tokio::select! {
                () = shutdown.wait() => return,
                error = self.serve(&mut is_away) => {
                    if !is_away {
                        is_away = true;
                        tracing::warn!(%error, "the bell of the feeds of changes is away; they are asked as often as without it");
                    }
                }
            }
            // What has worked for a while is tried again soon.
            if began.elapsed() > LONGEST_PAUSE {
                pause = FIRST_PAUSE;
            }
            let chance = rand::rng().random_range(0.5..1.0);
            tokio::select! {
                () = shutdown.wait() => return,
                () = tokio::time::sleep(pause.mul_f64(chance)) => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Rings and listens until Redis fails.
    async fn serve(&self, is_away: &mut bool) -> Away {
        match self.dial().await {
            Ok((ringing, listening)) => {
                if std::mem::take(is_away) {
                    tracing::info!("the bell of the feeds of changes is back");
                }
                tokio::select! {
                    away = self.ring_on(ringing) => away,
                    away = self.listen(listening) => away,
                }
            }
            Err(away) => away,
        }
    }

    async fn dial(&self) -> Result<(MultiplexedConnection, PubSub), Away> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(PATIENCE))
            .set_response_timeout(Some(PATIENCE))
            .set_pipeline_buffer_size(FEEDS.len());
        let ringing = soon(self.0.client.get_multiplexed_async_connection_with_config(&config)).await?;
        let mut listening = soon(self.0.client.get_async_pubsub()).await?;
        for feed in self.0.feeds.values() {
            soon(listening.subscribe(&feed.channel)).await?;
        }
        Ok((ringing, listening))
    }

    async fn ring_on(&self, mut connection: MultiplexedConnection) -> Away {
        loop {
            self.0.rung.notified().await;
            for feed in self.0.feeds.values() {
                if !is_fired(&feed.rung) {
                    continue;
                }
                let mut word = redis::cmd("PUBLISH");
                word.arg(&feed.channel).arg("");
                if let Err(away) = soon(word.exec_async(&mut connection)).await {
                    return away;
                }
            }
            // What is rung meanwhile is one word more.
            tokio::time::sleep(BREATH).await;
        }
    }

    async fn listen(&self, connection: PubSub) -> Away {
        let (mut sink, mut words) = connection.split();
        let mut pinged = Instant::now();
        loop {
            tokio::select! {
                word = words.next() => {
                    let Some(word) = word else { return Away("the connection has ended".to_owned()) };
                    // What it says is not looked at: it may be anything.
                    let name = word.get_channel_name();
                    if let Some(feed) = self.0.feeds.values().find(|feed| feed.channel == name) {
                        feed.heard.notify_one();
                    }
                }
                () = tokio::time::sleep_until(pinged + PING) => {
                    // Who is cut off without a word would be listened to for ever.
                    pinged = Instant::now();
                    if let Err(away) = soon(sink.ping::<redis::Value>()).await {
                        return away;
                    }
                }
            }
        }
    }
}

/// Why Redis is not there, in words that tell neither where it is nor what was said.
#[derive(Debug)]
struct Away(String);

impl fmt::Display for Away {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

async fn soon<T>(work: impl Future<Output = Result<T, RedisError>>) -> Result<T, Away> {
    match tokio::time::timeout(PATIENCE, work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(Away(error.code().unwrap_or_else(|| error.category()).to_owned())),
        Err(_) => Err(Away("no answer in time".to_owned())),
    }
}

/// Whether something was notified, which it is not any more afterwards.
fn is_fired(notify: &Notify) -> bool {
    notify.notified().now_or_never().is_some()
}

/// When a feed is asked next: so long after the last time, or as soon as the bell rings for it.
#[derive(Debug)]
pub struct Rhythm {
    interval: Duration,
    heard: Option<Arc<Notify>>,
    last: Instant,
    /// When the bell counts again.
    counts_from: Instant,
}

impl Rhythm {
    /// Every so often, and not sooner.
    pub fn every(interval: Duration) -> Self {
        let now = Instant::now();
        Self { interval, heard: None, last: now, counts_from: now }
    }

    /// Sooner where that bell rings for that feed.
    #[must_use]
    pub fn hastened_by(self, bell: Option<&Bell>, feed: &str) -> Self {
        Self { heard: bell.and_then(|bell| bell.heard(feed)), ..self }
    }

    /// Waits until it is time. Whoever is interrupted while waiting misses nothing.
    pub async fn next(&mut self) {
        let interval = tokio::time::sleep(self.interval);
        match &self.heard {
            None => interval.await,
            Some(heard) => {
                // What is heard meanwhile is one word more, which is heard next.
                let counts_from = self.counts_from.max(self.last + BREATH);
                let rung = async {
                    tokio::time::sleep_until(counts_from).await;
                    heard.notified().await;
                };
                tokio::select! {
                    () = rung => self.counts_from = Instant::now() + LEAST,
                    () = interval => {}
                }
            }
        }
        self.last = Instant::now();
    }
}
