//! The chain: each block bound to the one before by an HMAC, under a key that the database does not hold.
//!
//! A block is sealed when it arrives, over all that it is made of, and chained a moment later: its link covers its seal,
//! its number and the link before. The newest link is the head; the newest one that was removed for its age is the
//! checkpoint. Both are signed for what they are, so that one cannot stand in for the other.

use paperkey_kit::secrets::{KeptKey, KeyedHash, Keyring};
use ring::digest::{SHA256, digest};

use super::block::Block;

/// The link before the first.
pub(crate) const NO_MAC: [u8; 32] = [0; 32];

/// Seals, links and signs.
#[derive(Clone, Debug)]
pub(crate) struct ChainKey(KeyedHash);

/// A place in the chain: the number of a block, and its link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    pub(crate) no: i64,
    pub(crate) mac: Vec<u8>,
}

impl Link {
    /// Before the first block.
    pub(crate) fn origin() -> Self {
        Self { no: 0, mac: NO_MAC.to_vec() }
    }
}

/// What a place is signed for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// To be the newest block.
    Head,
    /// To be the newest that was removed for its age.
    Checkpoint,
}

impl ChainKey {
    pub(crate) fn new(keys: &Keyring) -> Self {
        Self(keys.kept(KeptKey::AuditChain))
    }

    /// Over all that a block is made of.
    pub(crate) fn seal(&self, block: &Block) -> [u8; 32] {
        let mut text = Text::new("block");
        text.part(block.id.as_bytes());
        text.part(block.team_id.as_bytes());
        for number in [i64::from(block.changes), block.first_ms, block.last_ms, block.records] {
            text.part(&number.to_be_bytes());
        }
        text.part(digest(&SHA256, &block.payload).as_ref());
        self.0.hash(&text.0)
    }

    /// The link of a block with that seal after another.
    pub(crate) fn link(&self, previous: &Link, seal: &[u8]) -> Link {
        let no = previous.no.saturating_add(1);
        let mut text = Text::new("link");
        text.part(&previous.mac);
        text.part(&no.to_be_bytes());
        text.part(seal);
        Link { no, mac: self.0.hash(&text.0).to_vec() }
    }

    /// Signs a place for what it is.
    pub(crate) fn sign(&self, purpose: Purpose, link: &Link) -> [u8; 32] {
        self.0.hash(&signed(purpose, link))
    }

    /// Whether a place is what it is said to be.
    pub(crate) fn is_signed(&self, purpose: Purpose, link: &Link, signature: &[u8]) -> bool {
        self.0.verify(&signed(purpose, link), signature)
    }
}

fn signed(purpose: Purpose, link: &Link) -> Vec<u8> {
    let mut text = Text::new(match purpose {
        Purpose::Head => "head",
        Purpose::Checkpoint => "checkpoint",
    });
    text.part(&link.no.to_be_bytes());
    text.part(&link.mac);
    text.0
}

/// Parts with their lengths, so that no two lists of them read the same.
struct Text(Vec<u8>);

impl Text {
    fn new(label: &str) -> Self {
        let mut text = Self(Vec::with_capacity(256));
        text.part(label.as_bytes());
        text
    }

    fn part(&mut self, part: &[u8]) {
        self.0.extend_from_slice(&(part.len() as u64).to_be_bytes());
        self.0.extend_from_slice(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block() -> Block {
        Block {
            id: "audb_1.0".into(),
            team_id: "team_a".into(),
            changes: false,
            first_ms: 1,
            last_ms: 2,
            records: 3,
            payload: vec![1, 2, 3],
        }
    }

    #[test]
    fn a_seal_covers_every_part_of_a_block() {
        let key = ChainKey::new(&Keyring::for_tests());
        let seal = key.seal(&block());
        let changed = [
            Block { id: "audb_1.1".into(), ..block() },
            Block { team_id: "team_b".into(), ..block() },
            Block { changes: true, ..block() },
            Block { first_ms: 0, ..block() },
            Block { last_ms: 3, ..block() },
            Block { records: 2, ..block() },
            Block { payload: vec![1, 2, 4], ..block() },
            // The same bytes, divided otherwise.
            Block { id: "audb_1.0t".into(), team_id: "eam_a".into(), ..block() },
        ];
        for changed in changed {
            assert_ne!(key.seal(&changed), seal, "{changed:?}");
        }
        assert_eq!(key.seal(&block()), seal);
    }

    #[test]
    fn a_head_is_no_checkpoint() {
        let key = ChainKey::new(&Keyring::for_tests());
        let link = key.link(&Link::origin(), &key.seal(&block()));
        assert_eq!(link.no, 1);
        let signature = key.sign(Purpose::Head, &link);
        assert!(key.is_signed(Purpose::Head, &link, &signature));
        assert!(!key.is_signed(Purpose::Checkpoint, &link, &signature));
        assert!(!key.is_signed(Purpose::Head, &Link { no: 2, ..link }, &signature));
    }
}
