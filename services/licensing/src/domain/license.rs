//! Licences and activations: what they are, when they may be used, and how they change.

use paperkey_kit::values;
use paperkey_proto::Error;
use prost_types::Struct;
use serde_json::Value;

use super::license_key::LicenseKey;

/// How many machines a licence is for where nobody says.
pub const DEFAULT_MAX_ACTIVATIONS: i64 = 1;

/// Whether a licence may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It may.
    Active,
    /// Its time is over.
    Expired,
    /// Its vendor took it back. Said also of one that has expired since.
    Revoked,
}

impl Status {
    /// The status as it is shown.
    pub fn word(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        }
    }
}

/// What decides whether a licence may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// How many machines may be activated at a time; `None` is unlimited.
    pub max_activations: Option<i64>,
    /// How many are.
    pub activations_count: i64,
    /// From when on it is expired.
    pub expires_at_ms: Option<i64>,
    /// Since when it is revoked.
    pub revoked_at_ms: Option<i64>,
}

/// What a validation finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The licence may be used, on this machine if one was named.
    Valid,
    /// Its time is over.
    Expired,
    /// Its vendor took it back.
    Revoked,
    /// The machine is not activated, and no slot is free for it.
    LimitReached,
}

impl Standing {
    /// Whether the licence may be used at that time.
    pub fn status(&self, now_ms: i64) -> Status {
        if self.revoked_at_ms.is_some() {
            Status::Revoked
        } else if self.expires_at_ms.is_some_and(|at_ms| at_ms <= now_ms) {
            Status::Expired
        } else {
            Status::Active
        }
    }

    /// How many more machines may be activated; `None` is unlimited. Lowering the limit below what is activated leaves
    /// none, and never fewer.
    pub fn remaining(&self) -> Option<i64> {
        self.max_activations.map(|max| max.saturating_sub(self.activations_count).max(0))
    }

    /// What a validation answers. `activated` says whether the machine that asks is, if one was named.
    pub fn verdict(&self, activated: Option<bool>, now_ms: i64) -> Verdict {
        match self.status(now_ms) {
            Status::Revoked => Verdict::Revoked,
            Status::Expired => Verdict::Expired,
            Status::Active if activated == Some(false) && self.remaining() == Some(0) => Verdict::LimitReached,
            Status::Active => Verdict::Valid,
        }
    }
}

/// A licence.
#[derive(Clone, Debug, PartialEq)]
pub struct License {
    /// `lic_…`
    pub id: String,
    /// What it is for.
    pub product_id: String,
    /// Its key; `None` if what is stored cannot be opened any more.
    pub key: Option<LicenseKey>,
    /// Whose it is.
    pub email: Option<String>,
    /// The client that holds it.
    pub client_id: Option<String>,
    /// What decides whether it may be used.
    pub standing: Standing,
    /// The vendor's own data.
    pub metadata: Option<Value>,
    /// When it was issued.
    pub created_at_ms: i64,
    /// When it was last changed by its vendor.
    pub updated_at_ms: i64,
}

/// A machine that a licence is bound to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activation {
    /// `act_…`
    pub id: String,
    /// The licence.
    pub license_id: String,
    /// What identifies the machine.
    pub fingerprint: String,
    /// What people call it.
    pub name: Option<String>,
    /// When it was first activated.
    pub created_at_ms: i64,
    /// When it last activated.
    pub last_check_at_ms: i64,
}

/// What a vendor decides of a licence.
#[derive(Clone, Debug, PartialEq)]
pub struct Terms {
    /// Whose it is.
    pub email: Option<String>,
    /// The client that holds it.
    pub client_id: Option<String>,
    /// How many machines may be activated at a time; `None` is unlimited.
    pub max_activations: Option<i64>,
    /// From when on it is expired.
    pub expires_at_ms: Option<i64>,
    /// The vendor's own data.
    pub metadata: Option<Value>,
}

/// A licence that is to be issued along with others.
#[derive(Clone, Debug)]
pub struct Draft {
    /// What it is for.
    pub product_id: String,
    /// What its vendor decides of it.
    pub terms: Terms,
    /// The key that it is to have; a new one where absent.
    pub key: Option<LicenseKey>,
    /// Since when it is revoked, if it was where it comes from.
    pub revoked_at_ms: Option<i64>,
}

