//! The end of a process: announced, then orderly, and at once for whoever insists.

use std::time::Duration;

use paperkey_tests::{Installation, Settings, eventually, grpc, on_both_kinds_with, wait::GENEROUS, within};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

on_both_kinds_with! {
    patient;
    a_process_that_leaves_says_so_and_takes_calls_until_it_ends,
}

/// Longer than any test, so that only a second signal ends it.
fn patient() -> Settings {
    Settings { environment: vec![("PAPERKEY__SERVER__DRAIN_DELAY_MS", "60000".to_owned())], ..Settings::default() }
}

async fn a_process_that_leaves_says_so_and_takes_calls_until_it_ends(mut install: Installation) {
    let name = install.gateway();
    let operations = install.operations(name);
    assert_eq!(operations.get("/readyz").await.status, 200);
    install.process(name).signal("TERM");
    let said = eventually("it says that it leaves", || async {
        Some(operations.get("/readyz").await).filter(|answer| answer.status == 503)
    })
    .await;
    assert!(said.text().contains("draining"), "{}", said.text());
    assert_eq!(operations.get("/healthz").await.status, 200);
    let status = install.api().get("/v1/status").await;
    status.gives(200);
    assert_eq!(status.header("connection"), Some("close"));
    eventually("health over gRPC says so too", || async {
        let request = HealthCheckRequest { service: String::new() };
        let answer = HealthClient::new(grpc::connect(&install.url()).await).check(request).await;
        let status = answer.map(|answer| answer.into_inner().status()).ok();
        status.filter(|status| *status == ServingStatus::NotServing)
    })
    .await;
    let (status, _) = install.process(name).terminate().await;
    assert!(status.success(), "{status}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_is_left_out_where_auth_is_silent_for_long_and_not_before() {
    let Some(mut install) = Installation::fleet().await else { return };
    install.kill("auth");
    let operations = install.operations("gateway");
    let (said, after) = within(GENEROUS, "the gateway is left out", || async {
        Some(operations.get("/readyz").await).filter(|answer| answer.status == 503)
    })
    .await;
    assert!(said.text().contains("auth"), "{}", said.text());
    assert!(after > Duration::from_secs(15), "all gateways would go at once, after {after:?}");
    install.start("auth").await.unwrap();
    eventually("the gateway is back", || async {
        Some(operations.get("/readyz").await).filter(|answer| answer.status == 200)
    })
    .await;
}
