//! A team with one of everything, and requests made from the contract.

use std::collections::BTreeMap;

use bytes::Bytes;
use paperkey_proto::contract::{Method, Route};
use paperkey_tests::{
    Account, License, Product, Receiver,
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
        Self { owner, product, license, webhook, activation_id, delivery_id }
    }

    /// The id that a variable or a field of a request stands for.
    pub(crate) fn id(&self, method: &Method, name: &str) -> Option<String> {
        let id = match name {
            "id" if method.owner == "catalog" => &self.product.id,
            "id" | "license_id" => &self.license.id,
            "product_id" => &self.product.id,
            "key_id" => &self.product.key_id,
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
        path(route, |name| self.id(method, name).unwrap_or_else(|| panic!("{} names {name}", method.path)))
    }

    /// Every id and key of this world.
    pub(crate) fn ids(&self) -> Vec<&str> {
        vec![
            &self.product.id,
            &self.product.key_id,
            &self.license.id,
            &self.license.key,
            &self.webhook.id,
            &self.activation_id,
            &self.delivery_id,
        ]
    }

    /// A request whose every id is one of this world, as the bytes of its message.
    pub(crate) fn message(&self, method: &Method) -> Bytes {
        let mut message = DynamicMessage::new(method.descriptor.input());
        for field in method.descriptor.input().fields() {
            let text = match field.name() {
                "url" => Some("http://127.0.0.1:9/hook".to_owned()),
                "fingerprint" => Some("machine-2".to_owned()),
                name => self.id(method, name),
            };
            if field.name() == "events" {
                message.set_field(&field, Proto::List(vec![Proto::String("license.created".to_owned())]));
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
        let paths = [
            format!("/licenses/{}", self.license.id),
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
        everything
    }
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
        "ValidateLicense" => json!({"license_key": license_key}),
        "ActivateLicense" | "DeactivateLicense" => json!({"license_key": license_key, "fingerprint": "machine-2"}),
        _ => json!({}),
    }
}
