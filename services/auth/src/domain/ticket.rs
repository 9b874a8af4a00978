//! Tickets: what a mailed link carries, and what it is worth as long as it is good.
//!
//! 32 bytes of chance. Stored is a keyed hash, so that nobody who reads the database can follow a link.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use paperkey_kit::secrets::Secret;
use rand::RngExt as _;

const CHANCE_BYTES: usize = 32;
/// As base 64 writes it.
const CHARS: usize = 43;

/// A new ticket.
pub(crate) fn new_ticket() -> Secret {
    let chance: [u8; CHANCE_BYTES] = rand::rng().random();
    Secret::new(BASE64.encode(chance))
}

/// Whether a text could be one at all. What cannot never reaches a database.
pub(crate) fn could_be_ticket(text: &str) -> bool {
    text.len() == CHARS && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

/// The link that carries a ticket.
pub(crate) fn link(public_url: &str, page: &str, ticket: &Secret) -> Secret {
    Secret::new(format!("{public_url}/app/{page}?token={}", ticket.expose()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tickets_differ_and_are_told_from_nonsense() {
        let (one, other) = (new_ticket(), new_ticket());
        assert_ne!(one, other);
        assert!(could_be_ticket(one.expose()) && could_be_ticket(other.expose()));
        for nonsense in ["", "a", &"a".repeat(44), &"\u{0}".repeat(43), &"é".repeat(43), &"=".repeat(43)] {
            assert!(!could_be_ticket(nonsense), "{nonsense:?}");
        }
    }

    #[test]
    fn a_link_leads_to_a_page_of_the_installation() {
        let link = link("https://paperkey.example.com", "reset-password", &Secret::new("abc"));
        assert_eq!(link.expose(), "https://paperkey.example.com/app/reset-password?token=abc");
    }
}
