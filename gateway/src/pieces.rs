//! Answers that are a body of their own, such as an export: a service streams pieces, and the caller reads one body.
//!
//! The first piece is waited for before anything is answered, so that a refusal is an answer like any other. What fails
//! later ends the connection in the middle of the body, which every client takes for a failure.

use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use futures_util::stream;
use http::{HeaderMap, HeaderValue, Response, header::CONTENT_TYPE};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody};
use paperkey_proto::{Error, errors::v1::Reason};
use prost::Message as _;
use tonic::Status;

use crate::{body::Body, transcode::FRAME_HEADER_BYTES};

/// The largest piece that is taken.
const MAX_PIECE_BYTES: usize = 4 * 1_024 * 1_024;

/// A piece, by the numbers that the contract's check asks for.
#[derive(Clone, PartialEq, prost::Message)]
struct Piece {
    #[prost(string, tag = "1")]
    content_type: String,
    #[prost(bytes = "bytes", tag = "2")]
    data: Bytes,
}

/// The pieces of an answer, as they come.
struct Pieces {
    body: tonic::body::Body,
    arrived: BytesMut,
    /// What was said at the end.
    ended: Option<HeaderMap>,
    /// How long the next piece may take.
    patience: Duration,
}

/// Makes one body of a service's answer.
pub(crate) async fn body_of(
    response: Response<tonic::body::Body>,
    patience: Duration,
) -> Result<Response<Body>, Error> {
    let (head, body) = response.into_parts();
    if let Some(status) = Status::from_header_map(&head.headers)
        && status.code() != tonic::Code::Ok
    {
        return Err(Error::from_status(&status));
    }
    let mut pieces = Pieces { body, arrived: BytesMut::new(), ended: None, patience };
    let first = pieces.next().await?.unwrap_or_default();
    let content_type = HeaderValue::from_str(&first.content_type).map_err(Error::internal)?;
    let rest = stream::unfold(Some(pieces), |pieces| async {
        let mut pieces = pieces?;
        match pieces.next().await {
            Ok(Some(piece)) => Some((Ok(piece.data), Some(pieces))),
            Ok(None) => None,
            Err(error) => Some((Err(Status::from(error)), None)),
        }
    });
    let first = stream::once(std::future::ready(Ok(first.data)));
    let frames =
        futures_util::StreamExt::map(futures_util::StreamExt::chain(first, rest), |data| data.map(Frame::data));
    let mut response = Response::new(Body::from(tonic::body::Body::new(StreamBody::new(frames))));
    response.headers_mut().insert(CONTENT_TYPE, content_type);
    Ok(response)
}

impl Pieces {
    /// The next piece; none after the last.
    async fn next(&mut self) -> Result<Option<Piece>, Error> {
        loop {
            if let Some(piece) = self.whole()? {
                return Ok(Some(piece));
            }
            if self.ended.is_some() || !self.more().await? {
                return self.end().map(|()| None);
            }
        }
    }

    /// A piece that has arrived whole.
    fn whole(&mut self) -> Result<Option<Piece>, Error> {
        let Some(([compressed, length @ ..], _)) = self.arrived.split_first_chunk::<FRAME_HEADER_BYTES>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
        if *compressed != 0 || length > MAX_PIECE_BYTES {
            return Err(Error::internal("a piece of an answer is none"));
        }
        if self.arrived.len() < FRAME_HEADER_BYTES + length {
            return Ok(None);
        }
        self.arrived.advance(FRAME_HEADER_BYTES);
        Piece::decode(self.arrived.split_to(length).freeze()).map(Some).map_err(Error::internal)
    }

    /// Waits for more bytes, or for the end.
    async fn more(&mut self) -> Result<bool, Error> {
        let frame = tokio::time::timeout(self.patience, self.body.frame()).await;
        let Some(frame) = frame.map_err(|_| Error::new(Reason::Deadline))? else { return Ok(false) };
        let frame = frame.map_err(|status| Error::unavailable(format!("an answer was cut off: {status}")))?;
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
