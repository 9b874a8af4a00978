//! A Redis of a test's own, which may be killed, paused and started anew.

use std::{
    env,
    net::TcpListener,
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;
use tokio::net::TcpStream;

use crate::wait::eventually;

/// A running `redis-server`. It ends with this value.
#[derive(Debug)]
pub struct Redis {
    port: u16,
    child: Child,
    folder: TempDir,
}

impl Redis {
    /// Starts one; none where there is no `redis-server`, which is said loudly and fails where `CI=true`.
    pub async fn start() -> Option<Self> {
        let there = Command::new("redis-server").arg("--version").stdout(Stdio::null()).status();
        if there.is_err() {
            assert_ne!(env::var("CI").as_deref(), Ok("true"), "there is no redis-server, and CI skips nothing");
            crate::process::print_lines("SKIPPED", &[]);
            return None;
        }
        let port = TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let port = port.expect("there is a free port").port();
        let folder = TempDir::with_prefix("paperkey-redis-").expect("a temporary folder can be made");
        let child = spawn(port, &folder);
        let redis = Self { port, child, folder };
        redis.answers().await;
        Some(redis)
    }

    /// Where it is.
    pub fn url(&self) -> String {
        format!("redis://127.0.0.1:{}", self.port)
    }

    /// Stops it in its tracks: connections stay open, and nothing is answered.
    pub fn pause(&self) {
        self.signal("-STOP");
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.signal("-CONT");
    }

    /// `kill -9`: everything in it is lost.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Starts it anew, at the same place and empty.
    pub async fn restart(&mut self) {
        self.kill();
        self.child = spawn(self.port, &self.folder);
        self.answers().await;
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.child.id().to_string()]).status();
        assert!(sent.is_ok_and(|status| status.success()), "redis-server is there to be signalled");
    }

    async fn answers(&self) {
        eventually("redis-server listens", || async { TcpStream::connect(("127.0.0.1", self.port)).await.ok() }).await;
    }
}

impl Drop for Redis {
    fn drop(&mut self) {
        self.resume_quietly();
        self.kill();
    }
}

impl Redis {
    fn resume_quietly(&self) {
        let _ = Command::new("kill").args(["-CONT", &self.child.id().to_string()]).stderr(Stdio::null()).status();
    }
}

fn spawn(port: u16, folder: &TempDir) -> Child {
    Command::new("redis-server")
        .args(["--port", &port.to_string(), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no", "--dir"])
        .arg(folder.path())
        .stdout(Stdio::null())
        .spawn()
        .expect("redis-server can be started")
}
