//! The filter of `tail`: selects the events to show.

use std::time::Duration;

use jiff::Timestamp;

use crate::{commands::duration, event::text::LogRecord};

/// All conditions must hold. Of several values for one condition, one must match.
#[derive(Clone, Debug, Default)]
pub(super) struct Filter {
    pub(super) since: Option<Timestamp>,
    pub(super) ports: Vec<u16>,
    pub(super) pids: Vec<u32>,
    pub(super) comms: Vec<String>,
    pub(super) events: Vec<String>,
    pub(super) units: Vec<String>,
    pub(super) containers: Vec<String>,
    pub(super) hosts: Vec<String>,
    /// Inodes.
    pub(super) namespaces: Vec<u64>,
}

impl Filter {
    /// True if the event matches. `state` events match only if they are requested, because there are many of
    /// them.
    pub(super) fn matches(&self, record: LogRecord<'_>) -> bool {
        let is_named = |name: &String| name == record.event();
        (if self.events.is_empty() { record.event() != "state" } else { self.events.iter().any(is_named) })
            && self.since.is_none_or(|since| record.time().is_none_or(|time| time >= since))
            && matches_any(&self.ports, |port| record.number("port") == Some(u64::from(*port)))
            && matches_any(&self.namespaces, |netns| record.number("netns") == Some(*netns))
            && matches_any(&self.hosts, |host| record.text("host") == Some(host))
            && matches_any(&self.units, |unit| {
                in_event_or_nested(record, |part| part.text("unit") == Some(unit))
            })
            && matches_any(&self.containers, |container| {
                in_event_or_nested(record, |part| {
                    part.text("container").is_some_and(|id| id.starts_with(container))
                })
            })
            && matches_any(&self.pids, |pid| {
                in_event_or_nested(record, |part| part.number("pid") == Some(u64::from(*pid)))
            })
            && matches_any(&self.comms, |comm| {
                in_event_or_nested(record, |part| {
                    part.text("comm") == Some(comm) || part.text("thread_comm") == Some(comm)
                })
            })
    }

    /// True if a line is known to be too old without parsing it. Lines of selfconn begin with their time, in
    /// a form whose text order is the time order.
    pub(super) fn is_too_old(&self, line: &[u8]) -> bool {
        let Some(since) = self.since else { return false };
        let Some(time) = line.strip_prefix(b"{\"time\":\"").and_then(|rest| rest.get(..31)) else {
            return false;
        };
        let is_ours = time[10] == b'T' && time[19] == b'.' && time[29..] == *b"Z\"";
        is_ours && time[..29] < *format!("{since:.9}").as_bytes().get(..29).unwrap_or_default()
    }
}

fn matches_any<T>(allowed: &[T], predicate: impl Fn(&T) -> bool) -> bool {
    allowed.is_empty() || allowed.iter().any(predicate)
}

/// True if the predicate holds for the event itself or for a nested object, such as a holder or the closer.
fn in_event_or_nested(record: LogRecord<'_>, predicate: impl Fn(LogRecord<'_>) -> bool) -> bool {
    predicate(record) || record.nested_objects().any(predicate)
}

/// The longest time span before now.
const MAX_AGE: Duration = Duration::from_secs(36_500 * 86_400);

