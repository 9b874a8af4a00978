//! A request, from JSON, path and query to wire bytes.
//!
//! serde_json streams the body into visitors that write protobuf as they go. Faults are collected with their paths,
//! so that a caller learns of all of them at once, and nothing is sent to a service that has one.

use std::{
    borrow::Cow,
    collections::HashSet,
    fmt::{self, Write as _},
    mem,
};

use base64::Engine as _;
use paperkey_proto::{Error, errors::v1::Reason, options::v1::LetterCase};
use serde::de::{self, DeserializeSeed, Deserializer as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::error::Category;

use super::{
    EnumTable, FRAME_HEADER_BYTES, FieldTable, Kind, MAX_DEPTH, MessageId, MessageTable, Schema, Shape, time, wire,
};

/// After this many faults nobody reads on.
const MAX_FAULTS: usize = 20;

/// The longest piece of a caller's own text that is told back.
const MAX_ECHO_CHARS: usize = 64;

/// What a request is made of.
#[derive(Clone, Copy, Debug)]
pub struct Parts<'a> {
    /// The letter case in which faults name the fields.
    pub case: LetterCase,
    /// The variables of the path: fields, and what stands there, percent-encoded.
    pub variables: &'a [(usize, &'a str)],
    /// The query, without the question mark.
    pub query: Option<&'a str>,
    /// The body, where the route has one; empty reads as an object without members.
    pub body: Option<&'a [u8]>,
}

impl Schema {
    /// Writes a request as one gRPC frame: header and message.
    pub fn request(&self, message: MessageId, parts: &Parts<'_>) -> Result<Vec<u8>, Error> {
        let table = self.table(message);
        let room = parts.body.map_or(64, <[u8]>::len) + 64;
        let mut out = Vec::with_capacity(room);
        out.extend_from_slice(&[0; FRAME_HEADER_BYTES]);
        let mut writing =
            Writing { schema: self, case: parts.case, out, path: Vec::new(), depth: 0, faults: Vec::new(), stop: None };

        for (position, raw) in parts.variables {
            let Some(field) = table.fields.get(*position) else { continue };
            let text = percent_decoded(raw, false)
                .ok_or_else(|| Error::field(field.name_in(parts.case), "must be valid UTF-8, percent-encoded"))?;
            writing.path.push(Segment::Field(field));
            writing.text(field, &text);
            writing.path.pop();
        }
        let mut given = Bits::default();
        match parts.body {
            Some(body) => {
                writing.query_beside_body(parts.query);
                writing.body(table, body, parts.variables, &mut given)?;
            }
            None => writing.query(table, parts.query.unwrap_or_default(), parts.variables),
        }
        if let Some(position) = table.mask {
            writing.mask(table, position, &given);
        }
        writing.finish()
    }
}

/// The state of a request that is being written.
struct Writing<'s> {
    schema: &'s Schema,
    case: LetterCase,
    out: Vec<u8>,
    path: Vec<Segment<'s>>,
    depth: usize,
    faults: Vec<(String, Cow<'static, str>)>,
    /// Why reading cannot go on, if it cannot.
    stop: Option<Cow<'static, str>>,
}

enum Segment<'s> {
    Field(&'s FieldTable),
    Index(usize),
    Name(String),
}

/// A set of positions of fields.
#[derive(Default)]
struct Bits([u64; 4]);

impl Bits {
    /// Adds a position; `false` where it was in already.
    fn add(&mut self, position: usize) -> bool {
        let Some(word) = self.0.get_mut(position / 64) else { return true };
        let bit = 1 << (position % 64);
        let new = *word & bit == 0;
        *word |= bit;
        new
    }

    fn has(&self, position: usize) -> bool {
        self.0.get(position / 64).is_some_and(|word| word & (1 << (position % 64)) != 0)
    }
}

