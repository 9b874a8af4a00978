//! Messages as JSON Schema 2020-12, in the letter case of a surface.
//!
//! An answer has every member, with null for what is absent; a request has what its rules require. So a message that
//! stands in both has two schemas, and one for each letter case that it is spoken in.

use std::collections::BTreeMap;

use paperkey_proto::{
    options::v1::LetterCase,
    rules::{Demands, demands_of},
};
use prost_reflect::{EnumDescriptor, FieldDescriptor, Kind, MessageDescriptor};

use super::comments::Comments;
use crate::{
    json::Json,
    transcode::{camel_case, in_order_of_declaration, is_inline, screaming_case},
};

/// Which way a message goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Way {
    Request,
    Answer,
}

/// The schemas of all messages that were asked for.
#[derive(Debug)]
pub(super) struct Schemas<'c> {
    comments: &'c Comments,
    made: BTreeMap<String, Json>,
}

impl<'c> Schemas<'c> {
    pub(super) fn new(comments: &'c Comments) -> Self {
        Self { comments, made: BTreeMap::new() }
    }

    /// What was made, by name.
    pub(super) fn into_made(self) -> BTreeMap<String, Json> {
        self.made
    }

    /// A reference to the schema of a message.
    pub(super) fn reference(&mut self, message: &MessageDescriptor, case: LetterCase, way: Way) -> Json {
        // An answer that is nothing but one resource is that resource.
        let mut fields = message.fields();
        if let (Some(field), None, Way::Answer) = (fields.next(), fields.next(), way)
            && let (true, Kind::Message(inner)) = (is_inline(&field), field.kind())
        {
            return self.reference(&inner, case, way);
        }
        let way_word = if way == Way::Request { "Input" } else { "" };
        let case_word = if case == LetterCase::Camel { "" } else { "_snake" };
        let name = format!("{}{way_word}{case_word}", message.name());
        let reference = Json::object([("$ref", format!("#/components/schemas/{name}").into())]);
        if !self.made.contains_key(&name) {
            // There first, so that a message that holds itself comes to an end.
            self.made.insert(name.clone(), Json::Null);
            let schema = self.message(message, case, way, &|_| true);
            self.made.insert(name, schema);
        }
        reference
    }

    /// The body of a request: its members without those that the path gives.
    pub(super) fn body(&mut self, message: &MessageDescriptor, case: LetterCase, variables: &[String]) -> Json {
        self.message(message, case, Way::Request, &|field| {
            !is_mask(field) && !variables.iter().any(|variable| variable == field.name())
        })
    }

    fn message(
        &mut self,
        message: &MessageDescriptor,
        case: LetterCase,
        way: Way,
        wanted: &dyn Fn(&FieldDescriptor) -> bool,
    ) -> Json {
        let mut inlined = Vec::new();
        let mut properties = Vec::new();
        let mut required = Vec::new();
        for field in in_order_of_declaration(message).into_iter().filter(|field| wanted(field)) {
            if let (true, Kind::Message(inner)) = (is_inline(&field), field.kind()) {
                inlined.push(self.reference(&inner, case, way));
                continue;
            }
            let name = name_in(case, field.name());
            if way == Way::Answer || demands_of(&field).required {
                required.push(name.clone());
            }
            properties.push((name, self.field(&field, case, way)));
        }
        let mut own = Json::object([("type", "object".into())]);
        if let Some(said) = self.comments.above(message.parent_file().name(), message.path()) {
            own = own.with("description", said);
        }
        own = own.with("properties", Json::Object(properties));
        if !required.is_empty() {
            own = own.with("required", Json::texts(required));
        }
        if inlined.is_empty() {
            // A name that is not known is refused. The same names in the other letter case are not, but nobody has to know.
            return if way == Way::Request { own.with("additionalProperties", false) } else { own };
        }
        inlined.push(own);
        Json::object([("allOf", Json::List(inlined))])
    }

    /// The schema of a field, whatever its shape, with what the contract says of it.
    pub(super) fn field(&mut self, field: &FieldDescriptor, case: LetterCase, way: Way) -> Json {
        let demands = if way == Way::Request { demands_of(field) } else { Demands::default() };
        let schema = match field.kind() {
            Kind::Message(entry) if field.is_map() => {
                let value = self.value(&entry.map_entry_value_field(), case, way, &demands);
                Json::object([("type", "object".into()), ("additionalProperties", value)])
            }
            _ if field.is_list() => {
                let mut list =
                    Json::object([("type", "array".into()), ("items", self.value(field, case, way, &demands))]);
                list = with_bounds(list, ("minItems", "maxItems"), demands.items);
                if demands.unique { list.with("uniqueItems", true) } else { list }
            }
            _ => self.value(field, case, way, &demands),
        };
        // In a request null stands for absence, of whatever may be absent; in an answer it tells of it, and of a word that
        // is not set.
        let may_be_null = match way {
            Way::Request => !demands.required && demands.items.0.is_none(),
            Way::Answer => field.supports_presence() || (!field.is_list() && matches!(field.kind(), Kind::Enum(_))),
        };
        let schema = if may_be_null { nullable(schema) } else { schema };
        match self.comments.above(field.parent_message().parent_file().name(), field.path()) {
            Some(said) => schema.with("description", said),
            None => schema,
        }
    }

