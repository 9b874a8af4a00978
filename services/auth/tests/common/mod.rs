//! The service as others reach it: its assembled routes behind the policy, called as whoever a test says.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use http::Request as HttpRequest;
use paperkey_auth::{
    AuthConfig, Mail,
    admin::{Admin, Existing, Rotates},
    assemble,
};
use paperkey_kit::{
    cache::{Epochs, VersionedCache},
    channel::{Channel, ServiceChannel},
    config::Tiers,
    db::Database,
    policy::Guarded,
    principal::Signer,
    secrets::{Keyring, Secret},
    service::{Assembled, Channels, ServiceDeps, Worker},
    shutdown, testing,
};
use paperkey_proto::{
    Error,
    auth::v1::{
        AuthenticateRequest, CreateProductApiKeyRequest, CreateProductApiKeyResponse, DeleteProductApiKeyRequest,
        GetMeRequest, GetMeResponse, GetStatusRequest, GetStatusResponse, ListChangesRequest, ListChangesResponse,
        ListProductApiKeysRequest, ListProductApiKeysResponse, LoginRequest, LoginResponse, ProvisionProductRequest,
        ProvisionProductResponse, RegisterRequest, RegisterResponse, auth_service_client::AuthServiceClient,
        credential_service_client::CredentialServiceClient, product_api_key_service_client::ProductApiKeyServiceClient,
        status_service_client::StatusServiceClient,
    },
    errors::v1::Reason,
    events::v1::{Event, IngestEventsRequest, intake_service_client::IntakeServiceClient},
    principal::v1::{Mode, Principal},
};
use tempfile::TempDir;
use tonic::{Response, Status, body::Body};
use tower::Service;

/// The password of every account here.
pub(crate) const PASSWORD: &str = "correct horse battery";

/// A running service, and the means to call it.
pub(crate) struct App {
    pub(crate) database: Database,
    keys: Keyring,
    epochs: Arc<Epochs>,
    pub(crate) admin: Admin,
    channel: Channel,
    signer: Signer,
    pub(crate) tiers: Arc<Tiers>,
    mails: TempDir,
    slack: Option<Secret>,
    workers: Mutex<Vec<Worker>>,
    /// Where the head of the audit log is kept.
    pub(crate) kept: TempDir,
}

/// The way in as somebody: what the gateway is, cut down to its signature.
#[derive(Clone)]
pub(crate) struct Signed {
    channel: Channel,
    signer: Signer,
    principal: Option<Principal>,
}

impl Service<HttpRequest<Body>> for Signed {
    type Response = <Channel as Service<HttpRequest<Body>>>::Response;
    type Error = Status;
    type Future = <Channel as Service<HttpRequest<Body>>>::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.channel.poll_ready(context)
    }

    fn call(&mut self, request: HttpRequest<Body>) -> Self::Future {
        testing::call(self.channel.clone(), &self.signer, self.principal.as_ref(), "req_test", request)
    }
}

/// A principal in a cache.
pub(crate) struct Remembered {
    cache: VersionedCache<u8, ()>,
    epochs: Arc<Epochs>,
}

impl Remembered {
    /// Whether the cache would still serve it.
    pub(crate) fn is_served(&self) -> bool {
        self.cache.get(&self.epochs, &1).is_some()
    }
}

impl App {
    /// The service on that database.
    pub(crate) fn new(database: Database) -> Self {
        Self::with_registration(database, true)
    }

    /// The service on that database, open to everyone or closed.
    pub(crate) fn with_registration(database: Database, registration_open: bool) -> Self {
        Self::with_keys(database, registration_open, &Keyring::for_tests())
    }

    /// The service on that database, with these keys of the installation.
    pub(crate) fn with_keys(database: Database, registration_open: bool, keys: &Keyring) -> Self {
        Self::with(database, registration_open, keys, Arc::default(), None)
    }

    /// The service on that database, with these tiers.
    pub(crate) fn with_tiers(database: Database, registration_open: bool, keys: &Keyring, tiers: Arc<Tiers>) -> Self {
        Self::with(database, registration_open, keys, tiers, None)
    }

    /// The service on that database, whose alerts are told to that webhook of Slack's.
    pub(crate) fn with_slack(database: Database, url: &str) -> Self {
        Self::with(database, true, &Keyring::for_tests(), Arc::default(), Some(Secret::new(url)))
    }

