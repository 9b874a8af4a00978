//! Finds secrets by their form, whatever made them: tokens by prefix and checksum, sessions, webhook secrets, licence
//! keys. Every installation of the tests is searched when it ends.

use paperkey_kit::token::TokenKind;

/// What follows the prefix of a token.
const TOKEN_TAIL: usize = 36;
/// The alphabet of licence keys.
const CROCKFORD: &[u8] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
/// The groups of a licence key.
const GROUPS: [usize; 4] = [5, 5, 5, 2];

/// The secrets in some bytes, such as a log line, an answer or a file.
pub fn secrets_in(bytes: &[u8]) -> Vec<String> {
    let mut found = tokens_in(bytes);
    found.extend(licence_keys_in(bytes));
    found
}

/// The secrets in some bytes other than licence keys, which callers may be shown.
pub fn tokens_in(bytes: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    for kind in TokenKind::ALL.into_iter().filter(|kind| *kind != TokenKind::ProductPublic) {
        let prefix = kind.prefix();
        for at in places(bytes, prefix.as_bytes()) {
            let token = bytes.get(at..at + prefix.len() + TOKEN_TAIL).and_then(|token| std::str::from_utf8(token).ok());
            found.extend(token.filter(|token| TokenKind::of(token).is_some()).map(str::to_owned));
        }
    }
    for at in places(bytes, b"eyJ") {
        let word = word(&bytes[at..], |byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
        if word.split('.').count() == 3 && word.rsplit('.').next().is_some_and(|signature| signature.len() >= 43) {
            found.push(word);
        }
    }
    for at in places(bytes, b"whsec_") {
        let word = word(&bytes[at..], |byte| byte.is_ascii_alphanumeric() || b"_+/=".contains(&byte));
        if word.len() >= "whsec_".len() + 32 {
            found.push(word);
        }
    }
    found
}

fn licence_keys_in(bytes: &[u8]) -> Vec<String> {
    let length = GROUPS.iter().sum::<usize>() + GROUPS.len() - 1;
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    let whole = |at: usize| {
        let before = at.checked_sub(1).is_none_or(|before| !is_word(bytes[before]));
        before && bytes.get(at + length).is_none_or(|after| !is_word(*after))
    };
    // Looked at first, for files may be large.
    let hyphens = |window: &[u8]| window[5] == b'-' && window[11] == b'-' && window[17] == b'-';
    let is_key = |window: &[u8]| {
        let groups: Vec<&[u8]> = window.split(|byte| *byte == b'-').collect();
        groups.iter().map(|group| group.len()).eq(GROUPS)
            && groups.iter().all(|group| group.iter().all(|byte| CROCKFORD.contains(byte)))
    };
    let windows =
        bytes.windows(length).enumerate().filter(|(at, window)| hyphens(window) && is_key(window) && whole(*at));
    windows.map(|(_, window)| String::from_utf8_lossy(window).into_owned()).collect()
}

fn places<'a>(bytes: &'a [u8], needle: &'a [u8]) -> impl Iterator<Item = usize> + 'a {
    // By its first byte first, for files may be large.
    let begins = bytes.iter().enumerate().filter(move |(_, byte)| **byte == needle[0]);
    begins.map(|(at, _)| at).filter(move |at| bytes[*at..].starts_with(needle))
}

fn word(bytes: &[u8], belongs: impl Fn(u8) -> bool) -> String {
    bytes.iter().take_while(|byte| belongs(**byte)).map(|byte| char::from(*byte)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_secret_is_found_by_its_form() {
        for kind in TokenKind::ALL.into_iter().filter(|kind| *kind != TokenKind::ProductPublic) {
            let token = kind.generate();
            let found = secrets_in(format!("{{\"key\":\"{token}\"}}").as_bytes());
            assert!(found.contains(&token), "{kind:?}: {found:?}");
        }
        let session = format!("eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJ1c3JfMSJ9.{}", "A".repeat(86));
        let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYqrTwjU";
        let license = "K7WX9-M3NP4-H8TRC-DJ";
        for text in [session.as_str(), secret, license] {
            assert_eq!(secrets_in(format!("<{text}>").as_bytes()), [text]);
        }
    }

    #[test]
    fn what_only_looks_a_little_like_one_is_none() {
        let public = TokenKind::ProductPublic.generate();
        let prefixes = "pk_live_AbCd sk_AbCd po_sk_ whsec_ eyJ. eyJ.a.b K7WX9-M3NP4 K7WX9-M3NP4-H8TRC-DJX";
        assert_eq!(secrets_in(format!("{public} {prefixes}").as_bytes()), Vec::<String>::new());
    }
}
