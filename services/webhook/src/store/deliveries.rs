//! Deliveries and their attempts, as callers see them.

use paperkey_kit::{
    db::{DbError, Reader, checked},
    values::Page,
};
use sea_orm::{
    ColumnTrait as _, ConnectionTrait as _, EntityTrait as _, PaginatorTrait as _, QueryFilter as _, QueryOrder as _,
    QuerySelect as _, Select, Value,
};

use super::{Failure, TenantStore, corrupt, sql};
use crate::domain::{
    Fault, could_be_id,
    delivery::{Delivery, DeliveryStatus, LoggedAttempt},
};

/// How many deliveries of an endpoint are listed.
const VISIBLE: u64 = 100;

pub(super) mod entity {
    #![expect(unreachable_pub, reason = "the macros of sea-orm make public items")]
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, DeriveEntityModel)]
    #[sea_orm(table_name = "deliveries")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub id: String,
        pub endpoint_id: String,
        pub event_id: String,
        pub team_id: String,
        pub mode: String,
        pub topic: String,
        pub status: String,
        pub attempts: i64,
        pub due_at_ms: i64,
        pub claimed_by: Option<String>,
        pub next_attempt_at_ms: Option<i64>,
        pub response_status: Option<i64>,
        pub duration_ms: Option<i64>,
        pub error: Option<String>,
        pub created_at_ms: i64,
        pub last_attempt_at_ms: Option<i64>,
        pub finished_at_ms: Option<i64>,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

mod attempts {
    #![expect(unreachable_pub, reason = "the macros of sea-orm make public items")]
    use sea_orm::entity::prelude::*;

    #[derive(Clone, Debug, DeriveEntityModel)]
    #[sea_orm(table_name = "attempts")]
    pub struct Model {
        #[sea_orm(primary_key, auto_increment = false)]
        pub delivery_id: String,
        #[sea_orm(primary_key, auto_increment = false)]
        pub number: i64,
        pub at_ms: i64,
        pub duration_ms: i64,
        pub response_status: Option<i64>,
        pub error: Option<String>,
        pub snippet: Option<String>,
    }

    #[derive(Clone, Copy, Debug, EnumIter, DeriveRelation)]
    pub enum Relation {}

    impl ActiveModelBehavior for ActiveModel {}
}

use entity::{Column, Entity, Model};

impl TenantStore {
    /// A page of the deliveries to an endpoint that are listed, newest first, and the token of the next.
    pub(crate) async fn deliveries(
        &self,
        product_id: &str,
        endpoint_id: &str,
        page: Page,
    ) -> Result<(Vec<Delivery>, Option<String>), Failure> {
        let endpoint = self.one_endpoint(product_id, endpoint_id)?;
        let of_endpoint = Entity::find()
            .filter(Column::TeamId.eq(&self.tenant.team_id))
            .filter(Column::Mode.eq(self.tenant.mode_word()))
            .filter(Column::EndpointId.eq(endpoint_id))
            .order_by_desc(Column::Id);
        let oldest = of_endpoint.clone().offset(VISIBLE - 1).limit(1);
        let mut listed = of_endpoint.limit(page.size + 1);
        if let Some(before) = &page.before {
            listed = listed.filter(Column::Id.lt(before));
        }
        let rows = self
            .store
            .database
            .read(move |reader| async move {
                if endpoint.count(&reader).await? == 0 {
                    return Err(Failure::from(Fault::NoSuchWebhook));
                }
                if let Some(oldest) = oldest.one(&reader).await? {
                    listed = listed.filter(Column::Id.gte(oldest.id));
                }
                Ok(listed.all(&reader).await?)
            })
            .await?;
        let (rows, next) = page.cut(rows, |row| &row.id);
        let deliveries = rows.into_iter().map(delivery).collect::<Result<_, _>>()?;
        Ok((deliveries, next))
    }

    /// One delivery, with its attempts, oldest first.
    pub(crate) async fn delivery(
        &self,
        product_id: &str,
        endpoint_id: &str,
        id: &str,
    ) -> Result<(Delivery, Vec<LoggedAttempt>), Failure> {
        let endpoint = self.one_endpoint(product_id, endpoint_id)?;
        if !could_be_id(id) {
            return Err(Fault::NoSuchDelivery.into());
        }
        let one = self.one_delivery(endpoint_id, id);
        let tries =
            attempts::Entity::find().filter(attempts::Column::DeliveryId.eq(id)).order_by_asc(attempts::Column::Number);
        self.store
            .database
            .snapshot(move |reader| async move {
                if endpoint.count(&reader).await? == 0 {
                    return Err(Failure::from(Fault::NoSuchWebhook));
                }
                let row = one.one(&reader).await?.ok_or(Fault::NoSuchDelivery)?;
                let tries = tries.all(&reader).await?.into_iter().map(logged).collect();
                Ok((delivery(row)?, tries))
            })
            .await
    }

    /// The body of an event, as it is sent, if it is still kept. What cannot be opened any more is as good as gone.
    pub(crate) async fn body(&self, event_id: &str) -> Result<Option<String>, Failure> {
        let own = checked("team_id = $2 AND mode = $3");
        let text = format!("SELECT body_sealed FROM events WHERE id = $1 AND {own}");
        let values: Vec<Value> =
            vec![event_id.into(), self.tenant.team_id.as_str().into(), self.tenant.mode_word().into()];
        let job = move |reader: Reader| async move {
            Ok::<_, DbError>(reader.query_one_raw(sql(reader.get_database_backend(), text, values)).await?)
        };
        let Some(row) = self.store.database.read(job).await? else { return Ok(None) };
        let sealed: Vec<u8> = row.try_get("", "body_sealed").map_err(DbError::from)?;
        let opened = self.store.bodies.open(event_id, &sealed).ok().and_then(|body| String::from_utf8(body).ok());
        if opened.is_none() {
            tracing::error!(event = event_id, "an event cannot be opened");
        }
        Ok(opened)
    }

    pub(super) fn one_delivery(&self, endpoint_id: &str, id: &str) -> Select<Entity> {
        Entity::find()
            .filter(Column::TeamId.eq(&self.tenant.team_id))
            .filter(Column::Mode.eq(self.tenant.mode_word()))
            .filter(Column::EndpointId.eq(endpoint_id))
            .filter(Column::Id.eq(id))
    }
}

pub(super) fn delivery(row: Model) -> Result<Delivery, DbError> {
    let status = DeliveryStatus::of(&row.status).ok_or_else(|| corrupt("the status of a delivery"))?;
    Ok(Delivery {
        id: row.id,
        event_id: row.event_id,
        topic: row.topic,
        status,
        attempts: row.attempts,
        response_status: row.response_status,
        duration_ms: row.duration_ms,
        error: row.error,
        created_at_ms: row.created_at_ms,
        last_attempt_at_ms: row.last_attempt_at_ms,
        next_attempt_at_ms: row.next_attempt_at_ms.filter(|_| status == DeliveryStatus::Pending),
    })
}

fn logged(row: attempts::Model) -> LoggedAttempt {
    LoggedAttempt {
        number: row.number,
        at_ms: row.at_ms,
        duration_ms: row.duration_ms,
        response_status: row.response_status,
        error: row.error,
        snippet: row.snippet,
    }
}
