//! How a delivery proves where it comes from: Paperkey's own header and those of Standard Webhooks, by one secret.

use std::fmt::Write as _;

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

/// Signs under one secret, with the secret's share of the work done once.
#[derive(Clone, Debug)]
pub(crate) struct Signatures {
    /// Keyed with the secret's text exactly as it was shown.
    own: KeyedHash,
    /// Keyed with what the text decodes to, as the standard says.
    standard: KeyedHash,
}

impl Signatures {
    /// Signs under that secret; `None` where it is none.
    pub(crate) fn of(secret: &Secret) -> Option<Self> {
        let text = secret.expose();
        let decoded = BASE64.decode(text.strip_prefix(PREFIX)?).ok()?;
        Some(Self { own: KeyedHash::new(text.as_bytes()), standard: KeyedHash::new(&decoded) })
    }

    /// The value of `X-Paperkey-Signature`.
    pub(crate) fn own(&self, body: &[u8]) -> String {
        hex(&self.own.hash(body))
    }

    /// The value of `webhook-signature`.
    pub(crate) fn standard(&self, id: &str, timestamp_s: i64, body: &[u8]) -> String {
        let mut signed = Vec::with_capacity(id.len() + body.len() + 24);
        signed.extend_from_slice(id.as_bytes());
        signed.push(b'.');
        signed.extend_from_slice(timestamp_s.to_string().as_bytes());
        signed.push(b'.');
        signed.extend_from_slice(body);
        format!("v1,{}", BASE64.encode(self.standard.hash(&signed)))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_signature_is_that_of_the_published_vector() {
        let hash = KeyedHash::new(b"It's a Secret to Everybody");
        let signatures = Signatures { own: hash.clone(), standard: hash };
        assert_eq!(
            signatures.own(b"Hello, World!"),
            "757107ea0eb2509fc211221cce984b8a37570b6d7586c22c46f4379c8b043e17"
        );
    }

    #[test]
    fn the_standard_signature_is_that_of_the_published_vector() {
        let signatures = Signatures::of(&Secret::new("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")).unwrap();
        assert_eq!(
            signatures.standard("msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, br#"{"test": 2432232314}"#),
            "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
        );
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
