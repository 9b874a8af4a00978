//! What a call costs, as ratios taken in one run on one machine.
//!
//! Machines are noisy and differ, so a row is read against the first one: bare axum, the ceiling. Throughput is what
//! two shared cores gave to client and server together; CPU time per request is the server's alone, summed over its
//! processes, and is the figure to compare. Everything runs over loopback against the release build.

mod ceilings;
mod deliveries;
mod load;
mod peers;
mod report;
mod results;
mod scale;

use std::{path::PathBuf, time::Duration};

use clap::{Parser, Subcommand};

use crate::{
    load::{Load, Outcome},
    peers::{Installation, Layout},
    report::Row,
};

// The same allocator as the product's, so that a ratio does not measure allocators.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Any error of a run ends it.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Load, ceilings and ratios of Paperkey.
#[derive(Debug, Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure everything in one run and print the table
    Run {
        /// Seconds of each measurement
        #[arg(long, default_value_t = 5)]
        seconds: u64,
        /// The product's binary
        #[arg(long, default_value = "target/release/paperkey")]
        binary: PathBuf,
        /// Measure only rows whose names hold this, beside the first; or `webhooks`: only what deliveries cost; or `scale`:
        /// what calls cost among many licences, beside what they cost among few
        #[arg(long)]
        only: Option<String>,
        /// How many licences `scale` makes
        #[arg(long, default_value_t = 10_000_000)]
        licenses: u64,
        /// Also put the table into this file, in the place of the one before
        #[arg(long)]
        write: Option<PathBuf>,
    },
    /// Serve one of the ceilings, for `run`
    #[command(hide = true)]
    Serve {
        /// axum, tonic or sink
        ceiling: ceilings::Ceiling,
    },
}

/// Connections of a measurement of cost: enough that neither side sleeps between two requests.
const CONNECTIONS: usize = 64;
/// Connections of a measurement of durable writes: enough for a group to form.
const WRITERS: usize = 64;
/// What `--only` says for deliveries.
const WEBHOOKS: &str = "webhooks";
/// What `--only` says for many licences.
const SCALE: &str = "scale";
/// Licences that validations go round.
const LICENSES: usize = 100;

#[tokio::main]
async fn main() -> Result<()> {
    match Cli::parse().command {
        Command::Serve { ceiling } => ceilings::serve(ceiling).await,
        Command::Run { seconds, binary, only, licenses, write } => {
            let span = Duration::from_secs(seconds);
            if only.as_deref() == Some(WEBHOOKS) {
                return deliveries::run(span, &binary, write).await;
            }
            if only.as_deref() == Some(SCALE) {
                return scale::run(licenses, &binary, write).await;
            }
            run(span, &binary, only.as_deref().unwrap_or_default(), write.clone()).await?;
            if only.is_none() {
                deliveries::run(span, &binary, write).await?;
            }
            Ok(())
        }
    }
}

async fn run(span: Duration, binary: &std::path::Path, only: &str, write: Option<PathBuf>) -> Result<()> {
    let mut rows = Vec::new();
    let wanted = |name: &str| name.contains(only);
    let mut add = |name: &str, outcome: Outcome| {
        let row = Row::new(name, outcome);
        report::progress(&row);
        rows.push(row);
    };

    let axum = ceilings::Process::start(ceilings::Ceiling::Axum).await?;
    let body = serde_json::json!({"license_key": "K7WX9-M3NP4-H8TRC-DJ", "fingerprint": "paperkey_fp_v1_bench"});
    let echo = Load::post(axum.address, "/echo", None, move |_| body.to_string());
    add("bare axum, POST echo", echo.run(CONNECTIONS, span, &[axum.pid()]).await?);
    drop(axum);

    let name = "bare tonic, unary echo";
    if wanted(name) {
        let tonic = ceilings::Process::start(ceilings::Ceiling::Tonic).await?;
        add(name, ceilings::load_tonic(tonic.address, 4, 4, span, tonic.pid()).await?);
    }

    for (layout, name) in [(Layout::AllInOne, "all-in-one"), (Layout::Processes, "as processes")] {
        let names =
            ["validate", "verify a key", "activate a new machine (durable)"].map(|what| format!("{what}, {name}"));
        let [validate, verify, activate] = &names;
        if !names.iter().any(|name| wanted(name)) {
            continue;
        }
        let installation = Installation::start(binary, layout).await?;
        let vendor = installation.set_up(LICENSES).await?;
        let pids = installation.pids();
        let app = Some(vendor.public_key);
        if wanted(validate) {
            let keys = vendor.license_keys;
            let body = move |n: usize| {
                let key = &keys[n % keys.len()];
                serde_json::json!({"license_key": key, "fingerprint": "paperkey_fp_v1_bench"}).to_string()
            };
            let load = Load::post(installation.address, "/v1/licenses/validate", app.clone(), body);
            add(validate, load.run(CONNECTIONS, span, &pids).await?);
        }
        if wanted(verify) {
            // A key of the team verifies another of the same team, as a vendor's own API does for its callers.
            let body = serde_json::json!({"key": vendor.free_key, "scope": "licenses:read"}).to_string();
            let load =
                Load::post(installation.address, "/v1/keys/verify", Some(vendor.team_key), move |_| body.clone());
            add(verify, load.run(CONNECTIONS, span, &pids).await?);
        }
        if wanted(activate) {
            let key = vendor.unlimited_key;
            let body = move |n: usize| {
                serde_json::json!({"license_key": key, "fingerprint": format!("machine-{n}")}).to_string()
            };
            let load = Load::post(installation.address, "/v1/licenses/activate", app, body);
            add(activate, load.run(WRITERS, span, &pids).await?);
        }
    }
    report::finish(&rows, span, write)
}
