//! Whether a process lives, and whether it is ready: asked over HTTP by machines, over gRPC by meshes.

use paperkey_tests::{Installation, eventually, grpc, installation::SERVICES, on_both_kinds};
use tonic::Code;
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};

on_both_kinds! {
    every_process_tells_that_it_lives_and_is_ready,
    the_gateway_tells_its_health_over_grpc,
}

async fn serving(url: &str, service: &str) -> Result<i32, Code> {
    let mut client = HealthClient::new(grpc::connect(url).await);
    let answer = client.check(HealthCheckRequest { service: service.to_owned() }).await;
    answer.map(|answer| answer.into_inner().status).map_err(|status| status.code())
}

/// Waits until the whole of a process serves: it says so a moment after it is.
async fn serves(name: &str, url: &str) {
    let serving =
        || async { serving(url, "").await.ok().filter(|status| *status == i32::from(ServingStatus::Serving)) };
    eventually(&format!("{name} serves"), serving).await;
}

async fn every_process_tells_that_it_lives_and_is_ready(install: Installation) {
    for name in install.names() {
        let operations = install.operations(&name);
        for path in ["/healthz", "/readyz", "/metrics"] {
            assert_eq!(operations.get(path).await.status, 200, "{name}{path}");
        }
        assert_eq!(operations.get("/nowhere").await.status, 404, "{name}");
        assert_eq!(operations.get("/products").await.status, 404, "{name}: operations serve nothing else");
    }
    let status = install.api().get("/v1/status").await;
    assert_eq!(status.gives(200)["version"], env!("CARGO_PKG_VERSION"));
}

async fn the_gateway_tells_its_health_over_grpc(install: Installation) {
    serves("the gateway", &install.url()).await;
    assert_eq!(serving(&install.url(), "nonsense.Service").await, Err(Code::NotFound));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_service_of_a_fleet_tells_its_health_over_grpc() {
    let Some(install) = Installation::fleet().await else { return };
    for service in SERVICES {
        serves(service, &install.url_of(service)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_service_whose_schema_has_gone_back_is_alive_and_not_ready() {
    let Some(install) = Installation::fleet().await else { return };
    install.command(&["migrate", "down", "catalog"], "").await.succeeded();
    let operations = install.operations("catalog");
    assert_eq!(operations.get("/healthz").await.status, 200);
    let ready = operations.get("/readyz").await;
    assert_eq!(ready.status, 503);
    assert!(ready.text().contains("paperkey migrate up"), "{}", ready.text());
    install.command(&["migrate", "up"], "").await.succeeded();
    assert_eq!(operations.get("/readyz").await.status, 200);
}