    fn with(
        database: Database,
        registration_open: bool,
        keys: &Keyring,
        tiers: Arc<Tiers>,
        slack: Option<Secret>,
    ) -> Self {
        let clock = database.clock().clone();
        let signer = Signer::new(keys, clock.clone());
        let epochs = Arc::new(Epochs::default());
        let mails = TempDir::with_prefix("paperkey-mails-").unwrap();
        let kept = TempDir::with_prefix("paperkey-kept-").unwrap();
        let channel = Channel::local();
        let config = config(&tiers, (&mails, &kept), &epochs, registration_open, slack.as_ref());
        let assembled = assembled(&database, keys, &signer, &channel, config);
        channel.bind(Guarded::new(assembled.rpcs, signer.clone(), clock, None, Some(database.clone())));
        let admin = Admin::new(database.clone(), keys, Arc::clone(&epochs)).unwrap();
        let workers = Mutex::new(assembled.workers);
        Self { database, keys: keys.clone(), epochs, admin, channel, signer, tiers, mails, kept, slack, workers }
    }

    /// One round of what this very process does besides answering, of what it has in its memory. Once for each worker.
    pub(crate) async fn run_own(&self, worker: &str) {
        let (handle, shutdown) = shutdown::channel();
        handle.shut_down();
        let own = {
            let mut workers = self.workers.lock().unwrap();
            let at = workers.iter().position(|present| present.name == worker).unwrap();
            workers.swap_remove(at)
        };
        own.run(shutdown).await;
    }

    /// One round of what the service does besides answering.
    pub(crate) async fn run_once(&self, worker: &str) {
        let (handle, shutdown) = shutdown::channel();
        // A worker that is told to end does what is at hand, and ends.
        handle.shut_down();
        let folders = (&self.mails, &self.kept);
        let config = config(&self.tiers, folders, &self.epochs, true, self.slack.as_ref());
        let assembled = assembled(&self.database, &self.keys, &self.signer, &self.channel, config);
        let worker = assembled.workers.into_iter().find(|present| present.name == worker).unwrap();
        worker.run(shutdown).await;
    }

    /// What was mailed since the last look, in the order of sending.
    pub(crate) async fn mails(&self) -> Vec<String> {
        self.run_once("auth/mail").await;
        let Ok(folder) = std::fs::read_dir(self.mails.path()) else { return Vec::new() };
        let mut files: Vec<_> = folder.map(|entry| entry.unwrap().path()).collect();
        files.sort();
        let read = |path| {
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::remove_file(path).unwrap();
            text
        };
        files.into_iter().map(read).collect()
    }

    /// A system key, where there is none.
    pub(crate) async fn system_key(&self) -> Secret {
        put_system_key(&self.admin, Existing::Stays).await.unwrap().unwrap()
    }

    /// The way in as another service.
    pub(crate) fn service(&self) -> ServiceChannel {
        self.channel.as_service("catalog", self.signer.clone(), None)
    }

    /// The way in as a principal, or as nobody.
    pub(crate) fn signed(&self, principal: Option<&Principal>) -> Signed {
        Signed { channel: self.channel.clone(), signer: self.signer.clone(), principal: principal.cloned() }
    }

    /// A cache of this process, such as a gateway's, that holds this principal.
    pub(crate) fn remember(&self, principal: &Principal) -> Remembered {
        let cache = VersionedCache::new(10);
        let subjects = principal.subjects.iter().map(String::as_str);
        cache.insert(&self.epochs, 1, (), subjects, self.epochs.now());
        Remembered { cache, epochs: Arc::clone(&self.epochs) }
    }

    pub(crate) async fn register(&self, request: RegisterRequest) -> Result<RegisterResponse, Error> {
        answer(AuthServiceClient::new(self.signed(None)).register(request).await)
    }

    /// An account of that email, with [`PASSWORD`].
    pub(crate) async fn registered(&self, email: &str) -> RegisterResponse {
        self.register(registration(email)).await.unwrap()
    }

    pub(crate) async fn login(&self, email: &str, password: &str) -> Result<LoginResponse, Error> {
        let request = LoginRequest { email: email.to_owned(), password: password.to_owned() };
        answer(AuthServiceClient::new(self.signed(None)).login(request).await)
    }

    pub(crate) async fn me(&self, principal: &Principal) -> Result<GetMeResponse, Error> {
        answer(AuthServiceClient::new(self.signed(Some(principal))).get_me(GetMeRequest {}).await)
    }

    pub(crate) async fn status(&self, principal: Option<&Principal>) -> Result<GetStatusResponse, Error> {
        answer(StatusServiceClient::new(self.signed(principal)).get_status(GetStatusRequest {}).await)
    }

    pub(crate) async fn authenticate(&self, credential: &str) -> Result<Principal, Error> {
        self.authenticate_in(credential, "", Mode::Unspecified).await
    }

    pub(crate) async fn authenticate_in(&self, credential: &str, team: &str, mode: Mode) -> Result<Principal, Error> {
        let request =
            AuthenticateRequest { credential: credential.to_owned(), team_id: team.to_owned(), mode: mode.into() };
        let answer = answer(CredentialServiceClient::new(self.service()).authenticate(request).await)?;
        Ok(answer.principal.unwrap())
    }

