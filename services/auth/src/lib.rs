//! The auth service: accounts, teams, and every credential.
//!
//! A call goes through `rpc` (decode, call, encode) to the use cases (`accounts`, `credentials`) or straight to
//! the `store`; the rules are in `domain`. Of passwords and tokens only hashes are kept. Everything that changes
//! how a credential is judged announces it in its own transaction, and in this process before it is answered.
//!
//! Deliberately absent: what a role or scope allows, which the contract and the kit's policy say; limits of rates,
//! which are the gateway's.

mod accounts;
pub mod admin;
mod credentials;
mod domain;
mod passwords;
mod rpc;
mod store;
mod worker;

use std::sync::Arc;

use paperkey_kit::{
    cache::Epochs,
    service::{Assembled, Rpcs, ServiceDeps, Worker},
};
use paperkey_proto::{
    Error,
    auth::v1::{
        auth_service_server::AuthServiceServer, credential_service_server::CredentialServiceServer,
        intake_service_server::IntakeServiceServer, product_api_key_service_server::ProductApiKeyServiceServer,
        status_service_server::StatusServiceServer,
    },
};

use crate::{
    accounts::Accounts, credentials::Credentials, domain::session::Sessions, passwords::Passwords, store::Store,
};

/// How the service behaves.
#[derive(Clone, Debug)]
pub struct AuthConfig {
    /// Whether anyone may make an account.
    pub registration_open: bool,
    /// The version that the status tells.
    pub version: &'static str,
    /// What has changed, as the caches of this process see it. Shared with a gateway in the same process.
    pub epochs: Arc<Epochs>,
}

/// Puts the service together.
pub fn assemble(deps: ServiceDeps, config: AuthConfig) -> Result<Assembled, Error> {
    let ServiceDeps { database, keys, clock, signer: _, channels: _ } = deps;
    let store = Store::new(database.clone(), &keys, config.epochs);
    let sessions = Arc::new(Sessions::new(keys.signing_seed()).map_err(Error::internal)?);
    let passwords = Arc::new(Passwords::default());
    let accounts = Accounts::new(store.clone(), passwords, Arc::clone(&sessions), clock.clone());
    let credentials = Credentials::new(store.clone(), sessions, clock.clone());

    let rpcs = Rpcs::default()
        .add_service(AuthServiceServer::new(rpc::accounts::Handler {
            accounts,
            registration_open: config.registration_open,
        }))
        .add_service(CredentialServiceServer::new(rpc::credentials::Handler {
            credentials,
            store: store.clone(),
            clock: clock.clone(),
        }))
        .add_service(ProductApiKeyServiceServer::new(rpc::product_keys::Handler {
            store: store.clone(),
            clock: clock.clone(),
        }))
        .add_service(StatusServiceServer::new(rpc::status::Handler { version: config.version, clock }))
        .add_service(IntakeServiceServer::new(rpc::intake::Handler { store }));
    Ok(Assembled {
        rpcs,
        workers: vec![Worker::new("auth/prune_changes", |shutdown| worker::prune(database, shutdown))],
    })
}
