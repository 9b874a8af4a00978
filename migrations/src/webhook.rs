//! The schema of the webhook service.
//!
//! `deliveries.due_at_ms` is when anyone may take the row: the time of its next attempt or, while `claimed_by` names a
//! process, the end of that claim. One partial index on it serves the dispatcher, however many rows are finished.

use sea_orm_migration::{
    MigrationName, MigrationTrait, MigratorTrait, SchemaManager, async_trait,
    sea_orm::{ConnectionTrait as _, DbErr},
    sea_query::{Index, IndexCreateStatement, Table, TableCreateStatement},
};

use crate::{
    columns::{bytes, integer, optional_bytes, optional_integer, optional_text, text},
    indexes::concurrently,
    kit,
};

/// All migrations of the webhook service, in their order.
#[derive(Clone, Copy, Debug)]
pub struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        let mut all = kit::migrations();
        all.push(Box::new(Tables));
        all.push(Box::new(Teams));
        all.push(Box::new(Replays));
        all.push(Box::new(Paused));
        all.push(Box::new(Traces));
        all
    }
}

struct Tables;

impl MigrationName for Tables {
    fn name(&self) -> &'static str {
        "webhook_0001_tables"
    }
}

const TABLES: [&str; 5] = ["products", "endpoints", "events", "deliveries", "attempts"];

/// Indexes over a part of a table, in the words that both engines understand.
const PARTIAL_INDEXES: [&str; 3] = [
    "CREATE INDEX deliveries_due ON deliveries (endpoint_id, due_at_ms, id) WHERE status = 'pending'",
    "CREATE INDEX deliveries_waiting ON deliveries (created_at_ms) WHERE status = 'pending'",
    "CREATE INDEX deliveries_finished ON deliveries (finished_at_ms) WHERE finished_at_ms IS NOT NULL",
];

#[async_trait::async_trait]
impl MigrationTrait for Tables {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in [products(), endpoints(), events(), deliveries(), attempts()] {
            manager.create_table(table).await?;
        }
        for index in indexes() {
            manager.create_index(index).await?;
        }
        for index in PARTIAL_INDEXES {
            manager.get_connection().execute_unprepared(index).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in TABLES.into_iter().rev() {
            manager.drop_table(Table::drop().table(table).to_owned()).await?;
        }
        Ok(())
    }
}

struct Teams;

impl MigrationName for Teams {
    fn name(&self) -> &'static str {
        "webhook_0002_teams"
    }
}

/// What belongs to a team itself has an empty `product_id`: by that alone, all teams would be looked through.
#[async_trait::async_trait]
impl MigrationTrait for Teams {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let by_owner = |name, table| Index::create().name(name).table(table).col("team_id").col("mode").take();
        for index in [
            by_owner("endpoints_by_owner", "endpoints").col("product_id").col("id").take(),
            by_owner("events_by_owner", "events").col("product_id").take(),
            by_owner("products_by_owner", "products").take(),
        ] {
            manager.create_index(index).await?;
        }
        for (index, table) in [("endpoints_by_product", "endpoints"), ("events_by_product", "events")] {
            manager.drop_index(Index::drop().name(index).table(table).to_owned()).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for index in indexes().into_iter().take(2) {
            manager.create_index(index).await?;
        }
        for (index, table) in
            [("endpoints_by_owner", "endpoints"), ("events_by_owner", "events"), ("products_by_owner", "products")]
        {
            manager.drop_index(Index::drop().name(index).table(table).to_owned()).await?;
        }
        Ok(())
    }
}

/// Replays, two secrets at a time, and watching.
struct Replays;

