//! What every request meets first: whose address it comes from, how large it may be, what a browser may read.
//!
//! Deliberately absent: credentials in CORS. Cookies are a [`session`](crate::session) on pages of our own, and what a
//! browser of any origin may call is never called by one.

use std::net::{IpAddr, SocketAddr};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderValue, Method, Response, StatusCode, Version,
    header::{
        ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS, ACCESS_CONTROL_ALLOW_ORIGIN,
        ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE, ACCESS_CONTROL_REQUEST_METHOD, CONNECTION,
        CONTENT_LENGTH, CONTENT_TYPE, ORIGIN, VARY,
    },
};
use http_body_util::BodyExt as _;
use ipnet::IpNet;
use paperkey_proto::{Error, contract::SurfaceEntry, errors::v1::Reason, options::v1::Caller};

use crate::body::Body;

/// More proxies than this stand in no row.
const MAX_HOPS: usize = 32;

/// Whether an address of ours is one for encrypted connections.
pub(crate) fn is_https(public_url: &str) -> bool {
    public_url.get(..6).is_some_and(|scheme| scheme.eq_ignore_ascii_case("https:"))
}

/// The address that a call comes from: the socket's, or what proxies that are trusted say of it.
///
/// `X-Forwarded-For` is read from the right, where our own proxies write. The first address that is not a trusted
/// proxy's is the client's; whatever stands left of it was written by the client. An entry that is no address stops
/// the walk at the last proxy that could be believed.
pub(crate) fn client_address(headers: &HeaderMap, peer: SocketAddr, trusted: &[IpNet]) -> IpAddr {
    let mut client = peer.ip().to_canonical();
    walk(headers, client, trusted, |address| client = address);
    client
}

/// The addresses that a call came by, the client's first and the socket's last: what may be told to the next server.
pub(crate) fn believed_addresses(headers: &HeaderMap, peer: SocketAddr, trusted: &[IpNet]) -> Vec<IpAddr> {
    let mut addresses = vec![peer.ip().to_canonical()];
    walk(headers, addresses[0], trusted, |address| addresses.push(address));
    addresses.reverse();
    addresses
}

/// Whether an address is that of a proxy whose word counts.
pub(crate) fn is_trusted(address: IpAddr, trusted: &[IpNet]) -> bool {
    let address = address.to_canonical();
    trusted.iter().any(|network| network.contains(&address))
}

/// Visits what can be believed of `X-Forwarded-For`, from the right.
fn walk(headers: &HeaderMap, peer: IpAddr, trusted: &[IpNet], mut visit: impl FnMut(IpAddr)) {
    if trusted.is_empty() || !is_trusted(peer, trusted) {
        return;
    }
    let lines: Vec<_> = headers.get_all("x-forwarded-for").iter().collect();
    let entries = lines.iter().rev().flat_map(|line| line.as_bytes().rsplit(|byte| *byte == b','));
    for entry in entries.take(MAX_HOPS) {
        let Some(address) = std::str::from_utf8(entry).ok().and_then(|entry| address_of(entry.trim())) else {
            break;
        };
        visit(address);
        if !is_trusted(address, trusted) {
            break;
        }
    }
}

/// An address with or without a port: `10.0.0.1`, `10.0.0.1:80`, `2001:db8::1`, `[2001:db8::1]:80`.
fn address_of(text: &str) -> Option<IpAddr> {
    text.parse::<IpAddr>()
        .ok()
        .or_else(|| text.parse::<SocketAddr>().ok().map(|socket| socket.ip()))
        .or_else(|| text.strip_prefix('[')?.strip_suffix(']')?.parse().ok())
        .map(|address| address.to_canonical())
}

/// Whether a body of that type is JSON: `application/json`, or anything that ends in `+json`.
pub(crate) fn is_json(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(CONTENT_TYPE).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return false };
    if value.as_bytes() == b"application/json" {
        return true;
    }
    let Ok(value) = value.to_str() else { return false };
    let essence = value.split(';').next().unwrap_or_default().trim();
    let Some((kind, subtype)) = essence.split_once('/') else { return false };
    let suffix = subtype.len().checked_sub(5).and_then(|at| subtype.get(at..));
    (kind.eq_ignore_ascii_case("application") && subtype.eq_ignore_ascii_case("json"))
        || (!kind.is_empty() && suffix.is_some_and(|suffix| subtype.len() > 5 && suffix.eq_ignore_ascii_case("+json")))
}

