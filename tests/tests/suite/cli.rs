//! The command line: what it refuses and how it says so, what an operator does with it, how a process ends.

use std::{
    fs,
    net::TcpListener,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use paperkey_proto::errors::v1::Reason;
use paperkey_tests::{
    Account, Installation, Settings, eventually,
    http1::Connection,
    on_both_kinds,
    people::{new_email, text},
    process::{self, Ended, Line, Process, Stream},
    within,
};
use serde_json::{Value, json};
use tempfile::TempDir;

on_both_kinds! {
    an_operator_makes_accounts_and_resets_passwords_while_it_runs,
    an_operator_sets_tiers_and_rotates_the_system_key_while_it_runs,
    sigterm_finishes_what_is_in_flight_and_exits_0,
    the_audit_log_is_verified_while_it_runs_and_after,
}

/// How long a start that cannot succeed may take to say so.
const SECONDS: Duration = Duration::from_secs(10);

/// Runs the binary in an empty folder.
async fn paperkey(arguments: &[&str], environment: &[(&str, &str)]) -> (Ended, TempDir) {
    let folder = TempDir::new().unwrap();
    (paperkey_in(folder.path(), arguments, environment).await, folder)
}

async fn paperkey_in(folder: &Path, arguments: &[&str], environment: &[(&str, &str)]) -> Ended {
    let environment: Vec<_> =
        environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    process::run(process::command(arguments, &environment, folder), "").await
}

/// A start that must fail soon, with one sentence that says what to do.
async fn fails(arguments: &[&str], environment: &[(&str, &str)], says: &[&str]) {
    let began = Instant::now();
    let (ended, _folder) = paperkey(arguments, environment).await;
    fails_with_one_sentence(&ended, says);
    assert!(began.elapsed() < SECONDS, "{arguments:?} took {:?} to fail", began.elapsed());
}

#[track_caller]
fn fails_with_one_sentence(ended: &Ended, says: &[&str]) {
    let said = ended.failed();
    assert!(!said.contains("panicked"), "{said}");
    let message = said.split("paperkey: ").last().unwrap_or_default();
    for says in says {
        assert!(message.contains(says), "{says:?} is not said: {said}");
    }
    assert_eq!(said.matches("paperkey: ").count(), 1, "it is said once: {said}");
    assert_eq!(message.lines().count(), 1, "it is one sentence: {said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_configuration_is_printed_without_its_secrets() {
    let key = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3I=";
    let environment = [
        ("PAPERKEY__DATABASE__URL", "postgres://paperkey:hunter2@db/paperkey"),
        ("PAPERKEY__SECRETS__MASTER_KEY", key),
        ("PAPERKEY__SECRETS__PEPPER", key),
        ("PAPERKEY__SECRETS__SIGNING_KEY", key),
        ("PAPERKEY__SERVER__SHUTDOWN_GRACE_MS", "1234"),
    ];
    let (ended, _folder) = paperkey(&["config", "print"], &environment).await;
    let printed = ended.succeeded();
    assert!(!printed.contains("hunter2") && !printed.contains(key), "{printed}");
    assert_eq!(printed.matches("redacted").count(), 4, "{printed}");
    assert!(printed.contains("shutdown_grace_ms = 1234"), "{printed}");
    assert!(printed.contains("[server]") && printed.contains("[webhooks]"), "{printed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_problem_of_a_configuration_is_reported_at_once() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("paperkey.toml");
    fs::write(&file, "[server]\nlisten = \"hunter2\"\nlisen = 1\n[webhooks]\ntimeout_ms = 1\n[teleport]\nx = 1\n")
        .unwrap();
    let arguments = ["config", "check", "--config", file.to_str().unwrap()];
    let environment = [("PAPERKEY__TELEMETRY__LOG", "loud"), ("PAPERKEY__NONSENSE", "1")];
    let ended = paperkey_in(folder.path(), &arguments, &environment).await;
    let said = ended.failed();
    for problem in ["server.listen", "server.lisen", "webhooks.timeout_ms", "teleport", "telemetry.log", "nonsense"] {
        assert!(said.contains(problem), "{problem} is not reported: {said}");
    }
    assert!(!said.contains("hunter2"), "no value is repeated: {said}");

    fs::write(&file, "[server]\nlisten = \"127.0.0.1:0\"\n").unwrap();
    paperkey_in(folder.path(), &arguments, &[]).await.succeeded();
    fs::write(&file, "[server\n").unwrap();
    paperkey_in(folder.path(), &arguments, &[]).await.failed();
    paperkey_in(folder.path(), &["config", "check", "--config", "missing.toml"], &[]).await.failed();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_cannot_succeed_fails_within_seconds_and_says_what_to_do() {
    let holder = TcpListener::bind("127.0.0.1:0").unwrap();
    let busy = holder.local_addr().unwrap().to_string();
    fails(&["serve", "--listen", &busy, "--ops-listen", "127.0.0.1:0"], &[], &[&busy, "another process has it"]).await;
    fails(&["serve", "--listen", "127.0.0.1:0", "--ops-listen", &busy], &[], &[&busy, "another process has it"]).await;
    fails(&["serve", "--listen", "192.0.2.1:0", "--ops-listen", "127.0.0.1:0"], &[], &["192.0.2.1"]).await;
    drop(holder);

    let on = |listen: &'static str| ["serve", "--listen", listen, "--ops-listen", "127.0.0.1:0"];
    fails(&on("127.0.0.1:0"), &[("PAPERKEY__SERVER__NONSENSE", "1")], &["server.nonsense is unknown"]).await;
    fails(&on("127.0.0.1:0"), &[("PAPERKEY__DATABASE__URL", "mysql://db/paperkey")], &["database.url must begin"])
        .await;
    let key = "c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3I=";
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let url = format!("postgres://paperkey:hunter2@127.0.0.1:{nobody}/paperkey");
    let unreachable = [
        ("PAPERKEY__DATABASE__URL", url.as_str()),
        ("PAPERKEY__SECRETS__MASTER_KEY", key),
        ("PAPERKEY__SECRETS__PEPPER", key),
        ("PAPERKEY__SECRETS__SIGNING_KEY", key),
    ];
    fails(&on("127.0.0.1:0"), &unreachable, &["database"]).await;
    let (ended, _folder) = paperkey(&on("127.0.0.1:0"), &unreachable).await;
    assert!(!ended.failed().contains("hunter2"), "{}", ended.err);
    fails(&on("127.0.0.1:0"), &unreachable[..1], &["secrets.master_key"]).await;
    let but_one = [
        ("PAPERKEY__SERVICES__AUTH", "http://127.0.0.1:9"),
        ("PAPERKEY__SERVICES__CATALOG", "http://127.0.0.1:9"),
        ("PAPERKEY__SERVICES__LICENSING", "http://127.0.0.1:9"),
    ];
    let gateway = ["gateway", "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"];
    fails(&gateway, &but_one, &["services.webhook is missing"]).await;
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("a file");
    fs::write(&file, "").unwrap();
    let arguments = ["serve", "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0", "--data", "a file"];
    fails_with_one_sentence(&paperkey_in(folder.path(), &arguments, &[]).await, &["a file"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_schema_is_refused_with_what_to_do() {
    let Some(mut install) = Installation::fleet().await else { return };
    install.kill("licensing");
    install.command(&["migrate", "down", "licensing"], "").await.succeeded();
    let status = install.command(&["migrate", "status"], "").await;
    assert!(status.succeeded().lines().any(|line| line.starts_with("licensing: ") && line.ends_with(" pending")));
    let began = Instant::now();
    let wrote = install.start("licensing").await.unwrap_err();
    assert!(began.elapsed() < SECONDS, "it took {:?} to fail", began.elapsed());
    assert!(wrote.contains("paperkey migrate up"), "{wrote}");
    install.command(&["migrate", "up"], "").await.succeeded();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_data_folder_has_one_owner() {
    let mut install = Installation::all_in_one().await;
    let second = || install.prepared(&["serve", "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"]);
    let began = Instant::now();
    let ended = process::run(second(), "").await;
    fails_with_one_sentence(&ended, &["another process", "--data"]);
    assert!(began.elapsed() < SECONDS);
    install.register().await;

    // The lock ends with the process, however that ends.
    install.kill("serve");
    install.start("serve").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_data_folder_and_its_secrets_are_their_owners_alone() {
    let install = Installation::all_in_one().await;
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let data = install.data();
    assert_eq!(mode(&data), 0o700);
    assert_eq!(mode(&data.join("secrets")), 0o700);
    let secrets: Vec<_> = fs::read_dir(data.join("secrets")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(secrets.len() >= 3, "{secrets:?}");
    for path in secrets {
        assert_eq!(mode(&path), 0o600, "{}", path.display());
    }
    let kept = fs::read_to_string(data.join("secrets").join("system.key")).unwrap();
    assert_eq!(kept.trim(), install.system_key().await);
    assert!(kept.starts_with("po_sk_"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_start_prints_a_curl_that_works_when_pasted() {
    let mut install = Installation::all_in_one().await;
    let wrote = |process: &Process| -> String {
        process.lines().into_iter().filter(|line| line.stream == Stream::Out).map(|line| line.text + "\n").collect()
    };
    let process = install.process("serve");
    let ends = |line: &Line| (line.stream == Stream::Out && line.text.contains("-d '")).then_some(());
    process.line(ends).await.unwrap();
    let out = wrote(process);
    assert!(out.contains("/app/"), "it says where the dashboard is: {out}");
    let start = out.find("curl ").expect("it prints a curl");
    let end = start + out[start..].find("}'").expect("the curl has a body") + 2;
    let pasted = &out[start..end];
    let account = if Command::new("curl").arg("--version").output().is_ok() {
        let shell = Command::new("sh").args(["-c", &format!("{pasted} --silent --show-error")]).output().unwrap();
        assert!(shell.status.success(), "{pasted}: {}", String::from_utf8_lossy(&shell.stderr));
        serde_json::from_slice(&shell.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&shell.stdout)))
    } else {
        let body = &pasted[pasted.find("-d '").unwrap() + 4..pasted.len() - 1];
        assert!(pasted.contains(&format!("-X POST {}/auth/register ", install.url())), "{pasted}");
        install.api().post("/auth/register", serde_json::from_str::<Value>(body).unwrap()).await.json
    };
    let token = text(&account, "/token");
    let me = install.api().as_account(&token).get("/auth/me").await;
    assert_eq!(me.gives(200)["user"]["email"], account["user"]["email"]);

    install.kill("serve");
    install.start("serve").await.unwrap();
    let process = install.process("serve");
    process.line(|line| line.text.contains("curl").then_some(())).await.unwrap();
    let out = wrote(process);
    assert!(!out.contains("/auth/register"), "only the first start asks for a first account: {out}");
}

async fn an_operator_makes_accounts_and_resets_passwords_while_it_runs(install: Installation) {
    let (api, email) = (install.api(), new_email());
    let made = install.command(&["admin", "create-account", &email, "--name", "Grace"], "first password\n").await;
    assert!(made.succeeded().contains("team_"), "{made:?}");
    let login = async |password: &str| api.post("/auth/login", json!({"email": email, "password": password})).await;
    let session = login("first password").await;
    assert_eq!(session.gives(200)["user"]["name"], "Grace");
    let session = api.as_account(&text(&session.json, "/token"));
    assert_eq!(session.get("/auth/me").await.gives(200)["teams"][0]["role"], "owner");
    let again = install.command(&["admin", "create-account", &email], "first password\n").await;
    assert!(again.failed().contains("exists"), "{again:?}");
    let short = install.command(&["admin", "create-account", &new_email()], "short\n").await;
    assert!(short.failed().contains("8 characters"), "{short:?}");
    install.command(&["admin", "create-account", &new_email()], "").await.failed();

    install.command(&["admin", "reset-password", &email], "second password\n").await.succeeded();
    within(Duration::from_secs(1), "the old session is refused", || async {
        (session.get("/auth/me").await.status == 401).then_some(())
    })
    .await;
    session.get("/auth/me").await.refused(Reason::InvalidCredentials);
    login("first password").await.refused(Reason::InvalidCredentials);
    login("second password").await.gives(200);
    install.command(&["admin", "reset-password", &new_email()], "second password\n").await.failed();
}

async fn an_operator_sets_tiers_and_rotates_the_system_key_while_it_runs(install: Installation) {
    let owner = install.register().await;
    assert_eq!(owner.get("/auth/me").await.gives(200)["teams"][0]["tier"], "free");
    install.command(&["admin", "set-tier", &owner.team_id, "builder"], "").await.succeeded();
    eventually("the tier is known", || async {
        (owner.get("/auth/me").await.gives(200)["teams"][0]["tier"] == "builder").then_some(())
    })
    .await;
    install.command(&["admin", "set-tier", &owner.team_id, "nonsense"], "").await.failed();
    install.command(&["admin", "set-tier", "team_00000000000000000000000000", "pro"], "").await.failed();

    let key = install.system_key().await;
    let old = install.api().with_key(&key);
    old.get("/v1/status").await.gives(200);
    let rotated = install.command(&["admin", "system-key", "--rotate"], "").await.succeeded().to_owned();
    assert_ne!(rotated, key);
    let new = install.api().with_key(&rotated);
    assert_eq!(new.get("/api/v1/me").await.gives(200)["status"], "active");
    within(Duration::from_secs(1), "the old system key tells of its end", || async {
        old.get("/v1/status").await.header("paperkey-key-expires").is_some().then_some(())
    })
    .await;
    let newest = install.command(&["admin", "system-key", "--rotate", "--now"], "").await.succeeded().to_owned();
    install.api().with_key(&newest).get("/v1/status").await.gives(200);
    for ended in [old, new] {
        within(Duration::from_secs(1), "the system keys before are refused", || async {
            (ended.get("/v1/status").await.status == 401).then_some(())
        })
        .await;
    }
    install.command(&["admin", "system-key", "--now"], "").await.failed();
}

async fn the_audit_log_is_verified_while_it_runs_and_after(mut install: Installation) {
    let owner = install.register().await;
    let logs = format!("/teams/{}/audit-logs?method=AuthService/Register", owner.team_id);
    eventually("the registration is in the log", || async {
        (owner.get(&logs).await.gives(200)["entries"].as_array().is_some_and(|entries| entries.len() == 1))
            .then_some(())
    })
    .await;
    let verify = async |install: &Installation| install.command(&["audit", "verify"], "").await;
    eventually("it is chained", || async {
        let verdict = verify(&install).await;
        let said = verdict.succeeded();
        assert!(said.starts_with("the audit log is whole: "), "{said}");
        (!said.contains(" 0 chained blocks")).then_some(())
    })
    .await;
    let head = install.data().join("audit-head");
    if !head.exists() {
        assert!(verify(&install).await.succeeded().contains("run this where the auth service runs"));
        return;
    }
    install.process("serve").terminate().await;
    verify(&install).await.succeeded();
    fs::remove_file(head).unwrap();
    fails_with_one_sentence(&verify(&install).await, &["the audit log is not whole", "audit-head is gone"]);
}

/// A call whose body the server waits for: it has said so.
async fn in_flight(install: &Installation, owner: &Account, length: usize) -> Connection {
    let mut connection = Connection::open(&install.url()).await;
    let head = format!(
        "POST /products HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {}\r\nExpect: 100-continue\r\n\
         Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n",
        owner.token
    );
    connection.write(head).await;
    assert_eq!(connection.answer().await.expect("the server asks for the body").status, 100);
    connection
}

async fn sigterm_finishes_what_is_in_flight_and_exits_0(mut install: Installation) {
    let owner = install.register().await;
    let name = install.gateway();
    let body = json!({"name": "In flight"}).to_string();
    let mut connection = in_flight(&install, &owner, body.len()).await;
    let (idle, process) = (install.api(), install.process(name));
    process.signal("TERM");
    process.line(|line| line.text.contains("shutting down").then_some(())).await.unwrap();
    eventually("nothing new is accepted", || async { idle.try_get("/v1/status").await.is_err().then_some(()) }).await;
    let process = install.process(name);
    assert!(process.is_running(), "it waits for what is in flight");
    connection.write(body).await;
    let product = text(connection.answer().await.expect("what is in flight is answered").gives(201), "/id");
    let status = process.ended().await;
    assert_eq!(status.code(), Some(0));

    install.kill(name);
    install.start(name).await.unwrap();
    owner.at(&install.api()).get(&format!("/products/{product}")).await.gives(200);
    for name in install.names() {
        let (status, took) = install.process(&name).terminate().await;
        assert_eq!(status.code(), Some(0), "{name}");
        assert!(took < SECONDS, "{name} was idle and took {took:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_flight_for_longer_than_the_grace_is_cut_off() {
    let settings = Settings {
        environment: vec![("PAPERKEY__SERVER__SHUTDOWN_GRACE_MS", "300".to_owned())],
        ..Settings::default()
    };
    let mut install = Installation::all_in_one_with(settings).await;
    let owner = install.register().await;
    let _connection = in_flight(&install, &owner, 100).await;
    let (status, took) = install.process("serve").terminate().await;
    assert_eq!(status.code(), Some(0));
    assert!(took < SECONDS, "a caller that never ends holds nobody up: {took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_sigterm_ends_it_at_once() {
    let settings = Settings {
        environment: vec![("PAPERKEY__SERVER__SHUTDOWN_GRACE_MS", "60000".to_owned())],
        ..Settings::default()
    };
    let mut install = Installation::all_in_one_with(settings).await;
    let owner = install.register().await;
    let _connection = in_flight(&install, &owner, 100).await;
    let process = install.process("serve");
    process.signal("TERM");
    process.line(|line| line.text.contains("shutting down").then_some(())).await.unwrap();
    assert!(process.is_running());
    let (_, took) = process.terminate().await;
    assert!(took < SECONDS, "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn registration_can_be_closed_and_operators_still_make_accounts() {
    let settings = Settings {
        environment: vec![("PAPERKEY__DASHBOARD__REGISTRATION", "closed".to_owned())],
        ..Settings::default()
    };
    let install = Installation::all_in_one_with(settings).await;
    let asked = json!({"email": new_email(), "password": "correct horse"});
    install.api().post("/auth/register", asked).await.refused(Reason::RegistrationClosed);
    let email = new_email();
    install.command(&["admin", "create-account", &email], "correct horse\n").await.succeeded();
    let asked = json!({"email": email, "password": "correct horse"});
    install.api().post("/auth/login", asked).await.gives(200);
}

#[tokio::test(flavor = "multi_thread")]
async fn help_and_nonsense_are_answered_by_every_command() {
    for command in
        ["serve", "gateway", "auth", "catalog", "licensing", "webhook", "migrate", "admin", "audit", "config"]
    {
        let (ended, _folder) = paperkey(&[command, "--help"], &[]).await;
        assert!(ended.succeeded().contains("--config"), "{command}");
    }
    let (ended, _folder) = paperkey(&["--version"], &[]).await;
    assert!(ended.succeeded().contains(env!("CARGO_PKG_VERSION")));
    for nonsense in [&["nonsense"][..], &["serve", "--nonsense"], &["serve", "--listen", "nowhere"], &[]] {
        let (ended, folder) = paperkey(nonsense, &[]).await;
        assert!(ended.failed().contains("--help"), "{nonsense:?}: {ended:?}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "{nonsense:?} leaves nothing behind");
    }
}
