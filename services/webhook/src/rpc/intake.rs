//! Where the events of other services arrive.

use paperkey_kit::{events::pass_on, telemetry::SpanKind};
use paperkey_proto::{
    Error,
    events::v1::{IngestEventsRequest, IngestEventsResponse, intake_service_server::IntakeService},
};
use tonic::{Request, Response, Status};

use crate::store::Store;

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
    async fn ingest_events(
        &self,
        request: Request<IngestEventsRequest>,
    ) -> Result<Response<IngestEventsResponse>, Status> {
        let mut events = request.into_inner().events;
        // Deliveries go on from here, once in each event's own trace.
        let spans = pass_on(&SpanKind::Consumer, "take", &mut events);
        self.store.ingest(events).await.map_err(Error::from)?;
        drop(spans);
        Ok(Response::new(IngestEventsResponse {}))
    }
}
