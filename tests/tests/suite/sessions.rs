//! Sessions in cookies, as a page in a browser has them: given instead of shown, good on pages of our own, gone at the
//! end.

use paperkey_proto::{
    auth::v1::{
        CreateApiKeyRequest, GetMeRequest, GetMeResponse, LoginRequest, LoginResponse, LogoutRequest, LogoutResponse,
        RegisterRequest, RegisterResponse, UpdateMeRequest, UpdateMeResponse,
    },
    catalog::v1::{GetProductRequest, ListProductsRequest, ListProductsResponse},
    errors::v1::Reason,
    webhook::v1::{WatchEventsRequest, webhook_service_client::WebhookServiceClient},
};
use paperkey_tests::{
    Account, Api, Installation, Settings, eventually, grpc, on_both_kinds, on_both_kinds_with,
    people::{Cookie, new_email, text},
    wait::GENEROUS,
};
use serde_json::{Value, json};
use tonic::{Code, Request};

on_both_kinds! {
    a_browser_is_given_a_cookie_and_no_script_sees_the_session,
    a_page_does_over_grpc_web_what_people_may_do,
    a_cookie_counts_on_pages_of_our_own_only,
    signing_out_ends_the_session_and_takes_the_cookie_away,
    a_new_password_gives_a_new_cookie_and_ends_the_others,
    a_stale_cookie_keeps_nobody_from_signing_in,
    a_cookie_means_nothing_where_keys_are_asked_for,
    a_cookie_of_one_team_opens_no_other,
    a_repetition_from_a_page_takes_effect_once,
    what_is_watched_by_cookie_ends_with_the_session,
}

const AUTH: &str = "/paperkey.auth.v1.AuthService";
const PRODUCTS: &str = "/paperkey.catalog.v1.CatalogService/ListProducts";

/// The origin of the pages of an installation that nobody has configured a URL for: that of the host called.
fn origin(install: &Installation) -> String {
    install.url()
}

/// A page in a browser without a cookie.
fn fresh_page(install: &Installation) -> Api {
    install.api().with("origin", &origin(install)).with("paperkey-session", "cookie")
}

/// The page of somebody who signs in.
async fn sign_in(install: &Installation, account: &Account) -> (Cookie, Api) {
    let asked = json!({"email": account.email, "password": account.password});
    let answer = fresh_page(install).post("/auth/login", asked).await;
    assert_eq!(answer.gives(200)["token"], "");
    let cookie = Cookie::set_by(&answer.headers).expect("a cookie is given");
    let page = cookie.page(&install.api(), &origin(install));
    (cookie, page)
}

#[track_caller]
fn is_a_session(cookie: &Cookie, secure: bool) {
    assert_eq!(cookie.name, if secure { "__Host-paperkey" } else { "paperkey_session" });
    assert_eq!(cookie.value.split('.').count(), 3, "a JWT");
    for attribute in ["Path=/", "HttpOnly", "SameSite=Strict"] {
        assert!(cookie.attributes.iter().any(|has| has == attribute), "{attribute}: {cookie:?}");
    }
    assert_eq!(cookie.attributes.iter().any(|attribute| attribute == "Secure"), secure, "{cookie:?}");
    assert!(!cookie.attributes.iter().any(|attribute| attribute.starts_with("Domain")), "{cookie:?}");
    let max_age: i64 = cookie.attribute("Max-Age").and_then(|text| text.parse().ok()).expect("it ends by itself");
    assert!((604_000..=604_800).contains(&max_age), "{cookie:?}");
}

#[track_caller]
fn is_gone(headers: &http::HeaderMap) {
    let cookie = Cookie::set_by(headers).expect("the cookie is taken away");
    assert_eq!((cookie.value.as_str(), cookie.attribute("Max-Age")), ("", Some("0")), "{cookie:?}");
}

/// Other processes than the one that ended a session know of it within a second.
async fn has_ended(page: &Api) {
    eventually("the session has ended", || async { (page.get("/auth/me").await.status == 401).then_some(()) }).await;
}

