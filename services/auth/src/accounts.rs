//! Signing up and signing in, and what becomes of names and passwords.

use std::sync::Arc;

use paperkey_kit::{clock::Clock, ids::new_id, secrets::Secret};
use paperkey_proto::{Error, errors::v1::Reason};

use crate::{
    domain::{
        Fault,
        account::{Account, Email, check_password, counted_as, first_team_name, person_name},
        key::NewKey,
        session::Sessions,
        team::MemberTeam,
        ticket::{could_be_ticket, link, new_ticket},
    },
    passwords::Passwords,
    store::{AccountChanges, Act, NewAccount, NewPassword, PasswordHash, Store},
};

/// Accounts, as their owners use them.
#[derive(Clone, Debug)]
pub(crate) struct Accounts {
    store: Store,
    passwords: Arc<Passwords>,
    sessions: Arc<Sessions>,
    clock: Clock,
    /// Where people reach the installation: mailed links begin with it.
    public_url: String,
}

/// What a person asks for who signs up.
#[derive(Debug)]
pub(crate) struct Registration {
    pub(crate) email: String,
    pub(crate) password: Secret,
    pub(crate) name: Option<String>,
}

/// What that person gets, of which the tokens are shown once.
#[derive(Debug)]
pub(crate) struct Welcome {
    pub(crate) account: Account,
    pub(crate) team: MemberTeam,
    pub(crate) free_key: Secret,
    pub(crate) live_key: Secret,
}

/// What is to change in an account: `None` leaves it.
#[derive(Debug, Default)]
pub(crate) struct Wish {
    pub(crate) name: Option<Option<String>>,
    pub(crate) password: Option<Secret>,
    /// The one there is, without which there is no new one.
    pub(crate) current_password: Option<Secret>,
}

impl Accounts {
    pub(crate) fn new(
        store: Store,
        passwords: Arc<Passwords>,
        sessions: Arc<Sessions>,
        clock: Clock,
        public_url: String,
    ) -> Self {
        Self { store, passwords, sessions, clock, public_url }
    }

    /// Makes an account with its first team and keys.
    pub(crate) async fn register(&self, registration: Registration, act: Act) -> Result<Welcome, Error> {
        let email = Email::parse(&registration.email)?;
        let name = person_name(registration.name.as_deref())?;
        check_password(&registration.password)?;
        let password_hash = PasswordHash(self.passwords.hash(registration.password).await?);
        let free = NewKey::free(new_id("key", &self.clock), self.clock.now_ms());
        let live = NewKey::first_live(new_id("key", &self.clock));
        let (free_key, live_key) = (free.token.clone(), live.token.clone());
        let new = NewAccount {
            user_id: new_id("usr", &self.clock),
            team_id: new_id("team", &self.clock),
            team_name: first_team_name(name.as_deref(), &email),
            email,
            name,
            password_hash,
            keys: vec![free, live],
        };
        let registered = self.store.register(new, act).await?;
        Ok(Welcome { account: registered.account, team: registered.team, free_key, live_key })
    }

    /// The account of an email and its password. An email that has none takes as long to be refused.
    pub(crate) async fn sign_in(&self, email: &str, password: Secret) -> Result<Account, Error> {
        let counted_as = counted_as(email);
        self.store.count_login(&counted_as).await?;
        let found = match Email::parse(email) {
            Ok(email) => self.store.account_by_email(&email.lower).await?,
            Err(_) => None,
        };
        let (account, hash) = found.unzip();
        let fits = self.fits(&counted_as, password, hash).await?;
        account.filter(|_| fits).ok_or_else(|| Fault::WrongEmailOrPassword.into())
    }

    /// Whether a password is the one of that hash, for a login that is counted already.
    async fn fits(&self, counted_as: &str, password: Secret, hash: Option<PasswordHash>) -> Result<bool, Error> {
        match self.passwords.verify(password, hash.map(|hash| hash.0)).await {
            Ok(true) => {
                self.store.forgive_logins(counted_as).await?;
                Ok(true)
            }
            Ok(false) => Ok(false),
            Err(error) => {
                // Nobody has looked, so nobody has failed.
                if error.reason() == Reason::Unavailable {
                    self.store.uncount_login(counted_as).await?;
                }
                Err(error)
            }
        }
    }

    /// A session of an account.
    pub(crate) fn session(&self, account: &Account) -> Secret {
        let token_id = new_id("ses", &self.clock);
        self.sessions.issue(&account.id, account.session_epoch, token_id, self.clock.now_ms())
    }

    /// An account and its teams, oldest first.
    pub(crate) async fn me(&self, user_id: &str) -> Result<(Account, Vec<MemberTeam>), Error> {
        self.store.account_and_teams(user_id).await?.ok_or_else(|| Fault::NoSuchAccount.into())
    }

