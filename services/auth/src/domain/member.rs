//! Those who are in a team, and those who are invited; and the place in their list where a page ends.

use paperkey_proto::{Error, principal::v1::Role};

/// How many members and invitations a team has at most.
pub(crate) const MAX_PEOPLE: u64 = 100;

/// How long an invitation is good, in milliseconds.
pub(crate) const INVITATION_LIFETIME_MS: i64 = 7 * 24 * 60 * 60 * 1_000;

/// How many invitations a team has mailed within [`LETTERS_WINDOW_MS`]; each is a mail to somebody who may not want it.
pub(crate) const MAX_LETTERS: i64 = 100;
/// How long they count, from the first of them, in milliseconds.
pub(crate) const LETTERS_WINDOW_MS: i64 = 24 * 60 * 60 * 1_000;
/// How long after an invitation the same address is not mailed by the same team again, in milliseconds.
pub(crate) const LETTERS_APART_MS: i64 = 60 * 1_000;

/// What ids of invitations begin with.
pub(crate) const INVITATION_PREFIX: &str = "inv";

/// Whether an id is one of an invitation.
pub(crate) fn is_invitation(id: &str) -> bool {
    id.strip_prefix(INVITATION_PREFIX).is_some_and(|rest| rest.starts_with('_'))
}

/// Somebody who is in a team, or is invited.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Member {
    pub(crate) id: String,
    pub(crate) email: String,
    pub(crate) name: Option<String>,
    pub(crate) role: Role,
    /// When they joined, or were invited.
    pub(crate) since_ms: i64,
    /// When the invitation ends; `None` of a member.
    pub(crate) expires_at_ms: Option<i64>,
}

/// Where a page of members ended: those who are invited come first, and then the members, both the newest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) invited: bool,
    pub(crate) since_ms: i64,
    pub(crate) id: String,
}

impl Place {
    /// As it travels in a page token, which holds what could be an id.
    pub(crate) fn encode(member: &Member) -> String {
        format!("{}_{}", member.since_ms, member.id)
    }

    /// Reads it back.
    pub(crate) fn decode(text: &str) -> Result<Self, Error> {
        let parts = text.split_once('_').and_then(|(since_ms, id)| Some((since_ms.parse().ok()?, id)));
        let (since_ms, id) =
            parts.ok_or_else(|| Error::field("page_token", "must be the next page token of an earlier answer"))?;
        Ok(Self { invited: is_invitation(id), since_ms, id: id.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_in_the_list_comes_back_from_its_token() {
        let member = Member {
            id: "usr_1".into(),
            email: "ada@example.com".into(),
            name: None,
            role: Role::Owner,
            since_ms: 1_790_000_000_000,
            expires_at_ms: None,
        };
        let place = Place::decode(&Place::encode(&member)).unwrap();
        assert_eq!(place, Place { invited: false, since_ms: member.since_ms, id: member.id.clone() });
        let invited = Member { id: "inv_1".into(), ..member };
        assert!(Place::decode(&Place::encode(&invited)).unwrap().invited);
        for nonsense in ["", "usr_1", "1", "x_usr_1", "99999999999999999999_usr_1"] {
            assert!(Place::decode(nonsense).is_err(), "{nonsense}");
        }
    }

    #[test]
    fn invitations_are_told_by_their_ids() {
        assert!(is_invitation("inv_1"));
        assert!(!is_invitation("usr_1") && !is_invitation("invoice_1") && !is_invitation(""));
    }
}
