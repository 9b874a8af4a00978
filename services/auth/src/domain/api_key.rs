//! Keys of teams as they live: what is asked of a new one, what may be changed, who may do it to which, and when a key
//! still works.
//!
//! A rotation makes a second key beside the first: the old one names its successor and ends a little later.
//! Deliberately absent: product pairs, which are not rotated, and the system key's own rotation, which is nobody's
//! request.

use paperkey_kit::{policy::role_allows, principal::mode_word, values::rfc3339};
use paperkey_proto::{
    Contract, Error,
    auth::v1::ApiKeyStatus,
    errors::v1::Reason,
    options::v1::Scope,
    principal::v1::{Mode, Role},
};
use serde_json::{Value, json};

use super::{
    Fault,
    allowlist::Allowlist,
    key::{KeyKind, REVOKED_LISTED_MS},
};

/// How many keys of a team may be active, live and test together.
pub(crate) const MAX_ACTIVE_KEYS: u64 = 10;

/// How many keys of a team may be there to try calls out with, beside those.
pub(crate) const MAX_TEMPORARY_KEYS: u64 = 20;

/// How long one of them lives at most, in milliseconds.
pub(crate) const TEMPORARY_KEY_LIFETIME_MS: i64 = HOUR_MS;

/// How long one of them is listed after its end, in milliseconds.
const TEMPORARY_LISTED_MS: i64 = DAY_MS;

/// How many tokens one user may have in a team that have not come to their end, old halves of rotated ones included.
pub(crate) const MAX_USER_TOKENS: u64 = 50;
/// How many a rotation may bring it to: who has all that they may have can still rotate each.
pub(crate) const MAX_ROTATED_TOKENS: u64 = 2 * MAX_USER_TOKENS;

/// The kinds that count among the keys of a team.
pub(crate) const COUNTED: [KeyKind; 2] = [KeyKind::Team, KeyKind::Platform];

/// How long a `pb_test_` key lives at most, and a sandbox team, in milliseconds.
pub(crate) const TEST_KEY_LIFETIME_MS: i64 = 24 * HOUR_MS;

/// By when every gateway refuses a key that was revoked, in milliseconds.
pub(crate) const REVOKED_WITHIN_MS: i64 = 1_000;

/// How long the old half of a rotated key works where nobody says, in hours.
const DEFAULT_OVERLAP_HOURS: i32 = 24;
const MAX_OVERLAP_HOURS: i32 = 168;
const HOUR_MS: i64 = 60 * 60 * 1_000;
const DAY_MS: i64 = 24 * HOUR_MS;
const MAX_NAME_CHARS: usize = 100;
const MAX_REQUESTS_PER_MINUTE: i32 = 1_000_000;
const MAX_ROTATION_DAYS: i32 = 365;

/// What a key is called and may do, and for how long. A rotation takes it over whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    pub(crate) name: String,
    pub(crate) scopes: Vec<Scope>,
    pub(crate) read_only: bool,
    pub(crate) allowlist: Allowlist,
    pub(crate) enabled: bool,
    pub(crate) expires_at_ms: Option<i64>,
    pub(crate) requests_per_minute: Option<i64>,
    pub(crate) rotate_every_days: Option<i64>,
    /// The user that a user token acts for.
    pub(crate) user_id: Option<String>,
}

impl Terms {
    /// All that a kind may do, from anywhere, for ever.
    pub(crate) fn all_of(kind: KeyKind, name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            scopes: kind.all_scopes(),
            read_only: false,
            allowlist: Allowlist::default(),
            enabled: true,
            expires_at_ms: None,
            requests_per_minute: None,
            rotate_every_days: None,
            user_id: None,
        }
    }

    /// When a key that was made or changed at that time should be rotated.
    pub(crate) fn rotation_due_at_ms(&self, now_ms: i64) -> Option<i64> {
        self.rotate_every_days.map(|days| now_ms.saturating_add(days.saturating_mul(DAY_MS)))
    }
}

/// Who did something, as it is kept: nobody for the operator of the installation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Actor {
    pub(crate) id: Option<String>,
    pub(crate) name: Option<String>,
}

