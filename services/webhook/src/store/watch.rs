//! Who watches what happens, and what they are shown.
//!
//! Whoever watches has a row: what is watched is kept in whichever process it arrives, though nobody subscribes to it.
//! Events are found by the time of their arrival. They do not become visible in that order: another process may be
//! slower, or its clock behind. So the last seconds are looked through again and again, and what was shown of them is
//! remembered. Of a product with very many events, that is less than these seconds, so that it stays bounded.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use paperkey_kit::{
    db::{DbError, Tx},
    ids::new_id,
};
use sea_orm::{ColumnTrait as _, ConnectionTrait as _, EntityTrait as _, QueryFilter as _, QueryOrder as _, Value};

use super::{
    Failure, Store, TenantStore,
    deliveries::{delivery, entity},
    places, sql,
};
use crate::domain::{
    Fault, could_be_source,
    delivery::DeliveryStatus,
    event,
    watch::{MAX_WATCHES, MAX_WATCHES_OF_TEAM, Shown, ShownDelivery},
};

/// How long a watch lasts without being renewed, and how long after its end events are kept.
const LASTS_MS: i64 = 60 * 1_000;
/// How far back a watch may begin.
const MAX_BACK_MS: i64 = 3_600 * 1_000;
/// How late an event may become visible, by the time of its arrival: longer than the database gives whoever writes it.
const LATE_MS: i64 = 20 * 1_000;
/// Events of these last seconds that are remembered.
const MAX_REMEMBERED: usize = 4_096;
/// Events that one look takes from the index at once.
const A_PAGE: usize = 500;
/// Events that one look finds at most.
const A_LOOK: usize = 20;
/// Events whose deliveries are followed: the last that were shown.
const MAX_FOLLOWED: usize = 100;
/// Finished deliveries may be replayed; they are looked at once in so many looks.
const FINISHED_EVERY: u32 = 2;
/// Watched sources that one intake knows of at most.
const MAX_SOURCES: i64 = 10_000;

/// Whose events: a team, a mode, and a product or none.
pub(super) type Source = (String, String, String);

/// When an event arrived, and its id.
type Place = (i64, String);

/// The row of somebody who watches.
#[derive(Clone, Debug)]
pub(crate) struct Registration {
    store: Store,
    id: String,
}

/// Somebody who watches, and how far they are.
#[derive(Debug)]
pub(crate) struct Watch {
    tenant: TenantStore,
    product_id: String,
    registration: Registration,
    /// Nothing up to here is looked for any more.
    floor: Place,
    /// What was shown after it.
    shown: BTreeSet<Place>,
    /// Where a look goes on that has found as much as it may. The next one begins at the floor again.
    resume: Option<Place>,
    followed: VecDeque<Followed>,
    looks: u32,
}

/// An event that was shown, and its deliveries as they were shown.
#[derive(Debug)]
struct Followed {
    event_id: String,
    is_finished: bool,
    deliveries: HashMap<String, (DeliveryStatus, i64, Option<i64>)>,
}

/// What a look has found.
#[derive(Debug)]
pub(crate) struct Look {
    /// In the order of their arrival.
    pub(crate) events: Vec<Shown>,
    /// Whether there may be more at once.
    pub(crate) more: bool,
}

impl Store {
    /// Whose events are watched at this moment, by anybody, in any process.
    pub(super) async fn watched(&self, tx: &Tx) -> Result<HashSet<Source>, DbError> {
        let text = "SELECT DISTINCT team_id, mode, product_id FROM watchers WHERE until_ms > $1 LIMIT $2";
        let values: Vec<Value> = vec![self.clock.now_ms().into(), MAX_SOURCES.into()];
        let rows = tx.query_all_raw(sql(tx.get_database_backend(), text, values)).await?;
        let source = |row: &sea_orm::QueryResult| {
            Ok((row.try_get("", "team_id")?, row.try_get("", "mode")?, row.try_get("", "product_id")?))
        };
        rows.iter().map(source).collect()
    }
}

