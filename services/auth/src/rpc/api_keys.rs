//! `ApiKeyService`: keys of teams, from the first to the last of their days.

use std::sync::Arc;

use paperkey_kit::{
    clock::Clock,
    config::Tiers,
    ids::new_id,
    principal::Caller,
    secrets::Secret,
    values::{Mask, Page, time_ms, timestamp},
};
use paperkey_proto::{
    Contract, Error,
    auth::v1::{
        ApiKey as ApiKeyMessage, ApiKeyActor, ApiKeyKind, ApiKeyLimits, ApiKeyScope, ApiKeyTeam, CreateApiKeyRequest,
        CreateApiKeyResponse, CreatePlatformApiKeyRequest, CreatePlatformApiKeyResponse, CreateTemporaryApiKeyRequest,
        CreateTemporaryApiKeyResponse, CreateTestApiKeyRequest, CreateTestApiKeyResponse, GetApiKeyRequest,
        GetApiKeyResponse, GetCurrentApiKeyRequest, GetCurrentApiKeyResponse, ListApiKeysRequest, ListApiKeysResponse,
        ReportLeakedApiKeysRequest, ReportLeakedApiKeysResponse, RevokeApiKeyRequest, RevokeApiKeyResponse,
        RotateApiKeyRequest, RotateApiKeyResponse, RotateCurrentApiKeyRequest, RotateCurrentApiKeyResponse,
        UpdateApiKeyRequest, UpdateApiKeyResponse, api_key_service_server::ApiKeyService,
    },
    options::v1::Caller as Kind,
    principal::v1::Mode,
};
use prost_types::FieldMask;
use tonic::{Request, Response, Status};

use super::known;
use crate::{
    domain::{
        Fault,
        allowlist::Allowlist,
        api_key::{
            Actor, ApiKey, Changes, Doer, Hand, Overlap, REVOKED_WITHIN_MS, Terms, Wish, future, key_name, own_limit,
            rotation_days, scopes_among,
        },
        could_be_id,
        key::{KeyKind, NewKey},
    },
    store::{Act, KeyAtHome, MadeKey, RotatedKey, Store, TenantStore},
};

const CREATE: &str = "/paperkey.auth.v1.ApiKeyService/CreateApiKey";
const CREATE_PLATFORM: &str = "/paperkey.auth.v1.ApiKeyService/CreatePlatformApiKey";
const CREATE_TEMPORARY: &str = "/paperkey.auth.v1.ApiKeyService/CreateTemporaryApiKey";
const CREATE_TEST: &str = "/paperkey.auth.v1.ApiKeyService/CreateTestApiKey";
const UPDATE: &str = "/paperkey.auth.v1.ApiKeyService/UpdateApiKey";
const ROTATE: &str = "/paperkey.auth.v1.ApiKeyService/RotateApiKey";
const ROTATE_CURRENT: &str = "/paperkey.auth.v1.ApiKeyService/RotateCurrentApiKey";
const REVOKE: &str = "/paperkey.auth.v1.ApiKeyService/RevokeApiKey";
const REPORT: &str = "/paperkey.auth.v1.ApiKeyService/ReportLeakedApiKeys";

/// What an update may name. The ids are among them, since they say which key, and are not changed.
const CHANGEABLE: [&str; 10] = [
    "team_id",
    "key_id",
    "name",
    "enabled",
    "scope",
    "scopes",
    "allowlist",
    "expires_at",
    "requests_per_minute",
    "rotate_every_days",
];

/// What a creation may name.
const GIVEN: [&str; 12] = [
    "team_id",
    "name",
    "mode",
    "type",
    "scope",
    "scopes",
    "kind",
    "user_id",
    "expires_at",
    "allowlist",
    "requests_per_minute",
    "rotate_every_days",
];

/// The handlers.
#[derive(Debug)]
pub(crate) struct Handler {
    pub(crate) store: Store,
    pub(crate) clock: Clock,
    pub(crate) tiers: Arc<Tiers>,
}

impl Handler {
    /// The caller's part of the store, if the request is for the caller's team.
    fn of<T>(&self, request: Request<T>, team_id: fn(&T) -> &str) -> Result<(Caller, TenantStore, T), Error> {
        let caller = Caller::of(&request)?;
        let store = self.store.of(caller.tenant()?);
        let request = request.into_inner();
        caller.must_be_of_team(team_id(&request))?;
        Ok((caller, store, request))
    }
}

