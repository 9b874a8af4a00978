//! What ships the product, held to what those say who run it, to itself, and to the product: manifests, compose files, the
//! image, units, certificates; and the proxies of `deploy/proxies`, running before an installation.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
    time::Duration,
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use paperkey_proto::{
    auth::v1::{GetStatusRequest, status_service_client::StatusServiceClient},
    errors::v1::Reason,
    webhook::v1::{WatchEventsRequest, webhook_service_client::WebhookServiceClient},
};
use paperkey_tests::{
    Installation, Settings,
    deploy::{Edge, PUBLIC_NAME, Readers, certificates, ends, shipped},
    grpc,
    metrics::Metrics,
    on_both_kinds,
    people::text,
    process::{self, Ended},
    wait::eventually,
};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _},
    server::WebPkiClientVerifier,
};
use serde_json::{Value, json};
use tempfile::TempDir;

on_both_kinds! {
    a_process_is_asked_whether_it_is_ready_by_a_command,
}

const ROLES: [&str; 5] = ["gateway", "auth", "catalog", "licensing", "webhook"];
const OVERLAYS: [&str; 2] = ["example", "production"];

/// What the workspace is below.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn key(byte: u8) -> String {
    BASE64.encode([byte; 32])
}

fn secrets() -> String {
    format!(
        "master_key={}\npepper={}\nsigning_key={}\ndatabase_password=a\nredis_password=b\n\
         database_url=postgres://paperkey:a@postgres:5432/paperkey\nredis_url=redis://:b@redis:6379\n",
        key(1),
        key(2),
        key(3)
    )
}

/// The variables that `.env.example` asks for.
fn variables() -> Vec<(&'static str, String)> {
    vec![
        ("PAPERKEY_DOMAIN", PUBLIC_NAME.to_owned()),
        ("PAPERKEY_MASTER_KEY", key(1)),
        ("PAPERKEY_PEPPER", key(2)),
        ("PAPERKEY_SIGNING_KEY", key(3)),
        ("PAPERKEY_DATABASE_PASSWORD", "a".to_owned()),
        ("PAPERKEY_REDIS_PASSWORD", "b".to_owned()),
        ("PAPERKEY_GRAFANA_PASSWORD", "c".to_owned()),
    ]
}

