//! The folder in which an installation keeps its keys, and how its master key is changed there.
//!
//! `master.key` seals. `master.next` is the one that comes after it, and `master.<id>.previous` are those before it: they
//! open. A change goes in steps, each of which is one rename or one link and durable before the next begins: the new key
//! becomes `master.next`, so that every running process can open what is sealed under it; the old one gets its second name;
//! `master.next` is renamed to `master.key`. `master.rotating` stays until everything is sealed anew. Whoever finds these
//! files after a crash knows how far it came, and goes on from there.
//!
//! Deliberately absent: what is sealed anew, and how long is waited in between.

use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, File, OpenOptions, TryLockError},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use rand::RngExt as _;
use zeroize::Zeroizing;

use super::{
    KEY_LENGTH, decode,
    masters::{KeyId, MAX_PREVIOUS, Master},
};

const CURRENT: &str = "master.key";
pub(super) const PEPPER: &str = "pepper.key";
pub(super) const SIGNING: &str = "signing.key";
const NEXT: &str = "master.next";
const ROTATING: &str = "master.rotating";
const LOCK: &str = "master.lock";
const DRAFT: &str = "master.draft";

type Key = [u8; KEY_LENGTH];

/// The master key of a folder, made where there is none, and the others.
pub(super) fn read_or_create(folder: &Path) -> io::Result<(Key, Vec<Key>)> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    key_or_new(&folder.join(CURRENT))?;
    read(folder)
}

/// The master key of a folder, and the others. In this order: a change that goes on meanwhile hides none.
pub(super) fn read(folder: &Path) -> io::Result<(Key, Vec<Key>)> {
    let mut others: Vec<Key> = if_there(key_of(&folder.join(NEXT)))?.into_iter().collect();
    let current = key_of(&folder.join(CURRENT))?;
    for path in previous(folder)? {
        others.extend(if_there(key_of(&path))?);
    }
    Ok((current, others))
}

/// The key of a file, which is created only where there is none, so that two first starts cannot each keep a key of their
/// own.
pub(super) fn key_or_new(path: &Path) -> io::Result<Key> {
    if let Some(key) = if_there(key_of(path))? {
        return Ok(key);
    }
    // Written whole beside it and linked into place: a crash leaves either no file or a good one.
    let draft = path.with_extension(format!("{}.new", std::process::id()));
    write_new_key(&draft)?;
    let linked = fs::hard_link(&draft, path);
    fs::remove_file(&draft)?;
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => sync_folder(path)?,
    }
    key_of(path)
}

fn write_new_key(path: &Path) -> io::Result<()> {
    let key: Key = rand::rng().random();
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(BASE64.encode(key).as_bytes())?;
    file.sync_all()
}

/// Whether the key changes at this moment.
pub(super) fn is_changing(folder: &Path) -> bool {
    [NEXT, ROTATING].iter().any(|name| folder.join(name).exists())
}

fn key_of(path: &Path) -> io::Result<Key> {
    let text = Zeroizing::new(fs::read_to_string(path)?);
    decode(&text).ok_or_else(|| {
        let message = format!("{} does not hold 32 bytes in base64; restore it from a backup", path.display());
        io::Error::new(io::ErrorKind::InvalidData, message)
    })
}

fn if_there<T>(outcome: io::Result<T>) -> io::Result<Option<T>> {
    match outcome {
        Ok(value) => Ok(Some(value)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The files of the keys before, in one order.
fn previous(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        if name.to_str().is_some_and(|name| name.starts_with("master.") && name.ends_with(".previous")) {
            found.push(folder.join(name));
        }
    }
    found.sort();
    Ok(found)
}

/// Makes durable what a folder says of its files.
fn sync_folder(file: &Path) -> io::Result<()> {
    file.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

/// How far a change of the master key has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// None is under way.
    None,
    /// The new key is there, and opens.
    Announced,
    /// The new key seals. Not everything may be sealed anew yet.
    UnderWay,
}

/// The folder in the hand of the one who changes its master key.
#[derive(Debug)]
pub struct KeyFolder {
    folder: PathBuf,
    _lock: File,
}

/// Why the folder is not to be had, or cannot be changed.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// Another process changes it.
    #[error("another `paperkey admin rotate-secrets` is at work on this installation")]
    Held,
    /// It keeps as many old keys as it may.
    #[error(
        "{MAX_PREVIOUS} older master keys are kept: `paperkey admin rotate-secrets --retire` removes those that hold nothing"
    )]
    Full,
    /// It cannot be read or written.
    #[error("the folder of the master keys cannot be changed: {0}")]
    Io(#[from] io::Error),
}

