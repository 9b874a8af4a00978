//! A team with one of everything, and requests made from the contract.

use std::collections::BTreeMap;

use bytes::Bytes;
use paperkey_proto::{
    catalog::v1::{
        CreateClientRequest, CreateClientResponse, GetClientRequest, ListClientsRequest, ListClientsResponse,
    },
    contract::{Method, Route},
};
use paperkey_tests::{
    Account, Api, License, Product, Receiver, grpc,
    people::{Webhook, text},
};
use prost::Message as _;
use prost_reflect::{DynamicMessage, Value as Proto};
use serde_json::{Value, json};

/// An id that is well-formed and nobody's.
pub(crate) const NOBODYS: &str = "prod_00000000000000000000000000";

/// A licence key that is whole and nobody's: the example of the specification.
pub(crate) const NOBODYS_LICENSE_KEY: &str = "K7WX9-M3NP4-H8TRC-DJ";

/// Somebody with one of everything.
pub(crate) struct World {
    pub(crate) owner: Account,
    pub(crate) product: Product,
    pub(crate) license: License,
    pub(crate) webhook: Webhook,
    pub(crate) team_webhook: Webhook,
    pub(crate) client_id: String,
    pub(crate) activation_id: String,
    pub(crate) delivery_id: String,
}

impl World {
    /// One of everything, in the mode in which that person works.
    pub(crate) async fn of(owner: Account, receiver: &Receiver) -> Self {
        let product = owner.create_product("App").await;
        let webhook = owner.subscribe(&product, receiver.url()).await;
        let license = owner.issue(&product, json!({"email": "customer@example.com", "maxActivations": 3})).await;
        let activated = owner.app(&product).activate(&license, "machine-1").await;
        let activation_id = text(activated.gives(200), "/activation/id");
        let deliveries = format!("/products/{}/webhooks/{}/deliveries", product.id, webhook.id);
        let delivery_id = paperkey_tests::eventually("there is a delivery", || async {
            owner.get(&deliveries).await.gives(200)["deliveries"][0]["id"].as_str().map(str::to_owned)
        })
        .await;
        let team_webhooks = format!("/teams/{}/webhooks", owner.team_id);
        let subscribed = json!({"url": receiver.url(), "events": ["api_key.created"]});
        let team_webhook = Webhook::of(owner.post(&team_webhooks, subscribed).await.gives(201));
        let client_id = create_client(&owner, "customer@example.com").await;
        Self { owner, product, license, webhook, team_webhook, client_id, activation_id, delivery_id }
    }

    /// The id that a variable or a field of a request stands for, of the product or of the team itself.
    pub(crate) fn id(&self, method: &Method, name: &str, of_team: bool) -> Option<String> {
        let id = match name {
            "id" if method.service.ends_with(".ClientService") => &self.client_id,
            "id" if method.owner == "catalog" => &self.product.id,
            "id" | "license_id" => &self.license.id,
            "client_id" => &self.client_id,
            "product_id" if of_team => return None,
            "product_id" => &self.product.id,
            "team_id" if of_team => &self.owner.team_id,
            "key_id" => &self.product.key_id,
            "webhook_id" if of_team => &self.team_webhook.id,
            "webhook_id" => &self.webhook.id,
            "delivery_id" => &self.delivery_id,
            "activation_id" => &self.activation_id,
            "license_key" => &self.license.key,
            _ => return None,
        };
        Some(id.clone())
    }

    /// The path of a route with the ids of this world.
    pub(crate) fn path(&self, method: &Method, route: &Route) -> String {
        let of_team = is_of_team(route);
        path(route, |name| self.id(method, name, of_team).unwrap_or_else(|| panic!("{} names {name}", method.path)))
    }

    /// Every id and key of this world.
    pub(crate) fn ids(&self) -> Vec<&str> {
        vec![
            &self.product.id,
            &self.product.key_id,
            &self.license.id,
            &self.license.key,
            &self.webhook.id,
            &self.team_webhook.id,
            &self.client_id,
            &self.activation_id,
            &self.delivery_id,
        ]
    }

    /// A request whose every id is one of this world, as the bytes of its message; of what belongs to the product, or
    /// to the team itself.
    pub(crate) fn message(&self, method: &Method, of_team: bool) -> Bytes {
        let mut message = DynamicMessage::new(method.descriptor.input());
        for field in method.descriptor.input().fields() {
            let text = match field.name() {
                "url" => Some("http://127.0.0.1:9/hook".to_owned()),
                "fingerprint" => Some("machine-2".to_owned()),
                name => self.id(method, name, of_team),
            };
            if field.name() == "since" {
                let since = field.kind().as_message().map(|timestamp| DynamicMessage::new(timestamp.clone()));
                message.set_field(&field, Proto::Message(since.expect("a time is a message")));
            } else if field.name() == "events" {
                let event = if of_team { "api_key.created" } else { "license.created" };
                message.set_field(&field, Proto::List(vec![Proto::String(event.to_owned())]));
            } else if let Some(text) = text {
                message.set_field(&field, Proto::String(text));
            }
        }
        message.encode_to_vec().into()
    }

