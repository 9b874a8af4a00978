//! What a database has for its tables, as the engine itself tells: so that what a release changes can be judged.
//!
//! A migration only expands: the release before goes on working on what it leaves. So nothing that was there may go or be
//! called otherwise, nothing may become stricter, and what is new in an old table must do without being written.
//!
//! Deliberately absent: what data a migration changes. That the release before works on it is tried, not read.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use rusqlite::{Connection, OpenFlags};
use sea_orm::{ConnectOptions, ConnectionTrait as _, Database, DbBackend, DbErr, Statement};
use tempfile::TempDir;

use crate::{database::PostgresDatabase, installation::SERVICES, process};

/// A column, as far as those who write to it have to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    /// Its type, in the words of the engine.
    pub kind: String,
    /// Whether it takes no nulls.
    pub required: bool,
    /// Whether it is written where nobody says what.
    pub defaulted: bool,
}

/// A table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// By name.
    pub columns: BTreeMap<String, Column>,
    /// What refuses rows: unique indexes, references, checks. In words that are the same for the same.
    pub rules: BTreeSet<String>,
}

/// All tables, by `service.table`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Schema(pub BTreeMap<String, Table>);

impl Schema {
    /// What a binary makes on SQLite.
    pub async fn on_sqlite(binary: &Path) -> Self {
        let folder = TempDir::with_prefix("paperkey-schema-").expect("a temporary folder can be made");
        let data = folder.path().to_str().expect("temporary folders have plain names");
        let command = process::command_of(binary, &["migrate", "up", "--data", data], &[], folder.path());
        process::run(command, "").await.succeeded();
        let mut tables = BTreeMap::new();
        for service in SERVICES {
            let path = folder.path().join(format!("{service}.db"));
            read_sqlite(&path, service, &mut tables)
                .unwrap_or_else(|error| panic!("{service} cannot be read: {error}"));
        }
        Self(tables)
    }

    /// What a binary makes on PostgreSQL; `None` where there is none.
    pub async fn on_postgres(binary: &Path) -> Option<Self> {
        let database = PostgresDatabase::create().await?;
        let folder = TempDir::with_prefix("paperkey-schema-").expect("a temporary folder can be made");
        let key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
        let mut environment = vec![("PAPERKEY__DATABASE__URL".to_owned(), database.url())];
        for name in ["MASTER_KEY", "PEPPER", "SIGNING_KEY"] {
            environment.push((format!("PAPERKEY__SECRETS__{name}"), key.to_owned()));
        }
        let command = process::command_of(binary, &["migrate", "up"], &environment, folder.path());
        process::run(command, "").await.succeeded();
        let read = read_postgres(&database.url()).await;
        Some(Self(read.unwrap_or_else(|error| panic!("the tables cannot be read: {error}"))))
    }

    /// What of this schema's release does not go on working on a later one, a sentence each.
    pub fn broken_by(&self, later: &Self) -> Vec<String> {
        let mut broken = Vec::new();
        for (name, table) in &self.0 {
            let Some(after) = later.0.get(name) else {
                broken.push(format!("the table {name} is gone"));
                continue;
            };
            for (column, before) in &table.columns {
                let is = |what: &str| format!("the column {name}.{column} {what}");
                let Some(after) = after.columns.get(column) else {
                    broken.push(is("is gone"));
                    continue;
                };
                if after.kind != before.kind {
                    broken.push(is(&format!("was {} and is {}", before.kind, after.kind)));
                }
                if after.required && !before.required {
                    broken.push(is("took nulls and does no longer"));
                }
                if !after.required && before.required {
                    broken.push(is("took no nulls and does now, which who reads it does not know"));
                }
                if before.defaulted && !after.defaulted {
                    broken.push(is("had a default and has none"));
                }
            }
            for (column, new) in &after.columns {
                if !table.columns.contains_key(column) && new.required && !new.defaulted {
                    broken
                        .push(format!("the new column {name}.{column} has to be written, by whoever does not know it"));
                }
            }
            for rule in after.rules.difference(&table.rules) {
                broken.push(format!("{name} has a rule that it had not: {rule}"));
            }
            for rule in table.rules.difference(&after.rules) {
                broken.push(format!("{name} has no longer the rule that a statement may name: {rule}"));
            }
        }
        broken
    }
}

