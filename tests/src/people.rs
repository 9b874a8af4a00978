//! Accounts, products and licences, so that tests read as sentences.

use std::ops::Deref;

use http::{HeaderMap, header::SET_COOKIE};
use serde_json::{Value, json};

use crate::{
    api::{Answer, Api},
    installation::Installation,
};

/// Somebody with an account and a team, and a client that speaks as them.
#[derive(Clone, Debug)]
pub struct Account {
    api: Api,
    anonymous: Api,
    /// The email address.
    pub email: String,
    /// The password.
    pub password: String,
    /// The JWT.
    pub token: String,
    /// The id of the user.
    pub user_id: String,
    /// The id of the first team.
    pub team_id: String,
    /// The free key, `pk_free_…`.
    pub free_key: String,
    /// The first live key, `pb_live_…`.
    pub live_key: String,
}

impl Deref for Account {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

/// What a browser is told to keep.
#[derive(Clone, Debug)]
pub struct Cookie {
    /// Its name.
    pub name: String,
    /// Its value; empty where it is to be forgotten.
    pub value: String,
    /// Its attributes, as they were sent.
    pub attributes: Vec<String>,
}

impl Cookie {
    /// The one cookie that an answer sets, if it does.
    #[track_caller]
    pub fn set_by(headers: &HeaderMap) -> Option<Self> {
        let mut set = headers.get_all(SET_COOKIE).iter();
        let text = set.next()?.to_str().expect("a cookie is text");
        assert!(set.next().is_none(), "more than one cookie is set: {headers:?}");
        let mut parts = text.split("; ").map(str::to_owned);
        let first = parts.next().unwrap_or_default();
        let (name, value) = first.split_once('=').unwrap_or_else(|| panic!("{text} is no cookie"));
        Some(Self { name: name.to_owned(), value: value.to_owned(), attributes: parts.collect() })
    }

    /// The client of a page in a browser that keeps this cookie.
    #[must_use]
    pub fn page(&self, api: &Api, origin: &str) -> Api {
        api.with("origin", origin).with("cookie", &format!("{}={}", self.name, self.value))
    }

    /// The value of an attribute.
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find_map(|attribute| attribute.strip_prefix(name)?.strip_prefix('='))
    }
}

/// A product with its first key pair.
#[derive(Clone, Debug)]
pub struct Product {
    /// `prod_…`
    pub id: String,
    /// The id of the first pair, `key_…`.
    pub key_id: String,
    /// `pk_…`
    pub public_key: String,
    /// `sk_…`
    pub secret_key: String,
}

/// A key of a team.
#[derive(Clone, Debug)]
pub struct Key {
    /// `key_…`
    pub id: String,
    /// The token.
    pub token: String,
}

/// A licence.
#[derive(Clone, Debug)]
pub struct License {
    /// `lic_…`
    pub id: String,
    /// What the customer is given.
    pub key: String,
}

/// A webhook of a product or a team, with its secret.
#[derive(Clone, Debug)]
pub struct Webhook {
    /// `wh_…`
    pub id: String,
    /// `whsec_…`
    pub secret: String,
}

/// An invitation into a team, with what the inviter is told.
#[derive(Clone, Debug)]
pub struct Invitation {
    /// `inv_…`
    pub id: String,
    /// The link.
    pub url: String,
    /// What the link carries.
    pub token: String,
}

/// Every event that products send.
pub const PRODUCT_EVENTS: [&str; 7] = [
    "license.created",
    "license.updated",
    "license.revoked",
    "license.reinstated",
    "license.expired",
    "activation.created",
    "activation.removed",
];

/// An email address that nobody has.
pub fn new_email() -> String {
    format!("someone-{:016x}@example.com", rand::random::<u64>())
}

/// A time of an answer, in milliseconds since 1970.
#[track_caller]
pub fn time_ms(text: &str) -> i64 {
    let time: prost_types::Timestamp = text.parse().unwrap_or_else(|_| panic!("{text} is no time"));
    time.seconds * 1_000 + i64::from(time.nanos / 1_000_000)
}

