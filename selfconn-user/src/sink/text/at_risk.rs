//! `at_risk` and `at_risk_over`.

use std::fmt::Write as _;

use super::{Kind, Record, Severity, escape, subject, units};

pub(super) const KIND: Kind =
    Kind { event: "at_risk", word: "AT RISK", severity: Severity::Warning, sentence, details: None };

pub(super) const OVER: Kind = Kind {
    event: "at_risk_over",
    word: "risk over",
    severity: Severity::Notice,
    sentence: over,
    details: None,
};

fn sentence(record: Record<'_>, out: &mut String) -> std::fmt::Result {
    subject::write(record, out)?;
    write!(out, " dials a port that nobody listens on: ")?;
    dials(record, out)?;
    match record.number("expected_dials") {
        Some(dials) => write!(out, "; one dial in {dials} hits itself")?,
        None => write!(out, "; how many hit themselves is unknown")?,
    }
    if let Some(seconds) = record.number("eta_seconds") {
        write!(
            out,
            ", at this pace within {} or so",
            units::duration(seconds.saturating_mul(1_000_000_000))
        )?;
    }
    match record.text("range_unknown") {
        Some(why) => write!(out, ": {}", escape(why)),
        None => Ok(()),
    }
}

fn over(record: Record<'_>, out: &mut String) -> std::fmt::Result {
    subject::endpoint(record, out)?;
    match record.text("why") {
        Some("silence") => write!(out, " is no longer dialled")?,
        Some("unreachable") => write!(out, " can no longer be chosen by connect()")?,
        _ => write!(out, " is no longer at risk")?,
    }
    write!(out, ": ")?;
    dials(record, out)?;
    write!(out, ", the last by ")?;
    subject::process(record, out)
}

/// `240 refused in 1m35s by 3 processes`.
fn dials(record: Record<'_>, out: &mut String) -> std::fmt::Result {
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
