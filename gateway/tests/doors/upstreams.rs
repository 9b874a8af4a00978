//! Mounted upstreams, over real sockets and byte by byte: no client or server stands between a test and the wire.

use std::{net::SocketAddr, time::Duration};

use paperkey_gateway::GatewayConfig;
use paperkey_kit::config::Upstream;
use serde_json::Value as Json;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    time::timeout,
};

use crate::common::{GENEROUS, Listening, gateway_with, listening, mount};

const KEY: &str = "Authorization: Bearer pk_live_full\r\n";

/// A connection, read and written byte by byte.
struct Wire {
    stream: TcpStream,
    read: Vec<u8>,
}

impl Wire {
    async fn to(at: SocketAddr) -> Self {
        Self { stream: TcpStream::connect(at).await.unwrap(), read: Vec::new() }
    }

    async fn say(&mut self, bytes: impl AsRef<[u8]>) {
        timeout(GENEROUS, self.stream.write_all(bytes.as_ref())).await.unwrap().unwrap();
    }

    /// Everything up to a mark, the mark included.
    async fn until(&mut self, mark: &str) -> String {
        let reading = async {
            loop {
                if let Some(at) = self.read.windows(mark.len()).position(|window| window == mark.as_bytes()) {
                    let rest = self.read.split_off(at + mark.len());
                    let found = std::mem::replace(&mut self.read, rest);
                    return String::from_utf8_lossy(&found).into_owned();
                }
                let read = self.stream.read_buf(&mut self.read).await.unwrap();
                assert!(read > 0, "the connection ended before {mark:?}: {:?}", String::from_utf8_lossy(&self.read));
            }
        };
        timeout(GENEROUS, reading).await.unwrap_or_else(|_| panic!("{mark:?} did not come"))
    }

    async fn head(&mut self) -> String {
        self.until("\r\n\r\n").await
    }

    /// Everything up to the end of the connection, however it ends.
    async fn rest(&mut self) -> String {
        let reading = async { while self.stream.read_buf(&mut self.read).await.is_ok_and(|read| read > 0) {} };
        timeout(GENEROUS, reading).await.expect("the connection ends");
        String::from_utf8_lossy(&std::mem::take(&mut self.read)).into_owned()
    }
}

/// A server that a test answers for by hand.
struct Backend {
    at: SocketAddr,
    connections: mpsc::Receiver<TcpStream>,
}

impl Backend {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let (send, connections) = mpsc::channel(16);
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if send.send(stream).await.is_err() {
                    return;
                }
            }
        });
        Self { at, connections }
    }

    fn url(&self) -> String {
        format!("http://{}", self.at)
    }

    /// The next connection.
    async fn next(&mut self) -> Wire {
        let stream = timeout(GENEROUS, self.connections.recv()).await.expect("the gateway connects").unwrap();
        Wire { stream, read: Vec::new() }
    }

    /// Nobody has connected.
    fn is_untouched(&mut self) -> bool {
        self.connections.try_recv().is_err()
    }
}

/// A backend, and a gateway before it at `/v1/pdf`.
async fn pair(change: impl FnOnce(&mut Upstream)) -> (Backend, Listening) {
    pair_in(|_| {}, change).await
}

async fn pair_in(config: impl FnOnce(&mut GatewayConfig), change: impl FnOnce(&mut Upstream)) -> (Backend, Listening) {
    let backend = Backend::start().await;
    let mut upstream = mount("/v1/pdf/", &backend.url());
    change(&mut upstream);
    let gateway = listening(|gateway| {
        gateway.upstreams = vec![upstream];
        config(gateway);
    });
    (backend, gateway.await)
}

/// Sends one request on a connection of its own, and takes all that comes back.
async fn refused(gateway: &Listening, request: impl AsRef<[u8]>) -> (u16, String, Json) {
    let mut client = Wire::to(gateway.at).await;
    client.say(request).await;
    let head = client.head().await;
    let length = header(&head, "content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    while client.read.len() < length {
        client.stream.read_buf(&mut client.read).await.unwrap();
    }
    (status(&head), head, serde_json::from_slice(&client.read[..length]).unwrap_or(Json::Null))
}

fn status(head: &str) -> u16 {
    head.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("no status: {head}"))
}

fn header<'h>(head: &'h str, name: &str) -> Option<&'h str> {
    head.lines().skip(1).find_map(|line| {
        let (found, value) = line.split_once(": ")?;
        found.eq_ignore_ascii_case(name).then_some(value)
    })
}

fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: api.example\r\n{headers}\r\n")
}

