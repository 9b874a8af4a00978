//! What goes with a team.

use paperkey_kit::db::{DbError, Tx};
use sea_orm::{
    ColumnTrait as _, ConnectionTrait as _, EntityTrait as _, QueryFilter as _, QueryOrder as _, QuerySelect as _,
    Value, sea_query::LockType,
};

use super::{
    Store,
    endpoints::{Column, Entity, remove},
    places, sql,
};
use crate::domain::{could_be_id, endpoint::Status};

/// Rows that one transaction takes.
const BATCH: i64 = 500;

impl Store {
    /// Removes all that is kept of a team, in both modes and in bounded transactions: its own endpoints and those of
    /// its products, what was sent to them and what waits, and what is known of its products, the marks of deleted ones
    /// included. Doing it again, or going on where an earlier try was cut off, is the same as doing it once; an
    /// endpoint that was being made at the first time goes when the deletion is told again.
    pub(super) async fn forget_team(&self, team_id: &str) -> Result<(), DbError> {
        if !could_be_id(team_id) {
            tracing::warn!("a deleted team is not named and is passed over");
            return Ok(());
        }
        // Sending ends at once, however long the rest takes.
        while self.halt_some(team_id.to_owned()).await? {}
        loop {
            let endpoints = self.endpoints_of_team(team_id.to_owned()).await?;
            if endpoints.is_empty() {
                break;
            }
            for id in endpoints {
                while self.forget_deliveries(id.clone()).await? {}
                self.forget_endpoint(id).await?;
            }
        }
        for table in ["watchers", "events", "products"] {
            while self.forget_rows(table, team_id.to_owned()).await? {}
        }
        Ok(())
    }

    /// Pauses some of its endpoints, and says whether there were any to pause.
    async fn halt_some(&self, team_id: String) -> Result<bool, DbError> {
        let wake = self.wake.clone();
        let active = Entity::find()
            .filter(Column::TeamId.eq(team_id))
            .filter(Column::Status.eq(Status::Active.word()))
            .order_by_asc(Column::Id)
            .limit(BATCH.unsigned_abs())
            .lock(LockType::NoKeyUpdate);
        self.database
            .write(move |tx| async move {
                let active: Vec<String> = active.all(&tx).await?.into_iter().map(|endpoint| endpoint.id).collect();
                if active.is_empty() {
                    return Ok(false);
                }
                let text = format!("UPDATE endpoints SET status = 'paused' WHERE id IN ({})", places(active.len(), 0));
                let values = active.iter().map(|id| Value::from(id.as_str())).collect();
                tx.execute_raw(sql(tx.get_database_backend(), text, values)).await?;
                tx.after_commit(move || active.iter().for_each(|id| wake.changed(id)));
                Ok(true)
            })
            .await
    }

    async fn endpoints_of_team(&self, team_id: String) -> Result<Vec<String>, DbError> {
        self.database
            .read(move |reader| async move {
                let text = "SELECT id FROM endpoints WHERE team_id = $1 LIMIT $2";
                let values: Vec<Value> = vec![team_id.into(), BATCH.into()];
                let rows = reader.query_all_raw(sql(reader.get_database_backend(), text, values)).await?;
                let ids = rows.iter().map(|row| row.try_get("", "id"));
                Ok(ids.collect::<Result<_, _>>()?)
            })
            .await
    }

    /// Removes some of what was or would be sent to an endpoint, and says whether there was any.
    async fn forget_deliveries(&self, endpoint_id: String) -> Result<bool, DbError> {
        self.database
            .write(move |tx| async move {
                // Locked first, as everyone does who changes many deliveries of it.
                Entity::find().filter(Column::Id.eq(&endpoint_id)).lock(LockType::Update).one(&tx).await?;
                remove_some(&tx, &endpoint_id).await
            })
            .await
    }

    /// Removes an endpoint, with what came in for it meanwhile.
    async fn forget_endpoint(&self, id: String) -> Result<(), DbError> {
        let wake = self.wake.clone();
        self.database
            .write(move |tx| async move {
                Entity::find().filter(Column::Id.eq(&id)).lock(LockType::Update).one(&tx).await?;
                while remove_some(&tx, &id).await? {}
                remove(&tx, &id).await?;
                tx.after_commit(move || wake.changed(&id));
                Ok(())
            })
            .await
    }

    /// Removes some rows of a table, and says whether there were any.
    async fn forget_rows(&self, table: &'static str, team_id: String) -> Result<bool, DbError> {
        self.database
            .write(move |tx| async move {
                let text =
                    format!("DELETE FROM {table} WHERE id IN (SELECT id FROM {table} WHERE team_id = $1 LIMIT $2)");
                let values: Vec<Value> = vec![team_id.into(), BATCH.into()];
                Ok(tx.execute_raw(sql(tx.get_database_backend(), text, values)).await?.rows_affected() > 0)
            })
            .await
    }
}

/// Removes some of what was or would be sent to an endpoint that the transaction has locked, and says whether there was
/// any.
async fn remove_some(tx: &Tx, endpoint_id: &str) -> Result<bool, DbError> {
    let text = "DELETE FROM deliveries WHERE id IN (SELECT id FROM deliveries WHERE endpoint_id = $1 \
                ORDER BY id LIMIT $2) RETURNING id";
    let values: Vec<Value> = vec![endpoint_id.into(), BATCH.into()];
    let rows = tx.query_all_raw(sql(tx.get_database_backend(), text, values)).await?;
    let gone = rows.iter().map(|row| row.try_get::<String>("", "id").map(Value::from));
    let gone = gone.collect::<Result<Vec<_>, _>>()?;
    if gone.is_empty() {
        return Ok(false);
    }
    let text = format!("DELETE FROM attempts WHERE delivery_id IN ({})", places(gone.len(), 0));
    tx.execute_raw(sql(tx.get_database_backend(), text, gone)).await?;
    Ok(true)
}
