//! Waiting for something to be so, with a deadline. No test sleeps instead of waiting.

use std::{
    future::Future,
    time::{Duration, Instant},
};

/// How long anything may take that is not measured: machines that build and test at once are slow.
pub const GENEROUS: Duration = Duration::from_mins(1);

/// How often a condition is looked at.
pub(crate) const PAUSE: Duration = Duration::from_millis(20);

/// Asks until there is an answer; fails after a generous time.
pub async fn eventually<T, F, Fut>(what: &str, ask: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    within(GENEROUS, what, ask).await.0
}

/// Asks until there is an answer, and says how long that took; fails after the limit.
pub async fn within<T, F, Fut>(limit: Duration, what: &str, mut ask: F) -> (T, Duration)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let began = Instant::now();
    loop {
        let asked = began.elapsed();
        if let Some(answer) = ask().await {
            return (answer, asked);
        }
        assert!(asked <= limit, "{what}: not so after {limit:?}");
        tokio::time::sleep(PAUSE).await;
    }
}
