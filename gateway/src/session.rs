//! Sessions of people in browsers: the JWT of an account in a cookie, which no script can read.
//!
//! A browser sends a cookie whoever made it call. So the cookie is `SameSite=Strict`, and beside it a call needs an
//! `Origin` that is our own: other sites under the same registrable domain, other ports of one machine and old browsers
//! are kept out by that. Whoever wants a cookie in the first place needs it as well, so that nobody is signed in
//! as somebody else. A call that has both a credential of its own and a cookie is one by its credential.
//!
//! Which answers hold a session, and what ends one, the contract says. Whoever came by cookie is given a new session
//! as a cookie too, asked for or not: a script that could read it would be what the cookie keeps out.
//!
//! Deliberately absent: anything kept here. A cookie is the JWT and nothing else, and is judged like one.

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Uri,
    header::{COOKIE, HOST, ORIGIN, SET_COOKIE},
};
use paperkey_proto::{Error, errors::v1::Reason};

use crate::{call::Call, edge, transcode::without_text};

/// What the header is called in messages.
const SHOWN: &str = "Paperkey-Session";
/// The header, and the metadata entry of gRPC, by which a session is asked for as a cookie.
const HEADER: HeaderName = HeaderName::from_static("paperkey-session");
/// Its only value.
const AS_COOKIE: &str = "cookie";

/// The name of the cookie where connections are encrypted: browsers take it only for this very host.
const SECURE_NAME: &str = "__Host-paperkey";
/// And where they are not.
const PLAIN_NAME: &str = "paperkey_session";

/// How long a browser keeps a session that does not say how long it is good, in seconds: seven days.
const MAX_AGE_S: i64 = 7 * 24 * 60 * 60;

/// How cookies are given, and from where they are taken.
#[derive(Clone, Debug)]
pub(crate) struct Sessions {
    name: &'static str,
    secure: bool,
    /// The origin of our own pages; none where nobody has said under which URL they are.
    origin: Option<String>,
}

/// What becomes of the session that a call makes or ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// Nothing: the caller is shown it, or holds no cookie.
    #[default]
    Shown,
    /// What this field of the answer says goes into a cookie.
    Kept(u32),
    /// The cookie that the caller holds goes.
    Ended,
}

/// Where a request came from, as far as cookies care.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sender<'a> {
    pub(crate) headers: &'a HeaderMap,
    pub(crate) uri: &'a Uri,
}

impl Sessions {
    /// Sessions of a gateway under that URL. Where it was not configured, pages of whatever host was called are ours.
    pub(crate) fn new(public_url: &str, is_configured: bool) -> Self {
        let secure = edge::is_https(public_url);
        let origin = public_url.parse::<Uri>().ok().and_then(|url| Some(origin(secure, url.authority()?.as_str())));
        Self { name: if secure { SECURE_NAME } else { PLAIN_NAME }, secure, origin: origin.filter(|_| is_configured) }
    }

    /// Whether a request brings a cookie of ours, be it good or not.
    pub(crate) fn are_sent(&self, headers: &HeaderMap) -> bool {
        self.sent(headers).next().is_some()
    }

