//! Values that stand for what callers send and are sent, made from the contract alone.
//!
//! A value follows from what the contract says of its field, in this order: a word of its own where it names some, the
//! prefix or the example that its comment gives in backticks, the resource that its name points at, and its name and type.
//! Deliberately absent: a table of methods. A new one has its examples when its messages have comments like all others.

use std::collections::BTreeMap;

use paperkey_proto::{
    options::v1::LetterCase,
    rules::{Demands, demands_of},
};
use prost_reflect::{DescriptorPool, FieldDescriptor, Kind, MessageDescriptor};

use super::{
    comments::Comments,
    schemas::{Way, is_mask, name_in, words_of},
};
use crate::{
    json::Json,
    transcode::{in_order_of_declaration, is_inline, screaming_case},
};

/// What follows the prefix of an id.
const ID: &str = "01k6f7q2d8x4m9v3c5t0w1n7za";
/// What follows the prefix of a token: as long as a real one, and its checksum is wrong for every prefix.
const TOKEN: &str = "ExampleExampleExampleExampleExample0";
/// What follows the prefix of a webhook's secret.
const SECRET: &str = "ExampleExampleExampleExample";
/// A session, cut short.
const SESSION: &str = "eyJhbGciOiJFZERTQSJ9.eyJzdWIiOiJ1c3JfMDEifQ.example";
/// A moment that has passed.
const PAST: &str = "2026-01-15T09:30:00.000Z";
/// A moment that is far away, so that the examples of today can still be sent tomorrow.
const FUTURE: &str = "2035-01-01T00:00:00.000Z";
/// How deep examples go.
const DEPTH: usize = 8;

/// How much of a request is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Extent {
    /// What it needs.
    Least,
    /// Everything that it takes.
    Whole,
}

/// Makes examples.
#[derive(Debug)]
pub(super) struct Examples<'c> {
    comments: &'c Comments,
    /// The prefixes of ids, by resource, such as `license`.
    prefixes: BTreeMap<String, String>,
}

impl<'c> Examples<'c> {
    pub(super) fn new(pool: &DescriptorPool, comments: &'c Comments) -> Self {
        let mut prefixes = BTreeMap::new();
        for message in pool.all_messages().filter(|message| message.full_name().starts_with("paperkey.")) {
            let said = message.get_field_by_name("id").and_then(|id| {
                comments.above(message.parent_file().name(), id.path()).and_then(prefix_in).map(str::to_owned)
            });
            if let Some(prefix) = said {
                prefixes.insert(screaming_case(message.name()).to_ascii_lowercase(), prefix);
            }
        }
        Self { comments, prefixes }
    }

    /// An answer.
    pub(super) fn answer(&self, message: &MessageDescriptor, case: LetterCase) -> Json {
        Json::Object(self.members(message, case, Way::Answer, Extent::Whole, &[], 0))
    }

    /// The body of a request, without what the path gives.
    pub(super) fn body(
        &self,
        message: &MessageDescriptor,
        case: LetterCase,
        extent: Extent,
        variables: &[String],
    ) -> Json {
        Json::Object(self.members(message, case, Way::Request, extent, variables, 0))
    }

    /// A file as it is uploaded, with the columns that the comment of its field names in backticks.
    pub(super) fn file(&self, message: &MessageDescriptor, data: &FieldDescriptor) -> String {
        let said = self.said_of(data).unwrap_or_default();
        let sentence = said.split(". ").find(|sentence| sentence.contains("columns")).unwrap_or_default();
        let columns: Vec<&str> = backticked(sentence).filter(|column| !is_undone(column)).collect();
        let cells = columns.iter().map(|column| match column.strip_suffix("_at") {
            Some(_) => moment(column).to_owned(),
            None if column.starts_with("max_") => "3".to_owned(),
            // A cell that holds JSON or a comma would stand in quotes.
            None if *column == "metadata" => String::new(),
            None => self.text(message, column, "", &Demands::default()),
        });
        format!("{}\n{}\n", columns.join(","), cells.collect::<Vec<_>>().join(","))
    }