    pub(crate) async fn provision(
        &self,
        product: &str,
        team: &str,
        mode: Mode,
    ) -> Result<ProvisionProductResponse, Error> {
        let request =
            ProvisionProductRequest { product_id: product.to_owned(), team_id: team.to_owned(), mode: mode.into() };
        answer(CredentialServiceClient::new(self.service()).provision_product(request).await)
    }

    pub(crate) async fn changes(&self, since: i64) -> ListChangesResponse {
        answer(CredentialServiceClient::new(self.service()).list_changes(ListChangesRequest { since }).await).unwrap()
    }

    pub(crate) async fn ingest(&self, events: Vec<Event>) -> Result<(), Error> {
        answer(IntakeServiceClient::new(self.service()).ingest_events(IngestEventsRequest { events }).await).map(drop)
    }

    pub(crate) async fn create_pair(
        &self,
        principal: &Principal,
        product: &str,
    ) -> Result<CreateProductApiKeyResponse, Error> {
        let request = CreateProductApiKeyRequest { product_id: product.to_owned() };
        answer(self.pairs_client(principal).create_product_api_key(request).await)
    }

    pub(crate) async fn list_pairs(
        &self,
        principal: &Principal,
        product: &str,
        page_size: Option<i32>,
        page_token: &str,
    ) -> Result<ListProductApiKeysResponse, Error> {
        let request =
            ListProductApiKeysRequest { product_id: product.to_owned(), page_size, page_token: page_token.to_owned() };
        answer(self.pairs_client(principal).list_product_api_keys(request).await)
    }

    pub(crate) async fn delete_pair(&self, principal: &Principal, product: &str, key: &str) -> Result<(), Error> {
        let request = DeleteProductApiKeyRequest { product_id: product.to_owned(), key_id: key.to_owned() };
        answer(self.pairs_client(principal).delete_product_api_key(request).await).map(drop)
    }

    fn pairs_client(&self, principal: &Principal) -> ProductApiKeyServiceClient<Signed> {
        ProductApiKeyServiceClient::new(self.signed(Some(principal)))
    }
}

/// A new system key, if it was stored.
pub(crate) async fn put_system_key(admin: &Admin, existing: Existing) -> Result<Option<Secret>, Error> {
    let draft = admin.draft_system_key(Rotates::ByHand);
    let token = draft.token().clone();
    Ok(admin.put_system_key(draft, existing).await?.then_some(token))
}

fn assembled(database: &Database, keys: &Keyring, signer: &Signer, own: &Channel, config: AuthConfig) -> Assembled {
    let mut channels = Channels::default();
    channels.insert("auth", own.clone());
    for other in ["catalog", "licensing", "webhook"] {
        channels.insert(other, Channel::local());
    }
    let deps = ServiceDeps {
        database: database.clone(),
        keys: keys.clone(),
        clock: database.clock().clone(),
        signer: signer.clone(),
        channels,
    };
    assemble(deps, config).unwrap()
}

fn config(
    tiers: &Arc<Tiers>,
    (mails, kept): (&TempDir, &TempDir),
    epochs: &Arc<Epochs>,
    registration_open: bool,
    slack: Option<&Secret>,
) -> AuthConfig {
    AuthConfig {
        registration_open,
        version: "1.2.3",
        epochs: Arc::clone(epochs),
        public_url: "https://paperkey.example.com".to_owned(),
        mail: Mail::new(None, "Paperkey <paperkey@example.com>", mails.path().to_owned()).unwrap(),
        tiers: Arc::clone(tiers),
        slack_webhook_url: slack.cloned(),
        audit_retention_days: 90,
        audit_folder: kept.path().to_owned(),
    }
}

pub(crate) fn registration(email: &str) -> RegisterRequest {
    RegisterRequest { email: email.to_owned(), password: PASSWORD.to_owned(), name: None }
}

/// An id that is not used elsewhere in the test.
pub(crate) fn fresh(prefix: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{prefix}_{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

pub(crate) fn answer<T>(outcome: Result<Response<T>, Status>) -> Result<T, Error> {
    outcome.map(Response::into_inner).map_err(|status| Error::from_status(&status))
}

/// The reason of a refusal.
pub(crate) fn reason<T>(outcome: Result<T, Error>) -> Reason {
    match outcome {
        Ok(_) => panic!("it was not refused"),
        Err(error) => error.reason(),
    }
}

/// Reason and message of a refusal.
pub(crate) fn refusal<T>(outcome: Result<T, Error>) -> (Reason, String) {
    match outcome {
        Ok(_) => panic!("it was not refused"),
        Err(error) => (error.reason(), error.message().to_owned()),
    }
}
