//! The form of keys: prefix, 30 characters of chance, 6 characters of checksum.
//!
//! The checksum (CRC-32 of IEEE over all that precedes, in base 62) lets a mistyped or cut token be refused, and a
//! leaked one be recognised, without a look-up. It proves nothing about a key being good.

use rand::RngExt as _;

const DIGITS: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
const RANDOM_LENGTH: usize = 30;
const CHECK_LENGTH: usize = 6;

/// How many characters of the random part are shown to tell keys apart.
const SHOWN_LENGTH: usize = 4;

/// The kinds of key, told by their prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TokenKind {
    /// A team key for live data.
    TeamLive,
    /// A team key for test data.
    TeamTest,
    /// A team key for live data, under the platform's brand.
    PlatformLive,
    /// A team key for test data, under the platform's brand.
    PlatformTest,
    /// The free key of a registration.
    Free,
    /// The installation's system key.
    System,
    /// A user's token.
    User,
    /// A product's public key.
    ProductPublic,
    /// A product's secret key.
    ProductSecret,
}

impl TokenKind {
    /// All kinds.
    pub const ALL: [Self; 9] = [
        Self::TeamLive,
        Self::TeamTest,
        Self::PlatformLive,
        Self::PlatformTest,
        Self::Free,
        Self::System,
        Self::User,
        Self::ProductPublic,
        Self::ProductSecret,
    ];

    /// What tokens of this kind begin with.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::TeamLive => "pk_live_",
            Self::TeamTest => "pk_test_",
            Self::PlatformLive => "pb_live_",
            Self::PlatformTest => "pb_test_",
            Self::Free => "pk_free_",
            Self::System => "po_sk_",
            Self::User => "po_ut_",
            Self::ProductPublic => "pk_",
            Self::ProductSecret => "sk_",
        }
    }

    /// The kind of a well-formed token; `None` where prefix, length, alphabet or checksum are wrong.
    pub fn of(token: &str) -> Option<Self> {
        let at = token.len().checked_sub(RANDOM_LENGTH + CHECK_LENGTH)?;
        let (prefix, rest) = token.split_at_checked(at)?;
        let kind = Self::ALL.into_iter().find(|kind| kind.prefix() == prefix)?;
        if !rest.bytes().all(|byte| byte.is_ascii_alphanumeric()) {
            return None;
        }
        let (payload, check) = token.split_at_checked(token.len() - CHECK_LENGTH)?;
        (check.as_bytes() == checksum(payload)).then_some(kind)
    }

    /// The kind that a text claims to be of by its prefix, whatever follows.
    pub fn claimed_by(token: &str) -> Option<Self> {
        // Some prefixes begin with another.
        Self::ALL.into_iter().filter(|kind| token.starts_with(kind.prefix())).max_by_key(|kind| kind.prefix().len())
    }

    /// A new token of this kind, from the system's generator.
    pub fn generate(self) -> String {
        let mut token = String::with_capacity(self.prefix().len() + RANDOM_LENGTH + CHECK_LENGTH);
        token.push_str(self.prefix());
        let mut rng = rand::rng();
        for _ in 0..RANDOM_LENGTH {
            token.push(char::from(DIGITS[rng.random_range(0..DIGITS.len())]));
        }
        let check = checksum(&token);
        token.extend(check.map(char::from));
        token
    }
}

/// The first characters of a token, for display: the prefix and four more.
pub fn shown_prefix(token: &str) -> String {
    let length = TokenKind::of(token).map_or(0, |kind| kind.prefix().len() + SHOWN_LENGTH);
    token.chars().take(length).collect()
}

fn checksum(payload: &str) -> [u8; CHECK_LENGTH] {
    let mut crc = crc32fast::hash(payload.as_bytes());
    let mut digits = [b'0'; CHECK_LENGTH];
    for digit in digits.iter_mut().rev() {
        *digit = DIGITS[(crc % 62) as usize];
        crc /= 62;
    }
    digits
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_generated_token_is_recognised_as_its_kind() {
        for kind in TokenKind::ALL {
            assert_eq!(TokenKind::of(&kind.generate()), Some(kind));
        }
    }

    #[test]
    fn a_cut_token_still_claims_its_kind() {
        for kind in TokenKind::ALL {
            let token = kind.generate();
            assert_eq!(TokenKind::claimed_by(&token[..token.len() - 1]), Some(kind));
        }
        assert_eq!(TokenKind::claimed_by("nonsense"), None);
    }

    #[test]
    fn a_changed_missing_or_swapped_character_is_noticed() {
        let token = TokenKind::TeamLive.generate();
        for at in 0..token.len() {
            let mut cut = token.clone();
            cut.remove(at);
            assert_eq!(TokenKind::of(&cut), None, "without character {at}");

            let mut changed = token.clone().into_bytes();
            changed[at] = if changed[at] == b'x' { b'y' } else { b'x' };
            assert_eq!(TokenKind::of(&String::from_utf8(changed).unwrap()), None, "with character {at} changed");

            let mut swapped = token.clone().into_bytes();
            if at + 1 < swapped.len() && swapped[at] != swapped[at + 1] {
                swapped.swap(at, at + 1);
                assert_eq!(TokenKind::of(&String::from_utf8(swapped).unwrap()), None, "with {at} and its next swapped");
            }
        }
    }

    #[test]
    fn nonsense_is_no_token() {
        for nonsense in ["", "pk_", "pk_live_", "é".repeat(40).as_str(), "sk_\u{0}", &"a".repeat(10_000)] {
            assert_eq!(TokenKind::of(nonsense), None);
        }
    }

    #[test]
    fn what_is_shown_of_a_token_keeps_the_secret() {
        let token = TokenKind::ProductSecret.generate();
        assert_eq!(shown_prefix(&token), token[..7]);
        assert_eq!(shown_prefix("nonsense"), "");
    }
}
