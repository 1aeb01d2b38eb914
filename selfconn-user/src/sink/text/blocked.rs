//! `blocked`.

use std::fmt::Write as _;

use super::{Kind, Record, Severity, subject, units};

pub(super) const KIND: Kind =
    Kind { event: "blocked", word: "BLOCKED", severity: Severity::Warning, sentence, details: None };

fn sentence(record: Record<'_>, out: &mut String) -> std::fmt::Result {
    subject::process(record, out)?;
    write!(out, " can't bind ")?;
    match record.text("addr") {
        // Any address.
        Some("0.0.0.0" | "::") if record.number("port").is_some() => {
            write!(out, "{}", record.number("port").unwrap_or(0))?;
        }
        _ => subject::endpoint(record, out)?,
    }
    write!(out, ": held by ")?;
    match record.object("holder") {
        Some(holder) => held(holder, out)?,
        None => write!(out, "a self-connection")?,
    }
    match record.number("failures") {
        Some(failures) if failures > 1 => write!(out, "; {failures} failures"),
        _ => Ok(()),
    }
}

fn held(holder: Record<'_>, out: &mut String) -> std::fmt::Result {
    if holder.text("state") == Some("TIME_WAIT") {
        write!(out, "the TIME_WAIT of ")?;
        subject::process(holder, out)?;
        write!(out, ", which was connected to itself")?;
        return match holder.moment("free_at") {
            Some(until) => write!(out, "; free at {}", units::clock(until)),
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
