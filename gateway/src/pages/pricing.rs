//! `/pricing`: every tier, limit and quota of this installation, as it is configured. What a tier costs is not configured;
//! `[billing] url` says who knows.
//!
//! Deliberately absent: numbers that the configuration or the contract have, written once more. What else is bounded
//! stands in [`BOUNDS`].

use paperkey_kit::config::{
    Limits,
    limits::{ClassLimit, OnStoreFailure, REFUSED_CREDENTIALS, Tier},
};
use paperkey_proto::{Contract, error::catalogue, errors::v1::Reason};

use super::{
    document::{Block, Document, Span},
    errors,
};
use crate::GatewayConfig;

/// Where it is.
pub(super) const PATH: &str = "/pricing";

/// What it is called.
pub(super) const NAME: &str = "Plans and limits";

/// What each class of calls is, and the error of the call that is too many.
const CLASSES: [(&str, &str, Reason); 7] = [
    (
        "per_key",
        "Each key that belongs to no team, on the team and platform paths. Keys of teams have the requests a minute of their tier.",
        Reason::RateLimited,
    ),
    ("per_ip", "Each address, on the dashboard and client paths, and all calls without a key", Reason::RateLimited),
    ("auth", "Each address: sign-up, sign-in, passwords and invitations", Reason::AuthRateLimited),
    ("license_validate", "Each licence key: validations", Reason::LicenseRateLimited),
    ("license_activate", "Each licence key: activations and deactivations together", Reason::LicenseRateLimited),
    ("test_key", "Each address: test keys made without an account", Reason::RateLimited),
    (REFUSED_CREDENTIALS, "Each address: calls whose credential was refused", Reason::RateLimited),
];

/// What is bounded beside limits and quotas.
const BOUNDS: [(&str, &str); 34] = [
    ("Active keys of a team, live and test together", "10"),
    ("User tokens of one user in a team", "50"),
    ("Keys of one hour that the reference makes, of a team at a time", "20"),
    ("Active key pairs of a product", "10"),
    ("Addresses or networks in the allowlist of a key", "100"),
    ("A key's own requests a minute", "1,000,000, and never more than its team's"),
    ("Life of a `pb_test_` key", "24 hours"),
    ("Life of a free key", "28 days"),
    ("Overlap of the old token after a rotation", "24 hours, or 0 to 168 by choice"),
    ("Days between automatic rotations", "1 to 365"),
    ("Revoked and expired keys in lists", "90 days"),
    ("Tokens in one report of a leak", "100"),
    ("Teams of one account", "50"),
    ("Members and open invitations of a team", "100"),
    ("Invitations that a team mails in 24 hours", "100, and one a minute to the same address"),
    ("Life of an invitation", "7 days"),
    ("Life of a session", "7 days"),
    ("Failed sign-ins of one account in 15 minutes", "10"),
    ("Mails to reset the password of one account in an hour", "5"),
    ("Life of a link that resets a password", "30 minutes"),
    ("Length of a password", "8 to 256 characters"),
    ("Metadata of a product, client or licence", "16 KB"),
    ("Length of a fingerprint", "255 characters"),
    ("Activations that a licence is shown with", "the 100 most recent"),
    ("Licences in one batch", "1,000"),
    ("Lines of one import, and of each line", "1,000,000, and 64 KB"),
    ("Entries on one page of a list", "100, 20 where nothing is said"),
    ("`Idempotency-Key`", "255 characters, remembered for 24 hours"),
    ("Webhook endpoints of a product, and of a team's own", "20"),
    ("Events that an endpoint names", "50"),
    ("Deliveries that an endpoint shows", "the last 100"),
    ("Answer to a delivery that is read, and kept", "16 KB, and 1 KB"),
    ("Failures in a row that pause an endpoint", "10"),
    ("Streams of events of one product, and of a team in all", "10, and 50"),
];

