//! Keys: their kinds, what each kind may do, and how new ones are made.

use paperkey_kit::{
    secrets::Secret,
    token::{TokenKind, shown_prefix},
};
use paperkey_proto::{
    Contract,
    options::v1::{Caller, Scope},
    principal::v1::Mode,
};

use super::api_key::{TEMPORARY_KEY_LIFETIME_MS, TEST_KEY_LIFETIME_MS, Terms, temporary_key_name};

/// How long a free key is good, in milliseconds.
pub(crate) const FREE_KEY_LIFETIME_MS: i64 = 28 * 24 * 60 * 60 * 1_000;

/// How many key pairs of one product may be active.
pub(crate) const MAX_ACTIVE_PAIRS: u64 = 10;

/// How long pairs and keys stay in lists that were revoked or have expired, in milliseconds.
pub(crate) const REVOKED_LISTED_MS: i64 = 90 * 24 * 60 * 60 * 1_000;

/// The kinds of key that are one token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum KeyKind {
    Team,
    Platform,
    Free,
    System,
    User,
}

impl KeyKind {
    /// The kind of a token, if it is not half of a product's pair.
    pub(crate) fn of(token: TokenKind) -> Option<Self> {
        match token {
            TokenKind::TeamLive | TokenKind::TeamTest => Some(Self::Team),
            TokenKind::PlatformLive | TokenKind::PlatformTest => Some(Self::Platform),
            TokenKind::Free => Some(Self::Free),
            TokenKind::System => Some(Self::System),
            TokenKind::User => Some(Self::User),
            TokenKind::ProductPublic | TokenKind::ProductSecret => None,
        }
    }

    /// The kind of a stored word.
    pub(crate) fn of_word(word: &str) -> Option<Self> {
        [Self::Team, Self::Platform, Self::Free, Self::System, Self::User].into_iter().find(|kind| kind.word() == word)
    }

    /// What its tokens look like.
    pub(crate) fn token(self, mode: Mode) -> TokenKind {
        match (self, mode) {
            (Self::Team, Mode::Test) => TokenKind::TeamTest,
            (Self::Team, _) => TokenKind::TeamLive,
            (Self::Platform, Mode::Test) => TokenKind::PlatformTest,
            (Self::Platform, _) => TokenKind::PlatformLive,
            (Self::Free, _) => TokenKind::Free,
            (Self::System, _) => TokenKind::System,
            (Self::User, _) => TokenKind::User,
        }
    }

    /// The word that is stored.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Team => "team",
            Self::Platform => "platform",
            Self::Free => "free",
            Self::System => "system",
            Self::User => "user",
        }
    }

    /// As which kind of caller the holder appears.
    pub(crate) fn caller(self) -> Caller {
        match self {
            Self::Team | Self::Platform => Caller::TeamKey,
            Self::Free => Caller::FreeKey,
            Self::System => Caller::SystemKey,
            Self::User => Caller::UserToken,
        }
    }

    /// All that a key of this kind can be allowed.
    pub(crate) fn all_scopes(self) -> Vec<Scope> {
        let every = Contract::get().scopes().map(|(scope, _)| scope);
        match self {
            Self::System => every.collect(),
            // Checking licences is what an app in the field does, by its product's public key.
            _ => every.filter(|scope| *scope != Scope::LicensesCheck).collect(),
        }
    }
}

/// What a product's public key may do. It ships in apps.
pub(crate) const PUBLIC_KEY_SCOPES: [Scope; 1] = [Scope::LicensesCheck];

/// What a product's secret key may do, for its product only.
pub(crate) const SECRET_KEY_SCOPES: [Scope; 4] =
    [Scope::LicensesRead, Scope::LicensesWrite, Scope::WebhooksRead, Scope::WebhooksWrite];

/// Scopes as they are stored: their words, as a JSON list.
pub(crate) fn scopes_json(scopes: &[Scope]) -> String {
    let words: Vec<&str> = scopes.iter().map(|scope| Contract::get().scope_word(*scope)).collect();
    serde_json::Value::from(words).to_string()
}

/// Stored scopes. A word that is not known, and text that is no list, allows nothing.
pub(crate) fn scopes_of(json: &str) -> Vec<Scope> {
    let words: Vec<String> = serde_json::from_str(json).unwrap_or_default();
    Contract::get().scopes().filter(|(_, options)| words.contains(&options.word)).map(|(scope, _)| scope).collect()
}

/// A key that is about to be stored. The token itself is shown once and then gone.
#[derive(Debug)]
pub(crate) struct NewKey {
    pub(crate) id: String,
    pub(crate) kind: KeyKind,
    pub(crate) mode: Mode,
    pub(crate) token: Secret,
    pub(crate) shown_prefix: String,
    pub(crate) terms: Terms,
    /// Whether it is for trying calls out, beside the keys that are counted.
    pub(crate) temporary: bool,
}

