//! Where licences are kept: the only part that knows tables.
//!
//! A query of a tenant's data is opened by the tenant ([`Store::of`]), so that one without team and mode cannot be
//! written; a caller who is bound to one product narrows it once more ([`TenantStore::within`]).
//!
//! The locking order is one: product, client, licence, activations. A transaction that holds an activation and waits
//! for its licence does not exist, so two of them cannot wait for each other.

mod activations;
mod bulk;
mod clients;
mod expiry;
mod licenses;
mod listing;
mod lookups;
mod products;
mod teams;

use std::{fmt::Write as _, sync::Arc};

pub use paperkey_kit::store::Act;
use paperkey_kit::{
    clock::Clock,
    db::{Database, Engine, Tx, checked},
    events::EventOutbox,
    principal::Tenant,
    secrets::{KeptKey, KeyedHash, Keyring, Purpose, Sealer},
};
use sea_orm::{ConnectionTrait, DbErr, QueryResult, Statement, Value};

use crate::domain::{Fault, license_key::LicenseKey};
use lookups::Lookups;

pub use activations::Activated;
pub use bulk::Imported;
pub use listing::Filter;
pub use lookups::View;

/// To whom the events of licences go.
const WEBHOOK: &[&str] = &["webhook"];

/// The licences of all tenants. Cloning it gives another handle to the same one.
#[derive(Clone, Debug)]
pub struct Store {
    parts: Arc<Parts>,
}

#[derive(Debug)]
struct Parts {
    database: Database,
    outbox: EventOutbox,
    clock: Clock,
    vault: Vault,
    lookups: Arc<Lookups>,
}

impl Store {
    /// The licences in that database.
    pub fn new(database: Database, keys: &Keyring, clock: Clock) -> Self {
        let outbox = EventOutbox::new(keys, clock.clone());
        let vault = Vault { hasher: keys.kept(KeptKey::LicenseKey), sealer: keys.sealer(Purpose::LicenseKey) };
        let lookups = Arc::new(Lookups::new(database.engine() == Engine::Postgres, clock.clone()));
        Self { parts: Arc::new(Parts { database, outbox, clock, vault, lookups }) }
    }

    /// The licences of one team in one mode.
    pub fn of(&self, tenant: Tenant) -> TenantStore {
        TenantStore { store: self.clone(), tenant, product_id: None }
    }

    /// What hands the events of licences on.
    pub(crate) fn outbox(&self) -> EventOutbox {
        self.parts.outbox.clone()
    }

    /// Where they are.
    pub(crate) fn database(&self) -> &Database {
        &self.parts.database
    }

    /// The time by which licences are judged.
    pub(crate) fn clock(&self) -> &Clock {
        &self.parts.clock
    }

    fn now_ms(&self) -> i64 {
        self.parts.clock.now_ms()
    }

    /// Says, once the transaction is durable, that what is cached about these subjects is stale: here before anyone
    /// is answered, and in other processes within a second.
    fn announce(&self, tx: &Tx, subjects: Vec<String>) {
        if self.parts.lookups.is_shared() {
            for subject in &subjects {
                tx.changed(subject.as_str());
            }
        }
        let lookups = Arc::clone(&self.parts.lookups);
        tx.after_commit(move || lookups.bump(&subjects));
    }
}

/// The licences of one team in one mode, or of one product of it.
#[derive(Clone, Debug)]
pub struct TenantStore {
    store: Store,
    tenant: Tenant,
    product_id: Option<String>,
}

impl TenantStore {
    /// Only those of that product, if one is named.
    #[must_use]
    pub fn within(mut self, product_id: Option<&str>) -> Self {
        self.product_id = product_id.map(ToOwned::to_owned);
        self
    }

    fn parts(&self) -> &Parts {
        &self.store.parts
    }

