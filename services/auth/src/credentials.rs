//! Whose a credential is.
//!
//! Every refusal of the credential itself is the one same error, so that nobody learns whether a key exists, existed
//! or was mistyped. What has not the form of a credential is refused without asking the database.

use std::sync::Arc;

use paperkey_kit::{clock::Clock, secrets::Secret, token::TokenKind};
use paperkey_proto::{
    Error,
    options::v1::{Caller, Scope},
    principal::v1::{Mode, Principal},
};

use crate::{
    domain::{
        Fault,
        api_key::ApiKey,
        could_be_id,
        key::{KeyKind, PUBLIC_KEY_SCOPES, SECRET_KEY_SCOPES},
        session::Sessions,
    },
    store::{FoundKey, FoundTeam, PairHalf, Store},
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
                Some(kind) => self.team_key(&credential, kind).await,
                None => Err(Error::unauthenticated()),
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
            principal.team_requests_per_minute = limit(team.requests_per_minute);
        }
        Ok(principal)
    }

    async fn team_key(&self, credential: &Secret, kind: KeyKind) -> Result<Principal, Error> {
        let found = self.store.key_by_token(credential, kind, self.clock.now_ms()).await?;
        let FoundKey { key, team, role } = found.ok_or_else(Error::unauthenticated)?;
        let team = team.ok_or_else(Error::unauthenticated)?;
        let mut principal = of_key(key, kind);
        if kind == KeyKind::User {
            principal.role = role.into();
            principal.subjects.push(format!("user:{}", principal.user_id));
        }
        principal.subjects.push(format!("team:{}", team.id));
        // What is cached must not outlive the sandbox.
        principal.expires_at_ms = earlier(principal.expires_at_ms, &team);
        principal.team_id = team.id;
        principal.tier = team.tier;
        principal.team_requests_per_minute = limit(team.requests_per_minute);
        Ok(principal)
    }

    /// The installation's own key belongs to no team; a call may name one to act on.
    async fn system_key(&self, credential: &Secret, kind: KeyKind, named: Named) -> Result<Principal, Error> {
        let found = self.store.key_by_token(credential, kind, self.clock.now_ms()).await?;
        let key = found.ok_or_else(Error::unauthenticated)?.key;
        let mut principal = Principal { mode: Mode::Unspecified.into(), ..of_key(key, kind) };
        if let Some(team_id) = named.team_id {
            let team = if could_be_id(&team_id) { self.store.team_at_work(&team_id).await? } else { None };
            let team = team.ok_or(Fault::NoSuchTeam)?;
            principal.tier = team.tier;
            principal.team_requests_per_minute = limit(team.requests_per_minute);
            principal.mode = live_where_unspecified(named.mode).into();
            principal.subjects.push(format!("team:{team_id}"));
            principal.team_id = team_id;
        }
        Ok(principal)
    }

    async fn pair(&self, credential: &Secret, half: PairHalf) -> Result<Principal, Error> {
        let pair = self.store.pair_by_token(credential, half, self.clock.now_ms()).await?;
        let pair = pair.ok_or_else(Error::unauthenticated)?;
        let (kind, scopes, name) = match half {
            PairHalf::Public => (Caller::ProductPublicKey, PUBLIC_KEY_SCOPES.as_slice(), "Product public key"),
            PairHalf::Secret => (Caller::ProductSecretKey, SECRET_KEY_SCOPES.as_slice(), "Product secret key"),
        };
        Ok(Principal {
            kind: kind.into(),
            name: name.to_owned(),
            product_id: pair.product_id,
            scopes: numbers(scopes),
            subjects: vec![format!("key:{}", pair.id), format!("team:{}", pair.team.id)],
            id: pair.id,
            mode: pair.tenant.mode.into(),
            team_id: pair.tenant.team_id,
            expires_at_ms: earlier(0, &pair.team),
            team_requests_per_minute: limit(pair.team.requests_per_minute),
            tier: pair.team.tier,
            ..Principal::default()
        })
    }
}

/// What the key alone says of its holder.
fn of_key(key: ApiKey, kind: KeyKind) -> Principal {
    let terms = key.terms;
    Principal {
        kind: kind.caller().into(),
        name: terms.name,
        user_id: terms.user_id.unwrap_or_default(),
        mode: key.mode.into(),
        scopes: numbers(&terms.scopes),
        read_only: terms.read_only,
        expires_at_ms: terms.expires_at_ms.unwrap_or(0),
        subjects: vec![format!("key:{}", key.id)],
        allowlist: terms.allowlist.texts(),
        requests_per_minute: limit(terms.requests_per_minute),
        rotation_due_at_ms: key.rotation_due_at_ms.unwrap_or(0),
        superseded: key.superseded_by.is_some(),
        lineage: key.lineage.unwrap_or_default(),
        id: key.id,
        ..Principal::default()
    }
}

/// A limit as a principal carries it, where 0 is none.
fn limit(requests_per_minute: Option<i64>) -> i32 {
    requests_per_minute.and_then(|limit| i32::try_from(limit).ok()).unwrap_or(0)
}

/// The earlier of two ends, of which 0 is none.
fn earlier(expires_at_ms: i64, team: &FoundTeam) -> i64 {
    match team.expires_at_ms {
        Some(team_ms) if expires_at_ms == 0 || team_ms < expires_at_ms => team_ms,
        _ => expires_at_ms,
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
