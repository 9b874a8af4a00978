//! `paperkey admin`: what an operator needs without a web page. Works on the database itself, also while the product
//! runs: what it changes reaches every gateway through the feed of changes, within a second.

use std::{
    fs::{self, OpenOptions},
    io::Write as _,
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    sync::Arc,
};

use clap::Subcommand;
use paperkey_auth::admin::Admin;
use paperkey_kit::{
    clock::Clock,
    config::Config,
    db::{Database, Engine},
    secrets::{Keyring, Secret},
};

use crate::{Failure, say, storage};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make an account and its first team; the password is read from PAPERKEY_PASSWORD or from standard input
    CreateAccount {
        /// The email address
        email: String,
        /// The name of the person
        #[arg(long)]
        name: Option<String>,
    },
    /// Set a new password, read from PAPERKEY_PASSWORD or from standard input, and sign out everywhere
    ResetPassword {
        /// The email address
        email: String,
    },
    /// Set the tier of a team
    SetTier {
        /// The team's id
        team: String,
        /// free, starter, builder, pro or scale
        tier: String,
    },
    /// Print the system key where it is new or kept in the data folder
    SystemKey {
        /// Revoke it and make a new one
        #[arg(long)]
        rotate: bool,
    },
}

pub(crate) async fn run(config: &Config, command: &Command) -> Result<(), Failure> {
    let clock = Clock::system();
    let database = storage::open_current(config, "auth", &clock).await?;
    // This process serves nothing: what it changes reaches those that do by the feed.
    let admin = Admin::new(database.clone(), &config.keyring()?, Arc::default())?;
    match command {
        Command::CreateAccount { email, name } => {
            let password = password()?;
            let created = admin.create_account(email, password, name.as_deref()).await?;
            say(format_args!(
                "account  {}\nteam     {}\nfree key {}\nlive key {}\nThe keys are shown this once.",
                created.user_id,
                created.team_id,
                created.free_key.expose(),
                created.live_key.expose()
            ));
        }
        Command::ResetPassword { email } => {
            let password = password()?;
            admin.reset_password(email, password).await?;
            say("the password is set; every session of the account has ended");
        }
        Command::SetTier { team, tier } => {
            admin.set_tier(team, tier).await?;
            say(format_args!("{team} is on tier {tier}"));
        }
        Command::SystemKey { rotate } => system_key(config, &admin, database.engine(), *rotate).await?,
    }
    database.close().await;
    Ok(())
}

async fn system_key(config: &Config, admin: &Admin, engine: Engine, rotate: bool) -> Result<(), Failure> {
    let kept = system_key_file(config);
    if let Some(key) = admin.system_key(rotate).await? {
        if engine == Engine::Sqlite {
            keep_system_key(config, &key)?;
        }
        say(key.expose());
    } else if let Ok(key) = fs::read_to_string(&kept) {
        say(key.trim());
    } else {
        return Err(Failure(
            "the system key was printed when it was made, and only its hash is kept; \
             `paperkey admin system-key --rotate` makes a new one and revokes the old"
                .to_owned(),
        ));
    }
    Ok(())
}

/// Makes the system key of an embedded installation at its first start, and says whether this was it.
pub(crate) async fn ensure_system_key(config: &Config, database: &Database, keys: &Keyring) -> Result<bool, Failure> {
    let admin = Admin::new(database.clone(), keys, Arc::default())?;
    let Some(key) = admin.ensure_system_key().await? else { return Ok(false) };
    keep_system_key(config, &key)?;
    Ok(true)
}

fn system_key_file(config: &Config) -> PathBuf {
    config.server.data.join("secrets").join("system.key")
}

fn keep_system_key(config: &Config, key: &Secret) -> Result<(), Failure> {
    let path = system_key_file(config);
    if let Some(folder) = path.parent() {
        storage::make_folder(folder)?;
    }
    let draft = path.with_extension("key.new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    file.write_all(key.expose().as_bytes())?;
    file.sync_all()?;
    fs::rename(&draft, &path)?;
    Ok(())
}

/// Never an argument: those are seen by everyone on the machine.
fn password() -> Result<Secret, Failure> {
    if let Ok(password) = std::env::var("PAPERKEY_PASSWORD") {
        return Ok(Secret::new(password));
    }
    let mut line = String::new();
    std::io::stdin().read_line(&mut line)?;
    match line.trim_end_matches(['\r', '\n']) {
        "" => Err(Failure("no password: write it on standard input, or in PAPERKEY_PASSWORD".to_owned())),
        password => Ok(Secret::new(password)),
    }
}
