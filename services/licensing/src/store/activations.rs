//! Activations, as rows, and the slots they take.
//!
//! A slot is taken by `UPDATE licenses SET activations_count = activations_count + 1 WHERE … activations_count <
//! max_activations`: the row is locked from there to the commit, so whatever the number of machines, processes and
//! engines, no more slots are taken than there are. Rows of activations come and go only under that lock, hence the
//! count is their number. Refreshing an activation needs no slot and takes no lock but its own.

use paperkey_kit::{
    db::{Tx, checked},
    ids::new_id,
};
use sea_orm::{
    EntityTrait as _, FromQueryResult as _, QueryFilter as _, QueryOrder as _, QueryResult, Select, Value,
    sea_query::{Expr, ExprTrait},
};

use super::{Act, Failure, TenantStore, WEBHOOK, execute, first_row, lookups::activation_subject};
use crate::domain::{
    Fault, could_be_id,
    event::{ACTIVATION_CREATED, ACTIVATION_REMOVED, activation_data},
    license::{Activation, Standing, Status},
    license_key::LicenseKey,
};

mod entity {
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, DeriveEntityModel)]
    #[sea_orm(table_name = "activations")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub license_id: String,
        pub fingerprint: String,
        pub name: Option<String>,
        pub created_at_ms: i64,
        pub last_check_at_ms: i64,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) use entity::{Column, Entity, Model};

/// Whether a licence activates anything, by the time that is bound at that place.
fn usable(now: usize) -> String {
    format!("revoked_at_ms IS NULL AND (expires_at_ms IS NULL OR expires_at_ms > ${now})")
}

impl From<Model> for Activation {
    fn from(row: Model) -> Self {
        Self {
            id: row.id,
            license_id: row.license_id,
            fingerprint: row.fingerprint,
            name: row.name,
            created_at_ms: row.created_at_ms,
            last_check_at_ms: row.last_check_at_ms,
        }
    }
}

/// The activations of one licence that was found to be the caller's, newest first.
pub(super) fn of_license(license_id: &str) -> Select<Entity> {
    // As the index over them is written: see the migration.
    Entity::find().filter(ExprTrait::eq(Expr::cust("license_id || ''"), license_id)).order_by_desc(Column::Id)
}

/// Which activation of a licence is meant.
enum Which {
    Machine(String),
    Id(String),
}

/// An activation, and how many more there may be; `None` is unlimited.
pub type Activated = (Activation, Option<i64>);

/// One machine that activates.
struct Attempt {
    store: TenantStore,
    license_id: String,
    fingerprint: String,
    name: Option<String>,
    now_ms: i64,
}

impl TenantStore {
    /// Whether a machine is activated on a licence that was found to be the caller's: from memory, else from the
    /// database.
    pub async fn is_activated(&self, license_id: &str, fingerprint: &str) -> Result<bool, Failure> {
        let lookups = &self.parts().lookups;
        if let Some(known) = lookups.activated(license_id, fingerprint) {
            return Ok(known);
        }
        let began = lookups.now();
        let values: Vec<Value> = vec![license_id.to_owned().into(), fingerprint.to_owned().into()];
        let found = self
            .parts()
            .database
            .read(move |reader| async move {
                let sql = "SELECT id FROM activations WHERE license_id = $1 AND fingerprint = $2";
                Ok::<_, Failure>(first_row(&reader, sql, values).await?.is_some())
            })
            .await?;
        lookups.learn_activated(license_id, fingerprint, found, began);
        Ok(found)
    }

    /// Binds a machine to a licence, or refreshes it. Needs a store within a product.
    pub async fn activate(
        &self,
        key: LicenseKey,
        fingerprint: String,
        name: Option<String>,
        act: Act,
    ) -> Result<Activated, Failure> {
        // Which licence a key is, never changes: that much may come from memory. What decides is asked below.
        let license_id = self.find_surely(&key).await?.id.clone();
        let now_ms = self.store.now_ms();
        let attempt = Attempt { store: self.clone(), license_id, fingerprint, name, now_ms };
        self.parts()
            .database
            .write(move |tx| async move {
                let activated = attempt.make(&tx, &key, &act).await?;
                act.answer(&tx, &activated)?;
                Ok(activated)
            })
            .await
    }

    /// Releases a machine, whatever the status of the licence. Needs a store within a product.
    pub async fn deactivate(&self, key: LicenseKey, fingerprint: String, act: Act) -> Result<Option<i64>, Failure> {
        let license_id = self.find_surely(&key).await?.id.clone();
        self.remove(license_id, Which::Machine(fingerprint), Some(key), act).await
    }

