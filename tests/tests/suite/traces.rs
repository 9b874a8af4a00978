//! Traces and log records, as a collector gets them from the running product: one tree from the edge to the receiver of a
//! webhook, and nothing that a collector could do to the product.

use std::{collections::HashMap, time::Duration};

use opentelemetry_proto::tonic::trace::v1::{Span, span::SpanKind};
use paperkey_tests::{
    Collector, Installation, Kind, Receiver, Settings,
    collector::{Seen, attributes_of, hex, text_of},
    eventually,
    leaks::secrets_in,
};
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// The trace that a caller is in already.
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";

fn exporting(to: &str, ratio: &str) -> Settings {
    Settings {
        environment: vec![
            ("PAPERKEY__TELEMETRY__OTLP_ENDPOINT", to.to_owned()),
            ("PAPERKEY__TELEMETRY__TRACE_SAMPLE_RATIO", ratio.to_owned()),
            // What libraries say at this level is searched for secrets too.
            ("PAPERKEY__TELEMETRY__LOG_LEVEL", "debug".to_owned()),
        ],
        ..Settings::default()
    }
}

/// Runs a scenario on both kinds of installation, which `Settings` are made for.
macro_rules! on_both_kinds_exporting {
    ($($scenario:ident),+ $(,)?) => {
        mod all_in_one {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $scenario() {
                    super::$scenario(super::Kind::AllInOne).await;
                }
            )+
        }

        mod fleet {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $scenario() {
                    super::$scenario(super::Kind::Fleet).await;
                }
            )+
        }
    };
}

on_both_kinds_exporting! {
    one_trace_leads_from_the_edge_to_the_receiver_of_a_webhook,
    a_trace_that_a_trusted_peer_is_in_is_gone_on_with,
    strangers_do_not_decide_that_a_trace_is_recorded,
    a_trace_that_a_stranger_names_is_linked_to,
    lines_bear_the_request_that_they_belong_to,
    a_collector_that_hangs_changes_nothing,
    a_collector_that_is_away_changes_nothing,
}

async fn installed(kind: Kind, settings: Settings) -> Option<Installation> {
    match kind {
        Kind::AllInOne => Some(Installation::all_in_one_with(settings).await),
        Kind::Fleet => Installation::fleet_with(settings).await,
    }
}

/// The spans of a trace, by their ids.
fn trace_of(collector: &Collector, trace: &str) -> HashMap<String, Seen<Span>> {
    let spans = collector.spans().into_iter().filter(|span| hex(&span.what.trace_id) == trace);
    spans.map(|span| (hex(&span.what.span_id), span)).collect()
}

fn named<'s>(spans: &'s HashMap<String, Seen<Span>>, name: &str) -> Option<&'s Seen<Span>> {
    spans.values().find(|span| span.what.name == name)
}

/// The way from a span to its root, nearest first.
fn way_up<'s>(spans: &'s HashMap<String, Seen<Span>>, from: &'s Seen<Span>) -> Vec<&'s Seen<Span>> {
    std::iter::successors(Some(from), |span| spans.get(&hex(&span.what.parent_span_id))).collect()
}

