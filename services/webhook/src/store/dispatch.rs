//! What the dispatcher does with deliveries: finds them, claims them, records what came of them.
//!
//! A claim is a lease: until `due_at_ms` the row is `claimed_by` one process, and after it anyone's. No transaction
//! is held while something is sent, so a process that dies in between leaves a delivery that is sent once more. Who
//! comes back later than that, and finds the row claimed anew, by whomever, has no say in it any more: an outcome counts
//! only under the very claim that it was made under.

use std::collections::{BTreeMap, HashMap, HashSet};

use bytes::Bytes;
use http::Uri;
use paperkey_kit::{
    db::{DbError, Engine, Tx, checked},
    events::WEBHOOK_PAUSED,
    fail_point::{self, Point},
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

/// Endpoints for which something waits that one look walks over at most, active or not.
pub(crate) const LANES_A_LOOK: usize = 500;

const OUTCOME_COLUMNS: usize = 12;
const ATTEMPT_COLUMNS: usize = 7;

/// How far in the future, by our clock, a time may be without being taken for one that nobody could wait for: the clocks
/// of several processes are not quite the same. Claims bear less: a process whose clock is ahead of another's by more
/// than a claim lasts beyond its exchange takes claims that are still good, and deliveries go out twice, under one id.
const SKEW_MS: i64 = 5 * 60 * 1_000;

/// An active endpoint for which something waits.
#[derive(Clone, Debug)]
pub(crate) struct DueLane {
    pub(crate) endpoint_id: String,
    /// When the first of it may be taken.
    pub(crate) due_at_ms: i64,
}

/// What one look has found among the endpoints.
#[derive(Debug, Default)]
pub(crate) struct Lanes {
    /// In the order of their ids.
    pub(crate) due: Vec<DueLane>,
    /// Behind which id the next look goes on, where this one ended before the last endpoint.
    pub(crate) next: Option<String>,
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
    /// How many of them were made before it was last replayed, if it was.
    pub(crate) replayed_after: Option<i64>,
    pub(crate) held_until_ms: i64,
    /// When the database had answered the claim: what is known of its endpoint is no older.
    pub(crate) answered_at_ms: i64,
    /// The bytes to send; `None` where they cannot be opened.
    pub(crate) body: Option<Bytes>,
    /// The trace in which its event happened; empty where that is not recorded.
    pub(crate) traceparent: String,
}

/// Where and how an endpoint is sent to.
#[derive(Debug)]
pub(crate) struct Receiver {
    pub(crate) url: String,
    pub(crate) status: Status,
    pub(crate) consecutive_failures: i64,
    /// `None` where it cannot be opened.
    pub(crate) secret: Option<Secret>,
    /// The secret before, and until when both sign.
    pub(crate) previous: Option<(Secret, i64)>,
}

/// A claim, as its holder names it.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    pub(crate) delivery_id: String,
    pub(crate) held_until_ms: i64,
}

impl From<Claimed> for Claim {
    fn from(claimed: Claimed) -> Self {
        Self { delivery_id: claimed.id, held_until_ms: claimed.held_until_ms }
    }
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
    /// How many of them were made before it was last replayed, if it was.
    pub(crate) replayed_after: Option<i64>,
    /// The end of the claim under which it was sent.
    pub(crate) held_until_ms: i64,
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
    /// How many of these deliveries are done, are to be tried again, and are given up.
    pub(crate) delivered: u64,
    pub(crate) again: u64,
    pub(crate) given_up: u64,
}