/// A text member of an answer.
#[track_caller]
pub fn text(json: &Value, pointer: &str) -> String {
    let text = json.pointer(pointer).and_then(Value::as_str);
    text.unwrap_or_else(|| panic!("no text at {pointer} of {json}")).to_owned()
}

impl Account {
    /// Registers somebody new.
    pub async fn register(api: &Api) -> Self {
        let (email, password) = (new_email(), format!("correct horse {:016x}", rand::random::<u64>()));
        let answer = api.post("/auth/register", json!({"email": email, "password": password, "name": "Ada"})).await;
        let json = answer.gives(201);
        let token = text(json, "/token");
        Self {
            api: api.as_account(&token),
            anonymous: api.clone(),
            email,
            password,
            user_id: text(json, "/user/id"),
            team_id: text(json, "/team/id"),
            free_key: text(json, "/freeKey"),
            live_key: text(json, "/liveKey"),
            token,
        }
    }

    /// The same person, in the world of test data.
    #[must_use]
    pub fn in_test_mode(&self) -> Self {
        Self { api: self.api.in_test_mode(), ..self.clone() }
    }

    /// The same person, at another gateway.
    #[must_use]
    pub fn at(&self, gateway: &Api) -> Self {
        Self { api: gateway.as_account(&self.token), anonymous: gateway.clone(), ..self.clone() }
    }

    /// Somebody new, who joins the first team in a role.
    pub async fn team_mate(&self, install: &Installation, role: &str) -> Self {
        let mate = install.register().await;
        self.takes_in(&self.team_id, &mate, role).await;
        mate
    }

    /// Signs in with a password.
    pub async fn login(&self, password: &str) -> Answer {
        self.anonymous.post("/auth/login", json!({"email": self.email, "password": password})).await
    }

    /// Creates a team, and says which.
    pub async fn create_team(&self, name: &str) -> String {
        text(self.post("/teams", json!({"name": name})).await.gives(201), "/id")
    }

    /// Invites somebody into the first team.
    pub async fn invite(&self, email: &str, role: &str) -> Invitation {
        self.invite_into(&self.team_id, email, role).await
    }

    /// Invites somebody into a team.
    pub async fn invite_into(&self, team_id: &str, email: &str, role: &str) -> Invitation {
        let answer = self.post(&format!("/teams/{team_id}/members"), json!({"email": email, "role": role})).await;
        let json = answer.gives(201);
        let url = text(json, "/inviteUrl");
        let token = url.split_once("?token=").map(|(_, token)| token.to_owned()).expect("the link carries a token");
        Invitation { id: text(json, "/id"), url, token }
    }

    /// Accepts an invitation.
    pub async fn accept(&self, invitation: &Invitation) -> Answer {
        self.post("/auth/invitations/accept", json!({"token": invitation.token})).await
    }

    /// Invites somebody into a team, and has them accept.
    pub async fn takes_in(&self, team_id: &str, other: &Self, role: &str) {
        let invitation = self.invite_into(team_id, &other.email, role).await;
        other.accept(&invitation).await.gives(200);
    }

    /// Makes a key of the first team.
    pub async fn create_key(&self, with: Value) -> Key {
        let answer = self.post(&format!("/teams/{}/api-keys", self.team_id), with).await;
        let json = answer.gives(201);
        Key { id: text(json, "/id"), token: text(json, "/key") }
    }

    /// The token of a live key that may be used from one address only.
    pub async fn allowlisted_key(&self, address: &str) -> String {
        self.create_key(json!({"name": "At home", "allowlist": [address]})).await.token
    }

    /// Revokes a key of the first team.
    pub async fn revoke_key(&self, key: &Key) {
        self.delete(&format!("/teams/{}/api-keys/{}", self.team_id, key.id)).await.gives(200);
    }

