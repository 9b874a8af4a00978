//! The reference: the contract's REST side as an OpenAPI 3.1 document, generated from the descriptors when the gateway
//! starts.
//!
//! Nothing in here is written by hand twice: routes, parameters, schemas and their bounds come from the contract, words
//! from its comments, errors from the catalogue, and examples and samples of calls from all of these. Deliberately
//! absent: internal methods, and the doors to other people's APIs, whose answers are not ours.

mod answers;
mod calls;
mod comments;
mod examples;
mod schemas;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use http::Method as Verb;
use paperkey_proto::{
    Contract,
    contract::{Method, Route, SurfaceEntry, pool},
    options::v1::{Caller, Surface, Tenant},
};

use crate::{edge, json::Json};

use answers::{Answers, surface_of, word_of};
use calls::{Answered, Call, Credential, Sent};
use comments::{Comments, first_sentence};
use examples::{Examples, Extent};
use schemas::{Schemas, Way, fits_a_query, is_mask, name_in};

/// The headers by which every answer tells what is left of the limits.
const LIMIT_HEADERS: [&str; 5] =
    ["X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset", "RateLimit-Policy", "RateLimit"];

/// The types of the bodies that exports come as.
const EXPORTS: [&str; 2] = [UPLOAD, LINES];
/// The type of files that are taken.
const UPLOAD: &str = "text/csv";
/// The type of what is streamed message by message.
const LINES: &str = "application/x-ndjson";

/// The whole document, as JSON.
pub(crate) fn document(contract: &'static Contract, public_url: &str, version: &str) -> String {
    let comments = Comments::read(pool());
    let mut writing = Writing {
        contract,
        comments: &comments,
        schemas: Schemas::new(&comments),
        examples: Examples::new(pool(), &comments),
        answers: Answers::new(contract),
        public_url,
        ids: BTreeSet::new(),
        tags: BTreeMap::new(),
    };
    let paths = writing.paths();
    let mut schemas = answers::schemas();
    schemas.extend(writing.schemas.into_made());
    let groups = contract.surfaces().iter().filter_map(|surface| {
        let tags = writing.tags.get(&surface.surface)?;
        let names = tags.keys().cloned().collect::<Vec<_>>();
        Some(Json::object([("name", word_of(surface.surface).into()), ("tags", Json::texts(names))]))
    });
    let groups = Json::List(groups.collect());
    Json::object([
        ("openapi", "3.1.0".into()),
        (
            "info",
            Json::object([
                ("title", "Paperkey".into()),
                ("version", version.into()),
                ("description", INTRODUCTION.into()),
                ("license", Json::object([("name", "Apache-2.0".into()), ("identifier", "Apache-2.0".into())])),
            ]),
        ),
        ("servers", Json::List(vec![Json::object([("url", public_url.into())])])),
        ("tags", Json::List(writing.tags.values().flat_map(BTreeMap::values).cloned().collect())),
        ("x-tagGroups", groups),
        ("paths", paths),
        (
            "components",
            Json::object([
                ("securitySchemes", security_schemes(public_url)),
                ("parameters", parameters()),
                ("headers", headers()),
                ("responses", writing.answers.responses()),
                ("examples", writing.answers.examples(contract, public_url)),
                ("schemas", Json::Object(schemas)),
            ]),
        ),
    ])
    .written()
}

/// What a reader should know before all else.
const INTRODUCTION: &str = "Licenses and API keys, self-hosted.\n\n\
     The same methods are served over REST, gRPC and gRPC-Web on this address. REST comes in four surfaces, which \
     differ in the credentials that they take, in the letter case of names, and in the shape of errors. Requests are \
     read in either letter case, and names that are not known are refused.\n\n\
     Every error has a [page](/docs/errors/). With `Accept: application/problem+json` errors are told as in RFC 9457 \
     on every surface.";

