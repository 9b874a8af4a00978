//! The answers about errors: for which reasons a call can fail, and what it is told then.
//!
//! The reasons follow from the policy of the method and from what its routes take; those that do not follow, the
//! policy names.

use std::collections::{BTreeMap, BTreeSet};

use http::Method as Verb;
use paperkey_proto::{
    Contract,
    contract::{Method, Route, SurfaceEntry},
    error::{catalogue, entry, reason_word},
    errors::v1::Reason,
    options::v1::{Caller, Envelope, RateClass, Surface, Tenant},
};

use crate::{json::Json, samples};

/// The kinds of key that an allowlist can bind to addresses.
const BOUND: [Caller; 3] = [Caller::TeamKey, Caller::UserToken, Caller::SystemKey];

/// The kinds of key that a plan can be without.
const PLANNED: [Caller; 3] = [Caller::TeamKey, Caller::FreeKey, Caller::UserToken];

/// Reasons by the number of their HTTP status.
type ByStatus = BTreeMap<u32, BTreeSet<Reason>>;

/// For which reasons a method can fail on one of its routes.
pub(super) fn reasons(method: &Method, route: &Route, surface: &SurfaceEntry) -> BTreeSet<Reason> {
    let policy = &method.policy;
    let served: Vec<Caller> = surface.options.callers().filter(|caller| method.serves(*caller)).collect();
    let serves = |kinds: &[Caller]| served.iter().any(|caller| kinds.contains(caller));
    let by_key = matches!(surface.surface, Surface::Team | Surface::Platform);
    let mut found: BTreeSet<Reason> = policy.reasons().collect();
    let mut when = |holds: bool, reason: Reason| {
        if holds {
            found.insert(reason);
        }
    };
    // A query or a body that nobody asked for is told of too.
    when(true, Reason::ValidationFailed);
    when(true, Reason::Internal);
    when(true, Reason::Unavailable);
    when(true, Reason::Deadline);
    when(true, Reason::RateLimited);
    when(policy.rate_classes().any(|class| class == RateClass::Auth), Reason::AuthRateLimited);
    let by_license = [RateClass::LicenseValidate, RateClass::LicenseActivate];
    when(policy.rate_classes().any(|class| by_license.contains(&class)), Reason::LicenseRateLimited);

    if served.iter().any(|caller| *caller != Caller::Anyone) {
        let strangers = surface.options.callers().any(|caller| caller != Caller::Anyone && !method.serves(caller));
        when(true, Reason::InvalidCredentials);
        when(method.scope.is_some() || (strangers && !serves(&[Caller::Anyone])), Reason::ScopeInsufficient);
        when(method.scope.is_some() && serves(&[Caller::Account, Caller::UserToken]), Reason::RoleInsufficient);
        when(serves(&BOUND), Reason::IpNotAllowed);
        when(policy.feature != 0 || (by_key && serves(&PLANNED)), Reason::FeatureNotInPlan);
    }
    // Who asks for a cookie must be a page of ours, and so must who comes by one.
    when(method.session_field.is_some() || serves(&[Caller::Account]), Reason::ScopeInsufficient);
    let names_one =
        method.descriptor.input().fields().any(|field| field.name() == "id" || field.name().ends_with("_id"));
    let names_team = policy.tenant() != Tenant::None && serves(&[Caller::Account, Caller::SystemKey]);
    when(names_one || names_team, Reason::NotFound);

    let changes = match route.verb {
        Verb::POST => method.success_code() == 201 || !route.variables.is_empty(),
        Verb::PUT | Verb::PATCH | Verb::DELETE => true,
        _ => false,
    };
    when(changes || policy.idempotent, Reason::Conflict);
    when(policy.idempotent, Reason::IdempotencyMismatch);
    when(route.body, Reason::BodyTooLarge);
    when(route.body, Reason::UnsupportedMediaType);
    found
}

