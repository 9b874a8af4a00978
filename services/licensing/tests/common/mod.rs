//! What the tests stand on: the assembled service, behind its policy, with catalog and webhook played by the test.

#![expect(dead_code, reason = "each test file uses its part")]

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use paperkey_kit::{
    channel::Channel,
    clock::{Clock, ManualClock},
    db::Database,
    policy::Guarded,
    principal::Signer,
    secrets::Keyring,
    service::{Channels, Rpcs, ServiceDeps},
    shutdown::{self, ShutdownHandle},
    testing::{self, TestDb},
};
use paperkey_licensing::{assemble_around, store::Store};
use paperkey_proto::{
    Error,
    catalog::v1::{
        self as catalog, Client, GetClientRequest, GetClientResponse, GetProductRequest, GetProductResponse, Product,
        catalog_service_server::{CatalogService, CatalogServiceServer},
        client_service_server::{ClientService, ClientServiceServer},
    },
    errors::v1::Reason,
    events::v1::{
        Event, IngestEventsRequest, IngestEventsResponse,
        intake_service_client::IntakeServiceClient,
        intake_service_server::{IntakeService, IntakeServiceServer},
    },
    licensing::v1::{
        ActivateLicenseRequest, CreateLicenseRequest, DeactivateLicenseRequest, License, ValidateLicenseRequest,
        ValidateLicenseResponse, license_check_service_client::LicenseCheckServiceClient,
        licensing_service_client::LicensingServiceClient,
    },
    options::v1::{Caller as Kind, Scope},
    principal::v1::{Mode, Principal, Role},
};
use prost_types::FieldMask;
use serde_json::Value;
use tokio::{sync::mpsc, task::JoinSet};
use tonic::{
    Request, Response, Status,
    body::Body,
    codegen::{Service, http},
};

pub(crate) const START_MS: i64 = 1_798_675_200_000;
pub(crate) const PRODUCT: &str = "prod_1";
pub(crate) const TEST_PRODUCT: &str = "prod_test";

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

/// A client of `team_1` in live mode, and one in test mode.
pub(crate) const CLIENT: &str = "cli_1";
pub(crate) const TEST_CLIENT: &str = "cli_2";

/// A catalogue of one product in each world of `team_1`, which counts who asks.
pub(crate) struct OneProduct(Arc<AtomicUsize>);

#[tonic::async_trait]
impl CatalogService for OneProduct {
    async fn get_product(&self, request: Request<GetProductRequest>) -> Result<Response<GetProductResponse>, Status> {
        self.0.fetch_add(1, Ordering::SeqCst);
        let tenant = paperkey_kit::principal::Caller::of(&request)?.tenant()?;
        let id = request.into_inner().id;
        let of_mode = if tenant.mode == Mode::Live { PRODUCT } else { TEST_PRODUCT };
        if id != of_mode || tenant.team_id != "team_1" {
            return Err(Error::not_found("product").into());
        }
        Ok(Response::new(GetProductResponse { product: Some(Product { id, ..Product::default() }) }))
    }

    async fn create_product(
        &self,
        _: Request<catalog::CreateProductRequest>,
    ) -> Result<Response<catalog::CreateProductResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn list_products(
        &self,
        _: Request<catalog::ListProductsRequest>,
    ) -> Result<Response<catalog::ListProductsResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn update_product(
        &self,
        _: Request<catalog::UpdateProductRequest>,
    ) -> Result<Response<catalog::UpdateProductResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn delete_product(
        &self,
        _: Request<catalog::DeleteProductRequest>,
    ) -> Result<Response<catalog::DeleteProductResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }
}

/// The customers of the same team. One of another team has no luck: the catalogue is down for it.
pub(crate) struct TwoClients;

#[tonic::async_trait]
impl ClientService for TwoClients {
    async fn get_client(&self, request: Request<GetClientRequest>) -> Result<Response<GetClientResponse>, Status> {
        let caller = paperkey_kit::principal::Caller::of(&request)?;
        let tenant = caller.tenant()?;
        assert_eq!((caller.principal.kind(), caller.principal.id.as_str()), (Kind::Service, "licensing"));
        let id = request.into_inner().id;
        if id == "cli_unlucky" {
            return Err(Error::unavailable("the catalogue is down").into());
        }
        let of_mode = if tenant.mode == Mode::Live { CLIENT } else { TEST_CLIENT };
        if id != of_mode || tenant.team_id != "team_1" {
            return Err(Error::not_found("client").into());
        }
        Ok(Response::new(GetClientResponse { client: Some(Client { id, ..Client::default() }) }))
    }

    async fn create_client(
        &self,
        _: Request<catalog::CreateClientRequest>,
    ) -> Result<Response<catalog::CreateClientResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn list_clients(
        &self,
        _: Request<catalog::ListClientsRequest>,
    ) -> Result<Response<catalog::ListClientsResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn update_client(
        &self,
        _: Request<catalog::UpdateClientRequest>,
    ) -> Result<Response<catalog::UpdateClientResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }

    async fn delete_client(
        &self,
        _: Request<catalog::DeleteClientRequest>,
    ) -> Result<Response<catalog::DeleteClientResponse>, Status> {
        Err(Status::unimplemented("not played"))
    }
}

/// A webhook service that hands what it takes over to the test.
pub(crate) struct Ears(mpsc::UnboundedSender<Event>);

#[tonic::async_trait]
impl IntakeService for Ears {
    async fn ingest_events(
        &self,
        request: Request<IngestEventsRequest>,
    ) -> Result<Response<IngestEventsResponse>, Status> {
        for event in request.into_inner().events {
            let _ = self.0.send(event);
        }
        Ok(Response::new(IngestEventsResponse {}))
    }
}

