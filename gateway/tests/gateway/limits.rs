//! Limits as callers meet them: which count, what answers tell, and that a refused call uses up nothing.

use paperkey_kit::config::{Limits, Tiers};

use super::*;

/// What is asked, with which headers and body, and the status of the answer.
type Asked = (&'static str, &'static [(&'static str, &'static str)], &'static str, u16);

/// Numbers that are easily reached.
fn house_of(limits: &str) -> House {
    house_with(|config| config.limits = toml::from_str::<Limits>(limits).unwrap())
}

fn told(said: &Said) -> (String, String) {
    (said.header("x-ratelimit-limit").to_owned(), said.header("x-ratelimit-remaining").to_owned())
}

fn left(said: &Said) -> &str {
    said.header("x-ratelimit-remaining")
}

const STRANGER: (&str, &str) = ("authorization", "Bearer pk_live_nobody");

#[tokio::test]
async fn every_answer_tells_of_the_limits_that_it_counts_against() {
    let house = house();
    let everything: [Asked; 11] = [
        ("GET /v1/status", &[], "", 200),
        ("GET /v1/status", &[TEAM_KEY], "", 200),
        ("GET /v1/nowhere", &[], "", 404),
        ("PUT /v1/status", &[], "", 405),
        ("GET /products", &[], "", 401),
        ("GET /products", &[STRANGER], "", 401),
        ("POST /products", &[ACCOUNT], "{", 400),
        ("POST /products", &[ACCOUNT, ("content-type", "text/plain")], "x", 415),
        ("POST /v1/licenses/validate", &[("x-api-key", "pk_1")], "{}", 400),
        ("POST /v1/licenses/validate", &[("x-api-key", "pk_1")], r#"{"license_key": "WRONG"}"#, 400),
        ("POST /api/v1/products", &[("authorization", "Bearer pk_live_readonly")], "{}", 403),
    ];
    for (line, headers, body, status) in everything {
        let said = house.ask(line, headers, body).await;
        assert_eq!(said.status, status, "{line}: {:?}", said.body);
        for name in ["x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset", "ratelimit", "ratelimit-policy"]
        {
            assert!(!said.header(name).is_empty(), "{line} does not tell {name}");
        }
    }
}

#[tokio::test]
async fn grpc_and_grpc_web_tell_the_same_as_metadata() {
    let house = house();
    let path = "POST /paperkey.catalog.v1.CatalogService/GetProduct";
    for content_type in ["application/grpc", "application/grpc-web+proto"] {
        for (credential, class) in [(ACCOUNT, "per_ip"), (TEAM_KEY, "per_key"), (STRANGER, "refused_credentials")] {
            let headers = [credential, ("content-type", content_type)];
            let said = house.ask(path, &headers, vec![0, 0, 0, 0, 0]).await;
            assert!(said.header("ratelimit").starts_with(&format!("\"{class}\";r=")), "{:?}", said.headers);
            assert!(!said.header("x-ratelimit-reset").is_empty());
        }
    }
}

#[tokio::test]
async fn the_tightest_limit_is_told_and_all_that_apply() {
    let house = house_of("[license_validate]\nrequests = 2\n[per_ip]\nrequests = 10");
    let said = house.validate(r#"{"license_key": "GOOD"}"#).await;
    assert_eq!(told(&said), ("2".to_owned(), "1".to_owned()));
    assert_eq!(said.header("x-ratelimit-reset"), (NOW_MS / 1_000 + 60).to_string());
    assert_eq!(said.header("ratelimit-policy"), "\"per_ip\";q=10;w=60, \"license_validate\";q=2;w=60");
    assert_eq!(said.header("ratelimit"), "\"per_ip\";r=9;t=60, \"license_validate\";r=1;t=60");
}

#[tokio::test]
async fn a_license_is_counted_however_its_key_is_written_and_a_refused_call_uses_up_nothing() {
    let house = house_of("[license_validate]\nrequests = 2");
    assert_eq!(house.validate(r#"{"license_key": "AB-CD"}"#).await.status, 200);
    assert_eq!(house.validate(r#"{"licenseKey": " ab cd"}"#).await.status, 200);
    let zeros = ["00-11", "oO-iL", "0o-l1"].map(|key| format!(r#"{{"license_key": "{key}"}}"#));
    for (spelling, status) in zeros.into_iter().zip([200, 200, 429]) {
        let said = house.ask("POST /v1/licenses/validate", &[("x-api-key", "pk_1")], spelling.clone()).await;
        assert_eq!(said.status, status, "{spelling}");
    }
    let before = house.validate(r#"{"license_key": "OTHER"}"#).await;
    assert_eq!(before.status, 200);
    for _ in 0..3 {
        let said = house.validate(r#"{"license_key": "abcd"}"#).await;
        assert_eq!((said.status, said.json()["error"].as_str()), (429, Some("license_rate_limited")));
        assert_eq!((said.header("retry-after"), told(&said).1.as_str()), ("60", "0"));
    }
    let after = house.ask("GET /v1/status", &[], "").await;
    let left = |said: &Said| said.header("ratelimit").split(";r=").nth(1).unwrap()[..2].to_owned();
    assert_eq!((left(&before), left(&after)), ("95".into(), "94".into()), "of the address");
    house.hand.advance_ms(59_999);
    assert_eq!(house.validate(r#"{"license_key": "abcd"}"#).await.header("retry-after"), "1");
    house.hand.advance_ms(1);
    assert_eq!(house.validate(r#"{"license_key": "abcd"}"#).await.status, 200);
}

#[tokio::test]
async fn a_license_counts_over_grpc_as_well() {
    let house = house_of("[license_validate]\nrequests = 1");
    let message = licensing::ValidateLicenseRequest { license_key: "AB-CD".into(), ..Default::default() };
    let mut frame = vec![0, 0, 0, 0, u8::try_from(message.encoded_len()).unwrap()];
    message.encode(&mut frame).unwrap();
    let path = "POST /paperkey.licensing.v1.LicenseCheckService/ValidateLicense";
    let headers = [("x-api-key", "pk_1"), ("content-type", "application/grpc")];
    let first = house.ask(path, &headers, frame.clone()).await;
    assert_eq!(first.header("grpc-status"), "", "it is told at the end of the body");
    let second = house.ask(path, &headers, frame).await;
    assert_eq!(
        (second.header("grpc-status"), second.header("ratelimit")),
        ("8", "\"per_ip\";r=99;t=60, \"license_validate\";r=0;t=60")
    );
    assert_eq!(house.validate(r#"{"license_key": "AB-CD"}"#).await.status, 429, "REST counts the same");
}

#[tokio::test]
async fn over_grpc_a_message_is_read_as_the_service_reads_it_or_refused() {
    let house = house_of("[license_validate]\nrequests = 1");
    let encode =
        |key: &str| licensing::ValidateLicenseRequest { license_key: key.into(), ..Default::default() }.encode_to_vec();
    let framed = |message: &[u8]| {
        let mut frame = vec![0, 0, 0, 0, u8::try_from(message.len()).unwrap()];
        frame.extend_from_slice(message);
        frame
    };
    let (real, decoy) = (encode("REAL"), encode("DECOY"));
    // A group of field 1,000 that holds nothing, and a field of number 0.
    let (group, nothing) = ([0xc3, 0x3e, 0xc4, 0x3e], [0x02, 0x00]);
    let path = "POST /paperkey.licensing.v1.LicenseCheckService/ValidateLicense";
    let headers = [("x-api-key", "pk_1"), ("content-type", "application/grpc")];
    let calls = house.calls();
    let mut two_frames = framed(&real);
    two_frames.extend(framed(&decoy));
    let mut compressed = framed(&real);
    compressed[0] = 1;
    let odd = [
        framed(&[&group[..], &real].concat()),
        framed(&[&decoy, &group[..], &real].concat()),
        framed(&[&nothing[..], &real].concat()),
        two_frames,
        compressed,
        vec![0, 0, 0, 0, 9, 1],
        Vec::new(),
    ];
    for frame in odd {
        let said = house.ask(path, &headers, frame.clone()).await;
        assert_eq!(said.header("grpc-status"), "3", "{frame:?}");
        assert!(!said.header("x-ratelimit-remaining").is_empty(), "it counts by the address");
    }
    assert_eq!(house.calls(), calls, "the service was not asked");
    // Of a field that is there twice the last counts, as for the service.
    let twice = framed(&[decoy, real.clone()].concat());
    assert_eq!(house.ask(path, &headers, twice).await.header("grpc-status"), "");
    assert_eq!(house.ask(path, &headers, framed(&real)).await.header("grpc-status"), "8");
}

#[tokio::test]
async fn a_key_is_counted_by_itself_and_everybody_else_by_address() {
    let house = house_of("[per_ip]\nrequests = 2");
    for remaining in ["1", "0"] {
        assert_eq!(left(&house.ask("GET /v1/status", &[], "").await), remaining);
    }
    let said = house.ask("GET /v1/status", &[], "").await;
    assert_eq!((said.status, said.json()["error"]["code"].as_str()), (429, Some("PB_RATE_LIMIT_EXCEEDED")));
    assert_eq!(house.ask("GET /products", &[ACCOUNT], "").await.status, 429, "an account has no limit of its own");
    let said = house.ask("GET /v1/status", &[TEAM_KEY], "").await;
    assert_eq!((said.status, told(&said)), (200, ("60".to_owned(), "59".to_owned())));
    let said = house.ask("GET /v1/nowhere", &[], "").await;
    assert_eq!(said.status, 429, "guessing paths is counted as well");
}

#[tokio::test]
async fn the_client_behind_a_trusted_proxy_is_counted_and_of_ipv6_the_network() {
    let house = house_with(|config| {
        config.trusted_proxies = vec!["203.0.113.0/24".parse().unwrap()];
        config.limits = toml::from_str("[per_ip]\nrequests = 1").unwrap();
    });
    let from = async |address: &str| house.ask("GET /v1/status", &[("x-forwarded-for", address)], "").await.status;
    assert_eq!([from("198.51.100.1").await, from("198.51.100.2").await], [200, 200]);
    assert_eq!([from("6.6.6.6, 198.51.100.1").await, from("198.51.100.2").await], [429, 429]);
    assert_eq!([from("2001:db8::1").await, from("2001:db8::2").await], [200, 429]);
    assert_eq!(from("2001:db8:0:1::1").await, 200);
}

#[tokio::test]
async fn refused_credentials_are_counted_alike_whatever_is_wrong_with_them() {
    let house = house_of("[refused_credentials]\nrequests = 3");
    let bad = ["pk_live_nobody", "po_sk_nobody", "x.y.z"];
    for (index, credential) in bad.iter().enumerate() {
        let said = house.ask("GET /products", &[("authorization", &format!("Bearer {credential}"))], "").await;
        assert_eq!((said.status, told(&said)), (401, ("3".to_owned(), (2 - index).to_string())), "{credential}");
        assert!(said.header("ratelimit-policy").starts_with("\"refused_credentials\""));
    }
    let said = house.ask("GET /v1/status", &[STRANGER], "").await;
    assert_eq!((said.status, said.json()["error"]["code"].as_str()), (429, Some("PB_RATE_LIMIT_EXCEEDED")));
    assert_eq!(house.ask("GET /v1/status", &[], "").await.status, 200, "who brings none is not concerned");
    assert_eq!(house.ask("GET /v1/status", &[TEAM_KEY], "").await.status, 200, "and neither is a good one");
}

#[tokio::test]
async fn sign_in_has_a_limit_of_its_own() {
    let house = house_of("[auth]\nrequests = 2\nwindow_s = 900");
    for status in [200, 200, 429] {
        let said = house.ask("POST /auth/login", &[], r#"{"email": "a@b.c", "password": "12345678"}"#).await;
        assert_eq!(said.status, status, "{:?}", said.body);
        if status == 429 {
            assert_eq!((said.json()["error"].as_str(), said.header("retry-after")), (Some("auth_rate_limited"), "900"));
        }
    }
}

#[tokio::test]
async fn a_keys_own_limit_and_its_teams_stand_over_the_tiers_and_none_is_wider_than_the_teams() {
    let of = async |credential: &'static str| {
        let said = house().ask("GET /v1/status", &[("authorization", credential)], "").await;
        said.header("x-ratelimit-limit").to_owned()
    };
    assert_eq!(of("Bearer pk_live_1").await, "60");
    assert_eq!(of("Bearer pk_live_own7").await, "7");
    assert_eq!(of("Bearer pk_live_own9000").await, "60");
    assert_eq!(of("Bearer pk_live_team500").await, "500");
    assert_eq!(of("Bearer pk_live_scale").await, "3000");
    assert_eq!(of("Bearer pk_live_gone").await, "60", "a tier that is no more is the first one");
}

#[tokio::test]
async fn a_rotated_key_has_what_is_left_of_the_limit_and_no_new_one() {
    let house = house();
    assert_eq!(left(&house.ask("GET /v1/status", &[TEAM_KEY], "").await), "59");
    let rotated = [("authorization", "Bearer pk_live_rotated")];
    assert_eq!(left(&house.ask("GET /v1/status", &rotated, "").await), "58");
    assert_eq!(left(&house.ask("GET /v1/status", &[TEAM_KEY], "").await), "57");
}

#[tokio::test]
async fn a_tier_may_withhold_the_api_and_webhooks() {
    let tiers = |text: &str| Arc::new(toml::from_str::<Tiers>(text).unwrap());
    let house = house_with(|config| {
        config.tiers = tiers("[free]\nfeatures = [\"webhooks\"]");
        config.billing_url = Some("https://example.com/plans".into());
    });
    let said = house.ask("GET /api/v1/products", &[TEAM_KEY], "").await;
    assert_eq!((said.status, said.json()["error"]["code"].as_str()), (403, Some("feature_not_in_plan")));
    assert!(said.json()["error"]["message"].as_str().unwrap().ends_with("https://example.com/plans"));
    assert_eq!(left(&said), "59", "it counts");
    assert_ne!(house.ask("GET /products", &[ACCOUNT], "").await.status, 403, "people come in all the same");
    let house = house_with(|config| config.tiers = tiers("[free]\nfeatures = [\"api\"]"));
    let said = house.ask("POST /products/prod_1/webhooks", &[ACCOUNT], "{}").await;
    assert_eq!((said.status, said.json()["error"].as_str()), (403, Some("feature_not_in_plan")));
    assert_ne!(house.ask("GET /products/prod_1/webhooks", &[ACCOUNT], "").await.status, 403);
}
