//! What of a request's headers the server behind it sees, and what of an answer's the caller.

use std::net::SocketAddr;

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{AUTHORIZATION, CONTENT_LENGTH, COOKIE, EXPECT, FORWARDED, HOST, TRANSFER_ENCODING},
    request::Parts as Head,
};
use paperkey_kit::principal::REQUEST_ID_HEADER;
use paperkey_proto::Error;

use super::is_hop_by_hop;
use crate::{
    Inner,
    doors::{is_our_word, is_read},
    edge,
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
        HeaderValue::from_static(if gateway.config.public_url.starts_with("https:") { "https" } else { "http" })
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

/// Takes from an answer what stands for the connection to the server.
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
}
