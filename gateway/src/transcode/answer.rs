//! An answer, from wire bytes to JSON.
//!
//! The bytes are walked once to note where each field stands, and then written in the order of the contract: scalars
//! always, lists and maps even where empty, and `null` for what is absent. Answers come from our own services, whose
//! encoder writes a single field once; should a field stand there twice, the last one counts.

use base64::Engine as _;
use paperkey_proto::{Error, options::v1::LetterCase};

use super::{
    FieldTable, Kind, MessageId, MessageTable, Schema, Shape, time,
    wire::{Garbled, Raw, Walk},
};

/// How deep messages may nest: what protobuf's own decoders allow.
const MAX_NESTING: usize = 100;

impl Schema {
    /// Writes an answer as JSON.
    pub fn answer(&self, message: MessageId, case: LetterCase, bytes: &[u8]) -> Result<Vec<u8>, Error> {
        let mut writing = Writing {
            schema: self,
            member: usize::from(case == LetterCase::Camel),
            out: Vec::with_capacity(bytes.len() * 2 + 128),
            slots: Vec::with_capacity(32),
            nesting: 0,
        };
        match writing.message(message, bytes) {
            Ok(()) => Ok(writing.out),
            Err(Garbled) => Err(Error::internal("a service answered with bytes that are no message of their type")),
        }
    }
}

struct Writing<'s> {
    schema: &'s Schema,
    /// Which of a field's members names it.
    member: usize,
    out: Vec<u8>,
    /// Where the fields of the messages stand that are being written, innermost last.
    slots: Vec<Slot>,
    nesting: usize,
}

/// Where a field stands in its message.
#[derive(Clone, Copy, Default)]
struct Slot {
    /// Where it first stands.
    from: usize,
    /// Where it last stands.
    last: usize,
    /// Where that ends; 0 where the field is absent.
    to: usize,
}

type Written = Result<(), Garbled>;

