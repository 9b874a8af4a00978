//! Who may call what, computed from the contract and asked of the gateway for every method, route and credential; and
//! the doors beside the gateway, which are closed.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use paperkey_kit::{
    clock::Clock,
    principal::{PRINCIPAL_HEADER, Signer},
    secrets::{Keyring, Secret},
    token::TokenKind,
};
use paperkey_proto::{
    Contract, Error,
    auth::v1::{AuthenticateRequest, AuthenticateResponse},
    catalog::v1::{ListProductsRequest, ListProductsResponse},
    contract::Method,
    errors::v1::Reason,
    options::v1::Caller,
    principal::v1::{Mode, Principal, Role},
};
use paperkey_tests::{
    Account, Api, Installation, grpc,
    holders::{Holder, Verdict},
    installation::SERVICES,
    on_both_kinds,
    people::text,
};
use prost::Message as _;
use serde_json::{Value, json};
use tonic::{Code, Status, transport::Channel};

use crate::samples;

on_both_kinds! {
    every_method_answers_every_credential_as_the_contract_says,
    a_cookie_from_elsewhere_opens_no_method,
    internal_methods_cannot_be_reached_from_outside,
    a_forged_principal_means_nothing_at_the_gateway,
    a_credential_counts_only_where_it_is_whole_and_where_it_belongs,
}

/// A caller of some kind, and what they send with every call.
struct Credential {
    name: &'static str,
    holder: Holder,
    headers: Vec<(&'static str, String)>,
}

impl Credential {
    fn new(name: &'static str, holder: Holder, token: &str) -> Self {
        Self { name, holder, headers: vec![("authorization", format!("Bearer {token}"))] }
    }

    fn bad(name: &'static str, token: &str) -> Self {
        Self::new(name, Holder::BAD, token)
    }

    #[must_use]
    fn for_team(mut self, team_id: &str) -> Self {
        self.headers.retain(|(name, _)| *name != "paperkey-team");
        self.headers.push(("paperkey-team", team_id.to_owned()));
        self
    }

    fn api(&self, install: &Installation) -> Api {
        self.headers.iter().fold(install.api(), |api, (name, value)| api.with(name, value))
    }