/// Refuses a body that says of itself that it is too large.
pub(crate) fn must_fit(headers: &HeaderMap, max_bytes: usize) -> Result<(), Error> {
    let declared = headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|length| length > max_bytes as u64) { Err(too_large(max_bytes)) } else { Ok(()) }
}

/// Refuses a body that is too large.
pub(crate) fn too_large(max_bytes: usize) -> Error {
    Error::new(Reason::BodyTooLarge).with_message(format!("The request body is larger than {max_bytes} bytes"))
}

/// Reads a body up to a bound, whatever its length says of itself.
pub(crate) async fn read_body<B>(headers: &HeaderMap, body: B, max_bytes: usize) -> Result<Bytes, Error>
where
    B: http_body::Body<Data = Bytes>,
{
    must_fit(headers, max_bytes)?;
    let mut body = std::pin::pin!(body);
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| Error::malformed("The request body was cut off"))?;
        let Ok(data) = frame.into_data() else { continue };
        if first.len() + rest.len() + data.len() > max_bytes {
            return Err(too_large(max_bytes));
        }
        if first.is_empty() && rest.is_empty() {
            first = data;
        } else {
            if rest.is_empty() {
                rest.extend_from_slice(&std::mem::take(&mut first));
            }
            rest.extend_from_slice(&data);
        }
    }
    Ok(if rest.is_empty() { first } else { rest.freeze() })
}

/// Whether browsers of any origin may call the surface where that is configured: its callers bring keys, and nobody
/// signs in there as a person.
pub(crate) fn is_for_keys(surface: &SurfaceEntry) -> bool {
    !surface.options.callers().any(|caller| caller == Caller::Account)
}

/// Whether a request asks for leave before another is sent.
pub(crate) fn is_preflight(method: &Method, headers: &HeaderMap) -> bool {
    method == Method::OPTIONS && headers.contains_key(ORIGIN) && headers.contains_key(ACCESS_CONTROL_REQUEST_METHOD)
}

/// Lets a browser send what the path takes.
pub(crate) fn preflight(verbs: HeaderValue, headers_asked: Option<&HeaderValue>) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::NO_CONTENT;
    let headers = response.headers_mut();
    let any = HeaderValue::from_static("*");
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, any.clone());
    headers.insert(ACCESS_CONTROL_ALLOW_METHODS, verbs);
    // The star does not stand for Authorization, so what is asked for is named.
    headers.insert(ACCESS_CONTROL_ALLOW_HEADERS, headers_asked.cloned().unwrap_or(any));
    headers.insert(ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("86400"));
    headers.insert(VARY, HeaderValue::from_static("Access-Control-Request-Headers"));
    response
}

