//! The service as its callers meet it: assembled, behind its policy, with catalog and webhook played by the test.

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
    principal::{PRINCIPAL_HEADER, Signer},
    secrets::Keyring,
    service::{Channels, Rpcs, ServiceDeps},
    shutdown::{self, ShutdownHandle},
    testing::TestDb,
    values::{struct_of, timestamp},
};
use paperkey_licensing::{assemble_around, domain::license_key::LicenseKey, store::Store};
use paperkey_proto::{
    Error,
    catalog::v1::{
        self as catalog, GetProductRequest, GetProductResponse, Product,
        catalog_service_server::{CatalogService, CatalogServiceServer},
    },
    errors::v1::Reason,
    events::v1::Event,
    licensing::v1::{
        self as licensing, ActivateLicenseRequest, CreateLicenseRequest, DeactivateLicenseRequest,
        DeleteActivationRequest, GetLicenseRequest, License, LicenseStatus, ListLicensesRequest,
        ReinstateLicenseRequest, RevokeLicenseRequest, UpdateLicenseRequest, ValidateLicenseRequest,
        ValidateLicenseResponse, ValidationCode, intake_service_client::IntakeServiceClient,
        license_check_service_client::LicenseCheckServiceClient, licensing_service_client::LicensingServiceClient,
    },
    options::v1::{Caller as Kind, Scope},
    principal::v1::{Mode, Principal, Role},
    webhook::v1::{
        self as webhook,
        intake_service_server::{IntakeService, IntakeServiceServer},
    },
};
use prost_types::FieldMask;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tonic::{
    Request, Response, Status,
    body::Body,
    codegen::{Service, http},
};

const START_MS: i64 = 1_798_675_200_000;
const PRODUCT: &str = "prod_1";

/// A client's way to the service, which signs as the gateway would.
#[derive(Clone)]
struct As {
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

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        let assertion = self.signer.sign(Some(&self.principal), request.uri().path(), "req_1");
        request.headers_mut().insert(PRINCIPAL_HEADER, assertion);
        self.channel.call(request)
    }
}

/// A catalogue of one product, which counts who asks.
struct OneProduct(Arc<AtomicUsize>);

