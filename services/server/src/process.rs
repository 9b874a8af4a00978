//! A serving process: which services it holds, how it reaches the others, how it starts and how it ends.
//!
//! The same code runs everything in one process and each part alone; the only difference is which channels are local.

use std::{fs::File, net::SocketAddr, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, future::BoxFuture};
use paperkey_auth::{
    AuthConfig, BadMail, Mail,
    admin::{Admin, Care},
    audit::AuditLog,
};
use paperkey_gateway::{Gateway, GatewayConfig, GatewayDeps};
use paperkey_kit::{
    audit::AuditSink,
    authn::{CachedAuthenticator, POLL_INTERVAL},
    cache::Epochs,
    changes::bell::{Bell, Rhythm},
    channel::Channel,
    clock::Clock,
    config::{Config, Part, Registration},
    db::{Database, Engine},
    host::{self, Door, GrpcHost, Operations},
    ids::new_id,
    incidents::Incidents,
    lease::Leases,
    limits::{Limiter, MemoryLimiter, RedisLimiter, RedisOptions, Subjects},
    policy::Guarded,
    principal::Signer,
    ready::{Health, Readiness},
    reflection,
    secrets::Keyring,
    service::{Assembled, Channels, SERVICES, ServiceDeps, Worker},
    shed::Places,
    shutdown::{self, Shutdown},
    telemetry::{self, metrics},
    tls::Tls,
};
use paperkey_proto::auth::v1::{
    audit_intake_service_client::AuditIntakeServiceClient, credential_service_client::CredentialServiceClient,
};
use paperkey_webhook::WebhookConfig;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    task::JoinSet,
};

use crate::{Failure, admin, say, storage};

pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");
/// How often a process looks at itself.
const SAMPLE: Duration = Duration::from_secs(5);

/// Runs a part of the product until SIGTERM or SIGINT.
pub(crate) async fn run(config: Config, part: Part) -> Result<(), Failure> {
    config.judge_for(part)?;
    let instance = new_id("proc", &Clock::system());
    let telemetry = telemetry::start(&config.telemetry, name_of(part), VERSION, &instance);
    // Large, and there is one of it.
    let outcome = Box::pin(run_part(config, part, instance)).await;
    telemetry.end().await;
    outcome
}

async fn run_part(config: Config, part: Part, instance: String) -> Result<(), Failure> {
    let mut signals = Signals::new()?;
    let tls = Tls::load(&config.tls, Clock::system())?;
    // Ports first: the most common mistake is found before anything is touched.
    let listener = host::bind(config.server.listen).await?;
    let operations = host::bind(config.server.ops_listen).await?;

    let mut process = Process::assemble(&config, part, &public_url(&config, listener.local_addr()?), tls).await?;
    // First a process says that it is leaving, then it ends, and what tells of it goes last.
    let (leave, leaving) = shutdown::channel();
    let (handle, shutdown) = shutdown::channel();
    let (close, closed) = shutdown::channel();
    let mut tasks = process.start(&shutdown);
    // The last numbers are told when there is nothing more to count.
    let (counting, counted) = shutdown::channel();
    let pushing = process.observe(&config, instance, counted).map(tokio::spawn);
    // What is answered during the end is written down like anything before it, so this ends after the last answer.
    let (recording, recorded) = shutdown::channel();
    let recorder = process.audit.clone().map(|audit| tokio::spawn(audit.run(recorded)));
    let grace = Duration::from_millis(config.server.shutdown_grace_ms);

    let readiness = process.readiness(leaving.clone());
    let ready = Process::operations(readiness.clone());
    tasks.spawn(watch_over(ready.clone(), process.databases.clone(), shutdown.clone()));
    let operations_at = operations.local_addr()?;
    let operating = tokio::spawn(host::serve(
        operations,
        move |request, peer| {
            let ready = ready.clone();
            async move { ready.handle(request, peer).await }
        },
        closed,
        Duration::from_secs(1),
    ));
    let listening = listener.local_addr()?;
    let door = Door::from(listener).leaving_at(leaving);
    let (serving, health) = process.serve(&config, door, listening, shutdown.clone(), grace)?;
    let serving = tokio::spawn(serving);
    tasks.spawn(health.follow(readiness, shutdown.clone()));
    tracing::info!(%listening, operations = %operations_at, part = ?part, "listening");
    if part == Part::All {
        welcome(&public_url(&config, listening), process.first_start);
    }

    signals.received().await;
    leave.shut_down();
    let delay = Duration::from_millis(config.server.drain_delay_ms);
    if !delay.is_zero() {
        tracing::info!(delay_ms = config.server.drain_delay_ms, "draining");
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            () = signals.received() => {
                tracing::warn!("told again: ending at once");
                return Ok(());
            }
        }
    }
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
        // The last answer is given, and nobody works any more.
        counting.shut_down();
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
        if let Some(pushing) = pushing {
            let _ = pushing.await;
        }
        close.shut_down();
        let _ = operating.await;
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
    tls: Tls,
    /// How much it does at a time.
    places: Places,
    authenticator: Arc<CachedAuthenticator>,
    /// Tells the other processes at once that something has changed, and hears it from them.
    bell: Option<Bell>,
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
    _owned: Vec<File>,
}

