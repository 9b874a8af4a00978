//! `[limits]` and `[tiers]`: the numbers that the classes of the contract count by, and what teams pay for.
//!
//! What is written stands over the defaults key by key, so `[limits.per_ip] requests = 500` keeps the window. A class of
//! the contract without a number is a problem, never a class without a limit.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use paperkey_proto::Contract;
use serde::{Deserialize, Serialize};

/// The class that refused credentials count by. It is no class of the contract, since no method is known yet.
pub const REFUSED_CREDENTIALS: &str = "refused_credentials";

/// The tier that every team begins with, and that a team is on whose tier is no longer configured.
pub const FIRST_TIER: &str = "free";

/// The most calls of one window that a limit can count.
const MAX_REQUESTS: u32 = 10_000_000;
/// The longest window: a week.
const MAX_WINDOW_S: u32 = 7 * 86_400;
/// Meters of one installation at most.
const MAX_METERS: usize = 100;

/// The limits of all classes.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(from = "BTreeMap<String, WrittenClass>")]
pub struct Limits(BTreeMap<String, ClassLimit>);

/// The limit of one class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct ClassLimit {
    /// Calls within the window. For `per_key`, those of keys that belong to no team; the others go by their tier.
    pub requests: u32,
    /// The window in seconds.
    pub window_s: u32,
    /// What happens when the shared store is gone.
    pub on_store_failure: OnStoreFailure,
}

/// What a limit does while the store is gone that gateways share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum OnStoreFailure {
    /// Each gateway lets through its share, so that the sum stays within the limit.
    #[default]
    Open,
    /// Every call is refused.
    Closed,
}

/// A class as it is written: what is absent is the default's.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct WrittenClass {
    requests: Option<u32>,
    window_s: Option<u32>,
    on_store_failure: Option<OnStoreFailure>,
}

impl ClassLimit {
    /// The window.
    pub fn window(&self) -> Duration {
        Duration::from_secs(self.window_s.into())
    }
}

impl Limits {
    /// The limit of a class.
    pub fn class(&self, word: &str) -> Option<ClassLimit> {
        self.0.get(word).copied()
    }

    /// What is wrong.
    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let words = Contract::get().rate_classes().map(|(_, options)| options.word.as_str());
        let known: BTreeSet<&str> = words.chain([REFUSED_CREDENTIALS]).collect();
        for class in &known {
            if !self.0.contains_key(*class) {
                problems.push(format!("limits.{class} is missing: it needs requests and window_s"));
            }
        }
        for (class, limit) in &self.0 {
            if !known.contains(class.as_str()) {
                let known = known.iter().copied().collect::<Vec<_>>().join(", ");
                problems.push(format!("limits.{class} is unknown: the classes are {known}"));
                continue;
            }
            if !(1..=MAX_REQUESTS).contains(&limit.requests) {
                problems.push(format!("limits.{class}.requests must be between 1 and {MAX_REQUESTS}"));
            }
            if !(1..=MAX_WINDOW_S).contains(&limit.window_s) {
                problems.push(format!("limits.{class}.window_s must be between 1 and {MAX_WINDOW_S}"));
            }
        }
        problems
    }
}

impl Default for Limits {
    fn default() -> Self {
        let limit = |requests, window_s| ClassLimit { requests, window_s, on_store_failure: OnStoreFailure::Open };
        let classes = [
            ("per_key", limit(3_000, 60)),
            ("per_ip", limit(100, 60)),
            ("auth", limit(5, 15 * 60)),
            ("license_validate", limit(30, 60)),
            ("license_activate", limit(10, 60 * 60)),
            ("test_key", limit(5, 60 * 60)),
            (REFUSED_CREDENTIALS, limit(30, 60)),
        ];
        Self(classes.into_iter().map(|(word, limit)| (word.to_owned(), limit)).collect())
    }
}

impl From<BTreeMap<String, WrittenClass>> for Limits {
    fn from(written: BTreeMap<String, WrittenClass>) -> Self {
        let mut limits = Self::default();
        for (class, written) in written {
            // A class that nobody knows has no defaults, and what is then missing is a problem.
            let nothing = ClassLimit { requests: 0, window_s: 0, on_store_failure: OnStoreFailure::Open };
            let limit = limits.0.entry(class).or_insert(nothing);
            limit.requests = written.requests.unwrap_or(limit.requests);
            limit.window_s = written.window_s.unwrap_or(limit.window_s);
            limit.on_store_failure = written.on_store_failure.unwrap_or(limit.on_store_failure);
        }
        limits
    }
}

/// All tiers.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(from = "BTreeMap<String, WrittenTier>")]
pub struct Tiers(BTreeMap<String, Tier>);

/// What a team has paid for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tier {
    /// Calls a minute of each key.
    pub requests_per_minute: u32,
    /// Units a month, by meter; a meter that is not named is unlimited.
    pub quota: BTreeMap<String, i64>,
    /// What the tier includes: `api`, `webhooks`.
    pub features: BTreeSet<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct WrittenTier {
    requests_per_minute: Option<u32>,
    quota: BTreeMap<String, i64>,
    features: Option<BTreeSet<String>>,
}

/// What a tier may include or withhold.
const FEATURES: [&str; 2] = ["api", "webhooks"];

impl Tiers {
    /// The tier of that name.
    pub fn get(&self, name: &str) -> Option<&Tier> {
        self.0.get(name)
    }