/// What the document is made with.
struct Writing<'c> {
    contract: &'static Contract,
    comments: &'c Comments,
    schemas: Schemas<'c>,
    examples: Examples<'c>,
    answers: Answers,
    public_url: &'c str,
    /// The ids of operations that are taken.
    ids: BTreeSet<String>,
    /// The tags of each surface, by name.
    tags: BTreeMap<Surface, BTreeMap<String, Json>>,
}

/// A method on one of its routes.
#[derive(Clone, Copy)]
struct Binding {
    method: &'static Method,
    route: &'static Route,
    surface: &'static SurfaceEntry,
}

/// The methods of one path, by verb.
type Verbs = Vec<(Verb, Vec<Binding>)>;

impl Writing<'_> {
    fn paths(&mut self) -> Json {
        // Two methods may name the variables of one path differently: the first one's names are shown.
        let mut paths: Vec<(String, String, Verbs)> = Vec::new();
        for method in self.contract.methods().iter().filter(|method| method.is_public()) {
            for route in &method.routes {
                let Some(surface) = surface_of(self.contract, route) else { continue };
                let binding = Binding { method, route, surface };
                let (key, shown) = templates(&binding);
                let at = paths.iter().position(|(known, _, _)| *known == key).unwrap_or_else(|| {
                    paths.push((key, shown, Vec::new()));
                    paths.len() - 1
                });
                let verbs = &mut paths[at].2;
                match verbs.iter_mut().find(|(verb, _)| *verb == route.verb) {
                    Some((_, bindings)) => bindings.push(binding),
                    None => verbs.push((route.verb.clone(), vec![binding])),
                }
            }
        }
        let mut members = Vec::new();
        for (_, shown, verbs) in paths {
            let names = names_in(&shown);
            let mut operations = Vec::new();
            for (verb, mut bindings) in verbs {
                // The one that shares the route comes second.
                bindings.sort_by_key(|binding| binding.method.on_query().is_some());
                operations.push((verb.as_str().to_ascii_lowercase(), self.operation(&bindings, &names)));
            }
            members.push((shown, Json::Object(operations)));
        }
        Json::Object(members)
    }

    /// The operation of the methods that share a route, of which the first is the main one.
    fn operation(&mut self, bindings: &[Binding], names: &[String]) -> Json {
        let Some(Binding { method, route, surface }) = bindings.first().copied() else { return Json::Null };
        let (summary, mut description) = self.words(method);
        let mut parameters = self.parameters(bindings, names);
        parameters.extend(header_parameters(method, route, surface));
        let mut reasons = BTreeSet::new();
        let mut success = Vec::new();
        for (at, binding) in bindings.iter().enumerate() {
            reasons.extend(answers::reasons(binding.method, binding.route, binding.surface));
            success.extend(self.contents(binding));
            if at > 0 {
                let (_, other) = self.words(binding.method);
                let parameter = binding.method.on_query().unwrap_or_default();
                description = format!("{description}\n\nWith `{parameter}`: {other}");
            }
        }
        let served: Vec<Caller> = surface.options.callers().filter(|caller| method.serves(*caller)).collect();
        let mut responses = vec![(method.success_code().to_string(), success_answer(method, surface, success))];
        responses.extend(self.answers.of(surface, &reasons));
        let id = self.operation_id(method, surface);
        let tag = self.tag(method, surface);
        let mut operation = Json::object([
            ("operationId", id.into()),
            ("tags", Json::texts([tag])),
            ("summary", summary.into()),
            ("description", format!("{description}\n\n{}", self.access(method, &served)).into()),
            ("security", self.security(method, &route.verb, surface, &served)),
        ]);
        if !parameters.is_empty() {
            operation = operation.with("parameters", parameters);
        }
        if route.body {
            operation = operation.with("requestBody", self.request_body(method, route, surface));
        }
        operation
            .with("responses", Json::Object(responses))
            .with("x-codeSamples", self.call(method, route, surface, &served).samples())
            .with("x-paperkey-rpc", method.path.trim_start_matches('/'))
    }

    /// A short and a long form of what the contract says of a method.
    fn words(&self, method: &Method) -> (String, String) {
        let file = method.descriptor.parent_service().parent_file();
        let said =
            self.comments.above(file.name(), method.descriptor.path()).unwrap_or_else(|| method.descriptor.name());
        (first_sentence(said).to_owned(), said.to_owned())
    }

    /// Who may call, in words.
    fn access(&self, method: &Method, served: &[Caller]) -> String {
        let callers: Vec<String> = served
            .iter()
            .map(|caller| caller.as_str_name().trim_start_matches("CALLER_").to_ascii_lowercase().replace('_', " "))
            .collect();
        let mut said = format!("Callers: {}.", callers.join(", "));
        if let Some(scope) = method.scope {
            said = format!("{said} Scope: `{}`.", self.contract.scope_word(scope));
        }
        if method.policy.owner_only {
            said.push_str(" Of a team's members, only Owners.");
        }
        said
    }

    fn operation_id(&mut self, method: &Method, surface: &SurfaceEntry) -> String {
        let base = format!("{}{}", word_of(surface.surface).to_ascii_lowercase(), method.descriptor.name());
        let mut id = base.clone();
        let mut count = 1;
        while !self.ids.insert(id.clone()) {
            count += 1;
            id = format!("{base}{count}");
        }
        id
    }

    /// The tag of a method's service on a surface.
    fn tag(&mut self, method: &Method, surface: &SurfaceEntry) -> String {
        let service = method.descriptor.parent_service();
        let words = spaced(service.name().trim_end_matches("Service"));
        let name = format!("{}: {words}", word_of(surface.surface));
        let said = self.comments.above(service.parent_file().name(), service.path()).unwrap_or_default();
        let tag = Json::object([
            ("name", name.clone().into()),
            ("x-displayName", words.into()),
            ("description", said.into()),
        ]);
        self.tags.entry(surface.surface).or_default().insert(name.clone(), tag);
        name
    }

    fn security(&self, method: &Method, verb: &Verb, surface: &SurfaceEntry, served: &[Caller]) -> Json {
        let scopes: Vec<&str> = method.scope.map(|scope| self.contract.scope_word(scope)).into_iter().collect();
        let mut schemes = Vec::new();
        if served.iter().all(|caller| *caller == Caller::Anyone) {
            return Json::List(Vec::new());
        }
        if served.contains(&Caller::Anyone) {
            schemes.push(Json::object([]));
        }
        let mut named = BTreeSet::new();
        for caller in served {
            let Some((scheme, _)) = bearer_of(*caller) else { continue };
            if named.insert(scheme) {
                schemes.push(Json::object([(scheme, Json::texts(scopes.clone()))]));
                // Browsers send no `Origin` with plain reading on their own pages, and a session is good with one only.
                if *caller == Caller::Account && *verb != Verb::GET {
                    schemes.push(Json::object([("Session", Json::texts(scopes.clone()))]));
                }
            }
        }
        if surface.options.api_key_header {
            schemes.push(Json::object([("ProductPublicKeyHeader", Json::texts(scopes))]));
        }
        Json::List(schemes)
    }

    /// What the path and the query give.
    fn parameters(&mut self, bindings: &[Binding], names: &[String]) -> Vec<Json> {
        let mut parameters = Vec::new();
        let mut known: BTreeSet<(String, String)> = BTreeSet::new();
        for (at, Binding { method, route, surface }) in bindings.iter().copied().enumerate() {
            let case = surface.options.request_case();
            let input = method.descriptor.input();
            let mut add = |place: &str, name: String, schema: Json, example: Json, required: bool| {
                if known.insert((place.to_owned(), name.clone())) {
                    let (schema, said) = without_description(schema);
                    let mut parameter =
                        Json::object([("name", name.into()), ("in", place.into()), ("required", required.into())]);
                    if let Some(said) = said {
                        parameter = parameter.with("description", said);
                    }
                    // What is optional has no example, in its schema neither: the viewer fills one in, and whoever tries the
                    // call out would send it along, such as a page token that is none.
                    parameters.push(if required {
                        parameter.with("schema", schema).with("example", example)
                    } else {
                        parameter.with("schema", schema)
                    });
                }
            };
            for (variable, name) in route.variables.iter().zip(names) {
                let Some(field) = input.get_field_by_name(variable) else { continue };
                let example = self.examples.field(&field, case, Way::Request, 0);
                let schema = never_null(self.schemas.field(&field, case, Way::Request));
                add("path", name.clone(), schema, example, true);
            }
            if route.body && method.body_field().is_none() {
                continue;
            }
            for field in crate::transcode::in_order_of_declaration(&input) {
                if route.variables.iter().any(|variable| variable == field.name())
                    || method.body_field() == Some(field.number())
                    || is_mask(&field)
                    || !fits_a_query(&field)
                {
                    continue;
                }
                // What only the second of two methods requires is what it is chosen by.
                let required = at == 0 && paperkey_proto::rules::demands_of(&field).required;
                let schema = never_null(self.schemas.field(&field, case, Way::Request));
                let example = self.examples.field(&field, case, Way::Request, 0);
                add("query", name_in(case, field.name()), schema, example, required);
            }
        }
        parameters
    }

    fn request_body(&mut self, method: &Method, route: &Route, surface: &SurfaceEntry) -> Json {
        if let Some(data) = method.body_field().and_then(|number| method.descriptor.input().get_field(number)) {
            let example = self.examples.file(&method.descriptor.input(), &data);
            let file =
                Json::object([("schema", Json::object([("type", "string".into())])), ("example", example.into())]);
            return Json::object([
                ("description", format!("The file. At most {} bytes.", method.max_body_bytes()).into()),
                ("required", true.into()),
                ("content", Json::object([(UPLOAD, file)])),
            ]);
        }
        let case = surface.options.request_case();
        let schema = self.schemas.body(&method.descriptor.input(), case, &route.variables);
        let required = matches!(&schema, Json::Object(members) if members.iter().any(|(name, _)| name == "required"));
        let said = match route.verb {
            Verb::PATCH => "A JSON merge patch (RFC 7396): what is absent stays, null clears.",
            _ => "Names may come in camelCase and in snake_case.",
        };
        let mut content = Json::object([("schema", without_description(schema).0)]);
        // What other routes of the method take from their path, this one leaves to the credential.
        let elsewhere: Vec<String> = method.routes.iter().flat_map(|route| route.variables.iter().cloned()).collect();
        let of = |extent| self.examples.body(&method.descriptor.input(), case, extent, &elsewhere);
        let (least, whole) = (of(Extent::Least), of(Extent::Whole));
        let mut shown = Vec::new();
        if least != whole && required {
            shown.push(("least".to_owned(), example("What it needs", least)));
        }
        shown.push(("whole".to_owned(), example("Everything that it takes", whole)));
        content = content.with("examples", Json::Object(shown));
        Json::object([
            ("description", format!("{said} At most {} bytes.", method.max_body_bytes()).into()),
            ("required", required.into()),
            ("content", Json::object([("application/json", content)])),
        ])
    }

    /// The forms of the body of success.
    fn contents(&mut self, binding: &Binding) -> Vec<(String, Json)> {
        if binding.method.success_code() == 204 {
            return Vec::new();
        }
        if binding.method.answers_with_a_body() {
            // A report on a file is told in lines; an export as it is asked for.
            let kinds = if binding.method.body_field().is_some() { &EXPORTS[1..] } else { &EXPORTS[..] };
            let text = || Json::object([("schema", Json::object([("type", "string".into())]))]);
            return kinds.iter().map(|kind| ((*kind).to_owned(), text())).collect();
        }
        let case = binding.surface.options.response_case();
        let schema = self.schemas.reference(&binding.method.descriptor.output(), case, Way::Answer);
        let kind = if binding.method.answers_with_lines() { LINES } else { "application/json" };
        let example = self.examples.answer(&binding.method.descriptor.output(), case);
        vec![(kind.to_owned(), Json::object([("schema", schema), ("example", example)]))]
    }

    /// How the method is called, with what it needs and nothing else.
    fn call<'m>(&self, method: &'m Method, route: &'m Route, surface: &SurfaceEntry, served: &[Caller]) -> Call<'m> {
        let case = surface.options.request_case();
        let input = method.descriptor.input();
        let as_text = |json: Json| match json {
            Json::Text(text) => text,
            other => other.written(),
        };
        let mut url = self.public_url.to_owned();
        for segment in route.template.split('/').skip(1) {
            let variable = segment.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
            let field = variable.and_then(|variable| input.get_field_by_name(variable));
            let example = field.map(|field| as_text(self.examples.field(&field, case, Way::Request, 0)));
            url.push('/');
            url.push_str(example.as_deref().unwrap_or(segment));
        }
        let mut body = Sent::Nothing;
        if method.body_field().is_some() {
            body = Sent::File(UPLOAD);
        } else if route.body {
            // A patch of nothing would change nothing.
            let extent = if route.verb == Verb::PATCH { Extent::Whole } else { Extent::Least };
            match self.examples.body(&input, case, extent, &route.variables) {
                Json::Object(members) if members.is_empty() => {}
                members => body = Sent::Json(members),
            }
        } else {
            let needed = input.fields().filter(|field| {
                paperkey_proto::rules::demands_of(field).required
                    && !route.variables.iter().any(|variable| variable == field.name())
            });
            for (at, field) in needed.enumerate() {
                let example = as_text(self.examples.field(&field, case, Way::Request, 0));
                let separator = if at == 0 { '?' } else { '&' };
                // Writing to a String cannot fail.
                let _ = write!(url, "{separator}{}={example}", name_in(case, field.name()));
            }
        }
        let anyone = served.contains(&Caller::Anyone);
        let credential = served.iter().find_map(|caller| bearer_of(*caller)).filter(|_| !anyone);
        let answered = match method.success_code() {
            204 => Answered::Nothing,
            _ if method.answers_with_a_body() || method.answers_with_lines() => Answered::Stream,
            _ => Answered::Json,
        };
        Call {
            verb: &route.verb,
            url,
            credential: credential.map(|(_, variable)| Credential { variable }),
            body,
            answered,
        }
    }
}

