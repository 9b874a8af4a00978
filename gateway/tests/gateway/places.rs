//! A gateway with more to do than it may: who is told to come back, and who is not.

use std::{convert::Infallible, time::Duration};

use futures_util::FutureExt as _;
use paperkey_kit::shed::{Errand, Load, Place};
use tonic::Code;
use tonic_types::StatusExt as _;

use super::*;

/// A gateway with one place, which somebody has.
fn full_house() -> (House, Places, Place) {
    let places = Places::new(1);
    let taken = places.take(Errand::Call).unwrap();
    (house_of_places(Some(places.clone()), |_| {}), places, taken)
}

#[tokio::test]
async fn who_finds_no_place_is_told_at_once_when_to_come_back_in_the_words_of_the_surface() {
    let (house, places, taken) = full_house();
    for (line, headers, code) in [
        ("GET /products", [ACCOUNT], "/error"),
        ("GET /v1/status", [TEAM_KEY], "/error/code"),
        ("POST /v1/licenses/validate", [("x-api-key", "pk_1")], "/error"),
        ("GET /v1/nowhere", [TEAM_KEY], "/error/code"),
        ("PUT /products", [ACCOUNT], "/error"),
    ] {
        let said = house.ask(line, &headers, "").await;
        assert_eq!((said.status, said.header("retry-after")), (503, "1"), "{line}: {}", said.text());
        let told = said.json();
        let told = told.pointer(code).and_then(Json::as_str).unwrap_or_default();
        assert!(matches!(told, "unavailable" | "PB_UNAVAILABLE"), "{line}: {}", said.text());
        assert!(!said.header("x-ratelimit-limit").is_empty() || line.ends_with("nowhere") || line.starts_with("PUT"));
    }
    assert_eq!(house.calls(), 0);
    assert_eq!(places.load(), Load { most: 1, calls: 1, shed_calls: 5, ..Load::default() });
    drop(taken);
    assert_eq!(house.ask("GET /v1/status", &[TEAM_KEY], "").await.status, 200);
    assert_eq!(places.load().calls, 0, "the place comes back with the answer");
}

#[tokio::test]
async fn over_grpc_they_are_told_by_retry_info() {
    let (house, _, _taken) = full_house();
    let path = "POST /paperkey.catalog.v1.CatalogService/ListProducts";
    let said = house.ask(path, &[("content-type", "application/grpc"), ACCOUNT], vec![0; 5]).await;
    let status = tonic::Status::from_header_map(&said.headers).unwrap();
    assert_eq!(status.code(), Code::Unavailable);
    let delay = status.get_error_details().retry_info().and_then(|info| info.retry_delay);
    assert_eq!(delay, Some(Duration::from_secs(1)));
}

#[tokio::test]
async fn pages_and_health_need_no_place() {
    let (house, _, _taken) = full_house();
    assert_eq!(house.ask("GET /docs/errors/", &[], "").await.status, 200);
    let check = "POST /grpc.health.v1.Health/Check";
    let said = house.ask(check, &[("content-type", "application/grpc")], vec![0; 5]).await;
    assert_eq!((said.status, said.header("grpc-status")), (200, ""));
}

/// Somebody who has begun to send, and does not go on.
fn slow_sender(
    path: &str,
    headers: &[(&str, &str)],
) -> Request<impl http_body::Body<Data = Bytes, Error = Infallible> + use<>> {
    let unsent =
        http_body_util::StreamBody::new(futures_util::stream::pending::<Result<http_body::Frame<Bytes>, Infallible>>());
    let request = headers.iter().fold(Request::post(path), |request, (name, value)| request.header(*name, *value));
    request.body(unsent).unwrap()
}

#[tokio::test]
async fn who_sends_slowly_has_no_place_and_one_network_is_not_all_that_is_waited_for() {
    let list = "/paperkey.catalog.v1.CatalogService/ListProducts";
    for (path, headers) in [
        ("/v1/licenses/validate", [("x-api-key", "pk_1"), ("content-type", "application/json")]),
        (list, [ACCOUNT, ("content-type", "application/grpc")]),
    ] {
        let places = Places::new(1);
        let house = house_of_places(Some(places.clone()), |_| {});
        let ask = |peer: &str| Box::pin(house.gateway.handle(slow_sender(path, &headers), peer.parse().unwrap()));
        let mut waiting = ask(PEER);
        assert!((&mut waiting).now_or_never().is_none());
        assert_eq!(places.load().calls, 0);
        assert_eq!(house.ask("GET /v1/status", &[TEAM_KEY], "").await.status, 200);
        let refused = ask(PEER).now_or_never().expect("it is refused at once");
        if path == list {
            let status = tonic::Status::from_header_map(refused.headers()).unwrap();
            assert_eq!(status.code(), Code::Unavailable);
        } else {
            assert_eq!(refused.status(), 503);
            assert_eq!(refused.headers()["connection"], "close");
            assert_eq!(refused.headers()["retry-after"], "1");
        }
        let mut other = ask("198.51.100.1:9");
        assert!((&mut other).now_or_never().is_none());
        // Who goes away is waited for no longer.
        drop(waiting);
        assert!((&mut ask(PEER)).now_or_never().is_none());
    }
}

#[tokio::test]
async fn calls_of_a_service_that_hangs_leave_places_for_the_others() {
    let places = Places::new(2);
    let house = house_of_places(Some(places.clone()), |_| {});
    let hung = places.take_towards(Errand::Call, Some("catalog")).unwrap();
    let said = house.ask("GET /products", &[ACCOUNT], "").await;
    assert_eq!((said.status, said.header("retry-after")), (503, "1"));
    assert_eq!(house.ask("GET /v1/status", &[TEAM_KEY], "").await.status, 200);
    drop(hung);
    assert_eq!(house.ask("GET /products", &[ACCOUNT], "").await.status, 200);
}

#[tokio::test]
async fn who_leaves_no_time_for_an_answer_costs_no_service_anything() {
    let house = house();
    let path = "POST /paperkey.catalog.v1.CatalogService/ListProducts";
    for timeout in ["1n", "9m"] {
        let headers = [("content-type", "application/grpc"), ACCOUNT, ("grpc-timeout", timeout)];
        let said = house.ask(path, &headers, vec![0; 5]).await;
        let status = tonic::Status::from_header_map(&said.headers).unwrap();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{timeout}");
    }
    assert_eq!(house.calls(), 0);
}
