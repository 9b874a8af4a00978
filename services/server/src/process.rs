//! A serving process: which services it holds, how it reaches the others, how it starts and how it ends.
//!
//! The same code runs everything in one process and each part alone; the only difference is which channels are local.

use std::{fmt::Write as _, fs::File, sync::Arc, time::Duration};

use futures_util::FutureExt as _;
use paperkey_auth::{
    AuthConfig, BadMail, Mail,
    admin::{Admin, Care},
    audit::AuditLog,
};
use paperkey_gateway::{Gateway, GatewayConfig, GatewayDeps};
use paperkey_kit::{
    audit::AuditSink,
    authn::{CachedAuthenticator, Judgements},
    cache::Epochs,
    channel::Channel,
    clock::Clock,
    config::{Config, Part, Registration},
    db::{Database, Engine},
    host::{self, GrpcHost, Operations},
    incidents::Incidents,
    lease::Leases,
    limits::{Limiter, MemoryLimiter, RedisLimiter, RedisOptions, RedisStats, StoreState, Subjects},
    policy::Guarded,
    principal::Signer,
    reflection,
    secrets::Keyring,
    service::{Assembled, Channels, SERVICES, ServiceDeps, Worker},
    shutdown::{self, Shutdown},
    telemetry,
};
use paperkey_proto::auth::v1::{
    audit_intake_service_client::AuditIntakeServiceClient, credential_service_client::CredentialServiceClient,
};
use paperkey_webhook::WebhookConfig;
use tokio::{
    net::TcpListener,
    signal::unix::{Signal, SignalKind, signal},
    task::JoinSet,
};

use crate::{Failure, admin, say, storage};

const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Runs a part of the product until SIGTERM or SIGINT.
pub(crate) async fn run(config: Config, part: Part) -> Result<(), Failure> {
    config.judge_for(part)?;
    telemetry::init(&config.telemetry);
    let mut signals = Signals::new()?;
    // Ports first: the most common mistake is found before anything is touched.
    let listener = host::bind(config.server.listen).await?;
    let operations = host::bind(config.server.ops_listen).await?;

    let mut process = Process::assemble(&config, part, &public_url(&config, listener.local_addr()?)).await?;
    let (handle, shutdown) = shutdown::channel();
    let mut tasks = process.start(&shutdown);
    // What is answered during the end is written down like anything before it, so this ends after the last answer.
    let (recording, recorded) = shutdown::channel();
    let recorder = process.audit.clone().map(|audit| tokio::spawn(audit.run(recorded)));
    let grace = Duration::from_millis(config.server.shutdown_grace_ms);

    let ready = process.readiness();
    let operations_at = operations.local_addr()?;
    tasks.spawn(host::serve(
        operations,
        move |request, peer| {
            let ready = ready.clone();
            async move { ready.handle(request, peer).await }
        },
        shutdown.clone(),
        Duration::from_secs(1),
    ));
    let listening = listener.local_addr()?;
    let serving = tokio::spawn(process.serve(&config, listener, shutdown.clone(), grace).await?);
    tracing::info!(%listening, operations = %operations_at, part = ?part, "listening");
    if part == Part::All {
        welcome(&public_url(&config, listening), process.first_start);
    }

    signals.received().await;
    tracing::info!("shutting down");
    handle.shut_down();
    let drained = async {
        // A part that panicked has said so; the others are still waited for.
        let _ = serving.await;
        recording.shut_down();
        if let Some(recorder) = recorder {
            let _ = recorder.await;
        }
        // First what must not be lost: it is on disk before anybody else is asked for anything.
        if let Some(audit) = &process.audit
            && let Err(error) = audit.flush().await
        {
            tracing::warn!(reason = error.reason().as_str_name(), "the last records of calls wait on disk");
        }
        while tasks.join_next().await.is_some() {}
        // What the last calls used and saw is not forgotten, unless auth has gone before.
        if let Err(error) = process.authenticator.uses().flush().await {
            tracing::warn!(reason = error.reason().as_str_name(), "the last uses of keys are not recorded");
        }
        if let Err(error) = process.incidents.flush().await {
            tracing::warn!(reason = error.reason().as_str_name(), "the last incidents are not recorded");
        }
        if let Some(log) = &process.audit_log
            && let Err(error) = log.chain().await
        {
            tracing::warn!(%error, "the last blocks of the audit log are chained by the next start");
        }
        for (_, database) in process.databases {
            database.close().await;
        }
    };
    tokio::select! {
        outcome = tokio::time::timeout(grace + Duration::from_secs(2), drained) => {
            if outcome.is_err() {
                tracing::warn!("not everything ended within the grace");
            }
        }
        () = signals.received() => tracing::warn!("told again: ending at once"),
    }
    Ok(())
}

