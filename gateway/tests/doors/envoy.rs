//! Envoy's check, asked by a client that is made from Envoy's messages.

use std::{
    convert::Infallible,
    net::SocketAddr,
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::{FutureExt as _, future::BoxFuture};
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use paperkey_gateway::{Body, Gateway};
use prost::Message as _;
use serde_json::Value as Json;
use tonic::Code;
use tower::Service;

use crate::common::{PROXY, STRANGER, gateway};

mod wire {
    #![allow(
        unreachable_pub,
        dead_code,
        clippy::all,
        clippy::pedantic,
        clippy::allow_attributes,
        reason = "generated from Envoy's messages"
    )]
    include!(concat!(env!("OUT_DIR"), "/client/envoy.service.auth.v3.rs"));
}

use wire::{
    Address, AttributeContext, CheckRequest, CheckResponse, DeniedHttpResponse, HeaderMap, HeaderValue, OkHttpResponse,
    SocketAddress, address,
    attribute_context::{HttpRequest, Peer, Request as Asked},
    authorization_client::AuthorizationClient,
    check_response::HttpResponse,
};

/// The gateway as a client's transport, seen from one peer.
#[derive(Clone)]
struct Wire(Gateway, SocketAddr);

impl Service<Request<tonic::body::Body>> for Wire {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<tonic::body::Body>) -> Self::Future {
        self.0.handle(request, self.1).map(Ok).boxed()
    }
}

/// What Envoy holds.
#[derive(Clone, Default)]
struct Held<'a> {
    verb: &'a str,
    headers: &'a [(&'a str, &'a str)],
    source: &'a str,
    extensions: &'a [(&'a str, &'a str)],
    raw: bool,
}

fn question(held: &Held<'_>) -> CheckRequest {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    let listed = held.headers.iter().map(|(name, value)| HeaderValue {
        key: (*name).to_owned(),
        value: String::new(),
        raw_value: value.as_bytes().to_vec(),
    });
    let http = HttpRequest {
        method: held.verb.to_owned(),
        path: "/render?size=a4".to_owned(),
        headers: if held.raw { std::collections::HashMap::new() } else { held.headers.iter().map(owned).collect() },
        header_map: held.raw.then(|| HeaderMap { headers: listed.collect() }),
    };
    let socket = SocketAddress { address: held.source.to_owned(), port_value: 5_000 };
    let address = Address { address: Some(address::Address::SocketAddress(socket)) };
    CheckRequest {
        attributes: Some(AttributeContext {
            source: (!held.source.is_empty()).then_some(Peer { address: Some(address) }),
            request: Some(Asked { http: Some(http) }),
            context_extensions: held.extensions.iter().map(owned).collect(),
        }),
    }
}

async fn check(peer: &str, held: &Held<'_>) -> CheckResponse {
    send(peer, question(held)).await
}

async fn send(peer: &str, question: CheckRequest) -> CheckResponse {
    let mut client = AuthorizationClient::new(Wire(gateway(), peer.parse().unwrap()));
    let answer = client.check(question).await.unwrap();
    assert!(answer.metadata().get("x-request-id").is_some());
    answer.into_inner()
}

#[track_caller]
fn passed(answer: CheckResponse) -> OkHttpResponse {
    assert_eq!(answer.status.unwrap().code, 0);
    let Some(HttpResponse::OkResponse(ok)) = answer.http_response else { panic!("it did not pass") };
    ok
}

#[track_caller]
fn denied(answer: CheckResponse, code: Code, status: i32) -> (DeniedHttpResponse, Json) {
    assert_eq!(answer.status.as_ref().unwrap().code, i32::from(code));
    let Some(HttpResponse::DeniedResponse(denied)) = answer.http_response else { panic!("it passed") };
    assert_eq!(denied.status.as_ref().unwrap().code, status, "{}", denied.body);
    let json: Json = serde_json::from_str(&denied.body).unwrap();
    (denied, json)
}