    /// Removes an activation by its id.
    pub async fn delete_activation(&self, license_id: &str, id: &str, act: Act) -> Result<(), Failure> {
        if !could_be_id(license_id) {
            return Err(Fault::NoSuchLicense.into());
        }
        // What cannot be an id is looked up as none, so that a foreign licence is still the first thing missed.
        let id = if could_be_id(id) { id } else { "" };
        self.remove(license_id.to_owned(), Which::Id(id.to_owned()), None, act).await.map(drop)
    }

    async fn remove(
        &self,
        license_id: String,
        which: Which,
        key: Option<LicenseKey>,
        act: Act,
    ) -> Result<Option<i64>, Failure> {
        let this = self.clone();
        self.parts()
            .database
            .write(move |tx| async move {
                let (own, mut scope) = this.own(1);
                let sql = format!(
                    "UPDATE licenses SET activations_count = activations_count - 1 WHERE id = $1 AND {own} \
                     RETURNING product_id, key_sealed, max_activations, activations_count"
                );
                let mut values: Vec<Value> = vec![license_id.clone().into()];
                values.append(&mut scope);
                let license = first_row(&tx, sql, values).await?.ok_or(Fault::NoSuchLicense)?;
                let (named, value) = match which {
                    Which::Machine(fingerprint) => ("license_id = $1 AND fingerprint = $2".to_owned(), fingerprint),
                    Which::Id(id) => (format!("{} AND id = $2", checked("license_id = $1")), id),
                };
                let sql = format!("DELETE FROM activations WHERE {named} RETURNING *");
                let values = vec![license_id.clone().into(), value.into()];
                // The error takes the count back with everything else.
                let gone = first_row(&tx, sql, values).await?.ok_or(Fault::NoSuchActivation)?;
                let activation = Activation::from(Model::from_query_result(&gone, "")?);

                let key = match key {
                    Some(key) => Some(key),
                    None => this.parts().vault.open(&license_id, &license.try_get::<Vec<u8>>("", "key_sealed")?),
                };
                let product_id: String = license.try_get("", "product_id")?;
                let data = activation_data(&activation, key.as_ref());
                this.parts().outbox.emit(&tx, WEBHOOK, ACTIVATION_REMOVED, &this.tenant, &product_id, &data);
                let subject = activation_subject(&license_id, &activation.fingerprint);
                tx.audit(act.on(vec![activation.id, license_id.clone()]));
                this.store.announce(&tx, vec![license_id, subject]);
                let remaining = remaining_of(&license)?;
                act.answer(&tx, &remaining)?;
                Ok(remaining)
            })
            .await
    }
}

impl Attempt {
    async fn make(&self, tx: &Tx, key: &LicenseKey, act: &Act) -> Result<Activated, Failure> {
        if let Some(refreshed) = self.refresh(tx).await? {
            return Ok(refreshed);
        }
        let Some(remaining) = self.take_slot(tx).await? else {
            // The slot may have gone to the same machine in the meantime.
            return match self.refresh(tx).await? {
                Some(refreshed) => Ok(refreshed),
                None => Err(self.why_not(tx).await?.into()),
            };
        };
        if let Some(created) = self.insert(tx).await? {
            self.tell(tx, &created, key, act);
            return Ok((created, remaining));
        }
        // So did this one.
        self.give_back_slot(tx).await?;
        self.refresh(tx).await?.ok_or_else(|| Fault::NoSuchLicense.into())
    }

    /// Refreshes the activation if there is one and the licence is usable.
    async fn refresh(&self, tx: &Tx) -> Result<Option<Activated>, Failure> {
        let (own, scope) = self.store.own(5);
        let (usable, id_at) = (usable(5 + scope.len() + 1), 5 + scope.len() + 2);
        let sql = format!(
            "UPDATE activations SET last_check_at_ms = $1, name = COALESCE($2, name) \
             WHERE license_id = $3 AND fingerprint = $4 AND EXISTS \
             (SELECT 1 FROM licenses WHERE id = $5 AND {own} AND {usable}) \
             RETURNING id, license_id, fingerprint, name, created_at_ms, last_check_at_ms, \
             (SELECT max_activations - activations_count FROM licenses WHERE id = ${id_at}) AS remaining"
        );
        let mut values: Vec<Value> = vec![
            self.now_ms.into(),
            self.name.clone().into(),
            self.license_id.clone().into(),
            self.fingerprint.clone().into(),
            self.license_id.clone().into(),
        ];
        values.extend(scope);
        values.extend([self.now_ms.into(), self.license_id.clone().into()]);
        let Some(row) = first_row(tx, sql, values).await? else { return Ok(None) };
        let remaining: Option<i64> = row.try_get("", "remaining")?;
        let activation = Activation::from(Model::from_query_result(&row, "")?);
        Ok(Some((activation, remaining.map(|remaining| Ord::max(remaining, 0)))))
    }

