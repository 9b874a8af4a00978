//! Sending over real sockets: where it goes and where it must not, how it is encrypted, and what comes back.
//!
//! No public address can be reached from here. Where it counts that only such ones are dialled, the dialler is one that
//! notes what it is asked for and leads to a receiver of the test instead.

mod dns;
mod receivers;

use std::{
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use dns::{NameServer, Says, parsed};
use http::{Response, Version};
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame};
use paperkey_kit::{clock::Clock, secrets::Secret};
use receivers::{Authority, PUBLIC, Receiver, answer, offering, read_request, say, self_signed};
use tokio::{
    net::{TcpStream, UdpSocket},
    process::Command,
};

use super::{
    connector::{Dial, Tcp},
    sender::{Parcel, Sender},
};
use crate::{
    WebhookConfig,
    domain::{
        attempt::{Attempt, AttemptFault},
        endpoint::UrlRules,
        signature::{Signatures, new_secret},
    },
};

/// Longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(30);

/// Dials what it is asked for, or, where there is one, always the same receiver; and notes what it was asked for.
#[derive(Clone, Default)]
struct Noting {
    asked: Arc<Mutex<Vec<SocketAddr>>>,
    leads_to: Option<SocketAddr>,
    /// Of these, the first so many refuse.
    refuse: usize,
}

impl Noting {
    fn leading_to(receiver: &Receiver) -> Self {
        Self { leads_to: Some(receiver.address), ..Self::default() }
    }

    fn asked(&self) -> Vec<SocketAddr> {
        self.asked.lock().unwrap().clone()
    }
}

