//! Sending again what was sent, or was given up: under the same id, by a fresh schedule.
//!
//! Attempts go on counting, so that no number is used twice; where the schedule begins anew is kept beside them. What
//! is under way at that moment is left alone: it is being sent already.

use paperkey_kit::db::checked;
use sea_orm::{ConnectionTrait as _, QuerySelect as _, Value, sea_query::LockType};

use super::{Act, Failure, TenantStore, deliveries::delivery, endpoints::resources, places, sql};
use crate::domain::{Fault, could_be_id, delivery::Delivery};

/// Deliveries that one transaction sends again.
const BATCH: usize = 500;

/// What is changed of a delivery that is sent again at the time `$1`. What its last attempt has shown stays.
const AGAIN: &str = "status = 'pending', due_at_ms = $1, next_attempt_at_ms = $1, claimed_by = NULL, \
                     replayed_after = attempts, finished_at_ms = NULL, \
                     error = CASE WHEN error = 'held_too_long' THEN NULL ELSE error END";

impl TenantStore {
    /// Sends a delivery again, unless it is under way. It waits while its endpoint is paused.
    pub(crate) async fn replay(
        &self,
        product_id: &str,
        endpoint_id: &str,
        id: &str,
        act: Act,
    ) -> Result<Delivery, Failure> {
        let endpoint = self.one_endpoint(product_id, endpoint_id)?.lock(LockType::KeyShare);
        if !could_be_id(id) {
            return Err(Fault::NoSuchDelivery.into());
        }
        let one = self.one_delivery(endpoint_id, id);
        let (this, id) = (self.clone(), id.to_owned());
        self.store
            .database
            .write(move |tx| async move {
                let endpoint = endpoint.one(&tx).await?.ok_or(Fault::NoSuchWebhook)?;
                let text = format!(
                    "UPDATE deliveries SET {AGAIN} WHERE id = $2 AND endpoint_id = $3 AND team_id = $4 AND mode = $5 \
                     AND NOT (status = 'pending' AND claimed_by IS NOT NULL AND due_at_ms > $1)"
                );
                let values: Vec<Value> = vec![
                    this.store.clock.now_ms().into(),
                    id.as_str().into(),
                    endpoint.id.as_str().into(),
                    this.tenant.team_id.as_str().into(),
                    this.tenant.mode_word().into(),
                ];
                let changed = tx.execute_raw(sql(tx.get_database_backend(), text, values)).await?.rows_affected();
                let after = delivery(one.one(&tx).await?.ok_or(Fault::NoSuchDelivery)?)?;
                if changed > 0 {
                    let on = std::iter::once(id).chain(resources(&endpoint.id, &endpoint.product_id));
                    tx.audit(act.on(on.collect()));
                    tx.after_commit(move || this.store.wake.work());
                    act.answer(&tx, &after)?;
                }
                Ok(after)
            })
            .await
    }

    /// Sends everything again that has failed for good since a time, and says how many deliveries these are.
    ///
    /// In bounded transactions, each of which stands by itself: cut off, it goes on where it is asked for again. What
    /// fails anew meanwhile is left alone.
    pub(crate) async fn recover(
        &self,
        product_id: &str,
        endpoint_id: &str,
        since_ms: i64,
        act: Act,
    ) -> Result<i64, Failure> {
        let begun_ms = self.store.clock.now_ms();
        let mut after = (since_ms, String::new());
        let mut recovered = 0;
        loop {
            // Locked first, as everyone does who changes many deliveries of it.
            let endpoint = self.one_endpoint(product_id, endpoint_id)?.lock(LockType::NoKeyUpdate);
            let (this, act, (from_ms, from_id)) = (self.clone(), act.clone(), after);
            let (next, all) = self
                .store
                .database
                .write(move |tx| async move {
                    let backend = tx.get_database_backend();
                    let endpoint = endpoint.one(&tx).await?.ok_or(Fault::NoSuchWebhook)?;
                    let text = "SELECT id, finished_at_ms FROM deliveries WHERE endpoint_id = $1 AND status = 'failed' \
                                AND finished_at_ms >= $2 AND (finished_at_ms > $2 OR id > $3) AND finished_at_ms <= $4 \
                                ORDER BY finished_at_ms, id LIMIT $5";
                    let values: Vec<Value> = vec![
                        endpoint.id.as_str().into(),
                        from_ms.into(),
                        from_id.into(),
                        begun_ms.into(),
                        i64::try_from(BATCH).unwrap_or(i64::MAX).into(),
                    ];
                    let found = tx.query_all_raw(sql(backend, text, values)).await?;
                    let (mut next, mut all) = (None, recovered);
                    if let Some(last) = found.last() {
                        let mut values: Vec<Value> = vec![this.store.clock.now_ms().into()];
                        for row in &found {
                            values.push(row.try_get::<String>("", "id")?.into());
                        }
                        // Those that were replayed or forgotten since the look are not failed any more.
                        let text = format!(
                            "UPDATE deliveries SET {AGAIN} WHERE id IN ({}) AND {}",
                            places(found.len(), 1),
                            checked("status = 'failed'"),
                        );
                        let changed = tx.execute_raw(sql(backend, text, values)).await?.rows_affected();
                        if changed > 0 {
                            all += i64::try_from(changed).unwrap_or(i64::MAX);
                            tx.audit(act.on(resources(&endpoint.id, &endpoint.product_id)));
                            tx.after_commit(move || this.store.wake.work());
                        }
                        if found.len() == BATCH {
                            next = Some((last.try_get("", "finished_at_ms")?, last.try_get("", "id")?));
                        }
                    }
                    if next.is_none() && all > 0 {
                        act.answer(&tx, &all)?;
                    }
                    Ok::<_, Failure>((next, all))
                })
                .await?;
            recovered = all;
            match next {
                Some(next) => after = next,
                None => return Ok(recovered),
            }
        }
    }
}
