//! Sessions: the JWT of an account, signed with Ed25519.
//!
//! There is one algorithm, and the header is compared as a whole: nothing in a token can choose how it is verified.
//! Whether the account still accepts the session (its epoch) is for whoever loads the account.

use std::fmt;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use paperkey_kit::secrets::Secret;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use serde::{Deserialize, Serialize};

/// How long a session lasts, in seconds.
const LIFETIME_S: i64 = 7 * 24 * 60 * 60;
/// How far ahead the clock of another process may be, in seconds.
const SKEW_S: i64 = 60;
/// Far longer than any token that is made here.
const MAX_TOKEN_BYTES: usize = 1_024;

const HEADER: &str = r#"{"alg":"EdDSA","typ":"JWT"}"#;
const ISSUER: &str = "paperkey";
const AUDIENCE: &str = "paperkey-dashboard";

/// Issues and verifies sessions.
pub(crate) struct Sessions {
    pair: Ed25519KeyPair,
    public: UnparsedPublicKey<Vec<u8>>,
    header: String,
}

/// What a good token says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Session {
    pub(crate) user_id: String,
    pub(crate) epoch: i64,
    pub(crate) expires_at_ms: i64,
}

/// The seed does not make a key.
#[derive(Debug, thiserror::Error)]
#[error("the signing key does not make an Ed25519 key")]
pub(crate) struct BadSigningKey;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Claims {
    iss: String,
    aud: String,
    sub: String,
    iat: i64,
    exp: i64,
    epoch: i64,
    jti: String,
}

impl Sessions {
    /// Signs with the key of that seed.
    pub(crate) fn new(seed: &[u8; 32]) -> Result<Self, BadSigningKey> {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed).map_err(|_| BadSigningKey)?;
        let public = UnparsedPublicKey::new(&ED25519, pair.public_key().as_ref().to_vec());
        Ok(Self { pair, public, header: BASE64.encode(HEADER) })
    }

    /// A token for an account, as of its present epoch.
    pub(crate) fn issue(&self, user_id: &str, epoch: i64, token_id: String, now_ms: i64) -> Secret {
        let iat = now_ms.div_euclid(1_000);
        let claims = Claims {
            iss: ISSUER.to_owned(),
            aud: AUDIENCE.to_owned(),
            sub: user_id.to_owned(),
            iat,
            exp: iat.saturating_add(LIFETIME_S),
            epoch,
            jti: token_id,
        };
        self.sign(&serde_json::json!(claims).to_string())
    }

    fn sign(&self, claims: &str) -> Secret {
        let mut token = format!("{}.{}", self.header, BASE64.encode(claims));
        let signature = self.pair.sign(token.as_bytes());
        token.push('.');
        BASE64.encode_string(signature.as_ref(), &mut token);
        Secret::new(token)
    }

    /// What a token says, if it was made here for this purpose and has not ended.
    pub(crate) fn verify(&self, token: &str, now_ms: i64) -> Option<Session> {
        if token.len() > MAX_TOKEN_BYTES {
            return None;
        }
        let (signed, signature) = token.rsplit_once('.')?;
        let (header, claims) = signed.split_once('.')?;
        if header != self.header {
            return None;
        }
        let signature = BASE64.decode(signature).ok()?;
        self.public.verify(signed.as_bytes(), &signature).ok()?;
        let claims: Claims = serde_json::from_slice(&BASE64.decode(claims).ok()?).ok()?;
        let now = now_ms.div_euclid(1_000);
        let ours = claims.iss == ISSUER && claims.aud == AUDIENCE;
        let timely = claims.iat <= now.saturating_add(SKEW_S)
            && now < claims.exp
            && claims.exp.saturating_sub(claims.iat) <= LIFETIME_S;
        (ours && timely && claims.sub.starts_with("usr_")).then(|| Session {
            user_id: claims.sub,
            epoch: claims.epoch,
            expires_at_ms: claims.exp.saturating_mul(1_000),
        })
    }
}

impl fmt::Debug for Sessions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Sessions([redacted])")
    }
}

#[cfg(test)]
mod tests {
    use ring::hmac;
    use serde_json::{Value, json};

    use super::*;

    const NOW_MS: i64 = 1_790_000_000_000;

    fn sessions() -> Sessions {
        Sessions::new(&[3; 32]).unwrap()
    }

    fn good() -> Secret {
        sessions().issue("usr_1", 4, "ses_1".into(), NOW_MS)
    }

    fn claims() -> Value {
        let token = good();
        let body = token.expose().split('.').nth(1).unwrap();
        serde_json::from_slice(&BASE64.decode(body).unwrap()).unwrap()
    }

    /// A token with these claims, rightly signed.
    fn signed(change: impl FnOnce(&mut Value)) -> Secret {
        let mut claims = claims();
        change(&mut claims);
        sessions().sign(&claims.to_string())
    }

    #[test]
    fn a_token_says_who_and_until_when() {
        let session = sessions().verify(good().expose(), NOW_MS).unwrap();
        let expires_at_ms = NOW_MS + LIFETIME_S * 1_000;
        assert_eq!(session, Session { user_id: "usr_1".into(), epoch: 4, expires_at_ms });
    }