async fn one_trace_leads_from_the_edge_to_the_receiver_of_a_webhook(kind: Kind) {
    let collector = Collector::start().await;
    let Some(install) = installed(kind, exporting(collector.url(), "1")).await else { return };
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    owner.subscribe(&product, receiver.url()).await;
    let license = owner.issue(&product, json!({})).await;
    receiver.answers(500);
    let activated = owner.app(&product).activate(&license, "machine-1").await;
    activated.gives(200);
    let request_id = activated.header("x-request-id").unwrap();

    let is_activation = |event: &str| event.contains("activat");
    let first = receiver
        .wait("the activation", |all| all.iter().find(|delivery| is_activation(delivery.event())).cloned())
        .await;
    receiver.answers(200);
    let again = |all: &[paperkey_tests::receiver::Delivery]| {
        all.iter().rfind(|one| one.event_id() == first.event_id() && one.answered == 200).cloned()
    };
    let second = receiver.wait("the activation, again", again).await;
    let parts: Vec<&str> = first.header("traceparent").split('-').collect();
    let [_, trace, span, "01"] = parts.as_slice() else { panic!("{:?}", first.headers) };
    assert!(second.header("traceparent").contains(trace), "a later attempt is a part of the same");
    assert_ne!(first.header("traceparent"), second.header("traceparent"));

    let spans = eventually("the trace is whole", || async {
        let spans = trace_of(&collector, trace);
        let delivered = spans.values().filter(|span| span.what.name.starts_with("deliver ")).count();
        let root = named(&spans, "POST /v1/licenses/activate")?.what.span_id.clone();
        // Each process sends its own part, in its own time.
        let is_whole =
            spans.values().all(|span| way_up(&spans, span).last().is_some_and(|top| top.what.span_id == root));
        (delivered >= 2 && is_whole).then_some(spans)
    })
    .await;
    let root = named(&spans, "POST /v1/licenses/activate").unwrap();
    assert!(root.what.parent_span_id.is_empty());
    assert_eq!(root.what.kind, SpanKind::Server as i32);
    let told = attributes_of(&root.what.attributes);
    assert_eq!(told["http.route"], "/v1/licenses/activate");
    assert_eq!((told["http.request.method"].as_str(), told["http.response.status_code"].as_str()), ("POST", "200"));
    assert_eq!(told["paperkey.team_id"], owner.team_id);
    assert_eq!(told["paperkey.request_id"], request_id);
    // Whoever was reached, the way up ends at the one root.
    for span in spans.values() {
        let top = *way_up(&spans, span).last().unwrap();
        assert_eq!(hex(&top.what.span_id), hex(&root.what.span_id), "{} stands alone", span.what.name);
    }
    let of = |service: &str| match kind {
        Kind::AllInOne => "paperkey-serve".to_owned(),
        Kind::Fleet => format!("paperkey-{service}"),
    };
    let delivery = &spans[*span];
    assert_eq!((delivery.service.as_str(), delivery.what.kind), (of("webhook").as_str(), SpanKind::Client as i32));
    let told = attributes_of(&delivery.what.attributes);
    assert_eq!((told["server.address"].as_str(), told["paperkey.attempt"].as_str()), ("127.0.0.1", "1"));
    assert_eq!(told["http.response.status_code"], "500");
    assert_eq!(told["paperkey.delivery_id"], first.header("x-paperkey-delivery"));
    let way: Vec<&str> = way_up(&spans, delivery).iter().map(|span| span.what.name.as_str()).collect();
    assert!(way.iter().any(|name| name.starts_with("relay ")) && way.iter().any(|name| name.starts_with("take ")));
    assert!(way.contains(&"paperkey.licensing.v1.LicenseCheckService/ActivateLicense"), "{way:?}");
    let statement = spans
        .values()
        .find(|span| span.service == of("licensing") && span.what.name.starts_with("INSERT "))
        .expect("an activation writes a row");
    let told = attributes_of(&statement.what.attributes);
    let system = if kind == Kind::Fleet { "postgresql" } else { "sqlite" };
    assert_eq!((told["db.system.name"].as_str(), told["db.operation.name"].as_str()), (system, "INSERT"));

    let records = eventually("log records have arrived", || async {
        Some(collector.records()).filter(|records| !records.is_empty())
    })
    .await;
    assert!(records.iter().any(|record| text_of(record.what.body.as_ref()) == "listening"));
    // Nothing of what carries the records is a record.
    assert!(!format!("{records:?}").contains("h2::"));
    assert_eq!(secrets_in(&collector.bytes()), Vec::<String>::new());
    let told = String::from_utf8_lossy(&collector.bytes()).into_owned();
    assert!(!told.contains(&owner.email), "an address of mail was exported");
}

async fn a_trace_that_a_trusted_peer_is_in_is_gone_on_with(kind: Kind) {
    let collector = Collector::start().await;
    let mut settings = exporting(collector.url(), "0");
    settings.environment.push(("PAPERKEY__TELEMETRY__TRUSTED_PARENTS", "[\"127.0.0.0/8\"]".to_owned()));
    let Some(install) = installed(kind, settings).await else { return };
    let owner = install.register().await;
    let unrecorded = format!("00-{}-{PARENT}-00", TRACE.replace('0', "1"));
    owner.with("traceparent", &unrecorded).get("/products").await.gives(200);
    let parent = format!("00-{TRACE}-{PARENT}-01");
    owner.with("traceparent", &parent).with("tracestate", "vendor=word").get("/products").await.gives(200);
    let spans = eventually("the trace has arrived", || async {
        let spans = trace_of(&collector, TRACE);
        let listed = spans.values().any(|span| span.what.name.starts_with("SELECT "));
        (listed && named(&spans, "GET /products").is_some()).then_some(spans)
    })
    .await;
    let root = named(&spans, "GET /products").unwrap();
    assert_eq!(hex(&root.what.parent_span_id), PARENT);
    assert!(spans.values().all(|span| span.what.trace_state == "vendor=word"));
    let strays: Vec<_> = collector.spans().into_iter().filter(|span| hex(&span.what.trace_id) != TRACE).collect();
    assert!(strays.is_empty(), "of what nobody asked for nothing is recorded: {strays:?}");
}

