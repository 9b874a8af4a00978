//! The schema of every service, step by step, up and down, on both engines.
//!
//! Times are `i64` milliseconds, JSON is text, ids are text, every integer is a
//! big one: so one entity fits both engines. A migration is never edited once it
//! was released; a new one corrects it. `SchemaManager::has_table` and its like
//! do not work on SQLite here, and nothing needs them: what was applied is on
//! record.
//!
//! Deliberately absent: data of any service, and connections.

pub mod auth;
pub mod catalog;
mod columns;
mod indexes;
pub mod kit;
pub mod licensing;
pub mod webhook;
