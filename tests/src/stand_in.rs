//! A stand-in for the public API: says what a test has written down, and keeps what it was asked. For what a real
//! installation does not do on command: end a stream, say a thing twice, refuse in the middle.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};

use futures_util::{StreamExt as _, stream};
use paperkey_kit::values::timestamp;
use paperkey_proto::{
    licensing::v1::{
        BatchCreateLicensesRequest, BatchCreateLicensesResponse, CreateLicenseRequest, CreateLicenseResponse,
        DeleteActivationRequest, DeleteActivationResponse, ExportLicensesRequest, ExportLicensesResponse,
        GetLicenseRequest, GetLicenseResponse, ImportLicensesRequest, ImportLicensesResponse, ListLicensesRequest,
        ListLicensesResponse, ReinstateLicenseRequest, ReinstateLicenseResponse, RevokeLicenseRequest,
        RevokeLicenseResponse, UpdateLicenseRequest, UpdateLicenseResponse,
        licensing_service_server::{LicensingService, LicensingServiceServer},
    },
    webhook::v1::{
        CreateWebhookRequest, CreateWebhookResponse, DeleteWebhookRequest, DeleteWebhookResponse, GetDeliveryRequest,
        GetDeliveryResponse, GetWebhookRequest, GetWebhookResponse, ListDeliveriesRequest, ListDeliveriesResponse,
        ListWebhooksRequest, ListWebhooksResponse, RecoverDeliveriesRequest, RecoverDeliveriesResponse,
        ReplayDeliveryRequest, ReplayDeliveryResponse, RotateWebhookSecretRequest, RotateWebhookSecretResponse,
        TestWebhookRequest, TestWebhookResponse, UpdateWebhookRequest, UpdateWebhookResponse, WatchEventsRequest,
        WatchEventsResponse, WatchedEvent,
        webhook_service_server::{WebhookService, WebhookServiceServer},
    },
};
use tokio::{net::TcpListener, task::JoinHandle};
use tonic::{
    Request, Response, Status,
    codegen::BoxStream,
    metadata::MetadataMap,
    transport::{Server, server::TcpIncoming},
};

/// What a stream says before it ends.
pub type Script<T> = Vec<Result<T, Status>>;

/// A listening stand-in.
#[derive(Debug)]
pub struct StandIn {
    url: String,
    shared: Shared,
    serving: JoinHandle<()>,
}

#[derive(Clone, Debug, Default)]
struct Shared(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    watches: VecDeque<Script<WatchEventsResponse>>,
    export: Script<ExportLicensesResponse>,
    asked: Vec<(MetadataMap, WatchEventsRequest)>,
    imported: Vec<ImportLicensesRequest>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("no test panics while it holds this")
    }
}

/// The answer that says that the API watches.
pub fn ready() -> Result<WatchEventsResponse, Status> {
    Ok(WatchEventsResponse::default())
}

/// The answer that shows an event.
pub fn shown(id: &str, event: &str, created_at_ms: i64, payload: &str) -> Result<WatchEventsResponse, Status> {
    let event = WatchedEvent {
        id: id.to_owned(),
        event: event.to_owned(),
        created_at: Some(timestamp(created_at_ms)),
        payload: payload.to_owned(),
    };
    Ok(WatchEventsResponse { event: Some(event), delivery: None })
}

impl StandIn {
    /// Watches as it is told, one stream after the other; after the last one nothing happens any more.
    pub async fn watching(watches: Vec<Script<WatchEventsResponse>>) -> Self {
        Self::start(State { watches: watches.into(), ..State::default() }).await
    }

    /// Exports this, and imports anything but lines that hold the word `bad`.
    pub async fn exporting(export: Script<ExportLicensesResponse>) -> Self {
        Self::start(State { export, ..State::default() }).await
    }

