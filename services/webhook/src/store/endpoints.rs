//! Endpoints, as rows. Those of the team itself have no product: their `product_id` is empty.

use paperkey_kit::{
    db::{DbError, Tx},
    ids::new_id,
    secrets::Secret,
    values::Page,
};
use sea_orm::{
    ActiveModelTrait as _, ColumnTrait as _, Condition, ConnectionTrait, EntityTrait as _, IntoActiveModel as _,
    PaginatorTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _, Select, sea_query::LockType,
};

use super::{Act, Failure, TenantStore, corrupt, sql};
use crate::domain::{
    Fault, could_be_id, could_be_source,
    endpoint::{Changes, Endpoint, MAX_ENDPOINTS, PREVIOUS_SECRET_MS, Status},
    signature::new_secret,
};

pub(super) mod entity {
    #![expect(unreachable_pub, reason = "the macros of sea-orm make public items")]
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, DeriveEntityModel)]
    #[sea_orm(table_name = "endpoints")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub team_id: String,
        pub mode: String,
        pub product_id: String,
        pub url: String,
        pub events: String,
        pub secret_sealed: Vec<u8>,
        pub previous_secret_sealed: Option<Vec<u8>>,
        pub previous_secret_until_ms: Option<i64>,
        pub status: String,
        pub consecutive_failures: i64,
        pub created_at_ms: i64,
        pub updated_at_ms: i64,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

pub(super) use entity::{Column, Entity, Model};

impl TenantStore {
    /// Writes a new endpoint, and answers it with its secret.
    pub(crate) async fn create_endpoint(
        &self,
        product_id: String,
        url: String,
        events: Vec<String>,
        act: Act,
    ) -> Result<(Endpoint, Secret), Failure> {
        if !could_be_source(&product_id) {
            return Err(Fault::NoSuchProduct.into());
        }
        let now_ms = self.store.clock.now_ms();
        let endpoint = Endpoint {
            id: new_id("wh", &self.store.clock),
            product_id,
            url,
            events,
            status: Status::Active,
            consecutive_failures: 0,
            created_at_ms: now_ms,
            updated_at_ms: now_ms,
            previous_secret_until_ms: None,
        };
        let secret = new_secret();
        let row = Model {
            id: endpoint.id.clone(),
            team_id: self.tenant.team_id.clone(),
            mode: self.tenant.mode_word().to_owned(),
            product_id: endpoint.product_id.clone(),
            url: endpoint.url.clone(),
            events: words(&endpoint.events),
            secret_sealed: self.store.secrets.seal(&endpoint.id, secret.expose().as_bytes()),
            previous_secret_sealed: None,
            previous_secret_until_ms: None,
            status: endpoint.status.word().to_owned(),
            consecutive_failures: 0,
            created_at_ms: now_ms,
            updated_at_ms: now_ms,
        };
        let this = self.clone();
        self.store
            .database
            .write(move |tx| async move {
                this.lock_source(&tx, &endpoint.product_id).await?;
                if this.of_product(&endpoint.product_id).count(&tx).await? >= MAX_ENDPOINTS {
                    return Err(Failure::from(Fault::TooManyWebhooks));
                }
                Entity::insert(row.into_active_model().reset_all()).exec_without_returning(&tx).await?;
                tx.audit(act.on(resources(&endpoint.id, &endpoint.product_id)));
                let made = (endpoint, secret);
                act.answer(&tx, &made)?;
                Ok(made)
            })
            .await
    }

    /// One endpoint.
    pub(crate) async fn endpoint(&self, product_id: &str, id: &str) -> Result<Endpoint, Failure> {
        let query = self.one_endpoint(product_id, id)?;
        let now_ms = self.store.clock.now_ms();
        let found = self.store.database.read(move |reader| async move { first(query, now_ms, &reader).await }).await?;
        found.ok_or_else(|| Fault::NoSuchWebhook.into())
    }

