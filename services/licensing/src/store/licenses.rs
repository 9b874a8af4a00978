//! Licences, as rows.

use std::sync::Arc;

use paperkey_kit::{
    db::{DbError, Tx, check, checked},
    ids::new_id,
    values::struct_of,
};
use sea_orm::{
    ActiveModelTrait as _, ColumnTrait as _, Condition, EntityTrait as _, FromQueryResult as _, IntoActiveModel as _,
    QueryFilter as _, QuerySelect as _, Select, TryInsertResult, Value, sea_query::Expr,
};

use super::{
    Act, Failure, TenantStore, Vault, View, WEBHOOK, activations, clients::lock_client, first_row,
    lookups::key_subject, products::lock_product,
};
use crate::domain::{
    Fault, could_be_id,
    event::{LICENSE_CREATED, LICENSE_EXPIRED, LICENSE_REINSTATED, LICENSE_REVOKED, LICENSE_UPDATED, license_data},
    license::{Activation, Changes, License, Standing, Status, Terms},
    license_key::LicenseKey,
};

mod entity {
    #![expect(unreachable_pub, reason = "the macros of sea-orm make public items")]
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, DeriveEntityModel)]
    #[sea_orm(table_name = "licenses")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub team_id: String,
        pub mode: String,
        pub product_id: String,
        pub key_hash: Vec<u8>,
        pub key_sealed: Vec<u8>,
        pub email: Option<String>,
        pub email_lower: Option<String>,
        pub client_id: Option<String>,
        pub max_activations: Option<i64>,
        pub activations_count: i64,
        pub expires_at_ms: Option<i64>,
        pub expired_event_at_ms: Option<i64>,
        pub metadata: Option<String>,
        pub created_at_ms: i64,
        pub updated_at_ms: i64,
        pub revoked_at_ms: Option<i64>,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) use entity::{Column, Entity, Model};

/// New keys that are tried before giving up: the first collides once in 2⁷⁵ over the number of licences.
const KEYS_TRIED: usize = 4;
/// Activations that are shown with a licence.
const SHOWN_ACTIVATIONS: u64 = 100;

impl TenantStore {
    /// Issues a licence for a product that was found to exist.
    pub async fn create(&self, product_id: String, terms: Terms, act: Act) -> Result<License, Failure> {
        self.create_with(product_id, terms, LicenseKey::random, act).await
    }

    /// The same with keys from elsewhere: the next is taken where one is in use already.
    pub async fn create_with(
        &self,
        product_id: String,
        terms: Terms,
        mut next_key: impl FnMut() -> LicenseKey + Send + 'static,
        act: Act,
    ) -> Result<License, Failure> {
        let this = self.clone();
        self.parts()
            .database
            .write(move |tx| async move {
                lock_product(&tx, &this.tenant, &product_id).await?;
                if let Some(client_id) = &terms.client_id {
                    lock_client(&tx, &this.tenant, client_id).await?;
                }
                let license = this.insert(&tx, product_id, terms, &mut next_key).await?;
                this.tell(&tx, LICENSE_CREATED, &license);
                tx.audit(act.on(vec![license.id.clone(), license.product_id.clone()]));
                act.answer(&tx, &license)?;
                Ok(license)
            })
            .await
    }

    /// One licence, with its most recent activations.
    pub async fn get(&self, id: &str) -> Result<(License, Vec<Activation>), Failure> {
        let query = self.one(id)?;
        let of_license = activations::of_license(id).limit(SHOWN_ACTIVATIONS);
        let (row, activations) = self
            .parts()
            .database
            .snapshot(move |reader| async move {
                let row = query.one(&reader).await?.ok_or(Fault::NoSuchLicense)?;
                let activations = of_license.all(&reader).await?;
                Ok::<_, Failure>((row, activations))
            })
            .await?;
        let license = license_of(row, &self.parts().vault);
        Ok((license, activations.into_iter().map(Activation::from).collect()))
    }

