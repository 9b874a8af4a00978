//! What a database was asked, for tests that judge how it would answer.
//!
//! Recorded is each distinct text with the values that it was asked with first; once more where others of its values are
//! absent, since a condition may hang on that. A product's database has no recorder and pays one look at an `Option`.

use std::collections::{HashMap, hash_map::Entry};

use parking_lot::Mutex;
use sea_orm::{Statement, Value};

/// Statements that are kept at most; a test that asks for more is a test of something else.
const CAPACITY: usize = 4_096;

/// A statement that was run.
#[derive(Clone, Debug)]
pub struct Recorded {
    /// The code whose job ran it, as the compiler calls that.
    pub origin: &'static str,
    /// The statement, with the values of one time.
    pub statement: Statement,
}

/// The statements that a database has run.
#[derive(Debug, Default)]
pub struct Statements {
    known: Mutex<HashMap<(String, Vec<bool>), Recorded>>,
}

impl Statements {
    /// Keeps a statement, unless it is known.
    pub(super) fn record(&self, origin: &'static str, statement: &Statement) {
        let values = statement.values.as_ref().map_or(&[][..], |values| &values.0);
        let absent = values.iter().map(is_absent).collect();
        let mut known = self.known.lock();
        let is_full = known.len() >= CAPACITY;
        if let Entry::Vacant(entry) = known.entry((statement.sql.clone(), absent))
            && !is_full
        {
            entry.insert(Recorded { origin, statement: statement.clone() });
        }
    }

    /// All that were recorded, in the order of their texts.
    pub fn all(&self) -> Vec<Recorded> {
        let mut all: Vec<_> = self.known.lock().values().cloned().collect();
        all.sort_by(|one, other| one.statement.sql.cmp(&other.statement.sql));
        all
    }
}

fn is_absent(value: &Value) -> bool {
    *value == value.as_null()
}
