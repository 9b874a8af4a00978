//! The way out by push: all numbers to an OpenTelemetry collector, over gRPC, from time to time.
//!
//! Deliberately absent: keeping what could not be sent. Numbers are sums since the start of the process, so the next
//! push makes up for one that was lost.

use std::{
    env,
    str::FromStr as _,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use opentelemetry_proto::tonic::{
    collector::metrics::v1::{ExportMetricsServiceRequest, metrics_service_client::MetricsServiceClient},
    common::v1::{AnyValue, InstrumentationScope, KeyValue, any_value},
    metrics::v1::{
        AggregationTemporality, Gauge, Histogram, HistogramDataPoint, Metric, NumberDataPoint, ResourceMetrics,
        ScopeMetrics, Sum, metric::Data, number_data_point,
    },
    resource::v1::Resource,
};
use tonic::{
    Request,
    metadata::{AsciiMetadataKey, AsciiMetadataValue},
    transport::{Channel, ClientTlsConfig, Endpoint},
};

use super::{Family, Kind, Point, Snapshot, Spread, Value, snapshot, started};
use crate::shutdown::Shutdown;

/// How often numbers are pushed, unless the environment says otherwise.
const INTERVAL: Duration = Duration::from_secs(15);
/// How long a push may take.
const TIMEOUT: Duration = Duration::from_secs(10);
/// The names that OpenTelemetry gives to settings of whoever pushes.
const INTERVAL_VARIABLE: &str = "OTEL_METRIC_EXPORT_INTERVAL";
const HEADERS_VARIABLE: &str = "OTEL_EXPORTER_OTLP_HEADERS";

/// What all numbers of a process are told apart by from those of others, such as `service.name`.
pub type Attributes = Vec<(&'static str, String)>;

/// Pushes until shut down, and then once more.
pub async fn push(endpoint: String, resource: Attributes, mut shutdown: Shutdown) {
    let mut client = match dial(&endpoint) {
        Ok(channel) => MetricsServiceClient::new(channel),
        Err(error) => {
            tracing::error!(%error, "metrics cannot be pushed: telemetry.otlp_endpoint must be a URL");
            return;
        }
    };
    let headers = headers();
    let mut failing = false;
    loop {
        let ends = tokio::select! {
            () = shutdown.wait() => true,
            () = tokio::time::sleep(interval()) => false,
        };
        let mut request = Request::new(encode(&snapshot(), &resource, SystemTime::now()));
        for (name, value) in &headers {
            request.metadata_mut().insert(name.clone(), value.clone());
        }
        // The end of a process does not wait long for somebody who may not be there.
        let limit = if ends { Duration::from_secs(1) } else { TIMEOUT };
        let pushed = tokio::time::timeout(limit, client.export(request)).await;
        let failure = match &pushed {
            Ok(Ok(_)) => None,
            Ok(Err(status)) => Some(status.code()),
            Err(_) => Some(tonic::Code::DeadlineExceeded),
        };
        match failure {
            Some(code) if !failing => tracing::warn!(?code, "the collector takes no metrics"),
            None if failing => tracing::info!("the collector takes metrics again"),
            _ => {}
        }
        failing = failure.is_some();
        if ends {
            return;
        }
    }
}

fn dial(endpoint: &str) -> Result<Channel, tonic::transport::Error> {
    let mut way = Endpoint::from_shared(endpoint.to_owned())?.connect_timeout(TIMEOUT);
    if endpoint.starts_with("https:") {
        way = way.tls_config(ClientTlsConfig::new().with_enabled_roots())?;
    }
    Ok(way.connect_lazy())
}

fn interval() -> Duration {
    let ms = env::var(INTERVAL_VARIABLE).ok().and_then(|ms| ms.parse().ok());
    ms.map_or(INTERVAL, Duration::from_millis).max(Duration::from_millis(50))
}

/// `name=value,name=value`, such as for a collector that wants a token.
fn headers() -> Vec<(AsciiMetadataKey, AsciiMetadataValue)> {
    let text = env::var(HEADERS_VARIABLE).unwrap_or_default();
    let header = |pair: &str| {
        let (name, value) = pair.split_once('=')?;
        let name = AsciiMetadataKey::from_str(&name.trim().to_ascii_lowercase()).ok()?;
        let mut value = AsciiMetadataValue::from_str(value.trim()).ok()?;
        value.set_sensitive(true);
        Some((name, value))
    };
    text.split(',').filter_map(header).collect()
}

fn attribute(name: &str, value: &str) -> KeyValue {
    let value = AnyValue { value: Some(any_value::Value::StringValue(value.to_owned())) };
    KeyValue { key: name.to_owned(), value: Some(value), ..KeyValue::default() }
}

fn nanos(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// All that was read, under the names that `/metrics` has for it.
fn encode(snapshot: &Snapshot, resource: &Attributes, at: SystemTime) -> ExportMetricsServiceRequest {
    let times = (nanos(started()), nanos(at));
    let metrics = snapshot
        .families()
        .filter(|(_, points)| !points.is_empty())
        .map(|(family, points)| metric(family, points, times))
        .collect();
    let scope = InstrumentationScope { name: "paperkey".to_owned(), ..InstrumentationScope::default() };
    let attributes = resource.iter().map(|(name, value)| attribute(name, value)).collect();
    ExportMetricsServiceRequest {
        resource_metrics: vec![ResourceMetrics {
            resource: Some(Resource { attributes, ..Resource::default() }),
            scope_metrics: vec![ScopeMetrics { scope: Some(scope), metrics, ..ScopeMetrics::default() }],
            ..ResourceMetrics::default()
        }],
    }
}

fn metric(family: &'static Family, points: &[Point], times: (u64, u64)) -> Metric {
    let cumulative = AggregationTemporality::Cumulative.into();
    let data = match family.kind {
        Kind::Counter => Data::Sum(Sum {
            data_points: points.iter().filter_map(|point| number(family, point, times)).collect(),
            aggregation_temporality: cumulative,
            is_monotonic: true,
        }),
        Kind::Gauge => {
            Data::Gauge(Gauge { data_points: points.iter().filter_map(|point| number(family, point, times)).collect() })
        }
        Kind::Histogram => Data::Histogram(Histogram {
            data_points: points.iter().filter_map(|point| spread(family, point, times)).collect(),
            aggregation_temporality: cumulative,
        }),
    };
    Metric {
        name: family.name.to_owned(),
        description: family.help.to_owned(),
        unit: unit(family.name).to_owned(),
        data: Some(data),
        ..Metric::default()
    }
}

/// The unit that a name ends with, in the words of UCUM.
fn unit(name: &str) -> &'static str {
    let name = name.trim_end_matches("_total");
    if name.ends_with("_seconds") {
        "s"
    } else if name.ends_with("_bytes") {
        "By"
    } else {
        "1"
    }
}

fn labels(family: &Family, point: &Point) -> Vec<KeyValue> {
    family.labels.iter().zip(&point.labels).map(|(name, value)| attribute(name, value)).collect()
}

fn number(family: &Family, point: &Point, (start, at): (u64, u64)) -> Option<NumberDataPoint> {
    let value = match &point.value {
        Value::Whole(value) => number_data_point::Value::AsInt(i64::try_from(*value).unwrap_or(i64::MAX)),
        Value::Real(value) => number_data_point::Value::AsDouble(*value),
        Value::Spread(_) => return None,
    };
    Some(NumberDataPoint {
        attributes: labels(family, point),
        start_time_unix_nano: start,
        time_unix_nano: at,
        value: Some(value),
        ..NumberDataPoint::default()
    })
}

fn spread(family: &Family, point: &Point, (start, at): (u64, u64)) -> Option<HistogramDataPoint> {
    let Value::Spread(spread) = &point.value else { return None };
    let Spread { bounds, counts, sum } = spread.clone();
    Some(HistogramDataPoint {
        attributes: labels(family, point),
        start_time_unix_nano: start,
        time_unix_nano: at,
        count: spread.count(),
        sum: Some(sum),
        bucket_counts: counts,
        explicit_bounds: bounds,
        ..HistogramDataPoint::default()
    })
}
