//! Licences as files: what an import reads and reports, and what an export writes.
//!
//! An export is an import: the columns have the same names, and a cell is read as what was written. A file from
//! elsewhere may name them in either style, `client_id` or `clientId`, in any order, and leave out what it has not.

use paperkey_kit::values::{self, rfc3339};
use paperkey_proto::{Error, errors::v1::Reason, licensing::v1::CreateLicenseRequest};
use prost_types::{FieldMask, Timestamp};
use serde_json::Value;

use super::{
    csv::{guarded, unguarded},
    license::License,
    license_key::LicenseKey,
};

/// What an export has, in its order.
const COLUMNS: [&str; 13] = [
    "id",
    "product_id",
    "key",
    "status",
    "email",
    "client_id",
    "max_activations",
    "activations_count",
    "expires_at",
    "metadata",
    "created_at",
    "updated_at",
    "revoked_at",
];
/// Where nothing limits the activations: an empty cell is one activation, as a creation that does not name them.
const UNLIMITED: &str = "unlimited";
/// Where a key cannot be opened any more. It is no key, so that an import refuses the line: from an empty cell it would
/// make another licence, with a key that nobody has.
const UNREADABLE: &str = "unreadable";
/// Columns of a file at most.
const MAX_COLUMNS: usize = 100;
/// How deep metadata may nest.
const MAX_DEPTH: usize = 32;
/// The greatest number that the contract carries exactly.
const MAX_EXACT: u64 = 1 << 53;

/// The columns that an import reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Column {
    ProductId,
    Key,
    Email,
    ClientId,
    MaxActivations,
    ExpiresAt,
    Metadata,
    RevokedAt,
    /// What an export says beside.
    PassedOver,
}

impl Column {
    fn named(name: &str) -> Option<Self> {
        let known = COLUMNS.into_iter().find(|known| *known == name || camel_case(known) == name)?;
        Some(match known {
            "product_id" => Self::ProductId,
            "key" => Self::Key,
            "email" => Self::Email,
            "client_id" => Self::ClientId,
            "max_activations" => Self::MaxActivations,
            "expires_at" => Self::ExpiresAt,
            "metadata" => Self::Metadata,
            "revoked_at" => Self::RevokedAt,
            _ => Self::PassedOver,
        })
    }
}

fn camel_case(name: &str) -> String {
    let mut camel = String::with_capacity(name.len());
    for (index, word) in name.split('_').enumerate() {
        let (first, rest) = word.split_at(usize::from(index > 0 && !word.is_empty()));
        camel.push_str(&first.to_ascii_uppercase());
        camel.push_str(rest);
    }
    camel
}

/// The first line of a file: what stands where.
#[derive(Clone, Debug)]
pub struct Header(Vec<Column>);

/// What a line asks for. Whether it may be had is not looked at.
#[derive(Debug)]
pub struct Line {
    /// As a creation would ask for it.
    pub request: CreateLicenseRequest,
    /// The key that it is to have; a new one where absent.
    pub key: Option<LicenseKey>,
    /// Since when it is revoked, if it is: what its vendor took back does not come to life by being moved.
    pub revoked_at: Option<Timestamp>,
}

impl Header {
    /// Reads the names of the columns.
    pub fn read(cells: &[String]) -> Result<Self, Error> {
        if cells.len() > MAX_COLUMNS {
            return Err(Error::field("data", format!("must have at most {MAX_COLUMNS} columns")));
        }
        let mut columns = Vec::with_capacity(cells.len());
        let mut error: Option<Error> = None;
        for name in cells.iter().map(|name| name.trim()) {
            let column = Column::named(name);
            let wrong = match column {
                None => Some("is no column of licenses: name the columns as an export does, in the first line"),
                Some(Column::PassedOver) => None,
                Some(column) if columns.contains(&column) => Some("is named by two columns"),
                Some(_) => None,
            };
            columns.push(column.unwrap_or(Column::PassedOver));
            if let Some(wrong) = wrong {
                // Echoed only in part: it is the caller's text.
                let shown: String = name.chars().filter(|c| !c.is_control()).take(64).collect();
                let field = if shown.is_empty() { "data".to_owned() } else { shown };
                let sofar = error.take().unwrap_or_else(|| Error::new(Reason::ValidationFailed));
                error = Some(sofar.with_violation(field, wrong));
            }
        }
        match error {
            None => Ok(Self(columns)),
            Some(error) => Err(error),
        }
    }

