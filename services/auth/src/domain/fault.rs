//! What callers can be told, each as one reason of the catalogue.

use paperkey_proto::{Error, errors::v1::Reason};

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
    RotatedMeanwhile,
}

impl From<Fault> for Error {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::RegistrationClosed => Self::new(Reason::RegistrationClosed),
            Fault::EmailTaken => Self::new(Reason::Conflict).with_message("An account with this email exists"),
            // Which of the two it was stays open: an answer must not tell who has an account.
            Fault::WrongEmailOrPassword => {
                Self::new(Reason::InvalidCredentials).with_message("Email or password is wrong")
            }
            Fault::NoSuchAccount => Self::not_found("account"),
            Fault::NoSuchTeam => Self::not_found("team"),
            Fault::NoSuchProduct => Self::not_found("product"),
            Fault::NoSuchKey => Self::not_found("key"),
            Fault::TooManyPairs => Self::new(Reason::KeyLimitReached)
                .with_message("A product has at most 10 active key pairs; revoke one that is no longer in use"),
            Fault::RotatedMeanwhile => Self::new(Reason::Conflict)
                .with_message("The system key was rotated by someone else at the same moment; rotate it again"),
        }
    }
}
