//! One REST request: route, policy, body, wire bytes, call, answer.
//!
//! Policy stands before the body, so that a stranger learns nothing of what a request should look like, and a body is
//! read only for those who may send it.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method as Verb, Request, Response, StatusCode, Version,
    header::{CONTENT_TYPE, TE},
    request::Parts as Head,
};
use http_body_util::{BodyExt as _, Full};
use paperkey_kit::{
    principal::{Caller, nobody},
    telemetry,
};
use paperkey_proto::{Error, errors::v1::Reason};
use tonic::Status;

use crate::{
    Inner,
    body::Body,
    call::Call,
    edge,
    envelope::{Refusal, Teller, asks_for_problem},
    once,
    pieces::{self, Upload},
    policy::Arrival,
    streams::{self, Holder},
    table::{Answers, Found, MAX_VARIABLES, RestRoute, Rpc},
    transcode::{FRAME_HEADER_BYTES, Parts, bytes_of},
};

/// The longest answer that is taken from a service.
const MAX_ANSWER_BYTES: usize = 16 * 1_024 * 1_024;

/// How many times as long as a call a piece of the report on a file may take, to come and to be taken.
const SLOWNESS: u32 = 10;

/// Says that an answer was given before.
const REPLAYED: HeaderName = HeaderName::from_static("idempotent-replayed");

/// Answers a REST request.
pub(crate) async fn answer<B>(gateway: &Inner, head: Head, body: B, call: &mut Call) -> Response<Body>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
{
    let path = head.uri.path();
    let found = gateway.table.find(&head.method, path, head.uri.query());
    let surface = match &found {
        Found::Route(route, _) => Some(route.surface),
        Found::OtherVerb(node) => node.surface(),
        Found::Nothing => gateway.contract.surface_of(path),
    };
    let shared = gateway.config.cors_any_origin && surface.is_some_and(edge::is_for_keys);
    let mut unread = Some(body);
    let outcome = match &found {
        Found::Route(route, params) => {
            let mut variables = [(0, ""); MAX_VARIABLES];
            let mut count = 0;
            for ((slot, field), (_, value)) in variables.iter_mut().zip(&route.variables).zip(params.iter()) {
                *slot = (*field, value);
                count += 1;
            }
            serve(gateway, route, &variables[..count], &head, &mut unread, call).await
        }
        Found::OtherVerb(node) if shared && edge::is_preflight(&head.method, &head.headers) => {
            call.aside = true;
            let asked = head.headers.get(http::header::ACCESS_CONTROL_REQUEST_HEADERS);
            Ok(edge::preflight(node.allow.clone(), asked))
        }
        Found::OtherVerb(node) => stray(gateway, call, Refusal::other_verb(node.allow.clone())).await,
        Found::Nothing => {
            let nothing = Error::new(Reason::NotFound).with_message("No such path");
            stray(gateway, call, nothing.into()).await
        }
    };
    let cut_off = outcome
        .as_ref()
        .err()
        .is_some_and(|refusal| matches!(refusal.error.reason(), Reason::BodyTooLarge | Reason::Deadline));
    // Begun to be read, and given up where there was nobody to wait for the rest.
    let given_up = outcome.is_err() && unread.is_none() && gateway.gate.places.is_some() && call.place.is_none();
    let unread = cut_off || given_up || unread.is_some_and(|body| !body.is_end_stream());
    let mut response = outcome.unwrap_or_else(|refusal| {
        call.failed(&refusal.error);
        let teller = Teller {
            surface: surface.map(|entry| &entry.options),
            request_id: &call.request_id,
            public_url: &gateway.config.public_url,
            path,
            problem: asks_for_problem(&head.headers),
        };
        teller.tell(&refusal)
    });
    let headers = response.headers_mut();
    call.told.put_on(headers);
    if unread {
        edge::hang_up(head.version, headers);
    }
    if shared {
        edge::share(headers);
    }
    response
}

