//! Between the contract's values and those that are stored: times, JSON, field masks, pages.

use std::collections::BTreeMap;

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD as BASE64};
use paperkey_proto::{Error, errors::v1::Reason};
use prost_types::{FieldMask, ListValue, Struct, Timestamp, Value as ProtoValue, value::Kind};
use serde_json::{Map, Number, Value};

use crate::ids::could_be_id;

/// The largest metadata object, as JSON text in bytes.
pub const MAX_METADATA_BYTES: usize = 16_384;
/// The page size where none is named.
const DEFAULT_PAGE_SIZE: u64 = 20;
/// The largest page.
const MAX_PAGE_SIZE: u64 = 100;
/// The last millisecond of the year 9999, where RFC 3339 ends.
const MAX_TIME_MS: i64 = 253_402_300_799_999;

/// A stored time as the contract has it.
pub fn timestamp(ms: i64) -> Timestamp {
    let nanos = i32::try_from(ms.rem_euclid(1_000) * 1_000_000).unwrap_or(0);
    Timestamp { seconds: ms.div_euclid(1_000), nanos }
}

/// A stored time as RFC 3339, in UTC with milliseconds.
pub fn rfc3339(ms: i64) -> String {
    let time = jiff::Timestamp::from_millisecond(ms).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    format!("{time:.3}")
}

/// A stored time for people: `31 December 2026, 00:00 UTC`.
pub fn plain_time(ms: i64) -> String {
    let time = jiff::Timestamp::from_millisecond(ms).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    time.strftime("%-d %B %Y, %H:%M UTC").to_string()
}

/// A time of the contract as it is stored.
pub fn time_ms(field: &str, time: &Timestamp) -> Result<i64, Error> {
    let ms = time.seconds.saturating_mul(1_000).saturating_add(i64::from(time.nanos / 1_000_000));
    if (0..=MAX_TIME_MS).contains(&ms) {
        Ok(ms)
    } else {
        Err(Error::field(field, "must be a time between the years 1970 and 9999"))
    }
}

/// A JSON object of the contract, if it is small enough to be stored.
pub fn metadata(field: &str, object: &Struct) -> Result<Value, Error> {
    bounded(field, Value::Object(object_of(object)))
}

/// A JSON object with a merge patch (RFC 7396) applied.
pub fn merged_metadata(field: &str, target: Option<Value>, patch: &Struct) -> Result<Value, Error> {
    bounded(field, merge(target.unwrap_or(Value::Null), Value::Object(object_of(patch))))
}

fn bounded(field: &str, value: Value) -> Result<Value, Error> {
    if value.to_string().len() <= MAX_METADATA_BYTES {
        Ok(value)
    } else {
        Err(Error::field(field, format!("must be at most {MAX_METADATA_BYTES} bytes of JSON")))
    }
}

fn merge(target: Value, patch: Value) -> Value {
    let Value::Object(patch) = patch else { return patch };
    let mut merged = match target {
        Value::Object(members) => members,
        _ => Map::new(),
    };
    for (name, change) in patch {
        if change.is_null() {
            merged.remove(&name);
        } else {
            let before = merged.remove(&name).unwrap_or(Value::Null);
            merged.insert(name, merge(before, change));
        }
    }
    Value::Object(merged)
}

fn object_of(object: &Struct) -> Map<String, Value> {
    object.fields.iter().map(|(name, value)| (name.clone(), json_of(value))).collect()
}

fn json_of(value: &ProtoValue) -> Value {
    match &value.kind {
        None | Some(Kind::NullValue(_)) => Value::Null,
        Some(Kind::BoolValue(value)) => Value::Bool(*value),
        Some(Kind::NumberValue(value)) => number(*value),
        Some(Kind::StringValue(value)) => Value::String(value.clone()),
        Some(Kind::ListValue(list)) => Value::Array(list.values.iter().map(json_of).collect()),
        Some(Kind::StructValue(object)) => Value::Object(object_of(object)),
    }
}

/// Protobuf knows only doubles; a whole number comes back as one.
fn number(value: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if value.fract() == 0.0 && value.abs() <= EXACT {
        #[expect(clippy::cast_possible_truncation, reason = "a whole number of at most 53 bits")]
        let whole = value as i64;
        Value::Number(whole.into())
    } else {
        Number::from_f64(value).map_or(Value::Null, Value::Number)
    }
}

/// A stored JSON object as the contract has it.
pub fn struct_of(value: &Value) -> Option<Struct> {
    let members = value.as_object()?;
    let fields: BTreeMap<_, _> = members.iter().map(|(name, value)| (name.clone(), proto_of(value))).collect();
    Some(Struct { fields })
}

fn proto_of(value: &Value) -> ProtoValue {
    let kind = match value {
        Value::Null => Kind::NullValue(0),
        Value::Bool(value) => Kind::BoolValue(*value),
        Value::Number(value) => Kind::NumberValue(value.as_f64().unwrap_or(0.0)),
        Value::String(value) => Kind::StringValue(value.clone()),
        Value::Array(values) => Kind::ListValue(ListValue { values: values.iter().map(proto_of).collect() }),
        Value::Object(_) => Kind::StructValue(struct_of(value).unwrap_or_default()),
    };
    ProtoValue { kind: Some(kind) }
}

