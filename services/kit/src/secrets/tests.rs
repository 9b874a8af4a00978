use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use paperkey_migrations::{auth, licensing};
use sea_orm::{ConnectionTrait as _, Statement, Value};
use tempfile::TempDir;

use super::{sealer::seal_v1, *};
use crate::{db::Database, db::DbError, db::OutboxMessage, store_suite, testing::TestDb};

fn key(byte: u8) -> Secret {
    Secret::new(BASE64.encode([byte; KEY_LENGTH]))
}

/// With the master keys of these bytes, the first of which seals.
fn keys(masters: &[u8]) -> Keyring {
    let others: Vec<Secret> = masters[1..].iter().map(|byte| key(*byte)).collect();
    Keyring::with_previous_masters(&key(masters[0]), &others, &key(101), &key(102)).unwrap()
}

#[test]
fn what_is_sealed_opens_only_for_its_owner_and_purpose() {
    let sealer = Keyring::for_tests().sealer(Purpose::LicenseKey);
    let sealed = sealer.seal("lic_1", b"K7WX9");
    assert_eq!(sealer.open("lic_1", &sealed).unwrap(), b"K7WX9");
    assert!(sealer.open("lic_2", &sealed).is_err());
    assert!(Keyring::for_tests().sealer(Purpose::Outbox).open("lic_1", &sealed).is_err());
    for length in 0..sealed.len() {
        assert!(sealer.open("lic_1", &sealed[..length]).is_err(), "{length}");
    }
    for place in 0..sealed.len() {
        for bit in 0..8 {
            let mut damaged = sealed.clone();
            damaged[place] ^= 1 << bit;
            assert!(sealer.open("lic_1", &damaged).is_err(), "{place}");
        }
    }
    assert!(sealer.open("lic_1", &[&sealed[..], &[0]].concat()).is_err());
}

#[test]
fn sealed_data_names_its_key_and_opens_under_any_that_is_known() {
    let (old, new) = (keys(&[1]), keys(&[2, 1]));
    assert_eq!(new.other_master_ids(), [old.master_id()]);
    // As the release before reads it, until there is another key.
    let unnamed = old.sealer(Purpose::Mail).seal("mail_1", b"hello");
    assert_eq!((unnamed[0], key_named(&unnamed)), (1, None));
    assert_eq!(new.sealer(Purpose::Mail).open("mail_1", &unnamed).unwrap(), b"hello");
    let sealed = keys(&[1, 2]).sealer(Purpose::Mail).seal("mail_1", b"hello");
    assert_eq!(key_named(&sealed), Some(old.master_id()));
    let opened = new.sealer(Purpose::Mail).open_and_tell("mail_1", &sealed).unwrap();
    assert_eq!((opened.key, opened.plain.as_slice()), (old.master_id(), b"hello".as_slice()));
    let anew = new.sealer(Purpose::Mail).seal("mail_1", b"hello");
    assert_eq!(key_named(&anew), Some(new.master_id()));
    let refused = |keys: &Keyring, sealed: &[u8]| keys.sealer(Purpose::Mail).open("mail_1", sealed).unwrap_err();
    assert_eq!(refused(&old, &anew), CannotOpen::UnknownKey(new.master_id()));
    assert_eq!(refused(&keys(&[3, 4]), &sealed), CannotOpen::UnknownKey(old.master_id()));
    assert_eq!(refused(&keys(&[3, 4]), &unnamed), CannotOpen::Damaged);
    let mut damaged = sealed.clone();
    *damaged.last_mut().unwrap() ^= 1;
    assert_eq!(refused(&new, &damaged), CannotOpen::Damaged);
    assert_eq!(refused(&old, &anew[..20]), CannotOpen::Damaged);
}