impl KeyFolder {
    /// Whether the keys are there that an installation makes at its first start.
    pub fn is_complete(folder: &Path) -> io::Result<bool> {
        for name in [CURRENT, PEPPER, SIGNING] {
            if !folder.join(name).try_exists()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Takes the folder, for as long as this value lives. Its lock ends with the process, however that ends.
    pub fn hold(folder: &Path) -> Result<Self, FolderError> {
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(folder.join(LOCK))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(FolderError::Held),
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        // Whoever left it died before it was a key.
        if_there(fs::remove_file(folder.join(DRAFT)))?;
        Ok(Self { folder: folder.to_owned(), _lock: lock })
    }

    /// How far a change has come, such as one that a process has begun that died over it.
    pub fn rotation(&self) -> Result<Rotation, FolderError> {
        Ok(if self.folder.join(NEXT).try_exists()? {
            Rotation::Announced
        } else if self.folder.join(ROTATING).try_exists()? {
            Rotation::UnderWay
        } else {
            Rotation::None
        })
    }

    /// Makes a new key that opens, unless one was begun with.
    pub fn announce(&self) -> Result<(), FolderError> {
        let next = self.folder.join(NEXT);
        if !next.try_exists()? {
            if previous(&self.folder)?.len() >= MAX_PREVIOUS {
                return Err(FolderError::Full);
            }
            let draft = self.folder.join(DRAFT);
            write_new_key(&draft)?;
            fs::rename(&draft, &next)?;
        }
        OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(self.folder.join(ROTATING))?;
        sync_folder(&next)?;
        Ok(())
    }

    /// Makes the announced key the one that seals, and keeps the one before.
    pub fn make_current(&self) -> Result<(), FolderError> {
        let (current, next) = (self.folder.join(CURRENT), self.folder.join(NEXT));
        let key = key_of(&current)?;
        let kept = self.folder.join(format!("master.{}.previous", Master::new(key).id));
        match fs::hard_link(&current, &kept) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                // A process that died had come this far; or what is there is not this key, which would be lost.
                if key_of(&kept)? != key {
                    let message = format!("{} does not hold the key of its name: move it away", kept.display());
                    return Err(io::Error::new(io::ErrorKind::InvalidData, message).into());
                }
            }
            outcome => outcome?,
        }
        sync_folder(&current)?;
        fs::rename(&next, &current)?;
        sync_folder(&current)?;
        Ok(())
    }

    /// Notes that everything is sealed anew.
    pub fn finish(&self) -> Result<(), FolderError> {
        if_there(fs::remove_file(self.folder.join(ROTATING)))?;
        sync_folder(&self.folder.join(ROTATING))?;
        Ok(())
    }

    /// Removes the keys before that are not in use, and says which they were.
    pub fn retire(&self, in_use: impl Fn(KeyId) -> bool) -> Result<Vec<KeyId>, FolderError> {
        let mut retired = Vec::new();
        for path in previous(&self.folder)? {
            let id = Master::new(key_of(&path)?).id;
            if !in_use(id) {
                fs::remove_file(&path)?;
                retired.push(id);
            }
        }
        sync_folder(&self.folder.join(CURRENT))?;
        Ok(retired)
    }
}

/// What the folder holds, to be kept elsewhere.
///
/// Keys are there before anything is sealed under them, and for as long as anything is. So whoever reads the folder before
/// and after a moment, and keeps both ([`Self::with_earlier`]), has every key of that moment, also in the middle of a change.
pub struct KeyCopy(BTreeMap<String, Zeroizing<Vec<u8>>>);

impl KeyCopy {
    /// Reads the folder, in the order in which a change that goes on meanwhile hides no key.
    pub fn read(folder: &Path) -> io::Result<Self> {
        let mut files = BTreeMap::new();
        for name in [NEXT, ROTATING] {
            if let Some(bytes) = if_there(fs::read(folder.join(name)))? {
                files.insert(name.to_owned(), Zeroizing::new(bytes));
            }
        }
        files.insert(CURRENT.to_owned(), Zeroizing::new(fs::read(folder.join(CURRENT))?));
        for path in previous(folder)? {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
            if let Some(bytes) = if_there(fs::read(&path))? {
                files.insert(name, Zeroizing::new(bytes));
            }
        }
        for name in [PEPPER, SIGNING] {
            files.insert(name.to_owned(), Zeroizing::new(fs::read(folder.join(name))?));
        }
        let mut copy = Self(files);
        // It became the current one between the two looks.
        if copy.0.get(NEXT).is_some_and(|next| Some(next) == copy.0.get(CURRENT)) {
            copy.0.remove(NEXT);
        }
        Ok(copy)
    }

    /// The same, and the master keys that were there before and are no more.
    #[must_use]
    pub fn with_earlier(mut self, earlier: Self) -> Self {
        let is_master = |name: &str| name == CURRENT || name == NEXT || name.ends_with(".previous");
        for (name, bytes) in earlier.0 {
            let known = self.0.iter().any(|(known, there)| is_master(known) && *there == bytes);
            if !is_master(&name) || known {
                continue;
            }
            let key = std::str::from_utf8(&bytes).ok().and_then(decode);
            let Some(key) = key else { continue };
            self.0.insert(format!("master.{}.previous", Master::new(key).id), bytes);
        }
        self
    }

    /// The names of the files, and what is in them.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
    }
}

impl fmt::Debug for KeyCopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.keys()).finish()
    }
}
