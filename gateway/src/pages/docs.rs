//! The guides: Markdown of the repository's `docs/`, as it is for programs, and as HTML for people.
//!
//! The sources name the installation by [`LOCAL`], where one that was just started is, and are read on without us too;
//! here they name this installation. Deliberately absent: HTML in Markdown but for `<br>`, all else
//! is shown as text.

use std::{
    collections::{HashMap, HashSet},
    fmt::Write as _,
};

use pulldown_cmark::{CodeBlockKind, CowStr, Event, HeadingLevel, Options, Parser, Tag, TagEnd, html::push_html};

use super::{
    HTML, MARKDOWN, Made, REFERENCE, REFERENCE_PAGE,
    document::{Block, Document, Span, escaped, wide},
    errors,
    layout::{Around, document},
    pricing, twin,
};

/// Where the guides are.
pub(super) const INDEX: &str = "/docs/";

/// What the sources call the installation.
pub(super) const LOCAL: &str = "http://127.0.0.1:8080";

/// What this is, in a sentence.
pub(super) const SUMMARY: &str = "Paperkey issues licence keys and API keys, checks them, counts their use, and tells \
     your servers by webhook: one self-hosted program with one contract over REST, gRPC and gRPC-Web.";

/// A guide, as it is written.
#[derive(Debug)]
pub(super) struct Guide {
    /// Its file and its path, without what stands around.
    pub(super) name: &'static str,
    /// What the side list calls it.
    pub(super) label: &'static str,
    source: &'static str,
}

macro_rules! guide {
    ($name:literal, $label:literal) => {
        Guide { name: $name, label: $label, source: include_str!(concat!("../../../docs/", $name, ".md")) }
    };
}

/// All guides, by what they are for, in the order in which they are read.
const GUIDES: [(&str, &[Guide]); 4] = [
    (
        "Start",
        &[
            guide!("quickstart", "Quickstart"),
            guide!("authentication", "Authentication"),
            guide!("modes", "Live and test"),
            guide!("limits", "Limits and quotas"),
        ],
    ),
    ("Sell", &[guide!("licenses", "Licences"), guide!("webhooks", "Webhooks")]),
    (
        "Guard",
        &[
            guide!("protect", "Protect your API"),
            guide!("audit", "Audit log and alerts"),
            guide!("permissions", "Who may call what"),
        ],
    ),
    ("Run", &[guide!("self-hosting", "Self-hosting"), guide!("fleet", "Fleet"), guide!("grpc", "gRPC")]),
];

/// The one element that Markdown has no sign for within a table.
const BREAK: &str = "<br>";

/// Files that the guides speak of, as they are.
const EXAMPLES: [(&str, &str); 3] = [
    ("nginx.conf", include_str!("../../../deploy/examples/nginx.conf")),
    ("Caddyfile", include_str!("../../../deploy/examples/Caddyfile")),
    ("envoy.yaml", include_str!("../../../deploy/examples/envoy.yaml")),
];

/// Where the examples are, for guides in the repository and for those that are served.
const EXAMPLES_WRITTEN: &str = "../deploy/examples/";
const EXAMPLES_SERVED: &str = "/docs/examples/";

impl Guide {
    /// Where it is.
    pub(super) fn path(&self) -> String {
        format!("{INDEX}{}", self.name)
    }

    /// Its title.
    pub(super) fn title(&self) -> &'static str {
        self.source.lines().find_map(|line| line.strip_prefix("# ")).unwrap_or(self.label)
    }

    /// What it is for: its first sentence.
    pub(super) fn summary(&self) -> String {
        let paragraphs = self.source.split("\n\n").map(|paragraph| paragraph.replace('\n', " "));
        let first =
            paragraphs.filter(|paragraph| !paragraph.starts_with('#')).find(|paragraph| !paragraph.trim().is_empty());
        let first = first.unwrap_or_default();
        first.find(". ").map_or_else(|| first.trim(), |end| &first[..=end]).to_owned()
    }

    /// For programs: the source, about this installation.
    fn markdown(&self, public_url: &str) -> String {
        about(self.source, public_url).replace(&format!("]({EXAMPLES_WRITTEN}"), "](examples/")
    }
}

fn about(source: &str, public_url: &str) -> String {
    source.replace(LOCAL, public_url)
}

/// All guides, one after the other.
pub(super) fn guides() -> impl DoubleEndedIterator<Item = &'static Guide> {
    GUIDES.iter().flat_map(|(_, guides)| guides.iter())
}

