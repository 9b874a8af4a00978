//! The only place with sea-orm.
//!
//! Accounts, teams and credentials are found by what names them in the whole installation; the data of a tenant is
//! reached through [`Store::of`] only, so that a query without team and mode cannot be written. Each method that
//! changes something is one transaction, which also holds its audit entry and its announcement.

mod accounts;
mod credentials;
mod entities;
mod product_keys;

use std::sync::Arc;

use paperkey_kit::{
    cache::Epochs,
    db::{AuditEntry, Database, DbError, Tx},
    principal::{Caller, Tenant},
    secrets::{KeyedHash, Keyring, Secret},
};
use paperkey_proto::Error;
use sea_orm::DbErr;

use crate::domain::Fault;

pub(crate) use accounts::{NewAccount, PasswordHash};
pub(crate) use credentials::PairHalf;
pub(crate) use product_keys::TenantStore;

/// The data of the auth service.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    database: Database,
    hasher: KeyedHash,
    epochs: Arc<Epochs>,
}

impl Store {
    /// The data in that database.
    pub(crate) fn new(database: Database, keys: &Keyring, epochs: Arc<Epochs>) -> Self {
        Self { database, hasher: keys.token_hasher(), epochs }
    }

    /// The data of one tenant.
    pub(crate) fn of(&self, tenant: Tenant) -> TenantStore {
        TenantStore::new(self.clone(), tenant)
    }

    /// Under which a token is stored and found.
    fn hash(&self, token: &Secret) -> Vec<u8> {
        self.hasher.hash(token.expose().as_bytes()).to_vec()
    }
}

/// Tells everyone who may have cached something of the subject: this process as soon as the change is durable,
/// others by the feed.
fn announce(tx: &Tx, epochs: &Arc<Epochs>, subject: String) {
    tx.changed(subject.clone());
    let epochs = Arc::clone(epochs);
    tx.after_commit(move || epochs.bump(&subject));
}

/// Who changes something, by which call, for the audit log.
#[derive(Clone, Debug)]
pub(crate) struct Act {
    actor_kind: String,
    actor_id: String,
    action: &'static str,
    request_id: String,
}

impl Act {
    /// A caller, by the rpc of that path.
    pub(crate) fn by(caller: &Caller, action: &'static str) -> Self {
        let kind = caller.principal.kind().as_str_name().trim_start_matches("CALLER_").to_ascii_lowercase();
        let (actor_id, request_id) = (caller.principal.id.clone(), caller.request_id.clone());
        Self { actor_kind: kind, actor_id, action, request_id }
    }

    /// Whoever sits at the installation's command line.
    pub(crate) fn by_operator(action: &'static str) -> Self {
        Self { actor_kind: "operator".to_owned(), actor_id: String::new(), action, request_id: String::new() }
    }

    /// The same act, of the account that it has just made.
    #[must_use]
    pub(crate) fn or_by_account(mut self, user_id: &str) -> Self {
        if self.actor_id.is_empty() && self.actor_kind == "anyone" {
            "account".clone_into(&mut self.actor_kind);
            user_id.clone_into(&mut self.actor_id);
        }
        self
    }

    fn on(&self, resources: Vec<String>) -> AuditEntry {
        AuditEntry {
            actor_kind: self.actor_kind.clone(),
            actor_id: self.actor_id.clone(),
            action: self.action.to_owned(),
            resources,
            request_id: self.request_id.clone(),
        }
    }
}

/// Why a job of the store ended without a result.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The domain refuses.
    Fault(Fault),
    /// The database failed.
    Database(DbError),
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<DbError> for Failure {
    fn from(error: DbError) -> Self {
        Self::Database(error)
    }
}

impl From<DbErr> for Failure {
    fn from(error: DbErr) -> Self {
        Self::Database(error.into())
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Fault(fault) => fault.into(),
            Failure::Database(error) => error.into(),
        }
    }
}
