//! Walks through the pages, as a person with a browser does them: the scripts of `tests/browser`, run by Node, each with
//! an installation and a receiver of its own.
//!
//! `scripts/test` installs what drives the browser where `PAPERKEY_TEST_BROWSER` says. Without it the walks are left out,
//! loudly; where `CI=true` that fails instead. Pictures of the pages are kept in that folder, in `screenshots`.

use std::{
    env,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

use crate::{
    Installation, Receiver,
    process::{self, Process},
    wait::within,
};

/// How long a walk may take.
const PATIENCE: Duration = Duration::from_mins(5);

/// When it gives up by itself, and says where it was.
const ITS_OWN: Duration = Duration::from_secs(280);

/// Runs a script of `tests/browser` against an installation, with arguments after its name; fails, with what it wrote,
/// where the script does.
pub async fn walk(command: &str, install: &Installation) {
    let Some(installed) = env::var_os("PAPERKEY_TEST_BROWSER").map(PathBuf::from) else {
        assert_ne!(env::var("CI").as_deref(), Ok("true"), "PAPERKEY_TEST_BROWSER is not set, and CI skips nothing");
        process::print_lines("SKIPPED", &[]);
        return;
    };
    let receiver = Receiver::start().await;
    let mut words = command.split(' ');
    let script = words.next().expect("there is a name");
    let mut node = Command::new("node");
    node.arg(PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/browser")).join(script).with_extension("mjs"))
        .args(words)
        .env("PAPERKEY_TEST_BROWSER", installed)
        .env("WALK_URL", install.url())
        .env("WALK_RECEIVER_URL", receiver.url())
        .env("WALK_PATIENCE_MS", ITS_OWN.as_millis().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut walk = Process::start(script, node);
    within(PATIENCE, &format!("{script} ends"), || {
        let ended = (!walk.is_running()).then_some(());
        async move { ended }
    })
    .await;
    let status = walk.ended().await;
    assert!(status.success(), "{command} ended with {status}");
    // What it has measured.
    process::print_lines(script, &walk.kill());
}
