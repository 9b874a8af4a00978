use std::sync::atomic::AtomicBool;

use futures_util::future::{FutureExt as _, join_all};
use paperkey_proto::auth::v1::{
    AuthenticateResponse, KeyUse, ListChangesResponse, ProvisionProductRequest, ProvisionProductResponse,
    RecordIncidentsRequest, RecordIncidentsResponse, RecordKeyUsesRequest, RecordKeyUsesResponse,
    credential_service_server::{CredentialService, CredentialServiceServer},
};
use tokio::sync::Semaphore;
use tonic::{Request, Response};

use super::*;
use crate::{clock::ManualClock, policy::Guarded, secrets::Keyring, service::Rpcs};

const START_MS: i64 = 1_790_000_000_000;

/// Auth, as another process: it knows one key, and tells of changes only when asked.
struct FakeAuth {
    key: Mutex<Option<Principal>>,
    feed: Mutex<Vec<String>>,
    /// The page of the feed, where it is not the real one.
    page: Mutex<Option<ListChangesResponse>>,
    is_gone: AtomicBool,
    /// Answers about credentials that may be given.
    may_answer: Semaphore,
    /// Questions about credentials that have arrived.
    arrived: Semaphore,
    recorded: Mutex<Vec<Vec<KeyUse>>>,
}

#[derive(Clone)]
struct Handler(Arc<FakeAuth>);

impl FakeAuth {
    fn must_be_there(&self) -> Result<(), Status> {
        if self.is_gone.load(Ordering::SeqCst) { Err(Error::unavailable("nobody is there").into()) } else { Ok(()) }
    }
}

#[async_trait]
impl CredentialService for Handler {
    async fn authenticate(&self, _: Request<AuthenticateRequest>) -> Result<Response<AuthenticateResponse>, Status> {
        self.0.must_be_there()?;
        let key = self.0.key.lock().clone();
        self.0.arrived.add_permits(1);
        // What was read before waiting is what is answered.
        self.0.may_answer.acquire().await.expect("it is never closed").forget();
        let principal = key.ok_or_else(Error::unauthenticated)?;
        Ok(Response::new(AuthenticateResponse { principal: Some(principal) }))
    }

    async fn provision_product(
        &self,
        _: Request<ProvisionProductRequest>,
    ) -> Result<Response<ProvisionProductResponse>, Status> {
        Err(Status::unimplemented("not in these tests"))
    }

    async fn record_key_uses(
        &self,
        request: Request<RecordKeyUsesRequest>,
    ) -> Result<Response<RecordKeyUsesResponse>, Status> {
        self.0.must_be_there()?;
        self.0.recorded.lock().push(request.into_inner().uses);
        Ok(Response::new(RecordKeyUsesResponse {}))
    }

    async fn record_incidents(
        &self,
        _: Request<RecordIncidentsRequest>,
    ) -> Result<Response<RecordIncidentsResponse>, Status> {
        Ok(Response::new(RecordIncidentsResponse {}))
    }

    async fn list_changes(
        &self,
        request: Request<ListChangesRequest>,
    ) -> Result<Response<ListChangesResponse>, Status> {
        self.0.must_be_there()?;
        if let Some(page) = self.0.page.lock().take() {
            return Ok(Response::new(page));
        }
        let feed = self.0.feed.lock();
        let since = usize::try_from(request.into_inner().since).unwrap_or(feed.len());
        let subjects = feed.iter().skip(since).cloned().collect();
        Ok(Response::new(ListChangesResponse { seq: i64::try_from(feed.len()).unwrap(), subjects, gap: false }))
    }
}

struct World {
    auth: Arc<FakeAuth>,
    authenticator: Arc<CachedAuthenticator>,
    epochs: Arc<Epochs>,
    hand: ManualClock,
    token: String,
    since: i64,
}

fn key() -> Principal {
    Principal {
        kind: Kind::TeamKey.into(),
        id: "key_1".into(),
        team_id: "team_1".into(),
        subjects: vec!["key:key_1".into(), "team:team_1".into()],
        ..Principal::default()
    }
}

