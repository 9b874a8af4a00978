//! JSON to wire bytes and back, by tables made once per message type.
//!
//! [`Schema`] reads every message that a public method takes or answers into flat tables of fields. A request is
//! written to protobuf's wire format while its JSON is read; an answer is written to JSON while its wire bytes are
//! walked. No message is ever built in memory, and no message of the contract is named: only the well-known types of
//! `google.protobuf` have a form of their own.
//!
//! Deliberately absent: extensions and groups, and the other well-known types (`Any`, the wrappers), which the
//! contract does not use; a message that holds one of the latter is refused when the schema learns it. Rules of fields
//! are the services' business.

mod answer;
mod request;
mod time;
mod wire;

#[cfg(test)]
mod tests;

use std::collections::HashMap;

use bytes::{BufMut as _, Bytes, BytesMut};
use paperkey_proto::{Error, options::v1::LetterCase};
use prost_reflect::{EnumDescriptor, FieldDescriptor, Kind as ProtoKind, MessageDescriptor};

pub(crate) use answer::put_text;
pub use request::Parts;
pub(crate) use request::{pairs, percent_decoded};

/// How deep JSON may nest. protobuf's decoder counts three levels for one of `google.protobuf.Struct` and stops at
/// a hundred, so anything that passes here can be read by the services.
pub const MAX_DEPTH: usize = 32;

/// The bytes before a message in a gRPC stream: a flag and a length.
pub const FRAME_HEADER_BYTES: usize = 5;

/// The most fields that a message may have.
const MAX_FIELDS: usize = 256;

/// The tables of all messages that are spoken here.
#[derive(Debug, Default)]
pub struct Schema {
    messages: Vec<MessageTable>,
    enums: Vec<EnumTable>,
    message_ids: HashMap<String, MessageId>,
    enum_ids: HashMap<String, usize>,
}

/// A message of a [`Schema`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageId(usize);

/// A message type that cannot be spoken, and why.
#[derive(Debug, thiserror::Error)]
#[error("{name} cannot be shown as JSON: {problem}")]
pub struct Unspeakable {
    name: String,
    problem: &'static str,
}

#[derive(Debug, Default)]
struct MessageTable {
    /// In the order of declaration, which is the order of answers.
    fields: Vec<FieldTable>,
    /// What requests may call the fields, in either letter case.
    names: Vec<(Box<str>, usize)>,
    /// The fields by number, where the number is small; plus one, so that 0 is none.
    positions: Vec<u16>,
    /// The field mask that the gateway fills.
    mask: Option<usize>,
}

