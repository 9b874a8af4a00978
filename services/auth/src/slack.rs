//! Slack: alerts, as an incoming webhook takes them.
//!
//! What is to be said waits in the database, put there with the alert; a claim lasts longer than sending may take, so no
//! two processes say the same, and what a process held that died is said by another, perhaps twice and never not at all.
//! The URL is as good as a password and is in no log.
//!
//! Deliberately absent: a judgement of the address, which is the operator's own; and any use of what Slack answers beyond
//! its status.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderValue, Request, StatusCode, Uri,
    header::{CONTENT_TYPE, RETRY_AFTER},
};
use http_body_util::Full;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::{TokioExecutor, TokioTimer},
};
use paperkey_kit::{
    clock::Clock,
    db::DbError,
    secrets::{CannotOpen, Secret},
    shutdown::Shutdown,
};
use paperkey_proto::Error;
use tokio::task::JoinSet;

use crate::{
    mail::wait_ms,
    store::{ClaimedPost, Store},
};

/// How many are sent at a time.
const AT_A_TIME: i64 = 4;
/// How long one exchange may take.
const TIMEOUT: Duration = Duration::from_secs(5);
/// How long a post is held: longer than it may take.
const HELD: Duration = Duration::from_mins(1);
/// How often is looked for what other processes left, and for what is to be tried again.
const EVERY: Duration = Duration::from_secs(5);
/// After this a post is given up.
const PATIENCE_MS: i64 = 24 * 60 * 60 * 1_000;
/// The longest that Slack may ask to be left alone.
const LONGEST_REST_MS: i64 = 60 * 60 * 1_000;

/// The way to Slack.
#[derive(Clone)]
pub(crate) struct Slack {
    uri: Uri,
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

/// A post was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
enum NotTaken {
    #[error("Slack cannot be reached")]
    Connection,
    #[error("Slack did not answer in time")]
    Timeout,
    #[error("Slack answered with {0}")]
    Status(StatusCode, Option<i64>),
}

impl std::fmt::Debug for Slack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Slack")
    }
}

impl Slack {
    /// The way to that webhook.
    pub(crate) fn new(url: &Secret) -> Result<Self, Error> {
        // The error would hold the URL.
        let uri = url.expose().parse().map_err(|_| Error::internal("alerts.slack_webhook_url is no URL"))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let connector = HttpsConnectorBuilder::new()
            .with_provider_and_webpki_roots(provider)
            .map_err(Error::internal)?
            // Plain http is for whatever stands between.
            .https_or_http()
            .enable_http1()
            .build();
        let client = Client::builder(TokioExecutor::new()).pool_timer(TokioTimer::new()).build(connector);
        Ok(Self { uri, client })
    }

    async fn post(&self, text: &str) -> Result<(), NotTaken> {
        let body = serde_json::json!({ "text": text }).to_string();
        let request = Request::post(self.uri.clone())
            .header(CONTENT_TYPE, HeaderValue::from_static("application/json"))
            .body(Full::new(Bytes::from(body)))
            .map_err(|_| NotTaken::Connection)?;
        let exchange = tokio::time::timeout(TIMEOUT, self.client.request(request));
        let answer = exchange.await.map_err(|_| NotTaken::Timeout)?.map_err(|_| NotTaken::Connection)?;
        if answer.status().is_success() {
            return Ok(());
        }
        let rest_s = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse::<i64>().ok());
        Err(NotTaken::Status(answer.status(), rest_s.map(|s| s.saturating_mul(1_000).clamp(0, LONGEST_REST_MS))))
    }
}

/// Sends what waits, until shut down.
pub(crate) async fn carry(store: Store, slack: Slack, clock: Clock, mut shutdown: Shutdown) {
    loop {
        let sent = match round(&store, &slack, &clock).await {
            Ok(sent) => sent,
            Err(error) => {
                tracing::warn!(%error, "posts to Slack have to wait");
                0
            }
        };
        if shutdown.has_come() {
            return;
        }
        if sent > 0 {
            continue;
        }
        tokio::select! {
            () = store.posts().wait() => {}
            () = tokio::time::sleep(EVERY) => {}
            () = shutdown.wait() => return,
        }
    }
}

/// Sends what is due, at most a few. Says how many that were.
async fn round(store: &Store, slack: &Slack, clock: &Clock) -> Result<usize, DbError> {
    let claimed = store.claim_posts(AT_A_TIME, HELD).await?;
    let count = claimed.len();
    let mut sending = JoinSet::new();
    for post in claimed {
        let (store, slack, clock) = (store.clone(), slack.clone(), clock.clone());
        sending.spawn(async move {
            let again_at_ms = deliver(&slack, &clock, &post).await;
            store.settle_post(&post, again_at_ms).await
        });
    }
    let mut failed = None;
    while let Some(outcome) = sending.join_next().await {
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(error)) => failed = failed.or(Some(error)),
            // The claim runs out, and the post is tried again.
            Err(_) => tracing::error!("sending a post to Slack panicked"),
        }
    }
    failed.map_or(Ok(count), Err)
}

/// Sends one post; says when to try again, if that is called for.
async fn deliver(slack: &Slack, clock: &Clock, post: &ClaimedPost) -> Option<i64> {
    let until_ms = post.created_at_ms.saturating_add(PATIENCE_MS);
    let text = match &post.text {
        Ok(text) => text,
        // This process may learn of the key, or one that knows it may take the post.
        Err(error @ CannotOpen::UnknownKey(_)) if clock.now_ms() < until_ms => {
            tracing::warn!(post = post.id, %error, "a post to Slack has to wait");
            return Some(clock.now_ms().saturating_add(wait_ms(1)));
        }
        // It never can be, or not while it is of use.
        Err(error) => {
            tracing::error!(post = post.id, %error, "a post to Slack cannot be opened and is lost");
            return None;
        }
    };
    let error = slack.post(text).await.err()?;
    let rest_ms = if let NotTaken::Status(_, Some(rest_ms)) = error { rest_ms } else { 0 };
    let again_at_ms = clock.now_ms().saturating_add(wait_ms(post.attempts).max(rest_ms));
    if again_at_ms >= until_ms {
        tracing::warn!(post = post.id, attempts = post.attempts, %error, "a post to Slack is given up");
        return None;
    }
    tracing::info!(post = post.id, attempts = post.attempts, %error, "a post to Slack is tried again later");
    Some(again_at_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_url_is_printed_nowhere() {
        let slack = Slack::new(&Secret::new("https://hooks.slack.com/services/T0/B0/hunter2")).unwrap();
        assert!(!format!("{slack:?}").contains("hunter2"));
        let error = Slack::new(&Secret::new("https://hunter2 hunter2")).unwrap_err();
        assert!(!format!("{error:?}{error}").contains("hunter2"));
        assert!(HELD > 4 * TIMEOUT);
    }
}
