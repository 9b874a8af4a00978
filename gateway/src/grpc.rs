//! gRPC and gRPC-Web: the same methods under the same policy, passed through to the services.
//!
//! Messages are not looked into, but for the field that a limit counts by and for what an `Idempotency-Key` stands for.
//! Everything else the gateway decides from the path and the metadata; identity that arrives from outside is dropped, and
//! the gateway's own word is put in its place. Reflection and health are served here, and know of public services only.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method as Verb, Request, Response, Version,
    header::{AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, COOKIE, FORWARDED, HOST, TE, TRANSFER_ENCODING},
    request::Parts as Head,
};
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt as _, Full, StreamBody};
use paperkey_kit::{
    principal::{Caller, REQUEST_ID_HEADER, nobody},
    ready::Health,
    reflection,
    service::Rpcs,
};
use paperkey_proto::{Error, errors::v1::Reason};
use parking_lot::Mutex;
use tonic::{Code, Status};
use tonic_web::GrpcWebLayer;
use tower::{Layer as _, Service as _, service_fn};

use crate::{
    GatewayError, Inner,
    call::Call,
    edge, once,
    policy::Arrival,
    session::Outcome,
    streams::{self, Holder},
    table::{Answers, Table},
    transcode::{FRAME_HEADER_BYTES, bytes_of, framed, message_in},
};

/// The content types of gRPC-Web that have an encoding here.
const WEB_TYPES: [&[u8]; 4] = [
    b"application/grpc-web",
    b"application/grpc-web+proto",
    b"application/grpc-web-text",
    b"application/grpc-web-text+proto",
];

/// How much of a refused request is read.
const MAX_DRAINED_BYTES: usize = 65_536;
/// And for how long.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(500);

/// Less than any call takes. A service would be asked only to be told at once that nobody waits any more.
const SHORTEST_TIMEOUT: Duration = Duration::from_millis(10);

/// What the paths of health begin with.
const HEALTH: &str = "/grpc.health.v1.Health/";

/// Services of the gateway itself, which need no credential.
const OWN_SERVICES: [&str; 3] =
    [HEALTH, "/grpc.reflection.v1.ServerReflection/", "/grpc.reflection.v1alpha.ServerReflection/"];

/// What a content type says of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    Grpc,
    GrpcWeb,
    /// Looks like gRPC-Web, in an encoding that is not known.
    UnknownWeb,
    Rest,
}

/// Tells gRPC from REST.
pub(crate) fn dialect(headers: &HeaderMap) -> Dialect {
    let Some(media_type) = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes) else { return Dialect::Rest };
    match media_type.strip_prefix(b"application/grpc") {
        None => Dialect::Rest,
        Some([] | [b'+' | b';' | b' ', ..]) => Dialect::Grpc,
        Some(_) if WEB_TYPES.contains(&media_type) => Dialect::GrpcWeb,
        Some(_) => Dialect::UnknownWeb,
    }
}

/// The services of the gateway itself: health and reflection.
pub(crate) fn own_services(table: &Table) -> Result<(Health, Rpcs), GatewayError> {
    let (health, rpcs) = Health::new(table.rpcs().map(|rpc| rpc.method.service.as_str()));
    Ok((health, reflection::add_to(rpcs, |path| table.rpc(path).is_some())?))
}

/// Answers a gRPC-Web call.
pub(crate) async fn answer_web(
    gateway: &Arc<Inner>,
    request: Request<tonic::body::Body>,
    call: Call,
) -> (Response<tonic::body::Body>, Option<Call>) {
    let gateway = Arc::clone(gateway);
    // The layer wants a service that it may call often; it calls this one once.
    let call = Arc::new(Mutex::new(Some(call)));
    let lent = Arc::clone(&call);
    let inner = service_fn(move |request| {
        let (gateway, lent) = (Arc::clone(&gateway), Arc::clone(&lent));
        async move {
            let taken = lent.lock().take();
            let Some(mut call) = taken else { return Ok(Status::from(Error::internal("asked twice")).into_http()) };
            let response = answer(&gateway, request, &mut call).await;
            *lent.lock() = Some(call);
            Ok::<_, Infallible>(response)
        }
    });
    let mut service = GrpcWebLayer::new().layer(inner);
    let answered = service.call(request).await.unwrap_or_else(|impossible: Infallible| match impossible {});
    let call = call.lock().take();
    (answered, call)
}

