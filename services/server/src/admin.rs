//! `paperkey admin`: what an operator needs without a web page. Works on the database itself, also while the product
//! runs: what it changes reaches every gateway through the feed of changes, within a second.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use clap::Subcommand;
use paperkey_auth::admin::{Admin, Care, Existing, Rotates};
use paperkey_kit::{clock::Clock, config::Config, db::Engine, secrets::Secret, shutdown::Shutdown};

use crate::{Failure, rotate, say, storage};

/// How often a process that serves looks whether the system key is to be rotated.
const EVERY: Duration = Duration::from_hours(1);

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
        /// The name of a configured tier; without changes of [tiers] free, starter, builder, pro or scale
        tier: String,
    },
    /// Print the system key where it is new or kept in the data folder
    SystemKey {
        /// Make a new one; the old one works for 24 hours more
        #[arg(long)]
        rotate: bool,
        /// With --rotate: end the old one at once
        #[arg(long, requires = "rotate")]
        now: bool,
    },
    /// Change the master key, and seal everything anew under it while the product runs
    ///
    /// Where the keys are kept in the data folder, this makes a new one. Where they are given by the configuration, it says
    /// what to do there first. The pepper and the key that signs sessions are not changed.
    RotateSecrets {
        /// Only say what is sealed under which key
        #[arg(long)]
        status: bool,
        /// Only remove older keys that nothing is sealed under any more
        #[arg(long, conflicts_with = "status")]
        retire: bool,
    },
}

pub(crate) async fn run(config: &Config, command: &Command) -> Result<(), Failure> {
    if let Command::RotateSecrets { status, retire } = command {
        return rotate::run(config, *status, *retire).await;
    }
    let clock = Clock::system();
    let _stays = storage::stay(config)?;
    let database = storage::open_current(config, "auth", &clock).await?;
    // This process serves nothing: what it changes reaches those that do by the feed.
    let keys = config.keyring()?.with_kept(&database, "auth").await?;
    let admin = Admin::new(database.clone(), &keys, Arc::default())?;
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
            admin.set_tier(&config.tiers, team, tier).await?;
            say(format_args!("{team} is on tier {tier}"));
        }
        Command::SystemKey { rotate, now } => {
            let existing = match (rotate, now) {
                (false, _) => Existing::Stays,
                (true, false) => Existing::Overlaps,
                (true, true) => Existing::Ends,
            };
            system_key(config, &admin, database.engine(), existing).await?;
        }
        // It needs all databases, and no account.
        Command::RotateSecrets { .. } => {}
    }
    database.close().await;
    Ok(())
}

async fn system_key(config: &Config, admin: &Admin, engine: Engine, existing: Existing) -> Result<(), Failure> {
    let made = match engine {
        Engine::Sqlite => KeptKey::of(config).put(admin, existing).await?,
        Engine::Postgres => {
            let draft = admin.draft_system_key(Rotates::ByHand);
            let token = draft.token().clone();
            admin.put_system_key(draft, existing).await?.then_some(token)
        }
    };
    if let Some(key) = made {
        say(key.expose());
    } else if let Ok(key) = fs::read_to_string(KeptKey::of(config).path) {
        say(key.trim());
    } else {
        return Err(Failure(
            "the system key was printed when it was made, and only its hash is kept; \
             `paperkey admin system-key --rotate` makes a new one, and the old one works for 24 hours more"
                .to_owned(),
        ));
    }
    Ok(())
}

/// Makes the system key of an embedded installation where there is none, such as at its first start, and rotates one
/// that is old enough. Says what was done.
pub(crate) async fn care_for_system_key(config: &Config, admin: &Admin) -> Result<Care, Failure> {
    let care = admin.system_key_care().await?;
    let kept = KeptKey::of(config);
    match care {
        Care::Nothing => kept.settle(admin).await?,
        // Who comes second finds that it was done.
        Care::Make => drop(kept.put(admin, Existing::Stays).await?),
        Care::Rotate => drop(kept.put(admin, Existing::Overlaps).await?),
    }
    Ok(care)
}

/// Looks after the system key of an embedded installation once an hour, until shut down.
pub(crate) async fn keep_system_key(config: Config, admin: Admin, mut shutdown: Shutdown) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = shutdown.wait() => return,
        }
        match care_for_system_key(&config, &admin).await {
            Ok(Care::Nothing) => {}
            Ok(Care::Make) => tracing::info!("a system key was made: there was none"),
            Ok(Care::Rotate) => tracing::info!("the system key was rotated; the one before works for 24 hours more"),
            // The next hour does what this one could not.
            Err(failure) => tracing::warn!(%failure, "the system key could not be looked after"),
        }
    }
}

/// The file in which an embedded installation keeps its system key.
///
/// A new key is written beside it first, then stored, then moved into its place. Whenever a process dies in between,
/// the file holds a key that works: the one before (for 24 hours more, if it was rotated) until the move, the new one
/// after it. What a dead process has left beside it is the key that counts, if it was stored, and is moved; else it
/// never was one, and is removed.
struct KeptKey {
    path: PathBuf,
    draft: PathBuf,
    lock: PathBuf,
}

impl KeptKey {
    fn of(config: &Config) -> Self {
        let path = config.server.data.join("secrets").join("system.key");
        Self { draft: path.with_extension("key.new"), lock: path.with_extension("lock"), path }
    }

