//! The schema of the licensing service: licences, their activations, and the products and clients they are
//! for.
//!
//! The count of activations stands in the licence's own row: that row is the lock under which slots are taken, on
//! both engines. Deliberately absent: foreign keys, since a product's licences are deleted in bounded batches.

use sea_orm_migration::{
    MigrationName, MigrationTrait, MigratorTrait, SchemaManager, async_trait,
    sea_orm::{ConnectionTrait as _, DbBackend, DbErr},
    sea_query::{Index, IndexCreateStatement, Table, TableCreateStatement},
};

use crate::{
    columns::{bytes, integer, optional_integer, optional_text, text},
    indexes::concurrently,
    kit,
};

/// All migrations of the licensing service, in their order.
#[derive(Clone, Copy, Debug)]
pub struct Migrator;

impl MigratorTrait for Migrator {
    fn migrations() -> Vec<Box<dyn MigrationTrait>> {
        let mut all = kit::migrations();
        all.push(Box::new(Tables));
        all.push(Box::new(Clients));
        all.push(Box::new(Statuses));
        all.push(Box::new(Machines));
        all
    }
}

struct Tables;

impl MigrationName for Tables {
    fn name(&self) -> &'static str {
        "licensing_0001_tables"
    }
}

const TABLES: [&str; 3] = ["licenses", "activations", "products"];