    /// The session of a request's cookie, if it brings one. It must come from a page of ours.
    pub(crate) fn session<'a>(&self, sender: Sender<'a>) -> Result<Option<&'a str>, Error> {
        let mut sent = self.sent(sender.headers);
        let Some(session) = sent.next() else { return Ok(None) };
        self.must_be_ours(sender)?;
        // Which of two is meant is not ours to guess. Only sessions are put into cookies, and they have dots.
        let is_session = |text: &&str| text.contains('.') && text.bytes().all(|byte| byte.is_ascii_graphic());
        let session = std::str::from_utf8(session).ok().filter(is_session).filter(|_| sent.next().is_none());
        session.map(Some).ok_or_else(Error::unauthenticated)
    }

    /// Whether a caller asks for the session that is in this field of the answer as a cookie. They must be a page of
    /// ours.
    pub(crate) fn asked_for(&self, sender: Sender<'_>, field: u32) -> Result<Outcome, Error> {
        let mut values = sender.headers.get_all(HEADER).iter();
        match (values.next().map(HeaderValue::as_bytes), values.next()) {
            (None, _) => Ok(Outcome::Shown),
            (Some(value), None) if value == AS_COOKIE.as_bytes() => {
                self.must_be_ours(sender).map(|()| Outcome::Kept(field))
            }
            _ => Err(Error::field(SHOWN, format!("must be {AS_COOKIE}, once, or be left out"))),
        }
    }

    /// What a call ends that ends sessions: whatever cookie of ours the caller's browser has sent.
    pub(crate) fn ended_for(&self, sender: Sender<'_>) -> Outcome {
        let is_held = self.are_sent(sender.headers) && self.must_be_ours(sender).is_ok();
        if is_held { Outcome::Ended } else { Outcome::Shown }
    }

    /// Does with the session of an answer what is to be done: the message as its caller sees it.
    pub(crate) fn settle(&self, message: Bytes, call: &mut Call, now_ms: i64) -> Result<Bytes, Error> {
        match call.session {
            Outcome::Shown => Ok(message),
            Outcome::Ended => {
                self.forget(call);
                Ok(message)
            }
            Outcome::Kept(field) => {
                let (rest, session) = without_text(&message, field)?;
                if let Some(session) = session.filter(|session| !session.is_empty()) {
                    call.told.tell(SET_COOKIE, self.cookie(session, now_ms)?);
                }
                Ok(rest.into())
            }
        }
    }

    /// Tells a browser to forget its cookie.
    pub(crate) fn forget(&self, call: &mut Call) {
        if let Ok(nothing) = HeaderValue::from_str(&self.attributes("", 0)) {
            call.told.tell(SET_COOKIE, nothing);
        }
    }

    fn cookie(&self, session: &str, now_ms: i64) -> Result<HeaderValue, Error> {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_');
        if !session.bytes().all(fits) {
            return Err(Error::internal("a session cannot be put into a cookie"));
        }
        let max_age_s = expiry_s(session).map_or(MAX_AGE_S, |at_s| at_s - now_ms.div_euclid(1_000));
        let mut cookie = HeaderValue::from_str(&self.attributes(session, max_age_s.max(0))).map_err(Error::internal)?;
        cookie.set_sensitive(true);
        Ok(cookie)
    }

    fn attributes(&self, session: &str, max_age_s: i64) -> String {
        let secure = if self.secure { "; Secure" } else { "" };
        format!("{}={session}; Path=/; HttpOnly; SameSite=Strict; Max-Age={max_age_s}{secure}", self.name)
    }

    fn sent<'h>(&self, headers: &'h HeaderMap) -> impl Iterator<Item = &'h [u8]> + use<'h> {
        let name = self.name;
        crumbs(headers).filter(move |crumb| name_of(crumb) == name.as_bytes()).map(value_of)
    }

    /// Refuses a request that no page of ours has sent.
    fn must_be_ours(&self, sender: Sender<'_>) -> Result<(), Error> {
        let mut said = sender.headers.get_all(ORIGIN).iter();
        let said = said.next().filter(|_| said.next().is_none()).map(HeaderValue::as_bytes);
        let ours = self.origin.clone().or_else(|| Some(origin(self.secure, authority(sender)?)));
        match (ours, said) {
            (Some(ours), Some(said)) if said == ours.as_bytes() => Ok(()),
            (ours, _) => Err(self.foreign(ours.as_deref())),
        }
    }

    fn foreign(&self, ours: Option<&str>) -> Error {
        let ours = ours.unwrap_or("that of the host called");
        let told = if self.origin.is_some() { "" } else { " (behind a proxy, set server.public_url)" };
        Error::new(Reason::ScopeInsufficient)
            .with_message(format!("A session in a cookie is for our own pages: the Origin must be {ours}{told}"))
            .with_agent_message(format!(
                "Sessions in cookies are for browsers, on pages of the origin {ours}, which the header Origin must \
                 name. Programs send 'Authorization: Bearer <token>' and no cookie, and leave {SHOWN} out."
            ))
    }
}