fn borrowed<'a>(variables: &'a [(&'static str, String)]) -> Vec<(&'a str, &'a str)> {
    variables.iter().map(|(name, value)| (*name, value.as_str())).collect()
}

/// Every file below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
        if entry.path().is_dir() {
            found.extend(files(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

/// The members of an array that may be absent.
fn each(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn words(value: &Value) -> Vec<String> {
    each(value).map(|word| word.as_str().unwrap().to_owned()).collect()
}

/// Whether a configuration is one that the binary takes.
async fn check(arguments: &[String], environment: &[(String, String)], folder: &Path) -> Ended {
    // What a process is told beside its part.
    let flags: Vec<_> = arguments.iter().skip_while(|word| !word.starts_with("--")).cloned().collect();
    let arguments = [vec!["config".to_owned(), "check".to_owned()], flags].concat();
    process::run(process::command(&arguments, environment, folder), "").await
}

#[tokio::test]
async fn every_yaml_is_read_strictly() {
    let Some(readers) = Readers::installed() else { return };
    let is_yaml = |file: &PathBuf| file.extension().is_some_and(|extension| extension == "yml" || extension == "yaml");
    let found: Vec<_> = files(&shipped("")).into_iter().filter(is_yaml).collect();
    assert!(found.len() > 15, "{found:?}");
    readers.yaml(&found).await;
}

// --- Kubernetes ------------------------------------------------------------------------------------------------------

/// A rendered overlay, by kind and name.
struct Cluster(BTreeMap<(String, String), Value>);

impl Cluster {
    async fn rendered(readers: &Readers, overlay: &str) -> Self {
        let mut all = BTreeMap::new();
        for manifest in readers.rendered(overlay, &secrets()).await {
            let name = (text(&manifest, "/kind"), text(&manifest, "/metadata/name"));
            assert!(
                name.0 == "Namespace" || manifest["metadata"]["namespace"] == "paperkey",
                "{name:?} is in no namespace"
            );
            assert!(all.insert(name.clone(), manifest).is_none(), "{name:?} is there twice");
        }
        Self(all)
    }

    fn of(&self, kind: &str) -> Vec<(&str, &Value)> {
        self.0.iter().filter(|((it, _), _)| it == kind).map(|((_, name), manifest)| (name.as_str(), manifest)).collect()
    }

    fn get(&self, kind: &str, name: &str) -> &Value {
        self.0.get(&(kind.to_owned(), name.to_owned())).unwrap_or_else(|| panic!("there is no {kind} {name}"))
    }

    /// What makes pods: its name, itself, and what they are made by.
    fn workloads(&self) -> Vec<(&str, &Value, &Value)> {
        ["Deployment", "StatefulSet", "Job"]
            .into_iter()
            .flat_map(|kind| self.of(kind))
            .map(|(name, it)| (name, it, &it["spec"]["template"]))
            .collect()
    }

    /// The pods that a selector matches, by the names of what makes them.
    fn matched(&self, selector: &Value) -> Vec<&str> {
        let pods = self.workloads();
        pods.into_iter().filter(|(_, _, pod)| matches(selector, &pod["metadata"]["labels"])).map(|it| it.0).collect()
    }

    /// The number or name of a port, as pods of that name know it.
    fn port(&self, pod: &str, port: &Value) -> Option<u64> {
        let (_, _, template) = self.workloads().into_iter().find(|(name, _, _)| *name == pod)?;
        let ports = each(&template["spec"]["containers"]).flat_map(|container| each(&container["ports"]));
        let mut found = ports.filter(|known| &known["name"] == port || &known["containerPort"] == port);
        found.find_map(|known| known["containerPort"].as_u64())
    }
}

fn matches(selector: &Value, labels: &Value) -> bool {
    let label = |key: &str| labels[key].as_str();
    let equal =
        selector["matchLabels"].as_object().into_iter().flatten().all(|(key, value)| label(key) == value.as_str());
    let in_them = each(&selector["matchExpressions"]).all(|expression| {
        assert_eq!(expression["operator"], "In");
        let value = label(expression["key"].as_str().unwrap());
        value.is_some_and(|value| words(&expression["values"]).iter().any(|it| it == value))
    });
    equal && in_them
}

#[tokio::test]
async fn manifests_are_as_kubernetes_knows_them_and_fit_together() {
    let Some(readers) = Readers::installed() else { return };
    for overlay in OVERLAYS {
        let cluster = Cluster::rendered(&readers, overlay).await;
        for role in ROLES {
            let (_, it, _) = cluster.workloads().into_iter().find(|(name, _, _)| *name == role).unwrap();
            // How many there are is the autoscaler's to say; without a number there is one, until it has looked.
            assert!(it["spec"]["replicas"].is_null(), "{role}");
            assert_eq!(cluster.get("HorizontalPodAutoscaler", role)["spec"]["minReplicas"], 2);
            assert_eq!(cluster.get("HorizontalPodAutoscaler", role)["spec"]["scaleTargetRef"]["kind"], it["kind"]);
            assert_eq!(cluster.get("PodDisruptionBudget", role)["spec"]["minAvailable"], 1);
            assert_eq!(cluster.matched(&cluster.get("PodDisruptionBudget", role)["spec"]["selector"]), [role]);
        }
        for (name, it, pod) in cluster.workloads() {
            let at = format!("{overlay}: {name}");
            if it["kind"] != "Job" {
                assert!(matches(&it["spec"]["selector"], &pod["metadata"]["labels"]), "{at}");
            }
            if it["kind"] == "StatefulSet" {
                let service = cluster.get("Service", it["spec"]["serviceName"].as_str().unwrap());
                assert_eq!(service["spec"]["clusterIP"], "None", "{at}");
            }
            refers_to_what_is_there(&cluster, &at, it, &pod["spec"]);
            for spread in each(&pod["spec"]["topologySpreadConstraints"]) {
                assert_eq!(cluster.matched(&spread["labelSelector"]), [name], "{at}");
            }
        }
        for (name, service) in cluster.of("Service") {
            let selector = json!({"matchLabels": service["spec"]["selector"]});
            let pods = cluster.matched(&selector);
            assert_eq!(pods.len(), 1, "{overlay}: the Service {name} leads to {pods:?}");
            for port in each(&service["spec"]["ports"]) {
                assert!(cluster.port(pods[0], &port["targetPort"]).is_some(), "{overlay}: {name} {port}");
            }
        }
        for (name, ingress) in cluster.of("Ingress") {
            for path in each(&ingress["spec"]["rules"]).flat_map(|rule| each(&rule["http"]["paths"])) {
                let backend = &path["backend"]["service"];
                let service = cluster.get("Service", backend["name"].as_str().unwrap());
                let ports: Vec<_> = each(&service["spec"]["ports"]).map(|port| &port["name"]).collect();
                assert!(ports.contains(&&backend["port"]["name"]), "{overlay}: {name}");
            }
        }
        // What nobody runs is not left behind.
        let accounts: BTreeSet<_> = cluster.of("ServiceAccount").into_iter().map(|(name, _)| name).collect();
        assert_eq!(accounts, ROLES.into_iter().chain(["migrate"]).collect());
    }
}

fn refers_to_what_is_there(cluster: &Cluster, at: &str, it: &Value, pod: &Value) {
    let claims = each(&it["spec"]["volumeClaimTemplates"]).map(|claim| &claim["metadata"]["name"]);
    let volumes: BTreeSet<_> =
        each(&pod["volumes"]).map(|volume| &volume["name"]).chain(claims).map(|it| it.as_str().unwrap()).collect();
    let has = |kind: &str, name: &Value, key: &str| {
        let held = cluster.get(kind, name.as_str().unwrap());
        assert!(!held["data"][key].is_null(), "{at}: the {kind} {name} has no {key}");
    };
    for volume in each(&pod["volumes"]) {
        if let Some(name) = volume["secret"]["secretName"].as_str() {
            let made = cluster.of("Certificate").into_iter().any(|(_, it)| it["spec"]["secretName"] == name);
            for item in each(&volume["secret"]["items"]) {
                has("Secret", &volume["secret"]["secretName"], item["key"].as_str().unwrap());
            }
            assert!(made || cluster.0.contains_key(&("Secret".to_owned(), name.to_owned())), "{at}: {name}");
        }
        if let Some(name) = volume["configMap"]["name"].as_str() {
            cluster.get("ConfigMap", name);
        }
    }
    for container in each(&pod["containers"]) {
        for mount in each(&container["volumeMounts"]) {
            assert!(volumes.contains(mount["name"].as_str().unwrap()), "{at}: {mount}");
        }
        for variable in each(&container["env"]) {
            let from = &variable["valueFrom"]["secretKeyRef"];
            if !from.is_null() {
                has("Secret", &from["name"], from["key"].as_str().unwrap());
            }
        }
        let ports: Vec<_> = each(&container["ports"]).map(|port| &port["name"]).collect();
        for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
            let port = &container[probe]["httpGet"]["port"];
            assert!(port.is_null() || ports.contains(&port), "{at}: {probe} asks at {port}");
        }
    }
    if let Some(account) = pod["serviceAccountName"].as_str() {
        assert_eq!(cluster.get("ServiceAccount", account)["automountServiceAccountToken"], false, "{at}");
    }
}

#[tokio::test]
async fn every_pod_may_do_no_more_than_it_must() {
    let Some(readers) = Readers::installed() else { return };
    for overlay in OVERLAYS {
        let cluster = Cluster::rendered(&readers, overlay).await;
        let labels = &cluster.get("Namespace", "paperkey")["metadata"]["labels"];
        assert_eq!(labels["pod-security.kubernetes.io/enforce"], "restricted");
        for (name, it, pod) in cluster.workloads() {
            let (at, pod) = (format!("{overlay}: {name}"), &pod["spec"]);
            assert_eq!(pod["automountServiceAccountToken"], false, "{at}");
            assert_eq!(pod["securityContext"]["runAsNonRoot"], true, "{at}");
            assert_eq!(pod["securityContext"]["seccompProfile"]["type"], "RuntimeDefault", "{at}");
            for container in each(&pod["containers"]) {
                let may = &container["securityContext"];
                assert_eq!(may["allowPrivilegeEscalation"], false, "{at}");
                assert_eq!(may["readOnlyRootFilesystem"], true, "{at}");
                assert_eq!(may["capabilities"], json!({"drop": ["ALL"]}), "{at}");
                assert!(container["resources"]["limits"]["memory"].is_string(), "{at}");
                let image = container["image"].as_str().unwrap();
                let tag = image.rsplit('/').next().unwrap().split_once(':').map(|(_, tag)| tag);
                assert!(tag.is_some_and(|tag| tag != "latest"), "{at}: {image} is not pinned");
                if ROLES.contains(&name) {
                    assert_eq!(container["readinessProbe"]["httpGet"]["path"], "/readyz", "{at}");
                    assert_eq!(container["livenessProbe"]["httpGet"]["path"], "/healthz", "{at}");
                }
            }
            let waits = pod["topologySpreadConstraints"].as_array().map_or(0, Vec::len);
            assert!(it["kind"] == "Job" || !ROLES.contains(&name) || waits == 2, "{at}");
        }
        // A gateway has no database, and so it is given no way into one.
        let gateway = cluster.get("StatefulSet", "gateway").to_string();
        assert!(!gateway.contains("database_url") && !gateway.contains("DATABASE__URL"), "{overlay}");
    }
}

#[tokio::test]
async fn whoever_may_call_is_let_in_and_nobody_else() {
    let Some(readers) = Readers::installed() else { return };
    for overlay in OVERLAYS {
        let cluster = Cluster::rendered(&readers, overlay).await;
        let nobody = cluster.get("NetworkPolicy", "default-deny");
        assert_eq!(nobody["spec"], json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}));
        let (mut calls, mut lets_in) = (BTreeSet::new(), BTreeSet::new());
        for (name, policy) in cluster.of("NetworkPolicy") {
            let spec = &policy["spec"];
            let own = cluster.matched(&spec["podSelector"]);
            assert!(!own.is_empty(), "{overlay}: {name} is about nobody");
            for (direction, peers, edges) in [("egress", "to", &mut calls), ("ingress", "from", &mut lets_in)] {
                for rule in each(&spec[direction]) {
                    let inside = each(&rule[peers]).filter(|peer| peer["namespaceSelector"].is_null());
                    for selector in inside.map(|peer| &peer["podSelector"]).filter(|selector| !selector.is_null()) {
                        let others = cluster.matched(selector);
                        assert!(!others.is_empty(), "{overlay}: {name} names nobody: {selector}");
                        for (own, other) in own.iter().flat_map(|own| others.iter().map(move |other| (own, other))) {
                            let (caller, called) = if direction == "egress" { (own, other) } else { (other, own) };
                            for port in each(&rule["ports"]) {
                                let port = cluster.port(called, &port["port"]);
                                let port =
                                    port.unwrap_or_else(|| panic!("{overlay}: {name}: {called} has no such port"));
                                edges.insert(((*caller).to_owned(), (*called).to_owned(), port));
                            }
                        }
                    }
                }
            }
        }
        assert_eq!(calls, lets_in, "{overlay}: what one side may do, the other allows");
        // Everybody asks auth whether a credential is good; nobody calls a gateway, or itself.
        for role in ROLES {
            assert!(role == "auth" || calls.iter().any(|(from, to, _)| from == role && to == "auth"), "{role}");
        }
        assert!(calls.iter().all(|(from, to, _)| to != "gateway" && from != to), "{calls:?}");
        let customers = cluster.get("NetworkPolicy", "webhook")["spec"]["egress"].to_string();
        for ours in ["10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "100.64.0.0/10", "fc00::/7"] {
            assert!(customers.contains(ours), "{overlay}: endpoints of customers are never at {ours}");
        }
    }
}

#[tokio::test]
async fn the_configuration_in_the_manifests_is_sound_and_leaves_time_to_end() {
    let Some(readers) = Readers::installed() else { return };
    for overlay in OVERLAYS {
        let cluster = Cluster::rendered(&readers, overlay).await;
        let folder = TempDir::new().unwrap();
        let [(_, map)] = cluster.of("ConfigMap").try_into().unwrap();
        let file = folder.path().join("paperkey.toml");
        fs::write(&file, text(map, "/data/paperkey.toml")).unwrap();
        let [(_, secret)] = cluster.of("Secret").try_into().unwrap();
        for (key, value) in secret["data"].as_object().unwrap() {
            fs::write(folder.path().join(key), BASE64.decode(value.as_str().unwrap()).unwrap()).unwrap();
        }
        let here = |text: &str| {
            let folder = folder.path().to_str().unwrap();
            text.replace("/etc/paperkey/secrets", folder).replace("/etc/paperkey/paperkey.toml", file.to_str().unwrap())
        };
        let mut checked = 0;
        for (name, _, pod) in cluster.workloads() {
            for container in each(&pod["spec"]["containers"]).filter(|container| container["name"] == "paperkey") {
                let arguments: Vec<_> = words(&container["args"]).iter().map(|word| here(word)).collect();
                let environment: Vec<_> = each(&container["env"])
                    .map(|variable| (text(variable, "/name"), here(&text(variable, "/value"))))
                    .collect();
                check(&arguments, &environment, folder.path()).await.succeeded();
                checked += 1;
                if name == "migrate" {
                    continue;
                }
                let at = format!("0.0.0.0:{}", cluster.port(name, &container["ports"][0]["name"]).unwrap());
                assert!(arguments.contains(&at), "{overlay}: {name} listens elsewhere: {arguments:?}");
                let printed = [vec!["config".to_owned(), "print".to_owned()], arguments[1..].to_vec()].concat();
                let printed = process::run(process::command(&printed, &environment, folder.path()), "").await;
                let config = Printed(printed.succeeded().to_owned());
                let ends = config.number("shutdown_grace_ms") + config.number("drain_delay_ms");
                let given = pod["spec"]["terminationGracePeriodSeconds"].as_u64().unwrap() * 1_000;
                assert!(given > ends + 10_000, "{overlay}: {name} is ended after {given} ms, and may need {ends}");
                // Headless, for the channels to see every address.
                for service in ROLES.iter().filter(|role| **role != "gateway") {
                    let url = config.text(service);
                    let (_, at) = url.split_once("://").unwrap();
                    let (host, port) = at.split_once(':').unwrap();
                    let called = cluster.get("Service", host);
                    assert_eq!(called["spec"]["clusterIP"], "None", "{overlay}: {host}");
                    assert_eq!(called["spec"]["ports"][0]["port"], port.parse::<u64>().unwrap(), "{overlay}: {host}");
                    // With certificates everything is spoken to under them, and each covers its name.
                    assert_eq!(url.starts_with("https://"), overlay == "production", "{overlay}: {url}");
                    if overlay == "production" {
                        let names = words(&cluster.get("Certificate", service)["spec"]["dnsNames"]);
                        assert!(names.contains(&host.to_owned()), "{names:?}");
                    }
                }
                let most = cluster.get("HorizontalPodAutoscaler", "gateway")["spec"]["maxReplicas"].as_u64().unwrap();
                assert_eq!(config.number("gateways"), most, "{overlay}");
            }
        }
        assert_eq!(checked, ROLES.len() + 1, "{overlay}");
        let connections: u64 = ROLES[1..]
            .iter()
            .map(|role| cluster.get("HorizontalPodAutoscaler", role)["spec"]["maxReplicas"].as_u64().unwrap() * 8)
            .sum();
        assert!(connections < 200, "{overlay}: PostgreSQL takes 200, and {connections} may come");
    }
}

/// What `paperkey config print` says.
struct Printed(String);

impl Printed {
    fn text(&self, key: &str) -> String {
        let lines = self.0.lines();
        let found: Vec<_> = lines.filter_map(|line| line.strip_prefix(key)?.strip_prefix(" = ")).collect();
        assert_eq!(found.len(), 1, "{key} is there once: {}", self.0);
        found[0].trim_matches('"').to_owned()
    }

    fn number(&self, key: &str) -> u64 {
        self.text(key).parse().unwrap()
    }
}

#[tokio::test]
async fn an_overlay_without_secrets_starts_nothing() {
    let Some(readers) = Readers::installed() else { return };
    for overlay in OVERLAYS {
        let example =
            fs::read_to_string(shipped(&format!("kubernetes/overlays/{overlay}/secrets.env.example"))).unwrap();
        let asked: BTreeSet<_> =
            example.lines().filter_map(|line| line.split_once('=')).map(|(key, _)| key.to_owned()).collect();
        let rendered = readers.rendered(overlay, &example).await;
        let secret = rendered.iter().find(|manifest| manifest["kind"] == "Secret").unwrap();
        let given = secret["data"].as_object().unwrap();
        assert_eq!(asked, given.keys().cloned().collect(), "{overlay}");
        let folder = TempDir::new().unwrap();
        let environment: Vec<_> = ["master_key", "pepper", "signing_key"]
            .map(|key| {
                assert_eq!(given[key], "", "{overlay}: an example holds no {key}");
                let file = folder.path().join(key);
                fs::write(&file, "").unwrap();
                let name = format!("PAPERKEY__SECRETS__{}__FILE", key.to_uppercase());
                (name, file.to_str().unwrap().to_owned())
            })
            .into();
        let ended = check(&[], &environment, folder.path()).await;
        assert!(ended.failed().contains("secrets.master_key"), "{ended:?}");
    }
}

// --- Compose ---------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn compose_takes_its_files_and_starts_nothing_without_secrets() {
    let Some(readers) = Readers::installed() else { return };
    let given = variables();
    readers.composed("one.yml", &[]).await.unwrap();
    readers.composed("fleet.yml", &borrowed(&given)).await.unwrap();
    let example = fs::read_to_string(shipped("compose/.env.example")).unwrap();
    let asked: Vec<_> = example.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).collect();
    assert_eq!(asked, given.iter().map(|(name, _)| format!("{name}=")).collect::<Vec<_>>(), "without a value, each");
    for (left_out, _) in &given {
        for value in [None, Some("")] {
            let mut some = borrowed(&given);
            some.retain(|(name, _)| name != left_out);
            some.extend(value.map(|value| (*left_out, value)));
            let refused = readers.composed("fleet.yml", &some).await.unwrap_err();
            assert!(refused.contains(left_out), "{refused}");
        }
    }
}

