//! What the dispatcher does with deliveries: finds them, claims them, records what came of them.
//!
//! A claim is a lease: until `due_at_ms` the row is `claimed_by` one process, and after it anyone's. No transaction
//! is held while something is sent, so a process that dies in between leaves a delivery that is sent once more.

use std::collections::{BTreeMap, HashMap, HashSet};

use http::Uri;
use paperkey_kit::{
    db::{DbError, Engine, Tx},
    events::WEBHOOK_PAUSED,
    principal::{Tenant, mode_of},
    secrets::Secret,
};
use sea_orm::{
    ColumnTrait as _, ConnectionTrait as _, EntityTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _,
    Value, sea_query::LockType,
};
use serde_json::json;

use super::{
    Store,
    endpoints::{Column, Entity, Model},
    places, rows, sql,
};
use crate::domain::{
    attempt::{Attempt, MAX_CONSECUTIVE_FAILURES},
    delivery::{DeliveryStatus, settle},
    endpoint::Status,
};

/// Endpoints with something to send that one look finds at most.
pub(crate) const LANES_A_LOOK: usize = 500;

const OUTCOME_COLUMNS: usize = 11;
const ATTEMPT_COLUMNS: usize = 7;

/// An active endpoint for which something waits.
#[derive(Clone, Debug)]
pub(crate) struct DueLane {
    pub(crate) endpoint_id: String,
    /// When the first of it may be taken.
    pub(crate) due_at_ms: i64,
}

/// How many deliveries to take for an endpoint.
#[derive(Clone, Debug)]
pub(crate) struct Want {
    pub(crate) endpoint_id: String,
    pub(crate) count: usize,
}

/// A delivery that this process holds until `held_until_ms`.
#[derive(Clone, Debug)]
pub(crate) struct Claimed {
    pub(crate) id: String,
    pub(crate) endpoint_id: String,
    pub(crate) topic: String,
    /// The attempts that were made before.
    pub(crate) attempts: i64,
    pub(crate) held_until_ms: i64,
    /// The bytes to send; `None` where they cannot be opened.
    pub(crate) body: Option<Vec<u8>>,
}

/// Where and how an endpoint is sent to.
#[derive(Debug)]
pub(crate) struct Receiver {
    pub(crate) url: String,
    pub(crate) status: Status,
    pub(crate) consecutive_failures: i64,
    /// `None` where it cannot be opened.
    pub(crate) secret: Option<Secret>,
}

/// What was claimed, and where it goes.
#[derive(Debug, Default)]
pub(crate) struct Haul {
    pub(crate) deliveries: Vec<Claimed>,
    pub(crate) receivers: HashMap<String, Receiver>,
}

/// What came of sending a claimed delivery.
#[derive(Clone, Debug)]
pub(crate) struct Outcome {
    pub(crate) delivery_id: String,
    pub(crate) endpoint_id: String,
    /// The attempts that were made before.
    pub(crate) attempts: i64,
    pub(crate) attempt: Attempt,
    /// From 0 to 1: how the next wait strays.
    pub(crate) chance: f64,
}

/// What the dispatcher learns of recorded outcomes.
#[derive(Debug, Default)]
pub(crate) struct Recorded {
    /// Endpoints that these outcomes have paused.
    pub(crate) paused: HashSet<String>,
    /// When the first of these deliveries is to be tried again.
    pub(crate) next_due_at_ms: Option<i64>,
}

impl Store {
    /// Active endpoints for which something waits, due or not, in the order of their ids after `after`.
    ///
    /// The index is read once for each endpoint and not once for each delivery, so that a long queue of one costs
    /// the others nothing.
    pub(crate) async fn due_lanes(&self, after: String) -> Result<Vec<DueLane>, DbError> {
        let text = format!(
            "WITH RECURSIVE lanes (endpoint_id) AS ( \
             SELECT MIN(d.endpoint_id) FROM deliveries d WHERE d.status = 'pending' AND d.endpoint_id > $1 \
             UNION ALL \
             SELECT (SELECT MIN(d.endpoint_id) FROM deliveries d \
             WHERE d.status = 'pending' AND d.endpoint_id > lanes.endpoint_id) \
             FROM lanes WHERE lanes.endpoint_id IS NOT NULL) \
             SELECT e.id AS endpoint_id, (SELECT MIN(d.due_at_ms) FROM deliveries d \
             WHERE d.status = 'pending' AND d.endpoint_id = e.id) AS due_at_ms \
             FROM lanes JOIN endpoints e ON e.id = lanes.endpoint_id WHERE e.status = 'active' LIMIT {LANES_A_LOOK}"
        );
        let found = self
            .database
            .read(move |reader| async move {
                Ok::<_, DbError>(
                    reader.query_all_raw(sql(reader.get_database_backend(), text, vec![after.into()])).await?,
                )
            })
            .await?;
        let mut lanes = Vec::with_capacity(found.len());
        for row in found {
            // The last delivery may have gone between the two looks at the index.
            if let Some(due_at_ms) = row.try_get::<Option<i64>>("", "due_at_ms")? {
                lanes.push(DueLane { endpoint_id: row.try_get("", "endpoint_id")?, due_at_ms });
            }
        }
        Ok(lanes)
    }

