//! What people see: a page that says what runs here, and a page for each error of the catalogue; and what programs
//! read instead: the same in Markdown, and the reference as OpenAPI.
//!
//! Pages ask no other server for anything and run no scripts; their policy says so. Each is made once, and what a start
//! does not need, when it is first asked for. The dashboard is not in here.

mod document;
mod errors;

use std::{collections::HashMap, fmt::Write as _, sync::OnceLock};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{
    HeaderValue, Method, Response, StatusCode,
    header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, LOCATION, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS},
};
use paperkey_proto::{Contract, error::catalogue};
use sha2::{Digest as _, Sha256};

use crate::{GatewayConfig, body::Body, envelope::Refusal, openapi};

use document::{Document, escaped, twin};

const HTML: &str = "text/html; charset=utf-8";
const MARKDOWN: &str = "text/markdown; charset=utf-8";

/// Where the reference is.
const REFERENCE: &str = "/api/openapi.json";

const STYLE: &str = "
:root{color-scheme:light dark;--text:#1b1f24;--soft:#59636e;--line:#d1d9e0;--code:#f6f8fa;--back:#fff;--mark:#0b5cad}
@media(prefers-color-scheme:dark){:root{--text:#e6edf3;--soft:#9198a1;--line:#3d444d;--code:#151b23;--back:#0d1117;--mark:#79b8ff}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--text);font:16px/1.6 system-ui,sans-serif}
main{max-width:46rem;margin:0 auto;padding:3rem 1.25rem 4rem}
h1{font-size:1.75rem;line-height:1.25;margin:0 0 .5rem}
h2{font-size:1.1rem;margin:2.25rem 0 .5rem}
p{margin:.5rem 0}
.soft{color:var(--soft)}
a{color:var(--mark)}
code{font:.875em ui-monospace,monospace}
pre{background:var(--code);border:1px solid var(--line);border-radius:6px;padding:.75rem 1rem;overflow-x:auto}
pre code{font-size:.8125rem;line-height:1.55}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:.35rem 1.5rem;margin:1rem 0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
h1 code{font-size:.9em;overflow-wrap:anywhere}
.wide{overflow-x:auto;margin:1.5rem 0}
table{border-collapse:collapse;font-size:.875rem}
th{color:var(--soft);font-weight:600}
th,td{text-align:left;vertical-align:top;padding:.4rem 1rem .4rem 0;border-bottom:1px solid var(--line)}
td:nth-child(3){min-width:12rem}
@media(max-width:36rem){main{padding-top:1.5rem}dl{grid-template-columns:minmax(0,1fr);gap:0}dd{margin-bottom:.5rem}}
";

/// The pages, each made once.
#[derive(Debug)]
pub(crate) struct Pages {
    home: Made,
    errors: OnceLock<HashMap<String, Made>>,
    reference: OnceLock<Made>,
    policy: HeaderValue,
    public_url: String,
    version: &'static str,
}

/// A page as it is sent.
#[derive(Clone, Debug)]
struct Made {
    status: StatusCode,
    media_type: &'static str,
    cached: &'static str,
    body: Bytes,
}

impl Made {
    /// A page that changes with a release or with the configuration, and with nothing else.
    fn steady(media_type: &'static str, body: String) -> Self {
        Self { status: StatusCode::OK, media_type, cached: "public, max-age=300", body: body.into() }
    }

    fn fresh(status: StatusCode, media_type: &'static str, body: String) -> Self {
        Self { status, media_type, cached: "no-cache", body: body.into() }
    }
}

impl Pages {
    /// Makes the pages of an installation.
    pub(crate) fn new(config: &GatewayConfig) -> Self {
        let digest = STANDARD.encode(Sha256::digest(STYLE.as_bytes()));
        let policy = format!(
            "default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        );
        Self {
            home: Made::fresh(StatusCode::OK, HTML, home(&config.public_url, config.version)),
            errors: OnceLock::new(),
            reference: OnceLock::new(),
            // Base 64 and the words around it are visible ASCII; without them nothing would be allowed at all.
            policy: HeaderValue::from_str(&policy).unwrap_or_else(|_| HeaderValue::from_static("default-src 'none'")),
            public_url: config.public_url.clone(),
            version: config.version,
        }
    }

    /// The page of a path; none where there is no page.
    pub(crate) fn answer(&self, method: &Method, path: &str) -> Option<Result<Response<Body>, Refusal>> {
        let page = match path {
            "/" | "/app" => redirect("/app/"),
            "/app/" => self.page(&self.home),
            "/docs/errors" => redirect(errors::LIST),
            REFERENCE => self.page(self.reference.get_or_init(|| {
                let reference = openapi::document(Contract::get(), &self.public_url, self.version);
                Made::steady("application/json", reference)
            })),
            _ if path == twin(errors::LIST) || path.starts_with(errors::LIST) => self.of_errors(path),
            _ => return None,
        };
        if method == Method::GET || method == Method::HEAD {
            Some(Ok(page))
        } else {
            Some(Err(Refusal::other_verb(HeaderValue::from_static("GET, HEAD"))))
        }
    }

    /// The answer about errors: a page, the way to it where its code is written otherwise, or that there is none.
    fn of_errors(&self, path: &str) -> Response<Body> {
        let made = self.errors.get_or_init(|| of_errors(&self.public_url));
        if let Some(page) = made.get(path) {
            return self.page(page);
        }
        let name = path.strip_prefix(errors::LIST).unwrap_or_default();
        let (name, is_markdown) = name.strip_suffix(".md").map_or((name, false), |name| (name, true));
        match errors::canonical(name).map(errors::page_of) {
            Some(page) if is_markdown => redirect(&twin(&page)),
            Some(page) => redirect(&page),
            None => self.page(&no_such_error(is_markdown, &self.public_url)),
        }
    }

    fn page(&self, made: &Made) -> Response<Body> {
        let mut response = Response::new(Body::from(made.body.clone()));
        *response.status_mut() = made.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(made.media_type));
        headers.insert(CONTENT_SECURITY_POLICY, self.policy.clone());
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static(made.cached));
        response
    }
}

/// The pages of errors, by path.
fn of_errors(public_url: &str) -> HashMap<String, Made> {
    let mut made = HashMap::new();
    let mut both = |page: String, document: &Document| {
        made.insert(twin(&page), Made::steady(MARKDOWN, document.markdown(Some(public_url))));
        let html = with_twin(document, &twin(&page));
        made.insert(page, Made::steady(HTML, html));
    };
    both(errors::LIST.to_owned(), &errors::list());
    for (reason, entry) in catalogue() {
        both(errors::page_of(&entry.agent_code), &errors::page(reason, entry, public_url));
    }
    made
}

fn no_such_error(is_markdown: bool, public_url: &str) -> Made {
    let page = errors::missing();
    if is_markdown {
        Made::fresh(StatusCode::NOT_FOUND, MARKDOWN, page.markdown(Some(public_url)))
    } else {
        Made::fresh(StatusCode::NOT_FOUND, HTML, document(&page.title, "", &page.html()))
    }
}

fn redirect(to: &str) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    // Paths of our own pages are visible ASCII; elsewhere is nowhere to go.
    response.headers_mut().insert(LOCATION, HeaderValue::from_str(to).unwrap_or(HeaderValue::from_static("/app/")));
    response
}

/// A page that names its twin for programs.
fn with_twin(page: &Document, twin: &str) -> String {
    let link = format!("<link rel=\"alternate\" type=\"text/markdown\" href=\"{}\">\n", escaped(twin));
    document(&page.title, &link, &page.html())
}

/// An HTML page, whole; the title is plain text, the rest is HTML.
fn document(title: &str, head: &str, content: &str) -> String {
    let title = if title == "Paperkey" { title.to_owned() } else { format!("{} · Paperkey", escaped(title)) };
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n{head}<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{content}</main>\n</body>\n\
         </html>\n"
    )
}

