//! What a backup says of itself: of what it is, and what each of its files has to be.
//!
//! `manifest.json` names every file with its length and hash, and `manifest.sha256` hashes the manifest, in the form that
//! `sha256sum --check` reads. It finds damage, not malice: whoever can write to a backup can write both.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    io::{self, Read as _},
    path::Path,
};

use paperkey_kit::service::SERVICES;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{is_ours, unreadable};
use crate::{Failure, process::VERSION};

pub(super) const NAME: &str = "manifest.json";
pub(super) const SUM: &str = "manifest.sha256";

/// The form that this program writes, and the newest that it reads.
const FORMAT: u32 = 1;

/// No manifest is longer: a file of it takes about 150 bytes.
const MAX_BYTES: u64 = 256 * 1_024 * 1_024;

/// Where the keys of a backup are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Held {
    /// In it.
    Included,
    /// Elsewhere: they were to be left out.
    LeftOut,
    /// In the configuration of the installation.
    Given,
}

impl Held {
    /// What whoever has made the backup should know of it.
    pub(super) fn in_words(self, dir: &Path) -> String {
        match self {
            Self::Included => format!(
                "It holds the keys ({}/secrets), with which all else in it can be read: keep it as you keep those",
                dir.display()
            ),
            Self::LeftOut => {
                "The keys are not in it: without data/secrets of this moment, kept elsewhere, it opens for nobody"
                    .to_owned()
            }
            Self::Given => {
                "The configuration gives the keys, which are not in it: keep [secrets] elsewhere, without which \
                            it opens for nobody"
                    .to_owned()
            }
        }
    }
}

/// One file of a backup.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) path: String,
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Manifest {
    format: u32,
    /// Of the program that has made it.
    pub(super) version: String,
    pub(super) taken_at: String,
    pub(super) keys: Held,
    /// The migrations that the database of each service has.
    pub(super) schemas: BTreeMap<String, Vec<String>>,
    pub(super) files: Vec<Entry>,
}

/// All that is read of a manifest before it is known whether the rest can be.
#[derive(Deserialize)]
struct Form {
    format: u32,
}

impl Manifest {
    pub(super) fn new(taken_at: String, keys: Held) -> Self {
        let version = VERSION.to_owned();
        Self { format: FORMAT, version, taken_at, keys, schemas: BTreeMap::new(), files: Vec::new() }
    }

    /// Notes a file as it lies there.
    pub(super) fn add(&mut self, folder: &Path, path: &str) -> Result<(), Failure> {
        let whole = folder.join(path);
        let (bytes, sha256) = File::open(&whole)
            .and_then(|mut file| hash(&mut file, |_| Ok(())))
            .map_err(|error| unreadable(&whole, &error))?;
        self.files.push(Entry { path: path.to_owned(), bytes, sha256 });
        Ok(())
    }

