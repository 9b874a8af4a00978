//! The table of methods: what the gateway and the services know of the contract, read from its descriptors.
//!
//! [`Contract::read`] refuses a contract that leaves anything open: a method without a policy, two methods on one
//! route, a path variable that is no field, a scope of a team's data without a tenant, and the like. The compiled-in
//! contract is read once; a process does not start with a broken one.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fmt,
    sync::{Arc, LazyLock},
};

use http::Method as Verb;
use prost::Message;
use prost_reflect::{
    DescriptorPool, DynamicMessage, EnumDescriptor, ExtensionDescriptor, FieldDescriptor, Kind, MessageDescriptor,
    MethodDescriptor, ServiceDescriptor,
};
use prost_types::method_options::IdempotencyLevel;

use crate::{
    DESCRIPTORS,
    errors::v1::Reason,
    options::v1::{
        Caller, Envelope, LetterCase, MethodPolicy, RateClass, RateClassOptions, Scope, ScopeOptions, Surface,
        SurfaceOptions, Tenant, Visibility,
    },
};

/// The largest body of a method that declares no other bound, in bytes.
pub const DEFAULT_MAX_BODY_BYTES: usize = 65_536;

/// The package prefix of our own services.
const OURS: &str = "paperkey.";

/// The field of a streamed request that holds the next bytes of a body.
const BODY_FIELD: &str = "data";

/// The compiled-in descriptors, with every option.
pub fn pool() -> &'static DescriptorPool {
    static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
        DescriptorPool::decode(DESCRIPTORS).expect("the build script wrote these descriptors from a checked contract")
    });
    &POOL
}

/// The contract as a table.
#[derive(Debug)]
pub struct Contract {
    methods: Vec<Arc<Method>>,
    by_path: HashMap<String, Arc<Method>>,
    surfaces: Vec<SurfaceEntry>,
    scopes: BTreeMap<Scope, ScopeOptions>,
    rate_classes: BTreeMap<RateClass, RateClassOptions>,
}

/// One rpc, with all that the contract says of it.
#[derive(Debug)]
pub struct Method {
    /// Its place in the order of the contract.
    pub number: usize,
    /// The path of the rpc, such as `/paperkey.catalog.v1.CatalogService/GetProduct`.
    pub path: String,
    /// The full name of its service.
    pub service: String,
    /// The Paperkey service that serves it: the second part of its package, such as `catalog`.
    pub owner: String,
    /// Its descriptor.
    pub descriptor: MethodDescriptor,
    /// Its policy.
    pub policy: MethodPolicy,
    /// Who may call it.
    pub callers: Vec<Caller>,
    /// What the caller must be allowed to do.
    pub scope: Option<Scope>,
    /// Its REST routes; none for internal methods.
    pub routes: Vec<Route>,
    /// The number of the field of its answer that is a session.
    pub session_field: Option<u32>,
    /// What happens if it is called twice.
    pub repeats: Repeats,
    /// Whether either side sends more than one message.
    pub streams: bool,
}

/// What happens if a call is made twice: `idempotency_level` of protobuf itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repeats {
    /// Nobody says that it may be.
    Unknown,
    /// It changes nothing, however often it is made.
    ChangesNothing,
    /// A second one changes nothing more.
    ChangesNothingMore,
}

/// A REST route of a method.
#[derive(Clone, Debug)]
pub struct Route {
    /// The HTTP method.
    pub verb: Verb,
    /// The path, with variables in braces.
    pub template: String,
    /// The names of the variables, in order: fields of the request.
    pub variables: Vec<String>,
    /// Whether the body holds the fields that the path does not.
    pub body: bool,
    /// The surface that the path belongs to.
    pub surface: Surface,
}

/// A surface and what it is like.
#[derive(Clone, Debug)]
pub struct SurfaceEntry {
    /// Which one.
    pub surface: Surface,
    /// What it is like.
    pub options: SurfaceOptions,
}

/// Everything that is wrong with a contract.
#[derive(Debug)]
pub struct Problems(pub Vec<String>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the contract is broken: {}", self.0.join("; "))
    }
}