impl Writing<'_> {
    fn message(&mut self, message: MessageId, bytes: &[u8]) -> Written {
        self.out.push(b'{');
        self.members(message, bytes)?;
        self.out.push(b'}');
        Ok(())
    }

    fn members(&mut self, message: MessageId, bytes: &[u8]) -> Written {
        if self.nesting == MAX_NESTING {
            return Err(Garbled);
        }
        self.nesting += 1;
        let table = self.schema.table(message);
        let base = self.slots.len();
        self.slots.resize(base + table.fields.len(), Slot::default());
        self.locate(table, base, bytes)?;
        for (position, field) in table.fields.iter().enumerate() {
            let slot = self.slots[base + position];
            if field.inline
                && let Kind::Message(inner) = field.kind
            {
                let inner_bytes = match last(bytes, slot)? {
                    Some(Raw::Bytes(inner_bytes)) => inner_bytes,
                    Some(_) => return Err(Garbled),
                    None => &[],
                };
                self.members(inner, inner_bytes)?;
                continue;
            }
            if self.out.last() != Some(&b'{') {
                self.out.push(b',');
            }
            self.out.extend_from_slice(&field.members[self.member]);
            match field.shape {
                Shape::Single { presence } => match last(bytes, slot)? {
                    Some(raw) => self.value(field.kind, raw)?,
                    None if presence => self.out.extend_from_slice(b"null"),
                    None => self.default_of(field.kind),
                },
                Shape::List { .. } => self.list(field, &bytes[slot.from..slot.to])?,
                Shape::Map { key } => self.map(field, key, &bytes[slot.from..slot.to])?,
            }
        }
        self.slots.truncate(base);
        self.nesting -= 1;
        Ok(())
    }

    fn locate(&mut self, table: &MessageTable, base: usize, bytes: &[u8]) -> Written {
        let mut walk = Walk::new(bytes);
        let mut at = 0;
        while let Some(entry) = walk.next()? {
            let end = bytes.len() - walk.left();
            if let Some(position) = table.numbered(entry.number) {
                let slot = &mut self.slots[base + position];
                if slot.to == 0 {
                    slot.from = at;
                }
                slot.last = at;
                slot.to = end;
            }
            at = end;
        }
        Ok(())
    }

    fn list(&mut self, field: &FieldTable, bytes: &[u8]) -> Written {
        self.out.push(b'[');
        let mut walk = Walk::new(bytes);
        let wire_type = field.kind.wire_type();
        while let Some(entry) = walk.next()? {
            if entry.number != field.number {
                continue;
            }
            match entry.raw {
                Raw::Bytes(mut packed) if wire_type != super::wire::LENGTH_DELIMITED => {
                    while !packed.is_empty() {
                        let raw = match wire_type {
                            super::wire::VARINT => Raw::Varint(super::wire::take_varint(&mut packed)?),
                            super::wire::FIXED64 => Raw::Fixed64(super::wire::take_fixed64(&mut packed)?),
                            _ => Raw::Fixed32(super::wire::take_fixed32(&mut packed)?),
                        };
                        self.comma(b'[');
                        self.value(field.kind, raw)?;
                    }
                }
                raw => {
                    self.comma(b'[');
                    self.value(field.kind, raw)?;
                }
            }
        }
        self.out.push(b']');
        Ok(())
    }

    fn map(&mut self, field: &FieldTable, key_kind: Kind, bytes: &[u8]) -> Written {
        self.out.push(b'{');
        let mut walk = Walk::new(bytes);
        while let Some(entry) = walk.next()? {
            if entry.number != field.number {
                continue;
            }
            let Raw::Bytes(entry) = entry.raw else { return Err(Garbled) };
            let (key, value) = entry_of(entry)?;
            self.comma(b'{');
            if key_kind == Kind::Text {
                match key {
                    Some(key) => self.value(key_kind, key)?,
                    None => self.default_of(key_kind),
                }
            } else {
                self.out.push(b'"');
                match key {
                    Some(key) => self.value(key_kind, key)?,
                    None => self.default_of(key_kind),
                }
                self.out.push(b'"');
            }
            self.out.push(b':');
            match (value, field.kind) {
                (Some(value), kind) => self.value(kind, value)?,
                (None, Kind::Message(message)) => self.message(message, &[])?,
                (None, kind) => self.default_of(kind),
            }
        }
        self.out.push(b'}');
        Ok(())
    }

    fn value(&mut self, kind: Kind, raw: Raw<'_>) -> Written {
        match (kind, raw) {
            (Kind::Text, Raw::Bytes(bytes)) => return self.text(bytes),
            (Kind::Message(message), Raw::Bytes(bytes)) => return self.message(message, bytes),
            (Kind::Bool, Raw::Varint(value)) => {
                self.out.extend_from_slice(if value == 0 { b"false" } else { b"true" });
            }
            (Kind::Int32, Raw::Varint(value)) => self.signed(i64::from(low_i32(value))),
            (Kind::Int64, Raw::Varint(value)) | (Kind::Sfixed64, Raw::Fixed64(value)) => {
                self.signed(value.cast_signed());
            }
            (Kind::Uint32, Raw::Varint(value)) => self.unsigned(u64::from(low_i32(value).cast_unsigned())),
            (Kind::Uint64, Raw::Varint(value)) | (Kind::Fixed64, Raw::Fixed64(value)) => self.unsigned(value),
            (Kind::Sint32 | Kind::Sint64, Raw::Varint(value)) => {
                self.signed((value >> 1).cast_signed() ^ -(value & 1).cast_signed());
            }
            (Kind::Fixed32, Raw::Fixed32(value)) => self.unsigned(value.into()),
            (Kind::Sfixed32, Raw::Fixed32(value)) => self.signed(value.cast_signed().into()),
            (Kind::Float, Raw::Fixed32(value)) => self.number(f32::from_bits(value).into()),
            (Kind::Double, Raw::Fixed64(value)) => self.number(f64::from_bits(value)),
            (Kind::Word(id), Raw::Varint(value)) => {
                let number = low_i32(value);
                let words = &self.schema.enums[id].words;
                let word = words.iter().find(|(known, _, _)| *known == number).map(|(_, _, quoted)| &**quoted);
                // A word that is newer than this process is as unknown here as none at all.
                self.out.extend_from_slice(word.unwrap_or(b"null"));
            }
            (Kind::Timestamp, Raw::Bytes(bytes)) => {
                let (seconds, nanos) = seconds_and_nanos(bytes)?;
                if !time::write(&mut self.out, seconds, nanos) {
                    return Err(Garbled);
                }
            }
            (Kind::Duration, Raw::Bytes(bytes)) => {
                let (seconds, nanos) = seconds_and_nanos(bytes)?;
                let sign = if seconds < 0 || nanos < 0 { "-" } else { "" };
                let text = format!("\"{sign}{}.{:09}s\"", seconds.unsigned_abs(), nanos.unsigned_abs());
                self.out.extend_from_slice(text.as_bytes());
            }
            (Kind::Bytes, Raw::Bytes(bytes)) => {
                let text = base64::engine::general_purpose::STANDARD.encode(bytes);
                return self.text(text.as_bytes());
            }
            (Kind::Object, Raw::Bytes(bytes)) => return self.object(bytes),
            (Kind::Array, Raw::Bytes(bytes)) => return self.array(bytes),
            (Kind::Any, Raw::Bytes(bytes)) => return self.any(bytes),
            (Kind::Mask, Raw::Bytes(bytes)) => {
                let mut paths = Vec::new();
                let mut walk = Walk::new(bytes);
                while let Some(entry) = walk.next()? {
                    let Raw::Bytes(path) = entry.raw else { return Err(Garbled) };
                    paths.push(super::camel_case(std::str::from_utf8(path).map_err(|_| Garbled)?));
                }
                return self.text(paths.join(",").as_bytes());
            }
            _ => return Err(Garbled),
        }
        Ok(())
    }

    fn default_of(&mut self, kind: Kind) {
        self.out.extend_from_slice(match kind {
            Kind::Bool => b"false".as_slice(),
            Kind::Text | Kind::Bytes => b"\"\"",
            Kind::Object => b"{}",
            Kind::Array => b"[]",
            Kind::Word(_) | Kind::Message(_) | Kind::Timestamp | Kind::Duration | Kind::Any | Kind::Mask => b"null",
            _ => b"0",
        });
    }

    fn object(&mut self, bytes: &[u8]) -> Written {
        self.deeper()?;
        self.out.push(b'{');
        let mut walk = Walk::new(bytes);
        while let Some(entry) = walk.next()? {
            let (1, Raw::Bytes(entry)) = (entry.number, entry.raw) else { continue };
            let (key, value) = entry_of(entry)?;
            self.comma(b'{');
            match key {
                Some(Raw::Bytes(key)) => self.text(key)?,
                Some(_) => return Err(Garbled),
                None => self.out.extend_from_slice(b"\"\""),
            }
            self.out.push(b':');
            match value {
                Some(Raw::Bytes(value)) => self.any(value)?,
                Some(_) => return Err(Garbled),
                None => self.out.extend_from_slice(b"null"),
            }
        }
        self.out.push(b'}');
        self.nesting -= 1;
        Ok(())
    }

    fn array(&mut self, bytes: &[u8]) -> Written {
        self.deeper()?;
        self.out.push(b'[');
        let mut walk = Walk::new(bytes);
        while let Some(entry) = walk.next()? {
            let (1, Raw::Bytes(value)) = (entry.number, entry.raw) else { continue };
            self.comma(b'[');
            self.any(value)?;
        }
        self.out.push(b']');
        self.nesting -= 1;
        Ok(())
    }

    fn any(&mut self, bytes: &[u8]) -> Written {
        let mut walk = Walk::new(bytes);
        let mut value = None;
        while let Some(entry) = walk.next()? {
            value = Some(entry);
        }
        match value.map(|entry| (entry.number, entry.raw)) {
            Some((2, Raw::Fixed64(number))) => self.number(f64::from_bits(number)),
            Some((3, Raw::Bytes(text))) => return self.text(text),
            Some((4, Raw::Varint(flag))) => self.out.extend_from_slice(if flag == 0 { b"false" } else { b"true" }),
            Some((5, Raw::Bytes(object))) => return self.object(object),
            Some((6, Raw::Bytes(array))) => return self.array(array),
            _ => self.out.extend_from_slice(b"null"),
        }
        Ok(())
    }

    fn deeper(&mut self) -> Written {
        if self.nesting == MAX_NESTING {
            return Err(Garbled);
        }
        self.nesting += 1;
        Ok(())
    }

    fn comma(&mut self, opening: u8) {
        if self.out.last() != Some(&opening) {
            self.out.push(b',');
        }
    }

    fn text(&mut self, bytes: &[u8]) -> Written {
        if is_plain(bytes) {
            self.out.reserve(bytes.len() + 2);
            self.out.push(b'"');
            self.out.extend_from_slice(bytes);
            self.out.push(b'"');
        } else {
            std::str::from_utf8(bytes).map_err(|_| Garbled)?;
            put_text(&mut self.out, bytes);
        }
        Ok(())
    }

    fn number(&mut self, number: f64) {
        // A whole number is written as people would: 5, not 5.0.
        if number.fract() == 0.0 && number.abs() < 9_007_199_254_740_992.0 {
            #[expect(clippy::cast_possible_truncation, reason = "whole, and small enough to be exact")]
            self.signed(number as i64);
        } else if serde_json::to_writer(&mut self.out, &number).is_err() {
            // Writing to memory does not fail; a number that JSON cannot hold is written as null.
            self.out.extend_from_slice(b"null");
        }
    }

    fn signed(&mut self, number: i64) {
        if number < 0 {
            self.out.push(b'-');
        }
        self.unsigned(number.unsigned_abs());
    }

    fn unsigned(&mut self, mut number: u64) {
        let mut digits = [0_u8; 20];
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b'0' + u8::try_from(number % 10).unwrap_or(0);
            number /= 10;
            if number == 0 {
                break;
            }
        }
        self.out.extend_from_slice(&digits[at..]);
    }
}