/// The security scheme of a kind of caller, and the variable that the samples keep such a credential in.
fn bearer_of(caller: Caller) -> Option<(&'static str, &'static str)> {
    match caller {
        Caller::Account => Some(("Account", "PAPERKEY_TOKEN")),
        Caller::ProductPublicKey => Some(("ProductPublicKey", "PAPERKEY_PUBLIC_KEY")),
        Caller::ProductSecretKey => Some(("ProductSecretKey", "PAPERKEY_SECRET_KEY")),
        Caller::TeamKey | Caller::FreeKey | Caller::UserToken | Caller::SystemKey => {
            Some(("ApiKey", "PAPERKEY_API_KEY"))
        }
        Caller::Anyone | Caller::Service | Caller::Unspecified => None,
    }
}

fn example(summary: &str, value: Json) -> Json {
    Json::object([("summary", summary.into()), ("value", value)])
}

/// Whether an answer holds a session, which a browser may be given as a cookie.
fn starts_session(method: &Method) -> bool {
    let Some(extension) = pool().get_extension_by_name("paperkey.options.v1.presentation") else { return false };
    method.descriptor.output().fields().any(|field| {
        let options = field.options();
        let presentation = options.get_extension(&extension);
        let session = presentation.as_message().and_then(|message| message.get_field_by_name("session"));
        session.and_then(|session| session.as_bool()) == Some(true)
    })
}

