//! What is said to the store, and how.
//!
//! On one server a call is judged by one script over all of its windows. On a cluster the windows of a call live on
//! different servers: first all are looked at, so that a call that will be refused is entered nowhere; then it is entered
//! into one after the other, in the order of subjects, and taken out again where one has filled up in between.
//!
//! Deliberately absent: deadlines and what follows from a failure, which are the limiter's.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use arrayvec::ArrayVec;
use futures_util::{
    future::{join_all, try_join_all},
    stream::{self, StreamExt as _, TryStreamExt as _},
};
use parking_lot::Mutex;
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, ErrorKind, FromRedisValue,
    IntoConnectionInfo as _, RedisError, Script, ServerErrorKind, Value,
    aio::MultiplexedConnection,
    cluster::ClusterClientBuilder,
    cluster_async::ClusterConnection,
    cluster_routing::{MultipleNodeRoutingInfo, ResponsePolicy, RoutingInfo},
    io::tcp::TcpSettings,
};

use super::{members::Crowd, shadow::Running};
use crate::{
    limits::{Claim, MAX_CLAIMS, Subject},
    secrets::Secret,
};

/// Where gateways are counted.
const GATEWAYS: &str = "paperkey:gateways";
/// How long a gateway counts that is not heard of.
const GATEWAY_MEMORY: Duration = Duration::from_secs(5);
/// Entries of one upload at most: about a millisecond of the store's time.
const UPLOADED_AT_ONCE: usize = 500;
/// Uploads under way at most: calls are judged between them.
const UPLOADS_UNDER_WAY: usize = 4;
/// How long the client's own tasks wait for anything. Every question has a shorter deadline.
const CLIENT_TIMEOUT: Duration = Duration::from_millis(500);
/// Questions that may wait for the task that sends them.
const BUFFERED: usize = 256;
/// Other nodes of a cluster that are remembered, for when the configured one is gone.
const MAX_NODES: usize = 32;

/// The name of an entry: a gateway, and one of its calls.
pub(super) type Entry = [u8; 16];

/// Where a subject stands in the store.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Place {
    /// Calls that count.
    pub count: u32,
    /// Microseconds until the oldest one leaves.
    pub resets_in: u64,
    /// Microseconds until there is room; 0 where there is.
    pub wait: u64,
    /// When that was judged, by the store's clock.
    pub at: u64,
}

/// What the store says of a call.
#[derive(Clone, Debug)]
pub(super) struct Judged {
    /// The first claim for which there was no room.
    pub refused_by: Option<usize>,
    /// In the order of claims.
    pub places: ArrayVec<Place, MAX_CLAIMS>,
}

/// The store did not answer, or not as it should. Names neither the address nor what was asked.
#[derive(Clone, Debug)]
pub(super) struct Fault {
    /// What happened, in words for the log.
    pub what: String,
    /// Trying again is no use: the address is not one.
    pub hopeless: bool,
}

impl Fault {
    pub(super) fn timed_out() -> Self {
        Self { what: "no answer in time".to_owned(), hopeless: false }
    }
}