#[tokio::test]
async fn every_container_of_compose_may_do_no_more_than_it_must() {
    let Some(readers) = Readers::installed() else { return };
    let given = variables();
    for file in ["one.yml", "fleet.yml"] {
        let composed = readers.composed(file, &borrowed(&given)).await.unwrap();
        for (name, service) in composed["services"].as_object().unwrap() {
            let at = format!("{file}: {name}");
            assert_eq!(service["read_only"], true, "{at}");
            assert_eq!(service["cap_drop"], json!(["ALL"]), "{at}");
            assert_eq!(service["security_opt"], json!(["no-new-privileges:true"]), "{at}");
            assert!(service["privileged"].is_null() && service["network_mode"] != "host", "{at}");
            let (_, tag) = service["image"].as_str().unwrap().rsplit_once(':').unwrap();
            assert!(tag.starts_with(|it: char| it.is_ascii_digit() || it == 'v'), "{at}: {tag} is not pinned");
            let is_job = service["restart"] == "no";
            assert!(is_job || service["restart"] == "unless-stopped", "{at}");
            for port in each(&service["ports"]) {
                assert!(name == "caddy" || port["host_ip"] == "127.0.0.1", "{at}: {port} is open to everybody");
            }
            for mount in each(&service["volumes"]).filter(|mount| mount["type"] == "bind") {
                assert_eq!(mount["read_only"], true, "{at}: {mount}");
                let source = text(mount, "/source");
                // What watches the product is made elsewhere in this folder.
                let is_made = !source.contains("/observability/") || shipped("observability").is_dir();
                assert!(!is_made || Path::new(&source).exists(), "{at}: there is no {source}");
            }
            for (needed, how) in service["depends_on"].as_object().into_iter().flatten() {
                let other = &composed["services"][needed];
                assert!(!other.is_null(), "{at}: {needed}");
                match how["condition"].as_str().unwrap() {
                    "service_completed_successfully" => {
                        assert_eq!(other["restart"], "no", "{at}: {needed} does not end");
                    }
                    "service_healthy" => assert!(other["healthcheck"]["test"].is_array(), "{at}: {needed}"),
                    _ => {}
                }
            }
        }
    }
}

