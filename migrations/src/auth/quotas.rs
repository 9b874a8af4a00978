//! What teams have used of their meters, each consumption by itself for a while, limits that a team has of its own, and
//! the first of keys that were rotated one into the next, by which calls are counted.

use sea_orm_migration::{
    MigrationName, MigrationTrait, SchemaManager, async_trait,
    sea_orm::{ConnectionTrait as _, DbErr},
    sea_query::{Index, Table, TableCreateStatement},
};

use crate::columns::{integer, optional_integer, optional_text, text};

/// Quotas: units a month per team and meter.
pub(super) struct Quotas;

impl MigrationName for Quotas {
    fn name(&self) -> &'static str {
        "auth_0004_quotas"
    }
}

const TABLES: [&str; 3] = ["quota_usage", "quota_consumptions", "team_quotas"];

#[async_trait::async_trait]
impl MigrationTrait for Quotas {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in [usage(), consumptions(), team_quotas()] {
            manager.create_table(table).await?;
        }
        for (name, table, column) in [
            ("quota_usage_by_month", "quota_usage", "month"),
            ("quota_consumptions_by_time", "quota_consumptions", "created_at_ms"),
        ] {
            manager.create_index(Index::create().name(name).table(table).col(column).take()).await?;
        }
        // Empty where the key is the first one.
        manager.alter_table(Table::alter().table("keys").add_column(optional_text("lineage")).take()).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.get_connection().execute_unprepared("ALTER TABLE keys DROP COLUMN lineage").await?;
        for table in TABLES.into_iter().rev() {
            manager.drop_table(Table::drop().table(table).take()).await?;
        }
        Ok(())
    }
}

/// One counter a row, which is the lock under which its units are taken. Of each threshold it holds when and at which
/// limit the team was told.
fn usage() -> TableCreateStatement {
    Table::create()
        .table("quota_usage")
        .col(text("team_id"))
        .col(text("meter"))
        // Such as `2026-11`, in UTC.
        .col(text("month"))
        .col(integer("used"))
        .col(optional_integer("warned_at_ms"))
        .col(optional_integer("warned_limit"))
        .col(optional_integer("exceeded_at_ms"))
        .col(optional_integer("exceeded_limit"))
        .primary_key(Index::create().col("team_id").col("meter").col("month"))
        .take()
}

/// What was taken, with the answer that was given, so that a repetition is given the same.
fn consumptions() -> TableCreateStatement {
    Table::create()
        .table("quota_consumptions")
        .col(text("consume_id").primary_key())
        .col(text("team_id"))
        .col(text("meter"))
        .col(text("month"))
        .col(integer("units"))
        .col(integer("used_after"))
        .col(optional_integer("limit_then"))
        .col(integer("created_at_ms"))
        .col(optional_integer("refunded_at_ms"))
        .take()
}

fn team_quotas() -> TableCreateStatement {
    Table::create()
        .table("team_quotas")
        .col(text("team_id"))
        .col(text("meter"))
        .col(integer("units"))
        .primary_key(Index::create().col("team_id").col("meter"))
        .take()
}
