//! The end of a process, as its parts learn of it.

use tokio::sync::watch;

/// Ends everything that holds the other half.
#[derive(Debug)]
pub struct ShutdownHandle(watch::Sender<bool>);

/// Learns that the end has come.
#[derive(Clone, Debug)]
pub struct Shutdown(watch::Receiver<bool>);

/// The two halves.
pub fn channel() -> (ShutdownHandle, Shutdown) {
    let (sender, receiver) = watch::channel(false);
    (ShutdownHandle(sender), Shutdown(receiver))
}

impl ShutdownHandle {
    /// Tells everyone to end.
    pub fn shut_down(&self) {
        self.0.send_replace(true);
    }
}

impl Shutdown {
    /// Whether the end has come.
    pub fn has_come(&self) -> bool {
        *self.0.borrow()
    }

    /// The signal itself, for those who select on it.
    pub fn into_receiver(self) -> watch::Receiver<bool> {
        self.0
    }

    /// Waits for the end. A dropped handle is an end too.
    pub async fn wait(&mut self) {
        // The error says that the handle is gone, which means the same.
        let _ = self.0.wait_for(|ended| *ended).await;
    }
}