impl From<RedisError> for Fault {
    fn from(error: RedisError) -> Self {
        let what = match error.kind() {
            ErrorKind::AuthenticationFailed => "user or password refused".to_owned(),
            ErrorKind::Server(ServerErrorKind::NoPerm) => {
                "the user lacks a permission that the scripts need".to_owned()
            }
            _ => match error.code() {
                Some("NOAUTH" | "WRONGPASS") => "user or password refused".to_owned(),
                Some(code) => format!("the store says {code}"),
                None => error.category().to_owned(),
            },
        };
        Self { what, hopeless: error.kind() == ErrorKind::InvalidClientConfig }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

/// A script, and the name by which a store knows it that has seen it.
struct Lua {
    text: &'static str,
    hash: String,
}

impl Lua {
    fn new(text: &'static str) -> Self {
        Self { text, hash: Script::new(text).get_hash().to_owned() }
    }
}

struct Scripts {
    judge: Lua,
    upload: Lua,
    beat: Lua,
}

/// Dials the store.
pub(super) struct Dialer {
    at: ConnectionInfo,
    scripts: Arc<Scripts>,
    /// Nodes of the cluster that were seen, beside the one that is configured.
    nodes: Mutex<Vec<ConnectionAddr>>,
    /// Which of the addresses is tried first: another one after each failure.
    turn: AtomicUsize,
}

impl Dialer {
    pub(super) fn new(url: &Secret) -> Result<Self, Fault> {
        let at = url.expose().into_connection_info()?;
        Ok(Self {
            at: at.set_tcp_settings(TcpSettings::default().set_nodelay(true)),
            scripts: Arc::new(Scripts {
                judge: Lua::new(include_str!("judge.lua")),
                upload: Lua::new(include_str!("upload.lua")),
                beat: Lua::new(include_str!("beat.lua")),
            }),
            nodes: Mutex::default(),
            turn: AtomicUsize::new(0),
        })
    }

    /// A new connection, to one server or to a cluster, whichever it is.
    pub(super) async fn dial(&self) -> Result<Link, Fault> {
        let addresses = self.addresses();
        // Moved on beforehand: the caller may lose patience with a node that does not answer at all.
        let turn = self.turn.fetch_add(1, Ordering::Relaxed) % addresses.len();
        let link = self.dial_at(self.at.clone().set_addr(addresses[turn].clone())).await?;
        self.turn.store(turn, Ordering::Relaxed);
        Ok(link)
    }

    /// The configured address first.
    fn addresses(&self) -> Vec<ConnectionAddr> {
        let known = self.nodes.lock();
        let others = known.iter().filter(|addr| *addr != self.at.addr()).cloned();
        std::iter::once(self.at.addr().clone()).chain(others).collect()
    }

    async fn dial_at(&self, info: ConnectionInfo) -> Result<Link, Fault> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CLIENT_TIMEOUT))
            .set_response_timeout(Some(CLIENT_TIMEOUT))
            .set_pipeline_buffer_size(BUFFERED);
        let mut one = Client::open(info)?.get_multiplexed_async_connection_with_config(&config).await?;
        let slots = redis::cmd("CLUSTER").arg("SLOTS").query_async::<Value>(&mut one).await;
        let conn = match slots {
            Ok(slots) => {
                self.remember(&slots);
                let nodes = self.addresses().into_iter().map(|addr| self.at.clone().set_addr(addr));
                // A command is sent again where it was sent to the wrong node; what else fails is the limiter's to judge.
                let client = ClusterClientBuilder::new(nodes)
                    .retries(2)
                    .min_retry_wait(2)
                    .max_retry_wait(10)
                    .connection_timeout(CLIENT_TIMEOUT)
                    .response_timeout(CLIENT_TIMEOUT)
                    .tcp_settings(TcpSettings::default().set_nodelay(true))
                    .build()?;
                Conn::Cluster(client.get_async_connection().await?)
            }
            // A server that is no part of a cluster says so by an error.
            Err(error) if matches!(error.kind(), ErrorKind::Server(_) | ErrorKind::Extension) => Conn::One(one),
            Err(error) => return Err(error.into()),
        };
        let mut link = Link { conn, scripts: Arc::clone(&self.scripts), identity: None };
        link.identity = link.find_identity().await;
        Ok(link)
    }

    /// The nodes of an answer to CLUSTER SLOTS: ranges, each with its nodes, each with its host and port.
    fn remember(&self, slots: &Value) {
        let Value::Array(ranges) = slots else { return };
        let mut known = self.nodes.lock();
        for range in ranges {
            let Value::Array(parts) = range else { continue };
            for node in parts.iter().skip(2) {
                let Value::Array(node) = node else { continue };
                let [host, port, ..] = node.as_slice() else { continue };
                let (Ok(host), Ok(port)) = (String::from_redis_value_ref(host), u16::from_redis_value_ref(port)) else {
                    continue;
                };
                let addr = match self.at.addr() {
                    ConnectionAddr::TcpTls { insecure, tls_params, .. } => {
                        ConnectionAddr::TcpTls { host, port, insecure: *insecure, tls_params: tls_params.clone() }
                    }
                    _ => ConnectionAddr::Tcp(host, port),
                };
                let named = match &addr {
                    ConnectionAddr::Tcp(host, _) | ConnectionAddr::TcpTls { host, .. } => !host.is_empty(),
                    _ => false,
                };
                if named && !known.contains(&addr) {
                    if known.len() >= MAX_NODES {
                        known.remove(0);
                    }
                    known.push(addr);
                }
            }
        }
    }
}

