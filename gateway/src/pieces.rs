//! Bodies that are streamed: an export comes in pieces, events come in lines of JSON, and a file goes to its service in
//! pieces.
//!
//! The first piece or line is waited for before anything is answered, so that a refusal is an answer like any other. What
//! fails later ends the connection in the middle of the body, which every client takes for a failure.

use std::{
    future::Future as _,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures_util::{StreamExt as _, stream};
use http::{HeaderMap, HeaderValue, Response, header::CONTENT_TYPE};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use paperkey_proto::{Error, errors::v1::Reason, options::v1::LetterCase};
use prost::Message as _;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::{Instant, Sleep},
};
use tonic::Status;

use crate::transcode::{FRAME_HEADER_BYTES, MessageId, Schema, put_piece};

/// The largest message that is taken.
const MAX_MESSAGE_BYTES: usize = 4 * 1_024 * 1_024;

/// What is taken of a report before its reader takes it, in bytes: the report on some eighty thousand lines.
const AHEAD: u32 = 8 * 1_024 * 1_024;

/// What lines of JSON are called.
const LINES: HeaderValue = HeaderValue::from_static("application/x-ndjson");

/// A piece, by the numbers that the contract's check asks for.
#[derive(Clone, PartialEq, prost::Message)]
struct Piece {
    #[prost(string, tag = "1")]
    content_type: String,
    #[prost(bytes = "bytes", tag = "2")]
    data: Bytes,
}

/// Makes one body of the pieces that a service answers with.
pub(crate) async fn body_of(
    response: Response<tonic::body::Body>,
    patience: Duration,
) -> Result<Response<tonic::body::Body>, Error> {
    let mut messages = Messages::of(response, Some(patience))?;
    let first = messages.next().await?.map(piece).transpose()?.unwrap_or_default();
    let content_type = HeaderValue::from_str(&first.content_type).map_err(Error::internal)?;
    Ok(response_of(content_type, first.data, messages, |message| Ok(piece(message)?.data)))
}

/// Makes one body of the messages that a service answers with, each a line of JSON. Between two of them any time may
/// pass.
pub(crate) async fn lines_of(
    response: Response<tonic::body::Body>,
    patience: Duration,
    schema: Arc<Schema>,
    message: MessageId,
    case: LetterCase,
) -> Result<Response<tonic::body::Body>, Error> {
    let mut messages = Messages::of(response, Some(patience))?;
    let line = move |bytes: Bytes| {
        let mut line = schema.answer(message, case, &bytes)?;
        line.push(b'\n');
        Ok(Bytes::from(line))
    };
    let first = messages.next().await?.map(&line).transpose()?.unwrap_or_default();
    messages.patience = None;
    Ok(response_of(LINES, first, messages, line))
}

fn piece(message: Bytes) -> Result<Piece, Error> {
    Piece::decode(message).map_err(Error::internal)
}

fn response_of(
    content_type: HeaderValue,
    first: Bytes,
    messages: Messages,
    shown: impl Fn(Bytes) -> Result<Bytes, Error> + Send + Sync + 'static,
) -> Response<tonic::body::Body> {
    let rest = stream::unfold(Some((messages, shown)), |state| async {
        let (mut messages, shown) = state?;
        let next = messages.next().await.and_then(|message| message.map(&shown).transpose());
        match next {
            Ok(Some(bytes)) => Some((Ok(bytes), Some((messages, shown)))),
            Ok(None) => None,
            Err(error) => Some((Err(Status::from(error)), None)),
        }
    });
    let first = stream::once(std::future::ready(Ok(first)));
    let frames = first.chain(rest).map(|data| data.map(Frame::data));
    let mut response = Response::new(tonic::body::Body::new(StreamBody::new(frames)));
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    response
}

/// The messages of an answer, as they come.
struct Messages {
    body: tonic::body::Body,
    arrived: BytesMut,
    /// What was said at the end.
    ended: Option<HeaderMap>,
    /// How long the next message may take.
    patience: Option<Duration>,
}

impl Messages {
    fn of(response: Response<tonic::body::Body>, patience: Option<Duration>) -> Result<Self, Error> {
        let (head, body) = response.into_parts();
        match Status::from_header_map(&head.headers) {
            Some(status) if status.code() != tonic::Code::Ok => Err(Error::from_status(&status)),
            _ => Ok(Self { body, arrived: BytesMut::new(), ended: None, patience }),
        }
    }