impl Process {
    async fn assemble(config: &Config, part: Part, public_url: &str, tls: Tls) -> Result<Self, Failure> {
        let clock = Clock::system();
        let own: Vec<&'static str> =
            SERVICES.into_iter().filter(|service| part == Part::All || part == Part::Service(service)).collect();
        // Before anything is made: where a restore is under way, keys and a spool of ours would be in its way.
        let owned = storage::own(config, &own)?;
        storage::make_folder(&config.server.data)?;
        let keys = config.keyring()?;
        let signer = Signer::new(&keys, clock.clone());
        let epochs = Arc::new(Epochs::default());

        let mut channels = Channels::default();
        for service in SERVICES {
            if own.contains(&service) {
                channels.insert(service, Channel::local());
            } else if let Some(url) = config.services.get(service) {
                channels.insert(service, Channel::connect(url, Some(tls.for_channels()))?);
            }
        }
        let auth = channels.get("auth")?;
        let authenticator = CachedAuthenticator::new(auth, signer.clone(), clock.clone(), Arc::clone(&epochs));

        let bell = match &config.redis.url {
            Some(url) => Some(Bell::new(url, &keys).map_err(|error| Failure(error.to_string()))?),
            None => None,
        };
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
            tls,
            places: Places::new(config.server.max_in_flight),
            authenticator,
            bell,
            limiter: Arc::new(limiter),
            incidents,
            audit,
            audit_log: None,
            subjects: Subjects::new(&keys),
            hosted: Vec::new(),
            workers: Vec::new(),
            databases: Vec::new(),
            first_start: false,
            _owned: owned,
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
        let database = storage::open_serving(config, service, &self.clock, self.bell.clone()).await?;
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
        let rhythm = Rhythm::every(POLL_INTERVAL).hastened_by(self.bell.as_ref(), "auth");
        tasks.spawn(Arc::clone(&self.authenticator).watch(rhythm, shutdown.clone()));
        if let Some(bell) = self.bell.clone() {
            tasks.spawn(bell.run(shutdown.clone()));
        }
        tasks.spawn(self.tls.clone().follow(shutdown.clone()));
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
    fn serve(
        &self,
        config: &Config,
        door: Door,
        listening: SocketAddr,
        shutdown: Shutdown,
        grace: Duration,
    ) -> Result<(BoxFuture<'static, ()>, Health), Failure> {
        let door = door.with_tls(self.tls.for_listener(matches!(self.part, Part::Service(_))));
        if let (Part::Service(_), [(name, guarded)]) = (self.part, self.hosted.as_slice()) {
            let (service, health) = GrpcHost::new(name, guarded.clone(), self.places.clone());
            let handle = move |request, peer| {
                let service = service.clone();
                async move { service.handle(request, peer).await }
            };
            return Ok((host::serve(door.for_peers(), handle, shutdown, grace).boxed(), health));
        }
        let gateway = Gateway::new(
            GatewayConfig {
                public_url: public_url(config, listening),
                public_url_is_configured: config.server.public_url.is_some(),
                trusted_proxies: config.server.trusted_proxies.clone(),
                trusted_parents: config.telemetry.trusted_parents.clone(),
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
                places: Some(self.places.clone()),
            },
        )?;
        let health = gateway.health();
        let handle = move |request, peer| gateway.handle(request, peer);
        Ok((host::serve(door, handle, shutdown, grace).boxed(), health))
    }

    /// Publishes what this process counts. What pushes it is given back, where somebody collects it.
    fn observe(
        &self,
        config: &Config,
        instance: String,
        counted: Shutdown,
    ) -> Option<impl Future<Output = ()> + Send + use<>> {
        let part = name_of(self.part);
        metrics::observe_process(VERSION, part);
        metrics::observe_databases(self.databases.clone());
        metrics::observe_authenticator(Arc::clone(&self.authenticator));
        metrics::observe_limiter(Arc::clone(&self.limiter));
        let (channels, places, tls) = (self.channels.clone(), self.places.clone(), self.tls.clone());
        metrics::observe_channels(move || {
            channels.iter().filter_map(|(service, channel)| Some((service.to_owned(), channel.stats()?))).collect()
        });
        metrics::observe_load(move || places.load());
        metrics::observe_certificates(move || tls.shown());
        if let Some(audit) = &self.audit {
            metrics::observe_audit(Arc::clone(audit), config.audit.spool_max_bytes);
        }
        config.telemetry.otlp_endpoint.clone().map(|endpoint| {
            let resource = vec![
                ("service.namespace", "paperkey".to_owned()),
                ("service.name", format!("paperkey-{part}")),
                ("service.version", VERSION.to_owned()),
                ("service.instance.id", instance),
            ];
            metrics::otlp::push(endpoint, resource, counted)
        })
    }

    /// Whether it takes calls: its databases answer and are current, and a gateway hears auth, without which it could let
    /// nobody in.
    fn readiness(&self, leaving: Shutdown) -> Readiness {
        let databases = self.databases.clone();
        let asked = (self.part == Part::Gateway).then(|| Arc::clone(&self.authenticator));
        let check = move || {
            let (databases, asked) = (databases.clone(), asked.clone());
            async move {
                if asked.is_some_and(|authenticator| !authenticator.hears_auth()) {
                    return Err("auth does not answer".to_owned());
                }
                for (service, database) in &databases {
                    let problem = storage::schema_problem(database, service).await;
                    if let Some(problem) = problem.map_err(|failure| failure.0)? {
                        return Err(problem);
                    }
                }
                Ok(())
            }
        };
        Readiness::new(check, leaving)
    }

    fn operations(readiness: Readiness) -> Operations {
        Operations::new(move || {
            let readiness = readiness.clone();
            async move { readiness.judge().await }.boxed()
        })
    }
}

/// Looks every few seconds at what the metrics tell that has to be asked for.
async fn watch_over(ready: Operations, databases: Vec<(&'static str, Database)>, mut shutdown: Shutdown) {
    let watching = async {
        loop {
            // Who asks at /readyz is told why not; here it only counts.
            let _ = ready.judge().await;
            for (_, database) in &databases {
                database.sample().await;
            }
            tokio::time::sleep(SAMPLE).await;
        }
    };
    tokio::select! {
        () = watching => {}
        () = shutdown.wait() => {}
    }
}

/// What telemetry calls a process.
fn name_of(part: Part) -> &'static str {
    match part {
        Part::All => "serve",
        Part::Gateway => "gateway",
        Part::Service(name) => name,
    }
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

fn public_url(config: &Config, listening: SocketAddr) -> String {
    config.server.public_url.clone().unwrap_or_else(|| {
        // 0.0.0.0 is where one listens, not where one calls.
        let host = match listening.ip() {
            ip if ip.is_unspecified() => "127.0.0.1".to_owned(),
            std::net::IpAddr::V6(ip) => format!("[{ip}]"),
            std::net::IpAddr::V4(ip) => ip.to_string(),
        };
        let scheme = if config.tls.cert.is_some() { "https" } else { "http" };
        format!("{scheme}://{host}:{}", listening.port())
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
