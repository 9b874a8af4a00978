//! The product, installed and running: everything in one process on SQLite, or a fleet on PostgreSQL.
//!
//! A fleet is five processes or more. They know each other's addresses before they start, so their ports are chosen
//! first, outside the range from which the system takes ports for outgoing connections: otherwise a client that tries
//! again and again to reach a killed process may end up holding its port.

use std::{
    collections::BTreeMap,
    env, fs,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use paperkey_kit::{
    clock::Clock,
    fail_point::VARIABLE,
    principal::Signer,
    secrets::{Keyring, Secret},
};
use rand::RngExt as _;
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::OnceCell;

use crate::{
    api::Api,
    database::PostgresDatabase,
    leaks::secrets_in,
    people::Account,
    process::{self, Ended, Line, Process, print_lines},
    wait::eventually,
};

/// What everything in one process is called here.
pub const SERVE: &str = "serve";

/// The services of a fleet.
pub const SERVICES: [&str; 4] = ["auth", "catalog", "licensing", "webhook"];

/// Ports that no outgoing connection is given.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

/// All callers of a test have one address, and one of most things. Tests of limits set their own.
const GENEROUS_LIMITS: &str = "{ per_key = { requests = 1000000 }, per_ip = { requests = 1000000 }, \
     auth = { requests = 1000000 }, license_validate = { requests = 1000000 }, \
     license_activate = { requests = 1000000 }, test_key = { requests = 1000000 }, \
     refused_credentials = { requests = 1000000 } }";
const GENEROUS_TIERS: &str = "{ free = { requests_per_minute = 1000000 } }";

/// How often a fleet is started anew because a port was taken in the meantime.
const TRIES: u32 = 10;

/// How an installation is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// One process, SQLite.
    AllInOne,
    /// A process a service and a gateway, PostgreSQL.
    Fleet,
}

/// What a test wants different.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Configuration, as environment variables.
    pub environment: Vec<(&'static str, String)>,
    /// Whether there is a second licensing process and a second gateway that talks to it. Fleets only.
    pub two_licensings: bool,
    /// Which binary its processes are started by; the one beside the tests where absent.
    pub binary: Option<PathBuf>,
    /// Whether the processes of a fleet reach each other over HTTPS. With what certificates, the environment says.
    pub https: bool,
}

/// A running installation. It ends, and its data goes, when this value goes.
#[derive(Debug)]
pub struct Installation {
    kind: Kind,
    members: BTreeMap<String, Member>,
    past: Vec<(String, Vec<Line>)>,
    environment: Vec<(String, String)>,
    keys: Option<[String; 3]>,
    system_key: OnceCell<String>,
    /// By which processes are started from now on.
    binary: Option<PathBuf>,
    // The processes end before their database and their folder do: fields go in this order.
    database: Option<PostgresDatabase>,
    folder: TempDir,
}

#[derive(Debug)]
struct Member {
    process: Option<Process>,
    listen: SocketAddr,
    extra: Vec<(String, String)>,
    at: Option<Addresses>,
}

#[derive(Clone, Copy, Debug)]
struct Addresses {
    listening: SocketAddr,
    operations: SocketAddr,
}

impl Installation {
    /// Everything in one process, on SQLite, in a temporary folder.
    pub async fn all_in_one() -> Self {
        Self::all_in_one_with(Settings::default()).await
    }

    /// Everything in one process, with other settings.
    pub async fn all_in_one_with(settings: Settings) -> Self {
        let mut install = Self::empty(Kind::AllInOne, None, &settings);
        install.add(SERVE, localhost(0), Vec::new());
        install.start(SERVE).await.unwrap_or_else(|wrote| panic!("paperkey serve did not start:\n{wrote}"));
        install
    }

    /// Everything in one process, on what a backup of another one holds.
    pub async fn restored(backup: &Path) -> Self {
        let mut install = Self::empty(Kind::AllInOne, None, &Settings::default());
        install.add(SERVE, localhost(0), Vec::new());
        let backup = backup.to_str().expect("temporary folders have plain names");
        install.command(&["restore", backup], "").await.succeeded();
        install.start(SERVE).await.unwrap_or_else(|wrote| panic!("the restored installation did not start:\n{wrote}"));
        install
    }