struct Process {
    part: Part,
    clock: Clock,
    signer: Signer,
    channels: Channels,
    authenticator: Arc<CachedAuthenticator>,
    limiter: Arc<Limiter>,
    subjects: Subjects,
    incidents: Arc<Incidents>,
    /// The log itself, where auth is in this process.
    audit_log: Option<AuditLog>,
    /// Where a gateway says what its calls were.
    audit: Option<Arc<AuditSink>>,
    hosted: Vec<(&'static str, Guarded)>,
    workers: Vec<Worker>,
    databases: Vec<(&'static str, Database)>,
    first_start: bool,
    /// Locks of what this process owns, held for as long as it lives.
    owned: Vec<File>,
}

impl Process {
    async fn assemble(config: &Config, part: Part, public_url: &str) -> Result<Self, Failure> {
        let clock = Clock::system();
        storage::make_folder(&config.server.data)?;
        let keys = config.keyring()?;
        let signer = Signer::new(&keys, clock.clone());
        let epochs = Arc::new(Epochs::default());
        let own: Vec<&'static str> =
            SERVICES.into_iter().filter(|service| part == Part::All || part == Part::Service(service)).collect();

        let mut channels = Channels::default();
        for service in SERVICES {
            if own.contains(&service) {
                channels.insert(service, Channel::local());
            } else if let Some(url) = config.services.get(service) {
                channels.insert(service, Channel::connect(url)?);
            }
        }
        let auth = channels.get("auth")?;
        let authenticator = CachedAuthenticator::new(auth, signer.clone(), clock.clone(), Arc::clone(&epochs));

        let limiter = match &config.redis.url {
            Some(url) if matches!(part, Part::All | Part::Gateway) => {
                let options = RedisOptions { url: url.clone(), gateways: config.redis.gateways };
                Limiter::Redis(RedisLimiter::connect(options, clock.clone()).await.map_err(Failure)?)
            }
            _ => Limiter::Memory(MemoryLimiter::new(clock.clone())),
        };

        let seen = CredentialServiceClient::new(auth.as_service("gateway", signer.clone(), None));
        let incidents = Incidents::new(seen, Arc::clone(authenticator.uses()), clock.clone());
        let audit = match part {
            Part::All | Part::Gateway => {
                let client = AuditIntakeServiceClient::new(auth.as_service("gateway", signer.clone(), None));
                let (folder, bytes) = (config.server.data.join("audit-spool"), config.audit.spool_max_bytes);
                Some(AuditSink::new(client, &folder, bytes, clock.clone())?)
            }
            Part::Service(_) => None,
        };
        let mut process = Self {
            part,
            clock,
            signer,
            channels,
            authenticator,
            limiter: Arc::new(limiter),
            incidents,
            audit,
            audit_log: None,
            subjects: Subjects::new(&keys),
            hosted: Vec::new(),
            workers: Vec::new(),
            databases: Vec::new(),
            first_start: false,
            owned: Vec::new(),
        };
        for service in own {
            process.add(config, service, &keys, &epochs, public_url).await?;
        }
        Ok(process)
    }

    async fn add(
        &mut self,
        config: &Config,
        service: &'static str,
        keys: &Keyring,
        epochs: &Arc<Epochs>,
        public_url: &str,
    ) -> Result<(), Failure> {
        if service == "auth" && self.part != Part::All && config.server.public_url.is_none() {
            tracing::warn!("server.public_url is not set, so links in mails lead to this process and not to a gateway");
        }
        self.owned.extend(storage::own(config, service)?);
        let database = storage::open_current(config, service, &self.clock).await?;
        let keys = &keys.clone().with_kept(&database, service).await?;
        if database.engine() == Engine::Sqlite {
            // The file is this process's alone. What a killed one still holds would only keep events waiting.
            Leases::new(database.clone()).end_all().await?;
        }
        let deps = ServiceDeps {
            database: database.clone(),
            keys: keys.clone(),
            clock: self.clock.clone(),
            signer: self.signer.clone(),
            channels: self.channels.clone(),
        };
        if service == "auth" {
            self.audit_log = Some(AuditLog::new(database.clone(), keys, &config.server.data));
        }
        if service == "auth" && database.engine() == Engine::Sqlite {
            let admin = Admin::new(database.clone(), keys, Arc::clone(epochs))?;
            self.first_start = admin::care_for_system_key(config, &admin).await? == Care::Make;
            let config = config.clone();
            self.workers.push(Worker::new("system key", |shutdown| admin::keep_system_key(config, admin, shutdown)));
        }
        let Assembled { rpcs, workers } = match service {
            "auth" => paperkey_auth::assemble(deps, auth_config(config, epochs, public_url)?)?,
            "catalog" => paperkey_catalog::assemble(deps)?,
            "licensing" => paperkey_licensing::assemble(deps)?,
            _ => paperkey_webhook::assemble(deps, webhook_config(config)?)?,
        };
        let rpcs = reflection::add_to(rpcs, |_| true)?;
        let authenticator = Arc::clone(&self.authenticator) as _;
        let (signer, clock) = (self.signer.clone(), self.clock.clone());
        let guarded = Guarded::new(rpcs, signer, clock, Some(authenticator), Some(database.clone()));
        self.channels.get(service)?.bind(guarded.clone());
        self.hosted.push((service, guarded));
        self.workers.extend(workers);
        self.databases.push((service, database));
        Ok(())
    }

    /// Starts everything that runs beside the answering of calls.
    fn start(&mut self, shutdown: &Shutdown) -> JoinSet<()> {
        let mut tasks = JoinSet::new();
        tasks.spawn(Arc::clone(&self.authenticator).watch(shutdown.clone()));
        tasks.spawn(Arc::clone(self.authenticator.uses()).hand_over(shutdown.clone()));
        tasks.spawn(Arc::clone(&self.incidents).run(shutdown.clone()));
        if let Limiter::Redis(limiter) = &*self.limiter {
            tasks.spawn(limiter.run(shutdown.clone()));
        }
        for worker in std::mem::take(&mut self.workers) {
            let name = worker.name;
            let run = worker.run(shutdown.clone());
            tasks.spawn(async move {
                run.await;
                tracing::debug!(worker = name, "ended");
            });
        }
        tasks
    }

    /// What answers on the public listener.
    async fn serve(
        &self,
        config: &Config,
        listener: TcpListener,
        shutdown: Shutdown,
        grace: Duration,
    ) -> Result<futures_util::future::BoxFuture<'static, ()>, Failure> {
        if let (Part::Service(_), [(_, guarded)]) = (self.part, self.hosted.as_slice()) {
            let service = GrpcHost::new(guarded.clone()).await;
            let handle = move |request, peer| {
                let service = service.clone();
                async move { service.handle(request, peer).await }
            };
            return Ok(host::serve(listener, handle, shutdown, grace).boxed());
        }
        let gateway = Gateway::new(
            GatewayConfig {
                public_url: public_url(config, listener.local_addr()?),
                public_url_is_configured: config.server.public_url.is_some(),
                trusted_proxies: config.server.trusted_proxies.clone(),
                cors_any_origin: config.server.cors_any_origin,
                call_timeout_ms: config.server.call_timeout_ms,
                upstreams: config.upstreams.clone(),
                tiers: Arc::new(config.tiers.clone()),
                limits: config.limits.clone(),
                billing_url: config.billing.url.clone(),
                version: VERSION,
            },
            GatewayDeps {
                channels: self.channels.iter().map(|(name, channel)| (name.to_owned(), channel.clone())).collect(),
                authenticator: Arc::clone(&self.authenticator) as _,
                signer: self.signer.clone(),
                clock: self.clock.clone(),
                limiter: Arc::clone(&self.limiter),
                subjects: self.subjects.clone(),
                audit: self.audit.clone(),
                incidents: Some(Arc::clone(&self.incidents)),
                shutdown: Some(shutdown.clone()),
            },
        )?;
        let handle = move |request, peer| gateway.handle(request, peer);
        Ok(host::serve(listener, handle, shutdown, grace).boxed())
    }

    fn readiness(&self) -> Operations {
        let databases = self.databases.clone();
        let watched = databases.clone();
        let authenticator = Arc::clone(&self.authenticator);
        let (audit, limiter) = (self.audit.clone(), Arc::clone(&self.limiter));
        let ready = move || {
            let databases = databases.clone();
            async move {
                for (service, database) in &databases {
                    let problem = storage::schema_problem(database, service).await;
                    if let Some(problem) = problem.map_err(|failure| failure.0)? {
                        return Err(problem);
                    }
                }
                Ok(())
            }
            .boxed()
        };
        Operations::new(ready, move |text| {
            host::write_database_metrics(text, &watched);
            let Judgements { lookups, hits, malformed } = authenticator.judgements();
            for (name, help, value) in [
                ("paperkey_credential_lookups_total", "Credentials that auth was asked about.", lookups),
                ("paperkey_credential_hits_total", "Credentials that were known.", hits),
                (
                    "paperkey_credential_malformed_total",
                    "Credentials that could be none, by form or checksum.",
                    malformed,
                ),
            ] {
                write_metric(text, name, "counter", help, value);
            }
            if let Some(counts) = audit.as_ref().map(|audit| audit.counts()) {
                for (name, kind, help, value) in [
                    ("paperkey_audit_records_total", "counter", "Calls recorded.", counts.recorded),
                    ("paperkey_audit_handed_over_total", "counter", "Records that auth has taken.", counts.handed_over),
                    ("paperkey_audit_lost_total", "counter", "Records that found no room.", counts.lost),
                    ("paperkey_audit_waiting", "gauge", "Records that wait in memory.", counts.waiting),
                    ("paperkey_audit_spooled_bytes", "gauge", "Bytes that wait on disk.", counts.spooled_bytes),
                ] {
                    write_metric(text, name, kind, help, value);
                }
            }
            if let Limiter::Redis(limiter) = &*limiter {
                let RedisStats { state, failures, gateways } = limiter.stats();
                let (up, gateways) = (u64::from(state == StoreState::Up), u64::from(gateways));
                write_metric(text, "paperkey_limits_store_up", "gauge", "Whether gateways share their limits.", up);
                let help = "How often the store of limits was lost.";
                write_metric(text, "paperkey_limits_store_failures_total", "counter", help, failures);
                write_metric(text, "paperkey_limits_gateways", "gauge", "Gateways that share limits.", gateways);
            }
        })
    }
}

fn write_metric(text: &mut String, name: &str, kind: &str, help: &str, value: u64) {
    // Writing to a String cannot fail.
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}\n{name} {value}");
}

