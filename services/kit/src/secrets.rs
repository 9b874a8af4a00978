//! Secrets: the type that does not print them, the installation's keys, sealing and keyed hashing.
//!
//! Every purpose has a key of its own, derived from the master key by its label, so that nothing sealed for one
//! purpose can be opened for another. Tokens are hashed with the pepper instead, which may be kept elsewhere.

use std::{
    fmt, fs,
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::Path,
    sync::Arc,
};

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use hmac::{Hmac, KeyInit as _, Mac as _};
use rand::RngExt as _;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use sha2::Sha256;
use zeroize::{Zeroize as _, ZeroizeOnDrop};

const KEY_LENGTH: usize = 32;

/// The version byte of sealed data.
const SEALED_V1: u8 = 1;

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

/// The keys of the installation.
#[derive(Clone)]
pub struct Keyring(Arc<Keys>);

#[derive(ZeroizeOnDrop)]
struct Keys {
    master: [u8; KEY_LENGTH],
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
    /// Reads the three keys as the configuration gives them: 32 bytes each, in base64.
    pub fn from_base64(master: &Secret, pepper: &Secret, signing: &Secret) -> Result<Self, BadKey> {
        Ok(Self(Arc::new(Keys {
            master: decode(master.expose()).ok_or(BadKey("master_key"))?,
            pepper: decode(pepper.expose()).ok_or(BadKey("pepper"))?,
            previous_pepper: None,
            signing: decode(signing.expose()).ok_or(BadKey("signing_key"))?,
        })))
    }

    /// Reads the keys kept in a folder, making those that are not there yet.
    pub fn load_or_create(folder: &Path) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
        Ok(Self(Arc::new(Keys {
            master: read_or_create(&folder.join("master.key"))?,
            pepper: read_or_create(&folder.join("pepper.key"))?,
            previous_pepper: None,
            signing: read_or_create(&folder.join("signing.key"))?,
        })))
    }

    /// Keys for tests: the same everywhere.
    pub fn for_tests() -> Self {
        Self(Arc::new(Keys {
            master: [1; KEY_LENGTH],
            pepper: [2; KEY_LENGTH],
            previous_pepper: None,
            signing: [3; KEY_LENGTH],
        }))
    }

    /// Refuses what has not the form of a key. `name` is what the configuration calls it.
    pub fn check(name: &'static str, key: &Secret) -> Result<(), BadKey> {
        decode(key.expose()).map(|mut key| key.zeroize()).ok_or(BadKey(name))
    }

    /// The same keys after a change of the pepper: tokens that were hashed under `previous` are still found.
    pub fn with_previous_pepper(self, previous: &Secret) -> Result<Self, BadKey> {
        let previous = decode(previous.expose()).ok_or(BadKey("previous_pepper"))?;
        let Keys { master, pepper, signing, .. } = &*self.0;
        let (master, pepper, signing) = (*master, *pepper, *signing);
        Ok(Self(Arc::new(Keys { master, pepper, previous_pepper: Some(previous), signing })))
    }

    /// The seed of the Ed25519 key that signs sessions.
    pub fn signing_seed(&self) -> &[u8; KEY_LENGTH] {
        &self.0.signing
    }

    /// Hashes for one purpose, keyed from the master key.
    pub fn hasher(&self, purpose: &str) -> KeyedHash {
        KeyedHash::new(&self.derive(purpose))
    }

    /// Hashes tokens, keyed with the pepper.
    pub fn token_hasher(&self) -> KeyedHash {
        KeyedHash::new(&self.0.pepper)
    }

    /// Hashes tokens as they were before the pepper was changed, if it was.
    pub fn previous_token_hasher(&self) -> Option<KeyedHash> {
        self.0.previous_pepper.as_ref().map(|pepper| KeyedHash::new(pepper))
    }

    /// Seals and opens data for one purpose.
    pub fn sealer(&self, purpose: &str) -> Sealer {
        Sealer::of_key(&self.derive(purpose)).expect("the key has the length that the algorithm asks for")
    }

    fn derive(&self, purpose: &str) -> [u8; KEY_LENGTH] {
        KeyedHash::new(&self.0.master).hash(format!("paperkey/{purpose}").as_bytes())
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

/// Seals data at rest with ChaCha20-Poly1305, bound to what it belongs to.
#[derive(Clone)]
pub struct Sealer(Arc<LessSafeKey>);

/// Sealed data that cannot be opened: damaged, moved, or sealed under another key.
#[derive(Debug, thiserror::Error)]
#[error("sealed data cannot be opened: it is damaged, was moved, or was sealed under another master key")]
pub struct CannotOpen;

impl Sealer {
    /// Seals under that key, if it has the length that the algorithm asks for.
    pub fn of_key(key: &[u8]) -> Option<Self> {
        let key = UnboundKey::new(&CHACHA20_POLY1305, key).ok()?;
        Some(Self(Arc::new(LessSafeKey::new(key))))
    }

    /// Seals some bytes. `owner` (such as the id of the row) must be named again to open them.
    pub fn seal(&self, owner: &str, plain: &[u8]) -> Vec<u8> {
        let nonce: [u8; NONCE_LEN] = rand::rng().random();
        let mut sealed = Vec::with_capacity(1 + NONCE_LEN + plain.len() + CHACHA20_POLY1305.tag_len());
        sealed.push(SEALED_V1);
        sealed.extend_from_slice(&nonce);
        let mut body = plain.to_vec();
        self.0
            .seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(owner.as_bytes()), &mut body)
            .expect("data far below the algorithm's limit can be sealed");
        sealed.append(&mut body);
        sealed
    }

    /// Opens what was sealed for that owner.
    pub fn open(&self, owner: &str, sealed: &[u8]) -> Result<Vec<u8>, CannotOpen> {
        let body = sealed.strip_prefix(&[SEALED_V1]).ok_or(CannotOpen)?;
        let (nonce, body) = body.split_first_chunk::<NONCE_LEN>().ok_or(CannotOpen)?;
        let mut body = body.to_vec();
        let plain = self
            .0
            .open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(owner.as_bytes()), &mut body)
            .map_err(|_| CannotOpen)?;
        Ok(plain.to_vec())
    }
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sealer([redacted])")
    }
}

