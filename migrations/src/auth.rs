//! The schema of the auth service: accounts, teams, and every credential.
//!
//! Of a token only its keyed hash is kept, and of a password only its Argon2id hash. A look-up of a credential is one
//! look-up in a unique index. Deliberately absent: foreign keys, since what is deleted here is deleted by marking it.

use sea_orm_migration::{
    MigrationName, MigrationTrait, MigratorTrait, SchemaManager, async_trait,
    sea_orm::{ConnectionTrait as _, DbErr},
    sea_query::{Index, IndexCreateStatement, Table, TableCreateStatement},
};

use crate::{
    columns::{boolean, bytes, integer, optional_integer, optional_text, text},
    kit,
};

/// All migrations of the auth service, in their order.
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
        "auth_0001_tables"
    }
}

const TABLES: [&str; 6] = ["users", "teams", "memberships", "keys", "product_registry", "product_keys"];

#[async_trait::async_trait]
impl MigrationTrait for Tables {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in [users(), teams(), memberships(), keys(), product_registry(), product_keys()] {
            manager.create_table(table).await?;
        }
        for index in indexes() {
            manager.create_index(index).await?;
        }
        // The installation has one system key at a time, however many processes start first.
        manager
            .get_connection()
            .execute_unprepared(
                "CREATE UNIQUE INDEX keys_one_system ON keys (kind) \
                 WHERE kind = 'system' AND revoked_at_ms IS NULL",
            )
            .await?;
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in TABLES.into_iter().rev() {
            manager.drop_table(Table::drop().table(table).take()).await?;
        }
        Ok(())
    }
}

fn users() -> TableCreateStatement {
    Table::create()
        .table("users")
        .col(text("id").primary_key())
        .col(text("email_lower").unique_key())
        .col(text("email"))
        .col(optional_text("name"))
        .col(text("password_hash"))
        .col(integer("session_epoch"))
        .col(integer("created_at_ms"))
        .take()
}

fn teams() -> TableCreateStatement {
    Table::create()
        .table("teams")
        .col(text("id").primary_key())
        .col(text("name"))
        .col(text("tier"))
        .col(boolean("sandbox"))
        .col(integer("created_at_ms"))
        .take()
}

fn memberships() -> TableCreateStatement {
    Table::create()
        .table("memberships")
        .col(text("team_id"))
        .col(text("user_id"))
        .col(text("role"))
        .col(integer("created_at_ms"))
        .primary_key(Index::create().col("team_id").col("user_id"))
        .take()
}

/// Every kind of key that is one token. The system key has no team; keys of a team may have no user.
fn keys() -> TableCreateStatement {
    Table::create()
        .table("keys")
        .col(text("id").primary_key())
        .col(text("kind"))
        .col(optional_text("team_id"))
        .col(text("mode"))
        .col(optional_text("user_id"))
        .col(optional_text("created_by"))
        .col(text("name"))
        .col(bytes("token_hash").unique_key())
        .col(text("shown_prefix"))
        .col(text("scopes"))
        .col(boolean("read_only"))
        .col(optional_text("allowlist"))
        .col(boolean("enabled"))
        .col(optional_integer("expires_at_ms"))
        .col(integer("created_at_ms"))
        .col(optional_integer("revoked_at_ms"))
        .col(optional_text("revoked_by"))
        .take()
}

/// What auth knows of products: that they are there, and whose. Its row is the lock under which pairs are counted.
fn product_registry() -> TableCreateStatement {
    Table::create()
        .table("product_registry")
        .col(text("product_id").primary_key())
        .col(text("team_id"))
        .col(text("mode"))
        .col(boolean("deleted"))
        .take()
}

fn product_keys() -> TableCreateStatement {
    Table::create()
        .table("product_keys")
        .col(text("id").primary_key())
        .col(text("team_id"))
        .col(text("mode"))
        .col(text("product_id"))
        .col(text("public_key"))
        .col(bytes("public_hash").unique_key())
        .col(bytes("secret_hash").unique_key())
        .col(text("secret_prefix"))
        .col(integer("created_at_ms"))
        .col(optional_integer("revoked_at_ms"))
        .col(optional_text("revoked_by"))
        .take()
}

fn indexes() -> [IndexCreateStatement; 3] {
    [
        Index::create().name("memberships_by_user").table("memberships").col("user_id").take(),
        Index::create().name("keys_by_team").table("keys").col("team_id").col("id").take(),
        Index::create()
            .name("product_keys_by_product")
            .table("product_keys")
            .col("team_id")
            .col("mode")
            .col("product_id")
            .col("id")
            .take(),
    ]
}
