//! Message of `stopped`: the totals of the run.

use std::fmt::Write as _;

use super::text::{EventFormat, LogRecord, Severity, escape};

pub(crate) const FORMAT: EventFormat =
    EventFormat { event: "stopped", label: "stopped", severity: Severity::Notice, message, details: None };

fn message(record: LogRecord<'_>, out: &mut String) -> std::fmt::Result {
    write!(out, "{} events", record.number("made").unwrap_or(0))?;
    if let Some(written) = record.number("written") {
        write!(out, ", {written} in the log")?;
    }
    let losses: Vec<_> = record
        .object("lost")
        .into_iter()
        .flat_map(LogRecord::fields)
        .filter_map(|(place, count)| Some((place, count.as_u64().filter(|count| *count > 0)?)))
        .map(|(place, count)| format!("{} {count}", escape(place)))
        .collect();
    match &losses[..] {
        [] => write!(out, ", nothing lost")?,
        losses => write!(out, ", lost: {}", losses.join(", "))?,
    }
    write!(out, "; {} still open", record.number("open").unwrap_or(0))
}