    /// Whether lines name their products themselves.
    pub fn names_products(&self) -> bool {
        self.0.contains(&Column::ProductId)
    }

    /// Reads a line; `product_id` is for those that name none. All that is wrong with it is named.
    pub fn line(&self, cells: &[String], product_id: &str) -> Result<Line, Error> {
        if cells.len() != self.0.len() {
            let (has, wants) = (cells.len(), self.0.len());
            return Err(Error::malformed(format!("This line has {has} cells, and the first line names {wants}")));
        }
        let mut request = CreateLicenseRequest { product_id: product_id.to_owned(), ..CreateLicenseRequest::default() };
        let mut key = None;
        let mut revoked_at = None;
        let mut faults: Vec<(&str, String)> = Vec::new();
        for (column, cell) in self.0.iter().zip(cells) {
            let cell = unguarded(cell).trim();
            if cell.is_empty() {
                continue;
            }
            match column {
                Column::PassedOver => {}
                Column::ProductId => cell.clone_into(&mut request.product_id),
                Column::Email => request.email = Some(cell.to_owned()),
                Column::ClientId => request.client_id = Some(cell.to_owned()),
                Column::Key => match LicenseKey::parse(cell) {
                    Ok(read) => key = Some(read),
                    Err(malformed) => faults.push(("key", malformed.to_string())),
                },
                Column::MaxActivations if cell.eq_ignore_ascii_case(UNLIMITED) => {
                    request.field_mask = Some(FieldMask { paths: vec!["max_activations".to_owned()] });
                }
                Column::MaxActivations => match cell.parse() {
                    Ok(read) => request.max_activations = Some(read),
                    Err(_) => faults.push(("max_activations", "must be a whole number, or unlimited".to_owned())),
                },
                Column::ExpiresAt => match time(cell) {
                    Ok(read) => request.expires_at = Some(read),
                    Err(wrong) => faults.push(("expires_at", wrong.to_owned())),
                },
                Column::RevokedAt => match time(cell) {
                    Ok(read) => revoked_at = Some(read),
                    Err(wrong) => faults.push(("revoked_at", wrong.to_owned())),
                },
                Column::Metadata => match metadata(cell) {
                    Ok(read) => request.metadata = Some(read),
                    Err(wrong) => faults.push(("metadata", wrong.to_owned())),
                },
            }
        }
        if faults.is_empty() {
            return Ok(Line { request, key, revoked_at });
        }
        let error = Error::new(Reason::ValidationFailed);
        Err(faults.into_iter().fold(error, |error, (field, wrong)| error.with_violation(field, wrong)))
    }
}

/// Reads a time as the API does. The parser takes more than RFC 3339 has, such as a time without an offset.
fn time(cell: &str) -> Result<Timestamp, &'static str> {
    let wrong = "must be a time as in RFC 3339, such as 2026-12-31T00:00:00.000Z";
    if is_rfc3339(cell.as_bytes()) { cell.parse().map_err(|_| wrong) } else { Err(wrong) }
}

/// Whether each character stands where it should. Which days a month has is left to the parser.
fn is_rfc3339(text: &[u8]) -> bool {
    // A digit is shown by a nine.
    let has_form = |text: &[u8], form: &[u8]| {
        text.len() == form.len()
            && text.iter().zip(form).all(|(byte, form)| match form {
                b'9' => byte.is_ascii_digit(),
                form => byte.eq_ignore_ascii_case(form),
            })
    };
    let Some((point, rest)) = text.split_at_checked(19) else { return false };
    let offset = match rest {
        [b'.', fraction @ ..] => {
            let digits = fraction.iter().take_while(|byte| byte.is_ascii_digit()).count();
            if digits == 0 {
                return false;
            }
            &fraction[digits..]
        }
        offset => offset,
    };
    has_form(point, b"9999-99-99T99:99:99")
        && [&b"Z"[..], b"+99:99", b"-99:99"].iter().any(|form| has_form(offset, form))
}

fn metadata(cell: &str) -> Result<prost_types::Struct, &'static str> {
    let not_an_object = "must be a JSON object";
    if cell.len() > 4 * values::MAX_METADATA_BYTES {
        return Err("is too long");
    }
    let value: Value = serde_json::from_str(cell).map_err(|_| not_an_object)?;
    if has_inexact(cell) {
        return Err("must have numbers below 2^53: larger integers lose digits, as strings they do not");
    }
    judge(&value, 0)?;
    values::struct_of(&value).ok_or(not_an_object)
}

