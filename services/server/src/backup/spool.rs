//! What waits in the spool of the audit log, as it is at one moment.
//!
//! While writers are held the segments are only found and opened: a segment that is full is removed when auth has it, and
//! what is open can be read for all that. Only the newest of each slot is read at once, since it is emptied in its place;
//! it is never longer than a segment and a batch. Frames are appended all the while, so a segment is read as far as it was
//! long at the moment, which is between two frames or in one that the next start passes over.
//!
//! A process that starts takes over the segments of dead ones. So all is found twice, until both agree: in between, none
//! has moved from a slot that was yet to be looked at into one that had been.

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read as _, Write as _},
    path::Path,
};

use super::{AUDIT_SPOOL, is_a, names_in};

/// How often it is looked, until two looks agree.
const LOOKS: u32 = 100;

/// A segment, and what it held at the moment.
pub(super) struct Segment {
    name: String,
    held: What,
}

enum What {
    Read(Vec<u8>),
    Opened(File, u64),
}

impl Segment {
    /// Its name in a backup.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Writes what it held.
    pub(super) fn copy_to(self, to: &mut File) -> io::Result<()> {
        match self.held {
            What::Read(bytes) => to.write_all(&bytes),
            What::Opened(file, length) => io::copy(&mut file.take(length), to).map(drop),
        }
    }
}

/// The segments in the folder of the spool that hold anything.
pub(super) fn of(folder: &Path) -> io::Result<Vec<Segment>> {
    let mut found = names(folder)?;
    for _ in 0..LOOKS {
        let opened = open(folder, &found)?;
        let again = names(folder)?;
        match opened {
            Some(segments) if again == found => return Ok(segments),
            _ => found = again,
        }
    }
    Err(io::Error::other("the segments of the audit log do not stand still"))
}

/// Slots, and the names of their segments, which sort by age.
fn names(folder: &Path) -> io::Result<BTreeSet<(String, String)>> {
    let mut found = BTreeSet::new();
    for slot in names_in(folder)? {
        if !folder.join(&slot).is_dir() {
            continue;
        }
        let names = names_in(&folder.join(&slot))?;
        found.extend(names.into_iter().filter(|name| is_a("spool", name)).map(|name| (slot.clone(), name)));
    }
    Ok(found)
}

/// Opens them; `None` where one of them has gone.
fn open(folder: &Path, found: &BTreeSet<(String, String)>) -> io::Result<Option<Vec<Segment>>> {
    let mut segments = Vec::new();
    for (slot, name) in found {
        let is_newest = !found.iter().any(|(other, later)| other == slot && later > name);
        let file = match File::open(folder.join(slot).join(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let length = file.metadata()?.len();
        if length == 0 {
            // Emptied, and written on.
            continue;
        }
        let held = if is_newest {
            let mut bytes = Vec::new();
            file.take(length).read_to_end(&mut bytes)?;
            What::Read(bytes)
        } else {
            What::Opened(file, length)
        };
        segments.push(Segment { name: format!("{AUDIT_SPOOL}/{slot}/{name}"), held });
    }
    Ok(Some(segments))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, OpenOptions};

    use super::*;

    #[test]
    fn what_is_handed_over_afterwards_is_there_for_all_that() {
        let folder = std::env::temp_dir().join(format!("paperkey-spool-{}", std::process::id()));
        let path = |slot: &str, name: &str| folder.join(slot).join(name);
        assert!(of(&folder).unwrap().is_empty());
        fs::create_dir_all(folder.join("0")).unwrap();
        fs::create_dir_all(folder.join("1")).unwrap();
        fs::write(path("0", "lock"), "").unwrap();
        fs::write(path("0", "01.spool"), "full").unwrap();
        fs::write(path("0", "02.spool"), "newest").unwrap();
        fs::write(path("1", "01.spool"), "").unwrap();
        let segments = of(&folder).unwrap();
        // Handed over, emptied in its place and written on, and appended to.
        let mut full = OpenOptions::new().append(true).open(path("0", "01.spool")).unwrap();
        full.write_all(b" and more").unwrap();
        fs::remove_file(path("0", "01.spool")).unwrap();
        fs::write(path("0", "02.spool"), "other").unwrap();
        let held: Vec<(String, String)> = segments
            .into_iter()
            .map(|segment| {
                let (name, copy) = (segment.name().to_owned(), folder.join("copy"));
                segment.copy_to(&mut File::create(&copy).unwrap()).unwrap();
                (name, fs::read_to_string(copy).unwrap())
            })
            .collect();
        let wanted = [("audit-spool/0/01.spool", "full"), ("audit-spool/0/02.spool", "newest")];
        assert_eq!(held, wanted.map(|(name, text)| (name.to_owned(), text.to_owned())));
        fs::remove_dir_all(&folder).unwrap();
    }
}