fn success_answer(method: &Method, surface: &SurfaceEntry, contents: Vec<(String, Json)>) -> Json {
    let said = match method.success_code() {
        201 => "Created",
        202 => "Accepted",
        204 => "Done; there is nothing to tell",
        _ => "Success",
    };
    let mut names = vec!["X-Request-Id"];
    names.extend(LIMIT_HEADERS);
    if method.policy.idempotent {
        names.push("Idempotent-Replayed");
    }
    if surface.options.callers().any(|caller| caller == Caller::Account)
        && (starts_session(method) || method.policy.ends_session)
    {
        names.push("Set-Cookie");
    }
    let answer = Json::object([("description", said.into()), ("headers", header_references(&names))]);
    if contents.is_empty() { answer } else { answer.with("content", Json::Object(contents)) }
}

/// The path without the names of its variables, and with them in the letter case of the surface.
fn templates(binding: &Binding) -> (String, String) {
    let case = binding.surface.options.request_case();
    let with = |name: &dyn Fn(&str) -> String| {
        let segments = binding.route.template.split('/').map(|segment| {
            let variable = segment.strip_prefix('{').and_then(|rest| rest.strip_suffix('}'));
            variable.map_or_else(|| segment.to_owned(), |variable| format!("{{{}}}", name(variable)))
        });
        segments.collect::<Vec<_>>().join("/")
    };
    (with(&|_| String::new()), with(&|variable| name_in(case, variable)))
}

