use std::collections::HashMap;

use paperkey_proto::{
    error::{catalogue, reason_word},
    errors::v1::Reason,
};
use serde_json::Value;

use super::*;

fn read() -> Value {
    serde_json::from_str(&document(Contract::get(), "https://keys.example", "1.2.3")).unwrap()
}

fn object(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

/// Every operation, with its verb and path.
fn operations(document: &Value) -> Vec<(String, &Value)> {
    object(&document["paths"])
        .flat_map(|(path, verbs)| object(verbs).map(move |(verb, operation)| (format!("{verb} {path}"), operation)))
        .collect()
}

fn operation<'d>(document: &'d Value, line: &str) -> &'d Value {
    operations(document).into_iter().find(|(known, _)| known == line).unwrap_or_else(|| panic!("no {line}")).1
}

/// The answer that a reference leads to.
fn followed<'d>(document: &'d Value, value: &'d Value) -> &'d Value {
    match value["$ref"].as_str() {
        Some(to) => document.pointer(to.trim_start_matches('#')).unwrap_or_else(|| panic!("{to} leads nowhere")),
        None => value,
    }
}

/// The reasons that an operation answers with that status.
fn reasons_at(document: &Value, line: &str, status: &str) -> Vec<String> {
    let answer = followed(document, &operation(document, line)["responses"][status]);
    object(&answer["content"]["application/json"]["examples"]).map(|(name, _)| name.clone()).collect()
}

#[test]
fn every_public_route_is_there_once_and_nothing_else() {
    let document = read();
    let mut expected: Vec<String> = Contract::get()
        .methods()
        .iter()
        .filter(|method| method.is_public())
        .flat_map(|method| &method.routes)
        .map(|route| format!("{} {}", route.verb.as_str().to_ascii_lowercase(), blank(&route.template)))
        .collect();
    expected.sort();
    expected.dedup();
    let mut found: Vec<String> = operations(&document).iter().map(|(line, _)| blank(line)).collect();
    found.sort();
    assert_eq!(found, expected);
    let ids: BTreeSet<_> =
        operations(&document).iter().map(|(_, operation)| operation["operationId"].to_string()).collect();
    assert_eq!(ids.len(), found.len());
}

/// A path without the names of its variables.
fn blank(path: &str) -> String {
    path.split('/').map(|segment| if segment.starts_with('{') { "{}" } else { segment }).collect::<Vec<_>>().join("/")
}

#[test]
fn every_reference_leads_somewhere_and_every_variable_is_a_parameter() {
    fn walk(document: &Value, value: &Value, count: &mut usize) {
        match value {
            Value::Object(members) => {
                if let Some(Value::String(_)) = members.get("$ref") {
                    assert!(!followed(document, value).is_null());
                    *count += 1;
                }
                members.values().for_each(|value| walk(document, value, count));
            }
            Value::Array(items) => items.iter().for_each(|value| walk(document, value, count)),
            _ => {}
        }
    }
    let document = read();
    let mut count = 0;
    walk(&document, &document, &mut count);
    assert!(count > 1_000, "{count}");
    for (line, operation) in operations(&document) {
        let declared: Vec<_> = operation["parameters"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|parameter| parameter["in"] == "path")
            .map(|parameter| parameter["name"].as_str().unwrap().to_owned())
            .collect();
        assert_eq!(declared, names_in(line.split_once(' ').unwrap().1), "{line}");
        assert!(operation["summary"].as_str().is_some_and(|said| said.contains(' ')), "{line} says nothing");
    }
}

#[test]
fn no_two_messages_share_a_schema() {
    let mut names: HashMap<String, String> = HashMap::new();
    for message in pool().all_messages().filter(|message| message.full_name().starts_with("paperkey.")) {
        let other = names.insert(message.name().to_owned(), message.full_name().to_owned());
        assert!(other.is_none() || message.is_map_entry(), "{} and {other:?}", message.full_name());
    }
}

