//! What was used day by day, and keys that are made to try calls out with.
//!
//! A consumption names the day that it was counted on, so that units go back to it. Those of the time before name none,
//! and were counted on none.

use sea_orm_migration::{
    MigrationName, MigrationTrait, SchemaManager, async_trait,
    sea_orm::{ConnectionTrait as _, DbErr},
    sea_query::{Index, Table, TableCreateStatement},
};

use crate::columns::{boolean, integer, optional_text, text};

pub(super) struct Days;

impl MigrationName for Days {
    fn name(&self) -> &'static str {
        "auth_0007_days"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Days {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(days()).await?;
        manager.create_index(Index::create().name("quota_days_by_day").table("quota_days").col("day").take()).await?;
        let day = Table::alter().table("quota_consumptions").add_column(optional_text("day")).take();
        manager.alter_table(day).await?;
        let temporary = boolean("temporary").default(false).take();
        manager.alter_table(Table::alter().table("keys").add_column(temporary).take()).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let connection = manager.get_connection();
        // What the older schema cannot tell from a key that counts, and may be rotated into one that stays, is closed.
        connection.execute_unprepared("DELETE FROM keys WHERE temporary").await?;
        connection.execute_unprepared("ALTER TABLE keys DROP COLUMN temporary").await?;
        connection.execute_unprepared("ALTER TABLE quota_consumptions DROP COLUMN day").await?;
        manager.drop_table(Table::drop().table("quota_days").take()).await
    }
}

/// Written under the lock of the month's counter.
fn days() -> TableCreateStatement {
    Table::create()
        .table("quota_days")
        .col(text("team_id"))
        .col(text("meter"))
        // Such as `2026-11-22`, in UTC.
        .col(text("day"))
        .col(integer("used"))
        .primary_key(Index::create().col("team_id").col("meter").col("day"))
        .take()
}
