//! The rpcs of products.

use paperkey_kit::{
    channel::Channel,
    principal::{Caller, Signer},
    values::{self, Mask, Page},
};
use paperkey_proto::{
    Error,
    auth::v1::{ProvisionProductRequest, credential_service_client::CredentialServiceClient},
    catalog::v1::{
        CreateProductRequest, CreateProductResponse, DeleteProductRequest, DeleteProductResponse, GetProductRequest,
        GetProductResponse, ListProductsRequest, ListProductsResponse, NewApiKey, Price as PriceMessage,
        Product as ProductMessage, UpdateProductRequest, UpdateProductResponse, catalog_service_server::CatalogService,
    },
};
use tonic::{Request, Response, Status};

use crate::{
    NAME,
    domain::product::{Changes, Details, Price, Product},
    store::{Act, Store, TenantStore},
};

const CREATE: &str = "/paperkey.catalog.v1.CatalogService/CreateProduct";
const UPDATE: &str = "/paperkey.catalog.v1.CatalogService/UpdateProduct";
const DELETE: &str = "/paperkey.catalog.v1.CatalogService/DeleteProduct";

/// What an update may name. The id is among them, since it says which product, and is not changed.
const CHANGEABLE: [&str; 8] = ["id", "name", "description", "sku", "price", "unit", "active", "metadata"];

/// The service, as tonic calls it.
pub(crate) struct Products {
    store: Store,
    auth: Channel,
    signer: Signer,
}

impl Products {
    pub(crate) fn new(store: Store, auth: Channel, signer: Signer) -> Self {
        Self { store, auth, signer }
    }

    fn of<T>(&self, request: Request<T>) -> Result<(Caller, TenantStore, T), Error> {
        let caller = Caller::of(&request)?;
        let store = self.store.of(caller.tenant()?);
        Ok((caller, store, request.into_inner()))
    }
}

impl Products {
    /// Makes the product of a draft. The keys first: a pair without a product opens nothing, is never shown and goes
    /// with the draft; a product without one would be a product that its owner cannot use.
    async fn complete(
        &self,
        caller: &Caller,
        store: &TenantStore,
        id: String,
        details: Details,
    ) -> Result<CreateProductResponse, Error> {
        let tenant = caller.tenant()?;
        let way = self.auth.as_service(NAME, self.signer.clone(), Some(&tenant)).serving(caller);
        let provision =
            ProvisionProductRequest { product_id: id.clone(), team_id: tenant.team_id, mode: tenant.mode.into() };
        let pair = CredentialServiceClient::new(way)
            .provision_product(provision)
            .await
            .map_err(|status| Error::from_status(&status))?
            .into_inner();
        let api_key = NewApiKey { api_key: pair.api_key, secret_key: pair.secret_key };
        let answer = move |product: &Product| CreateProductResponse {
            product: Some(encode(product.clone())),
            api_key: Some(api_key.clone()),
        };
        let product = store.create(id, details, Act::by(caller, CREATE).answered_by(answer.clone())).await?;
        Ok(answer(&product))
    }
}

#[tonic::async_trait]
impl CatalogService for Products {
    async fn create_product(
        &self,
        request: Request<CreateProductRequest>,
    ) -> Result<Response<CreateProductResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let details = details(request)?;
        let id = store.draft().await.map_err(Error::from)?;
        match self.complete(&caller, &store, id.clone(), details).await {
            Ok(created) => Ok(Response::new(created)),
            Err(error) => {
                // The keys may be there, of a product that is not. If this fails too, the sweep does it.
                if let Err(failure) = store.abandon(id).await {
                    let error = Error::from(failure);
                    tracing::warn!(%error, "the draft of a product is not taken back yet");
                }
                Err(error.into())
            }
        }
    }

    async fn get_product(&self, request: Request<GetProductRequest>) -> Result<Response<GetProductResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        caller.must_reach_product(&request.id)?;
        let product = store.get(request.id).await.map_err(Error::from)?;
        Ok(Response::new(GetProductResponse { product: Some(encode(product)) }))
    }

    async fn list_products(
        &self,
        request: Request<ListProductsRequest>,
    ) -> Result<Response<ListProductsResponse>, Status> {
        let (_, store, request) = self.of(request)?;
        let page = Page::new(request.page_size, &request.page_token)?;
        let (products, next_page_token) = store.list(page).await.map_err(Error::from)?;
        let products = products.into_iter().map(encode).collect();
        Ok(Response::new(ListProductsResponse { products, next_page_token }))
    }

    async fn update_product(
        &self,
        request: Request<UpdateProductRequest>,
    ) -> Result<Response<UpdateProductResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        caller.must_reach_product(&request.id)?;
        let id = request.id.clone();
        let changes = changes(request)?;
        let product = store.update(id, changes, Act::by(&caller, UPDATE)).await.map_err(Error::from)?;
        Ok(Response::new(UpdateProductResponse { product: Some(encode(product)) }))
    }

    async fn delete_product(
        &self,
        request: Request<DeleteProductRequest>,
    ) -> Result<Response<DeleteProductResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        caller.must_reach_product(&request.id)?;
        store.delete(request.id, Act::by(&caller, DELETE)).await.map_err(Error::from)?;
        Ok(Response::new(DeleteProductResponse {}))
    }
}

fn price(message: PriceMessage) -> Result<Price, Error> {
    Price::new(message.amount, message.currency)
}

fn details(request: CreateProductRequest) -> Result<Details, Error> {
    let details = Details {
        name: request.name,
        description: request.description,
        sku: request.sku,
        price: request.price.map(price).transpose()?,
        unit: request.unit,
        active: request.active.unwrap_or(true),
        metadata: request.metadata.map(|metadata| values::metadata("metadata", &metadata)).transpose()?,
    };
    details.checked()
}

fn changes(request: UpdateProductRequest) -> Result<Changes, Error> {
    let mask = Mask::new(request.update_mask, &CHANGEABLE)?;
    let price = request.price.map(price).transpose()?;
    Ok(Changes {
        name: mask.required_change("name", request.name)?,
        description: mask.change("description", request.description),
        sku: mask.change("sku", request.sku),
        price: mask.change("price", price),
        unit: mask.change("unit", request.unit),
        active: mask.required_change("active", request.active)?,
        metadata: mask.change("metadata", request.metadata),
    })
}

fn encode(product: Product) -> ProductMessage {
    let Product { id, details, created_at_ms, updated_at_ms } = product;
    ProductMessage {
        id,
        name: details.name,
        description: details.description,
        sku: details.sku,
        price: details.price.map(|price| PriceMessage { amount: price.amount, currency: price.currency }),
        unit: details.unit,
        active: details.active,
        metadata: details.metadata.as_ref().and_then(values::struct_of),
        created_at: Some(values::timestamp(created_at_ms)),
        updated_at: Some(values::timestamp(updated_at_ms)),
    }
}
