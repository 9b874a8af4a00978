//! Where products and clients are kept: the only part that knows tables.
//!
//! A caller's query is opened by the tenant ([`Store::of`]), so that one without team and mode cannot be written. What
//! the workers and other services do ([`drafts`], [`teams`]) spans modes or tenants and hands nothing to a caller.

mod clients;
mod drafts;
mod products;
mod teams;

pub(crate) use paperkey_kit::store::Act;
use paperkey_kit::{clock::Clock, db::Database, events::EventOutbox, principal::Tenant};

use crate::domain::Fault;

/// The catalogue of all tenants.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    database: Database,
    outbox: EventOutbox,
    clock: Clock,
}

impl Store {
    /// The catalogue in that database.
    pub(crate) fn new(database: Database, outbox: EventOutbox, clock: Clock) -> Self {
        Self { database, outbox, clock }
    }

    /// The catalogue of one team in one mode.
    pub(crate) fn of(&self, tenant: Tenant) -> TenantStore {
        TenantStore { store: self.clone(), tenant }
    }
}

/// The catalogue of one team in one mode.
#[derive(Clone, Debug)]
pub(crate) struct TenantStore {
    store: Store,
    tenant: Tenant,
}

/// Why a job of the store ended without a result.
pub(crate) type Failure = paperkey_kit::store::Failure<Fault>;

impl paperkey_kit::store::Fault for Fault {}
