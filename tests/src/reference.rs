//! What others make of the reference: a strict linter, the languages that its samples are in, and a client that makes calls
//! up from it and holds every answer against it.
//!
//! `scripts/test` installs them where `PAPERKEY_TEST_REFERENCE` says, in the versions that `tests/reference` pins. Without
//! it they are left out, loudly; where `CI=true` that fails instead.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;
use tempfile::TempDir;

use crate::process;

/// How long all that a test asks of them may take: less than what ends the test (`.config/nextest.toml`), which would not
/// say what they were at.
const PATIENCE: Duration = Duration::from_mins(9);

/// What every answer is held against.
const CHECKS: [&str; 10] = [
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
];

/// Those who judge the reference.
#[derive(Debug)]
pub struct Judges {
    installed: PathBuf,
    folder: TempDir,
    began: Instant,
}

impl Judges {
    /// Those that are installed; `None` where none are.
    pub fn installed() -> Option<Self> {
        let Some(installed) = env::var_os("PAPERKEY_TEST_REFERENCE").map(PathBuf::from) else {
            assert_ne!(
                env::var("CI").as_deref(),
                Ok("true"),
                "PAPERKEY_TEST_REFERENCE is not set, and CI skips nothing"
            );
            process::print_lines("SKIPPED", &[]);
            return None;
        };
        let folder = TempDir::with_prefix("paperkey-reference-").expect("a temporary folder can be made");
        Some(Self { installed, folder, began: Instant::now() })
    }

    /// The linter finds nothing.
    pub async fn lint(&self, document: &Value) {
        let mut command = Command::new("node");
        command
            .arg(self.installed.join("node_modules/@redocly/cli/bin/cli.js"))
            .args(["lint", "--format", "stylish", "--config"])
            .arg(sources().join("redocly.yaml"))
            .arg(self.written(document))
            .env("REDOCLY_SUPPRESS_UPDATE_NOTICE", "true")
            .env("REDOCLY_TELEMETRY", "off");
        self.succeeds(command).await;
    }

    /// Every sample is written as its language is.
    pub async fn parse_samples(&self, document: &Value) {
        let document = self.written(document);
        let mut node = Command::new("node");
        node.args(["--experimental-vm-modules", "--no-warnings"]).arg(sources().join("parse.mjs")).arg(&document);
        let mut python = Command::new(self.installed.join("venv/bin/python"));
        python.arg(sources().join("parse.py")).arg(&document);
        for command in [node, python] {
            self.succeeds(command).await;
        }
    }

    /// Calls are made up from those operations of the document that the arguments leave, and every answer is as it says.
    pub async fn try_out(&self, document: &Value, url: &str, credential: &str, operations: &[&str]) {
        let mut command = Command::new(self.installed.join("venv/bin/st"));
        command
            .arg("run")
            .arg(self.written(document))
            .args(["--url", url, "--header", &format!("Authorization: Bearer {credential}")])
            .args(["--checks", &CHECKS.join(",")])
            .args(["--phases", "examples,coverage,fuzzing", "--max-examples", "5"])
            .args(["--seed", "1", "--generation-deterministic", "--request-timeout", "30", "--no-color"])
            .args(operations)
            .env("PYTHONHASHSEED", "0");
        let said = self.succeeds(command).await;
        assert!(!said.contains(" 0 selected /"), "no operation is meant by {operations:?}: {said}");
    }

    fn written(&self, document: &Value) -> PathBuf {
        let path = self.folder.path().join("openapi.json");
        fs::write(&path, document.to_string()).expect("a temporary folder can be written to");
        path
    }

    async fn succeeds(&self, mut command: Command) -> String {
        // Some of them leave files where they run.
        command.current_dir(self.folder.path());
        let shown = format!("{:?}", command.get_args().collect::<Vec<_>>());
        let left = PATIENCE.saturating_sub(self.began.elapsed());
        let ended = process::run_within(left, "a judge", command, || shown.clone()).await;
        assert!(ended.status.success(), "{shown}:\n{}\n{}", ended.out, ended.err);
        ended.out
    }
}

fn sources() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/reference"))
}