/// Which fields a request names.
#[derive(Clone, Debug)]
pub struct Mask(Option<Vec<String>>);

impl Mask {
    /// Reads a mask. Its paths must be among `known`; without a mask, fields that are present are named.
    pub fn new(mask: Option<FieldMask>, known: &[&str]) -> Result<Self, Error> {
        let Some(mask) = mask else { return Ok(Self(None)) };
        match mask.paths.iter().find(|path| !known.contains(&path.as_str())) {
            Some(path) => {
                // Echoed only in part: the path is the caller's text.
                let shown: String = path.chars().take(64).collect();
                Err(Error::field(shown, "cannot be changed"))
            }
            None => Ok(Self(Some(mask.paths))),
        }
    }

    /// Whether the field is named: to be set where present, cleared where not.
    pub fn names(&self, field: &str, present: bool) -> bool {
        match &self.0 {
            None => present,
            Some(paths) => paths.iter().any(|path| path == field),
        }
    }

    /// What to do with an optional field: `None` leaves it, `Some(None)` clears it.
    pub fn change<T>(&self, field: &str, value: Option<T>) -> Option<Option<T>> {
        self.names(field, value.is_some()).then_some(value)
    }

    /// What to do with a field that cannot be cleared.
    pub fn required_change<T>(&self, field: &str, value: Option<T>) -> Result<Option<T>, Error> {
        match self.change(field, value) {
            Some(None) => Err(Error::field(field, "cannot be null")),
            Some(Some(value)) => Ok(Some(value)),
            None => Ok(None),
        }
    }
}

/// A page of a list, newest first, by id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// How many at most.
    pub size: u64,
    /// Only those before this id.
    pub before: Option<String>,
}

impl Page {
    /// Reads the paging fields of a request.
    pub fn new(size: Option<i32>, token: &str) -> Result<Self, Error> {
        let size = match size {
            None => DEFAULT_PAGE_SIZE,
            Some(size) => u64::try_from(size).unwrap_or(0).min(MAX_PAGE_SIZE),
        };
        if size == 0 {
            return Err(Error::field("page_size", "must be at least 1"));
        }
        let before = match token {
            "" => None,
            token => Some(
                BASE64
                    .decode(token)
                    .ok()
                    .and_then(|bytes| String::from_utf8(bytes).ok())
                    .filter(|id| could_be_id(id))
                    .ok_or_else(|| {
                        Error::new(Reason::ValidationFailed)
                            .with_violation("page_token", "must be the next page token of an earlier answer")
                    })?,
            ),
        };
        Ok(Self { size, before })
    }

    /// Cuts a list that was read one row too long, and makes the token of the next page.
    pub fn cut<T>(&self, mut rows: Vec<T>, id: impl Fn(&T) -> &str) -> (Vec<T>, Option<String>) {
        let size = usize::try_from(self.size).unwrap_or(usize::MAX);
        if rows.len() <= size {
            return (rows, None);
        }
        rows.truncate(size);
        let token = rows.last().map(|last| BASE64.encode(id(last)));
        (rows, token)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn times_keep_their_milliseconds() {
        assert_eq!(rfc3339(1_798_675_200_000), "2026-12-31T00:00:00.000Z");
        assert_eq!(plain_time(1_798_675_200_000), "31 December 2026, 00:00 UTC");
        assert_eq!(time_ms("expires_at", &timestamp(1_798_675_200_123)).unwrap(), 1_798_675_200_123);
        assert!(time_ms("expires_at", &timestamp(-1)).is_err());
    }

    #[test]
    fn a_merge_patch_sets_removes_and_leaves() {
        let target = json!({"a": 1, "b": {"c": 2, "d": 3}});
        let patch = struct_of(&json!({"a": null, "b": {"c": null, "e": 4}, "f": [1, null]})).unwrap();
        let merged = merged_metadata("metadata", Some(target), &patch).unwrap();
        assert_eq!(merged, json!({"b": {"d": 3, "e": 4}, "f": [1, null]}));
    }

    #[test]
    fn metadata_is_bounded() {
        let large = struct_of(&json!({"a": "x".repeat(MAX_METADATA_BYTES)})).unwrap();
        assert_eq!(metadata("metadata", &large).unwrap_err().violations()[0].field, "metadata");
    }

    #[test]
    fn a_page_ends_where_its_token_begins() {
        let page = Page::new(Some(2), "").unwrap();
        let (rows, token) = page.cut(vec!["lic_c", "lic_b", "lic_a"], |id| id);
        assert_eq!(rows, ["lic_c", "lic_b"]);
        assert_eq!(Page::new(Some(500), &token.unwrap()).unwrap(), Page { size: 100, before: Some("lic_b".into()) });
        for nonsense in ["%", "a b", &BASE64.encode("x'; DROP TABLE")] {
            assert!(Page::new(None, nonsense).is_err(), "{nonsense}");
        }
        assert!(Page::new(Some(0), "").is_err());
    }
}