impl<'s> Writing<'s> {
    fn body(
        &mut self,
        table: &'s MessageTable,
        body: &[u8],
        variables: &[(usize, &str)],
        given: &mut Bits,
    ) -> Result<(), Error> {
        if body.is_empty() {
            return Ok(());
        }
        let mut json = serde_json::Deserializer::from_slice(body);
        let object = ObjectVisitor { writing: self, table, variables, given };
        let read = json.deserialize_any(object).and_then(|()| json.end());
        let Err(problem) = read else { return Ok(()) };
        if let Some(stop) = self.stop.take() {
            return Err(Error::malformed(stop));
        }
        if self.faults.len() >= MAX_FAULTS {
            return Ok(());
        }
        Err(Error::malformed(match problem.classify() {
            Category::Eof => {
                format!("The body is not complete JSON: it ends at line {} column {}", problem.line(), problem.column())
            }
            _ if std::str::from_utf8(body).is_err() => "The body is not valid UTF-8".to_owned(),
            _ => format!("The body is not valid JSON: {problem}"),
        }))
    }

    /// A body names all fields, so a query has nothing left to say.
    fn query_beside_body(&mut self, query: Option<&str>) {
        for (name, _) in pairs(query.unwrap_or_default()) {
            let name = percent_decoded(name, true).unwrap_or(Cow::Borrowed(name));
            self.fault_at(&name, "unknown query parameter");
        }
    }

    fn query(&mut self, table: &'s MessageTable, query: &str, variables: &[(usize, &str)]) {
        let mut seen = Bits::default();
        for (name, value) in pairs(query) {
            let (Some(name), Some(value)) = (percent_decoded(name, true), percent_decoded(value, true)) else {
                self.fault_at(name, "must be valid UTF-8, percent-encoded");
                continue;
            };
            let known = table
                .named(&name)
                .filter(|position| !variables.iter().any(|(variable, _)| variable == position))
                .and_then(|position| Some((position, table.fields.get(position)?)))
                .filter(|(_, field)| field.kind.fits_a_query() && !matches!(field.shape, Shape::Map { .. }));
            let Some((position, field)) = known else {
                self.fault_at(&name, "unknown query parameter");
                continue;
            };
            self.path.push(Segment::Field(field));
            if seen.add(position) || matches!(field.shape, Shape::List { .. }) {
                self.text(field, &value);
            } else {
                self.fault("must be given only once");
            }
            self.path.pop();
        }
    }

    /// Writes a field that a path or a query gives as text.
    fn text(&mut self, field: &FieldTable, text: &str) {
        // A packed list may also be written one by one, and every decoder reads it.
        let tag = match field.shape {
            Shape::List { packed: true } => super::Tag::new(field.number, field.kind.wire_type()),
            _ => field.tag,
        };
        match field.kind {
            Kind::Bool => match text {
                "true" => self.varint(tag.as_bytes(), 1),
                "false" => self.varint(tag.as_bytes(), 0),
                _ => self.fault("must be true or false"),
            },
            Kind::Text | Kind::Bytes | Kind::Word(_) | Kind::Timestamp | Kind::Duration => {
                self.string(tag.as_bytes(), field.kind, text);
            }
            Kind::Float | Kind::Double => match text.parse::<f64>() {
                Ok(number) if number.is_finite() => self.float(tag.as_bytes(), field.kind, number),
                _ => self.fault("must be a number"),
            },
            kind => match text.parse::<i128>() {
                Ok(number) => self.integer(tag.as_bytes(), kind, number),
                Err(_) => self.fault("must be an integer"),
            },
        }
    }

    fn mask(&mut self, table: &MessageTable, position: usize, given: &Bits) {
        let Some(field) = table.fields.get(position) else { return };
        self.out.extend_from_slice(field.tag.as_bytes());
        let start = wire::open(&mut self.out);
        for (at, named) in table.fields.iter().enumerate() {
            if given.has(at) {
                self.out.push(0x0a);
                wire::put_bytes(&mut self.out, named.name.as_bytes());
            }
        }
        wire::close(&mut self.out, start);
    }

    fn finish(mut self) -> Result<Vec<u8>, Error> {
        if !self.faults.is_empty() {
            let faults = mem::take(&mut self.faults);
            return Err(faults.into_iter().fold(Error::new(Reason::ValidationFailed), |error, (field, message)| {
                error.with_violation(field, message)
            }));
        }
        let length = self.out.len() - FRAME_HEADER_BYTES;
        let length = u32::try_from(length).map_err(|_| Error::new(Reason::BodyTooLarge))?;
        self.out[1..FRAME_HEADER_BYTES].copy_from_slice(&length.to_be_bytes());
        Ok(self.out)
    }

