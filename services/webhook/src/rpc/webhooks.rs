//! The rpcs of endpoints.

use std::time::Duration;

use paperkey_kit::{
    channel::Channel,
    policy::must_hold,
    principal::{Caller, Signer},
    secrets::Secret,
    values::{Mask, Page, time_ms, timestamp},
};
use paperkey_proto::{
    Error,
    catalog::v1::{GetProductRequest, catalog_service_client::CatalogServiceClient},
    options::v1::Scope,
    webhook::v1::{
        CreateWebhookRequest, CreateWebhookResponse, DeleteWebhookRequest, DeleteWebhookResponse, GetDeliveryRequest,
        GetDeliveryResponse, GetWebhookRequest, GetWebhookResponse, ListDeliveriesRequest, ListDeliveriesResponse,
        ListWebhooksRequest, ListWebhooksResponse, RecoverDeliveriesRequest, RecoverDeliveriesResponse,
        ReplayDeliveryRequest, ReplayDeliveryResponse, RotateWebhookSecretRequest, RotateWebhookSecretResponse,
        TestWebhookRequest, TestWebhookResponse, UpdateWebhookRequest, UpdateWebhookResponse, WatchEventsRequest,
        Webhook as WebhookMessage, WebhookStatus, webhook_service_server::WebhookService,
    },
};
use tonic::{Request, Response, Status};

use super::{
    deliveries::{encode as encode_delivery, encode_attempt, narrow},
    watch::{Watches, Watching},
};
use crate::{
    NAME,
    domain::{
        Fault, could_be_id,
        delivery::Delivery,
        endpoint::{Changes, Endpoint, Status as EndpointStatus, UrlRules},
        event,
    },
    store::{Act, Store, TenantStore},
};

const CREATE: &str = "/paperkey.webhook.v1.WebhookService/CreateWebhook";
const UPDATE: &str = "/paperkey.webhook.v1.WebhookService/UpdateWebhook";
const DELETE: &str = "/paperkey.webhook.v1.WebhookService/DeleteWebhook";
const REPLAY: &str = "/paperkey.webhook.v1.WebhookService/ReplayDelivery";
const RECOVER: &str = "/paperkey.webhook.v1.WebhookService/RecoverDeliveries";
const TEST: &str = "/paperkey.webhook.v1.WebhookService/TestWebhook";
const ROTATE: &str = "/paperkey.webhook.v1.WebhookService/RotateWebhookSecret";

/// What an update may name. The ids are among them, since they say which endpoint, and are not changed.
const CHANGEABLE: [&str; 6] = ["product_id", "team_id", "webhook_id", "url", "events", "status"];

/// How long the catalogue may take to say whether a product exists.
const CATALOG_TIMEOUT: Duration = Duration::from_secs(5);

/// The service, as tonic calls it.
pub(crate) struct Webhooks {
    store: Store,
    rules: UrlRules,
    catalog: Channel,
    signer: Signer,
    watches: Watches,
}

impl Webhooks {
    pub(crate) fn new(store: Store, rules: UrlRules, catalog: Channel, signer: Signer, watches: Watches) -> Self {
        Self { store, rules, catalog, signer, watches }
    }

    /// The caller's part of the store, if the caller's credential reaches that product or, where none is named, the
    /// team.
    fn of<T: OfSource>(&self, request: Request<T>) -> Result<(Caller, TenantStore, T), Error> {
        let caller = Caller::of(&request)?;
        let store = self.store.of(caller.tenant()?);
        let request = request.into_inner();
        let (product_id, team_id) = (request.product_id(), request.team_id());
        if !product_id.is_empty() && !team_id.is_empty() {
            return Err(Error::field("team_id", "cannot be named beside a product: a webhook belongs to one of them"));
        }
        caller.must_be_of_team(team_id)?;
        match (product_id, caller.product_id()) {
            ("", None) => {}
            // A key of a product knows of no team.
            ("", Some(_)) => return Err(Error::not_found("team")),
            (product_id, _) => caller.must_reach_product(product_id)?,
        }
        Ok((caller, store, request))
    }

    /// Refuses a product that is not the caller's. The team is: it was found with the credential.
    async fn must_exist(&self, caller: &Caller, product_id: &str) -> Result<(), Error> {
        if product_id.is_empty() {
            return Ok(());
        }
        if !could_be_id(product_id) {
            return Err(Fault::NoSuchProduct.into());
        }
        let way = self.catalog.as_service(NAME, self.signer.clone(), Some(&caller.tenant()?)).serving(caller);
        let mut request = Request::new(GetProductRequest { id: product_id.to_owned() });
        request.set_timeout(CATALOG_TIMEOUT);
        let found = CatalogServiceClient::new(way).get_product(request).await;
        found.map(drop).map_err(|status| Error::from_status(&status))
    }