/// The answers about errors of all surfaces.
#[derive(Debug)]
pub(super) struct Answers {
    /// Everything that can be told on a surface.
    all: BTreeMap<Surface, ByStatus>,
    /// The sets of reasons that calls answer with, by the name of the answer.
    made: BTreeMap<String, (&'static SurfaceEntry, u32, BTreeSet<Reason>)>,
}

impl Answers {
    pub(super) fn new(contract: &'static Contract) -> Self {
        let mut somewhere = BTreeSet::new();
        let mut all: BTreeMap<Surface, BTreeSet<Reason>> = BTreeMap::new();
        for method in contract.methods().iter().filter(|method| method.is_public()) {
            for route in &method.routes {
                let Some(surface) = surface_of(contract, route) else { continue };
                let found = reasons(method, route, surface);
                somewhere.extend(found.iter().copied());
                all.entry(route.surface).or_default().extend(found);
            }
        }
        // What no method answers comes from before or beside all methods: a verb that a path does not take, a quota
        // that a mounted server is guarded by.
        let elsewhere: Vec<Reason> =
            catalogue().map(|(reason, _)| reason).filter(|reason| !somewhere.contains(reason)).collect();
        let mut answers = Self { all: BTreeMap::new(), made: BTreeMap::new() };
        for surface in contract.surfaces() {
            let mut found = all.remove(&surface.surface).unwrap_or_default();
            found.extend(elsewhere.iter().copied());
            let by_status = by_status(&found);
            answers.all.insert(surface.surface, by_status.clone());
            for (status, reasons) in by_status {
                answers.name(surface, status, reasons);
            }
        }
        answers
    }

    /// The answers of one method on one of its routes: status, and a reference to the answer.
    pub(super) fn of(&mut self, surface: &'static SurfaceEntry, reasons: &BTreeSet<Reason>) -> Vec<(String, Json)> {
        by_status(reasons)
            .into_iter()
            .map(|(status, reasons)| {
                let name = self.name(surface, status, reasons);
                let reference = Json::object([("$ref", format!("#/components/responses/{name}").into())]);
                (status.to_string(), reference)
            })
            .collect()
    }

    /// The name of the answer that tells these reasons. The one that tells all of its status and surface has the
    /// short name; others say what they are about.
    fn name(&mut self, surface: &'static SurfaceEntry, status: u32, reasons: BTreeSet<Reason>) -> String {
        let mut name = format!("{}{status}", word_of(surface.surface));
        if self.all.get(&surface.surface).and_then(|all| all.get(&status)) != Some(&reasons) {
            for reason in &reasons {
                name.push('.');
                name.push_str(&pascal(reason_word(*reason)));
            }
        }
        self.made.entry(name.clone()).or_insert((surface, status, reasons));
        name
    }

    /// All answers, as `components.responses`.
    pub(super) fn responses(&self) -> Json {
        let made = self
            .made
            .iter()
            .map(|(name, (surface, status, reasons))| (name.clone(), response(surface, *status, reasons)));
        Json::Object(made.collect())
    }