impl MigrationName for Replays {
    fn name(&self) -> &'static str {
        "webhook_0003_replays"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Replays {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for (table, column) in [
            // How many attempts were made before the delivery was last replayed, if it was: its schedule begins there anew.
            ("deliveries", optional_integer("replayed_after")),
            ("endpoints", optional_bytes("previous_secret_sealed")),
            ("endpoints", optional_integer("previous_secret_until_ms")),
        ] {
            // SQLite adds one column at a time.
            manager.alter_table(Table::alter().table(table).add_column(column).take()).await?;
        }
        manager.create_table(watchers()).await?;
        let by_arrival = Index::create().name("events_by_arrival").table("events").col("team_id").col("mode").take();
        manager.create_index(by_arrival.clone().col("product_id").col("created_at_ms").take()).await?;
        manager.drop_index(Index::drop().name("events_by_owner").table("events").to_owned()).await?;
        for index in [
            "CREATE INDEX deliveries_failed ON deliveries (endpoint_id, finished_at_ms, id) WHERE status = 'failed'",
            "CREATE INDEX endpoints_rotated ON endpoints (previous_secret_until_ms) \
             WHERE previous_secret_until_ms IS NOT NULL",
        ] {
            manager.get_connection().execute_unprepared(index).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let by_owner = Index::create().name("events_by_owner").table("events").col("team_id").col("mode").take();
        manager.create_index(by_owner.clone().col("product_id").take()).await?;
        for (index, table) in
            [("events_by_arrival", "events"), ("deliveries_failed", "deliveries"), ("endpoints_rotated", "endpoints")]
        {
            manager.drop_index(Index::drop().name(index).table(table).to_owned()).await?;
        }
        manager.drop_table(Table::drop().table("watchers").to_owned()).await?;
        for (table, column) in [
            ("endpoints", "previous_secret_until_ms"),
            ("endpoints", "previous_secret_sealed"),
            ("deliveries", "replayed_after"),
        ] {
            manager.alter_table(Table::alter().table(table).drop_column(column).take()).await?;
        }
        Ok(())
    }
}

/// An index over the endpoints that are paused, which are few and are counted. On PostgreSQL it is built while others
/// write, which no transaction can do; what a migrator that died has left is built anew.
struct Paused;

impl MigrationName for Paused {
    fn name(&self) -> &'static str {
        "webhook_0004_paused"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Paused {
    fn use_transaction(&self) -> Option<bool> {
        Some(false)
    }

    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        self.down(manager).await?;
        let index =
            format!("CREATE INDEX {}endpoints_paused ON endpoints (id) WHERE status = 'paused'", concurrently(manager));
        manager.get_connection().execute_unprepared(&index).await?;
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let index = format!("DROP INDEX {}IF EXISTS endpoints_paused", concurrently(manager));
        manager.get_connection().execute_unprepared(&index).await?;
        Ok(())
    }
}

/// The trace in which an event happened, where it is recorded: what is sent of it, however late, is a part of that.
struct Traces;

impl MigrationName for Traces {
    fn name(&self) -> &'static str {
        "webhook_0005_traces"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Traces {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let add = Table::alter().table("events").add_column(optional_text("traceparent")).take();
        manager.alter_table(add).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.alter_table(Table::alter().table("events").drop_column("traceparent").take()).await
    }
}

/// Who watches the events of a product, or of a team, and until when: what is watched is kept though nobody subscribes
/// to it, in whichever process it arrives. Who has ended counts no more; what happens until then is kept for whoever asks
/// again.
fn watchers() -> TableCreateStatement {
    Table::create()
        .table("watchers")
        .col(text("id").primary_key())
        .col(text("team_id"))
        .col(text("mode"))
        .col(text("product_id"))
        .col(integer("until_ms"))
        .col(optional_integer("ended_at_ms"))
        .take()
}

/// What is known of a product: a row to lock while its endpoints are counted, and its tombstone.
fn products() -> TableCreateStatement {
    Table::create()
        .table("products")
        .col(text("id").primary_key())
        .col(text("team_id"))
        .col(text("mode"))
        .col(optional_integer("deleted_at_ms"))
        .take()
}

fn endpoints() -> TableCreateStatement {
    Table::create()
        .table("endpoints")
        .col(text("id").primary_key())
        .col(text("team_id"))
        .col(text("mode"))
        .col(text("product_id"))
        .col(text("url"))
        .col(text("events"))
        .col(bytes("secret_sealed"))
        .col(text("status"))
        .col(integer("consecutive_failures"))
        .col(integer("created_at_ms"))
        .col(integer("updated_at_ms"))
        .take()
}

fn events() -> TableCreateStatement {
    Table::create()
        .table("events")
        .col(text("id").primary_key())
        .col(text("team_id"))
        .col(text("mode"))
        .col(text("product_id"))
        .col(text("topic"))
        .col(bytes("body_sealed"))
        .col(integer("created_at_ms"))
        .take()
}

fn deliveries() -> TableCreateStatement {
    Table::create()
        .table("deliveries")
        .col(text("id").primary_key())
        .col(text("endpoint_id"))
        .col(text("event_id"))
        .col(text("team_id"))
        .col(text("mode"))
        .col(text("topic"))
        .col(text("status"))
        .col(integer("attempts"))
        .col(integer("due_at_ms"))
        .col(optional_text("claimed_by"))
        .col(optional_integer("next_attempt_at_ms"))
        .col(optional_integer("response_status"))
        .col(optional_integer("duration_ms"))
        .col(optional_text("error"))
        .col(integer("created_at_ms"))
        .col(optional_integer("last_attempt_at_ms"))
        .col(optional_integer("finished_at_ms"))
        .take()
}

fn attempts() -> TableCreateStatement {
    Table::create()
        .table("attempts")
        .col(text("delivery_id"))
        .col(integer("number"))
        .col(integer("at_ms"))
        .col(integer("duration_ms"))
        .col(optional_integer("response_status"))
        .col(optional_text("error"))
        .col(optional_text("snippet"))
        .primary_key(Index::create().col("delivery_id").col("number"))
        .take()
}

fn indexes() -> [IndexCreateStatement; 4] {
    [
        Index::create().name("endpoints_by_product").table("endpoints").col("product_id").col("id").take(),
        Index::create().name("events_by_product").table("events").col("product_id").take(),
        Index::create().name("deliveries_by_endpoint").table("deliveries").col("endpoint_id").col("id").take(),
        Index::create().name("deliveries_by_event").table("deliveries").col("event_id").take(),
    ]
}
