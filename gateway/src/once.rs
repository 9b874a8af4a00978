//! `Idempotency-Key`: what tells a repetition of a call, derived here, where the raw credential is known.
//!
//! The raw credential and the key are mixed into three values, and nothing else of them goes on: an id to find the
//! answer by, a key to seal it under, and a hash of the request. So a kept answer is opened by whoever has both again,
//! and by nobody else. The credential of a person is the session: a key that was used in one says nothing in another.
//!
//! Two bodies are the same request if they say the same: the order of the names of a JSON object, which some programs
//! change from one time to the next, does not count, nor does whether a call came by REST or by gRPC. What waits,
//! keeps and repeats is the kit's, in front of each service.

use std::sync::Arc;

use http::{HeaderMap, HeaderName};
use paperkey_kit::{once::Once, secrets::KeyedHash};
use paperkey_proto::{
    Error,
    contract::Method,
    options::v1::Tenant,
    principal::v1::{Once as Token, Principal},
};
use prost_reflect::{DynamicMessage, MapKey, ReflectMessage as _, Value};
use sha2::{Digest as _, Sha256};

use crate::{envelope::Refusal, policy::Arrival, table::Rpc, transcode::FRAME_HEADER_BYTES};

/// What the header is called in messages.
const SHOWN: &str = "Idempotency-Key";
/// The header, and the metadata entry of gRPC.
const HEADER: HeaderName = HeaderName::from_static("idempotency-key");

const MAX_KEY_BYTES: usize = 255;

/// What was derived may be kept for a day: other ways to derive it need other labels.
const CALL_LABEL: &str = "paperkey/once/v1";
const ID_LABEL: &str = "id";
const SEAL_LABEL: &str = "seal";

/// Whether a call asks to take effect once, and its method heeds that.
pub(crate) fn is_asked_for(headers: &HeaderMap, rpc: &Rpc) -> bool {
    rpc.method.policy.idempotent && headers.contains_key(HEADER)
}

/// Refuses a key where a body is streamed: it is not kept, so that a repetition would take effect again, and whoever
/// sends a key counts on the contrary.
pub(crate) fn must_not_be_asked_for(headers: &HeaderMap, rpc: &Rpc) -> Result<(), Error> {
    if rpc.body_field.is_some() && headers.contains_key(HEADER) {
        return Err(Error::field(SHOWN, "must be left out where the body is a file: a repetition takes effect again"));
    }
    Ok(())
}

/// What tells a repetition of a call, if its caller wants it to take effect once and the method can do that. The frame
/// is that of the request as it goes to the service.
pub(crate) fn of_call(
    arrival: &Arrival<'_>,
    principal: Option<&Principal>,
    frame: &[u8],
) -> Result<Option<Arc<Once>>, Refusal> {
    let Arrival { headers, rpc, .. } = *arrival;
    if !is_asked_for(headers, rpc) {
        return Ok(None);
    }
    let (Some(principal), Some(credential)) = (principal, arrival.presented().credential?) else {
        return Ok(None);
    };
    let message = frame.get(FRAME_HEADER_BYTES..).unwrap_or_default();
    once(headers, &rpc.method, credential, principal, message).map_err(Refusal::as_sent)
}

/// What tells a repetition of this call, if its caller wants it to take effect once and the method can do that.
/// `message` is the request as it goes to the service, without a frame around it.
fn once(
    headers: &HeaderMap,
    method: &Method,
    credential: &str,
    principal: &Principal,
    message: &[u8],
) -> Result<Option<Arc<Once>>, Error> {
    if !method.policy.idempotent {
        return Ok(None);
    }
    let Some(key) = key_of(headers)? else { return Ok(None) };
    // A method that touches no team's data does not care for which team the caller has named: joining the first one
    // must not make a repetition another call.
    let team = if method.policy.tenant() == Tenant::None { "" } else { principal.team_id.as_str() };
    let mode = principal.mode().as_str_name();
    let secret = KeyedHash::new(credential.as_bytes()).hash(&joined(&[CALL_LABEL, key, &method.path, team, mode]));
    let secret = KeyedHash::new(&secret);
    let token = Token {
        id: secret.hash(ID_LABEL.as_bytes()).to_vec(),
        request_hash: hash_of(method, message),
        seal_key: secret.hash(SEAL_LABEL.as_bytes()).to_vec(),
    };
    let once = Once::new(token).ok_or_else(|| Error::internal("a key or a hash has not the length of one"))?;
    Ok(Some(Arc::new(once)))
}

/// The key that a call brings, if it brings one.
fn key_of(headers: &HeaderMap) -> Result<Option<&str>, Error> {
    let mut values = headers.get_all(HEADER).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(Error::field(SHOWN, "must not be sent twice"));
    }
    let bytes = value.as_bytes();
    let is_key = !bytes.is_empty() && bytes.len() <= MAX_KEY_BYTES && bytes.iter().all(u8::is_ascii_graphic);
    match value.to_str() {
        Ok(key) if is_key => Ok(Some(key)),
        _ => Err(Error::field(SHOWN, format!("must be 1 to {MAX_KEY_BYTES} visible ASCII characters"))),
    }
}