    fn metadata(&self) -> HeaderMap {
        let entry = |(name, value): &(&'static str, String)| {
            (HeaderName::from_static(name), HeaderValue::from_str(value).expect("tests send what a header can hold"))
        };
        self.headers.iter().map(entry).collect()
    }
}

/// A team with people of every role and a credential of every kind.
struct Arena {
    owner: Account,
    credentials: Vec<Credential>,
    /// Teams of the same people, for calls that end a team or a membership.
    spare_teams: Vec<String>,
}

impl Arena {
    async fn of(install: &Installation) -> Self {
        let (owner, api) = (install.register().await, install.api());
        let product = owner.create_product("App").await;
        let foreigner = install.register().await;
        let people = [install.register().await, install.register().await, install.register().await];
        let roles = ["member", "manager", "admin"];
        let mut spare_teams = Vec::new();
        for _ in 0..4 {
            spare_teams.push(text(owner.post("/teams", json!({"name": "Spare"})).await.gives(201), "/id"));
        }
        for team_id in spare_teams.iter().chain([&owner.team_id]) {
            for (person, role) in people.iter().zip(roles) {
                owner.takes_in(team_id, person, role).await;
            }
        }
        let [member, manager, admin] = people;
        let api_keys = format!("/teams/{}/api-keys", owner.team_id);
        let make = async |body: Value| text(owner.post(&api_keys, body).await.gives(201), "/key");
        let by_key = api.with_key(&owner.live_key);
        let platform_test = by_key.post("/v1/keys", json!({"name": "Child", "type": "test"})).await;
        let anonymous = api.post("/v1/keys/test", json!({})).await;
        let mut altered = owner.token.clone();
        altered.replace_range(altered.len() - 4.., if altered.ends_with("AAAA") { "BBBB" } else { "AAAA" });
        let of_member =
            |person: &Account, name, holder| Credential::new(name, holder, &person.token).for_team(&owner.team_id);
        let credentials = vec![
            Credential { name: "nobody", holder: Holder::NOBODY, headers: Vec::new() },
            Credential::bad("nonsense", "nonsense"),
            Credential::bad("an unknown team key", &TokenKind::TeamLive.generate()),
            Credential::bad("an unknown user token", &TokenKind::User.generate()),
            Credential::bad("an unknown product key", &TokenKind::ProductPublic.generate()),
            Credential::bad("an unknown secret key", &TokenKind::ProductSecret.generate()),
            Credential::bad("an unknown system key", &TokenKind::System.generate()),
            Credential::bad("a session with another signature", &altered),
            Credential::bad("a session without a signature", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ1c3JfMSJ9."),
            of_member(&member, "a Member", Holder::MEMBER),
            of_member(&manager, "a Manager", Holder::MANAGER),
            of_member(&admin, "an Admin", Holder::ADMIN),
            Credential::new("an Owner", Holder::OWNER, &owner.token),
            Credential::new("an Owner of another team", Holder::OWNER, &foreigner.token),
            Credential::new("pk_live_", Holder::TEAM_KEY, &make(json!({"name": "Live", "mode": "live"})).await),
            Credential::new("pk_test_", Holder::TEAM_KEY, &make(json!({"name": "Test", "mode": "test"})).await),
            Credential::new(
                "a read-only pk_live_",
                Holder::READ_ONLY_KEY,
                &make(json!({"name": "Reader", "mode": "live", "scope": "read_only"})).await,
            ),
            Credential::new("pb_live_", Holder::TEAM_KEY, &owner.live_key),
            Credential::new("pb_test_", Holder::TEAM_KEY, &text(platform_test.gives(201), "/key")),
            Credential::new("an anonymous pb_test_", Holder::TEAM_KEY, &text(anonymous.gives(201), "/key")),
            Credential::new("pk_free_", Holder::FREE_KEY, &owner.free_key),
            Credential::new(
                "an Owner's po_ut_",
                Holder::OWNERS_TOKEN,
                &make(json!({"name": "Mine", "kind": "user_token"})).await,
            ),
            Credential::new(
                "a Member's po_ut_",
                Holder::MEMBERS_TOKEN,
                &make(json!({"name": "Theirs", "kind": "user_token", "userId": member.user_id})).await,
            ),
            Credential::new("po_sk_", Holder::SYSTEM_KEY, &install.system_key().await).for_team(&owner.team_id),
            Credential::new("pk_", Holder::PUBLIC_KEY, &product.public_key),
            Credential::new("sk_", Holder::SECRET_KEY, &product.secret_key),
        ];
        Self { owner, credentials, spare_teams }
    }

    /// The team that a call is for. One that ends a team, or a membership, has a team of its own.
    fn team(&self, method: &Method, over_grpc: bool) -> &str {
        let at = usize::from(over_grpc);
        match method.descriptor.name() {
            "DeleteTeam" => &self.spare_teams[at],
            "LeaveTeam" => &self.spare_teams[2 + at],
            _ => &self.owner.team_id,
        }
    }
}

/// Whoever calls, as somebody who can be done without where the call ends all their sessions.
async fn stand_in(install: &Installation, method: &Method, credential: &Credential) -> Option<Credential> {
    let is_person = credential.holder.kind == Some(Caller::Account);
    if method.descriptor.name() != "Logout" || !is_person {
        return None;
    }
    Some(Credential::new(credential.name, credential.holder, &install.register().await.token))
}

/// What events of a team show are its keys and alerts: watching them asks for the right to read keys as well.
fn watched(expected: Verdict, method: &Method, of_team: bool, holder: &Holder) -> Verdict {
    let is_watching = of_team && method.descriptor.name() == "WatchEvents" && expected == Verdict::Through;
    if is_watching && matches!(holder.role, Role::Manager | Role::Member) {
        Verdict::RoleInsufficient
    } else {
        expected
    }
}

/// Why such a call is refused; not at all where its content is judged.
fn reason_of(verdict: Verdict) -> Option<Reason> {
    match verdict {
        Verdict::Unauthenticated => Some(Reason::InvalidCredentials),
        Verdict::ScopeInsufficient => Some(Reason::ScopeInsufficient),
        Verdict::RoleInsufficient => Some(Reason::RoleInsufficient),
        Verdict::Through => None,
    }
}

async fn every_method_answers_every_credential_as_the_contract_says(install: Installation) {
    let arena = Arena::of(&install).await;
    let channel = grpc::connect(&install.url()).await;
    let (mut asked, mut wrong) = (0, Vec::new());
    for method in Contract::get().methods().iter().filter(|method| method.is_public()) {
        for credential in &arena.credentials {
            for route in &method.routes {
                let stand_in = stand_in(&install, method, credential).await;
                let caller = stand_in.as_ref().unwrap_or(credential);
                let team_id = arena.team(method, false);
                let path = samples::path(route, |name| match name {
                    "team_id" => team_id.to_owned(),
                    _ => samples::NOBODYS.to_owned(),
                });
                let of_team = !route.variables.iter().any(|name| name == "product_id");
                let expected = caller.holder.over_rest(method, route.surface);
                let expected = watched(expected, method, of_team, &caller.holder);
                let answer = if method.answers_with_lines() {
                    // One that is let in would go on for minutes.
                    let lines = caller.api(&install).lines(&path).await;
                    if lines.head.status == 200 { lines.head } else { lines.whole().await }
                } else {
                    caller.api(&install).call(route.verb.clone(), &path, route.body.then(|| json!({}))).await
                };
                let reason = reason_of(expected);
                let status = reason.map(|reason| paperkey_proto::error::entry(reason).http_status);
                let refused = matches!(answer.status.as_u16(), 401 | 403);
                let as_expected = match status {
                    Some(status) => u32::from(answer.status.as_u16()) == status,
                    None => !refused && !answer.status.is_server_error(),
                };
                if let (true, Some(reason)) = (as_expected, reason) {
                    answer.refused(reason);
                } else if !as_expected {
                    wrong.push(format!(
                        "{} by {}: {expected:?} expected: {} {}",
                        answer.asked,
                        caller.name,
                        answer.status,
                        answer.text()
                    ));
                }
                asked += 1;
            }
            let stand_in = stand_in(&install, method, credential).await;
            let caller = stand_in.as_ref().unwrap_or(credential);
            let expected = watched(caller.holder.over_grpc(method), method, true, &caller.holder);
            let mut metadata = caller.metadata();
            if matches!(method.descriptor.name(), "DeleteTeam" | "LeaveTeam") {
                let team_id = HeaderValue::from_str(arena.team(method, true)).expect("an id fits into a header");
                metadata.insert("paperkey-team", team_id);
            }
            let outcome = grpc::call(&channel, &method.path, Bytes::new(), metadata).await;
            let code = outcome.as_ref().err().map_or(Code::Ok, Status::code);
            let judged = outcome.as_ref().err().map(|status| Error::from_status(status).reason()).filter(|reason| {
                matches!(reason, Reason::InvalidCredentials | Reason::ScopeInsufficient | Reason::RoleInsufficient)
            });
            let sound = matches!(
                code,
                Code::Ok
                    | Code::Unauthenticated
                    | Code::PermissionDenied
                    | Code::InvalidArgument
                    | Code::NotFound
                    | Code::AlreadyExists
                    | Code::FailedPrecondition
            );
            if judged != reason_of(expected) || !sound {
                wrong.push(format!("{} by {}: {expected:?} expected: {outcome:?}", method.path, caller.name));
            }
            asked += 1;
        }
    }
    assert!(asked > 3_000, "the contract has methods: {asked} calls");
    assert!(wrong.is_empty(), "{} of {asked} calls went wrong:\n{}", wrong.len(), wrong.join("\n"));
}

/// A browser sends its cookie along whoever made it call. Where people are served, such a call is refused; everywhere
/// else the cookie says nothing.
async fn a_cookie_from_elsewhere_opens_no_method(install: Installation) {
    let owner = install.register().await;
    let channel = grpc::connect(&install.url()).await;
    let cookie = ("cookie", format!("paperkey_session={}", owner.token));
    let (mut asked, mut people, mut wrong) = (0, 0, Vec::new());
    for origin in [None, Some("null"), Some("https://evil.example")] {
        let mut headers = vec![cookie.clone()];
        headers.extend(origin.map(|origin| ("origin", origin.to_owned())));
        let caller = Credential { name: "an Owner's browser", holder: Holder::NOBODY, headers };
        for method in Contract::get().methods().iter().filter(|method| method.is_public()) {
            let expected = |serves_people: bool, otherwise: Verdict| {
                if serves_people { Verdict::ScopeInsufficient } else { otherwise }
            };
            for route in &method.routes {
                let surfaces = Contract::get().surfaces();
                let surface = surfaces.iter().find(|entry| entry.surface == route.surface).expect("it is declared");
                let takes_people = surface.options.callers().any(|kind| kind == Caller::Account);
                let expected = expected(
                    takes_people && method.serves(Caller::Account),
                    caller.holder.over_rest(method, route.surface),
                );
                people += usize::from(expected == Verdict::ScopeInsufficient);
                let path = samples::path(route, |name| match name {
                    "team_id" => owner.team_id.clone(),
                    _ => samples::NOBODYS.to_owned(),
                });
                let answer = caller.api(&install).call(route.verb.clone(), &path, route.body.then(|| json!({}))).await;
                match reason_of(expected) {
                    Some(reason) => drop(answer.refused(reason)),
                    None if matches!(answer.status.as_u16(), 401 | 403 | 500..) => {
                        wrong.push(format!("{} from {origin:?}: {}", answer.asked, answer.text()));
                    }
                    None => {}
                }
                assert!(!answer.headers.contains_key("set-cookie"), "{}", answer.asked);
                asked += 1;
            }
            let expected = expected(method.serves(Caller::Account), caller.holder.over_grpc(method));
            let outcome = grpc::call(&channel, &method.path, Bytes::new(), caller.metadata()).await;
            let judged = outcome.as_ref().err().map(|status| Error::from_status(status).reason()).filter(|reason| {
                matches!(reason, Reason::InvalidCredentials | Reason::ScopeInsufficient | Reason::RoleInsufficient)
            });
            if judged != reason_of(expected) {
                wrong.push(format!("{} from {origin:?}: {expected:?} expected: {outcome:?}", method.path));
            }
            asked += 1;
        }
    }
    assert!(asked > 300 && people > 100, "the contract has methods: {asked} calls, {people} of them where people are");
    assert!(wrong.is_empty(), "{} of {asked} calls went wrong:\n{}", wrong.len(), wrong.join("\n"));
    owner.get("/auth/me").await.gives(200);
}

async fn internal_methods_cannot_be_reached_from_outside(install: Installation) {
    let Arena { owner, credentials, .. } = Arena::of(&install).await;
    let channel = grpc::connect(&install.url()).await;
    let internal = || Contract::get().methods().iter().filter(|method| !method.is_public());
    assert!(internal().count() >= 4);
    for method in internal() {
        for credential in &credentials {
            let outcome = grpc::call(&channel, &method.path, Bytes::new(), credential.metadata()).await;
            let code = outcome.as_ref().err().map(Status::code);
            let hidden = matches!(code, Some(Code::Unimplemented | Code::NotFound));
            assert!(hidden, "{} by {}: {outcome:?}", method.path, credential.name);
        }
        let api = install.api().with_key(&owner.live_key);
        api.post(&method.path, json!({})).await.refused(Reason::NotFound);
        let web = grpc::web_call(&api, &method.path, &ListProductsRequest::default(), false).await;
        assert!(matches!(web.status, Code::Unimplemented | Code::NotFound), "{} over gRPC-Web: {web:?}", method.path);
    }
}

/// An owner of that team, as the gateway would describe them to a service.
fn principal_of(owner: &Account) -> Principal {
    Principal {
        kind: Caller::Account.into(),
        id: owner.user_id.clone(),
        name: owner.email.clone(),
        user_id: owner.user_id.clone(),
        team_id: owner.team_id.clone(),
        mode: Mode::Live.into(),
        role: Role::Owner.into(),
        ..Principal::default()
    }
}

fn service_principal() -> Principal {
    Principal { kind: Caller::Service.into(), id: "gateway".into(), name: "gateway".into(), ..Principal::default() }
}

fn assertion(signer: &Signer, principal: &Principal, rpc: &str) -> HeaderMap {
    let name = HeaderName::from_static(PRINCIPAL_HEADER);
    HeaderMap::from_iter([(name, signer.sign(Some(principal), rpc, "req_forged"))])
}

const LIST_PRODUCTS: &str = "/paperkey.catalog.v1.CatalogService/ListProducts";

async fn a_forged_principal_means_nothing_at_the_gateway(install: Installation) {
    let (victim, attacker) = (install.register().await, install.register().await);
    victim.create_product("Secret project").await;
    let channel = grpc::connect(&install.url()).await;
    // Even one that a service would believe.
    let headers = assertion(&install.signer(Clock::system()), &principal_of(&victim), LIST_PRODUCTS);
    let outcome = grpc::call(&channel, LIST_PRODUCTS, Bytes::new(), headers.clone()).await;
    grpc::refused(outcome, Reason::InvalidCredentials);

    let mut both = headers.clone();
    both.extend(grpc::credential(&attacker.token));
    let listed = grpc::call(&channel, LIST_PRODUCTS, Bytes::new(), both).await.unwrap();
    assert_eq!(ListProductsResponse::decode(listed).unwrap().products, [], "the attacker has no products");

    let forged = headers[PRINCIPAL_HEADER].to_str().unwrap();
    install.api().with(PRINCIPAL_HEADER, forged).get("/products").await.refused(Reason::InvalidCredentials);
    let listed = attacker.with(PRINCIPAL_HEADER, forged).get("/products").await;
    assert_eq!(listed.gives(200)["products"], json!([]));
}

async fn a_credential_counts_only_where_it_is_whole_and_where_it_belongs(install: Installation) {
    let owner = install.register().await;
    let product = owner.create_product("App").await;
    let license = owner.issue(&product, json!({})).await;
    let api = install.api();

    let asked = json!({"license_key": license.key});
    let by_header = api.with("x-api-key", &product.public_key);
    assert_eq!(by_header.post("/v1/licenses/validate", asked.clone()).await.gives(200)["valid"], true);
    // The header is the client surface's own.
    api.with("x-api-key", &owner.live_key).get("/api/v1/products").await.refused(Reason::InvalidCredentials);

    let get = |value: String| {
        let api = api.with("authorization", &value);
        async move { api.get("/products").await }
    };
    get(format!("bearer {}", owner.token)).await.gives(200);
    for broken in [
        owner.token.clone(),
        format!("Basic {}", owner.token),
        "Bearer".to_owned(),
        "Bearer ".to_owned(),
        format!("Bearer {} {}", owner.token, owner.token),
        format!("Bearer {}x", owner.token),
        format!("Bearer {}", "a".repeat(10_000)),
    ] {
        get(broken).await.refused(Reason::InvalidCredentials);
    }
    let cut = &product.public_key[..product.public_key.len() - 1];
    api.with_key(cut).post("/v1/licenses/validate", asked.clone()).await.refused(Reason::InvalidCredentials);

    let platform = api.with_key(&product.public_key).get("/v1/status").await;
    platform.refused(Reason::InvalidCredentials);
    let anonymous = api.get("/products").await;
    anonymous.refused(Reason::InvalidCredentials);
    assert_eq!(anonymous.header("www-authenticate"), Some("Bearer"), "no error code where no credential was sent");
    let refused = api.with_key("nonsense").get("/products").await;
    assert!(refused.header("www-authenticate").is_some_and(|challenge| challenge.contains("invalid_token")));
    let member = |answer: &paperkey_tests::Answer| answer.json.get("error").cloned().unwrap_or(Value::Null);
    let unknown = api.with_key(&TokenKind::TeamLive.generate()).get("/products").await;
    assert_eq!(member(&refused), member(&unknown), "no answer tells a malformed key from an unknown one");
}

mod fleet_ports {
    //! The services' own ports: closed to everybody without a principal signed for that very call.