    /// Creates a product.
    pub async fn create_product(&self, name: &str) -> Product {
        let answer = self.post("/products", json!({"name": name})).await;
        let json = answer.gives(201);
        Product {
            id: text(json, "/id"),
            key_id: text(json, "/apiKey/id"),
            public_key: text(json, "/apiKey/publicKey"),
            secret_key: text(json, "/apiKey/secretKey"),
        }
    }

    /// Issues a licence for a product.
    pub async fn issue(&self, product: &Product, mut with: Value) -> License {
        with["productId"] = product.id.clone().into();
        let answer = self.post("/licenses", with).await;
        License::of(answer.gives(201))
    }

    /// Subscribes an address to every event of a product.
    pub async fn subscribe(&self, product: &Product, url: &str) -> Webhook {
        let path = format!("/products/{}/webhooks", product.id);
        let answer = self.post(&path, json!({"url": url, "events": PRODUCT_EVENTS})).await;
        Webhook::of(answer.gives(201))
    }

    /// Revokes a licence.
    pub async fn revoke(&self, license: &License) -> Answer {
        self.post(&format!("/licenses/{}/revoke", license.id), json!({})).await
    }

    /// Takes a revocation back.
    pub async fn reinstate(&self, license: &License) -> Answer {
        self.post(&format!("/licenses/{}/reinstate", license.id), json!({})).await
    }

    /// The app of a product, as it runs at a customer's.
    pub fn app(&self, product: &Product) -> App {
        App(self.anonymous.with_key(&product.public_key))
    }

    /// A vendor's own server, with the product's secret key.
    pub fn server(&self, product: &Product) -> Api {
        self.anonymous.with_key(&product.secret_key)
    }

    /// An integration in the world of test data, with a new key of the team.
    pub async fn test_integration(&self) -> Api {
        self.anonymous.with_key(&self.create_key(json!({"name": "Test", "mode": "test"})).await.token)
    }

    /// An integration, with a key of the team.
    pub fn integration(&self) -> Api {
        self.anonymous.with_key(&self.live_key)
    }
}

impl Webhook {
    /// The webhook of the answer that made it.
    pub fn of(json: &Value) -> Self {
        Self { id: text(json, "/id"), secret: text(json, "/secret") }
    }
}

impl License {
    /// The licence of an answer.
    pub fn of(json: &Value) -> Self {
        Self { id: text(json, "/id"), key: text(json, "/key") }
    }
}

/// A shipped app: it validates, activates and deactivates.
#[derive(Clone, Debug)]
pub struct App(pub Api);

impl App {
    /// Asks whether a licence is usable.
    pub async fn validate(&self, license: &License) -> Answer {
        self.0.post("/v1/licenses/validate", json!({"license_key": license.key})).await
    }

    /// Asks whether a licence is usable on a machine.
    pub async fn validate_on(&self, license: &License, fingerprint: &str) -> Answer {
        let asked = json!({"license_key": license.key, "fingerprint": fingerprint});
        self.0.post("/v1/licenses/validate", asked).await
    }

    /// The code of a validation.
    pub async fn verdict(&self, license: &License) -> String {
        let answer = self.validate(license).await;
        let json = answer.gives(200);
        let code = text(json, "/code");
        assert_eq!(json["valid"], Value::from(code == "valid"), "{json}");
        code
    }

    /// Binds a machine to a licence.
    pub async fn activate(&self, license: &License, fingerprint: &str) -> Answer {
        let asked = json!({"license_key": license.key, "fingerprint": fingerprint, "name": "MacBook Pro"});
        self.0.post("/v1/licenses/activate", asked).await
    }

    /// Frees the slot of a machine.
    pub async fn deactivate(&self, license: &License, fingerprint: &str) -> Answer {
        let asked = json!({"license_key": license.key, "fingerprint": fingerprint});
        self.0.post("/v1/licenses/deactivate", asked).await
    }
}
