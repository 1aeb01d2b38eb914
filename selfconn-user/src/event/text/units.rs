//! Times and durations as text: readable ones, and the timestamps of the JSON.

use std::time::Duration;

use jiff::{Timestamp, tz::TimeZone};
use serde::Serializer;

/// Time of day in UTC. The date is only in the JSON.
#[must_use]
pub fn utc_time(time: Timestamp) -> String {
    TimeZone::UTC.to_datetime(time).strftime("%H:%M:%S.%6fZ").to_string()
}

/// Serializes a timestamp as RFC 3339 with nanoseconds.
///
/// # Errors
/// As the serializer.
pub fn rfc3339<S: Serializer>(time: &Timestamp, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(&format_args!("{time:.9}"))
}

/// As [`rfc3339`], or null.
///
/// # Errors
/// As the serializer.
pub fn optional_rfc3339<S: Serializer>(time: &Option<Timestamp>, to: S) -> Result<S::Ok, S::Error> {
    match time {
        Some(time) => rfc3339(time, to),
        None => to.serialize_none(),
    }
}

/// A duration in its two largest units.
#[must_use]
pub fn duration(ns: u64) -> String {
    let seconds = ns / 1_000_000_000;
    match seconds {
        0..60 => format!("{:.1?}", Duration::from_nanos(ns)),
        60..3_600 => format!("{}m{}s", seconds / 60, seconds % 60),
        3_600..86_400 => format!("{}h{}m", seconds / 3_600, seconds / 60 % 60),
        _ => format!("{}d{}h", seconds / 86_400, seconds / 3_600 % 24),
    }
}

/// A number with commas between the thousands.
pub(crate) fn group_thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_use_the_two_largest_units() {
        for (ns, text) in [
            (1_500, "1.5µs"),
            (2_000_000, "2.0ms"),
            (1_200_000_000, "1.2s"),
            (61_000_000_000, "1m1s"),
            (11_520_000_000_000, "3h12m"),
            (90_000_000_000_000, "1d1h"),
        ] {
            assert_eq!(duration(ns), text);
        }
    }

    #[test]
    fn thousands_are_grouped() {
        for (number, text) in
            [(0, "0"), (999, "999"), (1000, "1,000"), (14116, "14,116"), (1_234_567, "1,234,567")]
        {
            assert_eq!(group_thousands(number), text);
        }
    }
}