impl TenantStore {
    /// Begins to watch a product, or the team itself: from now on, or with what has arrived since a time.
    pub(crate) async fn watch(&self, product_id: &str, since_ms: Option<i64>) -> Result<Watch, Failure> {
        if !could_be_source(product_id) {
            return Err(Fault::NoSuchProduct.into());
        }
        let (this, product) = (self.clone(), product_id.to_owned());
        let id = new_id("watch", &self.store.clock);
        let registration = Registration { store: self.store.clone(), id: id.clone() };
        self.store
            .database
            .write(move |tx| async move {
                // Counted under the lock of the team's row, however many begin at once.
                this.lock_source(&tx, "").await?;
                let now_ms = this.store.clock.now_ms();
                let backend = tx.get_database_backend();
                let (team, mode) = (this.tenant.team_id.as_str(), this.tenant.mode_word());
                let text = "SELECT COUNT(*) AS of_team, COUNT(CASE WHEN product_id = $1 THEN 1 END) AS of_product \
                            FROM watchers WHERE team_id = $2 AND mode = $3 AND until_ms > $4 AND ended_at_ms IS NULL";
                let values: Vec<Value> = vec![product.as_str().into(), team.into(), mode.into(), now_ms.into()];
                if let Some(row) = tx.query_one_raw(sql(backend, text, values)).await?
                    && (row.try_get::<i64>("", "of_team")? >= MAX_WATCHES_OF_TEAM
                        || row.try_get::<i64>("", "of_product")? >= MAX_WATCHES)
                {
                    return Err(Failure::from(Fault::TooManyWatches));
                }
                let text = "INSERT INTO watchers (id, team_id, mode, product_id, until_ms) VALUES ($1, $2, $3, $4, $5)";
                let until_ms = now_ms.saturating_add(LASTS_MS);
                let values: Vec<Value> = vec![id.into(), team.into(), mode.into(), product.into(), until_ms.into()];
                tx.execute_raw(sql(backend, text, values)).await?;
                Ok(())
            })
            .await?;
        let mut watch = Watch {
            tenant: self.clone(),
            product_id: product_id.to_owned(),
            registration,
            floor: (0, String::new()),
            shown: BTreeSet::new(),
            resume: None,
            followed: VecDeque::new(),
            looks: 0,
        };
        if let Err(error) = watch.start(since_ms).await {
            // If this fails too, the row runs out by itself.
            let _ = watch.registration.end().await;
            return Err(error.into());
        }
        Ok(watch)
    }
}

impl Registration {
    /// Goes on watching, and says whether that was possible: what has run out, or went with its product, is gone.
    pub(crate) async fn renew(&self) -> Result<bool, DbError> {
        let (id, now_ms) = (self.id.clone(), self.store.clock.now_ms());
        let until_ms = now_ms.saturating_add(LASTS_MS);
        self.store
            .database
            .write(move |tx| async move {
                let text = "UPDATE watchers SET until_ms = $1 WHERE id = $2 AND until_ms > $3 AND ended_at_ms IS NULL";
                let values: Vec<Value> = vec![until_ms.into(), id.into(), now_ms.into()];
                Ok(tx.execute_raw(sql(tx.get_database_backend(), text, values)).await?.rows_affected() > 0)
            })
            .await
    }

    /// Watches no longer. What happens next is kept for a while all the same, for whoever was cut off and asks again.
    pub(crate) async fn end(&self) -> Result<(), DbError> {
        let (id, now_ms) = (self.id.clone(), self.store.clock.now_ms());
        self.store
            .database
            .write(move |tx| async move {
                let text = "UPDATE watchers SET ended_at_ms = $1, until_ms = $2 WHERE id = $3";
                let values: Vec<Value> = vec![now_ms.into(), now_ms.saturating_add(LASTS_MS).into(), id.into()];
                tx.execute_raw(sql(tx.get_database_backend(), text, values)).await?;
                Ok(())
            })
            .await
    }
}