/// The pages of all guides, by path.
pub(super) fn pages(public_url: &str) -> HashMap<String, Made> {
    let mut made = HashMap::new();
    for (name, text) in EXAMPLES {
        let text = Made::steady("text/plain; charset=utf-8", text.to_owned());
        made.insert(format!("{EXAMPLES_SERVED}{name}"), text);
    }
    let index = index(public_url);
    for path in [twin(INDEX), format!("{INDEX}index.md")] {
        made.insert(path, Made::steady(MARKDOWN, index.clone()));
    }
    let rendered = Rendered::of(&index.replace(&format!("({public_url}"), &format!("({LOCAL}")), public_url);
    let around = Around { here: INDEX, twin: Some(twin(INDEX)), side: true, toc: "" };
    made.insert(INDEX.to_owned(), Made::steady(HTML, document("Docs", &rendered.html, &around)));
    let all: Vec<&Guide> = guides().collect();
    for (place, guide) in all.iter().enumerate() {
        let path = guide.path();
        made.insert(twin(&path), Made::steady(MARKDOWN, guide.markdown(public_url)));
        let mut rendered = Rendered::of(guide.source, public_url);
        let previous = place.checked_sub(1).and_then(|before| all.get(before));
        rendered.html.push_str(&turn(previous.copied(), all.get(place + 1).copied()));
        let toc = rendered.toc();
        let around = Around { here: &path, twin: Some(twin(&path)), side: true, toc: &toc };
        let page = document(guide.title(), &rendered.html, &around);
        made.insert(path, Made::steady(HTML, page));
    }
    made
}

/// The list of all pages, in Markdown with links that hold wherever it is read.
fn index(public_url: &str) -> String {
    let mut text = format!(
        "# Docs\n\n{SUMMARY}\n\nNew here? Begin with the [quickstart]({public_url}/docs/quickstart.md): \
         from nothing to a licence that validates, and a signed webhook, within the hour.\n"
    );
    let _ = write!(text, "{}\n## Look up\n\n{}", listed(public_url), look_up(public_url));
    text
}

/// All guides by what they are for, in Markdown, each with what it tells.
pub(super) fn listed(public_url: &str) -> String {
    let mut out = String::new();
    for (group, guides) in &GUIDES {
        let _ = writeln!(out, "\n## {group}\n");
        for guide in *guides {
            let _ = writeln!(out, "- [{}]({public_url}{}): {}", guide.title(), twin(&guide.path()), guide.summary());
        }
    }
    out
}

/// Where there is no page.
pub(super) fn missing() -> Document {
    Document {
        title: "No such page".into(),
        blocks: vec![
            Block::Title(Span::text("There is no such page")),
            Block::Text(vec![
                Span::Text("All pages are in the ".into()),
                Span::Link(Box::new(Span::Text("list of the docs".into())), INDEX.to_owned()),
                Span::Text(".".into()),
            ]),
        ],
    }
}

/// Links to what is looked up rather than read.
pub(super) fn look_up(public_url: &str) -> String {
    format!(
        "- [API reference]({public_url}{}): Every path, with its bodies and errors, to read and to try out.\n\
         - [OpenAPI 3.1]({public_url}{}): The same for programs.\n\
         - [Errors]({public_url}{}): Every error, its codes, and what to do; each code has a page of its own.\n\
         - [{}]({public_url}{}): Every tier, limit and quota of this installation.\n",
        REFERENCE_PAGE,
        REFERENCE,
        twin(errors::LIST),
        pricing::NAME,
        twin(pricing::PATH),
    )
}

/// The way to the pages before and after.
fn turn(previous: Option<&Guide>, next: Option<&Guide>) -> String {
    let mut out = "<nav class=\"turn\" aria-label=\"Previous and next\">".to_owned();
    let mut link = |guide: Option<&Guide>, before: &str, after: &str, rel: &str| match guide {
        Some(guide) => {
            let _ =
                write!(out, "<a rel=\"{rel}\" href=\"{}\">{before}{}{after}</a>", guide.path(), escaped(guide.label));
        }
        None => out.push_str("<span></span>"),
    };
    link(previous, "← ", "", "prev");
    link(next, "", " →", "next");
    out + "</nav>\n"
}