/// Parses a time span before now, such as `90s`, `1h` or `2 days`, or a point in time.
pub(super) fn since(text: &str, now: Timestamp) -> Result<Timestamp, String> {
    if let Ok(time) = text.parse() {
        return Ok(time);
    }
    duration::parse(text).filter(|ago| *ago <= MAX_AGE).and_then(|ago| now.checked_sub(ago).ok()).ok_or_else(
        || {
            "neither a time span such as 90s, 30m, 1h or 2d, of at most 36500d, nor an RFC 3339 time"
                .to_owned()
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::text::parse;

    const CLOSED: &[u8] = br#"{"time":"2026-11-22T10:00:00.000000000Z","event":"closed","port":80,"pid":7,"comm":
        "main","thread_comm":"worker","holders":[{"pid":8,"comm":"heir"}],"closer":{"pid":9,"comm":"killer"}}"#;

    fn is_shown(line: &[u8], filter: &Filter) -> bool {
        filter.matches(LogRecord::new(&parse(line).unwrap()))
    }

    #[test]
    fn an_event_matches_if_all_conditions_hold() {
        let none = Filter::default();
        assert!(is_shown(CLOSED, &none));
        assert!(!is_shown(br#"{"event":"state"}"#, &none), "a connection is one line");
        assert!(is_shown(br#"{"event":"state"}"#, &Filter { events: vec!["state".into()], ..none.clone() }));
        assert!(is_shown(br#"{"event":"of a newer version"}"#, &none));
        for (ports, pids, comms, is_expected) in [
            (vec![80], vec![], vec![], true),
            (vec![81], vec![], vec![], false),
            (vec![81, 80], vec![7], vec![], true),
            (vec![80], vec![6], vec![], false),
            (vec![], vec![8], vec![], true),
            (vec![], vec![9], vec!["worker"], true),
            (vec![], vec![], vec!["main"], true),
            (vec![], vec![], vec!["heir"], true),
            (vec![], vec![], vec!["mai"], false),
        ] {
            let comms: Vec<String> = comms.into_iter().map(ToOwned::to_owned).collect();
            let filter = Filter { ports, pids, comms, ..none.clone() };
            assert_eq!(is_shown(CLOSED, &filter), is_expected, "{filter:?}");
        }
    }

    #[test]
    fn a_unit_a_container_and_a_namespace_select() {
        let line = br#"{"event":"blocked","netns":5,"unit":"web.service","container":"0123456789abcdef",
            "holder":{"unit":"db.service"}}"#;
        let filter = |unit: &str, container: &str, namespaces: &[u64]| Filter {
            units: [unit].iter().filter(|unit| !unit.is_empty()).map(ToString::to_string).collect(),
            containers: [container].iter().filter(|id| !id.is_empty()).map(ToString::to_string).collect(),
            namespaces: namespaces.to_vec(),
            ..Filter::default()
        };
        for (unit, container, namespaces, is_expected) in [
            ("web.service", "", &[][..], true),
            ("db.service", "", &[], true),
            ("web", "", &[], false),
            ("", "0123456789ab", &[], true),
            ("", "123456789ab", &[], false),
            ("", "", &[4, 5], true),
            ("", "", &[4], false),
            ("web.service", "0123456789ab", &[4], false),
        ] {
            let filter = filter(unit, container, namespaces);
            assert_eq!(is_shown(line, &filter), is_expected, "{filter:?}");
            assert!(!is_shown(br#"{"event":"stopped"}"#, &filter));
        }
    }

    #[test]
    fn a_host_selects_all_of_its_events_by_its_whole_name() {
        let of = |host: &str| Filter { hosts: vec![host.to_owned()], ..Filter::default() };
        for line in
            [br#"{"event":"closed","host":"web-1"}"#.as_slice(), br#"{"event":"stopped","host":"web-1"}"#]
        {
            assert!(is_shown(line, &of("web-1")));
            assert!(!is_shown(line, &of("web")));
            assert!(is_shown(
                line,
                &Filter { hosts: vec!["web-2".into(), "web-1".into()], ..Filter::default() }
            ));
        }
        assert!(!is_shown(br#"{"event":"stopped"}"#, &of("web-1")), "a line of before the field");
    }

    #[test]
    fn an_old_event_is_recognized_without_parsing() {
        for (since, is_expected) in [
            ("2026-11-22T09:59:59Z", true),
            ("2026-11-22T10:00:00Z", true),
            ("2026-11-22T10:00:00.000000001Z", false),
            ("2027-01-01T00:00:00Z", false),
        ] {
            let filter = Filter { since: Some(since.parse().unwrap()), ..Filter::default() };
            assert_eq!(is_shown(CLOSED, &filter), is_expected, "{since}");
            assert_eq!(filter.is_too_old(CLOSED), !is_expected, "{since}");
            // A line in another form is parsed.
            assert!(!filter.is_too_old(br#"{"event":"closed","time":"2020-01-01T00:00:00.000000000Z"}"#));
            assert!(!filter.is_too_old(br#"{"time":"2020-01-01T00:00:00Z","event":"closed"}"#));
        }
    }

    #[test]
    fn since_is_a_time_span_or_a_point_in_time() {
        let now: Timestamp = "2026-11-22T10:00:00Z".parse().unwrap();
        for (text, time) in [
            ("1h", Some("2026-11-22T09:00:00Z")),
            ("90s", Some("2026-11-22T09:58:30Z")),
            ("1h 30m", Some("2026-11-22T08:30:00Z")),
            ("2d", Some("2026-11-20T10:00:00Z")),
            ("2026-11-21T00:00:00Z", Some("2026-11-21T00:00:00Z")),
            ("2026-11-21T00:00:00+01:00", Some("2026-11-20T23:00:00Z")),
            ("-1h", None),
            ("yesterday", None),
            ("", None),
        ] {
            assert_eq!(since(text, now).ok(), time.map(|time| time.parse().unwrap()), "{text}");
        }
    }
}
