//! Whether a key is good: the one question that the gateway answers itself, from what it knows of credentials.
//!
//! A vendor's own API asks it for each of its calls, so an answer about a key that was seen before costs no look-up, no
//! database and no other process. The key is judged as if it called here itself: by the same authenticator, so that what
//! is revoked stops within the same second.
//!
//! Deliberately absent: why a key is not good, and whether it exists. Unknown, revoked, expired, mistyped and another
//! team's are one answer.

use std::{net::IpAddr, sync::Arc};

use async_trait::async_trait;
use paperkey_kit::{
    authn::Authenticator,
    policy::holds,
    principal::{Caller as Calling, nobody},
    token::TokenKind,
};
use paperkey_proto::{
    Contract, Error, codec,
    errors::v1::Reason,
    gateway::v1::{
        VerificationCode as Code, VerifyKeyRequest, VerifyKeyResponse,
        key_verification_service_server::KeyVerificationService,
    },
    options::v1::{Caller, Scope},
    principal::v1::{Mode, Principal},
};
use prost::Message as _;
use tonic::{Request, Response, Status};

use crate::policy::allowed_from;

/// The method that REST reaches without gRPC's framing.
pub(crate) const VERIFY_KEY: &str = "/paperkey.gateway.v1.KeyVerificationService/VerifyKey";

/// Verifies keys.
#[derive(Clone)]
pub(crate) struct Verifier {
    authenticator: Arc<dyn Authenticator>,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verifier").finish_non_exhaustive()
    }
}

impl Verifier {
    pub(crate) fn new(authenticator: Arc<dyn Authenticator>) -> Self {
        Self { authenticator }
    }

    /// Answers the bytes of a request with the bytes of an answer.
    pub(crate) async fn answer(&self, caller: Option<&Arc<Principal>>, request: &[u8]) -> Result<Vec<u8>, Error> {
        let request = codec::decode(request)?;
        let caller = caller.map_or_else(nobody, Arc::clone);
        Ok(self.verify(&caller, request).await?.encode_to_vec())
    }

    /// Answers a caller whom the policy has let pass.
    async fn verify(&self, caller: &Principal, request: VerifyKeyRequest) -> Result<VerifyKeyResponse, Error> {
        let scope = request.scope.as_deref().map(scope_of).transpose()?;
        let ip = request.ip.as_deref().map(address_of).transpose()?;
        let Some(key) = self.key(caller, &request.key).await? else { return Ok(unknown()) };
        let code = if scope.is_some_and(|scope| !holds(&key, scope)) {
            Code::ScopeInsufficient
        } else if !is_allowed_from(&key, ip) {
            Code::IpNotAllowed
        } else {
            Code::Valid
        };
        let told = |id: &String| Some(id.clone()).filter(|id| !id.is_empty());
        Ok(VerifyKeyResponse {
            valid: code == Code::Valid,
            code: code.into(),
            key_id: told(&key.id),
            team_id: told(&key.team_id),
            mode: key.mode,
            scopes: words_of(&key),
        })
    }

    /// The key behind a token, if it is a good one that the caller may know of.
    async fn key(&self, caller: &Principal, token: &str) -> Result<Option<Arc<Principal>>, Error> {
        let is_key = match TokenKind::of(token) {
            // A public key is in every copy of an app: it proves nothing about who sends it.
            None | Some(TokenKind::ProductPublic) => false,
            Some(TokenKind::System) => caller.kind() == Caller::SystemKey,
            Some(_) => true,
        };
        if !is_key {
            return Ok(None);
        }
        match self.authenticator.principal(token, None, Mode::Unspecified).await {
            Ok(key) => Ok(Some(key).filter(|key| may_know_of(caller, key))),
            Err(error) if error.reason() == Reason::InvalidCredentials => Ok(None),
            Err(error) => Err(error),
        }
    }
}

#[async_trait]
impl KeyVerificationService for Verifier {
    async fn verify_key(&self, request: Request<VerifyKeyRequest>) -> Result<Response<VerifyKeyResponse>, Status> {
        let caller = Calling::of(&request)?;
        Ok(Response::new(self.verify(&caller.principal, request.into_inner()).await?))
    }
}

/// Whether a key is of the caller's world: its team's, and never a live one in the world of test data. The installation
/// itself knows of every key.
fn may_know_of(caller: &Principal, key: &Principal) -> bool {
    caller.kind() == Caller::SystemKey
        || (!caller.team_id.is_empty()
            && caller.team_id == key.team_id
            && (caller.mode() == Mode::Live || caller.mode() == key.mode()))
}

fn is_allowed_from(key: &Principal, ip: Option<IpAddr>) -> bool {
    key.allowlist.is_empty() || ip.is_some_and(|ip| allowed_from(key, ip).is_ok())
}

fn scope_of(word: &str) -> Result<Scope, Error> {
    Contract::get()
        .scope_named(word)
        .ok_or_else(|| Error::field("scope", "must be the name of a scope, such as licenses:read"))
}

fn address_of(text: &str) -> Result<IpAddr, Error> {
    let address = text.parse::<IpAddr>().map(|address| address.to_canonical());
    address.map_err(|_| Error::field("ip", "must be an IPv4 or IPv6 address"))
}

/// What the key may do, as [`holds`] judges it.
fn words_of(key: &Principal) -> Vec<String> {
    let contract = Contract::get();
    let mut words = Vec::with_capacity(key.scopes.len());
    words.extend(key.scopes().filter(|scope| holds(key, *scope)).map(|scope| contract.scope_word(scope).to_owned()));
    words
}

fn unknown() -> VerifyKeyResponse {
    VerifyKeyResponse { code: Code::InvalidKey.into(), ..VerifyKeyResponse::default() }
}