fn read_sqlite(path: &Path, service: &str, tables: &mut BTreeMap<String, Table>) -> rusqlite::Result<()> {
    let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let list = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite_%'";
    let names: Vec<String> = connection.prepare(list)?.query_map([], |row| row.get(0))?.collect::<Result<_, _>>()?;
    for name in names {
        let mut table = Table::default();
        let mut columns =
            connection.prepare("SELECT name, type, \"notnull\", dflt_value, pk FROM pragma_table_info(?1)")?;
        let mut rows = columns.query([&name])?;
        while let Some(row) = rows.next()? {
            let (default, key): (Option<String>, i64) = (row.get(3)?, row.get(4)?);
            let kind: String = row.get(1)?;
            // The number of a row is made where it is not given.
            let numbered = key == 1 && kind.eq_ignore_ascii_case("integer");
            let column = Column { kind, required: row.get(2)?, defaulted: default.is_some() || numbered };
            table.columns.insert(row.get(0)?, column);
            if key > 0 {
                table.rules.insert(format!("primary key, {key}: {}", row.get::<_, String>(0)?));
            }
        }
        let unique = "SELECT l.name, coalesce(group_concat(i.name, ', '), ''), coalesce(s.sql, '') FROM pragma_index_list(?1) l \
                      JOIN pragma_index_info(l.name) i LEFT JOIN sqlite_schema s ON s.name = l.name \
                      WHERE l.\"unique\" = 1 GROUP BY l.name";
        let mut unique = connection.prepare(unique)?;
        let mut rows = unique.query([&name])?;
        while let Some(row) = rows.next()? {
            let (columns, sql): (String, String) = (row.get(1)?, row.get(2)?);
            let only = sql.split_once(" WHERE ").map(|(_, only)| format!(" where {only}")).unwrap_or_default();
            table.rules.insert(format!("unique ({columns}){only}"));
        }
        let mut keys = connection.prepare("SELECT \"from\", \"table\", \"to\" FROM pragma_foreign_key_list(?1)")?;
        let mut rows = keys.query([&name])?;
        while let Some(row) = rows.next()? {
            let (from, to, column): (String, String, Option<String>) = (row.get(0)?, row.get(1)?, row.get(2)?);
            table.rules.insert(format!("{from} refers to {to} ({})", column.unwrap_or_default()));
        }
        let sql = "SELECT sql FROM sqlite_schema WHERE name = ?1";
        let sql: String = connection.query_row(sql, [&name], |row| row.get(0))?;
        for check in sql.split("CHECK").skip(1) {
            table.rules.insert(format!("check {}", check.trim()));
        }
        tables.insert(format!("{service}.{name}"), table);
    }
    Ok(())
}

async fn read_postgres(url: &str) -> Result<BTreeMap<String, Table>, DbErr> {
    const COLUMNS: &str = "SELECT table_schema || '.' || table_name AS name, column_name::text AS part, data_type::text AS kind, \
         is_nullable = 'NO' AS required, (column_default IS NOT NULL OR is_identity = 'YES') AS defaulted \
         FROM information_schema.columns WHERE table_schema IN ('auth', 'catalog', 'licensing', 'webhook')";
    const RULES: &str = "SELECT n.nspname || '.' || c.relname AS name, \
           regexp_replace(pg_get_indexdef(i.indexrelid), '^.* USING ', 'unique ') AS part \
         FROM pg_index i JOIN pg_class c ON c.oid = i.indrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
         WHERE i.indisunique AND n.nspname IN ('auth', 'catalog', 'licensing', 'webhook') \
         UNION ALL SELECT n.nspname || '.' || c.relname, pg_get_constraintdef(k.oid) \
         FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid JOIN pg_namespace n ON n.oid = c.relnamespace \
         WHERE k.contype IN ('c', 'f', 'x') AND n.nspname IN ('auth', 'catalog', 'licensing', 'webhook')";
    let mut options = ConnectOptions::new(url);
    options.max_connections(1).sqlx_logging(false);
    let connection = Database::connect(options).await?;
    let ask = |sql: &str| Statement::from_string(DbBackend::Postgres, sql);
    let mut tables: BTreeMap<String, Table> = BTreeMap::new();
    for row in connection.query_all_raw(ask(COLUMNS)).await? {
        let column = Column {
            kind: row.try_get("", "kind")?,
            required: row.try_get("", "required")?,
            defaulted: row.try_get("", "defaulted")?,
        };
        let table = tables.entry(row.try_get("", "name")?).or_default();
        table.columns.insert(row.try_get("", "part")?, column);
    }
    for row in connection.query_all_raw(ask(RULES)).await? {
        let table = tables.entry(row.try_get("", "name")?).or_default();
        table.rules.insert(row.try_get("", "part")?);
    }
    connection.close().await?;
    Ok(tables)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn column(kind: &str, required: bool, defaulted: bool) -> Column {
        Column { kind: kind.to_owned(), required, defaulted }
    }

    fn schema(columns: &[(&str, Column)], rules: &[&str]) -> Schema {
        let columns = columns.iter().map(|(name, column)| ((*name).to_owned(), column.clone())).collect();
        let rules = rules.iter().map(|rule| (*rule).to_owned()).collect();
        Schema(BTreeMap::from([("auth.keys".to_owned(), Table { columns, rules })]))
    }

    #[test]
    fn what_expands_is_let_through_and_what_does_not_is_named() {
        let (id, name) = (("id", column("text", true, false)), ("name", column("text", false, false)));
        let before = schema(&[id.clone(), name.clone()], &["unique (id)"]);
        let breaks = |columns: &[(&str, Column)], rules: &[&str]| before.broken_by(&schema(columns, rules)).join("; ");

        let mut wider = schema(
            &[id.clone(), name.clone(), ("a", column("text", false, false)), ("b", column("bigint", true, true))],
            &["unique (id)"],
        );
        wider.0.insert("auth.more".to_owned(), Table::default());
        assert_eq!(before.broken_by(&wider), Vec::<String>::new());
        assert!(wider.broken_by(&before).contains(&"the table auth.more is gone".to_owned()));

        let same = &["unique (id)"];
        assert!(
            breaks(&[id.clone(), ("title", column("text", false, false))], same).contains("auth.keys.name is gone")
        );
        assert!(
            breaks(&[id.clone(), ("name", column("bigint", false, false))], same).contains("was text and is bigint")
        );
        assert!(breaks(&[id.clone(), ("name", column("text", true, false))], same).contains("took nulls"));
        let strict = [id.clone(), name.clone(), ("new", column("text", true, false))];
        assert!(breaks(&strict, same).contains("auth.keys.new has to be written"));
        assert!(
            breaks(&[id.clone(), name.clone()], &["unique (id)", "unique (name)"]).contains("had not: unique (name)")
        );
        assert!(breaks(&[id, name], &[]).contains("no longer the rule"));
    }
}
