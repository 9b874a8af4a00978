//! What the black-box tests are written with: a real installation, clients that speak to it, and a webhook receiver.
//!
//! Nothing here looks inside the product. An [`Installation`] is the binary `paperkey` as people run it, in one process
//! on SQLite or as a fleet on PostgreSQL; an [`Api`] is an HTTP client; a [`Receiver`] is a server that webhooks are
//! sent to. The sentences of the tests are in [`people`].
//!
//! PostgreSQL is the one that `PAPERKEY_TEST_POSTGRES_URL` names. Without it the fleet's half is skipped, loudly; where
//! `CI=true` it fails instead.

pub mod api;
pub mod balancer;
pub mod browser;
pub mod collector;
pub mod collector_metrics;
mod database;
pub mod deploy;
pub mod echo;
pub mod envelope;
pub mod grpc;
pub mod holders;
pub mod http1;
pub mod installation;
pub mod leaks;
pub mod local_fleet;
pub mod metrics;
pub mod people;
pub mod process;
pub mod proxy;
pub mod receiver;
pub mod redis;
pub mod reference;
pub mod schema;
pub mod stand_in;
pub mod tls;
pub mod verifiers;
pub mod wait;

pub use api::{Answer, Api};
pub use balancer::Balancer;
pub use collector::Collector;
pub use echo::Echo;
pub use installation::{Installation, Kind, Settings};
pub use local_fleet::LocalFleet;
pub use people::{Account, License, Product};
pub use proxy::Proxy;
pub use receiver::Receiver;
pub use redis::Redis;
pub use stand_in::StandIn;
pub use wait::{eventually, within};

/// Makes tests on both kinds of installation out of async functions that take an [`Installation`]:
/// `all_in_one::name` and `fleet::name`. Once in a module, beside the functions.
#[macro_export]
macro_rules! on_both_kinds {
    ($($scenario:ident),+ $(,)?) => {
        mod all_in_one {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $scenario() {
                    super::$scenario($crate::Installation::all_in_one().await).await;
                }
            )+
        }

        mod fleet {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $scenario() {
                    if let Some(fleet) = $crate::Installation::fleet().await {
                        super::$scenario(fleet).await;
                    }
                }
            )+
        }
    };
}

/// The same for installations that are set up differently: by what a function says.
#[macro_export]
macro_rules! on_both_kinds_with {
    ($settings:ident; $($scenario:ident),+ $(,)?) => {
        mod all_in_one {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $scenario() {
                    let settings = super::$settings();
                    super::$scenario($crate::Installation::all_in_one_with(settings).await).await;
                }
            )+
        }

        mod fleet {
            $(
                #[tokio::test(flavor = "multi_thread")]
                async fn $scenario() {
                    if let Some(fleet) = $crate::Installation::fleet_with(super::$settings()).await {
                        super::$scenario(fleet).await;
                    }
                }
            )+
        }
    };
}