/// A look at the endpoints for which something waits, after `$1`: each with when its first delivery is due, if it is active,
/// and with what else is selected of it. The index is read once for each endpoint and not once for each delivery, so that
/// a long queue of one costs the others nothing.
pub(super) fn look_at_lanes(more: &str) -> String {
    format!(
        "WITH RECURSIVE lanes (endpoint_id, number) AS ( \
         SELECT MIN(d.endpoint_id), 1 FROM deliveries d WHERE d.status = 'pending' AND d.endpoint_id > $1 \
         UNION ALL \
         SELECT (SELECT MIN(d.endpoint_id) FROM deliveries d \
         WHERE d.status = 'pending' AND d.endpoint_id > lanes.endpoint_id), lanes.number + 1 \
         FROM lanes WHERE lanes.endpoint_id IS NOT NULL AND lanes.number < {LANES_A_LOOK}) \
         SELECT lanes.endpoint_id AS endpoint_id, CASE WHEN e.status = 'active' THEN \
         (SELECT MIN(d.due_at_ms) FROM deliveries d \
         WHERE d.status = 'pending' AND d.endpoint_id = lanes.endpoint_id) END AS due_at_ms{more} \
         FROM lanes LEFT JOIN endpoints e ON e.id = lanes.endpoint_id \
         WHERE lanes.endpoint_id IS NOT NULL ORDER BY lanes.endpoint_id"
    )
}

impl Store {
    /// Active endpoints for which something waits, due or not, in the order of their ids after `after`.
    ///
    /// Endpoints are counted while they are walked over, whether something is sent to them or
    /// not: however many are paused or gone, a look ends.
    pub(crate) async fn due_lanes(&self, after: String) -> Result<Lanes, DbError> {
        let text = look_at_lanes("");
        let found = self
            .database
            .read(move |reader| async move {
                Ok::<_, DbError>(
                    reader.query_all_raw(sql(reader.get_database_backend(), text, vec![after.into()])).await?,
                )
            })
            .await?;
        let (mut due, mut last) = (Vec::new(), None);
        for row in &found {
            let endpoint_id: String = row.try_get("", "endpoint_id")?;
            // There is none where the endpoint is paused or gone.
            if let Some(due_at_ms) = row.try_get::<Option<i64>>("", "due_at_ms")? {
                due.push(DueLane { endpoint_id: endpoint_id.clone(), due_at_ms });
            }
            last = Some(endpoint_id);
        }
        Ok(Lanes { due, next: last.filter(|_| found.len() >= LANES_A_LOOK) })
    }

