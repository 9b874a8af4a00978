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
    assert_eq!(at("post /auth/register", "403"), ["REGISTRATION_CLOSED", "SCOPE_INSUFFICIENT"]);
    assert_eq!(at("post /auth/register", "429"), ["AUTH_RATE_LIMITED", "RATE_LIMITED"]);
    assert_eq!(at("post /auth/login", "401"), ["INVALID_CREDENTIALS"]);
    // A browser that asks for a cookie, on a page of somebody else's.
    assert_eq!(at("post /auth/login", "403"), ["SCOPE_INSUFFICIENT"]);
    assert_eq!(at("post /v1/keys", "409"), ["CONFLICT", "KEY_LIMIT_REACHED"]);
    assert_eq!(at("get /products/{id}", "404"), ["NOT_FOUND"]);
    assert_eq!(
        at("get /api/v1/products/{id}", "403"),
        ["FEATURE_NOT_IN_PLAN", "IP_NOT_ALLOWED", "ROLE_INSUFFICIENT", "SCOPE_INSUFFICIENT"]
    );
    for (line, status) in [("get /v1/status", "404"), ("get /products", "409"), ("post /auth/login", "404")] {
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

#[test]
fn everything_that_is_sent_and_answered_is_shown_by_an_example() {
    let document = read();
    let is_text = |kind: &str| kind == "text/csv";
    for (line, operation) in operations(&document) {
        for (kind, content) in object(&operation["requestBody"]["content"]) {
            let shown = if is_text(kind) { &content["example"] } else { &content["examples"]["whole"]["value"] };
            assert!(!shown.is_null(), "{line} takes {kind} without an example");
        }
        for (status, answer) in object(&operation["responses"]) {
            for (kind, content) in object(&followed(&document, answer)["content"]) {
                // An export has the columns of what is exported, or is an object a line.
                let is_export = is_text(kind) || content["schema"]["type"] == "string";
                let shown = content["example"].is_object() || content["examples"].is_object();
                assert!(shown || is_export, "{line} answers {status} with {kind} without an example");
            }
        }
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let required = parameter["required"] == true;
            assert_eq!(!parameter["example"].is_null(), required, "{line}: {parameter}");
        }
    }
    let body = |line: &str| &operation(&document, line)["requestBody"]["content"]["application/json"]["examples"];
    assert_eq!(
        body("post /licenses")["least"]["value"],
        serde_json::json!({"productId": "prod_01k6f7q2d8x4m9v3c5t0w1n7za"})
    );
    assert_eq!(body("post /v1/licenses/activate")["least"]["value"]["license_key"], "K7WX9-M3NP4-H8TRC-DJ");
    // What the path of another route gives, the credential gives here.
    assert!(body("post /v1/keys/{key_id}/rotate")["whole"]["value"]["team_id"].is_null());
    let file = &operation(&document, "post /licenses/import")["requestBody"]["content"]["text/csv"]["example"];
    assert!(file.as_str().is_some_and(|file| file.starts_with("product_id,key,email")), "{file}");
}

#[test]
fn every_operation_is_called_in_four_languages() {
    let document = read();
    for (line, operation) in operations(&document) {
        let samples = operation["x-codeSamples"].as_array().unwrap();
        let languages: Vec<&str> = samples.iter().filter_map(|sample| sample["lang"].as_str()).collect();
        assert_eq!(languages, ["Shell", "JavaScript", "Python", "Go"], "{line}");
        let needs_credential = operation["security"]
            .as_array()
            .is_some_and(|schemes| !schemes.is_empty() && !schemes.contains(&serde_json::json!({})));
        let path = line.split_once(' ').unwrap().1.split('{').next().unwrap();
        for sample in samples {
            let source = sample["source"].as_str().unwrap();
            assert!(source.contains(&format!("https://keys.example{path}")), "{line}: {source}");
            assert!(!source.contains("{teamId}") && !source.contains("{id}"), "{line}: {source}");
            assert_eq!(source.contains("PAPERKEY_"), needs_credential, "{line}: {source}");
        }
    }
}

#[test]
fn a_session_in_a_cookie_is_good_wherever_an_account_is_and_browsers_name_their_origin() {
    let document = read();
    for (line, operation) in operations(&document) {
        let has =
            |scheme: &str| operation["security"].as_array().unwrap().iter().any(|schemes| !schemes[scheme].is_null());
        assert_eq!(has("Account") && !line.starts_with("get "), has("Session"), "{line}");
    }
    let cookie = |document: &Value| document["components"]["securitySchemes"]["Session"]["name"].clone();
    assert_eq!(cookie(&document), "__Host-paperkey");
    let plain = super::document(Contract::get(), "http://127.0.0.1:8470", "1.2.3");
    assert_eq!(cookie(&serde_json::from_str(&plain).unwrap()), "paperkey_session");
    let login = operation(&document, "post /auth/login");
    assert!(!login["responses"]["200"]["headers"]["Set-Cookie"].is_null());
    let asks = |operation: &Value| operation["parameters"].to_string().contains("Paperkey-Session");
    assert!(asks(login) && asks(operation(&document, "post /auth/register")));
    assert!(!asks(operation(&document, "post /licenses")));
}
