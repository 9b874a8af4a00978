//! What a database can refuse, in words that may be logged.
//!
//! Deliberately absent: SQL values. Nothing here prints a bound value, a row or
//! a connection string, because an error travels further than a query does.

use std::sync::Arc;

use sea_orm::{ConnAcquireErr, DbErr, RuntimeErr, SqlxError};

/// Why the storage layer could not do what it was asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DbError {
    /// A row with the same unique key exists.
    ///
    /// `constraint` is the constraint's name on PostgreSQL and `table.column`
    /// (several separated by commas) on SQLite.
    #[error("unique constraint violated: {constraint}")]
    UniqueViolation {
        /// Which constraint, as the engine names it.
        constraint: String,
    },
    /// Another constraint (foreign key, not null, check) refused the row.
    #[error("constraint violated: {constraint}")]
    ConstraintViolation {
        /// Which constraint, as the engine names it.
        constraint: String,
    },
    /// A row that had to be there is not.
    #[error("the expected row is missing")]
    NotFound,
    /// Too much work at once, or a conflict with another transaction: trying
    /// again is sound, because nothing of the job was kept.
    #[error("database busy: {0}")]
    Busy(String),
    /// So many jobs wait already that this one was not begun. It is not a fault that anybody should look into.
    #[error("database busy: too many jobs wait")]
    Overloaded,
    /// The database cannot be reached or cannot write. When this is the answer
    /// to a commit, whether it took place is unknown.
    #[error("database unavailable: {0}")]
    Unavailable(String),
    /// A defect: a statement that does not fit the schema, a job that panicked.
    #[error("database error: {0}")]
    Internal(String),
}

impl DbError {
    /// Whether a row with the same unique key exists already.
    pub fn is_unique_violation(&self) -> bool {
        matches!(self, Self::UniqueViolation { .. })
    }

    /// Whether doing the same again may succeed.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Busy(_) | Self::Overloaded)
    }

    pub(crate) fn busy(why: impl Into<String>) -> Self {
        Self::Busy(why.into())
    }

    pub(crate) fn unavailable(why: impl Into<String>) -> Self {
        Self::Unavailable(why.into())
    }

    pub(crate) fn internal(why: impl Into<String>) -> Self {
        Self::Internal(why.into())
    }

    /// Wraps the error so that it passes through sea-orm unchanged and
    /// `DbError::from` finds it again.
    pub(crate) fn into_orm(self) -> DbErr {
        DbErr::TryIntoErr { from: "statement", into: "result", source: Arc::new(self) }
    }
}

/// Whether a sea-orm error is a unique violation, on either engine.
///
/// sea-orm's own `sql_err()` understands only the drivers it ships, which the
/// SQLite half here does not use.
pub fn is_unique_violation(error: &DbErr) -> bool {
    DbError::from(error).is_unique_violation()
}

/// Whether a statement failed because the connection that it was given was dead: cut, or ended by a server that has
/// since been started again. Where nothing was done before on that connection, another may be tried.
pub(crate) fn is_dead_connection(error: &DbErr) -> bool {
    let (DbErr::Exec(RuntimeErr::SqlxError(error)) | DbErr::Query(RuntimeErr::SqlxError(error))) = error else {
        return false;
    };
    match &**error {
        SqlxError::Io(_) => true,
        SqlxError::Database(database) => {
            database.code().is_some_and(|code| matches!(&*code, "57P01" | "57P02" | "57P05" | "25P03"))
        }
        _ => false,
    }
}

impl From<DbErr> for DbError {
    fn from(error: DbErr) -> Self {
        Self::from(&error)
    }
}

impl From<&DbErr> for DbError {
    fn from(error: &DbErr) -> Self {
        match error {
            DbErr::TryIntoErr { from, into, source } => match source.downcast_ref::<Self>() {
                Some(own) => own.clone(),
                None => Self::internal(format!("{from} does not convert into {into}")),
            },
            DbErr::ConnectionAcquire(ConnAcquireErr::Timeout) => Self::busy("no free connection in time"),
            DbErr::ConnectionAcquire(ConnAcquireErr::ConnectionClosed) => Self::unavailable("the pool is closed"),
            DbErr::Exec(RuntimeErr::SqlxError(inner)) | DbErr::Query(RuntimeErr::SqlxError(inner)) => from_sqlx(inner),
            DbErr::Conn(RuntimeErr::SqlxError(inner)) => match from_sqlx(inner) {
                Self::Internal(why) => Self::Unavailable(why),
                other => other,
            },
            DbErr::Conn(RuntimeErr::Internal(why)) => Self::unavailable(why.clone()),
            DbErr::Exec(RuntimeErr::Internal(why)) | DbErr::Query(RuntimeErr::Internal(why)) => {
                Self::internal(why.clone())
            }
            DbErr::RecordNotFound(_) | DbErr::RecordNotUpdated => Self::NotFound,
            // What is left is about columns and types of our own entities and
            // about migrations: no values of rows.
            other => Self::internal(other.to_string()),
        }
    }
}

