//! The feed of alerts, and what is told of them elsewhere.
//!
//! An upsert decides which of many that come at once is the first of its hour: that one tells the webhooks, the Owners
//! and Admins, and Slack; the others count. Alerts are raised last in a transaction, and several of one cause in the order
//! of their subjects, so that no two transactions wait for each other.
//!
//! Deliberately absent: what gives cause to an alert, which is beside whatever does.

use paperkey_kit::{
    db::{DbError, Tx},
    ids::new_id,
    principal::Tenant,
    values::Page,
};
use paperkey_proto::{Error, principal::v1::Mode};
use sea_orm::{
    ColumnTrait as _, ConnectionTrait as _, EntityTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _,
    Statement, Value, entity::prelude::Expr,
};

use super::{
    Failure, Store, TenantStore,
    entities::{alerts, memberships, teams},
};
use crate::domain::{
    alert::{
        Alert, KEPT_MS, MAX_RECIPIENTS, NETWORK_KNOWN_MS, NOBODYS_KEPT_MS, NOBODYS_POSTS, NewAlert, PausedWebhook,
        cause_of, cause_word, hour_of, merged, slack_text, title,
    },
    letter::Letter,
    team::HEARING_OF_ALERTS,
};

/// The event of an alert.
const CREATED: &str = "alert.created";

/// How many rows one step forgets.
const AT_A_TIME: i64 = 500;
/// How many steps one round takes at most.
const MAX_STEPS: u32 = 200;
/// How long it is remembered that an event was handled.
const HANDLED_KEPT_MS: i64 = 30 * 24 * 60 * 60 * 1_000;
/// How long a post to Slack may wait where nobody sends it any more.
const POSTS_KEPT_MS: i64 = 2 * 24 * 60 * 60 * 1_000;

const INTO: &str = "INSERT INTO alerts \
     (id, team_id, mode, cause, subject, hour, count, message, details, created_at_ms, last_at_ms)";
const ON_CONFLICT: &str = "ON CONFLICT (team_id, mode, cause, subject, hour) DO UPDATE SET \
     count = alerts.count + 1, last_at_ms = excluded.last_at_ms RETURNING id, count, details";

fn alert_of(row: alerts::Model) -> Alert {
    Alert {
        cause: cause_of(&row.cause),
        details: serde_json::from_str(&row.details).unwrap_or_default(),
        id: row.id,
        subject: row.subject,
        message: row.message,
        count: row.count,
        created_at_ms: row.created_at_ms,
        last_at_ms: row.last_at_ms,
    }
}

impl Store {
    /// Raises an alert with whatever else the transaction does. The same cause and subject within the same hour is the
    /// same alert, which then counts one more. A tenant without a team is the installation's own; a team that is not there
    /// is told nothing.
    pub(crate) async fn raise(&self, tx: &Tx, tenant: &Tenant, alert: NewAlert) -> Result<(), DbError> {
        self.raise_once(tx, tenant, alert).await.map(drop)
    }

    /// The same, and says whether it is the first of its hour.
    pub(super) async fn raise_once(&self, tx: &Tx, tenant: &Tenant, alert: NewAlert) -> Result<bool, DbError> {
        let alert = alert.bounded();
        let now_ms = self.database.clock().now_ms();
        let Some(raised) = self.put(tx, tenant, &alert, now_ms).await? else { return Ok(false) };
        let Raised { id, count, details } = raised;
        if count > 1 {
            let details = serde_json::from_str(&details).unwrap_or_default();
            let merged = merged(&details, &alert.details);
            if merged != details {
                alerts::Entity::update_many()
                    .col_expr(alerts::Column::Details, Expr::value(merged.to_string()))
                    .filter(alerts::Column::Id.eq(id))
                    .exec(tx)
                    .await?;
            }
            return Ok(false);
        }
        let NewAlert { cause, subject, message, details } = alert;
        let alert = Alert { id, cause, subject, message, count, details, created_at_ms: now_ms, last_at_ms: now_ms };
        if tenant.team_id.is_empty() {
            self.tell_installation(tx, &alert).await?;
        } else {
            self.tell_team(tx, tenant, &alert).await?;
        }
        Ok(true)
    }

