//! Identifiers: prefixed, time-ordered, opaque.
//!
//! The form is `prefix_` and 26 lower-case Crockford base-32 characters: 48 bits of milliseconds, 80 of chance.
//! Ordered ids keep inserts at the end of an index; nobody outside may read the time out of them.

use rand::RngExt as _;

use crate::clock::Clock;

const ALPHABET: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

/// Longer than any id of ours.
const MAX_ID_BYTES: usize = 64;

/// Whether a text could be an id at all. What cannot is not there, and never reaches a database.
pub fn could_be_id(text: &str) -> bool {
    !text.is_empty() && text.len() <= MAX_ID_BYTES && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

/// A new id, such as `prod_01jd…`.
pub fn new_id(prefix: &str, clock: &Clock) -> String {
    let time = u128::from(clock.now_ms().unsigned_abs()) & ((1 << 48) - 1);
    let chance = rand::rng().random::<u128>() >> 48;
    let mut value = (time << 80) | chance;
    let mut characters = [0_u8; 26];
    for character in characters.iter_mut().rev() {
        *character = ALPHABET[usize::try_from(value & 31).unwrap_or(0)];
        value >>= 5;
    }
    let mut id = String::with_capacity(prefix.len() + 27);
    id.push_str(prefix);
    id.push('_');
    id.extend(characters.iter().map(|byte| char::from(*byte)));
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_id_is_told_from_what_could_be_one() {
        assert!(could_be_id(&new_id("prod", &Clock::system())));
        for nonsense in ["", "a b", "é", "a\0", "' OR 1=1 --", &"a".repeat(65)] {
            assert!(!could_be_id(nonsense), "{nonsense:?}");
        }
    }

    #[test]
    fn ids_made_later_sort_later() {
        let (clock, hand) = Clock::manual(1_790_000_000_000);
        let first = new_id("lic", &clock);
        hand.advance_ms(1);
        let second = new_id("lic", &clock);
        assert!(first < second, "{first} < {second}");
        assert!(first.starts_with("lic_") && first.len() == 30);
    }
}