    /// The tier of that name, or the first where there is none of that name any more.
    pub fn of_team(&self, name: &str) -> &Tier {
        static NOTHING: std::sync::LazyLock<Tier> = std::sync::LazyLock::new(Tier::default);
        self.0.get(name).or_else(|| self.0.get(FIRST_TIER)).unwrap_or(&NOTHING)
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tier)> {
        self.0.iter().map(|(name, tier)| (name.as_str(), tier))
    }

    /// Whether any tier names a meter.
    pub fn has_meter(&self, word: &str) -> bool {
        self.0.values().any(|tier| tier.quota.contains_key(word))
    }

    /// All meters that any tier names.
    pub fn meters(&self) -> BTreeSet<&str> {
        self.0.values().flat_map(|tier| tier.quota.keys().map(String::as_str)).collect()
    }

    pub(super) fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (name, tier) in &self.0 {
            if !is_word(name) {
                problems.push(format!("tiers.{name} must be named by at most 64 of a-z, 0-9, _ and -"));
            }
            if !(1..=MAX_REQUESTS).contains(&tier.requests_per_minute) {
                problems
                    .push(format!("tiers.{name}.requests_per_minute is missing or not between 1 and {MAX_REQUESTS}"));
            }
            for (meter, units) in &tier.quota {
                if !is_word(meter) {
                    problems.push(format!("tiers.{name}.quota.{meter}: a meter is named by a-z, 0-9, _ and -"));
                }
                if *units < 0 {
                    problems.push(format!("tiers.{name}.quota.{meter} must be 0 or more"));
                }
            }
            for feature in &tier.features {
                if !FEATURES.contains(&feature.as_str()) {
                    problems.push(format!("tiers.{name}.features may hold {}", FEATURES.join(", ")));
                }
            }
        }
        if self.meters().len() > MAX_METERS {
            problems.push(format!("tiers name more than {MAX_METERS} meters"));
        }
        problems
    }
}

impl Default for Tiers {
    fn default() -> Self {
        let tier = |requests_per_minute, renders: Option<i64>| Tier {
            requests_per_minute,
            quota: renders.map(|renders| ("renders".to_owned(), renders)).into_iter().collect(),
            features: FEATURES.map(str::to_owned).into(),
        };
        let tiers = [
            (FIRST_TIER, tier(60, Some(100))),
            ("starter", tier(120, Some(500))),
            ("builder", tier(300, Some(2_500))),
            ("pro", tier(600, Some(10_000))),
            ("scale", tier(3_000, None)),
        ];
        Self(tiers.into_iter().map(|(name, tier)| (name.to_owned(), tier)).collect())
    }
}

impl From<BTreeMap<String, WrittenTier>> for Tiers {
    fn from(written: BTreeMap<String, WrittenTier>) -> Self {
        let mut tiers = Self::default();
        for (name, written) in written {
            let new = Tier { features: FEATURES.map(str::to_owned).into(), ..Tier::default() };
            let tier = tiers.0.entry(name).or_insert(new);
            tier.requests_per_minute = written.requests_per_minute.unwrap_or(tier.requests_per_minute);
            tier.quota.extend(written.quota);
            if let Some(features) = written.features {
                tier.features = features;
            }
        }
        tiers
    }
}

/// Whether a name is plain enough to stand in paths, headers and events.
pub fn is_word(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_' || byte == b'-';
    (1..=64).contains(&name.len()) && name.bytes().all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(text: &str) -> Limits {
        toml::from_str(text).unwrap()
    }

    #[test]
    fn every_class_of_the_contract_has_a_number() {
        assert_eq!(Limits::default().problems(), Vec::<String>::new());
        let mut without = Limits::default();
        without.0.remove("license_validate");
        assert_eq!(without.problems(), ["limits.license_validate is missing: it needs requests and window_s"]);
    }

    #[test]
    fn what_is_written_stands_over_the_defaults_key_by_key() {
        let limits = limits("[per_ip]\nrequests = 500\n[auth]\non_store_failure = \"closed\"");
        let per_ip = limits.class("per_ip").unwrap();
        assert_eq!((per_ip.requests, per_ip.window_s), (500, 60));
        let auth = limits.class("auth").unwrap();
        assert_eq!((auth.requests, auth.on_store_failure), (5, OnStoreFailure::Closed));
        assert_eq!(limits.problems(), Vec::<String>::new());
    }

    #[test]
    fn a_class_that_nobody_counts_by_and_a_limit_of_nothing_are_refused() {
        let problems = limits("[per_moon]\nrequests = 1\nwindow_s = 1\n[auth]\nrequests = 0").problems();
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].starts_with("limits.auth.requests must be between"), "{problems:?}");
        assert!(problems[1].starts_with("limits.per_moon is unknown"), "{problems:?}");
    }

    #[test]
    fn tiers_are_changed_and_added() {
        let text = "[free]\nquota.pages = 7\n[huge]\nrequests_per_minute = 9\nfeatures = [\"api\"]";
        let tiers: Tiers = toml::from_str(text).unwrap();
        assert_eq!(tiers.problems(), Vec::<String>::new());
        let free = tiers.get("free").unwrap();
        assert_eq!((free.requests_per_minute, free.quota["pages"], free.quota["renders"]), (60, 7, 100));
        assert!(!tiers.get("huge").unwrap().features.contains("webhooks"));
        assert_eq!(tiers.meters().into_iter().collect::<Vec<_>>(), ["pages", "renders"]);
        assert_eq!(tiers.of_team("gone").requests_per_minute, 60);
        let problems = toml::from_str::<Tiers>("[x]\nfeatures = [\"flying\"]").unwrap().problems();
        assert_eq!(problems.len(), 2, "{problems:?}");
    }
}
