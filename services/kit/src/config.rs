//! The configuration: defaults, under a file, under the environment.
//!
//! Unknown keys are refused, all problems are reported at once, and what is secret is never printed. A list in the
//! environment is written as in TOML: `PAPERKEY__SERVER__TRUSTED_PROXIES='["10.0.0.0/8"]'`. With `__FILE` at its end a
//! variable names a file that holds the value, as secrets are mounted: `PAPERKEY__SECRETS__MASTER_KEY__FILE`.

use std::{
    collections::{BTreeMap, BTreeSet},
    env, fmt,
    fs::{self, File},
    io::Read as _,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

pub mod limits;
pub mod upstreams;

use crate::{
    db::DatabaseUrl,
    secrets::{BadKey, Keyring, MAX_PREVIOUS, Secret},
    service::SERVICES,
};

pub use limits::{Limits, Tiers};
pub use upstreams::Upstream;

/// What environment variables of ours begin with.
const ENV_PREFIX: &str = "PAPERKEY__";

/// What ends the name of a variable whose value is in a file. No key is called so.
const FILE_SUFFIX: &str = "__FILE";

/// More than any one value has.
const MAX_FILE_BYTES: u64 = 65_536;

/// More problems than anyone reads at once.
const MAX_PROBLEMS: usize = 100;

/// The effective configuration.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Config {
    /// Listeners and what is true of the whole process.
    pub server: Server,
    /// Where data is kept.
    pub database: Database,
    /// The installation's keys.
    pub secrets: Secrets,
    /// Where the other services are, in a fleet.
    pub services: BTreeMap<String, String>,
    /// How webhooks are delivered.
    pub webhooks: Webhooks,
    /// How mail is sent.
    pub mail: Mail,
    /// Where alerts go beside the feed.
    pub alerts: Alerts,
    /// What is done with the audit log.
    pub audit: Audit,
    /// Where gateways share their limits.
    pub redis: Redis,
    /// How often each class of call may be made.
    pub limits: Limits,
    /// What teams pay for.
    pub tiers: Tiers,
    /// Where teams pay.
    pub billing: Billing,
    /// Servers that the gateway stands in front of.
    pub upstreams: Vec<Upstream>,
    /// The web page and its accounts.
    pub dashboard: Dashboard,
    /// Certificates: of the public listener, and between processes.
    pub tls: Tls,
    /// Logs, traces and metrics.
    pub telemetry: Telemetry,
}

/// Listeners and what is true of the whole process.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default)]
pub struct Server {
    /// The public listener; of a single service, its gRPC listener.
    pub listen: SocketAddr,
    /// The operations listener: `/healthz`, `/readyz`, `/metrics`.
    pub ops_listen: SocketAddr,
    /// How people reach the gateway; `http://` and the listener's address where absent.
    pub public_url: Option<String>,
    /// The data folder.
    pub data: PathBuf,
    /// Proxies whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<IpNet>,
    /// Whether pages of any origin may call key-authenticated paths.
    pub cors_any_origin: bool,
    /// How long a call from the gateway to a service may take.
    pub call_timeout_ms: u64,
    /// How long what is in flight may take after SIGTERM.
    pub shutdown_grace_ms: u64,
    /// How long a process still takes new calls after SIGTERM, while it says that it is not ready: what balancers that ask
    /// `/readyz` need to learn of it.
    pub drain_delay_ms: u64,
    /// Calls that are answered at a time. Those beyond are refused at once (503, `Retry-After`).
    pub max_in_flight: usize,
}

impl Default for Server {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8080)),
            ops_listen: SocketAddr::from(([127, 0, 0, 1], 9090)),
            public_url: None,
            data: PathBuf::from("data"),
            trusted_proxies: Vec::new(),
            cors_any_origin: false,
            call_timeout_ms: 10_000,
            shutdown_grace_ms: 10_000,
            drain_delay_ms: 0,
            max_in_flight: 1_024,
        }
    }
}

/// Where data is kept.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default)]
pub struct Database {
    /// `sqlite:<folder>` or `postgres://…`; SQLite in the data folder where absent.
    pub url: Option<Secret>,
    /// Connections that each service of a process opens at most (PostgreSQL), or readers of its file (SQLite).
    pub max_connections: u32,
}

impl Default for Database {
    fn default() -> Self {
        Self { url: None, max_connections: 8 }
    }
}

