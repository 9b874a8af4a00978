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
    Contract,
    auth::v1::{AuthenticateRequest, AuthenticateResponse},
    catalog::v1::{ListProductsRequest, ListProductsResponse},
    contract::Method,
    errors::v1::Reason,
    options::v1::{Caller, Scope, Surface},
    principal::v1::{Mode, Principal, Role},
};
use paperkey_tests::{Account, Installation, grpc, installation::SERVICES, on_both_kinds};
use prost::Message as _;
use serde_json::{Value, json};
use tonic::{Code, Status, transport::Channel};

use crate::samples;

on_both_kinds! {
    every_method_answers_every_credential_as_the_contract_says,
    internal_methods_cannot_be_reached_from_outside,
    a_forged_principal_means_nothing_at_the_gateway,
    a_credential_counts_only_where_it_is_whole_and_where_it_belongs,
}

/// What becomes of a call before anybody looks at what it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// 401: the credential is none, or none that this surface takes.
    Unauthenticated,
    /// 403: it is a good one, and not for this.
    Forbidden,
    /// The call is judged by its content.
    Through,
}

struct Credential {
    name: &'static str,
    token: Option<String>,
    /// What kind of caller it is of, if it is good.
    kind: Option<Caller>,
}

impl Credential {
    async fn all(install: &Installation, owner: &Account) -> Vec<Self> {
        let product = owner.create_product("App").await;
        let foreigner = install.register().await;
        let good = |name, token: &str, kind| Self { name, token: Some(token.to_owned()), kind: Some(kind) };
        let bad = |name, token: &str| Self { name, token: Some(token.to_owned()), kind: None };
        let mut altered = owner.token.clone();
        altered.replace_range(altered.len() - 4.., if altered.ends_with("AAAA") { "BBBB" } else { "AAAA" });
        vec![
            Self { name: "nobody", token: None, kind: None },
            bad("nonsense", "nonsense"),
            bad("an unknown team key", &TokenKind::TeamLive.generate()),
            bad("an unknown product key", &TokenKind::ProductPublic.generate()),
            bad("an unknown secret key", &TokenKind::ProductSecret.generate()),
            bad("an unknown system key", &TokenKind::System.generate()),
            bad("a session with another signature", &altered),
            bad("a session without a signature", "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ1c3JfMSJ9."),
            good("an account", &owner.token, Caller::Account),
            good("a foreign account", &foreigner.token, Caller::Account),
            good("a product's public key", &product.public_key, Caller::ProductPublicKey),
            good("a product's secret key", &product.secret_key, Caller::ProductSecretKey),
            good("a team key", &owner.live_key, Caller::TeamKey),
            good("a free key", &owner.free_key, Caller::FreeKey),
            good("the system key", &install.system_key().await, Caller::SystemKey),
        ]
    }

    fn holds(&self, scope: Scope) -> bool {
        match self.kind {
            // Whoever registers is Owner of their team.
            Some(Caller::Account | Caller::SystemKey) => true,
            Some(Caller::ProductPublicKey) => scope == Scope::LicensesCheck,
            Some(Caller::ProductSecretKey) => {
                matches!(scope, Scope::LicensesRead | Scope::LicensesWrite | Scope::WebhooksRead | Scope::WebhooksWrite)
            }
            Some(Caller::TeamKey | Caller::FreeKey) => scope != Scope::LicensesCheck,
            _ => false,
        }
    }

    /// A credential is judged where it is accepted; whose kind is not is told so, whatever it may do elsewhere.
    fn verdict(&self, method: &Method, accepted: impl Fn(Caller) -> bool) -> Verdict {
        // Where only strangers are served, nobody looks at what they carry.
        if method.callers == [Caller::Anyone] {
            return Verdict::Through;
        }
        match (&self.token, self.kind) {
            (None, _) if method.serves(Caller::Anyone) => Verdict::Through,
            (None, _) | (_, None) => Verdict::Unauthenticated,
            (_, Some(kind)) if !accepted(kind) => Verdict::Unauthenticated,
            (_, Some(kind)) => {
                let served = method.serves(kind) || method.serves(Caller::Anyone);
                let allowed = method.scope.is_none_or(|scope| self.holds(scope));
                if served && allowed { Verdict::Through } else { Verdict::Forbidden }
            }
        }
    }

