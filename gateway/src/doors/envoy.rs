//! Envoy's external authorization: the question of [`forward_auth`](super::forward_auth), asked over gRPC.
//!
//! Every answer is a judgement: what is malformed, and what cannot be judged because auth does not answer, is denied
//! with the status that a caller should see. A gRPC error would be open where Envoy is set to `failure_mode_allow`.

use std::{
    collections::HashMap,
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
use paperkey_proto::{Error, errors::v1::Reason};
use parking_lot::Mutex;
use tonic::{Code, Status};
use tower::Service as _;

use super::{COST, IDENTITY, Terms, TermsRead, identity, is_our_word, is_read, judge};
use crate::{
    Inner,
    call::{Call, Told},
    edge,
    envelope::Refusal,
    transcode::FRAME_HEADER_BYTES,
};

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

/// Answers a call of Envoy's.
pub(crate) async fn answer(
    gateway: &Arc<Inner>,
    request: Request<tonic::body::Body>,
    peer: SocketAddr,
    call: &mut Call,
) -> Response<tonic::body::Body> {
    let request_id = call.request_id.clone();
    let lent = Arc::new(Mutex::new(None));
    let mut door = |closed| {
        // One that took too long has not brought its call back.
        *lent.lock() = Some(call.lend());
        Door { gateway: Arc::clone(gateway), peer, call: Arc::clone(&lent), closed }
    };
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
    if let Ok(id) = HeaderValue::from_str(&request_id) {
        response.headers_mut().insert(REQUEST_ID_HEADER, id);
    }
    let learnt = lent.lock().take();
    if let Some(learnt) = learnt {
        call.take_back(learnt);
    }
    // No such method: nobody was asked anything.
    if Status::from_header_map(response.headers()).is_some_and(|status| status.code() == Code::Unimplemented) {
        let counted = gateway.gate.count_stray(call).await;
        call.failed(&counted.err().unwrap_or_else(|| Error::new(Reason::MethodNotAllowed)));
        call.told.put_on(response.headers_mut());
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
    /// Lent to the one question that is answered at a time.
    call: Arc<Mutex<Option<Call>>>,
    /// Why it is closed to all.
    closed: Option<Reason>,
}

/// A question, read.
struct Question {
    headers: HeaderMap,
    client: Option<IpAddr>,
    terms: Terms,
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
        let taken = self.call.lock().take();
        let Some(mut call) = taken else { return Err(Error::internal("a question was asked twice").into()) };
        let (headers, judged) = match read {
            Ok(question) => {
                let Question { headers, client, terms, writes } = question;
                if let Some(client) = client {
                    call.client = client;
                }
                let judged = judge(&self.gateway, &headers, client, &terms, writes, &mut call).await;
                (headers, judged)
            }
            Err(error) => {
                let counted = self.gateway.gate.count_stray(&mut call).await;
                (HeaderMap::new(), Err(counted.map_or_else(Refusal::from, |()| Refusal::as_sent(error))))
            }
        };
        let answer = match judged {
            Ok(principal) => passes(&headers, &identity(&principal), &call.told),
            Err(refusal) => {
                call.failed(&refusal.error);
                let path = http.path.split('?').next().unwrap_or_default();
                let mut told = self.gateway.doorman(path, &headers, &call.request_id).tell(&refusal);
                call.told.put_on(told.headers_mut());
                denied(&refusal, told, &call.request_id).await
            }
        };
        *self.call.lock() = Some(call);
        Ok(tonic::Response::new(answer))
    }
}

impl Door {
    fn read(&self, attributes: &AttributeContext, http: &HttpRequest) -> Result<Question, Error> {
        let headers = headers_of(http)?;
        let terms = self.terms(&attributes.context_extensions)?;
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
        Ok(Question { headers, client, terms, writes })
    }

    /// What the configuration of the route asks for.
    fn terms(&self, said: &HashMap<String, String>) -> Result<Terms, Error> {
        let wrong = |name: &str, what: &str| Error::field(format!("context_extensions.{name}"), what);
        let mut terms = TermsRead::default();
        for (name, value) in said {
            // A name that is not understood may be a check that somebody relies on.
            if !TermsRead::knows(name) {
                return Err(wrong(name, "is not known: there are scope, meter and cost"));
            }
            terms.read(name, value, &self.gateway.config.tiers).map_err(|what| wrong(name, what))?;
        }
        match terms.fault_of_cost() {
            Some(what) => Err(wrong(COST, what)),
            None => Ok(terms.terms()),
        }
    }
}

/// What Envoy answers whoever does not pass.
async fn denied(refusal: &Refusal, told: Response<crate::body::Body>, request_id: &str) -> CheckResponse {
    let code = match refusal.error.entry().grpc_code {
        // Never OK, whatever the catalogue says.
        0 => i32::from(Code::PermissionDenied),
        code => code,
    };
    let (mut head, body) = told.into_parts();
    head.headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    if let Ok(id) = HeaderValue::from_str(request_id) {
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

/// Lets a request pass, with the identity in place of whatever it said of itself.
fn passes(headers: &HeaderMap, told: &[(HeaderName, HeaderValue)], back: &Told) -> CheckResponse {
    let is_told = |name: &HeaderName| told.iter().any(|(known, _)| known == name);
    let arrived = headers.keys().filter(|name| is_our_word(name.as_str()) && !IDENTITY.contains(name));
    // Envoy may send a part of the headers only, so all names of an identity are named.
    let removed = IDENTITY.iter().chain(arrived).filter(|name| !is_told(name));
    CheckResponse {
        status: Some(wire::Status { code: Code::Ok.into(), message: String::new() }),
        http_response: Some(HttpResponse::OkResponse(OkHttpResponse {
            headers: told.iter().map(|(name, value)| overwriting(name, value)).collect(),
            headers_to_remove: removed.map(ToString::to_string).collect(),
            response_headers_to_add: back.iter().map(|(name, value)| overwriting(name, value)).collect(),
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
