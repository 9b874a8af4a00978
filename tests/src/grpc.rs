//! gRPC as clients speak it: typed, by bytes, over the web, and reflection.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use futures_util::{StreamExt as _, stream};
use http::{HeaderMap, HeaderValue, uri::PathAndQuery};
use paperkey_proto::{Contract, contract::Method, error::Error, errors::v1::Reason};
use prost::Message;
use tonic::{
    Code, Request, Status,
    client::Grpc,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    metadata::{MetadataMap, MetadataValue},
    service::Interceptor,
    transport::{Channel, Endpoint},
};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::{api::Api, wait::GENEROUS};

/// A connection to a listener.
pub async fn connect(url: &str) -> Channel {
    let endpoint = Endpoint::from_shared(url.to_owned()).expect("it is a URL").timeout(GENEROUS);
    endpoint.connect().await.unwrap_or_else(|error| panic!("{url} does not answer: {error}"))
}

/// A connection to a listener, for calls that go on for as long as somebody listens.
pub async fn connect_without_limit(url: &str) -> Channel {
    let endpoint = Endpoint::from_shared(url.to_owned()).expect("it is a URL");
    endpoint.connect().await.unwrap_or_else(|error| panic!("{url} does not answer: {error}"))
}

/// Sends a credential on every call.
#[derive(Clone, Debug)]
pub struct Bearer(MetadataValue<tonic::metadata::Ascii>);

impl Bearer {
    /// This credential.
    pub fn new(credential: &str) -> Self {
        Self(format!("Bearer {credential}").parse().expect("credentials are ASCII"))
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request.metadata_mut().insert("authorization", self.0.clone());
        Ok(request)
    }
}

/// The metadata that carries a credential.
pub fn credential(credential: &str) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let value = HeaderValue::from_str(&format!("Bearer {credential}")).expect("credentials are ASCII");
    headers.insert(http::header::AUTHORIZATION, value);
    headers
}

/// Calls any rpc with the bytes of a message. Where it streams, that message is all that is sent, and the first answer
/// all that is waited for.
pub async fn call(channel: &Channel, rpc: &str, message: Bytes, headers: HeaderMap) -> Result<Bytes, Status> {
    let mut grpc = Grpc::new(channel.clone());
    grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
    let mut request = Request::new(message);
    *request.metadata_mut() = MetadataMap::from_headers(headers);
    let path: PathAndQuery = rpc.parse().expect("an rpc is a path");
    let streams = |method: &Method| method.descriptor.is_client_streaming() || method.descriptor.is_server_streaming();
    if Contract::get().methods().iter().any(|method| method.path == rpc && streams(method)) {
        let request = request.map(|message| stream::once(async { message }));
        let mut answers = grpc.streaming(request, path, BytesCodec).await?.into_inner();
        return Ok(answers.message().await?.unwrap_or_default());
    }
    Ok(grpc.unary(request, path, BytesCodec).await?.into_inner())
}

/// The call must have been refused for that reason, with the code of the catalogue and its details.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(outcome: Result<T, Status>, reason: Reason) {
    let status = match outcome {
        Err(status) => status,
        Ok(answer) => panic!("this should have been refused ({reason:?}): {answer:?}"),
    };
    let entry = paperkey_proto::error::entry(reason);
    assert_eq!(status.code(), Code::from_i32(entry.grpc_code), "{status:?}");
    let details = tonic_types::StatusExt::get_error_details(&status);
    let info = details.error_info().unwrap_or_else(|| panic!("no google.rpc.ErrorInfo: {status:?}"));
    assert_eq!(format!("REASON_{}", info.reason), reason.as_str_name());
    assert_eq!(Error::from_status(&status).reason(), reason);
}

#[derive(Clone, Copy, Debug)]
struct BytesCodec;

impl Codec for BytesCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for BytesCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for BytesCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

/// What a gRPC-Web call was answered.
#[derive(Clone, Debug)]
pub struct WebAnswer {
    /// The message, if there was one.
    pub message: Option<Bytes>,
    /// The gRPC status, from the trailers in the body or, where there is no body, from the headers.
    pub status: Code,
    /// The headers of the answer, with what else a browser is told.
    pub headers: HeaderMap,
}