/// PostgreSQL: the class of the error comes from SQLSTATE, never from the
/// message, which quotes values in some classes.
fn from_sqlx(error: &SqlxError) -> DbError {
    match error {
        SqlxError::Database(database) => {
            let code = database.code().unwrap_or_default().into_owned();
            let constraint = || database.constraint().or_else(|| database.table()).unwrap_or("unnamed").to_owned();
            match code.as_str() {
                "23505" => DbError::UniqueViolation { constraint: constraint() },
                "40001" | "40P01" | "55P03" | "57014" | "53300" | "25P03" => DbError::Busy(format!("SQLSTATE {code}")),
                // 25006: a standby after a failover.
                "53100" | "53200" | "25006" | "57P01" | "57P02" | "57P03" | "57P04" | "57P05" => {
                    DbError::Unavailable(format!("SQLSTATE {code}"))
                }
                other if other.starts_with("23") => DbError::ConstraintViolation { constraint: constraint() },
                other if other.starts_with("08") || other.starts_with("28") => {
                    DbError::Unavailable(format!("SQLSTATE {code}"))
                }
                _ => DbError::Internal(format!("SQLSTATE {code}")),
            }
        }
        SqlxError::PoolTimedOut => DbError::busy("no free connection in time"),
        SqlxError::PoolClosed => DbError::unavailable("the pool is closed"),
        SqlxError::Io(inner) => DbError::Unavailable(format!("connection: {}", inner.kind())),
        SqlxError::Tls(_) => DbError::unavailable("TLS handshake failed"),
        SqlxError::WorkerCrashed => DbError::unavailable("the driver stopped"),
        SqlxError::Protocol(_) => DbError::unavailable("protocol error"),
        SqlxError::RowNotFound => DbError::NotFound,
        // A connection string is in this one's text.
        SqlxError::Configuration(_) => DbError::internal("the connection URL is not valid"),
        SqlxError::ColumnNotFound(column) => DbError::Internal(format!("no column {column}")),
        SqlxError::ColumnDecode { index, .. } => {
            DbError::Internal(format!("column {index} has another type than expected"))
        }
        _ => DbError::internal("the driver refused the statement"),
    }
}

impl From<rusqlite::Error> for DbError {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::{Error, ErrorCode, ffi};
        match error {
            Error::SqliteFailure(failure, message) => {
                let message = message.unwrap_or_default();
                let code = failure.extended_code;
                let constraint = || match message.split_once("constraint failed: ") {
                    Some((_, name)) => name.to_owned(),
                    None => message.clone(),
                };
                match failure.code {
                    ErrorCode::ConstraintViolation => match code {
                        ffi::SQLITE_CONSTRAINT_UNIQUE
                        | ffi::SQLITE_CONSTRAINT_PRIMARYKEY
                        | ffi::SQLITE_CONSTRAINT_ROWID => Self::UniqueViolation { constraint: constraint() },
                        _ => Self::ConstraintViolation { constraint: constraint() },
                    },
                    ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked => Self::busy("another process holds the file"),
                    ErrorCode::DiskFull => Self::unavailable("the disk is full"),
                    ErrorCode::SystemIoFailure
                    | ErrorCode::CannotOpen
                    | ErrorCode::ReadOnly
                    | ErrorCode::PermissionDenied
                    | ErrorCode::OutOfMemory
                    | ErrorCode::DatabaseCorrupt
                    | ErrorCode::NotADatabase => Self::Unavailable(format!("SQLite code {code}")),
                    // Names of tables and columns and pieces of our own SQL;
                    // values are bound and so never in the message.
                    _ => Self::Internal(format!("SQLite code {code}: {message}")),
                }
            }
            Error::SqlInputError { msg, .. } => Self::Internal(format!("SQL: {msg}")),
            Error::InvalidColumnIndex(index) => Self::Internal(format!("no column {index}")),
            Error::MultipleStatement => Self::internal("several statements in one"),
            Error::InvalidParameterCount(given, wanted) => {
                Self::Internal(format!("{given} values for {wanted} parameters"))
            }
            _ => Self::internal("SQLite refused the statement"),
        }
    }
}
