//! What the gateway serves, made once from the contract: rpcs by path, REST routes by path and verb.
//!
//! Methods that are not public are not in here at all, so no later code can let one through. Over REST, what a method
//! streams is one body: in pieces, or in lines of JSON.

use std::{collections::HashMap, sync::Arc};

use http::{HeaderValue, Method as Verb, StatusCode, Uri};
use paperkey_kit::{channel::Channel, shed::Errand};
use paperkey_proto::{
    Contract,
    contract::{Method, SurfaceEntry},
    options::v1::{Caller, RateClass, Surface},
};

use crate::{
    GatewayError,
    transcode::{MessageId, Schema, pairs},
    verify::VERIFY_KEY,
};

/// The most variables that a path may have.
pub(crate) const MAX_VARIABLES: usize = 8;

/// The variable of a path by which a route names its team.
const TEAM_VARIABLE: &str = "team_id";

/// A set of kinds of caller.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Kinds(u32);

impl Kinds {
    pub(crate) fn of(kinds: impl IntoIterator<Item = Caller>) -> Self {
        Self(kinds.into_iter().fold(0, |set, kind| set | 1 << (kind as u32 & 31)))
    }

    pub(crate) fn has(self, kind: Caller) -> bool {
        self.0 & (1 << (kind as u32 & 31)) != 0
    }

    fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    fn without(self, kind: Caller) -> Self {
        Self(self.0 & !(1 << (kind as u32 & 31)))
    }
}

/// What the answer of a method is, and whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answers {
    /// A message of the service's.
    Message,
    /// A body of its own, which the service sends in pieces.
    Body,
    /// Messages, one after another, as they come.
    Lines,
    /// The gateway has it at hand.
    Here,
}

/// A public method, and the way to it.
#[derive(Debug)]
pub(crate) struct Rpc {
    pub(crate) method: Arc<Method>,
    /// Its path, as a request to its service names it.
    pub(crate) uri: Uri,
    pub(crate) channel: Channel,
    /// What its answer is, and whose.
    pub(crate) answers: Answers,
    /// The number of the field in which the pieces of a body go to the service, where the method takes one.
    pub(crate) body_field: Option<u32>,
    pub(crate) input: MessageId,
    pub(crate) output: MessageId,
    pub(crate) success: StatusCode,
    /// The classes that a call counts against.
    pub(crate) rate_classes: Vec<RateClass>,
    /// The number of the field of the message by which one of them counts.
    pub(crate) rate_field: Option<u32>,
    pub(crate) max_body_bytes: usize,
    /// The number of the field of its answer that is a session.
    pub(crate) session_field: Option<u32>,
    /// Whether the caller's session is no good after it.
    pub(crate) ends_session: bool,
    /// The only callers are nobody in particular: a credential says nothing here.
    pub(crate) only_anyone: bool,
    /// The kinds of caller that gRPC accepts: those of the method and of the surfaces that it has routes on.
    pub(crate) accepted: Kinds,
    /// Whether gRPC takes the credential from `x-api-key` too.
    pub(crate) api_key_header: bool,
}

impl Rpc {
    /// Whether it takes or answers with more than one message.
    pub(crate) fn is_stream(&self) -> bool {
        self.body_field.is_some() || matches!(self.answers, Answers::Body | Answers::Lines)
    }

    /// The service that its calls lead to.
    pub(crate) fn owner(&self) -> &str {
        &self.method.owner
    }

    /// What a place is taken for by a call of it.
    pub(crate) fn errand(&self) -> Errand {
        if self.is_stream() { Errand::Stream } else { Errand::Call }
    }
}

/// A REST route.
#[derive(Debug)]
pub(crate) struct RestRoute {
    pub(crate) rpc: Arc<Rpc>,
    pub(crate) surface: &'static SurfaceEntry,
    /// The kinds of caller that the surface accepts.
    pub(crate) accepted: Kinds,
    /// The fields that the variables of the path stand for, in order.
    pub(crate) variables: Vec<usize>,
    /// Which of the variables names the team that the call is for.
    pub(crate) team: Option<usize>,
    pub(crate) body: bool,
    /// The path as the contract writes it, with names for what varies.
    pub(crate) template: String,
    /// The parameter of the query by which it is told from another route of the same path and verb.
    on_query: Option<&'static str>,
}

/// All routes of one path.
#[derive(Debug)]
pub(crate) struct Node {
    verbs: Vec<(Verb, RestRoute)>,
    /// The verbs, as `Allow` names them.
    pub(crate) allow: HeaderValue,
}

