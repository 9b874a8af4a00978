//! The rpcs of licences, for the vendor.

use futures_util::stream::{self, BoxStream};
use paperkey_kit::{
    principal::Caller,
    values::{self, Mask, Page},
};
use paperkey_proto::{
    Error,
    licensing::v1::{
        Activation as ActivationMessage, BatchCreateLicensesRequest, BatchCreateLicensesResponse, CreateLicenseRequest,
        CreateLicenseResponse, DeleteActivationRequest, DeleteActivationResponse, ExportLicensesRequest,
        ExportLicensesResponse, GetLicenseRequest, GetLicenseResponse, ImportLicensesRequest, ImportLicensesResponse,
        License as LicenseMessage, LicenseStatus, ListLicensesRequest, ListLicensesResponse, ReinstateLicenseRequest,
        ReinstateLicenseResponse, RevokeLicenseRequest, RevokeLicenseResponse, UpdateLicenseRequest,
        UpdateLicenseResponse, licensing_service_server::LicensingService,
    },
};
use prost_types::Timestamp;
use tonic::{Request, Response, Status, Streaming};

use super::{Catalog, batch, catalog::Known, count, export::Export, import::Import, status, time};
use crate::{
    domain::{
        file::Format,
        license::{Activation, Changes, DEFAULT_MAX_ACTIVATIONS, License, Status as Standing, Terms},
    },
    store::{Act, Filter, Store, TenantStore},
};

const CREATE: &str = "/paperkey.licensing.v1.LicensingService/CreateLicense";
const BATCH_CREATE: &str = "/paperkey.licensing.v1.LicensingService/BatchCreateLicenses";
const UPDATE: &str = "/paperkey.licensing.v1.LicensingService/UpdateLicense";
const REVOKE: &str = "/paperkey.licensing.v1.LicensingService/RevokeLicense";
const REINSTATE: &str = "/paperkey.licensing.v1.LicensingService/ReinstateLicense";
const DELETE_ACTIVATION: &str = "/paperkey.licensing.v1.LicensingService/DeleteActivation";

/// What a creation may name.
const GIVEN: [&str; 6] = ["product_id", "email", "client_id", "max_activations", "expires_at", "metadata"];
/// What an update may name. The id is among them, since it says which licence, and is not changed.
const CHANGEABLE: [&str; 6] = ["id", "email", "client_id", "max_activations", "expires_at", "metadata"];

/// The service, as tonic calls it.
pub(crate) struct Licenses {
    store: Store,
    catalog: Catalog,
}

impl Licenses {
    pub(crate) fn new(store: Store, catalog: Catalog) -> Self {
        Self { store, catalog }
    }

    fn of<T>(&self, request: Request<T>) -> Result<(Caller, TenantStore, T), Error> {
        let caller = Caller::of(&request)?;
        let store = self.store.of(caller.tenant()?).within(caller.product_id());
        Ok((caller, store, request.into_inner()))
    }

    fn encode(&self, license: License) -> LicenseMessage {
        encode(license, self.store.clock().now_ms())
    }
}

