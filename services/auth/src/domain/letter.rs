//! Letters: what people are mailed, in plain text.
//!
//! Names are other people's words. Whatever could end a line or turn its direction is taken out of them, so that none can
//! put a header or a line of its own into a mail.

use paperkey_kit::{secrets::Secret, values::plain_time};
use serde::{Deserialize, Serialize};

/// A letter that waits to be sent. It holds links that are as good as a password, so it is stored sealed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Letter {
    /// Somebody is invited into a team.
    Invitation { to: String, team: String, inviter: String, link: Link, expires_at_ms: i64 },
    /// Somebody may have forgotten their password. Whether there is such an account, and whether it was mailed often
    /// enough, is looked up by whoever sends it.
    PasswordReset { reset_id: String, link: Link, expires_at_ms: i64 },
    /// The password of an account was changed.
    PasswordChanged { to: String, at_ms: i64 },
    /// Something that a team should know of. Whether the receiver still hears of it, and where, is looked up by whoever
    /// sends it.
    Alert { user_id: String, team_id: String, team: String, title: String, message: String, test: bool, at_ms: i64 },
}

/// A link that is not printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Link(String);

impl From<&Secret> for Link {
    fn from(link: &Secret) -> Self {
        Self(link.expose().to_owned())
    }
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("[redacted]")
    }
}

/// A letter as it is read.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Text {
    pub(crate) subject: String,
    pub(crate) body: String,
}

impl Letter {
    /// When it is of no more use, if that is known.
    pub(crate) fn useless_from_ms(&self) -> Option<i64> {
        match self {
            Self::Invitation { expires_at_ms, .. } | Self::PasswordReset { expires_at_ms, .. } => Some(*expires_at_ms),
            Self::PasswordChanged { .. } | Self::Alert { .. } => None,
        }
    }

    /// What it says.
    pub(crate) fn text(&self) -> Text {
        match self {
            Self::Invitation { team, inviter, link: Link(link), expires_at_ms, .. } => {
                let (team, inviter, until) = (one_line(team), one_line(inviter), plain_time(*expires_at_ms));
                Text {
                    subject: format!("You are invited to join {team} on Paperkey"),
                    body: format!(
                        "Hello,\n\n\
                         {inviter} has invited you to join the team \"{team}\" on Paperkey.\n\n\
                         To accept, open this link and sign in with this email address,\n\
                         or create an account with it:\n\n\
                         {link}\n\n\
                         The link works once, and until {until}.\n\n\
                         If you do not know the sender, you can ignore this mail.\n"
                    ),
                }
            }
            Self::PasswordReset { link: Link(link), .. } => Text {
                subject: "Set a new password for Paperkey".to_owned(),
                body: format!(
                    "Hello,\n\n\
                     Somebody, probably you, asked to set a new password for your\n\
                     Paperkey account. To do so, open this link:\n\n\
                     {link}\n\n\
                     The link works once, for 30 minutes. Setting a new password signs\n\
                     you out everywhere.\n\n\
                     If it was not you, ignore this mail: your password stays as it is.\n"
                ),
            },
            Self::PasswordChanged { at_ms, .. } => {
                let at = plain_time(*at_ms);
                Text {
                    subject: "Your Paperkey password was changed".to_owned(),
                    body: format!(
                        "Hello,\n\n\
                         The password of your Paperkey account was changed\n\
                         on {at}. All sessions were signed out.\n\n\
                         If it was not you, set a new password at once by \"Forgot password\"\n\
                         on the sign-in page, and tell the people who run this installation.\n"
                    ),
                }
            }
            Self::Alert { team, title, message, test, at_ms, .. } => {
                let (team, title, message, at) =
                    (one_line(team), one_line(title), one_line(message), plain_time(*at_ms));
                let mode = if *test { ", in test mode" } else { "" };
                Text {
                    subject: format!("{title}: {team}"),
                    body: format!(
                        "Hello,\n\n\
                         {message}.\n\n\
                         It was noticed on {at}, in the team \"{team}\"{mode}.\n\
                         More of the same within the hour is counted in the alerts of the\n\
                         dashboard, and not mailed.\n\n\
                         You are told since you are an Owner or Admin of the team.\n"
                    ),
                }
            }
        }
    }
}

/// A text without anything that ends a line or turns its direction.
pub(crate) fn one_line(text: &str) -> String {
    let turns = |c: char| matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}' | '\u{2029}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars().map(|c| if c.is_control() || turns(c) { ' ' } else { c }).collect::<String>().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn invitation(team: &str) -> Letter {
        Letter::Invitation {
            to: "bob@example.com".into(),
            team: team.into(),
            inviter: "Ada (ada@example.com)".into(),
            link: Link::from(&Secret::new("https://paperkey.example.com/app/accept-invitation?token=abc")),
            expires_at_ms: 1_798_675_200_000,
        }
    }

    #[test]
    fn an_invitation_says_who_where_and_until_when() {
        let text = invitation("Engines").text();
        assert_eq!(text.subject, "You are invited to join Engines on Paperkey");
        for said in ["Ada (ada@example.com)", "\"Engines\"", "?token=abc\n", "31 December 2026, 00:00 UTC"] {
            assert!(text.body.contains(said), "{said}");
        }
    }

    #[test]
    fn a_name_has_no_line_of_its_own() {
        let text = invitation("Engines\r\nBcc: eve@example.com\u{2028}\u{202e}\u{0}").text();
        assert!(!text.subject.contains(['\r', '\n', '\u{2028}', '\u{202e}', '\u{0}']), "{:?}", text.subject);
        assert!(!text.body.contains("\nBcc") && !text.body.contains('\r'), "{}", text.body);
    }

    #[test]
    fn an_alert_says_what_happened_in_which_team() {
        let alert = |message: &str| Letter::Alert {
            user_id: "usr_1".into(),
            team_id: "team_1".into(),
            team: "Engines".into(),
            title: "Webhook paused".into(),
            message: message.into(),
            test: true,
            at_ms: 1_798_675_200_000,
        };
        let text = alert("The webhook wh_1 is paused\r\nBcc: eve@example.com").text();
        assert_eq!(text.subject, "Webhook paused: Engines");
        for said in ["The webhook wh_1 is paused", "31 December 2026, 00:00 UTC", "\"Engines\", in test mode"] {
            assert!(text.body.contains(said), "{said}");
        }
        assert!(!text.body.contains("\nBcc") && !text.body.contains('\r'), "{}", text.body);
    }

    #[test]
    fn no_letter_prints_its_link() {
        let letter = invitation("Engines");
        assert!(!format!("{letter:?}").contains("abc"));
        let stored = serde_json::to_vec(&letter).unwrap();
        assert_eq!(serde_json::from_slice::<Letter>(&stored).unwrap(), letter);
    }
}
