//! What a service is made from, and what it is made into.

use std::{
    collections::{BTreeMap, HashMap},
    convert::Infallible,
    fmt,
    future::Future,
    sync::Arc,
};

use futures_util::future::BoxFuture;
use http::{Request, Response};
use paperkey_proto::Error;
use tonic::{Status, body::Body, server::NamedService};
use tower::Service;

use crate::{channel::Channel, clock::Clock, db::Database, principal::Signer, secrets::Keyring, shutdown::Shutdown};

/// The names of the services, as in their packages.
pub const SERVICES: [&str; 4] = ["auth", "catalog", "licensing", "webhook"];

/// What every service is given.
#[derive(Clone, Debug)]
pub struct ServiceDeps {
    /// Its own database.
    pub database: Database,
    /// The installation's keys.
    pub keys: Keyring,
    /// The time.
    pub clock: Clock,
    /// Signs its calls to others.
    pub signer: Signer,
    /// The ways to the others.
    pub channels: Channels,
}

/// The ways to the services, by name.
#[derive(Clone, Debug, Default)]
pub struct Channels(BTreeMap<String, Channel>);

impl Channels {
    /// Adds the way to a service.
    pub fn insert(&mut self, service: impl Into<String>, channel: Channel) {
        self.0.insert(service.into(), channel);
    }

    /// The way to a service.
    pub fn get(&self, service: &str) -> Result<&Channel, Error> {
        self.0.get(service).ok_or_else(|| Error::internal(format!("there is no way to the service {service}")))
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Channel)> {
        self.0.iter().map(|(name, channel)| (name.as_str(), channel))
    }
}

/// How a generated server answers.
pub type Answer = BoxFuture<'static, Result<Response<Body>, Infallible>>;

type Server = Arc<dyn Fn(Request<Body>) -> Answer + Send + Sync>;

/// Generated servers, by the name in the path. A router would cost more than the look-up: a path has two parts.
#[derive(Clone, Default)]
pub struct Rpcs(HashMap<&'static str, Server>);

impl Rpcs {
    /// The rpcs of one server.
    pub fn new<S>(server: S) -> Self
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = Answer>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
    {
        Self::default().add_service(server)
    }

    /// And those of another.
    #[must_use]
    pub fn add_service<S>(mut self, server: S) -> Self
    where
        S: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = Answer>
            + NamedService
            + Clone
            + Send
            + Sync
            + 'static,
    {
        // A generated server is always ready, and its clone shares what it serves.
        self.0.insert(S::NAME, Arc::new(move |request| server.clone().call(request)));
        self
    }

    /// Answers a call; one to a server that is not here as the network would.
    pub fn call(&self, request: Request<Body>) -> Answer {
        let name = request.uri().path().trim_start_matches('/').split('/').next().unwrap_or_default();
        match self.0.get(name) {
            Some(server) => server(request),
            None => Box::pin(async { Ok(Status::unimplemented("no such method").into_http()) }),
        }
    }
}

impl fmt::Debug for Rpcs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

/// A service, ready to be hosted.
pub struct Assembled {
    /// Its rpcs.
    pub rpcs: Rpcs,
    /// What it does besides answering.
    pub workers: Vec<Worker>,
}

/// Something that runs until shut down.
pub struct Worker {
    /// What the log calls it.
    pub name: &'static str,
    run: Box<dyn FnOnce(Shutdown) -> BoxFuture<'static, ()> + Send>,
}

impl Worker {
    /// Something that runs until shut down.
    pub fn new<F, Fut>(name: &'static str, run: F) -> Self
    where
        F: FnOnce(Shutdown) -> Fut + Send + 'static,
        Fut: Future<Output = ()> + Send + 'static,
    {
        Self { name, run: Box::new(move |shutdown| Box::pin(run(shutdown))) }
    }

    /// Runs it.
    pub fn run(self, shutdown: Shutdown) -> BoxFuture<'static, ()> {
        (self.run)(shutdown)
    }
}

impl fmt::Debug for Worker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Worker").field(&self.name).finish()
    }
}
