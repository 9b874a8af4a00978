use std::collections::BTreeMap;

use paperkey_proto::{
    Error,
    contract::{self, Contract},
    options::v1::LetterCase,
};
use prost::Message as _;
use prost_reflect::{DynamicMessage, Kind as ProtoKind, MapKey, MessageDescriptor, ReflectMessage as _, Value};
use serde_json::{Value as Json, json};

use super::without_text;
use super::{FRAME_HEADER_BYTES, MAX_DEPTH, MessageId, Parts, Schema};

struct Fixture {
    schema: Schema,
    id: MessageId,
    descriptor: MessageDescriptor,
}

fn fixture(name: &str) -> Fixture {
    fixture_of(contract::pool().get_message_by_name(name).unwrap())
}

fn fixture_of(descriptor: MessageDescriptor) -> Fixture {
    let mut schema = Schema::new();
    let id = schema.learn(&descriptor).unwrap();
    Fixture { schema, id, descriptor }
}

impl Fixture {
    fn parts(body: &[u8]) -> Parts<'_> {
        Parts { case: LetterCase::Camel, variables: &[], query: None, body: Some(body) }
    }

    fn read(&self, parts: &Parts<'_>) -> Result<DynamicMessage, Error> {
        let frame = self.schema.request(self.id, parts)?;
        assert_eq!(frame[0], 0);
        let length = u32::from_be_bytes(frame[1..FRAME_HEADER_BYTES].try_into().unwrap());
        assert_eq!(length as usize, frame.len() - FRAME_HEADER_BYTES);
        Ok(DynamicMessage::decode(self.descriptor.clone(), &frame[FRAME_HEADER_BYTES..]).unwrap())
    }

    fn body(&self, body: &str) -> Result<DynamicMessage, Error> {
        self.read(&Self::parts(body.as_bytes()))
    }

    fn query(&self, query: &str) -> Result<DynamicMessage, Error> {
        self.read(&Parts { case: LetterCase::Camel, variables: &[], query: Some(query), body: None })
    }

    fn answer(&self, case: LetterCase, message: &DynamicMessage) -> Json {
        let json = self.schema.answer(self.id, case, &message.encode_to_vec()).unwrap();
        serde_json::from_slice(&json).unwrap()
    }
}

/// The one fault of a refused request: field and message.
fn fault(refused: Result<DynamicMessage, Error>) -> (String, String) {
    let error = refused.unwrap_err();
    assert_eq!(error.violations().len(), 1, "{:?}", error.violations());
    (error.violations()[0].field.clone(), error.violations()[0].message.clone())
}

fn set(message: &DynamicMessage, field: &str) -> Value {
    message.get_field_by_name(field).unwrap().into_owned()
}

fn mask(message: &DynamicMessage, field: &str) -> Vec<String> {
    let mask = set(message, field);
    let paths = mask.as_message().unwrap().get_field_by_name("paths").unwrap().into_owned();
    paths.as_list().unwrap().iter().map(|path| path.as_str().unwrap().to_owned()).collect()
}

#[test]
fn names_are_read_in_either_letter_case() {
    let request = fixture("paperkey.licensing.v1.CreateLicenseRequest");
    for body in [r#"{"productId": "p", "maxActivations": 3}"#, r#"{"product_id": "p", "max_activations": 3}"#] {
        let read = request.body(body).unwrap();
        assert_eq!(set(&read, "product_id").as_str(), Some("p"));
        assert_eq!(set(&read, "max_activations").as_i32(), Some(3));
    }
}

