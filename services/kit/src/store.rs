//! What every store has: who changes something, and why a job ended without a result.

use paperkey_proto::Error;
use sea_orm::DbErr;

use crate::{
    db::{AuditEntry, DbError},
    principal::Caller,
};

/// Who changes something, by which call, for the audit log.
#[derive(Clone, Debug)]
pub struct Act {
    actor_kind: String,
    actor_id: String,
    action: &'static str,
    request_id: String,
}

impl Act {
    /// A caller, by the rpc of that path.
    pub fn by(caller: &Caller, action: &'static str) -> Self {
        let actor_kind = caller.principal.kind().as_str_name().trim_start_matches("CALLER_").to_ascii_lowercase();
        let (actor_id, request_id) = (caller.principal.id.clone(), caller.request_id.clone());
        Self { actor_kind, actor_id, action, request_id }
    }

    /// Whoever sits at the installation's command line.
    pub fn by_operator(action: &'static str) -> Self {
        Self { actor_kind: "operator".to_owned(), actor_id: String::new(), action, request_id: String::new() }
    }

    /// A service, which nobody has asked: time has come.
    pub fn by_service(service: &str, action: &'static str) -> Self {
        Self { actor_kind: "service".to_owned(), actor_id: service.to_owned(), action, request_id: String::new() }
    }

    /// The same act, of the account that it has just made.
    #[must_use]
    pub fn or_by_account(mut self, user_id: &str) -> Self {
        if self.actor_id.is_empty() && self.actor_kind == "anyone" {
            "account".clone_into(&mut self.actor_kind);
            user_id.clone_into(&mut self.actor_id);
        }
        self
    }

    /// The entry for what it did to these resources.
    pub fn on(&self, resources: Vec<String>) -> AuditEntry {
        AuditEntry {
            actor_kind: self.actor_kind.clone(),
            actor_id: self.actor_id.clone(),
            action: self.action.to_owned(),
            resources,
            request_id: self.request_id.clone(),
        }
    }
}

/// Why a domain refuses: an enum that is matched to one reason of the catalogue each.
pub trait Fault: Into<Error> {}

/// Why a job of a store ended without a result.
#[derive(Debug)]
pub enum Failure<F> {
    /// The domain refuses.
    Fault(F),
    /// A value is at fault.
    Invalid(Error),
    /// The database failed.
    Database(DbError),
}

impl<F: Fault> From<F> for Failure<F> {
    fn from(fault: F) -> Self {
        Self::Fault(fault)
    }
}

impl<F> From<DbError> for Failure<F> {
    fn from(error: DbError) -> Self {
        Self::Database(error)
    }
}

impl<F> From<DbErr> for Failure<F> {
    fn from(error: DbErr) -> Self {
        Self::Database(error.into())
    }
}

impl<F: Into<Self>> From<Failure<F>> for Error {
    fn from(failure: Failure<F>) -> Self {
        match failure {
            Failure::Fault(fault) => fault.into(),
            Failure::Invalid(error) => error,
            Failure::Database(error) => error.into(),
        }
    }
}