impl Dial for Noting {
    async fn dial(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let number = {
            let mut asked = self.asked.lock().unwrap();
            asked.push(address);
            asked.len()
        };
        if number <= self.refuse {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        TcpStream::connect(self.leads_to.unwrap_or(address)).await
    }
}

/// A configuration under which only public addresses are dialled, over http too.
fn strict(names: &NameServer) -> WebhookConfig {
    WebhookConfig { allow_http: true, name_servers: Some(vec![names.address]), ..WebhookConfig::default() }
}

/// One under which any address is dialled.
fn lax(names: &NameServer) -> WebhookConfig {
    WebhookConfig { allow_private_networks: true, ..strict(names) }
}

/// One under which any address is dialled, and no name is known.
fn nameless() -> WebhookConfig {
    WebhookConfig {
        allow_http: true,
        allow_private_networks: true,
        name_servers: Some(vec![([127, 0, 0, 1], 9).into()]),
        ..WebhookConfig::default()
    }
}

fn sender<D: Dial>(dial: D, config: &WebhookConfig) -> Sender<D> {
    Sender::over(dial, config, Clock::system()).expect("the configuration is good")
}

/// Sends one delivery to an address that any rules accept.
async fn send<D: Dial>(sender: &Sender<D>, url: &str) -> Attempt {
    send_signed(sender, url, &Signatures::of(&new_secret()).unwrap()).await
}

async fn send_signed<D: Dial>(sender: &Sender<D>, url: &str, signatures: &Signatures) -> Attempt {
    let rules = UrlRules { allow_http: true, allow_private_networks: true };
    let target = rules.read(url).unwrap_or_else(|error| panic!("{url}: {:?}", error.violations()));
    let body = Bytes::from_static(br#"{"id":"evt_1"}"#);
    let parcel = Parcel { delivery_id: "dlv_1", topic: "license.created", body, traceparent: "" };
    tokio::time::timeout(PATIENCE, sender.send(&target, signatures, parcel)).await.expect("it ends in time")
}

#[track_caller]
fn arrived(attempt: &Attempt) {
    assert_eq!((attempt.fault, attempt.response_status), (None, Some(200)), "{attempt:?}");
}

#[tokio::test]
async fn a_name_that_has_any_address_that_is_not_public_is_not_dialled_at_all() {
    let names = NameServer::start().await;
    let private = Receiver::plain(200).await;
    let noting = Noting::leading_to(&private);
    let sender = sender(noting.clone(), &strict(&names));
    let mut many = vec![PUBLIC; 69];
    many.push("10.0.0.1".parse().unwrap());
    for says in [
        Says::addresses(&["127.0.0.1"]),
        Says::addresses(&["93.184.215.14", "10.1.2.3"]),
        Says::addresses(&["169.254.169.254", "93.184.215.14"]),
        // One family public, the other not.
        Says::addresses(&["93.184.215.14", "::1"]),
        Says::addresses(&["93.184.215.14", "fd00::1"]),
        Says::addresses(&["2606:4700::1111", "192.168.0.1"]),
        Says::addresses(&["93.184.215.14", "64:ff9b::127.0.0.1"]),
        Says::addresses(&["::ffff:127.0.0.1"]),
        Says::addresses(&["2002:7f00:1::1"]),
        // Another name that leads there.
        Says::Alias("inside.example", parsed(&["127.0.0.1"])),
        Says::Alias("elsewhere.example", Vec::new()),
        // One bad one far behind many good ones.
        Says::Addresses(many),
    ] {
        names.says("elsewhere.example", Says::addresses(&["127.0.0.1"]));
        names.says("hooks.example", says.clone());
        let attempt = send(&sender, &format!("http://hooks.example:{}/", private.port())).await;
        assert_eq!(attempt.fault, Some(AttemptFault::AddressNotAllowed), "{says:?}");
    }
    for url in ["http://127.0.0.1/", "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://localhost/"] {
        let attempt = send(&sender, url).await;
        assert_eq!(attempt.fault, Some(AttemptFault::AddressNotAllowed), "{url}");
    }
    assert!(noting.asked().is_empty() && private.connections() == 0);
}

#[tokio::test]
async fn exactly_the_judged_addresses_are_dialled_and_few_of_many() {
    let names = NameServer::start().await;
    let receiver = Receiver::plain(200).await;
    names.says("hooks.example", Says::addresses(&["2606:4700::1111", "93.184.215.14", "93.184.215.15"]));
    let noting = Noting { refuse: 2, ..Noting::leading_to(&receiver) };
    arrived(&send(&sender(noting.clone(), &strict(&names)), "http://hooks.example:8080/").await);
    let dialled = ["93.184.215.14:8080", "93.184.215.15:8080", "[2606:4700::1111]:8080"];
    assert_eq!(noting.asked(), dialled.map(|address| address.parse().unwrap()));
    // The receiver is told the name all the same.
    assert_eq!(receiver.asked()[0].headers["host"], "hooks.example:8080");

    let many: Vec<IpAddr> = (1..=70).map(|last| IpAddr::from([93, 184, 215, last])).collect();
    names.says("many.example", Says::Addresses(many));
    let noting = Noting { refuse: usize::MAX, ..Noting::default() };
    let attempt = send(&sender(noting.clone(), &strict(&names)), "http://many.example/").await;
    assert_eq!(attempt.fault, Some(AttemptFault::Connect));
    assert_eq!(noting.asked().len(), 8);
}

#[tokio::test]
async fn a_name_that_moves_is_judged_anew_at_each_connection_however_long_its_answer_is_good() {
    let names = NameServer::start().await;
    // Ends each connection after the answer.
    let receiver = Receiver::serve(None, |_| async {
        let mut response = answer(200, "");
        response.headers_mut().insert("connection", "close".parse().unwrap());
        response
    })
    .await;
    let noting = Noting::leading_to(&receiver);
    let sender = sender(noting.clone(), &strict(&names));
    for round in 1..=3 {
        names.says("hooks.example", Says::addresses(&["93.184.215.14"]));
        arrived(&send(&sender, "http://hooks.example/").await);
        assert_eq!((noting.asked().len(), receiver.connections()), (round, round));
        names.says("hooks.example", Says::addresses(&["127.0.0.1"]));
        let attempt = send(&sender, "http://hooks.example/").await;
        assert_eq!(attempt.fault, Some(AttemptFault::AddressNotAllowed));
        names.says("hooks.example", Says::Nothing);
        assert_eq!(send(&sender, "http://hooks.example/").await.fault, Some(AttemptFault::Dns));
        assert_eq!((noting.asked().len(), receiver.connections()), (round, round));
    }
}

#[tokio::test]
async fn a_connection_that_is_kept_asks_nobody_for_the_name() {
    let names = NameServer::start().await;
    let receiver = Receiver::plain(200).await;
    names.says("hooks.example", Says::addresses(&["127.0.0.1"]));
    let sender = sender(Tcp, &lax(&names));
    for _ in 0..5 {
        arrived(&send(&sender, &format!("http://hooks.example:{}/", receiver.port())).await);
    }
    assert_eq!((names.asked(), receiver.connections(), receiver.asked().len()), (2, 1, 5));
}

#[tokio::test]
async fn names_without_an_answer_are_faults_of_names() {
    let names = NameServer::start().await;
    let sender = sender(Tcp, &WebhookConfig { timeout_ms: 1_000, ..lax(&names) });
    names.says("trouble.example", Says::Trouble);
    names.says("empty.example", Says::Addresses(Vec::new()));
    names.says("silent.example", Says::Silence);
    for url in [
        "http://unknown.example/",
        "http://trouble.example/",
        "http://empty.example/",
        "http://silent.example/",
        "http://does-not-exist.invalid/",
        "http://a_b.example/",
    ] {
        assert_eq!(send(&sender, url).await.fault, Some(AttemptFault::Dns), "{url}");
    }
}

#[tokio::test]
async fn one_family_that_gets_no_answer_does_not_keep_from_the_other() {
    let names = NameServer::start().await;
    let receiver = Receiver::plain(200).await;
    names.says("hooks.example", Says::SilentFor(Says::V6, parsed(&["127.0.0.1"])));
    let sender = sender(Tcp, &WebhookConfig { timeout_ms: 2_000, ..lax(&names) });
    arrived(&send(&sender, &format!("http://hooks.example:{}/", receiver.port())).await);
}

#[tokio::test]
async fn the_machine_itself_has_its_name_without_a_name_server() {
    let receiver = Receiver::plain(200).await;
    let sender = sender(Tcp, &nameless());
    for host in ["localhost", "LOCALHOST", "localhost."] {
        arrived(&send(&sender, &format!("http://{host}:{}/", receiver.port())).await);
    }
}

#[tokio::test]
async fn names_that_hang_do_not_keep_another_waiting() {
    let names = NameServer::start().await;
    let receiver = Receiver::plain(200).await;
    names.says("hooks.example", Says::addresses(&["127.0.0.1"]));
    // They hang for longer than this test may take.
    let config = WebhookConfig { timeout_ms: 4 * 30_000, ..lax(&names) };
    let sender = sender(Tcp, &config);
    let mut hanging = tokio::task::JoinSet::new();
    for number in 0..600 {
        let (name, sender) = (format!("silent-{number}.example"), sender.clone());
        names.says(&name, Says::Silence);
        hanging.spawn(async move { send(&sender, &format!("http://{name}/")).await });
    }
    let both_families_of_each = async {
        while names.asked() < 1_200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(PATIENCE, both_families_of_each).await.unwrap();
    for _ in 0..20 {
        arrived(&send(&sender, &format!("http://hooks.example:{}/", receiver.port())).await);
    }
    assert!(hanging.try_join_next().is_none(), "none of them has ended");
}

#[tokio::test]
async fn a_server_that_says_nothing_costs_no_more_than_the_deadline() {
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let config = WebhookConfig { name_servers: Some(vec![silent.local_addr().unwrap()]), ..nameless() };
    let attempt = send(&sender(Tcp, &WebhookConfig { timeout_ms: 500, ..config }), "http://hooks.example/").await;
    assert_eq!(attempt.fault, Some(AttemptFault::Dns));
}

#[tokio::test]
async fn a_redirect_to_the_inside_is_not_followed() {
    let names = NameServer::start().await;
    let inside = Receiver::plain(200).await;
    let location = format!("http://{}/admin", inside.address);
    let receiver = Receiver::serve(None, move |number| {
        let mut response = answer([301, 302, 303, 307, 308][number], "");
        response.headers_mut().insert("location", location.parse().unwrap());
        response.headers_mut().insert("refresh", format!("0; url={location}").parse().unwrap());
        async { response }
    })
    .await;
    names.says("hooks.example", Says::addresses(&["93.184.215.14"]));
    let sender = sender(Noting::leading_to(&receiver), &strict(&names));
    for _ in 0..5 {
        assert_eq!(send(&sender, "http://hooks.example/").await.fault, Some(AttemptFault::Redirect));
    }
    assert_eq!((receiver.asked().len(), inside.connections()), (5, 0));
}

#[test]
fn addresses_that_look_like_another_are_not_written_down() {
    let rules = UrlRules { allow_http: true, allow_private_networks: false };
    for url in [
        "https://example.com@127.0.0.1/",
        "https://127.0.0.1:443@example.com/",
        "https://example.com:80@127.0.0.1:443/",
        "https://example.com:443:80/",
        "https://127.0.0.1./",
        "https://[::ffff:7f00:1]/",
        "https://[::7f00:1]/",
        "https://[64:ff9b::7f00:1]/",
        "https://127.0.0.1%2f@example.com/",
        "https://example.com%00.evil.example/",
        "https://127.0.0.1%09/",
        "https://①②⑦.0.0.1/",
        "https://017700000001/",
        "https://0x7f.0x0.0x0.0x1/",
        "https://example.com\t@127.0.0.1/",
        "https:\\\\127.0.0.1/",
    ] {
        assert!(rules.read(url).is_err(), "{url}");
    }
}

/// Says to a test that it is the one that was started with proxies in its environment.
const PROXIED: &str = "PAPERKEY_TEST_PROXIED";

#[tokio::test]
async fn proxies_of_the_environment_are_not_known() {
    let receiver = Receiver::plain(200).await;
    if std::env::var_os(PROXIED).is_some() {
        arrived(&send(&sender(Tcp, &nameless()), &format!("http://{}/", receiver.address)).await);
        return;
    }
    // The environment of a process cannot be changed while it runs, so this test is run again in another one.
    let proxy = Receiver::plain(502).await;
    let mut again = Command::new(std::env::current_exe().unwrap());
    again.args(["--exact", "deliver::tests::proxies_of_the_environment_are_not_known"]).env(PROXIED, "1");
    for name in ["http_proxy", "https_proxy", "all_proxy"] {
        let url = format!("http://{}/", proxy.address);
        again.env(name, &url).env(name.to_uppercase(), url);
    }
    let output = tokio::time::timeout(PATIENCE, again.output()).await.unwrap().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}");
    assert_eq!(proxy.connections(), 0);
}

#[tokio::test]
async fn a_certificate_of_the_extra_authority_is_trusted_in_every_version_of_http() {
    let names = NameServer::start().await;
    names.says("hooks.example", Says::addresses(&["127.0.0.1"]));
    let authority = Authority::new();
    let config = WebhookConfig { extra_ca: Some(authority.pem.clone().into_bytes()), ..lax(&names) };
    for (offered, spoken) in [
        (&["h2", "http/1.1"][..], Version::HTTP_2),
        // The receiver chooses.
        (&["http/1.1", "h2"][..], Version::HTTP_11),
        (&["h2"][..], Version::HTTP_2),
        (&["http/1.1"][..], Version::HTTP_11),
        (&[][..], Version::HTTP_11),
    ] {
        let tls = offering(authority.certified("hooks.example"), offered);
        let receiver = Receiver::serve(Some(tls), |_| async { answer(200, "thanks") }).await;
        let sender = sender(Tcp, &config);
        for _ in 0..3 {
            let attempt = send(&sender, &format!("https://hooks.example:{}/", receiver.port())).await;
            arrived(&attempt);
            assert_eq!(attempt.snippet.as_deref(), Some("thanks"));
        }
        let asked = receiver.asked();
        assert!(asked.iter().all(|asked| asked.version == spoken), "{offered:?}: {asked:?}");
        assert_eq!(asked[2].headers["x-paperkey-event"], "license.created");
        assert_eq!(asked[2].body, br#"{"id":"evt_1"}"#.as_slice());
        assert_eq!(receiver.connections(), 1, "{offered:?}");
    }
}

#[tokio::test]
async fn an_address_may_have_a_certificate_of_its_own() {
    let authority = Authority::new();
    let config = WebhookConfig { extra_ca: Some(authority.pem.clone().into_bytes()), ..nameless() };
    let receiver = Receiver::serve(Some(authority.certified("127.0.0.1")), |_| async { answer(200, "") }).await;
    arrived(&send(&sender(Tcp, &config), &format!("https://{}/", receiver.address)).await);
}

#[tokio::test]
async fn a_host_that_is_remembered_under_the_extra_authority_is_verified_each_time() {
    let names = NameServer::start().await;
    let authority = Authority::new();
    let config = WebhookConfig { extra_ca: Some(authority.pem.clone().into_bytes()), ..lax(&names) };
    let (good, stranger) = (authority.certified("hooks.example"), self_signed("hooks.example"));
    let good = Receiver::serve(Some(good), |_| async { answer(200, "") }).await;
    let stranger = Receiver::serve(Some(stranger), |_| async { answer(200, "") }).await;
    names.says("hooks.example", Says::addresses(&["127.0.0.1"]));
    let sender = sender(Tcp, &config);
    arrived(&send(&sender, &format!("https://hooks.example:{}/", good.port())).await);
    let attempt = send(&sender, &format!("https://hooks.example:{}/", stranger.port())).await;
    assert_eq!(attempt.fault, Some(AttemptFault::Tls));
    assert!(stranger.asked().is_empty());
}

#[tokio::test]
async fn a_certificate_that_is_not_good_is_a_fault_of_tls_and_nothing_is_sent() {
    let names = NameServer::start().await;
    names.says("hooks.example", Says::addresses(&["127.0.0.1"]));
    let (authority, stranger) = (Authority::new(), Authority::new());
    let trusting = WebhookConfig { extra_ca: Some(authority.pem.clone().into_bytes()), ..lax(&names) };
    for (what, config, tls) in [
        ("another's name", &trusting, authority.certified("other.example")),
        ("a wildcard above", &trusting, authority.certified("*.hooks.example")),
        ("expired", &trusting, authority.expired("hooks.example")),
        ("of an unknown authority", &trusting, stranger.certified("hooks.example")),
        ("its own authority", &trusting, self_signed("hooks.example")),
        ("none of the public ones", &lax(&names), authority.certified("hooks.example")),
    ] {
        let tls = offering(tls, &["h2", "http/1.1"]);
        let receiver = Receiver::serve(Some(tls), |_| async { answer(200, "") }).await;
        let attempt = send(&sender(Tcp, config), &format!("https://hooks.example:{}/", receiver.port())).await;
        assert_eq!(attempt.fault, Some(AttemptFault::Tls), "{what}");
        assert!(receiver.asked().is_empty() && receiver.connections() > 0, "{what}");
    }
    let plain = Receiver::plain(200).await;
    let attempt = send(&sender(Tcp, &trusting), &format!("https://hooks.example:{}/", plain.port())).await;
    assert_eq!(attempt.fault, Some(AttemptFault::Tls));
    let closing = Receiver::raw(|stream, _| async move { drop(stream) }).await;
    let attempt = send(&sender(Tcp, &trusting), &format!("https://hooks.example:{}/", closing.port())).await;
    assert_eq!(attempt.fault, Some(AttemptFault::Tls));
}

#[test]
fn extra_authorities_that_are_none_are_refused_with_a_sentence() {
    let key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    for pem in ["", "no PEM at all", key, broken, "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n"] {
        let config = WebhookConfig { extra_ca: Some(pem.as_bytes().to_vec()), ..nameless() };
        let refused = Sender::new(&config, Clock::system()).err().unwrap_or_else(|| panic!("{pem:?} was taken"));
        assert!(refused.to_string().starts_with("webhooks.ca_file "), "{refused}");
    }
}

#[tokio::test]
async fn a_greeting_that_never_ends_is_a_timeout() {
    let names = NameServer::start().await;
    names.says("hooks.example", Says::addresses(&["127.0.0.1"]));
    let silent = Receiver::raw(|stream, _| async move {
        let _held = stream;
        std::future::pending::<()>().await;
    })
    .await;
    let sender = sender(Tcp, &WebhookConfig { timeout_ms: 300, ..lax(&names) });
    for scheme in ["http", "https"] {
        let attempt = send(&sender, &format!("{scheme}://hooks.example:{}/", silent.port())).await;
        assert_eq!((attempt.fault, attempt.response_status), (Some(AttemptFault::Timeout), None));
    }
}

/// What speaks HTTP/2 with a sender that trusts it.
async fn over_http2<F, Fut>(timeout_ms: u64, answers: F) -> (Receiver, Sender, String)
where
    F: Fn(usize) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = receivers::Answer> + Send + 'static,
{
    let authority = Authority::new();
    let config = WebhookConfig { extra_ca: Some(authority.pem.clone().into_bytes()), timeout_ms, ..nameless() };
    let tls = offering(authority.certified("127.0.0.1"), &["h2"]);
    let receiver = Receiver::serve(Some(tls), answers).await;
    let url = format!("https://{}/", receiver.address);
    (receiver, sender(Tcp, &config), url)
}

#[tokio::test]
async fn after_a_timeout_over_http2_the_next_goes_over_a_new_connection() {
    let (receiver, sender, url) = over_http2(1_000, |number| async move {
        if number == 1 {
            std::future::pending::<()>().await;
        }
        answer(200, "")
    })
    .await;
    arrived(&send(&sender, &url).await);
    let before = receiver.connections();
    assert_eq!(send(&sender, &url).await.fault, Some(AttemptFault::Timeout));
    assert_eq!(receiver.connections(), before);
    arrived(&send(&sender, &url).await);
    assert_eq!(receiver.connections(), before + 1);
    assert!(receiver.asked().iter().all(|asked| asked.version == Version::HTTP_2));
}

#[tokio::test]
async fn a_receiver_that_falls_silent_on_the_way_is_left_for_a_new_connection() {
    // Encrypted bytes pass through a middle that stops passing them on, as a network does that has lost its way.
    let (receiver, sender, _) = over_http2(1_000, |_| async { answer(200, "") }).await;
    let behind = receiver.address;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let middle = Receiver::raw(move |mut near, number| {
        let mut stopped = stopped.clone();
        async move {
            let mut far = TcpStream::connect(behind).await.unwrap();
            // What comes later than the first passes.
            let lost = async {
                if number > 0 || stopped.wait_for(|stopped| *stopped).await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                () = lost => std::future::pending::<()>().await,
                _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            }
        }
    })
    .await;
    let url = format!("https://{}/", middle.address);
    arrived(&send(&sender, &url).await);
    stop.send(true).unwrap();
    assert_eq!(send(&sender, &url).await.fault, Some(AttemptFault::Timeout));
    arrived(&send(&sender, &url).await);
}

#[tokio::test]
async fn what_goes_to_one_receiver_at_once_shares_a_connection_over_http2() {
    let gate = Arc::new(tokio::sync::Semaphore::new(1));
    let held = Arc::clone(&gate);
    let (receiver, sender, url) = over_http2(30_000, move |_| {
        let held = Arc::clone(&held);
        async move {
            held.acquire().await.unwrap().forget();
            answer(200, "")
        }
    })
    .await;
    arrived(&send(&sender, &url).await);
    let before = receiver.connections();
    let mut sending = tokio::task::JoinSet::new();
    for _ in 0..5 {
        let (sender, url) = (sender.clone(), url.clone());
        sending.spawn(async move { send(&sender, &url).await });
    }
    while receiver.asked().len() < 6 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    gate.add_permits(5);
    while let Some(attempt) = sending.join_next().await {
        arrived(&attempt.unwrap());
    }
    assert_eq!(receiver.connections(), before);
}

#[tokio::test]
async fn a_head_without_measure_is_refused_in_every_version() {
    let large = || {
        let mut response = answer(200, "");
        for number in 0..40 {
            let name: http::HeaderName = format!("x-{number}").parse().unwrap();
            response.headers_mut().insert(name, "x".repeat(2_000).parse().unwrap());
        }
        response
    };
    let (_second, over_second, url_of_second) = over_http2(5_000, move |_| async move { large() }).await;
    let first = Receiver::serve(None, move |_| async move { large() }).await;
    let over_first = sender(Tcp, &nameless());
    for (sender, url) in [(over_second, url_of_second), (over_first, format!("http://{}/", first.address))] {
        assert_eq!(send(&sender, &url).await.fault, Some(AttemptFault::Other), "{url}");
    }
}

/// A body of so many pieces, each a while after the one before.
struct Trickle {
    pieces: usize,
    wait: Pin<Box<tokio::time::Sleep>>,
}

const A_WHILE: Duration = Duration::from_millis(20);

impl Body for Trickle {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.pieces == 0 {
            return Poll::Ready(None);
        }
        std::task::ready!(self.wait.as_mut().poll(context));
        self.pieces -= 1;
        self.wait.as_mut().reset(tokio::time::Instant::now() + A_WHILE);
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b"x")))))
    }
}

