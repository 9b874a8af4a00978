//! The gateway as a whole, in memory: real policy, real signatures, small services behind it.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{FutureExt as _, future::BoxFuture};
use http::{HeaderMap, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use paperkey_gateway::{Body, Gateway, GatewayConfig, GatewayDeps};
use paperkey_kit::{
    authn::Authenticator,
    channel::Channel,
    clock::{Clock, ManualClock},
    limits::{Limiter, MemoryLimiter, Subjects},
    policy::Guarded,
    principal::{Caller as Verified, Signer},
    secrets::Keyring,
    service::Rpcs,
    shed::Places,
};
use paperkey_proto::{
    Error,
    auth::v1 as auth,
    catalog::v1 as catalog,
    error::catalogue,
    errors::v1::Reason,
    licensing::v1 as licensing,
    options::v1::{Caller, Scope},
    principal::v1::{Mode, Principal, Role},
};
use prost::Message as _;
use serde_json::{Value as Json, json};
use tonic::{Request as Rpc, Response as Answer, Status};
use tower::Service;

#[path = "gateway/limits.rs"]
mod limits;
#[path = "gateway/places.rs"]
mod places;
#[path = "gateway/sessions.rs"]
mod sessions;

const PEER: &str = "203.0.113.7:4321";
const NOW_MS: i64 = 1_790_000_000_000;

/// What the services saw of the last call: who called, and the request's text form.
type Seen = Arc<Mutex<Vec<(Verified, String)>>>;

#[derive(Clone)]
struct Services(Seen);

impl Services {
    fn note<T: std::fmt::Debug>(&self, rpc: &Rpc<T>) -> Verified {
        let caller = Verified::of(rpc).unwrap();
        self.0.lock().unwrap().push((caller.clone(), format!("{:?}", rpc.get_ref())));
        caller
    }
}

#[async_trait]
impl licensing::license_check_service_server::LicenseCheckService for Services {
    async fn validate_license(
        &self,
        rpc: Rpc<licensing::ValidateLicenseRequest>,
    ) -> Result<Answer<licensing::ValidateLicenseResponse>, Status> {
        self.note(&rpc);
        match rpc.get_ref().license_key.as_str() {
            "PANIC" => panic!("the handler was asked to"),
            "SLOW" => tokio::time::sleep(Duration::from_hours(1)).await,
            "WRONG" => return Err(Error::field("license_key", "is mistyped").into()),
            "LIMITED" => {
                let error = Error::new(Reason::LicenseRateLimited).with_retry_after(Duration::from_secs(9));
                return Err(error.into());
            }
            _ => {}
        }
        Ok(Answer::new(licensing::ValidateLicenseResponse {
            valid: true,
            code: licensing::ValidationCode::Valid.into(),
            license: Some(licensing::ValidatedLicense {
                id: "lic_1".into(),
                status: licensing::LicenseStatus::Active.into(),
                expires_at: Some(prost_types::Timestamp { seconds: 1_798_675_200, nanos: 0 }),
                activations_count: 2,
                activations_limit: None,
                is_activated: Some(true),
                metadata: None,
            }),
        }))
    }

    async fn activate_license(
        &self,
        _: Rpc<licensing::ActivateLicenseRequest>,
    ) -> Result<Answer<licensing::ActivateLicenseResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn deactivate_license(
        &self,
        _: Rpc<licensing::DeactivateLicenseRequest>,
    ) -> Result<Answer<licensing::DeactivateLicenseResponse>, Status> {
        Err(Status::internal("the password of the database is hunter2"))
    }
}

#[async_trait]
impl catalog::catalog_service_server::CatalogService for Services {
    async fn create_product(
        &self,
        rpc: Rpc<catalog::CreateProductRequest>,
    ) -> Result<Answer<catalog::CreateProductResponse>, Status> {
        self.note(&rpc);
        Ok(Answer::new(catalog::CreateProductResponse {
            product: Some(catalog::Product { name: rpc.into_inner().name, ..catalog::Product::default() }),
            api_key: None,
        }))
    }

    async fn get_product(
        &self,
        rpc: Rpc<catalog::GetProductRequest>,
    ) -> Result<Answer<catalog::GetProductResponse>, Status> {
        self.note(&rpc);
        let product = catalog::Product { id: rpc.into_inner().id, ..catalog::Product::default() };
        Ok(Answer::new(catalog::GetProductResponse { product: Some(product) }))
    }

    async fn list_products(
        &self,
        rpc: Rpc<catalog::ListProductsRequest>,
    ) -> Result<Answer<catalog::ListProductsResponse>, Status> {
        self.note(&rpc);
        Ok(Answer::new(catalog::ListProductsResponse::default()))
    }

    async fn update_product(
        &self,
        rpc: Rpc<catalog::UpdateProductRequest>,
    ) -> Result<Answer<catalog::UpdateProductResponse>, Status> {
        self.note(&rpc);
        Ok(Answer::new(catalog::UpdateProductResponse::default()))
    }

    async fn delete_product(
        &self,
        rpc: Rpc<catalog::DeleteProductRequest>,
    ) -> Result<Answer<catalog::DeleteProductResponse>, Status> {
        self.note(&rpc);
        Ok(Answer::new(catalog::DeleteProductResponse {}))
    }
}

#[async_trait]
impl auth::status_service_server::StatusService for Services {
    async fn get_status(&self, rpc: Rpc<auth::GetStatusRequest>) -> Result<Answer<auth::GetStatusResponse>, Status> {
        let caller = self.note(&rpc);
        let owner = auth::KeyOwner { id: caller.principal.id.clone(), ..auth::KeyOwner::default() };
        let known = caller.principal.kind() != Caller::Anyone;
        Ok(Answer::new(auth::GetStatusResponse {
            status: "ok".into(),
            caller: known.then_some(owner),
            ..auth::GetStatusResponse::default()
        }))
    }
}

/// What every new session is here.
const SESSION: &str = "new.session.token";

#[async_trait]
impl auth::auth_service_server::AuthService for Services {
    async fn register(&self, rpc: Rpc<auth::RegisterRequest>) -> Result<Answer<auth::RegisterResponse>, Status> {
        self.note(&rpc);
        let user = auth::User { id: "usr_1".into(), ..auth::User::default() };
        Ok(Answer::new(auth::RegisterResponse {
            user: Some(user),
            token: SESSION.into(),
            free_key: "pk_free_1".into(),
            ..auth::RegisterResponse::default()
        }))
    }

    async fn login(&self, rpc: Rpc<auth::LoginRequest>) -> Result<Answer<auth::LoginResponse>, Status> {
        self.note(&rpc);
        let user = auth::User { id: "usr_1".into(), ..auth::User::default() };
        Ok(Answer::new(auth::LoginResponse { user: Some(user), token: SESSION.into() }))
    }

    async fn get_me(&self, rpc: Rpc<auth::GetMeRequest>) -> Result<Answer<auth::GetMeResponse>, Status> {
        self.note(&rpc);
        Ok(Answer::new(auth::GetMeResponse::default()))
    }

    async fn update_me(&self, rpc: Rpc<auth::UpdateMeRequest>) -> Result<Answer<auth::UpdateMeResponse>, Status> {
        self.note(&rpc);
        let token = rpc.into_inner().password.map(|_| SESSION.to_owned());
        Ok(Answer::new(auth::UpdateMeResponse { user: None, token }))
    }

    async fn logout(&self, rpc: Rpc<auth::LogoutRequest>) -> Result<Answer<auth::LogoutResponse>, Status> {
        self.note(&rpc);
        Ok(Answer::new(auth::LogoutResponse {}))
    }

    async fn forgot_password(
        &self,
        rpc: Rpc<auth::ForgotPasswordRequest>,
    ) -> Result<Answer<auth::ForgotPasswordResponse>, Status> {
        self.note(&rpc);
        Ok(Answer::new(auth::ForgotPasswordResponse {}))
    }

    async fn reset_password(
        &self,
        rpc: Rpc<auth::ResetPasswordRequest>,
    ) -> Result<Answer<auth::ResetPasswordResponse>, Status> {
        self.note(&rpc);
        if rpc.get_ref().token == "used" {
            return Err(Error::new(Reason::NotFound).into());
        }
        Ok(Answer::new(auth::ResetPasswordResponse {}))
    }
}

/// Knows one credential of each kind.
struct Doorman;

#[async_trait]
impl Authenticator for Doorman {
    async fn authenticate(&self, credential: &str, team: Option<&str>, mode: Mode) -> Result<Arc<Principal>, Error> {
        let kind = match credential {
            "pk_1" => Caller::ProductPublicKey,
            "sk_1" => Caller::ProductSecretKey,
            "pk_live_1" | "pk_live_readonly" | "pk_live_own7" | "pk_live_own9000" | "pk_live_team500"
            | "pk_live_scale" | "pk_live_gone" | "pk_live_rotated" => Caller::TeamKey,
            "a.b.c" => Caller::Account,
            _ => return Err(Error::unauthenticated()),
        };
        Ok(Arc::new(Principal {
            kind: kind.into(),
            id: credential.to_owned(),
            team_id: team.unwrap_or("team_1").to_owned(),
            mode: if mode == Mode::Unspecified { Mode::Live.into() } else { mode.into() },
            role: if kind == Caller::Account { Role::Owner.into() } else { Role::Unspecified.into() },
            scopes: vec![Scope::ProductsRead.into(), Scope::ProductsWrite.into(), Scope::LicensesCheck.into()],
            read_only: credential.ends_with("readonly"),
            tier: match credential.rsplit('_').next() {
                Some(word @ ("scale" | "gone")) => word.to_owned(),
                _ => "free".to_owned(),
            },
            requests_per_minute: match credential {
                "pk_live_own7" => 7,
                "pk_live_own9000" => 9_000,
                _ => 0,
            },
            lineage: if credential == "pk_live_rotated" { "pk_live_1".into() } else { String::new() },
            team_requests_per_minute: if credential.ends_with("team500") { 500 } else { 0 },
            ..Principal::default()
        }))
    }
}

#[derive(Clone)]
struct House {
    gateway: Gateway,
    seen: Seen,
    hand: ManualClock,
}

fn house() -> House {
    house_with(|_| {})
}

fn house_with(change: impl FnOnce(&mut GatewayConfig)) -> House {
    house_of_places(None, change)
}

fn house_of_places(places: Option<Places>, change: impl FnOnce(&mut GatewayConfig)) -> House {
    let (clock, hand) = Clock::manual(NOW_MS);
    let signer = Signer::new(&Keyring::for_tests(), clock.clone());
    let seen = Seen::default();
    let services = Services(Arc::clone(&seen));
    let rpcs = Rpcs::new(licensing::license_check_service_server::LicenseCheckServiceServer::new(services.clone()))
        .add_service(catalog::catalog_service_server::CatalogServiceServer::new(services.clone()))
        .add_service(auth::auth_service_server::AuthServiceServer::new(services.clone()))
        .add_service(auth::status_service_server::StatusServiceServer::new(services));
    let channel = Channel::local();
    channel.bind(Guarded::new(rpcs, signer.clone(), clock.clone(), None, None));
    let owners = ["auth", "catalog", "licensing", "webhook"];
    let channels: HashMap<_, _> = owners.map(|owner| (owner.to_owned(), channel.clone())).into();
    let mut config = GatewayConfig {
        public_url: "https://keys.example/".into(),
        public_url_is_configured: true,
        trusted_proxies: Vec::new(),
        trusted_parents: Vec::new(),
        cors_any_origin: false,
        call_timeout_ms: 10_000,
        upstreams: Vec::new(),
        version: "1.2.3",
        tiers: Arc::default(),
        limits: paperkey_kit::config::Limits::default(),
        billing_url: None,
    };
    change(&mut config);
    let deps = GatewayDeps {
        channels,
        authenticator: Arc::new(Doorman),
        signer,
        limiter: Arc::new(Limiter::Memory(MemoryLimiter::new(clock.clone()))),
        subjects: Subjects::new(&Keyring::for_tests()),
        clock,
        audit: None,
        incidents: None,
        shutdown: None,
        places,
    };
    House { gateway: Gateway::new(config, deps).unwrap(), seen, hand }
}

struct Said {
    status: u16,
    headers: HeaderMap,
    body: Bytes,
}

impl Said {
    fn json(&self) -> Json {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{:?} is no JSON", self.body))
    }

    fn text(&self) -> String {
        String::from_utf8(self.body.to_vec()).unwrap()
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

impl House {
    async fn ask(&self, line: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Said {
        let (verb, path) = line.split_once(' ').unwrap();
        let mut request = Request::builder().method(verb).uri(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let body: Bytes = body.into();
        let has_type = headers.iter().any(|(name, _)| *name == "content-type");
        if !body.is_empty() && !has_type {
            request = request.header("content-type", "application/json");
        }
        let request = request.body(Full::new(body)).unwrap();
        let (head, body) = self.gateway.handle(request, PEER.parse().unwrap()).await.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Said { status: head.status.as_u16(), headers: head.headers, body }
    }

    async fn validate(&self, body: &'static str) -> Said {
        self.ask("POST /v1/licenses/validate", &[("x-api-key", "pk_1")], body).await
    }

    fn last(&self) -> (Verified, String) {
        self.seen.lock().unwrap().last().cloned().expect("a service was called")
    }

    fn calls(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

const ACCOUNT: (&str, &str) = ("authorization", "Bearer a.b.c");
const TEAM_KEY: (&str, &str) = ("authorization", "Bearer pk_live_1");

#[tokio::test]
async fn a_license_is_validated_from_json_to_json() {
    let house = house();
    let said = house.validate(r#"{"license_key": "K", "fingerprint": "m"}"#).await;
    assert_eq!(said.status, 200);
    assert_eq!(
        said.json(),
        json!({"valid": true, "code": "valid", "license": {
            "id": "lic_1", "status": "active", "expiresAt": "2026-12-31T00:00:00.000Z", "activationsCount": 2,
            "activationsLimit": null, "isActivated": true, "metadata": null,
        }})
    );
    assert_eq!(said.header("content-type"), "application/json");
    assert_eq!(said.header("cache-control"), "no-store");
    let (caller, request) = house.last();
    assert_eq!(caller.principal.id, "pk_1");
    assert_eq!(caller.request_id, said.header("x-request-id"));
    assert!(caller.request_id.starts_with("req_"));
    assert!(request.contains("fingerprint: Some(\"m\")"), "{request}");
}

#[tokio::test]
async fn the_request_id_is_always_our_own() {
    let house = house();
    let said = house.ask("GET /v1/status", &[("x-request-id", "req_mine")], "").await;
    assert_ne!(said.header("x-request-id"), "req_mine");
    assert_ne!(house.last().0.request_id, "req_mine");
}

#[tokio::test]
async fn errors_of_services_wear_the_envelope_of_the_surface() {
    let house = house();
    let said = house.validate(r#"{"license_key": "WRONG"}"#).await;
    assert_eq!(said.status, 400);
    assert_eq!(said.json()["details"], json!([{"field": "license_key", "message": "is mistyped"}]));
    let said = house.validate(r#"{"license_key": ""}"#).await;
    assert_eq!(said.json()["details"], json!([{"field": "license_key", "message": "is required"}]));
    let said = house.validate(r#"{"license_key": "LIMITED"}"#).await;
    assert_eq!((said.status, said.header("retry-after")), (429, "9"));
    let said = house.ask("POST /products", &[ACCOUNT], r#"{"name": "x", "price": {"amount": 1}}"#).await;
    assert_eq!(said.json()["details"][0]["field"], "price.currency");
}

#[tokio::test]
async fn what_fails_inside_is_not_told() {
    let house = house();
    let said = house.validate(r#"{"license_key": "PANIC"}"#).await;
    assert_eq!((said.status, said.json()["error"].as_str()), (500, Some("internal_error")));
    let body = r#"{"license_key": "K", "fingerprint": "m"}"#;
    let said = house.ask("POST /v1/licenses/deactivate", &[("x-api-key", "pk_1")], body).await;
    assert_eq!(said.status, 500);
    assert!(!String::from_utf8_lossy(&said.body).contains("hunter2"));
}

#[tokio::test]
async fn a_slow_service_is_a_timeout() {
    let said = house_with(|config| config.call_timeout_ms = 20).validate(r#"{"license_key": "SLOW"}"#).await;
    assert_eq!((said.status, said.json()["error"].as_str()), (504, Some("timeout")));
}

#[tokio::test]
async fn strangers_are_turned_away_before_their_body_is_read() {
    let house = house();
    let said = house.ask("POST /products", &[], "{nonsense").await;
    assert_eq!((said.status, said.header("www-authenticate")), (401, "Bearer"));
    let said = house.ask("POST /products", &[("authorization", "Bearer nope")], "{nonsense").await;
    assert_eq!((said.status, said.header("www-authenticate")), (401, "Bearer error=\"invalid_token\""));
    assert_eq!(house.calls(), 0);
}

#[tokio::test]
async fn a_credential_of_another_surface_is_a_stranger_and_of_another_method_is_not() {
    let house = house();
    assert_eq!(house.ask("GET /products", &[TEAM_KEY], "").await.status, 401);
    assert_eq!(house.ask("GET /api/v1/products", &[ACCOUNT], "").await.status, 401);
    assert_eq!(house.ask("GET /api/v1/products", &[TEAM_KEY], "").await.status, 200);
    let said = house.ask("GET /products", &[("authorization", "Bearer sk_1")], "").await;
    assert_eq!((said.status, said.json()["error"].as_str()), (403, Some("forbidden")));
    let said = house.ask("POST /api/v1/products", &[("authorization", "Bearer pk_live_readonly")], "{}").await;
    assert_eq!((said.status, said.json()["error"]["code"].as_str()), (403, Some("scope_insufficient")));
}

#[tokio::test]
async fn a_call_that_anyone_may_make_still_judges_the_credential_that_is_sent() {
    let house = house();
    assert_eq!(house.ask("GET /v1/status", &[], "").await.json()["caller"], Json::Null);
    assert_eq!(house.ask("GET /v1/status", &[TEAM_KEY], "").await.json()["caller"]["id"], "pk_live_1");
    assert_eq!(house.ask("GET /v1/status", &[("authorization", "Bearer nope")], "").await.status, 401);
    // Where nobody but anyone is served, a credential says nothing.
    let body = r#"{"email": "a@b.cd", "password": "x"}"#;
    let said = house.ask("POST /auth/login", &[("authorization", "nonsense")], body).await;
    assert_eq!(said.status, 200);
}

#[tokio::test]
async fn accounts_name_their_team_and_mode() {
    let house = house();
    let headers = [ACCOUNT, ("paperkey-team", "team_2"), ("paperkey-mode", "test")];
    assert_eq!(house.ask("GET /products/prod_1", &headers, "").await.status, 200);
    let principal = house.last().0.principal;
    assert_eq!((principal.team_id.as_str(), principal.mode()), ("team_2", Mode::Test));
    let said = house.ask("GET /products/prod_1", &[ACCOUNT, ("paperkey-mode", "Live")], "").await;
    assert_eq!(said.status, 400);
    assert_eq!(said.json()["details"][0]["field"], "Paperkey-Mode");
}

#[tokio::test]
async fn creation_answers_201_and_deletion_204() {
    let house = house();
    let said = house.ask("POST /products", &[ACCOUNT], r#"{"name": "My app"}"#).await;
    assert_eq!((said.status, said.json()["name"].as_str()), (201, Some("My app")));
    assert_eq!(said.json()["apiKey"], Json::Null);
    let said = house.ask("DELETE /api/v1/products/prod%201", &[TEAM_KEY], "").await;
    assert_eq!((said.status, said.body.len()), (204, 0));
    assert_eq!(said.header("content-type"), "");
    assert!(house.last().1.contains("prod 1"));
}

#[tokio::test]
async fn a_patch_says_which_members_it_names() {
    let house = house();
    let said = house.ask("PATCH /products/prod_1", &[ACCOUNT], r#"{"sku": null, "name": "x"}"#).await;
    assert_eq!(said.status, 200, "{:?}", said.body);
    assert!(house.last().1.contains(r#"paths: ["name", "sku"]"#), "{}", house.last().1);
}

#[tokio::test]
async fn unknown_paths_verbs_and_types_are_told_apart() {
    let house = house();
    let said = house.ask("GET /nowhere", &[], "").await;
    assert_eq!((said.status, said.json()["error"].as_str()), (404, Some("not_found")));
    let said = house.ask("GET /v1/nowhere", &[], "").await;
    assert_eq!(said.json()["error"]["code"], "PB_NOT_FOUND");
    let said = house.ask("GET /api/v1/nowhere", &[], "").await;
    assert_eq!(said.json()["error"]["code"], "not_found");
    for verb in ["PUT", "HEAD", "OPTIONS", "BREW"] {
        let said = house.ask(&format!("{verb} /products"), &[], "").await;
        assert_eq!((said.status, said.header("allow")), (405, "POST, GET"), "{verb}");
    }
    let said = house.ask("POST /products", &[ACCOUNT, ("content-type", "text/plain")], "{}").await;
    assert_eq!(said.status, 415);
    let said = house.ask("POST /products", &[ACCOUNT, ("content-type", "application/json; charset=utf-8")], "[]").await;
    assert_eq!((said.status, said.json()["message"].as_str()), (400, Some("The body must be a JSON object")));
    let said = house.ask("GET /products?page_size=5&colour=red", &[ACCOUNT], "").await;
    assert_eq!(said.json()["details"], json!([{"field": "colour", "message": "unknown query parameter"}]));
}

#[tokio::test]
async fn a_large_body_is_refused() {
    let house = house();
    let body = format!(r#"{{"name": "{}"}}"#, "x".repeat(70_000));
    let said = house.ask("POST /products", &[ACCOUNT], body).await;
    assert_eq!((said.status, said.json()["error"].as_str()), (413, Some("body_too_large")));
}

#[tokio::test]
async fn problem_details_are_sent_to_those_who_ask() {
    let said = house().ask("GET /v1/nowhere", &[("accept", "application/problem+json")], "").await;
    assert_eq!(said.header("content-type"), "application/problem+json");
    assert_eq!(said.json()["type"], "https://keys.example/docs/errors/PB_NOT_FOUND");
}

#[tokio::test]
async fn browsers_of_any_origin_may_read_where_keys_are_used_and_only_if_configured() {
    let origin = ("origin", "https://elsewhere.example");
    let preflight =
        [origin, ("access-control-request-method", "POST"), ("access-control-request-headers", "x-api-key")];
    let closed = house();
    assert_eq!(closed.ask("GET /v1/status", &[origin], "").await.header("access-control-allow-origin"), "");
    assert_eq!(closed.ask("OPTIONS /v1/licenses/validate", &preflight, "").await.status, 405);

    let open = house_with(|config| config.cors_any_origin = true);
    let said = open.ask("GET /v1/status", &[origin], "").await;
    assert_eq!(said.header("access-control-allow-origin"), "*");
    assert_eq!(said.header("access-control-allow-credentials"), "");
    let said = open.ask("POST /v1/licenses/validate", &[origin], "{}").await;
    assert_eq!((said.status, said.header("access-control-allow-origin")), (401, "*"));
    let said = open.ask("OPTIONS /v1/licenses/validate", &preflight, "").await;
    assert_eq!((said.status, said.header("access-control-allow-methods")), (204, "POST"));
    assert_eq!(said.header("access-control-allow-headers"), "x-api-key");
    let said = open.ask("OPTIONS /products", &preflight, "").await;
    assert_eq!((said.status, said.header("access-control-allow-origin")), (405, ""));
}

#[tokio::test]
async fn people_are_led_to_a_page() {
    let house = house();
    let said = house.ask("GET /", &[], "").await;
    assert_eq!((said.status, said.header("location")), (307, "/app/"));
    let said = house.ask("GET /app/", &[], "").await;
    let html = String::from_utf8(said.body.to_vec()).unwrap();
    assert!(html.contains("<script type=\"module\"") && html.contains("src=\"/app/assets/"), "{html}");
    let policy = said.header("content-security-policy");
    assert!(policy.starts_with("default-src 'none'; script-src 'self';"), "{policy}");
    assert_eq!(said.header("x-request-id"), "");
    let said = house.ask("POST /app/", &[], "").await;
    assert_eq!((said.status, said.header("allow")), (405, "GET, HEAD"));
    assert_eq!(said.json()["requestId"], said.header("x-request-id"));
}

#[tokio::test]
async fn every_error_has_a_page_for_people_and_one_for_programs() {
    let house = house();
    let list = house.ask("GET /docs/errors/", &[], "").await;
    let list_of_programs = house.ask("GET /docs/errors.md", &[], "").await.text();
    for (_, entry) in catalogue() {
        let path = format!("/docs/errors/{}", entry.agent_code);
        let said = house.ask(&format!("GET {path}"), &[], "").await;
        assert_eq!((said.status, said.header("content-type")), (200, "text/html; charset=utf-8"), "{path}");
        assert!(said.header("content-security-policy").starts_with("default-src 'none'; style-src 'sha256-"));
        assert_eq!(said.header("cache-control"), "public, max-age=300");
        let html = said.text();
        assert!(html.contains(&entry.flat_code) && html.contains(&entry.typed_code));
        for forbidden in ["<script", "style=\"", "onclick", "http://", "src="] {
            assert!(!html.contains(forbidden), "{path} holds {forbidden}");
        }
        assert!(list.text().contains(&format!("href=\"{path}\"")), "{path} is not listed");
        let said = house.ask(&format!("GET {path}.md"), &[], "").await;
        assert_eq!((said.status, said.header("content-type")), (200, "text/markdown; charset=utf-8"), "{path}");
        assert!(said.text().starts_with(&format!("# `{}`\n", entry.agent_code)));
        assert!(list_of_programs.contains(&format!("(https://keys.example{path}.md)")), "{path} is not listed");
    }
    let redirects = [
        ("/docs/errors", "/docs/errors/"),
        ("/docs/errors/pb_not_found", "/docs/errors/PB_NOT_FOUND"),
        ("/docs/errors/pb_not_found.md", "/docs/errors/PB_NOT_FOUND.md"),
        ("/docs/errors/ip_not_allowed", "/docs/errors/PB_IP_NOT_ALLOWED"),
    ];
    for (from, to) in redirects {
        let said = house.ask(&format!("GET {from}"), &[], "").await;
        assert_eq!((said.status, said.header("location")), (307, to), "{from}");
    }
    for path in ["PB_NO_SUCH", "PB_NOT_FOUND/", "PB_NOT_FOUND.md.md", "%3Cscript%3E", "//", "errors.md"] {
        let said = house.ask(&format!("GET /docs/errors/{path}"), &[], "").await;
        assert_eq!((said.status, said.header("cache-control")), (404, "no-cache"), "{path}");
        assert!(said.text().contains("No such error") && !said.text().contains("script>"), "{path}");
    }
    let said = house.ask("DELETE /docs/errors/PB_NOT_FOUND", &[], "").await;
    assert_eq!((said.status, said.header("allow")), (405, "GET, HEAD"));
}

#[tokio::test]
async fn the_commands_on_the_pages_of_errors_get_those_errors() {
    let house = house();
    let mut tried = 0;
    for (_, entry) in catalogue() {
        let page = house.ask(&format!("GET /docs/errors/{}.md", entry.agent_code), &[], "").await.text();
        let Some(command) = page.lines().find(|line| line.contains("curl -i ")) else { continue };
        // The quotes of a shell: every second piece is one word.
        let mut words = Vec::new();
        for (at, piece) in command.split('\'').enumerate() {
            if at % 2 == 1 { words.push(piece) } else { words.extend(piece.split_whitespace()) }
        }
        let after = |flag: &str| words.iter().position(|word| *word == flag).and_then(|at| words.get(at + 1)).copied();
        let url = words.iter().find_map(|word| word.strip_prefix("https://keys.example")).unwrap();
        let zeros = "\0".repeat(70_000);
        let body = after("-d").or_else(|| after("--data-binary").map(|_| zeros.as_str()));
        let verb = after("-X").unwrap_or_else(|| body.map_or("GET", |_| "POST"));
        let form = body.map(|_| ("content-type", "application/x-www-form-urlencoded"));
        let given = after("-H").map(|header| header.split_once(": ").unwrap()).map(|(_, kind)| ("content-type", kind));
        let headers: Vec<_> = given.or(form).into_iter().collect();
        let said = house.ask(&format!("{verb} {url}"), &headers, body.unwrap_or_default().to_owned()).await;
        assert_eq!(u32::from(said.status), entry.http_status, "{command}");
        let codes = [&entry.flat_code, &entry.typed_code, &entry.agent_code];
        assert!(codes.iter().any(|code| said.text().contains(code.as_str())), "{command}: {}", said.text());
        tried += 1;
    }
    assert!(tried >= 6, "{tried}");
}

#[tokio::test]
async fn the_reference_is_served_to_anyone() {
    let said = house().ask("GET /api/openapi.json", &[], "").await;
    assert_eq!((said.status, said.header("content-type")), (200, "application/json"));
    let document = said.json();
    assert_eq!((&document["openapi"], &document["info"]["version"]), (&json!("3.1.0"), &json!("1.2.3")));
    assert_eq!(document["servers"], json!([{"url": "https://keys.example"}]));
    assert!(document["paths"]["/v1/licenses/validate"]["post"].is_object());
}

#[tokio::test]
async fn a_key_of_the_wrong_kind_is_told_why_it_is_one() {
    let house = house();
    let problem = ("accept", "application/problem+json");
    // Told by its form: nobody is asked whether such a key exists.
    let public_key = ("authorization", "Bearer pk_0123456789012345678901234567890123");
    for path in ["/api/v1/products", "/v1/keys", "/v1/status"] {
        let said = house.ask(&format!("GET {path}"), &[public_key, problem], "").await;
        let json = said.json();
        assert_eq!((said.status, &json["detail"]), (401, &json!("A product's public key (pk_) is not accepted here")));
        let advice = json["agent_message"].as_str().unwrap();
        assert!(advice.contains("license checks under /v1/licenses. Send a team key (pk_live_"), "{path}: {advice}");
    }
    let said = house.ask("GET /v1/keys", &[public_key], "").await;
    assert!(said.json()["error"]["agent_message"].as_str().unwrap().contains("ships in apps"));
    let said = house.ask("POST /v1/licenses/validate", &[ACCOUNT, problem], "{}").await;
    assert!(said.json()["agent_message"].as_str().unwrap().contains("Send a product's public key (pk_) here."));
    assert_eq!(house.calls(), 0);
}

/// The gateway as a transport of generated clients.
#[derive(Clone)]
struct Wire(Gateway);

impl Service<Request<tonic::body::Body>> for Wire {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        let gateway = self.0.clone();
        let peer: SocketAddr = PEER.parse().unwrap();
        async move { Ok(gateway.handle(request, peer).await) }.boxed()
    }
}

fn signed_in<T>(message: T, credential: &str) -> Rpc<T> {
    let mut rpc = Rpc::new(message);
    rpc.metadata_mut().insert("authorization", format!("Bearer {credential}").parse().unwrap());
    rpc
}

#[tokio::test]
async fn grpc_calls_pass_under_the_same_policy() {
    let house = house();
    let mut client = catalog::catalog_service_client::CatalogServiceClient::new(Wire(house.gateway.clone()));
    let wanted = || catalog::GetProductRequest { id: "prod_1".into() };
    for credential in ["a.b.c", "pk_live_1"] {
        let mut rpc = signed_in(wanted(), credential);
        let metadata = rpc.metadata_mut();
        metadata.insert_bin("paperkey-principal-bin", tonic::metadata::MetadataValue::from_bytes(b"forged"));
        metadata.insert("x-request-id", "req_mine".parse().unwrap());
        let answer = client.get_product(rpc).await.unwrap();
        let (caller, _) = house.last();
        assert_eq!(caller.principal.id, credential);
        assert_eq!(answer.metadata().get("x-request-id").unwrap().to_str().unwrap(), caller.request_id);
        assert_eq!(answer.into_inner().product.unwrap().id, "prod_1");
    }
    let refused = client.get_product(wanted()).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
    assert!(refused.metadata().contains_key("x-request-id"));
    // A product's public key belongs to a surface that the method is not on.
    let refused = client.get_product(signed_in(wanted(), "pk_1")).await.unwrap_err();
    assert_eq!(Error::from_status(&refused).reason(), Reason::InvalidCredentials);
    // A secret key is known on the dashboard, but not to this method.
    let refused = client.get_product(signed_in(wanted(), "sk_1")).await.unwrap_err();
    assert_eq!(Error::from_status(&refused).reason(), Reason::ScopeInsufficient);
}

#[tokio::test]
async fn grpc_bodies_are_bounded_and_rules_are_kept() {
    let house = house();
    let mut client = catalog::catalog_service_client::CatalogServiceClient::new(Wire(house.gateway.clone()));
    let large = catalog::CreateProductRequest { name: "x".repeat(70_000), ..Default::default() };
    let refused = client.create_product(signed_in(large, "a.b.c")).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::OutOfRange);
    let unnamed = catalog::CreateProductRequest::default();
    let refused = client.create_product(signed_in(unnamed, "a.b.c")).await.unwrap_err();
    assert_eq!(Error::from_status(&refused).violations()[0].field, "name");
}

#[tokio::test]
async fn internal_methods_do_not_exist_outside() {
    let house = house();
    let mut client = auth::credential_service_client::CredentialServiceClient::new(Wire(house.gateway.clone()));
    let rpc = signed_in(auth::ListChangesRequest { since: 0 }, "a.b.c");
    assert_eq!(client.list_changes(rpc).await.unwrap_err().code(), tonic::Code::Unimplemented);
    let said = house.ask("POST /paperkey.auth.v1.CredentialService/ListChanges", &[ACCOUNT], "{}").await;
    assert_eq!(said.status, 404);
}

#[tokio::test]
async fn grpc_web_speaks_to_the_same_methods() {
    let house = house_with(|config| config.cors_any_origin = true);
    let message = auth::GetStatusRequest {}.encode_to_vec();
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    frame.extend(message);
    let headers = [("content-type", "application/grpc-web+proto"), TEAM_KEY, ("x-grpc-web", "1")];
    let path = "/paperkey.auth.v1.StatusService/GetStatus";
    let said = house.ask(&format!("POST {path}"), &headers, frame.clone()).await;
    assert_eq!(said.status, 200);
    assert_eq!(said.header("content-type"), "application/grpc-web+proto");
    assert_eq!(said.header("access-control-allow-origin"), "*");
    assert_eq!(house.last().0.principal.id, "pk_live_1");
    let length = usize::try_from(u32::from_be_bytes(said.body[1..5].try_into().unwrap())).unwrap();
    let answer = auth::GetStatusResponse::decode(&said.body[5..5 + length]).unwrap();
    assert_eq!(answer.caller.unwrap().id, "pk_live_1");
    assert!(String::from_utf8_lossy(&said.body[5 + length..]).contains("grpc-status:0"));

    let headers = [("content-type", "application/grpc-web+proto"), ("authorization", "Bearer nope")];
    let said = house.ask(&format!("POST {path}"), &headers, frame.clone()).await;
    assert_eq!(said.header("grpc-status"), "16");
    let said = house.ask(&format!("POST {path}"), &[("content-type", "application/grpc-web+json")], frame).await;
    assert_eq!(said.status, 415);
    let asked = [("origin", "https://x.example"), ("access-control-request-method", "POST")];
    assert_eq!(house.ask(&format!("OPTIONS {path}"), &asked, "").await.status, 204);
}

#[tokio::test]
async fn health_and_reflection_need_no_credential() {
    use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    let house = house();
    let mut health = HealthClient::new(Wire(house.gateway.clone()));
    for service in ["", "paperkey.catalog.v1.CatalogService"] {
        let asked = HealthCheckRequest { service: service.into() };
        let known = health.check(asked).await.unwrap().into_inner().status;
        assert_eq!(known, 2, "{service}: nobody has looked yet whether it serves");
    }
    let asked = HealthCheckRequest { service: "paperkey.auth.v1.CredentialService".into() };
    assert_eq!(health.check(asked).await.unwrap_err().code(), tonic::Code::NotFound);

    let mut reflection = ServerReflectionClient::new(Wire(house.gateway.clone()));
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers = reflection.server_reflection_info(futures_util::stream::iter([ask])).await.unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else { panic!("no list") };
    assert!(list.service.iter().any(|service| service.name == "paperkey.catalog.v1.CatalogService"));
    assert!(list.service.iter().all(|service| service.name != "paperkey.auth.v1.CredentialService"));
}

#[tokio::test]
async fn nonsense_of_any_kind_gets_an_answer() {
    let house = house();
    let pieces =
        ["/", "products", "%", "%2F", "..", "?", "&=", "v1", "licenses", "validate", "\u{7f}", "api", "*", "auth"];
    let mut state = 9_u64;
    let mut chance = |bound: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from((state >> 33) % u64::try_from(bound).unwrap()).unwrap()
    };
    for _ in 0..3_000 {
        let path: String = (0..chance(8)).map(|_| pieces[chance(pieces.len())]).collect();
        let verb = ["GET", "POST", "PATCH", "DELETE", "OPTIONS"][chance(5)];
        let body: Vec<u8> = (0..chance(20)).map(|_| u8::try_from(chance(256)).unwrap()).collect();
        let kind = ["application/json", "application/grpc", "application/grpc-web-text", "text/plain"][chance(4)];
        let uri = format!("/{path}");
        if uri.parse::<http::Uri>().is_err() {
            continue;
        }
        let credential = [ACCOUNT, TEAM_KEY, ("x-api-key", "pk_1")][chance(3)];
        let said = house.ask(&format!("{verb} {uri}"), &[credential, ("content-type", kind)], body).await;
        assert!(said.status < 500, "{verb} {uri} answered {}", said.status);
        assert!(StatusCode::from_u16(said.status).is_ok());
    }
}
