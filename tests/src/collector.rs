//! A collector of OpenTelemetry, as far as a test needs one: it takes what is exported to it, and keeps it whole.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard},
};

use opentelemetry_proto::tonic::{
    collector::{
        logs::v1::{
            ExportLogsServiceRequest, ExportLogsServiceResponse,
            logs_service_server::{LogsService, LogsServiceServer},
        },
        metrics::v1::{
            ExportMetricsServiceRequest, ExportMetricsServiceResponse,
            metrics_service_server::{MetricsService, MetricsServiceServer},
        },
        trace::v1::{
            ExportTraceServiceRequest, ExportTraceServiceResponse,
            trace_service_server::{TraceService, TraceServiceServer},
        },
    },
    common::v1::{AnyValue, KeyValue, any_value::Value as Any},
    logs::v1::LogRecord,
    metrics::v1::Metric,
    trace::v1::Span,
};
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

/// A span, and which process it is of.
#[derive(Clone, Debug)]
pub struct Seen<T> {
    /// `service.name` of the process.
    pub service: String,
    /// What it told.
    pub what: T,
}

/// What has arrived so far.
#[derive(Debug, Default)]
struct Kept {
    traces: Vec<ExportTraceServiceRequest>,
    logs: Vec<ExportLogsServiceRequest>,
    metrics: Vec<ExportMetricsServiceRequest>,
}

#[derive(Clone, Debug, Default)]
struct Shared(Arc<Mutex<Kept>>);

/// A collector.
#[derive(Debug)]
pub struct Collector {
    url: String,
    shared: Shared,
    serving: JoinHandle<()>,
}

impl Shared {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().expect("no test panics while it holds this")
    }
}

impl Collector {
    /// Listens on a port of its own.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let shared = Shared::default();
        let server = Server::builder()
            .add_service(TraceServiceServer::new(shared.clone()))
            .add_service(LogsServiceServer::new(shared.clone()))
            .add_service(MetricsServiceServer::new(shared.clone()))
            .serve_with_incoming(TcpIncoming::from(listener));
        let serving = tokio::spawn(async move { server.await.expect("it serves until the test ends") });
        Self { url, shared, serving }
    }

    /// Where it listens.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// All spans so far.
    pub fn spans(&self) -> Vec<Seen<Span>> {
        let kept = self.shared.kept();
        let of_resources = kept.traces.iter().flat_map(|request| &request.resource_spans).flat_map(|of| {
            let service = service_of(of.resource.as_ref().map(|resource| resource.attributes.as_slice()));
            let spans = of.scope_spans.iter().flat_map(|scope| scope.spans.clone());
            spans.map(move |what| Seen { service: service.clone(), what })
        });
        of_resources.collect()
    }

    /// All log records so far.
    pub fn records(&self) -> Vec<Seen<LogRecord>> {
        let kept = self.shared.kept();
        let of_resources = kept.logs.iter().flat_map(|request| &request.resource_logs).flat_map(|of| {
            let service = service_of(of.resource.as_ref().map(|resource| resource.attributes.as_slice()));
            let records = of.scope_logs.iter().flat_map(|scope| scope.log_records.clone());
            records.map(move |what| Seen { service: service.clone(), what })
        });
        of_resources.collect()
    }

    /// All metrics so far, as often as they were told.
    pub fn metrics(&self) -> Vec<Seen<Metric>> {
        let kept = self.shared.kept();
        let of_resources = kept.metrics.iter().flat_map(|request| &request.resource_metrics).flat_map(|of| {
            let service = service_of(of.resource.as_ref().map(|resource| resource.attributes.as_slice()));
            let metrics = of.scope_metrics.iter().flat_map(|scope| scope.metrics.clone());
            metrics.map(move |what| Seen { service: service.clone(), what })
        });
        of_resources.collect()
    }

    /// Every byte that was exported.
    pub fn bytes(&self) -> Vec<u8> {
        let kept = self.shared.kept();
        let traces = kept.traces.iter().flat_map(prost::Message::encode_to_vec);
        let logs = kept.logs.iter().flat_map(prost::Message::encode_to_vec);
        let metrics = kept.metrics.iter().flat_map(prost::Message::encode_to_vec);
        traces.chain(logs).chain(metrics).collect()
    }
}

impl Drop for Collector {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

fn service_of(attributes: Option<&[KeyValue]>) -> String {
    attributes.map(attributes_of).and_then(|mut told| told.remove("service.name")).unwrap_or_default()
}

/// Attributes as text.
pub fn attributes_of(attributes: &[KeyValue]) -> HashMap<String, String> {
    attributes.iter().map(|attribute| (attribute.key.clone(), text_of(attribute.value.as_ref()))).collect()
}

/// A value as text.
pub fn text_of(value: Option<&AnyValue>) -> String {
    match value.and_then(|value| value.value.as_ref()) {
        Some(Any::StringValue(text)) => text.clone(),
        Some(Any::IntValue(number)) => number.to_string(),
        Some(Any::DoubleValue(number)) => number.to_string(),
        Some(Any::BoolValue(is)) => is.to_string(),
        other => format!("{other:?}"),
    }
}

/// Bytes as the ids of traces are written.
pub fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[tonic::async_trait]
impl TraceService for Shared {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.kept().traces.push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl LogsService for Shared {
    async fn export(
        &self,
        request: Request<ExportLogsServiceRequest>,
    ) -> Result<Response<ExportLogsServiceResponse>, Status> {
        self.kept().logs.push(request.into_inner());
        Ok(Response::new(ExportLogsServiceResponse::default()))
    }
}

#[tonic::async_trait]
impl MetricsService for Shared {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        self.kept().metrics.push(request.into_inner());
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}
