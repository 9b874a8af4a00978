//! The schema of the catalog service: products and clients.
//!
//! Deliberately absent: a mark for what was deleted. The row goes, and the event that commits with it tells the others.

use sea_orm_migration::{
    MigrationName, MigrationTrait, MigratorTrait, SchemaManager, async_trait,
    sea_orm::DbErr,
    sea_query::{Index, Table, TableCreateStatement},
};

use crate::{
    columns::{boolean, integer, optional_integer, optional_text, text},
    kit,
};

/// All migrations of the catalog service, in their order.
#[derive(Clone, Copy, Debug)]
pub struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        let mut all = kit::migrations();
        all.push(Box::new(Tables));
        all.push(Box::new(Clients));
        all
    }
}

struct Tables;

impl MigrationName for Tables {
    fn name(&self) -> &'static str {
        "catalog_0001_tables"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Tables {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(products()).await?;
        // The list of a tenant, newest first, and the look-up of one.
        let by_tenant = Index::create()
            .name("products_by_tenant")
            .table("products")
            .col("team_id")
            .col("mode")
            .col("id")
            .unique()
            .take();
        manager.create_index(by_tenant).await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.drop_table(Table::drop().table("products").take()).await
    }
}

struct Clients;

impl MigrationName for Clients {
    fn name(&self) -> &'static str {
        "catalog_0002_clients"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Clients {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(clients()).await?;
        manager.create_table(drafts()).await?;
        let clients = |name| Index::create().name(name).table("clients").col("team_id").col("mode").take();
        let drafts = |name| Index::create().name(name).table("drafts").take();
        for index in [
            clients("clients_by_tenant").col("id").unique().take(),
            clients("clients_by_email").col("email_lower").col("id").take(),
            drafts("drafts_by_age").col("created_at_ms").take(),
            drafts("drafts_by_team").col("team_id").take(),
        ] {
            manager.create_index(index).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in ["drafts", "clients"] {
            manager.drop_table(Table::drop().table(table).take()).await?;
        }
        Ok(())
    }
}

fn clients() -> TableCreateStatement {
    Table::create()
        .table("clients")
        .col(text("id").primary_key())
        .col(text("team_id"))
        .col(text("mode"))
        .col(text("name"))
        .col(optional_text("email"))
        .col(optional_text("email_lower"))
        .col(optional_text("company"))
        .col(optional_text("metadata"))
        .col(integer("created_at_ms"))
        .col(integer("updated_at_ms"))
        .take()
}

/// Products that are being made: their keys may be there already. One that is not completed is taken back.
fn drafts() -> TableCreateStatement {
    Table::create()
        .table("drafts")
        .col(text("id").primary_key())
        .col(text("team_id"))
        .col(text("mode"))
        .col(integer("created_at_ms"))
        .take()
}

fn products() -> TableCreateStatement {
    Table::create()
        .table("products")
        .col(text("id").primary_key())
        .col(text("team_id"))
        .col(text("mode"))
        .col(text("name"))
        .col(optional_text("description"))
        .col(optional_text("sku"))
        .col(optional_integer("price_amount"))
        .col(optional_text("price_currency"))
        .col(optional_text("unit"))
        .col(boolean("active"))
        .col(optional_text("metadata"))
        .col(integer("created_at_ms"))
        .col(integer("updated_at_ms"))
        .take()
}
