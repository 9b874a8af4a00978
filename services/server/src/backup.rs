//! `paperkey backup` and `paperkey restore`: an installation on SQLite, copied while it runs, and put back.
//!
//! A backup is of one moment, at which no writer of any database was at work ([`Snapshots`]). What stands beside the
//! databases is taken so that it fits that moment:
//!
//! - the keys twice, before it and after it, since they come before they are used and go when they are not;
//! - `audit-head` before it: the file may lag behind the log, and must not be ahead of it;
//! - the spool of the audit log at it: what waits there is taken out once the database has it, and it was not writing;
//! - mails after it: what the database no longer has was written by then.
//!
//! A folder under a name of its own (`DIR.partial`) becomes `DIR` when all of it is on disk, the manifest last. Whoever
//! finds a `DIR` finds a whole backup.
//!
//! Deliberately absent: PostgreSQL, which has better means of its own; increments; other machines. What is in a folder is
//! for other programs to carry.

mod keys;
mod manifest;
mod restore;
mod spool;

use std::{
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io::{self, IsTerminal as _, Write},
    ops::ControlFlow,
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use paperkey_kit::{
    clock::Clock,
    config::Config,
    db::{Copied, DatabaseUrl, Snapshots},
    fail_point::{self, Point},
    service::SERVICES,
    values::rfc3339,
};
use rustix::process::geteuid;

use self::{
    keys::Keys,
    manifest::{Held, Manifest},
};
use crate::{Failure, client, process::Signals, say, storage};

pub(crate) use restore::{Restore, run as restore};

/// The names that an installation gives to what stands beside its databases.
const SECRETS: &str = "secrets";
const AUDIT_HEAD: &str = "audit-head";
const AUDIT_SPOOL: &str = "audit-spool";
const MAIL: &str = "mail";

#[derive(Debug, Args)]
pub(crate) struct Backup {
    /// The folder that the backup becomes; it must not be there yet, or be empty
    dir: PathBuf,
    /// Leave the keys out, to keep them elsewhere
    #[arg(long)]
    without_keys: bool,
}

/// Whether a command was told to end.
#[derive(Clone, Debug, Default)]
struct Told(Arc<AtomicBool>);

impl Told {
    fn judge(&self) -> Result<(), Failure> {
        if self.0.load(Ordering::SeqCst) {
            return Err(Failure("told to end before it was done; nothing is left of it".to_owned()));
        }
        Ok(())
    }
}

/// Does work that blocks, which is told when the process is told to end.
async fn until_told<T: Send + 'static>(
    work: impl FnOnce(&Told) -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    let told = Told::default();
    let mut signals = Signals::new()?;
    let for_work = told.clone();
    let mut working = tokio::task::spawn_blocking(move || work(&for_work));
    tokio::select! {
        done = &mut working => done?,
        () = signals.received() => {
            told.0.store(true, Ordering::SeqCst);
            tokio::select! {
                done = working => done?,
                // Whoever asks twice does not wait for what blocks. What is left is known by its name.
                () = signals.received() => std::process::exit(1),
            }
        }
    }
}

pub(crate) async fn run(config: Config, command: &Backup) -> Result<(), Failure> {
    let (dir, without_keys) = (command.dir.clone(), command.without_keys);
    say(until_told(move |told| take(&config, &dir, without_keys, told)).await?);
    Ok(())
}