/// Answers a gRPC call.
pub(crate) async fn answer(
    gateway: &Inner,
    request: Request<tonic::body::Body>,
    call: &mut Call,
) -> Response<tonic::body::Body> {
    call.is_grpc();
    let own = OWN_SERVICES.iter().any(|service| request.uri().path().starts_with(service));
    let mut response = if own {
        call.aside = true;
        // Whoever watches over the gateway asks for its health as often as need be.
        let counted =
            if request.uri().path().starts_with(HEALTH) { Ok(()) } else { gateway.gate.count_stray(call).await };
        match counted {
            Ok(()) => {
                let answer = gateway.own_services.call(request).await;
                answer.unwrap_or_else(|impossible: Infallible| match impossible {})
            }
            Err(limited) => Status::from(limited).into_http(),
        }
    } else {
        let (head, body) = request.into_parts();
        let mut unread = Some(body);
        match pass(gateway, head, &mut unread, call).await {
            Ok(answer) => answer,
            Err(error) => {
                if let Some(body) = unread {
                    drain(body).await;
                }
                call.failed(&error);
                Status::from(error).into_http()
            }
        }
    };
    let headers = response.headers_mut();
    call.told.put_on(headers);
    if let Ok(id) = HeaderValue::from_str(&call.request_id) {
        headers.insert(REQUEST_ID_HEADER, id);
    }
    response
}

/// Reads what a refused caller sends, within bounds. HTTP/2 resets the stream of an answer that does not wait for its
/// request; whatever arrives for it later counts against the connection, until that is closed.
async fn drain(mut body: tonic::body::Body) {
    let read = async {
        let mut left = MAX_DRAINED_BYTES;
        while let Some(Ok(frame)) = body.frame().await {
            let Some(less) = left.checked_sub(frame.data_ref().map_or(0, Bytes::len)) else { return };
            left = less;
        }
    };
    // Who takes longer loses the connection at most.
    let _ = tokio::time::timeout(DRAIN_TIMEOUT, read).await;
}

