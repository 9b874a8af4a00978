//! `/v1/authz`, as proxies ask it.

use paperkey_gateway::Gateway;
use serde_json::json;

use crate::common::{PROXY, STRANGER, Said, ask, gateway};

const GOOD: (&str, &str) = ("authorization", "Bearer pk_live_full");
const READONLY: (&str, &str) = ("authorization", "Bearer pk_live_readonly");

async fn authz(gateway: &Gateway, query: &str, headers: &[(&str, &str)]) -> Said {
    ask(gateway, STRANGER, &format!("GET /v1/authz{query}"), headers, "").await
}

#[tokio::test]
async fn a_good_key_passes_with_its_identity_and_an_empty_body() {
    let gateway = gateway();
    for (name, value) in [GOOD, ("x-api-key", "pk_live_full")] {
        let said = authz(&gateway, "", &[(name, value)]).await;
        assert_eq!((said.status, said.body.len()), (200, 0));
        assert_eq!(said.header("x-paperkey-key"), "key_of_pk_live_full");
        assert_eq!(said.header("x-paperkey-team"), "team_1");
        assert_eq!(said.header("x-paperkey-mode"), "live");
        assert_eq!(said.header("x-paperkey-scopes"), "licenses:read licenses:write products:read");
        assert!(!said.headers.contains_key("x-paperkey-user"));
        assert!(said.header("x-request-id").starts_with("req_"));
        assert_eq!(said.header("cache-control"), "no-store");
    }
    let said = authz(&gateway, "", &[("authorization", "Bearer po_ut_member")]).await;
    assert_eq!((said.status, said.header("x-paperkey-user")), (200, "usr_1"));
    assert_eq!(said.header("x-paperkey-scopes"), "licenses:read products:read");
    let named = [("authorization", "Bearer po_sk_system"), ("paperkey-team", "team_9"), ("paperkey-mode", "test")];
    let said = authz(&gateway, "", &named).await;
    assert_eq!((said.header("x-paperkey-team"), said.header("x-paperkey-mode")), ("team_9", "test"));
    let said = authz(&gateway, "", &named[..1]).await;
    assert_eq!((said.status, said.headers.contains_key("x-paperkey-team")), (200, false));
}

#[tokio::test]
async fn whoever_is_not_known_on_the_platform_surface_is_a_stranger() {
    let gateway = gateway();
    let said = authz(&gateway, "", &[]).await;
    assert_eq!((said.status, said.header("www-authenticate")), (401, "Bearer"));
    assert_eq!(said.code(), "PB_INVALID_API_KEY");
    for credential in ["pk_1", "a.b.c", "pk_live_gone", "pk_live_expired", "nonsense", ""] {
        let said = authz(&gateway, "", &[("authorization", &format!("Bearer {credential}"))]).await;
        assert_eq!((said.status, said.code().as_str()), (401, "PB_INVALID_API_KEY"), "{credential}");
        assert_eq!(said.header("www-authenticate"), "Bearer error=\"invalid_token\"");
        assert!(!said.headers.keys().any(|name| name.as_str().starts_with("x-paperkey-")), "{credential}");
    }
    assert_eq!(authz(&gateway, "", &[GOOD, ("x-api-key", "pk_live_other")]).await.status, 401);
    assert_eq!(authz(&gateway, "", &[GOOD, GOOD]).await.status, 401);
}

#[tokio::test]
async fn a_scope_is_needed_where_one_is_named() {
    let gateway = gateway();
    assert_eq!(authz(&gateway, "?scope=licenses:write", &[GOOD]).await.status, 200);
    assert_eq!(authz(&gateway, "?scope=licenses%3Aread", &[READONLY]).await.status, 200);
    for (scope, credential, code) in [
        ("keys:write", "pk_live_full", "PB_SCOPE_INSUFFICIENT"),
        ("licenses:write", "pk_live_readonly", "PB_SCOPE_INSUFFICIENT"),
        ("licenses:write", "po_ut_member", "PB_ROLE_INSUFFICIENT"),
    ] {
        let query = format!("?scope={scope}");
        let said = authz(&gateway, &query, &[("authorization", &format!("Bearer {credential}"))]).await;
        assert_eq!((said.status, said.code().as_str()), (403, code), "{scope} {credential}");
    }
}

#[tokio::test]
async fn a_question_that_is_not_understood_lets_nobody_pass() {
    let gateway = gateway();
    let said = authz(&gateway, "?meter=moons&costs=2", &[GOOD]).await;
    assert_eq!(said.status, 400);
    assert_eq!(
        said.json()["error"]["details"],
        json!([
            {"field": "meter", "message": "must be a meter that a tier gives a quota of, such as renders"},
            {"field": "costs", "message": "unknown query parameter"},
        ])
    );
    for query in ["?scope=", "?scope=everything", "?scope=a:b&scope=licenses:read", "?deny=1", "?scop=licenses:read"] {
        assert_eq!(authz(&gateway, query, &[GOOD]).await.status, 400, "{query}");
    }
    for path in ["/v1/authz/", "/v1/authz/x", "/v1/AUTHZ", "/v1/%61uthz"] {
        assert_eq!(ask(&gateway, STRANGER, &format!("GET {path}"), &[GOOD], "").await.status, 404, "{path}");
    }
}