    #[test]
    fn a_token_ends_after_seven_days() {
        let token = good();
        assert!(sessions().verify(token.expose(), NOW_MS + LIFETIME_S * 1_000 - 1).is_some());
        assert!(sessions().verify(token.expose(), NOW_MS + LIFETIME_S * 1_000).is_none());
    }

    #[test]
    fn a_token_of_the_future_is_refused() {
        let token = good();
        assert!(sessions().verify(token.expose(), NOW_MS - SKEW_S * 1_000).is_some());
        assert!(sessions().verify(token.expose(), NOW_MS - (SKEW_S + 1) * 1_000).is_none());
    }

    #[test]
    fn a_token_with_any_changed_missing_or_added_byte_is_refused() {
        let token = good().expose().to_owned();
        for at in 0..token.len() {
            for other in [b'A', b'B', b'_', b'.', b'=', b' ', 0, 0x7f] {
                let mut bytes = token.clone().into_bytes();
                if bytes[at] == other {
                    continue;
                }
                bytes[at] = other;
                let changed = String::from_utf8(bytes).unwrap();
                assert!(sessions().verify(&changed, NOW_MS).is_none(), "{other} at {at}");
            }
            let mut cut = token.clone();
            cut.remove(at);
            assert!(sessions().verify(&cut, NOW_MS).is_none(), "without {at}");
            assert!(sessions().verify(&token[..at], NOW_MS).is_none(), "cut at {at}");
        }
        for tail in ["A", "=", ".", " ", "\n"] {
            assert!(sessions().verify(&format!("{token}{tail}"), NOW_MS).is_none(), "with {tail:?}");
            assert!(sessions().verify(&format!("{tail}{token}"), NOW_MS).is_none(), "after {tail:?}");
        }
    }

    #[test]
    fn a_token_that_names_another_algorithm_is_refused() {
        let body = BASE64.encode(claims().to_string());
        let none = BASE64.encode(r#"{"alg":"none","typ":"JWT"}"#);
        assert!(sessions().verify(&format!("{none}.{body}."), NOW_MS).is_none());

        // The classic confusion: the public key taken for a shared secret.
        let hs256 = BASE64.encode(r#"{"alg":"HS256","typ":"JWT"}"#);
        let key = hmac::Key::new(hmac::HMAC_SHA256, sessions().pair.public_key().as_ref());
        let unsigned = format!("{hs256}.{body}");
        let tag = BASE64.encode(hmac::sign(&key, unsigned.as_bytes()));
        assert!(sessions().verify(&format!("{unsigned}.{tag}"), NOW_MS).is_none());

        // Rightly signed, but the header is not ours to the letter.
        for header in [r#"{"typ":"JWT","alg":"EdDSA"}"#, r#"{"alg":"EdDSA"}"#, r#"{"alg":"eddsa","typ":"JWT"}"#] {
            let unsigned = format!("{}.{body}", BASE64.encode(header));
            let signature = BASE64.encode(sessions().pair.sign(unsigned.as_bytes()));
            assert!(sessions().verify(&format!("{unsigned}.{signature}"), NOW_MS).is_none(), "{header}");
        }
    }

    #[test]
    fn a_token_of_another_installation_is_refused() {
        let other = Sessions::new(&[4; 32]).unwrap().issue("usr_1", 4, "ses_1".into(), NOW_MS);
        assert!(sessions().verify(other.expose(), NOW_MS).is_none());
    }

    #[test]
    fn rightly_signed_claims_that_are_not_ours_are_refused() {
        type Change = fn(&mut Value);
        let changes: [(&str, Change); 12] = [
            ("another audience", |c| c["aud"] = json!("billing")),
            ("a list of audiences", |c| c["aud"] = json!(["paperkey-dashboard"])),
            ("another issuer", |c| c["iss"] = json!("someone")),
            ("no subject", |c| drop(c.as_object_mut().unwrap().remove("sub"))),
            ("a subject that is no user", |c| c["sub"] = json!("key_1")),
            ("no end", |c| drop(c.as_object_mut().unwrap().remove("exp"))),
            ("an end in words", |c| c["exp"] = json!("never")),
            ("an end too far", |c| c["exp"] = json!(i64::MAX)),
            ("a fractional end", |c| c["exp"] = json!(1e300)),
            ("no epoch", |c| drop(c.as_object_mut().unwrap().remove("epoch"))),
            ("something more", |c| c["admin"] = json!(true)),
            ("no object", |c| *c = json!([])),
        ];
        for (what, change) in changes {
            assert!(sessions().verify(signed(change).expose(), NOW_MS).is_none(), "{what}");
        }
        assert!(sessions().verify(signed(|_| ()).expose(), NOW_MS).is_some(), "unchanged");
    }

    #[test]
    fn nonsense_is_no_token() {
        let header = BASE64.encode(HEADER);
        for nonsense in [
            "",
            ".",
            "..",
            "...",
            "a.b.c",
            "é.é.é",
            "\u{0}",
            &format!("{header}.."),
            &format!("{header}.%%.%%"),
            &format!("{header}.{}.{}", "e30", "A".repeat(86)),
            &"A.".repeat(100_000),
        ] {
            assert!(sessions().verify(nonsense, NOW_MS).is_none());
        }
    }

    #[test]
    fn nothing_prints_a_key_or_a_token() {
        assert_eq!(format!("{:?} {:?}", sessions(), good()), "Sessions([redacted]) [redacted]");
    }
}
