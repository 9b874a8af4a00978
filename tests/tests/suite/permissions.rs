//! Who may call what: the page that people read, and the function that judges, say the same.

use std::{fs, path::Path};

use paperkey_kit::policy::authorize;
use paperkey_proto::{
    Contract,
    errors::v1::Reason,
    options::v1::{Caller, Tenant},
    principal::v1::{Mode, Principal},
};
use paperkey_tests::holders::{Holder, Verdict, permissions_page};

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/permissions.md");

#[test]
fn the_page_of_permissions_is_that_of_the_contract() {
    let expected = permissions_page();
    if std::env::var_os("UPDATE_DOCS").is_some() {
        fs::create_dir_all(Path::new(PAGE).parent().expect("it stands in a folder")).expect("docs can be made");
        fs::write(PAGE, &expected).expect("the page can be written");
    }
    let page = fs::read_to_string(PAGE).unwrap_or_default();
    assert!(page == expected, "docs/permissions.md is stale: UPDATE_DOCS=1 scripts/test -p paperkey-tests permissions");
}

#[test]
fn the_judgement_is_that_of_the_page_for_every_method_and_caller() {
    let mut judged = 0;
    let holders = Holder::TABLE.into_iter().chain([Holder::MEMBERS_TOKEN]);
    for holder in holders.filter(|holder| holder.kind.is_some()) {
        let principal = Principal {
            kind: holder.kind.unwrap_or_default().into(),
            id: "key_1".into(),
            team_id: "team_1".into(),
            mode: Mode::Live.into(),
            role: holder.role.into(),
            scopes: holder.scopes().into_iter().map(Into::into).collect(),
            read_only: holder.read_only,
            ..Principal::default()
        };
        for method in Contract::get().methods().iter().filter(|method| method.is_public()) {
            // A credential is not looked at where only strangers are served.
            if method.callers == [Caller::Anyone] {
                continue;
            }
            let expected = match holder.verdict(method, |_| true) {
                Verdict::Through => None,
                Verdict::Unauthenticated => Some(Reason::InvalidCredentials),
                Verdict::ScopeInsufficient => Some(Reason::ScopeInsufficient),
                Verdict::RoleInsufficient => Some(Reason::RoleInsufficient),
            };
            let outcome = authorize(method, &principal, 0).err().map(|error| error.reason());
            assert_eq!(outcome, expected, "{} by {}", method.path, holder.name);
            judged += 1;
        }
    }
    assert!(judged > 500, "{judged}");
}

#[test]
fn a_credential_without_a_team_reaches_no_team() {
    for kind in [Caller::Account, Caller::SystemKey] {
        let holder = if kind == Caller::Account { Holder::OWNER } else { Holder::SYSTEM_KEY };
        let principal = Principal {
            kind: kind.into(),
            scopes: holder.scopes().into_iter().map(Into::into).collect(),
            ..Principal::default()
        };
        for method in Contract::get().methods().iter().filter(|method| method.is_public() && method.serves(kind)) {
            let outcome = authorize(method, &principal, 0).map_err(|error| error.reason());
            match method.policy.tenant() {
                Tenant::None => assert_eq!(outcome, Ok(()), "{}", method.path),
                Tenant::Any if kind == Caller::SystemKey => assert_eq!(outcome, Ok(()), "{}", method.path),
                _ if kind == Caller::SystemKey => assert_eq!(outcome, Err(Reason::ValidationFailed), "{}", method.path),
                _ => assert_eq!(outcome, Err(Reason::NotFound), "{}", method.path),
            }
        }
    }
}