/// Takes cookies of ours out of a line of cookies that goes to somebody else; none where nothing else is left.
pub(crate) fn without_ours(line: &[u8]) -> Option<Vec<u8>> {
    let is_ours = |crumb: &[u8]| [SECURE_NAME, PLAIN_NAME].iter().any(|name| name.as_bytes() == name_of(crumb));
    if !split(line).any(is_ours) {
        return Some(line.to_vec());
    }
    let others: Vec<&[u8]> = split(line).filter(|crumb| !is_ours(crumb)).map(<[u8]>::trim_ascii).collect();
    Some(others.join(&b"; "[..])).filter(|line| !line.is_empty())
}

/// Whether a `Set-Cookie` of somebody else's would put a cookie of ours into a browser. One without a name is sent back
/// as its value alone, which may look like ours.
pub(crate) fn sets_ours(line: &[u8]) -> bool {
    let crumb = split(line).next().unwrap_or_default();
    let named = crumb.iter().position(|byte| *byte != b'=' && !byte.is_ascii_whitespace()).unwrap_or(crumb.len());
    [SECURE_NAME, PLAIN_NAME].iter().any(|name| name.as_bytes() == name_of(&crumb[named..]))
}

/// HTTP/2 may send cookies in several lines.
fn crumbs(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    headers.get_all(COOKIE).into_iter().flat_map(|line| split(line.as_bytes()))
}

fn split(line: &[u8]) -> impl Iterator<Item = &[u8]> {
    line.split(|byte| *byte == b';')
}

fn name_of(crumb: &[u8]) -> &[u8] {
    crumb.split(|byte| *byte == b'=').next().unwrap_or_default().trim_ascii()
}

fn value_of(crumb: &[u8]) -> &[u8] {
    let at = crumb.iter().position(|byte| *byte == b'=').map_or(crumb.len(), |at| at + 1);
    crumb[at..].trim_ascii()
}

/// The host that was called, with its port.
fn authority(sender: Sender<'_>) -> Option<&str> {
    let mut hosts = sender.headers.get_all(HOST).iter();
    let host = hosts.next().filter(|_| hosts.next().is_none()).and_then(|host| host.to_str().ok());
    sender.uri.authority().map(http::uri::Authority::as_str).or(host).filter(|host| !host.is_empty())
}

/// An origin as browsers write it: in lower case, and without the port that goes without saying.
fn origin(secure: bool, authority: &str) -> String {
    let host = authority.rsplit('@').next().unwrap_or_default().to_ascii_lowercase();
    let (scheme, port) = if secure { ("https", ":443") } else { ("http", ":80") };
    format!("{scheme}://{}", host.strip_suffix(port).unwrap_or(&host))
}