    /// A page of a product's endpoints, or of the team's, newest first, and the token of the next.
    pub(crate) async fn endpoints(
        &self,
        product_id: &str,
        page: Page,
    ) -> Result<(Vec<Endpoint>, Option<String>), Failure> {
        if !could_be_source(product_id) {
            return Err(Fault::NoSuchProduct.into());
        }
        let mut query = self.of_product(product_id).order_by_desc(Column::Id).limit(page.size + 1);
        if let Some(before) = &page.before {
            query = query.filter(Column::Id.lt(before));
        }
        let rows = self
            .store
            .database
            .read(move |reader| async move { query.all(&reader).await.map_err(Failure::from) })
            .await?;
        let (rows, next) = page.cut(rows, |row| &row.id);
        let now_ms = self.store.clock.now_ms();
        let endpoints = rows.into_iter().map(|row| endpoint(row, now_ms)).collect::<Result<_, _>>()?;
        Ok((endpoints, next))
    }

    /// Changes one. Resuming it makes what was held due.
    pub(crate) async fn update_endpoint(
        &self,
        product_id: &str,
        id: &str,
        changes: Changes,
        act: Act,
    ) -> Result<Endpoint, Failure> {
        let query = self.one_endpoint(product_id, id)?.lock(LockType::NoKeyUpdate);
        let (this, id) = (self.clone(), id.to_owned());
        self.store
            .database
            .write(move |tx| async move {
                let now_ms = this.store.clock.now_ms();
                let before = first(query, now_ms, &tx).await?.ok_or(Fault::NoSuchWebhook)?;
                let after = before.changed(changes);
                if after == before {
                    return Ok(before);
                }
                let after = Endpoint { updated_at_ms: now_ms, ..after };
                let write = sql(
                    tx.get_database_backend(),
                    "UPDATE endpoints SET url = $1, events = $2, status = $3, consecutive_failures = $4, \
                     updated_at_ms = $5 WHERE id = $6",
                    vec![
                        after.url.as_str().into(),
                        words(&after.events).into(),
                        after.status.word().into(),
                        after.consecutive_failures.into(),
                        now_ms.into(),
                        after.id.as_str().into(),
                    ],
                );
                tx.execute_raw(write).await?;
                if before.status == Status::Paused && after.status == Status::Active {
                    // Those on their way keep their claim.
                    let due = sql(
                        tx.get_database_backend(),
                        "UPDATE deliveries SET due_at_ms = $1, next_attempt_at_ms = $1 \
                         WHERE endpoint_id = $2 AND status = 'pending' AND claimed_by IS NULL AND due_at_ms > $1",
                        vec![now_ms.into(), after.id.as_str().into()],
                    );
                    tx.execute_raw(due).await?;
                }
                tx.audit(act.on(resources(&after.id, &after.product_id)));
                tx.after_commit(move || this.store.wake.changed(&id));
                Ok(after)
            })
            .await
    }

    /// Gives one a new secret, and answers it with that. The one before signs too for a while; one from before that
    /// ends.
    pub(crate) async fn rotate_secret(
        &self,
        product_id: &str,
        id: &str,
        act: Act,
    ) -> Result<(Endpoint, Secret), Failure> {
        let query = self.one_endpoint(product_id, id)?.lock(LockType::NoKeyUpdate);
        let secret = new_secret();
        let sealed = self.store.secrets.seal(id, secret.expose().as_bytes());
        let (this, id) = (self.clone(), id.to_owned());
        self.store
            .database
            .write(move |tx| async move {
                let now_ms = this.store.clock.now_ms();
                let until_ms = now_ms.saturating_add(PREVIOUS_SECRET_MS);
                let before = first(query, now_ms, &tx).await?.ok_or(Fault::NoSuchWebhook)?;
                // Both are sealed for the same row, so the one that goes is kept as it is.
                let write = sql(
                    tx.get_database_backend(),
                    "UPDATE endpoints SET previous_secret_sealed = secret_sealed, previous_secret_until_ms = $1, \
                     secret_sealed = $2, updated_at_ms = $3 WHERE id = $4",
                    vec![until_ms.into(), sealed.into(), now_ms.into(), id.as_str().into()],
                );
                tx.execute_raw(write).await?;
                let after = Endpoint { previous_secret_until_ms: Some(until_ms), updated_at_ms: now_ms, ..before };
                tx.audit(act.on(resources(&after.id, &after.product_id)));
                tx.after_commit(move || this.store.wake.changed(&id));
                let made = (after, secret);
                act.answer(&tx, &made)?;
                Ok(made)
            })
            .await
    }

