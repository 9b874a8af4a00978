//! Verification of keys at the gateway, in memory: every code, over REST, gRPC and gRPC-Web.

use std::{
    collections::HashMap,
    convert::Infallible,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{FutureExt as _, future::BoxFuture};
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use paperkey_gateway::{Body, Gateway, GatewayConfig, GatewayDeps};
use paperkey_kit::{
    authn::Authenticator,
    channel::Channel,
    clock::Clock,
    config::Limits,
    limits::{Limiter, MemoryLimiter, Subjects},
    principal::Signer,
    secrets::Keyring,
    token::TokenKind,
};
use paperkey_proto::{
    Contract, Error,
    errors::v1::Reason,
    gateway::v1::{
        VerificationCode, VerifyKeyRequest, VerifyKeyResponse,
        key_verification_service_client::KeyVerificationServiceClient,
    },
    options::v1::{Caller, Scope},
    principal::v1::{Mode, Principal, Role},
};
use prost::Message as _;
use serde_json::{Value as Json, json};
use tower::Service;

const PEER: &str = "203.0.113.7:4321";
const NOW_MS: i64 = 1_790_000_000_000;

/// Knows the keys that it is given, and notes what it is asked.
#[derive(Default)]
struct Doorman {
    keys: Mutex<HashMap<String, Principal>>,
    asked: Mutex<Vec<String>>,
    is_gone: AtomicBool,
}

#[async_trait]
impl Authenticator for Doorman {
    async fn authenticate(&self, credential: &str, team: Option<&str>, _: Mode) -> Result<Arc<Principal>, Error> {
        self.asked.lock().unwrap().push(credential.to_owned());
        if self.is_gone.load(Ordering::SeqCst) && credential != "caller" {
            return Err(Error::unavailable("nobody is there"));
        }
        assert_eq!(team, None, "a key belongs to one team");
        self.keys.lock().unwrap().get(credential).cloned().map(Arc::new).ok_or_else(Error::unauthenticated)
    }
}

struct House {
    gateway: Gateway,
    doorman: Arc<Doorman>,
}

struct Said {
    status: u16,
    json: Json,
}

fn team_key(id: &str, team: &str, mode: Mode) -> Principal {
    Principal {
        kind: Caller::TeamKey.into(),
        id: id.into(),
        team_id: team.into(),
        mode: mode.into(),
        scopes: vec![Scope::KeysRead.into(), Scope::LicensesRead.into(), Scope::LicensesWrite.into()],
        tier: "scale".into(),
        ..Principal::default()
    }
}

impl House {
    fn new() -> Self {
        let (clock, _) = Clock::manual(NOW_MS);
        let signer = Signer::new(&Keyring::for_tests(), clock.clone());
        let channels = ["auth", "catalog", "licensing", "webhook"].map(|owner| (owner.to_owned(), Channel::local()));
        let config = GatewayConfig {
            public_url: "https://keys.example".into(),
            public_url_is_configured: true,
            trusted_proxies: Vec::new(),
            trusted_parents: Vec::new(),
            cors_any_origin: false,
            call_timeout_ms: 10_000,
            version: "1.2.3",
            upstreams: Vec::new(),
            tiers: Arc::default(),
            limits: Limits::default(),
            billing_url: None,
        };
        let doorman = Arc::new(Doorman::default());
        let authenticator = Arc::clone(&doorman) as Arc<dyn Authenticator>;
        let deps = GatewayDeps {
            channels: channels.into(),
            authenticator,
            signer,
            limiter: Arc::new(Limiter::Memory(MemoryLimiter::new(clock.clone()))),
            subjects: Subjects::new(&Keyring::for_tests()),
            clock,
            audit: None,
            incidents: None,
            shutdown: None,
            places: None,
        };
        let gateway = Gateway::new(config, deps).unwrap();
        let house = Self { gateway, doorman };
        house.called_by(team_key("key_caller", "team_1", Mode::Live));
        house
    }

    /// Whose the credential is that the calls bring.
    fn called_by(&self, caller: Principal) {
        self.doorman.keys.lock().unwrap().insert("caller".into(), caller);
    }

    /// A new token of that kind, for that key.
    fn token(&self, kind: TokenKind, key: Principal) -> String {
        let token = kind.generate();
        self.doorman.keys.lock().unwrap().insert(token.clone(), key);
        token
    }

    async fn verify(&self, body: Json) -> Said {
        let request = Request::post("/v1/keys/verify")
            .header("authorization", "Bearer caller")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body.to_string())))
            .unwrap();
        let (head, body) = self.gateway.handle(request, PEER.parse().unwrap()).await.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Said { status: head.status.as_u16(), json: serde_json::from_slice(&body).unwrap() }
    }

    /// The code of a verification, which both ways give, and everything else that they say alike.
    async fn code(&self, body: Json) -> String {
        let said = self.verify(body.clone()).await;
        assert_eq!(said.status, 200, "{}", said.json);
        let code = said.json["code"].as_str().unwrap().to_owned();
        assert_eq!(said.json["valid"], json!(code == "valid"), "{}", said.json);

        let text = |name: &str| body[name].as_str().map(str::to_owned);
        let request = VerifyKeyRequest {
            key: text("key").unwrap(),
            scope: text("scope"),
            ip: text("ip"),
            ..VerifyKeyRequest::default()
        };
        let told = self.by_grpc(request).await.unwrap();
        let word = told.code().as_str_name().trim_start_matches("VERIFICATION_CODE_").to_lowercase();
        assert_eq!((word, told.valid), (code.clone(), code == "valid"));
        assert_eq!(json!(told.key_id), said.json["key_id"]);
        assert_eq!(json!(told.team_id), said.json["team_id"]);
        assert_eq!(json!(told.scopes), said.json["scopes"]);
        code
    }

    async fn by_grpc(&self, request: VerifyKeyRequest) -> Result<VerifyKeyResponse, tonic::Status> {
        let mut rpc = tonic::Request::new(request);
        rpc.metadata_mut().insert("authorization", "Bearer caller".parse().unwrap());
        let answer = KeyVerificationServiceClient::new(Wire(self.gateway.clone())).verify_key(rpc).await?;
        Ok(answer.into_inner())
    }

    fn asked(&self, token: &str) -> bool {
        self.doorman.asked.lock().unwrap().iter().any(|asked| asked == token)
    }
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

