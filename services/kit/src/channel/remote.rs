//! A call to another process: on which connection it goes, and what becomes of it where that one fails.

use std::sync::{
    Arc, OnceLock,
    atomic::{AtomicBool, Ordering},
};

use http::{HeaderMap, HeaderValue, Method as Verb, Request, Response, Uri, Version, uri::PathAndQuery};
use hyper::client::conn::TrySendError;
use paperkey_proto::{Contract, Error};
use tokio::{
    task::AbortHandle,
    time::{Instant, timeout_at},
};
use tonic::{Code, Status, body::Body};

use super::{
    ChannelStats, ClientTls, Resolver,
    body::{Outgoing, Payload, Received},
    deadline::{self, too_late},
    dial::Target,
    pool::{Pool, Slot, keep},
    retry::{MORE_TRIES, MOVES, is_unavailable, is_under_way, was_refused},
};
use crate::{
    principal::{Caller, PRINCIPAL_HEADER, REQUEST_ID_HEADER, Signer},
    shed::SHED_HEADER,
    telemetry,
};

/// The pause before a call goes to the same process again.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(50);

/// The way to a service in other processes. Dials when first used.
#[derive(Clone)]
pub(super) struct Remote(Arc<Kept>);

struct Kept {
    pool: Arc<Pool>,
    keeper: OnceLock<AbortHandle>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(keeper) = self.keeper.get() {
            keeper.abort();
        }
    }
}

/// In whose name a call is made. It is signed when it is sent, since what is signed is good for seconds.
pub(super) struct Signed {
    pub(super) caller: Caller,
    pub(super) signer: Signer,
}

/// What is sent, each time that it is.
struct Outbound {
    path: PathAndQuery,
    headers: HeaderMap,
    signed: Option<Signed>,
    until: Option<Instant>,
}

/// What became of a try.
enum Outcome {
    Answered(Response<Body>),
    /// Nobody has acted upon it.
    Untouched {
        payload: Option<Payload>,
        why: Error,
    },
    /// Nobody has, and it was answered: there is too much to do there.
    Shed(Response<Body>),
    /// Somebody may have. The answer is there where it says that the service cannot.
    Doubtful(Result<Response<Body>, Error>),
}

impl Remote {
    pub(super) fn new(urls: &str, tls: Option<ClientTls>, resolver: Resolver) -> Result<Self, Error> {
        let pool = Arc::new(Pool::new(Target::all(urls)?, tls, resolver));
        Ok(Self(Arc::new(Kept { pool, keeper: OnceLock::new() })))
    }

    pub(super) fn stats(&self) -> ChannelStats {
        self.0.pool.stats()
    }

    pub(super) fn trouble(&self) -> Option<String> {
        self.0.pool.trouble()
    }

    /// Makes a call.
    pub(super) async fn call(self, request: Request<Body>, signed: Option<Signed>) -> Result<Response<Body>, Status> {
        let until = deadline::of(&request);
        match until {
            Some(until) if until <= Instant::now() => Err(too_late().into()),
            Some(until) => {
                let answer = timeout_at(until, self.exchange(request, signed, Some(until))).await;
                answer.unwrap_or_else(|_| Err(too_late().into()))
            }
            None => self.exchange(request, signed, None).await,
        }
    }

    async fn exchange(
        &self,
        request: Request<Body>,
        signed: Option<Signed>,
        until: Option<Instant>,
    ) -> Result<Response<Body>, Status> {
        let pool = &self.0.pool;
        self.0.keeper.get_or_init(|| tokio::spawn(keep(Arc::clone(pool))).abort_handle());
        pool.is_used();
        pool.calls.fetch_add(1, Ordering::Relaxed);
        pool.budget.earn();

        let (head, body) = request.into_parts();
        let method = Contract::get().method(head.uri.path()).filter(|method| !method.streams);
        let is_once = signed.as_ref().is_some_and(|signed| signed.caller.once.is_some());
        let may_repeat = method.is_some_and(|method| method.may_repeat() || (is_once && method.policy.idempotent));
        let mut payload = match method {
            Some(_) => Payload::read(body).await?,
            None => Payload::Stream(body),
        };
        let path = head.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        let outbound = Outbound { path, headers: head.headers, signed, until };

        let (mut tries, mut moves, mut was_shed) = (0, 0, false);
        let mut avoided = None;
        // What became of the first try that somebody may have acted upon.
        let mut doubt = None;
        loop {
            let slot = pool.slot(avoided.as_ref()).await?;
            let place = Arc::clone(slot.place());
            let again = match &payload {
                Payload::Whole(data) => Some(data.clone()),
                Payload::Stream(_) => None,
            };
            let is_whole = again.is_some();
            let outcome = outbound.send(slot, payload, may_repeat && is_whole).await;
            let is_elsewhere = avoided.as_ref().is_none_or(|avoided| !Arc::ptr_eq(avoided, &place));
            payload = match outcome {
                // The one that it waits for is our own first try, of which the caller knows nothing.
                Outcome::Answered(response) if is_once && is_under_way(&response) => {
                    return doubt.map_or(Ok(response), Err);
                }
                Outcome::Answered(response) => return Ok(response),
                Outcome::Shed(response) => match again {
                    Some(data) if !was_shed && pool.has_other(&place) => {
                        was_shed = true;
                        Payload::Whole(data)
                    }
                    _ => return Ok(response),
                },
                Outcome::Untouched { payload, why } => {
                    moves += 1;
                    match payload.or_else(|| again.map(Payload::Whole)) {
                        Some(payload) if moves <= MOVES => payload,
                        _ => return Err(why.into()),
                    }
                }
                Outcome::Doubtful(answer) => {
                    let Some(data) = again.filter(|_| may_repeat && tries < MORE_TRIES) else {
                        return answer.map_err(Status::from);
                    };
                    if !pool.budget.spend() {
                        pool.retries_refused.fetch_add(1, Ordering::Relaxed);
                        return answer.map_err(Status::from);
                    }
                    doubt.get_or_insert_with(|| match answer {
                        Ok(response) => Status::from_header_map(response.headers())
                            .unwrap_or_else(|| Error::unavailable("there was no answer").into()),
                        Err(error) => error.into(),
                    });
                    tries += 1;
                    pool.retries.fetch_add(1, Ordering::Relaxed);
                    Payload::Whole(data)
                }
            };
            if !is_elsewhere {
                tokio::time::sleep(PAUSE.mul_f64(rand::random_range(0.5..1.5))).await;
            }
            avoided = Some(place);
        }
    }
}

