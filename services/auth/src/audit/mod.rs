//! The audit log besides its rpcs: chained and pruned by one process at a time, verified by whoever doubts it, and read
//! in the order of time.
//!
//! Deliberately absent: any way to change what was taken over.

mod head_file;
mod reader;
mod verify;

use std::{path::Path, time::Duration};

use paperkey_kit::{
    cache::Epochs,
    db::{Database, DbError},
    ids::new_id,
    lease::Leases,
    secrets::Keyring,
    shutdown::Shutdown,
};
use paperkey_proto::Error;

use crate::store::{Chained, Store};

pub(crate) use reader::{Query, Reader};
pub use verify::{AuditFault, AuditReport};

use head_file::{HeadFile, Moved};

/// How often is looked for blocks to chain.
const CHAIN_EVERY: Duration = Duration::from_millis(500);
/// How often is looked for blocks to remove.
const PRUNE_EVERY: Duration = Duration::from_hours(1);
/// How often the same trouble is told.
const TELL_EVERY: Duration = Duration::from_hours(1);
const LEASE_NAME: &str = "auth/audit";
/// Longer than a round takes; its end is all that keeps the next holder from going on.
const LEASE: Duration = Duration::from_secs(15);
/// Steps of one round at most; the next round goes on.
const MAX_STEPS: u32 = 500;
const DAY_MS: i64 = 24 * 60 * 60 * 1_000;

/// The audit log of an installation, in the hand of whoever keeps it or doubts it.
#[derive(Clone, Debug)]
pub struct AuditLog {
    store: Store,
    file: HeadFile,
}

impl AuditLog {
    /// The log in that database. The folder holds the head of its chain as well.
    pub fn new(database: Database, keys: &Keyring, folder: &Path) -> Self {
        // It changes nothing that anybody caches.
        let store = Store::new(database, keys, std::sync::Arc::<Epochs>::default());
        Self::of(store, folder)
    }

    pub(crate) fn of(store: Store, folder: &Path) -> Self {
        let file = HeadFile::new(folder, store.chain_key().clone());
        Self { store, file }
    }

    /// Chains what waits for it, also without the lease: for the end of a process, after its last records came.
    pub async fn chain(&self) -> Result<u64, Error> {
        let mut count = 0;
        for _ in 0..MAX_STEPS {
            match self.store.chain_some().await? {
                Chained::Nothing => break,
                Chained::Tampered => {
                    return Err(Error::internal(
                        "the head of the audit log is not the one that was written: run `paperkey audit verify`",
                    ));
                }
                Chained::Blocks(blocks, newest) => {
                    count += blocks;
                    if self.file.advance(&self.store, newest).await? == Moved::Doubted {
                        return Err(Error::internal(format!(
                            "the audit log does not go on where {} says that it was: run `paperkey audit verify`",
                            self.file.path().display()
                        )));
                    }
                }
            }
        }
        Ok(count)
    }

    /// Removes blocks that are older than that many days. One that was touched ends it.
    pub async fn prune(&self, days: u32) -> Result<u64, Error> {
        let before_ms = self.store.clock().now_ms().saturating_sub(i64::from(days) * DAY_MS);
        let mut removed = 0;
        for _ in 0..MAX_STEPS {
            match self.store.prune_audit(before_ms).await? {
                0 => break,
                some => removed += some,
            }
        }
        Ok(removed)
    }

    /// Looks at every block, and says what is wrong with the first that something is wrong with.
    pub async fn verify(&self) -> Result<Result<AuditReport, AuditFault>, Error> {
        verify::verify(&self.store, &self.file).await
    }
}

/// Chains what comes and removes what is old, until shut down and once more then.
pub(crate) async fn keep(log: AuditLog, leases: Leases, days: u32, mut shutdown: Shutdown) {
    let holder = new_id("proc", log.store.clock());
    let clock = log.store.clock().clone();
    let (mut pruned_at, mut told_at) = (None, None);
    let is_over = |at: Option<std::time::Instant>, after: Duration| {
        at.is_none_or(|at| clock.monotonic().saturating_duration_since(at) >= after)
    };
    loop {
        let last = shutdown.has_come();
        let prunes = !last && is_over(pruned_at, PRUNE_EVERY);
        match round(&log, &leases, &holder, days, prunes).await {
            Ok(held) => {
                if held && prunes {
                    pruned_at = Some(clock.monotonic());
                }
            }
            Err(error) => {
                // A block that was touched is not looked at twice a second.
                if prunes {
                    pruned_at = Some(clock.monotonic());
                }
                if is_over(told_at, TELL_EVERY) {
                    told_at = Some(clock.monotonic());
                    let why = error.source().map(ToString::to_string).unwrap_or_default();
                    tracing::error!(%error, why, "the audit log is not kept as it should be");
                }
            }
        }
        if last {
            break;
        }
        tokio::select! {
            () = tokio::time::sleep(CHAIN_EVERY) => {}
            () = shutdown.wait() => {}
        }
    }
    // If this fails, the lease runs out by itself.
    let _ = leases.release(LEASE_NAME, &holder).await;
}

/// Says whether this process holds the lease.
async fn round(log: &AuditLog, leases: &Leases, holder: &str, days: u32, prunes: bool) -> Result<bool, Error> {
    if !prunes && !log.store.is_unchained().await? {
        return Ok(false);
    }
    if !hold(leases, holder).await? {
        return Ok(false);
    }
    let chained = log.chain().await;
    if prunes && hold(leases, holder).await? {
        let removed = log.prune(days).await?;
        if removed > 0 {
            tracing::debug!(removed, "old blocks of the audit log are removed");
        }
    }
    chained.map(|_| true)
}

async fn hold(leases: &Leases, holder: &str) -> Result<bool, DbError> {
    leases.try_hold(LEASE_NAME, holder, LEASE).await
}
