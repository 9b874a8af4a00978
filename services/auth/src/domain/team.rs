//! Teams: roles by their words, tiers by their names, and who may give which role.

use paperkey_kit::{config::Tiers, policy::role_allows};
use paperkey_proto::{Error, options::v1::Scope, principal::v1::Role};

use super::Fault;

/// How many teams one account may be in.
pub(crate) const MAX_TEAMS: u64 = 50;

const MAX_NAME_CHARS: usize = 100;

/// How long after its deletion the rows of a team are removed, in milliseconds: what was under way then has ended.
pub(crate) const REMOVED_AFTER_MS: i64 = 60_000;

/// The name of a configured tier.
pub(crate) fn tier_name(tiers: &Tiers, name: &str) -> Result<String, Error> {
    if tiers.get(name).is_some() {
        return Ok(name.to_owned());
    }
    let known = tiers.iter().map(|(name, _)| name).collect::<Vec<_>>().join(", ");
    Err(Error::field("tier", format!("must be one of {known}")))
}

/// The word under which a role is stored.
pub(crate) fn role_word(role: Role) -> &'static str {
    match role {
        Role::Owner => "owner",
        Role::Admin => "admin",
        Role::Manager => "manager",
        Role::Member => "member",
        Role::Unspecified => "",
    }
}

/// The role of a stored word. A word that is not known allows nothing.
pub(crate) fn role_of(word: &str) -> Role {
    [Role::Owner, Role::Admin, Role::Manager, Role::Member]
        .into_iter()
        .find(|role| role_word(*role) == word)
        .unwrap_or(Role::Unspecified)
}

/// The roles that hear of alerts, by their words.
pub(crate) const HEARING_OF_ALERTS: [&str; 2] = ["owner", "admin"];

/// Whether somebody of a stored role hears of alerts.
pub(crate) fn hears_of_alerts(role: &str) -> bool {
    HEARING_OF_ALERTS.contains(&role)
}

/// A team, as one of its members sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MemberTeam {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) tier: String,
    /// Where the installation has set it for the team.
    pub(crate) requests_per_minute: Option<i64>,
}

/// What becomes of a key that was found where it should not be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum LeakAction {
    Revoke,
    Alert,
}

impl LeakAction {
    /// The word that is stored.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Revoke => "revoke",
            Self::Alert => "alert",
        }
    }

    /// The action of a stored word. A word that is not known does the safer thing.
    pub(crate) fn of(word: &str) -> Self {
        if word == Self::Alert.word() { Self::Alert } else { Self::Revoke }
    }
}

/// A team with its settings, as one of its members sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TeamDetails {
    pub(crate) team: MemberTeam,
    pub(crate) leak_action: LeakAction,
    pub(crate) created_at_ms: i64,
}

/// What is to change in a team; `None` leaves it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TeamChanges {
    pub(crate) name: Option<String>,
    pub(crate) leak_action: Option<LeakAction>,
}

/// The name of a team, trimmed.
pub(crate) fn team_name(name: &str) -> Result<String, Error> {
    let name = name.trim();
    if name.is_empty() {
        return Err(Error::field("name", "must not be empty"));
    }
    if name.chars().any(char::is_control) {
        return Err(Error::field("name", "must not contain control characters"));
    }
    if name.chars().count() > MAX_NAME_CHARS {
        return Err(Error::field("name", format!("must be at most {MAX_NAME_CHARS} characters long")));
    }
    Ok(name.to_owned())
}

/// Whether somebody of that role may change who is in the team.
pub(crate) fn may_manage_people(actor: Role) -> Result<(), Fault> {
    if role_allows(actor, Scope::MembersWrite) { Ok(()) } else { Err(Fault::RoleInsufficient) }
}

/// Whether somebody of that role may also touch one who has, or is to have, one of these roles.
pub(crate) fn may_touch(actor: Role, roles: &[Role]) -> Result<(), Fault> {
    may_manage_people(actor)?;
    if actor != Role::Owner && roles.contains(&Role::Owner) { Err(Fault::OwnersOnly) } else { Ok(()) }
}

/// A role that somebody can be given.
pub(crate) fn given_role(role: Role) -> Result<Role, Error> {
    match role {
        Role::Unspecified => Err(Error::field("role", "must be one of owner, admin, manager, member")),
        role => Ok(role),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_touch_everyone_admins_everyone_but_owners_and_others_nobody() {
        let all = [Role::Owner, Role::Admin, Role::Manager, Role::Member];
        for role in all {
            assert_eq!(may_touch(Role::Owner, &[role]), Ok(()));
            let by_admin = if role == Role::Owner { Err(Fault::OwnersOnly) } else { Ok(()) };
            assert_eq!(may_touch(Role::Admin, &[Role::Member, role]), by_admin);
            for weak in [Role::Manager, Role::Member, Role::Unspecified] {
                assert_eq!(may_touch(weak, &[role]), Err(Fault::RoleInsufficient));
            }
        }
    }

    #[test]
    fn a_team_has_a_name_of_one_to_a_hundred_characters() {
        assert_eq!(team_name("  Ada & Co  ").unwrap(), "Ada & Co");
        for bad in ["", "   ", "a\nb", "a\u{0}", &"ä".repeat(101)] {
            assert_eq!(team_name(bad).unwrap_err().violations()[0].field, "name", "{bad:?}");
        }
        assert!(team_name(&"ä".repeat(100)).is_ok());
    }

    #[test]
    fn every_role_comes_back_from_its_word() {
        for role in [Role::Owner, Role::Admin, Role::Manager, Role::Member] {
            assert_eq!(role_of(role_word(role)), role);
        }
    }

    #[test]
    fn a_tier_is_one_that_is_configured() {
        let tiers = Tiers::default();
        assert_eq!(tier_name(&tiers, "scale").unwrap(), "scale");
        let refused = tier_name(&tiers, "Free").unwrap_err();
        assert_eq!(refused.violations()[0].message, "must be one of builder, free, pro, scale, starter");
    }

    #[test]
    fn those_hear_of_alerts_who_may_read_them() {
        for role in [Role::Owner, Role::Admin, Role::Manager, Role::Member, Role::Unspecified] {
            assert_eq!(hears_of_alerts(role_word(role)), role_allows(role, Scope::AuditRead), "{role:?}");
        }
    }

    #[test]
    fn a_word_that_is_not_known_allows_nothing() {
        assert_eq!(role_of("OWNER"), Role::Unspecified);
        assert_eq!(role_of(""), Role::Unspecified);
    }
}