/// Texts in one, such that no two lists of texts become the same.
fn joined(texts: &[&str]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for text in texts {
        bytes.extend_from_slice(&(text.len() as u64).to_be_bytes());
        bytes.extend_from_slice(text.as_bytes());
    }
    bytes
}

/// The same for all messages that say the same. A message that is none is hashed as it is; the service refuses it.
fn hash_of(method: &Method, message: &[u8]) -> Vec<u8> {
    let mut hash = Sha256::new();
    match DynamicMessage::decode(method.descriptor.input(), message) {
        Ok(message) => feed_message(&mut hash, &message),
        Err(_) => hash.update(message),
    }
    hash.finalize().to_vec()
}

/// By the numbers of its fields, which is the order in which they are kept. A field that is not known is not heard by
/// the service either.
fn feed_message(hash: &mut Sha256, message: &DynamicMessage) {
    // Which fields were sent is a set, though it is written as a list.
    let is_mask = message.descriptor().full_name() == "google.protobuf.FieldMask";
    for (field, value) in message.fields() {
        hash.update(b"f");
        hash.update(field.number().to_be_bytes());
        match value {
            Value::List(paths) if is_mask => {
                let mut paths: Vec<&str> = paths.iter().filter_map(Value::as_str).collect();
                paths.sort_unstable();
                feed_bytes(hash, &joined(&paths));
            }
            value => feed(hash, value),
        }
    }
    hash.update(b"e");
}

fn feed(hash: &mut Sha256, value: &Value) {
    match value {
        Value::Bool(value) => hash.update([u8::from(*value)]),
        Value::I32(number) | Value::EnumNumber(number) => hash.update(number.to_be_bytes()),
        Value::I64(number) => hash.update(number.to_be_bytes()),
        Value::U32(number) => hash.update(number.to_be_bytes()),
        Value::U64(number) => hash.update(number.to_be_bytes()),
        Value::F32(number) => hash.update(number.to_be_bytes()),
        Value::F64(number) => hash.update(number.to_be_bytes()),
        Value::String(text) => feed_bytes(hash, text.as_bytes()),
        Value::Bytes(bytes) => feed_bytes(hash, bytes),
        Value::Message(message) => feed_message(hash, message),
        Value::List(values) => {
            hash.update((values.len() as u64).to_be_bytes());
            for value in values {
                feed(hash, value);
            }
        }
        Value::Map(entries) => {
            let mut entries: Vec<(&MapKey, &Value)> = entries.iter().collect();
            entries.sort_unstable_by_key(|(key, _)| *key);
            hash.update((entries.len() as u64).to_be_bytes());
            for (key, value) in entries {
                feed(hash, &key.clone().into());
                feed(hash, value);
            }
        }
    }
}

