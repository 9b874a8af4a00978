//! `paperkey admin rotate-secrets`: another master key, and everything sealed anew under it, while the product runs.
//!
//! Where the keys are kept in the data folder, the command changes them there, one durable step after another, and waits
//! between the steps until every running process has seen the last one. Whenever it dies, the next one goes on. Where the
//! keys are given by the configuration, people change them, and the command says in which order.
//!
//! Then all that is sealed is walked through, service by service, until a whole walk finds nothing that is sealed under
//! another key. Both can be done again at any time.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    io::{IsTerminal as _, stderr},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use paperkey_kit::{
    clock::Clock,
    config::Config,
    db::Database,
    secrets::{FOLLOWED_WITHIN, KeyFolder, KeyId, Keyring, Resealed, Rotation, SealedColumn, reseal},
};

use crate::{
    Failure, say,
    storage::{self, Wanted},
};

/// Walks after which whatever still seals under another key will not stop doing so.
const MAX_WALKS: u32 = 20;
/// How long is waited between walks, for what was locked or under way.
const BETWEEN_WALKS: Duration = Duration::from_millis(500);
/// After which nothing is kept any more that was sealed before: twice as long as a transaction may take, since it may
/// have waited for its turn.
const SETTLED_WITHIN: Duration = Duration::from_secs(30);
/// How often is told how far it is, where nobody watches a terminal.
const TELL_EVERY: Duration = Duration::from_secs(5);

pub(crate) async fn run(config: &Config, status: bool, retire: bool) -> Result<(), Failure> {
    settled(config, status, retire, SETTLED_WITHIN).await
}

async fn settled(config: &Config, status: bool, retire: bool, settled_within: Duration) -> Result<(), Failure> {
    let _stays = storage::stay(config)?;
    // Whoever takes a part of an installation for the whole removes keys that the rest needs.
    let wanted = if config.keys_are_given() {
        Wanted::Some
    } else if KeyFolder::is_complete(&config.key_folder())? {
        Wanted::All
    } else {
        return Err(storage::not_whole(&format!("the keys are not all in {}", config.key_folder().display())));
    };
    let databases = storage::open_present(config, &Clock::system(), wanted, !status).await?;
    let keys = config.keyring()?;
    if !status {
        // Before the master key is another: what they are derived from today is what they must stay.
        for (service, database) in &databases {
            keys.clone().with_kept(database, service).await?;
        }
    }
    let work = Work { keys, databases, settled_within, progress: Progress::new() };
    let outcome = if status {
        work.status().await
    } else if config.keys_are_given() {
        work.rotate_given(retire).await
    } else if retire {
        work.retire(config).await
    } else {
        work.rotate(config).await
    };
    work.progress.end();
    for (_, database) in work.databases {
        database.close().await;
    }
    say(outcome?);
    Ok(())
}

struct Work {
    keys: Keyring,
    databases: Vec<(&'static str, Database)>,
    settled_within: Duration,
    progress: Progress,
}

/// What a walk through everything has found, by service, table and column.
#[derive(Default)]
struct Walk(BTreeMap<String, Resealed>);

impl Work {
    /// What is sealed under which key.
    async fn status(&self) -> Result<String, Failure> {
        let walk = self.walk(false).await?;
        let mut text = self.known_keys();
        for (place, found) in &walk.0 {
            for (key, rows) in &found.under {
                let key = key.map_or_else(|| "unknown ".to_owned(), |key| key.to_string());
                // Writing to a String cannot fail.
                let _ = write!(text, "\n{key}  {rows:>9}  {place}");
            }
        }
        text.push_str(&walk.unopened());
        Ok(text)
    }

    /// Changes the key of the data folder.
    async fn rotate(&self, config: &Config) -> Result<String, Failure> {
        let folder = KeyFolder::hold(&config.key_folder())?;
        let before = folder.rotation()?;
        if before != Rotation::None {
            self.progress.say("going on with a change of the master key that was not brought to its end");
        }
        if before != Rotation::UnderWay {
            folder.announce()?;
            self.progress.say("a new master key is made; running processes learn of it");
            self.let_others_follow().await;
            folder.make_current()?;
        }
        // Also where another did that: it may have died a moment ago.
        self.keys.look();
        self.progress.say("the new master key seals; running processes learn of it");
        self.let_others_follow().await;
        let (walk, resealed) = self.walk_until_done().await?;
        folder.finish()?;
        let mut text = self.done(resealed);
        text.push_str(
            "\nThe older keys are still there: `paperkey admin rotate-secrets --retire` removes them. \
             Keep them with backups that were made before.",
        );
        walk.judge(text)
    }

