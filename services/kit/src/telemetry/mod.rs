//! Logs and traces: what a process tells of itself.
//!
//! A process starts telemetry once. Log lines go to standard error; where a collector is configured, log records and
//! [traces] go there too (OTLP over gRPC). What is exported waits in bounded queues and is sent by tasks of their own,
//! so that a collector that is slow or away costs calls nothing: what finds no room is lost, counted and told of.
//!
//! No line, record or span carries a secret, a body, an address of mail or a query.
//!
//! Deliberately absent: spans of libraries. Only what is started here is exported, so that the exporter's own connections
//! make nothing to export, and an upgrade of a library cannot begin to tell of headers.

mod logs;
pub mod metrics;
mod queue;
mod traces;

use std::time::Duration;

use opentelemetry::KeyValue;
use opentelemetry_sdk::Resource;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

use crate::config;

pub use opentelemetry::trace::SpanKind;
pub use traces::{
    Direction, Refusal, Scope, Span, arrive, carried, continued, exports, hop, inject, scoped, serve, statement,
    traceparent, verb,
};

/// How long the collector may take to be reached.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// How long what is left may take to be sent when the process ends.
const END_TIMEOUT: Duration = Duration::from_millis(1_500);

/// Telemetry of a process, under way.
#[derive(Debug)]
#[must_use = "what is left to be sent is sent by `end`"]
pub struct Telemetry {
    pipelines: Vec<queue::Pipeline>,
}

/// Starts logging to standard error, and exporting where a collector is configured. Only the first call of a process
/// counts. `part` is what the process runs, such as `gateway`.
pub fn start(config: &config::Telemetry, part: &str, version: &str, instance: &str) -> Telemetry {
    let (bridge, pipelines, problem) = match exporters(config, part, version, instance) {
        Ok(Some(exporters)) => {
            traces::start(exporters.tracer, config.trace_sample_ratio);
            (Some(exporters.bridge), exporters.pipelines, None)
        }
        Ok(None) => (None, Vec::new(), None),
        Err(problem) => (None, Vec::new(), Some(problem)),
    };
    logs::start(config, bridge);
    if let Some(problem) = problem {
        tracing::error!(%problem, "nothing is sent to the collector");
    }
    Telemetry { pipelines }
}

impl Telemetry {
    /// Sends what is left, within two seconds.
    pub async fn end(self) {
        let ended = futures_util::future::join_all(self.pipelines.into_iter().map(queue::Pipeline::end));
        if tokio::time::timeout(END_TIMEOUT, ended).await.is_err() {
            tracing::warn!("the collector did not take the last spans and log records in time");
        }
    }
}

/// Why nothing can be exported.
type Problem = Box<dyn std::error::Error + Send + Sync>;

/// What is made where a collector is configured.
struct Exporters {
    tracer: opentelemetry_sdk::trace::SdkTracer,
    bridge: logs::Bridge,
    pipelines: Vec<queue::Pipeline>,
}

fn exporters(
    config: &config::Telemetry,
    part: &str,
    version: &str,
    instance: &str,
) -> Result<Option<Exporters>, Problem> {
    let Some(endpoint) = &config.otlp_endpoint else { return Ok(None) };
    let channel = channel(endpoint)?;
    let resource = Resource::builder_empty()
        .with_attributes([
            KeyValue::new("service.name", format!("paperkey-{part}")),
            KeyValue::new("service.version", version.to_owned()),
            KeyValue::new("service.instance.id", instance.to_owned()),
        ])
        .build();
    let (tracer, spans) = traces::exporter(channel.clone(), &resource)?;
    let (bridge, records) = logs::exporter(channel, &resource)?;
    Ok(Some(Exporters { tracer, bridge, pipelines: vec![spans, records] }))
}

/// The one connection to the collector, made when it is first needed.
fn channel(endpoint: &str) -> Result<Channel, Problem> {
    let endpoint = Endpoint::from_shared(endpoint.to_owned())?.connect_timeout(CONNECT_TIMEOUT);
    let is_https = endpoint.uri().scheme_str() == Some("https");
    let endpoint = if is_https { endpoint.tls_config(ClientTlsConfig::new().with_webpki_roots())? } else { endpoint };
    Ok(endpoint.connect_lazy())
}