    /// What every statement about licences of this store says of them, after `first` bound values.
    fn reach(&self, first: usize) -> (String, Vec<Value>) {
        let (team, mode, product) = (first + 1, first + 2, first + 3);
        let mut values = vec![self.tenant.team_id.clone().into(), self.tenant.mode_word().into()];
        let mut sql = format!("team_id = ${team} AND mode = ${mode}");
        if let Some(product_id) = &self.product_id {
            values.push(product_id.clone().into());
            // Writing to a String cannot fail.
            let _ = write!(sql, " AND product_id = ${product}");
        }
        (sql, values)
    }

    /// The same of one licence, which is found by what is unique of it.
    fn own(&self, first: usize) -> (String, Vec<Value>) {
        let (sql, values) = self.reach(first);
        (checked(&sql), values)
    }
}

/// Hashes and seals licence keys.
#[derive(Debug)]
struct Vault {
    hasher: KeyedHash,
    sealer: Sealer,
}

impl Vault {
    fn hash(&self, key: &LicenseKey) -> [u8; 32] {
        self.hasher.hash(key.as_bytes())
    }

    fn seal(&self, license_id: &str, key: &LicenseKey) -> Vec<u8> {
        self.sealer.seal(license_id, key.as_bytes())
    }

    /// A key that cannot be opened any more does not take the rest of its licence with it.
    fn open(&self, license_id: &str, sealed: &[u8]) -> Option<LicenseKey> {
        let plain = self.sealer.open(license_id, sealed).ok();
        let key = plain.and_then(|plain| LicenseKey::from_bytes(&plain));
        if key.is_none() {
            tracing::error!(license_id, "the stored key of a license cannot be opened");
        }
        key
    }
}

/// Why a job of the store ended without a result.
pub type Failure = paperkey_kit::store::Failure<Fault>;

impl paperkey_kit::store::Fault for Fault {}

/// Runs a statement and returns its first row. Written by hand where one statement must do what a query builder would
/// make two of; values are numbered in order and bound once each, as both engines take them.
async fn first_row(
    connection: &impl ConnectionTrait,
    sql: impl Into<String>,
    values: Vec<Value>,
) -> Result<Option<QueryResult>, DbErr> {
    let statement = Statement::from_sql_and_values(connection.get_database_backend(), sql, values);
    connection.query_one_raw(statement).await
}

/// Runs a statement and says how many rows it changed.
async fn execute(connection: &impl ConnectionTrait, sql: impl Into<String>, values: Vec<Value>) -> Result<u64, DbErr> {
    let statement = Statement::from_sql_and_values(connection.get_database_backend(), sql, values);
    Ok(connection.execute_raw(statement).await?.rows_affected())
}

/// Rows of one INSERT, far below the limits of both engines on bound values.
const ROWS: usize = 200;

/// Inserts rows, some at a time and in their order, and returns what the statement returns of them. `into` is a table
/// with its columns, `rest` what follows the values.
async fn insert_rows(
    connection: &impl ConnectionTrait,
    into: &str,
    rest: &str,
    rows: Vec<Vec<Value>>,
) -> Result<Vec<QueryResult>, DbErr> {
    let mut returned = Vec::new();
    let mut rows = rows.into_iter().peekable();
    while rows.peek().is_some() {
        let mut values = Vec::new();
        let mut places = Vec::with_capacity(ROWS);
        for row in rows.by_ref().take(ROWS) {
            let first = values.len() + 1;
            values.extend(row);
            let numbers: Vec<_> = (first..=values.len()).map(|number| format!("${number}")).collect();
            places.push(format!("({})", numbers.join(", ")));
        }
        let sql = format!("INSERT INTO {into} VALUES {} {rest}", places.join(", "));
        returned.extend(all_rows(connection, sql, values).await?);
    }
    Ok(returned)
}

/// Runs a statement and returns its rows.
async fn all_rows(
    connection: &impl ConnectionTrait,
    sql: impl Into<String>,
    values: Vec<Value>,
) -> Result<Vec<QueryResult>, DbErr> {
    let statement = Statement::from_sql_and_values(connection.get_database_backend(), sql, values);
    connection.query_all_raw(statement).await
}
