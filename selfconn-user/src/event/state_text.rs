//! Message of `state`.

use std::fmt::Write as _;

use super::text::{EventFormat, LogRecord, Severity, escape, subject};

pub(crate) const FORMAT: EventFormat =
    EventFormat { event: "state", label: "state", severity: Severity::Info, message, details: None };

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    let name = |key| escape(record.text(key).unwrap_or("?"));
    subject::write(record, out)?;
    write!(out, " {} -> {}", name("from"), name("to"))
}
