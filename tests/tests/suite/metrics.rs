//! What processes count, and what reads it: the dashboards and rules of `deploy/observability`, and a collector.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::Stdio,
};

use bytes::Bytes;
use paperkey_proto::{
    Contract,
    catalog::v1::{ListProductsRequest, ListProductsResponse},
};
use paperkey_tests::{
    Account, Api, Installation, Kind, Product, Receiver, Redis, Settings,
    collector_metrics::MetricsCollector,
    eventually, grpc,
    leaks::secrets_in,
    metrics::{Metrics, family_of, names_in, promtool},
    on_both_kinds,
};
use prost::Message as _;
use serde_json::{Value, json};

on_both_kinds! {
    every_metric_that_a_dashboard_or_a_rule_names_is_there,
    a_call_is_counted_under_its_rpc_and_its_outcome,
    no_label_tells_of_a_caller,
    what_is_sent_to_receivers_is_counted,
}

const GET_PRODUCT: &str = "paperkey.catalog.v1.CatalogService/GetProduct";

/// What only some installations have numbers of: ways to other processes, room for calls, certificates, a store of
/// limits, a file with one writer. Their names are announced everywhere.
const SOMETIMES: [&str; 9] = [
    "paperkey_channel_",
    "paperkey_places_",
    "paperkey_shed_total",
    "paperkey_certificate_",
    "paperkey_limits_store_",
    "paperkey_limits_gateways",
    "paperkey_db_writer_queue_depth",
    "paperkey_db_group_jobs",
    "paperkey_cache_",
];

fn observability() -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/observability")).to_owned()
}

/// What every process of an installation tells.
async fn told(install: &Installation) -> BTreeMap<String, Metrics> {
    let mut told = BTreeMap::new();
    for name in install.names() {
        let metrics = Metrics::of(&install.operations(&name)).await;
        told.insert(name, metrics);
    }
    told
}

/// What was done, and what must not be found in any label.
struct Traffic {
    words: Vec<String>,
}

/// Calls of every kind: good and bad, over REST, gRPC and gRPC-Web, with keys and without, to no route at all; and what
/// they set off.
async fn traffic(install: &Installation) -> Traffic {
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    owner.subscribe(&product, receiver.url()).await;
    let license = owner.issue(&product, json!({})).await;
    receiver.received(1).await;
    let app = owner.app(&product);
    for _ in 0..3 {
        app.activate(&license, "machine-1").await.gives(200);
        app.validate(&license).await.gives(200);
    }
    owner.get("/products/prod_nobodyknows").await;
    install.api().get("/products").await;
    install.api().get("/nowhere/lic_secret").await;
    install.api().get("/v1/nowhere").await;
    let key = owner.create_key(json!({"name": "Traffic"})).await;
    let keyed = install.api().with_key(&key.token);
    keyed.get("/api/v1/products").await.gives(200);
    let channel = grpc::connect(&install.url()).await;
    let list = "/paperkey.catalog.v1.CatalogService/ListProducts";
    let empty = Bytes::from(ListProductsRequest::default().encode_to_vec());
    grpc::call(&channel, list, empty.clone(), grpc::credential(&key.token)).await.expect("it lists");
    grpc::call(&channel, list, empty, http::HeaderMap::new()).await.expect_err("nobody lists");
    let listed = grpc::web_call(&keyed, list, &ListProductsRequest::default(), false).await;
    listed.gives::<ListProductsResponse>();
    let Account { team_id, live_key, .. } = &owner;
    let Product { id, public_key, .. } = &product;
    let words = [team_id, live_key, id, public_key, &license.id, &license.key, &key.id, "machine-1", "nowhere"];
    Traffic { words: words.iter().map(ToString::to_string).collect() }
}

