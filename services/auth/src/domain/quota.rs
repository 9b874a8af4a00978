//! Quotas: units that a team may use of a meter in a calendar month, what it used of them day by day, and when it is told
//! how far it has come.
//!
//! Deliberately absent: shares that are handed out in advance. Every unit is taken from the one balance, so that none is
//! lost and none is too many.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{Timestamp, ToSpan as _, civil::Date, tz::TimeZone};
use paperkey_proto::Error;

/// Units of a limit that a team has of its own, at most.
const MAX_UNITS: i64 = 1_000_000_000_000;

/// Longer than any id that tells consumptions from each other.
const MAX_CONSUME_ID_BYTES: usize = 128;

/// How long consumptions are told from each other, in milliseconds.
pub(crate) const CONSUMPTIONS_KEPT_MS: i64 = 7 * 24 * 60 * 60 * 1_000;

/// How many months of use are kept, the current one not counted.
pub(crate) const MONTHS_KEPT: i32 = 25;

/// How many days of use are kept, the current one not counted: more than can be asked for.
const DAYS_KEPT: i64 = 100;

/// How many days of use are answered at most.
const MAX_DAYS: i32 = 90;
/// How many are where nobody says.
const DEFAULT_DAYS: i32 = 30;

/// At which share of its limit a team is warned, in percent.
const WARNED_AT_PERCENT: i128 = 80;

/// A calendar month in UTC.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Month(String);

impl Month {
    /// The month of a moment.
    pub(crate) fn at(now_ms: i64) -> Self {
        Self::of(date_of(now_ms))
    }

    /// The first month that is still kept at a moment.
    pub(crate) fn first_kept(now_ms: i64) -> Self {
        let mut date = date_of(now_ms).first_of_month();
        for _ in 0..MONTHS_KEPT {
            date = date.yesterday().unwrap_or(date).first_of_month();
        }
        Self::of(date)
    }

    /// A stored month.
    pub(crate) fn stored(text: String) -> Self {
        Self(text)
    }

    fn of(date: Date) -> Self {
        Self(format!("{:04}-{:02}", date.year(), date.month()))
    }

    /// Such as `2026-11`.
    pub(crate) fn text(&self) -> &str {
        &self.0
    }

    fn first(&self) -> Option<Date> {
        format!("{}-01", self.0).parse().ok()
    }

    /// The day of this month that units count for which are taken at a moment. They may have waited for their turn until
    /// the month was over: what its days say is what it says.
    pub(crate) fn day_at(&self, now_ms: i64) -> Day {
        let date = date_of(now_ms);
        Day(self.first().map_or(date, |first| date.clamp(first, first.last_of_month())))
    }

    /// The first moment after it, in milliseconds since 1970.
    pub(crate) fn ends_at_ms(&self) -> i64 {
        let next = self.first().and_then(|first| first.last_of_month().tomorrow().ok());
        next.and_then(|next| next.to_zoned(TimeZone::UTC).ok()).map_or(0, |zoned| zoned.timestamp().as_millisecond())
    }
}

fn date_of(now_ms: i64) -> Date {
    TimeZone::UTC.to_datetime(Timestamp::from_millisecond(now_ms).unwrap_or(Timestamp::UNIX_EPOCH)).date()
}

/// A day in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Day(Date);

impl Day {
    /// The first day that is still kept at a moment.
    pub(crate) fn first_kept(now_ms: i64) -> Self {
        Self(date_of(now_ms)).back(DAYS_KEPT)
    }

    /// Such as `2026-11-22`.
    pub(crate) fn text(self) -> String {
        self.0.to_string()
    }

    fn back(self, days: i64) -> Self {
        Self(self.0.saturating_sub(days.days()))
    }
}

/// Days in a row, of which today is the last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Period {
    today: Day,
    days: i64,
}

impl Period {
    /// As a request says it.
    pub(crate) fn of_days(days: Option<i32>, now_ms: i64) -> Result<Self, Error> {
        let days = days.unwrap_or(DEFAULT_DAYS);
        if !(1..=MAX_DAYS).contains(&days) {
            return Err(Error::field("days", format!("must be between 1 and {MAX_DAYS}")));
        }
        Ok(Self { today: Day(date_of(now_ms)), days: days.into() })
    }

    /// Its days, oldest first.
    pub(crate) fn days(self) -> impl Iterator<Item = Day> {
        (0..self.days).rev().map(move |ago| self.today.back(ago))
    }

