//! Events: which there are, and the bytes in which they are sent.

use jiff::Timestamp;
use paperkey_kit::values::rfc3339;
use paperkey_proto::Error;
use serde::{Deserialize, Serialize, de::IgnoredAny};
use serde_json::json;

/// The event that an endpoint is tried out with.
pub(crate) const TEST: &str = "webhook.test";

/// The events that an endpoint of a product may have.
pub(crate) const OF_PRODUCTS: [&str; 8] = [
    "license.created",
    "license.updated",
    "license.revoked",
    "license.reinstated",
    "license.expired",
    "activation.created",
    "activation.removed",
    TEST,
];

/// The events that an endpoint of a team may have.
pub(crate) const OF_TEAMS: [&str; 8] = [
    "api_key.created",
    "api_key.rotated",
    "api_key.revoked",
    "api_key.rotation_due",
    "quota.warning",
    "quota.exceeded",
    "alert.created",
    TEST,
];

/// The events that a product, or the team where none is named, may have.
fn known(product_id: &str) -> [&'static str; 8] {
    if product_id.is_empty() { OF_TEAMS } else { OF_PRODUCTS }
}

/// Whether a product, or the team where none is named, may have that event.
pub(crate) fn is_known(product_id: &str, topic: &str) -> bool {
    known(product_id).contains(&topic)
}

/// The events that an endpoint of a product, or of the team where none is named, subscribes to, if all are known.
pub(crate) fn subscription(product_id: &str, events: Vec<String>) -> Result<Vec<String>, Error> {
    let known = known(product_id);
    if events.is_empty() {
        return Err(Error::field("events", format!("needs at least one of {}", known.join(", "))));
    }
    match events.iter().position(|event| !known.contains(&event.as_str())) {
        Some(at) => Err(Error::field(format!("events[{at}]"), format!("must be one of {}", known.join(", ")))),
        None => Ok(events),
    }
}

/// The body of an event's deliveries: made once, sent as it is, so that a signature always fits. `None` where `data`
/// is not JSON.
pub(crate) fn body(id: &str, topic: &str, created_at_ms: i64, data_json: &str) -> Option<Vec<u8>> {
    #[derive(Serialize)]
    #[serde(rename_all = "camelCase")]
    struct Head<'a> {
        id: &'a str,
        event: &'a str,
        created_at: String,
    }
    // Whatever the service that made the event wrote goes out verbatim, so it must be one value and no more.
    serde_json::from_str::<IgnoredAny>(data_json).ok()?;
    let head = Head { id, event: topic, created_at: rfc3339(created_at_ms) };
    let mut body = serde_json::to_vec(&head).ok()?;
    body.pop();
    body.extend_from_slice(b",\"data\":");
    body.extend_from_slice(data_json.as_bytes());
    body.push(b'}');
    Some(body)
}

/// What an endpoint is told when it is tried out.
pub(crate) fn test_data(endpoint_id: &str) -> String {
    json!({ "webhookId": endpoint_id, "message": "This is a test: somebody has asked for it, and nothing has happened" })
        .to_string()
}

/// When the event of that body happened.
pub(crate) fn created_at_ms(body: &str) -> Option<i64> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Head {
        created_at: String,
    }
    let head: Head = serde_json::from_str(body).ok()?;
    head.created_at.parse::<Timestamp>().ok().map(Timestamp::as_millisecond)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_body_is_id_event_time_and_data_verbatim() {
        let body = body("evt_1", "license.created", 1_798_675_200_000, r#"{"b":1, "a":[1e2]}"#).unwrap();
        assert_eq!(
            String::from_utf8(body).unwrap(),
            r#"{"id":"evt_1","event":"license.created","createdAt":"2026-12-31T00:00:00.000Z","data":{"b":1, "a":[1e2]}}"#
        );
    }

    #[test]
    fn a_body_tells_when_its_event_happened() {
        let body = body("evt_1", TEST, 1_798_675_200_123, &test_data("wh_1")).unwrap();
        let body = String::from_utf8(body).unwrap();
        assert_eq!(created_at_ms(&body), Some(1_798_675_200_123));
        assert!(body.contains(r#""webhookId":"wh_1""#));
        for nonsense in ["", "{}", r#"{"createdAt":"soon"}"#] {
            assert_eq!(created_at_ms(nonsense), None);
        }
    }

    #[test]
    fn data_that_is_not_one_json_value_makes_no_body() {
        for data in ["", "{", "{}{}", "{}, \"id\": 1", "nul"] {
            assert_eq!(body("evt_1", "license.created", 0, data), None, "{data}");
        }
    }

    #[test]
    fn an_unknown_event_is_refused_by_its_place_and_with_the_known_ones() {
        for (product_id, known, others) in [("prod_1", OF_PRODUCTS, OF_TEAMS), ("", OF_TEAMS, OF_PRODUCTS)] {
            for unknown in ["license.eaten", others[0]] {
                let error = subscription(product_id, vec![known[0].into(), unknown.into()]).unwrap_err();
                let [violation] = error.violations() else { panic!("one violation") };
                assert_eq!(violation.field, "events[1]");
                assert!(known.iter().all(|known| violation.message.contains(known)));
            }
            assert!(subscription(product_id, vec![]).is_err());
            assert!(subscription(product_id, known.map(str::to_owned).to_vec()).is_ok());
        }
    }
}