    /// Counts an alert, or begins with it; `None` where the team is not there.
    async fn put(&self, tx: &Tx, tenant: &Tenant, alert: &NewAlert, now_ms: i64) -> Result<Option<Raised>, DbError> {
        let values: Vec<Value> = vec![
            new_id("alrt", self.database.clock()).into(),
            tenant.team_id.as_str().into(),
            tenant.mode_word().into(),
            cause_word(alert.cause).into(),
            alert.subject.as_str().into(),
            hour_of(now_ms).into(),
            alert.message.as_str().into(),
            alert.details.to_string().into(),
            now_ms.into(),
        ];
        let selected = "SELECT $1, $2, $3, $4, $5, $6, 1, $7, $8, $9, $9";
        let sql = if tenant.team_id.is_empty() {
            format!("{INTO} {selected} WHERE true {ON_CONFLICT}")
        } else {
            format!("{INTO} {selected} FROM teams WHERE id = $2 AND deleted_at_ms IS NULL {ON_CONFLICT}")
        };
        let row = tx.query_one_raw(Statement::from_sql_and_values(tx.get_database_backend(), sql, values)).await?;
        row.map(|row| {
            Ok(Raised {
                id: row.try_get("", "id")?,
                count: row.try_get("", "count")?,
                details: row.try_get("", "details")?,
            })
        })
        .transpose()
    }

    async fn tell_team(&self, tx: &Tx, tenant: &Tenant, alert: &Alert) -> Result<(), DbError> {
        self.outbox.emit(tx, &["webhook"], CREATED, tenant, "", &alert.event_data());
        let team = teams::Entity::find_by_id(tenant.team_id.as_str()).one(tx).await?;
        // A sandbox is a stranger's: nobody is mailed, and the installation is not bothered.
        let Some(team) = team.filter(|team| !team.sandbox) else { return Ok(()) };
        let hearing = memberships::Entity::find()
            .filter(memberships::Column::TeamId.eq(team.id.as_str()))
            .filter(memberships::Column::Role.is_in(HEARING_OF_ALERTS))
            // Owners before Admins, and who is longer in the team before others.
            .order_by_desc(memberships::Column::Role)
            .order_by_asc(memberships::Column::CreatedAtMs)
            .order_by_asc(memberships::Column::UserId)
            .limit(MAX_RECIPIENTS)
            .all(tx)
            .await?;
        for membership in hearing {
            let letter = Letter::Alert {
                user_id: membership.user_id,
                team_id: team.id.clone(),
                team: team.name.clone(),
                title: title(alert.cause).to_owned(),
                message: alert.message.clone(),
                test: tenant.mode == Mode::Test,
                at_ms: alert.created_at_ms,
            };
            self.outgoing.leave(tx, &letter).await?;
        }
        if self.posts.are_sent() {
            let text = slack_text(alert.cause, Some(&team.name), tenant.mode, &alert.message);
            self.posts.leave(tx, &text).await?;
        }
        Ok(())
    }

    /// What belongs to no team goes to Slack, a few an hour, and into the log.
    async fn tell_installation(&self, tx: &Tx, alert: &Alert) -> Result<(), DbError> {
        let (cause, subject, message) = (cause_word(alert.cause), alert.subject.clone(), alert.message.clone());
        tx.after_commit(move || tracing::warn!(cause, subject, "{message}"));
        if !self.posts.are_sent() {
            return Ok(());
        }
        let before = alerts::Entity::find()
            .filter(alerts::Column::TeamId.eq(""))
            .filter(alerts::Column::Mode.eq(Tenant { team_id: String::new(), mode: Mode::Live }.mode_word()))
            .order_by_desc(alerts::Column::Id)
            .offset(NOBODYS_POSTS)
            .one(tx)
            .await?;
        if before.is_some_and(|before| before.hour >= hour_of(alert.created_at_ms)) {
            return Ok(());
        }
        self.posts.leave(tx, &slack_text(alert.cause, None, Mode::Live, &alert.message)).await
    }

