//! Alerts: what a team should know of, in words, and what of it belongs together.
//!
//! Names are other people's words: whatever could end a line is taken out of them, and what Slack reads as markup. Never
//! a token, only the first characters that lists show as well.

use ipnet::IpNet;
use paperkey_kit::{
    principal::{Tenant, mode_word},
    values::{plain_time, rfc3339},
};
use paperkey_proto::{auth::v1::AlertCause, principal::v1::Mode};
use serde_json::{Map, Value as Json, json};

use super::{api_key::ApiKey, letter::one_line};

/// One alert is made of all that one cause brings about within this time.
pub(crate) const HOUR_MS: i64 = 60 * 60 * 1_000;
/// How long alerts are kept.
pub(crate) const KEPT_MS: i64 = 90 * DAY_MS;
/// How long those are kept that are in nobody's feed.
pub(crate) const NOBODYS_KEPT_MS: i64 = DAY_MS;
/// How long a network is known for a key that is not used from it.
pub(crate) const NETWORK_KNOWN_MS: i64 = 30 * DAY_MS;
/// How many networks are known of a key: of more, those unseen for longest are forgotten.
pub(crate) const MAX_NETWORKS: u64 = 1_000;
/// How long after its rotation a key may still be used without a word: holders change over.
pub(crate) const OVERLAP_GRACE_MS: i64 = 60_000;
/// How many Owners and Admins of a team are mailed.
pub(crate) const MAX_RECIPIENTS: u64 = 20;
/// How many posts to Slack may wait; others are not told there.
pub(crate) const MAX_POSTS: i64 = 1_000;
/// How many alerts of an hour that belong to nobody are told to Slack: their subjects are strangers' addresses.
pub(crate) const NOBODYS_POSTS: u64 = 20;
/// How many alerts of an hour that belong to nobody there are before further strangers' addresses are no news.
pub(crate) const MAX_NOBODYS: u64 = 1_000;

const DAY_MS: i64 = 24 * HOUR_MS;
const MAX_MESSAGE_CHARS: usize = 500;
const MAX_SUBJECT_CHARS: usize = 200;
/// How long lists of details grow within an hour.
const MAX_LISTED: usize = 20;
const PREFIX: &str = "ALERT_CAUSE_";

/// Something a team should know of, as it happens.
#[derive(Clone, Debug)]
pub(crate) struct NewAlert {
    /// Why.
    pub(crate) cause: AlertCause,
    /// What it is about: the id of a key or a webhook, a meter, or an address.
    pub(crate) subject: String,
    /// For a person, in one sentence.
    pub(crate) message: String,
    /// What else is known: an object. Never a secret.
    pub(crate) details: Json,
}

/// An alert as it is kept.
#[derive(Clone, Debug)]
pub(crate) struct Alert {
    pub(crate) id: String,
    pub(crate) cause: AlertCause,
    pub(crate) subject: String,
    pub(crate) message: String,
    pub(crate) count: i64,
    pub(crate) details: Json,
    pub(crate) created_at_ms: i64,
    pub(crate) last_at_ms: i64,
}

/// A key, as alerts speak of it: one of a team, or the pair of a product.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AlertKey {
    pub(crate) id: String,
    pub(crate) name: String,
    /// As lists show it.
    pub(crate) prefix: String,
    /// Whose it is; the team is empty for the system key.
    pub(crate) tenant: Tenant,
}

/// Many calls of one key or address that were refused.
#[derive(Clone, Debug)]
pub(crate) struct Burst {
    /// `None` where the credential was not known.
    pub(crate) key_id: Option<String>,
    pub(crate) ip: String,
    pub(crate) refused: i64,
    pub(crate) since_ms: i64,
}

/// A webhook that was paused.
#[derive(Clone, Debug)]
pub(crate) struct PausedWebhook {
    pub(crate) id: String,
    pub(crate) host: String,
    /// Empty for one of the team.
    pub(crate) product_id: String,
    pub(crate) failures: i64,
    /// Whether the receiver said that it is gone.
    pub(crate) gone: bool,
}

/// The word of a cause, as it is stored and shown.
pub(crate) fn cause_word(cause: AlertCause) -> String {
    cause.as_str_name().trim_start_matches(PREFIX).to_ascii_lowercase()
}

/// The cause of a stored word. One that is not known is unspecified.
pub(crate) fn cause_of(word: &str) -> AlertCause {
    AlertCause::from_str_name(&format!("{PREFIX}{}", word.to_ascii_uppercase())).unwrap_or_default()
}

