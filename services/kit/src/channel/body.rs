//! What goes over a connection and what comes back, and which of it can be sent again.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use paperkey_proto::Error;
use tonic::{Status, body::Body};

use super::pool::{Place, Slot};

/// The longest request that is kept to be sent again, and the longest answer that is read before it is passed on.
const KEPT_BYTES: usize = 64 * 1_024;

/// What a caller sends.
pub(super) enum Payload {
    /// All of it, so that it can be sent again.
    Whole(Bytes),
    /// What comes as it is sent.
    Stream(Body),
}

impl Payload {
    /// Reads what one message is, unless it is long.
    pub(super) async fn read(mut body: Body) -> Result<Self, Status> {
        let mut first = Bytes::new();
        let mut more = BytesMut::new();
        while let Some(frame) = body.frame().await {
            let Ok(data) = frame?.into_data() else { continue };
            if first.is_empty() {
                first = data;
            } else {
                if more.is_empty() {
                    more.extend_from_slice(&first);
                }
                more.extend_from_slice(&data);
            }
            if first.len().max(more.len()) > KEPT_BYTES {
                let begun = if more.is_empty() { first } else { more.freeze() };
                return Ok(Self::Stream(Body::new(Begun { begun: Some(begun), rest: body })));
            }
        }
        Ok(Self::Whole(if more.is_empty() { first } else { more.freeze() }))
    }
}

/// A body of which the beginning was read already.
struct Begun {
    begun: Option<Bytes>,
    rest: Body,
}

impl http_body::Body for Begun {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match self.begun.take() {
            Some(begun) => Poll::Ready(Some(Ok(Frame::data(begun)))),
            None => Pin::new(&mut self.rest).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.begun.is_none() && self.rest.is_end_stream()
    }
}

/// What a connection is given to send.
pub(super) enum Outgoing {
    /// One message, and a note of whether it was taken: what was not cannot have been acted upon.
    Whole {
        data: Option<Bytes>,
        taken: Arc<AtomicBool>,
    },
    Stream(Body),
}

impl http_body::Body for Outgoing {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        match &mut *self {
            Self::Whole { data, taken } => Poll::Ready(data.take().map(|data| {
                taken.store(true, Ordering::Release);
                Ok(Frame::data(data))
            })),
            Self::Stream(body) => Pin::new(body).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole { data, .. } => data.is_none(),
            Self::Stream(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Whole { data, .. } => SizeHint::with_exact(data.as_ref().map_or(0, |data| data.len() as u64)),
            Self::Stream(body) => body.size_hint(),
        }
    }
}

/// What a service answers with. Its place on the connection is taken until it has ended.
pub(super) struct Received {
    read: VecDeque<Frame<Bytes>>,
    rest: Option<(Incoming, Slot)>,
}

impl Received {
    /// As it comes.
    pub(super) fn stream(body: Incoming, slot: Slot) -> Self {
        Self { read: VecDeque::new(), rest: Some((body, slot)) }
    }

    /// To its end, unless it is long: what is cut off before is not an answer yet.
    pub(super) async fn whole(mut body: Incoming, slot: Slot) -> Result<Self, hyper::Error> {
        let mut read = VecDeque::with_capacity(2);
        let mut bytes = 0;
        while let Some(frame) = body.frame().await {
            let frame = frame?;
            bytes += frame.data_ref().map_or(0, Bytes::len);
            read.push_back(frame);
            if bytes > KEPT_BYTES {
                return Ok(Self { read, rest: Some((body, slot)) });
            }
        }
        Ok(Self { read, rest: None })
    }
}

impl http_body::Body for Received {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(frame) = self.read.pop_front() {
            return Poll::Ready(Some(Ok(frame)));
        }
        let Some((body, slot)) = &mut self.rest else { return Poll::Ready(None) };
        let polled = Pin::new(body).poll_frame(context).map_err(|error| Status::from(slot.place().cut_off(&error)));
        if let Poll::Ready(None | Some(Err(_))) = &polled {
            self.rest = None;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_empty() && self.rest.as_ref().is_none_or(|(body, _)| body.is_end_stream())
    }

    fn size_hint(&self) -> SizeHint {
        match &self.rest {
            Some((body, _)) if self.read.is_empty() => body.size_hint(),
            // What a trailer follows has no length that is told.
            _ => SizeHint::default(),
        }
    }
}

impl Place {
    /// What a caller is told of a connection that failed.
    pub(super) fn cut_off(&self, error: &hyper::Error) -> Error {
        Error::unavailable(format!("{self}: {}", super::retry::words(error)))
    }
}
