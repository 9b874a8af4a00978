//! Points in time: RFC 3339 outside, seconds and nanoseconds inside.
//!
//! Only RFC 3339 is read: no spaces, no week dates, no names of zones. Written is always UTC with milliseconds.

use jiff::civil;

/// The first and the last second that a `google.protobuf.Timestamp` may hold: the years 1 to 9999.
const SECONDS: std::ops::RangeInclusive<i64> = -62_135_596_800..=253_402_300_799;

/// Reads a point in time as seconds since 1970 and nanoseconds.
pub(super) fn parse(text: &str) -> Option<(i64, i32)> {
    let bytes = text.as_bytes();
    let digits = |from: usize, to: usize| -> Option<i16> {
        bytes
            .get(from..to)?
            .iter()
            .try_fold(0_i16, |number, byte| byte.is_ascii_digit().then(|| number * 10 + i16::from(byte - b'0')))
    };
    let mark = |at: usize, allowed: &[u8]| bytes.get(at).filter(|byte| allowed.contains(byte)).map(|_| ());
    let small = |from: usize| digits(from, from + 2).and_then(|number| i8::try_from(number).ok());

    let date = civil::Date::new(digits(0, 4)?, small(5)?, small(8)?).ok()?;
    mark(4, b"-")?;
    mark(7, b"-")?;
    mark(10, b"Tt")?;
    mark(13, b":")?;
    mark(16, b":")?;
    // A leap second is read as the second before it, as clocks do.
    let second = small(17).map(|second| if second == 60 { 59 } else { second })?;
    let clock = civil::Time::new(small(11)?, small(14)?, second, 0).ok()?;

    let mut at = 19;
    let mut nanos = 0_i32;
    if bytes.get(at) == Some(&b'.') {
        let fraction: &[u8] = bytes.get(at + 1..)?;
        let length = fraction.iter().take_while(|byte| byte.is_ascii_digit()).count();
        if length == 0 {
            return None;
        }
        let digits = fraction.iter().take(length).map(|digit| digit - b'0');
        nanos = digits.chain(std::iter::repeat(0)).take(9).fold(0, |nanos, digit| nanos * 10 + i32::from(digit));
        at += 1 + length;
    }
    let offset_seconds = match bytes.get(at)? {
        b'Z' | b'z' if bytes.len() == at + 1 => 0,
        sign @ (b'+' | b'-') if bytes.len() == at + 6 => {
            mark(at + 3, b":")?;
            let (hours, minutes) = (small(at + 1)?, small(at + 4)?);
            if hours > 23 || minutes > 59 {
                return None;
            }
            let seconds = i64::from(hours) * 3_600 + i64::from(minutes) * 60;
            if *sign == b'-' { -seconds } else { seconds }
        }
        _ => return None,
    };
    let since = date.to_datetime(clock).duration_since(civil::DateTime::constant(1970, 1, 1, 0, 0, 0, 0));
    let seconds = since.as_secs() - offset_seconds;
    SECONDS.contains(&seconds).then_some((seconds, nanos))
}

/// Writes a point in time in quotes, such as `"2026-12-31T00:00:00.000Z"`; `false` where it is none.
pub(super) fn write(out: &mut Vec<u8>, seconds: i64, nanos: i64) -> bool {
    if !SECONDS.contains(&seconds) || !(0..1_000_000_000).contains(&nanos) {
        return false;
    }
    let (days, second) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    let (year, month, day) = civil_of(days);
    let mut text = *b"\"0000-00-00T00:00:00.000Z\"";
    put(&mut text[1..5], year);
    put(&mut text[6..8], month);
    put(&mut text[9..11], day);
    put(&mut text[12..14], second / 3_600);
    put(&mut text[15..17], second / 60 % 60);
    put(&mut text[18..20], second % 60);
    put(&mut text[21..24], nanos / 1_000_000);
    out.extend_from_slice(&text);
    true
}

fn put(digits: &mut [u8], mut number: i64) {
    for digit in digits.iter_mut().rev() {
        *digit = b'0' + u8::try_from(number % 10).unwrap_or(0);
        number /= 10;
    }
}

/// Year, month and day of a number of days since 1970, counted in eras of 400 years that begin in March.
fn civil_of(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(seconds: i64, nanos: i64) -> String {
        let mut out = Vec::new();
        assert!(write(&mut out, seconds, nanos));
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn any_offset_is_read() {
        assert_eq!(parse("1970-01-01T00:00:00Z"), Some((0, 0)));
        assert_eq!(parse("1970-01-01T02:00:00.5+02:00"), Some((0, 500_000_000)));
        assert_eq!(parse("1969-12-31t19:00:00.123456789123-05:00"), Some((0, 123_456_789)));
        assert_eq!(parse("1969-12-31T23:59:59.999Z"), Some((-1, 999_000_000)));
        assert_eq!(parse("2026-12-31T00:00:00.000Z"), Some((1_798_675_200, 0)));
        assert_eq!(parse("9999-12-31T23:59:59Z"), Some((253_402_300_799, 0)));
        assert_eq!(parse("2016-12-31T23:59:60Z"), parse("2016-12-31T23:59:59Z"));
    }

    #[test]
    fn what_is_not_rfc_3339_is_refused() {
        for text in [
            "",
            "2026",
            "2026-12-31",
            "2026-12-31T00:00Z",
            "2026-12-31 00:00:00Z",
            "2026-12-31T00:00:00",
            "2026-12-31T00:00:00.Z",
            "2026-12-31T00:00:00Z ",
            "2026-12-31T00:00:00Z[UTC]",
            "2026-13-01T00:00:00Z",
            "2026-02-29T00:00:00Z",
            "2026-12-31T24:00:00Z",
            "2026-12-31T25:00:60Z",
            "2026-12-31T00:00:61Z",
            "2026-12-31T00:00:00+24:00",
            "2026-12-31T00:00:00+0200",
            "0000-01-01T00:00:00Z",
            "0001-01-01T00:00:00+00:01",
            "9999-12-31T23:59:59-00:01",
            "+026-12-31T00:00:00Z",
            "２０２６-12-31T00:00:00Z",
        ] {
            assert_eq!(parse(text), None, "{text}");
        }
    }

    #[test]
    fn every_day_is_written_as_it_is_read() {
        for day in (-719_162..2_932_896).step_by(97) {
            let seconds = day * 86_400 + 86_399;
            let text = written(seconds, 7_000_000);
            assert_eq!(parse(text.trim_matches('"')), Some((seconds, 7_000_000)), "{text}");
        }
        assert_eq!(written(-62_135_596_800, 0), "\"0001-01-01T00:00:00.000Z\"");
        assert_eq!(written(253_402_300_799, 999_999_999), "\"9999-12-31T23:59:59.999Z\"");
    }

    #[test]
    fn no_other_year_is_written() {
        let mut out = Vec::new();
        assert!(!write(&mut out, 253_402_300_800, 0));
        assert!(!write(&mut out, 0, -1));
        assert!(!write(&mut out, i64::MIN, 0));
        assert!(out.is_empty());
    }
}