    fn members(
        &self,
        message: &MessageDescriptor,
        case: LetterCase,
        way: Way,
        extent: Extent,
        without: &[String],
        depth: usize,
    ) -> Vec<(String, Json)> {
        let mut members = Vec::new();
        for field in in_order_of_declaration(message) {
            if without.iter().any(|name| name == field.name()) || (way == Way::Request && is_mask(&field)) {
                continue;
            }
            if let (true, Kind::Message(inner)) = (is_inline(&field), field.kind()) {
                members.extend(self.members(&inner, case, way, extent, without, depth));
                continue;
            }
            if way == Way::Request && extent == Extent::Least && !is_needed(&demands_of(&field)) {
                continue;
            }
            members.push((name_in(case, field.name()), self.field(&field, case, way, depth)));
        }
        members
    }

    /// The value of a field.
    pub(super) fn field(&self, field: &FieldDescriptor, case: LetterCase, way: Way, depth: usize) -> Json {
        let value = || self.value(field, case, way, depth);
        match field.kind() {
            Kind::Message(entry) if field.is_map() => {
                let inner = entry.map_entry_value_field();
                Json::object([("renders", self.value(&inner, case, way, depth))])
            }
            _ if field.is_list() => Json::List(vec![value()]),
            // What has not happened to a thing that is in use.
            _ if way == Way::Answer && field.supports_presence() && is_undone(field.name()) && !is_done_by(field) => {
                Json::Null
            }
            _ => value(),
        }
    }

    fn value(&self, field: &FieldDescriptor, case: LetterCase, way: Way, depth: usize) -> Json {
        let demands = demands_of(field);
        let said = self.said_of(field).unwrap_or_default();
        match field.kind() {
            Kind::Bool => true.into(),
            Kind::Float | Kind::Double => 1.into(),
            Kind::String => self.text(field.parent_message(), field.name(), said, &demands).into(),
            Kind::Bytes => "RXhhbXBsZQ==".into(),
            Kind::Enum(words) => words_of(&words).into_iter().next().map_or(Json::Null, Json::from),
            Kind::Message(message) => match message.full_name() {
                "google.protobuf.Timestamp" => moment(field.name()).into(),
                "google.protobuf.Duration" => "1.5s".into(),
                "google.protobuf.Struct" => Json::object([("order", "A-1042".into())]),
                "google.protobuf.ListValue" => Json::List(Vec::new()),
                "google.protobuf.Value" => Json::Null,
                _ if depth >= DEPTH => Json::Null,
                _ => Json::Object(self.members(&message, case, way, Extent::Whole, &[], depth + 1)),
            },
            _ => number(field.name(), &demands).into(),
        }
    }

    fn said_of(&self, field: &FieldDescriptor) -> Option<&str> {
        self.comments.above(field.parent_message().parent_file().name(), field.path())
    }

    fn text(&self, message: &MessageDescriptor, name: &str, said: &str, demands: &Demands) -> String {
        if let Some(word) = demands.words.first() {
            return word.clone();
        }
        if name == "prefix" || name.ends_with("_prefix") {
            let prefix = prefix_in(said).map(|prefix| format!("{prefix}AbCd"));
            return prefix.or_else(|| example_in(said).map(str::to_owned)).unwrap_or_else(|| "pk_live_AbCd".to_owned());
        }
        if let Some(resource) = name.strip_suffix("_id").or_else(|| (name == "id").then_some("")) {
            return format!("{}{ID}", self.prefix_of(message, resource, said));
        }
        if let Some(prefix) = prefix_in(said) {
            return of_prefix(prefix);
        }
        if let Some(example) = example_in(said) {
            return example.to_owned();
        }
        let by_name = match name {
            "email" => "ada@example.com",
            "name" => return self.name_of(message),
            "password" => "correct horse battery staple",
            "current_password" => "the one until now",
            "token" if message.name().ends_with("Response") => SESSION,
            "token" => return TOKEN.to_owned(),
            "tokens" | "key" => return of_prefix("pk_live_"),
            "url" => "https://example.com/webhooks/paperkey",
            "invite_url" => "https://example.com/app/invitation?token=example",
            "license_key" => "K7WX9-M3NP4-H8TRC-DJ",
            "fingerprint" => "9f86d081884c7d659a2feaa0c55ad015",
            "resources" => return format!("{}{ID}", self.prefix_of(message, "product", "")),
            "message" => "80 % of this month's renders are used.",
            "description" => "Edits photographs",
            "response_snippet" => "ok",
            "ip" | "allowlist" => "203.0.113.7",
            "scopes" => "licenses:read",
            "events" | "event" => "license.created",
            "version" => "1.0.0",
            "sku" => "APP-1",
            "company" => "Example Ltd",
            "user_agent" => "curl/8.5.0",
            "path" => "/licenses",
            "method" => "POST",
            "actor" => "team_key",
            "subject" => "renders",
            "revoked_by" | "superseded_by" => return format!("{}{ID}", self.prefix_of(message, "", said)),
            "query" => "ada@",
            "payload" => "{\"type\":\"license.created\"}",
            _ => "example",
        };
        let most = demands.length.1.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
        by_name.chars().take(most).collect()
    }

