//! A client: a customer of a team, and what may be said of one.

use paperkey_kit::values;
use paperkey_proto::Error;
use prost_types::Struct;
use serde_json::Value;

/// What a vendor says of a client.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Details {
    pub(crate) name: String,
    /// As it was written.
    pub(crate) email: Option<String>,
    pub(crate) company: Option<String>,
    pub(crate) metadata: Option<Value>,
}

/// A client.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Client {
    pub(crate) id: String,
    pub(crate) details: Details,
    pub(crate) created_at_ms: i64,
    pub(crate) updated_at_ms: i64,
}

/// What is to change: `None` leaves a field, `Some(None)` clears it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    pub(crate) name: Option<String>,
    pub(crate) email: Option<Option<String>>,
    pub(crate) company: Option<Option<String>>,
    /// Merged into what is there (RFC 7396).
    pub(crate) metadata: Option<Option<Struct>>,
}

/// An email address as it is compared.
pub(crate) fn comparable(email: &str) -> String {
    email.to_lowercase()
}

impl Details {
    /// These details, if they can be shown.
    pub(crate) fn checked(self) -> Result<Self, Error> {
        if self.name.trim().is_empty() {
            return Err(Error::field("name", "must not be blank"));
        }
        Ok(self)
    }

    /// These details with changes made to them.
    pub(crate) fn changed(&self, changes: Changes) -> Result<Self, Error> {
        let metadata = match changes.metadata {
            None => self.metadata.clone(),
            Some(None) => None,
            Some(Some(patch)) => Some(values::merged_metadata("metadata", self.metadata.clone(), &patch)?),
        };
        let changed = Self {
            name: changes.name.unwrap_or_else(|| self.name.clone()),
            email: changes.email.unwrap_or_else(|| self.email.clone()),
            company: changes.company.unwrap_or_else(|| self.company.clone()),
            metadata,
        };
        changed.checked()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn details() -> Details {
        Details {
            name: "Ada".into(),
            email: Some("Ada@Example.com".into()),
            company: None,
            metadata: Some(json!({"a": 1})),
        }
    }

    #[test]
    fn changes_set_clear_and_leave() {
        let changes = Changes {
            email: Some(None),
            company: Some(Some("Engines Ltd".into())),
            metadata: Some(values::struct_of(&json!({"a": null, "b": 2}))),
            ..Changes::default()
        };
        let changed = details().changed(changes).unwrap();
        let expected =
            Details { email: None, company: Some("Engines Ltd".into()), metadata: Some(json!({"b": 2})), ..details() };
        assert_eq!(changed, expected);
        assert_eq!(details().changed(Changes::default()).unwrap(), details());
    }

    #[test]
    fn a_blank_name_is_refused() {
        let blank = Changes { name: Some(" \t".into()), ..Changes::default() };
        assert_eq!(details().changed(blank).unwrap_err().violations()[0].field, "name");
    }

    #[test]
    fn addresses_are_compared_whatever_their_case() {
        assert_eq!(comparable("Ada@EXAMPLE.com"), comparable("ada@example.com"));
    }
}