#[async_trait::async_trait]
impl MigrationTrait for Tables {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        for table in [licenses(), activations(), products()] {
            manager.create_table(table).await?;
        }
        for index in indexes() {
            manager.create_index(index).await?;
        }
        let connection = manager.get_connection();
        // A prefix of an email address is looked up here. PostgreSQL uses an index for that only if it sorts by bytes.
        let by_bytes = match manager.get_database_backend() {
            DbBackend::Postgres => " text_pattern_ops",
            _ => "",
        };
        connection
            .execute_unprepared(&format!(
                "CREATE INDEX licenses_by_email ON licenses (team_id, mode, email_lower{by_bytes}, id)"
            ))
            .await?;
        // Partial, so that the sweep costs what is due and not what there is.
        connection
            .execute_unprepared(
                "CREATE INDEX licenses_due ON licenses (expires_at_ms) WHERE expires_at_ms IS NOT NULL \
                 AND expired_event_at_ms IS NULL AND revoked_at_ms IS NULL",
            )
            .await?;
        connection
            .execute_unprepared(
                "CREATE INDEX licenses_revoked ON licenses (team_id, mode, id) WHERE revoked_at_ms IS NOT NULL",
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

struct Clients;

impl MigrationName for Clients {
    fn name(&self) -> &'static str {
        "licensing_0002_clients"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Clients {
    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.create_table(clients()).await?;
        // So that what is known of products goes with their team.
        let team_id = text("team_id").default("").take();
        manager.alter_table(Table::alter().table("products").add_column(team_id).take()).await?;
        manager
            .get_connection()
            .execute_unprepared(
                "UPDATE products SET team_id = found.team_id FROM (SELECT product_id, MIN(team_id) AS team_id \
                 FROM licenses GROUP BY product_id) AS found WHERE found.product_id = products.id",
            )
            .await?;
        for table in ["products", "clients"] {
            let by_team = Index::create().name(format!("{table}_by_team")).table(table).col("team_id").take();
            manager.create_index(by_team).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        manager.drop_index(Index::drop().name("products_by_team").table("products").to_owned()).await?;
        manager.alter_table(Table::alter().table("products").drop_column("team_id").take()).await?;
        manager.drop_table(Table::drop().table("clients").take()).await
    }
}

/// So that licences of one status are found however few they are among millions. Whether one has expired follows from
/// the clock; whether that was told stands in the row, and the two differ for those that are due only.
///
/// And so that PostgreSQL walks the index of a tenant, never that of all ids: the one looks cheaper to it as long as it
/// believes that a tenant's licences are spread evenly among all others, and may then pass millions of these. So the
/// indexes of lists sort ids by bytes there, lists ask for that order, and the primary key does not have it.
///
/// Nothing is taken away: the indexes of before are what the release before walks. On PostgreSQL none keeps anybody from
/// writing while it is built, which cannot be within a transaction; so whatever a migrator that died has left is built
/// anew.
struct Statuses;

impl MigrationName for Statuses {
    fn name(&self) -> &'static str {
        "licensing_0003_statuses"
    }
}

/// Each with its columns before the id, and which rows it has.
const STATUS_INDEXES: [(&str, &str, &str); 5] = [
    ("licenses_active", "", "expired_event_at_ms IS NULL AND revoked_at_ms IS NULL"),
    ("licenses_active_by_product", "product_id, ", "expired_event_at_ms IS NULL AND revoked_at_ms IS NULL"),
    ("licenses_expired", "", "expired_event_at_ms IS NOT NULL AND revoked_at_ms IS NULL"),
    ("licenses_expired_by_product", "product_id, ", "expired_event_at_ms IS NOT NULL AND revoked_at_ms IS NULL"),
    ("licenses_revoked_by_product", "product_id, ", "revoked_at_ms IS NOT NULL"),
];

/// What the clock and the rows disagree about: due and not told; told, and not over since the clock was set back.
const EXPIRY_INDEXES: [(&str, &str); 2] = [
    ("licenses_due_by_tenant", "expires_at_ms IS NOT NULL AND expired_event_at_ms IS NULL AND revoked_at_ms IS NULL"),
    ("licenses_early", "expired_event_at_ms IS NOT NULL AND revoked_at_ms IS NULL"),
];

/// The indexes of lists that were there before, once more and sorted by bytes: their columns before the id, and which
/// rows they have.
const LIST_INDEXES: [(&str, &str, &str); 5] = [
    ("licenses_by_tenant_in_bytes", "", ""),
    ("licenses_by_product_in_bytes", "product_id, ", ""),
    ("licenses_by_client_in_bytes", "client_id, ", ""),
    ("licenses_by_email_in_bytes", "email_lower text_pattern_ops, ", ""),
    ("licenses_revoked_in_bytes", "", "revoked_at_ms IS NOT NULL"),
];

/// Name, columns and rows of each index that an engine gets.
fn status_indexes(backend: DbBackend) -> Vec<(&'static str, String, &'static str)> {
    let (id, lists) = match backend {
        DbBackend::Postgres => ("id COLLATE \"C\"", LIST_INDEXES.as_slice()),
        // Sorts by bytes always.
        _ => ("id", [].as_slice()),
    };
    let by_id =
        lists.iter().chain(&STATUS_INDEXES).map(|(name, columns, rows)| (*name, format!("{columns}{id}"), *rows));
    by_id.chain(EXPIRY_INDEXES.map(|(name, rows)| (name, "expires_at_ms".to_owned(), rows))).collect()
}

#[async_trait::async_trait]
impl MigrationTrait for Statuses {
    fn use_transaction(&self) -> Option<bool> {
        Some(false)
    }

    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        // One that was not built to its end has its name, and is of no use.
        self.down(manager).await?;
        let (connection, backend) = (manager.get_connection(), manager.get_database_backend());
        let concurrently = concurrently(manager);
        for (name, columns, rows) in status_indexes(backend) {
            let rows = if rows.is_empty() { String::new() } else { format!(" WHERE {rows}") };
            let create = format!("CREATE INDEX {concurrently}{name} ON licenses (team_id, mode, {columns}){rows}");
            connection.execute_unprepared(&create).await?;
        }
        Ok(())
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        let (connection, backend) = (manager.get_connection(), manager.get_database_backend());
        let concurrently = concurrently(manager);
        for (name, ..) in status_indexes(backend) {
            connection.execute_unprepared(&format!("DROP INDEX {concurrently}IF EXISTS {name}")).await?;
        }
        Ok(())
    }
}

/// So that one machine of a licence is found by its fingerprint alone. The index by which all of them are listed began
/// with the licence itself; where most licences have one machine that looked as cheap to PostgreSQL as the unique index,
/// and of a licence with a hundred thousand all were read for each call. The new one serves whoever asks as it is written.
struct Machines;

impl MigrationName for Machines {
    fn name(&self) -> &'static str {
        "licensing_0004_machines"
    }
}