    /// Removes one: from then on nothing is sent to it and nothing comes in for it. What was or would be sent goes with
    /// it, or, where that is much, with the next housekeeping.
    pub(crate) async fn delete_endpoint(&self, product_id: &str, id: &str, act: Act) -> Result<(), Failure> {
        let delete = self.one_endpoint(product_id, id)?.lock(LockType::Update);
        let (this, id, product_id) = (self.clone(), id.to_owned(), product_id.to_owned());
        let gone = id.clone();
        self.store
            .database
            .write(move |tx| async move {
                // Locked first: what comes in for it at this moment is then either there afterwards or never made.
                delete.one(&tx).await?.ok_or(Fault::NoSuchWebhook)?;
                remove(&tx, &id).await?;
                tx.audit(act.on(resources(&id, &product_id)));
                tx.after_commit(move || this.store.wake.changed(&id));
                Ok::<_, Failure>(())
            })
            .await?;
        self.store.forget_soon(vec![gone], Vec::new()).await;
        Ok(())
    }

    /// Locks what is known of a product, or of the team in this mode, until the transaction ends, so that its endpoints
    /// can be counted and its deletion waits. A deleted product cannot be locked.
    pub(super) async fn lock_source(&self, tx: &Tx, product_id: &str) -> Result<(), Failure> {
        // A slash is in no id, so the row of a team is never a product's.
        let id = match product_id {
            "" => format!("{}/{}", self.tenant.team_id, self.tenant.mode_word()),
            product_id => product_id.to_owned(),
        };
        let lock = sql(
            tx.get_database_backend(),
            "INSERT INTO products (id, team_id, mode) VALUES ($1, $2, $3) \
             ON CONFLICT (id) DO UPDATE SET mode = excluded.mode \
             WHERE products.deleted_at_ms IS NULL AND products.team_id = excluded.team_id \
             AND products.mode = excluded.mode",
            vec![id.into(), self.tenant.team_id.as_str().into(), self.tenant.mode_word().into()],
        );
        match tx.execute_raw(lock).await?.rows_affected() {
            0 => Err(Fault::NoSuchProduct.into()),
            _ => Ok(()),
        }
    }

    pub(super) fn condition(&self) -> Condition {
        Condition::all().add(Column::TeamId.eq(&self.tenant.team_id)).add(Column::Mode.eq(self.tenant.mode_word()))
    }

    pub(super) fn of_product(&self, product_id: &str) -> Select<Entity> {
        Entity::find().filter(self.condition()).filter(Column::ProductId.eq(product_id))
    }

    pub(super) fn one_endpoint(&self, product_id: &str, id: &str) -> Result<Select<Entity>, Fault> {
        if could_be_source(product_id) && could_be_id(id) {
            Ok(self.of_product(product_id).filter(Column::Id.eq(id)))
        } else {
            Err(Fault::NoSuchWebhook)
        }
    }
}

/// Removes an endpoint that the transaction has locked, and nothing else: what was or would be sent to it may be
/// millions of rows.
pub(super) async fn remove(tx: &Tx, id: &str) -> Result<(), DbError> {
    let text = "DELETE FROM endpoints WHERE id = $1";
    tx.execute_raw(sql(tx.get_database_backend(), text, vec![id.into()])).await?;
    Ok(())
}

/// What an act was on: an endpoint, and its product where it has one.
pub(super) fn resources(id: &str, product_id: &str) -> Vec<String> {
    [id, product_id].into_iter().filter(|id| !id.is_empty()).map(str::to_owned).collect()
}

/// The endpoint that is asked for, as it is now.
pub(super) async fn first(
    query: Select<Entity>,
    now_ms: i64,
    connection: &impl ConnectionTrait,
) -> Result<Option<Endpoint>, Failure> {
    Ok(query.one(connection).await?.map(|row| endpoint(row, now_ms)).transpose()?)
}

fn words(events: &[String]) -> String {
    serde_json::Value::from(events).to_string()
}

pub(super) fn endpoint(row: Model, now_ms: i64) -> Result<Endpoint, DbError> {
    Ok(Endpoint {
        events: serde_json::from_str(&row.events).map_err(|_| corrupt("a list of events"))?,
        status: Status::of(&row.status).ok_or_else(|| corrupt("the status of an endpoint"))?,
        id: row.id,
        product_id: row.product_id,
        url: row.url,
        consecutive_failures: row.consecutive_failures,
        created_at_ms: row.created_at_ms,
        updated_at_ms: row.updated_at_ms,
        previous_secret_until_ms: row.previous_secret_until_ms.filter(|until_ms| *until_ms > now_ms),
    })
}
