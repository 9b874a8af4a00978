//! What people see: a page that says what runs here, and a page for each error of the catalogue.
//!
//! Pages ask no other server for anything and run no scripts; their policy says so. The dashboard is not in here.

use std::fmt::Write as _;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use http::{
    HeaderValue, Method, Response, StatusCode,
    header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, LOCATION, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS},
};
use paperkey_proto::{
    error::entry,
    errors::v1::{Reason, ReasonOptions},
};
use sha2::{Digest as _, Sha256};

use crate::{GatewayConfig, body::Body, envelope::Refusal};

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
dl{display:grid;grid-template-columns:max-content 1fr;gap:.35rem 1.5rem;margin:1rem 0}
dt{color:var(--soft)}
dd{margin:0;overflow-wrap:anywhere}
";

/// The pages, made once.
#[derive(Debug)]
pub(crate) struct Pages {
    home: String,
    policy: HeaderValue,
    public_url: String,
}

impl Pages {
    /// Makes the pages of an installation.
    pub(crate) fn new(config: &GatewayConfig) -> Self {
        let digest = STANDARD.encode(Sha256::digest(STYLE.as_bytes()));
        let policy = format!(
            "default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        );
        Self {
            home: home(&config.public_url, config.version),
            // Base 64 and the words around it are visible ASCII; without them nothing would be allowed at all.
            policy: HeaderValue::from_str(&policy).unwrap_or_else(|_| HeaderValue::from_static("default-src 'none'")),
            public_url: config.public_url.clone(),
        }
    }

    /// The page of a path; none where there is no page.
    pub(crate) fn answer(&self, method: &Method, path: &str) -> Option<Result<Response<Body>, Refusal>> {
        let page = match path {
            "/" | "/app" => Ok(redirect("/app/")),
            "/app/" => Ok(self.page(self.home.clone())),
            _ => {
                let (_, entry) = by_code(path.strip_prefix("/docs/errors/")?)?;
                Ok(self.page(of_error(entry, &self.public_url)))
            }
        };
        if method == Method::GET || method == Method::HEAD {
            Some(page)
        } else {
            Some(Err(Refusal::other_verb(HeaderValue::from_static("GET, HEAD"))))
        }
    }

    fn page(&self, html: String) -> Response<Body> {
        let mut response = Response::new(Body::from(html.into_bytes()));
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
        headers.insert(CONTENT_SECURITY_POLICY, self.policy.clone());
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        response
    }
}

fn redirect(to: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::TEMPORARY_REDIRECT;
    response.headers_mut().insert(LOCATION, HeaderValue::from_static(to));
    response
}

/// The entry of the catalogue whose page has that name.
fn by_code(code: &str) -> Option<(Reason, &'static ReasonOptions)> {
    (1..)
        .map_while(|number| Reason::try_from(number).ok())
        .map(|reason| (reason, entry(reason)))
        .find(|(_, entry)| entry.agent_code == code)
}

fn document(title: &str, content: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{content}</main>\n</body>\n</html>\n"
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
        "<h2>gRPC</h2>\n<p>Reflection is on, so <code>grpcurl</code> can list and describe all services here.</p>\n",
    );
    document("Paperkey", &content)
}

fn of_error(entry: &ReasonOptions, public_url: &str) -> String {
    let code = escaped(&entry.agent_code);
    let retry = if entry.retryable { "Yes: the same request may succeed later." } else { "No: not unchanged." };
    let content = format!(
        "<p class=\"soft\"><a href=\"{url}/app/\">Paperkey</a> · errors</p>\n<h1><code>{code}</code></h1>\n\
         <p>{message}</p>\n<h2>What to do</h2>\n<p>{advice}</p>\n\
         <dl><dt>HTTP status</dt><dd>{status}</dd>\n\
         <dt>Code on the dashboard and client paths</dt><dd><code>{flat}</code></dd>\n\
         <dt>Code on the team paths</dt><dd><code>{typed}</code></dd>\n\
         <dt>Code on the platform paths</dt><dd><code>{code}</code></dd>\n\
         <dt>Type</dt><dd><code>{kind}</code></dd>\n<dt>Worth retrying</dt><dd>{retry}</dd></dl>\n",
        url = escaped(public_url),
        message = escaped(&entry.message),
        advice = escaped(&entry.agent_message),
        status = entry.http_status,
        flat = escaped(&entry.flat_code),
        typed = escaped(&entry.typed_code),
        kind = escaped(&entry.r#type),
    );
    document(&format!("{code} · Paperkey"), &content)
}

fn escaped(text: &str) -> String {
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