    /// Takes a slot, and says how many are left; `None` where none was free or the licence is not usable.
    async fn take_slot(&self, tx: &Tx) -> Result<Option<Option<i64>>, Failure> {
        let (own, scope) = self.store.own(1);
        let usable = usable(1 + scope.len() + 1);
        let sql = format!(
            "UPDATE licenses SET activations_count = activations_count + 1 \
             WHERE id = $1 AND {own} AND {usable} \
             AND (max_activations IS NULL OR activations_count < max_activations) \
             RETURNING max_activations, activations_count"
        );
        let mut values: Vec<Value> = vec![self.license_id.clone().into()];
        values.extend(scope);
        values.push(self.now_ms.into());
        match first_row(tx, sql, values).await? {
            Some(row) => Ok(Some(remaining_of(&row)?)),
            None => Ok(None),
        }
    }

    /// Only ever after [`Self::take_slot`], whose lock still holds.
    async fn give_back_slot(&self, tx: &Tx) -> Result<(), Failure> {
        let sql = "UPDATE licenses SET activations_count = activations_count - 1 WHERE id = $1";
        execute(tx, sql, vec![self.license_id.clone().into()]).await?;
        Ok(())
    }

    /// Writes the activation; `None` if the machine has one by now.
    async fn insert(&self, tx: &Tx) -> Result<Option<Activation>, Failure> {
        let activation = Activation {
            id: new_id("act", &self.store.parts().clock),
            license_id: self.license_id.clone(),
            fingerprint: self.fingerprint.clone(),
            name: self.name.clone(),
            created_at_ms: self.now_ms,
            last_check_at_ms: self.now_ms,
        };
        let values = vec![
            activation.id.clone().into(),
            activation.license_id.clone().into(),
            activation.fingerprint.clone().into(),
            activation.name.clone().into(),
            self.now_ms.into(),
            self.now_ms.into(),
        ];
        let inserted = execute(
            tx,
            "INSERT INTO activations (id, license_id, fingerprint, name, created_at_ms, last_check_at_ms) \
             VALUES ($1, $2, $3, $4, $5, $6) ON CONFLICT (license_id, fingerprint) DO NOTHING",
            values,
        )
        .await?;
        Ok((inserted > 0).then_some(activation))
    }

    /// Why no slot was to be had.
    async fn why_not(&self, tx: &Tx) -> Result<Fault, Failure> {
        let (own, scope) = self.store.own(1);
        let sql = format!(
            "SELECT max_activations, activations_count, expires_at_ms, revoked_at_ms FROM licenses \
             WHERE id = $1 AND {own}"
        );
        let mut values: Vec<Value> = vec![self.license_id.clone().into()];
        values.extend(scope);
        let Some(row) = first_row(tx, sql, values).await? else { return Ok(Fault::NoSuchLicense) };
        let standing = Standing {
            max_activations: row.try_get("", "max_activations")?,
            activations_count: row.try_get("", "activations_count")?,
            expires_at_ms: row.try_get("", "expires_at_ms")?,
            revoked_at_ms: row.try_get("", "revoked_at_ms")?,
        };
        Ok(match standing.status(self.now_ms) {
            Status::Revoked => Fault::Revoked,
            Status::Expired => Fault::Expired,
            Status::Active => Fault::LimitReached,
        })
    }

    fn tell(&self, tx: &Tx, created: &Activation, key: &LicenseKey, act: &Act) {
        let parts = self.store.parts();
        let product_id = self.store.product_id.as_deref().unwrap_or_default();
        let data = activation_data(created, Some(key));
        parts.outbox.emit(tx, WEBHOOK, ACTIVATION_CREATED, &self.store.tenant, product_id, &data);
        tx.audit(act.on(vec![created.id.clone(), created.license_id.clone()]));
        let subject = activation_subject(&created.license_id, &created.fingerprint);
        self.store.store.announce(tx, vec![created.license_id.clone(), subject]);
    }
}

fn remaining_of(row: &QueryResult) -> Result<Option<i64>, sea_orm::DbErr> {
    let max_activations: Option<i64> = row.try_get("", "max_activations")?;
    let activations_count = row.try_get("", "activations_count")?;
    let standing = Standing { max_activations, activations_count, expires_at_ms: None, revoked_at_ms: None };
    Ok(standing.remaining())
}
