//! A product, and what may be said of it.

use paperkey_kit::values;
use paperkey_proto::Error;
use prost_types::Struct;
use serde_json::Value;

/// An amount of money in minor units.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Price {
    pub(crate) amount: i64,
    pub(crate) currency: String,
}

/// What a vendor says of a product.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Details {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    pub(crate) sku: Option<String>,
    pub(crate) price: Option<Price>,
    pub(crate) unit: Option<String>,
    pub(crate) active: bool,
    pub(crate) metadata: Option<Value>,
}

/// A product.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Product {
    pub(crate) id: String,
    pub(crate) details: Details,
    pub(crate) created_at_ms: i64,
    pub(crate) updated_at_ms: i64,
}

/// What is to change: `None` leaves a field, `Some(None)` clears it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    pub(crate) name: Option<String>,
    pub(crate) description: Option<Option<String>>,
    pub(crate) sku: Option<Option<String>>,
    pub(crate) price: Option<Option<Price>>,
    pub(crate) unit: Option<Option<String>>,
    pub(crate) active: Option<bool>,
    /// Merged into what is there (RFC 7396).
    pub(crate) metadata: Option<Option<Struct>>,
}

impl Price {
    /// A price, if its currency has the form of ISO 4217. Which currencies exist today is not judged.
    pub(crate) fn new(amount: i64, currency: String) -> Result<Self, Error> {
        if amount < 0 {
            return Err(Error::field("price.amount", "must be at least 0"));
        }
        if currency.len() != 3 || !currency.bytes().all(|b| b.is_ascii_uppercase()) {
            return Err(Error::field("price.currency", "must be three upper-case letters of ISO 4217, such as EUR"));
        }
        Ok(Self { amount, currency })
    }
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
            description: changes.description.unwrap_or_else(|| self.description.clone()),
            sku: changes.sku.unwrap_or_else(|| self.sku.clone()),
            price: changes.price.unwrap_or_else(|| self.price.clone()),
            unit: changes.unit.unwrap_or_else(|| self.unit.clone()),
            active: changes.active.unwrap_or(self.active),
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
            name: "Editor".into(),
            description: Some("Edits".into()),
            sku: None,
            price: Price::new(4_900, "EUR".into()).ok(),
            unit: Some("seat".into()),
            active: true,
            metadata: Some(json!({"a": 1})),
        }
    }

    #[test]
    fn a_currency_is_three_upper_case_letters() {
        for wrong in ["eur", "EU", "EURO", "", "E1R", "ÄÖÜ", "EU "] {
            let error = Price::new(1, wrong.into()).unwrap_err();
            assert_eq!(error.violations()[0].field, "price.currency", "{wrong}");
        }
        assert!(Price::new(0, "EUR".into()).is_ok());
        assert!(Price::new(-1, "EUR".into()).is_err());
    }

    #[test]
    fn changes_set_clear_and_leave() {
        let changes = Changes {
            description: Some(None),
            sku: Some(Some("E-1".into())),
            metadata: Some(values::struct_of(&json!({"a": null, "b": 2}))),
            ..Changes::default()
        };
        let changed = details().changed(changes).unwrap();
        let expected =
            Details { description: None, sku: Some("E-1".into()), metadata: Some(json!({"b": 2})), ..details() };
        assert_eq!(changed, expected);
        assert_eq!(details().changed(Changes::default()).unwrap(), details());
    }

    #[test]
    fn a_blank_name_is_refused() {
        let blank = Changes { name: Some(" \t".into()), ..Changes::default() };
        assert_eq!(details().changed(blank).unwrap_err().violations()[0].field, "name");
    }
}