    /// Removes the keys of the data folder that nothing is sealed under.
    async fn retire(&self, config: &Config) -> Result<String, Failure> {
        let folder = KeyFolder::hold(&config.key_folder())?;
        if folder.rotation()? != Rotation::None {
            return Err(Failure(
                "a change of the master key was not brought to its end: run `paperkey admin rotate-secrets` first"
                    .to_owned(),
            ));
        }
        self.keys.look();
        let (walk, unused) = self.walk_twice().await?;
        let retired = folder.retire(|id| !unused.contains(&id))?;
        self.keys.look();
        let mut text = match retired.as_slice() {
            [] => "no key was removed".to_owned(),
            ids => format!("removed, since nothing is sealed under them: {}", list(ids)),
        };
        let others = self.keys.other_master_ids();
        if !others.is_empty() {
            let _ = write!(
                text,
                "\nstill in use: {}; `paperkey admin rotate-secrets` seals everything anew",
                list(&others)
            );
        }
        walk.judge(text)
    }

    /// Seals anew under the key that the configuration gives, or says how to give another.
    async fn rotate_given(&self, retire: bool) -> Result<String, Failure> {
        let others = self.keys.other_master_ids();
        if retire || others.is_empty() {
            if retire {
                let (walk, unused) = self.walk_twice().await?;
                return walk.judge(self.droppable(&unused));
            }
            let (walk, steps) = (self.walk(false).await?, self.steps());
            if !walk.unopened().is_empty() {
                // They hold a key, and what failed may be kept in a log.
                self.progress.end();
                say(steps);
                return walk.judge(self.known_keys());
            }
            return Ok(steps);
        }
        let (walk, resealed) = self.walk_until_done().await?;
        let unused: Vec<KeyId> = others.into_iter().filter(|id| !walk.keys().contains(id)).collect();
        walk.judge(format!("{}\n{}", self.done(resealed), self.droppable(&unused)))
    }

    fn droppable(&self, unused: &[KeyId]) -> String {
        if unused.is_empty() {
            return "No key may be dropped from secrets.previous_master_keys.".to_owned();
        }
        format!(
            "Nothing is sealed under {} in the databases that were looked at: {}. If those are all, and every process seals \
             under {} already, that may be dropped from secrets.previous_master_keys; a key that is yet to become \
             secrets.master_key stays.",
            list(unused),
            self.databases.iter().map(|(service, _)| *service).collect::<Vec<_>>().join(", "),
            self.keys.master_id()
        )
    }

    fn steps(&self) -> String {
        format!(
            "The master key of this installation ({}) is given by its configuration, so that is where it changes:\n\n\
             1. Add a new key to secrets.previous_master_keys of every process, and restart them one after the other. \
             From then on\n   each can open what is sealed under it. This one was made just now, and is kept nowhere:\n\n     \
             PAPERKEY__SECRETS__PREVIOUS_MASTER_KEYS='[\"{}\"]'\n\n\
             2. Make it secrets.master_key of every process, put the key of today into secrets.previous_master_keys, and\n   \
             restart them one after the other.\n\n\
             3. Run `paperkey admin rotate-secrets` with the configuration of step 2. It seals everything anew while the\n   \
             product runs, and says when the old key may be dropped.",
            self.keys.master_id(),
            Keyring::fresh().expose()
        )
    }

    fn known_keys(&self) -> String {
        let others = self.keys.other_master_ids();
        let mut text = format!("{} is the master key", self.keys.master_id());
        if !others.is_empty() {
            let _ = write!(text, "; these open as well: {}", list(&others));
        }
        text
    }

    fn done(&self, resealed: u64) -> String {
        format!("{} is the master key; {resealed} values were sealed anew under it", self.keys.master_id())
    }

    async fn let_others_follow(&self) {
        tokio::time::sleep(FOLLOWED_WITHIN).await;
        self.keys.look();
    }

    /// Walks until a whole walk has found nothing to do. Says what the last one found, and how much was sealed anew.
    async fn walk_until_done(&self) -> Result<(Walk, u64), Failure> {
        let mut resealed = 0;
        for _ in 0..MAX_WALKS {
            let walk = self.walk(true).await?;
            resealed += walk.0.values().map(|found| found.resealed).sum::<u64>();
            if walk.0.values().all(|found| found.resealed == 0 && found.left() == 0) {
                return Ok((walk, resealed));
            }
            tokio::time::sleep(BETWEEN_WALKS).await;
        }
        Err(Failure(format!(
            "{resealed} values were sealed anew, and there are always more that are not sealed under {}: see that every \
             process has that key as its secrets.master_key, and run this again",
            self.keys.master_id()
        )))
    }