    fn string(&mut self, tag: &[u8], kind: Kind, text: &str) {
        match kind {
            Kind::Text => {
                self.out.extend_from_slice(tag);
                wire::put_bytes(&mut self.out, text.as_bytes());
            }
            Kind::Word(id) => {
                let words = &self.schema.enums[id];
                match words.number(text) {
                    Some(number) => self.varint(tag, i64::from(number).cast_unsigned()),
                    None => self.fault(format!("must be one of {}", words.listed())),
                }
            }
            Kind::Timestamp => match time::parse(text) {
                Some((seconds, nanos)) => self.seconds_and_nanos(tag, seconds, nanos),
                None => self.fault(kind.expectation()),
            },
            Kind::Duration => match parse_duration(text) {
                Some((seconds, nanos)) => self.seconds_and_nanos(tag, seconds, nanos),
                None => self.fault(kind.expectation()),
            },
            Kind::Bytes => match base64::engine::general_purpose::STANDARD.decode(text) {
                Ok(bytes) => {
                    self.out.extend_from_slice(tag);
                    wire::put_bytes(&mut self.out, &bytes);
                }
                Err(_) => self.fault(kind.expectation()),
            },
            Kind::Any => {
                self.out.extend_from_slice(tag);
                let start = wire::open(&mut self.out);
                self.value_text(text);
                wire::close(&mut self.out, start);
            }
            _ => self.fault(kind.expectation()),
        }
    }

    fn integer(&mut self, tag: &[u8], kind: Kind, number: i128) {
        let out_of = |least: i128, most: i128| (least..=most).contains(&number);
        match kind {
            Kind::Int32 | Kind::Sint32 | Kind::Sfixed32 if !out_of(i32::MIN.into(), i32::MAX.into()) => {
                self.fault("must be an integer from -2147483648 to 2147483647");
            }
            Kind::Uint32 | Kind::Fixed32 if !out_of(0, u32::MAX.into()) => {
                self.fault("must be an integer from 0 to 4294967295");
            }
            Kind::Int64 | Kind::Sint64 | Kind::Sfixed64 if !out_of(i64::MIN.into(), i64::MAX.into()) => {
                self.fault("must be an integer of 64 bits");
            }
            Kind::Uint64 | Kind::Fixed64 if !out_of(0, u64::MAX.into()) => {
                self.fault("must be an integer of 64 bits and not negative");
            }
            Kind::Int32 | Kind::Int64 | Kind::Uint32 | Kind::Uint64 => self.varint(tag, low_64(number)),
            Kind::Sint32 | Kind::Sint64 => self.varint(tag, low_64((number << 1) ^ (number >> 127))),
            Kind::Fixed64 | Kind::Sfixed64 => {
                self.out.extend_from_slice(tag);
                self.out.extend_from_slice(&low_64(number).to_le_bytes());
            }
            Kind::Fixed32 | Kind::Sfixed32 => {
                self.out.extend_from_slice(tag);
                self.out.extend_from_slice(&low_64(number).to_le_bytes()[..4]);
            }
            _ => self.fault(kind.expectation()),
        }
    }

    fn whole(&mut self, tag: &[u8], kind: Kind, number: i128) {
        match kind {
            Kind::Float | Kind::Double => self.float(tag, kind, as_float(number)),
            Kind::Any => {
                self.out.extend_from_slice(tag);
                let start = wire::open(&mut self.out);
                self.value_whole(number);
                wire::close(&mut self.out, start);
            }
            _ => self.integer(tag, kind, number),
        }
    }

    fn float(&mut self, tag: &[u8], kind: Kind, number: f64) {
        match kind {
            Kind::Double => {
                self.out.extend_from_slice(tag);
                self.out.extend_from_slice(&number.to_le_bytes());
            }
            Kind::Float => {
                #[expect(clippy::cast_possible_truncation, reason = "a float is what the field holds")]
                let narrow = number as f32;
                if narrow.is_finite() {
                    self.out.extend_from_slice(tag);
                    self.out.extend_from_slice(&narrow.to_le_bytes());
                } else {
                    self.fault("must be a number of 32 bits");
                }
            }
            Kind::Any => {
                self.out.extend_from_slice(tag);
                let start = wire::open(&mut self.out);
                self.value_float(number);
                wire::close(&mut self.out, start);
            }
            // JSON has one kind of number, and 3.0 is three.
            Kind::Int32
            | Kind::Int64
            | Kind::Uint32
            | Kind::Uint64
            | Kind::Sint32
            | Kind::Sint64
            | Kind::Fixed32
            | Kind::Fixed64
            | Kind::Sfixed32
            | Kind::Sfixed64
                if number.fract() == 0.0 && number.abs() <= MAX_EXACT =>
            {
                #[expect(clippy::cast_possible_truncation, reason = "whole, and small enough to be exact")]
                self.integer(tag, kind, number as i128);
            }
            _ => self.fault(kind.expectation()),
        }
    }

