//! What catalog says of products.

use paperkey_kit::{
    channel::Channel,
    principal::{Caller, Signer},
};
use paperkey_proto::{
    Error,
    catalog::v1::{GetProductRequest, catalog_service_client::CatalogServiceClient},
};

use crate::{
    NAME,
    domain::{Fault, could_be_id},
    store::TenantStore,
};

/// Asks catalog, once for each product.
pub(crate) struct Products {
    catalog: Channel,
    signer: Signer,
}

impl Products {
    pub(crate) fn new(catalog: Channel, signer: Signer) -> Self {
        Self { catalog, signer }
    }

    /// Refuses a product that the caller's team does not have.
    pub(crate) async fn must_exist(&self, store: &TenantStore, caller: &Caller, id: &str) -> Result<(), Error> {
        caller.must_reach_product(id)?;
        if !could_be_id(id) {
            return Err(Fault::NoSuchProduct.into());
        }
        if store.knows_product(id) {
            return Ok(());
        }
        let asked = store.before_learning();
        let way = self.catalog.as_service(NAME, self.signer.clone(), Some(&caller.tenant()?)).serving(caller);
        let request = GetProductRequest { id: id.to_owned() };
        CatalogServiceClient::new(way).get_product(request).await.map_err(|status| Error::from_status(&status))?;
        store.learn_product(id, asked);
        Ok(())
    }
}