fn trickle(pieces: usize) -> receivers::Answer {
    Response::new(Trickle { pieces, wait: Box::pin(tokio::time::sleep(A_WHILE)) }.boxed())
}

#[tokio::test]
async fn a_body_that_trickles_is_cut_by_the_deadline_of_the_whole() {
    let (_second, over_second, url_of_second) = over_http2(400, |_| async { trickle(usize::MAX) }).await;
    let first = Receiver::serve(None, |_| async { trickle(usize::MAX) }).await;
    let over_first = sender(Tcp, &WebhookConfig { timeout_ms: 400, ..nameless() });
    for (sender, url) in [(over_second, url_of_second), (over_first, format!("http://{}/", first.address))] {
        let attempt = send(&sender, &url).await;
        assert_eq!((attempt.fault, attempt.response_status), (Some(AttemptFault::Timeout), Some(200)), "{url}");
        assert!(attempt.snippet.is_some_and(|snippet| snippet.bytes().all(|byte| byte == b'x')));
    }
    // One that ends in time is whole.
    let slow = Receiver::serve(None, |_| async { trickle(5) }).await;
    let attempt = send(&sender(Tcp, &nameless()), &format!("http://{}/", slow.address)).await;
    arrived(&attempt);
    assert_eq!(attempt.snippet.as_deref(), Some("xxxxx"));
}