#[tonic::async_trait]
impl LicensingService for Licenses {
    async fn create_license(
        &self,
        request: Request<CreateLicenseRequest>,
    ) -> Result<Response<CreateLicenseResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let product_id = request.product_id.clone();
        let terms = terms(request)?;
        self.catalog.must_have_product(&store, &caller, &product_id).await?;
        self.catalog.must_have_client(&caller, terms.client_id.as_deref()).await?;
        let now_ms = self.store.clock().now_ms();
        let answer = move |made: &License| CreateLicenseResponse { license: Some(encode(made.clone(), now_ms)) };
        let act = Act::by(&caller, CREATE).answered_by(answer);
        let license = store.create(product_id, terms, act).await.map_err(Error::from)?;
        Ok(Response::new(answer(&license)))
    }

    async fn get_license(&self, request: Request<GetLicenseRequest>) -> Result<Response<GetLicenseResponse>, Status> {
        let (_, store, request) = self.of(request)?;
        let (license, activations) = store.get(&request.id).await.map_err(Error::from)?;
        Ok(Response::new(GetLicenseResponse {
            license: Some(self.encode(license)),
            activations: activations.into_iter().map(activation).collect(),
        }))
    }

    async fn list_licenses(
        &self,
        request: Request<ListLicensesRequest>,
    ) -> Result<Response<ListLicensesResponse>, Status> {
        let (_, store, request) = self.of(request)?;
        let page = Page::new(request.page_size, &request.page_token)?;
        let status = standing(request.status(), request.status)?;
        let ListLicensesRequest { product_id, email, client_id, query, .. } = request;
        let filter = filter(product_id, status, email, client_id, query);
        let (licenses, next_page_token) = store.list(filter, page).await.map_err(Error::from)?;
        let licenses = licenses.into_iter().map(|license| self.encode(license)).collect();
        Ok(Response::new(ListLicensesResponse { licenses, next_page_token }))
    }

    async fn update_license(
        &self,
        request: Request<UpdateLicenseRequest>,
    ) -> Result<Response<UpdateLicenseResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let id = request.id.clone();
        let changes = changes(request)?;
        let client_id = changes.client_id.as_ref().and_then(Option::as_deref);
        if let Err(error) = self.catalog.must_have_client(&caller, client_id).await {
            // A licence that is not there is missed before a client that is not.
            store.get(&id).await.map_err(Error::from)?;
            return Err(error.into());
        }
        let license = store.update(&id, changes, Act::by(&caller, UPDATE)).await.map_err(Error::from)?;
        Ok(Response::new(UpdateLicenseResponse { license: Some(self.encode(license)) }))
    }

    async fn revoke_license(
        &self,
        request: Request<RevokeLicenseRequest>,
    ) -> Result<Response<RevokeLicenseResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let now_ms = self.store.clock().now_ms();
        let answer = move |now: &License| RevokeLicenseResponse { license: Some(encode(now.clone(), now_ms)) };
        let act = Act::by(&caller, REVOKE).answered_by(answer);
        let license = store.revoke(&request.id, act).await.map_err(Error::from)?;
        Ok(Response::new(answer(&license)))
    }

    async fn reinstate_license(
        &self,
        request: Request<ReinstateLicenseRequest>,
    ) -> Result<Response<ReinstateLicenseResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let now_ms = self.store.clock().now_ms();
        let answer = move |now: &License| ReinstateLicenseResponse { license: Some(encode(now.clone(), now_ms)) };
        let act = Act::by(&caller, REINSTATE).answered_by(answer);
        let license = store.reinstate(&request.id, act).await.map_err(Error::from)?;
        Ok(Response::new(answer(&license)))
    }

    async fn delete_activation(
        &self,
        request: Request<DeleteActivationRequest>,
    ) -> Result<Response<DeleteActivationResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let act = Act::by(&caller, DELETE_ACTIVATION);
        let deleted = store.delete_activation(&request.license_id, &request.activation_id, act).await;
        deleted.map_err(Error::from)?;
        Ok(Response::new(DeleteActivationResponse {}))
    }

    async fn batch_create_licenses(
        &self,
        request: Request<BatchCreateLicensesRequest>,
    ) -> Result<Response<BatchCreateLicensesResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let drafts = batch::drafts(request)?;
        let mut known = Known::default();
        self.catalog.look_up(&store, &caller, &mut known, &drafts).await?;
        batch::must_have_all(&known, &drafts)?;
        let now_ms = self.store.clock().now_ms();
        let answer = move |made: &Vec<License>| BatchCreateLicensesResponse {
            licenses: made.iter().map(|license| encode(license.clone(), now_ms)).collect(),
        };
        let act = Act::by(&caller, BATCH_CREATE).answered_by(answer);
        let licenses = store.create_all(drafts, act).await.map_err(Error::from)?;
        Ok(Response::new(answer(&licenses)))
    }

    type ExportLicensesStream = BoxStream<'static, Result<ExportLicensesResponse, Status>>;

    async fn export_licenses(
        &self,
        request: Request<ExportLicensesRequest>,
    ) -> Result<Response<Self::ExportLicensesStream>, Status> {
        let (_, store, request) = self.of(request)?;
        let format = Format::read(&request.format)?;
        let status = standing(request.status(), request.status)?;
        let ExportLicensesRequest { product_id, email, client_id, query, .. } = request;
        let filter = filter(product_id, status, email, client_id, query);
        let export = Export::new(store, filter, format, self.store.clock().now_ms());
        // Read as it is taken: a slow client holds one window.
        let pieces = stream::try_unfold(export, |mut export| async move {
            let piece = export.piece().await?;
            Ok(piece.map(|piece| (piece, export)))
        });
        Ok(Response::new(Box::pin(pieces)))
    }

    type ImportLicensesStream = BoxStream<'static, Result<ImportLicensesResponse, Status>>;

    async fn import_licenses(
        &self,
        request: Request<Streaming<ImportLicensesRequest>>,
    ) -> Result<Response<Self::ImportLicensesStream>, Status> {
        let (caller, store, stream) = self.of(request)?;
        let import = Import::begin(store, self.catalog.clone(), caller, stream).await?;
        let pieces = stream::try_unfold(import, |mut import| async move {
            let piece = import.piece().await?;
            Ok(piece.map(|piece| (piece, import)))
        });
        Ok(Response::new(Box::pin(pieces)))
    }
}

