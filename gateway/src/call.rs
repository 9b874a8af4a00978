//! One call on its way through the gateway: what is learnt of it, for its answer and for the record.
//!
//! A call is recorded when it ends, also where its caller goes away in the middle and the work on it is dropped.

use std::{net::IpAddr, sync::Arc, time::Instant};

use http::{HeaderMap, HeaderName, HeaderValue, Method as Verb, Request, StatusCode, Uri, header::USER_AGENT};
use paperkey_kit::{
    audit::AuditSink,
    clock::Clock,
    shed::Place,
    telemetry::{self, Span},
};
use paperkey_proto::{
    Error,
    auth::v1::{AuditCall, AuditRecord},
    contract::Method,
    options::v1::{Caller, Tenant},
    principal::v1::Principal,
};

use crate::{
    figures::{self, Running, Way},
    session::Outcome,
};

/// What is recorded of a call whose caller did not wait for the answer: nginx's word for it.
pub(crate) const GONE: u16 = 499;

/// What of a caller's text is recorded at most.
const MAX_TEXT: usize = 1_024;

/// What the caller is told beside the answer.
#[derive(Clone, Debug, Default)]
pub(crate) struct Told(Vec<(HeaderName, HeaderValue)>);

impl Told {
    pub(crate) fn tell(&mut self, name: HeaderName, value: HeaderValue) {
        self.0.push((name, value));
    }

    /// Puts it on an answer, in place of whatever stands there under the same names.
    pub(crate) fn put_on(&self, headers: &mut HeaderMap) {
        for (name, value) in &self.0 {
            headers.insert(name.clone(), value.clone());
        }
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&HeaderName, &HeaderValue)> {
        self.0.iter().map(|(name, value)| (name, value))
    }
}

/// One call.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) request_id: String,
    /// Where it comes from, as far as proxies that are trusted say.
    pub(crate) client: IpAddr,
    /// Who calls; nobody in particular, or not known yet.
    pub(crate) principal: Option<Arc<Principal>>,
    /// What is called.
    pub(crate) method: Option<Arc<Method>>,
    /// The ids that the path names.
    pub(crate) resources: Vec<String>,
    /// The team that the path names.
    pub(crate) team: Option<String>,
    pub(crate) told: Told,
    /// What becomes of the session that it makes or ends.
    pub(crate) session: Outcome,
    /// The code of the error, and the status that it has over REST.
    pub(crate) error: Option<(&'static str, StatusCode)>,
    /// Nothing of it is recorded or counted: it is no call of the API.
    pub(crate) aside: bool,
    /// Its place among those that are answered at a time; none before it has one.
    pub(crate) place: Option<Place>,
    /// How it came.
    pub(crate) way: Way,
    /// Its span, where it is recorded.
    pub(crate) span: Span,
    audit: Option<Arc<AuditSink>>,
    /// What it is counted by, unless it was lent.
    running: Option<Running>,
    clock: Clock,
    at_ms: i64,
    started: Instant,
    verb: Option<Verb>,
    uri: Uri,
    user_agent: Option<HeaderValue>,
}

impl Call {
    /// A call that has arrived.
    pub(crate) fn new<B>(
        request: &Request<B>,
        client: IpAddr,
        request_id: String,
        clock: &Clock,
        audit: Option<Arc<AuditSink>>,
    ) -> Self {
        Self {
            way: Way::default(),
            audit,
            running: Some(figures::begins()),
            clock: clock.clone(),
            request_id,
            client,
            principal: None,
            method: None,
            resources: Vec::new(),
            team: None,
            told: Told::default(),
            session: Outcome::default(),
            error: None,
            aside: false,
            place: None,
            at_ms: clock.now_ms(),
            started: clock.monotonic(),
            span: Span::default(),
            verb: Some(request.method().clone()),
            uri: request.uri().clone(),
            user_agent: request.headers().get(USER_AGENT).cloned(),
        }
    }

    /// It is a call by gRPC, whose verb says nothing.
    pub(crate) fn is_grpc(&mut self) {
        self.verb = None;
    }

    /// It was refused.
    pub(crate) fn failed(&mut self, error: &Error) {
        let entry = error.entry();
        let code = if entry.agent_code.is_empty() { "PB_INTERNAL" } else { entry.agent_code.as_str() };
        self.error = Some((code, crate::envelope::status_of(error)));
    }