fn take(config: &Config, dir: &Path, without_keys: bool, told: &Told) -> Result<String, Failure> {
    let DatabaseUrl::Sqlite { folder } = config.database_url() else { return Err(on_postgres("backup")) };
    let data = config.server.data.clone();
    let _stays = storage::stay(config)?;
    let missing: Vec<&str> =
        SERVICES.into_iter().filter(|service| !folder.join(format!("{service}.db")).is_file()).collect();
    if !missing.is_empty() {
        return Err(storage::not_whole(&format!("there is no database of {}", missing.join(", "))));
    }
    let held = match (without_keys, config.keys_are_given()) {
        (true, _) => Held::LeftOut,
        (false, true) => Held::Given,
        (false, false) => Held::Included,
    };
    let keys = || if without_keys { Ok(Keys::default()) } else { Keys::read(&config.key_folder(), held) };

    let draft = Draft::of(dir)?;
    let began = Instant::now();
    let (before, head) = (keys()?, file_if_there(&data.join(AUDIT_HEAD))?);
    let taken_at_ms = Clock::system().now_ms();
    let (files, spool) = Snapshots::take(&folder, &SERVICES, || {
        fail_point::reach(Point::BackupHolding);
        spool::of(&data.join(AUDIT_SPOOL))
    })?;
    let after = keys()?;
    client::note(format!("writers were held for {:.1?}; copying", files.held_for()));

    let mut manifest = Manifest::new(rfc3339(taken_at_ms), held);
    for file in files.files() {
        let name = format!("{}.db", file.service());
        let progress = Progress::of(&name);
        let copied = file
            .copy_to(&draft.path().join(&name), |copied| {
                progress.tell(copied);
                fail_point::reach(Point::BackupCopying);
                if told.judge().is_err() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            })
            .map_err(|error| Failure(format!("{} cannot be copied to {}: {error}", name, dir.display())))?;
        progress.end();
        told.judge()?;
        manifest.schemas.insert(file.service().to_owned(), copied.unwrap_or_default());
        manifest.add(draft.path(), &name)?;
    }
    let held_for = files.held_for();
    // What is copied is not held any longer than it must be: the logs of the originals grow meanwhile.
    drop(files);
    let mut beside = after.with_earlier(before).into_files();
    beside.extend(head.map(|bytes| (AUDIT_HEAD.to_owned(), bytes)));
    for (name, bytes) in beside {
        draft.write(&name, &bytes)?;
        manifest.add(draft.path(), &name)?;
        told.judge()?;
    }
    for segment in spool {
        let name = segment.name().to_owned();
        write_new(draft.path(), &name, |file| segment.copy_to(file))?;
        manifest.add(draft.path(), &name)?;
        told.judge()?;
    }
    for name in mails(&data.join(MAIL))? {
        // A person may have taken it away.
        if let Some(bytes) = file_if_there(&data.join(&name))? {
            draft.write(&name, &bytes)?;
            manifest.add(draft.path(), &name)?;
        }
        told.judge()?;
    }
    manifest.write(|name, bytes| draft.write(name, bytes))?;
    draft.sync()?;
    fail_point::reach(Point::BackupBeforeRename);
    told.judge()?;
    draft.becomes(dir)?;

    let (count, bytes) = (manifest.files.len(), manifest.files.iter().map(|file| file.bytes).sum::<u64>());
    Ok(format!(
        "{} holds this installation as it was at {}: {count} files, {bytes} bytes, in {:.1?}; its writers were held for \
         {held_for:.1?}\n{}",
        dir.display(),
        manifest.taken_at,
        began.elapsed(),
        held.in_words(dir)
    ))
}

fn on_postgres(command: &str) -> Failure {
    Failure(format!(
        "paperkey {command} is for an installation on SQLite: database.url names PostgreSQL, which is backed up by \
         pg_dump of its four schemas in one run, or by continuous archiving; keep beside that the secrets of the \
         configuration, and of the data folders audit-head, audit-spool and mail"
    ))
}

/// The bytes of a file, where there is one.
fn file_if_there(path: &Path) -> Result<Option<Vec<u8>>, Failure> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(unreadable(path, &error)),
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Failure {
    Failure(format!("{} cannot be read: {error}", path.display()))
}

/// The names in a folder, in one order; none where there is no folder.
fn names_in(folder: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let names = entries.map(|entry| entry.map(|entry| entry.file_name().into_string()));
    let mut names: Vec<String> = names.collect::<io::Result<Vec<_>>>()?.into_iter().filter_map(Result::ok).collect();
    names.sort();
    Ok(names)
}

fn mails(folder: &Path) -> io::Result<Vec<String>> {
    let written = names_in(folder)?.into_iter().filter(|name| is_a("eml", name));
    Ok(written.map(|name| format!("{MAIL}/{name}")).collect())
}

fn is_a(kind: &str, name: &str) -> bool {
    Path::new(name).extension().is_some_and(|extension| extension == kind)
}

