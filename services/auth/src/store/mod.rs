//! The only place with sea-orm.
//!
//! Accounts, teams and credentials are found by what names them in the whole installation; the data of a tenant is
//! reached through [`Store::of`] only, so that a query without team and mode cannot be written. Each method that
//! changes something is one transaction, which also holds its audit entry and its announcement.

mod accounts;
mod credentials;
mod entities;
mod keys;
mod mails;
mod members;
mod own_keys;
mod passwords;
mod product_keys;
mod system_key;
mod teams;
mod upkeep;

use std::sync::Arc;

pub(crate) use paperkey_kit::store::Act;
use paperkey_kit::{
    cache::Epochs,
    db::{Database, Tx},
    events::EventOutbox,
    principal::Tenant,
    secrets::{KeyedHash, Keyring, Secret},
};

use crate::domain::Fault;

use mails::Outgoing;

pub(crate) use accounts::{NewAccount, PasswordHash};
pub(crate) use credentials::{FoundKey, FoundTeam, PairHalf};
pub(crate) use keys::{MadeKey, RotatedKey};
pub(crate) use mails::ClaimedMail;
pub(crate) use members::{Actor, NewInvitation};
pub(crate) use own_keys::KeyAtHome;
pub(crate) use passwords::{AccountChanges, NewPassword};
pub(crate) use product_keys::TenantStore;
pub(crate) use system_key::Before;
pub(crate) use upkeep::STEP;

/// The data of the auth service.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    database: Database,
    hasher: KeyedHash,
    previous_hasher: Option<KeyedHash>,
    epochs: Arc<Epochs>,
    outbox: EventOutbox,
    outgoing: Outgoing,
    /// Under which failed logins of an address are counted.
    failures: KeyedHash,
}

impl Store {
    /// The data in that database.
    pub(crate) fn new(database: Database, keys: &Keyring, epochs: Arc<Epochs>) -> Self {
        let outbox = EventOutbox::new(keys, database.clock().clone());
        let (hasher, previous_hasher) = (keys.token_hasher(), keys.previous_token_hasher());
        let outgoing = Outgoing::new(keys, database.clock().clone());
        let failures = keys.hasher("login-failures/v1");
        Self { database, hasher, previous_hasher, epochs, outbox, outgoing, failures }
    }

    /// What others must learn of.
    pub(crate) fn outbox(&self) -> &EventOutbox {
        &self.outbox
    }

    /// The data of one tenant.
    pub(crate) fn of(&self, tenant: Tenant) -> TenantStore {
        TenantStore::new(self.clone(), tenant)
    }

    /// Under which a token is stored.
    fn hash(&self, token: &Secret) -> Vec<u8> {
        self.hasher.hash(token.expose().as_bytes()).to_vec()
    }

    /// Under which a token may be found: first as it is stored today, then as before the pepper was changed.
    fn hashes(&self, token: &Secret) -> Vec<Vec<u8>> {
        let previous = self.previous_hasher.iter().map(|hasher| hasher.hash(token.expose().as_bytes()).to_vec());
        std::iter::once(self.hash(token)).chain(previous).collect()
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
