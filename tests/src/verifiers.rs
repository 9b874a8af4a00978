//! What public libraries make of a delivery: those of Rust, Node and Python that verify Standard Webhooks.
//!
//! `scripts/test` installs those of Node and Python where `PAPERKEY_TEST_VERIFIERS` says. Without it they are left out,
//! loudly; where `CI=true` that fails instead.

use std::{
    collections::BTreeMap,
    env,
    path::PathBuf,
    process::{Command, Stdio},
};

use http::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value, json};

use crate::{process, receiver::Delivery};

/// What a receiver has in hand when it verifies.
#[derive(Clone, Debug)]
pub struct Case {
    /// The three headers of the standard.
    pub headers: BTreeMap<&'static str, String>,
    /// The body.
    pub body: String,
    /// The secret it was shown.
    pub secret: String,
}

/// By library: why it refuses, or nothing where it does not.
pub type Verdicts = BTreeMap<String, Option<String>>;

const HEADERS: [&str; 3] = ["webhook-id", "webhook-timestamp", "webhook-signature"];

impl Case {
    /// A delivery as it arrived.
    pub fn of(delivery: &Delivery, secret: &str) -> Self {
        Self {
            headers: HEADERS.map(|name| (name, delivery.header(name).to_owned())).into(),
            body: String::from_utf8(delivery.body.to_vec()).expect("a delivery is JSON"),
            secret: secret.to_owned(),
        }
    }

    /// The same with another value of a header.
    #[must_use]
    pub fn with(&self, name: &'static str, value: &str) -> Self {
        let mut with = self.clone();
        with.headers.insert(name, value.to_owned());
        with
    }

    fn judged_by_rust(&self) -> Option<String> {
        let headers: HeaderMap = self
            .headers
            .iter()
            .map(|(name, value)| {
                let value = HeaderValue::from_str(value).expect("it was a header before");
                (HeaderName::from_static(name), value)
            })
            .collect();
        let webhook = standardwebhooks::Webhook::new(&self.secret).expect("a secret is whsec_ and base 64");
        webhook.verify(self.body.as_bytes(), &headers).err().map(|refused| refused.to_string())
    }
}

/// What every library says to each of these cases.
pub async fn judge(cases: &[Case]) -> Vec<Verdicts> {
    let by_rust = |case: &Case| Verdicts::from([("crates.io standardwebhooks".to_owned(), case.judged_by_rust())]);
    let mut verdicts: Vec<Verdicts> = cases.iter().map(by_rust).collect();
    let Some(installed) = env::var_os("PAPERKEY_TEST_VERIFIERS").map(PathBuf::from) else {
        assert_ne!(env::var("CI").as_deref(), Ok("true"), "PAPERKEY_TEST_VERIFIERS is not set, and CI skips nothing");
        process::print_lines("SKIPPED", &[]);
        return verdicts;
    };
    let scripts = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/verifiers"));
    let mut node = Command::new("node");
    node.arg(scripts.join("verify.mjs")).arg(&installed);
    let mut python = Command::new(installed.join("venv/bin/python"));
    python.arg(scripts.join("verify.py"));
    let asked = cases.iter().map(|case| json!({"headers": case.headers, "body": case.body, "secret": case.secret}));
    let asked = asked.collect::<Value>().to_string();
    for mut command in [node, python] {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let ended = process::run(command, &asked).await;
        let said: Vec<Verdicts> = serde_json::from_str(ended.succeeded()).expect("a verdict for each case");
        assert_eq!(said.len(), cases.len());
        for (verdicts, more) in verdicts.iter_mut().zip(said) {
            verdicts.extend(more);
        }
    }
    verdicts
}