impl World {
    /// Auth answers at once, and the gateway has just learned of all changes.
    async fn new() -> Self {
        let mut world = Self::not_yet_trusted(Semaphore::MAX_PERMITS);
        world.learn().await;
        world
    }

    /// Auth answers when it is told to.
    async fn slow() -> Self {
        let mut world = Self::not_yet_trusted(0);
        world.learn().await;
        world
    }

    fn not_yet_trusted(answers: usize) -> Self {
        let (clock, hand) = Clock::manual(START_MS);
        let signer = Signer::new(&Keyring::for_tests(), clock.clone());
        let auth = Arc::new(FakeAuth {
            key: Mutex::new(Some(key())),
            feed: Mutex::default(),
            page: Mutex::default(),
            is_gone: AtomicBool::new(false),
            may_answer: Semaphore::new(answers),
            arrived: Semaphore::new(0),
            recorded: Mutex::default(),
        });
        let channel = Channel::local();
        let rpcs = Rpcs::new(CredentialServiceServer::new(Handler(Arc::clone(&auth))));
        channel.bind(Guarded::new(rpcs, signer.clone(), clock.clone(), None, None));
        let epochs = Arc::new(Epochs::default());
        let authenticator = CachedAuthenticator::new(&channel, signer, clock, Arc::clone(&epochs));
        Self { auth, authenticator, epochs, hand, token: TokenKind::TeamLive.generate(), since: -1 }
    }

    async fn learn(&mut self) -> bool {
        self.authenticator.0.learn(&mut self.since).await
    }

    async fn ask(&self) -> Result<Arc<Principal>, Reason> {
        let asked = self.authenticator.authenticate(&self.token, None, Mode::Unspecified).await;
        asked.map_err(|error| error.reason())
    }

    /// Whether the key is good, as the gateway sees it.
    async fn is_good(&self) -> bool {
        match self.ask().await {
            Ok(_) => true,
            Err(Reason::InvalidCredentials) => false,
            Err(reason) => panic!("{reason:?}"),
        }
    }

    fn lookups(&self) -> u64 {
        self.authenticator.judgements().lookups
    }

    /// Waits until so many questions have come to auth.
    async fn arrived(&self, questions: u32) {
        self.auth.arrived.acquire_many(questions).await.expect("it is never closed").forget();
    }
}

#[tokio::test]
async fn many_callers_of_one_cold_credential_put_one_question() {
    let world = World::slow().await;
    let callers = join_all((0..100).map(|_| world.ask()));
    let (answers, ()) = tokio::join!(callers, async {
        world.arrived(1).await;
        world.auth.may_answer.add_permits(100);
    });
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!(world.lookups(), 1);
    assert!(world.is_good().await);
    assert_eq!(world.authenticator.judgements(), Judgements { lookups: 1, hits: 1, malformed: 0 });
    assert!(world.authenticator.0.questions.lock().is_empty());
}

#[tokio::test]
async fn who_goes_away_takes_nobodys_answer_along() {
    let world = World::slow().await;
    assert!(world.ask().now_or_never().is_none(), "it waits, and is dropped");
    let (answer, ()) = tokio::join!(world.ask(), async {
        world.arrived(1).await;
        world.auth.may_answer.add_permits(1);
    });
    assert!(answer.is_ok());
    assert_eq!(world.lookups(), 1);
}

#[tokio::test]
async fn a_failure_is_everybodys_who_waited_and_is_not_kept() {
    let world = World::new().await;
    world.auth.is_gone.store(true, Ordering::SeqCst);
    for answer in join_all((0..10).map(|_| world.ask())).await {
        assert_eq!(answer.unwrap_err(), Reason::Unavailable);
    }
    assert_eq!(world.lookups(), 1);
    world.auth.is_gone.store(false, Ordering::SeqCst);
    assert!(world.is_good().await);
    assert_eq!(world.lookups(), 2);
}

#[tokio::test]
async fn a_question_that_a_change_overtook_is_not_joined() {
    let world = World::slow().await;
    assert!(world.ask().now_or_never().is_none());
    world.arrived(1).await;
    // The first question has read that the key is good. Now it is revoked, and that is answered.
    *world.auth.key.lock() = None;
    world.epochs.bump("key:key_1");
    let (is_good, ()) = tokio::join!(world.is_good(), async {
        world.arrived(1).await;
        world.auth.may_answer.add_permits(3);
    });
    assert!(!is_good, "who came after the revocation was told of before");
    // Whichever of the two answers was kept last, the old one is not served.
    world.auth.may_answer.add_permits(10);
    assert!(!world.is_good().await);
}