#[tokio::test]
async fn the_configuration_in_the_compose_files_is_sound_and_leaves_time_to_end() {
    let Some(readers) = Readers::installed() else { return };
    let given = variables();
    let folder = TempDir::new().unwrap();
    let shared = shipped("compose/paperkey.toml");
    for file in ["one.yml", "fleet.yml"] {
        let composed = readers.composed(file, &borrowed(&given)).await.unwrap();
        let services = composed["services"].as_object().unwrap();
        let own = services.iter().filter(|(_, service)| service["image"] == "paperkey:0.1.0");
        let mut parts = BTreeMap::<String, u64>::new();
        for (name, service) in own {
            let here = |word: &String| word.replace("/etc/paperkey/paperkey.toml", shared.to_str().unwrap());
            let arguments: Vec<_> = words(&service["command"]).iter().map(here).collect();
            let environment: Vec<_> = service["environment"]
                .as_object()
                .unwrap()
                .iter()
                .map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned()))
                .collect();
            check(&arguments, &environment, folder.path()).await.succeeded();
            *parts.entry(arguments[0].clone()).or_default() += service["deploy"]["replicas"].as_u64().unwrap_or(1);
            if !ROLES.contains(&arguments[0].as_str()) {
                continue;
            }
            let printed = [vec!["config".to_owned(), "print".to_owned()], arguments[1..].to_vec()].concat();
            let printed = process::run(process::command(&printed, &environment, folder.path()), "").await;
            let config = Printed(printed.succeeded().to_owned());
            let ends = config.number("shutdown_grace_ms") + config.number("drain_delay_ms");
            assert_eq!(service["stop_grace_period"], "30s");
            assert!(ends + 10_000 < 30_000, "{name} may need {ends} ms");
            assert_eq!(config.number("gateways"), 2);
            // Each is found by the name that others call it by, on a network that they share.
            let inner = &service["networks"]["inner"];
            let aliases = words(inner.get("aliases").unwrap_or(&Value::Null));
            assert!(*name == arguments[0] || aliases.contains(&arguments[0]), "{name}: {aliases:?}");
            if arguments[0] != "gateway" {
                let port = config.text(&arguments[0]).rsplit_once(':').unwrap().1.to_owned();
                assert_eq!(config.text("listen"), format!("0.0.0.0:{port}"), "{name}");
            }
            // Two processes never write to one folder.
            let data: Vec<_> = each(&service["volumes"]).filter(|mount| mount["target"] == "/data").collect();
            let is_scratch = words(&service["tmpfs"]).iter().any(|mount| mount.starts_with("/data:"));
            assert_eq!(data.len() + usize::from(is_scratch), 1, "{name}");
            assert!(is_scratch || data[0]["source"] == name.as_str(), "{name}: {data:?}");
            let tls = each(&service["volumes"]).find(|mount| mount["target"] == "/etc/paperkey/tls").unwrap();
            assert_eq!(tls["volume"]["subpath"], arguments[0].as_str(), "{name} is given its own certificate");
        }
        let expected: BTreeMap<_, _> = if file == "one.yml" {
            [("serve".to_owned(), 1)].into()
        } else {
            let twice = ROLES.map(|role| (role.to_owned(), 2));
            twice.into_iter().chain([("migrate".to_owned(), 1)]).collect()
        };
        assert_eq!(parts, expected, "{file}");
    }
}

/// The number of an address, and the least and the most of a network.
fn number(address: &str) -> u32 {
    address.parse::<std::net::Ipv4Addr>().unwrap().into()
}

fn range(network: &str) -> std::ops::RangeInclusive<u32> {
    let (first, length) = network.split_once('/').unwrap();
    let size = 1_u32 << (32 - length.parse::<u32>().unwrap());
    number(first)..=number(first) + (size - 1)
}

