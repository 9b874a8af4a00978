//! Traces: one tree from the edge to the webhook.
//!
//! What a task is doing is its [`Scope`]: the id of the request, and the place in a trace. It is carried from poll to poll
//! and across threads, and is all that a call costs of which no trace is made: spans are only begun below one that is
//! recorded, and names and attributes are only made for these.
//!
//! Whether a trace is recorded is decided once, where a call comes from outside ([`arrive`]), and then holds for all that
//! follows from it, in whichever process. Peers that are trusted with it, and whoever brings our own signed word, have
//! decided already, if they say so. A call of anybody else begins a trace of its own, which is linked to the one that they
//! name: how often strangers are recorded is the ratio's to say, and under which ids is ours.
//!
//! Names are routes and methods of the contract; ids stand in attributes. What an attribute may hold is written here and
//! beside each use: ids of requests, teams and deliveries, hosts, numbers, words of the catalogue. Nothing that is secret.

use std::{
    borrow::Cow,
    convert::Infallible,
    fmt,
    future::Future,
    str::FromStr as _,
    sync::{Arc, OnceLock},
};

use http::{HeaderMap, HeaderValue, Request, Response};
use opentelemetry::{
    Context, KeyValue, Value,
    trace::{
        Span as _, SpanBuilder, SpanContext, SpanId, SpanKind, Status as Outcome, TraceContextExt as _, TraceFlags,
        TraceId, TraceState, Tracer as _, TracerProvider as _,
    },
};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _, WithTonicConfig as _};
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{Sampler, SdkTracer, SdkTracerProvider, Span as Recorded, SpanData, SpanExporter as _, SpanProcessor},
};
use tonic::{Code, Status, transport::Channel};

use super::{
    Problem,
    queue::{EXPORT_TIMEOUT, Pipeline, Queue},
};
use crate::db::Engine;

const TRACEPARENT: &str = "traceparent";
const TRACESTATE: &str = "tracestate";

/// The longest `tracestate` that is taken over.
const MAX_TRACESTATE: usize = 512;

tokio::task_local! {
    static CURRENT: Scope;
}

/// How traces are made, in a process that exports them.
static TRACING: OnceLock<Tracing> = OnceLock::new();

struct Tracing {
    tracer: SdkTracer,
    ratio: f64,
}

impl Tracing {
    /// Whether a trace that begins here is recorded.
    fn draw(&self) -> bool {
        rand::random::<f64>() < self.ratio
    }
}

/// Traces from now on. Only the first call of a process counts.
pub(super) fn start(tracer: SdkTracer, ratio: f64) {
    let _ = TRACING.set(Tracing { tracer, ratio });
}

/// What makes spans, and sends them.
pub(super) fn exporter(channel: Channel, resource: &Resource) -> Result<(SdkTracer, Pipeline), Problem> {
    let mut exporter =
        SpanExporter::builder().with_tonic().with_channel(channel).with_timeout(EXPORT_TIMEOUT).build()?;
    exporter.set_resource(resource);
    let exporter = Arc::new(exporter);
    let (queue, pipeline) = Queue::start("spans", move |batch: Vec<SpanData>| {
        let exporter = Arc::clone(&exporter);
        async move { exporter.export(batch).await.is_ok() }
    });
    let provider = SdkTracerProvider::builder()
        .with_resource(resource.clone())
        // Nothing is begun that is not to be recorded.
        .with_sampler(Sampler::AlwaysOn)
        .with_span_processor(Ended(queue))
        .build();
    Ok((provider.tracer("paperkey"), pipeline))
}

/// Queues each span when it has ended.
#[derive(Debug)]
struct Ended(Queue<SpanData>);

impl SpanProcessor for Ended {
    fn on_start(&self, _: &mut Recorded, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        self.0.put(span);
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: std::time::Duration) -> OTelSdkResult {
        Ok(())
    }
}

/// What a task is doing: for which request, and where in which trace. Clones are the same.
#[derive(Clone)]
pub struct Scope(Arc<Place>);

struct Place {
    request_id: Box<str>,
    context: SpanContext,
    /// Whether spans are begun below it.
    recorded: bool,
}

impl fmt::Debug for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Scope").field(&self.0.request_id).field(&self.0.context).finish()
    }
}

impl Scope {
    fn new(request_id: &str, context: SpanContext, recorded: bool) -> Self {
        Self(Arc::new(Place { request_id: request_id.into(), context, recorded }))
    }

