//! What a failure of storage is to a caller: never its text, only whether trying again helps.

use paperkey_proto::Error;

use crate::{db::DbError, secrets::CannotOpen};

impl From<DbError> for Error {
    fn from(error: DbError) -> Self {
        match error {
            DbError::Busy(_) | DbError::Unavailable(_) => Self::unavailable(error),
            _ => Self::internal(error),
        }
    }
}

impl From<CannotOpen> for Error {
    fn from(error: CannotOpen) -> Self {
        Self::internal(error)
    }
}
