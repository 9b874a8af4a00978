use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    time::{Duration, Instant},
};

use paperkey_proto::auth::v1::{
    AuditCall, RecordAuditResponse,
    audit_intake_service_server::{AuditIntakeService, AuditIntakeServiceServer},
};
use tempfile::TempDir;
use tonic::{Request, Response, Status};

use super::*;
use crate::{
    channel::Channel,
    db::{AuditEntry, Database, DbError},
    policy::Guarded,
    principal::Signer,
    secrets::Keyring,
    service::Rpcs,
    shutdown::{self, ShutdownHandle},
    store_suite,
};

/// What auth has taken over, and how it behaves.
#[derive(Clone, Default)]
struct Auth(Arc<Mutex<Taken>>);

#[derive(Default)]
struct Taken {
    /// In the order in which they came first.
    batches: Vec<(String, Vec<AuditRecord>)>,
    calls: usize,
    is_away: bool,
    /// Takes over, and its answers are lost.
    loses_answers: bool,
}

#[tonic::async_trait]
impl AuditIntakeService for Auth {
    async fn record_audit(
        &self,
        request: Request<RecordAuditRequest>,
    ) -> Result<Response<RecordAuditResponse>, Status> {
        let RecordAuditRequest { batch_id, records } = request.into_inner();
        let mut taken = self.0.lock();
        taken.calls += 1;
        if taken.is_away {
            return Err(Error::unavailable("away").into());
        }
        match taken.batches.iter().find(|(id, _)| *id == batch_id) {
            Some((_, before)) => assert_eq!(*before, records, "the same batch holds the same"),
            None => taken.batches.push((batch_id, records)),
        }
        if taken.loses_answers {
            return Err(Error::unavailable("the answer is lost").into());
        }
        Ok(Response::new(RecordAuditResponse {}))
    }
}

impl Auth {
    fn channel(&self) -> (Channel, Signer) {
        let signer = Signer::new(&Keyring::for_tests(), Clock::system());
        let channel = Channel::local();
        let rpcs = Rpcs::new(AuditIntakeServiceServer::new(self.clone()));
        channel.bind(Guarded::new(rpcs, signer.clone(), Clock::system(), None, None));
        (channel, signer)
    }

    fn sink(&self, folder: &Path, max_bytes: u64) -> Arc<AuditSink> {
        let (channel, signer) = self.channel();
        let client = AuditIntakeServiceClient::new(channel.as_service("gateway", signer, None));
        AuditSink::new(client, folder, max_bytes, Clock::system()).unwrap()
    }

    fn is_away(&self, is_away: bool) {
        self.0.lock().is_away = is_away;
    }

    fn batch_ids(&self) -> Vec<String> {
        self.0.lock().batches.iter().map(|(id, _)| id.clone()).collect()
    }

    /// The requests whose records came, in their order.
    fn requests(&self) -> Vec<String> {
        self.0.lock().batches.iter().flat_map(|(_, records)| records).map(|record| record.request_id.clone()).collect()
    }
}

fn record(number: usize) -> AuditRecord {
    let call = AuditCall { path: "/v1/keys".into(), status: 200, ..Default::default() };
    AuditRecord { request_id: number.to_string(), call: Some(call), ..Default::default() }
}

fn numbers(range: std::ops::Range<usize>) -> Vec<String> {
    range.map(|number| number.to_string()).collect()
}

async fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn running(sink: &Arc<AuditSink>) -> (ShutdownHandle, tokio::task::JoinHandle<()>) {
    let (handle, shutdown) = shutdown::channel();
    (handle, tokio::spawn(Arc::clone(sink).run(shutdown)))
}

