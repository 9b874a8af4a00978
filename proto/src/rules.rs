//! The rules of fields (`buf.validate`), enforced on wire bytes by tables made once.
//!
//! A table knows only the fields that have rules, or that lead to some; everything else is skipped by length.
//! What the tables do not know (patterns, CEL) the contract does not use: reading a rule outside the known part
//! would be a silent gap, so `buf/validate/validate.proto` here declares only what this module enforces.

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock},
};

use prost::{
    Name,
    encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field},
};
use prost_reflect::{DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor};

use crate::{
    contract::{Contract, pool},
    error::Error,
    errors::v1::Reason,
};

/// How deep messages may nest before they are refused.
const MAX_DEPTH: usize = 32;

/// The rules of one message.
#[derive(Debug, Default)]
pub struct MessageRules {
    fields: Vec<FieldRule>,
}

#[derive(Clone, Debug)]
struct FieldRule {
    number: u32,
    name: String,
    required: bool,
    list: bool,
    min_items: u64,
    max_items: u64,
    unique: bool,
    value: ValueRule,
}

#[derive(Clone, Debug)]
enum ValueRule {
    Any,
    Text { min: u64, max: u64, email: bool, words: Vec<String>, storable: bool },
    Integer { min: i64, max: i64 },
    Message(Arc<MessageRules>),
}

/// What the rules of a field demand, for those who describe it to callers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Demands {
    /// It must be there, and not be empty.
    pub required: bool,
    /// The fewest and the most items of a list.
    pub items: (Option<u64>, Option<u64>),
    /// No item of a list may be there twice.
    pub unique: bool,
    /// The fewest and the most characters of a text, or of each text in a list.
    pub length: (Option<u64>, Option<u64>),
    /// A text is an email address.
    pub email: bool,
    /// A text is one of these words; any text where there are none.
    pub words: Vec<String>,
    /// The least and the greatest number.
    pub range: (Option<i64>, Option<i64>),
}

/// What the rules of a field demand.
pub fn demands_of(field: &FieldDescriptor) -> Demands {
    let Some(extension) = pool().get_extension_by_name("buf.validate.field") else { return Demands::default() };
    let options = field.options();
    let declared = options.get_extension(&extension);
    let declared = declared.as_message().filter(|_| options.has_extension(&extension));
    let rule = field_rule(field, declared, None, false);
    let mut demands = Demands {
        required: rule.required,
        items: (Some(rule.min_items).filter(|least| *least > 0), Some(rule.max_items).filter(|most| *most < u64::MAX)),
        unique: rule.unique,
        ..Demands::default()
    };
    match rule.value {
        ValueRule::Text { min, max, email, words, .. } => {
            // What is required is not empty.
            let least = if rule.required && !rule.list { min.max(1) } else { min };
            demands.length = (Some(least).filter(|least| *least > 0), Some(max).filter(|most| *most < u64::MAX));
            (demands.email, demands.words) = (email, words);
        }
        ValueRule::Integer { min, max } => {
            demands.range = (Some(min).filter(|least| *least > i64::MIN), Some(max).filter(|most| *most < i64::MAX));
        }
        ValueRule::Any | ValueRule::Message(_) => {}
    }
    demands
}

/// The rules of a message type; `None` where it has none.
pub fn of<M: Name>() -> Option<&'static MessageRules> {
    static TABLES: LazyLock<HashMap<String, HashMap<String, Arc<MessageRules>>>> = LazyLock::new(|| tables(pool()));
    TABLES.get(M::PACKAGE)?.get(M::NAME).map(AsRef::as_ref)
}

impl MessageRules {
    /// Judges the wire bytes of a message. All violations are named at once.
    pub fn check(&self, bytes: &[u8]) -> Result<(), Error> {
        let mut error = Error::new(Reason::ValidationFailed);
        self.walk(bytes, "", 0, &mut error)?;
        if error.violations().is_empty() { Ok(()) } else { Err(error) }
    }

