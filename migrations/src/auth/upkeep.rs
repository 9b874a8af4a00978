//! Indexes for what is done about keys while nobody asks, and for the installation's own key, among a million others.
//!
//! On PostgreSQL they are built while others write, which no transaction can do; what a migrator that died has left is
//! built anew.

use sea_orm_migration::{
    MigrationName, MigrationTrait, SchemaManager, async_trait,
    sea_orm::{ConnectionTrait as _, DbErr},
};

use crate::indexes::concurrently;

const INDEXES: [(&str, &str); 6] = [
    ("keys_temporary_by_creation", "keys (created_at_ms) WHERE temporary"),
    ("keys_temporary_by_expiry", "keys (expires_at_ms) WHERE temporary"),
    (
        "keys_to_rotate",
        "keys (rotation_due_at_ms) WHERE rotation_told_at_ms IS NULL AND team_id IS NOT NULL AND superseded_by IS NULL \
         AND revoked_at_ms IS NULL AND enabled AND (expires_at_ms IS NULL OR expires_at_ms > rotation_due_at_ms)",
    ),
    (
        "keys_to_tell_a_day_before",
        "keys (expires_at_ms) WHERE expiry_told <> 1 AND expires_at_ms - created_at_ms > 86400000 AND team_id IS NOT NULL \
         AND superseded_by IS NULL AND revoked_at_ms IS NULL AND enabled",
    ),
    (
        "keys_to_tell_a_week_before",
        "keys (expires_at_ms) WHERE expiry_told = 0 AND expires_at_ms - created_at_ms > 604800000 AND team_id IS NOT NULL \
         AND superseded_by IS NULL AND revoked_at_ms IS NULL AND enabled",
    ),
    ("keys_of_system", "keys (revoked_at_ms) WHERE kind = 'system'"),
];

pub(super) struct Upkeep;

impl MigrationName for Upkeep {
    fn name(&self) -> &'static str {
        "auth_0008_upkeep"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Upkeep {
    fn use_transaction(&self) -> Option<bool> {
        Some(false)
    }

    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        self.down(manager).await?;
        for (name, on) in INDEXES {
            let create = format!("CREATE INDEX {}{name} ON {on}", concurrently(manager));
            manager.get_connection().execute_unprepared(&create).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for (name, _) in INDEXES {
            let drop = format!("DROP INDEX {}IF EXISTS {name}", concurrently(manager));
            manager.get_connection().execute_unprepared(&drop).await?;
        }
        Ok(())
    }
}
