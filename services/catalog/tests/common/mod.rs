//! What the tests stand on: the assembled service, behind its policy, with the others played by the test.

#![expect(dead_code, reason = "each test file uses its part")]

use std::{
    sync::Arc,
    task::{Context, Poll},
};

use paperkey_kit::{
    channel::Channel,
    clock::{Clock, ManualClock},
    db::{Database, DbError},
    once::Once,
    policy::Guarded,
    principal::{Caller, Signer},
    secrets::Keyring,
    service::{Channels, Rpcs, ServiceDeps},
    shutdown::{self, ShutdownHandle},
    testing,
};
use paperkey_proto::{
    Error,
    auth::v1::{self as auth, ProductApiKey, credential_service_server as credentials},
    catalog::v1::{
        Client, CreateClientRequest, CreateProductRequest, GetClientRequest, GetProductRequest, Price, Product,
        UpdateProductRequest, catalog_service_client::CatalogServiceClient, client_service_client::ClientServiceClient,
    },
    errors::v1::Reason,
    events::v1::{
        Event, IngestEventsRequest, IngestEventsResponse,
        intake_service_client::IntakeServiceClient,
        intake_service_server::{IntakeService, IntakeServiceServer},
    },
    options::v1::Caller as Kind,
    principal::v1::{Mode, Once as Token, Principal, Role},
};
use prost_types::FieldMask;
use sea_orm::{ConnectionTrait as _, Statement};
use tokio::{sync::mpsc, task::JoinSet};
use tonic::{
    Request, Response, Status,
    body::Body,
    codegen::{Service, http},
};

pub(crate) const START_MS: i64 = 1_798_675_200_000;

/// A client's way to the service, which signs as the gateway would.
#[derive(Clone)]
pub(crate) struct As {
    channel: Channel,
    signer: Signer,
    principal: Principal,
}

impl Service<http::Request<Body>> for As {
    type Response = http::Response<Body>;
    type Error = Status;
    type Future = <Channel as Service<http::Request<Body>>>::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.channel.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        testing::call(self.channel.clone(), &self.signer, Some(&self.principal), "req_1", request)
    }
}

/// The same, of whoever sends the same call again and again.
#[derive(Clone)]
pub(crate) struct Again {
    way: As,
    once: Arc<Once>,
}

impl Service<http::Request<Body>> for Again {
    type Response = http::Response<Body>;
    type Error = Status;
    type Future = <Channel as Service<http::Request<Body>>>::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.way.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let (principal, once) = (Arc::new(self.way.principal.clone()), Some(Arc::clone(&self.once)));
        let caller = Caller { principal, request_id: "req_1".to_owned(), once };
        self.way.channel.call_as(caller, &self.way.signer, request)
    }
}

/// Those who keep something of a product, each under its name.
#[derive(Clone)]
pub(crate) struct Keeper(&'static str, mpsc::UnboundedSender<(&'static str, Event)>);

impl Keeper {
    pub(crate) fn take(&self, events: Vec<Event>) {
        for event in events {
            let _ = self.1.send((self.0, event));
        }
    }
}

#[tonic::async_trait]
impl IntakeService for Keeper {
    async fn ingest_events(
        &self,
        request: Request<IngestEventsRequest>,
    ) -> Result<Response<IngestEventsResponse>, Status> {
        self.take(request.into_inner().events);
        Ok(Response::new(IngestEventsResponse {}))
    }
}

/// Makes key pairs, except for the team that is out of luck. While it does so for the slow one, its draft goes.
pub(crate) struct Keys(Database);

#[tonic::async_trait]
impl credentials::CredentialService for Keys {
    async fn provision_product(
        &self,
        request: Request<auth::ProvisionProductRequest>,
    ) -> Result<Response<auth::ProvisionProductResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        assert_eq!((caller.principal.id.as_str(), caller.request_id.as_str()), ("catalog", "req_1"));
        assert_eq!((&request.team_id, request.mode()), (&caller.principal.team_id, caller.principal.mode()));
        if request.team_id == "team_unlucky" {
            return Err(Error::unavailable("the store of keys is down").into());
        }
        if request.team_id == "team_slow" {
            let taken = self.0.write(|tx| async move {
                tx.execute_unprepared("DELETE FROM drafts").await?;
                Ok::<_, DbError>(())
            });
            taken.await.map_err(Error::from)?;
        }
        Ok(Response::new(auth::ProvisionProductResponse {
            api_key: Some(ProductApiKey { id: format!("key_of_{}", request.product_id), ..ProductApiKey::default() }),
            secret_key: "sk_secret".into(),
        }))
    }

    async fn authenticate(
        &self,
        _: Request<auth::AuthenticateRequest>,
    ) -> Result<Response<auth::AuthenticateResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn record_incidents(
        &self,
        _: Request<auth::RecordIncidentsRequest>,
    ) -> Result<Response<auth::RecordIncidentsResponse>, Status> {
        Err(Status::unimplemented("not needed here"))
    }

    async fn record_key_uses(
        &self,
        _: Request<auth::RecordKeyUsesRequest>,
    ) -> Result<Response<auth::RecordKeyUsesResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn list_changes(
        &self,
        _: Request<auth::ListChangesRequest>,
    ) -> Result<Response<auth::ListChangesResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }
}

