//! Conditions that rows are checked by, and not found by.
//!
//! A statement about one row names it by what is unique of it, and says beside that whose it must be, or how it must
//! stand. PostgreSQL takes either for the way to find it: it goes by what there is on average, so where most teams have
//! one licence, "those of this team" looks as cheap as "the one with this id", and a team with a million has all of them
//! read for each. No index serves a condition from here, which leaves the one way there should be.

use sea_orm::sea_query::{CaseStatement, Expr, ExprTrait as _, IntoCondition};

/// A condition of a statement that is written by hand.
#[must_use]
pub fn checked(condition: &str) -> String {
    format!("CASE WHEN {condition} THEN 1 ELSE 0 END = 1")
}

/// The same of a statement that is built.
#[must_use]
pub fn check(condition: impl IntoCondition) -> Expr {
    Expr::Case(Box::new(CaseStatement::new().case(condition, Expr::cust("1")).finally(Expr::cust("0"))))
        .eq(Expr::cust("1"))
}
