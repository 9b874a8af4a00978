//! The bell beside the feed of changes: heard across processes, silent where Redis is away, and harmless whatever it says.
//! Each test has a server of its own.

use std::{
    env,
    net::TcpListener,
    path::PathBuf,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use paperkey_kit::{
    changes::{
        Changes,
        bell::{Bell, LEAST, Rhythm},
        changes_since, latest_seq,
    },
    db::{Database, DatabaseOptions, DbError},
    secrets::{Keyring, Secret},
    shutdown::{self, ShutdownHandle},
    testing::TestDb,
};
use rand::RngExt as _;
use redis::aio::MultiplexedConnection;

/// How long anything may take that is waited for.
const PATIENCE: Duration = Duration::from_secs(20);
/// Who waits for that has heard nothing.
const NEVER: Duration = Duration::from_hours(1);

struct Server {
    child: Child,
    port: u16,
    folder: PathBuf,
}

/// Whether there is a redis-server; `CI=true` insists on it.
#[expect(clippy::print_stderr, reason = "who skips a test says so")]
fn redis_is_here() -> bool {
    let here = Command::new("redis-server").arg("--version").stdout(Stdio::null()).status().is_ok();
    if !here {
        assert!(env::var("CI").as_deref() != Ok("true"), "there is no redis-server: the bell is not tested");
        eprintln!("*** SKIPPED: there is no redis-server ***");
    }
    here
}

impl Server {
    async fn start() -> Self {
        for _ in 0..20 {
            let port = rand::rng().random_range(10_000..20_000);
            if TcpListener::bind(("127.0.0.1", port)).is_err() {
                continue;
            }
            let folder = env::temp_dir().join(format!("paperkey-bell-{}-{port}", std::process::id()));
            std::fs::create_dir(&folder).unwrap();
            let mut server = Self { child: spawn(port, &folder), port, folder };
            if server.answers().await {
                return server;
            }
        }
        panic!("redis-server does not start");
    }

    fn url(&self) -> Secret {
        Secret::new(format!("redis://127.0.0.1:{}", self.port))
    }

    async fn connection(&self) -> MultiplexedConnection {
        let client = redis::Client::open(self.url().expose()).unwrap();
        client.get_multiplexed_async_connection().await.unwrap()
    }

    async fn answers(&mut self) -> bool {
        let client = redis::Client::open(self.url().expose()).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if client.get_multiplexed_async_connection().await.is_ok() {
                return true;
            }
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        false
    }

    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    async fn restart(&mut self) {
        self.child = spawn(self.port, &self.folder);
        assert!(self.answers().await, "the server does not come back");
    }

    /// A process that rings and listens here.
    fn process(&self, keys: &Keyring) -> Process {
        let bell = Bell::new(&self.url(), keys).unwrap();
        let (handle, shutdown) = shutdown::channel();
        tokio::spawn(bell.clone().run(shutdown));
        Process { bell, _handle: handle }
    }

    /// The channels that somebody listens on.
    async fn channels(&self) -> Vec<String> {
        let mut connection = self.connection().await;
        redis::cmd("PUBSUB").arg("CHANNELS").query_async(&mut connection).await.unwrap()
    }

    /// Waits until so many channels are listened on.
    async fn listened(&self, count: usize) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let channels = self.channels().await;
            if channels.len() == count {
                return channels;
            }
            assert!(Instant::now() < deadline, "{channels:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

fn spawn(port: u16, folder: &std::path::Path) -> Child {
    Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .args(["--dir", &folder.to_string_lossy(), "--logfile", "redis.log"])
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

struct Process {
    bell: Bell,
    _handle: ShutdownHandle,
}

impl Process {
    /// The rhythm of somebody who asks by himself only when the tests are long over.
    fn deaf_but_for_the_bell(&self, feed: &str) -> Rhythm {
        Rhythm::every(NEVER).hastened_by(Some(&self.bell), feed)
    }
}

async fn within<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, work).await.expect("this is not waited for any longer")
}

/// Whether nothing is heard for a while.
async fn hears_nothing(rhythm: &mut Rhythm) -> bool {
    tokio::time::timeout(Duration::from_millis(200), rhythm.next()).await.is_err()
}

async fn database(bell: &Bell) -> (TestDb, Database) {
    let db = TestDb::sqlite();
    let options = DatabaseOptions { service: "auth", bell: Some(bell.clone()), ..db.options() };
    let database = Database::open(options).await.unwrap();
    database.migrate_up::<paperkey_migrations::kit::Migrator>().await.unwrap();
    (db, database)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_asked_for_as_soon_as_it_is_committed_and_by_whoever_follows_that_feed_alone() {
    if !redis_is_here() {
        return;
    }
    let server = Server::start().await;
    let (writer, follower) = (server.process(&Keyring::for_tests()), server.process(&Keyring::for_tests()));
    let stranger =
        server.process(&Keyring::from_base64(&Keyring::fresh(), &Keyring::fresh(), &Keyring::fresh()).unwrap());
    server.listened(4).await;
    let (_db, database) = database(&writer.bell).await;
    let known = latest_seq(&database).await.unwrap();
    let mut rhythm = follower.deaf_but_for_the_bell("auth");
    database
        .write(|tx| async move {
            tx.changed("key:1");
            Ok::<_, DbError>(())
        })
        .await
        .unwrap();
    within(rhythm.next()).await;
    let Changes::Page { subjects, .. } = changes_since(&database, known).await.unwrap() else { panic!("a gap") };
    assert_eq!(subjects, ["key:1"]);

    // Nobody else was told, and nobody is told of a commit that changes nothing for others, nor of one that fails.
    assert!(hears_nothing(&mut follower.deaf_but_for_the_bell("licensing")).await);
    assert!(hears_nothing(&mut stranger.deaf_but_for_the_bell("auth")).await);
    database.write(|_| async { Ok::<_, DbError>(()) }).await.unwrap();
    let failed = database.write(|tx| async move {
        tx.changed("key:2");
        Err::<(), _>(DbError::Internal("no".into()))
    });
    assert!(failed.await.is_err());
    assert!(hears_nothing(&mut rhythm).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_redis_sees_tells_nothing() {
    if !redis_is_here() {
        return;
    }
    let server = Server::start().await;
    let process = server.process(&Keyring::for_tests());
    let channels = server.listened(2).await;
    assert!(channels.iter().all(|channel| {
        let name = channel.strip_prefix("paperkey:changes:").unwrap();
        name.len() == 32 && name.bytes().all(|byte| byte.is_ascii_hexdigit())
    }));
    let mut words = redis::Client::open(server.url().expose()).unwrap().get_async_pubsub().await.unwrap();
    words.psubscribe("*").await.unwrap();
    process.bell.ring("auth");
    process.bell.ring("nothing that there is");
    let mut words = words.into_on_message();
    let word = within(futures_util::StreamExt::next(&mut words)).await.unwrap();
    assert!(word.get_payload_bytes().is_empty() && channels.contains(&word.get_channel_name().to_owned()));
    assert!(!format!("{:?}", process.bell).contains(&server.port.to_string()));
}

#[tokio::test(flavor = "multi_thread")]
async fn where_redis_is_away_everything_goes_on_and_is_heard_again_once_it_is_back() {
    if !redis_is_here() {
        return;
    }
    let mut server = Server::start().await;
    let (writer, follower) = (server.process(&Keyring::for_tests()), server.process(&Keyring::for_tests()));
    server.listened(2).await;
    let (_db, database) = database(&writer.bell).await;
    server.kill();
    let mut polled = Rhythm::every(Duration::from_millis(5)).hastened_by(Some(&follower.bell), "auth");
    for number in 0..50 {
        let change = database.write(move |tx| async move {
            tx.changed(format!("key:{number}"));
            Ok::<_, DbError>(())
        });
        within(change).await.unwrap();
        within(polled.next()).await;
    }
    server.restart().await;
    server.listened(2).await;
    let mut rhythm = follower.deaf_but_for_the_bell("auth");
    let again = async {
        // Who rings may be back a moment after who listens.
        loop {
            writer.bell.ring("auth");
            if tokio::time::timeout(Duration::from_millis(100), rhythm.next()).await.is_ok() {
                return;
            }
        }
    };
    within(again).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_nonsense_does_not_make_anybody_ask_more_often_than_is_allowed() {
    if !redis_is_here() {
        return;
    }
    let server = Server::start().await;
    let process = server.process(&Keyring::for_tests());
    let channels = server.listened(2).await;
    let mut rhythm = process.deaf_but_for_the_bell("auth");
    let mut connection = server.connection().await;
    let flood = tokio::spawn(async move {
        for round in 0..40_u8 {
            let mut words = redis::pipe();
            for channel in &channels {
                for length in 0..250 {
                    words.publish(channel, vec![round; length]).ignore();
                }
            }
            words.exec_async(&mut connection).await.unwrap();
        }
    });
    let began = Instant::now();
    let mut asked = 0;
    while !flood.is_finished() {
        asked += u128::from(tokio::time::timeout(Duration::from_millis(50), rhythm.next()).await.is_ok());
    }
    flood.await.unwrap();
    let most = began.elapsed().as_millis() / LEAST.as_millis() + 1;
    assert!(asked > 0 && asked <= most, "asked {asked} times where {most} are allowed");
}

#[tokio::test]
async fn an_address_that_is_none_is_refused_without_being_told() {
    let refused = Bell::new(&Secret::new("redis://user:hunter2@nowhere:port"), &Keyring::for_tests()).unwrap_err();
    assert!(!format!("{refused} {refused:?}").contains("hunter2"));
}