/// The installation's keys: 32 bytes each, in base64. Where absent, SQLite installations make and keep their own.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Secrets {
    /// Seals data at rest and signs between processes.
    pub master_key: Option<Secret>,
    /// Other master keys under which something may be sealed: those before it, or the one that comes after it.
    pub previous_master_keys: Vec<Secret>,
    /// Keys the hashes of tokens.
    pub pepper: Option<Secret>,
    /// The pepper before it was changed. Tokens are found under either, and hashed anew when they are used.
    pub previous_pepper: Option<Secret>,
    /// Signs sessions (the seed of an Ed25519 key).
    pub signing_key: Option<Secret>,
}

/// How webhooks are delivered.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default)]
pub struct Webhooks {
    /// For development: allows `http://` addresses.
    pub allow_http: bool,
    /// For development: allows addresses that are not public.
    pub allow_private_networks: bool,
    /// How long one exchange may take.
    pub timeout_ms: u64,
    /// Deliveries under way to one endpoint at a time.
    pub max_in_flight_per_endpoint: usize,
    /// The waits before each attempt.
    pub retry_schedule_s: Vec<u64>,
    /// How long deliveries are held for a paused endpoint.
    pub held_days: u32,
    /// How long finished deliveries are kept.
    pub kept_days: u32,
    /// The name servers that are asked for addresses; those of the system where absent.
    pub name_servers: Option<Vec<SocketAddr>>,
    /// A file with certificates (PEM) that are trusted beside the public ones.
    pub ca_file: Option<PathBuf>,
}

impl Default for Webhooks {
    fn default() -> Self {
        Self {
            allow_http: false,
            allow_private_networks: false,
            timeout_ms: 5_000,
            max_in_flight_per_endpoint: 5,
            retry_schedule_s: vec![0, 5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400],
            held_days: 30,
            kept_days: 30,
            name_servers: None,
            ca_file: None,
        }
    }
}

/// How mail is sent.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default)]
pub struct Mail {
    /// `smtps://user:password@mail.example.com`, or `smtp://…?tls=required` for STARTTLS. Where absent, mails are written
    /// to `mail/` in the data folder.
    pub smtp_url: Option<Secret>,
    /// Whom mails are from.
    pub from: String,
}

impl Default for Mail {
    fn default() -> Self {
        Self { smtp_url: None, from: "Paperkey <paperkey@localhost>".to_owned() }
    }
}

/// Where alerts go beside the feed.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Alerts {
    /// The URL of a Slack incoming webhook. It is as good as a password.
    pub slack_webhook_url: Option<Secret>,
}

/// What is done with the audit log.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default)]
pub struct Audit {
    /// How long entries are kept, in days.
    pub retention_days: u32,
    /// How much a gateway keeps on disk while auth cannot take entries, in bytes. When that is full, calls are refused.
    pub spool_max_bytes: u64,
}

impl Default for Audit {
    fn default() -> Self {
        Self { retention_days: 90, spool_max_bytes: 64 * 1_024 * 1_024 }
    }
}

/// Where gateways share their limits.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Redis {
    /// `redis://…` or `rediss://…`, of a server or of any node of a cluster. Limits live in memory where absent.
    /// Where it is there, changes are also heard of sooner.
    pub url: Option<Secret>,
    /// How many gateways there are at most. Without it they count each other while the store is there.
    pub gateways: Option<u32>,
}

/// Where teams pay.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Billing {
    /// The page where a team changes its plan. It is named where an upgrade would help.
    pub url: Option<String>,
}

/// The web page and its accounts.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Dashboard {
    /// Whether strangers may register.
    pub registration: Registration,
}

/// Whether strangers may register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Registration {
    /// Anyone may.
    #[default]
    Open,
    /// Nobody may; accounts are made by `paperkey admin create-account`.
    Closed,
}

/// Certificates (PEM files), which are read again when they change.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(default)]
pub struct Tls {
    /// The certificate chain that the listener shows. Without it the listener speaks plain HTTP.
    pub cert: Option<PathBuf>,
    /// The key of that certificate.
    pub key: Option<PathBuf>,
    /// What the certificates of this installation's processes are signed by. A service then lets nobody in who shows none of
    /// them, and services at `https://` are judged by it and not by the public authorities.
    pub client_ca: Option<PathBuf>,
    /// What is shown to other services, where `cert` is one for the public.
    pub service_cert: Option<PathBuf>,
    /// The key of that certificate.
    pub service_key: Option<PathBuf>,
}

/// Logs, traces and metrics.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(default)]
pub struct Telemetry {
    /// How lines look.
    pub log: LogFormat,
    /// `error`, `warn`, `info`, `debug`, `trace`, or directives such as `info,paperkey_webhook=debug`.
    pub log_level: String,
    /// Where traces, metrics and logs are sent (OTLP over gRPC), such as `http://collector:4317`. Nowhere where absent.
    pub otlp_endpoint: Option<String>,
    /// Of the calls whose trace begins here, the part that is traced, from 0 to 1.
    pub trace_sample_ratio: f64,
    /// The networks of peers whose `traceparent` is gone on with, and whose word on recording counts.
    pub trusted_parents: Vec<IpNet>,
}