    /// Takes due deliveries, oldest first, for `holder` until a time. Of several processes one gets each.
    pub(crate) async fn claim(&self, wants: Vec<Want>, holder: String, held_until_ms: i64) -> Result<Haul, DbError> {
        let now_ms = self.clock.now_ms();
        // A row that another process is taking at this moment is passed over instead of waited for.
        let lock = match self.database.engine() {
            Engine::Postgres => "FOR UPDATE SKIP LOCKED",
            Engine::Sqlite => "",
        };
        let still = checked("status = 'pending' AND due_at_ms <= $2");
        let text = format!(
            "WITH picked AS MATERIALIZED (SELECT id FROM deliveries \
             WHERE endpoint_id = $1 AND status = 'pending' AND due_at_ms <= $2 \
             ORDER BY due_at_ms, id LIMIT $3 {lock}) \
             UPDATE deliveries SET claimed_by = $4, due_at_ms = $5 \
             WHERE id IN (SELECT id FROM picked) AND {still} \
             AND EXISTS (SELECT 1 FROM endpoints e WHERE e.id = deliveries.endpoint_id AND e.status = 'active') \
             RETURNING id, endpoint_id, event_id, topic, attempts, replayed_after"
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
        let answered_at_ms = self.clock.now_ms();
        let mut events = HashMap::new();
        let mut deliveries = Vec::with_capacity(taken.len());
        for row in taken {
            let claimed = Claimed {
                id: row.try_get("", "id")?,
                endpoint_id: row.try_get("", "endpoint_id")?,
                topic: row.try_get("", "topic")?,
                attempts: row.try_get("", "attempts")?,
                replayed_after: row.try_get("", "replayed_after")?,
                held_until_ms,
                answered_at_ms,
                body: None,
                traceparent: String::new(),
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
        fail_point::reach(Point::ClaimAfterCommit);
        let event_ids: HashSet<&String> = events.values().collect();
        let bodies = sql_of_bodies(event_ids);
        let endpoint_ids: HashSet<&str> = deliveries.iter().map(|claimed| claimed.endpoint_id.as_str()).collect();
        let endpoints = format!(
            "SELECT id, url, status, consecutive_failures, secret_sealed, previous_secret_sealed, \
             previous_secret_until_ms FROM endpoints WHERE id IN ({})",
            places(endpoint_ids.len(), 0)
        );
        let endpoint_ids: Vec<Value> = endpoint_ids.into_iter().map(Value::from).collect();
        let (bodies, endpoints) = self
            .database
            .read(move |reader| async move {
                let backend = reader.get_database_backend();
                let mut found = Vec::new();
                for (text, values) in bodies {
                    found.extend(reader.query_all_raw(sql(backend, text, values)).await?);
                }
                Ok::<_, DbError>((found, reader.query_all_raw(sql(backend, endpoints, endpoint_ids)).await?))
            })
            .await?;
        let mut opened = HashMap::with_capacity(bodies.len());
        let mut traces = HashMap::new();
        for row in bodies {
            let (id, sealed) = (row.try_get::<String>("", "id")?, row.try_get::<Vec<u8>>("", "body_sealed")?);
            if let Some(trace) = row.try_get::<Option<String>>("", "traceparent")? {
                traces.insert(id.clone(), trace);
            }
            match self.bodies.open(&id, &sealed) {
                Ok(body) => drop(opened.insert(id, Bytes::from(body))),
                Err(error) => tracing::error!(event = id, %error, "an event cannot be opened"),
            }
        }
        for claimed in &mut deliveries {
            let Some(event_id) = events.get(&claimed.id) else { continue };
            claimed.body = opened.get(event_id).cloned();
            claimed.traceparent = traces.get(event_id).cloned().unwrap_or_default();
        }
        let mut receivers = HashMap::with_capacity(endpoints.len());
        for row in endpoints {
            let id: String = row.try_get("", "id")?;
            let open = |sealed: Vec<u8>| {
                let text = self.secrets.open(&id, &sealed).ok().and_then(|secret| String::from_utf8(secret).ok());
                text.map(Secret::new)
            };
            let previous: Option<Vec<u8>> = row.try_get("", "previous_secret_sealed")?;
            let until_ms: Option<i64> = row.try_get("", "previous_secret_until_ms")?;
            let receiver = Receiver {
                url: row.try_get("", "url")?,
                status: Status::of(&row.try_get::<String>("", "status")?).unwrap_or(Status::Paused),
                consecutive_failures: row.try_get("", "consecutive_failures")?,
                secret: open(row.try_get("", "secret_sealed")?),
                previous: previous.and_then(open).zip(until_ms),
            };
            receivers.insert(id, receiver);
        }
        Ok(Haul { deliveries, receivers })
    }

    /// Gives claims back, so that they are due at once for whoever comes. One that is not held any more stays as it is.
    pub(crate) async fn release(&self, claims: Vec<Claim>, holder: String) -> Result<(), DbError> {
        let now_ms = self.clock.now_ms();
        self.database
            .write(move |tx| async move {
                for chunk in claims.chunks(500) {
                    let text = format!(
                        "UPDATE deliveries SET claimed_by = NULL, due_at_ms = $1 FROM (VALUES {}) AS v \
                         WHERE deliveries.id = v.column1 AND deliveries.due_at_ms = v.column2 \
                         AND deliveries.claimed_by = ${} AND {}",
                        rows(chunk.len(), 2, 1),
                        chunk.len() * 2 + 2,
                        checked("deliveries.status = 'pending'"),
                    );
                    let mut values: Vec<Value> = vec![now_ms.into()];
                    for claim in chunk {
                        values.extend([claim.delivery_id.as_str().into(), claim.held_until_ms.into()]);
                    }
                    values.push(holder.as_str().into());
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

    /// Frees what nobody could wait for: claims that end later than any that lasts `claim_ms` can, and waits that were
    /// counted from a time that is yet to come. Both are left behind when a clock that was ahead is set back. They
    /// are due at once; to be early does less harm than to be a year late. Says how many there were.
    pub(crate) async fn free_from_the_future(&self, claim_ms: i64) -> Result<u64, DbError> {
        let now_ms = self.clock.now_ms();
        let soon_ms = now_ms.saturating_add(SKEW_MS);
        let claims_end_ms = soon_ms.saturating_add(claim_ms);
        let waits_end_ms = soon_ms.saturating_add(self.schedule.longest_ms());
        // The index is read once for each endpoint: what is due furthest ahead says whether there is anything to do.
        let find = "WITH RECURSIVE lanes (endpoint_id) AS ( \
                    SELECT MIN(d.endpoint_id) FROM deliveries d WHERE d.status = 'pending' \
                    UNION ALL \
                    SELECT (SELECT MIN(d.endpoint_id) FROM deliveries d \
                    WHERE d.status = 'pending' AND d.endpoint_id > lanes.endpoint_id) \
                    FROM lanes WHERE lanes.endpoint_id IS NOT NULL) \
                    SELECT endpoint_id FROM lanes WHERE endpoint_id IS NOT NULL AND (SELECT MAX(d.due_at_ms) \
                    FROM deliveries d WHERE d.status = 'pending' AND d.endpoint_id = lanes.endpoint_id) > $1";
        let found = self
            .database
            .read(move |reader| async move {
                let statement = sql(reader.get_database_backend(), find, vec![soon_ms.into()]);
                Ok::<_, DbError>(reader.query_all_raw(statement).await?)
            })
            .await?;
        let mut freed = 0;
        for row in found {
            let endpoint_id: String = row.try_get("", "endpoint_id")?;
            freed += self
                .database
                .write(move |tx| async move {
                    let text = "UPDATE deliveries SET claimed_by = NULL, due_at_ms = $1, next_attempt_at_ms = $1 \
                                WHERE endpoint_id = $2 AND status = 'pending' AND due_at_ms > $3 AND ( \
                                (claimed_by IS NOT NULL AND due_at_ms > $4) OR (claimed_by IS NULL \
                                AND (due_at_ms > $5 OR COALESCE(last_attempt_at_ms, created_at_ms) > $3)))";
                    let values: Vec<Value> = vec![
                        now_ms.into(),
                        endpoint_id.into(),
                        soon_ms.into(),
                        claims_end_ms.into(),
                        waits_end_ms.into(),
                    ];
                    let freed = tx.execute_raw(sql(tx.get_database_backend(), text, values)).await?;
                    Ok::<_, DbError>(freed.rows_affected())
                })
                .await?;
        }
        Ok(freed)
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
            let of_schedule = made.saturating_sub(outcome.replayed_after.unwrap_or(0));
            let settled = settle(&self.schedule, of_schedule, attempt, now_ms, outcome.chance);
            match settled.status {
                DeliveryStatus::Pending => recorded.again += 1,
                _ if attempt.fault.is_none() => recorded.delivered += 1,
                _ => recorded.given_up += 1,
            }
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
                outcome.held_until_ms.into(),
            ];
            values.extend(row);
        }
        let text = format!(
            "UPDATE deliveries SET attempts = v.column2, status = v.column3, due_at_ms = v.column4, \
             next_attempt_at_ms = v.column5, response_status = v.column6, duration_ms = v.column7, \
             error = v.column8, last_attempt_at_ms = v.column9, finished_at_ms = v.column10, claimed_by = NULL \
             FROM (VALUES {}) AS v WHERE deliveries.id = v.column1 AND deliveries.attempts = v.column2 - 1 \
             AND deliveries.claimed_by = v.column11 AND deliveries.due_at_ms = v.column12 \
             AND {} RETURNING id",
            rows(outcomes.len(), OUTCOME_COLUMNS, 0),
            checked("deliveries.status = 'pending'"),
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
            // Somebody has asked for what is replayed: its failures tell nothing new of the receiver.
            let counts = outcome.replayed_after.is_none();
            *failures = if attempt.fault.is_none() { 0 } else { failures.saturating_add(i64::from(counts)) };
            let pauses = attempt.is_gone() || (counts && *failures >= MAX_CONSECUTIVE_FAILURES);
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
        fail_point::reach(Point::OutcomeBeforeCommit);
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
            let text =
                format!("SELECT id, body_sealed, traceparent FROM events WHERE id IN ({})", places(chunk.len(), 0));
            (text, chunk.iter().map(|id| Value::from(id.as_str())).collect())
        })
        .collect()
}