/// A stored key, without its token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiKey {
    pub(crate) id: String,
    pub(crate) kind: KeyKind,
    pub(crate) mode: Mode,
    /// None for the system key.
    pub(crate) team_id: Option<String>,
    pub(crate) shown_prefix: String,
    pub(crate) terms: Terms,
    pub(crate) creator: Actor,
    pub(crate) created_at_ms: i64,
    pub(crate) revoked_at_ms: Option<i64>,
    pub(crate) revoker: Actor,
    pub(crate) superseded_by: Option<String>,
    pub(crate) replaces: Option<String>,
    /// The first key of those that were rotated one into the next, if that is not this one.
    pub(crate) lineage: Option<String>,
    /// Whether the one that it replaces asked for it itself.
    pub(crate) self_rotated: bool,
    /// The user who was shown its token: whoever has it may have kept it.
    pub(crate) given_to: Option<String>,
    pub(crate) rotated_at_ms: Option<i64>,
    pub(crate) first_used_at_ms: Option<i64>,
    pub(crate) last_used_at_ms: Option<i64>,
    pub(crate) rotation_due_at_ms: Option<i64>,
    /// Whether it is for trying calls out: it ends within the hour, and has no successor.
    pub(crate) temporary: bool,
}

impl ApiKey {
    /// What the keys that it is rotated into are counted with.
    pub(crate) fn first_of_its_line(&self) -> &str {
        self.lineage.as_deref().unwrap_or(&self.id)
    }

    /// Whether it works, and if not, why.
    pub(crate) fn status(&self, now_ms: i64) -> ApiKeyStatus {
        if self.revoked_at_ms.is_some() {
            ApiKeyStatus::Revoked
        } else if self.terms.expires_at_ms.is_some_and(|at_ms| at_ms <= now_ms) {
            ApiKeyStatus::Expired
        } else if !self.terms.enabled {
            ApiKeyStatus::Disabled
        } else if self.superseded_by.is_some() {
            ApiKeyStatus::Superseded
        } else {
            ApiKeyStatus::Active
        }
    }

    /// Whether its token opens anything.
    pub(crate) fn is_good(&self, now_ms: i64) -> bool {
        matches!(self.status(now_ms), ApiKeyStatus::Active | ApiKeyStatus::Superseded)
    }

    /// Refuses a key that has come to its end, or has a successor: nothing about it changes any more.
    pub(crate) fn must_be_current(&self, now_ms: i64) -> Result<(), Fault> {
        match self.status(now_ms) {
            ApiKeyStatus::Revoked => Err(Fault::KeyRevoked),
            ApiKeyStatus::Expired => Err(Fault::KeyExpired),
            _ if self.superseded_by.is_some() => Err(Fault::KeyRotated),
            _ => Ok(()),
        }
    }

    /// Refuses a key that is for trying calls out: a successor would count among the others, or outlive the hour.
    pub(crate) fn must_be_rotatable(&self) -> Result<(), Fault> {
        if self.temporary { Err(Fault::KeyIsTemporary) } else { Ok(()) }
    }

    /// Refuses a key that may do more than the one that calls, or longer, or more often, or from elsewhere.
    pub(crate) fn must_not_exceed(&self, caller: &Self) -> Result<(), Fault> {
        let (mine, theirs) = (&self.terms, &caller.terms);
        let within = mine.scopes.iter().all(|scope| theirs.scopes.contains(scope))
            && (mine.read_only || !theirs.read_only)
            && mine.allowlist.is_within(&theirs.allowlist)
            && is_within(mine.expires_at_ms, theirs.expires_at_ms)
            && is_within(mine.requests_per_minute, theirs.requests_per_minute);
        if within { Ok(()) } else { Err(Fault::WiderThanCaller) }
    }

    /// When its old half ends, if it is rotated now: never later than the key itself.
    pub(crate) fn end_after(&self, overlap: Overlap, now_ms: i64) -> i64 {
        let end_ms = now_ms.saturating_add(overlap.0);
        self.terms.expires_at_ms.map_or(end_ms, |own_ms| own_ms.min(end_ms))
    }