#[derive(Debug)]
struct FieldTable {
    /// The name in the contract.
    name: Box<str>,
    /// The name in camelCase.
    camel: Box<str>,
    /// The names as members of an answer, quotes and colon included: snake_case, camelCase.
    members: [Box<[u8]>; 2],
    number: u32,
    tag: Tag,
    kind: Kind,
    shape: Shape,
    /// The members of this message stand in the parent's object.
    inline: bool,
    /// Which of the message's oneofs it belongs to.
    oneof: Option<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shape {
    Single { presence: bool },
    List { packed: bool },
    Map { key: Kind },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Bool,
    Int32,
    Int64,
    Uint32,
    Uint64,
    Sint32,
    Sint64,
    Fixed32,
    Fixed64,
    Sfixed32,
    Sfixed64,
    Float,
    Double,
    Text,
    Bytes,
    Word(usize),
    Message(MessageId),
    Timestamp,
    Duration,
    Object,
    Any,
    Array,
    Mask,
}

/// What a message says in a field of text or bytes: none where it says nothing, and the last where it says it twice, as
/// for every reader of protobuf. What is not read here as the service reads it is an error.
pub(crate) fn bytes_of(message: &[u8], number: u32) -> Result<Option<&[u8]>, Error> {
    let garbled = |_| Error::malformed("The message is not valid protobuf");
    let mut walk = wire::Walk::new(message);
    let mut found = None;
    while let Some(entry) = walk.next().map_err(garbled)? {
        match entry.raw {
            _ if entry.number == 0 => return Err(garbled(wire::Garbled)),
            wire::Raw::Bytes(bytes) if entry.number == number => found = Some(bytes),
            _ => {}
        }
    }
    Ok(found)
}

/// A message without what it says in a field of text, and what that was. Said more than once, all of it is taken out,
/// and the last counts.
pub(crate) fn without_text(message: &[u8], number: u32) -> Result<(Vec<u8>, Option<&str>), Error> {
    let garbled = || Error::internal("a message could not be read");
    let mut walk = wire::Walk::new(message);
    let (mut rest, mut text) = (Vec::with_capacity(message.len()), None);
    loop {
        let start = message.len() - walk.left();
        let Some(entry) = walk.next().map_err(|_| garbled())? else { break };
        if entry.number != number {
            rest.extend_from_slice(&message[start..message.len() - walk.left()]);
            continue;
        }
        let wire::Raw::Bytes(bytes) = entry.raw else { return Err(garbled()) };
        text = Some(std::str::from_utf8(bytes).map_err(|_| garbled())?);
    }
    Ok((rest, text))
}

/// Writes a field of bytes.
pub(crate) fn put_piece(message: &mut Vec<u8>, number: u32, bytes: &[u8]) {
    message.extend_from_slice(Tag::new(number, wire::LENGTH_DELIMITED).as_bytes());
    wire::put_bytes(message, bytes);
}

/// A message in its frame.
pub(crate) fn framed(message: &[u8]) -> Result<Bytes, Error> {
    let length = u32::try_from(message.len()).map_err(Error::internal)?;
    let mut frame = BytesMut::with_capacity(FRAME_HEADER_BYTES + message.len());
    frame.put_u8(0);
    frame.put_u32(length);
    frame.put_slice(message);
    Ok(frame.freeze())
}

/// The message of a frame, which must be the only one and plain.
pub(crate) fn message_in(frame: &[u8]) -> Result<&[u8], Error> {
    let one = frame.split_first_chunk::<FRAME_HEADER_BYTES>().filter(|(header, message)| {
        let [compressed, length @ ..] = **header;
        compressed == 0 && usize::try_from(u32::from_be_bytes(length)).ok() == Some(message.len())
    });
    one.map(|(_, message)| message).ok_or_else(|| Error::malformed("The request must be one plain message"))
}

/// A field's number and wire type, encoded.
#[derive(Clone, Copy, Debug)]
struct Tag {
    bytes: [u8; 5],
    length: u8,
}

#[derive(Debug)]
struct EnumTable {
    /// Number, word, and the word in quotes.
    words: Vec<(i32, Box<str>, Box<[u8]>)>,
}

impl Schema {
    /// A schema that speaks nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Learns a message and all that it holds.
    pub fn learn(&mut self, message: &MessageDescriptor) -> Result<MessageId, Unspeakable> {
        if let Some(id) = self.message_ids.get(message.full_name()) {
            return Ok(*id);
        }
        let unspeakable = |problem| Unspeakable { name: message.full_name().to_owned(), problem };
        let id = MessageId(self.messages.len());
        self.messages.push(MessageTable::default());
        self.message_ids.insert(message.full_name().to_owned(), id);

        let mut table = MessageTable::default();
        for field in in_order_of_declaration(message) {
            let position = table.fields.len();
            if position == MAX_FIELDS {
                return Err(unspeakable("it has too many fields"));
            }
            let entry = self.field(message, &field)?;
            if entry.kind == Kind::Mask {
                table.mask = Some(position);
            }
            if let Some(at) = usize::try_from(entry.number).ok().filter(|number| *number < 1_024) {
                if table.positions.len() <= at {
                    table.positions.resize(at + 1, 0);
                }
                table.positions[at] = u16::try_from(position + 1).unwrap_or(0);
            }
            table.names.push((entry.name.clone(), position));
            if entry.camel != entry.name {
                table.names.push((entry.camel.clone(), position));
            }
            table.fields.push(entry);
        }
        let mut names: Vec<_> = table.names.iter().map(|(name, _)| name).collect();
        names.sort();
        names.dedup();
        if names.len() != table.names.len() {
            return Err(unspeakable("two of its fields share a name"));
        }
        self.messages[id.0] = table;
        let mut members = Vec::new();
        self.members_of(id, &mut members, 0);
        let all = members.len();
        members.sort_unstable();
        members.dedup();
        if members.len() != all {
            return Err(unspeakable("an inline message repeats a member of its parent"));
        }
        Ok(id)
    }

