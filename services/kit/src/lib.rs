//! What every service stands on: clock, ids, secrets, storage, the way from one service to another, and the
//! policy that guards it.
//!
//! The kit knows the contract and no service. What it owns, no service writes again: the unit of work
//! ([`db`]), the outbox ([`outbox`]), who is calling ([`principal`], [`authn`]), what they may ([`policy`]), and that
//! what was done once is not done again ([`once`]).

pub mod api;
pub mod audit;
pub mod authn;
pub mod cache;
pub mod changes;
pub mod channel;
pub mod clock;
pub mod config;
pub mod db;
pub mod events;
pub mod fail_point;
mod failure;
pub mod host;
pub mod ids;
pub mod incidents;
pub mod lease;
pub mod limits;
pub mod meters;
pub mod once;
pub mod outbox;
pub mod policy;
pub mod principal;
pub mod ready;
pub mod reflection;
pub mod secrets;
pub mod service;
pub mod shed;
pub mod shutdown;
pub mod store;
pub mod telemetry;
pub mod testing;
pub mod tls;
pub mod token;
pub mod uses;
pub mod values;
