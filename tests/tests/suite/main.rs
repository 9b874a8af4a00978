//! Black-box tests: the real binary, real sockets, a module a theme.
//!
//! Scenarios that hold on any installation run on both kinds, as `all_in_one::…` and `fleet::…`.

mod accounts;
mod addresses;
mod alerts;
mod arrows;
mod audit;
mod browser;
mod bulk;
mod cli;
mod clients;
mod crash;
mod docs;
mod expiry;
mod files;
mod forward_auth;
mod freshness;
mod health;
mod json;
mod keys;
mod limits;
mod listen;
mod nonsense;
mod once;
mod oracle;
mod path;
mod permissions;
mod policy;
mod quotas;
mod races;
mod reference;
mod resending;
mod rotation;
mod samples;
mod secrets;
mod sessions;
mod team_webhooks;
mod teams;
mod tenancy;
mod upstreams;
mod verifiers;
mod verify;
mod watching;
mod webhooks;