    pub(super) fn write(&self, write: impl Fn(&str, &[u8]) -> Result<(), Failure>) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(self)? + "\n";
        write(NAME, text.as_bytes())?;
        write(SUM, format!("{}  {NAME}\n", hex(&Sha256::digest(&text))).as_bytes())
    }

    /// Reads the manifest of a backup, and judges it as far as that goes without its files.
    pub(super) fn read(dir: &Path) -> Result<Self, Failure> {
        let path = dir.join(NAME);
        let no_backup = |what: &str| Failure(format!("{} is no whole backup: {what}", dir.display()));
        let read = |name: &str| {
            let path = dir.join(name);
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Err(no_backup(&format!("there is no {name}")));
                }
                Err(error) => return Err(unreadable(&path, &error)),
            };
            let mut bytes = Vec::new();
            file.take(MAX_BYTES).read_to_end(&mut bytes).map_err(|error| unreadable(&path, &error))?;
            Ok(bytes)
        };
        let (text, sum) = (read(NAME)?, read(SUM)?);
        if sum != format!("{}  {NAME}\n", hex(&Sha256::digest(&text))).as_bytes() {
            return Err(no_backup(&format!("{NAME} is not what {SUM} says: one of them is damaged")));
        }
        let unclear = |error: &serde_json::Error| no_backup(&format!("{}: {error}", path.display()));
        let Form { format } = serde_json::from_slice(&text).map_err(|error| unclear(&error))?;
        if format > FORMAT {
            return Err(Failure(format!(
                "{} was made by a newer release, in a form that this one does not read: restore it with that",
                dir.display()
            )));
        }
        let manifest: Self = serde_json::from_slice(&text).map_err(|error| unclear(&error))?;
        let mut named = BTreeSet::new();
        for file in &manifest.files {
            if !is_ours(&file.path) || !named.insert(file.path.as_str()) {
                return Err(no_backup(&format!("it names {:?}, which no backup holds", file.path)));
            }
        }
        if let Some(service) = SERVICES.into_iter().find(|service| !named.contains(format!("{service}.db").as_str())) {
            return Err(no_backup(&format!("it has no database of {service}")));
        }
        Ok(manifest)
    }

    /// Refuses what this program is too old for.
    pub(super) fn judge_schemas(&self, known: impl Fn(&str) -> Vec<String>) -> Result<(), Failure> {
        for (service, applied) in &self.schemas {
            let known = known(service);
            if let Some(newer) = applied.iter().find(|name| !known.contains(name)) {
                return Err(Failure(format!(
                    "the database of {service} in this backup has {newer}, which this release ({VERSION}) does not know: \
                     restore it with the release that made it ({}), or a newer one",
                    self.version
                )));
            }
        }
        Ok(())
    }
}

impl Entry {
    /// Reads the file of a backup to its end, giving away what is read, and refuses one that is not what it was.
    pub(super) fn read(&self, dir: &Path, each: impl FnMut(&[u8]) -> io::Result<()>) -> Result<(), Failure> {
        let path = dir.join(&self.path);
        let damaged = |what: &str| Failure(format!("{} is damaged: {what}", path.display()));
        match fs::symlink_metadata(&path) {
            Ok(there) if !there.is_file() => return Err(damaged("it is no file")),
            Ok(there) if there.len() != self.bytes => {
                return Err(damaged(&format!("it has {} bytes and not {}", there.len(), self.bytes)));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(damaged("it is not there")),
            Err(error) => return Err(unreadable(&path, &error)),
        }
        let read = File::open(&path).and_then(|mut file| hash(&mut file, each));
        let (bytes, sha256) = read.map_err(|error| Failure(format!("{} cannot be copied: {error}", path.display())))?;
        if (bytes, sha256.as_str()) != (self.bytes, self.sha256.as_str()) {
            return Err(damaged("its hash is not the one of the manifest"));
        }
        Ok(())
    }
}

/// The length and the hash of what a file holds.
fn hash(file: &mut File, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<(u64, String)> {
    let mut hash = Sha256::new();
    let mut length = 0;
    let mut buffer = vec![0; 1_024 * 1_024];
    loop {
        let read = file.read(&mut buffer)?;
        let Some(bytes) = buffer.get(..read).filter(|bytes| !bytes.is_empty()) else { break };
        hash.update(bytes);
        each(bytes)?;
        length += bytes.len() as u64;
    }
    Ok((length, hex(&hash.finalize())))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_schema_that_is_newer_is_refused_and_an_older_one_is_not() {
        let mut manifest = Manifest::new("2026-01-01T00:00:00.000Z".to_owned(), Held::Included);
        manifest.schemas.insert("auth".to_owned(), vec!["a_0001".to_owned()]);
        manifest.judge_schemas(|_| vec!["a_0001".to_owned(), "a_0002".to_owned()]).unwrap();
        manifest.schemas.insert("auth".to_owned(), vec!["a_0001".to_owned(), "a_0003".to_owned()]);
        let refused = manifest.judge_schemas(|_| vec!["a_0001".to_owned(), "a_0002".to_owned()]).unwrap_err();
        assert!(refused.0.contains("a_0003") && refused.0.contains("newer"), "{refused}");
    }
}
