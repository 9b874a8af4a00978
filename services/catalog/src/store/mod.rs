//! Where products are kept: the only part that knows tables.
//!
//! A query is opened by the tenant ([`Store::of`]), so that one without team and mode cannot be written.

mod products;

use paperkey_kit::{
    clock::Clock,
    db::{AuditEntry, Database, DbError},
    events::EventOutbox,
    principal::{Caller, Tenant},
};
use paperkey_proto::Error;
use sea_orm::DbErr;

use crate::domain::Fault;

pub(crate) use products::TenantStore;

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
        TenantStore::new(self.clone(), tenant)
    }
}

/// Who changes something, by which call, for the audit log.
#[derive(Clone, Debug)]
pub(crate) struct Act {
    actor_kind: String,
    actor_id: String,
    action: &'static str,
    request_id: String,
}

impl Act {
    /// A caller, by the rpc of that path.
    pub(crate) fn by(caller: &Caller, action: &'static str) -> Self {
        let actor_kind = caller.principal.kind().as_str_name().trim_start_matches("CALLER_").to_ascii_lowercase();
        let (actor_id, request_id) = (caller.principal.id.clone(), caller.request_id.clone());
        Self { actor_kind, actor_id, action, request_id }
    }

    fn on(self, resource: String) -> AuditEntry {
        AuditEntry {
            actor_kind: self.actor_kind,
            actor_id: self.actor_id,
            action: self.action.to_owned(),
            resources: vec![resource],
            request_id: self.request_id,
        }
    }
}

/// Why a job of the store ended without a result.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The domain refuses.
    Fault(Fault),
    /// A value is at fault.
    Invalid(Error),
    /// The database failed.
    Database(DbError),
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<DbError> for Failure {
    fn from(error: DbError) -> Self {
        Self::Database(error)
    }
}

impl From<DbErr> for Failure {
    fn from(error: DbErr) -> Self {
        Self::Database(error.into())
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Fault(fault) => fault.into(),
            Failure::Invalid(error) => error,
            Failure::Database(error) => error.into(),
        }
    }
}
