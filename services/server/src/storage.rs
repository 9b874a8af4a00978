//! The databases of the services: opened, migrated or judged, and kept from a second owner.

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
};

use paperkey_kit::{
    changes::bell::Bell,
    clock::Clock,
    config::Config,
    db::{Database, DatabaseOptions, DatabaseUrl, DbError, Engine, MigrationState, MigrationStatus, migration_names},
    service::SERVICES,
};
use paperkey_migrations::{auth, catalog, licensing, webhook};

use crate::Failure;

/// Where a restored installation is written before it takes its place. While it is there, nobody serves the folder.
pub(crate) const RESTORING: &str = "restoring";

/// Opens a service's database.
pub(crate) async fn open(config: &Config, service: &'static str, clock: &Clock) -> Result<Database, Failure> {
    open_with(config, service, clock, None).await
}

async fn open_with(
    config: &Config,
    service: &'static str,
    clock: &Clock,
    bell: Option<Bell>,
) -> Result<Database, Failure> {
    let url = config.database_url();
    if let DatabaseUrl::Sqlite { folder } = &url {
        make_folder(folder)?;
        judge_restored(folder)?;
    }
    let mut options = DatabaseOptions::new(service, url, clock.clone());
    options.bell = bell;
    options.max_connections = config.database.max_connections;
    // On SQLite the caches of licences live in the one process that owns the file.
    options.feed = !(service == "licensing" && matches!(options.url, DatabaseUrl::Sqlite { .. }));
    Ok(Database::open(options).await?)
}

/// Opens a service's database for serving: migrated, or refused with what to do.
pub(crate) async fn open_current(config: &Config, service: &'static str, clock: &Clock) -> Result<Database, Failure> {
    open_serving(config, service, clock, None).await
}

/// The same, with the bell that its changes ring.
pub(crate) async fn open_serving(
    config: &Config,
    service: &'static str,
    clock: &Clock,
    bell: Option<Bell>,
) -> Result<Database, Failure> {
    let database = open_with(config, service, clock, bell).await?;
    make_current(&database, service).await?;
    Ok(database)
}

async fn make_current(database: &Database, service: &str) -> Result<(), Failure> {
    match database.engine() {
        Engine::Sqlite => migrate_up(database, service).await?,
        Engine::Postgres => {
            if let Some(problem) = schema_problem(database, service).await? {
                return Err(Failure(problem));
            }
        }
    }
    Ok(())
}

/// What keeps the schema from being served, if anything.
pub(crate) async fn schema_problem(database: &Database, service: &str) -> Result<Option<String>, Failure> {
    let known = match status(database, service).await {
        // It answers, and the schema of a process that serves goes nowhere by itself.
        Err(DbError::Overloaded) => return Ok(None),
        known => known,
    };
    let pending = known
        .map_err(|error| Failure(format!("the database of {service} cannot be reached: {error}")))?
        .into_iter()
        .filter(|migration| migration.state == MigrationState::Pending)
        .count();
    Ok((pending > 0).then(|| {
        format!("the schema of {service} is {pending} migrations behind: run `paperkey migrate up` and start again")
    }))
}

/// What is to be had of the databases that a configuration reaches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// All of them.
    All,
    /// Those that are there, of which there is one at least.
    Some,
}

/// Opens the databases that this configuration reaches, without making any that is not there yet. Another process may
/// have them open as well. Without `changes` a schema that is behind is refused, not migrated.
pub(crate) async fn open_present(
    config: &Config,
    clock: &Clock,
    wanted: Wanted,
    changes: bool,
) -> Result<Vec<(&'static str, Database)>, Failure> {
    let mut there = Vec::new();
    for service in SERVICES {
        if let DatabaseUrl::Sqlite { folder } = config.database_url()
            && !folder.join(format!("{service}.db")).try_exists()?
        {
            continue;
        }
        there.push(service);
    }
    // Before any is opened.
    are_there(&there, wanted)?;
    let mut databases = Vec::new();
    for service in there {
        let database = open(config, service, clock).await?;
        let applied = status(&database, service)
            .await
            .map_err(|error| Failure(format!("the database of {service} cannot be reached: {error}")))?
            .into_iter()
            .any(|migration| migration.state == MigrationState::Applied);
        if applied {
            databases.push((service, database));
        } else {
            database.close().await;
        }
    }
    are_there(&databases.iter().map(|(service, _)| *service).collect::<Vec<_>>(), wanted)?;
    for (service, database) in &databases {
        if changes {
            make_current(database, service).await?;
        } else if let Some(problem) = schema_problem(database, service).await? {
            return Err(Failure(problem));
        }
    }
    Ok(databases)
}

fn are_there(there: &[&str], wanted: Wanted) -> Result<(), Failure> {
    let missing: Vec<&str> = SERVICES.into_iter().filter(|service| !there.contains(service)).collect();
    let refused = match wanted {
        Wanted::All => !missing.is_empty(),
        Wanted::Some => there.is_empty(),
    };
    if refused {
        return Err(not_whole(&format!("there is no database of {}", missing.join(", "))));
    }
    Ok(())
}