#[test]
fn every_operation_tells_the_errors_that_follow_from_its_policy() {
    let document = read();
    for (line, operation) in operations(&document) {
        for status in ["400", "429", "500", "503", "504"] {
            assert!(!operation["responses"][status].is_null(), "{line} never answers {status}");
        }
        let has_body = !operation["requestBody"].is_null();
        for status in ["413", "415"] {
            assert_eq!(!operation["responses"][status].is_null(), has_body, "{line} {status}");
        }
        let needs_credential = operation["security"].as_array().is_some_and(|schemes| !schemes.is_empty());
        assert!(!needs_credential || !operation["responses"]["401"].is_null(), "{line} never answers 401");
    }
    let at = |line: &str, status: &str| reasons_at(&document, line, status);
    let activate = "post /v1/licenses/activate";
    assert_eq!(at(activate, "401"), ["INVALID_CREDENTIALS"]);
    assert_eq!(
        at(activate, "403"),
        ["ACTIVATION_LIMIT_REACHED", "LICENSE_EXPIRED", "LICENSE_REVOKED", "SCOPE_INSUFFICIENT"]
    );
    assert_eq!(at(activate, "429"), ["LICENSE_RATE_LIMITED", "RATE_LIMITED"]);
    assert_eq!(at("post /v1/licenses/validate", "403"), ["SCOPE_INSUFFICIENT"]);
    assert_eq!(at("post /auth/register", "403"), ["REGISTRATION_CLOSED"]);
    assert_eq!(at("post /auth/register", "429"), ["AUTH_RATE_LIMITED", "RATE_LIMITED"]);
    assert_eq!(at("post /auth/login", "401"), ["INVALID_CREDENTIALS"]);
    assert_eq!(at("post /v1/keys", "409"), ["CONFLICT", "KEY_LIMIT_REACHED"]);
    assert_eq!(at("get /products/{id}", "404"), ["NOT_FOUND"]);
    assert_eq!(
        at("get /api/v1/products/{id}", "403"),
        ["FEATURE_NOT_IN_PLAN", "IP_NOT_ALLOWED", "ROLE_INSUFFICIENT", "SCOPE_INSUFFICIENT"]
    );
    for (line, status) in [("get /v1/status", "404"), ("get /products", "409"), ("post /auth/login", "403")] {
        assert!(operation(&document, line)["responses"][status].is_null(), "{line} answers {status}");
    }
}

#[test]
fn the_answers_of_all_surfaces_tell_every_reason_that_they_can() {
    let document = read();
    let mut told: HashMap<String, BTreeSet<String>> = HashMap::new();
    for (name, answer) in object(&document["components"]["responses"]) {
        let surface =
            ["Dashboard", "Client", "Team", "Platform"].into_iter().find(|word| name.starts_with(word)).unwrap();
        let contents = object(&answer["content"]).map(|(kind, _)| kind.as_str()).collect::<Vec<_>>();
        assert_eq!(contents, ["application/json", "application/problem+json"], "{name}");
        assert!(!answer["headers"]["X-Request-Id"].is_null(), "{name}");
        let status = name.trim_start_matches(surface).split('.').next().unwrap();
        let header = |name: &str| !answer["headers"][name].is_null();
        assert_eq!(header("Retry-After"), status == "429", "{name}");
        assert_eq!(header("WWW-Authenticate"), status == "401", "{name}");
        assert_eq!(header("Allow"), status == "405", "{name}");
        for (_, content) in object(&answer["content"]) {
            for (reason, example) in object(&content["examples"]) {
                let value = &followed(&document, example)["value"];
                assert!(value.is_object(), "{name} {reason}");
                told.entry(surface.to_owned()).or_default().insert(reason.clone());
            }
        }
    }
    for (surface, reasons) in &told {
        for reason in [Reason::MethodNotAllowed, Reason::NotFound, Reason::Internal] {
            assert!(reasons.contains(reason_word(reason)), "{surface} never tells {reason:?}");
        }
    }
    let everywhere: BTreeSet<_> = told.into_values().flatten().collect();
    assert_eq!(everywhere.len(), catalogue().count());
}

#[test]
fn schemas_speak_the_letter_case_of_their_surface_and_the_rules_of_the_contract() {
    let document = read();
    let body = |line: &str| operation(&document, line)["requestBody"]["content"]["application/json"]["schema"].clone();
    let create = body("post /licenses");
    assert_eq!(create["required"], serde_json::json!(["productId"]));
    assert_eq!(create["properties"]["maxActivations"]["minimum"], 0);
    assert_eq!(create["properties"]["maxActivations"]["type"], serde_json::json!(["integer", "null"]));
    assert_eq!(create["properties"]["email"]["format"], "email");
    assert!(create["properties"]["fieldMask"].is_null());
    assert_eq!(body("post /v1/licenses/activate")["required"], serde_json::json!(["license_key", "fingerprint"]));
    // What the path gives, the body does not.
    let rename = body("patch /teams/{teamId}");
    assert!(rename["properties"]["teamId"].is_null() && !rename["properties"]["name"].is_null());
    let answer = |line: &str, status: &str| {
        let answer = &operation(&document, line)["responses"][status];
        followed(&document, &answer["content"]["application/json"]["schema"]).clone()
    };
    assert!(!answer("get /products", "200")["properties"]["nextPageToken"].is_null());
    assert!(!answer("get /api/v1/products", "200")["properties"]["next_page_token"].is_null());
    assert_eq!(answer("get /licenses/{id}", "200")["allOf"][0]["$ref"], "#/components/schemas/License");
    let license = &document["components"]["schemas"]["License_snake"];
    assert_eq!(license["properties"]["status"]["enum"], serde_json::json!(["active", "expired", "revoked", null]));
    assert_eq!(license["required"].as_array().unwrap().len(), license["properties"].as_object().unwrap().len());
    assert!(answer("delete /products/{id}", "204").is_null());
    let listing = operation(&document, "get /teams/{teamId}/audit-logs");
    assert!(!listing["responses"]["200"]["content"]["text/csv"].is_null());
}