    fn flag(&mut self, tag: &[u8], kind: Kind, flag: bool) {
        match kind {
            Kind::Bool => self.varint(tag, u64::from(flag)),
            Kind::Any => {
                self.out.extend_from_slice(tag);
                self.out.extend_from_slice(&[2, 0x20, u8::from(flag)]);
            }
            _ => self.fault(kind.expectation()),
        }
    }

    fn varint(&mut self, tag: &[u8], value: u64) {
        self.out.extend_from_slice(tag);
        wire::put_varint(&mut self.out, value);
    }

    fn seconds_and_nanos(&mut self, tag: &[u8], seconds: i64, nanos: i32) {
        self.out.extend_from_slice(tag);
        let start = wire::open(&mut self.out);
        if seconds != 0 {
            self.varint(&[0x08], seconds.cast_unsigned());
        }
        if nanos != 0 {
            self.varint(&[0x10], i64::from(nanos).cast_unsigned());
        }
        wire::close(&mut self.out, start);
    }

    // The inside of a google.protobuf.Value.

    fn value_text(&mut self, text: &str) {
        self.out.push(0x1a);
        wire::put_bytes(&mut self.out, text.as_bytes());
    }

    fn value_float(&mut self, number: f64) {
        self.out.push(0x11);
        self.out.extend_from_slice(&number.to_le_bytes());
    }

    fn value_whole(&mut self, number: i128) {
        // What comes back would be another number, and nobody would notice.
        if number.abs() > 1 << 53 {
            self.fault("must be a number below 2^53 or a string: larger integers lose digits");
        }
        self.value_float(as_float(number));
    }

    // Faults.

    /// Notes that the value at the current path is at fault.
    fn fault(&mut self, message: impl Into<Cow<'static, str>>) {
        if self.faults.len() < MAX_FAULTS {
            let path = self.current_path();
            self.faults.push((path, message.into()));
        }
    }

    /// Notes that a member of the current path is at fault.
    fn fault_at(&mut self, name: &str, message: &'static str) {
        self.path.push(Segment::Name(shortened(name)));
        self.fault(message);
        self.path.pop();
    }

    fn current_path(&self) -> String {
        let mut path = String::new();
        for segment in &self.path {
            let name = match segment {
                Segment::Field(field) => field.name_in(self.case),
                Segment::Name(name) => name,
                Segment::Index(index) => {
                    // Writing to a String cannot fail.
                    let _ = write!(path, "[{index}]");
                    continue;
                }
            };
            if !path.is_empty() {
                path.push('.');
            }
            path.push_str(name);
        }
        path
    }

    /// Goes one level down, unless it is too deep.
    fn descend<E: de::Error>(&mut self) -> Result<(), E> {
        if self.depth >= MAX_DEPTH {
            self.stop = Some(format!("The body nests more than {MAX_DEPTH} levels deep").into());
            return Err(E::custom("too deep"));
        }
        self.depth += 1;
        Ok(())
    }

    /// Ends the reading when enough has been said.
    fn enough<E: de::Error>(&self) -> Result<(), E> {
        if self.faults.len() >= MAX_FAULTS { Err(E::custom("enough")) } else { Ok(()) }
    }
}

impl EnumTable {
    fn number(&self, word: &str) -> Option<i32> {
        self.words.iter().find(|(_, known, _)| **known == *word).map(|(number, _, _)| *number)
    }

    fn listed(&self) -> String {
        self.words.iter().map(|(_, word, _)| &**word).collect::<Vec<_>>().join(", ")
    }
}

impl Kind {
    fn fits_a_query(self) -> bool {
        !matches!(self, Self::Message(_) | Self::Object | Self::Any | Self::Array | Self::Mask)
    }

