//! Endpoints, and the addresses that they may have.

use std::net::IpAddr;

use http::{Uri, uri::Scheme};
use paperkey_proto::Error;

use super::address::is_public;

/// Endpoints that a product may have, and a team of its own.
pub(crate) const MAX_ENDPOINTS: u64 = 20;

/// How long the secret of before signs beside the one that has replaced it.
pub(crate) const PREVIOUS_SECRET_MS: i64 = 24 * 3_600 * 1_000;

/// Whether an endpoint is sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Status {
    /// It is.
    Active,
    /// Its deliveries wait until it is resumed.
    Paused,
}

impl Status {
    /// The word that is stored.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Paused => "paused",
        }
    }

    /// The status by its word.
    pub(crate) fn of(word: &str) -> Option<Self> {
        match word {
            "active" => Some(Self::Active),
            "paused" => Some(Self::Paused),
            _ => None,
        }
    }
}

/// An address that events of a product, or of a team, are sent to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Endpoint {
    pub(crate) id: String,
    /// Empty for one of the team.
    pub(crate) product_id: String,
    pub(crate) url: String,
    pub(crate) events: Vec<String>,
    pub(crate) status: Status,
    pub(crate) consecutive_failures: i64,
    pub(crate) created_at_ms: i64,
    pub(crate) updated_at_ms: i64,
    /// Until when the secret before the present one signs too, where it still does.
    pub(crate) previous_secret_until_ms: Option<i64>,
}

/// What to change of an endpoint.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    pub(crate) url: Option<String>,
    pub(crate) events: Option<Vec<String>>,
    pub(crate) status: Option<Status>,
}

impl Endpoint {
    /// The endpoint with the changes made. Setting it active clears the count of failures.
    pub(crate) fn changed(&self, changes: Changes) -> Self {
        let mut after = self.clone();
        if let Some(url) = changes.url {
            after.url = url;
        }
        if let Some(events) = changes.events {
            after.events = events;
        }
        if let Some(status) = changes.status {
            after.status = status;
            if status == Status::Active {
                after.consecutive_failures = 0;
            }
        }
        after
    }
}

/// What an installation allows in addresses.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UrlRules {
    /// Plain http as well.
    pub(crate) allow_http: bool,
    /// Addresses that are not public as well.
    pub(crate) allow_private_networks: bool,
}

/// An address in its parts, as a request needs them.
pub(crate) struct Target {
    pub(crate) uri: Uri,
    /// The name, or the address without brackets.
    pub(crate) host: String,
    pub(crate) port: u16,
}

impl UrlRules {
    /// Reads an address. What this accepts is what is later dialled: there is one parser.
    pub(crate) fn read(self, url: &str) -> Result<Target, Error> {
        let refuse = |why: &str| Error::field("url", why);
        if !url.is_ascii() {
            return Err(refuse("must be ASCII: write an international name in its xn-- form and escape other text"));
        }
        if url.bytes().any(|byte| byte.is_ascii_control() || byte == b' ' || byte == b'\\') {
            return Err(refuse("must not contain spaces, control characters or backslashes"));
        }
        if url.contains('#') {
            return Err(refuse("must not have a fragment (#…): it would not be sent"));
        }
        let absolute = || refuse("must be an absolute URL such as https://example.com/hooks");
        let uri: Uri = url.parse().map_err(|_| absolute())?;
        let (Some(scheme), Some(authority)) = (uri.scheme(), uri.authority()) else { return Err(absolute()) };
        let default_port = if *scheme == Scheme::HTTPS {
            443
        } else if *scheme == Scheme::HTTP && self.allow_http {
            80
        } else {
            return Err(refuse("must begin with https://"));
        };
        if authority.as_str().contains('@') {
            return Err(refuse("must not hold a user name or password: deliveries are signed instead"));
        }
        let host = authority.host();
        let port = match authority.as_str().strip_prefix(host) {
            Some("") => default_port,
            Some(rest) => rest
                .strip_prefix(':')
                .and_then(|port| port.parse().ok())
                .filter(|port| *port != 0)
                .ok_or_else(|| refuse("must have a port from 1 to 65535, or none"))?,
            None => return Err(absolute()),
        };
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        match host.parse::<IpAddr>() {
            Ok(address) if !self.allow_private_networks && !is_public(address) => {
                return Err(refuse("must be a public address: this one is private or reserved"));
            }
            Ok(_) => {}
            Err(_) => self.judge_name(host)?,
        }
        Ok(Target { host: host.to_owned(), port, uri })
    }

