//! How a method is called from a shell and from a program: the samples of the reference, which run as they stand once the
//! credential is in the environment.

use std::fmt::Write as _;

use http::Method as Verb;

use crate::json::{Json, pretty};

/// A call.
#[derive(Debug)]
pub(super) struct Call<'a> {
    pub(super) verb: &'a Verb,
    pub(super) url: String,
    /// The credential that it is made with; none where it needs none.
    pub(super) credential: Option<Credential>,
    pub(super) body: Sent,
    pub(super) answered: Answered,
}

/// A credential, by where it is kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct Credential {
    /// The variable of the environment.
    pub(super) variable: &'static str,
}

/// What is sent.
#[derive(Debug)]
pub(super) enum Sent {
    Nothing,
    Json(Json),
    /// A file of this type.
    File(&'static str),
}

/// What comes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answered {
    Nothing,
    Json,
    /// A body that is best read as it comes.
    Stream,
}

/// The file of the samples that send one.
const FILE: &str = "licenses.csv";

const JSON: &str = "application/json";

impl Call<'_> {
    /// The samples, as `x-codeSamples`.
    pub(super) fn samples(&self) -> Json {
        let sample = |lang: &str, label: &str, source: String| {
            Json::object([("lang", lang.into()), ("label", label.into()), ("source", source.into())])
        };
        Json::List(vec![
            sample("Shell", "curl", self.curl()),
            sample("JavaScript", "JavaScript", self.javascript()),
            sample("Python", "Python", self.python()),
            sample("Go", "Go", self.go()),
        ])
    }

    fn kind(&self) -> Option<&'static str> {
        match self.body {
            Sent::Nothing => None,
            Sent::Json(_) => Some(JSON),
            Sent::File(kind) => Some(kind),
        }
    }

    fn curl(&self) -> String {
        let mut lines = vec![match *self.verb {
            Verb::GET => format!("curl {}", quoted_for_shell(&self.url)),
            _ => format!("curl -X {} {}", self.verb, quoted_for_shell(&self.url)),
        }];
        if self.answered == Answered::Stream {
            lines.push("--no-buffer".to_owned());
        }
        if let Some(Credential { variable }) = self.credential {
            lines.push(format!("-H \"Authorization: Bearer ${variable}\""));
        }
        if let Some(kind) = self.kind() {
            lines.push(format!("-H 'Content-Type: {kind}'"));
        }
        match &self.body {
            Sent::Nothing => {}
            Sent::Json(json) => lines.push(format!("-d {}", quoted_for_shell(&pretty(&json.written())))),
            Sent::File(_) => lines.push(format!("--data-binary @{FILE}")),
        }
        lines.join(" \\\n  ")
    }

    fn javascript(&self) -> String {
        let mut source = String::new();
        if matches!(self.body, Sent::File(_)) {
            source.push_str("import { readFile } from 'node:fs/promises'\n\n");
        }
        let mut options = Vec::new();
        if *self.verb != Verb::GET {
            options.push(format!("method: '{}'", self.verb));
        }
        let mut headers = Vec::new();
        if let Some(Credential { variable }) = self.credential {
            headers.push(format!("Authorization: `Bearer ${{process.env.{variable}}}`"));
        }
        if let Some(kind) = self.kind() {
            headers.push(format!("'Content-Type': '{kind}'"));
        }
        if !headers.is_empty() {
            options.push(format!("headers: {{\n    {},\n  }}", headers.join(",\n    ")));
        }
        match &self.body {
            Sent::Nothing => {}
            Sent::Json(json) => {
                options.push(format!("body: JSON.stringify({})", indented(&pretty(&json.written()), "  ")));
            }
            Sent::File(_) => options.push(format!("body: await readFile('{FILE}')")),
        }
        let url = Json::from(self.url.as_str()).written();
        // Writing to a String cannot fail.
        let _ = if options.is_empty() {
            writeln!(source, "const response = await fetch({url})")
        } else {
            writeln!(source, "const response = await fetch({url}, {{\n  {},\n}})", options.join(",\n  "))
        };
        source.push_str("if (!response.ok) throw new Error(await response.text())\n");
        source.push_str(match self.answered {
            Answered::Nothing => "console.log(response.status)",
            Answered::Json => "console.log(await response.json())",
            Answered::Stream => "for await (const piece of response.body) process.stdout.write(piece)",
        });
        source
    }

    fn python(&self) -> String {
        let mut source = String::new();
        if self.credential.is_some() {
            source.push_str("import os\n\n");
        }
        source.push_str("import requests\n\n");
        let mut arguments = vec![Json::from(self.url.as_str()).written()];
        let mut headers = Vec::new();
        if let Some(Credential { variable }) = self.credential {
            headers.push(format!("\"Authorization\": f\"Bearer {{os.environ['{variable}']}}\""));
        }
        if let Sent::File(kind) = self.body {
            headers.push(format!("\"Content-Type\": \"{kind}\""));
        }
        if !headers.is_empty() {
            arguments.push(format!("headers={{{}}}", headers.join(", ")));
        }
        match &self.body {
            Sent::Nothing => {}
            Sent::Json(json) => arguments.push(format!("json={}", python_literal(json, 1))),
            Sent::File(_) => arguments.push(format!("data=open(\"{FILE}\", \"rb\")")),
        }
        if self.answered == Answered::Stream {
            arguments.push("stream=True".to_owned());
        }
        let verb = self.verb.as_str().to_ascii_lowercase();
        // Writing to a String cannot fail.
        let _ = writeln!(source, "response = requests.{verb}(\n    {},\n)", arguments.join(",\n    "));
        source.push_str("response.raise_for_status()\n");
        source.push_str(match self.answered {
            Answered::Nothing => "print(response.status_code)",
            Answered::Json => "print(response.json())",
            Answered::Stream => "for line in response.iter_lines(decode_unicode=True):\n    print(line)",
        });
        source
    }

    fn go(&self) -> String {
        let mut imports = vec!["io", "log", "net/http", "os"];
        let url = Json::from(self.url.as_str()).written();
        let mut body = String::new();
        let sent = match &self.body {
            Sent::Nothing => "nil",
            Sent::Json(json) => {
                imports.push("strings");
                let json = pretty(&json.written());
                // A raw string holds everything but what ends it.
                let literal = if json.contains('`') { Json::from(json).written() } else { format!("`{json}`") };
                body = format!("\tbody := strings.NewReader({literal})\n");
                "body"
            }
            Sent::File(_) => {
                body = format!("\tbody, err := os.Open(\"{FILE}\")\n\tif err != nil {{\n\t\tlog.Fatal(err)\n\t}}\n");
                "body"
            }
        };
        imports.sort_unstable();
        let imports = format!("\t\"{}\"\n", imports.join("\"\n\t\""));
        let mut headers = String::new();
        if let Some(Credential { variable }) = self.credential {
            let _ = writeln!(headers, "\trequest.Header.Set(\"Authorization\", \"Bearer \"+os.Getenv(\"{variable}\"))");
        }
        if let Some(kind) = self.kind() {
            let _ = writeln!(headers, "\trequest.Header.Set(\"Content-Type\", \"{kind}\")");
        }
        let failed = "\tif err != nil {\n\t\tlog.Fatal(err)\n\t}\n";
        format!(
            "package main\n\nimport (\n{imports})\n\nfunc main() {{\n{body}\
             \trequest, err := http.NewRequest(\"{verb}\", {url}, {sent})\n{failed}{headers}\
             \tresponse, err := http.DefaultClient.Do(request)\n{failed}\tdefer response.Body.Close()\n\
             \tlog.Println(response.Status)\n\tif _, err := io.Copy(os.Stdout, response.Body); err != nil {{\n\
             \t\tlog.Fatal(err)\n\t}}\n}}",
            verb = self.verb,
        )
    }
}