#[tokio::test]
async fn nginx_hears_403_for_what_it_could_not_carry() {
    let gateway = gateway();
    let said = authz(&gateway, "?deny=403&meter=x", &[GOOD]).await;
    assert_eq!((said.status, said.header("paperkey-status")), (403, "400"));
    assert_eq!(said.code(), "PB_INVALID_REQUEST");
    let down = [("authorization", "Bearer pk_live_down")];
    let said = authz(&gateway, "", &down).await;
    assert_eq!((said.status, said.header("paperkey-status")), (503, ""));
    let said = authz(&gateway, "?deny=403", &down).await;
    assert_eq!((said.status, said.header("paperkey-status"), said.code().as_str()), (403, "503", "PB_UNAVAILABLE"));
    assert!(!String::from_utf8_lossy(&said.body).contains("hunter2"));
    let said = authz(&gateway, "?deny=403", &[]).await;
    assert_eq!((said.status, said.header("paperkey-status")), (401, ""));
    let said = authz(&gateway, "?deny=403&scope=keys:write", &[GOOD]).await;
    assert_eq!((said.status, said.header("paperkey-status")), (403, ""));
    assert_eq!(authz(&gateway, "?deny=403", &[GOOD]).await.status, 200);
}

#[tokio::test]
async fn the_original_verb_counts_from_a_proxy_that_is_trusted() {
    let gateway = gateway();
    for name in ["x-forwarded-method", "x-original-method"] {
        for (verb, status) in
            [("GET", 200), ("HEAD", 200), ("OPTIONS", 200), ("POST", 403), ("DELETE", 403), ("x", 403)]
        {
            let said = ask(&gateway, PROXY, "GET /v1/authz", &[READONLY, (name, verb)], "").await;
            assert_eq!(said.status, status, "{name} {verb}");
            assert_eq!(ask(&gateway, PROXY, "GET /v1/authz", &[GOOD, (name, verb)], "").await.status, 200);
            let said = authz(&gateway, "", &[READONLY, (name, verb)]).await;
            assert_eq!(said.status, 200, "nobody trustworthy said {verb}");
        }
    }
    let both = [READONLY, ("x-original-method", "POST"), ("x-forwarded-method", "GET")];
    assert_eq!(ask(&gateway, PROXY, "GET /v1/authz", &both, "").await.status, 403);
    // The verb of the question itself says nothing.
    assert_eq!(ask(&gateway, STRANGER, "POST /v1/authz", &[READONLY], "").await.status, 200);
}

#[tokio::test]
async fn a_key_that_is_bound_to_addresses_is_judged_by_the_clients() {
    let gateway = gateway();
    let from = async |peer: &str, forwarded: &str| {
        let mut headers = vec![("authorization", "Bearer pk_live_home")];
        if !forwarded.is_empty() {
            headers.push(("x-forwarded-for", forwarded));
        }
        ask(&gateway, peer, "GET /v1/authz", &headers, "").await
    };
    assert_eq!(from("198.51.100.9:1", "").await.status, 200);
    assert_eq!(from(PROXY, "198.51.100.9").await.status, 200);
    assert_eq!(from(PROXY, "198.51.100.9, 10.0.0.2").await.status, 200);
    // What anyone can write widens nothing, whether there is no proxy, one or two.
    for (peer, forwarded) in [
        (STRANGER, "198.51.100.9"),
        (PROXY, ""),
        (PROXY, "198.51.100.9, 203.0.113.7"),
        (PROXY, "198.51.100.9, 203.0.113.7, 10.0.0.2"),
        (PROXY, "198.51.100.9, nonsense, 10.0.0.2"),
    ] {
        let said = from(peer, forwarded).await;
        assert_eq!((said.status, said.code().as_str()), (403, "PB_IP_NOT_ALLOWED"), "{peer} {forwarded}");
    }
}

#[tokio::test]
async fn every_verb_is_answered_and_no_body_is_read() {
    let gateway = gateway();
    for verb in ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "PROPFIND", "BREW"] {
        let line = format!("{verb} /v1/authz");
        let said = ask(&gateway, STRANGER, &line, &[GOOD], "a body that nobody wants").await;
        assert_eq!((said.status, said.header("connection")), (200, "close"), "{verb}");
        let said = ask(&gateway, STRANGER, &line, &[], "").await;
        assert_eq!((said.status, said.header("connection")), (401, ""), "{verb}");
    }
}

#[tokio::test]
async fn a_key_that_was_rotated_is_told_so_and_problems_name_the_original_path() {
    let gateway = gateway();
    let said = authz(&gateway, "", &[("authorization", "Bearer pk_live_old")]).await;
    assert_eq!((said.status, said.header("paperkey-key-expires").is_empty()), (200, false));
    let headers = [("accept", "application/problem+json"), ("x-forwarded-uri", "/render?size=a4")];
    let said = ask(&gateway, PROXY, "GET /v1/authz", &headers, "").await;
    assert_eq!(
        (said.header("content-type"), &said.json()["instance"]),
        ("application/problem+json", &json!("/render"))
    );
    let said = ask(&gateway, STRANGER, "GET /v1/authz", &headers, "").await;
    assert_eq!(said.json()["instance"], "/v1/authz");
}

#[tokio::test]
async fn the_content_type_of_whoever_is_asked_about_does_not_choose_the_answer() {
    let gateway = gateway();
    for content_type in [
        "application/grpc",
        "application/grpc+proto",
        "application/grpc;x=y",
        "application/grpc-web",
        "application/grpc-web-text",
        "application/grpc-web+json",
        "application/json",
        "nonsense",
    ] {
        for verb in ["GET", "POST", "PUT", "HEAD", "OPTIONS"] {
            let line = format!("{verb} /v1/authz?scope=licenses:read&deny=403");
            let asked = [("content-type", content_type), ("te", "trailers")];
            let said = ask(&gateway, STRANGER, &line, &asked, "").await;
            assert_eq!(said.status, 401, "{verb} {content_type}");
            assert!(!said.headers.contains_key("grpc-status"), "{verb} {content_type}");
            let said = ask(&gateway, STRANGER, &line, &[asked[0], GOOD], "").await;
            assert_eq!(said.status, 200, "{verb} {content_type}");
        }
    }
}