#[tonic::async_trait]
impl ApiKeyService for Handler {
    async fn create_api_key(
        &self,
        request: Request<CreateApiKeyRequest>,
    ) -> Result<Response<CreateApiKeyResponse>, Status> {
        let (caller, store, mut request) = self.of(request, |request| &request.team_id)?;
        not_empty(request.field_mask.take(), &request.scopes)?;
        let (kind, mode, terms) = asked_for(&request, &caller, self.clock.now_ms())?;
        let now_ms = self.clock.now_ms();
        let answer = move |MadeKey { key, token }: &MadeKey| CreateApiKeyResponse {
            api_key: Some(encode(key.clone(), now_ms)),
            key: token.expose().to_owned(),
        };
        let act = Act::by(&caller, CREATE).answered_by(answer);
        let made = store.create_key(kind, mode, terms, doer(&caller), act).await?;
        Ok(Response::new(answer(&made)))
    }

    async fn create_temporary_api_key(
        &self,
        request: Request<CreateTemporaryApiKeyRequest>,
    ) -> Result<Response<CreateTemporaryApiKeyResponse>, Status> {
        let (caller, store, _) = self.of(request, |request| &request.team_id)?;
        let now_ms = self.clock.now_ms();
        let answer = move |MadeKey { key, token }: &MadeKey| CreateTemporaryApiKeyResponse {
            api_key: Some(encode(key.clone(), now_ms)),
            key: token.expose().to_owned(),
        };
        let act = Act::by(&caller, CREATE_TEMPORARY).answered_by(answer);
        // An account is called by its address.
        let made = store.create_temporary_key(caller.principal.name.clone(), doer(&caller), act).await?;
        Ok(Response::new(answer(&made)))
    }

