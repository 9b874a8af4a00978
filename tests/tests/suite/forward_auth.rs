//! nginx and Caddy before somebody's own API, with the examples of `deploy/examples` and the real product as the judge.

use http::Method;
use paperkey_tests::{Account, Api, Echo, Installation, Proxy, Settings, echo::Fixed, people::text, proxy::Kind};
use serde_json::{Value, json};

/// Makes tests with both proxies out of async functions that take what stands around one: `nginx::name`, `caddy::name`.
macro_rules! with_both_proxies {
    ($($scenario:ident),+ $(,)?) => {
        mod nginx {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $scenario() {
                    if let Some(site) = super::Site::start(super::Kind::Nginx).await {
                        super::$scenario(site).await;
                    }
                }
            )+
        }

        mod caddy {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $scenario() {
                    if let Some(site) = super::Site::start(super::Kind::Caddy).await {
                        super::$scenario(site).await;
                    }
                }
            )+
        }
    };
}

with_both_proxies! {
    who_calls_is_known_behind_the_proxy_and_cannot_be_forged,
    nobody_passes_without_a_good_key_and_the_scope,
    nobody_passes_while_the_product_is_away,
    a_revoked_key_is_turned_away,
    no_content_type_opens_the_door,
    nobody_strips_their_own_identity,
    a_read_only_key_only_reads,
    an_allowlist_counts_the_client_and_not_the_proxy,
}

/// A proxy, what is behind it, and who judges.
struct Site {
    kind: Kind,
    install: Installation,
    owner: Account,
    backend: Echo,
    proxy: Proxy,
}

impl Site {
    async fn start(kind: Kind) -> Option<Self> {
        let trusted = ("PAPERKEY__SERVER__TRUSTED_PROXIES", "[\"127.0.0.1/32\"]".to_owned());
        let settings = Settings { environment: vec![trusted], ..Settings::default() };
        let install = Installation::all_in_one_with(settings).await;
        let owner = install.register().await;
        let backend = Echo::start().await;
        let proxy = Proxy::start(kind, &at(&install), &backend.at(), |example| example).await?;
        Some(Self { kind, install, owner, backend, proxy })
    }

    fn with_key(&self, key: &str) -> Api {
        self.proxy.api().with_key(key)
    }
}

fn at(install: &Installation) -> String {
    install.url().trim_start_matches("http://").to_owned()
}

/// A header as the backend saw it; empty where it did not, since Caddy sends empty ones.
fn seen<'e>(echo: &'e Value, name: &str) -> &'e str {
    echo["headers"][name].as_str().unwrap_or_default()
}

async fn who_calls_is_known_behind_the_proxy_and_cannot_be_forged(site: Site) {
    let caller = site
        .with_key(&site.owner.live_key)
        .with("x-paperkey-key", "key_forged")
        .with("x-paperkey-team", "team_forged")
        .with("x-paperkey-user", "usr_forged")
        .with("x_paperkey_team", "team_forged")
        .with("x-paperkey_team", "team_forged")
        .with("x_paperkey-team", "team_forged")
        .with("cookie", "mine=1");
    for (verb, body) in [(Method::GET, None), (Method::POST, Some(json!({"a": 1}))), (Method::DELETE, None)] {
        let answer = caller.call(verb.clone(), "/render?size=a4", body.clone()).await;
        let echo = answer.gives(200);
        assert_eq!((text(echo, "/method"), text(echo, "/path")), (verb.to_string(), "/render?size=a4".to_owned()));
        assert_eq!(text(echo, "/body"), body.map(|body| body.to_string()).unwrap_or_default());
        assert_eq!(seen(echo, "x-paperkey-team"), site.owner.team_id);
        assert_eq!(seen(echo, "x-paperkey-mode"), "live");
        assert!(seen(echo, "x-paperkey-key").starts_with("key_") && seen(echo, "x-paperkey-key") != "key_forged");
        assert!(seen(echo, "x-paperkey-scopes").split(' ').any(|scope| scope == "licenses:read"), "{echo}");
        assert!(!echo.to_string().contains("forged"), "{echo}");
        assert_eq!((seen(echo, "authorization"), seen(echo, "cookie")), ("", "mine=1"), "{echo}");
    }
    let by_header = site.proxy.api().with("x-api-key", &site.owner.live_key);
    assert_eq!(seen(by_header.get("/").await.gives(200), "x-api-key"), "");
}

async fn nobody_passes_without_a_good_key_and_the_scope(site: Site) {
    let product = site.owner.create_product("App").await;
    let foreign = [site.owner.token.as_str(), product.public_key.as_str(), product.secret_key.as_str(), "nonsense"];
    for (name, api) in [("nobody", site.proxy.api())].into_iter().chain(foreign.map(|key| (key, site.with_key(key)))) {
        let answer = api.get("/").await;
        assert_eq!(answer.status, 401, "{name}: {}", answer.text());
        assert_eq!(answer.json["error"]["code"], "PB_INVALID_API_KEY", "{name}: {}", answer.text());
        assert!(answer.header("www-authenticate").is_some_and(|told| told.starts_with("Bearer")), "{name}");
        assert!(answer.header("x-request-id").is_some_and(|id| id.starts_with("req_")), "{name}");
    }
    // The same site, and a scope that no key of a team has.
    let stricter = |example: String| {
        assert!(example.contains("scope=licenses:read"), "{example}");
        example.replace("scope=licenses:read", "scope=licenses:check")
    };
    let strict = Proxy::start(site.kind, &at(&site.install), &site.backend.at(), stricter).await;
    let answer = strict.expect("it is installed").api().with_key(&site.owner.live_key).get("/").await;
    assert_eq!((answer.status.as_u16(), answer.json["error"]["code"].is_string()), (403, true), "{}", answer.text());
}