#[tonic::async_trait]
impl CatalogService for OneProduct {
    async fn get_product(&self, request: Request<GetProductRequest>) -> Result<Response<GetProductResponse>, Status> {
        self.0.fetch_add(1, Ordering::SeqCst);
        let tenant = paperkey_kit::principal::Caller::of(&request)?.tenant()?;
        let id = request.into_inner().id;
        if id != PRODUCT || tenant.team_id != "team_1" || tenant.mode != Mode::Live {
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

/// A webhook service that hands what it takes over to the test.
struct Ears(mpsc::UnboundedSender<Event>);

#[tonic::async_trait]
impl IntakeService for Ears {
    async fn ingest_events(
        &self,
        request: Request<webhook::IngestEventsRequest>,
    ) -> Result<Response<webhook::IngestEventsResponse>, Status> {
        for event in request.into_inner().events {
            let _ = self.0.send(event);
        }
        Ok(Response::new(webhook::IngestEventsResponse {}))
    }
}

struct World {
    // The folder goes with it.
    _db: TestDb,
    database: Database,
    store: Store,
    hand: ManualClock,
    signer: Signer,
    channel: Channel,
    asked: Arc<AtomicUsize>,
    events: mpsc::UnboundedReceiver<Event>,
    _running: ShutdownHandle,
}

impl World {
    async fn new() -> Self {
        let db = TestDb::sqlite();
        let database = db.migrated::<paperkey_migrations::licensing::Migrator>().await;
        let (clock, hand) = Clock::manual(START_MS);
        let keys = Keyring::for_tests();
        let signer = Signer::new(&keys, clock.clone());
        let asked = Arc::new(AtomicUsize::new(0));
        let (ears, events) = mpsc::unbounded_channel();

        let guarded = |rpcs| Guarded::new(rpcs, signer.clone(), clock.clone(), None);
        let mut channels = Channels::default();
        for (name, rpcs) in [
            ("catalog", Rpcs::new(CatalogServiceServer::new(OneProduct(Arc::clone(&asked))))),
            ("webhook", Rpcs::new(IntakeServiceServer::new(Ears(ears)))),
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
        for worker in assembled.workers {
            tokio::spawn(worker.run(shutdown.clone()));
        }
        Self { _db: db, database, store, hand, signer, channel, asked, events, _running: running }
    }

    fn way(&self, principal: Principal) -> As {
        As { channel: self.channel.clone(), signer: self.signer.clone(), principal }
    }

    fn vendor(&self, principal: Principal) -> LicensingServiceClient<As> {
        LicensingServiceClient::new(self.way(principal))
    }

    fn app(&self, principal: Principal) -> LicenseCheckServiceClient<As> {
        LicenseCheckServiceClient::new(self.way(principal))
    }

    async fn issue(&self, request: CreateLicenseRequest) -> License {
        let request = CreateLicenseRequest { product_id: PRODUCT.into(), ..request };
        self.vendor(owner()).create_license(request).await.unwrap().into_inner().license.unwrap()
    }

    async fn validate(&self, key: &str, fingerprint: Option<&str>) -> ValidateLicenseResponse {
        let answer = self.app(public_key()).validate_license(validation(key, fingerprint)).await;
        answer.unwrap().into_inner()
    }

    async fn event(&mut self) -> (String, Value) {
        let event = self.events.recv().await.unwrap();
        assert_eq!((event.team_id.as_str(), event.mode(), event.product_id.as_str()), ("team_1", Mode::Live, PRODUCT));
        (event.topic, serde_json::from_str(&event.data_json).unwrap())
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

fn public_key() -> Principal {
    Principal {
        kind: Kind::ProductPublicKey.into(),
        id: "key_1".into(),
        product_id: PRODUCT.into(),
        role: Role::Unspecified.into(),
        scopes: vec![Scope::LicensesCheck.into()],
        ..owner()
    }
}

fn secret_key(product_id: &str) -> Principal {
    Principal {
        kind: Kind::ProductSecretKey.into(),
        id: "key_2".into(),
        product_id: product_id.into(),
        role: Role::Unspecified.into(),
        scopes: vec![Scope::LicensesRead.into(), Scope::LicensesWrite.into()],
        ..owner()
    }
}

fn validation(key: &str, fingerprint: Option<&str>) -> ValidateLicenseRequest {
    ValidateLicenseRequest { license_key: key.into(), fingerprint: fingerprint.map(Into::into) }
}

fn activation(key: &str, fingerprint: &str) -> ActivateLicenseRequest {
    ActivateLicenseRequest { license_key: key.into(), fingerprint: fingerprint.into(), name: None }
}

fn deactivation(key: &str, fingerprint: &str) -> DeactivateLicenseRequest {
    DeactivateLicenseRequest { license_key: key.into(), fingerprint: fingerprint.into() }
}

fn mask(paths: &[&str]) -> FieldMask {
    FieldMask { paths: paths.iter().map(ToString::to_string).collect() }
}

fn refused<T: std::fmt::Debug>(outcome: Result<T, Status>) -> Error {
    Error::from_status(&outcome.unwrap_err())
}

fn reason<T: std::fmt::Debug>(outcome: Result<T, Status>) -> Reason {
    refused(outcome).reason()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_licence_lives_from_its_issue_to_its_end() {
    const END: &str = "2026-12-31T00:01:00.000Z";
    let mut world = World::new().await;
    let license = world
        .issue(CreateLicenseRequest {
            email: Some("Ann@Example.com".into()),
            expires_at: Some(timestamp(START_MS + 60_000)),
            metadata: struct_of(&json!({"plan": "pro"})),
            ..CreateLicenseRequest::default()
        })
        .await;
    assert_eq!((license.max_activations, license.status()), (Some(1), LicenseStatus::Active));
    let data = |status: &str, max: Value, expires_at: &str| {
        json!({
            "id": license.id, "key": license.key, "email": "Ann@Example.com", "productId": PRODUCT, "status": status,
            "maxActivations": max, "expiresAt": expires_at, "metadata": {"plan": "pro"},
        })
    };
    assert_eq!(world.event().await, ("license.created".into(), data("active", json!(1), END)));

    let valid = world.validate(&license.key.to_lowercase(), Some("fp")).await;
    assert!(valid.valid && valid.code() == ValidationCode::Valid);
    let found = valid.license.unwrap();
    assert_eq!((found.id.as_str(), found.status()), (license.id.as_str(), LicenseStatus::Active));
    assert_eq!((found.activations_count, found.activations_limit, found.is_activated), (0, Some(1), Some(false)));
    assert_eq!(found.metadata, struct_of(&json!({"plan": "pro"})));
    assert_eq!(world.validate(&license.key, None).await.license.unwrap().is_activated, None);

    let mut app = world.app(public_key());
    let activated = app.activate_license(activation(&license.key, "fp")).await.unwrap().into_inner();
    assert!(activated.success && activated.activations_remaining == Some(0));
    let made = activated.activation.unwrap();
    assert_eq!(made.created_at, Some(timestamp(START_MS)));
    let told = json!({
        "id": made.id, "licenseId": license.id, "licenseKey": license.key, "fingerprint": "fp", "name": null,
        "createdAt": "2026-12-31T00:00:00.000Z",
    });
    assert_eq!(world.event().await, ("activation.created".into(), told.clone()));
    assert_eq!(world.validate(&license.key, Some("fp")).await.license.unwrap().is_activated, Some(true));
    assert_eq!(world.validate(&license.key, Some("other")).await.code(), ValidationCode::ActivationLimitReached);
    assert_eq!(reason(app.activate_license(activation(&license.key, "other")).await), Reason::ActivationLimitReached);

    let mut vendor = world.vendor(owner());
    let id = license.id.clone();
    let update = UpdateLicenseRequest {
        id: id.clone(),
        update_mask: Some(mask(&["max_activations"])),
        ..UpdateLicenseRequest::default()
    };
    let updated = vendor.update_license(update).await.unwrap().into_inner().license.unwrap();
    assert_eq!((updated.max_activations, updated.email.as_deref()), (None, Some("Ann@Example.com")));
    assert_eq!(world.event().await, ("license.updated".into(), data("active", Value::Null, END)));
    let again = app.activate_license(activation(&license.key, "fp")).await.unwrap().into_inner();
    assert_eq!((again.activations_remaining, again.activation.unwrap().id), (None, made.id.clone()));

    vendor.revoke_license(RevokeLicenseRequest { id: id.clone() }).await.unwrap();
    assert_eq!(world.validate(&license.key, None).await.code(), ValidationCode::Revoked);
    assert_eq!(world.event().await, ("license.revoked".into(), data("revoked", Value::Null, END)));
    assert_eq!(reason(app.activate_license(activation(&license.key, "fp")).await), Reason::LicenseRevoked);
    let gone = app.deactivate_license(deactivation(&license.key, "fp")).await.unwrap().into_inner();
    assert!(gone.success && gone.activations_remaining.is_none());
    assert_eq!(world.event().await, ("activation.removed".into(), told));
    assert_eq!(reason(app.deactivate_license(deactivation(&license.key, "fp")).await), Reason::NotFound);
    vendor.reinstate_license(ReinstateLicenseRequest { id: id.clone() }).await.unwrap();
    assert_eq!(world.event().await, ("license.reinstated".into(), data("active", Value::Null, END)));

    world.hand.advance_ms(60_000);
    let (mut app, mut vendor) = (world.app(public_key()), world.vendor(owner()));
    let expired = world.validate(&license.key, None).await;
    assert_eq!((expired.valid, expired.code()), (false, ValidationCode::Expired));
    assert_eq!(expired.license.unwrap().status(), LicenseStatus::Expired);
    assert_eq!(reason(app.activate_license(activation(&license.key, "fp")).await), Reason::LicenseExpired);
    // The sweep may have come by itself: told once is once.
    world.store.expire_due().await.unwrap();
    assert_eq!(world.event().await, ("license.expired".into(), data("expired", Value::Null, END)));
    assert_eq!(world.store.expire_due().await.unwrap(), 0);

    let got = vendor.get_license(GetLicenseRequest { id }).await.unwrap().into_inner();
    assert_eq!((got.license.unwrap().status(), got.activations.len()), (LicenseStatus::Expired, 0));
    assert!(world.events.try_recv().is_err(), "nothing else was told");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_warm_validation_asks_no_database_and_a_revocation_is_seen_at_once() {
    let world = World::new().await;
    let license = world.issue(CreateLicenseRequest::default()).await;
    for _ in 0..2 {
        assert!(world.validate(&license.key, Some("fp")).await.valid);
    }
    let jobs = |database: &Database| (database.stats().read_jobs, database.stats().write_jobs);
    // The workers look at the database by themselves now and then, so one quiet round among several is asked for.
    let mut quiet = false;
    for _ in 0..50 {
        let before = jobs(&world.database);
        for _ in 0..10 {
            assert!(world.validate(&license.key, Some("fp")).await.valid);
        }
        quiet |= jobs(&world.database) == before;
    }
    assert!(quiet);
    let mut vendor = world.vendor(owner());
    for _ in 0..10 {
        vendor.revoke_license(RevokeLicenseRequest { id: license.id.clone() }).await.unwrap();
        assert_eq!(world.validate(&license.key, Some("fp")).await.code(), ValidationCode::Revoked);
        vendor.reinstate_license(ReinstateLicenseRequest { id: license.id.clone() }).await.unwrap();
        assert_eq!(world.validate(&license.key, Some("fp")).await.code(), ValidationCode::Valid);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mistyped_key_is_refused_with_what_was_meant() {
    let world = World::new().await;
    let mut app = world.app(public_key());
    for (key, hint) in [
        ("K7WX9-M3NP4-H8TRC-DK", "did you mean K7WX9-M3NP4-H8TRC-DJ?"),
        ("K7WX9-M3NP4-H8TRC-D", "17 characters"),
        ("K7WX9-M3NP4-H8TRC-D*", "no license key has"),
        ("K7WX9-M3NP4-H8TRC-D\0", "NUL"),
    ] {
        let refusals = [
            refused(app.validate_license(validation(key, None)).await),
            refused(app.activate_license(activation(key, "fp")).await),
            refused(app.deactivate_license(deactivation(key, "fp")).await),
        ];
        for refusal in refusals {
            assert_eq!((refusal.reason(), refusal.violations().len()), (Reason::ValidationFailed, 1));
            let violation = &refusal.violations()[0];
            assert_eq!(violation.field, "license_key");
            assert!(violation.message.contains(hint), "{}", violation.message);
        }
    }
    let intact = LicenseKey::random().to_string();
    let answer = world.validate(&intact, Some("fp")).await;
    assert_eq!((answer.valid, answer.code(), answer.license), (false, ValidationCode::NotFound, None));
    assert_eq!(reason(app.activate_license(activation(&intact, "fp")).await), Reason::NotFound);
    assert_eq!(reason(app.deactivate_license(deactivation(&intact, "fp")).await), Reason::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_is_refused_by_name() {
    let world = World::new().await;
    let license = world.issue(CreateLicenseRequest::default()).await;
    let (mut app, mut vendor) = (world.app(public_key()), world.vendor(owner()));
    let long = "x".repeat(256);
    for fingerprint in ["", "a\0b", &long] {
        let refusals = [
            refused(app.validate_license(validation(&license.key, Some(fingerprint))).await),
            refused(app.activate_license(activation(&license.key, fingerprint)).await),
            refused(app.deactivate_license(deactivation(&license.key, fingerprint)).await),
        ];
        for refusal in refusals {
            assert_eq!(refusal.violations()[0].field, "fingerprint");
        }
    }
    // 255 characters are not 255 bytes.
    let wide = "é".repeat(255);
    assert!(app.activate_license(activation(&license.key, &wide)).await.is_ok());

    let create = |change: fn(&mut CreateLicenseRequest)| {
        let mut request = CreateLicenseRequest { product_id: PRODUCT.into(), ..CreateLicenseRequest::default() };
        change(&mut request);
        request
    };
    for (request, field) in [
        (create(|r| r.product_id = String::new()), "product_id"),
        (create(|r| r.email = Some("nobody".into())), "email"),
        (create(|r| r.max_activations = Some(-1)), "max_activations"),
        (create(|r| r.expires_at = Some(timestamp(-1))), "expires_at"),
        (create(|r| r.client_id = Some("\0".into())), "client_id"),
        (create(|r| r.metadata = struct_of(&json!({"a": "x".repeat(20_000)}))), "metadata"),
        (create(|r| r.field_mask = Some(mask(&["team_id"]))), "team_id"),
    ] {
        let refusal = refused(vendor.create_license(request).await);
        assert_eq!(refusal.violations()[0].field, field);
    }
    for query in ["\0", "a\0"] {
        let list = ListLicensesRequest { query: Some(query.into()), ..ListLicensesRequest::default() };
        assert_eq!(refused(vendor.list_licenses(list).await).violations()[0].field, "query");
    }
    let unknown_status = ListLicensesRequest { status: 77, ..ListLicensesRequest::default() };
    assert_eq!(refused(vendor.list_licenses(unknown_status).await).violations()[0].field, "status");
    for id in ["", "\0", "lic_none", "'; DROP TABLE licenses --"] {
        let outcome = vendor.get_license(GetLicenseRequest { id: id.into() }).await;
        let expected = if ["", "\0"].contains(&id) { Reason::ValidationFailed } else { Reason::NotFound };
        assert_eq!(reason(outcome), expected, "{id:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_creation_names_what_it_wants_and_one_without_names_has_one_slot() {
    let world = World::new().await;
    let slots = |max_activations, field_mask| {
        let request = CreateLicenseRequest { max_activations, field_mask, ..CreateLicenseRequest::default() };
        async { world.issue(request).await.max_activations }
    };
    assert_eq!(slots(None, None).await, Some(1));
    assert_eq!(slots(None, Some(mask(&["product_id"]))).await, Some(1));
    assert_eq!(slots(None, Some(mask(&["product_id", "max_activations"]))).await, None);
    assert_eq!(slots(Some(7), Some(mask(&["max_activations"]))).await, Some(7));
    assert_eq!(slots(Some(0), None).await, Some(0));
    assert_eq!(world.asked.load(Ordering::SeqCst), 1, "catalog is asked once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_foreign_team_mode_or_product_meets_only_absence() {
    let world = World::new().await;
    let license = world.issue(CreateLicenseRequest::default()).await;
    let made = world.app(public_key()).activate_license(activation(&license.key, "fp")).await.unwrap().into_inner();
    let (id, activation_id) = (license.id.clone(), made.activation.unwrap().id);
    assert!(world.validate(&license.key, Some("fp")).await.valid);

    let test_mode = |principal| Principal { mode: Mode::Test.into(), ..principal };
    let other_team = |principal| Principal { team_id: "team_2".into(), ..principal };
    for principal in [test_mode(owner()), other_team(owner()), secret_key("prod_2"), test_mode(secret_key(PRODUCT))] {
        let mut vendor = world.vendor(principal);
        let create = CreateLicenseRequest { product_id: PRODUCT.into(), ..CreateLicenseRequest::default() };
        let update = UpdateLicenseRequest { id: id.clone(), email: Some("a@b.cd".into()), ..Default::default() };
        let delete = DeleteActivationRequest { license_id: id.clone(), activation_id: activation_id.clone() };
        let reasons = [
            reason(vendor.create_license(create).await),
            reason(vendor.get_license(GetLicenseRequest { id: id.clone() }).await),
            reason(vendor.update_license(update).await),
            reason(vendor.revoke_license(RevokeLicenseRequest { id: id.clone() }).await),
            reason(vendor.reinstate_license(ReinstateLicenseRequest { id: id.clone() }).await),
            reason(vendor.delete_activation(delete).await),
        ];
        assert_eq!(reasons, [Reason::NotFound; 6]);
        for query in [None, Some(id.clone()), Some(license.key.clone())] {
            let list = ListLicensesRequest { query, ..ListLicensesRequest::default() };
            assert!(vendor.list_licenses(list).await.unwrap().into_inner().licenses.is_empty());
        }
    }
    let other_product = Principal { product_id: "prod_2".into(), ..public_key() };
    for principal in [test_mode(public_key()), other_team(public_key()), other_product] {
        let mut app = world.app(principal);
        let answer = app.validate_license(validation(&license.key, Some("fp"))).await.unwrap().into_inner();
        assert_eq!((answer.valid, answer.code(), answer.license), (false, ValidationCode::NotFound, None));
        assert_eq!(reason(app.activate_license(activation(&license.key, "fp")).await), Reason::NotFound);
        assert_eq!(reason(app.deactivate_license(deactivation(&license.key, "fp")).await), Reason::NotFound);
    }
    let unbound = Principal { product_id: String::new(), ..public_key() };
    assert_eq!(reason(world.app(unbound).validate_license(validation(&license.key, None)).await), Reason::NotFound);

    // None of it left a trace.
    let got = world.vendor(secret_key(PRODUCT)).get_license(GetLicenseRequest { id }).await.unwrap().into_inner();
    assert_eq!((got.license.unwrap().activations_count, got.activations.len()), (1, 1));
    assert!(world.validate(&license.key, Some("fp")).await.valid);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_key_lists_its_product_and_no_other_kind_of_key_gets_in() {
    let world = World::new().await;
    let license = world.issue(CreateLicenseRequest::default()).await;
    let list = || ListLicensesRequest::default();
    let listed = world.vendor(secret_key(PRODUCT)).list_licenses(list()).await.unwrap().into_inner();
    assert_eq!(listed.licenses.iter().map(|listed| &listed.id).collect::<Vec<_>>(), [&license.id]);
    let other = ListLicensesRequest { product_id: Some(PRODUCT.into()), ..list() };
    assert!(world.vendor(secret_key("prod_2")).list_licenses(other).await.unwrap().into_inner().licenses.is_empty());

    assert_eq!(reason(world.vendor(public_key()).list_licenses(list()).await), Reason::ScopeInsufficient);
    let check = validation(&license.key, None);
    assert_eq!(reason(world.app(owner()).validate_license(check.clone()).await), Reason::ScopeInsufficient);
    let bare = LicenseCheckServiceClient::new(world.channel.clone()).validate_license(check).await;
    assert_eq!(reason(bare), Reason::InvalidCredentials);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_product_takes_its_licences_with_it() {
    let world = World::new().await;
    let license = world.issue(CreateLicenseRequest::default()).await;
    world.app(public_key()).activate_license(activation(&license.key, "fp")).await.unwrap();
    assert!(world.validate(&license.key, Some("fp")).await.valid);
    let event = |topic: &str, mode: Mode, product_id: &str| Event {
        id: "evt_1".into(),
        topic: topic.into(),
        team_id: "team_1".into(),
        mode: mode.into(),
        product_id: product_id.into(),
        ..Event::default()
    };
    let service = world.channel.as_service("catalog", world.signer.clone(), None);
    let mut intake = IntakeServiceClient::new(service);
    let mut ingest = async |events| intake.ingest_events(licensing::IngestEventsRequest { events }).await.unwrap();
    ingest(vec![event("product.renamed", Mode::Live, PRODUCT), event("product.deleted", Mode::Unspecified, PRODUCT)])
        .await;
    assert!(world.validate(&license.key, Some("fp")).await.valid);
    for _ in 0..2 {
        ingest(vec![event("product.deleted", Mode::Live, "prod_other"), event("product.deleted", Mode::Live, PRODUCT)])
            .await;
        assert_eq!(world.validate(&license.key, Some("fp")).await.code(), ValidationCode::NotFound);
    }
    let mut vendor = world.vendor(owner());
    assert_eq!(reason(vendor.get_license(GetLicenseRequest { id: license.id.clone() }).await), Reason::NotFound);
    let create = CreateLicenseRequest { product_id: PRODUCT.into(), ..CreateLicenseRequest::default() };
    assert_eq!(reason(vendor.create_license(create).await), Reason::NotFound, "catalog may still know it");
    let outsider =
        IntakeServiceClient::new(world.way(owner())).ingest_events(licensing::IngestEventsRequest::default()).await;
    assert_eq!(reason(outsider), Reason::ScopeInsufficient);
}