/// Lets a browser of any origin read an answer. Never with credentials.
pub(crate) fn share(headers: &mut HeaderMap) {
    headers.insert(ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    headers.insert(ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("*"));
}

/// Says that the connection ends after an answer that did not wait for the body: what is left of that would be taken
/// for the next request.
pub(crate) fn hang_up(version: Version, headers: &mut HeaderMap) {
    // HTTP/2 ends the stream instead, and knows no such header.
    if version < Version::HTTP_2 {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::{Full, StreamBody};

    use super::*;

    fn from(peer: &str, forwarded: &[&'static str], trusted: &[&str]) -> String {
        let mut headers = HeaderMap::new();
        for line in forwarded {
            headers.append("x-forwarded-for", HeaderValue::from_static(line));
        }
        let trusted: Vec<IpNet> = trusted.iter().map(|network| network.parse().unwrap()).collect();
        client_address(&headers, SocketAddr::new(peer.parse().unwrap(), 9), &trusted).to_string()
    }

    #[test]
    fn only_trusted_proxies_are_believed() {
        assert_eq!(from("203.0.113.9", &["1.2.3.4"], &[]), "203.0.113.9");
        assert_eq!(from("203.0.113.9", &["1.2.3.4"], &["10.0.0.0/8"]), "203.0.113.9");
        assert_eq!(from("10.0.0.1", &[], &["10.0.0.0/8"]), "10.0.0.1");
        assert_eq!(from("10.0.0.1", &["1.2.3.4"], &["10.0.0.0/8"]), "1.2.3.4");
        assert_eq!(from("::ffff:10.0.0.1", &["1.2.3.4"], &["10.0.0.0/8"]), "1.2.3.4");
    }

    #[test]
    fn what_the_client_wrote_left_of_its_own_address_does_not_count() {
        assert_eq!(from("10.0.0.1", &["6.6.6.6, 1.2.3.4"], &["10.0.0.0/8"]), "1.2.3.4");
        assert_eq!(from("10.0.0.1", &["6.6.6.6", "1.2.3.4, 10.0.0.2"], &["10.0.0.0/8"]), "1.2.3.4");
        assert_eq!(from("10.0.0.1", &["10.0.0.3, 10.0.0.2"], &["10.0.0.0/8"]), "10.0.0.3");
    }

    #[test]
    fn a_garbled_entry_stops_the_walk() {
        assert_eq!(from("10.0.0.1", &["1.2.3.4, unknown"], &["10.0.0.0/8"]), "10.0.0.1");
        assert_eq!(from("10.0.0.1", &["1.2.3.4, , 10.0.0.2"], &["10.0.0.0/8"]), "10.0.0.2");
        assert_eq!(from("10.0.0.1", &["1.2.3.4, 999.1.1.1, 10.0.0.2"], &["10.0.0.0/8"]), "10.0.0.2");
    }

    #[test]
    fn ports_and_brackets_are_read() {
        assert_eq!(from("10.0.0.1", &["1.2.3.4:5678"], &["10.0.0.0/8"]), "1.2.3.4");
        assert_eq!(from("10.0.0.1", &["[2001:db8::1]:5678"], &["10.0.0.0/8"]), "2001:db8::1");
        assert_eq!(from("10.0.0.1", &["[2001:db8::1]"], &["10.0.0.0/8"]), "2001:db8::1");
        assert_eq!(from("10.0.0.1", &["::ffff:1.2.3.4"], &["10.0.0.0/8"]), "1.2.3.4");
    }

    #[test]
    fn the_next_server_is_told_only_of_addresses_that_can_be_believed() {
        let told = |peer: &str, forwarded: &'static str| {
            let headers = HeaderMap::from_iter([(
                http::HeaderName::from_static("x-forwarded-for"),
                HeaderValue::from_static(forwarded),
            )]);
            let peer = SocketAddr::new(peer.parse().unwrap(), 9);
            let addresses = believed_addresses(&headers, peer, &["10.0.0.0/8".parse().unwrap()]);
            addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        };
        assert_eq!(told("203.0.113.9", "1.2.3.4"), "203.0.113.9");
        assert_eq!(told("10.0.0.1", "6.6.6.6, 1.2.3.4, 10.0.0.2"), "1.2.3.4, 10.0.0.2, 10.0.0.1");
        assert_eq!(told("10.0.0.1", "1.2.3.4, unknown"), "10.0.0.1");
    }

    #[test]
    fn json_is_told_by_its_media_type() {
        let is =
            |value: &'static str| is_json(&HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(value))]));
        for value in ["application/json", "Application/JSON; charset=utf-8", "application/merge-patch+json"] {
            assert!(is(value), "{value}");
        }
        for value in ["", "text/plain", "text/json", "application/jsonp", "application/+json", "json", "/x+json"] {
            assert!(!is(value), "{value}");
        }
        assert!(!is_json(&HeaderMap::new()));
    }

    #[tokio::test]
    async fn a_body_is_cut_off_at_its_bound_whatever_it_says() {
        let read = |length: Option<&'static str>, pieces: Vec<&'static [u8]>| async move {
            let mut headers = HeaderMap::new();
            if let Some(length) = length {
                headers.insert(CONTENT_LENGTH, HeaderValue::from_static(length));
            }
            let frames = pieces
                .into_iter()
                .map(|piece| Ok::<_, std::convert::Infallible>(http_body::Frame::data(Bytes::from_static(piece))));
            let body = StreamBody::new(futures_util::stream::iter(frames));
            read_body(&headers, body, 8).await.map_err(|error| error.reason())
        };
        assert_eq!(read(None, vec![]).await.unwrap(), "");
        assert_eq!(read(Some("8"), vec![b"1234", b"56", b"78"]).await.unwrap(), "12345678");
        assert_eq!(read(None, vec![b"1234", b"56789"]).await, Err(Reason::BodyTooLarge));
        assert_eq!(read(Some("2"), vec![b"123456789"]).await, Err(Reason::BodyTooLarge));
        let headers = HeaderMap::from_iter([(CONTENT_LENGTH, HeaderValue::from_static("9"))]);
        let refused = read_body(&headers, Full::new(Bytes::new()), 8).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::BodyTooLarge);
    }
}
