//! `IntakeService`: what other services tell.

use paperkey_kit::{
    events::{INGEST_EVENTS, PRODUCT_DELETED, WEBHOOK_PAUSED},
    principal::{Caller, Tenant},
};
use paperkey_proto::{
    events::v1::{Event, IngestEventsRequest, IngestEventsResponse, intake_service_server::IntakeService},
    principal::v1::Mode,
};
use serde_json::Value;
use tonic::{Request, Response, Status};

use crate::{
    domain::{alert::PausedWebhook, could_be_id},
    store::{Act, Store},
};

/// Longer than any name of a host.
const MAX_HOST_BYTES: usize = 255;

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
            if event.topic == WEBHOOK_PAUSED {
                if let Some((tenant, webhook)) = paused(&event) {
                    self.store.webhook_paused(event.id, tenant, webhook).await?;
                } else {
                    tracing::error!(event = event.id, "a paused webhook is not named and is passed over");
                }
                continue;
            }
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

/// The webhook that an event says is paused, and whose it is.
fn paused(event: &Event) -> Option<(Tenant, PausedWebhook)> {
    let mode = event.mode();
    let data: Value = serde_json::from_str(&event.data_json).ok()?;
    let (id, host) = (data["webhookId"].as_str()?, data["host"].as_str()?);
    let ids = [event.id.as_str(), event.team_id.as_str(), id];
    let is_known = mode != Mode::Unspecified && ids.into_iter().all(could_be_id) && host.len() <= MAX_HOST_BYTES;
    let webhook = PausedWebhook {
        id: id.to_owned(),
        host: host.to_owned(),
        product_id: event.product_id.clone(),
        failures: data["failures"].as_i64().unwrap_or(0),
        gone: data["gone"].as_bool().unwrap_or(false),
    };
    is_known.then(|| (Tenant { team_id: event.team_id.clone(), mode }, webhook))
}