impl std::error::Error for Problems {}

impl Contract {
    /// The compiled-in contract.
    pub fn get() -> &'static Self {
        static CONTRACT: LazyLock<Contract> = LazyLock::new(|| match Contract::read(pool()) {
            Ok(contract) => contract,
            // Closed, never open: nothing may run on a contract that leaves something undecided.
            Err(problems) => panic!("{problems}"),
        });
        &CONTRACT
    }

    /// Reads a contract, or says everything that is wrong with it.
    pub fn read(pool: &DescriptorPool) -> Result<Self, Problems> {
        let mut reader = Reader { pool, problems: Vec::new() };
        let contract = reader.contract();
        if reader.problems.is_empty() { Ok(contract) } else { Err(Problems(reader.problems)) }
    }

    /// All methods, in the order of the contract.
    pub fn methods(&self) -> &[Arc<Method>] {
        &self.methods
    }

    /// The method with that rpc path.
    pub fn method(&self, path: &str) -> Option<&Arc<Method>> {
        self.by_path.get(path)
    }

    /// The surface that a URL path belongs to.
    pub fn surface_of(&self, path: &str) -> Option<&SurfaceEntry> {
        surface_of(&self.surfaces, path)
    }

    /// All surfaces.
    pub fn surfaces(&self) -> &[SurfaceEntry] {
        &self.surfaces
    }

    /// What a scope is called.
    pub fn scope_word(&self, scope: Scope) -> &str {
        self.scopes.get(&scope).map_or("", |options| options.word.as_str())
    }

    /// Whether a scope lets anything be changed.
    pub fn scope_writes(&self, scope: Scope) -> bool {
        self.scopes.get(&scope).is_none_or(|options| options.write)
    }

    /// The scope that a word means.
    pub fn scope_named(&self, word: &str) -> Option<Scope> {
        self.scopes.iter().find(|(_, options)| options.word == word).map(|(scope, _)| *scope)
    }

    /// All scopes, with what they are called.
    pub fn scopes(&self) -> impl Iterator<Item = (Scope, &ScopeOptions)> {
        self.scopes.iter().map(|(scope, options)| (*scope, options))
    }

    /// Whether calls of a class are counted by a field of their message.
    pub fn counts_by_field(&self, class: RateClass) -> bool {
        self.rate_classes.get(&class).is_some_and(|options| options.by_field)
    }

    /// All rate classes, with what they are called.
    pub fn rate_classes(&self) -> impl Iterator<Item = (RateClass, &RateClassOptions)> {
        self.rate_classes.iter().map(|(class, options)| (*class, options))
    }
}

impl Method {
    /// Whether the gateway shows it.
    pub fn is_public(&self) -> bool {
        self.policy.visibility() == Visibility::Public
    }

    /// Whether that kind of caller may call it.
    pub fn serves(&self, caller: Caller) -> bool {
        self.callers.contains(&caller)
    }

    /// Whether it only reads: its REST verb is GET.
    pub fn is_read(&self) -> bool {
        !self.routes.is_empty() && self.routes.iter().all(|route| route.verb == Verb::GET)
    }

    /// The parameter of the query by which it takes a route that it shares.
    pub fn on_query(&self) -> Option<&str> {
        Some(self.policy.on_query.as_str()).filter(|parameter| !parameter.is_empty())
    }

    /// Whether a second call does nothing that the first has not done, whoever makes it.
    pub fn may_repeat(&self) -> bool {
        self.repeats != Repeats::Unknown
    }

    /// Whether its answer is a body of its own instead of a message in JSON.
    pub fn answers_with_a_body(&self) -> bool {
        let output = self.descriptor.output();
        let has = |name, kind: Kind| output.get_field_by_name(name).is_some_and(|field| field.kind() == kind);
        self.descriptor.is_server_streaming() && has("content_type", Kind::String) && has("data", Kind::Bytes)
    }

    /// The number of the field that holds the next bytes of a body, where it takes one in pieces instead of a message
    /// in JSON.
    pub fn body_field(&self) -> Option<u32> {
        let data = self.descriptor.input().get_field_by_name(BODY_FIELD)?;
        (self.descriptor.is_client_streaming() && data.kind() == Kind::Bytes).then(|| data.number())
    }