    /// Takes due deliveries, oldest first, for `holder` until a time. Of several processes one gets each.
    pub(crate) async fn claim(&self, wants: Vec<Want>, holder: String, held_until_ms: i64) -> Result<Haul, DbError> {
        let now_ms = self.clock.now_ms();
        // A row that another process is taking at this moment is passed over instead of waited for.
        let lock = match self.database.engine() {
            Engine::Postgres => "FOR UPDATE SKIP LOCKED",
            Engine::Sqlite => "",
        };
        let text = format!(
            "WITH picked AS MATERIALIZED (SELECT id FROM deliveries \
             WHERE endpoint_id = $1 AND status = 'pending' AND due_at_ms <= $2 \
             ORDER BY due_at_ms, id LIMIT $3 {lock}) \
             UPDATE deliveries SET claimed_by = $4, due_at_ms = $5 \
             WHERE id IN (SELECT id FROM picked) AND status = 'pending' AND due_at_ms <= $2 \
             AND EXISTS (SELECT 1 FROM endpoints e WHERE e.id = deliveries.endpoint_id AND e.status = 'active') \
             RETURNING id, endpoint_id, event_id, topic, attempts"
        );
        let taken = self
            .database
            .write(move |tx| async move {
                let mut taken = Vec::new();
                for want in wants {
                    let count = i64::try_from(want.count).unwrap_or(i64::MAX);
                    let values: Vec<Value> = vec![
                        want.endpoint_id.into(),
                        now_ms.into(),
                        count.into(),
                        holder.as_str().into(),
                        held_until_ms.into(),
                    ];
                    taken.extend(tx.query_all_raw(sql(tx.get_database_backend(), text.as_str(), values)).await?);
                }
                Ok::<_, DbError>(taken)
            })
            .await?;
        let mut events = HashMap::new();
        let mut deliveries = Vec::with_capacity(taken.len());
        for row in taken {
            let claimed = Claimed {
                id: row.try_get("", "id")?,
                endpoint_id: row.try_get("", "endpoint_id")?,
                topic: row.try_get("", "topic")?,
                attempts: row.try_get("", "attempts")?,
                held_until_ms,
                body: None,
            };
            events.insert(claimed.id.clone(), row.try_get::<String>("", "event_id")?);
            deliveries.push(claimed);
        }
        // The engines return rows as they like; ids are in the order of their making.
        deliveries.sort_unstable_by(|one, other| one.id.cmp(&other.id));
        self.load(deliveries, &events).await
    }

    /// Loads what is needed to send. Read after the claim has committed, so that a pause that came before is seen.
    async fn load(&self, mut deliveries: Vec<Claimed>, events: &HashMap<String, String>) -> Result<Haul, DbError> {
        if deliveries.is_empty() {
            return Ok(Haul::default());
        }
        let event_ids: HashSet<&String> = events.values().collect();
        let bodies = sql_of_bodies(event_ids);
        let endpoint_ids: HashSet<&str> = deliveries.iter().map(|claimed| claimed.endpoint_id.as_str()).collect();
        let endpoints = Entity::find().filter(Column::Id.is_in(endpoint_ids));
        let (bodies, endpoints) = self
            .database
            .read(move |reader| async move {
                let backend = reader.get_database_backend();
                let mut found = Vec::new();
                for (text, values) in bodies {
                    found.extend(reader.query_all_raw(sql(backend, text, values)).await?);
                }
                Ok::<_, DbError>((found, endpoints.all(&reader).await?))
            })
            .await?;
        let mut opened = HashMap::with_capacity(bodies.len());
        for row in bodies {
            let (id, sealed) = (row.try_get::<String>("", "id")?, row.try_get::<Vec<u8>>("", "body_sealed")?);
            match self.bodies.open(&id, &sealed) {
                Ok(body) => drop(opened.insert(id, body)),
                Err(error) => tracing::error!(event = id, %error, "an event cannot be opened"),
            }
        }
        for claimed in &mut deliveries {
            claimed.body = events.get(&claimed.id).and_then(|event_id| opened.get(event_id)).cloned();
        }
        let mut receivers = HashMap::with_capacity(endpoints.len());
        for row in endpoints {
            let secret = self.secrets.open(&row.id, &row.secret_sealed).ok().and_then(|s| String::from_utf8(s).ok());
            let receiver = Receiver {
                status: Status::of(&row.status).unwrap_or(Status::Paused),
                url: row.url,
                consecutive_failures: row.consecutive_failures,
                secret: secret.map(Secret::new),
            };
            receivers.insert(row.id, receiver);
        }
        Ok(Haul { deliveries, receivers })
    }

