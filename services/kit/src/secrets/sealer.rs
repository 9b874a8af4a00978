//! Sealing: data at rest that tells nothing, cannot be changed unseen, and opens only for what it belongs to.
//!
//! Sealed data is a version byte, then (version 2) the id of the master key, a nonce, and the ciphertext with its tag.
//! Version 1 names no key: it is what is sealed under a key of its own, and what is written while a single master key is
//! known, so that the release before, which knows no other version, reads it until a change of that key begins.

use std::{fmt, sync::Arc};

use rand::RngExt as _;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};

use super::{
    Keyring, Purpose,
    masters::{KeyId, Masters, Source},
};

const V1: u8 = 1;
const V2: u8 = 2;

/// The length of what stands before the nonce in version 2.
pub(super) const HEAD: usize = 1 + KeyId::LENGTH;

/// Seals data at rest with ChaCha20-Poly1305 for one purpose, bound to what it belongs to.
#[derive(Clone)]
pub struct Sealer {
    source: Arc<Source>,
    purpose: Purpose,
}

/// Sealed data that cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CannotOpen {
    /// It never will be here: it is damaged, was moved, or names no key and is under none that is known.
    #[error("sealed data cannot be opened: it is damaged, was moved, or was sealed under another master key")]
    Damaged,
    /// It may be whole, and is under a key that this process does not know, or not yet.
    #[error("sealed data cannot be opened: it is sealed under the master key {0}, which is not known here")]
    UnknownKey(KeyId),
}

/// What was sealed, and under which master key.
#[derive(PartialEq, Eq)]
pub struct Opened {
    /// The key.
    pub key: KeyId,
    /// What was sealed.
    pub plain: Vec<u8>,
}

impl fmt::Debug for Opened {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Opened").field("key", &self.key).finish_non_exhaustive()
    }
}

/// The master key that sealed data names; none in version 1.
pub fn key_named(sealed: &[u8]) -> Option<KeyId> {
    let (id, _) = sealed.strip_prefix(&[V2])?.split_first_chunk()?;
    Some(KeyId(*id))
}

/// What data begins with that is sealed under that key.
pub(super) fn head_of(id: KeyId) -> [u8; HEAD] {
    let mut head = [V2; HEAD];
    head[1..].copy_from_slice(&id.0);
    head
}

impl Keyring {
    /// Seals and opens data for one purpose. It follows changes of the master key.
    pub fn sealer(&self, purpose: Purpose) -> Sealer {
        Sealer { source: Arc::clone(&self.source), purpose }
    }
}

impl Sealer {
    /// Seals some bytes under the master key of this moment. `owner` (such as the id of the row) must be named again to
    /// open them.
    pub fn seal(&self, owner: &str, plain: &[u8]) -> Vec<u8> {
        let masters = self.source.masters();
        if masters.others.is_empty() {
            return seal(masters.current.sealing(self.purpose), &[V1], owner, plain);
        }
        self.seal_naming(&masters, owner, plain)
    }

    /// The same, and always naming the key.
    pub(super) fn seal_named(&self, owner: &str, plain: &[u8]) -> Vec<u8> {
        self.seal_naming(&self.source.masters(), owner, plain)
    }

    fn seal_naming(&self, masters: &Masters, owner: &str, plain: &[u8]) -> Vec<u8> {
        seal(masters.current.sealing(self.purpose), &head_of(masters.current.id), owner, plain)
    }

    /// Opens what was sealed for that owner, under any master key that is known.
    pub fn open(&self, owner: &str, sealed: &[u8]) -> Result<Vec<u8>, CannotOpen> {
        self.open_and_tell(owner, sealed).map(|opened| opened.plain)
    }

    /// The same, and under which key it was sealed.
    pub fn open_and_tell(&self, owner: &str, sealed: &[u8]) -> Result<Opened, CannotOpen> {
        let masters = self.source.masters();
        match key_named(sealed) {
            // It may have been made since was last looked.
            Some(id) if !masters.knows(id) => self.open_with(&self.source.newest(), owner, sealed),
            _ => self.open_with(&masters, owner, sealed),
        }
    }

    fn open_with(&self, masters: &Masters, owner: &str, sealed: &[u8]) -> Result<Opened, CannotOpen> {
        let named = key_named(sealed);
        let body = match (sealed.first(), named) {
            (Some(&V1), _) => &sealed[1..],
            (_, Some(_)) => &sealed[HEAD..],
            _ => return Err(CannotOpen::Damaged),
        };
        if let Some(id) = named
            && !masters.knows(id)
            && body.len() >= NONCE_LEN + CHACHA20_POLY1305.tag_len()
        {
            return Err(CannotOpen::UnknownKey(id));
        }
        masters
            .all()
            .filter(|master| named.is_none_or(|id| master.id == id))
            .find_map(|master| {
                let plain = open(master.sealing(self.purpose), owner, body)?;
                Some(Opened { key: master.id, plain })
            })
            .ok_or(CannotOpen::Damaged)
    }
}

impl fmt::Debug for Sealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sealer([redacted])")
    }
}

/// Seals under a key that is no key of the installation's, and that it does not keep.
#[derive(Clone)]
pub struct KeySealer(Arc<LessSafeKey>);

impl KeySealer {
    /// Seals under that key, if it has the length that the algorithm asks for.
    pub fn new(key: &[u8]) -> Option<Self> {
        let key = UnboundKey::new(&CHACHA20_POLY1305, key).ok()?;
        Some(Self(Arc::new(LessSafeKey::new(key))))
    }

    /// Seals some bytes. `owner` must be named again to open them.
    pub fn seal(&self, owner: &str, plain: &[u8]) -> Vec<u8> {
        seal(&self.0, &[V1], owner, plain)
    }

    /// Opens what was sealed for that owner.
    pub fn open(&self, owner: &str, sealed: &[u8]) -> Result<Vec<u8>, CannotOpen> {
        sealed.strip_prefix(&[V1]).and_then(|body| open(&self.0, owner, body)).ok_or(CannotOpen::Damaged)
    }
}

impl fmt::Debug for KeySealer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeySealer([redacted])")
    }
}

fn seal(key: &LessSafeKey, head: &[u8], owner: &str, plain: &[u8]) -> Vec<u8> {
    let nonce: [u8; NONCE_LEN] = rand::rng().random();
    let before = head.len() + NONCE_LEN;
    let mut sealed = Vec::with_capacity(before + plain.len() + CHACHA20_POLY1305.tag_len());
    sealed.extend_from_slice(head);
    sealed.extend_from_slice(&nonce);
    sealed.extend_from_slice(plain);
    let tag = key
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(owner.as_bytes()),
            &mut sealed[before..],
        )
        .expect("data far below the algorithm's limit can be sealed");
    sealed.extend_from_slice(tag.as_ref());
    sealed
}

fn open(key: &LessSafeKey, owner: &str, body: &[u8]) -> Option<Vec<u8>> {
    let (nonce, body) = body.split_first_chunk::<NONCE_LEN>()?;
    let mut body = body.to_vec();
    let plain = key.open_in_place(Nonce::assume_unique_for_key(*nonce), Aad::from(owner.as_bytes()), &mut body).ok()?;
    Some(plain.to_vec())
}

/// As it is written while a single master key is known.
#[cfg(test)]
pub(super) fn seal_v1(keys: &Keyring, purpose: Purpose, owner: &str, plain: &[u8]) -> Vec<u8> {
    seal(keys.source.masters().current.sealing(purpose), &[V1], owner, plain)
}
