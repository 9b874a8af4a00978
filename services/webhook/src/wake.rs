//! How the rest of the process tells the dispatcher that something has changed.
//!
//! A hint, never the truth: the dispatcher also looks by itself, and other processes hear nothing of this one.

use std::collections::HashSet;

use parking_lot::Mutex;
use tokio::sync::Notify;

/// Endpoints that may have changed are remembered up to this many; beyond it, all have.
const MAX_CHANGED: usize = 10_000;

/// What the dispatcher should know.
#[derive(Debug, Default)]
pub(crate) struct Wake {
    notify: Notify,
    changed: Mutex<Changed>,
}

/// The endpoints that may have changed since the last look.
#[derive(Debug, Default)]
pub(crate) struct Changed {
    ids: HashSet<String>,
    all: bool,
}

impl Changed {
    /// Whether that one may have.
    pub(crate) fn includes(&self, endpoint_id: &str) -> bool {
        self.all || self.ids.contains(endpoint_id)
    }

    /// Whether any may have.
    pub(crate) fn any(&self) -> bool {
        self.all || !self.ids.is_empty()
    }
}

impl Wake {
    /// There may be something to send.
    pub(crate) fn work(&self) {
        self.notify.notify_one();
    }

    /// That endpoint was changed, paused, resumed or deleted.
    pub(crate) fn changed(&self, endpoint_id: &str) {
        let mut changed = self.changed.lock();
        if changed.ids.len() < MAX_CHANGED {
            changed.ids.insert(endpoint_id.to_owned());
        } else {
            changed.all = true;
        }
        drop(changed);
        self.notify.notify_one();
    }

    /// What has changed since the last call.
    pub(crate) fn take_changed(&self) -> Changed {
        std::mem::take(&mut *self.changed.lock())
    }

    /// Waits until one of the above was called.
    pub(crate) async fn wait(&self) {
        self.notify.notified().await;
    }
}