    /// Five processes on PostgreSQL; `None` where there is no PostgreSQL.
    pub async fn fleet() -> Option<Self> {
        Self::fleet_with(Settings::default()).await
    }

    /// A fleet with a second licensing process, and a second gateway that talks to that one.
    pub async fn fleet_with_two_licensings() -> Option<Self> {
        Self::fleet_with(Settings { two_licensings: true, ..Settings::default() }).await
    }

    /// A fleet, with other settings.
    pub async fn fleet_with(settings: Settings) -> Option<Self> {
        let database = PostgresDatabase::create().await?;
        let mut install = Self::empty(Kind::Fleet, Some(database), &settings);
        install.command(&["migrate", "up"], "").await.succeeded();
        for _ in 0..TRIES {
            match install.start_fleet(&settings).await {
                Ok(()) => return Some(install),
                Err(wrote) if wrote.contains("cannot listen on") => install.members.clear(),
                Err(wrote) => panic!("the fleet did not start:\n{wrote}"),
            }
        }
        panic!("the ports of a fleet were taken {TRIES} times");
    }

    fn empty(kind: Kind, database: Option<PostgresDatabase>, settings: &Settings) -> Self {
        let folder = TempDir::with_prefix("paperkey-suite-").expect("a temporary folder can be made");
        let mut environment = vec![
            ("PAPERKEY__LIMITS".to_owned(), GENEROUS_LIMITS.to_owned()),
            ("PAPERKEY__TIERS".to_owned(), GENEROUS_TIERS.to_owned()),
            ("PAPERKEY__TELEMETRY__LOG".to_owned(), "json".to_owned()),
            ("PAPERKEY__WEBHOOKS__ALLOW_HTTP".to_owned(), "true".to_owned()),
            ("PAPERKEY__WEBHOOKS__ALLOW_PRIVATE_NETWORKS".to_owned(), "true".to_owned()),
            ("PAPERKEY__WEBHOOKS__RETRY_SCHEDULE_S".to_owned(), "[0, 1, 1, 1, 2, 2, 2, 5, 5, 5]".to_owned()),
        ];
        let keys = database.as_ref().map(|database| {
            let key = || BASE64.encode(rand::random::<[u8; 32]>());
            let keys = [key(), key(), key()];
            environment.push(("PAPERKEY__DATABASE__URL".to_owned(), database.url()));
            for (name, key) in ["MASTER_KEY", "PEPPER", "SIGNING_KEY"].iter().zip(&keys) {
                environment.push((format!("PAPERKEY__SECRETS__{name}"), key.clone()));
            }
            keys
        });
        environment.extend(settings.environment.iter().map(|(name, value)| ((*name).to_owned(), value.clone())));
        Self {
            kind,
            members: BTreeMap::new(),
            past: Vec::new(),
            environment,
            keys,
            system_key: OnceCell::new(),
            binary: settings.binary.clone(),
            database,
            folder,
        }
    }

    fn add(&mut self, name: &str, listen: SocketAddr, extra: Vec<(String, String)>) {
        self.members.insert(name.to_owned(), Member { process: None, listen, extra, at: None });
    }

    async fn start_fleet(&mut self, settings: &Settings) -> Result<(), String> {
        let mut services: Vec<&str> = SERVICES.to_vec();
        let mut gateways = vec![("gateway", "licensing")];
        if settings.two_licensings {
            services.push("licensing-2");
            gateways.push(("gateway-2", "licensing-2"));
        }
        let ports: BTreeMap<&str, SocketAddr> =
            services.iter().chain(gateways.iter().map(|(name, _)| name)).map(|name| (*name, free_port())).collect();
        let scheme = if settings.https { "https" } else { "http" };
        let at = |name: &str| format!("{scheme}://{}", ports[name]);
        let ways = |licensing: &str| {
            SERVICES
                .iter()
                .map(|service| {
                    let name = if *service == "licensing" { licensing } else { service };
                    (format!("PAPERKEY__SERVICES__{}", service.to_uppercase()), at(name))
                })
                .collect::<Vec<_>>()
        };
        for name in services {
            self.add(name, ports[name], ways("licensing"));
            self.launch(name);
        }
        for (name, licensing) in gateways {
            self.add(name, ports[name], ways(licensing));
            self.launch(name);
        }
        let names: Vec<String> = self.members.keys().cloned().collect();
        for name in names {
            self.await_start(&name).await?;
        }
        Ok(())
    }

