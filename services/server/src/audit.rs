//! `paperkey audit`: the audit log, looked at from outside. Works on the database itself, also while the product runs.

use std::fmt::Write as _;

use clap::Subcommand;
use paperkey_auth::audit::{AuditLog, AuditReport};
use paperkey_kit::{clock::Clock, config::Config, values::rfc3339};

use crate::{Failure, say, storage};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Look for entries that were changed, removed, moved or cut off
    Verify,
}

pub(crate) async fn run(config: &Config, command: &Command) -> Result<(), Failure> {
    let Command::Verify = command;
    let _stays = storage::stay(config)?;
    // What is only to be looked at is not migrated.
    let database = storage::open(config, "auth", &Clock::system()).await?;
    if let Some(problem) = storage::schema_problem(&database, "auth").await? {
        return Err(Failure(problem));
    }
    let keys = config.keyring()?.with_kept(&database, "auth").await?;
    let log = AuditLog::new(database.clone(), &keys, &config.server.data);
    let verdict = log.verify().await?;
    database.close().await;
    match verdict {
        Ok(report) => say(found_well(&report)),
        Err(fault) => return Err(Failure(format!("the audit log is not whole: {fault}"))),
    }
    Ok(())
}

fn found_well(report: &AuditReport) -> String {
    let AuditReport { records, blocks, unchained, first_ms, last_ms, has_witness } = report;
    let span = match (first_ms, last_ms) {
        (Some(first_ms), Some(last_ms)) => format!(", of {} to {}", rfc3339(*first_ms), rfc3339(*last_ms)),
        _ => String::new(),
    };
    let mut text = format!("the audit log is whole: {records} records in {blocks} chained blocks{span}");
    if *unchained > 0 {
        // Writing to a String cannot fail.
        let _ = write!(text, "; {unchained} blocks came a moment ago and are not chained yet");
    }
    if !has_witness && *blocks > 0 {
        text.push_str(
            "\nThe file audit-head is not in this data folder: run this where the auth service runs, to know as well that \
             nothing was cut off at the end",
        );
    }
    text
}