/// A connection.
#[derive(Clone)]
pub(super) struct Link {
    conn: Conn,
    scripts: Arc<Scripts>,
    identity: Option<Arc<str>>,
}

#[derive(Clone)]
enum Conn {
    One(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Link {
    /// Which processes the store consists of: the same as long as none was restarted or replaced. Nothing where nobody may
    /// know.
    pub(super) fn identity(&self) -> Option<&Arc<str>> {
        self.identity.as_ref()
    }

    /// Judges a call, and enters it where it has a place everywhere. What may have been entered and then been left there
    /// by a failure is the caller's to take out.
    pub(super) async fn judge(&self, claims: &[Claim], entry: &Entry) -> Result<Judged, Fault> {
        match &self.conn {
            Conn::One(_) => self.run_judge(claims.iter(), claims.len(), Some(entry)).await,
            Conn::Cluster(_) if claims.len() == 1 => self.run_judge(claims.iter(), 1, Some(entry)).await,
            Conn::Cluster(_) => self.judge_apart(claims, entry).await,
        }
    }

    /// Judges without entering anything.
    pub(super) async fn look(&self, claims: &[Claim]) -> Result<Judged, Fault> {
        let looks = claims.iter().map(|claim| self.run_judge(std::iter::once(claim), 1, None));
        let looks = try_join_all(looks).await?;
        let refused_by = looks.iter().position(|look| look.refused_by.is_some());
        Ok(Judged { refused_by, places: looks.into_iter().flat_map(|look| look.places).collect() })
    }

    async fn judge_apart(&self, claims: &[Claim], entry: &Entry) -> Result<Judged, Fault> {
        let mut judged = self.look(claims).await?;
        if judged.refused_by.is_some() {
            return Ok(judged);
        }
        let mut order: ArrayVec<usize, MAX_CLAIMS> = (0..claims.len()).collect();
        order.sort_unstable_by_key(|index| claims[*index].subject);
        for (done, index) in order.iter().enumerate() {
            let one = self.run_judge(std::iter::once(&claims[*index]), 1, Some(entry)).await?;
            judged.places[*index] = one.places.first().copied().unwrap_or_default();
            if one.refused_by.is_some() {
                judged.refused_by = Some(*index);
                let entered = &order[..done];
                self.remove(entered.iter().map(|entered| (claims[*entered].subject, *entry))).await?;
                for entered in entered {
                    judged.places[*entered].count = judged.places[*entered].count.saturating_sub(1);
                }
                break;
            }
        }
        Ok(judged)
    }

    async fn run_judge<'a>(
        &self,
        claims: impl Iterator<Item = &'a Claim> + Clone,
        keys: usize,
        entry: Option<&Entry>,
    ) -> Result<Judged, Fault> {
        let answer: Vec<i64> = self
            .run(&self.scripts.judge, |cmd| {
                cmd.arg(keys);
                for claim in claims.clone() {
                    cmd.arg(key(claim.subject));
                }
                cmd.arg(entry.map_or(&[][..], |entry| &entry[..]));
                for claim in claims.clone() {
                    cmd.arg(claim.requests).arg(micros(claim.window));
                }
            })
            .await?;
        let number = |value: i64| u64::try_from(value).unwrap_or(0);
        let (refused_by, places) = answer.split_first().ok_or_else(|| strange("an answer without a verdict"))?;
        let places: ArrayVec<Place, MAX_CLAIMS> = places
            .as_chunks::<4>()
            .0
            .iter()
            .take(MAX_CLAIMS)
            .map(|[count, resets_in, wait, at]| Place {
                count: u32::try_from(*count).unwrap_or(u32::MAX),
                resets_in: number(*resets_in),
                wait: number(*wait),
                at: number(*at),
            })
            .collect();
        if places.len() != keys {
            return Err(strange("an answer of another length"));
        }
        Ok(Judged { refused_by: usize::try_from(*refused_by).ok().and_then(|index| index.checked_sub(1)), places })
    }

    /// Takes entries out.
    pub(super) async fn remove(&self, entries: impl IntoIterator<Item = (Subject, Entry)>) -> Result<(), Fault> {
        let removals = entries.into_iter().map(async |(subject, entry)| {
            self.query::<u32>(redis::cmd("ZREM").arg(key(subject)).arg(&entry[..])).await.map(|_| ())
        });
        // All of them, whatever becomes of one.
        join_all(removals).await.into_iter().collect::<Result<(), RedisError>>()?;
        Ok(())
    }

    /// Enters calls that were let through without the store. `age` tells how long ago a call was, when it is about to be
    /// sent, and `name` its entry.
    pub(super) async fn upload(
        &self,
        running: impl Iterator<Item = Running> + Send,
        age: impl Fn(u64) -> u64 + Sync,
        name: impl Fn(u64) -> Entry + Sync,
        timeout: Duration,
    ) -> Result<(), Fault> {
        let together = matches!(self.conn, Conn::One(_));
        let (age, name) = (&age, &name);
        stream::iter(batches(running, together))
            .map(|batch| async move {
                let sent = self.run::<()>(&self.scripts.upload, |cmd| {
                    cmd.arg(batch.len());
                    for window in &batch {
                        cmd.arg(key(window.subject));
                    }
                    for window in &batch {
                        cmd.arg(window.window_us).arg(window.calls.len());
                        for call in &window.calls {
                            cmd.arg(age(*call)).arg(&name(*call)[..]);
                        }
                    }
                });
                tokio::time::timeout(timeout, sent).await.unwrap_or_else(|_| Err(Fault::timed_out()))
            })
            .buffer_unordered(UPLOADS_UNDER_WAY)
            .try_collect()
            .await
    }

    /// Says that this gateway is there, and learns who else is.
    pub(super) async fn beat(&self, gateway: &str) -> Result<Crowd, Fault> {
        let (gateways, rank): (u32, u32) = self
            .run(&self.scripts.beat, |cmd| {
                cmd.arg(1).arg(GATEWAYS).arg(gateway).arg(micros(GATEWAY_MEMORY));
            })
            .await?;
        // To one server there is one connection, which ends with it. The client renews those to the nodes of a cluster by
        // itself, and does not say that one was restarted and has forgotten everything.
        if matches!(self.conn, Conn::Cluster(_))
            && self.identity.is_some()
            && self.find_identity().await != self.identity
        {
            return Err(strange("a node was restarted or replaced"));
        }
        Ok(Crowd { gateways, rank: Some(rank) })
    }

    /// Whether everything answers that calls may need.
    pub(super) async fn probe(&self) -> Result<(), Fault> {
        if let Conn::Cluster(conn) = &self.conn {
            let everywhere =
                RoutingInfo::MultiNode((MultipleNodeRoutingInfo::AllMasters, Some(ResponsePolicy::AllSucceeded)));
            conn.clone().route_command(redis::cmd("PING"), everywhere).await?.extract_error()?;
        }
        let nobody = Claim {
            subject: Subject([0; 16]),
            class: "",
            requests: 1,
            window: Duration::from_millis(1),
            on_store_failure: crate::limits::OnStoreFailure::Open,
        };
        self.look(&[nobody]).await.map(|_| ())
    }

    async fn find_identity(&self) -> Option<Arc<str>> {
        let mut info = redis::cmd("INFO");
        info.arg("server");
        let answer = match &self.conn {
            Conn::One(conn) => info.query_async::<Value>(&mut conn.clone()).await,
            Conn::Cluster(conn) => {
                let everywhere = RoutingInfo::MultiNode((MultipleNodeRoutingInfo::AllMasters, None));
                conn.clone().route_command(info, everywhere).await
            }
        };
        let mut texts = Vec::new();
        gather(answer.ok()?, &mut texts);
        let mut found: Vec<&str> = texts.iter().flat_map(|text| text.lines()).filter_map(run_id).collect();
        found.sort_unstable();
        Some(found.join(" ").into()).filter(|_| !found.is_empty())
    }

    async fn run<T: FromRedisValue>(&self, script: &Lua, arguments: impl Fn(&mut Cmd)) -> Result<T, Fault> {
        let mut cmd = redis::cmd("EVALSHA");
        cmd.arg(&script.hash);
        arguments(&mut cmd);
        match self.query(&cmd).await {
            // The store was restarted, or is a node that has never seen it: the text makes it known.
            Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                let mut cmd = redis::cmd("EVAL");
                cmd.arg(script.text);
                arguments(&mut cmd);
                Ok(self.query(&cmd).await?)
            }
            answer => Ok(answer?),
        }
    }

