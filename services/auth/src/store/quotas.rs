//! What teams have used of their meters.
//!
//! A counter's row is the lock under which its units are taken: it is written first, and what is left is judged then.
//! What was taken stands beside it, consumption by consumption and day by day, in the same transaction. A month's days
//! are written under the lock of its counter, and by nobody else.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::Arc,
};

use paperkey_kit::{
    config::Tiers,
    db::{Engine, Tx},
    principal::Tenant,
    values::rfc3339,
};
use paperkey_proto::{Error, auth::v1::AlertCause, principal::v1::Mode};
use sea_orm::{
    ActiveValue::Set, ColumnTrait as _, ConnectionTrait, EntityTrait as _, ExprTrait as _, QueryFilter as _,
    QueryResult, Statement, entity::prelude::Expr, sea_query::OnConflict,
};
use serde_json::json;

use super::{
    Act, Failure, Store, announce,
    entities::{quota_consumptions, quota_days, quota_usage, team_quotas, teams},
    teams::living,
};
use crate::domain::{
    Fault,
    alert::NewAlert,
    quota::{
        Balance, CONSUMPTIONS_KEPT_MS, Consumption, Counter, Day, MeterUse, Month, Notices, Outcome, OwnLimits, Period,
        Threshold, Told, UsedByDay,
    },
};

/// Who hears of quotas.
const TOLD: [&str; 1] = ["webhook"];

/// How many rows one step of forgetting removes.
pub(crate) const FORGOTTEN_A_STEP: u64 = 1_000;

/// How often a consumption is judged anew that somebody else has settled at the same moment.
const TRIES: usize = 5;

/// What a consumption came to, or why it was not even judged.
pub(crate) type Verdict = Result<Outcome, Fault>;

/// Where a counter stands, and by what its limit is found.
struct Standing {
    tier: String,
    own: Option<i64>,
    used: i64,
}

impl Standing {
    fn balance(&self, tiers: &Tiers, meter: &str) -> Balance {
        let limit = self.own.or_else(|| tiers.of_team(&self.tier).quota.get(meter).copied());
        Balance { used: self.used, limit }
    }
}

impl Store {
    /// How many counters may be written at once: on SQLite those that wait share a commit, and on PostgreSQL each has a
    /// connection, of which others need some as well.
    pub(crate) fn counters_at_once(&self) -> usize {
        match self.database.engine() {
            Engine::Sqlite => 256,
            Engine::Postgres => 4,
        }
    }

    /// Takes what fits, in the order of asking, and answers each. All of it is one transaction.
    pub(crate) async fn consume(
        &self,
        tiers: &Arc<Tiers>,
        counter: &Counter,
        asked: &Arc<[Consumption]>,
    ) -> Result<Vec<Verdict>, Failure> {
        let mut tries = 0;
        loop {
            tries += 1;
            let (store, tiers) = (self.clone(), Arc::clone(tiers));
            let (counter, asked) = (counter.clone(), Arc::clone(asked));
            let job = move |tx: Tx| async move { store.consume_in(&tx, &tiers, &counter, &asked).await };
            match self.database.write(job).await {
                // What the other has written is seen by the next look.
                Err(Failure::Fault(Fault::ConsumedMeanwhile)) if tries < TRIES => {}
                outcome => return outcome,
            }
        }
    }