/// The names of the variables of a path.
fn names_in(path: &str) -> Vec<String> {
    path.split('/').filter_map(|segment| Some(segment.strip_prefix('{')?.strip_suffix('}')?.to_owned())).collect()
}

/// The headers that say for which team and mode a call is, and that make it safe to send again.
fn header_parameters(method: &Method, route: &Route, surface: &SurfaceEntry) -> Vec<Json> {
    let reference = |name: &str| Json::object([("$ref", format!("#/components/parameters/{name}").into())]);
    let names_its_own = [Caller::Account, Caller::SystemKey];
    let chooses = method.policy.tenant() != Tenant::None
        && surface.options.callers().any(|caller| method.serves(caller) && names_its_own.contains(&caller));
    let mut parameters = Vec::new();
    if chooses && !route.variables.iter().any(|variable| variable == "team_id") {
        parameters.push(reference("Paperkey-Team"));
    }
    if chooses {
        parameters.push(reference("Paperkey-Mode"));
    }
    if method.policy.idempotent {
        parameters.push(reference("Idempotency-Key"));
    }
    if starts_session(method) {
        parameters.push(reference("Paperkey-Session"));
    }
    parameters
}

fn parameters() -> Json {
    let header = |name: &str, said: &str, schema: Json| {
        let parameter = Json::object([
            ("name", name.into()),
            ("in", "header".into()),
            ("required", false.into()),
            ("description", said.into()),
            ("schema", schema),
        ]);
        (name.to_owned(), parameter)
    };
    let text = || Json::object([("type", "string".into())]);
    Json::Object(vec![
        header(
            "Paperkey-Team",
            "The team that the call is for, such as `team_…`, where the credential belongs to none: of an account by \
             default its oldest one.",
            text(),
        ),
        header(
            "Paperkey-Mode",
            "Whether the call is for live or for test data, where the credential does not say.",
            text().with("enum", Json::texts(["live", "test"])).with("default", "live"),
        ),
        header(
            "Idempotency-Key",
            "A text of your own for this request. For 24 hours the same one with the same body gets the stored answer \
             instead of doing it again.",
            text(),
        ),
        header(
            "Paperkey-Session",
            "Asks for the session as a cookie, which no script can read, instead of as a token in the answer. Such a call \
             carries an `Origin` that is this address.",
            text().with("examples", Json::texts(["cookie"])),
        ),
    ])
}

