//! Message of `remedied`.

use std::fmt::Write as _;

use super::text::{EventFormat, LogRecord, Severity, escape, subject};

pub(crate) const FORMAT: EventFormat =
    EventFormat { event: "remedied", label: "remedied", severity: Severity::Notice, message, details: None };

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    subject::write(record, out)?;
    match record.text("result") {
        Some("destroyed") => write!(out, ": destroyed")?,
        Some("would_destroy") => write!(out, ": would be destroyed")?,
        Some("excepted") => write!(out, ": excluded")?,
        Some("rate_limited") => write!(out, ": delayed by the rate limit")?,
        Some("gone") => write!(out, ": already closed")?,
        Some("failed") => write!(out, ": could not be destroyed")?,
        Some(result) => write!(out, ": {}", escape(result))?,
        None => {}
    }
    if let Some(why) = record.text("why") {
        write!(out, " ({})", escape(why))?;
    }
    match record.flag("port_freed") {
        Some(true) => write!(out, "; its port is free"),
        Some(false) => write!(out, "; it keeps its port until it is closed"),
        None => Ok(()),
    }
}
