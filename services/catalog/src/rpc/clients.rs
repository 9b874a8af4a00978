//! The rpcs of clients.

use paperkey_kit::{
    principal::Caller,
    values::{self, Mask, Page},
};
use paperkey_proto::{
    Error,
    catalog::v1::{
        Client as ClientMessage, CreateClientRequest, CreateClientResponse, DeleteClientRequest, DeleteClientResponse,
        GetClientRequest, GetClientResponse, ListClientsRequest, ListClientsResponse, UpdateClientRequest,
        UpdateClientResponse, client_service_server::ClientService,
    },
};
use tonic::{Request, Response, Status};

use crate::{
    domain::client::{Changes, Client, Details},
    store::{Act, Store, TenantStore},
};

const CREATE: &str = "/paperkey.catalog.v1.ClientService/CreateClient";
const UPDATE: &str = "/paperkey.catalog.v1.ClientService/UpdateClient";
const DELETE: &str = "/paperkey.catalog.v1.ClientService/DeleteClient";

/// What an update may name. The id is among them, since it says which client, and is not changed.
const CHANGEABLE: [&str; 5] = ["id", "name", "email", "company", "metadata"];

/// The service, as tonic calls it.
pub(crate) struct Clients {
    store: Store,
}

impl Clients {
    pub(crate) fn new(store: Store) -> Self {
        Self { store }
    }

    fn of<T>(&self, request: Request<T>) -> Result<(Caller, TenantStore, T), Error> {
        let caller = Caller::of(&request)?;
        let store = self.store.of(caller.tenant()?);
        Ok((caller, store, request.into_inner()))
    }
}

#[tonic::async_trait]
impl ClientService for Clients {
    async fn create_client(
        &self,
        request: Request<CreateClientRequest>,
    ) -> Result<Response<CreateClientResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let details = details(request)?;
        let answer = |client: &Client| CreateClientResponse { client: Some(encode(client.clone())) };
        let act = Act::by(&caller, CREATE).answered_by(answer);
        let client = store.create_client(details, act).await.map_err(Error::from)?;
        Ok(Response::new(answer(&client)))
    }

    async fn get_client(&self, request: Request<GetClientRequest>) -> Result<Response<GetClientResponse>, Status> {
        let (_, store, request) = self.of(request)?;
        let client = store.client(&request.id).await.map_err(Error::from)?;
        Ok(Response::new(GetClientResponse { client: Some(encode(client)) }))
    }

    async fn list_clients(
        &self,
        request: Request<ListClientsRequest>,
    ) -> Result<Response<ListClientsResponse>, Status> {
        let (_, store, request) = self.of(request)?;
        let page = Page::new(request.page_size, &request.page_token)?;
        let (clients, next_page_token) = store.clients(request.email, page).await.map_err(Error::from)?;
        let clients = clients.into_iter().map(encode).collect();
        Ok(Response::new(ListClientsResponse { clients, next_page_token }))
    }

    async fn update_client(
        &self,
        request: Request<UpdateClientRequest>,
    ) -> Result<Response<UpdateClientResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        let id = request.id.clone();
        let changes = changes(request)?;
        let client = store.update_client(&id, changes, Act::by(&caller, UPDATE)).await.map_err(Error::from)?;
        Ok(Response::new(UpdateClientResponse { client: Some(encode(client)) }))
    }

    async fn delete_client(
        &self,
        request: Request<DeleteClientRequest>,
    ) -> Result<Response<DeleteClientResponse>, Status> {
        let (caller, store, request) = self.of(request)?;
        store.delete_client(&request.id, Act::by(&caller, DELETE)).await.map_err(Error::from)?;
        Ok(Response::new(DeleteClientResponse {}))
    }
}

fn details(request: CreateClientRequest) -> Result<Details, Error> {
    let details = Details {
        name: request.name,
        email: request.email,
        company: request.company,
        metadata: request.metadata.map(|metadata| values::metadata("metadata", &metadata)).transpose()?,
    };
    details.checked()
}

fn changes(request: UpdateClientRequest) -> Result<Changes, Error> {
    let mask = Mask::new(request.update_mask, &CHANGEABLE)?;
    Ok(Changes {
        name: mask.required_change("name", request.name)?,
        email: mask.change("email", request.email),
        company: mask.change("company", request.company),
        metadata: mask.change("metadata", request.metadata),
    })
}

fn encode(client: Client) -> ClientMessage {
    let Client { id, details, created_at_ms, updated_at_ms } = client;
    ClientMessage {
        id,
        name: details.name,
        email: details.email,
        company: details.company,
        metadata: details.metadata.as_ref().and_then(values::struct_of),
        created_at: Some(values::timestamp(created_at_ms)),
        updated_at: Some(values::timestamp(updated_at_ms)),
    }
}
