//! The public edge: REST, gRPC and gRPC-Web for every public method of the contract, on one port.
//!
//! The gateway is a small generic machine that reads descriptors when it starts. It names no service and no message:
//! routes, JSON, errors and policy all come from the contract, and a new method needs no change here. A request meets,
//! in this order: an id of its own and the caller's address, a route or an rpc, the policy, the body, the service. The
//! one service that it names is its own: whether a key is good is answered here, from what the gateway knows anyway.
//!
//! People in browsers may have their [session] in a cookie.
//!
//! Beside the contract there are [`doors`] for other people's APIs.
//!
//! Deliberately absent: state. Whose a credential is, what is left of a limit and everything else that must be kept
//! is asked of an [`Authenticator`], a [`Limiter`] and the services. What a call was is told to an [`AuditSink`].

mod body;
mod call;
mod credentials;
mod doors;
mod edge;
mod envelope;
mod figures;
mod grpc;
mod json;
mod limits;
mod once;
mod openapi;
mod pages;
mod pieces;
mod policy;
mod rest;
mod samples;
mod session;
mod streams;
mod table;
pub mod transcode;
mod verify;

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderName, HeaderValue, Method as Verb, Request, Response, Uri,
    header::{CACHE_CONTROL, X_CONTENT_TYPE_OPTIONS},
};
use ipnet::IpNet;
use paperkey_kit::{
    audit::AuditSink,
    authn::Authenticator,
    channel::Channel,
    clock::Clock,
    config::{self, Tiers, Upstream},
    ids,
    incidents::Incidents,
    limits::{Limiter, Subjects},
    meters::Meters,
    policy::Guarded,
    principal::{REQUEST_ID_HEADER, Signer},
    ready::Health,
    service::Rpcs,
    shed::{Errand, Places},
    shutdown::Shutdown,
    telemetry::{self, Span},
};
use paperkey_proto::{
    Contract, Error, errors::v1::Reason, gateway::v1::key_verification_service_server::KeyVerificationServiceServer,
};

pub use body::Body;

use call::Call;
use doors::{Answered, Doors};
use envelope::{Refusal, Teller, asks_for_problem};
use figures::Way;
use grpc::Dialect;
use limits::Limits;
use pages::Pages;
use policy::Gate;
use session::Sessions;
use table::Table;
use transcode::Unspeakable;
use verify::Verifier;

/// The owner, in the contract, of what the gateway answers itself.
const OWNER: &str = "gateway";

/// The header that tells a caller the id of the request.
const REQUEST_ID: HeaderName = HeaderName::from_static(REQUEST_ID_HEADER);

/// How a gateway behaves.
#[derive(Clone, Debug)]
pub struct GatewayConfig {
    /// The URL that callers reach the gateway by, such as `https://keys.example.com`.
    pub public_url: String,
    /// Whether somebody has said so, or it is a guess from where the gateway listens. Then cookies count on pages of
    /// whatever host is called.
    pub public_url_is_configured: bool,
    /// The networks of proxies whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<IpNet>,
    /// The networks of peers whose traces are gone on with. A proxy is none because it is a proxy: most pass on what
    /// strangers say.
    pub trusted_parents: Vec<IpNet>,
    /// Whether browsers of any origin may call the paths that take keys.
    pub cors_any_origin: bool,
    /// How long a call to a service may take, in milliseconds.
    pub call_timeout_ms: u64,
    /// Servers that the gateway stands in front of.
    pub upstreams: Vec<Upstream>,
    /// What teams pay for.
    pub tiers: Arc<Tiers>,
    /// The limits of all classes.
    pub limits: config::Limits,
    /// Where a team changes its plan.
    pub billing_url: Option<String>,
    /// The version that the page names.
    pub version: &'static str,
}