    async fn start(state: State) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("there is a free port");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let shared = Shared(Arc::new(Mutex::new(state)));
        let server = Server::builder()
            .add_service(WebhookServiceServer::new(shared.clone()))
            .add_service(LicensingServiceServer::new(shared.clone()))
            .serve_with_incoming(TcpIncoming::from(listener));
        let serving = tokio::spawn(async move { server.await.expect("it serves until the test ends") });
        Self { url, shared, serving }
    }

    /// Where it listens.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The streams that were asked for, each with its metadata.
    pub fn asked(&self) -> Vec<(MetadataMap, WatchEventsRequest)> {
        self.shared.state().asked.clone()
    }

    /// The pieces that were sent to be imported.
    pub fn imported(&self) -> Vec<ImportLicensesRequest> {
        self.shared.state().imported.clone()
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send + 'a>>;

/// Methods that no command calls.
macro_rules! uncalled {
    ($($name:ident: $request:ty => $answer:ty),+ $(,)?) => {
        $(
            fn $name<'a, 'b>(&'a self, _: Request<$request>) -> Answer<'b, $answer>
            where
                'a: 'b,
                Self: 'b,
            {
                Box::pin(std::future::ready(Err(Status::unimplemented("not of the stand-in"))))
            }
        )+
    };
}

impl WebhookService for Shared {
    type WatchEventsStream = BoxStream<WatchEventsResponse>;

    fn watch_events<'a, 'b>(&'a self, request: Request<WatchEventsRequest>) -> Answer<'b, Self::WatchEventsStream>
    where
        'a: 'b,
        Self: 'b,
    {
        let (metadata, _, request) = request.into_parts();
        let mut state = self.state();
        state.asked.push((metadata, request));
        let answers: BoxStream<_> = match state.watches.pop_front() {
            Some(script) => Box::pin(stream::iter(script)),
            None => Box::pin(stream::iter([ready()]).chain(stream::pending())),
        };
        Box::pin(std::future::ready(Ok(Response::new(answers))))
    }

    uncalled! {
        create_webhook: CreateWebhookRequest => CreateWebhookResponse,
        get_webhook: GetWebhookRequest => GetWebhookResponse,
        list_webhooks: ListWebhooksRequest => ListWebhooksResponse,
        update_webhook: UpdateWebhookRequest => UpdateWebhookResponse,
        delete_webhook: DeleteWebhookRequest => DeleteWebhookResponse,
        list_deliveries: ListDeliveriesRequest => ListDeliveriesResponse,
        get_delivery: GetDeliveryRequest => GetDeliveryResponse,
        replay_delivery: ReplayDeliveryRequest => ReplayDeliveryResponse,
        recover_deliveries: RecoverDeliveriesRequest => RecoverDeliveriesResponse,
        test_webhook: TestWebhookRequest => TestWebhookResponse,
        rotate_webhook_secret: RotateWebhookSecretRequest => RotateWebhookSecretResponse,
    }
}

impl LicensingService for Shared {
    type ExportLicensesStream = BoxStream<ExportLicensesResponse>;
    type ImportLicensesStream = BoxStream<ImportLicensesResponse>;

    fn export_licenses<'a, 'b>(&'a self, _: Request<ExportLicensesRequest>) -> Answer<'b, Self::ExportLicensesStream>
    where
        'a: 'b,
        Self: 'b,
    {
        let answers: BoxStream<_> = Box::pin(stream::iter(self.state().export.clone()));
        Box::pin(std::future::ready(Ok(Response::new(answers))))
    }

    fn import_licenses<'a, 'b>(
        &'a self,
        request: Request<tonic::Streaming<ImportLicensesRequest>>,
    ) -> Answer<'b, Self::ImportLicensesStream>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async move {
            let mut pieces = request.into_inner();
            let mut file = Vec::new();
            while let Some(piece) = pieces.message().await? {
                file.extend_from_slice(&piece.data);
                self.state().imported.push(piece);
            }
            let file = String::from_utf8_lossy(&file).into_owned();
            let piece = |data: String| Ok(ImportLicensesResponse { data: data.into(), content_type: String::new() });
            let mut report: Script<ImportLicensesResponse> = (2..)
                .zip(file.lines().skip(1))
                .map(|(line, text)| {
                    let data = if text.contains("bad") {
                        format!("{{\"line\":{line},\"status\":\"failed\",\"error\":{{\"code\":\"BAD\"}}}}\n")
                    } else {
                        format!("{{\"line\":{line},\"status\":\"created\"}}\n")
                    };
                    piece(data)
                })
                .collect();
            // A file that ends with `cut` is reported on no further.
            if !file.ends_with("cut\n") {
                report.push(piece(format!("{{\"lines\":{}}}\n", report.len())));
            }
            let answers: Self::ImportLicensesStream = Box::pin(stream::iter(report));
            Ok(Response::new(answers))
        })
    }

    uncalled! {
        create_license: CreateLicenseRequest => CreateLicenseResponse,
        get_license: GetLicenseRequest => GetLicenseResponse,
        list_licenses: ListLicensesRequest => ListLicensesResponse,
        update_license: UpdateLicenseRequest => UpdateLicenseResponse,
        revoke_license: RevokeLicenseRequest => RevokeLicenseResponse,
        reinstate_license: ReinstateLicenseRequest => ReinstateLicenseResponse,
        delete_activation: DeleteActivationRequest => DeleteActivationResponse,
        batch_create_licenses: BatchCreateLicensesRequest => BatchCreateLicensesResponse,
    }
}