    /// The field of a message with that name in the contract.
    pub fn position(&self, message: MessageId, name: &str) -> Option<usize> {
        self.table(message).fields.iter().position(|field| &*field.name == name)
    }

    /// The names that stand in one object of an answer.
    fn members_of<'s>(&'s self, message: MessageId, members: &mut Vec<&'s str>, depth: usize) {
        for field in &self.table(message).fields {
            match field.kind {
                Kind::Message(inner) if field.inline && depth < MAX_DEPTH => self.members_of(inner, members, depth + 1),
                _ => members.push(&field.camel),
            }
        }
    }

    fn field(&mut self, message: &MessageDescriptor, field: &FieldDescriptor) -> Result<FieldTable, Unspeakable> {
        let (kind, shape) = if let ProtoKind::Message(entry) = field.kind()
            && field.is_map()
        {
            let key = self.kind(&entry.map_entry_key_field())?;
            (self.kind(&entry.map_entry_value_field())?, Shape::Map { key })
        } else if field.is_list() {
            (self.kind(field)?, Shape::List { packed: field.is_packed() })
        } else {
            (self.kind(field)?, Shape::Single { presence: field.supports_presence() })
        };
        let inline = is_inline(field);
        if inline && !matches!((kind, shape), (Kind::Message(_), Shape::Single { .. })) {
            return Err(Unspeakable {
                name: field.full_name().to_owned(),
                problem: "only a single message can stand inline",
            });
        }
        let oneof = field
            .containing_oneof()
            .filter(|oneof| !oneof.is_synthetic())
            .and_then(|oneof| message.oneofs().position(|other| other.full_name() == oneof.full_name()))
            .map(|position| u8::try_from(position.min(63)).unwrap_or(63));
        let camel = camel_case(field.name());
        let member = |name: &str| format!("\"{name}\":").into_bytes().into_boxed_slice();
        let wire_type = match shape {
            Shape::Map { .. } | Shape::List { packed: true } => wire::LENGTH_DELIMITED,
            _ => kind.wire_type(),
        };
        Ok(FieldTable {
            members: [member(field.name()), member(&camel)],
            name: field.name().into(),
            camel: camel.into(),
            number: field.number(),
            tag: Tag::new(field.number(), wire_type),
            kind,
            shape,
            inline,
            oneof,
        })
    }

    fn kind(&mut self, field: &FieldDescriptor) -> Result<Kind, Unspeakable> {
        Ok(match field.kind() {
            ProtoKind::Bool => Kind::Bool,
            ProtoKind::Int32 => Kind::Int32,
            ProtoKind::Int64 => Kind::Int64,
            ProtoKind::Uint32 => Kind::Uint32,
            ProtoKind::Uint64 => Kind::Uint64,
            ProtoKind::Sint32 => Kind::Sint32,
            ProtoKind::Sint64 => Kind::Sint64,
            ProtoKind::Fixed32 => Kind::Fixed32,
            ProtoKind::Fixed64 => Kind::Fixed64,
            ProtoKind::Sfixed32 => Kind::Sfixed32,
            ProtoKind::Sfixed64 => Kind::Sfixed64,
            ProtoKind::Float => Kind::Float,
            ProtoKind::Double => Kind::Double,
            ProtoKind::String => Kind::Text,
            ProtoKind::Bytes => Kind::Bytes,
            ProtoKind::Enum(words) => Kind::Word(self.words(&words)),
            ProtoKind::Message(message) => match message.full_name() {
                "google.protobuf.Timestamp" => Kind::Timestamp,
                "google.protobuf.Duration" => Kind::Duration,
                "google.protobuf.Struct" => Kind::Object,
                "google.protobuf.Value" => Kind::Any,
                "google.protobuf.ListValue" => Kind::Array,
                "google.protobuf.FieldMask" => Kind::Mask,
                name if name.starts_with("google.protobuf.") => {
                    return Err(Unspeakable {
                        name: field.full_name().to_owned(),
                        problem: "its well-known type has no form here",
                    });
                }
                _ => Kind::Message(self.learn(&message)?),
            },
        })
    }