    /// What this task is doing.
    pub fn current() -> Option<Self> {
        CURRENT.try_with(Clone::clone).ok()
    }

    /// Does something as a part of it, on this thread.
    pub fn enter<T>(self, work: impl FnOnce() -> T) -> T {
        CURRENT.sync_scope(self, work)
    }

    /// Does something as a part of it.
    pub fn within<F: Future>(self, work: F) -> impl Future<Output = F::Output> + use<F> {
        CURRENT.scope(self, work)
    }

    /// The request; empty outside of any.
    pub fn request_id(&self) -> &str {
        &self.0.request_id
    }

    /// The place in a trace, if there is one.
    pub(super) fn context(&self) -> Option<&SpanContext> {
        Some(&self.0.context).filter(|context| context.is_valid())
    }
}

/// Looks at what this task is doing.
pub(super) fn look<T>(at: impl FnOnce(&Scope) -> T) -> Option<T> {
    CURRENT.try_with(at).ok()
}

/// The place in a trace, where it is recorded.
fn recorded() -> Option<Scope> {
    look(|scope| scope.0.recorded.then(|| scope.clone())).flatten()
}

/// A task of its own that goes on with what this one is doing.
pub fn carried<F: Future>(work: F) -> impl Future<Output = F::Output> {
    let scope = Scope::current().unwrap_or_else(|| Scope::new("", SpanContext::NONE, false));
    scope.within(work)
}

/// Work on another thread that goes on with what this task is doing.
pub fn scoped<T>(work: impl FnOnce() -> T) -> impl FnOnce() -> T {
    let scope = Scope::current();
    move || match scope {
        Some(scope) => scope.enter(work),
        None => work(),
    }
}

/// A span, or nothing where nothing is recorded. It ends when it goes.
#[derive(Default)]
pub struct Span(Option<Box<Begun>>);

struct Begun {
    span: Recorded,
    scope: Scope,
}

impl fmt::Debug for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Span").field(&self.scope()).finish()
    }
}

impl Span {
    fn begin(kind: SpanKind, name: impl Into<Cow<'static, str>>, parent: &SpanContext, request_id: &str) -> Self {
        let Some(tracing) = TRACING.get() else { return Self(None) };
        let parent = Context::new().with_remote_span_context(parent.clone());
        let span = tracing.tracer.build_with_context(SpanBuilder::from_name(name).with_kind(kind), &parent);
        let scope = Scope::new(request_id, span.span_context().clone(), true);
        Self(Some(Box::new(Begun { span, scope })))
    }

    /// A span below what this task is doing.
    fn below(kind: SpanKind, name: impl FnOnce() -> Cow<'static, str>) -> Self {
        recorded().map_or_else(Self::default, |scope| Self::begin(kind, name(), &scope.0.context, scope.request_id()))
    }

    /// Whether it is recorded.
    pub fn is_recorded(&self) -> bool {
        self.0.is_some()
    }

    /// What is done below it.
    pub fn scope(&self) -> Option<Scope> {
        self.0.as_ref().map(|begun| begun.scope.clone())
    }

    /// Says that it has to do with another trace, of which only the ids are told.
    fn link(&mut self, other: &SpanContext) {
        if let Some(begun) = &mut self.0 {
            let (trace, span) = (other.trace_id(), other.span_id());
            let other = SpanContext::new(trace, span, TraceFlags::NOT_SAMPLED, true, TraceState::NONE);
            begun.span.add_link(other, Vec::new());
        }
    }

    /// Names it, now that more is known.
    pub fn name(&mut self, name: impl FnOnce() -> String) {
        if let Some(begun) = &mut self.0 {
            begun.span.update_name(name());
        }
    }

    /// Says something of it. The value is only made where somebody reads it, and must be nothing that is secret.
    pub fn set<V: Into<Value>>(&mut self, key: &'static str, value: impl FnOnce() -> V) {
        if let Some(begun) = &mut self.0 {
            begun.span.set_attribute(KeyValue::new(key, value()));
        }
    }

    /// It failed, in a word that is no secret and one of few.
    pub fn failed(&mut self, why: impl FnOnce() -> Cow<'static, str>) {
        if let Some(begun) = &mut self.0 {
            begun.span.set_attribute(KeyValue::new("error.type", Value::from(why())));
            begun.span.set_status(Outcome::error(""));
        }
    }

    /// The place of this span, for whoever goes on with it later or elsewhere; empty where it is not recorded.
    pub fn traceparent(&self) -> String {
        self.0.as_ref().map(|begun| written(&begun.scope.0.context)).unwrap_or_default()
    }

