//! The keys of an installation, of one moment: those that seal, and the one of the installation itself.
//!
//! The system key's file is written beside its place before the key is stored, and moved afterwards. A backup has the file
//! of before its moment, and what came after it as such a draft: the next start moves or removes it, by what the database
//! of the moment knows.

use std::path::Path;

use paperkey_kit::secrets::KeyCopy;
use zeroize::Zeroizing;

use super::{SECRETS, file_if_there, manifest::Held, unreadable};
use crate::Failure;

const SYSTEM: &str = "system.key";
const SYSTEM_DRAFT: &str = "system.key.new";

type Bytes = Zeroizing<Vec<u8>>;

/// What the folder of the keys held when it was looked at.
#[derive(Debug, Default)]
pub(super) struct Keys {
    copy: Option<KeyCopy>,
    system: Option<Bytes>,
    draft: Option<Bytes>,
}

impl Keys {
    pub(super) fn read(folder: &Path, held: Held) -> Result<Self, Failure> {
        // The draft first: it may become the key in between, and is then found twice and not missed.
        let read = |name: &str| Ok::<_, Failure>(file_if_there(&folder.join(name))?.map(Zeroizing::new));
        let (draft, system) = (read(SYSTEM_DRAFT)?, read(SYSTEM)?);
        let copy = match held {
            Held::Included => Some(KeyCopy::read(folder).map_err(|error| unreadable(folder, &error))?),
            Held::Given | Held::LeftOut => None,
        };
        Ok(Self { copy, system, draft })
    }

    /// Both of two looks.
    pub(super) fn with_earlier(self, earlier: Self) -> Self {
        let copy = match (self.copy, earlier.copy) {
            (Some(later), Some(earlier)) => Some(later.with_earlier(earlier)),
            (later, earlier) => later.or(earlier),
        };
        let system = earlier.system.or_else(|| self.system.clone());
        let newer =
            [self.draft, self.system, earlier.draft].into_iter().flatten().find(|key| Some(key) != system.as_ref());
        Self { copy, system, draft: newer }
    }

    /// Their files, as a backup names them.
    pub(super) fn into_files(self) -> Vec<(String, Vec<u8>)> {
        let copied = self.copy.iter().flat_map(KeyCopy::files).map(|(name, bytes)| (name, bytes.to_vec()));
        let own = [(SYSTEM, &self.system), (SYSTEM_DRAFT, &self.draft)];
        let own = own.into_iter().filter_map(|(name, bytes)| Some((name, bytes.as_ref()?.to_vec())));
        copied.chain(own).map(|(name, bytes)| (format!("{SECRETS}/{name}"), bytes)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(system: Option<&str>, draft: Option<&str>) -> Keys {
        let bytes = |text: &str| Zeroizing::new(text.as_bytes().to_vec());
        Keys { copy: None, system: system.map(bytes), draft: draft.map(bytes) }
    }

    fn together(before: Keys, after: Keys) -> Vec<(String, String)> {
        let files = after.with_earlier(before).into_files();
        files.into_iter().map(|(name, bytes)| (name, String::from_utf8(bytes).unwrap())).collect()
    }

    #[test]
    fn a_system_key_that_changed_meanwhile_is_kept_in_both_forms() {
        let of = |files: &[(&str, &str)]| -> Vec<(String, String)> {
            files.iter().map(|(name, text)| (format!("secrets/{name}"), (*text).to_owned())).collect()
        };
        let both = of(&[("system.key", "old"), ("system.key.new", "new")]);
        assert_eq!(together(keys(Some("old"), None), keys(Some("old"), None)), of(&[("system.key", "old")]));
        assert_eq!(together(keys(Some("old"), None), keys(Some("new"), None)), both);
        assert_eq!(together(keys(Some("old"), Some("new")), keys(Some("new"), None)), both);
        assert_eq!(together(keys(Some("old"), None), keys(Some("old"), Some("new"))), both);
        assert_eq!(together(keys(None, None), keys(Some("new"), None)), of(&[("system.key", "new")]));
        assert_eq!(together(keys(None, None), keys(None, None)), of(&[]));
    }
}