#[tokio::test]
async fn who_waits_while_a_key_is_revoked_is_not_told_of_before() {
    let world = World::slow().await;
    let (is_good, ()) = tokio::join!(world.is_good(), async {
        world.arrived(1).await;
        *world.auth.key.lock() = None;
        world.epochs.bump("key:key_1");
        world.auth.may_answer.add_permits(2);
    });
    assert!(!is_good);
    assert_eq!(world.lookups(), 2);
}

#[tokio::test]
async fn a_key_that_changes_faster_than_auth_answers_is_not_judged() {
    let world = World::slow().await;
    let (answer, ()) = tokio::join!(world.ask(), async {
        for _ in 0..MAX_TRIES {
            world.arrived(1).await;
            world.epochs.bump("key:key_1");
            world.auth.may_answer.add_permits(1);
        }
    });
    assert_eq!(answer.unwrap_err(), Reason::Unavailable);
}

#[tokio::test]
async fn a_question_is_joined_only_while_its_answer_could_be_trusted() {
    let world = World::slow().await;
    assert!(world.ask().now_or_never().is_none());
    world.arrived(1).await;
    *world.auth.key.lock() = None;
    world.hand.advance_ms(TRUSTED_FOR_MS + 1);
    let (is_good, ()) = tokio::join!(world.is_good(), async {
        world.arrived(1).await;
        world.auth.may_answer.add_permits(2);
    });
    assert!(!is_good);
}

#[tokio::test]
async fn too_many_questions_at_a_time_are_refused_and_end() {
    let world = World::slow().await;
    let authenticator = &world.authenticator;
    let tokens: Vec<String> = (0..=MAX_QUESTIONS).map(|_| TokenKind::TeamLive.generate()).collect();
    let callers = join_all(tokens.iter().map(|token| authenticator.authenticate(token, None, Mode::Unspecified)));
    let (answers, ()) = tokio::join!(callers, async {
        world.arrived(1).await;
        world.auth.may_answer.add_permits(2 * MAX_QUESTIONS);
    });
    let refused: Vec<_> = answers.iter().filter_map(|answer| answer.as_ref().err()).map(Error::reason).collect();
    assert_eq!(refused, [Reason::Unavailable]);
    assert!(authenticator.0.questions.lock().is_empty());
}

#[tokio::test]
async fn before_the_first_news_nothing_is_remembered() {
    let mut world = World::not_yet_trusted(Semaphore::MAX_PERMITS);
    for lookups in 1..4 {
        assert!(world.is_good().await);
        assert_eq!(world.lookups(), lookups);
    }
    world.learn().await;
    for _ in 0..3 {
        assert!(world.is_good().await);
    }
    assert_eq!(world.lookups(), 4);
}

#[tokio::test]
async fn what_is_revoked_in_this_process_stops_at_once() {
    let world = World::new().await;
    assert!(world.is_good().await);
    *world.auth.key.lock() = None;
    world.epochs.bump("team:team_1");
    assert!(!world.is_good().await);
}

#[tokio::test]
async fn what_is_revoked_elsewhere_stops_with_the_next_news() {
    let mut world = World::new().await;
    assert!(world.is_good().await);
    *world.auth.key.lock() = None;
    world.auth.feed.lock().push("key:key_1".into());
    world.learn().await;
    assert!(!world.is_good().await);
}

