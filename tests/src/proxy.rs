//! nginx and Caddy, as Debian has them, with the examples of `deploy/examples`.
//!
//! An example is run as it is; only the addresses that it tells people to change are changed, and what a test needs
//! to run one beside others.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use tempfile::TempDir;

use crate::{api::Api, installation::free_port, process::Process, wait::eventually};

/// What the examples say where the gateway is.
const GATEWAY: &str = "127.0.0.1:8080";
/// What the examples say where the guarded API is.
const BACKEND: &str = "127.0.0.1:3000";

/// Which proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// nginx, with `auth_request`.
    Nginx,
    /// Caddy, with `forward_auth`.
    Caddy,
}

/// A running proxy. It ends when this value goes.
#[derive(Debug)]
pub struct Proxy {
    url: String,
    _process: Process,
    _folder: TempDir,
}

impl Proxy {
    /// Starts a proxy before a backend, with a gateway as the judge; both as `host:port`. `None`, and a loud line, where
    /// the proxy is not installed. `change` edits the example further.
    pub async fn start(
        kind: Kind,
        gateway: &str,
        backend: &str,
        change: impl FnOnce(String) -> String,
    ) -> Option<Self> {
        let program = kind.program()?;
        let folder = TempDir::with_prefix("paperkey-proxy-").expect("a temporary folder can be made");
        let listen = free_port();
        let example = fs::read_to_string(kind.example()).expect("the example is there");
        let text = replaced(&replaced(&example, GATEWAY, gateway), BACKEND, backend);
        let (file, text, arguments) = match kind {
            Kind::Nginx => {
                let file = folder.path().join("nginx.conf");
                let text = replaced(&text, "listen 8000;", &format!("listen {listen};"));
                // Debian's nginx keeps these where only root may write.
                let own: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                    .map(|name| format!("{name}_temp_path {}/{name};\n", folder.path().display()))
                    .concat();
                let text = replaced(&text, "http {\n", &format!("http {{\naccess_log off;\n{own}"));
                let main = format!(
                    "daemon off; master_process off; error_log stderr; pid {}/nginx.pid;",
                    folder.path().display()
                );
                (file.clone(), text, vec!["-c".into(), file.into_os_string(), "-g".into(), main.into()])
            }
            Kind::Caddy => {
                let file = folder.path().join("Caddyfile");
                let text = replaced(&text, "\n:8000 {", &format!("\nhttp://:{} {{", listen.port()));
                let mut arguments: Vec<_> = ["run", "--adapter", "caddyfile", "--config"].map(Into::into).into();
                arguments.push(file.clone().into_os_string());
                (file, text, arguments)
            }
        };
        fs::write(file, change(text)).expect("its folder is there");
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("HOME", folder.path())
            .env("XDG_CONFIG_HOME", folder.path())
            .env("XDG_DATA_HOME", folder.path())
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let process = Process::start(kind.name(), command);
        let proxy = Self { url: format!("http://{listen}"), _process: process, _folder: folder };
        eventually(&format!("{} answers", kind.name()), || async { proxy.api().try_get("/").await.ok() }).await;
        Some(proxy)
    }

    /// A client of the proxy, without a credential.
    pub fn api(&self) -> Api {
        Api::of_another(&self.url)
    }

    /// Where it listens, such as `127.0.0.1:8000`.
    pub fn at(&self) -> &str {
        self.url.trim_start_matches("http://")
    }
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Nginx => "nginx",
            Self::Caddy => "caddy",
        }
    }

    fn example(self) -> PathBuf {
        let file = match self {
            Self::Nginx => "nginx.conf",
            Self::Caddy => "Caddyfile",
        };
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/examples").join(file)
    }

    /// The program; Debian puts nginx where only root looks for programs.
    #[expect(clippy::print_stderr, reason = "whoever runs the tests must see what was not tested")]
    pub(crate) fn program(self) -> Option<PathBuf> {
        let path = env::var_os("PATH").unwrap_or_default();
        let folders = env::split_paths(&path).chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from));
        let found = folders.map(|folder| folder.join(self.name())).find(|program| program.is_file());
        if found.is_none() {
            let name = self.name();
            assert!(env::var_os("CI").is_none_or(|ci| ci != "true"), "CI=true, and {name} is not installed");
            eprintln!("*** SKIPPED: {name} is not installed ***");
        }
        found
    }
}

/// Replaces what must be there.
#[track_caller]
pub(crate) fn replaced(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "the example has no {from:?} any more");
    text.replace(from, to)
}