    fn changes(&self, request: UpdateWebhookRequest) -> Result<Changes, Error> {
        let mask = Mask::new(request.update_mask, &CHANGEABLE)?;
        let url = mask.required_change("url", request.url)?;
        if let Some(url) = &url {
            self.rules.read(url)?;
        }
        let events = mask.names("events", !request.events.is_empty()).then_some(request.events);
        let events = events.map(|events| event::subscription(&request.product_id, events)).transpose()?;
        let named = WebhookStatus::try_from(request.status);
        let status = match named {
            _ if !mask.names("status", request.status != 0) => None,
            Ok(WebhookStatus::Active) => Some(EndpointStatus::Active),
            Ok(WebhookStatus::Paused) => Some(EndpointStatus::Paused),
            Ok(WebhookStatus::Unspecified) | Err(_) => {
                return Err(Error::field("status", "must be active or paused"));
            }
        };
        Ok(Changes { url, events, status })
    }
}

/// A request that says whose webhooks it is about: those of a product, or those of the team.
trait OfSource {
    fn product_id(&self) -> &str;
    fn team_id(&self) -> &str;
}

macro_rules! of_source {
    ($($request:ty),* $(,)?) => {$(
        impl OfSource for $request {
            fn product_id(&self) -> &str {
                &self.product_id
            }

            fn team_id(&self) -> &str {
                &self.team_id
            }
        }
    )*};
}

of_source! {
    CreateWebhookRequest,
    GetWebhookRequest,
    ListWebhooksRequest,
    UpdateWebhookRequest,
    DeleteWebhookRequest,
    ListDeliveriesRequest,
    GetDeliveryRequest,
    ReplayDeliveryRequest,
    RecoverDeliveriesRequest,
    TestWebhookRequest,
    RotateWebhookSecretRequest,
    WatchEventsRequest,
}

