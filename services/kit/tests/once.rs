//! Calls that take effect once: the same promises on SQLite and on PostgreSQL, in one process and between two.

use std::{
    collections::BTreeSet,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use paperkey_kit::{
    channel::{Channel, Exchange},
    clock::Clock,
    db::{Database, DbError, prune_answers},
    ids::new_id,
    once::{Once, REPLAYED_HEADER},
    policy::Guarded,
    principal::{Caller, PRINCIPAL_HEADER, Signer},
    secrets::Keyring,
    service::Rpcs,
    store::Act,
    store_suite,
    testing::TestDb,
};
use paperkey_proto::{
    Error,
    catalog::v1::{
        Client, CreateClientRequest, CreateClientResponse, DeleteClientRequest, DeleteClientResponse, GetClientRequest,
        GetClientResponse, ListClientsRequest, ListClientsResponse, UpdateClientRequest, UpdateClientResponse,
        client_service_client::ClientServiceClient,
        client_service_server::{ClientService, ClientServiceServer},
    },
    errors::v1::Reason,
    options::v1::Caller as Kind,
    principal::v1::{Mode, Once as Token, Principal, Role},
};
use sea_orm::{ConnectionTrait as _, Statement};
use tokio::{
    sync::{Barrier, Notify},
    task::JoinSet,
};
use tonic::{
    Request, Response, Status,
    body::Body,
    codegen::{Service, http},
};

store_suite! {
    paperkey_migrations::auth::Migrator;
    a_repetition_is_told_what_the_first_was_told_and_changes_nothing,
    another_request_under_the_same_key_is_refused,
    calls_under_other_keys_and_without_one_are_calls_of_their_own,
    a_refusal_for_good_is_told_again_with_all_it_said,
    what_failed_inside_or_came_too_often_is_tried_again,
    what_had_nothing_to_change_is_answered_from_memory,
    of_many_at_once_one_runs_and_all_are_told_the_same,
    two_processes_at_once_make_one_change_and_give_one_answer,
    two_processes_with_two_requests_under_one_key_make_one_change,
    who_came_too_often_is_told_what_another_process_has_answered_meanwhile,
    who_waits_too_long_is_told_that_the_call_is_under_way,
    a_caller_who_goes_away_leaves_the_change_and_its_answer,
    an_answer_is_sealed_where_it_is_kept,
    a_change_without_its_answer_is_a_fault,
    an_answer_that_is_made_of_something_else_is_a_fault,
    a_method_that_takes_no_key_is_called_each_time,
    the_wish_travels_signed_between_processes,
}

/// What the tests call. The name of a client says what is to happen.
struct Clients {
    database: Database,
    calls: Arc<AtomicUsize>,
    /// Where two calls meet before they change anything.
    meeting: Arc<Barrier>,
    /// What a slow call tells when it has begun, and what it waits for.
    begun: Arc<Notify>,
    go_on: Arc<Notify>,
}

#[tonic::async_trait]
impl ClientService for Clients {
    async fn create_client(
        &self,
        request: Request<CreateClientRequest>,
    ) -> Result<Response<CreateClientResponse>, Status> {
        let caller = Caller::of(&request)?;
        let name = request.into_inner().name;
        self.calls.fetch_add(1, Ordering::SeqCst);
        let id = new_id("cli", self.database.clock());
        let answer = |client: &Client| CreateClientResponse { client: Some(client.clone()) };
        let act = Act::by(&caller, "/paperkey.catalog.v1.ClientService/CreateClient").answered_by(answer);
        let client = Client { id, name: name.clone(), ..Client::default() };
        match name.as_str() {
            "nothing" => return Ok(Response::new(answer(&client))),
            "unknown" => return Err(Error::field("name", format!("is not known to {}", client.id)).into()),
            "often" => return Err(Error::new(Reason::RateLimited).into()),
            "down" => return Err(Error::unavailable("the store is down").into()),
            "meet" | "meet again" => {
                self.meeting.wait().await;
            }
            "slow" | "slow and often" => {
                self.begun.notify_one();
                self.go_on.notified().await;
            }
            _ => {}
        }
        if name == "slow and often" {
            return Err(Error::new(Reason::RateLimited).into());
        }
        let made = self
            .database
            .write(move |tx| async move {
                tx.audit(act.on(vec![client.id.clone()]));
                match client.name.as_str() {
                    "forgetful" => {}
                    "mistaken" => act.answer(&tx, &client.id)?,
                    _ => act.answer(&tx, &client)?,
                }
                Ok::<_, DbError>(client)
            })
            .await
            .map_err(Error::from)?;
        Ok(Response::new(answer(&made)))
    }

    async fn list_clients(&self, _: Request<ListClientsRequest>) -> Result<Response<ListClientsResponse>, Status> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        Ok(Response::new(ListClientsResponse::default()))
    }

    async fn get_client(&self, _: Request<GetClientRequest>) -> Result<Response<GetClientResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn update_client(&self, _: Request<UpdateClientRequest>) -> Result<Response<UpdateClientResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn delete_client(&self, _: Request<DeleteClientRequest>) -> Result<Response<DeleteClientResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }
}

