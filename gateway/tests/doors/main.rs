//! The doors of the gateway, beside the contract: forward auth, Envoy's check, mounted upstreams.

mod common;
mod envoy;
mod forward_auth;
mod upstreams;
