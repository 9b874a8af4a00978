//! Teams: tiers and roles by their words.

use paperkey_proto::{Error, principal::v1::Role};

/// What a team has paid for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tier {
    Free,
    Starter,
    Builder,
    Pro,
    Scale,
}

impl Tier {
    const ALL: [Self; 5] = [Self::Free, Self::Starter, Self::Builder, Self::Pro, Self::Scale];

    /// The word that is stored and shown.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Free => "free",
            Self::Starter => "starter",
            Self::Builder => "builder",
            Self::Pro => "pro",
            Self::Scale => "scale",
        }
    }

    /// The tier of that word.
    pub(crate) fn parse(word: &str) -> Result<Self, Error> {
        Self::ALL
            .into_iter()
            .find(|tier| tier.word() == word)
            .ok_or_else(|| Error::field("tier", "must be one of free, starter, builder, pro, scale"))
    }
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

/// A team, as one of its members sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MemberTeam {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) tier: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_role_and_tier_comes_back_from_its_word() {
        for role in [Role::Owner, Role::Admin, Role::Manager, Role::Member] {
            assert_eq!(role_of(role_word(role)), role);
        }
        for tier in Tier::ALL {
            assert_eq!(Tier::parse(tier.word()).unwrap(), tier);
        }
    }

    #[test]
    fn a_word_that_is_not_known_allows_nothing() {
        assert_eq!(role_of("OWNER"), Role::Unspecified);
        assert_eq!(role_of(""), Role::Unspecified);
        assert!(Tier::parse("Free").is_err());
    }
}