/// What a cause is called, over a letter.
pub(crate) fn title(cause: AlertCause) -> &'static str {
    match cause {
        AlertCause::Unspecified => "Alert",
        AlertCause::QuotaWarning => "Quota almost used up",
        AlertCause::QuotaExceeded => "Quota used up",
        AlertCause::KeyExpiring => "API key expires soon",
        AlertCause::KeyRotationDue => "API key should be rotated",
        AlertCause::OldKeyUsed => "Rotated API key still used",
        AlertCause::NewNetwork => "API key used from a new network",
        AlertCause::RefusalBurst => "Many calls refused",
        AlertCause::RevokedKeyUsed => "Revoked API key used",
        AlertCause::WebhookPaused => "Webhook paused",
        AlertCause::KeyLeaked => "API key leaked",
    }
}

/// When the hour of a time began.
pub(crate) fn hour_of(at_ms: i64) -> i64 {
    at_ms.div_euclid(HOUR_MS).saturating_mul(HOUR_MS)
}

/// A network as gateways write it: the /24 of an IPv4 address, or the /48 of an IPv6 address. Anything else is none.
pub(crate) fn network(text: &str) -> Option<String> {
    let network: IpNet = text.parse().ok()?;
    let length = if network.addr().is_ipv4() { 24 } else { 48 };
    (network.prefix_len() == length && network.trunc() == network).then(|| network.to_string())
}

/// What the details of an alert become when it happens once more: the later take the place of the earlier, and lists
/// grow by what is new.
pub(crate) fn merged(earlier: &Json, later: &Json) -> Json {
    let (Some(earlier), Some(later)) = (earlier.as_object(), later.as_object()) else { return later.clone() };
    let mut merged: Map<String, Json> = earlier.clone();
    for (name, value) in later {
        match (merged.get_mut(name), value) {
            (Some(Json::Array(known)), Json::Array(more)) => {
                let new: Vec<&Json> = more.iter().filter(|one| !known.contains(one)).collect();
                let room = MAX_LISTED.saturating_sub(known.len());
                let new: Vec<Json> = new.into_iter().take(room).cloned().collect();
                known.extend(new);
            }
            _ => drop(merged.insert(name.clone(), value.clone())),
        }
    }
    Json::Object(merged)
}

/// An alert as Slack takes it.
pub(crate) fn slack_text(cause: AlertCause, team: Option<&str>, mode: Mode, message: &str) -> String {
    let (title, message) = (title(cause), slack_escaped(message));
    match team {
        None => format!("*{title}*\n{message}"),
        Some(team) => {
            let (team, mode) = (slack_escaped(&one_line(team)), mode_word(mode));
            format!("*{title}*\nTeam {team} ({mode}): {message}")
        }
    }
}

/// A text in which Slack finds no link, no mention and no entity.
fn slack_escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

impl From<&ApiKey> for AlertKey {
    fn from(key: &ApiKey) -> Self {
        Self {
            id: key.id.clone(),
            name: key.terms.name.clone(),
            prefix: key.shown_prefix.clone(),
            tenant: Tenant { team_id: key.team_id.clone().unwrap_or_default(), mode: key.mode },
        }
    }
}

impl AlertKey {
    fn called(&self) -> String {
        format!("\"{}\" ({}…)", one_line(&self.name), self.prefix)
    }

    /// The alert, with what is known of the key among its details.
    fn alert(&self, cause: AlertCause, message: String, details: &Json) -> NewAlert {
        let key = json!({"keyId": self.id, "name": self.name, "prefix": self.prefix});
        NewAlert { cause, subject: self.id.clone(), message, details: merged(&key, details) }
    }

    /// It ends within so many days.
    pub(crate) fn expires(&self, expires_at_ms: i64, days: i64) -> NewAlert {
        let (key, at) = (self.called(), plain_time(expires_at_ms));
        let within = if days == 1 { "within a day".to_owned() } else { format!("within {days} days") };
        let details = json!({"expiresAt": rfc3339(expires_at_ms), "withinDays": days});
        self.alert(AlertCause::KeyExpiring, format!("The key {key} expires {within}, on {at}"), &details)
    }

