//! What the commands that call the API have in common: where it is, who calls, and what is said on the terminal.
//!
//! They work on any machine: no data folder, no configuration file, no database. The credential comes from the
//! environment and from nowhere else, since arguments are seen by everyone on the machine.

use std::{
    env, fmt,
    io::{self, Write as _},
};

use clap::{Args, ValueEnum};
use paperkey_kit::{
    api::{Api, ApiOptions, Refusal},
    secrets::Secret,
};

use crate::Failure;

/// Where an installation listens as it is installed.
const DEFAULT_URL: &str = "http://127.0.0.1:8080";

/// The variables that may hold the credential, in the order of asking.
const CREDENTIALS: [&str; 2] = ["PAPERKEY_API_KEY", "PAPERKEY_TOKEN"];

#[derive(Debug, Args)]
pub(crate) struct ApiArgs {
    /// The address of the API; without it PAPERKEY_URL, or http://127.0.0.1:8080
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// The team that is meant, where the credential is good for several
    #[arg(long, value_name = "ID")]
    pub(crate) team: Option<String>,
    /// The mode that is meant, where the credential is good for both
    #[arg(long)]
    mode: Option<Mode>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mode {
    Live,
    Test,
}

impl Mode {
    fn word(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Test => "test",
        }
    }
}

impl ApiArgs {
    /// Where the API is.
    pub(crate) fn url(&self) -> String {
        let named = self.url.clone().or_else(|| variable("PAPERKEY_URL"));
        named.unwrap_or_else(|| DEFAULT_URL.to_owned())
    }

    /// The way to the API. Nothing is dialled yet.
    pub(crate) fn connect(&self) -> Result<Api, Failure> {
        let Some(credential) = CREDENTIALS.into_iter().find_map(variable) else {
            return Err(Failure(
                "no credential: put an API key into PAPERKEY_API_KEY, or a session's token into PAPERKEY_TOKEN"
                    .to_owned(),
            ));
        };
        let options = ApiOptions {
            url: self.url(),
            credential: Secret::new(credential.trim()),
            team: self.team.clone(),
            mode: self.mode.map(|mode| mode.word().to_owned()),
            user_agent: format!("paperkey-cli/{}", env!("CARGO_PKG_VERSION")),
        };
        Ok(Api::new(options)?)
    }

    /// What to do about a refusal, in the same sentence as the refusal itself.
    pub(crate) fn explain(&self, refusal: &Refusal, scope: &str) -> Failure {
        let advice = match refusal.http_status() {
            401 => format!("put a credential into PAPERKEY_API_KEY or PAPERKEY_TOKEN that is good at {}", self.url()),
            403 => format!("use a credential that holds the scope {scope} and may act for this team"),
            404 => "look at the id, and at --team and --mode: what is another's is not found either".to_owned(),
            503 => format!("look whether {} is the address of a Paperkey that runs", self.url()),
            _ => return Failure(refusal.to_string()),
        };
        Failure(format!("{refusal}: {advice}"))
    }
}

/// A variable of the environment; one that is empty is none.
pub(crate) fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|text| !text.trim().is_empty())
}

/// Writes a line for whoever reads the command's answer. Nobody may be left to read it.
pub(crate) fn line(text: impl fmt::Display) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

/// Writes a line for whoever watches, beside the command's answer.
pub(crate) fn note(text: impl fmt::Display) {
    // Whoever has closed it does not want to know.
    let _ = writeln!(io::stderr().lock(), "{text}");
}
