//! What the installation's command line does to accounts, teams and the system key.
//!
//! It works on the database and asks no process: the operator who holds the data folder or the database's password
//! needs no further permission. Running gateways learn of each change by the feed.

use std::sync::Arc;

use paperkey_kit::{cache::Epochs, clock::Clock, db::Database, ids::new_id, secrets::Keyring, secrets::Secret};
use paperkey_proto::Error;

use crate::{
    accounts::{Accounts, Registration},
    domain::{Fault, could_be_id, key::NewKey, session::Sessions, team::Tier},
    passwords::Passwords,
    store::{Act, Store},
};

/// The hand of the operator.
#[derive(Clone, Debug)]
pub struct Admin {
    store: Store,
    accounts: Accounts,
    clock: Clock,
}

/// An account that the operator has made. The keys are shown once.
#[derive(Debug)]
pub struct CreatedAccount {
    /// `usr_…`
    pub user_id: String,
    /// `team_…`: the account's first team.
    pub team_id: String,
    /// `pk_free_…`
    pub free_key: Secret,
    /// `pb_live_…`
    pub live_key: Secret,
}

impl Admin {
    /// Works on that database. `epochs` are those of the process, if it also serves; else `Arc::default()`.
    pub fn new(database: Database, keys: &Keyring, epochs: Arc<Epochs>) -> Result<Self, Error> {
        let clock = database.clock().clone();
        let store = Store::new(database, keys, epochs);
        let sessions = Arc::new(Sessions::new(keys.signing_seed()).map_err(Error::internal)?);
        let accounts = Accounts::new(store.clone(), Arc::new(Passwords::default()), sessions, clock.clone());
        Ok(Self { store, accounts, clock })
    }

    /// Makes an account with its first team and keys, also where registration is closed.
    pub async fn create_account(
        &self,
        email: &str,
        password: Secret,
        name: Option<&str>,
    ) -> Result<CreatedAccount, Error> {
        let registration = Registration { email: email.to_owned(), password, name: name.map(str::to_owned) };
        let welcome = self.accounts.register(registration, Act::by_operator("admin/create-account")).await?;
        Ok(CreatedAccount {
            user_id: welcome.account.id,
            team_id: welcome.team.id,
            free_key: welcome.free_key,
            live_key: welcome.live_key,
        })
    }

    /// Sets a new password and ends every session of the account.
    pub async fn reset_password(&self, email: &str, new_password: Secret) -> Result<(), Error> {
        self.accounts.reset_password(email, new_password, Act::by_operator("admin/reset-password")).await
    }

    /// Puts a team on a tier: `free`, `starter`, `builder`, `pro` or `scale`.
    pub async fn set_tier(&self, team_id: &str, tier: &str) -> Result<(), Error> {
        let tier = Tier::parse(tier)?;
        if !could_be_id(team_id) {
            return Err(Fault::NoSuchTeam.into());
        }
        self.store.set_tier(team_id.to_owned(), tier, Act::by_operator("admin/set-tier")).await
    }

    /// Makes the system key if there is none, and answers it; `None` if there is one, whose token nobody knows. With
    /// `rotate`, the one there is ends at once and a new one is answered.
    pub async fn system_key(&self, rotate: bool) -> Result<Option<Secret>, Error> {
        let key = NewKey::system(new_id("key", &self.clock));
        let token = key.token.clone();
        let stored = self.store.put_system_key(key, rotate, Act::by_operator("admin/system-key")).await?;
        Ok(stored.then_some(token))
    }

    /// For the start of a process that serves: the new system key at the first start of the installation, `None`
    /// ever after. However many processes start at once, one of them gets it.
    pub async fn ensure_system_key(&self) -> Result<Option<Secret>, Error> {
        self.system_key(false).await
    }
}
