//! A page, before it is decided whether people or programs read it: written once, and shown as HTML and as Markdown.

use std::fmt::Write as _;

/// A page.
#[derive(Debug)]
pub(super) struct Document {
    /// Plain text.
    pub(super) title: String,
    pub(super) blocks: Vec<Block>,
}

/// What stands on a page, one below the other.
#[derive(Debug)]
pub(super) enum Block {
    /// The way up, in small print.
    Trail(Vec<Span>),
    Title(Vec<Span>),
    Heading(&'static str),
    Text(Vec<Span>),
    /// Names, each with what it is.
    Facts(Vec<(&'static str, Vec<Span>)>),
    /// Names of columns, and rows.
    Table(Vec<&'static str>, Vec<Vec<Vec<Span>>>),
    Code(String),
}

/// A piece of a line.
#[derive(Clone, Debug)]
pub(super) enum Span {
    Text(String),
    Code(String),
    /// What it says, and the page that it leads to: a path of ours, which for programs ends in `.md`, or a URL.
    Link(Box<Span>, String),
}

impl Span {
    pub(super) fn text(text: impl Into<String>) -> Vec<Self> {
        vec![Self::Text(text.into())]
    }

    pub(super) fn code(code: impl Into<String>) -> Vec<Self> {
        vec![Self::Code(code.into())]
    }

    fn html(&self, out: &mut String) {
        // Writing to a String cannot fail.
        let _ = match self {
            Self::Text(text) => write!(out, "{}", escaped(text)),
            Self::Code(code) => write!(out, "<code>{}</code>", escaped(code)),
            Self::Link(label, page) => {
                let _ = write!(out, "<a href=\"{}\">", escaped(page));
                label.html(out);
                write!(out, "</a>")
            }
        };
    }

    fn markdown(&self, base: Option<&str>, out: &mut String) {
        match (self, base) {
            (Self::Text(text), _) => out.push_str(&quiet(text)),
            (Self::Code(code), _) => {
                let _ = write!(out, "`{code}`");
            }
            (Self::Link(label, _), None) => label.markdown(None, out),
            (Self::Link(label, page), Some(base)) => {
                out.push('[');
                label.markdown(None, out);
                let _ = if page.starts_with('/') {
                    write!(out, "]({base}{})", twin(page))
                } else {
                    write!(out, "]({page})")
                };
            }
        }
    }
}

/// The beginning of what is as wide as it must be. What scrolls must be reached without a mouse too.
pub(super) fn wide(about: &str) -> String {
    format!("<div class=\"wide\" tabindex=\"0\" role=\"region\" aria-label=\"{}\">", escaped(about))
}

/// The path of the same page in Markdown.
pub(super) fn twin(page: &str) -> String {
    format!("{}.md", page.trim_end_matches('/'))
}

impl Document {
    /// What stands between the head and the foot of an HTML page.
    pub(super) fn html(&self) -> String {
        let mut out = String::new();
        // What a table is about.
        let mut about = self.title.as_str();
        for block in &self.blocks {
            if let Block::Heading(text) = block {
                about = text;
            }
            let _ = match block {
                Block::Trail(spans) => writeln!(out, "<p class=\"soft\">{}</p>", html(spans)),
                Block::Title(spans) => writeln!(out, "<h1>{}</h1>", html(spans)),
                Block::Heading(text) => writeln!(out, "<h2>{}</h2>", escaped(text)),
                Block::Text(spans) => writeln!(out, "<p>{}</p>", html(spans)),
                // What scrolls must be reached without a mouse too.
                Block::Code(code) => writeln!(out, "<pre tabindex=\"0\"><code>{}</code></pre>", escaped(code)),
                Block::Facts(facts) => {
                    out.push_str("<dl>");
                    for (name, spans) in facts {
                        let _ = writeln!(out, "<dt>{}</dt><dd>{}</dd>", escaped(name), html(spans));
                    }
                    writeln!(out, "</dl>")
                }
                Block::Table(names, rows) => {
                    let _ = write!(out, "{}<table><thead><tr>", wide(about));
                    for name in names {
                        let _ = write!(out, "<th scope=\"col\">{}</th>", escaped(name));
                    }
                    out.push_str("</tr></thead>\n<tbody>\n");
                    for row in rows {
                        out.push_str("<tr>");
                        for cell in row {
                            let _ = write!(out, "<td>{}</td>", html(cell));
                        }
                        out.push_str("</tr>\n");
                    }
                    writeln!(out, "</tbody></table></div>")
                }
            };
        }
        out
    }

    /// The page as Markdown. Links lead to the Markdown of other pages below `base`; without one there are none.
    pub(super) fn markdown(&self, base: Option<&str>) -> String {
        let line = |spans: &[Span]| {
            let mut out = String::new();
            for span in spans {
                span.markdown(base, &mut out);
            }
            out
        };
        let mut out = String::new();
        for block in &self.blocks {
            let _ = match block {
                Block::Trail(_) => continue,
                Block::Title(spans) => writeln!(out, "# {}\n", line(spans)),
                Block::Heading(text) => writeln!(out, "## {text}\n"),
                Block::Text(spans) => writeln!(out, "{}\n", line(spans)),
                Block::Code(code) => writeln!(out, "```\n{code}\n```\n"),
                Block::Facts(facts) => {
                    for (name, spans) in facts {
                        let _ = writeln!(out, "- {name}: {}", line(spans));
                    }
                    writeln!(out)
                }
                Block::Table(names, rows) => {
                    let _ = writeln!(out, "| {} |\n|{}", names.join(" | "), "---|".repeat(names.len()));
                    for row in rows {
                        let cells: Vec<String> = row.iter().map(|cell| line(cell).replace('|', "\\|")).collect();
                        let _ = writeln!(out, "| {} |", cells.join(" | "));
                    }
                    writeln!(out)
                }
            };
        }
        out.truncate(out.trim_end().len());
        out.push('\n');
        out
    }
}

fn html(spans: &[Span]) -> String {
    let mut out = String::new();
    for span in spans {
        span.html(&mut out);
    }
    out
}

/// Text that is nothing but text in HTML.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            character => out.push(character),
        }
    }
    out
}

/// Text in which Markdown sees nothing to set.
fn quiet(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for character in text.chars() {
        if matches!(character, '\\' | '`' | '*' | '[' | ']' | '<') {
            out.push('\\');
        }
        out.push(character);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> Document {
        Document {
            title: "A & B".into(),
            blocks: vec![
                Block::Trail(Span::text("up")),
                Block::Title(Span::text("<b>")),
                Block::Text(vec![
                    Span::Text("Say \"x\" to ".into()),
                    Span::Link(Box::new(Span::Code("y".into())), "/docs/y/".into()),
                ]),
                Block::Facts(vec![("Name", Span::code("a|b"))]),
                Block::Table(vec!["One", "Two"], vec![vec![Span::code("a|b"), Span::text("*c*")]]),
                Block::Code("<script>".into()),
            ],
        }
    }

    #[test]
    fn nothing_of_a_text_is_taken_for_html() {
        let html = page().html();
        assert!(html.contains("<h1>&lt;b&gt;</h1>") && html.contains("&lt;script&gt;") && !html.contains("<script"));
        assert!(html.contains("<p>Say &quot;x&quot; to <a href=\"/docs/y/\"><code>y</code></a></p>"), "{html}");
        assert!(html.contains("aria-label=\"A &amp; B\""));
    }

    #[test]
    fn the_same_page_is_markdown() {
        assert_eq!(
            page().markdown(Some("https://keys.example")),
            "# \\<b>\n\nSay \"x\" to [`y`](https://keys.example/docs/y.md)\n\n- Name: `a|b`\n\n| One | Two |\n|---|---|\n\
             | `a\\|b` | \\*c\\* |\n\n```\n<script>\n```\n"
        );
        assert!(page().markdown(None).contains("to `y`\n"));
    }
}