/// The list of all pages at the side of each.
pub(super) fn side(here: &str) -> String {
    let mut out = "<nav class=\"side\" aria-label=\"Pages\">\n".to_owned();
    let mut list = |group: &str, entries: &mut dyn Iterator<Item = (String, &str)>| {
        let _ = write!(out, "<p>{group}</p><ul>");
        for (path, label) in entries {
            let current = if path == here { " aria-current=\"page\"" } else { "" };
            let _ = write!(out, "<li><a href=\"{path}\"{current}>{}</a></li>", escaped(label));
        }
        out.push_str("</ul>\n");
    };
    for (group, guides) in &GUIDES {
        list(group, &mut guides.iter().map(|guide| (guide.path(), guide.label)));
    }
    let look_up = [(errors::LIST, "Errors"), (REFERENCE_PAGE, "API reference"), (pricing::PATH, pricing::NAME)];
    list("Look up", &mut look_up.into_iter().map(|(path, label)| (path.to_owned(), label)));
    out + "</nav>\n"
}

/// A source as HTML.
#[derive(Debug, Default)]
struct Rendered {
    html: String,
    /// Headings of the second level: anchors and texts.
    sections: Vec<(String, String)>,
}

impl Rendered {
    fn of(source: &str, public_url: &str) -> Self {
        let mut rendered = Self::default();
        let mut anchors = Anchors::default();
        let mut events = Vec::new();
        let mut title = String::new();
        let mut parser = Parser::new_ext(source, Options::ENABLE_TABLES);
        while let Some(event) = parser.next() {
            match event {
                Event::Start(Tag::Heading { level, .. }) => {
                    let within: Vec<Event<'_>> =
                        parser.by_ref().take_while(|event| !matches!(event, Event::End(TagEnd::Heading(_)))).collect();
                    let text = text_of(&within);
                    if level == HeadingLevel::H1 {
                        title.clone_from(&text);
                        events.push(markup("<h1>"));
                        events.extend(within);
                        events.push(markup("</h1>\n"));
                        continue;
                    }
                    let anchor = anchors.of(&text);
                    events.push(markup(&format!("<{level} id=\"{anchor}\"><a href=\"#{anchor}\">")));
                    events.extend(within);
                    events.push(markup(&format!("</a></{level}>\n")));
                    if level == HeadingLevel::H2 {
                        rendered.sections.push((anchor, text));
                    }
                }
                Event::Start(Tag::CodeBlock(kind)) => {
                    let within: Vec<Event<'_>> =
                        parser.by_ref().take_while(|event| !matches!(event, Event::End(TagEnd::CodeBlock))).collect();
                    events.push(markup(&code(&kind, &about(&text_of(&within), public_url))));
                }
                Event::Start(Tag::Table(columns)) => {
                    let label = rendered.sections.last().map_or(&title, |(_, text)| text);
                    events.extend([markup(&wide(label)), Event::Start(Tag::Table(columns))]);
                }
                Event::End(TagEnd::Table) => events.extend([Event::End(TagEnd::Table), markup("</div>\n")]),
                Event::Start(Tag::Link { link_type, dest_url, title, id }) => {
                    let dest_url = CowStr::from(target(&dest_url));
                    events.push(Event::Start(Tag::Link { link_type, dest_url, title, id }));
                }
                Event::Code(text) => events.push(Event::Code(about(&text, public_url).into())),
                Event::Text(text) => events.push(Event::Text(about(&text, public_url).into())),
                Event::InlineHtml(text) if text.as_ref() == BREAK => events.push(Event::HardBreak),
                Event::Html(text) | Event::InlineHtml(text) => events.push(Event::Text(text)),
                event => events.push(event),
            }
        }
        push_html(&mut rendered.html, events.into_iter());
        rendered
    }

    /// The sections of the page, at its other side.
    fn toc(&self) -> String {
        if self.sections.len() < 3 {
            return String::new();
        }
        let mut out = "<nav class=\"toc\" aria-label=\"On this page\">\n<p>On this page</p><ul>".to_owned();
        for (anchor, text) in &self.sections {
            let _ = write!(out, "<li><a href=\"#{anchor}\">{}</a></li>", escaped(text));
        }
        out + "</ul>\n</nav>\n"
    }
}

fn markup(html: &str) -> Event<'static> {
    Event::Html(html.to_owned().into())
}