#[tokio::test]
async fn without_news_nothing_is_believed_for_longer_than_its_time() {
    let mut world = World::new().await;
    assert!(world.is_good().await);
    // Revoked elsewhere, and no news of it arrive: the notification is lost, or this process was stopped.
    *world.auth.key.lock() = None;
    world.hand.advance_ms(TRUSTED_FOR_MS);
    assert!(world.is_good().await, "as old as may be");
    world.hand.advance_ms(1);
    assert!(!world.is_good().await);
    // The refusal is no more trusted than anything else.
    *world.auth.key.lock() = Some(key());
    assert!(world.is_good().await);
    // And where nobody can be asked, nobody is believed.
    world.auth.is_gone.store(true, Ordering::SeqCst);
    assert!(!world.learn().await);
    assert_eq!(world.ask().await.unwrap_err(), Reason::Unavailable);
    world.auth.is_gone.store(false, Ordering::SeqCst);
    world.learn().await;
    assert!(world.is_good().await);
}

#[tokio::test]
async fn news_that_are_not_complete_prove_nothing() {
    let mut world = World::new().await;
    assert!(world.is_good().await);
    world.hand.advance_ms(TRUSTED_FOR_MS + 1);
    let subjects = (0..changes::PAGE).map(|number| format!("key:{number}")).collect();
    *world.auth.page.lock() = Some(ListChangesResponse { seq: 1_000, subjects, gap: false });
    assert!(world.learn().await, "there is more");
    let lookups = world.lookups();
    assert!(world.is_good().await);
    assert_eq!(world.lookups(), lookups + 1, "what the next page says is not known yet");
    assert!(!world.learn().await);
    assert!(world.is_good().await);
    assert_eq!(world.lookups(), lookups + 1);
}

#[tokio::test]
async fn who_missed_changes_forgets_everything() {
    let mut world = World::new().await;
    assert!(world.is_good().await);
    *world.auth.key.lock() = None;
    *world.auth.page.lock() = Some(ListChangesResponse { seq: 7, subjects: Vec::new(), gap: true });
    world.learn().await;
    assert!(!world.is_good().await);
}

#[tokio::test]
async fn a_refusal_is_kept_until_anything_changes() {
    let world = World::new().await;
    *world.auth.key.lock() = None;
    for _ in 0..5 {
        assert!(!world.is_good().await);
    }
    assert_eq!(world.lookups(), 1);
    // It is enabled again. Nothing here knew which key the refused token was.
    *world.auth.key.lock() = Some(key());
    world.epochs.bump("key:key_1");
    assert!(world.is_good().await);
}

#[tokio::test]
async fn a_refusal_is_kept_for_five_seconds_at_most() {
    let mut world = World::new().await;
    *world.auth.key.lock() = None;
    assert!(!world.is_good().await);
    for _ in 0..9 {
        world.hand.advance_ms(500);
        world.learn().await;
        assert!(!world.is_good().await);
    }
    assert_eq!(world.lookups(), 1);
    world.hand.advance_ms(500);
    world.learn().await;
    assert!(!world.is_good().await);
    assert_eq!(world.lookups(), 2);
}

#[tokio::test]
async fn what_has_expired_is_never_served_whoever_says_so() {
    let mut world = World::new().await;
    *world.auth.key.lock() = Some(Principal { expires_at_ms: START_MS + 500, ..key() });
    assert!(world.is_good().await);
    world.hand.advance_ms(499);
    assert!(world.is_good().await);
    world.hand.advance_ms(1);
    assert!(!world.is_good().await);
    assert_eq!(world.lookups(), 1);
    // Auth's own clock may be behind.
    world.epochs.bump("key:key_1");
    world.learn().await;
    assert!(!world.is_good().await);
    assert_eq!(world.lookups(), 2);
}

#[tokio::test]
async fn what_can_be_no_credential_is_refused_without_a_question() {
    let world = World::new().await;
    let mut mistyped = world.token.clone();
    mistyped.pop();
    for credential in [mistyped.as_str(), "", "a.b", "é.é.é", &"x".repeat(10_000), &"a.".repeat(5_000)] {
        let refused = world.authenticator.authenticate(credential, None, Mode::Unspecified).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::InvalidCredentials);
    }
    assert_eq!(world.authenticator.judgements(), Judgements { lookups: 0, hits: 0, malformed: 6 });
}

#[tokio::test]
async fn what_one_call_names_is_not_served_to_another() {
    for credential in ["a.session.token".to_owned(), TokenKind::System.generate()] {
        let world = World::new().await;
        let ask = |team, mode| world.authenticator.authenticate(&credential, team, mode);
        ask(None, Mode::Unspecified).await.unwrap();
        ask(Some("team_1"), Mode::Unspecified).await.unwrap();
        ask(None, Mode::Test).await.unwrap();
        assert_eq!(world.lookups(), 3);
    }
}

