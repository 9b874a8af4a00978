//! What is sealed, and where it is kept: the one list of it.
//!
//! A purpose that names no column does not compile, and a column that no purpose names fails a test (`tests/sealed.rs`),
//! so that nothing sealed is forgotten when the master key changes.
//!
//! Not in it are stored answers (`idempotency.sealed_response`): those are sealed under the caller's own credential and
//! `Idempotency-Key`, which the installation does not keep.

use crate::service::SERVICES;

/// What something is sealed for. Each has a key of its own, derived from the master key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Purpose {
    /// The keys of licences.
    LicenseKey,
    /// The secrets by which webhooks are signed.
    WebhookSecret,
    /// What webhooks are told.
    WebhookEvent,
    /// Events on their way between services.
    Outbox,
    /// Mails that wait to be sent.
    Mail,
    /// Posts to Slack that wait to be sent.
    Slack,
    /// Keys that outlive a change of the master key.
    KeptKey,
}

/// A column of sealed data.
#[derive(Debug, PartialEq, Eq)]
pub struct SealedColumn {
    /// The services whose databases have it.
    pub services: &'static [&'static str],
    /// Its table.
    pub table: &'static str,
    /// The table's primary key.
    pub key: RowKey,
    /// What its data is bound to: the column that names the owner.
    pub owner: &'static str,
    /// The column itself.
    pub column: &'static str,
    /// What it is sealed for.
    pub purpose: Purpose,
}

/// The primary key of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowKey {
    /// Text.
    Text(&'static str),
    /// A number that the database counts up.
    Number(&'static str),
}

impl RowKey {
    /// What the column is called.
    pub fn column(self) -> &'static str {
        let (Self::Text(column) | Self::Number(column)) = self;
        column
    }
}

impl Purpose {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 7] = [
        Self::LicenseKey,
        Self::WebhookSecret,
        Self::WebhookEvent,
        Self::Outbox,
        Self::Mail,
        Self::Slack,
        Self::KeptKey,
    ];

    /// By what its key is derived. Never changed: what was sealed could not be opened any more.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::LicenseKey => "license-key/v1",
            Self::WebhookSecret => "webhook-secret/v1",
            Self::WebhookEvent => "webhook-event/v1",
            Self::Outbox => "outbox/v1",
            Self::Mail => "mail/v1",
            Self::Slack => "slack/v1",
            Self::KeptKey => "kept-key/v1",
        }
    }

    /// Where what is sealed for it is kept.
    pub fn columns(self) -> &'static [SealedColumn] {
        match self {
            Self::LicenseKey => {
                const { &[SealedColumn::by_id(&["licensing"], "licenses", "key_sealed", Self::LicenseKey)] }
            }
            Self::WebhookSecret => {
                const {
                    &[
                        SealedColumn::by_id(&["webhook"], "endpoints", "secret_sealed", Self::WebhookSecret),
                        SealedColumn::by_id(&["webhook"], "endpoints", "previous_secret_sealed", Self::WebhookSecret),
                    ]
                }
            }
            Self::WebhookEvent => {
                const { &[SealedColumn::by_id(&["webhook"], "events", "body_sealed", Self::WebhookEvent)] }
            }
            Self::Outbox => {
                const {
                    &[SealedColumn {
                        key: RowKey::Number("seq"),
                        ..SealedColumn::by_id(&SERVICES, "outbox", "payload", Self::Outbox)
                    }]
                }
            }
            Self::Mail => const { &[SealedColumn::by_id(&["auth"], "mails", "sealed", Self::Mail)] },
            Self::Slack => const { &[SealedColumn::by_id(&["auth"], "slack_posts", "sealed", Self::Slack)] },
            Self::KeptKey => {
                const {
                    &[SealedColumn {
                        key: RowKey::Text("name"),
                        owner: "name",
                        ..SealedColumn::by_id(&SERVICES, "kept_keys", "sealed", Self::KeptKey)
                    }]
                }
            }
        }
    }
}

impl SealedColumn {
    const fn by_id(
        services: &'static [&'static str],
        table: &'static str,
        column: &'static str,
        purpose: Purpose,
    ) -> Self {
        Self { services, table, key: RowKey::Text("id"), owner: "id", column, purpose }
    }

    /// Those in the database of a service.
    pub fn of(service: &str) -> impl Iterator<Item = &'static Self> {
        let columns = Purpose::ALL.into_iter().flat_map(Purpose::columns);
        columns.filter(move |column| column.services.contains(&service))
    }
}

/// A key that outlives a change of the master key, since what was hashed with it is not hashed anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeptKey {
    /// Under which licences are looked up by their keys.
    LicenseKey,
    /// Under which the audit log is chained.
    AuditChain,
}

impl KeptKey {
    /// All of them, in the order of their declaration.
    pub const ALL: [Self; 2] = [Self::LicenseKey, Self::AuditChain];

    /// Those in the database of a service.
    pub fn of(service: &str) -> &'static [Self] {
        match service {
            "licensing" => &[Self::LicenseKey],
            "auth" => &[Self::AuditChain],
            _ => &[],
        }
    }

    /// What it is called where it is kept, and the label by which it was derived before it was kept.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::LicenseKey => "license-key/v1",
            Self::AuditChain => "audit-chain/v1",
        }
    }

    /// A table that holds something as soon as the key was used.
    pub(super) fn used_in(self) -> &'static str {
        match self {
            Self::LicenseKey => "licenses",
            Self::AuditChain => "audit_blocks",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_purpose_has_its_place_its_label_and_its_columns() {
        for (place, purpose) in Purpose::ALL.into_iter().enumerate() {
            assert_eq!(purpose as usize, place);
            assert!(!purpose.columns().is_empty(), "{purpose:?}");
            assert!(purpose.columns().iter().all(|column| column.purpose == purpose), "{purpose:?}");
            let same = Purpose::ALL.into_iter().filter(|other| other.label() == purpose.label());
            assert_eq!(same.count(), 1, "{purpose:?}");
        }
        for (place, kept) in KeptKey::ALL.into_iter().enumerate() {
            assert_eq!(kept as usize, place);
            assert_eq!(SERVICES.into_iter().filter(|service| KeptKey::of(service).contains(&kept)).count(), 1);
        }
    }
}
