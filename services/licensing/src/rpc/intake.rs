//! Where the events of other services arrive.

use paperkey_kit::{
    events::{CLIENT_DELETED, INGEST_EVENTS, PRODUCT_DELETED, TEAM_DELETED},
    principal::{Caller, Tenant},
};
use paperkey_proto::{
    Error,
    events::v1::{Event, IngestEventsRequest, IngestEventsResponse, intake_service_server::IntakeService},
    principal::v1::Mode,
};
use serde_json::Value;
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

/// What was deleted.
enum Gone {
    /// All that belongs to a product is to go.
    Product(Tenant, String),
    /// No licence is to name the client any more.
    Client(Tenant, String),
    /// All that belongs to a team is to go, in both modes.
    Team(String),
}

impl Gone {
    fn of(event: Event) -> Option<Self> {
        let mode = event.mode();
        if !could_be_id(&event.team_id) {
            return None;
        }
        if event.topic == TEAM_DELETED {
            return Some(Self::Team(event.team_id));
        }
        let tenant = Tenant { team_id: event.team_id, mode };
        match event.topic.as_str() {
            _ if mode == Mode::Unspecified => None,
            PRODUCT_DELETED => Some(Self::Product(tenant, event.product_id)),
            CLIENT_DELETED => {
                let data: Value = serde_json::from_str(&event.data_json).ok()?;
                Some(Self::Client(tenant, data["id"].as_str()?.to_owned()))
            }
            _ => None,
        }
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
            let (id, topic) = (event.id.clone(), event.topic.clone());
            let done = match Gone::of(event) {
                Some(Gone::Product(tenant, id)) => self.store.of(tenant).forget_product(&id, act.clone()).await,
                Some(Gone::Client(tenant, id)) => self.store.of(tenant).forget_client(&id, act.clone()).await,
                Some(Gone::Team(team_id)) => self.store.forget_team(&team_id, act.clone()).await,
                None => {
                    // Refusing it would keep those behind it waiting for ever.
                    tracing::warn!(event = id, topic, "an event of no use here is passed over");
                    Ok(())
                }
            };
            done.map_err(Error::from)?;
        }
        Ok(Response::new(IngestEventsResponse {}))
    }
}
