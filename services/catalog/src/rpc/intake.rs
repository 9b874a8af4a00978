//! Where the events of other services arrive.

use paperkey_kit::{
    events::{INGEST_EVENTS, TEAM_DELETED},
    principal::Caller,
};
use paperkey_proto::{
    Error,
    events::v1::{IngestEventsRequest, IngestEventsResponse, intake_service_server::IntakeService},
};
use tonic::{Request, Response, Status};

use crate::{
    domain::could_be_id,
    store::{Act, Store},
};

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
        let act = Act::by(&Caller::of(&request)?, INGEST_EVENTS);
        for event in request.into_inner().events {
            if event.topic != TEAM_DELETED || !could_be_id(&event.team_id) {
                // Refusing it would keep those behind it waiting for ever.
                tracing::warn!(event = event.id, topic = event.topic, "an event of no use here is passed over");
                continue;
            }
            self.store.forget_team(&event.team_id, act.clone()).await.map_err(Error::from)?;
        }
        Ok(Response::new(IngestEventsResponse {}))
    }
}