    pub(crate) fn first(self) -> Day {
        self.today.back(self.days - 1)
    }

    pub(crate) fn last(self) -> Day {
        self.today
    }
}

/// What was used of each meter on the days, by their text, on which something was.
pub(crate) type UsedByDay = BTreeMap<String, BTreeMap<String, i64>>;

/// What a team has used of one meter on each day of a period, oldest first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MeterHistory {
    pub(crate) meter: String,
    pub(crate) days: Vec<(Day, i64)>,
}

/// The history of those meters, and of all others that were used, in the order of their names.
pub(crate) fn histories(mut used: UsedByDay, meters: &BTreeSet<&str>, period: Period) -> Vec<MeterHistory> {
    used.retain(|meter, days| meters.contains(meter.as_str()) || days.values().any(|units| *units != 0));
    for meter in meters {
        used.entry((*meter).to_owned()).or_default();
    }
    let of = |(meter, days): (String, BTreeMap<String, i64>)| MeterHistory {
        meter,
        days: period.days().map(|day| (day, days.get(&day.text()).copied().unwrap_or(0))).collect(),
    };
    used.into_iter().map(of).collect()
}

/// What units are counted by.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Counter {
    pub(crate) team_id: String,
    pub(crate) meter: String,
    pub(crate) month: Month,
}

/// Units that somebody asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Consumption {
    /// Tells it from others, so that a repetition takes nothing.
    pub(crate) id: String,
    pub(crate) units: i64,
}

/// How it came out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Whether the units were taken.
    pub(crate) granted: bool,
    /// Where that leaves the counter, or left it where this is said again.
    pub(crate) balance: Balance,
    pub(crate) resets_at_ms: i64,
}

/// How much of a limit is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Balance {
    pub(crate) used: i64,
    /// None for unlimited.
    pub(crate) limit: Option<i64>,
}

impl Balance {
    /// Takes units, all of them or none.
    pub(crate) fn take(&mut self, units: i64) -> bool {
        match self.used.checked_add(units) {
            Some(used) if self.limit.is_none_or(|limit| used <= limit) => {
                self.used = used;
                true
            }
            _ => false,
        }
    }

    /// Whether so much is used that the team is warned. Of nothing there is no share.
    fn is_warned(self) -> bool {
        self.limit
            .is_some_and(|limit| limit > 0 && i128::from(self.used) * 100 >= i128::from(limit) * WARNED_AT_PERCENT)
    }

    /// Whether nothing is left.
    fn is_used_up(self) -> bool {
        self.limit.is_some_and(|limit| self.used >= limit)
    }
}

/// How far a team has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Threshold {
    Warning,
    Exceeded,
}

/// That a team was told of a threshold, and of which limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) at_ms: i64,
    pub(crate) limit: i64,
}

impl Told {
    /// Whether it is told now. Once, where the limit stays: units that are given back and taken again are no news. After
    /// the limit has changed, again where the threshold is crossed anew.
    fn anew(told: Option<Self>, limit: i64, was_crossed: bool, is_crossed: bool) -> bool {
        is_crossed && told.is_none_or(|told| told.limit != limit && !was_crossed)
    }
}

/// Of what a team was told this month.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Notices {
    pub(crate) warned: Option<Told>,
    pub(crate) exceeded: Option<Told>,
}

impl Notices {
    /// Notes, and answers, what the team is to be told now that it has come from one balance to the other. That somebody
    /// asked for more than is left is told to them alone: the limit is not reached.
    pub(crate) fn note(&mut self, before: Balance, after: Balance, at_ms: i64) -> Vec<Threshold> {
        let Some(limit) = after.limit else { return Vec::new() };
        let mut news = Vec::new();
        if Told::anew(self.warned, limit, before.is_warned(), after.is_warned()) {
            self.warned = Some(Told { at_ms, limit });
            news.push(Threshold::Warning);
        }
        if Told::anew(self.exceeded, limit, before.is_used_up(), after.is_used_up()) {
            self.exceeded = Some(Told { at_ms, limit });
            news.push(Threshold::Exceeded);
        }
        news
    }
}

/// What a team has used of one meter this month.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MeterUse {
    pub(crate) meter: String,
    pub(crate) balance: Balance,
}

/// Limits that a team has in place of its tier's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct OwnLimits {
    pub(crate) requests_per_minute: Option<i64>,
    pub(crate) quotas: BTreeMap<String, i64>,
}