/// What a gateway stands on.
pub struct GatewayDeps {
    /// The ways to the services, by the owner's name in the contract: `auth`, `catalog` and so on.
    pub channels: HashMap<String, Channel>,
    /// Knows whose a credential is.
    pub authenticator: Arc<dyn Authenticator>,
    /// Signs who calls.
    pub signer: Signer,
    /// The time.
    pub clock: Clock,
    /// Counts calls.
    pub limiter: Arc<Limiter>,
    /// Names whom calls are counted for.
    pub subjects: Subjects,
    /// Where it is told what a call was. Without it nothing is recorded.
    pub audit: Option<Arc<AuditSink>>,
    /// Where it is told what teams should know of.
    pub incidents: Option<Arc<Incidents>>,
    /// Tells it of the end of the process, at which streams end. Without it they end with their connections.
    pub shutdown: Option<Shutdown>,
    /// How much it does at a time. Without it there is no bound.
    pub places: Option<Places>,
}

impl std::fmt::Debug for GatewayDeps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GatewayDeps").finish_non_exhaustive()
    }
}

/// Why a gateway cannot start.
#[derive(Debug, thiserror::Error)]
pub enum GatewayError {
    /// A public method's owner has no channel.
    #[error("public methods of {0} have no channel to go by")]
    NoChannel(String),
    /// A path or template of the contract cannot be routed.
    #[error("{0} cannot be routed")]
    Path(String),
    /// A message has no form in JSON.
    #[error(transparent)]
    Message(#[from] Unspeakable),
    /// A mounted upstream cannot be served.
    #[error("upstreams: {0}")]
    Upstream(String),
    /// A class of the contract has no number.
    #[error("limits.{0} is missing: a class of calls without a limit would be without bound")]
    Limit(String),
    /// The compiled contract cannot be read.
    #[error(transparent)]
    Descriptors(#[from] paperkey_kit::reflection::Garbled),
}

/// The gateway. Clones are the same gateway.
#[derive(Clone)]
pub struct Gateway(Arc<Inner>);

impl std::fmt::Debug for Gateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gateway").field("config", &self.0.config).finish_non_exhaustive()
    }
}

/// What all requests share.
struct Inner {
    config: GatewayConfig,
    contract: &'static Contract,
    table: Table,
    sessions: Sessions,
    verifier: Verifier,
    gate: Gate,
    signer: Signer,
    clock: Clock,
    pages: Pages,
    doors: Doors,
    own_services: Rpcs,
    health: Health,
    meters: Meters,
    audit: Option<Arc<AuditSink>>,
    shutdown: Option<Shutdown>,
    call_timeout: Duration,
    grpc_timeout: HeaderValue,
}

impl Gateway {
    /// A gateway. Fails where a public method could not be served, or would be served without limit.
    pub fn new(mut config: GatewayConfig, deps: GatewayDeps) -> Result<Self, GatewayError> {
        let GatewayDeps {
            channels,
            authenticator,
            signer,
            clock,
            limiter,
            subjects,
            audit,
            incidents,
            shutdown,
            places,
        } = deps;
        let contract = Contract::get();
        figures::publish();
        config.public_url.truncate(config.public_url.trim_end_matches('/').len());
        let auth = channels.get("auth").ok_or_else(|| GatewayError::NoChannel("auth".to_owned()))?;
        let meters = Meters::new(auth, OWNER, signer.clone(), clock.clone());
        let limits = Limits::new(limiter, subjects, &config.limits, Arc::clone(&config.tiers), clock.clone())?;
        let verifier = Verifier::new(Arc::clone(&authenticator), limits.clone(), meters.clone(), &config.tiers);
        let own = Channel::local();
        let rpcs = Rpcs::new(KeyVerificationServiceServer::new(verifier.clone()));
        own.bind(Guarded::new(rpcs, signer.clone(), clock.clone(), None, None));
        let channel = move |owner: &str| if owner == OWNER { Some(own.clone()) } else { channels.get(owner).cloned() };
        let table = Table::new(contract, channel)?;
        let call_timeout = Duration::from_millis(config.call_timeout_ms);
        let gate = Gate {
            authenticator,
            clock: clock.clone(),
            limits,
            tiers: Arc::clone(&config.tiers),
            incidents,
            billing_url: config.billing_url.clone(),
            places,
        };
        let (health, own_services) = grpc::own_services(&table)?;
        Ok(Self(Arc::new(Inner {
            contract,
            own_services,
            health,
            pages: Pages::new(&config),
            doors: Doors::new(contract, &config)?,
            table,
            sessions: Sessions::new(&config.public_url, config.public_url_is_configured),
            verifier,
            gate,
            meters,
            audit,
            shutdown,
            signer,
            clock,
            call_timeout,
            grpc_timeout: rest::grpc_timeout(call_timeout),
            config,
        })))
    }

