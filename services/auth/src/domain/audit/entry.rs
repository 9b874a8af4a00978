//! Entries: what one request is known for, put together from the records of a call and of the changes that it made.
//!
//! A change belongs to the call of the same request that began at most half a minute before it. One that has no such
//! call is an entry of its own, so that nothing that was changed is lost from sight: its gateway may have been killed,
//! or nobody has called.

use std::collections::{HashMap, HashSet};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use paperkey_proto::{
    Error,
    auth::v1::{AuditCall, AuditRecord},
    errors::v1::Reason,
};
use ring::digest::{SHA256, digest};

use super::CROCKFORD;
use crate::domain::could_be_id;

/// A call makes its changes within this.
pub(crate) const AFTER_MS: i64 = 30_000;
/// Clocks of two machines may differ by this.
pub(crate) const BEFORE_MS: i64 = 5_000;

/// A record, and the place that is its alone.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Placed {
    pub(crate) record: AuditRecord,
    pub(crate) block_id: String,
    pub(crate) index: usize,
}

/// What is shown as one.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    pub(crate) id: String,
    pub(crate) at_ms: i64,
    pub(crate) actor_kind: String,
    pub(crate) actor_id: String,
    pub(crate) actor_name: String,
    pub(crate) rpc: String,
    pub(crate) resources: Vec<String>,
    pub(crate) request_id: String,
    /// What only the gateway knew; absent where it could not say.
    pub(crate) call: Option<AuditCall>,
}

impl Entry {
    /// Its place among others: newest first.
    fn place(&self) -> (i64, &str) {
        (self.at_ms, &self.id)
    }
}

/// Whether a change was made by the call of that time.
pub(crate) fn belongs(change_at_ms: i64, call_at_ms: i64) -> bool {
    let after_ms = change_at_ms.saturating_sub(call_at_ms);
    (-BEFORE_MS..=AFTER_MS).contains(&after_ms)
}

/// The entries of some calls with their changes, and of changes that no call has made.
pub(crate) fn entries(calls: Vec<Placed>, changes: &[AuditRecord], alone: Vec<Placed>) -> Vec<Entry> {
    let mut by_request: HashMap<&str, Vec<&AuditRecord>> = HashMap::new();
    for change in changes.iter().filter(|change| !change.request_id.is_empty()) {
        by_request.entry(&change.request_id).or_default().push(change);
    }
    let mut entries: Vec<Entry> = Vec::with_capacity(calls.len() + alone.len());
    for call in calls {
        let made = by_request.get(call.record.request_id.as_str());
        let mut made: Vec<_> =
            made.into_iter().flatten().copied().filter(|change| belongs(change.at_ms, call.record.at_ms)).collect();
        made.sort_by_key(|change| change.at_ms);
        entries.push(of_call(call, &made));
    }
    entries.extend(alone.into_iter().map(of_change));
    entries.sort_by(|one, other| other.place().cmp(&one.place()));
    entries
}

fn of_call(call: Placed, changes: &[&AuditRecord]) -> Entry {
    let of_request = call.record.request_id.strip_prefix("req_").map(|rest| format!("aud_{rest}"));
    let id = of_request.filter(|id| could_be_id(id)).unwrap_or_else(|| derived_id(&call));
    let mut entry = shown(id, call.record);
    let mut known: HashSet<&str> = HashSet::new();
    let mut resources = std::mem::take(&mut entry.resources);
    resources.extend(changes.iter().flat_map(|change| change.resources.iter().cloned()));
    entry.resources = Vec::with_capacity(resources.len());
    for resource in &resources {
        if known.insert(resource) {
            entry.resources.push(resource.clone());
        }
    }
    if entry.actor_id.is_empty() && matches!(entry.actor_kind.as_str(), "" | "anyone") {
        // Who registers is nobody until it is done. A service only does what it was asked for.
        let doer = changes.iter().find(|change| !matches!(change.actor_kind.as_str(), "" | "anyone" | "service"));
        if let Some(doer) = doer {
            entry.actor_kind.clone_from(&doer.actor_kind);
            entry.actor_id.clone_from(&doer.actor_id);
            entry.actor_name.clone_from(&doer.actor_name);
        }
    }
    if let (true, Some(change)) = (entry.rpc.is_empty(), changes.first()) {
        entry.rpc.clone_from(&change.rpc);
    }
    entry
}

