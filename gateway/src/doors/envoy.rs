//! Envoy's external authorization: the question of [`forward_auth`](super::forward_auth), asked over gRPC.
//!
//! Every answer is a judgement: what is malformed, and what cannot be judged because auth does not answer, is denied
//! with the status that a caller should see. A gRPC error would be open where Envoy is set to `failure_mode_allow`.

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use async_trait::async_trait;
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method as Verb, Request, Response,
    header::{CACHE_CONTROL, CONTENT_TYPE},
};
use http_body_util::{BodyExt as _, Full};
use paperkey_kit::principal::REQUEST_ID_HEADER;
use paperkey_proto::{Contract, Error, errors::v1::Reason, options::v1::Scope};
use tonic::{Code, Status};
use tower::Service as _;

use super::{IDENTITY, identity, is_our_word, is_read, judge};
use crate::{Inner, edge, envelope::Refusal, transcode::FRAME_HEADER_BYTES};

mod wire {
    #![expect(
        unreachable_pub,
        clippy::all,
        clippy::pedantic,
        clippy::allow_attributes,
        reason = "generated from Envoy's messages"
    )]
    include!(concat!(env!("OUT_DIR"), "/envoy.service.auth.v3.rs"));
}

use wire::{
    AttributeContext, CheckRequest, CheckResponse, DeniedHttpResponse, HttpStatus, OkHttpResponse,
    address::Address,
    attribute_context::{HttpRequest, Peer},
    authorization_server::{Authorization, AuthorizationServer},
    check_response::HttpResponse,
    header_value_option::HeaderAppendAction,
};

/// What the paths of its methods begin with.
pub(crate) const SERVICE: &str = "/envoy.service.auth.v3.Authorization/";

/// The most of a question that is read. Bodies have no place in it.
const MAX_QUESTION_BYTES: usize = 1_024 * 1_024;

/// The frame of an empty message.
const NO_QUESTION: Bytes = Bytes::from_static(&[0; FRAME_HEADER_BYTES]);

/// The name by which the configuration of a route says the scope.
const SCOPE: &str = "scope";

/// Answers a call of Envoy's.
pub(crate) async fn answer(
    gateway: &Arc<Inner>,
    request: Request<tonic::body::Body>,
    peer: SocketAddr,
    request_id: &str,
) -> Response<tonic::body::Body> {
    let door = |closed| Door { gateway: Arc::clone(gateway), peer, request_id: request_id.to_owned(), closed };
    let mut service = AuthorizationServer::new(door(None)).max_decoding_message_size(MAX_QUESTION_BYTES);
    let uri = request.uri().clone();
    let answer = tokio::time::timeout(gateway.call_timeout, service.call(request)).await;
    let fault = match &answer {
        Ok(Ok(response)) => unread(response.headers()),
        Ok(Err(impossible)) => match *impossible {},
        Err(_) => Some(Reason::Deadline),
    };
    let mut response = match (answer, fault) {
        (Ok(Ok(response)), None) => response,
        // What cannot be read, or not in time, is denied like anything else.
        (_, fault) => {
            let mut question = Request::new(tonic::body::Body::new(Full::new(NO_QUESTION)));
            *question.method_mut() = Verb::POST;
            *question.uri_mut() = uri;
            question.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
            let answer = AuthorizationServer::new(door(fault)).call(question).await;
            answer.unwrap_or_else(|impossible: Infallible| match impossible {})
        }
    };
    if let Ok(id) = HeaderValue::from_str(request_id) {
        response.headers_mut().insert(REQUEST_ID_HEADER, id);
    }
    response
}

/// Why a question was not read, if it was not.
fn unread(headers: &HeaderMap) -> Option<Reason> {
    match Status::from_header_map(headers)?.code() {
        // No such method: that is no question at all.
        Code::Ok | Code::Unimplemented => None,
        Code::OutOfRange | Code::ResourceExhausted => Some(Reason::BodyTooLarge),
        _ => Some(Reason::ValidationFailed),
    }
}

/// The door, as it stands for one call.
struct Door {
    gateway: Arc<Inner>,
    peer: SocketAddr,
    request_id: String,
    /// Why it is closed to all.
    closed: Option<Reason>,
}

/// A question, read.
struct Question {
    headers: HeaderMap,
    client: Option<IpAddr>,
    scope: Option<Scope>,
    writes: Option<bool>,
}

#[async_trait]
impl Authorization for Door {
    async fn check(&self, request: tonic::Request<CheckRequest>) -> Result<tonic::Response<CheckResponse>, Status> {
        let attributes = request.into_inner().attributes.unwrap_or_default();
        let http = attributes.request.clone().unwrap_or_default().http.unwrap_or_default();
        let read = match self.closed {
            Some(reason) => Err(Error::new(reason)),
            None => self.read(&attributes, &http),
        };
        let (headers, judged) = match read {
            Ok(question) => {
                let Question { headers, client, scope, writes } = question;
                let judged = judge(&self.gateway, &headers, client, scope, writes).await;
                (headers, judged)
            }
            Err(error) => (HeaderMap::new(), Err(Refusal::as_sent(error))),
        };
        let answer = match judged {
            Ok(identified) => passes(&headers, &identity(&identified.principal)),
            Err(refusal) => {
                let path = http.path.split('?').next().unwrap_or_default();
                let told = self.gateway.doorman(path, &headers, &self.request_id).tell(&refusal);
                self.denied(&refusal, told).await
            }
        };
        Ok(tonic::Response::new(answer))
    }
}