    /// All examples, as `components.examples`.
    pub(super) fn examples(&self, contract: &'static Contract, public_url: &str) -> Json {
        let mut examples = Vec::new();
        for surface in contract.surfaces() {
            let reasons = self.all.get(&surface.surface).into_iter().flat_map(BTreeMap::values).flatten();
            for reason in reasons {
                for problem in [false, true] {
                    let body = samples::answer(*reason, surface, public_url, problem).body;
                    let example = Json::object([
                        ("summary", entry(*reason).message.as_str().into()),
                        ("value", Json::Written(body)),
                    ]);
                    examples.push((example_name(surface, *reason, problem), example));
                }
            }
        }
        Json::Object(examples)
    }
}

/// The surface of a route.
pub(super) fn surface_of(contract: &'static Contract, route: &Route) -> Option<&'static SurfaceEntry> {
    contract.surfaces().iter().find(|entry| entry.surface == route.surface)
}

/// A surface in a name, such as `Dashboard`.
pub(super) fn word_of(surface: Surface) -> String {
    pascal(surface.as_str_name().trim_start_matches("SURFACE_"))
}

fn pascal(screaming: &str) -> String {
    screaming
        .split('_')
        .filter_map(|word| Some(format!("{}{}", word.get(..1)?, word.get(1..)?.to_ascii_lowercase())))
        .collect()
}

fn by_status(reasons: &BTreeSet<Reason>) -> ByStatus {
    let mut found = ByStatus::new();
    for reason in reasons {
        found.entry(entry(*reason).http_status).or_default().insert(*reason);
    }
    found
}

fn example_name(surface: &SurfaceEntry, reason: Reason, problem: bool) -> String {
    let form = if problem { ".problem" } else { "" };
    format!("{}.{}{form}", word_of(surface.surface), pascal(reason_word(reason)))
}

fn response(surface: &SurfaceEntry, status: u32, reasons: &BTreeSet<Reason>) -> Json {
    let code_of = |reason: &Reason| {
        let entry = entry(*reason);
        let code = match surface.options.envelope() {
            Envelope::Typed => &entry.typed_code,
            Envelope::Agent => &entry.agent_code,
            Envelope::Flat | Envelope::Unspecified => &entry.flat_code,
        };
        let page = format!("/docs/errors/{}", entry.agent_code);
        format!("- `{code}`: {}. {} [More]({page})", entry.message, entry.cause)
    };
    let lines: Vec<String> = reasons.iter().map(code_of).collect();
    let content = |schema: &str, problem: bool| {
        let examples = reasons.iter().map(|reason| {
            let reference = format!("#/components/examples/{}", example_name(surface, *reason, problem));
            (reason_word(*reason).to_owned(), Json::object([("$ref", reference.into())]))
        });
        Json::object([
            ("schema", Json::object([("$ref", format!("#/components/schemas/{schema}").into())])),
            ("examples", Json::Object(examples.collect())),
        ])
    };
    let mut headers = vec!["X-Request-Id"];
    headers.extend(match status {
        401 => Some("WWW-Authenticate"),
        405 => Some("Allow"),
        429 => Some("Retry-After"),
        _ => None,
    });
    headers.extend(super::LIMIT_HEADERS);
    Json::object([
        ("description", lines.join("\n").into()),
        ("headers", super::header_references(&headers)),
        (
            "content",
            Json::object([
                ("application/json", content(envelope_schema(surface.options.envelope()), false)),
                ("application/problem+json", content("Problem", true)),
            ]),
        ),
    ])
}

fn envelope_schema(envelope: Envelope) -> &'static str {
    match envelope {
        Envelope::Typed => "TypedError",
        Envelope::Agent => "AgentError",
        Envelope::Flat | Envelope::Unspecified => "FlatError",
    }
}

/// The schemas of the envelopes.
pub(super) fn schemas() -> Vec<(String, Json)> {
    let text = |said: &str| Json::object([("type", "string".into()), ("description", said.into())]);
    let flag = |said: &str| Json::object([("type", "boolean".into()), ("description", said.into())]);
    let details = || {
        Json::object([
            ("type", "array".into()),
            ("description", "The fields at fault, where some are.".into()),
            ("items", Json::object([("$ref", "#/components/schemas/FieldFault".into())])),
        ])
    };
    let object = |members: Vec<(&str, Json)>| {
        let required = members.iter().map(|(name, _)| *name).filter(|name| *name != "details");
        Json::object([
            ("type", "object".into()),
            ("required", Json::texts(required)),
            ("properties", Json::Object(members.iter().map(|(n, schema)| ((*n).to_owned(), schema.clone())).collect())),
        ])
    };
    let request_id = || text("The request, as in X-Request-Id.");
    let next = || text("What to do next, for a program.");
    let retryable = || flag("Whether the same request may succeed later.");
    let kind = || text("The family of the error, such as `rate_limit_error`.");
    let inside = |members: Vec<(&str, Json)>| object(vec![("error", object(members))]);
    vec![
        (
            "FieldFault".to_owned(),
            object(vec![
                ("field", text("The path of the field, such as `price.currency`.")),
                ("message", text("What is wrong with it.")),
            ]),
        ),
        (
            "FlatError".to_owned(),
            object(vec![
                ("error", text("The code of the error.")),
                ("message", text("What went wrong, for a person.")),
                ("details", details()),
                ("requestId", request_id()),
            ]),
        ),
        (
            "TypedError".to_owned(),
            inside(vec![
                ("type", kind()),
                ("code", text("The code of the error.")),
                ("message", text("What went wrong, for a person.")),
                ("details", details()),
                ("request_id", request_id()),
            ]),
        ),
        (
            "AgentError".to_owned(),
            inside(vec![
                ("code", text("The code of the error, such as `PB_NOT_FOUND`.")),
                ("type", kind()),
                ("human_message", text("What went wrong, for a person.")),
                ("agent_message", next()),
                ("docs_url", text("The page of the error; with `.md` at its end, in Markdown.")),
                ("retryable", retryable()),
                ("details", details()),
                ("request_id", request_id()),
            ]),
        ),
        (
            "Problem".to_owned(),
            object(vec![
                ("type", text("The page of the error.")),
                ("title", text("What such errors are.")),
                ("status", Json::object([("type", "integer".into())])),
                ("detail", text("What went wrong here, for a person.")),
                ("instance", text("The path of the request.")),
                ("code", text("The code of the error on this surface.")),
                ("agent_message", next()),
                ("retryable", retryable()),
                ("details", details()),
                ("request_id", request_id()),
            ])
            .with("description", "RFC 9457, for those who accept `application/problem+json`."),
        ),
    ]
}