    fn expectation(self) -> &'static str {
        match self {
            Self::Bool => "must be true or false",
            Self::Float | Self::Double => "must be a number",
            Self::Text | Self::Word(_) => "must be a string",
            Self::Bytes => "must be a string in base64",
            Self::Message(_) | Self::Object => "must be an object",
            Self::Timestamp => "must be a time as in RFC 3339, such as 2026-12-31T00:00:00.000Z",
            Self::Duration => "must be a number of seconds such as 1.5s",
            Self::Array => "must be a list",
            Self::Any => "must be a JSON value",
            Self::Mask => "must not be given",
            _ => "must be an integer",
        }
    }
}

/// Reads the members of an object into the fields of a message.
struct ObjectVisitor<'w, 's, 'p> {
    writing: &'w mut Writing<'s>,
    table: &'s MessageTable,
    variables: &'p [(usize, &'p str)],
    /// Which fields were named, null included.
    given: &'p mut Bits,
}

impl ObjectVisitor<'_, '_, '_> {
    fn not_an_object<E: de::Error>(self) -> Result<(), E> {
        self.writing.stop = Some("The body must be a JSON object".into());
        Err(E::custom("not an object"))
    }
}

impl<'de> Visitor<'de> for ObjectVisitor<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<(), A::Error> {
        let Self { writing, table, variables, given } = self;
        writing.descend()?;
        let mut oneofs = 0_u64;
        while let Some(name) = members.next_key_seed(NameSeed { table })? {
            let position = match name {
                Name::Known(position) if table.mask != Some(position) => position,
                Name::Known(position) => {
                    let name = table.fields[position].name_in(writing.case);
                    writing.fault_at(name, "unknown field");
                    members.next_value::<IgnoredAny>()?;
                    continue;
                }
                Name::Unknown(name) => {
                    writing.fault_at(&name, "unknown field");
                    members.next_value::<IgnoredAny>()?;
                    writing.enough()?;
                    continue;
                }
            };
            let field = &table.fields[position];
            writing.path.push(Segment::Field(field));
            let before = writing.out.len();
            if !given.add(position) {
                writing.fault("must be given only once");
                members.next_value::<IgnoredAny>()?;
            } else if variables.iter().any(|(variable, _)| *variable == position) {
                writing.fault("is given by the path, not by the body");
                members.next_value::<IgnoredAny>()?;
            } else {
                members.next_value_seed(FieldSeed { writing: &mut *writing, field })?;
            }
            if let Some(oneof) = field.oneof
                && writing.out.len() > before
            {
                let bit = 1 << oneof;
                if oneofs & bit != 0 {
                    writing.fault("must not be given beside its alternative");
                }
                oneofs |= bit;
            }
            writing.path.pop();
            writing.enough()?;
        }
        writing.depth -= 1;
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<(), A::Error> {
        self.not_an_object()
    }

    fn visit_str<E: de::Error>(self, _: &str) -> Result<(), E> {
        self.not_an_object()
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<(), E> {
        self.not_an_object()
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<(), E> {
        self.not_an_object()
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<(), E> {
        self.not_an_object()
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<(), E> {
        self.not_an_object()
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        self.not_an_object()
    }
}

enum Name {
    Known(usize),
    Unknown(String),
}

/// Looks a name up where it stands, without keeping it.
struct NameSeed<'s> {
    table: &'s MessageTable,
}

impl<'de> DeserializeSeed<'de> for NameSeed<'_> {
    type Value = Name;

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Name, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for NameSeed<'_> {
    type Value = Name;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Name, E> {
        Ok(self.table.named(name).map_or_else(|| Name::Unknown(shortened(name)), Name::Known))
    }
}

/// A name that is kept, without a copy where it has no escapes.
struct TextSeed;

impl<'de> DeserializeSeed<'de> for TextSeed {
    type Value = Cow<'de, str>;

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Cow<'de, str>, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl<'de> Visitor<'de> for TextSeed {
    type Value = Cow<'de, str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a name")
    }

    fn visit_borrowed_str<E: de::Error>(self, name: &'de str) -> Result<Cow<'de, str>, E> {
        Ok(Cow::Borrowed(name))
    }

    fn visit_str<E: de::Error>(self, name: &str) -> Result<Cow<'de, str>, E> {
        Ok(Cow::Owned(name.to_owned()))
    }
}

/// Reads the value of a field, whatever its shape.
struct FieldSeed<'w, 's> {
    writing: &'w mut Writing<'s>,
    field: &'s FieldTable,
}

impl<'de> DeserializeSeed<'de> for FieldSeed<'_, '_> {
    type Value = ();

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        let Self { writing, field } = self;
        match field.shape {
            Shape::Single { .. } => deserializer.deserialize_any(ElementVisitor {
                writing,
                tag: field.tag.as_bytes(),
                kind: field.kind,
                nullable: true,
            }),
            Shape::List { packed } => deserializer.deserialize_any(ListVisitor { writing, field, packed }),
            Shape::Map { key } => deserializer.deserialize_any(EntriesVisitor { writing, field, key }),
        }
    }
}

