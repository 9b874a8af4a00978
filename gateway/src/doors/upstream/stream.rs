//! Bodies on their way through, a piece at a time: nothing is kept, so the slower side sets the pace.

use std::{
    pin::Pin,
    sync::Arc,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::time::{Instant, Sleep, sleep};
use tonic::Status;

use super::BoxError;

/// How far a request's body has come.
#[derive(Debug)]
pub(super) struct Progress {
    began: Instant,
    /// When the last piece was taken, in milliseconds since the beginning.
    last_ms: AtomicU64,
    waits: AtomicBool,
    overflowed: AtomicBool,
    cut_off: AtomicBool,
}

impl Progress {
    pub(super) fn new() -> Self {
        Self {
            began: Instant::now(),
            last_ms: AtomicU64::new(0),
            waits: AtomicBool::new(false),
            overflowed: AtomicBool::new(false),
            cut_off: AtomicBool::new(false),
        }
    }

    /// When a piece was last taken.
    pub(super) fn last(&self) -> Instant {
        self.began + Duration::from_millis(self.last_ms.load(Ordering::Relaxed))
    }

    /// Whether the next piece has not arrived from the caller.
    pub(super) fn waits_for_the_caller(&self) -> bool {
        self.waits.load(Ordering::Relaxed)
    }

    /// Whether the body grew too large.
    pub(super) fn overflowed(&self) -> bool {
        self.overflowed.load(Ordering::Relaxed)
    }

    /// Whether the body ended before its end.
    pub(super) fn cut_off(&self) -> bool {
        self.cut_off.load(Ordering::Relaxed)
    }

    fn moved(&self) {
        let passed = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(passed, Ordering::Relaxed);
        self.waits.store(false, Ordering::Relaxed);
    }
}

/// A request's body, up to a bound. Its trailers stay behind.
pub(super) struct Outgoing<B> {
    body: Pin<Box<B>>,
    left: u64,
    progress: Arc<Progress>,
}

impl<B> Outgoing<B> {
    pub(super) fn new(body: B, max_bytes: u64, progress: Arc<Progress>) -> Self {
        Self { body: Box::pin(body), left: max_bytes, progress }
    }
}

impl<B> Body for Outgoing<B>
where
    B: Body<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        loop {
            let Poll::Ready(polled) = self.body.as_mut().poll_frame(context) else {
                self.progress.waits.store(true, Ordering::Relaxed);
                return Poll::Pending;
            };
            self.progress.moved();
            let frame = match polled {
                None => return Poll::Ready(None),
                Some(Ok(frame)) => frame,
                Some(Err(error)) => {
                    self.progress.cut_off.store(true, Ordering::Relaxed);
                    return Poll::Ready(Some(Err(error.into())));
                }
            };
            let Ok(data) = frame.into_data() else { continue };
            let Some(left) = self.left.checked_sub(data.len() as u64) else {
                self.progress.overflowed.store(true, Ordering::Relaxed);
                return Poll::Ready(Some(Err("the body is larger than the mount allows".into())));
            };
            self.left = left;
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body, whose next piece may not take for ever. Its trailers stay behind.
pub(super) struct Answer {
    body: Incoming,
    timeout: Duration,
    /// Runs while a piece is awaited. The time in which nobody asks for one does not count.
    patience: Option<Pin<Box<Sleep>>>,
}

impl Answer {
    pub(super) fn new(body: Incoming, timeout: Duration) -> Self {
        Self { body, timeout, patience: None }
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            if let Poll::Ready(polled) = Pin::new(&mut self.body).poll_frame(context) {
                self.patience = None;
                return Poll::Ready(match polled {
                    Some(Ok(frame)) if frame.is_trailers() => continue,
                    Some(Ok(frame)) => Some(Ok(frame)),
                    Some(Err(error)) => Some(Err(cut_off(&error.to_string()))),
                    None => None,
                });
            }
            let timeout = self.timeout;
            let patience = self.patience.get_or_insert_with(|| Box::pin(sleep(timeout)));
            ready!(patience.as_mut().poll(context));
            return Poll::Ready(Some(Err(cut_off("nothing came for too long"))));
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The head is out, so all that can be said is that the rest is missing: the connection breaks.
fn cut_off(why: &str) -> Status {
    tracing::warn!(why, "an upstream's answer was cut off");
    Status::unavailable("an upstream's answer was cut off")
}