    async fn query<T: FromRedisValue>(&self, cmd: &Cmd) -> Result<T, RedisError> {
        match &self.conn {
            Conn::One(conn) => cmd.query_async(&mut conn.clone()).await,
            Conn::Cluster(conn) => cmd.query_async(&mut conn.clone()).await,
        }
    }
}

/// Windows, so many that their calls fit into one upload; on a cluster one at a time. Long ones come in pieces.
fn batches(running: impl Iterator<Item = Running>, together: bool) -> impl Iterator<Item = Vec<Running>> {
    let mut pieces = running.flat_map(|window| {
        let Running { subject, window_us, calls } = window;
        let pieces: Vec<Running> =
            calls.chunks(UPLOADED_AT_ONCE).map(|calls| Running { subject, window_us, calls: calls.to_vec() }).collect();
        pieces
    });
    let mut next = None;
    std::iter::from_fn(move || {
        let mut batch: Vec<Running> = Vec::new();
        let mut room = UPLOADED_AT_ONCE;
        while let Some(piece) = next.take().or_else(|| pieces.next()) {
            if !batch.is_empty() && (!together || piece.calls.len() > room) {
                next = Some(piece);
                break;
            }
            room = room.saturating_sub(piece.calls.len());
            batch.push(piece);
        }
        Some(batch).filter(|batch| !batch.is_empty())
    })
}

fn key(subject: Subject) -> String {
    format!("paperkey:limit:{{{:032x}}}", u128::from_be_bytes(subject.0))
}

/// Whole microseconds; a window is never taken to be shorter than it is.
pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos().div_ceil(1_000)).unwrap_or(u64::MAX)
}

fn strange(what: &str) -> Fault {
    Fault { what: what.to_owned(), hopeless: false }
}

fn run_id(line: &str) -> Option<&str> {
    line.strip_prefix("run_id:").map(str::trim)
}

/// All texts of an answer, which for several nodes is nested.
fn gather(answer: Value, texts: &mut Vec<String>) {
    match answer {
        Value::Array(parts) => parts.into_iter().for_each(|part| gather(part, texts)),
        Value::Map(parts) => parts.into_iter().for_each(|(_, part)| gather(part, texts)),
        text => texts.extend(String::from_redis_value(text)),
    }
}
