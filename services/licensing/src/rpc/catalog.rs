//! What catalog says of products and clients.

use std::{
    collections::{BTreeSet, HashMap},
    future::Future,
};

use futures_util::{StreamExt as _, stream};
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
    domain::{Fault, could_be_id, license::Draft},
    store::TenantStore,
};

/// How many questions are asked at a time.
const AT_A_TIME: usize = 8;
/// Products, and clients, whose look-up is remembered for the licences to come.
const REMEMBERED: usize = 10_000;

/// Which products and clients there are, as far as many licences that are issued in one call have needed to know.
#[derive(Debug, Default)]
pub(crate) struct Known {
    products: HashMap<String, bool>,
    clients: HashMap<String, bool>,
}

impl Known {
    /// What catalog has not, of what a licence names.
    pub(crate) fn missing(&self, draft: &Draft) -> Option<Fault> {
        let lacks = |known: &HashMap<String, bool>, id: &str| !known.get(id).copied().unwrap_or(false);
        if lacks(&self.products, &draft.product_id) {
            return Some(Fault::NoSuchProduct);
        }
        let client_id = draft.terms.client_id.as_deref();
        client_id.is_some_and(|id| lacks(&self.clients, id)).then_some(Fault::NoSuchClient)
    }
}

/// Asks catalog, once for each product, and each time that a licence is to name a client.
#[derive(Clone)]
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
    /// Finds out about all that some licences name: about each product and client once.
    pub(crate) async fn look_up(
        &self,
        store: &TenantStore,
        caller: &Caller,
        known: &mut Known,
        drafts: impl IntoIterator<Item = &Draft>,
    ) -> Result<(), Error> {
        // Forgotten before and not after, so that what these licences name is there.
        for remembered in [&mut known.products, &mut known.clients] {
            if remembered.len() > REMEMBERED {
                remembered.clear();
            }
        }
        let (mut products, mut clients) = (BTreeSet::new(), BTreeSet::new());
        for draft in drafts {
            products.insert(draft.product_id.clone());
            clients.extend(draft.terms.client_id.clone());
        }
        products.retain(|id| !known.products.contains_key(id));
        clients.retain(|id| !known.clients.contains_key(id));
        let products = products.into_iter().map(|id| async move {
            let outcome = self.must_have_product(store, caller, &id).await;
            (id, outcome)
        });
        ask(&mut known.products, products, Reason::NotFound).await?;
        let clients = clients.into_iter().map(|id| async move {
            let outcome = self.must_have_client(caller, Some(&id)).await;
            (id, outcome)
        });
        ask(&mut known.clients, clients, Reason::ValidationFailed).await
    }
}

/// Asks some at a time and notes the answers. What says that there is none is told from what says nothing.
async fn ask<F>(
    known: &mut HashMap<String, bool>,
    questions: impl Iterator<Item = F>,
    none: Reason,
) -> Result<(), Error>
where
    F: Future<Output = (String, Result<(), Error>)>,
{
    let mut answers = std::pin::pin!(stream::iter(questions).buffer_unordered(AT_A_TIME));
    while let Some((id, answer)) = answers.next().await {
        let there_is = match answer {
            Ok(()) => true,
            Err(error) if error.reason() == none => false,
            Err(error) => return Err(error),
        };
        known.insert(id, there_is);
    }
    Ok(())
}
