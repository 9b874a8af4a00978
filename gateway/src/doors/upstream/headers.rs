//! What of a request's headers the server behind it sees, and what of an answer's the caller.

use std::net::SocketAddr;

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{
        AUTHORIZATION, CONTENT_LENGTH, CONTENT_SECURITY_POLICY, CONTENT_TYPE, COOKIE, EXPECT, FORWARDED, HOST,
        SET_COOKIE, TRANSFER_ENCODING, X_CONTENT_TYPE_OPTIONS,
    },
    request::Parts as Head,
};
use paperkey_kit::principal::REQUEST_ID_HEADER;
use paperkey_proto::Error;

use super::is_hop_by_hop;
use crate::{
    Inner,
    doors::{is_our_word, is_read},
    edge, session,
};

/// Headers of one connection; those that begin with `proxy-` are too.
pub(super) const HOP_BY_HOP: [&str; 7] =
    ["connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "http2-settings"];

/// By these a server may take one request for another: the path would be another one than was judged.
const REWRITING: [&str; 4] = ["x-original-url", "x-original-uri", "x-rewrite-url", "x-real-ip"];

/// By these a server may take a verb that reads for one that writes.
const VERB_OVERRIDES: [&str; 3] = ["x-http-method-override", "x-http-method", "x-method-override"];

const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");

/// The headers of the request to the server.
pub(super) fn of_request(
    gateway: &Inner,
    head: &Head,
    peer: SocketAddr,
    request_id: &str,
    forward_credential: bool,
    identity: &[(HeaderName, HeaderValue)],
) -> Result<HeaderMap, Error> {
    let reads = is_read(head.method.as_str());
    let mut headers = HeaderMap::with_capacity(head.headers.len() + 8);
    for (name, value) in &head.headers {
        let credential = *name == AUTHORIZATION || *name == COOKIE || name == "x-api-key";
        if (credential && !forward_credential) || is_ours(name, reads) || is_hop_by_hop(name, &head.headers) {
            continue;
        }
        if *name == COOKIE {
            // A session with us is nobody else's, also where credentials are passed on.
            let Some(others) = session::without_ours(value.as_bytes()) else { continue };
            headers.append(COOKIE, HeaderValue::from_bytes(&others).map_err(Error::internal)?);
            continue;
        }
        headers.append(name.clone(), value.clone());
    }
    // HTTP/2 may send cookies in pieces; HTTP/1.1 has one line for them all (RFC 9113, 8.2.3).
    let crumbs: Vec<_> = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if crumbs.len() > 1 {
        let whole = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])).map_err(Error::internal)?;
        headers.insert(COOKIE, whole);
    }
    let trusted = &gateway.config.trusted_proxies;
    let came_by = edge::believed_addresses(&head.headers, peer, trusted);
    let came_by: Vec<_> = came_by.iter().map(ToString::to_string).collect();
    headers.insert(X_FORWARDED_FOR, HeaderValue::try_from(came_by.join(", ")).map_err(Error::internal)?);
    let said = |name: HeaderName| head.headers.get(name).filter(|_| gateway.trusts(peer)).cloned();
    let proto = said(X_FORWARDED_PROTO).filter(|proto| proto == "http" || proto == "https").unwrap_or_else(|| {
        HeaderValue::from_static(if edge::is_https(&gateway.config.public_url) { "https" } else { "http" })
    });
    headers.insert(X_FORWARDED_PROTO, proto);
    if let Some(host) = said(X_FORWARDED_HOST).or_else(|| host_of(head)) {
        headers.insert(X_FORWARDED_HOST, host);
    }
    headers.insert(REQUEST_ID_HEADER, HeaderValue::from_str(request_id).map_err(Error::internal)?);
    for (name, value) in identity {
        headers.insert(name, value.clone());
    }
    Ok(headers)
}

/// Whether only we, or the connection to the server, may say that.
fn is_ours(name: &HeaderName, reads: bool) -> bool {
    let text = name.as_str();
    let dashed = text.replace('_', "-");
    is_our_word(text)
        || dashed.starts_with("x-forwarded-")
        || REWRITING.contains(&dashed.as_str())
        || (reads && VERB_OVERRIDES.contains(&dashed.as_str()))
        || dashed == REQUEST_ID_HEADER
        // How long the body is, our own connection says; that we want to have it, we do not ask.
        || [CONTENT_LENGTH, EXPECT, FORWARDED, HOST, TRANSFER_ENCODING].contains(name)
}