    /// What people call the thing that a message is about.
    fn name_of(&self, message: &MessageDescriptor) -> String {
        match self.resource_of(message).as_deref() {
            Some("product") => "Photo Editor",
            Some("team" | "team_details" | "api_key_team") => "Example Ltd",
            Some("user" | "member" | "client" | "api_key_actor" | "audit_actor") => "Ada Lovelace",
            Some("activation") => "MacBook Pro",
            Some(resource) if resource.contains("api_key") => "Continuous integration",
            Some(_) => "Example",
            None if message.name().contains("Key") => "Continuous integration",
            None if message.name().contains("License") || message.name().contains("Activation") => "MacBook Pro",
            None => "Ada Lovelace",
        }
        .to_owned()
    }

    /// The prefix of the ids of a resource; of the one that the message is about where none is named.
    fn prefix_of(&self, message: &MessageDescriptor, resource: &str, said: &str) -> String {
        if let Some(prefix) = prefix_in(said) {
            return prefix.to_owned();
        }
        // Requests are no messages of the contract.
        if resource == "request" {
            return "req_".to_owned();
        }
        let known = || self.prefixes.iter().find(|(_, prefix)| prefix.strip_suffix('_') == Some(resource));
        let named = self.prefixes.get(resource).cloned().or_else(|| known().map(|(_, prefix)| prefix.clone()));
        named
            .or_else(|| self.prefixes.get(&self.resource_of(message)?).cloned())
            .unwrap_or_else(|| if message.name().ends_with("Actor") { "usr_" } else { "key_" }.to_owned())
    }

    /// The resource that a message is or is about, such as `license` of `RevokeLicenseRequest`: the longest that its name
    /// holds.
    fn resource_of(&self, message: &MessageDescriptor) -> Option<String> {
        let name = screaming_case(message.name()).to_ascii_lowercase();
        self.prefixes.keys().filter(|resource| name.contains(resource.as_str())).max_by_key(|name| name.len()).cloned()
    }
}

/// Whether a request cannot do without a field.
fn is_needed(demands: &Demands) -> bool {
    demands.required || demands.items.0.is_some()
}

/// Whether a name tells of an end, which most things have not met.
fn is_undone(name: &str) -> bool {
    let ends = ["revoked_", "superseded_", "rotated_", "next_page_", "previous_", "error", "code"];
    ends.iter().any(|word| name.starts_with(word))
}

/// Whether a field tells of what its very message has done, such as `revoked_at` of `RevokeApiKeyResponse`.
fn is_done_by(field: &FieldDescriptor) -> bool {
    let message = screaming_case(field.parent_message().name()).to_ascii_lowercase();
    message.split('_').next().is_some_and(|verb| field.name().starts_with(verb))
}

fn moment(name: &str) -> &'static str {
    let ahead = ["expires", "resets", "due", "effective", "until", "next"];
    if ahead.iter().any(|word| name.contains(word)) { FUTURE } else { PAST }
}

