//! Clients, as far as licensing knows them: that licences name them, and that they are gone.
//!
//! A client's row is a lock, as a product's is. Who lets a licence name a client touches it and sees whether the client
//! was deleted; who learns of the deletion marks it. So a licence either names the client before the mark, and loses
//! the name with the others, or not at all.

use std::collections::{BTreeSet, HashSet};

use paperkey_kit::{db::Tx, principal::Tenant};
use sea_orm::{ConnectionTrait as _, Statement, Value};

use super::{Act, Failure, TenantStore, execute, insert_rows, products::undeleted};
use crate::domain::{Fault, could_be_id};

/// Licences that lose their client in one transaction.
const BATCH: i64 = 200;

impl TenantStore {
    /// Takes a client off all licences that name it, in bounded transactions. Doing it again, or going on where an
    /// earlier try was cut off, is the same as doing it once. It is not told as a change of the licences: their events
    /// do not name the client.
    pub async fn forget_client(&self, client_id: &str, act: Act) -> Result<(), Failure> {
        if !could_be_id(client_id) {
            return Ok(());
        }
        self.mark_client_deleted(client_id.to_owned(), act).await?;
        while self.unname_some(client_id.to_owned()).await? {}
        Ok(())
    }

    async fn mark_client_deleted(&self, client_id: String, act: Act) -> Result<(), Failure> {
        let (tenant, now_ms) = (self.tenant.clone(), self.store.now_ms());
        self.parts()
            .database
            .write(move |tx| async move {
                let marked = execute(
                    &tx,
                    "INSERT INTO clients (id, team_id, mode, deleted_at_ms) VALUES ($1, $2, $3, $4) \
                     ON CONFLICT (id) DO UPDATE SET deleted_at_ms = excluded.deleted_at_ms \
                     WHERE clients.deleted_at_ms IS NULL AND clients.team_id = excluded.team_id \
                     AND clients.mode = excluded.mode",
                    vec![
                        client_id.as_str().into(),
                        tenant.team_id.as_str().into(),
                        tenant.mode_word().into(),
                        now_ms.into(),
                    ],
                )
                .await?;
                if marked > 0 {
                    tx.audit(act.on_team(&tenant.team_id).on(vec![client_id]));
                }
                Ok(())
            })
            .await
    }

    /// Takes it off some licences, and says whether there were any.
    async fn unname_some(&self, client_id: String) -> Result<bool, Failure> {
        let store = self.store.clone();
        let (reach, mut scope) = self.reach(2);
        let sql = format!(
            "UPDATE licenses SET client_id = NULL, updated_at_ms = $1 WHERE id IN \
             (SELECT id FROM licenses WHERE client_id = $2 AND {reach} LIMIT {BATCH}) \
             AND client_id = ${again} RETURNING id",
            again = 3 + scope.len(),
        );
        let mut values: Vec<Value> = vec![store.now_ms().into(), client_id.as_str().into()];
        values.append(&mut scope);
        // Judged again outside: one that was given to another client in between keeps that.
        values.push(client_id.into());
        self.parts()
            .database
            .write(move |tx| async move {
                let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql, values);
                let mut ids = Vec::new();
                for row in tx.query_all_raw(statement).await? {
                    ids.push(row.try_get::<String>("", "id")?);
                }
                let any = !ids.is_empty();
                store.announce(&tx, ids);
                Ok(any)
            })
            .await
    }
}

/// Locks the client for the rest of the transaction; refuses one that was deleted or is another tenant's.
pub(super) async fn lock_client(tx: &Tx, tenant: &Tenant, client_id: &str) -> Result<(), Failure> {
    let there = lock_clients(tx, tenant, &BTreeSet::from([client_id])).await?;
    if there.contains(client_id) { Ok(()) } else { Err(Fault::NoSuchClient.into()) }
}

/// Locks some clients for the rest of the transaction, in the order of their ids, and says which are the tenant's and
/// were not deleted.
pub(super) async fn lock_clients(tx: &Tx, tenant: &Tenant, ids: &BTreeSet<&str>) -> Result<HashSet<String>, Failure> {
    let row = |id: &str| vec![id.into(), tenant.team_id.as_str().into(), tenant.mode_word().into()];
    let conflict = "ON CONFLICT (id) DO UPDATE SET deleted_at_ms = clients.deleted_at_ms \
                    WHERE clients.team_id = excluded.team_id AND clients.mode = excluded.mode \
                    RETURNING id, deleted_at_ms";
    let rows = ids.iter().map(|id| row(id)).collect();
    undeleted(insert_rows(tx, "clients (id, team_id, mode)", conflict, rows).await?)
}