    /// What a read of every part of this world answers, to see whether anything has changed.
    pub(crate) async fn everything(&self) -> BTreeMap<String, Value> {
        let product = format!("/products/{}", self.product.id);
        let webhook = format!("{product}/webhooks/{}", self.webhook.id);
        let team_webhooks = format!("/teams/{}/webhooks", self.owner.team_id);
        let paths = [
            format!("/licenses/{}", self.license.id),
            format!("{team_webhooks}/{}", self.team_webhook.id),
            team_webhooks,
            format!("{product}/api-keys"),
            format!("{product}/webhooks"),
            webhook,
            product,
            "/products".to_owned(),
            "/licenses".to_owned(),
        ];
        let mut everything = BTreeMap::new();
        for path in paths {
            let answer = self.owner.get(&path).await;
            everything.insert(path, answer.gives(200).clone());
        }
        let get = GetClientRequest { id: self.client_id.clone() };
        let client = grpc::web_call(&self.owner, GET_CLIENT, &get, false).await.message.expect("the client is there");
        everything.insert("the client".to_owned(), json!(client.to_vec()));
        everything.insert("clients".to_owned(), json!(list_clients(&self.owner, None).await));
        everything
    }
}

const CREATE_CLIENT: &str = "/paperkey.catalog.v1.ClientService/CreateClient";
const GET_CLIENT: &str = "/paperkey.catalog.v1.ClientService/GetClient";
const LIST_CLIENTS: &str = "/paperkey.catalog.v1.ClientService/ListClients";

/// Creates a client, in the mode in which that person works: over gRPC, since the team surface takes keys alone.
pub(crate) async fn create_client(owner: &Api, email: &str) -> String {
    let request = CreateClientRequest {
        name: "Customer".to_owned(),
        email: Some(email.to_owned()),
        ..CreateClientRequest::default()
    };
    let answer = grpc::web_call(owner, CREATE_CLIENT, &request, false).await;
    let message = answer.message.unwrap_or_else(|| panic!("no client was made: {:?}", answer.status));
    CreateClientResponse::decode(message).unwrap().client.unwrap().id
}

/// The ids of the clients that somebody is shown.
pub(crate) async fn list_clients(who: &Api, email: Option<&str>) -> Vec<String> {
    let request = ListClientsRequest { email: email.map(str::to_owned), ..ListClientsRequest::default() };
    let answer = grpc::web_call(who, LIST_CLIENTS, &request, false).await;
    let message = answer.message.unwrap_or_else(|| panic!("no clients are listed: {:?}", answer.status));
    ListClientsResponse::decode(message).unwrap().clients.into_iter().map(|client| client.id).collect()
}

/// Whether a route is about what belongs to the team itself.
pub(crate) fn is_of_team(route: &Route) -> bool {
    route.variables.iter().any(|name| name == "team_id")
}

/// The path of a route, with these values for its variables.
pub(crate) fn path(route: &Route, value: impl Fn(&str) -> String) -> String {
    route.variables.iter().fold(route.template.clone(), |path, name| path.replace(&format!("{{{name}}}"), &value(name)))
}

/// The path of a route, with ids that are nobody's.
pub(crate) fn nobodys_path(route: &Route) -> String {
    path(route, |_| NOBODYS.to_owned())
}

/// A body that a method takes, beside the ids in its path.
pub(crate) fn body(method: &Method, product_id: &str, license_key: &str) -> Value {
    match method.descriptor.name() {
        "CreateProduct" => json!({"name": "App"}),
        "CreateWebhook" => json!({"url": "http://127.0.0.1:9/hook", "events": ["license.created"]}),
        "CreateLicense" => json!({"product_id": product_id}),
        "CreateClient" => json!({"name": "Customer"}),
        "ValidateLicense" => json!({"license_key": license_key}),
        "ActivateLicense" | "DeactivateLicense" => json!({"license_key": license_key, "fingerprint": "machine-2"}),
        "RecoverDeliveries" => json!({"since": "2026-01-01T00:00:00Z"}),
        "VerifyKey" => json!({"key": "nonsense"}),
        _ => json!({}),
    }
}