/// Whether a JSON text has whole numbers that are not carried exactly. Once they are read, those from 2^64 on are told
/// from fractions no more, so it is the text that is looked at.
fn has_inexact(json: &str) -> bool {
    let mut rest = json;
    while let Some(at) = rest.find(['"', '0', '1', '2', '3', '4', '5', '6', '7', '8', '9']) {
        rest = &rest[at..];
        let length = if let Some(text) = rest.strip_prefix('"') {
            1 + length_of_text(text)
        } else {
            let number = rest.find(|c: char| !matches!(c, '0'..='9' | '.' | 'e' | 'E' | '+' | '-'));
            let number = &rest[..number.unwrap_or(rest.len())];
            let is_whole = number.bytes().all(|byte| byte.is_ascii_digit());
            if is_whole && number.parse::<u64>().map_or(true, |whole| whole > MAX_EXACT) {
                return true;
            }
            number.len()
        };
        rest = &rest[length..];
    }
    false
}

/// How long a text of JSON is from behind its first quotation mark, the last one included.
fn length_of_text(text: &str) -> usize {
    let mut is_escaped = false;
    let end = text.bytes().position(|byte| {
        let ends = byte == b'"' && !is_escaped;
        is_escaped = byte == b'\\' && !is_escaped;
        ends
    });
    end.map_or(text.len(), |end| end + 1)
}

/// Refuses what the contract does not carry as it is.
fn judge(value: &Value, depth: usize) -> Result<(), &'static str> {
    if depth > MAX_DEPTH {
        return Err("must nest at most 32 deep");
    }
    match value {
        Value::String(text) if text.contains('\0') => Err("must not contain a NUL character"),
        Value::Array(values) => values.iter().try_for_each(|value| judge(value, depth + 1)),
        Value::Object(members) => members.iter().try_for_each(|(name, value)| {
            if name.contains('\0') { Err("must not contain a NUL character") } else { judge(value, depth + 1) }
        }),
        _ => Ok(()),
    }
}

/// What is written by an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// CSV with a line of names.
    Csv,
    /// A JSON object a line.
    Ndjson,
}

impl Format {
    /// A format by its word.
    pub fn read(word: &str) -> Result<Self, Error> {
        match word {
            "csv" => Ok(Self::Csv),
            "ndjson" => Ok(Self::Ndjson),
            _ => Err(Error::field("format", "must be one of csv, ndjson")),
        }
    }

    /// The type of the body.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Csv => "text/csv; charset=utf-8",
            Self::Ndjson => REPORT_TYPE,
        }
    }

    /// What stands before the first licence.
    pub fn head(self) -> String {
        match self {
            Self::Csv => format!("{}\r\n", COLUMNS.join(",")),
            Self::Ndjson => String::new(),
        }
    }

    /// Writes one more licence, as it stands at that time.
    pub fn write(self, out: &mut String, license: &License, now_ms: i64) {
        let values = shown(license, now_ms);
        match self {
            Self::Csv => row(out, &values),
            Self::Ndjson => object(out, COLUMNS.map(camel_case).iter().map(String::as_str).zip(values)),
        }
    }
}

/// A licence as the API shows it, in the order of the columns.
fn shown(license: &License, now_ms: i64) -> [Value; COLUMNS.len()] {
    let time = |at_ms: Option<i64>| Value::from(at_ms.map(rfc3339));
    let standing = &license.standing;
    [
        Value::from(license.id.as_str()),
        Value::from(license.product_id.as_str()),
        Value::from(license.key.as_ref().map_or_else(|| UNREADABLE.to_owned(), ToString::to_string)),
        Value::from(standing.status(now_ms).word()),
        Value::from(license.email.as_deref()),
        Value::from(license.client_id.as_deref()),
        Value::from(standing.max_activations),
        Value::from(standing.activations_count),
        time(standing.expires_at_ms),
        license.metadata.clone().unwrap_or(Value::Null),
        time(Some(license.created_at_ms)),
        time(Some(license.updated_at_ms)),
        time(standing.revoked_at_ms),
    ]
}

