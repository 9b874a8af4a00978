//! A gateway that knows a few credentials and no service, in memory or on a real socket.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use async_trait::async_trait;
use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt as _, Full};
use paperkey_gateway::{Gateway, GatewayConfig, GatewayDeps, GatewayError};
use paperkey_kit::{
    authn::Authenticator,
    channel::Channel,
    clock::Clock,
    config::Upstream,
    host,
    limits::{Limiter, MemoryLimiter, Subjects},
    principal::Signer,
    secrets::Keyring,
    shutdown::{self, ShutdownHandle},
};
use paperkey_proto::{
    Error,
    options::v1::{Caller, Scope},
    principal::v1::{Mode, Principal, Role},
};
use serde_json::Value as Json;
use tokio::net::TcpListener;

/// A stranger's address.
pub(crate) const STRANGER: &str = "203.0.113.7:4321";
/// The address of a proxy that is trusted.
pub(crate) const PROXY: &str = "10.0.0.1:4321";
/// No test waits longer for what should come at once.
pub(crate) const GENEROUS: Duration = Duration::from_secs(30);

/// When everything here happens.
const NOW_MS: i64 = 1_790_000_000_000;

/// Knows a credential of each kind.
struct Knower;

#[async_trait]
impl Authenticator for Knower {
    async fn authenticate(&self, credential: &str, team: Option<&str>, mode: Mode) -> Result<Arc<Principal>, Error> {
        let kind = match credential {
            "pk_1" => Caller::ProductPublicKey,
            "a.b.c" => Caller::Account,
            "po_ut_member" => Caller::UserToken,
            "po_sk_system" => Caller::SystemKey,
            "pk_free_1" => Caller::FreeKey,
            "pk_live_down" => return Err(Error::unavailable("auth is away, says the password hunter2")),
            "pk_live_gone" => return Err(Error::unauthenticated()),
            team if team.starts_with("pk_live_") => Caller::TeamKey,
            _ => return Err(Error::unauthenticated()),
        };
        let of_team = if kind == Caller::SystemKey { team.unwrap_or_default() } else { "team_1" };
        let scopes = [Scope::LicensesRead, Scope::LicensesWrite, Scope::ProductsRead];
        Ok(Arc::new(Principal {
            kind: kind.into(),
            id: format!("key_of_{credential}"),
            user_id: if kind == Caller::UserToken { "usr_1".into() } else { String::new() },
            team_id: of_team.to_owned(),
            mode: if mode == Mode::Unspecified { Mode::Live.into() } else { mode.into() },
            role: if kind == Caller::UserToken { Role::Member.into() } else { Role::Unspecified.into() },
            scopes: scopes.iter().map(|scope| i32::from(*scope)).collect(),
            read_only: credential.ends_with("readonly"),
            allowlist: if credential.ends_with("home") { vec!["198.51.100.0/24".into()] } else { Vec::new() },
            expires_at_ms: match credential {
                "pk_live_expired" => NOW_MS,
                "pk_live_old" => NOW_MS + 3_600_000,
                _ => 0,
            },
            superseded: credential == "pk_live_old",
            ..Principal::default()
        }))
    }
}

/// A gateway, or why there is none.
pub(crate) fn gateway_with(change: impl FnOnce(&mut GatewayConfig)) -> Result<Gateway, GatewayError> {
    let (clock, _) = Clock::manual(NOW_MS);
    let signer = Signer::new(&Keyring::for_tests(), clock.clone());
    let owners = ["auth", "catalog", "licensing", "webhook"];
    let channels: HashMap<_, _> = owners.map(|owner| (owner.to_owned(), Channel::local())).into();
    let mut config = GatewayConfig {
        public_url: "https://keys.example/".into(),
        public_url_is_configured: true,
        trusted_proxies: vec!["10.0.0.0/8".parse().unwrap()],
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
        authenticator: Arc::new(Knower),
        signer,
        limiter: Arc::new(Limiter::Memory(MemoryLimiter::new(clock.clone()))),
        subjects: Subjects::new(&Keyring::for_tests()),
        clock,
        audit: None,
        incidents: None,
        shutdown: None,
        places: None,
    };
    Gateway::new(config, deps)
}

/// A gateway without upstreams.
pub(crate) fn gateway() -> Gateway {
    gateway_with(|_| {}).unwrap()
}

/// What was answered in memory.
pub(crate) struct Said {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Said {
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    pub(crate) fn json(&self) -> Json {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{:?} is no JSON", self.body))
    }

    /// The code of the agent envelope.
    pub(crate) fn code(&self) -> String {
        self.json()["error"]["code"].as_str().unwrap_or_default().to_owned()
    }
}

/// Asks a gateway in memory: `GET /path`, from a socket's other end.
pub(crate) async fn ask(gateway: &Gateway, peer: &str, line: &str, headers: &[(&str, &str)], body: &str) -> Said {
    let (verb, path) = line.split_once(' ').unwrap();
    let mut request = Request::builder().method(verb).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(Bytes::from(body.to_owned()))).unwrap();
    let (head, body) = gateway.handle(request, peer.parse().unwrap()).await.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Said { status: head.status.as_u16(), headers: head.headers, body }
}

/// A gateway on a socket. It ends when this value goes.
pub(crate) struct Listening {
    pub(crate) at: SocketAddr,
    _handle: ShutdownHandle,
}

/// A gateway on a socket, before these upstreams.
pub(crate) async fn listening(change: impl FnOnce(&mut GatewayConfig)) -> Listening {
    let gateway = gateway_with(change).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = listener.local_addr().unwrap();
    let (handle, shutdown) = shutdown::channel();
    let handler = move |request, peer| gateway.handle(request, peer);
    tokio::spawn(host::serve(listener, handler, shutdown, Duration::from_secs(1)));
    Listening { at, _handle: handle }
}

/// An upstream at a path.
pub(crate) fn mount(path: &str, url: &str) -> Upstream {
    Upstream { path: path.into(), url: url.into(), ..Upstream::default() }
}