    async fn consume_in(
        &self,
        tx: &Tx,
        tiers: &Tiers,
        counter: &Counter,
        asked: &[Consumption],
    ) -> Result<Vec<Verdict>, Failure> {
        let now_ms = self.database.clock().now_ms();
        let standing = standing(tx, counter, now_ms).await?;
        let (used, mut notices) = held(tx, counter).await?;
        let before = Standing { used, ..standing }.balance(tiers, &counter.meter);
        let mut known = settled(tx, asked).await?;
        let mut balance = before;
        let day = counter.month.day_at(now_ms);
        let (mut verdicts, mut taken) = (Vec::with_capacity(asked.len()), Vec::new());
        for consumption in asked {
            if let Some(row) = known.get(&consumption.id) {
                verdicts.push(repeated(row, counter, consumption, balance));
                continue;
            }
            let granted = balance.take(consumption.units);
            let resets_at_ms = counter.month.ends_at_ms();
            verdicts.push(Ok(Outcome { granted, balance, resets_at_ms }));
            if granted {
                let row = row(counter, consumption, balance, day, now_ms);
                taken.push(row.clone());
                known.insert(row.consume_id.clone(), row);
            }
        }
        let news = notices.note(before, balance, now_ms);
        if balance != before || !news.is_empty() {
            put(tx, counter, before, balance, notices).await?;
        }
        if balance.used != before.used {
            count(tx, counter, day, balance.used - before.used).await?;
        }
        insert(tx, taken).await?;
        for threshold in news {
            self.tell_threshold(tx, counter, threshold, balance).await?;
        }
        Ok(verdicts)
    }

    async fn tell_threshold(
        &self,
        tx: &Tx,
        counter: &Counter,
        threshold: Threshold,
        balance: Balance,
    ) -> Result<(), Failure> {
        let Balance { used, limit } = balance;
        let limit = limit.unwrap_or_default();
        let meter = counter.meter.as_str();
        let data =
            json!({"meter": meter, "used": used, "limit": limit, "resetsAt": rfc3339(counter.month.ends_at_ms())});
        let (topic, cause, message) = match threshold {
            Threshold::Warning => (
                "quota.warning",
                AlertCause::QuotaWarning,
                format!("{used} of this month's {limit} units of {meter} are used"),
            ),
            Threshold::Exceeded => (
                "quota.exceeded",
                AlertCause::QuotaExceeded,
                format!("This month's {limit} units of {meter} are used up"),
            ),
        };
        // Test mode never counts.
        let tenant = Tenant { team_id: counter.team_id.clone(), mode: Mode::Live };
        self.outbox.emit(tx, &TOLD, topic, &tenant, "", &data);
        let alert = NewAlert { cause, subject: meter.to_owned(), message, details: data };
        Ok(self.raise(tx, &tenant, alert).await?)
    }

    /// Where a counter stands. A team that is deleted or has ended is not there.
    pub(crate) async fn balance(&self, tiers: &Tiers, counter: Counter) -> Result<Balance, Error> {
        let now_ms = self.database.clock().now_ms();
        let meter = counter.meter.clone();
        let standing =
            self.database.read(move |reader| async move { standing(&reader, &counter, now_ms).await }).await?;
        Ok(standing.balance(tiers, &meter))
    }

    /// What a team has used of each configured meter in a month.
    pub(crate) async fn usage(&self, tiers: &Tiers, team_id: String, month: Month) -> Result<Vec<MeterUse>, Error> {
        let now_ms = self.database.clock().now_ms();
        let (tier, own, used) = self
            .database
            .snapshot(move |reader| async move {
                let team = teams::Entity::find().filter(living(&team_id)).one(&reader).await?;
                let team = team.filter(|team| team.expires_at_ms.is_none_or(|at_ms| at_ms > now_ms));
                let tier = team.ok_or(Fault::NoSuchTeam)?.tier;
                let own = own_quotas(&reader, &team_id).await?;
                let used = quota_usage::Entity::find()
                    .filter(quota_usage::Column::TeamId.eq(team_id))
                    .filter(quota_usage::Column::Month.eq(month.text()))
                    .all(&reader)
                    .await?;
                let used: BTreeMap<_, _> = used.into_iter().map(|row| (row.meter, row.used)).collect();
                Ok::<_, Failure>((tier, own, used))
            })
            .await?;
        let of = |meter: &str| {
            let used = used.get(meter).copied().unwrap_or(0);
            let standing = Standing { tier: tier.clone(), own: own.get(meter).copied(), used };
            MeterUse { meter: meter.to_owned(), balance: standing.balance(tiers, meter) }
        };
        Ok(tiers.meters().into_iter().map(of).collect())
    }