impl Default for Telemetry {
    fn default() -> Self {
        Self {
            log: LogFormat::Text,
            log_level: "info,sea_orm_migration=warn".to_owned(),
            otlp_endpoint: None,
            trace_sample_ratio: 0.05,
            trusted_parents: Vec::new(),
        }
    }
}

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// An object a line.
    Json,
    /// For people.
    Text,
}

/// Everything that is wrong with a configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct Problems(pub Vec<String>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Problems {}

/// Which part of the product a process runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Everything.
    All,
    /// The gateway alone.
    Gateway,
    /// One service alone.
    Service(&'static str),
}

impl Config {
    /// Reads the file, if one is named, and the environment.
    pub fn load(file: Option<&Path>) -> Result<Self, Problems> {
        let variables =
            env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        let text = match file {
            None => String::new(),
            Some(path) => fs::read_to_string(path)
                .map_err(|error| Problems(vec![format!("{} cannot be read: {error}", path.display())]))?,
        };
        Self::parse(&text, variables)
    }

    /// Reads a file's text and environment variables.
    pub fn parse(text: &str, variables: impl Iterator<Item = (String, String)>) -> Result<Self, Problems> {
        let mut table: Table = text.parse().map_err(|error: toml::de::Error| {
            Problems(vec![format!("the configuration file is not TOML: {}", error.message())])
        })?;
        let mut problems = Vec::new();
        let mut variables: Vec<_> = variables.filter(|(name, _)| name.starts_with(ENV_PREFIX)).collect();
        variables.sort();
        let given: BTreeSet<String> = variables.iter().map(|(name, _)| name.clone()).collect();
        for (name, value) in variables {
            let put = match name.strip_suffix(FILE_SUFFIX) {
                None => overlay(&mut table, &name, &value),
                Some(key) if given.contains(key) => {
                    Err(format!("{name} and {key} are both set: leave one of them out"))
                }
                Some(key) => from_file(&name, &value).and_then(|value| overlay(&mut table, key, &value)),
            };
            if let Err(problem) = put {
                problems.push(problem);
            }
        }
        let config = read_table(table, &mut problems);
        config.judge(&mut problems);
        if problems.is_empty() { Ok(config) } else { Err(Problems(problems)) }
    }

