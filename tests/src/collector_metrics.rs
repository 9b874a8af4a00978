//! A collector that keeps what it is sent: the metrics service of OpenTelemetry, over gRPC.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
};

use opentelemetry_proto::tonic::{
    collector::metrics::v1::{
        ExportMetricsServiceRequest, ExportMetricsServiceResponse,
        metrics_service_server::{MetricsService, MetricsServiceServer},
    },
    common::v1::{KeyValue, any_value},
    metrics::v1::{metric::Data, number_data_point},
};
use tokio::net::TcpListener;
use tonic::{
    Request, Response, Status,
    transport::{Server, server::TcpIncoming},
};

/// A number that was pushed.
#[derive(Clone, Debug, PartialEq)]
pub struct Pushed {
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// The number; of a histogram, how many were measured.
    pub value: f64,
}

/// What one process has pushed last, by the name of the metric.
pub type OfProcess = BTreeMap<String, Vec<Pushed>>;

/// A running collector. It ends with this value.
#[derive(Debug)]
pub struct MetricsCollector {
    at: SocketAddr,
    kept: Kept,
    serving: tokio::task::JoinHandle<()>,
}

type Kept = Arc<Mutex<BTreeMap<String, OfProcess>>>;

impl MetricsCollector {
    /// Starts one.
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
        let at = listener.local_addr().expect("it listens");
        let kept = Kept::default();
        let service = MetricsServiceServer::new(Keeper(Arc::clone(&kept)));
        let serving = Server::builder().add_service(service).serve_with_incoming(TcpIncoming::from(listener));
        let serving = tokio::spawn(async move { serving.await.expect("it serves") });
        Self { at, kept, serving }
    }

    /// Where it is.
    pub fn url(&self) -> String {
        format!("http://{}", self.at)
    }

    /// What the process of that `service.name` has pushed last.
    pub fn of(&self, service: &str) -> Option<OfProcess> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).get(service).cloned()
    }

    /// Who has pushed anything.
    pub fn services(&self) -> BTreeSet<String> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }
}

impl Drop for MetricsCollector {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

struct Keeper(Kept);

#[tonic::async_trait]
impl MetricsService for Keeper {
    async fn export(
        &self,
        request: Request<ExportMetricsServiceRequest>,
    ) -> Result<Response<ExportMetricsServiceResponse>, Status> {
        for of_resource in request.into_inner().resource_metrics {
            let resource = labels(&of_resource.resource.unwrap_or_default().attributes);
            let service = resource.get("service.name").cloned().unwrap_or_default();
            let mut metrics = OfProcess::new();
            for metric in of_resource.scope_metrics.into_iter().flat_map(|scope| scope.metrics) {
                metrics.insert(metric.name, metric.data.map(numbers).unwrap_or_default());
            }
            self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(service, metrics);
        }
        Ok(Response::new(ExportMetricsServiceResponse::default()))
    }
}

#[expect(clippy::cast_precision_loss, reason = "tests do not count that far")]
fn numbers(data: Data) -> Vec<Pushed> {
    let points = match data {
        Data::Gauge(gauge) => gauge.data_points,
        Data::Sum(sum) => {
            assert!(sum.is_monotonic, "what goes down is a gauge");
            sum.data_points
        }
        Data::Histogram(histogram) => {
            let point = |point: opentelemetry_proto::tonic::metrics::v1::HistogramDataPoint| {
                assert_eq!(point.bucket_counts.len(), point.explicit_bounds.len() + 1);
                assert_eq!(point.bucket_counts.iter().sum::<u64>(), point.count);
                Pushed { labels: labels(&point.attributes), value: point.count as f64 }
            };
            return histogram.data_points.into_iter().map(point).collect();
        }
        other => panic!("nobody pushes {other:?}"),
    };
    let value = |value: number_data_point::Value| match value {
        number_data_point::Value::AsInt(value) => value as f64,
        number_data_point::Value::AsDouble(value) => value,
    };
    let point = |point: opentelemetry_proto::tonic::metrics::v1::NumberDataPoint| {
        assert!(point.start_time_unix_nano > 0 && point.time_unix_nano >= point.start_time_unix_nano);
        Pushed { labels: labels(&point.attributes), value: point.value.map(value).expect("a point has a number") }
    };
    points.into_iter().map(point).collect()
}

fn labels(attributes: &[KeyValue]) -> BTreeMap<String, String> {
    let text = |attribute: &KeyValue| match attribute.value.as_ref().and_then(|value| value.value.as_ref()) {
        Some(any_value::Value::StringValue(text)) => text.clone(),
        other => panic!("{} is {other:?}", attribute.key),
    };
    attributes.iter().map(|attribute| (attribute.key.clone(), text(attribute))).collect()
}
