//! The table: each row beside the first, which is the ceiling.

use std::{fmt::Write as _, path::PathBuf, time::Duration};

use crate::{Result, load::Outcome, results};

/// A measurement and its name.
pub(crate) struct Row {
    name: String,
    per_second: f64,
    cpu_us: f64,
    outcome: Outcome,
}

impl Row {
    #[expect(clippy::cast_precision_loss, reason = "counts of a few seconds are far below 2^52")]
    pub(crate) fn new(name: &str, outcome: Outcome) -> Self {
        Self {
            name: name.to_owned(),
            per_second: outcome.requests as f64 / outcome.elapsed.as_secs_f64(),
            cpu_us: outcome.server_cpu_us as f64 / outcome.requests.max(1) as f64,
            outcome,
        }
    }
}

#[expect(clippy::print_stderr, reason = "progress, beside the table on standard output")]
pub(crate) fn progress(row: &Row) {
    eprintln!("{}: {:.0}/s, {:.1} CPU-µs", row.name, row.per_second, row.cpu_us);
}

#[expect(clippy::print_stdout, reason = "the table is this command's answer")]
pub(crate) fn finish(rows: &[Row], span: Duration, write: Option<PathBuf>) -> Result<()> {
    let table = table(rows, span)?;
    println!("{table}");
    if let Some(path) = write {
        results::write(&path, &table)?;
    }
    Ok(())
}

fn table(rows: &[Row], span: Duration) -> Result<String> {
    let ceiling = rows.first().map_or(1.0, |row| row.cpu_us);
    let cores = std::thread::available_parallelism()?;
    let mut text = format!(
        "# Results\n\n\
         Command: `bench/run --seconds {}`. One run on {cores} cores shared by client and server, over loopback, \
         release build, SQLite with synchronous=FULL. Read the ratios: seconds depend on the machine.\n\n\
         CPU is user and system time of all server processes per request; the ratio is to bare axum.\n\n\
         | what | calls/s | p50 µs | p99 µs | server CPU µs | × axum |\n|---|--:|--:|--:|--:|--:|\n",
        span.as_secs()
    );
    for row in rows {
        writeln!(
            text,
            "| {} | {:.0} | {} | {} | {:.1} | {:.2} |",
            row.name,
            row.per_second,
            row.outcome.p50_us,
            row.outcome.p99_us,
            row.cpu_us,
            row.cpu_us / ceiling
        )?;
    }
    Ok(text)
}
