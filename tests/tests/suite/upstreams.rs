//! Somebody's own server, mounted by configuration in a real installation.

use http::Method;
use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{Echo, Installation, Kind, Settings, people::text};
use serde_json::json;

async fn a_mounted_server_is_guarded_and_told_who_calls(kind: Kind) {
    let backend = Echo::start().await;
    let mounted = format!(
        "[{{ path = \"/v1/pdf/\", url = \"http://{0}\", scope = \"licenses:read\", max_body_bytes = 100 }}, \
         {{ path = \"/v1/tool\", url = \"http://{0}/base\", anonymous = true, strip_prefix = true }}]",
        backend.at()
    );
    let settings = Settings { environment: vec![("PAPERKEY__UPSTREAMS", mounted)], ..Settings::default() };
    let install = match kind {
        Kind::AllInOne => Installation::all_in_one_with(settings).await,
        Kind::Fleet => match Installation::fleet_with(settings).await {
            Some(fleet) => fleet,
            None => return,
        },
    };
    let owner = install.register().await;

    let answer =
        owner.integration().with("x-paperkey-team", "forged").post("/v1/pdf/generate?a=b", json!({"x": 1})).await;
    let echo = answer.gives(200);
    assert_eq!((text(echo, "/path"), text(echo, "/body")), ("/v1/pdf/generate?a=b".to_owned(), "{\"x\":1}".to_owned()));
    assert_eq!(text(echo, "/headers/x-paperkey-team"), owner.team_id);
    assert_eq!(text(echo, "/headers/x-forwarded-for"), "127.0.0.1");
    assert_eq!(echo["headers"]["authorization"], json!(null));
    assert_eq!(answer.header("x-request-id"), echo["headers"]["x-request-id"].as_str());

    install.api().get("/v1/pdf/generate").await.refused(Reason::InvalidCredentials);
    let product = owner.create_product("App").await;
    owner.app(&product).0.get("/v1/pdf/generate").await.refused(Reason::InvalidCredentials);
    let large = json!({"x": "x".repeat(100)});
    owner.integration().post("/v1/pdf/generate", large).await.refused(Reason::BodyTooLarge);
    owner.integration().get("/v1/pdf/../status").await.refused(Reason::ValidationFailed);
    owner.integration().get("/v1/pdfs").await.refused(Reason::NotFound);

    let echo = install.api().call(Method::PUT, "/v1/tool/count", Some(json!([]))).await;
    assert_eq!(text(echo.gives(200), "/path"), "/base/count");
    assert_eq!(echo.json["headers"]["x-paperkey-team"], json!(null));
    install.api().with_key("pb_live_nonsense").get("/v1/tool/count").await.refused(Reason::InvalidCredentials);
    // What is mounted beside them leaves the product's own paths alone.
    install.api().get("/v1/status").await.gives(200);
}

mod all_in_one {
    #[tokio::test(flavor = "multi_thread")]
    async fn a_mounted_server_is_guarded_and_told_who_calls() {
        super::a_mounted_server_is_guarded_and_told_who_calls(super::Kind::AllInOne).await;
    }
}

mod fleet {
    #[tokio::test(flavor = "multi_thread")]
    async fn a_mounted_server_is_guarded_and_told_who_calls() {
        super::a_mounted_server_is_guarded_and_told_who_calls(super::Kind::Fleet).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_with_a_mount_that_cannot_be_says_why() {
    let install = Installation::all_in_one().await;
    let mut command = install.prepared(&["config", "check"]);
    command.env("PAPERKEY__UPSTREAMS", "[{ path = \"/v1/keys/x\", url = \"localhost\", meter = \"moons\" }]");
    let ended = paperkey_tests::process::run(command, "").await;
    let said = ended.failed();
    for problem in ["upstreams[0].path overlaps", "upstreams[0].url must be", "upstreams[0].meter is named by no tier"]
    {
        assert!(said.contains(problem), "{problem}: {said}");
    }
}