#[test]
fn every_fault_is_named_where_it_is() {
    let product = fixture("paperkey.catalog.v1.CreateProductRequest");
    let cases = [
        (r#"{"price": {"colour": 1}}"#, "price.colour", "unknown field"),
        (r#"{"name": 5}"#, "name", "must be a string"),
        (r#"{"name": ["a"]}"#, "name", "must be a string"),
        (r#"{"name": {"a": [1]}}"#, "name", "must be a string"),
        (r#"{"name": "a", "name": "b"}"#, "name", "must be given only once"),
        (r#"{"active": "true"}"#, "active", "must be true or false"),
        (r#"{"price": "5 EUR"}"#, "price", "must be an object"),
        (r#"{"price": {"amount": "5"}}"#, "price.amount", "must be an integer"),
        (r#"{"price": {"amount": 5.5}}"#, "price.amount", "must be an integer"),
        (r#"{"price": {"amount": 1e300}}"#, "price.amount", "must be an integer"),
        (r#"{"price": {"amount": 9223372036854775808}}"#, "price.amount", "must be an integer of 64 bits"),
        (r#"{"metadata": []}"#, "metadata", "must be an object"),
        (r#"{"metadata": {"a": {"b": 1, "b": 2}}}"#, "metadata.a.b", "must be given only once"),
    ];
    for (body, field, message) in cases {
        assert_eq!(fault(product.body(body)), (field.to_owned(), message.to_owned()), "{body}");
    }

    let licence = fixture("paperkey.licensing.v1.CreateLicenseRequest");
    let cases = [
        (r#"{"maxActivations": 2147483648}"#, "maxActivations", "must be an integer from -2147483648 to 2147483647"),
        (r#"{"max_activations": 1.5}"#, "maxActivations", "must be an integer"),
        (r#"{"fieldMask": "email"}"#, "fieldMask", "unknown field"),
        (
            r#"{"expiresAt": "tomorrow"}"#,
            "expiresAt",
            "must be a time as in RFC 3339, such as 2026-12-31T00:00:00.000Z",
        ),
    ];
    for (body, field, message) in cases {
        assert_eq!(fault(licence.body(body)), (field.to_owned(), message.to_owned()), "{body}");
    }

    let webhook = fixture("paperkey.webhook.v1.UpdateWebhookRequest");
    assert_eq!(
        fault(webhook.body(r#"{"status": "Active"}"#)),
        ("status".into(), "must be one of active, paused".into())
    );
    assert_eq!(fault(webhook.body(r#"{"events": ["a", null]}"#)), ("events[1]".into(), "must not be null".into()));
    assert_eq!(fault(webhook.body(r#"{"events": "a"}"#)), ("events".into(), "must be a list".into()));
}

#[test]
fn all_faults_are_told_at_once_up_to_a_bound() {
    let product = fixture("paperkey.catalog.v1.CreateProductRequest");
    let error = product.body(r#"{"name": 1, "nmae": "x", "price": {"amount": "x"}, "active": 0}"#).unwrap_err();
    let fields: Vec<_> = error.violations().iter().map(|violation| violation.field.as_str()).collect();
    assert_eq!(fields, ["name", "nmae", "price.amount", "active"]);

    let many: BTreeMap<String, u8> = (0..100).map(|number| (format!("x{number}"), 0)).collect();
    let error = product.body(&serde_json::to_string(&many).unwrap()).unwrap_err();
    assert_eq!(error.violations().len(), 20);
}

#[test]
fn null_is_absence_and_a_whole_number_may_have_a_point() {
    let licence = fixture("paperkey.licensing.v1.CreateLicenseRequest");
    let read = licence.body(r#"{"productId": null, "maxActivations": null, "metadata": null}"#).unwrap();
    assert!(!read.has_field_by_name("max_activations") && !read.has_field_by_name("metadata"));
    let read = licence.body(r#"{"maxActivations": 3.0}"#).unwrap();
    assert_eq!(set(&read, "max_activations").as_i32(), Some(3));
}

#[test]
fn the_mask_names_what_the_body_names() {
    let update = fixture("paperkey.licensing.v1.UpdateLicenseRequest");
    let id = update.schema.position(update.id, "id").unwrap();
    let read = |body: &str| {
        let parts = Parts { variables: &[(id, "lic%5F1")], ..Fixture::parts(body.as_bytes()) };
        update.read(&parts)
    };
    let message = read(r#"{"clientId": null, "email": "a@b.c"}"#).unwrap();
    assert_eq!(set(&message, "id").as_str(), Some("lic_1"));
    assert_eq!(mask(&message, "update_mask"), ["email", "client_id"]);
    assert!(!message.has_field_by_name("client_id"));
    for empty in ["", "{}"] {
        let message = read(empty).unwrap();
        assert!(message.has_field_by_name("update_mask") && mask(&message, "update_mask").is_empty());
    }
    assert_eq!(fault(read(r#"{"update_mask": "email"}"#)).1, "unknown field");
    assert_eq!(fault(read(r#"{"id": "lic_2"}"#)), ("id".into(), "is given by the path, not by the body".into()));
}

#[test]
fn each_element_of_a_list_has_a_mask_of_its_own() {
    let batch = fixture("paperkey.licensing.v1.BatchCreateLicensesRequest");
    let message = batch.body(r#"{"licenses": [{"maxActivations": null}, {"productId": "prod_1"}]}"#).unwrap();
    let licenses = set(&message, "licenses");
    let masks: Vec<_> =
        licenses.as_list().unwrap().iter().map(|one| mask(one.as_message().unwrap(), "field_mask")).collect();
    assert_eq!(masks, [["max_activations"], ["product_id"]]);
    let (field, message) = fault(batch.body(r#"{"licenses": [{"fieldMask": "email"}]}"#));
    assert_eq!((field.as_str(), message.as_str()), ("licenses[0].fieldMask", "unknown field"));
}

#[test]
fn queries_are_read_strictly() {
    let list = fixture("paperkey.licensing.v1.ListLicensesRequest");
    let read = list.query("productId=a%20b+c&page_size=5&status=active").unwrap();
    assert_eq!(set(&read, "product_id").as_str(), Some("a b c"));
    assert_eq!(set(&read, "page_size").as_i32(), Some(5));
    assert_eq!(set(&read, "status").as_enum_number(), Some(1));
    assert!(list.query("").is_ok() && list.query("&&").is_ok());

    let cases = [
        ("pageSize=5&page_size=6", "pageSize", "must be given only once"),
        ("pageSize=five", "pageSize", "must be an integer"),
        ("pageSize=", "pageSize", "must be an integer"),
        ("pageSize=99999999999999999999999999999999999999999", "pageSize", "must be an integer"),
        ("status=gone", "status", "must be one of active, expired, revoked"),
        ("colour=red", "colour", "unknown query parameter"),
        ("email=%ff", "email", "must be valid UTF-8, percent-encoded"),
        ("email=%f", "email", "must be valid UTF-8, percent-encoded"),
    ];
    for (query, field, message) in cases {
        assert_eq!(fault(list.query(query)), (field.to_owned(), message.to_owned()), "{query}");
    }
    let create = fixture("paperkey.licensing.v1.CreateLicenseRequest");
    let both = create.read(&Parts { query: Some("email=x"), ..Fixture::parts(b"{}") });
    assert_eq!(fault(both), ("email".into(), "unknown query parameter".into()));
}

#[test]
fn a_variable_of_the_path_must_be_utf_8() {
    let get = fixture("paperkey.licensing.v1.GetLicenseRequest");
    let id = get.schema.position(get.id, "id").unwrap();
    let read =
        |raw: &str| get.read(&Parts { case: LetterCase::Camel, variables: &[(id, raw)], query: None, body: None });
    assert_eq!(set(&read("a%2Fb+c").unwrap(), "id").as_str(), Some("a/b+c"));
    assert_eq!(fault(read("%c3%28")).0, "id");
    let twice = get.read(&Parts { case: LetterCase::Camel, variables: &[(id, "a")], query: Some("id=b"), body: None });
    assert_eq!(fault(twice), ("id".into(), "unknown query parameter".into()));
}

#[test]
fn what_is_no_json_object_is_refused_with_its_place() {
    let product = fixture("paperkey.catalog.v1.CreateProductRequest");
    let said = |body: &[u8]| {
        let error = product.read(&Fixture::parts(body)).unwrap_err();
        assert!(error.violations().is_empty());
        error.message().to_owned()
    };
    assert!(said(b"{\"name\": \n  nope}").contains("line 2 column 4"), "{}", said(b"{\"name\": \n  nope}"));
    assert_eq!(said(b"{\"name\": "), "The body is not complete JSON: it ends at line 1 column 9");
    assert!(said(b"{} {}").contains("trailing characters at line 1 column 4"));
    assert!(said(b"{\"name\": \"\\ud800\"}").contains("line 1"));
    assert_eq!(said(b"{\"name\": \"\xff\"}"), "The body is not valid UTF-8");
    for body in ["[]", "5", "-5", "0.5", "null", "\"x\"", "true"] {
        assert_eq!(said(body.as_bytes()), "The body must be a JSON object", "{body}");
    }
}

#[test]
fn depth_is_bounded_where_protobuf_can_still_read_it() {
    let product = fixture("paperkey.catalog.v1.CreateProductRequest");
    // The body and the metadata are two levels already.
    for (open, close) in [("{\"a\":", "}"), ("[", "]")] {
        let nested =
            |levels: usize| format!("{{\"metadata\":{{\"a\":{}1{}}}}}", open.repeat(levels), close.repeat(levels));
        let deepest = MAX_DEPTH - 2;
        let read = product.body(&nested(deepest)).unwrap();
        let json = product.answer(LetterCase::Camel, &read);
        assert!(json["metadata"]["a"].is_object() || json["metadata"]["a"].is_array());
        assert_eq!(
            product.body(&nested(deepest + 1)).unwrap_err().message(),
            "The body nests more than 32 levels deep"
        );
        // Skipped values may be as deep as the body is long.
        let skipped = format!("{{\"x\":{}1{}}}", "[".repeat(20_000), "]".repeat(20_000));
        assert_eq!(fault(product.body(&skipped)).1, "unknown field");
    }
}

#[test]
fn plain_json_comes_back_as_it_was() {
    let product = fixture("paperkey.catalog.v1.CreateProductRequest");
    let metadata = json!({
        "": null, "a": [1, -2, 2.5, [], {}, [null]], "b": {"c": "ü\"\\\n\u{1}\u{2028}", "d": true}, "n": 9_007_199_254_740_992_u64,
        "e": 1e300, "f": -0.25,
    });
    let read = product.body(&json!({"name": "x", "metadata": metadata}).to_string()).unwrap();
    let answer = product.answer(LetterCase::Camel, &read);
    assert_eq!(answer["metadata"].to_string(), metadata.to_string().replace("9007199254740992", "9007199254740992.0"));
    assert_eq!(
        fault(product.body(r#"{"metadata": {"id": 9007199254740993}}"#)),
        ("metadata.id".into(), "must be a number below 2^53 or a string: larger integers lose digits".into())
    );
}

#[test]
fn absent_values_are_there_as_null_and_inline_members_stand_in_the_parent() {
    let answer = fixture("paperkey.licensing.v1.GetLicenseResponse");
    let mut licence =
        DynamicMessage::new(contract::pool().get_message_by_name("paperkey.licensing.v1.License").unwrap());
    licence.set_field_by_name("id", Value::String("lic_1".into()));
    licence.set_field_by_name("status", Value::EnumNumber(1));
    let mut message = DynamicMessage::new(answer.descriptor.clone());
    message.set_field_by_name("license", Value::Message(licence));
    let expected = json!({
        "id": "lic_1", "productId": "", "key": "", "status": "active", "email": null, "clientId": null,
        "maxActivations": null, "activationsCount": 0, "expiresAt": null, "metadata": null, "createdAt": null,
        "updatedAt": null, "revokedAt": null, "activations": [],
    });
    assert_eq!(answer.answer(LetterCase::Camel, &message), expected);
    let json = answer.schema.answer(answer.id, LetterCase::Snake, &message.encode_to_vec()).unwrap();
    assert!(
        json.starts_with(br#"{"id":"lic_1","product_id":"","key":"","status":"active","email":null,"client_id":null"#)
    );

    let status = fixture("paperkey.auth.v1.GetStatusResponse");
    let json = status.answer(LetterCase::Snake, &DynamicMessage::new(status.descriptor.clone()));
    assert_eq!(json, json!({"status": "", "version": "", "time": null, "caller": null}));
}

#[test]
fn garbled_answers_are_errors_and_never_panics() {
    let answer = fixture("paperkey.licensing.v1.GetLicenseResponse");
    let mut chance = Chance(7);
    for _ in 0..20_000 {
        let bytes: Vec<u8> = (0..chance.below(40)).map(|_| chance.byte()).collect();
        if let Ok(json) = answer.schema.answer(answer.id, LetterCase::Camel, &bytes) {
            serde_json::from_slice::<Json>(&json).unwrap();
        }
    }
}

/// Numbers that look like chance and are the same on every run.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mixed = (self.0 ^ (self.0 >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        mixed ^ (mixed >> 33)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % u64::try_from(bound).unwrap()).unwrap()
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    fn text(&mut self) -> String {
        let pieces = [
            "",
            "a",
            "ü",
            "\"",
            "\\",
            "\n",
            "\u{0}",
            "\u{7f}",
            "日本",
            "🦀",
            "long enough to need a second length byte when it is repeated ",
        ];
        (0..self.below(6)).map(|_| pieces[self.below(pieces.len())]).collect()
    }
}

fn well_known(name: &str) -> DynamicMessage {
    DynamicMessage::new(contract::pool().get_message_by_name(&format!("google.protobuf.{name}")).unwrap())
}

/// A `google.protobuf.Struct`, made by reflection.
fn plain_object(members: &[(&str, Json)]) -> DynamicMessage {
    let mut object = well_known("Struct");
    let members = members.iter().map(|(name, json)| (MapKey::String((*name).to_owned()), Value::Message(plain(json))));
    object.set_field_by_name("fields", Value::Map(members.collect()));
    object
}

fn plain(json: &Json) -> DynamicMessage {
    let mut value = well_known("Value");
    match json {
        Json::Null => value.set_field_by_name("null_value", Value::EnumNumber(0)),
        Json::Bool(flag) => value.set_field_by_name("bool_value", Value::Bool(*flag)),
        Json::Number(number) => value.set_field_by_name("number_value", Value::F64(number.as_f64().unwrap())),
        Json::String(text) => value.set_field_by_name("string_value", Value::String(text.clone())),
        Json::Array(items) => {
            let mut list = well_known("ListValue");
            let items = items.iter().map(|item| Value::Message(plain(item)));
            list.set_field_by_name("values", Value::List(items.collect()));
            value.set_field_by_name("list_value", Value::Message(list));
        }
        Json::Object(members) => {
            let members: Vec<_> = members.iter().map(|(name, json)| (name.as_str(), json.clone())).collect();
            value.set_field_by_name("struct_value", Value::Message(plain_object(&members)));
        }
    }
    value
}

fn object_of(message: &DynamicMessage) -> Json {
    let fields = set(message, "fields");
    let members = fields.as_map().unwrap().iter();
    Json::Object(members.map(|(name, value)| (name.as_str().unwrap().to_owned(), json_of(value))).collect())
}

fn json_of(value: &Value) -> Json {
    let value = value.as_message().unwrap();
    let kind = value.descriptor().oneofs().next().unwrap().fields().find(|field| value.has_field(field)).unwrap();
    match value.get_field(&kind).as_ref() {
        Value::EnumNumber(_) => Json::Null,
        Value::Bool(flag) => json!(flag),
        Value::F64(number) => json!(number),
        Value::String(text) => json!(text),
        Value::Message(inner) if kind.name() == "struct_value" => object_of(inner),
        Value::Message(inner) => set(inner, "values").as_list().unwrap().iter().map(json_of).collect(),
        other => unreachable!("{other:?} is no value"),
    }
}

fn random(descriptor: &MessageDescriptor, chance: &mut Chance, depth: usize) -> DynamicMessage {
    let mut message = DynamicMessage::new(descriptor.clone());
    for field in descriptor.fields() {
        if chance.below(4) == 0 || field.kind().as_message().is_some_and(|kind| kind.name() == "FieldMask") {
            continue;
        }
        let one = |kind: &ProtoKind, chance: &mut Chance| -> Value {
            match kind {
                ProtoKind::Bool => Value::Bool(chance.below(2) == 0),
                ProtoKind::Int32 | ProtoKind::Sint32 | ProtoKind::Sfixed32 => {
                    Value::I32([0, 1, -1, i32::MIN, i32::MAX, 300][chance.below(6)])
                }
                ProtoKind::Int64 | ProtoKind::Sint64 | ProtoKind::Sfixed64 => {
                    Value::I64([0, 1, -1, i64::MIN, i64::MAX, 300][chance.below(6)])
                }
                ProtoKind::Uint32 | ProtoKind::Fixed32 => Value::U32([0, 1, u32::MAX][chance.below(3)]),
                ProtoKind::Uint64 | ProtoKind::Fixed64 => Value::U64([0, 1, u64::MAX][chance.below(3)]),
                ProtoKind::Float => Value::F32(1.5),
                ProtoKind::Double => Value::F64([0.0, 2.0, -0.5, 1e300][chance.below(4)]),
                ProtoKind::String => Value::String(chance.text()),
                ProtoKind::Bytes => Value::Bytes((0..chance.below(9)).map(|_| chance.byte()).collect()),
                ProtoKind::Enum(words) => {
                    let numbers: Vec<_> =
                        words.values().map(|value| value.number()).filter(|number| *number != 0).collect();
                    Value::EnumNumber(numbers[chance.below(numbers.len())])
                }
                ProtoKind::Message(kind) => Value::Message(match kind.full_name() {
                    "google.protobuf.Timestamp" => {
                        let mut time = DynamicMessage::new(kind.clone());
                        let seconds = i64::try_from(chance.next() % 300_000_000_000).unwrap() - 60_000_000_000;
                        time.set_field_by_name("seconds", Value::I64(seconds));
                        time.set_field_by_name("nanos", Value::I32(i32::from(chance.byte()) * 1_000_000));
                        time
                    }
                    "google.protobuf.Struct" => {
                        plain_object(&[("a", json!([1.5, null, chance.text()])), ("b", json!({"c": chance.below(9)}))])
                    }
                    _ => random(kind, chance, depth + 1),
                }),
            }
        };
        let value = if field.is_map() {
            let entry = field.kind().as_message().unwrap().clone();
            let value = one(&entry.map_entry_value_field().kind(), chance);
            Value::Map([(MapKey::String(chance.text()), value)].into())
        } else if field.is_list() {
            let length = if depth > 2 { 0 } else { chance.below(4) };
            Value::List((0..length).map(|_| one(&field.kind(), chance)).collect())
        } else if depth > 4 && field.kind().as_message().is_some() {
            continue;
        } else {
            one(&field.kind(), chance)
        };
        message.set_field(&field, value);
    }
    message
}

/// What an answer should say, told by reflection instead of by tables.
fn expected(message: &DynamicMessage, inlined: bool, into: &mut serde_json::Map<String, Json>) {
    for field in message.descriptor().fields() {
        let options = field.options();
        let extension = contract::pool().get_extension_by_name("paperkey.options.v1.presentation").unwrap();
        let presentation = options.get_extension(&extension);
        if inlined && presentation.as_message().unwrap().get_field_by_name("inline").unwrap().as_bool().unwrap() {
            expected(message.get_field(&field).as_message().unwrap(), inlined, into);
            continue;
        }
        let one = |kind: &ProtoKind, value: &Value| -> Json {
            match value {
                Value::Bool(value) => json!(value),
                Value::I32(value) => json!(value),
                Value::I64(value) => json!(value),
                Value::U32(value) => json!(value),
                Value::U64(value) => json!(value),
                Value::F32(value) => json!(value),
                Value::F64(value) => json!(value),
                Value::String(value) => json!(value),
                Value::Bytes(value) => {
                    use base64::Engine as _;
                    json!(base64::engine::general_purpose::STANDARD.encode(value))
                }
                Value::EnumNumber(0) => Json::Null,
                Value::EnumNumber(number) => {
                    let words = kind.as_enum().unwrap().clone();
                    let name = words.get_value(*number).unwrap().name().to_owned();
                    let zero = words.get_value(0).unwrap().name().to_owned();
                    json!(name.strip_prefix(zero.strip_suffix("UNSPECIFIED").unwrap()).unwrap().to_lowercase())
                }
                Value::Message(message) => match message.descriptor().full_name() {
                    "google.protobuf.Timestamp" => {
                        let seconds = message.get_field_by_name("seconds").unwrap().as_i64().unwrap();
                        let nanos = message.get_field_by_name("nanos").unwrap().as_i32().unwrap();
                        json!(format!("{:.3}", jiff::Timestamp::new(seconds, nanos).unwrap()))
                    }
                    "google.protobuf.Struct" => object_of(message),
                    _ => {
                        let mut inner = serde_json::Map::new();
                        expected(message, inlined, &mut inner);
                        Json::Object(inner)
                    }
                },
                Value::List(_) | Value::Map(_) => unreachable!("handled by the shape of the field"),
            }
        };
        let value = message.get_field(&field).into_owned();
        let json = match &value {
            _ if field.supports_presence() && !message.has_field(&field) => Json::Null,
            Value::List(items) => items.iter().map(|item| one(&field.kind(), item)).collect(),
            Value::Map(entries) => {
                let kind = field.kind().as_message().unwrap().map_entry_value_field().kind();
                let entries = entries.iter().map(|(key, value)| (key.as_str().unwrap().to_owned(), one(&kind, value)));
                Json::Object(entries.collect())
            }
            value => one(&field.kind(), value),
        };
        into.insert(field.json_name().to_owned(), json);
    }
}

/// Numbers compare by value: 2.0 and 2 are the same JSON number.
fn normal(json: Json) -> Json {
    match json {
        Json::Number(number) if number.is_f64() => {
            let float = number.as_f64().unwrap();
            #[expect(clippy::cast_possible_truncation, reason = "whole and small")]
            if float.fract() == 0.0 && float.abs() < 1e15 { json!(float as i64) } else { json!(float) }
        }
        Json::Array(items) => items.into_iter().map(normal).collect(),
        Json::Object(members) => members.into_iter().map(|(name, value)| (name, normal(value))).collect(),
        other => other,
    }
}

fn messages() -> Vec<MessageDescriptor> {
    Contract::get()
        .methods()
        .iter()
        .flat_map(|method| [method.descriptor.input(), method.descriptor.output()])
        .collect()
}

#[test]
fn any_message_of_the_contract_is_answered_as_reflection_reads_it() {
    let mut chance = Chance(1);
    for descriptor in messages() {
        let fixture = fixture(descriptor.full_name());
        for _ in 0..40 {
            let message = random(&descriptor, &mut chance, 0);
            let mut json = serde_json::Map::new();
            expected(&message, true, &mut json);
            assert_eq!(
                normal(fixture.answer(LetterCase::Camel, &message)),
                normal(Json::Object(json)),
                "{}",
                descriptor.full_name()
            );
        }
    }
}

/// A message without the masks that the gateway fills, at any depth.
fn without_masks(mut message: DynamicMessage) -> DynamicMessage {
    if let Some(mask) = contract::mask_field(&message.descriptor()) {
        message.clear_field(&mask);
    }
    let fields: Vec<_> = message.fields().map(|(field, value)| (field, value.clone())).collect();
    for (field, value) in fields {
        let value = match value {
            Value::Message(inner) => Value::Message(without_masks(inner)),
            Value::List(list) => Value::List(
                list.into_iter()
                    .map(|value| match value {
                        Value::Message(inner) => Value::Message(without_masks(inner)),
                        other => other,
                    })
                    .collect(),
            ),
            other => other,
        };
        message.set_field(&field, value);
    }
    message
}

fn without_masks_in_json(descriptor: &MessageDescriptor, json: &mut Json) {
    let Json::Object(members) = json else { return };
    if let Some(mask) = contract::mask_field(descriptor) {
        members.remove(mask.json_name());
    }
    for field in descriptor.fields() {
        let (Some(inner), Some(value)) = (field.kind().as_message().cloned(), members.get_mut(field.json_name()))
        else {
            continue;
        };
        match value {
            Json::Array(list) => list.iter_mut().for_each(|value| without_masks_in_json(&inner, value)),
            value => without_masks_in_json(&inner, value),
        }
    }
}

#[test]
fn any_request_of_the_contract_is_read_as_reflection_writes_it() {
    let mut chance = Chance(2);
    for method in Contract::get().methods() {
        let descriptor = method.descriptor.input();
        let fixture = fixture(descriptor.full_name());
        for _ in 0..40 {
            let message = random(&descriptor, &mut chance, 0);
            let mut json = serde_json::Map::new();
            expected(&message, false, &mut json);
            let mut json = Json::Object(json);
            without_masks_in_json(&descriptor, &mut json);
            let read = without_masks(fixture.body(&json.to_string()).unwrap());
            let message = without_masks(message);
            // Zeros that were written out are the same message as zeros that were not.
            let settled = |message: &DynamicMessage| {
                DynamicMessage::decode(descriptor.clone(), message.encode_to_vec().as_slice()).unwrap()
            };
            assert_eq!(settled(&read), settled(&message), "{}", descriptor.full_name());
        }
    }
}

#[test]
fn nonsense_is_refused_and_never_panics() {
    let mut chance = Chance(3);
    let bodies = [
        r#"{"productId":"prod_1","email":"a@b.c","maxActivations":3,"expiresAt":"2026-12-31T00:00:00.000Z","metadata":{"a":[1,{"b":null}]}}"#,
        r#"{"name":"x","price":{"amount":500,"currency":"EUR"},"active":true,"metadata":{"k":"v"}}"#,
        r#"{"events":["a","b"],"status":"active","url":"https://example.com"}"#,
    ];
    let fixtures = [
        fixture("paperkey.licensing.v1.CreateLicenseRequest"),
        fixture("paperkey.catalog.v1.CreateProductRequest"),
        fixture("paperkey.webhook.v1.UpdateWebhookRequest"),
    ];
    for round in 0..30_000 {
        let fixture = &fixtures[round % fixtures.len()];
        let mut body = bodies[chance.below(bodies.len())].as_bytes().to_vec();
        for _ in 0..=chance.below(4) {
            let at = chance.below(body.len());
            match chance.below(5) {
                0 => body[at] = chance.byte(),
                1 => body.truncate(at.max(1)),
                2 => {
                    body.remove(at);
                }
                3 => body.insert(at, b"{}[]\",:0-e\\"[chance.below(11)]),
                _ => {
                    let piece = body[at..].to_vec();
                    body.extend_from_slice(&piece);
                }
            }
            if body.is_empty() {
                body.push(b'{');
            }
        }
        if let Err(error) = fixture.read(&Fixture::parts(&body)) {
            assert_eq!(error.entry().http_status, 400);
        }
        let query = String::from_utf8_lossy(&body).into_owned();
        let parts = Parts { case: LetterCase::Snake, variables: &[(0, &query)], query: Some(&query), body: None };
        if let Err(error) = fixture.read(&parts) {
            assert_eq!(error.entry().http_status, 400);
        }
    }
}

/// A message with every kind of field that may come, since the contract does not use them all today.
fn everything() -> MessageDescriptor {
    use prost_types::{
        DescriptorProto, FieldDescriptorProto, FileDescriptorProto, MessageOptions, OneofDescriptorProto,
        field_descriptor_proto::{Label, Type},
    };
    let field = |name: &str, number: i32, kind: Type, label: Label| FieldDescriptorProto {
        name: Some(name.to_owned()),
        number: Some(number),
        r#type: Some(kind.into()),
        label: Some(label.into()),
        ..FieldDescriptorProto::default()
    };
    let of = |name: &str, number: i32, kind: &str, label: Label| FieldDescriptorProto {
        type_name: Some(kind.to_owned()),
        ..field(name, number, Type::Message, label)
    };
    let kinds = [
        Type::Bool,
        Type::Int32,
        Type::Int64,
        Type::Uint32,
        Type::Uint64,
        Type::Sint32,
        Type::Sint64,
        Type::Fixed32,
        Type::Fixed64,
        Type::Sfixed32,
        Type::Sfixed64,
        Type::Float,
        Type::Double,
        Type::String,
        Type::Bytes,
    ];
    let mut message = DescriptorProto { name: Some("Everything".to_owned()), ..DescriptorProto::default() };
    for (number, kind) in (1..).zip(kinds) {
        let name = kind.as_str_name().to_lowercase();
        message.field.push(field(&format!("one_{name}"), number, kind, Label::Optional));
        message.field.push(field(&format!("many_{name}"), number + 20, kind, Label::Repeated));
        let entry = DescriptorProto {
            name: Some(format!("Map{number}Entry")),
            field: vec![field("key", 1, Type::String, Label::Optional), field("value", 2, kind, Label::Optional)],
            options: Some(MessageOptions { map_entry: Some(true), ..MessageOptions::default() }),
            ..DescriptorProto::default()
        };
        let entry_name = format!(".everything.Everything.Map{number}Entry");
        message.field.push(of(&format!("map{number}"), number + 2_000, &entry_name, Label::Repeated));
        message.nested_type.push(entry);
    }
    message.field.push(of("again", 41, ".everything.Everything", Label::Optional));
    message.field.push(of("times", 42, ".google.protobuf.Timestamp", Label::Repeated));
    for (name, number) in [("this", 43), ("that", 44)] {
        let choice = field(name, number, Type::String, Label::Optional);
        message.field.push(FieldDescriptorProto { oneof_index: Some(0), ..choice });
    }
    message.oneof_decl.push(OneofDescriptorProto { name: Some("choice".to_owned()), options: None });
    let file = FileDescriptorProto {
        name: Some("everything.proto".to_owned()),
        package: Some("everything".to_owned()),
        syntax: Some("proto3".to_owned()),
        dependency: vec!["google/protobuf/timestamp.proto".to_owned()],
        message_type: vec![message],
        ..FileDescriptorProto::default()
    };
    let mut pool = contract::pool().clone();
    pool.add_file_descriptor_proto(file).unwrap();
    pool.get_message_by_name("everything.Everything").unwrap()
}

#[test]
fn kinds_of_fields_that_the_contract_does_not_use_yet_are_spoken_too() {
    let fixture = fixture_of(everything());
    let mut chance = Chance(4);
    for _ in 0..300 {
        let message = random(&fixture.descriptor, &mut chance, 2);
        let mut json = serde_json::Map::new();
        expected(&message, true, &mut json);
        let answer = fixture.answer(LetterCase::Camel, &message);
        assert_eq!(normal(answer.clone()), normal(Json::Object(json)));
        let read = fixture.body(&answer.to_string()).unwrap();
        let settled = |message: &DynamicMessage| {
            DynamicMessage::decode(fixture.descriptor.clone(), message.encode_to_vec().as_slice()).unwrap()
        };
        assert_eq!(settled(&read), settled(&message));
    }
}

#[test]
fn alternatives_exclude_each_other_and_narrow_numbers_are_kept_narrow() {
    let fixture = fixture_of(everything());
    let cases = [
        (r#"{"this": "a", "that": "b"}"#, "that", "must not be given beside its alternative"),
        (r#"{"oneTypeUint32": -1}"#, "oneTypeUint32", "must be an integer from 0 to 4294967295"),
        (r#"{"oneTypeUint64": -1}"#, "oneTypeUint64", "must be an integer of 64 bits and not negative"),
        (r#"{"oneTypeFloat": 1e300}"#, "oneTypeFloat", "must be a number of 32 bits"),
        (r#"{"oneTypeBytes": "?"}"#, "oneTypeBytes", "must be a string in base64"),
        (r#"{"map2": {"a": "b"}}"#, "map2.a", "must be an integer"),
        (r#"{"map2": {"a": 1, "a": 2}}"#, "map2.a", "must be given only once"),
        (r#"{"map2": []}"#, "map2", "must be an object"),
        (r#"{"manyTypeInt32": [1, "2"]}"#, "manyTypeInt32[1]", "must be an integer"),
    ];
    for (body, field, message) in cases {
        assert_eq!(fault(fixture.body(body)), (field.to_owned(), message.to_owned()), "{body}");
    }
    assert!(fixture.body(r#"{"this": "a", "that": null}"#).is_ok());
    let read = fixture.query("many_type_int32=1&many_type_int32=2").unwrap();
    assert_eq!(set(&read, "many_type_int32").as_list().unwrap().len(), 2);
}

#[test]
fn a_field_of_text_is_taken_out_whole_however_often_it_is_said() {
    let whole = [8, 1, 18, 2, b'a', b'b', 26, 1, b'c', 18, 1, b'd', 34, 0];
    let (rest, text) = without_text(&whole, 2).unwrap();
    assert_eq!((rest.as_slice(), text), ([8, 1, 26, 1, b'c', 34, 0].as_slice(), Some("d")));
    let (rest, text) = without_text(&whole, 9).unwrap();
    assert_eq!((rest.as_slice(), text), (whole.as_slice(), None));
    assert_eq!(without_text(&whole, 4).unwrap().1, Some(""));
    for (garbled, number) in [([8, 1].as_slice(), 1), (&[18, 1, 0xff], 2), (&[18, 9], 2), (&[0x80], 1)] {
        assert!(without_text(garbled, number).is_err(), "{garbled:?}");
    }
}