    /// The other keys that nothing is sealed under, and what the last walk has found. What was sealed before the first walk
    /// may be kept after it, so there are two; where the first leaves no key, that is enough.
    async fn walk_twice(&self) -> Result<(Walk, Vec<KeyId>), Failure> {
        let mut unused = self.keys.other_master_ids();
        let mut walk = self.walk(false).await?;
        walk.leave_unused(&mut unused);
        if !unused.is_empty() {
            self.progress.say("looking once more when all is kept that was sealed before");
            tokio::time::sleep(self.settled_within).await;
            walk = self.walk(false).await?;
            walk.leave_unused(&mut unused);
        }
        Ok((walk, unused))
    }

    async fn walk(&self, changes: bool) -> Result<Walk, Failure> {
        let mut walk = Walk::default();
        for (service, database) in &self.databases {
            for column in SealedColumn::of(service) {
                let place = format!("{service}.{}.{}", column.table, column.column);
                let tell = |sum: &Resealed| self.progress.tell(&place, sum);
                let found = reseal(database, &self.keys, column, changes, tell).await?;
                walk.0.insert(place, found);
            }
        }
        Ok(walk)
    }
}

impl Walk {
    /// The keys that something was found under.
    fn keys(&self) -> BTreeSet<KeyId> {
        self.0.values().flat_map(|found| found.under.keys().copied().flatten()).collect()
    }

    /// Takes away the keys that something was found under; all of them where something names none, which may be under any.
    fn leave_unused(&self, keys: &mut Vec<KeyId>) {
        let in_use = self.keys();
        let all_named = self.0.values().all(|found| found.unnamed == 0);
        keys.retain(|id| all_named && !in_use.contains(id));
    }

    /// What cannot be opened, as lines to be added to what is said.
    fn unopened(&self) -> String {
        let mut text = String::new();
        for (place, Resealed { unopened, unopened_owners, .. }) in &self.0 {
            if *unopened > 0 {
                let such_as = unopened_owners.join(", ");
                let _ =
                    write!(text, "\n{unopened} in {place} cannot be opened, and stay as they are, such as {such_as}");
            }
        }
        text
    }