#[tokio::test]
async fn a_request_goes_through_with_our_word_on_who_sent_it() {
    let (mut backend, gateway) = pair(|_| {}).await;
    let mut client = Wire::to(gateway.at).await;
    let headers = format!(
        "{KEY}Cookie: session=1\r\nX-Paperkey-Team: team_forged\r\nX_Paperkey_Key: forged\r\n\
         X-Paperkey-Admin: yes\r\nPaperkey-Principal-Bin: AAAA\r\nX-Forwarded-For: 198.51.100.9\r\n\
         X-Forwarded-Host: evil\r\nX-Forwarded-User: root\r\nForwarded: for=198.51.100.9\r\nX-Real-IP: 198.51.100.9\r\n\
         X-Original-URL: /admin\r\nX-Rewrite-URL: /admin\r\nX-HTTP-Method-Override: DELETE\r\nX-Request-Id: mine\r\n\
         Traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\nAccept: text/html\r\nX-Two: a\r\n\
         X-Two: b\r\n"
    );
    client.say(get("/v1/pdf/render?size=a4&x=%2F..", &headers)).await;
    let mut call = backend.next().await;
    let head = call.head().await;
    assert!(head.starts_with("GET /v1/pdf/render?size=a4&x=%2F.. HTTP/1.1\r\n"), "{head}");
    let request_id = header(&head, "x-request-id").unwrap();
    assert!(request_id.starts_with("req_"), "{head}");
    let mut names: Vec<_> = head.lines().skip(1).filter_map(|line| line.split_once(": ")).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            ("accept", "text/html"),
            ("host", backend.at.to_string().as_str()),
            ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
            ("x-forwarded-for", "127.0.0.1"),
            ("x-forwarded-host", "api.example"),
            ("x-forwarded-proto", "https"),
            ("x-paperkey-key", "key_of_pk_live_full"),
            ("x-paperkey-mode", "live"),
            ("x-paperkey-scopes", "licenses:read licenses:write products:read"),
            ("x-paperkey-team", "team_1"),
            ("x-request-id", request_id),
            ("x-two", "a"),
            ("x-two", "b"),
        ]
    );
    let said = "HTTP/1.1 418 I am a teapot\r\nContent-Length: 5\r\nX-Request-Id: theirs\r\nSet-Cookie: a=1\r\n\
                Set-Cookie: b=2\r\nCache-Control: public\r\nConnection: X-Secret\r\nX-Secret: 1\r\nKeep-Alive: timeout=5\r\n\
                Proxy-Authenticate: Basic\r\nUpgrade: h2c\r\n\r\nhello";
    call.say(said).await;
    let head = client.head().await;
    client.until("hello").await;
    assert_eq!((status(&head), header(&head, "x-request-id")), (418, Some(request_id)), "{head}");
    assert_eq!(header(&head, "cache-control"), Some("public"));
    assert_eq!(
        (header(&head, "x-content-type-options"), header(&head, "content-security-policy")),
        (Some("nosniff"), Some("sandbox"))
    );
    assert_eq!(head.matches("set-cookie").count(), 2, "{head}");
    for gone in ["x-secret", "keep-alive", "proxy-authenticate", "upgrade", "connection", "transfer-encoding"] {
        assert_eq!(header(&head, gone), None, "{head}");
    }
    // Both connections are kept for the next request.
    client.say(get("/v1/pdf", KEY)).await;
    assert!(call.head().await.starts_with("GET /v1/pdf HTTP/1.1\r\n"));
}

#[tokio::test]
async fn only_those_who_may_come_through_do() {
    let (mut backend, gateway) = pair(|upstream| upstream.scope = Some("licenses:write".into())).await;
    for (credential, expected, code) in [
        ("", 401, "PB_INVALID_API_KEY"),
        ("Authorization: Bearer pk_1\r\n", 401, "PB_INVALID_API_KEY"),
        ("X-Api-Key: pk_live_gone\r\n", 401, "PB_INVALID_API_KEY"),
        ("X-Api-Key: pk_live_home\r\nX-Forwarded-For: 198.51.100.9\r\n", 403, "PB_IP_NOT_ALLOWED"),
        ("X-Api-Key: pk_live_readonly\r\n", 403, "PB_SCOPE_INSUFFICIENT"),
        ("X-Api-Key: po_ut_member\r\n", 403, "PB_ROLE_INSUFFICIENT"),
        ("X-Api-Key: pk_live_down\r\n", 503, "PB_UNAVAILABLE"),
    ] {
        let (status, head, json) = refused(&gateway, get("/v1/pdf/x", credential)).await;
        assert_eq!((status, json["error"]["code"].as_str()), (expected, Some(code)), "{credential}");
        assert!(header(&head, "x-request-id").is_some() && header(&head, "cache-control") == Some("no-store"));
    }
    assert!(backend.is_untouched());
}

