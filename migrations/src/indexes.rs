//! How indexes are made where others work.

use sea_orm_migration::{SchemaManager, sea_orm::DbBackend};

/// What stands after `INDEX` where nobody is to be kept from writing meanwhile, which no transaction can do. SQLite has one
/// writer.
pub(crate) fn concurrently(manager: &SchemaManager) -> &'static str {
    match manager.get_database_backend() {
        DbBackend::Postgres => "CONCURRENTLY ",
        _ => "",
    }
}