fn header<'a>(denied: &'a DeniedHttpResponse, name: &str) -> &'a str {
    let found = denied.headers.iter().filter_map(|option| option.header.as_ref()).find(|header| header.key == name);
    found.map_or("", |header| header.value.as_str())
}

const GOOD: (&str, &str) = ("authorization", "Bearer pk_live_full");

#[tokio::test]
async fn a_good_key_passes_with_its_identity_in_place_of_a_forged_one() {
    let headers = [
        GOOD,
        (":method", "GET"),
        ("x-paperkey-team", "team_forged"),
        ("x-paperkey-user", "usr_forged"),
        ("x-paperkey-admin", "yes"),
        ("x_paperkey_key", "key_forged"),
    ];
    for raw in [false, true] {
        let ok = passed(check(PROXY, &Held { verb: "GET", headers: &headers, raw, ..Held::default() }).await);
        let told: Vec<_> = ok
            .headers
            .iter()
            .map(|option| {
                assert_eq!(option.append_action, 2, "overwrite or add");
                let header = option.header.as_ref().unwrap();
                (header.key.as_str(), header.value.as_str())
            })
            .collect();
        assert_eq!(
            told,
            [
                ("x-paperkey-key", "key_of_pk_live_full"),
                ("x-paperkey-team", "team_1"),
                ("x-paperkey-mode", "live"),
                ("x-paperkey-scopes", "licenses:read licenses:write products:read"),
            ]
        );
        // Envoy takes these off after it has put those on, so no name may be in both.
        let mut removed = ok.headers_to_remove.clone();
        removed.sort();
        assert_eq!(removed, ["x-paperkey-admin", "x-paperkey-user", "x_paperkey_key"]);
    }
}

#[tokio::test]
async fn whoever_has_no_good_key_is_denied_with_the_envelope() {
    let (said, json) = denied(check(PROXY, &Held { verb: "GET", ..Held::default() }).await, Code::Unauthenticated, 401);
    assert_eq!(json["error"]["code"], "PB_INVALID_API_KEY");
    assert_eq!(header(&said, "content-type"), "application/json");
    assert_eq!((header(&said, "www-authenticate"), header(&said, "cache-control")), ("Bearer", "no-store"));
    assert_eq!(json["error"]["request_id"], header(&said, "x-request-id"));
    for credential in ["Bearer pk_1", "Bearer pk_live_gone", "Bearer pk_live_expired", "Basic eA=="] {
        let headers = [("authorization", credential)];
        let answer = check(PROXY, &Held { verb: "GET", headers: &headers, ..Held::default() }).await;
        let (said, _) = denied(answer, Code::Unauthenticated, 401);
        assert_eq!(header(&said, "www-authenticate"), "Bearer error=\"invalid_token\"", "{credential}");
    }
    let down = [("x-api-key", "pk_live_down")];
    let answer = check(PROXY, &Held { verb: "GET", headers: &down, ..Held::default() }).await;
    let (_, json) = denied(answer, Code::Unavailable, 503);
    assert_eq!(json["error"]["code"], "PB_UNAVAILABLE");
}

#[tokio::test]
async fn the_route_names_the_scope_and_nothing_else() {
    let with = |extensions| Held { verb: "GET", headers: &[GOOD], extensions, ..Held::default() };
    passed(check(PROXY, &with(&[("scope", "licenses:write")])).await);
    let (_, json) = denied(check(PROXY, &with(&[("scope", "keys:read")])).await, Code::PermissionDenied, 403);
    assert_eq!(json["error"]["code"], "PB_SCOPE_INSUFFICIENT");
    let unknown = [[("scope", "everything")], [("scop", "licenses:read")], [("meter", "moons")], [("cost", "1")]];
    for extensions in &unknown {
        denied(check(PROXY, &with(extensions)).await, Code::InvalidArgument, 400);
    }
}

