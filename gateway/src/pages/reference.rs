//! The reference as people read it: the viewer's page under `/api/docs`, over the document at `/api/openapi.json`.

use http::{HeaderMap, HeaderValue, Method, Response};
use paperkey_dashboard::asset;

use super::{app, redirect};
use crate::body::Body;

/// Where the reference is read.
pub(super) const HOME: &str = "/api/docs";

/// Nothing but what we serve ourselves. The viewer writes its styles into elements; what they could tell they could tell
/// nobody.
const POLICY: HeaderValue = HeaderValue::from_static(
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; connect-src 'self'; img-src 'self' data:; \
     font-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
);

/// What stands at a path that is [`HOME`] or below it; none where the path only begins alike.
pub(super) fn answer(method: &Method, path: &str, headers: &HeaderMap) -> Option<Response<Body>> {
    let name = match path.strip_prefix(HOME)? {
        "" => "index.html",
        // The page's own addresses are absolute, so that one place for it is enough.
        "/" => return Some(redirect(HOME)),
        below => below.strip_prefix('/')?,
    };
    let file = asset(&format!("reference/{name}"));
    Some(file.map_or_else(app::nothing, |file| app::file_as_asked(file, POLICY, method, headers)))
}

#[cfg(test)]
mod tests {
    use http::{
        StatusCode,
        header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, LOCATION},
    };
    use http_body_util::BodyExt as _;

    use super::*;

    fn asked(path: &str) -> Option<Response<Body>> {
        answer(&Method::GET, path, &HeaderMap::new())
    }

    #[test]
    fn the_page_and_its_files_are_there_under_a_policy_of_their_own() {
        for (path, kind) in [
            ("/api/docs", "text/html; charset=utf-8"),
            ("/api/docs/reference.js", "text/javascript; charset=utf-8"),
            ("/api/docs/reference.css", "text/css; charset=utf-8"),
        ] {
            let file = asked(path).unwrap();
            assert_eq!(file.status(), StatusCode::OK, "{path}");
            assert_eq!(file.headers()[CONTENT_TYPE], kind);
            assert_eq!(file.headers()[CACHE_CONTROL], "no-cache");
            assert_eq!(file.headers()[CONTENT_SECURITY_POLICY], POLICY);
        }
        assert_eq!(asked("/api/docs/").unwrap().headers()[LOCATION], HOME);
        for path in ["/api/docs/no.js", "/api/docs/../app/index.html", "/api/docs/app/index.html", "/api/docs//"] {
            assert_eq!(asked(path).unwrap().status(), StatusCode::NOT_FOUND, "{path}");
        }
        assert!(asked("/api/docsearch").is_none() && asked("/api/v1/me").is_none());
    }

    #[tokio::test]
    async fn whatever_the_page_names_is_there_and_ours() {
        let page = asked(HOME).unwrap().into_body().collect().await.unwrap().to_bytes();
        let page = String::from_utf8(page.to_vec()).unwrap();
        let named: Vec<&str> = ["src=\"", "href=\""]
            .iter()
            .flat_map(|attribute| page.split(attribute).skip(1).filter_map(|rest| rest.split('"').next()))
            .collect();
        assert!(named.iter().all(|name| name.starts_with('/') || *name == "data:,"), "{named:?}");
        let files: Vec<&&str> = named.iter().filter(|name| name.starts_with("/api/docs/")).collect();
        assert!(files.len() >= 3, "{named:?}");
        for name in files {
            let file = asked(name).unwrap();
            assert_eq!(file.status(), StatusCode::OK, "{name}");
            assert_eq!(file.headers()[CACHE_CONTROL] != "no-cache", name.contains("/assets/"), "{name}");
        }
    }
}
