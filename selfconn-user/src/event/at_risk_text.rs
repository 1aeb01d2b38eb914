//! Messages of `at_risk` and `at_risk_over`.

use std::fmt::Write as _;

use super::text::{EventFormat, LogRecord, Severity, escape, subject, units};

pub(crate) const FORMAT: EventFormat =
    EventFormat { event: "at_risk", label: "AT RISK", severity: Severity::Warning, message, details: None };

pub(crate) const OVER_FORMAT: EventFormat = EventFormat {
    event: "at_risk_over",
    label: "risk over",
    severity: Severity::Notice,
    message: over_message,
    details: None,
};

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    subject::write(record, out)?;
    write!(out, " connects to a port without a listener: ")?;
    refused_counts(record, out)?;
    match record.number("expected_dials") {
        Some(expected) => write!(out, "; one connect in {expected} becomes a self-connection")?,
        None => write!(out, "; the chance of a self-connection is unknown")?,
    }
    if let Some(seconds) = record.number("eta_seconds") {
        write!(
            out,
            ", at this rate within about {}",
            units::duration(seconds.saturating_mul(1_000_000_000))
        )?;
    }
    match record.text("range_unknown") {
        Some(why) => write!(out, ": {}", escape(why)),
        None => Ok(()),
    }
}

fn over_message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    subject::endpoint(record, out)?;
    match record.text("why") {
        Some("silence") => write!(out, ": connects have stopped")?,
        Some("unreachable") => write!(out, ": connect() can no longer choose this port")?,
        _ => write!(out, ": no longer at risk")?,
    }
    write!(out, "; ")?;
    refused_counts(record, out)?;
    write!(out, ", the last by ")?;
    subject::process(record, out)
}

/// Counts such as `240 refused in 1m35s by 3 processes`.
fn refused_counts(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    match record.number("refused") {
        Some(refused) => write!(out, "{refused} refused")?,
        None => write!(out, "an unknown number refused")?,
    }
    if let Some(ns) = record.number("window_ns") {
        write!(out, " in {}", units::duration(ns))?;
    }
    match record.number("dialers") {
        Some(dialers) if dialers > 1 => write!(out, " by {dialers} processes"),
        _ => Ok(()),
    }
}