/// A process that serves: with turns of its own, and perhaps a database in common with another.
struct Process {
    database: Database,
    channel: Channel,
    signer: Signer,
    calls: Arc<AtomicUsize>,
    meeting: Arc<Barrier>,
    begun: Arc<Notify>,
    go_on: Arc<Notify>,
}

impl Process {
    fn new(database: &Database) -> Self {
        let clock = database.clock().clone();
        let signer = Signer::new(&Keyring::for_tests(), clock.clone());
        let process = Self {
            database: database.clone(),
            channel: Channel::local(),
            signer: signer.clone(),
            calls: Arc::default(),
            meeting: Arc::new(Barrier::new(2)),
            begun: Arc::default(),
            go_on: Arc::default(),
        };
        process.serve(signer, clock);
        process
    }

    /// Another process beside this one, in which calls meet those of this one.
    fn beside(&self, database: &Database) -> Self {
        let (clock, signer) = (database.clock().clone(), self.signer.clone());
        let process = Self {
            database: database.clone(),
            channel: Channel::local(),
            signer: signer.clone(),
            calls: Arc::clone(&self.calls),
            meeting: Arc::clone(&self.meeting),
            begun: Arc::clone(&self.begun),
            go_on: Arc::clone(&self.go_on),
        };
        process.serve(signer, clock);
        process
    }

    fn serve(&self, signer: Signer, clock: Clock) {
        let clients = Clients {
            database: self.database.clone(),
            calls: Arc::clone(&self.calls),
            meeting: Arc::clone(&self.meeting),
            begun: Arc::clone(&self.begun),
            go_on: Arc::clone(&self.go_on),
        };
        let rpcs = Rpcs::new(ClientServiceServer::new(clients));
        self.channel.bind(Guarded::new(rpcs, signer, clock, None, Some(self.database.clone())));
    }

    fn client(&self, once: Option<Token>, signed: bool) -> ClientServiceClient<As> {
        let once = once.map(|token| Arc::new(Once::new(token).unwrap()));
        let caller = Caller { principal: Arc::new(owner()), request_id: "req_1".into(), once };
        ClientServiceClient::new(As { channel: self.channel.clone(), signer: self.signer.clone(), caller, signed })
    }

    async fn create(&self, once: Option<Token>, name: &str) -> Told {
        Told::of(self.client(once, false).create_client(named(name)).await)
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::SeqCst)
    }

    /// How many changes are on record.
    async fn changes(&self) -> i64 {
        count(&self.database, "audit_entries").await
    }
}

/// What a caller is told.
#[derive(Clone, Debug, PartialEq)]
struct Told {
    replayed: bool,
    outcome: Result<Client, (Reason, String, Vec<String>)>,
}

impl Told {
    fn of(outcome: Result<Response<CreateClientResponse>, Status>) -> Self {
        let metadata = match &outcome {
            Ok(response) => response.metadata(),
            Err(status) => status.metadata(),
        };
        let replayed = metadata.get(REPLAYED_HEADER).is_some_and(|value| value == "true");
        let outcome = outcome.map(|response| response.into_inner().client.unwrap()).map_err(|status| {
            let error = Error::from_status(&status);
            let violations = error.violations().iter().map(|violation| violation.message.clone()).collect();
            (error.reason(), error.message().to_owned(), violations)
        });
        Self { replayed, outcome }
    }

    fn id(&self) -> &str {
        &self.outcome.as_ref().unwrap().id
    }

    fn reason(&self) -> Reason {
        self.outcome.as_ref().unwrap_err().0
    }
}

/// A client's way to the service, as the gateway goes it: by value in this process, or signed.
#[derive(Clone)]
struct As {
    channel: Channel,
    signer: Signer,
    caller: Caller,
    signed: bool,
}

impl Service<http::Request<Body>> for As {
    type Response = http::Response<Body>;
    type Error = Status;
    type Future = Exchange;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.channel.poll_ready(context)
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        if self.signed {
            let assertion = self.signer.sign_as(&self.caller, request.uri().path());
            request.headers_mut().insert(PRINCIPAL_HEADER, assertion);
            return self.channel.call(request);
        }
        self.channel.call_as(self.caller.clone(), &self.signer, request)
    }
}