    fn over_rest(&self, method: &Method, surface: Surface) -> Verdict {
        self.verdict(method, |kind| accepts(surface, kind))
    }

    /// gRPC has no surfaces of its own: it accepts what one of the method's surfaces accepts.
    fn over_grpc(&self, method: &Method) -> Verdict {
        self.verdict(method, |kind| {
            method.serves(kind) || method.routes.iter().any(|route| accepts(route.surface, kind))
        })
    }
}

fn accepts(surface: Surface, kind: Caller) -> bool {
    let entry = Contract::get().surfaces().iter().find(|entry| entry.surface == surface);
    entry.expect("a route belongs to a surface").options.callers().any(|caller| caller == kind)
}

async fn every_method_answers_every_credential_as_the_contract_says(install: Installation) {
    let owner = install.register().await;
    let credentials = Credential::all(&install, &owner).await;
    let channel = grpc::connect(&install.url()).await;
    let (mut asked, mut wrong) = (0, Vec::new());
    for method in Contract::get().methods().iter().filter(|method| method.is_public()) {
        for credential in &credentials {
            for route in &method.routes {
                let path = samples::nobodys_path(route);
                let expected = credential.over_rest(method, route.surface);
                let api =
                    credential.token.as_ref().map_or_else(|| install.api(), |token| install.api().with_key(token));
                let answer = api.call(route.verb.clone(), &path, route.body.then(|| json!({}))).await;
                let verdict = match answer.status.as_u16() {
                    401 => Verdict::Unauthenticated,
                    403 => Verdict::Forbidden,
                    _ => Verdict::Through,
                };
                if verdict != expected || answer.status.is_server_error() {
                    wrong.push(format!(
                        "{} by {}: {expected:?} expected: {} {}",
                        answer.asked,
                        credential.name,
                        answer.status,
                        answer.text()
                    ));
                } else if verdict == Verdict::Unauthenticated {
                    answer.refused(Reason::InvalidCredentials);
                } else if verdict == Verdict::Forbidden {
                    answer.refused(Reason::ScopeInsufficient);
                }
                asked += 1;
            }
            let expected = credential.over_grpc(method);
            let headers = credential.token.as_deref().map(grpc::credential).unwrap_or_default();
            let outcome = grpc::call(&channel, &method.path, Bytes::new(), headers).await;
            let code = outcome.as_ref().err().map_or(Code::Ok, Status::code);
            let verdict = match code {
                Code::Unauthenticated => Verdict::Unauthenticated,
                Code::PermissionDenied => Verdict::Forbidden,
                _ => Verdict::Through,
            };
            let failed = !matches!(
                code,
                Code::Ok | Code::Unauthenticated | Code::PermissionDenied | Code::InvalidArgument | Code::NotFound
            );
            if verdict != expected || failed {
                wrong.push(format!("{} by {}: {expected:?} expected: {outcome:?}", method.path, credential.name));
            }
            asked += 1;
        }
    }
    assert!(asked > 500, "the contract has methods: {asked} calls");
    assert!(wrong.is_empty(), "{} of {asked} calls went wrong:\n{}", wrong.len(), wrong.join("\n"));
}

async fn internal_methods_cannot_be_reached_from_outside(install: Installation) {
    let owner = install.register().await;
    let credentials = Credential::all(&install, &owner).await;
    let channel = grpc::connect(&install.url()).await;
    let internal = || Contract::get().methods().iter().filter(|method| !method.is_public());
    assert!(internal().count() >= 4);
    for method in internal() {
        for credential in &credentials {
            let headers = credential.token.as_deref().map(grpc::credential).unwrap_or_default();
            let outcome = grpc::call(&channel, &method.path, Bytes::new(), headers).await;
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
