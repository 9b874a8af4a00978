//! The fleet of `deploy/local/fleet`: the very script that people start one with, on a machine that is shared.

use std::{
    collections::BTreeMap,
    env, fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::{
    api::Api,
    process::{self, Ended},
    wait::eventually,
};

/// How long a command of the script may take: debug builds on two cores, one after the other.
const PATIENCE: Duration = Duration::from_mins(4);

/// How much of each log is shown where something failed.
const SHOWN: usize = 60;

/// A running fleet. It ends, and its data goes, when this value goes.
#[derive(Debug)]
pub struct LocalFleet {
    dir: PathBuf,
    members: BTreeMap<String, Member>,
    _folder: TempDir,
}

#[derive(Clone, Copy, Debug)]
struct Member {
    listening: SocketAddr,
    operations: Option<SocketAddr>,
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/local/fleet")
}

impl LocalFleet {
    /// Two gateways and two of each service, configured by these variables; `None` where PostgreSQL or Redis is not
    /// installed, which is said loudly and fails where `CI=true`.
    pub async fn up(environment: &[(&str, &str)]) -> Option<Self> {
        let folder = TempDir::with_prefix("paperkey-fleet-").expect("a temporary folder can be made");
        // Whoever PostgreSQL runs as has to pass.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o711)).expect("it is ours");
        let mut fleet = Self { dir: folder.path().join("fleet"), members: BTreeMap::new(), _folder: folder };
        let (binary, own) = (process::binary(), std::process::id().to_string());
        let binary = binary.to_str().expect("builds have plain names");
        let mut command = fleet.prepared("up", &["--binary", binary, "--while", &own]);
        command.envs(environment.iter().copied());
        let up = process::run_within(PATIENCE, "fleet up", command, String::new).await;
        if up.err.contains("is not installed") || up.err.contains("server is installed") {
            assert_ne!(env::var("CI").as_deref(), Ok("true"), "{}", up.err);
            process::print_lines("SKIPPED: a fleet needs PostgreSQL and Redis", &[]);
            return None;
        }
        up.succeeded();
        fleet.members = members(&fleet.run("status", &[]).await);
        Some(fleet)
    }

    fn prepared(&self, command: &str, arguments: &[&str]) -> Command {
        let mut prepared = Command::new(script());
        prepared
            .arg(command)
            .arg(&self.dir)
            .args(arguments)
            .env_clear()
            .env("PATH", env::var_os("PATH").unwrap_or_default())
            .stdin(Stdio::null());
        prepared
    }

    async fn run(&self, command: &str, arguments: &[&str]) -> Ended {
        process::run_within(PATIENCE, &format!("fleet {command}"), self.prepared(command, arguments), || self.logs())
            .await
    }

    /// A command of the script that must succeed, such as `pause` with the name of a process; what it printed.
    pub async fn does(&self, command: &str, arguments: &[&str]) -> String {
        let ended = self.run(command, arguments).await;
        assert!(ended.status.success(), "fleet {command} {arguments:?}: {ended:?}\n{}", self.logs());
        ended.out
    }

    /// The names of its processes.
    pub fn names(&self) -> Vec<String> {
        self.members.keys().cloned().collect()
    }

    /// Its gateways, as they are reached by the public and by whoever asks whether they are ready.
    pub fn gateways(&self) -> Vec<(String, String)> {
        let gateways = self.members.iter().filter(|(name, _)| name.starts_with("gateway-"));
        gateways.filter_map(|(_, member)| Some((url(member.listening), url(member.operations?)))).collect()
    }

    /// A client of one of its gateways, without a credential.
    pub fn api(&self, gateway: usize) -> Api {
        Api::new(&self.gateways()[gateway].0)
    }

    /// Waits until somebody listens where a process should, and says when.
    pub async fn listens(&self, name: &str) -> Instant {
        let at = self.members[name].listening;
        eventually(&format!("{name} listens"), || async { TcpStream::connect(at).await.ok() }).await;
        Instant::now()
    }

    /// The last lines of every log.
    pub fn logs(&self) -> String {
        let read = |name: &String| {
            let text = fs::read_to_string(self.dir.join(format!("log/{name}.log"))).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            let last = lines.len().saturating_sub(SHOWN);
            lines[last..].iter().flat_map(|line| [name.as_str(), ": ", line, "\n"]).collect::<String>()
        };
        self.members.keys().map(read).collect()
    }
}

impl Drop for LocalFleet {
    fn drop(&mut self) {
        // Nothing can be done about one that does not end: the script has said why.
        let _ = self.prepared("down", &[]).status();
        if std::thread::panicking() {
            let lines = self.logs();
            let lines = lines.lines().map(|text| process::Line { stream: process::Stream::Err, text: text.to_owned() });
            process::print_lines("the fleet", &lines.collect::<Vec<_>>());
        }
    }
}

fn url(at: SocketAddr) -> String {
    format!("http://{at}")
}

/// The processes of `fleet status`: name, state, process id, address, and address of operations.
fn members(status: &Ended) -> BTreeMap<String, Member> {
    let member = |line: &str| {
        let mut words = line.split_whitespace();
        let (name, listening) = (words.next()?.to_owned(), words.nth(2)?.parse().ok()?);
        Some((name, Member { listening, operations: words.next().and_then(|word| word.parse().ok()) }))
    };
    status.succeeded().lines().map(|line| member(line).unwrap_or_else(|| panic!("no status: {line}"))).collect()
}
