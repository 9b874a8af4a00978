//! What goes with a team.

use paperkey_kit::db::DbError;
use sea_orm::{ConnectionTrait as _, Statement};

use super::{Act, Store};
use crate::domain::could_be_id;

/// Rows that one transaction deletes.
const BATCH: u64 = 500;

/// What a team has here, of both modes.
const TABLES: [&str; 3] = ["drafts", "clients", "products"];

impl Store {
    /// Deletes all that a team has, in bounded transactions. Doing it again, or going on where an earlier try was cut
    /// off, is the same as doing it once. Nobody is told of single products: those who keep something of them are
    /// told of the team.
    pub(crate) async fn forget_team(&self, team_id: &str, act: Act) -> Result<(), DbError> {
        if !could_be_id(team_id) {
            return Ok(());
        }
        let mut act = Some(act);
        for table in TABLES {
            while self.forget_some(table, team_id.to_owned(), &mut act).await? {}
        }
        Ok(())
    }

    /// Deletes some rows of a table, and says whether there were any. The first that finds some is recorded.
    async fn forget_some(&self, table: &'static str, team_id: String, act: &mut Option<Act>) -> Result<bool, DbError> {
        let first = act.clone();
        let gone = self
            .database
            .write(move |tx| async move {
                let text = format!(
                    "DELETE FROM {table} WHERE id IN (SELECT id FROM {table} WHERE team_id = $1 LIMIT {BATCH})"
                );
                let values = vec![team_id.as_str().into()];
                let statement = Statement::from_sql_and_values(tx.get_database_backend(), text, values);
                let gone = tx.execute_raw(statement).await?.rows_affected();
                if let Some(act) = first.filter(|_| gone > 0) {
                    tx.audit(act.on_team(&team_id).on(vec![team_id]));
                }
                Ok::<_, DbError>(gone)
            })
            .await?;
        if gone > 0 {
            *act = None;
        }
        Ok(gone > 0)
    }
}