/// What is to change: `None` leaves a field, `Some(None)` clears it.
#[derive(Clone, Debug, Default)]
pub struct Changes {
    /// Whose it is.
    pub email: Option<Option<String>>,
    /// The client that holds it.
    pub client_id: Option<Option<String>>,
    /// Cleared is unlimited.
    pub max_activations: Option<Option<i64>>,
    /// Cleared is for ever.
    pub expires_at_ms: Option<Option<i64>>,
    /// Merged into what is there (RFC 7396).
    pub metadata: Option<Option<Struct>>,
}

impl Terms {
    /// These terms, if they can be stored.
    pub fn checked(self) -> Result<Self, Error> {
        if self.max_activations.is_some_and(|max| max < 0) {
            return Err(Error::field("max_activations", "must be at least 0, or null for unlimited"));
        }
        Ok(self)
    }

    /// These terms with changes made to them.
    pub fn changed(&self, changes: Changes) -> Result<Self, Error> {
        let metadata = match changes.metadata {
            None => self.metadata.clone(),
            Some(None) => None,
            Some(Some(patch)) => Some(values::merged_metadata("metadata", self.metadata.clone(), &patch)?),
        };
        let changed = Self {
            email: changes.email.unwrap_or_else(|| self.email.clone()),
            client_id: changes.client_id.unwrap_or_else(|| self.client_id.clone()),
            max_activations: changes.max_activations.unwrap_or(self.max_activations),
            expires_at_ms: changes.expires_at_ms.unwrap_or(self.expires_at_ms),
            metadata,
        };
        changed.checked()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPEN: Standing =
        Standing { max_activations: Some(2), activations_count: 1, expires_at_ms: None, revoked_at_ms: None };

    #[test]
    fn a_licence_expires_at_its_time_and_revocation_goes_first() {
        let standing = Standing { expires_at_ms: Some(1_000), ..OPEN };
        assert_eq!(standing.status(999), Status::Active);
        assert_eq!(standing.status(1_000), Status::Expired);
        let revoked = Standing { revoked_at_ms: Some(5), ..standing };
        assert_eq!((revoked.status(10), revoked.status(2_000)), (Status::Revoked, Status::Revoked));
    }

    #[test]
    fn remaining_is_never_negative_and_null_where_unlimited() {
        let with = |max_activations, activations_count| Standing { max_activations, activations_count, ..OPEN };
        assert_eq!(with(Some(2), 1).remaining(), Some(1));
        assert_eq!(with(Some(1), 3).remaining(), Some(0));
        assert_eq!(with(Some(0), 0).remaining(), Some(0));
        assert_eq!(with(None, 9).remaining(), None);
    }

    #[test]
    fn a_full_licence_is_valid_for_those_who_are_in_and_where_nobody_is_named() {
        let full = Standing { activations_count: 2, ..OPEN };
        assert_eq!(full.verdict(None, 0), Verdict::Valid);
        assert_eq!(full.verdict(Some(true), 0), Verdict::Valid);
        assert_eq!(full.verdict(Some(false), 0), Verdict::LimitReached);
        assert_eq!(OPEN.verdict(Some(false), 0), Verdict::Valid);
        assert_eq!(Standing { revoked_at_ms: Some(1), ..full }.verdict(Some(false), 0), Verdict::Revoked);
        assert_eq!(Standing { expires_at_ms: Some(0), ..full }.verdict(Some(true), 0), Verdict::Expired);
    }

    #[test]
    fn changes_set_clear_and_leave() {
        let terms = Terms {
            email: Some("a@b.c".into()),
            client_id: None,
            max_activations: Some(1),
            expires_at_ms: Some(5),
            metadata: None,
        };
        let changes = Changes { max_activations: Some(None), expires_at_ms: Some(Some(7)), ..Changes::default() };
        let expected = Terms { max_activations: None, expires_at_ms: Some(7), ..terms.clone() };
        assert_eq!(terms.changed(changes).unwrap(), expected);
        let negative = Changes { max_activations: Some(Some(-1)), ..Changes::default() };
        assert_eq!(terms.changed(negative).unwrap_err().violations()[0].field, "max_activations");
    }
}