    fn judge_name(self, name: &str) -> Result<(), Error> {
        let refuse = |why: &str| Err(Error::field("url", why));
        let name = name.strip_suffix('.').unwrap_or(name);
        let label = |label: &str| {
            (1..=63).contains(&label.len())
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
        };
        if name.len() > 253 || !name.split('.').all(label) {
            return refuse("must name a host, such as https://example.com/hooks");
        }
        // Resolvers take `127.1`, `0x7f000001` and `2130706433` for addresses; people do not.
        let last = name.rsplit('.').next().unwrap_or(name);
        if last.bytes().all(|byte| byte.is_ascii_digit()) || last.get(..2).is_some_and(|s| s.eq_ignore_ascii_case("0x"))
        {
            return refuse("must name a host or a complete address with four numbers");
        }
        if !self.allow_private_networks && last.eq_ignore_ascii_case("localhost") {
            return refuse("must be a public address: this one is the machine itself");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRICT: UrlRules = UrlRules { allow_http: false, allow_private_networks: false };
    const LAX: UrlRules = UrlRules { allow_http: true, allow_private_networks: true };

    fn fault(rules: UrlRules, url: &str) -> Option<String> {
        let error = rules.read(url).err()?;
        assert_eq!(error.violations().len(), 1);
        assert_eq!(error.violations()[0].field, "url");
        Some(error.violations()[0].message.clone())
    }

    #[test]
    fn https_at_a_name_or_a_public_address_is_accepted() {
        for (url, host, port) in [
            ("https://example.com", "example.com", 443),
            ("https://example.com/hooks?x=1&y=%20", "example.com", 443),
            ("HTTPS://Example.com:8443/", "Example.com", 8443),
            ("https://xn--bcher-kva.example/", "xn--bcher-kva.example", 443),
            ("https://1.1.1.1/", "1.1.1.1", 443),
            ("https://[2606:4700:4700::1111]:444/", "2606:4700:4700::1111", 444),
            ("https://example.com./", "example.com.", 443),
        ] {
            let target = STRICT.read(url).unwrap_or_else(|error| panic!("{url}: {:?}", error.violations()));
            assert_eq!((target.host.as_str(), target.port), (host, port), "{url}");
        }
        assert_eq!(LAX.read("http://localhost:3000/hook").unwrap().port, 3000);
        assert_eq!(LAX.read("http://[::1]/").unwrap().port, 80);
    }

    #[test]
    fn everything_else_is_refused_and_says_why() {
        for url in [
            "",
            "example.com",
            "/hooks",
            "//example.com/",
            "https://",
            "https:///hooks",
            "https:example.com",
            "http://example.com/",
            "ftp://example.com/",
            "file:///etc/passwd",
            "javascript:alert(1)",
            "https://user@example.com/",
            "https://user:password@example.com/",
            "https://example.com@127.0.0.1/",
            "https://example.com/#part",
            "https://example.com:0/",
            "https://example.com:65536/",
            "https://example.com:/",
            "https://example.com:http/",
            "https://example.com/a b",
            "https://example.com\\@127.0.0.1/",
            "https://exämple.com/",
            "https://example..com/",
            "https://*.example.com/",
            "https://exa\nmple.com/",
            "https://127.0.0.1/",
            "https://10.1.2.3:8443/",
            "https://169.254.169.254/latest/meta-data",
            "https://[::1]/",
            "https://[::ffff:10.0.0.1]/",
            "https://[fe80::1%25eth0]/",
            "https://127.1/",
            "https://0x7f000001/",
            "https://0X7f.1/",
            "https://2130706433/",
            "https://0177.0.0.1/",
            "https://localhost/",
            "https://foo.LOCALHOST./",
        ] {
            assert!(fault(STRICT, url).is_some_and(|why| !why.is_empty()), "{url} was accepted");
        }
        assert!(fault(LAX, "gopher://example.com/").is_some());
        let long = format!("https://{}.com/", "a".repeat(64));
        assert!(fault(STRICT, &long).is_some());
    }
}
