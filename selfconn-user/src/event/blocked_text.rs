//! Message of `blocked`.

use std::fmt::Write as _;

use super::text::{EventFormat, LogRecord, Severity, subject, units};

pub(crate) const FORMAT: EventFormat =
    EventFormat { event: "blocked", label: "BLOCKED", severity: Severity::Warning, message, details: None };

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    subject::process(record, out)?;
    write!(out, " cannot bind ")?;
    match record.text("addr") {
        // Bound to any address: only the port matters.
        Some("0.0.0.0" | "::") if record.number("port").is_some() => {
            write!(out, "{}", record.number("port").unwrap_or(0))?;
        }
        _ => subject::endpoint(record, out)?,
    }
    write!(out, ": held by ")?;
    match record.object("holder") {
        Some(holder) => held_by(holder, out)?,
        None => write!(out, "a self-connection")?,
    }
    match record.number("failures") {
        Some(failures) if failures > 1 => write!(out, "; {failures} failures"),
        _ => Ok(()),
    }
}

fn held_by(holder: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    if holder.text("state") == Some("TIME_WAIT") {
        write!(out, "the TIME_WAIT of ")?;
        subject::process(holder, out)?;
        write!(out, ", which was connected to itself")?;
        return match holder.timestamp("free_at") {
            Some(until) => write!(out, "; free at {}", units::utc_time(until)),
            None => Ok(()),
        };
    }
    subject::process(holder, out)?;
    write!(out, ", connected to itself")?;
    match holder.number("held_for_ns") {
        Some(ns) => write!(out, " for {}", units::duration(ns)),
        None => Ok(()),
    }
}