#[tokio::test]
async fn a_read_only_key_reads() {
    let (mut backend, gateway) = pair(|_| {}).await;
    let key = "X-Api-Key: pk_live_readonly\r\n";
    for verb in ["POST", "PUT", "PATCH", "DELETE", "PROPFIND"] {
        let request = format!("{verb} /v1/pdf/x HTTP/1.1\r\nHost: h\r\n{key}Content-Length: 0\r\n\r\n");
        assert_eq!(refused(&gateway, request).await.0, 403, "{verb}");
    }
    assert!(backend.is_untouched());
    for verb in ["GET", "HEAD", "OPTIONS"] {
        let mut client = Wire::to(gateway.at).await;
        client.say(format!("{verb} /v1/pdf/x HTTP/1.1\r\nHost: h\r\n{key}X-HTTP-Method-Override: PUT\r\n\r\n")).await;
        let mut call = backend.next().await;
        let head = call.head().await;
        assert!(head.starts_with(verb) && !head.to_lowercase().contains("override"), "{head}");
        call.say("HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\n").await;
        let head = client.head().await;
        // A HEAD tells how long the answer to a GET would be.
        assert_eq!((status(&head), header(&head, "content-length")), (200, Some("3")), "{head}");
    }
}

#[tokio::test]
async fn visitors_come_through_where_they_may_but_never_with_a_bad_key() {
    let (mut backend, gateway) = pair(|upstream| upstream.anonymous = true).await;
    let mut client = Wire::to(gateway.at).await;
    client.say(get("/v1/pdf/x", "X-Paperkey-Team: forged\r\nX-Paperkey-User: forged\r\n")).await;
    let head = backend.next().await.head().await;
    assert!(!head.to_lowercase().contains("paperkey"), "{head}");
    for credential in ["Authorization: Bearer pk_live_gone\r\n", "X-Api-Key: \r\n", "Authorization: Basic eA==\r\n"] {
        assert_eq!(refused(&gateway, get("/v1/pdf/x", credential)).await.0, 401, "{credential}");
    }
    assert!(backend.is_untouched());
    let mut client = Wire::to(gateway.at).await;
    client.say(get("/v1/pdf/x", KEY)).await;
    assert_eq!(header(&backend.next().await.head().await, "x-paperkey-team"), Some("team_1"));
}

#[tokio::test]
async fn credentials_are_forwarded_only_where_that_is_configured() {
    let (mut backend, gateway) = pair(|upstream| upstream.forward_credential = true).await;
    let mut client = Wire::to(gateway.at).await;
    client.say(get("/v1/pdf/x", &format!("{KEY}Cookie: a=1\r\nCookie: b=2\r\n"))).await;
    let head = backend.next().await.head().await;
    assert_eq!(header(&head, "authorization"), Some("Bearer pk_live_full"));
    assert_eq!((header(&head, "cookie"), head.matches("cookie").count()), (Some("a=1; b=2"), 1), "{head}");
    // Sessions with us are for nobody else.
    let ours = "Cookie: a=1; __Host-paperkey=x.y.z\r\nCookie: paperkey_session=x.y.z\r\nCookie: b=2\r\n";
    client.say(get("/v1/pdf/x", &format!("{KEY}{ours}"))).await;
    let mut call = backend.next().await;
    let head = call.head().await;
    assert_eq!((header(&head, "cookie"), head.contains("x.y.z")), (Some("a=1; b=2"), false), "{head}");
}

#[tokio::test]
async fn bodies_stream_in_both_directions_at_once() {
    let (mut backend, gateway) = pair(|_| {}).await;
    let mut client = Wire::to(gateway.at).await;
    let head = format!("POST /v1/pdf/x HTTP/1.1\r\nHost: h\r\n{KEY}Transfer-Encoding: chunked\r\n\r\n");
    client.say(format!("{head}5\r\nfirst\r\n")).await;
    let mut call = backend.next().await;
    let head = call.head().await;
    assert_eq!((header(&head, "transfer-encoding"), header(&head, "content-length")), (Some("chunked"), None));
    call.until("first\r\n").await;
    // The answer begins while the question goes on.
    call.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n").await;
    assert_eq!(status(&client.head().await), 200);
    client.until("one\r\n").await;
    client.say("6\r\nsecond\r\n").await;
    call.until("second\r\n").await;
    call.say("3\r\ntwo\r\n").await;
    client.until("two\r\n").await;
    client.say("0\r\nX-Trailer: evil\r\n\r\n").await;
    assert_eq!(call.until("0\r\n\r\n").await, "0\r\n\r\n");
    call.say("0\r\n\r\n").await;
    client.until("0\r\n\r\n").await;
}