/// The page.
pub(super) fn page(config: &GatewayConfig) -> Document {
    let mut blocks = vec![
        Block::Title(Span::text(NAME)),
        Block::Text(Span::text(
            "What each tier of this installation includes, and every limit there is: as configured, and the same for \
             everybody. Every answer says in its headers what is left.",
        )),
    ];
    if let Some(url) = &config.billing_url {
        blocks.push(Block::Text(vec![
            Span::Text("To change the plan of your team, see ".into()),
            Span::Link(Box::new(Span::Text(url.clone())), url.clone()),
            Span::Text(".".into()),
        ]));
    }
    blocks.push(Block::Heading("Tiers"));
    blocks.push(tiers(config));
    blocks.push(Block::Text(Span::text(
        "Requests a minute are those of each key. Units are counted for a team by the calendar month in UTC, and test mode \
         takes none. A team begins on the tier free.",
    )));
    blocks.push(Block::Heading("Rate limits"));
    blocks.push(classes(&config.limits));
    blocks.push(Block::Text(Span::text(
        "Windows slide: in no window of that length are more calls let through, and a refused call uses up nothing. While \
         Redis is away, through which several gateways share their limits, a limit is shared out among them, or nobody \
         passes.",
    )));
    blocks.push(Block::Heading("Sizes of bodies"));
    blocks.push(bodies(config));
    blocks.push(Block::Heading("Other bounds"));
    let rows = BOUNDS.iter().map(|(what, most)| vec![spans(what), spans(most)]);
    blocks.push(Block::Table(vec!["What", "At most"], rows.collect()));
    Document { title: NAME.into(), blocks }
}

fn tiers(config: &GatewayConfig) -> Block {
    let mut tiers: Vec<(&str, &Tier)> = config.tiers.iter().collect();
    tiers.sort_by_key(|(name, tier)| (tier.requests_per_minute, *name));
    let meters = config.tiers.meters();
    let rows = tiers.into_iter().map(|(name, tier)| {
        let units = meters.iter().map(|meter| match tier.quota.get(*meter) {
            Some(units) => format!("{meter}: {}", thousands(*units)),
            None => format!("{meter}: unlimited"),
        });
        let features: Vec<&str> = tier.features.iter().map(String::as_str).collect();
        let features = if features.is_empty() { "none".to_owned() } else { features.join(", ") };
        vec![
            Span::code(name),
            Span::text(thousands(tier.requests_per_minute)),
            Span::text(units.collect::<Vec<_>>().join(", ")),
            Span::text(features),
        ]
    });
    Block::Table(vec!["Tier", "Requests a minute", "Units a month", "Features"], rows.collect())
}

fn classes(limits: &Limits) -> Block {
    let rows = CLASSES.iter().filter_map(|(word, what, reason)| {
        let limit = limits.class(word)?;
        let (_, entry) = catalogue().find(|(known, _)| known == reason)?;
        let error = Span::Link(Box::new(Span::Code(entry.agent_code.clone())), errors::page_of(&entry.agent_code));
        Some(vec![
            Span::code(*word),
            Span::text(often(&limit)),
            Span::text(*what),
            vec![error],
            Span::text(away(&limit)),
        ])
    });
    Block::Table(vec!["Class", "Calls", "Counted for", "Error", "Redis away"], rows.collect())
}

fn away(limit: &ClassLimit) -> &'static str {
    match limit.on_store_failure {
        OnStoreFailure::Open => "shared out",
        OnStoreFailure::Closed => "nobody passes",
    }
}

