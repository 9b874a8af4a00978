//! One statement: values bound natively, rows read back as sea-orm wants them.
//!
//! SQLite has no boolean and one integer, sea-orm insists on the exact type. The
//! rule of the house makes that unambiguous: an integer is `i64`, except where
//! the column was declared `boolean`. Values of other kinds (JSON, decimals,
//! times, UUIDs) are refused: they are text or `i64` by design.

use rusqlite::{CachedStatement, Connection, types::ValueRef};
use sea_orm::{ProxyExecResult, ProxyRow, Statement, Value};

use crate::db::DbError;

struct Column {
    name: String,
    boolean: bool,
}

fn prepare<'c>(connection: &'c Connection, statement: &Statement) -> Result<CachedStatement<'c>, DbError> {
    let mut prepared = connection.prepare_cached(&statement.sql)?;
    let values = statement.values.as_ref().map_or(&[][..], |values| &values.0);
    if prepared.parameter_count() != values.len() {
        return Err(DbError::internal(format!(
            "{} values for {} parameters",
            values.len(),
            prepared.parameter_count()
        )));
    }
    for (index, value) in (1..).zip(values) {
        bind(&mut prepared, index, value)?;
    }
    Ok(prepared)
}

fn bind(prepared: &mut CachedStatement<'_>, index: usize, value: &Value) -> Result<(), DbError> {
    let integer = match value {
        Value::Bool(value) => value.map(i64::from),
        Value::TinyInt(value) => value.map(i64::from),
        Value::SmallInt(value) => value.map(i64::from),
        Value::Int(value) => value.map(i64::from),
        Value::BigInt(value) => *value,
        Value::TinyUnsigned(value) => value.map(i64::from),
        Value::SmallUnsigned(value) => value.map(i64::from),
        Value::Unsigned(value) => value.map(i64::from),
        Value::BigUnsigned(value) => {
            value.map(i64::try_from).transpose().map_err(|_| DbError::internal("an unsigned value beyond i64"))?
        }
        Value::Float(value) => {
            return Ok(prepared.raw_bind_parameter(index, value.map(f64::from))?);
        }
        Value::Double(value) => return Ok(prepared.raw_bind_parameter(index, value)?),
        Value::String(value) => return Ok(prepared.raw_bind_parameter(index, value)?),
        Value::Char(value) => {
            return Ok(prepared.raw_bind_parameter(index, value.map(String::from))?);
        }
        Value::Bytes(value) => return Ok(prepared.raw_bind_parameter(index, value)?),
        _ => return Err(DbError::internal("a value of a kind the schema does not use")),
    };
    Ok(prepared.raw_bind_parameter(index, integer)?)
}

/// Runs a statement to its end and reports how many rows it changed.
pub(super) fn execute(connection: &Connection, statement: &Statement) -> Result<ProxyExecResult, DbError> {
    let mut prepared = prepare(connection, statement)?;
    let mut rows = prepared.raw_query();
    while rows.next()?.is_some() {}
    drop(rows);
    let last_id = u64::try_from(connection.last_insert_rowid()).unwrap_or_default();
    Ok(ProxyExecResult::new(last_id, connection.changes()))
}

/// Runs a statement and returns at most `limit` of its rows. What the statement
/// changes, it changes before its first row, so that a limit never leaves work
/// undone.
pub(super) fn query(connection: &Connection, statement: &Statement, limit: usize) -> Result<Vec<ProxyRow>, DbError> {
    let mut prepared = prepare(connection, statement)?;
    let columns: Vec<Column> = prepared
        .columns()
        .iter()
        .map(|column| Column {
            name: column.name().to_owned(),
            boolean: column.decl_type().is_some_and(|declared| declared.eq_ignore_ascii_case("boolean")),
        })
        .collect();
    let mut rows = prepared.raw_query();
    let mut found = Vec::new();
    while found.len() < limit {
        let Some(row) = rows.next()? else { break };
        let mut values = std::collections::BTreeMap::new();
        for (index, column) in columns.iter().enumerate() {
            let value = read(row.get_ref(index)?, column)?;
            values.insert(column.name.clone(), value);
        }
        found.push(ProxyRow::new(values));
    }
    Ok(found)
}

fn read(value: ValueRef<'_>, column: &Column) -> Result<Value, DbError> {
    Ok(match value {
        // Any empty variant reads as null, whatever type is asked for.
        ValueRef::Null => Value::String(None),
        ValueRef::Integer(integer) if column.boolean => Value::Bool(Some(integer != 0)),
        ValueRef::Integer(integer) => Value::BigInt(Some(integer)),
        ValueRef::Real(real) => Value::Double(Some(real)),
        ValueRef::Text(text) => match std::str::from_utf8(text) {
            Ok(text) => Value::String(Some(text.to_owned())),
            Err(_) => {
                return Err(DbError::internal(format!("column {} is not UTF-8", column.name)));
            }
        },
        ValueRef::Blob(blob) => Value::Bytes(Some(blob.to_vec())),
    })
}
