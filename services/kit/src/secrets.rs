//! Secrets: the type that does not print them, the installation's keys, sealing and keyed hashing.
//!
//! Every purpose has a key of its own, derived from the master key by its label, so that nothing sealed for one
//! purpose can be opened for another. Tokens are hashed with the pepper instead, which may be kept elsewhere.
//!
//! The master key can be changed while everything runs ([`masters`]): sealed data names its key ([`sealer`]), is listed in
//! one place ([`purpose`]) and sealed anew in the background ([`reseal`]). What was hashed cannot be hashed anew, so the
//! keys of such hashes are kept, sealed like everything else ([`kept`]).

mod folder;
mod kept;
mod masters;
mod purpose;
mod reseal;
mod sealer;
#[cfg(test)]
mod tests;

use std::{fmt, io, path::Path, sync::Arc};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use hmac::{Hmac, KeyInit as _, Mac as _};
use rand::RngExt as _;
use sha2::Sha256;
use zeroize::{Zeroize as _, ZeroizeOnDrop};

use self::masters::{Masters, Source};
pub use self::{
    folder::{FolderError, KeyCopy, KeyFolder, Rotation},
    kept::KeptKeyError,
    masters::{FOLLOWED_WITHIN, KeyId, MAX_PREVIOUS},
    purpose::{KeptKey, Purpose, RowKey, SealedColumn},
    reseal::{Resealed, reseal},
    sealer::{CannotOpen, KeySealer, Opened, Sealer, key_named},
};

const KEY_LENGTH: usize = 32;

/// Text that must not be printed: shown as `[redacted]`, wiped when dropped.
#[derive(Clone, Default, PartialEq, Eq, ZeroizeOnDrop, serde::Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Takes the text into custody.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// The text itself. Every use is a place to look at.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

impl serde::Serialize for Secret {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str("[redacted]")
    }
}

/// The keys of the installation. Clones follow the same changes of the master key.
#[derive(Clone)]
pub struct Keyring {
    source: Arc<Source>,
    fixed: Arc<Fixed>,
    /// In the order of [`KeptKey::ALL`]; those that were brought in.
    kept: [Option<KeyedHash>; KeptKey::ALL.len()],
}

/// Keys that stay as they are for as long as the process lives.
#[derive(ZeroizeOnDrop)]
struct Fixed {
    pepper: [u8; KEY_LENGTH],
    /// The one before, while there are tokens that were last used under it.
    previous_pepper: Option<[u8; KEY_LENGTH]>,
    signing: [u8; KEY_LENGTH],
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keyring([redacted])")
    }
}

