//! Endpoints of products, and what was sent to them.

use paperkey_kit::{
    channel::Channel,
    principal::{Caller, Signer},
    values::{Mask, Page, timestamp},
};
use paperkey_proto::{
    Error,
    catalog::v1::{GetProductRequest, catalog_service_client::CatalogServiceClient},
    webhook::v1::{
        CreateWebhookRequest, CreateWebhookResponse, DeleteWebhookRequest, DeleteWebhookResponse,
        Delivery as DeliveryMessage, DeliveryAttempt, DeliveryStatus as DeliveryWord, GetDeliveryRequest,
        GetDeliveryResponse, GetWebhookRequest, GetWebhookResponse, ListDeliveriesRequest, ListDeliveriesResponse,
        ListWebhooksRequest, ListWebhooksResponse, UpdateWebhookRequest, UpdateWebhookResponse, Webhook, WebhookStatus,
        webhook_service_server::WebhookService,
    },
};
use tonic::{Request, Response, Status as GrpcStatus};

use crate::{
    domain::{
        Fault, could_be_id,
        delivery::{Delivery, DeliveryStatus, LoggedAttempt},
        endpoint::{Changes, Endpoint, Status, UrlRules},
        event::subscription,
    },
    store::{Act, Store, TenantStore},
};

const CREATE: &str = "/paperkey.webhook.v1.WebhookService/CreateWebhook";
const UPDATE: &str = "/paperkey.webhook.v1.WebhookService/UpdateWebhook";
const DELETE: &str = "/paperkey.webhook.v1.WebhookService/DeleteWebhook";

/// The fields that a change may name.
const CHANGEABLE: [&str; 3] = ["url", "events", "status"];

/// The service, as tonic calls it.
pub(crate) struct Webhooks {
    pub(crate) store: Store,
    pub(crate) rules: UrlRules,
    pub(crate) catalog: Channel,
    pub(crate) signer: Signer,
}

impl Webhooks {
    /// The caller's webhooks, if the product is one that the caller reaches.
    fn of<T>(&self, request: Request<T>, product_id: fn(&T) -> &str) -> Result<(Caller, TenantStore, T), Error> {
        let caller = Caller::of(&request)?;
        let store = self.store.of(caller.tenant()?);
        let request = request.into_inner();
        caller.must_reach_product(product_id(&request))?;
        Ok((caller, store, request))
    }

    /// Asks the catalogue whether the caller's team has the product.
    async fn must_exist(&self, caller: &Caller, product_id: &str) -> Result<(), Error> {
        if !could_be_id(product_id) {
            return Err(Fault::NoSuchProduct.into());
        }
        let channel = self.catalog.as_service("webhook", self.signer.clone(), Some(&caller.tenant()?)).serving(caller);
        let request = GetProductRequest { id: product_id.to_owned() };
        CatalogServiceClient::new(channel).get_product(request).await.map_err(|status| Error::from_status(&status))?;
        Ok(())
    }
}

#[tonic::async_trait]
impl WebhookService for Webhooks {
    async fn create_webhook(
        &self,
        request: Request<CreateWebhookRequest>,
    ) -> Result<Response<CreateWebhookResponse>, GrpcStatus> {
        let (caller, store, request) = self.of(request, |request| &request.product_id)?;
        self.rules.read(&request.url)?;
        let events = subscription(request.events)?;
        self.must_exist(&caller, &request.product_id).await?;
        let act = Act::by(&caller, CREATE);
        let created = store.create_endpoint(request.product_id, request.url, events, act).await;
        let (endpoint, secret) = created.map_err(Error::from)?;
        Ok(Response::new(CreateWebhookResponse {
            webhook: Some(webhook(endpoint)),
            secret: secret.expose().to_owned(),
        }))
    }

    async fn get_webhook(
        &self,
        request: Request<GetWebhookRequest>,
    ) -> Result<Response<GetWebhookResponse>, GrpcStatus> {
        let (_, store, request) = self.of(request, |request| &request.product_id)?;
        let found = store.endpoint(&request.product_id, &request.webhook_id).await.map_err(Error::from)?;
        Ok(Response::new(GetWebhookResponse { webhook: Some(webhook(found)) }))
    }

    async fn list_webhooks(
        &self,
        request: Request<ListWebhooksRequest>,
    ) -> Result<Response<ListWebhooksResponse>, GrpcStatus> {
        let (caller, store, request) = self.of(request, |request| &request.product_id)?;
        let page = Page::new(request.page_size, &request.page_token)?;
        let (found, next_page_token) = store.endpoints(&request.product_id, page).await.map_err(Error::from)?;
        if found.is_empty() {
            // None yet, or no such product: the two are told apart.
            self.must_exist(&caller, &request.product_id).await?;
        }
        let webhooks = found.into_iter().map(webhook).collect();
        Ok(Response::new(ListWebhooksResponse { webhooks, next_page_token }))
    }

