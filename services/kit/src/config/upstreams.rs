//! `[[upstreams]]`: servers of the operator's own that the gateway stands in front of.
//!
//! What is judged here is judged again by nobody: a gateway takes only upstreams that passed.

use http::Uri;
use paperkey_proto::{Contract, options::v1::Surface};
use serde::{Deserialize, Serialize};

use super::Tiers;

/// Words after `/v1` that belong to the platform surface beside the contract's own routes.
const RESERVED: [&str; 2] = ["authz", "usage"];

/// The largest bound of a body: a tebibyte.
const MAX_BODY_BYTES: u64 = 1 << 40;

/// A part of the platform surface that another server answers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default)]
pub struct Upstream {
    /// The path, and with it all paths below it, such as `/v1/pdf/`.
    pub path: String,
    /// Where the server is, such as `http://10.0.0.7:3000`; a path in it is put before that of the request.
    pub url: String,
    /// What a credential must be allowed to do, such as `licenses:read`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scope: Option<String>,
    /// The meter that each call takes units of, such as `renders`. Visitors without a credential take none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub meter: Option<String>,
    /// How many units a call takes.
    pub cost: i64,
    /// Whether visitors may call without a credential. One that is sent must be good all the same.
    pub anonymous: bool,
    /// Whether the server is asked for what follows the path, instead of for the whole path.
    pub strip_prefix: bool,
    /// The largest request body, in bytes.
    pub max_body_bytes: u64,
    /// How long the server may take until it answers, and between two pieces of its answer.
    pub timeout_ms: u64,
    /// Whether the server sees the credential and cookies of its callers.
    pub forward_credential: bool,
}

impl Default for Upstream {
    fn default() -> Self {
        Self {
            path: String::new(),
            url: String::new(),
            scope: None,
            meter: None,
            cost: 1,
            anonymous: false,
            strip_prefix: false,
            max_body_bytes: 10 * 1_024 * 1_024,
            timeout_ms: 30_000,
            forward_credential: false,
        }
    }
}

impl Upstream {
    /// The path without a slash at its end.
    pub fn prefix(&self) -> &str {
        self.path.strip_suffix('/').unwrap_or(&self.path)
    }
}

/// Everything that is wrong with the upstreams of a configuration.
pub fn problems(upstreams: &[Upstream], tiers: &Tiers) -> Vec<String> {
    let mut problems = Vec::new();
    for (index, upstream) in upstreams.iter().enumerate() {
        let mut require = |holds: bool, problem: &str| {
            if !holds {
                problems.push(format!("upstreams[{index}].{problem}"));
            }
        };
        if is_plain(&upstream.path) {
            require(
                Contract::get().surface_of(upstream.prefix()).is_some_and(|entry| entry.surface == Surface::Platform)
                    && upstream.prefix() != "/v1",
                "path must be below /v1/ and outside of /v1/licenses",
            );
            require(
                first_word(&upstream.path).is_none_or(|word| !is_ours(word)),
                "path overlaps with the product's own paths",
            );
            let twice = upstreams[..index].iter().any(|other| other.prefix() == upstream.prefix());
            require(!twice, "path is that of another upstream");
        } else {
            require(false, "path must be a path such as /v1/pdf/ of letters, digits and -._~");
        }
        require(
            is_usable(&upstream.url),
            "url must be a URL such as http://10.0.0.7:3000, without credentials and without a query",
        );
        let known = |word: &str| Contract::get().scope_named(word).is_some();
        require(
            upstream.scope.as_deref().is_none_or(known),
            "scope is not known: scopes are words such as licenses:read",
        );
        require(
            upstream.meter.as_deref().is_none_or(|meter| tiers.has_meter(meter)),
            "meter is named by no tier: a meter is one that any [tiers.<name>] gives a quota of",
        );
        require((0..=1_000_000_000).contains(&upstream.cost), "cost must be between 0 and 1000000000");
        require(upstream.max_body_bytes <= MAX_BODY_BYTES, "max_body_bytes must be at most 1099511627776");
        require((100..=600_000).contains(&upstream.timeout_ms), "timeout_ms must be between 100 and 600000");
    }
    problems
}

