//! A backup put back in place of an installation.
//!
//! All of it is written into a folder of its own within the data folder and judged on the way, so nothing is changed by
//! a backup that is damaged. Then that folder gets the name beside which nobody starts to serve ([`storage::RESTORING`]),
//! what was there is moved aside, and what is in it into its place. So whenever this dies, either nothing has changed or
//! nobody serves until it is done again; and while it lives it holds the locks of those who serve. Within, and not beside:
//! a data folder may be where a file system is mounted, and nothing can be moved over that.
//!
//! Only what the product has made there is moved: of anything else this knows nothing, and it is in nobody's way. That
//! folder also says where what was there goes ([`Aside`]), so that all of it is in one place however often this dies.
//!
//! Deliberately absent: removing anything. What was there before is moved aside.

use std::{
    fs::{self, File, Metadata},
    io::{self, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use clap::Args;
use paperkey_kit::{
    clock::Clock,
    config::Config,
    db::DatabaseUrl,
    fail_point::{self, Point},
    service::SERVICES,
};
use rustix::process::geteuid;

use super::{
    AUDIT_HEAD, AUDIT_SPOOL, MAIL, Progress, SECRETS, Told, empty, make_private,
    manifest::{Held, Manifest},
    names_in, on_postgres, sync_folders, until_told, write_new,
};
use crate::{Failure, client, say, storage};

#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// The folder that `paperkey backup` has made
    dir: PathBuf,
    /// Where the data folder holds something: move that aside, within it
    #[arg(long)]
    force: bool,
}

pub(crate) async fn run(config: Config, command: &Restore) -> Result<(), Failure> {
    let (dir, force) = (command.dir.clone(), command.force);
    say(until_told(move |told| put_back(&config, &dir, force, told)).await?);
    Ok(())
}

fn put_back(config: &Config, dir: &Path, force: bool, told: &Told) -> Result<String, Failure> {
    let data = &config.server.data;
    let DatabaseUrl::Sqlite { folder } = config.database_url() else { return Err(on_postgres("restore")) };
    if folder != *data {
        return Err(Failure(format!(
            "database.url names a folder of its own: run this without it, and move the databases from {} to {} afterwards",
            data.display(),
            folder.display()
        )));
    }
    let manifest = Manifest::read(dir)?;
    manifest.judge_schemas(storage::known_migrations)?;

    storage::make_folder(data)?;
    let _held = storage::hold_all(data)?;
    let whose = fs::metadata(data)?.uid();
    if whose != geteuid().as_raw() {
        client::note(format_args!(
            "{} belongs to another user ({whose}), who is not given what is restored there: run this as that user, or give \
             it to them before the next start",
            data.display()
        ));
    }
    let (work, draft) = (data.join(storage::RESTORING), data.join(DRAFT));
    let old = old_in(data)?;
    if let (Some(first), false) = (old.first(), force) {
        return Err(Failure(format!(
            "{} holds {first}{}: name another folder with --data, or move what is there aside with --force",
            data.display(),
            if old.len() > 1 { " and more" } else { "" }
        )));
    }
    // One who died in the middle of it has said where what was there goes.
    let aside = if work.try_exists()? { Aside::of_one_who_died(&work, &draft)? } else { None };
    let aside = aside.unwrap_or_else(Aside::new);
    // The copy of a backup that one who died was at.
    fs::remove_dir_all(&draft).or_else(unless_missing)?;
    make_private(&draft)?;
    let unfinished = Unfinished(&draft);
    let total = manifest.files.iter().map(|file| file.bytes).sum();
    let progress = Progress::of("restoring");
    for file in &manifest.files {
        told.judge()?;
        let mut outcome = Ok(());
        write_new(&draft, &file.path, |copy| {
            outcome = file.read(dir, |bytes| {
                progress.add(bytes.len() as u64, total);
                copy.write_all(bytes)
            });
            // Named below, by the one of the two that is at fault.
            Ok(())
        })?;
        outcome?;
    }
    progress.end();
    aside.note_in(&draft)?;
    sync_folders(&draft)?;
    for name in old_in(data)? {
        judge_movable(data, &name)?;
    }
    told.judge()?;
    fail_point::reach(Point::RestoreBeforeMove);
    // From here on it is brought to its end: until then, nobody serves this folder.
    if work.try_exists()? {
        // It stays until this takes its place, which from now on says what it said.
        fs::remove_file(work.join(Aside::NAME)).or_else(unless_missing)?;
        empty(&work)?;
    }
    fs::rename(&draft, &work)?;
    drop(unfinished);
    File::open(data)?.sync_all()?;
    let aside = replace(data, &work, &aside).map_err(|failure| {
        let data = data.display();
        Failure(format!("{failure}; nobody serves {data} until `paperkey restore --force` is brought to its end"))
    })?;
    // In one step, so that nobody finds it without what it says.
    fs::rename(&work, &draft)?;
    File::open(data)?.sync_all()?;
    fs::remove_dir_all(&draft)?;

    let mut text = format!("{} is as it was at {}", data.display(), manifest.taken_at);
    if let Some(aside) = aside {
        text = format!("{text}; what it held is in {}", aside.display());
    }
    text.push_str(match manifest.keys {
        Held::Included => "",
        Held::LeftOut => {
            "\nThe keys are not in this backup: put the folder `secrets` of that installation there before the next start"
        }
        Held::Given => "\nThe keys are not in this backup: the configuration has to give those of that installation",
    });
    text.push_str(
        "\nWhat happened after that moment is gone, and so are revocations: keys, sessions, licences and members that were \
         revoked, signed out or removed since then are good again. Revoke them anew before you let anybody in. Events \
         that were under way may be delivered once more, under the same ids",
    );
    Ok(text)
}

/// Where a restored installation is written. Once all of it is there, it gets the name that nobody serves beside.
const DRAFT: &str = "restoring.partial";

/// How the folders are called where that goes which was there before.
const ASIDE: &str = "before-restore-";

/// What SQLite writes beside a database. It belongs to that one alone, and would be read into any other.
const LOGS: [&str; 3] = ["-wal", "-shm", "-journal"];

/// What has to make room, in the order in which it does: the log of a database before the database itself, which is not
/// the same without.
fn old_in(data: &Path) -> io::Result<Vec<String>> {
    let known = SERVICES.into_iter().flat_map(|service| {
        let database = format!("{service}.db");
        LOGS.map(|log| format!("{database}{log}")).into_iter().chain([database.clone()])
    });
    let known: Vec<String> = known.chain([AUDIT_SPOOL, AUDIT_HEAD, MAIL, SECRETS].map(str::to_owned)).collect();
    let there = names_in(data)?;
    Ok(known.into_iter().filter(|name| there.contains(name)).collect())
}

/// Refuses what could not be moved, while nothing has been.
fn judge_movable(data: &Path, name: &str) -> Result<(), Failure> {
    let path = data.join(name);
    let (folder, entry) = (fs::metadata(data)?, fs::symlink_metadata(&path)?);
    if entry.dev() != folder.dev() || is_mounted(&path) {
        return Err(Failure(format!(
            "{} is mounted there, and cannot be moved aside: nothing was changed; unmount it, or name another folder with \
             --data",
            path.display()
        )));
    }
    if !may_move(&folder, &entry, geteuid().as_raw()) {
        return Err(Failure(format!(
            "{} belongs to another user ({}), and cannot be moved aside: nothing was changed; run this as the user of {}",
            path.display(),
            entry.uid(),
            data.display()
        )));
    }
    Ok(())
}

/// Whether a user may move an entry of a folder that they can write to into another.
fn may_move(folder: &Metadata, entry: &Metadata, user: u32) -> bool {
    const STICKY: u32 = 0o1000;
    let is_ours = entry.uid() == user;
    let is_kept = folder.mode() & STICKY != 0 && !is_ours && folder.uid() != user;
    // A folder that is moved is written to: it says what it is in.
    let is_writable = !entry.is_dir() || is_ours && entry.mode() & 0o200 != 0;
    user == 0 || (!is_kept && is_writable)
}

/// Whether something is mounted at a path, also of the same file system.
fn is_mounted(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let Ok(path) = path.canonicalize() else { return false };
    mounts.lines().filter_map(|line| line.split(' ').nth(4)).any(|mount| Path::new(mount) == path)
}

/// Moves what was there aside, and what was restored into its place. Says where the former is, if there was any.
fn replace(data: &Path, work: &Path, aside: &Aside) -> Result<Option<PathBuf>, Failure> {
    // Anew: who does not know the locks may have been there in the meantime.
    let aside = aside.take(data, work)?;
    for name in names_in(work)?.into_iter().filter(|name| !name.starts_with('.')) {
        let beside = LOGS.map(|log| format!("{name}{log}"));
        for name in [&name].into_iter().chain(&beside) {
            if fs::symlink_metadata(data.join(name)).is_ok() {
                let path = data.join(name);
                return Err(Failure(format!("{} has come just now: somebody else writes there", path.display())));
            }
        }
        fs::rename(work.join(&name), data.join(&name)).map_err(|error| unmoved(&name, &error))?;
        fail_point::reach(Point::RestoreMoving);
    }
    File::open(data)?.sync_all()?;
    Ok(aside)
}

fn unmoved(name: &str, error: &io::Error) -> Failure {
    Failure(format!("{name} cannot be moved: {error}"))
}

/// Where that goes which was there before.
struct Aside {
    /// The name of the folder.
    name: String,
    /// Whether all of it is there. What stands in the data folder then is half of a backup.
    is_whole: bool,
}

impl Aside {
    /// The files of a folder [`storage::RESTORING`] that say so. They are no part of what is restored.
    const NAME: &str = ".aside";
    const WHOLE: &str = ".aside-is-whole";

    fn new() -> Self {
        Self { name: format!("{ASIDE}{}", Clock::system().now_ms()), is_whole: false }
    }

    /// What one who died has noted. Where it died as it put a newer copy in the place of an older one, that copy says it.
    fn of_one_who_died(work: &Path, draft: &Path) -> Result<Option<Self>, Failure> {
        for name in [Self::WHOLE, Self::NAME] {
            if !work.join(Self::NAME).try_exists()? && draft.join(name).try_exists()? {
                fs::rename(draft.join(name), work.join(name))?;
            }
        }
        let Ok(name) = fs::read_to_string(work.join(Self::NAME)) else { return Ok(None) };
        let is_ours = name.strip_prefix(ASIDE).is_some_and(|at| at.bytes().all(|byte| byte.is_ascii_digit()));
        let is_whole = work.join(Self::WHOLE).try_exists()?;
        Ok(is_ours.then_some(Self { name, is_whole }))
    }

    fn note_in(&self, folder: &Path) -> Result<(), Failure> {
        write_new(folder, Self::NAME, |file| file.write_all(self.name.as_bytes()))?;
        if self.is_whole { Self::note_whole(folder) } else { Ok(()) }
    }

    fn note_whole(folder: &Path) -> Result<(), Failure> {
        write_new(folder, Self::WHOLE, |_| Ok(()))
    }

    /// Moves there what is in the way. Says where that is, if there is any.
    fn take(&self, data: &Path, work: &Path) -> Result<Option<PathBuf>, Failure> {
        let aside = data.join(&self.name);
        // What another one had put back when it died is no part of what was there before it.
        let half = aside.join(format!("half-restored-{}", Clock::system().now_ms()));
        for name in old_in(data)? {
            let is_half = self.is_whole || fs::symlink_metadata(aside.join(&name)).is_ok();
            make_private(&aside)?;
            let to = if is_half { &half } else { &aside };
            make_private(to)?;
            fs::rename(data.join(&name), to.join(&name)).map_err(|error| unmoved(&name, &error))?;
        }
        let is_there = aside.try_exists()?;
        if is_there {
            sync_folders(&aside)?;
        }
        if !self.is_whole {
            Self::note_whole(work)?;
            File::open(work)?.sync_all()?;
        }
        Ok(is_there.then_some(aside))
    }
}

fn unless_missing(error: io::Error) -> io::Result<()> {
    if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}

/// What was begun, and goes where it is not brought to its end.
struct Unfinished<'p>(&'p Path);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        // Where that fails the next one does it, and nobody serves until then.
        let _ = fs::remove_dir_all(self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_product_has_made_has_to_make_room_and_logs_first() {
        let data = std::env::temp_dir().join(format!("paperkey-restore-{}", std::process::id()));
        for folder in ["secrets", "lost+found", "mail"] {
            fs::create_dir_all(data.join(folder)).unwrap();
        }
        for file in ["auth.db", "auth.db-wal", "auth.db-shm", "auth.lock", "thesis.db", "audit-head", "notes.txt"] {
            fs::write(data.join(file), "").unwrap();
        }
        let old = old_in(&data).unwrap();
        assert_eq!(old, ["auth.db-wal", "auth.db-shm", "auth.db", "audit-head", "mail", "secrets"]);
        for name in &old {
            judge_movable(&data, name).unwrap();
        }
        let (folder, file) = (fs::metadata(data.join("mail")).unwrap(), fs::metadata(data.join("auth.db")).unwrap());
        let (own, other) = (folder.uid(), folder.uid() + 1);
        assert!(may_move(&folder, &folder, own) && may_move(&folder, &file, other));
        assert!(!may_move(&folder, &folder, other), "somebody else's folder cannot be moved into another");
        assert!(is_mounted(Path::new("/proc")) && !is_mounted(&data));
        fs::remove_dir_all(&data).unwrap();
    }

    #[test]
    fn what_was_there_is_in_one_place_however_often_a_restore_dies() {
        let data = std::env::temp_dir().join(format!("paperkey-aside-{}", std::process::id()));
        let (work, draft) = (data.join(storage::RESTORING), data.join(DRAFT));
        for folder in [&work, &draft] {
            fs::create_dir_all(folder).unwrap();
        }
        fs::write(data.join("auth.db"), "before").unwrap();
        fs::write(data.join("auth.db-wal"), "before").unwrap();
        let first = Aside::new();
        // It died as its copy was about to take the place of an older one, and was emptied already.
        first.note_in(&draft).unwrap();
        let aside = Aside::of_one_who_died(&work, &draft).unwrap().unwrap();
        assert_eq!((&aside.name, aside.is_whole), (&first.name, false));
        // And before the database followed its log.
        make_private(&data.join(&aside.name)).unwrap();
        fs::rename(data.join("auth.db-wal"), data.join(&aside.name).join("auth.db-wal")).unwrap();
        let folder = aside.take(&data, &work).unwrap().unwrap();
        assert_eq!(names_in(&folder).unwrap(), ["auth.db", "auth.db-wal"]);

        // And as half of the backup was in its place.
        fs::write(data.join("auth.db"), "restored").unwrap();
        fs::write(data.join("audit-head"), "restored").unwrap();
        let aside = Aside::of_one_who_died(&work, &draft).unwrap().unwrap();
        assert!(aside.is_whole);
        assert_eq!(aside.take(&data, &work).unwrap().as_ref(), Some(&folder));
        assert_eq!(fs::read_to_string(folder.join("auth.db")).unwrap(), "before");
        assert!(!folder.join("audit-head").exists() && old_in(&data).unwrap().is_empty());
        // A log that has come in the meantime does not land beside a database that it is not of.
        fs::write(work.join("auth.db"), "restored").unwrap();
        fs::write(data.join("auth.db-wal"), "foreign").unwrap();
        replace(&data, &work, &aside).unwrap();
        assert!(data.join("auth.db").exists() && !data.join("auth.db-wal").exists());
        fs::remove_dir_all(&data).unwrap();
    }
}