#[test]
fn what_was_sealed_before_keys_had_ids_still_opens() {
    let sealed = seal_v1(&keys(&[1]), Purpose::Slack, "post_1", b"hello");
    assert_eq!((sealed[0], key_named(&sealed)), (1, None));
    for known in [&[1][..], &[2, 1], &[3, 2, 1]] {
        let opened = keys(known).sealer(Purpose::Slack).open_and_tell("post_1", &sealed).unwrap();
        assert_eq!((opened.key, opened.plain.as_slice()), (keys(&[1]).master_id(), b"hello".as_slice()));
    }
    assert!(keys(&[2]).sealer(Purpose::Slack).open("post_1", &sealed).is_err());
    assert!(keys(&[1]).sealer(Purpose::Slack).open("post_2", &sealed).is_err());
    assert!(keys(&[1]).sealer(Purpose::Mail).open("post_1", &sealed).is_err());
}

#[test]
fn what_is_sealed_under_a_key_of_its_own_needs_no_master_key() {
    let sealer = KeySealer::new(&[7; 32]).unwrap();
    let sealed = sealer.seal("answer", b"hello");
    assert_eq!(KeySealer::new(&[7; 32]).unwrap().open("answer", &sealed).unwrap(), b"hello");
    assert!(sealer.open("another", &sealed).is_err() && sealer.open("answer", b"").is_err());
    assert!(KeySealer::new(&[8; 32]).unwrap().open("answer", &sealed).is_err());
    assert!(KeySealer::new(&[7; 31]).is_none());
}

#[test]
fn the_keys_of_a_folder_are_made_once() {
    let folder = TempDir::new().unwrap();
    let first = Keyring::load_or_create(folder.path()).unwrap();
    let second = Keyring::load_or_create(folder.path()).unwrap();
    assert_eq!(first.master_id(), second.master_id());
    assert_eq!(first.token_hasher().hash(b"token"), second.token_hasher().hash(b"token"));
    let texts = ["master.key", "pepper.key", "signing.key"].map(|name| fs::read(folder.path().join(name)).unwrap());
    assert!(texts[0] != texts[1] && texts[1] != texts[2] && texts[0] != texts[2]);
    fs::write(folder.path().join("master.1.previous"), "hunter2").unwrap();
    let refused = Keyring::load_or_create(folder.path()).unwrap_err().to_string();
    assert!(refused.contains("master.1.previous") && !refused.contains("hunter2"), "{refused}");
}

#[test]
fn a_changed_pepper_leaves_the_way_to_the_one_before() {
    let old = Keyring::for_tests();
    assert!(old.previous_token_hasher().is_none());
    let new = Keyring::from_base64(&key(1), &key(9), &key(1)).unwrap();
    let new = new.with_previous_pepper(&key(2)).unwrap();
    assert_eq!(new.previous_token_hasher().unwrap().hash(b"token"), old.token_hasher().hash(b"token"));
    assert_ne!(new.token_hasher().hash(b"token"), old.token_hasher().hash(b"token"));
    assert!(old.with_previous_pepper(&Secret::new("short")).is_err());
}

#[test]
fn a_secret_is_not_printed() {
    assert_eq!(format!("{:?}", Secret::new("hunter2")), "[redacted]");
    assert_eq!(serde_json::to_string(&Secret::new("hunter2")).unwrap(), "\"[redacted]\"");
    let keys = Keyring::for_tests();
    assert_eq!(format!("{keys:?} {:?}", keys.sealer(Purpose::Mail)), "Keyring([redacted]) Sealer([redacted])");
}

/// What a process of before, one of now and one that starts later find of each other's.
fn all_open_each_others(rings: &[&Keyring]) {
    for one in rings {
        let sealed = one.sealer(Purpose::Outbox).seal("evt_1", b"hello");
        let said = one.assert(b"it is me");
        for other in rings {
            assert_eq!(other.sealer(Purpose::Outbox).open("evt_1", &sealed).unwrap(), b"hello");
            assert!(other.is_asserted(b"it is me", &said));
            assert!(!other.is_asserted(b"it is you", &said));
        }
    }
}

/// A folder as a crash may leave it is one that a new process goes on with.
fn copied(folder: &TempDir) -> TempDir {
    let copy = TempDir::new().unwrap();
    for entry in fs::read_dir(folder.path()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
    }
    copy
}

