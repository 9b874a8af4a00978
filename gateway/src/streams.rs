//! Answers that go on: they end when their caller may not call any more, and when the gateway itself ends.
//!
//! A call is judged when it arrives. A stream outlives that, and whoever may watch today may be told to leave tomorrow:
//! so the judgement is repeated while the stream lasts, from what the gateway remembers anyway.

use std::{
    future::Future,
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Frame, SizeHint};
use paperkey_kit::{
    policy::{authorize, named_tenant},
    secrets::Secret,
    shed::Place,
    shutdown::Shutdown,
};
use paperkey_proto::{
    Error,
    contract::Method,
    errors::v1::Reason,
    principal::v1::{Mode, Principal},
};
use tonic::{Status, body::Body};

use crate::{
    call::Call,
    policy::{Arrival, Gate, allowed_from},
};

/// How often a caller is judged anew. A revocation is known here within a second, and half of that is left for it.
const JUDGED_EVERY: Duration = Duration::from_millis(400);

type Ending = Pin<Box<dyn Future<Output = Result<(), Error>> + Send>>;

/// What is needed to judge the caller of a stream again.
pub(crate) struct Holder {
    gate: Gate,
    method: Arc<Method>,
    credential: Secret,
    team: Option<String>,
    mode: Mode,
    client: IpAddr,
    /// Who it was when the call was let in.
    principal: Arc<Principal>,
}

impl Holder {
    /// The caller of a call that was let in; none where nobody in particular calls.
    pub(crate) fn of(gate: &Gate, arrival: &Arrival<'_>, call: &Call) -> Result<Option<Self>, Error> {
        let Some(principal) = call.principal.clone() else { return Ok(None) };
        let credential = arrival.presented().credential.map_err(|refusal| *refusal.error)?;
        // Whoever was let in by other means could not be judged again.
        let credential = credential.ok_or_else(Error::unauthenticated)?;
        let (named, mode) = named_tenant(arrival.headers)?;
        Ok(Some(Self {
            principal,
            gate: gate.clone(),
            method: Arc::clone(&arrival.rpc.method),
            credential: Secret::new(credential),
            team: arrival.team.or(named).map(str::to_owned),
            mode,
            client: call.client,
        }))
    }

    fn has_the_rights_of(&self, now: &Principal) -> bool {
        let then = &*self.principal;
        then.scopes == now.scopes
            && then.role == now.role
            && then.read_only == now.read_only
            && then.team_id == now.team_id
            && then.product_id == now.product_id
    }

    /// Waits until the caller may not call any more, and says why. Who cannot be judged may not either.
    async fn refused(self) -> Error {
        loop {
            tokio::time::sleep(JUDGED_EVERY).await;
            let found = self.gate.authenticator.principal(self.credential.expose(), self.team.as_deref(), self.mode);
            let judged = found.await.and_then(|principal| {
                allowed_from(&principal, self.client)?;
                authorize(&self.method, &principal, self.gate.clock.now_ms())?;
                self.gate.included(&principal, self.method.policy.feature())?;
                // What its rights have decided at the beginning is decided anew.
                if self.has_the_rights_of(&principal) { Ok(()) } else { Err(Error::unavailable("other rights")) }
            });
            if let Err(error) = judged {
                return error;
            }
        }
    }
}

/// An answer that ends early where it must.
pub(crate) struct Stream {
    body: Body,
    ending: Option<Ending>,
    /// Its place among the streams that last at a time.
    place: Option<Place>,
    /// Whether the end is told in trailers, as gRPC has it; otherwise the body breaks off.
    trailers: bool,
}

/// Puts the two reasons to end before an answer.
pub(crate) fn ended_with(
    body: Body,
    holder: Option<Holder>,
    shutdown: Option<Shutdown>,
    place: Option<Place>,
    trailers: bool,
) -> Body {
    let ending: Ending = Box::pin(async move {
        let refused = async {
            match holder {
                Some(holder) => holder.refused().await,
                None => std::future::pending().await,
            }
        };
        let over = async {
            match shutdown {
                Some(mut shutdown) => shutdown.wait().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            error = refused => Err(error),
            () = over => Ok(()),
        }
    });
    Body::new(Stream { body, ending: Some(ending), place, trailers })
}

impl Stream {
    fn end(&mut self, why: Result<(), Error>) -> Option<Result<Frame<Bytes>, Status>> {
        self.body = Body::empty();
        let error = match why {
            // Lines that have been told are whole, so this end is as good as any.
            Ok(()) if !self.trailers => return None,
            Ok(()) => Error::new(Reason::Unavailable).with_message("The server is ending: ask again"),
            Err(error) => error,
        };
        let status = Status::from(error);
        if !self.trailers {
            return Some(Err(status));
        }
        let mut headers = HeaderMap::new();
        match status.add_header(&mut headers) {
            Ok(()) => Some(Ok(Frame::trailers(headers))),
            Err(status) => Some(Err(status)),
        }
    }
}

impl http_body::Body for Stream {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let Some(ending) = &mut self.ending else { return Poll::Ready(None) };
        if let Poll::Ready(why) = ending.as_mut().poll(context) {
            (self.ending, self.place) = (None, None);
            return Poll::Ready(self.end(why));
        }
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(None | Some(Err(_))) = polled {
            (self.ending, self.place) = (None, None);
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.ending.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