#[tokio::test]
async fn a_good_key_is_told_with_what_it_may_do() {
    let house = House::new();
    let token = house.token(TokenKind::TeamLive, team_key("key_1", "team_1", Mode::Live));
    let said = house.verify(json!({"key": token})).await;
    assert_eq!(said.status, 200);
    assert_eq!(
        said.json,
        json!({"valid": true, "code": "valid", "key_id": "key_1", "team_id": "team_1", "mode": "live",
            "scopes": ["keys:read", "licenses:read", "licenses:write"], "quota": null,
            "ratelimit": {"limit": 3000, "remaining": 2999, "resets_at": "2026-09-21T14:14:20.000Z"}})
    );
    assert_eq!(house.code(json!({"key": token, "scope": "licenses:write", "ip": "192.0.2.1"})).await, "valid");
    // With the credential that calls, too.
    house.called_by(team_key("key_1", "team_1", Mode::Live));
    assert_eq!(house.code(json!({"key": token})).await, "valid");
}

#[tokio::test]
async fn what_is_no_good_key_of_the_team_is_one_answer() {
    let house = House::new();
    let foreign = house.token(TokenKind::TeamLive, team_key("key_2", "team_2", Mode::Live));
    let expected = json!({"valid": false, "code": "invalid_key", "key_id": null, "team_id": null, "mode": null,
        "scopes": [], "ratelimit": null, "quota": null});
    let other_scope = json!({"key": foreign, "scope": "audit:write", "ip": "192.0.2.1"});
    for body in [json!({"key": foreign}), other_scope, json!({"key": TokenKind::TeamLive.generate()})] {
        assert_eq!(house.verify(body.clone()).await.json, expected);
        assert_eq!(house.code(body).await, "invalid_key");
    }
}

#[tokio::test]
async fn what_can_be_no_key_is_not_asked_about() {
    let house = House::new();
    let mut mistyped = TokenKind::TeamLive.generate();
    mistyped.pop();
    let jwt = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJ1c3JfMSJ9.c2lnbmF0dXJl".to_owned();
    let owner =
        Principal { kind: Caller::Account.into(), role: Role::Owner.into(), ..team_key("usr_1", "team_1", Mode::Live) };
    house.doorman.keys.lock().unwrap().insert(jwt.clone(), owner);
    let public = house.token(TokenKind::ProductPublic, team_key("key_3", "team_1", Mode::Live));
    for token in [mistyped, jwt, public, "nonsense".into(), "x".repeat(512), "é".into()] {
        assert_eq!(house.code(json!({"key": token})).await, "invalid_key", "{token}");
        assert!(!house.asked(&token), "{token} was asked about");
    }
}