/// Refuses what leads nowhere. It counts all the same: guessing paths is no cheaper than calling.
async fn stray(gateway: &Inner, call: &mut Call, refusal: Refusal) -> Result<Response<Body>, Refusal> {
    gateway.gate.count_stray(call).await?;
    Err(refusal)
}

async fn serve<B>(
    gateway: &Inner,
    route: &RestRoute,
    variables: &[(usize, &str)],
    head: &Head,
    body: &mut Option<B>,
    call: &mut Call,
) -> Result<Response<Body>, Refusal>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
{
    let rpc = &route.rpc;
    let options = &route.surface.options;
    call.method = Some(rpc.method.clone());
    call.span.name(|| format!("{} {}", telemetry::verb(&head.method), route.template));
    call.span.set("http.route", || route.template.clone());
    call.resources = variables.iter().map(|(_, value)| (*value).to_owned()).collect();
    let team = route.team.and_then(|at| variables.get(at)).map(|(_, team)| *team);
    call.team = team.map(str::to_owned);
    let arrival = Arrival {
        rpc,
        accepted: route.accepted,
        api_key_header: options.api_key_header,
        team,
        headers: &head.headers,
        uri: &head.uri,
        sessions: &gateway.sessions,
    };
    gateway.must_be_seen(rpc.errand(), Some(rpc.owner()), call).await?;
    gateway.gate.admit(&arrival, call).await?;
    if rpc.is_stream() {
        return stream(gateway, route, variables, &arrival, head, body, call).await;
    }

    let reading = message(gateway, route, variables, head, body);
    let frame = gateway.gate.read(rpc, reading, call).await?;
    if let Some(number) = rpc.rate_field {
        let message = frame.as_ref().ok().and_then(|frame| frame.get(FRAME_HEADER_BYTES..));
        let field = message.map(|message| bytes_of(message, number)).transpose()?.flatten();
        gateway.gate.count(rpc, field, call).await?;
    }
    let frame = frame?;
    if rpc.answers == Answers::Here {
        let answer = gateway.verifier.answer(call.principal.as_ref(), &frame[FRAME_HEADER_BYTES..]).await?;
        return json(gateway, route, &answer);
    }

    let once = once::of_call(&arrival, call.principal.as_deref(), &frame)?;
    let caller =
        Caller { principal: call.principal.clone().unwrap_or_else(nobody), request_id: call.request_id.clone(), once };
    let answering = exchange(gateway, rpc, frame, caller, call);
    let answered = tokio::time::timeout(gateway.call_timeout, answering);
    let message = answered.await.map_err(|_| Error::new(Reason::Deadline))??;
    let message = gateway.sessions.settle(message, call, gateway.clock.now_ms())?;
    json(gateway, route, &message)
}