#[tokio::test]
async fn the_slower_side_sets_the_pace() {
    const MORE_THAN_ANY_BUFFER: usize = 64 * 1_024 * 1_024;
    /// Writes until nobody takes anything any more, and says how much was taken.
    async fn fill(stream: &mut TcpStream) -> usize {
        let piece = vec![b'x'; 64 * 1_024];
        let mut taken = 0;
        while taken < MORE_THAN_ANY_BUFFER {
            match timeout(Duration::from_millis(500), stream.write(&piece)).await {
                Ok(written) => taken += written.unwrap(),
                Err(_) => break,
            }
        }
        taken
    }
    let (mut backend, gateway) = pair(|upstream| upstream.max_body_bytes = 1 << 40).await;
    let mut client = Wire::to(gateway.at).await;
    client.say(get("/v1/pdf/x", KEY)).await;
    let mut call = backend.next().await;
    call.head().await;
    call.say("HTTP/1.1 200 OK\r\nContent-Length: 1099511627776\r\n\r\n").await;
    assert!(fill(&mut call.stream).await < MORE_THAN_ANY_BUFFER, "an answer that nobody reads is kept");

    let mut client = Wire::to(gateway.at).await;
    client.say(format!("POST /v1/pdf/x HTTP/1.1\r\nHost: h\r\n{KEY}Content-Length: 1099511627776\r\n\r\n")).await;
    let mut call = backend.next().await;
    call.head().await;
    assert!(fill(&mut client.stream).await < MORE_THAN_ANY_BUFFER, "a request that nobody reads is kept");
}

#[tokio::test]
async fn what_belongs_to_a_connection_stays_on_it() {
    let (mut backend, gateway) = pair(|_| {}).await;
    let mut client = Wire::to(gateway.at).await;
    let headers = format!(
        "{KEY}Connection: keep-alive, X-Gone, x-paperkey-team, HTTP2-Settings, Upgrade\r\nX-Gone: 1\r\nKeep-Alive: 5\r\n\
         TE: trailers\r\nTrailer: X-T\r\nProxy-Authorization: Basic eA==\r\nProxy-Connection: keep-alive\r\n\
         Upgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\nX-Stays: 1\r\nExpect: nothing\r\n"
    );
    client.say(get("/v1/pdf/x", &headers)).await;
    let head = backend.next().await.head().await.to_lowercase();
    for gone in ["x-gone", "connection", "keep-alive", "te:", "trailer", "proxy-", "upgrade", "http2-", "expect"] {
        assert!(!head.contains(&format!("\n{gone}")), "{gone}: {head}");
    }
    // Naming our word as one's own does not take it away.
    assert!(head.contains("x-stays: 1") && head.contains("x-paperkey-team: team_1"), "{head}");
}

#[tokio::test]
async fn upgrades_and_traces_are_refused() {
    let (mut backend, gateway) = pair(|_| {}).await;
    let websocket = format!("{KEY}Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eA==\r\n");
    let (status, _, json) = refused(&gateway, get("/v1/pdf/x", &websocket)).await;
    assert_eq!((status, json["error"]["code"].as_str()), (400, Some("PB_INVALID_REQUEST")));
    let trace = format!("TRACE /v1/pdf/x HTTP/1.1\r\nHost: h\r\n{KEY}\r\n");
    assert_eq!(refused(&gateway, trace).await.0, 405);
    assert!(backend.is_untouched());
    let mut client = Wire::to(gateway.at).await;
    client.say(get("/v1/pdf/x", KEY)).await;
    let mut call = backend.next().await;
    call.head().await;
    call.say("HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n").await;
    assert_eq!(self::status(&client.head().await), 503);
}

