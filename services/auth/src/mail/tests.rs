//! Against a mail server of our own on a socket, and against the folder.

use std::{os::unix::fs::PermissionsExt as _, path::Path};

use base64::Engine as _;
use paperkey_kit::{
    cache::Epochs,
    clock::{Clock, ManualClock},
    db::Database,
    secrets::Keyring,
    testing::TestDb,
};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
};

use super::*;
use crate::{
    domain::{account::Email, letter::Letter},
    store::{Act, NewAccount, PasswordHash, Store},
};

const START_MS: i64 = 1_790_000_000_000;
const FROM: &str = "Paperkey <paperkey@example.com>";

/// A mail as a server took it.
#[derive(Debug)]
struct Taken {
    hello: String,
    sender: String,
    receiver: String,
    data: String,
}

/// A mail server: plain SMTP, as RFC 5321 has it, for one mail a connection.
struct Server {
    url: Secret,
    taken: mpsc::UnboundedReceiver<Taken>,
    _running: JoinHandle<()>,
}

impl Server {
    /// Refuses the first conversations, each at `RCPT` with that answer.
    async fn refusing(refusals: &'static [&'static str]) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = Secret::new(format!("smtp://{}", listener.local_addr().unwrap()));
        let (sender, taken) = mpsc::unbounded_channel();
        let running = tokio::spawn(async move {
            let mut refusals = refusals.iter();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let refusal = refusals.next().copied();
                let sender = sender.clone();
                tokio::spawn(async move {
                    if let Some(mail) = converse(stream, refusal).await {
                        sender.send(mail).unwrap();
                    }
                });
            }
        });
        Self { url, taken, _running: running }
    }

    fn all_taken(&mut self) -> Vec<Taken> {
        std::iter::from_fn(|| self.taken.try_recv().ok()).collect()
    }
}

async fn converse(stream: TcpStream, refusal: Option<&str>) -> Option<Taken> {
    let mut stream = BufReader::new(stream);
    let mut taken = Taken { hello: String::new(), sender: String::new(), receiver: String::new(), data: String::new() };
    stream.write_all(b"220 mail.example.com ready\r\n").await.ok()?;
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line).await.ok()? == 0 {
            return None;
        }
        let answer = match line.trim_end().split_once([' ', ':']) {
            Some(("EHLO", name)) => {
                name.clone_into(&mut taken.hello);
                "250-mail.example.com\r\n250 8BITMIME"
            }
            Some(("MAIL", sender)) => {
                sender.clone_into(&mut taken.sender);
                "250 OK"
            }
            Some(("RCPT", receiver)) => {
                receiver.clone_into(&mut taken.receiver);
                refusal.unwrap_or("250 OK")
            }
            _ if line.starts_with("DATA") => {
                stream.write_all(b"354 go on\r\n").await.ok()?;
                loop {
                    let mut line = String::new();
                    stream.read_line(&mut line).await.ok()?;
                    if line == ".\r\n" {
                        break;
                    }
                    taken.data.push_str(line.strip_prefix('.').unwrap_or(&line));
                }
                stream.write_all(b"250 taken\r\n").await.ok()?;
                return Some(taken);
            }
            _ if line.starts_with("QUIT") => "221 bye",
            _ => "502 what?",
        };
        stream.write_all(format!("{answer}\r\n").as_bytes()).await.ok()?;
    }
}

struct Bench {
    store: Store,
    database: Database,
    clock: Clock,
    hand: ManualClock,
    _db: TestDb,
}

impl Bench {
    async fn new() -> Self {
        Self::with(&Keyring::for_tests()).await
    }

