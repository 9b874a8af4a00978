//! `CredentialService`: credentials, for those who must judge them.

use std::net::IpAddr;

use ipnet::IpNet;
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
        AuthenticateRequest, AuthenticateResponse, Incident, ListChangesRequest, ListChangesResponse,
        ProvisionProductRequest, ProvisionProductResponse, RecordIncidentsRequest, RecordIncidentsResponse,
        RecordKeyUsesRequest, RecordKeyUsesResponse, credential_service_server::CredentialService, incident::What,
    },
    principal::v1::Mode,
};
use tonic::{Request, Response, Status};

use super::product_keys::encode;
use crate::{
    credentials::{Credentials, Named},
    domain::{
        alert::{Burst, network},
        could_be_id,
        key::NewPair,
    },
    store::{Act, Store, Usage},
};

/// Uses of one batch at most.
const MAX_USES: usize = 1_000;
/// Incidents of one batch at most.
const MAX_INCIDENTS: usize = 1_000;

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
        let uses = uses.into_iter().filter(|usage| could_be_id(&usage.key_id)).map(|usage| Usage {
            key_id: usage.key_id,
            at_ms: usage.used_at_ms,
            network: network(&usage.network),
        });
        self.store.record_uses(uses.collect()).await?;
        Ok(Response::new(RecordKeyUsesResponse {}))
    }

    async fn record_incidents(
        &self,
        request: Request<RecordIncidentsRequest>,
    ) -> Result<Response<RecordIncidentsResponse>, Status> {
        let incidents = request.into_inner().incidents;
        if incidents.len() > MAX_INCIDENTS {
            return Err(Error::field("incidents", format!("must have at most {MAX_INCIDENTS} entries")).into());
        }
        self.store.record_bursts(incidents.into_iter().filter_map(burst).collect()).await?;
        Ok(Response::new(RecordIncidentsResponse {}))
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

/// A burst of refusals as it is told. What names neither a key nor an address is passed over, and so is what a newer
/// gateway may tell and this version does not know.
fn burst(incident: Incident) -> Option<Burst> {
    let What::RefusalBurst(told) = incident.what?;
    let is_address = told.ip.parse::<IpAddr>().is_ok() || told.ip.parse::<IpNet>().is_ok();
    let key_id = Some(told.key_id).filter(|id| !id.is_empty());
    let is_known = is_address && key_id.as_deref().is_none_or(could_be_id);
    is_known.then(|| Burst {
        key_id,
        ip: told.ip,
        refused: i64::from(told.refused.max(1)),
        since_ms: told.since_ms.max(0),
    })
}