/// Whether a text is ASCII, and is written in JSON as it stands. It looks at every byte, whatever it finds, so that
/// many are looked at in one step.
fn is_plain(bytes: &[u8]) -> bool {
    bytes.iter().fold(true, |plain, byte| plain & ((0x20..0x7f).contains(byte) && *byte != b'"' && *byte != b'\\'))
}

/// Appends text as a JSON string.
pub(crate) fn put_text(out: &mut Vec<u8>, bytes: &[u8]) {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    out.push(b'"');
    let mut plain_from = 0;
    for (at, byte) in bytes.iter().enumerate() {
        if *byte >= 0x20 && *byte != b'"' && *byte != b'\\' {
            continue;
        }
        out.extend_from_slice(&bytes[plain_from..at]);
        plain_from = at + 1;
        match byte {
            b'"' => out.extend_from_slice(b"\\\""),
            b'\\' => out.extend_from_slice(b"\\\\"),
            b'\n' => out.extend_from_slice(b"\\n"),
            b'\r' => out.extend_from_slice(b"\\r"),
            b'\t' => out.extend_from_slice(b"\\t"),
            _ => {
                out.extend_from_slice(b"\\u00");
                out.push(HEX[usize::from(byte >> 4)]);
                out.push(HEX[usize::from(byte & 15)]);
            }
        }
    }
    out.extend_from_slice(&bytes[plain_from..]);
    out.push(b'"');
}