#[tokio::test]
async fn addresses_that_are_trusted_in_compose_are_nobody_elses() {
    let Some(readers) = Readers::installed() else { return };
    let given = variables();
    let fleet = readers.composed("fleet.yml", &borrowed(&given)).await.unwrap();
    let mut fixed = Vec::new();
    for (name, service) in fleet["services"].as_object().unwrap() {
        for (network, joined) in service["networks"].as_object().into_iter().flatten() {
            let Some(address) = joined["ipv4_address"].as_str() else { continue };
            let ipam = &fleet["networks"][network]["ipam"]["config"][0];
            let has = |key: &str| range(ipam[key].as_str().unwrap()).contains(&number(address));
            assert!(has("subnet") && !has("ip_range"), "{name}: {address} may be given to somebody else: {ipam}");
            assert_ne!(ipam["gateway"], address, "{name}");
            fixed.push((name.as_str(), address));
        }
    }
    let configured = fs::read_to_string(shipped("compose/paperkey.toml")).unwrap();
    let [("caddy", address)] = fixed[..] else { panic!("{fixed:?}") };
    assert!(configured.contains(&format!("\ntrusted_proxies = [\"{address}/32\"]\n")), "{address}");

    // What calls by a port of this machine comes from the network's own gateway.
    let one = readers.composed("one.yml", &[]).await.unwrap();
    let gateway = text(&one, "/networks/default/ipam/config/0/gateway");
    let trusted = &one["services"]["paperkey"]["environment"]["PAPERKEY__SERVER__TRUSTED_PROXIES"];
    assert_eq!(*trusted, format!("[\"{gateway}/32\"]"));
    // And there is what the proxies ask.
    let caddy = fs::read_to_string(shipped("proxies/Caddyfile")).unwrap();
    let published: Vec<_> = each(&one["services"]["paperkey"]["ports"]).map(|port| text(port, "/published")).collect();
    assert_eq!(published, ["8080", "9090"]);
    assert!(caddy.contains("reverse_proxy 127.0.0.1:8080 ") && caddy.contains("health_port 9090\n"));
}

#[tokio::test]
async fn what_signs_certificates_in_compose_is_mounted_by_nothing_that_stays() {
    let Some(readers) = Readers::installed() else { return };
    let given = variables();
    let fleet = readers.composed("fleet.yml", &borrowed(&given)).await.unwrap();
    let script = fs::read_to_string(shipped("certificates")).unwrap();
    assert!(script.contains("authority=$folder/authority\n"));
    let mut signs = Vec::new();
    for (name, service) in fleet["services"].as_object().unwrap() {
        for mount in each(&service["volumes"]) {
            if mount["source"] == "authority" {
                signs.push((name.as_str(), text(mount, "/target")));
            } else if mount["source"] == "certificates" && name != "certificates" {
                assert!(mount["volume"]["subpath"].is_string() && mount["read_only"] == true, "{name}: {mount}");
            }
        }
    }
    assert_eq!(signs, [("certificates", "/certificates/authority".to_owned())]);
}

#[tokio::test]
async fn prometheus_is_told_of_every_process_and_of_whom_to_tell() {
    let Some(readers) = Readers::installed() else { return };
    let given = variables();
    let fleet = readers.composed("fleet.yml", &borrowed(&given)).await.unwrap();
    let own = fleet["services"].as_object().unwrap().iter().filter(|(_, it)| it["image"] == "paperkey:0.1.0");
    let processes: BTreeSet<_> = own
        .map(|(name, service)| (words(&service["command"])[0].clone(), format!("{name}:9090")))
        .filter(|(role, _)| ROLES.contains(&role.as_str()))
        .collect();
    let [compose, cluster] = ["prometheus.yml", "prometheus-kubernetes.yml"];
    let read = |file: &str| vec![shipped(&format!("observability/{file}"))];
    let [compose, cluster] =
        [readers.yaml(&read(compose)).await.remove(0), readers.yaml(&read(cluster)).await.remove(0)];
    // By name, for one that has ended to be missed.
    let groups = each(&compose["scrape_configs"][0]["static_configs"]);
    let targets = groups.flat_map(|group| {
        words(&group["targets"]).into_iter().map(|target| (text(group, "/labels/component"), target))
    });
    assert_eq!(targets.collect::<BTreeSet<_>>(), processes);
    assert_eq!(processes.len(), 2 * ROLES.len());
    for config in [&compose, &cluster] {
        // The rules are about jobs of this name.
        assert_eq!(config["scrape_configs"][0]["job_name"], "paperkey");
        let told = words(&config["alerting"]["alertmanagers"][0]["file_sd_configs"][0]["files"]);
        assert_eq!(told, ["alertmanagers.yml"]);
    }
    let mounted: BTreeSet<_> =
        each(&fleet["services"]["prometheus"]["volumes"]).map(|mount| text(mount, "/target")).collect();
    for file in ["prometheus.yml", "alerts.yml", "alertmanagers.yml"] {
        assert!(mounted.contains(&format!("/etc/prometheus/{file}")), "{mounted:?}");
    }

    // In a cluster it finds the same by itself: the pods that have a port for it, by the labels that the rules go by.
    let manifests = Cluster::rendered(&readers, "production").await;
    let monitor = &manifests.get("PodMonitor", "paperkey")["spec"];
    let endpoint = &monitor["podMetricsEndpoints"][0];
    let mut found = manifests.matched(&monitor["selector"]);
    found.retain(|pod| manifests.port(pod, &endpoint["port"]) == Some(9090));
    assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), ROLES.into());
    let sets = |label: &str| each(&endpoint["relabelings"]).find(|it| it["targetLabel"] == label).unwrap();
    assert_eq!(sets("job")["replacement"], "paperkey");
    let component = "__meta_kubernetes_pod_label_app_kubernetes_io_component";
    assert_eq!(sets("component")["sourceLabels"], json!([component]));
    let job = &cluster["scrape_configs"][0];
    let relabeled = |what: &str, from: &str| {
        let mut all = each(&job["relabel_configs"]);
        all.any(|it| it["source_labels"] == json!([from]) && (it["target_label"] == what || it["regex"] == what))
    };
    assert!(relabeled("component", component));
    assert!(relabeled("paperkey", "__meta_kubernetes_pod_label_app_kubernetes_io_name"));
    assert!(relabeled("operations", "__meta_kubernetes_pod_container_port_name"));
    assert_eq!(job["kubernetes_sd_configs"][0]["namespaces"]["names"], json!(["paperkey"]));
}

// --- the image -------------------------------------------------------------------------------------------------------

/// The instructions of the Dockerfile, with their lines joined.
fn instructions() -> Vec<(String, String)> {
    let file = fs::read_to_string(shipped("docker/Dockerfile")).unwrap();
    let lines: Vec<_> = file.lines().filter(|line| !line.trim_start().starts_with('#')).collect();
    let joined = lines.join("\n").replace("\\\n", " ");
    let split = |line: &str| line.trim().split_once(' ').map(|(word, rest)| (word.to_owned(), rest.trim().to_owned()));
    joined.lines().filter_map(split).collect()
}

/// What the builder is given: `COPY` of the first stage.
fn copied() -> Vec<String> {
    let mut copied = Vec::new();
    for (word, rest) in instructions() {
        if word == "COPY" && !rest.starts_with("--from") {
            let mut words: Vec<_> = rest.split_whitespace().map(str::to_owned).collect();
            let to = words.pop().unwrap();
            assert!(to == "./" || words == [to.clone()], "{rest}: everything keeps its place");
            copied.extend(words);
        }
    }
    copied
}