/// What is said where a command would take a part of an installation for the whole.
pub(crate) fn not_whole(what: &str) -> Failure {
    Failure(format!(
        "{what}, and nothing was changed: see that --data and database.url are those of the installation, and that \
         all of it is there"
    ))
}

/// Migrates a service's database to the newest schema.
pub(crate) async fn migrate_up(database: &Database, service: &str) -> Result<(), DbError> {
    match service {
        "auth" => database.migrate_up::<auth::Migrator>().await,
        "catalog" => database.migrate_up::<catalog::Migrator>().await,
        "licensing" => database.migrate_up::<licensing::Migrator>().await,
        _ => database.migrate_up::<webhook::Migrator>().await,
    }
}

/// Takes back the last steps of a service's schema.
pub(crate) async fn migrate_down(database: &Database, service: &str, steps: u32) -> Result<(), DbError> {
    match service {
        "auth" => database.migrate_down::<auth::Migrator>(steps).await,
        "catalog" => database.migrate_down::<catalog::Migrator>(steps).await,
        "licensing" => database.migrate_down::<licensing::Migrator>(steps).await,
        _ => database.migrate_down::<webhook::Migrator>(steps).await,
    }
}

/// The migrations of a service, and which are applied.
pub(crate) async fn status(database: &Database, service: &str) -> Result<Vec<MigrationStatus>, DbError> {
    match service {
        "auth" => database.migration_status::<auth::Migrator>().await,
        "catalog" => database.migration_status::<catalog::Migrator>().await,
        "licensing" => database.migration_status::<licensing::Migrator>().await,
        _ => database.migration_status::<webhook::Migrator>().await,
    }
}

/// The migrations that this program knows of a service.
pub(crate) fn known_migrations(service: &str) -> Vec<String> {
    match service {
        "auth" => migration_names::<auth::Migrator>(),
        "catalog" => migration_names::<catalog::Migrator>(),
        "licensing" => migration_names::<licensing::Migrator>(),
        _ => migration_names::<webhook::Migrator>(),
    }
}

/// Keeps a second process from serving the same SQLite files: its caches would not see what the other writes. And a
/// restore from beginning, also where this process serves none of them. The locks end with the process, however that ends.
pub(crate) fn own(config: &Config, services: &[&str]) -> Result<Vec<File>, Failure> {
    let DatabaseUrl::Sqlite { folder } = config.database_url() else { return Ok(Vec::new()) };
    make_folder(&folder)?;
    let stays = stay(config)?;
    let locks = services.iter().map(|service| lock(&folder, service)).collect::<Result<Vec<_>, _>>()?;
    Ok(stays.into_iter().chain(locks).collect())
}

/// Keeps a restore from beginning for as long as what it gives lives, and refuses where one has begun. It makes nothing: the
/// lock is on the folder itself.
pub(crate) fn stay(config: &Config) -> Result<Option<File>, Failure> {
    let DatabaseUrl::Sqlite { folder } = config.database_url() else { return Ok(None) };
    let lock = match File::open(&folder) {
        Ok(lock) => lock,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Failure(format!("{} cannot be opened: {error}", folder.display()))),
    };
    match lock.try_lock_shared() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            return Err(Failure(format!(
                "a restore into {} is under way: try again when it is done",
                folder.display()
            )));
        }
        Err(TryLockError::Error(error)) => return Err(error.into()),
    }
    judge_restored(&folder)?;
    Ok(Some(lock))
}

/// Refuses a folder that is half of one installation and half of another.
fn judge_restored(folder: &Path) -> Result<(), Failure> {
    if folder.join(RESTORING).try_exists()? {
        return Err(Failure(format!(
            "a restore into {} was not brought to its end: run `paperkey restore` once more, with --force",
            folder.display()
        )));
    }
    Ok(())
}

/// What keeps everybody else from all of a folder, for as long as it lives.
pub(crate) fn hold_all(folder: &Path) -> Result<Vec<File>, Failure> {
    let mut held = SERVICES.into_iter().map(|service| lock(folder, service)).collect::<Result<Vec<_>, _>>()?;
    let all = File::open(folder)?;
    match all.try_lock() {
        Ok(()) => held.push(all),
        Err(TryLockError::WouldBlock) => {
            return Err(Failure(format!(
                "{} is in use by a gateway or by another command: try again when that has ended",
                folder.display()
            )));
        }
        Err(TryLockError::Error(error)) => return Err(error.into()),
    }
    Ok(held)
}

/// What keeps everybody else from a service's file in a folder, for as long as it lives.
fn lock(folder: &Path, service: &str) -> Result<File, Failure> {
    let path = folder.join(format!("{service}.lock"));
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(Failure(format!(
            "{} is served by another process: stop that one, or name another folder with --data",
            folder.display()
        ))),
        Err(TryLockError::Error(error)) => Err(error.into()),
    }
}

/// Makes a folder that only its owner reads.
pub(crate) fn make_folder(folder: &Path) -> Result<(), Failure> {
    if fs::metadata(folder).is_ok_and(|metadata| metadata.is_dir()) {
        return Ok(());
    }
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .map_err(|error| Failure(format!("the folder {} cannot be made: {error}", folder.display())))
}