fn headers() -> Json {
    // What comes with some answers of a kind only.
    let at_times = ["Idempotent-Replayed", "Set-Cookie"];
    let header = |name: &str, kind: &str, said: &str| {
        let schema = Json::object([("type", kind.into())]);
        let header = Json::object([
            ("description", said.into()),
            ("required", (!at_times.contains(&name)).into()),
            ("schema", schema),
        ]);
        (name.to_owned(), header)
    };
    Json::Object(vec![
        header("X-Request-Id", "string", "The id of the request, by which the log knows it."),
        header("Retry-After", "integer", "The seconds after which the same request may succeed; never too few."),
        header("WWW-Authenticate", "string", "`Bearer`, with `error=\"invalid_token\"` where a credential was sent."),
        header("Allow", "string", "The methods that the path takes."),
        header("X-RateLimit-Limit", "integer", "How many calls the limit allows that is closest to being hit."),
        header("X-RateLimit-Remaining", "integer", "How many of them are left."),
        header("X-RateLimit-Reset", "integer", "The Unix second at which the oldest counted call leaves the window."),
        header("RateLimit-Policy", "string", "The limits that apply, as the IETF's draft for rate limits writes them."),
        header("RateLimit", "string", "What is left of them, as that draft writes it."),
        header("Idempotent-Replayed", "string", "`true` where the stored answer of an earlier try is given."),
        header("Set-Cookie", "string", "The session of a browser that asked for one, or its end."),
    ])
}