async fn strangers_do_not_decide_that_a_trace_is_recorded(kind: Kind) {
    let collector = Collector::start().await;
    let mut settings = exporting(collector.url(), "0");
    // Who is believed of where calls come from is not believed of traces.
    settings.environment.push(("PAPERKEY__SERVER__TRUSTED_PROXIES", "[\"127.0.0.0/8\"]".to_owned()));
    let Some(mut install) = installed(kind, settings).await else { return };
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    owner.subscribe(&product, receiver.url()).await;
    let stranger = owner.with("traceparent", &format!("00-{TRACE}-{PARENT}-01"));
    stranger.post("/licenses", json!({"productId": product.id})).await.gives(201);
    let delivered = receiver.received(1).await;
    assert_eq!(delivered[0].header("traceparent"), "", "what is not recorded is not told of");
    for name in install.names() {
        install.process(&name).terminate().await;
    }
    assert_eq!(collector.spans().len(), 0);
    assert!(!collector.records().is_empty());
}

async fn a_trace_that_a_stranger_names_is_linked_to(kind: Kind) {
    let collector = Collector::start().await;
    let Some(install) = installed(kind, exporting(collector.url(), "1")).await else { return };
    let owner = install.register().await;
    let stranger = owner.with("traceparent", &format!("00-{TRACE}-{PARENT}-01")).with("tracestate", "vendor=word");
    stranger.get("/products").await.gives(200);
    let root = eventually("the span has arrived", || async {
        let is_linked = |span: &Seen<Span>| !span.what.links.is_empty();
        collector.spans().into_iter().find(is_linked)
    })
    .await;
    assert_eq!(root.what.name, "GET /products");
    assert_ne!(hex(&root.what.trace_id), TRACE);
    assert!(root.what.parent_span_id.is_empty());
    let links: Vec<_> = root.what.links.iter().map(|link| (hex(&link.trace_id), hex(&link.span_id))).collect();
    assert_eq!(links, [(TRACE.to_owned(), PARENT.to_owned())]);
    assert_eq!((root.what.trace_state.as_str(), root.what.links[0].trace_state.as_str()), ("", ""));
    assert!(trace_of(&collector, TRACE).is_empty());
}

async fn lines_bear_the_request_that_they_belong_to(kind: Kind) {
    let collector = Collector::start().await;
    let mut settings = exporting(collector.url(), "1");
    settings.environment.push(("PAPERKEY__TELEMETRY__TRUSTED_PARENTS", "[\"127.0.0.0/8\"]".to_owned()));
    let Some(mut install) = installed(kind, settings).await else { return };
    let owner = install.register().await;
    let parent = format!("00-{TRACE}-{PARENT}-01");
    let product = owner.create_product("App").await;
    // Whatever is said while a call is answered bears its ids.
    let answered = owner.with("traceparent", &parent).get(&format!("/products/{}", product.id)).await;
    let request_id = answered.header("x-request-id").unwrap().to_owned();
    eventually("its trace has arrived", || async { trace_of(&collector, TRACE).values().next().map(|_| ()) }).await;
    for name in install.names() {
        install.process(&name).terminate().await;
    }
    let lines: Vec<Value> =
        install.written().iter().filter_map(|(_, line)| serde_json::from_str(&line.text).ok()).collect();
    let spans = trace_of(&collector, TRACE);
    let of_call: Vec<&Value> = lines.iter().filter(|line| line["trace_id"] == TRACE).collect();
    for line in &of_call {
        assert_eq!(line["request_id"], request_id.as_str(), "{line}");
        assert!(spans.contains_key(line["span_id"].as_str().unwrap()), "{line}");
    }
    for record in collector.records().iter().filter(|record| hex(&record.what.trace_id) == TRACE) {
        assert_eq!(attributes_of(&record.what.attributes)["request_id"], request_id);
    }
}

/// Answers are given, and processes end in time.
async fn works(mut install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let license = owner.issue(&product, json!({})).await;
    for number in 0..20 {
        let machine = format!("machine-{number}");
        assert_eq!(owner.app(&product).verdict(&license).await, "valid", "{machine}");
    }
    for name in install.names() {
        let (status, took) = install.process(&name).terminate().await;
        assert!(status.success(), "{name}: {status}");
        // A must: the grace is ten seconds, and of these telemetry may take two.
        assert!(took < Duration::from_secs(20), "{name} took {took:?} to end");
    }
}

async fn a_collector_that_hangs_changes_nothing(kind: Kind) {
    // It takes connections, and never says a word.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let hanging = tokio::spawn(async move {
        let mut taken = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            taken.push(stream);
        }
    });
    if let Some(install) = installed(kind, exporting(&url, "1")).await {
        works(install).await;
    }
    hanging.abort();
}

async fn a_collector_that_is_away_changes_nothing(kind: Kind) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    drop(listener);
    if let Some(install) = installed(kind, exporting(&url, "1")).await {
        works(install).await;
    }
}