fn of_change(change: Placed) -> Entry {
    let id = derived_id(&change);
    shown(id, change.record)
}

fn shown(id: String, record: AuditRecord) -> Entry {
    let AuditRecord { at_ms, request_id, actor_kind, actor_id, actor_name, rpc, resources, call, .. } = record;
    Entry { id, at_ms, actor_kind, actor_id, actor_name, rpc, resources, request_id, call }
}

/// The id of what no request names: the same each time that it is read.
fn derived_id(placed: &Placed) -> String {
    let hash = digest(&SHA256, format!("{}#{}", placed.block_id, placed.index).as_bytes());
    let digits = hash.as_ref().iter().take(26).map(|byte| char::from(CROCKFORD[usize::from(byte & 31)]));
    "aud_".chars().chain(digits).collect()
}

/// Which entries are asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Filter {
    actor: String,
    key: String,
    method: String,
    status: Option<Status>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Is(i32),
    /// Such as `4xx`.
    Hundred(i32),
}

impl Filter {
    /// Reads a filter; an empty part leaves everything.
    pub(crate) fn new(actor: String, key: String, method: String, status: &str) -> Result<Self, Error> {
        Ok(Self { actor, key, method, status: status_of(status)? })
    }

    /// Whether it leaves the entry.
    pub(crate) fn leaves(&self, entry: &Entry) -> bool {
        let actor = self.actor.is_empty() || [&entry.actor_id, &entry.actor_kind].contains(&&self.actor);
        let key = self.key.is_empty() || entry.actor_id == self.key || entry.resources.contains(&self.key);
        let is_method = |call: &AuditCall| call.method.eq_ignore_ascii_case(&self.method);
        let method = self.method.is_empty()
            || entry.call.as_ref().is_some_and(is_method)
            || entry.rpc.contains(self.method.as_str());
        let status = self.status.is_none_or(|status| {
            entry.call.as_ref().is_some_and(|call| match status {
                Status::Is(status) => call.status == status,
                Status::Hundred(hundred) => call.status / 100 == hundred,
            })
        });
        actor && key && method && status
    }
}

fn status_of(text: &str) -> Result<Option<Status>, Error> {
    if text.is_empty() {
        return Ok(None);
    }
    let status = match text.as_bytes() {
        [hundred @ b'1'..=b'5', b'x' | b'X', b'x' | b'X'] => Some(Status::Hundred(i32::from(hundred - b'0'))),
        [b'1'..=b'5', b'0'..=b'9', b'0'..=b'9'] => text.parse().ok().map(Status::Is),
        _ => None,
    };
    status.map(Some).ok_or_else(|| Error::field("status", "must be an HTTP status such as 404, or a class such as 4xx"))
}

/// Where a page ends: what is older, in time and id, is on the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cursor {
    pub(crate) at_ms: i64,
    /// Empty where all of that millisecond are on the page.
    pub(crate) id: String,
}

impl Cursor {
    /// After that entry.
    pub(crate) fn after(entry: &Entry) -> Self {
        Self { at_ms: entry.at_ms, id: entry.id.clone() }
    }

    /// Reads what [`Self::token`] wrote.
    pub(crate) fn read(token: &str) -> Result<Option<Self>, Error> {
        if token.is_empty() {
            return Ok(None);
        }
        let read = || {
            let text = String::from_utf8(BASE64.decode(token).ok()?).ok()?;
            let (at_ms, id) = text.split_once('.')?;
            let at_ms = at_ms.parse().ok().filter(|at_ms| *at_ms >= 0)?;
            (id.is_empty() || could_be_id(id)).then(|| Self { at_ms, id: id.to_owned() })
        };
        read().map(Some).ok_or_else(|| {
            Error::new(Reason::ValidationFailed)
                .with_violation("page_token", "must be the next page token of an earlier answer")
        })
    }