async fn a_browser_is_given_a_cookie_and_no_script_sees_the_session(install: Installation) {
    let page = fresh_page(&install);
    let (email, password) = (new_email(), "correct horse battery");
    let answer = page.post("/auth/register", json!({"email": email, "password": password})).await;
    let shown = answer.gives(201);
    assert_eq!(shown["token"], "");
    assert!(text(shown, "/liveKey").starts_with("pb_live_"), "keys are shown, once");
    let cookie = Cookie::set_by(&answer.headers).unwrap();
    is_a_session(&cookie, false);
    assert!(!answer.text().contains(&cookie.value));
    let me = cookie.page(&install.api(), &origin(&install)).get("/auth/me").await;
    assert_eq!((&me.gives(200)["user"]["email"], Cookie::set_by(&me.headers).is_none()), (&json!(email), true));

    for as_text in [false, true] {
        let asked = LoginRequest { email: email.clone(), password: password.into() };
        let answer = grpc::web_call(&page, &format!("{AUTH}/Login"), &asked, as_text).await;
        let cookie = Cookie::set_by(&answer.headers).unwrap();
        is_a_session(&cookie, false);
        let shown: LoginResponse = answer.gives();
        assert_eq!((shown.token.as_str(), shown.user.unwrap().email), ("", email.clone()));
        let page = cookie.page(&install.api(), &origin(&install));
        let me: GetMeResponse =
            grpc::web_call(&page, &format!("{AUTH}/GetMe"), &GetMeRequest {}, as_text).await.gives();
        assert_eq!(me.teams.len(), 1);
    }
    let asked = RegisterRequest { email: new_email(), password: password.into(), name: None };
    let answer = grpc::web_call(&page, &format!("{AUTH}/Register"), &asked, false).await;
    is_a_session(&Cookie::set_by(&answer.headers).unwrap(), false);
    let shown: RegisterResponse = answer.gives();
    assert!(shown.token.is_empty() && shown.live_key.starts_with("pb_live_"));

    // Who does not ask is answered as ever, and who asks for something else is told.
    let plain = install.api().post("/auth/login", json!({"email": email, "password": password})).await;
    assert!(!text(plain.gives(200), "/token").is_empty() && Cookie::set_by(&plain.headers).is_none());
    let odd = install.api().with("origin", &origin(&install)).with("paperkey-session", "jar");
    odd.post("/auth/login", json!({"email": email, "password": password})).await.refused_for("Paperkey-Session");
    // A refused sign-in gives nothing.
    let refused = page.post("/auth/login", json!({"email": email, "password": "wrong horse"})).await;
    refused.refused(Reason::InvalidCredentials);
    assert!(Cookie::set_by(&refused.headers).is_none());
}

async fn a_page_does_over_grpc_web_what_people_may_do(install: Installation) {
    let owner = install.register().await;
    let (_, page) = sign_in(&install, &owner).await;
    let product = page.post("/products", json!({"name": "App"})).await;
    let id = text(product.gives(201), "/id");
    let list: ListProductsResponse =
        grpc::web_call(&page, PRODUCTS, &ListProductsRequest::default(), false).await.gives();
    assert_eq!(list.products.iter().map(|product| product.id.clone()).collect::<Vec<_>>(), std::slice::from_ref(&id));
    page.patch(&format!("/products/{id}"), json!({"name": "Other"})).await.gives(200);
    page.delete(&format!("/products/{id}")).await.gives(204);
    let none: ListProductsResponse =
        grpc::web_call(&page.in_test_mode(), PRODUCTS, &ListProductsRequest::default(), true).await.gives();
    assert!(none.products.is_empty());
    // Over gRPC proper it is the same.
    let channel = grpc::connect(&install.url()).await;
    let (cookie, _) = sign_in(&install, &owner).await;
    let metadata = |origin: &str| {
        let value = |text: &str| http::HeaderValue::from_str(text).unwrap();
        let pair = format!("{}={}", cookie.name, cookie.value);
        http::HeaderMap::from_iter([(http::header::COOKIE, value(&pair)), (http::header::ORIGIN, value(origin))])
    };
    grpc::call(&channel, PRODUCTS, bytes::Bytes::new(), metadata(&origin(&install))).await.unwrap();
    let foreign = grpc::call(&channel, PRODUCTS, bytes::Bytes::new(), metadata("https://evil.example")).await;
    grpc::refused(foreign, Reason::ScopeInsufficient);
}

