//! Whether a key is good: the one question that the gateway answers itself, from what it knows of credentials.
//!
//! A vendor's own API asks it for each of its calls, so an answer about a key that was seen before costs no look-up, no
//! database and no other process. The key is judged as if it called here itself: by the same authenticator, so that what
//! is revoked stops within the same second.
//!
//! A key that is verified has made a call: it counts against the key's own limit, and takes units where a meter is named.
//! A verification that refuses takes nothing.
//!
//! Deliberately absent: why a key is not good, and whether it exists. Unknown, revoked, expired, mistyped and another
//! team's are one answer.

use std::{net::IpAddr, sync::Arc};

use async_trait::async_trait;
use paperkey_kit::{
    authn::Authenticator,
    config::Tiers,
    limits::{Claim, Standing, Verdict},
    meters::{Meters, Taken},
    policy::holds,
    principal::{Caller as Calling, nobody},
    token::TokenKind,
    values::timestamp,
};
use paperkey_proto::{
    Contract, Error, codec,
    errors::v1::Reason,
    gateway::v1::{
        Quota, RateLimit, VerificationCode as Code, VerifyKeyRequest, VerifyKeyResponse,
        key_verification_service_server::KeyVerificationService,
    },
    options::v1::{Caller, Scope},
    principal::v1::{Mode, Principal},
};
use prost::Message as _;
use tonic::{Request, Response, Status};

use crate::{
    doors::{NO_METER, NO_METER_NAMED},
    limits::Limits,
    policy::allowed_from,
};

/// The method that REST reaches without gRPC's framing.
pub(crate) const VERIFY_KEY: &str = "/paperkey.gateway.v1.KeyVerificationService/VerifyKey";

/// Verifies keys.
#[derive(Clone)]
pub(crate) struct Verifier {
    authenticator: Arc<dyn Authenticator>,
    limits: Limits,
    meters: Meters,
    tiers: Arc<Tiers>,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Verifier").finish_non_exhaustive()
    }
}

impl Verifier {
    pub(crate) fn new(
        authenticator: Arc<dyn Authenticator>,
        limits: Limits,
        meters: Meters,
        tiers: &Arc<Tiers>,
    ) -> Self {
        Self { authenticator, limits, meters, tiers: Arc::clone(tiers) }
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
        let meter = self.meter(caller, &request)?;
        let Some(key) = self.key(caller, &request.key).await? else { return Ok(unknown()) };
        let claim = self.limits.of_key(&key);
        let mut told = told_of(&key);
        if scope.is_some_and(|scope| !holds(&key, scope)) {
            told.code = Code::ScopeInsufficient.into();
        } else if !is_allowed_from(&key, ip) {
            told.code = Code::IpNotAllowed.into();
        } else {
            return self.count(&key, claim, meter, told).await;
        }
        told.ratelimit = Some(self.standing(&self.limits.standing(&claim).await));
        Ok(told)
    }

    /// Counts the call that a good key makes, all or nothing.
    async fn count(
        &self,
        key: &Principal,
        claim: Claim,
        meter: Option<(&str, i64)>,
        mut told: VerifyKeyResponse,
    ) -> Result<VerifyKeyResponse, Error> {
        let receipt = match self.limits.check(claim).await {
            Verdict::Passed(receipt) => receipt,
            Verdict::Refused(refused) => {
                told.ratelimit = refused.standings.first().map(|standing| self.standing(standing));
                told.code = Code::RateLimited.into();
                return Ok(told);
            }
        };
        told.ratelimit = receipt.standings.first().map(|standing| self.standing(standing));
        if let Some((meter, cost)) = meter.filter(|_| !key.team_id.is_empty()) {
            let taken = match self.meters.take(key, meter, cost).await {
                Ok(taken) => taken,
                Err(error) => {
                    self.limits.take_back(&receipt).await;
                    return Err(error);
                }
            };
            told.quota = Some(quota(meter, &taken));
            if !taken.granted {
                self.limits.take_back(&receipt).await;
                if let Some(left) = &mut told.ratelimit {
                    left.remaining += 1;
                }
                told.code = Code::QuotaExceeded.into();
                return Ok(told);
            }
        }
        told.code = Code::Valid.into();
        told.valid = true;
        Ok(told)
    }

    /// The meter that the caller names, and how many units.
    fn meter<'r>(&self, caller: &Principal, request: &'r VerifyKeyRequest) -> Result<Option<(&'r str, i64)>, Error> {
        let Some(meter) = request.meter.as_deref() else {
            return match request.cost {
                Some(_) => Err(Error::field("cost", NO_METER_NAMED)),
                None => Ok(None),
            };
        };
        if !self.tiers.has_meter(meter) {
            return Err(Error::field("meter", NO_METER));
        }
        let cost = request.cost.unwrap_or(1);
        if cost > 0 && !holds(caller, Scope::MetersConsume) {
            let message = "To take units this call needs the scope meters:consume";
            return Err(Error::new(Reason::ScopeInsufficient).with_message(message));
        }
        Ok(Some((meter, cost)))
    }

    fn standing(&self, standing: &Standing) -> RateLimit {
        RateLimit {
            limit: standing.requests.into(),
            remaining: standing.remaining.into(),
            resets_at: Some(timestamp(self.limits.resets_at_ms(standing))),
        }
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

/// What the caller is told of a key that it may know of.
fn told_of(key: &Principal) -> VerifyKeyResponse {
    let told = |id: &String| Some(id.clone()).filter(|id| !id.is_empty());
    VerifyKeyResponse {
        key_id: told(&key.id),
        team_id: told(&key.team_id),
        mode: key.mode,
        scopes: words_of(key),
        ..VerifyKeyResponse::default()
    }
}

fn quota(meter: &str, taken: &Taken) -> Quota {
    Quota {
        meter: meter.to_owned(),
        used: taken.used,
        limit: taken.limit,
        remaining: taken.limit.map(|limit| (limit - taken.used).max(0)),
        resets_at: Some(timestamp(taken.resets_at_ms)),
    }
}

fn unknown() -> VerifyKeyResponse {
    VerifyKeyResponse { code: Code::InvalidKey.into(), ..VerifyKeyResponse::default() }
}