async fn pass(
    gateway: &Inner,
    mut head: Head,
    unread: &mut Option<tonic::body::Body>,
    call: &mut Call,
) -> Result<Response<tonic::body::Body>, Error> {
    let Some(rpc) = gateway.table.rpc(head.uri.path()).filter(|_| head.method == Verb::POST) else {
        gateway.gate.count_stray(call).await?;
        return Err(Error::new(Reason::MethodNotAllowed).with_message("No such method"));
    };
    call.method = Some(Arc::clone(&rpc.method));
    call.span.name(|| rpc.method.path.trim_start_matches('/').to_owned());
    call.span.set("rpc.system.name", || "grpc");
    let arrival = Arrival {
        rpc,
        accepted: rpc.accepted,
        api_key_header: rpc.api_key_header,
        team: None,
        headers: &head.headers,
        uri: &head.uri,
        sessions: &gateway.sessions,
    };
    gateway.must_be_seen(rpc.errand(), Some(rpc.owner()), call).await?;
    gateway.gate.admit(&arrival, call).await.map_err(|refusal| *refusal.error)?;
    once::must_not_be_asked_for(&head.headers, rpc)?;
    let holder = if rpc.is_stream() { Holder::of(&gateway.gate, &arrival, call)? } else { None };

    let asked = asked_timeout(&head.headers);
    if asked.is_some_and(|asked| asked < SHORTEST_TIMEOUT) {
        if rpc.rate_field.is_some() {
            gateway.gate.count(rpc, None, call).await.map_err(|refusal| *refusal.error)?;
        }
        return Err(Error::new(Reason::Deadline));
    }
    let timeout = asked.map_or(gateway.call_timeout, |asked| asked.min(gateway.call_timeout));
    let overflow = Arc::new(AtomicBool::new(false));
    let left = rpc.max_body_bytes + FRAME_HEADER_BYTES;
    let body = unread.take().unwrap_or_default();
    let body = Bounded { body, left, overflow: Arc::clone(&overflow) };
    let mut caller = Caller {
        principal: call.principal.clone().unwrap_or_else(nobody),
        request_id: call.request_id.clone(),
        once: None,
    };
    // Messages are looked into only where something is decided by what they say.
    let is_looked_into = rpc.rate_field.is_some() || once::is_asked_for(&head.headers, rpc);
    let body = if is_looked_into || !rpc.is_stream() {
        let read = gateway.gate.read(rpc, tokio::time::timeout(timeout, body.collect()), call).await?;
        let frame = read.map_err(|_| Error::new(Reason::Deadline)).and_then(|read| match read {
            Ok(read) => Ok(read.to_bytes()),
            Err(_) if overflow.load(Ordering::Relaxed) => Err(edge::too_large(rpc.max_body_bytes)),
            Err(_) => Err(Error::malformed("The request was cut off")),
        });
        let frame = frame.and_then(|frame| {
            if is_looked_into {
                message_in(&frame)?;
            }
            Ok(frame)
        });
        if let Some(number) = rpc.rate_field {
            let message = frame.as_ref().ok().and_then(|frame| frame.get(FRAME_HEADER_BYTES..));
            let field = message.map(|message| bytes_of(message, number)).transpose();
            // Who cannot be understood is counted by everything else, and refused.
            let known = field.as_ref().ok().copied().flatten().flatten();
            gateway.gate.count(rpc, known, call).await.map_err(|refusal| *refusal.error)?;
            field?;
        }
        let frame = frame?;
        if is_looked_into {
            caller.once =
                once::of_call(&arrival, call.principal.as_deref(), &frame).map_err(|refusal| *refusal.error)?;
        }
        tonic::body::Body::new(Full::new(frame))
    } else {
        tonic::body::Body::new(body)
    };

    strip(&mut head.headers);
    head.headers.insert(TE, HeaderValue::from_static("trailers"));
    head.headers.insert("grpc-timeout", crate::rest::grpc_timeout(timeout));
    head.uri.clone_from(&rpc.uri);
    head.version = Version::HTTP_2;
    head.extensions.clear();
    let answer = rpc.channel.call_as(caller, &gateway.signer, Request::from_parts(head, body));
    // Until the answer is whole, where it is looked into.
    let deadline = tokio::time::Instant::now() + timeout;
    let answer = tokio::time::timeout_at(deadline, answer).await.map_err(|_| Error::new(Reason::Deadline))?;
    if overflow.load(Ordering::Relaxed) {
        return Err(edge::too_large(rpc.max_body_bytes));
    }
    let response = answer.map_err(|status| Error::from_status(&status))?;
    if let Some(status) = Status::from_header_map(response.headers())
        && status.code() != tonic::Code::Ok
    {
        let error = Error::from_status(&status);
        // What tonic itself refuses speaks tonic's words; ours are the catalogue's.
        if status.details().is_empty() {
            return Err(error);
        }
        call.failed(&error);
    } else if rpc.is_stream() {
        let shutdown = gateway.shutdown.clone().filter(|_| rpc.answers == Answers::Lines);
        let place = call.place.take();
        return Ok(response.map(|body| streams::ended_with(body, holder, shutdown, place, true)));
    } else if call.session != Outcome::Shown {
        let settled = tokio::time::timeout_at(deadline, settled(gateway, response, call)).await;
        return settled.map_err(|_| Error::new(Reason::Deadline))?;
    }
    Ok(response)
}

/// The answer of a call that makes or ends a session, as a browser gets it that keeps it in a cookie.
async fn settled(
    gateway: &Inner,
    response: Response<tonic::body::Body>,
    call: &mut Call,
) -> Result<Response<tonic::body::Body>, Error> {
    let headers = response.headers().clone();
    // Whether it is a success is known at its end.
    let message = crate::rest::message_of(response).await?;
    let message = gateway.sessions.settle(message, call, gateway.clock.now_ms())?;
    let mut ended = HeaderMap::new();
    Status::new(Code::Ok, "").add_header(&mut ended).map_err(Error::internal)?;
    // A body whose length was known would be cut off there over gRPC-Web, where the trailers are a part of it.
    let frames = [Frame::data(framed(&message)?), Frame::trailers(ended)].map(Ok::<_, Status>);
    let mut response = Response::new(tonic::body::Body::new(StreamBody::new(stream::iter(frames))));
    *response.headers_mut() = headers;
    Ok(response)
}

