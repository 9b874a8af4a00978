//! Where endpoints, events and deliveries are kept: the only part that knows tables.
//!
//! What callers see is opened by the tenant ([`Store::of`]), so that a query without team and mode cannot be written.
//! What the workers and other services do ([`dispatch`], [`housekeeping`], [`teams`]) spans modes or tenants and hands
//! nothing to a caller.
//!
//! On PostgreSQL rows are locked in one order, so that transactions wait for each other and never in a circle:
//! product, endpoint, deliveries, attempts, events.

pub(crate) mod backlog;
mod deliveries;
pub(crate) mod dispatch;
mod endpoints;
pub(crate) mod housekeeping;
mod intake;
mod orphans;
mod replays;
mod teams;
#[cfg(test)]
mod tests;
pub(crate) mod watch;

use std::sync::Arc;

pub(crate) use paperkey_kit::store::Act;
use paperkey_kit::{
    clock::Clock,
    db::{Database, DbError},
    events::EventOutbox,
    principal::Tenant,
    secrets::{Keyring, Purpose, Sealer},
};
use sea_orm::{DbBackend, Statement, Value};

use crate::{
    domain::{Fault, schedule::Schedule},
    wake::Wake,
};

/// Values that one statement binds at most, below the limits of both engines.
const MAX_VALUES: usize = 16_000;

/// The webhooks of all tenants.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    database: Database,
    clock: Clock,
    secrets: Sealer,
    bodies: Sealer,
    outbox: EventOutbox,
    schedule: Arc<Schedule>,
    wake: Arc<Wake>,
}

/// The webhooks of one team in one mode.
#[derive(Clone, Debug)]
pub(crate) struct TenantStore {
    store: Store,
    tenant: Tenant,
}

impl Store {
    /// The webhooks in that database.
    pub(crate) fn new(
        database: Database,
        keys: &Keyring,
        clock: Clock,
        schedule: Arc<Schedule>,
        wake: Arc<Wake>,
    ) -> Self {
        let (secrets, bodies) = (keys.sealer(Purpose::WebhookSecret), keys.sealer(Purpose::WebhookEvent));
        let outbox = EventOutbox::new(keys, clock.clone());
        Self { database, clock, secrets, bodies, outbox, schedule, wake }
    }

    /// What others must learn of.
    pub(crate) fn outbox(&self) -> &EventOutbox {
        &self.outbox
    }

    /// The webhooks of one team in one mode.
    pub(crate) fn of(&self, tenant: Tenant) -> TenantStore {
        TenantStore { store: self.clone(), tenant }
    }
}

/// Why a job of the store ended without a result.
pub(crate) type Failure = paperkey_kit::store::Failure<Fault>;

impl paperkey_kit::store::Fault for Fault {}

/// A statement in SQL that both engines read. On SQLite `$n` must first appear in the order of the numbers.
fn sql(backend: DbBackend, text: impl Into<String>, values: Vec<Value>) -> Statement {
    Statement::from_sql_and_values(backend, text, values)
}

/// `($1, $2), ($3, $4)`: the places of many rows, beginning after `before` values.
fn rows(count: usize, columns: usize, before: usize) -> String {
    let mut text = String::with_capacity(count * columns * 5);
    let mut number = before;
    for row in 0..count {
        text.push_str(if row == 0 { "(" } else { ", (" });
        for column in 0..columns {
            number += 1;
            text.push_str(if column == 0 { "$" } else { ", $" });
            text.push_str(&number.to_string());
        }
        text.push(')');
    }
    text
}

/// `$1, $2, $3`: the places of a list, beginning after `before` values.
fn places(count: usize, before: usize) -> String {
    let row = rows(1, count, before);
    row.trim_matches(['(', ')']).to_owned()
}

/// What is stored and cannot be read back as what it was.
fn corrupt(what: &str) -> DbError {
    DbError::Internal(format!("{what} is not what was written"))
}