#[tokio::test]
async fn keys_of_every_other_kind_are_keys() {
    let house = House::new();
    for (token, kind) in [
        (TokenKind::PlatformLive, Caller::TeamKey),
        (TokenKind::PlatformTest, Caller::TeamKey),
        (TokenKind::TeamTest, Caller::TeamKey),
        (TokenKind::Free, Caller::FreeKey),
        (TokenKind::ProductSecret, Caller::ProductSecretKey),
    ] {
        let token = house.token(token, Principal { kind: kind.into(), ..team_key("key_1", "team_1", Mode::Test) });
        assert_eq!(house.code(json!({"key": token})).await, "valid", "{kind:?}");
    }
}

#[tokio::test]
async fn a_scope_that_is_not_held_is_told_of_a_good_key() {
    let house = House::new();
    let token = house.token(TokenKind::TeamLive, team_key("key_1", "team_1", Mode::Live));
    let body = json!({"key": token, "scope": "audit:read"});
    assert_eq!(house.code(body.clone()).await, "scope_insufficient");
    let said = house.verify(body).await.json;
    assert_eq!((&said["key_id"], &said["team_id"], &said["mode"]), (&json!("key_1"), &json!("team_1"), &json!("live")));
    assert_eq!(said["scopes"], json!(["keys:read", "licenses:read", "licenses:write"]));
}

#[tokio::test]
async fn a_read_only_key_holds_no_scope_that_writes() {
    let house = House::new();
    let read_only = Principal { read_only: true, ..team_key("key_1", "team_1", Mode::Live) };
    let token = house.token(TokenKind::TeamLive, read_only);
    assert_eq!(house.code(json!({"key": token, "scope": "licenses:write"})).await, "scope_insufficient");
    assert_eq!(house.code(json!({"key": token, "scope": "licenses:read"})).await, "valid");
    assert_eq!(house.verify(json!({"key": token})).await.json["scopes"], json!(["keys:read", "licenses:read"]));
}

#[tokio::test]
async fn a_users_token_is_never_more_than_the_users_role() {
    let house = House::new();
    for (role, writes, keys) in [
        (Role::Owner, "valid", "valid"),
        (Role::Manager, "valid", "scope_insufficient"),
        (Role::Member, "scope_insufficient", "scope_insufficient"),
        (Role::Unspecified, "scope_insufficient", "scope_insufficient"),
    ] {
        let key =
            Principal { kind: Caller::UserToken.into(), role: role.into(), ..team_key("key_1", "team_1", Mode::Live) };
        let token = house.token(TokenKind::User, key);
        assert_eq!(house.code(json!({"key": token, "scope": "licenses:write"})).await, writes, "{role:?}");
        assert_eq!(house.code(json!({"key": token, "scope": "keys:read"})).await, keys, "{role:?}");
        // A scope that the role allows and the token does not hold.
        assert_eq!(house.code(json!({"key": token, "scope": "clients:read"})).await, "scope_insufficient", "{role:?}");
    }
}

#[tokio::test]
async fn every_scope_is_judged_as_it_is_told() {
    let house = House::new();
    let all: Vec<i32> = Contract::get().scopes().map(|(scope, _)| scope.into()).collect();
    for (kind, role, read_only) in [
        (Caller::TeamKey, Role::Unspecified, false),
        (Caller::TeamKey, Role::Unspecified, true),
        (Caller::UserToken, Role::Manager, false),
        (Caller::UserToken, Role::Manager, true),
    ] {
        let key = Principal {
            kind: kind.into(),
            role: role.into(),
            read_only,
            scopes: all.clone(),
            ..team_key("key_1", "team_1", Mode::Live)
        };
        let token = house.token(TokenKind::User, key);
        let told = house.verify(json!({"key": token})).await.json["scopes"].clone();
        for (_, options) in Contract::get().scopes() {
            let is_told = told.as_array().unwrap().contains(&json!(options.word));
            let code = house.code(json!({"key": token, "scope": options.word})).await;
            assert_eq!(code == "valid", is_told, "{kind:?} {} {code}", options.word);
        }
    }
}

