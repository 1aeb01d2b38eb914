//! Message of `closed`.

use std::fmt::Write as _;

use super::text::{EventFormat, LogRecord, Severity, escape, subject, units};

pub(crate) const FORMAT: EventFormat =
    EventFormat { event: "closed", label: "closed", severity: Severity::Notice, message, details: None };

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    subject::write(record, out)?;
    match record.number("duration_ns") {
        Some(ns) => write!(out, " after {}", units::duration(ns))?,
        None => write!(out, " after an unknown time")?,
    }
    if let (Some(sent), Some(received)) = (record.number("bytes_sent"), record.number("bytes_received")) {
        write!(out, ", {sent} B sent, {received} B received")?;
    }
    match record.text("how") {
        Some("fin") => write!(out, ", by FIN")?,
        Some("rst") => write!(out, ", by RST")?,
        Some(how) => write!(out, ", {}", escape(how))?,
        None => {}
    }
    match record.timestamp("port_blocked_until") {
        Some(until) => write!(out, "; TIME_WAIT holds the port until {}", units::utc_time(until)),
        None => Ok(()),
    }
}