#[test]
fn running_processes_follow_each_step_of_a_change() {
    let folder = TempDir::new().unwrap();
    let running = Keyring::load_or_create(folder.path()).unwrap();
    let first = running.master_id();
    let before = running.sealer(Purpose::Outbox).seal("evt_1", b"of before");
    let copy_of_before = copied(&folder);
    let hands = KeyFolder::hold(folder.path()).unwrap();
    assert_eq!(hands.rotation().unwrap(), Rotation::None);

    hands.announce().unwrap();
    assert_eq!(hands.rotation().unwrap(), Rotation::Announced);
    running.look();
    assert_eq!((running.master_id(), running.other_master_ids().len()), (first, 1));
    let second = running.other_master_ids()[0];
    all_open_each_others(&[&running, &Keyring::load_or_create(folder.path()).unwrap()]);

    hands.make_current().unwrap();
    assert_eq!(hands.rotation().unwrap(), Rotation::UnderWay);
    let started = Keyring::load_or_create(folder.path()).unwrap();
    assert_eq!((started.master_id(), started.other_master_ids()), (second, vec![first]));
    all_open_each_others(&[&running, &started]);
    running.look();
    assert_eq!((running.master_id(), running.other_master_ids()), (second, vec![first]));
    assert_eq!(started.sealer(Purpose::Outbox).open("evt_1", &before).unwrap(), b"of before");

    // What the old key signs counts until everything is sealed anew, and not for one that starts after that.
    let said = Keyring::load_or_create(copy_of_before.path()).unwrap().assert(b"it is me");
    assert!(started.is_asserted(b"it is me", &said));
    hands.finish().unwrap();
    let later = Keyring::load_or_create(folder.path()).unwrap();
    assert_eq!(later.other_master_ids(), [first]);
    assert!(!later.is_asserted(b"it is me", &said) && started.is_asserted(b"it is me", &said));
    assert!(later.is_asserted(b"it is me", &started.assert(b"it is me")));
    assert_eq!(hands.rotation().unwrap(), Rotation::None);
    assert_eq!(hands.retire(|id| id == first).unwrap(), []);
    assert_eq!(hands.retire(|_| false).unwrap(), [first]);
    running.look();
    assert_eq!((running.master_id(), running.other_master_ids()), (second, vec![]));
    assert!(running.sealer(Purpose::Outbox).open("evt_1", &before).is_err());
    for entry in fs::read_dir(folder.path()).unwrap() {
        let entry = entry.unwrap();
        assert_eq!(entry.metadata().unwrap().permissions().mode() & 0o777, 0o600, "{entry:?}");
    }
}

#[test]
fn a_key_that_data_names_is_looked_for_at_once_and_others_within_seconds() {
    let folder = TempDir::new().unwrap();
    let running = Keyring::load_or_create(folder.path()).unwrap();
    let hands = KeyFolder::hold(folder.path()).unwrap();
    hands.announce().unwrap();
    hands.make_current().unwrap();
    let newer = Keyring::load_or_create(folder.path()).unwrap();
    let sealed = newer.sealer(Purpose::Mail).seal("mail_1", b"hello");
    assert_eq!(running.sealer(Purpose::Mail).open("mail_1", &sealed).unwrap(), b"hello");

    // Nobody names the next one: it is found by looking.
    hands.announce().unwrap();
    hands.make_current().unwrap();
    let newest = Keyring::load_or_create(folder.path()).unwrap().master_id();
    let began = Instant::now();
    let sealer = running.sealer(Purpose::Mail);
    while key_named(&sealer.seal("mail_1", b"hello")) != Some(newest) {
        assert!(began.elapsed() < Duration::from_secs(30), "the new key is not followed");
        std::thread::yield_now();
    }
}

#[test]
fn a_folder_that_cannot_be_read_leaves_what_is_known() {
    let folder = TempDir::new().unwrap();
    let running = Keyring::load_or_create(folder.path()).unwrap();
    let (id, sealed) = (running.master_id(), running.sealer(Purpose::Mail).seal("mail_1", b"hello"));
    fs::write(folder.path().join("master.key"), "hunter2").unwrap();
    running.look();
    fs::remove_file(folder.path().join("master.key")).unwrap();
    running.look();
    assert_eq!(running.master_id(), id);
    assert_eq!(running.sealer(Purpose::Mail).open("mail_1", &sealed).unwrap(), b"hello");
}