    /// Waits for the answer of a gRPC call as a part of this span, and ends with it.
    pub async fn around<B, E: Refusal>(
        mut self,
        call: impl Future<Output = Result<Response<B>, E>>,
    ) -> Result<Response<B>, E> {
        let Some(scope) = self.scope() else { return call.await };
        let answer = scope.within(call).await;
        self.answered(match &answer {
            Ok(response) => Status::from_header_map(response.headers()).map_or(Code::Ok, |status| status.code()),
            Err(error) => error.code(),
        });
        answer
    }

    /// The code that a gRPC call was answered with.
    pub fn answered(&mut self, code: Code) {
        self.set("rpc.response.status_code", || word(code));
        let is_fault = matches!(
            code,
            Code::Unknown
                | Code::DeadlineExceeded
                | Code::Unimplemented
                | Code::Internal
                | Code::Unavailable
                | Code::DataLoss
        );
        if is_fault {
            self.failed(|| word(code).into());
        }
    }
}

/// What a call fails with that has no answer.
pub trait Refusal {
    /// The code that it stands for.
    fn code(&self) -> Code;
}

impl Refusal for Status {
    fn code(&self) -> Code {
        self.code()
    }
}

impl Refusal for Infallible {
    fn code(&self) -> Code {
        match *self {}
    }
}

/// What a request from outside is, and its span. The trace that it names is gone on with where it comes from somebody
/// trusted, and so is their word on recording. A stranger's is linked to, by a trace of our own.
pub fn arrive(request_id: &str, headers: &HeaderMap, is_trusted: bool) -> (Scope, Span) {
    let named = incoming(headers);
    let (incoming, stranger) = if is_trusted { (named, None) } else { (None, named) };
    let records = match (TRACING.get(), &incoming) {
        (None, _) => false,
        (Some(_), Some(context)) => context.is_sampled(),
        (Some(tracing), None) => tracing.draw(),
    };
    let incoming = incoming.unwrap_or(SpanContext::NONE);
    if records {
        let mut span = Span::begin(SpanKind::Server, "request", &incoming, request_id);
        if let Some(stranger) = stranger {
            span.link(&stranger);
        }
        if let Some(scope) = span.scope() {
            return (scope, span);
        }
    }
    (Scope::new(request_id, incoming, false), Span::default())
}

/// How a call came to a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From somebody in this process.
    Within,
    /// From another process of the installation.
    Hop,
    /// From somebody with a credential.
    Direct,
}

/// What a call to a service is, and its span; nothing where it goes on as a part of what the task is doing anyway.
pub fn serve(
    method: Option<&str>,
    direction: Direction,
    request_id: &str,
    headers: &HeaderMap,
) -> Option<(Scope, Span)> {
    let (mut span, scope) = match (Scope::current(), direction) {
        (Some(current), _) if current.0.recorded => {
            let span = Span::begin(SpanKind::Internal, "call", &current.0.context, request_id);
            (span, current)
        }
        (Some(current), _) if current.request_id() == request_id => return None,
        (Some(current), _) => (Span::default(), Scope::new(request_id, current.0.context.clone(), false)),
        (None, Direction::Direct) => {
            // Whoever has a credential is a stranger like those who come to the gateway.
            let (scope, span) = arrive(request_id, headers, false);
            (span, scope)
        }
        (None, _) => {
            let context = incoming(headers);
            if context.is_none() && request_id.is_empty() {
                return None;
            }
            let context = context.unwrap_or(SpanContext::NONE);
            let span = if context.is_sampled() {
                Span::begin(SpanKind::Server, "call", &context, request_id)
            } else {
                Span::default()
            };
            (span, Scope::new(request_id, context, false))
        }
    };
    let scope = span.scope().unwrap_or(scope);
    if span.is_recorded() {
        // What stands outside of the contract may be called anything.
        describe_rpc(&mut span, method.unwrap_or("_OTHER"));
        if !request_id.is_empty() {
            span.set("paperkey.request_id", || request_id.to_owned());
        }
    }
    Some((scope, span))
}

/// The span of a call to another process, which is told of it.
pub fn hop<B>(request: &mut Request<B>) -> Span {
    let mut span = Span::below(SpanKind::Client, || "call".into());
    if span.is_recorded() {
        let method = request.uri().path().to_owned();
        describe_rpc(&mut span, &method);
    }
    match span.scope() {
        Some(scope) => scope.enter(|| inject(request.headers_mut())),
        None => inject(request.headers_mut()),
    }
    span
}

