//! Alerts, what they are told from, and what waits to be told to Slack.
//!
//! The unique index of `alerts` is what makes one alert of all that one cause brings about within an hour. Deliberately
//! absent: an index of `slack_posts` beyond its due time, since few ever wait.

use sea_orm_migration::{
    MigrationName, MigrationTrait, SchemaManager, async_trait,
    sea_orm::{ConnectionTrait as _, DbErr},
    sea_query::{Index, IndexCreateStatement, Table, TableCreateStatement},
};

use crate::columns::{bytes, integer, text};

pub(super) struct Alerts;

impl MigrationName for Alerts {
    fn name(&self) -> &'static str {
        "auth_0006_alerts"
    }
}

const TABLES: [&str; 4] = ["alerts", "key_networks", "slack_posts", "handled_events"];

#[async_trait::async_trait]
impl MigrationTrait for Alerts {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in [alerts(), key_networks(), slack_posts(), handled_events()] {
            manager.create_table(table).await?;
        }
        for index in indexes() {
            manager.create_index(index).await?;
        }
        // Of what a key's end was told last: 7 days, 1 day, or nothing yet.
        let told = integer("expiry_told").default(0_i64).take();
        manager.alter_table(Table::alter().table("keys").add_column(told).take()).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.get_connection().execute_unprepared("ALTER TABLE keys DROP COLUMN expiry_told").await?;
        for table in TABLES.into_iter().rev() {
            manager.drop_table(Table::drop().table(table).take()).await?;
        }
        Ok(())
    }
}

/// `team_id` is empty where it is not known whose.
fn alerts() -> TableCreateStatement {
    Table::create()
        .table("alerts")
        .col(text("id").primary_key())
        .col(text("team_id"))
        .col(text("mode"))
        .col(text("cause"))
        .col(text("subject"))
        // When the hour began.
        .col(integer("hour"))
        .col(integer("count"))
        .col(text("message"))
        .col(text("details"))
        .col(integer("created_at_ms"))
        .col(integer("last_at_ms"))
        .take()
}

/// From where keys, and the pairs of products, were used.
fn key_networks() -> TableCreateStatement {
    Table::create()
        .table("key_networks")
        .col(text("key_id"))
        .col(text("network"))
        .col(text("team_id"))
        .col(integer("first_seen_ms"))
        .col(integer("last_seen_ms"))
        .primary_key(Index::create().col("key_id").col("network"))
        .take()
}

fn slack_posts() -> TableCreateStatement {
    Table::create()
        .table("slack_posts")
        .col(text("id").primary_key())
        .col(bytes("sealed"))
        .col(integer("attempts"))
        .col(integer("due_at_ms"))
        .col(integer("created_at_ms"))
        .take()
}

/// Events of other services that would count twice if they came twice.
fn handled_events() -> TableCreateStatement {
    Table::create().table("handled_events").col(text("id").primary_key()).col(integer("at_ms")).take()
}

fn indexes() -> [IndexCreateStatement; 7] {
    let on = |name, table| Index::create().name(name).table(table).take();
    [
        on("alerts_by_cause", "alerts")
            .col("team_id")
            .col("mode")
            .col("cause")
            .col("subject")
            .col("hour")
            .unique()
            .take(),
        on("alerts_by_team", "alerts").col("team_id").col("mode").col("id").take(),
        on("alerts_by_time", "alerts").col("created_at_ms").take(),
        on("key_networks_by_team", "key_networks").col("team_id").take(),
        on("key_networks_by_time", "key_networks").col("last_seen_ms").take(),
        on("slack_posts_by_due", "slack_posts").col("due_at_ms").take(),
        on("handled_events_by_time", "handled_events").col("at_ms").take(),
    ]
}
