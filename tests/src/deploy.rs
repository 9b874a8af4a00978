//! Those who read what is in `deploy/` as those do who run it: Compose, kustomize, Kubernetes' own schemas, Envoy, a linter of
//! Dockerfiles, systemd; and the proxies, running before an installation.
//!
//! `scripts/test` installs them where `PAPERKEY_TEST_DEPLOY` says, in the versions that `tests/deploy` pins. Without it they
//! are left out, loudly; where `CI=true` that fails instead. No engine is needed: nothing here starts a container.

use std::{
    env, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

use serde_json::Value;
use tempfile::TempDir;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use crate::{
    installation::free_port,
    process::{self, Ended, Process},
    proxy::{Kind, replaced},
    wait::eventually,
};

/// The release of Kubernetes whose schemas manifests are held against.
const KUBERNETES: &str = "1.36";

/// How long any of them may take.
const PATIENCE: Duration = Duration::from_mins(3);

/// What the files say is the public name.
pub const PUBLIC_NAME: &str = "keys.example.com";

/// A file or folder of `deploy/`.
pub fn shipped(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(path)
}

/// Those who read.
#[derive(Debug)]
pub struct Readers(PathBuf);

impl Readers {
    /// Those that are installed; `None` where none are.
    pub fn installed() -> Option<Self> {
        let Some(installed) = env::var_os("PAPERKEY_TEST_DEPLOY").map(PathBuf::from) else {
            assert_ne!(env::var("CI").as_deref(), Ok("true"), "PAPERKEY_TEST_DEPLOY is not set, and CI skips nothing");
            process::print_lines("SKIPPED", &[]);
            return None;
        };
        Some(Self(installed))
    }

    /// A program that is installed.
    pub fn program(&self, name: &str) -> PathBuf {
        self.0.join("venv/bin").join(name)
    }

    fn command(&self, name: &str) -> Command {
        let mut command = Command::new(self.program(name));
        // What whoever runs the tests has configured is no part of them.
        command.env_clear().env("PATH", env::var_os("PATH").unwrap_or_default()).env("HOME", "/nonexistent");
        command
    }

    fn judge(&self, arguments: &[&str]) -> Command {
        let mut command = self.command("python");
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/deploy/judge.py")).args(arguments);
        command
    }

    /// Every document of YAML files, read strictly.
    pub async fn yaml(&self, files: &[PathBuf]) -> Vec<Value> {
        let files: Vec<_> = files.iter().map(|file| file.to_str().expect("files have plain names")).collect();
        let said = succeeds(self.judge(&[&["yaml"], files.as_slice()].concat())).await;
        said.lines().map(|line| serde_json::from_str(line).expect("each line is JSON")).collect()
    }

    /// What an overlay renders to, with a file of secrets beside it.
    pub async fn rendered(&self, overlay: &str, secrets: &str) -> Vec<Value> {
        let folder = TempDir::with_prefix("paperkey-kustomize-").expect("a temporary folder can be made");
        copy(&shipped("kubernetes"), folder.path());
        let overlay = folder.path().join("overlays").join(overlay);
        fs::write(overlay.join("secrets.env"), secrets).expect("the overlay is there");
        let mut command = self.command("kubectl");
        command.arg("kustomize").arg(&overlay);
        let rendered = succeeds(command).await;
        let file = folder.path().join("rendered.yaml");
        fs::write(&file, rendered).expect("a temporary folder can be written to");
        let path = file.to_str().expect("temporary folders have plain names");
        succeeds(self.judge(&["kubernetes", KUBERNETES, path])).await;
        self.yaml(&[file]).await
    }

    /// What Compose makes of a file, with these variables.
    pub async fn composed(&self, file: &str, variables: &[(&str, &str)]) -> Result<Value, String> {
        let mut command = self.command("docker-compose");
        command
            .arg("--file")
            .arg(shipped("compose").join(file))
            // Not the one that is beside the file on the machine of whoever tests.
            .args(["--env-file", "/dev/null", "config", "--format", "json"])
            .envs(variables.iter().copied());
        let ended = ends(command).await;
        if ended.status.success() {
            Ok(serde_json::from_str(&ended.out).expect("Compose writes JSON"))
        } else {
            Err(ended.err)
        }
    }

    /// The linter of Dockerfiles finds nothing.
    pub async fn lint_image(&self) {
        let mut command = self.command("hadolint");
        command.args(["--failure-threshold", "info"]).arg(shipped("docker/Dockerfile"));
        succeeds(command).await;
    }

    /// Starts a proxy of `deploy/proxies` before a gateway, both as an address, with certificates of a folder.
    pub async fn proxy(&self, kind: Edge, gateway: SocketAddr, operations: SocketAddr, tls: &Path) -> Option<Front> {
        let program = match kind {
            Edge::Nginx => Kind::Nginx.program()?,
            Edge::Caddy => Kind::Caddy.program()?,
            Edge::Envoy => self.program("envoy"),
        };
        let folder = TempDir::with_prefix("paperkey-front-").expect("a temporary folder can be made");
        let at = folder.path().to_str().expect("temporary folders have plain names").to_owned();
        let tls = tls.to_str().expect("temporary folders have plain names");
        let listen = free_port();
        let port = listen.port();
        let (name, from) = match kind {
            Edge::Nginx => ("nginx", "proxies/nginx.conf"),
            Edge::Caddy => ("caddy", "proxies/Caddyfile"),
            Edge::Envoy => ("envoy", "proxies/envoy.yaml"),
        };
        let text = fs::read_to_string(shipped(from)).expect("it is shipped");
        let file = folder.path().join(from.rsplit('/').next().expect("it is a file"));
        let mut command = Command::new(program);
        let text = match kind {
            Edge::Nginx => {
                let own: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
                    .map(|name| format!("{name}_temp_path {at}/{name};\n"))
                    .concat();
                command
                    .arg("-c")
                    .arg(&file)
                    .args(["-g", &format!("daemon off; master_process off; error_log stderr; pid {at}/nginx.pid;")]);
                let text = replaced(&text, "127.0.0.1:8080", &gateway.to_string());
                let text = replaced(&text, "listen 443 ", &format!("listen {listen} "));
                let text = replaced(&text, "/etc/nginx/tls/", &format!("{tls}/"));
                replaced(&text, "http {\n", &format!("http {{\naccess_log off;\n{own}"))
            }
            Edge::Caddy => {
                command.args(["run", "--adapter", "caddyfile", "--config"]).arg(&file);
                let text = replaced(&text, "127.0.0.1:8080", &gateway.to_string());
                let text = replaced(&text, "health_port 9090", &format!("health_port {}", operations.port()));
                let site = format!("\nhttps://{PUBLIC_NAME}:{port} {{\n\ttls {tls}/tls.crt {tls}/tls.key");
                let text = replaced(&text, &format!("\n{PUBLIC_NAME} {{"), &site);
                replaced(&text, "\tadmin off\n", "\tadmin off\n\tauto_https disable_redirects\n\tskip_install_trust\n")
            }
            Edge::Envoy => {
                command.arg("-c").arg(&file).args(["--concurrency", "1", "--disable-hot-restart", "-l", "warning"]);
                let text = replaced(&text, "/etc/envoy/tls/", &format!("{tls}/"));
                let everywhere = "address: 0.0.0.0, port_value: 443 ";
                let text = replaced(&text, everywhere, &format!("address: 127.0.0.1, port_value: {port} "));
                let to = format!("port_value: {} }}\n", gateway.port());
                let text = replaced(&text, "port_value: 8080 }\n", &to);
                replaced(&text, "port_value: 9090 ", &format!("port_value: {} ", operations.port()))
            }
        };
        fs::write(&file, text).expect("a temporary folder can be written to");
        command
            .env("HOME", folder.path())
            .env("XDG_CONFIG_HOME", folder.path())
            .env("XDG_DATA_HOME", folder.path())
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let process = Process::start(name, command);
        let front = Front { at: listen, authority: Path::new(tls).join("ca.crt"), _process: process, _folder: folder };
        eventually(&format!("{name} passes calls on"), || async {
            let (status, _) = front.get("127.0.0.1", "/v1/status", &[]).await?;
            (status == 200).then_some(())
        })
        .await;
        Some(front)
    }
}

/// Which proxy of `deploy/proxies`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Edge {
    /// nginx.
    Nginx,
    /// Caddy.
    Caddy,
    /// Envoy.
    Envoy,
}