    /// Starts a process of this installation that is not running, on the same data.
    pub async fn start(&mut self, name: &str) -> Result<(), String> {
        self.launch(name);
        self.await_start(name).await
    }

    /// Starts a process that will end at a fail point, and says whether it has come so far as to answer.
    pub async fn start_armed(&mut self, name: &str, point: &str) -> bool {
        self.launch_with(name, Some((VARIABLE.to_owned(), point.to_owned())));
        let process = self.process(name);
        let Ok(at) = process.line(addresses).await else { return false };
        self.member_mut(name).at = Some(at);
        let operations = self.operations(name);
        let process = self.process(name);
        eventually(&format!("{name} is ready or ends"), || {
            let (runs, operations) = (process.is_running(), operations.clone());
            async move {
                let ready = operations.try_get("/readyz").await.is_ok_and(|answer| answer.status == 200);
                if ready || !runs { Some(ready) } else { None }
            }
        })
        .await
    }

    fn launch(&mut self, name: &str) {
        self.launch_with(name, None);
    }

    fn launch_with(&mut self, name: &str, variable: Option<(String, String)>) {
        let part = name.split('-').next().unwrap_or(name);
        let data = self.data_of(name);
        let member = self.members.get_mut(name).unwrap_or_else(|| panic!("there is no process {name}"));
        assert!(member.process.is_none(), "{name} runs already");
        let mut environment = self.environment.clone();
        environment.extend(member.extra.iter().cloned().chain(variable));
        let listen = member.listen.to_string();
        let data = data.to_str().expect("temporary folders have plain names");
        let arguments = [part, "--listen", &listen, "--ops-listen", "127.0.0.1:0", "--data", data];
        let binary = self.binary.clone().unwrap_or_else(process::binary);
        let command = process::command_of(&binary, &arguments, &environment, self.folder.path());
        member.process = Some(Process::start(name, command));
    }

    async fn await_start(&mut self, name: &str) -> Result<(), String> {
        let member = self.members.get_mut(name).expect("it was launched");
        let at = member.process.as_mut().expect("it was launched").line(addresses).await?;
        member.at = Some(at);
        let operations = self.operations(name);
        eventually(&format!("{name} is ready"), || async {
            operations.try_get("/readyz").await.ok().filter(|answer| answer.status == 200)
        })
        .await;
        Ok(())
    }

    /// Configures every process and command anew that is started from now on.
    pub fn set(&mut self, name: &str, value: &str) {
        self.environment.retain(|(known, _)| known != name);
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// Starts processes by another binary from now on; by the one beside the tests where there is none. Commands are always
    /// of that.
    pub fn start_by(&mut self, binary: Option<&Path>) {
        self.binary = binary.map(Path::to_owned);
    }

    /// Kills a process as `kill -9` does.
    pub fn kill(&mut self, name: &str) {
        let process = self.member_mut(name).process.take().unwrap_or_else(|| panic!("{name} does not run"));
        self.past.push((name.to_owned(), process.kill()));
    }

    /// Waits until a process has ended by itself, and says how.
    pub async fn ended(&mut self, name: &str) -> ExitStatus {
        let status = self.process(name).ended().await;
        self.kill(name);
        status
    }

    /// A running process.
    pub fn process(&mut self, name: &str) -> &mut Process {
        self.member_mut(name).process.as_mut().unwrap_or_else(|| panic!("{name} does not run"))
    }

    fn member_mut(&mut self, name: &str) -> &mut Member {
        self.members.get_mut(name).unwrap_or_else(|| panic!("there is no process {name}"))
    }

    fn at(&self, name: &str) -> Addresses {
        let member = self.members.get(name).unwrap_or_else(|| panic!("there is no process {name}"));
        member.at.unwrap_or_else(|| panic!("{name} has not started"))
    }

    /// How it is built.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The names of its processes.
    pub fn names(&self) -> Vec<String> {
        self.members.keys().cloned().collect()
    }

    /// The process that answers the public.
    pub fn gateway(&self) -> &'static str {
        match self.kind {
            Kind::AllInOne => SERVE,
            Kind::Fleet => "gateway",
        }
    }