impl Watch {
    /// The row that must be renewed.
    pub(crate) fn registration(&self) -> Registration {
        self.registration.clone()
    }

    /// Settles where to begin. Where no time is named, what has arrived before, but so lately that it is looked through
    /// again, counts as shown. Where one is, that much from before it is shown as well: what was late then was not seen.
    async fn start(&mut self, since_ms: Option<i64>) -> Result<(), DbError> {
        let now_ms = self.tenant.store.clock.now_ms();
        let since_ms = since_ms.filter(|since_ms| *since_ms <= now_ms).map(|ms| ms.max(now_ms - MAX_BACK_MS));
        let late_ms = now_ms.saturating_sub(LATE_MS);
        if let Some(since_ms) = since_ms {
            self.floor = (since_ms.saturating_sub(LATE_MS), String::new());
            return Ok(());
        }
        self.floor = (late_ms, String::new());
        // Everything that is there was before, whatever the clock of who wrote it says.
        let latest = self.places(self.floor.clone(), "DESC", MAX_REMEMBERED).await?;
        if latest.len() == MAX_REMEMBERED
            && let Some(oldest) = latest.last()
        {
            self.floor = oldest.clone();
        }
        self.shown.extend(latest);
        Ok(())
    }

    /// What was not shown yet, oldest first.
    pub(crate) async fn look(&mut self) -> Result<Look, DbError> {
        let late_ms = self.tenant.store.clock.now_ms().saturating_sub(LATE_MS);
        let from_floor = self.resume.is_none();
        let (mut cursor, mut new) = (self.resume.take().unwrap_or_else(|| self.floor.clone()), Vec::new());
        let is_whole = 'pages: loop {
            let page = self.places(cursor.clone(), "ASC", A_PAGE).await?;
            let is_last = page.len() < A_PAGE;
            for place in page {
                if new.len() == A_LOOK {
                    break 'pages false;
                }
                if !self.shown.contains(&place) {
                    new.push(place.clone());
                }
                cursor = place;
            }
            if is_last {
                break true;
            }
        };
        let events = self.load(&new).await?;
        self.shown.extend(new);
        while let Some(first) = self.shown.first() {
            let is_past = (from_floor && first.0 < late_ms) || self.shown.len() > MAX_REMEMBERED;
            // Behind the cursor there may be some that were not shown yet.
            if !is_past || !(is_whole || *first <= cursor) {
                break;
            }
            if let Some(first) = self.shown.pop_first() {
                self.floor = first;
            }
        }
        if !is_whole {
            self.resume = Some(cursor);
        } else if from_floor {
            self.floor = std::mem::take(&mut self.floor).max((late_ms, String::new()));
        }
        for event in &events {
            let event_id = event.id.clone();
            self.followed.push_back(Followed { event_id, is_finished: false, deliveries: HashMap::new() });
        }
        let too_many = self.followed.len().saturating_sub(MAX_FOLLOWED);
        self.followed.drain(..too_many);
        Ok(Look { events, more: !is_whole })
    }

    /// What has become of the deliveries of events that were shown.
    pub(crate) async fn changes(&mut self) -> Result<Vec<ShownDelivery>, DbError> {
        let all = self.looks.is_multiple_of(FINISHED_EVERY);
        self.looks = self.looks.wrapping_add(1);
        let asked = |followed: &Followed| all || !followed.is_finished;
        let ids: Vec<&str> = self.followed.iter().filter(|one| asked(one)).map(|one| one.event_id.as_str()).collect();
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let tenant = &self.tenant.tenant;
        let query = entity::Entity::find()
            .filter(entity::Column::TeamId.eq(&tenant.team_id))
            .filter(entity::Column::Mode.eq(tenant.mode_word()))
            .filter(entity::Column::EventId.is_in(ids))
            .order_by_asc(entity::Column::Id);
        let job = move |reader| async move { Ok::<_, DbError>(query.all(&reader).await?) };
        let rows = self.tenant.store.database.read(job).await?;
        let mut by_event: HashMap<String, Vec<ShownDelivery>> = HashMap::new();
        for row in rows {
            let endpoint_id = row.endpoint_id.clone();
            let delivery = delivery(row)?;
            by_event.entry(delivery.event_id.clone()).or_default().push(ShownDelivery { endpoint_id, delivery });
        }
        // All deliveries of an event are made with it: where there are none, there will be none.
        self.followed.retain(|followed| !asked(followed) || by_event.contains_key(&followed.event_id));
        let mut changed = Vec::new();
        for followed in &mut self.followed {
            let Some(deliveries) = by_event.remove(&followed.event_id) else { continue };
            followed.is_finished = deliveries.iter().all(|one| one.delivery.status != DeliveryStatus::Pending);
            for one in deliveries {
                let state = (one.delivery.status, one.delivery.attempts, one.delivery.next_attempt_at_ms);
                if followed.deliveries.insert(one.delivery.id.clone(), state) != Some(state) {
                    changed.push(one);
                }
            }
        }
        Ok(changed)
    }

    /// Events after one place.
    async fn places(
        &self,
        (after_ms, after_id): Place,
        order: &'static str,
        limit: usize,
    ) -> Result<Vec<Place>, DbError> {
        let text = format!(
            "SELECT id, created_at_ms FROM events WHERE team_id = $1 AND mode = $2 AND product_id = $3 \
             AND created_at_ms >= $4 AND (created_at_ms > $4 OR id > $5) \
             ORDER BY created_at_ms {order}, id {order} LIMIT $6"
        );
        let tenant = &self.tenant.tenant;
        let values: Vec<Value> = vec![
            tenant.team_id.as_str().into(),
            tenant.mode_word().into(),
            self.product_id.as_str().into(),
            after_ms.into(),
            after_id.into(),
            i64::try_from(limit).unwrap_or(i64::MAX).into(),
        ];
        let job = move |reader: paperkey_kit::db::Reader| async move {
            Ok::<_, DbError>(reader.query_all_raw(sql(reader.get_database_backend(), text, values)).await?)
        };
        let rows = self.tenant.store.database.read(job).await?;
        rows.iter().map(|row| Ok((row.try_get("", "created_at_ms")?, row.try_get("", "id")?))).collect()
    }

    /// The events in these places, opened. One that went meanwhile is left out.
    async fn load(&self, new: &[Place]) -> Result<Vec<Shown>, DbError> {
        if new.is_empty() {
            return Ok(Vec::new());
        }
        let text = format!("SELECT id, topic, body_sealed FROM events WHERE id IN ({})", places(new.len(), 0));
        let values: Vec<Value> = new.iter().map(|(_, id)| Value::from(id.as_str())).collect();
        let job = move |reader: paperkey_kit::db::Reader| async move {
            Ok::<_, DbError>(reader.query_all_raw(sql(reader.get_database_backend(), text, values)).await?)
        };
        let mut rows = HashMap::new();
        for row in self.tenant.store.database.read(job).await? {
            rows.insert(row.try_get::<String>("", "id")?, row);
        }
        let mut events = Vec::with_capacity(rows.len());
        for (arrived_ms, id) in new {
            let Some(row) = rows.remove(id) else { continue };
            let sealed: Vec<u8> = row.try_get("", "body_sealed")?;
            let opened = self.tenant.store.bodies.open(id, &sealed).ok().and_then(|body| String::from_utf8(body).ok());
            let Some(payload) = opened else {
                tracing::error!(event = id, "an event cannot be opened");
                continue;
            };
            let created_at_ms = event::created_at_ms(&payload).unwrap_or(*arrived_ms);
            events.push(Shown { id: id.clone(), topic: row.try_get("", "topic")?, created_at_ms, payload });
        }
        Ok(events)
    }
}