/// A running proxy before an installation, which speaks TLS. It ends when this value goes.
#[derive(Debug)]
pub struct Front {
    at: SocketAddr,
    authority: PathBuf,
    _process: Process,
    _folder: TempDir,
}

impl Front {
    /// A call by HTTP/1.1 from an address of this machine; `None` where there was no answer.
    pub async fn get(&self, from: &str, path: &str, headers: &[&str]) -> Option<(u16, String)> {
        Self::answered(self.curl(from, path, headers, &["--http1.1", "--max-time", "10"])).await
    }

    /// The same, with a body.
    pub async fn post(&self, path: &str, headers: &[&str], body: &Path) -> Option<(u16, String)> {
        let body = format!("@{}", body.display());
        let more = ["--http1.1", "--max-time", "10", "--data-binary", &body];
        Self::answered(self.curl("127.0.0.1", path, headers, &more)).await
    }

    async fn answered(command: Command) -> Option<(u16, String)> {
        let ended = ends(command).await;
        let (body, status) = ended.out.trim_end().rsplit_once('\n')?;
        ended.status.success().then(|| status.trim().parse().ok().map(|status| (status, body.to_owned())))?
    }

    /// Begins to read what a path streams, line by line.
    pub fn stream(&self, path: &str, headers: &[&str]) -> Process {
        let mut command = self.curl("127.0.0.1", path, headers, &["--http2", "--no-buffer"]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Process::start("curl", command)
    }

    fn curl(&self, from: &str, path: &str, headers: &[&str], more: &[&str]) -> Command {
        let mut command = Command::new("curl");
        command
            .args(["--silent", "--show-error", "--noproxy", "*", "--interface", from])
            .args(["--write-out", "\n%{http_code}\n", "--cacert"])
            .arg(&self.authority)
            .args(["--resolve", &format!("{PUBLIC_NAME}:{}:127.0.0.1", self.at.port())])
            .args(headers.iter().flat_map(|header| ["--header", header]))
            .args(more)
            .arg(format!("https://{PUBLIC_NAME}:{}{path}", self.at.port()))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    /// A connection for gRPC, from an address of this machine.
    pub async fn channel(&self, from: &str) -> Channel {
        let authority = Certificate::from_pem(fs::read(&self.authority).expect("it was made"));
        let tls = ClientTlsConfig::new().ca_certificate(authority).domain_name(PUBLIC_NAME);
        let endpoint = Endpoint::from_shared(format!("https://{}", self.at)).expect("it is a URL");
        let endpoint = endpoint.tls_config(tls).expect("the certificate is one");
        // Whom a call is for is the name; the address is where that leads to.
        let origin = format!("https://{PUBLIC_NAME}:{}", self.at.port()).parse().expect("it is a URL");
        let endpoint = endpoint.origin(origin);
        let endpoint = endpoint.local_address(Some(from.parse().expect("it is an address")));
        endpoint.connect().await.unwrap_or_else(|error| panic!("{} does not answer: {error:?}", self.at))
    }
}

/// Makes certificates as `deploy/certificates` does, with options and names.
pub async fn certificates(folder: &Path, options: &[(&str, &str)], names: &[&str]) -> Ended {
    let mut command = Command::new("bash");
    command
        .arg(shipped("certificates"))
        .arg(folder)
        .args(names)
        .env_clear()
        .env("PATH", env::var_os("PATH").unwrap_or_default())
        .envs(options.iter().copied());
    ends(command).await
}

/// Runs one of them to its end.
pub async fn ends(command: Command) -> Ended {
    let shown = format!("{command:?}");
    process::run_within(PATIENCE, "a reader", command, || shown.clone()).await
}

async fn succeeds(command: Command) -> String {
    let shown = format!("{command:?}");
    let ended = ends(command).await;
    assert!(ended.status.success(), "{shown}:\n{}\n{}", ended.out, ended.err);
    ended.out
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).expect("a temporary folder can be written to");
    for entry in fs::read_dir(from).expect("it is shipped") {
        let entry = entry.expect("it is shipped");
        // Secrets of whoever tests stay where they are.
        if entry.file_name() == "secrets.env" {
            continue;
        }
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &to);
        } else {
            fs::copy(entry.path(), to).expect("a temporary folder can be written to");
        }
    }
}
