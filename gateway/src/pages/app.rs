//! The files of the dashboard, as browsers take them.

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, Response, StatusCode,
    header::{
        ACCEPT_ENCODING, CACHE_CONTROL, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG,
        IF_NONE_MATCH, REFERRER_POLICY, VARY, X_CONTENT_TYPE_OPTIONS,
    },
};
use paperkey_dashboard::{Asset, asset};

use crate::body::Body;

/// Where the dashboard is.
pub(super) const HOME: &str = "/app/";

/// Nothing but what we serve ourselves, and no script but our files. Styles may stand in elements: what they could tell
/// they could tell nobody.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src 'self' data:; \
     font-src 'self'; manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);

/// What stands at a path under [`HOME`]: a file, or the one page, which finds its way by the path itself.
pub(super) fn answer(method: &Method, path: &str, headers: &HeaderMap) -> Response<Body> {
    let name = path.strip_prefix('/').unwrap_or(path);
    match asset(name) {
        Some(file) => file_as_asked(file, POLICY, method, headers),
        // The addresses within the dashboard hold ids, and no dots.
        None if !name.contains('.') && !name.contains("/assets/") => {
            asset("app/index.html").map_or_else(nothing, |index| file_as_asked(index, POLICY, method, headers))
        }
        None => nothing(),
    }
}

/// A file under a policy, in an encoding that the browser takes, unless it has it. It is unpacked for those only who are
/// sent it.
pub(super) fn file_as_asked(file: &Asset, policy: HeaderValue, method: &Method, headers: &HeaderMap) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    let known = headers.get(IF_NONE_MATCH).is_some_and(|tags| contains_token(tags, file.tag));
    if known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    } else if takes_gzip(headers) {
        *response.body_mut() = Body::from(Bytes::from_static(file.gzip));
        response.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    } else if method == Method::GET {
        let Some(plain) = file.plain() else { return nothing() };
        *response.body_mut() = Body::from(Bytes::from_static(plain));
    } else {
        response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(file.bytes));
    }
    let cached = if file.is_immutable() { "public, max-age=31536000, immutable" } else { "no-cache" };
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(file.media_type()));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static(cached));
    headers.insert(ETAG, HeaderValue::from_static(file.tag));
    headers.insert(VARY, HeaderValue::from_static("accept-encoding"));
    headers.insert(CONTENT_SECURITY_POLICY, policy);
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}

/// The answer where there is no file.
pub(super) fn nothing() -> Response<Body> {
    let mut response = Response::new(Body::from(Bytes::from_static(b"There is no such file\n")));
    *response.status_mut() = StatusCode::NOT_FOUND;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}

/// Whether gzip is among the encodings that are taken, and not with the weight of nothing.
fn takes_gzip(headers: &HeaderMap) -> bool {
    headers.get_all(ACCEPT_ENCODING).iter().filter_map(|value| value.to_str().ok()).any(|value| {
        value.split(',').any(|entry| {
            let (name, weight) = entry.split_once(';').unwrap_or((entry, ""));
            let refused = weight.trim().strip_prefix("q=").and_then(|q| q.trim().parse::<f32>().ok()) == Some(0.0);
            name.trim().eq_ignore_ascii_case("gzip") && !refused
        })
    })
}

fn contains_token(tags: &HeaderValue, tag: &str) -> bool {
    // Caches compare weakly (RFC 9110, 13.1.2).
    let is_same = |entry: &str| entry.trim().trim_start_matches("W/") == tag.trim_start_matches("W/");
    tags.to_str().is_ok_and(|tags| tags.split(',').any(is_same))
}

#[cfg(test)]
mod tests {
    use http::header::HeaderName;

    use super::*;

    fn asked(path: &str, headers: &[(HeaderName, &'static str)]) -> Response<Body> {
        let headers = headers.iter().map(|(name, value)| (name.clone(), HeaderValue::from_static(value))).collect();
        answer(&Method::GET, path, &headers)
    }

    #[test]
    fn every_address_within_the_dashboard_is_the_one_page_and_a_file_that_is_not_there_is_none() {
        for path in ["/app/", "/app/licenses/lic_1", "/app/settings/api-keys"] {
            let page = asked(path, &[]);
            assert_eq!(page.status(), StatusCode::OK, "{path}");
            assert_eq!(page.headers()[CACHE_CONTROL], "no-cache");
            assert_eq!(page.headers()[CONTENT_SECURITY_POLICY], POLICY);
        }
        for path in ["/app/no.js", "/app/assets/gone", "/app/../secret.txt"] {
            assert_eq!(asked(path, &[]).status(), StatusCode::NOT_FOUND, "{path}");
        }
    }

    #[test]
    fn a_browser_is_given_gzip_if_it_takes_that_and_nothing_if_it_has_the_file() {
        let zipped = asked("/app/", &[(ACCEPT_ENCODING, "br, gzip;q=0.8")]);
        assert_eq!(zipped.headers()[CONTENT_ENCODING], "gzip");
        assert!(!asked("/app/", &[(ACCEPT_ENCODING, "gzip;q=0, br")]).headers().contains_key(CONTENT_ENCODING));
        let tag = asset("app/index.html").unwrap().tag;
        assert!(tag.starts_with("W/\""), "one tag for both encodings: {tag}");
        for known in [tag, tag.trim_start_matches("W/")] {
            assert_eq!(asked("/app/", &[(IF_NONE_MATCH, known)]).status(), StatusCode::NOT_MODIFIED, "{known}");
        }
    }

    #[test]
    fn whoever_asks_for_the_head_alone_has_nothing_unpacked_and_is_told_the_length() {
        let head = answer(&Method::HEAD, "/app/", &HeaderMap::new());
        assert!(http_body::Body::is_end_stream(head.body()));
        let bytes = asset("app/index.html").unwrap().bytes;
        assert_eq!(head.headers()[CONTENT_LENGTH], bytes.to_string());
        let whole = asked("/app/", &[]);
        assert_eq!(http_body::Body::size_hint(whole.body()).exact(), u64::try_from(bytes).ok());
    }
}