#[test]
fn a_change_of_the_key_goes_on_wherever_it_was_cut_off() {
    let folder = TempDir::new().unwrap();
    let first = Keyring::load_or_create(folder.path()).unwrap().master_id();
    let mut states = vec![copied(&folder)];
    // Cut off inside of a step.
    fs::write(folder.path().join("master.draft"), "half a k").unwrap();
    states.push(copied(&folder));
    let hands = KeyFolder::hold(folder.path()).unwrap();
    hands.announce().unwrap();
    states.push(copied(&folder));
    fs::remove_file(folder.path().join("master.rotating")).unwrap();
    states.push(copied(&folder));
    hands.announce().unwrap();
    fs::hard_link(folder.path().join("master.key"), folder.path().join(format!("master.{first}.previous"))).unwrap();
    states.push(copied(&folder));
    hands.make_current().unwrap();
    states.push(copied(&folder));

    for state in &states {
        let hands = KeyFolder::hold(state.path()).unwrap();
        if hands.rotation().unwrap() != Rotation::UnderWay {
            hands.announce().unwrap();
            hands.make_current().unwrap();
        }
        hands.finish().unwrap();
        let after = Keyring::load_or_create(state.path()).unwrap();
        assert_ne!(after.master_id(), first);
        assert_eq!(after.other_master_ids(), [first]);
        assert_eq!(hands.rotation().unwrap(), Rotation::None);
        let mut names: Vec<_> = fs::read_dir(state.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let previous = format!("master.{first}.previous");
        let mut expected = vec!["master.key", "master.lock", &previous, "pepper.key", "signing.key"];
        expected.sort_unstable();
        assert_eq!(names, expected);
    }
}

#[test]
fn a_file_that_holds_another_key_is_not_taken_for_the_one_before() {
    let folder = TempDir::new().unwrap();
    let first = Keyring::load_or_create(folder.path()).unwrap().master_id();
    let hands = KeyFolder::hold(folder.path()).unwrap();
    hands.announce().unwrap();
    fs::write(folder.path().join(format!("master.{first}.previous")), key(7).expose()).unwrap();
    let refused = hands.make_current().unwrap_err().to_string();
    assert!(refused.contains(&format!("master.{first}.previous")), "{refused}");
    assert_eq!(hands.rotation().unwrap(), Rotation::Announced);
    assert_eq!(Keyring::load_or_create(folder.path()).unwrap().master_id(), first);
}

#[test]
fn one_process_changes_a_folder_and_it_keeps_few_old_keys() {
    let folder = TempDir::new().unwrap();
    Keyring::load_or_create(folder.path()).unwrap();
    let hands = KeyFolder::hold(folder.path()).unwrap();
    assert!(matches!(KeyFolder::hold(folder.path()), Err(FolderError::Held)));
    for _ in 0..MAX_PREVIOUS {
        hands.announce().unwrap();
        hands.make_current().unwrap();
        hands.finish().unwrap();
    }
    assert!(matches!(hands.announce(), Err(FolderError::Full)));
    assert_eq!(hands.rotation().unwrap(), Rotation::None);
    assert_eq!(Keyring::load_or_create(folder.path()).unwrap().other_master_ids().len(), MAX_PREVIOUS);
    assert_eq!(hands.retire(|_| false).unwrap().len(), MAX_PREVIOUS);
    hands.announce().unwrap();
    drop(hands);
    KeyFolder::hold(folder.path()).unwrap();
}

mod stores {
    use super::*;

    store_suite! {
        paperkey_migrations::kit::Migrator;
        everything_is_sealed_anew_and_doing_it_again_changes_nothing,
        what_cannot_be_opened_is_counted_and_stays,
        what_changes_meanwhile_keeps_its_change,
    }
}

mod kept_keys {
    use super::*;

    store_suite! {
        paperkey_migrations::licensing::Migrator;
        a_kept_key_is_what_it_was_under_the_first_master_key,
        of_two_first_starts_both_get_one_kept_key,
        a_kept_key_under_an_unknown_master_key_is_refused_in_one_sentence,
        a_kept_key_is_not_guessed_where_something_was_hashed,
        a_kept_key_stays_where_the_schema_goes_back,
    }
}

fn column(table: &str) -> &'static SealedColumn {
    SealedColumn::of("catalog").find(|column| column.table == table).unwrap()
}

