//! The tables that the storage layer itself needs in every service's database:
//! outbox, audit entries, stored answers, leases, and the feed of changes.

use sea_orm_migration::{
    MigrationName, MigrationTrait, MigratorTrait, SchemaManager, async_trait,
    sea_orm::{ConnectionTrait as _, DbBackend, DbErr},
    sea_query::{Index, IndexCreateStatement, Table, TableCreateStatement},
};

use crate::columns::{bytes, integer, numbered, optional_text, text};

/// The migrations with which every service's list begins.
pub fn migrations() -> Vec<Box<dyn MigrationTrait>> {
    vec![Box::new(Tables), Box::new(Audit), Box::new(KeptKeys), Box::new(WaitingAudit)]
}

/// Only these tables: for tests of the storage layer.
#[derive(Clone, Copy, Debug)]
pub struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        migrations()
    }
}

struct Tables;

impl MigrationName for Tables {
    fn name(&self) -> &'static str {
        "kit_0001_tables"
    }
}

const TABLES: [&str; 6] = ["outbox", "audit_entries", "idempotency", "leases", "change_counter", "changes"];

#[async_trait::async_trait]
impl MigrationTrait for Tables {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in [outbox(), audit_entries(), idempotency(), leases(), change_counter(), changes()] {
            manager.create_table(table).await?;
        }
        for index in indexes() {
            manager.create_index(index).await?;
        }
        // The one row whose lock orders all changes.
        manager
            .get_connection()
            .execute_unprepared("INSERT INTO change_counter (id, seq, pruned_seq) VALUES (1, 0, 0)")
            .await?;
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in TABLES.into_iter().rev() {
            manager.drop_table(Table::drop().table(table).to_owned()).await?;
        }
        Ok(())
    }
}

/// Whose log an audit entry belongs to, what its actor is called, and the batch in which it goes to auth.
struct Audit;

impl MigrationName for Audit {
    fn name(&self) -> &'static str {
        "kit_0002_audit"
    }
}

const AUDIT_COLUMNS: [&str; 3] = ["team_id", "actor_name", "batch"];

#[async_trait::async_trait]
impl MigrationTrait for Audit {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for column in AUDIT_COLUMNS {
            // SQLite adds one column at a time.
            let add = Table::alter().table("audit_entries").add_column(optional_text(column)).take();
            manager.alter_table(add).await?;
        }
        let by_batch = Index::create().name("audit_entries_by_batch").table("audit_entries").col("batch").take();
        manager.create_index(by_batch).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.get_connection().execute_unprepared("DROP INDEX audit_entries_by_batch").await?;
        for column in AUDIT_COLUMNS.into_iter().rev() {
            manager.alter_table(Table::alter().table("audit_entries").drop_column(column).take()).await?;
        }
        Ok(())
    }
}

/// Keys that outlive a change of the master key, since what was hashed with them is not hashed anew. Sealed.
struct KeptKeys;

impl MigrationName for KeptKeys {
    fn name(&self) -> &'static str {
        "kit_0003_kept_keys"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for KeptKeys {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let mut table = Table::create().table("kept_keys").col(text("name").primary_key()).col(bytes("sealed")).take();
        // It stays where this is taken back.
        manager.create_table(table.if_not_exists().to_owned()).await
    }

    /// What is kept cannot be derived again once the master key has changed, and the release before does not mind it.
    async fn down(&self, _manager: &SchemaManager) -> Result<(), DbErr> {
        Ok(())
    }
}

/// So that the oldest entries that wait for auth are found however many wait. SQLite has the number of a row in each of
/// its indexes, and needs no other. On PostgreSQL it is built while others write, which cannot be within a transaction; so
/// what a migrator that died has left is built anew.
struct WaitingAudit;

impl MigrationName for WaitingAudit {
    fn name(&self) -> &'static str {
        "kit_0004_waiting_audit"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for WaitingAudit {
    fn use_transaction(&self) -> Option<bool> {
        Some(false)
    }

    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        self.down(manager).await?;
        if manager.get_database_backend() == DbBackend::Postgres {
            let create = "CREATE INDEX CONCURRENTLY audit_entries_waiting ON audit_entries (id) WHERE batch IS NULL";
            manager.get_connection().execute_unprepared(create).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        if manager.get_database_backend() == DbBackend::Postgres {
            let drop = "DROP INDEX CONCURRENTLY IF EXISTS audit_entries_waiting";
            manager.get_connection().execute_unprepared(drop).await?;
        }
        Ok(())
    }
}

fn outbox() -> TableCreateStatement {
    Table::create()
        .table("outbox")
        .col(numbered("seq"))
        .col(text("target"))
        .col(text("id"))
        .col(text("topic"))
        .col(text("team_id"))
        .col(bytes("payload"))
        .col(integer("created_at_ms"))
        .take()
}

fn audit_entries() -> TableCreateStatement {
    Table::create()
        .table("audit_entries")
        .col(numbered("id"))
        .col(integer("at_ms"))
        .col(text("actor_kind"))
        .col(text("actor_id"))
        .col(text("action"))
        .col(text("resources"))
        .col(text("request_id"))
        .take()
}

fn idempotency() -> TableCreateStatement {
    Table::create()
        .table("idempotency")
        .col(bytes("key_hash").primary_key())
        .col(bytes("request_hash"))
        .col(bytes("sealed_response"))
        .col(integer("expires_at_ms"))
        .take()
}

fn leases() -> TableCreateStatement {
    Table::create().table("leases").col(text("name").primary_key()).col(text("holder")).col(integer("until_ms")).take()
}

fn change_counter() -> TableCreateStatement {
    Table::create()
        .table("change_counter")
        .col(integer("id").primary_key())
        .col(integer("seq"))
        .col(integer("pruned_seq"))
        .take()
}

fn changes() -> TableCreateStatement {
    Table::create().table("changes").col(integer("seq").primary_key()).col(text("subject")).col(integer("at_ms")).take()
}

fn indexes() -> [IndexCreateStatement; 2] {
    [
        Index::create().name("outbox_by_target").table("outbox").col("target").col("seq").take(),
        Index::create().name("idempotency_by_expiry").table("idempotency").col("expires_at_ms").take(),
    ]
}