fn decode(text: &str) -> Option<[u8; KEY_LENGTH]> {
    let mut bytes = BASE64.decode(text.trim()).ok()?;
    let key = bytes.as_slice().try_into().ok();
    bytes.zeroize();
    key
}

/// Creates the file only where there is none, so that two first starts cannot each keep a key of their own.
fn read_or_create(path: &Path) -> io::Result<[u8; KEY_LENGTH]> {
    let damaged = || {
        let message = format!("{} does not hold 32 bytes in base64; restore it from a backup", path.display());
        io::Error::new(io::ErrorKind::InvalidData, message)
    };
    match fs::read_to_string(path) {
        Ok(text) => return decode(&text).ok_or_else(damaged),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let key: [u8; KEY_LENGTH] = rand::rng().random();
    // Written whole beside it and linked into place: a crash leaves either no file or a good one.
    let draft = path.with_extension(format!("{}.new", std::process::id()));
    let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&draft)?;
    file.write_all(BASE64.encode(key).as_bytes())?;
    file.sync_all()?;
    let linked = fs::hard_link(&draft, path);
    fs::remove_file(&draft)?;
    match linked {
        Ok(()) => Ok(key),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            decode(&fs::read_to_string(path)?).ok_or_else(damaged)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_sealed_opens_only_for_its_owner_and_purpose() {
        let keys = Keyring::for_tests();
        let sealed = keys.sealer("licence-key").seal("lic_1", b"K7WX9");
        assert_eq!(keys.sealer("licence-key").open("lic_1", &sealed).unwrap(), b"K7WX9");
        assert!(keys.sealer("licence-key").open("lic_2", &sealed).is_err());
        assert!(keys.sealer("outbox").open("lic_1", &sealed).is_err());
        assert!(keys.sealer("licence-key").open("lic_1", &sealed[..sealed.len() - 1]).is_err());
        assert!(keys.sealer("licence-key").open("lic_1", b"").is_err());
    }

    #[test]
    fn the_keys_of_a_folder_are_made_once() {
        let folder = std::env::temp_dir().join(format!("paperkey-keys-{}", std::process::id()));
        let first = Keyring::load_or_create(&folder).unwrap();
        let second = Keyring::load_or_create(&folder).unwrap();
        assert_eq!(first.0.master, second.0.master);
        assert_ne!(first.0.master, first.0.pepper);
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn a_changed_pepper_leaves_the_way_to_the_one_before() {
        let old = Keyring::for_tests();
        assert!(old.previous_token_hasher().is_none());
        let pepper = Secret::new(BASE64.encode([9; KEY_LENGTH]));
        let key = Secret::new(BASE64.encode([1; KEY_LENGTH]));
        let new = Keyring::from_base64(&key, &pepper, &key).unwrap();
        let new = new.with_previous_pepper(&Secret::new(BASE64.encode([2; KEY_LENGTH]))).unwrap();
        assert_eq!(new.previous_token_hasher().unwrap().hash(b"token"), old.token_hasher().hash(b"token"));
        assert_ne!(new.token_hasher().hash(b"token"), old.token_hasher().hash(b"token"));
        assert!(old.with_previous_pepper(&Secret::new("short")).is_err());
    }

    #[test]
    fn a_secret_is_not_printed() {
        assert_eq!(format!("{:?}", Secret::new("hunter2")), "[redacted]");
        assert_eq!(serde_json::to_string(&Secret::new("hunter2")).unwrap(), "\"[redacted]\"");
    }
}