/// Events whose payloads are sealed, under ids that tell their number.
async fn emitted(database: &Database, sealed: Vec<(String, Vec<u8>)>) {
    database
        .write(move |tx| async move {
            for (id, payload) in sealed {
                let (topic, team_id) = ("test".to_owned(), "team_1".to_owned());
                tx.emit(OutboxMessage { target: "webhook", id, topic, team_id, payload });
            }
            Ok::<_, DbError>(())
        })
        .await
        .unwrap();
}

async fn payloads(database: &Database) -> BTreeMap<String, Vec<u8>> {
    let rows = run(database, "SELECT id, payload FROM outbox", vec![]).await;
    rows.iter().map(|row| (row.try_get("", "id").unwrap(), row.try_get("", "payload").unwrap())).collect()
}

async fn run(database: &Database, sql: &'static str, values: Vec<Value>) -> Vec<sea_orm::QueryResult> {
    database
        .write(move |tx| async move {
            let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql, values);
            Ok::<_, DbError>(tx.query_all_raw(statement).await?)
        })
        .await
        .unwrap()
}

async fn everything_is_sealed_anew_and_doing_it_again_changes_nothing(database: Database) {
    let (first, second, third) = (keys(&[1]), keys(&[2, 1]), keys(&[3, 2, 1]));
    let seal = |keys: &Keyring, number: usize| {
        let id = format!("evt_{number}");
        (id.clone(), keys.sealer(Purpose::Outbox).seal(&id, id.as_bytes()))
    };
    let of_before = |number: usize| {
        let id = format!("evt_{number}");
        (id.clone(), seal_v1(&first, Purpose::Outbox, &id, id.as_bytes()))
    };
    let rows = (0..40).map(of_before).chain((40..80).map(|number| seal(&first, number)));
    emitted(&database, rows.chain((80..125).map(|number| seal(&second, number))).collect()).await;
    emitted(&database, (125..130).map(|number| seal(&third, number)).collect()).await;

    // Only looking changes nothing.
    let before = payloads(&database).await;
    let looked = reseal(&database, &third, column("outbox"), false, |_| {}).await.unwrap();
    let [first, second, now] = [&first, &second, &third].map(|keys| Some(keys.master_id()));
    assert_eq!(looked.under, BTreeMap::from([(first, 80), (second, 45), (now, 5)]));
    assert_eq!((looked.rows, looked.old, looked.resealed, looked.unopened), (130, 125, 0, 0));
    // Those of the time when there was one key.
    assert_eq!(looked.unnamed, 80);
    assert_eq!(payloads(&database).await, before);

    let mut told = Vec::new();
    let done = reseal(&database, &third, column("outbox"), true, |sum| told.push(sum.rows)).await.unwrap();
    assert_eq!((done.rows, done.old, done.resealed, done.left()), (130, 125, 125, 0));
    assert_eq!(told, [50, 100, 130]);
    let after = payloads(&database).await;
    let alone = keys(&[3]).sealer(Purpose::Outbox);
    for (id, payload) in &after {
        assert_eq!(alone.open(id, payload).unwrap(), id.as_bytes());
    }
    let again = reseal(&database, &third, column("outbox"), true, |_| {}).await.unwrap();
    assert_eq!((again.old, again.resealed, again.under), (0, 0, BTreeMap::from([(now, 130)])));
    assert_eq!(payloads(&database).await, after);

    // What names no key is as it should be where there is one alone.
    let third = keys(&[3]);
    emitted(&database, vec![seal(&third, 130)]).await;
    let alone = reseal(&database, &third, column("outbox"), true, |_| {}).await.unwrap();
    assert_eq!((alone.rows, alone.old, alone.resealed, alone.unnamed), (131, 0, 0, 1));
    assert_eq!(alone.under, BTreeMap::from([(now, 131)]));
}

