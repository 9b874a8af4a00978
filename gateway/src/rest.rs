//! One REST request: route, policy, body, wire bytes, call, answer.
//!
//! Policy stands before the body, so that a stranger learns nothing of what a request should look like, and a body is
//! read only for those who may send it.

use std::{net::IpAddr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method as Verb, Request, Response, StatusCode, Version,
    header::{CONTENT_TYPE, TE},
    request::Parts as Head,
};
use http_body_util::{BodyExt as _, Full};
use paperkey_kit::principal::{Caller, nobody};
use paperkey_proto::{Error, errors::v1::Reason, principal::v1::Principal};
use tonic::Status;

use crate::{
    Inner,
    body::Body,
    edge,
    envelope::{Refusal, Teller, asks_for_problem},
    policy::Arrival,
    table::{Found, MAX_VARIABLES, RestRoute, Rpc},
    transcode::{FRAME_HEADER_BYTES, Parts},
};

/// The longest answer that is taken from a service.
const MAX_ANSWER_BYTES: usize = 16 * 1_024 * 1_024;

type LimitHeaders = Vec<(HeaderName, HeaderValue)>;

/// Answers a REST request.
pub(crate) async fn answer<B>(gateway: &Inner, head: Head, body: B, client: IpAddr, request_id: &str) -> Response<Body>
where
    B: http_body::Body<Data = Bytes>,
{
    let path = head.uri.path();
    let found = gateway.table.find(&head.method, path);
    let surface = match &found {
        Found::Route(route, _) => Some(route.surface),
        Found::OtherVerb(node) => node.surface(),
        Found::Nothing => gateway.contract.surface_of(path),
    };
    let shared = gateway.config.cors_any_origin && surface.is_some_and(edge::is_for_keys);
    let mut limits = LimitHeaders::new();
    let mut unread = Some(body);
    let outcome = match &found {
        Found::Route(route, params) => {
            let mut variables = [(0, ""); MAX_VARIABLES];
            let mut count = 0;
            for ((slot, field), (_, value)) in variables.iter_mut().zip(&route.variables).zip(params.iter()) {
                *slot = (*field, value);
                count += 1;
            }
            serve(gateway, route, &variables[..count], &head, &mut unread, client, request_id, &mut limits).await
        }
        Found::OtherVerb(node) if shared && edge::is_preflight(&head.method, &head.headers) => {
            let asked = head.headers.get(http::header::ACCESS_CONTROL_REQUEST_HEADERS);
            Ok(edge::preflight(node.allow.clone(), asked))
        }
        Found::OtherVerb(node) => Err(Refusal::other_verb(node.allow.clone())),
        Found::Nothing => Err(Error::new(Reason::NotFound).with_message("No such path").into()),
    };
    let cut_off = outcome
        .as_ref()
        .err()
        .is_some_and(|refusal| matches!(refusal.error.reason(), Reason::BodyTooLarge | Reason::Deadline));
    let unread = cut_off || unread.is_some_and(|body| !body.is_end_stream());
    let mut response = outcome.unwrap_or_else(|refusal| {
        let teller = Teller {
            surface: surface.map(|entry| &entry.options),
            request_id,
            public_url: &gateway.config.public_url,
            path,
            problem: asks_for_problem(&head.headers),
        };
        teller.tell(&refusal)
    });
    let headers = response.headers_mut();
    for (name, value) in limits {
        headers.insert(name, value);
    }
    if unread {
        edge::hang_up(head.version, headers);
    }
    if shared {
        edge::share(headers);
    }
    response
}

#[expect(clippy::too_many_arguments, reason = "the parts of one request, borrowed apart")]
async fn serve<B>(
    gateway: &Inner,
    route: &RestRoute,
    variables: &[(usize, &str)],
    head: &Head,
    body: &mut Option<B>,
    client: IpAddr,
    request_id: &str,
    limits: &mut LimitHeaders,
) -> Result<Response<Body>, Refusal>
where
    B: http_body::Body<Data = Bytes>,
{
    let rpc = &route.rpc;
    let options = &route.surface.options;
    let admitted = gateway
        .gate
        .admit(&Arrival {
            rpc,
            surface: Some(route.surface.surface),
            accepted: route.accepted,
            api_key_header: options.api_key_header,
            team: route.team.and_then(|at| variables.get(at)).map(|(_, team)| *team),
            headers: &head.headers,
            client,
        })
        .await?;
    *limits = admitted.headers;

    let body = match body.take_if(|_| route.body) {
        Some(body) => Some(json_body(gateway, rpc, &head.headers, body).await?),
        None => None,
    };
    let parts = Parts { case: options.request_case(), variables, query: head.uri.query(), body: body.as_deref() };
    let frame = gateway.table.schema.request(rpc.input, &parts).map_err(Refusal::as_sent)?;

    let principal = admitted.principal;
    let message = if rpc.verifies {
        gateway.verifier.answer(principal.as_ref(), &frame[FRAME_HEADER_BYTES..]).await?.into()
    } else {
        call(gateway, rpc, frame, principal, &head.headers, request_id).await?
    };
    let mut response = if rpc.success == StatusCode::NO_CONTENT {
        Response::new(Body::empty())
    } else {
        let json = gateway.table.schema.answer(rpc.output, options.response_case(), &message)?;
        let mut response = Response::new(Body::from(json));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        response
    };
    *response.status_mut() = rpc.success;
    Ok(response)
}

