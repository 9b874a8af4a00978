//! The product under load: the release binary, all in one process or as five, on SQLite in a folder of its own.

use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{Method, Request, header};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::Result;

/// More than any load here reaches, and counted all the same.
const LIMITS: &str = "{ per_key = { requests = 10000000, window_s = 1 }, per_ip = { requests = 10000000, window_s = 1 }, \
     auth = { requests = 10000000, window_s = 1 }, license_validate = { requests = 10000000, window_s = 1 }, \
     license_activate = { requests = 10000000, window_s = 1 } }";
const TIERS: &str = "{ free = { requests_per_minute = 10000000 } }";

/// How long a start may take.
const START: Duration = Duration::from_secs(30);

/// How the product is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    AllInOne,
    Processes,
}

/// Where the product keeps its data.
#[derive(Clone, Debug)]
pub(crate) enum Storage {
    /// In its folder.
    Sqlite,
    /// On an empty database of a server, whose process is known where it was started for this.
    Postgres { url: String, pid: Option<u32> },
}

/// Keys of an installation that lives for a measurement.
pub(crate) const KEYS: [(&str, &str); 3] = [
    ("PAPERKEY__SECRETS__MASTER_KEY", "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="),
    ("PAPERKEY__SECRETS__PEPPER", "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8="),
    ("PAPERKEY__SECRETS__SIGNING_KEY", "QEFCQ0RFRkdISUpLTE1OT1BRUlNUVVZXWFlaW1xdXl8="),
];

/// A running product, ended when dropped.
pub(crate) struct Installation {
    children: Vec<Child>,
    pub(crate) address: SocketAddr,
    _data: TempDir,
}

/// What a vendor has after setting up.
pub(crate) struct Vendor {
    pub(crate) token: String,
    pub(crate) product_id: String,
    pub(crate) public_key: String,
    pub(crate) license_keys: Vec<String>,
    pub(crate) unlimited_key: String,
    pub(crate) team_key: String,
    pub(crate) free_key: String,
}

impl Installation {
    pub(crate) async fn start(binary: &Path, layout: Layout) -> Result<Self> {
        Self::launch(binary, layout, &[]).await
    }