fn bodies(config: &GatewayConfig) -> Block {
    let public = || Contract::get().methods().iter().filter(|method| method.is_public());
    let usual = public().map(|method| method.max_body_bytes()).min().unwrap_or_default();
    let mut rows = vec![vec![Span::text("Any call, where nothing else is said"), Span::text(size(usual as u64))]];
    for method in public().filter(|method| method.max_body_bytes() != usual) {
        let routes = method
            .routes
            .iter()
            .flat_map(|route| [Span::Code(format!("{} {}", route.verb, route.template)), Span::Text(" ".into())]);
        rows.push(vec![routes.collect(), Span::text(size(method.max_body_bytes() as u64))]);
    }
    for upstream in &config.upstreams {
        rows.push(vec![Span::code(upstream.path.clone()), Span::text(size(upstream.max_body_bytes))]);
    }
    Block::Table(vec!["Call", "At most"], rows)
}

/// Text in which backquotes mean code.
fn spans(text: &str) -> Vec<Span> {
    let piece = |(place, piece): (usize, &str)| {
        if place % 2 == 0 { Span::Text(piece.to_owned()) } else { Span::Code(piece.to_owned()) }
    };
    text.split('`').enumerate().filter(|(_, piece)| !piece.is_empty()).map(piece).collect()
}

fn often(limit: &ClassLimit) -> String {
    let window = match limit.window_s {
        1 => "second".to_owned(),
        60 => "minute".to_owned(),
        3_600 => "hour".to_owned(),
        86_400 => "day".to_owned(),
        s if s % 86_400 == 0 => format!("{} days", s / 86_400),
        s if s % 3_600 == 0 => format!("{} hours", s / 3_600),
        s if s % 60 == 0 => format!("{} minutes", s / 60),
        s => format!("{s} seconds"),
    };
    let per = if window.contains(' ') { "in" } else { "a" };
    let per = if window == "hour" { "an" } else { per };
    format!("{} {per} {window}", thousands(limit.requests))
}

fn size(bytes: u64) -> String {
    let units = [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
    let whole = units.into_iter().find(|(unit, _)| bytes >= *unit && bytes.is_multiple_of(*unit));
    whole.map_or_else(|| format!("{} bytes", thousands(bytes)), |(unit, name)| format!("{} {name}", bytes / unit))
}

fn thousands(number: impl Into<i128>) -> String {
    let digits = number.into().to_string();
    let mut out = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    fn config(limits: &str, tiers: &str) -> GatewayConfig {
        GatewayConfig {
            public_url: "https://keys.example".into(),
            public_url_is_configured: true,
            trusted_proxies: Vec::new(),
            trusted_parents: Vec::new(),
            cors_any_origin: false,
            call_timeout_ms: 1_000,
            upstreams: Vec::new(),
            tiers: Arc::new(toml::from_str(tiers).unwrap()),
            limits: toml::from_str(limits).unwrap(),
            billing_url: Some("https://example.com/plans".into()),
            version: "0",
        }
    }

    #[test]
    fn every_number_is_the_configured_one() {
        let config = config(
            "[per_ip]\nrequests = 1234\nwindow_s = 90\non_store_failure = \"closed\"",
            "[free]\nrequests_per_minute = 61\nquota.pages = 7\n[huge]\nrequests_per_minute = 9999999\nfeatures = [\"api\"]",
        );
        let text = page(&config).markdown(Some("https://keys.example"));
        for part in [
            "| `free` | 61 | pages: 7, renders: 100 | api, webhooks |",
            "| `huge` | 9,999,999 | pages: unlimited, renders: unlimited | api |",
            "| `per_ip` | 1,234 in 90 seconds |",
            "nobody passes",
            "| `auth` | 5 in 15 minutes |",
            "| `license_activate` | 10 an hour |",
            "(https://example.com/plans)",
            "| Any call, where nothing else is said | 64 KiB |",
        ] {
            assert!(text.contains(part), "{part} is not in {text}");
        }
    }

    #[test]
    fn no_class_of_the_contract_is_left_out() {
        let words = Contract::get().rate_classes().map(|(_, options)| options.word.as_str());
        for word in words.chain([REFUSED_CREDENTIALS]) {
            assert!(CLASSES.iter().any(|(known, ..)| *known == word), "{word}");
        }
    }
}