    fn judge(&self, problems: &mut Vec<String>) {
        let mut require = |holds: bool, problem: &str| {
            if !holds {
                problems.push(problem.to_owned());
            }
        };
        for (name, url) in &self.services {
            require(
                SERVICES.contains(&name.as_str()),
                &format!("services.{name} is unknown: the services are {}", SERVICES.join(", ")),
            );
            require(
                url.split(',').all(|url| is_dialable(url.trim())),
                &format!(
                    "services.{name} must be a URL such as http://10.0.0.7:7001, or several with commas between them"
                ),
            );
        }
        if let Some(url) = &self.server.public_url {
            let parsed = url.parse::<http::Uri>();
            let usable =
                parsed.is_ok_and(|uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some());
            require(usable && !url.ends_with('/'), "server.public_url must be a URL without a slash at the end");
        }
        if let Some(url) = &self.mail.smtp_url {
            let parsed = url.expose().parse::<http::Uri>();
            let dialable = parsed.is_ok_and(|uri| {
                matches!(uri.scheme_str(), Some("smtp" | "smtps")) && uri.host().is_some_and(|host| !host.is_empty())
            });
            require(dialable, "mail.smtp_url must be a URL such as smtps://user:password@mail.example.com");
        }
        require(
            self.mail.from.contains('@') && !self.mail.from.chars().any(char::is_control),
            "mail.from must be an address such as Paperkey <paperkey@example.com>",
        );
        if let Some(url) = &self.database.url {
            let url = url.expose();
            let known = ["sqlite:", "postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme));
            require(known, "database.url must begin with sqlite: or postgres://");
        }
        let secrets = [&self.secrets.master_key, &self.secrets.pepper, &self.secrets.signing_key];
        let given = secrets.iter().filter(|secret| secret.is_some()).count();
        require(given == 0 || given == 3, "secrets.master_key, secrets.pepper and secrets.signing_key go together");
        require(
            given == 3 || !self.is_postgres(),
            "PostgreSQL needs secrets.master_key, secrets.pepper and secrets.signing_key: 32 bytes each in base64, \
             the same in every process",
        );
        if let Some(Err(bad)) = self.given_keys()
            && bad.0 != "previous_master_keys"
        {
            require(false, &bad.to_string());
        }
        let others = &self.secrets.previous_master_keys;
        require(
            others.is_empty() || given == 3,
            "secrets.previous_master_keys goes with secrets.master_key: a data folder keeps its own",
        );
        require(
            others.len() <= MAX_PREVIOUS,
            &format!("secrets.previous_master_keys must hold at most {MAX_PREVIOUS} keys"),
        );
        if let Some(bad) = others.iter().find_map(|key| Keyring::check("previous_master_keys", key).err()) {
            require(false, &bad.to_string());
        }
        let previous = self.secrets.previous_pepper.as_ref();
        if let Some(Err(bad)) = previous.map(|pepper| Keyring::check("previous_pepper", pepper)) {
            require(false, &bad.to_string());
        }
        require(
            (100..=60_000).contains(&self.webhooks.timeout_ms),
            "webhooks.timeout_ms must be between 100 and 60000",
        );
        require(
            (1..=128).contains(&self.webhooks.max_in_flight_per_endpoint),
            "webhooks.max_in_flight_per_endpoint must be between 1 and 128",
        );
        let schedule = &self.webhooks.retry_schedule_s;
        require(
            (1..=50).contains(&schedule.len()) && schedule.iter().all(|wait| *wait <= 7 * 86_400),
            "webhooks.retry_schedule_s must hold 1 to 50 waits of at most a week, in seconds",
        );
        for (name, days) in [("held_days", self.webhooks.held_days), ("kept_days", self.webhooks.kept_days)] {
            require((1..=3_650).contains(&days), &format!("webhooks.{name} must be between 1 and 3650"));
        }
        require(
            self.webhooks.name_servers.as_ref().is_none_or(|servers| !servers.is_empty()),
            "webhooks.name_servers must hold at least one address such as 10.0.0.2:53, or be left out",
        );
        require(
            (100..=600_000).contains(&self.server.call_timeout_ms),
            "server.call_timeout_ms must be between 100 and 600000",
        );
        require(self.server.shutdown_grace_ms <= 600_000, "server.shutdown_grace_ms must be at most 600000");
        require(
            tracing_subscriber::EnvFilter::builder().parse(&self.telemetry.log_level).is_ok(),
            "telemetry.log_level must be error, warn, info, debug or trace, or directives such as info,hyper=warn",
        );
        for (name, url, schemes) in [
            ("alerts.slack_webhook_url", self.alerts.slack_webhook_url.as_ref().map(Secret::expose), ["http", "https"]),
            ("redis.url", self.redis.url.as_ref().map(Secret::expose), ["redis", "rediss"]),
            ("billing.url", self.billing.url.as_deref(), ["http", "https"]),
            ("telemetry.otlp_endpoint", self.telemetry.otlp_endpoint.as_deref(), ["http", "https"]),
        ] {
            let is_url = |url: &str| {
                let uri = url.parse::<http::Uri>().ok();
                uri.is_some_and(|uri| uri.host().is_some() && uri.scheme_str().is_some_and(|it| schemes.contains(&it)))
            };
            require(url.is_none_or(is_url), &format!("{name} must be a URL that begins with {}://", schemes[1]));
        }
        require(
            (0.0..=1.0).contains(&self.telemetry.trace_sample_ratio),
            "telemetry.trace_sample_ratio must be from 0 to 1",
        );
        require(self.server.drain_delay_ms <= 600_000, "server.drain_delay_ms must be at most 600000");
        require(
            (1..=1_000_000).contains(&self.server.max_in_flight),
            "server.max_in_flight must be between 1 and 1000000",
        );
        require(
            (1..=1_000).contains(&self.database.max_connections),
            "database.max_connections must be between 1 and 1000",
        );
        let tls = &self.tls;
        for (names, given) in [
            ("tls.cert and tls.key", [&tls.cert, &tls.key]),
            ("tls.service_cert and tls.service_key", [&tls.service_cert, &tls.service_key]),
        ] {
            require(given[0].is_some() == given[1].is_some(), &format!("{names} go together"));
        }
        require(
            tls.client_ca.is_none() || tls.cert.is_some(),
            "tls.client_ca goes with tls.cert and tls.key: processes show each other what they are",
        );
        require(
            self.redis.gateways.is_none_or(|gateways| (1..=1_000).contains(&gateways)),
            "redis.gateways must be between 1 and 1000",
        );
        require((1..=3_650).contains(&self.audit.retention_days), "audit.retention_days must be between 1 and 3650");
        require(self.audit.spool_max_bytes >= 65_536, "audit.spool_max_bytes must be at least 65536");
        problems.extend(self.limits.problems());
        problems.extend(self.tiers.problems());
        problems.extend(upstreams::problems(&self.upstreams, &self.tiers));
    }

    /// What a part of the product needs beyond a sound configuration.
    pub fn judge_for(&self, part: Part) -> Result<(), Problems> {
        let mut problems = Vec::new();
        for service in SERVICES {
            let needed = match part {
                Part::All => false,
                Part::Gateway => true,
                Part::Service(own) => own != service,
            };
            if needed && !self.services.contains_key(service) {
                problems.push(format!(
                    "services.{service} is missing: the URL of that service, such as http://10.0.0.7:7001"
                ));
            }
        }
        if part == Part::Gateway && self.secrets.master_key.is_none() && self.database.url.is_some() {
            problems.push("the gateway needs secrets.master_key, the same as the services have".to_owned());
        }
        if problems.is_empty() { Ok(()) } else { Err(Problems(problems)) }
    }

    fn is_postgres(&self) -> bool {
        self.database.url.as_ref().is_some_and(|url| url.expose().starts_with("postgres"))
    }

    /// Where the databases are.
    pub fn database_url(&self) -> DatabaseUrl {
        match self.database.url.as_ref().map(Secret::expose) {
            Some(url) if url.starts_with("postgres") => DatabaseUrl::Postgres(url.to_owned()),
            Some(url) => {
                let folder = url.trim_start_matches("sqlite:").trim_start_matches("//");
                DatabaseUrl::Sqlite { folder: PathBuf::from(folder) }
            }
            None => DatabaseUrl::Sqlite { folder: self.server.data.clone() },
        }
    }

    /// The installation's keys: as given, or as kept in the data folder.
    pub fn keyring(&self) -> Result<Keyring, Problems> {
        let keys = self.own_keyring()?;
        match &self.secrets.previous_pepper {
            Some(previous) => keys.with_previous_pepper(previous).map_err(|bad| Problems(vec![bad.to_string()])),
            None => Ok(keys),
        }
    }

    fn own_keyring(&self) -> Result<Keyring, Problems> {
        match self.given_keys() {
            Some(keys) => keys.map_err(|bad| Problems(vec![bad.to_string()])),
            None => Keyring::load_or_create(&self.key_folder()).map_err(|error| {
                Problems(vec![format!("the keys in {} cannot be read or made: {error}", self.key_folder().display())])
            }),
        }
    }

    /// Whether the keys are given here, and not kept in the data folder.
    pub fn keys_are_given(&self) -> bool {
        self.secrets.master_key.is_some()
    }

    /// Where keys are kept that are not given.
    pub fn key_folder(&self) -> PathBuf {
        self.server.data.join("secrets")
    }

    fn given_keys(&self) -> Option<Result<Keyring, BadKey>> {
        let secrets = &self.secrets;
        Some(Keyring::with_previous_masters(
            secrets.master_key.as_ref()?,
            &secrets.previous_master_keys,
            secrets.pepper.as_ref()?,
            secrets.signing_key.as_ref()?,
        ))
    }
}

/// What a file holds that a variable names. Its last line end is not part of the value.
fn from_file(name: &str, path: &str) -> Result<String, String> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text));
    match read {
        Err(error) => Err(format!("{name} names {path}, which cannot be read: {error}")),
        Ok(bytes) if bytes as u64 > MAX_FILE_BYTES => {
            Err(format!("{name} names {path}, which holds more than {MAX_FILE_BYTES} bytes"))
        }
        Ok(_) => {
            let value = text.strip_suffix('\n').unwrap_or(&text);
            Ok(value.strip_suffix('\r').unwrap_or(value).to_owned())
        }
    }
}

