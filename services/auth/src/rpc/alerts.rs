//! `AlertService`: the feed of alerts.

use paperkey_kit::{
    principal::Caller,
    values::{Page, struct_of, timestamp},
};
use paperkey_proto::auth::v1::{
    Alert as AlertMessage, ListAlertsRequest, ListAlertsResponse, alert_service_server::AlertService,
};
use tonic::{Request, Response, Status};

use super::teams::own_team;
use crate::{domain::alert::Alert, store::Store};

/// The handlers.
#[derive(Debug)]
pub(crate) struct Handler {
    pub(crate) store: Store,
}

#[tonic::async_trait]
impl AlertService for Handler {
    async fn list_alerts(&self, request: Request<ListAlertsRequest>) -> Result<Response<ListAlertsResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        own_team(&caller, &request.team_id)?;
        let page = Page::new(request.page_size, &request.page_token)?;
        let alerts = self.store.of(caller.tenant()?).alerts(&page).await?;
        let (alerts, next_page_token) = page.cut(alerts, |alert| &alert.id);
        let alerts = alerts.into_iter().map(encode).collect();
        Ok(Response::new(ListAlertsResponse { alerts, next_page_token }))
    }
}

fn encode(alert: Alert) -> AlertMessage {
    AlertMessage {
        id: alert.id,
        cause: alert.cause.into(),
        subject: alert.subject,
        message: alert.message,
        count: alert.count,
        details: struct_of(&alert.details),
        created_at: Some(timestamp(alert.created_at_ms)),
        last_at: Some(timestamp(alert.last_at_ms)),
    }
}