pub(crate) struct World {
    pub(crate) database: Database,
    pub(crate) hand: ManualClock,
    signer: Signer,
    channel: Channel,
    pub(crate) events: mpsc::UnboundedReceiver<(&'static str, Event)>,
    running: ShutdownHandle,
    workers: JoinSet<()>,
}

impl World {
    pub(crate) fn new(database: Database) -> Self {
        let (clock, hand) = Clock::manual(START_MS);
        let keys = Keyring::for_tests();
        let signer = Signer::new(&keys, clock.clone());
        let (sender, events) = mpsc::unbounded_channel();
        let guarded = |rpcs| Guarded::new(rpcs, signer.clone(), clock.clone(), None, Some(database.clone()));
        let keeper = |name| Keeper(name, sender.clone());
        let mut channels = Channels::default();
        for (name, rpcs) in [
            (
                "auth",
                Rpcs::new(credentials::CredentialServiceServer::new(Keys(database.clone())))
                    .add_service(IntakeServiceServer::new(keeper("auth"))),
            ),
            ("licensing", Rpcs::new(IntakeServiceServer::new(keeper("licensing")))),
            ("webhook", Rpcs::new(IntakeServiceServer::new(keeper("webhook")))),
        ] {
            let channel = Channel::local();
            channel.bind(guarded(rpcs));
            channels.insert(name, channel);
        }
        let (database_of_deps, signer_of_deps) = (database.clone(), signer.clone());
        let deps = ServiceDeps {
            database: database_of_deps,
            keys: keys.clone(),
            clock: clock.clone(),
            signer: signer_of_deps,
            channels,
        };
        let assembled = paperkey_catalog::assemble(deps).unwrap();
        let channel = Channel::local();
        channel.bind(guarded(assembled.rpcs));
        let (running, shutdown) = shutdown::channel();
        let mut workers = JoinSet::new();
        for worker in assembled.workers {
            workers.spawn(worker.run(shutdown.clone()));
        }
        Self { database, hand, signer, channel, events, running, workers }
    }

    pub(crate) fn by(&self, principal: Principal) -> CatalogServiceClient<As> {
        let (channel, signer) = (self.channel.clone(), self.signer.clone());
        CatalogServiceClient::new(As { channel, signer, principal })
    }

    /// The way of a caller whose calls are one call, by that number.
    pub(crate) fn way_of_once(&self, principal: Principal, number: u8) -> Again {
        let (channel, signer) = (self.channel.clone(), self.signer.clone());
        let token = Token { id: vec![number; 32], request_hash: vec![number; 32], seal_key: vec![number; 32] };
        Again { way: As { channel, signer, principal }, once: Arc::new(Once::new(token).unwrap()) }
    }

    pub(crate) async fn create(&self, request: CreateProductRequest) -> Product {
        self.by(owner()).create_product(request).await.unwrap().into_inner().product.unwrap()
    }

    pub(crate) async fn update(&self, request: UpdateProductRequest) -> Product {
        self.by(owner()).update_product(request).await.unwrap().into_inner().product.unwrap()
    }

    pub(crate) async fn get(&self, id: &str) -> Result<Product, Status> {
        let answer = self.by(owner()).get_product(GetProductRequest { id: id.into() }).await?;
        Ok(answer.into_inner().product.unwrap())
    }

    pub(crate) async fn count(&self, sql: &'static str) -> i64 {
        let job = self.database.read(move |reader| async move {
            let statement = Statement::from_string(reader.get_database_backend(), sql);
            let row = reader.query_one_raw(statement).await?.unwrap();
            Ok::<_, DbError>(row.try_get("", "n")?)
        });
        job.await.unwrap()
    }

    pub(crate) fn clients(&self, principal: Principal) -> ClientServiceClient<As> {
        let (channel, signer) = (self.channel.clone(), self.signer.clone());
        ClientServiceClient::new(As { channel, signer, principal })
    }

    pub(crate) async fn create_client(&self, request: CreateClientRequest) -> Client {
        self.clients(owner()).create_client(request).await.unwrap().into_inner().client.unwrap()
    }

    pub(crate) async fn get_client(&self, id: &str) -> Result<Client, Status> {
        let answer = self.clients(owner()).get_client(GetClientRequest { id: id.into() }).await?;
        Ok(answer.into_inner().client.unwrap())
    }

    /// Hands events over, as the relay of another service would.
    pub(crate) async fn ingest(&self, events: Vec<Event>) {
        let way = self.channel.as_service("auth", self.signer.clone(), None);
        IntakeServiceClient::new(way).ingest_events(IngestEventsRequest { events }).await.unwrap();
    }

    /// The workers let go of the database before it is removed.
    pub(crate) async fn end(mut self) {
        self.running.shut_down();
        while self.workers.join_next().await.is_some() {}
    }
}

pub(crate) fn owner() -> Principal {
    Principal {
        kind: Kind::Account.into(),
        id: "usr_1".into(),
        team_id: "team_1".into(),
        mode: Mode::Live.into(),
        role: Role::Owner.into(),
        ..Principal::default()
    }
}

pub(crate) fn named(name: &str) -> CreateProductRequest {
    CreateProductRequest { name: name.into(), ..CreateProductRequest::default() }
}

pub(crate) fn price(amount: i64, currency: &str) -> Price {
    Price { amount, currency: currency.into() }
}

pub(crate) fn mask(paths: &[&str]) -> FieldMask {
    FieldMask { paths: paths.iter().map(ToString::to_string).collect() }
}

pub(crate) fn refused<T: std::fmt::Debug>(outcome: Result<T, Status>) -> Error {
    Error::from_status(&outcome.unwrap_err())
}

pub(crate) fn reason<T: std::fmt::Debug>(outcome: Result<T, Status>) -> Reason {
    refused(outcome).reason()
}
