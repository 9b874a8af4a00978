//! Sessions in cookies: who is given one, where one counts, and from where it must come. The services behind the
//! gateway answer with `new.session.token`, and know nothing of cookies.

use super::*;

const OURS: (&str, &str) = ("origin", "https://keys.example");
const COOKIE: (&str, &str) = ("cookie", "theme=dark; __Host-paperkey=a.b.c");
const STALE: (&str, &str) = ("cookie", "__Host-paperkey=no.longer.good");
const ASKED: (&str, &str) = ("paperkey-session", "cookie");
const GIVEN: &str = "__Host-paperkey=new.session.token; Path=/; HttpOnly; SameSite=Strict; Max-Age=604800; Secure";
const GONE: &str = "__Host-paperkey=; Path=/; HttpOnly; SameSite=Strict; Max-Age=0; Secure";
const LOGIN: &str = r#"{"email": "a@b.cd", "password": "correct horse"}"#;
const NEW_PASSWORD: &str = r#"{"password": "correct horse", "currentPassword": "x"}"#;

/// A request of gRPC-Web, as bytes or as text.
fn framed(message: &impl prost::Message) -> Vec<u8> {
    let mut frame = vec![0];
    frame.extend(u32::try_from(message.encoded_len()).unwrap().to_be_bytes());
    frame.extend(message.encode_to_vec());
    frame
}

impl House {
    async fn web(&self, rpc: &str, message: &impl prost::Message, headers: &[(&str, &str)]) -> Said {
        let mut all = vec![("content-type", "application/grpc-web+proto")];
        all.extend(headers);
        self.ask(&format!("POST /paperkey.{rpc}"), &all, framed(message)).await
    }
}

/// The message of an answer over gRPC-Web, which must be a success.
fn message<M: prost::Message + Default>(said: &Said) -> M {
    let length = usize::try_from(u32::from_be_bytes(said.body[1..5].try_into().unwrap())).unwrap();
    assert!(String::from_utf8_lossy(&said.body[5 + length..]).contains("grpc-status:0"), "{:?}", said.body);
    M::decode(&said.body[5..5 + length]).unwrap()
}

fn login() -> auth::LoginRequest {
    auth::LoginRequest { email: "a@b.cd".into(), password: "correct horse".into() }
}

