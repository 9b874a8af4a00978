//! The audit log: blocks in which records are stored, the chain that binds them, and the entries that people read.

pub(crate) mod block;
pub(crate) mod chain;
pub(crate) mod entry;
pub(crate) mod export;

/// The time that an id of ours tells, in milliseconds. Known to this log alone: the id of a request is made where the
/// request begins, so it says where to look for the call.
pub(crate) fn made_at_ms(id: &str) -> Option<i64> {
    let (_, chars) = id.split_once('_')?;
    // 26 characters of five bits, of which the first 50 bits are two of nothing and 48 of time.
    if chars.len() != 26 {
        return None;
    }
    chars.bytes().take(10).try_fold(0_i64, |ms, byte| {
        let value = CROCKFORD.iter().position(|digit| *digit == byte)?;
        Some(ms << 5 | i64::try_from(value).ok()?)
    })
}

/// The digits of ids.
const CROCKFORD: &[u8; 32] = b"0123456789abcdefghjkmnpqrstvwxyz";

#[cfg(test)]
mod tests {
    use paperkey_kit::{clock::Clock, ids::new_id};

    use super::*;

    #[test]
    fn the_time_of_an_id_is_read_back() {
        let (clock, _hand) = Clock::manual(1_790_000_000_123);
        assert_eq!(made_at_ms(&new_id("req", &clock)), Some(1_790_000_000_123));
        for nonsense in ["", "req_", "req_test", "req_uuuuuuuuuuuuuuuuuuuuuuuuuu"] {
            assert_eq!(made_at_ms(nonsense), None, "{nonsense}");
        }
    }
}