fn row(out: &mut String, values: &[Value]) {
    for (index, (column, value)) in COLUMNS.iter().zip(values).enumerate() {
        if index > 0 {
            out.push(',');
        }
        match value {
            Value::Null if *column == "max_activations" => out.push_str(UNLIMITED),
            Value::Null => {}
            Value::String(text) => write_cell(out, text),
            other => write_cell(out, &other.to_string()),
        }
    }
    out.push_str("\r\n");
}

fn write_cell(out: &mut String, cell: &str) {
    let cell = guarded(cell);
    if cell.contains([',', '"', '\r', '\n']) {
        out.push('"');
        out.push_str(&cell.replace('"', "\"\""));
        out.push('"');
    } else {
        out.push_str(&cell);
    }
}

/// Writes a JSON object with its members in that order, and the end of the line.
fn object<'a>(out: &mut String, members: impl Iterator<Item = (&'a str, Value)>) {
    out.push('{');
    for (index, (name, value)) in members.enumerate() {
        if index > 0 {
            out.push(',');
        }
        out.push('"');
        out.push_str(name);
        out.push_str("\":");
        out.push_str(&value.to_string());
    }
    out.push_str("}\n");
}

/// The type of a report.
pub const REPORT_TYPE: &str = "application/x-ndjson";

/// What became of the lines of an import, as far as it has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    lines: u64,
    created: u64,
    existing: u64,
    failed: u64,
}

impl Report {
    /// How many lines it has reported on.
    pub fn lines(&self) -> u64 {
        self.lines
    }

    /// A licence was made of a line.
    pub fn created(&mut self, out: &mut String, line: u64, id: &str, key: Option<&LicenseKey>) {
        self.created += 1;
        self.made(out, line, "created", id, key);
    }

    /// The product has the licence that a line asks for.
    pub fn exists(&mut self, out: &mut String, line: u64, id: &str, key: Option<&LicenseKey>) {
        self.existing += 1;
        self.made(out, line, "exists", id, key);
    }

    fn made(&mut self, out: &mut String, line: u64, status: &str, id: &str, key: Option<&LicenseKey>) {
        self.lines += 1;
        let members = [
            ("line", Value::from(line)),
            ("status", Value::from(status)),
            ("id", Value::from(id)),
            ("key", Value::from(key.map(ToString::to_string))),
        ];
        object(out, members.into_iter());
    }

    /// Nothing was made of a line.
    pub fn failed(&mut self, out: &mut String, line: u64, error: &Error) {
        self.lines += 1;
        self.failed += 1;
        let violation = error.violations().first();
        let line = line.to_string();
        for text in ["{\"line\":", &line, ",\"status\":\"failed\",\"error\":"] {
            out.push_str(text);
        }
        let members = [
            ("code", Value::from(error.entry().flat_code.as_str())),
            ("field", Value::from(violation.map(|violation| violation.field.as_str()))),
            ("message", Value::from(violation.map_or_else(|| error.message(), |violation| violation.message.as_str()))),
        ];
        object(out, members.into_iter());
        // Of two objects only the outer one ends the line.
        out.pop();
        out.push_str("}\n");
    }