#[tokio::test]
async fn a_key_with_an_allowlist_is_good_from_there_only() {
    let house = House::new();
    let key = Principal {
        allowlist: vec!["192.0.2.0/24".into(), "2001:db8::/32".into()],
        ..team_key("key_1", "team_1", Mode::Live)
    };
    let token = house.token(TokenKind::TeamLive, key);
    for ip in ["192.0.2.1", "2001:db8::7", "::ffff:192.0.2.1"] {
        assert_eq!(house.code(json!({"key": token, "ip": ip})).await, "valid", "{ip}");
    }
    for ip in ["192.0.3.1", "2001:db9::7", "::ffff:192.0.3.1"] {
        assert_eq!(house.code(json!({"key": token, "ip": ip})).await, "ip_not_allowed", "{ip}");
    }
    // Where the gateway itself is called from says nothing of the vendor's caller.
    assert_eq!(house.code(json!({"key": token})).await, "ip_not_allowed");
    let said = house.verify(json!({"key": token})).await.json;
    assert_eq!(
        (&said["valid"], &said["key_id"], &said["scopes"][0]),
        (&json!(false), &json!("key_1"), &json!("keys:read"))
    );
    // What the key may not do anyway is told first.
    assert_eq!(house.code(json!({"key": token, "scope": "audit:read"})).await, "scope_insufficient");
}

#[tokio::test]
async fn what_is_asked_must_make_sense_whatever_the_key() {
    let house = House::new();
    let token = house.token(TokenKind::TeamLive, team_key("key_1", "team_1", Mode::Live));
    for (name, value) in
        [("scope", "licences:read"), ("scope", ""), ("ip", "192.0.2.300"), ("ip", ""), ("ip", "192.0.2.0/24")]
    {
        for key in [token.as_str(), "nonsense"] {
            let said = house.verify(json!({"key": key, name: value})).await;
            assert_eq!(said.status, 400, "{name}={value}: {}", said.json);
            assert_eq!(said.json["error"]["details"][0]["field"], name);
            let text = |wanted| (name == wanted).then(|| value.to_owned());
            let request = VerifyKeyRequest {
                key: key.into(),
                scope: text("scope"),
                ip: text("ip"),
                ..VerifyKeyRequest::default()
            };
            let refused = Error::from_status(&house.by_grpc(request).await.unwrap_err());
            assert_eq!((refused.reason(), refused.violations()[0].field.as_str()), (Reason::ValidationFailed, name));
        }
    }
    for body in [json!({}), json!({"key": ""}), json!({"key": "x".repeat(513)}), json!({"key": 7})] {
        let said = house.verify(body).await;
        assert_eq!((said.status, &said.json["error"]["details"][0]["field"]), (400, &json!("key")));
    }
    let refused = house.by_grpc(VerifyKeyRequest::default()).await.unwrap_err();
    assert_eq!(Error::from_status(&refused).violations()[0].field, "key");
}

#[tokio::test]
async fn nobody_in_test_mode_sees_a_live_key() {
    let house = House::new();
    let live = house.token(TokenKind::TeamLive, team_key("key_1", "team_1", Mode::Live));
    let test = house.token(TokenKind::TeamTest, team_key("key_2", "team_1", Mode::Test));
    assert_eq!(house.code(json!({"key": live})).await, "valid");
    assert_eq!(house.code(json!({"key": test})).await, "valid");
    house.called_by(team_key("key_caller", "team_1", Mode::Test));
    assert_eq!(house.code(json!({"key": live})).await, "invalid_key");
    assert_eq!(house.code(json!({"key": test})).await, "valid");
}

#[tokio::test]
async fn the_installation_itself_verifies_every_teams_keys_and_nobody_else_sees_its_own() {
    let house = House::new();
    let foreign = house.token(TokenKind::TeamLive, team_key("key_2", "team_2", Mode::Live));
    let system = Principal { kind: Caller::SystemKey.into(), ..team_key("key_0", "", Mode::Unspecified) };
    let token = house.token(TokenKind::System, system.clone());
    assert_eq!(house.code(json!({"key": token})).await, "invalid_key");
    assert!(!house.asked(&token));
    house.called_by(system);
    assert_eq!(house.code(json!({"key": foreign})).await, "valid");
    assert_eq!(house.verify(json!({"key": foreign})).await.json["team_id"], "team_2");
    let said = house.verify(json!({"key": token})).await.json;
    assert_eq!(
        (&said["code"], &said["key_id"], &said["team_id"], &said["mode"]),
        (&json!("valid"), &json!("key_0"), &Json::Null, &Json::Null)
    );
}

