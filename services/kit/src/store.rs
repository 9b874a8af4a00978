//! What every store has: who changes something, and why a job ended without a result.

use std::{any::Any, sync::Arc};

use paperkey_proto::Error;
use prost::Message;
use sea_orm::DbErr;

use crate::{
    db::{AuditEntry, DbError, Tx},
    once::{Encode, Once},
    principal::Caller,
};

/// Who changes something, by which call, for the audit log; and what the call answers, for those who repeat it.
#[derive(Clone, Debug)]
pub struct Act {
    actor_kind: String,
    actor_id: String,
    actor_name: String,
    team_id: String,
    action: &'static str,
    request_id: String,
    once: Option<Arc<Once>>,
    encode: Option<Encode>,
}

impl Act {
    /// A caller, by the rpc of that path, in the log of the caller's team.
    pub fn by(caller: &Caller, action: &'static str) -> Self {
        let principal = &caller.principal;
        Self {
            actor_kind: principal.kind().as_str_name().trim_start_matches("CALLER_").to_ascii_lowercase(),
            actor_id: principal.id.clone(),
            actor_name: principal.name.clone(),
            team_id: principal.team_id.clone(),
            action,
            request_id: caller.request_id.clone(),
            once: caller.once.clone(),
            encode: None,
        }
    }

    /// Whoever sits at the installation's command line.
    pub fn by_operator(action: &'static str) -> Self {
        Self::unasked("operator", "", action)
    }

    /// A service, which nobody has asked: time has come.
    pub fn by_service(service: &str, action: &'static str) -> Self {
        Self::unasked("service", service, action)
    }

    fn unasked(actor_kind: &str, actor_id: &str, action: &'static str) -> Self {
        Self {
            actor_kind: actor_kind.to_owned(),
            actor_id: actor_id.to_owned(),
            actor_name: actor_id.to_owned(),
            team_id: String::new(),
            action,
            request_id: String::new(),
            once: None,
            encode: None,
        }
    }

    /// The same act, with how the answer of the call is made of what the store has written. A handler answers by the
    /// same function, so that a repetition is told what the first was told.
    #[must_use]
    pub fn answered_by<T: Any, M: Message>(mut self, encode: impl Fn(&T) -> M + Send + Sync + 'static) -> Self {
        self.encode = Some(Encode::new(encode));
        self
    }

    /// Keeps the answer of the call in the transaction that makes the change, where the caller wants it to be made
    /// once. What the store has written must be what [`Self::answered_by`] takes.
    pub fn answer<T: Any>(&self, tx: &Tx, made: &T) -> Result<(), DbError> {
        if self.encode.as_ref().is_some_and(|encode| !encode.takes::<T>()) {
            return Err(DbError::Internal(format!("the answer to {} is made of something else", self.action)));
        }
        let Some(once) = &self.once else { return Ok(()) };
        let Some(message) = self.encode.as_ref().and_then(|encode| encode.bytes_of(made)) else {
            return Err(DbError::Internal(format!("nothing says what {} answers", self.action)));
        };
        once.keep(tx, message);
        Ok(())
    }

    /// The same act, of the account that it has just made.
    #[must_use]
    pub fn or_by_account(mut self, user_id: &str, email: &str) -> Self {
        if self.actor_id.is_empty() && self.actor_kind == "anyone" {
            "account".clone_into(&mut self.actor_kind);
            user_id.clone_into(&mut self.actor_id);
            email.clone_into(&mut self.actor_name);
        }
        self
    }

    /// The same act in the log of a team that need not be the caller's, such as the one that it makes.
    #[must_use]
    pub fn on_team(&self, team_id: &str) -> Self {
        Self { team_id: team_id.to_owned(), ..self.clone() }
    }

    /// The same act in the log of a team, which learns who it was only if that was one of its own.
    #[must_use]
    pub fn as_seen_by(&self, team_id: &str) -> Self {
        if self.team_id == team_id {
            return self.clone();
        }
        let (actor_kind, actor_id, actor_name) = ("anyone".to_owned(), String::new(), String::new());
        Self { actor_kind, actor_id, actor_name, ..self.on_team(team_id) }
    }

    /// The entry for what it did to these resources.
    pub fn on(&self, resources: Vec<String>) -> AuditEntry {
        if let Some(once) = &self.once {
            once.changes();
        }
        AuditEntry {
            actor_kind: self.actor_kind.clone(),
            actor_id: self.actor_id.clone(),
            actor_name: self.actor_name.clone(),
            team_id: self.team_id.clone(),
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