async fn a_cookie_counts_on_pages_of_our_own_only(install: Installation) {
    let owner = install.register().await;
    let (cookie, _) = sign_in(&install, &owner).await;
    let ours = origin(&install);
    let pair = format!("{}={}", cookie.name, cookie.value);
    let port = ours.rsplit(':').next().unwrap();
    let foreign = [
        None,
        Some("null".to_owned()),
        Some("https://evil.example".to_owned()),
        Some(ours.replace("http://", "https://")),
        Some(ours.replace("http://", "HTTP://")),
        Some(format!("{ours}/")),
        Some(format!("{ours}/app/")),
        Some("http://127.0.0.1".to_owned()),
        Some(format!("http://127.0.0.1:1{port}")),
        Some(format!("http://localhost:{port}")),
        Some(format!("http://127.0.0.1.evil.example:{port}")),
    ];
    for from in &foreign {
        let page = from.iter().fold(install.api().with("cookie", &pair), |api, origin| api.with("origin", origin));
        for answer in [page.get("/products").await, page.post("/products", json!({"name": "App"})).await] {
            answer.refused(Reason::ScopeInsufficient);
            assert!(answer.text().contains(&ours), "it says where from: {}", answer.text());
            assert!(Cookie::set_by(&answer.headers).is_none(), "{from:?}");
        }
        let web = grpc::web_call(&page, PRODUCTS, &ListProductsRequest::default(), false).await;
        assert_eq!((web.status, Cookie::set_by(&web.headers).is_none()), (Code::PermissionDenied, true), "{from:?}");
        // And nobody is signed in from there.
        let asked = json!({"email": owner.email, "password": owner.password});
        let answer = page.with("paperkey-session", "cookie").post("/auth/login", asked).await;
        answer.refused(Reason::ScopeInsufficient);
        assert!(Cookie::set_by(&answer.headers).is_none(), "{from:?}");
    }
    assert_eq!(owner.get("/products").await.gives(200)["products"], json!([]), "nothing was made");
    // A credential of its own needs no origin, and counts before the cookie.
    let other = install.register().await;
    let both = other.with("cookie", &pair).with("origin", "https://evil.example");
    assert_eq!(both.get("/auth/me").await.gives(200)["user"]["email"], other.email.as_str());
    let bad = install.api().with_key("nonsense").with("cookie", &pair).with("origin", &ours);
    bad.get("/auth/me").await.refused(Reason::InvalidCredentials);
    // Two cookies are as good as none.
    let two = install.api().with("cookie", &format!("{pair}; {pair}")).with("origin", &ours);
    two.get("/auth/me").await.refused(Reason::InvalidCredentials);
}

async fn signing_out_ends_the_session_and_takes_the_cookie_away(install: Installation) {
    let owner = install.register().await;
    let (_, one) = sign_in(&install, &owner).await;
    let (_, other) = sign_in(&install, &owner).await;
    let answer = grpc::web_call(&one, &format!("{AUTH}/Logout"), &LogoutRequest {}, false).await;
    let _: LogoutResponse = answer.gives();
    is_gone(&answer.headers);
    // Everywhere, and a browser that did not know throws its cookie away as well.
    for page in [&one, &other, &*owner] {
        has_ended(page).await;
    }
    for page in [&one, &other] {
        let answer = page.get("/auth/me").await;
        answer.refused(Reason::InvalidCredentials);
        is_gone(&answer.headers);
        let web = grpc::web_call(page, PRODUCTS, &ListProductsRequest::default(), true).await;
        assert_eq!(web.status, Code::Unauthenticated);
        is_gone(&web.headers);
    }
    let (_, again) = sign_in(&install, &owner).await;
    let answer = again.post("/auth/logout", json!({})).await;
    answer.gives(200);
    is_gone(&answer.headers);
}

async fn a_new_password_gives_a_new_cookie_and_ends_the_others(install: Installation) {
    let owner = install.register().await;
    let (_, one) = sign_in(&install, &owner).await;
    let (_, other) = sign_in(&install, &owner).await;
    // Without having been asked for: who came by cookie is not shown a session.
    let change = |password: &str, current: &str| UpdateMeRequest {
        password: Some(password.into()),
        current_password: Some(current.into()),
        update_mask: Some(prost_types::FieldMask { paths: vec!["password".into(), "current_password".into()] }),
        ..UpdateMeRequest::default()
    };
    let asked = change("another horse", &owner.password);
    let answer = grpc::web_call(&one, &format!("{AUTH}/UpdateMe"), &asked, false).await;
    assert_eq!(answer.gives::<UpdateMeResponse>().token, None);
    let cookie = Cookie::set_by(&answer.headers).unwrap();
    is_a_session(&cookie, false);
    for page in [one, other] {
        has_ended(&page).await;
    }
    let page = cookie.page(&install.api(), &origin(&install));
    let changed = json!({"password": "a third horse", "currentPassword": "another horse"});
    let answer = page.patch("/auth/me", changed).await;
    assert_eq!(answer.gives(200)["token"], Value::Null);
    let cookie = Cookie::set_by(&answer.headers).unwrap();
    let page = cookie.page(&install.api(), &origin(&install));
    let renamed = page.patch("/auth/me", json!({"name": "Ada"})).await;
    assert_eq!((&renamed.gives(200)["token"], Cookie::set_by(&renamed.headers).is_none()), (&Value::Null, true));
}

