//! The schema of the catalog service: products.
//!
//! Deliberately absent: a mark for deleted products. The row goes, and the event that commits with it tells the others.

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
