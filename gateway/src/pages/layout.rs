//! What stands around every page of ours: its head, the way to the other parts, and the styles of all of it.

use super::{REFERENCE_PAGE, docs, document::escaped, pricing};

/// The styles, which stand in each page: there is nothing else to be loaded.
pub(super) const STYLE: &str = include_str!("style.css");

/// What stands around the text of a page.
#[derive(Debug, Default)]
pub(super) struct Around<'a> {
    /// Where the page is.
    pub(super) here: &'a str,
    /// The path of the same page for programs.
    pub(super) twin: Option<String>,
    /// Whether it is one of the docs, whose list stands at its side.
    pub(super) side: bool,
    /// The sections of the page, as HTML; empty where there are few.
    pub(super) toc: &'a str,
}

/// An HTML page, whole; the title is plain text, the content is HTML.
pub(super) fn document(title: &str, content: &str, around: &Around<'_>) -> String {
    let title = if title == "Paperkey" { title.to_owned() } else { format!("{} · Paperkey", escaped(title)) };
    let alternate = around.twin.as_ref().map_or_else(String::new, |twin| {
        format!("<link rel=\"alternate\" type=\"text/markdown\" href=\"{}\">\n", escaped(twin))
    });
    let side = if around.side { docs::side(around.here) } else { String::new() };
    let classes = match (around.side, around.toc) {
        (false, _) => "page",
        (true, "") => "page with-side",
        (true, _) => "page with-side with-toc",
    };
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n{alternate}<style>{STYLE}</style>\n</head>\n<body>\n\
         <a class=\"skip\" href=\"#content\">To the text</a>\n{}<div class=\"{classes}\">\n{side}\
         <main id=\"content\">\n{content}</main>\n{}</div>\n</body>\n</html>\n",
        header(around.here),
        around.toc,
    )
}

/// The way to the parts of the product.
fn header(here: &str) -> String {
    let parts = [
        (docs::INDEX, "Docs", here.starts_with(docs::INDEX)),
        (REFERENCE_PAGE, "Reference", false),
        (pricing::PATH, "Pricing", here == pricing::PATH),
        (super::app::HOME, "Dashboard", false),
    ];
    let links = parts.map(|(path, label, is_here)| {
        let current = if is_here { " aria-current=\"true\"" } else { "" };
        format!("<a href=\"{path}\"{current}>{label}</a>")
    });
    format!(
        "<header><nav aria-label=\"Parts\"><a class=\"brand\" href=\"/docs/\">Paperkey</a>{}</nav></header>\n",
        links.concat()
    )
}