    /// Gives claims back, so that they are due at once for whoever comes.
    pub(crate) async fn release(&self, ids: Vec<String>, holder: String) -> Result<(), DbError> {
        let now_ms = self.clock.now_ms();
        self.database
            .write(move |tx| async move {
                for chunk in ids.chunks(500) {
                    let text = format!(
                        "UPDATE deliveries SET claimed_by = NULL, due_at_ms = $1 \
                         WHERE claimed_by = $2 AND status = 'pending' AND id IN ({})",
                        places(chunk.len(), 2)
                    );
                    let mut values: Vec<Value> = vec![now_ms.into(), holder.as_str().into()];
                    values.extend(chunk.iter().map(|id| Value::from(id.as_str())));
                    tx.execute_raw(sql(tx.get_database_backend(), text, values)).await?;
                }
                Ok(())
            })
            .await
    }

    /// Gives back what a process that is no more has claimed. Only where one process at a time owns the database,
    /// which is the file; elsewhere claims run out by themselves.
    pub(crate) async fn release_orphans(&self) -> Result<(), DbError> {
        if self.database.engine() != Engine::Sqlite {
            return Ok(());
        }
        let now_ms = self.clock.now_ms();
        self.database
            .write(move |tx| async move {
                let text = "UPDATE deliveries SET claimed_by = NULL, due_at_ms = $1 \
                            WHERE status = 'pending' AND claimed_by IS NOT NULL";
                tx.execute_raw(sql(tx.get_database_backend(), text, vec![now_ms.into()])).await?;
                Ok(())
            })
            .await
    }

    /// Records outcomes of deliveries that `holder` has claimed, in the order in which they came. One whose claim has
    /// passed to another, or that is recorded already, changes nothing.
    pub(crate) async fn record(&self, outcomes: Vec<Outcome>, holder: String) -> Result<Recorded, DbError> {
        let this = self.clone();
        self.database.write(move |tx| async move { this.record_in(&tx, &outcomes, &holder).await }).await
    }