/// Whether a path is written in one way only.
fn is_plain(path: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    let mut segments = path.strip_suffix('/').unwrap_or(path).split('/');
    segments.next() == Some("")
        && segments
            .all(|segment| !segment.is_empty() && segment != "." && segment != ".." && segment.bytes().all(plain))
}

/// What follows `/v1/`.
fn first_word(path: &str) -> Option<&str> {
    path.strip_prefix("/v1/")?.split('/').next()
}

/// Whether the product answers some path below `/v1/<word>`. The whole word is taken, so that a later release can add
/// to what it has there.
fn is_ours(word: &str) -> bool {
    let mut routes = Contract::get().methods().iter().flat_map(|method| &method.routes);
    RESERVED.contains(&word) || routes.any(|route| first_word(&route.template) == Some(word))
}

fn is_usable(url: &str) -> bool {
    let Ok(uri) = url.parse::<Uri>() else { return false };
    matches!(uri.scheme_str(), Some("http" | "https"))
        && uri.host().is_some_and(|host| !host.is_empty())
        && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
        && uri.query().is_none()
        && !url.contains('#')
        && (uri.path() == "/" || is_plain(uri.path()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: &str) -> Upstream {
        Upstream { path: path.into(), url: "http://127.0.0.1:3000".into(), ..Upstream::default() }
    }

    fn refused(upstreams: &[Upstream]) -> String {
        problems(upstreams, &Tiers::default()).join("\n")
    }

    #[test]
    fn paths_of_the_platform_surface_can_be_mounted() {
        for path in ["/v1/pdf/", "/v1/pdf", "/v1/extract", "/v1/a/b.c/~d_e-f/", "/v1/keysmith"] {
            assert_eq!(refused(&[at(path)]), "", "{path}");
        }
        assert_eq!(refused(&[at("/v1/pdf/"), at("/v1/pdf/generate"), at("/v1/pd")]), "");
        let full =
            Upstream { url: "https://pdf.internal/base/".into(), scope: Some("licenses:read".into()), ..at("/v1/pdf") };
        assert_eq!(refused(&[full]), "");
    }

    #[test]
    fn a_path_that_is_or_may_become_the_products_own_is_refused() {
        let outside =
            ["/", "/v1", "/v1/", "/v2/pdf", "/api/v1/pdf", "/products/x", "/v1/licenses", "/v1/licenses/x", "/app"];
        let ours = ["/v1/status", "/v1/keys", "/v1/keys/x/y/z", "/v1/authz", "/v1/usage/x"];
        let garbled =
            ["", "v1/pdf", "/v1//pdf", "/v1/../pdf", "/v1/./pdf", "/v1/pdf//", "/v1/p%64f", "/v1/{x}", "/v1/ä"];
        for path in outside.iter().chain(&ours).chain(&garbled) {
            assert!(refused(&[at(path)]).contains("upstreams[0].path"), "{path}");
        }
        assert!(refused(&[at("/v1/pdf"), at("/v1/pdf/")]).contains("upstreams[1].path is that of another"));
    }

    #[test]
    fn urls_scopes_and_numbers_are_judged() {
        let urls = [
            "",
            "127.0.0.1:3000",
            "ftp://x",
            "http://",
            "http://u:p@x",
            "http://x?y",
            "http://x/a?y=1",
            "http://x/#y",
            "http://x/../y",
            "/v1",
            "http://x y",
        ];
        for url in urls {
            assert!(refused(&[Upstream { url: url.into(), ..at("/v1/pdf") }]).contains("[0].url"), "{url}");
        }
        for scope in ["", "licenses", "licenses:Read", "everything"] {
            let upstream = Upstream { scope: Some(scope.into()), ..at("/v1/pdf") };
            assert!(refused(&[upstream]).contains("[0].scope"), "{scope}");
        }
        assert!(refused(&[Upstream { timeout_ms: 99, ..at("/v1/pdf") }]).contains("timeout_ms"));
        assert!(refused(&[Upstream { max_body_bytes: u64::MAX, ..at("/v1/pdf") }]).contains("max_body_bytes"));
    }
}