async fn what_cannot_be_opened_is_counted_and_stays(database: Database) {
    let sealer = keys(&[1, 2]).sealer(Purpose::Outbox);
    let lost = keys(&[9, 8]);
    let mut damaged = sealer.seal("evt_damaged", b"hello");
    *damaged.last_mut().unwrap() ^= 1;
    let rows = vec![
        ("evt_good".to_owned(), sealer.seal("evt_good", b"hello")),
        ("evt_moved".to_owned(), sealer.seal("evt_good", b"hello")),
        ("evt_lost".to_owned(), lost.sealer(Purpose::Outbox).seal("evt_lost", b"hello")),
        ("evt_damaged".to_owned(), damaged),
        ("evt_empty".to_owned(), Vec::new()),
        ("evt_nonsense".to_owned(), b"nonsense".to_vec()),
    ];
    emitted(&database, rows).await;
    let before = payloads(&database).await;
    let now = keys(&[2, 1]);
    for resealed in [1, 0] {
        let done = reseal(&database, &now, column("outbox"), true, |_| {}).await.unwrap();
        assert_eq!((done.rows, done.resealed, done.unopened, done.left()), (6, resealed, 5, 0));
        assert_eq!(done.under[&Some(lost.master_id())], 1);
        assert_eq!(done.under[&None], 2);
        assert!(done.unopened_owners.contains(&"evt_lost".to_owned()));
    }
    let mut after = payloads(&database).await;
    assert_ne!(after.insert("evt_good".to_owned(), before["evt_good"].clone()), before.get("evt_good").cloned());
    assert_eq!(after, before);
}

async fn what_changes_meanwhile_keeps_its_change(database: Database) {
    const ROWS: usize = 300;
    let (old, now) = (keys(&[1, 2]), keys(&[2, 1]));
    let id = |number: usize| format!("evt_{number}");
    let seal = |keys: &Keyring, number, text: &str| keys.sealer(Purpose::Outbox).seal(&id(number), text.as_bytes());
    emitted(&database, (0..ROWS).map(|number| (id(number), seal(&old, number, "first"))).collect()).await;
    let ended = AtomicBool::new(false);
    let changing = async {
        for number in (0..ROWS).filter(|number| number % 3 != 0) {
            if number % 3 == 1 {
                let values = vec![seal(&old, number, "second").into(), id(number).into()];
                run(&database, "UPDATE outbox SET payload = $1 WHERE id = $2 RETURNING id", values).await;
            } else {
                run(&database, "DELETE FROM outbox WHERE id = $1 RETURNING id", vec![id(number).into()]).await;
            }
        }
        ended.store(true, Ordering::SeqCst);
    };
    let walking = async {
        loop {
            let was_ended = ended.load(Ordering::SeqCst);
            let done = reseal(&database, &now, column("outbox"), true, |_| {}).await.unwrap();
            assert_eq!(done.unopened, 0);
            if was_ended && done.resealed == 0 && done.left() == 0 {
                return;
            }
        }
    };
    tokio::join!(changing, walking);
    let found = payloads(&database).await;
    let alone = keys(&[2]).sealer(Purpose::Outbox);
    for number in 0..ROWS {
        let plain = found.get(&id(number)).map(|payload| alone.open(&id(number), payload).unwrap());
        let expected = ["first", "second", ""][number % 3];
        assert_eq!(plain.unwrap_or_default(), expected.as_bytes(), "{number}");
    }
}

async fn a_kept_key_is_what_it_was_under_the_first_master_key(database: Database) {
    let first = keys(&[1]);
    let derived = first.hasher("license-key/v1").hash(b"K7WX9");
    let kept = first.with_kept(&database, "licensing").await.unwrap();
    assert_eq!(kept.kept(KeptKey::LicenseKey).hash(b"K7WX9"), derived);
    let second = keys(&[2, 1]).with_kept(&database, "licensing").await.unwrap();
    assert_eq!(second.kept(KeptKey::LicenseKey).hash(b"K7WX9"), derived);
    let column = SealedColumn::of("licensing").find(|column| column.table == "kept_keys").unwrap();
    let done = reseal(&database, &second, column, true, |_| {}).await.unwrap();
    assert_eq!((done.rows, done.resealed), (1, 1));
    let third = keys(&[3, 2]).with_kept(&database, "licensing").await.unwrap();
    assert_eq!(third.kept(KeptKey::LicenseKey).hash(b"K7WX9"), derived);
    // A service that needs none is given none.
    keys(&[5]).with_kept(&database, "catalog").await.unwrap();
}