    fn value(&mut self, field: &FieldDescriptor, case: LetterCase, way: Way, demands: &Demands) -> Json {
        let of_type = |name: &str| Json::object([("type", name.into())]);
        let formatted = |name: &str, format: &str| Json::object([("type", name.into()), ("format", format.into())]);
        match field.kind() {
            Kind::Bool => of_type("boolean"),
            Kind::Float | Kind::Double => of_type("number"),
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 => with_range(formatted("integer", "int32"), demands.range),
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 => with_range(formatted("integer", "int64"), demands.range),
            Kind::Uint32 | Kind::Fixed32 | Kind::Uint64 | Kind::Fixed64 => of_type("integer").with("minimum", 0),
            Kind::Bytes => of_type("string").with("contentEncoding", "base64"),
            Kind::String => {
                let mut text = if demands.email { formatted("string", "email") } else { of_type("string") };
                text = with_bounds(text, ("minLength", "maxLength"), demands.length);
                if demands.words.is_empty() { text } else { text.with("enum", Json::texts(demands.words.clone())) }
            }
            Kind::Enum(words) => of_type("string").with("enum", Json::texts(words_of(&words))),
            Kind::Message(message) => match message.full_name() {
                "google.protobuf.Timestamp" => formatted("string", "date-time"),
                "google.protobuf.Duration" => of_type("string").with("examples", Json::texts(["1.5s"])),
                "google.protobuf.FieldMask" => of_type("string"),
                "google.protobuf.Struct" => of_type("object").with("additionalProperties", true),
                "google.protobuf.ListValue" => of_type("array"),
                "google.protobuf.Value" => Json::object([]),
                _ => self.reference(&message, case, way),
            },
        }
    }
}

/// Whether the gateway fills the field.
pub(super) fn is_mask(field: &FieldDescriptor) -> bool {
    field.kind().as_message().is_some_and(|message| message.full_name() == "google.protobuf.FieldMask")
}

/// Whether a query can give the field.
pub(super) fn fits_a_query(field: &FieldDescriptor) -> bool {
    let texts = ["google.protobuf.Timestamp", "google.protobuf.Duration"];
    !field.is_map() && field.kind().as_message().is_none_or(|message| texts.contains(&message.full_name()))
}

/// A name of the contract in a letter case.
pub(super) fn name_in(case: LetterCase, name: &str) -> String {
    if case == LetterCase::Camel { camel_case(name) } else { name.to_owned() }
}

/// The words of an enum, as JSON has them.
pub(super) fn words_of(words: &EnumDescriptor) -> Vec<String> {
    let prefix = format!("{}_", screaming_case(words.name()));
    let word = |name: &str| name.strip_prefix(&prefix).unwrap_or(name).to_ascii_lowercase();
    words.values().filter(|value| value.number() != 0).map(|value| word(value.name())).collect()
}

fn with_bounds(schema: Json, names: (&str, &str), bounds: (Option<u64>, Option<u64>)) -> Json {
    let number = |bound: Option<u64>| bound.and_then(|bound| i64::try_from(bound).ok());
    let schema = match number(bounds.0) {
        Some(least) => schema.with(names.0, least),
        None => schema,
    };
    match number(bounds.1) {
        Some(most) => schema.with(names.1, most),
        None => schema,
    }
}

fn with_range(schema: Json, (least, most): (Option<i64>, Option<i64>)) -> Json {
    let schema = if let Some(least) = least { schema.with("minimum", least) } else { schema };
    if let Some(most) = most { schema.with("maximum", most) } else { schema }
}

/// The schema that also takes null.
fn nullable(schema: Json) -> Json {
    let null = || Json::object([("type", "null".into())]);
    match schema {
        Json::Object(members) if members.is_empty() => Json::Object(members),
        Json::Object(mut members) if members.iter().any(|(name, _)| name == "type") => {
            for (name, value) in &mut members {
                match (name.as_str(), value) {
                    ("type", value) => {
                        let known = std::mem::replace(value, Json::Null);
                        *value = Json::List(vec![known, "null".into()]);
                    }
                    ("enum", Json::List(words)) => words.push(Json::Null),
                    _ => {}
                }
            }
            Json::Object(members)
        }
        other => Json::object([("anyOf", Json::List(vec![other, null()]))]),
    }
}