/// What stands last in a slot.
fn last(bytes: &[u8], slot: Slot) -> Result<Option<Raw<'_>>, Garbled> {
    Ok(Walk::new(&bytes[slot.last..slot.to]).next()?.map(|entry| entry.raw))
}

/// The key and the value of an entry of a map.
fn entry_of(bytes: &[u8]) -> Result<(Option<Raw<'_>>, Option<Raw<'_>>), Garbled> {
    let (mut key, mut value) = (None, None);
    let mut walk = Walk::new(bytes);
    while let Some(entry) = walk.next()? {
        match entry.number {
            1 => key = Some(entry.raw),
            2 => value = Some(entry.raw),
            _ => {}
        }
    }
    Ok((key, value))
}

fn seconds_and_nanos(bytes: &[u8]) -> Result<(i64, i64), Garbled> {
    let (mut seconds, mut nanos) = (0, 0);
    let mut walk = Walk::new(bytes);
    while let Some(entry) = walk.next()? {
        match (entry.number, entry.raw) {
            (1, Raw::Varint(value)) => seconds = value.cast_signed(),
            (2, Raw::Varint(value)) => nanos = value.cast_signed(),
            _ => {}
        }
    }
    Ok((seconds, nanos))
}

fn low_i32(value: u64) -> i32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    i32::from_le_bytes([a, b, c, d])
}