    async fn with(keys: &Keyring) -> Self {
        let db = TestDb::sqlite();
        let (clock, hand) = Clock::manual(START_MS);
        let mut options = db.options();
        options.clock = clock.clone();
        let database = Database::open(options).await.unwrap();
        database.migrate_up::<paperkey_migrations::auth::Migrator>().await.unwrap();
        let store = Store::new(database.clone(), keys, std::sync::Arc::new(Epochs::default()));
        let new = NewAccount {
            user_id: "usr_1".to_owned(),
            email: email(),
            name: None,
            password_hash: PasswordHash(String::new()),
            team_id: "team_1".to_owned(),
            team_name: "Engines".to_owned(),
            keys: Vec::new(),
        };
        store.register(new, Act::by_operator("test")).await.unwrap();
        Self { store, database, clock, hand, _db: db }
    }

    /// Leaves a letter: that the password was changed.
    async fn leave(&self) {
        let act = Act::by_operator("test");
        self.store.reset_password(email(), PasswordHash(String::new()), act).await.unwrap();
    }

    /// Leaves a letter with a link.
    async fn leave_a_link(&self) {
        let (ticket, link) = (Secret::new("ticket"), Secret::new("https://paperkey.example.com/app/x?token=ticket"));
        let act = Act::by_operator("test");
        self.store.forgot_password("ada@example.com".to_owned(), &ticket, link, act).await.unwrap();
    }

    async fn round(&self, mail: &Mail) -> usize {
        carrier::round(&self.store, mail, &self.clock).await.unwrap()
    }
}

fn email() -> Email {
    Email::parse("Ada@example.com").unwrap()
}