fn describe_rpc(span: &mut Span, path: &str) {
    let method = path.trim_start_matches('/');
    span.name(|| method.to_owned());
    span.set("rpc.system.name", || "grpc");
    span.set("rpc.method", || method.to_owned());
}

/// A span that goes on with a trace that was kept; nothing where none was.
pub fn continued(kept: &str, kind: SpanKind, name: impl FnOnce() -> String) -> Span {
    if kept.is_empty() || TRACING.get().is_none() {
        return Span::default();
    }
    match read(kept, TraceState::NONE).filter(SpanContext::is_sampled) {
        Some(context) => Span::begin(kind, name(), &context, ""),
        None => Span::default(),
    }
}

/// The span of one statement. Of its text only what it does and to which table is told, never a value.
pub fn statement(engine: Engine, service: &'static str, sql: &str) -> Span {
    let Some(scope) = recorded() else { return Span::default() };
    let (operation, table) = summary(sql);
    let name = if table.is_empty() { operation.to_owned() } else { format!("{operation} {table}") };
    let mut span = Span::begin(SpanKind::Client, name.clone(), &scope.0.context, scope.request_id());
    span.set("db.system.name", || match engine {
        Engine::Sqlite => "sqlite",
        Engine::Postgres => "postgresql",
    });
    span.set("db.namespace", || service);
    span.set("db.operation.name", || operation);
    span.set("db.query.summary", || name);
    span
}

/// What a statement does, and the first table that it names.
fn summary(sql: &str) -> (&'static str, &str) {
    let mut words = sql.split(|c: char| c.is_whitespace() || "(),;\"".contains(c)).filter(|word| !word.is_empty());
    let operation = words.next().unwrap_or_default();
    let known = ["SELECT", "INSERT", "UPDATE", "DELETE", "WITH", "COMMIT", "CREATE", "ALTER", "DROP"];
    let operation = known.into_iter().find(|known| known.eq_ignore_ascii_case(operation)).unwrap_or("SQL");
    let is_before = |word: &str| ["FROM", "INTO", "UPDATE"].iter().any(|known| known.eq_ignore_ascii_case(word));
    let table = match operation {
        "UPDATE" => words.next(),
        "SELECT" | "INSERT" | "DELETE" | "WITH" => words.find(|word| is_before(word)).and_then(|_| words.next()),
        _ => None,
    };
    let plain = |table: &&str| table.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_' || byte == b'.');
    (operation, table.filter(plain).unwrap_or_default())
}

/// Whether this process exports traces.
pub fn exports() -> bool {
    TRACING.get().is_some()
}

/// A verb of HTTP, where it is one of those that everybody knows: others could be anything.
pub fn verb(verb: &http::Method) -> &'static str {
    let known = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"];
    known.into_iter().find(|known| verb == known).unwrap_or("_OTHER")
}

/// The place in a trace, for whoever goes on with it later; empty where it is not recorded.
pub fn traceparent() -> String {
    look(|scope| scope.context().filter(|context| context.is_sampled()).map(written)).flatten().unwrap_or_default()
}

/// Tells whoever is called of the trace that the call is a part of, and of none that somebody else has claimed.
pub fn inject(headers: &mut HeaderMap) {
    let told = look(|scope| scope.context().map(|context| (written(context), context.trace_state().header())));
    let Some((parent, state)) = told.flatten() else {
        headers.remove(TRACEPARENT);
        headers.remove(TRACESTATE);
        return;
    };
    for (name, text) in [(TRACEPARENT, parent), (TRACESTATE, state)] {
        match HeaderValue::try_from(text) {
            Ok(value) if !value.is_empty() => drop(headers.insert(name, value)),
            _ => drop(headers.remove(name)),
        }
    }
}

/// The trace that a request says it is a part of.
fn incoming(headers: &HeaderMap) -> Option<SpanContext> {
    let text = only(headers, TRACEPARENT)?;
    let state = only(headers, TRACESTATE).filter(|state| state.len() <= MAX_TRACESTATE);
    let state = state.and_then(|state| TraceState::from_str(state).ok()).unwrap_or(TraceState::NONE);
    read(text, state)
}

fn only<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    let mut values = headers.get_all(name).iter();
    match (values.next(), values.next()) {
        (Some(value), None) => value.to_str().ok(),
        _ => None,
    }
}