fn feed_bytes(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_be_bytes());
    hash.update(bytes);
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use http::HeaderValue;
    use paperkey_proto::{
        Contract,
        errors::v1::Reason,
        options::v1::{Caller, LetterCase},
        principal::v1::Mode,
    };

    use super::*;
    use crate::transcode::{FRAME_HEADER_BYTES, Parts, Schema};

    const CREATE_PRODUCT: &str = "/paperkey.catalog.v1.CatalogService/CreateProduct";
    const CREATE_LICENSE: &str = "/paperkey.licensing.v1.LicensingService/CreateLicense";
    const CREATE_TEAM: &str = "/paperkey.auth.v1.TeamService/CreateTeam";

    fn method(path: &str) -> &'static Method {
        Contract::get().method(path).expect("it is in the contract")
    }

    fn of_team(team: &str, mode: Mode) -> Principal {
        Principal { kind: Caller::Account.into(), team_id: team.into(), mode: mode.into(), ..Principal::default() }
    }

    fn keys(values: &[&[u8]]) -> HeaderMap {
        values.iter().map(|value| (HEADER, HeaderValue::from_bytes(value).unwrap())).collect()
    }

    /// The wire bytes of a body, as the gateway makes them.
    fn wire(path: &str, body: &str) -> Vec<u8> {
        let input = method(path).descriptor.input();
        let mut schema = Schema::new();
        let id = schema.learn(&input).unwrap();
        let parts = Parts { case: LetterCase::Camel, variables: &[], query: None, body: Some(body.as_bytes()) };
        schema.request(id, &parts).unwrap().split_off(FRAME_HEADER_BYTES)
    }

    fn token(key: &str, path: &str, credential: &str, principal: &Principal, message: &[u8]) -> Token {
        let once = once(&keys(&[key.as_bytes()]), method(path), credential, principal, message);
        once.unwrap().unwrap().token().clone()
    }

    #[test]
    fn a_key_is_visible_ascii_of_a_bounded_length_and_stands_alone() {
        let of = |values: &[&[u8]]| {
            let headers = keys(values);
            let once = once(&headers, method(CREATE_PRODUCT), "tok", &of_team("team_1", Mode::Live), b"");
            once.map(|once| once.is_some()).map_err(|error| (error.reason(), error.violations()[0].field.clone()))
        };
        let refused = Err((Reason::ValidationFailed, "Idempotency-Key".to_owned()));
        assert_eq!(of(&[]), Ok(false));
        assert_eq!(of(&[b"a"]), Ok(true));
        assert_eq!(of(&[&[b'~'; 255]]), Ok(true));
        let long = [b'a'; 256];
        let bad: [&[&[u8]]; 6] = [&[b""], &[&long], &[b"a b"], &[b"\xc3\xa9"], &[b"a\t"], &[b"a", b"a"]];
        for values in bad {
            assert_eq!(of(values), refused, "{values:?}");
        }
    }

    #[test]
    fn a_method_that_takes_no_key_does_not_look_at_one() {
        for path in ["/paperkey.catalog.v1.CatalogService/UpdateProduct", "/paperkey.auth.v1.AuthService/Login"] {
            let found = once(&keys(&[b"a b", b"c"]), method(path), "tok", &Principal::default(), b"");
            assert!(found.unwrap().is_none(), "{path}");
        }
    }

    #[test]
    fn whatever_differs_makes_another_call_with_another_key_to_seal_by() {
        let live = of_team("team_1", Mode::Live);
        let calls = [
            token("a", CREATE_PRODUCT, "tok_1", &live, b""),
            token("b", CREATE_PRODUCT, "tok_1", &live, b""),
            token("a", CREATE_LICENSE, "tok_1", &live, b""),
            token("a", CREATE_PRODUCT, "tok_2", &live, b""),
            token("a", CREATE_PRODUCT, "tok_1", &of_team("team_1", Mode::Test), b""),
            token("a", CREATE_PRODUCT, "tok_1", &of_team("team_2", Mode::Live), b""),
        ];
        let all: HashSet<Vec<u8>> = calls.iter().flat_map(|call| [call.id.clone(), call.seal_key.clone()]).collect();
        assert_eq!(all.len(), 2 * calls.len());
        assert_eq!(token("a", CREATE_PRODUCT, "tok_1", &live, b""), calls[0]);
        assert!(!format!("{:?}", calls[0]).contains(&format!("{:?}", calls[0].seal_key)), "it is not printed");
    }

    #[test]
    fn joining_a_team_does_not_make_another_call_of_what_concerns_none() {
        let (none, one) = (of_team("", Mode::Live), of_team("team_1", Mode::Live));
        assert_eq!(token("a", CREATE_TEAM, "tok", &none, b""), token("a", CREATE_TEAM, "tok", &one, b""));
    }

    #[test]
    fn two_bodies_that_say_the_same_are_the_same_request() {
        let hash = |path, body| hash_of(method(path), &wire(path, body));
        let first = r#"{"name": "Plan", "sku": "P", "metadata": {"a": 1, "b": {"c": [1, 2], "d": null}}}"#;
        let same = r#"{"metadata": {"b": {"d": null, "c": [1, 2]}, "a": 1}, "sku": "P", "name": "Plan"}"#;
        assert_eq!(hash(CREATE_PRODUCT, first), hash(CREATE_PRODUCT, same));
        for other in [
            r#"{"name": "Plan", "sku": "P", "metadata": {"a": 1, "b": {"c": [2, 1], "d": null}}}"#,
            r#"{"name": "Plan", "sku": "P", "metadata": {"a": 1, "b": {"c": [1, 2]}}}"#,
            r#"{"name": "Plan", "sku": "P"}"#,
            r#"{"name": "Plan", "description": "P", "metadata": {"a": 1, "b": {"c": [1, 2], "d": null}}}"#,
            r#"{"name": "PlanP", "sku": "", "metadata": {"a": 1, "b": {"c": [1, 2], "d": null}}}"#,
        ] {
            assert_ne!(hash(CREATE_PRODUCT, first), hash(CREATE_PRODUCT, other), "{other}");
        }
        let mask = r#"{"productId": "prod_1", "email": null, "maxActivations": null}"#;
        let same = r#"{"maxActivations": null, "productId": "prod_1", "email": null}"#;
        let other = r#"{"productId": "prod_1", "maxActivations": null}"#;
        assert_eq!(hash(CREATE_LICENSE, mask), hash(CREATE_LICENSE, same));
        assert_ne!(hash(CREATE_LICENSE, mask), hash(CREATE_LICENSE, other));
        assert_ne!(hash_of(method(CREATE_LICENSE), b"\xff"), hash_of(method(CREATE_LICENSE), b"\xfe"), "no messages");
    }
}