    /// The process that answers for a service.
    pub fn host_of(&self, service: &'static str) -> &'static str {
        match self.kind {
            Kind::AllInOne => SERVE,
            Kind::Fleet => service,
        }
    }

    /// Where the public reaches it.
    pub fn url(&self) -> String {
        self.url_of(self.gateway())
    }

    /// Where a process listens.
    pub fn url_of(&self, name: &str) -> String {
        format!("http://{}", self.at(name).listening)
    }

    /// The address at which a process listens.
    pub fn address_of(&self, name: &str) -> SocketAddr {
        self.at(name).listening
    }

    /// A client of the public, without a credential.
    pub fn api(&self) -> Api {
        Api::new(&self.url())
    }

    /// A client of the second gateway.
    pub fn second_api(&self) -> Api {
        Api::new(&self.url_of("gateway-2"))
    }

    /// A client of a process's operations listener.
    pub fn operations(&self, name: &str) -> Api {
        Api::of_operations(&self.operations_url(name))
    }

    /// Where a process's operations listener is.
    pub fn operations_url(&self, name: &str) -> String {
        format!("http://{}", self.at(name).operations)
    }

    /// Registers somebody new.
    pub async fn register(&self) -> Account {
        Account::register(&self.api()).await
    }

    /// The key of the installation itself.
    pub async fn system_key(&self) -> String {
        let key = || async { self.command(&["admin", "system-key"], "").await.succeeded().to_owned() };
        self.system_key.get_or_init(key).await.clone()
    }

    /// Runs a command of the binary on this installation's data.
    pub async fn command(&self, arguments: &[&str], input: &str) -> Ended {
        process::run(self.prepared(arguments), input).await
    }

    /// The same, of the binary that its processes are started by.
    pub async fn own_command(&self, arguments: &[&str]) -> Ended {
        let data = self.data().to_str().expect("temporary folders have plain names").to_owned();
        let mut all = arguments.to_vec();
        all.extend(["--data", &data]);
        let binary = self.binary.clone().unwrap_or_else(process::binary);
        process::run(process::command_of(&binary, &all, &self.environment, self.folder.path()), "").await
    }

    /// A command of the binary on this installation's data, not yet run.
    pub fn prepared(&self, arguments: &[&str]) -> Command {
        let data = self.data().to_str().expect("temporary folders have plain names").to_owned();
        let mut all = arguments.to_vec();
        all.extend(["--data", &data]);
        process::command(&all, &self.environment, self.folder.path())
    }

    /// A shell in a folder, in which the binary is found, and knows this installation's data.
    pub fn shell(&self, folder: &Path) -> Command {
        let binary = process::binary();
        let own = binary.parent().expect("it is in a folder").as_os_str().to_owned();
        let found = env::var_os("PATH").unwrap_or_default();
        let path = env::join_paths([own].into_iter().chain(env::split_paths(&found).map(PathBuf::into_os_string)));
        let mut command = Command::new("bash");
        command
            .env_clear()
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env("PATH", path.expect("folders of a path stay folders of a path"))
            .env("PAPERKEY__SERVER__DATA", self.data())
            .current_dir(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// The data folder of the process that answers the public.
    pub fn data(&self) -> PathBuf {
        self.data_of(self.gateway())
    }

    fn data_of(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("data-{name}"))
    }

    /// Where mails are written that no server carries.
    pub fn mail_folder(&self) -> PathBuf {
        self.data_of(self.host_of("auth")).join("mail")
    }

    /// Mails that were written to an address, in the order of their making.
    pub fn mails_to(&self, email: &str) -> Vec<String> {
        let Ok(folder) = fs::read_dir(self.mail_folder()) else { return Vec::new() };
        let mut paths: Vec<PathBuf> = folder.filter_map(|entry| Some(entry.ok()?.path())).collect();
        paths.retain(|path| path.extension().is_some_and(|end| end == "eml"));
        paths.sort();
        let to = format!("\nTo: {email}\r\n");
        paths.iter().filter_map(|path| fs::read_to_string(path).ok()).filter(|mail| mail.contains(&to)).collect()
    }

    /// Signs as the processes of this installation do, by a given clock.
    pub fn signer(&self, clock: Clock) -> Signer {
        let keyring = match &self.keys {
            Some(keys) => {
                let [master, pepper, signing] = keys.clone().map(Secret::new);
                Keyring::from_base64(&master, &pepper, &signing).expect("these keys were made here")
            }
            None => Keyring::load_or_create(&self.data().join("secrets")).expect("the first start made them"),
        };
        Signer::new(&keyring, clock)
    }

    /// The keys that a fleet was given.
    pub fn given_keys(&self) -> Vec<String> {
        self.keys.iter().flatten().cloned().collect()
    }

    /// Every line that every process of it has written so far, those that were killed included.
    pub fn written(&self) -> Vec<(String, Line)> {
        let past = self.past.iter().cloned();
        let present =
            self.members.iter().filter_map(|(name, member)| Some((name.clone(), member.process.as_ref()?.lines())));
        past.chain(present).flat_map(|(name, lines)| lines.into_iter().map(move |line| (name.clone(), line))).collect()
    }

    /// Every row of its database, with the name of the table; none where there are files instead.
    pub async fn rows(&self) -> Vec<(String, Vec<u8>)> {
        match &self.database {
            Some(database) => database.rows().await,
            None => Vec::new(),
        }
    }

    /// Every file of its data folders that is no key, with its bytes.
    pub fn files(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut files = Vec::new();
        collect(self.folder.path(), &mut files);
        files
    }
}

impl Drop for Installation {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (name, lines) in &self.past {
                print_lines(&format!("{name} (killed)"), lines);
            }
        } else {
            self.keeps_its_secrets();
        }
    }
}