    /// Gives units back to the month and the day that they came from, once. What was never taken cannot be taken after
    /// that either: whoever gives up on an answer may be overtaken by what they give up on.
    pub(crate) async fn refund(&self, consume_id: String) -> Result<(), Error> {
        let now_ms = self.database.clock().now_ms();
        self.database
            .write(move |tx| async move {
                let never_taken = quota_consumptions::Model {
                    consume_id: consume_id.clone(),
                    team_id: String::new(),
                    meter: String::new(),
                    month: String::new(),
                    units: 0,
                    used_after: 0,
                    limit_then: None,
                    created_at_ms: now_ms,
                    refunded_at_ms: Some(now_ms),
                    day: None,
                };
                // On PostgreSQL this waits for one that is just being taken.
                if insert_new(&tx, vec![never_taken]).await? == 1 {
                    return Ok::<_, Failure>(());
                }
                let row = quota_consumptions::Entity::find_by_id(consume_id.as_str()).one(&tx).await?;
                let Some(row) = row.filter(|row| row.refunded_at_ms.is_none()) else { return Ok(()) };
                let counter = Counter { team_id: row.team_id, meter: row.meter, month: Month::stored(row.month) };
                // The counter first, as whoever takes units does it: the two never wait for each other.
                quota_usage::Entity::update_many()
                    .col_expr(quota_usage::Column::Used, Expr::col(quota_usage::Column::Used))
                    .filter(is(&counter))
                    .exec(&tx)
                    .await?;
                let refunded = quota_consumptions::Entity::update_many()
                    .col_expr(quota_consumptions::Column::RefundedAtMs, Expr::value(now_ms))
                    .filter(quota_consumptions::Column::ConsumeId.eq(consume_id))
                    .filter(quota_consumptions::Column::RefundedAtMs.is_null())
                    .exec(&tx)
                    .await?;
                if refunded.rows_affected == 1 {
                    quota_usage::Entity::update_many()
                        .col_expr(quota_usage::Column::Used, Expr::col(quota_usage::Column::Used).sub(row.units))
                        .filter(is(&counter))
                        .exec(&tx)
                        .await?;
                    if let Some(day) = row.day {
                        quota_days::Entity::update_many()
                            .col_expr(quota_days::Column::Used, Expr::col(quota_days::Column::Used).sub(row.units))
                            .filter(quota_days::Column::TeamId.eq(counter.team_id))
                            .filter(quota_days::Column::Meter.eq(counter.meter))
                            .filter(quota_days::Column::Day.eq(day))
                            .exec(&tx)
                            .await?;
                    }
                }
                Ok(())
            })
            .await?;
        Ok(())
    }

    /// What a team has used on the days of a period, where it has used anything.
    pub(crate) async fn used_by_day(&self, team_id: String, period: Period) -> Result<UsedByDay, Error> {
        let now_ms = self.database.clock().now_ms();
        let rows = self
            .database
            .snapshot(move |reader| async move {
                let team = teams::Entity::find().filter(living(&team_id)).one(&reader).await?;
                if team.is_none_or(|team| team.expires_at_ms.is_some_and(|at_ms| at_ms <= now_ms)) {
                    return Err(Failure::from(Fault::NoSuchTeam));
                }
                let rows = quota_days::Entity::find()
                    .filter(quota_days::Column::TeamId.eq(team_id))
                    .filter(quota_days::Column::Day.between(period.first().text(), period.last().text()));
                Ok(rows.all(&reader).await?)
            })
            .await?;
        let mut used = UsedByDay::new();
        for row in rows {
            used.entry(row.meter).or_default().insert(row.day, row.used);
        }
        Ok(used)
    }