    /// Makes a key and keeps it; `None` where there is one that stays.
    async fn put(&self, admin: &Admin, existing: Existing) -> Result<Option<Secret>, Failure> {
        let _lock = self.hold().await?;
        self.settle_held(admin).await?;
        let draft = admin.draft_system_key(Rotates::Itself);
        let token = draft.token().clone();
        self.write_draft(&token)?;
        if admin.put_system_key(draft, existing).await? {
            fs::rename(&self.draft, &self.path)?;
            Ok(Some(token))
        } else {
            fs::remove_file(&self.draft)?;
            Ok(None)
        }
    }

    /// Brings to its end what a process has begun that died over it.
    async fn settle(&self, admin: &Admin) -> Result<(), Failure> {
        if !self.draft.exists() {
            return Ok(());
        }
        let _lock = self.hold().await?;
        self.settle_held(admin).await
    }

    async fn settle_held(&self, admin: &Admin) -> Result<(), Failure> {
        let token = match fs::read_to_string(&self.draft) {
            Ok(text) => Secret::new(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        if admin.is_system_key(&token).await? {
            fs::rename(&self.draft, &self.path)?;
        } else {
            fs::remove_file(&self.draft)?;
        }
        Ok(())
    }

    fn write_draft(&self, key: &Secret) -> Result<(), Failure> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&self.draft)?;
        file.write_all(key.expose().as_bytes())?;
        file.sync_all()?;
        // And that it is there: a machine that loses its power must not keep the row and forget the file.
        if let Some(folder) = self.draft.parent() {
            File::open(folder)?.sync_all()?;
        }
        Ok(())
    }

    /// One process at a time: the one that serves, or a command beside it.
    async fn hold(&self) -> Result<File, Failure> {
        if let Some(folder) = self.path.parent() {
            storage::make_folder(folder)?;
        }
        let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&self.lock)?;
        let locked = tokio::task::spawn_blocking(move || file.lock().map(|()| file)).await?;
        Ok(locked?)
    }
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use paperkey_kit::{clock::ManualClock, db::Database, secrets::Keyring, testing::TestDb};

    use super::*;

    const DAY_MS: i64 = 24 * 60 * 60 * 1_000;

    struct Bench {
        admin: Admin,
        config: Config,
        kept: KeptKey,
        hand: ManualClock,
        folder: PathBuf,
        _db: TestDb,
    }

    impl Drop for Bench {
        fn drop(&mut self) {
            // A folder that stays behind is a nuisance, not a failure.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }

    impl Bench {
        async fn new(name: &str) -> Self {
            let db = TestDb::sqlite();
            let (clock, hand) = Clock::manual(1_790_000_000_000);
            let mut options = db.options();
            options.clock = clock;
            let database = Database::open(options).await.unwrap();
            database.migrate_up::<paperkey_migrations::auth::Migrator>().await.unwrap();
            let admin = Admin::new(database, &Keyring::for_tests(), Arc::default()).unwrap();
            let folder = std::env::temp_dir().join(format!("paperkey-{name}-{}", std::process::id()));
            let mut config = Config::default();
            config.server.data.clone_from(&folder);
            Self { admin, kept: KeptKey::of(&config), config, hand, folder, _db: db }
        }

        async fn care(&self) -> Care {
            care_for_system_key(&self.config, &self.admin).await.unwrap()
        }

        fn file(&self) -> Secret {
            Secret::new(fs::read_to_string(&self.kept.path).unwrap())
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_old_system_key_is_rotated_and_its_file_rewritten() {
        let bench = Bench::new("rotated").await;
        assert_eq!(bench.care().await, Care::Make);
        let first = bench.file();
        assert!(bench.admin.is_system_key(&first).await.unwrap());
        let mode = fs::metadata(&bench.kept.path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        bench.hand.advance_ms(90 * DAY_MS - 1);
        assert_eq!((bench.care().await, bench.file()), (Care::Nothing, first.clone()));
        bench.hand.advance_ms(1);
        assert_eq!(bench.care().await, Care::Rotate);
        let second = bench.file();
        assert_ne!(second, first);
        assert!(bench.admin.is_system_key(&second).await.unwrap());
        assert!(!bench.admin.is_system_key(&first).await.unwrap());
        assert_eq!(bench.care().await, Care::Nothing);
        assert!(!bench.kept.draft.exists());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn what_a_dead_process_began_is_brought_to_its_end() {
        let bench = Bench::new("began").await;
        // It died before anything was stored.
        bench.care().await;
        let first = bench.file();
        bench.kept.write_draft(bench.admin.draft_system_key(Rotates::Itself).token()).unwrap();
        assert_eq!((bench.care().await, bench.file()), (Care::Nothing, first.clone()));
        assert!(!bench.kept.draft.exists());
        // It died after that, and before the file was moved.
        let draft = bench.admin.draft_system_key(Rotates::Itself);
        let token = draft.token().clone();
        bench.kept.write_draft(&token).unwrap();
        assert!(bench.admin.put_system_key(draft, Existing::Overlaps).await.unwrap());
        assert_eq!(bench.file(), first);
        assert_eq!((bench.care().await, bench.file()), (Care::Nothing, token));
        // What it left is no key at all.
        fs::write(&bench.kept.draft, "").unwrap();
        bench.care().await;
        assert!(!bench.kept.draft.exists());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn of_many_first_starts_each_finds_the_one_key() {
        let bench = Bench::new("many").await;
        let starts = (0..8).map(|_| care_for_system_key(&bench.config, &bench.admin));
        for outcome in futures_util::future::join_all(starts).await {
            outcome.unwrap();
        }
        assert!(bench.admin.is_system_key(&bench.file()).await.unwrap());
    }
}