/// One value of a kind.
struct ElementVisitor<'w, 's, 't> {
    writing: &'w mut Writing<'s>,
    /// What is written before it; empty inside packed lists.
    tag: &'t [u8],
    kind: Kind,
    /// Whether null stands for absence.
    nullable: bool,
}

impl<'de> DeserializeSeed<'de> for ElementVisitor<'_, '_, '_> {
    type Value = ();

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for ElementVisitor<'_, '_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<(), E> {
        self.writing.string(self.tag, self.kind, text);
        Ok(())
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<(), E> {
        self.writing.whole(self.tag, self.kind, number.into());
        Ok(())
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<(), E> {
        self.writing.whole(self.tag, self.kind, number.into());
        Ok(())
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<(), E> {
        self.writing.float(self.tag, self.kind, number);
        Ok(())
    }

    fn visit_bool<E: de::Error>(self, flag: bool) -> Result<(), E> {
        self.writing.flag(self.tag, self.kind, flag);
        Ok(())
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        if self.nullable {
            return Ok(());
        }
        if self.kind == Kind::Any {
            self.writing.out.extend_from_slice(self.tag);
            self.writing.out.extend_from_slice(&[2, 0x08, 0]);
        } else {
            self.writing.fault("must not be null");
        }
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<(), A::Error> {
        let Self { writing, tag, kind, .. } = self;
        let out = &mut writing.out;
        match kind {
            Kind::Message(id) => {
                let table = writing.schema.table(id);
                out.extend_from_slice(tag);
                let start = wire::open(out);
                let mut given = Bits::default();
                let object = ObjectVisitor { writing: &mut *writing, table, variables: &[], given: &mut given };
                object.visit_map(members)?;
                if let Some(position) = table.mask {
                    writing.mask(table, position, &given);
                }
                wire::close(&mut writing.out, start);
            }
            Kind::Object => {
                out.extend_from_slice(tag);
                let start = wire::open(out);
                object_into(writing, members)?;
                wire::close(&mut writing.out, start);
            }
            Kind::Any => {
                out.extend_from_slice(tag);
                let start = wire::open(out);
                ValueVisitor { writing: &mut *writing }.visit_map(members)?;
                wire::close(&mut writing.out, start);
            }
            _ => {
                writing.fault(kind.expectation());
                while members.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
            }
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let Self { writing, tag, kind, .. } = self;
        match kind {
            Kind::Array => {
                writing.out.extend_from_slice(tag);
                let start = wire::open(&mut writing.out);
                array_into(writing, items)?;
                wire::close(&mut writing.out, start);
            }
            Kind::Any => {
                writing.out.extend_from_slice(tag);
                let start = wire::open(&mut writing.out);
                ValueVisitor { writing: &mut *writing }.visit_seq(items)?;
                wire::close(&mut writing.out, start);
            }
            _ => {
                writing.fault(kind.expectation());
                while items.next_element::<IgnoredAny>()?.is_some() {}
            }
        }
        Ok(())
    }
}

/// Implements what a visitor of containers says to everything else.
macro_rules! refuse_scalars {
    ($message:literal) => {
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str($message)
        }

        fn visit_str<E: de::Error>(self, _: &str) -> Result<(), E> {
            self.writing.fault($message);
            Ok(())
        }

        fn visit_u64<E: de::Error>(self, _: u64) -> Result<(), E> {
            self.writing.fault($message);
            Ok(())
        }

        fn visit_i64<E: de::Error>(self, _: i64) -> Result<(), E> {
            self.writing.fault($message);
            Ok(())
        }

        fn visit_f64<E: de::Error>(self, _: f64) -> Result<(), E> {
            self.writing.fault($message);
            Ok(())
        }

        fn visit_bool<E: de::Error>(self, _: bool) -> Result<(), E> {
            self.writing.fault($message);
            Ok(())
        }

        fn visit_unit<E: de::Error>(self) -> Result<(), E> {
            Ok(())
        }
    };
}

/// The values of a repeated field.
struct ListVisitor<'w, 's> {
    writing: &'w mut Writing<'s>,
    field: &'s FieldTable,
    packed: bool,
}

impl<'de> Visitor<'de> for ListVisitor<'_, '_> {
    type Value = ();

    refuse_scalars!("must be a list");

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<(), A::Error> {
        self.writing.fault("must be a list");
        while members.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        let Self { writing, field, packed } = self;
        writing.descend()?;
        let before = writing.out.len();
        let start = if packed {
            writing.out.extend_from_slice(field.tag.as_bytes());
            wire::open(&mut writing.out)
        } else {
            before
        };
        let tag = if packed { &[] } else { field.tag.as_bytes() };
        let mut index = 0;
        loop {
            writing.path.push(Segment::Index(index));
            let element = ElementVisitor { writing: &mut *writing, tag, kind: field.kind, nullable: false };
            let more = items.next_element_seed(element)?.is_some();
            writing.path.pop();
            if !more {
                break;
            }
            writing.enough()?;
            index += 1;
        }
        if packed {
            if writing.out.len() == start {
                writing.out.truncate(before);
            } else {
                wire::close(&mut writing.out, start);
            }
        }
        writing.depth -= 1;
        Ok(())
    }
}

/// The entries of a map field.
struct EntriesVisitor<'w, 's> {
    writing: &'w mut Writing<'s>,
    field: &'s FieldTable,
    key: Kind,
}

impl<'de> Visitor<'de> for EntriesVisitor<'_, '_> {
    type Value = ();

    refuse_scalars!("must be an object");

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        self.writing.fault("must be an object");
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<(), A::Error> {
        let Self { writing, field, key } = self;
        writing.descend()?;
        let value_tag = super::Tag::new(2, field.kind.wire_type());
        let key_tag = super::Tag::new(1, key.wire_type());
        let mut names = HashSet::new();
        while let Some(name) = members.next_key_seed(TextSeed)? {
            writing.path.push(Segment::Name(shortened(&name)));
            writing.out.extend_from_slice(field.tag.as_bytes());
            let start = wire::open(&mut writing.out);
            match key {
                Kind::Text => writing.string(key_tag.as_bytes(), key, &name),
                Kind::Bool if name == "true" || name == "false" => {
                    writing.flag(key_tag.as_bytes(), key, name == "true");
                }
                key => match name.parse::<i128>() {
                    Ok(number) => writing.integer(key_tag.as_bytes(), key, number),
                    Err(_) => writing.fault("is not a possible name here"),
                },
            }
            members.next_value_seed(ElementVisitor {
                writing: &mut *writing,
                tag: value_tag.as_bytes(),
                kind: field.kind,
                nullable: false,
            })?;
            wire::close(&mut writing.out, start);
            if !names.insert(name) {
                writing.fault("must be given only once");
            }
            writing.path.pop();
            writing.enough()?;
        }
        writing.depth -= 1;
        Ok(())
    }
}

/// The inside of a `google.protobuf.Value`.
struct ValueVisitor<'w, 's> {
    writing: &'w mut Writing<'s>,
}

impl<'de> DeserializeSeed<'de> for ValueVisitor<'_, '_> {
    type Value = ();

    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        let start = wire::open(&mut self.writing.out);
        deserializer.deserialize_any(ValueVisitor { writing: &mut *self.writing })?;
        wire::close(&mut self.writing.out, start);
        Ok(())
    }
}

impl<'de> Visitor<'de> for ValueVisitor<'_, '_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<(), E> {
        self.writing.value_text(text);
        Ok(())
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<(), E> {
        self.writing.value_whole(number.into());
        Ok(())
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<(), E> {
        self.writing.value_whole(number.into());
        Ok(())
    }

    fn visit_f64<E: de::Error>(self, number: f64) -> Result<(), E> {
        self.writing.value_float(number);
        Ok(())
    }

    fn visit_bool<E: de::Error>(self, flag: bool) -> Result<(), E> {
        self.writing.out.extend_from_slice(&[0x20, u8::from(flag)]);
        Ok(())
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        self.writing.out.extend_from_slice(&[0x08, 0]);
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, members: A) -> Result<(), A::Error> {
        self.writing.out.push(0x2a);
        let start = wire::open(&mut self.writing.out);
        object_into(self.writing, members)?;
        wire::close(&mut self.writing.out, start);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<(), A::Error> {
        self.writing.out.push(0x32);
        let start = wire::open(&mut self.writing.out);
        array_into(self.writing, items)?;
        wire::close(&mut self.writing.out, start);
        Ok(())
    }
}

/// The inside of a `google.protobuf.Struct`.
fn object_into<'de, A: MapAccess<'de>>(writing: &mut Writing<'_>, mut members: A) -> Result<(), A::Error> {
    writing.descend()?;
    let mut names = HashSet::new();
    while let Some(name) = members.next_key_seed(TextSeed)? {
        writing.path.push(Segment::Name(shortened(&name)));
        writing.out.push(0x0a);
        let start = wire::open(&mut writing.out);
        writing.out.push(0x0a);
        wire::put_bytes(&mut writing.out, name.as_bytes());
        writing.out.push(0x12);
        members.next_value_seed(ValueVisitor { writing: &mut *writing })?;
        wire::close(&mut writing.out, start);
        if !names.insert(name) {
            writing.fault("must be given only once");
        }
        writing.path.pop();
        writing.enough()?;
    }
    writing.depth -= 1;
    Ok(())
}

/// The inside of a `google.protobuf.ListValue`.
fn array_into<'de, A: SeqAccess<'de>>(writing: &mut Writing<'_>, mut items: A) -> Result<(), A::Error> {
    writing.descend()?;
    let mut index = 0;
    loop {
        let before = writing.out.len();
        writing.out.push(0x0a);
        writing.path.push(Segment::Index(index));
        let more = items.next_element_seed(ValueVisitor { writing: &mut *writing })?.is_some();
        writing.path.pop();
        if !more {
            writing.out.truncate(before);
            break;
        }
        index += 1;
        writing.enough()?;
    }
    writing.depth -= 1;
    Ok(())
}

/// The largest whole number up to which a double names every one.
const MAX_EXACT: f64 = 9_007_199_254_740_992.0;

#[expect(clippy::cast_precision_loss, reason = "a double is what the field holds")]
fn as_float(number: i128) -> f64 {
    number as f64
}

fn low_64(number: i128) -> u64 {
    let mut low = [0; 8];
    low.copy_from_slice(&number.to_le_bytes()[..8]);
    u64::from_le_bytes(low)
}

/// A number of seconds such as `1.5s`.
fn parse_duration(text: &str) -> Option<(i64, i32)> {
    let number = text.strip_suffix('s')?;
    let (negative, number) = number.strip_prefix('-').map_or((false, number), |rest| (true, rest));
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    if !digits(whole) || !digits(fraction) || fraction.len() > 9 {
        return None;
    }
    let seconds: i64 = whole.parse().ok().filter(|seconds| *seconds <= 315_576_000_000)?;
    let nanos: i32 = format!("{fraction:0<9}").parse().ok()?;
    Some(if negative { (-seconds, -nanos) } else { (seconds, nanos) })
}

/// The names and values of a query, still encoded.
pub(crate) fn pairs(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query.split('&').filter(|pair| !pair.is_empty()).map(|pair| pair.split_once('=').unwrap_or((pair, "")))
}

/// Text without its percent encoding; nothing where it is not UTF-8 or not well-formed.
pub(crate) fn percent_decoded(text: &str, plus_is_space: bool) -> Option<Cow<'_, str>> {
    if !text.bytes().any(|byte| byte == b'%' || (plus_is_space && byte == b'+')) {
        return Some(Cow::Borrowed(text));
    }
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
                digit()? * 16 + digit()?
            }
            b'+' if plus_is_space => b' ',
            byte => byte,
        });
    }
    String::from_utf8(decoded).ok().map(Cow::Owned)
}

fn shortened(text: &str) -> String {
    match text.char_indices().nth(MAX_ECHO_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}