fn over(server: &Server) -> Mail {
    Mail::new(Some(&server.url), FROM, PathBuf::new()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mail_goes_out_once_over_smtp() {
    let bench = Bench::new().await;
    let mut server = Server::refusing(&[]).await;
    let mail = over(&server);
    assert!(!mail.stays_here());
    bench.leave().await;
    assert_eq!(bench.round(&mail).await, 1);
    assert_eq!(bench.round(&mail).await, 0, "it is gone");
    let taken = server.all_taken();
    assert_eq!(taken.len(), 1);
    let Taken { hello, sender, receiver, data } = &taken[0];
    assert_eq!(hello, "example.com");
    assert!(sender.contains("<paperkey@example.com>") && receiver.contains("<Ada@example.com>"), "{taken:?}");
    for said in [
        "From: Paperkey <paperkey@example.com>\r\n",
        "To: Ada@example.com\r\n",
        "Subject: Your Paperkey password was changed\r\n",
        "Message-ID: <mail_",
        "Date: Mon, 21 Sep 2026 14:13:20 +0000\r\n",
        "Content-Type: text/plain; charset=utf-8\r\n",
        "on 21 September 2026, 14:13 UTC",
    ] {
        assert!(data.contains(said), "{said:?}: {data}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_refuses_at_first_gets_it_later() {
    let bench = Bench::new().await;
    let mut server = Server::refusing(&["451 try later <Ada@example.com>", "450 busy"]).await;
    let mail = over(&server);
    bench.leave().await;
    assert_eq!(bench.round(&mail).await, 1);
    assert_eq!(bench.round(&mail).await, 0, "not before its time");
    bench.hand.advance_ms(29_999);
    assert_eq!(bench.round(&mail).await, 0);
    bench.hand.advance_ms(1);
    assert_eq!(bench.round(&mail).await, 1);
    bench.hand.advance_ms(59_999);
    assert_eq!(bench.round(&mail).await, 0, "the second wait is twice as long");
    assert!(server.all_taken().is_empty());
    bench.hand.advance_ms(1);
    assert_eq!(bench.round(&mail).await, 1);
    assert_eq!(server.all_taken().len(), 1);
    assert_eq!(bench.round(&mail).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_processes_one_sends_a_mail() {
    let bench = Bench::new().await;
    let mut server = Server::refusing(&[]).await;
    let mail = over(&server);
    for _ in 0..5 {
        bench.leave().await;
    }
    let rounds: Vec<_> = (0..8)
        .map(|_| {
            let (store, mail, clock) = (bench.store.clone(), mail.clone(), bench.clock.clone());
            tokio::spawn(async move { carrier::round(&store, &mail, &clock).await.unwrap() })
        })
        .collect();
    let mut sent = 0;
    for round in rounds {
        sent += round.await.unwrap();
    }
    assert_eq!((sent, server.all_taken().len()), (5, 5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mail_is_given_up_after_a_day_and_a_link_when_it_has_ended() {
    let bench = Bench::new().await;
    // Nobody listens there.
    let nowhere = Secret::new("smtp://127.0.0.1:1");
    let mail = Mail::new(Some(&nowhere), FROM, PathBuf::new()).unwrap();
    bench.leave().await;
    bench.leave_a_link().await;
    let (mut tries, mut minutes) = (Vec::new(), 0);
    while minutes <= 48 * 60 {
        for _ in 0..bench.round(&mail).await {
            tries.push(minutes);
        }
        bench.hand.advance_ms(60_000);
        minutes += 1;
    }
    // Both, and from the thirtieth minute the one without a link, at most four hours apart and for less than a day.
    assert_eq!(tries, [0, 0, 1, 1, 2, 2, 4, 4, 8, 8, 16, 16, 32, 64, 128, 256, 496, 736, 976, 1_216]);
    assert_eq!(bench.round(&mail).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_that_has_ended_is_not_sent() {
    let bench = Bench::new().await;
    let mut server = Server::refusing(&[]).await;
    bench.leave_a_link().await;
    bench.hand.advance_ms(30 * 60_000 - 1);
    let held = bench.store.claim_mails(8, Duration::from_millis(1)).await.unwrap();
    assert_eq!(held.len(), 1);
    bench.hand.advance_ms(1);
    assert_eq!(bench.round(&over(&server)).await, 1);
    assert!(server.all_taken().is_empty());
    bench.hand.advance_ms(24 * 60 * 60_000);
    assert_eq!(bench.round(&over(&server)).await, 0, "it is forgotten");
}

/// Keys whose master keys are of these bytes, the first of which seals.
fn keys(masters: [u8; 2]) -> Keyring {
    let key = |byte: u8| Secret::new(base64::engine::general_purpose::STANDARD.encode([byte; 32]));
    let keys = Keyring::with_previous_masters(&key(masters[0]), &[key(masters[1])], &key(101), &key(102));
    keys.unwrap().with_derived_kept_keys()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mail_under_a_key_that_is_not_known_waits_for_one_who_knows_it() {
    let bench = Bench::with(&keys([2, 1])).await;
    let mut server = Server::refusing(&[]).await;
    bench.leave().await;
    let store = Store::new(bench.database.clone(), &keys([1, 3]), std::sync::Arc::new(Epochs::default()));
    for _ in 0..3 {
        assert_eq!(carrier::round(&store, &over(&server), &bench.clock).await.unwrap(), 1);
        bench.hand.advance_ms(30_000);
    }
    assert!(server.all_taken().is_empty());
    assert_eq!(bench.round(&over(&server)).await, 1);
    assert_eq!(server.all_taken().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_process_held_that_died_is_sent_by_another() {
    let bench = Bench::new().await;
    let mut server = Server::refusing(&[]).await;
    bench.leave().await;
    let held = bench.store.claim_mails(8, Duration::from_mins(3)).await.unwrap();
    assert_eq!(held.len(), 1);
    assert_eq!(bench.round(&over(&server)).await, 0);
    bench.hand.advance_ms(3 * 60_000);
    assert_eq!(bench.round(&over(&server)).await, 1);
    assert_eq!(server.all_taken().len(), 1);
    // Who wakes up late changes nothing any more.
    bench.leave().await;
    bench.store.settle_mail(&held[0], None).await.unwrap();
    assert_eq!(bench.round(&over(&server)).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_server_mails_are_files_that_only_their_owner_reads() {
    let bench = Bench::new().await;
    let data = tempfile::TempDir::new().unwrap();
    let folder = data.path().join("mail");
    let mail = Mail::new(None, FROM, folder.clone()).unwrap();
    assert!(mail.stays_here());
    bench.leave().await;
    bench.leave_a_link().await;
    assert_eq!(bench.round(&mail).await, 2);
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&folder), 0o700);
    let files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 2);
    let mut links = 0;
    for file in files {
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("mail_") && file.extension().is_some_and(|end| end == "eml"), "{name}");
        assert_eq!(mode(&file), 0o600);
        links += usize::from(
            std::fs::read_to_string(&file).unwrap().contains("\r\nhttps://paperkey.example.com/app/x?token=ticket\r\n"),
        );
    }
    assert_eq!(links, 1);
}

#[test]
fn a_name_puts_no_header_and_no_line_into_a_mail() {
    let mail = Mail::new(None, FROM, PathBuf::new()).unwrap();
    for nasty in
        ["A\r\nBcc: eve@example.com", "A\nBcc: eve@example.com", "A\r\n\r\nBcc: x", "Ä\r\n.\r\nQUIT", "A\u{2028}Bcc: x"]
    {
        let letter = Letter::Invitation {
            to: "bob@example.com".to_owned(),
            team: nasty.to_owned(),
            inviter: nasty.to_owned(),
            link: (&Secret::new("https://paperkey.example.com")).into(),
            expires_at_ms: START_MS,
        };
        let message = mail.message("mail_1", "bob@example.com", letter.text(), START_MS).unwrap();
        let written = String::from_utf8(message.formatted()).unwrap();
        assert!(!written.lines().any(|line| line.starts_with("Bcc") || line == "." || line == "QUIT"), "{written}");
        let (head, _) = written.split_once("\r\n\r\n").unwrap();
        let names: Vec<_> =
            head.lines().filter(|line| !line.starts_with(' ')).filter_map(|line| line.split(':').next()).collect();
        assert_eq!(
            names,
            ["From", "To", "Subject", "Date", "Message-ID", "Content-Type", "Content-Transfer-Encoding"],
            "{head}"
        );
    }
    for nasty in
        ["bob@example.com\r\nBcc: eve@example.com", "bob@example.com, eve@example.com", "Bob <bob@example.com>", ""]
    {
        assert!(!is_mailable(nasty));
        let text = Text { subject: "s".to_owned(), body: "b".to_owned() };
        assert_eq!(mail.message("mail_1", nasty, text, START_MS).unwrap_err(), NotSent::Address);
    }
}

#[test]
fn what_could_not_work_is_refused_at_start_and_prints_no_password() {
    for good in
        ["smtp://localhost", "smtps://u:p%40ss@mail.example.com", "smtp://u:p@mail.example.com:587?tls=required"]
    {
        assert!(Mail::new(Some(&Secret::new(good)), FROM, PathBuf::new()).is_ok(), "{good}");
    }
    for bad in
        ["", "hunter2", "https://u:hunter2@mail.example.com", "smtp://u:hunter2@host?tls=maybe", "smtp://h:hunter2"]
    {
        let error = Mail::new(Some(&Secret::new(bad)), FROM, PathBuf::new()).unwrap_err();
        assert!(error.to_string().starts_with("mail.smtp_url must be") && !error.to_string().contains("hunter2"));
    }
    for bad in ["", "nobody", "a@b\r\nBcc: eve@example.com", "a@b, c@d"] {
        assert!(matches!(Mail::new(None, bad, PathBuf::new()), Err(BadMail::From)), "{bad:?}");
    }
    let mail = Mail::new(Some(&Secret::new("smtps://u:hunter2@mail.example.com")), FROM, PathBuf::new()).unwrap();
    assert_eq!(format!("{mail:?}"), "Mail { way: \"SMTP\", .. }");
}