#[tokio::test]
async fn the_image_is_small_and_nobody_in_it_is_root() {
    if let Some(readers) = Readers::installed() {
        readers.lint_image().await;
    }
    let all = instructions();
    let last = all.iter().rposition(|(word, _)| word == "FROM").unwrap();
    let of = |wanted: &str| {
        let found = all[last..].iter().filter(|(word, _)| word == wanted).map(|(_, rest)| rest.as_str());
        found.collect::<Vec<_>>()
    };
    assert_eq!(of("USER"), ["65532:65532"]);
    assert!(of("RUN").is_empty(), "there is no shell to run anything");
    assert_eq!((of("EXPOSE"), of("VOLUME"), of("CMD")), (vec!["8080"], vec!["/data"], vec!["[\"serve\"]"]));
    assert!(of("HEALTHCHECK")[0].contains("\"health\""));
    for base in all.iter().filter(|(word, rest)| word == "ARG" && rest.contains("_IMAGE=")) {
        let (_, image) = base.1.split_once('=').unwrap();
        let tag = image.rsplit('/').next().unwrap().split_once(':').unwrap().1;
        // The base of the last stage has no numbers; its name says the release.
        assert!(tag.starts_with(|it: char| it.is_ascii_digit()) || image == "gcr.io/distroless/cc-debian12:nonroot");
    }
    // Both have the C library of one release of Debian.
    assert!(
        all.iter().any(|(_, rest)| rest.ends_with("-bookworm"))
            && all.iter().any(|(_, rest)| rest.contains("debian12"))
    );
    let environment: Vec<_> = of("ENV")
        .iter()
        .flat_map(|line| line.split_whitespace())
        .map(|pair| pair.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned())).unwrap())
        .collect();
    let folder = TempDir::new().unwrap();
    check(&[], &environment, folder.path()).await.succeeded();
}

#[tokio::test]
async fn the_builder_is_given_all_that_the_workspace_is_built_of() {
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let copied = copied();
    let covered = |path: &Path| copied.iter().any(|copied| path.starts_with(copied));
    // A workspace of what is copied, and nothing else, is whole.
    let folder = TempDir::new().unwrap();
    for path in &copied {
        let (from, to) = (root().join(path), folder.path().join(path));
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink(fs::canonicalize(&from).unwrap(), &to).unwrap();
    }
    let mut command = Command::new(cargo);
    command
        .args(["metadata", "--format-version", "1", "--no-deps", "--locked", "--offline"])
        .current_dir(folder.path())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let ended = ends(command).await;
    let metadata: Value = serde_json::from_str(ended.succeeded()).unwrap();
    for member in words(&metadata["workspace_members"]) {
        assert!(member.contains(folder.path().to_str().unwrap()), "{member}");
    }
    // What is compiled into the binary from elsewhere is there too.
    let root = fs::canonicalize(root()).unwrap();
    for source in ["proto", "migrations", "services", "dashboard/src", "gateway/src"] {
        for file in files(&root.join(source)).into_iter().filter(|file| file.extension().is_some_and(|it| it == "rs")) {
            let text = fs::read_to_string(&file).unwrap();
            for included in text.split("\"../").skip(1).filter_map(|rest| rest.split('"').next()) {
                let path = file.parent().unwrap().join(format!("../{included}"));
                let Ok(path) = fs::canonicalize(path) else { continue };
                let path = path.strip_prefix(&root).unwrap();
                assert!(covered(path), "{} includes {}", file.display(), path.display());
            }
        }
    }
    // And nothing keeps it from the builder.
    let ignored = fs::read_to_string(root.join(".dockerignore")).unwrap();
    let lines: Vec<_> = ignored.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).collect();
    assert_eq!(lines[0], "*");
    let given: BTreeSet<_> = lines.iter().filter_map(|line| line.strip_prefix('!')).collect();
    assert_eq!(given, copied.iter().map(String::as_str).collect());
    for line in lines.iter().skip(1).filter(|line| !line.starts_with('!')) {
        assert!(["dashboard/app/node_modules", "**/target", "**/*.db", "**/.env"].contains(line), "{line}");
    }
}

// --- systemd ---------------------------------------------------------------------------------------------------------