    /// Changes a licence. A change that changes nothing is not told.
    pub async fn update(&self, id: &str, changes: Changes, act: Act) -> Result<License, Failure> {
        let query = self.one(id)?;
        // Touching the row locks it, so that two merges of its metadata follow each other on either engine.
        let lock = Entity::update_many()
            .col_expr(Column::UpdatedAtMs, Expr::col(Column::UpdatedAtMs))
            .filter(self.is_own())
            .filter(Column::Id.eq(id));
        let this = self.clone();
        self.parts()
            .database
            .write(move |tx| async move {
                if let Some(Some(client_id)) = &changes.client_id {
                    lock_client(&tx, &this.tenant, client_id).await?;
                }
                lock.exec(&tx).await?;
                let row = query.one(&tx).await?.ok_or(Fault::NoSuchLicense)?;
                let was_told = row.expired_event_at_ms.is_some();
                let before = license_of(row.clone(), &this.parts().vault);
                let terms_before = terms_of(&before);
                let terms = terms_before.changed(changes).map_err(Failure::Invalid)?;
                if terms == terms_before {
                    return Ok(before);
                }
                let now_ms = this.store.now_ms();
                let after = with_terms(before.clone(), terms, now_ms);
                let expired = |license: &License| license.standing.expires_at_ms.is_some_and(|at_ms| at_ms <= now_ms);
                // It was expired for those who asked, even if the sweep had not come by: that is told before it ends.
                if !was_told && before.standing.status(now_ms) == Status::Expired && !expired(&after) {
                    this.tell(&tx, LICENSE_EXPIRED, &before);
                }
                // Extending arms the event again; moving an end that was told within the past does not.
                let expired_event_at_ms = row.expired_event_at_ms.filter(|_| expired(&after));
                let written = Model {
                    email_lower: after.email.as_deref().map(str::to_lowercase),
                    email: after.email.clone(),
                    client_id: after.client_id.clone(),
                    max_activations: after.standing.max_activations,
                    expires_at_ms: after.standing.expires_at_ms,
                    expired_event_at_ms,
                    // What was not changed stays as it is, readable or not.
                    metadata: if after.metadata == before.metadata {
                        row.metadata
                    } else {
                        after.metadata.as_ref().map(ToString::to_string)
                    },
                    updated_at_ms: now_ms,
                    ..row
                };
                let write = Entity::update_many().set(written.into_active_model().reset_all());
                write.filter(this.is_own()).filter(Column::Id.eq(&after.id)).exec(&tx).await?;
                this.tell(&tx, LICENSE_UPDATED, &after);
                this.changed(&tx, &after, &act);
                Ok(after)
            })
            .await
    }

    /// Takes a licence back. One that was taken back already stays as it is, and nothing is told.
    pub async fn revoke(&self, id: &str, act: Act) -> Result<License, Failure> {
        self.turn(id, true, LICENSE_REVOKED, act).await
    }

    /// Gives a licence that was taken back again. One that is not stays as it is, and nothing is told.
    pub async fn reinstate(&self, id: &str, act: Act) -> Result<License, Failure> {
        self.turn(id, false, LICENSE_REINSTATED, act).await
    }

    async fn turn(&self, id: &str, revoke: bool, topic: &'static str, act: Act) -> Result<License, Failure> {
        let query = self.one(id)?;
        let now_ms = self.store.now_ms();
        let (revoked_at_ms, guard) = if revoke { (Some(now_ms), "IS NULL") } else { (None, "IS NOT NULL") };
        let (own, mut scope) = self.own(3);
        let guard = checked(&format!("revoked_at_ms {guard}"));
        let sql = format!(
            "UPDATE licenses SET revoked_at_ms = $1, updated_at_ms = $2 WHERE id = $3 AND {own} AND {guard} RETURNING *"
        );
        let mut values: Vec<Value> = vec![revoked_at_ms.into(), now_ms.into(), id.to_owned().into()];
        values.append(&mut scope);
        let this = self.clone();
        self.parts()
            .database
            .write(move |tx| async move {
                let vault = &this.parts().vault;
                let license = if let Some(turned) = first_row(&tx, sql, values).await? {
                    let license = license_of(Model::from_query_result(&turned, "")?, vault);
                    this.tell(&tx, topic, &license);
                    this.changed(&tx, &license, &act);
                    license
                } else {
                    let row = query.one(&tx).await?.ok_or(Fault::NoSuchLicense)?;
                    license_of(row, vault)
                };
                act.answer(&tx, &license)?;
                Ok(license)
            })
            .await
    }

    /// The licence behind a key, for a check: from memory, else from the database. Needs a store within a product.
    pub async fn find(&self, key: &LicenseKey) -> Result<Option<Arc<View>>, Failure> {
        let (key_hash, product_id) = (self.parts().vault.hash(key), self.checked_product()?);
        match self.parts().lookups.license(&self.tenant, product_id, &key_hash) {
            Some(known) => Ok(known),
            None => self.load(key_hash).await,
        }
    }

    /// The same, but that there is none is not believed from memory.
    pub(super) async fn find_surely(&self, key: &LicenseKey) -> Result<Arc<View>, Failure> {
        let (key_hash, product_id) = (self.parts().vault.hash(key), self.checked_product()?);
        let known = self.parts().lookups.license(&self.tenant, product_id, &key_hash).flatten();
        let found = match known {
            Some(view) => Some(view),
            None => self.load(key_hash).await?,
        };
        found.ok_or_else(|| Fault::NoSuchLicense.into())
    }

    async fn load(&self, key_hash: [u8; 32]) -> Result<Option<Arc<View>>, Failure> {
        let query = Entity::find().filter(self.is_own()).filter(Column::KeyHash.eq(key_hash.as_slice()));
        let began = self.parts().lookups.now();
        let row = self
            .parts()
            .database
            .read(move |reader| async move { query.one(&reader).await.map_err(Failure::from) })
            .await?;
        let found = match row {
            Some(row) => {
                let standing = standing_of(&row);
                let bytes = row.metadata.as_ref().map_or(0, String::len);
                let metadata = metadata_of(&row.id, row.metadata.as_deref()).as_ref().and_then(struct_of);
                Some((Arc::new(View { id: row.id, standing, metadata }), bytes))
            }
            None => None,
        };
        let view = found.as_ref().map(|(view, _)| Arc::clone(view));
        self.parts().lookups.learn_license(&self.tenant, self.checked_product()?, key_hash, found, began);
        Ok(view)
    }