fn quoted_for_shell(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

/// A text whose lines after the first stand further to the right.
fn indented(text: &str, by: &str) -> String {
    text.replace('\n', &format!("\n{by}"))
}

/// JSON as Python writes it.
fn python_literal(json: &Json, depth: usize) -> String {
    let inner = "    ".repeat(depth + 1);
    let outer = "    ".repeat(depth);
    match json {
        Json::Null => "None".to_owned(),
        Json::Flag(true) => "True".to_owned(),
        Json::Flag(false) => "False".to_owned(),
        Json::List(items) if !items.is_empty() => {
            let items: Vec<String> = items.iter().map(|item| python_literal(item, depth)).collect();
            format!("[{}]", items.join(", "))
        }
        Json::Object(members) if !members.is_empty() => {
            let members: Vec<String> = members
                .iter()
                .map(|(name, value)| {
                    format!("{inner}{}: {},\n", Json::from(name.as_str()).written(), python_literal(value, depth + 1))
                })
                .collect();
            format!("{{\n{}{outer}}}", members.concat())
        }
        // Texts, numbers and what is empty are written alike.
        other => other.written(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(verb: &Verb) -> Call<'_> {
        Call {
            verb,
            url: "https://keys.example/v1/it's".to_owned(),
            credential: Some(Credential { variable: "KEY" }),
            body: Sent::Json(Json::object([("on", true.into()), ("off", Json::Null), ("names", Json::texts(["a"]))])),
            answered: Answered::Json,
        }
    }

    #[test]
    fn each_language_is_spoken_in_its_own_words() {
        let call = call(&Verb::POST);
        assert_eq!(
            call.curl(),
            "curl -X POST 'https://keys.example/v1/it'\\''s' \\\n  -H \"Authorization: Bearer $KEY\" \\\n  \
             -H 'Content-Type: application/json' \\\n  -d '{\n  \"on\": true,\n  \"off\": null,\n  \"names\": [\n    \
             \"a\"\n  ]\n}'"
        );
        assert!(
            call.python()
                .contains("json={\n        \"on\": True,\n        \"off\": None,\n        \"names\": [\"a\"],\n    },")
        );
        assert!(call.javascript().contains("Authorization: `Bearer ${process.env.KEY}`"));
        assert!(call.go().contains("http.NewRequest(\"POST\", \"https://keys.example/v1/it's\", body)"));
    }

    #[test]
    fn what_is_not_there_is_not_sent() {
        let bare = Call { credential: None, body: Sent::Nothing, answered: Answered::Nothing, ..call(&Verb::GET) };
        assert_eq!(bare.curl(), "curl 'https://keys.example/v1/it'\\''s'");
        for source in [bare.javascript(), bare.python(), bare.go()] {
            assert!(!source.contains("Authorization") && !source.contains("Content-Type"), "{source}");
        }
    }
}