#[tokio::test]
async fn the_verb_counts_from_a_trusted_envoy() {
    let readonly = [("authorization", "Bearer pk_live_readonly")];
    let held = |verb| Held { verb, headers: &readonly, ..Held::default() };
    passed(check(PROXY, &held("GET")).await);
    for verb in ["POST", "DELETE", ""] {
        denied(check(PROXY, &held(verb)).await, Code::PermissionDenied, 403);
        passed(check(STRANGER, &held(verb)).await);
    }
}

#[tokio::test]
async fn the_address_counts_from_a_trusted_envoy() {
    let from = async |peer: &str, source: &str, forwarded: &str| {
        let headers = [("authorization", "Bearer pk_live_home"), ("x-forwarded-for", forwarded)];
        check(peer, &Held { verb: "GET", headers: &headers, source, ..Held::default() }).await
    };
    passed(from(PROXY, "198.51.100.9", "").await);
    passed(from(PROXY, "10.0.0.2", "203.0.113.7, 198.51.100.9").await);
    passed(from("198.51.100.9:1", "203.0.113.7", "").await);
    for (peer, source, forwarded) in [
        (STRANGER, "198.51.100.9", "198.51.100.9"),
        (PROXY, "203.0.113.7", "198.51.100.9"),
        (PROXY, "10.0.0.2", "198.51.100.9, 203.0.113.7"),
        (PROXY, "", "198.51.100.9"),
        (PROXY, "/var/run/envoy.sock", "198.51.100.9"),
    ] {
        let (_, json) = denied(from(peer, source, forwarded).await, Code::PermissionDenied, 403);
        assert_eq!(json["error"]["code"], "PB_IP_NOT_ALLOWED", "{peer} {source} {forwarded}");
    }
}

#[tokio::test]
async fn nonsense_is_denied_and_never_passes() {
    denied(send(PROXY, CheckRequest { attributes: None }).await, Code::Unauthenticated, 401);
    for name in ["a b", "x\n", ""] {
        let headers = [GOOD, (name, "x")];
        let answer = check(PROXY, &Held { verb: "GET", headers: &headers, ..Held::default() }).await;
        denied(answer, Code::InvalidArgument, 400);
    }
    let headers = [GOOD, ("x-forwarded-for", "1.2.3.4\r\n")];
    let answer = check(PROXY, &Held { verb: "GET", headers: &headers, ..Held::default() }).await;
    denied(answer, Code::InvalidArgument, 400);
    let two = [GOOD, GOOD];
    let answer = check(PROXY, &Held { verb: "GET", headers: &two, raw: true, ..Held::default() }).await;
    denied(answer, Code::Unauthenticated, 401);
}

#[tokio::test]
async fn a_question_that_cannot_be_read_is_denied_and_no_error() {
    let mut long = question(&Held { verb: "POST", headers: &[GOOD], ..Held::default() });
    let asked = long.attributes.as_mut().unwrap().request.as_mut().unwrap().http.as_mut().unwrap();
    asked.path = "x".repeat(2 * 1_024 * 1_024);
    let (_, json) = denied(send(PROXY, long).await, Code::OutOfRange, 413);
    assert_eq!(json["error"]["code"], "PB_BODY_TOO_LARGE");

    // The path of the request is no UTF-8: a message whose first field holds what is none of its own.
    let frame = [&[0, 0, 0, 0, 4][..], &[0x0a, 0x02, 0x22, 0xff]].concat();
    let request = Request::builder()
        .method("POST")
        .uri("/envoy.service.auth.v3.Authorization/Check")
        .header("content-type", "application/grpc")
        .body(tonic::body::Body::new(Full::new(Bytes::from(frame))))
        .unwrap();
    let body = gateway().handle(request, PROXY.parse().unwrap()).await.into_body().collect().await.unwrap();
    assert_eq!(body.trailers().unwrap()["grpc-status"], "0");
    let answer = CheckResponse::decode(body.to_bytes().slice(5..)).unwrap();
    denied(answer, Code::InvalidArgument, 400);
}
