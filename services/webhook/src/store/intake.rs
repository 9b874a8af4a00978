//! Events of other services, as they are taken over.

use std::collections::{HashMap, HashSet};

use paperkey_kit::{
    db::{DbError, Tx},
    events::{PRODUCT_DELETED, TEAM_DELETED},
    fail_point::{self, Point},
    ids::new_id,
    principal::Tenant,
    telemetry,
};
use paperkey_proto::{events::v1::Event, principal::v1::Mode};
use sea_orm::{
    ColumnTrait as _, ConnectionTrait as _, EntityTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _,
    Value, sea_query::LockType,
};

use super::{
    Act, Failure, MAX_VALUES, Store, TenantStore,
    endpoints::{Column, Entity, endpoint, first, remove, resources},
    rows, sql,
};
use crate::domain::{
    Fault, could_be_id, could_be_source,
    delivery::{Delivery, DeliveryStatus},
    endpoint::{Endpoint, Status},
    event,
};

const EVENT_COLUMNS: usize = 8;
const DELIVERY_COLUMNS: usize = 10;

impl Store {
    /// Takes events over: each is kept once, with one delivery for each endpoint that subscribes to it.
    ///
    /// An event to which nobody subscribes is kept only if somebody watches. One that no endpoint could ever get is passed over, loudly:
    /// refusing it would only stop those behind it.
    pub(crate) async fn ingest(&self, events: Vec<Event>) -> Result<(), DbError> {
        let (gone, events): (Vec<Event>, Vec<Event>) = events.into_iter().partition(|e| e.topic == TEAM_DELETED);
        // Teams first: to those that go, nothing more is sent, whatever came with the news.
        for event in gone {
            self.forget_team(&event.team_id).await?;
        }
        let mut deleted = Vec::new();
        let mut by_product: HashMap<(Tenant, String), Vec<Event>> = HashMap::new();
        for event in events {
            let Some(tenant) = tenant_of(&event) else {
                tracing::warn!(event = ?event.id, topic = ?event.topic, "an event that belongs to nobody is passed over");
                continue;
            };
            if event.topic == PRODUCT_DELETED {
                deleted.push((tenant, event.product_id));
            } else {
                by_product.entry((tenant, event.product_id.clone())).or_default().push(event);
            }
        }
        if deleted.is_empty() && by_product.is_empty() {
            return Ok(());
        }
        // Every intake takes its locks in the same order.
        let mut by_product: Vec<_> = by_product.into_iter().collect();
        by_product.sort_unstable_by(|((one, a), _), ((other, b), _)| {
            (a, &one.team_id, one.mode_word()).cmp(&(b, &other.team_id, other.mode_word()))
        });
        deleted.sort_unstable_by(|(_, one), (_, other)| one.cmp(other));
        let (this, buried) = (self.clone(), deleted.clone());
        let gone = self
            .database
            .write(move |tx| async move {
                let mut gone = Vec::new();
                // Deletions first: of a product that goes, nothing more is sent.
                for (tenant, product_id) in deleted {
                    gone.extend(this.of(tenant).bury(&tx, &product_id).await?);
                }
                let watched = if by_product.is_empty() { HashSet::new() } else { this.watched(&tx).await? };
                let mut made = 0;
                for ((tenant, product_id), events) in by_product {
                    let source = (tenant.team_id.clone(), tenant.mode_word().to_owned(), product_id);
                    let is_watched = watched.contains(&source);
                    made += this.of(tenant).fan_out(&tx, &source.2, events, is_watched).await?;
                }
                if made > 0 {
                    fail_point::reach(Point::FanOutBeforeCommit);
                    tx.after_commit(|| fail_point::reach(Point::FanOutAfterCommit));
                    tx.after_commit(move || this.wake.work());
                }
                Ok::<_, DbError>(gone)
            })
            .await?;
        if !buried.is_empty() {
            self.forget_soon(gone, buried).await;
        }
        Ok(())
    }
}

fn tenant_of(event: &Event) -> Option<Tenant> {
    let known = event.mode() != Mode::Unspecified && could_be_id(&event.team_id) && could_be_id(&event.id);
    let named = match event.topic.as_str() {
        PRODUCT_DELETED => could_be_id(&event.product_id),
        _ => could_be_source(&event.product_id),
    };
    (known && named).then(|| Tenant { team_id: event.team_id.clone(), mode: event.mode() })
}