    /// The latest end that this key may be given; any where none.
    fn latest_end_ms(&self) -> Option<i64> {
        match (self.kind, self.mode) {
            _ if self.temporary => Some(self.created_at_ms.saturating_add(TEMPORARY_KEY_LIFETIME_MS)),
            // Lent for its 28 days: they may become fewer.
            (KeyKind::Free, _) => self.terms.expires_at_ms,
            // Rotating one must not be a way to keep it for ever.
            (KeyKind::Platform, Mode::Test) if self.replaces.is_some() => self.terms.expires_at_ms,
            (KeyKind::Platform, Mode::Test) => Some(self.created_at_ms.saturating_add(TEST_KEY_LIFETIME_MS)),
            _ => None,
        }
    }

    /// The same key with some changes.
    pub(crate) fn changed(&self, changes: Changes, now_ms: i64) -> Result<Self, Error> {
        let mut key = self.clone();
        let terms = &mut key.terms;
        let Changes { name, enabled, read_only, scopes, allowlist, expires_at_ms, .. } = changes;
        if let Some(name) = name {
            terms.name = name;
        }
        if let Some(enabled) = enabled {
            terms.enabled = enabled;
        }
        if let Some(read_only) = read_only {
            terms.read_only = read_only;
        }
        if let Some(words) = scopes {
            terms.scopes = scopes_among(&words, self.kind)?;
        }
        if let Some(allowlist) = allowlist {
            terms.allowlist = allowlist;
        }
        if let Some(expires_at_ms) = expires_at_ms {
            terms.expires_at_ms = future(expires_at_ms, now_ms)?;
            if let Some(latest_ms) = self.latest_end_ms()
                && !is_within(terms.expires_at_ms, Some(latest_ms))
            {
                let message = format!("must not be later than {}, when a key of this kind ends", rfc3339(latest_ms));
                return Err(Error::field("expires_at", message));
            }
        }
        if let Some(limit) = changes.requests_per_minute {
            terms.requests_per_minute = limit;
        }
        if let Some(days) = changes.rotate_every_days {
            if self.temporary && days.is_some() {
                return Err(Error::field("rotate_every_days", "is not for a temporary key, which is not rotated"));
            }
            terms.rotate_every_days = days;
            key.rotation_due_at_ms = key.terms.rotation_due_at_ms(now_ms);
        }
        Ok(key)
    }

    /// What its team's webhooks are told of it.
    pub(crate) fn event_data(&self) -> Value {
        json!({
            "id": self.id,
            "name": self.terms.name,
            "prefix": self.shown_prefix,
            "mode": mode_word(self.mode),
            "expiresAt": self.terms.expires_at_ms.map(rfc3339),
        })
    }

    /// When a key ends that was made at that time: a temporary one within its hour, whatever is stored. The release
    /// before knows of none, and may be told to move any end.
    pub(crate) fn end_ms(stored_ms: Option<i64>, temporary: bool, created_at_ms: i64) -> Option<i64> {
        let latest_ms = temporary.then(|| created_at_ms.saturating_add(TEMPORARY_KEY_LIFETIME_MS));
        stored_ms.into_iter().chain(latest_ms).min()
    }

    /// Since when a temporary key was made that has not ended by that time.
    pub(crate) fn temporary_made_since_ms(ended_ms: i64) -> i64 {
        ended_ms.saturating_sub(TEMPORARY_KEY_LIFETIME_MS)
    }

    /// Since when keys that have come to their end are still listed.
    pub(crate) fn listed_since_ms(now_ms: i64) -> i64 {
        now_ms.saturating_sub(REVOKED_LISTED_MS)
    }

    /// The same of those that were for trying calls out: there may be many.
    pub(crate) fn temporary_listed_since_ms(now_ms: i64) -> i64 {
        now_ms.saturating_sub(TEMPORARY_LISTED_MS)
    }
}

/// Whether the first limit, or end, is no wider than the second; none is wider than any.
fn is_within(limit: Option<i64>, widest: Option<i64>) -> bool {
    match (limit, widest) {
        (_, None) => true,
        (None, Some(_)) => false,
        (Some(limit), Some(widest)) => limit <= widest,
    }
}

/// What an update asks for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    pub(crate) name: Option<String>,
    pub(crate) enabled: Option<bool>,
    pub(crate) read_only: Option<bool>,
    pub(crate) scopes: Option<Vec<String>>,
    pub(crate) allowlist: Option<Allowlist>,
    pub(crate) expires_at_ms: Option<Option<i64>>,
    pub(crate) requests_per_minute: Option<Option<i64>>,
    pub(crate) rotate_every_days: Option<Option<i64>>,
}

