//! What a failure of storage is to a caller: never its text, only whether trying again helps.

use paperkey_proto::{Error, errors::v1::Reason};

use crate::{
    db::{ANSWER_IS_KEPT, DbError},
    secrets::CannotOpen,
    shed::too_much,
};

impl From<DbError> for Error {
    fn from(error: DbError) -> Self {
        match error {
            // No failure: another call of the same key was first, and its answer is given in place of this.
            DbError::UniqueViolation { constraint } if constraint == ANSWER_IS_KEPT => Self::new(Reason::Unavailable),
            DbError::Overloaded => too_much(),
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