    /// The last line.
    pub fn end(&self, out: &mut String) {
        let members = [
            ("lines", Value::from(self.lines)),
            ("created", Value::from(self.created)),
            ("existing", Value::from(self.existing)),
            ("failed", Value::from(self.failed)),
        ];
        object(out, members.into_iter());
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::domain::{csv, license::Standing};

    fn cells(cells: &[&str]) -> Vec<String> {
        cells.iter().map(ToString::to_string).collect()
    }

    fn license() -> License {
        License {
            id: "lic_1".into(),
            product_id: "prod_1".into(),
            key: LicenseKey::parse("K7WX9-M3NP4-H8TRC-DJ").ok(),
            email: Some("=a@b.cd".into()),
            client_id: None,
            standing: Standing {
                max_activations: None,
                activations_count: 2,
                expires_at_ms: Some(1_798_675_200_123),
                revoked_at_ms: None,
            },
            metadata: Some(json!({"a": [1.5, "\r\n\",", null], "b": {"c": true}})),
            created_at_ms: 0,
            updated_at_ms: 1,
        }
    }

    #[test]
    fn columns_are_known_in_either_style_and_no_others() {
        for name in COLUMNS {
            assert!(Header::read(&cells(&[name])).is_ok());
            assert!(Header::read(&cells(&[&format!(" {} ", camel_case(name))])).is_ok());
        }
        assert_eq!(camel_case("activations_count"), "activationsCount");
        let refused = |names: &[&str]| Header::read(&cells(names)).unwrap_err().violations().to_vec();
        let both = refused(&["email", "plan", "x\u{7}y", "key", "key"]);
        assert_eq!(both.iter().map(|fault| fault.field.as_str()).collect::<Vec<_>>(), ["plan", "xy", "key"]);
        assert_eq!(refused(&[&"ü".repeat(100)])[0].field.chars().count(), 64);
        // What is passed over may be there twice.
        assert!(Header::read(&cells(&["status", "id", "status"])).is_ok());
        assert!(Header::read(&cells(&["product_id"])).unwrap().names_products());
    }

    #[test]
    fn what_is_written_is_read_as_it_was() {
        let license = license();
        let mut text = Format::Csv.head();
        Format::Csv.write(&mut text, &license, 0);
        let mut reader = csv::Reader::default();
        let mut bytes = text.as_bytes();
        let header = Header::read(&reader.next(&mut bytes).unwrap().cells.unwrap()).unwrap();
        let line = header.line(&reader.next(&mut bytes).unwrap().cells.unwrap(), "prod_other").unwrap();
        assert_eq!((line.key, line.request.email), (license.key, license.email));
        assert_eq!((line.request.product_id.as_str(), line.request.max_activations), ("prod_1", None));
        assert_eq!(line.request.field_mask.unwrap().paths, ["max_activations"]);
        assert_eq!(line.request.expires_at, Some(values::timestamp(1_798_675_200_123)));
        assert_eq!(values::metadata("metadata", &line.request.metadata.unwrap()).ok(), license.metadata);
        assert_eq!((line.request.client_id, line.revoked_at), (None, None));
    }

    #[test]
    fn what_is_revoked_is_read_as_revoked() {
        let mut license = license();
        license.standing.revoked_at_ms = Some(1_798_675_200_007);
        let mut text = Format::Csv.head();
        Format::Csv.write(&mut text, &license, 0);
        let mut reader = csv::Reader::default();
        let mut bytes = text.as_bytes();
        let header = Header::read(&reader.next(&mut bytes).unwrap().cells.unwrap()).unwrap();
        let line = header.line(&reader.next(&mut bytes).unwrap().cells.unwrap(), "prod_other").unwrap();
        assert_eq!(line.revoked_at, Some(values::timestamp(1_798_675_200_007)));
        assert_eq!(line.request.expires_at, Some(values::timestamp(1_798_675_200_123)));
        let refused = Header::read(&cells(&["revokedAt"])).unwrap().line(&cells(&["yes"]), "prod_1").unwrap_err();
        assert_eq!(refused.violations()[0].field, "revoked_at");
    }

    #[test]
    fn all_that_is_wrong_with_a_line_is_named() {
        let header = Header::read(&cells(&["key", "max_activations", "expires_at", "metadata"])).unwrap();
        let fields = |line: &[&str]| {
            let error = header.line(&cells(line), "prod_1").unwrap_err();
            error.violations().iter().map(|fault| fault.field.clone()).collect::<Vec<_>>()
        };
        assert_eq!(fields(&["x", "1.5", "never", "[]"]), ["key", "max_activations", "expires_at", "metadata"]);
        assert_eq!(fields(&["", "99999999999", "2026-02-30T00:00:00Z", ""]), ["max_activations", "expires_at"]);
        let deep = format!("{{\"a\":{}1{}}}", "[".repeat(40), "]".repeat(40));
        let large = format!("{{\"a\":\"{}\"}}", "x".repeat(70_000));
        for metadata in [
            "{",
            "null",
            r#"{"a":"\u0000"}"#,
            r#"{"a":9007199254740993}"#,
            r#"{"a":[1,-9007199254740993]}"#,
            r#"{"a":18446744073709551616}"#,
            r#"{"a":-9223372036854775809}"#,
            r#"{"\\":"\"","b":100000000000000000000}"#,
            &deep,
            &large,
        ] {
            assert_eq!(fields(&["", "", "", metadata]), ["metadata"], "{metadata:.40}");
        }
        for metadata in [
            r#"{"a":9007199254740992,"b":[-9007199254740992,1e300,-1.5e+20,0.1000000000000000055511]}"#,
            r#"{"12345678901234567890":"\"12345678901234567890","b":"12345678901234567890\\","c":"é1"}"#,
        ] {
            assert!(header.line(&cells(&["", "", "", metadata]), "").is_ok(), "{metadata}");
        }
        assert_eq!(fields(&["", ""]), [""; 0]);
        assert!(header.line(&cells(&["", "", ""]), "").unwrap_err().message().contains("3 cells"));
    }

    #[test]
    fn times_are_those_of_the_api() {
        for read in [
            "2026-12-31T00:00:00Z",
            "2026-12-31t02:00:00.000+02:00",
            "2026-12-30T23:30:00.0000000001-00:30",
            "2026-12-31T00:00:00.000000000z",
        ] {
            assert_eq!(time(read).map(|time| time.seconds), Ok(1_798_675_200), "{read}");
        }
        assert_eq!(time("2016-12-31T23:59:60Z"), time("2016-12-31T23:59:59Z"));
        for wrong in [
            "",
            "2026-12-31",
            "2026-12-31T00:00Z",
            "2026-12-31 00:00:00Z",
            "2026-12-31T00:00:00",
            "2026-12-31T00:00:00.Z",
            "2026-12-31T00:00:00 Z",
            "2026-12-31T00:00:00+0200",
            "2026-12-31T00:00:00+02",
            "2026-12-31T00:00:00+24:00",
            "2026-12-31T24:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-02-29T00:00:00Z",
            "+12026-12-31T00:00:00Z",
            "1798675200",
            "2026-12-31T00:00:0\u{e9}Z",
        ] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_key_that_cannot_be_opened_is_written_as_none_that_is_read() {
        let license = License { key: None, ..license() };
        let mut text = Format::Csv.head();
        Format::Csv.write(&mut text, &license, 0);
        let mut reader = csv::Reader::default();
        let mut bytes = text.as_bytes();
        let header = Header::read(&reader.next(&mut bytes).unwrap().cells.unwrap()).unwrap();
        let refused = header.line(&reader.next(&mut bytes).unwrap().cells.unwrap(), "prod_1").unwrap_err();
        assert_eq!(refused.violations()[0].field, "key");
    }

    #[test]
    fn a_line_of_json_has_the_members_of_the_api_in_their_order() {
        let mut text = String::new();
        Format::Ndjson.write(&mut text, &license(), 0);
        assert!(text.starts_with(
            "{\"id\":\"lic_1\",\"productId\":\"prod_1\",\"key\":\"K7WX9-M3NP4-H8TRC-DJ\",\"status\":\"active\","
        ));
        assert!(text.ends_with(",\"updatedAt\":\"1970-01-01T00:00:00.001Z\",\"revokedAt\":null}\n"));
        assert_eq!(text.lines().count(), 1);
    }

    #[test]
    fn a_report_counts_what_it_says() {
        let (mut report, mut text) = (Report::default(), String::new());
        let key = LicenseKey::parse("K7WX9-M3NP4-H8TRC-DJ").ok();
        report.created(&mut text, 2, "lic_1", key.as_ref());
        report.exists(&mut text, 3, "lic_1", key.as_ref());
        report.failed(&mut text, 4, &Error::field("email", "must be an \"email\" address"));
        report.failed(&mut text, 5, &Error::malformed("This line is long"));
        report.end(&mut text);
        let expected = [
            "{\"line\":2,\"status\":\"created\",\"id\":\"lic_1\",\"key\":\"K7WX9-M3NP4-H8TRC-DJ\"}",
            "{\"line\":3,\"status\":\"exists\",\"id\":\"lic_1\",\"key\":\"K7WX9-M3NP4-H8TRC-DJ\"}",
            "{\"line\":4,\"status\":\"failed\",\"error\":{\"code\":\"validation_error\",\"field\":\"email\",\
             \"message\":\"must be an \\\"email\\\" address\"}}",
            "{\"line\":5,\"status\":\"failed\",\"error\":{\"code\":\"validation_error\",\"field\":null,\
             \"message\":\"This line is long\"}}",
            "{\"lines\":4,\"created\":1,\"existing\":1,\"failed\":2}",
        ];
        assert_eq!(text.lines().collect::<Vec<_>>(), expected);
    }
}