fn owner() -> Principal {
    Principal {
        kind: Kind::Account.into(),
        id: "usr_1".into(),
        team_id: "team_1".into(),
        mode: Mode::Live.into(),
        role: Role::Owner.into(),
        ..Principal::default()
    }
}

fn named(name: &str) -> CreateClientRequest {
    CreateClientRequest { name: name.into(), ..CreateClientRequest::default() }
}

/// A call under a key, with a request of that number.
fn token(key: u8, request: u8) -> Token {
    Token { id: vec![key; 32], request_hash: vec![request; 32], seal_key: vec![key.wrapping_add(100); 32] }
}

async fn count(database: &Database, table: &'static str) -> i64 {
    let job = database.read(move |reader| async move {
        let sql = format!("SELECT COUNT(*) AS n FROM {table}");
        let row = reader.query_one_raw(Statement::from_string(reader.get_database_backend(), sql)).await?.unwrap();
        Ok::<_, DbError>(row.try_get("", "n")?)
    });
    job.await.unwrap()
}

async fn a_repetition_is_told_what_the_first_was_told_and_changes_nothing(database: Database) {
    let process = Process::new(&database);
    let first = process.create(Some(token(1, 1)), "Ada").await;
    assert!(!first.replayed);
    for _ in 0..2 {
        let again = process.create(Some(token(1, 1)), "Ada").await;
        assert_eq!(again, Told { replayed: true, ..first.clone() });
    }
    // A process that starts later knows as well.
    let later = process.beside(&database).create(Some(token(1, 1)), "Ada").await;
    assert_eq!(later, Told { replayed: true, ..first });
    assert_eq!((process.calls(), process.changes().await), (1, 1));
}

async fn another_request_under_the_same_key_is_refused(database: Database) {
    let process = Process::new(&database);
    let first = process.create(Some(token(1, 1)), "Ada").await;
    let other = process.create(Some(token(1, 2)), "Grace").await;
    assert_eq!((other.replayed, other.reason()), (false, Reason::IdempotencyMismatch));
    // That refusal takes the place of nothing.
    assert_eq!(process.create(Some(token(1, 1)), "Ada").await.id(), first.id());
    assert_eq!((process.calls(), process.changes().await), (1, 1));
}

async fn calls_under_other_keys_and_without_one_are_calls_of_their_own(database: Database) {
    let process = Process::new(&database);
    let mut ids = BTreeSet::new();
    for once in [Some(token(1, 1)), Some(token(2, 1)), None, None] {
        let told = process.create(once, "Ada").await;
        assert!(!told.replayed && ids.insert(told.id().to_owned()));
    }
    assert_eq!((process.calls(), process.changes().await), (4, 4));
    assert_eq!(count(&database, "idempotency").await, 2);
}

async fn a_refusal_for_good_is_told_again_with_all_it_said(database: Database) {
    let process = Process::new(&database);
    let first = process.create(Some(token(1, 1)), "unknown").await;
    let again = process.create(Some(token(1, 1)), "unknown").await;
    assert_eq!(again, Told { replayed: true, ..first.clone() });
    let (reason, _, violations) = first.outcome.unwrap_err();
    assert_eq!((reason, violations.len(), process.calls()), (Reason::ValidationFailed, 1, 1));
    assert_eq!(process.create(Some(token(1, 2)), "Ada").await.reason(), Reason::IdempotencyMismatch);
}

async fn what_failed_inside_or_came_too_often_is_tried_again(database: Database) {
    let process = Process::new(&database);
    for (name, reason) in [("down", Reason::Unavailable), ("often", Reason::RateLimited)] {
        for _ in 0..2 {
            let told = process.create(Some(token(1, 1)), name).await;
            assert_eq!((told.replayed, told.reason()), (false, reason));
        }
    }
    assert_eq!((process.calls(), count(&database, "idempotency").await), (4, 0));
    assert!(!process.create(Some(token(1, 1)), "Ada").await.replayed);
    assert!(process.create(Some(token(1, 1)), "Ada").await.replayed);
}

async fn what_had_nothing_to_change_is_answered_from_memory(database: Database) {
    let process = Process::new(&database);
    let first = process.create(Some(token(1, 1)), "nothing").await;
    assert!(!first.replayed);
    let again = process.create(Some(token(1, 1)), "nothing").await;
    assert_eq!(again, Told { replayed: true, ..first });
    assert_eq!((process.calls(), process.changes().await), (1, 0));
}