#[tonic::async_trait]
impl WebhookService for Webhooks {
    async fn create_webhook(
        &self,
        request: Request<CreateWebhookRequest>,
    ) -> Result<Response<CreateWebhookResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        self.rules.read(&request.url)?;
        let events = event::subscription(&request.product_id, request.events)?;
        self.must_exist(&caller, &request.product_id).await?;
        let answer = |(endpoint, secret): &(Endpoint, Secret)| CreateWebhookResponse {
            webhook: Some(encode(endpoint.clone())),
            secret: secret.expose().to_owned(),
        };
        let act = Act::by(&caller, CREATE).answered_by(answer);
        let made = store.create_endpoint(request.product_id, request.url, events, act).await.map_err(Error::from)?;
        Ok(Response::new(answer(&made)))
    }

    async fn get_webhook(&self, request: Request<GetWebhookRequest>) -> Result<Response<GetWebhookResponse>, Status> {
        let (_, store, request) = self.of(request)?;
        let endpoint = store.endpoint(&request.product_id, &request.webhook_id).await.map_err(Error::from)?;
        Ok(Response::new(GetWebhookResponse { webhook: Some(encode(endpoint)) }))
    }

    async fn list_webhooks(
        &self,
        request: Request<ListWebhooksRequest>,
    ) -> Result<Response<ListWebhooksResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let page = Page::new(request.page_size, &request.page_token)?;
        let (endpoints, next_page_token) = store.endpoints(&request.product_id, page).await.map_err(Error::from)?;
        if endpoints.is_empty() {
            // Something without webhooks, or a product that is not there.
            self.must_exist(&caller, &request.product_id).await?;
        }
        let webhooks = endpoints.into_iter().map(encode).collect();
        Ok(Response::new(ListWebhooksResponse { webhooks, next_page_token }))
    }

    async fn update_webhook(
        &self,
        request: Request<UpdateWebhookRequest>,
    ) -> Result<Response<UpdateWebhookResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let (product_id, id) = (request.product_id.clone(), request.webhook_id.clone());
        let changes = self.changes(request)?;
        let act = Act::by(&caller, UPDATE);
        let endpoint = store.update_endpoint(&product_id, &id, changes, act).await.map_err(Error::from)?;
        Ok(Response::new(UpdateWebhookResponse { webhook: Some(encode(endpoint)) }))
    }

    async fn delete_webhook(
        &self,
        request: Request<DeleteWebhookRequest>,
    ) -> Result<Response<DeleteWebhookResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let act = Act::by(&caller, DELETE);
        store.delete_endpoint(&request.product_id, &request.webhook_id, act).await.map_err(Error::from)?;
        Ok(Response::new(DeleteWebhookResponse {}))
    }

    async fn list_deliveries(
        &self,
        request: Request<ListDeliveriesRequest>,
    ) -> Result<Response<ListDeliveriesResponse>, Status> {
        let (_, store, request) = self.of(request)?;
        let page = Page::new(request.page_size, &request.page_token)?;
        let (deliveries, next_page_token) =
            store.deliveries(&request.product_id, &request.webhook_id, page).await.map_err(Error::from)?;
        let deliveries = deliveries.into_iter().map(encode_delivery).collect();
        Ok(Response::new(ListDeliveriesResponse { deliveries, next_page_token }))
    }

    async fn get_delivery(
        &self,
        request: Request<GetDeliveryRequest>,
    ) -> Result<Response<GetDeliveryResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let (delivery, attempts) = store
            .delivery(&request.product_id, &request.webhook_id, &request.delivery_id)
            .await
            .map_err(Error::from)?;
        let may_read = must_hold(&caller.principal, shown_of(&request.product_id)).is_ok();
        let payload = if may_read { store.body(&delivery.event_id).await.map_err(Error::from)? } else { None };
        let attempts = attempts.into_iter().map(encode_attempt).collect();
        Ok(Response::new(GetDeliveryResponse { delivery: Some(encode_delivery(delivery)), attempts, payload }))
    }

    async fn replay_delivery(
        &self,
        request: Request<ReplayDeliveryRequest>,
    ) -> Result<Response<ReplayDeliveryResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let answer = |after: &Delivery| ReplayDeliveryResponse { delivery: Some(encode_delivery(after.clone())) };
        let act = Act::by(&caller, REPLAY).answered_by(answer);
        let after = store
            .replay(&request.product_id, &request.webhook_id, &request.delivery_id, act)
            .await
            .map_err(Error::from)?;
        Ok(Response::new(answer(&after)))
    }

    async fn recover_deliveries(
        &self,
        request: Request<RecoverDeliveriesRequest>,
    ) -> Result<Response<RecoverDeliveriesResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let since_ms = time_ms("since", &request.since.unwrap_or_default())?;
        let answer = |recovered: &i64| RecoverDeliveriesResponse { recovered: *recovered };
        let act = Act::by(&caller, RECOVER).answered_by(answer);
        let recovered =
            store.recover(&request.product_id, &request.webhook_id, since_ms, act).await.map_err(Error::from)?;
        Ok(Response::new(answer(&recovered)))
    }

    async fn test_webhook(
        &self,
        request: Request<TestWebhookRequest>,
    ) -> Result<Response<TestWebhookResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let answer = |made: &Delivery| TestWebhookResponse { delivery: Some(encode_delivery(made.clone())) };
        let act = Act::by(&caller, TEST).answered_by(answer);
        let made = store.test_endpoint(&request.product_id, &request.webhook_id, act).await.map_err(Error::from)?;
        Ok(Response::new(answer(&made)))
    }

    async fn rotate_webhook_secret(
        &self,
        request: Request<RotateWebhookSecretRequest>,
    ) -> Result<Response<RotateWebhookSecretResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let answer = |(endpoint, secret): &(Endpoint, Secret)| RotateWebhookSecretResponse {
            webhook: Some(encode(endpoint.clone())),
            secret: secret.expose().to_owned(),
        };
        let act = Act::by(&caller, ROTATE).answered_by(answer);
        let made = store.rotate_secret(&request.product_id, &request.webhook_id, act).await.map_err(Error::from)?;
        Ok(Response::new(answer(&made)))
    }

    type WatchEventsStream = Watching;

    async fn watch_events(&self, request: Request<WatchEventsRequest>) -> Result<Response<Watching>, Status> {
        let (caller, store, request) = self.of(request)?;
        must_hold(&caller.principal, shown_of(&request.product_id))?;
        let since_ms = request.since.map(|since| time_ms("since", &since)).transpose()?;
        self.must_exist(&caller, &request.product_id).await?;
        Ok(Response::new(self.watches.begin(&store, &request.product_id, since_ms).await?))
    }
}

/// What whoever is shown the events of a source must be allowed to read: licences with their keys, or keys and alerts of
/// the team.
fn shown_of(product_id: &str) -> Scope {
    if product_id.is_empty() { Scope::KeysRead } else { Scope::LicensesRead }
}

fn encode(endpoint: Endpoint) -> WebhookMessage {
    let status = match endpoint.status {
        EndpointStatus::Active => WebhookStatus::Active,
        EndpointStatus::Paused => WebhookStatus::Paused,
    };
    WebhookMessage {
        id: endpoint.id,
        product_id: Some(endpoint.product_id).filter(|id| !id.is_empty()),
        url: endpoint.url,
        events: endpoint.events,
        status: status.into(),
        consecutive_failures: narrow(endpoint.consecutive_failures),
        created_at: Some(timestamp(endpoint.created_at_ms)),
        updated_at: Some(timestamp(endpoint.updated_at_ms)),
        previous_secret_expires_at: endpoint.previous_secret_until_ms.map(timestamp),
    }
}