    fn checked_product(&self) -> Result<&str, Fault> {
        self.product_id.as_deref().ok_or(Fault::NoSuchProduct)
    }

    async fn insert(
        &self,
        tx: &Tx,
        product_id: String,
        terms: Terms,
        next_key: &mut (impl FnMut() -> LicenseKey + Send),
    ) -> Result<License, Failure> {
        let now_ms = self.store.now_ms();
        for _ in 0..KEYS_TRIED {
            let key = next_key();
            let id = new_id("lic", &self.parts().clock);
            let key_hash = self.parts().vault.hash(&key).to_vec();
            let row = Model {
                team_id: self.tenant.team_id.clone(),
                mode: self.tenant.mode_word().to_owned(),
                product_id: product_id.clone(),
                key_sealed: self.parts().vault.seal(&id, &key),
                email_lower: terms.email.as_deref().map(str::to_lowercase),
                email: terms.email.clone(),
                client_id: terms.client_id.clone(),
                max_activations: terms.max_activations,
                activations_count: 0,
                expires_at_ms: terms.expires_at_ms,
                expired_event_at_ms: None,
                metadata: terms.metadata.as_ref().map(ToString::to_string),
                created_at_ms: now_ms,
                updated_at_ms: now_ms,
                revoked_at_ms: None,
                id,
                key_hash,
            };
            let insert = Entity::insert(row.clone().into_active_model().reset_all())
                .on_conflict_do_nothing_on([Column::KeyHash]);
            if let TryInsertResult::Inserted(1..) = insert.exec_without_returning(tx).await? {
                self.store.announce(tx, vec![key_subject(&row.key_hash)]);
                return Ok(license_of(row, &self.parts().vault));
            }
        }
        Err(DbError::Internal("no new license key is free".to_owned()).into())
    }

    /// What is checked of one licence.
    pub(super) fn is_own(&self) -> Expr {
        check(self.condition())
    }

    fn condition(&self) -> Condition {
        Condition::all()
            .add(Column::TeamId.eq(&self.tenant.team_id))
            .add(Column::Mode.eq(self.tenant.mode_word()))
            .add_option(self.product_id.as_ref().map(|product_id| Column::ProductId.eq(product_id)))
    }

    pub(super) fn scope(&self) -> Select<Entity> {
        Entity::find().filter(self.condition())
    }

    fn one(&self, id: &str) -> Result<Select<Entity>, Fault> {
        if could_be_id(id) {
            Ok(Entity::find().filter(self.is_own()).filter(Column::Id.eq(id)))
        } else {
            Err(Fault::NoSuchLicense)
        }
    }

    /// Records an event of a licence.
    pub(super) fn tell(&self, tx: &Tx, topic: &str, license: &License) {
        let data = license_data(license, self.store.now_ms());
        self.parts().outbox.emit(tx, WEBHOOK, topic, &self.tenant, &license.product_id, &data);
    }

    /// Records who changed a licence, and that it has changed.
    fn changed(&self, tx: &Tx, license: &License, act: &Act) {
        tx.audit(act.on(vec![license.id.clone()]));
        self.store.announce(tx, vec![license.id.clone()]);
    }
}

fn standing_of(row: &Model) -> Standing {
    Standing {
        max_activations: row.max_activations,
        activations_count: row.activations_count,
        expires_at_ms: row.expires_at_ms,
        revoked_at_ms: row.revoked_at_ms,
    }
}

/// Metadata that cannot be read any more does not take the rest of its licence with it.
fn metadata_of(license_id: &str, text: Option<&str>) -> Option<serde_json::Value> {
    let metadata = serde_json::from_str(text?).ok();
    if metadata.is_none() {
        tracing::error!(license_id, "the stored metadata of a license is not JSON");
    }
    metadata
}

pub(super) fn license_of(row: Model, vault: &Vault) -> License {
    License {
        standing: standing_of(&row),
        key: vault.open(&row.id, &row.key_sealed),
        metadata: metadata_of(&row.id, row.metadata.as_deref()),
        id: row.id,
        product_id: row.product_id,
        email: row.email,
        client_id: row.client_id,
        created_at_ms: row.created_at_ms,
        updated_at_ms: row.updated_at_ms,
    }
}

fn terms_of(license: &License) -> Terms {
    Terms {
        email: license.email.clone(),
        client_id: license.client_id.clone(),
        max_activations: license.standing.max_activations,
        expires_at_ms: license.standing.expires_at_ms,
        metadata: license.metadata.clone(),
    }
}

fn with_terms(license: License, terms: Terms, now_ms: i64) -> License {
    let Terms { email, client_id, max_activations, expires_at_ms, metadata } = terms;
    let standing = Standing { max_activations, expires_at_ms, ..license.standing };
    License { email, client_id, metadata, standing, updated_at_ms: now_ms, ..license }
}