/// Whether a path in a backup is one that an installation has, and leads nowhere else.
fn is_ours(path: &str) -> bool {
    let parts: Vec<&str> = path.split('/').collect();
    let is_name = |name: &str| !name.is_empty() && !name.starts_with('.') && !name.contains('\\');
    parts.iter().all(|part| is_name(part))
        && match parts.as_slice() {
            [name] => {
                *name == AUDIT_HEAD || name.strip_suffix(".db").is_some_and(|service| SERVICES.contains(&service))
            }
            [folder, name] => (*folder == SECRETS && !is_a("lock", name)) || (*folder == MAIL && is_a("eml", name)),
            [folder, _, name] => *folder == AUDIT_SPOOL && is_a("spool", name),
            _ => false,
        }
}

/// A backup that is not whole yet. It goes with this value, unless it has become one.
struct Draft {
    path: PathBuf,
    /// Another one at work on the same finds it held.
    lock: File,
    kept: bool,
}

impl Draft {
    fn of(dir: &Path) -> Result<Self, Failure> {
        let nowhere = || Failure(format!("{} is no name that a folder can have here", dir.display()));
        let name = dir.file_name().ok_or_else(nowhere)?;
        if let Ok(there) = fs::symlink_metadata(dir) {
            if !there.is_dir() || fs::read_dir(dir)?.next().is_some() {
                return Err(Failure(format!("{} is there already, and not an empty folder", dir.display())));
            }
            let above = fs::metadata(dir.join(".."))?;
            if above.dev() != there.dev() {
                let text = format!("{} is where a file system is mounted: name a folder in it", dir.display());
                return Err(Failure(text));
            }
        }
        if let Some(parent) = dir.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            storage::make_folder(parent)?;
        }
        let mut partial = name.to_owned();
        partial.push(".partial");
        let path = dir.with_file_name(partial);
        make_private(&path)?;
        judge_private(&path)?;
        let lock = File::open(&path)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Failure(format!("another backup to {} is under way", dir.display())));
            }
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        let left: Vec<String> = names_in(&path)?;
        // What a killed one has left is ours to remove; anything else is not.
        let stranger = left.iter().find(|name| {
            let known = [SECRETS, MAIL, AUDIT_SPOOL, AUDIT_HEAD, manifest::NAME, manifest::SUM];
            let database = name.split_once(".db").is_some_and(|(service, _)| SERVICES.contains(&service));
            !known.contains(&name.as_str()) && !database
        });
        if let Some(stranger) = stranger {
            return Err(Failure(format!(
                "{} holds {stranger}, which no backup has left there: move it away",
                path.display()
            )));
        }
        empty(&path)?;
        Ok(Self { path, lock, kept: false })
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Failure> {
        write_new(&self.path, name, |file| file.write_all(bytes))
    }

    fn sync(&self) -> io::Result<()> {
        sync_folders(&self.path)
    }

    fn becomes(mut self, dir: &Path) -> Result<(), Failure> {
        fs::rename(&self.path, dir).map_err(|error| Failure(format!("{} cannot be made: {error}", dir.display())))?;
        self.kept = true;
        self.lock.unlock()?;
        let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
        File::open(parent)?.sync_all()?;
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.kept {
            // Where that fails the next one does it.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// A folder for its owner alone, whatever the mask of the process.
fn make_private(folder: &Path) -> Result<(), Failure> {
    match DirBuilder::new().mode(0o700).create(folder) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && folder.is_dir() => Ok(()),
        Err(error) => Err(Failure(format!("the folder {} cannot be made: {error}", folder.display()))),
    }
}

/// Refuses a folder that was there before, and is not ours alone: what is written there would be read or changed by others,
/// or be somewhere else.
fn judge_private(folder: &Path) -> Result<(), Failure> {
    let there = fs::symlink_metadata(folder)?;
    let is_ours = there.is_dir() && there.uid() == geteuid().as_raw() && there.mode().trailing_zeros() >= 6;
    if is_ours {
        return Ok(());
    }
    Err(Failure(format!(
        "{} is there already, and is not a folder of this user's alone: look what it is, and move it away",
        folder.display()
    )))
}

fn empty(folder: &Path) -> io::Result<()> {
    for name in fs::read_dir(folder)? {
        let path = name?.path();
        if path.is_dir() { fs::remove_dir_all(path)? } else { fs::remove_file(path)? }
    }
    Ok(())
}

/// Writes a file of a folder, with the folders that it is in, for its owner alone, and durably.
fn write_new(folder: &Path, name: &str, fill: impl FnOnce(&mut File) -> io::Result<()>) -> Result<(), Failure> {
    let path = folder.join(name);
    let mut made = folder.to_owned();
    for part in Path::new(name).parent().into_iter().flat_map(Path::components) {
        made.push(part);
        make_private(&made)?;
    }
    let written = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).and_then(|mut file| {
        fill(&mut file)?;
        file.sync_all()
    });
    written.map_err(|error| Failure(format!("{} cannot be written: {error}", path.display())))
}

