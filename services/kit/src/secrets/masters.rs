//! Master keys: the one that seals, and those before and after it that still open.
//!
//! Where they are kept in a folder, a running process follows the folder: whoever needs a key looks there again once a
//! second at most, and at once where data names a key that is not known. So nothing has to be restarted when the key
//! changes, and a process that slept for long does not go on with what it knew.
//!
//! Deliberately absent: who changes the folder ([`super::folder`]).

use std::{
    fmt, io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Mutex, RwLock};
use ring::aead::{CHACHA20_POLY1305, LessSafeKey, UnboundKey};
use zeroize::ZeroizeOnDrop;

use super::{KEY_LENGTH, KeyedHash, Purpose, folder};

/// How many other keys are known at most.
pub const MAX_PREVIOUS: usize = 8;

/// How long what was seen in the folder is believed.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long it is believed while another thread looks.
const LOOK_AT_LATEST: Duration = Duration::from_secs(2);

/// How often is looked at once, for data that names a key that is not known: it may name one that is lost.
const ASK_EVERY: Duration = Duration::from_millis(100);

/// How long after a change of the folder no process goes by what was there before.
pub const FOLLOWED_WITHIN: Duration = Duration::from_secs(3);

/// By what sealed data names the master key: four bytes that tell nothing of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(pub(super) [u8; Self::LENGTH]);

impl KeyId {
    pub(super) const LENGTH: usize = 4;
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}", u32::from_be_bytes(self.0))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyId({self})")
    }
}

/// One master key, with what is derived from it for every purpose.
pub(super) struct Master {
    pub(super) id: KeyId,
    key: Raw,
    sealing: [LessSafeKey; Purpose::ALL.len()],
    principal: KeyedHash,
}

#[derive(PartialEq, Eq, ZeroizeOnDrop)]
struct Raw([u8; KEY_LENGTH]);

impl Master {
    pub(super) fn new(key: [u8; KEY_LENGTH]) -> Self {
        let mut id = [0; KeyId::LENGTH];
        id.copy_from_slice(&KeyedHash::new(&key).hash(b"paperkey master key id")[..KeyId::LENGTH]);
        let sealing = Purpose::ALL.map(|purpose| {
            let key = UnboundKey::new(&CHACHA20_POLY1305, &derive(&key, purpose.label()));
            LessSafeKey::new(key.expect("the key has the length that the algorithm asks for"))
        });
        let principal = KeyedHash::new(&derive(&key, "principal/v1"));
        Self { id: KeyId(id), key: Raw(key), sealing, principal }
    }

    pub(super) fn sealing(&self, purpose: Purpose) -> &LessSafeKey {
        &self.sealing[purpose as usize]
    }

    pub(super) fn principal(&self) -> &KeyedHash {
        &self.principal
    }

    pub(super) fn derive(&self, label: &str) -> [u8; KEY_LENGTH] {
        derive(&self.key.0, label)
    }
}

fn derive(key: &[u8], label: &str) -> [u8; KEY_LENGTH] {
    KeyedHash::new(key).hash(format!("paperkey/{label}").as_bytes())
}

/// The keys that are known.
pub(super) struct Masters {
    pub(super) current: Master,
    pub(super) others: Vec<Master>,
}

impl Masters {
    /// Each key once, and the current one among no others.
    pub(super) fn new(current: [u8; KEY_LENGTH], others: impl IntoIterator<Item = [u8; KEY_LENGTH]>) -> Self {
        let mut masters = Self { current: Master::new(current), others: Vec::new() };
        for key in others {
            if masters.all().all(|known| known.key.0 != key) {
                masters.others.push(Master::new(key));
            }
        }
        masters
    }

    /// The current one first.
    pub(super) fn all(&self) -> impl Iterator<Item = &Master> {
        std::iter::once(&self.current).chain(&self.others)
    }

    pub(super) fn knows(&self, id: KeyId) -> bool {
        self.all().any(|master| master.id == id)
    }

    fn are(&self, current: &[u8; KEY_LENGTH], others: &[[u8; KEY_LENGTH]]) -> bool {
        let known = |key: &[u8; KEY_LENGTH]| self.all().any(|master| master.key.0 == *key);
        self.current.key.0 == *current
            && others.iter().all(known)
            && self.others.iter().all(|master| others.contains(&master.key.0))
    }
}