    /// Its holder should rotate it.
    pub(crate) fn rotation_is_due(&self, since_ms: i64) -> NewAlert {
        let (key, since) = (self.called(), plain_time(since_ms));
        let message = format!("The key {key} should be rotated, since {since}");
        self.alert(AlertCause::KeyRotationDue, message, &json!({"dueAt": rfc3339(since_ms)}))
    }

    /// It was found where it should not be, and works on.
    pub(crate) fn leaked(&self) -> NewAlert {
        let message = format!("The key {} was found where it should not be, and still works", self.called());
        self.alert(AlertCause::KeyLeaked, message, &json!({}))
    }

    /// It was rotated, and its old token is still used.
    pub(crate) fn still_used(
        &self,
        superseded_by: &str,
        expires_at_ms: Option<i64>,
        network: Option<&str>,
    ) -> NewAlert {
        let from = network.map_or_else(String::new, |network| format!(" from {network}"));
        let until = expires_at_ms.map_or_else(String::new, |at_ms| format!("; it ends on {}", plain_time(at_ms)));
        let message = format!("The old token of the key {} is still used{from}{until}", self.called());
        let details = json!({
            "supersededBy": superseded_by,
            "expiresAt": expires_at_ms.map(rfc3339),
            "networks": network.into_iter().collect::<Vec<_>>(),
        });
        self.alert(AlertCause::OldKeyUsed, message, &details)
    }

    /// It was used from a network that is new for it.
    pub(crate) fn seen_in(&self, network: &str) -> NewAlert {
        let message = format!("The key {} was used from {network} for the first time in 30 days", self.called());
        self.alert(AlertCause::NewNetwork, message, &json!({"networks": [network]}))
    }

    /// Many of its calls were refused.
    pub(crate) fn refused(&self, burst: &Burst) -> NewAlert {
        let Burst { refused, since_ms, ip, .. } = burst;
        let (key, since) = (self.called(), plain_time(*since_ms));
        let message = format!("{refused} calls of the key {key} were refused since {since}, the last from {ip}");
        self.alert(AlertCause::RefusalBurst, message, &burst.details())
    }

    /// Somebody tried it after it was revoked.
    pub(crate) fn tried_after_its_end(&self, revoked_at_ms: i64) -> NewAlert {
        let (key, at) = (self.called(), plain_time(revoked_at_ms));
        let message = format!("Somebody tried the key {key}, which was revoked on {at}");
        self.alert(AlertCause::RevokedKeyUsed, message, &json!({"revokedAt": rfc3339(revoked_at_ms)}))
    }
}

impl Burst {
    fn details(&self) -> Json {
        json!({"refused": self.refused, "since": rfc3339(self.since_ms), "addresses": [self.ip]})
    }

    /// It came from one address, with credentials that nobody knows.
    pub(crate) fn of_address(&self) -> NewAlert {
        let Self { refused, since_ms, ip, .. } = self;
        let message = format!("{refused} calls from {ip} were refused since {}", plain_time(*since_ms));
        NewAlert { cause: AlertCause::RefusalBurst, subject: ip.clone(), message, details: self.details() }
    }
}

impl PausedWebhook {
    /// As an alert.
    pub(crate) fn alert(&self) -> NewAlert {
        let Self { id, host, product_id, failures, gone } = self;
        let host = one_line(host);
        let why = if *gone {
            "its receiver says that it is gone".to_owned()
        } else {
            format!("{failures} deliveries in a row have failed")
        };
        let mut details = json!({"webhookId": id, "host": host, "failures": failures});
        if !product_id.is_empty() {
            details["productId"] = product_id.as_str().into();
        }
        let message = format!("The webhook {id} to {host} is paused: {why}");
        NewAlert { cause: AlertCause::WebhookPaused, subject: id.clone(), message, details }
    }
}

impl NewAlert {
    /// The same, no longer than it may be.
    pub(crate) fn bounded(mut self) -> Self {
        self.message = cut(one_line(&self.message), MAX_MESSAGE_CHARS);
        self.subject = cut(one_line(&self.subject), MAX_SUBJECT_CHARS);
        self
    }
}

fn cut(text: String, chars: usize) -> String {
    match text.char_indices().nth(chars) {
        Some((at, _)) => text[..at].to_owned(),
        None => text,
    }
}