/// Puts `PAPERKEY__SECTION__KEY=value` over what the file says.
fn overlay(table: &mut Table, name: &str, value: &str) -> Result<(), String> {
    let path: Vec<String> = name.trim_start_matches(ENV_PREFIX).split("__").map(str::to_lowercase).collect();
    let [sections @ .., key] = path.as_slice() else { return Ok(()) };
    if path.iter().any(String::is_empty) {
        return Err(format!("{name} does not name a key: write {ENV_PREFIX}SECTION__KEY"));
    }
    let mut at = table;
    for section in sections {
        let entry = at.entry(section.clone()).or_insert_with(|| Value::Table(Table::new()));
        at = entry.as_table_mut().ok_or_else(|| format!("{name} names a key inside a value that is no section"))?;
    }
    // What is not a TOML value is meant as text: nobody quotes in the environment.
    let value = format!("value = {value}")
        .parse::<Table>()
        .ok()
        .and_then(|mut parsed| parsed.remove("value"))
        .unwrap_or_else(|| Value::String(value.to_owned()));
    at.insert(key.clone(), value);
    Ok(())
}

/// Reads what can be read, and reports each value that cannot and each key that nobody knows.
fn read_table(mut table: Table, problems: &mut Vec<String>) -> Config {
    for _ in 0..MAX_PROBLEMS {
        let mut unknown = Vec::new();
        let read: Result<Config, _> = {
            let mut track = serde_path_to_error::Track::new();
            let tracked = serde_path_to_error::Deserializer::new(Value::Table(table.clone()), &mut track);
            serde_ignored::deserialize(tracked, |path| unknown.push(path.to_string()))
                .map_err(|error: toml::de::Error| (track.path().to_string(), error))
        };
        match read {
            Ok(config) => {
                problems
                    .extend(unknown.into_iter().map(|key| format!("{key} is unknown: see `paperkey config print`")));
                return config;
            }
            Err((path, error)) => {
                // The value itself is not repeated: it may be a secret.
                let what = error.message().rsplit(", expected").next().map(str::trim).unwrap_or_default();
                let what = if error.message().contains(", expected") {
                    format!("must be {what}")
                } else {
                    format!("is not right: {}", kind_of(error.message()))
                };
                problems.push(format!("{path} {what}"));
                if !remove(&mut table, &path) {
                    return Config::default();
                }
            }
        }
    }
    Config::default()
}