    fn walk(&self, mut bytes: &[u8], path: &str, depth: usize, error: &mut Error) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(Error::malformed("the message is nested too deeply"));
        }
        let mut seen: Vec<Seen<'_>> = self.fields.iter().map(|_| Seen::default()).collect();
        while !bytes.is_empty() {
            let (number, wire_type) = decode_key(&mut bytes).map_err(|_| garbled())?;
            let position = self.fields.iter().position(|field| field.number == number);
            let Some((rule, seen)) = position.and_then(|at| Some((self.fields.get(at)?, seen.get_mut(at)?))) else {
                skip_field(wire_type, number, &mut bytes, DecodeContext::default()).map_err(|_| garbled())?;
                continue;
            };
            let count = seen.count;
            let field = || match (path, rule.list) {
                ("", false) => rule.name.clone(),
                ("", true) => format!("{}[{}]", rule.name, count),
                (path, false) => format!("{path}.{}", rule.name),
                (path, true) => format!("{path}.{}[{}]", rule.name, count),
            };
            let fault = match wire_type {
                WireType::Varint => {
                    let value = decode_varint(&mut bytes).map_err(|_| garbled())?;
                    rule.value.fault_of_integer(value.cast_signed())
                }
                WireType::LengthDelimited => {
                    let length = decode_varint(&mut bytes).map_err(|_| garbled())?;
                    let length = usize::try_from(length).map_err(|_| garbled())?;
                    let (value, rest) = bytes.split_at_checked(length).ok_or_else(garbled)?;
                    bytes = rest;
                    seen.empty = value.is_empty();
                    if rule.unique && !seen.add(value) {
                        Some("must not be listed twice".to_owned())
                    } else if let ValueRule::Message(rules) = &rule.value {
                        rules.walk(value, &field(), depth + 1, error)?;
                        None
                    } else if let ValueRule::Text { .. } = &rule.value {
                        let text =
                            std::str::from_utf8(value).map_err(|_| Error::field(field(), "must be valid UTF-8"))?;
                        rule.value.fault_of_text(text, rule.required)
                    } else {
                        None
                    }
                }
                _ => {
                    skip_field(wire_type, number, &mut bytes, DecodeContext::default()).map_err(|_| garbled())?;
                    None
                }
            };
            if let Some(fault) = fault {
                let field = field();
                *error = std::mem::replace(error, Error::new(Reason::ValidationFailed)).with_violation(field, fault);
            }
            seen.count += 1;
        }
        for (rule, seen) in self.fields.iter().zip(&seen) {
            if let Some(fault) = rule.fault_of_presence(seen) {
                let field = if path.is_empty() { rule.name.clone() } else { format!("{path}.{}", rule.name) };
                *error = std::mem::replace(error, Error::new(Reason::ValidationFailed)).with_violation(field, fault);
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Seen<'a> {
    count: u64,
    empty: bool,
    values: Vec<&'a [u8]>,
}

impl<'a> Seen<'a> {
    fn add(&mut self, value: &'a [u8]) -> bool {
        let new = !self.values.contains(&value);
        // Beyond this a list is over its bound anyway.
        if new && self.values.len() < 1_000 {
            self.values.push(value);
        }
        new
    }
}

impl FieldRule {
    fn fault_of_presence(&self, seen: &Seen<'_>) -> Option<String> {
        let text = matches!(self.value, ValueRule::Text { .. } | ValueRule::Any);
        if self.required && (seen.count == 0 || (seen.empty && text && !self.list)) {
            Some("is required".to_owned())
        } else if self.list && seen.count < self.min_items {
            Some(format!("needs at least {}", counted(self.min_items, "item")))
        } else if self.list && seen.count > self.max_items {
            Some(format!("takes at most {}", counted(self.max_items, "item")))
        } else {
            None
        }
    }
}

impl ValueRule {
    fn fault_of_text(&self, text: &str, required: bool) -> Option<String> {
        let Self::Text { min, max, email, words, storable } = self else { return None };
        if required && text.is_empty() {
            // Said once, by the rule of presence.
            return None;
        }
        if *storable && text.contains('\0') {
            // PostgreSQL cannot store it, and nothing of ours means it.
            return Some("must not contain a NUL character".to_owned());
        }
        let length = text.chars().count() as u64;
        if min == max && length != *min {
            Some(format!("must be {} long", counted(*min, "character")))
        } else if length < *min {
            Some(format!("must be at least {} long", counted(*min, "character")))
        } else if length > *max {
            Some(format!("must be at most {} long", counted(*max, "character")))
        } else if *email && !is_email(text) {
            Some("must be an email address".to_owned())
        } else if !words.is_empty() && !words.iter().any(|word| word == text) {
            Some(format!("must be one of {}", words.join(", ")))
        } else {
            None
        }
    }

    fn fault_of_integer(&self, value: i64) -> Option<String> {
        let Self::Integer { min, max } = self else { return None };
        if value < *min {
            Some(format!("must be at least {min}"))
        } else if value > *max {
            Some(format!("must be at most {max}"))
        } else {
            None
        }
    }
}

fn counted(number: u64, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// The form `local@domain.tld` without spaces or controls: what a mail server decides, it decides.
fn is_email(text: &str) -> bool {
    let Some((local, domain)) = text.rsplit_once('@') else { return false };
    !local.is_empty()
        && local.len() <= 64
        && !local.contains('@')
        && domain.contains('.')
        && domain.split('.').all(|label| !label.is_empty() && !label.starts_with('-') && !label.ends_with('-'))
        && !text.chars().any(|c| c.is_whitespace() || c.is_control() || matches!(c, '<' | '>' | '"' | ',' | ';'))
}

fn garbled() -> Error {
    Error::malformed("the message is not valid protobuf of its type")
}

fn tables(pool: &DescriptorPool) -> HashMap<String, HashMap<String, Arc<MessageRules>>> {
    let mut tables: HashMap<String, HashMap<String, Arc<MessageRules>>> = HashMap::new();
    // Only requests are judged: what was stored under older rules must still be answered.
    for method in Contract::get().methods() {
        let message = method.descriptor.input();
        if let Some(rules) = rules_of(pool, &message, method.is_public(), 0) {
            tables
                .entry(message.package_name().to_owned())
                .or_default()
                .insert(message.name().to_owned(), Arc::new(rules));
        }
    }
    tables
}

/// The rules of a message. Of what people send, every text is judged, also without a rule of its own (see
/// [`ValueRule::fault_of_text`]); what our own processes send must not be held up by one odd text in it.
fn rules_of(
    pool: &DescriptorPool,
    message: &MessageDescriptor,
    every_text: bool,
    depth: usize,
) -> Option<MessageRules> {
    let extension = pool.get_extension_by_name("buf.validate.field")?;
    let mut fields = Vec::new();
    for field in message.fields() {
        let options = field.options();
        let declared = options.get_extension(&extension);
        let declared = declared.as_message().filter(|_| options.has_extension(&extension));
        let nested = match field.kind() {
            Kind::Message(kind) if depth < MAX_DEPTH && kind.full_name().starts_with("paperkey.") => {
                rules_of(pool, &kind, every_text, depth + 1)
            }
            _ => None,
        };
        let text = every_text && field.kind() == Kind::String;
        if declared.is_some() || nested.is_some() || text {
            fields.push(field_rule(&field, declared, nested, every_text));
        }
    }
    (!fields.is_empty()).then_some(MessageRules { fields })
}

fn field_rule(
    field: &FieldDescriptor,
    declared: Option<&DynamicMessage>,
    nested: Option<MessageRules>,
    every_text: bool,
) -> FieldRule {
    let repeated = declared.and_then(|rules| message_of(rules, "repeated"));
    let items = repeated.as_ref().and_then(|rules| message_of(rules, "items"));
    let value = match nested {
        Some(rules) => ValueRule::Message(Arc::new(rules)),
        None => value_rule(field, items.as_ref().or(declared), every_text),
    };
    FieldRule {
        number: field.number(),
        name: field.name().to_owned(),
        required: declared.is_some_and(|rules| flag(rules, "required")),
        list: field.is_list(),
        min_items: repeated.as_ref().and_then(|rules| number(rules, "min_items")).unwrap_or(0),
        max_items: repeated.as_ref().and_then(|rules| number(rules, "max_items")).unwrap_or(u64::MAX),
        unique: repeated.as_ref().is_some_and(|rules| flag(rules, "unique")),
        value,
    }
}

fn value_rule(field: &FieldDescriptor, declared: Option<&DynamicMessage>, storable: bool) -> ValueRule {
    match field.kind() {
        Kind::String => {
            let rules = declared.and_then(|rules| message_of(rules, "string"));
            let rule = |name| rules.as_ref().and_then(|rules| number(rules, name));
            let exact = rule("len");
            ValueRule::Text {
                min: exact.or_else(|| rule("min_len")).unwrap_or(0),
                max: exact.or_else(|| rule("max_len")).unwrap_or(u64::MAX),
                email: rules.as_ref().is_some_and(|rules| flag(rules, "email")),
                words: rules.as_ref().map(|rules| texts(rules, "in")).unwrap_or_default(),
                storable,
            }
        }
        kind @ (Kind::Int32 | Kind::Int64) => {
            let name = if kind == Kind::Int32 { "int32" } else { "int64" };
            let rules = declared.and_then(|rules| message_of(rules, name));
            let bound = |name| rules.as_ref().and_then(|rules| integer(rules, name));
            ValueRule::Integer { min: bound("gte").unwrap_or(i64::MIN), max: bound("lte").unwrap_or(i64::MAX) }
        }
        // One without rules of its own, such as a time: it is there or not, and empty it is as good as any.
        Kind::Message(_) => ValueRule::Message(Arc::default()),
        _ => ValueRule::Any,
    }
}

fn message_of(rules: &DynamicMessage, name: &str) -> Option<DynamicMessage> {
    rules.has_field_by_name(name).then(|| rules.get_field_by_name(name)?.as_message().cloned()).flatten()
}

fn flag(rules: &DynamicMessage, name: &str) -> bool {
    rules.get_field_by_name(name).and_then(|value| value.as_bool()).unwrap_or(false)
}

fn number(rules: &DynamicMessage, name: &str) -> Option<u64> {
    rules.has_field_by_name(name).then(|| rules.get_field_by_name(name)?.as_u64()).flatten()
}

fn integer(rules: &DynamicMessage, name: &str) -> Option<i64> {
    let value = rules.has_field_by_name(name).then(|| rules.get_field_by_name(name)).flatten()?;
    value.as_i64().or_else(|| value.as_i32().map(i64::from))
}

fn texts(rules: &DynamicMessage, name: &str) -> Vec<String> {
    rules
        .get_field_by_name(name)
        .and_then(|value| Some(value.as_list()?.iter().filter_map(|v| v.as_str().map(str::to_owned)).collect()))
        .unwrap_or_default()
}