    /// Gives a team limits of its own in place of those that it had.
    pub(crate) async fn set_limits(&self, team_id: String, limits: OwnLimits, act: Act) -> Result<(), Error> {
        let epochs = Arc::clone(&self.epochs);
        self.database
            .write(move |tx| async move {
                let changed = teams::Entity::update_many()
                    .col_expr(teams::Column::RequestsPerMinute, Expr::value(limits.requests_per_minute))
                    .filter(living(&team_id))
                    .exec(&tx)
                    .await?;
                if changed.rows_affected == 0 {
                    return Err(Failure::from(Fault::NoSuchTeam));
                }
                team_quotas::Entity::delete_many()
                    .filter(team_quotas::Column::TeamId.eq(team_id.as_str()))
                    .exec(&tx)
                    .await?;
                let rows: Vec<_> = limits
                    .quotas
                    .into_iter()
                    .map(|(meter, units)| team_quotas::ActiveModel {
                        team_id: Set(team_id.clone()),
                        meter: Set(meter),
                        units: Set(units),
                    })
                    .collect();
                if !rows.is_empty() {
                    team_quotas::Entity::insert_many(rows).exec_without_returning(&tx).await?;
                }
                announce(&tx, &epochs, format!("team:{team_id}"));
                tx.audit(act.on_team(&team_id).on(vec![team_id]));
                Ok(())
            })
            .await?;
        Ok(())
    }

    /// Forgets some consumptions that nobody repeats any more, and some of what was used long ago. Says how many rows.
    pub(crate) async fn forget_consumptions(&self) -> Result<u64, Error> {
        let now_ms = self.database.clock().now_ms();
        let (before_ms, before_month) = (now_ms.saturating_sub(CONSUMPTIONS_KEPT_MS), Month::first_kept(now_ms));
        let before_day = Day::first_kept(now_ms).text();
        let forgotten = self
            .database
            .write(move |tx| async move {
                let sql = format!(
                    "DELETE FROM quota_consumptions WHERE consume_id IN (SELECT consume_id FROM quota_consumptions \
                     WHERE created_at_ms < $1 ORDER BY created_at_ms LIMIT {FORGOTTEN_A_STEP})"
                );
                let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql, [before_ms.into()]);
                let consumptions = tx.execute_raw(statement).await?.rows_affected();
                let months = quota_usage::Entity::delete_many()
                    .filter(quota_usage::Column::Month.lt(before_month.text()))
                    .exec(&tx)
                    .await?;
                let sql = format!(
                    "DELETE FROM quota_days WHERE (team_id, meter, day) IN (SELECT team_id, meter, day \
                     FROM quota_days WHERE day < $1 ORDER BY day LIMIT {FORGOTTEN_A_STEP})"
                );
                let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql, [before_day.into()]);
                let days = tx.execute_raw(statement).await?.rows_affected();
                Ok::<_, Failure>(consumptions.saturating_add(months.rows_affected).saturating_add(days))
            })
            .await?;
        Ok(forgotten)
    }
}

/// Removes what a deleted team has used. Its consumptions are many, and go by their age.
pub(super) async fn remove_quotas_of(tx: &Tx, team_id: &str) -> Result<(), Failure> {
    team_quotas::Entity::delete_many().filter(team_quotas::Column::TeamId.eq(team_id)).exec(tx).await?;
    quota_usage::Entity::delete_many().filter(quota_usage::Column::TeamId.eq(team_id)).exec(tx).await?;
    quota_days::Entity::delete_many().filter(quota_days::Column::TeamId.eq(team_id)).exec(tx).await?;
    Ok(())
}

fn is(counter: &Counter) -> sea_orm::Condition {
    sea_orm::Condition::all()
        .add(quota_usage::Column::TeamId.eq(counter.team_id.as_str()))
        .add(quota_usage::Column::Meter.eq(counter.meter.as_str()))
        .add(quota_usage::Column::Month.eq(counter.month.text()))
}

