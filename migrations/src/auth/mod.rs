//! The schema of the auth service: accounts, teams, and every credential.
//!
//! Of a token only its keyed hash is kept, and of a password only its Argon2id hash. A look-up of a credential is one
//! look-up in a unique index. Deliberately absent: foreign keys, since what is deleted here is deleted by marking it.

mod alerts;
mod audit;
mod days;
mod quotas;
mod upkeep;

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
        all.push(Box::new(KeyLife));
        all.push(Box::new(People));
        all.push(Box::new(quotas::Quotas));
        all.push(Box::new(audit::Audit));
        all.push(Box::new(alerts::Alerts));
        all.push(Box::new(days::Days));
        all.push(Box::new(upkeep::Upkeep));
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

/// The whole life of keys: rotation, use, own limits, sandbox teams.
struct KeyLife;

impl MigrationName for KeyLife {
    fn name(&self) -> &'static str {
        "auth_0002_key_life"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for KeyLife {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let keys = [
            optional_text("created_by_name"),
            optional_text("revoked_by_name"),
            optional_text("superseded_by"),
            optional_text("replaces"),
            optional_integer("rotated_at_ms"),
            optional_integer("first_used_at_ms"),
            optional_integer("last_used_at_ms"),
            optional_integer("requests_per_minute"),
            optional_integer("rotate_every_days"),
            optional_integer("rotation_due_at_ms"),
            optional_integer("rotation_told_at_ms"),
            // Whether it took the place of a key that asked for it itself.
            boolean("self_rotated").default(false).take(),
            // The user who was shown its token.
            optional_text("given_to"),
            optional_integer("leak_told_at_ms"),
        ];
        for column in keys {
            manager.alter_table(Table::alter().table("keys").add_column(column).take()).await?;
        }
        let leak_told = Table::alter().table("product_keys").add_column(optional_integer("leak_told_at_ms")).take();
        manager.alter_table(leak_told).await?;
        let teams = [
            text("leak_action").default("revoke").take(),
            optional_integer("expires_at_ms"),
            optional_integer("deleted_at_ms"),
            optional_integer("requests_per_minute"),
            // Letters to people who are invited, and since when they are counted.
            optional_integer("invited_since_ms"),
            integer("invited_count").default(0_i64).take(),
        ];
        for column in teams {
            manager.alter_table(Table::alter().table("teams").add_column(column).take()).await?;
        }
        for (name, table, column) in
            [("keys_by_user", "keys", "user_id"), ("product_registry_by_team", "product_registry", "team_id")]
        {
            manager.create_index(Index::create().name(name).table(table).col(column).take()).await?;
        }
        for statement in [
            "DROP INDEX keys_one_system",
            // The old half of a rotated key lives on beside the new one.
            "CREATE UNIQUE INDEX keys_one_system ON keys (kind) \
             WHERE kind = 'system' AND revoked_at_ms IS NULL AND superseded_by IS NULL",
            // Those that were told of are out of it until they are due anew.
            "CREATE INDEX keys_by_rotation ON keys (rotation_due_at_ms) \
             WHERE rotation_due_at_ms IS NOT NULL AND rotation_told_at_ms IS NULL",
            "CREATE INDEX keys_by_revocation ON keys (revoked_at_ms) WHERE revoked_at_ms IS NOT NULL",
            "CREATE INDEX keys_by_expiry ON keys (expires_at_ms) WHERE expires_at_ms IS NOT NULL",
            "CREATE INDEX teams_by_expiry ON teams (expires_at_ms) WHERE expires_at_ms IS NOT NULL",
            "CREATE INDEX teams_by_deletion ON teams (deleted_at_ms) WHERE deleted_at_ms IS NOT NULL",
        ] {
            manager.get_connection().execute_unprepared(statement).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for index in [
            "teams_by_deletion",
            "teams_by_expiry",
            "keys_by_expiry",
            "keys_by_revocation",
            "keys_by_rotation",
            "product_registry_by_team",
            "keys_by_user",
            "keys_one_system",
        ] {
            manager.get_connection().execute_unprepared(&format!("DROP INDEX {index}")).await?;
        }
        let connection = manager.get_connection();
        // What the older schema cannot tell from a key that works on is closed.
        connection.execute_unprepared("DELETE FROM keys WHERE superseded_by IS NOT NULL").await?;
        let leak_told = Table::alter().table("product_keys").drop_column("leak_told_at_ms").take();
        manager.alter_table(leak_told).await?;
        for column in [
            "leak_action",
            "expires_at_ms",
            "deleted_at_ms",
            "requests_per_minute",
            "invited_since_ms",
            "invited_count",
        ] {
            manager.alter_table(Table::alter().table("teams").drop_column(column).take()).await?;
        }
        for column in [
            "created_by_name",
            "revoked_by_name",
            "superseded_by",
            "replaces",
            "rotated_at_ms",
            "first_used_at_ms",
            "last_used_at_ms",
            "requests_per_minute",
            "rotate_every_days",
            "rotation_due_at_ms",
            "rotation_told_at_ms",
            "self_rotated",
            "given_to",
            "leak_told_at_ms",
        ] {
            manager.alter_table(Table::alter().table("keys").drop_column(column).take()).await?;
        }
        connection
            .execute_unprepared(
                "CREATE UNIQUE INDEX keys_one_system ON keys (kind) \
                 WHERE kind = 'system' AND revoked_at_ms IS NULL",
            )
            .await?;
        Ok(())
    }
}

/// Invitations, resets of passwords, mail that waits to be sent, and failed logins.
struct People;

impl MigrationName for People {
    fn name(&self) -> &'static str {
        "auth_0003_people"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for People {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in [invitations(), password_resets(), mails(), login_failures()] {
            manager.create_table(table).await?;
        }
        for index in [
            Index::create()
                .name("invitations_by_email")
                .table("invitations")
                .col("team_id")
                .col("email_lower")
                .unique()
                .take(),
            Index::create().name("invitations_by_end").table("invitations").col("expires_at_ms").take(),
            Index::create().name("mails_by_due").table("mails").col("due_at_ms").take(),
            Index::create()
                .name("password_resets_by_user")
                .table("password_resets")
                .col("user_id")
                .col("created_at_ms")
                .take(),
            Index::create().name("password_resets_by_time").table("password_resets").col("created_at_ms").take(),
            Index::create().name("login_failures_by_time").table("login_failures").col("since_ms").take(),
        ] {
            manager.create_index(index).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in ["login_failures", "mails", "password_resets", "invitations"] {
            manager.drop_table(Table::drop().table(table).take()).await?;
        }
        Ok(())
    }
}

fn invitations() -> TableCreateStatement {
    Table::create()
        .table("invitations")
        .col(text("id").primary_key())
        .col(text("team_id"))
        .col(text("email_lower"))
        .col(text("email"))
        .col(text("role"))
        .col(bytes("token_hash").unique_key())
        .col(text("invited_by"))
        .col(integer("created_at_ms"))
        .col(integer("expires_at_ms"))
        .take()
}

/// A request for an address without an account is kept as well, with no user: both cost the same.
fn password_resets() -> TableCreateStatement {
    Table::create()
        .table("password_resets")
        .col(text("id").primary_key())
        .col(bytes("token_hash").unique_key())
        .col(optional_text("user_id"))
        .col(integer("created_at_ms"))
        .col(integer("expires_at_ms"))
        .col(optional_integer("mailed_at_ms"))
        .take()
}

/// Mail that waits to be sent. Sealed: it holds links that are as good as a password.
fn mails() -> TableCreateStatement {
    Table::create()
        .table("mails")
        .col(text("id").primary_key())
        .col(bytes("sealed"))
        .col(integer("attempts"))
        .col(integer("due_at_ms"))
        .col(integer("created_at_ms"))
        .take()
}

/// Of an address only its keyed hash: whether it has an account makes no difference here.
fn login_failures() -> TableCreateStatement {
    Table::create()
        .table("login_failures")
        .col(bytes("email_hash").primary_key())
        .col(integer("failures"))
        .col(integer("since_ms"))
        .take()
}
