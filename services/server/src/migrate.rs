//! `paperkey migrate`: the schema of every service, by hand. `serve` on SQLite migrates by itself.

use clap::Subcommand;
use paperkey_kit::{clock::Clock, config::Config, db::MigrationState, service::SERVICES};

use crate::{Failure, say, storage};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Bring every schema to the newest version
    Up,
    /// Show which migrations are applied
    Status,
    /// Take back the last migrations of one service
    Down {
        /// The service whose schema goes back
        service: String,
        /// How many migrations
        #[arg(long, default_value_t = 1)]
        steps: u32,
    },
}

pub(crate) async fn run(config: &Config, command: &Command) -> Result<(), Failure> {
    let clock = Clock::system();
    let _stays = storage::stay(config)?;
    match command {
        Command::Up => {
            for service in SERVICES {
                let database = storage::open(config, service, &clock).await?;
                storage::migrate_up(&database, service).await?;
                let states = storage::status(&database, service).await?;
                let is_newer = states.iter().any(|migration| migration.state == MigrationState::Unknown);
                let state = if is_newer { "newer than this release, which does not mind" } else { "current" };
                say(format_args!("{service}: {state}"));
                database.close().await;
            }
        }
        Command::Status => {
            for service in SERVICES {
                let database = storage::open(config, service, &clock).await?;
                for migration in storage::status(&database, service).await? {
                    let state = match migration.state {
                        MigrationState::Applied => "applied",
                        MigrationState::Pending => "pending",
                        MigrationState::Unknown => "applied by a newer release",
                    };
                    say(format_args!("{service}: {} {state}", migration.name));
                }
                database.close().await;
            }
        }
        Command::Down { service, steps } => {
            let Some(service) = SERVICES.into_iter().find(|name| name == service) else {
                return Err(Failure(format!("{service} is no service: name one of {}", SERVICES.join(", "))));
            };
            let database = storage::open(config, service, &clock).await?;
            storage::migrate_down(&database, service, *steps).await?;
            say(format_args!("{service}: {steps} taken back"));
            database.close().await;
        }
    }
    Ok(())
}
