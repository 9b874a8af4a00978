//! `ProductApiKeyService`: key pairs of products.

use paperkey_kit::{
    clock::Clock,
    ids::new_id,
    principal::Caller,
    values::{Page, timestamp},
};
use paperkey_proto::auth::v1::{
    CreateProductApiKeyRequest, CreateProductApiKeyResponse, DeleteProductApiKeyRequest, DeleteProductApiKeyResponse,
    ListProductApiKeysRequest, ListProductApiKeysResponse, ProductApiKey,
    product_api_key_service_server::ProductApiKeyService,
};
use tonic::{Request, Response, Status};

use super::known;
use crate::{
    domain::{
        Fault,
        key::{NewPair, Pair},
    },
    store::{Act, Store},
};

/// The handlers.
#[derive(Debug)]
pub(crate) struct Handler {
    pub(crate) store: Store,
    pub(crate) clock: Clock,
}

#[tonic::async_trait]
impl ProductApiKeyService for Handler {
    async fn create_product_api_key(
        &self,
        request: Request<CreateProductApiKeyRequest>,
    ) -> Result<Response<CreateProductApiKeyResponse>, Status> {
        let caller = Caller::of(&request)?;
        let product_id = known(request.into_inner().product_id, Fault::NoSuchProduct)?;
        let pair = NewPair::generate(new_id("key", &self.clock));
        let secret_key = pair.secret_key.clone();
        let answer = move |pair: &Pair| CreateProductApiKeyResponse {
            api_key: Some(encode(pair.clone())),
            secret_key: secret_key.expose().to_owned(),
        };
        let act = Act::by(&caller, "/paperkey.auth.v1.ProductApiKeyService/CreateProductApiKey");
        let act = act.answered_by(answer.clone());
        let pair = self.store.of(caller.tenant()?).create_pair(product_id, pair, act).await?;
        Ok(Response::new(answer(&pair)))
    }

    async fn list_product_api_keys(
        &self,
        request: Request<ListProductApiKeysRequest>,
    ) -> Result<Response<ListProductApiKeysResponse>, Status> {
        let caller = Caller::of(&request)?;
        let request = request.into_inner();
        let page = Page::new(request.page_size, &request.page_token)?;
        let product_id = known(request.product_id, Fault::NoSuchProduct)?;
        let pairs = self.store.of(caller.tenant()?).pairs(product_id, &page).await?;
        let (pairs, next_page_token) = page.cut(pairs, |pair| &pair.id);
        let api_keys = pairs.into_iter().map(encode).collect();
        Ok(Response::new(ListProductApiKeysResponse { api_keys, next_page_token }))
    }

    async fn delete_product_api_key(
        &self,
        request: Request<DeleteProductApiKeyRequest>,
    ) -> Result<Response<DeleteProductApiKeyResponse>, Status> {
        let caller = Caller::of(&request)?;
        let act = Act::by(&caller, "/paperkey.auth.v1.ProductApiKeyService/DeleteProductApiKey");
        let request = request.into_inner();
        let product_id = known(request.product_id, Fault::NoSuchProduct)?;
        let key_id = known(request.key_id, Fault::NoSuchKey)?;
        let revoked_by = caller.principal.user_id.clone();
        self.store.of(caller.tenant()?).revoke_pair(product_id, key_id, revoked_by, act).await?;
        Ok(Response::new(DeleteProductApiKeyResponse {}))
    }
}

/// A pair as the contract has it.
pub(super) fn encode(pair: Pair) -> ProductApiKey {
    ProductApiKey {
        id: pair.id,
        product_id: pair.product_id,
        mode: pair.mode.into(),
        public_key: pair.public_key,
        secret_key_prefix: pair.secret_prefix,
        created_at: Some(timestamp(pair.created_at_ms)),
        revoked_at: pair.revoked_at_ms.map(timestamp),
        revoked_by: pair.revoked_by,
    }
}