/// What a key asks for that makes another.
#[derive(Clone, Debug)]
pub(crate) struct Wish {
    pub(crate) name: String,
    pub(crate) mode: Mode,
    pub(crate) read_only: bool,
    /// Those of the maker where empty.
    pub(crate) scopes: Vec<String>,
    pub(crate) allowlist: Allowlist,
    pub(crate) expires_at_ms: Option<i64>,
}

impl Wish {
    /// The terms of a key of the platform's brand, never wider or longer-lived than the one that makes it.
    pub(crate) fn granted_by(self, maker: &ApiKey, now_ms: i64) -> Result<Terms, Error> {
        let (theirs, contract) = (&maker.terms, Contract::get());
        let scopes = if self.scopes.is_empty() {
            let all = KeyKind::Platform.all_scopes();
            theirs.scopes.iter().copied().filter(|scope| all.contains(scope)).collect()
        } else {
            scopes_among(&self.scopes, KeyKind::Platform)?
        };
        if let Some(scope) = scopes.iter().find(|scope| !theirs.scopes.contains(scope)) {
            let word = contract.scope_word(*scope);
            let message = format!("This key has not the scope {word} and cannot pass it on");
            return Err(Error::new(Reason::ScopeInsufficient).with_message(message));
        }
        let allowlist = if self.allowlist.is_open() { theirs.allowlist.clone() } else { self.allowlist };
        if let Some(at) = allowlist.beyond(&theirs.allowlist) {
            let message = "must lie within the allowlist of the key that makes it";
            return Err(Error::field(format!("allowlist[{at}]"), message));
        }
        let test_end_ms = (self.mode == Mode::Test).then(|| now_ms.saturating_add(TEST_KEY_LIFETIME_MS));
        let latest_ms = theirs.expires_at_ms.into_iter().chain(test_end_ms).min();
        let expires_at_ms = future(self.expires_at_ms, now_ms)?.or(latest_ms);
        if !is_within(expires_at_ms, theirs.expires_at_ms) {
            return Err(Error::field("expires_at", "must not be later than the end of the key that makes it"));
        }
        if !is_within(expires_at_ms, test_end_ms) {
            return Err(Error::field("expires_at", "must be within 24 hours for a test key"));
        }
        Ok(Terms {
            name: self.name,
            scopes,
            read_only: self.read_only || theirs.read_only,
            allowlist,
            enabled: true,
            expires_at_ms,
            requests_per_minute: theirs.requests_per_minute,
            rotate_every_days: None,
            user_id: None,
        })
    }
}

/// Who does something to keys.
#[derive(Clone, Debug)]
pub(crate) struct Doer {
    /// The id of the user or of the key.
    pub(crate) id: String,
    /// The name of the key; a user's is looked up.
    pub(crate) name: String,
    pub(crate) hand: Hand,
}

/// In what capacity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Hand {
    /// A person, signed in.
    Member { user_id: String, role: Role },
    /// A person, by a token.
    Token { user_id: String, role: Role },
    /// A key that belongs to nobody.
    Key,
    /// The installation's own key.
    System,
}

impl Doer {
    /// The person who acts, if it is one.
    pub(crate) fn person(&self) -> Option<&str> {
        match &self.hand {
            Hand::Member { user_id, .. } | Hand::Token { user_id, .. } => Some(user_id),
            Hand::Key | Hand::System => None,
        }
    }

    /// The same, with the role that the person has now, if it is one that keeps keys.
    pub(crate) fn with_role(self, now: Role) -> Result<Self, Fault> {
        if !role_allows(now, Scope::KeysWrite) {
            return Err(Fault::RoleInsufficient);
        }
        let hand = match self.hand {
            Hand::Member { user_id, .. } => Hand::Member { user_id, role: now },
            Hand::Token { user_id, .. } => Hand::Token { user_id, role: now },
            other => other,
        };
        Ok(Self { hand, ..self })
    }

    /// Whether it is a key that acts, and not a person.
    pub(crate) fn is_key(&self) -> bool {
        matches!(self.hand, Hand::Key | Hand::System)
    }