impl OwnLimits {
    /// Refuses meters that no tier names, and quotas of less than nothing.
    pub(crate) fn judged(self, meters: &BTreeSet<&str>) -> Result<Self, Error> {
        for (meter, units) in &self.quotas {
            if !meters.contains(meter.as_str()) {
                let known = meters.iter().copied().collect::<Vec<_>>().join(", ");
                return Err(Error::field("quotas", format!("may name only known meters: {known}")));
            }
            if !(0..=MAX_UNITS).contains(units) {
                return Err(Error::field(format!("quotas.{meter}"), format!("must be between 0 and {MAX_UNITS}")));
            }
        }
        Ok(self)
    }
}

/// Refuses what cannot tell consumptions from each other.
pub(crate) fn consume_id(id: String) -> Result<String, Error> {
    let plain = id.bytes().all(|byte| byte.is_ascii_graphic());
    if plain && (1..=MAX_CONSUME_ID_BYTES).contains(&id.len()) {
        Ok(id)
    } else {
        Err(Error::field(
            "consume_id",
            format!("must be 1 to {MAX_CONSUME_ID_BYTES} visible characters of ASCII, without spaces"),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 30 November 2026, 23:59:59.999.
    const LAST_MS: i64 = 1_796_083_199_999;

    fn of(used: i64, limit: i64) -> Balance {
        Balance { used, limit: Some(limit) }
    }

    #[test]
    fn a_month_ends_where_the_next_begins() {
        let (november, december) = (Month::at(LAST_MS), Month::at(LAST_MS + 1));
        assert_eq!((november.text(), december.text()), ("2026-11", "2026-12"));
        assert_eq!(november.ends_at_ms(), LAST_MS + 1);
        assert_eq!(Month::at(december.ends_at_ms()).text(), "2027-01");
        // Of a leap year.
        assert_eq!(Month::stored("2028-02".to_owned()).ends_at_ms(), 1_835_481_600_000);
        assert_eq!(Month::first_kept(LAST_MS).text(), "2024-10");
        assert_eq!(Month::at(i64::MAX).text(), "1970-01", "what is no time is no reason to end");
    }

    #[test]
    fn units_that_waited_until_the_month_was_over_count_for_its_last_day() {
        let (november, december) = (Month::at(LAST_MS), Month::at(LAST_MS + 1));
        assert_eq!(november.day_at(LAST_MS).text(), "2026-11-30");
        assert_eq!(november.day_at(LAST_MS + 1).text(), "2026-11-30");
        assert_eq!(december.day_at(LAST_MS + 1).text(), "2026-12-01");
        assert_eq!(december.day_at(LAST_MS).text(), "2026-12-01", "a clock that was set back");
    }

    #[test]
    fn a_period_has_each_of_its_days_once_and_today_is_the_last() {
        let days =
            |days, at_ms| -> Vec<String> { Period::of_days(days, at_ms).unwrap().days().map(Day::text).collect() };
        assert_eq!(days(Some(1), LAST_MS), ["2026-11-30"]);
        assert_eq!(days(Some(3), LAST_MS + 1), ["2026-11-29", "2026-11-30", "2026-12-01"]);
        let usual = days(None, LAST_MS);
        assert_eq!((usual.len(), usual[0].as_str(), usual[29].as_str()), (30, "2026-11-01", "2026-11-30"));
        let period = Period::of_days(Some(90), LAST_MS).unwrap();
        assert_eq!(period.days().count(), 90);
        assert_eq!((period.days().next(), period.days().last()), (Some(period.first()), Some(period.last())));
        assert!(Day::first_kept(LAST_MS) < period.first());
        for nonsense in [i32::MIN, -1, 0, 91, i32::MAX] {
            assert_eq!(Period::of_days(Some(nonsense), LAST_MS).unwrap_err().violations()[0].field, "days");
        }
    }

    #[test]
    fn a_history_has_every_known_meter_and_every_other_that_was_used() {
        let period = Period::of_days(Some(2), LAST_MS).unwrap();
        let on = |day: &str, units| BTreeMap::from([(day.to_owned(), units)]);
        let used = BTreeMap::from([
            ("zeppelins".to_owned(), on("2026-11-29", 3)),
            // All of it was given back.
            ("balloons".to_owned(), on("2026-11-29", 0)),
            ("pages".to_owned(), on("2026-11-30", 2)),
        ]);
        let found: Vec<(String, Vec<i64>)> = histories(used, &BTreeSet::from(["renders", "pages"]), period)
            .into_iter()
            .map(|history| (history.meter, history.days.into_iter().map(|(_, units)| units).collect()))
            .collect();
        let expected = [("pages", [0, 2]), ("renders", [0, 0]), ("zeppelins", [3, 0])];
        assert_eq!(found, expected.map(|(meter, days)| (meter.to_owned(), days.to_vec())));
    }

    #[test]
    fn units_are_taken_up_to_the_limit_and_not_one_more() {
        let mut balance = of(97, 100);
        assert!(!balance.take(4) && balance.take(2) && !balance.take(2) && balance.take(1) && !balance.take(1));
        assert_eq!(balance, of(100, 100));
        let mut over = of(7, 5);
        assert!(!over.take(1), "after a smaller tier nothing is left, and nothing is taken back");
        let mut unlimited = Balance { used: i64::MAX - 1, limit: None };
        assert!(unlimited.take(1) && !unlimited.take(1));
    }

    #[test]
    fn a_threshold_is_told_once_however_often_units_go_and_come() {
        let mut notices = Notices::default();
        assert_eq!(notices.note(of(0, 10), of(7, 10), 1), []);
        assert_eq!(notices.note(of(7, 10), of(8, 10), 2), [Threshold::Warning]);
        assert_eq!(notices.note(of(7, 10), of(8, 10), 3), []);
        // Of what was refused nothing is told, however often, until the limit is reached.
        assert_eq!(notices.note(of(8, 10), of(8, 10), 4), []);
        assert_eq!(notices.note(of(8, 10), of(10, 10), 5), [Threshold::Exceeded]);
        assert_eq!(notices.note(of(10, 10), of(10, 10), 6), []);
        assert_eq!(notices.warned, Some(Told { at_ms: 2, limit: 10 }));
        let mut both = Notices::default();
        assert_eq!(both.note(of(0, 10), of(10, 10), 1), [Threshold::Warning, Threshold::Exceeded]);
    }

    #[test]
    fn after_a_change_of_the_limit_only_what_is_crossed_anew_is_told() {
        let told = || {
            let mut notices = Notices::default();
            assert_eq!(notices.note(of(0, 100), of(100, 100), 1).len(), 2);
            notices
        };
        // Far more, and then that is used as well.
        let mut notices = told();
        assert_eq!(notices.note(of(100, 500), of(101, 500), 2), []);
        assert_eq!(notices.note(of(399, 500), of(400, 500), 3), [Threshold::Warning]);
        assert_eq!(notices.note(of(400, 500), of(500, 500), 4), [Threshold::Exceeded]);
        // A little more: it was warned already.
        assert_eq!(told().note(of(100, 110), of(110, 110), 2), [Threshold::Exceeded]);
        // Less: it was told already.
        assert_eq!(told().note(of(100, 50), of(100, 50), 2), []);
        // And back again.
        assert_eq!(told().note(of(90, 100), of(100, 100), 2), []);
    }

    #[test]
    fn nothing_of_nothing_and_nothing_of_everything_is_told_of() {
        let mut notices = Notices::default();
        assert_eq!(notices.note(of(0, 0), of(0, 0), 1), [Threshold::Exceeded]);
        let unlimited = Balance { used: 0, limit: None };
        assert_eq!(notices.note(unlimited, Balance { used: 1 << 40, ..unlimited }, 2), []);
        let huge = i64::MAX;
        assert_eq!(notices.note(of(0, huge), of(huge - 1, huge), 3), [Threshold::Warning]);
    }

    #[test]
    fn limits_of_a_team_name_known_meters_and_no_less_than_nothing() {
        let meters = BTreeSet::from(["pages", "renders"]);
        let judged = |meter: &str, units| {
            let quotas = BTreeMap::from([(meter.to_owned(), units)]);
            OwnLimits { quotas, ..OwnLimits::default() }.judged(&meters)
        };
        assert!(judged("pages", 0).is_ok() && judged("renders", MAX_UNITS).is_ok());
        assert_eq!(judged("pages", -1).unwrap_err().violations()[0].field, "quotas.pages");
        assert_eq!(judged("pages", MAX_UNITS + 1).unwrap_err().violations()[0].field, "quotas.pages");
        let unknown = judged("flights", 1).unwrap_err();
        assert_eq!(unknown.violations()[0].field, "quotas");
    }
}