#[tokio::test]
async fn an_answer_is_read_as_it_comes_and_never_unpacked() {
    // 16 MB of zeros, as gzip would begin to say it.
    let packed = Bytes::from_static(b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\x03\xed\xc1\x01");
    let receiver = Receiver::serve(None, move |_| {
        let mut response = answer(200, packed.clone());
        response.headers_mut().insert("content-encoding", "gzip".parse().unwrap());
        async { response }
    })
    .await;
    let attempt = send(&sender(Tcp, &nameless()), &format!("http://{}/", receiver.address)).await;
    arrived(&attempt);
    assert!(attempt.snippet.unwrap().contains('\u{8}'));
    assert!(!receiver.asked()[0].headers.contains_key("accept-encoding"));
}

#[tokio::test]
async fn words_before_the_answer_and_answers_without_a_body_are_understood() {
    let receiver = Receiver::raw(|mut stream, _| async move {
        while read_request(&mut stream).await.is_some() {
            say(&mut stream, "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n").await;
            say(&mut stream, "HTTP/1.1 204 No Content\r\n\r\n").await;
        }
    })
    .await;
    let sender = sender(Tcp, &nameless());
    for _ in 0..2 {
        let attempt = send(&sender, &format!("http://{}/", receiver.address)).await;
        assert_eq!((attempt.fault, attempt.response_status, attempt.snippet), (None, Some(204), None));
    }
    assert_eq!(receiver.connections(), 1);
    for nonsense in ["hello\r\n\r\n", "HTTP/1.1 99 Low\r\n\r\n", "HTTP/1.1 101 Switching Protocols\r\n\r\n", ""] {
        let receiver = Receiver::raw(move |mut stream, _| async move {
            read_request(&mut stream).await;
            say(&mut stream, nonsense).await;
        })
        .await;
        let attempt = send(&sender, &format!("http://{}/", receiver.address)).await;
        assert!(attempt.fault.is_some(), "{nonsense:?}: {attempt:?}");
    }
}

#[tokio::test]
async fn a_connection_that_was_kept_and_is_gone_is_no_fault_of_the_receiver() {
    // Answers one request, and hangs up on the next over the same connection, as one does whose patience just ended.
    let receiver = Receiver::raw(|mut stream, _| async move {
        read_request(&mut stream).await;
        say(&mut stream, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        read_request(&mut stream).await;
    })
    .await;
    let sender = sender(Tcp, &nameless());
    for round in 1..=4 {
        arrived(&send(&sender, &format!("http://{}/", receiver.address)).await);
        assert_eq!(receiver.connections(), round);
    }
    // One that always hangs up is one that fails.
    let rude = Receiver::raw(|mut stream, _| async move {
        read_request(&mut stream).await;
    })
    .await;
    assert_eq!(send(&sender, &format!("http://{}/", rude.address)).await.fault, Some(AttemptFault::Other));
    assert_eq!(rude.connections(), 1);
}

#[tokio::test]
async fn both_secrets_sign_until_the_time_of_the_first_is_over_at_the_moment_of_sending() {
    let receiver = Receiver::plain(200).await;
    let (clock, hand) = Clock::manual(1_798_675_200_000);
    let sender = Sender::over(Tcp, &nameless(), clock).unwrap();
    let (old, new) = (Secret::new("whsec_b2xk"), Secret::new("whsec_bmV3"));
    let signatures = Signatures::of(&new).unwrap().with_previous(&old, 1_798_675_200_000 + 1_000);
    let url = format!("http://{}/", receiver.address);
    for _ in 0..2 {
        arrived(&send_signed(&sender, &url, &signatures).await);
        hand.advance_ms(1_000);
    }
    let [during, after] = receiver.asked().try_into().unwrap();
    let header = |asked: &receivers::Asked, name: &str| asked.headers[name].to_str().unwrap().to_owned();
    let expected = |secret: &Secret, asked: &receivers::Asked| {
        let signatures = Signatures::of(secret).unwrap();
        let timestamp: i64 = header(asked, "webhook-timestamp").parse().unwrap();
        (signatures.own(&asked.body, 0), signatures.standard("dlv_1", timestamp, &asked.body, 0))
    };
    let (own, both) = (header(&during, "x-paperkey-signature"), header(&during, "webhook-signature"));
    let [of_old, of_new] = [expected(&old, &during), expected(&new, &during)];
    assert_eq!((own, both), (of_old.0, format!("{} {}", of_new.1, of_old.1)));
    let after = (header(&after, "x-paperkey-signature"), header(&after, "webhook-signature"), after);
    assert_eq!((after.0, after.1), expected(&new, &after.2));
}
