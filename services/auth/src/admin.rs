//! What the installation's command line does to accounts, teams and the system key.
//!
//! It works on the database and asks no process: the operator who holds the data folder or the database's password
//! needs no further permission. Running gateways learn of each change by the feed.

use std::sync::Arc;

use paperkey_kit::{
    cache::Epochs,
    clock::Clock,
    config::Tiers,
    db::Database,
    ids::new_id,
    secrets::{Keyring, Secret},
    token::TokenKind,
};
use paperkey_proto::Error;

use crate::{
    accounts::{Accounts, Registration},
    domain::{Fault, api_key::ApiKey, could_be_id, key::NewKey, session::Sessions, team::tier_name},
    passwords::Passwords,
    store::{Act, Before, Store},
};

/// How old a system key gets that rotates itself.
const SYSTEM_KEY_DAYS: i64 = 90;
const DAY_MS: i64 = 24 * 60 * 60 * 1_000;

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
        // What it does mails no link.
        let accounts =
            Accounts::new(store.clone(), Arc::new(Passwords::default()), sessions, clock.clone(), String::new());
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

    /// Puts a team on one of the configured tiers.
    pub async fn set_tier(&self, tiers: &Tiers, team_id: &str, tier: &str) -> Result<(), Error> {
        let tier = tier_name(tiers, tier)?;
        if !could_be_id(team_id) {
            return Err(Fault::NoSuchTeam.into());
        }
        self.store.set_tier(team_id.to_owned(), tier, Act::by_operator("admin/set-tier")).await
    }

    /// A system key that is about to be stored. Whoever must not lose it writes it down first.
    pub fn draft_system_key(&self, rotates: Rotates) -> SystemKeyDraft {
        let days = (rotates == Rotates::Itself).then_some(SYSTEM_KEY_DAYS);
        SystemKeyDraft(NewKey::system(new_id("key", &self.clock), days))
    }

    /// Stores a system key. Says whether that was done: where there is one that stays, it is not.
    pub async fn put_system_key(&self, draft: SystemKeyDraft, existing: Existing) -> Result<bool, Error> {
        let before = match existing {
            Existing::Stays => Before::Stays,
            Existing::Overlaps => Before::Overlaps,
            Existing::Ends => Before::Ends,
        };
        self.store.put_system_key(draft.0, before, Act::by_operator("admin/system-key")).await
    }

    /// Whether that is the token of the system key that there is: neither revoked nor rotated.
    pub async fn is_system_key(&self, token: &Secret) -> Result<bool, Error> {
        if TokenKind::of(token.expose()) != Some(TokenKind::System) {
            return Ok(false);
        }
        self.store.is_current_system_key(token).await
    }

    /// What an installation that keeps its own system key should do about it now.
    pub async fn system_key_care(&self) -> Result<Care, Error> {
        let age_ms = |key: ApiKey| self.clock.now_ms().saturating_sub(key.created_at_ms);
        Ok(match self.store.current_system_key().await?.map(age_ms) {
            None => Care::Make,
            Some(age_ms) if age_ms >= SYSTEM_KEY_DAYS * DAY_MS => Care::Rotate,
            Some(_) => Care::Nothing,
        })
    }
}

/// Whether a system key is rotated by the installation, every 90 days, or by people alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotates {
    /// The installation keeps it in a file, and rotates it.
    Itself,
    /// It was printed once, and nobody could be given the next one.
    ByHand,
}

/// What becomes of the system key that there is, when another comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It stays, and the other is not stored.
    Stays,
    /// It works for 24 hours more.
    Overlaps,
    /// It ends at once, and with it those before that still work.
    Ends,
}

/// What is to be done about the system key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Care {
    /// There is one, and it is young.
    Nothing,
    /// There is none.
    Make,
    /// It is 90 days old.
    Rotate,
}

/// A system key that is not stored yet.
#[derive(Debug)]
pub struct SystemKeyDraft(NewKey);

impl SystemKeyDraft {
    /// `po_sk_…`
    pub fn token(&self) -> &Secret {
        &self.0.token
    }
}