impl<B> telemetry::Refusal for TrySendError<B> {
    fn code(&self) -> Code {
        Code::Unavailable
    }
}

impl Outbound {
    /// Sends it on one connection.
    async fn send(&self, slot: Slot, payload: Payload, may_repeat: bool) -> Outcome {
        let taken = Arc::new(AtomicBool::new(false));
        let (body, is_whole) = match payload {
            Payload::Whole(data) => (Outgoing::Whole { data: Some(data), taken: Arc::clone(&taken) }, true),
            Payload::Stream(body) => (Outgoing::Stream(body), false),
        };
        let mut request = match self.request(&slot, body) {
            Ok(request) => request,
            Err(error) => return Outcome::Doubtful(Err(error)),
        };
        // Each time that it is sent is a part of the trace by itself.
        let hop = telemetry::hop(&mut request);
        let answering = hop.around(slot.sender().try_send_request(request));
        let answer = if may_repeat {
            tokio::select! {
                biased;
                answer = answering => answer,
                () = slot.deserted() => {
                    let why = format!("{}: nothing is heard of it", slot.place());
                    return Outcome::Doubtful(Err(Error::unavailable(why)));
                }
            }
        } else {
            answering.await
        };
        match answer {
            Ok(mut response) if response.headers().contains_key(SHED_HEADER) => {
                response.headers_mut().remove(SHED_HEADER);
                slot.spare();
                Outcome::Shed(response.map(|body| Body::new(Received::stream(body, slot))))
            }
            Ok(response) if may_repeat && is_unavailable(&response) => {
                let (head, body) = response.into_parts();
                Outcome::Doubtful(Ok(Response::from_parts(head, Body::new(Received::stream(body, slot)))))
            }
            Ok(response) if may_repeat => {
                let (head, body) = response.into_parts();
                let place = Arc::clone(slot.place());
                match Received::whole(body, slot).await {
                    Ok(body) => Outcome::Answered(Response::from_parts(head, Body::new(body))),
                    Err(error) => Outcome::Doubtful(Err(place.cut_off(&error))),
                }
            }
            Ok(response) => Outcome::Answered(response.map(|body| Body::new(Received::stream(body, slot)))),
            Err(mut failed) => {
                let why = slot.place().cut_off(failed.error());
                if let Some(request) = failed.take_message() {
                    slot.leave_out();
                    let payload = match request.into_body() {
                        Outgoing::Stream(body) => Some(Payload::Stream(body)),
                        Outgoing::Whole { .. } => None,
                    };
                    return Outcome::Untouched { payload, why };
                }
                // A message of which nothing has left cannot have been acted upon: no service acts upon headers.
                if was_refused(failed.error()) || (is_whole && !taken.load(Ordering::Acquire)) {
                    return Outcome::Untouched { payload: None, why };
                }
                Outcome::Doubtful(Err(why))
            }
        }
    }

    fn request(&self, slot: &Slot, body: Outgoing) -> Result<Request<Outgoing>, Error> {
        let target = &slot.place().target;
        let mut uri = http::uri::Parts::default();
        uri.scheme = Some(target.scheme.clone());
        uri.authority = Some(target.authority.clone());
        uri.path_and_query = Some(self.path.clone());
        let mut request = Request::new(body);
        *request.method_mut() = Verb::POST;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = Uri::from_parts(uri).map_err(Error::internal)?;
        *request.headers_mut() = self.headers.clone();
        if let Some(until) = self.until {
            let left = deadline::header(until).ok_or_else(too_late)?;
            request.headers_mut().insert(deadline::TIMEOUT_HEADER, left);
        }
        if let Some(Signed { caller, signer }) = &self.signed {
            request.headers_mut().insert(PRINCIPAL_HEADER, signer.sign_as(caller, self.path.path()));
            if let Ok(id) = HeaderValue::from_str(&caller.request_id) {
                request.headers_mut().insert(REQUEST_ID_HEADER, id);
            }
        }
        Ok(request)
    }
}