async fn a_stale_cookie_keeps_nobody_from_signing_in(install: Installation) {
    let owner = install.register().await;
    let (_, page) = sign_in(&install, &owner).await;
    page.post("/auth/logout", json!({})).await.gives(200);
    let asked = json!({"email": owner.email, "password": owner.password});
    let answer = page.with("paperkey-session", "cookie").post("/auth/login", asked.clone()).await;
    assert_eq!(answer.gives(200)["token"], "");
    is_a_session(&Cookie::set_by(&answer.headers).unwrap(), false);
    page.post("/auth/login", asked).await.gives(200);
    page.post("/auth/password/forgot", json!({"email": owner.email})).await.gives(200);
}

async fn a_cookie_means_nothing_where_keys_are_asked_for(install: Installation) {
    let owner = install.register().await;
    let (_, page) = sign_in(&install, &owner).await;
    for path in ["/api/v1/me", "/api/v1/products", "/v1/keys", "/v1/usage", "/v1/authz"] {
        let answer = page.get(path).await;
        answer.refused(Reason::InvalidCredentials);
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"), "{path}: as if nothing had been sent");
        assert!(Cookie::set_by(&answer.headers).is_none(), "{path}");
    }
    page.post("/v1/licenses/validate", json!({})).await.refused(Reason::InvalidCredentials);
    assert_eq!(page.get("/v1/status").await.gives(200)["caller"], Value::Null);
    // Also where the cookie has a key in it.
    let key = install.api().with("origin", &origin(&install));
    let key = key.with("cookie", &format!("paperkey_session={}", owner.live_key));
    for path in ["/api/v1/me", "/auth/me", "/products"] {
        key.get(path).await.refused(Reason::InvalidCredentials);
    }
}

async fn a_cookie_of_one_team_opens_no_other(install: Installation) {
    let (owner, stranger) = (install.register().await, install.register().await);
    let product = owner.create_product("App").await;
    let (_, page) = sign_in(&install, &stranger).await;
    page.get(&format!("/products/{}", product.id)).await.refused(Reason::NotFound);
    page.get(&format!("/teams/{}/api-keys", owner.team_id)).await.refused(Reason::NotFound);
    page.for_team(&owner.team_id).get("/products").await.refused(Reason::NotFound);
    let wanted = GetProductRequest { id: product.id.clone() };
    let rpc = "/paperkey.catalog.v1.CatalogService/GetProduct";
    for page in [page.clone(), page.for_team(&owner.team_id)] {
        assert_eq!(grpc::web_call(&page, rpc, &wanted, false).await.status, Code::NotFound);
    }
    // Nor more than its role in its own.
    let member = owner.team_mate(&install, "member").await;
    let (_, page) = sign_in(&install, &member).await;
    let page = page.for_team(&owner.team_id);
    page.get(&format!("/products/{}", product.id)).await.gives(200);
    page.post("/products", json!({"name": "Mine"})).await.refused(Reason::RoleInsufficient);
    let asked = CreateApiKeyRequest { team_id: owner.team_id.clone(), name: "Mine".into(), ..Default::default() };
    let made = grpc::web_call(&page, "/paperkey.auth.v1.ApiKeyService/CreateApiKey", &asked, false).await;
    assert_eq!(made.status, Code::PermissionDenied);
}

async fn a_repetition_from_a_page_takes_effect_once(install: Installation) {
    let owner = install.register().await;
    let (cookie, page) = sign_in(&install, &owner).await;
    let create = async |api: &Api| api.with("idempotency-key", "key-1").post("/products", json!({"name": "App"})).await;
    let first = create(&page).await;
    let again = create(&page).await;
    assert_eq!((first.gives(201), again.header("idempotent-replayed")), (again.gives(201), Some("true")));
    // It is the session that repeats itself, however it is carried.
    let bearer = create(&install.api().as_account(&cookie.value)).await;
    assert_eq!((bearer.gives(201), bearer.header("idempotent-replayed")), (first.gives(201), Some("true")));
    let (_, other) = sign_in(&install, &owner).await;
    let other = create(&other).await;
    assert_eq!(other.header("idempotent-replayed"), None, "another session knows nothing of it");
    assert_ne!(other.gives(201)["id"], first.gives(201)["id"]);
}