/// Every file below, by its path.
fn files(folder: &Path) -> BTreeMap<String, u64> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "spool") {
                found.insert(path.display().to_string(), fs::metadata(&path).unwrap().len());
            }
        }
    }
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_recorded_is_handed_over_in_its_order() {
    let (auth, folder) = (Auth::default(), TempDir::new().unwrap());
    let sink = auth.sink(folder.path(), 1 << 20);
    let _running = running(&sink);
    for number in 0..3_000 {
        sink.record(record(number));
    }
    eventually("all is handed over", || auth.requests().len() == 3_000).await;
    assert_eq!(auth.requests(), numbers(0..3_000));
    assert!(auth.0.lock().batches.iter().all(|(_, records)| records.len() <= MAX_BATCH));
    eventually("nothing is kept", || sink.counts().spooled_bytes == 0).await;
    let counts = sink.counts();
    assert_eq!((counts.recorded, counts.handed_over, counts.lost, counts.waiting), (3_000, 3_000, 0, 0));
    sink.record(record(3_000));
    eventually("and so is what comes later", || auth.requests().len() == 3_001).await;
    eventually("and of that nothing is kept", || files(folder.path()).values().all(|length| *length == 0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_auth_does_not_take_is_on_disk_and_sent_by_the_next_process() {
    let (auth, folder) = (Auth::default(), TempDir::new().unwrap());
    auth.is_away(true);
    {
        let sink = auth.sink(folder.path(), 1 << 20);
        let (handle, ended) = running(&sink);
        for number in 0..1_500 {
            sink.record(record(number));
        }
        eventually("it is on disk", || sink.counts().waiting == 0 && sink.counts().spooled_bytes > 0).await;
        for path in files(folder.path()).keys() {
            assert_eq!(fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        sink.record(record(1_500));
        handle.shut_down();
        ended.await.unwrap();
        assert!(sink.flush().await.is_err(), "auth is away");
        assert_eq!(sink.counts().waiting, 0);
    }
    // Killed while it handed over: auth has taken one batch, and nobody knows.
    auth.is_away(false);
    auth.0.lock().loses_answers = true;
    {
        let sink = auth.sink(folder.path(), 1 << 20);
        let _ = sink.flush().await;
    }
    let first = auth.batch_ids();
    assert_eq!(first.len(), 1);
    auth.0.lock().loses_answers = false;
    let sink = auth.sink(folder.path(), 1 << 20);
    sink.flush().await.unwrap();
    assert_eq!(auth.requests(), numbers(0..1_501));
    assert_eq!(auth.batch_ids()[0], first[0], "it keeps its id");
    assert!(files(folder.path()).is_empty(), "{:?}", files(folder.path()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_spool_closes_the_door_until_auth_is_back() {
    let (auth, folder) = (Auth::default(), TempDir::new().unwrap());
    auth.is_away(true);
    let sink = auth.sink(folder.path(), 65_536);
    let _running = running(&sink);
    let mut count = 0;
    while sink.is_open() {
        assert!(count < 100_000, "it closes");
        sink.record(record(count));
        count += 1;
        if count.is_multiple_of(500) {
            tokio::task::yield_now().await;
        }
    }
    let on_disk: u64 = files(folder.path()).values().sum();
    assert!(on_disk <= 65_536 + 2 * BATCH_BYTES as u64, "{on_disk}");
    // Calls that had been let in are still recorded.
    sink.record(record(count));
    auth.is_away(false);
    eventually("the door opens", || sink.is_open()).await;
    eventually("nothing is lost", || auth.requests().len() == count + 1).await;
    assert_eq!(auth.requests(), numbers(0..count + 1));
    assert_eq!(sink.counts().lost, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_left_at_the_end_is_on_disk_even_where_there_is_no_room() {
    let (auth, folder) = (Auth::default(), TempDir::new().unwrap());
    auth.is_away(true);
    {
        let sink = auth.sink(folder.path(), 0);
        sink.record(record(0));
        sink.record(record(1));
        assert!(sink.flush().await.is_err());
    }
    auth.is_away(false);
    auth.sink(folder.path(), 0).flush().await.unwrap();
    assert_eq!(auth.requests(), numbers(0..2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_end_of_a_file_costs_only_itself() {
    let (auth, folder) = (Auth::default(), TempDir::new().unwrap());
    auth.is_away(true);
    for number in 0..3 {
        let sink = auth.sink(folder.path(), 1 << 20);
        sink.record(record(2 * number));
        let _ = sink.flush().await;
        sink.record(record(2 * number + 1));
        let _ = sink.flush().await;
    }
    let paths: Vec<_> = files(folder.path()).into_keys().collect();
    assert_eq!(paths.len(), 3);
    // Cut off in the middle of a frame, and in the other a byte of one flipped.
    let whole = fs::read(&paths[0]).unwrap();
    fs::write(&paths[0], &whole[..whole.len() - 3]).unwrap();
    let mut whole = fs::read(&paths[1]).unwrap();
    let last = whole.len() - 1;
    whole[last] ^= 1;
    fs::write(&paths[1], whole).unwrap();
    auth.is_away(false);
    auth.sink(folder.path(), 1 << 20).flush().await.unwrap();
    assert_eq!(auth.requests(), ["0", "2", "4", "5"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_share_a_folder_and_the_living_takes_over_from_the_dead() {
    let (auth, folder) = (Auth::default(), TempDir::new().unwrap());
    auth.is_away(true);
    let first = auth.sink(folder.path(), 1 << 20);
    let second = auth.sink(folder.path(), 1 << 20);
    first.record(record(0));
    second.record(record(1));
    let _ = (first.flush().await, second.flush().await);
    auth.is_away(false);
    drop(second);
    // It finds the place of the first taken, and its own with what the second has left.
    auth.sink(folder.path(), 1 << 20).flush().await.unwrap();
    assert_eq!(auth.requests(), numbers(1..2));
    auth.is_away(true);
    let third = auth.sink(folder.path(), 1 << 20);
    third.record(record(2));
    let _ = third.flush().await;
    drop((first, third));
    auth.is_away(false);
    auth.sink(folder.path(), 1 << 20).flush().await.unwrap();
    assert_eq!(auth.requests(), ["1", "0", "2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sink_without_a_way_keeps_what_it_is_given() {
    let sink = AuditSink::default();
    sink.record(record(0));
    assert!(sink.is_open());
    assert_eq!(sink.take(), [record(0)]);
    sink.flush().await.unwrap();
}

#[test]
fn a_record_is_cut_and_holds_no_key() {
    let token = TokenKind::TeamLive.generate();
    let call = AuditCall {
        path: format!("/v1/keys/{token}/K7WX9-M3NP4-H8TRC-DJ/{}?token={token}", "é".repeat(2_000)),
        user_agent: format!("curl/8 {token}"),
        ..Default::default()
    };
    let mut record = AuditRecord {
        resources: vec!["r".repeat(1_000); 1_000],
        call: Some(call),
        actor_name: "ö".repeat(1_000),
        ..Default::default()
    };
    make_fit(&mut record);
    let call = record.call.unwrap();
    assert!(call.path.starts_with("/v1/keys/[redacted]/[redacted]/é"), "{}", call.path);
    assert!(call.path.len() <= MAX_PATH && !call.path.contains(&token[8..20]));
    assert_eq!(call.user_agent, "curl/8 [redacted]");
    assert_eq!((record.resources.len(), record.resources[0].len(), record.actor_name.len()), (200, 256, 256));
}

store_suite! {
    paperkey_migrations::kit::Migrator;
    what_transactions_record_is_handed_over_once,
    a_lost_answer_makes_no_second_batch,
    what_auth_does_not_take_stays_in_the_database,
    of_two_relays_each_entry_is_handed_over_once,
}

fn entry(number: usize) -> AuditEntry {
    AuditEntry {
        actor_kind: "account".into(),
        actor_id: "usr_1".into(),
        actor_name: "ada@example.com".into(),
        team_id: "team_1".into(),
        action: "/paperkey.auth.v1.TeamService/UpdateTeam".into(),
        resources: vec!["team_1".into()],
        request_id: number.to_string(),
    }
}

async fn write(database: &Database, range: std::ops::Range<usize>) {
    let job = database.write(move |tx| async move {
        for number in range {
            tx.audit(entry(number));
        }
        Ok::<_, DbError>(())
    });
    job.await.unwrap();
}

/// One round of the relay.
async fn relay_once(auth: &Auth, database: &Database) {
    let (channel, signer) = auth.channel();
    let (handle, shutdown) = shutdown::channel();
    handle.shut_down();
    relay(database.clone(), "catalog", &channel, signer).run(shutdown).await;
}

async fn left(database: &Database) -> i64 {
    use sea_orm::{ConnectionTrait as _, Statement};
    let job = database.read(|reader| async move {
        let sql = "SELECT COUNT(*) AS n FROM audit_entries";
        let row = reader.query_one_raw(Statement::from_string(reader.get_database_backend(), sql)).await?;
        Ok::<_, DbError>(row.unwrap().try_get("", "n")?)
    });
    job.await.unwrap()
}

async fn what_transactions_record_is_handed_over_once(database: Database) {
    let auth = Auth::default();
    let (channel, signer) = auth.channel();
    let (_handle, shutdown) = shutdown::channel();
    tokio::spawn(relay(database.clone(), "catalog", &channel, signer).run(shutdown));
    write(&database, 0..1_201).await;
    eventually("it is handed over", || auth.requests().len() == 1_201).await;
    assert_eq!(auth.requests(), numbers(0..1_201));
    let first = auth.0.lock().batches[0].1[0].clone();
    assert!(first.at_ms > 0);
    let expected = AuditRecord {
        at_ms: first.at_ms,
        team_id: "team_1".into(),
        request_id: "0".into(),
        actor_kind: "account".into(),
        actor_id: "usr_1".into(),
        actor_name: "ada@example.com".into(),
        rpc: "/paperkey.auth.v1.TeamService/UpdateTeam".into(),
        resources: vec!["team_1".into()],
        call: None,
    };
    assert_eq!(first, expected);
}

async fn a_lost_answer_makes_no_second_batch(database: Database) {
    let auth = Auth::default();
    auth.0.lock().loses_answers = true;
    write(&database, 0..3).await;
    relay_once(&auth, &database).await;
    assert_eq!(left(&database).await, 3);
    write(&database, 3..5).await;
    auth.0.lock().loses_answers = false;
    relay_once(&auth, &database).await;
    assert_eq!((auth.requests(), left(&database).await), (numbers(0..5), 0));
    assert_eq!(auth.batch_ids().len(), 2);
}

async fn what_auth_does_not_take_stays_in_the_database(database: Database) {
    let auth = Auth::default();
    auth.is_away(true);
    write(&database, 0..3).await;
    relay_once(&auth, &database).await;
    assert_eq!((left(&database).await, auth.0.lock().calls), (3, 1));
    auth.is_away(false);
    relay_once(&auth, &database).await;
    assert_eq!((auth.requests(), left(&database).await), (numbers(0..3), 0));
}

async fn of_two_relays_each_entry_is_handed_over_once(database: Database) {
    let auth = Auth::default();
    for round in 0..10 {
        write(&database, round * 50..(round + 1) * 50).await;
        tokio::join!(relay_once(&auth, &database), relay_once(&auth, &database));
    }
    // Whoever came second may have found the lease taken.
    relay_once(&auth, &database).await;
    assert_eq!(left(&database).await, 0);
    let mut requests: Vec<usize> = auth.requests().iter().map(|number| number.parse().unwrap()).collect();
    requests.sort_unstable();
    assert_eq!(requests, (0..500).collect::<Vec<_>>());
}