#[tokio::test]
async fn a_session_is_given_as_a_cookie_to_who_asks_for_it() {
    let house = house();
    for path in ["register", "login"] {
        let said = house.ask(&format!("POST /auth/{path}"), &[ASKED, OURS], LOGIN).await;
        assert!(said.status < 300 && said.header("set-cookie") == GIVEN, "{path}: {:?}", said.headers);
        assert_eq!(said.json()["token"], "", "{path}");
        assert_eq!(said.json()["user"]["id"], "usr_1", "what stands beside it is still there");
        assert!(!said.text().contains("session.token"));
        let said = house.ask(&format!("POST /auth/{path}"), &[OURS], LOGIN).await;
        assert_eq!((said.json()["token"].as_str(), said.header("set-cookie")), (Some("new.session.token"), ""));
    }
    let said = house.ask("PATCH /auth/me", &[ACCOUNT, ASKED, OURS], NEW_PASSWORD).await;
    assert_eq!((said.json()["token"].clone(), said.header("set-cookie")), (Json::Null, GIVEN));
    // Without a new session there is no new cookie.
    let house = self::house();
    let said = house.ask("PATCH /auth/me", &[ACCOUNT, ASKED, OURS], r#"{"name": "Ada"}"#).await;
    assert_eq!((said.status, said.header("set-cookie")), (200, ""));
    let plain = house_with(|config| config.public_url = "http://keys.example:8080".into());
    let said = plain.ask("POST /auth/login", &[ASKED, ("origin", "http://keys.example:8080")], LOGIN).await;
    let expected = "paperkey_session=new.session.token; Path=/; HttpOnly; SameSite=Strict; Max-Age=604800";
    assert_eq!(said.header("set-cookie"), expected);
}

#[tokio::test]
async fn over_grpc_and_its_web_form_the_cookie_stands_in_the_headers() {
    let house = house_with(|config| config.cors_any_origin = true);
    let said = house.web("auth.v1.AuthService/Login", &login(), &[ASKED, OURS]).await;
    assert_eq!(said.header("set-cookie"), GIVEN);
    assert_eq!(said.header("access-control-allow-credentials"), "");
    let answer: auth::LoginResponse = message(&said);
    assert_eq!((answer.token.as_str(), answer.user.unwrap().id.as_str()), ("", "usr_1"));
    let said = house.web("auth.v1.AuthService/Login", &login(), &[OURS]).await;
    assert_eq!(
        (message::<auth::LoginResponse>(&said).token.as_str(), said.header("set-cookie")),
        ("new.session.token", "")
    );

    let text = base64(&framed(&login()));
    let headers = [("content-type", "application/grpc-web-text"), ("accept", "application/grpc-web-text"), ASKED, OURS];
    let said = house.ask("POST /paperkey.auth.v1.AuthService/Login", &headers, text).await;
    assert_eq!((said.status, said.header("set-cookie")), (200, GIVEN));
    assert!(!said.text().contains(&base64(b"new.session.token")[..12]));

    let mut client = auth::auth_service_client::AuthServiceClient::new(Wire(house.gateway.clone()));
    let mut rpc = Rpc::new(login());
    rpc.metadata_mut().insert("paperkey-session", "cookie".parse().unwrap());
    rpc.metadata_mut().insert("origin", "https://keys.example".parse().unwrap());
    let answer = client.login(rpc).await.unwrap();
    assert_eq!(answer.metadata().get("set-cookie").unwrap().to_str().unwrap(), GIVEN);
    assert_eq!(answer.into_inner().token, "");
}

/// The trailers are a part of the body over the web: a server that knew how long the message is would end there.
#[tokio::test]
async fn the_length_of_an_answer_is_not_told_before_its_end() {
    let house = house();
    let mut request = Request::post("/paperkey.auth.v1.AuthService/Login");
    for (name, value) in [("content-type", "application/grpc-web+proto"), ASKED, OURS] {
        request = request.header(name, value);
    }
    let request = request.body(Full::new(Bytes::from(framed(&login())))).unwrap();
    let response = house.gateway.handle(request, PEER.parse().unwrap()).await;
    assert_eq!(http_body::Body::size_hint(response.body()).exact(), None);
    assert!(!response.headers().contains_key("content-length"));
}

fn base64(bytes: &[u8]) -> String {
    use ::base64::Engine as _;
    ::base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[tokio::test]
async fn who_asks_for_a_cookie_must_be_a_page_of_ours_and_nothing_is_done_before() {
    let house = house();
    for origin in [None, Some("null"), Some("https://evil.example"), Some("http://keys.example")] {
        let mut headers = vec![ASKED];
        headers.extend(origin.map(|origin| ("origin", origin)));
        let said = house.ask("POST /auth/login", &headers, LOGIN).await;
        assert_eq!((said.status, said.header("set-cookie")), (403, ""), "{origin:?}");
        assert!(said.json()["message"].as_str().unwrap().contains("https://keys.example"), "{}", said.text());
        let said = house.web("auth.v1.AuthService/Login", &login(), &headers).await;
        assert_eq!((said.header("grpc-status"), said.header("set-cookie")), ("7", ""), "{origin:?}");
    }
    for odd in ["", "Cookie", "yes", "cookie, cookie"] {
        let said = house.ask("POST /auth/login", &[("paperkey-session", odd), OURS], LOGIN).await;
        assert_eq!(
            (said.status, said.json()["details"][0]["field"].as_str()),
            (400, Some("Paperkey-Session")),
            "{odd}"
        );
    }
    assert_eq!(house.ask("POST /auth/login", &[ASKED, ASKED, OURS], LOGIN).await.status, 400);
    assert_eq!(house.calls(), 0);
}

#[tokio::test]
async fn a_call_by_cookie_is_one_by_the_session_in_it() {
    let house = house();
    assert_eq!(house.ask("GET /products/prod_1", &[COOKIE, OURS], "").await.status, 200);
    let (caller, request) = house.last();
    assert_eq!((caller.principal.id.as_str(), caller.principal.kind()), ("a.b.c", Caller::Account));
    assert!(request.contains("prod_1"));
    let named = [COOKIE, OURS, ("paperkey-team", "team_2"), ("paperkey-mode", "test")];
    assert_eq!(house.ask("POST /products", &named, r#"{"name": "App"}"#).await.status, 201);
    let caller = house.last().0.principal;
    assert_eq!((caller.team_id.as_str(), caller.mode()), ("team_2", Mode::Test));
    let wanted = catalog::GetProductRequest { id: "prod_1".into() };
    let said = house.web("catalog.v1.CatalogService/GetProduct", &wanted, &[COOKIE, OURS]).await;
    assert_eq!(message::<catalog::GetProductResponse>(&said).product.unwrap().id, "prod_1");
    let mut client = catalog::catalog_service_client::CatalogServiceClient::new(Wire(house.gateway.clone()));
    let mut rpc = Rpc::new(wanted);
    for (name, value) in [COOKIE, OURS] {
        rpc.metadata_mut().insert(name, value.parse().unwrap());
    }
    assert_eq!(client.get_product(rpc).await.unwrap().into_inner().product.unwrap().id, "prod_1");
}

#[tokio::test]
async fn a_call_by_cookie_from_elsewhere_is_refused_whatever_it_asks() {
    let house = house();
    let wanted = catalog::GetProductRequest { id: "prod_1".into() };
    for origin in [None, Some("null"), Some("https://evil.example"), Some("https://keys.example:8443")] {
        // Whether the session is any good is not told either.
        for cookie in [COOKIE, STALE] {
            let mut headers = vec![cookie];
            headers.extend(origin.map(|origin| ("origin", origin)));
            for (line, body) in [
                ("GET /products", ""),
                ("POST /products", "{"),
                ("DELETE /products/prod_1", ""),
                ("POST /auth/logout", "{}"),
            ] {
                let said = house.ask(line, &headers, body).await;
                assert_eq!((said.status, said.header("set-cookie")), (403, ""), "{line} from {origin:?}");
                assert_eq!(said.json()["error"], "forbidden");
            }
            let said = house.web("catalog.v1.CatalogService/GetProduct", &wanted, &headers).await;
            assert_eq!((said.header("grpc-status"), said.header("set-cookie")), ("7", ""), "{origin:?}");
        }
    }
    assert_eq!(house.calls(), 0);
}

#[tokio::test]
async fn a_credential_of_its_own_counts_before_a_cookie() {
    let house = house();
    // It needs no origin then, and the cookie may be anything.
    for cookie in [COOKIE, STALE, ("cookie", "__Host-paperkey=x; __Host-paperkey=y")] {
        assert_eq!(house.ask("GET /products", &[ACCOUNT, cookie], "").await.status, 200);
        let said = house.ask("GET /products", &[("authorization", "Bearer nope"), cookie, OURS], "").await;
        assert_eq!((said.status, said.header("set-cookie")), (401, ""));
    }
    let said = house.ask("GET /products", &[("authorization", "nonsense"), COOKIE, OURS], "").await;
    assert_eq!(said.status, 401);
}

#[tokio::test]
async fn a_cookie_that_is_no_good_is_refused_and_goes() {
    let house = house();
    for cookie in [
        "__Host-paperkey=no.longer.good",
        "__Host-paperkey=",
        "__Host-paperkey=sk_1",
        "__Host-paperkey=a.b.c; __Host-paperkey=a.b.c",
        "__Host-paperkey=\"a.b.c\"",
    ] {
        let said = house.ask("GET /products", &[("cookie", cookie), OURS], "").await;
        assert_eq!((said.status, said.header("set-cookie")), (401, GONE), "{cookie}");
        assert!(said.header("ratelimit").starts_with("\"refused_credentials\""), "{cookie}: {:?}", said.headers);
        let said = house
            .web(
                "catalog.v1.CatalogService/ListProducts",
                &catalog::ListProductsRequest::default(),
                &[("cookie", cookie), OURS],
            )
            .await;
        assert_eq!((said.header("grpc-status"), said.header("set-cookie")), ("16", GONE), "{cookie}");
    }
    // It keeps nobody from signing in.
    let said = house.ask("POST /auth/login", &[STALE, ASKED, OURS], LOGIN).await;
    assert_eq!((said.status, said.header("set-cookie")), (200, GIVEN));
    assert_eq!(house.ask("POST /auth/login", &[STALE], LOGIN).await.status, 200);
}

#[tokio::test]
async fn what_ends_sessions_takes_the_cookie_away() {
    let house = house();
    let said = house.ask("POST /auth/logout", &[COOKIE, OURS], "{}").await;
    assert_eq!((said.status, said.header("set-cookie")), (200, GONE));
    let said = house.web("auth.v1.AuthService/Logout", &auth::LogoutRequest {}, &[COOKIE, OURS]).await;
    message::<auth::LogoutResponse>(&said);
    assert_eq!(said.header("set-cookie"), GONE);
    assert_eq!(house.ask("POST /auth/logout", &[ACCOUNT, STALE, OURS], "{}").await.header("set-cookie"), GONE);
    assert_eq!(house.ask("POST /auth/logout", &[ACCOUNT], "{}").await.header("set-cookie"), "");
    let reset = r#"{"token": "good", "password": "correct horse"}"#;
    assert_eq!(house.ask("POST /auth/password/reset", &[STALE, OURS], reset).await.header("set-cookie"), GONE);
    let said = house.ask("POST /auth/password/reset", &[STALE, ("origin", "https://evil.example")], reset).await;
    assert_eq!((said.status, said.header("set-cookie")), (200, ""));
    // What fails ends nothing.
    let reset = r#"{"token": "used", "password": "correct horse"}"#;
    let said = house.ask("POST /auth/password/reset", &[COOKIE, OURS], reset).await;
    assert_eq!((said.status, said.header("set-cookie")), (404, ""));
    let reset = auth::ResetPasswordRequest { token: "used".into(), password: "correct horse".into() };
    let said = house.web("auth.v1.AuthService/ResetPassword", &reset, &[COOKIE, OURS]).await;
    assert_eq!((said.header("grpc-status"), said.header("set-cookie")), ("5", ""));
}

#[tokio::test]
async fn who_came_by_cookie_is_given_a_new_session_as_one_too() {
    let house = house();
    let said = house.ask("PATCH /auth/me", &[COOKIE, OURS], NEW_PASSWORD).await;
    assert_eq!((said.status, said.json()["token"].clone(), said.header("set-cookie")), (200, Json::Null, GIVEN));
    let change = auth::UpdateMeRequest {
        password: Some("correct horse".into()),
        update_mask: Some(prost_types::FieldMask { paths: vec!["password".into()] }),
        ..Default::default()
    };
    let said = house.web("auth.v1.AuthService/UpdateMe", &change, &[COOKIE, OURS]).await;
    assert_eq!((message::<auth::UpdateMeResponse>(&said).token, said.header("set-cookie")), (None, GIVEN));
}

#[tokio::test]
async fn where_people_are_not_served_a_cookie_is_not_looked_at() {
    let house = house();
    let odd = ("cookie", "__Host-paperkey=x; __Host-paperkey=y");
    for cookie in [COOKIE, STALE, odd] {
        for headers in [vec![cookie], vec![cookie, OURS], vec![cookie, ("origin", "https://evil.example")]] {
            for line in ["GET /api/v1/products", "GET /v1/keys", "GET /v1/authz", "GET /api/v1/me"] {
                let said = house.ask(line, &headers, "").await;
                assert_eq!((said.status, said.header("set-cookie")), (401, ""), "{line}");
                assert_eq!(said.header("www-authenticate"), "Bearer", "{line}: nothing was sent that counts");
            }
            let said = house.ask("GET /v1/status", &headers, "").await;
            assert_eq!((said.status, said.json()["caller"].clone()), (200, Json::Null));
            let said = house.web("auth.v1.StatusService/GetStatus", &auth::GetStatusRequest {}, &headers).await;
            assert_eq!(message::<auth::GetStatusResponse>(&said).caller, None);
            let mut with_key = headers.clone();
            with_key.push(TEAM_KEY);
            assert_eq!(house.ask("GET /api/v1/products", &with_key, "").await.status, 200);
            assert_eq!(house.ask("POST /v1/licenses/validate", &headers, "{}").await.status, 401);
        }
    }
}

#[tokio::test]
async fn without_a_configured_url_pages_of_the_host_called_are_ours() {
    let house = house_with(|config| {
        config.public_url = "http://127.0.0.1:8080".into();
        config.public_url_is_configured = false;
    });
    let cookie = ("cookie", "paperkey_session=a.b.c");
    for (host, origin, status) in [
        ("localhost:8080", "http://localhost:8080", 200),
        ("127.0.0.1:8080", "http://127.0.0.1:8080", 200),
        ("localhost:8080", "http://localhost:3000", 403),
        ("localhost:8080", "http://127.0.0.1:8080", 403),
        ("localhost:8080", "https://localhost:8080", 403),
        ("localhost:8080", "null", 403),
    ] {
        let said = house.ask("GET /products", &[("host", host), ("origin", origin), cookie], "").await;
        assert_eq!(said.status, status, "{host} from {origin}");
    }
    let said = house.ask("POST /auth/login", &[("host", "evil.example"), OURS, ASKED], LOGIN).await;
    assert!(said.json()["message"].as_str().unwrap().contains("http://evil.example"), "{}", said.text());
    assert!(said.json()["message"].as_str().unwrap().contains("server.public_url"), "{}", said.text());
}