impl NewKey {
    /// A key with a fresh token.
    pub(crate) fn generate(id: String, kind: KeyKind, mode: Mode, terms: Terms) -> Self {
        let token = kind.token(mode).generate();
        let shown_prefix = shown_prefix(&token);
        Self { id, kind, mode, token: Secret::new(token), shown_prefix, terms, temporary: false }
    }

    /// The free key of a registration.
    pub(crate) fn free(id: String, now_ms: i64) -> Self {
        let expires_at_ms = Some(now_ms.saturating_add(FREE_KEY_LIFETIME_MS));
        let terms = Terms { expires_at_ms, ..Terms::all_of(KeyKind::Free, "Free key") };
        Self::generate(id, KeyKind::Free, Mode::Live, terms)
    }

    /// The first live key of a registration.
    pub(crate) fn first_live(id: String) -> Self {
        let terms = Terms::all_of(KeyKind::Platform, "First live key");
        Self::generate(id, KeyKind::Platform, Mode::Live, terms)
    }

    /// The key of a sandbox team.
    pub(crate) fn sandbox(id: String, now_ms: i64) -> Self {
        let expires_at_ms = Some(now_ms.saturating_add(TEST_KEY_LIFETIME_MS));
        let terms = Terms { expires_at_ms, ..Terms::all_of(KeyKind::Platform, "Test key") };
        Self::generate(id, KeyKind::Platform, Mode::Test, terms)
    }

    /// A key to try calls out with, for the person of that address: a test key, whatever mode it is asked for in.
    pub(crate) fn temporary(id: String, email: &str, now_ms: i64) -> Self {
        let expires_at_ms = Some(now_ms.saturating_add(TEMPORARY_KEY_LIFETIME_MS));
        let terms = Terms { expires_at_ms, ..Terms::all_of(KeyKind::Team, temporary_key_name(email)) };
        Self { temporary: true, ..Self::generate(id, KeyKind::Team, Mode::Test, terms) }
    }

    /// The installation's system key.
    pub(crate) fn system(id: String, rotate_every_days: Option<i64>) -> Self {
        let terms = Terms { rotate_every_days, ..Terms::all_of(KeyKind::System, "System key") };
        Self::generate(id, KeyKind::System, Mode::Live, terms)
    }
}

/// A product's key pair that is about to be stored.
#[derive(Debug)]
pub(crate) struct NewPair {
    pub(crate) id: String,
    pub(crate) public_key: String,
    pub(crate) secret_key: Secret,
    pub(crate) secret_prefix: String,
}

impl NewPair {
    /// A pair with fresh tokens.
    pub(crate) fn generate(id: String) -> Self {
        let secret_key = TokenKind::ProductSecret.generate();
        let secret_prefix = shown_prefix(&secret_key);
        Self { id, public_key: TokenKind::ProductPublic.generate(), secret_key: Secret::new(secret_key), secret_prefix }
    }
}

/// A product's key pair, without its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pair {
    pub(crate) id: String,
    pub(crate) product_id: String,
    pub(crate) mode: Mode,
    pub(crate) public_key: String,
    pub(crate) secret_prefix: String,
    pub(crate) created_at_ms: i64,
    pub(crate) revoked_at_ms: Option<i64>,
    pub(crate) revoked_by: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_come_back_as_they_were_stored() {
        let scopes = KeyKind::Team.all_scopes();
        assert_eq!(scopes_of(&scopes_json(&scopes)), scopes);
        assert!(!scopes.contains(&Scope::LicensesCheck) && scopes.contains(&Scope::KeysWrite));
    }

    #[test]
    fn a_kind_comes_back_from_its_word_and_from_its_tokens() {
        for kind in [KeyKind::Team, KeyKind::Platform, KeyKind::Free, KeyKind::System, KeyKind::User] {
            assert_eq!(KeyKind::of_word(kind.word()), Some(kind));
            for mode in [Mode::Live, Mode::Test] {
                assert_eq!(KeyKind::of(kind.token(mode)), Some(kind));
            }
        }
        assert_eq!(KeyKind::of_word("Team"), None);
    }

    #[test]
    fn stored_nonsense_allows_nothing() {
        for nonsense in ["", "null", "{}", "[1]", "[\"everything\"]", "products:read"] {
            assert_eq!(scopes_of(nonsense), [], "{nonsense}");
        }
    }

    #[test]
    fn new_keys_are_of_their_kind_and_print_no_token() {
        let (free, live) = (NewKey::free("key_1".into(), 1_000), NewKey::first_live("key_2".into()));
        assert_eq!(TokenKind::of(free.token.expose()), Some(TokenKind::Free));
        assert_eq!(free.terms.expires_at_ms, Some(1_000 + FREE_KEY_LIFETIME_MS));
        assert_eq!(TokenKind::of(live.token.expose()), Some(TokenKind::PlatformLive));
        let pair = NewPair::generate("key_3".into());
        assert_eq!(TokenKind::of(pair.secret_key.expose()), Some(TokenKind::ProductSecret));
        let printed = format!("{free:?} {live:?} {pair:?}");
        for secret in [&free.token, &live.token, &pair.secret_key] {
            assert!(!printed.contains(secret.expose()));
        }
    }
}