#[tokio::test]
async fn units_are_what_systemd_takes_and_are_confined() {
    if Readers::installed().is_none() {
        return;
    }
    let folder = TempDir::new().unwrap();
    let binary = process::binary();
    let install = |from: &str, to: &str| {
        let text = fs::read_to_string(shipped(&format!("systemd/{from}"))).unwrap();
        assert!(text.contains("/usr/local/bin/paperkey "));
        fs::write(folder.path().join(to), text.replace("/usr/local/bin/paperkey", binary.to_str().unwrap())).unwrap();
        text
    };
    let mut units = vec![("paperkey.service".to_owned(), install("paperkey.service", "paperkey.service"))];
    units
        .push(("paperkey-migrate.service".to_owned(), install("paperkey-migrate.service", "paperkey-migrate.service")));
    install("paperkey@.service", "paperkey@.service");
    let database = fs::read_to_string(shipped("systemd/paperkey-database.conf")).unwrap();
    for role in ROLES {
        let name = format!("paperkey@{role}.service");
        let mut text = install("paperkey@.service", &name);
        if role != "gateway" {
            let beside = folder.path().join(format!("{name}.d"));
            fs::create_dir(&beside).unwrap();
            fs::write(beside.join("database.conf"), &database).unwrap();
            text.push_str(&database);
        }
        units.push((name, text));
    }
    let systemd = |arguments: &[&str]| {
        let mut command = Command::new("systemd-analyze");
        command.args(arguments).current_dir(folder.path()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    };
    for (name, text) in &units {
        let path = folder.path().join(name);
        let path = path.to_str().unwrap();
        let ended = ends(systemd(&["verify", path])).await;
        assert!(ended.status.success() && ended.err.trim().is_empty(), "{name}: {ended:?}");
        // Of 100: a unit that says nothing of it has 96.
        let ended = ends(systemd(&["security", "--offline=true", "--no-pager", "--threshold=15", path])).await;
        assert!(ended.status.success(), "{name}: {}", ended.out);
        // What it is told by variables is configuration.
        let environment: Vec<_> = text
            .lines()
            .filter_map(|line| line.strip_prefix("Environment=")?.split_once('='))
            .map(|(key, value)| (key.to_owned(), value.replace("%d", folder.path().to_str().unwrap())))
            .collect();
        let loaded = text.lines().filter_map(|line| line.strip_prefix("LoadCredential=")?.split_once(':'));
        for (credential, _) in loaded {
            let value = match credential {
                "database_url" => "postgres://paperkey@db/paperkey".to_owned(),
                "redis_url" => "redis://redis:6379".to_owned(),
                _ => key(7),
            };
            fs::write(folder.path().join(credential), value).unwrap();
        }
        check(&[], &environment, folder.path()).await.succeeded();
        let has_database = environment.iter().any(|(key, _)| key == "PAPERKEY__DATABASE__URL__FILE");
        // A gateway has no database, and so it is given no way into one; what is alone makes its own.
        assert_eq!(has_database, !["paperkey.service", "paperkey@gateway.service"].contains(&name.as_str()), "{name}");
        let told = text.lines().filter(|line| !line.starts_with('#'));
        assert_eq!(told.into_iter().any(|line| line.contains("database_url")), has_database, "{name}");
        // Whoever serves is started again, however long it is before what it needs is back.
        assert!(name == "paperkey-migrate.service" || text.contains("\nStartLimitIntervalSec=0\n"), "{name}");
        for (key, value) in environment {
            assert!(Path::new(&value).is_file(), "{name}: {key} names a credential that is not loaded");
        }
    }
}

// --- certificates ----------------------------------------------------------------------------------------------------

#[tokio::test]
async fn certificates_are_made_once_kept_to_themselves_and_renewed_when_due() {
    let folder = TempDir::new().unwrap();
    let at = folder.path().join("certificates");
    certificates(&at, &[], &["10.0.0.7", "db.internal"]).await.succeeded();
    let mode = |path: PathBuf| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    // Whoever runs as a role passes through to its own folder, and nobody to what signs.
    let authority = (mode(at.join("authority")), mode(at.join("authority/ca.key")));
    assert_eq!((mode(at.clone()), authority), (0o711, (0o700, 0o600)));
    for role in ROLES {
        assert_eq!(mode(at.join(role).join("tls.key")), 0o600);
        let held: Vec<_> = files(&at.join(role)).iter().map(|it| it.file_name().unwrap().to_owned()).collect();
        assert_eq!(held, ["ca.crt", "tls.crt", "tls.key"], "{role} is given what it needs and nothing else");
    }
    let all = || files(&at).into_iter().map(|file| (fs::read(&file).unwrap(), file)).collect::<Vec<_>>();
    let before = all();
    certificates(&at, &[], &["10.0.0.7", "db.internal"]).await.succeeded();
    assert_eq!(before, all(), "what is good is left as it is");

    // Another name is another certificate, and so is one that ends soon; the authority stays.
    let authority = fs::read(at.join("authority/ca.crt")).unwrap();
    let auth = || fs::read(at.join("auth/tls.crt")).unwrap();
    let first = auth();
    certificates(&at, &[("CERTIFICATES_DAYS", "20")], &["10.0.0.8"]).await.succeeded();
    let second = auth();
    certificates(&at, &[], &["10.0.0.8"]).await.succeeded();
    let third = auth();
    assert!(first != second && second != third);
    assert_eq!(authority, fs::read(at.join("authority/ca.crt")).unwrap());
    certificates(&at, &[], &["10.0.0.8"]).await.succeeded();
    assert_eq!(third, auth());

    for nonsense in ["a b", "-x", "a,DNS:b", "a\nb", ""] {
        let ended = certificates(&folder.path().join("other"), &[], &[nonsense]).await;
        assert!(!ended.status.success(), "{nonsense:?} is no name");
    }
    fs::remove_file(at.join("authority/ca.key")).unwrap();
    let ended = certificates(&at, &[], &["10.0.0.8"]).await;
    assert!(ended.failed().contains("half there"), "{ended:?}");
}

#[tokio::test]
async fn processes_know_each_other_by_their_certificates_and_strangers_by_theirs() {
    let folder = TempDir::new().unwrap();
    let (ours, theirs) = (folder.path().join("ours"), folder.path().join("theirs"));
    for at in [&ours, &theirs] {
        certificates(at, &[("CERTIFICATES_DOMAIN", "paperkey.svc")], &["10.0.0.7", "::2"]).await.succeeded();
    }
    for name in ["auth", "auth.paperkey.svc", "localhost", "127.0.0.1", "10.0.0.7", "::2"] {
        shake_hands(&ours.join("gateway"), &ours.join("auth"), name).unwrap();
    }
    shake_hands(&ours.join("gateway"), &ours.join("auth"), "catalog").unwrap_err();
    shake_hands(&ours.join("gateway"), &theirs.join("auth"), "auth").unwrap_err();
    shake_hands(&theirs.join("gateway"), &ours.join("auth"), "auth").unwrap_err();
}

/// A handshake of two who show each other what they are, in memory.
fn shake_hands(caller: &Path, called: &Path, name: &str) -> Result<(), rustls::Error> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let roots = |of: &Path| {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(of.join("ca.crt")).unwrap()).unwrap();
        Arc::new(roots)
    };
    let shown = |of: &Path| {
        let chain = vec![CertificateDer::from_pem_file(of.join("tls.crt")).unwrap()];
        (chain, PrivateKeyDer::from_pem_file(of.join("tls.key")).unwrap())
    };
    let verifier = WebPkiClientVerifier::builder_with_provider(roots(called), Arc::clone(&provider)).build().unwrap();
    let (chain, key) = shown(called);
    let server = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions()?;
    let server = server.with_client_cert_verifier(verifier).with_single_cert(chain, key)?;
    let (chain, key) = shown(caller);
    let client = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let client = client.with_root_certificates(roots(caller)).with_client_auth_cert(chain, key)?;
    let name = name.to_owned().try_into().unwrap();
    let mut client = ClientConnection::new(Arc::new(client), name)?;
    let mut server = ServerConnection::new(Arc::new(server))?;
    while client.is_handshaking() || server.is_handshaking() {
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        let mut read = bytes.as_slice();
        while !read.is_empty() {
            server.read_tls(&mut read).unwrap();
            server.process_new_packets()?;
        }
        let mut bytes = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut bytes).unwrap();
        }
        let mut read = bytes.as_slice();
        while !read.is_empty() {
            client.read_tls(&mut read).unwrap();
            client.process_new_packets()?;
        }
    }
    Ok(())
}

// --- a fleet of plain processes --------------------------------------------------------------------------------------

/// `deploy/local/fleet`.
async fn fleet(arguments: &[&str]) -> Ended {
    let mut command = Command::new(shipped("local/fleet"));
    command
        .args(arguments)
        .env_clear()
        .env("PATH", env::var_os("PATH").unwrap_or_default())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    ends(command).await
}

#[tokio::test]
async fn a_fleet_is_made_in_no_folder_of_somebody_else() {
    let folder = TempDir::new().unwrap();
    fs::write(folder.path().join("lock"), "").unwrap();
    let at = folder.path().to_str().unwrap();
    let refused = fleet(&["up", at]).await;
    if !refused.err.contains("is not installed") && !refused.err.contains("server is installed") {
        assert!(refused.failed().contains("neither empty nor a fleet"), "{refused:?}");
    }
    fs::write(folder.path().join("topology"), "1 1").unwrap();
    assert!(fleet(&["down", at]).await.failed().contains("there is no fleet"));
    let held: Vec<_> = files(folder.path());
    assert_eq!(held.len(), 2, "{held:?}");
}

#[tokio::test]
async fn a_start_that_fails_ends_what_it_has_started_and_nothing_else() {
    let folder = TempDir::with_prefix("paperkey-fleet-").unwrap();
    // Whoever PostgreSQL runs as has to pass.
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711)).unwrap();
    let at = folder.path().join("fleet");
    let path = at.to_str().unwrap();
    // A binary that cannot bring the schema up, named from where the command is given.
    let binary = format!("{}bin/false", "../".repeat(64));
    let up = ["up", path, "--gateways", "1", "--services", "1", "--binary", &binary];
    let failed = fleet(&up).await;
    if failed.err.contains("is not installed") || failed.err.contains("server is installed") {
        assert_ne!(env::var("CI").as_deref(), Ok("true"), "{failed:?}");
        return;
    }
    assert!(failed.failed().contains("the schema is not there"), "{failed:?}");

    // A member that runs, as the script knows it: by its process and when that began.
    let mut running = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().unwrap();
    let stat = fs::read_to_string(format!("/proc/{}/stat", running.id())).unwrap();
    let began = stat.rsplit_once(") ").unwrap().1.split(' ').nth(19).unwrap().to_owned();
    fs::write(at.join("run/auth-1.pid"), format!("{} {began}\n", running.id())).unwrap();
    for wrong in [
        vec!["up", path, "--gateways", "3"],
        vec!["up", path, "--binary", "/nonexistent"],
        vec!["up", path, "--tls"],
        vec!["up", path, "--while", "999999999"],
        vec!["up", path, "--nonsense"],
        up.to_vec(),
    ] {
        let ended = fleet(&wrong).await;
        assert!(!ended.status.success(), "{wrong:?}");
        assert!(running.try_wait().unwrap().is_none(), "{wrong:?} ended what ran: {ended:?}");
    }
    let status = fleet(&["status", path]).await;
    let status = status.succeeded();
    let state = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    let states = ["postgres", "redis", "auth-1", "gateway-1"].map(state);
    running.kill().unwrap();
    running.wait().unwrap();
    assert_eq!(states, ["stopped", "stopped", "starting", "stopped"], "{status}");
}

