//! What people see: the guides, what each tier includes, and a page for each error of the catalogue; and what programs
//! read instead: the same in Markdown, and the reference as OpenAPI.
//!
//! Pages ask no other server for anything, and what is written in here runs no scripts; their policies say so. Each is
//! made once, and what a start does not need, when it is first asked for. The dashboard itself is a crate of its own, whose
//! files are served here.

mod app;
mod docs;
mod document;
mod errors;
mod layout;
mod llms;
mod pricing;
mod reference;

use std::{collections::HashMap, sync::OnceLock};

use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Response, StatusCode,
    header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, LOCATION, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS},
};
use paperkey_proto::{Contract, error::catalogue};
use sha2::{Digest as _, Sha256};

use crate::{GatewayConfig, body::Body, envelope::Refusal, openapi};

use document::{Document, twin};
use layout::{Around, STYLE};

const HTML: &str = "text/html; charset=utf-8";
const MARKDOWN: &str = "text/markdown; charset=utf-8";

/// Where the reference is.
const REFERENCE: &str = "/api/openapi.json";

/// Where people read it and try it out.
const REFERENCE_PAGE: &str = reference::HOME;

/// The pages, each made once.
#[derive(Debug)]
pub(crate) struct Pages {
    errors: OnceLock<HashMap<String, Made>>,
    guides: OnceLock<HashMap<String, Made>>,
    config: GatewayConfig,
    reference: OnceLock<Made>,
    policy: HeaderValue,
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
            errors: OnceLock::new(),
            guides: OnceLock::new(),
            config: config.clone(),
            reference: OnceLock::new(),
            // Base 64 and the words around it are visible ASCII; without them nothing would be allowed at all.
            policy: HeaderValue::from_str(&policy).unwrap_or_else(|_| HeaderValue::from_static("default-src 'none'")),
        }
    }

    /// The page of a path; none where there is no page.
    pub(crate) fn answer(
        &self,
        method: &Method,
        path: &str,
        headers: &HeaderMap,
    ) -> Option<Result<Response<Body>, Refusal>> {
        let page = match path {
            "/" | "/app" => redirect(app::HOME),
            _ if path.starts_with(app::HOME) => app::answer(method, path, headers),
            _ if path.starts_with(reference::HOME) => reference::answer(method, path, headers)?,
            "/docs/errors" => redirect(errors::LIST),
            REFERENCE => self.page(self.reference.get_or_init(|| {
                let reference = openapi::document(Contract::get(), &self.config.public_url, self.config.version);
                Made::steady("application/json", reference)
            })),
            _ if path == twin(errors::LIST) || path.starts_with(errors::LIST) => self.of_errors(path),
            "/docs" => redirect(docs::INDEX),
            pricing::PATH | "/pricing.md" | "/docs.md" | llms::PATH => self.of_guides(path),
            _ if path.starts_with(docs::INDEX) => self.of_guides(path),
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
        let made = self.errors.get_or_init(|| of_errors(&self.config.public_url));
        if let Some(page) = made.get(path) {
            return self.page(page);
        }
        let name = path.strip_prefix(errors::LIST).unwrap_or_default();
        let (name, is_markdown) = name.strip_suffix(".md").map_or((name, false), |name| (name, true));
        match errors::canonical(name).map(errors::page_of) {
            Some(page) if is_markdown => redirect(&twin(&page)),
            Some(page) => redirect(&page),
            None => self.page(&missing(&errors::missing(), is_markdown, &self.config.public_url)),
        }
    }

    /// The answer about guides: a page, the way to it where its path is written otherwise, or that there is none.
    fn of_guides(&self, path: &str) -> Response<Body> {
        let made = self.guides.get_or_init(|| of_guides(&self.config));
        match made.get(path) {
            Some(page) => self.page(page),
            None => match made.get_key_value(path.trim_end_matches('/')) {
                Some((path, _)) => redirect(path),
                None => {
                    self.page(&missing(&docs::missing(), path.strip_suffix(".md").is_some(), &self.config.public_url))
                }
            },
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
        let html = whole(document, &page);
        made.insert(page, Made::steady(HTML, html));
    };
    both(errors::LIST.to_owned(), &errors::list());
    for (reason, entry) in catalogue() {
        both(errors::page_of(&entry.agent_code), &errors::page(reason, entry, public_url));
    }
    made
}

/// The guides and what stands beside them, by path.
fn of_guides(config: &GatewayConfig) -> HashMap<String, Made> {
    let mut made = docs::pages(&config.public_url);
    let pricing = pricing::page(config);
    made.insert(twin(pricing::PATH), Made::steady(MARKDOWN, pricing.markdown(Some(&config.public_url))));
    made.insert(pricing::PATH.to_owned(), Made::steady(HTML, whole(&pricing, pricing::PATH)));
    let llms = llms::text(&config.public_url);
    made.insert(llms::PATH.to_owned(), Made::steady("text/plain; charset=utf-8", llms));
    made
}

fn missing(page: &Document, is_markdown: bool, public_url: &str) -> Made {
    if is_markdown {
        Made::fresh(StatusCode::NOT_FOUND, MARKDOWN, page.markdown(Some(public_url)))
    } else {
        let around = Around { side: true, ..Around::default() };
        Made::fresh(StatusCode::NOT_FOUND, HTML, layout::document(&page.title, &page.html(), &around))
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
fn whole(page: &Document, path: &str) -> String {
    let around = Around { here: path, twin: Some(twin(path)), side: path.starts_with(docs::INDEX), toc: "" };
    layout::document(&page.title, &page.html(), &around)
}