impl Installation {
    /// Nothing that this installation has written, to its logs or to its files, holds a secret.
    fn keeps_its_secrets(&self) {
        for (name, line) in self.written() {
            let found = secrets_in(line.text.as_bytes());
            assert!(found.is_empty(), "{name} wrote {found:?} to its log: {}", line.text);
        }
        // A mail that could not be sent is kept for a person to read.
        let kept = |path: &Path| path.extension().is_none_or(|extension| extension != "eml");
        for (path, bytes) in self.files().into_iter().filter(|(path, _)| kept(path)) {
            let found = secrets_in(&bytes);
            assert!(found.is_empty(), "{} holds {found:?}", path.display());
        }
    }
}

fn addresses(line: &Line) -> Option<Addresses> {
    let log: Value = serde_json::from_str(&line.text).ok()?;
    let address = |name: &str| log[name].as_str()?.parse().ok();
    (log["message"] == "listening")
        .then(|| Some(Addresses { listening: address("listening")?, operations: address("operations")? }))
        .flatten()
}

fn localhost(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// A port that nobody has at the moment.
/// A port of this machine that nobody listens on.
pub(crate) fn free_port() -> SocketAddr {
    loop {
        let address = localhost(rand::rng().random_range(PORTS));
        if TcpListener::bind(address).is_ok() {
            return address;
        }
    }
}

fn collect(folder: &Path, files: &mut Vec<(PathBuf, Vec<u8>)>) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "secrets") {
                collect(&path, files);
            }
        } else if let Ok(bytes) = fs::read(&path) {
            files.push((path, bytes));
        }
    }
}