    /// All in one, on a storage and with settings of one's own.
    pub(crate) async fn start_with(
        binary: &Path,
        storage: &Storage,
        settings: &[(&'static str, String)],
    ) -> Result<Self> {
        Self::launch(binary, Layout::AllInOne, &prepared(binary, storage, settings)?).await
    }

    /// Each part a process of its own, on a storage of one's own.
    pub(crate) async fn start_fleet(binary: &Path, storage: &Storage) -> Result<Self> {
        Self::launch(binary, Layout::Processes, &prepared(binary, storage, &[])?).await
    }

    async fn launch(binary: &Path, layout: Layout, environment: &[(&'static str, String)]) -> Result<Self> {
        let data = tempfile::Builder::new().prefix("paperkey-bench-").tempdir()?;
        let parts: &[&str] = match layout {
            Layout::AllInOne => &["serve"],
            Layout::Processes => &["auth", "catalog", "licensing", "webhook", "gateway"],
        };
        let addresses: Vec<SocketAddr> = parts.iter().map(|_| free_address()).collect::<Result<_>>()?;
        let mut children = Vec::new();
        for (part, address) in parts.iter().zip(&addresses) {
            let mut command = Command::new(binary);
            command
                .arg(part)
                .arg("--data")
                .arg(data.path())
                .args(["--listen", &address.to_string()])
                .args(["--ops-listen", "127.0.0.1:0"])
                .env("PAPERKEY__TELEMETRY__LOG_LEVEL", "warn")
                .env("PAPERKEY__LIMITS", LIMITS)
                .env("PAPERKEY__TIERS", TIERS)
                .envs(environment.iter().map(|(name, value)| (name, value)))
                .stdout(Stdio::null());
            if layout == Layout::Processes {
                for (service, address) in parts.iter().zip(&addresses).filter(|(service, _)| **service != "gateway") {
                    command.env(format!("PAPERKEY__SERVICES__{}", service.to_uppercase()), format!("http://{address}"));
                }
            }
            children.push(command.spawn().map_err(|error| format!("{}: {error}", binary.display()))?);
            // One after the other: the first makes the secrets that the others read.
            wait_for(*address).await?;
        }
        let address = *addresses.last().ok_or("no part was started")?;
        Ok(Self { children, address, _data: data })
    }

    pub(crate) fn pids(&self) -> Vec<u32> {
        self.children.iter().map(Child::id).collect()
    }

    /// A product with so many licences, and one that any number of machines may activate.
    pub(crate) async fn set_up(&self, licenses: usize) -> Result<Vendor> {
        let account = json!({"email": "bench@example.com", "password": "a long password"});
        let registered = self.post("/auth/register", None, &account).await?;
        let token = text(&registered, "/token")?;
        let product = self.post("/products", Some(&token), &json!({"name": "Bench"})).await?;
        let product_id = text(&product, "/id")?;
        let mut license_keys = Vec::with_capacity(licenses);
        for _ in 0..licenses {
            let license = json!({"productId": product_id, "maxActivations": 3});
            license_keys.push(text(&self.post("/licenses", Some(&token), &license).await?, "/key")?);
        }
        let unlimited = json!({"productId": product_id, "maxActivations": null});
        Ok(Vendor {
            public_key: text(&product, "/apiKey/publicKey")?,
            license_keys,
            team_key: text(&registered, "/liveKey")?,
            free_key: text(&registered, "/freeKey")?,
            unlimited_key: text(&self.post("/licenses", Some(&token), &unlimited).await?, "/key")?,
            token,
            product_id,
        })
    }

    pub(crate) async fn post(&self, path: &str, token: Option<&str>, body: &Value) -> Result<Value> {
        self.call(Method::POST, path, token, body).await
    }

    pub(crate) async fn call(&self, verb: Method, path: &str, token: Option<&str>, body: &Value) -> Result<Value> {
        let stream = TcpStream::connect(self.address).await?;
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
        let driver = tokio::spawn(connection);
        let mut request = Request::builder()
            .method(verb)
            .uri(path)
            .header(header::HOST, "localhost")
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(token) = token {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let response = sender.send_request(request.body(Full::new(Bytes::from(body.to_string())))?).await?;
        let status = response.status();
        let bytes = response.into_body().collect().await?.to_bytes();
        driver.abort();
        if !status.is_success() {
            return Err(format!("{path} answered {status}: {}", String::from_utf8_lossy(&bytes)).into());
        }
        Ok(serde_json::from_slice(&bytes)?)
    }
}

/// The settings of an installation on that storage, whose schema is made.
fn prepared(
    binary: &Path,
    storage: &Storage,
    settings: &[(&'static str, String)],
) -> Result<Vec<(&'static str, String)>> {
    let mut environment = settings.to_vec();
    if let Storage::Postgres { url, .. } = storage {
        environment.push(("PAPERKEY__DATABASE__URL", url.clone()));
        environment.extend(KEYS.map(|(name, key)| (name, key.to_owned())));
        let migrated = Command::new(binary)
            .args(["migrate", "up"])
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .stdout(Stdio::null())
            .status()?;
        if !migrated.success() {
            return Err("the schema could not be made".into());
        }
    }
    Ok(environment)
}

impl Drop for Installation {
    fn drop(&mut self) {
        for child in &mut self.children {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub(crate) fn text(value: &Value, pointer: &str) -> Result<String> {
    let found = value.pointer(pointer).and_then(Value::as_str);
    Ok(found.ok_or_else(|| format!("the answer has no {pointer}"))?.to_owned())
}

fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

async fn wait_for(address: SocketAddr) -> Result<()> {
    let began = Instant::now();
    while TcpStream::connect(address).await.is_err() {
        if began.elapsed() > START {
            return Err(format!("nothing listens on {address}").into());
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}
