//! The only place with sea-orm.
//!
//! Accounts, teams and credentials are found by what names them in the whole installation; the data of a tenant is
//! reached through [`Store::of`] only, so that a query without team and mode cannot be written. Each method that
//! changes something is one transaction, which also holds its audit entry and its announcement.

mod accounts;
mod alerts;
mod audit;
mod credentials;
mod entities;
mod keys;
mod mails;
mod members;
mod own_keys;
mod passwords;
mod product_keys;
mod queue;
mod quotas;
mod slack;
mod system_key;
mod teams;
mod upkeep;
mod watch;

use std::sync::{Arc, atomic::AtomicI64};

pub(crate) use paperkey_kit::store::Act;
use paperkey_kit::{
    cache::Epochs,
    clock::Clock,
    db::{Database, Engine, Tx},
    events::EventOutbox,
    principal::Tenant,
    secrets::{KeyedHash, Keyring, Secret},
};

use crate::{
    domain::{Fault, audit::chain::ChainKey},
    revoked::RevokedUses,
};

use mails::Outgoing;
use slack::Posts;

pub(crate) use accounts::{NewAccount, PasswordHash};
pub(crate) use audit::{Chained, Head, StoredBlock, Stretch, Window};
pub(crate) use credentials::{FoundKey, FoundTeam, PairHalf};
pub(crate) use keys::{MadeKey, RotatedKey};
pub(crate) use mails::ClaimedMail;
pub(crate) use members::{Actor, NewInvitation};
pub(crate) use own_keys::KeyAtHome;
pub(crate) use passwords::{AccountChanges, NewPassword};
pub(crate) use product_keys::TenantStore;
pub(crate) use quotas::FORGOTTEN_A_STEP;
pub(crate) use slack::ClaimedPost;
pub(crate) use system_key::Before;
pub(crate) use upkeep::STEP;
pub(crate) use watch::Usage;

/// The data of the auth service.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    database: Database,
    hasher: KeyedHash,
    previous_hasher: Option<KeyedHash>,
    epochs: Arc<Epochs>,
    outbox: EventOutbox,
    outgoing: Outgoing,
    posts: Posts,
    revoked_uses: RevokedUses,
    /// The hour of which this process knows that no more addresses are told of.
    crowded_hour: Arc<AtomicI64>,
    /// Under which failed logins of an address are counted.
    failures: KeyedHash,
    chain: ChainKey,
}

impl Store {
    /// The data in that database.
    pub(crate) fn new(database: Database, keys: &Keyring, epochs: Arc<Epochs>) -> Self {
        let outbox = EventOutbox::new(keys, database.clock().clone());
        let (hasher, previous_hasher) = (keys.token_hasher(), keys.previous_token_hasher());
        let outgoing = Outgoing::new(keys, database.clock().clone());
        let posts = Posts::new(keys, database.clock().clone());
        let revoked_uses = RevokedUses::new(database.clock().clone());
        let failures = keys.hasher("login-failures/v1");
        let chain = ChainKey::new(keys);
        Self {
            database,
            hasher,
            previous_hasher,
            epochs,
            outbox,
            outgoing,
            posts,
            revoked_uses,
            crowded_hour: Arc::new(AtomicI64::new(i64::MIN)),
            failures,
            chain,
        }
    }

    /// Revoked keys that were tried.
    pub(crate) fn revoked_uses(&self) -> &RevokedUses {
        &self.revoked_uses
    }

    /// What others must learn of.
    pub(crate) fn outbox(&self) -> &EventOutbox {
        &self.outbox
    }

    /// The time.
    pub(crate) fn clock(&self) -> &Clock {
        self.database.clock()
    }

    /// Which engine stands behind it.
    pub(crate) fn engine(&self) -> Engine {
        self.database.engine()
    }

    /// What the audit log is chained by.
    pub(crate) fn chain_key(&self) -> &ChainKey {
        &self.chain
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
