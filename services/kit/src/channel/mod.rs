//! One type for a service in this process and a service elsewhere.
//!
//! A generated server is a tower service, so a generated client can call it without a socket: same encoding, same
//! policy, no second way. What a network would enforce by being there, [`Channel::local`] enforces itself: it drops
//! the caller's extensions, keeps the deadline, and turns a panic into an error.
//!
//! Who calls, [`Channel::call_as`] says: signed on the way to another process, and by value to a service in this one,
//! where there is nothing between the two that could change it. The policy judges both alike.

use std::{
    convert::Infallible,
    future::Future,
    io,
    net::SocketAddr,
    panic::AssertUnwindSafe,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt as _, future::BoxFuture};
use http::{Request, Response};
use paperkey_proto::{Error, errors::v1::Reason, options::v1::Caller as Kind, principal::v1::Principal};
use rustls::ClientConfig;
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status, body::Body};
use tower::Service;

use self::{
    deadline::too_late,
    remote::{Remote, Signed},
};
use crate::{
    policy::Guarded,
    principal::{Caller, Signer, Tenant},
};

mod body;
pub(crate) mod deadline;
mod dial;
mod pool;
mod remote;
mod retry;

/// How long a call that one service makes to another may take.
const SERVICE_CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// How connections are encrypted: asked for each one that is dialled, so that what is renewed is used.
pub type ClientTls = Arc<dyn Fn() -> Arc<ClientConfig> + Send + Sync>;

/// Finds the addresses of a host and a port.
pub type Resolver = Arc<dyn Fn(String, u16) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> + Send + Sync>;

/// The way to a service.
#[derive(Clone)]
pub struct Channel(Way);

#[derive(Clone)]
enum Way {
    /// Services that call each other are assembled first and bound after.
    Local(Arc<OnceLock<Guarded>>),
    Remote(Remote),
}

impl std::fmt::Debug for Channel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.0 {
            Way::Local(_) => "Channel::Local",
            Way::Remote(_) => "Channel::Remote",
        })
    }
}

impl Channel {
    /// The service is in this process, and is bound later by [`Self::bind`].
    pub fn local() -> Self {
        Self(Way::Local(Arc::default()))
    }

    /// Says which service this is the way to. Only the first binding of a local channel counts.
    pub fn bind(&self, service: Guarded) {
        if let Way::Local(slot) = &self.0 {
            // A second binding would be two services of one name; the first keeps it.
            let _ = slot.set(service);
        }
    }

    /// The service is at a URL such as `http://10.0.0.7:7001`, or at several with commas between them. A host may have
    /// several addresses: calls are shared among all that answer. Dials when first used. Peers at `https://` are judged
    /// by `tls`, and by the public authorities where there is none.
    pub fn connect(urls: &str, tls: Option<ClientTls>) -> Result<Self, Error> {
        let system: Resolver = Arc::new(|host, port| {
            Box::pin(async move { Ok(tokio::net::lookup_host((host.as_str(), port)).await?.collect()) })
        });
        Self::connect_by(urls, tls, system)
    }

    /// The same, with hosts looked up by a resolver of one's own.
    pub fn connect_by(urls: &str, tls: Option<ClientTls>, resolver: Resolver) -> Result<Self, Error> {
        Remote::new(urls, tls, resolver).map(|remote| Self(Way::Remote(remote)))
    }

    /// What the way to other processes has carried; none where the service is in this one.
    pub fn stats(&self) -> Option<ChannelStats> {
        match &self.0 {
            Way::Local(_) => None,
            Way::Remote(remote) => Some(remote.stats()),
        }
    }

    /// Why there is no connection to other processes, where one was tried and there is none.
    pub fn trouble(&self) -> Option<String> {
        match &self.0 {
            Way::Local(_) => None,
            Way::Remote(remote) => remote.trouble(),
        }
    }

    /// The same way for calls that this process makes in its own name, for a tenant or for none.
    pub fn as_service(&self, name: &'static str, signer: Signer, tenant: Option<&Tenant>) -> ServiceChannel {
        let principal = Principal {
            kind: Kind::Service.into(),
            id: name.to_owned(),
            name: name.to_owned(),
            team_id: tenant.map(|tenant| tenant.team_id.clone()).unwrap_or_default(),
            mode: tenant.map(|tenant| tenant.mode.into()).unwrap_or_default(),
            ..Principal::default()
        };
        ServiceChannel { channel: self.clone(), signer, principal: Arc::new(principal), request_id: String::new() }
    }

