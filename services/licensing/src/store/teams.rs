//! What goes with a team.

use paperkey_kit::principal::Tenant;
use paperkey_proto::principal::v1::Mode;
use sea_orm::{ConnectionTrait as _, Statement};

use super::{Act, Failure, Store};
use crate::domain::could_be_id;

/// Rows that one transaction deletes.
const BATCH: i64 = 500;

impl Store {
    /// Deletes all that a team has, in both modes and in bounded transactions. Doing it again, or going on where an
    /// earlier try was cut off, is the same as doing it once. What is known of its products and clients goes too, the
    /// marks of deleted ones included: nobody can act for the team any more, and what was under way is found when the
    /// deletion is told again.
    pub async fn forget_team(&self, team_id: &str, act: Act) -> Result<(), Failure> {
        if !could_be_id(team_id) {
            return Ok(());
        }
        for mode in [Mode::Live, Mode::Test] {
            self.of(Tenant { team_id: team_id.to_owned(), mode }).forget_licenses().await?;
        }
        let mut act = Some(act);
        for table in ["products", "clients"] {
            while self.forget_known(table, team_id.to_owned(), &mut act).await? {}
        }
        Ok(())
    }

    /// Forgets some of what is known, and says whether there was any. The first time that there is, is recorded: a
    /// team without products has no licences either.
    async fn forget_known(&self, table: &'static str, team_id: String, act: &mut Option<Act>) -> Result<bool, Failure> {
        let store = self.clone();
        let first = act.clone();
        let any = self
            .parts
            .database
            .write(move |tx| async move {
                let sql = format!(
                    "DELETE FROM {table} WHERE id IN (SELECT id FROM {table} WHERE team_id = $1 LIMIT {BATCH}) \
                     RETURNING id"
                );
                let values = vec![team_id.as_str().into()];
                let statement = Statement::from_sql_and_values(tx.get_database_backend(), sql, values);
                let mut ids = Vec::new();
                for row in tx.query_all_raw(statement).await? {
                    ids.push(row.try_get::<String>("", "id")?);
                }
                let any = !ids.is_empty();
                if let Some(act) = first.filter(|_| any) {
                    tx.audit(act.on_team(&team_id).on(vec![team_id]));
                }
                store.announce(&tx, ids);
                Ok::<_, Failure>(any)
            })
            .await?;
        if any {
            *act = None;
        }
        Ok(any)
    }
}
