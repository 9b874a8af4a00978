//! What callers can be told, each as one reason of the catalogue.

use std::time::Duration;

use paperkey_proto::{Error, errors::v1::Reason};

use super::{
    api_key::{MAX_TEMPORARY_KEYS, MAX_USER_TOKENS},
    member::{MAX_LETTERS, MAX_PEOPLE},
    team::MAX_TEAMS,
};

/// Why the domain refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    RegistrationClosed,
    EmailTaken,
    WrongEmailOrPassword,
    NoSuchAccount,
    NoSuchTeam,
    NoSuchProduct,
    NoSuchKey,
    TooManyPairs,
    TooManyKeys,
    TooManyTokens,
    TooManyTemporaryKeys,
    KeyRevoked,
    KeyExpired,
    KeyRotated,
    SuccessorInUse,
    KeyIsTemporary,
    NotLive,
    WiderThanCaller,
    TokenOfUser,
    TokenOfOwner,
    BadCredential,
    RotatedMeanwhile,
    TooManyFailures { again_in_ms: i64 },
    WrongCurrentPassword,
    SessionEnded,
    BadResetToken,
    TooManyTeams,
    TeamIsFull,
    TooManyLetters { again_in_ms: i64 },
    InvitedJustNow { again_in_ms: i64 },
    RoleInsufficient,
    OwnersOnly,
    LastOwner,
    AlreadyMember,
    NoSuchMember,
    NoSuchInvitation,
    OtherConsumption,
    ConsumedMeanwhile,
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::RegistrationClosed => Self::new(Reason::RegistrationClosed),
            Fault::EmailTaken => Self::new(Reason::Conflict).with_message("An account with this email exists"),
            // Which of the two it was stays open: an answer must not tell who has an account.
            Fault::WrongEmailOrPassword => {
                Self::new(Reason::InvalidCredentials).with_message("Email or password is wrong").with_agent_message(
                    "Ask for the right email address and password, or have a link to reset the password mailed by POST \
                     /auth/password/forgot. Do not retry unchanged: failed attempts are counted.",
                )
            }
            Fault::NoSuchAccount => Self::not_found("account"),
            Fault::NoSuchTeam => Self::not_found("team"),
            Fault::NoSuchProduct => Self::not_found("product"),
            Fault::NoSuchKey => Self::not_found("key"),
            Fault::TooManyPairs => Self::new(Reason::KeyLimitReached)
                .with_message("A product has at most 10 active key pairs; revoke one that is no longer in use"),
            Fault::TooManyKeys => Self::new(Reason::KeyLimitReached)
                .with_message("A team has at most 10 active keys, live and test together; revoke one"),
            Fault::TooManyTokens => Self::new(Reason::KeyLimitReached).with_message(format!(
                "A user has at most {MAX_USER_TOKENS} tokens in a team, old halves of rotated ones included; revoke one"
            )),
            Fault::TooManyTemporaryKeys => Self::new(Reason::KeyLimitReached)
                .with_message(format!(
                    "A team has at most {MAX_TEMPORARY_KEYS} temporary keys at a time; revoke one, or wait until one ends"
                ))
                .with_agent_message(
                    "Use a temporary key that was made before, revoke one that is no longer needed, or wait: each ends \
                     within an hour of being made.",
                ),
            Fault::KeyRevoked => Self::new(Reason::Conflict).with_message("The key is revoked"),
            Fault::KeyExpired => Self::new(Reason::Conflict).with_message("The key has expired"),
            Fault::KeyRotated => {
                Self::new(Reason::Conflict).with_message("The key was rotated already; superseded_by names the new one")
            }
            Fault::SuccessorInUse => Self::new(Reason::Conflict)
                .with_message("The key was rotated already, and the new one is in use or ended"),
            Fault::KeyIsTemporary => Self::new(Reason::Conflict)
                .with_message("A temporary key is not rotated; make another one")
                .with_agent_message("Make another temporary key, or a key that lasts. Do not retry."),
            Fault::NotLive => Self::new(Reason::ScopeInsufficient)
                .with_message("Only a live key makes and rotates other keys")
                .with_agent_message("Use a live key of the team instead of a test key. Do not retry with this key."),
            Fault::WiderThanCaller => Self::new(Reason::ScopeInsufficient).with_message(
                "A key rotates only keys that may do no more than itself, no longer and from nowhere else",
            ),
            Fault::TokenOfUser => Self::new(Reason::ScopeInsufficient)
                .with_message("The token of a user is touched only by that user, an Owner or an Admin"),
            Fault::TokenOfOwner => {
                Self::new(Reason::RoleInsufficient).with_message("The token of an Owner is touched only by an Owner")
            }
            Fault::BadCredential | Fault::SessionEnded => Self::unauthenticated(),
            Fault::RotatedMeanwhile => Self::new(Reason::Conflict)
                .with_message("The system key was rotated by someone else at the same moment; rotate it again")
                .with_agent_message("Send the request again, with the key that is now in force."),
            Fault::TooManyFailures { again_in_ms } => {
                Self::new(Reason::AuthRateLimited).with_retry_after(wait(again_in_ms))
            }
            Fault::WrongCurrentPassword => Self::field("current_password", "is not the current password"),
            // Used, expired or made up: nobody is told which.
            Fault::BadResetToken => Self::field("token", "is not valid or was used already; ask for a new link"),
            Fault::TooManyTeams => Self::new(Reason::Conflict)
                .with_message(format!("An account can be in at most {MAX_TEAMS} teams; leave one first")),
            Fault::TeamIsFull => Self::new(Reason::Conflict).with_message(format!(
                "A team has at most {MAX_PEOPLE} members and invitations; remove one that is no longer needed"
            )),
            Fault::TooManyLetters { again_in_ms } => Self::new(Reason::RateLimited)
                .with_message(format!("A team sends at most {MAX_LETTERS} invitations a day"))
                .with_retry_after(wait(again_in_ms)),
            Fault::InvitedJustNow { again_in_ms } => Self::new(Reason::RateLimited)
                .with_message("This address was invited a moment ago")
                .with_retry_after(wait(again_in_ms)),
            Fault::RoleInsufficient => Self::new(Reason::RoleInsufficient),
            Fault::OwnersOnly => {
                Self::new(Reason::RoleInsufficient).with_message("Only an Owner may make, change or remove an Owner")
            }
            Fault::LastOwner => Self::new(Reason::Conflict)
                .with_message("This is the last Owner of the team; make somebody else an Owner first"),
            Fault::AlreadyMember => {
                Self::new(Reason::Conflict).with_message("Somebody with this email is in the team already")
            }
            Fault::NoSuchMember => Self::not_found("member"),
            // Used, expired, made up or somebody else's: nobody is told which.
            Fault::NoSuchInvitation => Self::not_found("invitation"),
            Fault::OtherConsumption => Self::field("consume_id", "was used for another consumption"),
            Fault::ConsumedMeanwhile => Self::unavailable("the counter has changed again and again"),
        }
    }
}

fn wait(ms: i64) -> Duration {
    Duration::from_millis(u64::try_from(ms).unwrap_or(0).max(1))
}
