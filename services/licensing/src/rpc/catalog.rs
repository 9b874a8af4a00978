//! What catalog says of products and clients.

use paperkey_kit::{
    channel::Channel,
    principal::{Caller, Signer},
};
use paperkey_proto::{
    Error,
    catalog::v1::{
        GetClientRequest, GetProductRequest, catalog_service_client::CatalogServiceClient,
        client_service_client::ClientServiceClient,
    },
    errors::v1::Reason,
};

use crate::{
    NAME,
    domain::{Fault, could_be_id},
    store::TenantStore,
};

/// Asks catalog, once for each product, and each time that a licence is to name a client.
pub(crate) struct Catalog {
    catalog: Channel,
    signer: Signer,
}

impl Catalog {
    pub(crate) fn new(catalog: Channel, signer: Signer) -> Self {
        Self { catalog, signer }
    }

    /// Refuses a product that the caller's team does not have.
    pub(crate) async fn must_have_product(&self, store: &TenantStore, caller: &Caller, id: &str) -> Result<(), Error> {
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

    /// Refuses a client that the caller's team does not have, as a value that is at fault.
    pub(crate) async fn must_have_client(&self, caller: &Caller, id: Option<&str>) -> Result<(), Error> {
        let Some(id) = id else { return Ok(()) };
        if !could_be_id(id) {
            return Err(Fault::NoSuchClient.into());
        }
        let way = self.catalog.as_service(NAME, self.signer.clone(), Some(&caller.tenant()?)).serving(caller);
        let request = GetClientRequest { id: id.to_owned() };
        match ClientServiceClient::new(way).get_client(request).await {
            Ok(_) => Ok(()),
            Err(status) => Err(match Error::from_status(&status) {
                error if error.reason() == Reason::NotFound => Fault::NoSuchClient.into(),
                error => error,
            }),
        }
    }
}
