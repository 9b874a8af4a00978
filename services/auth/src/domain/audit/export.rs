//! Entries as text: CSV (RFC 4180), or a JSON object a line with the members that the API has.

use paperkey_kit::values::rfc3339;
use paperkey_proto::{Error, auth::v1::AuditCall};
use serde::Serialize;

use super::entry::Entry;

/// What is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Csv,
    Ndjson,
}

const COLUMNS: [&str; 15] = [
    "id",
    "time",
    "actorKind",
    "actorId",
    "actorName",
    "method",
    "path",
    "rpc",
    "resources",
    "status",
    "code",
    "durationMs",
    "ip",
    "userAgent",
    "requestId",
];

impl Format {
    /// A format by its word.
    pub(crate) fn read(word: &str) -> Result<Self, Error> {
        match word {
            "csv" => Ok(Self::Csv),
            "ndjson" => Ok(Self::Ndjson),
            _ => Err(Error::field("format", "must be one of csv, ndjson")),
        }
    }

    /// The type of the body.
    pub(crate) fn content_type(self) -> &'static str {
        match self {
            Self::Csv => "text/csv; charset=utf-8",
            Self::Ndjson => "application/x-ndjson",
        }
    }

    /// What stands before the first entry.
    pub(crate) fn head(self) -> String {
        match self {
            Self::Csv => format!("{}\r\n", COLUMNS.join(",")),
            Self::Ndjson => String::new(),
        }
    }

    /// Writes one more entry.
    pub(crate) fn write(self, out: &mut String, entry: &Entry) {
        match self {
            Self::Csv => row(out, entry),
            Self::Ndjson => {
                // Texts and numbers can all be written.
                out.push_str(&serde_json::to_string(&object(entry)).unwrap_or_default());
                out.push('\n');
            }
        }
    }
}

/// How long a call took.
pub(crate) fn duration_ms(call: &AuditCall) -> i64 {
    call.duration_us.saturating_add(500) / 1_000
}

fn row(out: &mut String, entry: &Entry) {
    let call = entry.call.as_ref();
    let text = |get: fn(&AuditCall) -> &String| call.map(get).cloned().unwrap_or_default();
    let cells = [
        entry.id.clone(),
        rfc3339(entry.at_ms),
        entry.actor_kind.clone(),
        entry.actor_id.clone(),
        entry.actor_name.clone(),
        text(|call| &call.method),
        text(|call| &call.path),
        entry.rpc.clone(),
        entry.resources.join(" "),
        call.map(|call| call.status.to_string()).unwrap_or_default(),
        text(|call| &call.code),
        call.map(|call| duration_ms(call).to_string()).unwrap_or_default(),
        text(|call| &call.ip),
        text(|call| &call.user_agent),
        entry.request_id.clone(),
    ];
    for (index, cell) in cells.iter().enumerate() {
        if index > 0 {
            out.push(',');
        }
        write_cell(out, cell);
    }
    out.push_str("\r\n");
}

/// A cell. One that a spreadsheet would take for a formula gets an apostrophe before it.
fn write_cell(out: &mut String, cell: &str) {
    let formula = cell.starts_with(['=', '+', '-', '@', '\t', '\r']);
    let quoted = cell.contains([',', '"', '\r', '\n']);
    if quoted {
        out.push('"');
    }
    if formula {
        out.push('\'');
    }
    for character in cell.chars() {
        if character == '"' {
            out.push('"');
        }
        out.push(character);
    }
    if quoted {
        out.push('"');
    }
}

/// An entry as the API shows it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Object<'a> {
    id: &'a str,
    time: String,
    actor: Actor<'a>,
    method: Option<&'a str>,
    path: Option<&'a str>,
    rpc: Option<&'a str>,
    resources: &'a [String],
    status: Option<i32>,
    code: Option<&'a str>,
    duration_ms: Option<i64>,
    ip: Option<&'a str>,
    user_agent: Option<&'a str>,
    request_id: Option<&'a str>,
}

#[derive(Serialize)]
struct Actor<'a> {
    kind: &'a str,
    id: Option<&'a str>,
    name: Option<&'a str>,
}

fn object(entry: &Entry) -> Object<'_> {
    let call = entry.call.as_ref();
    Object {
        id: &entry.id,
        time: rfc3339(entry.at_ms),
        actor: Actor { kind: &entry.actor_kind, id: some(&entry.actor_id), name: some(&entry.actor_name) },
        method: call.and_then(|call| some(&call.method)),
        path: call.and_then(|call| some(&call.path)),
        rpc: some(&entry.rpc),
        resources: &entry.resources,
        status: call.map(|call| call.status),
        code: call.and_then(|call| some(&call.code)),
        duration_ms: call.map(duration_ms),
        ip: call.and_then(|call| some(&call.ip)),
        user_agent: call.and_then(|call| some(&call.user_agent)),
        request_id: some(&entry.request_id),
    }
}

/// What is empty is absent.
pub(crate) fn some(text: &str) -> Option<&str> {
    (!text.is_empty()).then_some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_is_quoted_where_it_must_be_and_is_no_formula() {
        let written = |cell| {
            let mut out = String::new();
            write_cell(&mut out, cell);
            out
        };
        assert_eq!(written("curl/8"), "curl/8");
        assert_eq!(written("a,b"), "\"a,b\"");
        assert_eq!(written("say \"hi\""), "\"say \"\"hi\"\"\"");
        assert_eq!(written("=HYPERLINK(\"x\",1)"), "\"'=HYPERLINK(\"\"x\"\",1)\"");
        for formula in ["+1", "-1", "@sum", "\tx"] {
            assert_eq!(written(formula), format!("'{formula}"));
        }
        assert_eq!(written("\rx"), "\"'\rx\"");
    }
}
