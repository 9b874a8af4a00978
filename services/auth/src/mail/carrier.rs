//! Carries letters out of the database.
//!
//! A claim lasts longer than sending may take, so no two processes send a mail at once; one that dies while it sends
//! leaves a mail that may go out twice, and never one that is lost.

use std::time::Duration;

use paperkey_kit::{clock::Clock, db::DbError, secrets::CannotOpen, shutdown::Shutdown};
use tokio::task::JoinSet;

use super::{Mail, NotSent};
use crate::{
    domain::letter::Letter,
    store::{ClaimedMail, Store},
};

/// How many are sent at a time.
const AT_A_TIME: i64 = 8;
/// How long sending one may take.
const SEND_TIMEOUT: Duration = Duration::from_mins(1);
/// How long one is held: longer than it may take.
const HELD: Duration = Duration::from_mins(3);
/// How often is looked for what other processes left, and for what is to be tried again.
const EVERY: Duration = Duration::from_secs(5);

/// The wait before the second attempt; each further one is twice as long.
const FIRST_WAIT_MS: i64 = 30_000;
const LONGEST_WAIT_MS: i64 = 4 * 60 * 60 * 1_000;
/// After this a mail is given up.
const PATIENCE_MS: i64 = 24 * 60 * 60 * 1_000;

/// Sends what waits, until shut down.
pub(crate) async fn carry(store: Store, mail: Mail, clock: Clock, mut shutdown: Shutdown) {
    loop {
        let sent = match round(&store, &mail, &clock).await {
            Ok(sent) => sent,
            Err(error) => {
                tracing::warn!(%error, "mail has to wait");
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
            () = store.outgoing().wait() => {}
            () = tokio::time::sleep(EVERY) => {}
            () = shutdown.wait() => return,
        }
    }
}

/// Sends what is due, at most a few. Says how many that were.
pub(super) async fn round(store: &Store, mail: &Mail, clock: &Clock) -> Result<usize, DbError> {
    let claimed = store.claim_mails(AT_A_TIME, HELD).await?;
    let count = claimed.len();
    let mut sending = JoinSet::new();
    for claimed in claimed {
        let (store, mail, clock) = (store.clone(), mail.clone(), clock.clone());
        sending.spawn(async move {
            let again_at_ms = deliver(&store, &mail, &clock, &claimed).await;
            store.settle_mail(&claimed, again_at_ms).await
        });
    }
    // All of them, whatever becomes of one: who goes away now would cut conversations off that are under way.
    let mut failed = None;
    while let Some(outcome) = sending.join_next().await {
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(error)) => failed = failed.or(Some(error)),
            // The claim runs out, and the mail is tried again until it is of no more use.
            Err(_) => tracing::error!("sending a mail panicked"),
        }
    }
    failed.map_or(Ok(count), Err)
}

/// Sends one mail; says when to try again, if that is called for.
async fn deliver(store: &Store, mail: &Mail, clock: &Clock, claimed: &ClaimedMail) -> Option<i64> {
    let mut until_ms = claimed.created_at_ms.saturating_add(PATIENCE_MS);
    let letter = match &claimed.letter {
        Ok(letter) => letter,
        // This process may learn of the key, or one that knows it may take the mail.
        Err(error @ CannotOpen::UnknownKey(_)) if clock.now_ms() < until_ms => {
            tracing::warn!(mail = claimed.id, %error, "a mail has to wait");
            return Some(clock.now_ms().saturating_add(FIRST_WAIT_MS));
        }
        // It never can be, or not while it is of use.
        Err(error) => {
            tracing::error!(mail = claimed.id, %error, "a mail cannot be opened and is lost");
            return None;
        }
    };
    if let Some(useless_from_ms) = letter.useless_from_ms() {
        until_ms = until_ms.min(useless_from_ms);
    }
    if clock.now_ms() >= until_ms {
        tracing::warn!(mail = claimed.id, attempts = claimed.attempts, "a mail is of no more use and is given up");
        return None;
    }
    let outcome = match address(store, letter).await {
        Ok(None) => return None,
        Ok(Some(to)) => {
            let sending = mail.send(&claimed.id, &to, letter.text(), clock.now_ms());
            tokio::time::timeout(SEND_TIMEOUT, sending).await.unwrap_or(Err(NotSent::Timeout))
        }
        Err(error) => {
            tracing::warn!(mail = claimed.id, %error, "a mail has to wait");
            return Some(clock.now_ms().saturating_add(FIRST_WAIT_MS));
        }
    };
    let Err(error) = outcome else { return None };
    let again_at_ms = clock.now_ms().saturating_add(wait_ms(claimed.attempts));
    // Neither the address nor what the mail says: logs are read by others.
    if error == NotSent::Address || again_at_ms >= until_ms {
        tracing::warn!(mail = claimed.id, attempts = claimed.attempts, %error, "a mail is given up");
        return None;
    }
    tracing::info!(mail = claimed.id, attempts = claimed.attempts, %error, "a mail is tried again later");
    Some(again_at_ms)
}

/// Where a letter goes; nowhere where there is nobody to send it to.
async fn address(store: &Store, letter: &Letter) -> Result<Option<String>, DbError> {
    match letter {
        Letter::Invitation { to, .. } | Letter::PasswordChanged { to, .. } => Ok(Some(to.clone())),
        Letter::PasswordReset { reset_id, .. } => store.reset_address(reset_id.clone()).await,
        Letter::Alert { team_id, user_id, .. } => store.alert_address(team_id.clone(), user_id.clone()).await,
    }
}

/// How long to wait after so many attempts.
pub(crate) fn wait_ms(attempts: i64) -> i64 {
    let doublings = u32::try_from(attempts.clamp(1, 20) - 1).unwrap_or(0);
    FIRST_WAIT_MS.saturating_mul(2_i64.saturating_pow(doublings)).min(LONGEST_WAIT_MS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_some_hours() {
        let waits: Vec<_> = [1, 2, 3, 9, 10, i64::MAX].into_iter().map(|attempts| wait_ms(attempts) / 1_000).collect();
        assert_eq!(waits, [30, 60, 120, 7_680, 14_400, 14_400]);
        assert!(HELD > SEND_TIMEOUT + Duration::from_mins(1));
    }
}