async fn nobody_passes_while_the_product_is_away(mut site: Site) {
    let caller = site.with_key(&site.owner.live_key);
    caller.get("/").await.gives(200);
    site.install.kill(site.install.gateway());
    let answer = caller.get("/").await;
    assert!([502, 503].contains(&answer.status.as_u16()), "{}: {}", answer.status, answer.text());
}

async fn no_content_type_opens_the_door(site: Site) {
    for content_type in
        ["application/grpc", "application/grpc+proto", "application/grpc-web", "application/grpc-web+json"]
    {
        let stranger = site.proxy.api().with("te", "trailers");
        for verb in [Method::GET, Method::POST] {
            let answer = stranger.send(verb.clone(), "/", Some(content_type), bytes::Bytes::new()).await;
            assert_eq!(answer.status, 401, "{verb} {content_type}: {}", answer.text());
            let caller = site.with_key(&site.owner.live_key);
            let answer = caller.send(verb.clone(), "/", Some(content_type), bytes::Bytes::new()).await;
            assert_eq!(answer.status, 200, "{verb} {content_type}: {}", answer.text());
        }
    }
}

async fn nobody_strips_their_own_identity(site: Site) {
    let caller = site.with_key(&site.owner.live_key).with("connection", "X-Paperkey-Mode, x-paperkey-scopes");
    let answer = caller.get("/").await;
    let echo = answer.gives(200);
    assert_eq!((seen(echo, "x-paperkey-mode"), seen(echo, "x-paperkey-team")), ("live", site.owner.team_id.as_str()));
    assert!(seen(echo, "x-paperkey-scopes").contains("licenses:read"), "{echo}");
}

async fn a_revoked_key_is_turned_away(site: Site) {
    let key = site.owner.create_key(json!({"name": "Short-lived", "mode": "live", "scope": "read_write"})).await;
    let caller = site.with_key(&key.token);
    assert_eq!(seen(caller.get("/").await.gives(200), "x-paperkey-key"), key.id);
    site.owner.revoke_key(&key).await;
    assert_eq!(caller.get("/").await.status, 401);
}

async fn a_read_only_key_only_reads(site: Site) {
    let key = site.owner.create_key(json!({"name": "Reader", "mode": "live", "scope": "read_only"})).await;
    let caller = site.with_key(&key.token).with("x-forwarded-method", "GET").with("x-original-method", "GET");
    caller.get("/").await.gives(200);
    assert_eq!(caller.post("/", json!({})).await.status, 403);
    assert_eq!(caller.delete("/").await.status, 403);
}

async fn an_allowlist_counts_the_client_and_not_the_proxy(site: Site) {
    let key = site.owner.allowlisted_key("127.0.0.5").await;
    let from = |address: &str| site.with_key(&key).from_address(address);
    from("127.0.0.5").get("/").await.gives(200);
    for forged in ["127.0.0.5", "127.0.0.5, 127.0.0.1", "127.0.0.5, 127.0.0.5"] {
        for caller in [from("127.0.0.6"), from("127.0.0.7")] {
            let answer = caller.with("x-forwarded-for", forged).with("forwarded", "for=127.0.0.5").get("/").await;
            assert_eq!(answer.status, 403, "{forged}: {}", answer.text());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nginx_restores_the_status_that_was_meant() {
    for (real, told) in [("429", 429), ("503", 503), ("504", 503), ("400", 500)] {
        let judge = Echo::answering(Fixed {
            status: 403,
            headers: vec![("paperkey-status", real), ("retry-after", "7"), ("x-request-id", "req_1")],
        });
        let (judge, backend) = (judge.await, Echo::start().await);
        let Some(proxy) = Proxy::start(Kind::Nginx, &judge.at(), &backend.at(), |example| example).await else {
            return;
        };
        let answer = proxy.api().get("/").await;
        assert_eq!(answer.status, told, "{real}: {}", answer.text());
        assert_eq!((answer.header("retry-after"), answer.header("x-request-id")), (Some("7"), Some("req_1")));
        assert!(answer.json["error"]["code"].is_string(), "{}", answer.text());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_guarded_api_answers_itself_is_not_touched() {
    for kind in [Kind::Nginx, Kind::Caddy] {
        let judge = Echo::answering(Fixed { status: 200, headers: vec![("x-paperkey-key", "key_1")] }).await;
        for status in [401, 403, 404, 429, 500] {
            let backend = Echo::answering(Fixed { status, headers: vec![("x-from", "backend")] }).await;
            let Some(proxy) = Proxy::start(kind, &judge.at(), &backend.at(), |example| example).await else { return };
            let answer = proxy.api().get("/").await;
            assert_eq!((answer.status.as_u16(), answer.header("x-from")), (status, Some("backend")), "{kind:?}");
        }
    }
}