/// When a session ends, in seconds since 1970. Nothing is decided by it but when a browser throws it away.
fn expiry_s(session: &str) -> Option<i64> {
    let claims = URL_SAFE_NO_PAD.decode(session.split('.').nth(1)?).ok()?;
    serde_json::from_slice::<serde_json::Value>(&claims).ok()?.get("exp")?.as_i64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(of: &[(HeaderName, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in of {
            headers.append(name.clone(), HeaderValue::from_static(value));
        }
        headers
    }

    fn session(sessions: &Sessions, of: &[(HeaderName, &'static str)]) -> Result<Option<String>, Reason> {
        let (headers, uri) = (headers(of), Uri::from_static("/products"));
        let found = sessions.session(Sender { headers: &headers, uri: &uri });
        found.map(|found| found.map(str::to_owned)).map_err(|error| error.reason())
    }

    const OURS: (HeaderName, &str) = (ORIGIN, "https://keys.example");

    #[test]
    fn a_session_is_found_among_other_cookies() {
        let sessions = Sessions::new("https://keys.example/paperkey", true);
        let found = |line| session(&sessions, &[OURS, (COOKIE, line)]);
        let good = Ok(Some("a.b.c".to_owned()));
        for line in [
            "__Host-paperkey=a.b.c",
            "a=1; __Host-paperkey=a.b.c; b",
            "a;__Host-paperkey = a.b.c ;",
            ";; __Host-paperkey=a.b.c",
        ] {
            assert_eq!(found(line), good, "{line}");
        }
        for line in
            ["", "paperkey_session=a.b.c", "x__Host-paperkey=a.b.c", "__host-paperkey=a.b.c", "__Host-paperkey2=a.b.c"]
        {
            assert_eq!(found(line), Ok(None), "{line}");
        }
        let two = [OURS, (COOKIE, "a=1"), (COOKIE, "__Host-paperkey=a.b.c")];
        assert_eq!(session(&sessions, &two), good);
    }

    #[test]
    fn what_is_no_session_or_two_of_them_is_no_good() {
        let sessions = Sessions::new("https://keys.example", true);
        let lines = [
            "__Host-paperkey=",
            "__Host-paperkey",
            "__Host-paperkey=sk_1",
            "__Host-paperkey=a b.c",
            "__Host-paperkey=a.b.c; __Host-paperkey=a.b.c",
        ];
        for line in lines {
            assert_eq!(session(&sessions, &[OURS, (COOKIE, line)]), Err(Reason::InvalidCredentials), "{line}");
        }
        let two = [OURS, (COOKIE, "__Host-paperkey=a.b.c"), (COOKIE, "__Host-paperkey=a.b.c")];
        assert_eq!(session(&sessions, &two), Err(Reason::InvalidCredentials));
        let mut odd = headers(&[OURS]);
        odd.insert(COOKIE, HeaderValue::from_bytes(b"__Host-paperkey=a.\xff.c").unwrap());
        let refused = sessions.session(Sender { headers: &odd, uri: &Uri::from_static("/") }).unwrap_err();
        assert_eq!(refused.reason(), Reason::InvalidCredentials);
    }

    #[test]
    fn the_origin_is_the_configured_one_and_nothing_like_it() {
        let good =
            [("https://keys.example", "https://keys.example"), ("https://KEYS.example:443", "https://keys.example")];
        for (url, origin) in good.into_iter().chain([("https://keys.example:8443/x", "https://keys.example:8443")]) {
            let found = session(&Sessions::new(url, true), &[(ORIGIN, origin), (COOKIE, "__Host-paperkey=a.b.c")]);
            assert_eq!(found, Ok(Some("a.b.c".to_owned())), "{url}");
        }
        let sessions = Sessions::new("https://keys.example", true);
        let foreign = [
            "",
            "null",
            "https://keys.example/",
            "https://keys.example:443",
            "http://keys.example",
            "https://KEYS.example",
            "HTTPS://keys.example",
            "https://keys.example.evil.example",
            "https://app.keys.example",
            "https://keys.example:8443",
            "keys.example",
            "*",
            "https://keys.example, https://keys.example",
            "https://evil@keys.example",
        ];
        for origin in foreign {
            let found = session(&sessions, &[(ORIGIN, origin), (COOKIE, "__Host-paperkey=a.b.c")]);
            assert_eq!(found, Err(Reason::ScopeInsufficient), "{origin}");
        }
        let without = [(COOKIE, "__Host-paperkey=a.b.c")];
        assert_eq!(session(&sessions, &without), Err(Reason::ScopeInsufficient));
        let twice = [OURS, OURS, (COOKIE, "__Host-paperkey=a.b.c")];
        assert_eq!(session(&sessions, &twice), Err(Reason::ScopeInsufficient));
        // Not even the host that was called, where another was configured.
        let called = [(HOST, "evil.example"), (ORIGIN, "https://evil.example"), (COOKIE, "__Host-paperkey=a.b.c")];
        assert_eq!(session(&sessions, &called), Err(Reason::ScopeInsufficient));
    }

    #[test]
    fn without_a_configured_url_the_origin_is_that_of_the_host_called() {
        let sessions = Sessions::new("http://127.0.0.1:8080", false);
        let found = |host, origin| {
            session(&sessions, &[(HOST, host), (ORIGIN, origin), (COOKIE, "paperkey_session=a.b.c")]).is_ok()
        };
        for (host, origin) in [
            ("127.0.0.1:8080", "http://127.0.0.1:8080"),
            ("localhost:8080", "http://localhost:8080"),
            ("LocalHost:8080", "http://localhost:8080"),
            ("[::1]:8080", "http://[::1]:8080"),
            ("192.168.1.7", "http://192.168.1.7"),
            ("192.168.1.7:80", "http://192.168.1.7"),
        ] {
            assert!(found(host, origin), "{host} {origin}");
        }
        for (host, origin) in [
            ("localhost:8080", "http://localhost:3000"),
            ("localhost:8080", "http://localhost"),
            ("localhost:8080", "https://localhost:8080"),
            ("localhost:8080", "http://127.0.0.1:8080"),
            ("localhost:8080", "null"),
            ("", "http://"),
        ] {
            assert!(!found(host, origin), "{host} {origin}");
        }
        // What HTTP/2 and absolute requests name counts before the header.
        let sent = headers(&[(HOST, "other:1"), (ORIGIN, "http://localhost:8080"), (COOKIE, "paperkey_session=a.b.c")]);
        let uri = Uri::from_static("http://localhost:8080/products");
        assert!(sessions.session(Sender { headers: &sent, uri: &uri }).is_ok());
    }

    #[test]
    fn a_cookie_lives_as_long_as_its_session() {
        let secure = Sessions::new("https://keys.example", true);
        let plain = Sessions::new("http://127.0.0.1:8080", false);
        let token = |claims: &str| format!("e30.{}.x-_", URL_SAFE_NO_PAD.encode(claims));
        let of = |sessions: &Sessions, token: &str| {
            let cookie = sessions.cookie(token, 1_000_500).unwrap();
            assert!(cookie.is_sensitive());
            cookie.to_str().unwrap().to_owned()
        };
        let session = token(r#"{"exp": 1600}"#);
        assert_eq!(
            of(&secure, &session),
            format!("__Host-paperkey={session}; Path=/; HttpOnly; SameSite=Strict; Max-Age=600; Secure")
        );
        assert_eq!(
            of(&plain, &session),
            format!("paperkey_session={session}; Path=/; HttpOnly; SameSite=Strict; Max-Age=600")
        );
        for odd in ["{}", "[]", r#"{"exp": "soon"}"#, "nonsense"] {
            assert!(of(&plain, &token(odd)).ends_with("; Max-Age=604800"), "{odd}");
        }
        assert!(of(&plain, &token(r#"{"exp": 1}"#)).ends_with("; Max-Age=0"));
        for odd in ["a;b.c", "a.b c", "a.b\"c", "a.b,c", "a.b\r\nc"] {
            assert!(plain.cookie(odd, 0).is_err(), "{odd}");
        }
    }

    #[test]
    fn nobody_else_is_sent_a_cookie_of_ours() {
        let of = |line: &str| without_ours(line.as_bytes()).map(|line| String::from_utf8(line).unwrap());
        assert_eq!(of("a=1;b=2").as_deref(), Some("a=1;b=2"));
        assert_eq!(of("a=1; paperkey_session=x.y.z; b=2").as_deref(), Some("a=1; b=2"));
        assert_eq!(of("a=1;__Host-paperkey = x; b").as_deref(), Some("a=1; b"));
        assert_eq!(of("paperkey_session=x; __Host-paperkey=y"), None);
        assert_eq!(of("my_paperkey_session=x").as_deref(), Some("my_paperkey_session=x"));
    }

    #[test]
    fn nobody_else_sets_a_cookie_of_ours() {
        for ours in [
            "paperkey_session=x.y.z; Path=/",
            "__Host-paperkey=x; Secure; Path=/",
            " __Host-paperkey = x",
            "paperkey_session",
            "=paperkey_session=x",
        ] {
            assert!(sets_ours(ours.as_bytes()), "{ours}");
        }
        for theirs in
            ["", "a=1; paperkey_session=x", "my_paperkey_session=x", "a=paperkey_session", "__Host-paperkey2=x"]
        {
            assert!(!sets_ours(theirs.as_bytes()), "{theirs}");
        }
    }
}