/// Makes durable what a folder and all in it say of their files.
fn sync_folders(folder: &Path) -> io::Result<()> {
    for name in names_in(folder)? {
        let path = folder.join(name);
        if path.is_dir() {
            sync_folders(&path)?;
        }
    }
    File::open(folder)?.sync_all()
}

/// How far a file is: drawn for a person, passed over where there is none.
struct Progress(ProgressBar);

impl Progress {
    fn of(name: &str) -> Self {
        let bar = if io::stderr().is_terminal() { ProgressBar::new(0) } else { ProgressBar::hidden() };
        if let Ok(style) = ProgressStyle::with_template("{msg:14} {bar:40} {percent}%, {eta} left") {
            bar.set_style(style);
        }
        bar.set_message(name.to_owned());
        Self(bar)
    }

    fn tell(&self, copied: Copied) {
        self.0.set_length(copied.of);
        self.0.set_position(copied.pages);
        if copied.pages == copied.of {
            self.0.set_message("looking whether it is whole");
        }
    }

    fn add(&self, bytes: u64, of: u64) {
        self.0.set_length(of);
        self.0.inc(bytes);
    }

    fn end(&self) {
        self.0.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_leads_nowhere_but_into_the_installation() {
        for path in [
            "auth.db",
            "audit-head",
            "secrets/master.key",
            "secrets/master.0a1b2c3d.previous",
            "mail/msg_1.eml",
            "audit-spool/0/00000000000000000001.spool",
        ] {
            assert!(is_ours(path), "{path}");
        }
        for path in [
            "",
            "/etc/passwd",
            "../auth.db",
            "secrets/../../x",
            "secrets/..",
            "secrets/system.lock",
            "auth.lock",
            "other.db",
            "auth.db-wal",
            "mail/x.exe",
            "audit-spool/0/lock",
            "restoring/auth.db",
            "secrets//master.key",
        ] {
            assert!(!is_ours(path), "{path}");
        }
    }

    #[test]
    fn a_draft_removes_what_it_knows_and_nothing_else() {
        let folder = std::env::temp_dir().join(format!("paperkey-draft-{}", std::process::id()));
        let dir = folder.join("monday");
        let draft = Draft::of(&dir).unwrap();
        draft.write("secrets/master.key", b"x").unwrap();
        assert!(Draft::of(&dir).is_err_and(|failure| failure.0.contains("under way")));
        let partial = draft.path().to_owned();
        drop(draft);
        assert!(!partial.exists());
        // As a killed one leaves it.
        make_private(&partial).unwrap();
        fs::create_dir(partial.join("mail")).unwrap();
        fs::write(partial.join("auth.db-journal"), "").unwrap();
        let draft = Draft::of(&dir).unwrap();
        assert_eq!(names_in(&partial).unwrap(), Vec::<String>::new());
        drop(draft);
        make_private(&partial).unwrap();
        fs::write(partial.join("thesis.txt"), "mine").unwrap();
        assert!(Draft::of(&dir).is_err_and(|failure| failure.0.contains("thesis.txt")));
        assert!(partial.join("thesis.txt").exists());
        fs::remove_dir_all(&partial).unwrap();
        // As somebody leaves it who would like to read along.
        let not_ours = || Draft::of(&dir).is_err_and(|failure| failure.0.contains("not a folder of this user's alone"));
        DirBuilder::new().mode(0o700).create(folder.join("elsewhere")).unwrap();
        std::os::unix::fs::symlink(folder.join("elsewhere"), &partial).unwrap();
        assert!(not_ours());
        fs::remove_file(&partial).unwrap();
        fs::create_dir(&partial).unwrap();
        fs::set_permissions(&partial, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        assert!(not_ours());
        fs::remove_dir_all(&folder).unwrap();
    }
}