async fn of_many_at_once_one_runs_and_all_are_told_the_same(database: Database) {
    let process = Arc::new(Process::new(&database));
    let mut racers = JoinSet::new();
    for _ in 0..20 {
        let process = Arc::clone(&process);
        racers.spawn(async move { process.create(Some(token(1, 1)), "Ada").await });
    }
    let told = racers.join_all().await;
    assert_eq!(told.iter().filter(|told| !told.replayed).count(), 1);
    let ids: BTreeSet<&str> = told.iter().map(Told::id).collect();
    assert_eq!((ids.len(), process.calls(), process.changes().await), (1, 1, 1));
}

async fn two_processes_at_once_make_one_change_and_give_one_answer(database: Database) {
    let one = Process::new(&database);
    let other = one.beside(&database);
    race(&one, &other).await;
}

/// Both have begun before either changes anything.
async fn race(one: &Process, other: &Process) {
    for key in 1..=10 {
        let changes = one.changes().await;
        let (first, second) =
            tokio::join!(one.create(Some(token(key, 1)), "meet"), other.create(Some(token(key, 1)), "meet"));
        assert_eq!(first.id(), second.id());
        assert!(first.replayed != second.replayed, "one of them is the first");
        assert_eq!(one.changes().await, changes + 1);
    }
    assert_eq!(one.calls(), 20);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_with_connections_of_their_own_give_one_answer_on_postgres() {
    let Some(db) = TestDb::postgres().await else { return };
    let (first, second) = (db.migrated::<paperkey_migrations::auth::Migrator>().await, db.open().await);
    let one = Process::new(&first);
    let other = one.beside(&second);
    race(&one, &other).await;
    first.close().await;
    second.close().await;
    db.remove().await;
}

async fn two_processes_with_two_requests_under_one_key_make_one_change(database: Database) {
    let one = Process::new(&database);
    let other = one.beside(&database);
    let (first, second) =
        tokio::join!(one.create(Some(token(1, 1)), "meet"), other.create(Some(token(1, 2)), "meet again"));
    let (made, refused) = if first.outcome.is_ok() { (first, second) } else { (second, first) };
    assert!(made.outcome.is_ok() && !made.replayed);
    assert_eq!(refused.reason(), Reason::IdempotencyMismatch);
    assert_eq!((one.calls(), one.changes().await), (2, 1));
}

async fn who_came_too_often_is_told_what_another_process_has_answered_meanwhile(database: Database) {
    let one = Process::new(&database);
    let other = one.beside(&database);
    let (refused, made) = tokio::join!(one.create(Some(token(1, 1)), "slow and often"), async {
        one.begun.notified().await;
        let made = other.create(Some(token(1, 1)), "Ada").await;
        one.go_on.notify_one();
        made
    });
    assert!(!made.replayed);
    assert_eq!(refused, Told { replayed: true, ..made });
    assert_eq!((one.calls(), one.changes().await), (2, 1));
}

async fn who_waits_too_long_is_told_that_the_call_is_under_way(database: Database) {
    let process = Arc::new(Process::new(&database));
    let slow = {
        let process = Arc::clone(&process);
        tokio::spawn(async move { process.create(Some(token(1, 1)), "slow").await })
    };
    process.begun.notified().await;
    // More than may wait: some are told at once, the others after a while.
    let mut waiting = JoinSet::new();
    for _ in 0..40 {
        let process = Arc::clone(&process);
        waiting.spawn(async move { process.create(Some(token(1, 1)), "slow").await });
    }
    for told in waiting.join_all().await {
        assert_eq!((told.replayed, told.reason()), (false, Reason::Conflict));
    }
    // It keeps nobody else waiting.
    assert!(process.create(Some(token(2, 1)), "Ada").await.outcome.is_ok());
    process.go_on.notify_one();
    let first = slow.await.unwrap();
    assert_eq!(process.create(Some(token(1, 1)), "slow").await, Told { replayed: true, ..first });
    assert_eq!((process.calls(), process.changes().await), (2, 2));
}

async fn a_caller_who_goes_away_leaves_the_change_and_its_answer(database: Database) {
    let process = Arc::new(Process::new(&database));
    let gone = {
        let process = Arc::clone(&process);
        tokio::spawn(async move { process.create(Some(token(1, 1)), "slow").await })
    };
    process.begun.notified().await;
    gone.abort();
    assert!(gone.await.unwrap_err().is_cancelled());
    // Before it changed anything: the next is the first.
    let (first, ()) = tokio::join!(process.create(Some(token(1, 1)), "slow"), async {
        process.begun.notified().await;
        process.go_on.notify_one();
    });
    assert!(!first.replayed);
    assert_eq!(process.create(Some(token(1, 1)), "slow").await, Told { replayed: true, ..first });
    assert_eq!(process.changes().await, 1);
}

async fn an_answer_is_sealed_where_it_is_kept(database: Database) {
    let process = Process::new(&database);
    let first = process.create(Some(token(1, 1)), "Ada").await;
    let job = database.read(|reader| async move {
        let sql = "SELECT sealed_response FROM idempotency";
        let row = reader.query_one_raw(Statement::from_string(reader.get_database_backend(), sql)).await?.unwrap();
        Ok::<Vec<u8>, DbError>(row.try_get("", "sealed_response")?)
    });
    let sealed = job.await.unwrap();
    for plain in [first.id(), "Ada"] {
        assert!(!sealed.windows(plain.len()).any(|window| window == plain.as_bytes()), "{plain}");
    }
    // Whoever knows the id and the request, but not what both came from, learns and changes nothing.
    let thief = Token { seal_key: vec![7; 32], ..token(1, 1) };
    let told = process.create(Some(thief), "Ada").await;
    assert_eq!((told.replayed, told.reason()), (false, Reason::Internal));
    // Nor is the answer to one request opened as that to another.
    let job = database.write(|tx| async move {
        let values = [vec![2_u8; 32].into()];
        let sql = "UPDATE idempotency SET request_hash = $1";
        tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), sql, values)).await?;
        Ok::<_, DbError>(())
    });
    job.await.unwrap();
    assert_eq!(process.create(Some(token(1, 2)), "Ada").await.reason(), Reason::Internal);
    assert_eq!((process.calls(), process.changes().await), (1, 1));
}