    /// Refuses to touch the token of a user who has that role: everyone their own, Owners every one, Admins none of an
    /// Owner's, keys of the team none.
    pub(crate) fn may_touch_token_of(&self, user: &str, users_role: Role) -> Result<(), Fault> {
        match &self.hand {
            Hand::System => Ok(()),
            Hand::Key => Err(Fault::TokenOfUser),
            Hand::Member { user_id, role } | Hand::Token { user_id, role } => {
                if user_id == user || *role == Role::Owner || users_role != Role::Owner {
                    Ok(())
                } else {
                    Err(Fault::TokenOfOwner)
                }
            }
        }
    }
}

/// How long the old half of a rotated key works on, in milliseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Overlap(i64);

impl Overlap {
    /// As a request says it.
    pub(crate) fn of_hours(hours: Option<i32>) -> Result<Self, Error> {
        let hours = hours.unwrap_or(DEFAULT_OVERLAP_HOURS);
        if !(0..=MAX_OVERLAP_HOURS).contains(&hours) {
            return Err(Error::field("overlap_hours", format!("must be between 0 and {MAX_OVERLAP_HOURS}")));
        }
        Ok(Self(i64::from(hours) * HOUR_MS))
    }
}

impl Overlap {
    /// In milliseconds.
    pub(crate) fn ms(self) -> i64 {
        self.0
    }
}

impl Default for Overlap {
    fn default() -> Self {
        Self(i64::from(DEFAULT_OVERLAP_HOURS) * HOUR_MS)
    }
}

/// The name of a key, trimmed.
pub(crate) fn key_name(text: &str) -> Result<String, Error> {
    let name = text.trim();
    if name.is_empty() {
        return Err(Error::field("name", "must not be empty"));
    }
    if name.chars().any(char::is_control) {
        return Err(Error::field("name", "must not contain control characters"));
    }
    if name.chars().count() > MAX_NAME_CHARS {
        return Err(Error::field("name", format!("must be at most {MAX_NAME_CHARS} characters long")));
    }
    Ok(name.to_owned())
}

/// What a key to try calls out with is called, so that people see whose it is.
pub(crate) fn temporary_key_name(email: &str) -> String {
    format!("Reference, {email}").chars().take(MAX_NAME_CHARS).collect()
}

/// Scopes by their words, if a key of that kind may hold them; all that it may hold where none is named.
pub(crate) fn scopes_among(words: &[String], kind: KeyKind) -> Result<Vec<Scope>, Error> {
    let all = kind.all_scopes();
    if words.is_empty() {
        return Ok(all);
    }
    let contract = Contract::get();
    let known = |word: &String| all.iter().any(|scope| contract.scope_word(*scope) == word);
    if let Some(at) = words.iter().position(|word| !known(word)) {
        let known: Vec<&str> = all.iter().map(|scope| contract.scope_word(*scope)).collect();
        return Err(Error::field(format!("scopes[{at}]"), format!("must be one of {}", known.join(", "))));
    }
    Ok(all.into_iter().filter(|scope| words.iter().any(|word| contract.scope_word(*scope) == word)).collect())
}

/// An end that is still to come.
pub(crate) fn future(expires_at_ms: Option<i64>, now_ms: i64) -> Result<Option<i64>, Error> {
    match expires_at_ms {
        Some(at_ms) if at_ms <= now_ms => Err(Error::field("expires_at", "must be in the future")),
        end => Ok(end),
    }
}

/// A key's own limit.
pub(crate) fn own_limit(requests_per_minute: Option<i32>) -> Result<Option<i64>, Error> {
    bounded("requests_per_minute", requests_per_minute, MAX_REQUESTS_PER_MINUTE)
}

/// How often a key should be rotated.
pub(crate) fn rotation_days(days: Option<i32>) -> Result<Option<i64>, Error> {
    bounded("rotate_every_days", days, MAX_ROTATION_DAYS)
}

