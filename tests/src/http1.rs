//! HTTP/1.1 by hand: for what no decent client would send.

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use crate::{api::Answer, wait::GENEROUS};

/// A connection on which bytes are written as they are.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    asked: String,
}

impl Connection {
    /// Connects to a base URL.
    pub async fn open(base: &str) -> Self {
        let address = base.trim_start_matches("http://");
        let stream = TcpStream::connect(address).await.unwrap_or_else(|error| panic!("{base}: {error}"));
        Self { stream, asked: String::new() }
    }

    /// Writes bytes.
    pub async fn write(&mut self, bytes: impl AsRef<[u8]>) {
        let bytes = bytes.as_ref();
        if self.asked.is_empty() {
            self.asked = String::from_utf8_lossy(bytes).lines().next().unwrap_or_default().to_owned();
        }
        // A server that has said enough may have closed its side; what it said is read below.
        let _ = self.stream.write_all(bytes).await;
    }

    /// Says that nothing more will be written.
    pub async fn finish(&mut self) {
        let _ = self.stream.shutdown().await;
    }

    /// Reads one answer; `None` where the connection ends without one.
    pub async fn answer(&mut self) -> Option<Answer> {
        let asked = self.asked.clone();
        let read = tokio::time::timeout(GENEROUS, self.read()).await;
        read.unwrap_or_else(|_| panic!("{asked}: no answer within {GENEROUS:?}"))
    }

    async fn read(&mut self) -> Option<Answer> {
        let mut bytes = BytesMut::new();
        let end = loop {
            if let Some(at) = find(&bytes, b"\r\n\r\n") {
                break at;
            }
            self.more(&mut bytes).await?;
        };
        let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
        let mut body = bytes.split_off(end + 4);
        let (status, headers) = parsed(&head)?;
        let length = headers.get("content-length").and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
        if let Some(length) = length {
            while body.len() < length {
                self.more(&mut body).await?;
            }
            body.truncate(length);
        } else if headers.contains_key("transfer-encoding") {
            while find(&body, b"0\r\n\r\n").is_none() {
                self.more(&mut body).await?;
            }
            body = dechunked(&body);
        }
        let path = self.asked.split(' ').nth(1).unwrap_or_default().to_owned();
        Some(Answer::new(self.asked.clone(), &path, status, headers, Bytes::from(body)))
    }

    async fn more(&mut self, bytes: &mut BytesMut) -> Option<()> {
        self.stream.read_buf(bytes).await.ok().filter(|read| *read > 0).map(drop)
    }
}

fn find(bytes: &[u8], pattern: &[u8]) -> Option<usize> {
    bytes.windows(pattern.len()).position(|window| window == pattern)
}

fn parsed(head: &str) -> Option<(StatusCode, HeaderMap)> {
    let mut lines = head.split("\r\n");
    let status = lines.next()?.split(' ').nth(1)?.parse().ok()?;
    let headers = lines
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.parse::<HeaderName>().ok()?, value.trim().parse::<HeaderValue>().ok()?))
        })
        .collect();
    Some((status, headers))
}

fn dechunked(mut bytes: &[u8]) -> BytesMut {
    let mut body = BytesMut::new();
    while let Some(at) = find(bytes, b"\r\n") {
        let length = std::str::from_utf8(&bytes[..at]).ok().and_then(|text| usize::from_str_radix(text, 16).ok());
        let Some(length) = length.filter(|length| *length > 0) else { break };
        let Some(chunk) = bytes.get(at + 2..at + 2 + length) else { break };
        body.extend_from_slice(chunk);
        bytes = bytes.get(at + 2 + length + 2..).unwrap_or_default();
    }
    body
}