    /// The next message; none after the last.
    async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        loop {
            if let Some(message) = self.whole()? {
                return Ok(Some(message));
            }
            if self.ended.is_some() || !self.more().await? {
                return self.end().map(|()| None);
            }
        }
    }

    /// A message that has arrived whole.
    fn whole(&mut self) -> Result<Option<Bytes>, Error> {
        let Some(([compressed, length @ ..], _)) = self.arrived.split_first_chunk::<FRAME_HEADER_BYTES>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if *compressed != 0 || length > MAX_MESSAGE_BYTES {
            return Err(Error::internal("a piece of an answer is none"));
        }
        if self.arrived.len() < FRAME_HEADER_BYTES + length {
            return Ok(None);
        }
        self.arrived.advance(FRAME_HEADER_BYTES);
        Ok(Some(self.arrived.split_to(length).freeze()))
    }

    /// Waits for more bytes, or for the end.
    async fn more(&mut self) -> Result<bool, Error> {
        let frame = match self.patience {
            Some(patience) => tokio::time::timeout(patience, self.body.frame()).await,
            None => Ok(self.body.frame().await),
        };
        let Some(frame) = frame.map_err(|_| Error::new(Reason::Deadline))? else { return Ok(false) };
        // What a service says of itself in the middle is what happened; all else is a service that is gone.
        let frame = frame.map_err(|status| match Error::from_status(&status) {
            error if error.reason() == Reason::BodyTooLarge => error,
            _ => Error::unavailable(format!("an answer was cut off: {status}")),
        })?;
        match frame.into_data() {
            Ok(data) => self.arrived.extend_from_slice(&data),
            Err(frame) => self.ended = frame.into_trailers().ok(),
        }
        Ok(true)
    }

    /// Whether the end was a good one.
    fn end(&self) -> Result<(), Error> {
        match self.ended.as_ref().and_then(Status::from_header_map) {
            Some(status) if status.code() == tonic::Code::Ok && self.arrived.is_empty() => Ok(()),
            Some(status) if status.code() != tonic::Code::Ok => Err(Error::from_status(&status)),
            _ => Err(Error::unavailable("an answer was cut off")),
        }
    }
}

/// Takes an answer from its service before its reader takes it, up to a bound, so that a reader who first sends all that
/// it has does not wait for a service that waits for it. Beyond the bound the service waits after all, and where nothing
/// is taken for too long, the answer ends in an error.
pub(crate) fn taken_ahead(mut body: tonic::body::Body, patience: Duration) -> tonic::body::Body {
    // What is in there has its share of the room with it. Only an end that was told is one.
    let (given, taken) = mpsc::unbounded_channel::<Result<Option<(Bytes, OwnedSemaphorePermit)>, Status>>();
    tokio::spawn(async move {
        let room = Arc::new(Semaphore::new(AHEAD as usize));
        let passing = async {
            while let Some(frame) = body.frame().await {
                let Ok(data) = frame?.into_data() else { continue };
                let size = u32::try_from(data.len()).unwrap_or(AHEAD).min(AHEAD);
                let share = tokio::time::timeout(patience, Arc::clone(&room).acquire_many_owned(size)).await;
                let Ok(Ok(share)) = share else {
                    let late = Error::new(Reason::Deadline).with_message("The answer was not read in time");
                    return Err(late.into());
                };
                if given.send(Ok(Some((data, share)))).is_err() {
                    break;
                }
            }
            Ok(None)
        };
        let end = tokio::select! {
            end = passing => end,
            // Nobody reads any more.
            () = given.closed() => return,
        };
        let _ = given.send(end);
    });
    let frames = stream::unfold(Some(taken), |taken| async {
        let mut taken = taken?;
        match taken.recv().await {
            Some(Ok(Some((data, _share)))) => Some((Ok(Frame::data(data)), Some(taken))),
            Some(Ok(None)) => None,
            Some(Err(status)) => Some((Err(status), None)),
            None => Some((Err(Error::unavailable("an answer was cut off").into()), None)),
        }
    });
    tonic::body::Body::new(StreamBody::new(frames))
}

/// A body on its way to a service: a message with what stands beside it, then a message for each piece of it. It ends in
/// an error where it grows too large, and where nothing comes for too long.
pub(crate) struct Upload<B> {
    /// The frame of the first message.
    first: Option<Bytes>,
    body: Pin<Box<B>>,
    field: u32,
    left: usize,
    overflow: Arc<AtomicBool>,
    patience: Duration,
    idle: Pin<Box<Sleep>>,
}

