//! How a delivery proves where it comes from: Paperkey's own header and those of Standard Webhooks, by one secret.
//!
//! For a while after a secret was changed there are two. The standard's header then carries a signature by each; the
//! own one has room for one, and keeps that of the secret which receivers still have.

use base64::{Engine as _, engine::general_purpose::STANDARD as BASE64};
use paperkey_kit::secrets::{KeyedHash, Secret};
use rand::RngExt as _;

/// What a signing secret begins with.
const PREFIX: &str = "whsec_";
/// Random bytes of a secret.
const SECRET_LENGTH: usize = 32;

/// A new signing secret.
pub(crate) fn new_secret() -> Secret {
    let bytes: [u8; SECRET_LENGTH] = rand::rng().random();
    Secret::new(format!("{PREFIX}{}", BASE64.encode(bytes)))
}

/// Signs for an endpoint, with the secrets' share of the work done once.
#[derive(Clone, Debug)]
pub(crate) struct Signatures {
    current: Keys,
    /// That of the secret before, and until when it is good.
    previous: Option<(Keys, i64)>,
}

/// What one secret signs with.
#[derive(Clone, Debug)]
struct Keys {
    /// Keyed with the secret's text exactly as it was shown.
    own: KeyedHash,
    /// Keyed with what the text decodes to, as the standard says.
    standard: KeyedHash,
}

impl Keys {
    /// The keys of that secret; `None` where it is none.
    fn of(secret: &Secret) -> Option<Self> {
        let text = secret.expose();
        let decoded = BASE64.decode(text.strip_prefix(PREFIX)?).ok()?;
        Some(Self { own: KeyedHash::new(text.as_bytes()), standard: KeyedHash::new(&decoded) })
    }
}

impl Signatures {
    /// Signs under that secret; `None` where it is none.
    pub(crate) fn of(secret: &Secret) -> Option<Self> {
        Some(Self { current: Keys::of(secret)?, previous: None })
    }

    /// Signs under the secret before as well, while it is good.
    pub(crate) fn with_previous(mut self, secret: &Secret, until_ms: i64) -> Self {
        self.previous = Keys::of(secret).map(|keys| (keys, until_ms));
        self
    }

    /// The value of `X-Paperkey-Signature`, at a time.
    pub(crate) fn own(&self, body: &[u8], now_ms: i64) -> String {
        hex(&self.previous(now_ms).unwrap_or(&self.current).own.hash(body))
    }

    /// The value of `webhook-signature`, at a time.
    pub(crate) fn standard(&self, id: &str, timestamp_s: i64, body: &[u8], now_ms: i64) -> String {
        let timestamp = timestamp_s.to_string();
        let signed = [id.as_bytes(), timestamp.as_bytes(), body].join(&b'.');
        let mut value = String::with_capacity(96);
        for keys in std::iter::once(&self.current).chain(self.previous(now_ms)) {
            value.push_str(if value.is_empty() { "v1," } else { " v1," });
            BASE64.encode_string(keys.standard.hash(&signed), &mut value);
        }
        value
    }

    fn previous(&self, now_ms: i64) -> Option<&Keys> {
        self.previous.as_ref().filter(|(_, until_ms)| now_ms < *until_ms).map(|(keys, _)| keys)
    }
}

fn hex(bytes: &[u8]) -> String {
    let digit = |half: u8| char::from_digit(half.into(), 16).unwrap_or('0');
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_signature_is_that_of_the_published_vector() {
        let hash = KeyedHash::new(b"It's a Secret to Everybody");
        let current = Keys { own: hash.clone(), standard: hash };
        let signatures = Signatures { current, previous: None };
        assert_eq!(
            signatures.own(b"Hello, World!", 0),
            "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
        );
    }

    #[test]
    fn the_standard_signature_is_that_of_the_published_vector() {
        let signatures = Signatures::of(&Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")).unwrap();
        assert_eq!(
            signatures.standard("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, br#"{"test": 2432232314}"#, 0),
            "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
        );
    }

    #[test]
    fn two_secrets_sign_side_by_side_until_the_time_of_the_first_is_over() {
        let (old, new) = (new_secret(), new_secret());
        let (before, after) = (Signatures::of(&old).unwrap(), Signatures::of(&new).unwrap());
        let both = after.clone().with_previous(&old, 1_000);
        let standard = |signatures: &Signatures, now_ms| signatures.standard("msg_1", 7, b"{}", now_ms);
        let [one, other] = [standard(&after, 0), standard(&before, 0)];
        assert_eq!(standard(&both, 999), format!("{one} {other}"));
        assert_eq!(both.own(b"{}", 999), before.own(b"{}", 0));
        assert_eq!(standard(&both, 1_000), one);
        assert_eq!(both.own(b"{}", 1_000), after.own(b"{}", 0));
        // What cannot sign beside the other leaves it alone.
        assert_eq!(standard(&after.clone().with_previous(&Secret::new("whsec_!"), 1_000), 0), one);
    }

    #[test]
    fn a_new_secret_signs_and_no_two_are_alike() {
        let secret = new_secret();
        assert!(Signatures::of(&secret).is_some());
        assert_eq!(secret.expose().len(), PREFIX.len() + 44);
        assert_ne!(secret.expose(), new_secret().expose());
    }

    #[test]
    fn what_is_no_secret_does_not_sign() {
        for text in ["", "whsec", "whsec_!", "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"] {
            assert!(Signatures::of(&Secret::new(text)).is_none(), "{text}");
        }
    }
}
