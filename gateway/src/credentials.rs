//! The kinds of credential in words: what a caller is told who comes with one that a path does not take.
//!
//! Which kind it is, its form says, so nothing is told of whether such a credential exists.

use paperkey_proto::{Error, options::v1::Caller};

use crate::table::Kinds;

/// The kinds that a caller can hold, as sentences name them, and what each opens.
const KINDS: [(Caller, &str, &str); 7] = [
    (
        Caller::TeamKey,
        "a team key (pk_live_, pk_test_, pb_live_, pb_test_)",
        "opens the paths of its team under /api/v1 and those of the key platform under /v1",
    ),
    (
        Caller::FreeKey,
        "a free key (pk_free_)",
        "opens the paths of its team under /api/v1 and those of the key platform under /v1",
    ),
    (
        Caller::UserToken,
        "a user token (po_ut_)",
        "opens the paths of its team under /api/v1 and those of the key platform under /v1",
    ),
    (
        Caller::SystemKey,
        "a system key (po_sk_)",
        "opens the paths under /api/v1 and those of the key platform under /v1",
    ),
    (
        Caller::ProductPublicKey,
        "a product's public key (pk_)",
        "ships in apps, where everybody can read it, and opens only the license checks under /v1/licenses",
    ),
    (
        Caller::ProductSecretKey,
        "a product's secret key (sk_)",
        "opens only its own product and that product's licenses, under /products and /licenses",
    ),
    (
        Caller::Account,
        "the token of an account (from POST /auth/login)",
        "opens the paths of the dashboard: /auth, /teams, /products and /licenses",
    ),
];

/// The refusal of a credential whose kind is not accepted where it was sent.
pub(crate) fn wrong_kind(sent: Caller, accepted: Kinds) -> Error {
    let Some((_, name, opens)) = KINDS.iter().find(|(kind, _, _)| *kind == sent) else {
        return Error::unauthenticated();
    };
    let taken: Vec<&str> = KINDS.iter().filter(|(kind, _, _)| accepted.has(*kind)).map(|(_, name, _)| *name).collect();
    let instead = match taken.split_last() {
        None => "Send no credential here.".to_owned(),
        Some((only, [])) => format!("Send {only} here."),
        Some((last, others)) => format!("Send {} or {last} here.", others.join(", ")),
    };
    let name = capitalised(name);
    Error::unauthenticated()
        .with_message(format!("{name} is not accepted here"))
        .with_agent_message(format!("{name} {opens}. {instead} Do not retry with this one."))
}

fn capitalised(text: &str) -> String {
    let mut characters = text.chars();
    characters.next().map_or_else(String::new, |first| first.to_uppercase().chain(characters).collect())
}

#[cfg(test)]
mod tests {
    use paperkey_proto::{Contract, errors::v1::Reason};

    use super::*;

    #[test]
    fn a_public_key_on_a_team_path_is_told_why_and_what_to_send() {
        let error = wrong_kind(Caller::ProductPublicKey, Kinds::of([Caller::TeamKey, Caller::SystemKey]));
        assert_eq!(error.reason(), Reason::InvalidCredentials);
        assert_eq!(error.message(), "A product's public key (pk_) is not accepted here");
        assert_eq!(
            error.agent_message(),
            "A product's public key (pk_) ships in apps, where everybody can read it, and opens only the license \
             checks under /v1/licenses. Send a team key (pk_live_, pk_test_, pb_live_, pb_test_) or a system key \
             (po_sk_) here. Do not retry with this one."
        );
    }

    #[test]
    fn every_kind_that_a_surface_accepts_has_a_name() {
        for entry in Contract::get().surfaces() {
            for caller in entry.options.callers().filter(|caller| *caller != Caller::Anyone) {
                assert!(KINDS.iter().any(|(kind, _, _)| *kind == caller), "{caller:?}");
                assert!(wrong_kind(caller, Kinds::default()).agent_message().contains("Send no credential here."));
            }
        }
    }
}