impl<B> Upload<B> {
    pub(crate) fn new(first: Vec<u8>, body: B, field: u32, most: usize, patience: Duration) -> Self {
        Self {
            first: Some(Bytes::from(first)),
            body: Box::pin(body),
            field,
            left: most,
            overflow: Arc::default(),
            patience,
            idle: Box::pin(tokio::time::sleep(patience)),
        }
    }

    /// Tells, later, whether it grew too large.
    pub(crate) fn overflow(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.overflow)
    }
}

impl<B> http_body::Body for Upload<B>
where
    B: http_body::Body<Data = Bytes>,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if let Some(first) = this.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        loop {
            let Poll::Ready(polled) = this.body.as_mut().poll_frame(context) else {
                return this.idle.as_mut().poll(context).map(|()| {
                    let late = Error::new(Reason::Deadline).with_message("The request body took too long to arrive");
                    Some(Err(late.into()))
                });
            };
            let Some(frame) = polled else { return Poll::Ready(None) };
            let Ok(frame) = frame else {
                return Poll::Ready(Some(Err(Error::malformed("The request body was cut off").into())));
            };
            this.idle.as_mut().reset(Instant::now() + this.patience);
            let Ok(data) = frame.into_data() else { continue };
            if data.is_empty() {
                continue;
            }
            let Some(left) = this.left.checked_sub(data.len()) else {
                this.overflow.store(true, Ordering::Relaxed);
                return Poll::Ready(Some(Err(Error::new(Reason::BodyTooLarge).into())));
            };
            this.left = left;
            return Poll::Ready(Some(Ok(Frame::data(framed(this.field, &data)))));
        }
    }
}

/// A gRPC frame of a message that holds some bytes in one field.
fn framed(field: u32, data: &[u8]) -> Bytes {
    let mut message = Vec::with_capacity(data.len() + 12);
    put_piece(&mut message, field, data);
    let mut frame = BytesMut::with_capacity(message.len() + FRAME_HEADER_BYTES);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    frame.extend_from_slice(&message);
    frame.freeze()
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body_util::Full;

    use super::*;

    async fn uploaded(pieces: Vec<&'static [u8]>, most: usize) -> Result<Vec<Vec<u8>>, Reason> {
        let frames = pieces.into_iter().map(|piece| Ok::<_, Infallible>(Frame::data(Bytes::from_static(piece))));
        let body = StreamBody::new(stream::iter(frames));
        let mut upload = Upload::new(vec![0; FRAME_HEADER_BYTES], body, 2, most, Duration::from_secs(5));
        let mut sent = Vec::new();
        while let Some(frame) = upload.frame().await {
            match frame {
                Ok(frame) => sent.push(frame.into_data().unwrap().to_vec()),
                Err(status) => return Err(Error::from_status(&status).reason()),
            }
        }
        Ok(sent)
    }

    #[tokio::test]
    async fn a_body_goes_to_its_service_in_messages_of_one_field() {
        let sent = uploaded(vec![b"ab", b"", b"c"], 3).await.unwrap();
        assert_eq!(
            sent,
            [&[0, 0, 0, 0, 0][..], &[0, 0, 0, 0, 4, 0x12, 2, b'a', b'b'], &[0, 0, 0, 0, 3, 0x12, 1, b'c']]
        );
    }

    #[tokio::test]
    async fn a_body_beyond_its_bound_is_refused() {
        assert_eq!(uploaded(vec![b"ab", b"cd"], 3).await, Err(Reason::BodyTooLarge));
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_stops_coming_is_refused() {
        let stalled = StreamBody::new(stream::pending::<Result<Frame<Bytes>, Infallible>>());
        let mut upload = Upload::new(Vec::new(), stalled, 2, 10, Duration::from_secs(5));
        assert!(upload.frame().await.unwrap().is_ok());
        let status = upload.frame().await.unwrap().unwrap_err();
        assert_eq!(Error::from_status(&status).reason(), Reason::Deadline);
    }

    #[tokio::test]
    async fn an_answer_that_breaks_off_is_no_answer() {
        let whole = [0, 0, 0, 0, 2, 0x12, 0];
        for (bytes, whole_messages) in [(&whole[..], 1), (&whole[..6], 0)] {
            let response = Response::new(tonic::body::Body::new(Full::new(Bytes::copy_from_slice(bytes))));
            let mut messages = Messages::of(response, None).unwrap();
            for _ in 0..whole_messages {
                assert!(messages.next().await.unwrap().is_some());
            }
            assert_eq!(messages.next().await.unwrap_err().reason(), Reason::Unavailable);
        }
    }
}