/// What a path and a verb lead to.
#[derive(Debug)]
pub(crate) enum Found<'t, 'p> {
    /// A route, and what stands in the place of its variables.
    Route(&'t RestRoute, matchit::Params<'t, 'p>),
    /// The path is known, and takes other verbs.
    OtherVerb(&'t Node),
    /// Nothing.
    Nothing,
}

/// The table.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) schema: Arc<Schema>,
    router: matchit::Router<Node>,
    rpcs: HashMap<&'static str, Arc<Rpc>>,
}

impl Table {
    /// Makes the table; `channel` tells the way to the owner of a method.
    pub(crate) fn new(
        contract: &'static Contract,
        channel: impl Fn(&str) -> Option<Channel>,
    ) -> Result<Self, GatewayError> {
        let mut schema = Schema::new();
        let mut rpcs = HashMap::new();
        let mut nodes: Vec<(String, Vec<(Verb, RestRoute)>)> = Vec::new();
        for method in contract.methods().iter().filter(|method| method.is_public()) {
            let rpc = Arc::new(Rpc {
                uri: Uri::try_from(method.path.as_str()).map_err(|_| GatewayError::Path(method.path.clone()))?,
                channel: channel(&method.owner).ok_or_else(|| GatewayError::NoChannel(method.owner.clone()))?,
                answers: match () {
                    () if method.path == VERIFY_KEY => Answers::Here,
                    () if method.answers_with_a_body() => Answers::Body,
                    () if method.answers_with_lines() => Answers::Lines,
                    () => Answers::Message,
                },
                body_field: method.body_field(),
                input: schema.learn(&method.descriptor.input())?,
                output: schema.learn(&method.descriptor.output())?,
                success: StatusCode::from_u16(method.success_code()).unwrap_or(StatusCode::OK),
                rate_classes: method.policy.rate_classes().collect(),
                rate_field: rate_field(contract, method),
                max_body_bytes: method.max_body_bytes(),
                session_field: method.session_field,
                ends_session: method.policy.ends_session,
                only_anyone: method.callers.iter().all(|caller| *caller == Caller::Anyone),
                accepted: surfaces_of(contract, method)
                    .fold(Kinds::of(method.callers.iter().copied()), |kinds, entry| {
                        kinds.with(Kinds::of(entry.options.callers()))
                    })
                    .without(Caller::Service),
                api_key_header: surfaces_of(contract, method).any(|entry| entry.options.api_key_header),
                method: Arc::clone(method),
            });
            for route in &method.routes {
                let Some(surface) = entry_of(contract, route.surface) else { continue };
                let variables = route
                    .variables
                    .iter()
                    .map(|name| schema.position(rpc.input, name))
                    .collect::<Option<Vec<_>>>()
                    .filter(|variables| variables.len() <= MAX_VARIABLES)
                    .ok_or_else(|| GatewayError::Path(route.template.clone()))?;
                let entry = RestRoute {
                    rpc: Arc::clone(&rpc),
                    surface,
                    accepted: Kinds::of(surface.options.callers()).without(Caller::Service),
                    variables,
                    team: route.variables.iter().position(|name| name == TEAM_VARIABLE),
                    body: route.body,
                    template: route.template.clone(),
                    on_query: contract.method(&method.path).and_then(|method| method.on_query()),
                };
                let template = numbered(&route.template);
                let at = nodes.iter().position(|(known, _)| *known == template).unwrap_or_else(|| {
                    nodes.push((template, Vec::new()));
                    nodes.len() - 1
                });
                nodes[at].1.push((route.verb.clone(), entry));
            }
            rpcs.insert(method_path(contract, method), rpc);
        }
        let mut router = matchit::Router::new();
        for (template, verbs) in nodes {
            let mut names: Vec<_> = verbs.iter().map(|(verb, _)| verb.as_str()).collect();
            names.dedup();
            let allow = HeaderValue::from_str(&names.join(", ")).map_err(|_| GatewayError::Path(template.clone()))?;
            router.insert(&template, Node { verbs, allow }).map_err(|_| GatewayError::Path(template))?;
        }
        Ok(Self { schema: Arc::new(schema), router, rpcs })
    }

    /// What a REST request leads to.
    pub(crate) fn find<'p>(&self, verb: &Verb, path: &'p str, query: Option<&str>) -> Found<'_, 'p> {
        let Ok(matched) = self.router.at(path) else { return Found::Nothing };
        let asks = |route: &RestRoute| {
            let parameter = route.on_query?;
            Some(query.is_some_and(|query| pairs(query).any(|(name, _)| name == parameter)))
        };
        let of_verb = || matched.value.verbs.iter().filter(|(known, _)| known == verb);
        let found = of_verb().find(|(_, route)| asks(route) == Some(true));
        match found.or_else(|| of_verb().find(|(_, route)| asks(route).is_none())) {
            Some((_, route)) => Found::Route(route, matched.params),
            None => Found::OtherVerb(matched.value),
        }
    }