    use super::*;

    async fn refuses_all(channel: &Channel, owned: &[&Method], what: &str, headers: impl Fn(&Method) -> HeaderMap) {
        for method in owned {
            let outcome = grpc::call(channel, &method.path, Bytes::new(), headers(method)).await;
            let code = outcome.as_ref().err().map(Status::code);
            assert_eq!(code, Some(Code::Unauthenticated), "{} {what}: {outcome:?}", method.path);
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_service_believes_nothing_but_a_fresh_signature_for_the_very_call() {
        let Some(install) = Installation::fleet().await else { return };
        let owner = install.register().await;
        let key = || Secret::new(install.given_keys()[1].clone());
        let stranger = Keyring::from_base64(&key(), &key(), &key()).expect("these are keys too");
        let stranger = Signer::new(&stranger, Clock::system());
        let ours = install.signer(Clock::system());
        let late = install.signer(Clock::manual(Clock::system().now_ms() - 10_000).0);
        let early = install.signer(Clock::manual(Clock::system().now_ms() + 10_000).0);
        for service in SERVICES {
            let channel = grpc::connect(&install.url_of(service)).await;
            let owned: Vec<&Method> =
                Contract::get().methods().iter().map(AsRef::as_ref).filter(|m| m.owner == service).collect();
            assert!(!owned.is_empty());
            let all = service_principal();
            refuses_all(&channel, &owned, "without a principal", |_| HeaderMap::new()).await;
            refuses_all(&channel, &owned, "with nonsense", |_| {
                let name = HeaderName::from_static(PRINCIPAL_HEADER);
                HeaderMap::from_iter([(name, HeaderValue::from_static("bm9uc2Vuc2U"))])
            })
            .await;
            refuses_all(&channel, &owned, "by another key", |m| assertion(&stranger, &all, &m.path)).await;
            refuses_all(&channel, &owned, "of ten seconds ago", |m| assertion(&late, &all, &m.path)).await;
            refuses_all(&channel, &owned, "of the future", |m| assertion(&early, &all, &m.path)).await;
            refuses_all(&channel, &owned, "signed for another rpc", |_| assertion(&ours, &all, "/a.B/C")).await;
            refuses_all(&channel, &owned, "by a session", |_| grpc::credential(&owner.token)).await;
            refuses_all(&channel, &owned, "by a team key", |_| grpc::credential(&owner.live_key)).await;
        }
        // The same call with a good signature is answered: what is refused above is refused for the reason named.
        let channel = grpc::connect(&install.url_of("auth")).await;
        let rpc = "/paperkey.auth.v1.CredentialService/Authenticate";
        let asked = AuthenticateRequest { credential: owner.live_key.clone(), ..Default::default() };
        let asked: Bytes = asked.encode_to_vec().into();
        let answer =
            grpc::call(&channel, rpc, asked.clone(), assertion(&ours, &service_principal(), rpc)).await.unwrap();
        let principal = AuthenticateResponse::decode(answer).unwrap().principal.unwrap();
        assert_eq!(principal.team_id, owner.team_id);
        let by_owner = grpc::call(&channel, rpc, asked, assertion(&ours, &principal_of(&owner), rpc)).await;
        grpc::refused(by_owner, Reason::ScopeInsufficient);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn an_operator_with_the_system_key_sees_everything_by_reflection() {
        let Some(install) = Installation::fleet().await else { return };
        let owner = install.register().await;
        let system_key = install.system_key().await;
        for service in SERVICES {
            let channel = grpc::connect(&install.url_of(service)).await;
            let shown = grpc::reflected_services(&channel, Some(&system_key)).await.unwrap();
            for method in Contract::get().methods() {
                assert!(shown.contains(&method.service), "{service} does not show {}", method.service);
            }
            for refused in [None, Some(owner.live_key.as_str()), Some(owner.token.as_str()), Some("nonsense")] {
                let outcome = grpc::reflected_services(&channel, refused).await;
                assert_eq!(outcome.unwrap_err().code(), Code::Unauthenticated, "{service}");
            }
        }
        let channel = grpc::connect(&install.url_of("auth")).await;
        let rpc = "/paperkey.auth.v1.CredentialService/Authenticate";
        let outcome = grpc::call(&channel, rpc, Bytes::new(), grpc::credential(&system_key)).await;
        grpc::refused(outcome, Reason::ScopeInsufficient);
    }
}