    async fn create_platform_api_key(
        &self,
        request: Request<CreatePlatformApiKeyRequest>,
    ) -> Result<Response<CreatePlatformApiKeyResponse>, Status> {
        let (caller, store, request) = self.of(request, |_| "")?;
        if caller.principal.mode() != Mode::Live {
            return Err(Error::from(Fault::NotLive).into());
        }
        not_empty(request.field_mask, &request.scopes)?;
        let mode = defined::<Mode>("type", request.r#type)?;
        if mode == Mode::Unspecified {
            return Err(Error::field("type", "must be one of live, test").into());
        }
        let wish = Wish {
            mode,
            read_only: read_only(defined("scope", request.scope)?),
            name: key_name(&request.name)?,
            scopes: request.scopes,
            allowlist: Allowlist::parse(&request.allowlist)?,
            expires_at_ms: end_of(request.expires_at)?,
        };
        let now_ms = self.clock.now_ms();
        let answer = move |MadeKey { key, token }: &MadeKey| CreatePlatformApiKeyResponse {
            api_key: Some(encode(key.clone(), now_ms)),
            key: token.expose().to_owned(),
        };
        let act = Act::by(&caller, CREATE_PLATFORM).answered_by(answer);
        let made = store.create_platform_key(wish, doer(&caller), act).await?;
        Ok(Response::new(answer(&made)))
    }

    async fn create_test_api_key(
        &self,
        request: Request<CreateTestApiKeyRequest>,
    ) -> Result<Response<CreateTestApiKeyResponse>, Status> {
        let act = Act::by(&Caller::of(&request)?, CREATE_TEST);
        let key = NewKey::sandbox(new_id("key", &self.clock), self.clock.now_ms());
        let token = key.token.clone();
        let made = self.store.create_sandbox(new_id("team", &self.clock), key, act).await?;
        let expires_at = made.terms.expires_at_ms.map(timestamp);
        Ok(Response::new(CreateTestApiKeyResponse { key: token.expose().to_owned(), expires_at }))
    }

    async fn get_api_key(&self, request: Request<GetApiKeyRequest>) -> Result<Response<GetApiKeyResponse>, Status> {
        let (_, store, request) = self.of(request, |request| &request.team_id)?;
        let key = store.key(known(request.key_id, Fault::NoSuchKey)?).await?;
        Ok(Response::new(GetApiKeyResponse { api_key: Some(encode(key, self.clock.now_ms())) }))
    }

    async fn list_api_keys(
        &self,
        request: Request<ListApiKeysRequest>,
    ) -> Result<Response<ListApiKeysResponse>, Status> {
        let (_, store, request) = self.of(request, |request| &request.team_id)?;
        let page = Page::new(request.page_size, &request.page_token)?;
        let (keys, next_page_token) = page.cut(store.keys(&page).await?, |key| &key.id);
        let now_ms = self.clock.now_ms();
        let api_keys = keys.into_iter().map(|key| encode(key, now_ms)).collect();
        Ok(Response::new(ListApiKeysResponse { api_keys, next_page_token }))
    }

    async fn update_api_key(
        &self,
        request: Request<UpdateApiKeyRequest>,
    ) -> Result<Response<UpdateApiKeyResponse>, Status> {
        let (caller, store, mut request) = self.of(request, |request| &request.team_id)?;
        let key_id = known(std::mem::take(&mut request.key_id), Fault::NoSuchKey)?;
        let key = store.update_key(key_id, changes(request)?, doer(&caller), Act::by(&caller, UPDATE)).await?;
        Ok(Response::new(UpdateApiKeyResponse { api_key: Some(encode(key, self.clock.now_ms())) }))
    }

    async fn rotate_api_key(
        &self,
        request: Request<RotateApiKeyRequest>,
    ) -> Result<Response<RotateApiKeyResponse>, Status> {
        let (caller, store, request) = self.of(request, |request| &request.team_id)?;
        let overlap = Overlap::of_hours(request.overlap_hours)?;
        let now_ms = self.clock.now_ms();
        let answer = move |rotated: &RotatedKey| RotateApiKeyResponse {
            api_key: Some(encode(rotated.key.clone(), now_ms)),
            key: rotated.token.expose().to_owned(),
            old_key_expires_at: rotated.old_expires_at_ms.map(timestamp),
        };
        let act = Act::by(&caller, ROTATE).answered_by(answer);
        let rotated = store.rotate_key(known(request.key_id, Fault::NoSuchKey)?, overlap, doer(&caller), act).await?;
        Ok(Response::new(answer(&rotated)))
    }

    async fn rotate_current_api_key(
        &self,
        request: Request<RotateCurrentApiKeyRequest>,
    ) -> Result<Response<RotateCurrentApiKeyResponse>, Status> {
        let caller = Caller::of(&request)?;
        let overlap = Overlap::of_hours(request.into_inner().overlap_hours)?;
        let now_ms = self.clock.now_ms();
        let answer = move |rotated: &RotatedKey| RotateCurrentApiKeyResponse {
            api_key: Some(encode(rotated.key.clone(), now_ms)),
            key: rotated.token.expose().to_owned(),
            old_key_expires_at: rotated.old_expires_at_ms.map(timestamp),
        };
        let act = Act::by(&caller, ROTATE_CURRENT).answered_by(answer);
        let rotated = self.store.rotate_own_key(caller.principal.id.clone(), overlap, act).await?;
        Ok(Response::new(answer(&rotated)))
    }

    async fn revoke_api_key(
        &self,
        request: Request<RevokeApiKeyRequest>,
    ) -> Result<Response<RevokeApiKeyResponse>, Status> {
        let (caller, store, request) = self.of(request, |request| &request.team_id)?;
        let key_id = known(request.key_id, Fault::NoSuchKey)?;
        let revoked_at_ms = store.revoke_key(key_id.clone(), doer(&caller), Act::by(&caller, REVOKE)).await?;
        Ok(Response::new(RevokeApiKeyResponse {
            id: key_id,
            revoked_at: Some(timestamp(revoked_at_ms)),
            effective_by: Some(timestamp(revoked_at_ms.saturating_add(REVOKED_WITHIN_MS))),
        }))
    }

    async fn get_current_api_key(
        &self,
        request: Request<GetCurrentApiKeyRequest>,
    ) -> Result<Response<GetCurrentApiKeyResponse>, Status> {
        let caller = Caller::of(&request)?;
        let KeyAtHome { key, team } = self.store.key_at_home(caller.principal.id.clone()).await?;
        let teams_limit = team.as_ref().map(|team| {
            let tiers_limit = self.tiers.of_team(&team.tier).requests_per_minute;
            team.requests_per_minute.unwrap_or_else(|| tiers_limit.into())
        });
        // A key may have less than its team, and never more.
        let limit = [key.terms.requests_per_minute, teams_limit].into_iter().flatten().min();
        Ok(Response::new(GetCurrentApiKeyResponse {
            api_key: Some(encode(key, self.clock.now_ms())),
            team: team.map(|team| ApiKeyTeam { id: team.id, name: team.name, tier: team.tier }),
            limits: Some(ApiKeyLimits { requests_per_minute: limit.and_then(small) }),
        }))
    }

    async fn report_leaked_api_keys(
        &self,
        request: Request<ReportLeakedApiKeysRequest>,
    ) -> Result<Response<ReportLeakedApiKeysResponse>, Status> {
        let act = Act::by(&Caller::of(&request)?, REPORT);
        let tokens: Vec<Secret> = request.into_inner().tokens.into_iter().map(Secret::new).collect();
        let received = i32::try_from(tokens.len()).unwrap_or(i32::MAX);
        self.store.report_leaks(tokens, act).await?;
        Ok(Response::new(ReportLeakedApiKeysResponse { received }))
    }
}

/// Who calls, as far as keys are concerned.
fn doer(caller: &Caller) -> Doer {
    let principal = &caller.principal;
    let person = || (principal.user_id.clone(), principal.role());
    let hand = match principal.kind() {
        Kind::Account => {
            let (user_id, role) = person();
            Hand::Member { user_id, role }
        }
        Kind::UserToken => {
            let (user_id, role) = person();
            Hand::Token { user_id, role }
        }
        Kind::SystemKey => Hand::System,
        _ => Hand::Key,
    };
    Doer { id: principal.id.clone(), name: principal.name.clone(), hand }
}

/// The key that a person asks for.
fn asked_for(request: &CreateApiKeyRequest, caller: &Caller, now_ms: i64) -> Result<(KeyKind, Mode, Terms), Error> {
    let name = key_name(&request.name)?;
    let kind = match defined("kind", request.kind)? {
        ApiKeyKind::Unspecified | ApiKeyKind::Team => KeyKind::Team,
        ApiKeyKind::UserToken => KeyKind::User,
        ApiKeyKind::Platform | ApiKeyKind::Free | ApiKeyKind::System => {
            return Err(Error::field("kind", "must be one of team, user_token"));
        }
    };
    let (calls, asked) = (caller.tenant()?.mode, defined("mode", request.mode)?);
    if asked == Mode::Live && calls != Mode::Live {
        return Err(Error::field("mode", "must be test: a call in test mode touches nothing live"));
    }
    let (mode, user_id) = match (kind, asked) {
        (KeyKind::User, Mode::Test) => return Err(Error::field("mode", "must be live for the token of a user")),
        (KeyKind::User, _) => {
            let user_id = request.user_id.clone().unwrap_or_else(|| caller.principal.user_id.clone());
            if !could_be_id(&user_id) {
                return Err(Error::field("user_id", "must be a member of the team"));
            }
            (Mode::Live, Some(user_id))
        }
        _ if request.user_id.is_some() => {
            return Err(Error::field("user_id", "is only for the token of a user"));
        }
        (_, Mode::Unspecified) => (calls, None),
        (_, mode) => (mode, None),
    };
    let terms = Terms {
        name,
        scopes: scopes_among(&request.scopes, kind)?,
        read_only: read_only(defined("scope", request.scope)?),
        allowlist: Allowlist::parse(&request.allowlist)?,
        enabled: true,
        expires_at_ms: future(end_of(request.expires_at)?, now_ms)?,
        requests_per_minute: own_limit(request.requests_per_minute)?,
        rotate_every_days: rotation_days(request.rotate_every_days)?,
        user_id,
    };
    Ok((kind, mode, terms))
}

/// Refuses an empty list of scopes that was sent as such: it must not be taken for the widest one.
fn not_empty(mask: Option<FieldMask>, scopes: &[String]) -> Result<(), Error> {
    if Mask::new(mask, &GIVEN)?.names("scopes", false) && scopes.is_empty() {
        return Err(Error::field("scopes", "must name at least one scope; leave it out for all that the key may hold"));
    }
    Ok(())
}

/// What an update asks for.
fn changes(request: UpdateApiKeyRequest) -> Result<Changes, Error> {
    let scope = Some(defined("scope", request.scope)?).filter(|scope| *scope != ApiKeyScope::Unspecified);
    let mask = Mask::new(request.update_mask, &CHANGEABLE)?;
    let name = mask.required_change("name", request.name)?;
    let listed = |list: Vec<String>| Some(list).filter(|list| !list.is_empty());
    let scopes = mask.required_change("scopes", listed(request.scopes))?;
    let allowlist = mask.change("allowlist", listed(request.allowlist)).map(Option::unwrap_or_default);
    let expires_at_ms = match mask.change("expires_at", request.expires_at) {
        Some(end) => Some(end_of(end)?),
        None => None,
    };
    let requests_per_minute = mask.change("requests_per_minute", request.requests_per_minute).map(own_limit);
    let rotate_every_days = mask.change("rotate_every_days", request.rotate_every_days).map(rotation_days);
    Ok(Changes {
        name: name.as_deref().map(key_name).transpose()?,
        enabled: mask.required_change("enabled", request.enabled)?,
        read_only: mask.required_change("scope", scope)?.map(read_only),
        scopes,
        allowlist: allowlist.as_deref().map(Allowlist::parse).transpose()?,
        expires_at_ms,
        requests_per_minute: requests_per_minute.transpose()?,
        rotate_every_days: rotate_every_days.transpose()?,
    })
}

fn end_of(time: Option<prost_types::Timestamp>) -> Result<Option<i64>, Error> {
    time.map(|time| time_ms("expires_at", &time)).transpose()
}

/// A word of the contract by its number. One that is not known here is not taken for none: what would be granted by
/// default may be more than was asked for.
fn defined<T: TryFrom<i32>>(field: &str, number: i32) -> Result<T, Error> {
    T::try_from(number).map_err(|_| Error::field(field, "is not known"))
}

fn read_only(scope: ApiKeyScope) -> bool {
    scope == ApiKeyScope::ReadOnly
}

fn small(number: i64) -> Option<i32> {
    i32::try_from(number).ok()
}

/// A key as the contract has it.
fn encode(key: ApiKey, now_ms: i64) -> ApiKeyMessage {
    let status = key.status(now_ms);
    let kind = match key.kind {
        KeyKind::Team => ApiKeyKind::Team,
        KeyKind::Platform => ApiKeyKind::Platform,
        KeyKind::Free => ApiKeyKind::Free,
        KeyKind::User => ApiKeyKind::UserToken,
        KeyKind::System => ApiKeyKind::System,
    };
    // The installation's own key belongs to neither world.
    let mode = if key.kind == KeyKind::System { Mode::Unspecified } else { key.mode };
    let terms = key.terms;
    let scope = if terms.read_only { ApiKeyScope::ReadOnly } else { ApiKeyScope::ReadWrite };
    ApiKeyMessage {
        id: key.id,
        name: terms.name,
        kind: kind.into(),
        prefix: key.shown_prefix,
        mode: mode.into(),
        scope: scope.into(),
        scopes: terms.scopes.iter().map(|scope| Contract::get().scope_word(*scope).to_owned()).collect(),
        creator: Some(encode_actor(key.creator)),
        status: status.into(),
        created_at: Some(timestamp(key.created_at_ms)),
        expires_at: terms.expires_at_ms.map(timestamp),
        last_used_at: key.last_used_at_ms.map(timestamp),
        rotated_at: key.rotated_at_ms.map(timestamp),
        revoked_at: key.revoked_at_ms.map(timestamp),
        revoked_by: key.revoked_at_ms.map(|_| encode_actor(key.revoker)),
        allowlist: terms.allowlist.texts(),
        requests_per_minute: terms.requests_per_minute.and_then(small),
        rotate_every_days: terms.rotate_every_days.and_then(small),
        rotation_due_at: key.rotation_due_at_ms.map(timestamp),
        superseded_by: key.superseded_by,
        user_id: terms.user_id,
        temporary: key.temporary,
    }
}

fn encode_actor(actor: Actor) -> ApiKeyActor {
    ApiKeyActor { id: actor.id.unwrap_or_default(), name: actor.name.unwrap_or_default() }
}