fn bounded(field: &str, value: Option<i32>, most: i32) -> Result<Option<i64>, Error> {
    match value {
        Some(value) if !(1..=most).contains(&value) => {
            Err(Error::field(field, format!("must be between 1 and {most}")))
        }
        value => Ok(value.map(i64::from)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW_MS: i64 = 1_790_000_000_000;

    fn key(kind: KeyKind) -> ApiKey {
        ApiKey {
            id: "key_1".into(),
            kind,
            mode: Mode::Live,
            team_id: Some("team_1".into()),
            shown_prefix: "pk_live_AbCd".into(),
            terms: Terms::all_of(kind, "Key"),
            creator: Actor::default(),
            created_at_ms: NOW_MS,
            revoked_at_ms: None,
            revoker: Actor::default(),
            superseded_by: None,
            replaces: None,
            lineage: None,
            self_rotated: false,
            given_to: None,
            rotated_at_ms: None,
            first_used_at_ms: None,
            last_used_at_ms: None,
            rotation_due_at_ms: None,
            temporary: false,
        }
    }

    fn ending(at_ms: i64) -> ApiKey {
        let key = key(KeyKind::Team);
        ApiKey { terms: Terms { expires_at_ms: Some(at_ms), ..key.terms.clone() }, ..key }
    }

    #[test]
    fn a_key_exceeds_another_by_its_own_limit_too() {
        let limited = |limit: Option<i64>| {
            let key = key(KeyKind::Team);
            ApiKey { terms: Terms { requests_per_minute: limit, ..key.terms.clone() }, ..key }
        };
        for (mine, callers) in [(None, Some(1)), (Some(2), Some(1)), (Some(i64::MAX), Some(1))] {
            assert_eq!(limited(mine).must_not_exceed(&limited(callers)), Err(Fault::WiderThanCaller));
        }
        for (mine, callers) in [(None, None), (Some(1), None), (Some(1), Some(1)), (Some(1), Some(2))] {
            assert_eq!(limited(mine).must_not_exceed(&limited(callers)), Ok(()));
        }
    }

    #[test]
    fn a_key_works_until_it_ends_and_says_why_it_does_not() {
        let good = key(KeyKind::Team);
        assert_eq!(good.status(NOW_MS), ApiKeyStatus::Active);
        let rotated = ApiKey { superseded_by: Some("key_2".into()), ..ending(NOW_MS + 1) };
        assert_eq!((rotated.status(NOW_MS), rotated.is_good(NOW_MS)), (ApiKeyStatus::Superseded, true));
        assert_eq!((rotated.status(NOW_MS + 1), rotated.is_good(NOW_MS + 1)), (ApiKeyStatus::Expired, false));
        let disabled = ApiKey { terms: Terms { enabled: false, ..rotated.terms.clone() }, ..rotated.clone() };
        assert_eq!((disabled.status(NOW_MS), disabled.is_good(NOW_MS)), (ApiKeyStatus::Disabled, false));
        assert_eq!(disabled.must_be_current(NOW_MS), Err(Fault::KeyRotated));
        let revoked = ApiKey { revoked_at_ms: Some(NOW_MS), ..disabled };
        assert_eq!((revoked.status(NOW_MS), revoked.is_good(NOW_MS)), (ApiKeyStatus::Revoked, false));
    }

    #[test]
    fn an_old_half_lives_no_longer_than_its_key() {
        assert_eq!(key(KeyKind::Team).end_after(Overlap::default(), NOW_MS), NOW_MS + DAY_MS);
        assert_eq!(ending(NOW_MS + 5).end_after(Overlap::default(), NOW_MS), NOW_MS + 5);
        let none = Overlap::of_hours(Some(0)).unwrap();
        assert_eq!(ending(NOW_MS + 5).end_after(none, NOW_MS), NOW_MS);
        assert!(Overlap::of_hours(Some(168)).is_ok());
        for nonsense in [-1, 169, i32::MIN, i32::MAX] {
            assert!(Overlap::of_hours(Some(nonsense)).is_err());
        }
    }

    #[test]
    fn a_temporary_key_ends_within_its_hour_and_has_no_successor() {
        let end_ms = NOW_MS + HOUR_MS;
        let key = ApiKey { temporary: true, ..ending(end_ms) };
        assert_eq!(key.must_be_rotatable(), Err(Fault::KeyIsTemporary));
        assert_eq!(ending(end_ms).must_be_rotatable(), Ok(()));
        let moved = |to| key.changed(Changes { expires_at_ms: Some(to), ..Changes::default() }, NOW_MS + 1);
        for later in [Some(end_ms + 1), Some(i64::MAX), None] {
            assert_eq!(moved(later).unwrap_err().violations()[0].field, "expires_at");
        }
        assert_eq!(moved(Some(end_ms - 1)).unwrap().terms.expires_at_ms, Some(end_ms - 1), "sooner is well");
        let rotating = |days| Changes { rotate_every_days: Some(days), ..Changes::default() };
        assert_eq!(key.changed(rotating(Some(1)), NOW_MS).unwrap_err().violations()[0].field, "rotate_every_days");
        assert!(key.changed(rotating(None), NOW_MS).is_ok());
        for (stored, end) in [(None, end_ms), (Some(end_ms + DAY_MS), end_ms), (Some(end_ms - 1), end_ms - 1)] {
            assert_eq!(ApiKey::end_ms(stored, true, NOW_MS), Some(end), "{stored:?}");
            assert_eq!(ApiKey::end_ms(stored, false, NOW_MS), stored);
        }
        assert!(temporary_key_name(&"a".repeat(300)).chars().count() == MAX_NAME_CHARS);
    }

    #[test]
    fn a_key_exceeds_another_by_anything_that_is_more() {
        let caller = key(KeyKind::Team);
        assert_eq!(caller.must_not_exceed(&caller), Ok(()));
        let office = Allowlist::parse(&["10.0.0.0/8".to_owned()]).unwrap();
        let changes: [fn(&mut Terms, Allowlist); 4] = [
            |terms, _| terms.scopes.truncate(1),
            |terms, _| terms.read_only = true,
            |terms, office| terms.allowlist = office,
            |terms, _| terms.expires_at_ms = Some(NOW_MS + 1),
        ];
        for change in changes {
            let mut narrow = caller.clone();
            change(&mut narrow.terms, office.clone());
            assert_eq!(narrow.must_not_exceed(&caller), Ok(()));
            assert_eq!(caller.must_not_exceed(&narrow), Err(Fault::WiderThanCaller));
        }
    }

    #[test]
    fn a_key_passes_on_no_scope_that_only_the_installation_has() {
        let wish = Wish {
            name: "Key".into(),
            mode: Mode::Live,
            read_only: false,
            scopes: Vec::new(),
            allowlist: Allowlist::default(),
            expires_at_ms: None,
        };
        let terms = wish.clone().granted_by(&key(KeyKind::System), NOW_MS).unwrap();
        assert_eq!(terms, Terms::all_of(KeyKind::Platform, "Key"));
        let read_only = ApiKey { terms: Terms { read_only: true, ..terms.clone() }, ..key(KeyKind::Team) };
        assert!(wish.granted_by(&read_only, NOW_MS).unwrap().read_only);
    }

    #[test]
    fn scopes_are_named_by_their_words_in_any_order() {
        let named = ["usage:read", "products:read", "usage:read"].map(str::to_owned);
        assert_eq!(scopes_among(&named, KeyKind::Team).unwrap(), [Scope::ProductsRead, Scope::UsageRead]);
        assert_eq!(scopes_among(&[], KeyKind::Team).unwrap(), KeyKind::Team.all_scopes());
        for nonsense in ["", "products", "PRODUCTS:READ", "products:read ", "licenses:check", "\u{0}"] {
            let error = scopes_among(&["products:read".to_owned(), nonsense.to_owned()], KeyKind::User).unwrap_err();
            assert_eq!(error.violations()[0].field, "scopes[1]", "{nonsense:?}");
        }
    }

    #[test]
    fn only_owners_touch_the_tokens_of_owners() {
        let member = |role| Doer {
            id: "usr_1".into(),
            name: String::new(),
            hand: Hand::Member { user_id: "usr_1".into(), role },
        };
        let (owner, admin) = (member(Role::Owner), member(Role::Admin));
        assert_eq!(owner.may_touch_token_of("usr_2", Role::Owner), Ok(()));
        assert_eq!(admin.may_touch_token_of("usr_2", Role::Admin), Ok(()));
        assert_eq!(admin.may_touch_token_of("usr_2", Role::Owner), Err(Fault::TokenOfOwner));
        assert_eq!(admin.may_touch_token_of("usr_1", Role::Owner), Ok(()), "one's own");
        let key = Doer { hand: Hand::Key, ..admin };
        assert_eq!(key.may_touch_token_of("usr_1", Role::Member), Err(Fault::TokenOfUser));
    }
}
