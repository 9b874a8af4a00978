//! Accounts: how emails are told apart, what a password must be, what a first team is called.

use paperkey_kit::secrets::Secret;
use paperkey_proto::Error;

const MAX_EMAIL_CHARS: usize = 254;
const MIN_PASSWORD_CHARS: usize = 8;
const MAX_PASSWORD_CHARS: usize = 256;
const MAX_NAME_CHARS: usize = 100;

/// How many logins of one address may fail within [`FAILURES_WINDOW_MS`]; after that none is looked at.
pub(crate) const MAX_FAILURES: i64 = 10;
/// How long failures count, from the first of them, in milliseconds.
pub(crate) const FAILURES_WINDOW_MS: i64 = 15 * 60 * 1_000;

/// How long the link of a forgotten password is good, in milliseconds.
pub(crate) const RESET_LIFETIME_MS: i64 = 30 * 60 * 1_000;
/// How many such links are mailed to one account within [`RESETS_WINDOW_MS`].
pub(crate) const MAX_RESET_MAILS: u64 = 5;
/// See there.
pub(crate) const RESETS_WINDOW_MS: i64 = 60 * 60 * 1_000;

/// An email address, as it was written and as it is compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Email {
    pub(crate) shown: String,
    pub(crate) lower: String,
}

impl Email {
    /// Reads an address. What a mail server would say of it, is said by the mail server.
    pub(crate) fn parse(text: &str) -> Result<Self, Error> {
        let shown = text.trim();
        let whole = shown
            .split_once('@')
            .is_some_and(|(local, domain)| !local.is_empty() && !domain.is_empty() && !domain.contains('@'));
        let strange = |c: char| c.is_whitespace() || c.is_control();
        if !whole || shown.chars().any(strange) || shown.chars().count() > MAX_EMAIL_CHARS {
            return Err(Error::field("email", "must be an email address"));
        }
        Ok(Self { shown: shown.to_owned(), lower: shown.to_lowercase() })
    }

    /// What stands before the `@`.
    pub(crate) fn local_part(&self) -> &str {
        self.shown.split('@').next().unwrap_or_default()
    }
}

/// Refuses a password that is too short to be safe, or so long that hashing it is an attack.
pub(crate) fn check_password(password: &Secret) -> Result<(), Error> {
    let length = password.expose().chars().count();
    if length < MIN_PASSWORD_CHARS {
        let message = format!("must be at least {MIN_PASSWORD_CHARS} characters long");
        return Err(Error::field("password", message));
    }
    if length > MAX_PASSWORD_CHARS {
        return Err(Error::field("password", format!("must be at most {MAX_PASSWORD_CHARS} characters long")));
    }
    Ok(())
}

/// A person's name, trimmed; an empty one is none.
pub(crate) fn person_name(name: Option<&str>) -> Result<Option<String>, Error> {
    let Some(name) = name.map(str::trim).filter(|name| !name.is_empty()) else { return Ok(None) };
    if name.chars().any(char::is_control) {
        return Err(Error::field("name", "must not contain control characters"));
    }
    if name.chars().count() > MAX_NAME_CHARS {
        return Err(Error::field("name", format!("must be at most {MAX_NAME_CHARS} characters long")));
    }
    Ok(Some(name.to_owned()))
}

/// An address as failed logins are counted under it: also what is none costs a place.
pub(crate) fn counted_as(email: &str) -> String {
    email.trim().to_lowercase()
}

/// What the first team of an account is called.
pub(crate) fn first_team_name(name: Option<&str>, email: &Email) -> String {
    format!("{}'s team", name.unwrap_or_else(|| email.local_part()))
}

/// An account, without its password.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) id: String,
    pub(crate) email: String,
    pub(crate) name: Option<String>,
    pub(crate) session_epoch: i64,
    pub(crate) created_at_ms: i64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_email_is_compared_without_case_and_shown_as_written() {
        let email = Email::parse("  Ada@Example.COM ").unwrap();
        assert_eq!((email.shown.as_str(), email.lower.as_str()), ("Ada@Example.COM", "ada@example.com"));
    }

    #[test]
    fn what_is_no_email_is_refused() {
        for nonsense in ["", "@", "a@", "@b", "a b@c", "a@b@c", "a\u{0}@b", &format!("{}@b", "a".repeat(260))] {
            assert!(Email::parse(nonsense).is_err(), "{nonsense:?}");
        }
    }

    #[test]
    fn the_first_team_bears_the_name_or_the_local_part() {
        let email = Email::parse("ada@example.com").unwrap();
        assert_eq!(first_team_name(Some("Ada L."), &email), "Ada L.'s team");
        assert_eq!(first_team_name(None, &email), "ada's team");
    }

    #[test]
    fn names_are_trimmed_and_hold_no_controls() {
        assert_eq!(person_name(Some("  Ada ")).unwrap().as_deref(), Some("Ada"));
        assert_eq!(person_name(Some("   ")).unwrap(), None);
        assert!(person_name(Some("A\u{0}da")).is_err());
    }

    #[test]
    fn passwords_have_eight_to_256_characters() {
        assert!(check_password(&Secret::new("ä".repeat(7))).is_err());
        assert!(check_password(&Secret::new("ä".repeat(8))).is_ok());
        assert!(check_password(&Secret::new("ä".repeat(256))).is_ok());
        assert!(check_password(&Secret::new("ä".repeat(257))).is_err());
    }
}