    /// Whether its answers are shown one by one as they come, each a line of JSON.
    pub fn answers_with_lines(&self) -> bool {
        self.descriptor.is_server_streaming() && !self.answers_with_a_body()
    }

    /// The HTTP status of success.
    pub fn success_code(&self) -> u16 {
        match self.policy.success_code {
            0 => 200,
            code => u16::try_from(code).unwrap_or(200),
        }
    }

    /// The largest request body in bytes.
    pub fn max_body_bytes(&self) -> usize {
        match self.policy.max_body_bytes {
            0 => DEFAULT_MAX_BODY_BYTES,
            bytes => usize::try_from(bytes).unwrap_or(DEFAULT_MAX_BODY_BYTES),
        }
    }
}

struct Reader<'a> {
    pool: &'a DescriptorPool,
    problems: Vec<String>,
}

impl Reader<'_> {
    fn contract(&mut self) -> Contract {
        let surfaces: Vec<_> = self
            .declared::<SurfaceOptions>("Surface", "surface")
            .into_iter()
            .filter_map(|(number, options)| Some(SurfaceEntry { surface: Surface::try_from(number).ok()?, options }))
            .collect();
        for entry in &surfaces {
            if entry.options.envelope() == Envelope::Unspecified
                || entry.options.request_case() == LetterCase::Unspecified
                || entry.options.response_case() == LetterCase::Unspecified
            {
                self.problem(entry.surface.as_str_name(), "needs an envelope and two letter cases");
            }
        }
        let scopes = keyed(self.declared::<ScopeOptions>("Scope", "scope"));
        let rate_classes = keyed(self.declared::<RateClassOptions>("RateClass", "rate_class"));

        let mut contract = Contract { methods: Vec::new(), by_path: HashMap::new(), surfaces, scopes, rate_classes };
        let mut taken: HashMap<String, String> = HashMap::new();
        let services: Vec<ServiceDescriptor> =
            self.pool.services().filter(|service| service.full_name().starts_with(OURS)).collect();
        for service in services {
            for descriptor in service.methods() {
                let Some(method) = self.method(&contract, &service, descriptor) else { continue };
                for route in &method.routes {
                    let key = match method.on_query() {
                        Some(parameter) => format!("{} {}?{parameter}", route.verb, anonymous(&route.template)),
                        None => format!("{} {}", route.verb, anonymous(&route.template)),
                    };
                    if let Some(other) = taken.insert(key.clone(), method.path.clone()) {
                        self.problem(&method.path, &format!("shares the route {key} with {other}"));
                    }
                }
                let method = Arc::new(method);
                contract.by_path.insert(method.path.clone(), Arc::clone(&method));
                contract.methods.push(method);
            }
        }
        contract
    }

    fn method(
        &mut self,
        contract: &Contract,
        service: &ServiceDescriptor,
        descriptor: MethodDescriptor,
    ) -> Option<Method> {
        let path = format!("/{}/{}", service.full_name(), descriptor.name());
        let Some(policy) = self.policy(&descriptor) else {
            self.problem(&path, "has no policy");
            return None;
        };
        let routes = self.routes(contract, &path, &descriptor);
        let session_field = self.session_field(&path, &descriptor);
        let options = descriptor.method_descriptor_proto().options.as_ref();
        let method = Method {
            number: contract.methods.len(),
            repeats: match options.map(prost_types::MethodOptions::idempotency_level) {
                Some(IdempotencyLevel::NoSideEffects) => Repeats::ChangesNothing,
                Some(IdempotencyLevel::Idempotent) => Repeats::ChangesNothingMore,
                Some(IdempotencyLevel::IdempotencyUnknown) | None => Repeats::Unknown,
            },
            streams: descriptor.is_client_streaming() || descriptor.is_server_streaming(),
            owner: service.full_name().split('.').nth(1).unwrap_or_default().to_owned(),
            service: service.full_name().to_owned(),
            callers: policy.callers().collect(),
            scope: Some(policy.scope()).filter(|scope| *scope != Scope::Unspecified),
            path,
            descriptor,
            policy,
            routes,
            session_field,
        };
        self.judge(contract, &method);
        Some(method)
    }

    fn judge(&mut self, contract: &Contract, method: &Method) {
        let policy = &method.policy;
        let input = method.descriptor.input();
        let mut require = |holds: bool, what: &str| {
            if !holds {
                self.problems.push(format!("{} {what}", method.path));
            }
        };
        let callers_known = policy
            .callers
            .iter()
            .all(|caller| Caller::try_from(*caller).is_ok_and(|caller| caller != Caller::Unspecified));
        require(!policy.callers.is_empty() && callers_known, "names no caller, or one that nobody defines");
        require(policy.visibility() != Visibility::Unspecified, "has no visibility");
        let reasons_known = policy
            .reasons
            .iter()
            .all(|reason| Reason::try_from(*reason).is_ok_and(|reason| reason != Reason::Unspecified));
        require(reasons_known, "fails for a reason that is not in the catalogue");
        require(policy.tenant() != Tenant::Unspecified, "does not say whose data it touches");
        if policy.scope != 0 {
            require(
                Scope::try_from(policy.scope).is_ok_and(|scope| contract.scopes.contains_key(&scope)),
                "needs a scope that nobody defines",
            );
            require(
                matches!(policy.tenant(), Tenant::Caller | Tenant::Any),
                "has a scope of a team's data, but no tenant",
            );
            require(!method.serves(Caller::Anyone), "has a scope, which nobody in particular can hold");
        } else {
            require(!matches!(policy.tenant(), Tenant::Caller | Tenant::Any), "touches a team's data without a scope");
            require(!policy.owner_only, "is for Owners only, and has no scope");
        }
        let streams = method.streams;
        let reads = method.repeats == Repeats::ChangesNothing;
        require(!method.is_read() || reads, "is read over REST (GET), and does not say NO_SIDE_EFFECTS");
        require(
            !reads || method.routes.iter().all(|route| route.verb == http::Method::GET),
            "says NO_SIDE_EFFECTS, and is not read over REST (GET)",
        );
        require(
            !reads || !method.scope.is_some_and(|scope| contract.scope_writes(scope)),
            "says NO_SIDE_EFFECTS, and has a scope that writes",
        );
        require(
            method.routes.is_empty() || !method.descriptor.is_client_streaming() || method.body_field().is_some(),
            "takes a stream and has a REST route, but its requests are no pieces of a body (data)",
        );
        require(
            policy.on_query.is_empty() || input.get_field_by_name(&policy.on_query).is_some(),
            "takes its route by a query parameter that is no field of its request",
        );
        for class in &policy.rate_classes {
            let options = RateClass::try_from(*class).ok().and_then(|class| contract.rate_classes.get(&class));
            require(options.is_some(), "counts against a rate class that nobody defines");
            if options.is_some_and(|options| options.by_field) {
                let subject = input.get_field_by_name(&policy.rate_subject);
                require(
                    subject.is_some_and(|field| field.kind() == Kind::String && !field.is_list()),
                    "counts by a rate subject that is no text field of its request",
                );
            }
        }
        let code = method.success_code();
        require([200, 201, 202, 204].contains(&code), "has a success code other than 200, 201, 202 or 204");
        require(
            code != 204 || method.descriptor.output().fields().len() == 0,
            "answers 204 and has fields that nobody would see",
        );
        if policy.idempotent {
            // A key is kept under the credential that it came with, and the one answer is kept whole.
            require(
                method.is_public() && !streams && !method.serves(Caller::Anyone),
                "takes an Idempotency-Key, and is not a public method of one answer that needs a credential",
            );
        }
        let handles_session = method.session_field.is_some() || policy.ends_session;
        require(
            !handles_session || (method.is_public() && !streams),
            "makes or ends a session, and is not a public method of one answer",
        );
        require(
            method.session_field.is_none() || !policy.ends_session,
            "answers with a session that its own policy says has ended",
        );
        if method.is_public() {
            require(!policy.rate_classes.is_empty(), "is public and counts against no rate class");
            require(
                method.callers.iter().any(|caller| *caller != Caller::Service),
                "is public and serves only other processes",
            );
        } else {
            require(method.routes.is_empty(), "is internal and has a REST route");
        }
        for route in &method.routes {
            let accepted = contract
                .surfaces
                .iter()
                .find(|entry| entry.surface == route.surface)
                .is_some_and(|entry| entry.options.callers().any(|caller| method.serves(caller)));
            require(accepted, "has a route on a surface that accepts none of its callers");
            require(route.verb != Verb::PATCH || mask_field(&input).is_some(), "has a PATCH route and no field mask");
        }
    }

    fn routes(&mut self, contract: &Contract, path: &str, descriptor: &MethodDescriptor) -> Vec<Route> {
        let Some(extension) = self.pool.get_extension_by_name("google.api.http") else {
            return Vec::new();
        };
        let options = descriptor.options();
        if !options.has_extension(&extension) {
            return Vec::new();
        }
        let value = options.get_extension(&extension);
        let Some(rule) = value.as_message() else { return Vec::new() };
        let mut rules = vec![rule.clone()];
        if let Some(more) = rule.get_field_by_name("additional_bindings")
            && let Some(list) = more.as_list()
        {
            rules.extend(list.iter().filter_map(|value| value.as_message().cloned()));
        }
        rules.iter().filter_map(|rule| self.route(contract, path, descriptor, rule)).collect()
    }

    fn route(
        &mut self,
        contract: &Contract,
        path: &str,
        descriptor: &MethodDescriptor,
        rule: &DynamicMessage,
    ) -> Option<Route> {
        let text = |name: &str| {
            rule.has_field_by_name(name)
                .then(|| rule.get_field_by_name(name).and_then(|value| value.as_str().map(str::to_owned)))
                .flatten()
        };
        let verbs = [
            ("get", Verb::GET),
            ("put", Verb::PUT),
            ("post", Verb::POST),
            ("delete", Verb::DELETE),
            ("patch", Verb::PATCH),
        ];
        let Some((verb, template)) =
            verbs.into_iter().find_map(|(name, verb)| text(name).map(|template| (verb, template)))
        else {
            self.problem(path, "has a route without a verb");
            return None;
        };
        let variables: Vec<String> = template
            .split('/')
            .filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'))
            .map(str::to_owned)
            .collect();
        for variable in &variables {
            let field = descriptor.input().get_field_by_name(variable);
            if !field.is_some_and(|field| field.kind() == Kind::String && !field.is_list()) {
                self.problem(
                    path,
                    &format!("has the path variable {{{variable}}}, which is no text field of its request"),
                );
            }
        }
        let body = match text("body").as_deref() {
            None | Some("") => false,
            Some("*") if !descriptor.is_client_streaming() => true,
            Some(BODY_FIELD) if descriptor.is_client_streaming() => true,
            Some(_) => {
                self.problem(path, "takes a body other than `*`, or than the `data` of a stream");
                false
            }
        };
        if body != matches!(verb, Verb::POST | Verb::PUT | Verb::PATCH) {
            self.problem(path, "takes a body on a verb without one, or none on a verb with one");
        }
        let Some(entry) = surface_of(&contract.surfaces, &template) else {
            self.problem(path, &format!("has the route {template}, which belongs to no surface"));
            return None;
        };
        Some(Route { verb, template, variables, body, surface: entry.surface })
    }

    /// The field of a method's answer that is a session. Whoever takes it out looks at the answer itself and not at the
    /// messages in it, so that one further down would be shown to scripts.
    fn session_field(&mut self, path: &str, descriptor: &MethodDescriptor) -> Option<u32> {
        let extension = self.extension("presentation")?;
        let is_session = |field: &FieldDescriptor| {
            let options = field.options();
            let presentation = options.get_extension(&extension);
            let is = presentation.as_message().and_then(|it| it.get_field_by_name("session")?.as_bool());
            is.unwrap_or(false)
        };
        let (mut found, mut misplaced) = (Vec::new(), false);
        for root in [descriptor.output(), descriptor.input()] {
            let (mut seen, mut next) = (HashSet::new(), vec![root.clone()]);
            while let Some(message) = next.pop() {
                if !seen.insert(message.full_name().to_owned()) {
                    continue;
                }
                for field in message.fields() {
                    if is_session(&field) {
                        if root == descriptor.output() && message == root {
                            found.push(field.clone());
                        } else {
                            misplaced = true;
                        }
                    }
                    next.extend(field.kind().as_message().cloned());
                }
            }
        }
        if misplaced {
            self.problem(path, "has a session elsewhere than among the fields of its answer");
        }
        let is_text = |field: &FieldDescriptor| field.kind() == Kind::String && !field.is_list() && !field.is_map();
        match found.as_slice() {
            [] => None,
            [field] if is_text(field) => Some(field.number()),
            _ => {
                self.problem(path, "answers with a session that is not one field of text");
                None
            }
        }
    }

    fn policy(&self, descriptor: &MethodDescriptor) -> Option<MethodPolicy> {
        let extension = self.extension("policy")?;
        let options = descriptor.options();
        options.has_extension(&extension).then(|| transcode(&options, &extension)).flatten()
    }

    /// The values of an enum of the options, with what each declares.
    fn declared<M: Message + Default>(&mut self, name: &str, extension: &str) -> Vec<(i32, M)> {
        let (Some(descriptor), Some(extension)) =
            (self.pool.get_enum_by_name(&format!("paperkey.options.v1.{name}")), self.extension(extension))
        else {
            self.problem(name, "is not declared");
            return Vec::new();
        };
        self.values(&descriptor, &extension)
    }

    fn values<M: Message + Default>(
        &mut self,
        descriptor: &EnumDescriptor,
        extension: &ExtensionDescriptor,
    ) -> Vec<(i32, M)> {
        let mut values = Vec::new();
        for value in descriptor.values().filter(|value| value.number() != 0) {
            match transcode(&value.options(), extension) {
                Some(options) if value.options().has_extension(extension) => values.push((value.number(), options)),
                _ => self.problem(value.full_name(), "declares nothing"),
            }
        }
        values
    }

    fn extension(&self, name: &str) -> Option<ExtensionDescriptor> {
        self.pool.get_extension_by_name(&format!("paperkey.options.v1.{name}"))
    }

    fn problem(&mut self, whose: &str, what: &str) {
        self.problems.push(format!("{whose} {what}"));
    }
}