#[tokio::test]
async fn a_request_that_could_be_two_reaches_nobody() {
    let (mut backend, gateway) = pair(|_| {}).await;
    let body = "0\r\n\r\nGET /v1/pdf/smuggled HTTP/1.1\r\nHost: h\r\n\r\n";
    for framing in [
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: 5, 6\r\n",
        "Content-Length: +6\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: 0x6\r\n",
        "Content-Length: 6a\r\n",
        "Transfer-Encoding: identity\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
        "Transfer-Encoding: gzip, chunked\r\n",
        "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding : chunked\r\n",
        " Transfer-Encoding: chunked\r\n",
        "X: y\r\n\tz\r\nContent-Length : 6\r\n",
        "Transfer-Encoding:\x0bchunked\r\n",
    ] {
        let mut client = Wire::to(gateway.at).await;
        client.say(format!("POST /v1/pdf/x HTTP/1.1\r\nHost: h\r\n{KEY}{framing}\r\n{body}")).await;
        let answer = client.rest().await;
        assert_eq!(status(&answer), 400, "{framing:?}: {answer}");
        assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{framing:?}: {answer}");
        assert!(backend.is_untouched(), "{framing:?}");
    }
    // By the chunks the body is empty. What follows is not read as a request: the connection ends.
    for framing in [
        "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 6\r\n",
        "Transfer-Encoding: CHUNKED\r\nContent-Length: 0\r\nContent-Length: 99\r\n",
    ] {
        let mut client = Wire::to(gateway.at).await;
        client.say(format!("POST /v1/pdf/x HTTP/1.1\r\nHost: h\r\n{KEY}{framing}\r\n{body}")).await;
        let mut call = backend.next().await;
        let head = call.head().await;
        assert_eq!((header(&head, "content-length"), header(&head, "transfer-encoding")), (None, Some("chunked")));
        assert_eq!(call.until("\r\n\r\n").await, "0\r\n\r\n");
        call.say("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await;
        assert_eq!(client.rest().await.matches("HTTP/1.1 ").count(), 1, "{framing:?}");
        assert_eq!(call.rest().await, "");
        assert!(backend.is_untouched(), "{framing:?}");
    }
    // A body that looks like a request is a body.
    let mut client = Wire::to(gateway.at).await;
    let hidden = "GET /v1/pdf/smuggled HTTP/1.1\r\nHost: h\r\n\r\n";
    let length = hidden.len();
    client.say(format!("POST /v1/pdf/x HTTP/1.1\r\nHost: h\r\n{KEY}Content-Length: {length}\r\n\r\n{hidden}")).await;
    let mut call = backend.next().await;
    assert_eq!(header(&call.head().await, "content-length"), Some(length.to_string().as_str()));
    call.until(hidden).await;
    call.say("HTTP/1.1 204 No Content\r\n\r\n").await;
    assert_eq!(status(&client.head().await), 204);
    // An answer that says twice how long it is comes through in one way only.
    client.say(get("/v1/pdf/x", KEY)).await;
    call.head().await;
    let said = "HTTP/1.1 200 OK\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nwhole\r\n0\r\n\r\n";
    call.say(said).await;
    let head = client.head().await;
    if status(&head) == 200 {
        assert_eq!(header(&head, "content-length"), None, "{head}");
        client.until("5\r\nwhole\r\n0\r\n\r\n").await;
    } else {
        assert_eq!(status(&head), 503, "{head}");
    }
}

#[tokio::test]
async fn paths_lead_only_to_where_they_are_mounted() {
    let (mut backend, gateway) = pair(|_| {}).await;
    for path in [
        "/v1/pdf/..",
        "/v1/pdf/../status",
        "/v1/pdf/%2e%2e/status",
        "/v1/pdf/%2E%2e%2fstatus",
        "/v1/pdf/..%2fstatus",
        "/v1/pdf/..%5cstatus",
        "/v1/pdf/..;/status",
        "/v1/pdf/%252e%252e/status",
        "/v1/pdf//x",
        "/v1/pdf//",
        "/v1/pdf/./x",
        "/v1/pdf/%00",
        "/v1/pdf/%zz",
    ] {
        let (status, _, json) = refused(&gateway, get(path, KEY)).await;
        assert_eq!((status, json["error"]["code"].as_str()), (400, Some("PB_INVALID_REQUEST")), "{path}");
    }
    for path in
        ["/v1/pdfs", "/v1/pd", "/v1/PDF/x", "/v1/%70df/x", "/v1//pdf/x", "/v1/./pdf/x", "/v1/x/../pdf/x", "//v1/pdf"]
    {
        assert_eq!(refused(&gateway, get(path, KEY)).await.0, 404, "{path}");
    }
    assert_eq!(refused(&gateway, get("/v1/pdf\\..\\x", KEY)).await.0 / 100, 4);
    assert!(backend.is_untouched());
    // The whole address, as to a proxy, names no other server.
    let mut client = Wire::to(gateway.at).await;
    client.say(get("http://evil.example/v1/pdf/x", KEY)).await;
    let head = backend.next().await.head().await;
    assert!(head.starts_with("GET /v1/pdf/x HTTP/1.1"), "{head}");
}

#[tokio::test]
async fn the_longest_path_wins_and_the_prefix_is_stripped_where_that_is_configured() {
    let (mut short, mut long) = (Backend::start().await, Backend::start().await);
    let upstreams = vec![
        mount("/v1/pdf", &short.url()),
        Upstream { strip_prefix: true, ..mount("/v1/pdf/new/", &format!("{}/base/", long.url())) },
    ];
    let gateway = listening(|config| config.upstreams = upstreams).await;
    for (path, asked) in [
        ("/v1/pdf/new", "GET /base HTTP"),
        ("/v1/pdf/new/", "GET /base/ HTTP"),
        ("/v1/pdf/new/a?b", "GET /base/a?b HTTP"),
    ] {
        let mut client = Wire::to(gateway.at).await;
        client.say(get(path, KEY)).await;
        let head = long.next().await.head().await;
        assert!(head.starts_with(asked), "{path}: {head}");
    }
    let mut client = Wire::to(gateway.at).await;
    client.say(get("/v1/pdf/newer", KEY)).await;
    assert!(short.next().await.head().await.starts_with("GET /v1/pdf/newer HTTP"));

    let backend = Backend::start().await;
    let upstreams = vec![Upstream { strip_prefix: true, ..mount("/v1/pdf/", &backend.url()) }];
    let gateway = listening(|config| config.upstreams = upstreams).await;
    let mut backend = backend;
    let mut client = Wire::to(gateway.at).await;
    client.say(get("/v1/pdf?x", KEY)).await;
    assert!(backend.next().await.head().await.starts_with("GET /?x HTTP"));
}

#[tokio::test]
async fn a_body_that_is_too_large_is_refused_when_it_says_so_and_when_it_grows() {
    let (mut backend, gateway) = pair(|upstream| upstream.max_body_bytes = 10).await;
    let declared = format!("POST /v1/pdf/x HTTP/1.1\r\nHost: h\r\n{KEY}Content-Length: 11\r\n\r\nhello world");
    let (status, head, json) = refused(&gateway, declared).await;
    assert_eq!((status, json["error"]["code"].as_str()), (413, Some("PB_BODY_TOO_LARGE")));
    assert_eq!(header(&head, "connection"), Some("close"));
    assert!(backend.is_untouched());

    let mut client = Wire::to(gateway.at).await;
    let head = format!("POST /v1/pdf/x HTTP/1.1\r\nHost: h\r\n{KEY}Transfer-Encoding: chunked\r\n\r\n");
    client.say(format!("{head}5\r\nhello\r\n")).await;
    let mut call = backend.next().await;
    call.until("hello\r\n").await;
    client.say("6\r\n world\r\n").await;
    assert_eq!(self::status(&client.head().await), 413);
    // The server sees a request that never ends well, not a shorter one.
    assert!(!call.rest().await.contains("0\r\n\r\n"));

    let mut client = Wire::to(gateway.at).await;
    client.say(format!("POST /v1/pdf/x HTTP/1.1\r\nHost: h\r\n{KEY}Content-Length: 10\r\n\r\n0123456789")).await;
    backend.next().await.until("0123456789").await;
}

#[tokio::test]
async fn a_server_that_hangs_is_a_timeout() {
    let (mut backend, gateway) = pair(|upstream| upstream.timeout_ms = 100).await;
    let (status, _, json) = refused(&gateway, get("/v1/pdf/x", KEY)).await;
    assert_eq!((status, json["error"]["code"].as_str()), (504, Some("PB_TIMEOUT")));
    // And it is told that nobody waits any more.
    assert!(backend.next().await.rest().await.starts_with("GET /v1/pdf/x"));

    // A request body that stands still is one, too.
    let stuck = format!("POST /v1/pdf/x HTTP/1.1\r\nHost: h\r\n{KEY}Content-Length: 9\r\n\r\nstuck");
    let (status, head, _) = refused(&gateway, stuck).await;
    assert_eq!((status, header(&head, "connection")), (504, Some("close")));
    backend.next().await.rest().await;

    // So is an answer that stops in the middle; there the connection breaks.
    let mut client = Wire::to(gateway.at).await;
    client.say(get("/v1/pdf/x", KEY)).await;
    let mut call = backend.next().await;
    call.head().await;
    call.say("HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf").await;
    assert_eq!(self::status(&client.head().await), 200);
    assert_eq!(client.rest().await, "half");
}

#[tokio::test]
async fn a_long_stream_may_take_longer_than_the_timeout_as_long_as_it_moves() {
    let (mut backend, gateway) = pair(|upstream| upstream.timeout_ms = 1_000).await;
    let mut client = Wire::to(gateway.at).await;
    let head = format!("POST /v1/pdf/x HTTP/1.1\r\nHost: h\r\n{KEY}Transfer-Encoding: chunked\r\n\r\n");
    client.say(head).await;
    let mut call = backend.next().await;
    call.head().await;
    let mut ticks = tokio::time::interval(Duration::from_millis(250));
    for _ in 0..6 {
        ticks.tick().await;
        client.say("1\r\nx\r\n").await;
        call.until("x\r\n").await;
    }
    client.say("0\r\n\r\n").await;
    call.until("0\r\n\r\n").await;
    call.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    client.head().await;
    for _ in 0..6 {
        ticks.tick().await;
        call.say("1\r\ny\r\n").await;
        client.until("y\r\n").await;
    }
    call.say("0\r\n\r\n").await;
    client.until("0\r\n\r\n").await;
}

#[tokio::test]
async fn a_server_that_is_not_there_or_breaks_off_is_unavailable() {
    let nowhere = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let gateway = listening(|config| config.upstreams = vec![mount("/v1/pdf", &format!("http://{nowhere}"))]).await;
    let (status, _, json) = refused(&gateway, get("/v1/pdf/x", KEY)).await;
    assert_eq!((status, json["error"]["code"].as_str()), (503, Some("PB_UNAVAILABLE")));
    assert!(!json.to_string().contains(&nowhere.port().to_string()), "{json}");

    let (mut backend, gateway) = pair(|_| {}).await;
    for nonsense in [
        "",
        "HTTP/1.1 200",
        "SSH-2.0-OpenSSH\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    ] {
        let mut client = Wire::to(gateway.at).await;
        client.say(get("/v1/pdf/x", KEY)).await;
        let mut call = backend.next().await;
        call.head().await;
        call.say(nonsense).await;
        drop(call);
        assert_eq!(self::status(&client.head().await), 503, "{nonsense:?}");
    }
    let mut client = Wire::to(gateway.at).await;
    client.say(get("/v1/pdf/x", KEY)).await;
    let mut call = backend.next().await;
    call.head().await;
    call.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n").await;
    client.until("half\r\n").await;
    drop(call);
    assert_eq!(client.rest().await, "", "a broken answer does not look like a whole one");
}

#[tokio::test]
async fn a_caller_who_goes_away_is_no_longer_worked_for() {
    let (mut backend, gateway) = pair(|_| {}).await;
    let mut client = Wire::to(gateway.at).await;
    client.say(get("/v1/pdf/x", KEY)).await;
    let mut call = backend.next().await;
    call.head().await;
    drop(client);
    assert_eq!(call.rest().await, "");

    let mut client = Wire::to(gateway.at).await;
    client.say(get("/v1/pdf/x", KEY)).await;
    let mut call = backend.next().await;
    call.head().await;
    call.say("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n").await;
    client.until("half\r\n").await;
    drop(client);
    assert_eq!(call.rest().await, "");

    let mut client = Wire::to(gateway.at).await;
    client.say(format!("POST /v1/pdf/x HTTP/1.1\r\nHost: h\r\n{KEY}Content-Length: 9\r\n\r\nhalf")).await;
    let mut call = backend.next().await;
    call.until("half").await;
    drop(client);
    assert_eq!(call.rest().await, "");
}

#[tokio::test]
async fn addresses_are_passed_on_as_far_as_they_can_be_believed() {
    let trusting = |config: &mut GatewayConfig| {
        config.trusted_proxies = vec!["127.0.0.0/8".parse().unwrap(), "10.0.0.0/8".parse().unwrap()];
    };
    let (mut backend, gateway) = pair_in(trusting, |_| {}).await;
    let mut client = Wire::to(gateway.at).await;
    let headers = "X-Api-Key: pk_live_home\r\nX-Forwarded-For: 6.6.6.6, 198.51.100.9\r\nX-Forwarded-For: 10.0.0.2\r\n\
                   X-Forwarded-Host: shop.example\r\nX-Forwarded-Proto: http\r\n";
    client.say(get("/v1/pdf/x", headers)).await;
    let head = backend.next().await.head().await;
    assert_eq!(header(&head, "x-forwarded-for"), Some("198.51.100.9, 10.0.0.2, 127.0.0.1"));
    assert_eq!(header(&head, "x-forwarded-host"), Some("shop.example"));
    assert_eq!(header(&head, "x-forwarded-proto"), Some("http"));
}

#[tokio::test]
async fn browsers_may_call_where_that_is_configured() {
    let (mut backend, gateway) = pair_in(|config| config.cors_any_origin = true, |_| {}).await;
    let ask = "OPTIONS /v1/pdf/x HTTP/1.1\r\nHost: h\r\nOrigin: https://a.example\r\n\
               Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: authorization\r\n\r\n";
    let (status, head, _) = refused(&gateway, ask).await;
    assert_eq!((status, header(&head, "access-control-allow-headers")), (204, Some("authorization")));
    let (_, head, _) = refused(&gateway, get("/v1/pdf/x", "")).await;
    assert_eq!(header(&head, "access-control-allow-origin"), Some("*"));
    assert!(backend.is_untouched());
    for (theirs, told) in [("", "*"), ("Access-Control-Allow-Origin: https://a.example\r\n", "https://a.example")] {
        let mut client = Wire::to(gateway.at).await;
        client.say(get("/v1/pdf/x", KEY)).await;
        let mut call = backend.next().await;
        call.head().await;
        call.say(format!("HTTP/1.1 204 No Content\r\nConnection: close\r\n{theirs}\r\n")).await;
        assert_eq!(header(&client.head().await, "access-control-allow-origin"), Some(told));
    }
}

#[tokio::test]
async fn the_end_of_a_rotated_key_is_told_beside_the_answer() {
    let (mut backend, gateway) = pair(|_| {}).await;
    let mut client = Wire::to(gateway.at).await;
    client.say(get("/v1/pdf/x", "X-Api-Key: pk_live_old\r\n")).await;
    let mut call = backend.next().await;
    call.head().await;
    call.say("HTTP/1.1 204 No Content\r\n\r\n").await;
    assert!(header(&client.head().await, "paperkey-key-expires").is_some());
}

#[test]
fn a_gateway_with_a_mount_that_cannot_be_does_not_start() {
    for upstream in [
        mount("/v1/keys", "http://127.0.0.1:1"),
        mount("/v1/authz/x", "http://127.0.0.1:1"),
        mount("/v1/licenses/pdf", "http://127.0.0.1:1"),
        mount("/auth/pdf", "http://127.0.0.1:1"),
        mount("/v1/pdf", "gopher://x"),
        Upstream { scope: Some("nothing".into()), ..mount("/v1/pdf", "http://127.0.0.1:1") },
    ] {
        let refused = gateway_with(|config| config.upstreams = vec![upstream.clone()]).unwrap_err();
        assert!(refused.to_string().starts_with("upstreams: upstreams[0]."), "{refused}");
    }
}

#[tokio::test]
async fn a_stricter_mount_below_another_is_not_passed_by_another_spelling() {
    let mut backend = Backend::start().await;
    let mut open = mount("/v1/tools/", &backend.url());
    open.anonymous = true;
    let mut strict = mount("/v1/tools/admin/", &backend.url());
    strict.scope = Some("licenses:write".into());
    let gateway = listening(|gateway| gateway.upstreams = vec![open, strict]).await;
    for path in [
        "/v1/tools/%61dmin/x",
        "/v1/tools/adm%69n",
        "/v1/tools/%2561dmin/x",
        "/v1/tools/admin;x=1/y",
        "/v1/tools/admin;/y",
        "/v1/tools/Admin/x",
        "/v1/tools/%41DMIN/x",
        "/v1/tools;x/admin/y",
    ] {
        let (status, ..) = refused(&gateway, get(path, "")).await;
        assert!([400, 404].contains(&status), "{path}: {status}");
    }
    assert_eq!(refused(&gateway, get("/v1/tools/admin/x", "")).await.0, 401);
    assert!(backend.is_untouched());
    let mut client = Wire::to(gateway.at).await;
    client.say(get("/v1/tools/administer%20it;v=1", "")).await;
    assert!(backend.next().await.head().await.starts_with("GET /v1/tools/administer%20it;v=1 HTTP/1.1"));
}

#[tokio::test]
async fn a_body_keeps_its_length_whatever_the_verb() {
    let (mut backend, gateway) = pair(|_| {}).await;
    let mut client = Wire::to(gateway.at).await;
    let head = format!("GET /v1/pdf/_search HTTP/1.1\r\nHost: h\r\n{KEY}Transfer-Encoding: chunked\r\n\r\n");
    client.say(format!("{head}5\r\nquery\r\n0\r\n\r\n")).await;
    let mut call = backend.next().await;
    assert_eq!(header(&call.head().await, "transfer-encoding"), Some("chunked"));
    call.until("query\r\n0\r\n\r\n").await;
    for verb in ["POST", "PUT", "DELETE"] {
        let mut client = Wire::to(gateway.at).await;
        client.say(format!("{verb} /v1/pdf/x HTTP/1.1\r\nHost: h\r\n{KEY}Content-Length: 0\r\n\r\n")).await;
        let head = backend.next().await.head().await;
        assert_eq!((header(&head, "content-length"), header(&head, "transfer-encoding")), (Some("0"), None), "{head}");
    }
    let mut client = Wire::to(gateway.at).await;
    client.say(get("/v1/pdf/x", KEY)).await;
    let head = backend.next().await.head().await;
    assert_eq!((header(&head, "content-length"), header(&head, "transfer-encoding")), (None, None), "{head}");
}
