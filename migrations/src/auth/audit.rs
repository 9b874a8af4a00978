//! The audit log: blocks of records, chained one to the next, and the head of that chain.
//!
//! A row holds up to a thousand compressed records of one team, since a row a call would cost too much. What a block is
//! found by stands in columns; all of it is covered by `seal`, and `mac` binds each block to the one before.

use sea_orm_migration::{
    MigrationName, MigrationTrait, SchemaManager, async_trait,
    sea_orm::{ConnectionTrait as _, DbErr},
    sea_query::{Index, Table, TableCreateStatement},
};

use crate::columns::{boolean, bytes, integer, numbered, optional_bytes, optional_integer, text};

pub(super) struct Audit;

impl MigrationName for Audit {
    fn name(&self) -> &'static str {
        "auth_0005_audit"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Audit {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(blocks()).await?;
        manager.create_table(head()).await?;
        // By its newest record: whoever reads backwards from a moment knows that what comes later in this order is older.
        let by_team = Index::create()
            .name("audit_blocks_by_team")
            .table("audit_blocks")
            .col("team_id")
            .col("changes")
            .col("last_ms")
            .take();
        manager.create_index(by_team).await?;
        manager
            .get_connection()
            .execute_unprepared("CREATE INDEX audit_blocks_unchained ON audit_blocks (seq) WHERE chain_no IS NULL")
            .await?;
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in ["audit_head", "audit_blocks"] {
            manager.drop_table(Table::drop().table(table).take()).await?;
        }
        Ok(())
    }
}

fn blocks() -> TableCreateStatement {
    Table::create()
        .table("audit_blocks")
        .col(numbered("seq"))
        .col(text("id").unique_key())
        .col(text("team_id"))
        .col(boolean("changes"))
        .col(integer("first_ms"))
        .col(integer("last_ms"))
        .col(integer("records"))
        .col(bytes("payload"))
        .col(bytes("seal"))
        .col(optional_integer("chain_no").unique_key())
        .col(optional_bytes("mac"))
        .take()
}

/// One row: the newest block of the chain, and the newest that was removed for its age, each with a signature.
fn head() -> TableCreateStatement {
    Table::create()
        .table("audit_head")
        .col(integer("id").primary_key())
        .col(integer("chain_no"))
        .col(bytes("mac"))
        .col(bytes("signature"))
        .col(integer("pruned_no"))
        .col(bytes("pruned_mac"))
        .col(bytes("pruned_signature"))
        .take()
}