fn auth_config(config: &Config, epochs: &Arc<Epochs>, public_url: &str) -> Result<AuthConfig, BadMail> {
    let folder = config.server.data.join("mail");
    Ok(AuthConfig {
        registration_open: config.dashboard.registration == Registration::Open,
        version: VERSION,
        epochs: Arc::clone(epochs),
        public_url: public_url.to_owned(),
        mail: Mail::new(config.mail.smtp_url.as_ref(), &config.mail.from, folder)?,
        tiers: Arc::new(config.tiers.clone()),
        slack_webhook_url: config.alerts.slack_webhook_url.clone(),
        audit_retention_days: config.audit.retention_days,
        audit_folder: config.server.data.clone(),
    })
}

fn webhook_config(config: &Config) -> Result<WebhookConfig, Failure> {
    let webhooks = &config.webhooks;
    let unreadable =
        |error| Failure(format!("webhooks.ca_file cannot be read ({error}): name a file of PEM certificates"));
    let extra_ca = webhooks.ca_file.as_ref().map(std::fs::read).transpose().map_err(unreadable)?;
    Ok(WebhookConfig {
        allow_http: webhooks.allow_http,
        allow_private_networks: webhooks.allow_private_networks,
        timeout_ms: webhooks.timeout_ms,
        max_in_flight_per_endpoint: webhooks.max_in_flight_per_endpoint,
        retry_schedule_s: webhooks.retry_schedule_s.clone(),
        held_days: webhooks.held_days,
        kept_days: webhooks.kept_days,
        name_servers: webhooks.name_servers.clone(),
        extra_ca,
        version: VERSION,
    })
}