async fn a_change_without_its_answer_is_a_fault(database: Database) {
    let process = Process::new(&database);
    assert!(process.create(None, "forgetful").await.outcome.is_ok(), "nobody asked for more");
    let told = process.create(Some(token(1, 1)), "forgetful").await;
    assert_eq!(told.outcome.is_err(), cfg!(debug_assertions));
}

async fn an_answer_that_is_made_of_something_else_is_a_fault(database: Database) {
    let process = Process::new(&database);
    for once in [None, Some(token(1, 1))] {
        assert_eq!(process.create(once, "mistaken").await.reason(), Reason::Internal);
    }
    assert_eq!(process.changes().await, 0);
}

async fn a_method_that_takes_no_key_is_called_each_time(database: Database) {
    let process = Process::new(&database);
    for _ in 0..2 {
        let answer = process.client(Some(token(1, 1)), false).list_clients(ListClientsRequest::default()).await;
        assert!(answer.unwrap().metadata().get(REPLAYED_HEADER).is_none());
    }
    assert_eq!((process.calls(), count(&database, "idempotency").await), (2, 0));
}

async fn the_wish_travels_signed_between_processes(database: Database) {
    let process = Process::new(&database);
    let first = Told::of(process.client(Some(token(1, 1)), true).create_client(named("Ada")).await);
    let again = Told::of(process.client(Some(token(1, 1)), true).create_client(named("Ada")).await);
    assert_eq!(again, Told { replayed: true, ..first });
    assert_eq!(process.changes().await, 1);
}

async fn an_answer_is_kept_for_a_day(db: TestDb) {
    let (clock, hand) = Clock::manual(1_790_000_000_000);
    let mut options = db.options();
    options.clock = clock;
    let database = Database::open(options).await.unwrap();
    database.migrate_up::<paperkey_migrations::auth::Migrator>().await.unwrap();
    let process = Process::new(&database);
    for key in [1, 2] {
        process.create(Some(token(key, 1)), "Ada").await;
    }
    hand.advance_ms(24 * 60 * 60 * 1_000 - 1);
    assert!(process.create(Some(token(1, 1)), "Ada").await.replayed);
    hand.advance_ms(1);
    let anew = process.create(Some(token(1, 2)), "Grace").await;
    assert!(!anew.replayed && anew.outcome.is_ok(), "the key is free for anything");
    assert_eq!(process.changes().await, 3);
    assert_eq!(prune_answers(&database, 100).await.unwrap(), 1, "the other one is forgotten");
    assert_eq!(process.create(Some(token(1, 2)), "Grace").await, Told { replayed: true, ..anew });
    database.close().await;
    db.remove().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_kept_for_a_day_on_sqlite() {
    an_answer_is_kept_for_a_day(TestDb::sqlite()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_kept_for_a_day_on_postgres() {
    if let Some(db) = TestDb::postgres().await {
        an_answer_is_kept_for_a_day(db).await;
    }
}