    /// Changes the name, or, with the present one, the password of an account.
    pub(crate) async fn change(&self, user_id: &str, wish: Wish, act: Act) -> Result<Account, Error> {
        let name = wish.name.map(|name| person_name(name.as_deref())).transpose()?;
        let password = match wish.password {
            None => None,
            Some(password) => {
                check_password(&password)?;
                let needed = || Error::field("current_password", "is needed to change the password");
                let current = wish.current_password.ok_or_else(needed)?;
                let found = self.store.account_by_id(user_id).await?;
                let (account, present) = found.ok_or(Fault::NoSuchAccount)?;
                let counted_as = counted_as(&account.email);
                self.store.count_login(&counted_as).await?;
                if !self.fits(&counted_as, current, Some(present)).await? {
                    return Err(Fault::WrongCurrentPassword.into());
                }
                let hash = PasswordHash(self.passwords.hash(password).await?);
                Some(NewPassword { hash, epoch: account.session_epoch })
            }
        };
        self.store.change_account(user_id.to_owned(), AccountChanges { name, password }, act).await
    }

    /// Ends every session of an account.
    pub(crate) async fn sign_out(&self, user_id: &str, act: Act) -> Result<(), Error> {
        self.store.sign_out(user_id.to_owned(), act).await
    }

    /// Has a link mailed to whoever has this address. Nothing tells whether anyone does.
    pub(crate) async fn forgot_password(&self, email: &str, act: Act) -> Result<(), Error> {
        // What is no address is nobody's, like the empty one; the work is the same.
        let email_lower = Email::parse(email).map(|email| email.lower).unwrap_or_default();
        let ticket = new_ticket();
        let link = link(&self.public_url, "reset-password", &ticket);
        self.store.forgot_password(email_lower, &ticket, link, act).await
    }

    /// Sets a new password by a mailed link and ends every session.
    pub(crate) async fn use_reset(&self, ticket: Secret, password: Secret, act: Act) -> Result<(), Error> {
        check_password(&password)?;
        // Hashing is what an attacker would have us do; it takes a good link.
        if !could_be_ticket(ticket.expose()) || !self.store.is_reset_good(&ticket).await? {
            return Err(Fault::BadResetToken.into());
        }
        let hash = PasswordHash(self.passwords.hash(password).await?);
        self.store.use_reset(&ticket, hash, act).await
    }

    /// Sets a new password and ends every session.
    pub(crate) async fn reset_password(&self, email: &str, password: Secret, act: Act) -> Result<(), Error> {
        let email = Email::parse(email)?;
        check_password(&password)?;
        let hash = PasswordHash(self.passwords.hash(password).await?);
        self.store.reset_password(email, hash, act).await
    }
}

#[cfg(test)]
mod tests {
    use paperkey_kit::{secrets::Keyring, testing::TestDb};
    use paperkey_proto::errors::v1::Reason;

    use super::*;

    async fn accounts() -> (TestDb, Accounts) {
        let db = TestDb::sqlite();
        let database = db.migrated::<paperkey_migrations::auth::Migrator>().await;
        let keys = Keyring::for_tests();
        let clock = database.clock().clone();
        let store = Store::new(database, &keys, Arc::default());
        let sessions = Arc::new(Sessions::new(keys.signing_seed()).unwrap());
        (db, Accounts::new(store, Arc::default(), sessions, clock, String::new()))
    }

    fn ada() -> Registration {
        Registration { email: "Ada@example.com".into(), password: Secret::new("correct horse"), name: None }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_unknown_email_costs_as_many_hashings_as_a_wrong_password() {
        let (_db, accounts) = accounts().await;
        accounts.register(ada(), Act::by_operator("test")).await.unwrap();
        let mut costs = Vec::new();
        for (email, password) in [
            ("ada@example.com", "wrong"),
            ("nobody@example.com", "correct horse"),
            ("no email at all", "correct horse"),
            ("\u{0}", ""),
            ("ADA@example.com", "correct horse"),
        ] {
            let before = accounts.passwords.computed();
            let outcome = accounts.sign_in(email, Secret::new(password)).await;
            costs.push(accounts.passwords.computed() - before);
            match outcome {
                Ok(account) => assert_eq!((email, account.email.as_str()), ("ADA@example.com", "Ada@example.com")),
                Err(error) => assert_eq!(
                    (error.reason(), error.message()),
                    (Reason::InvalidCredentials, "Email or password is wrong")
                ),
            }
        }
        assert_eq!(costs, [1; 5]);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nothing_here_prints_a_password_or_a_token() {
        let (_db, accounts) = accounts().await;
        let registration = ada();
        let before = format!("{registration:?} {accounts:?}");
        let welcome = accounts.register(registration, Act::by_operator("test")).await.unwrap();
        let session = accounts.session(&welcome.account);
        let me = accounts.me(&welcome.account.id).await;
        let found = accounts.store.account_by_email("ada@example.com").await;
        let printed = format!("{before} {welcome:?} {session:?} {me:?} {found:?}");
        for secret in ["correct horse", "argon2id", welcome.free_key.expose(), welcome.live_key.expose()] {
            assert!(!printed.contains(secret), "{secret}");
        }
        assert!(!printed.contains(session.expose()));
    }
}