fn text_of(events: &[Event<'_>]) -> String {
    let texts = events.iter().filter_map(|event| match event {
        Event::Text(text) | Event::Code(text) => Some(text.as_ref()),
        _ => None,
    });
    texts.collect()
}

/// A block of code; what is remarked in it steps back.
fn code(kind: &CodeBlockKind<'_>, text: &str) -> String {
    let language = match kind {
        CodeBlockKind::Fenced(info) => info.split_whitespace().next().unwrap_or_default(),
        CodeBlockKind::Indented => "",
    };
    let remark = match language {
        "sh" | "toml" | "python" | "ruby" | "nginx" | "caddyfile" => "#",
        "js" | "php" | "rust" => "//",
        _ => "",
    };
    let mut out = "<pre tabindex=\"0\"><code>".to_owned();
    for line in text.lines() {
        let _ = if !remark.is_empty() && line.trim_start().starts_with(remark) && !line.starts_with("#!") {
            writeln!(out, "<span class=\"note\">{}</span>", escaped(line))
        } else {
            writeln!(out, "{}", escaped(line))
        };
    }
    out.truncate(out.trim_end_matches('\n').len());
    out + "</code></pre>\n"
}

/// Where a link of a source leads here.
fn target(written: &str) -> String {
    if let Some(path) = written.strip_prefix(LOCAL) {
        return html_path(if path.is_empty() { "/" } else { path });
    }
    if let Some(example) = written.strip_prefix(EXAMPLES_WRITTEN) {
        return format!("{EXAMPLES_SERVED}{example}");
    }
    if written.contains(':') || written.starts_with('#') {
        return written.to_owned();
    }
    html_path(&format!("{INDEX}{written}"))
}

/// The page for people of a path that may be that for programs.
fn html_path(path: &str) -> String {
    let (page, anchor) = path.find('#').map_or((path, ""), |at| path.split_at(at));
    match page.strip_suffix(".md") {
        Some(page) if format!("{page}/") == errors::LIST => format!("{}{anchor}", errors::LIST),
        Some(page) => format!("{page}{anchor}"),
        None => path.to_owned(),
    }
}

/// Gives each heading a name of its own, as it is given where the sources are read.
#[derive(Debug, Default)]
struct Anchors(HashSet<String>);

impl Anchors {
    fn of(&mut self, text: &str) -> String {
        let kept = text
            .to_lowercase()
            .chars()
            .filter(|&c| c.is_alphanumeric() || c == ' ' || c == '-' || c == '_')
            .collect::<String>();
        let name = kept.replace(' ', "-");
        let mut free = name.clone();
        let mut times = 0;
        while !self.0.insert(free.clone()) {
            times += 1;
            free = format!("{name}-{times}");
        }
        free
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_a_page_about_this_installation() {
        let source = "# A `b`\n\nSee [limits](limits.md#quotas), [errors](errors.md), [nginx](../deploy/examples/nginx.conf) \
                      and [prices](http://127.0.0.1:8080/pricing).\n\n## Quotas & more\n\n```sh norun: no\n# say\ncurl \
                      http://127.0.0.1:8080/x \"<b>\"\n```\n\n## Quotas & more\n\n<script>x</script>\n\n| a |\n|---|\n| b |\n";
        let html = Rendered::of(source, "https://keys.example").html;
        for part in [
            "<h1>A <code>b</code></h1>",
            "href=\"/docs/limits#quotas\"",
            "href=\"/docs/errors/\"",
            "href=\"/docs/examples/nginx.conf\"",
            "href=\"/pricing\"",
            "<h2 id=\"quotas--more\"><a href=\"#quotas--more\">Quotas &amp; more</a></h2>",
            "<h2 id=\"quotas--more-1\">",
            "<pre tabindex=\"0\"><code><span class=\"note\"># say</span>\ncurl https://keys.example/x &quot;&lt;b&gt;&quot;</code></pre>",
            "&lt;script&gt;",
            "<div class=\"wide\" tabindex=\"0\" role=\"region\" aria-label=\"Quotas &amp; more\"><table>",
        ] {
            assert!(html.contains(part), "{part} is not in {html}");
        }
    }

    #[test]
    fn every_guide_says_what_it_is_for_and_is_written_without_html() {
        for guide in guides() {
            assert!(guide.source.starts_with("# "), "{} begins with its title", guide.name);
            let summary = guide.summary();
            assert!((20..300).contains(&summary.len()), "{}: {summary}", guide.name);
            let html = Parser::new_ext(guide.source, Options::ENABLE_TABLES).find(|event| match event {
                Event::Html(_) => true,
                Event::InlineHtml(text) => text.as_ref() != BREAK,
                _ => false,
            });
            assert_eq!(html, None, "{}", guide.name);
            let public = guide.markdown("https://keys.example");
            assert!(!public.contains(LOCAL) && !public.contains("../"), "{}", guide.name);
        }
    }
}
