//! `paperkey health`: asks the operations listener of a process on this machine whether it is ready, for whatever keeps
//! processes running and has no HTTP client of its own, such as a container without a shell.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use clap::Args;
use paperkey_kit::config::Config;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{Failure, say};

/// How long a process may take to say how it is.
const PATIENCE: Duration = Duration::from_secs(4);
/// More than an operations listener has to say.
const MAX_ANSWER_BYTES: u64 = 8_192;

#[derive(Debug, Args)]
pub(crate) struct Health {
    /// Ask whether the process lives, and not whether it is ready
    #[arg(long)]
    live: bool,
}

/// Ends well if the process at this configuration's operations listener does.
pub(crate) async fn run(config: &Config, command: &Health) -> Result<(), Failure> {
    let at = reachable(config.server.ops_listen);
    let path = if command.live { "/healthz" } else { "/readyz" };
    let answer = tokio::time::timeout(PATIENCE, ask(at, path))
        .await
        .map_err(|_| Failure(format!("{at} did not answer within {} seconds", PATIENCE.as_secs())))?
        .map_err(|error| Failure(format!("{at} does not answer ({error}): nothing of this configuration runs here")))?;
    let (is_well, said) = read(&answer).ok_or_else(|| Failure(format!("{at} is no operations listener of ours")))?;
    if is_well {
        say(said);
        Ok(())
    } else {
        Err(Failure(said.to_owned()))
    }
}

/// Where one calls what listens there: 0.0.0.0 is every address of the machine, and none to call.
fn reachable(listening: SocketAddr) -> SocketAddr {
    let ip = match listening.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listening.port())
}

async fn ask(at: SocketAddr, path: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(at).await?;
    let request = format!("GET {path} HTTP/1.1\r\nhost: {at}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER_BYTES).read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

/// Whether an answer is a good one, and what it says.
fn read(answer: &str) -> Option<(bool, &str)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.1 ")?.get(..3)?;
    Some((status == "200", body.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_listens_everywhere_is_asked_at_home() {
        for (listening, asked) in [
            ("0.0.0.0:9090", "127.0.0.1:9090"),
            ("[::]:9090", "[::1]:9090"),
            ("10.0.0.7:9090", "10.0.0.7:9090"),
            ("127.0.0.1:1", "127.0.0.1:1"),
        ] {
            assert_eq!(reachable(listening.parse().unwrap()), asked.parse().unwrap());
        }
    }

    #[test]
    fn only_an_answer_of_200_is_a_good_one() {
        assert_eq!(read("HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nready\n"), Some((true, "ready")));
        let away = "HTTP/1.1 503 Service Unavailable\r\n\r\nnot ready: the database of auth does not answer\n";
        assert_eq!(read(away), Some((false, "not ready: the database of auth does not answer")));
        for nonsense in ["", "SSH-2.0-OpenSSH_9.2\r\n", "HTTP/1.1 \r\n\r\n", "HTTP/1.1 200 OK"] {
            assert_eq!(read(nonsense), None, "{nonsense:?}");
        }
    }
}