    async fn update_webhook(
        &self,
        request: Request<UpdateWebhookRequest>,
    ) -> Result<Response<UpdateWebhookResponse>, GrpcStatus> {
        let (caller, store, request) = self.of(request, |request| &request.product_id)?;
        let status = status_of(&request)?;
        let mask = Mask::new(request.update_mask, &CHANGEABLE)?;
        let url = mask.required_change("url", request.url)?;
        if let Some(url) = &url {
            self.rules.read(url)?;
        }
        let events =
            mask.names("events", !request.events.is_empty()).then(|| subscription(request.events)).transpose()?;
        let changes = Changes { url, events, status: mask.required_change("status", status)? };
        let act = Act::by(&caller, UPDATE);
        let changed = store.update_endpoint(&request.product_id, &request.webhook_id, changes, act).await;
        Ok(Response::new(UpdateWebhookResponse { webhook: Some(webhook(changed.map_err(Error::from)?)) }))
    }

    async fn delete_webhook(
        &self,
        request: Request<DeleteWebhookRequest>,
    ) -> Result<Response<DeleteWebhookResponse>, GrpcStatus> {
        let (caller, store, request) = self.of(request, |request| &request.product_id)?;
        let act = Act::by(&caller, DELETE);
        store.delete_endpoint(&request.product_id, &request.webhook_id, act).await.map_err(Error::from)?;
        Ok(Response::new(DeleteWebhookResponse {}))
    }

    async fn list_deliveries(
        &self,
        request: Request<ListDeliveriesRequest>,
    ) -> Result<Response<ListDeliveriesResponse>, GrpcStatus> {
        let (_, store, request) = self.of(request, |request| &request.product_id)?;
        let page = Page::new(request.page_size, &request.page_token)?;
        let found = store.deliveries(&request.product_id, &request.webhook_id, page).await;
        let (found, next_page_token) = found.map_err(Error::from)?;
        let deliveries = found.into_iter().map(delivery).collect();
        Ok(Response::new(ListDeliveriesResponse { deliveries, next_page_token }))
    }

    async fn get_delivery(
        &self,
        request: Request<GetDeliveryRequest>,
    ) -> Result<Response<GetDeliveryResponse>, GrpcStatus> {
        let (_, store, request) = self.of(request, |request| &request.product_id)?;
        let found = store.delivery(&request.product_id, &request.webhook_id, &request.delivery_id).await;
        let (found, attempts) = found.map_err(Error::from)?;
        Ok(Response::new(GetDeliveryResponse {
            delivery: Some(delivery(found)),
            attempts: attempts.into_iter().map(attempt).collect(),
        }))
    }
}

fn status_of(request: &UpdateWebhookRequest) -> Result<Option<Status>, Error> {
    match WebhookStatus::try_from(request.status) {
        Ok(WebhookStatus::Unspecified) => Ok(None),
        Ok(WebhookStatus::Active) => Ok(Some(Status::Active)),
        Ok(WebhookStatus::Paused) => Ok(Some(Status::Paused)),
        Err(_) => Err(Error::field("status", "must be one of active, paused")),
    }
}

fn webhook(endpoint: Endpoint) -> Webhook {
    let status = match endpoint.status {
        Status::Active => WebhookStatus::Active,
        Status::Paused => WebhookStatus::Paused,
    };
    Webhook {
        id: endpoint.id,
        product_id: endpoint.product_id,
        url: endpoint.url,
        events: endpoint.events,
        status: status.into(),
        consecutive_failures: small(endpoint.consecutive_failures),
        created_at: Some(timestamp(endpoint.created_at_ms)),
        updated_at: Some(timestamp(endpoint.updated_at_ms)),
    }
}

fn delivery(delivery: Delivery) -> DeliveryMessage {
    let status = match delivery.status {
        DeliveryStatus::Pending => DeliveryWord::Pending,
        DeliveryStatus::Succeeded => DeliveryWord::Succeeded,
        DeliveryStatus::Failed => DeliveryWord::Failed,
    };
    DeliveryMessage {
        id: delivery.id,
        event_id: delivery.event_id,
        event: delivery.topic,
        status: status.into(),
        attempts_count: small(delivery.attempts),
        response_status: delivery.response_status.map(small),
        duration_ms: delivery.duration_ms.map(small),
        error: delivery.error,
        created_at: Some(timestamp(delivery.created_at_ms)),
        last_attempt_at: delivery.last_attempt_at_ms.map(timestamp),
        next_attempt_at: delivery.next_attempt_at_ms.map(timestamp),
    }
}

fn attempt(attempt: LoggedAttempt) -> DeliveryAttempt {
    DeliveryAttempt {
        number: small(attempt.number),
        at: Some(timestamp(attempt.at_ms)),
        duration_ms: small(attempt.duration_ms),
        response_status: attempt.response_status.map(small),
        error: attempt.error,
        response_snippet: attempt.snippet,
    }
}

/// Counts and milliseconds as the contract has them.
fn small(number: i64) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}