impl Door {
    fn read(&self, attributes: &AttributeContext, http: &HttpRequest) -> Result<Question, Error> {
        let headers = headers_of(http)?;
        let mut scope = None;
        for (name, value) in &attributes.context_extensions {
            // A name that is not understood may be a check that somebody relies on.
            if name != SCOPE {
                return Err(Error::field(format!("context_extensions.{name}"), "is not known: there is scope"));
            }
            let known = Contract::get().scope_named(value);
            let wrong = || Error::field("context_extensions.scope", "must be a scope, such as licenses:read");
            scope = Some(known.ok_or_else(wrong)?);
        }
        let trusted = self.gateway.trusts(self.peer);
        let client = if trusted {
            // Without an address, such as behind a Unix socket, a key that is bound to some does not pass.
            let source = attributes.source.as_ref().and_then(address_of);
            source.map(|source| {
                edge::client_address(&headers, SocketAddr::new(source, 0), &self.gateway.config.trusted_proxies)
            })
        } else {
            Some(self.peer.ip().to_canonical())
        };
        let writes = trusted.then(|| !is_read(&http.method));
        Ok(Question { headers, client, scope, writes })
    }

    async fn denied(&self, refusal: &Refusal, told: Response<crate::body::Body>) -> CheckResponse {
        let code = match refusal.error.entry().grpc_code {
            // Never OK, whatever the catalogue says.
            0 => i32::from(Code::PermissionDenied),
            code => code,
        };
        let (mut head, body) = told.into_parts();
        head.headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Ok(id) = HeaderValue::from_str(&self.request_id) {
            head.headers.insert(REQUEST_ID_HEADER, id);
        }
        // What a teller says is at hand and whole.
        let body = body.collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
        CheckResponse {
            status: Some(wire::Status { code, message: refusal.error.message().to_owned() }),
            http_response: Some(HttpResponse::DeniedResponse(DeniedHttpResponse {
                status: Some(HttpStatus { code: i32::from(head.status.as_u16()) }),
                headers: head.headers.iter().map(|(name, value)| overwriting(name, value)).collect(),
                body: String::from_utf8_lossy(&body).into_owned(),
            })),
        }
    }
}

/// Lets a request pass, with the identity in place of whatever it said of itself.
fn passes(headers: &HeaderMap, told: &[(HeaderName, HeaderValue)]) -> CheckResponse {
    let is_told = |name: &HeaderName| told.iter().any(|(known, _)| known == name);
    let arrived = headers.keys().filter(|name| is_our_word(name.as_str()) && !IDENTITY.contains(name));
    // Envoy may send a part of the headers only, so all names of an identity are named.
    let removed = IDENTITY.iter().chain(arrived).filter(|name| !is_told(name));
    CheckResponse {
        status: Some(wire::Status { code: Code::Ok.into(), message: String::new() }),
        http_response: Some(HttpResponse::OkResponse(OkHttpResponse {
            headers: told.iter().map(|(name, value)| overwriting(name, value)).collect(),
            headers_to_remove: removed.map(ToString::to_string).collect(),
        })),
    }
}

fn overwriting(name: &HeaderName, value: &HeaderValue) -> wire::HeaderValueOption {
    let value = String::from_utf8_lossy(value.as_bytes()).into_owned();
    wire::HeaderValueOption {
        header: Some(wire::HeaderValue { key: name.to_string(), value, raw_value: Vec::new() }),
        append_action: HeaderAppendAction::OverwriteIfExistsOrAdd.into(),
    }
}

/// The headers of the request that Envoy holds, in either of its two forms.
fn headers_of(http: &HttpRequest) -> Result<HeaderMap, Error> {
    let mapped = http.headers.iter().map(|(name, value)| (name, value.as_bytes()));
    let listed = http.header_map.iter().flat_map(|map| &map.headers).map(|header| {
        let value = if header.raw_value.is_empty() { header.value.as_bytes() } else { &header.raw_value };
        (&header.key, value)
    });
    let mut headers = HeaderMap::new();
    for (name, value) in mapped.chain(listed).filter(|(name, _)| !name.starts_with(':')) {
        let (Ok(name), Ok(value)) = (HeaderName::from_bytes(name.as_bytes()), HeaderValue::from_bytes(value)) else {
            return Err(Error::malformed("The request has a header that is none"));
        };
        headers.try_append(name, value).map_err(|_| Error::malformed("The request has too many headers"))?;
    }
    Ok(headers)
}

fn address_of(peer: &Peer) -> Option<IpAddr> {
    let Address::SocketAddress(socket) = peer.address.as_ref()?.address.as_ref()?;
    socket.address.parse().ok().map(|address: IpAddr| address.to_canonical())
}
