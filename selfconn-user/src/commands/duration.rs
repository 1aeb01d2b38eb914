//! Parses the durations of the command line. Their format is the friendly format of jiff.

use std::time::Duration;

use jiff::{Span, SpanRelativeTo};

/// Parses a time span with units, such as `90s`, `1h 30m` or `2d`. A day has 24 hours.
pub(super) fn parse(text: &str) -> Option<Duration> {
    let span: Span = text.parse().ok()?;
    span.to_duration(SpanRelativeTo::days_are_24_hours()).ok()?.try_into().ok()
}

/// The longest time that an option takes. Far below what overflows in any sum of times.
const MAX: Duration = Duration::from_secs(30 * 86_400);

/// Parses a number of seconds, or a time span with units.
pub(super) fn parse_seconds(text: &str) -> Result<Duration, String> {
    let duration = match text.parse() {
        Ok(seconds) => Duration::try_from_secs_f64(seconds).ok(),
        Err(_) => parse(text),
    };
    duration
        .filter(|duration| *duration <= MAX)
        .ok_or_else(|| "not a time such as 0.5, 500ms, 30s, 5m or 1h, of at most 30d".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_a_number_of_seconds_or_has_units() {
        for (text, ms) in [
            ("0", Some(0)),
            ("0s", Some(0)),
            ("7", Some(7_000)),
            ("0.5", Some(500)),
            ("500ms", Some(500)),
            ("30s", Some(30_000)),
            ("1.5s", Some(1_500)),
            ("5m", Some(300_000)),
            ("1h 30m", Some(5_400_000)),
            ("2d", Some(172_800_000)),
            ("30d", Some(2_592_000_000)),
            ("30d 1ns", None),
            ("2592000.1", None),
            ("18446744073709551615", None),
            ("1e30", None),
            ("1e30d", None),
            ("1/2", None),
            ("", None),
            ("s", None),
            ("-1", None),
            ("-1s", None),
            ("nan", None),
            ("inf", None),
            ("1mo", None),
            ("99999999999999999999", None),
            ("18446744073709551615h", None),
        ] {
            assert_eq!(parse_seconds(text).ok().map(|time| time.as_millis()), ms, "{text}");
        }
        assert_eq!(parse("7"), None);
        assert!(parse_seconds("31d").unwrap_err().contains("at most 30d"));
    }
}