fn kind_of(message: &str) -> &str {
    message.split(':').next().unwrap_or("it cannot be read").trim()
}

/// Removes the value at a path such as `server.trusted_proxies[0]`.
fn remove(table: &mut Table, path: &str) -> bool {
    let path = path.split('[').next().unwrap_or(path);
    let mut keys = path.split('.').peekable();
    let mut at = table;
    while let Some(key) = keys.next() {
        if keys.peek().is_none() || !at.get(key).is_some_and(Value::is_table) {
            return at.remove(key).is_some();
        }
        let Some(next) = at.get_mut(key).and_then(Value::as_table_mut) else { return false };
        at = next;
    }
    false
}

/// Whether a URL names a host and nothing more: gRPC knows no base path.
fn is_dialable(url: &str) -> bool {
    url.parse::<http::Uri>().is_ok_and(|uri| {
        let is_bare = matches!(uri.path(), "" | "/") && uri.query().is_none();
        let host = uri.host().is_some_and(|host| !host.is_empty());
        is_bare && host && matches!(uri.scheme_str(), Some("http" | "https")) && !url.contains('@')
    })
}

#[cfg(test)]
mod tests {
    use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};

    use super::*;

    fn parse(text: &str, variables: &[(&str, &str)]) -> Result<Config, Problems> {
        Config::parse(text, variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())))
    }

    #[test]
    fn the_environment_stands_over_the_file_and_the_file_over_the_defaults() {
        let text = "[server]\nlisten = \"127.0.0.1:1\"\nops_listen = \"127.0.0.1:2\"";
        let config = parse(
            text,
            &[
                ("PAPERKEY__SERVER__LISTEN", "127.0.0.1:3"),
                ("PAPERKEY__SERVER__TRUSTED_PROXIES", "[\"10.0.0.0/8\"]"),
                ("PAPERKEY__WEBHOOKS__ALLOW_HTTP", "true"),
                ("PAPERKEY_TEST_POSTGRES_URL", "not ours"),
            ],
        )
        .unwrap();
        assert_eq!(config.server.listen.port(), 3);
        assert_eq!(config.server.ops_listen.port(), 2);
        assert_eq!(config.server.trusted_proxies.len(), 1);
        assert!(config.webhooks.allow_http);
        assert_eq!(config.server.shutdown_grace_ms, 10_000);
    }

    #[test]
    fn every_problem_is_reported_at_once_and_no_value_is_repeated() {
        let text = "[server]\nlisten = \"hunter2\"\nlisen = 1\n[webhooks]\ntimeout_ms = \"soon\"\n[teleport]\nx = 1\n\
                    [database]\nurl = \"mysql://root:hunter2@db\"";
        let problems = parse(text, &[("PAPERKEY__WEBHOOKS__MAX_IN_FLIGHT_PER_ENDPOINT", "0")]).unwrap_err().0;
        for named in [
            "server.listen ",
            "server.lisen is unknown",
            "webhooks.timeout_ms must be",
            "teleport is unknown",
            "database.url must begin",
            "webhooks.max_in_flight_per_endpoint must be",
        ] {
            assert!(problems.iter().any(|problem| problem.starts_with(named)), "{named}: {problems:?}");
        }
        assert!(!problems.join("\n").contains("hunter2"), "{problems:?}");
    }

    #[test]
    fn no_more_are_under_way_to_an_endpoint_than_are_claimed_for_it() {
        for (count, is_good) in [("1", true), ("128", true), ("129", false), ("1000", false)] {
            let problems = parse("", &[("PAPERKEY__WEBHOOKS__MAX_IN_FLIGHT_PER_ENDPOINT", count)]).err();
            let problems = problems.map(|problems| problems.to_string()).unwrap_or_default();
            assert_eq!(!problems.contains("max_in_flight_per_endpoint"), is_good, "{count}: {problems}");
        }
    }

    #[test]
    fn a_value_may_stand_in_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let url = file("url", "postgres://paperkey:hunter2@db/paperkey\n");
        let key = |byte: u8| BASE64.encode([byte; 32]);
        let secrets = [file("master", &key(1)), file("pepper", &(key(2) + "\r\n")), file("signing", &(key(3) + "\n"))];
        let proxies = file("proxies", "[\"10.0.0.0/8\"]\n");
        let config = parse(
            "[database]\nurl = \"sqlite:here\"",
            &[
                ("PAPERKEY__DATABASE__URL__FILE", &url),
                ("PAPERKEY__SECRETS__MASTER_KEY__FILE", &secrets[0]),
                ("PAPERKEY__SECRETS__PEPPER__FILE", &secrets[1]),
                ("PAPERKEY__SECRETS__SIGNING_KEY__FILE", &secrets[2]),
                ("PAPERKEY__SERVER__TRUSTED_PROXIES__FILE", &proxies),
            ],
        )
        .unwrap();
        assert_eq!(config.database.url.as_ref().unwrap().expose(), "postgres://paperkey:hunter2@db/paperkey");
        assert_eq!(config.secrets.pepper.as_ref().unwrap().expose(), key(2));
        assert_eq!(config.server.trusted_proxies.len(), 1);
    }

    #[test]
    fn a_file_that_is_no_value_is_a_problem_that_repeats_nothing_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let (long, bad) = (folder.path().join("long"), folder.path().join("bad"));
        fs::write(&long, "hunter2 ".repeat(10_000)).unwrap();
        fs::write(&bad, "hunter2").unwrap();
        let nowhere = folder.path().join("nowhere");
        let [long, bad, nowhere] = [&long, &bad, &nowhere].map(|path| path.to_str().unwrap());
        let problems = parse(
            "",
            &[
                ("PAPERKEY__DATABASE__URL__FILE", nowhere),
                ("PAPERKEY__MAIL__FROM__FILE", long),
                ("PAPERKEY__SECRETS__PREVIOUS_PEPPER__FILE", bad),
                ("PAPERKEY__SERVER__LISTEN", "127.0.0.1:1"),
                ("PAPERKEY__SERVER__LISTEN__FILE", bad),
            ],
        )
        .unwrap_err()
        .0;
        for says in [
            "PAPERKEY__DATABASE__URL__FILE names",
            "which holds more than 65536 bytes",
            "secrets.previous_pepper must be 32 bytes",
            "PAPERKEY__SERVER__LISTEN__FILE and PAPERKEY__SERVER__LISTEN are both set",
        ] {
            assert!(problems.iter().any(|problem| problem.contains(says)), "{says}: {problems:?}");
        }
        assert!(!problems.join("\n").contains("hunter2"), "{problems:?}");
    }

    #[test]
    fn a_fleet_must_be_given_its_secrets() {
        let problems = parse("[database]\nurl = \"postgres://db/paperkey\"", &[]).unwrap_err();
        assert!(problems.0[0].contains("secrets.master_key"), "{problems}");
    }

    #[test]
    fn the_pepper_before_must_be_one() {
        let problems = parse("[secrets]\nprevious_pepper = \"hunter2\"", &[]).unwrap_err();
        assert!(problems.0[0].starts_with("secrets.previous_pepper must be 32 bytes"), "{problems}");
    }

    #[test]
    fn master_keys_besides_the_one_that_seals_must_be_keys_and_few() {
        let key = |byte: u8| BASE64.encode([byte; 32]);
        let given = format!("[secrets]\nmaster_key = '{0}'\npepper = '{0}'\nsigning_key = '{0}'\n", key(1));
        let with = |others: &str| parse(&format!("{given}previous_master_keys = [{others}]"), &[]);
        let list = |count: u8| (2..2 + count).map(|byte| format!("'{}'", key(byte))).collect::<Vec<_>>().join(", ");
        let config = with(&list(8)).unwrap();
        assert_eq!(config.keyring().unwrap().other_master_ids().len(), 8);
        let printed = toml::to_string(&config).unwrap();
        assert!(!printed.contains(&key(1)) && !printed.contains(&key(2)), "{printed}");
        for (others, says) in
            [(list(9).as_str(), "secrets.previous_master_keys must hold at most 8"), ("'hunter2'", "must be 32 bytes")]
        {
            let problems = with(others).unwrap_err();
            assert!(problems.0.len() == 1 && problems.0[0].contains(says), "{problems}");
            assert!(!problems.0[0].contains("hunter2"), "{problems}");
        }
        let problems = parse(&format!("[secrets]\nprevious_master_keys = ['{}']", key(1)), &[]).unwrap_err();
        assert!(problems.0[0].contains("goes with secrets.master_key"), "{problems}");
        let listed = format!("[\"{}\"]", key(2));
        let config = parse(&given, &[("PAPERKEY__SECRETS__PREVIOUS_MASTER_KEYS", &listed)]).unwrap();
        assert_eq!(config.secrets.previous_master_keys.len(), 1);
    }

    #[test]
    fn what_is_printed_holds_no_secret() {
        let text = "[database]\nurl = \"sqlite:/secret-place\"";
        let printed = toml::to_string(&parse(text, &[]).unwrap()).unwrap();
        assert!(printed.contains("[redacted]") && !printed.contains("secret-place"), "{printed}");
    }

    #[test]
    fn mail_goes_to_a_server_that_is_named_as_one() {
        for good in ["smtp://localhost", "smtps://u:p%40ss@mail.example.com:465", "smtp://u:p@[::1]:587?tls=required"] {
            assert!(parse(&format!("[mail]\nsmtp_url = \"{good}\""), &[]).is_ok(), "{good}");
        }
        for bad in ["mail.example.com", "https://u:hunter2@mail.example.com", "smtp://", "smtp:hunter2"] {
            let problems = parse(&format!("[mail]\nsmtp_url = \"{bad}\""), &[]).unwrap_err();
            assert!(problems.0[0].starts_with("mail.smtp_url must be") && !problems.0[0].contains("hunter2"), "{bad}");
        }
        for bad in ["nobody", "", "a@b\\r\\nBcc: eve@example.com"] {
            let problems = parse(&format!("[mail]\nfrom = \"{bad}\""), &[]).unwrap_err();
            assert!(problems.0[0].starts_with("mail.from must be"), "{bad}");
        }
    }

    #[test]
    fn upstreams_are_read_from_the_file_and_from_the_environment_and_unknown_keys_of_theirs_are_refused() {
        let text = "[[upstreams]]\npath = \"/v1/pdf/\"\nurl = \"http://127.0.0.1:3000\"\nanonymous = true";
        let config = parse(text, &[]).unwrap();
        assert!(config.upstreams[0].anonymous && config.upstreams[0].timeout_ms == 30_000);
        assert_eq!(parse(&toml::to_string(&config).unwrap(), &[]).unwrap().upstreams, config.upstreams);
        let inline = "[{ path = \"/v1/pdf/\", url = \"http://127.0.0.1:3000\", anonymous = true }]";
        assert_eq!(parse("", &[("PAPERKEY__UPSTREAMS", inline)]).unwrap().upstreams, config.upstreams);
        let problems = parse(&format!("{text}\nmeter = \"pages\"\ntimeout_ms = 1\nmetre = 1"), &[]).unwrap_err();
        assert!(problems.0.iter().any(|problem| problem.contains("metre is unknown")), "{problems}");
        assert!(problems.0.iter().any(|problem| problem.contains("meter is named by no tier")), "{problems}");
        assert!(problems.0.iter().any(|problem| problem.contains("timeout_ms must be")), "{problems}");
    }

    #[test]
    fn a_service_is_at_one_url_or_at_several() {
        let with = |urls: &str| parse(&format!("[services]\nauth = \"{urls}\""), &[]);
        for good in ["http://auth:7001", "https://auth", "http://10.0.0.7:7001, http://[::1]:7001/"] {
            assert!(with(good).is_ok(), "{good}");
        }
        for bad in ["", "auth:7001", "http://a,", "http://a http://b", "http://a/b", "http://u:p@a", "http://a?b"] {
            let problems = with(bad).unwrap_err();
            assert!(
                problems.0[0].starts_with("services.auth must be a URL") && !problems.0[0].contains("u:p"),
                "{bad}"
            );
        }
    }

    #[test]
    fn the_gateway_must_know_where_the_services_are() {
        let problems = Config::default().judge_for(Part::Gateway).unwrap_err();
        assert_eq!(problems.0.len(), 4, "{problems}");
        assert!(Config::default().judge_for(Part::All).is_ok());
    }
}