/// Reads a `traceparent` as W3C writes it. Of versions that are not known yet, what is known counts.
fn read(text: &str, state: TraceState) -> Option<SpanContext> {
    let hex = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    };
    let mut parts = text.split('-');
    let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let sound = hex(version, 2) && version != "ff" && hex(trace, 32) && hex(span, 16) && hex(flags, 2);
    if !sound || (version == "00" && parts.next().is_some()) {
        return None;
    }
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?) & TraceFlags::SAMPLED;
    let context = SpanContext::new(TraceId::from_hex(trace).ok()?, SpanId::from_hex(span).ok()?, flags, true, state);
    context.is_valid().then_some(context)
}

fn written(context: &SpanContext) -> String {
    format!("00-{}-{}-{:02x}", context.trace_id(), context.span_id(), context.trace_flags().to_u8())
}

/// A code as gRPC spells it.
fn word(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    fn headers(parent: &str, state: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(TRACEPARENT, parent.parse().unwrap());
        headers.insert(TRACESTATE, state.parse().unwrap());
        headers
    }

    #[test]
    fn what_is_read_is_written_again() {
        assert_eq!(read(PARENT, TraceState::NONE).map(|context| written(&context)).as_deref(), Some(PARENT));
        let later = "cc-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-what-comes-later";
        assert_eq!(read(later, TraceState::NONE).map(|context| written(&context)).as_deref(), Some(PARENT));
    }

    #[test]
    fn nonsense_is_no_trace() {
        for text in [
            "",
            "00",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
            "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
            "00-00000000000000000000000000000000-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
            "00-+af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-1",
        ] {
            assert!(read(text, TraceState::NONE).is_none(), "{text}");
        }
        let mut twice = headers(PARENT, "a=b");
        twice.append(TRACEPARENT, PARENT.parse().unwrap());
        assert!(incoming(&twice).is_none());
    }

    #[test]
    fn a_stranger_says_neither_which_trace_it_is_nor_that_it_is_recorded() {
        let headers = headers(PARENT, "vendor=word");
        let (trusted, _) = arrive("req_1", &headers, true);
        assert_eq!(trusted.context().map(written).as_deref(), Some(PARENT));
        let (stranger, _) = arrive("req_1", &headers, false);
        assert!(stranger.context().is_none(), "{stranger:?}");
    }

    #[test]
    fn who_is_called_is_told_of_our_trace_and_of_no_other() {
        let mut claimed = headers(PARENT, "a=b");
        inject(&mut claimed);
        assert!(claimed.is_empty());
        let (scope, span) = arrive("req_1", &headers(PARENT, "a=b"), true);
        assert!(!span.is_recorded(), "nothing is exported here");
        let mut told = HeaderMap::new();
        scope.enter(|| inject(&mut told));
        assert_eq!(told, headers(PARENT, "a=b"));
    }

    #[test]
    fn of_a_statement_only_what_it_does_and_to_what_is_told() {
        for (sql, told) in [
            ("SELECT seq, id FROM outbox WHERE target = $1", ("SELECT", "outbox")),
            ("INSERT INTO \"licenses\" (\"id\") VALUES ($1)", ("INSERT", "licenses")),
            ("update deliveries SET x = 'secret'", ("UPDATE", "deliveries")),
            ("DELETE FROM outbox WHERE seq IN ($1)", ("DELETE", "outbox")),
            ("WITH picked AS (SELECT id FROM deliveries) UPDATE", ("WITH", "deliveries")),
            ("SELECT 'K7WX9' ", ("SELECT", "")),
            ("SELECT 1 FROM 'K7WX9'", ("SELECT", "")),
            ("nonsense", ("SQL", "")),
            ("", ("SQL", "")),
        ] {
            assert_eq!(summary(sql), told, "{sql}");
        }
    }

    #[tokio::test]
    async fn what_a_task_is_doing_goes_on_in_others() {
        let (scope, _) = arrive("req_1", &headers(PARENT, "a=b"), true);
        let seen = || Scope::current().map(|scope| scope.request_id().to_owned());
        assert_eq!(seen(), None);
        let (task, thread) = scope
            .within(async move {
                let task = tokio::spawn(carried(async move { seen() }));
                let thread = tokio::task::spawn_blocking(scoped(seen));
                (task.await.unwrap(), thread.await.unwrap())
            })
            .await;
        assert_eq!((task.as_deref(), thread.as_deref()), (Some("req_1"), Some("req_1")));
        assert_eq!(seen(), None);
    }
}
