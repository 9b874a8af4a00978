//! The auth service: accounts, teams, and every credential.
//!
//! A call goes through `rpc` (decode, call, encode) to the use cases (`accounts`, `credentials`) or straight to
//! the `store`; the rules are in `domain`. What people are told by `mail` waits in the database until it is sent. What
//! everybody does arrives in the `audit` log, which is chained here and read backwards. Of passwords and tokens only
//! hashes are kept. Everything that changes how a credential is judged announces it in its own transaction, and in this
//! process before it is answered.
//!
//! Deliberately absent: what a role or scope allows, which the contract and the kit's policy say; limits of rates,
//! which are the gateway's.

mod accounts;
pub mod admin;
pub mod audit;
mod credentials;
mod domain;
mod housekeeping;
mod mail;
mod passwords;
mod quotas;
mod revoked;
mod rpc;
mod slack;
mod store;
mod worker;

use std::{path::PathBuf, sync::Arc};

use paperkey_kit::{
    cache::Epochs,
    config::Tiers,
    lease::Leases,
    once::forget_answers,
    secrets::Secret,
    service::{Assembled, Rpcs, ServiceDeps, Worker},
};
use paperkey_proto::{
    Error,
    auth::v1::{
        alert_service_server::AlertServiceServer, api_key_service_server::ApiKeyServiceServer,
        audit_intake_service_server::AuditIntakeServiceServer, audit_log_service_server::AuditLogServiceServer,
        auth_service_server::AuthServiceServer, credential_service_server::CredentialServiceServer,
        member_service_server::MemberServiceServer, product_api_key_service_server::ProductApiKeyServiceServer,
        quota_service_server::QuotaServiceServer, status_service_server::StatusServiceServer,
        team_service_server::TeamServiceServer, usage_service_server::UsageServiceServer,
    },
    events::v1::intake_service_server::IntakeServiceServer,
};

use crate::{
    accounts::Accounts, audit::AuditLog, credentials::Credentials, domain::session::Sessions, passwords::Passwords,
    quotas::Quotas, slack::Slack, store::Store,
};

pub use mail::{BadMail, Mail};

/// What the service is called where services name each other.
const NAME: &str = "auth";

/// Who keeps something of a team, and so must learn that it is gone.
const KEEPERS: [&str; 3] = ["catalog", "licensing", "webhook"];

/// How the service behaves.
#[derive(Clone, Debug)]
pub struct AuthConfig {
    /// Whether anyone may make an account.
    pub registration_open: bool,
    /// The version that the status tells.
    pub version: &'static str,
    /// What has changed, as the caches of this process see it. Shared with a gateway in the same process.
    pub epochs: Arc<Epochs>,
    /// How people reach the installation, without a slash at the end. Mailed links begin with it.
    pub public_url: String,
    /// How mail is sent.
    pub mail: Mail,
    /// What teams pay for.
    pub tiers: Arc<Tiers>,
    /// Where alerts go beside the feed: the URL of a Slack incoming webhook.
    pub slack_webhook_url: Option<Secret>,
    /// How long the audit log is kept, in days.
    pub audit_retention_days: u32,
    /// Where the head of the audit log's chain is kept beside the database.
    pub audit_folder: PathBuf,
}