impl Alert {
    /// The `data` of its event.
    pub(crate) fn event_data(&self) -> Json {
        json!({
            "id": self.id,
            "cause": cause_word(self.cause),
            "subject": self.subject,
            "message": self.message,
            "count": self.count,
            "details": self.details,
            "createdAt": rfc3339(self.created_at_ms),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key() -> AlertKey {
        let tenant = Tenant { team_id: "team_1".into(), mode: Mode::Live };
        AlertKey { id: "key_1".into(), name: "CI".into(), prefix: "pk_live_abcd".into(), tenant }
    }

    #[test]
    fn every_cause_comes_back_from_its_word() {
        for number in 1..=10 {
            let cause = AlertCause::try_from(number).unwrap();
            assert_eq!(cause_of(&cause_word(cause)), cause);
            assert_ne!(title(cause), "Alert");
        }
        assert_eq!(cause_word(AlertCause::KeyLeaked), "key_leaked");
        assert_eq!(cause_of("eaten"), AlertCause::Unspecified);
    }

    #[test]
    fn an_hour_begins_at_its_first_millisecond() {
        assert_eq!([hour_of(0), hour_of(HOUR_MS - 1), hour_of(HOUR_MS)], [0, 0, HOUR_MS]);
    }

    #[test]
    fn a_network_is_what_a_gateway_writes_and_nothing_else() {
        for good in ["203.0.113.0/24", "2001:db8:1::/48", "0.0.0.0/24"] {
            assert_eq!(network(good).as_deref(), Some(good));
        }
        for bad in ["", "203.0.113.7/24", "203.0.113.0/25", "2001:db8::/64", "2001:db8::1/48", "203.0.113.0", "<x>"] {
            assert_eq!(network(bad), None, "{bad}");
        }
    }

    #[test]
    fn later_details_take_the_place_of_earlier_ones_and_lists_grow_to_a_bound() {
        let merge = merged(&json!({"a": 1, "b": 1, "n": ["x"]}), &json!({"b": 2, "n": ["x", "y"]}));
        assert_eq!(merge, json!({"a": 1, "b": 2, "n": ["x", "y"]}));
        let many: Vec<i64> = (0..100).collect();
        assert_eq!(merged(&json!({"n": [-1]}), &json!({"n": many}))["n"].as_array().unwrap().len(), MAX_LISTED);
    }

    #[test]
    fn slack_reads_no_mention_and_no_link_in_a_name() {
        let mut key = key();
        key.name = "<!channel> <https://evil|x> & co\n*bold*".into();
        let alert = key.seen_in("203.0.113.0/24").bounded();
        let text = slack_text(alert.cause, Some("<@U1>"), Mode::Test, &alert.message);
        assert!(!text.contains(['<', '>']), "{text}");
        assert!(text.contains("&lt;!channel&gt;") && text.contains("&amp; co *bold*"), "{text}");
        assert!(text.contains("Team &lt;@U1&gt; (test): The key"), "{text}");
    }

    #[test]
    fn what_is_long_is_cut_where_a_character_ends() {
        let alert = NewAlert {
            cause: AlertCause::QuotaWarning,
            subject: "ä".repeat(1_000),
            message: "ä\n".repeat(1_000),
            details: json!({}),
        };
        let alert = alert.bounded();
        assert_eq!((alert.subject.chars().count(), alert.message.chars().count()), (200, 500));
        assert!(!alert.message.contains('\n'));
    }

    #[test]
    fn messages_say_what_happened_to_which_key() {
        let burst = Burst { key_id: None, ip: "203.0.113.7".into(), refused: 20, since_ms: 1_798_675_200_000 };
        for (alert, said) in [
            (
                key().expires(1_798_675_200_000, 7),
                "The key \"CI\" (pk_live_abcd…) expires within 7 days, on 31 December 2026, 00:00 UTC",
            ),
            (
                key().expires(1_798_675_200_000, 1),
                "The key \"CI\" (pk_live_abcd…) expires within a day, on 31 December 2026, 00:00 UTC",
            ),
            (key().still_used("key_2", None, None), "The old token of the key \"CI\" (pk_live_abcd…) is still used"),
            (
                key().refused(&burst),
                "20 calls of the key \"CI\" (pk_live_abcd…) were refused since 31 December 2026, 00:00 UTC, the last from 203.0.113.7",
            ),
        ] {
            assert_eq!(alert.message, said);
            assert_eq!((alert.subject.as_str(), &alert.details["keyId"]), ("key_1", &json!("key_1")));
        }
        assert_eq!(burst.of_address().subject, "203.0.113.7");
    }
}