    async fn record_in(&self, tx: &Tx, outcomes: &[Outcome], holder: &str) -> Result<Recorded, DbError> {
        let now_ms = self.clock.now_ms();
        let backend = tx.get_database_backend();
        // Locked, so that failures that end at the same moment are counted one by one, and the tenth pauses once.
        let ids: HashSet<&str> = outcomes.iter().map(|outcome| outcome.endpoint_id.as_str()).collect();
        let endpoints = Entity::find()
            .filter(Column::Id.is_in(ids))
            .order_by_asc(Column::Id)
            .lock(LockType::NoKeyUpdate)
            .all(tx)
            .await?;

        let mut recorded = Recorded::default();
        let mut values: Vec<Value> = Vec::with_capacity(outcomes.len() * OUTCOME_COLUMNS + 1);
        for outcome in outcomes {
            let made = outcome.attempts + 1;
            let attempt = &outcome.attempt;
            let settled = settle(&self.schedule, made, attempt, now_ms, outcome.chance);
            if let Some(next) = settled.next_attempt_at_ms {
                recorded.next_due_at_ms = Some(recorded.next_due_at_ms.map_or(next, |first: i64| first.min(next)));
            }
            let finished_at_ms = (settled.status != DeliveryStatus::Pending).then_some(now_ms);
            let row: [Value; OUTCOME_COLUMNS] = [
                outcome.delivery_id.as_str().into(),
                made.into(),
                settled.status.word().into(),
                settled.next_attempt_at_ms.unwrap_or(now_ms).into(),
                settled.next_attempt_at_ms.into(),
                attempt.response_status.map(i64::from).into(),
                attempt.duration_ms.into(),
                attempt.fault.map(|fault| fault.word().to_owned()).into(),
                attempt.at_ms.into(),
                finished_at_ms.into(),
                holder.into(),
            ];
            values.extend(row);
        }
        let text = format!(
            "UPDATE deliveries SET attempts = v.column2, status = v.column3, due_at_ms = v.column4, \
             next_attempt_at_ms = v.column5, response_status = v.column6, duration_ms = v.column7, \
             error = v.column8, last_attempt_at_ms = v.column9, finished_at_ms = v.column10, claimed_by = NULL \
             FROM (VALUES {}) AS v WHERE deliveries.id = v.column1 AND deliveries.attempts = v.column2 - 1 \
             AND deliveries.claimed_by = v.column11 AND deliveries.status = 'pending' RETURNING id",
            rows(outcomes.len(), OUTCOME_COLUMNS, 0)
        );
        let mut took = HashSet::new();
        for row in tx.query_all_raw(sql(backend, text, values)).await? {
            took.insert(row.try_get::<String>("", "id")?);
        }

        let mut gone: HashSet<&str> = HashSet::new();
        let mut states: BTreeMap<&str, (Status, i64)> = BTreeMap::new();
        for row in &endpoints {
            let status = Status::of(&row.status).unwrap_or(Status::Paused);
            states.insert(&row.id, (status, row.consecutive_failures));
        }
        let mut tries: Vec<Value> = Vec::with_capacity(took.len() * ATTEMPT_COLUMNS);
        for outcome in outcomes.iter().filter(|outcome| took.contains(&outcome.delivery_id)) {
            let attempt = &outcome.attempt;
            let row: [Value; ATTEMPT_COLUMNS] = [
                outcome.delivery_id.as_str().into(),
                (outcome.attempts + 1).into(),
                attempt.at_ms.into(),
                attempt.duration_ms.into(),
                attempt.response_status.map(i64::from).into(),
                attempt.fault.map(|fault| fault.word().to_owned()).into(),
                attempt.snippet.clone().into(),
            ];
            tries.extend(row);
            let Some((status, failures)) = states.get_mut(outcome.endpoint_id.as_str()) else { continue };
            *failures = if attempt.fault.is_none() { 0 } else { failures.saturating_add(1) };
            let pauses = attempt.is_gone() || *failures >= MAX_CONSECUTIVE_FAILURES;
            if pauses && *status == Status::Active {
                *status = Status::Paused;
                recorded.paused.insert(outcome.endpoint_id.clone());
                if attempt.is_gone() {
                    gone.insert(&outcome.endpoint_id);
                }
            }
        }
        if !tries.is_empty() {
            let text = format!(
                "INSERT INTO attempts (delivery_id, number, at_ms, duration_ms, response_status, error, snippet) \
                 VALUES {} ON CONFLICT (delivery_id, number) DO NOTHING",
                rows(tries.len() / ATTEMPT_COLUMNS, ATTEMPT_COLUMNS, 0)
            );
            tx.execute_raw(sql(backend, text, tries)).await?;
        }
        for row in &endpoints {
            let Some((status, failures)) = states.get(row.id.as_str()) else { continue };
            let paused = recorded.paused.contains(&row.id);
            if paused {
                self.tell_paused(tx, row, *failures, gone.contains(row.id.as_str()));
            }
            if paused || *failures != row.consecutive_failures {
                let updated_at_ms = if paused { now_ms } else { row.updated_at_ms };
                let values: Vec<Value> =
                    vec![(*failures).into(), status.word().into(), updated_at_ms.into(), row.id.as_str().into()];
                let text =
                    "UPDATE endpoints SET consecutive_failures = $1, status = $2, updated_at_ms = $3 WHERE id = $4";
                tx.execute_raw(sql(backend, text, values)).await?;
            }
        }
        Ok(recorded)
    }

    /// Tells auth, which tells the team. The address may hold a secret of the receiver's, so only its host is told.
    fn tell_paused(&self, tx: &Tx, row: &Model, failures: i64, gone: bool) {
        let Some(mode) = mode_of(&row.mode) else { return };
        let tenant = Tenant { team_id: row.team_id.clone(), mode };
        let host = row.url.parse::<Uri>().ok().and_then(|uri| uri.host().map(str::to_owned)).unwrap_or_default();
        let data = json!({
            "webhookId": row.id,
            "host": host,
            "productId": row.product_id,
            "failures": failures,
            "gone": gone,
        });
        self.outbox.emit(tx, &["auth"], WEBHOOK_PAUSED, &tenant, &row.product_id, &data);
    }
}

/// The statements that load the bodies of events.
fn sql_of_bodies(ids: HashSet<&String>) -> Vec<(String, Vec<Value>)> {
    let ids: Vec<&String> = ids.into_iter().collect();
    ids.chunks(500)
        .map(|chunk| {
            let text = format!("SELECT id, body_sealed FROM events WHERE id IN ({})", places(chunk.len(), 0));
            (text, chunk.iter().map(|id| Value::from(id.as_str())).collect())
        })
        .collect()
}