fn public_url(config: &Config, listening: std::net::SocketAddr) -> String {
    config.server.public_url.clone().unwrap_or_else(|| {
        // 0.0.0.0 is where one listens, not where one calls.
        let host = match listening.ip() {
            ip if ip.is_unspecified() => "127.0.0.1".to_owned(),
            std::net::IpAddr::V6(ip) => format!("[{ip}]"),
            std::net::IpAddr::V4(ip) => ip.to_string(),
        };
        format!("http://{host}:{}", listening.port())
    })
}

fn welcome(url: &str, first_start: bool) {
    say(format_args!("Paperkey {VERSION} is running.\n\n  Dashboard   {url}/app/\n  API         {url}"));
    if first_start {
        say(format_args!(
            "\nMake an account, and with it your first team and keys:\n\n  \
             curl -X POST {url}/auth/register -H 'Content-Type: application/json' \\\n    \
             -d '{{\"email\": \"you@example.com\", \"password\": \"at least 8 characters\"}}'\n"
        ));
    } else {
        say(format_args!("\nTry:\n\n  curl {url}/v1/status\n"));
    }
}

/// What tells a process to end. Listened to from the start and to the end, so that none is missed in between.
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    pub(crate) fn new() -> Result<Self, Failure> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    pub(crate) async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
