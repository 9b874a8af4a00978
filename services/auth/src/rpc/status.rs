//! `StatusService`: whether the product is up, and who is asking.

use paperkey_kit::{clock::Clock, principal::Caller, values::timestamp};
use paperkey_proto::{
    auth::v1::{GetStatusRequest, GetStatusResponse, KeyOwner, status_service_server::StatusService},
    options::v1::Caller as Kind,
    principal::v1::Principal,
};
use tonic::{Request, Response, Status};

/// The handlers.
#[derive(Debug)]
pub(crate) struct Handler {
    pub(crate) version: &'static str,
    pub(crate) clock: Clock,
}

#[tonic::async_trait]
impl StatusService for Handler {
    async fn get_status(&self, request: Request<GetStatusRequest>) -> Result<Response<GetStatusResponse>, Status> {
        let caller = Caller::of(&request)?;
        Ok(Response::new(GetStatusResponse {
            status: "ok".to_owned(),
            version: self.version.to_owned(),
            time: Some(timestamp(self.clock.now_ms())),
            caller: key_owner(&caller.principal),
        }))
    }
}

/// Whose key it is; nobody's where the caller has none.
fn key_owner(principal: &Principal) -> Option<KeyOwner> {
    match principal.kind() {
        Kind::TeamKey
        | Kind::FreeKey
        | Kind::UserToken
        | Kind::SystemKey
        | Kind::ProductPublicKey
        | Kind::ProductSecretKey => Some(KeyOwner {
            id: principal.id.clone(),
            name: principal.name.clone(),
            team_id: Some(principal.team_id.clone()).filter(|id| !id.is_empty()),
            mode: principal.mode,
        }),
        Kind::Unspecified | Kind::Anyone | Kind::Account | Kind::Service => None,
    }
}