#[tokio::test]
async fn a_use_is_recorded_once_a_minute_and_key() {
    let mut world = World::new().await;
    for _ in 0..3 {
        assert!(world.is_good().await);
    }
    // The same key by another entry of the memory.
    world.authenticator.authenticate(&world.token, None, Mode::Test).await.unwrap();
    let uses = Arc::clone(world.authenticator.uses());
    uses.flush().await.unwrap();
    uses.flush().await.unwrap();
    let minute = |at_ms| vec![KeyUse { key_id: "key_1".into(), used_at_ms: at_ms, ..KeyUse::default() }];
    assert_eq!(*world.auth.recorded.lock(), [minute(START_MS)]);
    world.hand.advance_ms(60_000);
    world.learn().await;
    assert!(world.is_good().await);
    uses.flush().await.unwrap();
    assert_eq!(*world.auth.recorded.lock(), [minute(START_MS), minute(START_MS + 60_000)]);
}

#[tokio::test]
async fn who_is_no_key_is_not_recorded() {
    let world = World::new().await;
    *world.auth.key.lock() = Some(Principal { kind: Kind::Account.into(), ..key() });
    assert!(world.is_good().await);
    *world.auth.key.lock() = None;
    world.epochs.bump("key:key_1");
    assert!(!world.is_good().await);
    assert_eq!(world.authenticator.uses().waiting(), 0);
}

#[tokio::test]
async fn uses_that_auth_does_not_take_are_kept_and_merged() {
    let world = World::new().await;
    let uses = Arc::clone(world.authenticator.uses());
    world.auth.is_gone.store(true, Ordering::SeqCst);
    uses.note("key_1", START_MS);
    uses.note("key_2", START_MS);
    assert_eq!(uses.flush().await.unwrap_err().reason(), Reason::Unavailable);
    uses.note("key_1", START_MS + 60_000);
    assert!(uses.flush().await.is_err());
    world.auth.is_gone.store(false, Ordering::SeqCst);
    uses.flush().await.unwrap();
    let used = |key_id: &str, used_at_ms| KeyUse { key_id: key_id.into(), used_at_ms, ..KeyUse::default() };
    assert_eq!(*world.auth.recorded.lock(), [[used("key_1", START_MS + 60_000), used("key_2", START_MS)]]);
    assert_eq!(uses.waiting(), 0);
}

#[tokio::test]
async fn many_uses_go_in_batches_and_no_more_wait_than_fit() {
    let world = World::new().await;
    let uses = world.authenticator.uses();
    for number in 0..1_250 {
        uses.note(&format!("key_{number}"), START_MS);
    }
    uses.flush().await.unwrap();
    let sizes: Vec<_> = world.auth.recorded.lock().iter().map(Vec::len).collect();
    assert_eq!(sizes, [500, 500, 250]);
    for number in 0..=crate::uses::MAX_WAITING {
        uses.note(&format!("other_{number}"), START_MS);
    }
    assert_eq!(uses.waiting(), crate::uses::MAX_WAITING);
}

#[tokio::test]
async fn workers_end_when_they_are_told_to() {
    let world = World::new().await;
    let (handle, shutdown) = crate::shutdown::channel();
    let watch =
        tokio::spawn(Arc::clone(&world.authenticator).watch(Rhythm::every(super::POLL_INTERVAL), shutdown.clone()));
    let hand_over = tokio::spawn(Arc::clone(world.authenticator.uses()).hand_over(shutdown));
    handle.shut_down();
    watch.await.unwrap();
    hand_over.await.unwrap();
}

#[tokio::test]
async fn a_key_is_asked_about_once_whatever_team_its_callers_name() {
    let world = World::new().await;
    for number in 0..10 {
        let team = format!("team_{number}");
        world.authenticator.authenticate(&world.token, Some(&team), Mode::Test).await.unwrap();
    }
    assert_eq!(world.lookups(), 1, "it has a team and a mode of its own");
}
