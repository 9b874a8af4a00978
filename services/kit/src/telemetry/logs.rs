//! Log lines on standard error, and log records for the collector.
//!
//! Both bear the id of the request that they belong to, and the place in its trace where there is one.

use std::{fmt, io, time::Duration};

use opentelemetry::{
    InstrumentationScope,
    logs::{AnyValue, LogRecord as _},
};
use opentelemetry_appender_tracing::layer::OpenTelemetryTracingBridge;
use opentelemetry_otlp::{LogExporter, WithExportConfig as _, WithTonicConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    logs::{LogBatch, LogExporter as _, LogProcessor, SdkLogRecord, SdkLogger, SdkLoggerProvider},
};
use serde::Serialize;
use tonic::transport::Channel;
use tracing::{
    Event, Metadata, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    EnvFilter, Layer as _,
    filter::filter_fn,
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::Writer,
        time::{FormatTime as _, SystemTime},
    },
    layer::SubscriberExt as _,
    registry::LookupSpan,
    util::SubscriberInitExt as _,
};

use super::{
    Problem,
    queue::{EXPORT_TIMEOUT, Pipeline, Queue},
    traces::{Scope, look},
};
use crate::config::{LogFormat, Telemetry};

/// Brings log records to the exporter.
pub(super) type Bridge = OpenTelemetryTracingBridge<SdkLoggerProvider, SdkLogger>;

type Record = Box<(SdkLogRecord, InstrumentationScope)>;

/// What carries records to the collector, and would tell of each that it does.
const CARRIERS: [&str; 6] = ["h2", "hyper", "hyper_util", "rustls", "tonic", "tower"];

/// The exporter's own library. What is lost is told of by us, once a minute, and not by it for each batch.
const LIBRARY: &str = "opentelemetry";

/// Starts logging. Only the first call of a process counts.
pub(super) fn start(config: &Telemetry, bridge: Option<Bridge>) {
    let filter = EnvFilter::try_new(&config.log_level).unwrap_or_else(|_| EnvFilter::new("info"));
    let bridge = bridge.map(|bridge| bridge.with_filter(filter_fn(|line| !is_library(line) && !is_carrier(line))));
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .event_format(Lines(config.log))
        .with_filter(filter_fn(|line| !is_library(line)));
    // A second call, as in tests, leaves the first in place.
    let _ = tracing_subscriber::registry().with(filter).with(lines).with(bridge).try_init();
}

fn is_library(line: &Metadata<'_>) -> bool {
    line.target().starts_with(LIBRARY)
}

fn is_carrier(line: &Metadata<'_>) -> bool {
    let of = line.target().split("::").next().unwrap_or_default();
    CARRIERS.contains(&of)
}

/// What makes log records of lines, and sends them.
pub(super) fn exporter(channel: Channel, resource: &Resource) -> Result<(Bridge, Pipeline), Problem> {
    let mut exporter =
        LogExporter::builder().with_tonic().with_channel(channel).with_timeout(EXPORT_TIMEOUT).build()?;
    exporter.set_resource(resource);
    let exporter = std::sync::Arc::new(exporter);
    let (queue, pipeline) = Queue::start("log records", move |batch: Vec<Record>| {
        let exporter = std::sync::Arc::clone(&exporter);
        async move {
            let records: Vec<_> = batch.iter().map(|record| (&record.0, &record.1)).collect();
            exporter.export(LogBatch::new(&records)).await.is_ok()
        }
    });
    let provider =
        SdkLoggerProvider::builder().with_resource(resource.clone()).with_log_processor(Written(queue)).build();
    Ok((OpenTelemetryTracingBridge::new(&provider), pipeline))
}

/// Queues each record, with what it belongs to.
#[derive(Debug)]
struct Written(Queue<Record>);

impl LogProcessor for Written {
    fn emit(&self, record: &mut SdkLogRecord, scope: &InstrumentationScope) {
        look(|scope| {
            if !scope.request_id().is_empty() {
                record.add_attribute("request_id", AnyValue::from(scope.request_id().to_owned()));
            }
            if let Some(context) = scope.context() {
                record.set_trace_context(context.trace_id(), context.span_id(), Some(context.trace_flags()));
            }
        });
        self.0.put(Box::new((record.clone(), scope.clone())));
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// How lines look.
struct Lines(LogFormat);

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut line: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let scope = Scope::current();
        match self.0 {
            LogFormat::Json => json(&mut line, event, scope.as_ref())?,
            LogFormat::Text => {
                SystemTime.format_time(&mut line)?;
                write!(line, " {:>5} ", event.metadata().level())?;
                context.format_fields(line.by_ref(), event)?;
                if let Some(scope) = scope {
                    if !scope.request_id().is_empty() {
                        write!(line, " request_id={}", scope.request_id())?;
                    }
                    if let Some(context) = scope.context() {
                        write!(line, " trace_id={}", context.trace_id())?;
                    }
                }
            }
        }
        writeln!(line)
    }
}

fn json(line: &mut Writer<'_>, event: &Event<'_>, scope: Option<&Scope>) -> fmt::Result {
    let mut time = String::new();
    SystemTime.format_time(&mut Writer::new(&mut time))?;
    let metadata = event.metadata();
    let mut members = Members { text: String::from("{"), names_request: false };
    members.add("timestamp", &time);
    members.add("level", metadata.level().as_str());
    event.record(&mut members);
    members.add("target", metadata.target());
    if let Some(scope) = scope {
        if !scope.request_id().is_empty() && !members.names_request {
            members.add("request_id", scope.request_id());
        }
        if let Some(context) = scope.context() {
            members.add("trace_id", &context.trace_id().to_string());
            members.add("span_id", &context.span_id().to_string());
        }
    }
    members.text.push('}');
    line.write_str(&members.text)
}

/// The members of a JSON object, as they are written.
struct Members {
    text: String,
    names_request: bool,
}

impl Members {
    fn add<T: Serialize + ?Sized>(&mut self, name: &str, value: &T) {
        self.names_request |= name == "request_id";
        if self.text.len() > 1 {
            self.text.push(',');
        }
        // A word and a plain value are always JSON.
        let json = |text: serde_json::Result<String>| text.unwrap_or_else(|_| "null".to_owned());
        self.text.push_str(&json(serde_json::to_string(name)));
        self.text.push(':');
        self.text.push_str(&json(serde_json::to_string(value)));
    }
}

impl Visit for Members {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field.name(), &format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field.name(), &value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field.name(), &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field.name(), &value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field.name(), &value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_json_whatever_they_hold() {
        let mut members = Members { text: String::from("{"), names_request: false };
        members.add("message", "a \"word\":\n");
        members.add("number", &7);
        members.add("nothing", &f64::NAN);
        members.text.push('}');
        let read: serde_json::Value = serde_json::from_str(&members.text).unwrap();
        assert_eq!(read, serde_json::json!({"message": "a \"word\":\n", "number": 7, "nothing": null}));
    }
}