/// The queries of all dashboards, with where each stands.
fn dashboards() -> Vec<(String, String)> {
    fn walk(value: &Value, place: &str, found: &mut Vec<(String, String)>) {
        match value {
            Value::Object(fields) => {
                for (name, value) in fields {
                    match value {
                        Value::String(query) if name == "expr" || name == "definition" => {
                            found.push((place.to_owned(), query.clone()));
                        }
                        _ => walk(value, place, found),
                    }
                }
            }
            Value::Array(values) => values.iter().for_each(|value| walk(value, place, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(observability().join("grafana/dashboards")).expect("there are dashboards") {
        let path = entry.expect("it can be read").path();
        let dashboard: Value = serde_json::from_slice(&fs::read(&path).expect("it can be read")).expect("it is JSON");
        let place = path.file_name().expect("it has a name").to_string_lossy().into_owned();
        let before = found.len();
        walk(&dashboard, &place, &mut found);
        let shown = dashboard["panels"].as_array().expect("it has panels").iter();
        let panels = shown.filter(|panel| panel["type"] != "row").count();
        assert!(found.len() - before > panels, "{place}: {panels} panels and too few queries");
    }
    found
}

/// A rule, as it stands in the file.
#[derive(Debug, Default)]
struct Rule {
    name: String,
    query: String,
    /// The labels that its texts name.
    shown: BTreeSet<String>,
}

/// The rules. The file is read line by line, as it is written here; that none is missed, the counts tell.
fn rules() -> Vec<Rule> {
    let text = fs::read_to_string(observability().join("alerts.yml")).expect("there are rules");
    let mut rules: Vec<Rule> = Vec::new();
    let mut block = None;
    for line in text.lines() {
        let indent = line.len() - line.trim_start().len();
        if block.is_some_and(|block| indent > block) {
            let rule = rules.last_mut().expect("an expression is of a rule");
            rule.query.push(' ');
            rule.query.push_str(line.trim());
            continue;
        }
        block = None;
        let entry = line.trim_start().trim_start_matches("- ");
        if let Some(name) = entry.strip_prefix("record: ").or_else(|| entry.strip_prefix("alert: ")) {
            rules.push(Rule { name: name.to_owned(), ..Rule::default() });
        } else if let Some(query) = entry.strip_prefix("expr: ") {
            match query {
                "|" => block = Some(indent),
                query => query.clone_into(&mut rules.last_mut().expect("it is of a rule").query),
            }
        }
        if let Some(rule) = rules.last_mut() {
            let shown = line.split("$labels.").skip(1);
            let word = |rest: &str| {
                rest.split(|letter: char| !(letter.is_alphanumeric() || letter == '_')).next().map(str::to_owned)
            };
            rule.shown.extend(shown.filter_map(word));
        }
    }
    let (names, queries) =
        (text.matches("- alert: ").count() + text.matches("- record: ").count(), text.matches("expr: ").count());
    assert!(rules.len() > 20 && rules.len() == names && names == queries, "{} of {names} rules", rules.len());
    assert!(rules.iter().all(|rule| !rule.query.trim().is_empty()));
    rules
}

async fn every_metric_that_a_dashboard_or_a_rule_names_is_there(install: Installation) {
    traffic(&install).await;
    let told = told(&install).await;
    let families: BTreeMap<&str, BTreeSet<&str>> =
        told.values().flat_map(|metrics| &metrics.0).fold(BTreeMap::new(), |mut all, (name, family)| {
            let labels: &mut BTreeSet<&str> = all.entry(name).or_default();
            labels.extend(family.samples.iter().flat_map(|sample| sample.labels.keys().map(String::as_str)));
            all
        });
    let rules = rules();
    let mut queries = dashboards();
    assert!(queries.len() > 80, "{}", queries.len());
    queries.extend(rules.iter().map(|rule| (rule.name.clone(), rule.query.clone())));
    let recorded: BTreeMap<&str, &str> = rules
        .iter()
        .filter(|rule| rule.name.contains(':'))
        .map(|rule| (rule.name.as_str(), rule.query.as_str()))
        .collect();
    // What Prometheus adds itself, and what prometheus.yml does.
    let added = ["job", "instance", "component", "le", "alertstate", "alertname"];
    let (mut wrong, mut used) = (BTreeSet::new(), BTreeSet::new());
    for (place, query) in &queries {
        let named = names_in(query);
        let mut labels: BTreeSet<String> = added.iter().map(|label| (*label).to_owned()).collect();
        let mut sometimes = false;
        for name in &named.metrics {
            let family = family_of(name, |name| families.contains_key(name));
            used.insert(family.to_owned());
            if let Some(known) = families.get(family) {
                labels.extend(known.iter().map(|label| (*label).to_owned()));
                sometimes |= SOMETIMES.iter().any(|prefix| family.starts_with(prefix));
            } else if let Some(of) = recorded.get(name.as_str()) {
                labels.extend(names_in(of).labels);
            } else if !["up", "ALERTS"].contains(&name.as_str()) {
                wrong.insert(format!("{place}: there is no {name}"));
            }
        }
        let shown = rules.iter().find(|rule| rule.name == *place).map(|rule| rule.shown.clone()).unwrap_or_default();
        for label in named.labels.union(&shown).filter(|label| !sometimes && !labels.contains(*label)) {
            wrong.insert(format!("{place}: {query} has no label {label}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    // The other way round: what nobody looks at need not be counted.
    let unused: Vec<_> =
        families.keys().filter(|name| name.starts_with("paperkey_") && !used.contains(**name)).collect();
    let spare = ["paperkey_credential_malformed_total", "paperkey_runtime_workers"];
    assert!(unused.iter().all(|name| spare.contains(name)), "nobody looks at {unused:?}");
}

async fn a_call_is_counted_under_its_rpc_and_its_outcome(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let gateway = install.operations(install.gateway());
    let catalog = install.operations(install.host_of("catalog"));
    let counts = async || {
        let (gateway, catalog) = (Metrics::of(&gateway).await, Metrics::of(&catalog).await);
        let rpc = ("rpc", GET_PRODUCT);
        [
            gateway.sum("paperkey_gateway_calls_total", &[rpc, ("status", "2xx")]),
            gateway.sum("paperkey_gateway_calls_total", &[rpc, ("status", "4xx")]),
            gateway.sum("paperkey_gateway_errors_total", &[rpc, ("status", "404")]),
            gateway.sum("paperkey_gateway_call_duration_seconds_count", &[rpc]),
            catalog.sum("paperkey_rpc_calls_total", &[rpc, ("code", "OK"), ("service", "catalog")]),
            catalog.sum("paperkey_rpc_calls_total", &[rpc, ("code", "NOT_FOUND"), ("service", "catalog")]),
            catalog.sum("paperkey_rpc_duration_seconds_count", &[rpc]),
            catalog.sum("paperkey_rpc_in_flight", &[rpc]),
            gateway.sum("paperkey_gateway_calls_total", &[("rpc", "other"), ("surface", "none"), ("status", "4xx")]),
        ]
    };
    let before = counts().await;
    for _ in 0..3 {
        owner.get(&format!("/products/{}", product.id)).await.gives(200);
    }
    for number in 0..2 {
        owner.get(&format!("/products/prod_missing{number}")).await.gives(404);
    }
    install.api().get("/no/such/page").await;
    let after = counts().await;
    let moved: Vec<String> = after.iter().zip(before).map(|(after, before)| format!("{}", after - before)).collect();
    assert_eq!(moved.join(" "), "3 2 2 5 3 2 5 0 1");

    // Limits decide about each call, and databases are asked.
    let metrics = Metrics::of(&gateway).await;
    assert!(metrics.sum("paperkey_limits_decisions_total", &[("class", "per_ip"), ("outcome", "allowed")]) > 0.0);
    let metrics = Metrics::of(&catalog).await;
    let of = [("service", "catalog"), ("kind", "read")];
    assert!(metrics.sum("paperkey_db_job_duration_seconds_count", &of) > 0.0);
    for (name, metrics) in told(&install).await {
        assert!(metrics.sum("process_resident_memory_bytes", &[]) > 1e6, "{name}");
        assert!(metrics.sum("process_open_fds", &[]) > 3.0, "{name}");
        assert!(
            (metrics.sum("paperkey_build_info", &[("version", env!("CARGO_PKG_VERSION"))]) - 1.0).abs() < 1e-9,
            "{name}"
        );
        let operations = install.operations(&name);
        eventually(&format!("{name} knows that it is ready, and that its databases answer"), || async {
            let metrics = Metrics::of(&operations).await;
            let up = metrics.0["paperkey_db_up"].samples.iter().all(|sample| sample.value > 0.5);
            (up && metrics.sum("paperkey_ready", &[]) > 0.5).then_some(())
        })
        .await;
    }
}

async fn no_label_tells_of_a_caller(install: Installation) {
    let done = traffic(&install).await;
    let contract = Contract::get();
    let rpcs: BTreeSet<&str> = contract.methods().iter().map(|method| method.path.trim_start_matches('/')).collect();
    for name in install.names() {
        let text = install.operations(&name).get("/metrics").await.text();
        assert_eq!(secrets_in(text.as_bytes()), Vec::<String>::new(), "{name}");
        for word in &done.words {
            assert!(!text.contains(word), "{name} tells of {word}");
        }
        let metrics = Metrics::parse(&text);
        let mut series = 0;
        for (family, numbers) in &metrics.0 {
            assert!(numbers.help.ends_with('.') && numbers.help.len() > 5, "{family}: {}", numbers.help);
            assert_eq!(numbers.kind == "counter", family.ends_with("_total"), "{family}");
            series += numbers.samples.len();
            for (label, value) in numbers.samples.iter().flat_map(|sample| &sample.labels) {
                let known = match label.as_str() {
                    "rpc" => value == "other" || rpcs.contains(value.as_str()),
                    "le" => value == "+Inf" || value.parse::<f64>().is_ok(),
                    // Words of ours: short, and without the digits that ids and addresses have.
                    "version" => value == env!("CARGO_PKG_VERSION"),
                    "status" => value.len() == 3,
                    _ => {
                        value.len() <= 60
                            && !value.chars().any(|letter| letter.is_ascii_digit() || "@.= ".contains(letter))
                    }
                };
                assert!(known, "{name}: {family} has {label}={value:?}");
            }
        }
        assert!(series < 20_000, "{name} has {series} numbers");
    }
}

async fn what_is_sent_to_receivers_is_counted(install: Installation) {
    let receiver = Receiver::start().await;
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    owner.subscribe(&product, receiver.url()).await;
    let webhook = install.operations(install.host_of("webhook"));
    let licensing = install.operations(install.host_of("licensing"));
    receiver.answers(500);
    owner.issue(&product, json!({})).await;
    receiver.received(1).await;
    receiver.answers(200);
    let told = |metrics: &Metrics| {
        [
            metrics.sum("paperkey_webhook_attempts_total", &[("outcome", "http_status")]),
            metrics.sum("paperkey_webhook_attempts_total", &[("outcome", "delivered")]),
            metrics.sum("paperkey_webhook_deliveries_total", &[("outcome", "retried")]),
            metrics.sum("paperkey_webhook_deliveries_total", &[("outcome", "delivered")]),
            metrics.sum("paperkey_webhook_attempt_duration_seconds_count", &[("outcome", "delivered")]),
        ]
    };
    eventually("both attempts are counted", || async {
        let counts = told(&Metrics::of(&webhook).await);
        counts.iter().all(|count| *count >= 1.0).then_some(())
    })
    .await;
    // Who is gone for good is paused at once. How many are is looked at every few seconds.
    receiver.answers(410);
    owner.issue(&product, json!({})).await;
    eventually("the pause is counted", || async {
        let metrics = Metrics::of(&webhook).await;
        let paused = metrics.sum("paperkey_webhook_pauses_total", &[]) >= 1.0;
        (paused && metrics.sum("paperkey_webhook_paused_endpoints", &[]) >= 1.0).then_some(())
    })
    .await;
    eventually("the outbox is empty and was not", || async {
        let metrics = Metrics::of(&licensing).await;
        let of = [("service", "licensing"), ("target", "webhook")];
        let empty = metrics.sum("paperkey_outbox_waiting", &of) < 0.5;
        (empty && metrics.sum("paperkey_outbox_delivered_total", &of) >= 1.0).then_some(())
    })
    .await;
}

async fn the_same_is_pushed(kind: Kind) {
    let collector = MetricsCollector::start().await;
    let environment = vec![
        ("PAPERKEY__TELEMETRY__OTLP_ENDPOINT", collector.url()),
        ("OTEL_METRIC_EXPORT_INTERVAL", "200".to_owned()),
    ];
    let settings = Settings { environment, ..Settings::default() };
    let install = match kind {
        Kind::AllInOne => Installation::all_in_one_with(settings).await,
        Kind::Fleet => match Installation::fleet_with(settings).await {
            Some(fleet) => fleet,
            None => return,
        },
    };
    let done = traffic(&install).await;
    for name in install.names() {
        let shown = Metrics::of(&install.operations(&name)).await;
        let service = format!("paperkey-{name}");
        // Whatever is there now is there after the next push.
        let pushed = eventually(&format!("{name} pushes all that it shows"), || async {
            let pushed = collector.of(&service)?;
            let missing = shown.0.iter().any(|(family, numbers)| {
                numbers.samples.iter().any(|sample| {
                    let mut labels = sample.labels.clone();
                    labels.remove("le");
                    let points = pushed.get(family).map(Vec::as_slice).unwrap_or_default();
                    !points.iter().any(|point| point.labels == labels)
                })
            });
            (!missing).then_some(pushed)
        })
        .await;
        let all = format!("{pushed:?}");
        assert_eq!(secrets_in(all.as_bytes()), Vec::<String>::new(), "{name}");
        assert!(done.words.iter().all(|word| !all.contains(word)), "{name}");
    }
    if kind == Kind::Fleet {
        assert_eq!(collector.services().len(), 5, "{:?}", collector.services());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_process_pushes_to_a_collector_what_it_shows() {
    the_same_is_pushed(Kind::AllInOne).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fleet_pushes_to_a_collector_what_it_shows() {
    the_same_is_pushed(Kind::Fleet).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_store_of_limits_is_told_of_and_so_is_its_loss() {
    let Some(mut redis) = Redis::start().await else { return };
    let environment = vec![("PAPERKEY__REDIS__URL", redis.url())];
    let install = Installation::all_in_one_with(Settings { environment, ..Settings::default() }).await;
    let operations = install.operations(install.gateway());
    let up = async |operations: &Api| Metrics::of(operations).await.sum("paperkey_limits_store_up", &[]) > 0.5;
    eventually("the store is there", || async { up(&operations).await.then_some(()) }).await;
    redis.kill();
    eventually("its loss is told", || async {
        install.api().get("/v1/status").await;
        (!up(&operations).await).then_some(())
    })
    .await;
    assert!(Metrics::of(&operations).await.sum("paperkey_limits_store_failures_total", &[]) >= 1.0);
}

#[test]
fn prometheus_takes_the_rules_and_the_configuration() {
    let (folder, tests) = (observability(), concat!(env!("CARGO_MANIFEST_DIR"), "/observability/alerts_test.yml"));
    for arguments in [["check", "rules", "alerts.yml"], ["check", "config", "prometheus.yml"], ["test", "rules", tests]]
    {
        let Some(mut promtool) = promtool() else { return };
        let output = promtool.args(arguments).current_dir(&folder).output().expect("it runs");
        let wrote = [output.stdout, output.stderr].concat();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&wrote));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn prometheus_finds_nothing_wrong_with_the_metrics() {
    let Some(mut promtool) = promtool() else { return };
    let install = Installation::all_in_one().await;
    traffic(&install).await;
    let text = install.operations(install.gateway()).get("/metrics").await.text();
    let mut child = promtool
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    child.stdin.take().expect("it reads").write_all(text.as_bytes()).expect("it reads");
    let output = child.wait_with_output().expect("it ends");
    let wrote = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success() && wrote.trim().is_empty(), "{wrote}");
}

#[test]
fn dashboards_are_found_and_have_what_they_are_chosen_by() {
    let mut uids = BTreeSet::new();
    for entry in fs::read_dir(observability().join("grafana/dashboards")).expect("there are dashboards") {
        let path = entry.expect("it can be read").path();
        let dashboard: Value = serde_json::from_slice(&fs::read(&path).expect("it can be read")).expect("it is JSON");
        let variables = dashboard["templating"]["list"].as_array().expect("it has variables");
        let names: Vec<&str> = variables.iter().filter_map(|variable| variable["name"].as_str()).collect();
        assert!(names.starts_with(&["datasource", "job", "instance"]), "{path:?}: {names:?}");
        let uid = dashboard["uid"].as_str().expect("it has an id");
        assert!(uids.insert(uid.to_owned()), "{uid} is there twice");
        let mut ids = BTreeSet::new();
        for panel in dashboard["panels"].as_array().expect("it has panels") {
            let title = panel["title"].as_str().expect("a panel has a title");
            assert!(ids.insert(panel["id"].as_i64()), "{uid}: {title}");
            if panel["type"] != "row" {
                assert_eq!(panel["datasource"]["uid"], "${datasource}", "{uid}: {title}");
                assert!(panel["fieldConfig"]["defaults"]["unit"].is_string(), "{uid}: {title}");
            }
        }
        // A variable that no panel uses would be chosen for nothing.
        let text = dashboard["panels"].to_string();
        for name in names {
            assert!(text.contains(&format!("${name}")) || text.contains(&format!("${{{name}}}")), "{uid}: {name}");
        }
    }
    assert_eq!(uids.len(), 4, "{uids:?}");
}