/// Takes out what is not for services: identity that did not come from us, credentials, and what belongs to one
/// connection.
fn strip(headers: &mut HeaderMap) {
    let foreign: Vec<HeaderName> = headers
        .keys()
        .filter(|name| {
            let name = name.as_str();
            name.starts_with("paperkey-") || name.starts_with("x-paperkey-") || name.starts_with("x-forwarded-")
        })
        .cloned()
        .collect();
    for name in &foreign {
        headers.remove(name);
    }
    for name in [AUTHORIZATION, COOKIE, CONNECTION, CONTENT_LENGTH, FORWARDED, HOST, TRANSFER_ENCODING] {
        headers.remove(name);
    }
    for name in ["x-api-key", "keep-alive", "proxy-authorization", "proxy-connection", "upgrade", "origin", "referer"] {
        headers.remove(name);
    }
    // The trace that the call is a part of goes on by our own word.
    for name in ["traceparent", "tracestate", "baggage"] {
        headers.remove(name);
    }
}

/// How long a caller of gRPC wants to wait: at most eight digits and a unit.
fn asked_timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let is_number = (1..=8).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit());
    let value: u64 = is_number.then(|| digits.parse().ok()).flatten()?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3_600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

/// A body that ends in an error where it grows too large.
struct Bounded {
    body: tonic::body::Body,
    left: usize,
    overflow: Arc<AtomicBool>,
}

impl http_body::Body for Bounded {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        let Poll::Ready(Some(Ok(frame))) = &polled else { return polled };
        let length = frame.data_ref().map_or(0, Bytes::len);
        let Some(left) = self.left.checked_sub(length) else {
            self.overflow.store(true, Ordering::Relaxed);
            return Poll::Ready(Some(Err(Error::new(Reason::BodyTooLarge).into())));
        };
        self.left = left;
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    /// Not known: what gRPC-Web sends as text is shorter once it is bytes.
    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(name: &'static str, value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(HeaderName::from_static(name), HeaderValue::from_static(value))])
    }

    #[test]
    fn the_content_type_tells_the_dialects_apart() {
        let of = |value| dialect(&with("content-type", value));
        assert_eq!(of("application/grpc"), Dialect::Grpc);
        assert_eq!(of("application/grpc+proto"), Dialect::Grpc);
        assert_eq!(of("application/grpc-web-text"), Dialect::GrpcWeb);
        assert_eq!(of("application/grpc-web+json"), Dialect::UnknownWeb);
        assert_eq!(of("application/json"), Dialect::Rest);
        assert_eq!(dialect(&HeaderMap::new()), Dialect::Rest);
    }

    #[test]
    fn a_timeout_is_read_as_grpc_writes_it() {
        let of = |value| asked_timeout(&with("grpc-timeout", value));
        assert_eq!(of("5S"), Some(Duration::from_secs(5)));
        assert_eq!(of("250m"), Some(Duration::from_millis(250)));
        assert_eq!(of("99999999H"), Some(Duration::from_hours(99_999_999)));
        for value in ["", "S", "5", "5s", "-5S", "+5S", "123456789S", "5 S"] {
            assert_eq!(of(value), None, "{value}");
        }
    }

    #[test]
    fn what_only_we_may_say_is_taken_out() {
        let names = [
            "paperkey-principal-bin",
            "paperkey-principal",
            "x-paperkey-team",
            "authorization",
            "x-api-key",
            "cookie",
            "x-forwarded-for",
        ];
        let mut headers: HeaderMap =
            names.iter().map(|name| (HeaderName::from_static(name), HeaderValue::from_static("x"))).collect();
        headers.append("paperkey-principal-bin", HeaderValue::from_static("y"));
        headers.insert("grpc-encoding", HeaderValue::from_static("identity"));
        strip(&mut headers);
        assert_eq!(headers.keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["grpc-encoding"]);
    }
}