fn host_of(head: &Head) -> Option<HeaderValue> {
    head.uri
        .authority()
        .and_then(|authority| HeaderValue::from_str(authority.as_str()).ok())
        .or_else(|| head.headers.get(HOST).cloned())
}

/// Takes from an answer what stands for the connection to the server, and what would reach into our own pages: those of
/// the server have our origin.
pub(super) fn clean_answer(headers: &mut HeaderMap) {
    if headers.contains_key(TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
    }
    let connection: Vec<HeaderName> = headers.keys().filter(|name| is_hop_by_hop(name, headers)).cloned().collect();
    for name in connection {
        // A length that `Connection` names is still the length.
        if name != CONTENT_LENGTH {
            headers.remove(name);
        }
    }
    if headers.get_all(SET_COOKIE).iter().any(|line| session::sets_ours(line.as_bytes())) {
        let lines: Vec<_> = headers.get_all(SET_COOKIE).iter().cloned().collect();
        headers.remove(SET_COOKIE);
        for line in lines.into_iter().filter(|line| !session::sets_ours(line.as_bytes())) {
            headers.append(SET_COOKIE, line);
        }
    }
    if may_run_scripts(headers) {
        // Beside policies of the server's own: browsers keep to each.
        headers.append(CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox"));
    }
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
}

/// Whether a browser may take it for a page: HTML, all that is XML, what consists of parts, and what does not say what
/// it is, such as the news that a page has not changed, whose headers a browser takes over.
fn may_run_scripts(headers: &HeaderMap) -> bool {
    let kinds = headers.get_all(CONTENT_TYPE);
    let is_page = |kind: &[u8]| {
        let kind = kind.split(|byte| *byte == b';').next().unwrap_or_default().trim_ascii().to_ascii_lowercase();
        [&b"html"[..], b"xml", b"/xsl"].iter().any(|end| kind.ends_with(end)) || kind.starts_with(b"multipart/")
    };
    let mut named = kinds.iter().flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
    !headers.contains_key(CONTENT_TYPE) || named.any(is_page)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cleaned(of: &[(HeaderName, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in of {
            headers.append(name.clone(), HeaderValue::from_static(value));
        }
        clean_answer(&mut headers);
        headers
    }

    #[test]
    fn a_server_behind_us_sets_its_own_cookies_and_none_of_ours() {
        let lines = ["a=1", "paperkey_session=x.y.z; Path=/", "b=2; Path=/", "__Host-paperkey=; Secure; Path=/"];
        let headers = cleaned(&lines.map(|line| (SET_COOKIE, line)));
        assert_eq!(headers.get_all(SET_COOKIE).iter().collect::<Vec<_>>(), ["a=1", "b=2; Path=/"]);
    }

    #[test]
    fn a_page_of_a_server_behind_us_runs_no_scripts_with_our_session() {
        for kind in [
            "text/html",
            "Text/HTML; charset=utf-8",
            "application/xhtml+xml",
            "image/svg+xml",
            "text/xml",
            "application/xml",
            "text/plain, text/html",
            "multipart/x-mixed-replace; boundary=a",
        ] {
            let own = "default-src 'self'; sandbox allow-scripts allow-same-origin";
            let headers = cleaned(&[(CONTENT_TYPE, kind), (CONTENT_SECURITY_POLICY, own)]);
            let policies: Vec<_> = headers.get_all(CONTENT_SECURITY_POLICY).iter().collect();
            assert_eq!(policies, [own, "sandbox"], "{kind}");
            assert_eq!(headers[X_CONTENT_TYPE_OPTIONS], "nosniff", "{kind}");
        }
        for kind in ["application/json", "application/pdf", "image/png", "text/plain; charset=html"] {
            let headers = cleaned(&[(CONTENT_TYPE, kind)]);
            assert!(!headers.contains_key(CONTENT_SECURITY_POLICY), "{kind}");
            assert_eq!(headers[X_CONTENT_TYPE_OPTIONS], "nosniff", "{kind}");
        }
        let unnamed = cleaned(&[]);
        assert_eq!(unnamed[X_CONTENT_TYPE_OPTIONS], "nosniff");
        assert_eq!(unnamed[CONTENT_SECURITY_POLICY], "sandbox");
    }
}