    /// As a caller has it.
    pub(crate) fn token(&self) -> String {
        BASE64.encode(format!("{}.{}", self.at_ms, self.id))
    }

    /// The moment before which it all was.
    pub(crate) fn until_ms(&self) -> i64 {
        if self.id.is_empty() { self.at_ms } else { self.at_ms.saturating_add(1) }
    }

    /// Whether an entry is beyond it.
    pub(crate) fn is_before(&self, entry: &Entry) -> bool {
        entry.place() < (self.at_ms, self.id.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(at_ms: i64, request_id: &str, resource: &str) -> AuditRecord {
        AuditRecord { at_ms, request_id: request_id.into(), resources: vec![resource.into()], ..Default::default() }
    }

    fn placed(record: AuditRecord) -> Placed {
        Placed { record, block_id: "audb_1.0".into(), index: 7 }
    }

    fn call(at_ms: i64, request_id: &str) -> Placed {
        let call = Some(AuditCall { method: "POST".into(), status: 404, ..Default::default() });
        placed(AuditRecord {
            call,
            actor_kind: "anyone".into(),
            resources: Vec::new(),
            ..record(at_ms, request_id, "")
        })
    }

    #[test]
    fn a_call_takes_what_it_has_changed() {
        let mut register = record(1_010, "req_1", "usr_1");
        register.actor_kind = "account".into();
        register.actor_id = "usr_1".into();
        register.rpc = "paperkey.auth.v1.AuthService/Register".into();
        let mut service = record(1_005, "req_1", "team_1");
        service.actor_kind = "service".into();
        let changes = [register, service, record(1_000, "req_2", "x"), record(40_000, "req_1", "late")];
        let made = entries(vec![call(1_000, "req_1")], &changes, Vec::new());
        let [entry] = made.as_slice() else { panic!("{made:?}") };
        assert_eq!((entry.id.as_str(), entry.actor_id.as_str()), ("aud_1", "usr_1"));
        assert_eq!(entry.resources, ["team_1", "usr_1"]);
        assert!(entry.call.is_some());
    }

    #[test]
    fn a_filter_leaves_what_is_asked_for() {
        let mut entry = shown("aud_1".into(), call(1, "req_1").record);
        entry.actor_id = "key_1".into();
        entry.rpc = "paperkey.catalog.v1.CatalogService/CreateProduct".into();
        entry.resources = vec!["key_2".into()];
        let leaves = |actor: &str, key: &str, method: &str, status: &str| {
            Filter::new(actor.into(), key.into(), method.into(), status).unwrap().leaves(&entry)
        };
        assert!(leaves("", "", "", ""));
        assert!(leaves("key_1", "key_2", "post", "404") && leaves("anyone", "key_1", "CreateProduct", "4xx"));
        for (actor, key, method, status) in [
            ("key_2", "", "", ""),
            ("", "key_3", "", ""),
            ("", "", "GET", ""),
            ("", "", "", "405"),
            ("", "", "", "5xx"),
        ] {
            assert!(!leaves(actor, key, method, status), "{actor}{key}{method}{status}");
        }
        entry.call = None;
        let status = Filter::new(String::new(), String::new(), String::new(), "404").unwrap();
        assert!(!status.leaves(&entry));
        for nonsense in ["4", "xxx", "600", "4x4", "é4"] {
            assert!(status_of(nonsense).is_err(), "{nonsense}");
        }
    }

    #[test]
    fn a_cursor_comes_back_as_it_was() {
        for cursor in [Cursor { at_ms: 5, id: "aud_1".into() }, Cursor { at_ms: 5, id: String::new() }] {
            assert_eq!(Cursor::read(&cursor.token()).unwrap(), Some(cursor));
        }
        for nonsense in ["%", "a b", "MQ", &BASE64.encode("-1.a"), &BASE64.encode("1.'; DROP TABLE")] {
            assert!(Cursor::read(nonsense).is_err(), "{nonsense}");
        }
    }
}
