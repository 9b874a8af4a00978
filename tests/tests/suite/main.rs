//! Black-box tests: the real binary, real sockets, a module a theme.
//!
//! Scenarios that hold on any installation run on both kinds, as `all_in_one::…` and `fleet::…`.

mod arrows;
mod cli;
mod crash;
mod freshness;
mod health;
mod json;
mod nonsense;
mod path;
mod policy;
mod races;
mod samples;
mod secrets;
mod tenancy;
mod webhooks;
