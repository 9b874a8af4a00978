//! `paperkey backup` and `paperkey restore`: an installation is copied while everybody writes to it, and what is put back
//! is that installation, of one moment.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use paperkey_kit::fail_point::{Point, VARIABLE};
use paperkey_tests::{
    Account, Installation, License, Product, Receiver, eventually,
    people::Webhook,
    process::{self, Process},
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;

/// Callers at a time, and how much each writes at most.
const CALLERS: usize = 4;
const MOST: usize = 150;

/// The signal of `kill -9`.
const SIGKILL: i32 = 9;

/// One licence with one machine, and when that was written.
#[derive(Clone, Debug)]
struct Written {
    license: License,
    activation: String,
    begun: Instant,
    answered: Instant,
}

/// Somebody who sells, and who is told of nothing until told otherwise: everything is kept for them.
struct House {
    owner: Account,
    product: Product,
    webhook: Webhook,
    receiver: Receiver,
}

impl House {
    async fn new(install: &Installation) -> Self {
        let receiver = Receiver::start().await;
        let owner = install.register().await;
        let product = owner.create_product("App").await;
        let webhook = owner.subscribe(&product, receiver.url()).await;
        let house = Self { owner, product, webhook, receiver };
        house.is_told(install, "paused").await;
        house
    }

    fn endpoint(&self) -> String {
        format!("/products/{}/webhooks/{}", self.product.id, self.webhook.id)
    }

    async fn is_told(&self, install: &Installation, status: &str) {
        let there = self.owner.at(&install.api());
        there.patch(&self.endpoint(), json!({"status": status})).await.gives(200);
    }

    /// Issues a licence and binds a machine to it, which must not fail.
    async fn write(owner: &Account, product: &Product) -> Written {
        let begun = Instant::now();
        let license = owner.issue(product, json!({"email": "customer@example.com"})).await;
        let answer = owner.app(product).activate(&license, "machine").await;
        let activation = answer.gives(200)["activation"]["id"].as_str().unwrap().to_owned();
        Written { license, activation, begun, answered: Instant::now() }
    }

    /// Lets callers loose until told to end.
    fn is_busy(&self, until: &Arc<AtomicBool>) -> Vec<JoinHandle<Vec<Written>>> {
        let caller = || {
            let (owner, product, until) = (self.owner.clone(), self.product.clone(), Arc::clone(until));
            tokio::spawn(async move {
                let mut written = Vec::new();
                while !until.load(Ordering::SeqCst) && written.len() < MOST {
                    written.push(Self::write(&owner, &product).await);
                }
                written
            })
        };
        (0..CALLERS).map(|_| caller()).collect()
    }

    /// What a restored installation has must be of one moment, between the beginning and the end of its backup: in itself,
    /// and with what it tells.
    async fn is_of_one_moment(&self, install: &Installation, all: &[Written], began: Instant, ended: Instant) {
        let owner = self.owner.at(&install.api());
        let before = self.receiver.deliveries().len();
        let (mut licenses, mut activations) = (BTreeSet::new(), BTreeSet::new());
        for written in all {
            let answer = owner.get(&format!("/licenses/{}", written.license.id)).await;
            let is_there = answer.status == 200;
            assert!(is_there || answer.status == 404, "{}", answer.text());
            assert!(is_there || written.answered >= began, "{written:?} was answered before the backup and is lost");
            assert!(!is_there || written.begun <= ended, "{written:?} came after the backup and is in it");
            if !is_there {
                continue;
            }
            let machines = answer.json["activations"].as_array().unwrap();
            assert_eq!(answer.json["activationsCount"], machines.len(), "the count is what is there");
            let is_bound = machines.iter().any(|machine| machine["id"] == written.activation.as_str());
            assert!(is_bound || written.answered >= began, "{written:?} has lost its machine");
            // Sealed, and opened by the keys of the backup.
            assert_eq!(License::of(&answer.json).key, written.license.key);
            licenses.insert(written.license.id.clone());
            activations.extend(machines.iter().map(|machine| machine["id"].as_str().unwrap().to_owned()));
        }
        let app = owner.app(&self.product);
        for written in all.iter().filter(|written| licenses.contains(&written.license.id)).take(5) {
            assert_eq!(app.verdict(&written.license).await, "valid");
        }
        owner.login(&owner.password).await.gives(200);
        let verified = owner.integration().post("/v1/keys/verify", json!({"key": owner.live_key})).await;
        assert_eq!(verified.gives(200)["code"], "valid");

        self.is_told(install, "active").await;
        let wanted: BTreeSet<(String, String)> = licenses
            .iter()
            .map(|id| ("license.created".to_owned(), id.clone()))
            .chain(activations.iter().map(|id| ("activation.created".to_owned(), id.clone())))
            .collect();
        let of = |arrived: &[paperkey_tests::receiver::Delivery]| {
            let mut told: BTreeMap<(String, String), BTreeSet<String>> = BTreeMap::new();
            for delivery in &arrived[before..] {
                let subject = delivery.json["data"]["id"].as_str().unwrap_or_default().to_owned();
                let ids = told.entry((delivery.event().to_owned(), subject)).or_default();
                ids.insert(delivery.header("webhook-id").to_owned());
            }
            told
        };
        let told = self
            .receiver
            .wait("every event of the backup", |arrived| {
                let told = of(arrived);
                wanted.iter().all(|event| told.contains_key(event)).then_some(told)
            })
            .await;
        let known: BTreeSet<_> = told.keys().cloned().collect();
        assert_eq!(known, wanted, "what is told is what is there");
        for (event, ids) in told {
            assert_eq!(ids.len(), 1, "{event:?} is one delivery: {ids:?}");
        }
        is_audited(install).await;
    }
}

async fn is_audited(install: &Installation) {
    eventually("the audit log is whole", || async {
        let verdict = install.command(&["audit", "verify"], "").await;
        verdict.succeeded().starts_with("the audit log is whole").then_some(())
    })
    .await;
}

/// Where backups go.
struct Shelf(TempDir);

impl Shelf {
    fn new() -> Self {
        Self(TempDir::with_prefix("paperkey-backups-").unwrap())
    }

    fn at(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// What stands on it.
    fn names(&self) -> Vec<String> {
        names_in(self.0.path())
    }
}

fn is_lock(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "lock")
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn manifest_of(backup: &Path) -> Value {
    serde_json::from_slice(&fs::read(backup.join("manifest.json")).unwrap()).unwrap()
}

/// The files that a backup names.
fn files_of(backup: &Path) -> Vec<String> {
    let manifest = manifest_of(backup);
    let files = manifest["files"].as_array().unwrap();
    files.iter().map(|file| file["path"].as_str().unwrap().to_owned()).collect()
}

fn names_in(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn all_in(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all_in(&path, found);
        }
        found.push(path);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_backup_under_load_is_of_one_moment_and_can_be_restored() {
    let mut install = Installation::all_in_one().await;
    let (house, shelf) = (House::new(&install).await, Shelf::new());
    let mut all = vec![House::write(&house.owner, &house.product).await];
    let until = Arc::new(AtomicBool::new(false));
    let callers = house.is_busy(&until);
    let mut taken = Vec::new();
    for number in 0..5 {
        let backup = shelf.at(&number.to_string());
        let began = Instant::now();
        let said = install.command(&["backup", text(&backup)], "").await;
        assert!(said.succeeded().contains("writers were held for"), "{said:?}");
        taken.push((backup, began, Instant::now()));
    }
    until.store(true, Ordering::SeqCst);
    for caller in callers {
        all.extend(caller.await.expect("no write failed because of a backup"));
    }
    // And those that came after the last.
    all.push(House::write(&house.owner, &house.product).await);
    install.kill("serve");
    assert!(house.receiver.deliveries().is_empty());
    for (backup, began, ended) in taken {
        let restored = Installation::restored(&backup).await;
        house.is_of_one_moment(&restored, &all, began, ended).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_in_the_middle_of_a_change_of_the_master_key_has_every_key_that_it_needs() {
    let mut install = Installation::all_in_one().await;
    let (house, shelf) = (House::new(&install).await, Shelf::new());
    let mut all = vec![House::write(&house.owner, &house.product).await];
    let mut rotation = Process::start("rotate-secrets", install.prepared(&["admin", "rotate-secrets"]));
    let mut taken = Vec::new();
    while rotation.is_running() || taken.len() < 2 {
        all.push(House::write(&house.owner, &house.product).await);
        let backup = shelf.at(&taken.len().to_string());
        let began = Instant::now();
        install.command(&["backup", text(&backup)], "").await.succeeded();
        taken.push((backup, began, Instant::now()));
    }
    assert!(rotation.ended().await.success(), "{}", rotation.text());
    install.kill("serve");
    // Those that differ in their keys are what it is about.
    let mut seen = BTreeSet::new();
    for (backup, began, ended) in taken {
        let keys: Vec<_> = files_of(&backup).into_iter().filter(|name| name.starts_with("secrets/master")).collect();
        if !seen.insert(keys) {
            continue;
        }
        let restored = Installation::restored(&backup).await;
        house.is_of_one_moment(&restored, &all, began, ended).await;
        restored.command(&["admin", "rotate-secrets"], "").await.succeeded();
    }
    assert!(seen.len() > 1, "no backup was made while the key changed: {seen:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_is_for_its_owner_alone_and_says_what_it_holds() {
    let install = Installation::all_in_one().await;
    let (owner, shelf) = (install.register().await, Shelf::new());
    // A mail that no server carries.
    owner.invite("colleague@example.com", "member").await;
    eventually("a mail is written", || async { (!install.mails_to("colleague@example.com").is_empty()).then_some(()) })
        .await;
    eventually("the log is chained", || async { install.data().join("audit-head").exists().then_some(()) }).await;
    let backup = shelf.at("whole");
    let said = install.command(&["backup", text(&backup)], "").await;
    assert!(said.succeeded().contains("It holds the keys"), "{said:?}");
    let mut found = Vec::new();
    all_in(&backup, &mut found);
    for path in found.iter().chain([&backup]) {
        let mode = fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, if path.is_dir() { 0o700 } else { 0o600 }, "{}", path.display());
        assert!(!is_lock(path) && !text(path).ends_with("-wal"), "{}", path.display());
    }
    let files = files_of(&backup);
    for name in ["auth.db", "catalog.db", "licensing.db", "webhook.db", "audit-head", "secrets/master.key"] {
        assert!(files.iter().any(|file| file == name), "{name} is not in {files:?}");
    }
    assert!(files.iter().any(|file| file == "secrets/system.key"));
    assert!(files.iter().any(|file| file.starts_with("mail/")), "{files:?}");
    let on_disk = found.iter().filter(|path| path.is_file()).count();
    assert_eq!(on_disk, files.len() + 2, "the manifest and its hash are all that it does not name");
    let manifest = manifest_of(&backup);
    assert_eq!((manifest["format"].as_u64(), manifest["keys"].as_str()), (Some(1), Some("included")));
    let check = Command::new("sha256sum").args(["--check", "manifest.sha256"]).current_dir(&backup).status();
    assert!(check.unwrap().success());

    // It does not stand in for another.
    let again = install.command(&["backup", text(&backup)], "").await;
    assert!(again.failed().contains("is there already, and not an empty folder"), "{again:?}");
    fs::create_dir(shelf.at("empty")).unwrap();
    install.command(&["backup", text(&shelf.at("empty"))], "").await.succeeded();

    let bare = shelf.at("bare");
    let said = install.command(&["backup", text(&bare), "--without-keys"], "").await;
    assert!(said.succeeded().contains("The keys are not in it"), "{said:?}");
    assert!(!bare.join("secrets").exists());
    assert_eq!(shelf.names(), ["bare", "empty", "whole"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restore_takes_nothing_away_and_is_refused_while_the_folder_is_served() {
    let mut install = Installation::all_in_one().await;
    let shelf = Shelf::new();
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let early = owner.issue(&product, json!({})).await;
    let key = install.system_key().await;
    let backup = shelf.at("monday");
    install.command(&["backup", text(&backup)], "").await.succeeded();
    owner.revoke(&early).await.gives(200);
    let late = owner.issue(&product, json!({})).await;

    for arguments in [vec!["restore", text(&backup)], vec!["restore", text(&backup), "--force"]] {
        let refused = install.command(&arguments, "").await;
        assert!(refused.failed().contains("is served by another process"), "{refused:?}");
    }
    owner.get(&format!("/licenses/{}", late.id)).await.gives(200);

    install.kill("serve");
    // What the product has not made stays where it is.
    fs::create_dir(install.data().join("lost+found")).unwrap();
    let refused = install.command(&["restore", text(&backup)], "").await;
    assert!(refused.failed().contains("--force"), "{refused:?}");
    let said = install.command(&["restore", text(&backup), "--force"], "").await;
    assert!(said.succeeded().contains("so are revocations"), "{said:?}");
    install.start("serve").await.unwrap();
    let there = owner.at(&install.api());
    // The revocation came after the backup, and is gone; so is what was issued.
    assert_eq!(there.app(&product).verdict(&early).await, "valid");
    assert_eq!(there.get(&format!("/licenses/{}", late.id)).await.status, 404);
    assert_eq!(install.command(&["admin", "system-key"], "").await.succeeded(), key);
    is_audited(&install).await;

    // What was there before can be had again.
    install.kill("serve");
    let names = fs::read_dir(install.data()).unwrap().map(|entry| entry.unwrap().path());
    assert!(install.data().join("lost+found").is_dir());
    let aside = names.into_iter().find(|path| text(path).contains("before-restore-")).expect("it was moved aside");
    let moved = tempfile::tempdir().unwrap();
    let mut command = process::command(&["audit", "verify", "--data", text(&aside)], &[], moved.path());
    command.env("PAPERKEY__DATABASE__URL", format!("sqlite:{}", aside.display()));
    process::run(command, "").await.succeeded();
    assert!(aside.join("secrets/master.key").exists() && aside.join("licensing.db").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_byte_in_any_file_of_a_backup_is_found_and_named() {
    let install = Installation::all_in_one().await;
    let (house, shelf) = (House::new(&install).await, Shelf::new());
    House::write(&house.owner, &house.product).await;
    let backup = shelf.at("whole");
    install.command(&["backup", text(&backup)], "").await.succeeded();
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("data");
    let restore = async || {
        let arguments = ["restore", text(&backup), "--data", text(&target)];
        process::run(process::command(&arguments, &[], folder.path()), "").await
    };
    let mut files = files_of(&backup);
    files.extend(["manifest.json".to_owned(), "manifest.sha256".to_owned()]);
    for name in files {
        let path = backup.join(&name);
        let good = fs::read(&path).unwrap();
        let mut bad = good.clone();
        let middle = bad.len() / 2;
        bad[middle] ^= 1;
        for bytes in [&bad[..], &good[..good.len() - 1]] {
            fs::write(&path, bytes).unwrap();
            let refused = restore().await;
            assert!(refused.failed().contains(&name), "{name}: {refused:?}");
        }
        fs::remove_file(&path).unwrap();
        let refused = restore().await;
        assert!(refused.failed().contains(&name), "{name}: {refused:?}");
        fs::write(&path, good).unwrap();
        // Nothing of it has taken its place.
        let left = fs::read_dir(&target).map(|entries| entries.map(|entry| entry.unwrap().file_name()).collect());
        let left: Vec<std::ffi::OsString> = left.unwrap_or_default();
        assert!(left.iter().all(|name| is_lock(Path::new(name))), "{left:?}");
    }
    restore().await.succeeded();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_and_a_restore_that_are_killed_leave_nothing_that_is_taken_for_whole() {
    let install = Installation::all_in_one().await;
    let (house, shelf) = (House::new(&install).await, Shelf::new());
    let written = House::write(&house.owner, &house.product).await;
    let backup = shelf.at("monday");
    let killed_at = async |point: Point, mut command: Command| {
        command.env(VARIABLE, point.at(1));
        let ended = process::run(command, "").await;
        assert_eq!(ended.status.signal(), Some(SIGKILL), "{point:?}: {ended:?}");
    };
    for point in [Point::BackupHolding, Point::BackupCopying, Point::BackupBeforeRename] {
        killed_at(point, install.prepared(&["backup", text(&backup)])).await;
        assert!(!backup.exists(), "{point:?}");
        // Who held the writers has let them go.
        House::write(&house.owner, &house.product).await;
    }
    install.command(&["backup", text(&backup)], "").await.succeeded();
    assert_eq!(shelf.names(), ["monday"]);

    let mut restored = Installation::restored(&backup).await;
    restored.kill("serve");
    // Before anything is moved it is what it was; after that, nobody serves a half of it.
    killed_at(Point::RestoreBeforeMove, restored.prepared(&["restore", text(&backup), "--force"])).await;
    restored.start("serve").await.unwrap();
    restored.kill("serve");
    killed_at(Point::RestoreMoving, restored.prepared(&["restore", text(&backup), "--force"])).await;
    let half = names_in(&restored.data());
    let refused = restored.start("serve").await.unwrap_err();
    assert!(refused.contains("was not brought to its end"), "{refused}");
    restored.kill("serve");
    for command in [vec!["audit", "verify"], vec!["migrate", "up"], vec!["admin", "rotate-secrets"]] {
        let refused = restored.command(&command, "").await;
        assert!(refused.failed().contains("was not brought to its end"), "{refused:?}");
    }
    let refused = restored.command(&["backup", text(&shelf.at("half"))], "").await;
    assert!(refused.failed().contains("was not brought to its end"), "{refused:?}");
    assert_eq!(names_in(&restored.data()), half, "whoever was refused has made nothing");
    killed_at(Point::RestoreMoving, restored.prepared(&["restore", text(&backup), "--force"])).await;
    restored.command(&["restore", text(&backup), "--force"], "").await.succeeded();
    let aside: Vec<_> =
        names_in(&restored.data()).into_iter().filter(|name| name.starts_with("before-restore-")).collect();
    assert_eq!(aside.len(), 1, "what was there is in one place: {aside:?}");
    let aside = names_in(&restored.data().join(&aside[0]));
    for name in ["auth.db", "catalog.db", "licensing.db", "webhook.db", "secrets"] {
        assert!(aside.iter().any(|there| there == name), "{name} is not in {aside:?}");
    }
    restored.start("serve").await.unwrap();
    let owner = house.owner.at(&restored.api());
    assert_eq!(owner.app(&house.product).verdict(&written.license).await, "valid");
}

/// A command that may write files of so many blocks of 1024 bytes, and is told so and not killed.
fn with_little_room(command: &Command, blocks: u32) -> Command {
    let mut limited = Command::new("bash");
    limited.arg("-c").arg(format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"")).arg("bash");
    limited.arg(command.get_program()).args(command.get_args());
    limited.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    limited
        .stdin(std::process::Stdio::null())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped());
    limited
}

#[tokio::test(flavor = "multi_thread")]
async fn where_there_is_no_room_nothing_is_left_and_the_file_is_named() {
    let install = Installation::all_in_one().await;
    let (house, shelf) = (House::new(&install).await, Shelf::new());
    let backup = shelf.at("monday");
    let command = install.prepared(&["backup", text(&backup)]);
    let refused = process::run(with_little_room(&command, 64), "").await;
    assert!(refused.failed().contains("auth.db cannot be copied"), "{refused:?}");
    assert_eq!(shelf.names(), Vec::<String>::new());
    House::write(&house.owner, &house.product).await;
    install.command(&["backup", text(&backup)], "").await.succeeded();

    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("data");
    let restore = || process::command(&["restore", text(&backup), "--data", text(&target)], &[], folder.path());
    let refused = process::run(with_little_room(&restore(), 64), "").await;
    assert!(refused.failed().contains("cannot be copied"), "{refused:?}");
    assert!(!target.join("restoring.partial").exists() && !target.join("auth.db").exists());
    process::run(restore(), "").await.succeeded();
}

#[tokio::test(flavor = "multi_thread")]
async fn on_postgresql_both_say_what_to_do_instead() {
    let Some(fleet) = Installation::fleet().await else { return };
    let shelf = Shelf::new();
    for command in ["backup", "restore"] {
        let refused = fleet.command(&[command, text(&shelf.at("x"))], "").await;
        let said = refused.failed();
        assert!(said.contains("pg_dump") && said.contains("continuous archiving"), "{said}");
        assert_eq!(said.lines().count(), 1, "{said}");
    }
    assert_eq!(shelf.names(), Vec::<String>::new());
}