/// Answers a call that streams: what it takes is one body, and so is what it answers with.
async fn stream<B>(
    gateway: &Inner,
    route: &RestRoute,
    variables: &[(usize, &str)],
    arrival: &Arrival<'_>,
    head: &Head,
    body: &mut Option<B>,
    call: &mut Call,
) -> Result<Response<Body>, Refusal>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
{
    let rpc = &route.rpc;
    once::must_not_be_asked_for(&head.headers, rpc).map_err(Refusal::as_sent)?;
    let parts = Parts { case: route.surface.options.request_case(), variables, query: head.uri.query(), body: None };
    let frame = gateway.table.schema.request(rpc.input, &parts).map_err(Refusal::as_sent)?;
    let (body, overflow) = match (rpc.body_field, body.take_if(|_| rpc.body_field.is_some())) {
        (Some(field), Some(body)) => {
            edge::must_fit(&head.headers, rpc.max_body_bytes)?;
            let upload = Upload::new(frame, body, field, rpc.max_body_bytes, gateway.call_timeout);
            let overflow = upload.overflow();
            (tonic::body::Body::new(upload), overflow)
        }
        _ => (tonic::body::Body::new(Full::new(Bytes::from(frame))), Arc::default()),
    };
    let principal = call.principal.clone().unwrap_or_else(nobody);
    let caller = Caller { principal, request_id: call.request_id.clone(), once: None };
    let answering = async {
        let request = request(rpc, body);
        let response = rpc.channel.call_as(caller, &gateway.signer, request).await;
        let response = response.map_err(|status| Error::from_status(&status))?;
        match rpc.answers {
            // A file that comes slowly is reported on slowly.
            Answers::Body if rpc.body_field.is_some() => {
                pieces::body_of(response, gateway.call_timeout * SLOWNESS).await
            }
            Answers::Body => pieces::body_of(response, gateway.call_timeout).await,
            _ => {
                let case = route.surface.options.response_case();
                pieces::lines_of(response, gateway.call_timeout, Arc::clone(&gateway.table.schema), rpc.output, case)
                    .await
            }
        }
    };
    let answered = tokio::time::timeout(gateway.call_timeout, answering).await;
    let answered = answered.unwrap_or_else(|_| Err(Error::new(Reason::Deadline)));
    let response = answered.map_err(|error| {
        // Whatever a service makes of a body that was cut off, this is why it was.
        if overflow.load(Ordering::Relaxed) { edge::too_large(rpc.max_body_bytes) } else { error }
    })?;
    let holder = Holder::of(&gateway.gate, arrival, call)?;
    let shutdown = gateway.shutdown.clone().filter(|_| rpc.answers == Answers::Lines);
    let place = call.place.take();
    Ok(response.map(|body| {
        let body = streams::ended_with(body, holder, shutdown, place, false);
        // Many clients read nothing before they have sent everything.
        let is_upload = rpc.body_field.is_some();
        Body::from(if is_upload { pieces::taken_ahead(body, gateway.call_timeout * SLOWNESS) } else { body })
    }))
}

/// The frame of the message that a request makes.
async fn message<B>(
    gateway: &Inner,
    route: &RestRoute,
    variables: &[(usize, &str)],
    head: &Head,
    body: &mut Option<B>,
) -> Result<Vec<u8>, Refusal>
where
    B: http_body::Body<Data = Bytes>,
{
    let body = match body.take_if(|_| route.body) {
        Some(body) => Some(json_body(gateway, &route.rpc, &head.headers, body).await?),
        None => None,
    };
    let case = route.surface.options.request_case();
    let parts = Parts { case, variables, query: head.uri.query(), body: body.as_deref() };
    gateway.table.schema.request(route.rpc.input, &parts).map_err(Refusal::as_sent)
}

/// The answer that a message is.
fn json(gateway: &Inner, route: &RestRoute, message: &[u8]) -> Result<Response<Body>, Refusal> {
    let rpc = &route.rpc;
    let mut response = if rpc.success == StatusCode::NO_CONTENT {
        Response::new(Body::empty())
    } else {
        let json = gateway.table.schema.answer(rpc.output, route.surface.options.response_case(), message)?;
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

/// What a service is asked.
fn request(rpc: &Rpc, body: tonic::body::Body) -> Request<tonic::body::Body> {
    let mut request = Request::new(body);
    *request.method_mut() = Verb::POST;
    *request.version_mut() = Version::HTTP_2;
    request.uri_mut().clone_from(&rpc.uri);
    let headers = request.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(TE, HeaderValue::from_static("trailers"));
    request
}

/// Calls a method with the bytes of a frame, and answers with those of its message.
async fn exchange(gateway: &Inner, rpc: &Rpc, frame: Vec<u8>, caller: Caller, call: &mut Call) -> Result<Bytes, Error> {
    let mut request = request(rpc, tonic::body::Body::new(Full::new(Bytes::from(frame))));
    request.headers_mut().insert("grpc-timeout", gateway.grpc_timeout.clone());
    let response = rpc.channel.call_as(caller, &gateway.signer, request).await;
    let response = response.map_err(|status| Error::from_status(&status))?;
    if let Some(replayed) = response.headers().get(&REPLAYED) {
        call.told.tell(REPLAYED, replayed.clone());
    }
    message_of(response).await
}

/// The one message of an answer, if the call succeeded.
pub(crate) async fn message_of(response: Response<tonic::body::Body>) -> Result<Bytes, Error> {
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
