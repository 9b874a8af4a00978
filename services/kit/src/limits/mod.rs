//! Limits of rates: exact sliding windows, in this process or in a store that gateways share.
//!
//! A call claims a place in each window that it counts against, all or none: a refused call uses up nothing. The windows
//! are half open and exact to the microsecond: of any `limit + 1` calls that were let through, the last came at least the
//! window's length after the first, and a call is refused only where it would break that.
//!
//! Deliberately absent: which limits a call has, which the gateway knows from the contract and the configuration; and
//! quotas, which are kept by auth.

mod memory;
mod redis;
mod window;

use std::{fmt, hash::Hasher as _, time::Duration};

use arrayvec::ArrayVec;
use siphasher::sip128::{Hasher128 as _, SipHasher24};

pub use self::{
    memory::{MAX_SUBJECTS, MemoryLimiter},
    redis::{RedisLimiter, RedisOptions, RedisStats, StoreState},
};
pub use crate::config::limits::OnStoreFailure;

/// The most limits that one call counts against.
pub const MAX_CLAIMS: usize = 4;

/// Whom a window belongs to: a class and a key, an address or a licence. A keyed hash, so that nothing in a shared store
/// tells who calls, and nobody can make two subjects collide.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Subject(pub [u8; 16]);

impl fmt::Debug for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Subject({:032x})", u128::from_be_bytes(self.0))
    }
}

/// Makes subjects. All gateways of an installation make the same ones.
#[derive(Clone)]
pub struct Subjects([u8; 16]);

impl fmt::Debug for Subjects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Subjects")
    }
}

impl Subjects {
    /// Made with the installation's keys.
    pub fn new(keys: &crate::secrets::Keyring) -> Self {
        let mut key = [0; 16];
        key.copy_from_slice(&keys.hasher("limits/v1").hash(b"subjects")[..16]);
        Self(key)
    }

    /// The subject of a class that these bytes name.
    pub fn of(&self, class: &str, name: &[u8]) -> Subject {
        let mut hasher = SipHasher24::new_with_key(&self.0);
        hasher.write_u8(u8::try_from(class.len()).unwrap_or(u8::MAX));
        hasher.write(class.as_bytes());
        hasher.write(name);
        Subject(hasher.finish128().as_bytes())
    }
}

/// A place in a window that a call claims.
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// Whose window it is.
    pub subject: Subject,
    /// The class, as headers and errors name it.
    pub class: &'static str,
    /// Calls within the window; at least 1.
    pub requests: u32,
    /// The length of the window; at least a millisecond.
    pub window: Duration,
    /// What happens while the shared store is gone.
    pub on_store_failure: OnStoreFailure,
}

/// Where a subject stands after a call was judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The class.
    pub class: &'static str,
    /// Calls within the window.
    pub requests: u32,
    /// The length of the window.
    pub window: Duration,
    /// How many calls are left.
    pub remaining: u32,
    /// How long until the oldest counted call leaves the window; nothing where none is counted.
    pub resets_in: Duration,
}

/// The standings of one call, in the order of its claims.
pub type Standings = ArrayVec<Standing, MAX_CLAIMS>;

/// What became of a call.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// It counts, and may be taken back by the receipt.
    Passed(Receipt),
    /// It was refused, and does not count anywhere.
    Refused(Refused),
}

/// A call that was counted.
#[derive(Clone, Debug)]
pub struct Receipt {
    /// Where its subjects stand now.
    pub standings: Standings,
    /// What was entered, so that it can be taken back: subjects and the ids of entries.
    pub(crate) entries: ArrayVec<(Subject, u64), MAX_CLAIMS>,
}

/// A call that was refused.
#[derive(Clone, Debug)]
pub struct Refused {
    /// Where its subjects stand.
    pub standings: Standings,
    /// Which of the claims could not be met: an index of the standings.
    pub by: usize,
    /// After how long all of them could be met, as far as is known now. Never too short for the one that could not.
    pub retry_after: Duration,
    /// The shared store is gone, and the limit is closed without it.
    pub store_is_gone: bool,
}

/// Counts calls.
#[derive(Debug)]
pub enum Limiter {
    /// In this process.
    Memory(MemoryLimiter),
    /// In a store that gateways share.
    Redis(RedisLimiter),
}

impl Limiter {
    /// Counts a call against all of its limits, or against none. At most [`MAX_CLAIMS`] claims. Of two claims of one subject
    /// both must be met, and the call counts once.
    pub async fn check(&self, claims: &[Claim]) -> Verdict {
        match self {
            Self::Memory(limiter) => limiter.check(claims),
            Self::Redis(limiter) => limiter.check(claims).await,
        }
    }

    /// Takes back what a call has counted. Once: a receipt does not know that it was used.
    pub async fn take_back(&self, receipt: &Receipt) {
        match self {
            Self::Memory(limiter) => limiter.take_back(receipt),
            Self::Redis(limiter) => limiter.take_back(receipt).await,
        }
    }

    /// Where a subject stands, without counting anything.
    pub async fn standing(&self, claim: &Claim) -> Standing {
        match self {
            Self::Memory(limiter) => limiter.standing(claim),
            Self::Redis(limiter) => limiter.standing(claim).await,
        }
    }
}
