//! Where the events of other services arrive.

use paperkey_kit::{
    events::PRODUCT_DELETED,
    principal::{Caller, Tenant},
};
use paperkey_proto::{
    Error,
    licensing::v1::{IngestEventsRequest, IngestEventsResponse, intake_service_server::IntakeService},
    principal::v1::Mode,
};
use tonic::{Request, Response, Status};

use crate::store::{Act, Store};

const INGEST: &str = "/paperkey.licensing.v1.IntakeService/IngestEvents";

/// The service, as tonic calls it.
pub(crate) struct Intake {
    store: Store,
}

impl Intake {
    pub(crate) fn new(store: Store) -> Self {
        Self { store }
    }
}

#[tonic::async_trait]
impl IntakeService for Intake {
    /// Ids of events are not kept: deleting twice is deleting once.
    async fn ingest_events(
        &self,
        request: Request<IngestEventsRequest>,
    ) -> Result<Response<IngestEventsResponse>, Status> {
        let caller = Caller::of(&request)?;
        for event in request.into_inner().events {
            let mode = event.mode();
            if event.topic != PRODUCT_DELETED || event.team_id.is_empty() || mode == Mode::Unspecified {
                // Refusing it would keep those behind it waiting for ever.
                tracing::warn!(event = event.id, topic = event.topic, "an event of no use here is passed over");
                continue;
            }
            let tenant = Tenant { team_id: event.team_id, mode };
            let act = Act::by(&caller, INGEST);
            self.store.of(tenant).forget_product(&event.product_id, act).await.map_err(Error::from)?;
        }
        Ok(Response::new(IngestEventsResponse {}))
    }
}