fn expiry(time: Option<Timestamp>) -> Result<Option<i64>, Error> {
    time.map(|time| values::time_ms("expires_at", &time)).transpose()
}

pub(super) fn terms(request: CreateLicenseRequest) -> Result<Terms, Error> {
    let mask = Mask::new(request.field_mask, &GIVEN)?;
    let max_activations = mask.change("max_activations", request.max_activations.map(i64::from));
    let terms = Terms {
        email: request.email,
        client_id: request.client_id,
        max_activations: max_activations.unwrap_or(Some(DEFAULT_MAX_ACTIVATIONS)),
        expires_at_ms: expiry(request.expires_at)?,
        metadata: request.metadata.map(|metadata| values::metadata("metadata", &metadata)).transpose()?,
    };
    terms.checked()
}

fn changes(request: UpdateLicenseRequest) -> Result<Changes, Error> {
    let mask = Mask::new(request.update_mask, &CHANGEABLE)?;
    Ok(Changes {
        email: mask.change("email", request.email),
        client_id: mask.change("client_id", request.client_id),
        max_activations: mask.change("max_activations", request.max_activations.map(i64::from)),
        expires_at_ms: mask.change("expires_at", expiry(request.expires_at)?),
        metadata: mask.change("metadata", request.metadata),
    })
}

/// The status that a filter names. The number tells one that is not known from none.
fn standing(status: LicenseStatus, number: i32) -> Result<Option<Standing>, Error> {
    match status {
        LicenseStatus::Unspecified if number == 0 => Ok(None),
        LicenseStatus::Unspecified => Err(Error::field("status", "must be active, expired or revoked")),
        LicenseStatus::Active => Ok(Some(Standing::Active)),
        LicenseStatus::Expired => Ok(Some(Standing::Expired)),
        LicenseStatus::Revoked => Ok(Some(Standing::Revoked)),
    }
}

fn filter(
    product_id: Option<String>,
    status: Option<Standing>,
    email: Option<String>,
    client_id: Option<String>,
    query: Option<String>,
) -> Filter {
    // An empty search field finds what no search field finds.
    let query = query.filter(|query| !query.is_empty());
    Filter { product_id, status, email, client_id, query }
}

fn encode(license: License, now_ms: i64) -> LicenseMessage {
    let License { id, product_id, key, email, client_id, standing, metadata, created_at_ms, updated_at_ms } = license;
    LicenseMessage {
        id,
        product_id,
        key: key.map(|key| key.to_string()).unwrap_or_default(),
        status: status(standing.status(now_ms)).into(),
        email,
        client_id,
        max_activations: standing.max_activations.map(count),
        activations_count: count(standing.activations_count),
        expires_at: time(standing.expires_at_ms),
        metadata: metadata.as_ref().and_then(values::struct_of),
        created_at: time(Some(created_at_ms)),
        updated_at: time(Some(updated_at_ms)),
        revoked_at: time(standing.revoked_at_ms),
    }
}

fn activation(activation: Activation) -> ActivationMessage {
    ActivationMessage {
        id: activation.id,
        fingerprint: activation.fingerprint,
        name: activation.name,
        created_at: time(Some(activation.created_at_ms)),
        last_check_at: time(Some(activation.last_check_at_ms)),
    }
}