fn home(public_url: &str, version: &str) -> String {
    let url = escaped(public_url);
    let version = escaped(version);
    let steps = [
        (
            "Register",
            format!(
                "curl {url}/auth/register -H 'Content-Type: application/json' \\\n  \
                 -d '{{\"email\": \"you@example.com\", \"password\": \"a long password\", \"name\": \"You\"}}'"
            ),
            "The answer holds a token for the calls below, and the first keys of your team. They are shown once.",
        ),
        (
            "Sign in again later",
            format!(
                "curl {url}/auth/login -H 'Content-Type: application/json' \\\n  \
                 -d '{{\"email\": \"you@example.com\", \"password\": \"a long password\"}}'"
            ),
            "A token is good for seven days.",
        ),
        (
            "Create a product",
            format!(
                "curl {url}/products -H \"Authorization: Bearer $TOKEN\" \\\n  \
                 -H 'Content-Type: application/json' -d '{{\"name\": \"My app\"}}'"
            ),
            "The answer holds the id of the product and its first pair of keys: pk_… ships in the app, sk_… stays on \
             your server.",
        ),
        (
            "Issue a license",
            format!(
                "curl {url}/licenses -H \"Authorization: Bearer $TOKEN\" \\\n  \
                 -H 'Content-Type: application/json' \\\n  \
                 -d '{{\"productId\": \"prod_…\", \"email\": \"customer@example.com\", \"maxActivations\": 3}}'"
            ),
            "The key in the answer is what your customer types into the app.",
        ),
        (
            "Validate it in the app",
            format!(
                "curl {url}/v1/licenses/validate -H \"Authorization: Bearer $PUBLIC_KEY\" \\\n  \
                 -H 'Content-Type: application/json' \\\n  \
                 -d '{{\"license_key\": \"XXXXX-XXXXX-XXXXX-XX\", \"fingerprint\": \"machine-1\"}}'"
            ),
            "Says whether the license may be used, and if not, why.",
        ),
    ];
    let mut content = format!(
        "<h1>Paperkey runs here</h1>\n\
         <p class=\"soft\">Licenses and API keys, self-hosted. Version {version}.</p>\n\
         <p>The dashboard is on its way. Everything it will do can be done over the API today, by REST, gRPC and \
         gRPC-Web on this address.</p>\n"
    );
    for (at, (title, command, note)) in steps.iter().enumerate() {
        // Writing to a String cannot fail.
        let _ = write!(
            content,
            "<h2>{}. {title}</h2>\n<pre><code>{}</code></pre>\n<p class=\"soft\">{note}</p>\n",
            at + 1,
            command.replace('"', "&quot;")
        );
    }
    content.push_str(
        "<h2>gRPC</h2>\n<p>Reflection is on, so <code>grpcurl</code> can list and describe all services here.</p>\n\
         <h2>More</h2>\n<p><a href=\"/docs/errors/\">All errors</a>, and <a href=\"/api/openapi.json\">the reference as \
         OpenAPI</a>.</p>\n",
    );
    document("Paperkey", "", &content)
}