// --- proxies ---------------------------------------------------------------------------------------------------------

const HOME: &str = "127.0.0.5";
const ELSEWHERE: &str = "127.0.0.6";

/// How long a stream may take to show something.
const PATIENCE: Duration = Duration::from_mins(1);

async fn everything_passes_through(kind: Edge) {
    let Some(readers) = Readers::installed() else { return };
    let settings = Settings {
        environment: vec![
            ("PAPERKEY__SERVER__TRUSTED_PROXIES", "[\"127.0.0.1/32\"]".to_owned()),
            ("PAPERKEY__SERVER__PUBLIC_URL", format!("https://{PUBLIC_NAME}")),
        ],
        ..Settings::default()
    };
    let install = Installation::all_in_one_with(settings).await;
    let folder = TempDir::new().unwrap();
    certificates(folder.path(), &[("CERTIFICATES_ROLES", "edge")], &[PUBLIC_NAME]).await.succeeded();
    let at = |url: &str| url.trim_start_matches("http://").parse().unwrap();
    let gateway = at(&install.url());
    let operations = at(&install.operations_url(install.gateway()));
    let Some(front) = readers.proxy(kind, gateway, operations, &folder.path().join("edge")).await else { return };

    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let bearer = format!("Authorization: Bearer {}", owner.token);

    let (status, body) = front.get("127.0.0.1", &format!("/products/{}", product.id), &[&bearer]).await.unwrap();
    assert_eq!(status, 200, "{body}");
    assert!(body.contains(&product.id), "{body}");
    let (status, body) = front.get("127.0.0.1", "/products/none", &[&bearer]).await.unwrap();
    let is_ours = body.contains("not_found") && body.contains("requestId");
    assert!(status == 404 && is_ours, "an error is Paperkey's own: {status} {body}");

    // The address is the caller's, over REST and over gRPC, and what it says of itself does not count.
    let key = owner.allowlisted_key(HOME).await;
    let bound = format!("Authorization: Bearer {key}");
    for (from, says, status) in [
        (HOME, "X-Nothing: 1", 200),
        (ELSEWHERE, "X-Nothing: 1", 403),
        (ELSEWHERE, "X-Forwarded-For: 127.0.0.5", 403),
        (ELSEWHERE, "X-Forwarded-For: 127.0.0.5, 127.0.0.1", 403),
        (HOME, "X-Forwarded-For: 6.6.6.6", 200),
    ] {
        let (answered, body) = front.get(from, "/v1/status", &[&bound, says]).await.unwrap();
        assert_eq!(answered, status, "{kind:?}: {from}, {says}: {body}");
    }
    let asks = |from: &'static str| {
        let (front, key) = (&front, key.clone());
        async move {
            let channel = front.channel(from).await;
            let mut client = StatusServiceClient::with_interceptor(channel, grpc::Bearer::new(&key));
            client.get_status(GetStatusRequest::default()).await
        }
    };
    asks(HOME).await.unwrap();
    grpc::refused(asks(ELSEWHERE).await, Reason::IpNotAllowed);

    // What is watched arrives as it happens, both ways.
    let own = install.operations(install.gateway());
    let watching = || async { Metrics::of(&own).await.sum("paperkey_places_used", &[("kind", "stream")]) };
    let before = watching().await;
    let channel = front.channel("127.0.0.1").await;
    let mut client = WebhookServiceClient::with_interceptor(channel, grpc::Bearer::new(&owner.token));
    let request = WatchEventsRequest { product_id: product.id.clone(), ..WatchEventsRequest::default() };
    let mut watched = client.watch_events(request).await.unwrap().into_inner();
    let mut lines = front.stream(&format!("/products/{}/events", product.id), &[&bearer]);
    watched.message().await.unwrap().expect("the first answer is empty");
    lines.line(|line| line.text.starts_with('{').then_some(())).await.unwrap();
    let license = owner.issue(&product, json!({})).await;
    loop {
        let shown = tokio::time::timeout(PATIENCE, watched.message()).await.expect("it is not held back");
        let shown = shown.unwrap().expect("the stream goes on");
        if shown.event.is_some_and(|event| event.payload.contains(&license.id)) {
            break;
        }
    }
    lines.line(|line| line.text.contains(&license.id).then_some(())).await.unwrap();

    // And nobody goes on watching for who has gone.
    assert!(watching().await > before, "{kind:?}");
    drop((watched, client, lines));
    eventually("the streams end with those who watched", || async { (watching().await <= before).then_some(()) }).await;

    // gRPC-Web has the paths of gRPC, and is answered as what it is.
    let frame = folder.path().join("frame");
    fs::write(&frame, [0; 5]).unwrap();
    let web = ["Content-Type: application/grpc-web+proto", "X-Grpc-Web: 1"];
    let (status, body) = front.post("/paperkey.auth.v1.StatusService/GetStatus", &web, &frame).await.unwrap();
    assert!(status == 200 && body.contains("grpc-status:0"), "{kind:?}: {status} {body}");
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_passes_through_nginx() {
    everything_passes_through(Edge::Nginx).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_passes_through_caddy() {
    everything_passes_through(Edge::Caddy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_passes_through_envoy() {
    everything_passes_through(Edge::Envoy).await;
}

// --- health ----------------------------------------------------------------------------------------------------------

async fn a_process_is_asked_whether_it_is_ready_by_a_command(mut install: Installation) {
    let name = install.gateway();
    let at = install.operations_url(name).trim_start_matches("http://").to_owned();
    let port = at.rsplit_once(':').unwrap().1.to_owned();
    for arguments in [vec!["health", "--ops-listen", &at], vec!["health", "--live", "--ops-listen", &at]] {
        let ended = install.command(&arguments, "").await;
        assert_eq!(ended.succeeded(), if arguments.len() == 3 { "ready" } else { "ok" });
    }
    // As in a container, where it listens everywhere.
    install.command(&["health", "--ops-listen", &format!("0.0.0.0:{port}")], "").await.succeeded();
    if install.names().contains(&"catalog".to_owned()) {
        let catalog = install.operations_url("catalog").trim_start_matches("http://").to_owned();
        install.command(&["migrate", "down", "catalog"], "").await.succeeded();
        let ended = install.command(&["health", "--ops-listen", &catalog], "").await;
        assert!(ended.failed().contains("paperkey migrate up"), "{ended:?}");
        install.command(&["health", "--live", "--ops-listen", &catalog], "").await.succeeded();
        install.command(&["migrate", "up"], "").await.succeeded();
    }
    install.kill(name);
    let ended = install.command(&["health", "--ops-listen", &at], "").await;
    assert!(ended.failed().contains("does not answer"), "{ended:?}");
}