/// A key that was given does not have the right form.
#[derive(Debug, thiserror::Error)]
#[error("secrets.{0} must be 32 bytes in base64, such as `openssl rand -base64 32` prints")]
pub struct BadKey(pub &'static str);

impl Keyring {
    fn new(source: Source, fixed: Fixed) -> Self {
        Self { source: Arc::new(source), fixed: Arc::new(fixed), kept: [const { None }; KeptKey::ALL.len()] }
    }

    /// Reads the three keys as the configuration gives them: 32 bytes each, in base64.
    pub fn from_base64(master: &Secret, pepper: &Secret, signing: &Secret) -> Result<Self, BadKey> {
        Self::with_previous_masters(master, &[], pepper, signing)
    }

    /// The same, and the master keys besides the one that seals: those before it, or the one that comes after it.
    pub fn with_previous_masters(
        master: &Secret,
        previous: &[Secret],
        pepper: &Secret,
        signing: &Secret,
    ) -> Result<Self, BadKey> {
        let previous = previous
            .iter()
            .map(|key| decode(key.expose()).ok_or(BadKey("previous_master_keys")))
            .collect::<Result<Vec<_>, _>>()?;
        let masters = Masters::new(decode(master.expose()).ok_or(BadKey("master_key"))?, previous);
        let fixed = Fixed {
            pepper: decode(pepper.expose()).ok_or(BadKey("pepper"))?,
            previous_pepper: None,
            signing: decode(signing.expose()).ok_or(BadKey("signing_key"))?,
        };
        Ok(Self::new(Source::given(masters), fixed))
    }

    /// Reads the keys kept in a folder, making those that are not there yet. Changes of the master key there are followed.
    pub fn load_or_create(folder: &Path) -> io::Result<Self> {
        let source = Source::of_folder(folder.to_owned())?;
        let fixed = Fixed {
            pepper: folder::key_or_new(&folder.join(folder::PEPPER))?,
            previous_pepper: None,
            signing: folder::key_or_new(&folder.join(folder::SIGNING))?,
        };
        Ok(Self::new(source, fixed))
    }

    /// Keys for tests: the same everywhere.
    pub fn for_tests() -> Self {
        let masters = Masters::new([1; KEY_LENGTH], []);
        let fixed = Fixed { pepper: [2; KEY_LENGTH], previous_pepper: None, signing: [3; KEY_LENGTH] };
        Self::new(Source::given(masters), fixed).with_derived_kept_keys()
    }

    /// The same keys, for tests that have no database to keep any in: those that would be kept are derived.
    #[must_use]
    pub fn with_derived_kept_keys(mut self) -> Self {
        self.kept = KeptKey::ALL.map(|kept| Some(self.hasher(kept.name())));
        self
    }

    /// Refuses what has not the form of a key. `name` is what the configuration calls it.
    pub fn check(name: &'static str, key: &Secret) -> Result<(), BadKey> {
        decode(key.expose()).map(|mut key| key.zeroize()).ok_or(BadKey(name))
    }

    /// A fresh key, as the configuration takes it.
    pub fn fresh() -> Secret {
        let mut key: [u8; KEY_LENGTH] = rand::rng().random();
        let secret = Secret::new(BASE64.encode(key));
        key.zeroize();
        secret
    }

    /// The same keys after a change of the pepper: tokens that were hashed under `previous` are still found.
    pub fn with_previous_pepper(self, previous: &Secret) -> Result<Self, BadKey> {
        let previous = decode(previous.expose()).ok_or(BadKey("previous_pepper"))?;
        let Fixed { pepper, signing, .. } = &*self.fixed;
        let fixed = Fixed { pepper: *pepper, previous_pepper: Some(previous), signing: *signing };
        Ok(Self { fixed: Arc::new(fixed), ..self })
    }

    /// The master key that seals.
    pub fn master_id(&self) -> KeyId {
        self.source.masters().current.id
    }

    /// The master keys that only open.
    pub fn other_master_ids(&self) -> Vec<KeyId> {
        self.source.masters().others.iter().map(|master| master.id).collect()
    }

    /// Looks at once whether the master key has changed.
    pub fn look(&self) {
        self.source.look();
    }

    /// The seed of the Ed25519 key that signs sessions.
    pub fn signing_seed(&self) -> &[u8; KEY_LENGTH] {
        &self.fixed.signing
    }

    /// Hashes for one purpose, keyed from the master key of this moment: for what may be forgotten when that changes. A
    /// hash that is kept for good wants a [`KeptKey`].
    pub fn hasher(&self, purpose: &str) -> KeyedHash {
        KeyedHash::new(&self.source.masters().current.derive(purpose))
    }

    /// Signs what one process says to another.
    pub(crate) fn assert(&self, bytes: &[u8]) -> [u8; 32] {
        self.source.masters().current.principal().hash(bytes)
    }

    /// Whether a process of this installation has said that. They need not all have the same master key at the same moment:
    /// others count while the key of the folder changes, and always where they are given, since processes that are
    /// restarted one after the other need that. A key that has leaked signs for as long as it counts.
    pub(crate) fn is_asserted(&self, bytes: &[u8], mac: &[u8]) -> bool {
        let masters = self.source.masters();
        let others = if self.source.is_changing() { masters.others.as_slice() } else { &[] };
        std::iter::once(&masters.current).chain(others).any(|master| master.principal().verify(bytes, mac))
    }

    /// Hashes tokens, keyed with the pepper.
    pub fn token_hasher(&self) -> KeyedHash {
        KeyedHash::new(&self.fixed.pepper)
    }

    /// Hashes tokens as they were before the pepper was changed, if it was.
    pub fn previous_token_hasher(&self) -> Option<KeyedHash> {
        self.fixed.previous_pepper.as_ref().map(|pepper| KeyedHash::new(pepper))
    }
}

/// HMAC-SHA-256 under one key, with the key's share of the work done once.
#[derive(Clone)]
pub struct KeyedHash(Hmac<Sha256>);

impl KeyedHash {
    /// Hashes under this key.
    pub fn new(key: &[u8]) -> Self {
        Self(Hmac::new_from_slice(key).expect("HMAC takes keys of any length"))
    }

    /// The hash of some bytes.
    pub fn hash(&self, bytes: &[u8]) -> [u8; 32] {
        let mut mac = self.0.clone();
        mac.update(bytes);
        mac.finalize().into_bytes().into()
    }

    /// Whether that is the hash, in constant time.
    pub fn verify(&self, bytes: &[u8], hash: &[u8]) -> bool {
        let mut mac = self.0.clone();
        mac.update(bytes);
        mac.verify_slice(hash).is_ok()
    }
}

impl fmt::Debug for KeyedHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeyedHash([redacted])")
    }
}

fn decode(text: &str) -> Option<[u8; KEY_LENGTH]> {
    let mut bytes = BASE64.decode(text.trim()).ok()?;
    let key = bytes.as_slice().try_into().ok();
    bytes.zeroize();
    key
}
