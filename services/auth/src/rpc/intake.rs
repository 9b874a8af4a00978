//! `IntakeService`: what other services tell.

use paperkey_kit::{
    events::{INGEST_EVENTS, PRODUCT_DELETED},
    principal::{Caller, Tenant},
};
use paperkey_proto::{
    events::v1::{IngestEventsRequest, IngestEventsResponse, intake_service_server::IntakeService},
    principal::v1::Mode,
};
use tonic::{Request, Response, Status};

use crate::{
    domain::could_be_id,
    store::{Act, Store},
};

/// The handlers.
#[derive(Debug)]
pub(crate) struct Handler {
    pub(crate) store: Store,
}

#[tonic::async_trait]
impl IntakeService for Handler {
    /// Each event is a transaction of its own: what was done before a failure is done again, which changes nothing.
    async fn ingest_events(
        &self,
        request: Request<IngestEventsRequest>,
    ) -> Result<Response<IngestEventsResponse>, Status> {
        let act = Act::by(&Caller::of(&request)?, INGEST_EVENTS);
        for event in request.into_inner().events {
            // Others may be sent to every service; they are none of ours.
            if event.topic != PRODUCT_DELETED {
                continue;
            }
            let mode = event.mode();
            if mode == Mode::Unspecified || !could_be_id(&event.team_id) || !could_be_id(&event.product_id) {
                // Refusing it would hold up those behind it for ever.
                tracing::error!(event = event.id, "a deleted product is not named and is passed over");
                continue;
            }
            let tenant = Tenant { team_id: event.team_id, mode };
            self.store.of(tenant).forget_product(event.product_id, act.clone()).await?;
        }
        Ok(Response::new(IngestEventsResponse {}))
    }
}