    /// Raises that a webhook is paused, once for each event that says so.
    pub(crate) async fn webhook_paused(
        &self,
        event_id: String,
        tenant: Tenant,
        webhook: PausedWebhook,
    ) -> Result<(), Error> {
        let this = self.clone();
        self.database
            .write(move |tx| async move {
                let sql = "INSERT INTO handled_events (id, at_ms) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING";
                let values: [Value; 2] = [event_id.into(), this.database.clock().now_ms().into()];
                let handled = Statement::from_sql_and_values(tx.get_database_backend(), sql, values);
                if tx.execute_raw(handled).await?.rows_affected() > 0 {
                    this.raise(&tx, &tenant, webhook.alert()).await?;
                }
                Ok::<_, Failure>(())
            })
            .await?;
        Ok(())
    }

    /// Forgets old alerts, networks that keys were not seen in for long, and what else is of no more use. Says how much
    /// that was.
    pub(crate) async fn forget_alerts(&self) -> Result<u64, Error> {
        let before = |kept_ms: i64| self.database.clock().now_ms().saturating_sub(kept_ms);
        // Of each key the network that was seen last stays, however long ago that is: the next is known to be new.
        // One that is seen at this moment is judged as it is then, and stays as well.
        let networks = "DELETE FROM key_networks WHERE last_seen_ms <= $1 AND (key_id, network) IN (\
             SELECT n.key_id, n.network FROM key_networks n WHERE n.last_seen_ms <= $1 AND (\
             EXISTS (SELECT 1 FROM key_networks later WHERE later.key_id = n.key_id AND \
             (later.last_seen_ms > n.last_seen_ms OR \
             (later.last_seen_ms = n.last_seen_ms AND later.network > n.network))) \
             OR NOT (EXISTS (SELECT 1 FROM keys WHERE keys.id = n.key_id) \
             OR EXISTS (SELECT 1 FROM product_keys WHERE product_keys.id = n.key_id))) LIMIT $2)";
        let alerts = "DELETE FROM alerts WHERE id IN (SELECT id FROM alerts WHERE created_at_ms <= $1 LIMIT $2)";
        let nobodys = "DELETE FROM alerts WHERE id IN (\
             SELECT id FROM alerts WHERE team_id = '' AND created_at_ms <= $1 LIMIT $2)";
        let posts = "DELETE FROM slack_posts WHERE id IN (\
             SELECT id FROM slack_posts WHERE created_at_ms <= $1 LIMIT $2)";
        let events = "DELETE FROM handled_events WHERE id IN (\
             SELECT id FROM handled_events WHERE at_ms <= $1 LIMIT $2)";
        let mut forgotten = 0;
        for (sql, before_ms) in [
            (networks, before(NETWORK_KNOWN_MS)),
            (alerts, before(KEPT_MS)),
            (nobodys, before(NOBODYS_KEPT_MS)),
            (posts, before(POSTS_KEPT_MS)),
            (events, before(HANDLED_KEPT_MS)),
        ] {
            for _ in 0..MAX_STEPS {
                let gone = self.forget_some(sql, before_ms).await?;
                forgotten += gone;
                if gone < AT_A_TIME.unsigned_abs() {
                    break;
                }
            }
        }
        Ok(forgotten)
    }

    async fn forget_some(&self, sql: &'static str, before_ms: i64) -> Result<u64, Error> {
        let gone = self.database.write(move |tx| async move {
            let values: [Value; 2] = [before_ms.into(), AT_A_TIME.into()];
            let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql, values);
            Ok::<_, Failure>(tx.execute_raw(statement).await?.rows_affected())
        });
        Ok(gone.await?)
    }
}

/// An alert as an upsert has left it.
struct Raised {
    id: String,
    count: i64,
    details: String,
}

impl TenantStore {
    /// The alerts, newest first, read one row too long.
    pub(crate) async fn alerts(&self, page: &Page) -> Result<Vec<Alert>, Error> {
        let mut query = alerts::Entity::find()
            .filter(alerts::Column::TeamId.eq(self.tenant.team_id.as_str()))
            .filter(alerts::Column::Mode.eq(self.tenant.mode_word()));
        if let Some(before) = &page.before {
            query = query.filter(alerts::Column::Id.lt(before.as_str()));
        }
        let query = query.order_by_desc(alerts::Column::Id).limit(page.size.saturating_add(1));
        let rows =
            self.store.database.read(move |reader| async move { Ok::<_, Failure>(query.all(&reader).await?) }).await?;
        Ok(rows.into_iter().map(alert_of).collect())
    }
}