/// Puts the service together.
pub fn assemble(deps: ServiceDeps, config: AuthConfig) -> Result<Assembled, Error> {
    let ServiceDeps { database, keys, clock, signer, channels } = deps;
    let [catalog, licensing, webhook] = KEEPERS.map(|keeper| channels.get(keeper).cloned());
    let (catalog, licensing, webhook) = (catalog?, licensing?, webhook?);
    let audit_relay = paperkey_kit::audit::relay(database.clone(), NAME, channels.get(NAME)?, signer.clone());
    let slack = config.slack_webhook_url.as_ref().map(Slack::new).transpose()?;
    let mut store = Store::new(database.clone(), &keys, config.epochs);
    if slack.is_some() {
        store = store.telling_slack();
    }
    let relay =
        |name, target, channel| store.outbox().relay(name, database.clone(), NAME, target, channel, signer.clone());
    let relays = [
        relay("auth to catalog", "catalog", catalog),
        relay("auth to licensing", "licensing", licensing),
        relay("auth to webhook", "webhook", webhook),
    ];
    let sessions = Arc::new(Sessions::new(keys.signing_seed()).map_err(Error::internal)?);
    let passwords = Arc::new(Passwords::default());
    let accounts =
        Accounts::new(store.clone(), passwords, Arc::clone(&sessions), clock.clone(), config.public_url.clone());
    let credentials = Credentials::new(store.clone(), sessions, clock.clone());

    let tiers = config.tiers;
    let usage = rpc::usage::Handler { quotas: Quotas::new(store.clone(), Arc::clone(&tiers), clock.clone()) };
    let audit = rpc::audit::Handler { store: store.clone(), clock: clock.clone() };
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
        .add_service(ApiKeyServiceServer::new(rpc::api_keys::Handler {
            store: store.clone(),
            clock: clock.clone(),
            tiers: Arc::clone(&tiers),
        }))
        .add_service(MemberServiceServer::new(rpc::members::Handler {
            store: store.clone(),
            public_url: config.public_url,
            tells_link: config.mail.stays_here(),
        }))
        .add_service(TeamServiceServer::new(rpc::teams::Handler { store: store.clone(), clock: clock.clone(), tiers }))
        .add_service(ProductApiKeyServiceServer::new(rpc::product_keys::Handler {
            store: store.clone(),
            clock: clock.clone(),
        }))
        .add_service(UsageServiceServer::new(usage.clone()))
        .add_service(QuotaServiceServer::new(usage))
        .add_service(AuditLogServiceServer::new(audit.clone()))
        .add_service(AuditIntakeServiceServer::new(audit))
        .add_service(AlertServiceServer::new(rpc::alerts::Handler { store: store.clone() }))
        .add_service(StatusServiceServer::new(rpc::status::Handler { version: config.version, clock: clock.clone() }))
        .add_service(IntakeServiceServer::new(rpc::intake::Handler { store: store.clone() }));
    let (carried, ended, forgotten, consumed) = (store.clone(), store.clone(), store.clone(), store.clone());
    let (posted, tried) = (store.clone(), store.clone());
    let (mail, kept, leases, counted) = (config.mail, database.clone(), database.clone(), database.clone());
    let (log, chained) = (AuditLog::of(store.clone(), &config.audit_folder), Leases::new(database.clone()));
    let (slack_clock, days) = (clock.clone(), config.audit_retention_days);
    let mut workers = vec![
        audit_relay,
        Worker::new("auth/audit", move |shutdown| audit::keep(log, chained, days, shutdown)),
        forget_answers(database.clone()),
        Worker::new("auth/prune_changes", |shutdown| worker::prune(database, shutdown)),
        Worker::new("auth/keys", |shutdown| worker::keep_keys(store, leases, shutdown)),
        Worker::new("auth/mail", |shutdown| mail::carry(carried, mail, clock, shutdown)),
        Worker::new("auth/teams", |shutdown| housekeeping::end_teams(ended, shutdown)),
        Worker::new("auth/forget_ended", |shutdown| housekeeping::forget(forgotten, kept, shutdown)),
        Worker::new("auth/quotas", |shutdown| housekeeping::forget_consumptions(consumed, counted, shutdown)),
        Worker::new("auth/revoked_uses", |shutdown| revoked::write_down(tried, shutdown)),
    ];
    if let Some(slack) = slack {
        workers.push(Worker::new("auth/slack", |shutdown| slack::carry(posted, slack, slack_clock, shutdown)));
    }
    workers.extend(relays);
    Ok(Assembled { rpcs, workers })
}