/// The field of a request that names which fields were sent, if it has one.
pub fn mask_field(message: &MessageDescriptor) -> Option<prost_reflect::FieldDescriptor> {
    message
        .fields()
        .find(|field| field.kind().as_message().is_some_and(|kind| kind.full_name() == "google.protobuf.FieldMask"))
}

fn transcode<M: Message + Default>(options: &DynamicMessage, extension: &ExtensionDescriptor) -> Option<M> {
    options.get_extension(extension).as_message()?.transcode_to().ok()
}

fn keyed<K: TryFrom<i32> + Ord, V>(values: Vec<(i32, V)>) -> BTreeMap<K, V> {
    values.into_iter().filter_map(|(number, value)| Some((K::try_from(number).ok()?, value))).collect()
}

fn surface_of<'a>(surfaces: &'a [SurfaceEntry], path: &str) -> Option<&'a SurfaceEntry> {
    let matched = |prefix: &str| {
        path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')).then_some(prefix.len())
    };
    surfaces
        .iter()
        .filter_map(|entry| {
            let longest = entry.options.prefixes.iter().filter_map(|prefix| matched(prefix)).max()?;
            Some((longest, entry))
        })
        .max_by_key(|(length, _)| *length)
        .map(|(_, entry)| entry)
}

/// A template without the names of its variables: what makes two routes the same.
fn anonymous(template: &str) -> String {
    template
        .split('/')
        .map(|segment| if segment.starts_with('{') { "{}" } else { segment })
        .collect::<Vec<_>>()
        .join("/")
}