    /// A command that has found what cannot be opened has not done all that it was for.
    fn judge(&self, text: String) -> Result<String, Failure> {
        match self.unopened().as_str() {
            "" => Ok(text),
            unopened => Err(Failure(format!(
                "{text}{unopened}\nThey are damaged, or sealed under a key that is not known here"
            ))),
        }
    }
}

fn list(ids: &[KeyId]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

/// How far it is: drawn for a person, told now and then where there is none.
struct Progress {
    bar: ProgressBar,
    told_at: std::cell::Cell<Instant>,
}

impl Progress {
    fn new() -> Self {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
            bar.set_style(style);
        }
        Self { bar, told_at: std::cell::Cell::new(Instant::now()) }
    }

    fn tell(&self, place: &str, sum: &Resealed) {
        let text = format!("{place}: {} of {} looked at were sealed anew", sum.resealed, sum.rows);
        if stderr().is_terminal() {
            self.bar.set_message(text);
            self.bar.tick();
        } else if self.told_at.get().elapsed() >= TELL_EVERY {
            self.told_at.set(Instant::now());
            note(&text);
        }
    }

    fn say(&self, text: &str) {
        self.bar.suspend(|| note(text));
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}

#[expect(clippy::print_stderr, reason = "how far a command is goes beside its answer")]
fn note(text: &str) {
    eprintln!("{text}");
}

#[cfg(test)]
mod tests {
    use std::fs;

    use paperkey_kit::{
        db::{DbError, OutboxMessage},
        secrets::Purpose,
        service::SERVICES,
    };

    use super::*;

    /// What is in a folder and below it: paths, and what they hold.
    fn all_of(folder: &std::path::Path) -> BTreeMap<std::path::PathBuf, Vec<u8>> {
        let mut found = BTreeMap::new();
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                found.extend(all_of(&path));
            } else {
                let held = fs::read(&path).unwrap();
                found.insert(path, held);
            }
        }
        found
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_part_of_an_installation_is_not_taken_for_the_whole() {
        let folder = std::env::temp_dir().join(format!("paperkey-rotate-{}", std::process::id()));
        let mut config = Config::default();
        config.server.data.clone_from(&folder);
        let secrets = config.key_folder();
        let ways = [(false, false), (true, false), (false, true)];
        let refused = async |why: &str| {
            for (status, retire) in ways {
                let failure = run(&config, status, retire).await.unwrap_err().to_string();
                assert!(failure.contains(why) && failure.contains("--data and database.url"), "{failure}");
                assert_eq!(failure.lines().count(), 1);
            }
        };
        refused("the keys are not all in").await;
        assert!(!folder.exists());

        Keyring::load_or_create(&secrets).unwrap();
        refused("no database of auth, catalog, licensing, webhook").await;
        for service in SERVICES {
            let database = storage::open_current(&config, service, &Clock::system()).await.unwrap();
            database.close().await;
        }
        run(&config, true, false).await.unwrap();
        let (from, to) = (folder.join("licensing.db"), folder.join("elsewhere"));
        fs::rename(&from, &to).unwrap();
        let before = all_of(&secrets);
        refused("no database of licensing,").await;
        assert!(!from.exists());
        assert_eq!(all_of(&secrets), before);
        // A file that was made and never filled.
        fs::write(&from, "").unwrap();
        refused("no database of licensing,").await;
        assert_eq!(all_of(&secrets), before);
        fs::remove_file(&from).unwrap();
        fs::rename(&to, &from).unwrap();

        fs::rename(secrets.join("pepper.key"), folder.join("pepper.key")).unwrap();
        refused("the keys are not all in").await;
        assert!(!secrets.join("pepper.key").exists());
        fs::rename(folder.join("pepper.key"), secrets.join("pepper.key")).unwrap();
        run(&config, false, true).await.unwrap();
        fs::remove_dir_all(&folder).unwrap();
    }

    /// An event of catalog's, as a transaction leaves it.
    async fn emitted(database: &Database, id: &str, payload: Vec<u8>) {
        let (id, topic, team_id) = (id.to_owned(), "test".to_owned(), "team_1".to_owned());
        database
            .write(move |tx| async move {
                tx.emit(OutboxMessage { target: "webhook", id, topic, team_id, payload });
                Ok::<_, DbError>(())
            })
            .await
            .unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_key_that_was_sealed_under_a_moment_ago_is_not_removed() {
        let folder = std::env::temp_dir().join(format!("paperkey-retire-{}", std::process::id()));
        let mut config = Config::default();
        config.server.data.clone_from(&folder);
        let keys = Keyring::load_or_create(&config.key_folder()).unwrap();
        for service in SERVICES {
            storage::open_current(&config, service, &Clock::system()).await.unwrap().close().await;
        }
        let sealer = keys.sealer(Purpose::Outbox);
        let unnamed = sealer.seal("evt_1", b"hello");
        let hands = KeyFolder::hold(&config.key_folder()).unwrap();
        hands.announce().unwrap();
        keys.look();
        let named = sealer.seal("evt_2", b"hello");
        hands.make_current().unwrap();
        hands.finish().unwrap();
        drop(hands);
        let others = || Keyring::load_or_create(&config.key_folder()).unwrap().other_master_ids().len();
        let database = storage::open(&config, "catalog", &Clock::system()).await.unwrap();
        let sealed_anew = async || {
            keys.look();
            for column in SealedColumn::of("catalog") {
                reseal(&database, &keys, column, true, |_| {}).await.unwrap();
            }
        };

        // Kept after the first walk, and found by the second.
        let kept = async {
            tokio::time::sleep(Duration::from_secs(2)).await;
            emitted(&database, "evt_2", named.clone()).await;
        };
        let (retired, ()) = tokio::join!(settled(&config, false, true, Duration::from_secs(4)), kept);
        retired.unwrap();
        assert_eq!(others(), 1);
        sealed_anew().await;

        // What names no key may be under any.
        emitted(&database, "evt_1", unnamed).await;
        settled(&config, false, true, Duration::ZERO).await.unwrap();
        assert_eq!(others(), 1);
        sealed_anew().await;

        settled(&config, false, true, Duration::ZERO).await.unwrap();
        assert_eq!(others(), 0);
        database.close().await;
        fs::remove_dir_all(&folder).unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_status_migrates_nothing() {
        let folder = std::env::temp_dir().join(format!("paperkey-status-{}", std::process::id()));
        let mut config = Config::default();
        config.server.data.clone_from(&folder);
        Keyring::load_or_create(&config.key_folder()).unwrap();
        for service in SERVICES {
            let database = storage::open_current(&config, service, &Clock::system()).await.unwrap();
            if service == "webhook" {
                storage::migrate_down(&database, service, 1).await.unwrap();
            }
            database.close().await;
        }
        let failure = run(&config, true, false).await.unwrap_err().to_string();
        assert!(failure.contains("the schema of webhook is 1 migrations behind"), "{failure}");
        run(&config, false, true).await.unwrap();
        run(&config, true, false).await.unwrap();
        fs::remove_dir_all(&folder).unwrap();
    }
}
