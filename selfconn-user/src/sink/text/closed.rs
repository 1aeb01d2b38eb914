//! `closed`.

use std::fmt::Write as _;

use super::{Kind, Record, Severity, escape, subject, units};

pub(super) const KIND: Kind =
    Kind { event: "closed", word: "closed", severity: Severity::Notice, sentence, details: None };

fn sentence(record: Record<'_>, out: &mut String) -> std::fmt::Result {
    subject::write(record, out)?;
    match record.number("duration_ns") {
        Some(ns) => write!(out, " after {}", units::duration(ns))?,
        None => write!(out, " after an unknown time")?,
    }
    if let (Some(sent), Some(received)) = (record.number("bytes_sent"), record.number("bytes_received")) {
        write!(out, ", {sent} B sent, {received} B received")?;
    }
    match record.text("how") {
        Some("fin") => write!(out, ", in order")?,
        Some("rst") => write!(out, ", by a reset")?,
        Some(how) => write!(out, ", {}", escape(how))?,
        None => {}
    }
    match record.moment("port_blocked_until") {
        Some(until) => write!(out, "; TIME_WAIT holds the port until {}", units::clock(until)),
        None => Ok(()),
    }
}
