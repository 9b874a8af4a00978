//! `paperkey`: the one binary. Everything in one process (`serve`), one service of a fleet, or a tool for operators.
//!
//! This crate puts the parts together and decides nothing that a part could decide itself.

mod admin;
mod audit;
mod backup;
mod client;
mod health;
mod licenses;
mod listen;
mod migrate;
mod process;
mod rotate;
mod storage;

use std::{fmt, net::SocketAddr, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};
use paperkey_kit::config::{Config, Part, Problems};

// A general-purpose allocator costs a tenth more on the path of a request.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// API keys, licence keys, a product catalogue and webhooks, on your own machines.
#[derive(Debug, Parser)]
#[command(name = "paperkey", version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    flags: Flags,
}

#[derive(Debug, Args)]
struct Flags {
    /// The configuration file (TOML)
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The data folder
    #[arg(long, global = true, value_name = "FOLDER")]
    data: Option<PathBuf>,
    /// The address to listen on
    #[arg(long, global = true, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// The address of /healthz, /readyz and /metrics
    #[arg(long, global = true, value_name = "ADDRESS")]
    ops_listen: Option<SocketAddr>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run everything in one process
    Serve,
    /// Run the gateway of a fleet
    Gateway,
    /// Run the auth service of a fleet
    Auth,
    /// Run the catalog service of a fleet
    Catalog,
    /// Run the licensing service of a fleet
    Licensing,
    /// Run the webhook service of a fleet
    Webhook,
    /// Change or show the database schema
    #[command(subcommand)]
    Migrate(migrate::Command),
    /// Show or check the configuration
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Ask a running process whether it is ready
    Health(health::Health),
    /// What an operator needs without a web page
    #[command(subcommand)]
    Admin(admin::Command),
    /// Look at the audit log
    #[command(subcommand)]
    Audit(audit::Command),
    /// Copy an installation on SQLite into a folder while it runs
    ///
    /// The folder holds the keys, unless they are left out: whoever has it can read all of the installation.
    Backup(backup::Backup),
    /// Put a backup in place of an installation that does not run
    Restore(backup::Restore),
    /// Bring the events of a product, or of a team, to a server on this machine
    Listen(listen::Listen),
    /// Issue licences from a file, or write them into one
    #[command(subcommand)]
    Licenses(licenses::Command),
}

#[derive(Debug, Subcommand)]
enum ConfigCommand {
    /// Print the effective configuration, secrets redacted
    Print,
    /// Report every problem of the configuration at once
    Check,
}

/// Why a command ended badly: a sentence that says what to do.
#[derive(Debug)]
struct Failure(String);

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: std::error::Error + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        // The operator may see what a caller may not: which field, and what failed inside.
        let ours = (&error as &dyn std::any::Any).downcast_ref::<paperkey_proto::Error>();
        let mut text = error.to_string();
        if let Some(error) = ours {
            let violations =
                error.violations().iter().map(|violation| format!("{} {}", violation.field, violation.message));
            for detail in violations.chain(error.source().map(ToString::to_string)) {
                text.push_str(": ");
                text.push_str(&detail);
            }
        }
        Self(text)
    }
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say_error(&failure);
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<(), Failure> {
    let runtime = || tokio::runtime::Builder::new_multi_thread().enable_all().build();
    // What only calls the API needs no installation, and no sound configuration of one.
    match &cli.command {
        Command::Listen(command) => return runtime()?.block_on(listen::run(command)),
        Command::Licenses(command) => return runtime()?.block_on(licenses::run(command)),
        _ => {}
    }
    let config = load(&cli.flags)?;
    match &cli.command {
        Command::Config(ConfigCommand::Print) => {
            say(toml::to_string(&config)?);
            return Ok(());
        }
        Command::Config(ConfigCommand::Check) => {
            say("the configuration is sound");
            return Ok(());
        }
        _ => {}
    }
    runtime()?.block_on(async {
        match &cli.command {
            Command::Serve => process::run(config, Part::All).await,
            Command::Gateway => process::run(config, Part::Gateway).await,
            Command::Auth => process::run(config, Part::Service("auth")).await,
            Command::Catalog => process::run(config, Part::Service("catalog")).await,
            Command::Licensing => process::run(config, Part::Service("licensing")).await,
            Command::Webhook => process::run(config, Part::Service("webhook")).await,
            Command::Migrate(command) => migrate::run(&config, command).await,
            Command::Health(command) => health::run(&config, command).await,
            Command::Admin(command) => admin::run(&config, command).await,
            Command::Audit(command) => audit::run(&config, command).await,
            Command::Backup(command) => backup::run(config, command).await,
            Command::Restore(command) => backup::restore(config, command).await,
            Command::Config(_) | Command::Listen(_) | Command::Licenses(_) => Ok(()),
        }
    })
}

/// Flags stand over the environment, which stands over the file.
fn load(flags: &Flags) -> Result<Config, Problems> {
    let mut config = Config::load(flags.config.as_deref())?;
    if let Some(data) = &flags.data {
        config.server.data.clone_from(data);
    }
    if let Some(listen) = flags.listen {
        config.server.listen = listen;
    }
    if let Some(listen) = flags.ops_listen {
        config.server.ops_listen = listen;
    }
    Ok(config)
}

/// What a person or a script reads.
#[expect(clippy::print_stdout, reason = "this is the command's answer, not a log line")]
fn say(text: impl fmt::Display) {
    println!("{text}");
}

#[expect(clippy::print_stderr, reason = "a command that failed says why, also before logging has begun")]
fn say_error(text: impl fmt::Display) {
    eprintln!("paperkey: {text}");
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_commands_fit_together() {
        Cli::command().debug_assert();
        for line in ["--product prod_1", "--team team_1", "--product prod_1 --team team_1 --mode test --url http://a"] {
            let line = format!("paperkey listen --forward http://localhost:3000/ --events a,b {line}");
            Cli::try_parse_from(line.split(' ')).unwrap();
        }
        assert!(Cli::try_parse_from(["paperkey", "listen", "--forward", "http://localhost:3000/"]).is_err());
        Cli::try_parse_from(["paperkey", "licenses", "export", "--format", "ndjson", "-o", "-"]).unwrap();
        Cli::try_parse_from(["paperkey", "licenses", "import", "-", "--product", "prod_1"]).unwrap();
    }
}