    /// The public method with that rpc path.
    pub(crate) fn rpc(&self, path: &str) -> Option<&Arc<Rpc>> {
        self.rpcs.get(path)
    }

    /// All public methods.
    pub(crate) fn rpcs(&self) -> impl Iterator<Item = &Arc<Rpc>> {
        self.rpcs.values()
    }
}

impl Node {
    /// The surface of the path.
    pub(crate) fn surface(&self) -> Option<&'static SurfaceEntry> {
        self.verbs.first().map(|(_, route)| route.surface)
    }
}

/// The field by which calls of a method are counted, where one of its classes counts by a field.
fn rate_field(contract: &Contract, method: &Method) -> Option<u32> {
    let by_field = method.policy.rate_classes().any(|class| contract.counts_by_field(class));
    let field = method.descriptor.input().get_field_by_name(&method.policy.rate_subject);
    field.filter(|_| by_field).map(|field| field.number())
}

/// A method lives as long as the contract does, and so does its path.
fn method_path(contract: &'static Contract, method: &Method) -> &'static str {
    contract.method(&method.path).map_or("", |method| method.path.as_str())
}

fn surfaces_of(contract: &'static Contract, method: &Method) -> impl Iterator<Item = &'static SurfaceEntry> {
    method.routes.iter().filter_map(move |route| entry_of(contract, route.surface))
}

fn entry_of(contract: &'static Contract, surface: Surface) -> Option<&'static SurfaceEntry> {
    contract.surfaces().iter().find(|entry| entry.surface == surface)
}

/// A template with numbers for names, since two methods of one path may name its variables differently.
fn numbered(template: &str) -> String {
    let mut numbers = 0..;
    template
        .split('/')
        .map(|segment| {
            if segment.starts_with('{') { format!("{{v{}}}", numbers.next().unwrap_or(0)) } else { segment.to_owned() }
        })
        .collect::<Vec<_>>()
        .join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        Table::new(Contract::get(), |_| Some(Channel::local())).unwrap()
    }

    #[test]
    fn every_route_of_the_contract_is_found_with_its_variables() {
        let table = table();
        for method in Contract::get().methods() {
            for route in &method.routes {
                let path = route.template.replace(['{', '}'], "");
                let Found::Route(found, params) = table.find(&route.verb, &path, method.on_query()) else {
                    panic!("{} {path} leads nowhere", route.verb)
                };
                assert_eq!(found.rpc.method.path, method.path);
                assert_eq!(found.surface.surface, route.surface);
                assert_eq!(found.body, route.body);
                let values: Vec<_> = params.iter().map(|(_, value)| value.to_owned()).collect();
                assert_eq!(values, route.variables);
                assert_eq!(found.variables.len(), route.variables.len());
            }
        }
    }

    #[test]
    fn internal_methods_are_not_there() {
        let table = table();
        for method in Contract::get().methods() {
            assert_eq!(table.rpc(&method.path).is_some(), method.is_public(), "{}", method.path);
        }
    }

    #[test]
    fn another_verb_is_told_which_verbs_there_are() {
        let table = table();
        let Found::OtherVerb(node) = table.find(&Verb::PUT, "/products/prod_1", None) else { panic!("it is known") };
        assert_eq!(node.allow, "GET, PATCH, DELETE");
        assert!(matches!(table.find(&Verb::HEAD, "/products", None), Found::OtherVerb(_)));
        for path in ["/products/", "/products//api-keys", "/product", "/v1/status/", "", "*"] {
            assert!(matches!(table.find(&Verb::GET, path, None), Found::Nothing), "{path}");
        }
    }

    #[test]
    fn an_owner_without_a_channel_is_refused() {
        let refused = Table::new(Contract::get(), |owner| (owner != "catalog").then(Channel::local)).unwrap_err();
        assert!(matches!(refused, GatewayError::NoChannel(owner) if owner == "catalog"));
    }

    #[test]
    fn grpc_accepts_the_callers_of_the_surfaces_but_never_another_process() {
        let table = table();
        for rpc in table.rpcs() {
            assert!(!rpc.accepted.has(Caller::Service), "{}", rpc.method.path);
            for caller in rpc.method.callers.iter().filter(|caller| **caller != Caller::Service) {
                assert!(rpc.accepted.has(*caller), "{}", rpc.method.path);
            }
        }
    }
}
