//! `CredentialService`: credentials, for those who must judge them.

use paperkey_kit::{
    changes::Changes,
    clock::Clock,
    ids::new_id,
    principal::{Caller, Tenant},
    secrets::Secret,
};
use paperkey_proto::{
    Error,
    auth::v1::{
        AuthenticateRequest, AuthenticateResponse, ListChangesRequest, ListChangesResponse, ProvisionProductRequest,
        ProvisionProductResponse, RecordKeyUsesRequest, RecordKeyUsesResponse,
        credential_service_server::CredentialService,
    },
    principal::v1::Mode,
};
use tonic::{Request, Response, Status};

use super::product_keys::encode;
use crate::{
    credentials::{Credentials, Named},
    domain::{could_be_id, key::NewPair},
    store::{Act, Store},
};

/// Uses of one batch at most.
const MAX_USES: usize = 1_000;

/// The handlers.
#[derive(Debug)]
pub(crate) struct Handler {
    pub(crate) credentials: Credentials,
    pub(crate) store: Store,
    pub(crate) clock: Clock,
}

#[tonic::async_trait]
impl CredentialService for Handler {
    async fn authenticate(
        &self,
        request: Request<AuthenticateRequest>,
    ) -> Result<Response<AuthenticateResponse>, Status> {
        let request = request.into_inner();
        let mode = request.mode();
        let named = Named { team_id: Some(request.team_id).filter(|id| !id.is_empty()), mode };
        let principal = self.credentials.authenticate(Secret::new(request.credential), named).await?;
        Ok(Response::new(AuthenticateResponse { principal: Some(principal) }))
    }

    async fn provision_product(
        &self,
        request: Request<ProvisionProductRequest>,
    ) -> Result<Response<ProvisionProductResponse>, Status> {
        let act = Act::by(&Caller::of(&request)?, "/paperkey.auth.v1.CredentialService/ProvisionProduct");
        let request = request.into_inner();
        let mode = match request.mode() {
            Mode::Test => Mode::Test,
            Mode::Live | Mode::Unspecified => Mode::Live,
        };
        for (field, id) in [("product_id", &request.product_id), ("team_id", &request.team_id)] {
            if !could_be_id(id) {
                return Err(Error::field(field, "must be an id").into());
            }
        }
        let tenant = Tenant { team_id: request.team_id, mode };
        let pair = NewPair::generate(new_id("key", &self.clock));
        let secret_key = pair.secret_key.expose().to_owned();
        let pair = self.store.of(tenant).provision(request.product_id, pair, act).await?;
        Ok(Response::new(ProvisionProductResponse { api_key: Some(encode(pair)), secret_key }))
    }

    async fn record_key_uses(
        &self,
        request: Request<RecordKeyUsesRequest>,
    ) -> Result<Response<RecordKeyUsesResponse>, Status> {
        let uses = request.into_inner().uses;
        if uses.len() > MAX_USES {
            return Err(Error::field("uses", format!("must have at most {MAX_USES} entries")).into());
        }
        let uses = uses.into_iter().filter(|usage| could_be_id(&usage.key_id));
        self.store.record_uses(uses.map(|usage| (usage.key_id, usage.used_at_ms)).collect()).await?;
        Ok(Response::new(RecordKeyUsesResponse {}))
    }

    async fn list_changes(
        &self,
        request: Request<ListChangesRequest>,
    ) -> Result<Response<ListChangesResponse>, Status> {
        let since = request.into_inner().since;
        if since < 0 {
            let seq = self.store.newest_change().await?;
            return Ok(Response::new(ListChangesResponse { seq, ..ListChangesResponse::default() }));
        }
        Ok(Response::new(match self.store.changes_since(since).await? {
            Changes::Page { latest_seq, subjects, more: _ } => {
                ListChangesResponse { seq: latest_seq, subjects, gap: false }
            }
            Changes::Gap { latest_seq } => ListChangesResponse { seq: latest_seq, subjects: Vec::new(), gap: true },
        }))
    }
}