/// Where the keys come from.
pub(super) struct Source {
    known: RwLock<Arc<Masters>>,
    folder: Option<Followed>,
}

struct Followed {
    path: PathBuf,
    /// Held by the one who looks; and when was last asked for the newest.
    looking: Mutex<Option<Instant>>,
    since: Instant,
    /// When was last looked, in milliseconds of `since`.
    looked_ms: AtomicU64,
    /// Until when others may go by another key, in the same.
    changing_until_ms: AtomicU64,
}

impl Source {
    /// Keys that stay as they are for as long as the process lives.
    pub(super) fn given(masters: Masters) -> Self {
        Self { known: RwLock::new(Arc::new(masters)), folder: None }
    }

    /// The keys of a folder, of which the first is made if there is none.
    pub(super) fn of_folder(path: PathBuf) -> io::Result<Self> {
        let (current, others) = folder::read_or_create(&path)?;
        let known = RwLock::new(Arc::new(Masters::new(current, others)));
        let followed = Followed {
            path,
            looking: Mutex::new(None),
            since: Instant::now(),
            looked_ms: AtomicU64::new(0),
            changing_until_ms: AtomicU64::new(0),
        };
        followed.note_change();
        Ok(Self { known, folder: Some(followed) })
    }

    /// The keys of this moment, or of a second ago.
    pub(super) fn masters(&self) -> Arc<Masters> {
        if let Some(folder) = &self.folder {
            let age = folder.age();
            if age > LOOK_AT_LATEST {
                let _looking = folder.looking.lock();
                // Another may have looked while this one waited.
                if folder.age() > LOOK_EVERY {
                    self.look_into(folder);
                }
            } else if age > LOOK_EVERY
                && let Some(_looking) = folder.looking.try_lock()
            {
                self.look_into(folder);
            }
        }
        Arc::clone(&self.known.read())
    }

    /// The keys as they are there now, or were a moment ago.
    pub(super) fn newest(&self) -> Arc<Masters> {
        if let Some(folder) = &self.folder {
            let mut asked = folder.looking.lock();
            if asked.is_none_or(|at| at.elapsed() >= ASK_EVERY) {
                self.look_into(folder);
                *asked = Some(Instant::now());
            }
        }
        Arc::clone(&self.known.read())
    }

    /// Looks now.
    pub(super) fn look(&self) {
        if let Some(folder) = &self.folder {
            let _looking = folder.looking.lock();
            self.look_into(folder);
        }
    }

    /// Whether another process may go by another key than this one does. Keys that are given change by restarts, of which
    /// nobody is told: there, all of them count for as long as they are given.
    pub(super) fn is_changing(&self) -> bool {
        self.folder.as_ref().is_none_or(|folder| folder.elapsed_ms() < folder.changing_until_ms.load(Ordering::Acquire))
    }

    /// A few small files, read faster than a thread is woken: so this does not leave the caller's.
    fn look_into(&self, folder: &Followed) {
        folder.looked_ms.store(folder.elapsed_ms(), Ordering::Release);
        folder.note_change();
        match folder::read(&folder.path) {
            Ok((current, others)) => {
                let is_news = !self.known.read().are(&current, &others);
                if is_news {
                    let masters = Masters::new(current, others);
                    tracing::info!(current = %masters.current.id, others = masters.others.len(), "the master keys changed");
                    *self.known.write() = Arc::new(masters);
                }
            }
            // What is known goes on working.
            Err(error) => tracing::warn!(%error, "the folder of the master keys cannot be read"),
        }
    }
}

impl Followed {
    /// While the key changes, and as long after as others need to see that it has.
    fn note_change(&self) {
        if folder::is_changing(&self.path) {
            let still = u64::try_from((FOLLOWED_WITHIN + LOOK_AT_LATEST).as_millis()).unwrap_or(u64::MAX);
            self.changing_until_ms.store(self.elapsed_ms().saturating_add(still), Ordering::Release);
        }
    }

    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn age(&self) -> Duration {
        Duration::from_millis(self.elapsed_ms().saturating_sub(self.looked_ms.load(Ordering::Acquire)))
    }
}