#[async_trait::async_trait]
impl MigrationTrait for Machines {
    fn use_transaction(&self) -> Option<bool> {
        Some(false)
    }

    async fn up(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        replace(manager, "activations_by_license", "activations_listed", "(license_id || '')").await
    }

    async fn down(&self, manager: &SchemaManager) -> Result<(), DbErr> {
        replace(manager, "activations_listed", "activations_by_license", "license_id").await
    }
}

/// Puts one index of activations in the place of another. There is one of them at any time.
async fn replace(manager: &SchemaManager<'_>, old: &str, new: &str, license: &str) -> Result<(), DbErr> {
    let concurrently = concurrently(manager);
    for sql in [
        // One that was not built to its end has its name, and is of no use.
        format!("DROP INDEX {concurrently}IF EXISTS {new}"),
        format!("CREATE INDEX {concurrently}{new} ON activations ({license}, id)"),
        format!("DROP INDEX {concurrently}IF EXISTS {old}"),
    ] {
        manager.get_connection().execute_unprepared(&sql).await?;
    }
    Ok(())
}

/// The clients that licences name. A row is the lock that keeps a licence from naming a client that is being deleted,
/// and stays behind as the tombstone.
fn clients() -> TableCreateStatement {
    Table::create()
        .table("clients")
        .col(text("id").primary_key())
        .col(text("team_id"))
        .col(text("mode"))
        .col(optional_integer("deleted_at_ms"))
        .take()
}

fn licenses() -> TableCreateStatement {
    Table::create()
        .table("licenses")
        .col(text("id").primary_key())
        .col(text("team_id"))
        .col(text("mode"))
        .col(text("product_id"))
        .col(bytes("key_hash").unique_key())
        .col(bytes("key_sealed"))
        .col(optional_text("email"))
        .col(optional_text("email_lower"))
        .col(optional_text("client_id"))
        .col(optional_integer("max_activations"))
        .col(integer("activations_count"))
        .col(optional_integer("expires_at_ms"))
        .col(optional_integer("expired_event_at_ms"))
        .col(optional_text("metadata"))
        .col(integer("created_at_ms"))
        .col(integer("updated_at_ms"))
        .col(optional_integer("revoked_at_ms"))
        .take()
}

fn activations() -> TableCreateStatement {
    Table::create()
        .table("activations")
        .col(text("id").primary_key())
        .col(text("license_id"))
        .col(text("fingerprint"))
        .col(optional_text("name"))
        .col(integer("created_at_ms"))
        .col(integer("last_check_at_ms"))
        .take()
}

/// The products that licences were made for. A row is the lock that keeps a licence from being made for a product that
/// is being deleted, and stays behind as the tombstone.
fn products() -> TableCreateStatement {
    Table::create().table("products").col(text("id").primary_key()).col(optional_integer("deleted_at_ms")).take()
}

fn indexes() -> [IndexCreateStatement; 5] {
    let licenses = |name| Index::create().name(name).table("licenses").col("team_id").col("mode").take();
    let activations = |name| Index::create().name(name).table("activations").col("license_id").take();
    [
        licenses("licenses_by_tenant").col("id").take(),
        licenses("licenses_by_product").col("product_id").col("id").take(),
        licenses("licenses_by_client").col("client_id").col("id").take(),
        activations("activations_by_fingerprint").col("fingerprint").unique().take(),
        activations("activations_by_license").col("id").take(),
    ]
}