    /// Makes a call in the name of a caller. How long it may take is for whoever waits for it to say.
    pub fn call_as(&self, caller: Caller, signer: &Signer, mut request: Request<Body>) -> Exchange {
        match &self.0 {
            Way::Local(slot) => match slot.get() {
                Some(service) => {
                    request.extensions_mut().clear();
                    let service = service.clone();
                    Box::pin(unwound(async move { service.call_as(request, caller).await }))
                }
                None => Box::pin(std::future::ready(Err(not_started()))),
            },
            Way::Remote(remote) => {
                Box::pin(remote.clone().call(request, Some(Signed { caller, signer: signer.clone() })))
            }
        }
    }
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Body>;
    type Error = Status;
    type Future = Exchange;

    /// The call itself waits until there is a connection.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        match &self.0 {
            Way::Local(slot) => {
                let Some(service) = slot.get() else { return Box::pin(std::future::ready(Err(not_started()))) };
                request.extensions_mut().clear();
                let service = service.clone();
                Box::pin(unwound(async move { service.call(request).await }))
            }
            Way::Remote(remote) => Box::pin(remote.clone().call(request, None)),
        }
    }
}

/// What a way to other processes has carried since it was made, and how it stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChannelStats {
    /// Calls that were made, each once however often it was sent.
    pub calls: u64,
    /// How often a call was sent again that somebody may have acted upon.
    pub retries: u64,
    /// How often one was not, since too many were.
    pub retries_refused: u64,
    /// Attempts to connect that came to nothing.
    pub dials_failed: u64,
    /// Addresses to which there is a connection.
    pub connected: u64,
    /// Addresses of all that the URLs name.
    pub known: u64,
    /// Calls under way.
    pub in_flight: u64,
}

/// An answer that is waited for.
pub type Exchange = BoxFuture<'static, Result<Response<Body>, Status>>;

/// A panic is one call's failure, as it would be in another process.
async fn unwound(call: impl Future<Output = Result<Response<Body>, Infallible>>) -> Result<Response<Body>, Status> {
    match AssertUnwindSafe(call).catch_unwind().await {
        Ok(Ok(response)) => Ok(response),
        Err(_) => Err(Error::internal("the handler panicked").into()),
    }
}

fn not_started() -> Status {
    Error::unavailable("the service has not started").into()
}

/// A channel that signs each call with the name of the process that makes it.
#[derive(Clone, Debug)]
pub struct ServiceChannel {
    channel: Channel,
    signer: Signer,
    principal: Arc<Principal>,
    request_id: String,
}

impl ServiceChannel {
    /// Makes the calls part of the request that another caller makes.
    #[must_use]
    pub fn serving(mut self, caller: &Caller) -> Self {
        self.request_id.clone_from(&caller.request_id);
        self
    }
}

impl Service<Request<Body>> for ServiceChannel {
    type Response = Response<Body>;
    type Error = Status;
    type Future = Exchange;

    /// The call itself waits until the channel is ready.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        // Whatever the caller of this service wants done once, what it asks of others is its own business.
        let caller = Caller { principal: Arc::clone(&self.principal), request_id: self.request_id.clone(), once: None };
        let own = Instant::now() + SERVICE_CALL_TIMEOUT;
        // Nobody waits for longer than whoever waits for us.
        let theirs = deadline::current().into_iter().chain(deadline::of(&request)).min().filter(|until| *until < own);
        let until = theirs.unwrap_or(own);
        let Some(left) = deadline::header(until) else { return Box::pin(std::future::ready(Err(too_late().into()))) };
        request.headers_mut().insert(deadline::TIMEOUT_HEADER, left);
        let call = self.channel.call_as(caller, &self.signer, request);
        Box::pin(async move {
            let answer = timeout_at(until, call).await.unwrap_or_else(|_| Err(too_late().into()));
            let is_late = match &answer {
                Ok(response) => Status::from_header_map(response.headers()).is_some_and(|status| is_deadline(&status)),
                Err(status) => is_deadline(status),
            };
            if is_late && theirs.is_none() {
                return Err(Error::unavailable("a service does not answer in time").into());
            }
            answer
        })
    }
}

fn is_deadline(status: &Status) -> bool {
    status.code() == Code::DeadlineExceeded && Error::from_status(status).reason() == Reason::Deadline
}
