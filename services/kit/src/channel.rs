//! One type for a service in this process and a service elsewhere.
//!
//! A generated server is a tower service, so a generated client can call it without a socket: same encoding, same
//! policy, no second way. What a network would enforce by being there, [`Channel::local`] enforces itself: it drops
//! the caller's extensions, keeps the deadline, and turns a panic into an error.

use std::{
    panic::AssertUnwindSafe,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use futures_util::{FutureExt as _, future::BoxFuture};
use http::{Request, Response};
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
        ServiceChannel { channel: self.clone(), signer, principal, request_id: String::new() }
    }
}

impl Service<Request<Body>> for Channel {
    type Response = Response<Body>;
    type Error = Status;
    type Future = BoxFuture<'static, Result<Response<Body>, Status>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        match &mut self.0 {
            Way::Local(_) => Poll::Ready(Ok(())),
            Way::Remote(channel) => channel.poll_ready(context).map_err(|error| Error::unavailable(error).into()),
        }
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        match &mut self.0 {
            Way::Local(slot) => {
                let Some(service) = slot.get() else {
                    return Box::pin(async { Err(Error::unavailable("the service has not started").into()) });
                };
                request.extensions_mut().clear();
                let deadline = deadline(&request);
                let service = service.clone();
                let call = AssertUnwindSafe(async move { service.call(request).await }).catch_unwind();
                Box::pin(async move {
                    let outcome = match deadline {
                        Some(deadline) => tokio::time::timeout(deadline, call)
                            .await
                            .map_err(|_| Status::from(Error::new(Reason::Deadline)))?,
                        None => call.await,
                    };
                    match outcome {
                        Ok(Ok(response)) => Ok(response),
                        Err(_) => Err(Error::internal("the handler panicked").into()),
                    }
                })
            }
            Way::Remote(channel) => {
                // A clone is not ready, the original was: leave the clone behind.
                let clone = channel.clone();
                let mut channel = std::mem::replace(channel, clone);
                Box::pin(async move {
                    std::future::poll_fn(|context| channel.poll_ready(context)).await.map_err(Error::unavailable)?;
                    channel.call(request).await.map_err(|error| Error::unavailable(error).into())
                })
            }
        }
    }
}

/// A channel that signs each call with the name of the process that makes it.
#[derive(Clone, Debug)]
pub struct ServiceChannel {
    channel: Channel,
    signer: Signer,
    principal: Principal,
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
    type Future = BoxFuture<'static, Result<Response<Body>, Status>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Status>> {
        self.channel.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let assertion = self.signer.sign(Some(&self.principal), request.uri().path(), &self.request_id);
        request.headers_mut().insert(PRINCIPAL_HEADER, assertion);
        if let Ok(id) = self.request_id.parse() {
            request.headers_mut().insert(REQUEST_ID_HEADER, id);
        }
        let call = self.channel.call(request);
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