fn number(name: &str, demands: &Demands) -> i64 {
    let by_name = match name {
        "page_size" => 20,
        "days" => 30,
        "limit" | "requests_per_minute" => 100,
        "remaining" => 58,
        "used" => 42,
        "amount" => 4_900,
        "status" | "response_status" => 200,
        "rotate_every_days" => 90,
        "overlap_hours" => 24,
        name if name.ends_with("_ms") => 12,
        name if name.ends_with("activations") || name.ends_with("activations_limit") => 3,
        name if name.ends_with("failures") => 0,
        _ => 1,
    };
    by_name.clamp(demands.range.0.unwrap_or(i64::MIN), demands.range.1.unwrap_or(i64::MAX))
}

/// What stands between backticks.
fn backticked(said: &str) -> impl Iterator<Item = &str> {
    said.split('`').skip(1).step_by(2)
}

/// The prefix that a comment shows first, such as `pk_` of `pk_…`.
fn prefix_in(said: &str) -> Option<&str> {
    backticked(said).next()?.strip_suffix('…').filter(|prefix| prefix.ends_with('_'))
}

/// The example that a comment gives: what is said to be such, or what it begins with.
fn example_in(said: &str) -> Option<&str> {
    let after = said.split_once("uch as `").map(|(_, rest)| rest).or_else(|| said.strip_prefix('`'))?;
    after.split('`').next().filter(|example| !example.is_empty() && !example.contains(['…', '{', ' ']))
}

/// A whole token or id of a prefix.
fn of_prefix(prefix: &str) -> String {
    match prefix {
        "whsec_" => format!("{prefix}{SECRET}"),
        _ if prefix.starts_with("pk_") || prefix.starts_with("pb_") || prefix.starts_with("po_") || prefix == "sk_" => {
            format!("{prefix}{TOKEN}")
        }
        _ => format!("{prefix}{ID}"),
    }
}

#[cfg(test)]
mod tests {
    use paperkey_kit::token::TokenKind;
    use paperkey_proto::contract::pool;

    use super::*;

    #[test]
    fn what_a_comment_shows_is_found() {
        assert_eq!(prefix_in("`pk_live_…`, `pk_test_…`: an integration."), Some("pk_live_"));
        assert_eq!(prefix_in("Such as `licenses:read`."), None);
        assert_eq!(example_in("What one is counted in, such as `seat`."), Some("seat"));
        assert_eq!(example_in("`csv` or `ndjson`."), Some("csv"));
        assert_eq!(example_in("Needs `this`."), None);
    }

    #[test]
    fn ids_have_the_prefix_of_what_they_name() {
        let comments = Comments::read(pool());
        let examples = Examples::new(pool(), &comments);
        let at = |message: &str, name: &str| {
            let message = pool().get_message_by_name(message).unwrap();
            let field = message.get_field_by_name(name).unwrap();
            match examples.field(&field, LetterCase::Snake, Way::Request, 0) {
                Json::Text(text) => text.trim_end_matches(ID).to_owned(),
                other => panic!("{other:?}"),
            }
        };
        for (message, name, prefix) in [
            ("paperkey.licensing.v1.License", "id", "lic_"),
            ("paperkey.licensing.v1.RevokeLicenseRequest", "id", "lic_"),
            ("paperkey.licensing.v1.CreateLicenseRequest", "product_id", "prod_"),
            ("paperkey.licensing.v1.CreateLicenseRequest", "client_id", "cli_"),
            ("paperkey.licensing.v1.DeleteActivationRequest", "activation_id", "act_"),
            ("paperkey.catalog.v1.GetProductRequest", "id", "prod_"),
            ("paperkey.auth.v1.GetApiKeyRequest", "key_id", "key_"),
            ("paperkey.auth.v1.GetApiKeyRequest", "team_id", "team_"),
            ("paperkey.auth.v1.UpdateMemberRequest", "user_id", "usr_"),
            ("paperkey.webhook.v1.GetDeliveryRequest", "webhook_id", "wh_"),
            ("paperkey.webhook.v1.GetDeliveryRequest", "delivery_id", "dlv_"),
        ] {
            assert_eq!(at(message, name), prefix, "{name} of {message}");
        }
    }

    #[test]
    fn no_example_of_a_token_is_one() {
        for kind in TokenKind::ALL {
            assert!(TokenKind::of(&format!("{}{TOKEN}", kind.prefix())).is_none(), "{kind:?}");
        }
    }
}
