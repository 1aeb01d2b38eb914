//! An event that this version has no sentence for: what it says of a connection, then its other fields.

use std::fmt::Write as _;

use serde_json::Value;

use super::{Kind, Record, Severity, escape, subject};

pub(super) const KIND: Kind =
    Kind { event: "", word: "?", severity: Severity::Notice, sentence, details: None };

fn sentence(record: Record<'_>, out: &mut String) -> std::fmt::Result {
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
        if matches!(key, "time" | "event" | "addr" | "port" | "pid" | "comm") {
            continue;
        }
        let value = match value {
            Value::Null => continue,
            Value::String(text) => escape(text),
            // A quote or backslash is JSON's here, and stays as it is.
            other => other.to_string().chars().map(visible).collect(),
        };
        if out.len() > start {
            out.push(' ');
        }
        write!(out, "{}={value}", escape(key))?;
    }
    Ok(())
}

fn visible(c: char) -> String {
    if matches!(c, '"' | '\'' | '\\') { c.to_string() } else { c.escape_debug().to_string() }
}