pub(crate) struct World {
    // The folder goes with it.
    db: Option<TestDb>,
    pub(crate) database: Database,
    pub(crate) store: Store,
    pub(crate) hand: ManualClock,
    pub(crate) signer: Signer,
    pub(crate) channel: Channel,
    pub(crate) asked: Arc<AtomicUsize>,
    pub(crate) events: mpsc::UnboundedReceiver<Event>,
    running: ShutdownHandle,
    workers: JoinSet<()>,
}

impl World {
    pub(crate) async fn new() -> Self {
        let db = TestDb::sqlite();
        let database = db.migrated::<paperkey_migrations::licensing::Migrator>().await;
        let mut world = Self::on(database);
        world.db = Some(db);
        world
    }

    /// The service on a database that another removes.
    pub(crate) fn on(database: Database) -> Self {
        let (clock, hand) = Clock::manual(START_MS);
        let keys = Keyring::for_tests();
        let signer = Signer::new(&keys, clock.clone());
        let asked = Arc::new(AtomicUsize::new(0));
        let (ears, events) = mpsc::unbounded_channel();

        let guarded = |rpcs| Guarded::new(rpcs, signer.clone(), clock.clone(), None, Some(database.clone()));
        let mut channels = Channels::default();
        for (name, rpcs) in [
            (
                "catalog",
                Rpcs::new(CatalogServiceServer::new(OneProduct(Arc::clone(&asked))))
                    .add_service(ClientServiceServer::new(TwoClients)),
            ),
            ("webhook", Rpcs::new(IntakeServiceServer::new(Ears(ears)))),
            // Takes no audit entries, which wait.
            ("auth", Rpcs::default()),
        ] {
            let channel = Channel::local();
            channel.bind(guarded(rpcs));
            channels.insert(name, channel);
        }
        let store = Store::new(database.clone(), &keys, clock.clone());
        let deps = ServiceDeps {
            database: database.clone(),
            keys: keys.clone(),
            clock: clock.clone(),
            signer: signer.clone(),
            channels,
        };
        let assembled = assemble_around(store.clone(), deps).unwrap();
        let channel = Channel::local();
        channel.bind(guarded(assembled.rpcs));
        let (running, shutdown) = shutdown::channel();
        let mut workers = JoinSet::new();
        for worker in assembled.workers {
            workers.spawn(worker.run(shutdown.clone()));
        }
        Self { db: None, database, store, hand, signer, channel, asked, events, running, workers }
    }

    /// The workers let go of the database before it is removed.
    pub(crate) async fn end(mut self) {
        self.running.shut_down();
        while self.workers.join_next().await.is_some() {}
    }

    /// Hands events over, as the relay of another service would.
    pub(crate) async fn ingest(&self, events: Vec<Event>) {
        let way = self.channel.as_service("catalog", self.signer.clone(), None);
        IntakeServiceClient::new(way).ingest_events(IngestEventsRequest { events }).await.unwrap();
    }

    pub(crate) fn way(&self, principal: Principal) -> As {
        As { channel: self.channel.clone(), signer: self.signer.clone(), principal }
    }

    pub(crate) fn vendor(&self, principal: Principal) -> LicensingServiceClient<As> {
        LicensingServiceClient::new(self.way(principal))
    }

    pub(crate) fn app(&self, principal: Principal) -> LicenseCheckServiceClient<As> {
        LicenseCheckServiceClient::new(self.way(principal))
    }

    pub(crate) async fn issue(&self, request: CreateLicenseRequest) -> License {
        let request = CreateLicenseRequest { product_id: PRODUCT.into(), ..request };
        self.vendor(owner()).create_license(request).await.unwrap().into_inner().license.unwrap()
    }

    pub(crate) async fn validate(&self, key: &str, fingerprint: Option<&str>) -> ValidateLicenseResponse {
        let answer = self.app(public_key()).validate_license(validation(key, fingerprint)).await;
        answer.unwrap().into_inner()
    }

    pub(crate) async fn event(&mut self) -> (String, Value) {
        let event = self.events.recv().await.unwrap();
        assert_eq!((event.team_id.as_str(), event.mode(), event.product_id.as_str()), ("team_1", Mode::Live, PRODUCT));
        (event.topic, serde_json::from_str(&event.data_json).unwrap())
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

pub(crate) fn public_key() -> Principal {
    Principal {
        kind: Kind::ProductPublicKey.into(),
        id: "key_1".into(),
        product_id: PRODUCT.into(),
        role: Role::Unspecified.into(),
        scopes: vec![Scope::LicensesCheck.into()],
        ..owner()
    }
}

pub(crate) fn secret_key(product_id: &str) -> Principal {
    Principal {
        kind: Kind::ProductSecretKey.into(),
        id: "key_2".into(),
        product_id: product_id.into(),
        role: Role::Unspecified.into(),
        scopes: vec![Scope::LicensesRead.into(), Scope::LicensesWrite.into()],
        ..owner()
    }
}

pub(crate) fn validation(key: &str, fingerprint: Option<&str>) -> ValidateLicenseRequest {
    ValidateLicenseRequest { license_key: key.into(), fingerprint: fingerprint.map(Into::into) }
}

pub(crate) fn activation(key: &str, fingerprint: &str) -> ActivateLicenseRequest {
    ActivateLicenseRequest { license_key: key.into(), fingerprint: fingerprint.into(), name: None }
}

pub(crate) fn deactivation(key: &str, fingerprint: &str) -> DeactivateLicenseRequest {
    DeactivateLicenseRequest { license_key: key.into(), fingerprint: fingerprint.into() }
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