fn header_references(names: &[&str]) -> Json {
    let reference = |name: &&str| {
        let to = format!("#/components/headers/{name}");
        ((*name).to_owned(), Json::object([("$ref", to.into())]))
    };
    Json::Object(names.iter().map(reference).collect())
}

fn security_schemes(public_url: &str) -> Json {
    // A browser keeps a cookie of that prefix only if it came by TLS, from this very host.
    let cookie = if edge::is_https(public_url) { "__Host-paperkey" } else { "paperkey_session" };
    let bearer =
        |said: &str| Json::object([("type", "http".into()), ("scheme", "bearer".into()), ("description", said.into())]);
    Json::object([
        (
            "ApiKey",
            bearer(
                "A team key (`pk_live_…`, `pk_test_…`, `pb_live_…`, `pb_test_…`), a free key (`pk_free_…`), a user token \
                 (`po_ut_…`) or the installation's system key (`po_sk_…`).",
            ),
        ),
        ("Account", bearer("The token of an account, from POST /auth/login.").with("bearerFormat", "JWT")),
        (
            "Session",
            Json::object([
                ("type", "apiKey".into()),
                ("in", "cookie".into()),
                ("name", cookie.into()),
                (
                    "description",
                    "The session of a browser, from POST /auth/login with `Paperkey-Session: cookie`. A call by it must \
                     carry an `Origin` that is this address, as browsers send it with everything but plain reading."
                        .into(),
                ),
            ]),
        ),
        ("ProductSecretKey", bearer("A product's secret key (`sk_…`), for the vendor's own server.")),
        ("ProductPublicKey", bearer("A product's public key (`pk_…`), which ships in the app.")),
        (
            "ProductPublicKeyHeader",
            Json::object([
                ("type", "apiKey".into()),
                ("in", "header".into()),
                ("name", "x-api-key".into()),
                ("description", "A product's public key (`pk_…`), in a header of its own.".into()),
            ]),
        ),
    ])
}

/// `LicenseCheck` as `License check`.
fn spaced(name: &str) -> String {
    let mut words = String::new();
    for (at, character) in name.char_indices() {
        if at > 0 && character.is_ascii_uppercase() {
            words.push(' ');
            words.push(character.to_ascii_lowercase());
        } else {
            words.push(character);
        }
    }
    words.replace(" api ", " API ").replace("Api ", "API ")
}

/// A schema without its description, and that.
fn without_description(schema: Json) -> (Json, Option<String>) {
    let Json::Object(members) = schema else { return (schema, None) };
    let mut said = None;
    let kept = members.into_iter().filter_map(|(name, value)| match value {
        Json::Text(text) if name == "description" => {
            said = Some(text);
            None
        }
        value => Some((name, value)),
    });
    let kept = kept.collect();
    (Json::Object(kept), said)
}

/// A query has no null: what is absent is left out.
fn never_null(schema: Json) -> Json {
    let Json::Object(mut members) = schema else { return schema };
    for (name, value) in &mut members {
        match (name.as_str(), value) {
            ("type", value) => {
                if let Json::List(types) = value
                    && let Some(first) = types.first()
                {
                    *value = first.clone();
                }
            }
            ("enum", Json::List(words)) => words.retain(|word| *word != Json::Null),
            _ => {}
        }
    }
    Json::Object(members)
}

#[cfg(test)]
mod tests;