    fn words(&mut self, words: &EnumDescriptor) -> usize {
        if let Some(id) = self.enum_ids.get(words.full_name()) {
            return *id;
        }
        let prefix = format!("{}_", screaming_case(words.name()));
        let words_of = |value: prost_reflect::EnumValueDescriptor| {
            let name = value.name();
            let word = name.strip_prefix(&prefix).unwrap_or(name).to_ascii_lowercase();
            let quoted = format!("\"{word}\"").into_bytes().into_boxed_slice();
            (value.number(), word.into_boxed_str(), quoted)
        };
        let table = EnumTable { words: words.values().filter(|value| value.number() != 0).map(words_of).collect() };
        self.enums.push(table);
        let id = self.enums.len() - 1;
        self.enum_ids.insert(words.full_name().to_owned(), id);
        id
    }

    fn table(&self, message: MessageId) -> &MessageTable {
        &self.messages[message.0]
    }
}

impl MessageTable {
    /// The field that a request calls so.
    fn named(&self, name: &str) -> Option<usize> {
        self.names.iter().find(|(known, _)| **known == *name).map(|(_, position)| *position)
    }

    /// The field with that number.
    fn numbered(&self, number: u32) -> Option<usize> {
        match usize::try_from(number).ok().and_then(|at| self.positions.get(at)) {
            Some(0) => None,
            Some(position) => Some(usize::from(*position) - 1),
            None => self.fields.iter().position(|field| field.number == number),
        }
    }
}

impl FieldTable {
    fn name_in(&self, case: LetterCase) -> &str {
        if case == LetterCase::Camel { &self.camel } else { &self.name }
    }
}

impl Kind {
    fn wire_type(self) -> u8 {
        match self {
            Self::Bool
            | Self::Int32
            | Self::Int64
            | Self::Uint32
            | Self::Uint64
            | Self::Sint32
            | Self::Sint64
            | Self::Word(_) => wire::VARINT,
            Self::Fixed32 | Self::Sfixed32 | Self::Float => wire::FIXED32,
            Self::Fixed64 | Self::Sfixed64 | Self::Double => wire::FIXED64,
            _ => wire::LENGTH_DELIMITED,
        }
    }
}

impl Tag {
    fn new(number: u32, wire_type: u8) -> Self {
        let mut encoded = Vec::with_capacity(5);
        wire::put_varint(&mut encoded, (u64::from(number) << 3) | u64::from(wire_type));
        let mut tag = Self { bytes: [0; 5], length: 0 };
        for (to, from) in tag.bytes.iter_mut().zip(&encoded) {
            *to = *from;
            tag.length += 1;
        }
        tag
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

/// `product_id` as `productId`. A leading or doubled underscore has no camelCase of its own, so it stays.
pub fn camel_case(snake: &str) -> String {
    let mut camel = String::with_capacity(snake.len());
    let mut raise = false;
    for character in snake.chars() {
        if character == '_' && !camel.is_empty() && !raise {
            raise = true;
        } else {
            if raise && character == '_' {
                camel.push('_');
            }
            camel.push(if raise { character.to_ascii_uppercase() } else { character });
            raise = false;
        }
    }
    if raise {
        camel.push('_');
    }
    camel
}

/// `LicenseStatus` as `LICENSE_STATUS`.
pub(crate) fn screaming_case(name: &str) -> String {
    let mut screaming = String::with_capacity(name.len() + 4);
    for (at, character) in name.char_indices() {
        if at > 0 && character.is_ascii_uppercase() {
            screaming.push('_');
        }
        screaming.push(character.to_ascii_uppercase());
    }
    screaming
}

/// prost-reflect sorts fields by number; answers are easier to read in the order of the contract.
pub(crate) fn in_order_of_declaration(message: &MessageDescriptor) -> Vec<FieldDescriptor> {
    message.descriptor_proto().field.iter().filter_map(|field| message.get_field_by_name(field.name())).collect()
}

pub(crate) fn is_inline(field: &FieldDescriptor) -> bool {
    field
        .parent_pool()
        .get_extension_by_name("paperkey.options.v1.presentation")
        .and_then(|extension| {
            let options = field.options();
            let presentation = options.get_extension(&extension);
            presentation.as_message()?.get_field_by_name("inline")?.as_bool()
        })
        .unwrap_or(false)
}