async fn own_quotas(connection: &impl ConnectionTrait, team_id: &str) -> Result<BTreeMap<String, i64>, Failure> {
    let rows = team_quotas::Entity::find().filter(team_quotas::Column::TeamId.eq(team_id)).all(connection).await?;
    Ok(rows.into_iter().map(|row| (row.meter, row.units)).collect())
}

async fn standing(connection: &impl ConnectionTrait, counter: &Counter, now_ms: i64) -> Result<Standing, Failure> {
    // SQLite numbers values as they appear.
    let sql = "SELECT teams.tier, team_quotas.units, quota_usage.used FROM teams \
               LEFT JOIN team_quotas ON team_quotas.team_id = teams.id AND team_quotas.meter = $1 \
               LEFT JOIN quota_usage ON quota_usage.team_id = teams.id AND quota_usage.meter = $1 \
               AND quota_usage.month = $2 \
               WHERE teams.id = $3 AND teams.deleted_at_ms IS NULL \
               AND (teams.expires_at_ms IS NULL OR teams.expires_at_ms > $4)";
    let (meter, month, team_id) = (counter.meter.as_str(), counter.month.text(), counter.team_id.as_str());
    let values = [meter.into(), month.into(), team_id.into(), now_ms.into()];
    let statement = Statement::from_sql_and_values(connection.get_database_backend(), sql, values);
    let row = connection.query_one_raw(statement).await?.ok_or(Fault::NoSuchTeam)?;
    Ok(Standing {
        tier: row.try_get("", "tier")?,
        own: row.try_get("", "units")?,
        used: row.try_get::<Option<i64>>("", "used")?.unwrap_or(0),
    })
}

/// Takes the counter's row until the transaction ends; makes it where there is none. Answers what is used, and of what
/// the team was told.
async fn held(tx: &Tx, counter: &Counter) -> Result<(i64, Notices), Failure> {
    let sql = "INSERT INTO quota_usage (team_id, meter, month, used) VALUES ($1, $2, $3, 0) \
               ON CONFLICT (team_id, meter, month) DO UPDATE SET used = quota_usage.used \
               RETURNING used, warned_at_ms, warned_limit, exceeded_at_ms, exceeded_limit";
    let values = [counter.team_id.as_str().into(), counter.meter.as_str().into(), counter.month.text().into()];
    let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql, values);
    let row = tx.query_one_raw(statement).await?.ok_or(Fault::ConsumedMeanwhile)?;
    let notices = Notices {
        warned: told(&row, "warned_at_ms", "warned_limit")?,
        exceeded: told(&row, "exceeded_at_ms", "exceeded_limit")?,
    };
    Ok((row.try_get("", "used")?, notices))
}

fn told(row: &QueryResult, at_ms: &str, limit: &str) -> Result<Option<Told>, Failure> {
    let (at_ms, limit): (Option<i64>, Option<i64>) = (row.try_get("", at_ms)?, row.try_get("", limit)?);
    Ok(at_ms.zip(limit).map(|(at_ms, limit)| Told { at_ms, limit }))
}

/// Those that were settled before, by any counter.
async fn settled(tx: &Tx, asked: &[Consumption]) -> Result<HashMap<String, quota_consumptions::Model>, Failure> {
    let ids: BTreeSet<&str> = asked.iter().map(|consumption| consumption.id.as_str()).collect();
    let rows =
        quota_consumptions::Entity::find().filter(quota_consumptions::Column::ConsumeId.is_in(ids)).all(tx).await?;
    Ok(rows.into_iter().map(|row| (row.consume_id.clone(), row)).collect())
}

/// What is answered to a repetition: the same again.
fn repeated(
    row: &quota_consumptions::Model,
    counter: &Counter,
    consumption: &Consumption,
    balance: Balance,
) -> Verdict {
    // Given back before it was taken: nothing of it is held, and whoever asked has gone.
    if row.team_id.is_empty() {
        return Ok(Outcome { granted: false, balance, resets_at_ms: counter.month.ends_at_ms() });
    }
    if (&row.team_id, &row.meter, row.units) != (&counter.team_id, &counter.meter, consumption.units) {
        return Err(Fault::OtherConsumption);
    }
    let balance = Balance { used: row.used_after, limit: row.limit_then };
    Ok(Outcome { granted: true, balance, resets_at_ms: Month::stored(row.month.clone()).ends_at_ms() })
}

