//! Where the events of other services arrive.

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
        self.store.ingest(request.into_inner().events).await.map_err(Error::from)?;
        Ok(Response::new(IngestEventsResponse {}))
    }
}