impl WebAnswer {
    /// The message of a call that must have been a success.
    #[track_caller]
    pub fn gives<M: Message + Default>(&self) -> M {
        assert_eq!(self.status, Code::Ok, "{self:?}");
        let message = self.message.clone().unwrap_or_else(|| panic!("a success without a message: {self:?}"));
        M::decode(message).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Calls an rpc as a page in a browser does: over HTTP/1.1, frames in the body.
pub async fn web_call(api: &Api, rpc: &str, message: &impl Message, text: bool) -> WebAnswer {
    let mut frame = BytesMut::new();
    frame.put_u8(0);
    frame.put_u32(u32::try_from(message.encoded_len()).expect("tests send small messages"));
    message.encode(&mut frame).expect("a buffer grows as needed");
    let (content_type, body) = if text {
        ("application/grpc-web-text", Bytes::from(BASE64.encode(&frame)))
    } else {
        ("application/grpc-web+proto", frame.freeze())
    };
    // The kind of answer is asked for, as every client of gRPC-Web does.
    let answer = api.with("accept", content_type).send(http::Method::POST, rpc, Some(content_type), body).await;
    assert_eq!(answer.status, 200, "gRPC-Web tells its status in the trailers: {}", answer.text());
    let answered = answer.header("content-type").unwrap_or_default();
    assert!(answered.starts_with(content_type.split('+').next().unwrap_or_default()), "{answered}");
    let bytes = if text { decoded_text(&answer.body) } else { answer.body.clone() };
    let (message, trailers) = frames(bytes);
    let status = trailers
        .as_deref()
        .and_then(|trailers| trailers.lines().find_map(|line| line.strip_prefix("grpc-status:")).map(str::trim))
        .or_else(|| answer.header("grpc-status"))
        .unwrap_or_else(|| panic!("{rpc} was answered without a gRPC status: {answer:?}"));
    WebAnswer { message, status: Code::from_bytes(status.as_bytes()), headers: answer.headers }
}

/// Base 64 that may have been padded more than once, as each frame is encoded for itself.
fn decoded_text(text: &[u8]) -> Bytes {
    let quads = text.chunks(4).map(|quad| BASE64.decode(quad).expect("a text answer is base 64"));
    quads.flatten().collect()
}

fn frames(mut bytes: Bytes) -> (Option<Bytes>, Option<String>) {
    let (mut message, mut trailers) = (None, None);
    while bytes.remaining() >= 5 {
        let kind = bytes.get_u8();
        let length = bytes.get_u32() as usize;
        assert!(length <= bytes.remaining(), "a frame says it is longer than the body");
        let frame = bytes.split_to(length);
        match kind {
            0 => message = Some(frame),
            0x80 => trailers = Some(String::from_utf8_lossy(&frame).to_lowercase()),
            kind => panic!("a frame of the unknown kind {kind}"),
        }
    }
    assert!(!bytes.has_remaining(), "the body ends in the middle of a frame");
    (message, trailers)
}

/// Asks reflection (v1) one question.
pub async fn reflect(
    channel: &Channel,
    bearer: Option<&str>,
    question: MessageRequest,
) -> Result<MessageResponse, Status> {
    let request = ServerReflectionRequest { host: String::new(), message_request: Some(question) };
    let mut request = Request::new(stream::once(async { request }));
    if let Some(bearer) = bearer {
        *request.metadata_mut() = MetadataMap::from_headers(credential(bearer));
    }
    let mut client = ServerReflectionClient::new(channel.clone());
    let mut answers = client.server_reflection_info(request).await?.into_inner();
    let answer = answers.next().await.unwrap_or_else(|| Err(Status::internal("reflection said nothing")))?;
    answer.message_response.ok_or_else(|| Status::internal("reflection said nothing"))
}

/// The names of the services that reflection shows.
pub async fn reflected_services(channel: &Channel, bearer: Option<&str>) -> Result<Vec<String>, Status> {
    match reflect(channel, bearer, MessageRequest::ListServices(String::new())).await? {
        MessageResponse::ListServicesResponse(list) => {
            Ok(list.service.into_iter().map(|service| service.name).collect())
        }
        other => panic!("reflection answered another question: {other:?}"),
    }
}