async fn of_two_first_starts_both_get_one_kept_key(database: Database) {
    // Nothing was hashed yet, so either may be first, under whatever key it has.
    let rings = [keys(&[1, 2]), keys(&[2, 1]), keys(&[1, 2]), keys(&[2, 1])];
    let starts = rings.into_iter().map(|keys| keys.with_kept(&database, "licensing"));
    let kept = futures_util::future::try_join_all(starts).await.unwrap();
    let hashes = kept.iter().map(|keys| keys.kept(KeptKey::LicenseKey).hash(b"K7WX9"));
    assert_eq!(hashes.collect::<std::collections::BTreeSet<_>>().len(), 1);
}

async fn a_kept_key_under_an_unknown_master_key_is_refused_in_one_sentence(database: Database) {
    let first = keys(&[1, 4]);
    first.clone().with_kept(&database, "licensing").await.unwrap();
    let refused = keys(&[2, 3]).with_kept(&database, "licensing").await.unwrap_err();
    assert!(matches!(refused, KeptKeyError::Sealed { .. }));
    let text = refused.to_string();
    assert!(text.contains(&first.master_id().to_string()) && text.contains("secrets.previous_master_keys"), "{text}");
    assert_eq!(text.lines().count(), 1);
}

async fn a_kept_key_is_not_guessed_where_something_was_hashed(database: Database) {
    let insert = "INSERT INTO licenses (id, team_id, mode, product_id, key_hash, key_sealed, activations_count, \
                  created_at_ms, updated_at_ms) VALUES ('lic_1', 't', 'live', 'p', $1, $1, 0, 1, 1) RETURNING id";
    run(&database, insert, vec![vec![1_u8].into()]).await;
    let refused = keys(&[2, 1]).with_kept(&database, "licensing").await.unwrap_err();
    assert!(matches!(refused, KeptKeyError::Undecided(_)), "{refused}");
    keys(&[1]).with_kept(&database, "licensing").await.unwrap();
    keys(&[2, 1]).with_kept(&database, "licensing").await.unwrap();
}

async fn a_kept_key_stays_where_the_schema_goes_back(database: Database) {
    let first = keys(&[1]).with_kept(&database, "licensing").await.unwrap();
    let hash = first.kept(KeptKey::LicenseKey).hash(b"K7WX9");
    // Beyond the step that made the table.
    database.migrate_down::<licensing::Migrator>(5).await.unwrap();
    database.migrate_up::<licensing::Migrator>().await.unwrap();
    let second = keys(&[2, 1]).with_kept(&database, "licensing").await.unwrap();
    assert_eq!(second.kept(KeptKey::LicenseKey).hash(b"K7WX9"), hash);
}

