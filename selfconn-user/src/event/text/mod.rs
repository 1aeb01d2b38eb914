//! Events as readable text, one line for each event. Text that a process chose is escaped, so that it cannot
//! move the cursor or reverse the text direction.
//!
//! A line is rendered only from the JSON object of the event. Therefore an event of this run, an event from a
//! log, and an event of a newer version take the same path, and `run` and `tail` show the same text.
//!
//! Each event name has a file here with its [`EventFormat`], which is listed in [`FORMATS`].

use crate::event::at_risk_text;
use crate::event::blocked_text;
use crate::event::closed_text;
use crate::event::established_text;
use crate::event::lost_text;
use crate::event::remedied_text;
use crate::event::started_text;
use crate::event::state_text;
use crate::event::stopped_text;
use crate::event::unknown_text;
use std::fmt::Write as _;

use serde_json::{Map, Value};

use super::Event;

mod escape;
mod record;
mod style;
pub(crate) mod subject;
pub(crate) mod units;

pub use escape::escape;
pub use record::LogRecord;
pub use record::parse;
pub use record::to_json_fields;
pub use style::Style;
pub use units::duration;

/// How the events of one name are rendered as text.
#[derive(Debug)]
pub struct EventFormat {
    /// The name in the field `event`.
    pub event: &'static str,
    /// Shown before the message, at most 12 characters. In capitals if an operator should look at the event.
    pub label: &'static str,
    pub severity: Severity,
    /// Appends the rest of the line. A tab ends the first column. Must escape text that a process chose, and
    /// must not mention an unknown field.
    pub message: fn(LogRecord<'_>, &mut String) -> std::fmt::Result,
    /// Appends further lines for outputs that allow them. Each begins with a line break and four spaces.
    pub details: Option<fn(LogRecord<'_>, &mut String) -> std::fmt::Result>,
}

/// Severities with their syslog numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Something is broken or was lost.
    Error = 3,
    /// An operator should look at it.
    Warning = 4,
    /// Normal but significant.
    Notice = 5,
    Info = 6,
}

/// The formats of all events that this version knows.
pub const FORMATS: [&EventFormat; 10] = [
    &started_text::FORMAT,
    &established_text::FORMAT,
    &state_text::FORMAT,
    &closed_text::FORMAT,
    &remedied_text::FORMAT,
    &at_risk_text::FORMAT,
    &at_risk_text::OVER_FORMAT,
    &blocked_text::FORMAT,
    &lost_text::FORMAT,
    &stopped_text::FORMAT,
];

/// The format for this event. An event of a newer version is rendered as a list of its fields.
#[must_use]
pub fn format_of(record: LogRecord<'_>) -> &'static EventFormat {
    FORMATS.into_iter().find(|format| format.event == record.event()).unwrap_or(&unknown_text::FORMAT)
}

/// Appends an event as text, with its detail lines.
pub fn line(event: &Event, out: &mut Vec<u8>) {
    let fields: Map<String, Value> = to_json_fields(event);
    let record = LogRecord::new(&fields);
    let mut text = String::with_capacity(160);
    let written = render(record, &mut text);
    debug_assert!(written.is_ok(), "writing to a String does not fail");
    out.extend_from_slice(text.as_bytes());
    out.push(b'\n');
}

pub(crate) fn render(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    let format = format_of(record);
    if let Some(time) = record.time() {
        write!(out, "{}  ", units::utc_time(time))?;
    }
    write!(out, "{:<12} ", format.label)?;
    let mut message = String::with_capacity(120);
    (format.message)(record, &mut message)?;
    style::align_columns(&message, out);
    format.details.map_or(Ok(()), |details| details(record, out))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The rendered line of a JSON event.
    fn rendered(json: &str) -> String {
        let fields = parse(json.as_bytes()).unwrap();
        let mut text = String::new();
        render(LogRecord::new(&fields), &mut text).unwrap();
        text
    }

    #[test]
    fn a_line_mentions_only_known_fields() {
        for (json, line) in [
            (
                r#"{"time":"2026-11-22T23:09:58.5793Z","event":"established","addr":"127.0.0.1","port":38160,
                    "comm":"nginx","pid":7,"cause":"ephemeral","isn":5,"peer_isn":5}"#,
                "23:09:58.579300Z  ESTABLISHED  127.0.0.1:38160       nginx[7] is connected to itself; connect() \
                 chose its port; both ISNs 5",
            ),
            (
                r#"{"event":"established","addr":"::1","port":80,"comm":null,"pid":null,"cause":null}"#,
                "ESTABLISHED  [::1]:80              an unknown process is connected to itself",
            ),
            (
                r#"{"event":"established","addr":"127.0.0.1","port":80,"pid":7,"cause":"bound","isn":1,"peer_isn":2}"#,
                "ESTABLISHED  127.0.0.1:80          [7] is connected to itself; its port was bound before connect(); ISNs 1 and 2",
            ),
            (
                r#"{"event":"state","addr":"127.0.0.1","port":80,"pid":7,"from":"SYN_SENT","to":"SYN_RECV"}"#,
                "state        127.0.0.1:80          [7] SYN_SENT -> SYN_RECV",
            ),
            (
                r#"{"event":"closed","addr":"127.0.0.1","port":80,"pid":7,"duration_ns":5000000,"bytes_sent":24,
                    "bytes_received":24,"how":"fin","port_blocked_until":"2026-11-22T23:10:58.584252Z"}"#,
                "closed       127.0.0.1:80          [7] after 5.0ms, 24 B sent, 24 B received, by FIN; TIME_WAIT holds \
                 the port until 23:10:58.584252Z",
            ),
            (
                r#"{"event":"closed","addr":"127.0.0.1","port":80,"pid":7,"duration_ns":null,"how":"rst"}"#,
                "closed       127.0.0.1:80          [7] after an unknown time, by RST",
            ),
            (
                r#"{"event":"remedied","addr":"127.0.0.1","port":80,"comm":"a\nb","pid":7,"mode":"destroy",
                    "result":"destroyed","why":null,"port_freed":true}"#,
                "remedied     127.0.0.1:80          a\\nb[7]: destroyed; its port is free",
            ),
            (
                r#"{"event":"remedied","addr":"127.0.0.1","port":80,"pid":7,"mode":"dry-run",
                    "result":"excepted","why":"except comm=\u001b*","port_freed":null}"#,
                "remedied     127.0.0.1:80          [7]: excluded (except comm=\\u{1b}*)",
            ),
            (
                r#"{"event":"remedied","addr":"127.0.0.1","port":80,"pid":7,"result":"would_destroy",
                    "port_freed":false}"#,
                "remedied     127.0.0.1:80          [7]: would be destroyed; it keeps its port until it is closed",
            ),
            (
                r#"{"event":"at_risk","addr":"::1","port":40000,"comm":"curl","pid":7,"dialers":20,"refused":20,
                    "window_ns":19000000000,"expected_dials":14116,"eta_seconds":14116,"range_unknown":null}"#,
                "AT RISK      [::1]:40000           curl[7] connects to a port without a listener: 20 refused in 19.0s by 20 \
                 processes; one connect in 14116 becomes a self-connection, at this rate within about 3h55m",
            ),
            (
                r#"{"event":"at_risk","addr":"::1","port":80,"comm":"curl","pid":7,"dialers":1,"refused":20,
                    "window_ns":19000000000,"expected_dials":null,"eta_seconds":null,"range_unknown":"no way"}"#,
                "AT RISK      [::1]:80              curl[7] connects to a port without a listener: 20 refused in 19.0s; the \
                 chance of a self-connection is unknown: no way",
            ),
            (
                r#"{"event":"at_risk_over","addr":"::1","port":80,"comm":"curl","pid":7,"dialers":1,"refused":240,
                    "window_ns":95000000000,"why":"silence"}"#,
                "risk over    [::1]:80: connects have stopped; 240 refused in 1m35s, the last by curl[7]",
            ),
            (
                r#"{"event":"at_risk_over","addr":"::1","port":80,"comm":"curl","pid":7,"dialers":2,"refused":240,
                    "window_ns":95000000000,"why":"unreachable"}"#,
                "risk over    [::1]:80: connect() can no longer choose this port; 240 refused in 1m35s by 2 processes, \
                 the last by curl[7]",
            ),
            (
                r#"{"event":"blocked","addr":"0.0.0.0","port":44446,"comm":"nginx","pid":812,"failures":1,"holder":
                    {"comm":"java","pid":13154,"state":"ESTABLISHED","held_for_ns":11520000000000,"free_at":null}}"#,
                "BLOCKED      nginx[812] cannot bind 44446: held by java[13154], connected to itself for 3h12m",
            ),
            (
                r#"{"event":"blocked","addr":"::1","port":80,"comm":"a\u001b","pid":7,"failures":9,"holder":{"comm":
                    "b\n","pid":8,"state":"TIME_WAIT","held_for_ns":5,"free_at":"2026-11-22T23:10:58.584252Z"}}"#,
                "BLOCKED      a\\u{1b}[7] cannot bind [::1]:80: held by the TIME_WAIT of b\\n[8], which was connected \
                 to itself; free at 23:10:58.584252Z; 9 failures",
            ),
            (r#"{"event":"lost","where":"ring","count":7}"#, "LOST         7 (ring)"),
            (
                r#"{"event":"lost","where":"hooks","count":1,"method":"perf"}"#,
                "LOST         perf no longer observes connections (hooks)",
            ),
            (
                r#"{"event":"stopped","made":9,"written":8,"lost":{"ring":1,"missed":2,"log":3},"open":4}"#,
                "stopped      9 events, 8 in the log, lost: log 3, missed 2, ring 1; 4 still open",
            ),
            (
                r#"{"event":"stopped","made":9,"written":null,"lost":{"ring":0,"missed":0},"open":0}"#,
                "stopped      9 events, nothing lost; 0 still open",
            ),
            (
                r#"{"event":"started","version":"0.1.0","pid":7,"kernel":"6.1\u001b","hooks":[{"hook":"h","method":
                    "tp_btf","refused":[]},{"hook":"h","method":"perf","refused":[]},{"hook":"g","method":null,
                    "refused":[{"method":"fentry","why":"refused"}]}],"binds":{"method":null,"refused":[{"method":
                    "perf","why":"no"}]},"limits":["one"]}"#,
                "started      selfconn 0.1.0 [7] on kernel 6.1\\u{1b}\n    h: attached by tp_btf and perf\n    g: not \
                 attached\n        fentry refused\n    failed binds: not observed\n        perf no\n    limit: one",
            ),
        ] {
            assert_eq!(rendered(json), line);
        }
    }

    #[test]
    fn an_event_of_a_newer_version_is_shown_by_its_fields() {
        assert_eq!(
            rendered(
                r#"{"event":"moved\u001b","addr":"127.0.0.1","port":80,"comm":"x\n","pid":7,"by":2,"to":{"a":"\u202e"},
                    "on":["b",true],"off":null}"#
            ),
            "?            moved\\u{1b} 127.0.0.1:80 x\\n[7] by=2 on=[\"b\",true] to={\"a\":\"\\u{202e}\"}"
        );
        assert_eq!(rendered(r#"{"some":"object"}"#), "?            some=object");
    }

    #[test]
    fn every_documented_event_has_a_format() {
        let page = include_str!("../../../../docs/events.md");
        let table = page.split("| `event` | when |").nth(1).unwrap();
        let rows = table.lines().skip(2).take_while(|row| row.starts_with("| ["));
        let documented: Vec<_> = rows.filter_map(|row| row.split('`').nth(1)).collect();
        assert_eq!(FORMATS.map(|format| format.event)[..], documented[..]);
    }

    #[test]
    fn a_field_of_an_unexpected_type_is_unknown() {
        assert_eq!(
            rendered(r#"{"time":7,"event":"lost","where":["ring"],"count":"many"}"#),
            "LOST         an unknown number (unknown place)"
        );
    }
}