async fn what_is_watched_by_cookie_ends_with_the_session(install: Installation) {
    let owner = install.register().await;
    let mate = owner.team_mate(&install, "manager").await;
    let product = owner.create_product("App").await;
    let path = format!("/products/{}/events", product.id);
    let member = format!("/teams/{}/members/{}", owner.team_id, mate.user_id);
    for ends in ["role", "membership", "session"] {
        let who = if ends == "session" { &owner } else { &mate };
        let (cookie, page) = sign_in(&install, who).await;
        let page = page.for_team(&owner.team_id);
        let mut lines = page.lines(&path).await;
        assert!(lines.head.status == 200 && lines.next().await.unwrap().is_some(), "{ends}: {:?}", lines.head);
        let channel = grpc::connect_without_limit(&install.url()).await;
        let mut asked = Request::new(WatchEventsRequest { product_id: product.id.clone(), ..Default::default() });
        let pair = format!("{}={}", cookie.name, cookie.value);
        let metadata = [("cookie", pair), ("origin", origin(&install)), ("paperkey-team", owner.team_id.clone())];
        for (name, value) in metadata {
            asked.metadata_mut().insert(name, value.parse().unwrap());
        }
        let mut watch = WebhookServiceClient::new(channel).watch_events(asked).await.unwrap().into_inner();
        watch.message().await.unwrap();
        match ends {
            "role" => drop(owner.patch(&member, json!({"role": "member"})).await.gives(200)),
            "membership" => drop(owner.delete(&member).await.gives(204)),
            _ => drop(page.post("/auth/logout", json!({})).await.gives(200)),
        }
        let end = loop {
            match tokio::time::timeout(GENEROUS, watch.message()).await.expect("it ends") {
                Ok(message) => assert!(message.is_some(), "{ends}: it ends with a reason"),
                Err(status) => break status,
            }
        };
        let expected = match ends {
            "role" => Code::Unavailable,
            "membership" => Code::NotFound,
            _ => Code::Unauthenticated,
        };
        assert_eq!(end.code(), expected, "{ends}: {end:?}");
        while let Ok(line) = lines.next().await {
            assert!(line.is_some(), "{ends}: it breaks off");
        }
    }
}

/// Where the URL of the pages is configured, it alone counts; and under https a cookie is bound to the host.
mod configured {
    use super::*;

    on_both_kinds_with! {
        settings;
        a_cookie_is_bound_to_the_configured_url,
    }

    const OURS: &str = "https://keys.example:8443";

    fn settings() -> Settings {
        let url = ("PAPERKEY__SERVER__PUBLIC_URL", OURS.to_owned());
        Settings { environment: vec![url, ("PAPERKEY__SERVER__CORS_ANY_ORIGIN", "true".into())], ..Settings::default() }
    }

    async fn a_cookie_is_bound_to_the_configured_url(install: Installation) {
        let owner = install.register().await;
        let asked = json!({"email": owner.email, "password": owner.password});
        let page = install.api().with("origin", OURS).with("paperkey-session", "cookie");
        let answer = page.post("/auth/login", asked.clone()).await;
        assert_eq!(answer.gives(200)["token"], "");
        let cookie = Cookie::set_by(&answer.headers).unwrap();
        is_a_session(&cookie, true);
        cookie.page(&install.api(), OURS).get("/auth/me").await.gives(200);
        for foreign in [origin(&install), "https://keys.example".into(), "http://keys.example:8443".into()] {
            let elsewhere = cookie.page(&install.api(), &foreign);
            let refused = elsewhere.get("/auth/me").await;
            refused.refused(Reason::ScopeInsufficient);
            assert!(refused.text().contains(OURS) && refused.header("access-control-allow-origin").is_none());
            let answer = elsewhere.with("paperkey-session", "cookie").post("/auth/login", asked.clone()).await;
            answer.refused(Reason::ScopeInsufficient);
            // Browsers of any origin may call by gRPC-Web here, and never with cookies.
            let web = grpc::web_call(&elsewhere, &format!("{AUTH}/GetMe"), &GetMeRequest {}, false).await;
            assert_eq!((web.status, Cookie::set_by(&web.headers).is_none()), (Code::PermissionDenied, true));
            assert!(!web.headers.contains_key("access-control-allow-credentials"));
        }
        let preflight = install.api().with("origin", "https://evil.example");
        let preflight = preflight.with("access-control-request-method", "POST");
        let leave = preflight.call(http::Method::OPTIONS, &format!("{AUTH}/Login"), None).await;
        assert_eq!((leave.status.as_u16(), leave.header("access-control-allow-credentials")), (204, None));
    }
}