impl TenantStore {
    /// Keeps events of one product, or of the team, with their deliveries, and says how many deliveries were made.
    async fn fan_out(&self, tx: &Tx, product_id: &str, events: Vec<Event>, is_watched: bool) -> Result<usize, DbError> {
        // The endpoints cannot be deleted until these deliveries are there to be deleted with them.
        let subscribed = self.of_product(product_id).order_by_asc(Column::Id).lock(LockType::KeyShare).all(tx).await?;
        let now_ms = self.store.clock.now_ms();
        let endpoints = subscribed.into_iter().map(|row| endpoint(row, now_ms));
        let endpoints = endpoints.collect::<Result<Vec<Endpoint>, _>>()?;
        let mut kept: Vec<(Event, Vec<u8>)> = Vec::new();
        let mut ids = HashSet::new();
        for event in events {
            let is_wanted = endpoints.iter().any(|endpoint| endpoint.events.contains(&event.topic))
                || (is_watched && event::is_known(product_id, &event.topic));
            if !is_wanted || !ids.insert(event.id.clone()) {
                continue;
            }
            if let Some(body) = event::body(&event.id, &event.topic, event.created_at_ms, &event.data_json) {
                kept.push((event, body));
            } else {
                tracing::error!(event = event.id, topic = event.topic, "the data of an event is not JSON");
            }
        }
        let new = self.keep_events(tx, &kept, now_ms).await?;
        let due_at_ms = now_ms.saturating_add(self.store.schedule.first_ms());
        let mut deliveries = Vec::new();
        for (event, _) in kept.iter().filter(|(event, _)| new.contains(&event.id)) {
            for endpoint in endpoints.iter().filter(|endpoint| endpoint.events.contains(&event.topic)) {
                let delivery = waiting(new_id("dlv", &self.store.clock), event, due_at_ms, now_ms);
                deliveries.push(self.row(&delivery, &endpoint.id));
            }
        }
        keep_deliveries(tx, &deliveries).await?;
        Ok(deliveries.len())
    }

    /// Makes a test event, and its delivery to that endpoint, whatever it subscribes to.
    pub(crate) async fn test_endpoint(&self, product_id: &str, id: &str, act: Act) -> Result<Delivery, Failure> {
        // It cannot be deleted until the delivery is there to be deleted with it.
        let query = self.one_endpoint(product_id, id)?.lock(LockType::KeyShare);
        let now_ms = self.store.clock.now_ms();
        let event = Event {
            id: new_id("evt", &self.store.clock),
            topic: event::TEST.to_owned(),
            team_id: self.tenant.team_id.clone(),
            mode: self.tenant.mode.into(),
            product_id: product_id.to_owned(),
            created_at_ms: now_ms,
            data_json: event::test_data(id),
            traceparent: telemetry::traceparent(),
        };
        let body = event::body(&event.id, &event.topic, now_ms, &event.data_json);
        let body = body.ok_or_else(|| DbError::Internal("a test event is not JSON".to_owned()))?;
        let due_at_ms = now_ms.saturating_add(self.store.schedule.first_ms());
        let delivery = waiting(new_id("dlv", &self.store.clock), &event, due_at_ms, now_ms);
        let this = self.clone();
        self.store
            .database
            .write(move |tx| async move {
                let endpoint = first(query, now_ms, &tx).await?.ok_or(Fault::NoSuchWebhook)?;
                if endpoint.status == Status::Paused {
                    return Err(Fault::WebhookPaused.into());
                }
                this.keep_events(&tx, &[(event, body)], now_ms).await?;
                keep_deliveries(&tx, &[this.row(&delivery, &endpoint.id)]).await?;
                let on = std::iter::once(delivery.id.clone());
                tx.audit(act.on(on.chain(resources(&endpoint.id, &endpoint.product_id)).collect()));
                tx.after_commit(move || this.store.wake.work());
                act.answer(&tx, &delivery)?;
                Ok(delivery)
            })
            .await
    }

    fn row(&self, delivery: &Delivery, endpoint_id: &str) -> [Value; DELIVERY_COLUMNS] {
        [
            delivery.id.as_str().into(),
            endpoint_id.into(),
            delivery.event_id.as_str().into(),
            self.tenant.team_id.as_str().into(),
            self.tenant.mode_word().into(),
            delivery.topic.as_str().into(),
            delivery.attempts.into(),
            delivery.next_attempt_at_ms.unwrap_or(delivery.created_at_ms).into(),
            delivery.next_attempt_at_ms.into(),
            delivery.created_at_ms.into(),
        ]
    }

