//! Whether a process takes calls, told to machines: `/readyz` over HTTP, `grpc.health.v1` over gRPC.
//!
//! A process that is about to end says so before it stops, so that whoever distributes calls leaves it out in time.

use std::{future::Future, sync::Arc, time::Duration};

use futures_util::{FutureExt as _, future::BoxFuture};
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{service::Rpcs, shutdown::Shutdown};

/// How often health looks whether anything has changed.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a look may take: what does not answer in time is not there.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);

type Check = Arc<dyn Fn() -> BoxFuture<'static, Result<(), String>> + Send + Sync>;

/// Whether a process takes calls. Clones ask the same.
#[derive(Clone)]
pub struct Readiness {
    check: Check,
    leaving: Shutdown,
}

impl std::fmt::Debug for Readiness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Readiness").field("leaving", &self.leaving.has_come()).finish_non_exhaustive()
    }
}

impl Readiness {
    /// Ready when the check says so, and until it is time to leave.
    pub fn new<C, F>(check: C, leaving: Shutdown) -> Self
    where
        C: Fn() -> F + Send + Sync + 'static,
        F: Future<Output = Result<(), String>> + Send + 'static,
    {
        Self { check: Arc::new(move || check().boxed()), leaving }
    }

    /// Why it takes no calls, if it does not.
    pub async fn judge(&self) -> Result<(), String> {
        if self.leaving.has_come() {
            return Err("draining".to_owned());
        }
        let checked = tokio::time::timeout(LOOK_TIMEOUT, (self.check)()).await;
        checked.unwrap_or_else(|_| Err("what it stands on does not answer in time".to_owned()))
    }
}

/// Health over gRPC: of the process as a whole, and of each of its services.
#[derive(Clone, Debug)]
pub struct Health {
    reporter: HealthReporter,
    services: Vec<String>,
}

impl Health {
    /// Health of services by their names, and what answers when asked for it. None serves until [`Self::follow`] knows
    /// that it does.
    pub fn new<'n>(services: impl IntoIterator<Item = &'n str>) -> (Self, Rpcs) {
        let (reporter, health) = tonic_health::server::health_reporter();
        let mut services: Vec<String> = services.into_iter().map(str::to_owned).collect();
        services.push(String::new());
        services.sort_unstable();
        services.dedup();
        let health_of = Self { reporter, services };
        // Nobody else holds the reporter's lock yet, so this is ready at once.
        health_of.tell(ServingStatus::NotServing).now_or_never();
        (health_of, Rpcs::new(health))
    }

    async fn tell(&self, status: ServingStatus) {
        for service in &self.services {
            self.reporter.set_service_status(service, status).await;
        }
    }

    /// Tells what readiness says, until shut down.
    pub async fn follow(self, readiness: Readiness, mut shutdown: Shutdown) {
        let mut leaving = readiness.leaving.clone();
        let mut told = ServingStatus::NotServing;
        while !shutdown.has_come() {
            let status = match readiness.judge().await {
                Ok(()) => ServingStatus::Serving,
                Err(_) => ServingStatus::NotServing,
            };
            if status != told {
                self.tell(status).await;
                told = status;
            }
            let left = leaving.has_come();
            tokio::select! {
                () = leaving.wait(), if !left => {}
                () = tokio::time::sleep(LOOK_EVERY) => {}
                () = shutdown.wait() => {}
            }
        }
        self.tell(ServingStatus::NotServing).await;
    }
}