/// Every column that may hold something sealed is in the list, or is known to hold something else.
#[tokio::test(flavor = "multi_thread")]
async fn no_column_of_sealed_data_is_forgotten() {
    // Hashes, what is compressed, and answers that are sealed under the caller's own key.
    let others = [
        "idempotency.key_hash",
        "idempotency.request_hash",
        "idempotency.sealed_response",
        "keys.token_hash",
        "product_keys.public_hash",
        "product_keys.secret_hash",
        "invitations.token_hash",
        "password_resets.token_hash",
        "login_failures.email_hash",
        "audit_blocks.payload",
        "audit_blocks.seal",
        "audit_blocks.mac",
        "audit_head.mac",
        "audit_head.signature",
        "audit_head.pruned_mac",
        "audit_head.pruned_signature",
        "licenses.key_hash",
    ];
    let mut found = std::collections::BTreeSet::new();
    for service in crate::service::SERVICES {
        let db = TestDb::sqlite();
        let database = match service {
            "auth" => db.migrated::<auth::Migrator>().await,
            "catalog" => db.migrated::<paperkey_migrations::catalog::Migrator>().await,
            "licensing" => db.migrated::<licensing::Migrator>().await,
            _ => db.migrated::<paperkey_migrations::webhook::Migrator>().await,
        };
        let sql = "SELECT m.name AS table_name, c.name AS column_name, c.type AS kind, c.pk AS pk FROM sqlite_master m \
                   JOIN pragma_table_info(m.name) c WHERE m.type = 'table'";
        let rows = run(&database, sql, vec![]).await;
        let mut there = std::collections::BTreeMap::new();
        for row in rows {
            let text = |name| row.try_get::<String>("", name).unwrap();
            let place = format!("{}.{}", text("table_name"), text("column_name"));
            there.insert(place, (text("kind").to_lowercase(), row.try_get::<i64>("", "pk").unwrap() > 0));
        }
        let listed: Vec<&SealedColumn> = SealedColumn::of(service).collect();
        for column in &listed {
            let SealedColumn { table, owner, column: sealed, .. } = column;
            let key = column.key.column();
            assert_eq!(there[&format!("{table}.{sealed}")].0, "blob", "{service}: {column:?}");
            assert!(there[&format!("{table}.{key}")].1, "{service}: {key} is not the key of {table}");
            let number = matches!(column.key, RowKey::Number(_));
            assert_eq!(there[&format!("{table}.{key}")].0.contains("int"), number, "{service}: {column:?}");
            assert!(there.contains_key(&format!("{table}.{owner}")), "{service}: {column:?}");
        }
        for (place, (kind, _)) in there {
            if kind != "blob" && !place.contains("sealed") {
                continue;
            }
            let sealed = listed.iter().any(|column| place == format!("{}.{}", column.table, column.column));
            assert!(
                sealed || others.contains(&place.as_str()),
                "{service}: is {place} sealed? Then it belongs to a purpose"
            );
            assert!(!(sealed && others.contains(&place.as_str())), "{place}");
            found.insert(place);
        }
        database.close().await;
        db.remove().await;
    }
    for other in others {
        assert!(found.contains(other), "{other} is no column any more");
    }
}

#[test]
fn two_looks_at_the_folder_have_every_key_of_what_lies_between() {
    type Step = fn(&KeyFolder);
    let steps: [Step; 5] = [
        |_| {},
        |hands| hands.announce().unwrap(),
        |hands| hands.make_current().unwrap(),
        |hands| hands.finish().unwrap(),
        |hands| drop(hands.retire(|_| false).unwrap()),
    ];
    // Each pair of steps at which the folder is looked at.
    for (before, after) in (0..steps.len()).flat_map(|before| (before..steps.len()).map(move |after| (before, after))) {
        let (folder, elsewhere) = (TempDir::new().unwrap(), TempDir::new().unwrap());
        let keys = Keyring::load_or_create(folder.path()).unwrap();
        let hands = KeyFolder::hold(folder.path()).unwrap();
        let (mut earlier, mut sealed) = (None, Vec::new());
        for (number, step) in steps.iter().enumerate().take(after + 1) {
            step(&hands);
            keys.look();
            if number == before {
                earlier = Some(KeyCopy::read(folder.path()).unwrap());
            }
            if number >= before {
                sealed.push(keys.sealer(Purpose::Outbox).seal("evt_1", b"hello"));
            }
        }
        let copy = KeyCopy::read(folder.path()).unwrap().with_earlier(earlier.unwrap());
        assert!(!format!("{copy:?}").contains('='), "its names are shown, and nothing else: {copy:?}");
        for (name, bytes) in copy.files() {
            fs::write(elsewhere.path().join(name), bytes).unwrap();
        }
        let there = Keyring::load_or_create(elsewhere.path()).unwrap();
        for sealed in sealed {
            assert_eq!(there.sealer(Purpose::Outbox).open("evt_1", &sealed).unwrap(), b"hello", "{before} {after}");
        }
        // A change that was under way goes on from there.
        let hands = KeyFolder::hold(elsewhere.path()).unwrap();
        if hands.rotation().unwrap() != Rotation::UnderWay {
            hands.announce().unwrap();
            hands.make_current().unwrap();
        }
        hands.finish().unwrap();
    }
}