    /// Keeps those that are not kept yet, and says which these are.
    async fn keep_events(&self, tx: &Tx, kept: &[(Event, Vec<u8>)], now_ms: i64) -> Result<HashSet<String>, DbError> {
        let mut new = HashSet::new();
        for chunk in kept.chunks(MAX_VALUES / EVENT_COLUMNS) {
            let values = chunk.iter().flat_map(|(event, body)| {
                let row: [Value; EVENT_COLUMNS] = [
                    event.id.as_str().into(),
                    self.tenant.team_id.as_str().into(),
                    self.tenant.mode_word().into(),
                    event.product_id.as_str().into(),
                    event.topic.as_str().into(),
                    self.store.bodies.seal(&event.id, body).into(),
                    now_ms.into(),
                    Some(event.traceparent.clone()).filter(|parent| !parent.is_empty()).into(),
                ];
                row
            });
            let text = format!(
                "INSERT INTO events (id, team_id, mode, product_id, topic, body_sealed, created_at_ms, traceparent) \
                 VALUES {} ON CONFLICT (id) DO NOTHING RETURNING id",
                rows(chunk.len(), EVENT_COLUMNS, 0)
            );
            for row in tx.query_all_raw(sql(tx.get_database_backend(), text, values.collect())).await? {
                new.insert(row.try_get("", "id")?);
            }
        }
        Ok(new)
    }

    /// Removes the endpoints of a product and whoever watches it, and remembers that it is gone: an endpoint that is
    /// being made for it at this moment is either seen here or finds the tombstone. Answers the endpoints; what was or
    /// would be sent to them, and the events, may be millions of rows and go afterwards.
    async fn bury(&self, tx: &Tx, product_id: &str) -> Result<Vec<String>, DbError> {
        let backend = tx.get_database_backend();
        let tombstone = sql(
            backend,
            "INSERT INTO products (id, team_id, mode, deleted_at_ms) VALUES ($1, $2, $3, $4) \
             ON CONFLICT (id) DO UPDATE SET deleted_at_ms = excluded.deleted_at_ms \
             WHERE products.team_id = excluded.team_id AND products.mode = excluded.mode",
            vec![
                product_id.into(),
                self.tenant.team_id.as_str().into(),
                self.tenant.mode_word().into(),
                self.store.clock.now_ms().into(),
            ],
        );
        tx.execute_raw(tombstone).await?;
        let endpoints = Entity::find()
            .filter(self.condition())
            .filter(Column::ProductId.eq(product_id))
            .order_by_asc(Column::Id)
            .lock(LockType::Update)
            .all(tx)
            .await?;
        let mut gone = Vec::with_capacity(endpoints.len());
        for endpoint in endpoints {
            remove(tx, &endpoint.id).await?;
            gone.push(endpoint.id.clone());
            let wake = self.store.wake.clone();
            tx.after_commit(move || wake.changed(&endpoint.id));
        }
        // Whoever watches learns that it is gone when they ask again.
        let watchers = sql(
            backend,
            "DELETE FROM watchers WHERE product_id = $1 AND team_id = $2 AND mode = $3",
            vec![product_id.into(), self.tenant.team_id.as_str().into(), self.tenant.mode_word().into()],
        );
        tx.execute_raw(watchers).await?;
        Ok(gone)
    }
}

/// A delivery that was not tried yet.
fn waiting(id: String, event: &Event, due_at_ms: i64, now_ms: i64) -> Delivery {
    Delivery {
        id,
        event_id: event.id.clone(),
        topic: event.topic.clone(),
        status: DeliveryStatus::Pending,
        attempts: 0,
        response_status: None,
        duration_ms: None,
        error: None,
        created_at_ms: now_ms,
        last_attempt_at_ms: None,
        next_attempt_at_ms: Some(due_at_ms),
    }
}

/// Writes new deliveries.
async fn keep_deliveries(tx: &Tx, deliveries: &[[Value; DELIVERY_COLUMNS]]) -> Result<(), DbError> {
    for chunk in deliveries.chunks(MAX_VALUES / DELIVERY_COLUMNS) {
        let text = format!(
            "INSERT INTO deliveries (id, endpoint_id, event_id, team_id, mode, topic, attempts, due_at_ms, \
             next_attempt_at_ms, created_at_ms, status) SELECT v.column1, v.column2, v.column3, v.column4, \
             v.column5, v.column6, v.column7, v.column8, v.column9, v.column10, 'pending' FROM (VALUES {}) AS v",
            rows(chunk.len(), DELIVERY_COLUMNS, 0)
        );
        tx.execute_raw(sql(tx.get_database_backend(), text, chunk.concat())).await?;
    }
    Ok(())
}