fn row(
    counter: &Counter,
    consumption: &Consumption,
    after: Balance,
    day: Day,
    now_ms: i64,
) -> quota_consumptions::Model {
    quota_consumptions::Model {
        consume_id: consumption.id.clone(),
        team_id: counter.team_id.clone(),
        meter: counter.meter.clone(),
        month: counter.month.text().to_owned(),
        units: consumption.units,
        used_after: after.used,
        limit_then: after.limit,
        created_at_ms: now_ms,
        refunded_at_ms: None,
        day: Some(day.text()),
    }
}

/// Writes where a counter that is held has come to.
async fn put(tx: &Tx, counter: &Counter, before: Balance, after: Balance, notices: Notices) -> Result<(), Failure> {
    let changed = quota_usage::Entity::update_many()
        .col_expr(quota_usage::Column::Used, Expr::value(after.used))
        .col_expr(quota_usage::Column::WarnedAtMs, Expr::value(notices.warned.map(|told| told.at_ms)))
        .col_expr(quota_usage::Column::WarnedLimit, Expr::value(notices.warned.map(|told| told.limit)))
        .col_expr(quota_usage::Column::ExceededAtMs, Expr::value(notices.exceeded.map(|told| told.at_ms)))
        .col_expr(quota_usage::Column::ExceededLimit, Expr::value(notices.exceeded.map(|told| told.limit)))
        .filter(is(counter))
        .filter(quota_usage::Column::Used.eq(before.used))
        .exec(tx)
        .await?;
    if changed.rows_affected == 1 { Ok(()) } else { Err(Fault::ConsumedMeanwhile.into()) }
}

/// Counts units for the day that they are taken on. The counter of its month is held.
async fn count(tx: &Tx, counter: &Counter, day: Day, units: i64) -> Result<(), Failure> {
    let sql = "INSERT INTO quota_days (team_id, meter, day, used) VALUES ($1, $2, $3, $4) \
               ON CONFLICT (team_id, meter, day) DO UPDATE SET used = quota_days.used + excluded.used";
    let (team_id, meter) = (counter.team_id.as_str(), counter.meter.as_str());
    let values = [team_id.into(), meter.into(), day.text().into(), units.into()];
    tx.execute_raw(Statement::from_sql_and_values(tx.get_database_backend(), sql, values)).await?;
    Ok(())
}

/// Writes consumptions down. One that somebody else has settled meanwhile, by the counter of another month, is judged
/// anew, and all with it.
async fn insert(tx: &Tx, mut rows: Vec<quota_consumptions::Model>) -> Result<(), Failure> {
    if rows.is_empty() {
        return Ok(());
    }
    // In the one order in which everybody writes, so that two cannot wait for each other.
    rows.sort_by(|one, other| one.consume_id.cmp(&other.consume_id));
    let count = u64::try_from(rows.len()).unwrap_or(u64::MAX);
    if insert_new(tx, rows).await? == count { Ok(()) } else { Err(Fault::ConsumedMeanwhile.into()) }
}

/// Writes those of which there is none of the same id. Says how many.
async fn insert_new(tx: &Tx, rows: Vec<quota_consumptions::Model>) -> Result<u64, Failure> {
    let rows =
        rows.into_iter().map(|row| sea_orm::ActiveModelTrait::reset_all(quota_consumptions::ActiveModel::from(row)));
    let by_id = OnConflict::column(quota_consumptions::Column::ConsumeId).do_nothing().to_owned();
    Ok(quota_consumptions::Entity::insert_many(rows).on_conflict(by_id).exec_without_returning(tx).await?)
}
