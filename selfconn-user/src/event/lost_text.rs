//! Message of `lost`.

use std::fmt::Write as _;

use super::text::{EventFormat, LogRecord, Severity, escape};

pub(crate) const FORMAT: EventFormat =
    EventFormat { event: "lost", label: "LOST", severity: Severity::Error, message, details: None };

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    if let Some(method) = record.text("method") {
        return write!(out, "{} no longer observes connections (hooks)", escape(method));
    }
    match record.number("count") {
        Some(count) => write!(out, "{count}")?,
        None => write!(out, "an unknown number")?,
    }
    write!(out, " ({})", escape(record.text("where").unwrap_or("unknown place")))
}
