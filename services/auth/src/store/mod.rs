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

pub(crate) use paperkey_kit::store::Act;
use paperkey_kit::{
    cache::Epochs,
    db::{Database, Tx},
    principal::Tenant,
    secrets::{KeyedHash, Keyring, Secret},
};

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

/// Why a job of the store ended without a result.
pub(crate) type Failure = paperkey_kit::store::Failure<Fault>;

impl paperkey_kit::store::Fault for Fault {}
