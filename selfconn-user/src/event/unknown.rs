//! Message of an event that this version does not know: the connection and the process if there are any, then
//! the other fields.

use std::fmt::Write as _;

use serde_json::Value;

use super::envelope;
use super::text::{EventFormat, LogRecord, Severity, escape, subject};

pub(super) const FORMAT: EventFormat =
    EventFormat { event: "", label: "?", severity: Severity::Notice, message, details: None };

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    let start = out.len();
    out.push_str(&escape(record.event()));
    if record.number("port").is_some() {
        out.push(' ');
        subject::endpoint(record, out)?;
    }
    if record.number("pid").is_some() {
        out.push(' ');
        subject::process(record, out)?;
    }
    for (key, value) in record.fields() {
        if matches!(key, "time" | "event" | "addr" | "port" | "pid" | "comm") || envelope::KEYS.contains(&key)
        {
            continue;
        }
        let value = match value {
            Value::Null => continue,
            Value::String(text) => escape(text),
            // A quote or backslash belongs to the JSON syntax here and is not escaped again.
            other => other.to_string().chars().map(escape_char).collect(),
        };
        if out.len() > start {
            out.push(' ');
        }
        write!(out, "{}={value}", escape(key))?;
    }
    Ok(())
}

fn escape_char(c: char) -> String {
    if matches!(c, '"' | '\'' | '\\') { c.to_string() } else { c.escape_debug().to_string() }
}

#[cfg(test)]
mod tests {
    use crate::event::tests::assert_rendered;

    #[test]
    fn an_event_of_a_newer_version_is_shown_by_its_fields() {
        assert_rendered(&[
            (
                r#"{"event":"moved\u001b","addr":"127.0.0.1","port":80,"comm":"x\n","pid":7,"by":2,"to":{"a":"\u202e"},
                    "on":["b",true],"off":null,"seq":7,"host":"web-1"}"#,
                "?            moved\\u{1b} 127.0.0.1:80 x\\n[7] by=2 on=[\"b\",true] to={\"a\":\"\\u{202e}\"}",
            ),
            (r#"{"some":"object"}"#, "?            some=object"),
        ]);
    }
}
