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
    error::Error as _,
    future::Future,
    panic::AssertUnwindSafe,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt as _, future::BoxFuture};
use http::{HeaderValue, Request, Response};
use paperkey_proto::{Error, errors::v1::Reason, options::v1::Caller as Kind, principal::v1::Principal};
use tonic::{Status, body::Body, transport};
use tower::Service;

use crate::{
    policy::Guarded,
    principal::{Caller, PRINCIPAL_HEADER, REQUEST_ID_HEADER, Signer, Tenant},
};

/// How long a dialled connection may take to open.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How often an idle connection is asked whether it lives.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// How long a call that one service makes to another may take.
const SERVICE_CALL_TIMEOUT: Duration = Duration::from_secs(5);

/// The way to a service.
#[derive(Clone)]
pub struct Channel(Way);

#[derive(Clone)]
enum Way {
    /// Services that call each other are assembled first and bound after.
    Local(Arc<OnceLock<Guarded>>),
    Remote(transport::Channel),
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

    /// The service is at a URL such as `http://10.0.0.7:7001`. Connects when first used, and again when cut off.
    pub fn connect(url: &str) -> Result<Self, Error> {
        let endpoint = transport::Endpoint::from_shared(url.to_owned())
            .map_err(Error::unavailable)?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_while_idle(true);
        Ok(Self(Way::Remote(endpoint.connect_lazy())))
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
            Way::Remote(channel) => {
                let assertion = signer.sign_as(&caller, request.uri().path());
                request.headers_mut().insert(PRINCIPAL_HEADER, assertion);
                if let Ok(id) = HeaderValue::from_str(&caller.request_id) {
                    request.headers_mut().insert(REQUEST_ID_HEADER, id);
                }
                Box::pin(send(channel.clone(), request))
            }
        }
    }
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Body>;
    type Error = Status;
    type Future = Exchange;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        match &mut self.0 {
            Way::Local(_) => Poll::Ready(Ok(())),
            Way::Remote(channel) => channel.poll_ready(context).map_err(|error| cut_off(&error)),
        }
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        match &mut self.0 {
            Way::Local(slot) => {
                let Some(service) = slot.get() else { return Box::pin(std::future::ready(Err(not_started()))) };
                request.extensions_mut().clear();
                let deadline = deadline(&request);
                let service = service.clone();
                let call = unwound(async move { service.call(request).await });
                Box::pin(async move {
                    match deadline {
                        Some(deadline) => tokio::time::timeout(deadline, call)
                            .await
                            .map_err(|_| Status::from(Error::new(Reason::Deadline)))?,
                        None => call.await,
                    }
                })
            }
            Way::Remote(channel) => {
                // A clone is not ready, the original was: leave the clone behind.
                let clone = channel.clone();
                Box::pin(send(std::mem::replace(channel, clone), request))
            }
        }
    }
}

/// An answer that is waited for.
pub type Exchange = BoxFuture<'static, Result<Response<Body>, Status>>;

pub(crate) async fn send(mut channel: transport::Channel, request: Request<Body>) -> Result<Response<Body>, Status> {
    std::future::poll_fn(|context| channel.poll_ready(context)).await.map_err(|error| cut_off(&error))?;
    channel.call(request).await.map_err(|error| cut_off(&error))
}

/// What a transport says of itself is "transport error"; why stands behind it.
fn cut_off(error: &transport::Error) -> Status {
    let causes = std::iter::successors(error.source(), |cause| (*cause).source());
    let text = causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"));
    Error::unavailable(text).into()
}

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

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // Whatever the caller of this service wants done once, what it asks of others is its own business.
        let caller = Caller { principal: Arc::clone(&self.principal), request_id: self.request_id.clone(), once: None };
        let call = self.channel.call_as(caller, &self.signer, request);
        Box::pin(async move {
            let answer = tokio::time::timeout(SERVICE_CALL_TIMEOUT, call).await;
            answer.unwrap_or_else(|_| Err(Error::unavailable("a service does not answer in time").into()))
        })
    }
}

/// The `grpc-timeout` of a call: at most eight digits and a unit.
fn deadline<B>(request: &Request<B>) -> Option<Duration> {
    let text = request.headers().get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let value: u64 = (digits.len() <= 8).then(|| digits.parse().ok()).flatten()?;
    match unit {
        "H" => Some(Duration::from_secs(value * 3_600)),
        "M" => Some(Duration::from_secs(value * 60)),
        "S" => Some(Duration::from_secs(value)),
        "m" => Some(Duration::from_millis(value)),
        "u" => Some(Duration::from_micros(value)),
        "n" => Some(Duration::from_nanos(value)),
        _ => None,
    }
}