    /// What it says of its health over gRPC.
    pub fn health(&self) -> Health {
        self.0.health.clone()
    }

    /// Answers one request that came from that socket.
    pub fn handle<B>(
        &self,
        request: Request<B>,
        peer: SocketAddr,
    ) -> impl Future<Output = Response<Body>> + Send + use<B>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        Arc::clone(&self.0).handle(request, peer)
    }
}

impl Inner {
    async fn handle<B>(self: Arc<Self>, request: Request<B>, peer: SocketAddr) -> Response<Body>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let request_id = ids::new_id("req", &self.clock);
        let is_trusted = edge::is_trusted(peer.ip(), &self.config.trusted_parents);
        let (scope, span) = telemetry::arrive(&request_id, request.headers(), is_trusted);
        scope.within(self.answer(request, peer, request_id, span)).await
    }

    async fn answer<B>(
        self: Arc<Self>,
        request: Request<B>,
        peer: SocketAddr,
        request_id: String,
        mut span: Span,
    ) -> Response<Body>
    where
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let gateway = &self;
        // Until it is known what is called.
        span.name(|| telemetry::verb(request.method()).to_owned());
        let client = edge::client_address(request.headers(), peer, &gateway.config.trusted_proxies);
        let mut call = Call::new(&request, client, request_id, &gateway.clock, gateway.audit.clone());
        call.span = span;
        let version = request.version();
        // Only routes read a body.
        let mut unread = !request.body().is_end_stream();
        // What a proxy asks at a door bears the content type of whoever it asks for, and must not choose the answer.
        let dialect = if gateway.doors.leads_through(request.uri().path()) {
            Dialect::Rest
        } else {
            grpc::dialect(request.headers())
        };
        call.way = match dialect {
            Dialect::Grpc => Way::Grpc,
            Dialect::GrpcWeb | Dialect::UnknownWeb => Way::GrpcWeb,
            Dialect::Rest if gateway.doors.leads_through(request.uri().path()) => Way::Door,
            Dialect::Rest => Way::Path,
        };
        let mut response = match dialect {
            Dialect::Grpc if request.uri().path().starts_with(doors::envoy::SERVICE) => {
                call.is_grpc();
                call.way = Way::Door;
                let request = request.map(tonic::body::Body::new);
                let response = Box::pin(doors::envoy::answer(gateway, request, peer, &mut call)).await;
                return gateway.conclude(Some(call), response.map(Body::from));
            }
            Dialect::Grpc => {
                let request = request.map(tonic::body::Body::new);
                // Boxed, so that a REST request does not carry the room that a gRPC one needs.
                let response = Box::pin(grpc::answer(gateway, request, &mut call)).await;
                return gateway.conclude(Some(call), response.map(Body::from));
            }
            Dialect::GrpcWeb if request.method() == Verb::POST => {
                let request = request.map(tonic::body::Body::new);
                let (response, call) = Box::pin(grpc::answer_web(gateway, request, call)).await;
                let mut response = response.map(Body::from);
                if gateway.config.cors_any_origin {
                    edge::share(response.headers_mut());
                }
                return gateway.conclude(call, response);
            }
            Dialect::GrpcWeb => {
                let refusal = Refusal::other_verb(HeaderValue::from_static("POST"));
                gateway.refuse(request.uri().clone(), asks_for_problem(request.headers()), refusal, &mut call).await
            }
            Dialect::UnknownWeb => {
                let error = Error::new(Reason::UnsupportedMediaType).with_message("This encoding is not known here");
                gateway
                    .refuse(request.uri().clone(), asks_for_problem(request.headers()), error.into(), &mut call)
                    .await
            }
            Dialect::Rest if gateway.is_grpc_preflight(&request) => {
                call.aside = true;
                let asked = request.headers().get(http::header::ACCESS_CONTROL_REQUEST_HEADERS);
                edge::preflight(HeaderValue::from_static("POST"), asked)
            }
            Dialect::Rest if gateway.doors.leads_through(request.uri().path()) => {
                unread = false;
                match Box::pin(doors::answer(gateway, request, peer, &mut call)).await {
                    Answered::Ours(response) => response,
                    Answered::Theirs(response) => return gateway.conclude(Some(call), response),
                }
            }
            Dialect::Rest => match gateway.page(&request) {
                Some(Ok(page)) => {
                    call.aside = true;
                    return page;
                }
                Some(Err(refusal)) => {
                    gateway.refuse(request.uri().clone(), asks_for_problem(request.headers()), refusal, &mut call).await
                }
                None => {
                    let (head, body) = request.into_parts();
                    unread = false;
                    rest::answer(gateway, head, body, &mut call).await
                }
            },
        };
        let headers = response.headers_mut();
        if unread {
            edge::hang_up(version, headers);
        }
        if let Ok(id) = HeaderValue::from_str(&call.request_id) {
            headers.insert(REQUEST_ID, id);
        }
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        gateway.conclude(Some(call), response)
    }

    /// Records what a call was, now that it is answered.
    fn conclude(&self, call: Option<Call>, response: Response<Body>) -> Response<Body> {
        let Some(call) = call.filter(|call| !call.aside) else { return response };
        let status = call.error.map_or_else(|| response.status(), |(_, status)| status);
        if let (401 | 403 | 429, Some(incidents)) = (status.as_u16(), &self.gate.incidents) {
            incidents.refused(call.principal.as_deref(), call.client);
        }
        call.ends(status);
        response
    }

    /// Refuses to act where there is no place to, or nobody would learn of it. The latter is not the caller's doing, and
    /// does not count.
    async fn must_be_seen(&self, errand: Errand, service: Option<&str>, call: &mut Call) -> Result<(), Error> {
        if let Err(full) = self.gate.make_room(errand, service, call) {
            // Whoever has too much to do asks nobody else.
            if self.gate.limits.is_known_here() {
                self.gate.look_at_stranger(call).await;
            }
            return Err(full);
        }
        if self.audit.as_ref().is_none_or(|audit| audit.is_open()) {
            return Ok(());
        }
        self.gate.look_at_stranger(call).await;
        Err(Error::unavailable("the audit log takes nothing, and the spool is full"))
    }

    /// The page of a path; surfaces have none.
    fn page<B>(&self, request: &Request<B>) -> Option<Result<Response<Body>, Refusal>> {
        let path = request.uri().path();
        if self.contract.surface_of(path).is_some() {
            None
        } else {
            self.pages.answer(request.method(), path, request.headers())
        }
    }

    /// Whether a browser asks for leave to send gRPC-Web.
    fn is_grpc_preflight<B>(&self, request: &Request<B>) -> bool {
        self.config.cors_any_origin
            && edge::is_preflight(request.method(), request.headers())
            && self.table.rpc(request.uri().path()).is_some()
    }

    /// Refuses a request outside of all routes.
    async fn refuse(&self, uri: Uri, problem: bool, refusal: Refusal, call: &mut Call) -> Response<Body> {
        let counted = self.gate.count_stray(call).await;
        let refusal = counted.err().map_or(refusal, Refusal::from);
        call.failed(&refusal.error);
        let teller = Teller {
            surface: self.contract.surface_of(uri.path()).map(|entry| &entry.options),
            request_id: &call.request_id,
            public_url: &self.config.public_url,
            path: uri.path(),
            problem,
        };
        let mut response = teller.tell(&refusal);
        call.told.put_on(response.headers_mut());
        response
    }
}