async fn json_body<B>(gateway: &Inner, rpc: &Rpc, headers: &HeaderMap, body: B) -> Result<Bytes, Error>
where
    B: http_body::Body<Data = Bytes>,
{
    if body.is_end_stream() {
        return Ok(Bytes::new());
    }
    let is_json = edge::is_json(headers);
    if !is_json && headers.contains_key(CONTENT_TYPE) {
        return Err(Error::new(Reason::UnsupportedMediaType));
    }
    let read = edge::read_body(headers, body, rpc.max_body_bytes);
    let body = tokio::time::timeout(gateway.call_timeout, read)
        .await
        .map_err(|_| Error::new(Reason::Deadline).with_message("The request body took too long to arrive"))??;
    if !is_json && !body.is_empty() {
        return Err(Error::new(Reason::UnsupportedMediaType));
    }
    Ok(body)
}

/// Calls a method with the bytes of a frame, and answers with the bytes of a message.
async fn call(
    gateway: &Inner,
    rpc: &Rpc,
    frame: Vec<u8>,
    principal: Option<Arc<Principal>>,
    incoming: &HeaderMap,
    request_id: &str,
) -> Result<Bytes, Error> {
    let mut request = Request::new(tonic::body::Body::new(Full::new(Bytes::from(frame))));
    *request.method_mut() = Verb::POST;
    *request.version_mut() = Version::HTTP_2;
    request.uri_mut().clone_from(&rpc.uri);
    let headers = request.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(TE, HeaderValue::from_static("trailers"));
    headers.insert("grpc-timeout", gateway.grpc_timeout.clone());
    if let Some(parent) = incoming.get("traceparent").filter(|parent| parent.len() <= 64) {
        headers.insert("traceparent", parent.clone());
    }
    let caller = Caller { principal: principal.unwrap_or_else(nobody), request_id: request_id.to_owned() };
    let exchange = async {
        let response = rpc
            .channel
            .call_as(caller, &gateway.signer, request)
            .await
            .map_err(|status| Error::from_status(&status))?;
        message_of(response).await
    };
    tokio::time::timeout(gateway.call_timeout, exchange).await.map_err(|_| Error::new(Reason::Deadline))?
}

/// The one message of an answer, if the call succeeded.
async fn message_of(response: Response<tonic::body::Body>) -> Result<Bytes, Error> {
    let (head, mut body) = response.into_parts();
    if let Some(status) = Status::from_header_map(&head.headers)
        && status.code() != tonic::Code::Ok
    {
        return Err(Error::from_status(&status));
    }
    if head.status != StatusCode::OK {
        return Err(Error::unavailable(format!("a service answered with HTTP {}", head.status)));
    }
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    let mut ended = None;
    while let Some(frame) = body.frame().await {
        // What a service has to say comes as a status; a broken frame is a service that is gone.
        let frame = frame.map_err(|status| Error::unavailable(format!("an answer was cut off: {status}")))?;
        match frame.into_data() {
            Ok(data) if first.is_empty() && rest.is_empty() => first = data,
            Ok(data) => {
                if rest.is_empty() {
                    rest.extend_from_slice(&std::mem::take(&mut first));
                }
                if rest.len() + data.len() > MAX_ANSWER_BYTES {
                    return Err(Error::internal("a service answered with more than is taken"));
                }
                rest.extend_from_slice(&data);
            }
            Err(frame) => ended = frame.into_trailers().ok(),
        }
    }
    let status = ended.as_ref().and_then(Status::from_header_map);
    match status.or_else(|| Status::from_header_map(&head.headers)) {
        Some(status) if status.code() == tonic::Code::Ok => {}
        Some(status) => return Err(Error::from_status(&status)),
        None => return Err(Error::unavailable("a service's answer was cut off")),
    }
    let answer = if rest.is_empty() { first } else { rest.freeze() };
    let Some((header, message)) = answer.split_first_chunk::<FRAME_HEADER_BYTES>() else {
        return Err(Error::internal("a service answered without a message"));
    };
    let [compressed, length @ ..] = *header;
    if compressed != 0 || usize::try_from(u32::from_be_bytes(length)).ok() != Some(message.len()) {
        return Err(Error::internal("a service answered with something other than one plain message"));
    }
    Ok(answer.slice(FRAME_HEADER_BYTES..))
}

/// A timeout as gRPC writes it.
pub(crate) fn grpc_timeout(timeout: Duration) -> HeaderValue {
    // Eight digits are the most that gRPC allows: beyond a day in milliseconds, nobody waits.
    let millis = timeout.as_millis().min(99_999_999);
    HeaderValue::from_str(&format!("{millis}m")).unwrap_or_else(|_| HeaderValue::from_static("10S"))
}