    /// The same call, to be answered by somebody who may not come back with it. Only one of the two is recorded: the
    /// one that this one becomes, or itself.
    pub(crate) fn lend(&mut self) -> Self {
        Self {
            request_id: self.request_id.clone(),
            client: self.client,
            principal: self.principal.clone(),
            method: self.method.clone(),
            resources: self.resources.clone(),
            team: self.team.clone(),
            told: self.told.clone(),
            session: self.session,
            error: self.error,
            aside: self.aside,
            place: None,
            way: self.way,
            audit: None,
            running: None,
            clock: self.clock.clone(),
            at_ms: self.at_ms,
            started: self.started,
            span: std::mem::take(&mut self.span),
            verb: self.verb.clone(),
            uri: self.uri.clone(),
            user_agent: self.user_agent.clone(),
        }
    }

    /// Takes back what was lent, with all that was learnt of it.
    pub(crate) fn take_back(&mut self, mut lent: Self) {
        lent.audit = self.audit.take();
        lent.place = self.place.take();
        lent.running = self.running.take();
        *self = lent;
    }

    /// Records it, now that it is answered.
    pub(crate) fn ends(mut self, status: StatusCode) {
        let status = self.error.map_or(status, |(_, status)| status);
        self.record(status.as_u16());
    }

    /// Says of its span what it was. Who reads traces is no reader of records: of what the caller has sent, only the verb
    /// is told.
    fn describe(&mut self, status: u16) {
        let mut span = std::mem::take(&mut self.span);
        if !span.is_recorded() {
            return;
        }
        if let Some(verb) = &self.verb {
            span.set("http.request.method", || telemetry::verb(verb));
        }
        span.set("paperkey.request_id", || self.request_id.clone());
        if self.aside {
            return;
        }
        span.set("http.response.status_code", || i64::from(status));
        if let Some(method) = &self.method {
            span.set("rpc.method", || method.path.trim_start_matches('/').to_owned());
        }
        if !self.team_id().is_empty() {
            span.set("paperkey.team_id", || self.team_id().to_owned());
        }
        if let Some((code, _)) = self.error {
            span.set("paperkey.error_code", || code);
        }
        if status >= 500 {
            span.failed(|| self.error.map_or("5xx", |(code, _)| code).into());
        }
    }

    fn record(&mut self, status: u16) {
        self.describe(status);
        let (audit, running) = (self.audit.take(), self.running.take());
        if self.aside || (audit.is_none() && running.is_none()) {
            return;
        }
        let duration = self.clock.monotonic().saturating_duration_since(self.started);
        if let Some(running) = running {
            let code = self.error.map(|(code, _)| code);
            running.ends((self.method.as_deref(), self.way, &self.uri), status, code, duration);
        }
        let Some(audit) = audit else { return };
        let principal = self.principal.as_deref();
        let kind = principal.map_or(Caller::Anyone, Principal::kind);
        let text = |text: &str| match text.char_indices().nth(MAX_TEXT) {
            Some((end, _)) => text[..end].to_owned(),
            None => text.to_owned(),
        };
        let record = AuditRecord {
            at_ms: self.at_ms,
            team_id: self.team_id().to_owned(),
            actor_kind: kind.as_str_name().trim_start_matches("CALLER_").to_ascii_lowercase(),
            actor_id: principal.map(|principal| principal.id.clone()).unwrap_or_default(),
            actor_name: principal.map(|principal| principal.name.clone()).unwrap_or_default(),
            rpc: self.method.as_deref().map(|method| method.path.clone()).unwrap_or_default(),
            call: Some(AuditCall {
                method: self.verb.as_ref().map(|verb| text(verb.as_str())).unwrap_or_default(),
                path: text(self.uri.path()),
                status: i32::from(status),
                code: self.error.map(|(code, _)| code.to_owned()).unwrap_or_default(),
                duration_us: i64::try_from(duration.as_micros()).unwrap_or(i64::MAX),
                ip: self.client.to_string(),
                user_agent: self
                    .user_agent
                    .as_ref()
                    .map(|agent| text(&String::from_utf8_lossy(agent.as_bytes())))
                    .unwrap_or_default(),
            }),
            request_id: std::mem::take(&mut self.request_id),
            resources: std::mem::take(&mut self.resources),
        };
        audit.record(record);
    }

    /// Whose log the call belongs into: that of the team that it touches. What an account does beside its teams is
    /// nobody's.
    fn team_id(&self) -> &str {
        let Some(principal) = self.principal.as_deref() else { return "" };
        if principal.kind() == Caller::SystemKey
            && let Some(team) = &self.team
        {
            return team;
        }
        let of_no_team = |method: &Arc<Method>| method.policy.tenant() == Tenant::None;
        if principal.kind() == Caller::Account && self.method.as_ref().is_some_and(of_no_team) {
            return "";
        }
        &principal.team_id
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        self.record(GONE);
    }
}
