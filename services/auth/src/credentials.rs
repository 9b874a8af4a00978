//! Whose a credential is.
//!
//! Every refusal of the credential itself is the one same error, so that nobody learns whether a key exists, existed
//! or was mistyped. What has not the form of a credential is refused without asking the database.

use std::sync::Arc;

use paperkey_kit::{clock::Clock, principal::Tenant, secrets::Secret, token::TokenKind};
use paperkey_proto::{
    Error,
    options::v1::{Caller, Scope},
    principal::v1::{Mode, Principal},
};

use crate::{
    domain::{
        Fault, could_be_id,
        key::{KeyKind, PUBLIC_KEY_SCOPES, SECRET_KEY_SCOPES},
        session::Sessions,
    },
    store::{PairHalf, Store},
};

/// Judges credentials.
#[derive(Clone, Debug)]
pub(crate) struct Credentials {
    store: Store,
    sessions: Arc<Sessions>,
    clock: Clock,
}

/// The team and mode that a call names, for credentials that belong to none.
#[derive(Clone, Debug)]
pub(crate) struct Named {
    pub(crate) team_id: Option<String>,
    pub(crate) mode: Mode,
}

impl Credentials {
    pub(crate) fn new(store: Store, sessions: Arc<Sessions>, clock: Clock) -> Self {
        Self { store, sessions, clock }
    }

    /// The principal behind a credential.
    pub(crate) async fn authenticate(&self, credential: Secret, named: Named) -> Result<Principal, Error> {
        match TokenKind::of(credential.expose()) {
            None => self.account(&credential, named).await,
            Some(TokenKind::ProductPublic) => self.pair(&credential, PairHalf::Public).await,
            Some(TokenKind::ProductSecret) => self.pair(&credential, PairHalf::Secret).await,
            Some(token) => match KeyKind::of(token) {
                Some(kind @ KeyKind::System) => self.system_key(&credential, kind, named).await,
                // What a user's token may do depends on the user's role, which nothing here looks up yet.
                Some(KeyKind::User) | None => Err(Error::unauthenticated()),
                Some(kind) => self.team_key(&credential, kind).await,
            },
        }
    }

    async fn account(&self, credential: &Secret, named: Named) -> Result<Principal, Error> {
        let session =
            self.sessions.verify(credential.expose(), self.clock.now_ms()).ok_or_else(Error::unauthenticated)?;
        let asked = named.team_id.as_deref();
        let standing = match asked {
            // Not an id, so nobody's; but the session comes first.
            Some(team_id) if !could_be_id(team_id) => {
                self.store.standing(&session.user_id, None).await?.map(|standing| (standing.account, None))
            }
            asked => {
                self.store.standing(&session.user_id, asked).await?.map(|standing| (standing.account, standing.team))
            }
        };
        let (account, team) = standing
            .filter(|(account, _)| account.session_epoch == session.epoch)
            .ok_or_else(Error::unauthenticated)?;
        if asked.is_some() && team.is_none() {
            return Err(Fault::NoSuchTeam.into());
        }
        let mut principal = Principal {
            kind: Caller::Account.into(),
            id: account.id.clone(),
            name: account.email,
            mode: live_where_unspecified(named.mode).into(),
            expires_at_ms: session.expires_at_ms,
            subjects: vec![format!("user:{}", account.id)],
            user_id: account.id,
            ..Principal::default()
        };
        if let Some(team) = team {
            principal.subjects.push(format!("team:{}", team.id));
            principal.team_id = team.id;
            principal.role = team.role.into();
            principal.tier = team.tier;
        }
        Ok(principal)
    }

    async fn team_key(&self, credential: &Secret, kind: KeyKind) -> Result<Principal, Error> {
        let key = self.store.key_by_token(credential, kind, self.clock.now_ms()).await?;
        let key = key.ok_or_else(Error::unauthenticated)?;
        let (tenant, tier) = key.team.ok_or_else(Error::unauthenticated)?;
        Ok(Principal {
            name: key.name,
            scopes: numbers(&key.scopes),
            read_only: key.read_only,
            expires_at_ms: key.expires_at_ms.unwrap_or(0),
            ..of_tenant(kind.caller(), key.id, tenant, tier)
        })
    }

    /// The installation's own key belongs to no team; a call may name one to act on.
    async fn system_key(&self, credential: &Secret, kind: KeyKind, named: Named) -> Result<Principal, Error> {
        let key = self.store.key_by_token(credential, kind, self.clock.now_ms()).await?;
        let key = key.ok_or_else(Error::unauthenticated)?;
        let mut principal = Principal {
            kind: kind.caller().into(),
            name: key.name,
            scopes: numbers(&key.scopes),
            read_only: key.read_only,
            expires_at_ms: key.expires_at_ms.unwrap_or(0),
            subjects: vec![format!("key:{}", key.id)],
            id: key.id,
            ..Principal::default()
        };
        if let Some(team_id) = named.team_id {
            let tier = if could_be_id(&team_id) { self.store.tier_of(&team_id).await? } else { None };
            principal.tier = tier.ok_or(Fault::NoSuchTeam)?;
            principal.mode = live_where_unspecified(named.mode).into();
            principal.subjects.push(format!("team:{team_id}"));
            principal.team_id = team_id;
        }
        Ok(principal)
    }

    async fn pair(&self, credential: &Secret, half: PairHalf) -> Result<Principal, Error> {
        let pair = self.store.pair_by_token(credential, half).await?.ok_or_else(Error::unauthenticated)?;
        let (kind, scopes, name) = match half {
            PairHalf::Public => (Caller::ProductPublicKey, PUBLIC_KEY_SCOPES.as_slice(), "Product public key"),
            PairHalf::Secret => (Caller::ProductSecretKey, SECRET_KEY_SCOPES.as_slice(), "Product secret key"),
        };
        Ok(Principal {
            name: name.to_owned(),
            product_id: pair.product_id,
            scopes: numbers(scopes),
            ..of_tenant(kind, pair.id, pair.tenant, pair.tier)
        })
    }
}

fn of_tenant(kind: Caller, id: String, tenant: Tenant, tier: String) -> Principal {
    Principal {
        kind: kind.into(),
        subjects: vec![format!("key:{id}"), format!("team:{}", tenant.team_id)],
        id,
        mode: tenant.mode.into(),
        team_id: tenant.team_id,
        tier,
        ..Principal::default()
    }
}

fn numbers(scopes: &[Scope]) -> Vec<i32> {
    scopes.iter().map(|scope| (*scope).into()).collect()
}

fn live_where_unspecified(mode: Mode) -> Mode {
    match mode {
        Mode::Test => Mode::Test,
        Mode::Live | Mode::Unspecified => Mode::Live,
    }
}