#[tokio::test]
async fn where_nobody_can_be_asked_nothing_is_verified() {
    let house = House::new();
    let token = house.token(TokenKind::TeamLive, team_key("key_1", "team_1", Mode::Live));
    house.doorman.is_gone.store(true, Ordering::SeqCst);
    assert_eq!(house.verify(json!({"key": token})).await.status, 503);
    let request = VerifyKeyRequest { key: token, ..VerifyKeyRequest::default() };
    assert_eq!(house.by_grpc(request).await.unwrap_err().code(), tonic::Code::Unavailable);
    // What can be no key needs nobody.
    assert_eq!(house.code(json!({"key": "nonsense"})).await, "invalid_key");
}

#[tokio::test]
async fn only_those_who_may_see_keys_may_verify_them() {
    let house = House::new();
    let token = house.token(TokenKind::TeamLive, team_key("key_1", "team_1", Mode::Live));
    let caller = |kind: Caller, role: Role, scopes: Vec<i32>| Principal {
        kind: kind.into(),
        role: role.into(),
        scopes,
        ..team_key("key_caller", "team_1", Mode::Live)
    };
    let keys_read = || vec![Scope::KeysRead.into()];
    for (caller, status) in [
        (caller(Caller::TeamKey, Role::Unspecified, keys_read()), 200),
        (caller(Caller::FreeKey, Role::Unspecified, keys_read()), 200),
        (caller(Caller::UserToken, Role::Admin, keys_read()), 200),
        (caller(Caller::UserToken, Role::Manager, keys_read()), 403),
        (caller(Caller::TeamKey, Role::Unspecified, vec![Scope::LicensesRead.into()]), 403),
        (caller(Caller::ProductSecretKey, Role::Unspecified, keys_read()), 401),
        (caller(Caller::Account, Role::Owner, Vec::new()), 401),
        (Principal { expires_at_ms: NOW_MS, ..caller(Caller::TeamKey, Role::Unspecified, keys_read()) }, 401),
    ] {
        let kind = caller.kind();
        house.called_by(caller);
        assert_eq!(house.verify(json!({"key": token})).await.status, status, "{kind:?}");
    }
    let mut stranger = KeyVerificationServiceClient::new(Wire(house.gateway.clone()));
    let refused =
        stranger.verify_key(VerifyKeyRequest { key: token, ..VerifyKeyRequest::default() }).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated);
}

#[tokio::test]
async fn browsers_and_reflection_find_it_too() {
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };
    const SERVICE: &str = "paperkey.gateway.v1.KeyVerificationService";
    let house = House::new();
    let token = house.token(TokenKind::TeamLive, team_key("key_1", "team_1", Mode::Live));
    let message = VerifyKeyRequest { key: token, ..VerifyKeyRequest::default() }.encode_to_vec();
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.len()).unwrap().to_be_bytes());
    frame.extend(message);
    let request = Request::post(format!("/{SERVICE}/VerifyKey"))
        .header("authorization", "Bearer caller")
        .header("content-type", "application/grpc-web+proto")
        .body(Full::new(Bytes::from(frame)))
        .unwrap();
    let answer = house.gateway.handle(request, PEER.parse().unwrap()).await;
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    let length = usize::try_from(u32::from_be_bytes(body[1..5].try_into().unwrap())).unwrap();
    let answer = VerifyKeyResponse::decode(&body[5..5 + length]).unwrap();
    assert_eq!((answer.code(), answer.key_id.as_deref()), (VerificationCode::Valid, Some("key_1")));

    let mut reflection = ServerReflectionClient::new(Wire(house.gateway.clone()));
    let ask = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let answers = reflection.server_reflection_info(futures_util::stream::iter([ask])).await.unwrap();
    let answer = answers.into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else { panic!("no list") };
    assert!(list.service.iter().any(|service| service.name == SERVICE));
}
